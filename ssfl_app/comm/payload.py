"""Translates payloads to and from Flower records; nothing else does.

On the wire a message is a `RecordDict` of two records: "arrays" with one Flower `Array` per flat array of the
codec, and "facts", a `ConfigRecord` with the metadata. The arrays hold raw little-endian bytes under a serial
type of our own: no 128-byte ``.npy`` header each, no copy to read them, and Flower refuses to misread them.

Flower carries each record, array and 5 MB of an array as an object of its own, a request each. So to and from real
nodes arrays of `JOINED` bytes at most, all together, lie in "facts" too, and there is no "arrays": such an entry is
called by serial type, dtype, length and name, with spaces between.

Bytes of type uint8, bitmaps above all, can travel deflated: their layers have densities of their own, and far from
0.5 a bit holds less than one bit (wire.bitmaps).
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from ssfl_app.comm.client_files import Files, Folder, MaskFile, Store, client_state_errors, content_of
from ssfl_app.seal import Damaged, sealed, unsealed
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError
from ssfl_app.text import in_a_line, quoted

MetadataValue = bool | int | float | str | bytes
Metadata = dict[str, MetadataValue]
Facts = dict[str, Any]
"""What a client keeps of its exchanges, or of its privacy budget."""

SERIAL_TYPE, DEFLATED = "ssfl.raw.v1", "ssfl.zlib.v1"
JOINED = 2**20
"""Bytes of a message's arrays, at most, that travel as one object with its facts. Flower cuts arrays into chunks, and
no facts: with more of them one object would keep one connection busy while the other one has nothing to carry."""

_LENGTH = re.compile(r"[0-9]{1,12}")
_DTYPES = {np.dtype(t).name: np.dtype(t) for t in ("<f4", "<f2", "<u2", "<u4", "u1", "i1", "<i4", "<i8")}
FOLDER = "folder"
"""Fact of a message in simulation: where simulated clients keep their files."""

RUN = "run"
"""Fact of a message in deployment: 16 hex digits that tell this run's files on a node from another run's."""

CLIENT = "client"
"""Fact of a message to a site with data of its own: the number that its name has in this run."""

WITH_MASK = ("mask", "moved", "sheet", "fixed", "frozen")
"""Arrays that go down once per client, for the mask or with it; their bytes are counted apart."""

BEFORE = "before"
"""Fact of a message: digest of the mask from which that of the message differs at the places of "moved"."""

MASKS = "masks"
"""Folder of bitmaps, one file a digest, in the folder that simulated clients share."""
_MEMORY, _PERSONAL, _EXCHANGES, _LEDGER = "ssfl", "ssfl-personal", "ssfl-exchanges", "ssfl-privacy"


@dataclass(frozen=True)
class Payload:
    """What one message carries: flat arrays, which are counted, and metadata, a few scalars beside them."""

    arrays: Arrays = field(default_factory=dict)
    metadata: Metadata = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Payload bytes: those of the encoded arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def round(self) -> int:
        """The round that it belongs to; 0: before the first."""
        return int(self.metadata["round"])


def shared_buffers(arrays: Arrays) -> Arrays:
    """Return the arrays on read-only bytes of their own, which `PayloadEncoder` then sends without another copy."""
    return {name: np.frombuffer(array.tobytes(), array.dtype) for name, array in arrays.items()}


class PayloadEncoder:
    """Writes payloads as records; an array that many payloads share is serialised once.

    With `bitmaps` "zlib", not "plain", arrays of uint8 are deflated where that makes them smaller. With `join` small
    arrays travel in one object with the metadata, as to and from real nodes.
    """

    def __init__(self, bitmaps: str = "plain", *, join: bool = False) -> None:
        self._deflate, self._join = bitmaps == "zlib", join
        self._done: dict[int, tuple[npt.NDArray[Any], Array]] = {}

    def record(self, payload: Payload) -> RecordDict:
        """Return the payload as Flower records."""
        arrays = {name: self._array(array) for name, array in payload.arrays.items()}
        facts = ConfigRecord(dict(payload.metadata))
        if self._join and sum(len(array.data) for array in arrays.values()) <= JOINED:
            for name, array in arrays.items():
                facts[f"{array.stype} {array.dtype} {array.shape[0]} {name}"] = array.data
            return RecordDict({"facts": facts})
        return RecordDict({"arrays": ArrayRecord(arrays), "facts": facts})

    def nbytes(self, array: npt.NDArray[Any]) -> int:
        """Return the bytes that an array has on the wire."""
        return len(self._array(array).data)

    def _array(self, array: npt.NDArray[Any]) -> Array:
        # By name first: NumPy takes None, what `get` would return, for float64.
        known = array.dtype.name in _DTYPES and array.dtype == _DTYPES[array.dtype.name]
        if not known or array.ndim != 1:
            raise TypeError(f"an array is {array.dtype} of rank {array.ndim}; the wire takes flat {list(_DTYPES)}")
        if id(array) not in self._done:
            # The array is kept beside its record, so its id cannot be given to another one meanwhile.
            base = array.base
            data = base if isinstance(base, bytes) and len(base) == array.nbytes else array.tobytes()
            kind = SERIAL_TYPE
            if self._deflate and array.dtype == np.uint8 and len(small := zlib.compress(data)) < len(data):
                data, kind = small, DEFLATED
            self._done[id(array)] = (array, Array(array.dtype.name, array.shape, kind, data))
        return self._done[id(array)][1]


def decode_payload(record: RecordDict, allowed: Allowed | None = None, unfolded: int = 0) -> Payload:
    """Return the payload of Flower records, whoever sent them: `decode_arrays` and `decode_metadata`."""
    return Payload(decode_arrays(record, allowed, unfolded), decode_metadata(record))


def decode_arrays(record: RecordDict, allowed: Allowed | None = None, unfolded: int = 0) -> Arrays:
    """Return the arrays of a message, whoever sent it.

    They are read-only views of the received bytes. Records are looked up by name: the properties
    `array_records` and so on build reference cycles that would keep every reply alive.

    Parameters
    ----------
    allowed : Allowed, optional
        The arrays that the message may have. All others are refused before anything is unfolded, so that a refused
        message costs no more memory than its own bytes and a good one's. None: any.
    unfolded : int
        Without `allowed`: bytes that the deflated arrays may unfold to together.

    Raises
    ------
    PayloadError
        They are not what `PayloadEncoder` writes, or one is not allowed.
    """
    arrays = _encoded(record)
    for name, array in arrays.items():
        if array.dtype not in _DTYPES or array.stype not in (SERIAL_TYPE, DEFLATED):
            kind = f"{in_a_line(array.dtype, 20)} in {quoted(array.stype)}"
            raise PayloadError(f"array {in_a_line(name, 60)} is {kind}; it must be {SERIAL_TYPE!r}")
        if len(array.shape) != 1 or array.shape[0] < 0:
            raise PayloadError(f"array {in_a_line(name, 60)} has shape {_shape(array)}; it is flat")
        if allowed is not None:
            _check_allowed(name, array, allowed)
    # All of them together: many that are within the limit would fill the memory as well as one.
    total = sum(array.shape[0] for array in arrays.values() if array.stype == DEFLATED)
    if allowed is None and total > unfolded:
        raise PayloadError(f"deflated arrays have {total} bytes; together they have at most {unfolded}")
    return {name: _read_array(name, array) for name, array in arrays.items()}


def decode_metadata(record: RecordDict) -> Metadata:
    """Return the metadata of a message, and look at none of its arrays; PayloadError if they are no scalars."""
    metadata = {name: value for name, value in _lookup(record, "facts", ConfigRecord).items() if not _is_title(name)}
    for name, value in metadata.items():
        if not isinstance(value, bool | int | float | str | bytes):
            raise PayloadError(f"fact {in_a_line(name, 60)} is {type(value).__name__}; it must be a scalar")
    return metadata


def encoded_sizes(record: RecordDict) -> dict[str, int]:
    """Return the bytes of each encoded array of a message, {} if it is none that `PayloadEncoder` writes."""
    try:
        return {name: len(array.data) for name, array in _encoded(record).items()}
    except PayloadError:
        return {}


def _is_title(name: str) -> bool:
    return name.startswith((f"{SERIAL_TYPE} ", f"{DEFLATED} "))


def _encoded(record: RecordDict) -> Mapping[str, Array]:
    """Return the arrays of a message as they came, those that lie in the facts too."""
    if "facts" not in record or "arrays" in record:
        return _lookup(record, "arrays", ArrayRecord)  # type: ignore[no-any-return]
    found: dict[str, Array] = {}
    for title, data in _lookup(record, "facts", ConfigRecord).items():
        if _is_title(title):
            stype, _, rest = title.partition(" ")
            dtype, _, rest = rest.partition(" ")
            length, _, name = rest.partition(" ")
            if not _LENGTH.fullmatch(length) or not name or name in found or not isinstance(data, bytes):
                raise PayloadError(f"fact {in_a_line(title, 60)} is no array, or another one has its name")
            found[name] = Array(dtype, (int(length),), stype, data)
    return found


def _check_allowed(name: str, array: Array, allowed: Allowed) -> None:
    if name not in allowed:
        raise PayloadError(f"array {in_a_line(name, 60)} is none of this message's, which are {sorted(allowed)}")
    kind, most = allowed[name]
    if _DTYPES[array.dtype] != np.dtype(kind):
        raise PayloadError(f"{name} is {array.dtype}; it must be {np.dtype(kind)}")
    if array.shape[0] > most:
        raise PayloadError(f"{name} has length {array.shape[0]}; it has at most {most}")


def _lookup(record: RecordDict, name: str, kind: type) -> Any:
    found = record.get(name)
    if found is None:
        raise PayloadError(f"record {name!r} is not there; another app may have written the message")
    if not isinstance(found, kind):
        raise PayloadError(f"record {name!r} is {type(found).__name__}; it must be {kind.__name__}")
    return found


def _read_array(name: str, array: Array) -> npt.NDArray[Any]:
    dtype = _DTYPES[array.dtype]
    if array.stype == DEFLATED:
        if dtype != np.uint8:
            what = f"{array.dtype} in {DEFLATED!r}"
            raise PayloadError(f"array {in_a_line(name, 60)} is {what}; it must be {SERIAL_TYPE!r}")
        return np.frombuffer(_inflate(name, array), dtype=np.uint8)
    if array.shape[0] != len(array.data) // dtype.itemsize or len(array.data) % dtype.itemsize:
        what = f"{len(array.data)} bytes of {array.dtype}"
        raise PayloadError(f"array {in_a_line(name, 60)} has shape {_shape(array)} and {what}")
    return np.frombuffer(array.data, dtype=dtype)


def _inflate(name: str, array: Array) -> bytes:
    size, reader = array.shape[0], zlib.decompressobj()
    try:
        data = reader.decompress(array.data, size + 1)  # never more than that, whatever the bytes would unfold to
    except zlib.error as error:
        raise PayloadError(f"array {in_a_line(name, 60)} cannot be inflated: {error}") from error
    if len(data) != size or not reader.eof or reader.unused_data:
        what = f"{len(data)} bytes or more; its shape is {_shape(array)}"
        raise PayloadError(f"array {in_a_line(name, 60)} inflates to {what}")
    return data


def _shape(array: Array) -> str:
    return quoted(tuple(array.shape[:9]))


class ClientState:
    """What a client keeps between messages: a mask, and personal state by the round it was made in.

    Flower's `Context.state` is the store in deployment; it dies with the SuperNode there, so it may be found empty at
    any time, unless the SuperNode was given a folder for what must survive. In simulation the state lies in the
    server's process, once per client, and crosses to a worker and back with every message: there the server names a
    folder, and bitmaps and personal models are files in it.

    Parameters
    ----------
    folder : Path or Store, optional
        A folder that all clients of this machine share, or what stands for one on another machine.
    survives : bool
        Whether the mask that is held must be found in `folder` alone, after a restart, and not in Flower's state too.
    journal : Path, optional
        File that says which exchanges were masked and unmasked; default: Flower's state. It lives as long as the key:
        what was masked with a key can be opened if the same exchange is played again without it.

    Attributes
    ----------
    notes : list of str
        What was found damaged or missing, for people to read.

    Raises
    ------
    ClientStateError
        Each of its methods, where the file system fails.
    """

    def __init__(
        self,
        context: Context,
        client: int,
        folder: Path | Store | None = None,
        survives: bool = False,
        journal: Path | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._state, own = context.state, f"client-{client:05d}"
        self._store = store = Folder(folder) if isinstance(folder, Path) else folder
        self._personal = _Records(context.state) if store is None else Files(store, own)
        self._mask = MaskFile(store, own) if store is not None and survives else None
        past = None if journal is None else Folder(journal.parent)
        self._exchanges = _Facts(context.state, _EXCHANGES, past, journal.name if journal else "")
        self._ledger = _Facts(context.state, _LEDGER, store, f"{own}/privacy.safetensors")

    def bitmap(self, digest: str) -> npt.NDArray[np.uint8] | None:
        """Return the bitmap that is kept of the mask with this digest, or None; a disk may have damaged it."""
        if self._mask is not None:
            content = self._mask.read(digest)
            return None if content is None else np.frombuffer(content, dtype=np.uint8)
        held = self._state.get(_MEMORY)
        if not isinstance(held, ConfigRecord) or held["digest"] != digest:
            return None
        own: Any = held.get("mask")
        content = bytes(own) if self._store is None else content_of(self._store, f"{MASKS}/{digest}")
        return None if content is None else np.frombuffer(content, dtype=np.uint8)

    @client_state_errors()
    def keep(self, digest: str, bitmap: npt.NDArray[np.uint8]) -> None:
        """Keep a mask; it replaces the one before."""
        if self._mask is not None:
            self._mask.write(digest, bitmap.tobytes())
            return
        if self._store is not None:
            name = f"{MASKS}/{digest}"
            if content_of(self._store, name) != bitmap.tobytes():  # the first of its clients, or it was damaged
                self._store.write(name, bitmap.tobytes())
            self._state[_MEMORY] = ConfigRecord({"digest": digest})
            return
        self._state[_MEMORY] = ConfigRecord({"digest": digest, "mask": bitmap.tobytes()})

    @client_state_errors()
    def ledger(self) -> Facts:
        """Return what was written last by `change_ledger`, or {}: unlike personal state it knows no going back.

        Raises
        ------
        PayloadError
            It is damaged: nobody knows what was spent.
        """
        return self._ledger.read()

    @client_state_errors()
    def change_ledger(self, change: Callable[[Facts], Facts]) -> Facts:
        """Keep and return what `change` makes of what was spent of the privacy budget.

        It is on the disk, if there is a folder, when this returns; another process changes it before or after.
        """
        return self._ledger.change(change)

    @client_state_errors()
    def load(self, since: int) -> Arrays | None:
        """Return the personal state of the last round that the server accepted, or None if there is none.

        If that is damaged or missing, it is the version before, or None, and a note says so.

        Parameters
        ----------
        since : int
            That round, 0 if there is none. What was made later came from a reply that the server never took (it was
            lost or refused, or belongs to an interrupted run that is being played again): it never happened, and is
            deleted.
        """
        for late in [version for version in self._personal.rounds() if version > since]:
            self._personal.delete(late)
        fault = "is missing"
        for version in reversed(self._personal.rounds()):
            try:
                _, arrays = unsealed(self._personal.read(version))
            except Damaged as error:
                self._personal.delete(version)
                fault = str(error) if version == since else fault
                continue
            if version < since:
                self._note(f"its personal state of round {since} {fault}; it went on from that of round {version}")
            return arrays
        if since:
            self._note(f"its personal state of round {since} {fault}; it began anew")
        return None

    @client_state_errors()
    def masked(self, exchange: int) -> Facts:
        """Return what was kept when this client masked an answer, in this exchange and in none since.

        Raises
        ------
        PayloadError
            It did not.
        """
        return _masked_in(self._exchanges.read(), exchange)

    @client_state_errors()
    def note_masked(self, exchange: int, asked: int, **kept: str) -> None:
        """Note an exchange before an answer is masked in it, what was asked, and what is needed to unmask its sum.

        `asked` is a number that other questions do not have; 0: sums over other clients of the same answers do no
        harm, as they have noise.

        Raises
        ------
        PayloadError
            It is not later than the last one: a second answer would tell the server what the first one hides.
        """
        self._exchanges.change(lambda held: _later(held, "masked", exchange) | {"asked": asked, **kept})

    @client_state_errors()
    def note_unmasked(self, exchange: int, over: int) -> None:
        """Note an exchange before its sum is unmasked; `over` is a number that other clients in it would not have.

        Raises
        ------
        PayloadError
            This client unmasked it already, or another sum, over other clients, of answers to the same question: the
            difference of the two is the answers of few.
        """

        def noted(held: Facts) -> Facts:
            told = f"sum-{_masked_in(held, exchange)['asked']}"  # another process may have masked a later one
            held = _later(held, "unmasked", exchange)
            if held["asked"] and held.get(told, over) != over:
                raise PayloadError(
                    "a sum of these very answers was told over other clients; the difference of two is that of few. "
                    "The same is asked again where a round is repeated, or left the model as it was"
                )
            return held | ({told: over} if held["asked"] else {})

        self._exchanges.change(noted)

    def _note(self, text: str) -> None:
        if text not in self.notes:  # a client may load its state more than once for one message
            self.notes.append(text)

    @client_state_errors()
    def save(self, round_: int, arrays: Arrays, back_to: int) -> None:
        """Keep the personal state made in a round, and what is needed to go back to round `back_to`."""
        self._personal.write(round_, sealed({"round": round_}, arrays))
        older = [version for version in self._personal.rounds() if version <= back_to]
        for version in older[:-1]:
            self._personal.delete(version)


def _masked_in(held: Facts, exchange: int) -> Facts:
    if held.get("masked") != exchange:
        raise PayloadError(f"exchange is {exchange}; this client sent no masked answer in it")
    return held


def _later(held: Facts, what: str, exchange: int) -> Facts:
    if exchange <= held.get(what, 0):
        raise PayloadError(f"exchange is {exchange}; this client has {what} that of {held[what]} already")
    return held | {what: exchange}


class _Facts:
    """A few numbers and texts that know no going back: a sealed file, or a record of Flower's state without one."""

    def __init__(self, state: RecordDict, name: str, store: Store | None, file: str) -> None:
        self._state, self._name, self._store, self._file = state, name, store, file

    def read(self) -> Facts:
        held = self._state.get(self._name)
        if self._store is None:
            return dict(held) if isinstance(held, ConfigRecord) else {}
        try:
            return unsealed(self._store.read(self._file))[0]
        except FileNotFoundError:
            return {}
        except Damaged as error:
            what = "the ledger of this client's privacy budget" if self._name == _LEDGER else "what it has masked"
            raise PayloadError(f"{what} is damaged; it answers no more") from error

    def change(self, change: Callable[[Facts], Facts]) -> Facts:
        """Write and return what `change` makes of the facts; no other process writes in between."""
        if self._store is None:
            facts = change(self.read())
            self._state[self._name] = ConfigRecord(dict(facts))
            return facts
        with self._store.alone(self._file):
            facts = change(self.read())
            self._store.write(self._file, sealed(facts, {}))
        return facts


class _Records:
    """Versions as entries of a record of Flower's state; methods as `Files` has them."""

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def _held(self) -> ConfigRecord:
        held = self._state.get(_PERSONAL)
        return held if isinstance(held, ConfigRecord) else ConfigRecord()

    def rounds(self) -> list[int]:
        return sorted(map(int, self._held()))

    def read(self, round_: int) -> bytes:
        return bytes(self._held()[str(round_)])  # type: ignore[arg-type]

    def write(self, round_: int, content: bytes) -> None:
        self._state[_PERSONAL] = ConfigRecord({**self._held(), str(round_): content})

    def delete(self, round_: int) -> None:
        kept = {name: content for name, content in self._held().items() if name != str(round_)}
        self._state[_PERSONAL] = ConfigRecord(kept)
