"""The model card of a published ensemble: made from what was measured, renewed without losing what its owner wrote."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..tree import prefixes

__all__ = ['merge_cards', 'render_card', 'renew_card']

# Between these two comments of the template stands the part that is generated.
_GENERATED = re.compile(r'<!-- timm-hne: begin\b.*?-->.*?<!-- timm-hne: end\b.*?-->', re.DOTALL)
_UNTOUCHED = re.compile(r'(# \S+)?')  # what the template has besides: the name
_METADATA = re.compile(r'\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)', re.DOTALL)
_OWN_METADATA = ('library_name', 'pipeline_tag', 'model-index')  # the rest belongs to the owner, once it is there

# Ids on the Hub of the data sets that `timm-hne eval` knows by a shorter name.
_HUB_IDS = {
    'cifar10': 'uoft-cs/cifar10',
    'cifar100': 'uoft-cs/cifar100',
    'tiny-imagenet': 'zh-plus/tiny-imagenet',
    'imagenet': 'ILSVRC/imagenet-1k',
}


def render_card(
        config: Mapping[str, Any],
        source: str,
        results: Mapping[str, Any],
        license: str | None = None,
        base_model: str | None = None,
        datasets: Sequence[str] | None = None,
        present: str | None = None,
) -> str:
    """Return the model card of a published model.

    Args:
        config: Its config.json.
        source: Name under which it is created, e.g. 'hf-hub:user/name'.
        results: Its evaluation.json.
        license: Id of its license on the Hub, e.g. 'mit'; that of `present`, or else of the config, if None.
        base_model: Id on the Hub of the model that it was made from; that of `present` if None.
        datasets: Ids on the Hub of the data that it was trained on; those of `present` if None, or else that of the
            data in `results` if it is known.
        present: The card that is there already. What its owner wrote stays.

    Raises:
        ValueError: `present` has metadata that cannot be read.
    """
    cfg = config['pretrained_cfg']
    nodes = config['model_args']['nodes']
    repo_id, _, revision = source.removeprefix('hf-hub:').partition('@')
    name = repo_id.split('/')[-1]
    url = None
    if source.startswith('hf-hub:'):
        url = f'https://huggingface.co/{repo_id}/blob/{revision or "main"}/evaluation.json'
    known = _HUB_IDS.get(results['data'])
    rows = [row for row in results['members'] if row['num_members'] in prefixes(nodes[-1])]
    accuracies = ('top1', 'top5') if config['num_classes'] > 5 else ('top1',)
    evaluation = [
        EvalResult(
            task_type='image-classification',
            dataset_type=datasets[0] if datasets else known or results['data'],
            dataset_name=results['data'],
            dataset_split=results['split'],
            metric_type='accuracy',
            metric_name=f'Top-{key[3:]} accuracy of {row["num_members"]} member{"s" * (row["num_members"] > 1)}',
            metric_value=round(row[key], 2),
            source_name=url and 'evaluation.json',
            source_url=url,
        )
        for row in rows for key in accuracies
    ]
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license or cfg.get('license'),
        base_model=base_model,
        datasets=list(datasets) if datasets else [known] if known else None,
        metrics=['accuracy'],
        tags=['image-classification', 'timm', 'ensemble', 'adaptive-inference'],
        model_name=name,
        eval_results=evaluation,
    )
    card = ModelCard.from_template(
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
        objectives=_objectives(results),
    )
    rendered = _join(card.data.to_dict(), card.text)
    if present is None:
        return rendered
    given = {'license': license, 'base_model': base_model, 'datasets': datasets and list(datasets)}
    return renew_card(present, rendered, [key for key, value in given.items() if value])


def _objectives(results: dict[str, Any]) -> list[str]:
    """Return the objectives of a training, in the order of the phases in which they are first met."""
    recipe = results.get('recipe') or {}
    phases = recipe.get('phases') or [{'objective': results.get('objective')}]
    return list(filter(None, dict.fromkeys(phase.get('objective', recipe.get('objective')) for phase in phases)))


def renew_card(present: str, rendered: str, given: Sequence[str] = ()) -> str:
    """Return a card that its owner may have edited, with its generated part and the metadata of the results renewed.

    Args:
        present: The card that is there. Without a generated part, it gets one at its end.
        rendered: The new card.
        given: Names of metadata that the owner states now, and which are taken from `rendered` therefore.

    Raises:
        ValueError: `present` has metadata that cannot be read.
    """
    metadata, text = _split(present)
    new_metadata, new_text = _split(rendered)
    generated = _GENERATED.search(new_text)[0]
    if _GENERATED.search(text):
        text = _GENERATED.sub(lambda found: generated, text, count=1)
    else:
        text = f'{text.rstrip()}\n\n{generated}\n' if text.strip() else new_text
    renewed = {key: new_metadata[key] for key in (*_OWN_METADATA, *given)}
    added = {key: value for key, value in new_metadata.items() if key not in metadata}
    return _join({**metadata, **added, **renewed}, text)


def merge_cards(there: str, here: str, given: Sequence[str] = ()) -> str:
    """Return the new card of a folder with what its owner wrote into it or the one on the Hub, whose metadata prevail.

    Args:
        there: The card on the Hub.
        here: The card of the folder, whose generated part is new.
        given: As for `renew_card`.

    Raises:
        ValueError: Text was written into both, and differs. The metadata of `there` cannot be read.
    """
    (metadata, other), (_, text) = _split(there), _split(here)
    others, written = (_GENERATED.sub('', part).replace('\r\n', '\n').strip() for part in (other, text))
    if not _UNTOUCHED.fullmatch(written) and written != others:
        if not _UNTOUCHED.fullmatch(others):
            raise ValueError(
                'README.md was edited in the folder and on the Hub. Write all that shall stay into the one on the Hub, '
                'and delete the one in the folder.')
        there = _join(metadata, text)
    return renew_card(there, here, given)


def is_generated(text: str) -> bool:
    """Whether a card says which part of it is generated."""
    return bool(_GENERATED.search(text))


def _split(card: str) -> tuple[dict[str, Any], str]:
    match = _METADATA.match(card)
    if not match:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f'The metadata at the top of README.md cannot be read, mend them first: {error}') from error
    if not isinstance(metadata, dict):
        raise ValueError(f'The metadata at the top of README.md must be names and values, got {match[1]!r:.200}.')
    return metadata, card[match.end():]


def _join(metadata: Mapping[str, Any], text: str) -> str:
    front = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    return f'---\n{front}---\n{text.rstrip()}\n'
