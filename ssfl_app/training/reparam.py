"""Changed forward and backward passes: contexts around a model that `LocalTrainer.fit` trains as ever.

All act on the weights of conv and linear layers, by the names of `Layout.prunable`. Inside, a layer computes with an
*effective* weight v = f(w) while the optimiser steps w, the original parameter. Afterwards, and after an error too,
the model is as before and w holds what was trained. Contexts nest; the one entered first is applied to w first. What
does not fit (names, shapes, ranges) raises ValueError on entering.

Where v differs from w, w is called ``0.parametrizations.weight.original`` inside, not ``0.weight``: `Layout.of`,
`load_state` and masks belong outside; `originals` finds w by its usual name. Copy no model inside.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from ssfl_app.sparsity.layout import NORMS, is_prunable, never_pruned
from ssfl_app.sparsity.mask import keep_count

Function = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def power_propagation(model: nn.Module, beta: float | Mapping[str, float]) -> Iterator[None]:
    """Compute with v = sign(w) |w|^beta, so that dL/dw = beta |w|^(beta-1) dL/dv.

    Schwarz et al., "Powerpropagation", NeurIPS 2021, section 2; SparsyFed (Guastella et al., 2025) has it in every
    layer. With beta > 1 a weight of exactly 0 has gradient 0. A beta of 1 changes no bit; none is below it. There is
    one for all, or one for each prunable tensor. `inverse_power` gives the w of a wanted v.
    """
    names = _prunable(model)
    betas = beta if isinstance(beta, Mapping) else dict.fromkeys(names, beta)
    _check_names("beta", betas, names)
    for name, value in betas.items():
        _check_beta(value, f" of {name}")
    with _effective(model, {name: partial(power, beta=value) for name, value in betas.items() if value != 1}):
        yield


def power(weights: torch.Tensor, beta: float) -> torch.Tensor:
    """Return v = sign(w) |w|^beta of any shape; with beta 1 the tensor itself."""
    _check_beta(beta)
    return weights if beta == 1 else weights.sign() * weights.abs().pow(beta)


def inverse_power(weights: torch.Tensor, beta: float) -> torch.Tensor:
    """Return w = sign(u) |u|^(1/beta), whose `power` is `weights`, of any shape; with beta 1 the tensor itself."""
    _check_beta(beta)
    return weights if beta == 1 else weights.sign() * weights.abs().pow(1 / beta)


def spectral_exponent(weight: torch.Tensor) -> float:
    """Return SparsyFed's beta = 1 + mean|W| / sigma(|W|) of a tensor (out, ...); 1 for one of zeros.

    sigma estimates the largest singular value of |W|, (out, rest), by one power iteration in float64 from
    u = (1, ..., 1)/sqrt(out), where the authors' code draws u: v = |W|'u / ||.||, sigma = || |W|v ||. It is never
    above the true value, and beta never above 1 + 1/sqrt(size).
    """
    matrix = weight.detach().abs().double().flatten(1)
    side = matrix.sum(dim=0)  # |W|'u up to its length
    sigma = float(torch.linalg.vector_norm(matrix @ (side / torch.linalg.vector_norm(side))))
    return 1 + float(matrix.mean()) / sigma if matrix.any() else 1.0


@contextmanager
def sparse_activations(model: nn.Module, keep: Mapping[str, float]) -> Iterator[None]:
    """Compute weight gradients from the largest activations only; outputs and all other gradients are unchanged.

    What a layer saves of its input a for dL/dW is pruned to the max(1, floor(keep * size)) largest |a| of the whole
    batch, equal ones by index; when training with gradients only. Raihan and Aamodt, "Sparse weight activation
    training" (SWAT), NeurIPS 2020; Qiu et al., "ZeroFL", ICLR 2022; SparsyFed. It saves no memory: zeros are stored.

    `keep` has a fraction in [0, 1] for each prunable tensor; with 1 the layer runs as it is. A forward pass raises
    RuntimeError where a layer saves another tensor than its input (a padding mode that copies, autocast).
    """
    modules = _prunable(model)
    _check_names("keep", keep, modules)
    shares = {name: share for name, share in keep.items() if _kept(name, share, 1) and share != 1}
    with ExitStack() as stack:
        for name, share in shares.items():
            own, before = vars(modules[name]), vars(modules[name]).get("forward")
            stack.callback(own.pop if before is None else own.__setitem__, "forward", before)
            own["forward"] = _pruning_forward(name, modules[name], share)
        yield


@contextmanager
def top_weights(model: nn.Module, density: float, dense: Collection[str] = ()) -> Iterator[None]:
    """Compute with the largest weights of each layer only, and hand their dense gradient to w unchanged.

    v = w at the floor(density * size) largest |w| of a tensor, equal ones by index, else 0; dL/dw = dL/dv everywhere:
    a weight may come back. Chosen anew in each forward pass, in evaluation too. SWAT; ZeroFL. The density is in
    (0, 1]; `dense` names prunable tensors that are left alone, such as ZeroFL's first convolution.
    """
    weights = _weights(model)
    _check_names("dense", dense, weights.keys() & set(dense))
    counts = {name: keep_count(density, w.numel()) for name, w in weights.items()}
    sparse = [name for name, count in counts.items() if name not in dense and count < weights[name].numel()]
    with _effective(model, {name: partial(_top, count=counts[name]) for name in sparse}):
        yield


@contextmanager
def bernoulli_weights(
    model: nn.Module, generator: torch.Generator, constants: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Compute with v = constant * m, m ~ Bernoulli(sigmoid(s)) drawn in each forward pass, and train the scores s.

    Isik et al., "Sparse random networks for communication-efficient federated learning" (FedPM), ICLR 2023. Straight
    through the draw: dL/ds = sigmoid'(s) constant dL/dv. All other parameters are frozen inside.

    The model's prunable tensors hold s, and `constants` has the fixed weights of each, of its shape. The generator is
    where the model is; or on the CPU: what is drawn is the same on every device then, and crosses to it in each pass.
    """
    scores = _weights(model)
    _check_names("constants", constants, scores)
    for name, score in scores.items():
        have, need = tuple(constants[name].shape), tuple(score.shape)
        if have != need:
            raise ValueError(f"constants of {name} have shape {have}; it must be {need}")
    places = {"cpu", *(score.device.type for score in scores.values())}
    if generator.device.type not in places:
        raise ValueError(f"generator is on {generator.device}; it must be on {' or '.join(sorted(places))}")
    functions = {n: partial(_bernoulli, constant=constants[n].to(s), generator=generator) for n, s in scores.items()}
    trained = {id(score) for score in scores.values()}
    with ExitStack() as stack:
        for parameter in model.parameters():
            if id(parameter) not in trained:
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
        stack.enter_context(_effective(model, functions))
        yield


