"""Mask functions as objects: each can be called, and says by which rule it answers.

A mask function takes tensors of indices (batch_idx, head_idx, q_idx, kv_idx) and says whether query
q_idx attends to key kv_idx: the closures of transformers' ``masking_utils``, the mask_mods of flex
attention. A MaskFunction answers as those do (same dtype, shape and broadcasting; under torch.vmap
and torch.compile, too), and ``encode()`` gives what ``torch.ops.attn_mask.boolean`` and
``.additive`` need to write the whole mask at once. Trees grow by ``&`` and ``|``, with any
callables::

    causal() & sliding_window(4096) | blockwise(image_ids)

They are immutable, can be copied and pickled (where a callable of the user's can), and are equal
when they have the same structure over the same tensor objects. No value of a tensor is read here.
"""

import enum
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch

from attn_mask._tracing import is_known, is_recording

__all__ = [
    "MaskFunction",
    "bidirectional",
    "blockwise",
    "causal",
    "chunked",
    "documents",
    "function",
    "intersection",
    "padding",
    "reindex",
    "shift",
    "sliding_window",
    "union",
    "window",
]

# The rules of a program; csrc/ops/rule_program.h defines them.
ALL = 0
CAUSAL = 1
WINDOW = 2
CHUNK = 3
BLOCKS = 4
PADDING = 5
DOCUMENTS = 6
BITS = 7
AND = 8
OR = 9
REINDEX = 10
SHIFT = 11
NOTHING = 12
# How often positions may change above a rule: one less than Rule::kMaxSteps of csrc/rule/rule.h, as
# a window may add a shift.
_MAX_CHANGES = 7

# Sizes are cut to these: further than any two positions are from each other (kOpen of
# csrc/rule/limits.h), since configs spell "no window" by numbers that fit into no 64 bits; and as
# far as rules may be shifted, which a negative size does.
_SMALLEST, _LARGEST = -(2**58), 2**62

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Shown(enum.Enum):
    """What a rule shows of some keys to some queries, as far as it can be told from positions."""

    ALL = enum.auto()
    CAUSAL = enum.auto()
    """The keys up to the query's own position; not all."""
    OTHER = enum.auto()


class _Place(NamedTuple):
    """Where in a tree a rule stands."""

    above: tuple["_Reindex | _Shift", ...] = ()
    """The nodes between it and the root that change positions."""
    add: tuple[int, int] | None = (0, 0)
    """What those add to the positions of queries and keys; None when a tensor decides."""


