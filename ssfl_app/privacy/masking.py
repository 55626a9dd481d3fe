"""Secure aggregation: a server adds up vectors of whole numbers and learns their sum, modulo 2**16 or 2**32, alone.

Each client adds two kinds of uniform numbers to its vector: a mask of its own, from a fresh secret, and one for each
of its neighbours, from a secret that the two agree on, which one of them adds and the other subtracts. The pair masks
of clients that uploaded cancel in the sum. For what is left each client gives its neighbours shares of its secrets,
encrypted, beside its vector. In a second exchange those who uploaded tell the server their shares: of the own secret
of each client that uploaded, and of its pair secrets with those that did not. So never are both told, a client's own
secret and all its pair secrets, and the others make up for a client that is gone by then.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, and, for the
sparse graph, Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020; pair secrets
serve one exchange, so that no long-lived key is ever shared. docs/privacy.md says who learns what.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ssfl_app.privacy.keys import KEY_BYTES, KeyPair
from ssfl_app.seeding import generator
from ssfl_app.sparsity.values import Allowed, Arrays, PayloadError, read_array

MOST_NEIGHBOURS = 30
"""Neighbours of a client in a large federation."""

LEAST_NEIGHBOURS = 2
"""Fewer, and a client sends nothing: of two clients each would learn the other's vector from the sum."""

_SECRET = 16  # bytes of a secret and of each share of it: what Shamir takes
_TAG = 16  # bytes that ChaCha20-Poly1305 adds
_CHECK = 8  # bytes by which a secret is known again
_PEER = 4 + KEY_BYTES
_DIGEST = 32
_BLOCK = 1 << 18  # bytes of key stream made at once: they stay in the second cache


class TooFew(RuntimeError):
    """So few neighbours of a client are left that its masks cannot be removed from the sum any more.

    `client` is its number (None: nobody uploaded), `left` how many of its neighbours are left of the `needed` ones.
    """

    def __init__(self, client: int | None, left: int, needed: int) -> None:
        super().__init__(client, left, needed)
        self.client, self.left, self.needed = client, left, needed

    def __str__(self) -> str:
        if self.client is None:
            return "no client uploaded"
        have = f"{self.left} neighbours of client {self.client} are left"
        return f"{have}; at least {self.needed} are needed (privacy.threshold)"


class FalseShares(PayloadError):
    """Shares make another secret than the one that was shared; `clients` are those of which one or more lied."""

    def __init__(self, text: str, clients: tuple[int, ...]) -> None:
        super().__init__(text)
        self.clients = clients


@dataclass(frozen=True)
class Peer:
    """A client as another one knows it: its number and its public key."""

    number: int
    public: bytes


def write_peers(peers: Iterable[Peer]) -> npt.NDArray[np.uint8]:
    """Return the array that carries peers: 4 bytes of number, little-endian, and 32 of key for each."""
    return _array(b"".join(peer.number.to_bytes(4, "little") + peer.public for peer in peers))


def read_peers(array: npt.NDArray[Any]) -> tuple[Peer, ...]:
    """Return the peers that an array carries.

    Raises
    ------
    PayloadError
        It is of another type or length, the numbers do not ascend, or two peers have the same key.
    """
    content = read_array({"peers": array}, "peers", np.uint8, None).tobytes()
    if len(content) % _PEER:
        raise PayloadError(f"peers has length {len(content)}; it must be a multiple of {_PEER}")
    rows = _pieces(content, _PEER)
    peers = tuple(Peer(int.from_bytes(row[:4], "little"), row[4:]) for row in rows)
    for before, peer in pairwise(peers):
        if before.number >= peer.number:
            raise PayloadError(f"peers has {peer.number} behind {before.number}; the numbers must ascend")
    owners: dict[bytes, int] = {}
    for peer in peers:
        if owners.setdefault(peer.public, peer.number) != peer.number:
            raise PayloadError(f"peers {owners[peer.public]} and {peer.number} have the same public key")
    return peers


