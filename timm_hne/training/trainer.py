"""Training of hierarchical neural ensembles, built from timm's parts.

`train(TrainConfig(...))` is all there is: `timm-hne train` and `timm-hne demo` call it.
"""
import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from filelock import FileLock, Timeout
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.task import evaluation_sample_limit
from timm.utils import NativeScaler, distribute_bn, random_seed
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ..models.ensemble import HierarchicalEnsemble
from ..prefix import prefix_means
from ..process import keep_freed_memory
from ..tree import prefixes
from .checkpoint import CheckpointWriter, RunCheckpoint
from .epoch_losses import EpochLosses, NonFiniteLossError
from .loader import create_image_loader, seed_epoch
from .processes import join
from .recipe import TrainConfig, recipe_of
from .scheduler import create_scheduler, learning_rate
from .setup import check_phases, create_optimizer, create_trained_model, open_data
from .summary import Summary
from .task import HNETask
from .trackers import BestCheckpoint

__all__ = ['NonFiniteLossError', 'TrainConfig', 'TrainResult', 'train']

_logger = logging.getLogger(__name__)

# Seconds to wait for another run to leave the output folder.
LOCK_PATIENCE = 10


@dataclass
class TrainResult:
    """What a training run leaves.

    Attributes:
        model: The trained ensemble in evaluation mode; the moving average if there is one.
        top1: Accuracy in percent on the validation images with the first 1, 2, 4, ..., N members.
        checkpoint: File with the last checkpoint, which `timm.create_model(..., checkpoint_path=...)` reads.
        summary: CSV file with a row per epoch.
        images_per_second: Speed of training in the last epoch, of all processes together.
        history: The epochs of this process, with the names of the CSV file.
    """

    model: HierarchicalEnsemble
    top1: dict[int, float]
    checkpoint: Path
    summary: Path
    images_per_second: float
    history: list[dict[str, float]]


def train(config: TrainConfig, keep_memory: bool = False) -> TrainResult:
    """Train an ensemble and evaluate it after each epoch; under `torchrun`, by all processes together.

    A run that was interrupted, however abruptly, continues from its last checkpoint with `resume`, to the same losses
    as if it had not been. While it runs, no other run can use its output folder.

    Args:
        config: The recipe.
        keep_memory: On a CPU, let the whole process keep freed memory from now on, which makes training faster; see
            `timm_hne.process.keep_freed_memory`. The commands do.

    Raises:
        FileNotFoundError: The data are not there.
        FileExistsError: `output_dir` holds another run, or one that is going on.
        NonFiniteLossError: The loss became infinite or not a number. The last checkpoint, if any, is from before.
        RuntimeError: A process of `torchrun` has trained before.
        TypeError: The model is no hierarchical ensemble.
        ValueError: The data, the checkpoint and the configuration do not fit together.
    """
    name = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda') and not torch.cuda.is_available():
        raise ValueError(f'device must be one that PyTorch finds, got {name!r}; it finds no CUDA.')
    world = SimpleNamespace(device=name)
    device = join(world)
    if keep_memory and device.type == 'cpu':
        keep_freed_memory()
    try:
        with _locked(Path(config.output_dir)) if world.rank == 0 else nullcontext(), ExitStack() as closing:
            if world.distributed:
                dist.barrier()  # a run that has just ended may have left another checkpoint while the first one waited
            return _train_phases(config, device, world.rank, world.world_size, closing)
    finally:
        if world.distributed:
            dist.destroy_process_group()


def _check_same(what: str, value: Any, world_size: int) -> None:
    """Raise a RuntimeError unless all processes, which would train apart, have the same value."""
    if world_size > 1:
        values = [None] * world_size
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise RuntimeError(f'{what} must be the same for all processes, they have {values}.')


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder. The system ends this with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Worker processes of a run that was killed may hold its lock for some seconds.
        lock = FileLock(folder / '.lock').acquire(timeout=LOCK_PATIENCE)
    except Timeout as error:
        raise FileExistsError(f'output_dir {folder} is in use by a run that is going on; choose another.') from error
    with lock:
        yield


