"""Images of every depth and mode, which parquet file is what, and what lies in a folder beside the images."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssfl_app.data.dataset import load, load_own
from ssfl_app.data.images import decode
from ssfl_app.options import ConfigError
from tests.data.test_dataset import DataOptions, options, refused, some_pixels, ssfl, write_folder, write_parquet

GREY = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSFL_CACHE", str(tmp_path / "cache"))


def encoded(image, kind="PNG", **metadata):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **metadata)
    return buffer.getvalue()


def tiff(values, bits, zero_is_white=False, kind=1):
    """Return a TIFF of one strip of values, each of so many bits; kind: 1 unsigned, 2 signed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        content = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    else:
        content = values.astype(f"<{'ui'[kind - 1]}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 8, 277: 1, 278: height}
    tags |= {279: len(content), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    at = 8 + len(content) + len(content) % 2
    head = b"II*\0" + struct.pack("<I", at) + content + b"\0" * (len(content) % 2)
    return head + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def read(*contents, size=0, channels=0):
    """Return the pixels of encoded images, (N, C, H, W), and the notes."""
    items = [(f"Jane-{index}.png", f"image {index}", content) for index, content in enumerate(contents)]
    (pixels,), notes = decode("/data", [(len(items), items)], size, channels)
    return pixels, notes


DEEP = GREY.astype(np.uint16) * 257 + 128  # the low byte changes nothing
TWELVE = np.linspace(0, 4095, 24).astype(np.uint16).reshape(4, 6)
PALETTE = Image.fromarray(GREY).convert("P")


@pytest.mark.parametrize(
    ("content", "want"),
    [
        (encoded(Image.fromarray(DEEP)), GREY),
        (encoded(Image.fromarray(DEEP), "TIFF"), GREY),
        (encoded(Image.frombytes("I;16B", (5, 5), DEEP.astype(">u2").tobytes()), "TIFF"), GREY),
        (b"P5 5 5 65535\n" + DEEP.astype(">u2").tobytes(), GREY),
        (b"P5 6 4 4095\n" + TWELVE.astype(">u2").tobytes(), TWELVE.astype(int) * 65535 // 4095 // 257),
        (tiff(TWELVE, 12), TWELVE.astype(int) * 255 // 4095),
        (tiff(TWELVE, 16), TWELVE // 257),
        (tiff(DEEP, 16, zero_is_white=True), 255 - GREY),
        (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY),
        (encoded(Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)), (GREY >= 128) * 255),
        (encoded(PALETTE), GREY),
        (encoded(Image.fromarray(GREY), "GIF"), GREY),
        (encoded(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (5, 5), 255)])), GREY),
        (encoded(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (5, 5), 0)])), 255 + 0 * GREY),
        (encoded(Image.fromarray(GREY), transparency=40), np.where(GREY == 40, 255, GREY)),
        (encoded(Image.fromarray(DEEP), transparency=int(DEEP[1, 0])), np.where(GREY == 50, 255, GREY)),
        (encoded(PALETTE, transparency=40), np.where(GREY == 40, 255, GREY)),
    ],
)
def test_grey_of_any_depth_is_scaled_by_it_and_stays_grey(content, want):
    pixels, _ = read(content)
    assert pixels.shape == (1, 1, *want.shape)
    assert pixels[0, 0].tolist() == want.tolist()


def test_colour_of_any_mode_is_rgb_on_white():
    red = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    red.putpixel((1, 0), (7, 8, 9, 0))  # what nobody sees
    half = Image.new("RGBA", (2, 1), (200, 100, 0, 51))
    for image, want in (
        (red, [[200, 100, 0], [255, 255, 255]]),
        (half, [[244, 224, 204]] * 2),
        (Image.new("CMYK", (2, 1), (255, 0, 0, 0)), [[0, 255, 255]] * 2),
        (Image.new("RGB", (2, 1), (1, 1, 1)), [[1, 1, 1]] * 2),
        (Image.new("RGB", (2, 1), (1, 2, 3)).quantize(), [[1, 2, 3]] * 2),
    ):
        pixels, notes = read(encoded(image, "TIFF" if image.mode == "CMYK" else "PNG"))
        assert pixels[0, :, 0].T.tolist() == want
        assert bool(notes) == (image.mode in ("RGBA", "CMYK"))
    deep = np.array([[[0, 32896, 65535]]], np.uint16)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)

    import zlib

    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + deep.astype(">u2").tobytes())), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    assert read(png)[0].ravel().tolist() == [0, 128, 255]


