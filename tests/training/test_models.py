"""Models: their sizes by hand, weights that depend on the seed alone, and images of every size."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.training.models import NORMS, REGISTRY, SHRINKS, ModelOptions, create, fewest, norm_layer, outline

CIFAR = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


def skeleton(name, norm="group", channels=3, classes=10):
    """The model without numbers: shapes only."""
    with torch.device("meta"):
        return REGISTRY[name]((channels, 8, 8), classes, norm)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "total", "prunable"),
    [
        ("resnet18", 10, 11_173_962, 11_164_352),
        ("resnet18", 100, 11_220_132, 11_210_432),
        ("resnet18", 200, 11_271_432, 11_261_632),
        ("resnet50", 10, 23_520_842, 23_467_712),
        ("resnet50", 100, 23_705_252, 23_652_032),
    ],
)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnets_are_as_large_as_published(name, classes, total, prunable, norm):
    model = skeleton(name, norm, classes=classes)
    layout = Layout.of(model)
    assert parameters(model) == total
    assert layout.prunable_size == prunable
    # Running means and variances belong to the state, one for each norm weight and bias; counters do not.
    assert layout.size == total + (total - prunable - classes if norm == "batch" else 0)


def test_resnet18_has_62_tensors_of_four_kinds():
    layout = Layout.of(skeleton("resnet18"))
    assert len(layout.shapes) == 62
    ranks = [len(shape) for _, shape in layout.shapes]
    assert (ranks.count(4), ranks.count(2), ranks.count(1)) == (20, 1, 41)
    assert len(layout.prunable) == 21
    shapes = dict(layout.shapes)
    assert all(len(shapes[name]) >= 2 for name in layout.prunable)
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    groups = [module for module in skeleton("resnet18").modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_groups for norm in groups] == [32] * 20
    assert {norm.num_channels for norm in groups} == {64, 128, 256, 512}


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 11.17), ("resnet50", 23.52)])
def test_resnets_without_norms_have_conv_and_linear_weights_only(name, millions):
    model = skeleton(name, "none")
    assert parameters(model) == Layout.of(model).prunable_size + 10
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("name", "millions"), zip(CIFAR, ["0.27", "0.46", "0.66", "0.85", "1.7"], strict=True))
def test_cifar_resnets_are_as_large_as_those_of_he_et_al(name, millions):
    n = CIFAR[name]  # depth 6n + 2: in each stage n blocks of two 3x3 convolutions
    assert name == f"resnet{6 * n + 2}"
    convolutions = 9 * (3 * 16 + 2 * n * 16 * 16)
    convolutions += 9 * (16 * 32 + (2 * n - 1) * 32 * 32)
    convolutions += 9 * (32 * 64 + (2 * n - 1) * 64 * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    for norm in ("batch", "group"):
        model = skeleton(name, norm)
        assert parameters(model) == convolutions + norms + 64 * 10 + 10
        assert Layout.of(model).prunable_size == convolutions + 64 * 10
    digits = len(millions.partition(".")[2])
    assert f"{parameters(model) / 1e6:.{digits}f}" == millions


def test_resnet20_by_number():
    assert parameters(skeleton("resnet20", "batch")) == 269_722  # as counted in public reimplementations


def test_the_cnn_by_hand():
    convolutions, linear = 9 * 3 * 32 + 9 * 32 * 64, 1024 * 128 + 128 * 10
    for norm, extra in (("none", 0), ("group", 192), ("batch", 192)):
        model = skeleton("cnn", norm)
        assert Layout.of(model).prunable_size == convolutions + linear
        assert parameters(model) == convolutions + linear + 138 + extra


@pytest.mark.parametrize(
    ("norm", "kind", "others"),
    [
        ("group", nn.GroupNorm, (nn.BatchNorm2d,)),
        ("batch", nn.BatchNorm2d, (nn.GroupNorm,)),
        ("none", nn.Identity, (nn.GroupNorm, nn.BatchNorm2d)),
    ],
)
@pytest.mark.parametrize("name", REGISTRY)
def test_every_model_has_the_norm_that_was_asked_for(name, norm, kind, others):
    modules = list(skeleton(name, norm).modules())
    assert any(isinstance(module, kind) for module in modules)
    assert not any(isinstance(module, others) for module in modules)


def test_groups_are_32_and_two_channels_each_in_narrow_layers():
    norms = [norm_layer("group")(channels) for channels in (2, 16, 32, 64, 512)]
    assert [norm.num_groups for norm in norms] == [1, 8, 16, 32, 32]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_initial_weights_depend_on_the_seed_only(name, norm):
    torch.manual_seed(1)
    one = state_of(create(ModelOptions(name, norm), (3, 8, 8), 10, seed=5))
    torch.manual_seed(2)
    other = state_of(create(ModelOptions(name, norm), (3, 8, 8), 10, seed=5))
    third = state_of(create(ModelOptions(name, norm), (3, 8, 8), 10, seed=6))
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    drawn = [key for key, tensor in one.items() if tensor.unique().numel() > 1]
    assert len(drawn) >= 5
    assert not any(torch.equal(one[key], third[key]) for key in drawn)


def test_creating_a_model_leaves_all_global_generators_alone():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    for name in ("cnn", "resnet20", "resnet18"):
        create(ModelOptions(name, "batch"), (1, 8, 8), 2, seed=1)
    assert states() == before


@pytest.mark.parametrize("name", ["cnn", "resnet56"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_initial_weights_are_uniform_within_the_root_of_the_fan_in(name, norm):
    model = create(ModelOptions(name, norm), (3, 8, 8), 10, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for tensor in (module.weight, module.bias):
                if tensor is None:
                    continue
                scaled = tensor.detach().reshape(-1).double() / bound
                assert scaled.abs().max() <= 1 + 1e-6
                # Mean 0 and variance 1/3 of the uniform distribution, within 5 standard errors.
                assert abs(scaled.mean()) < 5 * math.sqrt(1 / 3 / scaled.numel())
                assert abs((scaled**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / scaled.numel())
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            if norm == "batch":
                assert (module.running_mean == 0).all()
                assert (module.running_var == 1).all()
                assert module.num_batches_tracked == 0


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 64)])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_model_takes_images_of_every_size(name, channels, side):
    shape = skeleton(name, channels=channels, classes=7)(torch.empty(2, channels, side, side, device="meta")).shape
    assert shape == (2, 7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_outputs_and_gradients_are_finite_numbers(name, norm):
    model = create(ModelOptions(name, norm), (1, 8, 8), 10, seed=1)
    logits = model(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    logits.square().sum().backward()
    assert logits.shape == (4, 10)
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_shortcut_of_cifar_resnets_is_every_second_pixel_with_zero_channels_around():
    model = create(ModelOptions("resnet20", "none"), (3, 8, 8), 10, seed=1)
    pads = [module for module in model.modules() if type(module).__name__ == "_PadShortcut"]
    assert len(pads) == 2
    x = torch.arange(2 * 16 * 4 * 6.0).view(2, 16, 4, 6)
    got = pads[0](x)
    assert got.shape == (2, 32, 2, 3)
    assert torch.equal(got[:, 8:24], x[:, :, [0, 2]][..., [0, 2, 4]])
    assert (got[:, :8] == 0).all()
    assert (got[:, 24:] == 0).all()
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in model.modules())


@pytest.mark.parametrize("name", REGISTRY)
def test_the_smallest_map_of_a_norm_is_known(name):
    """By a forward pass that computes nothing: one pixel up to that side, more beyond."""
    options, pixels = ModelOptions(name, "batch"), []
    model = outline(options, (1, 8, 8), 10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0][0, 0].numel()))
    for side in (SHRINKS[name], SHRINKS[name] + 1):
        pixels.clear()
        model(torch.empty(2, 1, side, 1, device="meta"))
        assert (1 in pixels) == (side == SHRINKS[name])
        assert fewest(options, (1, side, 1)) == fewest(options, (1, 1, side)) == (2 if 1 in pixels else 1)
        assert fewest(ModelOptions(name, "group"), (1, side, 1)) == 1
