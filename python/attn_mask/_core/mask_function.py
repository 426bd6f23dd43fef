"""Mask functions as objects, as trees, and those that are called: all but the leaves.

The rules in mask_rules are made of these.
"""

import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch

from attn_mask._core.arguments import expected_of_function
from attn_mask._core.library import _C
from attn_mask._core.program import Coverage, Place, Program, beside, wide
from attn_mask._core.tracing import is_recording

# Of a program; csrc/rule/program.h defines them.
ALL = _C.OPCODES["ALL"]
AND = _C.OPCODES["AND"]
OR = _C.OPCODES["OR"]
NOTHING = _C.OPCODES["NOTHING"]

# Fields that a repr leaves out.
_UNSHOWN = "depth", "source", "limits", "is_upstream"


# eq=False: comparing tensors by value would be neither cheap nor a bool.
@dataclass(frozen=True, eq=False, repr=False)
class MaskFunction:
    """A mask function that carries its rule; made by the functions of this module."""

    # What torch.vmap (and a BlockMask's repr) calls it; torch.compile can't trace the repr.
    __name__ = "mask_function"

    factory = ""  # the function that makes such a rule
    depth = 1  # how deep the tree is nested; 1 of a leaf
    is_positional = False
    """Whether ints alone decide it, and all of some keys are visible to some queries if the last
    key is to the first query, and the first key to the last query."""

    # The module that draws stands upon rules, so the package tells how it is loaded.
    drawing: ClassVar[Callable[[], Any]]

    def show(self, q_length: int | None = None, kv_length: int | None = None, **how: Any) -> str:
        """``attn_mask.show`` of this rule, and of ``batch``, ``head``, ``tokens``, ``style``."""
        text: str = MaskFunction.drawing().show(self, q_length, kv_length, **how)
        return text

    def _repr_html_(self) -> str:
        text: str = MaskFunction.drawing().html_of(self)
        return text

    def __call__(
        self,
        batch_idx: torch.Tensor,
        head_idx: torch.Tensor,
        q_idx: torch.Tensor,
        kv_idx: torch.Tensor,
    ) -> torch.Tensor:
        """Whether queries attend to keys; index tensors that broadcast against each other."""
        result: torch.Tensor = self.evaluate(*map(wide, (batch_idx, head_idx, q_idx, kv_idx)))
        return result

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        """The same of int64, in which positions neither wrap nor overflow."""
        raise NotImplementedError

    def encode_into(self, program: Program, place: Place) -> None:
        raise NotImplementedError

    def coverage(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Coverage:
        """What it shows to the queries at q_start to q_end - 1, of such keys; one each at least."""
        if not self.is_positional:
            return Coverage.OTHER
        if not self.evaluate(0, 0, q_end - 1, kv_start):
            return Coverage.OTHER
        if self.evaluate(0, 0, q_start, kv_end - 1):
            return Coverage.ALL
        return Coverage.CAUSAL if getattr(self, "right", None) == 0 else Coverage.OTHER

    @property
    def parts(self) -> tuple["MaskFunction", ...]:
        """The rules that it joins, or whose positions it changes; none of a leaf."""
        # torch 2.11's dynamo hashes objects whose fields it has not set yet.
        rule = getattr(self, "rule", None)
        return getattr(self, "rules", ()) if rule is None else (rule,)

    def walk(self) -> list["MaskFunction"]:
        """The rules of the tree, each before its parts."""
        found: list[MaskFunction] = []
        waiting: list[MaskFunction] = [self]
        while waiting:
            rule = waiting.pop()
            found.append(rule)
            waiting += rule.parts[::-1]
        return found

    def with_parts(self, change: Callable[["MaskFunction"], "MaskFunction"]) -> "MaskFunction":
        """The same of changed parts."""
        if isinstance(self, Join):
            return _joined(type(self), tuple(map(change, self.rules)))
        changed: dict[str, Any] = {"rule": change(*self.parts)} if self.parts else {}
        return replace(self, **changed)

    @property
    def program(self) -> Program:
        """This tree for the operators; made once, but anew while a graph is recorded."""
        return Program(self) if is_recording() else self.known_program

    @cached_property
    def known_program(self) -> Program:
        """The same, where no graph is recorded."""
        return Program(self)

    @property
    def is_native(self) -> bool:
        """Whether no part of it has to be called for each element of a mask, as a callable is."""
        program = self.program
        return program.is_boolean and not program.calls

    def encode(self) -> tuple[list[int], list[torch.Tensor]]:
        """(rule, operands), the first arguments of ``torch.ops.attn_mask.boolean``.

        Raises TypeError for a tree with a callable of the user's, or anything else that has no
        rule (a shift by a tensor, ids that are not integers); ValueError for tensors of another
        rank than the rule's.
        """
        program = self.program
        for _, function in program.calls:
            raise TypeError(f"encode: expected a tree of rules, but got {function!r} in it")
        return list(program.code), list(program.operands)

    def to(self, device: torch.device | str) -> Self:
        """This tree with its tensors on ``device``; callables of the user's stay as they are."""
        moved: dict[str, Any] = {}
        for name, value in self._fields():
            new = value
            if isinstance(value, torch.Tensor | MaskFunction):
                new = value.to(device)
            elif name == "rules":
                rules = tuple(map(operator.methodcaller("to", device), value))
                new = rules if any(map(operator.is_not, rules, value)) else value
            if new is not value:
                moved[name] = new
        return replace(self, **moved) if moved else self

    def __bool__(self) -> bool:
        # torch 2.11's dynamo takes it for whether there is a function, when it traces a call.
        if not torch.compiler.is_dynamo_compiling() and (
            sys._getframe(1).f_globals.get("__name__") == "torch._dynamo.symbolic_convert"
        ):
            return True
        raise TypeError(
            f"{self.__name__}: expected rules to be joined by `&` and `|`, not by `and`, `or` and "
            "`not`: a rule is neither true nor false (test for one by `is None`)"
        )

    def __and__(self, other: Callable[..., Any]) -> "MaskFunction":
        return intersection(self, other) if callable(other) else NotImplemented

    def __rand__(self, other: Callable[..., Any]) -> "MaskFunction":
        return intersection(other, self) if callable(other) else NotImplemented

    def __or__(self, other: Callable[..., Any]) -> "MaskFunction":
        return union(self, other) if callable(other) else NotImplemented

    def __ror__(self, other: Callable[..., Any]) -> "MaskFunction":
        return union(other, self) if callable(other) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskFunction):
            return NotImplemented
        return self is other or self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        try:
            return self._repr()
        except RecursionError:  # in the midst of a very deep tree
            return "..."

    def _repr(self) -> str:
        shown = [of for name, of in self._fields() if name not in _UNSHOWN and of is not None]
        return f"{self.factory}({', '.join(map(shown_value, shown))})"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields())

    def _fields(self) -> list[tuple[str, Any]]:
        # torch 2.11's dynamo hashes objects whose fields it has not set yet.
        return [(of.name, getattr(self, of.name, None)) for of in fields(self)]

    def _identity(self) -> tuple[Any, ...]:
        """Of each rule in the tree its type, the number of its parts and its other fields.

        Tensors and callables of the user's are themselves: comparing them might read values.
        """
        found: list[Any] = []
        for rule in self.walk():
            found += type(rule), len(rule.parts)
            for of in fields(rule):
                value = getattr(rule, of.name, None)
                if of.compare and of.name not in ("rule", "rules"):
                    plain = value is None or isinstance(value, int | tuple)
                    found.append(value if plain else (object, id(value)))
        return tuple(found)