def test_grey_beside_colour_becomes_colour_whichever_comes_first(tmp_path):
    grey, colour = encoded(Image.fromarray(GREY)), encoded(Image.fromarray(some_pixels(1, side=5)[0]))
    for order in ((grey, grey, colour), (colour, grey, grey), (grey, colour, grey)):
        pixels, notes = read(*order)
        assert pixels.shape == (3, 3, 5, 5)
        assert pixels[order.index(grey)].tolist() == [GREY.tolist()] * 3
        assert notes == ("2 of 3 images are grey and were made colour",)
    pixels, notes = read(grey, colour, channels=1)
    assert pixels.shape == (2, 1, 5, 5)
    assert notes == ("1 of 2 images are colour and were made grey, as data.channels says",)
    assert read(grey, colour, size=3)[0].shape == (2, 3, 3, 3)
    # In the part that is tested, too: nothing becomes grey unasked.
    write_folder(tmp_path / "a", {"train/x": some_pixels(2, channels=1), "test/x": some_pixels(1)})
    write_folder(tmp_path / "b", {"train/x": some_pixels(2), "test/x": some_pixels(1, channels=1)})
    for name, count in (("a", 2), ("b", 1)):
        found = load(options("folder", tmp_path / name))
        assert found.shape == tuple(found.test.inputs.shape[1:]) == (3, 6, 6)
        assert f"{count} of 3 images are grey and were made colour" in found.notes
        assert load(options("folder", tmp_path / name)).notes == found.notes  # from the cache


