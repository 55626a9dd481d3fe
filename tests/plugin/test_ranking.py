"""SSFL in the place of FedAvg: what is prunable in a foreign model, which tensor is which, and how it is scored."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedMedian
from torch import nn
from torch.nn.utils import parametrizations

from ssfl_app import SSFL, SparseMod, mask_gradients, sparse_mod
from ssfl_app.core.means import WeightedMean
from ssfl_app.locks import RunFailed
from ssfl_app.plugin import discovery
from ssfl_app.plugin.ranking import MaskRule, top, within
from ssfl_app.plugin.state_spec import StateSpec
from ssfl_app.plugin.tensor_report import NOTHING, TensorKind, TensorReport
from ssfl_app.simulation.in_process import InlineGrid
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import keep_count
from ssfl_app.sparsity.values import PayloadError
from tests.plugin.test_rounds import changed

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

Make = Callable[[], nn.Module]
Train = Callable[[nn.Module, int], None]
States = list[dict[str, torch.Tensor]]


def seeded(make: Make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def steps(model: nn.Module, partition: int, count: int = 2) -> None:
    """Fit the model's outputs to noise of this client, with SGD and dead weights kept dead."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, partition).backward()
        mask_gradients(model)
        optimizer.step()


def loss_of(model: nn.Module, partition: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(partition)
    x = model.sample(noise) if hasattr(model, "sample") else torch.randn(12, 8, generator=noise)
    y = model(x)
    return (y - torch.randn(y.shape, generator=noise)).square().mean()


def app_of(make: Make, train: Train = steps, mod: Any = sparse_mod, seen: States | None = None) -> ClientApp:
    app = ClientApp(mods=[mod])

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        model = seeded(make, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        train(model, int(context.node_config["partition-id"]))
        if seen is not None:
            seen.append({name: t.clone() for name, t in model.state_dict().items()})
        records = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 12})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    return app


class OddGrid(InlineGrid):
    """Nodes 1000, 1001, ...; some change their answer to the question."""

    def __init__(self, app: ClientApp, odd: Mapping[int, Any] | None = None, nodes: int = 3) -> None:
        super().__init__(app, {}, {1000 + partition: partition for partition in range(nodes)})
        self._odd = dict(odd or {})

    def work(self, message: Message) -> Message:
        return super()._answer(message)

    def _answer(self, message: Message) -> Message:
        metadata: Any = message.content["facts"]
        fault = self._odd.get(message.metadata.dst_node_id - 1000)
        return fault(self, message) if fault is not None and metadata["ssfl"] == "saliency" else self.work(message)


def play(
    make: Make, rounds: int = 1, train: Train = steps, mod: Any = sparse_mod, odd: Any = None, **arguments: Any
) -> tuple[SSFL, dict[str, torch.Tensor], States]:
    """Return the strategy, the result and the state dicts that clients trained in the last round."""
    seen: States = []
    base = {} if arguments.get("inner") else {"fraction_evaluate": 0.0}
    strategy = SSFL(**{**base, "density": 0.25, **arguments})
    grid = OddGrid(app_of(make, train, mod, seen), odd)
    result = strategy.start(grid, ArrayRecord(seeded(make).state_dict()), num_rounds=rounds)
    return strategy, dict(result.arrays.to_torch_state_dict()), seen[-3:]


def layers(strategy: SSFL) -> dict[str, int]:
    return {name: alive for name, alive, _ in strategy.mask.layers()}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    logger.removeHandler(caplog.handler)


# ---- tensors that start at 0 -----------------------------------------------------------------------


class Residual(nn.Module):
    """A branch that starts at 0, as in adaLN-zero or ControlNet."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.down, self.up, self.out = (nn.Linear(a, b) for a, b in ((8, 16), (16, 16), (16, 16), (16, 3)))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x).relu()
        y: torch.Tensor = self.out(h + self.up(self.down(h).relu()))
        return y


class Lora(nn.Module):
    """A frozen layer beside B A x: B starts at 0, so A has no gradient at first. Only A and B are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 12, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + x.sum(1, keepdim=True)  # type: ignore[no-any-return]


def zeros() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    return model


def mean_gradient(make: Make, name: str) -> np.ndarray:
    """Return the mean of |g| over the three clients at the initial weights."""
    total = np.zeros(seeded(make).get_parameter(name).numel())
    for partition in range(3):
        model = seeded(make)
        loss_of(model, partition).backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        total += gradient.abs().double().numpy().reshape(-1)
    return total.astype(np.float32)


