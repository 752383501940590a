"""Runs a folder that `timm-hne export` wrote. Needs numpy and onnxruntime; neither torch nor timm is imported.

    network = timm_hne.runtime.load('folder')
    logits = network.predict(network.prepare(pixels), num_members=4)
"""
import hashlib
import json
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .checks import check_integer, check_number

__all__ = ['FORMAT', 'MANIFEST', 'Runtime', 'Session', 'load', 'read_manifest']

MANIFEST = 'manifest.json'
FORMAT = 1  # of the manifest; a version reads its own and the earlier ones

# What a manifest must hold: at its top, of its images, and of each of its steps.
_KEYS = ('nodes', 'num_classes', 'macs')
_IMAGE_KEYS = ('channels', 'height', 'width', 'any_size', 'mean', 'std')
_STEP_KEYS = ('start', 'stop', 'inputs', 'new', 'frontier')

CRITERIA = ('confidence', 'margin', 'entropy', 'agreement')
LOW_IS_SURE = ('entropy',)  # those whose scores fall as the ensemble becomes surer

_clock = time.perf_counter


class Session:
    """An ONNX program on the CPU. May be run from several threads at once.

    ONNX Runtime is several times faster with a height and width that it knows beforehand, so a program that takes any
    is loaded once for every size that occurs. Its threads spin for 20 microseconds at most before they sleep: several
    sessions, or PyTorch beside them, would take the processor from each other otherwise.

    Args:
        program: A serialised ONNX model, or the path of one. Its first axes are those of the images.
        threads: Number of threads; that of the cores if None.
        check: Called before the program is read again.
    """
    SIZES_KEPT = 8

    def __init__(
            self,
            program: bytes | str | Path,
            threads: int | None = None,
            check: Callable[[], None] = lambda: None,
    ):
        self._program = program
        self._check = check
        self._threads = threads
        self._lock = threading.Lock()
        self._sessions: dict[tuple, Any] = {}
        plain = self._create(())
        self._symbols = {entry.name: entry.shape[1:] for entry in plain.get_inputs()}
        if not any(isinstance(size, str) for shape in self._symbols.values() for size in shape):
            self._sessions[()] = plain

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for some inputs."""
        sizes = {
            symbol: size for name, array in inputs.items() for symbol, size in zip(self._symbols[name], array.shape[1:])
            if isinstance(symbol, str)
        }
        key = tuple(sizes.items())
        session = self._sessions.get(key)
        if session is None:
            with self._lock:
                session = self._sessions.get(key)  # another thread may have made it
                if session is None:
                    self._check()
                    session = self._create(key)
                    while len(self._sessions) >= self.SIZES_KEPT:
                        del self._sessions[next(iter(self._sessions))]
                    self._sessions[key] = session
        return session.run(None, inputs)

    def _create(self, sizes: tuple[tuple[str, int], ...]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        # A thread that sleeps is woken too late for operators as short as those of one image. So it spins for some
        # microseconds before it sleeps, but not longer, and not between runs: others need the cores.
        bounded = tuple(map(int, onnxruntime.__version__.split('.')[:2])) >= (1, 26)  # else it might spin for long
        options.add_session_config_entry('session.intra_op.allow_spinning', str(int(bounded)))
        options.add_session_config_entry('session.intra_op.spin_duration_us', '20')
        options.add_session_config_entry('session.force_spinning_stop', '1')
        for symbol, size in sizes:
            options.add_free_dimension_override_by_name(symbol, size)
        return onnxruntime.InferenceSession(self._program, options, providers=['CPUExecutionProvider'])


def load(folder: str | Path, threads: int | None = None) -> 'Runtime':
    """Load a folder that `timm-hne export` wrote, after the digests of its files were compared.

    Args:
        folder: The folder.
        threads: Number of threads that compute; that of the cores if None.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: The manifest is none, or one of a newer version.
        RuntimeError: A file is not the one whose digest the manifest records.
    """
    folder = Path(folder).resolve()  # programs are read again, perhaps after os.chdir
    manifest = read_manifest(folder / MANIFEST)
    _check_files(folder, manifest['files'])
    return Runtime(folder, manifest, threads)


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    for name, expected in digests.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise RuntimeError(
                f'{folder / name} has the SHA-256 digest {found}, but {MANIFEST} records {expected}: it is not the '
                'file that was exported. Export again, or copy the folder again.')


def _stamps(folder: Path, names: Iterable[str]) -> list[tuple[int, ...]]:
    """Return what changes with a file."""
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in ((folder / name).stat() for name in names)]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest; raise an OSError if it cannot be read, a ValueError if it is none."""
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
        version = manifest['format']
        if not isinstance(version, int):
            raise ValueError(f'its format is {version!r}')
        if version > FORMAT:
            raise ValueError(
                f'it has format {version}, written by timm-hne {manifest.get("timm_hne")}; this version reads formats '
                f'up to {FORMAT}: update timm-hne')
        files = dict(manifest['files'])
        steps = manifest['steps']
        programs = [step['file'] for step in steps]
        if not programs or not set(programs) <= set(files) or any(Path(name).name != name for name in files):
            raise ValueError(f'its files are {sorted(files)}, its programs {programs}')
        for part, keys in ((manifest, _KEYS), (manifest['image'], _IMAGE_KEYS), *((s, _STEP_KEYS) for s in steps)):
            if missing := sorted(set(keys) - set(part)):
                raise ValueError(f'it lacks {", ".join(missing)}')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no manifest that can be read: {error}.') from error
    return manifest


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits `(..., num_classes)`."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def highest_score(criterion: str, num_classes: int) -> float:
    """Return the highest threshold of a criterion; the lowest is 0."""
    return math.log(num_classes) if criterion == 'entropy' else 1.


