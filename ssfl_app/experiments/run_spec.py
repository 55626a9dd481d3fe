"""One run of many: its configuration, and the names of its folder and of its row."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssfl_app import config as configuration
from ssfl_app.config import Flat
from ssfl_app.strategies import REGISTRY

OURS = ("run.out", "run.resume")
"""Keys that a command which plays many runs sets itself."""
TASK = ("data", "partition", "model", "task", "shift")
"""Sections: what data and model of a run depend on."""


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes
    ----------
    slug, name : str
        Its folder's name, and what it is called in a line.
    flat : dict
        Its configuration.
    dense : bool
        Whether its strategy does not look at mask.density.
    variant : str
        The name of its row, "" if that is the strategy's.
    settings : tuple of str
        The keys that its row has values of its own for.
    """

    slug: str
    name: str
    flat: Flat
    dense: bool
    variant: str = ""
    settings: tuple[str, ...] = ()

    @property
    def row(self) -> str:
        """What tables call its row."""
        return self.variant or str(self.flat["strategy"])

    @property
    def density(self) -> float | None:
        """The density whose rows it is compared with, None for none; a dense variant may name one."""
        placed = not self.dense or "mask.density" in self.settings
        return float(self.flat["mask.density"]) if placed else None


def planned(
    flat: Flat, dense: bool, axes: Sequence[str] = (), variant: str = "", settings: Sequence[str] = ()
) -> RunSpec:
    """Return the run of a configuration, named after row, density, seed and `axes`; ConfigError: a bad value."""
    for key in configuration.paths(flat):  # as `ssfl run` does
        flat[key] = str(Path(str(flat[key])).expanduser().resolve())
    if type(flat["mask.density"]) is int:
        flat["mask.density"] = float(flat["mask.density"])
    configuration.parse(flat)
    density, seed, row = flat["mask.density"], flat["run.seed"], variant or str(flat["strategy"])
    words = [row, *([] if dense else [f"density {density}"]), f"seed {seed}"]
    parts = [row, *([] if dense else [f"d{density}"]), f"s{seed}"]
    parts += [f"{key}-{flat[key]}" for key in axes]
    name = " ".join([*words, *(f"{key}={flat[key]}" for key in axes)])
    return RunSpec(re.sub(r"[^\w.+-]", "_", "-".join(parts)), name, flat, dense, variant, tuple(settings))


def run_clash(run: RunSpec, theirs: Mapping[str, Any]) -> str | None:
    """Return, as a sentence, the first key by which `theirs` is another run; None if none is.

    Keys that this strategy does not look at are left out: options of other strategies, and mask.density if dense.
    """
    return configuration.first_clash(matters(run), theirs, whole=True)


def matters(run: RunSpec) -> Flat:
    """Return the keys that the strategy of a run looks at, and the strategy."""
    read = configuration.SHARED | REGISTRY[str(run.flat["strategy"])].sections()
    unseen = ("mask.density",) if run.dense else ()
    return {k: v for k, v in run.flat.items() if k.partition(".")[0] in ("strategy", *read) and k not in unseen}
