"""Weights & Biases, offline: the folder ``wandb`` of a run, which ``wandb sync`` uploads if somebody wants that.

A resumed run writes a further folder under the same id. Of rounds that are played again the first points stay.
"""

import json
import os
from typing import Any
from uuid import uuid4

from ssfl_app.callbacks.base import Record, RunCallback, RunInfo, points
from ssfl_app.files import write_json


class Wandb(RunCallback):
    """Logs a row a round, and the configuration; WANDB_MODE=online uploads at once."""

    library = "wandb"

    def begin(self, run: RunInfo) -> None:
        """Start W&B's process; it does not look at the machine, the code or the console."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        self.metric, self.file = run.metric, run.folder / "wandb" / "ssfl.json"
        self.file.parent.mkdir(exist_ok=True)
        self.known: Any = {"id": uuid4().hex[:8], "round": -1}
        if self.file.exists():
            self.known = json.loads(self.file.read_bytes())
        private: Any = {"x_disable_stats": True, "x_disable_machine_info": True, "disable_git": True}
        self.run = wandb.init(
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            project="ssfl",
            id=self.known["id"],
            name=run.folder.name,
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off", disable_code=True, **private),
        )

    def round(self, record: Record, strategy: Any) -> None:
        """Log a round that was not logged yet."""
        if record["round"] > self.known["round"]:
            self.known["round"] = record["round"]
            write_json(self.file, self.known)  # first: killed in between, no point comes twice
            self.run.log(points(record, self.metric), step=record["round"])

    def end(self, status: str, summary: Record) -> None:
        """Wait until all is on the disk."""
        self.run.finish(exit_code=int(status != "finished"))
