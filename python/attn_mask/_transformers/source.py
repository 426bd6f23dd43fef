"""Recognises transformers' own functions by their source.

Each has a hash over its syntax tree and those of all that it calls in its module.
Comments, docstrings, annotations and positions do not count, nor does the version of Python.
known.json holds the hashes of all releases; scripts/hash_upstream.py writes it.
"""

import ast
import functools
import hashlib
import importlib.resources
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
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

# How the names of functions that write masks begin.
WRITERS = ("sdpa_mask", "eager_mask")

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


class Source:
    """The functions, other assignments and imports at the top of a module's source."""

    def __init__(self, text: str, file: str | None = None):
        self.defined: dict[str, list[_Function | ast.Assign | ast.AnnAssign]] = {}
        self.uses: dict[str, set[str]] = {}
        """The names that a function reads when it is called, or an assignment when it is made."""
        self.imports: dict[str, tuple[str, str]] = {}
        """By name: the module, as it is written, and the name there."""
        self._texts: dict[str, bytes] = {}
        tree = ast.parse(text)
        self._collect(tree.body)
        compiled = compile(tree, file or "<source>", "exec", dont_inherit=True)
        self.codes = {_identity(code) for code in _codes(compiled)}
        """What is compiled of it."""

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, _Function):
                self._add(node.name, node, node.body)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self._add(target.id, node, [node.value] if node.value else [])
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = origin, alias.name
            elif isinstance(node, ast.If):
                self._collect(node.body + node.orelse)

    def _add(
        self,
        name: str,
        node: _Function | ast.Assign | ast.AnnAssign,
        read: Sequence[ast.AST],
    ) -> None:
        self.defined.setdefault(name, []).append(node)
        self.uses.setdefault(name, set()).update(_names(read))

    def functions(self, name: str) -> list[_Function]:
        return [node for node in self.defined.get(name, ()) if isinstance(node, _Function)]

    def reached(self, roots: Iterable[str], without: Iterable[str] = ()) -> set[str]:
        """All the names that the roots read, directly or through functions of the module.

        The functions ``without`` are not followed.
        """
        found, queue = set(without), list(roots)
        while queue:
            name = queue.pop()
            if name not in found:
                found.add(name)
                queue += self.uses.get(name, ())
        return found.difference(without)

    def hash(self, roots: Iterable[str], without: Iterable[str] = ()) -> str:
        """Of the roots and all that they reach in this module."""
        digest = hashlib.sha256()
        for name in sorted(self.reached(roots, without)):
            digest.update(self._text(name))
        return digest.hexdigest()[:32]

    def _text(self, name: str) -> bytes:
        if name not in self._texts:
            lines = (f"{name}:{_normalised(node)}\n" for node in self.defined.get(name, ()))
            self._texts[name] = "".join(lines).encode()
        return self._texts[name]


@functools.cache
def hashes(source: Source) -> dict[str, str]:
    """By name: the functions of masking_utils that install() replaces, and "decisions"."""
    writers = (name for name in source.defined if name.startswith(WRITERS))
    return {
        **{name: source.hash([name]) for name in FACTORIES if source.functions(name)},
        **{name: source.hash([name], SKIPPING) for name in writers if source.functions(name)},
        "decisions": source.hash(DECISIONS),
    }


@functools.cache
def known() -> dict[str, str]:
    """The first release with a function, by "name hash", see hashes."""
    table = importlib.resources.files("attn_mask._transformers").joinpath("known.json").read_text()
    found: dict[str, str] = json.loads(table)
    return found


_parsed = functools.lru_cache(4)(Source)


def _source(module: ModuleType) -> Source | None:
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    try:
        text = loader.get_source(module.__name__)  # type: ignore[union-attr]
        return None if text is None else _parsed(text, getattr(module, "__file__", None))
    except (AttributeError, ImportError, OSError, SyntaxError, ValueError):
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Of all functions within a function."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _identity(code: CodeType) -> tuple[object, ...]:
    """Equal for functions that stand at the same line of a file and do the same.

    The code of functions that have run is not: Python 3.11 compares what it has specialised.
    """
    parts = [_identity(x) if isinstance(x, CodeType) else (type(x), x) for x in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    place = code.co_filename, code.co_firstlineno, code.co_qualname
    return *place, code.co_flags, code.co_code, *names, *parts


class Module:
    """A module of transformers, with the source that it was executed from."""

    def __init__(self, module: ModuleType):
        self.names = vars(module)
        self.name = module.__name__
        self.source = _source(module)
        if self.source is None:  # any function of somewhere else may be one
            replaced = {name for name, held in list(self.names.items()) if _is_of_users(held)}
        else:
            names = (*self.source.defined, *self.source.imports)
            replaced = {name for name in names if self._is_replaced(name, self.source)}
        self._replaced = replaced
        """The names that hold something else than what the source put there."""

    def own(self, function: Any) -> str | None:
        """The name under which the module's source defines a function; None if it does not.

        ``__wrapped__`` is not followed: a wrapper is another function, unless it is what the
        decorator that stands in the source made.
        """
        if not isinstance(function, FunctionType):
            return None
        if not function.__closure__:
            return self._defined(function)
        within = vars(function).get("__wrapped__")
        name = self._defined(within) if isinstance(within, FunctionType) else None
        return name if name and self._is_decorated(function, name) else None

    def _defined(self, function: FunctionType) -> str | None:
        code = function.__code__
        if function.__globals__ is not self.names or function.__closure__:
            return None
        # What is executed at the same place of the file may be another version of it.
        if self.source is not None and _identity(code) not in self.source.codes:
            return None
        return code.co_qualname

    def _is_decorated(self, wrapper: FunctionType, name: str) -> bool:
        """Whether a wrapper of a function is what its decorators made."""
        if self.source is None:
            return not _is_of_users(wrapper)
        decorators = [by for node in self.source.functions(name) for by in node.decorator_list]
        makers = (self.names.get(maker) for maker in _names(decorators))
        return any(
            wrapper.__code__ in _codes(maker.__code__)
            for maker in makers
            if isinstance(maker, FunctionType)
        )

    def _is_replaced(self, name: str, source: Source) -> bool:
        held = self.names.get(name)
        if source.functions(name):
            return self.own(held) != name
        if name in source.defined:
            return isinstance(held, FunctionType) and self.own(held) is None
        origin, original = source.imports[name]
        there = sys.modules.get(importlib.util.resolve_name(origin, self.name.rpartition(".")[0]))
        return there is not None and vars(there).get(original, held) is not held

    def replaced(self, roots: Iterable[str], without: Iterable[str] = ()) -> set[str]:
        """What the roots read, see Source.reached, that is something else than the source's."""
        if self.source is None:
            return self._replaced
        return self._replaced & self.source.reached(roots, without)

    def parameters(self, *names: str) -> list[str]:
        """Of the first function that the source defines, whatever has replaced it."""
        for node in (node for name in names if self.source for node in self.source.functions(name)):
            of = node.args
            return [argument.arg for argument in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
        try:
            return list(inspect.signature(self.names[names[0]]).parameters)
        except (KeyError, TypeError, ValueError):
            return []


def _is_of_users(held: Any) -> bool:
    if not isinstance(held, FunctionType):
        return False
    return str(held.__globals__.get("__name__")).split(".")[0] not in ("torch", "transformers")
