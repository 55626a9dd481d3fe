"""Options that every strategy shares, and how a strategy reads those that are its own: typed, by their class."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from ssfl_app.core.robust import FOLDS
from ssfl_app.options import ConfigError, above, anything, at_least, choice, fraction, option
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.sparsity.values import VALUE_TYPES
from ssfl_app.training.trainer import LocalOptions

# What a strategy's file needs for options of its own.
__all__ = ["FailureOptions", "FromSettings", "MaskOptions", "RunOptions", "Section", "Settings", "WireOptions"]
__all__ += ["ConfigError", "above", "anything", "at_least", "choice", "fraction", "option"]


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
    scope: Literal["global", "layer"] = choice("global", "layer")
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
    """The options of a strategy and its clients; `sections` has those of single strategies by name."""

    run: RunOptions
    mask: MaskOptions
    local: LocalOptions
    wire: WireOptions
    failures: FailureOptions
    shift: ShiftOptions
    sections: Mapping[str, Any]


class Section:
    """Options that only some strategies read: the base of frozen dataclasses.

    Attributes
    ----------
    section : str
        The name in the configuration.
    """

    section: ClassVar[str]

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return these options of a run."""
        found: Self = settings.sections[cls.section]
        return found


S = TypeVar("S", bound=Section)


class _Told(Protocol):
    settings: Settings


class FromSettings(Generic[S]):
    """Attribute of a strategy or a client: ``options = FromSettings(DittoOptions)`` has the options of its run.

    It also declares that the strategy reads this section.
    """

    def __init__(self, kind: type[S]) -> None:
        self.kind = kind

    def __get__(self, owner: _Told, _: object = None) -> S:
        return self.kind.from_settings(owner.settings)
