"""The proximal term of FedProx."""

from torch import nn

from ssfl_app.training.anchor import Proximal


def proximal(model: nn.Module, mu: float) -> Proximal:
    """Return mu / 2 |w - w'|^2 as a function of the model, w' being its weights of this moment."""
    return Proximal([parameter.detach().clone() for parameter in model.parameters()], mu)
