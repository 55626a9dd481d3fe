"""SSFL in the place of FedAvg, over an ordinary Flower app that knows nothing of masks: laws of the server's half."""

import functools
import logging
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, message_size_mod
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Result,
)
from torch import nn

from ssfl_app import SSFL, mask_gradients, sparse_mod
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import PayloadError

# ---- somebody else's project -----------------------------------------------------------------------


def net(norm: bool = False) -> nn.Sequential:
    """Return the model of these tests, always with the same weights: 8 numbers in, 3 classes out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(8, 16), *middle, nn.ReLU(), nn.Linear(16, 3))


def data(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 60 examples and 10 more for every further partition."""
    x = np.random.default_rng(partition).normal(size=(60 + 10 * partition, 8)).astype(np.float32)
    return torch.tensor(x), torch.tensor(x[:, :3].argmax(1))


def fit(model: nn.Module, partition: int, masked: bool) -> float:
    """Train for two epochs in minibatches of 20, with momentum and weight decay; return the summed loss."""
    x, y = data(partition)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    model.train()
    total = 0.0
    for _ in range(2):
        for rows in torch.arange(len(x)).split(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            if masked:
                mask_gradients(model)
            optimizer.step()
            total += loss.item()
    return total


Seen = list[tuple[str, int, dict[str, torch.Tensor]]]


def foreign_app(
    seen: Seen | None = None, norm: bool = False, masked: bool = True, mods: Any = (sparse_mod,)
) -> ClientApp:
    """Return an ordinary Flower app; `seen` takes the state dicts "given" to and "trained" by its train function."""
    app = ClientApp(mods=list(mods))

    def start(message: Message, context: Context) -> tuple[nn.Sequential, int]:
        model = net(norm)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        return model, int(context.node_config["partition-id"])

    def note(what: str, partition: int, model: nn.Module) -> None:
        if seen is not None:
            seen.append((what, partition, {name: t.clone() for name, t in model.state_dict().items()}))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, partition = start(message, context)
        note("given", partition, model)
        loss = fit(model, partition, masked)
        note("trained", partition, model)
        metrics = MetricRecord({"loss": loss, "num-examples": len(data(partition)[0])})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model, partition = start(message, context)
        x, y = data(partition)
        right = (model.eval()(x).argmax(1) == y).float().mean().item()
        metrics = MetricRecord({"accuracy": right, "num-examples": len(x)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


# ---- a federation in this process ------------------------------------------------------------------

Where = tuple[str, int, int]  # kind, round, partition
Fault = Callable[["ForeignGrid", Message], Message]


class ForeignGrid(InlineGrid):
    """Nodes 1000, 1001, ... whose replies come in an order that depends on `luck`, and who misbehave on cue."""

    def __init__(
        self, app: ClientApp, nodes: int = 5, luck: int = 0, faults: Mapping[Where, Fault] | None = None
    ) -> None:
        super().__init__(app, {}, {1000 + partition: partition for partition in range(nodes)})
        self._luck, self._faults = np.random.default_rng(luck), dict(faults or {})
        self.log: list[Where] = []
        self.replies: list[tuple[Where, RecordDict]] = []

    def pull_messages(self, message_ids: Any) -> list[Message]:
        """Answer each message with probability one half; the others are not ready yet."""
        ready = [i for i in message_ids if i in self._waiting and self._luck.random() < 0.5]
        return [self._answer(self._waiting.pop(i)) for i in ready]

    def context(self, message: Message) -> Context:
        return self._contexts[message.metadata.dst_node_id]

    def work(self, message: Message) -> Message:
        return super()._answer(message)

    def _answer(self, message: Message) -> Message:
        metadata: Any = message.content["facts"]
        where = metadata["ssfl"], metadata["round"], message.metadata.dst_node_id - 1000
        self.log.append(where)
        reply = self._faults.get(where, ForeignGrid.work)(self, message)
        if not reply.has_error():
            self.replies.append((where, reply.content))
        return reply


def play(
    app: ClientApp | None = None,
    strategy: SSFL | None = None,
    rounds: int = 3,
    norm: bool = False,
    grid: ForeignGrid | None = None,
    **arguments: Any,
) -> tuple[SSFL, Result]:
    strategy = SSFL(density=0.5) if strategy is None else strategy
    initial = ArrayRecord(net(norm).state_dict())
    grid = ForeignGrid(app or foreign_app(norm=norm)) if grid is None else grid
    return strategy, strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, **arguments)


def bits(result: Result) -> bytes:
    return b"".join(array.data for array in result.arrays.values())


def dead(strategy: SSFL, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the values of all dead weights."""
    return torch.cat([state[name][~alive] for name, alive in strategy.mask.tensors().items()])


def tensors(record: ArrayRecord) -> dict[str, torch.Tensor]:
    return dict(record.to_torch_state_dict())


# ---- the mask --------------------------------------------------------------------------------------


def direct_mask(weighting: str, batches: int, density: float, sizes: Mapping[int, int]) -> Mask:
    """Return the mask by the paper's equations: mean of |g * w| of the first minibatches at the initial weights."""
    layout, total = Layout.of(net()), torch.zeros(Layout.of(net()).prunable_size, dtype=torch.float64)
    for partition, size in sizes.items():
        x, y = data(partition)
        for rows in list(torch.arange(len(x)).split(20))[:batches]:
            model = net()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            parameters = dict(model.named_parameters())
            score = torch.cat([(p.grad * p).abs().reshape(-1) for p in (parameters[n] for n in layout.prunable)])
            total += score.detach().double() * (size if weighting == "samples" else 1)
    return Mask.top(layout, total.float().numpy(), density)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_mask_is_the_one_computed_from_gradients(weighting: str, batches: int) -> None:
    strategy = SSFL(density=0.25, saliency_weighting=weighting, saliency_batches=batches)
    play(strategy=strategy, rounds=1)
    expected = direct_mask(weighting, batches, 0.25, {p: 60 + 10 * p for p in range(5)})
    assert strategy.mask == expected
    assert strategy.mask.count == 44  # floor(0.25 * (8 * 16 + 16 * 3))
    assert strategy.history[0]["scored_by"] == {"gradient": 5}


def test_dead_weights_are_exactly_0_everywhere() -> None:
    seen: Seen = []
    strategy, result = play(foreign_app(seen))
    states = [state for what, _, state in seen[2 * 5 :]]  # behind the question: 5 given, 5 trained
    assert len(states) == 2 * 3 * 5
    assert all((dead(strategy, state) == 0).all() for state in [*states, tensors(result.arrays)])
    assert strategy.history[-1]["evaluate_metrics"]["accuracy"] > 0.85


def test_without_the_line_dead_weights_move_in_the_client_and_are_0_again_in_the_next_message() -> None:
    seen: Seen = []
    strategy, result = play(foreign_app(seen, masked=False))
    given = [state for what, _, state in seen[10:] if what == "given"]
    trained = [state for what, _, state in seen[10:] if what == "trained"]
    assert all((dead(strategy, state) == 0).all() for state in [*given, tensors(result.arrays)])
    assert all((dead(strategy, state) != 0).any() for state in trained)


def test_the_question_changes_no_weight_and_the_first_round_starts_from_masked_initial_weights() -> None:
    seen: Seen = []
    strategy, _ = play(foreign_app(seen), rounds=1)
    initial = net().state_dict()
    for _, _, state in seen[:10]:  # given, and "trained", with steps that change nothing
        assert all(torch.equal(state[name], initial[name]) for name in initial)
    masked = strategy.mask.apply(initial)
    first = next(state for what, _, state in seen[10:] if what == "given")
    assert all(torch.equal(first[name], masked[name]) for name in masked)


def test_before_any_round_the_result_is_the_masked_initial_model() -> None:
    strategy, result = play(rounds=0)
    masked = strategy.mask.apply(net().state_dict())
    assert strategy.mask.count == 88
    assert all(torch.equal(tensor, masked[name]) for name, tensor in tensors(result.arrays).items())


# ---- rounds ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_alive_values_and_the_rest() -> None:
    strategy, _ = play()
    alive, rest = strategy.mask.count, 16 + 3
    for record in strategy.history[1:]:
        assert record["bytes_train_up"] == record["bytes_train_down"] == 5 * 4 * (alive + rest)
        assert record["bytes_evaluate_down"] == 5 * 4 * (alive + rest)
    assert [record["bytes_mask_down"] > 5 * 176 // 8 for record in strategy.history[1:]] == [True, False, False]
    assert strategy.history[0]["bytes_discovery_up"] == 5 * 4 * 176


@pytest.mark.parametrize("inner", [None, FedMedian()])
def test_the_order_of_replies_changes_no_bit(inner: FedAvg | None) -> None:
    results = []
    for luck in range(3):
        grid = ForeignGrid(foreign_app(), luck=luck)
        strategy, result = play(strategy=SSFL(density=0.5, inner=inner), grid=grid)
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in strategy.history]
        results.append((bits(result), records, grid.log))
    assert results[0][:2] == results[1][:2] == results[2][:2]
    assert results[0][2] != results[1][2]


def test_cohorts_depend_on_the_seed_and_the_round() -> None:
    def cohorts(seed: int) -> list[list[int]]:
        strategy, _ = play(strategy=SSFL(density=0.5, seed=seed, fraction_train=0.4, fraction_evaluate=0.0), rounds=4)
        return [record["ok"] for record in strategy.history[1:]]

    state = random.getstate()
    assert cohorts(1) == cohorts(1) != cohorts(2)
    assert len({tuple(cohort) for cohort in cohorts(1)}) > 1
    assert all(len(cohort) == 2 for cohort in cohorts(1))
    assert random.getstate() == state


def test_density_1_is_flowers_fedavg() -> None:
    strategy, result = play(strategy=SSFL(density=1.0))
    assert [record["round"] for record in strategy.history] == [1, 2, 3]
    initial = ArrayRecord(net().state_dict())
    theirs = FedAvg().start(
        grid=InlineGrid(foreign_app(mods=()), {}, {1000 + p: p for p in range(5)}), initial_arrays=initial
    )
    for name, tensor in tensors(theirs.arrays).items():
        torch.testing.assert_close(tensors(result.arrays)[name], tensor, rtol=1e-5, atol=1e-6)
    ours = result.evaluate_metrics_clientapp[3]
    assert ours["accuracy"] == pytest.approx(theirs.evaluate_metrics_clientapp[3]["accuracy"])
    assert list(result.train_metrics_clientapp) == [1, 2, 3]


def test_a_stock_strategy_drives_an_app_with_the_mod_as_if_it_were_not_there() -> None:
    results = []
    for mods in ((), (sparse_mod,)):
        grid = InlineGrid(foreign_app(mods=mods), {}, {1000 + p: p for p in range(3)})
        result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=2)
        results.append(tensors(result.arrays))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_users_configs_metrics_functions_and_central_evaluation_are_flowers() -> None:
    seen: list[tuple[int, bool]] = []

    def central(round_: int, arrays: ArrayRecord) -> MetricRecord:
        net().load_state_dict(arrays.to_torch_state_dict(), strict=True)
        seen.append((round_, bool((tensors(arrays)["0.weight"] == 0).any())))
        return MetricRecord({"round": round_})

    def largest(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"most": max(content["metrics"][key] for content in contents)})  # type: ignore[index,call-overload]

    strategy = SSFL(density=0.5, train_metrics_aggr_fn=largest)
    _, result = play(strategy=strategy, rounds=2, evaluate_fn=central, train_config=ConfigRecord({"lr": 0.1}))
    assert seen == [(0, False), (1, True), (2, True)]
    assert [result.evaluate_metrics_serverapp[r]["round"] for r in range(3)] == [0, 1, 2]
    assert result.train_metrics_clientapp[2]["most"] == 100
    assert strategy.history[2]["central"] == {"round": 2}


# ---- failures --------------------------------------------------------------------------------------


def forget(grid: ForeignGrid, message: Message) -> Message:
    """Lose the node's memory, as a restarted SuperNode does, then work."""
    grid.context(message).state = RecordDict()
    return grid.work(message)


def gone(grid: ForeignGrid, message: Message) -> Message:
    return Message(Error(5, "scripted"), reply_to=message)


def test_a_client_that_lost_its_mask_gets_it_again_in_the_same_round() -> None:
    _, whole = play()
    grid = ForeignGrid(foreign_app(), faults={("train", 2, 3): forget, ("evaluate", 3, 1): forget})
    strategy, result = play(grid=grid)
    assert bits(result) == bits(whole)
    assert grid.log.count(("train", 2, 3)) == 2  # the second time it has what it needs
    assert strategy.history[2]["ok"] == [1000, 1001, 1002, 1003, 1004]
    assert strategy.history[2]["bytes_mask_down"] == strategy.history[1]["bytes_mask_down"] / 5
    assert strategy.history[3]["bytes_evaluate_mask_down"] == strategy.history[1]["bytes_mask_down"] / 5


def test_a_client_that_never_keeps_its_mask_is_refused_by_name() -> None:
    def hopeless(grid: ForeignGrid, message: Message) -> Message:
        metadata: Any = message.content["facts"]
        told = {"round": metadata["round"], "digest": metadata["digest"], "need": "mask"}
        return Message(RecordDict({"arrays": ArrayRecord(), "facts": ConfigRecord(told)}), reply_to=message)

    strategy, _ = play(grid=ForeignGrid(foreign_app(), faults={("train", 1, 0): hopeless}))
    assert strategy.history[1]["refused"] == {"1000": "asks for 'mask' again"}


def changed(change: Callable[[RecordDict], None]) -> Fault:
    def fault(grid: ForeignGrid, message: Message) -> Message:
        reply = grid.work(message)
        change(reply.content)
        return reply

    return fault


def values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def put(content: RecordDict) -> None:
        arrays: Any = content["arrays"]
        new = change(np.frombuffer(arrays["values"].data, np.float32).copy())
        arrays["values"] = Array(new.dtype.name, new.shape, "ssfl.raw.v1", new.tobytes())

    return put


def put(record: str, name: str, value: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[record][name] = value  # type: ignore[index,call-overload]

    return change


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda flat: np.concatenate([np.float32([value]), flat[1:]])


EXTRA = Array("uint8", (2,), "ssfl.raw.v1", b"ab")
DEFLATED = Array("uint8", (2**20,), "ssfl.zlib.v1", zlib.compress(bytes(2**20)))

BAD: dict[str, tuple[Fault, str]] = {
    "short": (changed(values(lambda flat: flat[:-1])), "length"),
    "NaN": (changed(values(first(np.nan))), "NaN"),
    "Inf": (changed(values(first(np.inf))), "Inf"),
    "huge": (changed(values(first(1e6))), "magnitude"),
    "float64": (changed(values(lambda flat: flat.astype(np.float64))), "float64"),
    "npy": (changed(lambda c: c["arrays"].update({"values": Array(np.zeros(3))})), "numpy.ndarray"),  # type: ignore[union-attr]
    "no array": (changed(lambda c: c["arrays"].clear()), "no array 'values'"),  # type: ignore[union-attr]
    "arrays that are none": (changed(lambda c: c.update({"arrays": MetricRecord({"values": 1})})), "ArrayRecord"),
    "facts that are none": (changed(lambda c: c.update({"facts": MetricRecord({"round": 2})})), "ConfigRecord"),
    "an array of its own": (changed(lambda c: c["arrays"].update({"x\n\x1b[2J": EXTRA})), "is none of"),  # type: ignore[union-attr]
    "deflated": (changed(lambda c: c["arrays"].update({"values": DEFLATED})), "it must be float32"),  # type: ignore[union-attr]
    "a metric's name": (changed(put("metrics", "x\n2026 INFO: \x1b[2J", 1.0)), "is called"),
    "a record's name": (changed(lambda c: c.update({"x" * 101: ConfigRecord()})), "is called"),
    "no facts": (changed(lambda c: c.pop("facts")), "facts"),
    "digest": (changed(put("facts", "digest", "0" * 16)), "digest is"),
    "round": (changed(put("facts", "round", 7)), "round is 7"),
    "0 samples": (changed(put("metrics", "num-examples", 0)), "above 0"),
    "negative": (changed(put("metrics", "num-examples", -3)), "above 0"),
    "NaN samples": (changed(put("metrics", "num-examples", float("nan"))), "above 0"),
    "1e300": (changed(put("metrics", "num-examples", 1e300)), "at most"),
    "listed": (changed(put("metrics", "num-examples", [1, 2])), "number above 0"),
    "unweighed": (changed(lambda c: c["metrics"].pop("num-examples")), "num-examples"),  # type: ignore[union-attr]
    "no metrics": (changed(lambda c: c.pop("metrics")), "MetricRecords"),
    "two": (changed(lambda c: c.update({"b": MetricRecord({"num-examples": 3})})), "2 MetricRecords"),
    "raised": (
        lambda grid, message: Message(Error(2, "ValueError: boo"), reply_to=message),
        "raised: ValueError: boo",
    ),
}


@functools.cache
def without_a_node() -> tuple[SSFL, Result]:
    """Return the run in which that node's reply is lost; nobody changes it."""
    return play(grid=ForeignGrid(foreign_app(), faults={("train", 2, 1): gone}))


@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_reply_is_refused_by_node_and_reason_and_changes_nothing(what: str) -> None:
    fault, reason = BAD[what]
    without, left_out = without_a_node()
    strategy, result = play(grid=ForeignGrid(foreign_app(), faults={("train", 2, 1): fault}))
    assert list(strategy.history[2]["refused"]) == ["1001"]
    assert reason in strategy.history[2]["refused"]["1001"]
    assert strategy.history[2]["refused"]["1001"].isprintable()
    assert without.history[2]["lost"] == {"1001": "Flower error 5: scripted"}
    assert bits(result) == bits(left_out)


def test_bad_scores_and_bad_evaluations_are_refused_too() -> None:
    faults = {("saliency", 0, 2): BAD["NaN"][0], ("evaluate", 1, 0): BAD["unweighed"][0]}
    strategy, _ = play(grid=ForeignGrid(foreign_app(), faults=faults))
    assert "NaN" in strategy.history[0]["refused"]["1002"]
    assert "num-examples" in strategy.history[1]["evaluate_refused"]["1000"]
    assert strategy.history[1]["evaluate_ok"] == [1001, 1002, 1003, 1004]
    assert strategy.mask == direct_mask("samples", 1, 0.5, {p: 60 + 10 * p for p in (0, 1, 3, 4)})


def test_what_a_node_says_is_cut_and_printable_in_history_and_log(caplog: pytest.LogCaptureFixture) -> None:
    forged = "x\n2026-11-27 INFO: run finished, accuracy 99.9 %\n\x1b]0;pwned\x07"
    long = changed(put("facts", "need", "n" * 50_000_000))
    faults = {
        ("saliency", 0, 1): changed(put("facts", "scored-by", "\x1b[2J\n<script>")),
        ("train", 1, 0): long,
        ("train", 1, 1): changed(lambda c: c["arrays"].update({forged: EXTRA})),  # type: ignore[union-attr]
        ("train", 1, 2): changed(put("facts", "digest", forged)),
        ("train", 1, 3): lambda grid, message: Message(Error(2, forged), reply_to=message),
    }
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        strategy = SSFL(density=0.5, min_ok_fraction=0.1)
        play(strategy=strategy, grid=ForeignGrid(foreign_app(), faults=faults), rounds=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "scored-by is '\\x1b[2J" in strategy.history[0]["refused"]["1001"]
    assert strategy.history[0]["scored_by"] == {"gradient": 4}
    assert list(strategy.history[1]["refused"]) == ["1000", "1001", "1002", "1003"]
    for reason in strategy.history[1]["refused"].values():
        assert reason.isprintable()
        assert len(reason) <= 320
    said = [record.getMessage() for record in caplog.records]
    assert any("asks for 'nnn" in line for line in said)
    assert all("\x1b" not in line and "\n2026" not in line and len(line) < 1000 for line in said)


def test_too_few_good_replies_end_the_run_and_the_model_stays() -> None:
    faults = {("train", 2, p): gone for p in range(3)}
    strategy = SSFL(density=0.5, min_ok_fraction=0.5)
    with pytest.raises(RunFailed, match=r"training in round 2: 2 of 5 nodes answered well; min_ok_fraction is 0.5"):
        play(strategy=strategy, grid=ForeignGrid(foreign_app(), faults=faults))
    _, one = play(rounds=1)
    assert b"".join(array.data for array in strategy.arrays().values()) == bits(one)
    assert list(strategy.history[-1]["lost"]) == ["1000", "1001", "1002"]
    assert not strategy.history[-1]["aggregated"]


def test_with_min_ok_fraction_0_a_round_without_any_reply_is_a_number_in_the_table() -> None:
    faults = {("train", 2, p): gone for p in range(5)}
    strategy, result = play(
        strategy=SSFL(density=0.5, min_ok_fraction=0.0), grid=ForeignGrid(foreign_app(), faults=faults)
    )
    assert [record.get("aggregated") for record in strategy.history] == [None, True, False, True]
    assert 2 not in result.train_metrics_clientapp


def test_nodes_that_do_not_come_end_the_run() -> None:
    with pytest.raises(RunFailed, match=r"2 nodes connected within 0\.2 s; 4 are needed"):
        play(strategy=SSFL(min_available_nodes=4), grid=ForeignGrid(foreign_app(), nodes=2), timeout=0.2)


def test_clients_that_tell_different_metrics_are_averaged_over_what_all_tell() -> None:
    fault = changed(put("metrics", "extra", 3.0))
    strategy, result = play(grid=ForeignGrid(foreign_app(), faults={("train", 1, 4): fault}))
    assert list(result.train_metrics_clientapp[1]) == ["loss"]
    assert len(strategy.history[1]["ok"]) == 5


@pytest.mark.parametrize("inner", [None, FedMedian()])
def test_odd_records_beside_the_metrics_do_not_disturb_anybody(inner: FedAvg | None) -> None:
    def odd(content: RecordDict) -> None:
        content["mine"] = content.pop("metrics")
        content["more"] = ArrayRecord([np.zeros(3)])
        content["note"] = ConfigRecord({"who": "me"})

    strategy, _ = play(
        strategy=SSFL(density=0.5, inner=inner),
        grid=ForeignGrid(foreign_app(), faults={("train", 1, 4): changed(odd), ("evaluate", 1, 0): changed(odd)}),
    )
    assert len(strategy.history[1]["ok"]) == len(strategy.history[1]["evaluate_ok"]) == 5
    assert list(strategy.history[1]["metrics"]) == ["loss"]
    assert list(strategy.history[1]["evaluate_metrics"]) == ["accuracy"]


# ---- another strategy inside -----------------------------------------------------------------------

INNER: list[Callable[[], FedAvg]] = [
    lambda: FedAvgM(server_momentum=0.3),
    lambda: FedAdam(eta=0.05),
    lambda: FedYogi(eta=0.05),
    lambda: FedAdagrad(eta=0.05),
    FedMedian,
    FedTrimmedAvg,
    Krum,
    lambda: MultiKrum(num_nodes_to_select=3),
    Bulyan,
]


@pytest.mark.parametrize("make", INNER, ids=lambda make: type(make()).__name__)
def test_flowers_strategies_aggregate_the_carried_values(make: Callable[[], FedAvg]) -> None:
    state = random.getstate()
    strategy, result = play(strategy=SSFL(density=0.5, inner=make()), rounds=5)
    assert random.getstate() == state
    assert (dead(strategy, tensors(result.arrays)) == 0).all()
    start = strategy.history[1]["metrics"]["loss"]
    assert strategy.history[-1]["metrics"]["loss"] < 0.75 * start
    assert strategy.history[-1]["evaluate_metrics"]["accuracy"] > 0.7


ROBUST: list[Callable[[], FedAvg]] = [
    lambda: FedTrimmedAvg(beta=0.25),
    FedMedian,
    lambda: Krum(num_malicious_nodes=1),
]


def lying_scores(content: RecordDict) -> None:
    """Nothing in the last layer matters, and everything else very much."""

    def lie(flat: np.ndarray) -> np.ndarray:
        last = next(reversed(Layout.of(net()).prunable_spans.values()))
        flat[:] = 32768
        flat[last] = 0
        return flat

    values(lie)(content)


@pytest.mark.parametrize("make", [*ROBUST, Bulyan], ids=lambda make: type(make()).__name__)
def test_a_robust_strategy_folds_the_scores_too(make: Callable[[], FedAvg]) -> None:
    def masks(inner: FedAvg | None) -> tuple[SSFL, list[int]]:
        grid = ForeignGrid(foreign_app(), nodes=8, faults={("saliency", 0, 3): changed(lying_scores)})
        strategy, _ = play(strategy=SSFL(density=0.2, inner=inner, saliency_weighting="uniform"), grid=grid, rounds=0)
        return strategy, [alive for _, alive, _ in strategy.mask.layers()]

    honest, layers = masks(None)
    assert layers[-1] == 0  # the mean is the liar's
    assert honest.history[0]["score_fold"] == "mean"
    inner = make()
    before = dict(vars(inner))
    strategy, layers = masks(inner)
    assert layers[-1] > 0
    assert strategy.history[0]["score_fold"] == type(inner).__name__
    assert vars(inner) == before


class Broken(FedMedian):
    """Made for models, and sees that scores are none."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        if server_round == 0:
            raise KeyError("loss")
        return super().aggregate_train(server_round, replies)


def test_where_a_robust_strategy_cannot_fold_scores_their_median_is_taken() -> None:
    grid = ForeignGrid(foreign_app(), nodes=8, faults={("saliency", 0, 3): changed(lying_scores)})
    strategy, _ = play(strategy=SSFL(density=0.2, inner=Broken()), grid=grid)
    assert strategy.history[0]["score_fold"] == "median"
    assert [alive for _, alive, _ in strategy.mask.layers()][-1] > 0
    assert strategy.history[3]["aggregated"]


@pytest.mark.parametrize("make", INNER[:4], ids=lambda make: type(make()).__name__)
def test_a_server_optimizer_leaves_scores_to_the_mean(make: Callable[[], FedAvg]) -> None:
    strategy, _ = play(strategy=SSFL(density=0.5, inner=make()), rounds=0)
    plain, _ = play(rounds=0)
    assert strategy.history[0]["score_fold"] == "mean"
    assert strategy.mask == plain.mask


# ---- metrics and weights that are odd --------------------------------------------------------------

LEAVE_OUT = changed(lambda c: c["metrics"].pop("accuracy"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (LEAVE_OUT, "None"),
        (changed(put("metrics", "accuracy", [0.5, 0.5])), "[0.5, 0.5]"),
        (changed(put("metrics", "accuracy", float("nan"))), "nan"),
        (changed(put("metrics", "accuracy", float("-inf"))), "-inf"),
    ],
    ids=["missing", "list", "nan", "inf"],
)
@pytest.mark.parametrize("inner", [None, FedMedian()])
def test_nobody_takes_a_metric_from_all_others(fault: Fault, told: str, inner: FedAvg | None) -> None:
    grid = ForeignGrid(foreign_app(), faults={("evaluate", 1, 2): fault})
    strategy, _ = play(strategy=SSFL(density=0.5, inner=inner), grid=grid, rounds=1)
    record = strategy.history[1]
    reason = f"metric 'accuracy' is {told}; most others tell a finite number"
    assert record["evaluate_refused"] == {"1002": reason}
    assert record["evaluate_ok"] == [1000, 1001, 1003, 1004]
    assert 0 < record["evaluate_metrics"]["accuracy"] <= 1


def test_in_training_odd_metrics_cost_the_metrics_and_with_an_inner_strategy_the_reply() -> None:
    faults: dict[Where, Fault] = {("train", 1, 2): changed(put("metrics", "loss", float("nan")))}
    reason = {"1002": "metric 'loss' is nan; most others tell a finite number"}
    strategy, result = play(grid=ForeignGrid(foreign_app(), faults=faults), rounds=1)
    _, whole = play(rounds=1)
    assert strategy.history[1]["odd_metrics"] == reason
    assert np.isfinite(strategy.history[1]["metrics"]["loss"])
    assert bits(result) == bits(whole)  # its values are in the mean already, and nothing is wrong with them
    inside, _ = play(strategy=SSFL(density=0.5, inner=FedMedian()), grid=ForeignGrid(foreign_app(), faults=faults))
    assert inside.history[1]["refused"] == reason
    assert np.isfinite(inside.history[1]["metrics"]["loss"])


def test_no_reply_weighs_more_than_the_most_examples_that_a_client_may_have() -> None:
    lies: dict[Where, Fault] = {
        ("train", 1, 2): changed(put("metrics", "num-examples", 2**40)),
        ("evaluate", 1, 2): changed(put("metrics", "num-examples", 2**40)),
        ("saliency", 0, 2): changed(put("facts", "samples", 2**40)),
    }
    strategy, _ = play(
        strategy=SSFL(density=0.5, most_examples=1000), grid=ForeignGrid(foreign_app(), faults=lies), rounds=1
    )
    reason = {"1002": f"the weight of a reply is {2**40}; it must be a number above 0, at most 1000"}
    first, second = strategy.history
    assert first["refused"] == second["refused"] == second["evaluate_refused"] == reason
    with pytest.raises(ValueError, match=r"most_examples is 0; it is a number above 0"):
        SSFL(most_examples=0)


def test_the_median_is_the_one_of_the_vectors_that_came() -> None:
    grid = ForeignGrid(foreign_app())
    strategy, result = play(strategy=SSFL(density=0.5, inner=FedMedian()), rounds=1, grid=grid)
    came = [np.frombuffer(c["arrays"]["values"].data, np.float32) for w, c in grid.replies if w[0] == "train"]  # type: ignore[index,call-overload]
    flat = Layout.of(net()).flatten(tensors(result.arrays))
    assert len(came) == 5
    np.testing.assert_array_equal(flat[strategy.mask.transmitted], np.median(np.stack(came), axis=0))


def test_a_lost_client_does_not_stop_a_robust_strategy() -> None:
    grid = ForeignGrid(foreign_app(), faults={("train", 2, 0): gone, ("train", 2, 1): BAD["NaN"][0]})
    strategy, _ = play(strategy=SSFL(density=0.5, inner=FedTrimmedAvg()), grid=grid)
    assert strategy.history[2]["ok"] == [1002, 1003, 1004]
    assert strategy.history[3]["aggregated"]


def test_an_inner_strategy_that_diverges_ends_the_run_by_name() -> None:
    with pytest.raises(RunFailed, match="FedAdam in round 1 returned arrays that are no model"):
        play(strategy=SSFL(density=0.5, inner=FedAdam(eta=1e9)))


# ---- foreign state dicts ---------------------------------------------------------------------------


def test_integer_buffers_travel_once_and_are_not_averaged() -> None:
    seen: Seen = []
    strategy, result = play(foreign_app(seen, norm=True), norm=True)
    template = net(norm=True).state_dict()
    for _, _, state in seen:
        assert list(state) == list(template)
    given = [state for what, _, state in seen if what == "given"]
    assert all(int(state["1.num_batches_tracked"]) == 0 for state in given)
    final = tensors(result.arrays)
    assert [(n, t.dtype, t.shape) for n, t in final.items()] == [(n, t.dtype, t.shape) for n, t in template.items()]
    assert not torch.equal(final["1.running_mean"], template["1.running_mean"])  # averaged, as FedAvg does
    rest = 16 + 16 * 2 + 16 * 2 + 3
    assert strategy.history[2]["bytes_train_down"] == 5 * 4 * (strategy.mask.count + rest)
    assert strategy.history[-1]["evaluate_metrics"]["accuracy"] > 0.8


def test_a_sheet_gives_back_names_shapes_types_order_and_fixed_arrays() -> None:
    arrays: dict[str, np.ndarray] = {
        "steps": np.array(7, np.int64),
        "a.weight": np.arange(6, dtype=np.float64).reshape(2, 3),
        "table": np.arange(4, dtype=np.int32).reshape(2, 2),
        "b.weight": np.ones((3, 1), np.float16),
        "flags": np.array([True, False]),
        "b.bias": np.full(3, 0.5, np.float32),
    }
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    spec = StateSpec.of(record, None, ("arrays", "config"))
    again = StateSpec.read(spec.written())
    assert again == spec
    assert again.prunable == ("a.weight", "b.weight")
    back = again.dense(again.flatten(record))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(back[name].numpy(), array)


def test_a_sheet_that_is_none_is_refused() -> None:
    for content in (b"", b"[]", b"{}", b"[[1], [], []]", b"\xff"):
        with pytest.raises(PayloadError):
            StateSpec.read({"sheet": np.frombuffer(content, np.uint8)})
    with pytest.raises(PayloadError, match="no array 'sheet'"):
        StateSpec.read({})


@pytest.mark.parametrize(("kind", "size"), [("fp16", 2), ("bf16", 2), ("int8", 1)])
def test_narrow_values(kind: str, size: int) -> None:
    strategy, _ = play(strategy=SSFL(density=0.5, values=kind), rounds=4)
    carried, scales = strategy.mask.count + 19, 4 if kind == "int8" else 0
    assert strategy.history[1]["bytes_train_up"] == 5 * (size * carried + scales)
    assert strategy.history[-1]["evaluate_metrics"]["accuracy"] > 0.85


def test_prunable_tensors_can_be_named() -> None:
    strategy, result = play(strategy=SSFL(density=0.5, prunable=["0.weight"]))
    assert strategy.mask.layout.prunable == ("0.weight",)
    assert (tensors(result.arrays)["2.weight"] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"density": 1.7}, "density is 1.7; it is a fraction in"),
        ({"density": 0.0}, "density is 0.0"),
        ({"scope": "row"}, "scope is 'row'"),
        ({"saliency_batches": 0}, "saliency_batches is 0"),
        ({"saliency_weighting": "loss"}, "saliency_weighting is 'loss'"),
        ({"saliency_share": 2.0}, "saliency_share is 2.0"),
        ({"min_per_layer": -1}, "min_per_layer is -1"),
        ({"values": "fp8"}, "values is 'fp8'"),
        ({"min_ok_fraction": -0.1}, "min_ok_fraction is -0.1"),
        ({"inner": FedAdam(), "fraction_train": 0.5}, r"\['fraction_train'\] beside inner: give them to FedAdam"),
        ({"inner": SSFL()}, "inner is SSFL"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        SSFL(**arguments)


@pytest.mark.parametrize(
    ("prunable", "arrays", "reason"),
    [
        (["1.weight"], net().state_dict(), r"prunable names \['1.weight'\]"),
        (None, [np.zeros(3, np.float32)], r"nothing is prunable among .*net.state_dict\(\)\) would keep the names"),
        (None, {"weight": torch.full((2, 2), torch.nan)}, "NaN"),
    ],
)
def test_a_bad_model_is_refused_before_anything_is_sent(prunable: Any, arrays: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SSFL(prunable=prunable).start(ForeignGrid(foreign_app()), ArrayRecord(arrays))


def test_importing_the_package_imports_neither_torch_nor_flower() -> None:
    code = (
        "import ssfl_app, sys; before = {'torch', 'flwr'} & set(sys.modules); from ssfl_app import SSFL; "
        "print(before, sorted(ssfl_app.__all__), SSFL.__name__, {'torch', 'flwr'} <= set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    names = ["SSFL", "SparseMod", "TopK", "active_mask", "mask_gradients", "sparse_mod", "sparse_numpy_mod"]
    names += ["ClientAlgorithm", "ConfigError", "Mask", "RunCallback", "RunFailed", "SparseStrategy", "Task"]
    names += ["load_run", "run", "InnerChannels", "inner_of", "narrowed_to"]
    assert done.stdout.strip() == f"set() {sorted(names)} SSFL True"


def test_flower_s_own_mods_work_behind_ours_and_noise_stays_in_the_mask() -> None:
    noisy = [message_size_mod, sparse_mod, arrays_size_mod, LocalDpMod(1.0, 1e-3, 10.0, 1e-5)]
    strategy, result = play(foreign_app(mods=noisy), SSFL(density=0.5, saliency_weighting="uniform"), rounds=1)
    plain = play(foreign_app(), SSFL(density=0.5, saliency_weighting="uniform"), rounds=1)[1]
    assert [record["ok"] for record in strategy.history] == [[1000 + i for i in range(5)]] * 2
    assert bits(result) != bits(plain)
    assert not dead(strategy, tensors(result.arrays)).any()
