"""The training loop: what it does to weights, to the dead ones above all, and to nothing else."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ssfl_app.data.dataset import Samples, Transform
from ssfl_app.privacy.record import PrivateSteps, Sampling
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.models import ModelOptions, create
from ssfl_app.training.step import with_features
from ssfl_app.training.trainer import EVALUATION_BATCH, LocalOptions, LocalTrainer

PLAIN = {
    "epochs": 2, "batch_size": 8, "lr": 0.1, "lr_decay": 0.998, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0,
}  # fmt: skip
HARD = {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}


CPU = torch.device("cpu")


def trainer(augment="none", **changes):
    return LocalTrainer(LocalOptions(**PLAIN | changes), Transform((0.5,), (0.25,), augment), torch.device("cpu"))


def images(count=20, side=8, classes=3, seed=1):
    """Noise around one pattern for each class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 128, size=(classes, 1, side, side))[labels] + rng.integers(0, 64, (count, 1, side, side))
    return Samples(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))


def network(norm="group"):
    return create(ModelOptions("cnn", norm), (1, 8, 8), 3, seed=1)


def half(model):
    layout = Layout.of(model)
    return Mask.random(layout, 0.3, np.random.default_rng(1))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_last_batch_that_a_norm_cannot_take_joins_the_one_before():
    sizes, size = [], 4

    def fit(count, fewest):
        run = LocalTrainer(
            LocalOptions(**PLAIN | {"batch_size": size}), Transform((0.5,), (0.25,), "none"), CPU, fewest=fewest
        )
        model = network("batch")
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        run.fit(model, images(count, side=1), np.random.default_rng(1), lr=0.1, epochs=1)
        seen = sizes.copy()
        sizes.clear()
        return seen, run.passes

    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fit(9, fewest=1)
    sizes.clear()
    assert fit(9, fewest=2) == ([4, 5], 9)
    assert fit(10, fewest=2) == ([4, 4, 2], 10)
    assert fit(8, fewest=2) == ([4, 4], 8)
    assert fit(3, fewest=2) == ([3], 3)


def test_dead_weights_are_zero_after_every_step_and_alive_ones_move():
    model = network()
    mask, before = half(model), bits(model)
    alive = mask.tensors()
    looks = []

    def look(model):
        named = dict(model.named_parameters())
        looks.append(all((named[name][~keep] == 0).all() for name, keep in alive.items()))

    trainer(**HARD).fit(model, images(), np.random.default_rng(1), lr=0.1, mask=mask, after_step=look)
    assert looks == [True] * 6
    after = bits(model)
    for name, keep in alive.items():
        assert (before[name][~keep] != 0).all()
        assert (after[name][keep] != before[name][keep]).float().mean() > 0.9
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert all(not torch.equal(after[name], before[name]) for name in after if name not in alive)


@pytest.mark.parametrize("private", [False, True])
def test_frozen_weights_keep_their_bits_through_many_steps(private):
    """Momentum, weight decay and clipping see them no more than a step does; -0.0 and NaN stay what they are."""
    model = network()
    mask = half(model)
    dead = {name: ~keep for name, keep in mask.tensors().items()}
    with torch.no_grad():
        first = dict(model.named_parameters())["0.weight"]
        first[dead["0.weight"]] = -0.0
    before = {name: tensor.clone().view(torch.int32) for name, tensor in model.state_dict().items()}
    changes = {}
    if private:
        sampling = Sampling(20, 8, 6)
        draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        changes["private"] = PrivateSteps(1.0, 0.5, sampling, *draws)
    run = trainer(**HARD | {"epochs": 10})
    run.fit(model, images(), np.random.default_rng(1), lr=0.1, mask=mask, frozen=True, **changes)
    after = {name: tensor.view(torch.int32) for name, tensor in model.state_dict().items()}
    for name, where in dead.items():
        assert torch.equal(after[name][where], before[name][where])
        assert (after[name][~where] != before[name][~where]).float().mean() > 0.9
    assert all(not torch.equal(after[name], before[name]) for name in after if name not in dead)


def test_alive_weights_train_as_if_the_frozen_ones_were_constants():
    """Beside plain torch: SGD of a parametrized model whose alive values are all that trains."""
    model, data = network("none"), images(16)
    mask, other = half(model), network("none")
    keep = mask.tensors()
    trainer(momentum=0.9, batch_size=16).fit(model, data, np.random.default_rng(1), lr=0.1, mask=mask, frozen=True)
    start = {name: weight.detach().clone() for name, weight in other.named_parameters()}
    alive = {name: nn.Parameter(w[keep[name]] if name in keep else w.clone()) for name, w in start.items()}
    stepper = torch.optim.SGD(alive.values(), 0.1, momentum=0.9)
    inputs = Transform((0.5,), (0.25,), "none").test(data.inputs)
    for _ in range(2):
        whole = {n: start[n].masked_scatter(keep[n], w) if n in keep else w for n, w in alive.items()}
        stepper.zero_grad()
        functional.cross_entropy(torch.func.functional_call(other, whole, (inputs,)), data.targets).backward()
        stepper.step()
    for name, weight in model.named_parameters():
        wanted = start[name].masked_scatter(keep[name], alive[name]) if name in keep else alive[name]
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)


