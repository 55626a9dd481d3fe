"""The trained model of a run, and the files that it is written to.

``safetensors`` is the sparse form: "values" are the float32 of what is alive or cannot be pruned, in the order of the
model's state, "mask" is one bit a weight that can be pruned (`Mask.packed`), and the header tells names and shapes.
With mask.dead "frozen" it holds what was updated, and a digest of the whole model in the header.
``semi-structured`` is a state dict in float16 for GPUs, with torch's own tensors for weights that keep two of four.
The others are dense, with zeros where nothing is alive. ``onnx`` and ``torch-export`` are programs for batches of any
size; they take data as a reader gives them: pixels are bytes, and normalising them is part of the program.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, numpy, safe_open
from safetensors.torch import load_file
from torch import nn

from ssfl_app.data.dataset import DataSet
from ssfl_app.data.transform import AsTheyAre, Transform
from ssfl_app.files import write_atomically
from ssfl_app.options import ConfigError, build
from ssfl_app.results.run_folder import Run
from ssfl_app.sparsity.channels import narrow_state, unread, widths_in
from ssfl_app.sparsity.codec import BitmapAndValues
from ssfl_app.sparsity.layout import Layout, State, load_state, mask_everything, state_digest, state_of
from ssfl_app.sparsity.mask import Mask
from ssfl_app.training import models
from ssfl_app.training.narrow import narrowed, of_widths

Known = Mapping[str, Any]

ROWS, COLUMNS = 32, 64
"""What the sides of a 2:4 weight in float16 are multiples of; both libraries that torch uses for it take these."""
CAPABILITY = (8, 0)
"""Compute capability from which on a GPU multiplies by 2:4 weights."""

# torch's recurrent layers keep a list of their own weights and renew it while they are exported. torch takes that for
# a state that the program would lose, and warns; the weights themselves are parameters, and are in the program.
_RECURRENT = r"The tensor attributes? (self\.[\w.]+\._flat_weights\[\d+\](, )?)+ (was|were) assigned during export"


def described(data: DataSet) -> dict[str, Any]:
    """Return what summary.json says of a model's input."""
    transform, kind = data.transform, str(data.train.inputs.dtype).removeprefix("torch.")
    moments = {"mean": transform.mean, "std": transform.std} if isinstance(transform, Transform) else {}
    return {"input": {"shape": data.shape, "type": kind, **moments}, "outputs": data.outputs}


def _summary(run: Run) -> Known:
    if run.summary is None or "input" not in run.summary:
        rule = "it is one that is finished, and of this version or a later one"
        raise ConfigError(f"{run.folder} does not tell what its model is for; {rule}")
    return run.summary


