"""Criteria other than SNIP's: what each keeps, on numbers by hand and against slow oracles, and what it costs."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn
from torch.nn import functional

from ssfl_app.comm.messenger import Check, Reply
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.options import ConfigError
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.seeding import generator
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import balanced_batch, flow_net, grasp, plain_batch, pooled_snip, synflow
from ssfl_app.strategies import REGISTRY
from ssfl_app.strategies.shared.scoring import CRITERIA
from ssfl_app.strategies.ssfl.criteria import QUESTIONS, find_mask
from ssfl_app.strategies.ssfl.strategy import Ssfl
from ssfl_app.training.trainer import LocalOptions, LocalTrainer
from tests import oracles
from tests.in_process_grid import FEW, SMALL, Played, ScriptedGrid, answer_error, play, tamper

pytestmark = pytest.mark.narrow

OPTIONS = LocalOptions(epochs=1, batch_size=4, lr=0.1, lr_decay=1.0, momentum=0.0, weight_decay=0.0, clip=0.0)
PRUNABLE, REST, ALIVE, BITMAP = 38160, 170, 7632, 4770


@cache
def found(criterion: str, **keys: bool | int | float | str) -> Played:
    """Play setup."""
    more = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return play({"strategy": "ssfl", "ssfl.criterion": criterion, **more}, until=0)


def counts(density: float, steps: int) -> list[int]:
    return [math.floor(PRUNABLE * density ** (step / steps)) for step in range(1, steps + 1)]


def nets(played: Played, client: int = 0) -> list[Mask]:
    """Return the masked nets that a client was asked about, step by step."""
    payloads = [payload for (kind, _, who), payload in played.grid.sent if kind == "query.saliency" and who == client]
    assert [payload.metadata.get("step", 0) for payload in payloads] == list(range(len(payloads)))
    bitmaps = [payload.arrays["net"] for payload in payloads[1:]]
    return [Mask.dense(played.layout), *(Mask.unpack(played.layout, bitmap) for bitmap in bitmaps)]


def pooled(runtime: Runtime) -> Samples:
    """Return the minibatches of all clients as one."""
    data, parts = runtime.data.train, []
    for client, part in enumerate(runtime.partition.train):
        rng = generator(1, "saliency", client, 0)
        parts.append(part[balanced_batch(data.labels.numpy()[part], 64, rng)])
    return data.take(np.concatenate(parts))


# ---- the scores, by hand -------------------------------------------------------------------------


def test_grasp_keeps_the_weight_without_which_the_gradient_would_shrink() -> None:
    """L = w'Hw / 2: g = Hw = (-1, 2), Hg = (-4, 3), -w (Hg) = (4, -9): the first is the one to remove."""
    hessian, w = np.array([[2.0, -1.0], [-1.0, 1.0]], np.float32), np.array([1.0, 3.0], np.float32)
    gradient = hessian @ w
    scores = grasp(hessian @ gradient, w)
    assert scores.tolist() == [-4.0, 9.0]
    layout = Layout((("w", (1, 2)),), ("w",))
    kept = Mask.top(layout, scores, 0.5).alive
    assert kept.tolist() == [False, True]
    squared = [float(((hessian @ (w * keep)) ** 2).sum()) for keep in (kept, ~kept)]
    assert squared == [18.0, 5.0]  # without weight 0 and without weight 1; 5 with both


def test_pooled_snip_lets_opposite_gradients_cancel() -> None:
    gradients, w = np.array([[3.0, 1.0], [-3.0, 1.0]], np.float32), np.array([2.0, -2.0], np.float32)
    assert pooled_snip(gradients.mean(axis=0), w).tolist() == [0.0, 2.0]
    assert np.abs(gradients * w).mean(axis=0).tolist() == [6.0, 2.0]  # SNIP, averaged over clients


def chain(*extra: nn.Module, bias: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=bias), *extra, nn.ReLU(), nn.Linear(2, 1, bias=bias))
    weights = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[1.0, -1.0]])]
    with torch.no_grad():
        for module, weight in zip((model[1], model[-1]), weights, strict=True):
            module.weight.copy_(weight)
    return model


