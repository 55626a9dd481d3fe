"""simulation.md and scale.svg from simulation.json: no number that is not computed here from the record."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.simulation.app import ENGINES
from benchmarks.simulation.efficiency import STRATEGIES
from benchmarks.simulation.many import GOAL_MS, GOAL_SPREAD, overhead
from benchmarks.simulation.turns import middle, quotient
from ssfl_app.results.plots import FAINT, INK, PALETTE, svg_bytes

EFFICIENCY = {"cifar10": 0.9, "digits": 0.6}
STOCK, PFL, STARTUP = 2.0, 1.0, 3.0
TURNS = "All took turns; quotients are within a turn: median, least and most."
Part = dict[str, Any]


def write_table(known: dict[str, Part], folder: Path) -> None:
    """Write the page of a record, and the plots of the parts that it has."""
    lines = ["# Simulation on CPU", "", "Written by `python -m benchmarks.simulation.run`.", ""]
    lines += [*table(("goal", "measured", ""), (row for _, *row in goals(known))), ""]
    for name, section in SECTIONS.items():
        if name in known:
            lines += [*section(known[name]), ""]
    if "scale" in known:
        (folder / "scale.svg").write_bytes(svg_bytes(lambda: plot(known["scale"]["cases"])))
        lines += ["![Cost against scale](scale.svg)", ""]
    if "many" in known:
        (folder / "many.svg").write_bytes(svg_bytes(lambda: plot_many(known["many"])))
        lines += ["![Cost of many clients](many.svg)", ""]
    (folder / "simulation.md").write_text("\n".join(lines))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return lines of a Markdown table."""
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def verdict(part: Part, met: bool) -> str:
    return "no measurement" if part["tiny"] else "met" if met else "**not met**"


def judged(part: Part, found: float, goal: float) -> str:
    """Return the verdict on an efficiency: one above 1 says that the reference was disturbed."""
    return "disturbed: above 1" if found > 1.02 and not part["tiny"] else verdict(part, found >= goal)


def spread(found: Mapping[str, float], unit: str = "") -> str:
    """Return the median of the turns, and between which values they lie."""
    return f"{found['median']:.2f}{unit} ({found['least']:.2f} to {found['most']:.2f})"


def where(part: Part) -> str:
    """Return a line that says on what a part was measured, when, and what else ran there."""
    env = part["environment"]
    return (
        f"{env['cores']} cores of {env['cpu']}, {part['date']}, flwr {env['flwr']}, ray {env['ray']}, "
        f"torch {env['torch']}, commit {env['git']}; load before and after {part['load_before']:.1f} and "
        f"{part['load_after']:.1f}; took {part['took_seconds'] / 60:.1f} minutes"
        + ("; TINY: no measurement." if part["tiny"] else ".")
    )


def goals(known: dict[str, Part]) -> Iterator[tuple[Part, str, str, str]]:
    """Yield the part that measured it, the goal, what was measured, and the verdict."""
    for name, found in JUDGES.items():
        if name in known:
            yield from ((known[name], *row) for row in found(known[name]))


def judged_efficiency(part: Part) -> Iterator[tuple[str, str, str]]:
    for task, goal in EFFICIENCY.items():
        for strategy, engine in product(STRATEGIES, ENGINES):
            found = part[task]["efficiency"][f"ssfl run, {strategy}, {engine}"]["noted"]
            what = f"efficiency at least {goal}, {task}, `{strategy}`, {engine}"
            yield what, spread(found), judged(part, found["median"], goal)
    plan = part["cifar10"]["plan"]
    yield "an actor a core with one torch thread, printed", f"`{plan['printed']}`", verdict(part, plan["met"])


def judged_peers(part: Part) -> Iterator[tuple[str, str, str]]:
    for task in EFFICIENCY:
        for engine, faster in part[task]["faster"].items():
            for name, key, goal in (("stock Flower's", "stock", STOCK), ("pfl's", "pfl", PFL)):
                what = f"rounds a second at least {goal:g} x {name}, {task}, {engine}"
                yield what, spread(faster[key], " x"), verdict(part, faster[key]["median"] >= goal)


def judged_startup(part: Part) -> Iterator[tuple[str, str, str]]:
    # Both readings of the goal: they can disagree, since the two begin round 1 at different stages (startup.py).
    for what, key in (("first round's begin", "above_begin"), ("end of round 1 less a typical round", "above")):
        above = part[key]
        goal = f"start-up at most {STARTUP:g} s above `flwr run`, {what}"
        yield goal, f"{above:+.1f} s", verdict(part, above <= STARTUP)


