"""The client side of sums: what a node answers where the server only adds, masked under secure aggregation.

A node makes its key pair when it is first asked for the public key, and keeps it in Flower's `Context.state` beside
the exchanges that it answered. Who loses one loses the other: with new keys no mask is used twice.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context

from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.core.summand import EXCHANGE, OWN, Identity, SummandWriter
from ssfl_app.privacy.keys import KeyPair
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import quoted

KIND = "fixed32"
READS = ("ssfl", "digest", "values", "scales")
"""Facts and arrays of a message that an answer is made of."""

_WORK = ("values", "weight-key", "criterion", "weighting", "batches")

KEY, NUMBER, THRESHOLD = "key", "number", "threshold"
"""An array and facts of messages about sums: a node's public key, its number, and `SSFL`'s threshold."""

KEYS = "ssfl-keys"
"""Record of Flower's `Context.state` that holds a node's private key."""


def public_key(context: Context) -> Payload:
    """Return the answer to the question for a node's public key, which is made if there is none."""
    if KEYS not in context.state:
        context.state[KEYS] = ConfigRecord({"private": KeyPair.new().private_bytes()})
    return Payload({KEY: np.frombuffer(_pair(context).public, np.uint8)})


def _pair(context: Context) -> KeyPair:
    held = context.state.get(KEYS)
    if not isinstance(held, ConfigRecord):
        raise PayloadError(
            "this node lost its keys, as after a restart; it takes part again when it has told new ones"
        )
    private: Any = held["private"]
    return KeyPair.of(private)


def terms_of_work(facts: Mapping[str, object], config: Mapping[str, object]) -> str:
    """Return how an answer is made, as a message says it: by the user's own config, too.

    Masks are bound to it: with a learning rate of 0 for all but one node the sum would be the answer of that one.
    """
    return repr((sorted(config.items()), [facts.get(name) for name in _WORK]))


class NodeSummands(SummandWriter):
    """Writes the answer of a node to one message.

    Raises
    ------
    PayloadError
        The server knows another key of this node, or says what cannot be: at once, before anybody trains in vain.
    """

    def __init__(self, payload: Payload, context: Context, config: Mapping[str, object]) -> None:
        facts, secure = payload.metadata, EXCHANGE in payload.metadata
        number, threshold = facts.get(NUMBER, 0), facts.get(THRESHOLD, 0.5)
        if type(number) is not int or not 0 <= number < 2**32:
            raise PayloadError(f"{NUMBER} is {quoted(number)}; it is a whole number of 4 bytes")
        if not isinstance(threshold, float) or not 0.5 <= threshold < 1:
            raise PayloadError(f"{THRESHOLD} is {quoted(threshold)}; it is a number from 0.5 to below 1")
        if secure and facts.get(OWN) != _pair(context).public:
            raise PayloadError("the server has another key of this node than it works with; it is asked again")
        terms = terms_of_work(facts, config)
        super().__init__(
            number, lambda: Identity(_pair(context)), ClientState(context, 0), secure, threshold, bound=terms
        )


def whole_weight(weight: float) -> int:
    """Return the weight of an answer that is only added; ValueError if it is no whole number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight % 1:
        raise ValueError("the weight of a reply is no whole number; where replies are only added it is one")
    return int(weight)