@pytest.mark.parametrize("model", [chain(), chain(nn.GroupNorm(1, 2)), chain(bias=True)])
def test_synaptic_flow_by_hand_is_conserved_in_every_layer_and_knows_no_norm_and_no_bias(model: nn.Module) -> None:
    """R = 1 (1 + 2) + 1 (3 + 0) = 6, and the scores of a layer are the flows through its weights."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    scores = list(synflow(flow_net(model), weights, (1, 1, 2)).values())
    assert scores[0].tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert scores[1].tolist() == [[3.0, 3.0]]
    assert [float(score.sum()) for score in scores] == [6.0, 6.0]
    assert scores[0].dtype == torch.float64


def test_a_flow_net_is_a_copy() -> None:
    model = chain(nn.GroupNorm(1, 2), bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flow_net(model)
    assert isinstance(model[2], nn.GroupNorm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- curvature -----------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def smooth(norm: nn.Module | None = None) -> nn.Module:
    """A small net in float64 whose curvature finite differences can tell."""
    torch.manual_seed(3)
    layers = [Double(), nn.Conv2d(1, 4, 3), norm or nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def images(count: int) -> Samples:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, size=(count, 1, 4, 4), dtype=np.uint8)
    return Samples(torch.from_numpy(pixels), torch.from_numpy(np.arange(count) % 3))


def trainer() -> LocalTrainer:
    return LocalTrainer(OPTIONS, Transform((0.5,), (0.25,), "crop-flip"), torch.device("cpu"))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(4)])
def test_curvature_is_the_change_of_the_gradient_along_a_direction(
    temperature: float, norm: nn.Module | None
) -> None:
    model, data, run = smooth(norm), images(12), trainer()
    parameters = {name: p for name, p in model.named_parameters() if name in Layout.of(model).prunable}
    rng = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(p.shape, generator=rng) for name, p in parameters.items()}
    got = run.curvature(model, data, direction, temperature)
    sides = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step * direction[name].double()
        sides.append(run.gradient(model, data, temperature))
    assert list(got) == list(parameters)
    for name in parameters:
        wanted = (sides[0][name] - sides[1][name]) / 2e-5
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-7)


def test_curvature_counts_two_passes_an_image_and_leaves_the_model_alone() -> None:
    model, run = smooth(nn.BatchNorm2d(4)).eval(), trainer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run.curvature(model, images(9), {n: torch.ones(p.shape) for n, p in model.named_parameters() if p.ndim > 1})
    assert run.passes == 18
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_temperature_divides_the_logits_and_multiplies_the_loss() -> None:
    model, data = smooth(), images(6)
    got = trainer().gradient(model, data, 50.0)
    logits = model((data.inputs / 255 - 0.5) / 0.25)
    (50 * functional.cross_entropy(logits / 50, data.labels)).backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad)
    assert not torch.allclose(got["5.weight"], trainer().gradient(model, data)["5.weight"], rtol=0.01)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_finds_its_own_mask_of_the_wanted_size_and_trains(criterion: str) -> None:
    keys: Flat = {"ssfl.criterion": criterion, "run.rounds": 3, "run.evaluate-every": 3, "local.batch-size": 8}
    keys["local.lr"] = 0.3
    played = play({"strategy": "ssfl"} | keys)
    assert played.strategy.mask.count == ALIVE
    # |g| alone is for dead weights that are frozen, not for a network that loses them.
    assert played.records[-1]["central_accuracy"] > (0.5 if criterion == "gradient" else 0.7)
    if criterion != "snip":
        assert played.strategy.mask.hamming(found("snip").strategy.mask) > 0.02
    again = play({"strategy": "ssfl", "ssfl.criterion": criterion}, luck=1, until=0)
    assert again.strategy.mask == played.strategy.mask


def test_bytes_and_passes_by_formula() -> None:
    four = counts(0.2, 4)[:3]
    wanted = {
        "snip": (0, 4 * PRUNABLE, 64),
        "pooled-snip": (0, 4 * PRUNABLE, 64),
        "gradient": (0, 4 * PRUNABLE, 64),
        "grasp": (4 * PRUNABLE, 8 * PRUNABLE, 3 * 64),
        "synflow": (0, 0, 0),
        "iterative-snip": (3 * BITMAP, 4 * (PRUNABLE + sum(four)), 4 * 64),
        "force": (3 * BITMAP, 4 * 4 * PRUNABLE, 4 * 64),
        "magnitude": (0, 0, 0),
    }
    for criterion, bill in wanted.items():
        stepwise = criterion in ("synflow", "iterative-snip", "force")
        record = found(criterion, ssfl__steps=4 if stepwise else 0).records[0]
        paid = (record["bytes_discovery_down"], record["bytes_discovery_up"], record["image_passes"])
        assert paid == tuple(6 * n for n in bill), criterion
        assert record["asked"] == ([] if bill[2] == 0 else list(range(6)))


def test_pooled_snip_is_snip_on_the_pooled_minibatches() -> None:
    played = found("pooled-snip", ssfl__saliency_weighting="uniform")
    runtime = played.runtime
    w0 = runtime.initial_state()
    load_state(runtime.model, w0)
    gradient = runtime.trainer.gradient(runtime.model, pooled(runtime))
    scores = np.abs(runtime.layout.flatten_prunable(gradient) * runtime.layout.flatten_prunable(w0))
    assert played.strategy.mask.hamming(Mask.top(runtime.layout, scores, 0.2)) < 1e-4
    assert found("snip").strategy.mask.hamming(Mask.top(runtime.layout, scores, 0.2)) > 0.01


def test_grasp_is_grasp_on_the_pooled_minibatches() -> None:
    """With the plain loss of logits / 200, and H g in one piece: factors and the detour over clients do not show."""
    played = found("grasp", ssfl__saliency_weighting="uniform")
    runtime = played.runtime
    layout, model, data = runtime.layout, runtime.model, pooled(runtime)
    load_state(model, runtime.initial_state())
    weights = [p for name, p in model.named_parameters() if name in layout.prunable]
    loss = functional.cross_entropy(model(runtime.data.transform.test(data.inputs)) / 200, data.labels)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in slopes), weights)
    score = {n: -w.detach() * p for n, w, p in zip(layout.prunable, weights, products, strict=True)}
    removed_last = np.argsort(layout.flatten_prunable(score), kind="stable")[:ALIVE]  # the lowest stay
    wanted = np.zeros(PRUNABLE, bool)
    wanted[removed_last] = True
    assert played.strategy.mask.hamming(Mask(layout, wanted)) < 1e-3
    assert found("grasp", ssfl__grasp_temperature=1.0).strategy.mask.hamming(played.strategy.mask) > 0.02


def test_magnitude_keeps_the_largest_initial_weights() -> None:
    played = found("magnitude")
    magnitudes = np.abs(played.layout.flatten_prunable(played.runtime.initial_state()))
    alive = played.strategy.mask.alive
    assert magnitudes[alive].min() >= magnitudes[~alive].max()


def test_synflow_leaves_no_layer_empty_where_one_step_does() -> None:
    low = {"mask__density": 0.001}
    one, many = (found("synflow", ssfl__steps=steps, **low).strategy.mask for steps in (1, 0))
    assert one.count == many.count == 38
    assert min(alive for _, alive, _ in one.layers()) == 0
    assert min(alive for _, alive, _ in many.layers()) > 0
    assert found("synflow", ssfl__steps=100, **low).strategy.mask == many  # what 0 means


def test_iterative_snip_prunes_a_smaller_net_in_each_step_and_never_brings_a_weight_back() -> None:
    played = found("iterative-snip", ssfl__steps=4)
    masks = [*nets(played), played.strategy.mask]
    assert [mask.count for mask in masks] == [PRUNABLE, *counts(0.2, 4)]
    for before, after in pairwise(masks):
        assert not (after.alive & ~before.alive).any()


def test_a_removed_weight_stays_out_although_alive_ones_score_nothing_either() -> None:
    """Eight weights, two steps: 2 to 5 stay, then nothing has a score: 2 and 3 stay, not the removed 0 and 1."""
    layout = Layout((("w", (2, 4)),), ("w",))
    keys = {"ssfl.criterion": "iterative-snip", "ssfl.steps": 2, "mask.density": 0.25}
    strategy = Ssfl(ServerContext(layout, parse(merge(SMALL, keys)).settings))
    strategy.state = {"w": torch.ones(2, 4)}
    answers = iter([np.array([0, 0, 5, 5, 5, 5, 0, 0], np.float32), np.zeros(4, np.float32)])
    sent = []

    def ask(
        question: str,
        clients: Iterable[int],
        check: Check,
        take: Callable[[Reply], None],
        payload: Payload | None = None,
    ) -> None:
        sent.append(payload)
        take(Reply({"values": next(answers)}, {}, client=0, samples=1))

    mask = find_mask(strategy, ask, [0])
    assert Mask.unpack(layout, sent[1].arrays["net"]).alive.tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert np.flatnonzero(mask.alive).tolist() == [2, 3]


def test_force_scores_removed_weights_too_and_brings_some_back() -> None:
    played = found("force", ssfl__steps=4)
    masks = [*nets(played), played.strategy.mask]
    assert [mask.count for mask in masks] == [PRUNABLE, *counts(0.2, 4)]
    assert (masks[-1].alive & ~masks[1].alive).any()


def test_a_plain_minibatch_is_any_images_of_the_client() -> None:
    played = found("snip", ssfl__saliency_sampling="plain")
    (answer,) = (p.arrays["values"] for (kind, _, who), p in played.grid.got if (kind, who) == ("query.saliency", 3))
    runtime, w0 = played.runtime, played.runtime.initial_state()
    chosen = runtime.partition.train[3][
        plain_batch(len(runtime.partition.train[3]), 64, generator(1, "saliency", 3, 0))
    ]
    load_state(runtime.model, w0)
    gradient = runtime.trainer.gradient(runtime.model, runtime.data.train.take(chosen))
    scores = np.abs(runtime.layout.flatten_prunable(gradient) * runtime.layout.flatten_prunable(w0))
    np.testing.assert_allclose(answer, scores, rtol=1e-4, atol=1e-9)
    assert played.strategy.mask != found("snip").strategy.mask


@pytest.mark.parametrize("criterion", ["iterative-snip", "force"])
def test_the_second_step_scores_the_masked_net_by_hand(criterion: str) -> None:
    played = found(criterion, ssfl__steps=2)
    runtime, net = played.runtime, nets(played, client=3)[1]
    answers = [p.arrays["values"] for (kind, _, who), p in played.grid.got if (kind, who) == ("query.saliency", 3)]
    w0 = runtime.initial_state()
    part = runtime.partition.train[3]
    labels = runtime.data.train.labels.numpy()[part]
    chosen = runtime.data.train.take(part[balanced_batch(labels, 64, generator(1, "saliency", 3, 1))])
    load_state(runtime.model, net.apply(w0))
    gradient = runtime.layout.flatten_prunable(runtime.trainer.gradient(runtime.model, chosen))
    scores = np.abs(gradient * runtime.layout.flatten_prunable(w0))
    np.testing.assert_allclose(
        answers[1], scores if criterion == "force" else scores[net.alive], rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("criterion", ["iterative-snip", "force"])
def test_one_step_is_snip(criterion: str) -> None:
    one, snip = found(criterion, ssfl__steps=1), found("snip")
    assert one.strategy.mask == snip.strategy.mask
    assert one.records[0]["bytes_discovery_up"] == snip.records[0]["bytes_discovery_up"]
    assert one.records[0]["bytes_discovery_down"] == 0


def test_steps_default_to_five_and_more_minibatches_are_other_ones_in_each_step() -> None:
    assert len(nets(found("force"))) == len(nets(found("iterative-snip"))) == 5
    assert found("force", ssfl__saliency_batches=2).records[0]["image_passes"] == 6 * 5 * 2 * 64


@pytest.mark.parametrize("criterion", ["grasp", "synflow", "iterative-snip"])
def test_scope_and_floor_hold_for_every_criterion(criterion: str) -> None:
    few = {"ssfl__steps": 0 if criterion == "grasp" else 3}
    each = found(criterion, mask__scope="layer", **few).strategy.mask
    assert [alive for _, alive, _ in each.layers()] == [size // 5 for _, _, size in each.layers()]
    floored = found(criterion, mask__density=0.02, mask__min_per_layer=100, **few).strategy.mask
    assert min(alive for _, alive, _ in floored.layers()) >= 100
    assert floored.count == 763


def test_weights_of_clients_matter_to_a_mean_of_gradients() -> None:
    unequal = {"partition__name": "dirichlet-class"}
    uniform = found("grasp", **unequal, ssfl__saliency_weighting="uniform")
    assert found("grasp", **unequal).strategy.mask != uniform.strategy.mask
    half = found("grasp", ssfl__saliency_share=0.5)
    assert len(half.records[0]["asked"]) == 3


def test_shuffled_shuffles_the_mask_of_the_criterion() -> None:
    plain = found("synflow").strategy.mask
    shuffled = found("synflow", strategy="shuffled").strategy.mask
    assert list(shuffled.layers()) == list(plain.layers())
    assert shuffled != plain


# ---- other weights than w0 -----------------------------------------------------------------------


def test_weights_of_another_moment_travel_with_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a refresh needs it: `state` in `discover`; the oracle scores the same weights."""
    runtime = get_runtime(merge(SMALL, FEW, {"strategy": "ssfl"}))
    rng = torch.Generator().manual_seed(1)
    other = {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in runtime.initial_state().items()}
    monkeypatch.setattr(Ssfl, "find_mask", lambda self, ask: find_mask(self, ask, range(6), state=other))
    played = found.__wrapped__("snip")
    assert played.records[0]["bytes_discovery_down"] == 6 * 4 * (PRUNABLE + REST)
    oracle = oracles.saliency_mask(runtime, copy.deepcopy(other))
    bits = np.concatenate([oracle[name].flatten().numpy() for name in played.layout.prunable])
    assert played.strategy.mask.hamming(Mask(played.layout, bits)) < 1e-4
    stepwise = found.__wrapped__("force", ssfl__steps=3)
    assert stepwise.records[0]["bytes_discovery_down"] == 6 * (3 * 4 * (PRUNABLE + REST) + 2 * BITMAP)


