"""MOON: FedAvg whose clients keep the features of the global model, and leave those of their own last one.

Li, He and Song, "Model-contrastive federated learning", CVPR 2021, algorithm 1. With z the features of an input by
the model in training, z_g by the one that came down and z_p by the client's of its last round, a client minimises

    l + mu * -log(e^(cos(z, z_g) / T) / (e^(cos(z, z_g) / T) + e^(cos(z, z_p) / T)))

over its batches, l being the task's loss. The server takes the mean. Bytes are FedAvg's. A training image goes
forward twice more, through models that do not train, which counts as looks; a client remembers one model.

Departures: features are what goes into the last layer, of any model (`with_features`); the paper puts a head of two
layers before it. In its first round a client's last model is the initial one.
"""

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ssfl_app.core.algorithm import ClientAlgorithm, Payload, SparseStrategy
from ssfl_app.core.options import FromSettings, Section, above, at_least
from ssfl_app.sparsity.layout import load_state, state_of
from ssfl_app.training.step import with_features


@dataclass(frozen=True)
class MoonOptions(Section):
    """Keys of the section ``moon``."""

    section = "moon"

    mu: float = at_least(0, 1.0, "weight of the contrastive term; 0: FedAvg")
    temperature: float = above(0, 0.5, "that similarities are divided by")


def contrast(z: torch.Tensor, near: torch.Tensor, far: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean contrastive term of features, (batch, n), that are to be like `near` and not like `far`."""
    likeness = torch.stack([F.cosine_similarity(z, other) for other in (near, far)], dim=1) / temperature
    return F.cross_entropy(likeness, torch.zeros(len(z), dtype=torch.long, device=z.device))


class MoonClient(ClientAlgorithm):
    """Remembers the model that it trained last."""

    stateful = True
    options = FromSettings(MoonOptions)

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down, with the contrastive term, and return it."""
        site, options = self.context, self.options
        mask = self.load(payload)
        site.model.train()  # the others compute as the one in training does
        down, last = copy.deepcopy(site.model), copy.deepcopy(site.model)
        load_state(last, self.personal_model(payload))

        def term(inputs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            site.trainer.looks += 2 * len(inputs)
            with torch.no_grad():
                near, far = (with_features(other, inputs)[1] for other in (down, last))
            return options.mu * contrast(features, near, far, options.temperature)

        loss = self.fit(payload.round, mask, feature_loss=term)
        self.save_client_state(payload, {"model": site.layout.flatten(state_of(site.model))})
        return self.reply(payload, mask, loss)


class Moon(SparseStrategy):
    """The server does what FedAvg's does."""

    name = "moon"
    client = MoonClient
    uses_density = False
