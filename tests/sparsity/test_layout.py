"""States that cross to a GPU and back as one vector, by the same code on the CPU; test_gpu.py counts the copies."""

import numpy as np
import pytest
import torch

from ssfl_app.sparsity import layout as layouts
from ssfl_app.sparsity.codec import Dense, MaskedValues
from ssfl_app.sparsity.layout import Layout, load_state, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training.models import ModelOptions, create

CPU = torch.device("cpu")


@pytest.fixture
def model():
    """Return a model whose convolutions have their channels last, as on a GPU."""
    return create(ModelOptions("cnn", "group"), (3, 8, 8), 4, 1).to(memory_format=torch.channels_last)


def masks(layout):
    return [Mask.dense(layout), Mask.random(layout, 0.3, np.random.default_rng(1))]


@pytest.mark.parametrize("kind", [Dense, MaskedValues])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_picked_there_is_what_is_picked_here(model, kind, which, monkeypatch):
    layout = Layout.of(model)
    mask, codec, state = masks(layout)[which], kind(), state_of(model)
    here = layout.flatten(state), codec.encode(layout, state, mask)["values"]
    monkeypatch.setattr(layouts, "on_one_gpu", lambda tensors: True)
    there = layout.flatten(state), codec.encode(layout, state, mask)["values"]
    for one, other in zip(here, there, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_scattered_there_is_what_is_scattered_here(model, which):
    layout = Layout.of(model)
    mask = masks(layout)[which]
    codec = MaskedValues()
    values = codec.encode(layout, state_of(model), mask)["values"]
    values.flags.writeable = False  # as what came in a message
    here = codec.scatter(values, layout, mask)
    there = layout.scatter_on(CPU, values, codec.index_on(layout, mask, CPU))
    assert list(here) == list(there)
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name])
        assert there[name].shape == tensor.shape
    load_state(model, there)
    assert layout.flatten(state_of(model)).tobytes() == layout.flatten(here).tobytes()


def test_places_are_made_once_a_mask(model):
    mask = masks(Layout.of(model))[1]
    places = MaskedValues().index_on(mask.layout, mask, CPU)
    assert places.tolist() == np.flatnonzero(mask.transmitted).tolist()
    assert MaskedValues().index_on(mask.layout, mask, CPU) is places
    assert MaskedValues().index_on(mask.layout, Mask.dense(mask.layout), CPU) is None


def test_states_of_several_devices_go_one_tensor_at_a_time():
    one, other = torch.zeros(1), torch.zeros(1, device="meta")
    assert not layouts.on_one_gpu([one, other])
    assert not layouts.on_one_gpu([one])
    assert not layouts.on_one_gpu([])