def test_a_branch_that_starts_at_0_keeps_its_share_by_the_gradient(said: Callable[[], str]) -> None:
    strategy, result, _ = play(Residual, density=0.5)
    size = 8 * 16 + 2 * 16 * 16 + 16 * 3
    assert strategy.mask.count == keep_count(0.5, size)
    assert layers(strategy)["up.weight"] == layers(strategy)["down.weight"] == 128
    alive = strategy.mask.tensors()["up.weight"].reshape(-1).numpy()
    gradient = mean_gradient(Residual, "up.weight")
    assert gradient[alive].min() >= gradient[~alive].max()
    down = seeded(Residual).get_parameter("down.weight").detach().abs()
    alive_down = strategy.mask.tensors()["down.weight"]
    assert down[alive_down].min() >= down[~alive_down].max()
    assert strategy.history[0]["within"] == {"up.weight": "gradient", "down.weight": "magnitude"}
    assert (result["up.weight"] != 0).any()
    assert "up.weight start at 0 and are ranked by |g|" in said()
    assert "down.weight have no gradient yet: by |w|" in said()


def test_lora_learns_in_both_of_its_matrices() -> None:
    strategy, result, _ = play(Lora, rounds=3)
    assert layers(strategy) == {"a.weight": 8, "b.weight": 12}
    assert int((result["b.weight"] != 0).sum()) == 12
    before = seeded(Lora).state_dict()["a.weight"]
    assert ((result["a.weight"] != before) & (result["a.weight"] != 0)).any()


@pytest.mark.parametrize("inner", [None, FedMedian])
def test_a_model_of_zeros_is_ranked_by_the_gradient(inner: Any) -> None:
    strategy, result, _ = play(zeros, inner=inner and inner(fraction_evaluate=0.0))
    assert strategy.mask.count == 6
    if inner is None:
        alive = strategy.mask.alive
        gradient = mean_gradient(zeros, "0.weight")
        assert gradient[alive].min() >= gradient[~alive].max()
    assert int((result["0.weight"] != 0).sum()) == 6


def test_a_model_of_zeros_without_torchs_optimizers_is_ranked_by_its_first_training() -> None:
    def by_hand(model: nn.Module, partition: int) -> None:
        loss_of(model, partition).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]
        mask = strategies[0].mask if strategies else None
        if mask is not None:
            model.load_state_dict(mask.apply(model.state_dict()), strict=False)

    strategies: list[SSFL] = []
    strategy, _, _ = play(zeros, train=by_hand)
    assert strategy.history[0]["scored_by"] == {"difference": 3}
    assert strategy.mask == play(zeros)[0].mask


def test_gradients_of_ones_own_are_scored_likewise_and_scores_of_ones_own_all_compare() -> None:
    def gradients(message: Message, context: Context) -> Any:
        model = seeded(Residual, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        loss_of(model, int(context.node_config["partition-id"])).backward()
        return {name: p.grad for name, p in model.named_parameters()}, 12

    own, _, _ = play(Residual, mod=SparseMod(saliency=gradients))
    assert own.mask == play(Residual)[0].mask
    assert own.history[0]["scored_by"] == {"own": 3}

    def absolute(message: Message, context: Context) -> Any:
        told, count = gradients(message, context)
        return {name: g.abs() for name, g in told.items()}, count

    scored, _, _ = play(Residual, mod=SparseMod(saliency=absolute, returns="scores"))
    assert scored.history[0]["scored_by"] == {"scores": 3}
    assert scored.history[0]["within"] == {}
    assert layers(scored)["down.weight"] == 0  # as the user said


def test_what_blocks_its_own_gradient_stays_dense_or_is_an_error_with_cause_and_cure(said: Callable[[], str]) -> None:
    def blocked() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model

    with pytest.raises(
        RunFailed, match=r"0.weight, 2.weight start at 0 and may block each other's gradients: draw th"
    ):
        play(blocked)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.blocked = nn.Linear(8, 3), blocked()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(x) + self.blocked(x)  # type: ignore[no-any-return]

    strategy, _, _ = play(Two)
    assert strategy.mask.layout.prunable == ("plain.weight",)
    assert strategy.history[0]["dense"] == dict.fromkeys(
        ["blocked.0.weight", "blocked.2.weight"], "it starts at 0 and no gradient reaches it"
    )
    assert "blocked.0.weight stays dense: it starts at 0" in said()


def test_nothing_learned_anywhere_is_an_error_with_its_causes() -> None:
    with pytest.raises(
        RunFailed, match=r"no client told a score above 0; .*is there a minibatch, and a learning rate"
    ):
        play(Lora, train=lambda model, partition: None)


def test_the_total_is_exact_whatever_is_ranked_within_itself() -> None:
    rng = np.random.default_rng(0)
    for density in (0.03, 0.1, 0.37, 0.9, 0.99):
        sizes = {"a.weight": (7, 3), "b.weight": (5, 5), "c.weight": (11, 2)}
        arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in sizes.items()}
        arrays["b.weight"][:] = 0
        spec = StateSpec.of(ArrayRecord({n: Array(a) for n, a in arrays.items()}), None, ("a", "c"))
        model = np.concatenate([a.reshape(-1) for a in arrays.values()])
        scores = np.abs(rng.normal(size=68)).astype(np.float32)
        scores[:21] = 0
        alone = within(spec.layout, model, scores)
        assert alone == {"b.weight": "gradient", "a.weight": "magnitude"}
        assert top(spec, model, scores, MaskRule(density, "global", 0), alone).count == keep_count(density, 68)
        floor = top(spec, model, scores, MaskRule(density, "layer", 2), alone)
        assert [n for _, n, _ in floor.layers()] == [max(2, keep_count(density, n)) for n in (21, 25, 22)]


