"""Which channels of a model are inner: by hand for the built-in ones, in series, and what a model says itself."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ssfl_app.options import ConfigError
from ssfl_app.sparsity.inner import InnerChannels, inner_of
from ssfl_app.training.models import ModelOptions, outline


def found(model: nn.Module) -> list[tuple[str, int, int]]:
    return [(inner.name, inner.size, inner.together) for inner in inner_of(model)]


def built_in(name: str, norm: str = "group") -> nn.Module:
    return outline(ModelOptions(name=name, norm=norm), (3, 8, 8), 10)


def test_the_cnn_has_two_convolutions_and_a_hidden_layer_in_series() -> None:
    assert found(built_in("cnn")) == [("0", 32, 2), ("3", 64, 2), ("8", 128, 1)]
    first, second, hidden = inner_of(built_in("cnn"))
    assert dict(first.pairs) == {"0.weight": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1}
    # The linear layer reads 16 pixels of each channel.
    assert dict(second.pairs) == {"3.weight": 0, "4.weight": 0, "4.bias": 0, "8.weight": 1}
    assert dict(hidden.pairs) == {"8.weight": 0, "8.bias": 0, "10.weight": 1}
    assert [size for _, size, _ in found(built_in("conv4"))] == [32, 64, 128, 128]


def test_channels_go_by_groups_under_groupnorm_and_one_by_one_without() -> None:
    assert [each[2] for each in found(built_in("conv4"))] == [2, 2, 4, 4]
    assert {each[2] for norm in ("batch", "none") for each in found(built_in("conv4", norm))} == {1}


def test_residual_blocks_give_all_but_their_last_convolution_and_no_stem() -> None:
    assert [each[:2] for each in found(built_in("resnet18"))] == [
        (f"layer{stage}.{block}.conv1", 32 * 2**stage) for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert [each[:2] for each in found(built_in("resnet20"))] == [
        (f"{3 + block}.conv1", 16 * 2 ** (block // 3)) for block in range(9)
    ]
    bottlenecks = found(built_in("resnet50"))
    assert len(bottlenecks) == 32
    assert [each[:2] for each in bottlenecks[-2:]] == [("layer4.2.conv1", 512), ("layer4.2.conv2", 512)]
    assert [len(found(built_in(f"resnet{depth}"))) for depth in (32, 44, 56, 110)] == [15, 21, 27, 54]
    running = dict(inner_of(built_in("resnet18", "batch"))[0].pairs)
    assert {name for name in running if "running" in name} == {f"layer1.0.bn1.running_{n}" for n in ("mean", "var")}


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


ONE = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)], ["0", "2"]),
        ([nn.Linear(3, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 5)), nn.Linear(5, 1)], ["0", "1.1"]),
        ([nn.Linear(3, 4), Doubled(), nn.Linear(4, 5)], []),  # nobody knows what it does with them
        ([nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5)], []),  # its statistics are of all of them
        ([nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 5)], []),  # those of a position after those of another
        ([nn.Conv2d(3, 4, 1), nn.Linear(4, 5)], []),  # it reads the last axis, which is the width
        ([nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 5)], ["0"]),
        ([nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)], []),  # depthwise
        ([nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4, affine=False), nn.Conv2d(4, 2, 1)], []),
        ([ONE, nn.ReLU(), ONE, nn.ReLU(), nn.Linear(4, 5)], []),  # one layer, twice
        ([parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 5)], []),
    ],
)
def test_what_is_in_series(layers: list[nn.Module], names: list[str]) -> None:
    assert [inner.name for inner in inner_of(nn.Sequential(*layers))] == names


class Told(nn.Module):
    """A model whose forward pass nobody knows, and which says what is inner."""

    def __init__(self, *told: InnerChannels) -> None:
        super().__init__()
        self.a, self.b, self.told = nn.Linear(3, 6), nn.Linear(6, 2), told

    def inner_channels(self) -> tuple[InnerChannels, ...]:
        return self.told


def test_a_model_says_its_own() -> None:
    hidden = InnerChannels("hidden", 3, {"a.weight": 0, "a.bias": 0, "b.weight": 1})
    assert inner_of(Told(hidden)) == (hidden,)
    assert inner_of(Told()) == ()
    assert hash(hidden) == hash(InnerChannels("hidden", 3, (("a.weight", 0), ("a.bias", 0), ("b.weight", 1))))


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([InnerChannels("h", 6, {"c.weight": 0})], r"'h' names axis 0 of 'c.weight', whose shape is \(\)"),
        ([InnerChannels("h", 6, {"a.bias": 1})], r"'h' names axis 1 of 'a.bias', whose shape is \(6,\)"),
        ([InnerChannels("h", 4, {"a.weight": 0})], "'h' has 4 channels; axis 0 of 'a.weight' is 6 long"),
        ([InnerChannels("h", 6, {"a.weight": 0}, 4)], "'h' has 6 channels, 4 together; one divides the other"),
        (
            [InnerChannels("h", 6, {"a.weight": 0}), InnerChannels("i", 6, {"a.weight": 0})],
            "'i' names axis 0 .* another's",
        ),
    ],
)
def test_what_does_not_fit_is_named(told: list[InnerChannels], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        inner_of(Told(*told))
