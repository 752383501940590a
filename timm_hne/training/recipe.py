"""Training recipes: their keys, and the files that hold them."""
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from ..models.grow import NOISE
from .losses import OBJECTIVES
from .trackers import LOGS

__all__ = ['FREE_KEYS', 'RECIPES', 'TrainConfig', 'image_preparation', 'in_phase', 'read_recipe', 'recipe_of', 'so_far']

RECIPES = Path(__file__).parents[1] / 'recipes'

# What is the same in all phases of a run.
_RUN_KEYS = (
    'dataset', 'data_dir', 'train_split', 'val_split', 'val_fraction', 'max_train_images', 'num_classes', 'download',
    'unreadable', 'in_memory', 'in_chans', 'crop_pct', 'mean', 'std', 'model', 'pretrained', 'initial_checkpoint',
    'phases', 'seed', 'device', 'output_dir', 'resume', 'log', 'best_members',
)

# What may change when a run is continued: where and how it runs, not what it computes.
FREE_KEYS = (
    'data_dir', 'output_dir', 'resume', 'download', 'num_workers', 'device', 'log', 'best_members', 'log_interval',
    'progress',
)

# What a checkpoint holds besides, and files of the machine in our names or timm's.
_NOT_IN_RECIPES = ('label_names', 'world_size', 'initial_checkpoint', 'data', 'output')

# Keys, what their values must be, and the test of each number. A key without a value is always in range.
_RANGES = (
    (
        ('epochs', 'batch_size', 'grad_accum_steps', 'log_interval', 'max_train_images', 'num_classes', 'img_size',
         'best_members'),
        'at least 1', lambda x: x >= 1,
    ),
    (('num_workers', 'crop_padding'), 'at least 0', lambda x: x >= 0),
    (('seed',), 'at least 0 and below 2**32', lambda x: 0 <= x < 2 ** 32),  # NumPy's
    (('val_fraction', 'smoothing', 'ema_decay'), 'at least 0 and below 1', lambda x: 0 <= x < 1),
    (('hflip', 'alpha'), 'from 0 to 1', lambda x: 0 <= x <= 1),
    (('scale', 'crop_pct'), 'above 0 and at most 1', lambda x: 0 < x <= 1),
    (('std', 'temperature', 'clip_grad'), 'above 0 and finite', lambda x: 0 < x < math.inf),
    (('mean',), 'finite', math.isfinite),
    (
        ('lr', 'momentum', 'weight_decay', 'warmup_epochs', 'warmup_lr', 'min_lr', 'decay_rate', 'color_jitter',
         'mixup', 'cutmix', 'grow_noise'),
        'at least 0 and finite', lambda x: 0 <= x < math.inf,
    ),
)


