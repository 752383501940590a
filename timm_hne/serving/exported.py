"""A folder that `timm-hne export` wrote, with the interface of an ensemble."""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..models.anytime import anytime, check_images
from ..models.frontier import Frontier, first_frontier
from ..runtime import Runtime, load
from ..tree import validate_num_members

_IMAGE_KEYS = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


class ExportedEnsemble(nn.Module):
    """An exported folder as `AdaptiveRunner`, `early_exit`, `anytime` and timm's transforms want a model.

    Its programs go from one number of members of `runtime.schedule` to the next. Any other number costs as much as the
    next one in it, and what was computed beyond is kept for the next step.

    Args:
        runtime: The loaded folder.

    Attributes:
        runtime: The loaded folder.
        schedule: Numbers of members that cost no more than they must.
        macs: Multiply-accumulates of an image for n members, by n.
    """

    def __init__(self, runtime: Runtime):
        super().__init__()
        manifest, image = runtime.manifest, runtime.manifest['image']
        self.runtime = runtime
        self.schedule = runtime.schedule
        self.ensemble_size = runtime.ensemble_size
        self.num_classes = runtime.num_classes
        self.nodes = tuple(manifest['nodes'])
        self.macs = {int(n): count for n, count in manifest['macs'].items()}
        self.in_chans: int = image['channels']
        self.pretrained_cfg: dict[str, Any] = {
            'input_size': (image['channels'], image['height'], image['width']),
            'fixed_input_size': not image['any_size'],
            **{key: image[key] for key in _IMAGE_KEYS if key in image},
            **{key: manifest.get(key) for key in ('architecture', 'tag', 'num_classes', 'label_names')},
        }
        # Whoever asks a model for its device and type finds them here.
        self.register_parameter('place', nn.Parameter(torch.empty(0), requires_grad=False))
        super().train(False)

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> 'ExportedEnsemble':
        """Load a folder; see `timm_hne.runtime.load`."""
        return cls(load(folder, threads))

    @property
    def mode(self) -> str:
        """The engine, as `OptimizedEnsemble.mode`."""
        return 'onnxruntime'

    def train(self, mode: bool = True) -> 'ExportedEnsemble':
        """Refuse training mode."""
        if mode:
            raise ValueError('mode must be False: exported programs cannot be trained.')
        return super().train(False)

    def _apply(self, fn, recurse: bool = True) -> 'ExportedEnsemble':
        super()._apply(fn, recurse)
        if self.place.device.type != 'cpu' or self.place.dtype != torch.float32:
            place, self.place = self.place, nn.Parameter(torch.empty(0), requires_grad=False)
            raise ValueError(f'exported programs run on a CPU in float32, not on {place.device.type} in {place.dtype}.')
        return self

    def forward(self, x: torch.Tensor, num_members: int | None = None) -> torch.Tensor:
        """Compute the ensemble's logits `(B, num_classes)`, with all members if `num_members` is None."""
        return self.forward_members(x, num_members).mean(dim=1)

    def forward_members(self, x: torch.Tensor, num_members: int | None = None) -> torch.Tensor:
        """Compute the logits of each of the first n members `(B, n, num_classes)`."""
        num_members = self.ensemble_size if num_members is None else num_members
        validate_num_members(num_members, self.ensemble_size)
        return self.advance(first_frontier(self, x), 0, num_members)[0]

    @torch.no_grad()
    def advance(self, frontier: Frontier, start: int, stop: int) -> tuple[torch.Tensor, Frontier]:
        """Add members to an evaluation; see `timm_hne.inference.advance`. The frontier is the programs' own affair."""
        if start == 0:
            check_images(frontier[0], self.in_chans)
            images = frontier[0].detach().float().contiguous()
            if len(images):
                self.runtime.check(images.numpy())
            logits, features = images.new_zeros(len(images), 0, self.num_classes), {'images': images}
        else:
            logits, features = frontier
        if len(logits):
            done = start + logits.shape[1]
            new = [logits]
            for step in self.runtime.steps_between(done, stop):
                arrays, features = self.runtime.step(
                    step, {name: tensor.contiguous().numpy() for name, tensor in features.items()})
                new.append(torch.from_numpy(arrays))
                features = {name: torch.from_numpy(array) for name, array in features.items()}
            logits = torch.cat(new, dim=1)
        else:  # no image
            logits = logits.new_zeros(0, self.ensemble_size - start, self.num_classes)
        return logits[:, :stop - start], (logits[:, stop - start:], features)

    def anytime(
            self,
            x: torch.Tensor,
            schedule: Sequence[int] | None = None,
            deadline: float | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the logits after more and more members; see `timm_hne.inference.anytime`."""
        return anytime(self, x, self.schedule if schedule is None else schedule, deadline)
