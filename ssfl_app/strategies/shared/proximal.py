"""The proximal term of FedProx."""

from collections.abc import Callable

import torch
from torch import nn


def proximal(model: nn.Module, mu: float) -> Callable[[nn.Module], torch.Tensor]:
    """Return mu / 2 |w - w'|^2 as a function of the model, w' being its weights of this moment."""
    centre = [parameter.detach().clone() for parameter in model.parameters()]

    def penalty(moved: nn.Module) -> torch.Tensor:
        parts = [(p - c).square().sum() for p, c in zip(moved.parameters(), centre, strict=True)]
        return mu / 2 * torch.stack(parts).sum()

    return penalty
