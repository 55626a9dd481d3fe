"""`ssfl compare`: the statistics on hand-made run folders, the plan of a sweep file, and sweeps that are played."""

import json
import math
import multiprocessing
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from scipy import stats

from ssfl_app import locks
from ssfl_app.cli.main import main
from ssfl_app.experiments import jobs, workers
from ssfl_app.experiments.sweep import run_sweep
from ssfl_app.experiments.sweep_spec import SweepSpec, read_plan
from ssfl_app.options import ConfigError
from ssfl_app.results import compare
from ssfl_app.results.compare import Entry, Estimate, Row, estimate, holm
from ssfl_app.results.compare_page import cells, headers, markdown, picture
from ssfl_app.results.run_folder import metadata, read_run
from ssfl_app.results.status import read_status
from ssfl_app.results.table import NONE
from ssfl_app.simulation.command import Engine
from ssfl_app.sparsity.layout import Layout
from ssfl_app.training.models import ModelOptions, outline, width_for

TINY = """
[run]
clients = 4
cohort = 2
rounds = 1
[local]
epochs = 1
"""


def entry(
    folder: Path,
    strategy: str = "ssfl",
    seed: int = 1,
    density: float = 0.1,
    own: float | None = 0.9,
    partition: str = "iid",
    **summary: object,
) -> Entry:
    """Return a finished run in a folder of its own; fedavg is dense."""
    home = folder / f"{partition}-{strategy}-{density}-{seed}"
    home.mkdir(parents=True)
    config = {
        "strategy": strategy,
        "run": {"rounds": 3, "seed": seed, "clients": 8, "cohort": 4},
        "mask": {"density": density},
        "data": {"name": "digits"},
        "partition": {"name": partition},
        "model": {"name": "cnn"},
    }
    (home / "config.toml").write_text(tomli_w.dumps(config))
    (home / "rounds.jsonl").write_text("")
    (home / "environment.json").write_text(
        json.dumps({"cpu": "Abacus", "cores": 2, "gpu": None, "torch": "9.9", "time": f"2026-01-0{seed}T12:00:00"})
    )
    dense = strategy == "fedavg"
    known = {
        "density": 1.0 if dense else density,
        "parameters": 1000,
        "prunable": 900,
        "alive": 900 if dense else int(900 * density),
        "central_accuracy": 0.95,
        "local_accuracy_mean": own,
        "bytes_train_down": 3_000_000,
        "bytes_train_up": 2_000_000,
        "bytes_discovery_down": 500_000,
        "bytes_discovery_up": 250_000,
        "bytes_evaluate_down": 7_000_000,
        "seconds_total": 12.4,
    }
    (home / "summary.json").write_text(json.dumps(known | summary))
    run = read_run(home)
    return Entry(run.config, dense, run)


def column(name: str, row: Row, baseline: str = "ssfl") -> str:
    return dict(zip(headers(baseline), cells(row), strict=True))[name]


# ---- statistics --------------------------------------------------------------------------------


def test_interval_of_three_numbers_by_hand() -> None:
    # The sample variance of 0.90, 0.92 and 0.97 is (0.03^2 + 0.01^2 + 0.04^2) / 2; 4.302653 is t(0.975) with 2 df.
    found = estimate([0.90, 0.92, 0.97])
    assert found is not None
    assert found.mean == pytest.approx(0.93)
    assert found.half == pytest.approx(4.302653 * math.sqrt(0.0013) / math.sqrt(3), rel=1e-6)
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert estimate([]) is None


def test_difference_is_the_paired_test_of_scipy_over_common_seeds(tmp_path: Path) -> None:
    ours, theirs = {1: 0.90, 2: 0.92, 3: 0.97, 4: 0.1}, {1: 0.88, 2: 0.93, 3: 0.91, 5: 0.99}
    entries = [entry(tmp_path, "ssfl", seed, own=value) for seed, value in theirs.items()]
    entries += [entry(tmp_path, "random", seed, own=value) for seed, value in ours.items()]
    (table,) = compare.groups(entries, [], "ssfl")
    assert [row.strategy for row in table.rows] == ["ssfl", "random"]
    assert table.rows[0].difference is None
    found = table.rows[1].difference
    assert found is not None
    assert found.estimate.seeds == 3
    assert found.estimate.mean == pytest.approx((0.02 - 0.01 + 0.06) / 3)
    assert found.p == pytest.approx(stats.ttest_rel([0.90, 0.92, 0.97], [0.88, 0.93, 0.91]).pvalue)
    assert column("p", table.rows[1]) == f"{found.p:.3f}"
    assert column("Δ own tests vs SSFL", table.rows[1]) == f"+2.3 ± {100 * (found.estimate.half or 0):.1f}"


