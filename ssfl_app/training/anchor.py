"""What holds a model near other weights while it trains, as `LocalTrainer.fit` takes it.

They are classes, and no closures, so that `ssfl_app.training.cuda_graph` knows what they compute and has a GPU replay
it with the step. `centre` has the other weights, a tensor for each of the model's parameters, in their order and of
their shape; `strength` is read when a fit begins.
"""

from collections.abc import Sequence

import torch
from torch import nn


class Proximal:
    """A `penalty`: ``strength / 2 |w - centre|^2``, whose gradient is ``strength (w - centre)``.

    Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, equation 2: strength is mu.
    """

    def __init__(self, centre: Sequence[torch.Tensor], strength: float) -> None:
        self.centre, self.strength = list(centre), strength

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Return the term, a scalar."""
        parts = [(p - c).square().sum() for p, c in zip(model.parameters(), self.centre, strict=True)]
        return self.strength / 2 * torch.stack(parts).sum()


class Pull:
    """An `after_step`: ``w <- w - strength (w - centre)``, a step of its own after the one of SGD.

    Li et al., "Ditto: Fair and robust federated learning through personalization", ICML 2021, algorithm 1: strength
    is the learning rate times lambda.
    """

    def __init__(self, centre: Sequence[torch.Tensor], strength: float) -> None:
        self.centre, self.strength = list(centre), strength

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """Move every parameter."""
        for parameter, centre in zip(model.parameters(), self.centre, strict=True):
            parameter.sub_(parameter - centre, alpha=self.strength)


Anchor = Proximal | Pull
