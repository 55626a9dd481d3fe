"""Each row with settings of its own: the grids, the choice, and a sweep that is played."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from ssfl_app.experiments.run_spec import RunSpec
from ssfl_app.experiments.sweep import run_sweep
from ssfl_app.experiments.sweep_spec import SweepSpec, read_plan
from ssfl_app.experiments.tuning import Candidate, Choice, Outcome, Search, at_an_end, choose, headline
from ssfl_app.metrics import ACCURACY, Metric
from ssfl_app.options import ConfigError
from ssfl_app.results.run_folder import metadata, read_run
from ssfl_app.simulation.command import Engine

SWEEP = """
[run]
clients = 4
cohort = 2
rounds = 1
[local]
epochs = 1
lr = 0.05
[compare]
strategies = ["random", "fedavg"]
densities = [0.2, 0.1]
seeds = [1, 2]
baseline = "random"
[compare.tune]
seeds = [7, 8]
"local.lr" = [0.05, 0.2]
"""
LOST = "fedavg seed 7 local.lr=1e+38"
LOSS = Metric("loss", share=False, higher=False)


def plan(tmp_path: Path, text: str = "", *overrides: str) -> SweepSpec:
    (tmp_path / "sweep.toml").write_text(SWEEP + text)
    return read_plan([tmp_path / "sweep.toml"], overrides)


def values(search: Search) -> list[dict[str, Any]]:
    return [each.values for each in search.candidates]


# ---- the grids ---------------------------------------------------------------------------------


def test_every_row_at_every_density_tries_the_grid_on_the_tuning_seeds(tmp_path: Path) -> None:
    made = plan(tmp_path)
    # What is dense has one search, not one a density.
    assert [[run.slug for run in search.candidates[1].tried] for search in made.searches] == [
        ["random-d0.2-s7-local.lr-0.2", "random-d0.2-s8-local.lr-0.2"],
        ["fedavg-s7-local.lr-0.2", "fedavg-s8-local.lr-0.2"],
        ["random-d0.1-s7-local.lr-0.2", "random-d0.1-s8-local.lr-0.2"],
    ]
    assert values(made.searches[0]) == [{"local.lr": 0.05}, {"local.lr": 0.2}]
    # A setting that is the common one is played once, under that name; the table shows the value all the same.
    first, second = made.searches[1].candidates
    assert [run.slug for run in first.final] == ["fedavg-s1", "fedavg-s2"]
    assert [run.slug for run in second.final] == ["fedavg-s1-local.lr-0.2", "fedavg-s2-local.lr-0.2"]
    assert {run.settings for run in (*first.final, *second.final)} == {("local.lr",)}
    assert made.axes == []  # it is the same table, whatever the rate of a row


def test_a_grid_of_its_own_is_that_of_a_strategy_or_of_a_variant(tmp_path: Path) -> None:
    also = '[[compare.also]]\nname = "held"\nstrategy = "fedprox"\n"fedprox.mu" = 0.1\n'
    text = also + '[compare.tune.only.fedavg]\n"local.lr" = [0.1]\n"local.momentum" = [0.0, 0.9]\n'
    tried = {search.candidates[0].tried[0].row: values(search) for search in plan(tmp_path, text).searches}
    own = [{"local.lr": 0.1, "local.momentum": 0.0}, {"local.lr": 0.1, "local.momentum": 0.9}]
    assert tried["fedavg"] == own
    assert tried["held"] == tried["random"] == [{"local.lr": 0.05}, {"local.lr": 0.2}]
    text = also + '[compare.tune.only.held]\n"fedprox.mu" = [0.01, 1.0]\n'
    tried = {search.candidates[0].tried[0].row: values(search) for search in plan(tmp_path, text).searches}
    assert tried["held"] == [{"fedprox.mu": 0.01}, {"fedprox.mu": 1.0}]
    text = also + '[compare.tune.only.fedprox]\n"fedprox.mu" = [0.01, 1.0]\n'
    tried = {search.candidates[0].tried[0].row: values(search) for search in plan(tmp_path, text).searches}
    assert tried["held"] == [{"fedprox.mu": 0.01}, {"fedprox.mu": 1.0}]


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    made = plan(tmp_path, "", "local.lr=0.2")
    assert [values(search) for search in made.searches] == [[{"local.lr": 0.2}]] * 3
    assert {run.flat["local.lr"] for run in made.runs} == {0.2}
    made = plan(tmp_path, "", "run.seed=3 mask.density=0.1")
    assert [run.slug for run in made.runs] == ["random-d0.1-s3", "fedavg-s3"]
    assert [run.flat["run.seed"] for run in made.searches[0].candidates[0].tried] == [7, 8]


BAD = [
    ('"local.epochs" = 3\n', "compare.tune.local.epochs is 3; it is a list of one value or more, each once"),
    (
        '"local.epochs" = [1, 1]\n',
        "compare.tune.local.epochs is [1, 1]; it is a list of one value or more, each once",
    ),
    ('"run.seed" = [1]\n', "compare.tune has run.seed; it is a key that rows of one table may differ in"),
    (
        '"partition.alpha" = [0.1]\n',
        "compare.tune has partition.alpha; it is a key that rows of one table may differ",
    ),
    ('"fedprox.mu" = [0.1]\n', "compare.tune has fedprox.mu; random does not look at it: "),
    ('"local.epoch" = [1]\n', "local.epoch is not a key"),
    ('[compare.tune.only.sfsl]\n"local.lr" = [0.1]\n', "compare.tune.only is 'sfsl'; it is one of random, fedavg"),
    (
        '[compare.tune.only.fedavg]\n"local.lr" = [0.1]\n',
        "compare.tune has 1 settings for fedavg, 2 for random; every",
    ),
    ('[compare.tune.only.fedavg]\n"local.lr" = [0.1, -1.0]\n', "local.lr is -1.0; "),
    (
        '[compare.axes]\n"local.lr" = [0.1]\n',
        "compare.tune has local.lr; it is a key that rows of one table may differ",
    ),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_grids_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(tmp_path, text)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(("override", "seed"), [("", 2), ("run.seed=9", 9)])
def test_a_tuning_seed_is_no_seed_of_the_table(tmp_path: Path, override: str, seed: int) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[7, 8]", "[7, 2, 9]"))
    with pytest.raises(
        ConfigError, match=rf"compare\.tune\.seeds has {seed}; it is a seed that compare\.seeds does not"
    ):
        read_plan([tmp_path / "sweep.toml"], [override])


def test_a_file_that_tunes_is_compared_alone(tmp_path: Path) -> None:
    plan(tmp_path)
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(ConfigError, match=r"compare\.tune is in .*sweep\.toml; a file that has it is compared alone"):
        read_plan([tmp_path / "other.toml", tmp_path / "sweep.toml"], [])


def test_all_of_a_density_comes_before_the_next_one_if_asked(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[compare]\n", '[compare]\norder = "density"\n'))
    first, second = read_plan([tmp_path / "sweep.toml"], []).blocks
    assert [run.slug for run in first.runs] == ["random-d0.2-s1", "fedavg-s1", "random-d0.2-s2", "fedavg-s2"]
    assert [run.slug for run in second.runs] == ["random-d0.1-s1", "random-d0.1-s2"]
    assert [len(block.searches) for block in (first, second)] == [2, 1]


# ---- the choice --------------------------------------------------------------------------------


def chosen(found: dict[float, list[Outcome]]) -> Choice:
    """Return the choice between settings, each with the outcomes of its tuning runs."""
    runs = {
        lr: [RunSpec(f"{lr}-{seed}", "", {"run.seed": seed}, dense=True) for seed in range(len(outcomes))]
        for lr, outcomes in found.items()
    }
    known = {run.slug: outcome for lr in found for run, outcome in zip(runs[lr], found[lr], strict=True)}
    search = Search([Candidate({"local.lr": lr}, tried, []) for lr, tried in runs.items()])
    return choose(search, lambda run: known[run.slug])


def outcomes(*seeds: float, metric: Metric = ACCURACY) -> list[Outcome]:
    return [Outcome(value, metric) for value in seeds]


def test_the_best_mean_is_chosen_and_of_equal_ones_the_first() -> None:
    found = chosen({0.1: outcomes(0.5, 0.9), 0.3: outcomes(0.8, 0.75), 1.0: outcomes(0.75, 0.8)})
    assert found.best is not None
    assert found.best.values == {"local.lr": 0.3}
    assert [round(each["mean"], 3) for each in found.tried] == [0.7, 0.775, 0.775]
    assert found.tried[0]["seeds"] == {"0": 0.5, "1": 0.9}
    found = chosen(
        {0.1: outcomes(2.0, metric=LOSS), 0.3: outcomes(1.0, metric=LOSS), 1.0: outcomes(3.0, metric=LOSS)}
    )
    assert found.best is not None
    assert found.best.values == {"local.lr": 0.3}


def test_a_setting_that_failed_is_out_and_nothing_is_chosen_before_all_are_played() -> None:
    lost = [Outcome(0.99, ACCURACY), Outcome(failed="failed: loss is NaN")]
    found = chosen({0.1: lost, 0.3: outcomes(0.2, 0.2)})
    assert found.best is not None
    assert found.best.values == {"local.lr": 0.3}
    assert found.tried[0]["failed"] == ["failed: loss is NaN"]
    found = chosen({0.1: outcomes(0.9, 0.9), 0.3: [Outcome(0.1, ACCURACY), Outcome()]})
    assert (found.best, found.reason) == (None, "not tuned yet: 1 tuning runs are not played")
    found = chosen({0.1: lost})
    assert (found.best, found.reason) == (
        None,
        "failed: every setting that was tried, the first one: failed: loss is NaN",
    )


def test_a_value_at_an_end_of_three_or_more_is_named() -> None:
    grid = [
        Candidate({"local.lr": lr, "local.momentum": m, "x": w}, [], [])
        for lr in (0.1, 1.0, 0.3)
        for m, w in ((0, "a"), (0.9, "b"))
    ]
    assert [at_an_end(Search(grid), each) for each in grid[::2]] == [{"local.lr": 0.1}, {"local.lr": 1.0}, {}]


def test_headline_is_that_of_personal_models_if_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('strategy = "ditto"\n')
    (tmp_path / "rounds.jsonl").write_text("")
    known: dict[str, float | None] = {"central_accuracy": 0.5, "local_accuracy_mean": 0.6}
    for personal, wanted in ((None, 0.5), (0.7, 0.7), (float("nan"), None)):
        (tmp_path / "summary.json").write_text(json.dumps(known | {"personal_accuracy_mean": personal}))
        assert headline(read_run(tmp_path)) == wanted


# ---- a sweep that is played --------------------------------------------------------------------


def test_a_sweep_tunes_then_plays_each_row_with_its_choice_and_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SWEEP.replace('["random", "fedavg"]', '["fedavg"]').replace("[7, 8]", "[7]")
    text = text.replace("[0.05, 0.2]", "[0.05, 0.2, 1e38]").replace("[local]", "[local]\nclip = 0.0")
    (tmp_path / "sweep.toml").write_text(text)
    out, said = tmp_path / "out", list[str]()

    def play(budget: str = "none", *, report_only: bool = False, code: int = 1) -> dict[str, Any]:
        said.clear()
        with contextlib.ExitStack() as stack:
            ended = stack.enter_context(pytest.raises(SystemExit)) if code else None
            run_sweep([tmp_path / "sweep.toml"], [], out, Engine(), 2, budget, report_only, said.append)
        assert ended is None or ended.value.code == code
        made: dict[str, Any] = json.loads((out / "comparison.json").read_text())
        return made

    # The time is over at once: what is not played is said, and nothing is chosen.
    made = play("0.001s", code=0)
    assert [(table["terms"], set(table["rows"][0]["missing"].values())) for table in made["tables"]] == [
        ("common settings", {"not played"}),
        ("own settings", {"not tuned yet: 3 tuning runs are not played"}),
    ]

    made = play()
    (common,), (own,) = (table["rows"] for table in made["tables"])
    (tuned,) = made["tuning"]

    def accuracy(slug: str, key: str = "central_accuracy") -> float:
        return float(metadata(read_run(out / "runs" / slug))[key])

    found = {lr: accuracy(f"fedavg-s7-local.lr-{lr}") for lr in (0.05, 0.2)}
    best = max(found, key=lambda lr: found[lr])
    assert tuned["chosen"] == own["settings"] == {"local.lr": best}
    assert common["settings"] == {}
    assert [each["mean"] for each in tuned["tried"]] == [found[0.05], found[0.2], None]
    assert ["failed: " in why for why in tuned["tried"][2]["failed"]] == [True]
    # A run with the common rate is that of the other table.
    final = {seed: f"fedavg-s{seed}{'' if best == 0.05 else f'-local.lr-{best}'}" for seed in (1, 2)}
    assert {seed: known["own"] for seed, known in own["seeds"].items()} == {
        str(seed): accuracy(slug, "local_accuracy_mean") for seed, slug in final.items()
    }
    tried = [f"fedavg-s7-local.lr-{lr}" for lr in (0.05, 0.2, 1e38)]
    # One that tunes failed: it is named and the exit code is 1, as with any other.
    lost = f"ssfl: 1 of {len({'fedavg-s1', 'fedavg-s2', *tried, *final.values()})} runs failed: {LOST}\n"
    assert capsys.readouterr().err == lost
    homes = {home.name for home in (out / "runs").glob("*/")}
    assert homes == {"fedavg-s1", "fedavg-s2", *tried, *final.values()}
    page = (out / "comparison.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## common settings", "## own settings"]
    assert f"| `fedavg` | local.lr {best} " in page
    assert (
        f"The chosen value is the least or the greatest of its grid: `fedavg` (local.lr {best})." in page
        or best == 0.2
    )
    assert "Own settings: each row at each density tried 3 settings on the seeds 7, which no table has" in page

    # The same again: only what failed is tried again, and the result is the same.
    again = play()
    assert (again["tables"], again["tuning"]) == (made["tables"], made["tuning"])
    assert [line.partition(": ")[0] for line in said if line.startswith("[")] == [f"[5/5] {LOST}"]
    assert capsys.readouterr().err == lost
    assert play(report_only=True)["tables"] == made["tables"]
    assert capsys.readouterr().err == lost
