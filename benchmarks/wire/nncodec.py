"""NNCodec (ISO/IEC 15938-17, DeepCABAC) beside our value types, on the same trained models inside a mask.

NNCodec wants numpy < 2, so it lives in a virtual environment of its own, which is made on first use and sees this
one's torch. It gets a model in two ways: as the tensors with their zeros, from which a receiver that knows no mask
can read it; and as the alive values alone, a vector for each tensor, for a receiver that knows the mask as ours does.
"""

import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safe_numpy

from ssfl_app.config import merge, read_overrides
from ssfl_app.runtime import Runtime, get_runtime
from ssfl_app.sparsity.codec import MaskedValues, nbytes
from ssfl_app.sparsity.layout import State, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.values import VALUE_TYPES

VERSION = "2.1.3"
VENV = Path(tempfile.gettempdir()) / f"nncodec-{VERSION}-venv"
STEPS = (-20, -26, -32, -38, -44)  # quantization parameters: 4 are a factor of 2 in the step; -32 is the default
KEYS = "mask.density={density} model.name='{model}' run.evaluate-every=20"
# Digits: the default run at two densities; and for bytes and seconds at size, initial weights under a random mask.
CASES = (("cnn", 0.5, True), ("cnn", 0.1, True), ("resnet18", 0.1, False))
REPEATS = 3


def environment() -> Path:
    """Return the Python of NNCodec's virtual environment; make it if it is not there."""
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "numpy<2", "setuptools", "pybind11", "wheel"], check=True)
        # Behind its own packages in sys.path: torch and torchvision come from here, NumPy does not.
        site = next((VENV / "lib").glob("python*")) / "site-packages"
        (site / "torch-of-another.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", f"nncodec=={VERSION}"], check=True)
        others = ["click", "tqdm", "h5py", "pandas<3", "opencv-python-headless<4.11", "ptflops", "torchmetrics"]
        subprocess.run([*pip, "--no-deps", *others, "pytz", "lightning-utilities"], check=True)
    return python


def measure() -> list[dict[str, Any]]:
    """Return a row for each way of writing each model."""
    python, rows = environment(), []
    for model, density, trained in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder, keys = Path(name), KEYS.format(density=density, model=model)
            runtime = get_runtime(merge(read_overrides([keys])))
            if trained:
                ssfl = str(Path(sys.executable).parent / "ssfl")
                words = [ssfl, "run", "--engine", "inline", "-c", keys, "--out", str(folder / "run")]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                mask = _mask(runtime, folder / "run")
                state = runtime.layout.unflatten(_flat(runtime, folder / "run"))
            else:
                mask = Mask.random(runtime.layout, density, np.random.default_rng(1))
                state = mask.apply(runtime.initial_state())
            for row in [*_ours(runtime, state, mask), *_theirs(runtime, state, mask, python, folder)]:
                rows.append({"model": model, "density": density, "trained": trained} | row)
                print(rows[-1], flush=True)
    return rows


def _flat(runtime: Runtime, run: Path) -> np.ndarray:
    kept = safe_numpy.load_file(run / "model.safetensors")
    return np.concatenate([kept[name].reshape(-1) for name, _ in runtime.layout.shapes]).astype(np.float32)


def _mask(runtime: Runtime, run: Path) -> Mask:
    kept = safe_numpy.load_file(run / "mask.safetensors")
    return Mask(runtime.layout, np.concatenate([kept[n].reshape(-1).astype(bool) for n in runtime.layout.prunable]))


def _accuracy(runtime: Runtime, state: State) -> float:
    load_state(runtime.model, state)
    return 100 * runtime.trainer.evaluate(runtime.model, runtime.data.test)[1]


def _ours(runtime: Runtime, state: State, mask: Mask) -> list[dict[str, Any]]:
    rows = []
    for kind in VALUE_TYPES:
        codec, times = MaskedValues(kind), []
        for _ in range(REPEATS):
            began = time.perf_counter()
            arrays = codec.encode(runtime.layout, state, mask)
            encoded = time.perf_counter()
            back, _ = codec.decode(arrays, runtime.layout, mask)
            times.append((encoded - began, time.perf_counter() - encoded))
        encode, decode = (min(column) for column in zip(*times, strict=True))
        accuracy = _accuracy(runtime, back)
        rows.append({"way": kind, "bytes": nbytes(arrays), "encode": encode, "decode": decode, "accuracy": accuracy})
    return rows


def _theirs(runtime: Runtime, state: State, mask: Mask, python: Path, folder: Path) -> list[dict[str, Any]]:
    layout, rows = runtime.layout, []
    bits = {name: tensor.numpy().reshape(-1) for name, tensor in mask.tensors().items()}
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    # As matrices: NNCodec takes a vector for a bias, and quantizes it finely whatever qp is.
    alive = {n: t.reshape(-1)[bits[n]].reshape(1, -1) if n in bits else t for n, t in tensors.items()}
    for way, arrays in (("tensors", tensors), ("alive values", alive)):
        np.savez(folder / "in.npz", **arrays)
        script = Path(__file__).with_name("nncodec_peer.py")
        # -P: this folder is not to be searched, where modules have the names of others.
        words = [str(python), "-P", str(script), str(folder / "in.npz"), str(folder / "out.npz"), *map(str, STEPS)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        found = np.load(folder / "out.npz")
        for step in STEPS:
            flat = np.zeros(layout.size, dtype=np.float32)
            for name, span in layout.spans.items():
                places = bits[name] if way == "alive values" and name in bits else slice(None)
                flat[span][places] = found[f"{step}/{name}"].reshape(-1)
            flat[~mask.transmitted] = 0
            size, encode, decode = (float(x) for x in found[str(step)])
            accuracy = _accuracy(runtime, layout.unflatten(flat))
            row = {"way": f"NNCodec, {way}, qp {step}", "bytes": int(size), "encode": encode, "decode": decode}
            rows.append(row | {"accuracy": accuracy})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return Markdown."""
    lines = [
        f"nncodec {VERSION}. One model, as it is sent in one message; accuracy on the test images of digits.",
        "",
        "| model | density | way | bytes | encode s | decode s | accuracy % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = f"{row['encode']:.3f} | {row['decode']:.3f}"
        name, reached = row["model"], f"{row['accuracy']:.2f}" if row["trained"] else "not trained"
        lines.append(f"| {name} | {row['density']} | {row['way']} | {row['bytes']:,} | {times} | {reached} |")
    return lines