@contextmanager
def filter_thresholds(model: nn.Module, thresholds: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Compute with v = w where the mean |w| of a filter is above its threshold, else 0; train the thresholds too.

    Kim, Saad, Debbah and Hong, "SpaFL: Communication-efficient federated learning with sparse models and low
    computational overhead", NeurIPS 2024. A filter is what makes one output: the entries of a tensor (out, ...) with
    one first index, n of them, whose bit is b. Straight through the step, as db = d(mean |w| - threshold):
    dL/dthreshold = -s with s = sum(w dL/dv) of the filter, and dL/dw = b dL/dv + sign(w) s / n.

    `thresholds` has a tensor (out,) for each prunable tensor. What is trained are copies, which are yielded by these
    names and are parameters of the model inside.
    """
    weights = _weights(model)
    _check_names("thresholds", thresholds, weights)
    for name, weight in weights.items():
        have, need = tuple(thresholds[name].shape), tuple(weight.shape[:1])
        if have != need:
            raise ValueError(f"thresholds of {name} have shape {have}; it must be {need}")
    steps = {name: _Threshold(thresholds[name].detach().to(weight, copy=True)) for name, weight in weights.items()}
    with _effective(model, steps):
        yield {name: step.threshold for name, step in steps.items()}


def alive_filters(weight: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return which filters of a tensor (out, ...) are alive under thresholds (out,): bool, (out,)."""
    return _margin(weight.detach(), threshold.detach()) > 0


def originals(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return w of each prunable tensor by name, in the order of `Layout.prunable`, inside contexts and outside."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        ours = isinstance(module, parametrize.ParametrizationList) and all(isinstance(x, _Effective) for x in module)
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, NORMS):
                whole = f"{path}.{name}" if path else name
                found[path.removesuffix("parametrizations.weight") + "weight" if ours else whole] = parameter
    shapes, spared = {name: tuple(parameter.shape) for name, parameter in found.items()}, never_pruned(model)
    return {n: parameter for n, parameter in found.items() if is_prunable(n, shapes) and n not in spared}


def without_other_form(model: nn.Module) -> list[str]:
    """Return the prunable tensors that a layer cannot compute with in another form here: not the weight of a module.

    A recurrent layer, for one, holds its weights twice, and would go on with w.
    """
    return [name for name in originals(model) if name not in _prunable(model)]


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: _original(module) for name, module in _prunable(model).items()}


