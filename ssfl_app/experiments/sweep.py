"""What `ssfl compare` does: play the runs of a plan and compare them.

A run lives in ``DIR/runs/<slug>``; `jobs` says what becomes of a folder that is there already.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssfl_app.callbacks.stopping import KEYS
from ssfl_app.experiments.jobs import check_all, finish, old_reason, play, read_budget, state
from ssfl_app.experiments.run_spec import RunSpec
from ssfl_app.experiments.sweep_spec import SweepSpec, read_plan
from ssfl_app.experiments.tuning import Choice, Outcome, Search, at_an_end, choose, headline
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError
from ssfl_app.results.compare import COMMON, OWN, Entry, as_json, groups
from ssfl_app.results.compare_page import markdown, picture
from ssfl_app.results.report import write_picture
from ssfl_app.results.run_folder import metadata, read_run
from ssfl_app.results.table import in_metric
from ssfl_app.simulation.command import Engine

RULE = (
    "each row at each density tried {count} settings on the seeds {seeds}, which no table has, and is played with "
    "the best one. That has the best mean of personal models on own tests if the method has them, else of the global "
    "model on the whole test set; of equal ones it is the first. A setting of which a run failed is out."
)


def run_sweep(
    files: Sequence[Path],
    overrides: Sequence[str],
    out: Path | None,
    engine: Engine,
    jobs: int,
    budget: str,
    report_only: bool,
    say: Callable[[str], None],
) -> None:
    """Play what is missing and write the comparison; exit with 1 if a run failed, or on Ctrl-C.

    The arguments are those of `ssfl compare`; `say` is told in a line how far all have come. ConfigError: a run
    cannot be played, or its folder holds another one; nothing was played.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it is a number of at least 1")
    seconds, plan = read_budget(budget), read_plan(files, overrides)
    title = " + ".join(path.stem for path in files)
    folder = (out or Path("runs") / f"compare-{title.replace(' ', '')}").expanduser().resolve()
    sweep = Sweep(plan, folder)
    if report_only and not sweep.homes.is_dir():
        raise ConfigError(f"--out is {folder}; with --report-only it is a folder that `ssfl compare` wrote")
    if not report_only:
        check_all([*plan.runs, *(each.tried[0] for search in plan.searches for each in search.candidates)])
        sweep.play(engine, jobs, seconds, say)
    common, own = sweep.entries()
    made = groups([entry for _, entry in common], plan.axes, plan.baseline, COMMON if own else "")
    chosen = groups([entry for _, entry in own], plan.axes, plan.baseline, OWN)
    made = [group for each in made for group in (each, *(other for other in chosen if other.axes == each.axes))]
    played = {entry.run.folder: entry.run for _, entry in (*common, *own) if entry.run is not None}
    environments = [run.environment for run in played.values()]
    text = markdown(made, plan.baseline, environments, title, notes=sweep.notes())
    write_json(folder / "comparison.json", as_json(made, plan.baseline, environments) | sweep.record())
    write_bytes(folder / "comparison.md", text.encode())
    say(text)
    order = list(dict.fromkeys(run.row for run in plan.runs))
    say(write_picture(folder / "comparison.png", lambda: picture(made, order)))
    say(f"comparison: {folder / 'comparison.md'}")
    everything = sweep.runs()
    finish([run.name for run in everything if sweep.failure(run)], len(everything), interrupted=False)


