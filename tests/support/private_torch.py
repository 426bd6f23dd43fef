"""The private names of torch that the sources use."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Names of C++ that are no part of torch's documented API.
_CPP = re.compile(
    r"\b(at::_\w+|at::detail::\w+|c10::impl::\w+|at::impl::\w+|torch::jit::\w+)"
    r"|\b(unsafeGetTensorImpl|HANDLE_TH_ERRORS)\b|<(torch/csrc/(?!api)[\w/]+\.h)>"
)


def _is_private(name: str) -> bool:
    parts = name.split(".")
    is_ours = parts[:2] == ["torch", "ops"]
    dunder = [part.startswith("__") and part.endswith("__") for part in parts]
    return not is_ours and any(
        part == "experimental" or (part.startswith("_") and not double)
        for part, double in zip(parts, dunder, strict=True)
    )


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = _dotted(node.value)
        return value and f"{value}.{node.attr}"
    return None


def _names_of(tree: ast.Module) -> set[str]:
    inner = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
    }
    found = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node not in inner and (name := _dotted(node))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    # What follows a class, as of an enumeration, is not listed.
    of_class = re.compile(r"(\.[A-Z]\w+)\.[A-Za-z]\w*$")
    return {
        of_class.sub(r"\1", name)
        for name in found
        if name.startswith("torch.") and _is_private(name)
    }


def used() -> dict[str, set[str]]:
    """Each name, with the files that use it."""
    files: dict[str, set[str]] = {}
    for path in sorted((ROOT / "python" / "attn_mask").rglob("*.py")):
        for name in _names_of(ast.parse(path.read_text())):
            files.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            for groups in _CPP.findall(path.read_text()):
                name = next(filter(None, groups))
                files.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return files
