"""Sparse federated learning on Flower: SSFL and the systems it is compared with.

``run``, ``load_run`` and what they raise are for scripts and notebooks, ``SparseStrategy``, ``ClientAlgorithm``,
``Mask``, ``Task`` and ``RunCallback`` for algorithms of your own, ``SSFL`` and ``sparse_mod`` for other people's
Flower projects. The names are looked up when they are first used, so that ``import ssfl_app`` loads neither torch nor
Flower.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssfl_app.api import load_run as load_run
    from ssfl_app.api import run as run
    from ssfl_app.callbacks.base import RunCallback as RunCallback
    from ssfl_app.core.client import ClientAlgorithm as ClientAlgorithm
    from ssfl_app.core.strategy import SparseStrategy as SparseStrategy
    from ssfl_app.locks import RunFailed as RunFailed
    from ssfl_app.options import ConfigError as ConfigError
    from ssfl_app.plugin.gradients import active_mask as active_mask
    from ssfl_app.plugin.gradients import mask_gradients as mask_gradients
    from ssfl_app.plugin.mod import SparseMod as SparseMod
    from ssfl_app.plugin.mod import sparse_mod as sparse_mod
    from ssfl_app.plugin.mod import sparse_numpy_mod as sparse_numpy_mod
    from ssfl_app.plugin.strategy import SSFL as SSFL
    from ssfl_app.plugin.topk import TopK as TopK
    from ssfl_app.sparsity.inner import InnerChannels as InnerChannels
    from ssfl_app.sparsity.inner import inner_of as inner_of
    from ssfl_app.sparsity.mask import Mask as Mask
    from ssfl_app.training.narrow import narrowed_to as narrowed_to
    from ssfl_app.training.tasks import Task as Task

    __version__: str

_HOMES = {
    "run": "ssfl_app.api",
    "load_run": "ssfl_app.api",
    "ConfigError": "ssfl_app.options",
    "RunFailed": "ssfl_app.locks",
    "SparseStrategy": "ssfl_app.core.strategy",
    "ClientAlgorithm": "ssfl_app.core.client",
    "Mask": "ssfl_app.sparsity.mask",
    "Task": "ssfl_app.training.tasks",
    "RunCallback": "ssfl_app.callbacks.base",
    "SSFL": "ssfl_app.plugin.strategy",
    "TopK": "ssfl_app.plugin.topk",
    "SparseMod": "ssfl_app.plugin.mod",
    "sparse_mod": "ssfl_app.plugin.mod",
    "sparse_numpy_mod": "ssfl_app.plugin.mod",
    "active_mask": "ssfl_app.plugin.gradients",
    "mask_gradients": "ssfl_app.plugin.gradients",
    "InnerChannels": "ssfl_app.sparsity.inner",
    "inner_of": "ssfl_app.sparsity.inner",
    "narrowed_to": "ssfl_app.training.narrow",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Return a public name, whose module is imported now; or the version, which stands in pyproject.toml."""
    if name == "__version__":  # Flower wants it there; an app that Flower installed has no metadata to ask
        import tomllib

        from ssfl_app.files import app_folder

        return tomllib.loads((app_folder() / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
