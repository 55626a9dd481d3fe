"""PruneFL: a readjustment by hand, what the first client does alone, and what the others pay for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from ssfl_app.comm.payload import Payload
from ssfl_app.config import merge, parse
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import MaskedValues
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.prunefl import PruneFlOptions, pruned_counts, readjusted
from tests.in_process_grid import SMALL, Played, answer_error, play, tamper

pytestmark = pytest.mark.narrow

P, R, A, BITMAP = 38160, 170, 7632, 4770  # of the narrow CNN
TEN = Layout((("w", (2, 5)),), ("w",))


@cache
def prunefl(**keys: Any) -> Played:
    more = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    until = more.pop("until", None)
    return play({"strategy": "prunefl", "prunefl.checks": 6, "run.evaluate-every": 3} | more, until=until)


def up(played: Played, round_: int) -> dict[int, Payload]:
    return {client: payload for (kind, r, client), payload in played.grid.got if (kind, r) == ("train", round_)}


def pruned(played: Played) -> tuple[int, Payload]:
    ((client, payload),) = [(c, p) for (kind, _, c), p in played.grid.got if kind == "query.initial_pruning"]
    return client, payload


# ---- one readjustment, by hand -------------------------------------------------------------------

ALIVE = [True] * 6 + [False] * 4
MAGNITUDES = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 9.0, 9.0, 9.0, 9.0]  # of dead weights they do not count
SQUARES = [1.0, 1.0, 1.0, 9.0, 0.1, 0.2, 0.3, 4.0, 2.0, 1.2]


def options(target: bool, scope: str = "layer") -> PruneFlOptions:
    return PruneFlOptions(density="target" if target else "max", scope=scope)


def after(share: float, most: int, target: bool, scope: str = "layer", layout: Layout = TEN) -> list[int]:
    vectors = np.array(MAGNITUDES, np.float32), np.array(SQUARES, np.float32)
    alive = readjusted(options(target, scope), Mask(layout, np.array(ALIVE)), *vectors, share, most).alive
    return np.flatnonzero(alive).tolist()


def test_weights_are_added_while_they_gain_more_than_the_mean_of_the_alive() -> None:
    """Half of six go: 0, 1, 2 stay, with mean 1. Then 9 > 1 and 4 > 12 / 4, but 2 < 16 / 5."""
    assert after(0.5, 10, target=False) == [0, 1, 2, 3, 7]


def test_the_cap_ends_it_earlier() -> None:
    assert after(0.5, 4, target=False) == [0, 1, 2, 3]
    assert after(0.5, 2, target=False) == [0, 1, 2]  # nothing is removed to meet it


def test_a_target_is_filled_up_by_squared_gradients() -> None:
    assert after(0.5, 6, target=True) == [0, 1, 2, 3, 7, 8]
    assert after(0.5, 8, target=True) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert after(0.5, 3, target=True) == after(0.5, 2, target=True) == [0, 1, 2]


def test_a_share_is_rounded_down_and_equal_magnitudes_keep_the_lower_index() -> None:
    assert after(0.3, 3, target=True) == [0, 1, 2, 3, 4]  # floor(1.8) = 1 is removed
    ones = np.ones(10, np.float32)
    mask = readjusted(options(target=True), Mask.dense(TEN), ones, ones, 0.5, 5)
    assert np.flatnonzero(mask.alive).tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_worth_adding_where_no_gradient_is_above_the_mean() -> None:
    flat = np.ones(10, np.float32)
    assert readjusted(options(target=False), Mask.dense(TEN), flat, flat, 0.5, 10).count == 5
    assert readjusted(options(target=False), Mask.dense(TEN), flat, 0 * flat, 1.0, 10).count == 0


def test_the_share_goes_in_each_layer_and_what_comes_back_is_of_any_layer() -> None:
    """Two layers: weights 0 to 3, of which 3 and 2 go, and 4 to 9, of which 5 goes; by size alone 3, 4 and 5 go."""
    two = Layout((("v", (2, 2)), ("w", (2, 3))), ("v", "w"))
    assert after(0.5, 3, target=True, layout=two) == [0, 1, 4]
    assert after(0.5, 5, target=True, layout=two) == [0, 1, 3, 4, 7]
    assert after(0.5, 3, target=True, scope="global", layout=two) == [0, 1, 2]


@pytest.mark.parametrize("share", [0.3, 0.07])
def test_the_published_rule_against_a_slow_one(share: float) -> None:
    """As the authors' code goes about it: layer by layer, then one weight at a time while it gains (equal costs)."""
    layout, rng = prunefl(until=0).layout, np.random.default_rng(1)
    mask = Mask.random(layout, 0.2, rng)
    magnitudes, squares = (rng.standard_normal(P).astype(np.float32) ** 2 for _ in range(2))
    kept = np.zeros(P, bool)
    for span in layout.prunable_spans.values():
        places = span.start + np.flatnonzero(mask.alive[span])
        threshold = np.sort(magnitudes[places])[int(share * places.size)]
        kept[places[magnitudes[places] >= threshold]] = True
    gain, cost = float(squares[kept].sum(dtype=np.float64)), int(kept.sum())
    for place in sorted(np.flatnonzero(~kept), key=lambda place: -squares[place]):
        if squares[place] <= gain / cost:
            break
        kept[place], gain, cost = True, gain + float(squares[place]), cost + 1
    ours = readjusted(options(target=False), mask, magnitudes, squares, share, P)
    assert mask.count - sum(int(share * alive) for _, alive, _ in mask.layers()) < ours.count < P
    assert np.count_nonzero(ours.alive ^ kept) == 0


