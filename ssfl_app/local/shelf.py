"""Files that a client keeps between messages: versions of its personal state, and the mask it holds."""

from pathlib import Path
from typing import Protocol
from uuid import uuid4

_DIGEST = 16  # characters of a mask's digest


class Versions(Protocol):
    """Contents by the round they were made in."""

    def rounds(self) -> list[int]:
        """Return the rounds there are, in order."""

    def read(self, round_: int) -> bytes:
        """Return the version of a round."""

    def write(self, round_: int, content: bytes) -> None:
        """Keep a version."""

    def delete(self, round_: int) -> None:
        """Drop a version."""


class Files:
    """Versions as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rounds(self) -> list[int]:
        """Return the rounds there are, in order."""
        return sorted(int(file.stem) for file in self._folder.glob("*.safetensors"))

    def read(self, round_: int) -> bytes:
        """Return the version of a round."""
        return self._path(round_).read_bytes()

    def write(self, round_: int, content: bytes) -> None:
        """Keep a version."""
        replace(self._path(round_), content)

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
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return content[_DIGEST:] if content[:_DIGEST] == digest.encode() else None

    def write(self, digest: str, bitmap: bytes) -> None:
        """Hold this mask instead of the one before."""
        replace(self._path, digest.encode() + bitmap)


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    temporary.write_bytes(content)
    temporary.replace(path)
