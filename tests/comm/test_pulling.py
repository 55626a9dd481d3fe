"""No pull waits for an upload: the client that is stuck is lost by name, and the others' replies come meanwhile."""

import json
import re
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from ssfl_app.comm import exchange, membership, pulling
from ssfl_app.comm.exchange import MessageExchange
from ssfl_app.comm.handshake import HandshakePoller
from ssfl_app.comm.membership import ClientRegistry
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.config import Flat, merge, parse
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.strategy import SSFL
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.values import PayloadError
from tests.comm.test_handshake import MovingGrid
from tests.in_process_grid import SMALL, DeploymentGrid, play
from tests.plugin import test_rounds
from tests.uploads import Upload, Uploading, all_but_the_last, at_once, breaks_off, every, never

TIMEOUT = 1.0
STUCK = "no whole answer within 1 s: its upload did not end"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exchange, membership):
        monkeypatch.setattr(module, "DEPLOYMENT_POLL", 0.01)


def node(message: Message, context: Any) -> Message:
    """Answer with 32 kB."""
    return Message(
        PayloadEncoder().record(Payload({"values": np.ones(8192, np.float32)}, {"samples": 1})), reply_to=message
    )


def exchanged(uploads: dict[int, Upload], reply_bytes: int = 32768) -> tuple[list[int], MessageExchange, Uploading]:
    """Send a message to each of these nodes and return who answered, in order."""
    grid = Uploading(InlineGrid(node, {}, {k: k for k in uploads}), lambda m: uploads[m.metadata.dst_node_id])
    sent = MessageExchange(grid, TIMEOUT, reply_bytes)
    sent.send({k: Message(RecordDict(), k, "train", ttl=TIMEOUT) for k in uploads})
    began = time.monotonic()
    answered = [client for client, _ in sent.replies()]
    assert time.monotonic() - began < TIMEOUT + 1
    return answered, sent, grid


@pytest.mark.parametrize("upload", [never, all_but_the_last, every(0.7)])
def test_a_stuck_upload_costs_its_client_and_nobody_waits(upload: Upload) -> None:
    answered, sent, grid = exchanged({0: upload, 1: at_once, 2: every(0.02)})
    assert answered == [1, 2]
    assert sent.report.lost == {0: STUCK}
    assert sent.report.refused == {}
    assert len(grid.confirmed) == 2


def test_an_upload_that_ends_in_time_is_taken() -> None:
    answered, sent, grid = exchanged({0: every(0.1), 1: at_once})
    assert answered == [1, 0]
    assert sent.report.lost == {}
    # While an object is missing a look costs one request, and what is there is not pulled again and again.
    assert grid.looks < 200


def test_objects_that_come_one_by_one_are_pulled_twice_at_most() -> None:
    """Not all that is there at each look, which would cost the square of a large model's chunks."""
    arrays = {f"a{i}": np.full(64, i, np.float32) for i in range(30)}
    grid = Counting(
        InlineGrid(
            lambda m, c: Message(PayloadEncoder().record(Payload(arrays, {"samples": 1})), reply_to=m), {}, {0: 0}
        ),
        lambda m: every(0.01),
    )
    sent = MessageExchange(grid, 5.0, 32768)
    sent.send({0: Message(RecordDict(), 0, "train", ttl=5.0)})
    assert len(list(sent.replies())) == 1
    assert grid.served <= 2 * len(grid._objects)


def test_one_request_asks_for_all_replies_that_are_awaited() -> None:
    asked = list[int]()

    class Asked(Uploading):
        def PullMessages(self, request: Any) -> Any:  # noqa: N802
            asked.append(len(request.message_ids))
            return super().PullMessages(request)

    grid = Asked(InlineGrid(node, {}, {k: k for k in range(4)}), lambda m: every(0.1))
    sent = MessageExchange(grid, 5.0, 32768)
    sent.send({k: Message(RecordDict(), k, "train", ttl=5.0) for k in range(4)})
    assert sorted(client for client, _ in sent.replies()) == [0, 1, 2, 3]
    assert asked == [4]  # and what is announced is not asked for again while it is uploaded


class Counting(Uploading):
    """Counts the objects that it hands out."""

    served = 0

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        told = super().PullObject(request)
        self.served += told.object_found and told.object_available
        return told