def _train_phases(
        config: TrainConfig, device: torch.device, rank: int, world_size: int, closing: ExitStack) -> TrainResult:
    """Train the phases of a run, each from the weights that the one before it has left."""
    checkpoint = RunCheckpoint.newest(Path(config.output_dir), config.resume)
    last = None if checkpoint is None else checkpoint.epoch
    _check_same(f'the last epoch in output_dir {config.output_dir}', last, world_size)
    random_seed(config.seed)
    waits = config.download and world_size > 1  # for the first process to fetch the files
    if waits and rank:
        dist.barrier()
    data = open_data(config)
    if waits and not rank:
        dist.barrier()
    check_phases(config, data[-1], data[0], world_size)
    result, history = None, []
    parts = config.split()
    for (start, part), (following, _) in itertools.zip_longest(parts, parts[1:], fillvalue=(math.inf, None)):
        if checkpoint is not None and checkpoint.epoch is not None and checkpoint.epoch >= following:
            continue  # a later phase has begun
        if start:
            random_seed(config.seed)  # the phase before may have run in this process or in an earlier one
        weights = None if result is None else result.model.state_dict()
        # Nothing keeps the phase before, and with it the images in memory, but its result.
        result = _Phase(config, start, part, data, checkpoint, weights, device, rank, world_size, closing).run(history)
        checkpoint = None
    return result


def _epoch_of(path: Path) -> int | None:
    """Return the epoch of a checkpoint, None if it is not there or damaged."""
    try:
        return RunCheckpoint.read(path).epoch
    except (OSError, ValueError):
        return None


