"""Nodes whose answers are only added: masked and clear sums have the same bits, and the server sees nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, QFedAvg, Result

from ssfl_app import SSFL, SparseMod, TopK, sparse_mod
from ssfl_app.comm.exchange import ExchangeReport
from ssfl_app.comm.messenger import Further
from ssfl_app.core.summand import EXCHANGE, OWN, UNIT
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.messenger import NodeMessenger
from ssfl_app.plugin.mod import check_masked
from ssfl_app.plugin.secure import KEYS, THRESHOLD
from ssfl_app.plugin.strategy import MOST_OF_ONE
from ssfl_app.privacy.keys import KeyPair
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError
from tests.plugin.test_mod import old_app
from tests.plugin.test_rounds import Fault, ForeignGrid, Where, bits, foreign_app, play, tensors

MOST = 100  # examples; the fifth node has exactly so many


def summed(
    secure: bool,
    faults: Mapping[Where, Fault] | None = None,
    rounds: int = 2,
    nodes: int = 5,
    app: Any = None,
    **arguments: Any,
) -> tuple[SSFL, Result, ForeignGrid]:
    """Play masked, or in the clear with the same whole numbers and the replies in another order."""
    how = {"secure_aggregation": True} if secure else {"values": "fixed32"}
    inner = arguments.pop("inner", None)
    told = {"fraction_evaluate": 0.0} if inner is None else {"inner": inner()}
    strategy = SSFL(**{"density": 0.25, "most_examples": MOST, **how, **told, **arguments})
    grid = ForeignGrid(app or foreign_app(), nodes, luck=int(secure), faults=faults)
    return (*play(strategy=strategy, rounds=rounds, grid=grid), grid)


def sent(content: Any, name: str = "values") -> bytes:
    """Return the bytes of an array of a reply."""
    return bytes(content["arrays"][name].data)


def gone(grid: ForeignGrid, message: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "scripted"), reply_to=message)


def both(
    faults: Mapping[Where, Fault] | None = None, threshold: float = 2 / 3, **arguments: Any
) -> tuple[SSFL, SSFL]:
    """Return the clear run, without faults of the second exchange, and the masked one, of the same bits."""
    first = {where: fault for where, fault in (faults or {}).items() if where[0] != "unmask"}
    clear, clear_result, _ = summed(False, first, **arguments)
    secure, secure_result, _ = summed(True, faults, threshold=threshold, **arguments)
    assert secure.mask == clear.mask
    assert bits(secure_result) == bits(clear_result)
    for ours, theirs in zip(secure.history, clear.history, strict=True):
        for name in ("ok", "lost", "refused", "scored_by", "clipped"):
            assert ours.get(name) == theirs.get(name), name
    return clear, secure


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"saliency_weighting": "uniform", "saliency_batches": 2},
        {"criterion": "pooled-snip"},
        {"mask": "random", "app": old_app()},
        {"density": 1.0},
        {"inner": lambda: FedAvgM(server_momentum=0.9, fraction_evaluate=0.0)},
        {"inner": lambda: FedAdam(eta=0.05, fraction_evaluate=0.0), "inner_arrays": "model"},
    ],
    ids=["scores", "uniform", "gradients", "random, old style", "dense", "FedAvgM", "FedAdam"],
)
def test_a_masked_run_has_the_bits_of_a_clear_one(arguments: dict[str, Any]) -> None:
    clear, secure = both(**arguments)
    assert clear.mask.count == (44 if clear.discovery.density < 1 else 176)
    for record in secure.history[1:]:
        assert record["metrics"] == {}


def test_whole_numbers_are_close_to_float() -> None:
    exact, result = play(strategy=SSFL(density=0.25, fraction_evaluate=0.0), rounds=2)
    fixed, summed_result, _ = summed(False)
    assert fixed.mask == exact.mask
    assert fixed.history[2]["metrics"] == pytest.approx(exact.history[2]["metrics"], abs=1e-4)
    for name, tensor in tensors(result.arrays).items():
        assert (tensors(summed_result.arrays)[name] - tensor).abs().max() < 1e-5, name


def test_a_server_optimizer_moves_towards_the_mean_as_it_does_without_sums() -> None:
    def inner() -> FedAvg:
        return FedAvgM(server_momentum=0.9, fraction_evaluate=0.0)

    _, expected = play(strategy=SSFL(density=0.25, inner=inner()), rounds=3)
    _, result, _ = summed(True, rounds=3, inner=inner)
    for name, tensor in tensors(expected.arrays).items():
        assert (tensors(result.arrays)[name] - tensor).abs().max() < 1e-5, name


# ---- dropouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        [("saliency", 0, 1)],
        [("train", 1, 0)],
        [("train", 1, 4), ("unmask", 1, 2)],
        [("unmask", 0, 0), ("unmask", 1, 3)],
    ],
    ids=str,
)
def test_dropouts_leave_the_same_bits(lost: list[Where]) -> None:
    _, secure = both(dict.fromkeys(lost, gone), threshold=0.5, nodes=7, most_examples=120)
    for kind, round_, node in lost:
        if kind == "unmask":
            assert "did not help to unmask" in secure.history[round_]["notes"][str(1000 + node)]
            assert 1000 + node in secure.history[round_]["ok"]


def test_who_tells_no_key_is_asked_again_before_the_next_exchange() -> None:
    _, expected, _ = summed(False, {("saliency", 0, 3): gone})
    secure, result, grid = summed(True, {("keys", 0, 3): gone}, threshold=0.5)
    assert bits(result) == bits(expected)
    assert "scripted" in secure.history[0]["lost"]["1003"]
    assert secure.history[1]["ok"] == [1000, 1001, 1002, 1003, 1004]
    assert [where for where in grid.log if where[0] == "keys" and where[1]] == [("keys", 1, 3)]


def test_too_few_answers_end_the_run_with_the_node_by_its_id() -> None:
    with pytest.raises(RunFailed, match=r"2 neighbours of node 100\d are left; at least 3 are needed \(threshold"):
        summed(True, {("train", 1, 0): gone, ("train", 1, 1): gone}, min_ok_fraction=0.0)
    with pytest.raises(RunFailed, match="3 of 5 nodes answered well"):
        summed(True, {("train", 1, 0): gone, ("train", 1, 1): gone}, min_ok_fraction=0.8)


def test_two_nodes_are_too_few_to_mask() -> None:
    with pytest.raises(RunFailed, match=r"2 nodes connected within 0\.1 s; 3 are needed"):
        play(
            strategy=SSFL(secure_aggregation=True, most_examples=MOST),
            grid=ForeignGrid(foreign_app(), 2),
            timeout=0.1,
        )


def restarted(grid: ForeignGrid, message: Message) -> Message:
    """Lose all that the node kept, then work."""
    grid.context(message).state.clear()
    return grid.work(message)


def test_a_restarted_node_is_refused_once_and_tells_new_keys() -> None:
    clear, expected, _ = summed(False, {("train", 2, 1): gone}, rounds=3)
    secure, result, grid = summed(True, {("train", 2, 1): restarted}, rounds=3, threshold=0.5)
    assert "this node lost its keys" in secure.history[2]["refused"]["1001"]
    assert secure.history[3]["ok"] == clear.history[3]["ok"] == [1000, 1001, 1002, 1003, 1004]
    assert bits(result) == bits(expected)
    assert grid.log.count(("keys", 3, 1)) == 1
    keys = [sent(content, "key") for (kind, _, node), content in grid.replies if (kind, node) == ("keys", 1)]
    assert len(set(keys)) == len(keys) == 2


def test_who_restarts_between_the_exchanges_is_not_missed() -> None:
    secure, result, _ = summed(True, {("unmask", 1, 1): restarted}, rounds=2)
    _, expected, _ = summed(False, rounds=2)
    assert "this node lost its keys" in secure.history[1]["notes"]["1001"]
    assert secure.history[2]["ok"] == [1000, 1001, 1002, 1003, 1004]
    assert bits(result) == bits(expected)


# ---- who sees what -------------------------------------------------------------------------------------


def test_the_server_sees_no_values_and_no_metrics_of_a_node() -> None:
    _, _, clear = summed(False)
    _, _, secure = summed(True)
    plain = {where: sent(content) for where, content in clear.replies}
    masked = {where: content for where, content in secure.replies if where[0] in ("saliency", "train")}
    assert plain.keys() == masked.keys()
    assert len(plain) == 15
    seen = b"".join(sent(content, name) for _, content in secure.replies for name in content["arrays"])
    for where, data in plain.items():
        values = np.frombuffer(data, np.uint32)
        told = values[np.flatnonzero(values)[:8]].tobytes()
        assert told not in seen
        facts = masked[where]["facts"]
        assert np.mean(np.frombuffer(sent(masked[where]), np.uint32) == values) < 0.02
        assert facts.keys() <= {"round", "digest", "scored-by", "saw"}
        assert set(masked[where]) == {"arrays", "facts"}


def test_nodes_with_one_public_key_are_refused_by_name_before_the_mask_is_found() -> None:
    def copied(grid: ForeignGrid, message: Message) -> Message:
        reply = grid.work(message)
        arrays: Any = reply.content["arrays"]
        array = arrays["key"]
        arrays["key"] = Array(array.dtype, array.shape, array.stype, bytes([9]).ljust(32, b"\0"))
        return reply

    secure, _, _ = summed(True, {("keys", 0, node): copied for node in (1, 4)}, threshold=0.5, rounds=0)
    assert secure.history[0]["refused"]["1001"] == (
        "has the public key of node 1004; each node makes its own, or one of them lies: compare fingerprints before "
        "you remove a key"
    )
    assert "node 1001" in secure.history[0]["refused"]["1004"]
    with pytest.raises(RunFailed, match=r"2 of 4 nodes told a key; .* has the public key of node 100\d"):
        summed(True, {("keys", 0, node): copied for node in (1, 3)}, nodes=4, rounds=0)


def test_who_tells_the_key_that_another_node_told_before_takes_no_place() -> None:
    """One of the two lies, or was copied; nobody has shown that the private key is its own."""
    keys = {node: KeyPair.new().public for node in range(5)}

    class Told(NodeMessenger):
        def __init__(self) -> None:
            self.keys, self.report = dict(keys), ExchangeReport()

        def _ask(self, grid: Any, further: Further) -> None:
            self.keys[9] = keys[1]

    messenger = Told()
    assert messenger._keyed(None, [0, 1, 2, 3, 4, 9], 2) == [0, 2, 3, 4]  # type: ignore[arg-type]
    assert "public key of node 1" in messenger.report.refused[9]
    assert "public key of node 9" in messenger.report.refused[1]


def test_a_node_can_insist_on_sums() -> None:
    app = foreign_app(mods=[SparseMod(secure_only=True)])
    _, result, _ = summed(True, app=app)
    assert bits(result) == bits(summed(True)[1])
    for inner in ({}, {"mask": "random"}):
        with pytest.raises(RunFailed, match=r"SparseMod\(secure_only=True\) and answers masked only"):
            summed(False, app=app, **inner)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("evaluate", {"ssfl": "train", "weight-key": "num-examples"}),
        ("train", {"ssfl": "evaluate", UNIT: 1.0, EXCHANGE: 1}),
        ("train", {"ssfl": "layer_densities", UNIT: 1.0, EXCHANGE: 1}),
        ("train", {"ssfl": "train", UNIT: 1.0}),
        ("train", {}),  # of another strategy
    ],
)
def test_no_name_of_a_message_makes_it_tell_more(kind: str, facts: dict[str, Any]) -> None:
    message = Message(RecordDict({"facts": ConfigRecord(facts)}), 7, kind)
    with pytest.raises(PayloadError, match="answers masked only"):
        check_masked(message)
    check_masked(Message(RecordDict(), 7, "evaluate"))


def test_clipped_values_are_told_as_a_sum() -> None:
    clear, secure = both(update_range=2.0**-9)
    assert secure.history[1]["clipped"] == clear.history[1]["clipped"] > 0
    assert "clipped" not in summed(True)[0].history[1]


def test_without_dropouts_a_round_costs_little_beside_the_values() -> None:
    secure, _, _ = summed(True)
    record, values = secure.history[2], 5 * 4 * (44 + 19 + 2)
    assert 0 < record["bytes_train_up"] - values < 5 * 2000
    assert 0 < record["bytes_train_down"] - 5 * 4 * (44 + 19) < 5 * 2000


# ---- what is refused -----------------------------------------------------------------------------------


class Looks(FedAvg):
    """Looks at each reply."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Do."""
        return super().aggregate_train(server_round, list(replies))


