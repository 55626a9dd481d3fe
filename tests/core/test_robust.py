"""Folds in which one liar of many has a bounded say, and what is refused beside the other replies of a round."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.comm.payload import Payload
from ssfl_app.config import defaults, parse
from ssfl_app.core import robust
from ssfl_app.core.means import WeightedMean
from ssfl_app.core.robust import (
    FOLDS,
    Held,
    Rows,
    ScoreFold,
    distance,
    folded,
    krum,
    median,
    normalised,
    there,
    trimmed_mean,
)
from ssfl_app.core.strategy import SparseStrategy
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.layout import Layout, Vector
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import answer_error, play, tamper

pytestmark = pytest.mark.narrow

VALUE = st.floats(-1000, 1000, width=32)
VECTORS = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(VALUE, min_size=size, max_size=size), min_size=1, max_size=7)
)
ODD = [fold for fold in FOLDS if fold != "mean"]


def rows(vectors: list[list[float]], order: list[int] | None = None) -> Rows:
    made = Rows(len(vectors[0]))
    for client in range(len(vectors)) if order is None else order:
        made.add(client, np.array(vectors[client], dtype=np.float32))
    return made


# ---- laws ----------------------------------------------------------------------------------------


@given(vectors=VECTORS, data=st.data(), fold=st.sampled_from(ODD), width=st.integers(1, 40))
def test_no_order_of_arrival_and_no_block_size_changes_a_bit(
    vectors: list[list[float]], data: st.DataObject, fold: str, width: int
) -> None:
    order = data.draw(st.permutations(range(len(vectors))))
    whole = folded(rows(vectors), fold, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        if fold != "krum":  # whose distances are sums over blocks, in an order that VALUES and the clients fix
            patch.setattr(robust, "VALUES", width)
        assert folded(rows(vectors, order), fold, 0.2).tobytes() == whole.tobytes()


@given(vectors=VECTORS)
def test_a_mean_trimmed_by_nothing_is_the_unweighted_mean(vectors: list[list[float]]) -> None:
    mean = WeightedMean(len(vectors[0]))
    for vector in vectors:
        mean.add(np.array(vector, dtype=np.float32))
    np.testing.assert_allclose(trimmed_mean(rows(vectors), 0.0), mean.value(), rtol=1e-5, atol=1e-4)


@given(vectors=VECTORS)
def test_the_median_is_numpys(vectors: list[list[float]]) -> None:
    wanted = np.median(np.array(vectors, dtype=np.float64), axis=0).astype(np.float32)
    np.testing.assert_array_equal(median(rows(vectors)), wanted)


@given(vectors=VECTORS, trim=st.floats(0, 0.49))
def test_krum_picks_one_of_the_vectors(vectors: list[list[float]], trim: float) -> None:
    assert krum(rows(vectors), trim).tolist() in [np.array(v, dtype=np.float32).tolist() for v in vectors]


@given(vectors=st.lists(st.lists(VALUE, min_size=3, max_size=3), min_size=5, max_size=9), lie=st.floats(-3e4, 3e4))
@settings(max_examples=50)
def test_one_liar_of_five_or_more_leaves_each_coordinate_between_what_others_say(
    vectors: list[list[float]], lie: float
) -> None:
    honest = np.array(vectors[1:], dtype=np.float32)
    for fold in ("trimmed-mean", "median"):
        value = folded(rows([[lie] * 3, *vectors[1:]]), fold, 0.2)
        assert (honest.min(axis=0) - 1e-3 <= value).all()
        assert (value <= honest.max(axis=0) + 1e-3).all()


def test_krum_by_hand() -> None:
    """n = 5, f = 1: two nearest others. 0, 1, 2 lie together, and 1 in their middle; ties go to the lower client."""
    assert krum(rows([[0.0], [1.0], [2.0], [10.0], [-30.0]]), 0.2).tolist() == [1.0]
    assert krum(rows([[5.0], [5.0], [7.0]]), 0.0).tolist() == [5.0]
    assert krum(rows([[3.0], [4.0]]), 0.2).tolist() == [3.0]


def test_rows_refuse_what_is_no_vector_or_comes_twice() -> None:
    made = rows([[1.0, 2.0]])
    for client, bad in ((0, [1.0, 2.0]), (1, [1.0]), (1, [1.0, np.nan]), (1, [1.0, 1e6])):
        with pytest.raises(ValueError, match=r"client|NaN|at most"):
            made.add(client, np.array(bad, dtype=np.float32))
    with pytest.raises(ValueError, match="a fold of nothing"):
        median(Rows(3))


def test_held_replies_come_back_as_they_were() -> None:
    held, first = Held(), {"values": np.arange(3, dtype=np.float32), "mask": np.arange(5, dtype=np.uint8)}
    second = {"values": np.zeros(0, dtype=np.uint16)}
    held.put(4, first)
    held.put(1, second)
    for client, arrays in ((1, second), (4, first)):
        back = held.get(client)
        assert list(back) == list(arrays)
        assert all(back[n].dtype == a.dtype and (back[n] == a).all() for n, a in arrays.items())


def test_a_file_of_replies_that_is_cut_is_no_reply() -> None:
    """Arrays that are not filled hold whatever was in memory."""
    held, block = Held(), rows([[1.0, 2.0], [3.0, 4.0]])
    held.put(4, {"values": np.ones(3, dtype=np.float32), "mask": np.ones(5, dtype=np.uint8)})
    held.put(7, {"values": np.ones(2, dtype=np.float32)})
    held._file.truncate(24)  # within what 7 sent
    block._file.truncate(15)
    assert sum(int(array.sum()) for array in held.get(4).values()) == 8
    for read in (lambda: held.get(7), lambda: block.row(1)):
        with pytest.raises(OSError, match=r"shorter than what was written to it \(client [17]\)"):
            read()


LAYOUT = Layout((("a", (2, 3)), ("b", (3,)), ("c", (4, 1))), ("a", "c"))


@given(
    old=st.lists(VALUE, min_size=13, max_size=13),
    new=st.lists(VALUE, min_size=13, max_size=13),
    alive=st.lists(st.booleans(), min_size=10, max_size=10),
    width=st.integers(1, 14),
)
def test_a_distance_is_that_of_the_carried_coordinates(
    old: list[float], new: list[float], alive: list[bool], width: int
) -> None:
    before, after = np.array(old, dtype=np.float32), np.array(new, dtype=np.float32)
    places = Mask(LAYOUT, np.array(alive)).transmitted
    exact = math.fsum(
        (Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(after[places], before[places], strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "BLOCK", width)
        found = distance(after[places], there(LAYOUT, LAYOUT.unflatten(before), places))
    assert found == pytest.approx(math.sqrt(exact), rel=1e-14)


def test_the_server_looks_up_what_it_has_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask of all; every client's own mask is looked up for itself."""
    looks: list[int] = []

    def counted(*of: Any) -> list[Vector]:
        looks.append(1)
        return there(*of)

    monkeypatch.setattr("ssfl_app.core.strategy.there", counted)
    run = play(EIGHT)
    assert len(looks) == len(run.records) - 1 == 1
    assert run.strategy._there is None  # it would keep a model in memory


