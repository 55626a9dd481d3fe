"""MLflow: a file store in the folder ``mlflow`` of a run, with one run in it, which a resumed run goes on with.

Points of rounds that a resumed run plays again are taken out of its files first.
"""

import os
import time
from typing import Any

from ssfl_app.callbacks.base import Record, RunCallback, RunInfo, points
from ssfl_app.files import write_bytes


class MlFlow(RunCallback):
    """Logs a metric a number and round, and the configuration as parameters."""

    library = "mlflow"

    def begin(self, run: RunInfo) -> None:
        """Open the store, and the run in it; nothing leaves this machine."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # without it newer versions refuse one
        from mlflow import MlflowClient

        self.metric, self.client = run.metric, MlflowClient(tracking_uri=(run.folder / "mlflow").as_uri())
        there = self.client.get_experiment_by_name("ssfl")
        experiment = there.experiment_id if there else self.client.create_experiment("ssfl")
        found = self.client.search_runs([experiment])
        self.id = (found or [self.client.create_run(experiment, run_name=run.folder.name)])[0].info.run_id
        self.client.update_run(self.id, status="RUNNING")
        for key, value in () if found else run.config.items():
            self.client.log_param(self.id, key, value)
        for file in (run.folder / "mlflow" / experiment / self.id / "metrics").iterdir():
            # A line a point: time, value, step. The store has no call that takes points back.
            kept = [
                line for line in file.read_text("utf-8").splitlines(True) if int(line.split()[2]) < run.next_round
            ]
            write_bytes(file, "".join(kept).encode())

    def round(self, record: Record, strategy: Any) -> None:
        """Log the numbers."""
        from mlflow.entities import Metric

        now, named = int(1000 * time.time()), points(record, self.metric)
        values = [Metric(name, float(value), now, record["round"]) for name, value in named.items()]
        self.client.log_batch(self.id, values)

    def end(self, status: str, summary: Record) -> None:
        """Say how the run ended."""
        states = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, states[status])
