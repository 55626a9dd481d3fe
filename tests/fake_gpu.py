"""What a process on the fake CUDA runtime finds out; ``tests/training/test_gpu.py`` starts it and reads its JSON.

``python -m tests.fake_gpu PART``. The runtime is preloaded (``fakecuda`` of the tools beside this repository):
torch's allocator, autograd, streams and captures run as on a GPU, kernels are recorded and compute nothing.
"""

import contextlib
import functools
import gc
import inspect
import io
import json
import os
import re
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from fakecuda import fake

from ssfl_app import client_app, server_app
from ssfl_app.cli.main import run as command
from ssfl_app.config import merge, parse
from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.runtime import get_runtime, gpu_notes
from ssfl_app.seeding import torch_generator
from ssfl_app.simulation.in_process import clients_at_once, run_inline
from ssfl_app.sparsity import layout as layouts
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import Layout, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training import cuda_graph, fused_norm
from ssfl_app.training.anchor import Proximal, Pull
from ssfl_app.training.gpu import memory_need, own_stream
from ssfl_app.training.models import NORMS, REGISTRY, ModelOptions, create, outline
from ssfl_app.training.reparam import bernoulli_weights, originals
from ssfl_app.training.step import PRECISIONS
from ssfl_app.training.trainer import LocalOptions, LocalTrainer
from tests.in_process_grid import SMALL

GPU = torch.device("cuda")
SYNCS = ("streamSynchronize", "eventSynchronize", "deviceSynchronize")


def trainer(precision="tf32", **changes):
    recipe = {"epochs": 2, "batch_size": 16, "lr": 0.1, "lr_decay": 1.0, "momentum": 0.0, "weight_decay": 5e-4}
    options = LocalOptions(**recipe | {"clip": 10.0} | changes)
    return LocalTrainer(options, Transform((0.5,) * 3, (0.2,) * 3, "crop-flip"), GPU, precision, "graphs")


def images(count, side=32):
    pixels = torch.zeros((count, 3, side, side), dtype=torch.uint8, device=GPU)
    return Samples(pixels, torch.zeros(count, dtype=torch.int64, device=GPU))


def network(name, norm="group"):
    return create(ModelOptions(name, norm), (3, 8, 8), 10, 1).to(GPU)


def fit(run, model, data, mask=None, **special):
    if not isinstance(special.get("after_step"), Pull):
        mask = mask or Mask.random(Layout.of(model), 0.5, np.random.default_rng(1))
    return run.fit(model, data, np.random.default_rng(1), lr=0.1, mask=mask, **special)


@contextlib.contextmanager
def counted():
    """Yield a list that gets the number of nodes of each graph that is captured inside."""
    nodes, real = [], cuda_graph.GraphedStep._captured

    def capture(static, batch):
        graph = real(static, batch)
        nodes.append(fake.nodes())  # captures take turns, so the last graph is this one
        return graph

    cuda_graph.GraphedStep._captured = capture
    try:
        yield nodes
    finally:
        cuda_graph.GraphedStep._captured = real


def calls(work):
    """Return how often `work` makes the runtime's calls, by name."""
    with tempfile.TemporaryDirectory() as folder:
        fake.reset()
        work()
        fake.report(f"{folder}/report")
        rows = re.findall(r"^call (\d+) (.+)", Path(f"{folder}/report").read_text(), re.MULTILINE)
    return {name: int(count) for count, name in rows}


# ---- parts ----------------------------------------------------------------------------------------