class Own(SSFL):
    """Likewise, around SSFL."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Do."""
        return super().aggregate_train(server_round, list(replies))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"most_examples": 2**40}, f"most_examples is {2**40}; .* at most {MOST_OF_ONE}: secure_aggregation is True"),
        ({"most_examples": 1.5}, "most_examples is 1.5; it is a whole number"),
        ({"values": "fp16"}, "values is 'fp16'; it is 'fixed32'"),
        ({"threshold": 0.4}, "threshold is 0.4; it is a number from 0.5 to below 1"),
        ({"update_range": 0.0}, "update_range is 0.0; it is a number above 0"),
        ({"mask": "flash"}, "mask is 'flash'; secure_aggregation is True"),
        ({"inner": FedMedian()}, "inner is FedMedian, which looks at each reply"),
        ({"inner": QFedAvg(0.1)}, "inner is QFedAvg, which looks at each reply"),
        ({"inner": Looks()}, "inner is Looks, which looks at each reply"),
        ({"train_metrics_aggr_fn": lambda contents, key: MetricRecord()}, "train_metrics_aggr_fn is given"),
        ({"kind": TopK}, "TopK's nodes do not all send the same coordinates"),
        ({"kind": Own}, r"Own\.aggregate_train is your own and looks at each reply"),
        ({"secure_aggregation": False, "threshold": 0.9}, "threshold is 0.9; nothing reads it"),
        ({"secure_aggregation": False, "update_range": 2.0}, "update_range is 2.0; values 'fp32' have none"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(sorted(value)),
)
def test_what_cannot_be_summed_is_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    given = {"secure_aggregation": True, "most_examples": MOST, **arguments}
    kind = given.pop("kind", SSFL)
    with pytest.raises((ValueError, TypeError), match=said):
        kind(**given)


