"""A step of DP-SGD: one gradient a sample, masked before it is clipped; noise on what is alive, and nowhere else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ssfl_app.data.dataset import Samples
from ssfl_app.data.transform import AsTheyAre
from ssfl_app.options import ConfigError
from ssfl_app.privacy.record import PrivateSteps, Sampling
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training import private_step
from ssfl_app.training.models import ModelOptions, create, outline
from ssfl_app.training.private_step import PrivateStep, check_private
from ssfl_app.training.step import LocalOptions
from ssfl_app.training.tasks import Regression
from ssfl_app.training.trainer import LocalTrainer

CPU = torch.device("cpu")
PLAIN = LocalOptions(epochs=1, batch_size=4, lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.0)


def linear(inputs=3, outputs=2, value=0.0):
    model = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model.train()


def private(clip=1.0, noise=0.0, samples=8, batch=4, steps=1, seed=1):
    """Return what a round is made with; its randomness has a seed here, and nowhere else."""
    of_noise, of_batches = (torch.Generator().manual_seed(seed + k) for k in range(2))
    return PrivateSteps(clip, noise, Sampling(samples, batch, steps), of_noise, of_batches)


def squared_error(output, target):
    return functional.mse_loss(output, target)


def only(layout, *alive):
    """Return the mask of the weights at these places of the prunable vector."""
    bits = np.zeros(layout.prunable_size, dtype=bool)
    bits[list(alive)] = True
    return Mask(layout, bits)


def moved(model, inputs, targets, *, mask=None, how=None, options=PLAIN, loss=squared_error, **special):
    """Return by how much a step at rate 1 moves each parameter against its sign: its gradient."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    PrivateStep(model, options, 1.0, mask, how or private(), loss=loss, **special)(inputs, targets)
    return {name: before[name] - weight.detach() for name, weight in model.named_parameters()}


def test_gradients_of_a_linear_model_are_those_by_hand():
    """Of |Wx + b - y|^2 / 2 outputs at W = b = 0: the gradient of a sample is -y x', and -y."""
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    y = torch.tensor([[0.5, 0.0], [4.0, -3.0]])
    found = moved(linear(), x, y, how=private(clip=1.0))
    summed = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    for inputs, target in zip(x, y, strict=True):
        weight, bias = -torch.outer(target, inputs), -target
        length = float(torch.sqrt(weight.square().sum() + bias.square().sum()))
        factor = min(1.0, 1.0 / length)
        summed["weight"] += factor * weight
        summed["bias"] += factor * bias
    for name, total in summed.items():
        torch.testing.assert_close(found[name], total / 4, rtol=1e-5, atol=1e-6)  # the expected batch, not 2