class Forged(Uploading):
    """The reply of node 0 has another body of its array than Flower would write."""

    body: Any = None

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        told = super().PullMessages(request)
        for message, tree in zip(told.messages_list, told.message_object_trees, strict=True):
            if self._asked[message.metadata.reply_to_message_id].metadata.dst_node_id == 0:
                for name in {node.object_id for node in iterate_object_tree(tree)}:
                    content, there = self._objects[name]
                    if content.startswith(b"Array "):
                        self._objects[name] = self.forged(content), there
        return told

    def forged(self, content: bytes) -> bytes:
        head, body = content.split(b"\0", 1)
        body = self.body(body)
        kind, children, _ = head.decode().split(" ")
        return f"{kind} {children} {len(body)}".encode() + b"\0" + body


def repeated(body: bytes) -> bytes:
    return json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 2000}).encode()


@pytest.mark.parametrize(("body", "reason"), [
    (repeated, r"the reply unfolds to 655\d+ bytes; it has at most \d+"),
    (lambda body: b"[" * 200_000, r"the reply is no message: Flower cannot read it \(RecursionError\)"),
    (lambda body: b"7", r"the reply is no message: Flower cannot read it \(TypeError\)"),
])  # fmt: skip
def test_bytes_that_are_no_message_are_refused_and_the_others_count(body: Any, reason: str) -> None:
    """A chunk that stands in an array a thousand times, JSON of any depth: of a round, and of the handshake."""

    def answer(message: Message, context: Any) -> Message:
        values = np.full(8192, message.metadata.dst_node_id, np.float32)  # no object of two replies
        return Message(PayloadEncoder().record(Payload({"values": values}, {"samples": 1})), reply_to=message)

    def forging() -> Forged:
        grid = Forged(InlineGrid(answer, {}, {0: 0, 1: 1}), lambda m: at_once)
        grid.body = body
        return grid

    sent = MessageExchange(forging(), TIMEOUT, 32768)
    sent.send({k: Message(RecordDict(), k, "train", ttl=TIMEOUT) for k in (0, 1)})
    assert [client for client, _ in sent.replies()] == [1]
    assert re.match(reason, sent.report.refused[0])
    poller = HandshakePoller(forging(), time.monotonic() + 5)
    poller.ask([0, 1])
    while poller.silent([0, 1]):
        poller.hear()
    assert "unfolds to" in poller.odd[0] or "is no message" in poller.odd[0]


def test_an_upload_that_breaks_off_is_lost_at_once() -> None:
    began = time.monotonic()
    answered, sent, _ = exchanged({0: breaks_off, 1: at_once})
    assert time.monotonic() - began < TIMEOUT / 2
    assert (answered, sent.report.lost) == ([1], {0: "its upload broke off"})


def test_a_reply_of_too_many_bytes_or_objects_is_refused_while_it_is_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BESIDES", 10_000)
    answered, sent, grid = exchanged({0: at_once}, reply_bytes=1000)
    assert (answered, sent.report.refused) == ([], {0: "the reply has more than 14000 bytes"})
    assert len(grid.confirmed) == 1  # the SuperLink need not keep it
    monkeypatch.setattr(pulling, "MOST_OBJECTS", 3)
    answered, sent, grid = exchanged({0: at_once})
    assert answered == []
    assert "objects; it has at most 3" in sent.report.refused[0]
    assert grid.looks == 0


def test_a_reply_is_known_by_what_was_asked_for() -> None:
    """A reply that says that it answers another client's message is still its sender's."""
    first: list[str] = []

    def claims(message: Message, context: Any) -> Message:
        reply = node(message, context)
        first.append(message.metadata.message_id)
        reply.content["arrays"] = PayloadEncoder().record(Payload({"values": np.zeros(len(first), np.float32)}))[
            "arrays"
        ]
        if len(first) == 2:
            reply.metadata.__dict__["_reply_to_message_id"] = first[0]
        return reply

    class Held(InlineGrid):
        in_process = False

    grid = Held(claims, {}, {0: 0, 1: 1})
    sent = MessageExchange(grid, TIMEOUT)
    sent.send({k: Message(RecordDict(), k, "train", ttl=TIMEOUT) for k in (0, 1)})
    assert {k: len(r.content["arrays"]["values"].data) for k, r in sent.replies()} == {0: 4, 1: 8}


