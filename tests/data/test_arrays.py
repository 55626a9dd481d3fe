"""Data sets of arrays: what x and y stand for, .npz files, and the classes of sites."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from ssfl_app.data.arrays import MOST_CLASSES, from_arrays
from ssfl_app.data.cache import Wanted
from ssfl_app.data.dataset import DataOptions, load, load_central, load_own
from ssfl_app.data.readers import read_files
from ssfl_app.data.summary import ALL
from ssfl_app.options import ConfigError, PrivateError
from ssfl_app.registry import name_of

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3, 2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, **arrays: Any) -> Path:
    """Write train.npz and test.npz of the same arrays."""
    folder.mkdir()
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", **arrays)
    return folder


def site(folder: Path, classes: str = "", name: str = "arrays", **keys: Any) -> DataOptions:
    return DataOptions(name, str(folder), where="sites", classes=classes, **keys)


def test_files_of_two_parts_are_read_once_and_then_lie_on_disk(tmp_path: Path, cache: Path) -> None:
    folder = write(tmp_path / "a", x=X, y=np.array([0, 2, 1, 0, 2, 1]), client=np.array(list("bbaacc")))
    first, second = (load(DataOptions("arrays", str(folder))) for _ in range(2))
    assert len(list(cache.iterdir())) == 1
    raw = read_files("arrays", str(folder), 0, Wanted("label"))
    assert isinstance(raw.train, np.memmap)
    assert isinstance(raw.train_owners, np.memmap)
    for found in (first, second):
        assert (found.task, found.class_names, found.shape) == ("classification", ("0", "1", "2"), (3, 2))
        assert torch.equal(found.train.inputs, torch.from_numpy(X.astype(np.float32)))
        assert found.owners is not None
        assert [part.tolist() for part in found.owners] == [[1, 1, 0, 0, 2, 2]] * 2


def test_one_file_has_the_part_in_the_names_of_its_arrays(tmp_path: Path) -> None:
    file = tmp_path / "all.npz"
    np.savez(file, x_train=X, y_train=X[:, 0], x_test=X[:2], y_test=X[:2, 0])
    found = load(DataOptions("arrays", str(file)))
    assert (found.task, found.outputs, len(found.train), len(found.test)) == ("regression", 2, 6, 2)
    assert found.owners is None


@pytest.mark.parametrize(
    ("x", "y", "task", "outputs"),
    [
        (X, list("abcabc"), "classification", 3),
        (X, RNG.random(6), "regression", 1),
        (np.arange(12).reshape(6, 2), np.arange(12).reshape(6, 2), "next-token", 12),
        (X[:, None], np.tile([[0, 1], [3, 0], [1, 1]], (6, 1, 1)), "segmentation", 4),
    ],
)
def test_what_y_is_says_what_the_data_are_for(x: Any, y: Any, task: str, outputs: int) -> None:
    found = from_arrays(((x, y), (x, y)), "mine")
    assert (found.task, found.outputs or len(found.class_names)) == (task, outputs)


def test_a_site_orders_its_classes_by_data_classes(tmp_path: Path) -> None:
    words = write(tmp_path / "words", x=X, y=np.array(list("babbab")))
    found = load_own(site(words, "c,b,a"), str(words))
    assert (found.class_names, found.train.labels.tolist()) == (("c", "b", "a"), [1, 2, 1, 1, 2, 1])
    with pytest.raises(PrivateError, match=r"1 of its classes are none of data.classes: b") as caught:
        load_own(site(words, "a,c"), str(words))
    assert caught.value.public.endswith("1 of its classes are none of data.classes")
    numbers = write(tmp_path / "numbers", x=X, y=np.array([0, 1, 1, 0, 1, 1]))
    assert load_own(site(numbers, "c,b,a"), str(numbers)).class_names == ("c", "b", "a")
    with pytest.raises(ConfigError, match=r"its y has 1; data.classes names 1 classes"):
        load_own(site(numbers, "c"), str(numbers))


def test_masks_of_sites_need_the_names_of_their_classes(tmp_path: Path) -> None:
    masks = write(tmp_path / "masks", x=X[:, None], y=np.zeros((6, 3, 2), int))
    assert load_own(site(masks, "none,tumour"), str(masks)).outputs == 2
    with pytest.raises(
        ConfigError, match=r"data.classes is ''; with data.where 'sites' it names the classes of masks"
    ):
        load_own(site(masks), str(masks))


def test_the_server_of_sites_has_test_samples_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "server", x=X, y=np.array([0, 1, 1, 0, 1, 1]))
    (folder / "train.npz").unlink()
    found = load_central(site(folder, "a,b"))
    assert (len(found.test), found.shape, found.classes) == (6, (3, 2), 2)
    with pytest.raises(ConfigError, match=r"it has none of train.npz; it has one of them"):
        load_own(site(folder, "a,b"), str(folder))
    with pytest.raises(
        ConfigError, match=r"data.path is ''; with data.where 'sites' and data.name 'arrays' the server"
    ):
        load_central(DataOptions("arrays", where="sites", classes="a,b"))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X}, "cannot be read: it is an .npz with the arrays x and y"),
        ({"x": X, "y": np.array([{}] * 6)}, "cannot be read: it is an .npz"),  # pickles are not opened
        ({"x": X, "y": np.arange(5)}, r"\[6, 5\] samples"),
        ({"x": X, "y": np.array([0, 1, 2, 3, 4, -1])}, "its y has -1"),
        ({"x": X, "y": np.array([0, 1, 2, 3, 4, MOST_CLASSES])}, "what is no class is a float"),
        ({"x": X, "y": np.array([*list("abcde"), ""])}, "one of its classes has another name"),
        ({"x": np.where(X > 1, np.nan, X), "y": np.arange(6)}, "its training x has NaN or Inf"),
    ],
)
def test_a_file_that_is_none_is_refused_without_its_name(tmp_path: Path, arrays: Any, said: str) -> None:
    folder = write(tmp_path / "bad", **arrays)
    with pytest.raises(ConfigError, match=said) as caught:
        load(DataOptions("arrays", str(folder)))
    assert str(tmp_path) not in getattr(caught.value, "public", str(caught.value))


def test_text_in_place_of_an_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"a.npz cannot be read"):
        load(DataOptions("arrays", str(tmp_path / "a.npz")))
    with pytest.raises(ConfigError, match=r"data.image-size is 8; arrays is used as it is"):
        load(DataOptions("arrays", str(tmp_path / "a.npz"), image_size=8))


ROWS = np.linspace(-1, 1, 12).reshape(4, 3)
TOKENS = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]])


@pytest.mark.parametrize(
    ("x", "y", "task", "outputs", "names", "targets"),
    [
        (ROWS, [0, 2, 1, 0], "classification", 0, ("0", "1", "2"), [0, 2, 1, 0]),
        (ROWS, ["b", "a", "c", "a"], "classification", 0, ("a", "b", "c"), [1, 0, 2, 0]),
        (ROWS, [True, False, True, True], "classification", 0, ("False", "True"), [1, 0, 1, 1]),
        (ROWS, [0.5, 1, 2, 3], "regression", 1, ALL, [[0.5], [1], [2], [3]]),
        (ROWS, ROWS[:, :2], "regression", 2, ALL, ROWS[:, :2].astype(np.float32).tolist()),
        (TOKENS, (TOKENS + 1) % 5, "next-token", 5, ALL, ((TOKENS + 1) % 5).tolist()),
        (ROWS[:, None], TOKENS, "segmentation", 5, ALL, TOKENS.tolist()),
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
    made = from_arrays(((ROWS, [0, 1, 0, 1], ["z", "a", "m", "a"]), (ROWS[:2], [0, 1], ["m", "z"])), "mine:data")
    assert made.train_owners is not None
    assert made.test_owners is not None
    assert (made.train_owners.tolist(), made.test_owners.tolist()) == ([2, 0, 1, 0], [1, 2])


def test_a_torch_dataset_is_a_part() -> None:
    part = TensorDataset(torch.tensor(ROWS), torch.tensor([0, 1, 0, 1]))
    made = from_arrays((part, part), "mine:data")
    assert (made.train.shape, made.train_labels.tolist()) == ((4, 3), [0, 1, 0, 1])


GOOD = (ROWS, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "it gave NoneType; it gives (training, test), each (x, y) or (x, y, client)"),
        ((GOOD,), "it gave tuple; it gives (training, test)"),
        ((GOOD, ROWS), "its test part is ndarray; it is (x, y) or (x, y, client)"),
        (((ROWS, [0, 1]), GOOD), "its training part has [4, 2] samples; as many of each, at least one"),
        (((ROWS[:0], []), GOOD), "its training part has [0, 0] samples"),
        (
            ((ROWS[:, 0], [0, 1, 0, 1]), GOOD),
            "its training x is float64 of shape (4,); it is numbers of shape (samples, ...)",
        ),
        ((GOOD, (ROWS * np.nan, [0, 1, 0, 1])), "its test x has NaN or Inf; all numbers are finite"),
        ((GOOD, (ROWS, [0, 1, -1, 1])), "its y has -1; classes and tokens are whole numbers from 0"),
        (
            (GOOD, (ROWS[:, :2], [0, 1, 0, 1])),
            "training samples have x float64 (3,) and y int64 (), test samples x float64 (2,)",
        ),
        (((*GOOD, [1, 2, 3, 4]), GOOD), "one part says which client a sample belongs to; both do, or none"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(found: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data.name is 'mine:data'; {said}")):
        from_arrays(found, "mine:data")


@pytest.mark.parametrize("error", [KeyError("column"), RuntimeError("at /srv/x")], ids=["key", "runtime"])
def test_a_reader_that_raises_is_told_in_a_line_and_a_node_says_no_more_than_its_kind(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str) -> None:
        raise error

    options = DataOptions(name_of(read))
    with pytest.raises(PrivateError, match=f"it says {type(error).__name__}: ") as caught:
        load(options)
    assert caught.value.public.endswith(f"it says {type(error).__name__}")


def test_rows_of_several_lengths_are_refused_in_a_line() -> None:
    odd = ([[1.0, 2.0], [3.0]], [0, 1])

    def read(path: str) -> object:
        return odd, odd

    with pytest.raises(PrivateError, match="it says ValueError"):
        load(DataOptions(name_of(read)))