def shown_value(value: Any) -> str:
    """For a repr: of a tensor its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class Function(MaskFunction):
    function: Callable[..., Any]

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if is_recording():
            return self.function(batch_idx, head_idx, q_idx, kv_idx)
        try:
            result = self.function(batch_idx, head_idx, q_idx, kv_idx)
        except (TypeError, ValueError, RuntimeError) as error:
            expected = expected_of_function(self.function, error)
            if expected is None:
                raise
            raise TypeError(f"{self._name()}: expected the mask function {expected}") from error
        if not isinstance(result, torch.Tensor | bool) or (
            isinstance(result, bool) and isinstance(q_idx, torch.Tensor)
        ):
            raise TypeError(
                f"{self._name()}: expected the mask function to return a bool tensor, "
                f"but got {type(result).__name__}"
            )
        return result

    def _name(self) -> str:
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def encode_into(self, program: Program, place: Place) -> None:
        program.add_call(self, place)

    def _repr(self) -> str:
        return f"function({self._name()})"


@dataclass(frozen=True, eq=False, repr=False)
class Join(MaskFunction):
    """An and / or of any number of rules."""

    rules: tuple[MaskFunction, ...]
    depth: int

    sign: ClassVar[str]
    join: ClassVar[Callable[[Any, Any], Any]]
    of_none: ClassVar[bool]
    """The result of no rules."""

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        join = type(self).join
        result: Any = self.of_none
        if isinstance(q_idx, torch.Tensor):
            # Not new_full, which torch.jit.trace can't record.
            result = (q_idx.new_ones if result else q_idx.new_zeros)((), dtype=torch.bool)
        for rule in self.rules:
            result = join(result, beside(rule.evaluate(batch_idx, head_idx, q_idx, kv_idx), result))
        return result

    def encode_into(self, program: Program, place: Place) -> None:
        if not self.rules:
            program.code.append(ALL if self.of_none else NOTHING)
        elif len(self.rules) > 1:  # the operators need one at least
            program.code += (AND if self.of_none else OR, len(self.rules))
        for rule in self.rules:
            rule.encode_into(program, place)

    def coverage(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Coverage:
        shown = []
        for rule in self.rules:  # no comprehension, which would be one more frame
            shown.append(rule.coverage(q_start, q_end, kv_start, kv_end))
        if not self.of_none and Coverage.ALL in shown:
            return Coverage.ALL
        return min(shown, default=Coverage.ALL if self.of_none else Coverage.OTHER)

    def _repr(self) -> str:
        if len(self.rules) < 2:
            return f"{self.factory}({', '.join(map(repr, self.rules))})"
        return self.sign.join(
            f"({rule!r})"
            if isinstance(rule, _Union) and isinstance(self, _Intersection) and len(rule.rules) > 1
            else repr(rule)
            for rule in self.rules
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Intersection(Join):
    factory, sign, of_none = "intersection", " & ", True
    join = operator.and_


@dataclass(frozen=True, eq=False, repr=False)
class _Union(Join):
    factory, sign, of_none = "union", " | ", False
    join = operator.or_


def function(mask_function: Callable[..., Any]) -> MaskFunction:
    """Any mask function, as an object; one that is an object already comes back itself."""
    return rule_of("function", "mask_function", mask_function)


def rule_of(name: str, argument: str, mask_function: Any) -> MaskFunction:
    """function, for an argument of another function: errors name that."""
    if isinstance(mask_function, MaskFunction):
        return mask_function
    if not callable(mask_function):
        raise TypeError(
            f"{name}: expected {argument} to be callable, but got {type(mask_function).__name__}"
        )
    if (
        not is_recording()
        and type(mask_function) is types.FunctionType
        and str(mask_function.__module__).startswith("attn_mask.")
    ):
        factory = mask_function.__name__
        raise TypeError(
            f"{name}: expected {argument} to be a mask function, but got {factory}, which makes "
            f"one: call {factory}()"
        )
    return Function(mask_function)


def intersection(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """A query attends to the keys that it attends to by all of the functions."""
    return _joined(_Intersection, mask_functions)


def union(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """A query attends to the keys that it attends to by any of the functions."""
    return _joined(_Union, mask_functions)


def _joined(kind: type[Join], mask_functions: tuple[Callable[..., Any], ...]) -> MaskFunction:
    rules: list[MaskFunction] = []
    for mask_function in mask_functions:
        rule = rule_of(kind.factory, "mask_function", mask_function)
        rules += rule.rules if isinstance(rule, kind) else (rule,)
    return kind(tuple(rules), depth_over(kind.factory, rules))


def depth_over(name: str, rules: list[MaskFunction]) -> int:
    """The depth of a tree with these branches. Raises ValueError for what is too deep."""
    depth: int = 1 + max([0, *(rule.depth for rule in rules)])  # as torch 2.11 compiles it
    if depth > _C.MAX_DEPTH:
        raise ValueError(
            f"{name}: expected rules to be nested at most {_C.MAX_DEPTH} deep, but got {depth}"
        )
    return depth