def _original(module: nn.Module) -> nn.Parameter:
    parametrised = parametrize.is_parametrized(module, "weight")
    return cast(nn.Parameter, _chain(module).original if parametrised else module.weight)


def _prunable(model: nn.Module) -> dict[str, nn.Module]:
    named = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if not isinstance(module, NORMS)
        and (module._parameters.get("weight") is not None or parametrize.is_parametrized(module, "weight"))
    }
    shapes, spared = {name: tuple(_original(module).shape) for name, module in named.items()}, never_pruned(model)
    return {name: module for name, module in named.items() if is_prunable(name, shapes) and name not in spared}


class _Effective(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.function(weight)


@contextmanager
def _effective(model: nn.Module, functions: Mapping[str, Function]) -> Iterator[None]:
    modules = _prunable(model)
    with ExitStack() as stack:
        for name, function in functions.items():
            step, order = _Effective(function), list(modules[name]._parameters)
            # unsafe skips torch's trial call, which would draw from a generator.
            parametrize.register_parametrization(modules[name], "weight", step, unsafe=True)
            stack.callback(_remove, modules[name], step, order)
        yield


def _remove(module: nn.Module, step: nn.Module, order: list[str]) -> None:
    chain = _chain(module)
    if len(chain) > 1:  # torch removes all of them or none
        del chain[list(chain).index(step)]
        return
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for name in order:  # torch puts the weight behind the bias
        module._parameters[name] = module._parameters.pop(name)


def _chain(module: nn.Module) -> parametrize.ParametrizationList:
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)["weight"])


def _top(weight: torch.Tensor, count: int) -> torch.Tensor:
    values = weight.detach()
    # The difference is exactly 0; it carries the gradient.
    return torch.where(_largest(values.abs(), count), values, 0.0) + (weight - values)


def _bernoulli(scores: torch.Tensor, constant: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    theta = torch.sigmoid(scores)
    uniform = torch.rand(theta.shape, generator=generator, dtype=torch.float32, device=generator.device)
    drawn = uniform.to(theta.device) < theta
    return constant * (drawn.to(theta.dtype) + (theta - theta.detach()))


class _Threshold(nn.Module):
    def __init__(self, threshold: torch.Tensor) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        margin = _margin(weight, self.threshold)
        # The difference is exactly 0; it carries the gradient.
        bits = (margin.detach() > 0).to(weight.dtype) + (margin - margin.detach())
        return weight * bits.view(-1, *[1] * (weight.ndim - 1))


def _margin(weight: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return weight.abs().flatten(1).mean(dim=1) - threshold


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    # True at exactly `count` places, ties to the lower flat index. Selection, no sort: this runs in every step.
    flat = values.flatten()
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = torch.topk(flat, count, sorted=False).values.min()
    alive, equal = flat > threshold, flat == threshold
    alive |= equal & (equal.cumsum(0) <= count - alive.sum())
    return alive.view(values.shape)


def _pruning_forward(name: str, module: nn.Module, share: float) -> Function:
    plain = cast(Function, module.forward)

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not (module.training and torch.is_grad_enabled() and _original(module).requires_grad):
            return plain(input)
        size, found = input.numel(), False
        count = _kept(name, share, size)
        if count >= size:
            return plain(input)

        def pack(saved: torch.Tensor) -> torch.Tensor:
            nonlocal found
            # A linear layer may save a view of another shape; a weight, or its transpose, lies elsewhere.
            if saved.data_ptr() != input.data_ptr() or saved.numel() != size:
                return saved
            found = True
            return saved.masked_fill(~_largest(saved.detach().abs(), count), 0)

        with saved_tensors_hooks(pack, lambda packed: packed):
            output = plain(input)
        if not found:
            raise RuntimeError(f"{name}: the layer saved another tensor than its input {tuple(input.shape)}")
        return output

    return forward


def _kept(name: str, share: float, size: int) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"keep of {name} is {share}; it is a fraction in [0, 1]")
    return max(1, keep_count(share, size) if share else 0)


def _check_beta(beta: float, where: str = "") -> None:
    if not 1 <= beta < math.inf:
        raise ValueError(f"beta{where} is {beta}; it is a finite number of at least 1")


def _check_names(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    odd = sorted(set(given) ^ set(wanted))
    if odd:
        raise ValueError(f"{what} names {odd} do not match the prunable tensors")