@dataclass(kw_only=True)
class TrainConfig:
    """The keys of a recipe.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    # Data
    dataset: str = ''  # timm's name: '' for an image folder, 'torch/cifar10', 'hfds/...', 'wds/...'; or 'digits'
    data_dir: str | None = None  # folder of the data
    train_split: str = 'train'
    val_split: str = 'validation'  # split that is evaluated after each epoch
    val_fraction: float = 0.  # if not 0, evaluate on this seeded part of the training split instead
    max_train_images: int | None = None  # train on a seeded choice of so many images
    num_classes: int | None = None  # what the data set must have; needed for data sets that do not tell
    download: bool = False  # fetch the data set if timm can
    unreadable: str = 'error'  # images that cannot be read: 'error' stops, 'skip' names, counts and skips them
    in_memory: bool = False  # decode all images once and augment in batches; for small images of one size
    num_workers: int = 2  # processes that decode images
    img_size: int | None = None  # pixels; the model's own if None
    in_chans: int = 3  # 1 for grey images
    crop_pct: float | None = None  # part of the resized image that is evaluated: the model's own if None, in memory 1
    mean: tuple[float, ...] | None = None  # normalisation; the model's own if None
    std: tuple[float, ...] | None = None

    # Augmentation
    hflip: float = 0.5  # probability of a horizontal flip
    crop_padding: int | None = 4  # in memory: pixels of zero padding before a random crop; None: random resized crop
    scale: tuple[float, float] = (0.08, 1.)  # area of the random resized crop
    color_jitter: float = 0.  # not in memory
    mixup: float = 0.  # alpha of mixup
    cutmix: float = 0.  # alpha of cutmix
    smoothing: float = 0.  # label smoothing

    # Model and objective
    model: str = 'hne_resnet50_c8'
    model_kwargs: dict = field(default_factory=dict)  # arguments of the model, such as nodes: [1, 1, 1, 16, 16]
    pretrained: bool = False  # start from the published weights of the model, fitted to classes, channels and nodes
    initial_checkpoint: str = ''  # start from these weights instead
    grow_noise: float = NOISE  # of the copies that make more nodes of fewer, relative to a tensor's root mean square
    objective: str = 'hierarchical_codistillation'
    alpha: float = 0.5  # weight of the distillation term
    temperature: float = 2.

    # Optimisation
    epochs: int = 200  # the sum of the phases' if there are phases
    phases: tuple[dict, ...] = ()  # parts of the run: the `epochs` of each, and the keys that differ from the recipe's
    batch_size: int = 128  # of one process
    grad_accum_steps: int = 1  # batches of one update
    opt: str = 'momentum'  # timm's name; 'momentum' is plain SGD with momentum, 'sgd' has Nesterov's
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    filter_bias_and_bn: bool = True  # keep weight decay off biases and normalisation
    opt_kwargs: dict = field(default_factory=dict)  # further arguments of the optimizer
    clip_grad: float | None = None  # greatest norm of the gradient
    sched: str = 'cosine'  # 'cosine', 'multistep', 'constant', or 'cyclic' (Mehta et al., 2019)
    warmup_epochs: float = 0.
    warmup_lr: float = 1e-5
    min_lr: float = 0.
    decay_milestones: tuple[int, ...] = (60, 90, 110, 125, 135, 145)  # of 'cyclic' and 'multistep'
    decay_rate: float = 0.5
    ema_decay: float = 0.  # if not 0, evaluate the exponential moving average of the weights
    ema_warmup: bool = True  # let the decay grow with the number of updates

    # Run
    seed: int = 0
    device: str = 'auto'  # 'cuda' if there is one, else 'cpu'
    amp: bool = False
    amp_dtype: str = 'bfloat16'  # or 'float16', which scales the loss
    channels_last: bool = True
    compile: bool = False  # torch.compile
    sync_bn: bool = False  # normalise over all processes
    output_dir: str = 'output'  # checkpoints and logs
    resume: bool = False  # continue the run in `output_dir`, if there is one
    log: str | None = None  # beside the CSV file: 'tensorboard' (also if None), 'wandb', 'mlflow'; or 'csv'
    best_members: int | None = None  # keep the best checkpoint by the accuracy of so many members: model_best.pth.tar
    log_interval: int = 20  # updates between two looks at the losses
    progress: bool = True  # show a progress bar

    def __post_init__(self):
        for key in fields(self):
            setattr(self, key.name, _coerce(key.name, key.type, getattr(self, key.name)))
        choices = {
            'objective': OBJECTIVES,
            'sched': ('cosine', 'multistep', 'constant', 'cyclic'),
            'unreadable': ('error', 'skip'),
            'amp_dtype': ('bfloat16', 'float16'),
            'log': (None, *LOGS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                named = ', '.join(filter(None, allowed))
                raise ValueError(f'{name} must be one of {named}, got {getattr(self, name)!r}.')
        for names, allowed, fits in _RANGES:
            for name in names:
                value = getattr(self, name)
                values = value if isinstance(value, tuple) else (value,)
                if value is not None and not (values and all(map(fits, values))):
                    raise ValueError(f'{name} must be {allowed}, got {value}.')
        if self.in_chans not in (1, 3):
            raise ValueError(f'in_chans must be 1 or 3, got {self.in_chans}.')
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise ValueError(f'scale must be two numbers, the smaller first, got {self.scale}.')
        if list(self.decay_milestones) != sorted({epoch for epoch in self.decay_milestones if epoch > 0}):
            raise ValueError(f'decay_milestones must be at least 1 and increase, got {self.decay_milestones}.')
        for name in ('num_classes', 'in_chans', 'pretrained'):
            if name in self.model_kwargs:
                raise ValueError(f'model_kwargs must not hold {name}, use the key {name}.')
        if self.pretrained and self.initial_checkpoint:
            raise ValueError(
                f'only one of pretrained and initial_checkpoint may be given, got {self.initial_checkpoint!r}.')
        for name, nothing in (('color_jitter', (0,)), ('crop_pct', (None, 1))):
            if self.in_memory and getattr(self, name) not in nothing:
                raise ValueError(f'{name} does nothing to images that are in_memory, got {getattr(self, name)}.')
        if self.sched == 'cyclic' and self.warmup_epochs % 1:
            raise ValueError(f"warmup_epochs must be a whole number for sched 'cyclic', got {self.warmup_epochs}.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f'batch_size must be even for mixup and cutmix, got {self.batch_size}.')
        if self.phases:
            self._check_phases()

    def _check_phases(self) -> None:
        for number, phase in enumerate(self.phases, start=1):
            if 'epochs' not in phase:
                raise ValueError(f'phases must each say their epochs, not so phase {number}: {phase}.')
            if fixed := [name for name in phase if name in _RUN_KEYS]:
                raise ValueError(f'phases must not change {fixed[0]}, as phase {number} does: {phase}.')
            if phase.get('model_kwargs') is not None:
                _coerce('model_kwargs', dict, phase['model_kwargs'])
        total = sum(phase.epochs for _, phase in self.split())
        if self.epochs not in (total, type(self).epochs):
            raise ValueError(f'epochs must be left out, or {total} as the phases have together, got {self.epochs}.')
        self.epochs = total

    def split(self) -> 'list[tuple[int, TrainConfig]]':
        """Return the first epoch and the recipe of every phase; those of the whole run if it has no phases.

        A phase takes over the recipe's keys, and the entries of its `model_kwargs`, that it does not have itself.
        """
        if not self.phases:
            return [(0, self)]
        parts, start = [], 0
        for phase in self.phases:
            part = self.from_dict({**in_phase(vars(self), phase), 'phases': ()})
            parts.append((start, part))
            start += part.epochs
        return parts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'TrainConfig':
        """Create a configuration from a recipe's keys.

        Raises:
            ValueError: A key is unknown; the message names the nearest one.
        """
        known = [key.name for key in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.)[0]
                raise ValueError(f'unknown key {name!r} in the recipe, did you mean {nearest!r}?')
        return cls(**values)


def in_phase(recipe: Mapping[str, Any], phase: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe as a phase of it has them."""
    model_kwargs = {**(recipe.get('model_kwargs') or {}), **(phase.get('model_kwargs') or {})}
    return {**recipe, **phase, 'model_kwargs': model_kwargs}


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint was trained, from the arguments it holds: what was computed, and no path of a machine."""
    return _without_paths({key: value for key, value in config.items() if key not in (*FREE_KEYS, *_NOT_IN_RECIPES)})


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(entry) for key, entry in value.items() if not os.path.isabs(str(entry))}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_paths(entry) for entry in value if not os.path.isabs(str(entry)))
    if isinstance(value, str) and value.lower().startswith(('local-dir:', 'local_dir:')):  # of which the name stays
        return f'local-dir:{Path(value.partition(":")[2]).resolve().name}'
    return value


def so_far(recipe: Mapping[str, Any], epoch: int | None) -> dict[str, Any]:
    """Return a recipe as far as a run depends on it up to and with an epoch: with the phases that have begun.

    The `FREE_KEYS` of the recipe stay, those of its phases do not.
    """
    done = math.inf if epoch is None else epoch + 1
    phases, start = [], 0
    for phase in recipe['phases']:
        if start < done:
            constant = in_phase(recipe, phase)['sched'] == 'constant'
            fixed = {key: value for key, value in phase.items() if key not in FREE_KEYS}
            phases.append({**fixed, 'epochs': min(phase['epochs'], done - start) if constant else phase['epochs']})
        start += phase['epochs']
    return {**recipe, 'phases': phases, 'epochs': None if phases else recipe['epochs']}


def image_preparation(in_memory: bool, crop_pct: float | None) -> dict[str, Any]:
    """Return how images are prepared for validation, and so for any evaluation later, in timm's names.

    Args:
        in_memory: Whether they are kept in memory. Then they are seen whole, whatever the model's own `crop_pct` is.
        crop_pct: Part of the image that is seen otherwise.
    """
    return {'crop_pct': 1. if in_memory else crop_pct, 'crop_mode': 'center', 'interpolation': 'bilinear'}


def _coerce(name: str, annotation: Any, value: Any) -> Any:
    """Bring a value, as YAML reads it, to its declared type."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return None
    kind = get_origin(kinds[0]) or kinds[0]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except (ValueError, OverflowError):
            pass
    elif kind is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(name, get_args(kinds[0])[0], item) for item in value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = getattr(annotation, '__name__', annotation)
    raise TypeError(f'{name} must be of type {expected}, got {value!r} of type {type(value).__name__}.')


