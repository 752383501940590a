"""Training of hierarchical neural ensembles, built from timm's parts.

`train(TrainConfig(...))` is all there is: `timm-hne demo` and `train_scripts/train.py` call it.
"""
import argparse
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data import Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    distribute_bn,
    init_distributed_device,
    random_seed,
    trim_summary,
    update_summary,
)
from torch.utils.data import IterableDataset
from tqdm import tqdm

from .checkpoints import check_same_run, find_checkpoint, load_weights
from .data import create_datasets, create_image_loader, seed_epoch
from .ensemble import HierarchicalEnsemble
from .losses import prefix_logits
from .memory import keep_freed_memory
from .recipe import TrainConfig
from .scheduler import create_scheduler
from .task import HNETask
from .tree import prefixes

__all__ = ['NonFiniteLossError', 'TrainConfig', 'TrainResult', 'keep_freed_memory', 'train']

_logger = logging.getLogger(__name__)

SUMMARY = 'summary.csv'


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


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


def train(config: TrainConfig) -> TrainResult:
    """Train an ensemble and evaluate it after each epoch; under `torchrun`, by all processes together.

    A run that was interrupted, however abruptly, continues from its last checkpoint with `resume`, to the same losses
    as if it had not been.

    Raises:
        FileNotFoundError: The data are not there.
        FileExistsError: `output_dir` holds another run.
        NonFiniteLossError: The loss became infinite or not a number. The last checkpoint, if any, is from before.
        TypeError: The model is no hierarchical ensemble.
        ValueError: The data, the checkpoint and the configuration do not fit together.
    """
    name = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    world = argparse.Namespace(device=name)
    device = init_distributed_device(world)
    if device.type == 'cpu':
        keep_freed_memory()
    try:
        return _Run(config, device, world.rank, world.world_size).run()
    finally:
        if world.distributed:
            dist.destroy_process_group()


