"""Sets up, once a process, what both apps work with: data, partition, model.

In simulation one process serves many clients and many messages, so the runtime is kept between them; in deployment
each message has a process of its own, which opens it or is a fork of one that did. Threads that serve clients at the
same time share data and partition, and each has a `WorkerState` of its own: what a message writes to.
"""

import functools
import hashlib
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ssfl_app import callbacks
from ssfl_app import config as configuration
from ssfl_app.comm.payload import ClientState
from ssfl_app.config import Config
from ssfl_app.core.client import ClientAlgorithm, ClientContext, no_identity
from ssfl_app.core.strategy import ServerContext
from ssfl_app.core.summand import Identity
from ssfl_app.data import dataset as data
from ssfl_app.data.dataset import DataSet, Samples
from ssfl_app.data.summary import ALL, DataSummary
from ssfl_app.options import ConfigError, Scalar
from ssfl_app.partitions import Indices, Partition, split
from ssfl_app.partitions.stream import check_stream, in_play
from ssfl_app.registry import sources
from ssfl_app.seeding import generator
from ssfl_app.sparsity.channels import Widths, whole_widths, widths_in
from ssfl_app.sparsity.layout import Layout, State, load_state, mask_everything, state_digest, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.shared.scoring import SsflOptions
from ssfl_app.text import one_line
from ssfl_app.training import models
from ssfl_app.training.fused import check_fused
from ssfl_app.training.gpu import MOST_AT_ONCE, memory_need
from ssfl_app.training.narrow import of_widths
from ssfl_app.training.private_step import check_private
from ssfl_app.training.reparam import originals, without_other_form
from ssfl_app.training.tasks import Classification, make_task
from ssfl_app.training.trainer import LocalTrainer, Steps

MOST_KEPT = 8 * 2**20
"""Parameters of the largest model whose initial weights stay in memory, 32 MB, though few messages need them."""


@dataclass(frozen=True)
class WorkerState:
    """What one thread works at: a model that each message loads, its trainer, and unpacked masks by digest.

    `narrow` has the narrower network of a run whose widths were found.
    """

    model: nn.Module
    trainer: LocalTrainer
    masks: dict[str, Mask] = field(default_factory=dict)
    narrow: dict[Widths, nn.Module] = field(default_factory=dict)


