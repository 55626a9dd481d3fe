"""Laws of the partitions: what holds for every data set, number of clients and seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssfl_app.options import ConfigError, build
from ssfl_app.partitions import NATURAL, REGISTRY, PartitionOptions, split
from ssfl_app.partitions.late import ShiftOptions
from ssfl_app.registry import name_of

DEALT = tuple(name for name in REGISTRY if name != NATURAL)
"""Partitions that deal; by the other one the data say who holds what."""


def labels_of(classes, each, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each))


def variation(counts):
    """Mean over the clients of the total-variation distance between their classes and the uniform ones."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.abs(shares - 1 / counts.shape[1]).sum(axis=1).mean() / 2


@st.composite
def worlds(draw, names=DEALT):
    """Options, labels and clients that can be dealt; classes may differ in size or have no image at all."""
    clients = draw(st.integers(1, 12))
    classes = draw(st.integers(1, 7))
    sizes = [draw(st.integers(clients, 40)) for _ in range(classes)]
    name = draw(st.sampled_from(names))
    each = draw(st.integers(-(-classes // clients), classes))
    options = PartitionOptions(name, draw(st.sampled_from([1e-8, 1e-3, 0.3, 10.0, 1e6])), each)
    gap = draw(st.integers(0, 2))  # the first labels stand for no image
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    train = rng.permutation(np.repeat(np.arange(classes), sizes)) + gap
    test = rng.integers(0, classes + gap, size=draw(st.integers(0, 60)))
    return options, train, test, clients


@given(worlds(), st.integers(0, 2**31))
def test_every_training_image_goes_to_one_client_and_no_client_is_empty(world, seed):
    options, train, test, clients = world
    dealt = split(options, train, test, clients, seed)
    assert len(dealt.train) == len(dealt.test) == clients
    assert np.array_equal(np.sort(np.concatenate(dealt.train)), np.arange(len(train)))
    for share in (*dealt.train, *dealt.test):
        assert share.dtype == np.int64
        assert np.all(np.diff(share) > 0)
    assert all(len(share) > 0 for share in dealt.train)


@given(worlds(), st.integers(0, 2**31))
def test_test_images_follow_the_training_classes(world, seed):
    options, train, test, clients = world
    dealt = split(options, train, test, clients, seed)
    classes = max(train.max(), test.max(initial=0)) + 1
    held = dealt.class_counts(train, classes)
    got = np.stack([np.bincount(test[share], minlength=classes) for share in dealt.test])
    present = np.flatnonzero(held.sum(axis=0))
    given_out = np.sort(np.concatenate(dealt.test))
    assert np.array_equal(given_out, np.flatnonzero(np.isin(test, present)))
    quota = held[:, present] / held[:, present].sum(axis=0) * np.bincount(test, minlength=classes)[present]
    assert np.all(np.abs(got[:, present] - quota) < 1)
    assert np.all(got[held == 0] == 0)


@given(worlds(), st.integers(0, 2**31))
@settings(max_examples=30)
def test_same_seed_same_partition_and_no_global_generator(world, seed):
    options, train, test, clients = world
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (split(options, train, test, clients, seed) for _ in range(2))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    for one, other in zip(first.train + first.test, second.train + second.test, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", DEALT)
def test_another_seed_is_another_partition(name):
    labels = labels_of(10, 50)
    options = PartitionOptions(name, 0.3, 2)
    one, other = (split(options, labels, labels[::5], 10, seed) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(one.train, other.train, strict=True))


@given(worlds(names=("dirichlet", "iid")), st.integers(0, 2**31))
def test_sizes_are_equal_within_one_and_the_first_clients_have_more(world, seed):
    options, train, test, clients = world
    sizes = [len(share) for share in split(options, train, test, clients, seed).train]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(worlds(names=("pathological",)), st.integers(0, 2**31))
def test_pathological_clients_hold_exactly_n_classes(world, seed):
    options, train, test, clients = world
    counts = split(options, train, test, clients, seed).class_counts(train, train.max() + 1)
    assert np.all((counts > 0).sum(axis=1) == options.classes)
    holders = (counts > 0).sum(axis=0)[np.unique(train)]
    assert holders.max() - holders.min() <= 1
    for column in counts.T[np.unique(train)]:
        held = column[column > 0]
        assert held.max() - held.min() <= 1


def test_pathological_as_published_gives_clients_of_one_size():
    labels = labels_of(10, 5000)
    dealt = split(PartitionOptions("pathological", 0.3, 2), labels, labels[::5], 100, 1)
    assert {len(share) for share in dealt.train} == {500}


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-class"])
def test_large_alpha_is_near_uniform_and_small_alpha_is_not(name):
    labels = labels_of(10, 1000)

    def distance(alpha):
        dealt = split(PartitionOptions(name, alpha, 2), labels, labels[::5], 10, 1)
        return variation(dealt.class_counts(labels, 10))

    flat, skewed, extreme = distance(1e6), distance(0.3), distance(1e-3)
    # 1,000 multinomial draws over 10 classes lie 0.04 from uniform; a client of one class lies at 0.9.
    assert flat < 0.06
    assert 0.3 < skewed < extreme <= 0.9


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-300])
@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-class", "quantity"])
def test_extreme_alpha_does_not_stall(name, alpha):
    labels = labels_of(10, 500)
    for seed in range(5):
        dealt = split(PartitionOptions(name, alpha, 2), labels, labels[::5], 50, seed)
        assert min(len(share) for share in dealt.train) >= 1
        assert sum(len(share) for share in dealt.train) == len(labels)


def test_one_image_a_client_is_enough():
    labels = labels_of(3, 4)
    for name in ("dirichlet", "dirichlet-class", "iid"):
        dealt = split(PartitionOptions(name, 1e-3, 1), labels, labels, 12, 1)
        assert [len(share) for share in dealt.train] == [1] * 12


def test_class_counts():
    labels = labels_of(4, 10)
    dealt = split(PartitionOptions("iid", 0.3, 2), labels, labels, 5, 1)
    counts = dealt.class_counts(labels, 6)
    assert counts.shape == (5, 6)
    assert counts.sum(axis=0).tolist() == [10, 10, 10, 10, 0, 0]
    assert counts[2].tolist() == [int((labels[dealt.train[2]] == c).sum()) for c in range(6)]


@pytest.mark.parametrize(
    ("name", "each", "clients", "message"),
    [
        ("iid", 2, 2000, "run.clients is 2000; the data set has 40 training images, at least one a client"),
        ("iid", 2, 0, "run.clients is 0; .* at least one a client"),
        ("pathological", 5, 4, "partition.classes is 5; the data set has 4 classes"),
        ("pathological", 1, 3, "partition.classes is 1; with 3 clients it is at least 2, .* 4 classes"),
        ("pathological", 4, 20, "partition.classes is 4; with 20 clients, class 0 .* has 10 training images"),
    ],
)
def test_what_cannot_be_dealt_is_said(name, each, clients, message):
    labels = labels_of(4, 10)
    with pytest.raises(ConfigError, match=message) as caught:
        split(PartitionOptions(name, 0.3, each), labels, labels, clients, 1)
    assert "\n" not in str(caught.value)


def test_the_class_with_too_few_images_is_named():
    labels = np.repeat([0, 1, 2, 3], [20, 20, 20, 4])
    with pytest.raises(ConfigError, match="class 3 goes to 5 of them but has 4 training images"):
        split(PartitionOptions("pathological", 0.3, 2), labels, labels, 10, 1)
    labels = np.repeat([0, 1, 2, 3], [20, 20, 20, 5])
    dealt = split(PartitionOptions("pathological", 0.3, 2), labels, labels, 10, 1)
    assert dealt.class_counts(labels, 4)[:, 3].max() == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "shards"), ("alpha", 0.0), ("alpha", float("nan")), ("alpha", float("inf")), ("classes", 0)],
)
def test_bad_options_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"partition.{key} is"):
        build(PartitionOptions, "partition", {"name": "iid", "alpha": 0.3, "classes": 2} | {key: value})