def judged_scale(part: Part) -> Iterator[tuple[str, str, str]]:
    def span(key: str, unit: float, digits: int) -> str:
        values = [case[key] / unit for case in part["cases"]]
        return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"

    what = f"cost of {span('clients', 1, 0)} clients and {span('parameters', 1e6, 1)} million parameters, plotted"
    found = f"{span('seconds', 1, 1)} s a round, {span('peak_bytes', 1e6, 0)} MB at the server's peak"
    yield what, found, verdict(part, True)


def judged_many(part: Part) -> Iterator[tuple[str, str, str]]:
    for engine, strategy in product(ENGINES, STRATEGIES):
        own = [case for case in part["cases"] if (case["engine"], case["strategy"]) == (engine, strategy)]
        largest = max(own, key=lambda case: case["clients"])
        costs = {phase: overhead(part, largest, phase) for phase in ("scores", "train", "test")}
        told = ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in costs.items() if ms is not None)
        what = f"{largest['clients']:,} clients, {largest['cohort']} a round, `{strategy}`, {engine}: at most "
        yes = all(ms <= GOAL_MS for ms in costs.values() if ms is not None)
        yield what + f"{GOAL_MS:g} ms a client beside the computation", told, verdict(part, yes)
        peaks = {case["clients"]: case["peak_bytes"] for case in own}
        grown = peaks[max(peaks)] / peaks[min(peaks)] - 1
        what = (
            f"server memory of {max(peaks):,} clients at most {100 * GOAL_SPREAD:g} % above that of {min(peaks):,}, "
        )
        yield what + f"`{strategy}`, {engine}", f"{100 * grown:+.0f} %", verdict(part, grown <= GOAL_SPREAD)


JUDGES = {
    "efficiency": judged_efficiency,
    "peers": judged_peers,
    "startup": judged_startup,
    "scale": judged_scale,
    "many": judged_many,
}


def efficiency(part: Part) -> Iterator[str]:
    yield from ("## Efficiency", "", where(part), "")
    yield (
        "Seconds of a round's training in plain PyTorch, the faster of two ways to use all cores, by wall seconds of "
        f"the app's rounds, without round 1 and the last one. CIFAR-10: its first {part['images']:,} images. {TURNS}"
    )
    for task in EFFICIENCY:
        found = part[task]
        yield from ("", f"### {task}", "", f"`{found['keys'].strip()}`", "")
        rows = []
        for name, runs in found["runs"].items():
            own = found["efficiency"].get(name)
            cells = (spread(own["noted"]), spread(own["from_end_to_end"])) if own else ("", "")
            rows.append((name, f"{middle(runs, 'noted' if own else 'typical'):.3f}", *cells))
        yield from table(("", "s a round", "efficiency", "with what is between rounds"), rows)
        loss, equal = found["loss_of_round_1"], "equal" if found["same_training"] else "NOT EQUAL"
        yield from ("", f"Loss of round 1: plain {loss['plain']:.6f}, fedavg {loss['app']:.6f}, {equal}.")


