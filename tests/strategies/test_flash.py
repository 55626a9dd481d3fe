"""FLASH: layer densities from sparse learning, a random mask of them; and the mask that moves."""

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from ssfl_app.comm.payload import ClientState, Payload
from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.densities import rescaled
from ssfl_app.sparsity.layout import Layout
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies import flash
from ssfl_app.strategies.flash import FlashClient, dealt, evolved, first_mask, shares_of
from tests.in_process_grid import Played, answer_error, play, tamper

pytestmark = pytest.mark.narrow

P, R = 38160, 170  # of the narrow CNN: prunable weights, and the others
A = math.floor(0.2 * P)
BITMAP = P // 8
QUICK: Flat = {"strategy": "flash", "run.rounds": 1, "local.batch-size": 64, "flash.stage-epochs": 3}
THREE: Flat = {**QUICK, "flash.stage-clients": 0.5, "flash.stage-epochs": 1}
ASKED = ("query.layer_densities", 0)


def played(**keys: Any) -> Played:
    return play(QUICK | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


def joint(**keys: Any) -> Played:
    return played(strategy="flash-joint", **keys)


def got(run: Played, kind: str, round_: int) -> dict[int, Payload]:
    return {client: payload for (k, r, client), payload in run.grid.got if (k, r) == (kind, round_)}


def alive(mask: Mask) -> dict[str, int]:
    return {name: count for name, count, _ in mask.layers()}


# ---- sparse learning, by hand --------------------------------------------------------------------


def test_what_was_pruned_is_dealt_in_proportion_and_no_layer_overflows() -> None:
    room = {"a": 100, "b": 100}
    assert dealt(8, {"a": 3.0, "b": 1.0}, room) == {"a": 6, "b": 2}
    assert dealt(5, {"a": 3.0, "b": 1.0}, room) == {"a": 4, "b": 1}  # 3.75 and 1.25
    assert dealt(8, {"a": 3.0, "b": 1.0}, {"a": 4, "b": 100}) == {"a": 4, "b": 4}
    assert dealt(12, {"a": 4.0, "b": 1.0, "c": 1.0}, {"a": 2, "b": 9, "c": 9}) == {"a": 2, "b": 5, "c": 5}
    assert dealt(8, {"a": 3.0, "b": 0.0}, room) == {"a": 8, "b": 0}
    assert dealt(108, {"a": 3.0, "b": 0.0}, room) == {"a": 100, "b": 8}
    assert dealt(8, {"a": 0.0, "b": 0.0}, room) == {"a": 8, "b": 0}


def test_dealt_counts_always_add_up() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        room = {str(layer): int(size) for layer, size in enumerate(rng.integers(0, 50, 7))}
        shares = {layer: float(share) for layer, share in zip(room, rng.exponential(size=7) ** 3, strict=True)}
        total = int(rng.integers(0, sum(room.values()) + 1))
        counts = dealt(total, shares, room)
        assert sum(counts.values()) == total
        assert all(0 <= counts[layer] <= room[layer] for layer in room)
        # Layers with room left all get the same multiple of their share, but for rounding.
        factors = [counts[layer] / shares[layer] for layer in room if counts[layer] < room[layer] - 1]
        slack = 7 / min(shares.values())
        assert not factors or max(factors) - min(factors) <= slack


def two_layers(first: list[int], second: list[int]) -> Mask:
    layout = Layout((("a", (1, 8)), ("b", (1, 8))), ("a", "b"))
    return Mask(layout, np.array(first + second, dtype=np.bool_))


def test_a_layer_of_larger_weights_gets_denser() -> None:
    """Each of two layers loses 2 of 4. Means of |w| are 6 and 2: of 4 newcomers 3 go to the first."""
    mask = two_layers([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0])
    magnitudes = np.array([9, 8, 4, 3, 0, 0, 0, 0, 1, 1.5, 3, 2.5, 0, 0, 0, 0], dtype=np.float32)
    after = evolved(mask, magnitudes, Fraction(1, 2), np.random.default_rng(1))
    assert alive(after) == {"a": 5, "b": 3}
    assert after.alive[[0, 1, 8 + 2, 8 + 3]].all()  # the larger half of each stays


def test_who_comes_alive_is_chance_and_a_pruned_weight_may_come_back() -> None:
    mask = two_layers([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0])
    magnitudes = np.array([4, 3, 2, 1, 0, 0, 0, 0] * 2, dtype=np.float32)
    born = np.zeros(16)
    for seed in range(600):
        born += evolved(mask, magnitudes, Fraction(1, 2), np.random.default_rng(seed)).alive
    stays = [0, 1, 8, 9]
    assert (born[stays] == 600).all()
    # 2 of the 6 dead coordinates of a layer, each with probability 1/3
    assert (abs(np.delete(born, stays) - 200) < 5 * math.sqrt(600 * 2 / 9)).all()


def test_a_dense_mask_stays_dense_and_a_dead_layer_dead() -> None:
    rng, ones = np.random.default_rng(1), np.ones(16, dtype=np.float32)
    assert evolved(two_layers([1] * 8, [1] * 8), ones, Fraction(1, 4), rng).count == 16
    assert alive(evolved(two_layers([0] * 8, [1] * 4 + [0] * 4), ones, Fraction(1, 2), rng)) == {"a": 0, "b": 4}


@pytest.mark.parametrize(("epochs", "rates"), [(4, ["3/10", "1/5", "1/10"]), (1, ["1/5"]), (2, ["1/5"])])
def test_the_prune_rate_falls_to_0_and_one_epoch_prunes_in_the_middle(
    epochs: int, rates: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Fraction] = []

    def spy(mask: Mask, magnitudes: Any, rate: Fraction, rng: Any) -> Mask:
        seen.append(rate)
        return evolved(mask, magnitudes, rate, rng)

    monkeypatch.setattr(flash, "evolved", spy)
    run = play({**QUICK, "flash.stage-epochs": epochs, "flash.prune-rate": 0.4}, until=0)
    assert seen == [Fraction(rate) for rate in rates]
    [client] = run.records[0]["asked"]
    assert run.records[0]["image_passes"] == epochs * len(run.runtime.partition.train[client])


def first_client(run: Played, images: int | None = None) -> FlashClient:
    rule = run.runtime.rule(0, ClientState(Context(1, 1, {}, RecordDict(), {}), 0))
    assert isinstance(rule, FlashClient)
    rule.context.indices = (rule.context.indices[0][:images], rule.context.indices[1])
    return rule


def test_sparse_learning_keeps_the_total() -> None:
    run = played()
    rule = first_client(run)
    start = first_mask(run.layout, run.strategy.settings.mask.density, run.strategy.settings.run.seed)
    assert start.count == A
    for epochs in (1, 2):
        found, loss = rule.learn(1, start, epochs, "test")
        assert found.count == A
        assert found != start
        assert loss > 0
        weights = run.layout.flatten_prunable(run.runtime.model.state_dict())
        assert not weights[~found.alive].any()


def test_a_single_image_cannot_be_halved() -> None:
    run = played()
    start = first_mask(run.layout, run.strategy.settings.mask.density, run.strategy.settings.run.seed)
    assert first_client(run, images=1).learn(1, start, 1, "test")[0] == start


def test_the_loss_is_the_mean_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images make halves of two and one: (2 * 1 + 1 * 4) / 3."""
    run, losses = played(), iter([1.0, 4.0])
    monkeypatch.setattr(FlashClient, "fit", lambda *args, **kwargs: next(losses))
    start = first_mask(run.layout, run.strategy.settings.mask.density, run.strategy.settings.run.seed)
    assert first_client(run, images=3).learn(1, start, 1, "test")[1] == 2


# ---- stage 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.5, 3), (0.6, 3), (1.0, 6)])
def test_a_share_of_the_clients_finds_layer_densities_rounded_down_at_least_one(share: float, count: int) -> None:
    run = play({**QUICK, "flash.stage-clients": share, "flash.stage-epochs": 1}, until=0)
    assert len(run.records[0]["asked"]) == count
    assert run.records[0]["bytes_discovery_up"] == count * 4 * 4  # four prunable tensors
    assert run.records[0]["bytes_discovery_down"] == 0


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_mask_has_the_clients_layer_densities_scaled_to_the_exact_total(weighting: str) -> None:
    keys = THREE | {"run.weighting": weighting, "partition.name": "dirichlet-class"}
    honest = play(keys, until=0)
    client, sizes = honest.records[0]["asked"][0], [size for _, _, size in honest.strategy.mask.layers()]
    rest = A - 0.5 * sizes[0] - 0.1 * sizes[1] - 0.2 * sizes[3]
    odd = np.array([0.5, 0.1, rest / sizes[2], 0.2], dtype=np.float32)
    run = play(keys, faults={(*ASKED, client): tamper(lambda p: Payload({"values": odd}, p.metadata))}, until=0)
    replies = got(run, *ASKED).values()
    weights = np.array([p.metadata["samples"] if weighting == "samples" else 1 for p in replies])
    assert weighting == "uniform" or len(set(weights)) == 3
    tables = np.array([odd if k == client else p.arrays["values"] for k, p in got(run, *ASKED).items()], dtype=float)
    mean = (weights @ tables / sum(weights)).astype(np.float32)
    wanted = rescaled(run.layout, dict(zip(run.layout.prunable, mean.tolist(), strict=True)), 0.2)
    assert alive(run.strategy.mask) == wanted
    assert run.strategy.mask.count == A
    other = rescaled(run.layout, dict(zip(run.layout.prunable, tables.mean(axis=0), strict=True)), 0.2)
    assert (wanted == other) == (weighting == "uniform")


def test_a_clients_layer_densities_are_those_of_a_mask_of_the_promised_density() -> None:
    run = play(THREE, until=0)
    sizes = [size for _, _, size in run.strategy.mask.layers()]
    for payload in got(run, *ASKED).values():
        assert payload.arrays["values"].astype(float) @ sizes == pytest.approx(A, abs=0.1)


def test_the_mask_is_random_inside_each_layer() -> None:
    mask = played().strategy.mask
    for name, span in mask.layout.prunable_spans.items():
        bits = mask.alive[span]
        half, size, count = len(bits) // 2, len(bits), int(bits.sum())
        spread = math.sqrt(count * (size - count) / size / 4)
        assert abs(int(bits[:half].sum()) - count / 2) < 5 * max(1.0, spread), name


def test_longer_and_stronger_pruning_moves_layer_densities_further() -> None:
    def largest(**keys: Any) -> float:
        """Density of the largest layer, whose weights are small: it gives to the others."""
        return float(shares_of(played(**keys).strategy.mask)[2])

    base = largest()
    assert 0.2 > largest(flash__prune_rate=0.02) > base > largest(flash__prune_rate=0.5)
    assert base > largest(flash__stage_epochs=6)


def test_stage_2_starts_from_the_initial_weights_inside_the_mask() -> None:
    run = played(run__rounds=2)
    initial = run.layout.flatten(run.masks[0].apply(run.runtime.initial_state()))
    assert run.layout.flatten(run.states[0]).tobytes() == initial.tobytes()
    assert run.masks[0] == run.masks[1] == run.masks[2]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([1.5, 0.1, 0.1, 0.1], "layer densities are from 0.1 to 1.5"),
        ([-0.1, 0.1, 0.1, 0.1], "layer densities are from -0.1 to 0.1"),
        ([0, 0, 0, 0], "not all are 0"),
        ([np.nan, 0.1, 0.1, 0.1], "1 values are NaN or Inf"),
        ([0.1, 0.1, 0.1], "values has length 3; it must be 4"),
        ([1, 0, 0.9, 0], "alive weights; sparse learning keeps"),
    ],
)
def test_layer_densities_that_are_none_are_refused_and_the_others_count(values: list[float], why: str) -> None:
    bad = tamper(lambda payload: Payload({"values": np.array(values, dtype=np.float32)}, payload.metadata))
    client, missing = without_one()
    run = play(THREE, faults={(*ASKED, client): bad}, until=0)
    assert why in run.records[0]["refused"][str(client)]
    assert run.strategy.mask == missing


@functools.cache
def without_one() -> tuple[int, Mask]:
    """The first client of stage 1, and the mask that is found if it does not answer."""
    client = play(THREE, until=0).records[0]["asked"][0]
    return client, play(THREE, faults={(*ASKED, client): answer_error(5)}, until=0).strategy.mask


# ---- the joint variant ---------------------------------------------------------------------------


def test_the_server_keeps_the_largest_mean_weights_of_each_layer_by_the_mean_of_the_clients_densities() -> None:
    run = joint(local__epochs=2)
    replies = got(run, "train", 1).values()
    samples = np.array([payload.metadata["samples"] for payload in replies])
    bits = np.array([np.unpackbits(payload.arrays["mask"]) for payload in replies]).astype(np.bool_)
    weights = np.zeros(bits.shape)
    for row, mask, payload in zip(weights, bits, replies, strict=True):
        whole = np.zeros(P + R)
        whole[Mask(run.layout, mask).transmitted] = payload.arrays["values"]
        row[:] = whole[run.layout.is_prunable]
    mean = samples @ weights / sum(samples)  # 0 where a client holds nothing
    shares = [samples @ bits[:, span].mean(axis=1) / sum(samples) for span in run.layout.prunable_spans.values()]
    counts = rescaled(run.layout, dict(zip(run.layout.prunable, shares, strict=True)), 0.2)
    assert (bits.sum(axis=1) == A).all()
    assert len({row.tobytes() for row in bits}) == 4  # masks moved, each its own way
    found = run.masks[1]
    assert alive(found) == pytest.approx(counts, abs=1)
    assert found.count == A
    kept = run.layout.flatten_prunable(run.states[1])
    assert kept == pytest.approx(np.where(found.alive, mean, 0), abs=1e-6)
    for span in run.layout.prunable_spans.values():
        size, here = abs(mean[span]), found.alive[span]
        assert size[here].min() >= size[~here].max(initial=0) - 1e-7


def test_the_mask_moves_in_every_so_many_rounds_and_travels_only_then() -> None:
    run = joint(run__rounds=3, flash__joint_every=2, run__evaluate_every=3)
    zero, one, two, three = run.masks
    assert zero != one
    assert one == two
    assert two != three
    model = 4 * (A + R)
    assert [record["bytes_train_down"] for record in run.records[1:]] == [4 * model] * 3
    both = model + BITMAP
    assert [record["bytes_train_up"] for record in run.records[1:]] == [4 * both, 4 * model, 4 * both]
    # Rounds 1 and 2 each have a new mask, round 3 that of round 2; after it all 6 clients are sent another.
    new = 6 + len(set(run.records[3]["cohort"]) - set(run.records[2]["cohort"]))
    assert [record["bytes_mask_down"] for record in run.records[1:]] == [4 * BITMAP, 4 * BITMAP, new * BITMAP]


def test_a_mask_of_another_density_is_refused() -> None:
    client = joint().records[1]["cohort"][0]

    def greedy(payload: Payload) -> Payload:
        arrays = {"values": np.zeros(P + R, dtype=np.float32), "mask": np.full(BITMAP, 255, dtype=np.uint8)}
        return Payload(arrays, payload.metadata)

    keys = {**QUICK, "strategy": "flash-joint"}
    where = ("train", 1, client)
    run = play(keys, faults={where: tamper(greedy)})
    assert f"a mask has {P} alive weights; it came down with {A}" in run.records[1]["refused"][str(client)]
    assert run.bits() == play(keys, faults={where: answer_error(5)}).bits()


# ---- bytes and options ---------------------------------------------------------------------------


def test_a_round_carries_alive_values_and_the_dense_remainder_and_the_mask_goes_down_once() -> None:
    run = played(run__rounds=2)
    for record in run.records[1:]:
        assert record["bytes_train_down"] == record["bytes_train_up"] == 4 * 4 * (A + R)
        assert record["bytes_evaluate_down"] == 6 * 4 * (A + R)
    assert [record["bytes_mask_down"] for record in run.records[1:]] == [6 * BITMAP, 0]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("flash.stage-clients", 0.0, "flash.stage-clients is 0.0; it is a fraction"),
        ("flash.stage-epochs", 0, "flash.stage-epochs is 0; it is a number of at least 1"),
        ("flash.prune-rate", 1.5, "flash.prune-rate is 1.5; it is a fraction"),
        ("flash.joint-every", 0, "flash.joint-every is 0; it is a number of at least 1"),
        ("mask.min-per-layer", 5, "mask.min-per-layer is 5; it is 0 with strategy flash"),
    ],
)
def test_options_are_checked(key: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        play({**QUICK, key: value})
