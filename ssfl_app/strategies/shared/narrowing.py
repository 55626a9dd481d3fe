"""Networks with fewer channels (mask.granularity "channel"): what methods share that remove some before round 1."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ssfl_app.core.algorithm import ClientAlgorithm, Payload, ServerContext, SparseStrategy
from ssfl_app.core.options import ConfigError
from ssfl_app.core.validation import stored
from ssfl_app.sparsity.channels import (
    Cost,
    Ranks,
    Widths,
    channel_ranks,
    check_widths,
    choose,
    narrow_layout,
    narrow_state,
    unit_count,
    whole_widths,
    widths_of,
)
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import Bits, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError, read_array
from ssfl_app.training.narrow import uses_of_weights

WIDTHS = "widths"
"""Array beside a model, with mask.granularity "channel": how many channels each inner layer has, in its order."""


class NarrowingClient(ClientAlgorithm):
    """Paid for the alive values only; where channels were removed it works with the smaller network."""

    down = MaskedValues
    up = MaskedValues

    def load(self, payload: Payload) -> Mask:
        """Load the model that came down, of the widths that came along; return the mask it came under."""
        if WIDTHS in payload.arrays:
            told = read_array(payload.arrays, WIDTHS, np.int32, len(self.context.layout.inner)).tolist()
            try:
                self.context = self.context.narrower(tuple(told))
            except ValueError as error:
                raise PayloadError(str(error)) from error
        return super().load(payload)


class NarrowingStrategy(SparseStrategy):
    """A strategy that can go on with a network of fewer channels, which it makes before round 1."""

    granularities: ClassVar[tuple[str, ...]] = ("weight", "channel")

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        if self.by_channel and self.settings.mask.budget == "parameters":
            self.kept_units(np.zeros(unit_count(self.layout)))  # refuses a density that no network has

    @property
    def by_channel(self) -> bool:
        """Whether channels stay or go, and not weights."""
        return self.settings.mask.granularity == "channel"

    def cost(self) -> Cost:
        """Return what a network costs by mask.budget, as a function of its widths."""
        context = self.context
        if self.settings.mask.budget == "parameters":
            return Cost(context.layout)
        if context.workbench is None or context.input_shape is None:
            raise RuntimeError("mask.budget is 'flops'; the server counts them with the model, and has none")
        return Cost(context.layout, uses_of_weights(context.workbench, context.layout, context.input_shape))

    def ranks(self, scores: Vector) -> Ranks:
        """Return by what units stay, float64, shape (units,), of their `scores`."""
        wanted = self.settings.mask
        return channel_ranks(self.context.layout, scores, wanted.scope, wanted.budget)

    def kept_units(self, ranks: Ranks) -> Bits:
        """Return the units of the largest ranks that mask.budget holds; ConfigError if the density is too low."""
        wanted = self.settings.mask
        try:
            return choose(self.context.layout, ranks, wanted.density, self.cost(), max(1, wanted.min_per_layer))
        except ValueError as error:
            raise ConfigError(f"mask.{error}") from error

    def narrow(self, kept: Bits) -> None:
        """Go on with what the network has of the units `kept`, bool, shape (units,)."""
        self.state = narrow_state(self.layout, self.state, kept)
        self.become(widths_of(self.layout, kept))

    def become(self, widths: Widths) -> None:
        """Go on with the network of these widths, in which everything is alive."""
        self.layout = narrow_layout(self.context.layout, widths)
        self.mask = Mask.dense(self.layout)

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the model; and, where channels were removed, how many each layer has."""
        payload = super().train_payload(round_, client)
        return Payload({**payload.arrays, **self._widths()}, payload.metadata)

    def densities(self) -> tuple[float, float]:
        """Return alive / prunable and alive / all of the network that there was before channels were removed."""
        if not self.by_channel:
            return super().densities()
        whole = self.context.layout
        return self.layout.prunable_size / whole.prunable_size, self.layout.size / whole.size

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs."""
        return super().state_dict() | self._widths()

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        if self.by_channel:
            told = stored(arrays, WIDTHS, "int32", len(self.context.layout.inner)).tolist()
            self.become(check_widths(self.context.layout, told))
        super().load_state_dict(round_, arrays)

    def _widths(self) -> Arrays:
        return {WIDTHS: np.array(whole_widths(self.layout), dtype=np.int32)} if self.by_channel else {}
