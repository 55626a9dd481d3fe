"""Keeps which client each node is, and lets nodes leave, come back and replace others.

What one node says never ends the run: a node that cannot start, claims another node's client, runs other code or
holds other images is set aside by name, and the run goes on if all clients are found without it. A client that the
operator of the SuperLink bound to a node's key (`bound`) is that node's. Any other belongs to whoever came first, who
gets it back from whoever took it in between. Sites with data of their own have names; their numbers are the ranks of
the names, whatever Flower's node ids are and whoever came first.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from flwr.serverapp import Grid

from ssfl_app.comm.exchange import DEPLOYMENT_POLL, SIMULATION_POLL, is_simulation
from ssfl_app.comm.handshake import KEY, Handshake, HandshakePoller
from ssfl_app.comm.payload import Metadata
from ssfl_app.data.summary import DataSummary, read_data_summary
from ssfl_app.locks import RunFailed
from ssfl_app.privacy.keys import KEY_FILE

Claim = int | str
"""What no two nodes may claim: a client's number, or the name of a site."""

SIMULATED_NODES_APPEAR = 5.0
"""Seconds after which all simulated nodes are there: Flower registers them together, before its actors start."""

PATIENCE = 10.0
"""Seconds after which a line says whom a run waits for."""

REJOIN_TIMEOUT = 15.0
"""Seconds that a round waits for nodes that may take the place of others."""

MOST_WARNINGS = 50
"""Lines about nodes that are no client of a run. Who replaces a client's node, or comes back, is always said."""


