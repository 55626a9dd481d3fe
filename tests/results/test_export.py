"""The forms that a trained model is exported to give the outputs of the model, and the sparse one its very bits."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions

import ssfl_app
from ssfl_app import api
from ssfl_app.cli.main import main
from ssfl_app.data.dataset import DataOptions, load
from ssfl_app.options import ConfigError
from ssfl_app.results import export
from ssfl_app.results.export import read_sparse
from ssfl_app.sparsity.layout import Layout, state_digest, state_of

PIXELS = load(DataOptions()).test.inputs[:7]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    """Return a run of the CNN, whose inputs are pixels that are normalised."""
    keys = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    return ssfl_app.run(density=0.1, out=tmp_path_factory.mktemp("export") / "run", **keys)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(digits: api.Run) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = digits.model()(digits.transform.test(PIXELS))
    return output


def test_the_sparse_file_loads_back_to_the_same_bits_and_has_no_dead_value(digits: api.Run) -> None:
    file = digits.export("safetensors")
    state, mask = read_sparse(file)
    model = digits.model()
    layout = Layout.of(model)
    assert digits.summary is not None
    assert state_digest(layout, state) == state_digest(layout, state_of(model)) == digits.summary["model_sha256"]
    assert mask.keys() == digits.mask.keys()
    assert all(torch.equal(mask[name], bits) for name, bits in digits.mask.items())
    alive, dense = digits.summary["alive"], layout.size - layout.prunable_size
    bitmap = -(-layout.prunable_size // 8)
    with safe_open(file, framework="np") as opened:
        sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
        header = opened.metadata()
    assert sum(sizes.values()) == 4 * (alive + dense) + bitmap
    assert sizes["mask"] == bitmap
    assert json.loads(header["input"])["mean"] == list(digits.transform.mean)  # type: ignore[union-attr]
    assert json.loads(header["config"])["model.name"] == "cnn"


def test_onnx_takes_pixels_and_gives_the_outputs_of_torch(digits: api.Run, expected: torch.Tensor) -> None:
    session = onnxruntime.InferenceSession(digits.export("onnx"), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:], output.name) == ("data", "tensor(uint8)", [1, 8, 8], "output")
    for count in (7, 1):  # of any size
        (found,) = session.run(None, {"data": PIXELS[:count].numpy()})
        assert np.abs(found - expected[:count].numpy()).max() < 1e-4


def test_without_channels_that_nothing_reads_it_is_the_same_function(digits: api.Run, expected: torch.Tensor) -> None:
    said: list[str] = []
    program = torch.export.load(export.write(digits, "torch-export", compact=True, say=said.append)).module()
    assert torch.allclose(program(PIXELS), expected, atol=1e-5)
    state, mask = read_sparse(export.write(digits, "safetensors", compact=True))
    small, _ = export.compacted(digits)
    assert state_digest(Layout.of(small.model), state) == state_digest(Layout.of(small.model), state_of(small.model))
    assert all(torch.equal(mask[name], bits) for name, bits in small.mask.items())
    layout = Layout.of(digits.model())
    removed = int(re.match(r"(\d+) of 224 inner channels are read by nothing", said[0])[1])  # type: ignore[index]
    before, after = (sum(inner.size for inner in each.inner) for each in (layout, Layout.of(small.model)))
    assert before - after == removed


def test_an_exported_program_needs_no_source_of_the_model(digits: api.Run, expected: torch.Tensor) -> None:
    program = torch.export.load(digits.export("torch-export")).module()
    for count in (7, 1):
        assert torch.allclose(program(PIXELS[:count]), expected[:count], atol=1e-5)


def test_a_state_dict_loads_without_pickled_code(
    digits: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.pt"
    words = ["ssfl", "export", str(digits.folder), "--to", "torch", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"model: {out}\n"
    state = torch.load(out, weights_only=True)
    model = digits.model()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    model.load_state_dict(state)


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    digits: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="to is 'keras'; it is one of safetensors, torch, onnx, torch-export, semi-"
    ):
        digits.export("keras", tmp_path / "x")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=re.escape('onnx, onnxscript not installed: pip install "ssfl-app[export]"')
    ):
        digits.export("onnx", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_was_updated_goes_into_the_weights_that_a_run_started_from(tmp_path: Path) -> None:
    keys: Any = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    keys |= {"model_width": 0.25, "data_augment": "none"}
    first = ssfl_app.run("fedavg", out=tmp_path / "first", **keys)
    start = first.folder / "model.safetensors"
    tuned = {"mask_dead": "frozen", "ssfl_criterion": "gradient", "model_weights": start}
    run = ssfl_app.run(density=0.05, out=tmp_path / "tuned", seed=2, **tuned, **keys)
    model, before, mask = run.model(), first.model().state_dict(), run.mask
    for name, weight in model.state_dict().items():
        if name in mask:
            assert torch.equal(weight[~mask[name]], before[name][~mask[name]])
            assert not torch.equal(weight, before[name])
    file = run.export("safetensors")
    assert file.stat().st_size < 0.3 * start.stat().st_size
    state, alive = read_sparse(file, start)
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(mask[name], bits) for name, bits in alive.items())
    with pytest.raises(ConfigError, match="its frozen weights are in the file that the run started from"):
        read_sparse(file)
    save_file({name: weight + 1 for name, weight in before.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="the run started from another file"):
        read_sparse(file, tmp_path / "other.safetensors")
    whole = torch.load(run.export("torch"), weights_only=True)
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    keys = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    keys |= {"mask_granularity": "2:4", "density": 0.5, "out": tmp_path_factory.mktemp("export") / "run"}
    return ssfl_app.run(**keys)  # type: ignore[arg-type]


def on_cpu(dense: torch.Tensor) -> torch.Tensor:
    """Return a 2:4 weight as torch makes it on a GPU without cuSPARSELt; it lets a CPU hold one, not multiply."""
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    parts = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None, "requires_grad": False}
    return SparseSemiStructuredTensorCUTLASS(dense.shape, packed=packed, meta=meta, **parts)


def test_2_of_4_weights_of_linear_layers_are_written_as_torch_keeps_them(
    two_of_four: api.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", on_cpu)
    file, model = two_of_four.export("semi-structured"), two_of_four.model().half()
    with torch.serialization.safe_globals([SparseSemiStructuredTensorCUTLASS]):
        state = torch.load(file, weights_only=True)
    # The last layer has 10 outputs; convolutions have no such kernel.
    held = [name for name, tensor in state.items() if isinstance(tensor, SparseSemiStructuredTensorCUTLASS)]
    assert held == ["8.weight"]
    assert tuple(state["8.weight"].shape) == (128, 1024)
    assert state["8.weight"].packed.numel() == 128 * 1024 / 2
    model.load_state_dict(state, assign=True)
    for name, tensor in two_of_four.model().half().state_dict().items():
        assert torch.equal(state[name].to_dense() if name in held else state[name], tensor), name


@pytest.mark.parametrize(
    ("has", "why"),
    [
        (None, "there is no GPU here; 2:4 weights are made on one of 8.0 or higher"),
        ((7, 5), "the GPU has compute capability 7.5"),
    ],
)
def test_without_a_gpu_that_multiplies_by_2_of_4_weights_none_are_written(
    has: tuple[int, int] | None, why: str, two_of_four: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: has)
    with pytest.raises(ConfigError, match=why):
        two_of_four.export("semi-structured", tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_2_of_4_is_refused_whatever_the_machine(digits: api.Run, two_of_four: api.Run) -> None:
    with pytest.raises(ConfigError, match=r"keeps [34] of four weights in a row of 8.weight; it is at most 2"):
        digits.export("semi-structured")
    model, bits = two_of_four.model(), two_of_four.mask
    assert export.two_of_four_linears(model, bits) == ["8.weight"]
    row = bits["8.weight"][3, 4:8]
    row[int(torch.nonzero(~row)[0])] = True
    with pytest.raises(ConfigError, match=r"keeps 3 of four weights in a row of 8.weight"):
        export.two_of_four_linears(model, bits)
    with pytest.raises(
        ConfigError, match="no linear layer with a mask has a multiple of 32 outputs and of 64 inputs"
    ):
        export.two_of_four_linears(model, {name: part for name, part in bits.items() if name != "8.weight"})


def test_a_file_of_a_stranger_is_refused_by_name(digits: api.Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"bad.safetensors cannot be read"):
        read_sparse(bad)
    with pytest.raises(ConfigError, match="it is a file that `ssfl export` wrote"):
        read_sparse(digits.folder / "model.safetensors")


def test_a_model_that_became_another_one_is_refused(digits: api.Run) -> None:
    changed = api.Run(**vars(digits) | {"config": digits.config | {"model.name": "resnet20"}})
    with pytest.raises(ConfigError, match=r"model.name is 'resnet20'; it makes a model of other shapes than"):
        changed.model()


class Speller(nn.Sequential):
    """A bigram model, for windows of tokens."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, norm: str) -> None:
        super().__init__(nn.Embedding(outputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def test_a_network_that_takes_tokens_is_exported_as_well(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 11, (60, 6))
    parts = (text[:40, :-1], text[:40, 1:]), (text[40:, :-1], text[40:, 1:])
    keys = {
        "clients": 2,
        "rounds": 1,
        "local_epochs": 1,
        "engine_concurrent": 1,
        "quiet": True,
        "out": tmp_path / "run",
    }
    run = ssfl_app.run(model=Speller, data=parts, partition="iid", density=0.5, **keys)  # type: ignore[arg-type]
    tokens = torch.from_numpy(text[:7, :-1])
    with torch.no_grad():
        expected = run.model()(run.transform.test(tokens))
    assert expected.shape == (7, 5, 11)
    assert torch.allclose(torch.export.load(run.export("torch-export")).module()(tokens), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(run.export("onnx"), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"data": tokens.numpy()})[0] - expected.numpy()).max() < 1e-4
    state, _ = read_sparse(run.export("safetensors"))
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(run.model()).items())