# ---- stage 1 -------------------------------------------------------------------------------------


def test_one_client_prunes_alone_and_sends_model_and_mask() -> None:
    played = prunefl(until=0)
    record, (client, payload) = played.records[0], pruned(played)
    assert record["asked"] == [client]
    mask = Mask.unpack(played.layout, payload.arrays["mask"])
    assert played.strategy.mask == mask
    assert mask.count == A
    trained = MaskedValues().decode(payload.arrays, played.layout, mask)[0]
    assert (played.layout.flatten(played.strategy.state) == played.layout.flatten(trained)).all()
    initial = played.layout.flatten_prunable(played.runtime.initial_state())
    assert (played.layout.flatten_prunable(trained)[mask.alive] != initial[mask.alive]).mean() > 0.9
    # Each check is a local epoch, and a pass for the squared gradients.
    assert record["image_passes"] == 6 * 2 * len(played.runtime.partition.train[client])
    assert (record["bytes_discovery_down"], record["bytes_discovery_up"]) == (0, 4 * (A + R) + BITMAP)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_three_tenths_go_at_a_time_until_the_target_is_met(scope: str) -> None:
    counts = []
    for checks in (1, 2, 3, 4, 5):
        mask = prunefl(prunefl__checks=checks, prunefl__scope=scope, until=0).strategy.mask
        if checks == 1:  # of a dense model: nothing was added, so each layer shows its share
            layers = [size - alive == size * 3 // 10 for _, alive, size in mask.layers()]
            assert all(layers) == (scope == "layer")
        counts.append(mask.count)
        low, high = pruned_counts(PruneFlOptions(checks=checks, scope=scope), 0.2, mask.layout)
        assert low <= mask.count <= high <= low + 3 * checks
        assert scope == "layer" or low == high
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == A


def test_stage_1_learns_at_the_rate_of_round_1() -> None:
    """The schedule's rate of a round 0 would be local.lr / local.lr-decay."""
    one, other = (prunefl(prunefl__checks=1, local__lr_decay=decay, until=0) for decay in (1.0, 0.5))
    assert one.bits() == other.bits()


def test_other_seeds_ask_other_clients() -> None:
    chosen = {pruned(prunefl(run__seed=seed, prunefl__checks=1, until=0))[0] for seed in range(1, 7)}
    assert len(chosen) > 2


def test_stage_1_ends_when_the_mask_is_calm() -> None:
    """A step of 0.001 changes the count by 0.1 %: five checks after the first, each an epoch and a pass."""
    played = prunefl(prunefl__checks=9, prunefl__prune=0.001, until=0)
    assert played.records[0]["image_passes"] == 6 * 2 * len(played.runtime.partition.train[pruned(played)[0]])


def test_without_stage_1_the_run_starts_dense_and_prunes_on_the_way() -> None:
    played = prunefl(prunefl__checks=0, prunefl__every=1)
    assert played.records[0]["asked"] == []
    counts = [mask.count for mask in played.masks]
    assert counts[0] == P
    assert all(abs(count / P - 0.7**r) < 1e-3 for r, count in enumerate(counts))
    assert played.records[-1]["density"] == counts[-1] / P


# ---- stage 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_server_readjusts_by_the_mean_weights_and_the_mean_squares(scope: str) -> None:
    played = prunefl(prunefl__every=2, run__evaluate_every=1, prunefl__scope=scope)
    assert [one == other for one, other in zip(played.masks, played.masks[1:], strict=False)] == [True, False, True]
    replies = up(played, 2)
    layout, old = played.layout, played.masks[1]
    shares = [len(played.runtime.partition.train[client]) for client in replies]
    models = [layout.flatten_prunable(MaskedValues().decode(p.arrays, layout, old)[0]) for p in replies.values()]
    weights = np.average(models, axis=0, weights=shares).astype(np.float32)
    squares = np.average([p.arrays["squares"] for p in replies.values()], axis=0, weights=shares).astype(np.float32)
    share, alive = 0.3 * 0.5 ** (2 / 10000), np.zeros(P, bool)
    for span in layout.prunable_spans.values() if scope == "layer" else [slice(0, P)]:
        order = np.argsort(-np.where(old.alive, np.abs(weights), -1)[span], kind="stable")
        held = int(old.alive[span].sum())
        alive[span.start + order[: held - int(share * held)]] = True
    kept = int(alive.sum())
    more = np.argsort(-np.where(alive, -1, squares), kind="stable")[: A - kept]
    born = np.zeros(P, bool)
    born[more] = True
    assert np.count_nonzero((alive | born) ^ played.masks[2].alive) <= 4  # sums in another order
    assert played.masks[2].count == A
    assert (born & ~old.alive).sum() > 250
    state = layout.flatten_prunable(played.states[2])
    assert not state[played.masks[2].alive & ~old.alive].any()  # they start at 0


def test_squares_are_the_mean_over_minibatches_at_the_model_that_came_down() -> None:
    played = prunefl(prunefl__every=2, local__batch_size=1000)  # one minibatch: all images of a client
    layout, runtime = played.layout, played.runtime
    for client, payload in up(played, 2).items():
        load_state(runtime.model, played.states[1])
        gradient = runtime.trainer.gradient(runtime.model, runtime.data.train.take(runtime.partition.train[client]))
        squares = np.square(layout.flatten_prunable(gradient))
        assert payload.arrays["squares"][~played.masks[1].alive].max() > 0
        np.testing.assert_allclose(payload.arrays["squares"], squares, rtol=1e-3, atol=1e-9)


def test_max_follows_the_published_rule_and_never_exceeds_the_density() -> None:
    played = prunefl(prunefl__density="max", prunefl__every=1)
    counts = [mask.count for mask in played.masks]
    assert max(counts) <= A
    assert counts[-1] < A
    assert played.records[-1]["density"] == counts[-1] / P
    assert prunefl().records[-1]["density"] == A / P


def test_bytes_by_formula() -> None:
    played = prunefl(prunefl__every=2, run__evaluate_every=1)
    values = 4 * (A + R)
    assert [r["bytes_train_down"] for r in played.records[1:]] == [4 * values] * 3
    assert [r["bytes_train_up"] for r in played.records[1:]] == [4 * values, 4 * (values + 4 * P), 4 * values]
    # Four clients get the first mask with round 1, the other two with its evaluation; all six the one of round 2.
    assert [r["bytes_mask_down"] for r in played.records[1:]] == [6 * BITMAP, 6 * BITMAP, 0]
    images = [sum(len(played.runtime.partition.train[c]) for c in r["ok"]) for r in played.records[1:]]
    assert [r["image_passes"] for r in played.records[1:]] == [images[0], 2 * images[1], images[2]]


# ---- refusals ------------------------------------------------------------------------------------


def squares(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Payload], Payload]:
    return lambda p: Payload({**p.arrays, "squares": change(p.arrays["squares"].copy())}, p.metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (squares(lambda v: v * np.nan), f"{P} values are NaN or Inf"),
        (squares(lambda v: v - 1), "they must be at least 0"),
        (squares(lambda v: v[1:]), f"squares has length {P - 1}"),
        (lambda p: Payload({"values": p.arrays["values"]}, p.metadata), "no array 'squares'"),
    ],
)
def test_bad_squares_are_refused_by_name(change: Callable[[Payload], Payload], reason: str) -> None:
    keys = {"strategy": "prunefl", "prunefl.checks": 1, "prunefl.every": 1, "run.evaluate-every": 3}
    client = prunefl().records[1]["ok"][1]
    refused = play(keys, faults={("train", 1, client): tamper(change)}, until=1)
    missing = play(keys, faults={("train", 1, client): answer_error(5)}, until=1)
    assert reason in refused.records[1]["refused"][str(client)]
    assert refused.bits() == missing.bits()


@pytest.mark.parametrize("array", ["values", "mask"])
def test_a_bad_model_of_the_first_client_ends_the_run_by_name(array: str) -> None:
    client, _ = pruned(prunefl(until=0))
    fault = tamper(lambda p: Payload({**p.arrays, array: p.arrays[array][:-1]}, p.metadata))
    with pytest.raises(RunFailed, match=r"initial_pruning"):
        play({"strategy": "prunefl", "prunefl.checks": 1}, faults={("query.initial_pruning", 0, client): fault})


def test_options_are_refused_by_name() -> None:
    for key, value in (("checks", -1), ("every", 0), ("prune", 0.0), ("density", "least"), ("scope", "all")):
        with pytest.raises(ConfigError, match=f"prunefl.{key} is {value!r}"):
            parse(merge(SMALL, {"strategy": "prunefl", f"prunefl.{key}": value}))
    with pytest.raises(ConfigError, match=r"mask.min-per-layer is 3; it is 0 with strategy prunefl"):
        prunefl(mask__min_per_layer=3)