@pytest.mark.parametrize(
    ("ours", "gap", "p"),
    [
        ([0.9], "+10.0", NONE),  # one common seed: no test
        ([0.8, 0.7], "+0.0 ± 0.0", "same"),
        ([0.9, 0.8], "+10.0 ± 0.0", NONE),  # without spread t is infinite, which says nothing
        ([None, None], NONE, NONE),
        ([0.9, 0.800001], "+10.0 ± 0.0", "<0.001"),
    ],
)
def test_difference_without_a_test(tmp_path: Path, ours: Sequence[float | None], gap: str, p: str) -> None:
    entries = [entry(tmp_path, "ssfl", seed, own=value) for seed, value in ((1, 0.8), (2, 0.7))]
    entries += [entry(tmp_path, "random", seed, own=value) for seed, value in enumerate(ours, 1)]
    (table,) = compare.groups(entries, [], "ssfl")
    assert column("Δ own tests vs SSFL", table.rows[1]) == gap
    assert column("p", table.rows[1]) == p


def test_own_is_personal_where_a_method_has_it(tmp_path: Path) -> None:
    entries = [entry(tmp_path, own=0.8), entry(tmp_path, "ditto", own=0.6, personal_accuracy_mean=0.9)]
    (table,) = compare.groups(entries, [], "ssfl")
    row = table.rows[1]
    assert column("global on own tests %", row) == "60.0"
    assert column("personal on own tests %", row) == "90.0"
    assert column("Δ own tests vs SSFL", row) == "+10.0"


def test_holm_by_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04; times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04. The last is not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.5, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_the_tests_of_a_table_are_corrected_together(tmp_path: Path) -> None:
    seeds = {"ssfl": [0.9, 0.8, 0.85], "random": [0.8, 0.71, 0.76], "shuffled": [0.91, 0.79, 0.86], "topk": [0.9]}
    entries = [
        entry(tmp_path, name, seed, own=value, partition=partition)
        for partition in ("iid", "dirichlet")
        for name, values in seeds.items()
        for seed, value in enumerate(values, 1)
        if (partition, name) != ("dirichlet", "shuffled")
    ]
    both, one = compare.groups(entries, ["partition.name"], "ssfl")
    _, random, shuffled, topk = (row.difference for row in both.rows)
    assert random is not None
    assert shuffled is not None
    assert topk is not None
    low, high = (
        stats.ttest_rel(seeds["random"], seeds["ssfl"]).pvalue,
        stats.ttest_rel(*[seeds[n] for n in ("shuffled", "ssfl")]).pvalue,
    )
    assert (random.p_holm, shuffled.p_holm, topk.p_holm) == (pytest.approx(2 * low), pytest.approx(high), None)
    # A family is one table: there the same difference is the only test.
    assert one.rows[1].difference is not None
    assert one.rows[1].difference.p_holm == pytest.approx(low)
    assert column("p (Holm)", both.rows[1]) == f"{2 * low:.3f}"
    made = compare.as_json([both], "ssfl", [])["tables"][0]["rows"][1]["difference"]
    assert (made["p"], made["p_holm"]) == (random.p, random.p_holm)


# ---- table, file, picture ----------------------------------------------------------------------


def test_a_method_without_a_global_model_has_no_central_accuracy(tmp_path: Path) -> None:
    entries = [entry(tmp_path, "dispfl", central_accuracy=None, local_accuracy_mean=None, personal_accuracy_mean=0.8)]
    (row,) = compare.groups(entries, [], "ssfl")[0].rows
    shown = [column(f"{what} %", row) for what in ("central", "global on own tests", "personal on own tests")]
    assert shown == [NONE, NONE, "80.0"]


def test_rows_are_sorted_by_density_then_in_the_order_of_the_sweep(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, strategy, 1, density)
        for density in (0.05, 0.5)
        for strategy in ("shuffled", "ssfl", "fedavg")
        if strategy != "fedavg" or density == 0.05
    ]
    (table,) = compare.groups(entries, [], "ssfl")
    assert [(row.strategy, row.wanted) for row in table.rows] == [
        ("fedavg", None),
        ("shuffled", 0.5),
        ("ssfl", 0.5),
        ("shuffled", 0.05),
        ("ssfl", 0.05),
    ]
    # Dense: against the largest density of the baseline, and the notes say so.
    assert table.rows[0].difference is not None
    assert table.rows[0].difference.density == 0.5
    assert "`fedavg`: mask.density does not matter; Δ and p are against `ssfl` at 0.5." in markdown(
        [table], "ssfl", []
    )