@pytest.mark.parametrize("alpha", [0.3, 10.0])
def test_dirichlet_is_as_skewed_as_that_of_flower_datasets(alpha):
    """Mean distance from uniform, and mean largest class share, over 8 seeds of 10 clients."""
    datasets = pytest.importorskip("datasets")
    partitioner = pytest.importorskip("flwr_datasets.partitioner")
    labels = labels_of(10, 100)
    frame = datasets.Dataset.from_dict({"label": labels.tolist()})
    ours, theirs = [], []
    for seed in range(8):
        dealt = split(PartitionOptions("dirichlet", alpha, 2), labels, labels, 10, seed)
        ours.append(dealt.class_counts(labels, 10))
        other = partitioner.InnerDirichletPartitioner([100] * 10, "label", alpha, seed=seed)
        other.dataset = frame
        parts = [other.load_partition(client)["label"] for client in range(10)]
        theirs.append(np.stack([np.bincount(part, minlength=10) for part in parts]))
    one, two = np.concatenate(ours), np.concatenate(theirs)
    # Standard error over 80 clients: below 0.02 at alpha 0.3 (distances about 0.6), 0.006 at alpha 10.
    tolerance = 0.06 if alpha < 1 else 0.02
    assert variation(one) == pytest.approx(variation(two), abs=tolerance)
    assert (one.max(axis=1) / 100).mean() == pytest.approx((two.max(axis=1) / 100).mean(), abs=tolerance)