def test_a_client_that_makes_other_initial_weights_gets_the_servers_in_every_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other_torch(grid: ScriptedGrid, message: Message) -> Message:
        with monkeypatch.context() as patch:
            make = Runtime.initial_state
            patch.setattr(Runtime, "initial_state", lambda self: {n: 2 * t for n, t in make(self).items()})
            return grid.work(message)

    keys, good = {"strategy": "ssfl", "ssfl.criterion": "grasp"}, found("grasp")
    odd = play(keys, until=0, faults={(f"query.{question}", 0, 1): other_torch for question in QUESTIONS})
    assert odd.strategy.mask == good.strategy.mask
    assert odd.records[0]["refused"] == {}
    more = odd.records[0]["bytes_discovery_down"] - good.records[0]["bytes_discovery_down"]
    # In each exchange the weights; in the second one the direction goes along again.
    assert more == 2 * 4 * (PRUNABLE + REST) + 4 * PRUNABLE


# ---- refusals ------------------------------------------------------------------------------------


def spoiled(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Payload], Payload]:
    return lambda payload: Payload({"values": change(payload.arrays["values"].copy())}, payload.metadata)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[5] = np.nan
    return values


@pytest.mark.parametrize(
    ("criterion", "kind", "change", "reason"),
    [
        ("pooled-snip", "query.saliency", with_nan, "1 values are NaN or Inf"),
        ("grasp", "query.curvature", with_nan, "1 values are NaN or Inf"),
        ("grasp", "query.curvature", lambda v: v[:-1], "values has length 38159; it must be 38160"),
        ("grasp", "query.saliency", lambda v: v.astype(np.float16), "values is float16"),
        ("force", "query.saliency", lambda v: v * 0 + 1e6, "values reach 1e+06"),
    ],
)
def test_a_bad_answer_is_refused_by_name(
    criterion: str, kind: str, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    keys = {"strategy": "ssfl", "ssfl.criterion": criterion}
    refused = play(keys, until=0, faults={(kind, 0, 2): tamper(spoiled(change))})
    missing = play(keys, until=0, faults={(kind, 0, 2): answer_error(5)})
    assert reason in refused.records[0]["refused"]["2"]
    assert refused.bits() == missing.bits() != found(criterion).bits()


def test_options_are_refused_by_name() -> None:
    for keys, said in (
        ({"ssfl.criterion": "taylor"}, "ssfl.criterion is 'taylor'"),
        ({"ssfl.steps": -1}, "ssfl.steps is -1"),
        ({"ssfl.grasp-temperature": 0.0}, "ssfl.grasp-temperature is 0.0"),
    ):
        with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
            parse(merge(SMALL, keys))
    for criterion in ("snip", "pooled-snip", "grasp", "magnitude"):
        with pytest.raises(ConfigError, match=f"ssfl.steps is 3; it is 0 with ssfl.criterion {criterion}"):
            found(criterion, ssfl__steps=3)


def test_synflow_without_a_model_on_the_server_says_so() -> None:
    flat = merge(SMALL, {"strategy": "ssfl", "ssfl.criterion": "synflow"})
    strategy = REGISTRY["ssfl"](ServerContext(get_runtime(flat).layout, parse(flat).settings))
    strategy.state = get_runtime(flat).initial_state()
    with pytest.raises(RuntimeError, match="workbench"):
        find_mask(strategy, lambda *_: iter(()), range(6))