# ---- scores --------------------------------------------------------------------------------------


@given(scores=st.lists(st.floats(-32768, 32768, width=32), min_size=1, max_size=50))
def test_normalised_scores_have_one_sum_and_keep_their_ranking(scores: list[float]) -> None:
    before = np.array(scores, dtype=np.float32)
    after = normalised(before)
    assert np.abs(after).sum(dtype=np.float64) == pytest.approx(len(scores) if before.any() else 0, rel=1e-4)
    assert (np.diff(after[np.argsort(before)]) >= 0).all()


def test_one_clients_say_is_its_share_however_large_its_scores_are() -> None:
    honest, lie = np.linspace(1, 2, 100, dtype=np.float32), np.zeros(100, dtype=np.float32)
    lie[:10] = 32768

    def fold(kind: str) -> Vector:
        made = ScoreFold(kind, 100)
        for client in range(8):
            made.add(client, lie if client == 3 else honest * np.float32(client + 1), 1)
        return made.value()

    shares = {kind: float(fold(kind)[:10].sum() / fold(kind).sum()) for kind in ("mean", "normalised", "median")}
    share = float(honest[:10].sum() / honest.sum())
    assert shares["mean"] > 0.9
    assert shares["normalised"] == pytest.approx(7 / 8 * share + 1 / 8, abs=1e-4)
    assert shares["median"] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(("where", "fold", "floor"), [("shared", "mean", 0), ("sites", "normalised", 1)])
