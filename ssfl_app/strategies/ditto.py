"""Ditto: FedAvg, and beside it a personal model on each client that is pulled towards the global one.

Li, Hu, Beirami and Smith, "Ditto: Fair and robust federated learning through personalization", ICML 2021,
algorithm 1. A sampled client

1. trains the global model w that came down and sends it back, as in FedAvg;
2. trains its own model v: after each SGD step ``v <- v - lr * lambda * (v - w)``, w as it came down.

The server averages the global models; personal models are tested.

Departures: epochs of the two are separate (ditto.global-epochs, ditto.personal-epochs) as in the public code of
DisPFL, which has 2 and 3 so that both together cost one local round; the pull is a step of its own after the
clipped SGD step, as there (the paper adds it to the gradient). `ditto.dynamic` chooses lambda anew in every round
from 0.1, 1 and 2 by the loss on a tenth of the client's images, on which the candidates do not train.
"""

from dataclasses import dataclass

from ssfl_app.core.algorithm import Payload, Samples, SparseStrategy
from ssfl_app.core.options import FromSettings, Section, Settings, anything, at_least
from ssfl_app.sparsity.layout import State, load_state, state_of
from ssfl_app.strategies.shared.fine_tuning import PersonalModelClient, held_out, held_out_of
from ssfl_app.training.anchor import Pull

CANDIDATES = (0.1, 1.0, 2.0)
HELD_OUT = 0.1


@dataclass(frozen=True)
class DittoOptions(Section):
    """Keys of the section ``ditto``."""

    section = "ditto"

    pull: float = at_least(0, 0.5, "lambda: how strongly a personal model is pulled towards the global one")
    dynamic: bool = anything("true or false", False, "choose lambda from 0.1, 1, 2 by the loss on held-out images")
    global_epochs: int = at_least(1, 2, "passes over the data for the global model")
    personal_epochs: int = at_least(1, 3, "passes for the personal one")


class DittoClient(PersonalModelClient):
    """Trains two models and sends one."""

    options = FromSettings(DittoOptions)

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the epochs of both models, with ditto.dynamic of all candidates."""
        options = DittoOptions.from_settings(settings)
        return super().uses(settings) + options.global_epochs + len(CANDIDATES) * (options.personal_epochs + 1)

    @classmethod
    def trained(cls, settings: Settings, images: int) -> int:
        """Return all images; with ditto.dynamic those that are not held out."""
        dynamic = DittoOptions.from_settings(settings).dynamic
        return images - held_out_of(images, HELD_OUT) if dynamic else images

    def train(self, payload: Payload) -> Payload:
        """Train the global model, then the personal one; return the global one."""
        options, round_ = self.options, payload.round
        mask = self.load(payload)
        down = {name: tensor.clone() for name, tensor in state_of(self.context.model).items()}
        loss = self.fit(round_, epochs=options.global_epochs)
        reply = self.reply(payload, mask, loss)
        own = self.personal_model(payload)
        if options.dynamic:
            own = self._chosen(round_, own, down)
        else:
            self._pulled(round_, own, down, options.pull, self.context.train)
            own = state_of(self.context.model)
        self.save_client_state(payload, {"model": self.context.layout.flatten(own)})
        return reply

    def _pulled(self, round_: int, own: State, towards: State, pull: float, data: Samples) -> None:
        """Train `own` on the workbench, pulled towards the other model after every step."""
        model = self.context.model
        load_state(model, own)
        centre = [towards[name] for name, _ in model.named_parameters()]
        step = Pull(centre, self.settings.local.rate(round_) * pull)
        self.fit(round_, purpose="personal", data=data, epochs=self.options.personal_epochs, after_step=step)

    def _chosen(self, round_: int, own: State, towards: State) -> State:
        """Return the personal model of the candidate with the lowest validation loss."""
        training, validation = held_out(self, HELD_OUT)
        best, lowest = own, float("inf")
        for pull in CANDIDATES:
            self._pulled(round_, own, towards, pull, training)
            loss, _ = self.context.trainer.evaluate(self.context.model, validation)
            if loss < lowest:
                best, lowest = {n: t.clone() for n, t in state_of(self.context.model).items()}, loss
        return best


class Ditto(SparseStrategy):
    """The server does what FedAvg's does."""

    name = "ditto"
    client = DittoClient
    uses_density = False
