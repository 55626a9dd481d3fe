"""Key pairs of clients (X25519, RFC 7748): where they are kept, and how people compare them."""

import hashlib
import json
import re
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ssfl_app.files import check_regular, write_atomically
from ssfl_app.locks import alone_with
from ssfl_app.options import ConfigError
from ssfl_app.sparsity.values import PayloadError
from ssfl_app.text import quoted

KEY_BYTES = 32
"""Length of a key, private or public."""

KEY_FILE = "masking.key"
"""File of a node's state-path with the key pair that it masks its answers with."""

_DIGITS = 32
_OTHERS_READ, _OTHERS_WRITE = 0o077, 0o022


class KeyPair:
    """A client's private key, and the public one that others get."""

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self.public: bytes = key.public_key().public_bytes_raw()

    @classmethod
    def new(cls) -> Self:
        """Return a pair that nobody had before."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def of(cls, private: bytes) -> Self:
        """Return the pair of a private key, `KEY_BYTES` long; ValueError: it has another length."""
        return cls(X25519PrivateKey.from_private_bytes(private))

    def private_bytes(self) -> bytes:
        """Return the private key."""
        return self._key.private_bytes_raw()

    def shared(self, public: bytes) -> bytes:
        """Return the 32 bytes that this pair and the one of `public` have in common, and nobody else.

        Raises
        ------
        PayloadError
            `public` has another length than `KEY_BYTES`, or is of small order: the secret would be no secret.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise PayloadError(
                f"public key is {quoted(public.hex(), 70)}; it must be {KEY_BYTES} bytes, a key of X25519"
            ) from None


def check_public(key: object) -> None:
    """Raise PayloadError unless others can mask together with the owner of a key: one that is none ends their run."""
    if not isinstance(key, bytes):
        raise PayloadError(f"public key is {quoted(key)}; it must be {KEY_BYTES} bytes, a key of X25519")
    KeyPair.new().shared(key)


def fingerprint(public: bytes) -> str:
    """Return what people compare of a public key: 128 bits of its SHA-256, in eight groups of four, ``1f3a-...``."""
    digits = hashlib.sha256(public).hexdigest()[:_DIGITS]
    return "-".join(re.findall("....", digits))


def load_or_make(path: Path) -> KeyPair:
    """Return the key pair in a file; if there is none, make one, which its account alone may read.

    Raises
    ------
    ConfigError
        The file is damaged, or others may read it, or may replace files in its folder.
    OSError
        It cannot be read or written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.parent.stat().st_mode & 0o777
    if mode & _OTHERS_WRITE:
        raise ConfigError(
            f"{path.parent} has mode {mode:o}; it holds a private key, so that it must be 700, or 755 at most"
        )
    if not path.exists():
        with alone_with(path):
            if not path.exists():  # of two processes that found none, one makes it
                pair = KeyPair.new()
                text = json.dumps({"private": pair.private_bytes().hex(), "public": pair.public.hex()}) + "\n"
                write_atomically(path, lambda file: file.write_text(text, "utf-8"), mode=0o600)
    return _load(path)


def _load(path: Path) -> KeyPair:
    check_regular(path)
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS_READ:
        raise ConfigError(
            f"{path} has mode {mode:o}; it must be 600, others may have read the key: remove it, a new one is made"
        )
    try:
        told = json.loads(path.read_text("utf-8"))
        pair, public = KeyPair.of(bytes.fromhex(told["private"])), bytes.fromhex(told["public"])
    except (ValueError, KeyError, TypeError):  # bytes that are no UTF-8 and no JSON as well
        raise ConfigError(f"{path} is damaged: it holds no key pair; remove it, a new one is made") from None
    if pair.public != public:
        raise ConfigError(f"{path} is damaged: its keys are no pair; remove it, a new one is made")
    return pair


def read_pins(path: Path) -> frozenset[str]:
    """Return the fingerprints in a file: one a line, its owner's name behind it if you like; # begins a comment.

    Raises
    ------
    ConfigError
        A line does not begin with a fingerprint, or there is none.
    OSError
        The file cannot be read.
    """
    check_regular(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text; it holds a fingerprint a line") from None
    pins = set()
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split(maxsplit=1)
        if not words:
            continue
        pin = words[0].lower()
        if not re.fullmatch("[0-9a-f]{4}(-[0-9a-f]{4}){7}", pin):
            raise ConfigError(
                f"{path}, line {number} begins with {quoted(words[0])}; it must begin with a fingerprint, "
                "eight groups of four digits 0 to f with - between"
            )
        pins.add(pin)
    if not pins:
        raise ConfigError(f"{path} has no fingerprint; it holds one a line")
    return frozenset(pins)