def test_dead_weights_are_zero_before_the_first_step():
    model, seen = network(), []

    def penalty(model):
        seen.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        return torch.zeros(())

    mask = half(model)
    trainer().fit(model, images(), np.random.default_rng(1), lr=0.1, mask=mask, penalty=penalty)
    assert all((seen[0][name][~keep] == 0).all() for name, keep in mask.tensors().items())


def test_clipping_measures_the_gradient_of_the_alive_weights_only():
    """As if the dead weights did not exist: a network whose dead inputs are removed trains alike."""
    whole, small = (nn.Sequential(nn.Flatten(), nn.Linear(n, 3, bias=False)) for n in (4, 2))
    weight = torch.tensor([[0.5, -1.0, 2.0, 0.1], [0.3, 0.2, -0.7, 1.5], [1.0, -0.4, 0.6, -0.9]])
    whole[1].weight.data.copy_(weight)
    small[1].weight.data.copy_(weight[:, ::2])
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (9, 1, 2, 2), dtype=np.uint8))
    labels = torch.arange(9) % 3
    layout = Layout.of(whole)
    mask = Mask(layout, np.array([True, False, True, False] * 3))
    fit = trainer(**HARD | {"clip": 0.05}).fit
    fit(whole, Samples(pixels, labels), np.random.default_rng(1), lr=0.5, mask=mask)
    fit(small, Samples(pixels[..., :1], labels), np.random.default_rng(1), lr=0.5)
    torch.testing.assert_close(whole[1].weight[:, ::2], small[1].weight, rtol=1e-5, atol=1e-6)
    assert (whole[1].weight[:, 1::2] == 0).all()


def test_the_loss_falls():
    model, data, run = network(), images(60), trainer(epochs=1, **HARD | {"clip": 10.0})
    before, _ = run.evaluate(model, data)
    first, *_, last = [run.fit(model, data, np.random.default_rng(i), lr=0.02, mask=half(model)) for i in range(5)]
    after, accuracy = run.evaluate(model, data)
    assert last < first / 2
    assert after < before / 2
    assert accuracy > 0.9


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_the_same_generator_gives_the_same_bits_and_another_does_not(augment):
    results = []
    for seed in (1, 1, 2):
        model = network("batch")
        loss = trainer(augment).fit(model, images(), np.random.default_rng(seed), lr=0.1, mask=half(model))
        results.append((loss, bits(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


@pytest.mark.parametrize("hyper", [{}, HARD])
def test_without_a_mask_it_is_plain_sgd_bit_for_bit(hyper):
    ours, theirs, data = network("batch"), network("batch"), images()
    before = bits(ours)
    loss = trainer(**hyper).fit(ours, data, np.random.default_rng(7), lr=0.05)
    rng, losses = np.random.default_rng(7), []
    optimizer = torch.optim.SGD(
        theirs.parameters(),
        0.05,
        hyper.get("momentum", 0.0),
        weight_decay=hyper.get("weight_decay", 0.0),
        foreach=True,
    )
    theirs.train()
    for _ in range(2):
        order = rng.permutation(20)
        for chosen in (order[:8], order[8:16], order[16:]):
            optimizer.zero_grad()
            inputs = (data.inputs[chosen].float() / 255 - 0.5) / 0.25
            step = functional.cross_entropy(theirs(inputs), data.labels[chosen])
            step.backward()
            if hyper:
                nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            optimizer.step()
            losses += [step.item()] * len(chosen)
    assert same(bits(ours), bits(theirs))
    assert not same(bits(ours), before)
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)


def test_a_full_mask_changes_no_bit():
    masked, plain = network(), network()
    for model, mask in ((masked, Mask.dense(Layout.of(masked))), (plain, None)):
        trainer(**HARD).fit(model, images(), np.random.default_rng(1), lr=0.1, mask=mask)
    assert same(bits(masked), bits(plain))


def test_a_proximal_penalty_is_added_to_the_loss():
    """One step from w with penalty mu/2 |w - c|^2 is the plain step minus lr * mu * (w - c)."""
    start, plain, prox = network("none"), network("none"), network("none")
    centre = {name: torch.full_like(tensor, 0.25) for name, tensor in start.named_parameters()}

    def penalty(model):
        return sum(0.5 * 3.0 * (tensor - centre[name]).square().sum() for name, tensor in model.named_parameters())

    fit = trainer(epochs=1, batch_size=20).fit
    one = fit(plain, images(), np.random.default_rng(1), lr=0.1)
    other = fit(prox, images(), np.random.default_rng(1), lr=0.1, penalty=penalty)
    assert one == other  # the loss that is reported is the cross-entropy
    for (name, w), p, q in zip(start.named_parameters(), plain.parameters(), prox.parameters(), strict=True):
        torch.testing.assert_close(q, p - 0.1 * 3.0 * (w - centre[name]), rtol=1e-5, atol=1e-6)


def test_gradients_may_be_changed_between_clipping_and_the_step():
    """One clipped step with a shift of all gradients is the plain one minus lr times the shift."""
    start, plain, shifted = network("none"), network("none"), network("none")
    lengths = []

    def shift(model):
        lengths.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        for parameter in model.parameters():
            parameter.grad += 5.0

    fit = trainer(epochs=1, batch_size=20, clip=0.1).fit
    assert fit(plain, images(), np.random.default_rng(1), lr=0.1) == fit(
        shifted, images(), np.random.default_rng(1), lr=0.1, before_step=shift
    )
    assert lengths == pytest.approx([0.1], rel=1e-3)
    for w, p, q in zip(start.parameters(), plain.parameters(), shifted.parameters(), strict=True):
        assert not torch.equal(w, p)
        torch.testing.assert_close(q, p - 0.5, rtol=1e-5, atol=1e-5)


def test_a_loss_of_features_is_added_and_not_reported():
    """Features are what the last layer gets; under a term that pulls them to 0 they are shorter afterwards."""
    plain, pulled, seen = network(), network(), []

    def term(inputs, features):
        seen.append((len(inputs), tuple(features.shape)))
        return features.square().mean()

    fit = trainer(epochs=1, batch_size=8).fit
    fit(plain, images(), np.random.default_rng(1), lr=0.1)
    fit(pulled, images(), np.random.default_rng(1), lr=0.1, feature_loss=term)
    width = next(m for m in reversed(list(pulled.modules())) if isinstance(m, torch.nn.Linear)).in_features
    assert seen == [(8, (8, width)), (8, (8, width)), (4, (4, width))]
    inputs = images().inputs.float()[:8]
    assert with_features(pulled, inputs)[1].square().mean() < with_features(plain, inputs)[1].square().mean()


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "calls"), [(20, 8, 2, 6), (16, 8, 3, 6), (3, 8, 2, 2), (1, 1, 1, 1)]
)
def test_after_step_is_called_once_a_step(count, batch, epochs, calls):
    seen, model = [], network()
    run = trainer(epochs=epochs, batch_size=batch)
    run.fit(model, images(count), np.random.default_rng(1), lr=0.1, after_step=seen.append)
    assert seen == [model] * calls


