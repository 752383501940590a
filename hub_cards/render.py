"""Renders the model card of every published tag from its measured results.

    python hub_cards/render.py            # after a change of results, recipe or template
    python hub_cards/render.py --check    # fails if a card differs from its data

Every folder beside this file is named after a tag, 'architecture.tag', and holds what `timm-hne eval` measured
(evaluation.json) and how the weights were trained (recipe.yaml). The card (README.md) and its plot (accuracy.png) are
rendered from them and from the template timm_hne/hub/model_card.md, as `timm-hne publish` does. What the package needs
of the measurements goes with the weights: timm_hne/weights/TAG.json.
"""
import argparse
import json
import shutil
import tempfile
from pathlib import Path

import timm
import yaml

from timm_hne import pretrained
from timm_hne.files import write_text
from timm_hne.hub.folder import CARD_NAME, PLOT_NAME, RECIPE_NAME, RESULTS_NAME, write_folder

ROOT = Path(__file__).parent
PACKAGED_KEYS = ('num_members', 'top1', 'temperature', 'usual_confidence')


def render(folder: Path, check: bool = False) -> None:
    """Render the card in a folder, or compare it with its data.

    Args:
        folder: Folder that is named after a tag.
        check: Compare only.

    Raises:
        ValueError: The card, or what the package has of the results, differs from the data.
    """
    results = json.loads((folder / RESULTS_NAME).read_text(encoding='utf-8'))
    recipe = yaml.safe_load((folder / RECIPE_NAME).read_text(encoding='utf-8'))
    short = {
        'weights_sha256': results['weights_sha256'],
        'members': [{key: row[key] for key in PACKAGED_KEYS if key in row} for row in results['members']],
    }
    packaged, text = pretrained.PACKAGED / f'{folder.name}.json', json.dumps(short, indent=1) + '\n'
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary, folder.name)
        model = timm.create_model(folder.name, pretrained=True)
        labels = model.pretrained_cfg.get('label_names')
        write_folder(model, new, folder.name, results, recipe, label_names=labels)
        if not check:
            write_text(packaged, text)
            for name in (CARD_NAME, PLOT_NAME):
                shutil.move(new / name, folder / name)
        elif (new / CARD_NAME).read_text() != (folder / CARD_NAME).read_text():
            raise ValueError(f'{folder / CARD_NAME} differs from its data: run python hub_cards/render.py.')
        elif packaged.read_text() != text:
            raise ValueError(f'{packaged} differs from its data: run python hub_cards/render.py.')


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    """Render or check all cards below `root`."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='compare the cards with their data')
    args = parser.parse_args(argv)
    folders = sorted(path.parent for path in root.glob(f'*/{RESULTS_NAME}'))
    for folder in folders:
        render(folder, args.check)
        print(f'{folder.name}: {"unchanged" if args.check else "rendered"}')


if __name__ == '__main__':
    main()
