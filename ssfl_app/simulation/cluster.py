"""A run on a Ray cluster that others started: ``ssfl run --ray-address``.

What Flower leaves to its user there, and is done here, before the run begins:

- a cluster without a token runs the code of whoever reaches it: it is refused, unless an argument takes it as it is.
- the nodes have no code of this run, or another checkout's: the launcher's is shipped to each as Ray's working
  directory, foreign modules with it, and the server's search path is not handed to other machines.
- another version of a library, or other data under the same path, gives other bits or an error in some later round:
  each node opens the data once and tells versions and digests; what differs is refused by the name of the node.
- clients keep files, and may be asked on another node in the next round: one actor on this machine has them all.
- Flower makes as many actors as the nodes have room for: how much room one takes is chosen here.

All of this is one process, a driver of Ray's beside Flower's: it asks the nodes, tells the launcher what it found,
and holds the actor until the launcher is gone. Ray's authentication mode is read once a process, so whether the
cluster has a token is found out in another one.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.common.constant import FAB_EXCLUDE_PATTERNS

from ssfl_app.comm.ray_cluster import NAME, NAMESPACE, NODES, Keeper, silent
from ssfl_app.cores import ACTORS, usable_cores
from ssfl_app.locks import RunFailed
from ssfl_app.options import ConfigError
from ssfl_app.simulation.command import RayCluster
from ssfl_app.simulation.prepared_run import PreparedRun, gpu_share
from ssfl_app.simulation.processes import cause_in_log, words_of
from ssfl_app.text import in_a_line, one_line

if TYPE_CHECKING:
    from ssfl_app.config import Flat

SHIPPED = "SSFL_SHIPPED"
"""Environment variable of Flower's simulation: the folder with the code for the nodes, and `NAME` and threads."""

CONNECT, PROBE = 5.0, 300.0
"""Seconds that the cluster's address, and each node, has for its first answer; a node reads the data in that time."""

DEAD = 60.0
"""Seconds in which a cluster finds out that a node is dead; Ray asks each 5 times, every 3 s."""

LIBRARIES = ("flwr", "numpy", "ray", "torch", "torchvision")
"""Whose versions must be this machine's on every node: bits and messages depend on them."""

AT_ONCE = 32
"""Clients that Flower keeps busy at most: the threads of its pool, of which there are 4 above the cores, too."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster: how people call it, Ray's id, what it has for actors, and where its raylet listens."""

    name: str
    number: str
    cpus: int
    gpus: int
    place: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Room:
    """How much of a node an actor takes, and how many actors there are then."""

    actors: int
    cpus: int
    gpu: float


@dataclass(frozen=True)
class Joined:
    """A cluster that takes part in a run; `variables` are for Flower's simulation."""

    room: Room
    variables: dict[str, str]
    line: str


@contextmanager
def joined(
    cluster: RayCluster, run: PreparedRun, app: Path, variables: Mapping[str, str], log: Path
) -> Iterator[Joined]:
    """Have a cluster take part in a run while inside.

    Parameters
    ----------
    app : Path
        The folder with the run's code.
    variables : mapping of str to str
        The environment of the process that speaks with Ray.
    log : Path
        File for what Ray says.

    Raises
    ------
    ConfigError
        There is no such cluster, this machine is none of its nodes, it wants another token or has none, has too
        little room, or a node of it lacks something or has another one.
    RunFailed
        The process that speaks with it died.
    """
    with _asked(_find, {**variables, "RAY_AUTH_MODE": "disabled"}, log, cluster.address) as found:
        address, has_token = found
    if not has_token and not cluster.open_too:
        raise ConfigError(
            f"--ray-address is {address}; whoever reaches this cluster runs code on it, as it has no token: start it "
            "with RAY_AUTH_MODE=token, or say --ray-without-token where its network is closed"
        )
    mode = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token" if has_token else "disabled"}
    with _asked(_serve, {**variables, **mode}, log, address, run, app) as found:
        yield found


@contextmanager
def _asked(task: Callable[..., Iterator[Any]], variables: Mapping[str, str], log: Path, *given: Any) -> Iterator[Any]:
    """Yield what a task yields in a process of its own, which stays there until the end."""
    here, there = multiprocessing.Pipe(duplex=True)
    words = here, there, task, variables, log, given
    process = multiprocessing.Process(target=_work, args=words, daemon=True)
    process.start()
    there.close()
    try:
        try:
            found = here.recv()
        except EOFError:
            process.join()
            why = cause_in_log(words_of(log)) or f"exit code {process.exitcode}"
            raise RunFailed(f"the process that speaks with Ray died: {why}") from None
        if isinstance(found, Exception):
            raise found
        yield found
    finally:
        process.kill()
        process.join()