def captures():
    """Nodes of a step and waits of a fit, for models, norms, precisions and momenta."""
    cases = [("cnn", norm, p, momentum) for norm in NORMS for p in PRECISIONS for momentum in (0.0, 0.9)]
    for name in [name for name in REGISTRY if name not in ("cnn", "transformer")]:
        norms = NORMS[:1] if name in ("resnet32", "resnet44", "resnet56") else NORMS
        cases += [(name, norm, p, 0.0) for norm in norms for p in ("fp32", "bf16")]
    rows = []
    for name, norm, precision, momentum in cases:
        count = 36 if name == "cnn" else 16  # a second batch size is a second capture
        run, model, data = trainer(precision, momentum=momentum), network(name, norm), images(count)
        mask = Mask.random(Layout.of(model), 0.5, np.random.default_rng(1))
        with counted() as nodes:
            fit(run, model, data, mask)
        with counted() as more:
            again = calls(lambda args=(run, model, data, mask): fit(*args))
        rows.append({
            "case": [name, norm, precision, momentum],
            "nodes": nodes,
            "syncs": sum(again.get(name, 0) for name in SYNCS),
            "sleeping": again.get("eventSynchronize", 0),
            "launches": again.get("graphLaunch", 0),
            "again": len(more),
        })  # fmt: skip
    return rows


def anchors():
    """Nodes of a step near an anchor, and what the next fit does, near another one."""
    rows = {}
    for kind, hook in ((Proximal, "penalty"), (Pull, "after_step")):
        run, model, data = trainer(), network("resnet18"), images(16)
        centre = [parameter.detach().clone() for parameter in model.parameters()]
        mask = Mask.random(Layout.of(model), 0.5, np.random.default_rng(1)) if kind is Proximal else None
        with counted() as nodes:
            fit(run, model, data, mask, **{hook: kind(centre, 0.1)})
        with counted() as more:
            again = calls(functools.partial(fit, run, model, data, mask, **{hook: kind(centre, 0.2)}))
        syncs, launches = sum(again.get(name, 0) for name in SYNCS), again.get("graphLaunch", 0)
        rows[kind.__name__] = {"nodes": nodes, "again": len(more), "syncs": syncs, "launches": launches}
    return rows


def draws():
    """Copies from unpinned memory of the host while random masks are drawn on the GPU and on the CPU."""
    rows = {}
    for device in ("cuda", "cpu"):
        run, model, data = trainer(), network("cnn"), images(36)
        fixed = {name: torch.ones_like(weight) for name, weight in originals(model).items()}

        def train(run=run, model=model, data=data, fixed=fixed, device=device):
            with bernoulli_weights(model, torch_generator(1, "mask", device=device), fixed):
                run.fit(model, data, np.random.default_rng(1), lr=0.1, optimizer=torch.optim.Adam)

        train()
        rows[device] = calls(train).get("memcpyAsync H2D pageable", 0)
    return {**rows, "layers": len(fixed), "passes": 6}


def crossing():
    """Copies between host and GPU when a model comes down to a client under a known mask, and goes up again."""
    model, rows = network("resnet18"), {}
    layout = Layout.of(model)
    for name, mask in (("half", Mask.random(layout, 0.5, np.random.default_rng(1))), ("dense", Mask.dense(layout))):
        codec = MaskedValues()
        codec.device = GPU
        values = np.zeros(codec.count(layout, mask), dtype=np.float32)

        def cross(mask=mask, codec=codec, values=values):
            load_state(model, codec.decode({"values": values}, layout, mask)[0])
            codec.encode(layout, state_of(model), mask)

        cross()
        rows[name] = {name: count for name, count in calls(cross).items() if "2H" in name or "H2" in name}
    return rows


