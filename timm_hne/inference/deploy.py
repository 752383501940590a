"""A folder that `timm_hne.runtime` runs without PyTorch: the steps, one file of weights, and a manifest."""
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config

from ..evaluation.cost import member_macs, resolve_input_size
from ..files import write_text
from ..models.anytime import check_ready, validate_schedule
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..runtime import FORMAT, MANIFEST, load, read_manifest
from ..version import __version__
from .early_exit import ExitPoint, validate_criterion
from .folding import folded
from .latency import LatencyTable
from .programs import TOLERANCE, Program, ProgramStore

WEIGHTS = 'weights.bin'
_UNFINISHED = f'{MANIFEST}.tmp'  # marks a folder that is being written

# Tensors of fewer bytes stay in their program.
_INLINE_BYTES = 256


def export_folder(
        model: HierarchicalEnsemble,
        folder: str | Path,
        input_size: Sequence[int] | None = None,
        schedule: Sequence[int] | None = None,
        data_config: Mapping[str, Any] | None = None,
        exit_point: ExitPoint | None = None,
        criterion: str = 'confidence',
        latency: LatencyTable | None = None,
) -> dict[str, Any]:
    """Write a folder that `timm_hne.runtime.load` loads, and check it against the model.

    Args:
        model: Any hierarchical ensemble in evaluation mode, but not an optimised one. It is computed in float32.
        folder: Folder to write: a new one, or one that was written by this function before.
        input_size: Channels, height and width of the images; the model's own if None. Where the network and the
            exporter allow it, the programs take other heights and widths too; the manifest says so as `any_size`.
        schedule: Increasing numbers of members after which there is a result; 1, 2, 4, ..., N if None.
        data_config: How images are prepared, in timm's names ('mean', 'std', ...), where it is not the model's own.
        exit_point: Recommended threshold of early exit, from `calibrate_threshold`, to be recorded.
        criterion: Criterion that it is of.
        latency: Measured latencies, to be recorded.

    Returns:
        The manifest.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        FileExistsError: The folder holds something else.
        RuntimeError: A step cannot be exported, or the folder's results differ from the model's; it is not written.
    """
    check_ready(check_ensemble(model))
    input_size = resolve_input_size(model, input_size)
    schedule = validate_schedule(schedule, model.ensemble_size)
    if schedule[-1] != model.ensemble_size:
        raise ValueError(
            f'schedule must end with all {model.ensemble_size} members, got {schedule}; '
            'export model.extract(n) for fewer.')
    if exit_point is not None:
        validate_criterion(criterion, exit_point.threshold, model.num_classes)
    macs = member_macs(model, tuple(input_size[1:]))
    if latency is not None and any(count != macs[n] for n, count in latency.macs.items() if n in macs):
        raise ValueError(
            f'latency must be of this model and image size, got the table of {latency.model} with images of '
            f'{latency.input_size}, whose numbers of members cost {latency.macs} MACs.')
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_ours(folder))):
        raise FileExistsError(f'folder must be new, or hold an exported model: {folder} holds something else.')
    with torch.inference_mode(False):
        plain = folded(model).cpu().float()
    image = _image(model, input_size, data_config)
    store = ProgramStore(plain)
    programs = [
        (start, stop, store.get(start, stop, tuple(input_size[1:]))) for start, stop in zip((0, *schedule), schedule)]
    manifest = {
        'format': FORMAT,
        'timm_hne': __version__,
        **_describe(model),
        'image': {**image, 'any_size': all(program.image_size is None for *_, program in programs)},
        'macs': {str(n): count for n, count in macs.items()},
    }
    if exit_point is not None:
        manifest['exit'] = {'criterion': criterion, **vars(exit_point)}
    if latency is not None:
        manifest['latency'] = vars(latency)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as name:
        temporary = Path(name)
        manifest['steps'] = _write_programs(temporary, programs)
        manifest['files'] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(temporary.iterdir())}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + '\n')
        _compare(temporary, model, input_size, manifest['image']['any_size'])
        folder.mkdir(exist_ok=True)
        (folder / _UNFINISHED).touch()
        # Without its manifest a folder is nothing; so it is never half the old one and half the new one.
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in [*folder.glob('step_*.onnx'), *folder.glob(WEIGHTS)]:
            path.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST):
            shutil.move(path, folder / path.name)
        (folder / _UNFINISHED).unlink()
    return manifest


