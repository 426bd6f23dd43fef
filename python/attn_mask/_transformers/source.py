"""Recognises transformers' own functions by their source.

Each has a hash over its syntax tree and those of all that it calls in its module.
Comments, docstrings, annotations and positions do not count, nor does the version of Python.
known.json holds the hashes of all releases; scripts/hash_upstream.py writes it.
"""

import ast
import functools
import hashlib
import importlib.resources
import json
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

# Mask functions whose results depend on their arguments alone. Those that prepare the arguments
# stay the release's.
FACTORIES = (
    "and_masks",
    "or_masks",
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_causal_mask_function",
    "sliding_window_bidirectional_overlay",
    "sliding_window_bidirectional_mask_function",
    "chunked_overlay",
    "chunked_causal_mask_function",
    "blockwise_overlay",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
)

# What decides that no mask is needed. The functions that write masks call it.
SKIPPING = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
DECISIONS = ("prepare_padding_mask", *SKIPPING)

_Function = ast.FunctionDef | ast.AsyncFunctionDef

# What does not change what a function does, or is not there in each version of Python.
_UNREAD = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "type_ignores"}


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _normalised(node: Any) -> str:
    """A syntax tree as text, the same in all versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_normalised, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in _UNREAD}
    body = fields.get("body")
    if isinstance(body, list) and body and _is_docstring(body[0]):
        fields["body"] = body[1:]
    shown = (
        f"{name}={_normalised(value)}"
        for name, value in sorted(fields.items())
        if value is not None and value != []
    )
    return f"{type(node).__name__}({','.join(shown)})"


def _names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names that are read when these nodes run."""
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                yield part.id


def passes(text: str, argument: str) -> list[tuple[str, bool]]:
    """Of each call of a create function in a model's file: its name, and whether it passes this.

    Arguments that are passed as ``**kwargs`` are those that the function around names as strings.
    A local name stands for each create function that it may be.
    """
    found = []
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, _Function):
            continue
        parts = list(ast.walk(function))
        named = any(isinstance(part, ast.Constant) and part.value == argument for part in parts)
        local = {
            target.id: [name for name in _names([part.value]) if _is_create(name)]
            for part in parts
            if isinstance(part, ast.Assign)
            for target in part.targets
            if isinstance(target, ast.Name)
        }
        for call in parts:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                name = call.func.id
                is_given = any(
                    keyword.arg == argument or (keyword.arg is None and named)
                    for keyword in call.keywords
                )
                creates = [name] if _is_create(name) else local.get(name, [])
                found += [(create, is_given) for create in creates]
    return found


def _is_create(name: str) -> bool:
    return name.startswith("create_") and "mask" in name