def test_row_by_hand(tmp_path: Path) -> None:
    new = {"trained_clients": 8, "cohort": 4, "image_passes": 12345, "validation_passes": 7, "bytes_peer": 9_000_000}
    (table,) = compare.groups([entry(tmp_path, **new, density_all=0.25)], [], "ssfl")
    # 3 + 0.5 MB down and 2 + 0.25 MB up; the 7 MB of evaluation are left out.
    accuracy = ["95.0", "90.0", NONE, NONE, NONE]
    assert cells(table.rows[0]) == [
        "`ssfl`",
        "0.1",
        "0.25",
        "8",
        *accuracy,
        NONE,
        "3.50",
        "2.25",
        "9.00",
        "12,345",
        "12",
    ]
    text = markdown([table], "ssfl", [])
    assert "`ssfl`: every client trains in every round; image passes and MB count them all." in text
    assert "`ssfl`: validates while training" in text
    assert "Peer MB" in text


def test_an_older_folder_says_less(tmp_path: Path) -> None:
    (table,) = compare.groups([entry(tmp_path)], [], "ssfl")
    row = table.rows[0]
    # (90 alive + 100 that are never pruned) of 1000 parameters; the cohort is that of the configuration.
    assert [column(name, row) for name in ("of all params", "clients trained a round")] == ["0.19", "4"]
    assert [column(name, row) for name in ("peer MB", "image passes", "personal on own tests %")] == [NONE] * 3
    assert "every client trains" not in markdown([table], "ssfl", [])


def test_the_width_of_a_model_is_told(tmp_path: Path) -> None:
    one = entry(tmp_path)
    half = replace(one, config={**one.config, "model.width": 0.5})
    text = markdown(compare.groups([half], [], "ssfl"), "ssfl", [], "mine")
    assert "digits, iid partition, cnn of width 0.5, 8 clients, 3 rounds." in text.splitlines()


