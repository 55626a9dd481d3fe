"""LotteryFL: every client looks for its own winning ticket, a subnetwork that learns well from the initial weights.

Li, Sun, Wang, Duan, Li, Chen and Li, "LotteryFL: Empower edge intelligence with personalized and
communication-efficient federated learning", SEC 2021, algorithm 1. Client k's mask m_k starts dense. A sampled client

1. gets ``m_k * w``. If that is right on more than lotteryfl.accuracy of its training images and m_k is above
   mask.density, the share lotteryfl.step of smallest alive magnitudes dies in each layer, and all that is left,
   biases and norms too, goes back to the initial weights;
2. trains inside m_k and sends the weights with the bitmap of m_k.

The server takes each coordinate's mean over the clients that sent it, the old value where there are none. Client k is
tested with ``m_k * w``; the density is an outcome.

With A alive of P prunable coordinates and R others, per client and round, fp32: down and evaluation ``4 (A + R)``
bytes, up ``4 (A + R) + ceil(P / 8)`` with the A after pruning. No mask goes down.

Departures: the public code measures step 1's accuracy on two batches of the client's test images; here it is all of
its training images. It prunes by percentile; shares are rounded down here. Its mean is unweighted (run.weighting
"uniform"). Clients make the initial weights from the seed; one whose torch makes other ones fails, by name, where it
would need them. What is less than one weight a layer above mask.density stays, and nobody rewinds for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssfl_app.core.algorithm import Payload, Query
from ssfl_app.core.options import FromSettings, Section, at_least, fraction
from ssfl_app.core.validation import stored
from ssfl_app.sparsity.layout import State, load_state, state_digest
from ssfl_app.sparsity.values import Arrays, PayloadError
from ssfl_app.strategies.shared.iterative_pruning import IterativePruning, IterativePruningClient


@dataclass(frozen=True)
class LotteryFlOptions(Section):
    """Keys of the section ``lotteryfl``."""

    section = "lotteryfl"

    step: float = fraction(0.2, "share of its alive weights that each layer loses at a time")
    accuracy: float = at_least(0, 0.2, "what came down must be right on more than this share of the training images")


class LotteryFlClient(IterativePruningClient):
    """Prunes before training, and then starts from the initial weights."""

    options = FromSettings(LotteryFlOptions)

    def train(self, payload: Payload) -> Payload:
        """Prune and rewind if the model is good enough, train, and return the weights under the mask."""
        mask = self.load(payload)
        smaller = self.pruned(mask, self.options.step)
        if smaller.count < mask.count and self.training_accuracy() > self.options.accuracy:
            mask = smaller
            load_state(self.context.model, mask.apply(self._initial(payload)))
        return self.answer(payload, mask, self.fit(payload.round, mask))

    def _initial(self, payload: Payload) -> State:
        state = self.context.initial_state()
        digest = state_digest(self.context.layout, state)
        if digest != payload.metadata["weights"]:
            wanted = str(payload.metadata["weights"])
            raise PayloadError(f"the seed's weights are {digest[:16]} here; they must be {wanted[:16]}")
        return state


class LotteryFl(IterativePruning):
    """States the digest of the initial weights in every message."""

    name = "lotteryfl"
    client = LotteryFlClient
    _weights = ""

    def before_training(self, ask: Query) -> None:
        """Note what the initial weights are."""
        self._weights = state_digest(self.layout, self.state)

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return the client's own part of the global model."""
        return Payload(super().train_payload(round_, client).arrays, {"weights": self._weights})

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the digest too."""
        return super().state_dict() | {"weights": np.frombuffer(bytes.fromhex(self._weights), dtype=np.uint8)}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self._weights = stored(arrays, "weights", "uint8", 32).tobytes().hex()  # a SHA-256