def test_the_sum_of_the_weights_must_fit_too() -> None:
    with pytest.raises(
        RunFailed, match=f"most_examples is {MOST_OF_ONE}; with 5 nodes it is at most {(2**31 - 1) // 5}"
    ):
        summed(False, rounds=0, most_examples=MOST_OF_ONE)


def test_a_weight_that_is_too_large_or_no_whole_number_is_refused_by_its_node() -> None:
    secure, _, _ = summed(True, rounds=1, threshold=0.5, most_examples=MOST - 1)
    assert "the weight is beyond most-weight, 99" in secure.history[0]["refused"]["1004"]

    def halves(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["metrics"]["num-examples"] = 7.5
        return reply  # type: ignore[no-any-return]

    app = foreign_app(mods=[sparse_mod, halves])
    clear, _, _ = summed(False, rounds=1, app=app)
    assert "100" not in secure.history[0]["refused"]["1004"].replace("1004", "")
    assert "the weight of a reply is no whole number" in clear.history[1]["refused"]["1002"]


def liar(change: int) -> Fault:
    def fault(grid: ForeignGrid, message: Message) -> Message:
        reply = grid.work(message)
        arrays: Any = reply.content["arrays"]
        array = arrays["values"]
        values = np.frombuffer(array.data, np.uint32).copy()
        values[:1] += np.uint32(change)
        arrays["values"] = Array(array.dtype, array.shape, array.stype, values.tobytes())
        return reply

    return fault


def test_what_is_beyond_the_range_is_refused_in_the_clear_and_ends_a_masked_run() -> None:
    clear, _, _ = summed(False, {("train", 1, 2): liar(2**31 - 1)})
    assert "beyond update_range, 1, by the weight 80" in clear.history[1]["refused"]["1002"]
    with pytest.raises(RunFailed, match="training in round 1: the sum is beyond update_range"):
        summed(True, {("train", 1, 2): liar(2**31 - 1)}, most_examples=2 * MOST)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("train", {EXCHANGE: 1}, "has masked that of"),
        ("train", {OWN: bytes(32)}, "the server has another key"),
        ("train", {THRESHOLD: 0.1}, "threshold is 0.1"),
        ("unmask", {EXCHANGE: 2**60}, "sent no masked answer"),
        ("unmask", {THRESHOLD: 0.9}, "not encrypted for client 2 in this exchange"),
    ],
)
def test_a_node_refuses_what_a_server_must_not_ask(kind: str, change: dict[str, Any], said: str) -> None:
    def lying(grid: ForeignGrid, message: Message) -> Message:
        facts: Any = message.content["facts"]
        for name, value in change.items():
            facts[name] = value
        return grid.work(message)

    secure, _, _ = summed(True, {(kind, 1, 2): lying}, rounds=1, threshold=0.5)
    record = secure.history[1]
    assert said in record["refused" if kind == "train" else "notes"]["1002"]


