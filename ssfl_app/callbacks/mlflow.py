"""MLflow: a file store in the folder ``mlflow`` of a run, with one run in it, which a resumed run goes on with.

A store keeps what it has: of rounds that are played again after a resume, the points that were logged first stay.
"""

import os
import time
from typing import Any

from ssfl_app.callbacks.base import Record, RunInfo, Tracker

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
        experiment = self.client.get_experiment_by_name("ssfl")
        experiment = experiment.experiment_id if experiment else self.client.create_experiment("ssfl")
        found = self.client.search_runs([experiment])
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self.client.create_run(experiment, run_name=run.folder.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, 0 if found else len(parameters), MOST):
            self.client.log_batch(self.id, params=parameters[first : first + MOST])
        logged = self.client.get_run(self.id).data.metrics
        self.last = {
            name: max(point.step for point in self.client.get_metric_history(self.id, name)) for name in logged
        }

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Log what the store does not have."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        new = [Metric(name, float(value), now, round_) for name, value in values.items()]
        self.client.log_batch(self.id, [point for point in new if round_ > self.last.get(point.key, -1)])

    def end(self, status: str, summary: Record) -> None:
        """Say how the run ended."""
        states = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.id, states[status])