class Recorded:
    """Stands in for a kernel of Triton's: a launch is a node of that name."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return lambda *args, **sizes: fake.mark(self.name)


def fused():
    """Nodes of a step with fused kernels, by kind, and how runs with them end."""
    rows = {}
    with contextlib.ExitStack() as stack:
        for kernel in ("_forward", "_backward"):
            stack.enter_context(patched(fused_norm, kernel, Recorded(f"NORM{kernel}")))
        for precision in ("tf32", "bf16"):
            run, model = trainer(precision), network("resnet18").to(memory_format=torch.channels_last)
            run.kernels = "fused"
            with counted() as nodes, tempfile.TemporaryDirectory() as folder:
                fit(run, model, images(16))
                fake.nodes(f"{folder}/nodes")
                names = Path(f"{folder}/nodes").read_text().splitlines()
            kinds = {kind: sum(kind in name for name in names) for kind in ("NORM_forward", "NORM_backward", "CONV")}
            same = [name for name in names if name.startswith("CONV fwd") and not name.endswith("NHWC")]
            rows[precision] = {"nodes": nodes, **kinds, "not NHWC": same, "names": names}
        words = "run.clients=4 run.cohort=2 run.rounds=1 local.epochs=1 engine.kernels='fused' strategy='fedavg'"
        rows["run"], rows["batch"] = said(words), said(f"{words} model.norm='batch'")
    return rows


def threads():
    """Nodes of the captures of many threads that come and go, when torch gives several of them one stream."""
    rows, name = {}, "cnn"
    with counted() as alone:
        fit(trainer(), network(name), images(36))
    for count in (8, 16):
        # Torch has 32: the 33rd is the first one again, as after many threads that came and went.
        one, *_, same = [torch.cuda.Stream(GPU) for _ in range(33)]
        with counted() as nodes:
            at_once(count, lambda index, pair=(one, same): client(pair[index % 2]))
        rows[count] = {"nodes": nodes, "shared": one.cuda_stream == same.cuda_stream}
    return {"alone": alone, "threads": rows}


def client(stream):
    torch.cuda.set_stream(stream)
    run, model = trainer(), network("cnn")
    for count in (36, 20, 27, 36):  # last batches of 4, 4, 11
        fit(run, model, images(count))


def at_once(count, work):
    errors = []

    def guarded(index):
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    working = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    if errors:
        raise errors[0]


def streams():
    """Which streams are lent, and what happens when none is left."""

    class Holder:
        pass

    holders = [Holder() for _ in range(32)]
    lent = [own_stream(holder, GPU) for holder in holders]
    usual = {torch.cuda.Stream(GPU).cuda_stream for _ in range(40)}
    try:
        own_stream(Holder(), GPU)
        refused = ""
    except RunFailed as error:
        refused = str(error)
    free = lent[7].cuda_stream
    del holders[7]
    gc.collect()
    again = own_stream(holders[0], GPU).cuda_stream
    return {
        "lent": len({stream.cuda_stream for stream in lent}),
        "shared": len({stream.cuda_stream for stream in lent} & usual),
        "refused": refused,
        "again": again == free,
    }


def memory():
    """What is reserved for a client against the estimate of it, in bytes."""
    rows = []
    for name in ("cnn", "resnet18", "resnet50", "resnet20", "resnet110"):
        gc.collect()
        torch.cuda.empty_cache()
        run, model, data = trainer("bf16", momentum=0.9), network(name), images(500)
        before = torch.cuda.memory_reserved()
        fit(run, model, data)
        run.evaluate(model, data)
        run.gradient(model, data.take(np.arange(64)))
        usual = torch.cuda.memory_reserved() - before
        layout = Layout.of(model)
        mask = Mask.random(layout, 0.5, np.random.default_rng(1))
        values = np.zeros(MaskedValues().count(layout, mask), dtype=np.float32)
        load_state(model, layout.scatter_on(GPU, values, MaskedValues().index_on(layout, mask, GPU)))
        centre = [parameter.detach().clone() for parameter in model.parameters()]
        fit(run, model, data, mask, penalty=Proximal(centre, 0.1))
        need = memory_need(outline(ModelOptions(name, "group"), (3, 8, 8), 10), (3, 32, 32), 16)
        rows.append([name, usual, torch.cuda.memory_reserved() - before, need])
        del run, model, data, mask, centre
    return rows


def said(words, **changes):
    """Return the exit code and the last words of `ssfl run` in this process."""
    error, out, code = io.StringIO(), io.StringIO(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(out),
        patched(layouts, "on_one_gpu", lambda tensors: False),  # no kernel joins them here, and copies are real
    ):
        try:
            command(override=[words], out=Path(folder) / "run")
        except SystemExit as end:
            code = end.code
        except ConfigError as refused:
            code = str(refused)
        rounds = Path(folder) / "run" / "rounds.jsonl"
        records = [json.loads(line) for line in rounds.read_text().splitlines()] if rounds.exists() else []
        status = Path(folder) / "run" / "status.json"
        status = json.loads(status.read_text()) if status.exists() else {}
    return {"code": code, "said": error.getvalue(), "out": out.getvalue(), "rounds": len(records), "status": status}


WIDE = "strategy='fedavg' model.name='resnet18' run.clients=12 run.cohort=10 run.rounds=1 local.epochs=1"


def out_of_memory():
    """How a run ends for which the GPU is too small: in training with many at once, in the server, from the start."""
    rows = {}
    rows["threads"] = at(torch.cuda.memory_reserved() + (1500 << 20), f"{WIDE} engine.concurrent=10")
    for name, clients in (("clients", True), ("server", False)):
        with patched(LocalTrainer, "evaluate", lambda *args, clients=clients: too_much(clients)):
            rows[name] = at(80 << 30, f"{WIDE} model.name='cnn' engine.concurrent=2")
    with patched(LocalTrainer, "fit", lambda *args, **more: too_much(False)):
        rows["alone"] = at(80 << 30, f"{WIDE} model.name='cnn' engine.concurrent=1")
    get_runtime.__globals__["_open"].cache_clear()
    rows["start"] = at(torch.cuda.memory_reserved() + (20 << 20), f"{WIDE} model.name='resnet50'")
    return rows


def too_much(in_threads):
    """Ask for a terabyte where it is asked to: in the clients' threads, or in the main one."""
    if in_threads == (threading.current_thread() is not threading.main_thread()):
        torch.empty(1 << 40, dtype=torch.uint8, device=GPU)
    return 0.0, 0.0


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def at(size, words):
    gc.collect()
    torch.cuda.empty_cache()
    fake.limit(size)
    return said(words)


