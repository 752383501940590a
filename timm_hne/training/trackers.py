"""What follows a run besides its CSV file: TensorBoard, Weights & Biases or MLflow, and the best of its checkpoints."""
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_file
from ..tree import prefixes

__all__ = ['LOGS', 'BestCheckpoint', 'open_tracker']

_logger = logging.getLogger(__name__)


class _TensorBoard:
    """Events in the run's folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, start_epoch: int, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class _WandB:
    """A run of Weights & Biases; project and the like are set by its own variables (WANDB_PROJECT, WANDB_MODE)."""

    def __init__(self, folder: Path, start_epoch: int, config: Mapping[str, Any]):
        import wandb
        record = folder / '.wandb_run'
        known = record.read_text() if start_epoch and record.exists() else None
        self.run = wandb.init(
            dir=str(folder), name=folder.resolve().name, config=dict(config), id=known,
            resume='allow' if known else None)
        record.write_text(self.run.id)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=epoch)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))  # one that is open would take what the next run of the process logs


class _MLflow:
    """A run of MLflow; where it goes is set by its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    def __init__(self, folder: Path, start_epoch: int, config: Mapping[str, Any]):
        import mlflow
        record = folder / '.mlflow_run'
        known = record.read_text() if start_epoch and record.exists() else None
        self.client = mlflow
        self.run_id = mlflow.start_run(run_id=known, run_name=None if known else folder.resolve().name).info.run_id
        if not known:
            mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
        mlflow.end_run()  # one that is open would take what the rest of the process logs
        record.write_text(self.run_id)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        self.client.log_metrics(dict(values), step=epoch, run_id=self.run_id)

    def close(self, failed: bool) -> None:
        pass  # ended above


# Names, what is opened, and the package that it needs. The CSV file is there in any case: a resumed run reads it.
LOGS = {
    'csv': (None, None),
    'tensorboard': (_TensorBoard, 'tensorboard'),
    'wandb': (_WandB, 'wandb'),
    'mlflow': (_MLflow, 'mlflow'),
}


def open_tracker(log: str | None, folder: Path, start_epoch: int, config: Mapping[str, Any]):
    """Open what follows a run besides its CSV file.

    Args:
        log: One of `LOGS`; TensorBoard if that is installed, else nothing, if None.
        folder: Output folder of the run.
        start_epoch: Epoch that comes next; a run that goes on goes on there too.
        config: What is recorded of the run.

    Returns:
        An object with `add(epoch, values)` and `close(failed)`, or None.

    Raises:
        ImportError: The package of `log` is not installed.
    """
    tracker, package = LOGS[log or 'tensorboard']
    if tracker is None:
        return None
    try:
        return tracker(folder, start_epoch, config)
    except ImportError as error:
        if log is None:
            return None
        raise ImportError(f'log {log!r} needs the package {package}: pip install {package}') from error


class BestCheckpoint:
    """Keeps the checkpoint of the epoch in which the first n members were most accurate, as `model_best.pth.tar`.

    Args:
        num_members: Number of members n, one of those that are evaluated after each epoch; none is kept if None.
        rows: The rows of the run's CSV file so far, by their epochs.
        kept: Epoch of the file that is there already, if there is one.
    """
    NAME = 'model_best.pth.tar'

    def __init__(self, num_members: int | None, rows: Mapping[int, Mapping[str, Any]], kept: int | None = None):
        self.key = None if num_members is None else f'eval_top1_{num_members}'
        self.rows = rows
        self.kept = kept

    def check(self, ensemble_size: int) -> None:
        """Raise a ValueError if no ensemble of so many members is evaluated."""
        if self.key is not None and self.key not in {f'eval_top1_{n}' for n in prefixes(ensemble_size)}:
            raise ValueError(
                f'best_members must be one of {", ".join(map(str, prefixes(ensemble_size)))}, '
                f'got {self.key.rpartition("_")[2]}.')

    def save(self, epoch: int, last: Path) -> None:
        """Copy the checkpoint that was just written unless the one that is kept is better, or `rows` does not tell.

        Args:
            epoch: Its epoch, of which `rows` has the row.
            last: The checkpoint.
        """
        accuracies = {e: float(row[self.key]) for e, row in self.rows.items() if row.get(self.key) not in (None, '')}
        # An epoch that has a row without that number of members had a smaller tree.
        unknown = 0. if self.kept is None or self.kept in self.rows else math.inf
        best = accuracies.get(self.kept, unknown)
        if self.key is not None and best == math.inf:
            _logger.warning(
                f'{last.with_name(self.NAME)} is of epoch {self.kept + 1}, whose accuracy is not known: it stays. '
                'Move it away for later ones to be kept.')
        if epoch in accuracies and epoch != self.kept and accuracies[epoch] >= best:
            for left in last.parent.glob(f'.*.{self.NAME}'):  # of a copy that was killed
                left.unlink()
            write_file(last.with_name(self.NAME), lambda path: shutil.copyfile(last, path))
            self.kept = epoch
