"""Saliency criteria: a score per weight, larger = keep; and the minibatch they are measured on.

==============  ======================================================  ====================================
function        score                                                   from
==============  ======================================================  ====================================
snip            ``|g w|`` of one gradient g                             a client
pooled_snip     ``|g w|``, g the mean gradient of all clients           the server
grasp           ``w (H g)``, H the Hessian                              the server
synflow         ``|w| dR/d|w|``, R the sum of outputs for an input of   the server, no data
                ones through a net of ``|w|``
==============  ======================================================  ====================================

Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019; used for federated
clients by Ohib et al., "SSFL", TMLR 2026, arXiv 2405.09037, eq. 5: ``s_k = |dL_k/dw * w|`` at the common
initial weights, on one class-balanced minibatch.

Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow" (GraSP), ICLR 2020:
``-w (H g)`` is, up to a factor, what the squared gradient norm gains to first order when w is removed; the weights of
the highest are removed, which are those of the lowest ``w (H g)``.

Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow" (SynFlow), NeurIPS 2020.

Departures: scores are not divided by their sum (SNIP does; it changes no ranking inside one client), and the
minibatch is not augmented (the author's code takes the first batch of the training loader as it comes). SynFlow's
net has no norms, which would rescale the flow, and no biases: the paper's R has none (its code takes their magnitudes
along).
"""

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ssfl_app.sparsity.layout import State, Vector


def snip(gradient: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> State:
    """Return |g * w| for each tensor of `gradient`, same shapes."""
    return {name: (g * state[name]).abs() for name, g in gradient.items()}


def pooled_snip(gradient: Vector, weights: Vector) -> Vector:
    """Return |g * w|, same shape; of the mean gradient it is SNIP on the pooled data of all clients."""
    return np.asarray(np.abs(gradient * weights))


def grasp(product: Vector, weights: Vector) -> Vector:
    """Return w * (H g), same shape, from the product H g: large where the weight keeps the gradient alive."""
    return weights * product


def flow_net(model: nn.Module) -> nn.Module:
    """Return a copy in float64 in which every norm is the identity and every bias is 0."""
    net = copy.deepcopy(model).double()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.zero_()
    return net


def synflow(net: nn.Module, weights: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> State:
    """Return |w| * dR/d|w| for each tensor of `weights`, float64, same shapes: those that are prunable.

    A removed weight is 0, and its score is 0. `net` was made by `flow_net`; `shape` is that of an image, (C, H, W).
    """
    device = next(net.parameters()).device
    flows = {name: w.detach().to(device).double().abs().requires_grad_() for name, w in weights.items()}
    ones = torch.ones(1, *shape, dtype=torch.float64, device=device)
    total = torch.func.functional_call(net, flows, (ones,)).sum()
    slopes = torch.autograd.grad(total, list(flows.values()))
    return {name: flows[name].detach() * slope for name, slope in zip(flows, slopes, strict=True)}


def balanced_batch(labels: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the indices of a minibatch of `size` images with equally many of every class among `labels`, (n >= 1,).

    Each of the c classes gives floor(size / c) images, without replacement while it has enough; the rest of
    the batch is filled with one more image of randomly chosen classes.
    """
    classes = np.unique(labels)
    counts = np.full(classes.size, size // classes.size)
    counts[rng.permutation(classes.size)[: size % classes.size]] += 1
    chosen = []
    for label, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(rng.choice(members, count, replace=count > members.size))
    return rng.permutation(np.concatenate(chosen)).astype(np.int64)


def plain_batch(count: int, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the indices of `size` of `count` images, or all of them, whatever their classes: (min(size, count),)."""
    return rng.permutation(count)[:size]
