"""Changed passes: what they compute, by independent means, and that nothing of them is left behind."""

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.seeding import torch_generator
from ssfl_app.sparsity.layout import Layout
from ssfl_app.training import reparam
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.reparam import (
    alive_filters,
    bernoulli_weights,
    filter_thresholds,
    inverse_power,
    originals,
    power,
    power_propagation,
    sparse_activations,
    spectral_exponent,
    top_weights,
)
from ssfl_app.training.trainer import LocalOptions, LocalTrainer

PLAIN = {
    "epochs": 2, "batch_size": 8, "lr": 0.1, "lr_decay": 1.0, "momentum": 0.9, "weight_decay": 0.01, "clip": 1.0,
}  # fmt: skip


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=1):
    """Small whole numbers: sums of their products are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def network(name="cnn", norm="group"):
    return create(ModelOptions(name, norm), (1, 8, 8), 3, seed=1)


def linear(weight, bias=False):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data.copy_(weight)
    return layer


def fit(model):
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    run = LocalTrainer(LocalOptions(**PLAIN), Transform((0.5,), (0.25,), "none"), torch.device("cpu"))
    return run.fit(model, Samples(pixels, torch.arange(20) % 3), np.random.default_rng(1), lr=0.1)


def ones(model):
    return {name: torch.ones_like(w) for name, w in originals(model).items()}


def middle(model):
    """Thresholds under which half of the filters of each layer are alive."""
    return {n: w.detach().abs().flatten(1).mean(1).median().expand(w.shape[0]) for n, w in originals(model).items()}


CONTEXTS = {
    "power": lambda model: power_propagation(model, 1.25),
    "activations": lambda model: sparse_activations(model, dict.fromkeys(originals(model), 0.3)),
    "top": lambda model: top_weights(model, 0.3),
    "bernoulli": lambda model: bernoulli_weights(model, torch.Generator().manual_seed(1), constants=ones(model)),
    "thresholds": lambda model: filter_thresholds(model, middle(model)),
}


def pruned(tensor, count):
    """The `count` largest in magnitude, by a stable sort: equal ones by index."""
    flat = tensor.detach().numpy().ravel()
    kept = np.zeros_like(flat)
    places = np.argsort(-np.abs(flat), kind="stable")[:count]
    kept[places] = flat[places]
    return torch.from_numpy(kept.reshape(tensor.shape))


# ---- what all share ------------------------------------------------------------------------------


def description(model):
    modules = [(type(m), sorted(vars(m)), list(m._parameters), list(m._modules)) for m in model.modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return Layout.of(model), list(model.state_dict()), modules, parameters


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("which", [*([name] for name in CONTEXTS), list(CONTEXTS), list(CONTEXTS)[::-1]])
def test_the_model_is_left_as_it_was_and_what_was_trained_is_in_it(which, fails):
    model = network("resnet20", "batch")
    model[0].weight.requires_grad_(False)
    before, start = description(model), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), ExitStack() as stack:
        for name in which:
            stack.enter_context(CONTEXTS[name](model))
        functional.cross_entropy(model(drawn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= p.grad
        if fails:
            raise ZeroDivisionError
    assert description(model) == before
    named = dict(model.named_parameters())
    moved = {name for (name, p), old in zip(named.items(), start, strict=True) if not torch.equal(p, old)}
    wanted = Layout.of(model).prunable if "bernoulli" in which else named
    assert moved == set(wanted) - {"0.weight"}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_training_loop_trains_in_each_context_with_the_same_bits_each_time(name):
    results = []
    for _ in range(2):
        model = network()
        start = {n: t.clone() for n, t in model.state_dict().items()}
        with CONTEXTS[name](model):
            loss = fit(model)
        assert all(not torch.equal(model.state_dict()[n], start[n]) for n in Layout.of(model).prunable)
        results.append((loss, [t.clone() for t in model.state_dict().values()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_originals_are_the_parameters_by_their_usual_names_and_in_their_order():
    model = network("resnet20")
    before = originals(model)
    assert tuple(before) == Layout.of(model).prunable
    assert all(w is dict(model.named_parameters())[name] for name, w in before.items())
    with power_propagation(model, 2.0), top_weights(model, 0.5):
        assert tuple(originals(model)) == tuple(before)
        assert all(w is before[name] for name, w in originals(model).items())


def test_a_model_that_is_one_layer_and_a_weight_that_two_layers_share():
    single = nn.Conv2d(1, 1, 2)
    with power_propagation(single, {"weight": 2.0}):
        assert torch.equal(single.weight, power(originals(single)["weight"], 2.0))
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    before = description(tied)
    assert Layout.of(tied).prunable == ("0.weight", "1.weight")
    with power_propagation(tied, {"0.weight": 2.0, "1.weight": 3.0}):
        w = originals(tied)["0.weight"]
        assert originals(tied)["1.weight"] is w
        assert len(list(tied.parameters())) == 1
        torch.testing.assert_close(tied[0].weight, w.sign() * w.abs() ** 2)
        torch.testing.assert_close(tied[1].weight, w.sign() * w.abs() ** 3)
    assert description(tied) == before
    assert tied[1].weight is tied[0].weight
    twice = nn.Sequential(layer := nn.Linear(2, 2), layer)
    with power_propagation(twice, {"0.weight": 2.0}), sparse_activations(twice, {"0.weight": 0.5}):
        twice(drawn(3, 2)).sum().backward()
    assert Layout.of(twice).prunable == ("0.weight", "1.weight")  # as its state has them


def test_contexts_and_layout_agree_on_what_is_prunable() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 4),
        nn.Conv1d(4, 3, 2),
        nn.Conv3d(1, 1, 1),
        nn.Linear(3, 1),
        nn.GroupNorm(1, 3),
        nn.PReLU(3),
        nn.LayerNorm((2, 3)),
        nn.BatchNorm1d(3, affine=False),
        nn.Bilinear(2, 2, 2),
    )
    assert tuple(originals(model)) == Layout.of(model).prunable
    assert Layout.of(model).prunable == ("0.weight", "1.weight", "2.weight", "3.weight", "8.weight")


@pytest.mark.parametrize(
    ("enter", "message"),
    [
        (lambda m: power_propagation(m, 0.5), "beta of 0.weight is 0.5; it is a finite number of at least 1"),
        (lambda m: power_propagation(m, float("nan")), "beta of 0.weight is nan"),
        (lambda m: power_propagation(m, float("inf")), "beta of 0.weight is inf"),
        (lambda m: power_propagation(m, {"0.weight": 2, "1.weight": 0}), "beta of 1.weight is 0;"),
        (lambda m: power_propagation(m, {"0.weight": 2}), r"beta names \['1.weight'\] do not match"),
        (lambda m: sparse_activations(m, {"0.weight": 1}), r"keep names \['1.weight'\] do not match"),
        (
            lambda m: sparse_activations(m, {"0.weight": 1, "1.weight": 1.5}),
            r"keep of 1.weight is 1.5; .* in \[0, 1\]",
        ),
        (lambda m: top_weights(m, 0.0), "density is 0.0"),
        (lambda m: top_weights(m, 0.5, ["2.weight"]), r"dense names \['2.weight'\] do not match"),
        (lambda m: bernoulli_weights(m, torch.Generator(), constants={}), "constants names .*0.weight.*1.weight"),
        (
            lambda m: bernoulli_weights(m, torch.Generator(), constants=ones(m) | {"1.weight": torch.ones(2)}),
            r"constants of 1.weight have shape \(2,\); it must be \(2, 2\)",
        ),
        (lambda m: filter_thresholds(m, {"1.weight": torch.zeros(2)}), r"thresholds names \['0.weight'\] do not"),
        (
            lambda m: filter_thresholds(m, middle(m) | {"1.weight": torch.zeros(1)}),
            r"thresholds of 1.weight have shape \(1,\); it must be \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(enter, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = description(model)
    with pytest.raises(ValueError, match=message), enter(model):
        pass
    assert description(model) == before


def test_global_generators_are_left_alone():
    model, before = network(), torch.get_rng_state().tolist()
    for enter in CONTEXTS.values():
        with enter(model):
            model(drawn(2, 1, 8, 8)).sum().backward()
    assert torch.get_rng_state().tolist() == before


# ---- powerpropagation ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0001, 1.25, 2.0, 3.5])
def test_the_power_and_its_gradient_by_hand(beta):
    w = torch.tensor([[-2.0, -0.5, -1e-10, 0.0], [-0.0, 1e-10, 0.25, 3.0]])
    layer, upper = linear(w), drawn(2, 4)
    with power_propagation(layer, beta):
        v = layer.weight
        v.backward(upper)
    exact = w.double()
    torch.testing.assert_close(v.double(), exact.sign() * exact.abs() ** beta, rtol=1e-5, atol=0)
    wanted = torch.where(exact == 0, 0.0, beta * exact.abs() ** (beta - 1)) * upper
    torch.testing.assert_close(layer.weight.grad.double(), wanted, rtol=1e-5, atol=0)
    assert (layer.weight.grad[w == 0] == 0).all()


def test_a_power_of_one_changes_no_bit_of_a_training():
    ours, plain = network(), network()
    with (
        power_propagation(ours, 1),
        top_weights(ours, 1.0),
        sparse_activations(ours, dict.fromkeys(originals(ours), 1)),
    ):
        assert not any(hasattr(m, "parametrizations") or "forward" in vars(m) for m in ours.modules())
        loss = fit(ours)
    assert loss == fit(plain)
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


def test_a_power_for_each_layer():
    model = network()
    betas = {name: 1 + 0.5 * i for i, name in enumerate(Layout.of(model).prunable)}
    with power_propagation(model, betas):
        for (name, w), layer in zip(originals(model).items(), (model[0], model[3], model[8], model[10]), strict=True):
            assert torch.equal(layer.weight, power(w, betas[name]))


@pytest.mark.parametrize("beta", [1.0, 1.25, 2.0, 4.0])
def test_the_inverse_power_gives_weights_whose_power_is_wanted(beta):
    wanted = torch.cat([drawn(1000) * 0.05, torch.tensor([0.0, 1.0, -1.0, 1e-12])])
    torch.testing.assert_close(power(inverse_power(wanted, beta), beta), wanted, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"beta is 0\.0; it is a finite number of at least 1"):
        inverse_power(wanted, 0.0)


def test_spectral_exponents_by_hand():
    """|W| = [[3, 0], [1, 0]]: v = (1, 0), |W|v = (3, 1), sigma = sqrt(10), mean = 1."""
    assert spectral_exponent(torch.tensor([[-3.0, 0.0], [1.0, 0.0]])) == pytest.approx(1 + 10**-0.5, rel=1e-12)
    assert spectral_exponent(torch.zeros(2, 2)) == 1.0


def test_spectral_exponents_are_near_those_of_the_exact_norm():
    model = network("resnet20")
    exponents = {name: spectral_exponent(w) for name, w in originals(model).items()}
    assert tuple(exponents) == Layout.of(model).prunable
    for name, w in originals(model).items():
        sigma = torch.linalg.matrix_norm(w.abs().flatten(1), 2).item()
        exact = w.abs().mean().item() / sigma
        assert exact * (1 - 1e-5) <= exponents[name] - 1 <= exact * 1.01
        assert exponents[name] <= 1 + w.numel() ** -0.5 + 1e-12
    with power_propagation(model, exponents):
        assert {name: spectral_exponent(w) for name, w in originals(model).items()} == exponents


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (64, 64, 3, 3), (128, 128, 3, 3), (128, 1024), (10, 128)])
def test_a_start_with_signs_as_in_the_authors_code_gives_larger_exponents(shape):
    w, rng = drawn(*shape), np.random.default_rng(2)
    matrix, found = w.abs().double().flatten(1).numpy(), []
    for _ in range(101):
        right = matrix.T @ rng.standard_normal(shape[0])
        found.append(matrix.mean() / np.linalg.norm(matrix @ right / np.linalg.norm(right)))
    ours = spectral_exponent(w) - 1
    assert min(found) > ours
    assert 1.2 < np.median(found) / ours < 1.9


# ---- sparse activations --------------------------------------------------------------------------


def gradients(layer, a, upper):
    a = a.clone().requires_grad_()
    layer.zero_grad()
    out = layer(a)
    out.backward(upper)
    return out.detach(), a.grad, originals(layer)["weight"].grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("keep", "count"), [(0.25, 5), (0.29, 5), (0.001, 1), (0.0, 1), (0.95, 19)])
def test_a_linear_layer_learns_from_the_largest_activations_only(keep, count, bias):
    a, upper, layer = whole(4, 5), whole(4, 3, seed=2), linear(whole(3, 5, seed=3), bias)
    out, below, _, biases = gradients(layer, a, upper)
    with sparse_activations(layer, {"weight": keep}):
        sparse = gradients(layer, a, upper)
    assert torch.equal(sparse[0], out)
    assert torch.equal(sparse[1], below)
    assert torch.equal(sparse[2], upper.T @ pruned(a, count))
    assert not bias or torch.equal(sparse[3], biases)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_takes_inputs_of_any_number_of_axes(shape, bias):
    a, layer = whole(*shape), linear(whole(3, 5, seed=3), bias)
    upper = whole(*shape[:-1], 3, seed=2)
    with sparse_activations(layer, {"weight": 0.4}):
        weight = gradients(layer, a, upper)[2]
    assert torch.equal(weight, upper.reshape(-1, 3).T @ pruned(a, int(0.4 * a.numel())).reshape(-1, 5))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_a_convolution_learns_from_the_largest_activations_only(stride, padding, memory, groups):
    layer = nn.Conv2d(2, 4, 3, stride, padding, groups=groups).to(memory_format=memory)
    layer.weight.data.copy_(whole(4, 2 // groups, 3, 3))
    a = drawn(3, 2, 7, 7).to(memory_format=memory)
    upper = drawn(*layer(a).shape, seed=2)
    out, below, _, biases = gradients(layer, a, upper)
    with sparse_activations(layer, {"weight": 0.1}):
        sparse = gradients(layer, a, upper)
    for i, exact in ((0, out), (1, below), (3, biases)):
        assert torch.equal(sparse[i], exact)
    few = pruned(a, 29)  # floor(0.1 * 294)
    assert few.count_nonzero() == 29
    wanted = nn.grad.conv2d_weight(few, layer.weight.shape, upper, stride, padding, groups=groups)
    torch.testing.assert_close(sparse[2], wanted, rtol=1e-5, atol=1e-5)


def test_equal_activations_are_kept_by_index():
    layer = linear(torch.ones(1, 6))
    with sparse_activations(layer, {"weight": 0.5}):
        layer(torch.tensor([[1.0, -1.0, 2.0, 1.0, -1.0, 0.0]])).backward()
    assert layer.weight.grad.tolist() == [[1.0, -1.0, 2.0, 0.0, 0.0, 0.0]]


def test_activations_are_pruned_in_training_with_gradients_only(monkeypatch):
    layer, a = linear(whole(3, 5)), whole(4, 5, seed=2)
    asked, largest = [], reparam._largest
    monkeypatch.setattr(
        reparam, "_largest", lambda a, count: asked.append((tuple(a.shape), count)) or largest(a, count)
    )
    with sparse_activations(layer.eval(), {"weight": 0.2}):
        assert torch.equal(gradients(layer, a, torch.ones(4, 3))[2], torch.ones(3, 4) @ a)
        with torch.no_grad():
            layer.train()(a)
        layer.weight.requires_grad_(False)
        layer(a)
        assert asked == []
        layer.weight.requires_grad_(True)
        layer(a)
        assert asked == [((4, 5), 4)]


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    layer = linear(torch.ones(1, 2))
    own = layer.forward = lambda a: functional.linear(a, layer.weight) + 1
    with sparse_activations(layer, {"weight": 0.5}):
        layer(torch.tensor([[1.0, 2.0]])).backward()
    assert layer.weight.grad.tolist() == [[0.0, 2.0]]
    assert layer.forward is own


def test_a_layer_that_saves_a_copy_of_its_input_is_refused_not_passed_over():
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    with (
        sparse_activations(layer, {"weight": 0.5}),
        pytest.raises(RuntimeError, match="weight: the layer saved another"),
    ):
        layer(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("name", ["cnn", "resnet20", "resnet18"])
def test_every_layer_of_a_network_is_pruned_and_its_loss_unchanged(name):
    """With one entry kept of its input, a layer learns the weights of one input channel at most."""
    exact, model, a, labels = network(name), network(name), drawn(2, 1, 8, 8), torch.tensor([0, 1])
    wanted = functional.cross_entropy(exact(a), labels)
    wanted.backward()
    with sparse_activations(model, dict.fromkeys(originals(model), 0.0)):
        loss = functional.cross_entropy(model(a), labels)
        loss.backward()
    assert torch.equal(loss, wanted)
    for (tensor, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if tensor in Layout.of(model).prunable:
            assert (p.grad.transpose(0, 1).flatten(1) != 0).any(dim=1).sum() <= 1
        else:
            assert torch.equal(p.grad, q.grad)


# ---- sparse weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "count"), [(0.1, 2), (0.29, 6), (0.5, 12), (0.001, 0), (0.999, 23)])
def test_the_largest_weights_are_used_and_all_get_the_gradient(density, count):
    w, upper = whole(4, 6), whole(5, 4, seed=2)  # many equal magnitudes
    layer, a = linear(w), whole(5, 6, seed=3)
    with top_weights(layer, density):
        assert torch.equal(layer.weight, pruned(w, count))
        out = layer(a)
        out.backward(upper)
    assert torch.equal(out, a @ pruned(w, count).T)
    assert torch.equal(layer.weight.grad, upper.T @ a)
    assert torch.equal(layer.weight, w)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_every_layer_keeps_its_share_and_the_dense_one_all(density):
    model = network()
    with top_weights(model, density, dense=["0.weight"]):
        for name, w in originals(model).items():
            v = model.get_submodule(name.removesuffix(".weight")).weight
            assert torch.equal(v, w if name == "0.weight" else pruned(w, int(density * w.numel())))


def test_a_weight_comes_back_when_it_has_grown():
    layer = linear(torch.tensor([[1.0, 0.5]]))
    with top_weights(layer, 0.5):
        assert layer.weight.tolist() == [[1.0, 0.0]]
        originals(layer)["weight"].data[0, 1] = -2.0
        assert layer.weight.tolist() == [[0.0, -2.0]]


def test_activations_and_weights_and_powers_together_by_hand():
    """dL/dw = beta |w|^(beta-1) * (upper' pruned(a)), and the layer below sees the pruned power of w."""
    w, a, upper = whole(3, 5) / 4, whole(4, 5, seed=2), whole(4, 3, seed=3)
    layer = linear(w)
    with power_propagation(layer, 2.0), top_weights(layer, 0.4), sparse_activations(layer, {"weight": 0.3}):
        out, below, _, _ = gradients(layer, a, upper)
    v = pruned(w.sign() * w**2, 6)
    assert torch.equal(out, a @ v.T)
    assert torch.equal(below, upper @ v)
    assert torch.equal(layer.weight.grad, 2 * w.abs() * (upper.T @ pruned(a, 6)))


# ---- random masks --------------------------------------------------------------------------------


def test_random_masks_and_the_gradient_of_the_scores_by_hand():
    scores, constant, a, upper = drawn(3, 5), drawn(3, 5, seed=2), drawn(4, 5, seed=3), drawn(4, 3, seed=4)
    layer = linear(scores, bias=True)
    with bernoulli_weights(layer, torch_generator(1, "mask"), constants={"weight": constant}):
        out = layer(a)
        out.backward(upper)
    theta = torch.sigmoid(scores)
    mask = torch.rand(3, 5, generator=torch_generator(1, "mask")) < theta
    assert 0 < mask.sum() < 15
    assert torch.equal(out, functional.linear(a, constant * mask, layer.bias))
    torch.testing.assert_close(layer.weight.grad, theta * (1 - theta) * constant * (upper.T @ a))
    assert layer.bias.grad is None


def test_a_generator_that_is_elsewhere_is_refused():
    layer, elsewhere = linear(drawn(3, 5)), SimpleNamespace(device=torch.device("cuda"))
    entered = bernoulli_weights(layer, elsewhere, constants={"weight": drawn(3, 5)})
    with pytest.raises(ValueError, match=r"^generator is on cuda; it must be on cpu$"), entered:
        pass


def test_masks_are_drawn_anew_in_every_pass_and_have_the_law_of_the_scores():
    theta = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]])
    layer = linear(torch.logit(theta))
    with bernoulli_weights(layer, torch_generator(1, "mask"), constants={"weight": torch.full((1, 5), -2.0)}):
        seen = torch.cat([layer.weight.detach() for _ in range(2000)])
    assert set(seen.unique().tolist()) == {-2.0, 0.0}
    mean = (seen / -2).mean(dim=0)
    assert mean[0] == 0
    assert mean[4] == 1
    torch.testing.assert_close(mean, theta[0], rtol=0, atol=5 * (0.25 / 2000) ** 0.5)