@dataclass
class Runtime:
    """Data, partition, model and trainer of one configuration.

    Where each site has data of its own, `data` are those of this one, or the server's test set, and the one share of
    `partition` is all of them. `model` and `trainer` are those of the thread that made the runtime.
    """

    config: Config
    data: DataSet
    partition: Partition
    model: nn.Module
    layout: Layout
    trainer: LocalTrainer
    _threads: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self._threads.state = WorkerState(self.model, self.trainer)

    @property
    def worker_state(self) -> WorkerState:
        """The worker state of the calling thread; it is made on first use and goes with its thread."""
        if not hasattr(self._threads, "state"):
            device = self.trainer.device
            torch.set_num_threads(self.config.engine.threads)  # OpenMP keeps this number for each thread
            if device.type == "cuda":  # all that this thread does on the GPU, beside what others do there
                torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            model, trainer = _model(self.config, self.data, device), _trainer(self.config, self.data, device)
            self._threads.state = WorkerState(model, trainer)
        return self._threads.state  # type: ignore[no-any-return]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of what the configuration names and this package does not bring."""
        return tuple(configuration.foreign_modules(self.config.flat))

    @functools.cached_property
    def dense(self) -> Mask:
        """The mask under which everything is alive."""
        return Mask.dense(self.layout)

    def initial_state(self) -> State:
        """Return the weights that a run starts from, on the CPU; nobody writes into them."""
        return self._start if self._shared_start or self.layout.size <= MOST_KEPT else self._made()

    @property
    def _shared_start(self) -> bool:
        # Whether server and clients must have the same ones, message after message.
        sections = self.config.settings.sections
        lifted = "ssfl" in sections and sections["ssfl"].refresh == "continuous"
        return bool(self.config.settings.mask.frozen or self.config.model.weights or lifted)

    @functools.cached_property
    def _start(self) -> State:
        # Kept where each message needs it, a file would be read for it, or it costs a simulation's clients more time
        # to draw than to score.
        return self._made()

    def _made(self) -> State:
        shape, seed = self.data.shape, self.config.settings.run.seed
        return state_of(models.create(self.config.model, shape, self.data.outputs, seed))

    @functools.cached_property
    def start_digest(self) -> str:
        """The digest of the initial weights, where server and clients must have the same ones; else ""."""
        return state_digest(self.layout, self.initial_state()) if self._shared_start else ""

    def load(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return a model of this thread with a state in it: of the whole network, or of a narrower one."""
        own, shapes = self.worker_state, {name: tuple(tensor.shape) for name, tensor in state.items()}
        model = own.model
        if self.layout.inner and (widths := widths_in(self.layout, shapes)) != whole_widths(self.layout):
            if widths not in own.narrow:
                own.narrow.clear()
                own.narrow[widths] = of_widths(own.model, self.layout, widths)
            model = own.narrow[widths]
        load_state(model, state)
        return model

    def fitting_clients(self) -> int:
        """Return how many clients the free memory of the GPU holds at once, by an estimate; at least one."""
        outline = models.outline(self.config.model, self.data.shape, self.data.outputs)
        size, tokens = self.config.settings.local.batch_size, not self.data.numbers
        need = memory_need(outline, self.data.shape, size, tokens)
        return max(1, torch.cuda.mem_get_info(self.trainer.device)[0] // need)

    @property
    def own(self) -> bool:
        """Whether each client has data of its own."""
        return self.config.data.where == "sites"

    def share(self, client: int) -> tuple[Indices, Indices]:
        """Return the indices of a client's training and test images; none for a number that is not needed."""
        place = 0 if self.own else client
        if place >= len(self.partition.train):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return self.partition.train[place], self.partition.test[place]

    def in_round(self, client: int, round_: int) -> tuple[Indices, Indices]:
        """Return the indices of the images that a client trains and tests on in a round: all, unless they stream."""
        train, test = self.share(client)
        return self._playing(train, "train", client, round_), self._playing(test, "test", client, round_)

    def central_test(self, round_: int) -> Samples:
        """Return the test images of a round that the server knows: all, unless they stream."""
        if self.config.settings.shift.stream == "none":
            return self.data.test
        return self.data.test.take(self._playing(np.arange(len(self.data.test)), "test", "server", round_))

    def _playing(self, indices: Indices, part: str, whose: int | str, round_: int) -> Indices:
        """Return those of some images, of the part "train" or "test", that are in play in a round."""
        shift = self.config.settings.shift
        if shift.stream == "none":
            return indices
        samples = self.data.train if part == "train" else self.data.test
        rng = generator(self.config.settings.run.seed, "stream", part, whose, round_)
        labels = samples.labels.cpu().numpy()[indices]
        some = part == "train" or whose == "server"
        return indices[in_play(shift, self.data.classes, round_, labels, rng, some)]

    def holding(self, client: int) -> DataSummary:
        """Return what a client holds."""
        return self.data.holding(*self.share(client))

    def rule(
        self,
        client: int,
        memory: ClientState,
        least_batch: int = 1,
        identity: Callable[[], Identity] = no_identity,
        round_: int | None = None,
    ) -> ClientAlgorithm:
        """Return the client side of the strategy for one client; see `ClientContext`.

        It has what the client holds in a round, where that is a stream; None: all that it ever holds.
        """
        state = self.worker_state
        site = ClientContext(
            client_id=client,
            settings=self.config.settings,
            model=state.model,
            layout=self.layout,
            trainer=state.trainer,
            data=self.data,
            indices=self.share(client) if round_ is None else self.in_round(client, round_),
            memory=memory,
            least_batch=least_batch,
            identity=identity,
            initial_state=self.initial_state,
            dense=self.dense,
            masks=state.masks,
            narrow=state.narrow,
        )
        return REGISTRY[self.config.strategy].client(site)


_Items = tuple[tuple[str, Scalar], ...]
_OPENING = threading.Lock()
_CHECKED: dict[tuple[_Items, str], tuple[Config, tuple[DataSet, Partition]]] = {}
"""What `check` loaded for the `get_runtime` that follows it in this process: one configuration's at the most."""


@functools.lru_cache(maxsize=2)
def _open(items: _Items, site: str) -> Runtime:
    config, loaded = _CHECKED.pop((items, site), None) or (configuration.parse(dict(items)), None)
    torch.set_num_threads(config.engine.threads)
    device = find_device(config.settings.run.device)
    images, partition = loaded or _load(config, site)
    if device.type == "cuda" and config.engine.kernels == "fused":
        check_fused(_outline(config, images), config.model.name)
    images = _resident(images, device)
    model = _model(config, images, device)
    return Runtime(config, images, partition, model, Layout.of(model), _trainer(config, images, device))


def _model(config: Config, images: DataSet, device: torch.device) -> nn.Module:
    model = models.create(config.model, images.shape, images.outputs, config.settings.run.seed).to(device)
    if config.settings.mask.frozen:
        mask_everything(model)
    if (
        device.type == "cuda"
        and len(images.shape) == 3
        and (
            config.engine.kernels == "fused"
            or not any(isinstance(module, nn.GroupNorm) for module in model.modules())
        )
    ):
        # The layout of the convolutions that are fast there. Torch's GroupNorm would change it back, and forth.
        model = model.to(memory_format=torch.channels_last)
    return model


def _outline(config: Config, images: DataSet) -> nn.Module:
    """Return the model without memory."""
    model = models.outline(config.model, images.shape, images.outputs)
    if config.settings.mask.frozen:
        mask_everything(model)
    return model


def _trainer(config: Config, images: DataSet, device: torch.device) -> LocalTrainer:
    engine = config.engine
    # On a GPU without graphs too: the same kernels give the same bits.
    steps: Steps = "plain" if device.type == "cpu" else "graphs" if engine.graphs else "static"
    fewest, task = models.fewest(config.model, images.shape, images.outputs), make_task(config.task, images.task)
    return LocalTrainer(
        config.settings.local, images.transform, device, engine.precision, steps, fewest, task, engine.kernels
    )


def _resident(images: DataSet, device: torch.device) -> DataSet:
    """Return the data set on the GPU, if there is one and the images take no more than half of what is free there."""
    size = images.train.inputs.nbytes + images.test.inputs.nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] // 2:
        return images
    return images.to(device)


