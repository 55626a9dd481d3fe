"""What methods with personal models share: fine-tuning, and a held-out part of the training images."""

from dataclasses import dataclass

from ssfl_app.core.algorithm import ClientAlgorithm, Metadata, Payload, Samples
from ssfl_app.core.options import FromSettings, Section, Settings, at_least, choice
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import load_state


@dataclass(frozen=True)
class FinetuneOptions(Section):
    """Keys of the section ``finetune``."""

    section = "finetune"

    epochs: int = at_least(0, 0, "of the fine-tuning round; 0: local.epochs")
    lr: str = choice("initial", "scheduled", about="local.lr, or the rate of the round after the last one")


class PersonalModelClient(ClientAlgorithm):
    """A client that keeps a model of its own beside the global one."""

    stateful = True

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the global model, and the client's own one."""
        metadata = super().evaluate(payload)
        load_state(self.context.model, self.personal_model(payload))
        return self.tested(payload, "personal_accuracy") | metadata


class FineTuningClient(ClientAlgorithm):
    """A client that fine-tunes the global model after the last round: that is its personal model."""

    finetune = FromSettings(FinetuneOptions)

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return the epochs of fine-tuning too."""
        return super().uses(settings) + FinetuneOptions.from_settings(settings).epochs

    def evaluate(self, payload: Payload) -> Metadata:
        """Test as ever; after the last round the global model, and that model after one more local round."""
        options, local = self.finetune, self.settings.local
        if payload.round != self.settings.run.rounds:
            return super().evaluate(payload)
        metadata = ClientAlgorithm.evaluate(self, payload)
        rate = local.lr if options.lr == "initial" else local.rate(payload.round + 1)
        self.fit(payload.round, purpose="finetune", lr=rate, epochs=options.epochs or local.epochs)
        return self.tested(payload, "personal_accuracy") | metadata


def held_out_of(images: int, share: float) -> int:
    """Return how many of a client's training images are held out: `share` of them, at least one on either side.

    None of a single image: the client trains and validates on it.
    """
    return max(0, min(max(1, round(share * images)), images - 1))


def held_out(rule: ClientAlgorithm, share: float) -> tuple[Samples, Samples]:
    """Return (training, validation) images of the client: `share` of them, at least one each, by the run's seed.

    A client with a single image trains and validates on it.
    """
    site = rule.context
    order = generator(rule.settings.run.seed, "validation", site.client_id).permutation(len(site.train))
    count = held_out_of(len(order), share)
    if not count:
        return site.train, site.train
    return site.train.take(order[count:]), site.train.take(order[:count])
