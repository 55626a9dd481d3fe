"""Classes that join late: who holds what, and who takes part when."""

import numpy as np
import pytest

from ssfl_app.config import Flat
from ssfl_app.options import ConfigError
from tests.in_process_grid import play

pytestmark = pytest.mark.narrow

SHIFT: Flat = {"shift.round": 3, "shift.clients": 2, "shift.classes": 3, "run.rounds": 4, "run.cohort": 3}


def test_late_clients_hold_the_late_classes_and_nothing_else() -> None:
    shop = play(SHIFT | {"run.rounds": 1}).runtime
    counts = shop.partition.class_counts(shop.data.train.labels.numpy(), 10)
    assert not counts[:4, 7:].any()
    assert not counts[4:, :7].any()
    assert counts.sum() == len(shop.data.train.labels)
    tests = [np.unique(shop.data.test.labels.numpy()[part]) for part in shop.partition.test]
    assert all(labels.max() < 7 for labels in tests[:4])
    assert all(labels.min() >= 7 for labels in tests[4:])


@pytest.mark.parametrize("strategy", ["ssfl", "fedavg", "ditto"])
def test_late_clients_take_part_from_that_round_on(strategy: str) -> None:
    played = play(SHIFT | {"strategy": strategy})
    seen = [set(record["cohort"]) for record in played.records[1:]]
    assert not (seen[0] | seen[1]) & {4, 5}
    assert (seen[2] | seen[3]) & {4, 5}
    assert all(len(cohort) == 3 for cohort in seen)
    assert not set(played.records[0]["asked"]) & {4, 5}
    assert all(len(record["local_accuracy"]) == 6 for record in played.records[1:])  # but they are tested


def test_nothing_changes_where_nobody_joins_late() -> None:
    assert play({"shift.clients": 2}).bits() == play({}).bits()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shift.clients": 4}, "shift.clients is 4; of 6 clients at least run.cohort, 3, start early"),
        ({"shift.classes": 10}, "shift.classes is 10; it is below the number of classes, 10"),
        ({"shift.classes": 0}, "shift.classes is 0"),
    ],
)
def test_what_cannot_be_is_refused(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        play(SHIFT | keys)
