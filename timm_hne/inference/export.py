"""Programs for other software: one ONNX or torch.export file per number of members.

For what `timm_hne.runtime` runs see `deploy.py`.
"""
import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.cost import resolve_input_size
from ..files import write_file
from ..models.anytime import check_ready
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from .folding import folded

FORMATS = {'onnx': '.onnx', 'torch.export': '.pt2'}

# Largest difference of logits from the model's own that is accepted, relative to the largest logit.
TOLERANCE = 1e-4


def _onnx_logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _export_logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.export.load(path).module()(x)


def export(
        model: HierarchicalEnsemble,
        path: str | Path,
        num_members: int,
        format: str = 'onnx',
        input_size: Sequence[int] | None = None,
) -> Path:
    """Export the first n members as a program of their own, and check it against the model.

    The program takes images `(B, C, H, W)`, for any B, to logits `(B, num_classes)`. It holds no weight of a node that
    the n members do not use, and batch normalisation is folded.

    Args:
        model: Any hierarchical ensemble in evaluation mode, but not an optimised one. The program computes in float32.
        path: File to write.
        num_members: Number of members n.
        format: 'onnx' (needs onnx, onnxscript and onnxruntime) or 'torch.export'.
        input_size: Channels, height and width; the model's own if None.

    Returns:
        The path.

    Raises:
        TypeError: `num_members` is not an integer, or `model` is no hierarchical ensemble, or an optimised one.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        RuntimeError: The program's logits differ from the model's; no file is left then.
    """
    check_ready(check_ensemble(model))
    if format not in FORMATS:
        raise ValueError(f'format must be one of {", ".join(FORMATS)}, got {format!r}.')
    input_size = resolve_input_size(model, input_size)
    path = Path(path)
    prefix = model.extract(num_members).cpu().float()
    prefix = folded(prefix)
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch's exporter warns of itself.
        warnings.simplefilter('ignore', FutureWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        expected = copy.deepcopy(model).cpu().float()(images, num_members)
        program = torch.export.export(prefix, (images,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))

        def save(temporary: Path) -> None:
            if format == 'onnx':
                onnx_program = torch.onnx.export(
                    program, input_names=['images'], output_names=['logits'], dynamo=True, verbose=False)
                onnx_program.save(temporary, external_data=False)
            else:
                torch.export.save(program, temporary)
            for batch in (images, images[:1]):
                logits = (_onnx_logits if format == 'onnx' else _export_logits)(temporary, batch)
                error = ((logits - expected[:len(batch)]).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
                if not error <= TOLERANCE:
                    raise RuntimeError(
                        f'The {format} program of {num_members} members differs from the model by {error:.2e} of the '
                        f'largest logit, more than {TOLERANCE:.0e}.')

        write_file(path, save)
    return path
