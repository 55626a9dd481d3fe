"""The headline metric: that of the task stands wherever people look, with its name, its unit and its direction."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ssfl_app import client_app, registry, server_app
from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, merge, parse
from ssfl_app.experiments.sweep_spec import read_plan
from ssfl_app.metrics import ACCURACY, Metric, common
from ssfl_app.options import ConfigError
from ssfl_app.results import compare, compare_page, plots, published
from ssfl_app.results.client_study import study_clients
from ssfl_app.results.report import write_report
from ssfl_app.results.rows import compare_table, round_table, summary_table
from ssfl_app.results.run_folder import CENTRAL, Run, metadata, read_run
from ssfl_app.results.study_plots import accuracy_by_clients, legend
from ssfl_app.results.table import NONE, in_metric
from ssfl_app.runtime import check
from ssfl_app.simulation.in_process import run_inline
from tests.in_process_grid import play, tamper
from tests.results.test_report import write_run

ERROR = Metric("mean absolute error", share=False, higher=False)
HEIGHTS = """
import numpy as np
from torch import nn

def data(path):
    x = np.random.default_rng(0).normal(size=(160, 5)).astype(np.float32)
    y = (170 + 8 * x[:, 0] - 5 * x[:, 1]).astype(np.float32)
    return (x[:120], y[:120]), (x[120:], y[120:])

def net(input_shape, outputs, norm):
    return nn.Sequential(nn.Linear(*input_shape, 8), nn.ReLU(), nn.Linear(8, outputs))
