"""What TensorBoard, MLflow and W&B have of a run that was killed and resumed, read back by their own readers."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssfl_app import client_app, server_app
from ssfl_app.callbacks.base import points
from ssfl_app.config import Flat, merge, parse, read_file
from ssfl_app.metrics import ACCURACY
from ssfl_app.results.recorder import Recorder
from ssfl_app.simulation.in_process import run_inline
from tests.in_process_grid import FEW, SMALL

KEYS: Flat = SMALL | FEW | {"engine.concurrent": 1, "run.rounds": 4, "run.checkpoint-every": 2}
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a run of four rounds; it was killed after round 3, and went on after round 2."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    keys = KEYS | {"run.trackers": "tensorboard,mlflow,wandb", "run.out": str(folder)}
    whole = Recorder.round

    def killed(self: Recorder, record: dict[str, Any]) -> None:
        whole(self, record)
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "round", killed)
        with pytest.raises(KeyboardInterrupt):
            run_inline(server_app.app, client_app.app, parse(merge(keys)))
    run_inline(server_app.app, client_app.app, parse(merge(keys, {"run.resume": True})))
    return folder


def recorded(folder: Path) -> Points:
    """Return the points that a tracker is to have: those of rounds.jsonl."""
    found: Points = {}
    for record in map(json.loads, (folder / "rounds.jsonl").read_text().splitlines()):
        for name, value in points(record, ACCURACY).items():
            if name != "seconds":  # of a round that was played twice they differ
                found.setdefault(name, []).append((record["round"], pytest.approx(value, rel=1e-6)))
    assert [round_ for round_, _ in found["lost"]] == [0, 1, 2, 3, 4]
    assert {"train_loss", "central_accuracy", "bytes_train_up", "density"} <= set(found)
    return found


def config_of(folder: Path) -> Flat:
    return read_file(folder / "config.toml")


def test_no_tracker_failed(folder: Path) -> None:
    assert "failed_trackers" not in json.loads((folder / "summary.json").read_text())
    assert "gets nothing more" not in (folder / "console.log").read_text()


def test_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]}
    assert [step for step, _ in found.pop("seconds")] == [0, 1, 2, 3, 4]
    assert found == recorded(folder)
    content = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert said["local.lr"].number_value == config_of(folder)["local.lr"]
    assert set(said) == set(config_of(folder))


def test_mlflow(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'ssfl'")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    found = {name: sorted((point.step, point.value) for point in each) for name, each in history.items()}
    assert [step for step, _ in found.pop("seconds")] == [0, 1, 2, 3, 4]
    assert found == recorded(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    theirs = {key: str(value) for key, value in config_of(folder).items() if key != "run.resume"}
    assert {key: value for key, value in run.data.params.items() if key != "run.resume"} == theirs


def chunks(log: bytes) -> Iterator[bytes]:
    """Yield what a .wandb file holds: a header of 7 bytes, then LevelDB's log format."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if at % 32768 > 32768 - 7:  # no header fits in the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        parts, at = parts + log[at + 7 : at + 7 + length], at + 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield parts
            parts = b""


def test_wandb(folder: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Points = {}
    config: dict[str, Any] = {}
    ids = set()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        for data in chunks(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = [
                    (item.key or item.nested_key[0], json.loads(item.value_json)) for item in record.history.item
                ]
                row = dict(items)
                for name, value in items:
                    if not name.startswith("_"):
                        found.setdefault(name, []).append((row["_step"], value))
    assert len(ids) == 1
    found["bytes_mask_down"][2] = recorded(folder)["bytes_mask_down"][2]  # sent once more; the first point stays
    assert [step for step, _ in found.pop("seconds")] == [0, 1, 2, 3, 4]
    assert found == recorded(folder)
    assert {key: config[key] for key in config_of(folder)} == config_of(folder)


def test_a_number_that_is_not_finite_is_logged_too(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ssfl_app.callbacks import find
    from ssfl_app.callbacks.base import RunInfo
    from ssfl_app.metrics import Metric

    metric = Metric("mean absolute error", share=False, higher=False)
    record = {
        "round": 1,
        "train_loss": math.nan,
        "central_loss": math.inf,
        "central_accuracy": 2.5,
        "lost": {"3": ""},
    }
    for kind in find("tensorboard,mlflow").values():
        tracker = kind()
        tracker.begin(RunInfo(tmp_path, {"mask.density": 0.1}, metric, 1))
        tracker.round(record, None)
        tracker.end("failed", {})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"central_mean_absolute_error", "train_loss", "lost"} <= set(read.Tags()["scalars"])
    assert math.isnan(read.Scalars("train_loss")[0].value)
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("ssfl").experiment_id])
    assert run.info.status == "FAILED"
    assert (run.data.metrics["central_mean_absolute_error"], run.data.metrics["lost"]) == (2.5, 1)
    assert math.isnan(run.data.metrics["train_loss"])


OFFLINE = """
import sys
from pathlib import Path
from ssfl_app.callbacks import find
from ssfl_app.callbacks.base import RunInfo
from ssfl_app.metrics import ACCURACY
for name, kind in find("tensorboard,mlflow,wandb").items():
    tracker = kind()
    tracker.begin(RunInfo(Path(sys.argv[1]), {"mask.density": 0.1}, ACCURACY, 0))
    tracker.round({"round": 0, "train_loss": 0.5}, None)
    tracker.end("finished", {})
"""


def test_nothing_asks_for_the_network(tmp_path: Path) -> None:
    """What the libraries would fetch or send goes by a proxy, and nobody comes there."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        variables = clean | dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), address)
        variables |= {"WANDB_API_KEY": "0" * 40}
        variables.pop("WANDB_MODE", None)
        line = [sys.executable, "-c", OFFLINE, str(tmp_path)]
        subprocess.run(line, env=variables, check=True, timeout=120, cwd=Path(__file__).parents[2])
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
