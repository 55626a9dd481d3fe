import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from ssfl_app.data.summary import ALL
from ssfl_app.options import ConfigError
from ssfl_app.results import plots, report
from ssfl_app.results import run_folder as runs
from ssfl_app.results.rows import compare_table, round_table, summary_table
from ssfl_app.results.run_folder import Run, read_run
from ssfl_app.results.table import NONE

CLASSES = ["cat", "dog", "owl"]
COUNTS = [[10, 0, 5], [0, 20, 0], [1, 1, 38]]
SETUP = {
    "round": 0,
    "strategy": "ssfl",
    "asked": [0, 1, 2],
    "ok": [0, 1],
    "lost": {"2": "no answer in 600 s"},
    "refused": {},
    "bytes_discovery_down": 1_000_000,
    "bytes_discovery_up": 2_000_000,
    "seconds": 1.5,
}


def one_round(number: int, central: float | None, local: float | None, **other: object) -> dict[str, object]:
    entry: dict[str, object] = {
        "round": number,
        "cohort": [0, 1],
        "ok": [0],
        "lost": {},
        "refused": {},
        "train_loss": 0.5,
        "central_loss": None,
        "central_accuracy": central,
        "local_accuracy_mean": local,
        "bytes_train_down": 300_000,
        "bytes_train_up": 200_000,
        "bytes_evaluate_down": 100_000,
        "bytes_mask_down": 50_000 if number == 1 else 0,
        "seconds": 2.0,
    }
    return entry | other


SUMMARY = {
    "strategy": "ssfl",
    "dataset": "digits",
    "partition": "dirichlet",
    "clients": 3,
    "cohort": 2,
    "rounds": 3,
    "seed": 1,
    "engine": "simulation",
    "density": 0.1,
    "parameters": 130,
    "prunable": 120,
    "alive": 12,
    "central_accuracy": 0.9341,
    "local_accuracy_mean": 0.8123,
    "bytes_discovery_down": 1_050_000,
    "bytes_discovery_up": 2_000_000,
    "bytes_mask_down": 50_000,
    "bytes_train_down": 900_000,
    "bytes_train_up": 600_000,
    "bytes_evaluate_down": 300_000,
    "bytes_dense_train": 13_500_000,
    "seconds_total": 7.5,
    "seconds_rounds": 6.0,
    "lost_replies": 1,
    "refused_replies": 1,
    "model_sha256": "ab" * 32,
    "mask_sha256": "cd" * 32,
}


def write_run(
    folder: Path,
    *,
    finished: bool = True,
    dense: bool = False,
    reason: str = "loss is NaN",
    seed: int = 1,
    factor: int = 1,
) -> Path:
    folder.mkdir(parents=True)
    strategy = "fedavg" if dense else "ssfl"
    config = {
        "strategy": strategy,
        "run": {"rounds": 3, "seed": seed, "clients": 3, "cohort": 2},
        "mask": {"density": 0.1},
        "data": {"name": "digits"},
        "partition": {"name": "dirichlet"},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    rounds = [
        one_round(1, 0.5, None, bytes_train_down=300_000 * factor),
        one_round(2, None, None),
        one_round(3, 0.9341, 0.8123, refused={"1": reason}),
    ]
    lines = [json.dumps(entry) + "\n" for entry in [SETUP, *rounds]]
    (folder / "rounds.jsonl").write_text("".join(lines if finished else lines[:3]))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "cores": 2}))
    if not dense:
        first, second = np.zeros((10, 10), dtype=bool), np.zeros((4, 5), dtype=bool)
        first[0, :8] = True
        second[0, :4] = True
        save_file({"conv10": first, "conv2": second}, folder / "mask.safetensors")
    if finished:
        changed = {"strategy": strategy, "seed": seed}
        if dense:
            changed |= {"density": 1.0, "alive": 120, "mask_sha256": None}
        (folder / "summary.json").write_text(json.dumps(SUMMARY | changed))
        clients = [
            {"client": k, "train": row, "test": [1, 1, 1], "accuracy": accuracy}
            for k, (row, accuracy) in enumerate(zip(COUNTS, [0.9, 0.7, None], strict=True))
        ]
        (folder / "clients.json").write_text(json.dumps({"class_names": CLASSES, "clients": clients}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "first"))


def test_run_reads_every_file(run: Run) -> None:
    assert run.config["run.rounds"] == 3
    assert run.config["strategy"] == "ssfl"
    assert runs.round_numbers(run).tolist() == [1, 2, 3]
    assert run.setup is not None
    assert run.setup["seconds"] == 1.5
    assert [tuple(layer) for layer in run.layers] == [("conv2", (4, 5), 20, 4), ("conv10", (10, 10), 100, 8)]
    assert runs.train_counts(run).tolist() == COUNTS
    assert run.environment == {"python": "3.11.7", "cores": 2}


