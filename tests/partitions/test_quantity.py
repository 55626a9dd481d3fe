"""The partition by quantity: sizes differ as alpha says, classes do not."""

import numpy as np
import pytest

from ssfl_app.partitions import PartitionOptions, split


def sizes(alpha, clients=20, images=10_000):
    labels = np.arange(images) % 10
    dealt = split(PartitionOptions("quantity", alpha), labels, labels[::5], clients, 1)
    return np.array([len(share) for share in dealt.train]), dealt.class_counts(labels, 10)


def test_sizes_vary_as_the_dirichlet_distribution_does():
    for alpha in (0.5, 5.0):
        shares = np.concatenate([sizes(alpha, images=images)[0] / images for images in (9_000, 10_000, 11_000)])
        # Shares of one client of Dir(alpha * 1_K) have the variance (1/K)(1 - 1/K) / (K alpha + 1).
        assert shares.std() == pytest.approx(np.sqrt(0.05 * 0.95 / (20 * alpha + 1)), rel=0.35)
    assert sizes(1e6)[0].tolist() == pytest.approx([500] * 20, abs=5)


def test_classes_do_not_depend_on_the_client():
    count, classes = sizes(1.0, clients=5)
    large = count > 1_000
    assert large.sum() >= 2
    assert classes[large] / count[large, None] == pytest.approx(np.full((large.sum(), 10), 0.1), abs=0.03)


def test_nobody_is_empty_at_the_smallest_alpha():
    count, _ = sizes(1e-6, clients=50, images=60)
    assert count.min() == 1
    assert count.max() == 11