def test_entering_draws_nothing_and_one_pass_draws_once_a_weight():
    model = network()
    generator, other = torch_generator(1, "mask"), torch_generator(1, "mask")
    with bernoulli_weights(model, generator, constants=ones(model)):
        assert torch.equal(generator.get_state(), other.get_state())
        model(drawn(2, 1, 8, 8))
    for w in originals(model).values():
        torch.rand(w.shape, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_only_scores_are_trainable_inside():
    model = network()
    model[8].bias.requires_grad_(False)
    names = [name.replace("weight", "parametrizations.weight.original") for name in Layout.of(model).prunable]
    with bernoulli_weights(model, torch.Generator(), constants=ones(model)):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["8.bias"]


# ---- thresholds of filters -----------------------------------------------------------------------


def test_filters_below_their_threshold_do_not_compute_and_gradients_go_straight_through_the_step():
    """Means of |w| are 2, 1 and 1; thresholds 1, 1 and -1: at its threshold a filter is dead, below 0 none is."""
    w, tau = torch.tensor([[3.0, -1.0], [0.5, 1.5], [-1.0, -1.0]]), torch.tensor([1.0, 1.0, -1.0])
    a, upper, layer = whole(4, 2), whole(4, 3, seed=2), linear(w)
    with filter_thresholds(layer, {"weight": tau}) as trained:
        assert layer.weight.tolist() == [[3.0, -1.0], [0.0, 0.0], [-1.0, -1.0]]
        layer(a).backward(upper)
        slope = trained["weight"].grad
        assert any(p is trained["weight"] for p in layer.parameters())
    dv = upper.T @ a
    s = (w * dv).sum(dim=1)
    assert torch.equal(slope, -s)
    assert torch.equal(layer.weight.grad, torch.tensor([[1.0], [0.0], [1.0]]) * dv + w.sign() * (s / 2)[:, None])
    assert torch.equal(trained["weight"], tau)
    assert trained["weight"] is not tau
    assert alive_filters(layer.weight, tau).tolist() == [True, False, True]


def test_a_filter_of_a_convolution_is_all_that_makes_a_channel():
    model = network()
    thresholds = middle(model)
    with filter_thresholds(model, thresholds):
        for (name, w), layer in zip(originals(model).items(), (model[0], model[3], model[8], model[10]), strict=True):
            alive = alive_filters(w, thresholds[name])
            assert 0 < alive.sum() < w.shape[0]
            assert torch.equal(layer.weight[alive], w[alive])
            assert not layer.weight[~alive].any()


def test_trained_thresholds_are_yielded_and_those_given_stay():
    model = network()
    given = middle(model)
    before = {name: tensor.clone() for name, tensor in given.items()}
    with filter_thresholds(model, given) as trained:
        fit(model)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())
    assert all(not torch.equal(trained[name], tensor) for name, tensor in before.items())
