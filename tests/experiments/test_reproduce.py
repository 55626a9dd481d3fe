"""`ssfl reproduce`: the files of the published numbers, the profiles, and tables that are played on digits."""

import contextlib
import functools
import io
import json
import math
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import pytest

from ssfl_app import config as configuration
from ssfl_app.cli.main import main
from ssfl_app.core.strategy import ServerContext
from ssfl_app.data.readers import OWN, READERS
from ssfl_app.experiments import jobs, reproduce, reproduce_rows
from ssfl_app.experiments.jobs import read_budget
from ssfl_app.experiments.reproduce import Progress, duration
from ssfl_app.experiments.reproduce_rows import (
    Row,
    folder_of_configs,
    layer,
    profiles,
    read_rows,
    tables,
)
from ssfl_app.experiments.run_spec import RunSpec, run_clash
from ssfl_app.options import ConfigError, flatten
from ssfl_app.results.published import METRICS, Published, read_published
from ssfl_app.results.run_folder import metadata, read_run
from ssfl_app.simulation.command import Engine
from ssfl_app.sparsity.layout import Layout
from ssfl_app.strategies import REGISTRY
from ssfl_app.training import models
from ssfl_app.training.models import ModelOptions

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for found in tables().values() for path in found}
PERSONAL = {"dispfl", "subfedavg", "fedavg-ft", "dpsgd-ft", "ditto", "fedfomo"}
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
TABLES = {
    "ablation": 5,
    "flower": 2,
    "resnet50": 2,
    "sweep": 20,
    "table1": 21,
    "table2": 14,
    "table3": 8,
    "table4": 4,
}
# Two rows, SSFL and DisPFL, as small as they can be.
TINY = (
    "data.name='digits' model.name='cnn' run.clients=4 run.cohort=2 run.rounds=2 run.evaluate-every=1 local.epochs=1 "
    "local.batch-size=64 run.checkpoint-every=1 run.device='cpu'"
)
PARAMETERS, PRUNABLE = 151_402, 151_072  # of that cnn


def first_line(published: Published) -> str:
    """Return the comment that the file of a published number begins with."""
    said = f"{published.accuracy:g} %" if published.accuracy else "no number"
    size = f"; {published.megabytes:g} MB a round" if published.megabytes else ""
    time = f"about {published.minutes:g}" if published.minutes else "not measured here"
    where = published.hardware or "not stated"
    return (
        f"# Published: {said} ({published.source}; {METRICS[published.metric][1]}){size}. "
        f"Hardware: {where}. Minutes: {time}."
    )


def quietly(out: Path, *overrides: str, table: str = "resnet50", budget: str = "none") -> tuple[str, list[str]]:
    """Return what was printed, and the lines that were said."""
    said, printed = list[str](), io.StringIO()
    with contextlib.redirect_stdout(printed):
        reproduce.reproduce(table, "published", [TINY, *overrides], budget, out, Engine(), said.append)
    return printed.getvalue(), said


# ---- the files ---------------------------------------------------------------------------------


@functools.cache
def layout(model: str, norm: str, classes: int) -> Layout:
    return Layout.of(models.outline(ModelOptions(model, norm), (3, 8, 8), classes))


@functools.cache
def rows_of(table: str, profile: str = "published") -> list[Row]:
    return read_rows(table, profile, {})