def test_values_that_use_a_part_of_the_depth_are_said_with_the_largest():
    _, notes = read(tiff(TWELVE, 16), tiff(TWELVE // 2, 16), encoded(Image.fromarray(np.zeros((4, 6), np.uint8))))
    deep = "are deeper than 8 bits and were scaled to 8; the largest value is 4095 of"
    assert notes == (f"2 of 3 images {deep} 65535: files that use their whole range keep more of it",)
    _, notes = read(tiff(TWELVE, 12))
    assert notes == (f"1 of 1 images {deep} 4095",)


def two_pages(kind, **metadata):
    return encoded(
        Image.fromarray(GREY), kind, save_all=True, append_images=[Image.fromarray(255 - GREY)], **metadata
    )


@pytest.mark.parametrize(
    ("content", "words", "private"),
    [
        (tiff(GREY.astype(np.int16) - 9, 16, kind=2), "is of mode I (signed or 32-bit integers)", ""),
        (tiff(DEEP, 32), "is of mode I (signed or 32-bit integers)", ""),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "is of mode F (float)", "lie in [0, 240]"),
        (encoded(Image.fromarray(GREY / np.float32(-240)), "TIFF"), "is of mode F (float)", "lie in [-1, -0]"),
        (encoded(Image.fromarray(GREY * np.float32("nan")), "TIFF"), "is of mode F (float)", "lie in [nan, nan]"),
        (encoded(Image.new("LAB", (2, 2)), "TIFF"), "is TIFF of mode LAB; it is to be grey, RGB, CMYK", ""),
        (
            two_pages("TIFF"),
            "is TIFF of mode L with 2 pages; an image is a file of one page: save the page you mean",
            "",
        ),
        (two_pages("GIF"), "is GIF of mode P with 2 frames", ""),
        (
            two_pages("WEBP", lossless=True),
            "is WEBP of mode RGB with 2 frames; an image is a file of one frame: save the first",
            "",
        ),
        (
            two_pages("PNG"),
            "is PNG of mode L with 2 frames; an image is a file of one frame: save the first frame as",
            "",
        ),
    ],
)
def test_what_cannot_be_done_without_loss_names_file_and_mode(content, words, private):
    with pytest.raises(ConfigError) as caught:
        read(encoded(Image.fromarray(GREY)), content)
    assert f"Jane-1.png {words}" in str(caught.value)
    assert private in str(caught.value)
    assert f"image 1 {words}" in caught.value.public
    assert "Jane" not in caught.value.public
    assert not private or private not in caught.value.public


def test_reduced_copies_in_a_tiff_and_further_pictures_of_a_jpeg_are_no_pages():
    pages = io.BytesIO()
    Image.fromarray(GREY).save(pages, "TIFF", save_all=True, append_images=[Image.fromarray(GREY[:2, :2])])
    content = bytearray(pages.getvalue())
    second = struct.unpack_from("<I", content, 4)[0]
    second = struct.unpack_from("<I", content, second + 2 + 12 * struct.unpack_from("<H", content, second)[0])[0]
    count = struct.unpack_from("<H", content, second)[0]
    tags = [bytes(content[second + 2 + 12 * n : second + 14 + 12 * n]) for n in range(count)]
    assert struct.unpack_from("<H", tags[0])[0] >= 254
    reduced = [struct.pack("<HHII", 254, 4, 1, 1), *(tag for tag in tags if tag[:2] != struct.pack("<H", 254))]
    end = len(content)
    content += struct.pack("<H", len(reduced)) + b"".join(reduced) + b"\0" * 4
    first = struct.unpack_from("<I", content, 4)[0]
    struct.pack_into("<I", content, first + 2 + 12 * struct.unpack_from("<H", content, first)[0], end)
    assert Image.open(io.BytesIO(content), formats=["TIFF"]).n_frames == 2
    assert read(bytes(content))[0][0, 0].tolist() == GREY.tolist()
    plain = encoded(Image.fromarray(GREY), "JPEG", quality=95)
    phone = encoded(Image.fromarray(GREY), "MPO", quality=95, save_all=True, append_images=[Image.new("L", (9, 9))])
    assert np.array_equal(read(phone)[0], read(plain)[0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(some_pixels(1, side=5)[0][:3])  # 3 rows of 5
    content = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(content), formats=[kind]) as opened:
        opened.load()
        want = np.asarray(ImageOps.exif_transpose(opened))
    assert want.shape == ((3, 5, 3) if orientation < 5 else (5, 3, 3))
    assert np.array_equal(read(content)[0][0].transpose(1, 2, 0), want)


@pytest.mark.parametrize("turned", [0, 1])
def test_sizes_that_differ_by_exif_alone_say_so(tmp_path, turned):
    write_folder(tmp_path, {"train/x": [], "test/x": some_pixels(1)})
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(2):
        metadata = {"exif": exif} if index == turned else {}
        Image.new("RGB", (6, 4)).save(tmp_path / "train" / "x" / f"{index}.jpg", **metadata)
    sizes = ["6x4", "6x4"]
    sizes[turned] = "4x6 as its EXIF orientation turned it"
    words = f"is {sizes[1]}, the first image is {sizes[0]}: give a size above 0"
    said = refused(options("folder", tmp_path), words, f"; train/x/1.jpg in {tmp_path} is")
    assert said.count(str(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_no_image():
    content = encoded(Image.fromarray(GREY), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read(content)[0][0, 0].tolist() == GREY.tolist()


# ---- parquet ----------------------------------------------------------------------------------


def shard(file, labels, names=(), seed=0):
    """Write one 6x6 image a label, with names of labels in the metadata if there are any; return the images."""
    pq = pytest.importorskip("pyarrow.parquet")

    images = some_pixels(len(labels), seed=seed)
    file.parent.mkdir(exist_ok=True)
    write_parquet(file, ("img", images), {"label": labels})
    if names:
        info = json.dumps({"info": {"features": {"label": {"names": list(names)}}}})
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": info}), file)
    return images


@pytest.mark.parametrize(
    "files",
    [
        {"latest_train": 3, "latest_test": 2},
        {"retrieval-train": 3, "retrieval-val": 2},
        {"train0": 3, "valid-00000-of-00001": 2},
        {"cifar10_TrainSet": 3, "CIFARTest": 2},
        {"mnist_trainset": 3, "mnist_testset": 2, "mnist_valset": 0},
        {"train-00000-of-00002-val9": 0, "TRAINING": 3, "testing": 2, "retest_untrained": 0},
        {"my-train-00000-of-00001": 3, "my-test-00000-of-00001": 2, "my-validation-00000-of-00001": 0},
    ],
)
def test_a_file_is_of_the_part_that_a_word_of_its_name_says(tmp_path, files):
    files = {name: count for name, count in files.items() if "val9" not in name}
    for name, count in files.items():
        shard(tmp_path / "set" / f"{name}.parquet", list(range(count or 1)))
    found = load(options("parquet", tmp_path / "set"))
    assert (len(found.train), len(found.test)) == (3, 2)
    left = [note for note in found.notes if "left out" in note]
    assert len(left) == list(files.values()).count(0)
    assert all(note.endswith((": 1", ": 1 of val")) for note in left)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["train", "train_test_split"],
            "the name of train_test_split.parquet says the parts test and train; a file is of one part: rename it",
        ),
        (["test-train", "test"], "the name of test-train.parquet says the parts"),
        (["trainval"], "a file of the part train is missing"),
        (["mytrainset_test"], "a file of the part train is missing"),
        (["a_trainset_test"], "the name of a_trainset_test.parquet says the parts test and train"),
        (["train-00000-of-00002", "test"], "1 shards that are said to be 2: number 1 is missing"),
        (["train-1-of-2", "test"], "1 shards that are said to be 2: number 0 is missing"),
        (["train", "test-00001-of-00002", "test-00000-of-00003"], "said to be 2 and 3: some are there twice, or"),
        (["train-00000-of-00001", "train-00000-of-00001 (1)", "test"], "2 shards that are said to be 1: some are"),
    ],
)
def test_files_that_may_be_something_else_are_refused(tmp_path, names, words):
    for name in names:
        shard(tmp_path / "set" / f"{name}.parquet", [0])
    refused(options("parquet", tmp_path / "set"), words)


def test_labels_mean_what_their_own_file_calls_them(tmp_path):
    root = tmp_path / "set"
    parts = [
        shard(root / "train-0.parquet", [0, 1, 2], ("cat", "dog", "eel")),
        shard(root / "train-1.parquet", [0, 1], ("dog", "cat"), 1),
        shard(root / "test.parquet", [0, 3], ("eel", "yak", "dog", "cat"), 2),
    ]
    found = load(options("parquet", root))
    assert found.class_names == ("cat", "dog", "eel")
    assert found.train.labels.tolist() == [0, 1, 2, 1, 0]
    assert found.test.labels.tolist() == [2, 0]
    assert np.array_equal(found.train.inputs.numpy(), np.concatenate(parts[:2]).transpose(0, 3, 1, 2))
    site = DataOptions("parquet", "", False, 0, "none", "sites", "eel,dog,cat", 0, "label")
    assert load_own(site, str(root)).train.labels.tolist() == [2, 1, 0, 1, 2]
    shard(root / "test.parquet", [0, 1], ("eel", "yak"))
    refused(options("parquet", root), "test.parquet has images of class 'yak', train-0.parquet names cat, dog, eel")
    shard(root / "test.parquet", [0, 1])
    refused(
        options("parquet", root), "train-0.parquet has names of its labels in its metadata, test.parquet has none"
    )
    shard(root / "test.parquet", [0, 2], ("cat", "dog"))
    refused(options("parquet", root), "test.parquet has the label 2; its metadata name 2 classes")


@pytest.mark.parametrize("names", [("a", "a"), ("a", ""), ("a", "b\nc"), ("a", "b" * 201)])
def test_names_that_no_class_can_have_are_refused_at_reading(tmp_path, names):
    for part in ("train", "test"):
        shard(tmp_path / "set" / f"{part}.parquet", [0, 1], names)
    refused(
        options("parquet", tmp_path / "set"), "the metadata of train.parquet has the class", "no two are the same"
    )
    if "" not in names and "b\nc" not in names and len(set(names)) == 2:
        write_folder(
            tmp_path / "folder", {f"{part}/{n}": some_pixels(1) for part in ("train", "test") for n in names}
        )
        refused(options("folder", tmp_path / "folder"), "train has the class", "of 1 to 200 characters")


def test_a_row_without_bytes_and_several_image_columns_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    shard(tmp_path / "set" / "train.parquet", [0, 1])
    shard(tmp_path / "set" / "test.parquet", [0, 1])
    rows = [{"bytes": None, "path": "1.png"}, None]
    for row in rows:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"img": pa.array([row], kind), "label": [0]}), tmp_path / "set" / "test.parquet")
        refused(options("parquet", tmp_path / "set"), "row 0 of test.parquet has no bytes")
    table = pa.table({"left": pa.array([row], kind), "right": pa.array([row], kind), "label": [0]})
    pq.write_table(table, tmp_path / "set" / "test.parquet")
    refused(options("parquet", tmp_path / "set"), "has the columns left, right, label; it needs one image column")


