"""The quickstart notebook runs, and its outputs are there. `python tests/test_notebook.py` runs it and keeps them."""
from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')

PATH = Path(__file__).parent.parent / 'docs' / 'quickstart.ipynb'


def execute(notebook):
    nbclient.NotebookClient(notebook, timeout=280, kernel_name='python3').execute()
    for cell in notebook.cells:
        cell.metadata = {}  # times
        if cell.cell_type == 'code':  # warnings are this machine's
            cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']


def printed(notebook):
    """The kinds of what the cells put out, and the lines of text of each."""
    cells = (cell for cell in notebook.cells if cell.cell_type == 'code')
    text = [
        ''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '') for o in cell.outputs) for cell in cells]
    return [part.count('\n') for part in text], text


def test_quickstart():
    notebook = nbformat.read(PATH, as_version=4)
    lines, text = printed(notebook)
    assert all(text), 'run python tests/test_notebook.py'
    execute(notebook)
    again, others = printed(notebook)
    assert again == lines
    for cell in (0, 6):  # what depends on no machine
        assert others[cell] == text[cell]
    assert [row[:22] for row in others[2].splitlines()] == [row[:22] for row in text[2].splitlines()]  # members, MACs


if __name__ == '__main__':
    made = nbformat.read(PATH, as_version=4)
    execute(made)
    nbformat.write(made, PATH)