def test_accuracies_skip_null_rounds(run: Run) -> None:
    at, values = runs.evaluated(run)
    assert at.tolist() == [0, 2]
    assert values.tolist() == [0.5, 0.9341]
    assert runs.evaluated(run, runs.LOCAL)[0].tolist() == [2]


def test_cumulative_mb_counts_discovery_mask_training_and_evaluation(run: Run) -> None:
    # 3.0 MB of discovery, then 0.3 + 0.2 + 0.1 MB a round, and the mask of 0.05 MB in the first.
    assert runs.cumulative_mb(run) == pytest.approx([3.65, 4.25, 4.85])


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed", finished=False)
    with (folder / "rounds.jsonl").open("a") as stream:
        stream.write('{"round": 3, "cohort": [0, ')
    assert runs.round_numbers(read_run(folder)).tolist() == [1, 2]


def test_line_written_last_counts_after_a_resume(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "resumed")
    with (folder / "rounds.jsonl").open("a") as stream:
        stream.write(json.dumps(one_round(3, 0.25, None)) + "\n")
    assert runs.evaluated(read_run(folder))[1].tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 5 is not JSON"),
        ("[1]", "line 5 is not a round"),
        ('{"round": "one"}', "line 5 is not a round"),
        ('{"round": 4, "seconds": "long"}', "seconds is 'long'; it is a number or null"),
        ('{"round": 4, "lost": [2]}', "lost is [2]"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    folder = write_run(tmp_path / "broken")
    with (folder / "rounds.jsonl").open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_run(folder)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder; it is a folder that `ssfl run` wrote"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"without config\.toml"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "rounds.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"without rounds\.jsonl"):
        read_run(folder)


def test_a_folder_of_runs_says_how_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.toml").write_text("")
    with pytest.raises(ConfigError) as error:
        read_run(tmp_path / "runs")
    rule = f"it is a folder that `ssfl run` wrote: {tmp_path / 'runs' / '*'} names those in it"
    assert str(error.value) == f"{tmp_path / 'runs'} is a folder without config.toml; {rule}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.toml", "a = = 1", "is not TOML"),
        ("summary.json", "{", "is not JSON"),
        ("summary.json", "[]", "it is a JSON object"),
        ("mask.safetensors", "short", "is not a safetensors file"),
        (
            "clients.json",
            '{"class_names": ["a"], "clients": [{"client": 0, "train": [1, 2]}]}',
            "is damaged",
        ),
    ],
)
def test_broken_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{re.escape(name)} .*{said}"):
        read_run(folder)


def test_compare_table_shows_hand_computed_numbers(run: Run) -> None:
    # Discovery 1.05 + 2 MB; dense 13.5 MB over 0.9 + 0.6 MB of training is 9 times as much.
    (row,) = compare_table([run]).rows
    assert " ".join(row) == "first ssfl digits dirichlet 0.1 1 93.41 81.23 - 3.05 0.9 0.6 9.00 1 1 7.5"


def test_unfinished_run_is_totalled_from_its_rounds(tmp_path: Path) -> None:
    killed = read_run(write_run(tmp_path / "killed", finished=False))
    # Density is 12 of 120 weights; no summary says what dense training would have sent.
    (row,) = compare_table([killed]).rows
    assert " ".join(row) == "killed (unfinished) ssfl digits dirichlet 0.1 1 50.00 - - 3.05 0.6 0.4 - 1 0 5.5"
    report.write_report([killed], tmp_path / "report.html")
    assert "killed is unfinished: 2 of 3 rounds were written" in (tmp_path / "report.html").read_text()


def test_run_killed_in_setup_still_gets_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "early", finished=False, dense=True)
    (folder / "rounds.jsonl").write_text("")
    (folder / "environment.json").unlink()
    report.write_report([read_run(folder)], tmp_path / "report.html")
    assert "0 of 3 rounds" in (tmp_path / "report.html").read_text()


def test_final_table_shows_bytes_against_dense() -> None:
    rows = dict(summary_table(SUMMARY, Path("runs/x")).rows)
    assert rows["accuracy, central test set"] == "93.41 %"
    assert rows["density"] == "0.1: 12 of 120 prunable weights alive; - of all 130 parameters"
    assert rows["training"] == "0.9 MB down, 0.6 MB up"
    assert rows["dense FedAvg, same messages"] == "13.50 MB: 9.00 x the training bytes"
    # 13.5 MB over 1.5 MB of training and 3.05 MB of discovery.
    assert rows["dense FedAvg, discovery counted"].startswith("2.97 x")
    assert rows["replies"] == "1 lost, 1 refused"
    assert rows["results"] == "runs/x"


