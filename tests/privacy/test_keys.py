"""Key pairs: what two have in common, where they are kept, and what people compare."""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from ssfl_app.options import ConfigError
from ssfl_app.privacy import keys
from ssfl_app.privacy.keys import KeyPair, fingerprint, load_or_make, read_pins
from ssfl_app.sparsity.values import PayloadError

# RFC 7748, section 6.1.
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOTH = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")


def test_a_pair_is_that_of_the_standard() -> None:
    alice, bob = KeyPair.of(ALICE), KeyPair.of(BOB)
    assert alice.public == ALICE_PUBLIC
    assert alice.shared(bob.public) == bob.shared(alice.public) == BOTH


def test_each_new_pair_is_another_one() -> None:
    one, two = KeyPair.new(), KeyPair.new()
    assert one.public != two.public
    assert one.private_bytes() != two.private_bytes()
    assert KeyPair.of(one.private_bytes()).public == one.public
    with pytest.raises(ValueError, match="32"):
        KeyPair.of(bytes(31))


@pytest.mark.parametrize(
    "public", [b"", bytes(31), bytes(33), bytes(32), b"\1" + bytes(31)], ids=["none", "short", "long", "zero", "one"]
)
def test_a_key_of_wrong_length_or_small_order_is_refused(public: bytes) -> None:
    with pytest.raises(PayloadError, match=r"public key is '[0-9a-f]*'; it must be 32 bytes, a key of X25519"):
        KeyPair.new().shared(public)


def test_a_fingerprint_is_half_of_a_sha256_in_groups_of_four() -> None:
    told = fingerprint(ALICE_PUBLIC)
    assert told.replace("-", "") == hashlib.sha256(ALICE_PUBLIC).hexdigest()[:32]
    assert [len(group) for group in told.split("-")] == [4] * 8


def test_a_pair_is_made_once_and_its_account_alone_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "made" / "key.json"
    pair = load_or_make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert load_or_make(path).private_bytes() == pair.private_bytes()
    assert [file.name for file in path.parent.glob("[!.]*")] == ["key.json"]
    assert load_or_make(tmp_path / "other" / "key.json").public != pair.public


def test_two_processes_that_find_no_pair_have_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, turn, made, write = Barrier(2), itertools.count(), KeyPair.new, keys.write_atomically

    def new() -> KeyPair:
        with contextlib.suppress(BrokenBarrierError):
            both.wait(0.3)  # for the other one, which may not be in here
        return made()

    def slow(*given: Any, **how: Any) -> None:
        time.sleep(0.2 * next(turn))
        write(*given, **how)

    monkeypatch.setattr(KeyPair, "new", new)
    monkeypatch.setattr(keys, "write_atomically", slow)
    path = tmp_path / "key.json"
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(load_or_make, [path, path])
    assert one.public == other.public == load_or_make(path).public


def swapped(path: Path) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"public": KeyPair.new().public.hex()}))


def readable(path: Path) -> None:
    path.chmod(0o640)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o770)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (swapped, "key.json is damaged: its keys are no pair"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "key.json is damaged: it holds no key pair"),
        (lambda path: path.write_bytes(b"\xff"), "key.json is damaged: it holds no key pair"),
        (
            lambda path: path.write_text('{"private": "00", "public": ""}'),
            "key.json is damaged: it holds no key pair",
        ),
        (lambda path: path.write_text("[]"), "key.json is damaged: it holds no key pair"),
        (readable, "key.json has mode 640; it must be 600"),
        (open_folder, "made has mode 770; it holds a private key"),
    ],
)
def test_a_damaged_or_open_file_is_refused(tmp_path: Path, harm: Callable[[Path], object], what: str) -> None:
    path = tmp_path / "made" / "key.json"
    private = load_or_make(path).private_bytes()
    harm(path)
    with pytest.raises(ConfigError, match=what) as refused:
        load_or_make(path)
    assert private.hex() not in str(refused.value)


def test_no_key_is_made_where_others_may_replace_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="has mode 777"):
        load_or_make(tmp_path / "key.json")
    assert not list(tmp_path.iterdir())


def test_pins_are_fingerprints_with_names_and_comments(tmp_path: Path) -> None:
    one, two = (fingerprint(KeyPair.new().public) for _ in range(2))
    path = tmp_path / "pins"
    path.write_text(f"# of the five sites\n\n{one}  Hospital Nord # by telephone\n  {two.upper()}\n")
    assert read_pins(path) == {one, two}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# nobody\n", "pins has no fingerprint"),
        ("{pin}\n{pin}0 Nord\n", "pins, line 2 begins with '{pin}0'; it must begin with a fingerprint"),
        ("\n\nNord {pin}\n", "pins, line 3 begins with 'Nord'"),
        ("{short}\n", "pins, line 1 begins with '{short}'"),
    ],
)
def test_a_line_without_a_fingerprint_is_named(tmp_path: Path, text: str, what: str) -> None:
    pin = fingerprint(ALICE_PUBLIC)
    path, names = tmp_path / "pins", {"pin": pin, "short": pin[:-5]}
    path.write_text(text.format(**names))
    with pytest.raises(ConfigError, match=what.format(**names)):
        read_pins(path)


def test_pins_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pins").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="pins is no text"):
        read_pins(tmp_path / "pins")