class ClientRegistry:
    """Which node each of the run's clients lives on, and what it said of itself.

    `keyed` says whether a client needs a public key, as with privacy.secure-aggregation.

    Attributes
    ----------
    nodes : dict of int to int
        Client -> Flower's node id.
    names : dict of int to str
        Client -> name of the site; empty where partitions of a shared data set are dealt.
    expected : tuple of str
        Names of the sites of a run that is resumed, by client; empty: whoever comes.
    bound : callable
        Returns place -> id of the only node that may hold it, of the places that are bound to a node's key. Asked at
        the handshake and whenever nodes are gone: keys may be registered in between.
    misfit : callable
        misfit(handshake) returns why a node cannot be in this run whatever its place, None if it can.
    say : callable
        Tells people a line.
    """

    def __init__(self, clients: int, join_timeout: float, keyed: bool = False) -> None:
        self.nodes: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.expected: tuple[str, ...] = ()
        self.bound: Callable[[], Mapping[Claim, int]] = dict
        self.misfit: Callable[[Handshake], str | None] = lambda handshake: None
        self.say: Callable[[str], None] = lambda line: None
        self._clients, self._join_timeout, self._keyed = clients, join_timeout, keyed
        self._metadata: dict[int, Metadata] = {}
        self._first: dict[int, tuple[int, Metadata]] = {}  # client -> the node that held its place first
        self._said: set[str] = set()

    # ---- the handshake -----------------------------------------------------------------------

    def wait_for_clients(self, grid: Grid) -> dict[int, Metadata]:
        """Wait until every client is connected, `join_timeout` seconds at most; return what each says of itself.

        Raises
        ------
        RunFailed
            Some did not come within run.join-timeout, or, where Flower simulates all nodes, cannot come any more; the
            message says why by node.
        """
        now = time.monotonic()
        end, few = now + self._join_timeout, now + SIMULATED_NODES_APPEAR
        patient = now + PATIENCE
        poller, seen, heard = HandshakePoller(grid, end), set[int](), dict[int, Handshake]()
        bound = self.bound()
        while True:
            there = set(grid.get_node_ids())
            seen |= there
            poller.ask(there)
            for handshake in poller.hear():
                reason = self._stranger(handshake, bound) or self.misfit(handshake)
                if reason is None:
                    heard[handshake.node] = handshake
                else:
                    poller.odd[handshake.node] = reason
            met, aside = self._seats(heard, there, bound)
            reasons = {**poller.reasons(), **aside}
            coming = poller.uploading() | set(poller.lost)
            self._tell({node: reason for node, reason in reasons.items() if node not in coming})
            if self._all_met(met, poller.silent(there)):
                return dict(self._metadata)
            timeout = f" within run.join-timeout {self._join_timeout:g} s"
            if is_simulation(grid):  # no node comes later
                if len(there) >= self._clients and there <= poller.answered:
                    raise RunFailed(self._too_few(met, reasons, ""))
                if len(seen) < self._clients and time.monotonic() > few:
                    raise RunFailed(
                        f"Flower simulates {len(seen)} SuperNodes and run.clients is {self._clients}: set "
                        f"num-supernodes to {self._clients}, as `ssfl run` does"
                    )
            if time.monotonic() > end:
                raise RunFailed(self._too_few(met, reasons, timeout))
            if time.monotonic() > patient:
                patient = end
                self.say(f"{len(met)} of {self._clients} clients are here; waiting for the others{timeout}")
            time.sleep(SIMULATION_POLL if is_simulation(grid) else DEPLOYMENT_POLL)

    def holding(self, client: int) -> DataSummary | None:
        """Return what a client said at the handshake that it holds; None if it did not say."""
        metadata = self._metadata.get(client, {})
        return read_data_summary(metadata) if "classes" in metadata else None

    def key_of(self, client: int) -> bytes:
        """Return the public key that a client said at the handshake; RunFailed if it said none."""
        key = self._metadata.get(client, {}).get(KEY)
        if not isinstance(key, bytes):
            raise RunFailed(
                f"{_called(self._place(client))} said no key at the handshake, and privacy.secure-aggregation is true"
            )
        return key

    def _stranger(self, handshake: Handshake, bound: Mapping[Claim, int]) -> str | None:
        """Return why the place that a node claims cannot be its own, whoever else is there."""
        place, claim = handshake.place, _claim(handshake)
        if self._keyed and KEY not in handshake.metadata:
            return f"{claim}, and says no key; privacy.secure-aggregation is true"
        if bound.get(place, handshake.node) != handshake.node:
            return f"{claim}, whose key is that of node {bound[place]}"
        own = [other for other, node in bound.items() if node == handshake.node]
        if own and place not in own:
            return f"{claim}, and its key is that of {_called(own[0])}"
        if handshake.name and self.expected and handshake.name not in self.expected:
            return f"{claim}; the sites of the run that is resumed are {_listed(self.expected)}"
        return None

    def _seats(
        self, heard: Mapping[int, Handshake], there: set[int], bound: Mapping[Claim, int]
    ) -> tuple[dict[Claim, Handshake], dict[int, str]]:
        """Return who holds each place, and which nodes hold none and why: the first one of those that are there."""
        met: dict[Claim, Handshake] = {}
        aside: dict[int, str] = {}
        owners: dict[object, Handshake] = {}  # of public keys
        for handshake in sorted(heard.values(), key=lambda each: each.node not in there):  # stable: else as they came
            if handshake.number is not None and handshake.number >= self._clients:
                aside[handshake.node] = f"{_claim(handshake)}, run.clients is {self._clients}"
            elif (holder := met.setdefault(handshake.place, handshake)) is not handshake:
                key = "name" if handshake.name else "partition-id"
                aside[handshake.node] = f"{_claim(handshake)}, which node {holder.node} is; each needs its own {key}"
            elif (twin := owners.setdefault(handshake.metadata.get(KEY, handshake.node), handshake)) is not handshake:
                # Both: who was heard first may be the liar, who need not have the private key that belongs to it.
                del met[handshake.place]
                met.pop(twin.place, None)
                aside[handshake.node] = f"{_claim(handshake)}, {_same_key(twin.place, twin.node)}"
                aside[twin.node] = f"{_claim(twin)}, {_same_key(handshake.place, handshake.node)}"
        # Not those who came first: chance would say which ones take part. Nor do strangers crowd registered ones out.
        names = sorted((place for place in met if isinstance(place, str)), key=lambda name: (name not in bound, name))
        for name in names[self._clients :]:
            others = _listed(sorted(names[: self._clients]))
            aside[met.pop(name).node] = f"is site {name!r}; run.clients is {self._clients}: {others}"
        return met, aside

    def _all_met(self, met: Mapping[Claim, Handshake], more_may_come: bool) -> bool:
        """Return whether all clients are there; number them."""
        numbers = {place: handshake for place, handshake in met.items() if isinstance(place, int)}
        names = sorted(place for place in met if isinstance(place, str))
        # A site that is connected already must be counted, else chance would say which ones take part.
        if len(numbers) < self._clients and (len(names) < self._clients or more_may_come):
            return False
        by_name = len(numbers) < self._clients
        found = [met[name] for name in names] if by_name else [numbers[i] for i in range(self._clients)]
        self.names = dict(enumerate(names)) if by_name else {}
        self.nodes = {client: handshake.node for client, handshake in enumerate(found)}
        self._first = {client: (handshake.node, handshake.metadata) for client, handshake in enumerate(found)}
        self._metadata = {client: metadata for client, (_, metadata) in self._first.items()}
        return True

    def _tell(self, reasons: Mapping[int, str]) -> None:
        """Say once why each node that could have a place has none; more nodes than clients are nothing to say."""
        spare = f"run.clients is {self._clients}"
        for node, reason in sorted(reasons.items()):
            text = f"node {node} is set aside: {reason}"
            if not reason.endswith(spare) and text not in self._said and len(self._said) < MOST_WARNINGS:
                self._said.add(text)
                more = "; no more of these are told" if len(self._said) == MOST_WARNINGS else ""
                self._warn(f"{text}{more}")

    def _warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def _too_few(self, met: Mapping[Claim, Handshake], reasons: Mapping[int, str], timeout: str) -> str:
        clients, names = self._clients, [place for place in met if isinstance(place, str)]
        missing: list[str] = sorted(set(self.expected) - set(names))
        if names and not missing:
            missing = [f"{clients - len(names)} beside {_listed(names)}"]
        missing = missing or [str(number) for number in range(clients) if number not in met]
        why = [f"node {node} {reason}" for node, reason in sorted(reasons.items())]
        return f"{len(met)} of {clients} clients joined{timeout}; missing: {_listed(missing)}" + (
            f" ({_listed(why, '; ')})" if why else ""
        )

    # ---- later -------------------------------------------------------------------------------

    def readmit(self, grid: Grid) -> tuple[list[int], dict[int, str]]:
        """Give places back to nodes that are back, and those of nodes that are gone to new ones that claim them.

        In deployment only. A SuperNode that was set up anew comes back under another node id if its key is another;
        one that comes back under its own needs nothing, unless somebody took its place: then that one leaves it.

        Returns
        -------
        clients : list of int
            Those that live on another node now; nothing is known of what they hold.
        strangers : dict of int to str
            New nodes that got no place, and why.
        """
        if is_simulation(grid):
            return [], {}
        there, bound = set(grid.get_node_ids()), self.bound()
        back = []
        for client, node in list(self.nodes.items()):
            first, metadata = self._first[client]
            if first in there - {node} and bound.get(self._place(client), first) == first:
                back.append(client)
                self.nodes[client], self._metadata[client] = first, metadata
                self._warn(f"{_called(self._place(client))}: node {first} is back and node {node} leaves its place")
        gone = {client for client, node in self.nodes.items() if node not in there}
        new = there - set(self.nodes.values())
        end = time.monotonic() + REJOIN_TIMEOUT
        poller = HandshakePoller(grid, end)
        while gone and poller.silent(new) and time.monotonic() < end:
            poller.ask(new)
            for handshake in poller.hear():
                before = self.nodes.get(self._client(handshake))
                reason = self._stranger(handshake, bound) or self._takes_over(handshake, gone)
                if reason:
                    poller.odd[handshake.node] = reason
                else:
                    back.append(client := self._client(handshake))
                    gone.discard(client)
                    self._warn(
                        f"{_called(handshake.place)}: node {before} is gone and node {handshake.node} takes its place"
                    )
            if gone and poller.silent(new):
                time.sleep(DEPLOYMENT_POLL)
        return sorted(set(back)), poller.reasons()

    def _place(self, client: int) -> Claim:
        return self.names.get(client, client)

    def _client(self, handshake: Handshake) -> int:
        """Return the number of the place that a node claims; -1 if the run has no such place."""
        if handshake.number is not None:
            return handshake.number if handshake.number in self.nodes and not self.names else -1
        return next((client for client, name in self.names.items() if name == handshake.name), -1)

    def _takes_over(self, handshake: Handshake, gone: set[int]) -> str | None:
        """Let a node take the place it claims, or return why it cannot."""
        client, claim = self._client(handshake), _claim(handshake)
        if client not in gone:
            return f"{claim}: " + ("its node is still there" if client in self.nodes else "there is no such client")
        for key in ("code", "classes", "shape"):
            if handshake.metadata.get(key) != self._metadata[client].get(key):
                return f"{claim}, with another {key} than before"
        public = handshake.metadata.get(KEY)
        for other, metadata in self._metadata.items():
            if public is not None and other != client and metadata.get(KEY) == public:
                return f"{claim}, {_same_key(self._place(other), self.nodes[other])}"
        self.nodes[client], self._metadata[client] = handshake.node, handshake.metadata
        return None


def _called(place: Claim) -> str:
    return f"site {place!r}" if isinstance(place, str) else f"client {place}"


def _claim(handshake: Handshake) -> str:
    return f"says that it is {_called(handshake.place)}"


def _same_key(place: Claim, node: int) -> str:
    # As where a machine was copied. What one masks, the other can take off.
    return (
        f"with the masking key of node {node}, which says that it is {_called(place)}: remove {KEY_FILE} at one, it "
        "makes another; or one of them lies: compare fingerprints before you remove a key"
    )


def _listed(words: Iterable[str], between: str = ", ") -> str:
    listed = list(words)
    return between.join(listed[:10]) + (f"{between}..." if len(listed) > 10 else "")
