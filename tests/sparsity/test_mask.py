"""Laws of masks: how many coordinates live, which ones, and that a mask is a value."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask, alive_count, keep_count, largest

law = settings(deadline=None, derandomize=True, max_examples=60)

LAYOUT = Layout((("a.weight", (3, 4)), ("a.bias", (3,)), ("b.weight", (2, 3, 1, 1))), ("a.weight", "b.weight"))
HUNDREDTHS = st.integers(1, 100)


@st.composite
def layouts(draw):
    shapes, prunable = [], []
    for i in range(draw(st.integers(1, 4))):
        shapes.append((f"{i}.weight", (draw(st.integers(1, 5)), draw(st.integers(1, 6)))))
        prunable.append(f"{i}.weight")
        if draw(st.booleans()):
            shapes.append((f"{i}.bias", (draw(st.integers(1, 3)),)))
    return Layout(tuple(shapes), tuple(prunable))


@st.composite
def scored(draw):
    """A layout and scores, many of them equal, of either sign, up to the largest float32."""
    layout = draw(layouts())
    one = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 2.0]), st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
    scores = draw(st.lists(one, min_size=layout.prunable_size, max_size=layout.prunable_size))
    return layout, np.array(scores, dtype=np.float32)


def sizes(layout):
    return [int(np.prod(shape)) for name, shape in layout.shapes if name in layout.prunable]


def best(scores, count):
    """The places of the `count` largest scores, the lower index first among equals."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def parts(layout, alive):
    return np.split(alive, np.cumsum(sizes(layout))[:-1])


@given(scored(), HUNDREDTHS)
@law
def test_exactly_the_floor_lives_and_it_is_the_best_with_ties_to_the_lower_index(world, hundredths):
    layout, scores = world
    assume(alive_count(layout, hundredths / 100))
    mask = Mask.top(layout, scores, hundredths / 100)
    assert mask.count == hundredths * scores.size // 100
    assert set(np.flatnonzero(mask.alive)) == best(scores.tolist(), mask.count)


@given(scored(), HUNDREDTHS)
@law
def test_layer_scope_holds_the_same_in_every_layer(world, hundredths):
    layout, scores = world
    assume(alive_count(layout, hundredths / 100, "layer"))
    mask = Mask.top(layout, scores, hundredths / 100, "layer")
    for alive, own in zip(parts(layout, mask.alive), parts(layout, scores), strict=True):
        assert set(np.flatnonzero(alive)) == best(own.tolist(), hundredths * own.size // 100)


@given(scored(), HUNDREDTHS, st.integers(0, 4))
@law
def test_a_floor_keeps_the_best_of_each_layer_and_the_exact_total(world, hundredths, floor):
    layout, scores = world
    total = hundredths * scores.size // 100
    assume(total)
    reserved = sum(min(floor, size) for size in sizes(layout))
    if floor and reserved > total:
        with pytest.raises(
            ValueError, match=f"min-per-layer is {floor}; it reserves {reserved} weights.*leaves {total}"
        ):
            Mask.top(layout, scores, hundredths / 100, min_per_layer=floor)
        return
    mask = Mask.top(layout, scores, hundredths / 100, min_per_layer=floor)
    assert mask.count == total
    kept = set()
    start = 0
    for own in parts(layout, scores):
        kept |= {start + i for i in best(own.tolist(), floor)}
        start += own.size
    others = [i for i in sorted(range(scores.size), key=lambda i: (-scores[i], i)) if i not in kept]
    assert set(np.flatnonzero(mask.alive)) == kept | set(others[: total - len(kept)])


def test_a_floor_holds_when_layers_are_ranked_on_their_own():
    layout = Layout((("a", (2, 2)), ("b", (10, 10))), ("a", "b"))
    mask = Mask.top(layout, np.arange(104, dtype=np.float32), 0.1, "layer", min_per_layer=2)
    assert all(alive >= 2 for _, alive, _ in mask.layers())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = np.ones(18, np.float32)
    scores[[3, 7]] = bad
    with pytest.raises(ValueError, match="2 scores are NaN or Inf"):
        Mask.top(LAYOUT, scores, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.ones(17, np.float32)}, "shape"),
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.01}, "density is 1.01"),
        ({"density": float("nan")}, "density is nan"),
        ({"scope": "model"}, "scope is 'model'"),
    ],
)
def test_wrong_arguments_of_top_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mask.top(**{"layout": LAYOUT, "scores": np.ones(18, np.float32), "density": 0.5} | change)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_density_that_leaves_nothing_alive_makes_no_mask(scope):
    none = r"density is 0.05; it leaves none of 18 prunable weights alive"
    assert alive_count(LAYOUT, 0.05, scope) == 0
    with pytest.raises(ValueError, match=none):
        Mask.top(LAYOUT, np.ones(18, np.float32), 0.05, scope)
    with pytest.raises(ValueError, match=none):
        Mask.random(LAYOUT, 0.05, np.random.default_rng(1), scope)
    assert Mask.top(LAYOUT, np.ones(18, np.float32), 0.05, "layer", min_per_layer=1).count == 2
    one = 0.1 if scope == "layer" else 0.06  # of 12 and 6, or of 18
    assert Mask.random(LAYOUT, one, np.random.default_rng(1), scope).count == alive_count(LAYOUT, one, scope) == 1


