"""Options that every strategy shares, a frozen dataclass for each section of the configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssfl_app.core.robust import FOLDS
from ssfl_app.options import above, anything, at_least, choice, fraction, option
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.sparsity.values import VALUE_TYPES
from ssfl_app.training.trainer import LocalOptions


@dataclass(frozen=True)
class RunOptions:
    """Keys of the section ``run``."""

    clients: int = at_least(1)
    cohort: int = at_least(1)
    rounds: int = at_least(1)
    seed: int = anything("a whole number")
    weighting: str = choice("samples", "uniform")
    fold: str = choice(*FOLDS)
    trim: float = option("a number from 0 to below 0.5", lambda value: 0 <= value < 0.5)
    device: str = choice("auto", "cpu", "cuda")
    evaluate_every: int = at_least(1)
    checkpoint_every: int = at_least(1)
    round_timeout: float = above(0)
    join_timeout: float = above(0)
    out: str = anything("a folder, or empty")
    resume: bool = anything("true or false")


@dataclass(frozen=True)
class MaskOptions:
    """Keys of the section ``mask``."""

    density: float = fraction()
    scope: str = choice("global", "layer")
    min_per_layer: int = at_least(-1)


@dataclass(frozen=True)
class WireOptions:
    """Keys of the section ``wire``."""

    down_values: str = choice(*VALUE_TYPES)
    up_values: str = choice(*VALUE_TYPES)
    rounding: str = choice("nearest", "stochastic")
    error_feedback: bool = anything("true or false")
    bitmaps: str = choice("plain", "zlib")


@dataclass(frozen=True)
class FailureOptions:
    """Keys of the section ``failures``."""

    min_ok_fraction: float = fraction()
    norm_factor: float = option("0 or a number of at least 1", lambda value: value == 0 or 1 <= value < math.inf)


@dataclass(frozen=True)
class Settings:
    """The options of a strategy and its clients; `own` holds the sections of single strategies by name."""

    run: RunOptions
    mask: MaskOptions
    local: LocalOptions
    wire: WireOptions
    failures: FailureOptions
    shift: ShiftOptions
    own: Mapping[str, Any]
