"""Data sets of the library ``datasets``, from saved folders."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssfl_app.data.dataset import DataOptions, load
from ssfl_app.options import ConfigError
from tests.data.test_dataset import some_pixels

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def save(folder: Path, columns: Any, features: Any = None, parts: tuple[str, ...] = ("train", "test")) -> str:
    made = datasets.Dataset.from_dict(columns, datasets.Features(features) if features else None)
    (datasets.DatasetDict(dict.fromkeys(parts, made)) if parts else made).save_to_disk(str(folder))
    return str(folder)


def test_images_with_the_names_of_their_labels(tmp_path: Path, cache: Path) -> None:
    pixels = some_pixels(4)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant", "bee"])}
    folder = save(tmp_path / "d", {"image": list(pixels), "label": [1, 0, 0, 1]}, features)
    for _ in range(2):
        found = load(DataOptions("hf", folder, target="label"))
        assert np.array_equal(found.train.inputs.numpy(), pixels.transpose(0, 3, 1, 2))
        assert (found.class_names, found.train.labels.tolist()) == (("zebra", "ant", "bee"), [1, 0, 0, 1])
    assert load(DataOptions("hf", folder, image_size=3, target="label")).shape == (3, 3, 3)
    assert len(list(cache.iterdir())) == 2
    shutil.rmtree(folder)
    save(tmp_path / "d", {"image": list(pixels[::-1]), "label": [1, 0, 0, 1]}, features)
    found = load(DataOptions("hf", folder, target="label"))
    assert np.array_equal(found.train.inputs.numpy(), pixels[::-1].transpose(0, 3, 1, 2))
    assert len(list(cache.iterdir())) == 1  # what was made of the files before is gone


def test_numbers_of_clients_and_one_part_that_is_split(tmp_path: Path) -> None:
    columns = {"a": np.arange(20.0), "y": np.arange(20.0) / 7, "user": ["u", "v"] * 10}
    found = load(DataOptions("hf", save(tmp_path / "d", columns, parts=()), target="y", client="user"))
    assert (found.task, len(found.train), len(found.test)) == ("regression", 16, 4)
    assert found.owners is not None
    assert np.bincount(found.owners[1]).tolist() == [2, 2]


def test_arrays_of_bytes_are_images_and_lists_of_numbers_are_tokens(tmp_path: Path) -> None:
    pixels = some_pixels(3).transpose(0, 3, 1, 2)
    features = {"x": datasets.Array3D((3, 6, 6), "uint8"), "y": datasets.Value("bool")}
    folder = save(tmp_path / "d", {"x": list(pixels), "y": [True, False, True]}, features)
    found = load(DataOptions("hf", folder, target="y"))
    assert (found.train.inputs.numpy() == pixels).all()
    assert (len(found.transform.mean), found.class_names) == (3, ("False", "True"))
    tokens = [[1, 5, 2], [3, 3, 0]]
    found = load(DataOptions("hf", save(tmp_path / "t", {"ids": tokens, "next": tokens}), target="next"))
    assert (found.task, found.outputs, found.train.inputs.tolist()) == ("next-token", 6, tokens)


def test_text_and_a_validation_part(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", {"text": ["abc" * 10, "cab" * 10]}, parts=("train", "validation"))
    found = load(DataOptions("hf", folder, length=6))
    assert (found.task, found.shape, len(found.test)) == ("next-token", (6,), 10)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", {"a": [1.0]}, parts=("train", "other"))
    with pytest.raises(ConfigError, match="it has the parts train, other; it has train, and test or validation"):
        load(DataOptions("hf", folder, target="a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it cannot be read as a saved folder, or a name on the hub"):
        load(DataOptions("hf", str(tmp_path / "empty"), target="a"))
    with pytest.raises(ConfigError, match=r"there is no such folder, .* with data.download true, a name on the hub"):
        load(DataOptions("hf", "ylecun/mnist", target="label"))


def test_a_name_on_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = datasets.load_from_disk(save(tmp_path / "d", {"x": [1.0, 2.0], "label": [0, 1]}))
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or here)
    found = load(DataOptions("hf", "somebody/pairs", download=True, target="label"))
    assert (asked, found.train.labels.tolist()) == (["somebody/pairs"], [0, 1])
