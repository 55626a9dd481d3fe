"""FedPM: nobody trains a weight; clients train which of the fixed random weights take part.

Isik, Pase, Gunduz, Weissman and Zorzi, "Sparse random networks for communication-efficient federated learning",
ICLR 2023. Every prunable weight is a constant ``c * sign(u)``, u the run's initial weight and
``c = e * sqrt(1 / fan_in)`` of its layer. A probability theta says how often it takes part. In a round

1. theta goes down; a client starts its scores at ``s = logit(theta)`` and trains them, each forward pass with a mask
   drawn from Bernoulli(sigmoid(s)) and the gradient straight through the draw;
2. it sends one mask drawn from Bernoulli(sigmoid(s)): one bit a weight;
3. the server counts in a Beta posterior that starts at (1, 1), ``alpha += n_k m_k`` and ``beta += n_k (1 - m_k)``,
   and takes its mode: ``theta = (alpha - 1) / (alpha + beta - 2)``, the mean of the masks since the last reset.

Tested is one network: one mask drawn from theta (the published way), or theta > 0.5; all clients get the same bits.

Bytes a client, P prunable weights: 4 P down and ceil(P / 8) up in a round, ceil(P / 8) in an evaluation.

Departures: biases are frozen at 0 and norms at 1 and 0, and neither is masked (published: no norm, and biases are
constants and masked too), so BatchNorm is refused: one bit a weight carries no statistics. Signs are those of the
run's initial weights. A mask counts n_k times, or once with run.weighting "uniform" as published. theta is clamped to
0.01..0.99 where a client takes its logit; the public code clamps the bits that come up instead, and scales the
gradient of a draw by theta. Adam starts anew in each round (there: once a client); local.clip bounds its gradient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ssfl_app.core.aggregation import Aggregator
from ssfl_app.core.algorithm import (
    ClientAlgorithm,
    Metadata,
    Payload,
    Query,
    Reply,
    ServerContext,
    SparseStrategy,
    shared_buffers,
)
from ssfl_app.core.options import ConfigError, FromSettings, Section, above, at_least, choice
from ssfl_app.core.strategy import density_pair
from ssfl_app.core.validation import stored
from ssfl_app.seeding import generator, torch_generator
from ssfl_app.sparsity.codec import BitmapOnly, LinearCodec, read_mask
from ssfl_app.sparsity.layout import Bits, Layout, State, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import Arrays, PayloadError
from ssfl_app.training.reparam import bernoulli_weights

CLAMP = 0.01
"""theta stays this far from 0 and 1 in a client's scores: their logits have no end."""


@dataclass(frozen=True)
class FedPmOptions(Section):
    """Keys of the section ``fedpm``."""

    section = "fedpm"

    lr: float = above(0, 0.1, "of Adam, in every round")
    reset: int = at_least(0, 1, "rounds after which the server's posterior starts anew; 0: never")
    evaluate: str = choice("sample", "threshold", about="tested is one mask drawn from theta, or theta > 0.5")


class Prunable(LinearCodec):
    """The prunable coordinates; both ends know the others, which read 0."""

    name = "prunable"

    def positions(self, layout: Layout, mask: Mask) -> Bits:
        """Return the prunable coordinates."""
        return layout.is_prunable


def signs(layout: Layout, initial: State) -> Mask:
    """Return where the constants are positive."""
    return Mask(layout, layout.flatten_prunable(initial) > 0)


