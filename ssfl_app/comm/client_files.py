"""Files that a client keeps between messages: versions of its personal state, and the mask it holds."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssfl_app.files import check_regular, write_bytes

_DIGEST = 64  # characters of a mask's digest


class ClientStateError(OSError):
    """What a client keeps cannot be read or written: its disk is full or broken."""


@contextmanager
def client_state_errors() -> Iterator[None]:
    """Raise ClientStateError for an error of the file system inside: a reply carries the name of its class."""
    try:
        yield
    except OSError as error:
        raise ClientStateError(str(error)) from error


class Files:
    """Versions of a content, by the round they were made in, as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds there are, in order; files of other names are nobody's."""
        named = [re.fullmatch(r"(\d{6,})\.safetensors", file.name, re.ASCII) for file in self._folder.glob("*")]
        rounds = sorted(int(name[1]) for name in named if name is not None)
        return [round_ for round_ in rounds if self._path(round_).is_file()]

    def read(self, round_: int) -> bytes:
        """Return the version of a round."""
        return self._path(round_).read_bytes()

    def write(self, round_: int, content: bytes) -> None:
        """Keep a version."""
        write_bytes(self._path(round_), content)

    def delete(self, round_: int) -> None:
        """Drop a version."""
        self._path(round_).unlink()

    def _path(self, round_: int) -> Path:
        return self._folder / f"{round_:06d}.safetensors"


class MaskFile:
    """The one mask a client holds, with its digest in front: what a message states never becomes a path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, digest: str) -> bytes | None:
        """Return the bitmap of the mask with this digest, or None if another one or none is held."""
        content = content_of(self._path) or b""
        return content[_DIGEST:] if content[:_DIGEST] == digest.encode() else None

    def write(self, digest: str, bitmap: bytes) -> None:
        """Hold this mask instead of the one before."""
        write_bytes(self._path, digest.encode() + bitmap)


def content_of(path: Path) -> bytes | None:
    """Return what is in a file that can be made anew, or None if it cannot be read."""
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError:
        return None