def test_a_floor_is_counted_where_discovery_has_said_what_is_dense() -> None:
    """Norms and frozen matrices count before it, and reserve nothing after it: no refusal can be had from both."""
    arrays = {"big": np.ones((100, 100)), **{f"small{i}": np.ones((10, 10)) for i in range(20)}}
    spec = StateSpec.of(ArrayRecord({n: Array(a.astype(np.float32)) for n, a in arrays.items()}), None, ())
    MaskRule(0.05, "global", 100).check(spec.layout)


# ---- one tensor with two names ---------------------------------------------------------------------


class Language(nn.Module):
    """As nanoGPT has it: the head is the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(self.wte.weight)
        if tied:
            self.lm_head.weight = self.wte.weight

    def sample(self, noise: torch.Generator) -> torch.Tensor:
        return torch.randint(0, 20, (12, 4), generator=noise)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.mid(self.wte(tokens)).tanh())  # type: ignore[no-any-return]


def language_mask() -> np.ndarray:
    """Return the mask of wte and mid by hand: autograd adds up the gradients of both uses of a tied tensor."""
    total = np.zeros(160 + 64)
    for partition in range(3):
        model = seeded(Language)
        loss_of(model, partition).backward()
        total += np.concatenate(
            [(p.grad * p).abs().detach().double().numpy().reshape(-1) for p in (model.wte.weight, model.mid.weight)]
        )
    return total >= np.sort(total)[-56]  # floor(0.25 * 224)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("prunable", [None, ["wte.weight", "mid.weight"], ["lm_head.weight", "mid.weight"]])
def test_a_tied_head_is_masked_once_and_restored_under_both_names(
    prunable: Any, weighting: str, said: Callable[[], str]
) -> None:
    strategy, result, trained = play(Language, rounds=2, prunable=prunable, saliency_weighting=weighting)
    assert strategy.history[0]["ties"] == {"lm_head.weight": "wte.weight"}
    assert strategy.mask.layout.prunable == ("wte.weight", "mid.weight")
    np.testing.assert_array_equal(strategy.mask.alive, language_mask())
    assert list(result) == list(Language().state_dict())
    for state in (result, *trained):  # with mask_gradients also in the clients
        assert torch.equal(state["wte.weight"], state["lm_head.weight"])
        assert int((state["wte.weight"] != 0).sum()) == layers(strategy)["wte.weight"]
    assert strategy.history[2]["bytes_train_up"] == 3 * 4 * (56 + 8)  # values of one of the two, and mid's bias
    assert "tied, and masked as one: lm_head.weight to wte.weight" in said()


def told_same(places: list[int]) -> Any:
    array = np.array(places, np.int32)
    return changed(
        lambda c: c["arrays"].update({"same": Array("int32", array.shape, "ssfl.raw.v1", array.tobytes())})
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("inner", [None, FedMedian])
def test_a_client_that_has_other_ties_is_refused_and_not_the_run(inner: Any) -> None:
    untie = changed(lambda c: c["arrays"].pop("same"))  # type: ignore[union-attr]
    strategy, _, _ = play(Language, odd={1: untie}, inner=inner and inner(fraction_evaluate=0.0))
    assert strategy.history[0]["refused"] == {"1001": "ties nothing; 2 of 3 clients tie lm_head.weight to wte.weight"}
    assert strategy.history[0]["ok"] == [1000, 1002]
    assert strategy.history[0]["ties"] == {"lm_head.weight": "wte.weight"}
    assert strategy.history[1]["ok"] == [1000, 1001, 1002]


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([0, 1, 1, 3], "says that mid.bias is tied to mid.weight; in the initial arrays they differ"),
        ([0, 1, 2, 7], "same[3] is 7; it is 3 or the place of an earlier first name"),
        ([0, 1, 2, -1], "same[3] is -1"),
        ([0, 1, 2], "same has length 3; it must be 4"),
        ([0, 1, 2, 3, 3], "same has length 5; it has at most 4"),
    ],
)
def test_ties_that_cannot_be_are_refused_by_name(places: list[int], reason: str) -> None:
    strategy, _, _ = play(Language, odd={2: told_same(places)})
    assert reason in strategy.history[0]["refused"]["1002"]
    assert strategy.history[0]["ok"] == [1000, 1001]


def test_a_head_that_only_the_server_has_untied_is_an_error_that_says_so() -> None:
    app = app_of(Language)
    state = seeded(Language).state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(RunFailed, match=r"lm_head.weight is tied to wte.weight; in the initial arrays they differ"):
        SSFL(density=0.25).start(OddGrid(app), ArrayRecord(state), num_rounds=1)


def test_equal_layers_are_not_tied_and_a_tie_that_nobody_found_is_refused_when_it_shows() -> None:
    strategy, _, _ = play(lambda: Language(tied=False))
    assert strategy.history[0]["ties"] == {}
    assert strategy.mask.layout.prunable == ("wte.weight", "mid.weight", "lm_head.weight")

    def own(message: Message, context: Context) -> Any:  # tells the named ones only, as if the others did not exist
        return {name: torch.ones(shape) for name, shape in (("wte.weight", (20, 8)), ("mid.weight", (8, 8)))}, 12

    named = ["wte.weight", "mid.weight"]
    with pytest.raises(
        RunFailed, match=r"wte.weight and lm_head.weight were sent with other values and came back equ"
    ):
        play(Language, mod=SparseMod(saliency=own), prunable=named)


def test_parameters_that_share_memory_and_are_not_one_are_refused_by_name() -> None:
    def halves() -> nn.Module:
        model = Language()
        model.lm_head.weight = nn.Parameter(model.wte.weight.detach())
        return model

    with pytest.raises(RunFailed, match=r"parameters wte.weight and wte.weight share memory; make them one to tie"):
        play(halves)

    def turned() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        model[1].weight = nn.Parameter(model[0].weight.detach().t())
        return model

    with pytest.raises(RunFailed, match=r"parameters 0.weight and 1.weight share memory; make them one"):
        play(turned)

    def viewed() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        model.register_buffer("view", model[0].weight.detach().t())  # type: ignore[operator]
        return model

    with pytest.raises(RunFailed, match=r"view and 0.weight share memory in other shapes, \(8, 4\) and \(4, 8\)"):
        play(viewed)


def test_ties_are_found_in_what_a_function_of_ones_own_tells() -> None:
    def told(duplicates: bool) -> Any:
        def own(message: Message, context: Context) -> Any:
            model = seeded(Language, 1)
            model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
            loss_of(model, int(context.node_config["partition-id"])).backward()
            return {name: p.grad for name, p in model.named_parameters(remove_duplicate=duplicates)}, 12

        return own

    for duplicates in (True, False):
        strategy, _, _ = play(Language, mod=SparseMod(saliency=told(duplicates)))
        assert strategy.history[0]["ties"] == {"lm_head.weight": "wte.weight"}
        np.testing.assert_array_equal(strategy.mask.alive, language_mask())


def test_ties_show_after_a_training_without_torchs_optimizers() -> None:
    def by_hand(model: nn.Module, partition: int) -> None:
        loss_of(model, partition).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]

    strategy, result, _ = play(Language, train=by_hand)
    assert strategy.history[0]["scored_by"] == {"difference": 3}
    assert strategy.history[0]["ties"] == {"lm_head.weight": "wte.weight"}
    assert torch.equal(result["wte.weight"], result["lm_head.weight"])


def language_states(order: Callable[[list[str]], list[str]] = list) -> ArrayRecord:
    state = seeded(Language).state_dict()
    return ArrayRecord({name: Array(state[name].numpy().copy()) for name in order(list(state))})


@pytest.mark.parametrize("inner", [None, FedMedian])
@pytest.mark.parametrize("empty", [{0}, {0, 1}])
def test_a_client_that_had_nothing_to_train_on_has_no_vote_on_ties_and_is_not_refused(empty: Any, inner: Any) -> None:
    def train(model: nn.Module, partition: int) -> None:
        if partition not in empty:
            steps(model, partition)

    strategy, _, _ = play(Language, train=train, inner=inner and inner(fraction_evaluate=0.0))
    assert strategy.history[0]["ties"] == {"lm_head.weight": "wte.weight"}
    assert strategy.history[0]["ok"] == [1000, 1001, 1002]
    assert strategy.history[0]["refused"] == {}
    assert strategy.history[0]["scored_by"] == {"gradient": 3 - len(empty)}


@pytest.mark.parametrize("own", [False, True])
def test_a_tied_tensor_keeps_its_scores_whatever_the_order_of_the_initial_arrays(own: bool) -> None:
    def told(message: Message, context: Context) -> Any:  # only one name of each, in the module's order
        model = seeded(Language, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        loss_of(model, int(context.node_config["partition-id"])).backward()
        return {name: p.grad for name, p in model.named_parameters()}, 12

    strategy = SSFL(density=0.25, fraction_evaluate=0.0)
    app = app_of(Language, mod=SparseMod(saliency=told) if own else sparse_mod)
    strategy.start(OddGrid(app), language_states(sorted), num_rounds=1)
    assert strategy.history[0]["ties"] == {"wte.weight": "lm_head.weight"}
    assert strategy.history[0]["within"] == {}
    np.testing.assert_array_equal(strategy.mask.alive, language_mask())


class Numbered(nn.Module):
    """Its head is the embedding, and neither stands last in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.mid, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.lm_head.weight = self.wte.weight

    def sample(self, noise: torch.Generator) -> torch.Tensor:
        return torch.randint(0, 20, (12,), generator=noise)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.mid(self.wte(tokens))).tanh())  # type: ignore[no-any-return]


