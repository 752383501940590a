"""Publishing a trained ensemble: a folder that timm reads, uploaded to the Hugging Face Hub as one commit."""
import argparse
import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf
from timm.utils import load_checkpoint_metadata

from .checkpoints import load_checkpoint, recipe_of
from .ensemble import HierarchicalEnsemble
from .evaluate import plot_accuracy
from .hub import CONFIG_NAME, DIGESTS_NAME, WEIGHTS_NAME, digest
from .tree import prefixes

__all__ = ['publish', 'render_card', 'write_folder']

CARD_NAME = 'README.md'
RESULTS_NAME = 'evaluation.json'
RECIPE_NAME = 'recipe.yaml'
PLOT_NAME = 'accuracy.png'
DTYPES = {'float16': torch.float16, 'float32': torch.float32}
# What a training run is told about its images, in timm's names.
DATA_KEYS = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
COLUMNS = ('num_members', 'top1', 'top5', 'macs', 'logit_std', 'nll', 'ece')


def publish(
        model: HierarchicalEnsemble,
        repo_id: str,
        results: Mapping[str, Any],
        recipe: Mapping[str, Any],
        folder: str | os.PathLike | None = None,
        dtype: str = 'float16',
        label_names: list[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        private: bool = False,
        revision: str = 'main',
        token: str | None = None,
        dry_run: bool = False,
) -> str:
    """Publish a model: write a folder, upload it as one commit, download it again and compare.

    Publishing the same thing twice makes no second commit.

    Args:
        model: A trained model, made by `timm.create_model`.
        repo_id: 'user/name' of the repository. It is made if it does not exist.
        results: What `timm-hne eval` measured.
        recipe: How the model was trained.
        folder: Folder to write; the repository's name, in the current directory, if None.
        dtype: 'float16' or 'float32', the data type of the stored weights.
        label_names: Names of the classes; if None, those of the repository or folder that the model comes from.
        data_config: How images were prepared, as timm's `resolve_data_config` takes it; as in the model's cfg if None.
        private: Make a new repository private.
        revision: Branch to commit to. It is made if it does not exist.
        token: Token of the Hub; the one of `hf auth login` or `HF_TOKEN` if None.
        dry_run: Write the folder only.

    Returns:
        The URL of the commit, or the path of the folder after a dry run.

    Raises:
        ValueError: An argument is not what it must be, the weights are not finite, the repository holds something else,
            or what was downloaded differs from what was uploaded.
        OSError: The Hub refuses, or is out of reach.
    """
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"repo_id must be 'user/name', got {repo_id!r}.")
    folder = Path(repo_id.split('/')[1] if folder is None else folder)
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision != 'main' else '')
    files = write_folder(model, folder, source, results, recipe, dtype, label_names, data_config)
    if dry_run:
        return str(folder)
    try:
        return _upload(folder, files, repo_id, private, revision, token)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:
        reason = '; '.join(str(reason) for reason in (error, error.__cause__) if reason)
        raise OSError(f'Publishing to {repo_id} failed, it can be tried again: {reason}') from error


def _upload(folder: Path, files: list[str], repo_id: str, private: bool, revision: str, token: str | None) -> str:
    api = HfApi(token=token, library_name='timm-hne')
    api.whoami()  # says clearly what is wrong with a token, before anything is made
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision != 'main':
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision)
    present = {file.rfilename for file in head.siblings} - {'.gitattributes', CARD_NAME}
    if present and DIGESTS_NAME not in present:
        raise ValueError(f'repo_id must be a new repository or one of an HNE, but {repo_id} holds {sorted(present)}.')
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, folder / name) for name in files],
        commit_message=f'Publish {repo_id.split("/")[1]}',
        revision=revision,
        parent_commit=head.sha,
    )
    with tempfile.TemporaryDirectory() as cache:
        for name in files:
            path = hf_hub_download(repo_id, name, revision=commit.oid, cache_dir=cache, token=token)
            if Path(path).read_bytes() != (folder / name).read_bytes():
                raise ValueError(f'{name} differs after a download from {commit.commit_url}, publish it again.')
        timm.create_model(f'local-dir:{Path(path).parent}', pretrained=True)
    return str(commit.commit_url)


