"""ZeroFL: what computes, what learns, and what travels in each of its three ways."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn
from torch.nn import functional

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.sparsity.codec import BitmapAndValues, Dense
from ssfl_app.sparsity.layout import Layout, State, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.zerofl import ZeroFl, ZeroFlClient, sent_mask
from ssfl_app.training.reparam import originals
from tests.in_process_grid import SMALL, Played, aggregate, play, tamper

pytestmark = pytest.mark.narrow

SIZES = {"0.weight": 144, "3.weight": 4_608, "8.weight": 32_768, "10.weight": 640}
P, R = 38_160, 170  # all of these, and biases and norm weights
UPLINKS = ("top-weights", "top-weights-diff", "top-diff")
SMALLEST = Layout((("0.weight", (1, 2)), ("1.weight", (1, 4)), ("1.bias", (1,))), ("0.weight", "1.weight"))


def run(**keys: Any) -> Played:
    return play({"strategy": "zerofl", **{key.replace("__", ".").replace("_", "-"): v for key, v in keys.items()}})


def shop_and_rule(keys: Flat) -> tuple[Runtime, ZeroFlClient]:
    shop = get_runtime(merge(SMALL, {"strategy": "zerofl"}, keys))
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    rule = shop.rule(0, ClientState(context, 0))
    assert isinstance(rule, ZeroFlClient)
    return shop, rule


def letter(shop: Runtime, state: State) -> Payload:
    return Payload(Dense().encode(shop.layout, state, shop.dense), {"round": 1, "digest": shop.dense.digest})


def pruned(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The floor(share * size) largest in magnitude, equal ones by index."""
    flat = tensor.detach().numpy().ravel()
    kept = np.zeros_like(flat)
    places = np.argsort(-np.abs(flat), kind="stable")[: math.floor(share * flat.size)]
    kept[places] = flat[places]
    return torch.from_numpy(kept.reshape(tensor.shape))


