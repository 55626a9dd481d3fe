"""Flower's ClientApp: a NumPyClient, served through the Message API.

`SparseClient` speaks NumPy: arrays in, arrays out. In a training round of SSFL these arrays are the alive values and
nothing else. `serve` is the adapter that lets strategies of the Message API drive such a client.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from ssfl_app.comm.messenger import CLIENT, FOLDER, RUN
from ssfl_app.comm.node_config import NodeConfig, read_node_config, simulated
from ssfl_app.comm.payload import ClientState, Metadata, Payload, PayloadEncoder, decode_metadata, decode_payload
from ssfl_app.core.client import ClientAlgorithm, Need
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.runtime import code_digest, get_runtime, gpu_is_hidden
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.strategies import REGISTRY
from ssfl_app.text import quoted, tell
from ssfl_app.training.malloc import keep_heap

MOST_BITMAPS = 4
"""Bitmaps of a message; what else it holds is never deflated."""

NDArrays = list[npt.NDArray[Any]]


class SparseClient(NumPyClient):
    """One client's half of a strategy behind Flower's NumPyClient interface.

    Parameters
    ----------
    rule : ClientAlgorithm
        The algorithm, at this client's site.
    name : str
        Of a site with data of its own; "": the client goes by its number.

    Notes
    -----
    ``config["arrays"]`` names the arrays in order, e.g. "values,mask"; so does the returned metric "arrays".
    """

    def __init__(self, rule: ClientAlgorithm, name: str = "") -> None:
        self.rule = rule
        self.name = name

    def get_properties(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return who this client is, what it holds and what it works with."""
        site = self.rule.context
        return {
            **({"name": self.name} if self.name else {"client": site.client_id}),
            **site.data.holding(*site.indices).metadata(),
            "device": str(site.trainer.device),
            "gpu-is-hidden": gpu_is_hidden(),
            "code": code_digest(),
        }

    def fit(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[NDArrays, int, dict[str, Any]]:
        """Train, or answer ``config["question"]``; return arrays, samples and metadata."""
        payload, trainer = _payload(parameters, config), self.rule.context.trainer
        passes, looks = trainer.passes, trainer.looks
        try:
            question = config.get("question")
            reply = self.rule.train(payload) if question is None else self.rule.answer_query(question, payload)
        except Need as need:
            return [], 0, {"need": str(need)}
        work = {"passes": trainer.passes - passes, "looks": trainer.looks - looks}
        metadata = {**reply.metadata, **work, **self._notes(), "arrays": ",".join(reply.arrays)}
        return list(reply.arrays.values()), int(reply.metadata["samples"]), metadata

    def evaluate(self, parameters: NDArrays, config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        """Test the model on this client's own test images; return loss, samples and metadata."""
        passes = self.rule.context.trainer.passes
        try:
            metadata = self.rule.evaluate(_payload(parameters, config))
        except Need as need:
            return 0.0, 0, {"need": str(need)}
        metadata["passes"] = self.rule.context.trainer.passes - passes  # of methods that fine-tune before they test
        metadata |= self._notes()
        return float(metadata.get("loss", 0.0)), int(metadata["samples"]), metadata

    def _notes(self) -> Metadata:
        notes = self.rule.context.memory.notes
        return {"note": "; ".join(notes)} if notes else {}


def _payload(parameters: NDArrays, config: dict[str, Any]) -> Payload:
    names = [name for name in str(config.get("arrays", "")).split(",") if name]
    metadata = {key: value for key, value in config.items() if key not in ("arrays", "question")}
    return Payload(dict(zip(names, parameters, strict=True)), metadata)


def serve(client: NumPyClient, message: Message, packer: PayloadEncoder | None = None, unfolded: int = 0) -> Message:
    """Answer a message of the Message API by a NumPyClient; `packer` writes the answer.

    Deflated arrays of the message may unfold to so many bytes together.

    ``query.hello`` asks for properties, ``query.<question>`` and ``train`` call `fit`, ``evaluate`` calls
    `evaluate`. The round and the digest go back as they came, so that the server can tell what was answered.
    """
    payload = decode_payload(message.content, unfolded=unfolded)
    category, _, action = message.metadata.message_type.partition(".")
    config = {**payload.metadata, "arrays": ",".join(payload.arrays)}
    arrays: NDArrays = []
    if action == "hello":
        metadata = dict(client.get_properties(config))
    elif category == "evaluate":
        loss, samples, metadata = client.evaluate(list(payload.arrays.values()), config)
        metadata = {"loss": loss, **metadata, "samples": samples}
    else:
        question = {"question": action} if category == "query" else {}
        arrays, samples, metadata = client.fit(list(payload.arrays.values()), config | question)
        metadata = {**metadata, "samples": samples}
    names = [name for name in str(metadata.pop("arrays", "")).split(",") if name]
    if "round" in payload.metadata:
        metadata["round"] = payload.metadata["round"]
    reply = Payload(dict(zip(names, arrays, strict=True)), metadata)
    return Message((packer or PayloadEncoder()).record(reply), reply_to=message)


def handle(message: Message, context: Context) -> Message:
    """Answer a message as the client that this node is. Errors leave a node through here only.

    Raises
    ------
    NodeError
        Anything went wrong at a real node. Flower sends this text to the server, and writes it into the node's own
        log with the error that is its cause.
    ConfigError
        In simulation: the client was started with keys that do not fit the run, or its data cannot be read.
    PayloadError
        In simulation: the message is not one for this node.
    """
    try:
        return _answer(message, context)
    except Exception as error:
        if simulated(context.node_config):
            raise
        raise NodeError(public(error, context.node_config)) from error


class NodeError(RuntimeError):
    """What a real node tells its server of an error: no file, no folder, nothing that it did not mean to tell."""


def public(error: Exception, node_config: Mapping[str, object]) -> str:
    """Return what may be told of an error: all of it if it is about the message or the keys, else its kind."""
    text = ""
    if isinstance(error, PrivateError):
        text = error.public
    elif isinstance(error, ConfigError | PayloadError):
        text = str(error)
    folders = [
        os.environ.get("HOME", ""),
        *(value for value in node_config.values() if isinstance(value, str) and "/" in value),
    ]
    if not text or any(folder in text for folder in folders if len(folder) > 1):
        text = "what it says is in the log of this node"
    kind = ConfigError if isinstance(error, PrivateError) else type(error)
    return f"{kind.__name__}: {text}"


def _answer(message: Message, context: Context) -> Message:
    metadata = decode_metadata(message.content)
    sites = context.run_config.get("data.where") == "sites"
    place = read_node_config(context.node_config, "sites" if sites else "shared")
    hello = message.metadata.message_type == "query.hello"
    number = 0 if hello and place.name else client_number(place, metadata)
    flat = place.obeyed(context.run_config)
    try:
        runtime = get_runtime(flat, place.data_path)
    except ConfigError as error:
        raise place.in_its_words(error) from error
    if hello and not place.simulated:  # into this node's log; in simulation the server says it of the same files
        for note in runtime.data.notes:
            tell(f"note: {note}")
    if runtime.trainer.device.type == "cpu":
        keep_heap()
    memory = ClientState(context, number) if hello else memory_of(context, place, number, metadata)
    rule = runtime.rule(number, memory, place.least_batch)
    bitmap, packer = -(-runtime.layout.prunable_size // 8), PayloadEncoder(runtime.config.settings.wire.bitmaps)
    return serve(SparseClient(rule, place.name), message, packer, MOST_BITMAPS * bitmap)


def client_number(place: NodeConfig, metadata: Mapping[str, Any]) -> int:
    """Return the number of the client that a node is: its own, or the one the server gives to its name.

    Raises
    ------
    PayloadError
        The node goes by its name and the message states no number.
    """
    number = metadata.get(CLIENT) if place.number is None else place.number
    if type(number) is not int or not 0 <= number < 2**31:
        raise PayloadError(f"{CLIENT} is {quoted(number)}; a message to site {place.name!r} states its number")
    return number


def memory_of(context: Context, place: NodeConfig, number: int, metadata: Metadata) -> ClientState:
    """Return where a client keeps things: below a state-path, in a simulation's folder, or in Flower's state.

    A node has a folder of its own for each run. That of a site bears its name, since its number is the server's word.

    Raises
    ------
    PayloadError
        A server names a real node's folder, or the run's token, which becomes the name of one, is not 16 hex digits.
    """
    folder = metadata.get(FOLDER)
    if place.simulated:
        return ClientState(context, number, Path(str(folder)) if folder else None)
    if folder is not None:
        raise PayloadError(f"the message has the fact {FOLDER}, which is for simulations; a real node obeys none")
    if place.state_path is None:
        return ClientState(context, number)
    token = metadata.get(RUN)
    if not isinstance(token, str) or not re.fullmatch("[0-9a-f]{16}", token):
        raise PayloadError(f"{RUN} is {quoted(token)}; it is 16 hex digits")
    return ClientState(context, number, place.state_path / token / place.name, survives=True)


app = ClientApp()
app.train()(handle)
app.evaluate()(handle)
for _question in ("hello", *sorted({q for s in REGISTRY.values() for q in s.client.query_types})):
    app.query(_question)(handle)
