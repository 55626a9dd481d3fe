"""Sums up what a client holds, as it says at the handshake, and checks that clients fit into one federation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import quoted

MOST_NAME = 200
"""Characters of the name of a class."""

CLASS_NAME = f"a class name is printable UTF-8 of 1 to {MOST_NAME} characters, and no two are the same"

ALL = ("samples",)
"""The class names of data whose targets are no classes: all samples are of one kind."""

MOST_AXES = 8
"""Of an input."""

MOST = 2**40
"""More images than this of one class is no count."""


@dataclass(frozen=True)
class DataSummary:
    """The label set, the image shape and the numbers of images of one client, or of the server.

    Attributes
    ----------
    class_names : tuple of str
        In the order of the labels.
    shape : tuple of int
        Of an input; of an image channels, height and width.
    counts : tuple of int
        Training images of each class.
    """

    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    test_images: int

    def metadata(self) -> dict[str, str | int]:
        """Return the metadata of a handshake: names a line each, numbers with commas between them."""
        return {
            "classes": "\n".join(self.class_names),
            "shape": ",".join(map(str, self.shape)),
            "counts": ",".join(map(str, self.counts)),
            "samples": sum(self.counts),
            "test-samples": self.test_images,
        }


def read_data_summary(metadata: Mapping[str, object]) -> DataSummary:
    """Return what a hello states, whoever sent it.

    Raises
    ------
    PayloadError
        An entry is missing or is not what `DataSummary.metadata` writes.
    """
    names = metadata.get("classes")
    if not isinstance(names, str) or not names:
        raise PayloadError(f"classes is {quoted(names)}; it is the names of the classes, a line each")
    class_names = tuple(names.split("\n"))
    odd = odd_name(class_names)
    if odd is not None:
        raise PayloadError(f"classes is {quoted(names)} with the name {quoted(odd)}; {CLASS_NAME}")
    counts, shape = _numbers(metadata, "counts", len(class_names)), _numbers(metadata, "shape")
    if 0 in shape:
        raise PayloadError(f"shape is {quoted(metadata['shape'])}; it is the sizes of an input, each at least 1")
    tests = metadata.get("test-samples")
    if type(tests) is not int or not 0 <= tests < MOST:
        raise PayloadError(f"test-samples is {quoted(tests)}; it is a whole number of at least 0")
    return DataSummary(class_names, shape, counts, tests)


def odd_name(names: Sequence[str]) -> str | None:
    """Return the first name that can be none of a class, or is there twice; None if all are good."""
    counts = Counter(names)
    # Surrogates, which stand for bytes that are no UTF-8, are not printable.
    return next((n for n in names if not 0 < len(n) <= MOST_NAME or not n.isprintable() or counts[n] > 1), None)


def _numbers(metadata: Mapping[str, object], name: str, count: int | None = None) -> tuple[int, ...]:
    text = metadata.get(name)
    words = text.split(",") if isinstance(text, str) else []
    if count is None:
        count = min(max(len(words), 1), MOST_AXES)
    # Plain digits, and few of them: int() would also take "٣", " 3" and "3_0", and chokes on thousands of digits.
    if len(words) != count or not all(w.isascii() and w.isdigit() and len(w) < 14 and int(w) < MOST for w in words):
        raise PayloadError(f"{name} is {quoted(text)}; it is {count} whole numbers with commas between them")
    return tuple(map(int, words))


def mismatch(one: str, first: DataSummary, other: str, second: DataSummary) -> str | None:
    """Return, as a sentence, why two holders of data cannot be in one federation, and the cure; None if they can."""
    ours, theirs = set(first.class_names), set(second.class_names)
    cure = "name all classes in data.classes, in one order"
    if ours != theirs:
        both = (one, theirs - ours), (other, ours - theirs)
        lacks = [f"{who} has no {_names(missing)}" for who, missing in both if missing]
        return f"{one} and {other} have different classes: {'; '.join(lacks)}. The cure: {cure}"
    if first.class_names != second.class_names:
        return f"{one} and {other} have the same classes in another order. The cure: {cure}"
    if first.shape != second.shape:
        shapes = (one, first.shape), (other, second.shape)
        sizes = (f"{who} has {'x'.join(map(str, shape))}" for who, shape in shapes)
        if not len(first.shape) == len(second.shape) == 3:
            return f"{one} and {other} have inputs of different shapes: {', '.join(sizes)}"
        alike = first.shape[1:] == second.shape[1:]
        key = "data.channels to 1 or 3" if alike else "data.image-size to one size for all"
        what = "images of different shapes (channels x height x width)"
        return f"{one} and {other} have {what}: {', '.join(sizes)}. The cure: set {key}"
    return None


def other_images(who: str, held: DataSummary, dealt: DataSummary) -> str | None:
    """Return, as a sentence, why a client's copy of a shared data set is another one than the server's, or None."""
    if held.counts == dealt.counts:
        return None
    ours, theirs = (f"{sum(x.counts)} training images, {_counts(x)} by class" for x in (held, dealt))
    return f"{who} has {ours}; the server deals it {theirs}: its data set is another one, or another version"


def _counts(held: DataSummary) -> str:
    return "/".join(map(str, held.counts[:10])) + ("/..." if len(held.counts) > 10 else "")


def _names(classes: set[str]) -> str:
    listed = [quoted(name) for name in sorted(classes)]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
