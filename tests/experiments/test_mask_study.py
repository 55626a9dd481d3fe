import json
import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from typer.testing import CliRunner

from ssfl_app import config as configuration
from ssfl_app.cli.main import app
from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.experiments import mask_study as study
from ssfl_app.options import ConfigError
from ssfl_app.results.client_study import study_clients
from ssfl_app.results.run_folder import read_run
from ssfl_app.results.study_plots import DRAWS, GRADIENT, MEASURES, SCORES, accuracy_by_clients, mask_error
from ssfl_app.runtime import get_runtime
from ssfl_app.sparsity.layout import Layout, state_digest
from ssfl_app.sparsity.mask import Mask
from tests.results.test_report import write_run

FLAT = configuration.merge(configuration.read_overrides(["run.clients=8 run.cohort=1 ssfl.saliency-batch-size=16"]))
LAYOUT = Layout((("w", (8,)),), ("w",))
PNG = b"\x89PNG\r\n\x1a\n"


def mask(*alive: int) -> Mask:
    return Mask(LAYOUT, np.isin(np.arange(8), alive))


@pytest.fixture(scope="module")
def digits() -> study.MaskStudy:
    # 8 clients x 8 minibatches: 64 are all that the draws are of.
    return study.study_masks(FLAT, (1, 8, 64), repeats=2)


@pytest.fixture(scope="module")
def scorer() -> study.Scorer:
    return study.Scorer(get_runtime(FLAT), 64)


def test_distances_by_hand() -> None:
    # {0,1,2,3} and {2,3,4,5}: 2 in common, 6 in either, 4 in one only.
    found = study.distances(mask(0, 1, 2, 3), mask(2, 3, 4, 5))
    assert found == {"error": 4 / 8, "jaccard": 4 / 6, "flip-rate": 4 / 8}
    assert study.distances(mask(0, 1), mask(1, 7)) == {"error": 2 / 4, "jaccard": 2 / 3, "flip-rate": 2 / 8}
    assert set(study.distances(mask(3, 4), mask(3, 4)).values()) == {0.0}
    assert study.distances(mask(3), mask(4)) == {"error": 1.0, "jaccard": 1.0, "flip-rate": 2 / 8}
    with pytest.raises(ValueError, match="both masks are empty"):
        study.distances(mask(), mask())


def test_a_repeat_asks_every_client_once_before_any_a_second_time() -> None:
    first, other = (study.sequence(1, 5, 4, repeat, 20) for repeat in (0, 3))
    assert sorted(first) == sorted(other) == [(k, b) for k in range(5) for b in range(4)]
    assert sorted(first[:5]) == [(k, 0) for k in range(5)]  # SSFL's own
    assert sorted(other[:5]) == [(k, 3) for k in range(5)]
    assert [k for k, _ in first[:5]] == [k for k, _ in first[5:10]]
    assert [k for k, _ in first[:5]] != [k for k, _ in other[:5]]


def test_the_minibatches_are_those_of_a_client_of_ssfl(scorer: study.Scorer) -> None:
    shop = get_runtime(configuration.merge(FLAT, {"strategy": "ssfl"}))
    about = {"weights": state_digest(shop.layout, shop.initial_state())}
    answer = shop.rule(3, cast(ClientState, None)).answer_query("saliency", Payload({}, about))
    # The answer is a mean of one minibatch, in fixed point.
    np.testing.assert_allclose(scorer.drawn((3, 0)), answer.arrays["values"], rtol=1e-6, atol=2.0**-56)
    assert np.abs(scorer.drawn((3, 1)) - answer.arrays["values"]).max() > 1e-4


def test_a_cut_has_every_image_once_in_pieces_of_nearly_one_size() -> None:
    pieces = study.cut(np.arange(100, 172), 16, np.random.default_rng(1))
    assert [len(piece) for piece in pieces] == [15, 15, 14, 14, 14]
    assert sorted(np.concatenate(pieces)) == list(range(100, 172))
    assert [piece.tolist() for piece in study.cut(np.array([7]), 16, np.random.default_rng(1))] == [[7]]


