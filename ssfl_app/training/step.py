"""One step of the training loop: what `LocalTrainer.fit` does with a batch, the plain way.

`ssfl_app.training.cuda_graph` has the fast way, which a GPU plays without Python;
``tests/training/test_cuda_graph.py`` holds the two together bit for bit. The loop that calls them is one.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ssfl_app.options import above, at_least, fraction
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.gpu import wait_for
from ssfl_app.training.reparam import originals

PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class LocalOptions:
    """Keys of the section ``local``: plain SGD on a client."""

    epochs: int = at_least(1, 5, "passes over a client's data in a round")
    batch_size: int = at_least(1, 16, "samples of a training step")
    lr: float = above(0, 0.1, "learning rate of round 1")
    lr_decay: float = fraction(0.998, "lr of round r is lr * lr-decay ** (r - 1)")
    momentum: float = at_least(0, 0.0, "of SGD")
    weight_decay: float = at_least(0, 5e-4, "of SGD")
    clip: float = at_least(0, 10.0, "largest norm of the gradient; 0: no clipping")

    def rate(self, round_: int) -> float:
        """Return the learning rate of a 1-based round: lr * lr_decay ** (round - 1)."""
        return self.lr * self.lr_decay ** (round_ - 1)


Optimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
"""Makes an optimizer of the parameters that train and the learning rate."""


class EagerStep:
    """Forward, backward, mask, clip, SGD, mask: as it is read in a textbook, of a model in training mode.

    `loss` is the task's, a mean; `autocast` computes in bfloat16 what can be; the others are those of
    `LocalTrainer.fit`, with `frozen` only if there is a mask.

    Attributes
    ----------
    ahead : int
        Bytes of float32 images that the loop may prepare at a time; never less than a batch.
    """

    ahead = 0

    def __init__(
        self,
        model: nn.Module,
        options: LocalOptions,
        lr: float,
        mask: Mask | None,
        *,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        autocast: bool = False,
        frozen: bool = False,
        penalty: Callable[[nn.Module], torch.Tensor] | None = None,
        feature_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._model, self._loss, self._clip, self._autocast = model, loss, options.clip, autocast
        self._penalty, self._feature_loss = penalty, feature_loss
        self._before_step, self._after_step = before_step, after_step
        device = next(model.parameters()).device
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        keep = {} if mask is None else {n: bits.float() for n, bits in mask.tensors(device).items()}
        weights = originals(model)
        self._masked, self._bits = [weights[n] for n in keep], list(keep.values())
        self._kept = [weight.detach().clone() for weight in self._masked] if frozen else []
        self._stepper = (
            torch.optim.SGD(self._trained, lr, options.momentum, weight_decay=options.weight_decay, foreach=True)
            if optimizer is None
            else optimizer(self._trained, lr)
        )
        # Summed on the device: reading the loss of every step would stall a GPU.
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """Put dead weights back to what they are."""
        if not self._kept:
            times(self._masked, self._bits)
        # Chosen, not added: w0 + 0 * w is no number where w is none, and 0 where w0 is -0.0.
        for weight, bits, kept in zip(self._masked, self._bits, self._kept, strict=False):
            torch.where(bits > 0, weight, kept, out=weight.detach())

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Change the model by a batch, (B, ...), with its targets, (B, ...)."""
        self._stepper.zero_grad()
        with bfloat16(self._autocast):
            if self._feature_loss is None:
                whole = loss = self._loss(self._model(inputs), targets)
            else:
                output, features = with_features(self._model, inputs)
                loss = self._loss(output, targets)
                whole = loss + self._feature_loss(inputs, features)
        if self._penalty is not None:
            whole = whole + self._penalty(self._model)
        whole.backward()  # type: ignore[no-untyped-call]
        mask_gradients(self._masked, self._bits)
        if self._clip:
            nn.utils.clip_grad_norm_(self._trained, self._clip)
        if self._before_step is not None:
            self._before_step(self._model)
        self._stepper.step()
        self._hold()
        if self._after_step is not None:
            self._after_step(self._model)
        self._total += loss.detach() * len(targets)

    def total(self) -> float:
        """Return the sum of the losses of all images so far."""
        wait_for(self._total.device)
        return float(self._total)


def with_features(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a model's output and its features of each input: what its last layer gets, flat, (batch, n).

    The last layer is the last one, in the order in which they were defined, that has a matrix of weights.

    Raises
    ------
    ValueError
        There is none, or the model computes without calling it.
    """
    layers = [m for m in model.modules() if any(p is not None and p.ndim > 1 for p in m._parameters.values())]
    seen: list[torch.Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0])) if layers else None
    try:
        output = model(inputs)
    finally:
        if hook is not None:
            hook.remove()
    if not seen:
        raise ValueError("the model has no features: it calls no layer with a matrix of weights at its end")
    return output, seen[-1].flatten(1)


@torch.no_grad()
def times(tensors: Sequence[torch.Tensor], bits: Sequence[torch.Tensor]) -> None:
    """Multiply tensors by masks of 0 and 1 in place."""
    if bits:
        torch._foreach_mul_(list(tensors), list(bits))


def mask_gradients(weights: Sequence[torch.Tensor], bits: Sequence[torch.Tensor]) -> None:
    """Multiply the gradients of weights by masks; one that the loss does not see, or that is frozen, has none."""
    there = [(w.grad, mask) for w, mask in zip(weights, bits, strict=True) if w.grad is not None]
    times([grad for grad, _ in there], [mask for _, mask in there])


def bfloat16(wanted: bool) -> AbstractContextManager[object]:
    """Return a context in which a GPU computes in bfloat16 what can be; weights stay float32."""
    # Each weight is cast once a step anyway, and a cast that is kept would outlive a captured graph.
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if wanted else nullcontext()


def set_precision(precision: str) -> None:
    """Set how this process's GPU multiplies float32: "fp32" as IEEE has it, else TF32; and the same bits each time.

    Torch allows TF32 in convolutions unless told otherwise, and algorithms of cuDNN whose sums have no order.
    """
    # The older of torch's two ways: it sets what the newer one reads, and not the other way round.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def has_plain_forward(model: nn.Module) -> bool:
    """Return whether a model computes as its class says, with all parameters training.

    Inside the contexts of `ssfl_app.training.reparam`, and under hooks of anyone, it does not.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        changed = "forward" in vars(module) or parametrize.is_parametrized(module)
        if changed or any(getattr(module, name) for name in hooks):
            return False
    return all(p.requires_grad and not p._backward_hooks for p in model.parameters())
