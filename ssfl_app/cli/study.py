"""The command line of the studies: ``ssfl study masks`` and ``ssfl study clients``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ssfl_app.cli.arguments import ConfigFile, Override
from ssfl_app.text import tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from ssfl_app.experiments.mask_study import MaskStudy
    from ssfl_app.results.table import Table

app = typer.Typer(no_args_is_help=True)

Out = Annotated[Path, Option(metavar="DIR", help="Folder of the picture and the JSON.")]


@app.command()
def masks(
    config: ConfigFile = None,
    override: Override = None,
    batches: Annotated[
        str, Option(metavar="N,N,...", help="Numbers of minibatches in the mean score.")
    ] = "1,2,4,8,16,32,64,128,256",
    repeats: Annotated[int, Option(help="Orders of the minibatches.")] = 5,
    out: Out = Path("runs/study"),
) -> None:
    """Measure how SSFL's mask nears the masks of the whole data, the more minibatches are in the mean score."""
    from ssfl_app import config as configuration
    from ssfl_app.experiments.mask_study import read_batches, study_masks
    from ssfl_app.results import study_plots

    flat = configuration.merge(configuration.read_given(config, override))
    study = study_masks(flat, read_batches(batches), repeats, lambda text: tell(text, error=True))
    sizes = {"cut": study.cut, "drawn": study.drawn}
    title = (
        f"{flat['data.name']}, {flat['partition.name']} partition, {flat['model.name']}: k = {study.kept:,} of "
        f"d = {study.prunable:,} weights; minibatches of {study.batch_size}; mean and range of {repeats} repeats"
    )
    measured = study.batches, study.errors, study.clients, sizes, title
    _write(lambda: study_plots.mask_error(*measured), study.record(), out / "mask-error")
    tell("Mask error in %: mean (least to greatest)")
    _table(study).print()


@app.command()
def clients(
    folders: Annotated[list[Path], Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Out = Path("runs/study"),
) -> None:
    """Draw each client's headline metric against its number of images and against the spread of its classes."""
    from ssfl_app.results.client_study import study_clients
    from ssfl_app.results.run_folder import read_run
    from ssfl_app.results.study_plots import accuracy_by_clients, legend

    groups = study_clients([read_run(folder) for folder in folders])
    record = {"study": "clients", "runs": [group.record() for group in groups]}
    _write(lambda: accuracy_by_clients(groups), record, out / "client-accuracy")
    for group in groups:
        tell(legend(group))


def _write(draw: "Callable[[], Figure]", record: dict[str, Any], stem: Path) -> None:
    from ssfl_app.files import write_json
    from ssfl_app.results.recorder import environment
    from ssfl_app.results.report import write_picture

    write_json(stem.with_suffix(".json"), record | {"environment": environment()})
    tell(write_picture(stem.with_suffix(".png"), draw))
    tell(f"numbers: {stem.with_suffix('.json').resolve()}")


def _table(study: "MaskStudy") -> "Table":
    from ssfl_app.results.table import Table

    names = [f"{mark} {name}" for mark, name in zip(("(a)", "(b)", "(a')"), study.errors, strict=True)]
    by_n = zip(study.batches, *(100 * measures["error"].T for measures in study.errors.values()), strict=True)
    rows = [[f"{n:,}", *(f"{c.mean():.2f} ({c.min():.2f} to {c.max():.2f})" for c in cells)] for n, *cells in by_n]
    return Table(["n", *names], rows, texts=0)
