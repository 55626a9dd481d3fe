"""SSFL in the place of FedAvg: laws of the client's half, whatever a foreign train function does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from flwr.serverapp.strategy import FedAvg
from torch import nn

from ssfl_app import SSFL, SparseMod, mask_gradients, sparse_mod, sparse_numpy_mod
from ssfl_app.comm.exchange import RunFailed
from ssfl_app.plugin.gradients import under_mask
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from tests.plugin.test_rounds import ForeignGrid, bits, data, dead, direct_mask, foreign_app, net, play, tensors

SIZES = {p: 60 + 10 * p for p in range(5)}

Train = Callable[[nn.Sequential, torch.Tensor, torch.Tensor, Context], None]


def app_of(train: Train, mod: Any = sparse_mod) -> ClientApp:
    """Return an app whose train function does what `train` does to the model that came."""
    app = ClientApp(mods=[mod])

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        x, y = data(int(context.node_config["partition-id"]))
        train(model, x, y, context)
        records = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    return app


def found(train: Train, mod: Any = sparse_mod, **arguments: Any) -> SSFL:
    """Return the strategy after discovery with such clients, and one round."""
    strategy = SSFL(density=0.5, fraction_evaluate=0.0, **arguments)
    play(app_of(train, mod), strategy, rounds=1)
    return strategy


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, rows: slice = slice(0, 20)
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()


# ---- whatever the train function does --------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    ],
)
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_any_torch_optimizer_tells_the_gradients(make: Any, weighting: str) -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = make(model.parameters())
        for _ in range(3):
            step(model, optimizer, x, y)

    assert found(train, saliency_weighting=weighting).mask == direct_mask(weighting, 1, 0.5, SIZES)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_a_function_that_catches_exceptions_is_left_all_the_same(weighting: str) -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            try:
                step(model, optimizer, x, y)
            except Exception:  # as training loops do that skip bad minibatches
                continue

    strategy = found(train, saliency_weighting=weighting)
    assert strategy.mask == direct_mask(weighting, 1, 0.5, SIZES)
    assert strategy.history[0]["scored_by"] == {"gradient": 5}


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_of_mixed_precision_are_unscaled(fused: bool) -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + int(context.node_config["partition-id"])))
        scaler.scale(nn.functional.cross_entropy(model(x[:20]), y[:20])).backward()
        scaler.step(optimizer)
        scaler.update()

    assert found(train).mask == direct_mask("samples", 1, 0.5, SIZES)


def test_tensors_may_be_spread_over_optimizers() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
        nn.functional.cross_entropy(model(x[:20]), y[:20]).backward()
        for optimizer in optimizers:
            optimizer.step()

    assert found(train, saliency_weighting="uniform").mask == direct_mask("uniform", 1, 0.5, SIZES)


def test_somebody_elses_optimizer_is_left_alone() -> None:
    stepped = []

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        other = nn.Linear(2, 1)
        before = other.weight.detach().clone()
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        stepped.append(not torch.equal(before, other.weight))
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)

    assert found(train).mask == direct_mask("samples", 1, 0.5, SIZES)
    assert len(stepped) == 10
    assert all(stepped)


def test_a_frozen_layer_is_an_error_that_names_it_and_says_what_to_do() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        model[0].requires_grad_(False)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)

    with pytest.raises(RunFailed, match=r"no optimizer had a gradient for \['0.weight'\]: frozen"):
        found(train)
    strategy = found(train, prunable=["2.weight"])
    assert strategy.mask.count == 24


def test_an_error_of_the_function_is_refused_and_the_hook_is_gone() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        raise KeyError("no data here")

    with pytest.raises(RunFailed, match=r"0 of 5 nodes answered well; .*KeyError: 'no data here"):
        found(train)
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(before, model.weight)


def test_the_question_leaves_the_functions_own_state_as_it_was() -> None:
    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        calls: Any = context.state.setdefault("own", ConfigRecord({"calls": 0}))
        calls["calls"] += 1
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)

    grid = ForeignGrid(app_of(train))
    play(strategy=SSFL(density=0.5, fraction_evaluate=0.0), rounds=2, grid=grid)
    states: Any = [context.state for context in grid._contexts.values()]
    assert [state["own"]["calls"] for state in states] == [2] * 5
    # 22 bytes hold 176 bits; the sheet is a line of text.
    assert all(len(state["ssfl-plugin"]["mask"]) == 22 for state in states)


def test_where_nothing_of_torch_steps_a_local_training_stands_in_and_says_so() -> None:
    layout, total = Layout.of(net()), np.zeros(176)

    def train(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
        nn.functional.cross_entropy(model(x[:20]), y[:20]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad  # a hand-written SGD

    strategy = found(train)
    assert strategy.history[0]["scored_by"] == {"difference": 5}
    before = layout.flatten(net().state_dict())
    for partition, size in SIZES.items():
        model = net()
        train(model, *data(partition), None)  # type: ignore[arg-type]
        total += size * np.abs(before * (before - layout.flatten(model.state_dict())))[layout.is_prunable]
    assert strategy.mask == Mask.top(layout, total.astype(np.float32), 0.5)


# ---- scores of one's own ---------------------------------------------------------------------------


def plain(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, context: Context) -> None:
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)


def gradients(message: Message, context: Context) -> tuple[dict[str, torch.Tensor], int]:
    """Return gradients of the first 20 examples, as a user with a class-balanced minibatch would."""
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    x, y = data(int(context.node_config["partition-id"]))
    nn.functional.cross_entropy(model(x[:20]), y[:20]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(x)


def test_a_function_of_ones_own_tells_gradients_or_scores() -> None:
    expected = direct_mask("samples", 1, 0.5, SIZES)
    strategy = found(plain, SparseMod(saliency=gradients))
    assert strategy.mask == expected
    assert strategy.history[0]["scored_by"] == {"own": 5}

    def scores(message: Message, context: Context) -> Any:
        told, count = gradients(message, context)
        state = net().state_dict()
        return {name: (g * state[name]).abs().numpy() for name, g in told.items()}, count

    assert found(plain, SparseMod(saliency=scores, returns="scores")).mask == expected


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (lambda m, c: gradients(m, c)[0], "return .arrays, number of examples."),
        (lambda m, c: ({"0.weight": torch.zeros(16, 8)}, 9), "told nothing about 2.weight"),
        (lambda m, c: ({"0.weight": torch.zeros(8, 16)}, 9), r"told shape \(8, 16\) for 0.weight"),
        (lambda m, c: (gradients(m, c)[0], -1), "must be a number above 0"),
        (lambda m, c: ({n: g * float("nan") for n, g in gradients(m, c)[0].items()}, 9), "NaN"),
        (lambda m, c: ({n: g * 0 for n, g in gradients(m, c)[0].items()}, 9), "no client told a score above 0"),
    ],
)
def test_bad_scores_of_ones_own_are_refused_with_a_reason(told: Any, reason: str) -> None:
    with pytest.raises(RunFailed, match=reason):
        found(plain, SparseMod(saliency=told))


def test_what_a_function_tells_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="returns is 'weights'; it is gradients or scores"):
        SparseMod(returns="weights")  # type: ignore[arg-type]


# ---- replies that do not fit -----------------------------------------------------------------------


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in state.items()}


def turned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(renamed, "the names must stay"), (turned, "0.weight came back with shape"), (None, "ArrayRecord")],
)
def test_a_reply_that_is_not_the_model_is_refused_by_what_is_wrong(spoil: Any, reason: str) -> None:
    app = ClientApp()

    @app.train(mods=[sparse_mod])
    def train(message: Message, context: Context) -> Message:
        state = net().state_dict() if spoil is None else spoil(net().state_dict())
        arrays = {} if spoil is None else {"arrays": ArrayRecord(state)}
        return Message(RecordDict({**arrays, "m": MetricRecord({"num-examples": 3})}), reply_to=message)

    with pytest.raises(RunFailed, match=reason):
        play(app, SSFL(density=1.0, fraction_evaluate=0.0), rounds=1)


def test_the_mod_stands_at_the_functions_or_at_the_app_or_both() -> None:
    _, whole = play(foreign_app())
    _, twice = play(foreign_app(mods=(arrays_size_mod, sparse_mod, sparse_mod)))
    assert bits(twice) == bits(whole)


def test_the_function_sees_its_config_and_the_records_under_its_own_names() -> None:
    app, seen = ClientApp(), list[dict[str, Any]]()

    @app.train(mods=[sparse_mod])
    def train(message: Message, context: Context) -> Message:
        config: Any = message.content["cfg"]
        seen.append(dict(config))
        config["lr"] = 0.0  # its own copy
        model = net()
        model.load_state_dict(message.content["facts"].to_torch_state_dict(), strict=True)
        x, y = data(0)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
        records = {"w": ArrayRecord(model.state_dict()), "m": MetricRecord({"n": 5, "loss": 1.0})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    keys: Any = {"arrayrecord_key": "facts", "configrecord_key": "cfg", "weighted_by_key": "n"}
    strategy = SSFL(density=0.5, fraction_evaluate=0.0, **keys)
    _, result = play(app, strategy, rounds=2, train_config=ConfigRecord({"lr": 0.1, "names": ["a", "b"]}))
    assert [config["server-round"] for config in seen] == [1] * 5 + [1] * 5 + [2] * 5
    assert all(config["lr"] == 0.1 and config["names"] == ["a", "b"] for config in seen)
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(1.0)


# ---- mask_gradients --------------------------------------------------------------------------------


def half() -> Mask:
    return Mask.random(Layout.of(net()), 0.5, np.random.default_rng(0))


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_mask_gradients_zeroes_the_dead_ones_only(explicit: bool, wrap: Any) -> None:
    model, mask = net(), half()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -1.0)
    model[0].weight.grad[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with under_mask(None if explicit else mask):
        mask_gradients(wrap(model), mask if explicit else None)
    for name, alive in mask.tensors().items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient[~alive] == 0).all()
        assert not torch.signbit(gradient[~alive]).any()
        assert (gradient[alive].nan_to_num(-1.0) == -1).all()
    assert (model[0].bias.grad == -1).all()


def test_mask_gradients_takes_tensors_by_name_and_does_nothing_outside_a_round() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mask_gradients(model)
    assert all((p.grad == 1).all() for p in model.parameters())  # type: ignore[union-attr]
    mask_gradients(model, {"2.weight": torch.zeros(3, 16, dtype=torch.bool)})
    assert (model[2].weight.grad == 0).all()
    assert (model[0].weight.grad == 1).all()


def test_mask_gradients_refuses_another_model() -> None:
    with pytest.raises(ValueError, match=r"the mask names \['0.weight', '2.weight'\]; the model's parameters are"):
        mask_gradients(nn.Linear(2, 1), half())
    with pytest.raises(ValueError, match=r"0.weight has shape \(1, 2\); the mask has \(16, 8\)"):
        mask_gradients(nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(16, 3)), half())


# ---- old style -------------------------------------------------------------------------------------


class OldClient(NumPyClient):
    """A client as they were written before the Message API."""

    def __init__(self, partition: int) -> None:
        self.partition, self.model = partition, net()

    def load(self, parameters: Any) -> None:
        names = self.model.state_dict()
        state = {name: torch.tensor(array) for name, array in zip(names, parameters, strict=True)}
        self.model.load_state_dict(state, strict=True)

    def fit(self, parameters: Any, config: Any) -> Any:
        from tests.plugin.test_rounds import fit

        self.load(parameters)
        loss = fit(self.model, self.partition, masked=True)
        arrays = [tensor.numpy() for tensor in self.model.state_dict().values()]
        return arrays, len(data(self.partition)[0]), {"loss": loss, "who": "me", "big": True}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        self.load(parameters)
        x, y = data(self.partition)
        right = (self.model.eval()(x).argmax(1) == y).float().mean().item()
        return 0.5, len(x), {"accuracy": right}


def old_app(mod: Any = sparse_numpy_mod) -> ClientApp:
    return ClientApp(lambda context: OldClient(int(context.node_config["partition-id"])).to_client(), mods=[mod])


def test_an_old_style_client_gets_the_same_model_to_the_bit() -> None:
    modern, result = play(foreign_app())
    strategy, old = play(old_app())
    assert strategy.history[0]["scored_by"] == {"gradient": 5}
    assert bits(old) == bits(result)
    assert old.train_metrics_clientapp[1]["loss"] == result.train_metrics_clientapp[1]["loss"]
    assert old.evaluate_metrics_clientapp[1]["accuracy"] == result.evaluate_metrics_clientapp[1]["accuracy"]
    assert old.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(0.5)
    assert strategy.history[1]["bytes_train_up"] == modern.history[1]["bytes_train_up"]


def test_arrays_without_names_stand_for_the_state_dict_in_its_order() -> None:
    strategy = SSFL(density=0.5, prunable=["0", "2"])
    initial = ArrayRecord([tensor.numpy() for tensor in net().state_dict().values()])
    result = strategy.start(ForeignGrid(old_app()), initial)
    _, named = play(old_app())
    assert list(result.arrays) == ["0", "1", "2", "3"]
    assert bits(result) == bits(named)


def test_an_old_style_client_works_under_a_stock_strategy_as_well() -> None:
    def run(app: ClientApp) -> dict[str, torch.Tensor]:
        grid = InlineGrid(app, {}, {1000 + p: p for p in range(3)})
        return tensors(FedAvg().start(grid, ArrayRecord(net().state_dict()), num_rounds=2).arrays)

    old, modern = run(old_app()), run(foreign_app(mods=()))
    for name, tensor in modern.items():
        torch.testing.assert_close(old[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_old_style_client_without_its_mod_is_refused_by_name() -> None:
    with pytest.raises(RunFailed, match=r"KeyError: 'fitins\.parameters"):
        play(old_app(sparse_mod), SSFL(density=1.0))


def test_dead_weights_of_an_old_style_client_are_0() -> None:
    strategy, result = play(old_app())
    assert (dead(strategy, tensors(result.arrays)) == 0).all()