def _read(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it is a file that `ssfl run` wrote") from error


def mask_of(run: Run) -> State:
    """Return the mask as bool tensors by name; none of a dense run."""
    path = run.folder / "mask.safetensors"
    return {name: bits.bool() for name, bits in _read(path).items()} if path.is_file() else {}


def transform_of(run: Run) -> Transform | AsTheyAre:
    """Return what makes the model's input of data as a reader gives them."""
    known = _summary(run)["input"]
    return Transform(tuple(known["mean"]), tuple(known["std"]), "none") if "mean" in known else AsTheyAre()


def trained(run: Run) -> nn.Module:
    """Return the model with its trained weights, for evaluation, on the CPU; dead weights are 0, or frozen.

    ConfigError: the run is not finished, or its model is no longer the one that it names.
    """
    known, state = _summary(run), _read(run.folder / "model.safetensors")
    mask = {} if _frozen(run) else mask_of(run)
    keys = {key.removeprefix("model."): value for key, value in run.config.items() if key.startswith("model.")}
    options = build(models.ModelOptions, "model", keys | {"weights": ""})  # they are in the run's own file
    model = models.create(options, tuple(known["input"]["shape"]), known["outputs"], run.config["run.seed"])
    layout, shapes = Layout.of(model), {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != dict(layout.shapes):
        try:
            model = of_widths(model, layout, widths_in(layout, shapes))
        except ValueError as error:
            rule = f"it makes a model of other shapes than {run.folder} has"
            raise ConfigError(f"model.name is {options.name!r}; {rule}") from error
    if _frozen(run):
        mask_everything(model)
    load_state(model, {n: t.where(mask[n], torch.zeros(())) if n in mask else t for n, t in state.items()})
    return model.eval()


def _frozen(run: Run) -> bool:
    return run.config.get("mask.dead") == "frozen"  # a run of an older version has no such key


@dataclass(frozen=True)
class Exported:
    """What is written: the model of a run, and its mask as bool tensors by name, none of a dense one."""

    run: Run
    model: nn.Module
    mask: State


def compacted(run: Run) -> tuple[Exported, str]:
    """Return the model of a run without channels that nothing reads, and a line that says how many they were.

    The outputs are the same (`ssfl_app.sparsity.channels.unread`).
    """
    if _frozen(run):
        raise ConfigError(f"--compact: {run.folder} has mask.dead 'frozen'; its dead weights are not 0")
    whole = Exported(run, trained(run), mask_of(run))
    layout = Layout.of(whole.model)
    ones = {name: torch.ones(shape) for name, shape in layout.shapes}
    found = unread(layout, layout.flatten_prunable(ones | whole.mask).astype(np.bool_))
    bits = narrow_state(layout, ones | {n: t.float() for n, t in whole.mask.items()}, found.kept)
    mask = {name: bits[name].bool() for name in whole.mask}
    return Exported(run, narrowed(whole.model, layout, found.kept).eval(), mask), found.said()


class _Program(nn.Module):
    """The model, and before it what its transform does."""

    moments: torch.Tensor

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.model, transform = exported.model, transform_of(exported.run)
        moments = [transform.mean, transform.std] if isinstance(transform, Transform) else []
        self.register_buffer("moments", torch.tensor(moments)[..., None, None])

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        shown = (data / 255 - self.moments[0]) / self.moments[1] if len(self.moments) else data
        return self.model(shown)  # type: ignore[no-any-return]


def _program(exported: Exported) -> torch.export.ExportedProgram:
    known = _summary(exported.run)["input"]
    samples = torch.zeros(2, *known["shape"], dtype=getattr(torch, known["type"]))
    sizes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _RECURRENT, UserWarning)
        return torch.export.export(_Program(exported).eval(), (samples,), dynamic_shapes=sizes)


def _torch_export(exported: Exported, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(_program(exported), file)


def _onnx(exported: Exported, path: Path) -> None:
    if lacking := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ConfigError(f'{", ".join(lacking)} not installed: pip install "ssfl-app[export]"')
    ends = {"input_names": ["data"], "output_names": ["output"]}
    torch.onnx.export(_program(exported), (), path, external_data=False, verbose=False, **ends)  # type: ignore[arg-type]


def _sparse(exported: Exported, path: Path) -> None:
    run, model, bits, known = exported.run, exported.model, exported.mask, _summary(exported.run)
    layout = Layout.of(model)
    ones = {name: torch.ones(shape) for name, shape in layout.shapes}
    mask = Mask(layout, layout.flatten_prunable(ones | bits).astype(np.bool_))
    encoded = BitmapAndValues().encode(layout, state_of(model), mask)
    header = {"shapes": layout.shapes, "prunable": layout.prunable, "config": run.config, "input": known["input"]}
    header |= {"digest": state_digest(layout, state_of(model))} if _frozen(run) else {}
    arrays = {name: np.asarray(array) for name, array in encoded.items()}
    numpy.save_file(arrays, path, {name: json.dumps(value) for name, value in header.items()})


def read_sparse(path: Path, start: Path | str | None = None) -> tuple[State, State]:
    """Return state and mask, tensors by name, of a file that ``ssfl export --to safetensors`` wrote.

    `start` is the safetensors file from which a run with frozen weights started: they are in it only.

    ConfigError: it is no such file; or the frozen weights are missing, or others than those of the run.
    """
    try:
        with safe_open(path, framework="np") as file:
            header, names = file.metadata() or {}, file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
        shapes = tuple((str(name), tuple(map(int, shape))) for name, shape in json.loads(header["shapes"]))
        layout = Layout(shapes, tuple(json.loads(header["prunable"])))
        state, mask = BitmapAndValues().decode(arrays, layout)
        if "digest" in header:
            if start is None:
                raise ValueError("its frozen weights are in the file that the run started from, which start names")
            state = mask.apply(state, models.read_weights(str(start), state))
            if state_digest(layout, state) != json.loads(header["digest"]):
                raise ValueError(f"start is {str(start)!r}; the run started from another file")
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); it is a file that `ssfl export` wrote") from error
    return state, mask.tensors()


def two_of_four_linears(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the weights that a GPU multiplies as 2:4: those of linear layers, of whole tiles.

    `mask` are bool tensors by name.

    Raises
    ------
    ConfigError
        There are none, or the mask keeps more than two of four weights of one: torch would write other numbers.
    """
    linears = [(f"{path}.weight", layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]
    found = [name for name, layer in linears if name in mask and _in_tiles(layer)]
    if not found:
        raise ConfigError(f"no linear layer with a mask has a multiple of {ROWS} outputs and of {COLUMNS} inputs")
    for name in found:
        if (most := int(mask[name].reshape(-1, 4).sum(dim=1).max())) > 2:
            rule = "it is at most 2, as with mask.granularity '2:4'"
            raise ConfigError(f"the mask keeps {most} of four weights in a row of {name}; {rule}")
    return found


def _in_tiles(layer: nn.Linear) -> bool:
    return layer.out_features % ROWS == 0 and layer.in_features % COLUMNS == 0


def _gpu() -> torch.device:
    """Return a GPU that has 2:4 products; ConfigError without one."""
    has = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if has is None or has < CAPABILITY:
        found = "there is no GPU here" if has is None else f"the GPU has compute capability {has[0]}.{has[1]}"
        raise ConfigError(f"{found}; 2:4 weights are made on one of {CAPABILITY[0]}.{CAPABILITY[1]} or higher")
    return torch.device("cuda")


def semi_structured(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of a model in float16 on the GPU, 2:4 weights of linear layers as torch keeps these.

    In float32 the GPU's pattern is 1:2 (pytorch pull request 115550). The model becomes one of float16.

    Raises
    ------
    ConfigError
        The mask is not 2:4, no layer fits, or no GPU of compute capability 8.0 is here.
    """
    names, device = two_of_four_linears(model, mask), _gpu()
    state = {name: tensor.to(device) for name, tensor in model.half().state_dict().items()}
    return state | {name: torch.sparse.to_sparse_semi_structured(state[name]) for name in names}


def _semi_structured(exported: Exported, path: Path) -> None:
    if _frozen(exported.run):
        raise ConfigError(f"{exported.run.folder} has mask.dead 'frozen'; its dead weights are not 0")
    torch.save(semi_structured(exported.model, exported.mask), path)


FORMS: dict[str, tuple[str, Callable[[Exported, Path], None]]] = {
    "safetensors": (".safetensors", _sparse),
    "torch": (".pt", lambda exported, path: torch.save(exported.model.state_dict(), path)),
    "onnx": (".onnx", _onnx),
    "torch-export": (".pt2", _torch_export),
    "semi-structured": (".pt", _semi_structured),
}
"""What a model can be exported to: the end of the file's name, and what writes it."""


def write(
    run: Run,
    to: str,
    out: Path | str | None = None,
    *,
    compact: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the model of a run to a file, by default ``exported.*`` in its folder; return where it is.

    With `compact`, without channels that nothing reads; `say` is told how many they were.

    ConfigError: there is no such form, the run is not finished, a package that is needed is not installed, or
    "semi-structured" is no form for this mask or machine.
    """
    if to not in FORMS:
        raise ConfigError(f"to is {to!r}; it is one of {', '.join(FORMS)}")
    ending, how = FORMS[to]
    path = Path(out or run.folder / f"exported{ending}")
    if compact:
        exported, line = compacted(run)
        say(line)
    else:
        exported = Exported(run, trained(run), mask_of(run))
    write_atomically(path, lambda temporary: how(exported, temporary))
    return path
