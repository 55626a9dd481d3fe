"""SSFL's warm-up, and its one-shot refresh when classes join late."""

import numpy as np
import pytest
import torch

from ssfl_app import strategies
from ssfl_app.config import Flat
from ssfl_app.core.strategy import ServerContext
from ssfl_app.sparsity.codec import Dense, MaskedValues, nbytes
from ssfl_app.sparsity.mask import Mask
from ssfl_app.sparsity.saliency import snip
from ssfl_app.strategies.shared.scoring import SsflOptions
from ssfl_app.strategies.ssfl.refresh import MaskRefresh, reveal_dead_weights
from tests.in_process_grid import Played, play

pytestmark = pytest.mark.narrow

SHIFT: Flat = {"shift.round": 3, "shift.clients": 2, "shift.classes": 3, "run.rounds": 4, "run.cohort": 3}
REFRESH: Flat = SHIFT | {"ssfl.refresh": "scheduled", "ssfl.refresh-round": 3}
BITMAP = -(-38160 // 8)


def options(**changes: object) -> SsflOptions:
    known = play({"run.rounds": 1}).strategy.settings.sections["ssfl"]
    return SsflOptions(**{**vars(known), **changes})


class TestWarmup:
    def test_dense_rounds_come_first_and_are_fedavgs(self) -> None:
        warm, plain = play({"ssfl.warmup-rounds": 2}), play({"strategy": "fedavg"})
        for round_ in (1, 2):
            assert all(torch.equal(t, plain.states[round_][n]) for n, t in warm.states[round_].items())
        assert [record["density"] for record in warm.records[1:]] == [1, 1, pytest.approx(0.2, abs=1e-5)]

    def test_the_mask_is_that_of_the_weights_of_that_moment(self) -> None:
        """The scores by hand at the weights after the warm-up: the mean of all clients, weighted by samples."""
        warm = play({"ssfl.warmup-rounds": 1, "run.rounds": 2})
        expected = mask_at(warm, warm.states[1])
        assert expected.jaccard_distance(warm.strategy.mask) < 1e-3
        assert play({}).strategy.mask.jaccard_distance(warm.strategy.mask) > 0.1

    def test_bytes(self) -> None:
        warm = play({"ssfl.warmup-rounds": 1})
        layout, mask = warm.layout, warm.strategy.mask
        dense, sparse = 4 * layout.size, nbytes(MaskedValues().encode(layout, warm.strategy.state, mask))
        setup, first, second, third = warm.records
        assert (setup["asked"], setup["bytes_discovery_up"]) == ([], 0)
        assert first["bytes_train_down"] == first["bytes_train_up"] == 4 * dense
        assert first["bytes_mask_down"] == 0  # everybody knows the dense mask
        # The question takes the dense weights along: nobody can make them from the seed any more.
        assert second["setup_asked"] == list(range(6))
        assert second["bytes_discovery_down"] == 6 * dense
        assert second["bytes_discovery_up"] == 6 * 4 * 38160
        assert second["bytes_mask_down"] == 6 * BITMAP
        assert third["bytes_train_up"] == 4 * sparse
        assert "setup_asked" not in third


class TestLifting:
    def test_scores_at_masked_weights_return_the_same_mask_and_at_lifted_ones_they_do_not(self) -> None:
        """The trap: |g * 0| is 0, so dead weights could never come back."""
        played = play({"run.rounds": 2, "run.cohort": 6})
        mask, trained = played.strategy.mask, played.strategy.state
        # Not equal to the bit: alive weights behind a dead unit score 0 as well, and give way by their index.
        stuck = mask_at(played, trained).jaccard_distance(mask)
        lifted = reveal_dead_weights(mask, trained, played.runtime.initial_state())
        assert mask_at(played, lifted).jaccard_distance(mask) > max(0.05, 5 * stuck)

    def test_by_hand(self) -> None:
        played = play({"run.rounds": 1})
        mask, w0 = played.strategy.mask, played.runtime.initial_state()
        lifted = played.layout.flatten(reveal_dead_weights(mask, played.strategy.state, w0))
        w, start, alive = played.layout.flatten(played.strategy.state), played.layout.flatten(w0), mask.transmitted
        assert (lifted[alive] == w[alive]).all()
        assert (lifted[~alive] == start[~alive]).all()


class TestRefresh:
    def test_it_happens_once_and_is_counted(self) -> None:
        played = play(REFRESH)
        asked = [record.get("setup_asked") for record in played.records]
        assert asked == [None, None, None, list(range(6)), None]
        record, mask = played.records[3], played.strategy.mask
        alive = 4 * (mask.count + played.layout.size - 38160)
        assert record["bytes_discovery_down"] == 6 * (alive + BITMAP)
        assert record["bytes_discovery_up"] == 6 * 4 * 38160
        assert 0 < record["mask_distance"] < 1
        assert mask.count == int(0.2 * 38160)

    def test_the_new_mask_sees_the_new_clients(self) -> None:
        played = play(REFRESH | {"run.rounds": 3})
        before = play(SHIFT | {"run.rounds": 3})
        w = reveal_dead_weights(before.strategy.mask, before.states[2], before.runtime.initial_state())
        assert mask_at(before, w).jaccard_distance(played.strategy.mask) < 1e-3

    @pytest.mark.parametrize("start", ["initial", "zero", "restart"])
    def test_where_weights_start_that_come_back(self, start: str) -> None:
        keys = REFRESH | {"ssfl.refresh-weights": start, "run.rounds": 3}
        sent = {c: p for (kind, r, c), p in play(keys).grid.sent if kind == "train" and r == 3}
        played, before = play(keys), play(SHIFT | {"run.rounds": 3})
        layout, mask = played.layout, played.strategy.mask
        down = layout.flatten(MaskedValues().decode(next(iter(sent.values())).arrays, layout, mask)[0])
        w0, w = layout.flatten(played.runtime.initial_state()), layout.flatten(before.states[2])
        kept = mask.transmitted & before.strategy.mask.transmitted
        back = mask.transmitted & ~before.strategy.mask.transmitted
        assert back.sum() > 100
        assert (down[back] == {"initial": w0[back], "zero": 0, "restart": w0[back]}[start]).all()
        assert (down[kept] == (w0 if start == "restart" else w)[kept]).all()

    def test_a_client_that_makes_other_weights_from_the_seed_is_sent_all_of_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = play(REFRESH)
        from ssfl_app.strategies.ssfl import refresh

        original = refresh.reveal_dead_weights
        count = [0]

        def other(mask, trained, initial):  # type: ignore[no-untyped-def]
            count[0] += 1
            made = original(mask, trained, initial)
            if count[0] == 2:  # the server's is the first, a client's the second
                made = {name: tensor + 1 for name, tensor in made.items()}
            return made

        monkeypatch.setattr(refresh, "reveal_dead_weights", other)
        odd = play(REFRESH)
        assert odd.bits() == plain.bits()
        more = odd.records[3]["bytes_discovery_down"] - plain.records[3]["bytes_discovery_down"]
        alive = 4 * (odd.strategy.mask.count + odd.layout.size - 38160)
        dense = nbytes(Dense().encode(odd.layout, odd.strategy.state, Mask.dense(odd.layout)))
        assert more == alive + BITMAP + dense

    def test_a_resumed_run_refreshes_as_the_uninterrupted_one(self) -> None:
        from flwr.app import ArrayRecord

        keys = REFRESH | {"run.checkpoint-every": 1}
        whole, half = play(keys), play(keys, until=2)
        arrays = {name: array.copy() for name, array in half.strategy.state_dict().items()}
        again = strategies.REGISTRY["ssfl"](ServerContext(whole.layout, whole.strategy.settings))
        again.load_state_dict(2, arrays)
        finished = Played(again, whole.runtime, half.grid)
        again.start(half.grid, ArrayRecord(whole.runtime.initial_state()), 4)
        assert finished.bits() == whole.bits()


class TestDrift:
    def test_newcomers_with_a_high_loss_trigger_it(self) -> None:
        trigger = MaskRefresh(options(refresh="drift", refresh_drift=3.0), clients=6)
        for round_ in range(2, 8):  # clients 0 and 1 train for six rounds
            assert not trigger.due(round_, {0: 0.1, 1: 0.3})
        # Their mean is 0.2; the newcomers' 0.61 is above three times that.
        assert trigger.due(8, {0: 0.1, 4: 0.61})

    def test_a_moderate_loss_does_not(self) -> None:
        trigger = MaskRefresh(options(refresh="drift", refresh_drift=3.0), clients=6)
        for round_ in range(2, 8):
            trigger.due(round_, {0: 0.1, 1: 0.3})
        assert not trigger.due(8, {0: 0.1, 4: 0.59})
        assert not trigger.due(9, {0: 5.0, 1: 5.0})  # not newcomers

    def test_it_waits_for_five_rounds_and_for_the_earliest_round(self) -> None:
        early = MaskRefresh(options(refresh="drift"), clients=6)
        assert not early.due(2, {0: 0.1})
        assert not early.due(3, {1: 9.0})
        late = MaskRefresh(options(refresh="drift", refresh_round=20), clients=6)
        for round_ in range(2, 9):
            late.due(round_, {0: 0.1})
        assert not late.due(9, {1: 9.0})

    def test_a_snapshot_keeps_its_memory(self) -> None:
        one, two = (MaskRefresh(options(refresh="drift"), clients=6) for _ in range(2))
        for round_ in range(2, 8):
            one.due(round_, {0: 0.1})
        two.load_state_dict({name: array.copy() for name, array in one.state_dict().items()})
        assert two.due(8, {4: 0.31}) is one.due(8, {4: 0.31}) is True

    def test_it_sees_the_shift_in_a_run(self) -> None:
        keys: Flat = {"shift.round": 9, "shift.clients": 2, "shift.classes": 3, "run.rounds": 11, "run.cohort": 4}
        keys |= {"local.epochs": 3, "ssfl.refresh": "drift", "ssfl.refresh-drift": 2.0, "run.evaluate-every": 11}
        played = play(keys)
        asked = [record["round"] for record in played.records if "setup_asked" in record]
        first = next(record["round"] for record in played.records[1:] if {4, 5} & set(record["cohort"]))
        assert asked == [first + 1]


def mask_at(played: Played, state: dict[str, torch.Tensor]) -> Mask:
    """Return SSFL's mask at these weights, all clients asked, without any of SSFL's code but the score of a batch."""
    from ssfl_app.seeding import generator
    from ssfl_app.sparsity.layout import load_state, state_of
    from ssfl_app.sparsity.saliency import balanced_batch

    shop, layout = played.runtime, played.layout
    total = np.zeros(layout.prunable_size)
    for client, part in enumerate(shop.partition.train):
        data = shop.data.train.take(part)
        size = played.strategy.settings.sections["ssfl"].saliency_batch_size
        rng = generator(played.strategy.settings.run.seed, "saliency", client, 0)
        load_state(shop.model, state)
        images = data.take(balanced_batch(data.labels.numpy(), size, rng))
        scores = snip(shop.trainer.gradient(shop.model, images), state_of(shop.model))
        total += len(part) * layout.flatten_prunable(scores).astype(np.float64)
    return Mask.top(layout, (total / total.sum()).astype(np.float32), 0.2)