def is_sure(scores, threshold, criterion: str):
    """Return which scores of images let them leave, for arrays of numpy and tensors alike."""
    return scores <= threshold if criterion in LOW_IS_SURE else scores >= threshold


def exit_scores(member_logits: np.ndarray, criterion: str) -> np.ndarray:
    """Measure how sure the members are together of each image, as `timm_hne.inference.exit_scores` does.

    Args:
        member_logits: `(B, n, num_classes)`.
        criterion: 'confidence', 'margin', 'entropy' or 'agreement'.

    Returns:
        `(B,)`; an image is sure if its score is at least the threshold, for the entropy at most.
    """
    logits = member_logits.mean(axis=1)
    if criterion == 'agreement':
        votes = member_logits.argmax(axis=2) == logits.argmax(axis=1)[:, None]
        return votes.mean(axis=1, dtype=np.float32) if member_logits.shape[1] > 1 else np.full(len(logits), -1.)
    probs = softmax(logits)
    if criterion == 'entropy':
        return -(probs * np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))).sum(axis=1)
    highest = np.sort(probs, axis=1)[:, ::-1]
    return highest[:, 0] if criterion == 'confidence' else highest[:, 0] - highest[:, 1]


class Runtime:
    """An exported ensemble. May be used from several threads at once.

    Args:
        folder: Folder of the programs.
        manifest: What its manifest says.
        threads: Number of threads that compute; that of the cores if None.

    Attributes:
        manifest: Architecture, nodes, classes, preprocessing, MACs, digests, and what else was recorded.
        schedule: Numbers of members after which there is a result: 1, 2, 4, ..., N unless exported otherwise.
        ensemble_size: Number of members, N.
        num_classes: Number of classes.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None = None):
        self.manifest = manifest
        self.schedule = tuple(step['stop'] for step in manifest['steps'])
        self.ensemble_size = self.schedule[-1]
        self.num_classes: int = manifest['num_classes']
        self._macs = {int(n): count for n, count in manifest['macs'].items()}
        # The files are read again for every new size of images, and may have been replaced meanwhile.
        before = _stamps(folder, manifest['files'])

        def check() -> None:
            if _stamps(folder, manifest['files']) != before:
                _check_files(folder, manifest['files'])

        self._steps = [(step, Session(folder / step['file'], threads, check)) for step in manifest['steps']]
        # Seconds that steps took, per shape of the images and last member: what a deadline goes by.
        self._times: dict[tuple, deque] = defaultdict(lambda: deque(maxlen=5))

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Normalise images as the model expects them.

        Args:
            pixels: `(B, H, W, C)` of 8 bits, already of the right size.

        Returns:
            `(B, C, H, W)` in single precision.

        Raises:
            TypeError: They are not of 8 bits.
            ValueError: They are of another shape.
        """
        channels = self.manifest['image']['channels']
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise TypeError(f'pixels must be an array of uint8, got {getattr(pixels, "dtype", type(pixels).__name__)}.')
        if pixels.ndim != 4 or pixels.shape[3] != channels:
            raise ValueError(f'pixels must be (B, H, W, {channels}), got {pixels.shape}.')
        mean, std = (np.asarray(self.manifest['image'][key], np.float32) for key in ('mean', 'std'))
        return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))

    def anytime(self, images: np.ndarray, deadline: float | None = None) -> Iterator[np.ndarray]:
        """Yield the logits `(B, num_classes)` after more and more members, those of `schedule`.

        Args:
            images: `(B, C, H, W)`, normalised.
            deadline: Seconds from this call after which no step may end, as foreseen from the last times of each step;
                none if None. The first step is always taken.

        Raises:
            TypeError, ValueError: An argument is wrong, see `predict`.
        """
        images, begin = self.check(images), _clock()
        if deadline is not None:
            check_number('deadline', deadline)
            deadline += begin
        return (members.mean(axis=1) for members, _ in self._run(images, deadline))

    def predict(
            self,
            images: np.ndarray,
            num_members: int | None = None,
            threshold: float | None = None,
            deadline: float | None = None,
            criterion: str = 'confidence',
    ) -> np.ndarray:
        """Compute the logits `(B, num_classes)`, the mean over the members evaluated.

        Args:
            images: `(B, C, H, W)`, normalised.
            num_members: Number of members at most; all if None. A number between two of `schedule` costs as much as
                the higher one.
            threshold: What `criterion` must reach for an image to get no further members; none if None.
            deadline: Seconds from this call after which no step may end; none if None. The first is always taken.
            criterion: 'confidence', 'margin', 'entropy' or 'agreement'; see `exit_scores`.

        Raises:
            TypeError: An argument is of a wrong type.
            ValueError: It is out of range, or the images have another shape than the model was exported for.
        """
        begin = _clock()
        images = self.check(images)
        last = self.ensemble_size
        if num_members is not None:
            last = check_integer('num_members', num_members, 1, last)
        if criterion not in CRITERIA:
            raise ValueError(f'criterion must be one of {", ".join(CRITERIA)}, got {criterion!r}.')
        if threshold is not None:
            if self.num_classes < 2:
                raise ValueError(f'num_classes must be at least 2 for a threshold, got {self.num_classes}.')
            check_number('threshold', threshold, 0, highest_score(criterion, self.num_classes))
        if deadline is not None:
            deadline = begin + check_number('deadline', deadline)
        active, result = np.arange(len(images)), np.zeros((len(images), self.num_classes), np.float32)
        steps = self._run(images, deadline)
        stay = None
        while True:
            try:
                members, stop = next(steps) if stay is None else steps.send(stay)
            except StopIteration:
                return result
            members = members[:, :last]
            result[active] = members.mean(axis=1)
            if stop >= last:
                return result
            stay = np.ones(len(active), bool)
            if threshold is not None:
                stay = ~is_sure(exit_scores(members, criterion), threshold, criterion)
            active = active[stay]
            if not len(active):
                return result

    def steps_between(self, start: int, stop: int) -> range:
        """Return the steps, for `step`, that lead from `start` members, a number of `schedule` or 0, to `stop` or more.
        """
        first = sum(n <= start for n in self.schedule)
        return range(first, first if stop <= start else 1 + sum(n < stop for n in self.schedule))

    def step(self, index: int, features: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Take one step of the evaluation.

        Args:
            index: Number of the step, from 0.
            features: What the step before returned; `{'images': images}` before the first, in single precision.

        Returns:
            The logits of the members that are new, `(B, n, num_classes)`, and the features that the next step needs.
            The images lie along the first axis of each.
        """
        step, session = self._steps[index]
        new = dict(zip(step['new'], session.run({name: features[name] for name in step['inputs']})))
        return new['logits'], {name: new[name] if name in new else features[name] for name in step['frontier']}

    def check(self, images: np.ndarray) -> np.ndarray:
        """Return images as the programs take them; raise a TypeError or ValueError if they are none, see `predict`."""
        image = self.manifest['image']
        if not isinstance(images, np.ndarray) or images.dtype not in (np.float32, np.float64, np.float16):
            raise TypeError(
                'images must be an array of floating point numbers, normalised as `prepare` does it, got '
                f'{getattr(images, "dtype", type(images).__name__)}.')
        if images.ndim != 4 or images.shape[1] != image['channels'] or 0 in images.shape:
            raise ValueError(f'images must be (B, {image["channels"]}, H, W), at least one, got {images.shape}.')
        if not image['any_size'] and images.shape[2:] != (image['height'], image['width']):
            raise ValueError(
                f'images must be of {image["height"]}x{image["width"]} pixels, the size that the model was exported '
                f'for, got {images.shape[2]}x{images.shape[3]}; export it with --img-size for others.')
        return np.ascontiguousarray(images, np.float32)

    def _run(self, images: np.ndarray, deadline: float | None):
        """Yield all members' logits so far with their number; whoever sends a mask goes on with these images only."""
        features, members, spent = {'images': images}, None, 0.
        for index, (step, _) in enumerate(self._steps):
            start, stop = step['start'], step['stop']
            key = (*features[step['inputs'][0]].shape, stop)
            past = self._times[key]
            if deadline is not None and start:
                share = (self._macs[stop] - self._macs[start]) / self._macs[start]
                expected, now = max(past, default=spent * share), _clock()
                if now + expected > deadline:
                    # A step that is never taken gets no new times: one slow time must not rule it out for good.
                    if now <= deadline:
                        with suppress(IndexError):  # there is none, or another thread has just taken it
                            past.popleft()
                    return
            begin = _clock()
            logits, features = self.step(index, features)
            duration = _clock() - begin  # another thread may take it out of `past` again
            past.append(duration)
            spent += duration
            members = logits if members is None else np.concatenate([members, logits], axis=1)
            stay = yield members, stop
            if stay is not None and not stay.all():
                members = members[stay]
                features = {name: np.ascontiguousarray(tensor[stay]) for name, tensor in features.items()}