def run():
    """What a run says at its start, whether it ends, and with how many at once where memory is little."""
    gc.collect()
    rows = {"early": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), "started": torch.cuda.is_initialized()}
    whole = merge(SMALL, {"run.clients": 40, "run.cohort": 30, "model.name": "resnet18", "run.rounds": 1})
    shop = get_runtime(whole)
    rows["connections"] = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    need = memory_need(outline(ModelOptions("resnet18", "group"), (1, 8, 8), 10), shop.data.shape, 32)
    rows["at_once"] = {}
    for clients in (1, 5, 100):
        fake.limit(80 << 30)
        used = (80 << 30) - torch.cuda.mem_get_info()[0]
        fake.limit(used + int((clients + 0.5) * need))
        rows["at_once"][clients] = clients_at_once(shop.config, shop.fitting_clients())
    fake.limit(80 << 30)
    for precision in ("fp32", "tf32"):
        config = parse(whole | {"engine.precision": precision})
        rows[f"notes {precision}"] = [gpu_notes(config, engine) for engine in ("inline", "ray")]
    rows["engine"] = inspect.signature(command).parameters["engine"].default
    rows["inline"] = said("run.clients=12 run.cohort=5 run.rounds=2 local.epochs=1")
    more, all_train = "engine.concurrent=17 run.cohort=18", "engine.concurrent=13 strategy='dispfl'"
    for words in ("engine.concurrent=6", more, all_train):
        rows[words] = said(f"run.clients=18 run.cohort=5 run.rounds=1 {words}")
    try:
        run_inline(server_app.app, client_app.app, parse(merge(SMALL, {"engine.concurrent": 5})))
    except ConfigError as error:
        rows["api"] = str(error)
    return rows


if __name__ == "__main__":
    parts = (captures, anchors, crossing, draws, fused, threads, streams, memory, out_of_memory, run)
    part = {f.__name__: f for f in parts}[sys.argv[1]]
    print(json.dumps(part()))
