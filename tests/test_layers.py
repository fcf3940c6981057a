"""Imports inside `cmd_jax` point one way: down the list of layers, and never in a circle."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "cmd_jax"
# From the bottom up; a module imports from its own layer and from those above it in this list.
LAYERS = (
    ("__init__", "errors", "files", "html", "metrics", "normalization", "progress", "text"),
    ("method",),
    ("models",),
    ("config",),
    ("data",),
    ("training",),
    ("datasets",),
    ("weights",),
    ("inference",),
    ("labelling",),
    ("evaluation",),
    ("report",),
    ("api", "train_and_evaluate"),
    ("cli", "command", "main", "eval", "embed", "label", "convert", "prepare", "report.__main__"),
)
MODULES = {
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def layer(module: str) -> int:
    inside = module.removeprefix("cmd_jax").removeprefix(".") or "__init__"
    room = inside if inside == "report.__main__" else inside.split(".")[0]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def imports(module: str, inside_functions: bool = True) -> set[str]:
    """Modules of the package that a module imports."""
    tree = ast.parse(MODULES[module].read_text())
    nodes = ast.walk(tree) if inside_functions else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"cmd_jax"}))
def test_imports_point_down(module):
    assert not {name for name in imports(module) if layer(name) > layer(module)}


def test_no_import_circles():
    graph = {module: imports(module) - {"cmd_jax"} for module in MODULES if module != "cmd_jax"}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(name for name in MODULES if layer(name) < len(LAYERS) - 1 and name != "cmd_jax"))
def test_imports_stand_at_the_top(module):
    """Only binaries load modules of the package late, once their flags are checked."""
    assert imports(module) == imports(module, inside_functions=False)
