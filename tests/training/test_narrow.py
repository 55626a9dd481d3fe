"""A narrower network computes what the whole one does whose other channels are dead, and is smaller."""

import copy
import math

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn import functional as F

from ssfl_app.options import ConfigError
from ssfl_app.sparsity.channels import Cost, narrow_layout, narrow_state, unit_count, unit_spans, widths_of
from ssfl_app.sparsity.inner import InnerChannels
from ssfl_app.sparsity.layout import Bits, Layout, load_state, state_of
from ssfl_app.training.models import ModelOptions, create, outline
from ssfl_app.training.narrow import flops, narrowed, of_widths, uses_of_weights


def some_units(layout: Layout, seed: int = 1) -> Bits:
    kept: Bits = np.random.default_rng(seed).random(unit_count(layout)) < 0.4
    for span in unit_spans(layout):
        kept[span.start] = True
    return kept


def dead_elsewhere(model: nn.Module, layout: Layout, kept: Bits) -> nn.Module:
    """Return the whole model in which all that other channels have is 0."""
    model = copy.deepcopy(model)
    state = state_of(model)
    with torch.no_grad():
        for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
            for name, axis in inner.pairs:
                if "running" in name:
                    continue
                dead = torch.from_numpy(
                    np.flatnonzero(np.repeat(~kept[span], state[name].shape[axis] // inner.units))
                )
                state[name].index_fill_(axis, dead, 0.0)
    return model


def woken(name: str, norm: str) -> nn.Module:
    """Return a model with random norms, in float64: batches of two values a channel would show each rounding."""
    model = create(ModelOptions(name=name, norm=norm), (3, 8, 8), 5, seed=2).double()
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path, tensor in state_of(model).items():
            if tensor.dim() == 1:
                tensor += torch.rand(tensor.shape, generator=rng) - (0.5 if "bias" in path else 0.0)
    return model


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet20", "resnet50"])
def test_it_is_the_whole_network_with_the_other_channels_dead(name: str, norm: str) -> None:
    model = woken(name, norm)
    layout = Layout.of(model)
    kept = some_units(layout)
    small, dead = narrowed(model, layout, kept), dead_elsewhere(model, layout, kept)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for mode in (True, False):
        found, expected = small.train(mode)(x), dead.train(mode)(x)
        assert (found - expected).abs().max() <= 1e-7 * expected.abs().max()
    # The gradients of what both have are the same, too.
    for net in (small.train(), dead.train()):
        F.cross_entropy(net(x), torch.tensor([0, 4])).backward()
    whole = {name: weight.grad for name, weight in dead.named_parameters()}
    wanted = narrow_state(layout, state_of(model) | whole, kept)
    for path, weight in small.named_parameters():
        assert weight.grad is not None
        assert (weight.grad - wanted[path]).abs().max() <= 1e-6 * (1 + wanted[path].abs().max()), path


def judged(model: nn.Module, layout: Layout, kept: Bits, x: torch.Tensor) -> nn.Module:
    """Return the model from which torch-pruning removed the other channels; it finds out itself who reads them."""
    pruned = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(pruned, example_inputs=x)
    for inner, span in zip(layout.inner, unit_spans(layout), strict=True):
        layer, dead = pruned.get_submodule(inner.name), np.flatnonzero(np.repeat(~kept[span], inner.together))
        linear = isinstance(layer, nn.Linear)
        how = torch_pruning.prune_linear_out_channels if linear else torch_pruning.prune_conv_out_channels
        graph.get_pruning_group(layer, how, idxs=dead.tolist()).prune()
    for path, norm in pruned.named_modules():
        if isinstance(norm, nn.GroupNorm):  # it keeps their number, and ours the size that they had
            old = model.get_submodule(path)
            assert isinstance(old, nn.GroupNorm)
            norm.num_groups = norm.num_channels // (old.num_channels // old.num_groups)
    return pruned


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet18", "resnet20", "resnet50"])
def test_torch_pruning_makes_the_same_network(name: str, norm: str) -> None:
    model = woken(name, norm)
    layout = Layout.of(model)
    kept = some_units(layout)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    small, pruned = narrowed(model, layout, kept), judged(model, layout, kept, x)
    expected = pruned.state_dict()
    assert list(small.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[path]) for path, tensor in small.state_dict().items())
    for mode in (True, False):
        found, wanted = small.train(mode)(x), pruned.train(mode)(x)
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet18", "resnet50", "resnet56"])
def test_shapes_and_layers_agree_and_the_model_is_left_alone(name: str, norm: str) -> None:
    model = outline(ModelOptions(name=name, norm=norm), (3, 8, 8), 10)
    layout = Layout.of(model)
    kept = some_units(layout)
    small = narrowed(model, layout, kept)
    assert Layout.of(small) == narrow_layout(layout, widths_of(layout, kept))
    assert Layout.of(small).inner == narrow_layout(layout, widths_of(layout, kept)).inner
    assert Layout.of(small).digest == narrow_layout(layout, widths_of(layout, kept)).digest
    assert Layout.of(model) == layout
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == (module.num_features,)


def test_a_server_and_a_client_have_the_same_network() -> None:
    model = woken("resnet20", "group").float()
    layout = Layout.of(model)
    kept = some_units(layout)
    server = narrowed(model, layout, kept)
    client = of_widths(create(ModelOptions(name="resnet20"), (3, 8, 8), 5, seed=9), layout, widths_of(layout, kept))
    load_state(client, narrow_state(layout, state_of(model), kept))
    assert all(torch.equal(client.state_dict()[name], tensor) for name, tensor in server.state_dict().items())


class Attention(nn.Module):
    """Self-attention of some heads and a hidden layer: what a model of one's own may say of itself."""

    def __init__(self, width: int = 12, heads: int = 3, hidden: int = 10) -> None:
        super().__init__()
        self.heads, self.q, self.k = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y

    def inner_channels(self) -> list[InnerChannels]:
        made = {f"{part}.{kind}": 0 for part in "qkv" for kind in ("weight", "bias")}
        return [
            InnerChannels("heads", self.heads, {**made, "out.weight": 1}, counts=("heads",)),
            InnerChannels("hidden", self.up.out_features, {"up.weight": 0, "up.bias": 0, "down.weight": 1}),
        ]


def test_heads_and_hidden_units_of_attention_are_removed() -> None:
    torch.manual_seed(1)
    model = Attention()
    layout = Layout.of(model)
    kept = np.array([False, True, True] + [True, False] * 5)
    small = narrowed(model, layout, kept)
    assert (small.heads, small.q.weight.shape, small.out.weight.shape) == (2, (8, 12), (12, 8))
    assert small.up.weight.shape == (5, 12)
    x = torch.randn(2, 4, 12)
    assert torch.allclose(small(x), dead_elsewhere(model, layout, kept)(x), atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "conv4", "resnet18", "resnet20", "resnet50"])
def test_multiplications_are_those_that_torch_counts(name: str) -> None:
    model = outline(ModelOptions(name=name), (3, 32, 32), 10)
    layout = Layout.of(model)
    cost = Cost(layout, uses_of_weights(model, layout, (3, 32, 32)))
    for kept in (np.ones(unit_count(layout), dtype=np.bool_), some_units(layout)):
        # Torch counts a multiplication and an addition.
        assert 2 * cost.of(widths_of(layout, kept)) == flops(narrowed(model, layout, kept), (3, 32, 32))


def test_layers_whose_multiplications_are_not_known_are_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"mask.budget is 'flops'; it is 'parameters' .* weights in Embedding"):
        uses_of_weights(model, Layout.of(model), (3,))


def test_no_layer_is_left_without_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="the width of 0 is 0"):
        narrowed(model, Layout.of(model), np.zeros(4, dtype=np.bool_))
    assert math.prod(narrowed(model, Layout.of(model), np.arange(4) == 2)[0].weight.shape) == 3