def get_runtime(flat: configuration.Flat, data_path: str = "") -> Runtime:
    """Return the runtime of a run config, made on first use and kept.

    `data_path` is where a client says that the data lie on its machine: the shared set, or its own.

    Raises
    ------
    ConfigError
        The configuration is bad, its data cannot be read, or there is no GPU where one is asked for.
    """
    if flat.get("data.where") != "sites" and data_path:
        flat = flat | {"data.path": data_path}
    with _OPENING:  # by one thread, for all
        return _open(tuple(sorted(flat.items())), data_path)


def _load(config: Config, site: str) -> tuple[DataSet, Partition]:
    """Return a data set and who holds what of it; `site` is where a site's own data lie, "" on the server."""
    shared = config.data.where == "shared"
    if shared:
        images, partition = load_federation(config)
    else:
        images = _for_task(config, data.load_own(config.data, site) if site else data.load_central(config.data))
        partition = Partition((np.arange(len(images.train)),), (np.arange(len(images.test)),))
    check_model(config, images, partition if shared or site else None)
    return images, partition


def check_model(config: Config, images: DataSet, partition: Partition | None) -> None:
    """Raise ConfigError unless the strategy can train the model, on batches that its norms take.

    Batches may be too small by configuration, or a client of `partition` (None: unknown) have too few images: what no
    later round would cure is refused before the first.
    """
    client, settings, name = REGISTRY[config.strategy].client, config.settings, config.model.name
    if name not in models.REGISTRY:
        outline = _outline(config, images)
        if client.reparametrises and (odd := without_other_form(outline)):
            rule = f"it computes with weights in another form, which {name} has no way to with {odd[0]}"
            raise ConfigError(f"strategy is {config.strategy!r}; {rule}")
        frozen = [weight for weight, w in originals(outline).items() if not w.requires_grad]
        if frozen and REGISTRY[config.strategy].uses_density:
            raise ConfigError(
                f"model.name is {name!r}; its {frozen[0]} is frozen, and a mask is of weights that train"
            )
    if settings.mask.granularity == "channel" and REGISTRY[config.strategy].uses_density:
        outline = models.outline(config.model, images.shape, images.outputs)
        if not Layout.of(outline).inner:
            rule = "it is 'weight' with a model that does not say which of its channels are inner (docs/own.md)"
            raise ConfigError(f"mask.granularity is 'channel'; {rule}: model.name is {name!r}")
    if settings.privacy.level == "record":
        outline = models.outline(config.model, images.shape, images.outputs)
        check_private(outline, name, config.model.norm, name in models.REGISTRY)
    fewest = models.fewest(config.model, images.shape, images.outputs)
    if fewest == 1:
        return
    cause = "BatchNorm trains on two values a channel or more"
    if name in models.REGISTRY:
        pixels = "x".join(map(str, images.shape[1:]))
        cause = f"with model.norm 'batch' {name} brings {pixels} images down to one pixel, and {cause}"
    sizes = {"local.batch-size": settings.local.batch_size}
    if "ssfl" in settings.sections:
        sizes["ssfl.saliency-batch-size"] = SsflOptions.from_settings(settings).saliency_batch_size
    for key, size in sizes.items():
        if size < fewest:
            raise ConfigError(f"{key} is {size}; it is at least {fewest}: {cause}")
    for number, own in enumerate(partition.train if partition else ()):
        trained = client.trained(settings, len(own))
        if trained < fewest:
            who = f"client {number}" if config.data.where == "shared" else "this site"
            raise ConfigError(
                f"{who} has {len(own)} training image(s) and trains on {trained}; it needs {fewest}: {cause}. "
                "model.norm 'group' needs one"
            )


