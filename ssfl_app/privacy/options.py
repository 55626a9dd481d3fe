"""The options of secure aggregation and differential privacy."""

import math
from dataclasses import dataclass

from ssfl_app.options import ConfigError, above, anything, choice, option

LEVELS = ("none", "client", "record")


@dataclass(frozen=True)
class PrivacyOptions:
    """Keys of the section ``privacy``."""

    secure_aggregation: bool = anything(
        "true or false", False, "values and scores reach the server as sums only (docs/privacy.md)"
    )
    threshold: float = option(
        "a number from 0.5 to below 1",
        lambda value: 0.5 <= value < 1,
        2 / 3,
        "more than this share of a client's neighbours must answer for its values to enter a sum; in [0.5, 1)",
    )
    level: str = choice(*LEVELS, about="what differential privacy hides: that a client took part, or a record")
    clip: float = above(0, 1.0, "largest Euclidean length of a client's update, or of a record's gradient")
    epsilon: float = option(
        "0 or a number above 0",
        lambda value: 0 <= value < math.inf,
        0.0,
        "the budget of a run: the noise follows; 0: the noise is given",
    )
    delta: float = option("a number in (0, 1)", lambda value: 0 < value < 1, 1e-5, "of the budget; in (0, 1)")
    noise_multiplier: float = option(
        "0 or a number above 0",
        lambda value: 0 <= value < math.inf,
        0.0,
        "standard deviation of the noise by privacy.clip; 0: it follows from privacy.epsilon",
    )

    discovery_multiplier: float = above(
        0, 4.0, 'the same of a discovery by ssfl.discovery "private-densities", with level "client"'
    )

    @property
    def private(self) -> bool:
        """Whether there is differential privacy, of whatever level."""
        return self.level != "none"

    def check(self) -> None:
        """Raise ConfigError unless a level has either a budget or a noise, and no level has neither."""
        given = {"epsilon": self.epsilon, "noise-multiplier": self.noise_multiplier}
        known = [f"privacy.{name} is {value:g}" for name, value in given.items() if value]
        if known and not self.private:
            raise ConfigError(f"{known[0]}; privacy.level is 'none', which adds no noise: it is 'client' or 'record'")
        if self.private and len(known) != 1:
            both = " and ".join(known) or "neither privacy.epsilon nor privacy.noise-multiplier is given"
            raise ConfigError(f"{both}; with privacy.level {self.level!r} one of the two is above 0")