class _Phase:
    """A phase of a run, or a run that has none: all is built and checked by the constructor, before any epoch."""

    def __init__(
            self,
            whole: TrainConfig,
            start: int,
            config: TrainConfig,
            data: tuple[Dataset, Dataset, list[str] | None, int],
            checkpoint: RunCheckpoint | None,
            weights: Mapping[str, torch.Tensor] | None,
            device: torch.device,
            rank: int,
            world_size: int,
            closing: ExitStack,
    ):
        self.device, self.rank, self.world_size = device, rank, world_size
        self.output_dir = Path(config.output_dir)
        train_set, val_set, label_names, num_classes = data
        resize = config.img_size is not None
        model, config = create_trained_model(config, num_classes, weights, checkpoint is not None)
        self.config = config
        self.first_epoch, self.num_epochs = start, whole.epochs
        # Checkpoints hold the recipe of the whole run, with what follows from the model.
        known = ['num_classes', 'crop_pct', 'mean', 'std', *([] if resize else ['img_size'])]
        recorded = replace(whole, **{name: getattr(config, name) for name in known})
        if checkpoint is not None:
            checkpoint.check_same_run(recorded, label_names, world_size)
        if config.sync_bn:
            model = convert_sync_batchnorm(model)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.memory_format)

        mixed = config.mixup > 0 or config.cutmix > 0
        self.mixup = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=config.num_classes,
        ) if mixed else None
        self.task = HNETask(
            model,
            criterion_kwargs=dict(smoothing=config.smoothing, soft_targets=mixed),
            objective=config.objective,
            alpha=config.alpha,
            temperature=config.temperature,
            device=device,
            verbose=rank == 0,
        )
        self.optimizer = create_optimizer(self.task.get_trainable_module(), config)
        self.second_order = getattr(self.optimizer, 'is_second_order', False)
        self.scaler = NativeScaler(device.type) if config.amp and config.amp_dtype == 'float16' else None

        self.start_epoch = start
        if checkpoint is not None:
            self.start_epoch = checkpoint.restore(self.task, self.optimizer, self.scaler)
        if config.ema_decay:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=config.ema_warmup)
            if checkpoint is not None:
                checkpoint.restore_average(self.task)
        # Evaluated without the wrapper of DDP, which would wait for processes that have fewer batches.
        self.evaluated = self.task.get_trainable_module(ema=bool(config.ema_decay))
        if config.compile:
            self.task.compile()
            self.evaluated = torch.compile(self.evaluated)
        if world_size > 1:
            self.task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)

        self.train_set, self.val_set = train_set, val_set
        self.train_loader, self.val_loader = (
            create_image_loader(dataset, config, training, resize, device, rank, world_size)
            for dataset, training in ((train_set, True), (val_set, False)))
        if config.in_memory:
            bad = train_set.bad.nonzero().flatten().tolist()
            _check_same('the unreadable images, by their numbers,', bad, world_size)
        self.updates_per_epoch = len(self.train_loader) // config.grad_accum_steps
        if not self.updates_per_epoch:
            raise ValueError(
                f'batch_size {config.batch_size} * grad_accum_steps {config.grad_accum_steps} * {world_size} '
                'process(es) exceeds the training images that can be read: give a smaller batch_size.')
        self.scheduler = create_scheduler(self.optimizer, config, self.updates_per_epoch)

        self.writer = self.summary = None
        if rank == 0:
            self.writer = CheckpointWriter(
                self.output_dir, model, self.task, self.optimizer, self.scaler, recorded, label_names, checkpoint,
                world_size)
            self.summary = closing.enter_context(
                Summary(self.output_dir, self.start_epoch, whole.log, recipe_of(asdict(whole))))
            self.best = BestCheckpoint(
                whole.best_members, self.summary.rows, _epoch_of(self.output_dir / BestCheckpoint.NAME))
            if checkpoint is not None:  # which may have been written, and not yet kept, when the run was interrupted
                path = checkpoint.path
                if checkpoint.epochs_planned != whole.epochs and self.start_epoch == whole.epochs:
                    self.writer.save(self.start_epoch - 1)  # it is the last one now, and must say so
                    path = self.writer.last
                self.best.save(self.start_epoch - 1, path)

    def run(self, history: list[dict[str, float]]) -> TrainResult:
        """Train the epochs that are left, and add a row for each to the history."""
        row, metrics = {'images_per_second': math.nan}, None
        for epoch in range(self.start_epoch, self.first_epoch + self.config.epochs):
            row = self._train_epoch(epoch)
            if self.world_size > 1:
                for ema in (False, True)[:1 + self.task.has_ema()]:
                    distribute_bn(self.task.get_trainable_module(ema=ema), self.world_size, reduce=True)
            metrics = self._evaluate()
            self._check_weights(epoch)
            named = {**{f'train_{k}': v for k, v in row.items()}, **{f'eval_{k}': v for k, v in metrics.items()}}
            history.append({'epoch': epoch, **named})
            self._report(epoch, row, metrics)
        metrics = metrics or self._evaluate()  # a finished run, continued
        ensemble = self.task.get_eval_model(ema=self.task.has_ema())
        return TrainResult(
            model=getattr(ensemble, '_orig_mod', ensemble).eval(),
            top1={n: metrics[f'top1_{n}'] for n in prefixes(self.model.ensemble_size)},
            checkpoint=self.output_dir / CheckpointWriter.LAST,
            summary=self.output_dir / Summary.NAME,
            images_per_second=row['images_per_second'],
            history=history,
        )

    def _autocast(self):
        return torch.autocast(self.device.type, getattr(torch, self.config.amp_dtype), enabled=self.config.amp)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config, task = self.config, self.task
        seed_epoch(config.seed, epoch, self.rank)
        for part in (self.train_loader, getattr(self.train_loader, 'sampler', None), self.train_set):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        task.get_trainable_module().train()
        step = (epoch - self.first_epoch) * self.updates_per_epoch
        self.scheduler.step(epoch - self.first_epoch)
        self.scheduler.step_update(step)
        batches = iter(self.train_loader)
        losses = EpochLosses(epoch)
        started = time.perf_counter()
        bar = tqdm(
            range(self.updates_per_epoch),
            desc=f'epoch {epoch + 1}/{self.num_epochs}',
            disable=self.rank != 0 or not config.progress,
            leave=False,
        )
        for update in bar:
            for accumulated in range(1, config.grad_accum_steps + 1):
                batch = next(batches, None)
                if batch is None:
                    raise RuntimeError(
                        'the data set has fewer batches than it announced; there must not be more num_workers, of all '
                        'processes, than shards.')
                images, target = batch
                self._backward(images, target, accumulated == config.grad_accum_steps, losses, step)
            step += 1
            self.lr = learning_rate(self.optimizer)
            task.update_ema(step=step)
            self.scheduler.step_update(step)
            if (update + 1) % config.log_interval == 0 or update + 1 == self.updates_per_epoch:
                mean = losses.check()
                elapsed = time.perf_counter() - started
                speed = (update + 1) * config.grad_accum_steps * config.batch_size * self.world_size / elapsed
                bar.set_postfix_str(f'loss {mean["loss"]:.4g}, {speed:.0f} images/s')
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        return {**losses.of_all_processes(self.world_size, self.device), 'images_per_second': speed}

    def _backward(self, images, target, update: bool, losses: EpochLosses, step: int) -> None:
        """Add a batch's gradients, and update the weights if it is the last of its update."""
        config = self.config
        images = images.contiguous(memory_format=self.memory_format)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with nullcontext() if update else self.task.no_sync():
            with self._autocast():
                output = self.task(images, target)
            losses.add(output, step, learning_rate(self.optimizer))
            loss = output['loss'] / config.grad_accum_steps
            parameters = self.task.get_clip_parameters()
            if self.scaler is not None:
                self.scaler(
                    loss, self.optimizer, config.clip_grad, parameters=parameters, create_graph=self.second_order,
                    need_update=update)
            else:
                loss.backward(create_graph=self.second_order)
                if update:
                    if config.clip_grad is not None:
                        nn.utils.clip_grad_norm_(parameters, config.clip_grad)
                    self.optimizer.step()
        if update:
            self.optimizer.zero_grad()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Evaluate all nested ensembles in one pass over the validation images."""
        self.evaluated.eval()
        limit = evaluation_sample_limit(self.val_loader)
        sizes = prefixes(self.model.ensemble_size)
        evaluators = {n: self.task.create_evaluator() for n in sizes}
        seen = 0
        for images, target in self.val_loader:
            images = images.contiguous(memory_format=self.memory_format)
            with self._autocast():
                member_logits = self.evaluated(images)
            counted = target >= 0  # the others are unreadable
            if limit is not None:
                counted[max(limit - seen, 0):] = False  # repeated, for the processes to have equally many
            seen += len(target)
            outputs = prefix_means(member_logits.float())[counted]
            for index, evaluator in enumerate(evaluators.values()):
                evaluator.update(outputs[:, index], target[counted])
        results = {n: evaluator.compute(distributed=self.world_size > 1) for n, evaluator in evaluators.items()}
        return {**{f'top1_{n}': results[n]['top1'] for n in sizes}, 'loss': results[sizes[-1]]['loss']}

    def _check_weights(self, epoch: int) -> None:
        """Raise a NonFiniteLossError if the last update has broken the weights, before they are saved."""
        for name, tensor in self.task.get_trainable_module().state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                kept = ' The last checkpoint is from before.' if epoch else ''
                raise NonFiniteLossError(
                    f'{name} is not finite at the end of epoch {epoch + 1}, at learning rate '
                    f'{self.lr:g}.{kept} A lower lr, warmup_epochs or clip_grad may help.')

    def _report(self, epoch: int, row: dict[str, float], metrics: dict[str, float]) -> None:
        for kind, dataset in (('training', self.train_set), ('validation', self.val_set)):
            files = [] if isinstance(dataset, IterableDataset) else dataset.bad_files()
            if files:
                _logger.warning(f'{len(files)} unreadable {kind} images skipped so far: {", ".join(files[:10])}')
        if self.rank != 0:
            return
        top1 = ', '.join(f'{n}: {metrics[f"top1_{n}"]:.2f}' for n in prefixes(self.model.ensemble_size))
        _logger.info(
            f'epoch {epoch + 1}: loss {row["loss"]:.4g}, {row["images_per_second"]:.0f} images/s, top-1 % with n '
            f'members {top1}')
        self.summary.add(epoch, row, metrics, self.lr)
        # Last, so that a run that is killed in between repeats the epoch and drops its row.
        self.writer.save(epoch)
        self.best.save(epoch, self.writer.last)