def ring_order(clients: Iterable[int], seed: int, where: int | str, most: int = MOST_NEIGHBOURS) -> list[int]:
    """Return the ring that so many clients make, drawn from `seed` for `where`; none: all of them are neighbours."""
    known = sorted(set(clients))
    if len(known) - 1 <= most:
        return []
    return [known[place] for place in generator(seed, "neighbours", where).permutation(len(known))]


def neighbours(
    clients: Iterable[int], seed: int, where: int | str, most: int = MOST_NEIGHBOURS
) -> dict[int, tuple[int, ...]]:
    """Return the neighbours of each client, ascending; who has a neighbour is one of its neighbours.

    All others are, up to `most`. Of more clients, each is joined with the `most` / 2 before and behind it in a ring
    whose order is drawn from `seed` for this exchange, or for all that ask the same (`ring_order`).
    """
    known, order = sorted(set(clients)), ring_order(clients, seed, where, most)
    if not order:
        return {client: tuple(other for other in known if other != client) for client in known}
    near = {
        order[i]: tuple(sorted(order[(i + step) % len(order)] for step in _steps(most))) for i in range(len(order))
    }
    return {client: near[client] for client in known}


def _steps(most: int) -> list[int]:
    return [step for step in range(-(most // 2), most // 2 + 1) if step]


@dataclass(frozen=True)
class Ring:
    """What a client of a large exchange is told of its ring, so that all clients have one and the same.

    Attributes
    ----------
    clients : int
        Of the exchange.
    place : int
        The client's own, from 0.
    order : tuple of int
        Which of its peers, which ascend by number, are before it and behind it, from the farthest before it on.
    proof : tuple of bytes
        Digests of the parts of the ring that it does not see, in order: with what it sees they make the root of a
        Merkle tree over all places.
    """

    clients: int
    place: int
    order: tuple[int, ...]
    proof: tuple[bytes, ...]

    def written(self) -> npt.NDArray[np.uint8]:
        """Return the array that carries it: 4 bytes each of clients and place, one a peer, 32 a digest."""
        numbers = self.clients.to_bytes(4, "little") + self.place.to_bytes(4, "little")
        return _array(numbers + bytes(self.order) + b"".join(self.proof))

    @classmethod
    def read(cls, array: npt.NDArray[Any], peers: int) -> "Ring":
        """Return what an array carries for a client with so many peers; PayloadError if it is none."""
        content = read_array({"ring": array}, "ring", np.uint8, None).tobytes()
        numbers, order, proof = content[:8], content[8 : 8 + peers], content[8 + peers :]
        clients, place = int.from_bytes(numbers[:4], "little"), int.from_bytes(numbers[4:], "little")
        if sorted(order) != list(range(peers)) or len(proof) % _DIGEST or not place < clients or clients <= peers + 1:
            raise PayloadError(f"ring has {len(content)} bytes; it is that of client {place} of {clients}")
        return cls(clients, place, tuple(order), tuple(_pieces(proof, _DIGEST)))

    def places(self, peers: Sequence[Peer]) -> dict[int, int]:
        """Return the place of each peer, by number."""
        steps = _steps(len(peers))
        return {
            peers[which].number: (self.place + step) % self.clients
            for step, which in zip(steps, self.order, strict=True)
        }

    def root(self, me: Peer, peers: Sequence[Peer]) -> bytes:
        """Return the digest of the ring in which this client and its peers have these places.

        Raises
        ------
        PayloadError
            The proof is too short or too long.
        """
        places, rest = self.places(peers), iter(self.proof)
        known = {self.place: _leaf(me)} | {places[peer.number]: _leaf(peer) for peer in peers}

        def unseen(low: int, high: int) -> bytes:
            digest = next(rest, None)
            if digest is None:
                raise PayloadError(f"ring has {len(self.proof)} digests; they are too few")
            return digest

        root = _digest_of(0, self.clients, known, unseen)
        if next(rest, None) is not None:
            raise PayloadError(f"ring has {len(self.proof)} digests; they are too many")
        return root


class RingTree:
    """The server's ring: a Merkle tree (RFC 6962, section 2.1) over the clients in their order."""

    def __init__(self, order: Sequence[int], publics: Mapping[int, bytes], most: int = MOST_NEIGHBOURS) -> None:
        self._order, self._most = order, most
        self._place = {client: place for place, client in enumerate(order)}
        self._leaves = [_leaf(Peer(client, publics[client])) for client in order]
        self._part = lru_cache(maxsize=None)(self._digest)

    def told(self, client: int) -> Ring:
        """Return what a client is told."""
        count, place, proof = len(self._order), self._place[client], list[bytes]()
        seen = [self._order[(place + step) % count] for step in _steps(self._most)]
        known = {self._place[each]: self._leaves[self._place[each]] for each in (client, *seen)}

        def unseen(low: int, high: int) -> bytes:
            proof.append(self._part(low, high))
            return proof[-1]

        _digest_of(0, count, known, unseen)
        rank = {each: which for which, each in enumerate(sorted(seen))}
        return Ring(count, place, tuple(rank[each] for each in seen), tuple(proof))

    def _digest(self, low: int, high: int) -> bytes:
        if high - low == 1:
            return self._leaves[low]
        middle = _middle(low, high)
        return hashlib.sha256(b"\1" + self._part(low, middle) + self._part(middle, high)).digest()


@lru_cache
def ring_bytes(clients: int) -> int:
    """Return the bytes of a ring of so many clients as one in its middle is told; 0: there is none."""
    order = list(range(clients)) if clients - 1 > MOST_NEIGHBOURS else []
    if not order:
        return 0
    return RingTree(order, dict.fromkeys(order, bytes(KEY_BYTES))).told(clients // 2).written().nbytes


def _leaf(peer: Peer) -> bytes:
    return hashlib.sha256(b"\0" + write_peers((peer,)).tobytes()).digest()


def _middle(low: int, high: int) -> int:
    return low + (1 << ((high - low - 1).bit_length() - 1))


def _digest_of(low: int, high: int, known: Mapping[int, bytes], unseen: Callable[[int, int], bytes]) -> bytes:
    """Return the digest of the places from `low` to below `high`, of which `known` has the leaves that are seen."""
    if not any(low <= place < high for place in known):
        return unseen(low, high)
    if high - low == 1:
        return known[low]
    middle = _middle(low, high)
    parts = _digest_of(low, middle, known, unseen) + _digest_of(middle, high, known, unseen)
    return hashlib.sha256(b"\1" + parts).digest()


def needed(threshold: float, peers: int) -> int:
    """Return how many of a client's `peers` neighbours must answer: more than the share `threshold` of them."""
    # 0.58 * 50 is a little less than 29, of which more are needed as of 29 itself.
    return min(peers, math.floor(threshold * peers + 1e-9) + 1)


def allowed(neighbours: int) -> Allowed:
    """Return the arrays that a client with so many neighbours sends beside its values, and in the second exchange.

    Those of the second exchange are shorter; `MaskedSum` checks the length of both.
    """
    return {"shares": (np.uint8, _shares_size(neighbours)), "pair-shares": (np.uint8, _pair_shares_size(neighbours))}


def peers_bytes(neighbours: int) -> int:
    """Return the bytes of so many peers (`write_peers`)."""
    return neighbours * _PEER


def second_bytes(neighbours: int) -> tuple[int, int]:
    """Return the bytes of a client's request and answer in the second exchange, without dropouts."""
    return neighbours * (_CHECK + _SECRET + _TAG) + 4 * (neighbours + 1), neighbours * _SECRET


class Masker:
    """A client in one exchange.

    Parameters
    ----------
    key : KeyPair
        The client's own.
    number : int
        The client's own.
    peers : tuple of Peer
        Its neighbours, by ascending number, as `read_peers` returns them.
    about : bytes
        Run, exchange and question. No two exchanges of a key pair may have the same: masks would repeat.
    threshold : float
        ``privacy.threshold``.
    dtype : DTypeLike
        uint16 or uint32.
    most : int
        Neighbours of a client in a large federation.
    ring : Ring, optional
        Of a large federation. Without one all clients of the exchange are neighbours.

    Raises
    ------
    PayloadError
        There are fewer than `LEAST_NEIGHBOURS`, or in a ring another number of them than `most`; this client itself
        is among them, or a key is none.
    """

    def __init__(
        self,
        key: KeyPair,
        number: int,
        peers: tuple[Peer, ...],
        about: bytes,
        threshold: float,
        dtype: npt.DTypeLike,
        most: int = MOST_NEIGHBOURS,
        ring: Ring | None = None,
    ) -> None:
        if ring is not None and len(peers) != most:
            raise PayloadError(f"client {number} has {len(peers)} neighbours in a ring; they must be {most}")
        if len(peers) < LEAST_NEIGHBOURS:
            raise PayloadError(f"client {number} has {len(peers)} neighbours; it needs at least {LEAST_NEIGHBOURS}")
        if any(peer.number == number or peer.public == key.public for peer in peers):
            raise PayloadError(f"client {number} is among its own neighbours, by number or key")
        self._me, self._peers, self._about, self._threshold = Peer(number, key.public), peers, about, threshold
        # A graph of the server's choice could keep those who are told that a client dropped from its neighbours. So
        # masks and shares are bound to the list of all clients, or to the ring and the places in it.
        self._places: dict[int, int] = {}
        if ring is None:
            everybody = sorted((*peers, self._me), key=lambda peer: peer.number)
            among = hashlib.sha256(write_peers(everybody).tobytes()).digest()
        else:
            self._places = {number: ring.place} | ring.places(peers)
            among = b"ring" + ring.clients.to_bytes(4, "little") + ring.root(self._me, peers)
        self._among = about + among
        self._dtype = _whole(dtype)
        self._secrets = {peer.number: _shared(key, peer) for peer in peers}
        self._masked = False

    @property
    def people(self) -> tuple[Peer, ...]:
        """The neighbours, and this client itself."""
        return (*self._peers, self._me)

    def mask(self, values: npt.NDArray[Any]) -> Arrays:
        """Add all masks to `values`, shape (n,), in place, once; return the arrays that travel beside it.

        ``shares`` and ``pair-shares``: a few bytes by which the server knows this client's secrets again when it has
        them, then a part for each neighbour, ascending, encrypted for it: its share of this client's own secret; its
        shares of this client's pair secrets, one a neighbour.
        """
        if values.dtype != self._dtype or values.ndim != 1 or not values.flags.c_contiguous:
            raise ValueError(f"values are {values.dtype} of rank {values.ndim}; they must be flat {self._dtype}")
        if self._masked:
            raise ValueError("this client has masked values in this exchange already")
        self._masked = True  # its keys serve once
        own, number = os.urandom(_SECRET), self._me.number
        pairs = {peer.number: self._pair_secret(peer) for peer in self._peers}
        streams = [(self._stream(own), 1)]
        streams += [(self._stream(secret), _sign(number, other)) for other, secret in pairs.items()]
        _add(values, streams)

        shared = [self._split(secret) for secret in (own, *pairs.values())]
        context = write_peers(self._peers).tobytes()
        mark = _check(own, self._about)
        shares = [mark]
        pair_shares = [_check(secret, self._about) for secret in pairs.values()]
        for place, peer in enumerate(self._peers):
            of_own, *of_pairs = (rows[place] for rows in shared)
            shares.append(self._seal(b"share", peer, mark, of_own, b""))
            pair_shares.append(self._seal(b"pair shares", peer, mark, b"".join(of_pairs), context))
        return {"shares": _array(b"".join(shares)), "pair-shares": _array(b"".join(pair_shares))}

    def unmask(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the shares that the server asks for in the second exchange, which `MaskedSum.requests` writes.

        Whoever calls this sees to it that the client answers once an exchange, and only if it uploaded. ``shares``:
        of the own secrets of the neighbours that uploaded, ascending. ``pair-shares``: of the pair secrets of those,
        one for each of *their* neighbours that did not.

        Raises
        ------
        PayloadError
            The server's story is not one story: a client uploaded and did not, is in no list or nobody's, has
            another key than this client knows; it leaves too few neighbours; or a share was not encrypted for this
            client in this exchange.
        """
        people = self._people(arrays)
        uploaded, dropped = self._story(arrays, people)
        near = [peer for peer in self._peers if peer.number in uploaded]
        self._enough(self._me.number, len(near), len(self._peers))
        size = _CHECK + _SECRET + _TAG
        parts = _pieces(read_array(arrays, "shares", np.uint8, size * len(near)).tobytes(), size)
        marks = [part[:_CHECK] for part in parts]
        shares = [
            self._open(b"share", peer, part[:_CHECK], part[_CHECK:], b"")
            for peer, part in zip(near, parts, strict=True)
        ]

        pair_shares: list[bytes] = []
        if "neighbours" in arrays:
            lists = self._lists(arrays, people, near)
            sizes = [_SECRET * len(theirs) + _TAG if theirs else 0 for theirs in lists]
            content = read_array(arrays, "pair-shares", np.uint8, sum(sizes)).tobytes()
            for peer, mark, theirs, size in zip(near, marks, lists, sizes, strict=True):
                part, content = content[:size], content[size:]
                gone = [place for place, other in enumerate(theirs) if other.number in dropped]
                self._enough(peer.number, len(theirs) - len(gone), len(theirs))
                if gone:
                    # The list is part of what its owner encrypted: the places in it mean the clients it had in mind.
                    context = write_peers(theirs).tobytes()
                    told = _pieces(self._open(b"pair shares", peer, mark, part, context), _SECRET)
                    pair_shares += [told[place] for place in gone]
        return {"shares": _array(b"".join(shares)), "pair-shares": _array(b"".join(pair_shares))}

    def _people(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, Peer]:
        """Return the clients of the second message by number: those this client knows, and perhaps more."""
        own = {peer.number: peer for peer in self.people}
        if "peers" not in arrays:
            return own
        people = {peer.number: peer for peer in read_peers(arrays["peers"])}
        for number, peer in own.items():
            if people.get(number) != peer:
                raise PayloadError(f"client {number} is not in peers, or not with the key of the first message")
        return people

    def _story(self, arrays: Mapping[str, npt.NDArray[Any]], people: dict[int, Peer]) -> tuple[set[int], set[int]]:
        """Return who uploaded and who did not; each client is one of both."""
        uploaded, dropped = (
            set(read_array(arrays, name, np.uint32, None).tolist()) for name in ("uploaded", "dropped")
        )
        for what, who in (
            ("named as uploaded and as dropped", uploaded & dropped),
            ("named neither as uploaded nor as dropped", people.keys() - uploaded - dropped),
            ("named as uploaded or dropped, but is nobody this client knows", (uploaded | dropped) - people.keys()),
            ("named as dropped, but is this client, which uploaded", dropped & {self._me.number}),
        ):
            if who:
                raise PayloadError(f"client {min(who)} is {what}")
        return uploaded, dropped

    def _lists(
        self, arrays: Mapping[str, npt.NDArray[Any]], people: dict[int, Peer], near: list[Peer]
    ) -> list[list[Peer]]:
        """Return the neighbours of each of `near`, or none where they do not matter."""
        numbers = read_array(arrays, "neighbours", np.uint32, None).tolist()
        lists, place = [], 0
        for peer in near:
            count = numbers[place] if place < len(numbers) else -1
            theirs, place = numbers[place + 1 : place + 1 + max(count, 0)], place + 1 + max(count, 0)
            if len(theirs) != count or not people.keys() >= set(theirs):
                raise PayloadError(f"neighbours of client {peer.number} are cut short, or nobody this client knows")
            lists.append([people[number] for number in theirs])
        if place != len(numbers):
            raise PayloadError(f"neighbours has length {len(numbers)}; it must be {place}")
        return lists

    def _enough(self, number: int, left: int, count: int) -> None:
        if count and left < (least := needed(self._threshold, count)):
            raise PayloadError(f"{left} of {count} neighbours of client {number} uploaded; at least {least} must")

    def _pair_secret(self, peer: Peer) -> bytes:
        # With their numbers: a client under another number is another one, which has answered nothing yet.
        both = self._written(sorted((self._me, peer), key=lambda peer: peer.number))
        return _derive(self._secrets[peer.number], b"pair secret", both + self._among, _SECRET)

    def _written(self, peers: Sequence[Peer]) -> bytes:
        # With places: a client that stands in a ring twice is at each of them another one.
        places = [self._places[peer.number].to_bytes(4, "little") for peer in peers] if self._places else []
        return write_peers(peers).tobytes() + b"".join(places)

    def _stream(self, secret: bytes) -> bytes:
        return _derive(secret, b"stream", self._about, KEY_BYTES)

    def _split(self, secret: bytes) -> list[bytes]:
        count = len(self._peers)
        return [share for _, share in Shamir.split(needed(self._threshold, count), count, secret, False)]

    def _cipher(self, purpose: bytes, sender: Peer, receiver: Peer) -> ChaCha20Poly1305:
        other = receiver if sender == self._me else sender
        context = self._written((sender, receiver)) + self._among
        return ChaCha20Poly1305(_derive(self._secrets[other.number], purpose, context, KEY_BYTES))

    def _seal(self, purpose: bytes, receiver: Peer, mark: bytes, content: bytes, context: bytes) -> bytes:
        return self._cipher(purpose, self._me, receiver).encrypt(_nonce(mark), content, context)

    def _open(self, purpose: bytes, sender: Peer, mark: bytes, part: bytes, context: bytes) -> bytes:
        try:
            return self._cipher(purpose, sender, self._me).decrypt(_nonce(mark), part, context)
        except InvalidTag:
            raise PayloadError(
                f"{purpose.decode()} of client {sender.number}: not encrypted for client {self._me.number} in this "
                "exchange"
            ) from None


class MaskedSum:
    """The server in one exchange: adds masked vectors, then removes the masks from their sum.

    Parameters
    ----------
    size : int
        Length of the vectors.
    dtype : DTypeLike
        uint16 or uint32.
    graph : dict of int to tuple of int
        Each client's neighbours, as `neighbours` returns them.
    publics : dict of int to bytes
        Each client's public key.
    about : bytes
        As the clients' `Masker` has it.
    threshold : float
        ``privacy.threshold``.
    """

    def __init__(
        self,
        size: int,
        dtype: npt.DTypeLike,
        graph: dict[int, tuple[int, ...]],
        publics: dict[int, bytes],
        about: bytes,
        threshold: float,
    ) -> None:
        self._sum: npt.NDArray[Any] = np.zeros(size, _whole(dtype))
        self._graph, self._publics, self._about, self._threshold = graph, publics, about, threshold
        self._uploads: dict[int, tuple[bytes, bytes]] = {}  # shares and pair shares, encrypted
        self._answers: dict[int, tuple[bytes, bytes]] = {}
        self._closed = self._told = False

    def peers(self, client: int) -> tuple[Peer, ...]:
        """Return a client's neighbours: what it is told in the first message, by `write_peers`."""
        return self._named(self._graph[client])

    def check(self, client: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise PayloadError unless the arrays beside a client's values are what `Masker.mask` returns."""
        count = len(self._graph[client])
        read_array(arrays, "shares", np.uint8, _shares_size(count))
        read_array(arrays, "pair-shares", np.uint8, _pair_shares_size(count))

    def add(self, client: int, values: npt.NDArray[Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add what a client uploaded; the order of clients does not matter.

        Raises
        ------
        PayloadError
            It is malformed. The sum is unchanged.
        ValueError
            This client is there already, or `requests` were made without it.
        """
        if client in self._uploads or self._closed:
            raise ValueError(f"client {client} uploaded before, or too late")
        self.check(client, arrays)
        read_array({"values": values}, "values", self._sum.dtype, self._sum.size)
        np.add(self._sum, values, out=self._sum)
        self._uploads[client] = arrays["shares"].tobytes(), arrays["pair-shares"].tobytes()

    def requests(self) -> dict[int, Arrays]:
        """Return the arrays of the second message to each client that uploaded; nobody may be added from now on.

        ``uploaded`` and ``dropped``: numbers. ``shares``: those for this client of its neighbours' own secrets, each
        behind the check of the secret. If a
        neighbour of these dropped, also ``peers``: all clients that are named; ``neighbours``: of each of its
        neighbours that uploaded how many, and which, where one dropped (else 0); ``pair-shares`` of those.

        Raises
        ------
        TooFew
            Too many dropped. The exchange cannot come to an end.
        """
        self._closed = True
        if not self._uploads:
            raise TooFew(None, 0, 1)
        for client in sorted(self._uploads):
            self._enough(client, len(self._near(client)))
        return {client: self._request(client) for client in sorted(self._uploads)}

    def check_answer(self, client: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Raise PayloadError unless arrays have the lengths of an answer to this client's request."""
        near = self._near(client)
        read_array(arrays, "shares", np.uint8, _SECRET * len(near))
        read_array(arrays, "pair-shares", np.uint8, _SECRET * sum(len(self._gone(other)) for other in near))

    def answer(self, client: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take a client's answer to its request.

        Raises
        ------
        PayloadError
            It is malformed.
        ValueError
            This client was not asked, or has answered.
        """
        if not self._closed or client not in self._uploads or client in self._answers:
            raise ValueError(f"client {client} was not asked, or has answered")
        self.check_answer(client, arrays)
        self._answers[client] = arrays["shares"].tobytes(), arrays["pair-shares"].tobytes()

    def total(self) -> npt.NDArray[Any]:
        """Return the sum of what the clients that uploaded had before they masked it, shape (size,); once.

        Raises
        ------
        TooFew
            Too few answered for some client so far.
        FalseShares
            A client told a share that was not the one it had, or gave out false ones.
        """
        if self._told:
            raise ValueError("the masks were removed already")
        collected, streams = self._collected(), []
        for (owner, _), shares in collected.items():
            self._enough(owner, len(shares))
        for (owner, other), shares in collected.items():
            secret = self._secret(owner, other, shares)
            sign = 1 if owner == other else _sign(owner, other)
            streams.append((_derive(secret, b"stream", self._about, KEY_BYTES), -sign))
        self._told = True
        _add(self._sum, streams)
        return self._sum

    def _named(self, clients: Iterable[int]) -> tuple[Peer, ...]:
        return tuple(Peer(client, self._publics[client]) for client in sorted(clients))

    def _near(self, client: int) -> list[int]:
        return [other for other in self._graph[client] if other in self._uploads]

    def _gone(self, client: int) -> list[int]:
        return [other for other in self._graph[client] if other not in self._uploads]

    def _enough(self, client: int, left: int) -> None:
        least = needed(self._threshold, len(self._graph[client]))
        if left < least:
            raise TooFew(client, left, least)

    def _request(self, client: int) -> Arrays:
        near = self._near(client)
        torn = [other for other in near if self._gone(other)]
        people = {client, *self._graph[client]}.union(*(self._graph[other] for other in torn))
        shares, pair_shares = b"", b""
        for other in near:
            own, pairs = self._uploads[other]
            count, place = len(self._graph[other]), self._graph[other].index(client)
            shares += own[:_CHECK] + _pieces(own[_CHECK:], _SECRET + _TAG)[place]
            if other in torn:
                pair_shares += _pieces(pairs[_CHECK * count :], _SECRET * count + _TAG)[place]
        arrays: Arrays = {
            "uploaded": np.array(sorted(people & self._uploads.keys()), np.uint32),
            "dropped": np.array(sorted(people - self._uploads.keys()), np.uint32),
            "shares": _array(shares),
        }
        if torn:
            lists = [[len(theirs), *theirs] for theirs in (self._graph[x] if x in torn else () for x in near)]
            arrays["peers"] = write_peers(self._named(people))
            arrays["neighbours"] = np.array([number for each in lists for number in each], np.uint32)
            arrays["pair-shares"] = _array(pair_shares)
        return arrays

    def _collected(self) -> dict[tuple[int, int], dict[int, bytes]]:
        """Return the shares of each secret by the client that told it; (i, i) is i's own, (i, j) of i and j."""
        found: dict[tuple[int, int], dict[int, bytes]] = {}
        for owner in sorted(self._uploads):
            found[owner, owner] = {}
            found |= {(owner, other): {} for other in self._gone(owner)}
        for client, (shares, pair_shares) in sorted(self._answers.items()):
            near = self._near(client)
            pairs = [(owner, other) for owner in near for other in self._gone(owner)]
            for owner, share in zip(near, _pieces(shares, _SECRET), strict=True):
                found[owner, owner][client] = share
            for pair, share in zip(pairs, _pieces(pair_shares, _SECRET), strict=True):
                found[pair][client] = share
        return found

    def _secret(self, owner: int, other: int, shares: dict[int, bytes]) -> bytes:
        """Return the secret of `_collected` that shares make, which must be the one that its owner shared."""
        around = self._graph[owner]

        own, pairs = self._uploads[owner]
        checks = [own[:_CHECK], *_pieces(pairs[: _CHECK * len(around)], _CHECK)]
        expected = checks[(owner, *around).index(other)]

        def made(clients: Sequence[int]) -> bytes | None:
            secret = Shamir.combine([(around.index(client) + 1, shares[client]) for client in clients], False)
            return secret if _check(secret, self._about) == expected else None

        told, least = sorted(shares), needed(self._threshold, len(around))
        used, spare = told[:least], told[least : least + 1]
        if (secret := made(used)) is not None:
            return secret
        for liar in used if spare else ():
            if made([client for client in used if client != liar] + spare) is not None:
                raise FalseShares(f"client {liar} told a false share of a secret of client {owner}", (liar,))
        names = ", ".join(map(str, used))
        raise FalseShares(
            f"client {owner} gave out false shares of a secret, or one of clients {names} told a false one",
            (owner, *used),
        )


def _whole(dtype: npt.DTypeLike) -> np.dtype[Any]:
    kind = np.dtype(dtype).newbyteorder("<")
    if kind not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(f"dtype is {np.dtype(dtype)}; it is uint16 or uint32")
    return kind


def _shared(key: KeyPair, peer: Peer) -> bytes:
    try:
        return key.shared(peer.public)
    except PayloadError as error:
        raise PayloadError(f"client {peer.number}: {error}") from None


def _sign(number: int, other: int) -> int:
    return 1 if number < other else -1


def _derive(secret: bytes, purpose: bytes, context: bytes, size: int) -> bytes:
    info = b"ssfl secure aggregation 1 " + purpose + b"|" + context
    return HKDF(hashes.SHA256(), size, None, info).derive(secret)


def _check(secret: bytes, about: bytes) -> bytes:
    return _derive(secret, b"check", about, _CHECK)


def _nonce(mark: bytes) -> bytes:
    # The check of an own secret, which is a fresh one even where a client, started anew, masks for an exchange again:
    # with one nonce the share that is told of the one secret would tell that of the other.
    return mark + bytes(12 - len(mark))


def _add(values: npt.NDArray[Any], streams: list[tuple[bytes, int]]) -> None:
    """Add key streams of ChaCha20 to flat whole numbers in place, or subtract those whose sign is -1."""
    made = [
        (Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor(), np.add if sign > 0 else np.subtract)
        for key, sign in streams
    ]
    zeros, buffer = memoryview(bytes(_BLOCK)), bytearray(_BLOCK)
    stream = np.frombuffer(buffer, values.dtype)
    for begin in range(0, values.size, stream.size):
        part = values[begin : begin + stream.size]
        for encryptor, change in made:
            encryptor.update_into(zeros[: part.nbytes], buffer)
            change(part, stream[: part.size], out=part)


def _shares_size(count: int) -> int:
    return _CHECK + count * (_SECRET + _TAG)


def _pair_shares_size(count: int) -> int:
    return count * (_CHECK + count * _SECRET + _TAG)


def _pieces(content: bytes, size: int) -> list[bytes]:
    return [content[i : i + size] for i in range(0, len(content), size)]


def _array(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
