"""TensorBoard: event files in the folder ``tensorboard`` of a run. A resumed run drops the points it plays again."""

from typing import Any

from ssfl_app.callbacks.base import Record, RunInfo, Tracker


class TensorBoard(Tracker):
    """Writes a scalar a number and round, and the configuration as hyperparameters."""

    library = "tensorboard"
    writer: Any

    def begin(self, run: RunInfo) -> None:
        """Open a new event file; readers drop what earlier ones have from `purge_step` on."""
        from torch.utils.tensorboard import SummaryWriter, summary

        super().begin(run)
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.next_round)
        if not run.next_round:
            module: Any = summary
            for part in module.hparams(dict(run.config), {"train_loss": 0.0}):
                self.writer.file_writer.add_summary(part)

    def log(self, round_: int, values: dict[str, float]) -> None:
        """Write the scalars to the disk."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, round_)
        self.writer.flush()

    def end(self, status: str, summary: Record) -> None:
        """Close the file."""
        self.writer.close()