# ---- runs ----------------------------------------------------------------------------------------

KEYS: Flat = {"strategy": "fedavg", "run.clients": 3, "run.cohort": 3, "run.rounds": 2, "run.round-timeout": 10.0}


def uploads_of(client: int, kind: str, upload: Upload) -> Any:
    """Return how replies are uploaded: those of one client to one kind of message in another way."""

    def of(message: Message) -> Upload:
        metadata: Any = message.content.get("facts", ConfigRecord())
        mine = message.metadata.dst_node_id == client and message.metadata.message_type == kind
        return upload if mine and int(metadata.get("round", 1)) == 1 else at_once

    return of


def test_a_round_ends_in_its_time_whatever_a_node_uploads() -> None:
    inner = DeploymentGrid(merge(SMALL, KEYS))
    stuck = next(n for n, c in inner._contexts.items() if inner.number(c) == 1)
    grid: Any = Uploading(inner, uploads_of(stuck, "train", every(100.0)), patience=60.0)
    records = play(KEYS, grid=grid).records
    assert records[1]["lost"] == {"1": "no whole answer within 10 s: its upload did not end"}
    assert (records[1]["ok"], records[2]["ok"]) == ([0, 2], [0, 1, 2])
    assert records[1]["seconds"] < 10 + 5


def test_a_handshake_ends_in_its_time_and_names_the_node_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = DeploymentGrid(merge(SMALL, KEYS))
    stuck = next(n for n, c in inner._contexts.items() if inner.number(c) == 1)
    grid = Uploading(inner, uploads_of(stuck, "query.hello", never))
    made = ClientRegistry(parse(merge(SMALL, KEYS)).settings.run.clients, 3.0)
    said = list[str]()
    made.say = said.append
    monkeypatch.setattr(membership, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(RunFailed, match=rf"missing: 1 \(node {stuck} no whole answer: its upload did not end\)"):
        made.wait_for_clients(grid)
    assert time.monotonic() - began < 3 + 5
    # Before its time is over, an upload that has begun is a slow link, and no reason to set a node aside.
    assert said == ["2 of 3 clients are here; waiting for the others within run.join-timeout 3 s"]


def test_a_node_that_would_rejoin_and_is_stuck_costs_the_time_to_rejoin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "REJOIN_TIMEOUT", 1.0)
    inner = MovingGrid(merge(SMALL, KEYS), {2: (1, 77, {"partition-id": 1, "num-partitions": 3})})
    grid: Any = Uploading(inner, uploads_of(77, "query.hello", all_but_the_last), patience=60.0)
    records = play(KEYS, grid=grid).records
    assert records[2]["strangers"] == {"77": "no whole answer: its upload did not end"}
    assert list(records[2]["lost"]) == ["1"]
    assert records[2]["ok"] == [0, 2]


def test_a_round_of_the_plug_in_ends_in_its_time() -> None:
    inner = test_rounds.ForeignGrid(test_rounds.foreign_app(), nodes=3)
    stuck = uploads_of(1001, "train", all_but_the_last)
    grid: Any = Uploading(inner, stuck, patience=60.0)
    strategy = SSFL(density=0.5, min_ok_fraction=0.5)
    test_rounds.play(strategy=strategy, grid=grid, rounds=2, timeout=4.0)
    discovery, first, second = strategy.history
    assert discovery["ok"] == [1000, 1001, 1002]
    assert first["lost"] == {"1001": "no whole answer within 4 s: its upload did not end"}
    assert second["ok"] == [1000, 1001, 1002]
    assert first["seconds"] < 4 + 5


def test_flowers_own_pull_waits() -> None:
    """What the tests above guard against: as soon as this fails, `pulling` can go."""
    grid = Uploading(InlineGrid(node, {}, {0: 0}), lambda message: never, patience=0.5)
    message = Message(RecordDict(), 0, "train", ttl=9.0)
    with pytest.raises(AssertionError, match="waits for an upload"):
        grid.pull_messages(grid.push_messages([message]))


def test_reasons_are_told_in_a_line() -> None:
    text = str(PayloadError("a\x1b[2J\nb" * 1000))
    assert text.isprintable()
    assert len(text) == 300
