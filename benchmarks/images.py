"""CIFAR-10 images on a CPU, as many runs as fit: python -m benchmarks.images --data DIR --minutes M [--jobs 2]

The common terms are those of configs/cifar10-study.toml; `plan` has the runs, the most important first: those that
two cores play in a night, or with --all every run that was thought of. The first one is the gate, dense FedAvg: if
it stays below `GATE`, nothing else is played. What the end of the minutes cuts goes on with the next call, from its
checkpoint in --out; a run that the record has is not played again, but one that failed. Each run that ends is
written to benchmarks/results/images.json at once, and the tables beside it are made of that file alone.

"narrow" are dense networks of uniform width that have as many parameters as the masked ones have alive ones, biases
and norms included. "channels" are the networks of fewer channels of mask.granularity "channel", with a share of the
parameters; "FLOPs as narrow" those with a share of the multiplications, that of the narrow network beside them.
Accuracies are means of the last three evaluations.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ssfl_app import config as configuration
from ssfl_app.experiments import jobs
from ssfl_app.experiments.run_spec import RunSpec, planned
from ssfl_app.files import write_bytes, write_json
from ssfl_app.results.compare import estimate, numbers
from ssfl_app.results.run_folder import CENTRAL, LOCAL, PERSONAL, evaluated, read_run
from ssfl_app.results.table import NONE, Table, megabytes
from ssfl_app.simulation.command import Engine
from ssfl_app.sparsity.layout import Layout
from ssfl_app.training.models import ModelOptions, outline, width_for
from ssfl_app.training.narrow import flops, of_widths

ROOT = Path(__file__).parents[1]
TERMS = ROOT / "configs" / "cifar10-study.toml"
RECORD = ROOT / "benchmarks" / "results" / "images.json"
INPUT = (3, 32, 32), 10
GATE = 0.6
LAST = 3  # evaluations that an accuracy is the mean of
SEEDS = (1, 2, 3)

DENSE = {"dense": "strategy='fedavg'"}
MASKS = {"ssfl": "strategy='ssfl'", "shuffled": "strategy='shuffled'"}
CONTROLS = {"random": "strategy='random'", "narrow": "strategy='fedavg'"}
LAYERWISE = {"random, layer by layer": "strategy='random' mask.scope='layer'"}
LEADERS = MASKS | CONTROLS | LAYERWISE
AT_FLOPS = "ssfl, channels, FLOPs as narrow"
CHANNELS = {
    "ssfl": "strategy='ssfl'",
    "ssfl, channels": "strategy='ssfl' mask.granularity='channel'",
    "narrow": "strategy='fedavg'",
    "random, channels": "strategy='random' mask.granularity='channel'",
    AT_FLOPS: "strategy='ssfl' mask.granularity='channel' mask.budget='flops'",
}
# Knobs that a method's own paper turns: SparsyFed's rate; PruneFL's 50 rounds are more than there are here.
OTHERS = {
    "prunefl": "strategy='prunefl' prunefl.every=10",
    "sparsyfed, rate 0.5": "strategy='sparsyfed' local.lr=0.5",
    "flash": "strategy='flash'",
    "topk": "strategy='topk'",
    "local-saliency": "strategy='local-saliency'",
}
PERSONAL_MASKS = {"random-local": "strategy='random-local'", "dispfl": "strategy='dispfl'"}
# Other ways to choose the mask: what they change tells why SSFL's is as good as it is.
CAUSES = {
    "ssfl, layer by layer": "mask.scope='layer'",
    "ssfl, iterative": "ssfl.criterion='iterative-snip'",
    "ssfl, force": "ssfl.criterion='force'",
    "ssfl, synflow": "ssfl.criterion='synflow'",
}
# What the paper leaves open or has in an appendix; SSFL itself asks all clients for one balanced minibatch.
ABLATIONS = {
    **{f"ssfl, {count} minibatches": f"ssfl.saliency-batches={count}" for count in (2, 4, 8, 16)},
    **{f"ssfl, share {share} of the clients asked": f"ssfl.saliency-share={share}" for share in (0.1, 0.2, 0.5)},
    "ssfl, plain minibatches": "ssfl.saliency-sampling='plain'",
    "ssfl, uniform weights of the clients": "ssfl.saliency-weighting='uniform'",
    **{f"ssfl, mask after {rounds} dense rounds": f"ssfl.warmup-rounds={rounds}" for rounds in (1, 2)},
}
# As many image passes as with ten clients: a tenth of the images a round, ten times the rounds.
LARGER = "run.clients=100 run.rounds=400 run.evaluate-every=50 run.checkpoint-every=10 local.lr-decay=0.99426"


class Entry(NamedTuple):
    """A run of the study: where it stands in the tables, and what is played."""

    part: str
    row: str
    density: float
    run: RunSpec


def plan(given: dict[str, Any], everything: bool = False) -> list[Entry]:
    """Return the runs, the most important one first; `given` keys have the last word in all of them.

    Parameters
    ----------
    everything : bool
        Also what a CPU has no time for: 138 runs in place of 27.
    """
    part, first = partial(entries, given), SEEDS[:1]
    ten, larger, how = "ten clients", "100 clients, 10 a round", "ten clients, how ssfl chooses"
    found = list(part(ten, DENSE, [0.05], first))
    found += [entry for seed in SEEDS for entry in part(ten, MASKS | CONTROLS, [0.05], [seed])]
    found += part(ten, CHANNELS, [0.1], first)
    found += part(ten, LAYERWISE | OTHERS, [0.05], first)
    found += [*part(ten, MASKS, [0.02], first), *part(ten, {"ssfl": MASKS["ssfl"]}, [0.2], first)]
    if everything:
        found += part(ten, DENSE | LAYERWISE, [0.05], SEEDS)
        found += part(ten, PERSONAL_MASKS, [0.05], first)
        found += part(ten, CHANNELS, [0.1, 0.25], SEEDS)
        found += part(ten, LEADERS, [0.1, 0.2, 0.02], first)
        found += part(how, CAUSES, [0.05], first)
        found += part(how, ABLATIONS, [0.05, 0.1], first)
        found += part(ten, LEADERS, [0.1, 0.2, 0.02], SEEDS[1:])
        for seed in SEEDS:
            found += part(larger, DENSE | LEADERS, [0.05], [seed], LARGER)
    return list({entry.run.slug: entry for entry in found}.values())


def entries(
    given: dict[str, Any],
    part: str,
    rows: dict[str, str],
    densities: Sequence[float],
    seeds: Sequence[int],
    terms: str = "",
) -> Iterator[Entry]:
    """Yield the rows of a part of the study at all densities, for all seeds."""
    for density in densities:
        for seed in seeds:
            for row, keys in rows.items():
                own = configuration.read_overrides([terms, keys]) | {"run.seed": seed, "mask.density": density}
                if row == "narrow":
                    own["model.width"] = narrow(density)
                elif row == AT_FLOPS:
                    own["mask.density"] = narrow_flops(density)
                flat = configuration.merge(configuration.read_file(TERMS), own, given)
                words = [part, row, *([] if row in DENSE else [f"d{density}"]), f"s{seed}"]
                slug = re.sub(r"[^\w.]+", "-", "-".join(words))
                run = replace(planned(flat, dense=row in DENSE), slug=slug, name=", ".join(words))
                yield Entry(part, row, density, run)


def narrow(density: float) -> float:
    """Return the width at which the dense model has as many parameters as a mask of this density leaves alive."""
    options = ModelOptions(str(configuration.read_file(TERMS)["model.name"]))
    layout = Layout.of(outline(options, *INPUT))
    return width_for(options, *INPUT, layout.size - layout.prunable_size + round(density * layout.prunable_size))


def narrow_flops(density: float) -> float:
    """Return the share of the dense model's multiplications that the narrow one of this density does."""
    name = str(configuration.read_file(TERMS)["model.name"])
    nets = [outline(ModelOptions(name, width=width), *INPUT) for width in (narrow(density), 1.0)]
    small, whole = (flops(net, INPUT[0]) for net in nets)
    return small / whole


