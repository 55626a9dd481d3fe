"""Sums in the clear and masked ones have the same bits, whoever is gone; the server sees nothing else."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.client_app import app
from ssfl_app.client_node import check_policy
from ssfl_app.comm.messenger import Messenger
from ssfl_app.comm.node_config import read_node_config
from ssfl_app.comm.payload import Payload, PayloadEncoder, decode_payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.summand import (
    ABOUT,
    CLIP,
    EXCHANGE,
    LOSS_UNIT,
    NOISE,
    OWN,
    PEERS,
    RING,
    Identity,
    SummandWriter,
    about_bytes,
    question_digest,
    terms_of,
)
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.privacy import masking
from ssfl_app.privacy.keys import KeyPair, fingerprint
from ssfl_app.privacy.masking import Peer, write_peers
from ssfl_app.privacy.options import PrivacyOptions
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.testing.grid import SMALL, Fault, Played, Where, answer_error, tamper
from tests.in_process_grid import MEMO, ScriptedGrid, play

pytestmark = pytest.mark.narrow

CLEAR: Flat = {"wire.up-values": "fixed32", "ssfl.score-values": "fixed32"}
SECURE: Flat = {"privacy.secure-aggregation": True}
SIX: Flat = {"run.clients": 6, "run.cohort": 6, "run.rounds": 2}
LOOSE: Flat = SIX | {"privacy.threshold": 0.5}

GONE = answer_error(ErrorCode.NODE_UNAVAILABLE)


def summable(strategy: str) -> Flat:
    return {"strategy": strategy} | ({"ssfl.score-values": "fixed32"} if strategy in ("ssfl", "shuffled") else {})


def both(keys: Flat, faults: Mapping[Where, Fault] | None = None) -> tuple[Played, Played]:
    """Return the run in the clear, without faults of the second exchange, and the secure one, in another order."""
    first = {where: fault for where, fault in (faults or {}).items() if where[0] != "query.unmask"}
    strategy = str(keys.get("strategy", "ssfl"))
    clear = {"wire.up-values": "fixed32"} | summable(strategy)
    return play(keys | clear, luck=1, faults=first), play(keys | SECURE, luck=2, faults=faults)


def without_bytes(played: Played) -> list[dict[str, object]]:
    return [{k: v for k, v in record.items() if "bytes" not in k and k != "notes"} for record in played.metrics()]


@pytest.mark.parametrize(
    "strategy", ["ssfl", "shuffled", "random", "fedavg", "fedavg-ft", "fedprox", "fedbn", "moon", "ditto"]
)
def test_a_secure_run_has_the_bits_of_a_clear_one(strategy: str) -> None:
    keys = SIX | {"run.cohort": 4, "strategy": strategy}
    clear, secure = both(keys)
    assert secure.bits() == clear.bits()
    assert [mask.digest for mask in secure.masks] == [mask.digest for mask in clear.masks]
    assert without_bytes(secure) == without_bytes(clear)


@pytest.mark.parametrize("criterion", ["pooled-snip", "grasp", "iterative-snip", "force"])
def test_all_scores_add_up_alike(criterion: str) -> None:
    keys: Flat = {"run.clients": 4, "run.rounds": 1, "ssfl.criterion": criterion, "ssfl.steps": 0}
    clear, secure = both(keys)
    assert secure.masks[-1].digest == clear.masks[-1].digest
    assert secure.bits() == clear.bits()


@pytest.mark.parametrize(
    "keys", [{"run.weighting": "uniform"}, {"wire.rounding": "stochastic"}, {"wire.down-values": "fp16"}]
)
def test_whatever_else_is_set(keys: Flat) -> None:
    clear, secure = both(SIX | keys)
    assert secure.bits() == clear.bits()


@settings(max_examples=10, deadline=None)
@given(
    first=st.sets(st.integers(0, 5), max_size=2),
    second=st.sets(st.integers(0, 5), max_size=2),
    question=st.sampled_from(["query.saliency", "train"]),
    luck=st.integers(0, 99),
)
def test_any_dropouts_leave_the_same_bits(first: set[int], second: set[int], question: str, luck: int) -> None:
    """Before the upload, and between the exchanges; one too many ends the run by name."""
    round_ = 0 if question == "query.saliency" else 1
    keys = LOOSE | {"run.rounds": 1}
    lost = {(question, round_, client): GONE for client in first}
    faults = lost | {("query.unmask", round_, client): GONE for client in second}
    left = 6 - len(first | second)  # who answers twice
    # Each that uploaded needs 3 of its 5 neighbours to tell its shares: all that are left but itself.
    if left - (0 if second - first else 1) < 3 or (left - 1 < 3):
        with pytest.raises(RunFailed, match=r"neighbours of client \d"):
            play(keys | SECURE, luck=luck, faults=faults)
        return
    clear, secure = play(keys | CLEAR, faults=lost), play(keys | SECURE, luck=luck, faults=faults)
    assert secure.bits() == clear.bits()


def test_who_is_gone_at_unmasking_is_named_and_counts() -> None:
    _, secure = both(SIX, {("query.unmask", 1, 3): GONE})
    record = secure.records[1]
    assert "unmask" in record["notes"]["3"]
    assert record["ok"] == [0, 1, 2, 3, 4, 5]


def test_the_server_sees_no_values_of_a_client() -> None:
    clear, secure = both(SIX)
    plain = {where: reply.arrays["values"] for where, reply in clear.grid.got if "values" in reply.arrays}
    masked = {where: reply.arrays["values"] for where, reply in secure.grid.got if "values" in reply.arrays}
    assert plain.keys() == masked.keys()
    assert len(plain) == 18
    seen = b"".join(
        array.tobytes() for _, reply in [*secure.grid.got, *secure.grid.sent] for array in reply.arrays.values()
    )
    for where, values in plain.items():
        told = values[np.flatnonzero(values)[:8]].tobytes()  # not zeros, which are anywhere
        assert told not in seen
        assert np.mean(masked[where] == values) < 1e-3
    for where, reply in secure.grid.got:
        if where[0] == "train":
            assert "loss" not in reply.metadata


def test_loss_and_clipped_values_are_told_as_sums() -> None:
    clear, secure = both(SIX | {"wire.range": 2.0**-9})
    for played in (clear, secure):
        assert played.records[1]["clipped"] > 0
        assert any("wire.range" in line for line in played.warnings)
        exact = play(SIX)
        assert played.records[1]["train_loss"] == pytest.approx(exact.records[1]["train_loss"], abs=1e-5)


def test_fixed_point_is_close_to_float() -> None:
    exact, fixed = play(SIX), play(SIX | CLEAR)
    assert fixed.masks[0].digest == exact.masks[0].digest
    ours, theirs = (played.layout.flatten(played.states[1]) for played in (fixed, exact))
    assert np.abs(ours - theirs).max() <= 6 / 2 * 2.0**-30 + 2.0**-25  # and float32's own, below 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "dispfl"}, "does more with models"),
        ({"strategy": "topk"}, "does more with models"),
        ({"strategy": "flash"}, "'layer_densities'"),
        ({"run.fold": "median"}, "run.fold is 'median'"),
        ({"failures.norm-factor": 3.0}, "failures.norm-factor is 3"),
        ({"wire.error-feedback": True}, "wire.error-feedback is True"),
        ({"ssfl.score-fold": "median"}, "ssfl.score-fold is 'median'"),
        ({"ssfl.refresh": "drift"}, "ssfl.refresh is 'drift'"),
        ({"ssfl.refresh": "continuous"}, "ssfl.refresh is 'continuous'"),
        ({"shift.stream": "labels"}, "shift.stream is 'labels'"),
        ({"wire.up-values": "fp16"}, "wire.up-values is 'fp16'"),
        ({"ssfl.score-values": "log8"}, "ssfl.score-values is 'log8'"),
        ({"run.cohort": 2}, "run.cohort is 2"),
        ({"run.clients": 100, "run.cohort": 100, "wire.up-values": "fixed16"}, "leave 326 steps"),
    ],
)
def test_what_cannot_be_summed_is_refused_by_name(keys: Flat, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        play(SECURE | keys)


def test_a_clear_sum_refuses_what_is_beyond_its_range() -> None:
    def liar(payload: Payload) -> Payload:
        values = payload.arrays["values"].copy()
        values[0] = 2**30
        return Payload({**payload.arrays, "values": values}, payload.metadata)

    played = play(SIX | CLEAR, faults={("train", 1, 2): tamper(liar)})
    assert "beyond wire.range" in played.records[1]["refused"]["2"]


def test_a_masked_sum_beyond_its_range_ends_the_run() -> None:
    def liar(payload: Payload) -> Payload:
        values = payload.arrays["values"].copy()
        values[0] += np.uint32(2**31 - 1)
        return Payload({**payload.arrays, "values": values}, payload.metadata)

    with pytest.raises(RunFailed, match="a client lied"):
        play(SIX | SECURE, faults={("train", 1, 2): tamper(liar)})


# ---- what a client refuses ----------------------------------------------------------------------------------------


def refusal(where: Where, change: Mapping[str, object]) -> str:
    """Return why a client refused a message whose facts a lying server changed."""

    def lying(grid, message):  # type: ignore[no-untyped-def]
        facts = message.content["facts"]
        for name, value in change.items():
            facts[name] = value
        return grid.work(message)

    played = play(SIX | SECURE, faults={where: lying})
    record = played.records[where[1]]
    return str(record["refused"].get(str(where[2])) or record["notes"][str(where[2])])


def test_a_client_masks_once_in_an_exchange_and_only_in_later_ones() -> None:
    assert "has masked that of" in refusal(("train", 1, 2), {EXCHANGE: 1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({OWN: bytes(32)}, "another key"),
        ({EXCHANGE: "7"}, "exchange is '7'"),
        ({ABOUT: 3}, "about is 3"),
        ({LOSS_UNIT: float("nan")}, "loss-unit is nan"),
    ],
)
def test_a_malformed_message_is_refused(change: dict[str, object], said: str) -> None:
    assert said in refusal(("train", 1, 2), change)


@pytest.mark.parametrize("change", [{"unit": 2.0**20}, {"range": 2.0**-30}, {LOSS_UNIT: 1.0}])
def test_a_server_that_asks_one_client_something_else_learns_nothing(change: dict[str, object]) -> None:
    """With a huge step for the others their answers would be 0, and the sum that of one client."""
    assert "asks its clients different things" in refusal(("train", 1, 2), change)


def test_a_client_is_bound_to_model_options_and_run() -> None:
    played = play(SIX | SECURE | {"run.rounds": 1})
    where = ("train", 1, 2)
    message = next(payload for at, payload in played.grid.sent if at == where)
    later = Payload(message.arrays, message.metadata | {EXCHANGE: 2**60})
    dead = Payload({**message.arrays, "values": 0 * message.arrays["values"]}, later.metadata)
    assert "different things" in ask_again(played, where, dead)
    played.grid.context_of(2).run_config["local.lr"] = 1e-30  # type: ignore[index]
    assert "different things" in ask_again(played, where, later)
    assert about_bytes("0123456789abcdef", 5, "x", 0.5) != about_bytes("f" * 16, 5, "x", 0.5)


def test_a_client_unmasks_once_and_what_it_masked() -> None:
    played = play(SIX | SECURE)
    grid = played.grid
    where = ("query.unmask", 2, 2)
    again = next(payload for at, payload in grid.sent if at == where)
    for change, said in (({}, "has unmasked that of"), ({EXCHANGE: 2**60}, "sent no masked answer")):
        assert said in ask_again(played, where, Payload(again.arrays, {**again.metadata, **change}))


def test_a_client_unmasks_no_two_sums_of_the_same_answers_over_other_clients() -> None:
    """A run that is played again from a checkpoint with another dropout: the difference is one client's answer."""
    keys = LOOSE | SECURE | {"run.rounds": 1, "strategy": "random"}
    faults: dict[Where, Fault] = {}
    grid = ScriptedGrid(merge(SMALL, MEMO.images | keys), 0, faults)
    first = play(keys, grid=grid)
    assert play(keys, grid=grid).bits() == first.bits()  # the same clients again
    grid._faults[("train", 1, 2)] = GONE
    with pytest.raises(RunFailed, match=r"client 0: .* a sum of these very answers was told over other clients"):
        play(keys, grid=grid)
    grid._faults.clear()
    assert play(keys, grid=grid).bits() == first.bits()


