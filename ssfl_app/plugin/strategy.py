"""`SSFL`, the server side: in the place of FedAvg, with its arguments, started the same way.

Ohib et al., "SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated Learning", TMLR
2026, arXiv 2405.09037, algorithm 1: ask all clients for ``|g * w|`` at the common initial weights, average by
samples, keep the top ``density`` as one mask, then FedAvg inside it, where only alive values and the dense
remainder (biases, norms) travel.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from logging import INFO
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Result,
    Strategy,
)
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from ssfl_app.comm.payload import Metadata
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import WireOptions
from ssfl_app.core.own_start import OwnStart
from ssfl_app.core.rounds import Record
from ssfl_app.options import ConfigError, build
from ssfl_app.plugin.checked_reply import MOST, CheckedReply
from ssfl_app.plugin.cohort import sample, wait_for
from ssfl_app.plugin.discovery import CRITERIA, MASKS, Discovery
from ssfl_app.plugin.inner import AsModel, AsVector, Form, aggregate_by, evaluate_by, inner_round_config
from ssfl_app.plugin.messenger import Kind, NodeMessenger
from ssfl_app.plugin.metrics import common_metrics
from ssfl_app.plugin.mod import QUESTION
from ssfl_app.plugin.node_sum import LEAST_NODES, NodeSum, SumOptions
from ssfl_app.plugin.rounds import NodeRoundLoop
from ssfl_app.plugin.secure import KIND
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.inner import InnerChannels
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import Mask, Scope
from ssfl_app.sparsity.values import VALUE_TYPES, check_values
from ssfl_app.strategies.flash import FlashOptions
from ssfl_app.text import in_a_line

MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


class FedAvgArguments(TypedDict, total=False):
    """What Flower's FedAvg takes; its defaults are Flower's and written there."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFn | None
    evaluate_metrics_aggr_fn: MetricsFn | None