def keys_of(run: RunSpec) -> dict[str, Any]:
    """Return what differs from the defaults, but for where the data lie: what a run is in the record."""
    defaults = configuration.defaults(run.flat["strategy"])
    return {key: value for key, value in run.flat.items() if value != defaults.get(key) and key != "data.path"}


def place(entry: Entry) -> dict[str, Any]:
    """Return what the record says of a run however it ended."""
    seed = entry.run.flat["run.seed"]
    known = {"part": entry.part, "row": entry.row, "mask_density": entry.density, "seed": seed}
    return known | {"keys": keys_of(entry.run)}


def measured(entry: Entry, home: Path) -> dict[str, Any]:
    """Return the record of a run that is finished."""
    run = read_run(home)
    means, at = {}, set[int]()
    for name, key in (("central", CENTRAL), ("global", LOCAL), ("personal", PERSONAL)):
        where, values = evaluated(run, key)
        means[name] = mean(values[-LAST:].tolist())
        at |= set(where[-LAST:].tolist())
    means["own"] = means["global"] if means["personal"] is None else means["personal"]
    known = run.summary or {}
    return {
        **place(entry),
        **numbers(run),
        **means,
        "train_loss": mean(run.rounds[i]["train_loss"] for i in sorted(at)),
        "central_by_round": {r["round"]: r[CENTRAL] for r in run.rounds if r.get(CENTRAL) is not None},
        "layers": {layer.name: layer.alive / layer.size for layer in run.layers},
        **{key: known.get(key) for key in KNOWN},
        "environment": run.environment,
    }


