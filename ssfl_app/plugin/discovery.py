"""Round 0: clients score the weights once, and the mean of the scores becomes the mask, or another rule makes it.

A client also tells what it sees of the model: names of one tensor, and matrices that are no weights. On tensors that
are tied all must agree: the scores of those who do not, fewer than the others, are refused. Of kinds the majority
decides; they change no score. Who has scores of 0 only (no minibatch, nothing changed) saw nothing: it has no vote,
and its zeros, which would scale a mean and shift a median, are not folded.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ssfl_app.comm.exchange import names
from ssfl_app.comm.payload import Metadata
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.options import MaskOptions
from ssfl_app.core.robust import normalised
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.checked_reply import CheckedReply
from ssfl_app.plugin.gradient_probe import scales_of, starts_at_zero
from ssfl_app.plugin.inner import is_robust, scores_by
from ssfl_app.plugin.messenger import NodeMessenger
from ssfl_app.plugin.mod import SAW
from ssfl_app.plugin.node_sum import NodeSum, SumOptions
from ssfl_app.plugin.ranking import MaskRule, check_unranked, top, unscorable, within
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.plugin.tensor_report import TensorKind, TensorReport, Ties
from ssfl_app.sparsity.channels import (
    Cost,
    Ranks,
    channel_ranks,
    choose,
    narrow_layout,
    narrow_state,
    unit_count,
    unit_scores,
    widths_of,
)
from ssfl_app.sparsity.inner import InnerChannels, checked
from ssfl_app.sparsity.layout import Bits, Layout, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import pooled_snip
from ssfl_app.strategies.flash import FlashOptions, check_shares, first_mask, last_mask
from ssfl_app.strategies.ssfl.strategy import random_mask, random_ranks, shuffled_mask, shuffled_units
from ssfl_app.text import in_a_line

MASKS = ("ssfl", "random", "shuffled", "flash")
CRITERIA = ("snip", "pooled-snip", "gradient", "magnitude")
"""What one question for the gradients of a foreign train function answers."""


@dataclass(frozen=True)
class Discovery(MaskRule):
    """How the mask is found; the arguments of `SSFL` that concern nothing else.

    Whatever `mask` is, clients are asked for scores: these tell what the model is, too. "dense" is `TopK`'s.
    """

    batches: int
    weighting: str
    share: float
    min_ok_fraction: float
    named: bool
    mask: str
    criterion: str
    seed: int
    flash: FlashOptions
    frozen: bool = False
    granularity: str = "weight"
    channels: tuple[InnerChannels, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it is a fraction in (0, 1]")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope is {self.scope!r}; it is global or layer")
        if self.min_per_layer < 0:
            raise ValueError(f"min_per_layer is {self.min_per_layer}; it is at least 0")
        if self.batches < 1:
            raise ValueError(f"saliency_batches is {self.batches}; it is at least 1")
        if self.weighting not in ("samples", "uniform"):
            raise ValueError(f"saliency_weighting is {self.weighting!r}; it is samples or uniform")
        if not 0 < self.share <= 1:
            raise ValueError(f"saliency_share is {self.share}; it is a fraction in (0, 1]")
        if self.criterion not in CRITERIA:
            why = "others need more than the gradients of one question, or a module on the server"
            raise ValueError(f"criterion is {self.criterion!r}; it is one of {', '.join(CRITERIA)}: {why}")
        if self.granularity not in ("weight", "channel"):
            raise ValueError(f"granularity is {self.granularity!r}; it is weight or channel")
        if self.granularity == "weight" and self.channels:
            raise ValueError(f"channels are {[each.name for each in self.channels]}; granularity 'weight' has none")
        if self.granularity == "channel":
            if not self.channels:
                rule = "channels are those of the model, as inner_of(model) tells them"
                raise ValueError(f"granularity is 'channel' and channels are none; {rule}")
            if self.criterion != "snip" or self.frozen:
                given = "dead is 'frozen'" if self.frozen else f"criterion is {self.criterion!r}"
                raise ValueError(f"{given}; with granularity 'channel' it is {'zero' if self.frozen else 'snip'}")

    def check(self, layout: Layout) -> None:
        """Raise ValueError for a density under which nothing of these tensors is kept, or channels of other ones."""
        if self.granularity == "weight":
            super().check(layout)
        else:
            layout = replace(layout, inner=checked("channels", self.channels, dict(layout.shapes)))
            self._units(layout, np.zeros(unit_count(layout)))

    def find(
        self,
        messenger: NodeMessenger,
        grid: Grid,
        sample: Callable[[str, float], list[int]],
        model: Vector,
        config: Mapping[str, Any],
        record: dict[str, Any],
        inner: FedAvg | None = None,
        sums: SumOptions | None = None,
    ) -> tuple[StateSpec, Vector, Mask]:
        """Ask nodes for scores; return the mask, SSFL's of the highest mean score (eq. 6 and 7), its spec and model.

        With granularity "channel" these are of the smaller network, and the mask is dense.

        With a robust inner strategy it folds the scores instead, which then wait for each other in memory. With
        `sums` scores are added and not told apart, so that all nodes must agree on which tensors are one.

        Parameters
        ----------
        sample : callable
            Draws nodes for a purpose, a share of those that are connected.
        model : array of float32, shape (layout.size,)
            The initial weights, which go to every node that is asked.
        record : dict
            Takes who answered, how, and what it cost.

        Raises
        ------
        RunFailed
            Too few nodes answered well, or no score is above 0.
        ValueError
            The density keeps nothing.
        """
        layout, nodes = messenger.spec.layout, sample("saliency", self.share)
        means, said, by = dict[Ties, WeightedMean](), dict[int, TensorReport](), dict[int, str]()
        answers: list[CheckedReply] | None = [] if inner is not None and is_robust(inner) else None
        asked: Metadata = {"batches": self.batches, "weighting": self.weighting, "criterion": self.criterion}
        summation: NodeSum | None = None
        if sums is not None:
            what, uniform = "the question for saliency", self.weighting == "uniform"
            summation = messenger.summation(grid, nodes, layout.prunable_size, sums, 0, what, uniform)
            nodes = summation.nodes
        messages = messenger.build_messages("saliency", 0, nodes, model, config, asked, summation=summation)

        def take(answer: CheckedReply) -> None:
            if summation is not None:
                assert answer.summand is not None
                summation.add(answer.node, answer.summand)
                if not answer.metadata[SAW]:
                    return
            elif not answer.values.any():
                return
            elif answers is None:
                # A mean for each opinion on ties: which one counts is known at the end, whoever came first.
                told = answer.seen.ties
                means.setdefault(told, WeightedMean(layout.prunable_size, len(nodes)))
                if len(means) > OPINIONS:  # those that stay are the first of all, in whatever order they came
                    del means[max(means, key=_rank)]
                if told in means:
                    means[told].add(answer.values, answer.weight)
            else:
                answers.append(answer)
            said[answer.node], by[answer.node] = answer.seen, str(answer.metadata["scored-by"])

        messenger.receive(messenger.exchange(grid, messages, 4 * layout.prunable_size), take)
        ties = _usual_ties(said, messenger)
        odd = {node: seen for node, seen in said.items() if seen.ties != ties}
        if summation is not None and odd:
            raise RunFailed(
                f"node {min(odd)} ties {_pairs(odd[min(odd)].ties)}, most others tie {_pairs(ties)}; where scores "
                "are only added all must tie the same"
            )
        if summation is None and answers is None and said and ties not in means:
            raise RunFailed(
                f"the clients tell {len({seen.ties for seen in said.values()})} different things about which tensors "
                f"are one, and SSFL keeps the scores of {OPINIONS} apart; most of them tie {_pairs(ties)}, which is "
                "not among these. Initial arrays that are not equal cannot be said to be tied"
            )
        said = {node: seen for node, seen in said.items() if seen.ties == ties}
        found = None
        if summation is not None and said and messenger.report.enough(self.min_ok_fraction):
            found = summation.finish()
            record["clipped"] = found.clipped
        scored_by = Counter(by[node] for node in said)
        record |= names(messenger.report)
        record["scored_by"] = dict(sorted(scored_by.items()))
        record["bytes_discovery_down"] = messenger.report.down + messenger.report.mask_down
        record["bytes_discovery_up"] = messenger.report.up
        messenger.log_failures("discovery")
        messenger.report.require(self.min_ok_fraction, "the question for saliency", "node")
        scores, record["score_fold"] = np.zeros(layout.prunable_size, dtype=np.float32), "mean"
        if answers and inner is not None:
            good = [answer for answer in answers if answer.node in said]
            good = good if self.criterion == "gradient" else [_comparable(each, layout, model) for each in good]
            scores, record["score_fold"] = scores_by(inner, good, layout.prunable_size)
        elif found is not None:
            scores = found.values.astype(np.float32)
            scores = scores if self.criterion == "pooled-snip" else np.maximum(scores, 0)
        elif said and summation is None:
            scores = means[ties].value()
        if self.criterion == "pooled-snip":
            scores = pooled_snip(scores, scales_of(layout, model)[layout.is_prunable])
        if not scores.any():
            raise RunFailed(f"no client told a score above 0; the mask cannot be found. {_cause(layout, model)}")
        compare = 2 * scored_by["scores"] > scored_by.total() or (self.frozen and self.criterion == "gradient")
        dense = self._dense(layout, said)
        dense |= {} if compare else dict.fromkeys(unscorable(layout, model, scores), _ZERO)
        spec, model, scores = _settled(messenger.spec, model, scores, ties, dense)
        if not spec.prunable:
            raise RunFailed(f"no tensor is left to prune: {dense}; name some by prunable=[...]")
        messenger.whole = spec.layout
        if self.granularity == "channel":
            spec, model = self._smaller(spec, model, scores, compare, ties, record)
            record |= {"ties": dict(ties), "within": {}, "dense": dense}
            return spec, model, Mask.dense(spec.layout)
        alone = {} if compare else within(spec.layout, model, scores)
        if self.criterion == "gradient":  # all are ranked by it
            alone = {name: by for name, by in alone.items() if by == "magnitude"}
        if self.mask != "ssfl":
            check_unranked(spec)
        if self.mask == "flash":
            messenger.spec, finders = spec, sample("flash-clients", self.flash.stage_clients)
            mask = self._flash(messenger, grid, finders, model, config, record)
        else:
            mask = self._choose(spec, model, scores, alone)
        record |= {"density": mask.density, "layers": {name: alive / size for name, alive, size in mask.layers()}}
        record |= {"ties": dict(ties), "within": alone, "dense": dense}
        _tell(spec, mask, record, cut=not self.frozen)
        return spec, model, mask

    def _units(self, layout: Layout, ranks: Ranks) -> Bits:
        return choose(layout, ranks, self.density, Cost(layout), max(1, self.min_per_layer))

    def _smaller(
        self, spec: StateSpec, model: Vector, scores: Vector, told: bool, ties: Ties, record: dict[str, Any]
    ) -> tuple[StateSpec, Vector]:
        """Return spec and initial weights of the network of the best channels; `told`: scores are a user's own."""
        layout = replace(spec.layout, inner=self.channels)
        one = {name for pair in ties for name in pair}
        if tied := sorted(one & {name for inner in self.channels for name, _ in inner.pairs}):
            raise RunFailed(f"channels name {tied}, tensors with several names; no channel is removed from them")
        scores = scores.copy()
        if not told:  # |g| is no |g * w|, which is 0 there
            for name in starts_at_zero(layout, model):
                scores[layout.prunable_spans[name]] = 0
        if self.mask == "random":
            kept = self._units(layout, random_ranks(layout, self.scope, self.seed))
        else:
            of_units = unit_scores(layout, scores)
            if not of_units.any():
                raise RunFailed(f"no channel has a score above 0. {_cause(layout, model)}")
            kept = self._units(layout, channel_ranks(layout, of_units, self.scope))
        if self.mask == "shuffled":
            kept = shuffled_units(layout, kept, self.seed)
        widths = widths_of(layout, kept)
        small = narrow_layout(layout, widths)
        record["widths"] = {inner.name: width for inner, width in zip(self.channels, widths, strict=True)}
        sizes, whole = small.prunable_sizes, layout.prunable_sizes
        record |= {"density": small.prunable_size / layout.prunable_size}
        record |= {"layers": {name: size / whole[name] for name, size in sizes.items()}}
        log(INFO, "\t> channels that stay: %s", ", ".join(f"{name} {n}" for name, n in record["widths"].items()))
        return spec.with_shapes(small), small.flatten(narrow_state(layout, layout.unflatten(model), kept))

    def _choose(self, spec: StateSpec, model: Vector, scores: Vector, alone: dict[str, str]) -> Mask:
        """Return the mask that needs no further question; what starts at 0 has no magnitude to be ranked by."""
        if self.mask == "dense":
            return Mask.dense(spec.layout)
        if self.mask == "random":
            return random_mask(spec.layout, MaskOptions(self.density, self.scope), self.seed)
        if self.criterion == "magnitude":
            alone = {name: by for name, by in alone.items() if by == "gradient"}
            zero = [np.full(size, name in alone) for name, size in spec.layout.prunable_sizes.items()]
            scores = np.where(np.concatenate(zero), scores, np.abs(model[spec.layout.is_prunable]))
        mask = top(spec, model, scores, self, alone)
        return shuffled_mask(mask, self.seed) if self.mask == "shuffled" else mask

    def _flash(
        self, messenger: NodeMessenger, grid: Grid, nodes: list[int], model: Vector, config: Any, record: Any
    ) -> Mask:
        """Have nodes find layer densities by sparse learning, and return a random mask of their mean."""
        layout, asked = messenger.spec.layout, messenger.report
        mean, messenger.mask = (
            WeightedMean(len(layout.prunable), len(nodes)),
            first_mask(layout, self.density, self.seed),
        )

        def take(answer: CheckedReply) -> None:
            check_shares(layout, answer.values, messenger.mask.count)
            mean.add(answer.values, answer.weight)

        told: Metadata = {"epochs": self.flash.stage_epochs, "prune-rate": self.flash.prune_rate}
        told |= {"seed": self.seed, "weighting": "samples"}
        places: dict[int, Metadata] = {node: {"place": place} for place, node in enumerate(nodes)}
        messages = messenger.build_messages("layer_densities", 0, nodes, model, config, told, places)
        messenger.receive(messenger.exchange(grid, messages, 4 * len(layout.prunable)), take)
        record |= names(asked, messenger.report)
        record["bytes_discovery_down"] += messenger.report.down + messenger.report.mask_down
        record["bytes_discovery_up"] += messenger.report.up
        messenger.log_failures("layer densities")
        messenger.report.require(self.min_ok_fraction, "the question for layer densities", "node")
        if not messenger.report.ok:
            raise RunFailed("no node told layer densities; the mask cannot be drawn")
        return last_mask(layout, mean.value(), self.density, self.seed)

    def _dense(self, layout: Layout, said: Mapping[int, TensorReport]) -> dict[str, str]:
        """Return what most clients call no weights, and what it is; refuse a named one that none trains."""
        told = Counter((name, kind) for seen in said.values() for name, kind in seen.kinds.items())
        kinds = {name: kind for (name, kind), count in sorted(told.items()) if 2 * count > len(said)}
        if self.named and (still := [name for name, kind in kinds.items() if kind == TensorKind.UNTRAINED]):
            raise RunFailed(f"prunable names {still}, which no client trains; leave them out")
        return {} if self.named else {name: _WORDS[kinds[name]] for name in layout.prunable if name in kinds}


