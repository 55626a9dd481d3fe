"""MLflow: a file store in the folder ``mlflow`` of a run, with one run in it, which a resumed run goes on with.

Points of rounds that a resumed run plays again are taken out of its files first.
"""

import os
import time
from typing import Any

from ssfl_app.callbacks.base import Record, RunInfo, Tracker
from ssfl_app.files import write_bytes

MOST = 100
"""Parameters that a call may log."""


class MlFlow(Tracker):
    """Logs a metric a number and round, and the configuration as parameters."""

    library = "mlflow"

    def begin(self, run: RunInfo) -> None:
        """Open the store, and the run in it; nothing leaves this machine."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.7 on refuses one unless this is set
        from mlflow import MlflowClient
        from mlflow.entities import Param

        super().begin(run)
        self.client: Any = MlflowClient(tracking_uri=(run.folder / "mlflow").as_uri())
        there = self.client.get_experiment_by_name("ssfl")
        experiment = there.experiment_id if there else self.client.create_experiment("ssfl")
        found = self.client.search_runs([experiment])
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self.client.create_run(experiment, run_name=run.folder.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, 0 if found else len(parameters), MOST):
            self.client.log_batch(self.id, params=parameters[first : first + MOST])
        for file in (run.folder / "mlflow" / experiment / self.id / "metrics").rglob("*"):
            # A line a point: time, value, step. The store has no call that takes points back.
            kept = [
                line for line in file.read_text("utf-8").splitlines(True) if int(line.split()[2]) < run.next_round
            ]
            write_bytes(file, "".join(kept).encode())

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Log the numbers."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(name, float(value), now, round_) for name, value in values.items()])

    def end(self, status: str, summary: Record) -> None:
        """Say how the run ended."""
        states = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, states[status])