def test_sites_are_trusted_less_than_partitions_of_ones_own(where: str, fold: str, floor: int) -> None:
    def made(**keys: str | int) -> tuple[str | None, int]:
        flat = (
            defaults()
            | {"data.name": "folder", "data.where": where}
            | {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
        )
        known = parse(flat).settings
        scoring = known.sections.get("ssfl")
        return scoring.score_fold if scoring else None, known.mask.min_per_layer

    assert made() == (fold, floor)
    assert made(ssfl__score_fold="median", mask__min_per_layer=0) == ("median", 0)
    assert made(strategy="random") == (None, 0)  # which has no floor
    with pytest.raises(ConfigError, match=r"mask\.min-per-layer is -2"):
        made(mask__min_per_layer=-2)


EIGHT = {"run.clients": 8, "run.cohort": 8, "run.rounds": 1, "local.epochs": 1}


def lying_scores(payload: Payload) -> Payload:
    """All that counts is in the first three layers: the last one, 640 weights, is to die."""
    values = np.full_like(payload.arrays["values"], 32768)
    values[-640:] = 0
    return Payload({**payload.arrays, "values": values}, payload.metadata)


@pytest.mark.parametrize("criterion", ["snip", "iterative-snip", "force", "pooled-snip"])
def test_a_liar_empties_a_layer_under_the_mean_only_and_people_are_told_before_training(criterion: str) -> None:
    def run(**keys: str | int):  # type: ignore[no-untyped-def]
        flat = EIGHT | {"ssfl.criterion": criterion, "ssfl.saliency-weighting": "uniform"}
        flat |= {k.replace("__", ".").replace("_", "-"): v for k, v in keys.items()}
        # iterative-snip asks about alive weights only: the lie is one of its first step.
        return play(flat, faults={("query.saliency", 0, 2): tamper(lying_scores)}, until=0)

    empty = run()
    name = empty.layout.prunable[-1]
    assert empty.records[0].get("empty_layers") == [name]
    assert empty.warnings == [f"the mask leaves no weight alive in {name}: set mask.min-per-layer to 1 or more"]
    for kind in ("normalised", "median"):
        better = run(ssfl__score_fold=kind)
        assert "empty_layers" not in better.records[0]
        assert better.warnings == []
    assert "empty_layers" not in run(mask__min_per_layer=1).records[0]


def test_an_honest_run_finds_nearly_the_same_mask_with_every_fold() -> None:
    masks = {
        kind: play(EIGHT | {"ssfl.score-fold": kind}, until=0).strategy.mask
        for kind in ("mean", "normalised", "median")
    }
    assert masks["mean"].jaccard_distance(masks["normalised"]) < 0.15
    assert masks["mean"].jaccard_distance(masks["median"]) < 0.5


# ---- rounds --------------------------------------------------------------------------------------


def times(factor: float) -> Callable[[Payload], Payload]:
    return lambda p: Payload({**p.arrays, "values": np.float32(factor) * p.arrays["values"]}, p.metadata)


OWN_FOLD = sorted(name for name, strategy in REGISTRY.items() if strategy.aggregator is not SparseStrategy.aggregator)


@pytest.mark.parametrize("name", OWN_FOLD)
def test_a_strategy_with_a_fold_of_its_own_refuses_another_one_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"run.fold is 'median'; it is 'mean' with strategy {name}, which has"):
        play({"strategy": name, "run.fold": "median"}, until=0)


@pytest.mark.parametrize("fold", ODD)
def test_folds_of_a_run_are_those_of_the_vectors_that_came(fold: str) -> None:
    keys = EIGHT | {"run.fold": fold, "run.trim": 0.25}
    run = play(keys)
    came = {client: p.arrays["values"] for (kind, _, client), p in run.grid.got if kind == "train"}
    wanted = folded(rows([came[client].tolist() for client in range(8)]), fold, 0.25)
    mask = run.strategy.mask
    np.testing.assert_array_equal(run.layout.flatten(run.strategy.state)[mask.transmitted], wanted)
    assert run.bits() == play(keys, luck=1).bits()


