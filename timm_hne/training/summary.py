"""The log of a run: a row of a CSV file for every epoch, and what else follows it (`trackers.py`)."""
import csv
import io
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .trackers import open_tracker

__all__ = ['Summary']

_logger = logging.getLogger(__name__)


class Summary:
    """The log of a run in its output folder.

    The CSV file is always whole: it is written anew after each epoch, and renamed into place. What it must have and has
    not when a run is continued is said in a warning, and a damaged file is kept beside the new one.

    Args:
        folder: Output folder of the run.
        start_epoch: Epoch that comes next. Later rows, of epochs that no checkpoint has, are dropped.
        log: What follows the run besides, see `open_tracker`.
        config: What that records of the run.
    """

    NAME = 'summary.csv'

    def __init__(
            self, folder: Path, start_epoch: int, log: str | None = None, config: Mapping[str, Any] | None = None):
        self.path = folder / self.NAME
        self.rows = self._read(start_epoch)
        missing = [str(epoch) for epoch in range(start_epoch) if epoch not in self.rows]
        if missing:
            _logger.warning(
                f'{self.path} {"lacks rows" if self.path.exists() else "does not exist, so there are no rows"} of '
                f'{len(missing)} epochs: {", ".join(missing[:10])}. The run goes on without them.')
        self.tracker = open_tracker(log, folder, start_epoch, config or {})

    def _read(self, start_epoch: int) -> dict[int, dict[str, str]]:
        """Read the rows of the epochs before `start_epoch`."""
        if not self.path.exists():
            return {}
        text = self.path.read_text(encoding='utf-8', errors='replace')
        lines = text.splitlines()
        header = lines[0].split(',') if lines else []
        rows, damaged = {}, []
        for number, line in enumerate(lines[1:], start=2):
            values = line.split(',')
            try:
                if header[0] != 'epoch' or len(values) != len(header) or (number == len(lines) and text[-1] != '\n'):
                    raise ValueError
                _ = [float(value) for value in values if value]
                epoch = int(values[0])
                if epoch in rows:
                    raise ValueError
                rows[epoch] = dict(zip(header, values))
            except ValueError:
                damaged.append(str(number))
        if damaged:
            names = (f'{self.path.name}.damaged{number or ""}' for number in itertools.count())
            copy = next(path for path in map(self.path.with_name, names) if not path.exists())
            self.path.replace(copy)
            _logger.warning(f'{self.path} is damaged in the lines {", ".join(damaged[:10])}. It is kept as {copy}.')
        kept = {epoch: row for epoch, row in rows.items() if epoch < start_epoch}
        if len(kept) < len(rows) or damaged:
            self._write(kept)
        return kept

    def _write(self, rows: Mapping[int, Mapping[str, object]]) -> None:
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[epoch] for epoch in sorted(rows))
        try:
            write_text(self.path, text.getvalue())
        except OSError as error:  # a full disk does not say which file it has no room for
            raise OSError(f'{self.path} cannot be written: {error}') from error

    def add(self, epoch: int, train: Mapping[str, float], evaluated: Mapping[str, float], lr: float) -> None:
        """Write what an epoch has measured.

        Raises:
            OSError: The file cannot be written, for instance to a full disk.
        """
        self.rows[epoch] = {
            'epoch': epoch,
            **{f'train_{name}': value for name, value in train.items()},
            **{f'eval_{name}': value for name, value in evaluated.items()},
            'lr': lr,
        }
        self._write(self.rows)
        if self.tracker is not None:
            values = {**{f'train/{k}': v for k, v in train.items()}, **{f'eval/{k}': v for k, v in evaluated.items()}}
            self.tracker.add(epoch, {**values, 'lr': lr})

    def __enter__(self) -> 'Summary':
        return self

    def __exit__(self, kind, *exc_info) -> None:
        if self.tracker is not None:
            self.tracker.close(failed=kind is not None)
