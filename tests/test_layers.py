"""The Python modules of the package: what they import of each other, and how they call."""

import ast
import functools
import graphlib
from pathlib import Path

import attn_mask

PACKAGE = Path(attn_mask.__file__).parent


def name_of(path):
    parts = ("attn_mask", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree(name):
    return ast.parse(MODULES[name].read_text())


def imports(name):
    """(module of the package, name in it or None) for each import, at whatever depth."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "attn_mask":
                    yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            if (node.module or "").split(".")[0] == "attn_mask":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = inner in MODULES or inner == "attn_mask._C"
                    yield (inner, None) if is_module else (node.module, alias.name)


def test_no_import_is_a_circle():
    graph = {name: {module for module, _ in imports(name)} - {name} for name in MODULES}
    assert sum(map(len, graph.values())) > 50
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)
