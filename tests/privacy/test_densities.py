"""Private layer densities: by hand on three layers, and laws of the counts whatever the noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.privacy.densities import densities, drawn_mask, own_shares, tiny_layers
from ssfl_app.sparsity.densities import spread
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask, keep_count

law = settings(deadline=None, derandomize=True, max_examples=100)

LAYOUT = Layout(
    (("a.weight", (2, 2)), ("a.bias", (10,)), ("b.weight", (10, 10)), ("c.weight", (20, 10))),
    ("a.weight", "b.weight", "c.weight"),
)  # 304 weights; a quarter is 76
TINY = 0.06  # of 76: up to 4.56 weights


def scores_with(*alive):
    """Scores under which so many weights of each layer are among the best."""
    parts = []
    for count, size in zip(alive, LAYOUT.prunable_sizes.values(), strict=True):
        part = np.linspace(0.1, 0.2, size, dtype=np.float32)
        part[:count] += 1
        parts.append(part)
    return np.concatenate(parts)


def test_tiny_layers_follow_from_sizes():
    assert tiny_layers(LAYOUT, 0.25, TINY) == ["a.weight"]
    assert tiny_layers(LAYOUT, 0.25, 0.05) == []
    assert tiny_layers(LAYOUT, 0.1, TINY) == []  # of 30
    # Six layers of 5 in a budget of 100: each alone would do with 0.06, but two are a tenth of it together.
    many = Layout((*((name, (5, 1)) for name in "012345"), ("z", (97, 10))), tuple("012345z"))
    assert tiny_layers(many, 0.1, TINY) == ["0", "1"]


def test_what_a_client_sends_by_hand():
    sent = own_shares(scores_with(3, 18, 55), LAYOUT, 0.25, TINY)
    raw = np.array([18 / 10, 55 / math.sqrt(200)])
    np.testing.assert_allclose(sent, raw / math.hypot(*raw), rtol=1e-12)
    assert sent.dtype == np.float64
    assert own_shares(scores_with(3, 18, 55), LAYOUT, 0.25, 0.0).shape == (3,)


def test_counts_by_hand():
    # Of 76 weights a has 4. b and c have densities 0.18 and 0.27 by their shares; 72 is just 18 + 54.
    shares = np.array([18 / 10, 54 / math.sqrt(200)])
    for scale in (1.0, 0.01, 300.0):  # a sum, or a mean of any divisor
        counts = densities(scale * shares, LAYOUT, 0.25, TINY)
        assert counts == {"a.weight": 4, "b.weight": 18, "c.weight": 54}
    assert list(counts) == list(LAYOUT.prunable)


def test_noise_below_zero_leaves_a_tenth_of_the_density():
    # b keeps 2 of its 2.5; the others get the rest.
    assert densities(np.array([-1.0, 0.5]), LAYOUT, 0.25, TINY) == {"a.weight": 4, "b.weight": 2, "c.weight": 70}
    # Nothing but noise below 0: all layers get the same density, 72 of 300.
    assert densities(np.array([-1.0, -2.0]), LAYOUT, 0.25, TINY) == {"a.weight": 4, "b.weight": 24, "c.weight": 48}


def test_a_full_layer_gives_its_share_to_the_others():
    # Density 0.6: 182 weights, 4 of a. b would have 10 times the density of c.
    counts = densities(np.array([10.0, math.sqrt(2)]), LAYOUT, 0.6, TINY)
    assert counts == {"a.weight": 4, "b.weight": 100, "c.weight": 78}
    # c's number is below 0, but there is no other place for the weights.
    assert densities(np.array([1.0, -1.0]), LAYOUT, 0.6, TINY) == counts


def test_without_noise_clients_that_agree_get_their_mask_s_counts_back():
    scores = scores_with(4, 18, 54)
    mean = np.mean([own_shares(scores, LAYOUT, 0.25, TINY) for _ in range(5)], axis=0)
    found = densities(mean, LAYOUT, 0.25, TINY)
    assert found == {name: alive for name, alive, _ in Mask.top(LAYOUT, scores, 0.25).layers()}


@st.composite
def layouts(draw):
    sizes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6))
    names = tuple(f"{i}.weight" for i in range(len(sizes)))
    return Layout(tuple(zip(names, sizes, strict=True)), names)


@given(layouts(), st.integers(1, 100), st.sampled_from([0.0, 0.02, 0.2]), st.data())
@law
def test_counts_meet_the_budget_whatever_the_noise(layout, hundredths, tiny, data):
    density = hundredths / 100
    dense = tiny_layers(layout, density, tiny)
    rest = len(layout.prunable) - len(dense)
    noised = np.array(data.draw(st.lists(st.floats(-2, 2), min_size=rest, max_size=rest)))
    budget = keep_count(density, layout.prunable_size)
    if not budget:
        with pytest.raises(ValueError, match="density is"):
            densities(noised, layout, density, tiny)
        return
    counts = densities(noised, layout, density, tiny)
    assert sum(counts.values()) == budget
    for name, size in layout.prunable_sizes.items():
        assert counts[name] == size if name in dense else hundredths * size // 1000 <= counts[name] <= size
    mask = drawn_mask(layout, counts, 1)
    assert {name: alive for name, alive, _ in mask.layers()} == counts


@given(layouts(), st.integers(1, 100), st.integers(0, 99))
@law
def test_a_client_moves_the_sum_by_at_most_one(layout, hundredths, seed):
    scores = np.random.default_rng(seed).exponential(size=layout.prunable_size).astype(np.float32) ** 4
    if keep_count(hundredths / 100, layout.prunable_size):
        sent = own_shares(scores, layout, hundredths / 100)
        assert np.linalg.norm(sent) <= 1 + 1e-12
        assert (sent >= 0).all()


def test_both_ends_draw_the_same_mask_and_other_seeds_another_one():
    counts = {"a.weight": 4, "b.weight": 18, "c.weight": 54}
    assert drawn_mask(LAYOUT, counts, 1) == drawn_mask(LAYOUT, counts, 1)
    assert drawn_mask(LAYOUT, counts, 1) != drawn_mask(LAYOUT, counts, 2)


def test_spread_of_whole_shares_is_exact():
    assert spread({"a": 10, "b": 10}, {"a": 1.0, "b": 3.0}, 12) == {"a": 3, "b": 9}
    assert spread({"a": 10, "b": 10}, {"a": 1.0, "b": 9.0}, 15) == {"a": 5, "b": 10}


def test_shares_of_another_layout_or_without_a_value_are_refused():
    for wrong in (np.zeros(3), np.array([0.1, np.nan]), np.array([np.inf, 0.1])):
        with pytest.raises(ValueError, match="they are 2 finite numbers"):
            densities(wrong, LAYOUT, 0.25, TINY)
    with pytest.raises(ValueError, match=r"density is 0\.001; it leaves none"):
        densities(np.zeros(3), LAYOUT, 0.001, TINY)
