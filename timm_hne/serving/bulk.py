"""Predictions for a folder of any size, written to a table part by part."""
import csv
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checks import check_integer
from ..files import printable, write_file, write_text
from ..images import find_images
from ..pretrained import digest, state_digest
from ..tree import validate_num_members
from .classifier import Classifier, locate
from .exported import ExportedEnsemble

Row = dict[str, Any]

SETTINGS = 'settings.json'


@dataclass(frozen=True)
class Bulk:
    """What is predicted for every image.

    Attributes:
        model: What `Classifier.open` takes.
        engine: What runs it.
        device: Where it runs.
        model_kwargs: Further arguments of the model.
        num_members: Number of members; all if None.
        top_k: Number of classes of a row.
        batch_size: Number of images that are evaluated at a time.
    """
    model: str
    engine: str = 'auto'
    device: str = 'cpu'
    model_kwargs: dict[str, Any] | None = None
    num_members: int | None = None
    top_k: int = 5
    batch_size: int = 64

    def weights_digest(self) -> str:
        """Return a digest of the weights, which may be others than yesterday's under the same name."""
        model = Classifier.open(self.model, 'none', **(self.model_kwargs or {})).model
        if isinstance(model, ExportedEnsemble):
            return digest(json.dumps(model.runtime.manifest).encode())
        return state_digest(model.state_dict())


class Predictor:
    """Makes rows of images; Ray Data has one in each of its processes.

    Args:
        bulk: What is predicted.
    """

    def __init__(self, bulk: Bulk):
        check_integer('batch_size', bulk.batch_size, 1)
        check_integer('top_k', bulk.top_k, 1)
        self.classifier = Classifier.open(bulk.model, bulk.engine, bulk.device, **(bulk.model_kwargs or {}))
        size = self.classifier.ensemble_size
        self.num_members = size if bulk.num_members is None else validate_num_members(bulk.num_members, size)
        self.bulk = bulk

    def load(self, path: str) -> torch.Tensor | str:
        """Return the image of a path, or what is wrong with it."""
        try:
            return self.classifier.image(path)
        except (OSError, ValueError) as error:
            return printable(' '.join(str(error).split()))

    def rows(self, names: Sequence[str], images: Sequence[torch.Tensor | str]) -> list[Row]:
        """Return a row for each image, also for those that cannot be read."""
        good = [image for image in images if isinstance(image, torch.Tensor)]
        logits = iter(self.classifier.logits(torch.stack(good), self.num_members) if good else ())
        rows = []
        for name, image in zip(names, images):
            failed = isinstance(image, str)
            top = [] if failed else self.classifier.top(next(logits), self.num_members, self.bulk.top_k)
            row: Row = {'path': name, 'num_members': None if failed else self.num_members}
            row['error'] = image if failed else None
            for i in range(min(self.bulk.top_k, self.classifier.num_classes)):
                label = top[i] if top else None
                row[f'label_{i + 1}'] = label and label.name
                row[f'probability_{i + 1}'] = label and label.probability
            rows.append(row)
        return rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the same for a batch of Ray Data, of which 'path' are the files and 'name' their names."""
        rows = self.rows(batch['name'], [*map(self.load, batch['path'])])
        return {'row': [json.dumps(row) for row in rows]}


def local_rows(bulk: Bulk, files: Sequence[tuple[str, str]], workers: int | None = None) -> Iterator[list[Row]]:
    """Yield the rows of batches, in order; the next images are loaded while some are evaluated.

    Args:
        bulk: What is predicted.
        files: Names and paths.
        workers: Number of threads that load images; that of the cores if None.
    """
    predictor = Predictor(bulk)
    batches = [files[i:i + bulk.batch_size] for i in range(0, len(files), bulk.batch_size)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        def load(batch: Sequence[tuple[str, str]]) -> list:
            return [pool.submit(predictor.load, path) for _, path in batch]

        following = load(batches[0]) if batches else []
        for batch, after in zip(batches, [*batches[1:], ()]):
            images, following = following, load(after)
            yield predictor.rows([name for name, _ in batch], [image.result() for image in images])


def ray_rows(bulk: Bulk, files: Sequence[tuple[str, str]], workers: int | None = None) -> Iterator[list[Row]]:
    """Yield the rows of batches as Ray Data has them done, on all machines of the cluster, which must see the files.

    Args:
        bulk: What is predicted.
        files: Names and paths.
        workers: Number of processes; as many as the cluster has room for if None.
    """
    here = {}
    if not os.environ.get('RAY_ADDRESS'):  # no cluster; of this machine nobody else is to see anything
        here = {'address': 'local', 'include_dashboard': False}
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        os.environ.setdefault('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER', '0')  # else Ray listens on all addresses
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, **here)
    ray.data.DataContext.get_current().enable_progress_bars = False
    most = workers or max(1, int(ray.cluster_resources().get('CPU', 1)))
    where = locate(bulk.model)
    if isinstance(where, Path):  # workers have another working directory
        bulk = replace(bulk, model=os.path.abspath(where))
    dataset = ray.data.from_items([{'name': name, 'path': os.path.abspath(path)} for name, path in files])
    dataset = dataset.repartition(max(1, min(len(files) // bulk.batch_size, 10 * most))).map_batches(
        Predictor, fn_constructor_args=(bulk,), batch_size=bulk.batch_size, batch_format='numpy',
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most), num_cpus=1)
    for batch in dataset.iter_batches(batch_size=bulk.batch_size, batch_format='numpy'):
        yield [json.loads(row) for row in batch['row']]


class Table:
    """A table that grows by parts and gets its name when it is complete.

    The parts lie in a hidden folder beside it. Whoever is interrupted goes on with what is not in them.

    Args:
        path: The table, .parquet or .csv.
        settings: What its rows depend on; parts of others are not continued.

    Raises:
        ValueError: The name ends otherwise, or the parts are of other settings.
        FileExistsError: The table is there already.
        ImportError: A .parquet is asked for, and pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]):
        self.path = Path(path)
        if self.path.suffix not in ('.parquet', '.csv'):
            raise ValueError(f'output must end in .parquet or .csv, got {str(path)!r}.')
        if self.path.exists():
            raise FileExistsError(f'output exists: {path}; remove it, or choose another name.')
        if self.path.suffix == '.parquet':
            importlib.import_module('pyarrow.parquet')  # an ImportError now, not after hours
        self.parts = self.path.with_name(f'.{self.path.name}.parts')
        self._settings = json.dumps(settings, indent=2, sort_keys=True) + '\n'
        known = self.parts / SETTINGS
        if self._files() and known.exists() and known.read_text(encoding='utf-8') != self._settings:
            raise ValueError(
                f'output was begun with other settings, see {known}; repeat them, or remove that folder to begin anew.')
        self.parts.mkdir(parents=True, exist_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob(f'part-*{self.path.suffix}'))

    def done(self) -> set[str]:
        """Return the names of the images that are in the parts."""
        return {name for file in self._files() for name in _read_names(file)}

    def append(self, rows: Sequence[Row]) -> None:
        """Write a part."""
        files = self._files()
        if not files:
            write_text(self.parts / SETTINGS, self._settings)
        number = int(files[-1].stem.rpartition('-')[2]) + 1 if files else 0
        write_file(
            self.parts / f'part-{number:08d}{self.path.suffix}', lambda temporary: _write_rows(temporary, rows))

    def finish(self) -> None:
        """Put the parts together under the table's name, and remove them."""
        files = self._files()
        write_file(self.path, lambda temporary: _join(temporary, files))
        shutil.rmtree(self.parts)


