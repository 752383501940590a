"""The folder of a published ensemble: what timm needs to build it, what was measured of it, and the digests of all."""
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf

from ..evaluation.plots import plot_accuracy
from ..files import write_text
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import CONFIG_NAME, DIGESTS_NAME, RESULTS_NAME, WEIGHTS_NAME, digest, read_digests, state_digest
from .card import is_generated, render_card

__all__ = ['write_folder']

CARD_NAME = 'README.md'
RECIPE_NAME = 'recipe.yaml'
PLOT_NAME = 'accuracy.png'
DTYPES = {'float16': torch.float16, 'float32': torch.float32}
COLUMNS = ('num_members', 'top1', 'top5', 'macs', 'logit_std', 'nll', 'ece')
_TEMPORARY = '.timm_hne-'  # begins the name of the folder that is written first
TOLERANCE = 1e-4  # of logits, relative to the largest: above rounding, below what a changed layer makes of them


def write_folder(
        model: HierarchicalEnsemble,
        folder: str | os.PathLike,
        source: str,
        results: Mapping[str, Any],
        recipe: Mapping[str, Any],
        dtype: str = 'float16',
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        license: str | None = None,
        base_model: str | None = None,
        datasets: Sequence[str] | None = None,
) -> list[str]:
    """Write the files of a repository: weights, configuration, card, evaluation, recipe and their digests.

    The folder is written only after timm has built the model from it and got the same logits. If it has a card already,
    what its owner wrote there stays.

    Args:
        model: A trained model, made by `timm.create_model`.
        folder: Folder to write into.
        source: Name under which the published model is created, e.g. 'hf-hub:user/name'.
        results: What `timm-hne eval` measured.
        recipe: How the model was trained.
        dtype: 'float16' or 'float32', the data type of the stored weights.
        label_names: Names of the classes; if None, those of the repository or folder that the model comes from.
        data_config: How images were prepared, as timm's `resolve_data_config` takes it; as in the model's cfg if None.
            Their size is that of the results, if these say it.
        license: Id of the license on the Hub, e.g. 'mit'; the one that the card or the architecture has if None.
        base_model: Id on the Hub of the model that this one was made from.
        datasets: Ids on the Hub of the data that the model was trained on.

    Returns:
        The names of the files.

    Raises:
        TypeError: `model` is not a hierarchical ensemble.
        ValueError: An argument is not what it must be, the results are of other weights, the weights are not finite in
            `dtype`, or timm would build another model from the folder.
        OSError: A file cannot be written.
    """
    label_names = _check_arguments(model, dtype, label_names, base_model, datasets)
    if not recipe or not isinstance(recipe, Mapping):
        raise ValueError(f'recipe must say how the model was trained, as names and values, got {recipe!r:.200}.')
    try:
        recipe = yaml.safe_dump(dict(recipe), sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f'recipe must hold plain values only: {error}') from error
    rows = _check_results(results, model)
    if 'input_size' in results:  # what is published is what was measured
        data_config = {**(data_config or {}), 'img_size': None, 'input_size': tuple(results['input_size'])}
    # safetensors stores no tensors in the order of channels_last.
    stored = copy.deepcopy(model).to('cpu', DTYPES[dtype], memory_format=torch.contiguous_format)
    bad = [name for name, tensor in stored.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f'The weights are not finite in {dtype}: {", ".join(bad[:3])} ({len(bad)} in all).')
    folder = Path(folder)
    for left in folder.glob(f'{_TEMPORARY}*'):  # of a run that was killed
        shutil.rmtree(left)
    if folder.exists() and any(folder.iterdir()) and not (folder / DIGESTS_NAME).exists():
        raise ValueError(f'folder must be new or one that was written before, but {folder} holds something else.')

    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the folder itself if it is there: it may be a link, or a file system of its own.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder if folder.exists() else folder.parent) as temporary:
        new = Path(temporary)
        with _writing(folder / WEIGHTS_NAME):
            save_for_hf(
                stored,
                new,
                dict(label_names=list(label_names)) if label_names else None,
                model_args=dict(nodes=list(model.nodes)),
                safe_serialization=True,
                data_config=data_config,
            )
        config = json.loads((new / CONFIG_NAME).read_text())
        # Chosen by who loads: the first, out of range for a prefix; the next five concern weights that are replaced.
        # The number of classes stands in `config` itself, whence transformers takes it and would pass it twice.
        for key in ('num_members', 'init', 'noise', 'seed', 'grow_noise', 'grow_seed', 'num_classes'):
            config['model_args'].pop(key, None)
        config['model_args'] = dict(sorted(config['model_args'].items()))
        config['dtype'] = 'float32'  # for transformers, which would else compute in the type that is stored
        for key in ('tag', 'label_names'):  # of the packaged weights of this architecture
            config['pretrained_cfg'].pop(key, None)
        if license:
            config['pretrained_cfg']['license'] = license
        (new / WEIGHTS_NAME).chmod((new / CONFIG_NAME).stat().st_mode)  # safetensors lets only the owner read
        card = render_card(config, source, results, license, base_model, datasets, present_card(folder))
        texts = {
            CONFIG_NAME: json.dumps(config, indent=2) + '\n',
            RESULTS_NAME: json.dumps(results, indent=2) + '\n',
            RECIPE_NAME: recipe,
            CARD_NAME: card,
        }
        for name, text in texts.items():
            with _writing(folder / name):
                (new / name).write_text(text, encoding='utf-8')
        with _writing(folder / PLOT_NAME):
            plot_accuracy(rows, new / PLOT_NAME)
        write_digests(new, [*texts, PLOT_NAME, WEIGHTS_NAME])
        with torch.device('cpu'):  # where `stored` is
            _check_loads(new, stored)
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in new.iterdir() if path.name != DIGESTS_NAME)
        for name in (DIGESTS_NAME, *names):  # what is interrupted fails its digests, and can be written again
            os.replace(new / name, folder / name)
    return [*names, DIGESTS_NAME]


