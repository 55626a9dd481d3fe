"""Writes arrays and metadata to a safetensors file with a digest of both, and reads them back unless damaged."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safe_numpy

from ssfl_app.files import check_regular, write_atomically

Arrays = Mapping[str, npt.NDArray[Any]]


class Damaged(ValueError):
    """A file is not what was written; the message completes "the file ..."."""


def write_sealed(path: Path, metadata: Mapping[str, Any], arrays: Arrays) -> None:
    """Write metadata, which JSON can hold, and arrays, atomically."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, lambda file: safe_numpy.save_file(whole, file, metadata=_metadata(metadata, whole)))


def sealed(metadata: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return the content of such a file."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safe_numpy.save(whole, metadata=_metadata(metadata, whole))


def read_sealed(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return metadata and arrays of a file.

    Raises
    ------
    Damaged
        It is short, was changed, or has no digest.
    OSError
        It cannot be read.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return _opened(file.metadata(), arrays), arrays
    except (SafetensorError, TypeError) as error:
        raise Damaged(f"is no safetensors file ({error})") from error


def unsealed(content: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return metadata and arrays of the content of such a file, or raise Damaged as `read_sealed` does."""
    try:
        arrays = safe_numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, TypeError, ValueError) as error:
        raise Damaged(f"is no safetensors file ({error})") from error
    return _opened(header.get("__metadata__"), arrays), arrays


def _metadata(metadata: Mapping[str, Any], arrays: Arrays) -> dict[str, str]:
    # One entry: safetensors writes several in any order, and equal contents are to be equal files.
    return {"ssfl": json.dumps({"facts": metadata, "sha256": _digest(metadata, arrays)})}


def _opened(metadata: Mapping[str, str] | None, arrays: Arrays) -> dict[str, Any]:
    try:
        told = json.loads((metadata or {})["ssfl"])
        metadata, digest = dict(told["facts"]), told["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise Damaged("has no digest, as those of older versions: what is in it cannot be trusted") from None
    if _digest(metadata, arrays) != digest:
        raise Damaged("is damaged: its digest is that of another content")
    return metadata


def _digest(metadata: Mapping[str, Any], arrays: Arrays) -> str:
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