class Program:
    """A tree as the operators take it, and what to see to before they are called.

    Attributes:
        code: the rules, in prefix order.
        padded_code: the same, and a padding mask that is the operand behind the others.
        operands: the tensors that ``code`` names by index; None for answers to ``questions``.
        names: what to call each operand in an error.
        questions: (index of the operand, function): what only a call can answer. The answers at
            the mask's own positions, bool [b or 1, h or 1, q, kv], are the operand.
        is_plain: True when there is no operand, and nothing to see to but positions below zero.
        is_boolean: False when some padding is not boolean: the function then answers in its dtype.
        lowest: for queries and keys: the first position that is in all tables. Before it, a call
            counts from the end of a tensor.
        highest: for queries and keys: the first position behind that, or None. Neither is known
            (nor needed) while a graph is recorded.
    """

    def __init__(self, rule: "MaskFunction"):
        self.code: list[int] = []
        self.operands: list[Any] = []
        self.names: list[str] = []
        self.questions: list[tuple[int, MaskFunction]] = []
        self.is_boolean = True
        self.lowest = [0, 0]
        self.highest: list[int | None] = [None, None]
        self._limits: list[tuple[int, int, int]] = []  # axis, first position behind, operand
        # Comparing sizes would make a graph depend on them.
        self._finds_limits = not is_recording()
        rule._encode(self, _Place())
        self.padded_code = [AND, 2, *self.code, PADDING, len(self.operands)]
        self.is_plain = not self.operands and self.lowest == [0, 0]

    def add_operand(self, name: str, operand: torch.Tensor | None) -> int:
        self.operands.append(operand)
        self.names.append(name)
        return len(self.operands) - 1

    def add_table(
        self, opcode: int, name: str, table: torch.Tensor, place: _Place, by_query: bool = True
    ) -> None:
        """A rule that looks up positions in a table [b, n]."""
        if table.dim() != 2:
            raise ValueError(
                f"mask_function: expected {name} to be 2-D [batch_size, length], "
                f"but got {table.dim()}-D {list(table.shape)}"
            )
        operand = self.add_operand(name, table)
        self.code += (opcode, operand)
        self.add_limits(place, operand, by_query)

    def add_limits(self, place: _Place, operand: int | None, by_query: bool = True) -> None:
        """Positions are not negative and, with an operand, in that table."""
        if place.add is None:
            return
        for axis in range(0 if by_query else 1, 2):
            if operand is not None:
                limit = self.operands[operand].shape[1] - place.add[axis]
                self._limits.append((axis, limit, operand))
            if self._finds_limits:
                self.lowest[axis] = max(self.lowest[axis], -place.add[axis])
                if operand is not None:
                    highest = self.highest[axis]
                    self.highest[axis] = limit if highest is None else min(limit, highest)

    def is_written(
        self,
        batch_size: int,
        q_start: int,
        q_end: int,
        kv_start: int,
        kv_end: int,
        device: torch.device,
    ) -> bool:
        """Whether the operators need nothing else, for queries and keys at these positions."""
        if self.is_plain:
            return q_start >= 0 and kv_start >= 0
        if self.questions or not self.is_boolean:
            return False
        if q_start < self.lowest[0] or kv_start < self.lowest[1]:
            return False
        q_highest, kv_highest = self.highest
        if (q_highest is not None and q_end > q_highest) or (
            kv_highest is not None and kv_end > kv_highest
        ):
            return False
        for operand in self.operands:
            if operand.shape[0] != batch_size or operand.device != device:
                return False
        return True

    def check_end(self, name: str, axis: int, end: int) -> None:
        """Raises ValueError where queries (axis 0) or keys (1) before ``end`` are in no table."""
        for of_axis, limit, operand in self._limits:
            if of_axis == axis and is_known(end > limit):
                shape = list(self.operands[operand].shape)
                raise ValueError(
                    f"{name}: expected {self.names[operand]} to be of length "
                    f"{shape[1] + end - limit} or longer, but got {shape}"
                )

    def ask(self, rule: "MaskFunction", place: _Place) -> None:
        """A rule that only a call can answer."""
        for above in reversed(place.above):
            rule = replace(above, rule=rule)
        operand = self.add_operand("the answer of a mask function", None)
        self.questions.append((operand, rule))
        self.code += (BITS, operand)


