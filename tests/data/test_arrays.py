"""Arrays of anybody make a data set; their types tell what they are for, and a line tells what is wrong."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from ssfl_app.data.arrays import from_arrays
from ssfl_app.data.summary import ALL
from ssfl_app.options import ConfigError

X = np.linspace(-1, 1, 12).reshape(4, 3)
TOKENS = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]])


@pytest.mark.parametrize(
    ("x", "y", "task", "outputs", "names", "targets"),
    [
        (X, [0, 2, 1, 0], "classification", 0, ("0", "1", "2"), [0, 2, 1, 0]),
        (X, ["b", "a", "c", "a"], "classification", 0, ("a", "b", "c"), [1, 0, 2, 0]),
        (X, [True, False, True, True], "classification", 0, ("False", "True"), [1, 0, 1, 1]),
        (X, [0.5, 1, 2, 3], "regression", 1, ALL, [[0.5], [1], [2], [3]]),
        (X, X[:, :2], "regression", 2, ALL, X[:, :2].astype(np.float32).tolist()),
        (TOKENS, (TOKENS + 1) % 5, "next-token", 5, ALL, ((TOKENS + 1) % 5).tolist()),
        (X[:, None], TOKENS, "segmentation", 5, ALL, TOKENS.tolist()),
    ],
)
def test_what_targets_are_says_what_they_are_for(x, y, task, outputs, names, targets) -> None:
    made = from_arrays(((x, y), (torch.as_tensor(x), y)), "mine:data")
    assert (made.task, made.outputs, made.class_names) == (task, outputs, names)
    assert made.train_labels.tolist() == targets == made.test_labels.tolist()
    assert made.train.dtype == (np.int64 if x is TOKENS else np.float32)
    assert not made.mean


def test_bytes_of_four_axes_are_images() -> None:
    pixels = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    made = from_arrays({"train": (pixels, [0, 1, 0, 1]), "test": (pixels[:1], [1])}, "mine:data")
    assert made.train.dtype == np.uint8
    assert len(made.mean) == len(made.std) == 3


def test_clients_of_their_own_are_numbered_over_both_parts() -> None:
    made = from_arrays(((X, [0, 1, 0, 1], ["z", "a", "m", "a"]), (X[:2], [0, 1], ["m", "z"])), "mine:data")
    assert made.train_owners is not None
    assert made.test_owners is not None
    assert (made.train_owners.tolist(), made.test_owners.tolist()) == ([2, 0, 1, 0], [1, 2])


def test_a_torch_dataset_is_a_part() -> None:
    part = TensorDataset(torch.tensor(X), torch.tensor([0, 1, 0, 1]))
    made = from_arrays((part, part), "mine:data")
    assert (made.train.shape, made.train_labels.tolist()) == ((4, 3), [0, 1, 0, 1])


GOOD = (X, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "it gave NoneType; it gives (training, test), each (x, y) or (x, y, client)"),
        ((GOOD,), "it gave tuple; it gives (training, test)"),
        ((GOOD, X), "its test part is ndarray; it is (x, y) or (x, y, client)"),
        (((X, [0, 1]), GOOD), "its training part has [4, 2] samples; as many of each, at least one"),
        (((X[:0], []), GOOD), "its training part has [0, 0] samples"),
        (
            ((X[:, 0], [0, 1, 0, 1]), GOOD),
            "its training x is float64 of shape (4,); it is numbers of shape (samples, ...)",
        ),
        ((GOOD, (X * np.nan, [0, 1, 0, 1])), "its test x has NaN or Inf; all numbers are finite"),
        ((GOOD, (X, [0, 1, -1, 1])), "its y has -1; classes and tokens are whole numbers from 0"),
        (
            (GOOD, (X[:, :2], [0, 1, 0, 1])),
            "training samples have x float64 (3,) and y int64 (), test samples x float64 (2,)",
        ),
        (((*GOOD, [1, 2, 3, 4]), GOOD), "one part says which client a sample belongs to; both do, or none"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(found: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data.name is 'mine:data'; {said}")):
        from_arrays(found, "mine:data")