class SSFL(OwnStart):
    """Sparse federated learning in the place of Flower's FedAvg; the clients need `sparse_mod`.

    Parameters
    ----------
    density : float
        Share of the prunable weights that stay alive, in (0, 1]. 1: FedAvg with one flat vector, no question asked.
    mask : {"ssfl", "random", "shuffled", "flash"}
        SSFL's; random; SSFL's, permuted in each layer; random of layer densities that nodes find (FLASH). The bits
        are those of the strategy of `ssfl run`, for equal scores.
    criterion : {"snip", "pooled-snip", "gradient", "magnitude"}
        What SSFL scores a weight by, see `ssfl_app.strategies.ssfl.criteria`.
    dead : {"zero", "frozen"}
        What dead weights are: 0, or what they are in `initial_arrays`, for fine-tuning. Each node gets them once and
        keeps them in its ``Context.state``.
    granularity : {"weight", "channel"}
        What stays or goes: single weights; or whole channels, and clients train a smaller network, the arrays of
        which they get and return (`narrowed_to`). `density` is its share of the prunable weights, `min_per_layer` a
        floor of channels.
    channels : iterable of InnerChannels
        With granularity "channel": which channels the model can do without, as `inner_of` tells them.
    inner : FedAvg, optional
        One of Flower's Message-API strategies that derive from FedAvg: FedAvgM, FedAdam, FedYogi, FedAdagrad,
        FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan. It aggregates replies whose one array is the flat vector
        of carried values, and holds the FedAvg arguments. It keeps all replies of a round, O(nodes * carried)
        memory. A robust one (the last five, and what else does not take FedAvg's mean) folds the scores too.
    inner_arrays : {"vector", "model"}
        What `inner` sees: that vector, or the model's arrays under their names, O(nodes * model) memory.
    seed : int
        Of everything random: which nodes take part, and masks that are drawn.
    prunable : iterable of str, optional
        Names of the tensors to prune. Default: all floating ones of 2 dimensions or more, embeddings among them, but
        for buffers, norms, magnitudes of a weight norm and vectors in the form of a matrix.
    scope : {"global", "layer"}
        Rank all layers together (the paper), or each on its own.
    min_per_layer : int
        Alive weights that each layer keeps at least.
    saliency_batches : int
        Minibatches that a client scores.
    saliency_weighting : {"samples", "uniform"}
        Weight of a client in the mean score. "samples", as in the paper, lets the train function run to its end once,
        without steps, to learn its number of examples. "uniform" leaves it after the minibatches.
    saliency_share : float
        Share of the connected nodes that is asked for scores, in (0, 1], and what the model is, whatever `mask` is.
    stage_clients, stage_epochs, prune_rate
        Of FLASH, as `FlashOptions` has them: the share of the nodes that finds layer densities, how often each trains
        for that, at least twice, and the share of a layer that moves after the first training.
    values : str
        Value type on the wire in training and evaluation: fp32, fp16, bf16 or int8. fixed32: models go down as fp32;
        scores, and what training changed, come up as whole numbers that are only added, and need `most_examples`.
    secure_aggregation : bool
        Whether these are masked, so that the server learns their sums only: the bits of ``values="fixed32"``. At
        least 3 nodes take part, metrics of training stay on the nodes, and the clients' mod makes their keys.
    threshold : float
        More than this share of a node's neighbours must answer for its values to enter a sum; in [0.5, 1).
    update_range : float
        Largest magnitude of a score, and of what one local training changes, with fixed32: larger ones are clipped.
    min_ok_fraction : float
        A round counts if this share of its nodes answered well, in [0, 1]; if not, the run fails. 0: the run goes on
        with whoever answered.
    most_examples : float
        Largest weight of a reply, above 0: what no honest client exceeds. A reply beyond it is refused. By default
        only what is no count is; one client may then outweigh all others.
    **fedavg
        FedAvg's own arguments, see `FedAvgArguments`.

    Attributes
    ----------
    history : list of dict
        One record a round, round 0 is discovery: who answered (`ok`), who was `lost` or `refused` and why, bytes of
        encoded arrays, metrics, density, seconds.
    messenger : NodeMessenger
        Who holds what, and the exchange that is going on; its `mask` is the one in use. Once the strategy was
        started.
    model : array of float32
        All floating coordinates of the model, dead weights 0 or frozen.
    inner, base, discovery, min_ok_fraction
        As given; the inner strategy, or a FedAvg that holds its arguments; how the mask is found; as given.

    Raises
    ------
    TypeError, ValueError
        An argument is out of range; `inner` is no FedAvg, aggregates trees, has a `start` of its own, or is given
        beside FedAvg's arguments; something looks at single replies where the server only adds them.

    Notes
    -----
    A subclass may extend any method and call this class's. Its `aggregate_train` and `aggregate_evaluate` get a list
    of replies as Flower's strategies do, which may be changed: the records that the functions returned, with the
    whole model in training, O(nodes * model) memory.
    """

    def __init__(
        self,
        density: float = 0.1,
        *,
        mask: str = MASKS[0],
        criterion: str = CRITERIA[0],
        dead: str = "zero",
        granularity: str = "weight",
        channels: Iterable[InnerChannels] = (),
        inner: FedAvg | None = None,
        inner_arrays: Literal["vector", "model"] = "vector",
        seed: int = 1,
        prunable: Iterable[str] | None = None,
        scope: Scope = "global",
        min_per_layer: int = 0,
        saliency_batches: int = 1,
        saliency_weighting: str = "samples",
        saliency_share: float = 1.0,
        stage_clients: float = FlashOptions.stage_clients,
        stage_epochs: int = FlashOptions.stage_epochs,
        prune_rate: float = FlashOptions.prune_rate,
        values: str = "fp32",
        min_ok_fraction: float = 0.5,
        most_examples: float = MOST,
        secure_aggregation: bool = False,
        threshold: float = PrivacyOptions.threshold,
        update_range: float = WireOptions.range,
        **fedavg: Unpack[FedAvgArguments],
    ) -> None:
        if odd := sorted(fedavg.keys() - FedAvgArguments.__annotations__.keys()):
            known = {**inspect.signature(type(self)).parameters, **inspect.signature(SSFL).parameters}
            near = get_close_matches(odd[0], [*known, *FedAvgArguments.__annotations__], 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{type(self).__name__} has no argument {odd[0]!r}{meant}")
        stage = {"stage_clients": stage_clients, "stage_epochs": stage_epochs, "prune_rate": prune_rate}
        ranked = {"criterion": criterion, "scope": scope, "min_per_layer": min_per_layer, "dead": dead}
        ranked |= {"granularity": granularity}
        _check_read(mask, {**ranked, **stage, "saliency_weighting": saliency_weighting})
        if inner is not None and fedavg:
            raise ValueError(f"{sorted(fedavg)} beside inner: give them to {type(inner).__name__}, which takes them")
        if inner is not None and not isinstance(inner, FedAvg):
            raise TypeError(
                f"inner is {type(inner).__name__}; it is one of Flower's strategies that derive from FedAvg"
            )
        if isinstance(inner, FedXgbBagging | FedXgbCyclic):
            raise TypeError(f"inner is {type(inner).__name__}, which aggregates trees: they have no weights to mask")
        if inner is not None and type(inner).start is not Strategy.start:
            raise TypeError(
                f"inner is {type(inner).__name__}, whose own start() would never run: SSFL plays the rounds. Put "
                "what it does into configure_train, aggregate_train or evaluate_fn, or into a subclass of SSFL"
            )
        if dead not in ("zero", "frozen"):
            raise ValueError(f"dead is {dead!r}; it is zero or frozen")
        if inner_arrays not in ("vector", "model"):
            raise ValueError(f"inner_arrays is {inner_arrays!r}; it is vector or model")
        if values not in (*VALUE_TYPES, KIND):
            raise ValueError(f"values is {values!r}; it is one of {', '.join((*VALUE_TYPES, KIND))}")
        if isinstance(prunable, str):
            raise TypeError(f"prunable is {prunable!r}; it is a list of names")
        if not 0 <= min_ok_fraction <= 1:
            raise ValueError(f"min_ok_fraction is {min_ok_fraction}; it is a fraction in [0, 1]")
        if not 0 < most_examples <= MOST:
            raise ValueError(f"most_examples is {most_examples}; it is a number above 0, at most {MOST}")
        self.sums: SumOptions | None = None
        if secure_aggregation or values == KIND:
            cause = "secure_aggregation is True" if secure_aggregation else f"values is {KIND!r}"
            self._check_sums(cause, values, inner, most_examples)
            if mask == "dense":
                raise ValueError(f"{cause}; TopK's nodes do not all send the same coordinates, which do not add up")
            metrics = inner.train_metrics_aggr_fn if inner else fedavg.get("train_metrics_aggr_fn")
            if secure_aggregation and mask == "flash":
                raise ValueError(f"mask is 'flash'; {cause}, and the server would read each node's layer densities")
            if secure_aggregation and metrics not in (None, aggregate_metricrecords):
                raise ValueError(f"train_metrics_aggr_fn is given; {cause}: metrics of training stay on the nodes")
            checked_options(PrivacyOptions, {"threshold": threshold})
            if not 0 < update_range < math.inf:
                raise ValueError(f"update_range is {update_range}; it is a number above 0")
            self.sums = SumOptions(update_range, int(most_examples), secure_aggregation, threshold, seed)
            values = "fp32"  # on their way down
        if not secure_aggregation and threshold != PrivacyOptions.threshold:
            raise ValueError(f"threshold is {threshold}; nothing reads it without secure_aggregation=True")
        if self.sums is None and update_range != WireOptions.range:
            raise ValueError(f"update_range is {update_range}; values {values!r} have none: it is of {KIND!r}")
        self.history: list[Record] = []
        self.model: Vector = np.zeros(0, dtype=np.float32)
        self._summation: NodeSum | None = None  # of the training that goes on
        self._messenger: NodeMessenger | None = None
        weighting = saliency_weighting if mask in _SCORED else "uniform"  # which asks for no number of examples
        asked = saliency_batches, weighting, saliency_share
        self.discovery = Discovery(
            *(density, scope, min_per_layer, *asked, min_ok_fraction, prunable is not None),
            *(
                mask,
                criterion,
                seed,
                checked_options(FlashOptions, stage),
                dead == "frozen",
                granularity,
                tuple(channels),
            ),
        )
        self.inner, self.base = inner, FedAvg(**fedavg) if inner is None else inner
        self._named = inner_arrays == "model"
        self._most_examples = most_examples
        self._seed, self._prunable = seed, None if prunable is None else tuple(prunable)
        self._values, self.min_ok_fraction = values, min_ok_fraction
        self._timeout = 3600.0
        self._cohort = 0  # nodes that train in this round
        self.clipped = 0  # values, since the last record

    def _check_sums(self, cause: str, values: str, inner: FedAvg | None, most: float) -> None:
        """Raise ValueError, or TypeError, if more would be done with answers than to add them."""
        if values not in ("fp32", KIND):
            raise ValueError(f"values is {values!r}; it is {KIND!r}: {cause}, and whole numbers add up")
        if most % 1 or most > MOST_OF_ONE:
            raise ValueError(
                f"most_examples is {most}; it is a whole number, at most {MOST_OF_ONE}: {cause}. Set it to what your "
                "largest client has; the steps of the sum follow from it"
            )
        if inner is not None and type(inner).aggregate_train not in _OF_THE_MEAN:
            raise TypeError(f"inner is {type(inner).__name__}, which looks at each reply; {cause}")
        for method in ("aggregate_train", "fold"):
            if self.changes(method):
                raise TypeError(f"{type(self).__name__}.{method} is your own and looks at each reply; {cause}")

    @property
    def messenger(self) -> NodeMessenger:
        """The messages of this run; RuntimeError if `start` was not called yet."""
        if self._messenger is None:
            raise RuntimeError(f"{type(self).__name__} was not started; call start() first")
        return self._messenger

    @property
    def mask(self) -> Mask:
        """The mask in use: the dense one, until discovery is over."""
        return self.messenger.mask

    def changes(self, method: str) -> bool:
        """Return whether a method is the user's, and not ours."""
        return not str(getattr(getattr(self, method), "__module__", "")).startswith("ssfl_app.plugin.")

    @property
    def _form(self) -> Form:
        if self._named:
            return AsModel(self.messenger.spec, self.mask, self.messenger.frozen)
        return AsVector(int(np.count_nonzero(self.mask.transmitted)))

    def question_config(self, config: ConfigRecord, grid: Grid) -> ConfigRecord:
        """Return the config of the question for saliency: the one of round 1, marked by `QUESTION`.

        The function is asked what it would do in round 1: its schedules may have no round 0. A strategy of the user's
        writes it in a copy, since it will write it once more when round 1 comes.
        """
        told: Any = ConfigRecord({**config, "server-round": 1})
        if self.inner is not None or self.changes("configure_train"):
            shared = {id(each): each for each in (self._messenger, self.model, self.history)}
            try:
                trial = copy.deepcopy(self, shared)
            except Exception:  # it holds a file, a lock, a connection
                trial = copy.copy(self)
                trial.inner = copy.copy(self.inner)
            trial.sums = None  # it asks for no keys
            messages = list(trial.configure_train(1, self.arrays(), copy.deepcopy(config), grid))
            told = messages[0].content.get("config", told) if messages else told
        return ConfigRecord({**told, QUESTION: True})

    def sample(self, grid: Grid, what: str, round_: int, fraction: float, least: int) -> list[int]:
        """Return the nodes that take part in something, see `ssfl_app.plugin.cohort`."""
        least = max(least, LEAST_NODES) if self.sums and self.sums.secure and what != "evaluate" else least
        least_connected = max(self.base.min_available_nodes, least)
        connected = wait_for(grid, least_connected, self._timeout)
        return sample(connected, self._seed, what, round_, max(int(len(connected) * fraction), least, 1))

    # ---- Flower's interface --------------------------------------------------------------------

    def summary(self) -> None:
        """Log the settings, as Flower's strategies do."""
        values = KIND if self.sums else self._values
        told = type(self).__name__, self.discovery.mask, self.discovery.density, values, self._seed
        log(INFO, "\t├──> %s: mask %s, density %s, values %s, seed %s", *told)
        if self.sums is not None and self.sums.secure:
            log(INFO, "\t├──> Secure aggregation: sums of scores and updates; metrics of training stay on the nodes")
            if self.base.fraction_evaluate:
                log(
                    INFO,
                    "\t├──> Metrics of evaluation travel in the clear; with fraction_evaluate=0.0 there are none",
                )
        if self.inner is not None:
            log(INFO, "\t├──> Carried values are aggregated by %s", type(self.inner).__name__)
        self.base.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Find the mask and train inside it; arguments and result are those of Flower's `Strategy.start`.

        `timeout` is for each exchange of messages, and for nodes to connect. The result holds dense arrays under the
        names, shapes and types of `initial_arrays`, dead weights exactly 0, or frozen as they are there; or with
        granularity "channel" of the shapes of the smaller network.

        Raises
        ------
        RunFailed
            Too few nodes connected, or answered well in a round, or Ray lost an actor.
        ValueError
            Nothing in `initial_arrays` is prunable, `density` keeps nothing of it, or its values are not finite.
        """
        log(INFO, "Starting %s strategy: %d rounds", type(self).__name__, num_rounds)
        self.summary()
        spec = StateSpec.of(initial_arrays, self._prunable, (self.base.arrayrecord_key, self.base.configrecord_key))
        self.model = spec.flatten(initial_arrays)
        check_values(self.model)
        if self.discovery.density < 1:
            self.discovery.check(spec.layout)
        self._messenger = NodeMessenger(spec, self._values, self.base.weighted_by_key, timeout, self._most_examples)
        self._timeout = timeout
        self.history = []
        # The user's own objects, for the whole run: what a strategy changes in them stays, as under Flower.
        train, evaluate = (ConfigRecord() if given is None else given for given in (train_config, evaluate_config))
        with self.playing():
            loop = NodeRoundLoop(self, self._messenger, grid, (train, evaluate), evaluate_fn)
            return loop.run(initial_arrays, num_rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the training messages of a round. The model is this strategy's own; `arrays` is not read."""
        messages = self._messages(
            "train", server_round, config, grid, self.base.fraction_train, self.base.min_train_nodes
        )
        self._cohort = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the replies one at a time, and change the model by the good ones if there are enough of them.

        Raises
        ------
        RunFailed
            The inner strategy returned no model.
        """
        if self._summation is not None:
            return self._aggregate_sum(self._summation, server_round, replies)
        answers = list[CheckedReply]()
        add, finish = self.fold(max(1, self._cohort))

        def take(answer: CheckedReply) -> None:
            if self.inner is None:
                add(answer)
                answer = replace(answer.numbers(), sent=None)  # server memory does not grow with the nodes
            answers.append(answer)

        self.messenger.receive(replies, take)
        contents, odd = common_metrics(answers)
        if self.inner is not None:  # it folds values and metrics of a reply together
            self._refuse(odd)
            answers = [answer for answer in answers if answer.node not in odd]
        else:
            self.messenger.report.odd_metrics = odd
        if not answers or not self.messenger.report.enough(self.min_ok_fraction):
            return None, None
        if self.inner is not None:
            values, metrics = aggregate_by(self.inner, server_round, answers, self._form)
            if values is None:
                return None, metrics
            self.model = self.messenger.spread(values)
        else:
            self.model = finish()
            metrics = self.base.train_metrics_aggr_fn(contents, self.base.weighted_by_key)
        return self.arrays(), metrics

    def _aggregate_sum(
        self, summation: NodeSum, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up what training changed; an inner strategy is given the mean, as the reply of one node."""
        answers = list[CheckedReply]()

        def take(answer: CheckedReply) -> None:
            assert answer.summand is not None
            summation.add(answer.node, answer.summand)
            answers.append(answer.numbers() if answers or self.inner is None else replace(answer, summand=None))

        self.messenger.receive(replies, take)
        contents, self.messenger.report.odd_metrics = common_metrics(answers)
        if not answers or not self.messenger.report.enough(self.min_ok_fraction):
            return None, None
        found, key = summation.finish(), self.base.weighted_by_key
        self.clipped += found.clipped
        values = (self.model[self.mask.transmitted] + found.values).astype(np.float32)
        metrics = None if summation.secure else self.base.train_metrics_aggr_fn(contents, key)
        if self.inner is not None:
            told = RecordDict({"metrics": MetricRecord({key: found.weight})})
            mean = replace(answers[0], values=values, weight=found.weight, records=told, metrics_name="metrics")
            moved, _ = aggregate_by(self.inner, server_round, [mean], self._form)
            if moved is None:
                return None, metrics
            values = moved
        self.model = self.messenger.spread(values)
        return self.arrays(), metrics

    def fold(self, replies: int) -> tuple[Callable[[CheckedReply], None], Callable[[], Vector]]:
        """Return what takes each of so many replies, and what then returns the model, shape (layout.size,)."""
        mean, spread = WeightedMean(int(np.count_nonzero(self.mask.transmitted)), replies), self.messenger.spread
        return lambda answer: mean.add(answer.values, answer.weight), lambda: spread(mean.value())

    def training_metadata(self, nodes: Iterable[int]) -> tuple[Metadata, Mapping[int, Metadata]]:
        """Return what messages of training tell beside the usual: all nodes, and one alone."""
        return {}, {}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation messages of a round; `arrays` is not read."""
        least = self.base.min_evaluate_nodes
        return self._messages("evaluate", server_round, config, grid, self.base.fraction_evaluate, least)

    def _messages(
        self, kind: Kind, round_: int, config: ConfigRecord, grid: Grid, fraction: float, least: int
    ) -> list[Message]:
        self.check_playing()
        if not fraction:
            return []
        config["server-round"] = round_
        nodes = self.sample(grid, kind, round_, fraction, least)
        if self.inner is not None:
            given, configure = self._form.arrays(self.model[self.mask.transmitted]), f"configure_{kind}"
            key = self.base.configrecord_key
            config = inner_round_config(getattr(self.inner, configure), round_, given, config, grid, key)
        told, own = self.training_metadata(nodes) if kind == "train" else ({}, {})
        summation = None
        if kind == "train" and self.sums is not None:
            what, size = f"training in round {round_}", int(np.count_nonzero(self.mask.transmitted))
            summation = self.messenger.summation(grid, nodes, size, self.sums, round_, what)
            nodes = summation.nodes
        self._summation = summation if kind == "train" else self._summation
        return self.messenger.build_messages(kind, round_, nodes, self.model, config, told, own, summation)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the metrics of the good replies, aggregated as FedAvg does or as the inner strategy does."""
        answers = list[CheckedReply]()
        self.messenger.receive(replies, answers.append)
        contents, odd = common_metrics(answers)
        self._refuse(odd)
        if not contents:
            return None
        if self.inner is not None:
            return evaluate_by(self.inner, server_round, [answer for answer in answers if answer.node not in odd])
        return self.base.evaluate_metrics_aggr_fn(contents, self.base.weighted_by_key)

    def _refuse(self, odd: Mapping[int, str]) -> None:
        for node, reason in odd.items():
            self.messenger.report.refuse(node, in_a_line(reason))

    def arrays(self) -> ArrayRecord:
        """Return the model: dense arrays as `initial_arrays` were, dead weights exactly 0 or frozen."""
        return self.messenger.spec.dense(self.model)


_OF_THE_MEAN = [each.aggregate_train for each in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)]
"""What Flower's strategies do with a mean, and with replies only by taking it."""
MOST_OF_ONE = (2**31 - 1) // LEAST_NODES
_RANKED = frozenset({"criterion", "scope", "min_per_layer", "saliency_weighting", "dead", "granularity"})
_SCORED = {"ssfl": _RANKED, "shuffled": _RANKED}
_READ = {**_SCORED, "random": {"scope", "dead", "granularity"}, "dense": {"scope", "min_per_layer"}}  # dense: `TopK`
_READ["flash"] = {"stage_clients", "stage_epochs", "prune_rate"}


def _check_read(mask: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a mask that there is not, or an argument that another one reads."""
    if mask not in _READ:
        raise ValueError(f"mask is {mask!r}; it is one of {', '.join(MASKS)}")
    for name, value in given.items():
        if name not in _READ[mask] and value != inspect.signature(SSFL).parameters[name].default:
            who = "TopK" if mask == "dense" else f"mask {mask!r}"
            raise ValueError(f"{name} is {value!r}; {who} does not read it")
    if given["stage_epochs"] == 1:
        raise ValueError("stage_epochs is 1; it is at least 2: the mask moves between two trainings")


def checked_options(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """Return options of a strategy of `ssfl run`, checked by their fields; a ValueError has the argument's name."""
    try:
        return build(kind, "", {name.replace("_", "-"): value for name, value in given.items()})
    except ConfigError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"{name.replace('-', '_')} {rest}") from error
