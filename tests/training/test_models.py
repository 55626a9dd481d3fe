"""Models: their sizes by hand, weights that depend on the seed alone, and images of every size."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from ssfl_app.data.dataset import Samples
from ssfl_app.data.transform import Transform
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout, state_of
from ssfl_app.training.models import (
    NORMS,
    REGISTRY,
    ModelOptions,
    create,
    fewest,
    norm_layer,
    outline,
    parameters,
    scaled,
    width_for,
)
from ssfl_app.training.trainer import LocalOptions, LocalTrainer

IMAGES = [name for name in REGISTRY if name != "transformer"]
CIFAR = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


def skeleton(name, norm="group", channels=3, classes=10):
    """The model without numbers: shapes only."""
    with torch.device("meta"):
        return REGISTRY[name]((channels, 8, 8), classes, norm)


def count(model):
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
    assert count(model) == total
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
    assert count(model) == Layout.of(model).prunable_size + 10
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.06)


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
        assert count(model) == convolutions + norms + 64 * 10 + 10
        assert Layout.of(model).prunable_size == convolutions + 64 * 10
    digits = len(millions.partition(".")[2])
    assert f"{count(model) / 1e6:.{digits}f}" == millions


def test_resnet20_by_number():
    assert count(skeleton("resnet20", "batch")) == 269_722  # as counted in public reimplementations


def test_the_cnn_by_hand():
    convolutions, linear = 9 * 3 * 32 + 9 * 32 * 64, 1024 * 128 + 128 * 10
    for norm, extra in (("none", 0), ("group", 192), ("batch", 192)):
        model = skeleton("cnn", norm)
        assert Layout.of(model).prunable_size == convolutions + linear
        assert count(model) == convolutions + linear + 138 + extra


@pytest.mark.parametrize(
    ("norm", "kind", "others"),
    [
        ("group", nn.GroupNorm, (nn.BatchNorm2d,)),
        ("batch", nn.BatchNorm2d, (nn.GroupNorm,)),
        ("none", nn.Identity, (nn.GroupNorm, nn.BatchNorm2d)),
    ],
)
@pytest.mark.parametrize("name", IMAGES)
def test_every_model_has_the_norm_that_was_asked_for(name, norm, kind, others):
    modules = list(skeleton(name, norm).modules())
    assert any(isinstance(module, kind) for module in modules)
    assert not any(isinstance(module, others) for module in modules)


def test_groups_are_32_and_two_channels_each_in_narrow_layers():
    norms = [norm_layer("group")(channels) for channels in (2, 16, 32, 64, 66, 100, 512, 2048)]
    assert [norm.num_groups for norm in norms] == [1, 8, 16, 32, 22, 25, 32, 32]


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
@pytest.mark.parametrize("name", IMAGES)
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


@pytest.mark.parametrize(
    ("name", "side"),
    [("cnn", 1), ("conv4", 8), ("resnet18", 8), ("resnet50", 8), *((f"resnet{d}", 4) for d in (20, 32, 44, 56, 110))],
)
def test_how_many_images_a_batch_needs_under_batchnorm(name, side):
    """Two where its last norm sees one pixel an image: by hand, up to this side of an image."""
    for pixels, images in ((side, 2), (side + 1, 1)):
        for shape in ((1, pixels, 1), (1, 1, pixels)):
            assert fewest(ModelOptions(name, "batch"), shape) == images
            assert fewest(ModelOptions(name, "group"), shape) == 1


def hand_count(name, norm, w):
    """Parameters of a model for 3 x 32 x 32 and 10 classes whose layers have the channels `w`."""
    pairs = list(zip((3, *w), w, strict=False))
    if name == "conv4":
        return 9 * sum(a * b for a, b in pairs) + 2 * sum(w) * norm + 4 * w[-1] * 10 + 10
    first, second, hidden = w
    return (
        9 * (3 * first + first * second) + 2 * (first + second) * norm + (16 * second + 1) * hidden + 10 * hidden + 10
    )


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("conv4", 1.0, (32, 64, 128, 128)),
        ("conv4", 0.5, (16, 32, 64, 64)),
        ("conv4", 0.2, (6, 12, 26, 26)),
        ("conv4", 1.5, (48, 96, 192, 192)),
        ("cnn", 1.0, (32, 64, 128)),
        ("cnn", 0.25, (8, 16, 32)),
        ("cnn", 0.22, (8, 14, 28)),
    ],
)
def test_small_models_of_every_width_by_hand(name, width, channels):
    for norm, factor in (("group", 1), ("batch", 1), ("none", 0)):
        assert parameters(ModelOptions(name, norm, width), (3, 32, 32), 10) == hand_count(name, factor, channels)


def test_conv4_has_246_314_parameters():
    assert parameters(ModelOptions("conv4"), (3, 32, 32), 10) == 246_314


@pytest.mark.parametrize("width", [0.5, 0.25])
def test_a_narrow_resnet20_by_hand(width):
    one, two, three = (int(width * planes) for planes in (16, 32, 64))
    convolutions = 3 * one + 6 * one**2 + one * two + 5 * two**2 + two * three + 5 * three**2
    norms = 2 * (7 * one + 6 * two + 6 * three)
    assert parameters(ModelOptions("resnet20", width=width), (3, 32, 32), 10) == 9 * convolutions + norms + 10 * (
        three + 1
    )


def test_a_resnet18_of_half_the_width_by_hand():
    stages = ((32, 32), (32, 64), (64, 128), (128, 256))  # the channels that come in, and those of all convolutions
    convolutions = 9 * 3 * 32 + sum(9 * (a * b + 3 * b * b) + a * b * (a != b) for a, b in stages)
    norms = 2 * (32 + sum(4 * b + b * (a != b) for a, b in stages))
    assert parameters(ModelOptions("resnet18", width=0.5), (3, 32, 32), 10) == convolutions + norms + 257 * 10


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_at_full_width_the_stages_are_torchvisions(name):
    from torchvision.models import resnet

    with torch.device("meta"):
        theirs = getattr(resnet, name)(norm_layer=norm_layer("group"))
    shapes = [{k: w.shape for k, w in net.state_dict().items() if k[0] == "l"} for net in (theirs, skeleton(name))]
    assert shapes[0] == shapes[1]
    assert [k for k, _ in skeleton(name).named_children()] == [k for k, _ in theirs.named_children()]


@pytest.mark.parametrize("width", [0.5, 0.25])
@pytest.mark.parametrize("name", IMAGES)
def test_models_of_every_width_train(name, width):
    rng = np.random.default_rng(1)
    inputs = torch.from_numpy(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    data = Samples(inputs, torch.tensor([0, 1, 2, 0]))
    model = create(ModelOptions(name, width=width), (3, 8, 8), 3, seed=1)
    before = state_of(create(ModelOptions(name, width=width), (3, 8, 8), 3, seed=1))
    images = Transform((0.5,) * 3, (0.25,) * 3, "none")
    loss = LocalTrainer(LocalOptions(epochs=1, batch_size=4), images, torch.device("cpu")).fit(
        model, data, rng, lr=0.1
    )
    assert math.isfinite(loss)
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())
    assert not any(torch.equal(tensor, before[weight]) for weight, tensor in state_of(model).items())


def test_channels_are_near_the_width_and_groups_divide_them():
    for channels, times in ((16, 1), (64, 1), (512, 1), (64, 4), (512, 4)):
        found = [scaled(channels, width / 100, times) for width in range(1, 201)]
        assert found == sorted(found)
        assert found[99] == channels
        for width, number in enumerate(found, 1):
            assert abs(number - channels * width / 100) <= max(2, channels * width / 700)
            for planes in (number, number * times):
                norm_layer("group")(planes)  # says so if they do not


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet20"])
def test_the_width_for_a_number_of_parameters(name):
    options = ModelOptions(name)
    whole = parameters(options, (3, 32, 32), 10)
    for density in (0.05, 0.1, 0.2, 0.5):
        width = width_for(options, (3, 32, 32), 10, round(density * whole))
        near = [
            parameters(ModelOptions(name, width=other), (3, 32, 32), 10)
            for other in (width - 0.1, width, width + 0.1)
        ]
        assert near[0] < density * whole < near[2]
        assert near[1] == pytest.approx(density * whole, rel=0.08)
    ends = [width_for(options, (3, 32, 32), 10, count) for count in (1, 10 * whole)]
    assert parameters(ModelOptions(name, width=ends[0]), (3, 32, 32), 10) < whole / 500
    assert parameters(ModelOptions(name, width=ends[1]), (3, 32, 32), 10) == whole


def test_the_width_that_docs_compare_names():
    assert width_for(ModelOptions("conv4"), (3, 32, 32), 10, 12_994) == 0.219
    assert parameters(ModelOptions("conv4", width=0.219), (3, 32, 32), 10) == 13_094


def test_options_of_the_transformer_are_its_own():
    options = {"depth": 1, "heads": 2, "tied": True}
    small = outline(ModelOptions("transformer", width=0.5, options=options), (16,), 50)
    assert count(small) == (50 + 16) * 32 + 12 * 32**2 + 13 * 32 + 2 * 32
    with pytest.raises(ConfigError, match=r"model.options.rank is 4; transformer is built in: .* depth, heads, tied"):
        outline(ModelOptions("transformer", options={"rank": 4}), (16,), 50)
    with pytest.raises(ConfigError, match=r"model.options.depth is 2; cnn is built in: .* for a model of your own"):
        outline(ModelOptions("cnn", options={"depth": 2}), (1, 8, 8), 10)
    with pytest.raises(ConfigError, match=r"this model takes sequences of tokens"):
        outline(ModelOptions("transformer"), (1, 8, 8), 10)
    with pytest.raises(ConfigError, match=r"model.norm is 'batch'; it is 'group'"):
        outline(ModelOptions("transformer", "batch"), (16,), 10)
    with pytest.raises(ConfigError, match=r"0 channels do not divide into 0 heads"):
        outline(ModelOptions("transformer", options={"heads": 0}), (16,), 10)
    assert outline(ModelOptions("transformer", options={"heads": 3}), (16,), 10).tokens.weight.shape == (10, 63)
    assert width_for(ModelOptions("transformer"), (16,), 10, 30_000) < 1


def test_width_is_for_built_in_models():
    with pytest.raises(ConfigError, match=r"model.width is 0.5; it is for built-in models, .* has model.options"):
        outline(ModelOptions("torch.nn:Linear", width=0.5), (8,), 2)
