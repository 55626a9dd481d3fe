"""Weights & Biases, offline: the folder ``wandb`` of a run, which ``wandb sync`` uploads if somebody wants that.

A resumed run writes a further folder under the same id. Of rounds that are played again the first points stay.
"""

import json
import os
from typing import Any
from uuid import uuid4

from ssfl_app.callbacks.base import Record, RunInfo, Tracker
from ssfl_app.files import write_json


class Wandb(Tracker):
    """Logs a row a round, and the configuration; WANDB_MODE=online uploads at once."""

    library = "wandb"

    def begin(self, run: RunInfo) -> None:
        """Start W&B's process; it does not look at the machine, the code or the console."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        super().begin(run)
        self.file = run.folder / "wandb" / "ssfl.json"
        self.file.parent.mkdir(exist_ok=True)
        known: Any = {"id": uuid4().hex[:8], "round": -1}
        if self.file.exists():
            known = json.loads(self.file.read_bytes())
        self.id, self.last = str(known["id"]), int(known["round"])
        private: Any = {
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "disable_git": True,
            "disable_code": True,
        }
        self.run: Any = wandb.init(
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            project="ssfl",
            id=self.id,
            name=run.folder.name,
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off", **private),
        )

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Log a round that was not logged yet."""
        if round_ > self.last:
            self.last = round_
            write_json(self.file, {"id": self.id, "round": round_})  # first: killed in between, no point comes twice
            self.run.log(values, step=round_)

    def end(self, status: str, summary: Record) -> None:
        """Wait until all is on the disk."""
        self.run.finish(exit_code=int(status != "finished"))
