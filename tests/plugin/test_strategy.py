"""SSFL under strategies, optimizers and mods that their owners wrote for FedAvg."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx, FedXgbBagging, FedXgbCyclic
from torch import nn
from torch.nn.functional import cross_entropy

from ssfl_app import SSFL, TopK, active_mask, mask_gradients, sparse_mod
from ssfl_app.locks import RunFailed
from ssfl_app.plugin.gradients import under_mask
from ssfl_app.plugin.mod import QUESTION
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.text import cause
from tests.plugin.test_mod import app_of, half, old_app
from tests.plugin.test_rounds import ForeignGrid, bits, data, direct_mask, foreign_app, gone, net, play, tensors

TWO = {0: 60, 1: 70}


def told(strategy: SSFL, app: ClientApp | None = None, rounds: int = 2, **arguments: Any) -> tuple[SSFL, Any]:
    """Play with two nodes, and return the strategy and the result."""
    return play(strategy=strategy, rounds=rounds, grid=ForeignGrid(app or foreign_app(), nodes=2), **arguments)


@contextmanager
def log_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        yield caplog.records
    finally:
        logger.removeHandler(caplog.handler)


# ---- closures --------------------------------------------------------------------------------------

STEPPERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "LBFGS, line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", list(STEPPERS))
@pytest.mark.parametrize(("batches", "weighting"), [(1, "samples"), (3, "samples"), (3, "uniform")])
def test_with_a_closure_the_mask_is_that_of_the_gradients_at_the_initial_weights(
    name: str, batches: int, weighting: str
) -> None:
    first: list[bool] = []

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer, initial = STEPPERS[name](model.parameters()), net().state_dict()
        for rows in torch.arange(len(x)).split(20):
            calls = []

            def closure(rows: torch.Tensor = rows, calls: list[int] = calls) -> torch.Tensor:
                if not calls:
                    first.append(all(torch.equal(t, initial[n]) for n, t in model.state_dict().items()))
                calls.append(1)
                optimizer.zero_grad()
                loss = cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                return loss

            loss: Any = optimizer.step(closure=closure) if name == "Adam" else optimizer.step(closure)
            assert loss.item() > 0  # what Lightning logs

    strategy = SSFL(density=0.25, saliency_batches=batches, saliency_weighting=weighting, fraction_evaluate=0.0)
    told(strategy, app_of(train), rounds=0)
    assert strategy.history[0]["scored_by"] == {"gradient": 2}
    assert strategy.mask == direct_mask(weighting, batches, 0.25, TWO)
    assert all(first)


def test_gradients_that_a_closure_adds_to_accumulated_ones_count_together() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure(start: int) -> torch.Tensor:
            if start == 0:
                optimizer.zero_grad()
            loss = cross_entropy(model(x[start : start + 10]), y[start : start + 10]) / 2
            loss.backward()
            return loss

        closure(0)
        optimizer.step(lambda: closure(10).item())

    strategy = SSFL(density=0.5, fraction_evaluate=0.0)
    told(strategy, app_of(train), rounds=0)
    assert strategy.mask == direct_mask("samples", 1, 0.5, TWO)  # two halves of its 20


def test_scores_of_different_kinds_are_not_averaged_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        cross_entropy(model(x), y).backward()
        if context.node_config["partition-id"]:
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad  # type: ignore[operator]

    def warned(nodes: int) -> list[str]:
        caplog.clear()
        with log_of(caplog) as records:
            strategy = SSFL(density=0.5, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
            play(strategy=strategy, rounds=0, grid=ForeignGrid(app_of(train), nodes=nodes))
        return [record.getMessage() for record in records if record.levelno == logging.WARNING]

    assert not any("different units" in line for line in warned(1))
    assert any("1 by difference, 1 by gradient" in line and "different units" in line for line in warned(2))


# ---- what an optimizer and a train function may rely on --------------------------------------------


class Signs(torch.optim.Optimizer):
    """Takes it for granted that there are gradients; decays weights without one as well."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9).sub_(0.1 * parameter.grad.sign())