_ZERO = "it starts at 0 and no gradient reaches it"
_WORDS = {TensorKind.UNTRAINED: "no client trains it", TensorKind.NORM: "it belongs to a norm"}
_MOST = 8
"""Names in a line of the log."""
OPINIONS = 8
"""Different opinions on ties whose scores are kept until the vote; each takes a mean of the model's size."""
_LARGE = 0.05
"""Share of all coordinates from which on a matrix that stays dense is worth a warning."""


def _usual_ties(said: Mapping[int, TensorReport], messenger: NodeMessenger) -> Ties:
    """Return what most clients say about tied tensors, and refuse the others; of equally many it is who says less."""
    counts = Counter(seen.ties for seen in said.values())
    usual = min(counts, key=lambda ties: (-counts[ties], len(ties), ties), default=())
    for node, seen in said.items():
        if seen.ties != usual:
            tied = f"ties {_pairs(seen.ties)}; {counts[usual]} of {len(said)} clients tie {_pairs(usual)}"
            messenger.report.refuse(node, in_a_line(tied))
    return usual


def _rank(ties: Ties) -> tuple[bool, int, Ties]:
    """Return which opinions are kept first: nothing is tied, all that starts equal is tied, what is in between."""
    return bool(ties), -len(ties), ties


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def _pairs(ties: Ties) -> str:
    return _listed([f"{name} to {first}" for name, first in ties]) if ties else "nothing"