class TwiceTied(Numbered):
    """The bias is one tensor, too, which travels under both of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.head_bias = self.lm_head.bias


@pytest.mark.parametrize("make", [Language, Numbered, TwiceTied])
def test_tied_tensors_without_names_are_masked_in_the_clients(make: Make) -> None:
    app, trained = ClientApp(mods=[sparse_mod]), list[list[np.ndarray]]()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        model = seeded(make, 1)
        told = message.content["arrays"].to_numpy_ndarrays()
        model.load_state_dict(dict(zip(model.state_dict(), map(torch.tensor, told), strict=True)))
        steps(model, int(context.node_config["partition-id"]))
        arrays = [tensor.detach().numpy() for tensor in model.state_dict().values()]
        trained.append(arrays)
        records = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 12})}
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    strategy = SSFL(density=0.25, fraction_evaluate=0.0)
    strategy.start(OddGrid(app), ArrayRecord([t.numpy() for t in seeded(make).state_dict().values()]), num_rounds=1)
    assert len(strategy.history[0]["ties"]) == 1
    assert strategy.history[1]["ok"] == [1000, 1001, 1002]
    for arrays in trained[-3:]:
        for name, alive in strategy.mask.tensors().items():
            assert (arrays[int(name)][~alive.numpy()] == 0).all()


def test_a_tie_of_tensors_that_no_mask_covers_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    spec = StateSpec.of(ArrayRecord(model.state_dict()), None, ("arrays", "config"))
    names = [name for name, _ in spec.layout.shapes]
    same = np.arange(len(names), dtype=np.int32)
    same[names.index("2.weight")] = names.index("1.weight")
    with pytest.raises(PayloadError, match=r"2.weight is tied to 1.weight; no name of that tensor is prunable"):
        TensorReport.read({"same": same}, spec, spec.flatten(ArrayRecord(model.state_dict())))


def test_many_opinions_on_ties_hold_few_means_and_their_order_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    class Counted(WeightedMean):
        def __init__(self, size: int, vectors: int) -> None:
            nonlocal alive, most
            super().__init__(size, vectors)
            alive, most = alive + 1, max(most, alive + 1)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(discovery, "WeightedMean", Counted)
    monkeypatch.setattr(discovery, "OPINIONS", 2)
    # Names are layers.0.weight, layers.0.bias, ... Each liar ties other layers, or all of them.
    lies = [[0, 1, 0, 3, 4, 5], [0, 1, 2, 3, 0, 5], [0, 1, 2, 3, 2, 5], [0, 1, 0, 3, 0, 5]]
    masks = []
    for turn in range(3):
        odd = {2 + (place + turn) % 4: told_same(lie) for place, lie in enumerate(lies)}
        strategy = SSFL(density=0.25, fraction_evaluate=0.0, min_ok_fraction=0.3)
        same = app_of(Copies, train=lambda model, partition: steps(model, 0))
        strategy.start(OddGrid(same, odd, nodes=6), ArrayRecord(seeded(Copies).state_dict()), num_rounds=1)
        assert strategy.history[0]["ok"] == [1000, 1001]
        assert strategy.history[0]["refused"].keys() == {"1002", "1003", "1004", "1005"}
        masks.append(strategy.mask)
    assert masks[0] == masks[1] == masks[2]
    assert most <= 4  # one more while the last one goes, and one that setdefault does not need


def test_an_opinion_of_most_that_is_not_kept_ends_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "OPINIONS", 1)
    untie = changed(lambda c: c["arrays"].pop("same"))  # type: ignore[union-attr]
    with pytest.raises(RunFailed, match=r"tell 2 different things .* most of them tie lm_head.weight to wte.weight"):
        play(Language, odd={1: untie})


# ---- equal initial layers --------------------------------------------------------------------------


class Copies(nn.Module):
    """Three layers that start equal, as in nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(8, 8)
        self.layers = nn.ModuleList([first, nn.Linear(8, 8), nn.Linear(8, 8)])
        for layer in self.layers[1:]:
            layer.load_state_dict(first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def copies_mask(strategy: SSFL) -> np.ndarray:
    total = np.zeros(3 * 64)
    for partition in range(3):
        model = seeded(Copies)
        loss_of(model, partition).backward()
        weights = [layer.weight for layer in model.layers]  # type: ignore[union-attr]
        total += np.concatenate([(p.grad * p).abs().detach().double().numpy().reshape(-1) for p in weights])
    return total >= np.sort(total)[-48]


def backwards(model: nn.Module, partition: int) -> None:
    """Train with the last layer first, as layer-wise decay of the learning rate does."""
    groups = [{"params": list(layer.parameters())} for layer in reversed(model.layers)]  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    loss_of(model, partition).backward()
    optimizer.step()


State = Mapping[str, torch.Tensor]
SENT_AS: dict[str, Callable[[State], Any]] = {
    "its own names": dict,
    "positions": lambda state: [tensor.numpy() for tensor in state.values()],
    "names of a wrapper": lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
    # As PEFT leaves the name of the adapter out; a bias less, so that positions do not tell.
    "a part of its names": lambda state: {
        n.removeprefix("layers."): t for n, t in state.items() if n != "layers.0.bias"
    },
}


@pytest.mark.parametrize("how", list(SENT_AS))
def test_layers_that_start_equal_are_told_apart_whatever_the_optimizers_order(how: str) -> None:
    app, sent_as = ClientApp(mods=[sparse_mod]), SENT_AS[how]

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        model = seeded(Copies)
        own = [name for name in model.state_dict() if how != "a part of its names" or name != "layers.0.bias"]
        told = message.content["arrays"].to_torch_state_dict().values()
        model.load_state_dict(dict(zip(own, told, strict=True)), strict=False)
        backwards(model, int(context.node_config["partition-id"]))
        records = {
            "arrays": ArrayRecord(sent_as(model.state_dict())),
            "metrics": MetricRecord({"num-examples": 12}),
        }
        return Message(RecordDict(records), reply_to=message)  # type: ignore[arg-type]

    strategy = SSFL(density=0.25, fraction_evaluate=0.0)
    strategy.start(OddGrid(app), ArrayRecord(sent_as(seeded(Copies).state_dict())), num_rounds=1)
    np.testing.assert_array_equal(strategy.mask.alive, copies_mask(strategy))
    assert strategy.history[0]["scored_by"] == {"gradient": 3}


def test_layers_that_start_equal_and_are_in_no_module_are_refused_by_name() -> None:
    def loose(model: nn.Module, partition: int) -> None:
        weights = [nn.Parameter(layer.weight.detach().clone()) for layer in model.layers]  # type: ignore[union-attr,operator]
        optimizer = torch.optim.SGD(weights, lr=0.1)
        sum(w.square().sum() for w in weights).backward()  # type: ignore[union-attr]
        optimizer.step()

    with pytest.raises(RunFailed, match=r"started with equal values, and no torch.nn.Module .* SparseMod\(saliency"):
        play(Copies, train=loose)


# ---- what is prunable ------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.fc = kind(1, 8, batch_first=True), nn.Linear(8, 3)

    def sample(self, noise: torch.Generator) -> torch.Tensor:
        return torch.randn(12, 5, 1, generator=noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """in_proj_weight, a bare matrix, a class token, a table that is a buffer, and a norm of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm((5, 8))
        self.positions, self.token = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("table", torch.randn(5, 5))

    def sample(self, noise: torch.Generator) -> torch.Tensor:
        return torch.randn(12, 4, 8, generator=noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 8), x + self.positions], 1)
        return self.norm(self.attention(x, x, x, attn_mask=self.table)[0])  # type: ignore[no-any-return]


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep = nn.Conv1d(2, 3, 3), nn.Conv3d(1, 2, 2)
        self.up = nn.ConvTranspose1d(3, 2, 3)

    def sample(self, noise: torch.Generator) -> torch.Tensor:
        return torch.randn(6, 2, 8, generator=noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.flat(x)).sum(1) + self.deep(x.reshape(6, 1, 2, 2, 4)).mean()  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Make, list[str]]] = {
    "LSTM": (Recurrent, ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "fc.weight"]),
    "GRU": (lambda: Recurrent(nn.GRU), ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "fc.weight"]),
    "attention": (Attention, ["positions", "attention.in_proj_weight", "attention.out_proj.weight"]),
    "1 and 3 dimensions": (Volume, ["flat.weight", "deep.weight", "up.weight"]),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)),
        ["0.parametrizations.weight.original1", "2.weight"],
    ),
    "old weight norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)),
        ["0.weight_v", "2.weight"],
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)),
        ["0.parametrizations.weight.original", "2.weight"],
    ),
    "old spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)),
        ["0.weight_orig", "2.weight"],
    ),
}


@pytest.mark.parametrize("what", list(MODELS))
def test_matrices_are_pruned_and_what_only_looks_like_one_is_not(what: str) -> None:
    make, prunable = MODELS[what]
    strategy, result, trained = play(make, rounds=2)
    assert sorted(strategy.mask.layout.prunable) == sorted(prunable)
    for state in (result, *trained):
        for name, alive in strategy.mask.tensors().items():
            assert (state[name][~alive] == 0).all()
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert strategy.history[2]["density"] == pytest.approx(0.25, abs=0.03)


def test_a_weight_norm_keeps_a_weight_in_every_row() -> None:
    make, _ = MODELS["weight norm"]
    name = "0.parametrizations.weight.original1"
    strategy, result, _ = play(make, density=0.13)  # 8 weights for 6 rows
    assert strategy.mask.tensors()[name].any(dim=1).all()
    assert strategy.mask.count == 8
    assert result[name].isfinite().all()
    for scope in ("global", "layer"):
        with pytest.raises(ValueError, match=r"it leaves less than the 6 weights that .*original1.* needs"):
            play(make, density=0.08, scope=scope)


def test_what_clients_call_no_weight_is_named_and_the_majority_decides(said: Callable[[], str]) -> None:
    strategy, _, _ = play(Attention)
    norm = dict.fromkeys(["norm.weight", "norm.bias"], "it belongs to a norm")
    assert strategy.history[0]["dense"] == {"table": "no client trains it", **norm}
    assert "table stays dense: no client trains it" in said()
    all_dense = np.full(6, TensorKind.NORM, np.uint8)
    lie = changed(
        lambda c: c["arrays"].update({"kinds": Array("uint8", (6,), "ssfl.raw.v1", all_dense.tobytes())})  # type: ignore[union-attr]
    )
    liar, _, _ = play(Attention, odd={0: lie})
    assert liar.mask.layout.prunable == strategy.mask.layout.prunable
    with pytest.raises(RunFailed, match=r"prunable names \['table'\], which no client trains; leave them out"):
        play(Attention, prunable=["table", "attention.in_proj_weight"])


def test_large_matrices_that_stay_dense_are_a_warning_and_the_share_that_travels_is_told(
    said: Callable[[], str],
) -> None:
    strategy, _, _ = play(Recurrent, prunable=["fc.weight"])
    assert "rnn.weight_ih_l0, rnn.weight_hh_l0 stay dense and are large" in said()
    share = strategy.history[1]["density_all"]
    assert f"{100 * share:.1f} % of all coordinates travel" in said()
    assert share > 0.9


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(4, 3), nn.Conv1d(3, 2, 2), nn.Conv2d(3, 1, 1), nn.Linear(4, 1), nn.LSTM(2, 3), nn.BatchNorm1d(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_the_app_and_the_plug_in_prune_the_same_tensors(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer)
    spec = StateSpec.of(ArrayRecord(model.state_dict()), None, ("arrays", "config"))
    assert spec.prunable == Layout.of(model).prunable


def test_names_by_position_are_pruned_by_their_dimensions() -> None:
    spec = StateSpec.of(ArrayRecord([np.ones((3, 8)), np.ones(3), np.ones((1, 3))]), None, ("a", "c"))
    assert spec.prunable == ("0", "2")
    with pytest.raises(TypeError, match="prunable is '0'; it is a list of names"):
        SSFL(prunable="0")


def test_empty_layers_are_a_warning_with_the_cure(said: Callable[[], str]) -> None:
    def deep() -> nn.Module:
        return nn.Sequential(*[z for _ in range(6) for z in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 3))

    strategy, _, _ = play(deep, density=0.05)
    empty = [name for name, alive in layers(strategy).items() if not alive]
    assert empty
    assert f"{len(empty)} of 7 layers keep no weight, and nothing passes through them: {', '.join(empty)}." in said()
    assert "min_per_layer=... leaves some in each" in said()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_density_that_keeps_nothing_is_an_error_before_anything_is_sent(scope: Any) -> None:
    with pytest.raises(ValueError, match=r"density is 0.001; it leaves none of 24 prunable weights alive"):
        SSFL(density=0.001, scope=scope).start(None, ArrayRecord(zeros().state_dict()))  # type: ignore[arg-type]
    strategy, _, _ = play(zeros, density=0.001, scope="layer", min_per_layer=2)
    assert strategy.mask.count == 2


# ---- numbers that are not real ---------------------------------------------------------------------


class Spectral(nn.Module):
    """A complex weight, as in a Fourier neural operator, a counter and a table of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat)), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("codes", torch.arange(6).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(torch.fft.ifft(torch.fft.fft(x) @ self.w).real))  # type: ignore[no-any-return]


