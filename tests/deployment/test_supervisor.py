"""The supervisor: what ends is started again, later each time; what gives up is ended first."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssfl_app.deployment import supervisor
from ssfl_app.deployment.supervisor import DELAYS, Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Make services that are ended with the test."""
    made: list[Service] = []

    def make(code: str, surrender: str = "") -> Service:
        script = tmp_path / "script.py"
        script.write_text(code)
        own = Service("it", ["python", str(script)], tmp_path, dict(os.environ), tmp_path / "log", surrender)
        made.append(own)
        return own

    yield make
    supervisor.end(*(one.process for one in made if one.process is not None))


def wait_until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_ends_is_started_again_later_each_time(service: Callable[..., Service]) -> None:
    it, now = service("raise SystemExit(3)"), 1000.0
    it.start()
    for number, delay in enumerate([*DELAYS, DELAYS[-1]]):
        wait_until(lambda: it.process is not None and it.process.poll() is not None)
        assert it.look(now)  # sees the end
        assert it.process is None
        assert it.restarts == number + 1
        assert not it.look(now + delay - 0.01)
        assert it.look(now + delay)  # starts it again
        now += delay
    text = it.log.read_text()
    assert text.count("starting it") == len(DELAYS) + 2
    assert f"it ended with 3; started again in {DELAYS[0]:g} s" in text


def test_what_has_run_for_long_is_started_at_once_again(service: Callable[..., Service]) -> None:
    it = service("import time; time.sleep(60)")
    it.start()
    it.ends = 3
    assert not it.look(it.began + supervisor.STEADY + 1)
    assert it.ends == 0


def test_what_gives_up_without_ending_is_ended_and_started_again(service: Callable[..., Service]) -> None:
    it = service("import time; print('I give up', flush=True); time.sleep(60)", "I give up")
    it.start()
    first = it.process
    assert first is not None
    wait_until(lambda: b"I give up\n" in it.log.read_bytes())
    assert it.look(0.0)
    assert first.poll() is not None
    assert it.look(DELAYS[0])
    assert it.process is not None
    assert it.process.poll() is None
    assert it.read >= it.log.read_bytes().index(b"I give up\n") + 10  # what the first one said counts no more


def test_a_supervisor_stops_what_it_keeps_and_says_what_runs(service: Callable[..., Service], tmp_path: Path) -> None:
    state = tmp_path / "running.json"
    code = (
        "from pathlib import Path; from ssfl_app.deployment.supervisor import Supervisor, Service; import os, sys; "
        f"folder = Path({str(tmp_path)!r}); k = Supervisor(folder / 'running.json'); "
        "k.add([Service('it', ['python', '-c', 'import time; time.sleep(60)'], folder, dict(os.environ), "
        "folder / 'log')]); k.run(); k.close()"
    )
    it = service(code)
    it.start()
    wait_until(state.exists)
    assert it.process is not None
    it.process.send_signal(signal.SIGTERM)
    assert it.process.wait(30) == 0
    assert not state.exists()
