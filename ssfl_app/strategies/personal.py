"""What methods with personal models share: fine-tuning, and a held-out part of the training images."""

from dataclasses import dataclass
from typing import cast

from ssfl_app.local.data import Images
from ssfl_app.options import at_least, choice
from ssfl_app.seeding import generator
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.rule import ClientRule
from ssfl_app.strategies.settings import Settings
from ssfl_app.wire import Facts, Parcel


@dataclass(frozen=True)
class FinetuneOptions:
    """Keys of the room ``finetune``."""

    epochs: int = at_least(0)
    lr: str = choice("initial", "scheduled")


def finetuning_of(settings: Settings) -> FinetuneOptions:
    """Return the options of the room ``finetune``."""
    return cast(FinetuneOptions, settings.own["finetune"])


def finetuned(rule: ClientRule, parcel: Parcel, mask: Mask | None = None) -> Facts:
    """Train the model on the workbench for one more local round and return its accuracy as the personal one."""
    options, local = finetuning_of(rule.settings), rule.settings.local
    round_ = int(parcel.facts["round"])
    rate = local.lr if options.lr == "initial" else local.rate(round_ + 1)
    rule.fit(round_, mask, purpose="finetune", lr=rate, epochs=options.epochs or local.epochs)
    facts = rule.tested(parcel, "personal_accuracy")
    return {name: facts[name] for name in ("personal_accuracy",) if name in facts}


def held_out_of(images: int, share: float) -> int:
    """Return how many of a client's training images are held out: `share` of them, at least one on either side.

    None of a single image: the client trains and validates on it.
    """
    return max(0, min(max(1, round(share * images)), images - 1))


def held_out(rule: ClientRule, share: float) -> tuple[Images, Images]:
    """Return (training, validation) images of the client: `share` of them, at least one each, by the run's seed.

    A client with a single image trains and validates on it.
    """
    site = rule.context
    order = generator(rule.settings.run.seed, "validation", site.client_id).permutation(len(site.train))
    count = held_out_of(len(order), share)
    if not count:
        return site.train, site.train
    return site.train.take(order[count:]), site.train.take(order[:count])