@pytest.mark.parametrize("make", [Signs, STEPPERS["Adam"]])
def test_gradients_are_there_during_and_after_a_step_that_changes_nothing(make: Any) -> None:
    norms: list[float] = []

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = make(model.parameters())
        for rows in torch.arange(len(x)).split(20):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            norms.append(sum(float(p.grad.norm()) for p in model.parameters()))  # type: ignore[union-attr]

    strategy = SSFL(density=0.5, fraction_evaluate=0.0, saliency_batches=3)
    told(strategy, app_of(train), rounds=0)
    assert strategy.mask == direct_mask("samples", 3, 0.5, TWO)
    assert len(norms) == 3 + 4
    assert min(norms) > 0


# ---- a subclass of SSFL ----------------------------------------------------------------------------


class Reads(SSFL):
    """Looks at everything, as custom strategies over FedAvg do."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.nodes = [reply.metadata.src_node_id for reply in replies]
        self.states = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
        self.losses = [reply.content["metrics"]["loss"] for reply in replies]
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        self.accuracies = [reply.content["metrics"]["accuracy"] for reply in replies]
        return super().aggregate_evaluate(server_round, replies)


@pytest.mark.parametrize("inner", [None, FedMedian])
def test_a_subclass_that_reads_replies_trains_the_same_model(inner: Any) -> None:
    _, plain = play(strategy=SSFL(density=0.5, inner=inner and inner()), rounds=2)
    reads = Reads(density=0.5, inner=inner and inner())
    _, result = play(strategy=reads, rounds=2)
    assert bits(result) == bits(plain)
    assert result.train_metrics_clientapp == plain.train_metrics_clientapp
    assert reads.nodes == [1000, 1001, 1002, 1003, 1004] == reads.history[2]["ok"]
    assert [len(each) for each in (reads.losses, reads.accuracies, reads.states)] == [5, 5, 5]
    for name, alive in reads.mask.tensors().items():
        assert all((state[name][~alive] == 0).all() for state in reads.states)
        assert any((state[name][alive] != 0).any() for state in reads.states)


def test_what_a_subclass_makes_of_a_reply_counts() -> None:
    class First(SSFL):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            state = replies[0].content["arrays"].to_torch_state_dict()
            state["0.bias"] = torch.full((16,), 7.0)
            replies[0].content["arrays"] = ArrayRecord(state)
            return super().aggregate_train(server_round, replies[:1])

    strategy, result = told(First(density=0.5, fraction_evaluate=0.0, min_ok_fraction=1.0), rounds=1)
    assert (tensors(result.arrays)["0.bias"] == 7).all()
    assert strategy.history[1]["ok"] == [1000, 1001]  # both answered well, whatever became of it

    class Spoils(SSFL):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies[1].content["metrics"]["num-examples"] = -1
            return super().aggregate_train(server_round, replies)

    spoils, _ = told(Spoils(density=0.5, fraction_evaluate=0.0), rounds=1)
    assert spoils.history[1]["ok"] == [1000]
    assert "must be a number above 0" in spoils.history[1]["refused"]["1001"]


def test_a_quorum_counts_those_that_were_asked() -> None:
    class Deaf(SSFL):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.messenger.report.ok.clear()  # as if nobody's answer had been looked at
            return super().aggregate_train(server_round, [])

    with pytest.raises(RunFailed, match=r"training in round 1: 0 of 2 nodes answered well"):
        told(Deaf(density=0.5))
    strategy, _ = told(SSFL(density=0.5), rounds=1)
    grid = ForeignGrid(foreign_app(), nodes=2)
    messages = strategy.messenger.build_messages("train", 2, [1000, 1001], strategy.model, {}, {})
    strategy.messenger.exchange(grid, messages, 0)  # and nobody listens
    assert not strategy.messenger.report.enough(0.5)


def test_a_subclass_gets_the_model_and_its_config_reaches_the_question() -> None:
    seen: list[dict[str, Any]] = []

    class Momentum(SSFL):
        calls = 0

        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            assert list(arrays) == list(net().state_dict())
            self.calls += 1
            config["decay"] = config.get("decay", 1.0) / 2
            return super().configure_train(server_round, arrays, config, grid)

    strategy, _ = told(Momentum(density=0.5, fraction_evaluate=0.0), noting(seen))
    assert [config["decay"] for config in seen] == [0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert strategy.calls == 2  # type: ignore[attr-defined]


def test_a_start_that_would_be_ignored_is_refused_by_name() -> None:
    class Custom(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    with pytest.raises(TypeError, match=r"inner is Custom, whose own start\(\) would never run"):
        SSFL(inner=Custom())

    for trees in (FedXgbBagging(), FedXgbCyclic()):  # the second one takes one client's model for the mean
        with pytest.raises(TypeError, match=rf"inner is {type(trees).__name__}, which aggregates trees"):
            SSFL(inner=trees)

    class Loop(SSFL):
        def start(self, grid: Any, initial_arrays: Any, *args: Any, **kwargs: Any) -> Any:
            return grid.send_and_receive(self.configure_train(1, initial_arrays, ConfigRecord(), grid))

    with pytest.raises(TypeError, match=r"Loop.start\(\) plays rounds of its own; .*call super\(\).start"):
        told(Loop(density=0.5))

    class Saves(SSFL):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            self.saved = super().start(*args, **kwargs)
            return self.saved

    strategy, result = told(Saves(density=0.5), rounds=1)
    assert strategy.saved is result  # type: ignore[attr-defined]


# ---- inner -----------------------------------------------------------------------------------------


def noting(seen: list[dict[str, Any]], mods: Any = (sparse_mod,)) -> ClientApp:
    """Return an app whose train function notes its config before it trains."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(dict(message.content["config"]))  # type: ignore[call-overload]
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)  # type: ignore[union-attr]
        cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        records = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 3})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    return app


