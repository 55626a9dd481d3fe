"""Decodes images, of whatever depth and mode, to arrays of bytes.

| what the file holds | what is made of it |
|---|---|
| 1, 2, 4 or 8 bits, grey | as Pillow unfolds them, 0 to 255 |
| 12 or 16 bits, grey | v * 255 // (2**bits - 1), by the depth of the file, whatever values it uses |
| 16 bits a channel, colour | the high byte of each, as Pillow reads them |
| float, grey | round(255 v), if all values lie in [0, 1]; else refused: nothing says what is white |
| signed or 32-bit integers | refused, likewise |
| a palette | grey if all its colours in use are |
| transparency | laid on white |
| CMYK, YCbCr | RGB by Pillow's formulas, without a colour profile |
| several pages or frames | refused; reduced copies of the first page, and the further pictures of a JPEG, are none |
| EXIF orientation | the picture is turned as it says |

Colour is three channels, grey one. A data set has three if any of its images is colour.
"""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssfl_app.data.unreadable import check_regular, unreadable
from ssfl_app.options import PrivateError
from ssfl_app.text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What an image may be, whatever its file is called: Pillow would hand PostScript to an interpreter."""

MOST_PIXELS = 89_478_485
"""An image has no more, whatever size it is brought to. Pillow's limit, from which on it warns; here it is one."""

_CLEAR = ("LA", "PA", "RGBA", "RGBa")
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr")
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation: Pillow's Transpose
_WITH_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_BITS, _MEANING_OF_0, _SUBFILE = 258, 262, 254  # tags of TIFF


class _Refused(Exception):
    """An image would lose what it says; `what` has no value of a pixel in it, `detail` may."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what, detail)
        self.what, self.detail = what, detail


@dataclass
class _Seen:
    """What is counted over all images of a data set.

    `first` and `size` are the size of the first image, in words and numbers; `turned` is whether EXIF changed that of
    the last one, and `top` the largest value of deep images and what is white.
    """

    first: str = ""
    size: tuple[int, int] | None = None
    turned: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    top: tuple[int, int] = (0, 1)

    def notes(self, channels: int) -> tuple[str, ...]:
        """Return what was done to the images, a line each; no line holds a name."""
        value, full = self.top
        faint = ": files that use their whole range keep more of it" if 4 * value < full else ""
        said = {
            "grey": "are grey and were made colour" if channels == 3 else "",
            "colour": "are colour and were made grey, as data.channels says" if channels == 1 else "",
            "deep": f"are deeper than 8 bits and were scaled to 8; the largest value is {value} of {full}{faint}",
            "float": "are floats in [0, 1] and were scaled to 8 bits",
            "clear": "are transparent in places and were laid on white",
            "CMYK": "are CMYK and were made RGB without a colour profile",
        }
        total = self.counts["images"]
        return tuple(
            f"{self.counts[key]} of {total} images {text}" for key, text in said.items() if text and self.counts[key]
        )


def decode(
    path: str, parts: Sequence[tuple[int, Iterable[tuple[str, str, bytes | Path]]]], size: int, channels: int = 0
) -> tuple[list[Pixels], tuple[str, ...]]:
    """Decode the parts of a data set into one array each, uint8 (count, C, H, W).

    The second result says what was done to the images that a user should know, a line each.

    Parameters
    ----------
    parts : sequence of (int, iterable)
        Of each part, how many images there are, and of each image what to call it, here and to a server, and its
        file or the file's content.
    size : int
        Pixels a side to resize to (bilinear, without keeping the aspect); 0: as they are.
    channels : int
        C. 0: 1 if all images are grey, else 3.

    Raises
    ------
    ConfigError
        An image is none of `FORMATS`, has more than `MOST_PIXELS`, is no regular file, cannot be decoded or not
        without loss; images differ in size with `size` 0, or a part has none.
    """
    seen = _Seen()
    arrays = [_part(path, count, items, size, channels, seen) for count, items in parts]
    most = max(array.shape[1] for array in arrays)
    arrays = [array if array.shape[1] == most else _coloured(array) for array in arrays]
    return arrays, seen.notes(most)


def _part(
    path: str, count: int, items: Iterable[tuple[str, str, bytes | Path]], size: int, channels: int, seen: _Seen
) -> Pixels:
    out: Pixels | None = None
    for index, (name, public, source) in enumerate(items):
        image = _open(path, name, public, source, size, channels, seen)
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        said = f"{image.width}x{image.height}{' as its EXIF orientation turned it' if seen.turned else ''}"
        seen.first, seen.size = seen.first or said, seen.size or image.size
        if image.size != seen.size:
            sizes = f"is {said}, the first image is {seen.first}: give a size above 0 to resize all images to"
            cure = f"data.image-size is {size};"
            raise PrivateError(f"{cure} {name} in {path} {sizes}", f"{cure} {public} {sizes}")
        if out is None:
            out = np.empty((count, *pixels.shape), dtype=np.uint8)
        elif len(pixels) > out.shape[1]:
            out = _coloured(out)  # the images so far were grey
        out[index] = pixels
    if out is None:
        raise unreadable(path, "it holds no images, at least one is needed")
    return out


def _coloured(grey: Pixels) -> Pixels:
    return np.repeat(grey, 3, axis=1)


def _open(path: str, name: str, public: str, source: bytes | Path, size: int, channels: int, seen: _Seen) -> "Image":
    """Return one image, grey (L) or colour (RGB), in the wanted size; `channels` 0: as it is."""
    from PIL import Image

    if isinstance(source, Path):
        check_regular(path, source, name, public)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # nothing is unfolded yet
                raise ValueError(f"it has {image.width}x{image.height} pixels, at most {MOST_PIXELS} are read")
            _check_pages(image)
            image.load()
            ready = _turned(image, _in_bytes(image, seen))
            seen.turned = ready.size != image.size
        seen.counts.update(("images", "grey" if ready.mode == "L" else "colour"))
        ready = ready.convert({1: "L", 3: "RGB"}.get(channels, ready.mode))
        return ready.resize((size, size), Image.Resampling.BILINEAR) if size else ready
    except _Refused as error:
        raise unreadable(path, f"{name} {error.what}{error.detail}", f"{public} {error.what}") from error
    # The decoders of Pillow raise almost anything on broken input: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        rule = f"it is to be an image: {', '.join(FORMATS)}"
        what = f"{public} cannot be decoded ({type(error).__name__}), {rule}"
        raise unreadable(path, f"{name} cannot be decoded ({one_line(error)}), {rule}", what) from error


def _check_pages(image: "Image") -> None:
    """Refuse a file of several pictures, of which nothing says which one is meant."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":  # MPO: a JPEG of a camera, whose first picture is the picture
        return
    pages = 0
    for page in range(count):
        image.seek(page)
        pages += not getattr(image, "tag_v2", {}).get(_SUBFILE, 0) & 1  # bit 0: a reduced copy of another page
    image.seek(0)
    if pages > 1:
        one, which = ("page", "the page you mean") if image.format == "TIFF" else ("frame", "the first frame")
        raise _Refused(
            f"is {image.format} of mode {image.mode} with {pages} {one}s; an image is a file of one {one}: save "
            f"{which} as a file of its own, or take it out"
        )


