"""A real federation in the wide area: SuperLink in the server's namespace, a SuperNode with a key in each site's."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from benchmarks.wan.topology import SERVER, SERVER_ADDRESS, WideArea, enter, inside
from ssfl_app import locks
from ssfl_app.deployment import federation as house
from ssfl_app.deployment.control import nodes, register
from ssfl_app.deployment.federation import Federation
from ssfl_app.deployment.services import front_service, node_service, superlink_service
from ssfl_app.deployment.supervisor import Service
from ssfl_app.simulation.processes import end, wait_until_healthy

PORT, CONTROL_PORT, NODE_PORT = 8443, 8444, 9094
ONLINE_TIMEOUT = 120.0
BIN = Path(sys.executable).parent


@contextmanager
def federation(folder: Path, area: WideArea) -> Iterator[Federation]:
    """Start everything, wait until all nodes are online, and end it all in the end.

    This thread moves to the server's namespace and stays there: what it starts later runs beside the SuperLink.
    """
    enter(SERVER)
    # Every node has a namespace of its own, so they may all use the same port there.
    nodes = {site.name: f"partition-id={i} server-data-path=true least-batch=1" for i, site in enumerate(area.sites)}
    ports = [NODE_PORT] * len(nodes)
    made = house.create(folder, SERVER_ADDRESS, (PORT, CONTROL_PORT), nodes, ports, timedelta(days=2))
    services: list[Service] = []
    lock = locks.try_lock(made.lock)  # `federation_run` takes it for the sign that somebody keeps the processes
    try:
        authority = folder / "superlink" / "ca.crt"
        for service, address, answer in (
            (superlink_service(made), made.control_address, 200),
            (front_service(made, SERVER_ADDRESS), made.address, 404),
        ):
            services.append(service)
            service.start()
            assert service.process is not None
            wait_until_healthy(service.process, address, service.log, authority, answer)
        register(made)
        for site, node in zip(area.sites, made.nodes, strict=True):
            service = node_service(folder / "nodes" / node.name, made.address, node.config, node.port)
            service.command = inside(site.namespace, [str(BIN / service.command[0]), *service.command[1:]])
            services.append(service)
            service.start()
        _wait(made, services)
        for service in services:
            assert service.process is not None
            _prefer(service.process.pid)  # `env` and `ip netns exec` become what they start: it is Flower's own
        yield made
    finally:
        end(*(service.process for service in services if service.process is not None))
        if lock is not None:
            lock.close()


def _prefer(pid: int) -> None:
    """Let a process of Flower go before all training: in the real world it shares its cores with one client at most.

    What carries messages gets real-time priority, below the relay's. Its superexec and with it the ClientApps were
    started before and stay as they are.
    """
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile, or a kernel that does not let us
            os.sched_setscheduler(int(task.name), os.SCHED_RR, os.sched_param(5))


def _wait(made: Federation, services: list[Service]) -> None:
    late = time.monotonic() + ONLINE_TIMEOUT
    while sum(node["status"] == "online" for node in nodes(made)) < len(made.nodes):
        ended = [s.name for s in services if s.process is not None and s.process.poll() is not None]
        if ended or time.monotonic() > late:
            raise RuntimeError(f"the nodes are not online; ended: {ended}; logs in {made.folder}")
        time.sleep(0.5)