def test_a_table_for_each_combination_of_axes(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, strategy, seed, partition=partition, own=0.9 + seed / 100)
        for seed in (1, 2)
        for partition in ("iid", "dirichlet")
        for strategy in ("ssfl", "random")
    ]
    made = compare.groups(entries, ["partition.name"], "ssfl")
    text = markdown(made, "ssfl", [e.run.environment for e in entries if e.run], "mine", "picture.png")
    lines = text.splitlines()
    assert lines[0] == "# mine"
    assert [line for line in lines if line.startswith("#")][1:] == [
        "## partition.name = iid",
        "## partition.name = dirichlet",
    ]
    assert [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| `")] == [
        "`ssfl`",
        "`random`",
    ] * 2
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # aligned, and as many cells everywhere
    assert "91.5 ± 6.4" in text  # 0.91 and 0.92: 12.7062 * 0.00707 / sqrt(2)
    assert "digits, dirichlet partition, cnn, 8 clients, 3 rounds." in lines
    assert lines[-1] == "2 seeds (1, 2); 8 runs; 2 cores of Abacus, no GPU; torch 9.9; 2026-01-01 to 2026-01-02."
    panels = picture(made, ["ssfl", "random"]).axes
    assert [axes.get_title("left") for axes in panels] == ["partition.name = iid", "partition.name = dirichlet"]
    assert [axes.yaxis.label.get_visible() for axes in panels] == [True, False]  # they share one scale


def test_the_scale_of_a_picture_ends_where_a_share_does(tmp_path: Path) -> None:
    entries = [entry(tmp_path, "ssfl", seed, own=value) for seed, value in ((1, 0.2), (2, 0.99))]
    (axes,) = picture(compare.groups(entries, [], "ssfl"), ["ssfl"]).axes
    assert axes.get_ylim() == (0.0, 101.0)


def test_a_variant_is_a_row_with_its_name_and_its_settings(tmp_path: Path) -> None:
    whole, dense = entry(tmp_path, "ssfl", density=0.1), entry(tmp_path, "fedavg", own=0.8)
    narrow = replace(
        entry(tmp_path, "fedavg", density=0.2, own=0.7), dense=False, variant="narrow", settings={"model.width": 0.3}
    )
    narrow = replace(narrow, config={**narrow.config, "mask.density": 0.1})
    (table,) = compare.groups([whole, dense, narrow], [], "ssfl")
    assert [(row.name, row.wanted) for row in table.rows] == [("fedavg", None), ("ssfl", 0.1), ("narrow", 0.1)]
    page = markdown([table], "ssfl", [])
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == ["strategy", "its settings", "density"]
    assert lines[2:] == [["`fedavg`", "–", "1"], ["`ssfl`", "–", "0.1"], ["`narrow`", "model.width 0.3", "1"]]  # noqa: RUF001
    made = compare.as_json([table], "narrow", [])["tables"][0]["rows"][2]
    assert [made[key] for key in ("row", "strategy", "settings", "mask_density")] == [
        *("narrow", "fedavg"),
        {"model.width": 0.3},
        0.1,
    ]
    # It may be what others are compared with, and it is a name in the picture.
    (table,) = compare.groups([whole, dense, narrow], [], "narrow")
    assert [row.difference and round(row.difference.estimate.mean, 3) for row in table.rows] == [0.1, 0.2, None]
    (axes,) = picture([table], ["ssfl", "fedavg", "narrow"]).axes
    assert {"ssfl", "fedavg", "narrow"} <= {str(line.get_label()) for line in axes.lines}


def test_missing_runs_are_rows_and_are_named(tmp_path: Path) -> None:
    whole = entry(tmp_path, "ssfl", 1)
    lost = Entry({**whole.config, "run.seed": 2}, dense=False, run=None, reason="failed: loss is NaN")
    other = Entry({**whole.config, "strategy": "random"}, dense=False, run=None, reason="failed: the disk is full")
    made = compare.groups([whole, lost, other], [], "ssfl")
    assert cells(made[0].rows[0])[0] == "`ssfl` (1 of 2 seeds)"
    assert cells(made[0].rows[1]) == ["`random`", "0.1", NONE, NONE, "failed", *[NONE] * 10]
    text = markdown(made, "ssfl", [])
    assert "- failed: loss is NaN: `ssfl`, density 0.1, seed 2." in text
    assert "- failed: the disk is full: `random`, density 0.1, seed 1." in text
    written = json.loads(json.dumps(compare.as_json(made, "ssfl", [{"cpu": "a"}, {"cpu": "a"}])))
    assert written["tables"][0]["rows"][0]["missing"] == {"2": "failed: loss is NaN"}
    assert written["tables"][0]["rows"][0]["means"]["own"] == {"mean": 0.9, "half_width_95": None, "seeds": 1}
    assert written["environments"] == [{"cpu": "a"}]


def test_picture_has_a_marker_for_each_row_even_for_a_method_that_sends_nothing(tmp_path: Path) -> None:
    sizes = ("train_down", "train_up", "discovery_down", "discovery_up")
    silent = entry(tmp_path, "random", own=0.7, **{f"bytes_{size}": 0 for size in sizes})
    made = compare.groups([entry(tmp_path, "ssfl", 1, 0.1), entry(tmp_path, "ssfl", 1, 0.5), silent], [], "ssfl")
    (axes,) = picture(made, ["ssfl", "random"]).axes
    assert axes.get_xscale() == "log"
    shown = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    assert shown["ssfl"] == pytest.approx(np.array([[5.75, 90.0], [5.75, 90.0]]))
    assert shown["random"] == pytest.approx(np.array([[2.875, 70.0]]))
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.1", "0.1 (0 MB)"]


def test_hours_of_a_simulated_clock_are_a_column_and_a_panel_of_their_own(tmp_path: Path) -> None:
    plain, timed = entry(tmp_path, "random", own=0.8), entry(tmp_path, "ssfl", simulated_hours=1.5)
    timed = replace(timed, config={**timed.config, "clock.profile": "hospital"})
    made = compare.groups([timed, plain], [], "ssfl")
    text = markdown(made, "ssfl", [])
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [line[-1].strip() for line in (lines[0], *lines[2:])] == ["simulated hours", "1.5", "–"]  # noqa: RUF001
    assert "clients of hospital would have taken" in text
    by_bytes, by_hours = picture(made, ["ssfl", "random"]).axes
    assert by_bytes.get_xlabel() == "MB down and up, with masks and discovery"
    assert by_hours.get_xlabel() == "Simulated hours"
    shown = {str(line.get_label()): np.asarray(line.get_xydata()) for line in by_hours.lines}
    assert shown["ssfl"] == pytest.approx(np.array([[1.5, 90.0]]))
    assert "random" not in shown  # it has no clock
    assert compare.as_json(made, "ssfl", [])["tables"][0]["rows"][0]["means"]["hours"]["mean"] == 1.5
    assert "simulated" not in markdown(compare.groups([plain], [], "ssfl"), "ssfl", [])


# ---- the plan ----------------------------------------------------------------------------------


def plan(tmp_path: Path, *texts: str, overrides: Sequence[str] = ()) -> SweepSpec:
    files = [tmp_path / f"{name}.toml" for name, _ in zip("abcd", texts, strict=False)]
    for path, text in zip(files, texts, strict=True):
        path.write_text(text)
    return read_plan(files, overrides)


def test_a_dense_strategy_is_played_once_a_seed(tmp_path: Path) -> None:
    text = '[compare]\nstrategies = ["ssfl", "fedavg"]\ndensities = [0.5, 0.1]\nseeds = [1, 2]\n'
    assert [run.slug for run in plan(tmp_path, text).runs] == [
        *("ssfl-d0.5-s1", "fedavg-s1", "ssfl-d0.1-s1"),
        *("ssfl-d0.5-s2", "fedavg-s2", "ssfl-d0.1-s2"),
    ]


def test_an_ordinary_file_is_one_run(tmp_path: Path) -> None:
    made = plan(tmp_path, 'strategy = "random"\n[run]\nseed = 7\n')
    assert [(run.slug, run.name) for run in made.runs] == [("random-d0.1-s7", "random density 0.1 seed 7")]
    assert (made.axes, made.baseline) == ([], "ssfl")


def test_axes_and_keys_of_one_strategy(tmp_path: Path) -> None:
    text = (
        '[compare]\nstrategies = ["ssfl", "random"]\nbaseline = "random"\n[compare.axes]\n'
        '"partition.name" = ["iid", "dirichlet"]\n[compare.only.random]\n"local.epochs" = 3\n'
    )
    made = plan(tmp_path, text)
    assert (made.axes, made.baseline) == (["partition.name"], "random")
    assert [(run.slug, run.flat["partition.name"], run.flat["local.epochs"]) for run in made.runs] == [
        ("ssfl-d0.1-s1-partition.name-iid", "iid", 5),
        ("random-d0.1-s1-partition.name-iid", "iid", 3),
        ("ssfl-d0.1-s1-partition.name-dirichlet", "dirichlet", 5),
        ("random-d0.1-s1-partition.name-dirichlet", "dirichlet", 3),
    ]
    # -c has the last word, also over the lists.
    made = plan(tmp_path, text, overrides=["local.epochs=1 partition.name='iid' mask.density=0.2"])
    assert [(run.slug, run.flat["local.epochs"]) for run in made.runs] == [
        ("ssfl-d0.2-s1-partition.name-iid", 1),
        ("random-d0.2-s1-partition.name-iid", 1),
    ]


ALSO = """
[compare]
strategies = ["ssfl", "fedavg"]
densities = [0.5, 0.1]
baseline = "slow"
[compare.only.ssfl]
"local.epochs" = 2
[[compare.also]]
name = "slow"
"local.lr" = 0.01
[[compare.also]]
name = "small-0.1"
strategy = "fedavg"
"mask.density" = 0.1
model.name = "resnet20"
"""


def test_variants_are_rows_of_the_same_table(tmp_path: Path) -> None:
    made = plan(tmp_path, ALSO)
    assert (made.axes, made.baseline) == ([], "slow")
    # What is dense stands at one density, if it names one; the keys of a strategy are those of its variants too.
    assert [(run.slug, run.row, run.density) for run in made.runs] == [
        ("ssfl-d0.5-s1", "ssfl", 0.5),
        ("fedavg-s1", "fedavg", None),
        ("slow-d0.5-s1", "slow", 0.5),
        ("ssfl-d0.1-s1", "ssfl", 0.1),
        ("slow-d0.1-s1", "slow", 0.1),
        ("small-0.1-s1", "small-0.1", 0.1),
    ]
    slow, small = (next(run for run in made.runs if run.variant == name) for name in ("slow", "small-0.1"))
    assert [slow.flat[key] for key in ("strategy", "local.epochs", "local.lr")] == ["ssfl", 2, 0.01]
    assert [small.flat[key] for key in ("strategy", "model.name")] == ["fedavg", "resnet20"]
    assert slow.settings == ("local.epochs", "local.lr")
    # -c has the last word: the variant of another density is no part of that.
    assert [run.slug for run in plan(tmp_path, ALSO, overrides=["mask.density=0.5"]).runs] == [
        *("ssfl-d0.5-s1", "fedavg-s1", "slow-d0.5-s1"),
    ]
    assert plan(tmp_path, ALSO.replace('"mask.density" = 0.1', '"mask.density" = 0.2')).runs[-1].density == 0.2


def test_all_of_a_density_comes_first_if_asked(tmp_path: Path) -> None:
    text = "[compare]\ndensities = [0.5, 0.1]\nseeds = [1, 2]\n"
    slugs = [[run.slug for run in plan(tmp_path, text + more).runs] for more in ("", 'order = "density"\n')]
    assert slugs == [
        ["ssfl-d0.5-s1", "ssfl-d0.1-s1", "ssfl-d0.5-s2", "ssfl-d0.1-s2"],
        ["ssfl-d0.5-s1", "ssfl-d0.5-s2", "ssfl-d0.1-s1", "ssfl-d0.1-s2"],
    ]


def test_files_are_pooled(tmp_path: Path) -> None:
    seeds = '[compare]\nstrategies = ["ssfl", "fedavg"]\nseeds = [1, 2]\n'
    assert len(plan(tmp_path, seeds, "[compare]\nseeds = [2, 3]\n").runs) == 5
    # Another learning rate is another run; it may not be a row of the same table.
    made = plan(tmp_path, seeds, "[local]\nlr = 0.05\n")
    assert [run.slug for run in made.runs][-1] == "ssfl-d0.1-s1-b"
    assert made.axes == ["local.lr"]
    # Other images are another table even if the strategies are others; options of other strategies say nothing.
    assert plan(tmp_path, 'strategy = "fedavg"\n', '[partition]\nname = "iid"\n').axes == ["partition.name"]
    # A cohort that nobody asked for is 10, or all clients where there are fewer: the number of clients says it.
    clients = '[compare.axes]\n"run.clients" = [4, 20]\n'
    assert [run.flat["run.cohort"] for run in plan(tmp_path, clients).runs] == [4, 10]
    assert plan(tmp_path, clients).axes == ["run.clients"]
    assert plan(tmp_path, clients, "[run]\nclients = 20\ncohort = 5\n").axes == ["run.clients", "run.cohort"]
    assert plan(tmp_path, 'strategy = "fedavg"\n', 'strategy = "fedavg"\n[ssfl]\nsaliency-share = 0.5\n').axes == []


BAD = [
    ("[compare]\nseeds = 3\n", "compare.seeds is 3; it is a list of one value or more"),
    ("[compare]\ndensities = []\n", "compare.densities is []; it is a list of one value or more"),
    ('[compare]\nstrategies = ["sfsl"]\n', "compare.strategies is 'sfsl'; it is one of ssfl, "),
    ('[compare]\nbaseline = "x"\n', "compare.baseline is 'x'; it is one of ssfl, "),
    ('[compare]\norder = "strategy"\n', "compare.order is 'strategy'; it is one of seed, density"),
    ("[compare]\nalso = 3\n", "compare.also is 3; it is tables [[compare.also]], one for each variant"),
    ("[[compare.also]]\n'local.lr' = 0.1\n", "compare.also has the name ''; it is a name of letters, digits and"),
    ("[[compare.also]]\nname = 'fedavg'\n", "compare.also has the name 'fedavg'; it is a name of letters"),
    ("[[compare.also]]\nname = 'a'\n[[compare.also]]\nname = 'a'\n", "compare.also has the name 'a'; it is a name"),
    ("[[compare.also]]\nname = 'a'\nstrategy = 'x'\n", "strategy of a in compare.also is 'x'; it is one of ssfl, "),
    ("[[compare.also]]\nname = 'a'\n'partition.alpha' = 1.0\n", "compare.also has partition.alpha for a; "),
    ("[[compare.also]]\nname = 'a'\n'local.lrr' = 1.0\n", "local.lrr is not a key"),
    (
        "[[compare.also]]\nname = 'a'\n'local.lr' = 0.1\n[compare.axes]\n'local.lr' = [0.2]\n",
        "compare.also has local.lr for a; it is a key that rows of one table may differ in",
    ),
    ("[compare]\nseed = [1]\n", "compare.seed is not a key; did you mean compare.seeds?"),
    ("[compare.axes]\n'local.epoch' = [1]\n", "local.epoch is not a key"),
    ("[compare.axes]\n'run.seed' = [1]\n", "compare.axes has run.seed; its values stand in compare.seeds"),
    ("[compare.axes]\n'run.out' = ['a']\n", "compare.axes has run.out; it makes no other run"),
    ("[compare.only.x]\n'local.epochs' = 1\n", "compare.only is 'x'; it is one of ssfl, "),
    ("[compare.only.ssfl]\n'run.seed' = 1\n", "compare.only.ssfl has run.seed; "),
    ("[compare]\ndensities = [0.1, 1.7]\n", "mask.density is 1.7; it is a fraction in (0, 1]"),
    ("[run]\nout = 'a'\n", "run.out is 'a'; `ssfl compare` sets it itself, by --out"),
    ("compare = 1\n", "compare is not a key"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_sweep_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(tmp_path, text)
    assert str(error.value).startswith(said)


def test_two_baselines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.baseline is 'ssfl' in .*a\.toml, 'random' in .*b\.toml"):
        plan(tmp_path, '[compare]\nbaseline = "ssfl"\n', '[compare]\nbaseline = "random"\n')


# ---- playing -----------------------------------------------------------------------------------


Words = tuple[list[Path], list[str], Path, str, int, str, bool]


def words(
    tmp_path: Path, text: str, *overrides: str, jobs: int = 2, budget: str = "none", report_only: bool = False
) -> Words:
    (tmp_path / "sweep.toml").write_text(TINY + text)
    return [tmp_path / "sweep.toml"], list(overrides), tmp_path / "out", Engine(), jobs, budget, report_only


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    text = '[compare]\nstrategies = ["random", "fedavg"]\ndensities = [0.2, 0.1]\nbaseline = "random"\n'
    asked = words(tmp_path, text)
    random, dense = tmp_path / "out" / "runs" / "random-d0.2-s1", tmp_path / "out" / "runs" / "fedavg-s1"

    def interrupt(line: str) -> None:
        said.append(line)
        if line.startswith("[1/3]"):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_sweep(*asked, interrupt)
    assert end.value.code == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "comparison.md").exists()
    # Not whoever has a summary: the other run may have been stopped between that and its report.
    homes = (tmp_path / "out" / "runs").glob("*/")
    finished = [home for home in homes if read_status(home).get("status") == "finished"]
    assert finished
    before = {path: (path / "summary.json").read_bytes() for path in finished}

    run_sweep(*asked, said.append)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| `")] == [
        "`fedavg`",
        "`random`",
        "`random`",
    ]
    assert {path: (path / "summary.json").read_bytes() for path in finished} == before
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["baseline"] == "random"
    assert not list((tmp_path / "out" / "runs").glob("*.stderr"))
    assert metadata(read_run(random))["density"] == pytest.approx(0.2, abs=1e-4)

    said.clear()
    run_sweep(*asked, said.append)
    assert said[0].startswith("3 of 3 runs are finished already")
    assert not any(line.startswith("[") for line in said)

    model = metadata(read_run(dense))["model_sha256"]
    (dense / "summary.json").unlink()
    run_sweep(*words(tmp_path, asked_text(asked), report_only=True), said.append)
    assert "unfinished: `fedavg`, seed 1." in (tmp_path / "out" / "comparison.md").read_text()
    run_sweep(*asked, said.append)
    assert any(line.startswith("[3/3] fedavg seed 1: central ") for line in said)
    assert metadata(read_run(dense))["model_sha256"] == model

    with pytest.raises(ConfigError, match=r"random-d0.2-s1 holds another run: local\.lr is 0\.05; that run was"):
        run_sweep(*words(tmp_path, asked_text(asked), "local.lr=0.05"), said.append)


