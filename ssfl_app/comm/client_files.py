"""Files that a client keeps between messages: versions of its personal state, and the mask it holds."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from ssfl_app.files import check_regular, write_bytes
from ssfl_app.locks import alone_with

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


class Store(Protocol):
    """Where files of clients lie, by names below it: "client-00003/000002.safetensors". Its methods raise OSError."""

    def names(self, own: str) -> list[str]:
        """Return the names of the regular files in the folder `own`."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""

    def delete(self, name: str) -> None:
        """Delete a file."""

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Let nobody else be in here with the same file."""


class Folder:
    """A `Store` that is a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self, own: str) -> list[str]:
        """Return the names of the regular files in the folder `own`."""
        return [file.name for file in (self._path / own).glob("*") if file.is_file()]

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        check_regular(self._path / name)
        return (self._path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        write_bytes(self._path / name, content)

    def delete(self, name: str) -> None:
        """Delete a file."""
        (self._path / name).unlink()

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Let nobody else be in here with the same file, as `alone_with` has it."""
        return alone_with(self._path / name)


class Files:
    """Versions of a content, by the round they were made in, as files of the folder `own` of a store."""

    def __init__(self, store: Store, own: str) -> None:
        self._store, self._own = store, own

    def rounds(self) -> list[int]:
        """Return the rounds there are, in order; files of other names are nobody's."""
        names = self._store.names(self._own)
        named = [re.fullmatch(r"(\d{6}|[1-9]\d{6,})\.safetensors", name, re.ASCII) for name in names]
        return sorted(int(name[1]) for name in named if name is not None)

    def read(self, round_: int) -> bytes:
        """Return the version of a round."""
        return self._store.read(self._name(round_))

    def write(self, round_: int, content: bytes) -> None:
        """Keep a version."""
        self._store.write(self._name(round_), content)

    def delete(self, round_: int) -> None:
        """Drop a version."""
        self._store.delete(self._name(round_))

    def _name(self, round_: int) -> str:
        return f"{self._own}/{round_:06d}.safetensors"


class MaskFile:
    """The one mask a client holds, with its digest in front: what a message states never becomes a path."""

    def __init__(self, store: Store, own: str) -> None:
        self._store, self._name = store, f"{own}/mask"

    def read(self, digest: str) -> bytes | None:
        """Return the bitmap of the mask with this digest, or None if another one or none is held."""
        content = content_of(self._store, self._name) or b""
        return content[_DIGEST:] if content[:_DIGEST] == digest.encode() else None

    def write(self, digest: str, bitmap: bytes) -> None:
        """Hold this mask instead of the one before."""
        self._store.write(self._name, digest.encode() + bitmap)


def content_of(store: Store, name: str) -> bytes | None:
    """Return what is in a file that can be made anew, or None if it cannot be read."""
    try:
        return store.read(name)
    except OSError:
        return None
