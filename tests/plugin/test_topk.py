"""TopK in the place of FedAvg: what the strategy `topk` of `ssfl run` makes of the same trainings, bit for bit."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ssfl_app import SSFL, TopK, sparse_mod
from ssfl_app.comm.payload import SERIAL_TYPE
from ssfl_app.core.means import OverlapMean, WeightedMean
from ssfl_app.locks import RunFailed
from ssfl_app.sparsity.codec import BitmapAndValues
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from tests.plugin.test_mod import old_app
from tests.plugin.test_rounds import ForeignGrid, bits, fit, foreign_app, net, play, tensors

LAYOUT = Layout.of(net())
ALIVE, REST = 44, 19  # floor(0.25 * (8 * 16 + 16 * 3)), and the biases


def two(rounds: int = 2, app: Any = None, faults: Any = None, **arguments: Any) -> tuple[TopK, Any, ForeignGrid]:
    grid = ForeignGrid(app or foreign_app(), 2, faults=faults)
    strategy: Any = TopK(density=0.25, fraction_evaluate=0.0, **arguments)
    return (*play(strategy=strategy, rounds=rounds, grid=grid), grid)  # type: ignore[return-value]


def trained(flat: np.ndarray, partition: int) -> np.ndarray:
    model = net()
    model.load_state_dict(LAYOUT.unflatten(flat))
    fit(model, partition, masked=False)
    return LAYOUT.flatten(model.state_dict())


def by_hand(rounds: int, of: str, mean: str, error_feedback: bool) -> np.ndarray:
    """Return the model after so many rounds of two clients with 60 and 70 examples."""
    flat, kept = LAYOUT.flatten(net().state_dict()), [np.zeros(LAYOUT.size, dtype=np.float32)] * 2
    for _ in range(rounds):
        zeros, overlap = WeightedMean(LAYOUT.size), OverlapMean(LAYOUT.size)
        for client in range(2):
            values = trained(flat, client)
            if of == "update":
                values = values - flat + kept[client]
            sent = Mask.top(LAYOUT, abs(values[LAYOUT.is_prunable]), 0.25).transmitted
            part = np.where(sent, values, np.float32(0))
            if error_feedback:
                kept[client] = values - part
            zeros.add(part, 60 + 10 * client)
            overlap.add(part, sent, 60 + 10 * client)
        found = overlap.value(flat) if mean == "overlap" else zeros.value()
        flat = flat + found if of == "update" else found
    return flat


@pytest.mark.parametrize(
    "options",
    [
        {"of": "weights", "mean": "zeros", "index": "bitmap"},
        {"of": "weights", "mean": "overlap", "index": "int32"},
        {"of": "update", "index": "bitmap"},
        {"of": "update", "index": "bitmap", "error_feedback": True},
    ],
)
def test_the_model_is_that_of_the_strategy_topk(options: Any) -> None:
    strategy, result, _ = two(rounds=3, **options)
    expected = by_hand(3, options["of"], options.get("mean", "zeros"), options.get("error_feedback", False))
    np.testing.assert_array_equal(LAYOUT.flatten(tensors(result.arrays)), expected)
    places = 4 * ALIVE if options["index"] == "int32" else -(-LAYOUT.prunable_size // 8)
    record = strategy.history[3]
    assert record["bytes_train_up"] == 2 * (4 * (ALIVE + REST) + places)
    assert record["bytes_train_down"] == 2 * 4 * LAYOUT.size
    assert strategy.mask.count == LAYOUT.prunable_size
    assert not record["refused"]


def test_values_travel_as_told() -> None:
    strategy, _, _ = two(rounds=1, values="bf16")
    assert strategy.history[1]["bytes_train_up"] == 2 * (2 * (ALIVE + REST) + LAYOUT.prunable_size // 8)


def test_density_1_asks_nothing_and_is_the_mean() -> None:
    strategies: Any = [kind(density=1.0, fraction_evaluate=0.0) for kind in (TopK, SSFL)]
    results = [play(strategy=each, rounds=2, grid=ForeignGrid(foreign_app(), 2))[1] for each in strategies]
    assert [record["round"] for record in strategies[0].history] == [1, 2]
    assert bits(results[0]) == bits(results[1])


def test_the_order_of_replies_changes_no_bit() -> None:
    runs = []
    for luck in (0, 5):
        strategy: Any = TopK(density=0.25, of="update", error_feedback=True, fraction_evaluate=0.0)
        runs.append(bits(play(strategy=strategy, rounds=2, grid=ForeignGrid(foreign_app(), 4, luck))[1]))
    assert runs[0] == runs[1]


def test_an_old_style_client_sends_its_largest_too() -> None:
    strategy, _, _ = two(rounds=1, app=old_app())
    assert strategy.history[1]["bytes_train_up"] == 2 * (4 * (ALIVE + REST) + LAYOUT.prunable_size // 8)


# ---- error feedback in the node's state -----------------------------------------------------------------


def broken(grid: ForeignGrid, message: Message) -> Message:
    """Train, and lose the answer on its way."""
    reply = grid.work(message)
    reply.content["arrays"] = ArrayRecord()
    return reply


def test_what_was_kept_for_an_answer_that_never_counted_did_not_happen() -> None:
    seen: list[tuple[int, int, int]] = []

    def note(message: Message, context: Context, call_next: Any) -> Message:
        facts: Any = message.content["facts"]
        if facts["ssfl"] == "train":
            seen.append((facts["round"], int(context.node_config["partition-id"]), facts["since"]))
        return call_next(message, context)  # type: ignore[no-any-return]

    app = foreign_app(mods=(note, sparse_mod))
    arguments: Any = {"of": "update", "error_feedback": True, "min_ok_fraction": 0.5}
    strategy, _, grid = two(rounds=3, app=app, faults={("train", 2, 1): broken}, **arguments)
    assert list(strategy.history[2]["refused"]) == ["1001"]
    assert sorted(seen) == [(1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1), (3, 0, 2), (3, 1, 1)]
    held: Any = [grid._contexts[node].state["ssfl-personal"] for node in (1000, 1001)]
    assert [sorted(map(int, record)) for record in held] == [[2, 3], [1, 3]]


def test_a_node_that_lost_its_state_begins_anew() -> None:
    def forgets(grid: ForeignGrid, message: Message) -> Message:
        grid.context(message).state = RecordDict()
        return grid.work(message)

    arguments: Any = {"of": "update", "error_feedback": True}
    strategy, result, _ = two(rounds=2, faults={("train", 2, 1): forgets}, **arguments)
    assert strategy.history[2]["refused"] == {}
    assert not np.array_equal(LAYOUT.flatten(tensors(result.arrays)), by_hand(2, "update", "zeros", True))


# ---- replies that lie -----------------------------------------------------------------------------------


def sends(count: int, value: float = 1.0) -> Any:
    def lie(grid: ForeignGrid, message: Message) -> Message:
        reply, alive = grid.work(message), np.arange(LAYOUT.prunable_size) < count
        state = LAYOUT.unflatten(np.full(LAYOUT.size, value, dtype=np.float32))
        arrays = BitmapAndValues().encode(LAYOUT, state, Mask(LAYOUT, alive))
        record = {n: Array(a.dtype.name, a.shape, SERIAL_TYPE, a.tobytes()) for n, a in arrays.items()}
        reply.content["arrays"] = ArrayRecord(record)
        return reply

    return lie


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (sends(ALIVE + 1), "45 weights came up; density 0.25 is 44"),
        (sends(0), "0 weights came up"),
        (sends(ALIVE, np.nan), "NaN|not finite"),
        (broken, "no array"),
    ],
)
def test_a_reply_that_is_none_is_refused_by_name(lie: Any, reason: str) -> None:
    with pytest.raises(RunFailed, match=rf"1 of 2 nodes.*{reason}"):
        two(rounds=1, faults={("train", 1, 1): lie}, min_ok_fraction=1.0)


def counting(examples: float) -> ClientApp:
    app = ClientApp(mods=[sparse_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        fit(model, 0, masked=False)
        metrics = MetricRecord({"num-examples": examples})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def test_with_overlap_weights_are_whole_and_no_sum_overflows() -> None:
    for wrong in (2.5, 2.0**22 + 1):
        with pytest.raises(RunFailed, match=r"with mean 'overlap' it is whole, at most 4194304"):
            two(rounds=1, app=counting(wrong), mean="overlap")
        strategy, _, _ = two(rounds=1, app=counting(wrong))
        assert not strategy.history[1]["refused"]


# ---- users' own ------------------------------------------------------------------------------------------


def test_a_subclass_sees_what_came_up_as_models() -> None:
    seen: list[int] = []

    class Mine(TopK):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            seen.extend(int((r.content["arrays"]["0.weight"].numpy() != 0).sum()) for r in replies)
            return super().aggregate_train(server_round, replies)

    strategy: Any = Mine(density=0.25, fraction_evaluate=0.0, mean="overlap")
    _, result = play(strategy=strategy, rounds=1, grid=ForeignGrid(foreign_app(), 2))
    assert len(seen) == 2
    assert all(0 < count <= ALIVE for count in seen)
    np.testing.assert_array_equal(LAYOUT.flatten(tensors(result.arrays)), by_hand(1, "weights", "overlap", False))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"of": "gradient"}, "of is 'gradient'; it is one of weights, update"),
        ({"error_feedback": 1}, r"error_feedback is 1; it is true or false \(bool, not int\)"),
        ({"error_feedback": True}, "topk.error-feedback is true; with topk.of 'weights' it is false"),
        ({"of": "update", "mean": "overlap"}, "topk.mean is 'overlap'; with topk.of 'update' it is 'zeros'"),
        ({"inner": None}, "TopK has no argument 'inner'"),
        ({"mask": "ssfl"}, "TopK has no argument 'mask'"),
        ({"criterion": "magnitude"}, "criterion is 'magnitude'; TopK does not read it"),
        ({"densty": 0.1}, "TopK has no argument 'densty'; did you mean density"),
        ({"error_fedback": True}, "TopK has no argument 'error_fedback'; did you mean error_feedback"),
        ({"density": 0.0}, "density is 0.0"),
    ],
)
def test_arguments_that_are_none_are_refused_at_once(arguments: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{reason}"):
        TopK(**arguments)


def test_it_is_started_by_its_own_start() -> None:
    assert issubclass(TopK, SSFL)
    with pytest.raises(RuntimeError, match="TopK was not started"):
        _ = TopK().mask
