"""What every registered strategy keeps, whatever it computes."""

import math
import random

import numpy as np
import pytest
import torch

from ssfl_app.sparsity.codec import SharedMask, nbytes
from ssfl_app.strategies import REGISTRY
from tests.in_process_grid import Played, answer_error, play, tamper


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def played(request: pytest.FixtureRequest) -> Played:
    return play({"strategy": request.param})


def name_of(played: Played) -> str:
    return played.strategy.name


def test_is_registered_under_its_own_name(played: Played) -> None:
    assert REGISTRY[name_of(played)] is type(played.strategy)


def test_learns(played: Played) -> None:
    long = play({"strategy": name_of(played), "run.rounds": 6, "local.epochs": 3, "run.evaluate-every": 6})
    assert long.records[-1]["central_accuracy"] > 0.8
    assert long.records[-1]["train_loss"] < 0.5 * long.records[1]["train_loss"]


def test_repeats_bit_for_bit_with_other_node_ids_and_another_order_of_replies(played: Played) -> None:
    again = play({"strategy": name_of(played)}, luck=1)
    assert again.grid.log != played.grid.log
    assert again.bits() == played.bits()
    assert again.metrics() == played.metrics()


def test_another_seed_is_another_run(played: Played) -> None:
    assert play({"strategy": name_of(played), "run.seed": 2, "run.rounds": 1}).bits() != played.bits()


def test_has_exactly_the_density_it_promises(played: Played) -> None:
    layout, mask = played.layout, played.strategy.mask
    sparse = issubclass(type(played.strategy).client.down, SharedMask)
    assert mask.count == (math.floor(0.2 * layout.prunable_size) if sparse else layout.prunable_size)
    for state in played.states:
        prunable = layout.flatten(state)[layout.is_prunable]
        assert not prunable[~mask.alive].any()
        assert np.count_nonzero(prunable[mask.alive]) > 0.99 * mask.count


def test_pays_the_bytes_of_its_codec_and_nothing_else(played: Played) -> None:
    layout, mask = played.layout, played.strategy.mask
    rule, state = type(played.strategy).client, played.strategy.state
    down, up = (nbytes(codec().encode(layout, state, mask)) for codec in (rule.down, rule.up))
    bitmap = -(-layout.prunable_size // 8) if issubclass(rule.down, SharedMask) else 0
    for record in played.records[1:]:
        assert (record["bytes_train_down"], record["bytes_train_up"]) == (4 * down, 4 * up)
        assert record["bytes_evaluate_down"] == 6 * down
    # The mask goes down once per client in the whole run.
    assert [record["bytes_mask_down"] for record in played.records[1:]] == [6 * bitmap, 0, 0]


def test_leaves_global_random_generators_alone(played: Played) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    play({"strategy": name_of(played), "run.rounds": 1})
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_goes_on_without_a_lost_client_and_names_it(played: Played) -> None:
    client = played.records[2]["cohort"][0]
    broken = play({"strategy": name_of(played)}, faults={("train", 2, client): answer_error(5, "node gone")})
    assert broken.records[2]["lost"] == {str(client): "Flower error 5: node gone"}
    assert broken.records[2]["ok"] == [c for c in played.records[2]["cohort"] if c != client]
    assert broken.bits() != played.bits()


def test_a_refused_reply_changes_no_more_than_a_missing_one(played: Played) -> None:
    client = played.records[2]["cohort"][0]
    where = ("train", 2, client)

    def poison(parcel):  # type: ignore[no-untyped-def]
        values = parcel.arrays["values"].copy()
        values[7] = np.nan
        return type(parcel)({**parcel.arrays, "values": values}, parcel.facts)

    refused = play({"strategy": name_of(played)}, faults={where: tamper(poison)})
    missing = play({"strategy": name_of(played)}, faults={where: answer_error(5)})
    assert "1 values are NaN or Inf" in refused.records[2]["refused"][str(client)]
    assert refused.bits() == missing.bits()


def test_sends_every_sampled_strategy_the_same_cohorts(played: Played) -> None:
    other = play({"strategy": "fedavg"})
    assert [r.get("cohort") for r in played.records] == [r.get("cohort") for r in other.records]
