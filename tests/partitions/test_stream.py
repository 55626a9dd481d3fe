"""Streams: what is in play in a round, of clients' images and of the server's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.config import Flat, merge, parse
from ssfl_app.options import ConfigError
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.partitions.stream import class_shares, in_play
from ssfl_app.testing.grid import SMALL
from tests.in_process_grid import play

pytestmark = pytest.mark.narrow

law = settings(deadline=None, derandomize=True, max_examples=80)

STREAM: Flat = {"shift.stream": "classes", "shift.classes": 3, "shift.every": 1}


@st.composite
def shifts(draw):
    classes = draw(st.integers(2, 12))
    width, every = draw(st.integers(1, classes - 1)), draw(st.integers(1, 7))
    stream = draw(st.sampled_from(["classes", "labels"]))
    return ShiftOptions(classes=width, every=every, stream=stream), classes


@given(shifts(), st.integers(1, 300))
@law
def test_shares_go_around_once_in_every_times_classes_rounds(known, round_):
    shift, classes = known
    shares = class_shares(shift, classes, round_)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert (shares == class_shares(shift, classes, round_ + shift.every * classes)).all()
    # Every so many rounds the same picture, a class further on.
    assert np.allclose(np.roll(shares, 1), class_shares(shift, classes, round_ + shift.every), atol=1e-9)
    if shift.stream == "classes" or 2 * shift.classes <= classes:
        assert shares.sum() == pytest.approx(shift.classes)


def test_by_hand():
    jumps = ShiftOptions(classes=2, every=3, stream="classes")
    assert [class_shares(jumps, 4, r).tolist() for r in (0, 1, 3, 4, 10)] == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 0, 0, 1],
    ]
    glides = ShiftOptions(classes=2, every=2, stream="labels")
    assert class_shares(glides, 5, 1).tolist() == [1, 0.5, 0, 0, 0.5]
    near, far = (1 + np.cos(np.pi / 4)) / 2, (1 + np.cos(3 * np.pi / 4)) / 2
    assert class_shares(glides, 5, 2) == pytest.approx([near, near, far, 0, far], abs=1e-8)


@given(shifts(), st.integers(0, 99), st.lists(st.integers(0, 11), max_size=40), st.booleans(), st.integers(0, 9))
@law
def test_of_each_class_the_share_rounded_up_is_in_play_and_at_least_some_where_one_trains(
    known, round_, labels, some, seed
):
    shift, classes = known
    held = np.array(labels, dtype=np.int64) % classes
    chosen = in_play(shift, classes, round_, held, np.random.default_rng(seed), some)
    assert (np.diff(chosen) > 0).all()
    counts, of_each = np.bincount(held, minlength=classes), np.bincount(held[chosen], minlength=classes)
    wanted = np.ceil(class_shares(shift, classes, round_) * counts)
    if wanted.any() or not some:
        assert (of_each == wanted).all()
    elif held.size:  # all of one class, and none that comes before it on the circle
        (only,) = np.flatnonzero(of_each)
        first = (max(round_, 1) - 1) // shift.every % classes
        between = [(first + i) % classes for i in range((only - first) % classes)]
        assert of_each[only] == counts[only]
        assert not counts[between].any()


@pytest.mark.parametrize("stream", ["classes", "labels"])
def test_clients_train_and_everybody_tests_on_what_is_in_play(stream: str) -> None:
    played = play(STREAM | {"shift.stream": stream, "strategy": "fedavg", "partition.name": "iid"})
    shop, labels = played.runtime, played.runtime.data.train.labels.numpy()
    for record in played.records[1:]:
        round_ = record["round"]
        own = {client: shop.in_round(client, round_) for client in range(6)}
        for client, (train, test) in own.items():
            assert set(train) < set(shop.share(client)[0])
            assert set(test) < set(shop.share(client)[1])
        shares = class_shares(ShiftOptions(classes=3, every=1, stream=stream), 10, round_)
        assert {int(c) for train, _ in own.values() for c in labels[train]} == set(np.flatnonzero(shares))
        assert {int(c) for c in shop.central_test(round_).labels} == set(np.flatnonzero(shares))
        # The records count them: one local epoch each.
        assert record["image_passes"] == sum(len(own[client][0]) for client in record["cohort"])
    one, other = (shop.in_round(0, round_)[0].tolist() for round_ in (1, 2))
    assert one != other


def test_scores_are_of_what_the_first_round_has() -> None:
    """Of six clients that hold all classes each scores what is in play, and not 64 images of all."""
    plain: Flat = {"ssfl.saliency-sampling": "plain", "ssfl.saliency-batch-size": 1000}  # all images there are, once
    played = play(STREAM | plain | {"partition.name": "iid", "run.rounds": 1})
    assert played.records[0]["image_passes"] == sum(len(played.runtime.in_round(k, 1)[0]) for k in range(6))


def test_nothing_changes_without_a_stream() -> None:
    shop = play({"run.rounds": 1}).runtime
    assert shop.central_test(3) is shop.data.test
    assert all((a == b).all() for a, b in zip(shop.in_round(2, 3), shop.share(2), strict=True))


def test_a_stream_repeats_bit_for_bit() -> None:
    one, other = play(STREAM), play(STREAM, luck=1)
    assert one.bits() == other.bits()
    assert one.metrics() == other.metrics()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shift.round": 3}, "shift.stream is 'classes'; it is 'none' where shift.round is above 0"),
        ({"data.where": "sites", "data.name": "folder"}, "shift.stream is 'classes'; it is 'none' with data.where"),
        (
            {"privacy.level": "record", "privacy.epsilon": 8.0, "strategy": "random"},
            "shift.stream is 'classes'; it is 'none' with privacy.level 'record'",
        ),
        ({"shift.stream": "tides"}, "shift.stream is 'tides'; it is one of none, classes, labels"),
    ],
)
def test_what_cannot_stream_is_refused(keys: Flat, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(merge(SMALL, STREAM, keys))


def test_more_classes_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shift.classes is 10; it is below the number of classes, 10"):
        play(STREAM | {"shift.classes": 10})