def constants(layout: Layout, positive: Mask) -> State:
    """Return the network before it is masked: +-c at each prunable weight, biases at 0, norm weights at 1."""
    bits, state = positive.tensors(), State()
    for name, shape in layout.shapes:
        if name in bits:
            size = math.e * math.sqrt(1 / math.prod(shape[1:]))
            state[name] = torch.where(bits[name], size, -size)
        else:
            state[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return state


class FedPmClient(ClientAlgorithm):
    """Trains probabilities and sends bits."""

    down = Prunable
    up = BitmapOnly
    reparametrises = True
    options = FromSettings(FedPmOptions)

    def train(self, payload: Payload) -> Payload:
        """Train the scores that came down as probabilities; return one mask drawn from them."""
        self.load(payload)
        site, round_ = self.context, payload.round
        where = round_, site.client_id
        network, theta = self._constants(payload), state_of(site.model)
        scores = {name: torch.logit(theta[name].clamp(CLAMP, 1 - CLAMP)) for name in site.layout.prunable}
        load_state(site.model, network | scores)
        chance = torch_generator(self.settings.run.seed, "fedpm", *where, device=site.trainer.device)
        fixed = {name: network[name] for name in scores}
        with bernoulli_weights(site.model, chance, constants=fixed):
            loss = self.fit(round_, lr=self.options.lr, optimizer=torch.optim.Adam)
        trained = torch.from_numpy(site.layout.flatten_prunable(state_of(site.model)))
        rng = generator(self.settings.run.seed, "fedpm-upload", *where)
        return self.reply(payload, drawn(site.layout, torch.sigmoid(trained).numpy(), rng), loss)

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the network whose mask came down."""
        mask = read_mask(payload.arrays, self.context.layout)
        load_state(self.context.model, mask.apply(self._constants(payload)))
        return self.tested(payload)

    def _constants(self, payload: Payload) -> State:
        """Return the constants; their signs are made from the seed once and kept."""
        site, digest = self.context, str(payload.metadata.get("signs", ""))
        positive = site.mask(digest)
        if positive is None:
            positive = signs(site.layout, site.initial_state())
            if positive.digest != digest:
                raise PayloadError(f"signs is {digest!r}; the seed makes {positive.digest!r} at this client")
            site.memory.keep(digest, positive.packed())
        return constants(site.layout, positive)


def drawn(layout: Layout, probabilities: npt.NDArray[np.float32], rng: np.random.Generator) -> Mask:
    """Return a mask in which each weight, shape (prunable,), is alive with its probability."""
    return Mask(layout, rng.random(probabilities.size, dtype=np.float32) < probabilities)


class FedPm(SparseStrategy):
    """The prunable tensors of `state` hold theta; the model is the masked constants.

    Attributes
    ----------
    signs : Mask
        Where the constants are positive.
    ones, masks : int64 ndarray, shape (prunable,), and int
        alpha - 1 of each weight, and alpha + beta - 2, which is the same for all.
    network : Mask
        Of the network that is tested.
    """

    name = "fedpm"
    client = FedPmClient
    options = FromSettings(FedPmOptions)
    uses_density = False

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        if any(name.endswith("running_mean") for name, _ in self.layout.shapes):
            raise ConfigError("model.norm is 'batch'; with fedpm, which sends no statistics, it is group or none")
        self.signs = self.network = self.mask
        self.ones, self.masks = np.zeros(self.layout.prunable_size, dtype=np.int64), 0
        self._bits: Arrays = {}

    def before_training(self, ask: Query) -> None:
        """Take the signs of the initial weights, and draw the first scores from N(0, 1)."""
        self.signs = signs(self.layout, self.state)
        rng = generator(self.settings.run.seed, "fedpm-scores")
        scores = torch.from_numpy(rng.standard_normal(self.layout.prunable_size, dtype=np.float32))
        self._believe(0, torch.sigmoid(scores).numpy())

    def train_payload(self, round_: int, client: int) -> Payload:
        """Return theta."""
        return Payload(super().train_payload(round_, client).arrays, {"signs": self.signs.digest})

    def aggregator(self, round_: int) -> Aggregator:
        """Count the bits of the masks and take the mode of the posterior."""
        anew = self.options.reset and (round_ - 1) % self.options.reset == 0
        ones, masks = (np.zeros_like(self.ones), 0) if anew else (self.ones.copy(), self.masks)

        def add(reply: Reply) -> None:
            nonlocal masks
            weight = self.weight(reply)
            np.add(ones, weight, out=ones, where=read_mask(reply.arrays, self.layout).alive)
            masks += weight

        def finish() -> None:
            self.ones, self.masks = ones, masks
            self._believe(round_, (ones / masks).astype(np.float32))

        return Aggregator(add, finish)

    def update_norm(self, reply: Reply) -> float | None:
        """Return None: bits have no length, and one client's move theta by its weight's share at most."""
        return None

    def eval_payload(self, round_: int, client: int) -> Payload:
        """Return the mask of the network that is tested."""
        return Payload(self._bits, {"signs": self.signs.digest})

    def model(self) -> State:
        """Return the network that is tested."""
        return self.network.apply(constants(self.layout, self.signs))

    def densities(self) -> tuple[float, float]:
        """Return those of the network that is tested."""
        return density_pair(self.network)

    def state_dict(self) -> Arrays:
        """Return all that `load_state_dict` needs: the signs and the posterior too."""
        posterior = {"ones": self.ones, "masks": np.array([self.masks], dtype=np.int64)}
        return super().state_dict() | posterior | {"signs": self.signs.packed()}

    def load_state_dict(self, round_: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue after `round_`."""
        super().load_state_dict(round_, arrays)
        self.signs = Mask.unpack(self.layout, np.asarray(arrays["signs"], dtype=np.uint8))
        self.ones = stored(arrays, "ones", "int64", self.layout.prunable_size).copy()
        self.masks = int(stored(arrays, "masks", "int64", 1)[0])
        self._believe(round_, self.layout.flatten_prunable(self.state))

    def _believe(self, round_: int, theta: npt.NDArray[np.float32]) -> None:
        self.state = self.layout.scatter(theta, self.layout.is_prunable)
        if self.options.evaluate == "threshold":
            self.network = Mask(self.layout, theta > 0.5)
        else:
            rng = generator(self.settings.run.seed, "fedpm-evaluate", round_)
            self.network = drawn(self.layout, theta, rng)
        self._bits = shared_buffers(BitmapOnly().encode(self.layout, self.state, self.network))
