"""The one training loop of the project, and the two other things a model is asked for: gradient and metric."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ssfl_app.data.dataset import Samples
from ssfl_app.data.transform import AsTheyAre, Transform
from ssfl_app.installed import needed
from ssfl_app.privacy.record import PrivateSteps
from ssfl_app.sparsity.layout import State
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.anchor import Proximal, Pull
from ssfl_app.training.cuda_graph import GraphedStep
from ssfl_app.training.gpu import EVALUATION_BATCH, wait_for
from ssfl_app.training.private_step import PrivateStep
from ssfl_app.training.reparam import originals
from ssfl_app.training.step import EagerStep, has_plain_forward, set_precision
from ssfl_app.training.step import LocalOptions as LocalOptions
from ssfl_app.training.step import Optimizer as Optimizer
from ssfl_app.training.tasks import Classification, Task

Steps = Literal["plain", "static", "graphs"]


@dataclass(eq=False)
class LocalTrainer:
    """Trains, differentiates and tests models on one client's samples.

    Attributes
    ----------
    device : torch.device
        Where batches live; models passed in must be there already.
    precision : str
        On a GPU: ``"fp32"``; ``"tf32"`` in convolutions and products; or ``"bf16"`` in the training of a model with
        its usual forward pass, and tf32 in all else. On the CPU nothing but fp32.
    steps : str
        ``"plain"``; or, where plain SGD trains a model with its usual forward pass, alone or near an anchor
        (`ssfl_app.training.anchor`), ``"graphs"``: steps that a GPU replays; ``"static"``: the same steps uncaptured,
        for comparison. See `ssfl_app.training.cuda_graph`.
    fewest : int
        Images that a training batch has at least: `ssfl_app.training.models.fewest`.
    kernels : str
        ``"torch"``, or ``"fused"``: of steps that are not plain, those of `ssfl_app.training.fused`.
    passes : int
        Images that went forward and backward so far, in training and for gradients.
    looks : int
        Images that went forward only, in evaluation.
    """

    options: LocalOptions
    transform: Transform | AsTheyAre
    device: torch.device
    precision: str = "fp32"
    steps: Steps = "plain"
    fewest: int = 1
    task: Task = field(default_factory=Classification)
    kernels: str = "torch"
    passes: int = field(default=0, init=False)
    looks: int = field(default=0, init=False)
    _static: GraphedStep | None = field(default=None, init=False)

    def fit(
        self,
        model: nn.Module,
        data: Samples,
        rng: np.random.Generator,
        *,
        lr: float,
        mask: Mask | None = None,
        penalty: Callable[[nn.Module], torch.Tensor] | None = None,
        feature_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        epochs: int | None = None,
        optimizer: Optimizer | None = None,
        private: PrivateSteps | None = None,
        frozen: bool = False,
    ) -> float:
        """Train in place and return the mean loss over all images seen.

        Weights that `mask` holds dead are exactly 0 before and after every step, or `frozen` at what they are when
        this is called: their gradients are zeroed before clipping, so that clipping never sees them.

        Parameters
        ----------
        data : Samples
            n >= `self.fewest` images; anywhere, moved once.
        rng : np.random.Generator
            Order of the images and augmentation.
        penalty : callable, optional
            Added to the loss of every step, e.g. a proximal term.
        feature_loss : callable, optional
            Added likewise, of inputs (batch, ...) and features (batch, n): what goes into the last layer
            (`ssfl_app.training.step.with_features`), e.g. a contrastive term.
        before_step : callable, optional
            Called with the model between backward and step, after mask and clipping: it may change gradients.
        after_step : callable, optional
            Called with the model after every step (and after the mask was applied).
        epochs : int, optional
            Passes over the data; `options.epochs` if not given.
        optimizer : callable, optional
            Makes another one than the SGD of `options`. Parameters that need no gradient are left alone by both.
        private : PrivateSteps, optional
            Train by DP-SGD, in as many steps as this says and not by `epochs`. Then `rng` is a secret one too, and
            the mean loss, which is not private, is NaN if no batch had a sample.
        """
        data = self._here(data)
        model.train()
        hooks: dict[str, Any] = {"penalty": penalty, "feature_loss": feature_loss, "before_step": before_step}
        hooks |= {"after_step": after_step, "optimizer": optimizer}
        step = self._step(model, lr, mask, frozen and mask is not None, private=private, **hooks)
        passes = range(self.options.epochs if epochs is None else epochs)
        in_epochs = (batch for _ in passes for batch in self._epoch(data, rng, step.ahead))
        seen = 0
        for inputs, targets in in_epochs if private is None else self._drawn(data, rng, private):
            step(inputs, targets)
            seen += len(targets)
        # How many were drawn tells of who was, and the server is told of passes: those on average.
        self.passes += seen if private is None else private.sampling.steps * private.sampling.batch
        return step.total() / seen if seen else float("nan")

    def _step(
        self,
        model: nn.Module,
        lr: float,
        mask: Mask | None,
        frozen: bool,
        private: PrivateSteps | None = None,
        **special: Any,
    ) -> EagerStep | GraphedStep:
        if private is not None:
            return PrivateStep(model, self.options, lr, mask, private, frozen=frozen, loss=self.task.loss, **special)
        half = self.precision == "bf16" and self.device.type == "cuda"
        usual = (half or self.steps != "plain") and has_plain_forward(model)
        autocast = half and usual
        usual &= type(self.task) is Classification
        penalty, after = special.get("penalty"), special.get("after_step")
        # A pull moves dead weights too, until the next step masks them: the other step masks them once.
        pull = after if isinstance(after, Pull) and mask is None else None
        anchor = penalty if isinstance(penalty, Proximal) else pull
        usual &= all(value is None or value is anchor for value in special.values())
        if not usual or self.steps == "plain" or frozen:
            special |= {"autocast": autocast, "frozen": frozen, "loss": self.task.loss}
            return EagerStep(model, self.options, lr, mask, **special)
        if self._static is None or not self._static.serves(model):
            self._static = None  # its memory is free before the next one takes some
            capture = self.steps == "graphs"
            fused = (torch.bfloat16 if half else torch.float32) if self.kernels == "fused" else None
            autocast &= fused is None
            self._static = GraphedStep(model, self.options, autocast=autocast, capture=capture, fused=fused)
        return self._static.begin(lr, mask, anchor)

    def _epoch(
        self, data: Samples, rng: np.random.Generator, ahead: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of one pass, at most `ahead` bytes of images prepared at a time, or a batch.

        What an epoch draws is drawn at its start and goes to the device at once, so nothing there waits for it.
        """
        size, count = self.options.batch_size, len(data)
        sizes = batch_sizes(count, size, self.fewest)
        order = rng.permutation(count)[None]
        draws = [self.transform.draw(part, rng) for part in torch.split(data.inputs, sizes)]
        plan = torch.from_numpy(np.concatenate([order, np.concatenate(draws, axis=1)]))
        if self.device.type == "cuda":
            plan = plan.pin_memory().to(self.device, non_blocking=True)
        batches = max(1, ahead // (size * data.inputs[0].numel() * torch.float32.itemsize))
        groups = [sizes[first : first + batches] for first in range(0, len(sizes), batches)]
        for group, part in zip(groups, torch.split(plan, [sum(group) for group in groups], dim=1), strict=True):
            inputs, targets = self.transform.apply(data.inputs[part[0]], part[1:]), data.targets[part[0]]
            yield from zip(torch.split(inputs, group), torch.split(targets, group), strict=True)

    def _drawn(
        self, data: Samples, rng: np.random.Generator, private: PrivateSteps
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches in which each sample is with the same probability, by itself; some may be empty."""
        draw = needed("opacus.utils.uniform_sampler").UniformWithReplacementSampler
        sampling = private.sampling
        if sampling.samples != len(data):
            raise ValueError(f"data has {len(data)} samples; the private steps are for {sampling.samples}")
        for chosen in draw(
            num_samples=len(data), sample_rate=sampling.rate, generator=private.choice, steps=sampling.steps
        ):
            part = torch.tensor(chosen, dtype=torch.int64, device=self.device)
            inputs = data.inputs[part]
            draws = torch.from_numpy(self.transform.draw(inputs, rng)).to(self.device)
            yield self.transform.apply(inputs, draws), data.targets[part]

    def _here(self, data: Samples) -> Samples:
        """Return the images on the device, which from now on computes as `precision` says."""
        if self.device.type == "cuda":
            set_precision(self.precision)
        return data.to(self.device)

    def gradient(self, model: nn.Module, data: Samples, temperature: float = 1.0) -> State:
        """Return dL/dw over `data`, without augmentation, for prunable tensors.

        L is T * (mean loss of z / T), with the output z and the `temperature` T; for T = 1 the usual loss.
        The model is left as it was, buffers included, with no gradients behind.
        """
        data = self._here(data)
        self.passes += len(data)
        weights = originals(model)
        with _preserve_buffers(model):
            loss = self.loss(model, data, temperature)
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            wait_for(self.device)
        return dict(zip(weights, gradients, strict=True))

    def curvature(
        self, model: nn.Module, data: Samples, direction: Mapping[str, torch.Tensor], temperature: float = 1.0
    ) -> State:
        """Return H v: the Hessian of the loss of `gradient` in the prunable tensors, times a direction in them.

        v has a tensor of each prunable tensor's shape by its name, on any device. By double backward, so it counts
        two passes an image. The model is left as `gradient` leaves it.
        """
        data = self._here(data)
        self.passes += 2 * len(data)
        weights = originals(model)
        with _preserve_buffers(model):
            loss = self.loss(model, data, temperature)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
            along = [(g * direction[n].to(g)).sum() for n, g in zip(weights, slopes, strict=True)]
            products = torch.autograd.grad(torch.stack(along).sum(), list(weights.values()), materialize_grads=True)
            wait_for(self.device)
        return dict(zip(weights, products, strict=True))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Samples) -> tuple[float, float]:
        """Return (mean loss, mean headline metric of the task) over n >= 1 samples."""
        data = self._here(data)
        self.looks += len(data)
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        score = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(data), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            output, targets = model(self.transform.test(data.inputs[part])), data.targets[part]
            loss += self.task.total(output, targets)
            score += self.task.score(output, targets)
        wait_for(self.device)
        return float(loss) / len(data), float(score) / len(data)

    def loss(self, model: nn.Module, data: Samples, temperature: float = 1.0) -> torch.Tensor:
        """Return the loss of `gradient`, a scalar, of samples that are on the device."""
        # A temperature of 1 changes no bit.
        return temperature * self.task.loss(model(self.transform.test(data.inputs)) / temperature, data.targets)


def batch_sizes(count: int, size: int, fewest: int = 1) -> list[int]:
    """Return how many images each batch of a pass over `count` has: `size`, and what is left over in the last.

    A last batch of less than `fewest` joins the one before it.

    Examples
    --------
    >>> batch_sizes(71, 14), batch_sizes(71, 14, fewest=2)
    ([14, 14, 14, 14, 14, 1], [14, 14, 14, 14, 15])
    """
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if len(sizes) > 1 and sizes[-1] < fewest:
        sizes[-2:] = [sum(sizes[-2:])]
    return sizes


@contextmanager
def _preserve_buffers(model: nn.Module) -> Iterator[None]:
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