def test_each_sample_of_a_resnet_has_the_gradient_that_it_has_alone():
    model = create(ModelOptions("resnet20", width=0.25), (1, 8, 8), 3, 1).train()
    inputs, targets = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    step = PrivateStep(model, PLAIN, 1.0, None, private(clip=1e9), loss=functional.cross_entropy)
    step._add(inputs, targets)
    together = {name: weight.grad_sample.clone() for name, weight in model.named_parameters()}
    for one in range(3):
        loss = functional.cross_entropy(model(inputs[one : one + 1]), targets[one : one + 1])
        alone = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), alone, strict=True):
            torch.testing.assert_close(together[name][one], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_are_masked_before_they_are_clipped():
    """The dead weight's slope is 1000 times the alive one's: clipped first, nothing of that would be left."""
    model = nn.Linear(2, 1, bias=False).train()
    nn.init.zeros_(model.weight)
    layout = Layout.of(model)
    found = moved(
        model,
        torch.tensor([[1000.0, 1.0]]),
        torch.tensor([[-0.25]]),
        mask=only(layout, 1),
        how=private(clip=1.0, batch=1),
    )
    assert float(found["weight"][0, 1]) == pytest.approx(0.5)  # 2 * 0.25, shorter than C as it is
    assert float(found["weight"][0, 0]) == 0


@given(
    st.integers(1, 6),
    st.floats(0.01, 10),
    st.floats(0.1, 1e4),
    st.integers(0, 10**6),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_record_moves_the_sum_by_at_most_the_clip(others, clip, scale, seed, masked):
    """Sensitivity: two batches of which one has a record more, however odd that is."""
    rng = torch.Generator().manual_seed(seed)
    x, y = scale * torch.randn(others + 1, 3, generator=rng), torch.randn(others + 1, 2, generator=rng)
    if seed % 5 == 0:
        x[-1, 0] = float("inf")
    if seed % 7 == 0:
        y[-1, 0] = float("nan")
    model = linear(value=0.1)
    mask = only(Layout.of(model), 0, 4) if masked else None
    sums = []
    for count in (others, others + 1):
        model = linear(value=0.1)
        step = PrivateStep(model, PLAIN, 1.0, mask, private(clip=clip), loss=squared_error)
        step._add(x[:count], y[:count])
        sums.append(torch.cat([weight.summed_grad.flatten() for weight in model.parameters()]).double())
    assert float((sums[1] - sums[0]).norm()) <= clip * (1 + 1e-5) + 1e-5


def test_noise_has_its_scale_on_what_is_alive_and_dead_weights_stay_0():
    """Standard deviation z C / expected batch, within 5 of its own standard errors; an empty batch gets it too."""
    model = linear(200, 100)
    layout = Layout.of(model)
    mask = Mask.random(layout, 0.5, np.random.default_rng(1))
    alive = mask.tensors()["weight"]
    found = moved(
        model, torch.zeros(0, 200), torch.zeros(0, 100), mask=mask, how=private(clip=0.5, noise=3.0, batch=8)
    )
    assert (model.weight.detach()[~alive] == 0).all()
    noise = torch.cat([found["weight"][alive], found["bias"]]).double()
    wanted, count = 3.0 * 0.5 / 8, len(noise)
    assert count == 10_100
    assert abs(float(noise.std()) / wanted - 1) < 5 / np.sqrt(2 * count)
    assert abs(float(noise.mean())) < 5 * wanted / np.sqrt(count)
    assert abs(float((noise.abs() < wanted).double().mean()) - 0.6827) < 5 * np.sqrt(
        0.6827 * 0.3173 / count
    )  # normal


def test_the_expected_batch_divides_whatever_came():
    one = moved(linear(), torch.ones(1, 3), torch.ones(1, 2), how=private(clip=0.1, batch=4))
    three = moved(linear(), torch.ones(3, 3), torch.ones(3, 2), how=private(clip=0.1, batch=4))
    torch.testing.assert_close(three["weight"], 3 * one["weight"])


def test_a_batch_summed_in_parts_is_the_same(monkeypatch):
    x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), torch.ones(7, 2)
    whole = moved(linear(value=0.2), x, y, how=private(clip=0.3))
    monkeypatch.setattr(private_step, "MOST_VALUES", 24)  # three samples of eight weights
    parts = moved(linear(value=0.2), x, y, how=private(clip=0.3))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_a_penalty_is_added_after_clipping_and_divided_by_nothing():
    model = linear(value=0.5)
    found = moved(
        model, torch.zeros(0, 3), torch.zeros(0, 2), penalty=lambda m: sum(p.square().sum() for p in m.parameters())
    )
    torch.testing.assert_close(found["weight"], torch.full((2, 3), 1.0))


def test_a_loss_of_features_is_refused():
    with pytest.raises(ValueError, match="feature_loss is given"):
        moved(linear(), torch.zeros(1, 3), torch.zeros(1, 2), feature_loss=lambda inputs, features: features.sum())


def fit(how, data, rng=1, **options):
    trainer = LocalTrainer(
        LocalOptions(epochs=1, batch_size=4, clip=0.0, **options), AsTheyAre(), CPU, task=Regression()
    )
    model = linear()
    loss = trainer.fit(model, data, np.random.default_rng(rng), lr=0.1, private=how)
    return model, loss, trainer


def records(count=40):
    rng = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 3, generator=rng)
    return Samples(inputs, inputs @ torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))


def test_batches_are_poisson_and_passes_say_what_was_expected(monkeypatch):
    seen = []
    monkeypatch.setattr(
        PrivateStep,
        "__call__",
        lambda self, inputs, targets: seen.append(len(targets)),
    )
    _, _, trainer = fit(private(samples=40, batch=4, steps=500), records())
    assert len(seen) == 500
    assert 0 in seen  # (1 - 0.1)^40 is 1.5 %
    mean, spread = np.mean(seen), np.var(seen)
    assert abs(mean - 4) < 5 * np.sqrt(3.6 / 500)  # binomial: 40 times 0.1, variance 3.6
    assert abs(spread / 3.6 - 1) < 0.35
    assert trainer.passes == 2000  # not how many came: that is no one's to know


def test_the_loop_learns_leaves_no_trace_and_knows_no_loss_without_a_sample():
    model, loss, _ = fit(private(clip=2.0, noise=0.2, samples=40, batch=20, steps=60), records())
    untrained = linear()
    data = records()
    error = [float(functional.mse_loss(m(data.inputs), data.targets).detach()) for m in (untrained, model)]
    assert error[1] < 0.3 * error[0]
    assert loss > 0
    assert all(getattr(weight, "grad_sample", None) is None for weight in model.parameters())
    # With this seed nobody is drawn.
    few = Samples(torch.zeros(40, 3), torch.zeros(40, 2))
    assert np.isnan(fit(private(samples=40, batch=1, steps=1, seed=4), few)[1])


def test_steps_for_another_number_of_samples_are_refused():
    with pytest.raises(ValueError, match="data has 40 samples; the private steps are for 39"):
        fit(private(samples=39), records())


@pytest.mark.parametrize(("norm", "fault"), [("group", None), ("none", None), ("batch", "model.norm is 'batch'")])
def test_a_norm_that_mixes_samples_is_refused(norm, fault):
    model = outline(ModelOptions("cnn", norm), (1, 8, 8), 3)
    if fault is None:
        check_private(model, "cnn", norm, builtin=True)
        return
    with pytest.raises(ConfigError, match=fault):
        check_private(model, "cnn", norm, builtin=True)


def test_a_model_of_ones_own_that_opacus_refuses_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"model\.name is 'mine:net'; with privacy\.level 'record' Opacus refuses it: Ba"
    ):
        check_private(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "mine:net", "group", builtin=False)