class _Run:
    """One training run: everything is built and checked by the constructor, before any epoch."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, world_size: int):
        self.device, self.rank, self.world_size = device, rank, world_size
        self.output_dir = Path(config.output_dir)
        checkpoint = find_checkpoint(self.output_dir, config.resume)
        random_seed(config.seed)
        train_set, val_set, label_names = create_datasets(
            config.dataset,
            config.data_dir,
            config.train_split,
            config.val_split,
            val_fraction=config.val_fraction,
            max_train_images=config.max_train_images,
            unreadable=config.unreadable,
            download=config.download,
            in_chans=config.in_chans,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        if isinstance(train_set, IterableDataset):
            _check_streamed(config)
        num_classes = len(label_names) if label_names else None
        if num_classes is None and config.num_classes is None:
            raise ValueError(f'num_classes must be given for the data set {config.dataset!r}, which does not tell.')
        if None not in (num_classes, config.num_classes) and num_classes != config.num_classes:
            raise ValueError(
                f'the recipe is for {config.num_classes} classes (num_classes), the data have {num_classes}: '
                f'dataset {config.dataset!r} in {config.data_dir}.')
        resize = config.img_size is not None
        model, config = _create_model(config, num_classes or config.num_classes)
        self.config = config
        if checkpoint is not None:
            check_same_run(checkpoint, asdict(config), label_names)
        if config.sync_bn:
            model = convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=torch.channels_last if config.channels_last else None)

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
        self.optimizer = create_optimizer_v2(
            self.task.get_trainable_module(),
            opt=config.opt,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=config.filter_bias_and_bn,
            **config.opt_kwargs,
        )
        self.scaler = NativeScaler(device.type) if config.amp and config.amp_dtype == 'float16' else None

        self.start_epoch = 0
        if checkpoint is not None:
            self.start_epoch = resume_task_checkpoint(self.task, str(checkpoint), self.optimizer, self.scaler)
        if config.ema_decay:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=config.ema_warmup)
            if checkpoint is not None:
                load_task_ema_checkpoint(self.task, str(checkpoint))
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
        self.updates_per_epoch = len(self.train_loader) // config.grad_accum_steps
        if not self.updates_per_epoch:
            raise ValueError(
                f'batch_size {config.batch_size} * grad_accum_steps {config.grad_accum_steps} * {world_size} '
                f'process(es) exceeds the {len(train_set)} training images.')
        self.scheduler = create_scheduler(self.optimizer, config, self.updates_per_epoch)

        self.saver = self.tensorboard = None
        if rank == 0:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.saver = CheckpointSaver(
                model,
                self.optimizer,
                args=argparse.Namespace(**asdict(config), label_names=label_names),
                amp_scaler=self.scaler,
                checkpoint_dir=str(self.output_dir),
                recovery_dir=str(self.output_dir),
                max_history=2,
                task=self.task,
            )
            if checkpoint is not None:
                self.saver.load_state_dict_from_checkpoint(str(checkpoint))
            trim_summary(str(self.output_dir / SUMMARY), self.start_epoch)
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(str(self.output_dir), purge_step=self.start_epoch)
            except ImportError:
                pass

    def run(self) -> TrainResult:
        history = []
        row, metrics = {'images_per_second': math.nan}, None
        for epoch in range(self.start_epoch, self.config.epochs):
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
            checkpoint=self.output_dir / 'last.pth.tar',
            summary=self.output_dir / SUMMARY,
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
        step = epoch * self.updates_per_epoch
        self.scheduler.step(epoch)
        self.scheduler.step_update(step)
        batches = iter(self.train_loader)
        losses = _Losses(epoch)
        started = time.perf_counter()
        bar = tqdm(
            range(self.updates_per_epoch),
            desc=f'epoch {epoch + 1}/{config.epochs}',
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
            task.update_ema(step=step)
            self.scheduler.step_update(step)
            if (update + 1) % config.log_interval == 0 or update + 1 == self.updates_per_epoch:
                mean = losses.check()
                elapsed = time.perf_counter() - started
                speed = (update + 1) * config.grad_accum_steps * config.batch_size * self.world_size / elapsed
                bar.set_postfix_str(f'loss {mean["loss"]:.4g}, {speed:.0f} images/s')
        return {**mean, 'images_per_second': speed}

    def _backward(self, images, target, update: bool, losses: '_Losses', step: int) -> None:
        """Add a batch's gradients, and update the weights if it is the last of its update."""
        config = self.config
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with nullcontext() if update else self.task.no_sync():
            with self._autocast():
                output = self.task(images, target)
            losses.add(output, step, self.optimizer.param_groups[0]['lr'])
            loss = output['loss'] / config.grad_accum_steps
            parameters = self.task.get_clip_parameters()
            if self.scaler is not None:
                self.scaler(loss, self.optimizer, config.clip_grad, parameters=parameters, need_update=update)
            else:
                loss.backward()
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
        evaluators = {n: self.task.create_evaluator(max_samples=limit) for n in sizes}
        for images, target in self.val_loader:
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                member_logits = self.evaluated(images)
            readable = target >= 0
            outputs = prefix_logits(member_logits.float())[readable]
            for index, evaluator in enumerate(evaluators.values()):
                evaluator.update(outputs[:, index], target[readable])
        results = {n: evaluator.compute(distributed=self.world_size > 1) for n, evaluator in evaluators.items()}
        return {**{f'top1_{n}': results[n]['top1'] for n in sizes}, 'loss': results[sizes[-1]]['loss']}

    def _check_weights(self, epoch: int) -> None:
        """Raise a NonFiniteLossError if the last update has broken the weights, before they are saved."""
        for name, tensor in self.task.get_trainable_module().state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                kept = ' The last checkpoint is from before.' if epoch else ''
                raise NonFiniteLossError(
                    f'{name} is not finite at the end of epoch {epoch + 1}, at learning rate '
                    f'{self.optimizer.param_groups[0]["lr"]:g}.{kept} A lower lr, warmup_epochs or clip_grad may help.')

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
        lr = self.optimizer.param_groups[0]['lr']
        update_summary(epoch, row, metrics, str(self.output_dir / SUMMARY), lr=lr)
        if self.tensorboard is not None:
            values = {**{f'train/{k}': v for k, v in row.items()}, **{f'eval/{k}': v for k, v in metrics.items()}}
            for name, value in {**values, 'lr': lr}.items():
                self.tensorboard.add_scalar(name, value, epoch)
            self.tensorboard.flush()
        # Last, so that a run that is killed in between repeats the epoch and drops its row.
        try:
            self.saver.save_checkpoint(epoch)
        finally:
            (self.output_dir / 'tmp.pth.tar').unlink(missing_ok=True)  # is there only if the saver was interrupted


