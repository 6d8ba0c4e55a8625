"""The list of modules in the README: all of them, each below what it imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "twa_merge"


def listed() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("## Files")[2]
    return re.findall(r"^  (\w+)/?\s", section, re.M)


def imports(file: Path, level: int) -> Iterator[str]:
    """Modules beside the top of the library that a file imports, but for their types alone."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.ImportFrom) and node.level == level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from (name.partition(".")[0] for name in names)
            waiting.append(node)


def test_the_list_is_complete_and_in_order() -> None:
    modules = listed()
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert sorted(modules) == sorted(files | packages)
    for place, module in enumerate(modules):
        below = set(modules[place + 1 :])
        inside = [(LIBRARY / f"{module}.py", 1)] if module in files else []
        for file, level in inside or [(path, 2) for path in (LIBRARY / module).glob("*.py")]:
            assert not below & set(imports(file, level)), file
