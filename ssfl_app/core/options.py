"""Options that every strategy shares, and how a strategy reads those that are its own: typed, by their class."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from ssfl_app import callbacks
from ssfl_app.callbacks.stopping import StopOptions
from ssfl_app.core.clock import ClockOptions
from ssfl_app.core.robust import FOLDS
from ssfl_app.options import ConfigError, above, anything, at_least, choice, fraction, option
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.values import SUMMED_TYPES, VALUE_TYPES
from ssfl_app.training.trainer import LocalOptions

# What a strategy's file needs for options of its own.
__all__ = ["FailureOptions", "FromSettings", "MaskOptions", "RunOptions", "Section", "Settings", "WireOptions"]
__all__ += ["ConfigError", "above", "anything", "at_least", "choice", "fraction", "option"]


@dataclass(frozen=True)
class RunOptions:
    """Keys of the section ``run``."""

    clients: int = at_least(1, 20, "clients of the federation; one SuperNode each")
    cohort: int = at_least(1, 10, "clients that train in a round; not given, at most all")
    rounds: int = at_least(1, 20, "rounds of training")
    over_select: float = at_least(
        1, 1.0, "times run.cohort that are asked in a round, at most all (docs/slow-sites.md)"
    )
    close_after: float = option(
        "0, a share below 1, or a whole number",
        lambda value: 0 <= value < 1 or (value < math.inf and value == int(value)),
        0.0,
        "good replies that close a round, a number or a share of those asked; late ones do not count; 0: all",
    )
    buffer: float = option(
        "0, a share below 1, or a whole number",
        lambda value: 0 <= value < 1 or (value < math.inf and value == int(value)),
        0.0,
        "the same, but late ones count in the round in which they come, the less the older they are; 0: off",
    )
    deadline: float = option(
        "0 or a number of at least 1",
        lambda value: value == 0 or 1 <= value < math.inf,
        0.0,
        "nobody is waited for longer than this many times what it usually takes; 0: run.round-timeout",
    )
    seed: int = anything("a whole number", 1, "of everything random: init, partition, cohorts, minibatches")
    weighting: str = choice("samples", "uniform", about="weight of a client in the mean of a round")
    fold: str = choice(*FOLDS, about="what a round makes of its replies; the last three are unweighted")
    trim: float = option(
        "a number from 0 to below 0.5",
        lambda value: 0 <= value < 0.5,
        0.2,
        "trimmed-mean leaves out this share of the replies at either end; krum: this share may lie; in [0, 0.5)",
    )
    device: str = choice("auto", "cpu", "cuda", about="where clients train; auto: on a GPU if there is one")
    evaluate_every: int = at_least(1, 1, "rounds between evaluations (the last round is always evaluated)")
    checkpoint_every: int = at_least(1, 5, "rounds between checkpoints")
    round_timeout: float = above(0, 600.0, "seconds a round may wait for its clients")
    join_timeout: float = above(0, 120.0, "seconds to wait until all clients are connected")
    out: str = anything("a folder, or empty", "", "run folder; empty: runs/<time>-<strategy>-<dataset>")
    trackers: str = callbacks.field(about="with commas: who sees the run go by (docs/trackers.md)")
    resume: bool = anything("true or false", False, "go on from the checkpoint in run.out")
    replay: str = anything(
        "a folder, or empty", "", "run folder: each round takes the replies that counted in that run"
    )

    @property
    def asked(self) -> int:
        """How many clients are asked in a round at most."""
        return min(self.clients, math.ceil(Fraction(repr(self.over_select)) * self.cohort))

    @property
    def closes_early(self) -> str:
        """The key, with its value, by which a round closes before its last reply; "" if it does not."""
        keys = {"run.close-after": self.close_after, "run.deadline": self.deadline, "run.buffer": self.buffer}
        return next((f"{key} is {value:g}" for key, value in keys.items() if value), "")

    def closes_at(self, asked: int) -> int:
        """Return how many good replies close a round in which so many clients are asked, or at work."""
        count = self.close_after or self.buffer
        if count >= 1 or not count:
            return min(asked, int(count) or asked)
        return math.ceil(Fraction(repr(count)) * asked)

    def check(self, everybody: bool, min_ok_fraction: float) -> None:
        """Raise ConfigError unless a round can close, and counts, with the replies that it is to close with.

        `everybody` says whether all clients train in a round.
        """
        if self.cohort > self.clients:
            rule = f"it is at most run.clients, {self.clients}: ask for run.cohort={self.clients}"
            raise ConfigError(f"run.cohort is {self.cohort}; {rule}")
        if everybody and self.over_select != 1:
            raise ConfigError(f"run.over-select is {self.over_select:g}; it is 1 where all clients train in a round")
        asked = self.clients if everybody else self.asked
        if self.buffer and (self.close_after or self.deadline):
            raise ConfigError(f"run.buffer is {self.buffer:g}; it is 0 where {self.closes_early}: nobody is too late")
        if self.close_after > asked or self.buffer > asked:
            raise ConfigError(f"{self.closes_early}; a round asks {asked} clients")
        least = math.ceil(Fraction(repr(min_ok_fraction)) * asked)
        if self.close_after and self.closes_at(asked) < least:
            rule = f"failures.min-ok-fraction is {min_ok_fraction:g}, of {asked} clients that are asked {least}"
            raise ConfigError(f"run.close-after is {self.close_after:g}; a round counts with more replies: {rule}")


@dataclass(frozen=True)
class MaskOptions:
    """Keys of the section ``mask``."""

    density: float = fraction(0.1, "alive / size over the prunable tensors, in (0, 1]")
    scope: Literal["global", "layer"] = choice("global", "layer", about="rank all weights together or layer by layer")
    min_per_layer: int = at_least(
        -1,
        -1,
        'floor of alive weights (or channels) in each layer; -1: 0 as in the paper, but 1 with data.where "sites"',
    )
    dead: Literal["zero", "frozen"] = choice(
        "zero", "frozen", about="what dead weights are: 0, or what they were at the start (docs/fine-tuning.md)"
    )
    granularity: str = choice(
        "weight", "channel", "2:4", "block", about="what stays or goes by itself (docs/structure.md)"
    )
    budget: str = choice("parameters", "flops", about="of granularity channel: what the density is a share of")

    @property
    def frozen(self) -> bool:
        """Whether dead weights keep their initial values."""
        return self.dead == "frozen"


@dataclass(frozen=True)
class WireOptions:
    """Keys of the section ``wire``."""

    down_values: str = choice(*VALUE_TYPES, about="how values travel to clients")
    up_values: str = choice(*VALUE_TYPES, *SUMMED_TYPES, about="how they come back; fixed: docs/privacy.md")
    range: float = above(0, 1.0, "largest magnitude of an update or a score with fixed32 or fixed16")
    rounding: str = choice("nearest", "stochastic", about="how fp16, bf16 and int8 round")
    error_feedback: bool = anything(
        "true or false", False, "add what rounding took from a model to the next one that travels"
    )
    bitmaps: str = choice("plain", "zlib", about="one bit a weight, or deflated where that is less")


@dataclass(frozen=True)
class FailureOptions:
    """Keys of the section ``failures``."""

    min_ok_fraction: float = fraction(0.5, "a round counts if this share of its cohort answered well")
    norm_factor: float = option(
        "0 or a number of at least 1",
        lambda value: value == 0 or 1 <= value < math.inf,
        0.0,
        "refuse updates more than this many times as long as the median of their round; 0: none",
    )


@dataclass(frozen=True)
class Settings:
    """The options of a strategy and its clients; `sections` has those of single strategies by name."""

    run: RunOptions
    mask: MaskOptions
    local: LocalOptions
    wire: WireOptions
    privacy: PrivacyOptions
    failures: FailureOptions
    shift: ShiftOptions
    stop: StopOptions
    clock: ClockOptions
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
