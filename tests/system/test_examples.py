"""The example apps, before and after, bytes counted by Flower; those after as a reader would run them, on Ray.

Those before are Flower alone: `tests.play_example` plays them in one process.

What is counted: the bytes of every ArrayRecord that a client receives or sends, as Flower's own `arrays_size_mod`
logs them. That is the serialised arrays (128 bytes of ``.npy`` header each, for the stock apps) and their names.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent
SECONDS = 300
FEDERATION = "client-resources-num-cpus=1 init-args-num-cpus=1"  # one actor

# The CNN of the examples: 38,160 conv and linear weights, 122 biases, in 8 tensors.
PRUNABLE, REST, TENSORS = 38_160, 122, 8
ALIVE = PRUNABLE // 10


@dataclass
class Run:
    """What one run logged: bytes of each message's arrays by direction, and accuracy or loss by round."""

    received: set[int]
    sent: set[int]
    told: list[float]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a neutral folder and an environment with a local SuperLink of its own, which is ended afterwards.

    It is the command that `flwr run` would start, which gives it 15 s, too few on a busy machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("examples")
    environment = os.environ | {
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # equal lines of several clients are the point
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(BIN / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", port, "--database", str(folder / "state.db")]
    process = psutil.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS
        while not answers(port):
            assert process.is_running()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield folder, environment
    finally:
        for member in [*process.children(recursive=True), process]:
            member.kill()
        process.wait()


def answers(port: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def flwr_run(superlink: tuple[Path, dict[str, str]], app: str, rounds: int, nodes: int = 2) -> Run:
    folder, environment = superlink
    command = [str(BIN / "flwr"), "run", str(EXAMPLES / app), "--stream"]
    command += ["--federation-config", f"num-supernodes={nodes} {FEDERATION}"]
    command += ["-c", f"num-server-rounds={rounds}"]
    for _ in range(4):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        told = done.stdout + done.stderr
        if "Failed to start local SuperLink" not in told:  # a busy one was slow to answer, so it started another
            break
    return logged(told, rounds)


def played(app: str, rounds: int, nodes: int = 2) -> Run:
    words = [
        sys.executable,
        "-m",
        "tests.play_example",
        str(EXAMPLES / app),
        str(nodes),
        f"num-server-rounds={rounds}",
    ]
    done = subprocess.run(words, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=SECONDS, check=False)
    return logged(done.stdout + done.stderr, rounds)


def logged(told: str, rounds: int) -> Run:
    run = Run(
        {int(size) for size in re.findall(r"Total array elements received: (\d+) bytes", told)},
        {int(size) for size in re.findall(r"Total array elements sent: (\d+) bytes", told)},
        [float(value) for value in re.findall(r"(?:accuracy|loss) (\d\.\d+)$", told, re.MULTILINE)],
    )
    assert len(run.told) == rounds, told[-3000:]
    return run


@pytest.mark.parametrize("style", ["message-api", "numpy-client"])
def test_three_lines_send_a_tenth_of_the_weights_and_still_learn(
    style: str, superlink: tuple[Path, dict[str, str]]
) -> None:
    before = played(f"{style}/before", 1)
    dense, values = 4 * (PRUNABLE + REST), 4 * (ALIVE + REST)
    (down,) = before.received
    assert dense < down < dense + TENSORS * 150
    assert before.sent - {0} == {down}

    after = flwr_run(superlink, f"{style}/after", 2)
    name = len("values")
    # Sent: scores of all weights, once; then alive values and biases. 0 in an evaluation, which sends metrics only.
    assert after.sent - {0} == {4 * PRUNABLE + name, values + name}
    # Received: initial weights with the sheet, once; the first values with mask and sheet, once; then values.
    assert min(after.received) == values + name
    once = sorted(after.received)[1]
    assert values + PRUNABLE // 8 < once < values + PRUNABLE // 8 + 1000
    assert dense < max(after.received) < dense + 1000
    assert len(after.received) == 3
    assert down / min(after.received) > 9.7

    assert after.told[-1] > 0.75
    assert after.told[-1] > after.told[0]


def test_a_quarter_of_the_adapters_travels_and_they_still_learn(superlink: tuple[Path, dict[str, str]]) -> None:
    """LoRA, peft and HF Trainer, as Flower's flowertune apps have them."""
    before = played("lora/before", 1, nodes=3)
    adapters, tensors, name = 3072, 12, len("values")
    (down,) = before.received
    assert 4 * adapters < down < 4 * adapters + tensors * 250
    assert before.sent - {0} == {down}

    after = flwr_run(superlink, "lora/after", 3, nodes=3)
    assert after.sent - {0} == {4 * adapters + name, adapters + name}
    assert min(after.received) == adapters + name
    assert after.told[-1] < 0.95 * before.told[0], (before.told, after.told)
    assert after.told == sorted(after.told, reverse=True), after.told  # it falls in every round


def test_an_app_of_ones_own_names_both_apps_and_nothing_else(
    superlink: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """The folder is a Flower app: `flwr run` takes it as it is, and keys that it lacks have their defaults."""
    folder, variables = superlink
    own, out = Path(shutil.copytree(EXAMPLES / "own", tmp_path / "own")), tmp_path / "run"
    line = [str(BIN / "flwr"), "run", str(own), "--stream", "-c", f"run.out='{out}' run.rounds=1"]
    line += ["--federation-config", f"num-supernodes=4 {FEDERATION}"]
    told = subprocess.run(
        line, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    summary = json.loads((out / "summary.json").read_text()) if (out / "summary.json").exists() else None
    assert summary is not None, (told.stdout + told.stderr)[-3000:]
    again = [sys.executable, "-m", "ssfl_app", "run", str(out / "config.toml"), "--out", str(tmp_path / "again")]
    subprocess.run([*again, "-c", "run.out=''"], cwd=own, check=True, timeout=SECONDS, capture_output=True)
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["model_sha256"] == summary["model_sha256"]
