"""The roster: which client each node is, and who took whose place.

What one node says never ends the run, except where no other answer could help: it cannot start, or two nodes claim
one place. Sites with data of their own have names; their numbers are the ranks of the names, whatever Flower's node
ids are and whoever came first.
"""

import time
from collections.abc import Iterable, Mapping

from flwr.serverapp import Grid

from ssfl_app.exchange import DEPLOYMENT_POLL, SIMULATION_POLL, is_simulation
from ssfl_app.guard import RunFailed
from ssfl_app.local.holdings import Holding, read_holding
from ssfl_app.strategies.greeting import Hello, Hellos
from ssfl_app.strategies.settings import RunOptions
from ssfl_app.wire import Facts

SIMULATED_NODES_APPEAR = 5.0
"""Seconds after which all simulated nodes are there: Flower registers them together, before its actors start."""

REJOIN_TIMEOUT = 15.0
"""Seconds that a round waits for nodes that may take the place of others."""


class Roster:
    """Who is who: which node each client lives on, and what it said of itself.

    Parameters
    ----------
    run : RunOptions
        The room ``run``.

    Attributes
    ----------
    nodes : dict of int to int
        Client -> Flower's node id.
    names : dict of int to str
        Client -> name of the site; empty where partitions of a shared data set are dealt.
    expected : tuple of str
        Names of the sites of a run that is resumed, by client; empty: whoever comes.
    """

    def __init__(self, run: RunOptions) -> None:
        self.nodes: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.expected: tuple[str, ...] = ()
        self._run = run
        self._facts: dict[int, Facts] = {}
        self._met: dict[int | str, Hello] = {}  # by number, or by name
        self._aside: dict[int, str] = {}

    def meet(self, grid: Grid) -> dict[int, Facts]:
        """Wait until every client is connected, and return what each says of itself.

        Raises
        ------
        RunFailed
            Some did not come within run.join-timeout, two claim one place, one cannot start, or there are other or
            more sites than the run has.
        """
        now = time.monotonic()
        end, few = now + self._run.join_timeout, now + SIMULATED_NODES_APPEAR
        hellos, seen = Hellos(grid, end), set[int]()
        while True:
            there = set(grid.get_node_ids())
            seen |= there
            hellos.ask(there)
            for hello in hellos.hear():
                self._enter(hello, there)
            if self._all_met(hellos.silent(there)):
                return dict(self._facts)
            if hellos.raised and not hellos.silent(there):
                node, reason = min(hellos.raised.items())
                raise RunFailed(f"a client cannot start: node {node} {reason}")
            if is_simulation(grid) and len(seen) < self._run.clients and time.monotonic() > few:
                raise RunFailed(
                    f"Flower simulates {len(seen)} SuperNodes and run.clients is {self._run.clients}: set "
                    f"num-supernodes to {self._run.clients}, as `ssfl run` does"
                )
            if time.monotonic() > end:
                raise RunFailed(self._too_few({**self._aside, **hellos.lost, **hellos.odd, **hellos.raised}))
            time.sleep(SIMULATION_POLL if is_simulation(grid) else DEPLOYMENT_POLL)

    def holding(self, client: int) -> Holding | None:
        """Return what a client said at the greeting that it holds; None if it did not say."""
        facts = self._facts.get(client, {})
        return read_holding(facts) if "classes" in facts else None

    def _enter(self, hello: Hello, there: set[int]) -> None:
        if hello.number is not None and hello.number >= self._run.clients:
            self._aside[hello.node] = f"says that it is client {hello.number}, run.clients is {self._run.clients}"
            return
        if hello.name and self.expected and hello.name not in self.expected:
            raise RunFailed(
                f"node {hello.node} is site {hello.name!r}, which the run that is resumed does not have; "
                f"its sites are {_listed(self.expected)}"
            )
        before = self._met.get(hello.place)
        if before is not None and before.node in there and before.node != hello.node:
            who, key = (f"site {hello.name!r}", "name") if hello.name else (f"client {hello.number}", "partition-id")
            nodes = " and ".join(map(str, sorted((before.node, hello.node))))
            raise RunFailed(f"two nodes say that they are {who}: {nodes}; each needs its own {key}")
        self._met[hello.place] = hello

    def _all_met(self, more_may_come: bool) -> bool:
        """Return whether all clients are there; number them."""
        numbers = {place: hello for place, hello in self._met.items() if isinstance(place, int)}
        names = sorted(place for place in self._met if isinstance(place, str))
        if len(names) > self._run.clients:
            raise RunFailed(
                f"{len(names)} sites are connected and run.clients is {self._run.clients}: {_listed(names)}"
            )
        # A site that is connected already must be counted, else chance would say which ones take part.
        if len(numbers) < self._run.clients and (len(names) < self._run.clients or more_may_come):
            return False
        by_name = len(numbers) < self._run.clients
        found = [self._met[name] for name in names] if by_name else [numbers[i] for i in range(self._run.clients)]
        self.names = dict(enumerate(names)) if by_name else {}
        self.nodes = {client: hello.node for client, hello in enumerate(found)}
        self._facts = {client: hello.facts for client, hello in enumerate(found)}
        return True

    def _too_few(self, reasons: Mapping[int, str]) -> str:
        clients, names = self._run.clients, [place for place in self._met if isinstance(place, str)]
        missing: list[str] = sorted(set(self.expected) - set(names))
        if names and not missing:
            missing = [f"{clients - len(names)} beside {_listed(names)}"]
        missing = missing or [str(number) for number in range(clients) if number not in self._met]
        why = [f"node {node} {reason}" for node, reason in sorted(reasons.items())]
        return (
            f"{len(self._met)} of {clients} clients joined within run.join-timeout {self._run.join_timeout:g} s; "
            f"missing: {_listed(missing)}" + (f" ({_listed(why, '; ')})" if why else "")
        )

    # ---- later -------------------------------------------------------------------------------

    def rejoin(self, grid: Grid) -> tuple[list[int], dict[int, str]]:
        """Give the places of nodes that are gone to new ones that claim them.

        In deployment only, and only while nodes are gone and others are there: a SuperNode that was set up anew
        comes back under another node id. One that comes back under its own needs nothing.

        Returns
        -------
        clients : list of int
            Those that live on another node now; nothing is known of what they hold.
        strangers : dict of int to str
            New nodes that got no place, and why.
        """
        if is_simulation(grid):
            return [], {}
        there = set(grid.get_node_ids())
        gone = {client for client, node in self.nodes.items() if node not in there}
        new = there - set(self.nodes.values())
        back: list[int] = []
        end = time.monotonic() + REJOIN_TIMEOUT
        hellos = Hellos(grid, end)
        while gone and hellos.silent(new) and time.monotonic() < end:
            hellos.ask(new)
            for hello in hellos.hear():
                reason = self._takes_over(hello, gone)
                if reason:
                    hellos.odd[hello.node] = reason
                else:
                    back.append(client := self._client(hello))
                    gone.discard(client)
            if gone and hellos.silent(new):
                time.sleep(DEPLOYMENT_POLL)
        return sorted(back), {**hellos.lost, **hellos.odd, **hellos.raised}

    def _client(self, hello: Hello) -> int:
        """Return the number of the place that a node claims; -1 if the run has no such place."""
        if hello.number is not None:
            return hello.number if hello.number in self.nodes and not self.names else -1
        return next((client for client, name in self.names.items() if name == hello.name), -1)

    def _takes_over(self, hello: Hello, gone: set[int]) -> str | None:
        """Let a node take the place it claims, or return why it cannot."""
        client, place = self._client(hello), f"says that it is {hello.place!r}"
        if client not in gone:
            return f"{place}: " + ("its node is still there" if client in self.nodes else "there is no such client")
        for key in ("code", "classes", "shape"):
            if hello.facts.get(key) != self._facts[client].get(key):
                return f"{place}, with another {key} than before"
        self.nodes[client], self._facts[client] = hello.node, hello.facts
        return None


def _listed(words: Iterable[str], between: str = ", ") -> str:
    listed = list(words)
    return between.join(listed[:10]) + (f"{between}..." if len(listed) > 10 else "")