def load_federation(config: Config) -> tuple[DataSet, Partition]:
    """Return the data set and who holds what; ConfigError if it cannot be read, dealt so, or is not dealt at all."""
    if config.data.where != "shared":
        raise ConfigError(f"data.where is {config.data.where!r}; what sites bring with them is not dealt")
    images = _for_task(config, data.load(config.data))
    run = config.settings.run
    check_stream(config.settings.shift, images.classes)
    labels = images.train.labels.numpy(), images.test.labels.numpy()
    return images, split(config.partition, *labels, run.clients, run.seed, config.settings.shift, images.owners)


def _for_task(config: Config, images: DataSet) -> DataSet:
    """Return the data with targets as the task has them; ConfigError if they are none of its."""
    task = make_task(config.task, images.task)
    if task.numbers and not images.train.targets.is_floating_point():
        parts = [Samples(x.inputs, x.targets.float().reshape(len(x), -1)) for x in (images.train, images.test)]
        return replace(images, train=parts[0], test=parts[1], class_names=ALL, outputs=parts[0].targets.shape[1])
    flow = REGISTRY[config.strategy].feeds_ones(config.settings)
    if flow and not images.numbers:
        raise ConfigError(f"{flow}; it computes with ones for inputs, and these are tokens")
    if task.classes and images.class_names == ALL:
        raise ConfigError(
            f"task.name is {config.task.name!r}; the targets of data.name {config.data.name!r} are no classes: it is "
            f"{images.task!r} or one of your own"
        )
    return images


def _rehearse(config: Config, images: DataSet) -> None:
    """Raise ConfigError unless a model or task that is not built in computes a loss of a few samples and is scored.

    It costs a model's memory on the CPU, for that long. Where weights can die, all are dead once: a layer that
    divides by their norm computes no number then, and would end a run in some later round.
    """
    samples, task = images.train if len(images.train) else images.test, make_task(config.task, images.task)
    if not len(samples) or (config.model.name in models.REGISTRY and type(task) is Classification):
        return
    trainer, few = _trainer(config, images, torch.device("cpu")), samples.take(np.arange(min(2, len(samples))))
    model = models.create(config.model, images.shape, images.outputs, config.settings.run.seed)
    names = f"model.name is {config.model.name!r} and task.name {config.task.name!r}"
    # Nothing goes backward and nothing computes in threads: a process that did either has no forks that learn.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            if not trainer.loss(model, few).requires_grad:
                raise ConfigError(f"{names}; the loss of the model's output has no gradient")
            alive = trainer.evaluate(model, few)[0]
            pruned = REGISTRY[config.strategy].uses_density and not config.settings.mask.frozen
            for weight in originals(model).values() if pruned else ():
                weight.data.zero_()
            dead = trainer.evaluate(model, few)[0]
    except ConfigError:
        raise
    except NotImplementedError as error:
        if "backend" in str(error):  # of an operator that the CPU does not have
            return
        raise ConfigError(f"{names}; one of them lacks something: {one_line(error)}") from error
    except Exception as error:
        what = f"{len(few)} samples of data.name {config.data.name!r}, inputs {tuple(few.inputs.shape)} of "
        what += f"{few.inputs.dtype} and targets {tuple(few.targets.shape)} of {few.targets.dtype}"
        raise ConfigError(f"{names}; of {what} there is no loss or score: {one_line(error)}") from error
    finally:
        torch.set_num_threads(threads)
    if math.isfinite(alive) and not math.isfinite(dead):
        rule = "a strategy without a mask takes it, or a layer that does not divide by the norm of its weights"
        raise ConfigError(f"{names}; where a mask takes all weights of a layer the loss is {dead}: {rule}")