def test_complex_tensors_are_averaged_as_two_reals_and_stay_dense() -> None:
    strategy, result, trained = play(Spectral)
    mean = torch.stack([state["w"] for state in trained]).mean(0)
    torch.testing.assert_close(result["w"], mean)
    assert result["w"].dtype == torch.complex64
    assert not torch.equal(result["w"], seeded(Spectral).state_dict()["w"])
    dense = 2 * 64 + 3 + 4 * 8
    assert strategy.history[1]["bytes_train_up"] == 3 * 4 * (6 + dense)
    with pytest.raises(ValueError, match=r"prunable names \['w'\]; tensors of real floating numbers are"):
        play(Spectral, prunable=["w"])


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_complex_arrays_come_back_as_they_were(kind: str) -> None:
    array = (np.arange(6).reshape(2, 3) + 1j * np.arange(6).reshape(2, 3)[::-1]).astype(kind)
    record = ArrayRecord(
        {"w": Array(array), "a.weight": Array(np.ones((2, 2), np.float32)), "s": Array(np.array(array[0, 1]))}
    )
    spec = StateSpec.of(record, None, ("a", "c"))
    back = spec.dense(spec.flatten(record))
    assert all(back[name].numpy().dtype == kind for name in "ws")
    np.testing.assert_array_equal(back["w"].numpy(), array)
    np.testing.assert_array_equal(back["s"].numpy(), array[0, 1])