def test_a_run_that_the_end_of_the_budget_cuts_is_no_failure(tmp_path: Path) -> None:
    said: list[str] = []
    asked = words(
        tmp_path, '[compare]\nstrategies = ["fedavg", "random"]\n', "run.rounds=100000", jobs=1, budget="2s"
    )
    run_sweep(*asked, said.append)
    assert "fedavg seed 1: the time is over; it goes on another time" in said
    (table,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["tables"]
    cut, waiting = (row["missing"]["1"] for row in table["rows"])
    assert cut in ("unfinished", "not played")  # on a slow machine it had not begun
    assert waiting == "not played"


def test_a_run_without_a_global_model_is_told_by_its_personal_ones(tmp_path: Path) -> None:
    said: list[str] = []
    run_sweep(*words(tmp_path, "", "strategy='dispfl'", "run.rounds=1"), said.append)
    assert any(line.startswith("[1/1] dispfl") and ": personal accuracy " in line for line in said)


def asked_text(asked: Words) -> str:
    return asked[0][0].read_text().removeprefix(TINY)


def test_a_failed_run_is_named_and_the_others_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        '[compare]\nstrategies = ["fedavg", "random"]\n[compare.only.random]\n"local.lr" = 1e38\n"local.clip" = 0.0\n'
    )
    said: list[str] = []
    with pytest.raises(SystemExit) as end:
        run_sweep(*words(tmp_path, text), said.append)
    assert end.value.code == 1
    assert capsys.readouterr().err == "ssfl: 1 of 2 runs failed: random density 0.1 seed 1\n"
    written = (tmp_path / "out" / "comparison.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert [" failed " in row for row in rows] == [False, True]
    assert "- failed: the run failed: training in round 1: 0 of 2 clients" in written
    assert [line for line in said if line.startswith("[") and "random density 0.1 seed 1: failed: " in line]


def test_a_process_that_dies_before_it_says_anything_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (run,) = read_plan(words(tmp_path, '[compare]\nstrategies = ["fedavg"]\n')[0], []).runs
    dead = multiprocessing.get_context("fork").Process(target=os._exit, args=(9,))
    monkeypatch.setattr(workers, "start", lambda *_: dead.start() or dead)
    job = jobs.start(run, tmp_path / "home", Engine("ray"), tmp_path, tmp_path / ".lock")
    dead.join()
    assert jobs.reason(job) == f"failed: exit code 9, {job.errors}"


def test_two_sweeps_do_not_play_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locks.locked(tmp_path / "out" / ".lock"), pytest.raises(ConfigError, match="no other `ssfl compare`"):
        run_sweep(*words(tmp_path, ""), lambda _: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["missing.toml"], "CONFIG is missing.toml; it is a TOML file"),
        (["a.toml", "--engine", "spark"], "--engine is 'spark'; it is one of ray, inline"),
        (["a.toml", "--budget", "soon"], "--budget is 'soon'; it is a time above 0 such as 90s, 10m or 2h, or none"),
        (["a.toml", "--jobs", "0"], "--jobs is 0; it is a number of at least 1"),
        (["a.toml", "-c", "local.epoch=1"], "local.epoch is not a key"),
        (["a.toml", "-c", "run.out='x'"], "run.out is 'x'; `ssfl compare` sets it itself, by --out"),
        (["a.toml", "-c", "run.clients=2000 run.cohort=5"], "run.clients is 2000; "),
        (["a.toml", "--report-only"], "--out is "),
    ],
)
def test_bad_commands_give_one_line_and_write_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssfl", "compare", *options])
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ssfl: {said}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