def check(config: Config, keep: bool = False) -> Layout:
    """Find out whether a configuration can be run, without building a built-in model; return the model's layout.

    With `keep` the data that were loaded for it wait for `get_runtime`.

    Raises
    ------
    ConfigError
        Its device, clients at once, data, partition or mask cannot be had, or a tracker's library is missing.
    """
    check_at_once(config)
    callbacks.find(config.settings.run.trackers)
    images, partition = _load(config, "")
    _CHECKED.clear()
    if keep:
        _open.cache_clear()  # a notebook plays the same keys again after it changed what a name or path stands for
        _CHECKED[tuple(sorted(config.flat.items())), ""] = config, (images, partition)
    _rehearse(config, images)
    outline = _outline(config, images)
    if config.model.weights:
        models.read_weights(config.model.weights, state_of(outline))
    layout = Layout.of(outline)
    metric = make_task(config.task, images.task).metric
    REGISTRY[config.strategy](ServerContext(layout, config.settings, metric=metric))
    return layout


def check_at_once(config: Config) -> None:
    """Raise ConfigError if there is no such device, or engine.concurrent is above `most_at_once` of a GPU."""
    wanted, most = config.engine.concurrent, most_at_once(config)
    if find_device(config.settings.run.device).type == "cuda" and wanted > most:
        raise ConfigError(
            f"engine.concurrent is {wanted}; on a GPU it is at most {most}: the clients that train in a round, and "
            f"never more than {MOST_AT_ONCE}, since each has a stream of its own"
        )


def most_at_once(config: Config) -> int:
    """Return how many clients may be trained at once on a GPU."""
    run = config.settings.run
    return min(run.clients if REGISTRY[config.strategy].full_participation else run.asked, MOST_AT_ONCE)


def check_time(config: Config, simulated: bool) -> None:
    """Raise ConfigError unless time is told by what there is: a simulated clock in simulation, else the real one."""
    run, profile = config.settings.run, config.settings.clock.profile
    if simulated and run.closes_early and not (profile or run.replay):
        raise ConfigError(f"{run.closes_early}; simulated clients are late by clock.profile only")
    for key, value in {"clock.profile": profile, "run.replay": run.replay}.items():
        if value and not simulated:
            raise ConfigError(f"{key} is {value!r}; it is empty on real nodes, which take the time that they take")


def find_device(wanted: str) -> torch.device:
    """Return the torch device for run.device; the first call comes before this process starts CUDA.

    Raises
    ------
    ConfigError
        "cuda" is asked for and this process sees no GPU.
    """
    # Read when CUDA starts: queues to the GPU. By default there are 8, and clients on other streams wait in them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda'; this process sees no GPU, so it is 'cpu' or 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def gpu_notes(config: Config, engine: str = "inline") -> list[str]:
    """Return what a user should know who trains on this machine's GPU: a line each, none without a GPU."""
    if find_device(config.settings.run.device).type == "cpu":
        return []
    notes, name = [], torch.cuda.get_device_name()
    if config.engine.precision == "fp32" and torch.cuda.get_device_capability() >= (8, 0):
        others = "engine.precision 'tf32' or 'bf16' uses its matrix units, which are faster and round more"
        notes.append(f"note: engine.precision is 'fp32' on {name}; {others}")
    if engine == "ray" and torch.cuda.device_count() == 1:
        fast = "note: on one GPU the in-process engine is the fast one (--engine inline): its clients share a process"
        notes.append(f"{fast}, where Ray's actors take turns")
    return notes


def gpu_is_hidden() -> bool:
    """Return whether the machine has an NVIDIA GPU that this process is not allowed to see.

    Ray sets CUDA_VISIBLE_DEVICES to "" in actors that asked for no GPU, and training silently runs on the CPU.
    """
    return os.environ.get("CUDA_VISIBLE_DEVICES") == "" and Path("/dev/nvidia0").exists()


@functools.lru_cache(maxsize=1)
def code_digest(modules: tuple[str, ...] = ()) -> str:
    """Return the first 16 hex digits of the SHA-256 over the source files of this package and of foreign `modules`.

    Server and clients compare it: Flower can run the two from different checkouts without a word.
    """
    package = Path(str(resources.files("ssfl_app")))
    digest = hashlib.sha256()
    files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    foreign: dict[str, Path] = {}
    for module in modules:
        foreign = sources(module, foreign)
    for name, file in [*sorted(files.items()), *sorted(foreign.items())]:
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