def peers(part: Part) -> Iterator[str]:
    yield from ("## Side by side", "", where(part), "")
    yield f"Seconds from the end of a round to the end of the next, without the first and the last round. {TURNS}"
    for task in EFFICIENCY:
        runs = part[task]["runs"]
        rows = [
            (name, f"{middle(own):.3f}", *(spread(quotient(own, runs[f"ssfl run, fedavg, {e}"])) for e in ENGINES))
            for name, own in runs.items()
        ]
        head = ("", "s a round", *(f"by `ssfl run`, fedavg, {engine}" for engine in ENGINES))
        yield from ("", f"### {task}", "", f"`{part[task]['keys'].strip()}`", "", *table(head, rows))
        versions = next(run["versions"] for own in runs.values() for run in own if "versions" in run)
        yield from ("", "pfl's environment: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".")


def busy(part: Part) -> Iterator[str]:
    yield from ("## Where the rest of a round goes", "", where(part), "")
    yield "`fedavg`: shares of all cores that kinds of processes have between the first round and the last."
    kinds = ("trains", "server", "SuperLink", "Ray", "launcher")
    rows = [
        (task, engine, *(f"{100 * row[kind]:.1f} %" if kind in row else "" for kind in kinds), f"{idle(row):.1f} %")
        for task in EFFICIENCY
        for engine, row in part[task].items()
    ]
    yield from ("", *table(("", "", *kinds, "cores wait"), rows))


def idle(row: Mapping[str, float]) -> float:
    """Return the percent of all cores that nobody uses."""
    return 100 * (1 - sum(row.values()))


def startup(part: Part) -> Iterator[str]:
    yield from ("## Start-up", "", where(part), "", f"`{part['keys'].strip()}`", "")
    yield "Seconds after the command was started, medians. Start-up: the end of round 1 less a typical round."
    keys = ("startup", "round_1_begins", "round_1_ends", "whole_command")
    rows = [(f"`{name}`", *(f"{found[key]:.1f}" for key in keys)) for name, found in part["medians"].items()]
    yield from ("", *table(("", "start-up", "round 1 begins", "round 1 ends", "whole command"), rows))


def scale(part: Part) -> Iterator[str]:
    yield from ("## Cost against scale", "", where(part), "")
    yield (
        "All clients train in every round, one step each. Setup: SSFL's discovery. Memory: anonymous and shared "
        "pages of the process with ServerApp and Ray's driver, before the first model is sent and at its peak."
    )
    rows = [
        (
            f"`{case['strategy']}`",
            case["model"],
            f"{case['parameters']:,}",
            f"{case['clients']:,}",
            f"{case['seconds']:.2f}",
            f"{case['setup_seconds']:.2f}",
            f"{case['down'] / 1e6:.2f}",
            f"{case['up'] / 1e6:.2f}",
            f"{case['idle_bytes'] / 1e6:.0f}",
            f"{case['peak_bytes'] / 1e6:.0f}",
        )
        for case in part["cases"]
    ]
    head = ("", "model", "parameters", "clients", "s a round", "setup s", "MB down a round", "MB up")
    yield from ("", *table((*head, "server MB idle", "at its peak"), rows))


def many(part: Part) -> Iterator[str]:
    yield from ("## Many clients", "", where(part), "")
    bare = ", ".join(f"{phase} {1e3 * seconds:.2f} ms" for phase, seconds in part["bare"].items())
    yield (
        "All clients are asked for scores (SSFL) and test the last model; the cohort trains one step on four images. "
        f"ms a client: wall time by clients, less what plain PyTorch takes on one core ({bare}) by the cores."
    )
    rows = [
        (
            case["engine"],
            f"`{case['strategy']}`",
            f"{case['clients']:,}",
            *("" if ms is None else f"{ms:.2f}" for ms in (overhead(part, case, p) for p in part["bare"])),
            f"{case['round_seconds']:.2f}",
            f"{case['command_seconds']:.0f}",
            f"{case['peak_bytes'] / 1e6:.0f}",
            f"{case['record_bytes'] / 1e6:.1f}",
        )
        for case in part["cases"]
    ]
    head = ("engine", "", "clients", *(f"{p}, ms a client" for p in part["bare"]), "s a round", "s in all")
    yield from ("", *table((*head, "server MB at its peak", "MB of the run folder"), rows))


SECTIONS = {"efficiency": efficiency, "peers": peers, "busy": busy, "startup": startup, "scale": scale, "many": many}


def plot(cases: list[Part]) -> Any:
    """Return seconds, memory and bytes against clients, and against parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 3)
    costs = (("s a round", "seconds", 1.0), ("server memory, MB", "peak_bytes", 1e6), ("MB a round", "bytes", 1e6))
    smallest, fewest = (min(case[key] for case in cases) for key in ("parameters", "clients"))
    sides = (("clients", "parameters", smallest), ("parameters", "clients", fewest))
    for line, (x, fixed, value) in zip(panels, sides, strict=True):
        for axes, (label, key, unit) in zip(line, costs, strict=True):
            for colour, strategy in zip(PALETTE, ("ssfl", "fedavg"), strict=False):
                own = [case for case in cases if case["strategy"] == strategy and case[fixed] == value]
                own = sorted((case | {"bytes": case["down"] + case["up"]} for case in own), key=lambda case: case[x])
                ys = [case[key] / unit for case in own]
                axes.plot([case[x] for case in own], ys, "o-", color=colour, ms=4, lw=1.6, label=strategy)
            axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
            axes.grid(color=FAINT, lw=0.6)
            axes.tick_params(colors=INK, labelsize=8.5)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_title(f"{value:,} {fixed}", loc="left", fontsize=10, color=INK)
    panels[0][0].legend(frameon=False)
    return figure


def plot_many(part: Part) -> Any:
    """Return what a client costs in each phase, and server memory, against the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 4)
    labels = {"scores": "ms a scored client", "train": "ms a trained client", "test": "ms a tested client"}
    for axes, phase in zip(panels, (*labels, ""), strict=True):
        for colour, (engine, strategy) in zip(PALETTE, product(ENGINES, STRATEGIES), strict=False):
            own = [case for case in part["cases"] if (case["engine"], case["strategy"]) == (engine, strategy)]
            ys = [overhead(part, case, phase) if phase else case["peak_bytes"] / 1e6 for case in own]
            if None not in ys:
                xs = [case["clients"] for case in own]
                axes.plot(xs, ys, "o-", color=colour, ms=4, lw=1.6, label=f"{strategy}, {engine}")
        if phase:
            axes.axhline(GOAL_MS, color=FAINT, lw=1.2, ls="--")
        axes.set(xscale="log", ylim=(0, None), xlabel="clients", ylabel=labels.get(phase, "server memory, MB"))
        axes.tick_params(colors=INK, labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize=8)
    return figure
