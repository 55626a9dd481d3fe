"""Partitioners of flwr-datasets by their names."""

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets import partitioner

from ssfl_app.config import merge, parse
from ssfl_app.options import ConfigError
from ssfl_app.partitions import PartitionOptions, split
from ssfl_app.runtime import load_federation

LABELS = np.random.default_rng(0).integers(0, 5, 300)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # theirs


def deal(name, clients=4, seed=1, **options):
    asked = PartitionOptions(f"flwr_datasets.partitioner:{name}", options=options)
    return split(asked, LABELS, LABELS[:60], clients, seed)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("IidPartitioner", {}),
        ("LinearPartitioner", {}),
        ("DirichletPartitioner", {"alpha": 0.5, "min-partition-size": 1}),
        ("PathologicalPartitioner", {"num-classes-per-partition": 2}),
        ("ShardPartitioner", {"num-shards-per-partition": 2, "keep-incomplete-shard": True}),
    ],
)
def test_each_image_has_one_client_and_test_images_follow(name, options):
    dealt, again = (deal(name, **options) for _ in range(2))
    held = np.concatenate(dealt.train)
    assert len(np.unique(held)) == len(held) > 250  # a shard that is not full may be left out
    assert min(len(share) for share in dealt.train) > 0
    for one, other in zip(dealt.train + dealt.test, again.train + again.test, strict=True):
        assert np.array_equal(one, other)
    tests = np.concatenate(dealt.test)
    assert len(np.unique(tests)) == len(tests) == 60
    for train, test in zip(dealt.train, dealt.test, strict=True):
        assert set(LABELS[:60][test]) <= set(LABELS[train])


def test_it_is_theirs_with_a_seed_of_the_run():
    ours = deal("DirichletPartitioner", alpha=0.5)
    assert any(
        not np.array_equal(*pair)
        for pair in zip(ours.train, deal("DirichletPartitioner", seed=2, alpha=0.5).train, strict=True)
    )
    theirs = partitioner.DirichletPartitioner(4, "label", 0.5, seed=7)
    theirs.dataset = Dataset.from_dict({"label": LABELS, "index": np.arange(300)})
    own = deal("DirichletPartitioner", alpha=0.5, seed=1)
    assert [len(share) for share in own.train] == [len(share) for share in ours.train]
    given = split(
        PartitionOptions("flwr_datasets.partitioner:DirichletPartitioner", options={"alpha": 0.5, "seed": 7}),
        LABELS,
        LABELS[:60],
        4,
        1,
    )
    for client, share in enumerate(given.train):
        assert share.tolist() == sorted(theirs.load_partition(client)["index"])


def test_it_is_chosen_by_the_configuration():
    keys = {"partition.name": "flwr_datasets.partitioner:PathologicalPartitioner", "run.clients": 5, "run.cohort": 2}
    config = parse(merge(keys, {"partition.options.num-classes-per-partition": 2}))
    data, dealt = load_federation(config)
    held = dealt.class_counts(data.train.labels.numpy(), 10)
    assert ((held > 0).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("name", "clients", "options", "said"),
    [
        ("DirichletPartitioner", 4, {}, "missing 1 required positional argument: 'alpha'"),
        ("DirichletPartitioner", 4, {"beta": 1}, "unexpected keyword argument 'beta'"),
        (
            "NaturalIdPartitioner",
            4,
            {},
            "run.clients is 4; flwr_datasets.*NaturalIdPartitioner deals these data to 5",
        ),
        ("DirichletPartitioner", 60, {"alpha": 0.1}, "it says The max number of attempts"),
        (
            "DirichletPartitioner",
            50,
            {"alpha": 0.01, "min-partition-size": 0},
            r"it leaves client \d+ without a sample",
        ),
    ],
)
def test_what_a_partitioner_cannot_do(name, clients, options, said):
    with pytest.raises(ConfigError, match=said):
        deal(name, clients, **options)
