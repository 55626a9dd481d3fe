"""The command line: run, compare, reproduce, study, federation, report, export, partition, keys, cache."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ssfl_app import installed
from ssfl_app.cli.arguments import ConfigFile, Engine, Out, Override, RayAddress, RayWithoutToken, Resume
from ssfl_app.cli.federation import app as federation_app
from ssfl_app.cli.study import app as study_app
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.registry import import_from
from ssfl_app.text import never_fail_to_print, one_line, tell

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
)
app.add_typer(study_app, name="study", help="Studies of the SSFL paper: masks, clients.")
app.add_typer(federation_app, name="federation", help="Real SuperNodes: up, run, status, down; init, node, ...")


def _version(wanted: bool) -> None:
    if wanted:
        from ssfl_app import __version__

        typer.echo(f"ssfl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse federated learning on Flower."""


@app.command()
def run(
    config: ConfigFile = None,
    override: Override = None,
    nodes: Annotated[int | None, Option(help="Simulated SuperNodes; sets run.clients.")] = None,
    engine: Engine = "inline",
    out: Out = None,
    resume: Resume = None,
    ray_address: RayAddress = "",
    ray_without_token: RayWithoutToken = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run a strategy and write a run folder; CONFIG.toml has the keys that differ from the defaults (`ssfl keys`).

    Exit code: 0 finished, 1 failed or interrupted, 2 bad input.
    """
    from ssfl_app.simulation import command
    from ssfl_app.simulation.play import play

    import_from(Path.cwd())
    where = command.Engine.of(engine, ray_address, ray_without_token)
    play(command.RunArgs(config, override or [], nodes, where, out, resume), command.telling, quiet)


@app.command()
def compare(
    files: Annotated[list[Path], Argument(metavar="SWEEP.toml...", help="Configurations with a table compare.")],
    override: Override = None,
    out: Annotated[Path | None, Option(help="Folder.", show_default="runs/compare-<name of the file>")] = None,
    engine: Engine = "inline",
    ray_address: RayAddress = "",
    ray_without_token: RayWithoutToken = False,
    jobs: Annotated[int, Option(help="Runs that are played at once.")] = 1,
    budget: Annotated[str, Option(help="Time for all runs: 90s, 10m, 2h, or none.")] = "none",
    report_only: Annotated[bool, Option("--report-only", help="Play nothing; compare what is there.")] = False,
) -> None:
    """Run strategies x seeds x densities, go on where that stopped, and write one table and one picture.

    SWEEP.toml is a configuration with a table "compare": the lists strategies, seeds and densities, and a baseline.

    Exit code: 0 all runs finished or budget over, 1 one failed, 2 bad configuration.
    """
    from ssfl_app.experiments.sweep import run_sweep
    from ssfl_app.simulation import command

    import_from(Path.cwd())
    where = command.Engine.of(engine, ray_address, ray_without_token)
    run_sweep(files, override or [], out, where, jobs, budget, report_only, tell)


@app.command()
def reproduce(
    table: Annotated[str, Argument(metavar="[TABLE]", help="Which; --list names them.")] = "",
    budget: Annotated[str, Option(help="Time for all rows: 90s, 10m, 2h, or none.")] = "none",
    profile: Annotated[
        str, Option(help="published: each row as its file has it; v1, tmlr, dispfl: as these sources have it.")
    ] = "published",
    override: Override = None,
    out: Annotated[Path | None, Option(help="Folder.", show_default="runs/reproduce-<table>-<profile>")] = None,
    engine: Engine = "inline",
    ray_address: RayAddress = "",
    ray_without_token: RayWithoutToken = False,
    listed: Annotated[bool, Option("--list", help="Play nothing; list the tables, or the rows of one.")] = False,
) -> None:
    """Play the rows of a published table as far as the budget goes, and print published beside measured numbers.

    The same command goes on where it stopped. Exit code: 0 finished or budget over, 1 a run failed, 2 bad
    configuration.
    """
    from ssfl_app.experiments import reproduce as rows
    from ssfl_app.simulation import command

    import_from(Path.cwd())
    if listed:
        rows.show(table, profile, override or [])
    else:
        where = command.Engine.of(engine, ray_address, ray_without_token)
        rows.reproduce(table, profile, override or [], budget, out, where, tell)


@app.command()
def report(
    folders: Annotated[list[Path], Argument(metavar="DIR...", help="Run folders.")],
    out: Annotated[
        Path | None, Option(help="HTML file.", show_default="DIR/report.html of one, ./report.html")
    ] = None,
    serve: Annotated[bool, Option("--serve", help="Show the page on this machine while runs go on.")] = False,
    port: Annotated[int, Option(help="Of --serve; 0: a free one.", min=0, max=65535)] = 0,
) -> None:
    """Compare runs: a table here, and one page with the plots. With --serve a live page, until Ctrl-C."""
    if serve:
        from ssfl_app.results.live import serve as serve_page

        if out is not None:
            raise ConfigError(f"--out is {out}; --serve writes no file, give one of them")
        serve_page(folders, port, tell)
        return
    from ssfl_app.results.report import write_report
    from ssfl_app.results.rows import compare_table
    from ssfl_app.results.run_folder import read_run

    runs = [read_run(folder) for folder in folders]
    page = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    compare_table(runs).print()
    write_report(runs, page)
    tell(f"page: {page.resolve()}")


@app.command()
def export(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a finished run.")],
    to: Annotated[
        str,
        Option(
            help="safetensors: bitmap and alive values; torch: a state dict; onnx; torch-export; semi-structured."
        ),
    ],
    out: Annotated[Path | None, Option(help="File.", show_default="exported.* in the run folder")] = None,
    compact: Annotated[bool, Option("--compact", help="Without channels that nothing reads.")] = False,
) -> None:
    """Write the trained model to a file that other programs load."""
    from ssfl_app.results.export import write
    from ssfl_app.results.run_folder import read_run

    import_from(Path.cwd())
    tell(f"model: {write(read_run(folder), to, out, compact=compact, say=tell).resolve()}")


@app.command()
def partition(
    config: ConfigFile = None,
    override: Override = None,
    out: Annotated[Path, Option(help="PNG file.")] = Path("partition.png"),
) -> None:
    """Draw which client holds how many images of which class, as a table and a PNG."""
    from ssfl_app import config as configuration
    from ssfl_app.results.plots import class_distribution
    from ssfl_app.results.report import partition_table, write_picture
    from ssfl_app.runtime import load_federation

    import_from(Path.cwd())
    flat = configuration.merge(configuration.read_given(config, override))
    parsed = configuration.parse(flat | {"run.cohort": 1})  # cohorts have nothing to do with who holds what
    data, shares = load_federation(parsed)
    for note in data.notes:
        tell(f"note: {note}")
    counts = shares.class_counts(data.train.labels.numpy(), data.classes)
    drawn = write_picture(out, lambda: class_distribution(counts, data.class_names))
    partition_table(counts, data.class_names).print()
    tell(drawn)


@app.command()
def keys(
    strategy: Annotated[str, Argument(metavar="[STRATEGY]", help="Only what it reads.")] = "",
    toml: Annotated[bool, Option("--toml", help="The table that pyproject.toml has.")] = False,
) -> None:
    """List the keys of the configuration, or those that a strategy reads, with defaults and meanings."""
    from ssfl_app import config as configuration
    from ssfl_app.results.table import Table

    import_from(Path.cwd())
    if toml:
        typer.echo(configuration.table(), nl=False)
    else:
        rows = [[key, repr(spec.default), configuration.meaning(spec)] for key, spec in configuration.keys(strategy)]
        Table(["Key", "Default", "Meaning"], rows).print()


@app.command()
def cache(
    clear: Annotated[bool, Option("--clear", help="Delete them; nothing else in that folder.")] = False,
) -> None:
    """Show where decoded images are kept, and how many bytes they have."""
    from ssfl_app.data import cache as image_cache

    try:
        folder = image_cache.cache_folder()
        if folder is None:
            typer.echo("cache: none, SSFL_CACHE is off")
            return
        found = image_cache.entries(folder)
        typer.echo(f"cache: {folder.absolute()}, {len(found)} data sets, {sum(size for _, size in found)} bytes")
        if clear:
            typer.echo(f"deleted: {image_cache.clear(folder)} bytes")
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the cache cannot be read or deleted: {one_line(error)}") from error


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2."""
    # `kill` and a closed terminal end a run as Ctrl-C does: through the clean-up of everything that was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    never_fail_to_print()
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        installed.check_installed()
        app(prog_name="ssfl")  # also of python -m ssfl_app, or its completion has another name
    except BrokenPipeError:  # `ssfl report DIR | head`; what Python still holds for the pipe has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, RunFailed, OSError) as error:
        # OSError: a file that cannot be read or written. RunFailed: Flower did not start, and no run folder is there.
        tell(f"ssfl: {error}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        tell("ssfl: interrupted", error=True)
        sys.exit(1)
