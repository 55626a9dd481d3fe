"""The server side of methods in which every client has a mask of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.options import Settings
from ssfl_app.core.strategy import SparseStrategy, density_pair
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays


class ClientMasks(SparseStrategy):
    """Each client gets its part of the global model; `masks` has one a client, dense at first."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        super().__init__(layout, settings)
        self.masks = [Mask.dense(layout)] * settings.run.clients

    def mask_for(self, client: int) -> Mask:
        """Return the client's own mask."""
        return self.masks[client]

    def densities(self) -> tuple[float, float]:
        """Return the means over the clients' masks."""
        return density_pair(*self.masks)

    def state_dict(self) -> Arrays:
        """Return all that `restore` needs: the masks too."""
        return super().state_dict() | {f"mask/{k}": mask.packed() for k, mask in enumerate(self.masks)}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        packed = [np.asarray(arrays[f"mask/{k}"], dtype=np.uint8) for k in range(self.settings.run.clients)]
        self.masks = [Mask.unpack(self.layout, bitmap) for bitmap in packed]
