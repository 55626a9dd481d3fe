"""Tasks: what a model is trained for. A task is a loss, a headline metric, and what its targets are.

Examples
--------
A task of your own, for targets (batch, 3) of which each is 0 or 1:

>>> class Tags(Task):
...     numbers = True
...     def loss(self, output, target):
...         return F.binary_cross_entropy_with_logits(output, target)
...     def score(self, output, target):
...         return ((output > 0) == target.bool()).float().mean(dim=1).sum()
>>> Tags().metric.name
'accuracy'
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError, Scalar, free
from ssfl_app.registry import Registry


class Task:
    """What a model is trained for.

    Attributes
    ----------
    metric : Metric
        The headline, which `score` computes.
    classes : bool
        Whether the target of a sample is its class, (batch,) int64: minibatches can then be balanced, and clients
        dealt their classes. Otherwise all samples count as of one kind.
    numbers : bool
        Whether targets are float32, (batch, k); data that have whole numbers give them so too.
    """

    metric: ClassVar[Metric] = ACCURACY
    classes: ClassVar[bool] = False
    numbers: ClassVar[bool] = False

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch, a scalar."""
        raise NotImplementedError

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of the headline metric over the samples of a batch, a scalar."""
        raise NotImplementedError

    def total(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of the loss over the samples of a batch, for evaluation."""
        return self.loss(output, target) * len(target)


class Classification(Task):
    """Cross-entropy of logits (batch, classes) and the share of right answers."""

    classes = True

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(output, target)

    def total(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of the cross-entropies."""
        return F.cross_entropy(output, target, reduction="sum")

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return how many answers are right."""
        return (output.argmax(dim=1) == target).sum()


class Regression(Task):
    """Squared error of values (batch, k); the headline is the mean absolute error, in units of the target."""

    metric = Metric("mean absolute error", share=False, higher=False)
    numbers = True

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error."""
        return F.mse_loss(output.reshape(target.shape), target)

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of the absolute errors, each the mean over the values of a target."""
        return (output.reshape(target.shape) - target).abs().flatten(1).mean(dim=1).sum()


class NextToken(Task):
    """Cross-entropy of logits (batch, length, vocabulary) with the tokens that follow (batch, length)."""

    metric = Metric("next-token accuracy")

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of all tokens."""
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum over sequences of the share of tokens that are right."""
        return (output.argmax(dim=-1) == target).double().mean(dim=1).sum()


class Segmentation(Task):
    """Cross-entropy of logits (batch, classes, *size) with the class of each pixel or voxel (batch, *size).

    The headline is the Dice coefficient of a sample, the mean over the classes but the first, the background, that
    are in its target or in the prediction; 1 if none is.
    """

    metric = Metric("Dice")

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of all pixels."""
        return F.cross_entropy(output, target)

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of the Dice coefficients."""
        classes = output.shape[1]
        said, true = (F.one_hot(x.flatten(1), classes)[..., 1:].double() for x in (output.argmax(dim=1), target))
        sizes = said.sum(dim=1) + true.sum(dim=1)
        there = sizes > 0
        dice = torch.where(there, 2 * (said * true).sum(dim=1) / sizes.clamp(min=1), 0)
        return torch.where(there.any(dim=1), dice.sum(dim=1) / there.sum(dim=1).clamp(min=1), 1).sum()


REGISTRY: Registry[type[Task]] = Registry(
    "ssfl.tasks",
    {
        "classification": Classification,
        "regression": Regression,
        "next-token": NextToken,
        "segmentation": Segmentation,
    },
    "a subclass of ssfl_app.Task, with a Metric for its metric",
    lambda found: isinstance(found, type) and issubclass(found, Task) and isinstance(found.metric, Metric),
)
AUTO = "auto"


@dataclass(frozen=True)
class TaskOptions:
    """Keys of the section ``task``."""

    name: str = REGISTRY.field(AUTO, "what a model is trained for; auto: what the data are for", AUTO)
    options: Mapping[str, Scalar] = free("arguments of a task of your own")


def make_task(options: TaskOptions, usual: str = "classification") -> Task:
    """Return the task that is asked for; with "auto" the one that the data are for, `usual`.

    Raises
    ------
    ConfigError
        The task does not take these options.
    """
    name = usual if options.name == AUTO else options.name
    arguments = {key.replace("-", "_"): value for key, value in options.options.items()}
    try:
        return REGISTRY[name](**arguments)
    except TypeError as error:
        raise ConfigError(f"task.name is {options.name!r}; called with {arguments} it says {error}") from error
