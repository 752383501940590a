"""The documentation is true: commands are those of CI, links lead somewhere, outputs are what is printed."""
import math
import re
import shlex
from pathlib import Path

import pytest
from test_inference import images, small_resnet

import timm_hne
from timm_hne.__main__ import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('hub_cards/**/*.md')])


def test_ci_runs_the_second_command_of_the_readme():
    commands = re.findall(r'^python3 -m venv .*$', (ROOT / 'README.md').read_text(), re.M)
    assert len(commands) == 2
    assert commands[0].endswith('timm-hne demo')
    assert commands[1] in (ROOT / '.ci' / 'run').read_text().splitlines()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', text):
        if '://' not in target:
            assert (page.parent / target).exists(), f'{page.name} links to {target}'


def test_the_code_on_uncertainty_runs():
    section = (ROOT / 'docs' / 'inference.md').read_text().split('\n## Uncertainty\n')[1]
    code = re.search(r'```python\n(.*?)```', section, re.S).group(1)
    names = {'timm_hne': timm_hne, 'model': small_resnet(), 'x': images(2)}
    exec(code, names)
    for name, highest in (('total', math.log(10)), ('disagreement', math.log(4)), ('dissent', 0.75)):
        assert names[name].shape == (2,) and names[name].min() >= 0 and names[name].max() <= highest + 1e-6


def test_printed_costs_are_what_the_command_prints(capsys):
    blocks = re.findall(r'```\n\$ timm-hne (cost .*?)\n(.*?)```', (ROOT / 'docs' / 'tree.md').read_text(), re.S)
    assert blocks
    for command, output in blocks:
        main(shlex.split(command))
        assert capsys.readouterr().out == output
