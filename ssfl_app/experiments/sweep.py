"""What `ssfl compare` does: play the runs of a plan and compare them.

A run lives in ``DIR/runs/<slug>``; `jobs` says what becomes of a folder that is there already.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ssfl_app.callbacks.stopping import KEYS
from ssfl_app.experiments.jobs import Played, check_all, finish, old_reason, play, state
from ssfl_app.experiments.sweep_spec import RunSpec, read_plan
from ssfl_app.files import write_bytes, write_json
from ssfl_app.options import ConfigError
from ssfl_app.results.compare import Entry, as_json, groups
from ssfl_app.results.compare_page import markdown, picture
from ssfl_app.results.report import write_picture
from ssfl_app.results.run_folder import metadata, read_run
from ssfl_app.results.table import in_metric
from ssfl_app.simulation.command import check_engine


def run_sweep(
    files: Sequence[Path],
    overrides: Sequence[str],
    out: Path | None,
    engine: str,
    jobs: int,
    report_only: bool,
    say: Callable[[str], None],
) -> None:
    """Play what is missing and write the comparison; exit with 1 if a run failed, or on Ctrl-C.

    The arguments are those of `ssfl compare`; `say` is told in a line how far all have come. ConfigError: a run
    cannot be played, or its folder holds another one; nothing was played.
    """
    check_engine(engine)
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it is a number of at least 1")
    plan = read_plan(files, overrides)
    title = " + ".join(path.stem for path in files)
    folder = (out or Path("runs") / f"compare-{title.replace(' ', '')}").expanduser().resolve()
    homes, played = folder / "runs", Played({}, interrupted=False)
    if report_only and not homes.is_dir():
        raise ConfigError(f"--out is {folder}; with --report-only it is a folder that `ssfl compare` wrote")
    if not report_only:
        check_all(plan.runs)

        def result(run: RunSpec, why: str) -> str:
            if why:
                return why
            made = read_run(homes / run.slug)
            known, metric = metadata(made), made.metric
            what = next((what for what, key in KEYS.items() if known[key] is not None), "central")
            value = in_metric(known[KEYS[what]], metric) + metric.unit
            return f"{what} {metric.name} {value}, {known['seconds_total']:.0f} s"

        played = play(plan.runs, folder, engine, say, result, homes=homes, at_once=jobs)
        if played.interrupted:
            finish([], 0, interrupted=True)
    entries = [read_entry(run, homes / run.slug, played.failed.get(run.slug, "")) for run in plan.runs]
    made = groups(entries, plan.axes, plan.baseline)
    environments = [entry.run.environment for entry in entries if entry.run is not None]
    text = markdown(made, plan.baseline, environments, title)
    write_json(folder / "comparison.json", as_json(made, plan.baseline, environments))
    write_bytes(folder / "comparison.md", text.encode())
    say(text)
    order = list(dict.fromkeys(str(run.flat["strategy"]) for run in plan.runs))
    say(write_picture(folder / "comparison.png", lambda: picture(made, order)))
    say(f"comparison: {folder / 'comparison.md'}")
    names = [run.name for run, entry in zip(plan.runs, entries, strict=True) if entry.reason.startswith("failed")]
    finish(names, len(entries), interrupted=False)


def read_entry(run: RunSpec, home: Path, why: str = "") -> Entry:
    """Return a planned run as it stands now: its results, or why it has none."""
    stands = state(run, home)
    if stands == "finished":
        return Entry(run.flat, run.dense, read_run(home))
    if not why and stands == "unfinished":
        why = old_reason(home) or "unfinished"
    return Entry(run.flat, run.dense, None, why or "not played")
