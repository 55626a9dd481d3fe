"""Sparse federated learning on Flower: SSFL and the systems it is compared with.

The plug-in layer for other people's Flower projects is exported here: ``from ssfl_app import SSFL, sparse_mod``.
The names are looked up when they are first used, so that ``import ssfl_app`` loads neither torch nor Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssfl_app.callbacks.base import RunCallback as RunCallback
    from ssfl_app.plugin.gradients import active_mask as active_mask
    from ssfl_app.plugin.gradients import mask_gradients as mask_gradients
    from ssfl_app.plugin.mod import SparseMod as SparseMod
    from ssfl_app.plugin.mod import sparse_mod as sparse_mod
    from ssfl_app.plugin.mod import sparse_numpy_mod as sparse_numpy_mod
    from ssfl_app.plugin.strategy import SSFL as SSFL

__version__ = "0.1.0"

_HOMES = {
    "RunCallback": "ssfl_app.callbacks.base",
    "SSFL": "ssfl_app.plugin.strategy",
    "SparseMod": "ssfl_app.plugin.mod",
    "sparse_mod": "ssfl_app.plugin.mod",
    "sparse_numpy_mod": "ssfl_app.plugin.mod",
    "active_mask": "ssfl_app.plugin.gradients",
    "mask_gradients": "ssfl_app.plugin.gradients",
}

__all__ = ["RunCallback", "SSFL", "SparseMod", "active_mask", "mask_gradients", "sparse_mod", "sparse_numpy_mod"]


def __getattr__(name: str) -> Any:
    """Return a public name, which is imported now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