KNOWN = ("parameters", "prunable", "alive", "model_sha256", "mask_sha256", "widths")
"""What the record of a run has of its summary."""


class Study:
    """The record of the runs that are finished or failed, by slug, and its tables; `say` is told what happens."""

    def __init__(self, runs: Sequence[Entry], record: Path, homes: Path) -> None:
        self.runs, self.record, self.homes = {entry.run.slug: entry for entry in runs}, record, homes
        self.known: dict[str, Any] = json.loads(record.read_text("utf-8"))["runs"] if record.is_file() else {}
        self.take()

    def waiting(self) -> list[RunSpec]:
        """Return the runs that the record lacks, or has as failed or with other keys, in their order."""
        told = {slug: known["keys"] for slug, known in self.known.items() if "failed" not in known}
        return [entry.run for slug, entry in self.runs.items() if told.get(slug) != keys_of(entry.run)]

    def take(self, failed: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write what is finished or failed into the record, and the tables; `failed` now: slug -> why."""
        for run in self.waiting():
            home, entry = self.homes / run.slug, self.runs[run.slug]
            stands = jobs.state(run, home)
            if stands == "finished":
                self.known[run.slug] = self.measured(entry, home)
            elif why := failed.get(run.slug, "") or (jobs.old_reason(home) if stands == "unfinished" else ""):
                self.known[run.slug] = place(entry) | {"failed": why}
        write_json(self.record, {"runs": self.known})
        write_bytes(self.record.with_suffix(".md"), self.page().encode())

    def measured(self, entry: Entry, home: Path) -> dict[str, Any]:
        """Return the record of a run that is finished."""
        return measured(entry, home)

    def page(self) -> str:
        """Return what stands beside the record."""
        return tables(self.known.values())

    def play(self, out: Path, end: float, at_once: int) -> str:
        """Play what waits and fits before `end`, a time of `time.monotonic`; return what is to be said then."""
        if waiting := self.waiting():
            jobs.check_all(waiting)
            some = {"homes": self.homes, "at_once": at_once, "budget": end - time.monotonic()}
            jobs.play(waiting, out, Engine(), say, self.result, **some)
        failed = sum("failed" in known for known in self.known.values())
        done = len(self.runs) - len(self.waiting())
        return f"{done} of {len(self.runs)} runs are in {self.record}, {failed} failed"

    def result(self, run: RunSpec, why: str) -> str:
        """Return what is told of a run that ended or was cut."""
        self.take({run.slug: why} if why else {})
        if not why and jobs.state(run, self.homes / run.slug) == "finished":
            return f"central {percent(self.known[run.slug]['central'])} %"
        home = self.homes / run.slug
        done = read_run(home).rounds if (home / "rounds.jsonl").is_file() else []
        return why or f"round {done[-1]['round'] if done else 0} of {run.flat['run.rounds']}; goes on next time"


def play(runs: Sequence[Entry], record: Path, out: Path, minutes: float, at_once: int) -> str:
    """Play what fits and return what is to be said at the end."""
    end = time.monotonic() + 60 * minutes
    study = Study(runs, record, out / "runs")
    gate = runs[0].run
    if gate in study.waiting():
        jobs.check_all([gate])
        some = {"homes": study.homes, "budget": end - time.monotonic()}
        jobs.play([gate], out, Engine(), say, study.result, **some)
    if gate in study.waiting():
        return f"the gate {study.known.get(gate.slug, {}).get('failed', 'is not finished')}"
    if ((reached := study.known[gate.slug]["central"]) or 0) < GATE:
        return f"the gate, {gate.name}, reached {percent(reached)} %, below {percent(GATE)} %: nothing else is played"
    return study.play(out, end, at_once)


def tables(known: Sequence[dict[str, Any]]) -> str:
    """Return a table for each part of the study, means over seeds with their 95 % intervals, and why runs failed."""
    lines = ["# CIFAR-10 images on a CPU", ""]
    for part in dict.fromkeys(each["part"] for each in known):
        rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
        for each in known:
            if each["part"] == part:
                rows.setdefault((1.0 if each["row"] in DENSE else each["mask_density"], each["row"]), []).append(each)
        order = sorted(rows, key=lambda pair: -pair[0])
        made = [cells(row, density, rows[density, row]) for density, row in order]
        lines += [f"## {part}", "", *Table(HEADERS, made, 1).markdown(), ""]
        lost = [(*pair, run) for pair in order for run in rows[pair] if "failed" in run]
        said = [f"- {row}, density {density:g}, seed {run['seed']}: {run['failed']}." for density, row, run in lost]
        lines += [*said, ""] if said else []
    environments = [each["environment"] for each in known if "failed" not in each]
    for cores, cpu in sorted({(each["cores"], each["cpu"]) for each in environments}):
        dates = sorted(each["time"][:10] for each in environments if each["cpu"] == cpu)
        lines.append(f"{cores} cores of {cpu}, no GPU, {dates[0]} to {dates[-1]}. {NOTE}")
    return "\n".join([*lines, ""])


HEADERS = ["row", "density", "seeds", "central %", "own tests %", "train loss", "alive parameters"]
HEADERS += ["MFLOPs", "MB", "image passes", "minutes"]
NOTE = (
    "± is half the 95 % interval of the mean over seeds. Accuracies and the clients' loss are means of the last "
    f"{LAST} evaluated rounds; own tests: the personal model where a method has one. MFLOPs: what torch does in a "
    "forward pass of an image, also by zeros. MB: training, masks and discovery, both directions. Minutes are of a "
    "run beside other work."
)


def cells(row: str, density: float, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row of a table: means of the runs that did not fail, "failed" in place of them if all did."""
    known = [run for run in runs if "failed" not in run]
    if not known:
        return [row, f"{density:g}", NONE, "failed", *[NONE] * (len(HEADERS) - 4)]

    def share(key: str) -> str:
        found = estimate(run[key] for run in known if run[key] is not None)
        if found is None:
            return NONE
        return percent(found.mean) + (f" ± {percent(found.half)}" if found.half is not None else "")

    def shown(values: Iterable[float | None], form: str) -> str:
        return NONE if (found := mean(values)) is None else format(found, form)

    def each(*keys: str) -> Iterator[float | None]:
        return (None if None in (found := [run[key] for key in keys]) else math.prod(found) for run in known)

    seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in known))
    seeds += f" (of {len(runs)})" if len(known) < len(runs) else ""
    sent = [run["down"] + run["up"] for run in known]
    costs = [megabytes(statistics.fmean(sent)), shown(each("image_passes"), ",.0f")]
    minutes = shown((None if run["seconds"] is None else run["seconds"] / 60 for run in known), ".0f")
    shares = [share("central"), share("own"), shown(each("train_loss"), ".3f")]
    work = f"{statistics.fmean(map(forward_flops, known)) / 1e6:.1f}"
    alive = shown(each("density_all", "parameters"), ",.0f")
    return [row, f"{density:g}", seeds, *shares, alive, work, *costs, minutes]


def forward_flops(known: dict[str, Any]) -> int:
    """Return the floating-point operations of a forward pass of an image, of the study's size, by a recorded run."""
    section = "model."
    options = {key[len(section) :]: value for key, value in known["keys"].items() if key.startswith(section)}
    net = outline(ModelOptions(**options), *INPUT)
    if widths := known.get("widths"):
        net = of_widths(net, Layout.of(net), tuple(widths.values()))
    return flops(net, INPUT[0])


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of those that are known, None of none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def say(text: str) -> None:
    print(text, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Play what fits into the minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train and test parquet files of CIFAR-10")
    parser.add_argument("--minutes", type=float, required=True, help="0: make the tables of the record")
    parser.add_argument("--all", action="store_true", help="the whole plan, also what a CPU has no time for")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "images", help="of the run folders")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("-c", action="append", default=[], help="keys that all runs get; take another --record")
    given = parser.parse_args(words)
    keys = configuration.read_overrides([*given.c, f"data.path='{given.data}'"])
    say(play(plan(keys, given.all), given.record, given.out.resolve(), given.minutes, given.jobs))


if __name__ == "__main__":
    main()
