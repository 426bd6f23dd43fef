"""The Python modules of the package: what they import of each other, and how they call."""

import ast
import functools
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import attn_mask
import pytest
import torch

PACKAGE = Path(attn_mask.__file__).parent


def name_of(path):
    parts = ("attn_mask", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree(name):
    return ast.parse(MODULES[name].read_text())


def imports(name):
    """(module of the package, name in it or None) for each import, at whatever depth.

    Those by a string count, but for the table of the package itself.
    """
    for node in ast.walk(tree(name)):
        by_string = isinstance(node, ast.Constant) and node.value in MODULES
        if by_string and "attn_mask" not in (name, node.value):
            yield node.value, None
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


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def exported(name):
    """What a module says is public, whatever it is called: the mirrors have upstream's names."""
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return set(ast.literal_eval(node.value))
    return set()


FIRST = """
import importlib, os, sys, traceback
import torch

for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(name)
"""


def test_each_module_can_be_the_first():
    """In a process that has imported torch only: the names printed could not."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *MODULES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


WAITING = """
import sys
import attn_mask

for module in attn_mask._LOADED_WHEN_USED.values():
    assert f"attn_mask.{module}" not in sys.modules
for name, module in attn_mask._LOADED_WHEN_USED.items():
    assert name in dir(attn_mask) and name in attn_mask.__all__
    found = getattr(attn_mask, name)
    module = sys.modules[f"attn_mask.{module}"]
    assert found is module or found is getattr(module, name)
    print(name)
assert not hasattr(attn_mask, "no_such_module")
"""


def test_modules_that_few_need_are_loaded_when_they_are_used():
    done = subprocess.run(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "block_sparse" in done.stdout.split()


def test_no_import_is_a_circle():
    graph = {name: {module for module, _ in imports(name)} - {name} for name in MODULES}
    assert sum(map(len, graph.values())) > 50
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)


DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


def layers():
    """What each layer may import, by the table of the design page."""
    text = DESIGN.read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {
        row[0].strip("` "): {name.strip("` ") for name in row[1].split(",")} - {""}
        for row in rows
        if len(row) == 3 and row[0] != " layer "
    }


def layer_of(module):
    folder = module.removeprefix("attn_mask").removeprefix(".").split(".")[0]
    if folder in ("_core", "_graph", "_transformers", "_tools"):
        return folder
    # What is built stands at the top, where Python and CMake put it.
    built = {"_C": "_core", "_built_for": "_core", "__main__": "package"}
    return built.get(folder, "public" if folder else "package")


@pytest.mark.skipif(not DESIGN.exists(), reason="the pages are not here")
def test_layers_are_those_of_the_design_page():
    """What a module imports, at whatever depth; the package and its command may import all."""
    allowed = layers()
    assert list(allowed) == ["_tools", "public", "_transformers", "_graph", "_core"]
    assert {layer_of(name) for name in MODULES} == {*allowed, "package"}
    found = {
        f"{name} imports {module}"
        for name in MODULES
        for module, _ in imports(name)
        if layer_of(name) != "package"
        and layer_of(module).replace("package", "public")
        not in {layer_of(name), *allowed[layer_of(name)]}
        and module.removeprefix("attn_mask.") not in allowed[layer_of(name)]
    }
    assert found == set()


def test_no_private_name_of_another_module_is_imported():
    found = [
        f"{name} imports {inner} of {module}"
        for name in MODULES
        for module, inner in imports(name)
        if inner is not None
        and is_private(inner)
        and inner not in exported(module)
        and f"{module}.{inner}" != "attn_mask._core.library._C"
    ]
    assert found == []


def defined_privately(name):
    """Private names of a module: at its top, in its classes, of its objects."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(is_private, found))


def test_no_private_attribute_of_another_module_is_used():
    defined = {name: defined_privately(name) for name in MODULES}
    public = {"_C"}.union(*map(exported, MODULES))
    found = []
    # Of NamedTuples, which have no other names for them.
    public |= {"_asdict", "_fields", "_replace"}
    for name in MODULES:
        elsewhere = set().union(*(defined[other] for other in MODULES if other != name))
        for node in ast.walk(tree(name)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in elsewhere - defined[name] - public
                and f"attn_mask.{node.attr}" not in MODULES
                # Operators have upstream's names.
                and not hasattr(torch.ops.attn_mask, node.attr)
            ):
                found.append(f"{name}:{node.lineno} uses {node.attr}")
    assert found == []


def test_no_call_has_twelve_arguments_by_place():
    """But for those of ``_C``, which steps of decoding call."""
    found = []
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call) and len(node.args) >= 12:
                called = node.func
                of_c = isinstance(called, ast.Attribute) and ast.unparse(called.value) == "_C"
                if not of_c:
                    found.append(f"{name}:{node.lineno} calls {ast.unparse(called)}")
    assert found == []
