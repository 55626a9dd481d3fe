"""The largest scores: as sorting finds them, whatever the sample that guides the search looks like."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.sparsity import selection
from ssfl_app.sparsity.selection import kth_largest, largest

law = settings(deadline=None, derandomize=True, max_examples=200)
KINDS = ("normal", "lognormal", "few", "rising", "falling", "blocks", "misleading")


def made(kind: str, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "few":  # many equal ones
        return rng.integers(0, 3, size).astype(np.float32)
    if kind == "blocks":  # layers of other magnitudes
        return (rng.random(size) * 10.0 ** -(np.arange(size) * 4 // size)).astype(np.float32)
    if kind == "misleading":  # every sampled place holds one of the largest scores, or the smallest
        scores = rng.random(size).astype(np.float32)
        scores[:: max(1, size // selection._SAMPLE)] = rng.choice([-5.0, 5.0])
        return scores
    scores = getattr(rng, kind if kind in ("normal", "lognormal") else "random")(size=size).astype(np.float32)
    return {"rising": np.sort(scores), "falling": np.sort(scores)[::-1].copy()}.get(kind, scores)


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 99))
@law
def test_selection_is_that_of_a_stable_sort(kind: str, size: int, share: float, seed: int) -> None:
    scores, count = made(kind, size, seed), max(1, round(share * size))
    before, usual = scores.copy(), selection._SAMPLE
    selection._SAMPLE = 16  # so that these few are searched as millions are
    try:
        alive, threshold, ties = (
            largest(scores, count, "index"),
            kth_largest(scores, count),
            largest(scores, count, "keep"),
        )
    finally:
        selection._SAMPLE = usual
    order = np.argsort(-scores, kind="stable")
    assert threshold == scores[order[count - 1]]
    assert np.flatnonzero(alive).tolist() == sorted(order[:count].tolist())
    assert (ties == (scores >= threshold)).all()
    assert (scores == before).all()


def test_nothing_is_the_largest_of_none() -> None:
    assert not largest(np.ones(5, np.float32), 0, "index").any()
    assert largest(np.zeros(0, np.float32), 0, "keep").size == 0


@pytest.mark.parametrize("kind", ["lognormal", "blocks", "misleading"])
def test_a_million_scores(kind: str) -> None:
    scores = made(kind, 10**6, 1)
    for count in (1, 1000, 10**5, 5 * 10**5, 10**6 - 1, 10**6):
        assert kth_largest(scores, count) == np.sort(scores)[10**6 - count]