def write_personal(folder: Path, *, finished: bool) -> Run:
    """Write a run of a method with personal models that counts its work and asks its clients in every round."""
    write_run(folder, finished=finished, dense=True)
    new = {"image_passes": 100, "validation_passes": 10, "bytes_peer": 4_000_000, "density": 0.25, "density_all": 0.3}
    asked = {"bytes_discovery_down": 500_000, "bytes_discovery_up": 100_000, "setup_lost": {"1": "no answer"}}
    rounds = [
        one_round(1, 0.5, 0.4, personal_accuracy_mean=0.6, **new, **asked),
        one_round(2, None, None, personal_accuracy_mean=None, **new, cohort=[0, 1, 2]),
    ]
    setup = SETUP | {"image_passes": 64, "validation_passes": 0}
    lines = [json.dumps(entry) + "\n" for entry in [setup, *rounds]]
    (folder / "rounds.jsonl").write_text("".join(lines))
    if finished:
        told = {"density": 0.25, "density_all": 0.3, "personal_accuracy_mean": 0.61, "trained_clients": 3}
        work = {"image_passes": 264, "validation_passes": 20, "bytes_peer": 8_000_000}
        (folder / "summary.json").write_text(json.dumps(SUMMARY | told | work))
    return read_run(folder)


def test_personal_models_and_work_are_shown(tmp_path: Path) -> None:
    run = write_personal(tmp_path / "personal", finished=True)
    rows = dict(summary_table(runs.metadata(run)).rows)
    assert rows["accuracy, personal models"] == "61.00 %"
    assert rows["density"] == "0.25: 12 of 120 prunable weights alive; 0.3 of all 130 parameters"
    assert rows["image passes"] == "264 in training, 20 forward only"
    assert rows["the same between peers"] == "8.00 MB without a server"
    (row,) = compare_table([run]).rows
    assert row[6:9] == ["93.41", "81.23", "61.00"]
    report.write_report([run], tmp_path / "report.html")
    assert "Personal %" in (tmp_path / "report.html").read_text()
    titles = [axes.get_title("left") for axes in plots.accuracy_by_round([run]).axes]
    assert titles[2:] == ["Clients' own test samples, mean: personal models"]


def test_unfinished_run_counts_its_work(tmp_path: Path) -> None:
    run = write_personal(tmp_path / "personal", finished=False)
    known = runs.metadata(run)
    assert known["personal_accuracy_mean"] == 0.6
    assert (known["density"], known["density_all"]) == (0.25, 0.3)
    assert (known["image_passes"], known["validation_passes"], known["bytes_peer"]) == (264, 20, 8_000_000)
    assert known["trained_clients"] == 3
    # Setup 1 MB, round 1 another 0.5 and the mask of 0.05.
    assert (known["bytes_discovery_down"], known["bytes_discovery_up"]) == (1_550_000, 2_100_000)
    assert runs.cumulative_mb(run) == pytest.approx([3.65 + 0.6, 4.25 + 0.6])
    assert [tuple(x) for x in runs.failures(run)][1:] == [(1, "1", "lost", "no answer")]


def test_folder_of_an_older_version_says_less(run: Run) -> None:
    known = runs.metadata(run)
    assert known["personal_accuracy_mean"] is None
    assert (known["image_passes"], known["validation_passes"], known["bytes_peer"]) == (None, None, 0)
    assert known["trained_clients"] == 2
    assert known["density_all"] == pytest.approx(22 / 130)  # 12 alive weights and the 10 that no mask covers
    rows = dict(summary_table(known).rows)
    assert "accuracy, personal models" not in rows
    assert "the same between peers" not in rows
    assert rows["image passes"] == "-"
    assert len(plots.accuracy_by_round([run]).axes) == 2


def test_tables_print_names_that_look_like_markup(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "[red]x[bold]"))
    assert "[red]x[bold]" in compare_table([run]).text()


def test_the_same_plot_is_the_same_file(run: Run) -> None:
    one, other = (plots.svg_bytes(lambda: plots.accuracy_by_round([run])) for _ in range(2))
    assert one == other


def test_report_of_one_run_is_self_contained_and_whole(run: Run, tmp_path: Path) -> None:
    report.write_report([run], tmp_path / "made" / "report.html")
    html = (tmp_path / "made" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http" not in html.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in html
    for text in ("no answer in 600 s", "loss is NaN", "mask.density", "93.41", "4.85", "3.11.7", "ab" * 32):
        assert text in html
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["report.html"]


def test_report_of_several_runs_compares_them(run: Run, tmp_path: Path) -> None:
    dense = read_run(write_run(tmp_path / "second", dense=True, seed=2))
    report.write_report([run, dense], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count("<img") == 2
    assert "2 runs compared" in html
    for text in ("first", "second", "run.seed", "Central %", "no answer in 600 s"):
        assert text in html


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "<b>&$x$", reason="<script>alert('x')</script>"))
    report.write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html


