"""Fewer channels in somebody else's app: `SSFL(granularity="channel")`, and the networks that its clients make."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedMedian, Result
from torch import nn

from ssfl_app import SSFL, TopK, config, inner_of, mask_gradients, narrowed_to, sparse_mod
from ssfl_app.comm.messenger import Reply
from ssfl_app.core.algorithm import ServerContext
from ssfl_app.locks import RunFailed
from ssfl_app.sparsity.channels import unit_scores
from ssfl_app.sparsity.inner import InnerChannels
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.sparsity.values import write_values
from ssfl_app.strategies import REGISTRY
from tests.plugin.test_rounds import ForeignGrid, bits, tensors

SIZES = {0: 40, 1: 60, 2: 80}


def net(classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU()]
        second = [nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, classes))


def data(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = np.random.default_rng(partition).normal(size=(SIZES[partition], 1, 4, 4)).astype(np.float32)
    return torch.tensor(x), torch.tensor(x.reshape(len(x), -1)[:, :3].argmax(1))


def app_of_images(factory: Any = net, narrow: bool = True) -> ClientApp:
    app = ClientApp(mods=[sparse_mod])

    def start(message: Message) -> nn.Module:
        arrays: Any = message.content["arrays"]
        model: nn.Module = narrowed_to(factory(), arrays) if narrow else factory()
        model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
        return model

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, (x, y) = start(message), data(int(context.node_config["partition-id"]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for rows in torch.arange(len(x)).split(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            mask_gradients(model)  # every weight is alive
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(x)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model, (x, y) = start(message).eval(), data(int(context.node_config["partition-id"]))
        right = (model(x).argmax(1) == y).float().mean().item()
        metrics = MetricRecord({"accuracy": right, "num-examples": len(x)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def play(
    rounds: int = 2, app: ClientApp | None = None, luck: int = 0, density: float = 0.3, **arguments: Any
) -> tuple[SSFL, Result]:
    strategy = SSFL(density, **{"granularity": "channel", "channels": inner_of(net()), **arguments})
    grid, initial = ForeignGrid(app or app_of_images(), len(SIZES), luck), ArrayRecord(net().state_dict())
    return strategy, strategy.start(grid, initial, rounds)


def in_app(mask: str, scope: str, seed: int) -> dict[str, torch.Tensor]:
    """Return the first weights of `ssfl run`'s strategy, whose clients score the first 20 images of ours."""
    layout, keys = Layout.of(net()), {"mask.granularity": "channel", "mask.density": 0.3, "mask.scope": scope}
    keys |= {"strategy": mask, "run.seed": seed, "run.clients": len(SIZES), "run.cohort": len(SIZES)}
    strategy = REGISTRY[mask](ServerContext(layout, config.parse(config.merge(keys)).settings))
    strategy.state = state_of(net())

    def ask(question: str, clients: list[int], check: Any, take: Any, payload: Any) -> None:
        for client in clients:
            model, (x, y) = net(), data(client)
            nn.functional.cross_entropy(model(x[:20]), y[:20]).backward()
            scores = {name: (p.grad * p).abs() for name, p in model.named_parameters() if p.grad is not None}
            arrays = write_values(unit_scores(layout, layout.flatten_prunable(scores)), "fp32")
            take(Reply(arrays, {}, client=client, samples=SIZES[client]))

    strategy.before_training(ask)  # type: ignore[arg-type]
    return strategy.state


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("mask", ["ssfl", "shuffled", "random"])
def test_channels_and_first_weights_are_those_of_ssfl_run(mask: str, scope: Any) -> None:
    expected = in_app(mask, scope, seed=5)
    strategy, result = play(0, mask=mask, scope=scope, seed=5)
    found = tensors(result.arrays)
    assert {name for name in found if name not in expected} == {"4.num_batches_tracked"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    widths = {name: len(expected[f"{name}.weight"]) for name in ("0", "3", "8")}
    assert strategy.history[0]["widths"] == widths != {"0": 8, "3": 12, "8": 6}


def test_clients_train_the_small_network_for_its_bytes() -> None:
    strategy, result = play(3)
    small = narrowed_to(net(), result.arrays)
    small.load_state_dict(tensors(result.arrays), strict=True)
    size = sum(tensor.numel() for tensor in state_of(small).values())
    alive, whole = Layout.of(small).prunable_size, Layout.of(net()).prunable_size
    assert alive <= 0.3 * whole
    assert strategy.mask.count == alive
    assert strategy.history[0]["bytes_discovery_up"] == 3 * 4 * whole
    for record in strategy.history[1:]:
        assert record["bytes_train_up"] == record["bytes_train_down"] == record["bytes_evaluate_down"] == 3 * 4 * size
        assert (record["density"], record["density_all"]) == (alive / whole, size / Layout.of(net()).size)
    assert [record["bytes_mask_down"] > 0 for record in strategy.history[1:]] == [True, False, False]
    assert strategy.history[3]["evaluate_metrics"]["accuracy"] > strategy.history[1]["evaluate_metrics"]["accuracy"]


def test_the_order_of_replies_changes_no_bit() -> None:
    assert len({bits(play(luck=luck)[1]) for luck in range(3)}) == 1


def test_masked_sums_have_the_bits_of_clear_ones() -> None:
    masked = play(secure_aggregation=True, most_examples=80)[1]
    assert bits(masked) == bits(play(values="fixed32", most_examples=80)[1])


@pytest.mark.parametrize("arrays", ["vector", "model"])
@pytest.mark.parametrize("inner", [FedAdam, FedMedian])
def test_another_strategy_aggregates_the_small_network(inner: Any, arrays: Any) -> None:
    strategy, result = play(inner=inner(), inner_arrays=arrays)
    assert [len(record["ok"]) for record in strategy.history] == [3, 3, 3]
    assert Layout.of(narrowed_to(net(), result.arrays)).prunable_size == strategy.mask.count


def test_a_train_function_that_keeps_the_whole_network_is_named() -> None:
    with pytest.raises(RunFailed, match=r"training in round 1: 0 of 3 nodes.*loading state_dict for Sequential"):
        play(1, app_of_images(narrow=False))


def test_channels_of_a_tensor_with_several_names_stay() -> None:
    class Tied(nn.Sequential):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
            self[2].weight = self[1].weight

    told = [InnerChannels("1", 16, {"1.weight": 0, "1.bias": 0, "2.weight": 1})]
    grid, initial = ForeignGrid(app_of_images(Tied), len(SIZES)), ArrayRecord(Tied().state_dict())
    with pytest.raises(RunFailed, match=r"channels name \['1.weight', '2.weight'\], tensors with several names"):
        SSFL(0.5, granularity="channel", channels=told).start(grid, initial, 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"granularity": "2:4"}, "granularity is '2:4'; it is weight or channel"),
        ({"channels": []}, "channels are none; channels are those of the model, as inner_of"),
        ({"granularity": "weight"}, r"channels are \['0', '3', '8'\]; granularity 'weight' has none"),
        ({"criterion": "gradient"}, "criterion is 'gradient'; with granularity 'channel' it is snip"),
        ({"dead": "frozen"}, "dead is 'frozen'; with granularity 'channel' it is zero"),
        ({"mask": "flash"}, "granularity is 'channel'; mask 'flash' does not read it"),
        ({"density": 0.01}, "density is 0.01; the narrowest network costs 43 of 1,242, so it is at least 0.0347"),
        ({"channels": [InnerChannels("0", 8, {"1.kernel": 0})]}, "channels: '0' names axis 0 of '1.kernel'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        play(1, **arguments)


def test_topk_has_no_channels() -> None:
    with pytest.raises(ValueError, match="granularity is 'channel'; TopK does not read it"):
        TopK(granularity="channel", channels=inner_of(net()))


def test_a_network_is_narrowed_to_the_arrays_that_came() -> None:
    model = net()
    assert narrowed_to(model, model.state_dict()) is model
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    small = narrowed_to(
        model,
        {**state, "8.weight": state["8.weight"][:4], "8.bias": state["8.bias"][:4]}
        | {"10.weight": state["10.weight"][:, :4]},
    )
    assert isinstance(small, nn.Sequential)
    assert (small[8].out_features, small[10].in_features) == (4, 4)
    with pytest.raises(ValueError, match="those of no narrower network of this model"):
        narrowed_to(model, {**state, "8.weight": state["8.weight"][:4]})
    with pytest.raises(ValueError, match=r"tensors are .*; those of this model are"):
        narrowed_to(model, {"0.weight": state["0.weight"]})