def read_recipe(name: str, folder: Path = RECIPES, above: tuple[Path, ...] = ()) -> dict:
    """Read a recipe from a path, or by its name in `timm_hne/recipes`.

    The key `base` names another recipe, beside it, whose keys it takes over; `above` are the recipes that led here.

    Raises:
        FileNotFoundError: There is no such recipe; the message lists those that there are.
        TypeError: A base is no name.
        ValueError: The file holds no keys, or a recipe is its own base.
    """
    places = (folder / name, Path(name)) if above else (Path(name), folder / name)
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        known = ', '.join(sorted(path.name for path in RECIPES.glob('*.yaml')))
        raise FileNotFoundError(f'there is no recipe {name!r}; {RECIPES} has {known}.')
    above = *above, path.resolve()
    if above[-1] in above[:-1]:
        raise ValueError(f'recipe {path} is its own base: {" -> ".join(step.name for step in above)}.')
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that there is not
        raise ValueError(f'recipe {path} is not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(recipe, dict):
        raise ValueError(f'recipe {path} must hold keys and values.')
    base = recipe.pop('base', None)
    if not isinstance(base, str | None):
        raise TypeError(f'base of recipe {path} must be the name of another recipe, got {base!r}.')
    return {**(read_recipe(base, path.parent, above) if base is not None else {}), **recipe}