class Recurrent(nn.Module):
    """A GRU over moments; `kept` is a state that an exported program would lose."""

    keeps = False

    def __init__(self, input_shape: tuple[int, ...], outputs: int, norm: str) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(input_shape[1], 8, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keeps:
            self.kept = x.sum()
        return self.head(self.gru(x)[0].mean(dim=1))  # type: ignore[no-any-return]


def test_a_recurrent_network_is_exported_without_a_warning_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is of weights which are in the program all the same; one of anything else is shown."""
    x, y = np.random.default_rng(0).normal(size=(60, 5, 3)).astype(np.float32), np.arange(60) % 3
    keys = {"clients": 2, "rounds": 1, "local_epochs": 1, "engine_concurrent": 1, "quiet": True}
    parts, out = ((x[:40], y[:40]), (x[40:], y[40:])), tmp_path / "run"
    run = ssfl_app.run(model=Recurrent, data=parts, partition="iid", density=0.5, out=out, **keys)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = run.model()(run.transform.test(torch.from_numpy(x[40:])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = run.export("torch-export")
    assert torch.equal(torch.export.load(file).module()(torch.from_numpy(x[40:])), expected)
    monkeypatch.setattr(Recurrent, "keeps", True)
    with pytest.warns(UserWarning, match="kept.* assigned during export"):
        run.export("torch-export")
