"""What methods share in which every client has a mask, and so a model, of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, ServerContext, SparseStrategy
from ssfl_app.core.strategy import density_pair
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays


class OwnMaskClient(ClientAlgorithm):
    """A client to whom its own model comes down."""

    def evaluate(self, payload: Payload) -> Metadata:
        """Test what came down as the client's own model."""
        self.load(payload)
        return self.tested(payload, "personal_accuracy")


class ClientMasks(SparseStrategy):
    """Each client gets its part of the global model; `masks` has one a client, dense at first."""

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self.masks = [Mask.dense(self.layout)] * self.settings.run.clients

    def mask_for(self, client: int) -> Mask:
        """Return the client's own mask."""
        return self.masks[client]

    def densities(self) -> tuple[float, float]:
        """Return the means over the clients' masks."""
        return density_pair(*self.masks)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the masks too."""
        return super().state_dict() | {f"mask/{k}": mask.packed() for k, mask in enumerate(self.masks)}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        packed = [np.asarray(arrays[f"mask/{k}"], dtype=np.uint8) for k in range(self.settings.run.clients)]
        self.masks = [Mask.unpack(self.layout, bitmap) for bitmap in packed]
