"""The documentation is true: commands are those of CI, links lead somewhere, outputs are what is printed."""
import re
import shlex
from pathlib import Path

import pytest

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


def test_printed_costs_are_what_the_command_prints(capsys):
    blocks = re.findall(r'```\n\$ timm-hne (cost .*?)\n(.*?)```', (ROOT / 'docs' / 'tree.md').read_text(), re.S)
    assert blocks
    for command, output in blocks:
        main(shlex.split(command))
        assert capsys.readouterr().out == output
