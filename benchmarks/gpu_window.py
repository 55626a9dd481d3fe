"""What a machine with a GPU must answer in at most nine minutes: python benchmarks/gpu_window.py OUT

The most important parts come first. Each is a process of its own, with a time limit, and each row is written to
OUT/gpu_window.jsonl when it is known: a part that fails or hangs is a line, and the next one goes on.

    checks       graphs train to the bits of the same steps uncaptured; 4 and 10 clients at once to those of one
    rates        images a second of 1 and 10 clients, for fp32, tf32, bf16
    fused        engine.kernels "fused": the same bits twice and as uncaptured, rates, and the loss beside fp32's
    profile      which kernels 1 and 10 clients run, how busy the GPU is, kernels that only change a layout
    rounds       six rounds of the paper's recipe (ResNet-18, 10 of 100 clients) in process, host and device apart, as
                 today and fused in bf16
    queues-8/-32 rates with 8 and 32 queues to the GPU (CUDA_DEVICE_MAX_CONNECTIONS)
    convolutions those of the four stages, by layout, type and determinism
    grouped      one grouped convolution for ten clients
    compile      torch.compile inside the captured step
    sweep        1, 2, 4, 8, 16 clients at once, tf32 and bf16
    two-of-four  what `ssfl export --to semi-structured` writes, read back: products and outputs are the dense ones

Afterwards ``--show`` prints the rows as Markdown. The record goes to benchmarks/results/gpu-<hardware>-<date>.jsonl.
Images are random unless --data names a folder with CIFAR-10 (parquet files or torchvision's).

On a bare machine with Python 3.12, torch 2.11, torchvision, numpy, scikit-learn, scipy, pyarrow, rich, typer,
matplotlib, safetensors, psutil, jinja2 and pillow, Flower comes as wheels, about 10 MB and without Ray. Here:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \\
        flwr==1.42.0 tomli-w cryptography pycryptodome cffi pycparser iterators==0.0.2 httpx

and there, from the root of the repository, with the wheels in .whl and the images in .data:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site
    python3 benchmarks/gpu_window.py "$OUT" --data .data
    python3 benchmarks/gpu_paper.py "$OUT" --minutes 4 --data .data

``--device cpu --tiny`` plays all parts in a minute, which measures nothing. Without CUDA it ends with 2.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from gpu_rates import WorkerState

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

MINUTES = 9.0
LIMITS = {
    "checks": 75, "rates": 90, "fused": 75, "profile": 60, "rounds": 120, "queues-8": 30, "queues-32": 30,
    "convolutions": 45, "grouped": 30, "compile": 75, "sweep": 120, "two-of-four": 30,
}  # fmt: skip
"""Parts in their order, and seconds each may take, the start of Python included."""

RECORD = "gpu_window.jsonl"


# ---- parts: each yields rows; only their process imports torch ---------------------------------


def weights(
    bench: "WorkerState", steps: str, precision: str, name: str, client: int = 0, kernels: str = "torch"
) -> "torch.Tensor":
    """Return the weights after fits of different sizes, rates and masks, as one vector on the CPU."""
    import numpy as np
    import torch

    from ssfl_app.sparsity.layout import Layout
    from ssfl_app.sparsity.mask import Mask

    model = bench.model(name=name, last=kernels == "fused")
    run = bench.trainer(steps, precision, kernels, epochs=1, momentum=0.9)
    mask = Mask.random(Layout.of(model), 0.5, np.random.default_rng(1))
    for count, lr, held in [(36, 0.01, mask), (23, 0.005, None), (36, 0.01, mask)]:
        run.fit(model, bench.images(client, count), np.random.default_rng(client), lr=lr, mask=held)
    return torch.cat([tensor.detach().flatten().cpu() for tensor in model.state_dict().values()])


def row(what: str, one: "torch.Tensor", other: "torch.Tensor") -> dict:
    import torch

    far = float((one.double() - other.double()).norm() / other.double().norm())
    return {"check": what, "same": torch.equal(one, other), "distance": far}


def checks(bench: "WorkerState") -> Iterator[dict]:
    import torch

    precisions = ("tf32", "bf16") if bench.on_gpu else ("fp32",)
    slow, alone = ("static" if bench.on_gpu else "plain"), {}
    for name in dict.fromkeys(("cnn", bench.scale.model)):
        for precision in precisions:
            alone[precision] = weights(bench, bench.fast, precision, name)
            uncaptured = weights(bench, slow, precision, name)
            yield row(f"{name} {precision}: {bench.fast} as {slow}", alone[precision], uncaptured)
    for precision in precisions:
        for count in (4, bench.scale.many):
            found: dict[int, torch.Tensor] = {}

            def work(index: int, precision: str = precision, found: dict = found) -> None:
                found[index] = weights(bench, bench.fast, precision, bench.scale.model)

            bench.at_once(count, work)
            different = [index for index in range(count) if not torch.equal(found[index], alone[precision])]
            worst = found[different[0]] if different else found[0]
            yield row(f"{bench.scale.model} {precision}: {count} at once as alone", worst, alone[precision])


def rates(bench: "WorkerState", counts: tuple[int, ...] = (), precisions: tuple[str, ...] = ()) -> Iterator[dict]:
    from gpu_rates import trainer_rate

    for precision in (precisions or ("tf32", "bf16", "fp32")) if bench.on_gpu else ("fp32",):
        for count in counts or (1, bench.scale.many):
            yield trainer_rate(bench, precision, count)


def fused(bench: "WorkerState") -> Iterator[dict]:
    import numpy as np
    from gpu_rates import trainer_rate

    # Triton's interpreter, which a CPU has, takes a second a step, and one thread at a time.
    precisions, counts = (("bf16", "tf32"), (1, bench.scale.many)) if bench.on_gpu else (("fp32",), (1,))
    name = bench.scale.model
    for precision in precisions:
        ways = bench.fast, bench.fast, "static"
        found = [weights(bench, steps, precision, name, kernels="fused") for steps in ways]
        yield row(f"{name} {precision} fused: twice", found[1], found[0])
        yield row(f"{name} {precision} fused: {bench.fast} as static", found[2], found[0])
        for count in counts:
            yield trainer_rate(bench, precision, count, "fused")
    for kernels, precision in [("torch", "fp32"), *([("torch", "bf16")] * bench.on_gpu), ("fused", precisions[0])]:
        model, data = bench.model(last=kernels == "fused"), bench.images(0)
        run, rng = bench.trainer(bench.fast, precision, kernels), np.random.default_rng(1)
        losses = [run.fit(model, data, rng, lr=0.02, epochs=1) for _ in range(20 if bench.on_gpu else 1)]
        yield {"kernels": kernels, "precision": precision, "loss": losses[-1], "losses": losses}


def profiled(bench: "WorkerState") -> Iterator[dict]:
    from gpu_rates import profile

    for count in (1, bench.scale.many) if bench.on_gpu else (1,):  # of a CPU's threads torch sees the main one
        yield profile(bench, "tf32" if bench.on_gpu else "fp32", count)


def rounds(bench: "WorkerState", data: Path | None) -> Iterator[dict]:
    from gpu_rates import engine_rate

    # One at once on a CPU: others would be trained by forks, which the stopwatch does not see.
    kinds = (("tf32", "torch"), ("bf16", "fused")) if bench.on_gpu else (("fp32", "torch"),)
    for precision, kernels in kinds:
        at_once = bench.scale.many if bench.on_gpu else 1
        yield engine_rate(bench.scale, data, precision, at_once, bench.device.type, kernels)


def two_of_four(bench: "WorkerState") -> Iterator[dict]:
    import io

    import numpy as np
    import torch
    from torch.nn import functional as F

    from ssfl_app.options import ConfigError
    from ssfl_app.results.export import semi_structured
    from ssfl_app.sparsity.layout import Layout, load_state, state_of
    from ssfl_app.sparsity.patterns import two_of_four

    model, rng = bench.model(name="cnn"), np.random.default_rng(1)
    layout = Layout.of(model)
    mask = two_of_four(layout, rng.random(layout.prunable_size, np.float32))
    load_state(model, mask.apply(state_of(model)))
    file = io.BytesIO()
    try:
        torch.save(semi_structured(model, mask.tensors()), file)
    except ConfigError as error:
        yield {"refused": str(error)}
        return
    kinds = torch.sparse.SparseSemiStructuredTensorCUSPARSELT, torch.sparse.SparseSemiStructuredTensorCUTLASS
    file.seek(0)
    with torch.serialization.safe_globals([*kinds]):
        state = torch.load(file, weights_only=True)
    images = torch.from_numpy(rng.standard_normal((64, 3, 8, 8), np.float32)).to(bench.device).half()
    with torch.no_grad():
        dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = model(images)
        model.load_state_dict(state, assign=True)
        pairs = {"outputs": (model(images), expected)}
        for name in (name for name, tensor in state.items() if isinstance(tensor, kinds)):
            x = torch.from_numpy(rng.standard_normal((64, dense[name].shape[1]), np.float32)).to(dense[name])
            pairs[name] = F.linear(x, state[name]), F.linear(x, dense[name])
    for what, (found, expected) in pairs.items():
        far = float((found.double() - expected.double()).norm() / expected.double().norm())
        yield {"of": what, "kind": type(state.get(what)).__name__, "distance": far, "bytes": file.getbuffer().nbytes}
        if far > 4 * torch.finfo(torch.float16).eps:
            raise RuntimeError(f"{what} is {far:.2g} away from the dense one, more than rounding in float16")


def play(part: str, options: argparse.Namespace) -> None:
    """Play one part in this process and write its rows."""
    if part.startswith("queues-"):
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = part.removeprefix("queues-")
    else:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as `ssfl run` has it
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import gpu_trials
    import torch
    from gpu_rates import Scale, WorkerState

    whole = Scale("resnet18", 32, 100, 500, 5, (1, 2, 4, 8, 16), 10, 6, 2, "")
    tiny = Scale(
        "cnn", 8, 4, 36, 1, (1, 2), 3, 4, 2,
        "model.name='cnn' run.clients=4 run.cohort=3 local.epochs=1 partition.name='iid'",
    )  # fmt: skip
    torch.set_num_threads(1)  # as each client has; more would split sums in other places
    bench = WorkerState(torch.device(options.device), tiny if options.tiny else whole)
    parts: dict[str, Callable[[], Iterator[dict]]] = {
        "checks": lambda: checks(bench),
        "rates": lambda: rates(bench),
        "fused": lambda: fused(bench),
        "profile": lambda: profiled(bench),
        "rounds": lambda: rounds(bench, options.data),
        "queues-8": lambda: rates(bench, (bench.scale.many,), ("tf32",)),
        "queues-32": lambda: rates(bench, (bench.scale.many,), ("tf32",)),
        "convolutions": lambda: gpu_trials.convolutions(bench),
        "grouped": lambda: gpu_trials.convolutions(bench, bench.scale.many),
        "compile": lambda: gpu_trials.compiled(bench),
        "sweep": lambda: rates(bench, bench.scale.at_once, ("tf32", "bf16")),
        "two-of-four": lambda: two_of_four(bench),
    }
    for row in parts[part]():
        write(options.out, {"part": part, **row})
        print(f"{part}: {line(row)}", flush=True)


# ---- the window --------------------------------------------------------------------------------


def write(out: Path, row: dict) -> None:
    with (out / RECORD).open("a") as file:
        file.write(json.dumps(row) + "\n")


def line(row: dict) -> str:
    """Return a row on one line: what it is of, and its first numbers."""
    words = [f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()]
    return " ".join(word for word in words if len(word) < 90)


def window(options: argparse.Namespace) -> int:
    """Play the parts one after the other; return 0 if all of them ended well and all bits were the same."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / RECORD).unlink(missing_ok=True)
    began = time.monotonic()
    machine = "import json; from ssfl_app.results.recorder import environment; import torch; print(json.dumps({"
    machine += "**environment(), 'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()}))"
    known = subprocess.run(
        [sys.executable, "-c", machine], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    said = known.stdout.splitlines()
    write(options.out, {"part": "machine", **(json.loads(said[-1]) if said else {"error": known.stderr[-300:]})})
    well = True
    for part, limit in LIMITS.items():
        left = 60 * options.minutes - (time.monotonic() - began)
        if left < 5:
            write(options.out, {"part": part, "ended": "no time was left"})
            print(f"{part}: no time was left", flush=True)
            well = False
            continue
        start = time.monotonic()
        ended = run_part(part, options, min(limit, left))
        seconds = time.monotonic() - start
        write(options.out, {"part": part, "ended": ended, "seconds": seconds})
        print(f"== {part}: {ended} after {seconds:.0f} s", flush=True)
        well = well and ended == "well"
    rows = read(options.out / RECORD)
    different = [row["check"] for row in rows if row.get("same") is False]
    print(f"bits differ: {', '.join(different)}" if different else "all bits are the same", flush=True)
    return 0 if well and not different else 1


def run_part(part: str, options: argparse.Namespace, seconds: float) -> str:
    """Play a part in a process; return how it ended."""
    words = [sys.executable, __file__, str(options.out), "--part", part, "--device", options.device]
    words += [*(["--tiny"] if options.tiny else []), *(["--data", str(options.data)] if options.data else [])]
    with (options.out / "gpu_window.stderr").open("a+") as errors:
        begin = errors.tell()
        try:
            code = subprocess.run(words, stderr=errors, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"cut at {seconds:.0f} s"
        errors.seek(begin)
        lines = [text.strip() for text in errors if text.strip()]
    named = [text for text in lines if re.match(r"[\w.]*(Error|Exception|Failed|Interrupt)\b", text)]
    return "well" if code == 0 else f"failed with {code}: {[*lines[-1:], *named, 'no word'][-2][:300]}"


def read(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def show(path: Path) -> str:
    """Return a record as Markdown: a table for each part."""
    rows = read(path)
    machine = next(row for row in rows if row["part"] == "machine")
    day = datetime.fromisoformat(machine["time"]).date() if "time" in machine else "no date"
    text = [f"{machine.get('gpu') or machine.get('cpu')}, {day}, torch {machine.get('torch')}"]
    for part in LIMITS:
        found = [row for row in rows if row["part"] == part]
        ended = next((row["ended"] for row in found if "ended" in row), "not played")
        found = [{k: v for k, v in row.items() if k != "part"} for row in found if "ended" not in row]
        text += ["", f"**{part}**: {ended}", ""]
        plain = [k for k in (found[0] if found else {}) if not isinstance(found[0][k], list | dict)]
        if plain:
            text += [f"| {' | '.join(plain)} |", "|" + " --- |" * len(plain)]
            text += [f"| {' | '.join(cell(row.get(key)) for key in plain)} |" for row in found]
    return "\n".join(text) + "\n"


def cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help=f"folder for {RECORD}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a minute, for a test of this script")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; else random images")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts")
    parser.add_argument("--part", choices=tuple(LIMITS), help="play this one, in this process")
    parser.add_argument("--show", action="store_true", help="print OUT (a record, or a folder with one) as Markdown")
    options = parser.parse_args()
    if options.show:
        print(show(options.out / RECORD if options.out.is_dir() else options.out), end="")
        return 0
    if options.part:
        play(options.part, options)
        return 0
    if options.device == "cuda":
        ask = "import torch, sys; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", ask], check=False).returncode:
            print("no CUDA here: this measures a GPU (--device cpu --tiny only tries it out)", file=sys.stderr)
            return 2
    return window(options)


if __name__ == "__main__":
    sys.exit(main())