class Sweep:
    """The runs of a plan in a folder, and what has become of them."""

    def __init__(self, plan: SweepSpec, folder: Path) -> None:
        self.plan, self.folder, self.homes = plan, folder, folder / "runs"
        self.failed: dict[str, str] = {}  # slug -> why, of the runs that were played now
        self._finished: dict[str, Outcome] = {}  # by slug: what was read once

    def play(self, engine: Engine, jobs: int, seconds: float, say: Callable[[str], None]) -> None:
        """Play what is missing as far as the time goes: common and tuning runs of a block, then what is chosen."""
        end, done = time.monotonic() + seconds, set[str]()

        def play_part(runs: Sequence[RunSpec]) -> None:
            left, waiting = end - time.monotonic(), [run for run in runs if run.slug not in done]
            if waiting and left > 0:
                done.update(run.slug for run in waiting)
                told = say, self._result
                played = play(waiting, self.folder, engine, *told, homes=self.homes, at_once=jobs, budget=left)
                self.failed |= played.failed
                if played.interrupted:
                    finish([], 0, interrupted=True)

        for block in self.plan.blocks:
            tried = [run for search in block.searches for each in search.candidates for run in each.tried]
            play_part([*block.runs, *tried])
            chosen = [self.choice(search).best for search in block.searches]
            play_part([run for each in chosen if each is not None for run in each.final])

    def _result(self, run: RunSpec, why: str) -> str:
        home = self.homes / run.slug
        if why or state(run, home) != "finished":
            return why or "the time is over; it goes on another time"
        made = read_run(home)
        known, metric = metadata(made), made.metric
        what = next((what for what, key in KEYS.items() if known[key] is not None), "central")
        value = in_metric(known[KEYS[what]], metric) + metric.unit
        return f"{what} {metric.name} {value}, {known['seconds_total']:.0f} s"

    def choice(self, search: Search) -> Choice:
        """Return what the tuning runs of a row say that are there."""
        return choose(search, self._outcome)

    def _outcome(self, run: RunSpec) -> Outcome:
        if run.slug in self._finished:
            return self._finished[run.slug]
        home = self.homes / run.slug
        if state(run, home) == "finished":
            made = read_run(home)
            value = headline(made)
            found = Outcome(value, made.metric, "" if value is not None else "failed: its metric is no number")
            return self._finished.setdefault(run.slug, found)
        return Outcome(failed=self.failure(run))

    def failure(self, run: RunSpec) -> str:
        """Return why a run failed, now or in an earlier call, or "" if it did not."""
        home = self.homes / run.slug
        if (stands := state(run, home)) == "finished":
            return ""
        return self.failed.get(run.slug, "") or (old_reason(home) if stands == "unfinished" else "")

    def runs(self) -> list[RunSpec]:
        """Return every run that is wanted: with common settings, those that tune, and those with what was chosen."""
        found = list(self.plan.runs)
        for search in self.plan.searches:
            found += [run for each in search.candidates for run in each.tried]
            best = self.choice(search).best
            found += best.final if best is not None else []
        return list({run.slug: run for run in found}.values())

    def entries(self) -> tuple[list[tuple[RunSpec, Entry]], list[tuple[RunSpec, Entry]]]:
        """Return all runs as they stand now: those with common settings, and those with the row's own."""
        common = [(run, self._entry(run)) for run in self.plan.runs]
        own = []
        for search in self.plan.searches:
            found = self.choice(search)
            best = found.best or search.candidates[0]
            own += [(run, self._entry(run, found.reason)) for run in best.final]
        return common, own

    def _entry(self, run: RunSpec, why: str = "") -> Entry:
        return read_entry(run, self.homes / run.slug, self.failed.get(run.slug, ""), why)

    def notes(self) -> list[str]:
        """Return how settings were chosen, for the page."""
        searches = self.plan.searches
        if not searches:
            return []
        tried = [len(search.candidates) for search in searches]
        seeds = ", ".join(str(run.flat["run.seed"]) for run in searches[0].candidates[0].tried)
        ends = []
        for search in searches:
            best, first = self.choice(search).best, search.candidates[0].tried[0]
            found = {} if best is None else at_an_end(search, best)
            if found:
                place = {} if first.density is None else {"density": first.density}
                words = {**place, **{key: first.flat[key] for key in self.plan.axes}, **found}
                ends.append(f"`{first.row}` ({', '.join(f'{key} {value}' for key, value in words.items())})")
        more = [f"The chosen value is the least or the greatest of its grid: {'; '.join(ends)}."] if ends else []
        return [f"{OWN.capitalize()}: {RULE.format(count=max(tried), seeds=seeds)}", *more]

    def record(self) -> dict[str, Any]:
        """Return what each row tried and chose, as JSON has it."""
        found = []
        for search in self.plan.searches:
            made, first = self.choice(search), search.candidates[0].tried[0]
            axes = {key: first.flat[key] for key in self.plan.axes}
            chosen = None if made.best is None else made.best.values
            place = {"row": first.row, "mask_density": first.density, "axes": axes}
            found.append({**place, "chosen": chosen, "reason": made.reason, "tried": made.tried})
        return {"tuning": found} if found else {}


def read_entry(run: RunSpec, home: Path, failed: str = "", why: str = "") -> Entry:
    """Return a planned run as it stands now: its results, or why it has none: it `failed` now, or another reason."""
    dense, settings = run.density is None, {key: run.flat[key] for key in run.settings if key != "mask.density"}
    if why:
        return Entry(run.flat, dense, None, why, run.variant)
    stands = state(run, home)
    if stands == "finished":
        return Entry(run.flat, dense, read_run(home), "", run.variant, settings)
    if stands == "unfinished":
        why = old_reason(home) or "unfinished"
    return Entry(run.flat, dense, None, failed or why or "not played", run.variant, settings)