def test_odd_classes_are_said(tmp_path):
    for part in ("train", "test"):
        shard(tmp_path / "a" / f"{part}.parquet", [0, 700])
        shard(tmp_path / "b" / f"{part}.parquet", [0, 0])
    assert load(options("parquet", tmp_path / "a")).notes == ("699 of 701 classes have no training image",)
    assert load(options("parquet", tmp_path / "b")).notes == ("there is one class only: each answer is right",)


# ---- folders ----------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    parts = {f"{part}/{name}": some_pixels(2) for part in ("train", "test") for name in ("cat", "dog")}
    hidden = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN")
    odd = {f"train/{name}": some_pixels(1) for name in hidden}
    odd |= {f"train/cat/{name}": some_pixels(1) for name in hidden}
    write_folder(root, parts | odd)
    for name in (
        "._1.png",
        ".DS_Store",
        "Thumbs.db",
        "5.gif",
        "6.GIF",
        "7.jfif",
        "notes",
        "scan.smith_john",
        "a.smith",
    ):
        (root / "train" / "cat" / name).write_bytes(b"none")
    (root / "train" / "8.png").write_bytes(b"none")
    found = load(options("folder", root))
    assert found.class_names == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    endings = "6 with endings that are no image's (2 .gif, 2 other, 1 without one, 1 .jfif)"
    left = f"files and folders left out: 11 hidden or of the system, 1 beside the class folders, {endings}"
    assert found.notes == (left,)
    command = (
        "partition",
        "-c",
        f"data.name='folder' data.path='{root}' run.clients=2",
        "--out",
        str(root / "p.png"),
    )
    assert f"note: {left}\n" in ssfl(monkeypatch, capsys, *command)
    shard(root / "train.parquet", [0, 1])
    shard(root / "test.parquet", [0, 1])
    (root / "._train.parquet").write_bytes(b"none")
    assert len(load(options("parquet", root)).train) == 2


@pytest.mark.parametrize("where", ["train", "train/cat", "train/cat/below", ""])
def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, where):
    root = tmp_path / "set"
    write_folder(root, {f"{part}/cat/below": some_pixels(2) for part in ("train", "test")})
    shard(root / "train.parquet", [0])
    scan, closed = os.scandir, root / where

    def scandir(folder="."):
        if Path(folder) == closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", scandir)  # of Path.iterdir
    refused(options("folder" if where else "parquet", root), "cannot be read", f"Permission denied: '{closed}'")
    if where:
        site = DataOptions("folder", "", False, 0, "none", "sites", "cat,dog", 0, "label")
        with pytest.raises(ConfigError, match=r"cannot be read .*Permission denied"):
            load_own(site, str(root))


def test_a_path_that_may_not_be_looked_at_or_that_no_file_can_have(tmp_path, monkeypatch):
    for name in ("folder", "parquet", "tiny-imagenet"):
        refused(options(name, tmp_path / ("x" * 300)), "data.path is", "it cannot be read", "too long")
