"""All that this package changes in Flower's code while it runs; nothing else patches Flower or its HTTP client.

`deployment/supernode.py` makes the first four in the processes of a node, `server_app.py` the last one in a
simulation on Ray, and only under a version of Flower whose source was read for them (`KNOWN`). Under another one
nothing is changed, and a node says so in its log: then they wait as Flower does, and do the same work.

| function | what Flower 1.41 does | asked for upstream |
|---|---|---|
| `pace` | a SuperNode without a message sleeps 3 s, and looks for its ClientApp's reply every 0.5 s | none; \
flwrlabs/flower#8041 made the SuperExec's interval an option, not these |
| `objects` | an object of a message that the server has not uploaded yet is asked for again after 1 s; two objects \
travel at once, and no more than there are cores | none |
| `keep_alive` | an HTTP connection that is idle for 5 s is closed, which is httpx' default | encode/httpx#1395 |
| `installed` | each message unpacks and checks the app again, which is installed already | flwrlabs/flower#3670 |
| `mailboxes` | a simulation looks through all messages for each of its nodes, ten times a second | none |

The warm ClientApp (`executor.py`) is no patch: it takes the place of ``flower-superexec``, as
``--isolation process`` allows, and stands for flwrlabs/flower#3670 too.
"""

import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Message
from flwr.cli.install import install_from_fab
from flwr.common.constant import Status
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.protobuf import client
from flwr.supercore.version import package_version
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState
from flwr.supernode.runtime import run_clientapp

# Modules of Flower whose names are replaced: those that these have imported themselves.
_node_loop: Any = start_client_internal
_objects: Any = inflatable_utils
_http: Any = client
_client_process: Any = run_clientapp

KNOWN = ("1.41.", "1.42.")
"""Beginnings of the versions of Flower that the changes are for."""

SHORTEST = 0.25
"""Seconds between two looks for a message, at least: a look costs the SuperLink 25 ms of CPU."""

SHARE = 0.1
"""Of the time that a node has waited for a message already it waits before the next look. So the wait makes a round
longer by that share at most, and a node with nothing to do soon asks as seldom as Flower's own."""

AT_ONCE = 0.02
"""Seconds between two looks for the ClientApp's reply, which lies in the memory of the SuperNode's process."""

UPLOADED = 0.1
"""Seconds after which an object of a message is asked for again, each further time after twice as many: a node that
looks often sees a message whose objects are still on their way from the server."""

TOGETHER = 3
"""Objects of a message that travel at once, each on a connection of its own: all of those that a small message has
(`comm/payload.py`). They wait for the network, not for a core; with two the last one waits for the largest."""

HANDED_OVER = 5.0
"""Seconds that a node waits at most, before it asks for a message, for what the ClientApp of the last one keeps."""

KEEP_ALIVE = 120.0
"""Seconds that an idle connection of a node is kept. The heartbeat, two a minute, keeps one of them for ever. Load
balancers and firewalls of clouds forget connections that are idle for some four minutes without a word to anybody."""


def known(version: str = package_version) -> bool:
    """Return whether the changes are for this version of Flower."""
    return version.startswith(KNOWN)


class Pace:
    """Stands in for the module `time` in a SuperNode's loop: it sleeps less than the loop asks for.

    Or longer, `rest` seconds at most, if it has had no message for ten times as long (`SHARE`).
    """

    def __init__(self, rest: float = 0.0) -> None:
        self._busy, self._rest = time.monotonic(), rest

    def busy(self) -> None:
        """Note that the node has work now."""
        self._busy = time.monotonic()

    def wait(self, seconds: float) -> float:
        """Return how long to sleep where Flower sleeps `seconds`: 3 without a message, 0.5 while it has one."""
        if seconds < 1:
            self.busy()
            return min(seconds, AT_ONCE)
        return min(max(seconds, self._rest), max(SHORTEST, SHARE * (time.monotonic() - self._busy)))

    def sleep(self, seconds: float) -> None:
        """Sleep that long."""
        time.sleep(self.wait(seconds))


def pace(told: Callable[[NodeState, int], None], rest: float = 0.0) -> None:
    """Have the SuperNode of this process wait less; `told` gets its state and a run when a message of it is there.

    With nothing to do it waits up to `rest` seconds, or Flower's 3.
    """
    waits, pull = Pace(rest), start_client_internal._pull_and_store_message

    @functools.wraps(pull)
    def pull_and_tell(*, state: NodeState, **others: Any) -> int | None:
        # A ClientApp hands its state over after its reply. Flower's 0.5 s between looks were longer than that takes.
        end = time.monotonic() + HANDED_OVER
        while state.get_tasks(statuses=[Status.RUNNING]) and time.monotonic() < end:
            time.sleep(AT_ONCE)
        run_id = pull(state=state, **others)
        if run_id is not None:
            waits.busy()
            told(state, run_id)
        return run_id

    _node_loop.time = waits
    _node_loop._pull_and_store_message = pull_and_tell


def objects() -> None:
    """Have the SuperNode of this process move the objects of a message together, and ask soon for missing ones."""
    _node_loop.pull_objects = functools.partial(inflatable_utils.pull_objects, initial_backoff=UPLOADED)
    _objects.get_num_workers = lambda asked: max(asked, TOGETHER)


def keep_alive() -> None:
    """Have the Flower clients of this process keep their idle connections for `KEEP_ALIVE` seconds."""
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=KEEP_ALIVE)
    _http.httpx = SimpleNamespace(**vars(httpx) | {"Client": functools.partial(httpx.Client, limits=limits)})


def installed(fab_hash: str) -> None:
    """Have the ClientApps of this process take the app with this hash (SHA-256, hex) for installed, which it is."""

    def install(fab: Path | bytes, *words: Any, **named: Any) -> Any:
        if isinstance(fab, bytes) and hashlib.sha256(fab).hexdigest() == fab_hash:
            return None
        return install_from_fab(fab, *words, **named)

    _client_process.install_from_fab = install


def mailboxes(state: InMemoryLinkState) -> None:
    """Have the state of a simulation know which messages wait for a node.

    Flower asks it for the messages of each node in turn, and it looks through all of them each time: for 10,000 nodes
    with one message each that is a hundred million looks. With these boxes it looks through those of the node.
    """
    boxes, store = defaultdict[int, list[str]](list), state.store_message_ins

    def store_in_box(message: Message) -> str | None:
        with state.lock:
            message_id = store(message)
            if message_id is not None:
                boxes[message.metadata.dst_node_id].append(message_id)
            return message_id

    def find_in_box(node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        if node_id not in boxes:
            return []
        found = list[Message]()
        with state.lock:
            waiting, boxes[node_id] = boxes[node_id], []
            for message_id in waiting:
                state._check_stored_messages({message_id})
                message = state.message_ins_store.get(message_id)  # None: it has expired
                if message is not None and len(found) != limit and run_id in (None, message.metadata.run_id):
                    message.metadata.delivered_at = now().isoformat()
                    found.append(message)
                elif message is not None:
                    boxes[node_id].append(message_id)
            if not boxes[node_id]:
                del boxes[node_id]
        return found

    patched: Any = state
    patched.store_message_ins, patched.get_message_ins = store_in_box, find_in_box
