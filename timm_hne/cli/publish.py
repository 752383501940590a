"""`timm-hne publish`: a trained checkpoint to the Hugging Face Hub."""
import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..hub.folder import DTYPES, RECIPE_NAME, RESULTS_NAME
from ..hub.publishing import publish
from ..models.create import create_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import DIGESTS_NAME, digest, read_digests, state_digest
from ..training.checkpoint import RunCheckpoint
from ..training.recipe import read_recipe, recipe_of
from .arguments import add_model_kwargs, model_kwargs


def _read_run(path: Path, name: str | None, **kwargs) -> tuple[HierarchicalEnsemble, RunCheckpoint]:
    """Return the model of a checkpoint or of a published folder, and what is known of how it was trained.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, its training is unfinished, or it holds no model of this name. The path is a
            folder, but arguments are given.
    """
    if path.is_dir():
        if name is not None or kwargs:
            raise ValueError(f'--model and --model-kwargs are not for a folder, its config.json has them: {path}.')
        return create_ensemble(f'local-dir:{path}', pretrained=True), RunCheckpoint(path)
    checkpoint = RunCheckpoint.read(path)
    last = path.with_name('last.pth.tar')
    newest = RunCheckpoint.read(last) if last.exists() else checkpoint
    if not newest.is_finished:
        raise ValueError(
            f'checkpoint {path} is unfinished: {newest.epoch + 1} of {newest.epochs_planned} epochs are done.')
    return checkpoint.create_model(name, **kwargs), checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne publish`."""
    parser.add_argument('checkpoint', help='checkpoint of a training run, safetensors file, or published folder')
    parser.add_argument(
        '--repo-id', required=True, metavar='USER/NAME', help='repository on the Hub; yours if USER/ is left out')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', default='main', help='branch to commit to (default: %(default)s)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--commit-message', metavar='TEXT', help='title of the commit (default: Publish NAME)')
    parser.add_argument('--dry-run', action='store_true', help='write the folder, upload nothing')
    parser.add_argument('--folder', help="folder to write (default: the repository's name)")
    parser.add_argument('--dtype', choices=sorted(DTYPES), default='float16', help='default: %(default)s')
    parser.add_argument('--model', help='architecture, if the checkpoint does not say')
    add_model_kwargs(parser)
    parser.add_argument(
        '--results', metavar='FILE', help=f'output of `timm-hne eval` (default: {RESULTS_NAME} beside the checkpoint)')
    parser.add_argument(
        '--recipe', metavar='FILE',
        help=f'YAML file (default: {RECIPE_NAME} beside the checkpoint, else what the checkpoint says)')
    parser.add_argument(
        '--label-names', nargs='+', metavar='NAME',
        help='names of the classes, in order (default: those of the training data)')
    parser.add_argument(
        '--license', metavar='ID', help="the Hub's id of the license (default: that of the card, else apache-2.0)")
    parser.add_argument('--base-model', metavar='USER/NAME', help='model on the Hub that this one was made from')
    parser.add_argument(
        '--datasets', nargs='+', metavar='ID',
        help='data sets on the Hub that it was trained on (default: known for CIFAR-10, CIFAR-100, Tiny-ImageNet and '
             'ImageNet)')


def run(args: argparse.Namespace) -> None:
    """Publish a checkpoint.

    Raises:
        OSError: A file cannot be read or written, or the Hub refuses or is out of reach.
        ValueError: Model, results and recipe do not fit each other, or an argument is wrong.
    """
    path = Path(args.checkpoint)
    model, checkpoint = _read_run(path, args.model, **model_kwargs(args))
    folder = path if path.is_dir() else path.parent
    recipe = _read(args.recipe, folder / RECIPE_NAME)
    if recipe is None and args.recipe is None:
        recipe = checkpoint.recipe
    if isinstance(recipe, dict) and 'base' in recipe:
        recipe = read_recipe(args.recipe or str(folder / RECIPE_NAME))
    recipe = recipe_of(recipe) if isinstance(recipe, dict) else recipe
    if not path.is_dir() and isinstance(recipe, dict):
        # Weights alone do not say how their images were prepared, but their recipe may. A folder says it itself.
        checkpoint = replace(checkpoint, args={**recipe, **checkpoint.args})
    results = _read(args.results, folder / RESULTS_NAME)
    if results is None and args.results is None:
        which = f'local-dir:{path}' if path.is_dir() else f'--checkpoint {path}'
        raise ValueError(
            f'results are missing: there is no {folder / RESULTS_NAME}, and `--results` names no other file. Measure '
            f'the model, then publish again:\n    timm-hne eval {which} --output {folder / RESULTS_NAME}')
    if path.is_dir() and args.results is None:
        _tie(results, folder, model)
    where = publish(
        model,
        args.repo_id,
        results,
        recipe,
        folder=args.folder,
        dtype=args.dtype,
        label_names=args.label_names or checkpoint.args.get('label_names'),
        data_config=checkpoint.data_config,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
        license=args.license,
        base_model=args.base_model,
        datasets=args.datasets,
        commit_message=args.commit_message,
        create_pr=args.create_pr,
    )
    print(f'Wrote {where}' if args.dry_run else f'Published and verified: {where}')


def _tie(results: Any, folder: Path, model: HierarchicalEnsemble) -> None:
    """Let the results of a folder say which weights they are of, if the digests of the folder do.

    Those of version 0.1 do not say it themselves.
    """
    record, path = folder / DIGESTS_NAME, folder / RESULTS_NAME
    recorded = record.exists() and read_digests(record).get(RESULTS_NAME) == digest(path.read_bytes())
    if isinstance(results, dict) and recorded:
        results.setdefault('weights_sha256', state_digest(model.state_dict()))


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