def _work(
    ours: Connection,
    there: Connection,
    task: Callable[..., Iterator[Any]],
    variables: Mapping[str, str],
    log: Path,
    given: tuple[Any, ...],
) -> None:
    ours.close()
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab") as output:  # Ray's libraries write there, whatever Python's logging is set to
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        for found in task(*given):
            there.send(found)
            there.recv()  # never anything: it waits for the launcher's end
    except EOFError:
        pass
    except ConfigError as error:
        there.send(ConfigError(str(error)))  # of this very class: others need not survive the way


def _find(address: str) -> Iterator[tuple[str, bool]]:
    """Yield the address of a cluster and whether strangers are refused there; this process has no token."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found = str(canonicalize_bootstrap_address_or_die(address))
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()  # Ray would ask for 35 s
        _greet(found)
    except ray.exceptions.AuthenticationError:
        yield found, True
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"--ray-address is {address}; no cluster answers there ({one_line(error)})") from error
    else:
        yield found, False


def _greet(address: str) -> None:
    """Ask a cluster for anything; ray.exceptions.AuthenticationError: not with this token."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    GcsClient(address=address).internal_kv_get(b"session_name", b"session", timeout=CONNECT)


def _serve(address: str, run: PreparedRun, app: Path) -> Iterator[Joined]:
    """Join the cluster as a driver, ask its nodes, start the actor that has the clients' files, and stay."""
    ray: Any = importlib.import_module("ray")  # half of it has no types
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    name = f"ssfl-{secrets.token_hex(8)}"
    variables = {SHIPPED: str(app), NAME: name, "OMP_NUM_THREADS": str(run.threads)}
    variables |= {key: os.environ[key] for key in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    try:
        _greet(address)  # with a wrong token `init` would try for 20 s, and not say why it failed
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, runtime_env=_environment(variables))
    except ray.exceptions.AuthenticationError as error:
        rule = "it takes its own token only: RAY_AUTH_TOKEN, a file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"
        raise ConfigError(f"--ray-address is {address}; {rule}") from error
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        rule = f"this machine joins it first, as one of its nodes: ray start --address={address} --num-cpus=0"
        raise ConfigError(f"--ray-address is {address}; {rule} ({in_a_line(one_line(error))})") from error
    here, nodes = ray.get_runtime_context().get_node_id(), _living(ray, address)
    room, remote = room_for(nodes, run), ray.remote
    made = remote(num_cpus=0, max_concurrency=AT_ONCE)(Keeper)
    # Ray ends an actor that nobody refers to; this function stays where it yields.
    keeper = made.options(name=name, scheduling_strategy=Affinity(here, soft=False)).remote()
    ask = remote(num_cpus=0, max_calls=1)(probe)  # one call: the data go with the process
    asked = {}
    for node in nodes:
        if node.cpus or node.number == here:
            at = Affinity(node.number, soft=False)
            asked[node] = ask.options(scheduling_strategy=at).remote(run.flat, run.modules)
    answers = {node: _answer(ray, reply) for node, reply in asked.items()}
    if wrong := complaints(answers, here):
        raise ConfigError(f"--ray-address is {address}; {'; '.join(wrong)}")
    ray.get(keeper.__ray_ready__.remote())
    places = {node.name: node.place for node in nodes if node.cpus}
    line = f"{room.actors} actors on {len(places)} node(s) of {address}: {', '.join(places)}"
    variables |= {
        ACTORS: str(room.actors),
        NODES: json.dumps(places),
        "RAY_RUNTIME_ENV_HOOK": f"{__name__}.{shipped.__name__}",
    }
    yield Joined(room, variables, line)


def _living(ray: Any, address: str) -> list[Node]:
    """Return the nodes of the cluster, as soon as it knows which of them are dead: Flower would make actors there."""
    end = time.monotonic() + DEAD
    while True:
        nodes = _nodes(ray.nodes())
        gone = silent({node.name: node.place for node in nodes})
        if not gone:
            return nodes
        if time.monotonic() > end:
            what = f"node {gone[0]} does not answer from here, and the cluster counts on it"
            raise ConfigError(f"--ray-address is {address}; {what}")
        time.sleep(1)


def _answer(ray: Any, reply: Any) -> "Answer | str":
    try:
        return ray.get(reply, timeout=PROBE)  # type: ignore[no-any-return]
    except ray.exceptions.GetTimeoutError:
        return f"it did not answer within {PROBE:g} s"
    except ray.exceptions.RayError as error:
        return in_a_line(one_line(getattr(error, "cause", None) or error))