def test_a_table_that_comes_back_changed_is_refused_and_a_counter_is_told(said: Callable[[], str]) -> None:
    def count(model: nn.Module, partition: int) -> None:
        steps(model, partition)
        model.steps += 1  # type: ignore[operator]

    strategy, _, _ = play(Spectral, train=count)
    assert strategy.history[1]["ok"] == [1000, 1001, 1002]
    assert "steps (int64) counted to 1; under SSFL it starts from 0 in every round" in said()
    assert "num_batches_tracked" not in said()

    def learn(model: nn.Module, partition: int) -> None:
        steps(model, partition)
        model.codes += 1  # type: ignore[operator]

    with pytest.raises(RunFailed, match=r"array codes \(int64\) came back changed; only floating and complex"):
        play(Spectral, train=learn)


# ---- on the wire -----------------------------------------------------------------------------------


def test_a_sheet_with_ties_is_the_same_behind_the_wire() -> None:
    spec = StateSpec.of(ArrayRecord(Language().state_dict()), None, ("arrays", "config"))
    settled = spec.settled((("lm_head.weight", "wte.weight"),), ["mid.weight"])
    assert settled.prunable == ("wte.weight",)
    assert [name for name, _ in settled.layout.shapes] == ["wte.weight", "mid.weight", "mid.bias"]
    again = StateSpec.read(settled.written())
    assert again == settled
    assert again.digest != spec.digest
    text = json.dumps([settled.tensors, settled.prunable, settled.keys, 7]).encode()
    with pytest.raises(PayloadError, match="a sheet cannot be read"):
        StateSpec.read({"sheet": np.frombuffer(text, np.uint8)})


def test_what_a_client_tells_is_the_same_behind_the_wire_and_mostly_nothing() -> None:
    spec = StateSpec.of(ArrayRecord(Language().state_dict()), None, ("arrays", "config"))
    model = spec.flatten(ArrayRecord(Language().state_dict()))
    assert NOTHING.written(spec) == {}
    seen = TensorReport((("lm_head.weight", "wte.weight"),), {"mid.weight": TensorKind.NORM})
    written = seen.written(spec)
    assert written["same"].tolist() == [0, 1, 2, 0]
    assert TensorReport.read(written, spec, model) == seen
    with pytest.raises(PayloadError, match="kinds has the value 9; it is at most 2"):
        TensorReport.read({"kinds": np.full(3, 9, np.uint8)}, spec, model)