def test_the_rate_falls_by_its_factor_every_round():
    options = LocalOptions(**PLAIN)
    assert [options.rate(r) for r in (1, 2, 3)] == pytest.approx([0.1, 0.0998, 0.0996004], rel=1e-12)
    assert options.rate(500) == pytest.approx(0.0368248, rel=1e-5)  # exp(-499 * 0.002002003) / 10
    assert LocalOptions(**PLAIN | {"lr_decay": 1.0}).rate(1000) == 0.1


@pytest.mark.parametrize("count", [1, EVALUATION_BATCH, 2 * EVALUATION_BATCH + 3])
def test_evaluation_by_hand(count):
    data = images(count, side=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5))
    weight, bias = np.arange(12).reshape(3, 4) % 5 - 2.0, np.array([0.5, 0.0, -0.5])
    model[1].load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    logits = (data.inputs.numpy().reshape(count, 4) / 255 - 0.5) / 0.25 @ weight.T + bias
    labels = data.labels.numpy()
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(count), labels]
    loss, accuracy = trainer("crop-flip").evaluate(model, data)
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    assert accuracy == (logits.argmax(axis=1) == labels).sum() / count


def test_evaluation_changes_no_weight_and_no_statistic():
    model = network("batch")
    before = bits(model)
    assert trainer().evaluate(model, images()) == trainer().evaluate(model, images())
    assert same(bits(model), before)


def test_global_generators_are_left_alone():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    model, before = network(), states()
    run = trainer("crop-flip", **HARD)
    run.fit(model, images(), np.random.default_rng(1), lr=0.1, mask=half(model))
    run.gradient(model, images())
    run.evaluate(model, images())
    assert states() == before


class _Spare(nn.Module):
    """Of three matrices one takes no part in the output, and one is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 3)
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)))


def test_a_matrix_that_is_frozen_or_not_seen_trains_under_a_mask():
    model = _Spare()
    mask, before = half(model), bits(model)
    trainer(clip=1.0).fit(model, images(), np.random.default_rng(1), lr=0.1, mask=mask)
    alive = mask.tensors()
    for name in ("first.weight", "spare.weight"):
        assert torch.equal(model.state_dict()[name], before[name] * alive[name])
    assert not torch.equal(model.last.weight, before["last.weight"] * alive["last.weight"])


def test_a_matrix_that_the_loss_does_not_see_has_gradient_zero():
    model = _Spare().requires_grad_(True)
    found = trainer().gradient(model, images())
    assert not found["spare.weight"].any()
    assert found["first.weight"].any()
    assert not trainer().curvature(model, images(), found)["spare.weight"].any()