def test_report_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs is empty"):
        report.write_report([], tmp_path / "report.html")


def test_failed_write_leaves_the_old_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "report.html"
    report.write_report([run], path)
    old = path.read_bytes()

    def stop(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OSError, match="disk is full"):
        report.write_report([run], path)
    assert path.read_bytes() == old
    assert len(list(path.parent.iterdir())) == 1


def test_labels_tell_runs_apart(run: Run, tmp_path: Path) -> None:
    dense = read_run(write_run(tmp_path / "dense", dense=True))
    again = read_run(write_run(tmp_path / "again"))
    labels = ["ssfl, density 0.1, seed 1", "fedavg, dense, seed 1"]
    assert runs.run_labels([run, dense]) == labels
    assert runs.run_labels([run, again]) == [f"{labels[0]} (first)", f"{labels[0]} (again)"]


def test_accuracy_over_bytes_turns_logarithmic_where_it_spans_much(run: Run, tmp_path: Path) -> None:
    large = read_run(write_run(tmp_path / "large", factor=10_000))
    assert plots.accuracy_by_bytes([run]).axes[0].get_xscale() == "linear"
    figure = plots.accuracy_by_bytes([run, large])
    assert figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([3.65, 4.85])
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([50.0, 93.41])


def test_density_bars_are_alive_over_size(run: Run) -> None:
    bars = plots.density_by_layer(run).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([20.0, 8.0])  # type: ignore[attr-defined]


def test_figures_of_a_run_without_their_data_are_refused(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "dense", dense=True, finished=False))
    with pytest.raises(ConfigError, match=r"no mask\.safetensors"):
        plots.density_by_layer(run)
    with pytest.raises(ConfigError, match="no client accuracies"):
        plots.accuracy_by_client(run)


def test_partition_is_drawn_and_tabled(tmp_path: Path) -> None:
    png = tmp_path / "partition.png"
    assert report.write_picture(png, lambda: plots.class_distribution(COUNTS, CLASSES)) == f"picture: {png}"
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert report.partition_table(COUNTS, CLASSES).rows == [
        ["0", "cat (67 %)", "15", "2 of 3"],
        ["1", "dog (100 %)", "20", "1 of 3"],
        ["2", "owl (95 %)", "40", "3 of 3"],
        ["all", "owl (57 %)", "75", "3 of 3"],
    ]
    with pytest.raises(ConfigError, match=r"counts has shape \(3, 3\)"):
        report.partition_table(COUNTS, CLASSES[:2])


def test_a_partition_of_what_has_no_classes_is_a_table_of_sizes() -> None:
    assert report.partition_table([[1200], [3]], ALL).rows == [["0", "1,200"], ["1", "3"], ["all", "1,203"]]


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (100, 200)])
def test_partition_of_any_size_is_drawn(tmp_path: Path, clients: int, classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (clients, classes))
    names = [f"class ${c}" for c in range(classes)]
    report.write_picture(tmp_path / "p.png", lambda: plots.class_distribution(counts, names))
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_simulated_clock_is_a_column_a_row_and_a_figure(run: Run, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "timed")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for entry, seconds in zip(lines, (360.0, 720.0, 720.0, 1800.0), strict=True):
        entry["simulated_seconds"] = seconds
    (folder / "rounds.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    config = tomllib.loads((folder / "config.toml").read_text()) | {"clock": {"profile": "mobile"}}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    timed = read_run(folder)
    assert runs.has_clock(timed)
    assert not runs.has_clock(run)
    assert runs.cumulative_hours(timed).tolist() == pytest.approx([0.3, 0.5, 1.0])
    assert runs.metadata(timed)["simulated_hours"] == pytest.approx(1.0)
    assert [row[-1] for row in round_table(timed).rows] == ["0.3", "0.5", "1"]
    assert [row[-1] for row in compare_table([run, timed]).rows] == [NONE, "1"]
    assert ["simulated hours", "1"] in summary_table(runs.metadata(timed)).rows
    axes = plots.accuracy_by_hours([timed]).axes[0]
    assert axes.lines[0].get_xdata() == pytest.approx([0.3, 1.0])  # where it was evaluated
    page = report.report_page([run, timed])
    assert "by hours of the simulated clock, without evaluation: clients of mobile" in page
    assert "simulated" not in report.report_page([run]).lower()
