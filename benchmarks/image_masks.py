"""Mask error beside accuracy on CIFAR-10 images: python -m benchmarks.image_masks --data DIR

How far SSFL's mask of n minibatches is from the mask of all training images (`ssfl study masks`, oracle (a)), beside
what runs with such a mask reach, by the record of benchmarks/images.py. With ten clients, n below 10 is a share of
them, n above it several minibatches of each. Written to benchmarks/results/image-masks.{json,png}; --record-only
draws the picture again from that file and the record.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.images import ABLATIONS, DENSE, RECORD, TERMS
from ssfl_app import config as configuration
from ssfl_app.experiments.mask_study import study_masks
from ssfl_app.files import write_bytes, write_json
from ssfl_app.results.compare import estimate
from ssfl_app.results.plots import LINES, PALETTE, _figure, _finish, png_bytes
from ssfl_app.results.study_plots import SCORES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSITIES = (0.05, 0.1)
REPEATS = 5


def minibatches() -> dict[str, int]:
    """Return how many minibatches the mask of a row of the study is made of."""
    clients = int(configuration.read_file(TERMS)["run.clients"])
    found = {"ssfl": clients}
    for row, text in ABLATIONS.items():
        keys = configuration.read_overrides([text])
        if "ssfl.saliency-batches" in keys:
            found[row] = clients * int(keys["ssfl.saliency-batches"])
        elif "ssfl.saliency-share" in keys:
            found[row] = round(clients * float(keys["ssfl.saliency-share"]))
    return found


def measured(given: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return the study of masks at both densities, as JSON has it."""
    flat = configuration.merge(configuration.read_file(TERMS), given)
    numbers = sorted(minibatches().values())
    studies = [study_masks(flat | {"mask.density": density}, numbers, repeats, print) for density in DENSITIES]
    return {str(density): study.record() for density, study in zip(DENSITIES, studies, strict=True)}


def accuracies(known: Sequence[dict[str, Any]], density: float) -> list[tuple[int, float]]:
    """Return (n, mean accuracy over seeds), rising n, of the runs that there are."""
    found = []
    for row, number in sorted(minibatches().items(), key=lambda pair: pair[1]):
        values = [
            run["central"]
            for run in known
            if (run["row"], run["mask_density"]) == (row, density) and run["part"].startswith("ten clients")
        ]
        if mean := estimate(values):
            found.append((number, mean.mean))
    return found


def picture(errors: dict[str, Any], known: Sequence[dict[str, Any]]) -> "Figure":
    """Return the two panels; a colour is a density."""
    figure = _figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    for index, density in enumerate(DENSITIES):
        look = {"color": PALETTE[index], "ls": LINES[index], "marker": "o", "ms": 4, "label": f"density {density}"}
        study = errors[str(density)]
        error = {
            key: [100 * value for value in study["errors"][SCORES]["error"][key]] for key in ("mean", "low", "high")
        }
        left.plot(study["batches"], error["mean"], **look)
        left.fill_between(study["batches"], error["low"], error["high"], color=PALETTE[index], alpha=0.18, lw=0)
        points = accuracies(known, density)
        right.plot([n for n, _ in points], [100 * value for _, value in points], **look)
    dense = estimate(run["central"] for run in known if run["row"] in DENSE and run["part"] == "ten clients")
    if dense:
        right.axhline(100 * dense.mean, color=PALETTE[-1], lw=1, label="dense")
    numbers, words = sorted(minibatches().values()), "Minibatches in the mean score, n"
    _finish(left, "Mask error |A xor B| / 2k against all training images", words, "%")
    _finish(right, "Central accuracy of runs with that mask", words, "%")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def main(words: Sequence[str] | None = None) -> None:
    """Measure the masks, and draw both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="folder with train and test parquet files of CIFAR-10")
    parser.add_argument("--record-only", action="store_true", help="measure nothing")
    parser.add_argument("--record", type=Path, default=RECORD, help="of benchmarks/images.py")
    parser.add_argument("-c", action="append", default=[], help="keys of the study of masks")
    given = parser.parse_args(words)
    made = given.record.with_name("image-masks.json")
    if not given.record_only:
        keys = configuration.read_overrides([*given.c, f"data.path='{given.data}'"])
        write_json(made, measured(keys, REPEATS))
    known = list(json.loads(given.record.read_text("utf-8"))["runs"].values())
    errors = json.loads(made.read_text("utf-8"))
    write_bytes(made.with_suffix(".png"), png_bytes(lambda: picture(errors, known)))


if __name__ == "__main__":
    main()