class Source:
    """The functions, other assignments and imports at the top of a module's source."""

    def __init__(self, text: str):
        self.functions: dict[str, list[_Function]] = {}
        self.assignments: dict[str, list[ast.Assign | ast.AnnAssign]] = {}
        self.imports: dict[str, tuple[str, str, int]] = {}
        """By name: the module, the name there, and how many levels up that module's name starts."""
        self._uses: dict[str, set[str]] = {}
        self._texts: dict[str, bytes] = {}
        tree = ast.parse(text)
        self._collect(tree.body)
        compiled = compile(tree, "<source>", "exec", dont_inherit=True)
        self.codes = [code for code in compiled.co_consts if isinstance(code, CodeType)]
        """What the functions (and classes) are compiled to."""

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, _Function):
                self.functions.setdefault(node.name, []).append(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.assignments.setdefault(target.id, []).append(node)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    origin = node.module or "", alias.name, node.level
                    self.imports[alias.asname or alias.name] = origin
            elif isinstance(node, ast.If):
                self._collect(node.body + node.orelse)

    def uses(self, name: str) -> set[str]:
        """The names that a function reads when it is called, or an assignment when it is made."""
        if name not in self._uses:
            nodes: list[ast.AST] = []
            for function in self.functions.get(name, ()):
                nodes += function.body
            nodes += [node.value for node in self.assignments.get(name, ()) if node.value]
            self._uses[name] = set(_names(nodes))
        return self._uses[name]

    def reached(self, roots: Iterable[str], without: Iterable[str] = ()) -> set[str]:
        """All the names that the roots read, directly or through functions of the module.

        The functions ``without`` are not followed.
        """
        found, queue = set(without), list(roots)
        while queue:
            name = queue.pop()
            if name not in found:
                found.add(name)
                queue += self.uses(name)
        return found.difference(without)

    def hash(self, roots: Iterable[str], without: Iterable[str] = ()) -> str:
        """Of the roots and all that they reach in this module."""
        digest = hashlib.sha256()
        for name in sorted(self.reached(roots, without)):
            digest.update(self._text(name))
        return digest.hexdigest()[:32]

    def _text(self, name: str) -> bytes:
        if name not in self._texts:
            nodes = (*self.functions.get(name, ()), *self.assignments.get(name, ()))
            lines = (f"{name}:{_normalised(node)}\n" for node in nodes)
            self._texts[name] = "".join(lines).encode()
        return self._texts[name]

    def parameters(self, name: str) -> list[str] | None:
        """Those of a function of the module, or None where there is none."""
        for node in self.functions.get(name, ()):
            arguments = node.args
            return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return None


@functools.cache
def hashes(source: Source) -> dict[str, str]:
    """By name: the functions of masking_utils that install() replaces, and "decisions"."""
    writers = (name for name in source.functions if name.startswith(("sdpa_mask", "eager_mask")))
    return {
        **{name: source.hash([name]) for name in FACTORIES if name in source.functions},
        **{name: source.hash([name], SKIPPING) for name in writers},
        "decisions": source.hash(DECISIONS),
    }


@functools.cache
def known() -> dict[str, dict[str, str]]:
    """The first release with a function of some name (see hashes) and hash."""
    table = importlib.resources.files("attn_mask._transformers").joinpath("known.json").read_text()
    found: dict[str, dict[str, str]] = json.loads(table)
    return found


@functools.lru_cache(4)
def _parsed(text: str) -> Source:
    return Source(text)


def _source(module: ModuleType) -> Source | None:
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    try:
        text = loader.get_source(module.__name__)  # type: ignore[union-attr]
        return None if text is None else _parsed(text)
    except (AttributeError, ImportError, OSError, SyntaxError, ValueError):
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Of all functions within a function."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether two functions stand at the same line and do the same."""

    def parts(code: CodeType) -> tuple[object, ...]:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return code.co_name, code.co_firstlineno, code.co_flags, code.co_code, *names

    return (
        parts(code) == parts(other)
        and len(code.co_consts) == len(other.co_consts)
        and all(
            _is_same(a, b)
            if isinstance(a, CodeType) and isinstance(b, CodeType)
            else (type(a), a) == (type(b), b)
            for a, b in zip(code.co_consts, other.co_consts, strict=True)
        )
    )


class Module:
    """A module of transformers, with the source that it was executed from."""

    def __init__(self, module: ModuleType):
        self._names = vars(module)
        self._name = module.__name__
        self._file = getattr(module, "__file__", None)
        self.source = _source(module)

    def own(self, function: Any) -> str | None:
        """The name under which the module's source defines a function; None if it does not.

        ``__wrapped__`` is not followed: a wrapper is another function, unless it is what the
        decorator that stands in the source made.
        """
        if not isinstance(function, FunctionType):
            return None
        if name := self._defined(function):
            return name
        for cell in function.__closure__ or ():
            if (
                isinstance(inner := _contents(cell), FunctionType)
                and (name := self._defined(inner))
                and self._is_decorated(function, name)
            ):
                return name
        return None

    def _defined(self, function: FunctionType) -> str | None:
        code = function.__code__
        name = code.co_name
        if function.__globals__ is not self._names or function.__closure__:
            return None
        if self.source is None:
            return name
        # What is executed at the same place of the file may be another version of it.
        is_here = code.co_filename == self._file and any(
            _is_same(code, defined) for defined in self.source.codes
        )
        return name if is_here else None

    def _is_decorated(self, wrapper: FunctionType, name: str) -> bool:
        """Whether a wrapper of a function is what its decorators made."""
        if self.source is None:
            return not _is_of_users(wrapper)
        return any(wrapper.__code__ is code for code in self._decorated(name, self.source))

    def _decorated(self, name: str, source: Source) -> Iterator[CodeType]:
        """The codes of what the decorators of a function make."""
        for node in source.functions.get(name, ()):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if not isinstance(called, ast.Name) or self._is_replaced(called.id):
                    continue
                made_by = self._names.get(called.id)
                if isinstance(made_by, FunctionType):
                    yield from _codes(made_by.__code__)

    def _is_replaced(self, name: str) -> bool:
        """Whether a name of the module holds something else than what its source put there."""
        assert self.source is not None
        held = self._names.get(name)
        if name in self.source.functions:
            return self.own(held) != name
        if name in self.source.assignments:
            return isinstance(held, FunctionType) and self.own(held) is None
        if name in self.source.imports:
            origin, original, level = self.source.imports[name]
            if level:
                package = self._name.split(".")[:-level]
                origin = ".".join([*package, origin] if origin else package)
            there = vars(sys.modules[origin]) if origin in sys.modules else {}
            return there.get(original, held) is not held
        return False

    def replaced(self, names: Iterable[str]) -> set[str]:
        """Those of the names that hold something else than what the source put there."""
        if self.source is not None:
            return {name for name in names if self._is_replaced(name)}
        # Without it, any function of somewhere else may be one.
        return {name for name, held in list(self._names.items()) if _is_of_users(held)}


def _is_of_users(held: Any) -> bool:
    if not isinstance(held, FunctionType):
        return False
    return str(held.__globals__.get("__name__")).split(".")[0] not in ("torch", "transformers")


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