def _comparable(answer: CheckedReply, layout: Layout, model: Vector) -> CheckedReply:
    """Return an answer whose tensors of zeros weigh as much as their size: |g| is louder than |g * w|."""
    zero = starts_at_zero(layout, model)
    if not zero:
        return answer
    values, rest = answer.values.copy(), np.ones(answer.values.size, dtype=np.bool_)
    for name in zero:
        rest[layout.prunable_spans[name]] = False
        values[layout.prunable_spans[name]] = normalised(values[layout.prunable_spans[name]])
    values[rest] = normalised(values[rest])
    return replace(answer, values=values)


def _settled(
    spec: StateSpec, model: Vector, scores: Vector, ties: Ties, dense: Mapping[str, str]
) -> tuple[StateSpec, Vector, Vector]:
    """Return spec, model and scores with one name a tensor and without those that stay dense."""
    if not ties and not dense:
        return spec, model, scores
    old, new = spec.layout, spec.settled(ties, dense)
    first, parts = dict(ties), dict[str, Vector]()
    for name in old.prunable:  # of the names of one tensor the first prunable one has the scores
        parts.setdefault(first.get(name, name), scores[old.prunable_spans[name]])
    kept = [parts[name] for name in new.prunable]
    scores = np.concatenate(kept) if kept else np.zeros(0, dtype=np.float32)
    return new, new.narrowed(model, spec), scores


