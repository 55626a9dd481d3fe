"""Secure aggregation without a network: sums are exact, dropouts and lies are told, and no vector can be read."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ssfl_app.privacy import masking
from ssfl_app.privacy.keys import KeyPair
from ssfl_app.privacy.masking import (
    FalseShares,
    MaskedSum,
    Masker,
    Peer,
    Ring,
    RingTree,
    TooFew,
    allowed,
    needed,
    neighbours,
    read_peers,
    ring_bytes,
    ring_order,
    write_peers,
)
from ssfl_app.sparsity.values import Arrays, PayloadError

law = settings(deadline=None, derandomize=True, max_examples=60)
KEYS = {number: KeyPair.of(hashlib.sha256(b"%d" % number).digest()) for number in range(120)}
TWO_THIRDS = 2 / 3


class Exchange:
    """One exchange of clients 10, 11, ... and a server, all in this process."""

    def __init__(
        self,
        count: int,
        size: int = 11,
        dtype: Any = np.uint32,
        threshold: float = TWO_THIRDS,
        about: bytes = b"run, exchange 1",
        most: int = 30,
    ) -> None:
        self.clients = list(range(10, 10 + count))
        self.graph = neighbours(self.clients, 1, 1, most)
        publics = {client: KEYS[client].public for client in self.clients}
        self.server_words = (dtype, self.graph, publics, about, threshold)
        self.server = MaskedSum(size, *self.server_words)
        rng, top = np.random.default_rng(1), np.iinfo(dtype).max
        self.plain = {client: rng.integers(0, top, size, dtype, endpoint=True) for client in self.clients}
        order = ring_order(self.clients, 1, 1, most)
        tree = RingTree(order, publics, most) if order else None
        self.rings = {
            client: Ring.read(tree.told(client).written(), most) if tree else None for client in self.clients
        }
        self.maskers = {
            client: Masker(
                KEYS[client], client, self.server.peers(client), about, threshold, dtype, most, self.rings[client]
            )
            for client in self.clients
        }
        self.masked: dict[int, np.ndarray] = {}
        self.beside: dict[int, Arrays] = {}
        self.answers: dict[int, Arrays] = {}

    def upload(self, clients: Iterable[int]) -> None:
        for client in clients:
            self.masked[client] = self.plain[client].copy()
            self.beside[client] = self.maskers[client].mask(self.masked[client])
            self.server.add(client, self.masked[client], self.beside[client])

    def server_of(self, clients: set[int]) -> MaskedSum:
        """Return a server that got what these clients uploaded, and nothing else."""
        server = MaskedSum(len(self.plain[10]), *self.server_words)
        for client in clients:
            server.add(client, self.masked[client], self.beside[client])
        return server

    def answer(self, requests: dict[int, Arrays], clients: Iterable[int]) -> None:
        for client in clients:
            self.answers[client] = self.maskers[client].unmask(requests[client])
            self.server.answer(client, self.answers[client])

    def expected(self, clients: Iterable[int]) -> np.ndarray:
        parts = [self.plain[client] for client in clients]
        return np.sum(parts, axis=0, dtype=parts[0].dtype)

    def lasts(self, left: set[int], uploaded: set[int], share: Fraction = Fraction(2, 3)) -> bool:
        """Return whether more than a share of the neighbours of each client that uploaded are left."""
        return bool(uploaded) and all(
            len(left.intersection(self.graph[client])) > share * len(self.graph[client]) for client in uploaded
        )


def played(exchange: Exchange, uploaded: list[int], answered: list[int]) -> np.ndarray:
    exchange.upload(uploaded)
    exchange.answer(exchange.server.requests(), answered)
    return exchange.server.total()


@st.composite
def dropouts(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """How many clients there are, which of them upload, and which of these answer, each in an order of its own."""
    count = draw(st.integers(3, 8))
    few = st.integers(0, 3).flatmap(lambda gone: st.sets(st.integers(10, 9 + count), max_size=gone))
    uploaded = sorted(set(range(10, 10 + count)) - draw(few))
    answered = sorted(set(uploaded) - draw(few))
    return count, draw(st.permutations(uploaded)), draw(st.permutations(answered))


@example((5, [14, 10, 12, 13], [13, 12, 10]), np.uint32)  # one gone before it uploaded, one before it answered
@example((3, [], []), np.uint32)
@given(dropouts(), st.sampled_from([np.uint16, np.uint32]))
@law
def test_the_sum_is_exact_or_too_few_are_left(case: tuple[int, list[int], list[int]], dtype: Any) -> None:
    count, uploaded, answered = case
    exchange = Exchange(count, dtype=dtype)
    exchange.upload(uploaded)
    if not exchange.lasts(set(uploaded), set(uploaded)):
        with pytest.raises(TooFew):
            exchange.server.requests()
        return
    exchange.answer(exchange.server.requests(), answered)
    if exchange.lasts(set(answered), set(uploaded)):
        total = exchange.server.total()
        assert total.tobytes() == exchange.expected(uploaded).tobytes()
        assert total.dtype == dtype
    else:
        with pytest.raises(TooFew):
            exchange.server.total()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_sparse_graph_gives_the_exact_sum(gone: int) -> None:
    exchange = Exchange(40, most=10)
    order = [int(c) for c in np.random.default_rng(gone).permutation(exchange.clients)]
    uploaded, answered = order[gone:], order[gone : len(order) - gone]
    assert exchange.lasts(set(answered), set(uploaded))
    assert played(exchange, uploaded, answered[::-1]).tobytes() == exchange.expected(uploaded).tobytes()


def test_too_many_dropouts_of_a_sparse_graph_are_told() -> None:
    exchange = Exchange(40, most=10)
    exchange.upload(set(exchange.clients) - set(exchange.graph[10][:4]))
    # Others may have as few neighbours left: client 10 is the first.
    what = "6 neighbours of client 10 are left; at least 7 are needed (privacy.threshold)"
    with pytest.raises(TooFew, match=f"^{re.escape(what)}$"):
        exchange.server.requests()


def test_a_late_answer_still_counts() -> None:
    exchange = Exchange(5)
    exchange.upload(exchange.clients)
    requests = exchange.server.requests()
    exchange.answer(requests, [10, 11, 12])
    with pytest.raises(TooFew) as few:
        exchange.server.total()
    assert (few.value.client, few.value.left, few.value.needed) == (10, 2, 3)
    exchange.answer(requests, [14])
    assert exchange.server.total().tobytes() == exchange.expected(exchange.clients).tobytes()
    with pytest.raises(ValueError, match="already"):
        exchange.server.total()


def test_shares_below_the_threshold_are_no_secret() -> None:
    exchange = Exchange(7)
    exchange.upload(exchange.clients)
    exchange.answer(exchange.server.requests(), [11, 12, 13, 14])
    with pytest.raises(TooFew, match="4 neighbours of client 10 are left; at least 5 are needed"):
        exchange.server.total()
    # A server that goes on all the same gets another secret, and knows it.
    shares = exchange.server._collected()[10, 10]
    with pytest.raises(FalseShares):
        exchange.server._secret(10, 10, shares)


# ---- What can be read --------------------------------------------------------------------------


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    monkeypatch.setattr(os, "urandom", rng.bytes)


def masked_zeros(size: int, dtype: Any, about: bytes = b"run, exchange 1") -> np.ndarray:
    exchange = Exchange(3, size, dtype, about=about)
    exchange.plain[10] = np.zeros(size, dtype)
    exchange.upload([10])
    return exchange.masked[10]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_masked_values_are_uniform(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded(monkeypatch)
    digits = masked_zeros(1 << 18, dtype).view(np.uint8).reshape(-1, np.dtype(dtype).itemsize)
    for place in digits.T:  # the bytes of a value, and those of neighbouring values together
        assert chisquare(np.bincount(place, minlength=256)).pvalue > 1e-3
    pairs = digits[:-1, 0].astype(int) << 4 | digits[1:, 0] >> 4
    assert chisquare(np.bincount(pairs, minlength=4096)).pvalue > 1e-3


def test_the_test_of_uniformity_finds_what_is_not() -> None:
    bytes_ = np.random.default_rng(1).integers(0, 255, 1 << 18)  # the top value never comes
    assert chisquare(np.bincount(bytes_, minlength=256)).pvalue < 1e-3


def test_equal_values_are_masked_otherwise_in_another_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded(monkeypatch)
    one = masked_zeros(4096, np.uint32)
    assert np.count_nonzero(one == masked_zeros(4096, np.uint32, b"run, exchange 2")) < 3
    # Equal own secrets: pair masks alone make the difference.
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    same, other = (masked_zeros(4096, np.uint32, about) for about in (b"run, exchange 1", b"run, exchange 2"))
    assert np.count_nonzero(same == other) < 3
    assert same.tobytes() == masked_zeros(4096, np.uint32).tobytes()


def test_an_own_secret_alone_hides_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded(monkeypatch)
    one, two = (masked_zeros(4096, np.uint32) for _ in range(2))
    assert np.count_nonzero(one == two) < 3  # the same pair masks


def test_nothing_that_reaches_the_server_has_values_of_a_client() -> None:
    exchange = Exchange(8, size=64)
    uploaded, answered = exchange.clients[1:], exchange.clients[1:-1]
    played(exchange, uploaded, answered)
    got = [array for arrays in (*exchange.beside.values(), *exchange.answers.values()) for array in arrays.values()]
    wire = b"|".join(array.tobytes() for array in (*exchange.masked.values(), *got))
    assert len(exchange.masked) == 7
    for client in uploaded:
        plain = exchange.plain[client].tobytes()
        assert not any(plain[i : i + 8] in wire for i in range(0, len(plain), 8))
        assert KEYS[client].private_bytes() not in wire


def test_a_client_that_dropped_is_not_unmasked() -> None:
    """Its upload comes too late: its own secret is never told, and so its vector stays masked."""
    exchange = Exchange(6, size=64)
    exchange.upload(exchange.clients[1:])
    late = exchange.plain[10].copy()
    beside = exchange.maskers[10].mask(late)
    exchange.answer(exchange.server.requests(), exchange.clients[1:])
    with pytest.raises(ValueError, match="client 10 uploaded before, or too late"):
        exchange.server.add(10, late, beside)
    assert (10, 10) not in exchange.server._collected()
    # All its pair masks can be had now. Without them its own mask is left.
    pairs = [exchange.maskers[10]._pair_secret(peer) for peer in exchange.server.peers(10)]
    for (owner, other), shares in exchange.server._collected().items():
        if owner != other:
            assert other == 10
            assert exchange.server._secret(owner, other, shares) in pairs
    signs = [(exchange.maskers[10]._stream(secret), -1) for secret in pairs]  # 10 is the lowest number
    masking._add(late, signs)
    assert np.count_nonzero(late == exchange.plain[10]) < 3


def test_a_client_that_masks_again_tells_nothing_of_its_other_secret() -> None:
    """Started anew, it may be asked again for the same exchange. One nonce for both would be two-time pads."""
    parts, told = [], []
    for _ in range(2):
        exchange = Exchange(3)
        exchange.upload([10, 11, 12])
        request = exchange.server.requests()[10]  # the first share is client 11's
        parts.append(request["shares"][8:24])
        told.append(exchange.maskers[10].unmask(request)["shares"][:16])
    assert ((parts[0] ^ parts[1]) != (told[0] ^ told[1])).any()


def test_a_pair_secret_serves_one_exchange_and_two_clients() -> None:
    """The server may have learnt those of an exchange with dropouts."""
    one, two = (Exchange(3, about=about) for about in (b"run, exchange 1", b"run, exchange 2"))
    peers = {client: Peer(client, KEYS[client].public) for client in one.clients}
    secrets = {
        (exchange, pair): exchange.maskers[pair[0]]._pair_secret(peers[pair[1]])
        for exchange in (one, two)
        for pair in ((10, 11), (11, 10), (10, 12))
    }
    assert secrets[one, (10, 11)] == secrets[one, (11, 10)]
    assert len(set(secrets.values())) == 4


# ---- A server that lies ------------------------------------------------------------------------


def asked(count: int = 7, gone: int = 1, **kwargs: Any) -> tuple[Exchange, Arrays]:
    """Return an exchange whose last clients dropped, and the request to the first one."""
    exchange = Exchange(count, **kwargs)
    exchange.upload(exchange.clients[: count - gone])
    return exchange, exchange.server.requests()[10]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def test_the_request_is_what_the_tests_below_change() -> None:
    exchange, request = asked()
    assert request["uploaded"].tolist() == [10, 11, 12, 13, 14, 15]
    assert request["dropped"].tolist() == [16]
    assert request["neighbours"].tolist() == [n for i in range(11, 16) for n in (6, *exchange.graph[i])]
    answer = exchange.maskers[10].unmask(request)
    assert {name: array.size for name, array in answer.items()} == {"shares": 5 * 16, "pair-shares": 5 * 16}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"dropped": numbers(15, 16)}, "client 15 is named as uploaded and as dropped"),
        ({"dropped": numbers()}, "client 16 is named neither as uploaded nor as dropped"),
        ({"uploaded": numbers(10, 11, 12, 13, 14)}, "client 15 is named neither as uploaded nor as dropped"),
        ({"dropped": numbers(16, 17)}, "client 17 is named as uploaded or dropped, but is nobody"),
        (
            {"uploaded": numbers(11, 12, 13, 14, 15), "dropped": numbers(10, 16)},
            "client 10 is named as dropped, but is this client",
        ),
        (
            {"uploaded": numbers(10, 11, 12, 13, 14), "dropped": numbers(15, 16)},
            "4 of 6 neighbours of client 10 uploaded; at least 5 must",
        ),
        ({"neighbours": numbers()}, "neighbours of client 11 are cut short"),
        ({"neighbours": numbers(6, 10, 12)}, "neighbours of client 11 are cut short"),
        ({"neighbours": numbers(2, 10, 99)}, "neighbours of client 11 are cut short, or nobody"),
        ({"neighbours": numbers(0, 0, 0, 0, 0, 0)}, "neighbours has length 6; it must be 5"),
        ({"neighbours": numbers(0, 0, 0, 0, 0)}, "pair-shares has length 560; it must be 0"),
        ({"shares": np.zeros(31, np.uint8)}, "shares has length 31; it must be 200"),
        ({"shares": np.zeros(200, np.uint8)}, "share of client 11: not encrypted for client 10 in this exchange"),
        ({"pair-shares": np.zeros(560, np.uint8)}, "pair shares of client 11: not encrypted for client 10"),
        ({"uploaded": np.array([10.0])}, "uploaded is float64 of rank 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_a_story_that_is_not_one_is_refused(changed: Arrays, what: str) -> None:
    exchange, request = asked()
    with pytest.raises(PayloadError, match=what):
        exchange.maskers[10].unmask(request | changed)


def test_a_number_that_means_another_client_is_refused() -> None:
    """Where two swap their places in a list, a share would be told of a pair that did not lose its other half."""
    exchange, request = asked()
    lists = request["neighbours"].copy()
    assert lists[5:7].tolist() == [15, 16]
    lists[5:7] = 16, 15
    with pytest.raises(PayloadError, match="pair shares of client 11: not encrypted"):
        exchange.maskers[10].unmask(request | {"neighbours": lists})


def test_a_list_that_hides_a_neighbour_is_refused() -> None:
    exchange, request = asked()
    lists = [n for i in range(11, 16) for n in (5, *(n for n in exchange.graph[i] if n != 10))]
    shares = request["pair-shares"][: 5 * 96]
    with pytest.raises(PayloadError, match="pair shares of client 11: not encrypted"):
        exchange.maskers[10].unmask(request | {"neighbours": numbers(*lists), "pair-shares": shares})


def test_other_keys_than_at_first_are_refused() -> None:
    exchange, request = asked()
    peers = [Peer(n, KEYS[n].public) for n in range(10, 17)]
    for number, what in ((10, "client 10"), (16, "client 16")):
        false = [peer if peer.number != number else Peer(number, KEYS[99].public) for peer in peers]
        with pytest.raises(PayloadError, match=f"{what} is not in peers, or not with the key of the first message"):
            exchange.maskers[10].unmask(request | {"peers": write_peers(false)})
    with pytest.raises(PayloadError, match="client 16 is not in peers"):
        exchange.maskers[10].unmask(request | {"peers": write_peers(peers[:-1])})
    for twin in (Peer(17, KEYS[16].public), Peer(17, peers[0].public)):
        with pytest.raises(PayloadError, match="have the same public key"):
            exchange.maskers[10].unmask(request | {"peers": write_peers([*peers, twin])})


def test_too_many_dropouts_around_another_client_are_refused() -> None:
    """In a sparse graph a client knows of them from the list that its neighbour sealed."""
    exchange = Exchange(40, most=10)
    one, other = 10, exchange.graph[10][0]
    far = [n for n in exchange.graph[other] if n not in (*exchange.graph[one], one)]
    near = [n for n in exchange.graph[other] if n in exchange.graph[one]]
    exchange.upload(n for n in exchange.clients if n != near[0])
    request = exchange.server.requests()[one]
    gone = [near[0], *far, *near[1:]][:4]
    assert len(far) > 0
    assert len(set(gone) & set(exchange.graph[one])) <= 3  # as many as there may be
    kept = set(exchange.graph[one]) - set(gone)
    false = {
        "uploaded": numbers(*sorted(set(request["uploaded"].tolist()) - set(gone))),
        "dropped": numbers(*sorted({*request["dropped"].tolist(), *gone})),
    }
    # What the server sends beside the numbers fits them; the number of dropouts alone does not.
    order = [n for n in exchange.graph[one] if n != near[0]]
    left = [place for place, n in enumerate(order) if n in kept]
    false["shares"] = np.concatenate([request["shares"].reshape(-1, 40)[place] for place in left])
    rows = request["neighbours"].tolist()
    lists, sealed, at = [], [], 0
    for place in range(len(order)):
        count, rows = rows[0], rows[1:]
        size = 16 * count + 16 if count else 0
        if place in left:
            lists += [count, *rows[:count]]
            sealed.append(request["pair-shares"][at : at + size])
        rows, at = rows[count:], at + size
    false |= {"neighbours": numbers(*lists), "pair-shares": np.concatenate(sealed)}
    with pytest.raises(
        PayloadError, match=r"\d+ of 10 neighbours of client \d+ uploaded; at least 7 must"
    ) as refused:
        exchange.maskers[one].unmask(request | false)
    assert f"client {one} " not in str(refused.value)


@pytest.mark.parametrize("change", ["about", "key"])
def test_shares_of_another_exchange_or_key_are_refused(change: str) -> None:
    exchange, request = asked(gone=0)
    key, about = (KEYS[99], b"run, exchange 1") if change == "key" else (KEYS[10], b"run, exchange 2")
    masker = Masker(key, 10, exchange.server.peers(10), about, TWO_THIRDS, np.uint32)
    with pytest.raises(PayloadError, match="share of client 11: not encrypted for client 10 in this exchange"):
        masker.unmask(request)


def test_a_server_with_a_key_of_its_own_gets_nothing_of_the_others() -> None:
    """Client 10 was told a key of the server's as 11's: neither can open what the other one sealed for it."""
    exchange = Exchange(5)
    peers = tuple(Peer(p.number, KEYS[99].public) if p.number == 11 else p for p in exchange.server.peers(10))
    exchange.maskers[10] = Masker(KEYS[10], 10, peers, b"run, exchange 1", TWO_THIRDS, np.uint32)
    exchange.upload(exchange.clients)
    requests = exchange.server.requests()
    with pytest.raises(PayloadError, match="share of client 11: not encrypted for client 10"):
        exchange.maskers[10].unmask(requests[10])
    with pytest.raises(PayloadError, match="share of client 10: not encrypted for client 11"):
        exchange.maskers[11].unmask(requests[11])


@pytest.mark.parametrize(
    ("threshold", "helpers", "succeeds"),
    [(0.5, 0, False), (0.5, 1, True), (TWO_THIRDS, 4, False), (TWO_THIRDS, 5, True)],
)
def test_other_dropouts_for_each_client_unmask_none_without_helpers(
    threshold: float, helpers: int, succeeds: bool
) -> None:
    """A server wants client 10's vector of ten clients, some of which are on its side.

    It tells each honest one that 10 uploaded and that other clients dropped, as many as it accepts. Of each of 10's
    nine pair secrets it needs as many shares as of a secret that it may have.
    """
    exchange = Exchange(10, threshold=threshold)
    exchange.upload(exchange.clients)
    least, near = needed(threshold, 9), exchange.graph[10]
    honest, own, pairs = near[: 9 - helpers], {}, {other: {} for other in near}
    for place, client in enumerate(honest):
        gone = [(honest * 2)[place + step] for step in range(1, min(9 - least, len(honest) - 1) + 1)]
        server = exchange.server_of(set(exchange.clients) - set(gone))
        server.answer(client, exchange.maskers[client].unmask(server.requests()[client]))
        told = server._collected()
        own |= told[10, 10]
        for other in gone:
            pairs[other] |= told[10, other]
    shares, parts = exchange.beside[10]["shares"].tobytes(), exchange.beside[10]["pair-shares"].tobytes()[9 * 8 :]
    check, shares = shares[:8], shares[8:]
    target, context = Peer(10, KEYS[10].public), write_peers(exchange.server.peers(10)).tobytes()
    secrets = []
    for client in near[9 - helpers :]:  # it tells all that was encrypted for it, and its own secret
        place, masker = near.index(client), exchange.maskers[client]
        own[client] = masker._open(b"share", target, check, shares[place * 32 : (place + 1) * 32], b"")
        opened = masker._open(b"pair shares", target, check, parts[place * 160 : (place + 1) * 160], context)
        for index, other in enumerate(near):
            pairs[other][client] = opened[index * 16 : (index + 1) * 16]
        secrets.append((masker._pair_secret(target), -1))
    assert len(own) >= least  # 10's own secret it may well have: those of all that uploaded are told
    assert all((len(pairs[other]) >= least) == succeeds for other in honest)
    if succeeds:
        secrets += [(exchange.server._secret(10, other, pairs[other]), -1) for other in honest]
        secrets.append((exchange.server._secret(10, 10, own), -1))
        masking._add(exchange.masked[10], [(exchange.maskers[10]._stream(secret), sign) for secret, sign in secrets])
        assert exchange.masked[10].tobytes() == exchange.plain[10].tobytes()


def test_a_graph_of_the_servers_choice_unmasks_nobody() -> None:
    """Keys are true. The neighbours of 0 hear that it uploaded, those who share *their* secrets that it dropped."""
    graph = {0: (1, 2), 1: (0, 3, 4, 5), 2: (0, 6, 7, 8), 3: (1, 4, 5), 4: (1, 3, 5), 5: (1, 3, 4)}
    graph |= {6: (2, 7, 8), 7: (2, 6, 8), 8: (2, 6, 7)}
    servers = [MaskedSum(4, np.uint32, graph, {n: KEYS[n].public for n in graph}, b"", TWO_THIRDS) for _ in range(2)]
    maskers = {n: Masker(KEYS[n], n, servers[0].peers(n), b"", TWO_THIRDS, np.uint32) for n in graph}
    for number, masker in maskers.items():
        values = np.zeros(4, np.uint32)
        beside = masker.mask(values)
        servers[0].add(number, values, beside)
        if number:
            servers[1].add(number, values, beside)
    for client in (3, 4, 5):
        with pytest.raises(PayloadError, match="not encrypted for client"):
            maskers[client].unmask(servers[1]._request(client))


def ring_masker(client: int, tree: RingTree, order: list[int], most: int, place: int | None = None) -> Masker:
    """Return a client of a ring; at another `place` it is told the peers that stand around that."""
    seen = tree.told(client) if place is None else tree.told(order[place])
    around = [order[(seen.place + step) % len(order)] for step in masking._steps(most)]
    peers = tuple(Peer(other, KEYS[other].public) for other in sorted(around))
    return Masker(KEYS[client], client, peers, b"", TWO_THIRDS, np.uint32, most, seen)


def test_a_client_sees_whether_its_neighbours_are_in_the_ring_of_all() -> None:
    exchange, publics = Exchange(20, most=6), {n: KEYS[n].public for n in range(10, 30)}
    roots = {exchange.maskers[client]._among for client in exchange.clients}
    assert len(roots) == 1
    ring, peers = exchange.rings[10], exchange.server.peers(10)
    assert ring is not None
    others = [*peers[:-1], Peer(peers[-1].number, KEYS[99].public)]
    assert ring.root(Peer(10, publics[10]), others) != ring.root(Peer(10, publics[10]), peers)
    for proof, what in ((ring.proof[:-1], "too few"), ((*ring.proof, bytes(32)), "too many")):
        with pytest.raises(PayloadError, match=what):
            Ring(ring.clients, ring.place, ring.order, proof).root(Peer(10, publics[10]), peers)
    content = ring.written()
    for array in (content[:-1], content[:7], np.append(content[:8], content[8:] * 0), content.astype(np.int8)):
        with pytest.raises(PayloadError, match="ring"):
            Ring.read(array, 6)
    with pytest.raises(PayloadError, match="client 10 has 4 neighbours in a ring; they must be 6"):
        Masker(KEYS[10], 10, peers[:4], b"", TWO_THIRDS, np.uint32, 6, ring)


def test_a_server_with_two_rings_gets_no_sum_and_no_shares() -> None:
    """Client 0 is told one ring, all others another one: what they seal for it, and its masks, fit no more."""
    clients, most = list(range(20)), 6
    orders = [clients, [0, 1, 2, 3, *range(7, 17), 4, 5, 6, 17, 18, 19]]  # with the same neighbours of 0
    publics = {n: KEYS[n].public for n in clients}
    trees = [RingTree(order, publics, most) for order in orders]
    lied, told = (ring_masker(0, tree, order, most) for tree, order in zip(trees, orders, strict=True))
    assert [peer.number for peer in lied._peers] == [peer.number for peer in told._peers]
    for number in (1, 2, 3, 17, 18, 19):
        other, me = ring_masker(number, trees[1], orders[1], most), Peer(0, publics[0])
        near = Peer(number, publics[number])
        assert told._pair_secret(near) == other._pair_secret(me) != lied._pair_secret(near)
        sealed = other._seal(b"share", me, bytes(8), b"16 bytes of text", b"")
        assert told._open(b"share", near, bytes(8), sealed, b"") == b"16 bytes of text"
        with pytest.raises(PayloadError, match="not encrypted for client 0"):
            lied._open(b"share", near, bytes(8), sealed, b"")


def test_a_client_that_stands_in_the_ring_twice_is_another_one_at_each_place() -> None:
    """Else its neighbours at one place could be told that it dropped, and those at the other that it did not."""
    clients, most = [*range(10), 0, *range(11, 20)], 6  # 0 stands at 0 and at 10
    tree = RingTree(clients, {n: KEYS[n].public for n in clients}, most)
    tree._place[0] = 0
    one = ring_masker(0, tree, clients, most)
    tree._place[0] = 10
    seen = ring_masker(11, tree, clients, most)
    assert 0 in {peer.number for peer in seen._peers}
    near = Peer(11, KEYS[11].public)
    two = ring_masker(0, tree, clients, most)
    assert two._pair_secret(near) == seen._pair_secret(Peer(0, KEYS[0].public))
    one._secrets[11], one._places[11] = two._secrets[11], 11
    assert one._pair_secret(near) != seen._pair_secret(Peer(0, KEYS[0].public))


@pytest.mark.parametrize("clients", [32, 100, 1000, 10_000])
def test_what_shows_the_ring_keeps_an_exchange_below_20_kb(clients: int) -> None:
    tree = RingTree(range(clients), dict.fromkeys(range(clients), bytes(32)))
    places = np.random.default_rng(0).integers(0, clients, 40).tolist()
    longest = max(tree.told(place).written().nbytes for place in [0, 1, clients // 2, clients - 1, *places])
    assert 18_972 + longest < 20_000  # of an exchange with 30 neighbours, which docs/privacy.md has
    assert ring_bytes(clients) <= longest
    assert ring_bytes(31) == 0


def test_a_client_under_another_number_is_another_one() -> None:
    one, two = Peer(1, KEYS[1].public), Peer(2, KEYS[2].public)
    secrets = [Masker(KEYS[3], n, (one, two), b"", TWO_THIRDS, np.uint32, 2)._pair_secret(one) for n in (3, 4)]
    assert secrets[0] != secrets[1]


def test_a_client_knows_its_answer_again_without_what_it_had_in_memory() -> None:
    """The process that uploaded may be gone: Flower starts one for a message."""
    exchange, request = asked()
    again = Masker(KEYS[10], 10, exchange.server.peers(10), b"run, exchange 1", TWO_THIRDS, np.uint32)
    first, second = exchange.maskers[10].unmask(request), again.unmask(request)
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }


# ---- Clients that lie --------------------------------------------------------------------------


def false_answer(exchange: Exchange, client: int, name: str, among: list[int]) -> None:
    requests = exchange.server.requests()
    for each in among:
        arrays = exchange.maskers[each].unmask(requests[each])
        if each == client:
            arrays[name] = arrays[name] ^ np.uint8(1)
        exchange.server.answer(each, arrays)


@pytest.mark.parametrize("name", ["shares", "pair-shares"])
def test_a_false_share_is_told_with_the_name_of_the_liar(name: str) -> None:
    exchange = Exchange(7)
    exchange.upload(exchange.clients[:-1])
    false_answer(exchange, 12, name, exchange.clients[:-1])
    # Of the five shares of client 10's secrets all are needed: it may be any of these. The first one names them all.
    with pytest.raises(
        FalseShares, match=r"client 10 gave out false shares .* clients 11, 12, 13, 14, 15 told"
    ) as few:
        exchange.server.total()
    assert few.value.clients == (10, 11, 12, 13, 14, 15)

    exchange = Exchange(8)  # of six, five are needed
    exchange.upload(exchange.clients[:-1])
    false_answer(exchange, 12, name, exchange.clients[:-1])
    with pytest.raises(FalseShares, match=r"^client 12 told a false share of a secret of client 10$") as found:
        exchange.server.total()
    assert found.value.clients == (12,)


def test_false_shares_of_their_owner_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange(7)
    split = exchange.maskers[14]._split
    monkeypatch.setattr(exchange.maskers[14], "_split", lambda secret: split(bytes(16)))
    exchange.upload(exchange.clients)
    exchange.answer(exchange.server.requests(), exchange.clients)
    with pytest.raises(FalseShares, match="client 14 gave out false shares of a secret, or one of clients 10, 11"):
        exchange.server.total()


def test_a_false_check_of_an_own_secret_is_found_by_the_neighbours() -> None:
    exchange = Exchange(4)
    exchange.upload([10, 11, 12])
    values = exchange.plain[13].copy()
    arrays = exchange.maskers[13].mask(values)
    exchange.server.add(13, values, arrays | {"shares": arrays["shares"] ^ (np.arange(arrays["shares"].size) == 0)})
    with pytest.raises(PayloadError, match="share of client 13: not encrypted for client 10"):
        exchange.answer(exchange.server.requests(), [10])


@pytest.mark.parametrize("name", ["shares", "pair-shares"])
@pytest.mark.parametrize(
    "harm", [lambda a: a[:-1], lambda a: a.astype(np.int8), lambda a: a.reshape(1, -1), lambda a: np.tile(a, 2)]
)
def test_malformed_shares_are_refused(name: str, harm: Any) -> None:
    exchange = Exchange(4)
    values = exchange.plain[10].copy()
    arrays = exchange.maskers[10].mask(values)
    for check in (exchange.server.check, lambda *a: exchange.server.add(a[0], values, a[1])):
        with pytest.raises(PayloadError, match=f"^{name} "):
            check(10, arrays | {name: harm(arrays[name])})
        with pytest.raises(PayloadError, match=f"no array '{name}'"):
            check(10, {key: array for key, array in arrays.items() if key != name})
    exchange.server.add(10, values, arrays)

    exchange = Exchange(5)
    exchange.upload(exchange.clients[:-1])
    answer = exchange.maskers[10].unmask(exchange.server.requests()[10])
    for check in (exchange.server.check_answer, exchange.server.answer):
        with pytest.raises(PayloadError, match=f"^{name} "):
            check(10, answer | {name: harm(answer[name])})
    exchange.server.answer(10, answer)


def test_values_of_another_type_or_length_are_refused_and_change_nothing() -> None:
    exchange = Exchange(4)
    values = exchange.plain[10].copy()
    arrays = exchange.maskers[10].mask(values)
    for false in (values[:-1], values.astype(np.uint16), values.reshape(1, -1)):
        with pytest.raises(PayloadError, match=r"^values "):
            exchange.server.add(10, false, arrays)
    exchange.server.add(10, values, arrays)
    exchange.upload([11, 12, 13])
    exchange.answer(exchange.server.requests(), exchange.clients)
    assert exchange.server.total().tobytes() == exchange.expected(exchange.clients).tobytes()


def test_nobody_counts_twice_or_unasked() -> None:
    exchange = Exchange(5)
    exchange.upload([10, 11, 12, 13])
    with pytest.raises(ValueError, match="client 10 uploaded before"):
        exchange.server.add(10, exchange.masked[10], exchange.beside[10])
    with pytest.raises(ValueError, match="client 10 was not asked"):
        exchange.server.answer(10, {})
    exchange.answer(exchange.server.requests(), [10])
    for client in (10, 14):
        with pytest.raises(ValueError, match=f"client {client} was not asked, or has answered"):
            exchange.server.answer(client, exchange.answers[10])


# ---- Parts -------------------------------------------------------------------------------------


def test_a_client_masks_once() -> None:
    exchange = Exchange(3)
    exchange.upload([10])
    with pytest.raises(ValueError, match="masked values in this exchange already"):
        exchange.maskers[10].mask(exchange.plain[10].copy())


@pytest.mark.parametrize("values", [np.zeros(3, np.uint16), np.zeros((1, 3), np.uint32), np.zeros(6, np.uint32)[::2]])
def test_values_that_cannot_be_masked_in_place_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be flat uint32"):
        Exchange(3).maskers[10].mask(values)


def test_only_whole_numbers_of_two_widths_are_masked() -> None:
    for dtype in (np.int32, np.float32, np.uint64, np.uint8):
        with pytest.raises(ValueError, match="it is uint16 or uint32"):
            MaskedSum(1, dtype, {}, {}, b"", TWO_THIRDS)


def test_a_client_wants_neighbours_other_than_itself() -> None:
    peers = tuple(Peer(number, KEYS[number].public) for number in (1, 2))

    def masker(number: int, key: KeyPair, peers: tuple[Peer, ...]) -> Masker:
        return Masker(key, number, peers, b"", TWO_THIRDS, np.uint32)

    masker(3, KEYS[3], peers)
    with pytest.raises(PayloadError, match="client 3 has 1 neighbours; it needs at least 2"):
        masker(3, KEYS[3], peers[:1])
    for number, key in ((1, KEYS[3]), (3, KEYS[2])):
        with pytest.raises(PayloadError, match=f"client {number} is among its own neighbours"):
            masker(number, key, peers)
    with pytest.raises(PayloadError, match="client 4: public key is '00"):
        masker(3, KEYS[3], (*peers, Peer(4, bytes(32))))


@given(st.integers(1, 120), st.integers(0, 5), st.integers(1, 40), st.sampled_from([30, 6, 2]))
@law
def test_neighbours_are_mutual_and_as_many_as_said(count: int, seed: int, exchange: int, most: int) -> None:
    clients = [3 * number + 1 for number in range(count)]
    graph = neighbours(clients[::-1], seed, exchange, most)
    assert list(graph) == clients
    for client, near in graph.items():
        assert list(near) == sorted(set(near) - {client})
        assert len(near) == min(most, count - 1)
        assert all(client in graph[other] for other in near)
    assert graph == neighbours(clients, seed, exchange, most)


def test_neighbours_change_from_exchange_to_exchange() -> None:
    assert len({str(neighbours(range(50), seed, t)) for seed in (1, 2) for t in range(5)}) == 10


@given(st.integers(1, 60), st.integers(50, 99))
@law
def test_more_than_the_threshold_are_needed(peers: int, percent: int) -> None:
    least = needed(percent / 100, peers)
    assert least > Fraction(percent, 100) * peers >= least - 1


def test_two_thirds_are_two_thirds() -> None:
    assert [needed(TWO_THIRDS, peers) for peers in (2, 3, 4, 6, 9, 30)] == [2, 3, 3, 5, 7, 21]
    assert needed(1 - 1e-12, 30) == 30


@given(st.sets(st.integers(0, 2**32 - 1), max_size=9))
@law
def test_peers_are_read_as_they_were_written(numbers_: set[int]) -> None:
    peers = tuple(Peer(number, hashlib.sha256(b"%d" % number).digest()) for number in sorted(numbers_))
    assert read_peers(write_peers(peers)) == peers


def test_malformed_peers_are_refused() -> None:
    one, two = Peer(1, KEYS[1].public), Peer(2, KEYS[2].public)
    for array, what in (
        (write_peers([one])[:-1], "peers has length 35; it must be a multiple of 36"),
        (write_peers([one]).astype(np.int8), "peers is int8"),
        (write_peers([two, one]), "peers has 1 behind 2; the numbers must ascend"),
        (write_peers([one, one]), "peers has 1 behind 1; the numbers must ascend"),
        (write_peers([one, Peer(3, one.public)]), "peers 1 and 3 have the same public key"),
    ):
        with pytest.raises(PayloadError, match=what):
            read_peers(array)


@pytest.mark.parametrize(("count", "gone"), [(3, 0), (10, 0), (10, 2), (20, 1)])
def test_replies_are_as_long_as_they_may_be(count: int, gone: int) -> None:
    exchange = Exchange(count, most=12)
    exchange.upload(exchange.clients[gone:])
    exchange.answer(exchange.server.requests(), exchange.clients[gone:])
    for client, beside in exchange.beside.items():
        most = allowed(len(exchange.graph[client]))
        assert {name: (array.dtype, array.size) for name, array in beside.items()} == most
        for name, array in exchange.answers[client].items():
            assert array.dtype == most[name][0]
            assert array.size <= most[name][1]


def test_an_exchange_costs_less_than_20_kb_a_client_at_30_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    # What counts here is the length of shares; to make real ones takes a third of a second a client.
    monkeypatch.setattr(Shamir, "split", lambda _, count, *__: [(i, os.urandom(16)) for i in range(count)])
    exchange = Exchange(31, size=1)
    exchange.upload(exchange.clients)
    requests = exchange.server.requests()
    exchange.answer(requests, exchange.clients)
    for client in exchange.clients:
        parts = (
            {"peers": write_peers(exchange.server.peers(client))},
            exchange.beside[client],
            requests[client],
            exchange.answers[client],
        )
        assert 15_000 < sum(array.nbytes for arrays in parts for array in arrays.values()) < 20_000


def test_the_page_has_the_numbers_of_the_record() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "benchmarks" / "results" / "secure.json").read_text("utf-8"))
    page = (root / "docs" / "privacy.md").read_text("utf-8").partition("### What it costs")[2]
    clients, server = record["client_cpu_by_neighbours"], record["server_cpu_of_10_clients"]
    told = [
        record["date"],
        f"{record['environment']['cores']} cores of {record['environment']['cpu']}",
        f"load of\nthe machine {record['load']:.1f}",
        *(
            f"client with {near} neighbours | {clients[near]['median_seconds']:.3f} | {size:,} |"
            for near, size in record["bytes_by_neighbours"].items()
        ),
        f"server of 10 clients | {server['no_dropout']['median_seconds']:.3f} |",
        f"before each answer | {server['one_dropout_in_each_exchange']['median_seconds']:.3f} |",
        *(f"{row['median_seconds']:.3f} s (" for row in record["client_cpu_of_one_value"].values()),
    ]
    assert [text for text in told if text not in page] == []