def _read_names(file: Path) -> list[str]:
    if file.suffix == '.parquet':
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file, columns=['path'])['path'].to_pylist()
    with open(file, encoding='utf-8', newline='') as stream:
        return [row['path'] for row in csv.DictReader(stream)]


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    if path.suffix == '.parquet':
        import pyarrow
        import pyarrow.parquet

        kinds = {'num': pyarrow.int32(), 'probability': pyarrow.float64()}
        schema = pyarrow.schema([(name, kinds.get(name.partition('_')[0], pyarrow.string())) for name in rows[0]])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
        return
    with open(path, 'w', encoding='utf-8', newline='') as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _join(path: Path, files: Sequence[Path]) -> None:
    if path.suffix == '.parquet':
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(path, pyarrow.parquet.read_schema(files[0])) as writer:
            for file in files:
                writer.write_table(pyarrow.parquet.read_table(file))
        return
    with open(path, 'wb') as stream:
        for i, file in enumerate(files):
            with open(file, 'rb') as part:
                if i:
                    part.readline()  # the header; names of columns have no line breaks
                shutil.copyfileobj(part, stream)


def predict_folder(
        folder: str | os.PathLike,
        output: str | os.PathLike,
        bulk: Bulk,
        rows_of: Callable[..., Iterable[list[Row]]] = local_rows,
        workers: int | None = None,
        part_size: int = 1000,
        progress: Callable[[int, int], Callable[[int], None]] | None = None,
) -> int:
    """Write a table with a row for every image in a folder and those below it.

    If it is interrupted, the same call goes on where it was. What cannot be read has its reason in the column 'error'.

    Args:
        folder: The folder.
        output: The table, .parquet or .csv.
        bulk: What is predicted.
        rows_of: What computes: `local_rows` or `ray_rows`.
        workers: See there.
        part_size: Number of images after which what is done is written.
        progress: Is given how many images there are and how many are done, and returns what is told how many more are.

    Returns:
        The number of rows.

    Raises:
        OSError: The folder holds no images, or a file cannot be written.
        ValueError: An argument is wrong; see `Table` too.
    """
    folder = Path(folder)
    files = {printable(path.relative_to(folder)): str(path) for path in find_images(folder)}
    # How many images at a time, and where, changes no row.
    settings = {key: value for key, value in asdict(bulk).items() if key not in ('batch_size', 'device')}
    table = Table(output, {'folder': printable(folder.resolve()), 'weights': bulk.weights_digest(), **settings})
    try:
        with FileLock(table.parts / 'lock', timeout=0):
            return _fill(table, files, bulk, rows_of, workers, part_size, progress)
    except Timeout:
        raise OSError(f'output {output} is being written by another process.') from None


def _fill(table: Table, files: dict[str, str], bulk: Bulk, rows_of, workers, part_size: int, progress) -> int:
    done = table.done()
    left = [(name, path) for name, path in files.items() if name not in done]
    tell = (lambda count: None) if progress is None else progress(len(done) + len(left), len(done))
    pending: list[Row] = []
    if left:
        try:
            for rows in rows_of(bulk, left, workers):
                pending += rows
                tell(len(rows))
                if len(pending) >= part_size:
                    part, pending = pending, []
                    table.append(part)
        finally:
            if pending:  # also of whoever is interrupted
                table.append(pending)
    table.finish()
    return len(done) + len(left)
