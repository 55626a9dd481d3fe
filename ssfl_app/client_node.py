"""What a client does with any message: who it is, what it remembers and masks with, what it tells of errors.

It imports no torch. So the second exchange of secure aggregation, `unmask`, which needs no model and no data, does
not wait for it: a plain SuperNode starts a process for each message, and most of its time would be that import.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message

from ssfl_app.comm.node_config import NodeConfig, read_node_config, simulated
from ssfl_app.comm.payload import (
    CLIENT,
    FOLDER,
    RUN,
    ClientState,
    Metadata,
    PayloadEncoder,
    decode_payload,
)
from ssfl_app.comm.ray_cluster import store_of
from ssfl_app.core.summand import Identity, SummandWriter
from ssfl_app.options import ConfigError, PrivateError, build
from ssfl_app.privacy.keys import KEY_FILE, KeyPair, load_or_make, read_pins
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import quoted

UNMASK = "query.unmask"
"""Message type of the second exchange."""

UNFOLDED = 2**20
"""Bytes that deflated arrays of its message may unfold to; with 30 neighbours they are a few kB."""

EXCHANGES = "exchanges"
"""Folder of a node's state-path with a file a run: what was masked with the key that lies beside it."""

_KEY = "ssfl-key"  # record of Flower's state


def guarded(answer: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """Return the answer to a message. Errors leave a node through here only.

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
        return answer(message, context)
    except Exception as error:
        if simulated(context.node_config):
            raise
        raise NodeError(public(error, context.node_config)) from error


def unmask(message: Message, context: Context) -> Message:
    """Answer the second exchange; errors are those of `guarded`."""
    return guarded(_unmask, message, context)


def _unmask(message: Message, context: Context) -> Message:
    section = "privacy."
    keys = {name.removeprefix(section): v for name, v in context.run_config.items() if name.startswith(section)}
    payload, place = decode_payload(message.content, None, UNFOLDED), place_of(context)
    privacy = build(PrivacyOptions, "privacy", keys)
    check_policy(place, privacy)
    number = client_number(place, payload.metadata)
    memory = memory_of(context, place, number, payload.metadata)
    me = functools.partial(identity, context, place)
    told = SummandWriter(number, me, memory, privacy.secure_aggregation, privacy.threshold).unmask(payload)
    told.metadata.update({name: payload.metadata[name] for name in ("round",) if name in payload.metadata})
    return Message(PayloadEncoder().record(told), reply_to=message)


def place_of(context: Context) -> NodeConfig:
    """Return what the node was started with; ConfigError as `read_node_config` has it."""
    sites = context.run_config.get("data.where") == "sites"
    return read_node_config(context.node_config, "sites" if sites else "shared")


class NodeError(RuntimeError):
    """What a real node tells its server of an error: no file, no folder, nothing that it did not mean to tell."""


def public(error: Exception, node_config: Mapping[str, object]) -> str:
    """Return what may be told of an error: all of it if it is about the message or the keys, else its kind."""
    text = ""
    if isinstance(error, PrivateError):
        text = error.public
    elif isinstance(error, ConfigError | PayloadError):
        text = str(error)
    folders = [value for value in node_config.values() if isinstance(value, str) and "/" in value]
    folders.append(os.environ.get("HOME", ""))
    if not text or any(folder in text for folder in folders if len(folder) > 1):
        text = "what it says is in the log of this node"
    kind = ConfigError if isinstance(error, PrivateError) else type(error)
    return f"{kind.__name__}: {text}"


def check_policy(place: NodeConfig, privacy: PrivacyOptions) -> None:
    """Raise PayloadError if the options of a run are not what a node's people demand of one.

    With pins also what undoes them: protection against a server that lies.
    """
    if place.masked_by and not privacy.secure_aggregation:
        rule = f"this node was started with {place.masked_by} and answers masked only"
        raise PayloadError(f"privacy.secure-aggregation is false; {rule}")
    if place.pins is not None and privacy.threshold < 2 / 3 - 1e-9:
        rule = "this node was started with --pin and answers at 2/3 or above"
        raise PayloadError(f"privacy.threshold is {privacy.threshold:g}; {rule}")


def client_number(place: NodeConfig, metadata: Mapping[str, Any]) -> int:
    """Return the number of the client that a node is: its own, or the one the server's message gives to its name."""
    number = metadata.get(CLIENT) if place.number is None else place.number
    if type(number) is not int or not 0 <= number < 2**31:
        raise PayloadError(f"{CLIENT} is {quoted(number)}; a message to site {place.name!r} states its number")
    return number


def memory_of(context: Context, place: NodeConfig, number: int, metadata: Metadata) -> ClientState:
    """Return where a client keeps things: below a state-path, in a simulation's folder, or in Flower's state.

    A node has a folder of its own for each run. That of a site bears its name, whatever its number is.

    Raises
    ------
    PayloadError
        A server names a real node's folder, or the run's token, which becomes the name of one, is not 16 hex digits.
    """
    folder = metadata.get(FOLDER)
    if place.simulated:
        return ClientState(context, number, store_of(str(folder)) if folder else None)
    if folder is not None:
        raise PayloadError(f"the message has the fact {FOLDER}, which is for simulations; a real node obeys none")
    if place.state_path is None:
        return ClientState(context, number)
    token = metadata.get(RUN)
    if not isinstance(token, str) or not re.fullmatch("[0-9a-f]{16}", token):
        raise PayloadError(f"{RUN} is {quoted(token)}; it is 16 hex digits")
    # A site's number is the server's word: under another one it must find what it spent and answered.
    own = 0 if place.name else number
    # Beside the key, not in the run's folder, which people remove: the token and the key make the masks.
    journal = place.state_path / EXCHANGES / f"{token}.safetensors"
    return ClientState(context, own, place.state_path / token / place.name, survives=True, journal=journal)


def identity(context: Context, place: NodeConfig) -> Identity:
    """Return the keys of a client: a file below a real node's state-path, of simulated ones in Flower's state.

    Raises
    ------
    ConfigError
        A real node has no state-path, or what lies there cannot be read.
    """
    if not place.simulated:
        if place.state_path is None:
            raise ConfigError(
                "state-path is missing in --node-config; with privacy.secure-aggregation a node keeps its key there"
            )
        pins = frozenset[str]() if place.pins is None else read_pins(place.pins)
        return Identity(load_or_make(place.state_path / KEY_FILE), pins, place.least_clients)
    held: Any = context.state.get(_KEY)
    if held is None:
        keys = KeyPair.new()
        context.state[_KEY] = ConfigRecord({"private": keys.private_bytes()})
        return Identity(keys)
    return Identity(KeyPair.of(bytes(held["private"])))
