"""Text: sequences of characters, each with the characters that follow; a file, or a speaker of a play, is a client.

The first four fifths of a client's text train and the rest tests, each cut into sequences that do not overlap.
Token 0 is a character that no training text has; the others are numbered in the order of Unicode.

References
----------
Caldas et al. (2018), LEAF, arXiv:1812.01097: Shakespeare by speaking role, 80 characters a sequence.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ssfl_app.data.arrays import from_arrays
from ssfl_app.data.cache import ArrayDataset, Labels, Wanted, cached
from ssfl_app.data.image_folder import hidden
from ssfl_app.data.unreadable import check_regular, refused, unreadable

_SPEAKER = re.compile(r"^(\S[^:\n]{0,60}):[ \t]*$", re.MULTILINE)


def read_text(path: str, root: Path, image_size: int, wanted: Wanted) -> ArrayDataset:
    """Read a folder of text files in UTF-8, or one file in which a line ``NAME:`` says who speaks from there on."""
    files = [root]
    if root.is_dir():
        files = [file for file in sorted(root.iterdir()) if not file.is_dir() and not hidden(file.name)]

    def read() -> ArrayDataset:
        texts = [_text(path, file, f"file {index}") for index, file in enumerate(files)]
        texts = by_speaker(texts[0]) if files == [root] else texts
        parts = [(text[: len(text) * 4 // 5], text[len(text) * 4 // 5 :]) for text in texts]
        return sequences(path, "text", parts, wanted.length)

    return cached(("text", str(root.resolve()), wanted.length), files, read)


def _text(path: str, file: Path, public: str) -> str:
    check_regular(path, file, file.name, public)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise refused(path, file.name, public, "cannot be read as text in UTF-8", error) from error


def by_speaker(play: str) -> list[str]:
    """Return all that each speaker says, in the order in which they first speak; the whole text if nobody does."""
    _, *pieces = _SPEAKER.split(play)
    said: dict[str, list[str]] = {}
    for name, speech in zip(pieces[::2], pieces[1::2], strict=True):
        said.setdefault(name, []).append(speech.strip("\n"))
    return ["\n".join(speeches) for speeches in said.values()] or [play]


def sequences(path: str, name: str, texts: list[tuple[str, str]], length: int) -> ArrayDataset:
    """Return sequences of `length` characters of the training and test text of each client.

    A client whose training text has none is left out, which a note says.
    """
    kept = [pair for pair in texts if len(pair[0]) > length]
    if not any(len(test) > length for _, test in kept):
        raise unreadable(path, f"no training text has a test text of more than data.length, {length} characters")
    vocabulary = np.unique(np.concatenate([_characters(train) for train, _ in kept]))
    made = []
    for part in zip(*kept, strict=True):
        cut = [_windows(_characters(text), vocabulary, length) for text in part]
        windows, owners = np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(each) for each in cut])
        made.append((windows[:, :-1], windows[:, 1:], owners))
    left = f"; {len(texts) - len(kept)} are left out, which are too short" if len(texts) > len(kept) else ""
    note = f"texts: {len(kept)}, with {len(vocabulary)} different characters{left}"
    return replace(from_arrays(made, name), notes=(note,))


def _characters(text: str) -> Labels:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def _windows(characters: Labels, vocabulary: Labels, length: int) -> Labels:
    """Return the tokens of sequences with the one after each, (n, length + 1)."""
    places = np.searchsorted(vocabulary, characters).clip(max=len(vocabulary) - 1)
    tokens: Labels = np.where(vocabulary[places] == characters, places + 1, 0)
    chosen: Labels = tokens[np.arange(max(len(tokens) - 1, 0) // length)[:, None] * length + np.arange(length + 1)]
    return chosen