# ---- local training ------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    """The gradient of a plain model that holds the largest weights, from the largest activations, moves all of w."""
    keys: Flat = {"local.batch-size": 10_000, "local.clip": 0.0, "local.lr": 0.5, "local.weight-decay": 0.0}
    shop, rule = shop_and_rule(keys | {"zerofl.uplink": "top-diff", "zerofl.r-mask": 1.0})
    w, model = {name: tensor.clone() for name, tensor in shop.initial_state().items()}, shop.model
    came, mask = BitmapAndValues().decode(rule.train(letter(shop, w)).arrays, shop.layout)
    assert mask.count == P

    load_state(model, {n: pruned(t, 0.2) if n in SIZES and n != "0.weight" else t for n, t in w.items()})
    inputs: dict[str, torch.Tensor] = {}
    slopes: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def keep(layer: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                inputs[name] = args[0].detach()
                output.register_hook(lambda slope: slopes.__setitem__(name, slope))

            hooks.append(layer.register_forward_hook(keep))
    images = rule.context.train
    loss = functional.cross_entropy(model(shop.data.transform.test(images.inputs)), images.labels)
    plain = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    for hook in hooks:
        hook.remove()
    weight = torch.nn.grad.conv2d_weight
    wanted = plain | {
        "3.weight": weight(pruned(inputs["3"], 0.2), w["3.weight"].shape, slopes["3"], padding=1),
        "8.weight": slopes["8"].T @ pruned(inputs["8"], 0.2),
        "10.weight": slopes["10"].T @ pruned(inputs["10"], 0.2),
    }
    for name, gradient in wanted.items():
        torch.testing.assert_close(came[name], -0.5 * gradient, rtol=1e-3, atol=1e-6)
        if name in ("3.weight", "8.weight"):
            assert not torch.allclose(came[name], -0.5 * plain[name], rtol=1e-3, atol=1e-6)
    # The weights that did not compute moved too, and were not overwritten by 0.
    for name in ("3.weight", "8.weight", "10.weight"):
        idle = pruned(w[name], 0.2) == 0
        assert (came[name][idle] != 0).float().mean() > 0.3
        assert (w[name] + came[name])[idle].abs().mean() > 0.9 * w[name][idle].abs().mean()


@pytest.mark.parametrize("uplink", UPLINKS)
def test_with_density_1_it_is_fedavg(uplink: str) -> None:
    keys: Flat = {"mask.density": 1.0, "zerofl.uplink": uplink, "run.rounds": 1}
    ours, plain = play({"strategy": "zerofl", **keys}), play({"strategy": "fedavg", "run.rounds": 1})
    if uplink == "top-weights":
        assert ours.bits() == plain.bits()
    gap = ours.layout.flatten(ours.strategy.state) - plain.layout.flatten(plain.strategy.state)
    assert np.abs(gap).max() < 1e-6  # w + (w_k - w) is w_k up to rounding


# ---- what travels up -----------------------------------------------------------------------------


@pytest.mark.parametrize("uplink", UPLINKS)
def test_what_travels_in_each_way(uplink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, rule = shop_and_rule({"zerofl.uplink": uplink})
    layout, rng = shop.layout, np.random.default_rng(1)
    old, change = ((rng.integers(-512, 513, layout.size) / 256).astype(np.float32) for _ in range(2))

    def fit(self: ZeroFlClient, round_: int, *_: Any, **__: Any) -> float:
        own = dict(self.context.model.named_parameters()) | originals(self.context.model)
        for name, tensor in layout.unflatten(old + change).items():
            own[name].data.copy_(tensor)
        return 0.5

    monkeypatch.setattr(ZeroFlClient, "fit", fit)
    state, mask = BitmapAndValues().decode(rule.train(letter(shop, layout.unflatten(old))).arrays, layout)
    ranked = np.abs(change if uplink == "top-diff" else old + change)[layout.is_prunable]
    assert mask.count == math.floor(0.3 * P)
    assert ranked[mask.alive].min() >= ranked[~mask.alive].max()
    sent = old + change if uplink == "top-weights" else change
    assert np.array_equal(layout.flatten(state), np.where(mask.transmitted, sent, 0))


@pytest.mark.parametrize(
    ("density", "r_mask", "count"), [(0.2, 0.0, 2), (0.2, 0.1, 3), (0.7, 0.1, 8), (0.95, 0.1, 10), (1.0, 0.2, 10)]
)
def test_the_share_is_the_sum_of_two_decimals_and_at_most_1(density: float, r_mask: float, count: int) -> None:
    # In binary 0.7 + 0.1 is 0.79..., which would make 7 of 10.
    layout = Layout((("weight", (1, 10)),), ("weight",))
    settings = parse(merge(SMALL, {"strategy": "zerofl", "mask.density": density, "zerofl.r-mask": r_mask})).settings
    assert sent_mask(layout, np.arange(10, dtype=np.float32), settings).count == count


@pytest.mark.parametrize(("r_mask", "count"), [(0.0, 7_632), (0.1, 11_448), (0.2, 15_264)])
def test_bytes_of_a_round(r_mask: float, count: int) -> None:
    """Up 4 (floor((density + r) P) + R) + ceil(P / 8), down 4 (P + R)."""
    record = run(zerofl__r_mask=r_mask, run__rounds=1).records[1]
    assert record["bytes_train_up"] == 4 * (4 * (count + R) + P // 8)
    assert record["bytes_train_down"] == 4 * 4 * (P + R)
    assert record["bytes_evaluate_down"] == 6 * 4 * (P + R)
    assert record["bytes_mask_down"] == 0


# ---- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uplink", "wanted", "used"),
    [
        ("top-weights", [1, 0, 7, 0.5, -3, 0, 4], [1, 0, 7, 0, -3, 0, 4]),
        ("top-weights-diff", [10, 9, 16, 9.5, 6, 9, 5], [10, 9, 16, 9.5, 0, 0, 5]),
    ],
)
def test_the_fold_by_hand(uplink: str, wanted: list[float], used: list[float]) -> None:
    """Of 4 samples 1 is a client's that sent (4, -, 4, 2, -, -) and 3 are one's that sent (-, -, 8, -, -4, -).

    `used` is the model that computes: the first layer, of two weights, whole, the larger two of the other four.
    """
    strategy, replies = server({"zerofl.uplink": uplink}), []
    for client, samples, sent, bias in ((0, 1, [4.0, 0, 4, 2, 0, 0], 1.0), (1, 3, [0.0, 0, 8, 0, -4, 0], 5.0)):
        state = SMALLEST.unflatten(np.array([*sent, bias], dtype=np.float32))
        arrays = BitmapAndValues().encode(SMALLEST, state, Mask(SMALLEST, np.array(sent) != 0))
        replies.append(Reply(arrays, {"round": 1}, client=client, samples=samples))
    strategy.state = SMALLEST.unflatten(np.array([9, 9, 9, 9, 9, 9, 1], dtype=np.float32))
    aggregate(strategy, 1, iter(replies))
    assert SMALLEST.flatten(strategy.state).tolist() == wanted
    assert SMALLEST.flatten(strategy.model()).tolist() == used
    assert strategy.densities() == (4 / 6, 5 / 7)
    assert (
        Dense().decode(strategy.train_payload(2, 0).arrays, SMALLEST, strategy.mask_for(0))[0].keys()
        == strategy.state.keys()
    )
    assert SMALLEST.flatten(strategy.state).tolist() == strategy.train_payload(2, 0).arrays["values"].tolist()


def server(keys: Flat) -> ZeroFl:
    settings: Flat = {"strategy": "zerofl", "mask.density": 0.5}
    return ZeroFl(ServerContext(SMALLEST, parse(merge(SMALL, {"strategy": "zerofl"}, settings, keys)).settings))


def test_the_model_goes_down_whole_and_once_for_all() -> None:
    strategy = server({})
    strategy.state = SMALLEST.unflatten(np.arange(7, dtype=np.float32))
    strategy.before_training(lambda *_, **__: iter(()))
    assert strategy.train_payload(1, 0).arrays["values"].tolist() == list(range(7))
    assert strategy.train_payload(1, 0).arrays["values"] is strategy.eval_payload(1, 3).arrays["values"]
    strategy.state = SMALLEST.unflatten(np.ones(7, dtype=np.float32))
    assert strategy.train_payload(2, 0).arrays["values"].tolist() == [1] * 7


@pytest.mark.parametrize("uplink", ["top-weights", "top-diff"])
def test_clients_test_what_the_server_stands_for(uplink: str) -> None:
    played = run(zerofl__uplink=uplink)
    shop, used = played.runtime, played.strategy.model()
    whole = played.layout.flatten(played.strategy.state)[played.layout.is_prunable]
    assert np.count_nonzero(whole) > 0.29 * P
    for name, alive, size in played.strategy.mask.layers():
        assert alive == (size if name == "0.weight" else math.floor(0.2 * size))
        assert torch.count_nonzero(used[name]) <= alive
    load_state(shop.model, used)
    for client, accuracy in played.strategy.accuracy.items():
        assert shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))[1] == accuracy
    density = (144 + sum(math.floor(0.2 * size) for size in list(SIZES.values())[1:])) / P
    assert [record["density"] for record in played.records[1:]] == [density] * 3


