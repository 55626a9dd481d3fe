"""What methods with personal models share: fine-tuning, and a held-out part of the training images."""

from dataclasses import dataclass
from typing import cast

from ssfl_app.comm.payload import Metadata, Payload
from ssfl_app.core.client import ClientAlgorithm
from ssfl_app.core.options import Settings
from ssfl_app.data.dataset import Images
from ssfl_app.options import at_least, choice
from ssfl_app.seeding import generator
from ssfl_app.sparsity.mask import Mask


@dataclass(frozen=True)
class FinetuneOptions:
    """Keys of the room ``finetune``."""

    epochs: int = at_least(0)
    lr: str = choice("initial", "scheduled")


def finetuning_of(settings: Settings) -> FinetuneOptions:
    """Return the options of the room ``finetune``."""
    return cast(FinetuneOptions, settings.own["finetune"])


def finetuned(rule: ClientAlgorithm, payload: Payload, mask: Mask | None = None) -> Metadata:
    """Train the model on the workbench for one more local round and return its accuracy as the personal one."""
    options, local = finetuning_of(rule.settings), rule.settings.local
    round_ = int(payload.metadata["round"])
    rate = local.lr if options.lr == "initial" else local.rate(round_ + 1)
    rule.fit(round_, mask, purpose="finetune", lr=rate, epochs=options.epochs or local.epochs)
    metadata = rule.tested(payload, "personal_accuracy")
    return {name: metadata[name] for name in ("personal_accuracy",) if name in metadata}


def held_out_of(images: int, share: float) -> int:
    """Return how many of a client's training images are held out: `share` of them, at least one on either side.

    None of a single image: the client trains and validates on it.
    """
    return max(0, min(max(1, round(share * images)), images - 1))


def held_out(rule: ClientAlgorithm, share: float) -> tuple[Images, Images]:
    """Return (training, validation) images of the client: `share` of them, at least one each, by the run's seed.

    A client with a single image trains and validates on it.
    """
    site = rule.context
    order = generator(rule.settings.run.seed, "validation", site.client_id).permutation(len(site.train))
    count = held_out_of(len(order), share)
    if not count:
        return site.train, site.train
    return site.train.take(order[count:]), site.train.take(order[:count])
