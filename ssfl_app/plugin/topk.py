"""`TopK`: dense models down, each node's largest coordinates up, as `ssfl_app.strategies.topk` has it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ssfl_app.comm.payload import Metadata
from ssfl_app.core.means import MAX_WEIGHT, OverlapMean, WeightedMean
from ssfl_app.plugin.checked_reply import CheckedReply
from ssfl_app.plugin.strategy import SSFL, checked_options
from ssfl_app.sparsity.layout import Vector
from ssfl_app.sparsity.mask import alive_count
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.topk import TopkOptions


class TopK(SSFL):
    """Top-k in the place of Flower's FedAvg; the clients need `sparse_mod`. There is no mask: `mask` is dense.

    Parameters
    ----------
    density : float
        Share of the prunable weights that a node sends, in (0, 1].
    of, mean, index, error_feedback
        As `TopkOptions` has them. With error feedback a node keeps what it did not send in its ``Context.state``.
        With mean "overlap" the weights of replies are whole numbers.
    **common
        `SSFL`'s, but for those of masks and `inner`: its nodes do not all send the same coordinates.
    """

    def __init__(
        self,
        density: float = 0.1,
        *,
        of: str = TopkOptions.of,
        mean: str = TopkOptions.mean,
        index: str = TopkOptions.index,
        error_feedback: bool = TopkOptions.error_feedback,
        **common: Any,
    ) -> None:
        given = {"of": of, "mean": mean, "index": index, "error_feedback": error_feedback}
        self.options = checked_options(TopkOptions, given)
        self.options.check()
        if odd := sorted({"inner", "inner_arrays", "mask"} & common.keys()):
            raise TypeError(f"TopK has no argument {odd[0]!r}: its nodes do not all send the same coordinates")
        super().__init__(density, mask="dense", **common)

    def training_metadata(self, nodes: Iterable[int]) -> tuple[Metadata, Mapping[int, Metadata]]:
        """Return what a node sends, and as of which round its state counts."""
        wanted, options, messenger = self.discovery, self.options, self.messenger
        messenger.up = options.codec(self._values)
        told: Metadata = {"of": options.of, "index": options.index, "error-feedback": options.error_feedback}
        told |= {"density": wanted.density, "scope": wanted.scope, "min-per-layer": wanted.min_per_layer}
        return told, {node: {"since": messenger.taken.get(node, 0)} for node in nodes}

    def fold(self, replies: int) -> tuple[Callable[[CheckedReply], None], Callable[[], Vector]]:
        """Average weights or updates; refuse another number of coordinates than was asked for."""
        layout, wanted, most = self.messenger.spec.layout, self.discovery, MAX_WEIGHT // replies
        count = alive_count(layout, wanted.density, wanted.scope, wanted.min_per_layer)
        mean = OverlapMean(layout.size) if self.options.mean == "overlap" else WeightedMean(layout.size, replies)

        def add(answer: CheckedReply) -> None:
            assert answer.sent is not None
            if answer.sent.count != count:
                raise PayloadError(f"{answer.sent.count} weights came up; density {wanted.density} is {count}")
            if isinstance(mean, WeightedMean):
                mean.add(answer.values, answer.weight)
            elif answer.weight % 1 or answer.weight > most:
                raise PayloadError(f"its weight is {answer.weight}; with mean 'overlap' it is whole, at most {most}")
            else:
                mean.add(answer.values, answer.sent.transmitted, int(answer.weight))
            self.messenger.taken[answer.node] = int(answer.metadata["round"])

        def finish() -> Vector:
            if isinstance(mean, OverlapMean):
                return mean.value(self.model)
            return mean.value() if self.options.of == "weights" else self.model + mean.value()

        return add, finish