# eq=False: comparing tensors by value would be neither cheap nor a bool.
@dataclass(frozen=True, eq=False, repr=False)
class MaskFunction:
    """A mask function that carries its rule; made by the functions of this module."""

    # What torch.vmap (and a BlockMask's repr) calls it; torch.compile can't trace the repr.
    __name__ = "mask_function"

    def __call__(
        self,
        batch_idx: torch.Tensor,
        head_idx: torch.Tensor,
        q_idx: torch.Tensor,
        kv_idx: torch.Tensor,
    ) -> torch.Tensor:
        """Whether queries attend to keys; index tensors that broadcast against each other."""
        raise NotImplementedError

    def _encode(self, program: Program, place: _Place) -> None:
        raise NotImplementedError

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        """What it shows to the queries at q_start to q_end - 1, of such keys; one each at least."""
        return Shown.OTHER

    @property
    def program(self) -> Program:
        """This tree for the operators; made once, but anew while a graph is recorded."""
        return Program(self) if is_recording() else self.known_program

    @property
    def known_program(self) -> Program:
        """The same, where no graph is recorded."""
        program: Program | None = self.__dict__.get("_program")
        if program is None:
            program = Program(self)
            self.__dict__["_program"] = program
        return program

    def encode(self) -> tuple[list[int], list[torch.Tensor]]:
        """(rule, operands), the first arguments of ``torch.ops.attn_mask.boolean``.

        Raises TypeError for a tree with a callable of the user's, or anything else that has no
        rule (a shift by a tensor, ids that are not integers); ValueError for tensors of another
        rank than the rule's.
        """
        program = self.program
        for _, question in program.questions:
            try:
                shown = repr(question)
            except RecursionError:
                shown = type(question).__name__
            raise TypeError(f"encode: expected a tree of rules, but got {shown} in it")
        return list(program.code), list(program.operands)

    def to(self, device: torch.device | str) -> Self:
        """This tree with its tensors on ``device``; callables of the user's stay as they are."""
        moved = {field: _moved(value, device) for field, value in self._fields()}
        if all(moved[field] is value for field, value in self._fields()):
            return self
        return replace(self, **moved)

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
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields())

    def _fields(self) -> list[tuple[str, Any]]:
        # torch 2.11's dynamo hashes objects whose fields it has not set yet.
        return [(field.name, getattr(self, field.name, None)) for field in fields(self)]

    def _identity(self) -> tuple[Any, ...]:
        return type(self), *(_identity(value) for _, value in self._fields())


def _identity(value: Any) -> Any:
    """Tensors and callables of the user's are themselves: comparing them might read values."""
    plain = value is None or isinstance(value, int | tuple | MaskFunction)
    return value if plain else _Itself(value)


class _Itself:
    """Equal to what holds the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor | MaskFunction):
        return value.to(device)
    if isinstance(value, tuple):
        moved = tuple(_moved(item, device) for item in value)
        return moved if any(a is not b for a, b in zip(moved, value, strict=True)) else value
    return value


def _shown(value: Any) -> str:
    """For a repr: of a tensor its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class _Causal(MaskFunction):
    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    def _encode(self, program: Program, place: _Place) -> None:
        program.code += (CAUSAL,)

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        return Shown.ALL if kv_end - 1 <= q_start else Shown.CAUSAL

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, eq=False, repr=False)
class _Bidirectional(MaskFunction):
    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx >= 0  # the shape of an index, and True

    def _encode(self, program: Program, place: _Place) -> None:
        program.code += (ALL,)
        program.add_limits(place, None)

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        return Shown.ALL if q_start >= 0 else Shown.OTHER

    def __repr__(self) -> str:
        return "bidirectional()"


@dataclass(frozen=True, eq=False, repr=False)
class _Window(MaskFunction):
    left: int | None
    right: int | None

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        # The side that is subtracted can't overflow, however wide the window.
        if self.right is None:
            return kv_idx >= q_idx - self.left
        if self.left is None:
            return kv_idx - self.right <= q_idx
        return (kv_idx >= q_idx - self.left) & (kv_idx - self.right <= q_idx)

    def _encode(self, program: Program, place: _Place) -> None:
        # A negative side shifts the window away: -1 would mean an open side.
        left, right = self.left, self.right
        if left is not None and right is not None and (left < 0 or right < 0):
            program.code += (AND, 2)
            _Window(left, None)._encode(program, place)
            _Window(None, right)._encode(program, place)
        elif left is not None and left < 0:
            program.code += (SHIFT, -left, 0, WINDOW, 0, -1)
        elif right is not None and right < 0:
            program.code += (SHIFT, right, 0, WINDOW, -1, 0)
        else:
            program.code += (WINDOW, *(-1 if side is None else side for side in (left, right)))

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        if self.left is not None and q_end - 1 - kv_start > self.left:
            return Shown.OTHER
        if self.right is None or kv_end - 1 - q_start <= self.right:
            return Shown.ALL
        return Shown.CAUSAL if self.right == 0 else Shown.OTHER

    def __repr__(self) -> str:
        if self.left is not None and self.right is None:
            return f"sliding_window({self.left + 1})"
        return f"window({self.left}, {self.right})"


