"""Draws which package of timm_hne imports which, from the code's own import statements.

    python docs/imports.py            # writes the drawing into docs/architecture.md
"""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'architecture.md'
BEGIN, END = '<!-- python docs/imports.py -->\n', '<!-- end -->'

# From the bottom to the top: each imports those before it only. 'basics' are the modules directly in timm_hne.
ORDER = ('basics', 'models', 'training', 'evaluation', 'inference', 'hub', 'serving', 'cli', 'timm_hne')


def read_imports() -> dict[str, set[str]]:
    """Return the modules of timm_hne that each of its modules imports."""
    paths = {}
    for path in sorted(ROOT.glob('timm_hne/**/*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        paths['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        package = name if path.name == '__init__.py' else name.rpartition('.')[0]
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            targets = []
            if isinstance(node, ast.ImportFrom):
                above = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
                base = '.'.join([*above, *([node.module] if node.module else [])])
                targets = [(f'{base}.{alias.name}', base) for alias in node.names]
            elif isinstance(node, ast.Import):
                targets = [(alias.name,) for alias in node.names]
            for candidates in targets:
                found.update([target for target in candidates if target in paths][:1])
        found.discard(name)
    return graph


def package_of(module: str) -> str:
    """Return the package of a module: a name in `ORDER`."""
    parts = module.split('.')
    if len(parts) > 1 and (ROOT / 'timm_hne' / parts[1]).is_dir():
        return parts[1]
    return 'timm_hne' if module in ('timm_hne', 'timm_hne.__main__') else 'basics'


def package_graph(imports: dict[str, set[str]]) -> dict[tuple[str, str], int]:
    """Return how many imports lead from one package to another."""
    counts: dict[tuple[str, str], int] = {}
    for module, targets in imports.items():
        for target in targets:
            edge = package_of(module), package_of(target)
            if edge[0] != edge[1]:
                counts[edge] = counts.get(edge, 0) + 1
    return counts


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        seen, left = set(), [*imports[module]]
        while left:
            target = left.pop()
            if target not in seen:
                seen.add(target)
                left += imports.get(target, ())
        reached[module] = seen
    circles = {
        tuple(sorted(other for other in seen if module in reached.get(other, ())))
        for module, seen in reached.items() if module in seen
    }
    return [list(circle) for circle in sorted(circles)]


def draw() -> str:
    """Return the packages and the number of imports between them as a Mermaid diagram."""
    imports = read_imports()
    counts = package_graph(imports)
    lines = ['```mermaid', 'graph TD']
    for package in reversed(ORDER):
        modules = sorted(
            name.rpartition('.')[2] for name in imports if package_of(name) == package and name.count('.') >= 1
            and (package in ('basics', 'timm_hne') or name.count('.') == 2))
        lines.append(f'    {package}["<b>{package}</b><br>{"<br>".join(modules)}"]')
    for (source, target), count in sorted(counts.items(), key=lambda item: [ORDER.index(name) for name in item[0]]):
        lines.append(f'    {source} -->|{count}| {target}')
    return '\n'.join([*lines, '```', ''])


def main() -> None:
    """Write the drawing into the page."""
    page = PAGE.read_text(encoding='utf-8')
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + draw() + END + rest.partition(END)[2], encoding='utf-8')


if __name__ == '__main__':
    main()