@pytest.fixture
def four_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a federation be a large one from six clients on."""
    for function in (masking.neighbours, masking.ring_order, masking.RingTree.__init__):
        monkeypatch.setattr(function, "__defaults__", (4,))
    monkeypatch.setattr(masking.Masker.__init__, "__defaults__", (4, None))


@pytest.mark.usefixtures("four_neighbours")
def test_more_clients_than_neighbours_make_one_ring_that_each_of_them_checks() -> None:
    keys: Flat = {"run.clients": 8, "run.cohort": 8, "run.rounds": 1, "strategy": "random"}
    clear, secure = both(keys)
    assert secure.bits() == clear.bits()
    told = {where[2]: payload for where, payload in secure.grid.sent if where[0] == "train"}
    assert {payload.arrays[PEERS].size for payload in told.values()} == {4 * 36}
    second = [payload for where, payload in secure.grid.sent if where[0] == "query.unmask"]
    assert len(second) == 8
    assert not any({PEERS, RING} & payload.arrays.keys() for payload in second)  # a client remembers them
    ring, later = told[7].arrays[RING], told[7].metadata | {EXCHANGE: 2**60}
    short = Payload({**told[7].arrays, RING: ring[:-32]}, later)
    assert "they are too few" in ask_again(secure, ("train", 1, 7), short)
    none = Payload({name: array for name, array in told[7].arrays.items() if name != RING}, later)
    # A client without a ring takes its neighbours for all: it masks, and what it sealed is for nobody.
    assert work_again(secure, ("train", 1, 7), none).has_content()


@pytest.mark.usefixtures("four_neighbours")
@pytest.mark.parametrize("change", ["none", "another"])
def test_a_server_that_tells_one_client_another_ring_gets_no_sum(change: str) -> None:
    def lying(grid: Any, message: Message) -> Message:
        told = decode_payload(message.content)
        ring = told.arrays.pop(RING).copy()
        if change == "another":
            ring[-1] ^= 1
            told.arrays[RING] = ring
        message.content = PayloadEncoder().record(told)
        return grid.work(message)  # type: ignore[no-any-return]

    keys: Flat = {"run.clients": 8, "run.cohort": 8, "run.rounds": 1, "strategy": "random"}
    with pytest.raises(RunFailed, match="not encrypted for client"):
        play(keys | SECURE, faults={("train", 1, 2): lying})


def work_again(played: Played, where: Where, payload: Payload) -> Message:
    node, context = next((n, c) for n, c in played.grid._contexts.items() if played.grid.number(c) == where[2])
    return app(Message(PayloadEncoder().record(payload), node, where[0]), context)


def ask_again(played: Played, where: Where, payload: Payload) -> str:
    with pytest.raises(PayloadError) as caught:
        work_again(played, where, payload)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "lie"),
    [
        (("train", 1, 2), {"wire.up-values": "fp32"}),
        (("query.saliency", 0, 2), {"ssfl.score-values": "fp32"}),
    ],
)
def test_a_client_answers_nothing_in_the_clear_whatever_the_options_are(where: Where, lie: Flat) -> None:
    played = play(SIX | SECURE | {"run.rounds": 1})
    message = next(payload for at, payload in played.grid.sent if at == where)
    played.grid.context_of(2).run_config.update(lie)  # type: ignore[attr-defined]
    assert "in the clear" in ask_again(played, where, message)


@pytest.mark.parametrize("policy", [{"pins": Path("/p")}, {"secure_only": True}, {"least_clients": 3}], ids=str)
def test_a_pinned_node_takes_part_in_masked_runs_only(
    policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = play(SIX | CLEAR | {"run.rounds": 1})
    where = ("train", 1, 2)
    message = next(payload for at, payload in played.grid.sent if at == where)
    monkeypatch.setattr(
        "ssfl_app.client_node.read_node_config", lambda *given: replace(read_node_config(*given), **policy)
    )
    option = {"pins": "--pin", "secure_only": "--secure-only", "least_clients": "--least-clients"}[next(iter(policy))]
    assert f"started with {option} and answers masked only" in ask_again(played, where, message)
    place = replace(read_node_config({"partition-id": 0}, "shared"), **policy)
    check_policy(place, PrivacyOptions(secure_aggregation=True))
    if place.pins:
        with pytest.raises(PayloadError, match=r"threshold is 0\.5"):
            check_policy(place, PrivacyOptions(secure_aggregation=True, threshold=0.5))


def test_a_node_can_demand_a_least_number_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are asked, and of those that are in the sum."""
    demands = {"least": 6}
    of = Identity.__init__

    def demanding(self: Identity, keys: KeyPair, pins: frozenset[str] = frozenset(), least: int = 0) -> None:
        of(self, keys, pins, demands["least"])

    monkeypatch.setattr(Identity, "__init__", demanding)
    with pytest.raises(RunFailed):
        play(LOOSE | SECURE | {"run.rounds": 1, "run.cohort": 5, "strategy": "random"})
    keys = LOOSE | SECURE | {"run.rounds": 1, "strategy": "random"}
    assert play(keys).records[1]["ok"] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RunFailed, match="neighbours of client"):
        play(keys, faults={("train", 1, 2): GONE})
    demands["least"] = 5
    assert len(play(keys, faults={("train", 1, 2): GONE}).records[1]["ok"]) == 5


