"""SparsyFed: power-propagated local training, pruned to a density before every upload.

Guastella et al., "SparsyFed: Sparse adaptive federated training", ICLR 2025, arXiv 2504.05153. The weights w travel,
and every conv and linear layer computes with ``v = sign(w) |w|^beta``. A client

1. trains w: with beta > 1 the gradient dL/dw = beta |w|^(beta-1) dL/dv is 0 at w = 0, so what the server holds dead
   stays dead, which is how clients come to agree on a mask. Activations kept for dL/dv are pruned to the density of
   their layer (the larger ones stay);
2. keeps the floor(density * prunable) largest |w| over all layers, the first one too, and sends them with a bitmap.
   A layer that this empties gets its largest weights back, the share sparsyfed.floor (default 0: none).

The server's w is the mean, what a client did not send counting as 0; its mask is the union of the masks that came
up. It goes down as a bitmap and alive values, dense in round 1. Clients' models have the density that is asked for;
the union is denser, and that is the density reported. Models are tested with v; so is the central one.

`sparsyfed.exponent` "spectral" sets beta per layer to 1 + mean(|w| / sigma(|w|)) of the w that came down.

A step of w moves v by ``beta^2 |w|^(2 beta - 2)`` of it, which is well below 1: the paper's rate is 0.5, falling to
0.01, and the default local.lr of 0.1 learns slowly.

Departures: v starts as the initial weights of the run, w0 = sign(u) |u|^(1/beta), where the authors draw a truncated
normal; with "spectral", beta of u is taken for that, so v starts near u only, and the power iteration starts from a
fixed vector that finds sigma nearly exactly (there: from a random one with signs, which finds less). The density of a
layer is read from the mask that came down, not from zeros. Activations are ranked in every batch, and their number is
rounded down; the public code keeps the first batch's threshold for the round, and rounds up. Its helper against
emptied layers, sparsyfed.floor here, is called nowhere in the copy that we have. The rate schedule and BatchNorm of
the paper are left to the common frame (local.*, model.norm).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from ssfl_app.core.aggregation import Aggregator, ReplyZerosMean
from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Query, ServerContext, SparseStrategy
from ssfl_app.core.options import FromSettings, Section, Settings, anything, at_least, choice, option
from ssfl_app.sparsity.codec import BitmapAndValues, read_mask
from ssfl_app.sparsity.dynamic import grow, layer_densities
from ssfl_app.sparsity.layout import Layout, State, Vector, state_of
from ssfl_app.sparsity.mask import Mask, keep_count
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.shared.scoring import ranked
from ssfl_app.training.reparam import inverse_power, power, power_propagation, sparse_activations, spectral_exponent


@dataclass(frozen=True)
class SparsyFedOptions(Section):
    """Keys of the section ``sparsyfed``."""

    section = "sparsyfed"

    beta: float = at_least(1, 1.25, "exponent of the effective weights sign(w) |w|^beta, at least 1")
    exponent: str = choice("fixed", "spectral", about="beta, or 1 + mean(|w| / sigma(|w|)) of each layer")
    prune_activations: bool = anything("true or false", True, "weight gradients from the largest activations only")
    floor: float = option(
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        0.0,
        "share of its weights, the largest, that a layer which pruning emptied gets back; 0: none",
    )


def exponents(layout: Layout, settings: Settings, state: State) -> dict[str, float]:
    """Return beta of each prunable tensor; both ends compute it from the w that went down."""
    options = SparsyFedOptions.from_settings(settings)
    if options.exponent == "fixed":
        return dict.fromkeys(layout.prunable, options.beta)
    return {name: spectral_exponent(state[name]) for name in layout.prunable}


def refilled(mask: Mask, magnitudes: Vector, share: float) -> Mask:
    """Return the mask with this share of each layer alive that has none, its largest weights that are not 0."""
    if not share:
        return mask
    spans = mask.layout.prunable_spans
    counts = {
        name: 0 if alive else min(keep_count(share, size), int(np.count_nonzero(magnitudes[spans[name]])))
        for name, alive, size in mask.layers()
    }
    return grow(mask, counts, magnitudes)


class SparsyFedClient(ClientAlgorithm):
    """Trains w through v, and prunes w."""

    down = BitmapAndValues
    up = BitmapAndValues
    reparametrises = True
    options = FromSettings(SparsyFedOptions)

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down and return it pruned."""
        options, site = self.options, self.context
        mask = self.load(payload)
        keep = layer_densities(mask) if options.prune_activations else dict.fromkeys(site.layout.prunable, 1.0)
        with self.powered(), sparse_activations(site.model, keep):
            loss = self.fit(payload.round)  # no mask: it is beta > 1 that keeps dead weights dead
        magnitudes = np.abs(site.layout.flatten_prunable(state_of(site.model)))
        kept = ranked(site.layout, magnitudes, self.settings.mask)
        return self.reply(payload, refilled(kept, magnitudes, options.floor), loss)

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the model that came down, with v."""
        self.load(payload)
        with self.powered():
            return self.tested(payload)

    def powered(self) -> AbstractContextManager[None]:
        """Return the context in which the workbench, which holds the w that came down, computes with v."""
        model = self.context.model
        return power_propagation(model, exponents(self.context.layout, self.settings, state_of(model)))


class SparsyFed(SparseStrategy):
    """Averages pruned weights."""

    name = "sparsyfed"
    client = SparsyFedClient
    options = FromSettings(SparsyFedOptions)

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context)
        self._count = self.top_count(self.settings.mask.density)

    def before_training(self, ask: Query) -> None:
        """Turn the initial weights, which are to be v, into w."""
        betas = exponents(self.layout, self.settings, self.state)
        self.state = {n: inverse_power(t, betas[n]) if n in betas else t for n, t in self.state.items()}

    def aggregator(self, round_: int) -> Aggregator:
        """Take the mean with zeros, and the union of the masks."""
        mean = ReplyZerosMean(self)

        def finish() -> None:
            values, self.mask = mean.finish(self.state)
            self.state = self.layout.unflatten(values)

        return Aggregator(mean.add, finish)

    def model(self) -> State:
        """Return the global model with v in place of w."""
        betas = exponents(self.layout, self.settings, self.state)
        return {n: power(t, betas[n]) if n in betas else t for n, t in self.state.items()}

    def check_trained(self, client: int, payload: Payload) -> None:
        """Refuse as ever, and a mask of another density than was asked for."""
        super().check_trained(client, payload)
        mask, share = read_mask(payload.arrays, self.layout), self.options.floor
        sizes = [(alive, keep_count(share, size) if share else 0) for _, alive, size in mask.layers()]
        # Only layers with no more than the floor's share may have been empty before it was added.
        if not mask.count - sum(alive for alive, most in sizes if alive <= most) <= self._count <= mask.count:
            raise PayloadError(
                f"{mask.count} weights came up; mask.density {self.settings.mask.density} is {self._count}"
                + (f", and sparsyfed.floor {share} adds to layers that are empty" if share else "")
            )
