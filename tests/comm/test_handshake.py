"""The handshake: lost and malformed ones, nodes that come, go and come back under another id."""

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm import handshake, membership
from ssfl_app.comm.handshake import Handshake, read_handshake
from ssfl_app.comm.membership import Claim, ClientRegistry
from ssfl_app.comm.payload import Payload, PayloadEncoder
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.locks import RunFailed
from ssfl_app.runtime import get_runtime
from ssfl_app.sparsity.values import PayloadError
from tests.in_process_grid import (
    SMALL,
    WHOLE,
    DeploymentGrid,
    Fault,
    Played,
    ScriptedGrid,
    answer_error,
    keep_silent,
    play,
    pose,
    tamper,
)

pytestmark = pytest.mark.narrow

ONE: Flat = {"run.rounds": 1, "run.clients": 4, "run.cohort": 4, "strategy": "fedavg", **WHOLE}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "RETRY", 0.05)
    monkeypatch.setattr(handshake, "TRY", 0.3)
    monkeypatch.setattr(membership, "REJOIN_TIMEOUT", 2.0)
    monkeypatch.setattr(membership, "DEPLOYMENT_POLL", 0.01)
    monkeypatch.setattr("ssfl_app.comm.exchange.DEPLOYMENT_POLL", 0.01)


def times(count: int, fault: Fault) -> Fault:
    """Misbehave `count` times, then work."""
    left = count

    def some(grid: ScriptedGrid, message: Message) -> Message | None:
        nonlocal left
        left -= 1
        return fault(grid, message) if left >= 0 else grid.work(message)

    return some


def metadata(**new: Any) -> Fault:
    return tamper(lambda p: Payload(p.arrays, {k: v for k, v in {**p.metadata, **new}.items() if v is not None}))


def meet(grid: ScriptedGrid, bound: dict[Claim, int] | None = None, **keys: Any) -> ClientRegistry:
    """Greet the nodes of a grid, and nothing else."""
    run = parse(merge(SMALL, {**ONE, **{f"run.{k.replace('_', '-')}": v for k, v in keys.items()}})).settings.run
    made = ClientRegistry(run.clients, run.join_timeout)
    made.bound = lambda: bound or {}
    made.say = said.append
    said.clear()
    made.wait_for_clients(grid)
    return made


said: list[str] = []
"""What people were told at the last handshake."""


def grid(faults: dict[Any, Fault] | None = None, configs: list[Flat] | None = None) -> ScriptedGrid:
    get_runtime(merge(SMALL, ONE))  # seconds, which the first handshake would seem to be lost in
    return ScriptedGrid(merge(SMALL, ONE), 0, faults, configs)


@pytest.mark.parametrize("fault", [answer_error(5), answer_error(1), keep_silent], ids=["gone", "import", "silent"])
def test_a_lost_handshake_is_asked_again(fault: Fault) -> None:
    flaky = grid({("query.hello", 0, 2): times(2, fault)})
    assert sorted(meet(flaky).nodes) == [0, 1, 2, 3]
    assert [where[2] for where in flaky.log].count(2) == 3
    assert [where[2] for where in flaky.log].count(1) == 1


def test_handshakes_are_not_asked_more_often_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "RETRY", 0.2)
    flaky = grid({("query.hello", 0, 2): answer_error(5)})
    with pytest.raises(RunFailed, match=r"3 of 4 clients joined .* missing: 2 \(node \d+ Flower error 5: scripted\)"):
        meet(flaky, join_timeout=1.0)
    assert 3 <= [where[2] for where in flaky.log].count(2) <= 6


def test_two_nodes_with_one_masking_key_are_both_named_and_have_no_place() -> None:
    """As where a machine was copied with its state-path; or one of them says what is another's."""
    twins = {("query.hello", 0, client): metadata(key=b"k" * 32) for client in (1, 3)}
    with pytest.raises(RunFailed, match=r"^2 of 4 .* missing: 1, 3") as caught:
        meet(grid(twins), join_timeout=0.5)
    assert str(caught.value).count("with the masking key of node") == 2
    assert str(caught.value).count("or one of them lies: compare fingerprints") == 2