@dataclass(frozen=True, eq=False, repr=False)
class _Chunked(MaskFunction):
    size: int
    left_padding: torch.Tensor | None

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if self.left_padding is None:
            return kv_idx // self.size == q_idx // self.size
        start = self.left_padding[batch_idx]
        return (kv_idx - start) // self.size == (q_idx - start) // self.size

    def _encode(self, program: Program, place: _Place) -> None:
        start = self.left_padding
        if self.size < 0 or (start is not None and start.dtype not in ID_DTYPES):
            program.ask(self, place)
            return
        operand = -1
        if start is not None:
            if start.dim() != 1:
                raise ValueError(
                    "mask_function: expected left_padding to be 1-D [batch_size], "
                    f"but got {start.dim()}-D {list(start.shape)}"
                )
            operand = program.add_operand("left_padding", start)
        program.code += (CHUNK, self.size, operand)

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        if self.left_padding is not None:
            return Shown.OTHER
        first = min(q_start, kv_start) // self.size
        is_one = first == (max(q_end, kv_end) - 1) // self.size
        return Shown.ALL if is_one else Shown.OTHER

    def __repr__(self) -> str:
        start = "" if self.left_padding is None else f", {_shown(self.left_padding)}"
        return f"chunked({self.size}{start})"


@dataclass(frozen=True, eq=False, repr=False)
class _Blockwise(MaskFunction):
    ids: torch.Tensor

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        of_query, of_key = self.ids[batch_idx, q_idx], self.ids[batch_idx, kv_idx]
        return (of_query == of_key) & (of_query >= 0)

    def _encode(self, program: Program, place: _Place) -> None:
        if self.ids.dtype in ID_DTYPES:
            program.add_table(BLOCKS, "block_sequence_ids", self.ids, place)
        else:
            program.ask(self, place)

    def __repr__(self) -> str:
        return f"blockwise({_shown(self.ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Padding(MaskFunction):
    mask: torch.Tensor

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.mask[batch_idx, kv_idx]

    def _encode(self, program: Program, place: _Place) -> None:
        program.add_table(PADDING, "padding_mask", self.mask, place, by_query=False)
        program.is_boolean = program.is_boolean and self.mask.dtype == torch.bool

    def __repr__(self) -> str:
        return f"padding({_shown(self.mask)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Documents(MaskFunction):
    ids: torch.Tensor

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.ids[batch_idx, q_idx] == self.ids[batch_idx, kv_idx]

    def _encode(self, program: Program, place: _Place) -> None:
        if self.ids.dtype in ID_DTYPES:
            program.add_table(DOCUMENTS, "packed_sequence_mask", self.ids, place)
        else:
            program.ask(self, place)

    def __repr__(self) -> str:
        return f"documents({_shown(self.ids)})"


