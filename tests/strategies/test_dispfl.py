"""DisPFL: the mean over owners, masks that move and keep their layers' densities, bytes, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from ssfl_app.comm.payload import Payload
from ssfl_app.config import Flat, defaults, merge, parse
from ssfl_app.core.strategy import ServerContext
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.codec import BitmapAndValues, MaskedValues
from ssfl_app.sparsity.layout import Layout, load_state
from ssfl_app.sparsity.mask import Mask
from ssfl_app.strategies.dispfl import DisPfl, layer_counts
from ssfl_app.training.models import ModelOptions, outline
from tests.in_process_grid import SMALL, Played, answer_error, play, tamper

pytestmark = pytest.mark.narrow

BASE: Flat = {"strategy": "dispfl", "gossip.neighbours": 2}
# The layers of the narrow CNN: 144, 4608, 32768 and 640 weights; 170 other coordinates.
COUNTS = [144, 586, 6261, 640]
BYTES = 4 * (sum(COUNTS) + 170) + 38160 // 8


def dispfl(**keys: Any) -> Played:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return play(BASE | {"run.rounds": 2} | named)


@pytest.fixture
def played() -> Played:
    return play(BASE)


def payloads(log: list[Any]) -> dict[tuple[int, int], Payload]:
    return {(round_, client): payload for (kind, round_, client), payload in log if kind == "train"}


def masks(played: Played, round_: int) -> list[Mask]:
    """Return what clients were sent in a round."""
    sent = payloads(played.grid.sent)
    return [BitmapAndValues().decode(sent[round_, client].arrays, played.layout)[1] for client in range(6)]


def per_layer(mask: Mask) -> list[int]:
    return [alive for _, alive, _ in mask.layers()]


class TestTheMean:
    def test_by_hand(self) -> None:
        """Owners only, whatever they weigh; 0 where there are none; everything else by the plain mean."""
        layout = Layout((("w", (1, 5)), ("b", (1,))), ("w",))
        settings = parse(
            merge(defaults(), SMALL | {"strategy": "dispfl", "run.clients": 3, "run.cohort": 3, "mask.density": 0.6})
        ).settings
        server = DisPfl(ServerContext(layout, settings))
        bits = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1]], dtype=np.bool_)
        values = [[1, 2, 9, 9, 1, 1], [9, 4, 5, 9, 2, 2], [9, 9, 9, 9, 6, 6]]
        server.masks = [Mask(layout, row) for row in bits]
        server.models = [
            BitmapAndValues().encode(layout, layout.unflatten(np.array(row, dtype=np.float32)), mask)
            for row, mask in zip(values, server.masks, strict=True)
        ]
        assert server._mean([0, 1, 2]).tolist() == [1, 3, 5, 0, 3, 3]
        # Client 0 starts from its own part of it: all others are its neighbours.
        start, mask = BitmapAndValues().decode(server.train_payload(1, 0).arrays, layout)
        assert mask == server.masks[0]
        assert layout.flatten(start).tolist() == [1, 3, 0, 0, 3, 3]

    def test_it_divides_by_the_masks_that_the_weights_were_trained_under(self) -> None:
        """Not by those their owners will use next: regrown weights have no value yet, fired ones still have."""
        full = dispfl(gossip__topology="full")
        layout, got, sent = full.layout, payloads(full.grid.got), payloads(full.grid.sent)
        total, by_old, by_new = (np.zeros(layout.size) for _ in range(3))
        for client, old in enumerate(masks(full, 1)):
            total += layout.flatten(MaskedValues().decode(got[1, client].arrays, layout, old)[0])
            by_old += old.transmitted
            by_new += Mask.unpack(layout, got[1, client].arrays["mask"]).transmitted
        for client in range(6):
            start, mask = BitmapAndValues().decode(sent[2, client].arrays, layout)
            mean = np.where(mask.transmitted, total / np.maximum(by_old, 1), 0)
            assert np.allclose(layout.flatten(start), mean, rtol=1e-5, atol=1e-7)
        assert ((by_old != by_new) & (total != 0)).sum() > 250  # the case that tells them apart occurs

    def test_samples_do_not_weigh(self) -> None:
        unequal = {"partition__name": "dirichlet-class"}
        assert dispfl(**unequal).bits() == dispfl(**unequal, run__weighting="uniform").bits()

    def test_topologies(self) -> None:
        """A client takes part in its own mean; the bytes between peers tell from how many others it takes."""
        for topology, peers in (("random", 2), ("ring", 2), ("full", 5)):
            record = dispfl(gossip__topology=topology, run__rounds=1).records[1]
            assert record["bytes_peer"] == 6 * peers * BYTES


class TestMasks:
    def test_every_client_has_its_own_with_erk_counts_that_never_change(self, played: Played) -> None:
        for round_ in (1, 2, 3):
            found = masks(played, round_)
            assert [per_layer(mask) for mask in found] == [COUNTS] * 6
            assert len({mask.digest for mask in found}) == 6

    def test_published_densities_of_resnet18(self) -> None:
        """Seven convolutions are sparse at 0.5, the last ones most; one density over the prunable weights."""
        layout = Layout.of(outline(ModelOptions(name="resnet18", norm="group"), (3, 8, 8), 10))
        counts, shapes = layer_counts(layout, 0.5, "erk"), dict(layout.shapes)
        shares = {name: counts[name] / math.prod(shapes[name]) for name in layout.prunable}
        sparse = {name: share for name, share in shares.items() if share < 1}
        assert sorted(sparse.values()) == pytest.approx([0.3578] * 3 + [0.5377] + [0.7197] * 3, abs=1e-3)
        assert 0 <= layout.prunable_size // 2 - sum(counts.values()) < len(layout.prunable)

    def test_half_of_each_layer_moves_in_round_1_and_less_later(self, played: Played) -> None:
        # d = 0.25 (1 + cos(pi (t - 1) / 3)): 0.5, 0.375, 0.125. Who was fired may come back at once.
        got = payloads(played.grid.got)
        for round_, drop in ((1, 0.5), (2, 0.375), (3, 0.125)):
            for client, old in enumerate(masks(played, round_)):
                new = Mask.unpack(played.layout, got[round_, client].arrays["mask"])
                for name, span in played.layout.prunable_spans.items():
                    alive, size = old.alive[span].sum(), span.stop - span.start
                    died, left = np.count_nonzero(old.alive[span] & ~new.alive[span]), math.ceil(drop * alive)
                    assert died <= left, name
                    if alive < size:
                        # Of `left` that were fired each comes back with probability left / (dead ones + left).
                        assert died == pytest.approx(left * (1 - left / (size - alive + left)), rel=0.15)

    def test_the_smallest_weights_die_and_a_dense_layer_stays_dense(self, played: Played) -> None:
        layout, got = played.layout, payloads(played.grid.got)
        for client, old in enumerate(masks(played, 1)):
            trained, _ = MaskedValues().decode(got[1, client].arrays, layout, old)
            size = np.abs(layout.flatten_prunable(trained))
            new = Mask.unpack(layout, got[1, client].arrays["mask"])
            first, *_, last = layout.prunable_spans.values()
            assert new.alive[first].all()
            assert new.alive[last].all()
            span = layout.prunable_spans["8.weight"]
            middle = np.median(size[span][old.alive[span]])
            assert new.alive[span][old.alive[span] & (size[span] > middle)].all()

    def test_by_gradient_the_steepest_come_back_at_the_price_of_a_minibatch(self, played: Played) -> None:
        # Their values are compared in test_oracles.py.
        by_gradient = play(BASE | {"dispfl.regrow": "gradient"})
        assert masks(by_gradient, 1) == masks(played, 1)
        assert masks(by_gradient, 2) != masks(played, 2)
        for ours, theirs in zip(by_gradient.records[1:], played.records[1:], strict=True):
            assert ours["image_passes"] - theirs["image_passes"] == 6 * SMALL["local.batch-size"]

    def test_static_masks_stay(self) -> None:
        static = dispfl(dispfl__static=True)
        assert masks(static, 1) == masks(static, 2) == static.strategy.masks

    def test_a_common_first_mask_and_uniform_densities_are_options(self) -> None:
        common = masks(dispfl(dispfl__same_initial=True, run__rounds=1), 1)
        assert len({mask.digest for mask in common}) == 1
        flat = dispfl(dispfl__densities="uniform", run__rounds=1)
        assert per_layer(masks(flat, 1)[0]) == [28, 921, 6553, 128]

    def test_a_density_of_1_trains_everything(self) -> None:
        dense = dispfl(mask__density=1.0)
        assert dense.strategy.densities() == (1.0, 1.0)
        assert all(mask.count == 38160 for mask in masks(dense, 2))


class TestModels:
    def test_a_client_is_tested_with_what_it_trained(self, played: Played) -> None:
        """Under the old mask, not the one that it will train in next."""
        got, shop = payloads(played.grid.got), played.runtime
        for client, old in enumerate(masks(played, 3)):
            state, _ = MaskedValues().decode(got[3, client].arrays, played.layout, old)
            load_state(shop.model, state)
            _, accuracy = shop.trainer.evaluate(shop.model, shop.data.test.take(shop.partition.test[client]))
            assert played.strategy.personal_accuracy[client] == accuracy
        assert played.records[-1]["local_accuracy_mean"] is None

    def test_bytes(self, played: Played) -> None:
        for record in played.records[1:]:
            assert record["bytes_train_down"] == record["bytes_train_up"] == 6 * BYTES
            assert record["bytes_evaluate_down"] == 6 * BYTES
            assert record["bytes_peer"] == 6 * 2 * BYTES
            assert record["bytes_mask_down"] == 0  # they are part of the models

    def test_a_lossy_way_up_and_another_one_down(self) -> None:
        lossy = dispfl(wire__up_values="int8", wire__down_values="fp16", local__epochs=2)
        exact = dispfl(local__epochs=2)
        coordinates = sum(COUNTS) + 170
        record = lossy.records[-1]
        assert record["bytes_train_up"] == 6 * (coordinates + 4 * -(-coordinates // 1024) + 4770)
        assert record["bytes_train_down"] == record["bytes_evaluate_down"] == 6 * (2 * coordinates + 4770)
        assert record["bytes_peer"] == 2 * record["bytes_train_up"]
        assert record["personal_accuracy_mean"] == pytest.approx(exact.records[-1]["personal_accuracy_mean"], abs=0.1)

    def test_who_is_lost_keeps_model_and_mask(self, played: Played) -> None:
        lost = play(BASE, faults={("train", 2, 4): answer_error(5)})
        assert masks(lost, 3)[4] == masks(lost, 2)[4]
        assert masks(lost, 3)[3] == masks(played, 3)[3]
        sent = [p for (kind, round_, c), p in lost.grid.sent if (kind, round_, c) == ("evaluate", 2, 4)]
        state, mask = BitmapAndValues().decode(sent[0].arrays, lost.layout)
        assert mask == masks(lost, 1)[4]
        trained, _ = MaskedValues().decode(payloads(lost.grid.got)[1, 4].arrays, lost.layout, mask)
        assert all(torch.equal(state[name], trained[name]) for name in state)

    def test_late_clients_are_in_nobodys_mean_before_they_come(self) -> None:
        late = dispfl(shift__round=2, shift__clients=2, gossip__topology="full", run__cohort=4)
        first, second = (late.records[r]["bytes_peer"] for r in (1, 2))
        assert (first, second) == (4 * 3 * BYTES, 6 * 5 * BYTES)
        got, layout = payloads(late.grid.got), late.layout
        total, owners = np.zeros(layout.size), np.zeros(layout.size)
        sent = payloads(late.grid.sent)
        for client in range(4):
            old = BitmapAndValues().decode(sent[1, client].arrays, layout)[1]
            total += layout.flatten(MaskedValues().decode(got[1, client].arrays, layout, old)[0])
            owners += old.transmitted
        assert np.allclose(layout.flatten(late.states[1]), total / np.maximum(owners, 1), rtol=1e-5, atol=1e-7)


def other_mask(change: Any) -> Any:
    def tampered(payload: Payload) -> Payload:
        bits = np.unpackbits(payload.arrays["mask"])
        change(bits)
        return Payload({**payload.arrays, "mask": np.packbits(bits)}, payload.metadata)

    return tamper(tampered)


def one_more(bits: Any) -> None:
    bits[144 + np.flatnonzero(bits[144:4752] == 0)[0]] = 1


def to_another_layer(bits: Any) -> None:
    one_more(bits)
    bits[4752 + np.flatnonzero(bits[4752:])[0]] = 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (other_mask(one_more), "the new mask has 587 alive weights in 3.weight; it must keep 586"),
        (other_mask(to_another_layer), "the new mask has 587 alive weights in 3.weight; it must keep 586"),
        (tamper(lambda p: Payload({**p.arrays, "mask": p.arrays["mask"][:-1]}, p.metadata)), "4769 bytes"),
        (tamper(lambda p: Payload({"values": p.arrays["values"]}, p.metadata)), "no array 'mask'"),
        (tamper(lambda p: Payload({**p.arrays, "values": p.arrays["values"][1:]}, p.metadata)), "it must be 7801"),
        (tamper(lambda p: Payload(p.arrays, {**p.metadata, "loss": math.inf})), "loss is inf"),
    ],
)
def test_a_bad_reply_is_refused_by_name_and_the_others_go_on(fault: Any, reason: str) -> None:
    played = play(BASE | {"run.rounds": 1}, faults={("train", 1, 2): fault})
    assert reason in played.records[1]["refused"]["2"]
    assert played.records[1]["ok"] == [0, 1, 3, 4, 5]
    assert played.strategy.masks[2] == masks(played, 1)[2]


def test_an_array_that_does_not_belong_there_is_not_kept() -> None:
    more = tamper(lambda p: Payload({**p.arrays, "extra": np.zeros(10**6, np.float32)}, p.metadata))
    played = play(BASE | {"run.rounds": 2}, faults={("train", 1, 2): more})
    assert played.records[2]["bytes_peer"] == 6 * 2 * BYTES


@pytest.mark.parametrize(
    ("key", "value"), [("densities", "er"), ("regrow", "set"), ("static", 1), ("same-initial", 0)]
)
def test_options_are_checked(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"dispfl\.{key} is"):
        play(BASE | {f"dispfl.{key}": value})