# ---- the data's own clients -----------------------------------------------------------------------

OWNERS = np.array([3, 1, 1, 7, 3, 3]), np.array([1, 3, 3, 9])


def natural(clients, owners=OWNERS, shift=None):
    labels = np.zeros(6, int), np.zeros(4, int)
    return split(PartitionOptions(NATURAL), *labels, clients, 1, shift, owners)


def test_natural_clients_hold_what_is_theirs():
    dealt = natural(3)
    assert [share.tolist() for share in dealt.train] == [[1, 2], [0, 4, 5], [3]]
    assert [share.tolist() for share in dealt.test] == [[0], [1, 2], []]


def test_of_more_natural_clients_the_seed_draws_some():
    chosen = {
        tuple(map(tuple, split(PartitionOptions(NATURAL), *OWNERS, 2, s, None, OWNERS).train)) for s in range(20)
    }
    assert chosen == {((1, 2), (0, 4, 5)), ((1, 2), (3,)), ((0, 4, 5), (3,))}
    assert all(np.array_equal(*pair) for pair in zip(natural(2).train, natural(2).train, strict=True))


def test_natural_clients_that_cannot_be_had():
    with pytest.raises(ConfigError, match=r"run.clients is 4; these data have 3 clients of their own"):
        natural(4)
    with pytest.raises(ConfigError, match=r"partition.name is 'natural'; these data do not say which client"):
        natural(1, None)
    with pytest.raises(ConfigError, match=r"shift.round is 2; it is 0 with partition.name 'natural'"):
        natural(3, shift=ShiftOptions(2, 1, 1))


def test_built_in_partitions_take_no_options():
    labels = labels_of(2, 4)
    with pytest.raises(ConfigError, match=r"partition.options has alpha; iid takes none"):
        split(PartitionOptions("iid", options={"alpha": 2}), labels, labels, 2, 1)


@pytest.mark.parametrize(
    "shares",
    [None, [[0], [1]], [[0], [1], [1]], [[0], [1], []], [[0], [1], [9]], [[0], [1], [-1]], [[0], [1], [0.5]]],
)
def test_what_a_function_of_your_own_deals_is_checked(shares):
    def mine(labels, clients, options, generator):
        return shares

    labels = np.arange(9) % 2
    with pytest.raises(ConfigError, match="it gives 3 arrays of indices below 9, none empty and no index twice"):
        split(PartitionOptions(name_of(mine)), labels, labels, clients=3, seed=1)


def test_a_function_of_your_own_that_fails_is_named():
    def mine(labels, clients, options, generator):
        return labels[len(labels)]

    labels = np.arange(9) % 2
    with pytest.raises(ConfigError, match=r"partition.name is 'this_process:mine.*'; it says IndexError: index 9"):
        split(PartitionOptions(name_of(mine)), labels, labels, clients=3, seed=1)