@pytest.mark.parametrize(
    ("key", "said"), [(bytes(32), "public key is '0000"), (b"k", "must be 32 bytes"), ("k" * 32, "must be 32 bytes")]
)
def test_a_key_that_is_none_sets_its_node_aside_by_name(key: bytes | str, said: str) -> None:
    with pytest.raises(RunFailed, match=rf"^3 of 4 .* missing: 2 \(node \d+ .*{said}"):
        meet(grid({("query.hello", 0, 2): metadata(key=key)}), join_timeout=0.5)


def test_who_says_no_key_is_set_aside_where_one_is_needed() -> None:
    made = membership.ClientRegistry(4, 0.5, keyed=True)
    told = Handshake(7, 2, "", {})
    assert "says no key; privacy.secure-aggregation is true" in str(made._stranger(told, {}))
    assert made._stranger(replace(told, metadata={"key": b"k" * 32}), {}) is None


@pytest.mark.parametrize("deployed", [False, True], ids=["simulated", "real"])
def test_simulated_nodes_are_asked_a_few_at_a_time(deployed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MOST_IN_FLIGHT", 3)
    met = (DeploymentGrid if deployed else ScriptedGrid)(merge(SMALL, {**ONE, "run.clients": 8}))
    poller, there = handshake.HandshakePoller(met, time.monotonic() + 60), set(met.get_node_ids())
    counts = []
    while poller.silent(there):
        poller.ask(there)
        poller.ask(there)
        counts.append(len(poller._waiting))
        poller.hear()
    assert max(counts) == (8 if deployed else 3)
    assert poller.answered == there


class SlowGrid(ScriptedGrid):
    """The node that is asked first answers its first handshake only after it was asked again, and no later one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.poller: list[tuple[int, str]] = []

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.poller += [(m.metadata.dst_node_id, m.metadata.message_id) for m in messages]
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        first, *later = [i for node, i in self.poller if node == self.poller[0][0]]
        blocked = set(later) if later else {first}
        return super().pull_messages([i for i in message_ids if i not in blocked])


def test_an_answer_to_an_earlier_handshake_counts() -> None:
    slow = SlowGrid(merge(SMALL, ONE))
    assert sorted(meet(slow).nodes) == [0, 1, 2, 3]
    assert len(slow.poller) > 4


def test_a_node_that_leaves_and_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "TRY", 1000.0)
    shaky = grid({("query.hello", 0, 2): times(1, keep_silent)})
    node = next(n for n, c in shaky._contexts.items() if shaky.number(c) == 2)
    asked = itertools.count()

    def there(self: ScriptedGrid) -> list[int]:
        here = next(asked) not in range(5, 10)
        return [n for n in self._contexts if n != node or here]

    monkeypatch.setattr(ScriptedGrid, "get_node_ids", there)
    assert meet(shaky, join_timeout=5.0).nodes[2] == node


BAD = [
    (metadata(client=None), "client is None"),
    (metadata(client="2"), "client is '2'"),
    (metadata(client=True), "client is True"),
    (metadata(client=-1), "client is -1"),
    (metadata(client=2**70), "client is 1180591620717411303424"),
    (metadata(device=7), "device is 7"),
    (metadata(code="x" * 2_000_000), "larger than 1048576"),
    (metadata(name="a"), "a site has a name and no number"),
    (metadata(counts="1,x"), "counts is '1,x'"),
    (metadata(shape="0,8,8"), "shape is '0,8,8'"),
    (lambda g, m: Message(RecordDict(), reply_to=m), "record 'arrays' is not there"),
    (pose(0, client=99), "says that it is client 99, run.clients is 4"),
]


@pytest.mark.parametrize(("fault", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_malformed_handshake_sets_that_node_aside_by_name(fault: Fault, reason: str) -> None:
    odd = grid({("query.hello", 0, 2): fault})
    with pytest.raises(RunFailed, match=r"3 of 4 clients joined; missing: 2") as caught:
        meet(odd)  # no other node comes in simulation: it is not waited for
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.binary(max_size=8)
)
KEYS = st.sampled_from(["client", "name", "code", "device", "classes", "shape", "counts", "test-samples", "x"])
GOOD = {
    "client": 1,
    "code": "c",
    "device": "cpu",
    "classes": "a\nb",
    "shape": "1,2,2",
    "counts": "1,2",
    "test-samples": 3,
}


@st.composite
def records(draw: Any) -> RecordDict:
    """Return anything a node may send: other records, or facts with some of ours spoiled or missing."""
    spoiled: dict[str, Any] = draw(st.dictionaries(KEYS, st.one_of(SCALARS, st.lists(st.integers(0, 9), max_size=2))))
    kept = {key: value for key, value in GOOD.items() if draw(st.booleans())}
    arrays = draw(st.sampled_from([ArrayRecord(), ArrayRecord({"a": Array(np.ones(2))}), MetricRecord({"a": 1})]))
    record = RecordDict({"arrays": arrays, "facts": ConfigRecord(kept | spoiled)})
    for name in draw(st.sets(st.sampled_from(["arrays", "facts"]))):
        if draw(st.booleans()):
            del record[name]
    return record


@settings(max_examples=150, deadline=None)
@given(records())
def test_whatever_a_node_sends_is_a_handshake_or_is_refused(record: RecordDict) -> None:
    asked = Message(RecordDict(), 5, "query.hello")
    try:
        hello = read_handshake(5, Message(record, reply_to=asked))
    except PayloadError:  # the only way out besides a handshake
        return
    assert isinstance(hello, Handshake)
    assert (hello.number is None) is bool(hello.name)
    assert isinstance(hello.metadata["code"], str)


def test_a_good_handshake_is_read() -> None:
    asked = Message(RecordDict(), 5, "query.hello")
    read = read_handshake(5, Message(PayloadEncoder().record(Payload(metadata=GOOD)), reply_to=asked))
    assert (read.number, read.name, read.place) == (1, "", 1)
    site = {key: value for key, value in GOOD.items() if key != "client"} | {"name": "clinic"}
    assert (
        read_handshake(5, Message(PayloadEncoder().record(Payload(metadata=site)), reply_to=asked)).place == "clinic"
    )


SPARE: list[Flat] = [{"partition-id": i} for i in range(5)]


def at(grid: ScriptedGrid, *clients: int) -> list[int]:
    return [next(n for n, c in grid._contexts.items() if grid.number(c) == client) for client in clients]


def test_of_two_nodes_that_claim_one_number_the_first_keeps_it() -> None:
    twice = grid({("query.hello", 0, 4): pose(0)}, SPARE)
    honest, liar = at(twice, 0, 4)
    places = meet(twice).nodes
    assert sorted(places) == [0, 1, 2, 3]
    first = places[0]
    assert first in (honest, liar)
    other = liar if first == honest else honest
    (line,) = said
    assert line.startswith(f"warning: node {other} is set aside: says that it is client 0, which node {first} is; ")


def test_a_run_without_enough_others_names_both_that_claim_one_number() -> None:
    twice = grid({("query.hello", 0, 1): metadata(client=0)})
    with pytest.raises(
        RunFailed, match=r"3 of 4 clients joined; missing: 1 \(node \d+ says that it is client 0, "
    ) as why:
        meet(twice)
    assert all(str(node) in str(why.value) for node in at(twice, 0, 1))


HOSTILE = {
    "a place of another": (pose(0), "says that it is client 0, whose key is that of node {0}"),
    "an extra place": (pose(0, client=99), "says that it is client 99, and its key is that of client 4"),
    "the name of a site": (
        pose(0, client=None, name="extra"),
        "says that it is site 'extra', and its key is that of client 4",
    ),
    "an exception": (answer_error(2, "Traceback\nOSError: no"), "raised: OSError: no"),
    "nonsense": (pose(0, code=3), "its handshake is malformed: code is 3; it is one line of at most 64 characters"),
}


@pytest.mark.parametrize("luck", range(3))
@pytest.mark.parametrize(("fault", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_registered_node_cannot_take_a_place_that_is_bound_nor_end_the_run(
    fault: Fault, reason: str, luck: int
) -> None:
    there = ScriptedGrid(merge(SMALL, ONE), luck, {("query.hello", 0, 4): fault}, SPARE)
    *honest, liar = at(there, 0, 1, 2, 3, 4)
    bound: dict[Claim, int] = dict(enumerate([*honest, liar]))
    assert meet(there, bound).nodes == dict(enumerate(honest))
    assert said in ([], [f"warning: node {liar} is set aside: {reason.format(honest[0])}"])  # [] if it was too late


def test_a_place_that_is_bound_stays_free_for_its_node_until_the_time_is_over() -> None:
    thief = grid({("query.hello", 0, 1): metadata(client=0)})
    zero, one = at(thief, 0, 1)
    del thief._contexts[zero]
    with pytest.raises(
        RunFailed, match=rf"missing: 0, 1 \(node {one} says that it is client 0, whose key is that of"
    ):
        meet(thief, {0: zero}, join_timeout=0.3)


def test_a_node_that_raises_is_named_if_it_is_needed() -> None:
    fault = answer_error(2, "Traceback\nConfigError: data.path is '/x'; there is no such folder")
    with pytest.raises(RunFailed, match=r"missing: 2 \(node \d+ raised: ConfigError: data.path is '/x'"):
        meet(grid({("query.hello", 0, 2): fault}))
    assert sorted(meet(grid({("query.hello", 0, 4): fault}, SPARE)).nodes) == [0, 1, 2, 3]


def test_a_real_node_that_was_put_right_and_is_back_is_greeted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = answer_error(2, "ConfigError: data.path is '/x'; there is no such folder")
    mended = DeploymentGrid(merge(SMALL, ONE), 0, {("query.hello", 0, 2): times(1, broken)})
    node, asked = at(mended, 2)[0], itertools.count()

    def there(self: ScriptedGrid) -> list[int]:
        away = sum(where[2] == 2 for where in self.log) > 0 and next(asked) in range(20, 25)
        return [n for n in self._contexts if n != node or not away]

    monkeypatch.setattr(ScriptedGrid, "get_node_ids", there)
    assert meet(mended, join_timeout=20.0).nodes[2] == node
    assert len(said) == 1


# ---- rejoining ----------------------------------------------------------------------------------


class MovingGrid(DeploymentGrid):
    """Before a round, the nodes of `moves` are set up anew under another id."""

    def __init__(self, config: Flat, moves: dict[int, tuple[int, int, Flat]], **options: Any) -> None:
        super().__init__(config, **options)
        self.moves = moves  # round -> (client that leaves, new node, its node config)
        self.trained = 0
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        move = self.moves.pop(self.trained + 1, None)
        if move is not None:
            client, node, config = move
            old = next(n for n, c in self._contexts.items() if self.number(c) == client)
            del self._contexts[old]
            self.add(node, config)
        return list(self._contexts)

    def push_messages(self, messages: Any) -> Any:
        known = [m for m in messages if m.metadata.dst_node_id in self._contexts]
        self.asked += [m.metadata.dst_node_id for m in known if m.metadata.message_type == "query.hello"]
        self.trained = max([self.trained, *(int(m.metadata.group_id or 0) for m in known)])
        return super().push_messages(known)


@pytest.fixture
def moved() -> Any:
    keys: Flat = {"run.rounds": 2, "run.clients": 4, "run.cohort": 4, "run.evaluate-every": 2, **WHOLE}

    def run(moves: dict[int, tuple[int, int, Flat]], **options: Any) -> Played:
        return play(keys, grid=MovingGrid(merge(SMALL, keys), moves, **options))

    return run


def test_a_node_under_another_id_takes_its_old_place(moved: Any) -> None:
    good, played = moved({}), moved({2: (1, 77, {"partition-id": 1, "num-partitions": 4})})
    assert played.bits() == good.bits()
    assert [record.get("rejoined") for record in played.records] == [None, None, [1]]
    assert all(not record["lost"] and not record["refused"] for record in played.records[1:])
    # The new node does not hold the mask: it gets it with its first message, and is not left to ask.
    bitmap = -(-played.layout.prunable_size // 8)
    assert played.records[2]["bytes_mask_down"] == bitmap
    assert played.records[2]["messages_train_down"] == 4
    assert played.grid.asked.count(77) == 1


def test_nodes_that_have_no_place_are_not_let_in(moved: Any) -> None:
    played = moved({2: (1, 77, {"partition-id": 2, "num-partitions": 4})})
    assert played.records[2]["strangers"] == {"77": "says that it is client 2: its node is still there"}
    assert list(played.records[2]["lost"]) == ["1"]
    assert played.records[2]["ok"] == [0, 2, 3]


def test_a_node_with_other_code_does_not_take_a_place(moved: Any) -> None:
    fault = metadata(code="another")
    moves: dict[int, tuple[int, int, Flat]] = {2: (1, 77, {"partition-id": 1, "num-partitions": 4})}
    played = moved(
        moves, faults={("query.hello", 0, 1): lambda g, m: fault(g, m) if 77 in g._contexts else g.work(m)}
    )
    assert played.records[2]["strangers"] == {"77": "says that it is client 1, with another code than before"}
    assert list(played.records[2]["lost"]) == ["1"]


class Theft(MovingGrid):
    """Client 1 is away in round 2, somebody else says meanwhile that it is client 1, and is back in round 3."""

    def __init__(self, config: Flat, **options: Any) -> None:
        super().__init__(config, {2: (1, 77, {"partition-id": 1, "num-partitions": 4})}, **options)
        (self.true,) = at(self, 1)
        self.away = self._contexts[self.true]

    def get_node_ids(self) -> list[int]:
        if self.trained == 2:
            self._contexts.setdefault(self.true, self.away)
        return super().get_node_ids()


def test_much_noise_leaves_who_takes_a_place_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MOST_WARNINGS", 2)
    keys: Flat = {"run.rounds": 3, "run.clients": 4, "run.cohort": 4, "run.evaluate-every": 3, **WHOLE}
    theft = Theft(merge(SMALL, keys))
    told: list[str] = []

    def prepare(strategy: SparseStrategy) -> None:
        strategy.messenger.registry.say = told.append
        strategy.messenger.registry._tell(dict.fromkeys(range(100, 105), "raised: no"))

    play(keys, grid=theft, prepare=prepare)
    assert told == [
        "warning: node 100 is set aside: raised: no",
        "warning: node 101 is set aside: raised: no; no more of these are told",
        f"warning: client 1: node {theft.true} is gone and node 77 takes its place",
        f"warning: client 1: node {theft.true} is back and node 77 leaves its place",
    ]


@pytest.mark.parametrize("is_bound", [False, True])
def test_a_node_that_is_back_has_its_place_whoever_took_it(is_bound: bool) -> None:
    keys: Flat = {"run.rounds": 3, "run.clients": 4, "run.cohort": 4, "run.evaluate-every": 3, **WHOLE}
    theft = Theft(merge(SMALL, keys))
    told: list[str] = []

    def prepare(strategy: SparseStrategy) -> None:
        strategy.messenger.registry.say = told.append
        strategy.messenger.registry.bound = lambda: {1: theft.true} if is_bound else {}

    played = play(keys, grid=theft, prepare=prepare)
    assert played.strategy.messenger.registry.nodes[1] == theft.true
    assert played.records[3]["ok"] == [0, 1, 2, 3]
    if is_bound:
        reason = f"says that it is client 1, whose key is that of node {theft.true}"
        assert played.records[2]["strangers"] == {"77": reason}
        assert list(played.records[2]["lost"]) == ["1"]
        assert "rejoined" not in played.records[3]
        assert told == []
    else:
        assert [record.get("rejoined") for record in played.records] == [None, None, [1], [1]]
        assert told == [
            f"warning: client 1: node {theft.true} is gone and node 77 takes its place",
            f"warning: client 1: node {theft.true} is back and node 77 leaves its place",
        ]
        assert played.bits() == play(keys).bits()  # here the thief computed honestly


def test_a_place_that_is_bound_anew_in_a_run_is_not_given_back() -> None:
    """The operator registers another key for client 1: the old one, should it come back, has lost its place."""
    keys: Flat = {"run.rounds": 3, "run.clients": 4, "run.cohort": 4, "run.evaluate-every": 3, **WHOLE}
    theft = Theft(merge(SMALL, keys))

    def prepare(strategy: SparseStrategy) -> None:
        strategy.messenger.registry.bound = lambda: {1: 77 if theft.trained else theft.true}

    played = play(keys, grid=theft, prepare=prepare)
    assert played.strategy.messenger.registry.nodes[1] == 77
    assert [record.get("rejoined") for record in played.records] == [None, None, [1], None]