"""
KEYS: Flat = {
    "data.name": "heights_of_a_test:data",
    "model.name": "heights_of_a_test:net",
    "partition.name": "iid",
    "run.clients": 4,
    "run.cohort": 4,
    "run.rounds": 2,
    "mask.density": 0.5,
    "local.lr": 0.001,
    "engine.concurrent": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a data set of numbers, from which this process imports."""
    home = tmp_path_factory.mktemp("heights")
    (home / "heights_of_a_test.py").write_text(HEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv(registry.FOLDER, "")
        registry.import_from(home)
        yield home
    sys.modules.pop("heights_of_a_test", None)


@pytest.fixture(scope="module")
def played(folder: Path) -> dict[str, Run]:
    """Return run folders of a regression, played by the two apps in this process."""
    for strategy in ("ssfl", "fedavg"):
        flat = merge(KEYS, {"strategy": strategy, "run.out": str(folder / strategy)})
        run_inline(server_app.app, client_app.app, parse(flat))
    return {strategy: read_run(folder / strategy) for strategy in ("ssfl", "fedavg")}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of a classification that was recorded before there were other metrics."""
    return read_run(write_run(tmp_path_factory.mktemp("old") / "cats"))


def test_a_metric_says_how_it_looks_and_what_is_better() -> None:
    dice = Metric("Dice")
    assert [each.column for each in (ACCURACY, dice, ERROR)] == ["%", "(Dice %)", "(mean absolute error)"]
    assert [each.axis("by client") for each in (ACCURACY, dice, ERROR)] == [
        "Accuracy by client (%)",
        "Dice by client (%)",
        "Mean absolute error by client (lower is better)",
    ]
    assert ACCURACY.better(0.9, 0.8)
    assert ERROR.better(0.8, 0.9)
    nan = float("nan")
    assert not any(each.better(*pair) for each in (ACCURACY, ERROR) for pair in ((nan, 1.0), (1.0, nan), (1.0, 1.0)))
    assert Metric(**json.loads(json.dumps(ERROR.metadata()))) == ERROR
    assert common([ERROR, ERROR]) == ERROR
    assert common([]) == ACCURACY
    assert common([ERROR, dice]).column == "(metric)"


@pytest.mark.parametrize(
    "wrong", [{"name": ""}, {"name": 3}, {"name": "x", "share": 1}, {"name": "x", "higher": None}]
)
def test_what_is_no_metric_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is no metric; it has a name"):
        Metric(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (0.01234567, "0.01235"), (43.2, "43.20"), (999.96, "1,000.0"), (-12345.67, "-12,345.7"),
     (1e12, "1.000e+12"), (float("inf"), "inf"), (float("nan"), "nan"), (None, NONE)],
)  # fmt: skip
def test_numbers_are_shown_with_four_digits(value: float | None, shown: str) -> None:
    assert in_metric(value, ERROR) == shown


def test_the_run_folder_says_what_the_values_are(played: dict[str, Run], other: Run) -> None:
    run = played["ssfl"]
    assert run.metric == ERROR
    assert other.metric == ACCURACY
    assert json.loads((run.folder / "environment.json").read_text())["metric"] == ERROR.metadata()
    first, last = run.rounds
    assert first[CENTRAL] > last[CENTRAL] > 1  # in centimetres, and it is learnt
    assert run.clients is not None
    assert all(row["accuracy"] > 1 for row in run.clients["clients"])


def test_lines_and_tables_show_name_and_numbers_without_percent(played: dict[str, Run]) -> None:
    run = played["ssfl"]
    central = in_metric(run.rounds[-1][CENTRAL], ERROR)
    console = (run.folder / "console.log").read_text()
    assert f"mean absolute error: central  {central}  local " in console
    assert "%" not in console
    rows = dict(summary_table(metadata(run), metric=run.metric).rows)
    assert rows["mean absolute error, central test set"] == f"{central}, lower is better"
    assert "accuracy" not in " ".join(rows)
    table = round_table(run)
    assert table.headers[7:9] == ["Central (mean absolute error)", "Local mean (mean absolute error)"]
    assert table.rows[-1][7] == central


def test_report_and_plots_are_titled_by_the_metric(played: dict[str, Run], tmp_path: Path) -> None:
    run = played["ssfl"]
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in ("Mean absolute error by round", "Mean absolute error by client", "mean absolute error, central"):
        assert words in page
    assert "could not be drawn" not in page
    assert "Accuracy" not in page
    figure = plots.accuracy_by_round([run])
    assert figure.axes[0].get_ylabel() == "Mean absolute error (lower is better)"
    assert figure.axes[0].lines[0].get_ydata()[-1] == run.rounds[-1][CENTRAL]
    clients = plots.accuracy_by_client(run)
    assert run.clients is not None
    worst = max(run.clients["clients"], key=lambda row: row["accuracy"])
    assert clients.axes[0].texts[0].get_text() == f"client {worst['client']}"
    (points,) = study_clients([run])
    assert points.record()["metric"] == "mean absolute error"
    assert "Spearman of mean absolute error with samples" in legend(points)
    label = accuracy_by_clients([points]).axes[0].get_ylabel()
    assert label == "Mean absolute error of the global model\non the client's own test samples (lower is better)"


def test_runs_of_two_metrics_in_one_table_say_which(played: dict[str, Run], other: Run) -> None:
    table = compare_table([played["ssfl"], other])
    assert table.headers[6:9] == ["Central (metric)", "Local mean (metric)", "Personal (metric)"]
    central = in_metric(played["ssfl"].rounds[-1][CENTRAL], ERROR)
    assert [row[6] for row in table.rows] == [f"{central} mean absolute error", "93.41 % accuracy"]
    assert [row[8] for row in table.rows] == [NONE, NONE]
    alone = compare_table(list(played.values()))
    assert alone.headers[6] == "Central (mean absolute error)"
    assert alone.rows[0][6] == central
    figure = plots.accuracy_by_round([played["ssfl"], other])
    assert figure.axes[0].get_ylabel() == "Metric"
    assert figure.axes[0].lines[1].get_ydata().tolist() == pytest.approx([50.0, 93.41])


def test_a_comparison_is_in_units_of_the_target(played: dict[str, Run]) -> None:
    entries = [compare.Entry(run.config, strategy == "fedavg", run) for strategy, run in played.items()]
    made = compare.groups(entries, [], "ssfl")
    text = compare_page.markdown(made, "ssfl", [])
    assert "| global on own tests (mean absolute error) |" in text
    assert "Δ is in units of the target: " in text
    assert "- Mean absolute error: lower is better, and Δ below 0." in text
    assert "%" not in text.partition("![")[0]
    ours, theirs = (metadata(played[strategy])["local_accuracy_mean"] for strategy in ("fedavg", "ssfl"))
    shown = dict(zip(compare_page.headers("ssfl", ERROR), compare_page.cells(made[0].rows[0]), strict=True))
    assert shown["Δ own tests vs SSFL"] == in_metric(ours - theirs, ERROR, sign="+")
    assert shown["global on own tests (mean absolute error)"] == in_metric(ours, ERROR)
    assert compare.as_json(made, "ssfl", [])["tables"][0]["rows"][0]["metric"] == ERROR.metadata()
    (axes,) = compare_page.picture(made, list(played)).axes
    assert axes.get_ylabel() == "Mean absolute error on own tests (lower is better)"
    assert axes.lines[0].get_ydata()[0] == pytest.approx(theirs)
    changed = compare.Entry(entries[1].config, dense=True, run=replace(played["fedavg"], metric=ACCURACY))
    with pytest.raises(ConfigError, match=r"the metric of .*fedavg is accuracy; it has that of the other runs"):
        compare.groups([entries[0], changed], [], "ssfl")


def test_a_sweep_over_tasks_has_a_table_for_each(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(
        '[compare]\nstrategies = ["fedavg"]\naxes = {"task.name" = ["auto", "regression"]}'
    )
    assert read_plan([tmp_path / "sweep.toml"], []).axes == ["task.name"]
    for name in ("auto", "regression"):
        (tmp_path / f"{name}.toml").write_text(f'strategy = "fedavg"\ntask.name = "{name}"')
    assert read_plan([tmp_path / "auto.toml", tmp_path / "regression.toml"], []).axes == ["task.name"]


def test_another_metric_is_not_compared_with_published_accuracies(played: dict[str, Run], other: Run) -> None:
    said = published.Published("Table 1", "v1", "central", 88.0)
    lines = [
        published.Line("row", said, str(run.config["data.name"]), run.config, "finished", run)
        for run in (played["ssfl"], other)
    ]
    value = in_metric(played["ssfl"].rounds[-1][CENTRAL], ERROR)
    assert published.cells(lines[0])[3:5] == ["88.00", f"{value} mean absolute error"]
    assert published.cells(lines[1])[3:5] == ["88.00", "93.41"]
    assert published.measured_text(lines[1], " %") == "93.41 %"
    warning = "Measured is the mean absolute error, published are accuracies: do not compare them."
    assert warning in published.warnings(published.Page("", "v1", {}, lines))
    assert warning not in published.warnings(published.Page("", "v1", {}, lines[1:]))


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (2.0**21, "2097152.0")])
def test_a_value_that_diverged_is_refused_by_name(folder: Path, value: float, said: str) -> None:
    def change(payload: Payload) -> Payload:
        return Payload(payload.arrays, payload.metadata | {"accuracy": value})

    record = play(KEYS | {"run.rounds": 1}, faults={("evaluate", 1, 2): tamper(change)}).records[1]
    reason = record["evaluate_refused"]["2"]
    assert f"mean absolute error is {said}; it must be a finite number" in reason
    assert sorted(record["local_accuracy"]) == ["0", "1", "3"]
    assert all(found > 1 for found in record["local_accuracy"].values())


@pytest.mark.parametrize("strategy", ["subfedavg", "lotteryfl"])
def test_a_threshold_on_accuracy_is_refused_with_another_metric(folder: Path, strategy: str) -> None:
    rule = f"strategy is '{strategy}'; {strategy}.accuracy is a share that a good model is above, and mean absolute"
    with pytest.raises(ConfigError, match=rule):
        check(parse(merge(KEYS, {"strategy": strategy})))


@pytest.mark.parametrize(
    "metric", [[], 3, {"name": "x", "share": "no"}, {"unit": "cm"}, {"name": "x", "higher": 1}, {"name": ""}]
)
def test_a_folder_with_a_damaged_metric_is_refused_by_its_file(tmp_path: Path, metric: object) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps({"metric": metric}))
    with pytest.raises(ConfigError, match=r"environment.json cannot be read"):
        read_run(folder)


def test_a_share_and_a_number_have_other_bounds_in_a_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    table = json.loads((folder / "clients.json").read_text())
    table["clients"][0]["accuracy"] = 41.5
    (folder / "clients.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="accuracies from 0 to 1"):
        read_run(folder)
    (folder / "environment.json").write_text(json.dumps({"metric": ERROR.metadata()}))
    assert read_run(folder).metric == ERROR
    table["clients"][0]["accuracy"] = float("inf")
    (folder / "clients.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="and finite accuracies"):
        read_run(folder)
