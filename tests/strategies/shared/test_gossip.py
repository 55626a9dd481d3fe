"""Whose models a peer takes: the topologies, and that everybody draws for itself."""

from typing import Any

import numpy as np
import pytest

from ssfl_app.config import merge, parse
from ssfl_app.core.options import Settings
from ssfl_app.options import ConfigError
from ssfl_app.strategies.shared.gossip import neighbours
from tests.in_process_grid import SMALL


def settings(**keys: Any) -> Settings:
    return parse(
        merge(SMALL, {"strategy": "dpsgd"} | {key.replace("__", "."): value for key, value in keys.items()})
    ).settings


def mixing(options: Settings, round_: int = 1) -> np.ndarray[Any, Any]:
    """The matrix that a round multiplies the models with: row i is the mean that client i takes."""
    clients = options.run.clients
    matrix = np.zeros((clients, clients))
    for client in range(clients):
        group = [client, *neighbours(options, round_, client)]
        matrix[client, group] = 1 / len(group)
    return matrix


def test_a_ring_is_the_client_before_and_the_client_after() -> None:
    ring = settings(gossip__topology="ring")
    assert [neighbours(ring, 1, client) for client in range(6)] == [[1, 5], [0, 2], [1, 3], [2, 4], [3, 5], [0, 4]]
    assert neighbours(ring, 9, 3) == [2, 4]


def test_full_is_everybody_else() -> None:
    assert neighbours(settings(gossip__topology="full", gossip__neighbours=1), 1, 2) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("clients", "rings"), [(1, [[]]), (2, [[1], [0]]), (3, [[1, 2], [0, 2], [0, 1]])], ids=["one", "two", "three"]
)
def test_small_federations_have_fewer_neighbours(clients: int, rings: list[list[int]]) -> None:
    for topology in ("ring", "full", "random"):
        few = settings(run__clients=clients, run__cohort=1, gossip__topology=topology)
        assert [neighbours(few, 1, client) for client in range(clients)] == rings


def test_random_draws_as_many_as_asked_among_the_others_and_at_most_all() -> None:
    for wanted in (1, 3, 5, 10):
        options = settings(gossip__neighbours=wanted)
        for round_ in range(1, 20):
            for client in range(6):
                drawn = neighbours(options, round_, client)
                assert len(set(drawn)) == min(wanted, 5)
                assert drawn == sorted(drawn)
                assert set(drawn) <= set(range(6)) - {client}


def test_random_draws_anew_for_each_round_and_client_and_seed() -> None:
    """Public code seeds with round + client: client i + 1 then takes the neighbours of client i, a round earlier."""
    options = settings(run__clients=40, gossip__neighbours=10)
    drawn = {(r, c): tuple(neighbours(options, r, c)) for r in range(1, 6) for c in range(40)}
    assert len(set(drawn.values())) == len(drawn)
    again = settings(run__clients=40, gossip__neighbours=10)
    assert all(tuple(neighbours(again, r, c)) == d for (r, c), d in drawn.items())
    other = settings(run__clients=40, gossip__neighbours=10, run__seed=2)
    assert tuple(neighbours(other, 1, 0)) != drawn[1, 0]


def test_random_is_uniform() -> None:
    options = settings(run__clients=21, gossip__neighbours=5)
    counts = np.bincount([j for r in range(400) for j in neighbours(options, r, 0)], minlength=21)
    assert counts[0] == 0
    # Each of 20 others is drawn in a round with probability 1/4: 100 of 400, standard deviation 8.7.
    assert abs(counts[1:] - 100).max() < 4.5 * 8.7


def test_ring_and_full_keep_the_mean_and_random_keeps_it_on_average_only() -> None:
    for topology in ("ring", "full"):
        matrix = mixing(settings(gossip__topology=topology))
        assert np.allclose(matrix.sum(axis=0), 1)
        assert np.allclose(matrix.sum(axis=1), 1)
    options = settings(gossip__neighbours=2)
    rounds = [mixing(options, r) for r in range(1, 600)]
    assert all(np.allclose(matrix.sum(axis=1), 1) for matrix in rounds)
    assert not np.allclose(rounds[0].sum(axis=0), 1)
    assert np.allclose(np.mean(rounds, axis=0).sum(axis=0), 1, atol=0.1)


def test_a_ring_contracts_towards_consensus_at_its_second_eigenvalue() -> None:
    """Of a ring of K: (1 + 2 cos(2 pi / K)) / 3. Full reaches consensus in one round."""
    for clients in (4, 6, 9):
        matrix = mixing(settings(run__clients=clients, run__cohort=1, gossip__topology="ring"))
        second = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-2]
        assert second == pytest.approx((1 + 2 * np.cos(2 * np.pi / clients)) / 3)
    assert np.allclose(mixing(settings(gossip__topology="full")), 1 / 6)


def test_who_joins_late_is_nobodys_neighbour_before() -> None:
    for topology in ("random", "ring", "full"):
        late = settings(run__cohort=2, gossip__topology=topology, shift__round=3, shift__clients=2, shift__classes=2)
        before = {j for client in range(4) for j in neighbours(late, 2, client)}
        assert before == {0, 1, 2, 3}
        assert {j for client in range(6) for j in neighbours(late, 3, client)} == set(range(6))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"gossip\.topology is 'star'; it is one of random, ring, full"):
        settings(gossip__topology="star")
    with pytest.raises(ConfigError, match=r"gossip\.neighbours is 0; it is a number of at least 1"):
        settings(gossip__neighbours=0)
