"""The client's half of an algorithm: three verbs, whose defaults are FedAvg's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import nn

from ssfl_app.local.data import DataSet, Images
from ssfl_app.local.trainer import LocalTrainer
from ssfl_app.partitions import Indices
from ssfl_app.seeding import generator
from ssfl_app.sparsity.codec import Codec, Dense, SharedMask, read_mask
from ssfl_app.sparsity.layout import Layout, State, load_state, state_digest, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies.settings import Settings
from ssfl_app.wire import Facts, Memory, Parcel


class Need(Exception):
    """The client lacks something to read this message; the server sends it again with that.

    Not an error: ``str(need)`` is "mask" for a mask it does not hold, "weights" for initial weights that
    it cannot make itself.
    """


@dataclass
class Site:
    """Where a client works: its number, model, images and memory.

    `model` is a workbench that other clients of the same process use too: every verb loads its state first.
    `share` holds the indices of its training and test images in `data`.
    `initial` makes the initial weights from the seed; `dense` is the mask under which everything is alive.
    `masks` keeps unpacked masks by digest; whether the client *holds* a mask is `memory`'s affair alone.
    """

    number: int
    model: nn.Module
    layout: Layout
    trainer: LocalTrainer
    data: DataSet
    share: tuple[Indices, Indices]
    memory: Memory
    initial: Callable[[], State]
    dense: Mask
    masks: dict[str, Mask] = field(default_factory=dict)

    @cached_property
    def train(self) -> Images:
        """Training images of the client; copied out of the data set on first use, once a message."""
        return self.data.train.take(self.share[0])

    @cached_property
    def test(self) -> Images:
        """Test images of the client, likewise."""
        return self.data.test.take(self.share[1])

    def mask(self, digest: str) -> Mask | None:
        """Return the mask with this digest if the client holds it."""
        bitmap = self.memory.bitmap(digest)
        if bitmap is None:
            return None
        if digest not in self.masks:
            self.masks.clear()
            self.masks[digest] = Mask.unpack(self.layout, bitmap)
        return self.masks[digest]


class ClientRule:
    """What a client does with a message. Subclasses override the verbs in which their algorithm differs.

    Attributes
    ----------
    down, up : type of Codec
        How the model travels; the server reads them from here too, so both ends agree.
    questions : tuple of str
        What `setup` can be asked.
    """

    down: ClassVar[type[Codec]] = Dense
    up: ClassVar[type[Codec]] = Dense
    questions: ClassVar[tuple[str, ...]] = ()

    def __init__(self, site: Site, settings: Settings) -> None:
        self.site = site
        self.settings = settings

    def setup(self, question: str, parcel: Parcel) -> Parcel:
        """Answer a question the server asks before round 1.

        Raises
        ------
        PayloadError
            This algorithm has no such question.
        """
        raise PayloadError(f"question is {question!r}; {type(self).__name__} answers {list(self.questions)}")

    def train(self, parcel: Parcel) -> Parcel:
        """Train the model that came down and return it."""
        mask = self.load(parcel)
        site, round_ = self.site, int(parcel.facts["round"])
        rng = generator(self.settings.run.seed, "train", round_, site.number)
        sparse = mask if mask.count < site.layout.prunable_size else None
        loss = site.trainer.fit(site.model, site.train, rng, lr=self.settings.local.rate(round_), mask=sparse)
        arrays = self.up(self.settings.wire.up_values).encode(site.layout, state_of(site.model), mask)
        return Parcel(arrays, {"samples": len(site.train), "loss": loss, "digest": mask.digest})

    def evaluate(self, parcel: Parcel) -> Facts:
        """Test the model that came down on this client's own test images."""
        mask = self.load(parcel)
        if not len(self.site.test):
            return {"samples": 0, "digest": mask.digest}
        loss, accuracy = self.site.trainer.evaluate(self.site.model, self.site.test)
        return {"samples": len(self.site.test), "loss": loss, "accuracy": accuracy, "digest": mask.digest}

    def load(self, parcel: Parcel) -> Mask:
        """Load the model that came down into the workbench; return the mask it came under.

        Raises
        ------
        Need
            The message needs a mask that this client does not hold.
        PayloadError
            The mask is another one than the message states.
        """
        layout, digest = self.site.layout, str(parcel.facts.get("digest", ""))
        known = self.known_mask(parcel, digest) if issubclass(self.down, SharedMask) else self.site.dense
        state, mask = self.down(self.settings.wire.down_values).decode(parcel.arrays, layout, known)
        if mask.digest != digest:
            raise PayloadError(f"digest is {digest!r}; what came down has {mask.digest!r} at this client")
        load_state(self.site.model, state)
        return mask

    def initial_weights(self, parcel: Parcel) -> State:
        """Return the weights a question is about: those that came along, or the seed's if they are meant.

        Raises
        ------
        Need
            They did not come along, and this machine makes others from the seed than the server did.
        """
        layout = self.site.layout
        if "values" in parcel.arrays:
            return Dense().decode(parcel.arrays, layout, self.site.dense)[0]
        state = self.site.initial()
        if state_digest(layout, state) != parcel.facts.get("weights"):
            raise Need("weights")
        return state

    def known_mask(self, parcel: Parcel, digest: str) -> Mask:
        """Return the shared mask with this digest, keeping it if the message brings it along.

        Raises
        ------
        Need
            It neither came along nor is it held.
        PayloadError
            The mask that came along has another digest.
        """
        if "mask" in parcel.arrays:
            brought = read_mask(parcel.arrays, self.site.layout)
            if brought.digest != digest:
                raise PayloadError(f"the mask has digest {brought.digest!r}; the message states {digest!r}")
            self.site.memory.keep(digest, brought.packed())
        mask_held = self.site.mask(digest)
        if mask_held is None:
            raise Need("mask")
        return mask_held
