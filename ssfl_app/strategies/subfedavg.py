"""Sub-FedAvg (Un): every client prunes the global model to a subnetwork of its own, a little in each round.

Vahidian, Morafah and Lin, "Personalized federated learning by structured and unstructured pruning under data
heterogeneity", ICDCS Workshops 2021, algorithm 1. Client k's mask m_k starts dense. A sampled client

1. trains ``m_k * w`` inside m_k; the share subfedavg.step of smallest alive magnitudes in each layer leaves a
   candidate mask, m' after the first epoch and m'' after the last;
2. adopts m'' if the two differ by more than subfedavg.distance (the mean over layers of the share of weights in which
   they differ), if m_k is still above mask.density, and if the model pruned to m'' is right on more than
   subfedavg.accuracy of its training images;
3. sends its weights under the mask that it has now, with its bitmap.

The server takes each coordinate's mean over the clients whose weights carry it, the old value where there are none.
Client k is tested with ``m_k * w``; the density is an outcome. With local.epochs 1, m' is m'' and nothing is pruned.

With A alive of P prunable coordinates and R others, per client and round, fp32: down and evaluation ``4 (A + R)``
bytes, up ``4 (A + R) + ceil(P / 8)`` with the A after pruning. No mask goes down.

Departures: the public code of the authors measures step 2's accuracy on the client's test images; here it is the
training images, as in the public code of DisPFL, whose step is the default (0.05; the authors' is 0.1). That code
prunes the weight of one kind of norm by mistake: here conv and linear weights only. It divides by the masks before
pruning, which shrinks what was just pruned by some: here by those that the weights carry. The published mean is
unweighted (run.weighting "uniform"). Shares are rounded down where the public codes take a percentile, and what is
less than one weight a layer above mask.density stays. The authors' last step is at most 5 %, here at most
subfedavg.step; their m'' is that after epoch 5.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from ssfl_app.core.algorithm import Payload
from ssfl_app.core.options import FromSettings, Section, at_least, fraction
from ssfl_app.sparsity.layout import load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.shared.iterative_pruning import IterativePruning, IterativePruningClient


@dataclass(frozen=True)
class SubFedAvgOptions(Section):
    """Keys of the section ``subfedavg``."""

    section = "subfedavg"

    step: float = fraction(0.05, "share of its alive weights that each layer loses at a time")
    distance: float = at_least(
        0, 1e-4, "masks after the first and the last epoch must differ by more; none do with local.epochs 1"
    )
    accuracy: float = at_least(
        0, 0.5, "the pruned model must be right on more than this share of the training images"
    )


class SubFedAvgClient(IterativePruningClient):
    """Prunes after training."""

    options = FromSettings(SubFedAvgOptions)

    def train(self, payload: Payload) -> Payload:
        """Train, and return the weights under the old mask or a smaller one."""
        mask, step = self.load(payload), self.options.step
        left, early = math.ceil(len(self.context.train) / self.settings.local.batch_size), mask

        def look(model: nn.Module) -> None:
            nonlocal left, early
            left -= 1
            if left == 0:
                early = self.pruned(mask, step)

        loss = self.fit(payload.round, mask, after_step=look)
        late = self.pruned(mask, step)
        return self.answer(payload, late if self._adopts(early, late) else mask, loss)

    def _adopts(self, early: Mask, late: Mask) -> bool:
        """Return whether the mask of the last epoch becomes the client's; the workbench is left as it was."""
        if mean_distance(early, late) <= self.options.distance:
            return False
        model = self.context.model
        trained = {name: tensor.clone() for name, tensor in state_of(model).items()}
        load_state(model, late.apply(trained))
        accuracy = self.training_accuracy()
        load_state(model, trained)
        return accuracy > self.options.accuracy


def mean_distance(one: Mask, other: Mask) -> float:
    """Return the mean over layers of the share of weights in which two masks differ."""
    spans = one.layout.prunable_spans.values()
    return float(np.mean([np.mean(one.alive[span] != other.alive[span]) for span in spans]))


class SubFedAvg(IterativePruning):
    """The server side is that of iterative pruning."""

    name = "subfedavg"
    client = SubFedAvgClient