def _cause(layout: Layout, model: Vector) -> str:
    zero, blocked = starts_at_zero(layout, model), ""
    if zero:
        blocked = f"{_listed(zero)} start at 0 and may block each other's gradients: draw them at random. "
    return (
        f"{blocked}All gradients (or changes by one local training) are 0: is there a minibatch, and a learning rate "
        'above 0? SparseMod(saliency=..., returns="scores") tells scores of your own'
    )


def _tell(spec: StateSpec, mask: Mask, record: Mapping[str, Any], cut: bool) -> None:
    """Log what is special about this mask, and warn of what a user may not want; whether dead weights `cut` off."""
    layout = spec.layout
    share = np.count_nonzero(mask.transmitted) / max(1, mask.transmitted.size)
    log(INFO, "\t> %.1f %% of all coordinates travel", 100 * share)
    if ties := record["ties"]:
        log(INFO, "\t> tied, and masked as one: %s", _pairs(tuple(ties.items())))
    for by, what in (("gradient", "start at 0 and are ranked by |g|"), ("magnitude", "have no gradient yet: by |w|")):
        if names := [name for name, how in record["within"].items() if how == by]:
            log(INFO, "\t> within themselves: %s %s", _listed(names), what)
    for name, why in record["dense"].items():
        log(INFO, "\t> %s stays dense: %s", name, why)
    sizes = {name: math.prod(shape) for name, shape in layout.shapes if len(shape) > 1}
    large = [n for n, size in sizes.items() if n not in layout.prunable and size > _LARGE * layout.size]
    if large:
        log(WARNING, "%s stay dense and are large; prunable=[...] names the tensors to prune", _listed(large))
    layers = list(mask.layers())
    if cut and (empty := [name for name, alive, size in layers if size and not alive]):
        log(
            WARNING,
            "%s of %s layers keep no weight, and nothing passes through them: %s. min_per_layer=... leaves some in "
            'each, and scope="layer" ranks each on its own',
            len(empty),
            len(layers),
            _listed(empty),
        )