@pytest.mark.parametrize("record", ["config", "facts"])
def test_a_node_that_is_told_to_work_otherwise_than_the_others_masks_nothing(record: str) -> None:
    """With a learning rate of 0 for all others the sum would be the update of one node."""
    name = {"config": "lr", "facts": "batches"}[record]

    def lying(grid: ForeignGrid, message: Message) -> Message:
        told: Any = message.content[record]
        told[name] = 0.0 if record == "config" else 7
        return grid.work(message)

    secure, _, _ = summed(True, {("train", 1, 2): lying}, rounds=1)
    refused = secure.history[1]["refused"]["1002"]
    assert "the server asks its clients different things" in refused


def test_a_node_unmasks_once() -> None:
    again: list[str] = []

    def twice(grid: ForeignGrid, message: Message) -> Message:
        reply = grid.work(message)
        second = grid.work(message)
        again.append(second.error.reason or "")
        return reply

    secure, _, _ = summed(True, {("unmask", 1, 2): twice}, rounds=1)
    assert "has unmasked that of" in again[0]
    assert "notes" not in secure.history[1]


def test_an_app_without_the_mod_is_told_so() -> None:
    with pytest.raises(RunFailed, match=r"0 of 5 nodes told a key; .* needs the sparse_mod of this version"):
        summed(True, app=foreign_app(mods=[]))


