"""The trained model of a run, and the files that it is written to.

``safetensors`` is the sparse form: "values" are the float32 of what is alive or was never prunable, in the order of the
model's state, "mask" is one bit a prunable weight (Elias-free: `Mask.packed`), and the header tells names and shapes.
The others are dense, with zeros where nothing is alive. ``onnx`` and ``torch-export`` are programs of a batch of any
size, whose input are the data as a reader gives them: pixels are bytes, and normalising is part of the program.
"""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, numpy, safe_open
from safetensors import torch as safe_torch
from torch import nn

from ssfl_app.data.dataset import DataSet
from ssfl_app.data.transform import AsTheyAre, Transform
from ssfl_app.files import write_atomically
from ssfl_app.options import ConfigError, build
from ssfl_app.results.run_folder import Run
from ssfl_app.sparsity.codec import BitmapAndValues
from ssfl_app.sparsity.layout import Layout, State, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training import models

Record = dict[str, Any]


def described(data: DataSet) -> Record:
    """Return what summary.json says of a model's input, for `trained` and `transform_of`."""
    transform, kind = data.transform, str(data.train.inputs.dtype).removeprefix("torch.")
    moments = {"mean": transform.mean, "std": transform.std} if isinstance(transform, Transform) else {}
    return {"input_shape": list(data.shape), "input_type": kind, "outputs": data.outputs, **moments}


def _input(run: Run) -> Record:
    summary = run.summary or {}
    if "input_shape" not in summary or not (run.folder / "model.safetensors").is_file():
        rule = "it is one that finished, of this version or a later one"
        raise ConfigError(f"{run.folder} has no trained model, or does not tell what its input is; {rule}")
    return summary


def transform_of(run: Run) -> Transform | AsTheyAre:
    """Return what makes the model's input of data as a reader gives them."""
    known = _input(run)
    return Transform(tuple(known["mean"]), tuple(known["std"]), "none") if "mean" in known else AsTheyAre()


def mask_of(run: Run) -> State:
    """Return the mask as bool tensors by name; none of a dense run."""
    path = run.folder / "mask.safetensors"
    return {name: bits.bool() for name, bits in _read(path).items()} if path.is_file() else {}


def _read(path: Path) -> State:
    try:
        return safe_torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it is a file that `ssfl run` wrote") from error


def trained(run: Run) -> nn.Module:
    """Return the model with its trained weights, for evaluation, on the CPU; dead weights are 0.

    Raises
    ------
    ConfigError
        The run is not finished, or its model is no longer the one that it names.
    """
    known, mask, state = _input(run), mask_of(run), _read(run.folder / "model.safetensors")
    keys = {key.removeprefix("model."): value for key, value in run.config.items() if key.startswith("model.")}
    options = build(models.ModelOptions, "model", keys)
    model = models.create(options, tuple(known["input_shape"]), known["outputs"], run.config["run.seed"])
    shapes = dict(Layout.of(model).shapes)
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
        raise ConfigError(f"model.name is {options.name!r}; it makes a model of other shapes than {run.folder} has")
    load_state(model, {n: t.where(mask[n], torch.zeros(())) if n in mask else t for n, t in state.items()})
    return model.eval()


class _Program(nn.Module):
    """The model, and before it what its transform does."""

    def __init__(self, model: nn.Module, transform: Transform | AsTheyAre) -> None:
        super().__init__()
        self.model, self.pixels = model, isinstance(transform, Transform)
        if isinstance(transform, Transform):
            for name, values in (("mean", transform.mean), ("std", transform.std)):
                self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        shown = (data.to(torch.float32) / 255 - self.mean) / self.std if self.pixels else data
        return self.model(shown)  # type: ignore[no-any-return]


def _sparse(run: Run, path: Path) -> None:
    model, bits = trained(run), mask_of(run)
    layout, state = Layout.of(model), {name: tensor for name, tensor in model.state_dict().items()}
    ones = {name: torch.ones(shape) for name, shape in layout.shapes}
    mask = Mask(layout, layout.flatten_prunable(ones | bits).astype(np.bool_))
    arrays = {name: np.asarray(array) for name, array in BitmapAndValues().encode(layout, state, mask).items()}
    header = {"shapes": layout.shapes, "prunable": layout.prunable, "config": run.config, "input": _input_of(run)}
    numpy.save_file(arrays, path, {name: json.dumps(value) for name, value in header.items()})


def _input_of(run: Run) -> Record:
    known = _input(run)
    return {name: known[name] for name in ("input_shape", "input_type", "outputs", "mean", "std") if name in known}


def read_sparse(path: Path) -> tuple[State, State]:
    """Return state and mask, tensors by name, of a file that ``ssfl export --to safetensors`` wrote.

    Raises
    ------
    ConfigError
        It is no such file.
    """
    try:
        with safe_open(path, framework="np") as file:
            header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = tuple((str(name), tuple(map(int, shape))) for name, shape in json.loads(header["shapes"]))
        layout = Layout(shapes, tuple(json.loads(header["prunable"])))
        state, mask = BitmapAndValues().decode(arrays, layout)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it is a file that `ssfl export` wrote") from error
    return state, mask.tensors()


def _program(run: Run) -> tuple[_Program, torch.Tensor, tuple[Mapping[int, Any]]]:
    """Return a program, two samples that it takes, and which of their sizes may be others."""
    known, program = _input(run), _Program(trained(run), transform_of(run)).eval()
    samples = torch.zeros(2, *known["input_shape"], dtype=getattr(torch, known["input_type"]))
    return program, samples, ({0: torch.export.Dim("batch")},)


def _onnx(run: Run, path: Path) -> None:
    if lacking := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ConfigError(f'{", ".join(lacking)} not installed: pip install "ssfl-app[export]"')
    program, samples, sizes = _program(run)
    names = {"input_names": ["data"], "output_names": ["output"]}
    torch.onnx.export(
        program, (samples,), path, dynamo=True, dynamic_shapes=sizes, external_data=False, verbose=False, **names
    )


def _exported(run: Run, path: Path) -> None:
    program, samples, sizes = _program(run)
    with path.open("wb") as file:
        torch.export.save(torch.export.export(program, (samples,), dynamic_shapes=sizes), file)  # type: ignore[arg-type]


FORMS: dict[str, tuple[str, Callable[[Run, Path], None]]] = {
    "safetensors": (".safetensors", _sparse),
    "torch": (".pt", lambda run, path: torch.save(trained(run).state_dict(), path)),
    "onnx": (".onnx", _onnx),
    "torch-export": (".pt2", _exported),
}
"""What a model can be exported to: the end of the file's name, and what writes it."""


def write(run: Run, to: str, out: Path | None) -> Path:
    """Write the model of a run to a file, by default ``exported.*`` in its folder; return where it is.

    Raises
    ------
    ConfigError
        There is no such form, the run is not finished, or a package that is needed is not installed.
    """
    if to not in FORMS:
        raise ConfigError(f"--to is {to!r}; it is one of {', '.join(FORMS)}")
    ending, how = FORMS[to]
    path = out or run.folder / f"exported{ending}"
    write_atomically(path, lambda temporary: how(run, temporary))
    return path
