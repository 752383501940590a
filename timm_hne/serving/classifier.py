"""Any model by its name, and images from anywhere: what the page, the service and `timm-hne predict` share."""
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config

from ..checks import check_integer
from ..evaluation.cost import member_macs
from ..images import UNREADABLE, convert_image, decoded_sizes, load_pixels, open_image
from ..inference.early_exit import EarlyExit, early_exit
from ..inference.engines import ENGINES
from ..inference.optimize import OptimizedEnsemble, optimize_for_inference
from ..models.create import create_ensemble, has_weights
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import read_results
from ..runtime import MANIFEST
from ..training.checkpoint import CheckpointWriter, RunCheckpoint
from ..tree import prefixes
from .exported import ExportedEnsemble

__all__ = ['FORMATS', 'MAX_PIXELS', 'Classifier', 'ImageError', 'Label', 'locate']

MAX_PIXELS = 50_000_000

_logger = logging.getLogger(__name__)

# What cameras and the web use. Others would let strangers choose among decoders that run programs (EPS), or whose
# headers do not say how large the image is (ICO, ICNS).
FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')


class ImageError(ValueError):
    """What was given is no image that can be used; the message says why."""


class Label(NamedTuple):
    """A class and its probability.

    Attributes:
        index: Number of the class.
        name: Its name.
        probability: Its probability, calibrated if the model's evaluation is known.
    """
    index: int
    name: str
    probability: float


def locate(name: str | os.PathLike) -> str | Path:
    """Return where a model is.

    Args:
        name: See `Classifier.open`.

    Returns:
        Its file, the last checkpoint if `name` is the folder of a run; its folder; or its name for timm.

    Raises:
        FileNotFoundError: `name` is a path, and there is nothing.
    """
    if isinstance(name, str) and has_weights(name):
        if Path(name).exists():
            _logger.warning(f'{name} is the model of the package; what lies here under its name is ./{name}.')
        return name
    path = Path(os.fspath(name).removeprefix('local-dir:'))
    if (path / CheckpointWriter.LAST).is_file():
        return path / CheckpointWriter.LAST
    if isinstance(name, os.PathLike) and not path.exists():
        raise FileNotFoundError(f'model does not exist: {path}')
    return path if path.exists() else name


def _open_model(where: str | Path, **kwargs) -> HierarchicalEnsemble | ExportedEnsemble:
    if isinstance(where, str):
        return create_ensemble(where, pretrained=True, **kwargs).eval()
    if where.is_file():
        checkpoint = RunCheckpoint.read(where, 'model')
        model = checkpoint.create_model(**kwargs)
        # How images were prepared in training holds here too.
        data_config = {**checkpoint.data_config, 'in_chans': model.in_chans}
        model.pretrained_cfg.update(resolve_data_config(data_config, model=model))
        return model.eval()
    if (where / MANIFEST).is_file():
        if kwargs:
            raise ValueError(f'an exported model takes no further arguments, got {", ".join(kwargs)}.')
        return ExportedEnsemble.load(where, torch.get_num_threads())
    return create_ensemble(f'local-dir:{where}', pretrained=True, **kwargs).eval()


