"""Local test sets: each client's test images follow the classes it trains on."""

from collections.abc import Sequence

import numpy as np

from ssfl_app.partitions.options import Indices


def count(shares: Sequence[Indices], labels: Indices, classes: int) -> Indices:
    """Return the images of each class in each share, (K, C) int64, from `labels` (N,) of all images."""
    return np.stack([np.bincount(labels[share], minlength=classes) for share in shares]).astype(np.int64)


def matched(
    train: Sequence[Indices], train_labels: Indices, test_labels: Indices, rng: np.random.Generator
) -> list[Indices]:
    """Deal the test images of each class in proportion to the clients' training images of it.

    A client with a share p of the training images of a class that has m test images gets floor(p m) or
    ceil(p m) of them, by the method of largest remainders with ties at random. Nobody gets images of a class
    it does not train on (in the SSFL code, whose remainders go to the first clients, 9 % of the CIFAR-100
    test images did), and no image goes to two clients (in DisPFL they do).

    `train` has each client's training images, of labels (N,). The result has indices into `test_labels` (M,) for
    each: disjoint, and all images of every class that some client holds.
    """
    classes = int(max(train_labels.max(initial=-1), test_labels.max(initial=-1))) + 1
    held = count(train, train_labels, classes)
    shares: list[list[Indices]] = [[np.empty(0, dtype=np.int64)] for _ in train]
    for label in range(classes):
        images = rng.permutation(np.flatnonzero(test_labels == label))
        if not len(images) or not held[:, label].any():
            continue
        cuts = np.cumsum(_largest_remainders(held[:, label], len(images), rng))[:-1]
        for share, part in zip(shares, np.split(images, cuts), strict=True):
            share.append(part)
    return [np.concatenate(share) for share in shares]


def _largest_remainders(weights: Indices, total: int, rng: np.random.Generator) -> Indices:
    """Return `total` dealt in proportion to integer `weights` (K,), in exact integer arithmetic."""
    dealt, remainders = np.divmod(weights * total, weights.sum())
    most = np.lexsort((rng.random(len(weights)), -remainders))
    dealt[most[: total - dealt.sum()]] += 1
    return np.asarray(dealt, dtype=np.int64)
