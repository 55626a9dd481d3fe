"""Flower's ClientApp: a NumPyClient, served through the Message API.

`SparseClient` speaks NumPy: arrays in, arrays out. In a training round of SSFL these arrays are the alive values and
nothing else. `serve` takes a message apart for it and writes its answer as one.
"""

import functools
from typing import Any

import numpy.typing as npt
import torch
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from ssfl_app.client_node import UNMASK, check_policy, client_number, guarded, identity, memory_of, place_of, unmask
from ssfl_app.comm.handshake import KEY
from ssfl_app.comm.node_config import NodeConfig
from ssfl_app.comm.payload import ClientState, Metadata, Payload, PayloadEncoder, decode_arrays, decode_metadata
from ssfl_app.core.client import ClientAlgorithm, Need
from ssfl_app.options import ConfigError
from ssfl_app.registry import only_brought
from ssfl_app.runtime import Runtime, code_digest, get_runtime, gpu_is_hidden
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import tell
from ssfl_app.training.malloc import keep_heap

MOST_BITMAPS = 4
"""Bitmaps of a message; what else it holds is never deflated."""

MASKED, TOLD = frozenset({"values", "shares", "pair-shares"}), frozenset({"samples", "digest", "epsilon"})
"""Arrays and facts of an answer under privacy.secure-aggregation: nothing else leaves a client but its tests."""

NDArrays = list[npt.NDArray[Any]]


class SparseClient(NumPyClient):
    """One client, which works by the client half of an algorithm, behind Flower's NumPyClient interface.

    `name` is that of a site with data of its own; "": the client goes by its number. `array_names` are those of the
    arrays, in order: whoever calls `fit` or `evaluate` sets those of what it gives, and `fit` of what it returns.
    `modules` are foreign ones that it works with: its code is the server's if these are too. `start` is the digest
    of its initial weights where it tells that.
    """

    def __init__(
        self, algorithm: ClientAlgorithm, name: str = "", modules: tuple[str, ...] = (), start: str = ""
    ) -> None:
        self.algorithm, self.start = algorithm, start
        self.name = name
        self.modules = modules
        self.array_names: tuple[str, ...] = ()
        self._parameters: NDArrays = []

    def get_properties(self, config: Metadata) -> Metadata:
        """Return who this client is, what it holds and what it works with."""
        context = self.algorithm.context
        return {
            **({"name": self.name} if self.name else {"client": context.client_id}),
            **context.data.holding(*context.indices).metadata(),
            "device": str(context.trainer.device),
            "gpu-is-hidden": gpu_is_hidden(),
            "code": code_digest(self.modules),
            **({"weights": self.start} if self.start else {}),
            **({KEY: context.identity().keys.public} if context.settings.privacy.secure_aggregation else {}),
        }

    def get_parameters(self, config: Metadata) -> NDArrays:
        """Return the arrays that `fit` made last; they are called `array_names`."""
        return self._parameters

    def fit(self, parameters: NDArrays, config: Metadata) -> tuple[NDArrays, int, Metadata]:
        """Train, or answer ``config["question"]``; return arrays, samples and metadata."""
        algorithm, payload = self.algorithm, self._payload(parameters, config)
        trainer = algorithm.context.trainer
        passes, looks, question = trainer.passes, trainer.looks, config.get("question")
        try:
            reply = answered(algorithm, question, payload)
        except Need as need:
            self.array_names = ()
            return [], 0, {"need": str(need)}
        if algorithm.settings.privacy.secure_aggregation:
            check_masked(reply)
        work = {"passes": trainer.passes - passes, "looks": trainer.looks - looks}
        self.array_names, self._parameters = tuple(reply.arrays), list(reply.arrays.values())
        metadata = {**reply.metadata, **work, **self._notes()}
        return self.get_parameters(config), int(reply.metadata["samples"]), metadata

    def evaluate(self, parameters: NDArrays, config: Metadata) -> tuple[float, int, Metadata]:
        """Test the model on this client's own test images; return loss, samples and metadata."""
        trainer = self.algorithm.context.trainer
        passes = trainer.passes
        try:
            metadata = self.algorithm.evaluate(self._payload(parameters, config))
        except Need as need:
            return 0.0, 0, {"need": str(need)}
        metadata |= {"passes": trainer.passes - passes, **self._notes()}  # some fine-tune before they test
        return float(metadata.get("loss", 0.0)), int(metadata["samples"]), metadata

    def _payload(self, parameters: NDArrays, config: Metadata) -> Payload:
        return Payload(dict(zip(self.array_names, parameters, strict=True)), config)

    def _notes(self) -> Metadata:
        notes = self.algorithm.context.memory.notes
        return {"note": "; ".join(notes)} if notes else {}