def write_digests(folder: Path, names: Sequence[str]) -> None:
    """Write the digests of files of a folder."""
    lines = [f'{digest((folder / name).read_bytes())}  {name}\n' for name in sorted(names)]
    with _writing(folder / DIGESTS_NAME):
        write_text(folder / DIGESTS_NAME, ''.join(lines))


def card_digests(folder: Path) -> tuple[str | None, str | None]:
    """Return the digest of the card of a folder, and the one that was recorded; None where there is none."""
    card, record = folder / CARD_NAME, folder / DIGESTS_NAME
    return (
        digest(card.read_bytes()) if card.exists() else None,
        read_digests(record).get(CARD_NAME) if record.exists() else None,
    )


def present_card(folder: Path) -> str | None:
    """Return the card of a folder or of a copy of a repository, if it has one that its owner may have edited.

    The cards of version 0.1 do not say which part of them is generated. One that still has its recorded digest is
    generated as a whole.
    """
    found, recorded = card_digests(folder)
    if found is None:
        return None
    text = (folder / CARD_NAME).read_bytes().decode('utf-8', errors='replace')
    return None if found == recorded and not is_generated(text) else text


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written; its true name, not the temporary one."""
    try:
        yield
    except (OSError, OverflowError, SafetensorError) as error:
        raise OSError(f'{path} cannot be written: {error}') from error


# Checks


def _check_arguments(
        model: HierarchicalEnsemble,
        dtype: str,
        label_names: Sequence[str] | None,
        base_model: str | None,
        datasets: Sequence[str] | None,
) -> Sequence[str] | None:
    """Check what does not need the files, and return the names of the classes."""
    cfg = getattr(check_ensemble(model), 'pretrained_cfg', None)
    if cfg is None:
        raise TypeError(f'model must be made by timm.create_model, got a {type(model).__name__} that was not.')
    if model.ensemble_size != model.nodes[-1]:
        raise ValueError(
            f'model must fill its tree, but it has {model.ensemble_size} members in nodes={model.nodes}, as '
            f'extract({model.ensemble_size}) leaves them: extract a number of members whose tree is full.')
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {sorted(DTYPES)}, got {dtype!r}.')
    if label_names is None and cfg.get('source') and cfg.get('num_classes') == model.num_classes:
        label_names = cfg.get('label_names')
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'label_names must have {model.num_classes} entries, got {len(label_names)}.')
    if isinstance(datasets, str):
        raise ValueError(f'datasets must be a list of ids on the Hub, got {datasets!r}.')
    for name, ids in ('datasets', datasets or ()), ('base_model', [base_model] if base_model else ()):
        for repo_id in ids:
            try:
                validate_repo_id(repo_id)
            except ValueError as error:
                raise ValueError(f"{name} must be ids on the Hub, such as 'user/name', got {repo_id!r}.") from error
    return label_names


def _check_results(results: Mapping[str, Any], model: HierarchicalEnsemble) -> list[Mapping[str, Any]]:
    """Return the row of every number of members."""
    rows = results.get('members') if isinstance(results, Mapping) else None
    if not rows or not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"results must be what `timm-hne eval` wrote, with 'members', got {results!r:.200}.")
    for row in rows:
        wrong = {key: row.get(key) for key in COLUMNS if not _is_finite(row.get(key))}
        if wrong:
            raise ValueError(f'results must have a number for each of {COLUMNS}, got {wrong}.')
    stated = {key: results.get(key) for key in ('model', 'nodes', 'data', 'split', 'num_images')}
    expected = {**stated, 'model': model.pretrained_cfg['architecture'], 'nodes': list(model.nodes)}
    counts = [row['num_members'] for row in rows]
    if stated != expected or None in stated.values() or counts != list(range(1, model.ensemble_size + 1)):
        raise ValueError(
            f'results must be those of 1 to {model.ensemble_size} members of {expected}, got {counts} of {stated}.')
    expected, found = state_digest(model.state_dict()), results.get('weights_sha256')
    if found != expected:
        raise ValueError(
            f'results must be those of these weights, with weights_sha256 {expected}, but theirs is {found}. Measure '
            'the model again: `timm-hne eval --checkpoint CHECKPOINT ... --output evaluation.json`.')
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@torch.inference_mode()
def _check_loads(folder: Path, stored: HierarchicalEnsemble) -> None:
    """Check that timm builds the model from a folder, and that it has the same logits."""
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as error:  # timm's, ours or that of a constructor
        raise ValueError(f'model cannot be published, timm cannot build it from its config.json: {error}') from error
    size = loaded.pretrained_cfg['input_size']
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    expected = stored.float().eval()(image, stored.ensemble_size)
    error = (loaded(image) - expected).abs().max().item()
    if not error <= TOLERANCE * expected.abs().max().item():
        raise ValueError(
            f'model cannot be published, what timm builds from its config.json and weights has logits that differ by '
            f'{error:.3g}. Has a layer been changed since timm made the model?')