def test_the_question_has_the_config_that_the_inner_strategy_writes_for_round_1() -> None:
    seen: list[dict[str, Any]] = []
    inner = FedProx(proximal_mu=0.5, fraction_evaluate=0.0)
    told(SSFL(density=0.5, inner=inner), noting(seen), rounds=1, train_config=ConfigRecord({"lr": 0.1}))
    assert [config["proximal-mu"] for config in seen] == [0.5] * 4
    assert [config["server-round"] for config in seen] == [1] * 4
    assert [config.get(QUESTION) for config in seen] == [True, True, None, None]
    assert [config["lr"] for config in seen] == [0.1] * 4


class Readdressed(SSFL):
    """Sends what one node should train on to another one."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if server_round == 1:
            (spare,) = {*grid.get_node_ids()} - {message.metadata.dst_node_id for message in messages}
            messages[0].metadata.dst_node_id = spare
        return messages


def test_a_subclass_may_send_to_another_node_than_was_sampled() -> None:
    seen: list[dict[str, Any]] = []
    strategy = Readdressed(density=0.5, fraction_train=0.5, min_train_nodes=1)
    told(strategy, noting(seen), rounds=1)
    assert len(seen) == 3  # two scored, one trained
    assert strategy.history[1]["lost"] == strategy.history[1]["refused"] == {}


class Halve(FedAvg):
    """Halves the learning rate in the config it was given, as Flower's own example does."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(fraction_evaluate=0.0, **arguments)
        self.rounds: list[int] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
        self.rounds.append(server_round)
        if server_round == 2:
            config["lr"] /= 2
        return super().configure_train(server_round, arrays, config, grid)


class Locked(Halve):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("make", [Halve, Locked])
def test_a_config_that_is_changed_in_place_stays_changed(make: type[Halve]) -> None:
    seen: list[dict[str, Any]] = []
    inner, config = make(), ConfigRecord({"lr": 0.1})
    told(SSFL(density=0.5, inner=inner), noting(seen), rounds=3, train_config=config)
    assert [told["lr"] for told in seen[2::2]] == [0.1, 0.05, 0.05]
    assert config["lr"] == 0.05
    if make is Halve:
        assert inner.rounds == [1, 2, 3]


def test_an_inner_strategy_may_ask_for_the_models_arrays() -> None:
    class Loads(FedAvg):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Any) -> Any:
            net().load_state_dict(arrays.to_torch_state_dict(), strict=True)
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            self.last = net()
            self.last.load_state_dict(arrays.to_torch_state_dict(), strict=True)
            return arrays, metrics

    inner = Loads()
    strategy, result = told(SSFL(density=0.5, inner=inner, inner_arrays="model"))
    for name, tensor in tensors(result.arrays).items():
        assert torch.equal(inner.last.state_dict()[name], tensor)
    with pytest.raises(RunFailed, match=r"Error\(s\) in loading|Missing key|Loads"):
        _refuse_keys(lambda: told(SSFL(density=0.5, inner=Loads())))
    _, vector = told(SSFL(density=0.5, inner=FedMedian()))
    _, model = told(SSFL(density=0.5, inner=FedMedian(), inner_arrays="model"))
    assert bits(vector) == bits(model)
    with pytest.raises(ValueError, match="inner_arrays is 'names'; it is vector or model"):
        SSFL(inner_arrays="names")  # type: ignore[arg-type]
    assert strategy.mask.count == 88