def test_density_is_read_as_the_decimal_it_is_written_as():
    assert 0.29 * 100 < 29  # what binary floating point makes of it
    assert keep_count(0.29, 100) == 29
    assert all(keep_count(k / 1000, 11_164_352) == 11_164_352 * k // 1000 for k in range(1, 1001))
    assert keep_count(1e-9, 100) == 0
    assert keep_count(1, 7) == 7


@given(layouts(), HUNDREDTHS, st.integers(0, 2**32))
@law
def test_random_masks_have_the_exact_count_and_repeat_with_their_generator(layout, hundredths, seed):
    for scope in ("global", "layer"):
        assume(alive_count(layout, hundredths / 100, scope))
        one, other = (Mask.random(layout, hundredths / 100, np.random.default_rng(seed), scope) for _ in range(2))
        assert one == other
        groups = [sum(sizes(layout))] if scope == "global" else sizes(layout)
        assert one.count == sum(hundredths * size // 100 for size in groups)
        if scope == "layer":
            assert [alive for _, alive, _ in one.layers()] == [hundredths * size // 100 for size in groups]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_random_masks_are_uniform(scope):
    rng = np.random.default_rng(1)
    times = sum(Mask.random(LAYOUT, 0.5, rng, scope).alive.astype(int) for _ in range(2000))
    # 2000 draws at one half: standard deviation 22.4; the largest of 18 stays within 5 of them.
    assert np.abs(times - 1000).max() < 112


@given(layouts(), HUNDREDTHS, st.integers(0, 2**32))
@law
def test_shuffling_keeps_the_count_of_each_layer(layout, hundredths, seed):
    rng = np.random.default_rng(seed)
    assume(alive_count(layout, hundredths / 100))
    mask = Mask.random(layout, hundredths / 100, rng)
    assert list(mask.shuffle(rng).layers()) == list(mask.layers())


def test_shuffling_changes_places_and_is_uniform():
    mask = Mask(LAYOUT, np.arange(18) % 12 < 3)
    rng = np.random.default_rng(1)
    shuffles = [mask.shuffle(rng) for _ in range(2000)]
    times = sum(shuffled.alive.astype(int) for shuffled in shuffles)
    # 3 of 12 alive in the first layer (mean 500, deviation 19.4), 3 of 6 in the second (mean 1000, deviation 22.4).
    assert np.abs(times[:12] - 500).max() < 100
    assert np.abs(times[12:] - 1000).max() < 112
    assert mask.shuffle(np.random.default_rng(5)) == mask.shuffle(np.random.default_rng(5))


class TestAgainstTorchPrune:
    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Linear(7, 11), nn.Linear(11, 3, bias=False))

    @pytest.mark.parametrize("hundredths", [1, 10, 29, 50, 99, 100])
    def test_global_ranking_agrees(self, model, hundredths):
        layout, mask, scores = self.ours(model, hundredths, "global")
        targets = [(model[i], "weight") for i in (0, 2, 3)]
        amount = layout.prunable_size - hundredths * layout.prunable_size // 100
        named = dict(zip(targets, scores, strict=True))
        prune.global_unstructured(targets, prune.L1Unstructured, importance_scores=named, amount=amount)
        self.compare(mask, model)

    @pytest.mark.parametrize("hundredths", [2, 10, 29, 50, 99, 100])
    def test_layerwise_ranking_agrees(self, model, hundredths):
        _, mask, scores = self.ours(model, hundredths, "layer")
        for i, own in zip((0, 2, 3), scores, strict=True):
            amount = own.numel() - hundredths * own.numel() // 100
            prune.l1_unstructured(model[i], "weight", amount, importance_scores=own)
        self.compare(mask, model)

    @staticmethod
    def ours(model, hundredths, scope):
        layout = Layout.of(model)
        ranks = np.random.default_rng(hundredths).permutation(layout.prunable_size)
        flat = ((1 + ranks) / layout.prunable_size).astype(np.float32)  # no ties
        scores = [
            torch.from_numpy(own).view_as(model[i].weight)
            for i, own in zip((0, 2, 3), parts(layout, flat), strict=True)
        ]
        return layout, Mask.top(layout, flat, float(Fraction(hundredths, 100)), scope), scores

    @staticmethod
    def compare(mask, model):
        ours = mask.tensors()
        assert list(ours) == ["0.weight", "2.weight", "3.weight"]
        for i in (0, 2, 3):
            assert torch.equal(ours[f"{i}.weight"], model[i].weight_mask.bool())


@pytest.mark.parametrize("kind", ["normal", "few", "rising", "falling"])
@given(size=st.integers(0, 300), share=st.floats(0, 1), seed=st.integers(0, 99))
@law
def test_the_largest_are_those_of_a_stable_sort(kind, size, share, seed):
    scores = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if kind == "few":
        scores = scores.round()
    if kind in ("rising", "falling"):
        scores = np.sort(scores)[:: 1 if kind == "rising" else -1]
    count, before = round(share * size), scores.copy()
    assert np.flatnonzero(largest(scores, count)).tolist() == sorted(
        np.argsort(-scores, kind="stable")[:count].tolist()
    )
    assert (scores == before).all()