def answered(algorithm: ClientAlgorithm, question: object, payload: Payload) -> Payload:
    """Return the answer to a question, or to a training message if there is none."""
    if question is None:
        return algorithm.train(payload)
    return algorithm.answer_query(str(question), payload)


def check_masked(reply: Payload) -> None:
    """Raise PayloadError unless an answer is masked: the server chooses the options, which may ask for others.

    Tests on the client's own test images are no such answers.
    """
    clear = sorted(reply.arrays.keys() - MASKED) + sorted(reply.metadata.keys() - TOLD)
    if clear or "shares" not in reply.arrays:
        what = f"would tell {', '.join(clear or sorted(reply.arrays))} in the clear"
        raise PayloadError(f"privacy.secure-aggregation is true; this answer {what}")


def serve(
    client: SparseClient, message: Message, metadata: Metadata, encoder: PayloadEncoder, unfolded: int
) -> Message:
    """Have a client answer a message whose metadata are `metadata`.

    ``query.hello`` asks for properties, ``query.<question>`` and ``train`` call `fit`, ``evaluate`` calls
    `evaluate`. The round and the digest go back as they came, so that the server can tell what was answered.
    Deflated arrays of the message may unfold to `unfolded` bytes together.
    """
    received = decode_arrays(message.content, unfolded=unfolded)
    client.array_names, arrays = tuple(received), list(received.values())
    category, _, action = message.metadata.message_type.partition(".")
    made: NDArrays = []
    if action == "hello":
        told, client.array_names = client.get_properties(metadata), ()
    elif category == "evaluate":
        loss, samples, told = client.evaluate(arrays, metadata)
        told, client.array_names = {"loss": loss, **told, "samples": samples}, ()
    else:
        made, samples, told = client.fit(arrays, metadata | ({"question": action} if category == "query" else {}))
        told = {**told, "samples": samples}
    if "round" in metadata:
        told["round"] = metadata["round"]
    reply = Payload(dict(zip(client.array_names, made, strict=True)), told)
    return Message(encoder.record(reply), reply_to=message)


def handle(message: Message, context: Context) -> Message:
    """Answer a message as the client that this node is; it raises what `client_node.guarded` does."""
    return unmask(message, context) if message.metadata.message_type == UNMASK else guarded(_answer, message, context)


def prepare(context: Context) -> None:
    """Open data, partition and model of a run, which `get_runtime` keeps, unless messages will find a GPU.

    Nothing of a GPU survives a fork.
    """
    place = place_of(context)
    if context.run_config.get("run.device") == "cpu" or not torch.cuda.is_available():
        _open(place, context)


def _open(place: NodeConfig, context: Context) -> Runtime:
    flat = place.obeyed(context.run_config)
    try:
        with only_brought(not place.simulated):
            return get_runtime(flat, place.data_path)
    except ConfigError as error:
        raise place.in_its_words(error) from error


def _answer(message: Message, context: Context) -> Message:
    metadata = decode_metadata(message.content)
    place = place_of(context)
    hello = message.metadata.message_type == "query.hello"
    number = 0 if hello and place.name else client_number(place, metadata)
    runtime = _open(place, context)
    if hello and not place.simulated:  # into this node's log; in simulation the server says it of the same files
        for note in runtime.data.notes:
            tell(f"note: {note}")
    if runtime.trainer.device.type == "cpu":
        keep_heap()
    level = runtime.config.settings.privacy.level
    check_policy(place, runtime.config.settings.privacy)
    if level == "record" and not place.simulated and place.state_path is None:
        raise PayloadError(
            f"privacy.level is {level!r}; this node has no state-path, and would forget at a restart what it spent"
        )
    memory = ClientState(context, number) if hello else memory_of(context, place, number, metadata)
    me = functools.partial(identity, context, place)
    start = runtime.start_digest if hello else ""
    round_ = None if hello else int(metadata.get("round", 0))
    rule = runtime.rule(number, memory, place.least_batch, me, round_)
    client = SparseClient(rule, place.name, runtime.modules, start)
    bitmap, bitmaps = -(-runtime.layout.prunable_size // 8), runtime.config.settings.wire.bitmaps
    encoder = PayloadEncoder(bitmaps, join=not place.simulated)
    return serve(client, message, metadata, encoder, MOST_BITMAPS * bitmap)


class OpenClientApp(ClientApp):
    """Answers any question: which ones there are is known when the message names the strategy."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if message.metadata.message_type.startswith("query."):
            return handle(message, context)
        return super().__call__(message, context)


app = OpenClientApp()
app.train()(handle)
app.evaluate()(handle)
