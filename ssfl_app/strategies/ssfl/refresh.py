"""SSFL's one-shot adaptation to a distribution shift: find the mask once more, at the weights of that moment.

Ohib et al., TMLR 2026, arXiv 2405.09037, section 4.3 and algorithm 2: when clients with new classes appear, the mask
is lifted, saliency is aggregated once more and the mask is replaced. The public code does not have it, so the
following is ours.

*Lifting.* A dead weight is 0, so its saliency |g * 0| is 0 and it could never come back: scores taken at the masked
weights return the same mask for ever. They are taken at ``m * w + (1 - m) * w0`` instead: alive weights as they are,
dead ones at their initial values, which every client makes from the seed. Down go the alive values and the bitmap (a
client that joined late does not hold it), up goes a score a prunable weight.

*Trigger.* "scheduled": before round ssfl.refresh-round. "drift": once the clients that trained for the first time in
the last round had a mean loss above ssfl.refresh-drift times the mean loss of the five rounds before. Once a run.

*Afterwards* weights that come back start at w0 (ssfl.refresh-weights "initial") or 0 ("zero"); "restart" puts all
weights back to w0, which is training from scratch under the new mask, the control.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.core.algorithm import ClientAlgorithm, Need, Payload
from ssfl_app.core.validation import stored
from ssfl_app.sparsity.codec import MaskedValues, read_mask
from ssfl_app.sparsity.layout import State, state_digest
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays
from ssfl_app.strategies.shared.scoring import SsflOptions

HISTORY = 5
"""Rounds whose mean loss newcomers are compared with."""


class MaskRefresh:
    """Decides when the mask of a run is refreshed, and from which weights it goes on; once."""

    def __init__(self, options: SsflOptions, clients: int) -> None:
        self.options, self.done = options, False
        self._trained = np.zeros(clients, dtype=np.uint8)
        self._history: list[float] = []

    def due(self, round_: int, losses: Mapping[int, float]) -> bool:
        """Return whether the mask is refreshed before this round; `losses` are those of the round before."""
        if self.done or self.options.refresh in ("never", "continuous"):
            return False
        if self.options.refresh == "scheduled":
            return round_ == self.options.refresh_round
        new = [loss for client, loss in losses.items() if not self._trained[client]]
        before = self._history
        self._trained[list(losses)] = 1
        if losses:
            self._history = [*before, math.fsum(losses.values()) / len(losses)][-HISTORY:]
        if round_ < self.options.refresh_round or not new or len(before) < HISTORY:
            return False
        return math.fsum(new) / len(new) > self.options.refresh_drift * math.fsum(before) / len(before)

    def query(self, mask: Mask, trained: State, initial: State) -> tuple[State, Payload]:
        """Return the lifted weights, and what goes down so that a client can make them."""
        lifted = reveal_dead_weights(mask, trained, initial)
        arrays = {"alive": MaskedValues().encode(mask.layout, trained, mask)["values"], "held": mask.packed()}
        return lifted, Payload(arrays, {"weights": state_digest(mask.layout, lifted)})

    def start(self, trained: State, lifted: State, initial: State) -> State:
        """Return the weights to go on from, before the new mask is applied; the refresh is done."""
        self.done = True
        return {"initial": lifted, "zero": trained, "restart": initial}[self.options.refresh_weights]

    def state_dict(self) -> Arrays:
        """Return what `load_state_dict` needs."""
        return {
            "refresh/done": np.array([self.done], dtype=np.uint8),
            "refresh/trained": self._trained,
            # As raw bytes: the checkpoint's float32 would round them, and the trigger compares.
            "refresh/history": np.frombuffer(np.array(self._history, dtype="<f8").tobytes(), dtype=np.uint8),
        }

    def load_state_dict(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot."""
        self.done = bool(stored(arrays, "refresh/done", "uint8", 1)[0])
        self._trained = stored(arrays, "refresh/trained", "uint8", self._trained.size).copy()
        self._history = np.frombuffer(np.asarray(arrays["refresh/history"]).tobytes(), dtype="<f8").tolist()


def reveal_dead_weights(mask: Mask, trained: State, initial: State) -> State:
    """Return ``m * w + (1 - m) * w0``: dead weights at their initial values."""
    bits = mask.tensors()
    return {
        n: torch.where(bits[n], t.cpu(), initial[n].cpu()) if n in bits else t.clone() for n, t in trained.items()
    }


def lifted_weights(rule: ClientAlgorithm, payload: Payload) -> State:
    """Return the weights a refresh is about, made from what came down and the seed's initial weights.

    Raises
    ------
    Need, PayloadError
        This machine makes other initial weights than the server did; what came down is malformed.
    """
    layout = rule.context.layout
    held = read_mask({"mask": payload.arrays["held"]}, layout)
    trained, _ = MaskedValues().decode({"values": payload.arrays["alive"]}, layout, held)
    lifted = reveal_dead_weights(held, trained, rule.context.initial_state())
    if state_digest(layout, lifted) != payload.metadata.get("weights"):
        raise Need("weights")
    return lifted