def _is_ours(folder: Path) -> bool:
    if (folder / _UNFINISHED).exists():
        return True
    try:
        read_manifest(folder / MANIFEST)
    except (OSError, ValueError):  # also one of another program
        return False
    return True


def _describe(model: HierarchicalEnsemble) -> dict[str, Any]:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names = cfg.get('label_names') or None
    replaced = names is not None and len(names) != model.num_classes  # the classifier, which is another than the tag's
    return {
        'architecture': cfg.get('architecture') or type(model).__name__,
        'tag': None if replaced else cfg.get('tag') or None,
        'nodes': list(model.nodes),
        'ensemble_size': model.ensemble_size,
        'num_classes': model.num_classes,
        'label_names': None if replaced else names,
    }


def _image(model, input_size: Sequence[int], data_config: Mapping[str, Any] | None) -> dict[str, Any]:
    channels, height, width = input_size
    cfg = getattr(model, 'pretrained_cfg', None)
    known = _for_channels(data_config or {}, channels)
    if cfg:
        known = _for_channels(resolve_data_config({**known, 'in_chans': channels}, model=model), channels)
    image = {key: known[key] for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode') if key in known}
    image = {'mean': [0.] * channels, 'std': [1.] * channels, **image}
    return {'channels': channels, 'height': height, 'width': width, **image}


def _for_channels(data_config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return what is said of the preparation of images, with a mean and a deviation for every channel."""
    known = {key: value for key, value in data_config.items() if value is not None}
    for key in sorted(known.keys() & {'mean', 'std'}):
        if len(known[key]) == 1:  # for all, as timm has it
            known[key] = [*known[key]] * channels
        if len(known[key]) != channels:
            raise ValueError(f'{key} must have {channels} value(s), as the images have channels, got {known[key]}.')
    return known


def _write_programs(folder: Path, programs: Sequence[tuple[int, int, Program]]) -> list[dict[str, Any]]:
    """Write the programs, with their weights in one file beside them; return what the manifest says of them."""
    import onnx
    from onnx.external_data_helper import set_external_data

    steps, places = [], {}
    with open(folder / WEIGHTS, 'wb') as weights:
        for start, stop, program in programs:
            proto = onnx.load_from_string(program.data)
            for tensor in proto.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < _INLINE_BYTES:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in places:
                    weights.write(b'\0' * (-weights.tell() % 64))
                    places[key] = weights.tell(), len(data)
                    weights.write(data)
                tensor.raw_data = data
                set_external_data(tensor, WEIGHTS, *places[key])
                tensor.ClearField('raw_data')
            name = f'step_{start}_{stop}.onnx'
            (folder / name).write_bytes(proto.SerializeToString())
            steps.append({'start': start, 'stop': stop, 'file': name, **program.describe()})
    return steps


def _compare(folder: Path, model: HierarchicalEnsemble, input_size: Sequence[int], any_size: bool) -> None:
    runtime = load(folder)
    weight = next(model.parameters())
    channels, height, width = input_size
    step = max(model.reductions)
    for batch_size, size in ((3, (height, width)), (1, (height, width)), *([(2, (height + step, width))] * any_size)):
        x = torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(0))
        for n, found in zip(runtime.schedule, runtime.anytime(x.numpy())):
            with torch.no_grad():
                expected = model(x.to(weight.device, weight.dtype), num_members=n).float().cpu().numpy()
            error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
            tolerance = TOLERANCE if weight.dtype in (torch.float32, torch.float64) else 5e-2
            if not error <= tolerance:
                raise RuntimeError(
                    f'The exported programs of {n} members differ from the model by {error:.2e} of the largest logit, '
                    f'more than {tolerance:.0e}.')
