"""`ClientAlgorithm`, the client side of an algorithm: three methods whose defaults are FedAvg's."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ssfl_app.comm.payload import BEFORE, ClientState, Metadata, Payload
from ssfl_app.core.options import Settings
from ssfl_app.core.summand import Identity, SummandWriter, terms_of, told
from ssfl_app.data.dataset import DataSet, Samples
from ssfl_app.options import ConfigError
from ssfl_app.partitions import Indices
from ssfl_app.privacy import record
from ssfl_app.seeding import generator
from ssfl_app.sparsity.channels import Widths, check_widths, narrow_layout
from ssfl_app.sparsity.codec import Codec, Dense, LinearCodec, MaskedValues, read_mask, read_moved
from ssfl_app.sparsity.layout import Layout, State, Vector, load_state, state_digest, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import SUMMED_TYPES, Arrays, PayloadError
from ssfl_app.training.narrow import of_widths
from ssfl_app.training.trainer import LocalTrainer


class Need(Exception):
    """The client lacks something to read this message; the server sends it again with that.

    Not an error: ``str(need)`` is "mask" for a mask it does not hold, "weights" for initial weights that
    it cannot make itself.
    """


def no_identity() -> Identity:
    """Raise PayloadError: this client has no keys."""
    raise PayloadError("this client has no keys to mask its answer with")


@dataclass
class ClientContext:
    """Where a client works: its number, the options of the run, its model, images and memory.

    `model` is a workbench that other clients of the same process use too: every verb loads its state first.
    `indices` are those of its training and test images in `data`.
    `initial_state` makes the initial weights from the seed; `dense` is the mask under which everything is alive.
    `masks` keeps unpacked masks by digest; only `memory` says whether the client *holds* a mask.
    `narrow` keeps the narrower network that this run works with (`narrower`).
    `least_batch`: of fewer images no answer is made, except loss and accuracy on the test images.
    `identity` returns what it masks with, under privacy.secure-aggregation.
    """

    client_id: int
    settings: Settings
    model: nn.Module
    layout: Layout
    trainer: LocalTrainer
    data: DataSet
    indices: tuple[Indices, Indices]
    memory: ClientState
    initial_state: Callable[[], State]
    dense: Mask
    masks: dict[str, Mask] = field(default_factory=dict)
    narrow: dict[Widths, nn.Module] = field(default_factory=dict)
    least_batch: int = 1
    identity: Callable[[], Identity] = no_identity

    def enough(self, images: int, what: str) -> None:
        """Raise PayloadError if `what`, which the server would be told, is made of too few different images."""
        if images < self.least_batch:
            raise PayloadError(f"{what} would be made of {images} images; least-batch is {self.least_batch} here")

    @cached_property
    def train(self) -> Samples:
        """Training images of the client; copied out of the data set on first use, once a message."""
        return self.data.train.take(self.indices[0])

    @cached_property
    def test(self) -> Samples:
        """Test images of the client, likewise."""
        return self.data.test.take(self.indices[1])

    @cached_property
    def summands(self) -> SummandWriter:
        """Writes the answers that the server only adds."""
        privacy = self.settings.privacy
        return SummandWriter(
            self.client_id,
            self.identity,
            self.memory,
            privacy.secure_aggregation,
            privacy.threshold,
            privacy.level,
            terms_of(self.settings) if privacy.secure_aggregation else "",
        )

    def narrower(self, widths: Widths) -> "ClientContext":
        """Return the context of this client where inner layers have these widths; its model is a smaller one.

        ValueError: they are no widths of this model.
        """
        check_widths(self.layout, widths)
        if widths not in self.narrow:
            self.narrow.clear()
            self.narrow[widths] = of_widths(self.model, self.layout, widths)
        layout = narrow_layout(self.layout, widths)
        return replace(self, model=self.narrow[widths], layout=layout, dense=Mask.dense(layout), masks={})

    def mask(self, digest: str) -> Mask | None:
        """Return the mask with this digest if the client holds it; one that a disk damaged is not held."""
        bitmap = self.memory.bitmap(digest)
        if bitmap is None:
            return None
        if digest not in self.masks:
            try:
                mask = Mask.unpack(self.layout, bitmap)
            except ValueError:
                return None
            if mask.digest != digest:
                return None
            self.masks.clear()
            self.masks[digest] = mask
        return self.masks[digest]


def encode_with(
    codec: Codec, layout: Layout, state: State, mask: Mask, residual: Vector | None
) -> tuple[Arrays, Vector]:
    """Encode a state with error feedback: what rounding took from the values sent before is added to these.

    Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes
    SignSGD", ICML 2019.

    `residual`, of shape (layout.size,), is what is to be made up for; None: nothing yet. Returned are what travels
    and the new residual: 0 where nothing travels.
    """
    wanted = layout.flatten(state)
    if residual is not None:
        wanted += residual
    wanted[np.flatnonzero(~mask.transmitted)] = 0
    arrays = codec.encode(layout, layout.unflatten(wanted), mask)
    wanted -= layout.flatten(codec.decode(arrays, layout, mask)[0])
    return arrays, wanted


class ClientAlgorithm:
    """What a client does with a message. Subclasses override the verbs in which their algorithm differs.

    Attributes
    ----------
    down, up : type of Codec
        How the model travels, unless `codec_down` or `codec_up` say otherwise; the server reads them from here too,
        so both ends agree.
    query_types : tuple of str
        What `answer_query` answers.
    stateful : bool
        Whether the client keeps personal state (`load_client_state`, `save_client_state`), or tensors that stay.
    reparametrises : bool
        Whether its layers compute with their weights in another form (`ssfl_app.training.reparam`).
    summed : tuple of str
        Of `query_types`, those whose answers the server only adds, so that they can be masked (`summands`).
    reads : tuple of str
        Of a training message, the arrays beside the model, and the facts question, ssfl, weights and step, that
        its answer is made of. Where answers are masked, another value makes another question.
    record_level : bool
        Whether nothing that it sends of its data but their number is made otherwise than by one `fit`: what
        privacy.level "record" asks. A subclass that is such a client says so itself; it does not inherit it.
    """

    down: ClassVar[type[Codec]] = Dense
    up: ClassVar[type[Codec]] = Dense
    query_types: ClassVar[tuple[str, ...]] = ()
    stateful: ClassVar[bool] = False
    reparametrises: ClassVar[bool] = False
    summed: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    record_level: ClassVar[bool] = True

    def __init__(self, context: ClientContext) -> None:
        self.context, self.settings = context, context.settings
        self.check_privacy(self.settings)
        self._came: Vector | None = None  # the model that came down, where an update is told

    @classmethod
    def check_privacy(cls, settings: Settings, strategy: str = "") -> None:
        """Raise ConfigError if what this client, that of a strategy, sends is not as private as the options say."""
        if settings.privacy.level == "record" and not vars(cls).get("record_level", False):
            who = f"a client of strategy {strategy}" if strategy else cls.__name__
            asked = f"answers {', '.join(cls.query_types)}" if cls.query_types else "trains in a way of its own"
            raise ConfigError(
                f"privacy.level is 'record'; {who} {asked}, which no noise covers: strategy is 'random', or 'fedavg' "
                "or 'fedprox', which train all weights"
            )

    @classmethod
    def codec_down(cls, settings: Settings, round_: int) -> type[Codec]:
        """Return how the model comes down in a round: as `MaskedValues` in all rounds, or in none."""
        return cls.down

    @classmethod
    def codec_up(cls, settings: Settings, round_: int) -> type[Codec]:
        """Return how the model goes up in a round."""
        return cls.up

    @classmethod
    def uses(cls, settings: Settings) -> int:
        """Return how often one message has a client use each of its training images, at most; override to raise it.

        What a client says beyond it is refused. Twice the local epochs, and three more for gradients and tests.
        """
        return 2 * settings.local.epochs + 3

    @classmethod
    def trained(cls, settings: Settings, images: int) -> int:
        """Return on how many of a client's training images, `images`, it trains at a time, at least."""
        return images

    @classmethod
    def work(cls, settings: Settings, images: int) -> int:
        """Return how many images, each as often as it is used, one message has go through a client's model, at most.

        `images` is how many it trains on.
        """
        return images * cls.uses(settings)

    def answer_query(self, question: str, payload: Payload) -> Payload:
        """Answer a question the server asks before a round.

        Raises
        ------
        PayloadError
            This algorithm has no such question.
        """
        raise PayloadError(f"question is {question!r}; {type(self).__name__} answers {list(self.query_types)}")

    def train(self, payload: Payload) -> Payload:
        """Train the model that came down and return it."""
        mask = self.load(payload)
        loss = self.fit(payload.round, mask)
        return self.reply(payload, mask, loss)

    def evaluate(self, payload: Payload) -> Metadata:
        """Test the model that came down on this client's own test images."""
        self.load(payload)
        return self.tested(payload)

    # ---- what verbs use ----------------------------------------------------------------------

    def fit(
        self,
        round_: int,
        mask: Mask | None = None,
        *,
        purpose: str = "train",
        data: Samples | None = None,
        lr: float | None = None,
        **changes: Any,
    ) -> float:
        """Train the model on the workbench for one local round and return the mean loss.

        The round sets the learning rate, unless `lr` does, and with `purpose` and the client's number the order of
        the images: all of the client's, or `data`. Without a mask everything stays alive. `changes` are further
        arguments of `LocalTrainer.fit`.

        Raises
        ------
        PayloadError
            There are fewer images than this site trains on for others.
        """
        site = self.context
        images = site.train if data is None else data
        site.enough(len(images), "a trained model")
        rng = generator(self.settings.run.seed, purpose, round_, site.client_id)
        sparse = mask if mask is not None and mask.count < site.layout.prunable_size else None
        rate = self.settings.local.rate(round_) if lr is None else lr
        if self.settings.privacy.level == "record":
            changes["private"] = self._begin_private(len(images), changes.get("epochs"))
            # Of augmentation. A public one would be drawn in another order with a record more.
            rng = np.random.default_rng()
        frozen = self.settings.mask.frozen
        return site.trainer.fit(site.model, images, rng, lr=rate, mask=sparse, frozen=frozen, **changes)

    def _begin_private(self, images: int, epochs: int | None) -> record.PrivateSteps:
        """Return what a private local round is made with, after it is written down that it began.

        Raises
        ------
        PayloadError
            The budget of this client does not pay for it.
        """
        options, local, memory = self.settings.privacy, self.settings.local, self.context.memory
        sampling = record.Sampling.of(images, local.batch_size, local.epochs if epochs is None else epochs)
        rounds = self.settings.run.rounds
        ledger = memory.change_ledger(lambda held: record.begun(held, options, sampling, rounds))
        noise = record.secret_generator(self.context.trainer.device)
        choice = record.secret_generator(torch.device("cpu"))
        return record.PrivateSteps(options.clip, ledger["noise"], sampling, noise, choice)

    def reply(self, payload: Payload, mask: Mask, loss: float, state: State | None = None) -> Payload:
        """Return the answer to a training message: a state, that of the workbench by default, under `mask`."""
        kind = self.codec_up(self.settings, payload.round)
        layout, codec = self.context.layout, kind(self.settings.wire.up_values, self.rounder(payload))
        state = state_of(self.context.model) if state is None else state
        stays = codec.stays(layout)
        if stays:
            own = layout.flatten(state)
            self.save_client_state(payload, {name: own[layout.spans[name]] for name in stays})
        if self.settings.wire.up_values in SUMMED_TYPES:
            return self._summand(payload, codec, mask, layout.flatten(state), loss)
        if not self.settings.wire.error_feedback:
            return Payload(codec.encode(layout, state, mask), self.metadata(payload, loss))
        kept = self.load_client_state(payload)
        arrays, lost = encode_with(codec, layout, state, mask, None if kept is None else kept["residual"])
        self.save_client_state(payload, {"residual": lost})
        return Payload(arrays, self.metadata(payload, loss))

    def _summand(self, payload: Payload, codec: Codec, mask: Mask, trained: Vector, loss: float) -> Payload:
        """Return the answer that is only added: how far `trained`, shape (layout.size,), is from what came down."""
        assert isinstance(codec, LinearCodec)  # the server refuses others
        assert self._came is not None
        places = codec.index(self.context.layout, mask)
        weight = len(self.context.train) if self.settings.run.weighting == "samples" else 1
        down = self.codec_down(self.settings, payload.round)(self.settings.wire.down_values)
        arrays = self.context.summands.write(
            payload,
            trained[places] - self._came[places],
            codec.values,
            weight,
            codec.rng,
            loss,
            reads={"digest", *down.allowed(self.context.layout), *self.reads},
        )
        return Payload(arrays, told(self.metadata(payload, loss)))

    def rounder(self, payload: Payload) -> np.random.Generator | None:
        """Return what the values of the answer to a training message are rounded with, if stochastically."""
        if self.settings.wire.rounding == "nearest":
            return None
        return generator(self.settings.run.seed, "rounding-up", payload.round, self.context.client_id)

    def metadata(self, payload: Payload, loss: float) -> Metadata:
        """Return the metadata of an answer to a training message.

        With privacy.level "record" there is no loss, but the epsilon of all rounds that this client has begun.
        """
        told: Metadata = {"loss": loss}
        if self.settings.privacy.level == "record":
            told = {"epsilon": record.spent(self.context.memory.ledger())}
        return {"samples": len(self.context.train), **told, "digest": payload.metadata["digest"]}

    def tested(self, payload: Payload, name: str = "accuracy") -> Metadata:
        """Return the metadata of an answer to an evaluation message, the workbench's accuracy as `name`.

        Raises
        ------
        PayloadError
            There is differential privacy, and no noise covers an accuracy.
        """
        if self.settings.privacy.private:
            raise PayloadError(f"privacy.level is {self.settings.privacy.level!r}; a client tells no accuracy")
        metadata: Metadata = {"samples": len(self.context.test), "digest": payload.metadata["digest"]}
        if len(self.context.test):
            metadata["loss"], metadata[name] = self.context.trainer.evaluate(self.context.model, self.context.test)
        return metadata

    def load_client_state(self, payload: Payload) -> Arrays | None:
        """Return the personal state after the last round that the server took this client's answer in, or None."""
        return self.context.memory.load(int(payload.metadata["since"]))

    def save_client_state(self, payload: Payload, arrays: Arrays) -> None:
        """Keep personal state, made in answer to this message."""
        round_, every = payload.round, self.settings.run.checkpoint_every
        # A run can be taken up again at its last checkpoint, and the server may yet refuse this answer.
        back_to = min(int(payload.metadata["since"]), (round_ - 1) // every * every)
        self.context.memory.save(round_, arrays, back_to)

    def personal_model(self, payload: Payload) -> State:
        """Return this client's own model as it was remembered under "model"; before that, the initial weights."""
        kept = self.load_client_state(payload)
        return self.context.initial_state() if kept is None else self.context.layout.unflatten(kept["model"])

    def load(self, payload: Payload) -> Mask:
        """Load the model that came down into the workbench; return the mask it came under.

        Raises
        ------
        Need, PayloadError
            As `received` does.
        """
        layout = self.context.layout
        state, mask = self.received(payload, self.context.trainer.device)
        stays = self.codec_down(self.settings, payload.round)(self.settings.wire.down_values).stays(layout)
        if stays:
            state |= self._own(payload, stays)
        if self.settings.mask.frozen and mask.count < mask.alive.size:
            state = mask.apply(state, self.context.initial_state())
        load_state(self.context.model, state)
        if self.settings.wire.up_values in SUMMED_TYPES:
            self._came = layout.flatten(state)
        return mask

    def received(self, payload: Payload, device: torch.device | None = None) -> tuple[State, Mask]:
        """Return what the codec of a message reads in it, and the mask it came under.

        The state may be on `device`.

        Raises
        ------
        Need, PayloadError
            This client does not hold the mask of the message; it is another one than the message states; a value is
            not finite.
        """
        layout, digest = self.context.layout, str(payload.metadata.get("digest", ""))
        codec = self.codec_down(self.settings, payload.round)(self.settings.wire.down_values)
        codec.device = device
        known = self.known_mask(payload, digest) if isinstance(codec, MaskedValues) else self.context.dense
        state, mask = codec.decode(payload.arrays, layout, known)
        if mask.digest != digest:
            raise PayloadError(f"digest is {digest!r}; what came down has {mask.digest!r} at this client")
        # NaN and Inf both show in the extremes, which are found in one pass and no memory. All are looked at
        # together, so that a GPU is waited for once.
        extremes = {name: torch.stack(t.aminmax()) for name, t in state.items() if t.numel()}
        if extremes and (~torch.stack([*extremes.values()]).isfinite()).any():  # trained on, and remembered
            broken = next(name for name, pair in extremes.items() if not pair.isfinite().all())
            raise PayloadError(f"values of {broken} that came down are NaN or Inf; all must be finite")
        return state, mask

    def _own(self, payload: Payload, names: tuple[str, ...]) -> State:
        """Return the tensors that stay here, as this client's last answer left them; before it, the initial ones."""
        kept = self.load_client_state(payload)
        if kept is None:
            initial = self.context.initial_state()
            return {name: initial[name] for name in names}
        shapes = dict(self.context.layout.shapes)
        return {name: torch.from_numpy(kept[name].copy()).view(shapes[name]) for name in names}

    def initial_weights(self, payload: Payload) -> State:
        """Return the weights a question is about: those that came along, or the seed's if they are meant.

        Raises
        ------
        Need
            They did not come along, and this machine makes others from the seed than the server did.
        """
        layout = self.context.layout
        if "values" in payload.arrays:
            sent, stated = (
                Dense().decode(payload.arrays, layout, self.context.dense)[0],
                payload.metadata.get("weights"),
            )
            if stated is not None and state_digest(layout, sent) != stated:
                raise PayloadError(f"weights is {stated!r}; those that came along have another digest")
            return sent
        state = self.context.initial_state()
        if state_digest(layout, state) != payload.metadata.get("weights"):
            raise Need("weights")
        return state

    def known_mask(self, payload: Payload, digest: str) -> Mask:
        """Return the shared mask with this digest, keeping it if the message brings it along, or where it moved.

        Raises
        ------
        Need, PayloadError
            It neither came along nor is it held; one with another digest came along.
        """
        if digest == self.context.dense.digest:
            return self.context.dense
        if "mask" in payload.arrays:
            brought = read_mask(payload.arrays, self.context.layout)
            if brought.digest != digest:
                raise PayloadError(f"the mask has digest {brought.digest!r}; the message states {digest!r}")
            self.context.memory.keep(digest, brought.packed())
        mask_held = self.context.mask(digest)
        if mask_held is None and "moved" in payload.arrays:
            return self._moved_mask(payload, digest)
        if mask_held is None:
            raise Need("mask")
        return mask_held

    def _moved_mask(self, payload: Payload, digest: str) -> Mask:
        """Return the mask with this digest, made of the one that is held and where it differs, and keep it."""
        before = self.context.mask(str(payload.metadata.get(BEFORE, "")))
        if before is None:
            raise Need("mask")
        mask = read_moved(payload.arrays, before)
        if mask.digest != digest:
            found = f"the held mask moved at {payload.arrays['moved'].size} places has digest {mask.digest!r}"
            raise PayloadError(f"{found}; the message states {digest!r}")
        self.context.memory.keep(digest, mask.packed())
        return mask