def test_what_is_demanded_is_named() -> None:
    with pytest.raises(PayloadError, match="the sum is of 4 clients; this node was started with --least-clients 5"):
        Identity(KeyPair.new(), least=5).check(4, "the sum is of")


def test_pins_bind_the_keys_of_others() -> None:
    me, others = KeyPair.new(), [KeyPair.new() for _ in range(3)]
    peers = write_peers([Peer(i + 1, pair.public) for i, pair in enumerate(others)])
    facts = {"unit": 2.0**-20, "range": 1.0, "most": 9, EXCHANGE: 5, OWN: me.public}
    facts[ABOUT] = f"x/{question_digest(Payload({PEERS: peers}, facts), '')}"

    class Memory:
        def note_masked(self, exchange: int, asked: int, **kept: str) -> None: ...

    known = frozenset(fingerprint(pair.public) for pair in others)
    for pins, fits in ((known, True), (known - {fingerprint(others[1].public)}, False)):
        writer = SummandWriter(0, lambda pins=pins: Identity(me, pins), Memory(), True, 2 / 3)  # type: ignore[misc,arg-type]
        payload = Payload({PEERS: peers}, facts)
        if fits:
            assert writer.write(payload, np.zeros(4, np.float32), "fixed32", 1)["values"].size == 5
        else:
            with pytest.raises(ValueError, match=r"client 2 has the key .* pinned"):
                writer.write(payload, np.zeros(4, np.float32), "fixed32", 1)