class Classifier:
    """A model that is ready for images. May be used from several threads at once.

    Args:
        model: Hierarchical ensemble in evaluation mode, optimised for inference, or exported.
        macs: Multiply-accumulates of an image for n members, by n.
        results: Rows of the model's evaluation by n; None if it is not known.
        max_pixels: Number of pixels of an image at most.

    Raises:
        ValueError: The model is not for grey or colour images.

    Attributes:
        model: The model, for `AdaptiveRunner` and whatever else takes one.
        ensemble_size: Number of members, N.
        num_classes: Number of classes.
        class_names: Their names; numbers as text if they are not known.
        prefixes: Numbers of members after which there is a result, 1, 2, 4, ..., N unless exported otherwise.
        input_size: Channels, height and width of a prepared image.
        macs: Multiply-accumulates of an image for n members, by n.
        results: What was measured of n members (`top1`, in percent, and others), by n; None if it is not known.
        max_pixels: Number of pixels of an image at most.
    """

    def __init__(
            self,
            model: HierarchicalEnsemble | OptimizedEnsemble | ExportedEnsemble,
            macs: dict[int, int],
            results: dict[int, dict[str, Any]] | None = None,
            max_pixels: int = MAX_PIXELS,
    ):
        check_integer('max_pixels', max_pixels, 1)
        most = Image.MAX_IMAGE_PIXELS  # Pillow itself refuses more than twice as many, unless it is None
        cfg = model.pretrained_cfg
        self.model = model
        self.ensemble_size: int = model.ensemble_size
        self.num_classes: int = model.num_classes
        names = cfg.get('label_names') or ()
        # The names of other weights may be left of those that a model was made from.
        self.class_names = tuple(map(str, names if len(names) == self.num_classes else range(self.num_classes)))
        self.prefixes: tuple[int, ...] = getattr(model, 'schedule', prefixes(self.ensemble_size))
        self.macs = macs
        self.results = results
        self.max_pixels = max_pixels if most is None else min(max_pixels, 2 * most)
        data_config = resolve_model_data_config(model)
        self.input_size: tuple[int, int, int] = tuple(data_config['input_size'])
        channels = {model.in_chans, self.input_size[0], len(data_config['mean']), len(data_config['std'])}
        if channels not in ({1}, {3}):
            raise ValueError(
                f'model must be for images of 1 or 3 channels, which its cfg must say too, got in_chans='
                f'{model.in_chans}, input_size={self.input_size}, mean={data_config["mean"]}.')
        self._transform = create_transform(**data_config)
        # Edge that images are resized to before they are cropped.
        self._edge = math.ceil(max(self.input_size[1:]) / (data_config.get('crop_pct') or 1))
        self._mode = 'L' if model.in_chans == 1 else 'RGB'

    @classmethod
    def open(
            cls,
            name: str | os.PathLike,
            engine: str = 'auto',
            device: str | torch.device = 'cpu',
            max_pixels: int = MAX_PIXELS,
            **kwargs,
    ) -> 'Classifier':
        """Open a model by its name.

        Args:
            name: A registered model with pretrained weights, a Hub model ('hf-hub:user/name'), the file of a
                checkpoint, or the folder of a training run, of a published model, or of one that `timm-hne export`
                wrote. Of a model of the package and a folder of the same name it is the model; './NAME' is the folder.
            engine: What runs it: see `timm_hne.optimize_for_inference`; 'none' is the model as it is. An exported
                model has its own.
            device: Where it runs; 'auto' is a GPU if there is one, but the CPU for an exported model.
            max_pixels: Number of pixels of an image at most.
            **kwargs: Further arguments of the model.

        Raises:
            ValueError: The name, the engine or an argument is wrong.
            RuntimeError: The model has no pretrained weights, or files differ from their digests.
            OSError: A file cannot be read or downloaded.
        """
        if engine not in ('auto', 'none', *ENGINES):
            raise ValueError(f'engine must be one of auto, none, {", ".join(ENGINES)}, got {engine!r}.')
        where = locate(name)
        model = _open_model(where, **kwargs)
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() and not isinstance(model, ExportedEnsemble) else 'cpu'
        model = model.to(device)
        if isinstance(model, ExportedEnsemble):
            return cls(model, model.macs, max_pixels=max_pixels)
        if model.num_classes == 0:
            raise ValueError(f'model must have a classifier, got {os.fspath(name)!r} with num_classes=0.')
        results = read_results(where, model)
        rows = None if results is None else {row['num_members']: row for row in results['members']}
        macs = member_macs(model, tuple(resolve_model_data_config(model)['input_size'][1:]))
        if engine != 'none':
            model = optimize_for_inference(model, engine=engine)
        return cls(model, macs, rows, max_pixels)

    @property
    def engine(self) -> str:
        """What runs the model; 'auto' until that has been measured."""
        return getattr(self.model, 'mode', 'none')

    def _check_size(self, size: tuple[int, int]) -> None:
        width, height = size
        if not width * height:
            raise ImageError('it has no pixels')
        if width * height > self.max_pixels:
            raise ImageError(f'it has {width}x{height} pixels, more than the {self.max_pixels:,} that are allowed')
        # Images are resized by their shorter edge, so a long strip would become a huge one.
        if max(size) / min(size) * self._edge ** 2 > self.max_pixels:
            raise ImageError(f'it has {width}x{height} pixels, and is too long for its width')

    def image(self, source: bytes | str | os.PathLike | Image.Image) -> torch.Tensor:
        """Read an image, turn it upright and prepare it as the model expects it.

        Of an animation the first frame is taken, of 12 or 16 bits the upper 8; other modes become the channels of the
        model, but 32-bit and floating-point numbers are refused. Nothing is decoded of an image that is too large.

        Args:
            source: The bytes of a file in one of `FORMATS`, its path, or an image of Pillow's.

        Returns:
            Normalised image (C, H, W).

        Raises:
            TypeError: `source` is something else.
            ImageError: It is no image, damaged, or larger than allowed.
            OSError: The file cannot be opened.
        """
        what = 'the image'
        try:
            if isinstance(source, Image.Image):
                for size in decoded_sizes(source):
                    self._check_size(size)
                load_pixels(source)
                copy = source.copy()  # it is turned in place
                copy.format = source.format
                if hasattr(source, 'tag_v2'):
                    copy.tag_v2 = source.tag_v2
                image = convert_image(copy, self._mode)
            elif isinstance(source, (bytes, bytearray, memoryview)):
                if not source:
                    raise ImageError('it is empty')
                image = self._read(io.BytesIO(source))
            elif isinstance(source, (str, os.PathLike)):
                what = f'image {os.fspath(source)}'
                with open(source, 'rb') as file:
                    image = self._read(file)
            else:
                raise TypeError(f'source must be bytes, a path or an image of Pillow, got {type(source).__name__}.')
        except UNREADABLE as error:
            if getattr(error, 'errno', None) is not None:  # of the system, not of Pillow
                raise OSError(error.errno, f'{what} cannot be read: {error.strerror}') from error
            reason = str(error).split(' <_io.')[0] or type(error).__name__
            raise ImageError(f'{what} cannot be read: {reason}.') from error
        return self._transform(image)

    def _read(self, file: io.BufferedIOBase) -> Image.Image:
        Image.init()
        return open_image(file, self._mode, self._check_size, [name for name in FORMATS if name in Image.OPEN])

    def _place(self, images: torch.Tensor) -> torch.Tensor:
        weight = next(self.model.parameters())
        return images.to(weight.device, weight.dtype)

    @torch.no_grad()
    def member_logits(self, images: torch.Tensor, num_members: int | None = None) -> torch.Tensor:
        """Compute the logits of each of the first n members, `(B, n, num_classes)`; of all if `num_members` is None.

        Args:
            images: `(B, C, H, W)`, from `image`.
            num_members: Number of members.

        Raises:
            TypeError, ValueError: An argument is wrong.
        """
        return self.model.forward_members(self._place(images), num_members).float().cpu()

    def logits(self, images: torch.Tensor, num_members: int | None = None) -> torch.Tensor:
        """Compute the ensemble's logits `(B, num_classes)`, the mean of `member_logits`."""
        return self.member_logits(images, num_members).mean(dim=1)

    def anytime(
            self,
            images: torch.Tensor,
            schedule: Sequence[int] | None = None,
            deadline: float | None = None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the number of members and the logits `(B, num_classes)` after more and more members.

        Args:
            images: `(B, C, H, W)`, from `image`.
            schedule: Increasing numbers of members; `prefixes` if None.
            deadline: Seconds from this call after which no step may end; see `timm_hne.inference.anytime`.

        Raises:
            TypeError, ValueError: An argument is wrong.
        """
        schedule = self.prefixes if schedule is None else schedule
        steps = self.model.anytime(self._place(images), schedule, deadline)
        return ((n, logits.float().cpu()) for n, logits in zip(schedule, steps))

    def early_exit(self, images: torch.Tensor, threshold: float, criterion: str = 'confidence') -> EarlyExit:
        """Evaluate as many members as each image needs; see `timm_hne.early_exit`."""
        logits, used = early_exit(self.model, self._place(images), threshold, criterion, self.prefixes)
        return EarlyExit(logits.float().cpu(), used.cpu())

    def warm_up(self, schedule: Sequence[int] | None = None) -> None:
        """Go through the steps of a schedule, so that programs are there and deadlines have times to go by."""
        images = torch.zeros(1, *self.input_size)
        # The first pass, a slow one, is not recorded.
        for deadline in (None, math.inf, math.inf):
            for _ in self.anytime(images, schedule, deadline):
                pass

    def probabilities(self, logits: torch.Tensor, num_members: int) -> torch.Tensor:
        """Return the probabilities of logits `(..., num_classes)` of n members, calibrated by the evaluation if known.
        """
        return logits.float().div(self._row(num_members).get('temperature', 1.)).softmax(dim=-1)

    def usual_confidence(self, num_members: int) -> float:
        """Return the probability that 95 % of the evaluated images exceed with their first class; 0 if not known."""
        return self._row(num_members).get('usual_confidence', 0.)

    def _row(self, num_members: int) -> dict[str, Any]:
        return (self.results or {}).get(num_members, {})

    def top(self, logits: torch.Tensor, num_members: int, k: int = 5) -> list[Label]:
        """Return the k most probable classes of one image's logits `(num_classes,)` of n members."""
        top = self.probabilities(logits, num_members).topk(min(k, self.num_classes))
        return [Label(i, self.class_names[i], p) for p, i in zip(*(tensor.tolist() for tensor in top))]
