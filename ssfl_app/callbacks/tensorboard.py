"""TensorBoard: event files in the folder ``tensorboard`` of a run; a resumed run drops the points it plays again."""

from typing import Any

from ssfl_app.callbacks.base import Record, RunCallback, RunInfo, points


class TensorBoard(RunCallback):
    """Writes a scalar a number and round, and the configuration as hyperparameters."""

    library = "tensorboard"
    writer: Any

    def begin(self, run: RunInfo) -> None:
        """Open a new event file; readers drop what earlier ones have from `purge_step` on."""
        from torch.utils.tensorboard import SummaryWriter, summary

        self.metric, module = run.metric, summary  # type: Any, Any
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.next_round)
        for part in () if run.next_round else module.hparams(dict(run.config), {"train_loss": 0.0}):
            self.writer.file_writer.add_summary(part)

    def round(self, record: Record, strategy: Any) -> None:
        """Write the scalars to the disk."""
        for name, value in points(record, self.metric).items():
            self.writer.add_scalar(name, value, record["round"])
        self.writer.flush()

    def end(self, status: str, summary: Record) -> None:
        """Close the file."""
        self.writer.close()
