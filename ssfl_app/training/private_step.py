"""A step of DP-SGD (privacy.level "record"): each sample's gradient is masked and clipped, their sum gets noise.

Opacus clips, sums, adds noise and divides. The gradients of single samples are `torch.func`'s: Opacus' hooks refuse
the in-place additions of ResNets, and would have to be taken off a model that others use next.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from ssfl_app.installed import needed
from ssfl_app.options import ConfigError
from ssfl_app.privacy.record import PrivateSteps
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.step import EagerStep, LocalOptions, mask_gradients

MOST_VALUES = 2**28
"""Of gradients of single samples at a time, 1 GiB; a larger batch is summed in parts."""


class PrivateStep(EagerStep):
    """Forward, and for each sample backward, mask and clip; sum, noise, mask, SGD, mask.

    Masked before they are clipped, so that neither a sample's length nor the noise has anything of dead weights.
    `private.clip` stands in the place of ``local.clip``. Momentum, weight decay, a penalty, and what is called
    around the step see private gradients only, so they cost nothing.

    Raises
    ------
    ValueError
        There is a loss of the features: it is no sum over samples of what one sample alone makes.
    """

    def __init__(
        self,
        model: nn.Module,
        options: LocalOptions,
        lr: float,
        mask: Mask | None,
        private: PrivateSteps,
        **special: Any,
    ) -> None:
        if special.get("feature_loss") is not None:
            raise ValueError("feature_loss is given; a private step takes none")
        super().__init__(model, options, lr, mask, **special)
        self._names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        bits = {id(weight): bits for weight, bits in zip(self._masked, self._bits, strict=True)}
        self._alive = {n: bits[id(w)] for n, w in zip(self._names, self._trained, strict=True) if id(w) in bits}
        self._most = max(1, MOST_VALUES // max(1, sum(weight.numel() for weight in self._trained)))
        self._private = needed("opacus.optimizers").DPOptimizer(
            self._stepper,
            noise_multiplier=private.noise_multiplier,
            max_grad_norm=private.clip,
            expected_batch_size=private.sampling.batch,
            generator=private.noise,
            secure_mode=True,  # four draws a coordinate, so that the bits of a float do not tell the sum below
        )
        self._of_samples = vmap(grad_and_value(self._of_one), in_dims=(None, 0, 0), randomness="different")

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Change the model by a batch, (B, ...), with its targets, (B, ...); B may be 0."""
        self._private.zero_grad()
        for first in range(0, max(1, len(targets)), self._most):
            self._add(inputs[first : first + self._most], targets[first : first + self._most])
        self._private.add_noise()
        self._private.scale_grad()
        if self._penalty is not None:
            self._penalty(self._model).backward()  # type: ignore[no-untyped-call]
        mask_gradients(self._masked, self._bits)
        if self._before_step is not None:
            self._before_step(self._model)
        self._stepper.step()
        self._hold()
        self._private.zero_grad(set_to_none=True)  # a gradient a sample is many times the model
        if self._after_step is not None:
            self._after_step(self._model)

    def _add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the clipped gradients of these samples to the sum."""
        weights = {n: w.detach() for n, w in zip(self._names, self._trained, strict=True)}
        if len(targets):
            gradients, losses = self._of_samples(weights, inputs, targets)
            self._total += losses.double().sum()
        else:  # there is noise all the same
            gradients = {name: weight.new_zeros(0, *weight.shape) for name, weight in weights.items()}
        for name, weight in zip(self._names, self._trained, strict=True):
            # One sample whose loss is no number would make the sum none: that would tell of it. It counts as 0.
            gradient = gradients[name].nan_to_num_(0.0, 0.0, 0.0)
            weight.grad_sample = gradient.mul_(self._alive[name]) if name in self._alive else gradient  # type: ignore[attr-defined]
        self._private.clip_and_accumulate()

    def _of_one(self, weights: dict[str, torch.Tensor], sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of one sample."""
        return self._loss(functional_call(self._model, weights, (sample[None],)), target[None])


def check_private(model: nn.Module, name: str, norm: str, builtin: bool) -> None:
    """Raise ConfigError unless each sample has a gradient of its own in a model; `name` and `norm` are its keys.

    What mixes the samples of a batch, BatchNorm above all, is refused, and whatever else Opacus refuses.
    """
    model.train()
    faults = needed("opacus.validators").ModuleValidator.validate(model, strict=False)
    if not faults:
        return
    if builtin:
        raise ConfigError(f"model.norm is {norm!r}; it is 'group' or 'none' with privacy.level 'record'")
    reason = str(faults[0]).partition(". ")[0].partition("\n")[0]
    raise ConfigError(f"model.name is {name!r}; with privacy.level 'record' Opacus refuses it: {reason}")
