"""Data sets: what a reader returns, what it says about bad data, the cache, and the transform."""

import ast
import io
import json
import os
import socket
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssfl_app
from ssfl_app.cli.main import main
from ssfl_app.data import cache as image_cache
from ssfl_app.data import readers as sources
from ssfl_app.data.dataset import DataOptions, Samples, Transform, load
from ssfl_app.data.images import measure
from ssfl_app.data.transform import padding
from ssfl_app.options import ConfigError, PrivateError, build

CIFAR10 = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SSFL_CACHE", str(folder))
    return folder


def options(name, path="", size=0, download=False, augment="auto", label_column="label"):
    return DataOptions(name, str(path), download, size, augment, "shared", "", 0, label_column)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def some_pixels(count, side=6, channels=3, seed=0):
    shape = (count, side, side) + ((channels,) if channels == 3 else ())
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def chw(pixels):
    return pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]


def write_parquet(file, images, columns):
    """Write images (arrays or raw bytes) as the hub does, and other columns as they are."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    name, images = images
    content = [image if isinstance(image, bytes) else png(image) for image in images]
    rows = [{"bytes": each, "path": None} for each in content]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({name: pa.array(rows, type=kind), **columns}), file)


def write_folder(root, parts):
    """Write {"train/cat": images} as numbered PNG files."""
    for name, images in parts.items():
        (root / name).mkdir(parents=True)
        for index, image in enumerate(images):
            (root / name / f"{index}.png").write_bytes(png(image))


@pytest.fixture
def shards(tmp_path):
    """Return a folder with two training shards and one test shard, and its images."""
    root = tmp_path / "parquet"
    root.mkdir()
    images = some_pixels(9)
    write_parquet(root / "train-0.parquet", ("img", images[:4]), {"label": [0, 1, 2, 0]})
    write_parquet(root / "train-1.parquet", ("img", images[4:6]), {"label": [1, 2]})
    write_parquet(root / "test-0.parquet", ("img", images[6:]), {"label": [2, 1, 0]})
    return root, images


# ---- readers ----------------------------------------------------------------------------------


def test_digits():
    digits = load(options("digits"))
    assert (digits.name, digits.classes, digits.shape) == ("digits", 10, (1, 8, 8))
    assert digits.class_names == tuple("0123456789")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.inputs.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert (int(digits.train.inputs.min()), int(digits.train.inputs.max())) == (0, 255)
    shares = [part.labels.bincount() / len(part) for part in (digits.train, digits.test)]
    assert torch.allclose(*shares, atol=0.003)
    assert digits.transform.augment == "none"
    again = load(options("digits", augment="crop-flip"))
    assert torch.equal(again.train.inputs, digits.train.inputs)
    assert torch.equal(again.test.labels, digits.test.labels)
    assert again.transform.augment == "crop-flip"


def test_auto_mirrors_the_three_sets_whose_published_scripts_do_and_nobody_elses_images(monkeypatch):
    raw = sources.digits("", False, 0)
    for name in sources.READERS:
        monkeypatch.setitem(sources.READERS, name, lambda *_: raw)
    monkeypatch.setattr("ssfl_app.data.dataset.read_files", lambda *_: raw)
    mirrored = [name for name in sources.READERS if load(options(name)).transform.augment == "crop-flip"]
    assert mirrored == ["cifar10", "cifar100", "tiny-imagenet"]
    assert all(load(options(name, augment="crop-flip")).transform.augment == "crop-flip" for name in sources.READERS)


def test_digits_from_the_cache_are_those_that_were_read(cache):
    first, second, read = (*(sources.digits("", False, 0) for _ in range(2)), sources._digits())
    assert len(list(cache.iterdir())) == 1
    for part in ("train", "test", "train_labels", "test_labels"):
        arrays = [getattr(raw, part) for raw in (first, second, read)]
        assert all(np.array_equal(array, arrays[0]) for array in arrays)
    assert (first.mean, first.std, first.class_names) == (read.mean, read.std, read.class_names)


def test_grey_images_lie_in_memory_as_all_others_do(monkeypatch):
    # Torch chooses its kernels by the strides, and another kernel gives other bits.
    read = sources._digits()
    assert read.train.strides == (64, 1, 8, 1)  # as NumPy selects
    monkeypatch.setitem(sources.READERS, "digits", lambda *_: read)
    digits = load(options("digits"))
    for part in (digits.train, digits.test, digits.train.take(np.arange(5))):
        assert part.inputs.stride() == (64, 64, 8, 1)


def test_measured_moments_are_those_of_the_training_pixels():
    digits = load(options("digits"))
    values = digits.train.inputs.numpy().astype(np.float64) / 255
    assert digits.transform.mean == pytest.approx((values.mean(),), rel=1e-12)
    assert digits.transform.std == pytest.approx((values.std(),), rel=1e-12)
    assert measure(np.full((2, 1, 3, 3), 51, dtype=np.uint8)) == ((0.2,), (1.0,))


def test_parquet_round_trip(shards):
    root, images = shards
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only arrays
        found = load(options("parquet", root))
    assert np.array_equal(found.train.inputs.numpy(), chw(images[:6]))
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(found.test.inputs.numpy(), chw(images[6:]))
    assert found.test.labels.tolist() == [2, 1, 0]
    assert (found.shape, found.class_names) == ((3, 6, 6), ("0", "1", "2"))
    assert found.transform.augment == "none"
    assert found.transform.mean == pytest.approx(images[:6].mean(axis=(0, 1, 2)) / 255, rel=1e-12)
    assert found.transform.std == pytest.approx(images[:6].std(axis=(0, 1, 2)) / 255, rel=1e-12)


@pytest.mark.parametrize(
    ("image", "columns", "label", "want"),
    [
        ("image", {"label": [0, 2], "fine_label": [1, 3]}, "label", [0, 2]),
        ("photo", {"coarse_label": [0, 0], "fine_label": [1, 3]}, "fine_label", [1, 3]),
    ],
)
def test_the_label_column_is_the_one_that_is_named(tmp_path, image, columns, label, want):
    for part in ("train", "validation"):
        write_parquet(tmp_path / f"{part}.parquet", (image, some_pixels(2)), columns)
    found = load(options("parquet", tmp_path, label_column=label))
    assert found.train.labels.tolist() == want
    assert found.classes == max(want) + 1
    refused(options("parquet", tmp_path, label_column="kind"), "the label column 'kind': data.label-column names")


def test_folder_round_trip_resize_and_val(tmp_path):
    cats, dogs, fish = some_pixels(3, seed=1), some_pixels(2, seed=2), some_pixels(2, seed=3)
    parts = {"train/cat": cats, "train/dog": dogs, "val/cat": fish[:1], "val/dog": fish[1:]}
    write_folder(tmp_path, parts)
    found = load(options("folder", tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(found.train.inputs.numpy(), chw(np.concatenate([cats, dogs])))
    assert found.test.labels.tolist() == [0, 1]
    assert np.array_equal(found.test.inputs.numpy(), chw(fish))
    small = load(options("folder", tmp_path, size=4))
    want = Image.fromarray(dogs[1]).resize((4, 4), Image.Resampling.BILINEAR)
    assert small.shape == (3, 4, 4)
    assert np.array_equal(small.train.inputs[4].permute(1, 2, 0).numpy(), np.asarray(want))


def write_tiny(root):
    images = some_pixels(4, seed=5)
    for index, wnid in enumerate(("n01", "n02")):
        folder = root / "tiny-imagenet-200" / "train" / wnid
        write_folder(folder, {"images": images[index : index + 1]})
        (folder / f"{wnid}_boxes.txt").write_text("0.png\t0\t0\t5\t5\n")
    write_folder(root / "tiny-imagenet-200" / "val", {"images": images[2:]})
    lines = "1.png\tn02\t0\t0\t5\t5\n0.png\tn01\t0\t0\t5\t5\n"
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(lines)
    return images


def test_tiny_imagenet_layout(tmp_path):
    images = write_tiny(tmp_path)
    found = load(options("tiny-imagenet", tmp_path))
    assert found.class_names == ("n01", "n02")
    assert found.train.labels.tolist() == [0, 1]
    assert found.test.labels.tolist() == [1, 0]
    assert np.array_equal(found.test.inputs.numpy(), chw(images[[3, 2]]))
    assert found.transform == Transform((0.5,) * 3, (0.5,) * 3, "crop-flip")


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_comes_from_torchvision(tmp_path, monkeypatch, name, classes):
    from torchvision import datasets

    class Fake:
        def __init__(self, root, train, download):
            assert (Path(root), download) == (tmp_path, False)
            self.data = some_pixels(3 if train else 2, side=32)
            self.targets = [0, 1, classes - 1][: len(self.data)]
            self.classes = [f"c{index}" for index in range(classes)]

    monkeypatch.setattr(datasets, name.upper(), Fake)
    found = load(options(name, tmp_path))
    assert (found.classes, found.shape) == (classes, (3, 32, 32))
    assert (len(found.train), len(found.test)) == (3, 2)
    assert found.train.labels.tolist() == [0, 1, classes - 1]
    assert np.array_equal(found.train.inputs.numpy(), chw(some_pixels(3, side=32)))
    assert found.transform.mean[0] == {"cifar10": 0.4914, "cifar100": 0.5071}[name]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs shared/data/cifar10")
def test_real_cifar10_in_parquet():
    found = load(options("parquet", CIFAR10))
    assert (len(found.train), len(found.test), found.shape) == (50_000, 10_000, (3, 32, 32))
    assert found.train.labels.bincount().tolist() == [5000] * 10
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert found.class_names[0] == "airplane"
    assert found.transform.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.001)
    assert found.transform.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.003)


# ---- cache ------------------------------------------------------------------------------------


def forbid_decoding(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded, though the cache has it")

    for module in (sources, sys.modules["ssfl_app.data.parquet"]):
        monkeypatch.setattr(module, "decode", decode)


def test_second_load_reads_the_cache(shards, monkeypatch, cache):
    root, _ = shards
    first = load(options("parquet", root))
    assert len(list(cache.iterdir())) == 1
    forbid_decoding(monkeypatch)
    second = load(options("parquet", root))
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.test.labels, second.test.labels)
    assert (first.transform, first.class_names) == (second.transform, second.class_names)
    with pytest.raises(AssertionError):
        load(options("parquet", root, size=4))


def test_changed_files_and_damaged_entries_are_decoded_again(shards, cache):
    root, images = shards
    load(options("parquet", root))
    write_parquet(root / "test-0.parquet", ("img", images[:3]), {"label": [2, 1, 0]})
    os.utime(root / "test-0.parquet", ns=(1, 1))
    changed = load(options("parquet", root))
    assert np.array_equal(changed.test.inputs.numpy(), chw(images[:3]))
    for file in cache.glob("*/*.npy"):
        content = file.read_bytes()
        file.unlink()  # not cut in place: `changed` maps it
        file.write_bytes(content[:-20])
    assert torch.equal(load(options("parquet", root)).test.inputs, changed.test.inputs)
    assert torch.equal(load(options("parquet", root)).train.labels, changed.train.labels)


def test_a_new_time_alone_makes_a_new_entry_and_a_second_writer_does_no_harm(shards, cache):
    root, images = shards
    load(options("parquet", root))
    (before,) = cache.iterdir()
    os.utime(root / "train-1.parquet", ns=(1, 1))
    load(options("parquet", root))
    (entry,) = cache.iterdir()
    assert entry != before
    image_cache._store(entry, image_cache._open_entry(entry))
    assert list(cache.iterdir()) == [entry]
    assert np.array_equal(load(options("parquet", root)).train.inputs.numpy(), chw(images[:6]))


def test_writing_to_loaded_images_changes_no_file(shards):
    root, images = shards
    load(options("parquet", root)).train.inputs.zero_()
    assert np.array_equal(load(options("parquet", root)).train.inputs.numpy(), chw(images[:6]))


def test_a_cache_that_cannot_be_written_is_done_without(shards, monkeypatch, tmp_path):
    root, images = shards
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "file" / "cache"))
    assert np.array_equal(load(options("parquet", root)).train.inputs.numpy(), chw(images[:6]))


def test_the_cache_folder_follows_the_environment(shards, monkeypatch, tmp_path):
    root, _ = shards
    monkeypatch.delenv("SSFL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(options("parquet", root))
    assert len(list((tmp_path / "xdg" / "ssfl").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(options("parquet", root))
    assert len(list((tmp_path / "home" / ".cache" / "ssfl").iterdir())) == 1


def test_pixels_of_files_that_are_gone_go_with_the_next_reading(tmp_path, cache):
    write_folder(tmp_path / "a", {"train/x": some_pixels(3), "test/x": some_pixels(1)})
    write_folder(tmp_path / "b", {"train/x": some_pixels(2), "test/x": some_pixels(1)})
    for name, size in (("a", 4), ("a", 5), ("b", 4)):
        load(options("folder", tmp_path / name, size=size))
    assert len(list(cache.iterdir())) == 3
    (tmp_path / "a" / "train" / "x" / "1.png").unlink()  # a patient withdrew
    load(options("folder", tmp_path / "a", size=4))
    assert sorted(len(np.load(entry / "train.npy")) for entry in cache.iterdir()) == [2, 2]


def test_the_cache_is_private_whatever_the_umask(shards, cache):
    before = os.umask(0)
    try:
        load(options("parquet", shards[0]))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (cache, *cache.iterdir())} == {0o700}


def test_an_entry_of_another_account_is_not_read(shards, cache, monkeypatch):
    root, images = shards
    load(options("parquet", root))
    (entry,) = cache.iterdir()
    np.save(entry / "train.npy", np.zeros((6, 3, 6, 6), np.uint8))
    assert not load(options("parquet", root)).train.inputs.any()
    there = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: there + 1)
    assert np.array_equal(load(options("parquet", root)).train.inputs.numpy(), chw(images[:6]))


def ssfl(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["ssfl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_cache_command_deletes_what_the_cache_wrote_and_nothing_else(shards, cache, monkeypatch, capsys):
    assert f"cache: {cache}, 0 data sets, 0 bytes" in ssfl(monkeypatch, capsys, "cache")
    load(options("parquet", shards[0]))
    (entry,) = cache.iterdir()
    (cache / ".draft-x").mkdir()  # of a process that was killed
    others = [cache / ("0" * 32), cache / "letters"]
    for other in others:
        other.mkdir()
        (other / "mine.txt").write_text("mine")
    (cache / ("1" * 32)).symlink_to(shards[0])
    size = sum(file.stat().st_size for file in entry.iterdir())
    assert f"2 data sets, {size} bytes" in ssfl(monkeypatch, capsys, "cache")
    assert entry.exists()
    assert f"deleted: {size} bytes" in ssfl(monkeypatch, capsys, "cache", "--clear")
    assert sorted(cache.iterdir()) == sorted([*others, cache / ("1" * 32)])
    assert len(list(shards[0].iterdir())) == 3


def test_the_cache_can_be_switched_off(shards, monkeypatch, capsys, tmp_path):
    root, images = shards
    monkeypatch.setenv("SSFL_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(load(options("parquet", root)).train.inputs.numpy(), chw(images[:6]))
    assert [path.name for path in tmp_path.iterdir()] == ["parquet"]
    assert "cache: none" in ssfl(monkeypatch, capsys, "cache")


# ---- what is said about bad data --------------------------------------------------------------


def refused(opts, *words):
    with pytest.raises(ConfigError) as caught:
        load(opts)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    if opts.path and isinstance(caught.value, PrivateError):  # what a server is told
        assert "\n" not in caught.value.public
        assert opts.path not in caught.value.public
        assert ".png" not in caught.value.public
    return message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet", "parquet", "folder"])
def test_a_path_that_is_empty_or_missing(name, tmp_path):
    refused(options(name), "data.path is ''; it is")
    refused(options(name, tmp_path / "none"), "data.path is", "none'; there is no such folder, it is")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_not_there_and_download_is_false(name, tmp_path):
    refused(options(name, tmp_path), "data.path is", "set data.download to true")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", "which data.name='parquet' reads"),
        ("cifar100", "which data.name='parquet' data.label-column='fine_label' reads"),
        ("tiny-imagenet", "which data.name='parquet' reads"),
    ],
)
def test_parquet_files_where_another_format_is_read_are_hinted_at(name, words, tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    refused(options(name, tmp_path), f"there are parquet files, {words}")


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet", "parquet", "folder"])
@pytest.mark.parametrize("download", [False, True])
def test_a_path_that_is_a_file(name, download, tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    refused(options(name, tmp_path / "set.zip", download=download), "set.zip'; this is a file; it is ", " folder ")


def test_failed_downloads(tmp_path, monkeypatch):
    from torchvision import datasets

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", fail)
    refused(options("cifar10", tmp_path, download=True), "data.path is", "no network", "download failed")
    refused(options("tiny-imagenet", tmp_path, download=True), "data.path is", "tiny-imagenet-200.zip failed")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_sources_of_one_size_refuse_another(name, tmp_path):
    refused(options(name, tmp_path, size=16), "data.image-size is 16", "with 0")


def test_bad_tiny_annotations(tmp_path):
    write_tiny(tmp_path)
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text("0.png\tn99\n")
    refused(options("tiny-imagenet", tmp_path), "val_annotations.txt", "data.path is")
    annotations.write_text("9.png\tn01\n")
    refused(options("tiny-imagenet", tmp_path), "9.png cannot be read")
    annotations.unlink()
    os.mkfifo(annotations)
    refused(options("tiny-imagenet", tmp_path), "val_annotations.txt of tiny-imagenet-200 is no regular file")
    annotations.unlink()
    refused(options("tiny-imagenet", tmp_path), "val_annotations.txt")


def test_bad_parquet_files(shards):
    root, images = shards

    def with_test(images, columns):
        write_parquet(root / "test-0.parquet", images, columns)
        return options("parquet", root)

    refused(
        with_test(("img", images[:1]), {"text": ["a"]}), "data.path is", "columns img, text", "label column 'label'"
    )
    refused(with_test(("img", images[:1]), {"patient": [7]}), "columns img, patient", "label column 'label'")
    words = "column label of test-0.parquet is string; it is an integer"
    refused(with_test(("img", images[:1]), {"label": ["a"], "patient": [7]}), words)
    refused(with_test(("img", images[:1]), {"label": [-1]}), "column label", "is -1, it is at least 0")
    unlabelled = "below 100000: the file has no labels; take it out, and a labelled validation file"
    refused(with_test(("img", images[:2]), {"label": [-1, -1]}), unlabelled)
    assert "no labels" not in refused(with_test(("img", images[:2]), {"label": [-1, 0]}), "is -1")
    bad = [images[0], b"no image"]
    refused(with_test(("img", bad), {"label": [0, 1]}), "row 1 of test-0.parquet cannot be decoded")
    refused(with_test(("img", [b""]), {"label": [0]}), "row 0 of test-0.parquet has no bytes")
    refused(with_test(("img", []), {"label": np.array([], dtype=np.int64)}), "holds no images")
    opts = with_test(("img", some_pixels(1, side=5)), {"label": [0]})
    refused(opts, "data.image-size is 0", "row 0 of test-0.parquet", "5x5", "6x6")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"img": ["a"], "label": [0]}), root / "test-0.parquet")
    refused(opts, "columns img, label", "one image column")
    pq.write_table(
        pa.table({"img": [{"bytes": png(images[0])}], "label": pa.array([None], pa.int64())}),
        root / "test-0.parquet",
    )
    refused(opts, "column label", "is missing")
    (root / "test-0.parquet").write_bytes(b"PAR1 and then nonsense")
    refused(opts, "data.path is", "cannot be read")
    (root / "test-0.parquet").unlink()
    refused(opts, "data.path is", "a file of the part test is missing")


def test_bad_folders(tmp_path):
    images = some_pixels(2)

    def made(name, parts):
        write_folder(tmp_path / name, parts)
        return options("folder", tmp_path / name)

    refused(made("no-test", {"train/x": images}), "data.path is", "test is missing")
    refused(made("no-train", {"test/x": images}), "data.path is", "train is missing")
    refused(made("odd", {"train/x": images, "train/y": images, "test/x": images}), "class y", "in both")
    refused(made("empty", {"train/x": [], "test/x": images}), "data.path is", "<class>/<image>")
    mixed = {"train/x": images, "train/y": some_pixels(1, side=4), "test/x": images, "test/y": images}
    opts = made("mixed", mixed)
    refused(opts, "data.image-size is 0", "4x4", "6x6")
    assert load(options("folder", opts.path, size=6)).shape == (3, 6, 6)
    broken = made("broken", {"train/x": images, "test/x": images})
    file = Path(broken.path) / "train" / "x" / "1.png"
    file.write_bytes(file.read_bytes()[:60])
    refused(broken, "1.png cannot be decoded")


@pytest.fixture
def broken(tmp_path):
    """Return a folder of two classes, and where one more file of the first class goes."""
    write_folder(tmp_path / "set", {f"{part}/{name}": some_pixels(2) for part in ("train", "test") for name in "xy"})
    return options("folder", tmp_path / "set"), tmp_path / "set" / "train" / "x" / "a.png"


def test_postscript_is_no_image_and_no_interpreter_is_started(broken, tmp_path, monkeypatch):
    opts, file = broken
    gs, called = tmp_path / "bin" / "gs", tmp_path / "called"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {called}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once in a process
    with pytest.raises(OSError):  # the fake makes no picture
        Image.open(io.BytesIO(text)).convert("RGB")
    assert called.exists()  # what Pillow does by itself
    called.unlink()
    file.write_bytes(text)
    refused(opts, "a.png cannot be decoded", "it is to be an image: PNG, JPEG, PPM, BMP, TIFF, WEBP, GIF")
    write_parquet(tmp_path / "train.parquet", ("img", [text]), {"label": [0]})
    write_parquet(tmp_path / "test.parquet", ("img", [text]), {"label": [0]})
    refused(options("parquet", tmp_path), "row 0 of train.parquet cannot be decoded")
    assert not called.exists()


def test_images_are_opened_in_named_formats_everywhere():
    calls = [
        {word.arg for word in node.keywords}
        for file in Path(ssfl_app.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls == [{"formats"}]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
def test_each_format_is_read_whatever_the_file_is_called(broken, kind):
    opts, file = broken
    Image.fromarray(some_pixels(1)[0]).save(file, format=kind)
    assert len(load(opts).train) == 5


def test_only_regular_files_are_opened(broken, tmp_path, monkeypatch):
    opts, file = broken
    os.mkfifo(file)
    refused(opts, "a.png is no regular file")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(opts, "a.png is no regular file")
    file.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(file.parent)  # names of sockets are short
        listener.bind("a.png")
        refused(opts, "a.png is no regular file")
    file.unlink()
    file.symlink_to(tmp_path / "gone.png")
    refused(opts, "a.png cannot be read")
    file.unlink()
    file.symlink_to("0.png")
    assert len(load(opts).train) == 5  # a link to a file is one
    os.mkfifo(tmp_path / "train.parquet")
    os.mkfifo(tmp_path / "test.parquet")
    refused(options("parquet", tmp_path), "train.parquet is no regular file")


def test_each_real_folder_is_read_once_whatever_links_there_are(broken):
    opts, file = broken
    train, cats = file.parent.parent, file.parent
    (cats / "below").mkdir()
    (cats / "below" / "9.png").write_bytes(png(some_pixels(1)[0]))
    for name, target in {"one": ".", "two": ".", "up": "..", "other": "../y", "again": "below"}.items():
        (cats / name).symlink_to(target)
        (cats / "below" / name).symlink_to(Path("..") / target)
    found = load(opts)
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1]
    (train / "z").symlink_to("y")
    refused(opts, "train/z is a link to y")
    (train / "z").unlink()
    (train / "z").symlink_to(".")
    refused(opts, "train/z is a link to train")


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\x1b]0;pwned\x07"])
def test_class_names_are_printable(broken, name):
    opts, file = broken
    for part in ("train", "test"):
        os.rename(file.parents[2] / part / "x", os.fsencode(file.parents[2] / part) + b"/" + name)  # noqa: PTH104
    assert refused(opts, "train has the class", "a class name is printable UTF-8").isprintable()


def test_class_names_in_the_hubs_metadata_are_printable(shards):
    import pyarrow.parquet as pq

    root, _ = shards
    info = json.dumps({"info": {"features": {"label": {"names": ["a", "b\nc", "d"]}}}})
    table = pq.read_table(root / "train-0.parquet")
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), root / "train-0.parquet")
    refused(options("parquet", root), "the metadata of train-0.parquet has the class 'b\\nc'")


@pytest.mark.parametrize("label", [100_000, 2_000_000_000, 2**62, 2**63, 2**64 - 1, -1])
def test_labels_that_are_no_classes_are_refused_before_they_are_cast(shards, label):
    root, images = shards
    kind = np.uint64 if label > 2**62 else np.int64
    write_parquet(root / "test-0.parquet", ("img", images[6:8]), {"label": np.array([0, label], kind)})
    refused(options("parquet", root), f"column label of test-0.parquet is {label}, it is at least 0 and below 100000")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_unfolded(broken):
    opts, file = broken
    Image.new("1", (10_000, 9_000)).save(file, format="PNG")
    assert file.stat().st_size < 100_000
    refused(options("folder", opts.path, size=6), "a.png cannot be decoded", "10000x9000 pixels, at most 89478485")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "mnist"),
        ("augment", "cutout"),
        ("image-size", -1),
        ("download", "yes"),
        ("where", "x"),
        ("channels", 2),
    ],
)
def test_bad_options_are_refused(key, value):
    good = {"name": "digits", "path": "", "download": False, "image-size": 0, "augment": "auto"}
    good |= {"where": "shared", "classes": "", "channels": 0, "label-column": "label"}
    assert build(DataOptions, "data", good) == options("digits")
    with pytest.raises(ConfigError, match=f"data.{key} is"):
        build(DataOptions, "data", good | {key: value})


# ---- transform and images ---------------------------------------------------------------------


def one_by_one(pixels, rng):
    """Crop and flip image after image, with the offsets of `Transform.train`."""
    count, _, height, width = pixels.shape
    pad = padding(min(height, width))
    down, right = rng.integers(0, 2 * pad + 1, size=(2, count))
    flips = rng.random(count) < 0.5
    out = []
    for image, y, x, flip in zip(pixels.numpy(), down, right, flips, strict=True):
        crop = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))[:, y : y + height, x : x + width]
        out.append(crop[:, :, ::-1] if flip else crop)
    return torch.from_numpy(np.stack(out).copy())


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (40, 1, 8, 8), (5, 3, 16, 20), (5, 3, 4, 4), (1, 3, 64, 64)])
def test_crop_flip_of_a_batch_equals_that_of_its_images(shape):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(1, 256, size=shape, dtype=np.uint8))
    transform = Transform((0.4,) * shape[1], (0.2,) * shape[1], "crop-flip")
    got = transform.train(pixels, np.random.default_rng(3))
    want = transform.test(one_by_one(pixels, np.random.default_rng(3)))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(got, transform.train(pixels, np.random.default_rng(3)))


def test_crop_pads_raw_pixels_with_zero_and_reaches_all_offsets():
    pixels = torch.full((4000, 1, 16, 16), 255, dtype=torch.uint8)
    made = Transform((0.5,), (0.5,), "crop-flip").train(pixels, np.random.default_rng(0))
    assert made.unique().tolist() == [-1.0, 1.0]
    assert torch.equal(pixels, torch.full_like(pixels, 255))
    top = (made[:, 0, :, 8] < 0).sum(dim=1)
    assert top.unique().tolist() == [0, 1, 2, 3, 4]
    assert [padding(side) for side in (4, 8, 15, 16, 32)] == [0, 1, 1, 4, 4]


def test_half_of_the_images_are_mirrored():
    pixels = torch.arange(6, dtype=torch.uint8).expand(2000, 1, 6, 6)
    made = Transform((0.0,), (1.0,), "crop-flip").train(pixels, np.random.default_rng(0))
    assert 900 < int((made[:, 0, 0, 0] > made[:, 0, 0, 5]).sum()) < 1100


def test_normalising_is_torchvisions_to_the_bit():
    transforms = pytest.importorskip("torchvision.transforms")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = some_pixels(3, side=32)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    want = torch.stack([theirs(Image.fromarray(image)) for image in images])
    pixels = torch.from_numpy(chw(images).copy())
    transform = Transform(mean, std, "none")
    assert torch.equal(transform.test(pixels), want)
    rng = np.random.default_rng(0)
    assert torch.equal(transform.train(pixels, rng), want)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_take_copies_and_to_keeps():
    images = Samples(torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2), torch.tensor([5, 6, 7]))
    taken = images.take(np.array([2, 0]))
    taken.inputs.zero_()
    assert taken.labels.tolist() == [7, 5]
    assert images.inputs.flatten().tolist() == list(range(12))
    assert images.to("cpu").inputs is images.inputs
    assert len(images.take(np.array([], dtype=np.int64))) == 0


def test_heavy_libraries_are_imported_only_when_needed():
    heavy = {"torchvision", "sklearn", "pyarrow", "PIL"}
    code = f"import ssfl_app.data.dataset, sys; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