def test_secure_aggregation_chooses_whole_numbers_where_nobody_chose() -> None:
    flat = merge(SECURE)
    assert (flat["wire.up-values"], flat["ssfl.score-values"]) == ("fixed32", "fixed32")
    assert parse(flat).settings.sections["ssfl"].score_fold == "mean"


def test_a_fact_that_nobody_checks_hides_no_other_model() -> None:
    """A digest of weights stands for them only where the client compares it; in training it does not."""

    def state(strategy: Any) -> None:
        written = strategy.train_payload
        strategy.train_payload = lambda *at: Payload(written(*at).arrays, {**written(*at).metadata, "weights": "x"})

    def lie(grid: Any, message: Message) -> Message:
        told = decode_payload(message.content)
        told.arrays["values"] = np.zeros_like(told.arrays["values"])
        message.content = PayloadEncoder().record(told)
        return grid.work(message)  # type: ignore[no-any-return]

    keys = SIX | SECURE | {"run.rounds": 1, "strategy": "random"}
    with pytest.raises(RunFailed, match="asks its clients different things"):
        play(keys, faults={("train", 1, client): lie for client in range(5)}, prepare=state)


class Questions:
    """A memory that keeps what each answer was said to be an answer to."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def note_masked(self, exchange: int, asked: int, **kept: str) -> None:
        self.asked.append(asked)


def question(level: str, facts: dict[str, Any], arrays: dict[str, Any] | None = None) -> int:
    """Return as an answer to what question a client notes its answer to a message that has these, too."""
    me, memory = KeyPair.new(), Questions()
    told = {"unit": 2.0**-20, "range": 1.0, "most": 9, EXCHANGE: 5, OWN: me.public, "digest": "d", **facts}
    content = {"values": np.ones(4, np.float32), **(arrays or {})}
    peers = write_peers([Peer(number, KeyPair.new().public) for number in (1, 2)])
    told[ABOUT] = f"x/{question_digest(Payload(content, told), '')}"
    writer = SummandWriter(0, lambda: Identity(me), memory, True, 2 / 3, level)  # type: ignore[arg-type]
    message = Payload({**content, PEERS: peers}, told)
    writer.write(message, np.zeros(4, np.float32), "fixed32", 1, reads=("digest", "values"))
    return memory.asked[0]


def test_what_an_answer_is_not_made_of_makes_no_other_question() -> None:
    plain = question("none", {})
    assert plain
    assert question("none", {"ssfl": "1", "step": 3, "round": 7}) == plain
    assert question("none", {}, {"extra": np.zeros(1, np.uint8)}) == plain
    assert question("none", {"digest": "e"}) != plain
    assert question("none", {}, {"values": np.zeros(4, np.float32)}) != plain


def test_only_noise_that_hides_an_answer_lets_it_be_told_again() -> None:
    assert question("client", {CLIP: 1.0, NOISE: 1e-9}) == question("client", {CLIP: 1.0, NOISE: 0.0}) != 0
    assert question("client", {CLIP: 1.0, NOISE: 100.0}) == 0
    assert question("none", {NOISE: 100.0}) != 0
    assert question("none", {CLIP: 1.0, NOISE: 100.0}) != 0


@pytest.mark.parametrize(
    ("where", "kept"), [(("train", 1, 2), ("digest",)), (("query.saliency", 0, 2), ("weights",))]
)
def test_clients_name_what_their_answers_are_made_of(
    where: Where, kept: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array and a fact beside them make no other question of a message that was answered before."""
    played, memory = play(LOOSE | SECURE | {"run.rounds": 1}), Questions()
    monkeypatch.setattr("ssfl_app.comm.payload.ClientState.note_masked", lambda _, *at, **of: memory.note_masked(*at))
    message = next(payload for at, payload in played.grid.sent if at == where)
    settings = played.runtime.config.settings
    for arrays, facts in (({}, {}), ({"extra": np.zeros(1, np.uint8)}, {"ssfl": "1", "step": 4})):
        again = Payload({**message.arrays, **arrays}, {**message.metadata, **facts})
        asked = Payload(again.arrays, again.metadata | ({"question": "saliency"} if where[1] == 0 else {}))
        again.metadata[ABOUT] = f"x/{question_digest(asked, terms_of(settings))}"
        work_again(played, where, again)
    assert memory.asked[0] == memory.asked[1] != 0
    assert all(name in message.metadata for name in kept)


def test_a_resumed_run_goes_on_above_its_last_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients mask in later and later exchanges only, and a clock may go back."""
    first, again = Messenger(1.0), Messenger(1.0)
    first.keep_exchange(tmp_path / "exchange")
    last = [first.next_exchange() for _ in range(3)][-1]
    monkeypatch.setattr("time.time_ns", lambda: 0)
    again.keep_exchange(tmp_path / "exchange")
    assert again.next_exchange() == last + 1