def test_every_published_number_has_its_file() -> None:
    assert {name: len(found) for name, found in tables().items()} == TABLES
    assert folder_of_configs().samefile(CONFIGS)
    others = {path.stem for path in CONFIGS.glob("*.toml")} - FILES.keys()
    assert others == {"cifar10-study", "digits-ablations", "digits-compare", "digits-study"}
    assert set(profiles()) == {"published", "v1", "tmlr", "dispfl"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_whole_configuration_and_says_what_is_published(name: str) -> None:
    path = FILES[name]
    published = read_published(path)
    assert published is not None
    assert path.read_text().splitlines()[0] == first_line(published)
    assert published.profile in profiles()[1:]
    given = configuration.read_file(path)
    assert [key for key, value in given.items() if configuration.defaults()[key] == value] == []
    config = configuration.parse(configuration.merge(given))
    # What is measured is there to be measured: a mean of models of their own, or a global one.
    assert (published.metric == "personal") == (config.strategy in PERSONAL)
    assert config.settings.run.clients == (5 if name.startswith("table4") else 100)


def test_every_strategy_takes_every_model_that_it_is_played_with() -> None:
    combinations = {}
    for path in FILES.values():
        # Two clients: some strategies draw a mask for each.
        config = configuration.parse(
            configuration.merge(configuration.read_file(path), {"run.clients": 2, "run.cohort": 2})
        )
        seen = layout(config.model.name, config.model.norm, CLASSES[config.data.name])
        combinations[config.strategy, seen.size] = seen, config.settings
    assert len(combinations) > 30
    for (strategy, _), (seen, settings) in combinations.items():
        assert REGISTRY[strategy](ServerContext(seen, settings)).layout is seen


@pytest.mark.parametrize("name", FILES)
def test_a_file_agrees_with_its_profile(name: str) -> None:
    (row,) = (row for row in rows_of(name.partition("-")[0]) if row.name == name)
    profiled = dict(row.run.flat) | layer(row.published.profile, row.run.flat, name)
    if row.run.flat["partition.name"] == "pathological":
        profiled["partition.alpha"] = row.run.flat["partition.alpha"]  # of no matter there
    assert run_clash(row.run, profiled) is None


def test_sizes_of_table_1_are_those_of_ten_models() -> None:
    """Ten models of 4 bytes a parameter; the paper cuts off what is below 0.1 MB."""
    seen = layout("resnet18", "group", 10)
    dense = read_published(FILES["table1-fedavg"])
    sparse = read_published(FILES["table1-ssfl"])
    assert dense is not None
    assert sparse is not None
    assert dense.megabytes == math.floor(10 * 4 * seen.size / 1e5) / 10
    assert sparse.megabytes == pytest.approx(dense.megabytes / 2, abs=0.1)


def test_profiles_differ_in_rounds_batch_and_alpha() -> None:
    keys = ("run.rounds", "local.batch-size", "partition.alpha", "local.epochs", "local.momentum")

    def seen(table: str, name: str, profile: str) -> tuple[object, ...]:
        (row,) = (row for row in rows_of(table, profile) if row.name == name)
        return tuple(row.run.flat[key] for key in keys)

    assert seen("table1", "table1-ssfl", "v1") == (500, 16, 0.3, 5, 0.0)
    assert seen("table1", "table1-ssfl", "tmlr") == (1000, 16, 0.3, 5, 0.0)
    assert seen("table1", "table1-ssfl", "dispfl") == (500, 128, 0.3, 5, 0.0)
    assert seen("table2", "table2-ssfl", "v1") == (500, 16, 0.2, 5, 0.0)
    assert seen("table2", "table2-ssfl", "tmlr") == (1000, 128, 0.3, 10, 0.9)
    assert seen("table3", "table3-ditto", "dispfl") == (300, 128, 0.3, 5, 0.0)
    # -c has the last word.
    (row, *_) = read_rows("table1", "tmlr", {"run.rounds": 7})
    assert row.run.flat["run.rounds"] == 7


@pytest.mark.parametrize("profile", profiles()[1:])
def test_a_profile_names_what_there_is(profile: str) -> None:
    content = tomllib.loads((CONFIGS / "profiles" / f"{profile}.toml").read_text())
    only = content.pop("only", {})
    assert only.keys() <= {*READERS, *OWN, *REGISTRY, *FILES}
    for keys in ({}, *only.values()):
        configuration.merge(flatten(content), keys)
    for table in TABLES:
        assert len(rows_of(table, profile)) == TABLES[table]


def test_rows_come_in_the_order_of_what_they_are_worth_and_cost() -> None:
    names = [row.name.removeprefix("table1-") for row in rows_of("table1")]
    assert names[:6] == ["ssfl", "fedavg", "path-ssfl", "path-fedavg", "ditto", "fedavg-ft"]
    assert names[-6:] == ["dispfl", "dpsgd-ft", "fedfomo", "path-dispfl", "path-dpsgd-ft", "path-fedfomo"]
    sweep = [row.name.removeprefix("sweep-") for row in rows_of("sweep")]
    assert sweep[:5] == ["ssfl-0.5", "ssfl-0.3", "ssfl-0.2", "ssfl-0.1", "ssfl-0.05"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("none", math.inf)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert read_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0m", "-1h", "10 m", "1d", "None"])
def test_a_budget_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--budget is '.*'; it is a time above 0 such as 90s, 10m or 2h, or none"):
        read_budget(text)


# ---- playing -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Return the folder of a table of two rows that was played, what was printed, and what was said."""
    folder = tmp_path_factory.mktemp("played") / "out"
    return folder, *quietly(folder)


def test_published_stands_beside_measured(played: tuple[Path, str, list[str]]) -> None:
    folder, printed, said = played
    content = json.loads((folder / "reproduce.json").read_text())
    assert [(row["row"], row["state"]) for row in content["rows"]] == [
        ("resnet50-ssfl", "finished"),
        ("resnet50-dispfl", "finished"),
    ]
    markdown = (folder / "reproduce.md").read_text().splitlines()
    for row, published, key in zip(content["rows"], (47.53, 12.04), ("local", "personal"), strict=True):
        summary = metadata(read_run(folder / row["row"]))
        measured = row["measured"]
        assert row["published"]["accuracy"] == published
        assert (measured["round"], measured["rounds"]) == (2, 2)
        assert measured["accuracy"] == summary[METRICS[key][0]]
        cells = [f"{published:.2f}", f"{100 * measured['accuracy']:.2f}"]
        for line in (*printed.splitlines(), *markdown):
            if row["row"] in line and "finished" in line:
                assert all(cell in line for cell in cells)
        assert sum(row["row"] in line and cells[1] in line for line in (*printed.splitlines(), *markdown)) == 2
    assert said[0] == f"0 of 2 runs are finished already: {folder}"
    assert said[-1] == f"table: {folder / 'reproduce.md'}"


def test_sizes_are_counted_as_the_paper_does(played: tuple[Path, str, list[str]]) -> None:
    folder, *_ = played
    ssfl, dispfl = (row["measured"] for row in json.loads((folder / "reproduce.json").read_text())["rows"])
    # Two clients of a cohort, the alive values and what is never pruned, one direction.
    assert ssfl["bytes_a_round"] == 2 * 4 * (int(0.05 * PRUNABLE) + PARAMETERS - PRUNABLE)
    # One client's three peers, each with its values and a bit for each weight.
    rounds = [json.loads(line) for line in (folder / "resnet50-dispfl" / "rounds.jsonl").read_text().splitlines()]
    assert dispfl["bytes_a_round"] == sum(entry.get("bytes_peer", 0) for entry in rounds) / 4 / 2
    one = dispfl["bytes_a_round"] / 3 - PRUNABLE / 8
    assert one == pytest.approx(4 * (0.05 * PRUNABLE + PARAMETERS - PRUNABLE), rel=0.001)


def test_other_data_and_changed_keys_are_told(played: tuple[Path, str, list[str]]) -> None:
    folder, _, said = played
    text = (folder / "reproduce.md").read_text()
    data = "The data are digits, the published numbers are of cifar10: do not compare them."
    for place in (said, text.replace("**", "").splitlines()):
        assert data in place
        (changed,) = (line for line in place if line.startswith("Changed on the command line: "))
        assert "run.rounds=2" in changed
        assert "evaluate-every" not in changed


def test_what_is_finished_is_not_played_again(played: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder = shutil.copytree(played[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    _, said = quietly(folder)
    assert said[0].startswith("2 of 2 runs are finished already")
    assert len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")} == before
    with pytest.raises(ConfigError, match=r"resnet50-ssfl holds another run: local\.lr is 0\.05; that run was"):
        quietly(folder, "local.lr=0.05")


def test_cost_is_that_of_measured_rounds(played: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder = shutil.copytree(played[0], tmp_path / "out")
    rows = read_rows("resnet50", "published", configuration.read_overrides([TINY]))
    there, (ssfl, dispfl) = Progress({row.name: row for row in rows}, folder, print), rows
    assert there.cost(ssfl.run) == 0
    log = folder / "resnet50-ssfl" / "rounds.jsonl"
    rounds = [json.loads(line) for line in log.read_text().splitlines()]
    # Nothing of DisPFL: its images, all 1437 in each of two rounds, at SSFL's speed.
    shutil.rmtree(folder / "resnet50-dispfl")
    speed = sum(x["seconds"] for x in rounds[1:]) / sum(x["image_passes"] for x in rounds[1:])
    assert there.cost(dispfl.run) == pytest.approx(2 * 1437 * speed)
    needs = duration(2 * 1437 * speed)
    assert there.line(dispfl).state == f"not played; needs about {needs} at the measured speed"
    # One round of SSFL is left: as long as the one before.
    log.write_text("".join(json.dumps(entry) + "\n" for entry in rounds[:2]))
    (folder / "resnet50-ssfl" / "summary.json").unlink()
    assert there.cost(ssfl.run) == pytest.approx(rounds[1]["seconds"])
    assert there.line(ssfl).state.startswith("partial: round 1 of 2; needs about ")
    # Nothing at all.
    shutil.rmtree(folder / "resnet50-ssfl")
    assert there.cost(ssfl.run) is None
    assert there.line(ssfl).state == "not played"


class Clock:
    """Stands for the module `time`: 0 until `over` says so, then the end of every budget."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleep = time.sleep

    def over(self) -> bool:
        return False

    def monotonic(self) -> float:
        if self.over():
            self.now = 1e9
        return self.now


def test_a_row_that_the_budget_cuts_goes_on_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "run.rounds=8"
    clock, log = Clock(), tmp_path / "out" / "flower-cifar10" / "rounds.jsonl"
    monkeypatch.setattr(clock, "over", lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    monkeypatch.setattr(jobs, "time", clock)
    quietly(tmp_path / "out", more, table="flower", budget="10m")
    first, second = json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]
    done = first["measured"]["rounds"]
    assert 3 <= done < 8
    assert first["measured"]["round"] == done
    assert first["state"].startswith(f"partial: round {done} of 8; needs about ")
    assert second["state"].startswith("not played; needs about ")
    assert second["measured"]["accuracy"] is None
    assert not list((tmp_path / "out").glob("*.stderr"))

    monkeypatch.setattr(jobs, "time", time)
    quietly(tmp_path / "out", more, table="flower")
    assert [row["state"] for row in json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]] == [
        "finished",
        "finished",
    ]
    assert "resuming after round" in (tmp_path / "out" / "flower-cifar10" / "console.log").read_text()
    # The file alone, as `ssfl run` plays it, without a break.
    row = ["run", str(FILES["flower-cifar10"]), "--engine", "inline", "--out", str(tmp_path / "whole")]
    assert ssfl(monkeypatch, *row, "-c", f"{TINY} {more}") == 0
    models = [metadata(read_run(home))["model_sha256"] for home in (log.parent, tmp_path / "whole")]
    assert models[0] == models[1]
    capsys.readouterr()


def test_the_budget_goes_to_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("table3")[:4]
    known = dict(zip((row.name for row in rows), (100.0, 10.0, None, 60.0), strict=True))
    clock, order, said = Clock(), list[str](), list[str]()

    class Ended:
        """Stands for the process of a run that is over."""

        exitcode = 0

    def played(run: RunSpec, home: Path, *_: object) -> jobs.Job:
        order.append(run.name)
        clock.now += known[run.name] or 30.0
        return jobs.Job(run, home, cast(BaseProcess, Ended()), home)

    def play(budget: float) -> None:
        table = Progress({row.name: row for row in rows}, tmp_path, said.append)
        runs = [row.run for row in rows]
        jobs.play(
            runs, tmp_path, Engine(), said.append, table.result, homes=tmp_path, budget=budget, choose=table.choose
        )

    monkeypatch.setattr(jobs, "time", clock)
    monkeypatch.setattr(Progress, "cost", lambda _, run: known[run.slug])
    monkeypatch.setattr(jobs, "start", played)
    monkeypatch.setattr(jobs, "reason", lambda _: "")
    play(50.0)
    # The second fits into 50 s and the third is not known; 10 s are left then, for a part of the first.
    names = [row.name for row in rows]
    assert order == [names[1], names[2], names[0]]
    assert any(
        line.startswith(f"{names[0]}: needs about 2 min, played in part: 10 s are left, and nothing else")
        for line in said
    )
    order.clear()
    clock.now = 0.0
    play(1.0)
    assert order == [names[2]]  # something is always begun


def test_a_run_that_fails_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        quietly(tmp_path / "out", "local.lr=1e38 local.clip=0.0 run.rounds=1")
    assert end.value.code == 1
    assert capsys.readouterr().err == "ssfl: 2 of 2 runs failed: resnet50-ssfl; resnet50-dispfl\n"
    rows = json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]
    assert all(row["state"].startswith("failed: the run failed: training in round 1: 0 of ") for row in rows)


def test_an_interrupt_leaves_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start", interrupt)
    with pytest.raises(SystemExit) as end:
        quietly(tmp_path / "out")
    assert end.value.code == 1
    assert "the same command goes on" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["not played", "not played"]


# ---- the command -------------------------------------------------------------------------------


def ssfl(monkeypatch: pytest.MonkeyPatch, *command: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ssfl", *command])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_list_plays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ssfl(monkeypatch, "reproduce", "--list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {line[0]: int(line[-1]) for line in lines if line[0] in TABLES} == TABLES
    assert ssfl(monkeypatch, "reproduce", "table1", "--list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["table1-path-ditto", "Table", "1", "v1", "personal", "83.54", "446.9", "-"] in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "TABLE is ''; it is one of ablation, flower, "),
        (["table9"], "TABLE is 'table9'; it is one of ablation, flower, "),
        (["table1", "--profile", "v2"], "--profile is 'v2'; it is one of published, dispfl, tmlr, v1"),
        (["table1", "--budget", "soon"], "--budget is 'soon'; it is a time above 0"),
        (["table1", "--engine", "spark"], "--engine is 'spark'; it is one of ray, inline"),
        (
            ["table1"],
            "data.path is ''; table1-ssfl plays cifar10: -c \"data.path='/where/it/lies'\", and data.download",
        ),
        (["table1", "-c", "data.path='.'"], "data.path is '"),
        (["table1", "-c", "local.epoch=1"], "local.epoch is not a key"),
        (["table1", "-c", "run.out='x'"], "run.out is 'x'; `ssfl reproduce` sets it itself"),
        (["table1", "-c", "strategy='ssfl'"], "strategy is 'ssfl'; `ssfl reproduce` sets it itself"),
    ],
)
def test_bad_commands_give_one_line_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ssfl(monkeypatch, "reproduce", *options) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ssfl: {said}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_with_a_bad_published_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FILES["table1-ssfl"].read_text()
    monkeypatch.setattr(reproduce_rows, "folder_of_configs", lambda: tmp_path)
    for old, new, said in (
        ('metric = "local"', 'metric = "best"', "published.metric is 'best'; it is one of central, local, personal"),
        ("megabytes =", "megabites =", "published.megabites is not a key"),
        ("accuracy = 88.29", "accuracy = 882.9", "published.accuracy is 882.9; it is a number of percent"),
    ):
        (tmp_path / "table1-ssfl.toml").write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=said):
            read_rows("table1", "published", {})