def test_the_three_ways_are_three_runs_and_differences_keep_the_model_dense() -> None:
    played = [run(zerofl__uplink=uplink, run__rounds=2) for uplink in UPLINKS]
    assert len({p.bits() for p in played}) == 3
    dead = [P - np.count_nonzero(p.layout.flatten(p.strategy.state)[p.layout.is_prunable]) for p in played]
    assert dead[0] > 0.3 * P
    assert dead[1] == dead[2] == 0


# ---- refusals ------------------------------------------------------------------------------------


def test_a_reply_that_is_not_what_was_asked_for_is_refused() -> None:
    def everything(payload: Payload) -> Payload:
        layout = get_runtime(merge(SMALL, {"strategy": "zerofl"})).layout
        state, _ = BitmapAndValues().decode(payload.arrays, layout)
        return Payload(BitmapAndValues().encode(layout, state, Mask.dense(layout)), payload.metadata)

    client = run(zerofl__r_mask=0.1, run__rounds=1).records[1]["cohort"][1]
    broken = play({"strategy": "zerofl", "run.rounds": 1}, faults={("train", 1, client): tamper(everything)})
    why = f"{P} weights came up; density and zerofl.r-mask make 11448"
    assert broken.records[1]["refused"] == {str(client): why}
    assert len(broken.records[1]["ok"]) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zerofl.uplink": "all"}, "zerofl.uplink is 'all'; it is one of top-weights, top-weights-diff, top-diff"),
        ({"zerofl.r-mask": -0.1}, r"zerofl.r-mask is -0.1; it is a fraction in \[0, 1\]"),
        ({"mask.min-per-layer": 40, "zerofl.r-mask": 0.1}, "mask.min-per-layer is 40; it reserves 6 weights"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server(keys)


def test_the_workbench_is_left_as_a_plain_model() -> None:
    shop, rule = shop_and_rule({})
    rule.train(letter(shop, shop.initial_state()))
    assert list(state_of(shop.model)) == [name for name, _ in shop.layout.shapes]
