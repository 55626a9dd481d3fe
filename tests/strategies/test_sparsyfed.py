"""SparsyFed: dead weights stay dead by beta alone, and both ends compute with v."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from ssfl_app.comm.messenger import Reply
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.sparsity.codec import BitmapAndValues
from ssfl_app.sparsity.layout import Layout, State, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import sparsyfed
from ssfl_app.strategies.sparsyfed import SparsyFed, SparsyFedClient
from ssfl_app.training.reparam import originals, power, spectral_exponent
from tests.in_process_grid import SMALL, Played, aggregate, play, tamper

pytestmark = pytest.mark.narrow

P, R = 38_160, 170  # prunable weights of the narrow CNN, and its biases and norm weights
K = math.floor(0.2 * P)
SMALLEST = Layout((("0.weight", (1, 4)), ("0.bias", (1,))), ("0.weight",))
ONE_STEP: Flat = {"local.batch-size": 10_000, "local.clip": 0.0, "local.lr": 0.5, "local.weight-decay": 0.01}


def run(**keys: Any) -> Played:
    return play({"strategy": "sparsyfed", **{key.replace("__", ".").replace("_", "-"): v for key, v in keys.items()}})


def masks(played: Played, round_: int, which: str) -> list[Mask]:
    payloads = played.grid.sent if which == "down" else played.grid.got
    found = [payload for (kind, r, _), payload in payloads if (kind, r) == ("train", round_)]
    return [BitmapAndValues().decode(payload.arrays, played.layout)[1] for payload in found]


def shop_and_rule(keys: Flat) -> tuple[Runtime, SparsyFedClient]:
    shop = get_runtime(merge(SMALL, {"strategy": "sparsyfed"}, keys))
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    rule = shop.rule(0, ClientState(context, 0))
    assert isinstance(rule, SparsyFedClient)
    return shop, rule


def letter(layout: Layout, state: State, mask: Mask) -> Payload:
    return Payload(BitmapAndValues().encode(layout, state, mask), {"round": 1, "digest": mask.digest})


# ---- the claim: pruned weights do not come back on a client ---------------------------------------


def test_a_weight_of_exactly_0_never_moves_so_masks_only_shrink() -> None:
    """With beta > 1 what a client sends lies in what it got; no mask is given to the training loop."""
    played = run()
    for round_ in (1, 2, 3):
        down = masks(played, round_, "down")[0]
        up = masks(played, round_, "up")
        assert all(not (mask.alive & ~down.alive).any() for mask in up)
        assert [mask.count for mask in up] == [K] * 4
        assert played.masks[round_] == up[0] | up[1] | up[2] | up[3]
    densities = [record["density"] for record in played.records[1:]]
    assert 1 > densities[0] > densities[1] > densities[2] > 0.2  # the consensus: the union nears mask.density


def test_with_beta_1_they_do_come_back() -> None:
    played = run(sparsyfed__beta=1.0, run__rounds=2, run__evaluate_every=2)
    down, up = masks(played, 2, "down")[0], masks(played, 2, "up")
    assert all((mask.alive & ~down.alive).any() for mask in up)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dead_weights_are_0_after_training_and_alive_zeros_too(momentum: float) -> None:
    shop, rule = shop_and_rule({"local.momentum": momentum})
    layout = shop.layout
    mask = Mask.random(layout, 0.5, np.random.default_rng(1))
    state = mask.apply(state_of(shop.model))
    state["3.weight"][0] = 0  # alive weights of the second convolution
    rule.train(letter(layout, state, mask))
    after = layout.flatten(state_of(shop.model))
    assert not after[~mask.transmitted].any()
    assert not state_of(shop.model)["3.weight"][0].any()
    assert state_of(shop.model)["3.weight"][1].any()


# ---- what a client computes ----------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    """With dL/dv of the plain model that holds v: w - lr (beta |w|^(beta-1) dL/dv + decay w)."""
    shop, rule = shop_and_rule(ONE_STEP | {"sparsyfed.prune-activations": False, "mask.density": 1.0})
    layout, dense = shop.layout, shop.dense
    w = {name: tensor.clone() for name, tensor in shop.initial_state().items()}
    came, _ = BitmapAndValues().decode(rule.train(letter(layout, w, dense)).arrays, layout)
    v = {n: t.sign() * t.abs() ** 1.25 if n in layout.prunable else t for n, t in w.items()}
    load_state(shop.model, v)
    images = rule.context.train
    loss = functional.cross_entropy(shop.model(shop.data.transform.test(images.inputs)), images.labels)
    gradients = torch.autograd.grad(loss, list(shop.model.parameters()))
    for (name, _), gradient in zip(shop.model.named_parameters(), gradients, strict=True):
        slope = 1.25 * w[name].abs() ** 0.25 if name in layout.prunable else 1
        wanted = w[name] - 0.5 * (slope * gradient + 0.01 * w[name])
        torch.testing.assert_close(came[name], wanted, rtol=1e-4, atol=1e-6)


def seen_shares(monkeypatch: pytest.MonkeyPatch, keys: Flat) -> dict[str, float]:
    """What `sparse_activations` is told when half of each layer is alive, some of it at exactly 0."""
    shares: dict[str, float] = {}

    @contextmanager
    def spy(model: nn.Module, keep: Mapping[str, float]) -> Iterator[None]:
        shares.update(keep)
        yield

    monkeypatch.setattr(sparsyfed, "sparse_activations", spy)
    shop, rule = shop_and_rule(keys)
    mask = Mask.random(shop.layout, 0.5, np.random.default_rng(1), "layer")
    state = mask.apply(state_of(shop.model))
    state["3.weight"].zero_()
    rule.train(letter(shop.layout, state, mask))
    return shares


def test_activations_are_pruned_to_the_density_of_the_mask_not_of_the_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(seen_shares(monkeypatch, {}).values()) == {0.5}
    assert set(seen_shares(monkeypatch, {"sparsyfed.prune-activations": False}).values()) == {1.0}


def test_pruned_activations_change_the_training_from_the_second_round_on() -> None:
    # In round 1 the mask is dense, so nothing is pruned.
    keys = {"run__rounds": 2, "run__evaluate_every": 2}
    pruned, plain = run(**keys), run(sparsyfed__prune_activations=False, **keys)
    same = [np.array_equal(*(p.layout.flatten(p.states[r]) for p in (pruned, plain))) for r in (1, 2)]
    assert same == [True, False]


def test_clients_test_what_the_server_stands_for() -> None:
    played = run()
    shop = played.runtime
    load_state(shop.model, played.strategy.model())
    for client, accuracy in played.strategy.accuracy.items():
        assert shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))[1] == accuracy
    w = played.layout.flatten(played.strategy.state)[played.layout.is_prunable]
    v = played.layout.flatten(played.strategy.model())[played.layout.is_prunable]
    np.testing.assert_allclose(v, np.sign(w) * np.abs(w) ** 1.25, rtol=1e-5)


@pytest.mark.parametrize(("exponent", "gap"), [("fixed", 1e-5), ("spectral", 0.05)])
def test_v_starts_as_the_initial_weights_of_the_run(exponent: str, gap: float) -> None:
    played = run(sparsyfed__exponent=exponent)
    initial, v = played.runtime.initial_state(), played.states[0]
    for name, tensor in initial.items():
        torch.testing.assert_close(v[name], tensor, rtol=gap, atol=1e-6)
    assert v.keys() == initial.keys()


def test_what_is_kept_is_what_global_pruning_of_torch_keeps() -> None:
    """The authors prune by torch's L1 pruning over all conv and linear weights, the first ones too."""
    shop, rule = shop_and_rule({})
    came, mask = BitmapAndValues().decode(
        rule.train(letter(shop.layout, shop.initial_state(), shop.dense)).arrays, shop.layout
    )
    modules = [(module, "weight") for module in shop.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(modules, prune.L1Unstructured, amount=P - K)
    theirs = np.concatenate([module.weight_mask.numpy().ravel() for module, _ in modules]) > 0
    values = np.concatenate([module.weight.detach().numpy().ravel() for module, _ in modules])
    for module, name in modules:
        prune.remove(module, name)
    assert np.count_nonzero(theirs ^ mask.alive) == 0
    assert np.array_equal(values, shop.layout.flatten_prunable(came))


def test_a_rate_acts_like_a_third_to_two_thirds_of_it_on_v_at_first() -> None:
    """dv/dw squared is what a step of w moves v by: beta^2 |w|^(2 beta - 2), here with |w|^beta = |v|."""
    played = run(run__rounds=1)
    initial = played.runtime.initial_state()
    shares = [float((1.25**2 * initial[n].abs() ** (0.5 / 1.25)).mean()) for n in played.layout.prunable]
    assert [round(0.1 * share, 2) for share in (min(shares), max(shares))] == [0.03, 0.07]


# ---- the floor -----------------------------------------------------------------------------------


def test_an_emptied_layer_gets_its_largest_weights_back_and_no_other_one() -> None:
    two = Layout((("v", (2, 2)), ("w", (2, 4)), ("x", (1, 4))), ("v", "w", "x"))
    magnitudes = np.array([9, 8, 7, 6, 0.5, 3, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    kept = Mask(two, np.arange(16) < 3)
    assert sparsyfed.refilled(kept, magnitudes, 0.0) == kept
    assert np.flatnonzero(sparsyfed.refilled(kept, magnitudes, 0.25).alive).tolist() == [0, 1, 2, 5, 7]
    # A weight of 0 is none that comes back: it would never train.
    assert np.flatnonzero(sparsyfed.refilled(kept, magnitudes, 1.0).alive).tolist() == [0, 1, 2, 4, 5, 7, 8]


def test_a_floor_keeps_every_layer_and_is_sent() -> None:
    """At density 0.01 the wide layer of the untrained net is emptied; a hundredth of it comes back."""
    sparse = {"mask__density": 0.01, "run__rounds": 2, "run__evaluate_every": 2}
    bare, floored = (masks(run(**sparse, sparsyfed__floor=share), 1, "up") for share in (0.0, 0.01))
    for without, filled in zip(bare, floored, strict=True):
        assert without.count == math.floor(0.01 * P)
        assert not (without.alive & ~filled.alive).any()
        for (_, before, size), (_, after, _) in zip(without.layers(), filled.layers(), strict=True):
            assert after == (before or size // 100)
    assert any(not alive for _, alive, _ in bare[0].layers())


# ---- spectral exponents --------------------------------------------------------------------------


def test_spectral_exponents_are_those_of_each_layer_at_both_ends() -> None:
    played = run(sparsyfed__exponent="spectral")
    model, state = played.runtime.model, played.strategy.state
    load_state(model, state)
    betas = {name: spectral_exponent(w) for name, w in originals(model).items()}
    assert sparsyfed.exponents(played.layout, played.strategy.settings, state) == betas
    assert len(set(betas.values())) == 4
    assert all(1 < beta < 1.1 for beta in betas.values())
    v = played.strategy.model()
    assert all(torch.equal(v[name], power(state[name], beta)) for name, beta in betas.items())
    assert played.bits() != run().bits()
    load_state(model, v)
    for client, accuracy in played.strategy.accuracy.items():
        images = played.runtime.data.test.take(played.runtime.partition.test[client])
        assert played.runtime.trainer.evaluate(model, images)[1] == accuracy


def test_spectral_exponents_keep_dead_weights_dead_and_draw_nothing() -> None:
    before = torch.get_rng_state().tolist()
    played = run(sparsyfed__exponent="spectral", run__rounds=2)
    assert torch.get_rng_state().tolist() == before
    down = masks(played, 2, "down")[0]
    assert all(not (mask.alive & ~down.alive).any() for mask in masks(played, 2, "up"))


# ---- the server ----------------------------------------------------------------------------------


def test_the_fold_by_hand() -> None:
    """Of 4 samples 1 is a client's that sent (4, 2, -, -) and 3 are one's that sent (8, -, -4, -)."""
    settings = parse(merge(SMALL, {"strategy": "sparsyfed", "mask.density": 0.5})).settings
    strategy, replies = SparsyFed(ServerContext(SMALLEST, settings)), []
    for client, samples, weights, bias in ((0, 1, [4.0, 2, 0, 0], 1.0), (1, 3, [8.0, 0, -4, 0], 5.0)):
        state = {"0.weight": torch.tensor([weights]), "0.bias": torch.tensor([bias])}
        arrays = BitmapAndValues().encode(SMALLEST, state, Mask(SMALLEST, np.array(weights) != 0))
        replies.append(Reply(arrays, {"round": 1}, client=client, samples=samples))
    strategy.state = SMALLEST.unflatten(np.full(5, 9, dtype=np.float32))
    aggregate(strategy, 1, iter(replies))
    assert SMALLEST.flatten(strategy.state).tolist() == [7, 0.5, -3, 0, 4]
    assert strategy.mask.alive.tolist() == [True, True, True, False]
    assert SMALLEST.flatten(strategy.model()).tolist() == pytest.approx([7**1.25, 0.5**1.25, -(3**1.25), 0, 4])


def test_without_its_two_ideas_it_is_top_k_of_weights() -> None:
    keys: Flat = {
        "sparsyfed.beta": 1.0,
        "sparsyfed.prune-activations": False,
        "run.rounds": 2,
        "run.evaluate-every": 2,
    }
    assert play({"strategy": "sparsyfed", **keys}).bits() == play({"strategy": "topk", **keys}).bits()


def test_bytes_of_each_round() -> None:
    """Up 4 (A + R) + ceil(P / 8); down the same with the union's weights in place of A, all P of them in round 1."""
    played = run()
    for round_, record in enumerate(played.records[1:], start=1):
        alive = P if round_ == 1 else played.masks[round_ - 1].count
        assert record["bytes_train_down"] == 4 * (4 * (alive + R) + P // 8)
        assert record["bytes_train_up"] == 4 * (4 * (K + R) + P // 8)
        assert record["bytes_evaluate_down"] == 6 * (4 * (played.masks[round_].count + R) + P // 8)
        assert record["bytes_mask_down"] == 0
        assert record["density"] == played.masks[round_].density


def test_scope_and_floor_of_the_mask_hold_for_what_is_sent() -> None:
    def counts(**keys: Any) -> list[int]:
        return [alive for _, alive, _ in masks(run(run__rounds=1, **keys), 1, "up")[0].layers()]

    assert counts(mask__scope="layer") == [math.floor(0.2 * size) for size in (144, 4_608, 32_768, 640)]
    assert min(counts(mask__density=0.02, mask__min_per_layer=144)) == 144 > min(counts(mask__density=0.02))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_a_reply_of_another_density_is_refused(floor: float) -> None:
    def everything(payload: Payload) -> Payload:
        layout = get_runtime(merge(SMALL, {"strategy": "sparsyfed"})).layout
        state, _ = BitmapAndValues().decode(payload.arrays, layout)
        return Payload(BitmapAndValues().encode(layout, state, Mask.dense(layout)), payload.metadata)

    client = run().records[1]["cohort"][1]
    keys: Flat = {"strategy": "sparsyfed", "run.rounds": 1, "sparsyfed.floor": floor}
    broken = play(keys, faults={("train", 1, client): tamper(everything)})
    why = f"{P} weights came up; mask.density 0.2 is {K}"
    why += ", and sparsyfed.floor 0.01 adds to layers that are empty" if floor else ""
    assert broken.records[1]["refused"] == {str(client): why}
    assert len(broken.records[1]["ok"]) == 3
    assert broken.records[1]["density"] < 0.3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsyfed.beta": 0.9}, "sparsyfed.beta is 0.9; it is a number of at least 1"),
        ({"sparsyfed.floor": 1.5}, "sparsyfed.floor is 1.5; it is a number from 0 to 1"),
        ({"sparsyfed.exponent": "free"}, "sparsyfed.exponent is 'free'; it is one of fixed, spectral"),
        ({"sparsyfed.prune-activations": 1}, "sparsyfed.prune-activations is 1; it is true or false"),
        ({"mask.density": 0.5, "mask.min-per-layer": 40}, "mask.min-per-layer is 40; it reserves 4 weights"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparsyFed(ServerContext(SMALLEST, parse(merge(SMALL, {"strategy": "sparsyfed"}, keys)).settings))