def _nodes(told: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Return the living nodes by what Ray tells of each, in the order of their names."""
    found = []
    for node in told:
        if node["Alive"]:
            has, name = node["Resources"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            place = node["NodeManagerAddress"], node["NodeManagerPort"]
            found.append(Node(name, node["NodeID"], int(has.get("CPU", 0)), int(has.get("GPU", 0)), place))
    return sorted(found, key=lambda node: node.name)


def room_for(nodes: Sequence[Node], run: PreparedRun) -> Room:
    """Return how much of a node an actor takes, so that Flower makes no more of them than are needed.

    Flower fills each node with actors that take the same. With more cores for each there are fewer, and they are
    spread evenly. On a GPU none takes part of two, as Ray gives none that.

    Raises
    ------
    ConfigError
        engine.actors are more than there is room for, run.device is "cuda" and no node has a GPU, or no node a core.
    """
    device, wanted = run.flat["run.device"], int(run.flat["engine.actors"])
    on_gpu = device != "cpu" and any(node.gpus for node in nodes)
    if device == "cuda" and not on_gpu:
        raise ConfigError("run.device is 'cuda'; no node of the Ray cluster has a GPU, so it is 'cpu' or 'auto'")
    able = [node for node in nodes if node.cpus and (node.gpus or not on_gpu)]
    most, driven = sum(node.cpus for node in able), min(AT_ONCE, usable_cores() + 4)
    if not most:
        raise ConfigError("--ray-address names a cluster whose nodes have no cores for actors (ray start --num-cpus)")
    if wanted > min(most, driven):
        why = f"the cluster has {most} cores for them, and Flower drives {driven} from this machine"
        raise ConfigError(f"engine.actors is {wanted}; {why}")
    wanted = wanted or min(most, driven, run.asked)
    each = [c for c in range(1, max(node.cpus for node in able) + 1) if sum(n.cpus // c for n in able) >= wanted]
    cpus = each[-1]
    counts = {node: node.cpus // cpus for node in able if node.cpus >= cpus}
    gpu = min(gpu_share(count, node.gpus) for node, count in counts.items()) if on_gpu else 0.0
    return Room(sum(counts.values()), cpus, gpu)


@dataclass(frozen=True)
class Answer:
    """What a node told: versions, a digest of the code and one of the data, and what its packages do not do."""

    versions: dict[str, str]
    code: str
    data: str
    fault: str


def probe(flat: "Flat", modules: tuple[str, ...]) -> Answer:
    """Return what this node has for a run; it opens the data and the initial weights."""
    import torch

    from ssfl_app.runtime import code_digest, get_runtime

    code, versions = code_digest(modules), libraries()
    try:
        runtime = get_runtime(flat | {"run.device": "cpu"})
        data = hashlib.sha256(runtime.start_digest.encode())
    except ConfigError as error:
        return Answer(versions, code, "", str(error))
    for samples in (runtime.data.train, runtime.data.test):
        for tensor in (samples.inputs, samples.targets):
            data.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            data.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for share in (*runtime.partition.train, *runtime.partition.test):
        data.update(share.tobytes())
    return Answer(versions, code, data.hexdigest(), "")


def libraries() -> dict[str, str]:
    """Return the versions of Python and of `LIBRARIES` here; builds of one version for CPUs and GPUs are one."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def complaints(answers: Mapping[Node, Answer | str], here: str) -> list[str]:
    """Return what nodes lack or have otherwise than the node whose number is `here`, a text for each of them."""
    found, versions = list[str](), libraries()
    (ours,) = (told for node, told in answers.items() if node.number == here)
    for node, told in answers.items():
        if isinstance(told, str):
            found.append(f"node {node.name}: {told}")
            continue
        theirs = told.versions
        other = [f"{name} is {theirs[name]}, not {own}" for name, own in versions.items() if theirs[name] != own]
        other += [told.fault] if told.fault else []
        if isinstance(ours, Answer) and told.code != ours.code:
            other.append(f"its code is {told.code}, not {ours.code}")
        if isinstance(ours, Answer) and not told.fault and not ours.fault and told.data != ours.data:
            other.append("its data or initial weights are others than this machine's, under the same paths")
        found += [f"node {node.name}: {', '.join(other)}"] if other else []
    return found


def shipped(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the environment of Flower's actors: Ray calls this where Flower connects to the cluster.

    What Flower passes, the server's search path as PYTHONPATH, is left out: on another machine other packages may lie
    there.
    """
    return _environment(os.environ)


def _environment(variables: Mapping[str, str]) -> dict[str, Any]:
    of_actors = {name: variables[name] for name in (NAME, "OMP_NUM_THREADS")}
    # Without what Flower leaves out of an app, so that nodes have the very code of the server.
    return {"working_dir": variables[SHIPPED], "excludes": list(FAB_EXCLUDE_PATTERNS), "env_vars": of_actors}