def test_report_only_compares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text("")
    (tmp_path / "runs" / "compare-a" / "runs").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["ssfl", "compare", "a.toml", "--report-only"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "not played" in out
    assert f"picture: {tmp_path / 'runs' / 'compare-a' / 'comparison.png'}" in out
    assert (tmp_path / "runs" / "compare-a" / "comparison.md").read_text() in out


def test_example_sweep_file_is_valid() -> None:
    made = read_plan([Path(__file__).parents[2] / "configs" / "digits-compare.toml"], [])
    assert len(made.runs) == 3 * (3 * 2 + 1)
    assert made.axes == []


def test_the_study_is_a_valid_sweep_with_as_many_settings_for_each_row() -> None:
    made = read_plan([Path(__file__).parents[2] / "configs" / "digits-study.toml"], ["run.seed=1"])
    rows = [block.runs for block in made.blocks]
    assert made.axes == ["partition.name"]
    assert len(made.searches) == len(made.runs) == sum(map(len, rows))
    assert {len(search.candidates) for search in made.searches} == {4}
    assert len(made.blocks) == 3  # a block for each density
    # In order of importance.
    assert {(run.flat["partition.name"], run.density) for run in rows[0]} == {
        ("dirichlet", 0.05),
        ("dirichlet", None),
    }


def test_the_ablations_are_a_valid_sweep_of_one_key_each() -> None:
    made = read_plan([Path(__file__).parents[2] / "configs" / "digits-ablations.toml"], ["run.seed=1"])
    plain = {run.density: run.flat for run in made.runs if run.row == "ssfl"}
    own = [(run, plain[run.flat["mask.density"]]) for run in made.runs if run.row.startswith("ssfl-")]
    changed = [sorted(key for key in run.flat if run.flat[key] != base[key]) for run, base in own]
    assert {len(keys) for keys in changed} == {1}
    assert {keys[0].partition(".")[0] for keys in changed} == {"ssfl", "mask"}


def test_the_narrow_networks_of_the_study_are_as_large_as_the_masked_ones() -> None:
    with (Path(__file__).parents[2] / "configs" / "digits-study.toml").open("rb") as file:
        variants = tomllib.load(file)["compare"]["also"]
    options, digits = ModelOptions("cnn"), ((1, 8, 8), 10)
    layout = Layout.of(outline(options, *digits))
    assert [variant["mask.density"] for variant in variants] == [0.5, 0.1, 0.05]
    for variant in variants:
        alive = layout.size - layout.prunable_size + round(variant["mask.density"] * layout.prunable_size)
        assert variant["model.width"] == width_for(options, *digits, alive)