def _turned(image: "Image", ready: "Image") -> "Image":
    """Return the bytes of an image as its EXIF orientation says; Pillow has turned TIFF already."""
    from PIL.Image import Transpose

    turn = None
    with suppress(Exception):  # what is broken there says nothing of the pixels
        if image.info.keys() & _WITH_EXIF:
            turn = _TURNS.get(image.getexif().get(0x0112, 1))
    return ready if turn is None else ready.transpose(Transpose(turn))


def _in_bytes(image: "Image", seen: _Seen) -> "Image":
    """Return a loaded image of any mode as grey (L) or colour (RGB); refuse it if nothing says what is white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(image, seen))
    if image.mode not in _GREY + _COLOUR:
        raise _Refused(f"is {image.format} of mode {image.mode}; it is to be grey, RGB, CMYK or of a palette")
    grey, ready = image.mode in _GREY, image
    if image.mode in _CLEAR or "transparency" in image.info:
        ready = image.convert("RGBA")
        lowest = ready.getchannel("A").getextrema()[0]
        seen.counts["clear"] += lowest != 255
        ready = Image.alpha_composite(Image.new("RGBA", ready.size, "white"), ready)
    seen.counts["CMYK"] += image.mode == "CMYK"
    if image.mode in ("P", "PA"):
        colours = np.asarray(ready := ready.convert("RGB"))
        grey = bool((colours == colours[..., :1]).all())
    return ready.convert("L" if grey else "RGB")


def _scaled(image: "Image", seen: _Seen) -> Pixels:
    """Return an image deeper than 8 bits as bytes, by the depth that its file states."""
    tags, mode = getattr(image, "tag_v2", {}), image.mode
    values = np.asarray(image)
    if mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # nor if there is a NaN
            rule = "is of mode F (float), read if all values lie in [0, 1]: scale it, or save 8 or 16 bits"
            raise _Refused(rule, f"; they lie in [{low:g}, {high:g}]")
        seen.counts["float"] += 1
        scaled = np.rint(values * 255)
    else:
        # Pillow unfolds a PGM of any depth to 16 bits. A TIFF of mode I has 32 bits, or signs.
        if mode == "I" and image.format not in ("PPM", "PNG"):
            rule = "and nothing says which is white: save 8 or 16 bits"
            raise _Refused(f"is of mode I (signed or 32-bit integers), {rule}")
        full = 2 ** int(tags.get(_BITS, (16,))[0]) - 1
        seen.counts["deep"] += 1
        highest = int(values.max())
        if highest * seen.top[1] >= seen.top[0] * full:
            seen.top = highest, full
        scaled = values.astype(np.int64) * 255 // full
        if "transparency" in image.info:  # the one value that is
            seen.counts["clear"] += 1
            scaled[values == image.info["transparency"]] = 255
    pixels: Pixels = scaled.astype(np.uint8)
    # Pillow inverts 8 bits of which 0 is white, and no others.
    return np.invert(pixels) if tags.get(_MEANING_OF_0) == 0 else pixels


def measure(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, C, H, W), in units of pixel / 255.

    From exact integer counts, so that no order of summation shows. A channel of one value has std 1.
    """
    counts = np.zeros((pixels.shape[1], 256), dtype=np.int64)
    for start in range(0, len(pixels), 4096):  # bincount needs eight times the memory of its input
        for channel, row in enumerate(counts):
            row += np.bincount(pixels[start : start + 4096, channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    means = counts @ values / counts.sum(axis=1)
    spread = (counts * (values - means[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)
    stds = np.where(spread > 0, np.sqrt(spread), 1.0)
    return tuple(means.tolist()), tuple(stds.tolist())