@dataclass(frozen=True, eq=False, repr=False)
class Function(MaskFunction):
    function: Callable[..., Any]

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(batch_idx, head_idx, q_idx, kv_idx)

    def _encode(self, program: Program, place: _Place) -> None:
        program.ask(self, place)

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None)
        return f"function({name or repr(self.function)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Intersection(MaskFunction):
    rules: tuple[MaskFunction, ...]

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = q_idx.new_ones((), dtype=torch.bool)
        for rule in self.rules:
            result = result & rule(batch_idx, head_idx, q_idx, kv_idx).to(result.device)
        return result

    def _encode(self, program: Program, place: _Place) -> None:
        _encode_all(self.rules, AND, ALL, program, place)

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        shown = {rule._over(q_start, q_end, kv_start, kv_end) for rule in self.rules}
        if Shown.OTHER in shown:
            return Shown.OTHER
        return Shown.CAUSAL if Shown.CAUSAL in shown else Shown.ALL

    def __repr__(self) -> str:
        if len(self.rules) < 2:
            return f"intersection({', '.join(map(repr, self.rules))})"
        return " & ".join(
            f"({rule!r})" if isinstance(rule, _Union) and len(rule.rules) > 1 else repr(rule)
            for rule in self.rules
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Union(MaskFunction):
    rules: tuple[MaskFunction, ...]

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = q_idx.new_zeros((), dtype=torch.bool)
        for rule in self.rules:
            result = result | rule(batch_idx, head_idx, q_idx, kv_idx).to(result.device)
        return result

    def _encode(self, program: Program, place: _Place) -> None:
        _encode_all(self.rules, OR, NOTHING, program, place)

    def _over(self, q_start: int, q_end: int, kv_start: int, kv_end: int) -> Shown:
        shown = {rule._over(q_start, q_end, kv_start, kv_end) for rule in self.rules}
        if Shown.ALL in shown:
            return Shown.ALL
        return Shown.CAUSAL if shown == {Shown.CAUSAL} else Shown.OTHER

    def __repr__(self) -> str:
        if len(self.rules) < 2:
            return f"union({', '.join(map(repr, self.rules))})"
        return " | ".join(map(repr, self.rules))


def _encode_all(
    rules: tuple[MaskFunction, ...], opcode: int, of_none: int, program: Program, place: _Place
) -> None:
    """An and / or of any number of rules; the operators want one at least."""
    if not rules:
        program.code.append(of_none)
    elif len(rules) > 1:
        program.code += (opcode, len(rules))
    for rule in rules:
        rule._encode(program, place)


@dataclass(frozen=True, eq=False, repr=False)
class _Reindex(MaskFunction):
    rule: MaskFunction
    positions: torch.Tensor

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        positions = self.positions
        return self.rule(
            batch_idx, head_idx, positions[batch_idx, q_idx], positions[batch_idx, kv_idx]
        )

    def _encode(self, program: Program, place: _Place) -> None:
        if self.positions.dtype in ID_DTYPES and len(place.above) < _MAX_CHANGES:
            program.add_table(REINDEX, "position_ids", self.positions, place)
            self.rule._encode(program, _Place((*place.above, self), None))
        else:
            program.ask(self, place)

    def __repr__(self) -> str:
        return f"reindex({self.rule!r}, {_shown(self.positions)})"


@dataclass(frozen=True, eq=False, repr=False)
class _Shift(MaskFunction):
    rule: MaskFunction
    q_offset: int | torch.Tensor
    kv_offset: int | torch.Tensor

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.rule(batch_idx, head_idx, q_idx + self.q_offset, kv_idx + self.kv_offset)

    def _encode(self, program: Program, place: _Place) -> None:
        q_add, kv_add = self.q_offset, self.kv_offset
        if (
            isinstance(q_add, torch.Tensor)
            or isinstance(kv_add, torch.Tensor)
            or len(place.above) >= _MAX_CHANGES
        ):
            program.ask(self, place)
            return
        program.code += (SHIFT, q_add, kv_add)
        add = None if place.add is None else (place.add[0] + q_add, place.add[1] + kv_add)
        self.rule._encode(program, _Place((*place.above, self), add))

    def __repr__(self) -> str:
        return f"shift({self.rule!r}, {_shown(self.q_offset)}, {_shown(self.kv_offset)})"


def _whole(name: str, argument: str, value: Any) -> int:
    """An int (of Python, symbolic, or of NumPy), or a float that is one."""
    if isinstance(value, torch.SymInt) or (isinstance(value, int) and is_recording()):
        return value  # type: ignore[return-value]  # it does all that an int does
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        value = int(min(max(value, _SMALLEST), _LARGEST))
    # A tensor has an index, too, but it would have to be read.
    if isinstance(value, torch.Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {argument} to be an int, but got {type(value).__name__}")
    return min(max(operator.index(value), _SMALLEST), _LARGEST)


def _rounded(value: Any, rounding: Callable[[float], int]) -> Any:
    """Sides of windows may be any number: some ints compare with positions as that does."""
    return rounding(value) if isinstance(value, float) and math.isfinite(value) else value


def _tensor(name: str, argument: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: expected {argument} to be a tensor, but got {type(value).__name__}"
        )
    return value


def _offset(argument: str, value: Any) -> int | torch.Tensor:
    return value if isinstance(value, torch.Tensor) else _whole("shift", argument, value)


_causal = _Causal()
_bidirectional = _Bidirectional()


def causal() -> MaskFunction:
    """A query attends to no key behind its own position."""
    return _causal


def bidirectional() -> MaskFunction:
    """A query attends to every key."""
    return _bidirectional


def sliding_window(size: int) -> MaskFunction:
    """A query attends to its own position, the ``size - 1`` before it, and all behind it.

    With ``& causal()``: to ``size`` keys.
    """
    return _Window(_whole("sliding_window", "size", _rounded(size, math.ceil)) - 1, None)


def window(left: int | None, right: int | None) -> MaskFunction:
    """A query at q attends to keys from q - left up to q + right; None is an open side."""
    if left is None and right is None:
        return bidirectional()
    return _Window(
        None if left is None else _whole("window", "left", _rounded(left, math.floor)),
        None if right is None else _whole("window", "right", _rounded(right, math.floor)),
    )


def chunked(size: int, left_padding: torch.Tensor | None = None) -> MaskFunction:
    """A query attends to the keys in its chunk of ``size`` positions.

    ``left_padding``: int [b], where the first chunk of each batch row starts; None for 0.
    """
    size = _whole("chunked", "size", size)
    if size == 0:
        raise ValueError("chunked: expected size not to be 0")
    if left_padding is not None:
        _tensor("chunked", "left_padding", left_padding)
    return _Chunked(size, left_padding)


def blockwise(ids: torch.Tensor) -> MaskFunction:
    """A query attends to the keys with its own id; ids: int [b, n], negative for no block."""
    return _Blockwise(_tensor("blockwise", "ids", ids))


def padding(mask: torch.Tensor) -> MaskFunction:
    """A query attends to the keys that the mask [b, n] shows: bool, or not zero."""
    return _Padding(_tensor("padding", "mask", mask))


def documents(ids: torch.Tensor) -> MaskFunction:
    """A query attends to the keys with its own id; ids: int [b, n]."""
    return _Documents(_tensor("documents", "ids", ids))


def function(mask_function: Callable[..., Any]) -> MaskFunction:
    """Any mask function, as an object; one that is an object already comes back itself."""
    if isinstance(mask_function, MaskFunction):
        return mask_function
    if not callable(mask_function):
        raise TypeError(
            "function: expected mask_function to be callable, "
            f"but got {type(mask_function).__name__}"
        )
    return Function(mask_function)


def intersection(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """A query attends to the keys that it attends to by all of the functions."""
    return _Intersection(_flat(_Intersection, mask_functions))


def union(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """A query attends to the keys that it attends to by any of the functions."""
    return _Union(_flat(_Union, mask_functions))


def _flat(
    kind: type[_Intersection] | type[_Union], mask_functions: tuple[Callable[..., Any], ...]
) -> tuple[MaskFunction, ...]:
    rules: list[MaskFunction] = []
    for mask_function in mask_functions:
        rule = function(mask_function)
        rules += rule.rules if isinstance(rule, kind) else (rule,)
    return tuple(rules)


def reindex(mask_function: Callable[..., Any], positions: torch.Tensor) -> MaskFunction:
    """The function, asked about positions[b, q] and positions[b, k]; int [b, n]."""
    return _Reindex(function(mask_function), _tensor("reindex", "positions", positions))


def shift(
    mask_function: Callable[..., Any],
    q_offset: int | torch.Tensor,
    kv_offset: int | torch.Tensor,
) -> MaskFunction:
    """The function, asked about q + q_offset and k + kv_offset."""
    return _Shift(
        function(mask_function), _offset("q_offset", q_offset), _offset("kv_offset", kv_offset)
    )