def test_oracles_of_the_whole_data(scorer: study.Scorer) -> None:
    images = np.arange(96)
    pieces = np.split(np.random.default_rng(2).permutation(images), 6)
    found = study.oracle_scores(scorer, pieces)
    scores = [scorer.score(scorer.gradient(piece)) for piece in pieces]
    np.testing.assert_allclose(found[SCORES], np.mean(scores, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-12)
    # Of equal pieces, the mean gradient is that of all images; and |mean| <= mean of ||.
    whole = scorer.score(scorer.gradient(images))
    np.testing.assert_allclose(found[GRADIENT], whole, rtol=1e-3, atol=1e-6)
    assert (found[GRADIENT] <= found[SCORES] * (1 + 1e-5)).all()


def test_all_minibatches_of_an_oracle_have_the_error_0_in_any_order(scorer: study.Scorer) -> None:
    pieces = np.split(np.arange(96), 6)
    one, other = (study.oracle_scores(scorer, order) for order in (pieces, pieces[::-1]))
    layout = get_runtime(FLAT).layout
    masks = [Mask.top(layout, scores, 0.1) for scores in (one[SCORES], other[SCORES], other[GRADIENT])]
    assert set(study.distances(masks[0], masks[1]).values()) == {0.0}
    assert study.distances(masks[0], masks[2])["error"] > 0.01


def test_the_error_falls_and_only_the_same_means_reach_0(digits: study.MaskStudy) -> None:
    assert list(digits.errors) == [SCORES, GRADIENT, DRAWS]
    assert (digits.drawn, digits.kept, digits.prunable) == (64, 15107, 151072)
    for oracle, tables in digits.errors.items():
        assert list(tables) == list(MEASURES)
        for table in tables.values():
            assert table.shape == (2, 3)
            assert ((table >= 0) & (table <= 1)).all()
            assert (table[:, 2] < table[:, 0]).all(), oracle  # n = 64 and n = 1
    for measure in MEASURES:
        assert (digits.errors[DRAWS][measure][:, 2] == 0).all()  # all 64
        assert (digits.errors[DRAWS][measure][:, 1] > 0).all()
        assert (digits.errors[SCORES][measure] > 0).all()
        assert (digits.errors[GRADIENT][measure] > 0.02).all()
    error, jaccard, flips = (digits.errors[GRADIENT][measure] for measure in MEASURES)
    assert jaccard == pytest.approx(2 * error / (1 + error))
    assert flips == pytest.approx(2 * error * digits.kept / digits.prunable)


def test_repeats_differ_where_every_client_is_asked_once(digits: study.MaskStudy) -> None:
    one, other = digits.errors[SCORES]["error"][:, 1]  # n = 8 clients
    assert one != other


def test_the_same_numbers_again_and_without_keeping_scores(
    digits: study.MaskStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "MAX_CACHE", 0)
    said: list[str] = []
    again = study.study_masks(FLAT | {"strategy": "fedavg"}, (1, 8, 64), 2, said.append)
    assert json.dumps(again.record()) == json.dumps(digits.record())
    assert said[-1] == "repeat 2 of 2"


def test_scope_and_density_are_those_of_the_configuration() -> None:
    flat = FLAT | {"mask.scope": "layer", "mask.density": 0.25, "ssfl.saliency-batch-size": 200}
    found = study.study_masks(flat, (1,), repeats=1)
    assert found.cut == 8  # a client's 179 or 180 images are one minibatch
    assert found.kept == found.prunable / 4
    everything = study.study_masks(flat | {"mask.density": 1.0}, (1,), repeats=1)
    assert all((table == 0).all() for tables in everything.errors.values() for table in tables.values())


@pytest.mark.parametrize("text", ["", "1,,2", "0,1", "-1", "1.5", "a", "9999999999"])
def test_bad_numbers_of_minibatches_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--batches is {text!r}; it is whole numbers of 1")):
        study.read_batches(text)


def test_numbers_of_minibatches_are_sorted_and_counted_once() -> None:
    assert study.read_batches("4, 1,2,4") == (1, 2, 4)


@pytest.mark.parametrize(
    ("changed", "batches", "repeats", "said"),
    [
        ({}, (1,), 0, "--repeats is 0; it is a whole number of at least 1"),
        ({}, (), 1, "--batches is []"),
        ({}, (2, 1), 1, "--batches is [2, 1]; it is rising whole numbers"),
        ({"mask.density": 1e-6}, (1,), 1, "mask.density is 1e-06; it leaves none of 151,072 prunable weights alive"),
        ({"mask.density": 1.5}, (1,), 1, "mask.density is 1.5"),
        ({"mask.min-per-layer": 10**6}, (1,), 1, "mask.min-per-layer is 1000000"),
        ({"run.clients": 5000}, (1,), 1, "run.clients is 5000"),
    ],
)
def test_what_cannot_be_studied_is_refused(
    changed: dict[str, float], batches: tuple[int, ...], repeats: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        study.study_masks(FLAT | changed, batches, repeats)


def test_the_figure_has_a_panel_a_measure_and_marks_the_clients(digits: study.MaskStudy) -> None:
    figure = mask_error(digits.batches, digits.errors, 8, {"cut": 96, "drawn": 64}, "digits $")
    assert len(figure.axes) == 3
    lines = figure.axes[0].lines
    assert lines[0].get_ydata() == pytest.approx(100 * digits.errors[SCORES]["error"].mean(axis=0))
    assert lines[-1].get_xdata() == [8, 8]
    assert figure.axes[0].texts[0].get_text() == "K = 8: one minibatch a client"
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "(a) mean of scores" in words[0]
    assert "96 minibatches" in words[0]
    assert "(b) score of the mean gradient" in words[1]
    assert "all 64 minibatches" in words[2]


def test_the_command_writes_picture_numbers_and_table(tmp_path: Path) -> None:
    words = ["study", "masks", "-c", "run.clients=4 ssfl.saliency-batch-size=8", "--batches", "1,4"]
    done = CliRunner().invoke(app, [*words, "--repeats", "2", "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "mask-error.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "made" / "mask-error.json").read_text())
    assert record["batches"] == [1, 4]
    assert record["config"]["run.clients"] == 4
    assert "torch" in record["environment"]
    numbers = record["errors"][SCORES]["error"]
    assert numbers["low"] == [min(column) for column in zip(*numbers["repeats"], strict=True)]
    assert f"{100 * numbers['mean'][1]:.2f} (" in done.output
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["mask-error.json", "mask-error.png"]


# ---- clients ---------------------------------------------------------------------------------


def rewrite(folder: Path, key: str, values: list[object]) -> Path:
    path = folder / "clients.json"
    known = json.loads(path.read_text())
    for row, value in zip(known["clients"], values, strict=True):
        row[key] = value
    path.write_text(json.dumps(known))
    return folder


def test_points_of_a_run_by_hand(tmp_path: Path) -> None:
    # (10, 0, 5), (0, 20, 0), (1, 1, 38) images of three classes; accuracies 0.9, 0.7 and none.
    (points,) = study_clients([read_run(write_run(tmp_path / "run"))])
    assert points.clients.tolist() == [0, 1]
    assert points.images.tolist() == [15, 20]
    assert points.classes.tolist() == [2, 1]
    assert points.entropy == pytest.approx([np.log2(3) - 2 / 3, 0.0])
    assert points.accuracy.tolist() == [0.9, 0.7]
    assert not points.personal
    assert points.spearman == {"images": None, "classes": None, "entropy": None}  # two clients are too few


def test_correlations_are_of_ranks(tmp_path: Path) -> None:
    folder = rewrite(write_run(tmp_path / "run"), "accuracy", [0.5, 0.6, 0.99])
    (points,) = study_clients([read_run(folder)])
    assert points.spearman["images"] == pytest.approx((1.0, 0.0))
    assert points.spearman["entropy"] == pytest.approx((-0.5, 2 / 3))  # ranks 3, 1, 2 and 1, 2, 3
    (same,) = study_clients([read_run(rewrite(folder, "accuracy", [0.5, 0.5, 0.5]))])
    assert same.spearman["images"] is None


def test_personal_models_go_before_the_global_one_and_it_is_said(tmp_path: Path) -> None:
    personal = rewrite(write_run(tmp_path / "personal"), "personal_accuracy", [None, 0.8, 1])
    nulls = rewrite(write_run(tmp_path / "global", seed=2), "personal_accuracy", [None] * 3)
    groups = study_clients([read_run(personal), read_run(nulls)])
    assert [group.personal for group in groups] == [True, False]
    assert groups[0].clients.tolist() == [1, 2]
    assert groups[0].accuracy.tolist() == [0.8, 1.0]
    figure = accuracy_by_clients(groups)
    assert "personal and global model" in figure.axes[0].get_ylabel()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == (
        "ssfl, density 0.1, seed 1, personal models, 2 clients; "
        "Spearman with samples none, entropy none, number of classes none"
    )
    assert "seed 2, global model" in words[1]
    assert figure.axes[1].collections[0].get_offsets().tolist() == [[0.0, 80.0], [groups[0].entropy[1], 100.0]]


def test_runs_without_accuracies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs is empty"):
        study_clients([])
    with pytest.raises(ConfigError, match="killed has no client accuracies"):
        study_clients([read_run(write_run(tmp_path / "killed", finished=False))])
    broken = rewrite(write_run(tmp_path / "broken"), "accuracy", [0.5, "high", None])
    with pytest.raises(ConfigError, match=r"clients\.json is damaged; each client has .* accuracies from 0 to 1"):
        study_clients([read_run(broken)])


def test_the_command_draws_finished_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "$two", dense=True)]
    done = CliRunner().invoke(app, ["study", "clients", *map(str, folders), "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "client-accuracy.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "made" / "client-accuracy.json").read_text())
    assert [run["run"] for run in record["runs"]] == ["one", "$two"]
    assert record["runs"][0]["models"] == "global"
    assert record["runs"][0]["spearman"]["images"] is None
    assert "fedavg, dense, seed 1, global model, 2 clients" in done.output
