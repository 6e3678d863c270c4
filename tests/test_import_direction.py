"""The package's parts, that is its folders and the modules beside them, import one another in one direction."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tgpo_lab"


def run_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Relative imports, in functions too, without those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        yield from run_imports(node)


def imported_parts(path: tuple[str, ...], source: str) -> set[str]:
    """The other parts that the module at this path imports."""
    parts = set()
    for node in run_imports(ast.parse(source)):
        folder = path[: len(path) - node.level]
        parts |= {folder[0]} if folder else {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return parts - {path[0]}


def test_parts_import_in_one_direction():
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE).with_suffix("").parts
        if path == ("__init__",):
            continue  # it only names the homes of public names, each imported when it is asked for
        graph.setdefault(path[0], set()).update(imported_parts(path, file.read_text(encoding="utf-8")))
    assert len(graph) > 20
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"These parts of tgpo_lab import each other in a circle: {' ← '.join(error.args[1])}.")
    assert order.index("losses") < order.index("methods") < order.index("training") < order.index("cli")


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        (("batch",), "from .losses import token_logprobs", {"losses"}),
        (("batch",), "from . import losses, guidance", {"losses", "guidance"}),
        (("methods", "tgpo"), "from ..guidance import gate", {"guidance"}),
        (("methods", "tgpo"), "from .base import Term", set()),
        (("methods", "__init__"), "from .base import Term", set()),
        (("integrations", "trl", "trainer"), "from ...models.pairs import Pair", {"models"}),
        (("integrations", "trl", "trainer"), "from ..trl import version", set()),
        (("batch",), "def f():\n    from .losses import x", {"losses"}),
        (("batch",), "if TYPE_CHECKING:\n    from .losses import x", set()),
        (("batch",), "import torch\nfrom torch import nn", set()),
    ],
)
def test_imported_parts(path, line, expected):
    assert imported_parts(path, line) == expected