def test_update_norms_are_in_the_record_and_change_no_bit() -> None:
    run = play(EIGHT)
    sent = next(p for (kind, _, _), p in run.grid.sent if kind == "train").arrays["values"].astype(np.float64)
    for (kind, _, client), payload in run.grid.got:
        if kind == "train":
            norm = float(np.linalg.norm(payload.arrays["values"] - sent))
            assert run.records[1]["update_norms"][str(client)] == pytest.approx(norm, rel=1e-9)
    assert "update_norms" not in play({"strategy": "topk", "run.rounds": 1}).records[1]
    same = play(EIGHT | {"failures.norm-factor": 1000.0})  # nobody is refused, and replies wait in a file
    assert same.bits() == run.bits()
    assert same.metrics() == run.metrics()


@pytest.mark.parametrize("name", ["ssfl", "topk", "dispfl", "prunefl", "ditto"])
def test_an_update_that_is_too_long_is_refused_by_name_as_if_it_had_not_come(name: str) -> None:
    keys = EIGHT | {"strategy": name, "failures.norm-factor": 3.0, "prunefl.checks": 1, "prunefl.every": 1}
    keys["run.rounds"] = 2
    lie = play(keys, faults={("train", 2, 5): tamper(times(-10))})
    assert list(lie.records[2]["refused"]) == ["5"]
    assert "long; failures.norm-factor is 3 and the median of this round " in lie.records[2]["refused"]["5"]
    assert lie.records[2]["ok"] == [0, 1, 2, 3, 4, 6, 7]
    assert set(lie.records[2]["update_norms"]) == set("01234567")
    lost = play(keys, faults={("train", 2, 5): answer_error(5)})
    assert lie.bits() == lost.bits()
    for key in ("train_loss", "image_passes", "personal_accuracy_mean"):
        assert lie.records[2][key] == lost.records[2][key]
    assert lie.strategy._last_accepted.tolist() == lost.strategy._last_accepted.tolist()


def test_of_two_replies_the_long_one_is_refused() -> None:
    """The mean of two lengths would allow the longer one whatever it is."""
    keys = EIGHT | {"strategy": "fedavg", "run.rounds": 1, "run.cohort": 2, "failures.norm-factor": 3.0}
    cohort = play(keys).records[1]["cohort"]
    lie = play(keys, faults={("train", 1, cohort[0]): tamper(times(-10))})
    assert list(lie.records[1]["refused"]) == [str(cohort[0])]
    assert lie.records[1]["ok"] == cohort[1:]


def test_a_fold_stays_robust_where_replies_are_lost() -> None:
    """Of four of eight, a fifth of which is none: still one at either end; and of two nobody can tell who lies."""
    few = rows([np.float32([v]) for v in (1.0, 2.0, 3.0, 1000.0)])
    assert trimmed_mean(few, 0.2).tolist() == [2.5]
    keys = EIGHT | {"strategy": "fedavg", "run.rounds": 1, "run.fold": "median", "failures.min-ok-fraction": 0.1}
    lost = {("train", 1, client): answer_error(5) for client in range(6)}
    with pytest.raises(RunFailed, match=r"run\.fold is 'median'; 2 replies are there, and it needs 3"):
        play(keys, faults=lost)


def test_too_many_long_updates_end_the_run_and_leave_the_model() -> None:
    keys = EIGHT | {"failures.norm-factor": 1.0, "failures.min-ok-fraction": 0.9}
    with pytest.raises(RunFailed, match=r"training in round 1: 4 of 8 clients answered well.*norm-factor is 1"):
        play(keys)


@pytest.mark.parametrize("density", ["target", "max"])
@pytest.mark.parametrize("lie", [1.0, 0.0])
def test_prunefl_believes_no_mask_of_another_size(density: str, lie: float) -> None:
    def whole(payload: Payload) -> Payload:
        size = payload.arrays["mask"].size * 8 if lie else 0
        mask = np.packbits(np.arange(payload.arrays["mask"].size * 8) < size)
        rest = payload.arrays["values"].size - int(np.unpackbits(payload.arrays["mask"]).sum())
        return Payload({"mask": mask, "values": np.zeros(size + rest, dtype=np.float32)}, payload.metadata)

    keys = EIGHT | {"strategy": "prunefl", "prunefl.density": density, "prunefl.checks": 6}
    honest = play(keys, until=0)
    assert honest.records[0]["refused"] == {}
    (client,) = honest.records[0]["asked"]
    with pytest.raises(RunFailed, match="alive weights; stage 1 ends with"):
        play(keys, faults={("query.initial_pruning", 0, client): tamper(whole)}, until=0)
