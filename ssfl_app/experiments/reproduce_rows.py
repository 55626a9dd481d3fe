"""The rows of a published table: a file each, and the profiles that may be laid over them.

A row is a file ``configs/<table>-<row>.toml`` with a table ``[published]``: an ordinary configuration, which
`ssfl run` plays as well. A profile, ``configs/profiles/<name>.toml``, has keys for all rows, and in ``[only.<name>]``
those of a data set, a strategy or a row. Where -c names a key, it has the last word.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ssfl_app import config as configuration
from ssfl_app.config import Flat
from ssfl_app.experiments.run_spec import OURS, RunSpec, planned
from ssfl_app.files import app_folder
from ssfl_app.options import ConfigError
from ssfl_app.results.published import PUBLISHED, Published, read_published
from ssfl_app.strategies import REGISTRY

FIRST = ("ssfl", "fedavg")
"""What is compared with what, above all: these rows are played before others of the same cost."""


@dataclass(frozen=True)
class Row:
    """A published number, the data set that it is of, and the run that is played for it."""

    published: Published
    data: str
    run: RunSpec

    @property
    def name(self) -> str:
        """The name of its file and of its run folder."""
        return self.run.slug


def folder_of_configs() -> Path:
    """Return the folder with a file for each published number, of the checkout or the installed wheel."""
    return app_folder() / "configs"


def tables() -> dict[str, dict[Path, Published]]:
    """Return the files of each table and what is published about each."""
    found: dict[str, dict[Path, Published]] = {}
    for path in sorted(folder_of_configs().glob("*-*.toml")):
        published = read_published(path)
        if published is not None:
            found.setdefault(path.stem.partition("-")[0], {})[path] = published
    return found


def profiles() -> list[str]:
    """Return the names that --profile may have."""
    return [PUBLISHED, *sorted(path.stem for path in (folder_of_configs() / "profiles").glob("*.toml"))]


def read_rows(name: str, profile: str, override: Flat) -> list[Row]:
    """Return the rows of a table in the order in which they are played.

    SSFL and FedAvg come first, Dirichlet clients before pathological ones, and methods that train every client in
    every round last: these cost ten times as much as the others. ConfigError: there is no such table or profile, or a
    key or value is not allowed.
    """
    known = tables()
    if name not in known:
        raise ConfigError(f"TABLE is {name!r}; it is one of {', '.join(known)}")
    if profile not in profiles():
        raise ConfigError(f"--profile is {profile!r}; it is one of {', '.join(profiles())}")
    for key in (*OURS, "strategy"):
        if key in override:
            raise ConfigError(f"{key} is {override[key]!r}; `ssfl reproduce` sets it itself")
    return sorted((_row(path, published, profile, override) for path, published in known[name].items()), key=_order)


def _row(path: Path, published: Published, profile: str, override: Flat) -> Row:
    given = configuration.read_file(path)
    own = configuration.merge(given)
    flat = configuration.merge(given, layer(profile, own, path.stem), override)
    run = planned(flat, not REGISTRY[str(flat["strategy"])].uses_density)
    return Row(published, str(own["data.name"]), replace(run, slug=path.stem, name=path.stem))


def layer(profile: str, flat: Flat, row: str) -> Flat:
    """Return what a profile has for a row with the configuration `flat`: what is special comes last."""
    if profile == PUBLISHED:
        return {}
    keys = configuration.read_file(folder_of_configs() / "profiles" / f"{profile}.toml")
    made = {key: value for key, value in keys.items() if not key.startswith("only.")}
    for name in (flat["data.name"], flat["strategy"], row):
        start = f"only.{name}."
        made |= {key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)}
    return made


def _order(row: Row) -> tuple[object, ...]:
    flat = row.run.flat
    strategy, pathological = str(flat["strategy"]), flat["partition.name"] == "pathological"
    rank = FIRST.index(strategy) if strategy in FIRST else len(FIRST)
    costly, others = REGISTRY[strategy].full_participation, rank == len(FIRST)
    return costly, others, pathological, rank, strategy, -float(flat["mask.density"]), row.name