class _Losses:
    """The losses of an epoch. They are read from the device now and then only, each reading waits for it."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.names: list[str] = []
        self.unread: list[tuple[torch.Tensor, int, float]] = []
        self.total = 0.
        self.count = 0

    def add(self, output: dict[str, torch.Tensor], step: int, lr: float) -> None:
        """Take the loss and its terms from the output of a task."""
        self.names = [name for name in output if name != 'output']
        self.unread.append((torch.stack([output[name].detach() for name in self.names]), step, lr))

    def check(self) -> dict[str, float]:
        """Return the mean losses since the beginning of the epoch.

        Raises:
            NonFiniteLossError: One was infinite or not a number.
        """
        values = torch.stack([losses for losses, _, _ in self.unread]).double().cpu()
        for losses, (_, step, lr) in zip(values, self.unread):
            if not losses.isfinite().all():
                bad = ', '.join(f'{name} = {value}' for name, value in zip(self.names, losses.tolist())
                                if not math.isfinite(value))
                kept = 'The last checkpoint is from before. ' if self.epoch else ''
                raise NonFiniteLossError(
                    f'the loss is not finite in step {step} (counted from 0) at learning rate {lr:g}: {bad}. '
                    f'{kept}A lower lr, warmup_epochs or clip_grad may help.')
        self.total = self.total + values.sum(dim=0)
        self.count += len(self.unread)
        self.unread.clear()
        return dict(zip(self.names, (self.total / self.count).tolist()))


def _check_streamed(config: TrainConfig) -> None:
    """Refuse what cannot be done with a data set that is a stream."""
    for name, wrong, allowed, reason in (
            ('in_memory', config.in_memory, 'false', ''),
            ('unreadable', config.unreadable != 'skip', 'skip', ', whose reader passes over what it cannot read'),
            ('num_workers', not config.num_workers, 'at least 1', ', or a resumed run would see other images'),
    ):
        if wrong:
            raise ValueError(
                f'{name} must be {allowed} for the streamed data set {config.dataset!r}{reason}, '
                f'got {getattr(config, name)}.')


def _create_model(config: TrainConfig, num_classes: int) -> tuple[HierarchicalEnsemble, TrainConfig]:
    """Create the model, and complete the configuration by what follows from it."""
    overlay = {name: getattr(config, name) for name in ('mean', 'std') if getattr(config, name) is not None}
    if config.img_size is not None:
        overlay['input_size'] = (config.in_chans, config.img_size, config.img_size)
    model = create_model(
        config.model,
        pretrained=config.pretrained,
        num_classes=num_classes,
        in_chans=config.in_chans,
        pretrained_cfg_overlay=overlay,
        **config.model_kwargs,
    )
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(
            f'objective {config.objective!r} needs a hierarchical ensemble as its model, {config.model!r} is a '
            f'{type(model).__name__}. Other models are trained by timm\'s own train.py.')
    if config.initial_checkpoint:
        load_weights(model, config.initial_checkpoint)
    data_config = resolve_data_config({'in_chans': config.in_chans}, model=model)
    for name in ('mean', 'std'):
        if len(data_config[name]) != config.in_chans:
            raise ValueError(f'{name} must have {config.in_chans} value(s), as in_chans, got {data_config[name]}.')
    return model, replace(
        config,
        num_classes=num_classes,
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        mean=data_config['mean'],
        std=data_config['std'],
    )
