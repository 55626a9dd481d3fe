"""A strategy of one's own: FedAvgM inside the mask of SSFL.

The server adds momentum to the mean update (Hsu, Qi and Brown, "Measuring the effects of non-identical data
distribution for federated visual classification", 2019, arXiv:1909.06335): v <- beta v + (mean - w), w <- w + v.

    ssfl run momentum.toml          in a folder with this file
"""

from dataclasses import dataclass

import torch

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.options import FromSettings, Section, option
from ssfl_app.strategies.ssfl.strategy import Ssfl


@dataclass(frozen=True)
class MomentumOptions(Section):
    """Keys of the section ``momentum``."""

    section = "momentum"

    beta: float = option(
        "a number in [0, 1)", lambda value: 0 <= value < 1, 0.5, "share of the last update that goes on"
    )


class Momentum(Ssfl):
    """SSFL whose server has momentum. Everything a checkpoint must keep is in `state_dict`."""

    name = "momentum"
    momentum = FromSettings(MomentumOptions)

    def __init__(self, context):
        super().__init__(context)
        self.velocity = {name: torch.zeros(shape) for name, shape in self.layout.shapes}

    def aggregator(self, round_):
        mean = super().aggregator(round_)

        def finish():
            before = self.state
            mean.finish()
            self.velocity = {n: self.momentum.beta * self.velocity[n] + (self.state[n] - before[n]) for n in before}
            self.state = {n: before[n] + self.velocity[n] for n in before}

        return Aggregator(mean.add, finish)

    def state_dict(self):
        return super().state_dict() | {"velocity": self.layout.flatten(self.velocity)}

    def load_state_dict(self, round_, arrays):
        super().load_state_dict(round_, arrays)
        self.velocity = self.layout.unflatten(arrays["velocity"])
