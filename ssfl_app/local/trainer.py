"""The one training loop of the project, and the two other things a model is asked for: gradient and accuracy."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ssfl_app.local.data import Images, Transform
from ssfl_app.local.reparam import originals
from ssfl_app.options import above, at_least, fraction
from ssfl_app.sparsity.layout import State
from ssfl_app.sparsity.mask import Mask

EVALUATION_BATCH = 500
"""Images of a forward pass without gradients; fixed, so that it never changes the bits of a loss."""


@dataclass(frozen=True)
class LocalOptions:
    """Keys of the room ``local``: plain SGD on a client."""

    epochs: int = at_least(1)
    batch_size: int = at_least(1)
    lr: float = above(0)
    lr_decay: float = fraction()
    momentum: float = at_least(0)
    weight_decay: float = at_least(0)
    clip: float = at_least(0)

    def rate(self, round_: int) -> float:
        """Return the learning rate of a 1-based round: lr * lr_decay ** (round - 1)."""
        return self.lr * self.lr_decay ** (round_ - 1)


Optimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
"""Makes an optimizer of the parameters that train and the learning rate."""


class LocalTrainer:
    """Trains, differentiates and tests models on one client's images.

    Parameters
    ----------
    options : LocalOptions
        The recipe.
    transform : Transform
        Augmentation and normalisation.
    device : torch.device
        Where models and batches live; models passed in must be there already.

    Attributes
    ----------
    passes : int
        Images that went forward and backward so far, in training and for gradients.
    looks : int
        Images that went forward only, in evaluation.
    """

    def __init__(self, options: LocalOptions, transform: Transform, device: torch.device) -> None:
        self.options = options
        self.transform = transform
        self.device = device
        self.passes = 0
        self.looks = 0

    def fit(
        self,
        model: nn.Module,
        data: Images,
        rng: np.random.Generator,
        *,
        lr: float,
        mask: Mask | None = None,
        penalty: Callable[[nn.Module], torch.Tensor] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        epochs: int | None = None,
        optimizer: Optimizer | None = None,
    ) -> float:
        """Train in place and return the mean loss over all images seen.

        Weights that `mask` holds dead are exactly 0 before and after every step: their gradients are
        zeroed before clipping, so clipping, momentum and weight decay never see them either.

        Parameters
        ----------
        model : nn.Module
            On `self.device`.
        data : Images
            n >= 1 images; anywhere, moved once.
        rng : np.random.Generator
            Order of the images and augmentation.
        lr : float
            Learning rate of this call.
        mask : Mask, optional
            None trains all weights.
        penalty : callable, optional
            Added to the loss of every step, e.g. a proximal term.
        after_step : callable, optional
            Called with the model after every step (and after the mask was applied).
        epochs : int, optional
            Passes over the data; `options.epochs` if not given.
        optimizer : callable, optional
            Makes another one than the SGD of `options`. Parameters that need no gradient are left alone by both.
        """
        data = data.to(self.device)
        model.train()
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        keep = {} if mask is None else {n: bits.float() for n, bits in mask.tensors(self.device).items()}
        weights = originals(model)
        masked, bits = [weights[n] for n in keep], list(keep.values())
        stepper = (optimizer or self._sgd)(named.values(), lr)
        _apply(masked, bits)
        # Summed on the device: reading the loss of every step would stall a GPU.
        total, seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for _ in range(self.options.epochs if epochs is None else epochs):
            order = torch.from_numpy(rng.permutation(len(data))).to(self.device)
            for chosen in torch.split(order, self.options.batch_size):
                stepper.zero_grad()
                loss = self._loss(model, self.transform.train(data.pixels[chosen], rng), data.labels[chosen])
                (loss if penalty is None else loss + penalty(model)).backward()  # type: ignore[no-untyped-call]
                _apply([p.grad for p in masked if p.grad is not None], bits)
                if self.options.clip:
                    nn.utils.clip_grad_norm_(named.values(), self.options.clip)
                stepper.step()
                _apply(masked, bits)
                if after_step is not None:
                    after_step(model)
                total += loss.detach() * len(chosen)
                seen += len(chosen)
        self.passes += seen
        return float(total) / seen

    def gradient(self, model: nn.Module, data: Images, temperature: float = 1.0) -> State:
        """Return dL/dw over `data`, without augmentation, for prunable tensors.

        L is T * (mean cross-entropy of z / T), with the logits z and the `temperature` T; for T = 1 the usual loss.
        The model is left as it was, buffers included, with no gradients behind.
        """
        data = data.to(self.device)
        self.passes += len(data)
        weights = originals(model)
        with _left_alone(model):
            loss = self._loss(model, self.transform.test(data.pixels), data.labels, temperature)
            gradients = torch.autograd.grad(loss, list(weights.values()))
        return dict(zip(weights, gradients, strict=True))

    def curvature(
        self, model: nn.Module, data: Images, direction: Mapping[str, torch.Tensor], temperature: float = 1.0
    ) -> State:
        """Return H v: the Hessian of the loss of `gradient` in the prunable tensors, times a direction in them.

        By double backward, so it counts two passes an image. The model is left as `gradient` leaves it.

        Parameters
        ----------
        direction : mapping
            v, a tensor of each prunable tensor's shape by its name; on any device.
        """
        data = data.to(self.device)
        self.passes += 2 * len(data)
        weights = originals(model)
        with _left_alone(model):
            loss = self._loss(model, self.transform.test(data.pixels), data.labels, temperature)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            along = [(g * direction[n].to(g)).sum() for n, g in zip(weights, slopes, strict=True)]
            products = torch.autograd.grad(torch.stack(along).sum(), list(weights.values()), materialize_grads=True)
        return dict(zip(weights, products, strict=True))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Images) -> tuple[float, float]:
        """Return (mean loss, accuracy in [0, 1]) over n >= 1 images."""
        data = data.to(self.device)
        self.looks += len(data)
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(data), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            logits = model(self.transform.test(data.pixels[part]))
            loss += F.cross_entropy(logits, data.labels[part], reduction="sum")
            correct += (logits.argmax(dim=1) == data.labels[part]).sum()
        return float(loss) / len(data), int(correct) / len(data)

    def _sgd(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.SGD(parameters, lr, options.momentum, weight_decay=options.weight_decay, foreach=True)

    @staticmethod
    def _loss(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        logits = model(inputs)
        if temperature == 1:
            return F.cross_entropy(logits, labels)
        return temperature * F.cross_entropy(logits / temperature, labels)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """In training mode inside; mode and buffers as before afterwards."""
    training, buffers = model.training, {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.train(training)


@torch.no_grad()
def _apply(tensors: Sequence[torch.Tensor], bits: list[torch.Tensor]) -> None:
    if bits:
        torch._foreach_mul_(list(tensors), bits)