# ---- what nodes tell of the model beside their scores ---------------------------------------------------


def equal_layers() -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    second.load_state_dict(first.state_dict())
    return torch.nn.Sequential(first, second)


def scored(secure: bool, told: Callable[[int, torch.Tensor], list[torch.Tensor]]) -> SSFL:
    """Find a mask of 4 nodes, of which each tells gradients by `told`, of its number and ones of their shape."""

    def saliency(message: Message, context: Context) -> Any:
        gradients = told(int(context.node_config["partition-id"]), torch.ones(8, 8))
        return dict(zip(("0.weight", "1.weight"), gradients, strict=True)), 10

    app = ClientApp(mods=[SparseMod(saliency=saliency)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise AssertionError("nobody trains")

    values = "fp32" if secure else "fixed32"
    strategy = SSFL(density=0.25, most_examples=MOST, secure_aggregation=secure, values=values)
    arrays = ArrayRecord(equal_layers().state_dict())
    strategy.start(grid=ForeignGrid(app, 4), initial_arrays=arrays, num_rounds=0)
    return strategy


def test_all_must_tie_the_same_tensors() -> None:
    def told(node: int, ones: torch.Tensor) -> list[torch.Tensor]:
        return [ones, ones if node else ones.clone()]

    for secure in (False, True):
        with pytest.raises(RunFailed, match=r"node 1000 ties nothing, most others tie 1\.weight to 0\.weight"):
            scored(secure, told)


def test_who_saw_nothing_has_no_vote() -> None:
    def told(node: int, ones: torch.Tensor) -> list[torch.Tensor]:
        return [ones, ones] if node else [0 * ones, 0 * ones]

    clear, secure = scored(False, told), scored(True, told)
    assert secure.history[0]["scored_by"] == clear.history[0]["scored_by"] == {"own": 3}
    assert secure.history[0]["ties"] == {"1.weight": "0.weight"}
    assert secure.mask == clear.mask
    weight: Any = equal_layers()[0].weight
    scores = weight.abs().detach().numpy().ravel()
    assert secure.mask == Mask.top(secure.mask.layout, scores, 0.25)


def test_keys_and_what_was_answered_are_lost_together() -> None:
    """A node whose keys are kept and whose record of exchanges is not could mask twice alike."""
    _, _, grid = summed(True, rounds=1)
    for context in grid._contexts.values():
        assert {KEYS, "ssfl-exchanges"} <= set(context.state)
