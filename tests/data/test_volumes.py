"""Volumes: axes, values, masks and classes of NIfTI files, and sites that hold some."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ssfl_app.data.dataset import DataOptions, load, load_central, load_own
from ssfl_app.options import ConfigError, PrivateError
from tests.data.test_arrays import site
from tests.in_process_grid import play

nib = pytest.importorskip("nibabel")
SHAPE = (4, 3, 2)  # right, front, top


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))


def put(file: Path, values: Any, affine: Any = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values), np.eye(4) if affine is None else affine), file)


def some(seed: int, shape: tuple[int, ...] = SHAPE) -> Any:
    return np.random.default_rng(seed).normal(100, 7, shape).astype(np.float32)


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    for place, part in enumerate(("train", "test")):
        for index in range(3):
            name = f"p{index}.nii.gz"
            put(tmp_path / "m" / part / "images" / name, some(10 * place + index))
            mask = (some(10 * place + index) > 105).astype(np.uint8) * 2
            put(tmp_path / "m" / part / "masks" / name, mask)
    return tmp_path / "m"


def test_volumes_with_masks(masked: Path) -> None:
    found = load(DataOptions("volumes", str(masked)))
    assert (found.task, found.shape, found.outputs) == ("segmentation", (1, 2, 3, 4), 3)
    raw = np.stack([some(index).T for index in range(3)])
    wanted = (raw - raw.mean(dtype=np.float64)) / raw.std(dtype=np.float64)
    assert found.train.inputs[:, 0].numpy() == pytest.approx(wanted, abs=1e-5)
    assert np.array_equal(found.train.targets.numpy(), (raw > 105) * 2)
    # The test volumes are brought to the scale of the training volumes.
    tests = np.stack([some(10 + index).T for index in range(3)])
    wanted = (tests - raw.mean(dtype=np.float64)) / raw.std(dtype=np.float64)
    assert found.test.inputs[:, 0].numpy() == pytest.approx(wanted, abs=1e-5)


def test_axes_are_turned_as_the_file_says(tmp_path: Path) -> None:
    for part in ("train", "test"):
        put(tmp_path / part / "a" / "1.nii", some(0))
        put(tmp_path / part / "b" / "2.nii", some(0)[::-1], np.diag([-1.0, 1, 1, 1]))  # its first axis goes left
        put(tmp_path / part / "b" / "3.nii", some(0).transpose(2, 0, 1), np.eye(4)[[1, 2, 0, 3]])
    found = load(DataOptions("volumes", str(tmp_path)))
    assert (found.class_names, found.train.labels.tolist()) == (("a", "b"), [0, 1, 1])
    assert (found.train.inputs == found.train.inputs[:1]).all()


def test_a_fourth_axis_is_channels(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            put(tmp_path / part / name / "1.nii", some(0, (*SHAPE, 2)))
    assert load(DataOptions("volumes", str(tmp_path))).shape == (2, 2, 3, 4)


def test_sites_name_the_classes_of_masks(masked: Path) -> None:
    found = load_own(site(masked, "none,left,right,both", "volumes"), str(masked))
    assert found.outputs == 4
    with pytest.raises(ConfigError, match=r"its y has 2; data.classes names 2 classes"):
        load_own(site(masked, "none,left", "volumes"), str(masked))
    (masked / "train").rename(masked / "elsewhere")
    assert len(load_central(site(masked, "none,left,right", "volumes")).test) == 3
    with pytest.raises(ConfigError, match="train is missing; it has"):
        load_own(site(masked, "none,left,right", "volumes"), str(masked))


def test_a_site_may_lack_a_class(tmp_path: Path) -> None:
    for part in ("train", "test"):
        put(tmp_path / part / "ill" / "1.nii", some(0))
    found = load_own(site(tmp_path, "well,ill", "volumes"), str(tmp_path))
    assert (found.class_names, found.train.labels.tolist()) == (("well", "ill"), [1])


@pytest.mark.parametrize(
    ("change", "said", "public"),
    [
        (
            lambda f: put(f, some(0, (4, 3, 3))),
            "p1.nii.gz has 1x3x3x4 values, others have 1x2x3x4",
            "volume 1 of train",
        ),
        (lambda f: f.write_bytes(b"no volume"), "p1.nii.gz cannot be read as NIfTI", "volume 1 of train cannot be"),
        (lambda f: put(f, some(0)[0]), "p1.nii.gz has other than 3 axes", "volume 1 of train has"),
        (lambda f: put(f, some(0) * np.nan), "or values that are not finite", "volume 1 of train has"),
        (lambda f: (f.parents[1] / "masks" / f.name).unlink(), "p1.nii.gz cannot be read", "mask 1 of train cannot"),
        (lambda f: put(f.parents[1] / "masks" / f.name, some(0)), "a mask of train has other values", "a mask of"),
        (
            lambda f: [f.unlink() for f in f.parent.iterdir()],
            r"train has no volume \(.nii, .nii.gz\)",
            "train has no",
        ),
    ],
)
def test_what_is_no_volume_is_refused_without_its_name(masked: Path, change: Any, said: str, public: str) -> None:
    change(masked / "train" / "images" / "p1.nii.gz")
    with pytest.raises(PrivateError, match=said) as caught:
        load(DataOptions("volumes", str(masked)))
    assert public in caught.value.public
    assert "p1" not in caught.value.public


def test_masks_of_one_part_only(masked: Path) -> None:
    (masked / "test" / "masks").rename(masked / "masks")
    with pytest.raises(ConfigError, match="one of train and test has masks; both have, or none"):
        load(DataOptions("volumes", str(masked)))


def test_without_nibabel_its_extra_is_named(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(ConfigError, match=r"it needs nibabel: pip install 'ssfl-app\[volumes\]'"):
        load(DataOptions("volumes", str(masked)))


def voxels(input_shape: tuple[int, ...], outputs: int, norm: str) -> nn.Module:
    layers = nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, outputs, 1)
    return nn.Sequential(*layers)


def test_sites_segment_their_own_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssfl_app.comm.membership.DEPLOYMENT_POLL", 0.01)
    monkeypatch.setattr("ssfl_app.comm.exchange.DEPLOYMENT_POLL", 0.01)
    for place, name in enumerate(("athens", "berlin", "server")):
        for index in range(12):
            values = some(100 * place + index, (6, 5, 4)) * (1 + place)
            part = tmp_path / name / ("test" if index < 4 else "train")
            put(part / "images" / f"{index}.nii.gz", values)
            put(part / "masks" / f"{index}.nii.gz", (values > 103 * (1 + place)).astype(np.uint8))
    nodes = [{"name": n, "data-path": str(tmp_path / n), "least-batch": 4} for n in ("athens", "berlin")]
    keys = {"data.where": "sites", "data.name": "volumes", "data.classes": "other,bright"}
    keys |= {"data.path": str(tmp_path / "server"), "model.name": "tests.data.test_volumes:voxels"}
    keys |= {"run.clients": 2, "run.cohort": 2, "run.rounds": 4, "local.epochs": 10, "mask.density": 0.5}
    last = play(keys | {"local.batch-size": 4, "local.lr": 0.3}, node_configs=nodes).records[-1]
    assert last["local_accuracy_mean"] > 0.8
    assert last["central_accuracy"] > 0.8