def _refuse_keys(run: Callable[[], Any]) -> None:
    try:
        run()
    except RuntimeError as error:
        raise RunFailed(str(error)) from error


# ---- mods, and what is said ------------------------------------------------------------------------


def test_a_metric_mod_in_front_finds_the_metrics_and_the_question_is_marked() -> None:
    seen: list[tuple[bool, list[str]]] = []

    def metric_mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        config: Any = message.content["config"]
        told = [name for record in reply.content.metric_records.values() for name in record]
        seen.append((bool(config.get(QUESTION)), told))
        return reply  # type: ignore[no-any-return]

    told(SSFL(density=0.5, fraction_evaluate=0.0), foreign_app(mods=(metric_mod, sparse_mod)), rounds=1)
    assert seen == [(True, [])] * 2 + [(False, ["loss", "num-examples"])] * 2


@pytest.mark.parametrize("name", ["facts", "arrays", "reply.facts"])
def test_a_record_may_be_called_like_one_of_ours(name: str) -> None:
    app = ClientApp()

    @app.train(mods=[sparse_mod])
    def train(message: Message, context: Context) -> Message:
        records = {"w": ArrayRecord(net().state_dict()), name: MetricRecord({"num-examples": 3, "loss": 2.0})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    _, result = told(SSFL(density=1.0, fraction_evaluate=0.0), app, rounds=1)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": 2.0}


def test_an_app_without_the_mod_is_told_so() -> None:
    for app, named in [(foreign_app(mods=()), "sparse_mod"), (old_app(lambda m, c, n: n(m, c)), "sparse_numpy_mod")]:
        with pytest.raises(RunFailed, match=rf"this app .*has no {named}.* \(raised: \w+"):
            told(SSFL(density=0.5), app)
    deaf = ClientApp()

    @deaf.train()
    def train(message: Message, context: Context) -> Message:
        records = {"arrays": ArrayRecord(net().state_dict()), "metrics": MetricRecord({"num-examples": 3})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    with pytest.raises(RunFailed, match=r"has no 'facts': this app has no sparse_mod; ClientApp\(mods=\[sparse_mod"):
        told(SSFL(density=0.5), deaf)


def test_a_reason_of_many_nodes_is_said_once_with_their_number() -> None:
    with pytest.raises(RunFailed, match=r"\([2-9] nodes \(\d+, .*\): this app") as failed:
        told(SSFL(density=0.5), foreign_app(mods=()))
    assert str(failed.value).count("has no sparse_mod") == 1


def test_an_argument_that_is_none_is_refused_by_the_class_the_user_called() -> None:
    for wrong, near in [("densty", "density"), ("fraction_trian", "fraction_train")]:
        with pytest.raises(TypeError, match=rf"^SSFL has no argument '{wrong}'; did you mean {near}\?$"):
            SSFL(**{wrong: 0.5})
    with pytest.raises(TypeError, match=r"^SSFL has no argument 'zzz'$"):
        SSFL(inner=FedAvg(), zzz=0.5)


class Tables(nn.Module):
    """A tied head, and a table of whole numbers as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("position_ids", torch.arange(77)[None])


def tables_app(count: int = 0) -> ClientApp:
    app = ClientApp(mods=[sparse_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = Tables()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.head(model.wte(torch.tensor([1, 2]))).square().sum().backward()
        optimizer.step()
        model.position_ids += count  # type: ignore[operator]
        # In floats a mean of whole numbers with these weights is not whole.
        metrics = MetricRecord({"num-examples": 3 + 4 * int(context.node_config["partition-id"])})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("inner", [FedAvg, FedAdam])
def test_a_table_of_whole_numbers_outlives_what_an_inner_strategy_makes_of_it(inner: Any) -> None:
    initial = ArrayRecord(Tables().state_dict())

    def start(app: ClientApp) -> ArrayRecord:
        strategy = SSFL(density=0.5, inner=inner(fraction_evaluate=0.0), inner_arrays="model")
        return strategy.start(InlineGrid(app, {}, {7: 0, 8: 1, 9: 2}), initial, num_rounds=2).arrays

    table = start(tables_app())["position_ids"].numpy()
    np.testing.assert_array_equal(table, initial["position_ids"].numpy())
    with pytest.raises(RunFailed, match=r"position_ids .* came back changed"):
        start(tables_app(count=1))


def test_a_subclass_that_changes_one_name_of_a_tied_tensor_is_named_and_no_node_is() -> None:
    class Halves(SSFL):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            for reply in replies:
                arrays = reply.content["arrays"]
                arrays["wte.weight"] = Array(arrays["wte.weight"].numpy() / 2)
            return super().aggregate_train(server_round, replies)

    with pytest.raises(
        RunFailed, match=r"^Halves.aggregate_train gave wte.weight and head.weight other values; .*change both$"
    ):
        Halves(density=0.5, fraction_evaluate=0.0).start(
            InlineGrid(tables_app(), {}, {7: 0, 8: 1}), ArrayRecord(Tables().state_dict()), num_rounds=1
        )


def test_a_train_function_that_tells_no_number_of_examples_is_told_so() -> None:
    app = ClientApp()

    @app.train(mods=[sparse_mod])
    def train(message: Message, context: Context) -> Message:
        records = {"arrays": ArrayRecord(net().state_dict()), "metrics": MetricRecord({"loss": 3})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    with pytest.raises(RunFailed, match=r"ValueError: no metric 'num-examples' among \['loss'\]; it weighs"):
        told(SSFL(density=0.5), app)


RAY = (
    "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1)\n"
    '  File "a.py", line 1, in f\n    x()\n  File "b.py", line 2\n    y\nKeyError: \'loss\'\nmore of it\n\n'
    "The above exception was the direct cause of the following exception:\n\nray::ClientAppActor.run() (pid=1)\n"
    '  File "r.py", line 65, in run\n    raise ClientAppException(str(ex)) from ex\n'
    "flwr.clientapp.client_app.ClientAppException: \nException ClientAppException occurred. Message: 'loss''>"
)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("<class 'KeyError'>:<''num-examples''>", "KeyError: 'num-examples'"),
        ("<class 'a.b.NodeError'>:<'no such patient\n  at all'>", "NodeError: no such patient"),
        (
            "NotImplementedError: Could not run 'aten::x'.\n\nCPU: at y\nPythonDispatcher: registered",
            "NotImplemented",
        ),
        ("Traceback (most recent call last):\n  File 'x'\n    y\nValueError: first\nlast", "ValueError: first"),
        (RAY, "KeyError: 'loss'"),
        ("<class 'StopIteration'>:<''>", "StopIteration"),
        ("ValueError: Traceback", "ValueError: Traceback"),
        ("", "no reason given"),
        ("<class 'A'>:<'" + "x" * 10**6 + "'>", "A: xxx"),
    ],
)
def test_a_reason_is_said_by_its_cause(reason: str, line: str) -> None:
    def raised(grid: ForeignGrid, message: Message) -> Message:
        return Message(Error(2, reason), reply_to=message)

    said = cause(reason)
    assert said.startswith(line) if line.endswith(("xxx", "NotImplemented")) else said == line
    assert len(said) <= 300
    strategy = SSFL(density=1.0, min_ok_fraction=0.5, fraction_evaluate=0.0)
    grid = ForeignGrid(foreign_app(), nodes=2, faults={("train", 1, 0): raised})
    play(strategy=strategy, rounds=1, grid=grid)
    assert strategy.history[0]["refused"] == {"1000": f"raised: {said}"}


# ---- mask_gradients --------------------------------------------------------------------------------


def mask_of(model: nn.Module) -> Mask:
    return Mask.random(Layout.of(model), 0.5, np.random.default_rng(0))


def masked(model: nn.Module, whole: nn.Module | None = None, **arguments: Any) -> Mask:
    """Give each parameter a gradient of 1, mask those of `model`, and return the mask of the whole."""
    mask = mask_of(whole or model)
    for parameter in (whole or model).parameters():
        parameter.grad = torch.ones_like(parameter)
    with under_mask(mask):
        mask_gradients(model, **arguments)
    return mask


def check(mask: Mask, whole: nn.Module, untouched: tuple[str, ...] = ()) -> None:
    for name, alive in mask.tensors().items():
        gradient = whole.get_parameter(name).grad
        assert gradient is not None
        expected = torch.ones_like(gradient) if name.startswith(untouched) and untouched else alive.float()
        assert torch.equal(gradient, expected), name


class Named(nn.Module):
    """Attributes that are called as wrappers are, or nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_module, self.module, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)


class Wrapper(nn.Module):
    """Names its one child as torch.compile, Opacus or PEFT do."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.add_module(name, child)


def test_names_are_taken_as_they_are_before_anything_is_stripped() -> None:
    model = Named()
    check(masked(model), model)
    check(masked(nn.DataParallel(model), model), model)


@pytest.mark.parametrize("name", ["_orig_mod", "_module", "module"])
def test_wrappers_are_looked_through_wherever_they_are_and_on_either_side(name: str) -> None:
    model = nn.Sequential(Wrapper(name, nn.Linear(4, 4)), nn.Linear(4, 2))
    check(masked(model), model)  # in the state dict as well
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    check(masked(Wrapper(name, inner), inner), inner)
    plain = mask_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mask_gradients(model, plain)
    first, second = plain.tensors().values()
    assert torch.equal(model[0].get_parameter(f"{name}.weight").grad, first.float())  # type: ignore[arg-type]
    assert torch.equal(model[1].weight.grad, second.float())


def test_a_part_of_the_model_is_masked_by_its_place() -> None:
    gan = nn.ModuleDict({"g": nn.Sequential(nn.Linear(3, 4)), "d": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))})
    check(masked(gan["d"], gan), gan, untouched=("g",))
    twins = nn.ModuleDict({"g": nn.Linear(3, 4), "d": nn.Linear(3, 4)})
    with pytest.raises(ValueError, match=r"fits at \['g\.', 'd\.'\]; say which one by prefix='g\.'"):
        masked(twins["d"], twins)
    check(masked(twins["d"], twins, prefix="d."), twins, untouched=("g",))
    with pytest.raises(ValueError, match=r"under prefix 'x\.' the mask has \[\]"):
        masked(twins["d"], twins, prefix="x.")


def test_the_whole_is_masked_where_a_part_of_it_travels() -> None:
    part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    lightning = nn.ModuleDict({"net": part, "loss": nn.Linear(2, 2)})
    check(masked(lightning, part), part)


def test_a_tied_tensor_is_masked_by_either_name() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["wte"].weight  # type: ignore[assignment]
    alive = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    for name in ("wte.weight", "head.weight"):
        model["wte"].weight.grad = torch.ones(6, 4)  # type: ignore[assignment]
        mask_gradients(model, {name: alive})
        assert torch.equal(model["wte"].weight.grad, alive.float())  # type: ignore[arg-type]


def test_sparse_gradients_are_masked() -> None:
    model = nn.Embedding(6, 4, sparse=True)
    alive = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    model(torch.tensor([1, 3, 3])).sum().backward()
    dense = model.weight.grad.to_dense()  # type: ignore[union-attr]
    mask_gradients(model, {"weight": alive})
    assert model.weight.grad is not None
    assert model.weight.grad.is_sparse
    assert torch.equal(model.weight.grad.to_dense(), dense * alive)
    with torch.no_grad():
        model.weight.masked_fill_(~alive, 0.0)
    torch.optim.SparseAdam(model.parameters()).step()
    assert (model.weight[~alive] == 0).all()


class Private(torch.optim.SGD):
    """Makes its gradients itself, noise included, as Opacus's does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        return super().step(closure)


def test_dead_weights_are_0_after_the_step_whatever_the_optimizer_makes_of_gradients() -> None:
    seen: list[tuple[Mask | None, dict[str, torch.Tensor]]] = []

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = Private(model.parameters(), lr=0.1, momentum=0.9)
        for rows in torch.arange(len(x)).split(20):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            mask_gradients(model)
            optimizer.step()
        seen.append((active_mask(), {name: t.clone() for name, t in model.state_dict().items()}))

    strategy, _ = told(SSFL(density=0.5, fraction_evaluate=0.0), app_of(train), rounds=1)
    assert [mask for mask, _ in seen] == [None, None, strategy.mask, strategy.mask]
    assert active_mask() is None
    for mask, state in seen[2:]:
        assert mask is not None
        for name, alive in mask.tensors().items():
            assert (state[name][~alive] == 0).all()
            assert (state[name][alive] != 0).all()


@pytest.mark.parametrize(
    "arguments", [{}, {"inner": True}, {"values": "fixed32", "most_examples": 100}, {"mask": "random"}]
)
def test_frozen_weights_stay_what_the_initial_arrays_have(arguments: dict[str, Any]) -> None:
    """At the server, in what functions are given, and with `mask_gradients` in what they return."""
    if "inner" in arguments:
        arguments = {"inner": FedAdam(fraction_evaluate=0.0), "inner_arrays": "model"}
    else:
        arguments = {"fraction_evaluate": 0.0, **arguments}
    seen: list[dict[str, torch.Tensor]] = []

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        if active_mask() is not None:
            seen.append({name: t.clone() for name, t in model.state_dict().items()})
        optimizer = Private(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for rows in torch.arange(len(x)).split(20):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            mask_gradients(model)
            optimizer.step()
        if active_mask() is not None:
            seen.append({name: t.clone() for name, t in model.state_dict().items()})

    criterion = {} if "mask" in arguments else {"criterion": "gradient"}
    strategy, result = told(SSFL(density=0.25, dead="frozen", **criterion, **arguments), app_of(train), rounds=2)
    initial = {name: t.clone() for name, t in net().state_dict().items()}
    seen.append(result.arrays.to_torch_state_dict())
    assert len(seen) == 2 * 2 * 2 + 1
    for state in seen:
        for name, alive in strategy.mask.tensors().items():
            assert torch.equal(state[name][~alive], initial[name][~alive])
    for name, alive in strategy.mask.tensors().items():
        assert (seen[-1][name][alive] != initial[name][alive]).all()
    kept = 4 * (strategy.mask.alive.size - strategy.mask.count)
    assert strategy.history[1]["bytes_mask_down"] > 2 * kept  # once to each node
    assert strategy.history[2]["bytes_mask_down"] == 0


def test_a_node_that_lost_its_frozen_weights_is_sent_them_again() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        context.state.pop("ssfl-plugin", None)

    strategy, _ = told(SSFL(density=0.25, dead="frozen", mask="random", fraction_evaluate=0.0), app_of(train))
    assert len(strategy.history[2]["ok"]) == 2
    assert strategy.history[2]["bytes_mask_down"] == strategy.history[1]["bytes_mask_down"] > 0


def test_what_cannot_freeze_is_refused() -> None:
    with pytest.raises(ValueError, match="dead is 'frozen'; mask 'flash' does not read it"):
        SSFL(mask="flash", dead="frozen")
    with pytest.raises(ValueError, match="dead is 'frozen'; TopK does not read it"):
        TopK(dead="frozen")
    with pytest.raises(ValueError, match="dead is 'kept'; it is zero or frozen"):
        SSFL(dead="kept")


def test_only_the_step_that_follows_is_masked() -> None:
    model, mask = net(), half()
    optimizer = Private(model.parameters(), lr=0.1)
    mask_gradients(model, mask)  # without any gradient yet, as a private optimizer has none
    optimizer.step()
    dead = {name: ~alive for name, alive in mask.tensors().items()}
    assert all((model.get_parameter(name)[where] == 0).all() for name, where in dead.items())
    optimizer.step()
    assert all((model.get_parameter(name)[where] != 0).all() for name, where in dead.items())


def test_a_lost_node_counts_in_the_quorum_of_a_subclass() -> None:
    faults: Any = {("train", 1, 0): gone}
    grid = ForeignGrid(foreign_app(), nodes=2, faults=faults)
    with pytest.raises(RunFailed, match="1 of 2 nodes answered well; min_ok_fraction is 1"):
        play(strategy=Reads(density=0.5, min_ok_fraction=1.0), rounds=1, grid=grid)