# The folder


def write_folder(
        model: HierarchicalEnsemble,
        folder: str | os.PathLike,
        source: str,
        results: Mapping[str, Any],
        recipe: Mapping[str, Any],
        dtype: str = 'float16',
        label_names: list[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the files of a repository: weights, configuration, card, evaluation, recipe and their digests.

    Args:
        model: A trained model, made by `timm.create_model`.
        folder: Folder to write into.
        source: Name under which the published model is created, e.g. 'hf-hub:user/name'.
        results: What `timm-hne eval` measured.
        recipe: How the model was trained.
        dtype: 'float16' or 'float32', the data type of the stored weights.
        label_names: Names of the classes; if None, those of the repository or folder that the model comes from.
        data_config: How images were prepared, as timm's `resolve_data_config` takes it; as in the model's cfg if None.

    Returns:
        The names of the files.

    Raises:
        TypeError: `model` is not a hierarchical ensemble.
        ValueError: An argument is not what it must be, or the weights are not finite in `dtype`.
    """
    if not isinstance(model, HierarchicalEnsemble) or not hasattr(model, 'pretrained_cfg'):
        raise TypeError(f'model must be an hne_* model made by timm.create_model, got {type(model).__name__}.')
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {sorted(DTYPES)}, got {dtype!r}.')
    cfg = model.pretrained_cfg
    if label_names is None and cfg.get('source') and cfg.get('num_classes') == model.num_classes:
        label_names = cfg.get('label_names')
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'label_names must have {model.num_classes} entries, got {len(label_names)}.')
    if not recipe or not isinstance(recipe, Mapping):
        raise ValueError(f'recipe must say how the model was trained, as names and values, got {recipe!r:.200}.')
    try:
        recipe = yaml.safe_dump(dict(recipe), sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f'recipe must hold plain values only: {error}') from error
    rows = _check_results(results, model)
    model = copy.deepcopy(model).to('cpu', DTYPES[dtype])
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f'The weights are not finite in {dtype}: {", ".join(bad[:3])} and {len(bad) - 1} in all.')

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / DIGESTS_NAME).exists():
        raise ValueError(f'folder must be new or one that was written before, but {folder} holds something else.')
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary)
        model_config = dict(label_names=label_names) if label_names else None
        save_for_hf(
            model,
            new,
            model_config,
            model_args=dict(nodes=list(model.nodes)),
            safe_serialization=True,
            data_config=data_config,
        )
        config = json.loads((new / CONFIG_NAME).read_text())
        config['model_args'].pop('num_members', None)  # chosen by who loads, and out of range for a prefix
        config['model_args'] = dict(sorted(config['model_args'].items()))
        for key in ('tag', 'label_names'):  # of the packaged weights of this architecture
            config['pretrained_cfg'].pop(key, None)
        _write_json(new / CONFIG_NAME, config)
        (new / WEIGHTS_NAME).chmod((new / CONFIG_NAME).stat().st_mode)  # safetensors lets only the owner read
        _write_json(new / RESULTS_NAME, results)
        (new / RECIPE_NAME).write_text(recipe, encoding='utf-8')
        plot_accuracy(rows, new / PLOT_NAME)
        (new / CARD_NAME).write_text(render_card(config, source, results), encoding='utf-8')
        names = sorted(path.name for path in new.iterdir())
        (new / DIGESTS_NAME).write_text(''.join(f'{digest((new / name).read_bytes())}  {name}\n' for name in names))
        for name in (*names, DIGESTS_NAME):
            os.replace(new / name, folder / name)
    return [*names, DIGESTS_NAME]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')


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
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# The card


def render_card(config: Mapping[str, Any], source: str, results: Mapping[str, Any]) -> str:
    """Return the model card of a published model.

    Args:
        config: Its config.json.
        source: Name under which it is created, e.g. 'hf-hub:user/name'.
        results: Its evaluation.json.
    """
    cfg = config['pretrained_cfg']
    nodes = config['model_args']['nodes']
    name = source.partition('@')[0].split('/')[-1]
    rows = [row for row in results['members'] if row['num_members'] in prefixes(nodes[-1])]
    evaluation = [
        EvalResult(
            task_type='image-classification',
            dataset_type=results['data'],
            dataset_name=results['data'],
            dataset_split=results['split'],
            metric_type='accuracy',
            metric_name=f'Accuracy of {row["num_members"]} member{"s" * (row["num_members"] > 1)}',
            metric_value=round(row['top1'], 2),
        )
        for row in rows
    ]
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=cfg.get('license'),
        datasets=[results['data']],
        metrics=['accuracy'],
        tags=['image-classification', 'timm', 'ensemble', 'adaptive-inference'],
        model_name=name,
        eval_results=evaluation,
    )
    return str(ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name('model_card.md')),
        name=name,
        source=source,
        architecture=config['architecture'],
        num_classes=config['num_classes'],
        label_names=config.get('label_names'),
        input_size=cfg['input_size'],
        nodes=tuple(nodes),
        ensemble_size=nodes[-1],
        results=results,
        rows=rows,
    )) + '\n'


# The command


def _read_run(path: Path, name: str | None) -> tuple[HierarchicalEnsemble, dict[str, Any]]:
    """Return the model of a checkpoint or of a published folder, and how it was trained as far as the file says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, its training is unfinished, or it holds no model of this name.
    """
    if path.is_dir():
        return timm.create_model(f'local-dir:{path}', pretrained=True), {}
    model, config = load_checkpoint(path, name)
    last = path.with_name('last.pth.tar')
    newest = last if last.exists() else path
    if newest.suffix == '.safetensors':
        return model, config
    try:
        state = dict(load_checkpoint_metadata(str(newest)))
    except Exception as error:  # of many types, for a damaged file
        raise ValueError(f'checkpoint {newest} cannot be read: {error}') from error
    args = state.get('args') or {}
    planned = (args if isinstance(args, dict) else vars(args)).get('epochs') or 0
    if 'epoch' in state and state['epoch'] + 1 < planned:
        raise ValueError(f'checkpoint {path} is unfinished: {state["epoch"] + 1} of {planned} epochs are done.')
    return model, config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne publish`."""
    parser.add_argument('checkpoint', help='checkpoint of a training run, safetensors file, or published folder')
    parser.add_argument('--repo-id', required=True, metavar='USER/NAME', help='repository on the Hub')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', default='main', help='branch to commit to (default: %(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder, upload nothing')
    parser.add_argument('--folder', help="folder to write (default: the repository's name)")
    parser.add_argument('--dtype', choices=sorted(DTYPES), default='float16', help='default: %(default)s')
    parser.add_argument('--model', help='architecture, if the checkpoint does not say')
    parser.add_argument(
        '--results', metavar='FILE', help=f'output of `timm-hne eval` (default: {RESULTS_NAME} beside the checkpoint)')
    parser.add_argument(
        '--recipe', metavar='FILE',
        help=f'YAML file (default: {RECIPE_NAME} beside the checkpoint, else what the checkpoint says)')
    parser.add_argument(
        '--label-names', nargs='+', metavar='NAME',
        help='names of the classes, in order (default: those of the training data)')


def run(args: argparse.Namespace) -> None:
    """Publish a checkpoint."""
    path = Path(args.checkpoint)
    model, config = _read_run(path, args.model)
    folder = path if path.is_dir() else path.parent
    recipe = _read(args.recipe, folder / RECIPE_NAME)
    if recipe is None and args.recipe is None:
        recipe = recipe_of(config)
    where = publish(
        model,
        args.repo_id,
        _read(args.results, folder / RESULTS_NAME),
        recipe,
        folder=args.folder,
        dtype=args.dtype,
        label_names=args.label_names or config.get('label_names'),
        data_config={key: config[key] for key in DATA_KEYS if config.get(key) is not None},
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
    )
    print(f'Wrote {where}' if args.dry_run else f'Published and verified: {where}')


def _read(given: str | None, default: Path) -> Any:
    """Read the YAML or JSON file that was given, or the default one if there is one."""
    if given is None and not default.exists():
        return None
    path = Path(given or default)
    try:
        text = path.read_text(encoding='utf-8')
        # YAML would take the number 1e-05 of a JSON file for a text.
        return json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f'{path} is no YAML or JSON file: {error}') from error
