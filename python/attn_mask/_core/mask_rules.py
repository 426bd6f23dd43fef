"""Mask functions as objects: each can be called, and carries the rule that it evaluates.

A mask function takes tensors of indices (batch_idx, head_idx, q_idx, kv_idx) and returns whether
query q_idx attends to key kv_idx: the closures of transformers' ``masking_utils``, the mask_mods of
flex attention. A MaskFunction gives the same (dtype, shape and broadcasting; under torch.vmap
and torch.compile, too), and ``encode()`` gives what ``torch.ops.attn_mask.boolean`` and
``.additive`` need to write the whole mask at once. Trees grow by ``&`` and ``|``, with any
callables::

    causal() & sliding_window(4096) | blockwise(image_ids)

They are immutable, can be copied and pickled (where a callable of the user's can), and are equal
when they have the same structure over the same tensor objects. No value of a tensor is read here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_mask._core.arguments import FAR as FAR
from attn_mask._core.arguments import OPEN as OPEN
from attn_mask._core.arguments import check_rank, side_of
from attn_mask._core.arguments import whole as whole
from attn_mask._core.library import _C
from attn_mask._core.mask_function import ALL as ALL
from attn_mask._core.mask_function import AND as AND
from attn_mask._core.mask_function import NOTHING as NOTHING
from attn_mask._core.mask_function import OR as OR
from attn_mask._core.mask_function import Function as Function
from attn_mask._core.mask_function import Join, shown_value
from attn_mask._core.mask_function import MaskFunction as MaskFunction
from attn_mask._core.mask_function import depth_over as depth_over
from attn_mask._core.mask_function import function as function
from attn_mask._core.mask_function import intersection as intersection
from attn_mask._core.mask_function import rule_of as rule_of
from attn_mask._core.mask_function import union as union
from attn_mask._core.program import ID_DTYPES as ID_DTYPES
from attn_mask._core.program import Coverage as Coverage
from attn_mask._core.program import Place, Program, Source, at, row_of
from attn_mask._core.program import wide as wide
from attn_mask._core.tracing import is_recording

__all__ = [
    "MaskFunction",
    "bidirectional",
    "bits",
    "blockwise",
    "causal",
    "chunked",
    "documents",
    "function",
    "intersection",
    "nothing",
    "padding",
    "reindex",
    "shift",
    "sliding_window",
    "union",
    "window",
]


# The rules of a program; csrc/rule/program.h defines them. Used as globals, which dynamo takes for
# constants: an int that is an attribute of a rule may become symbolic.
CAUSAL = _C.OPCODES["CAUSAL"]
WINDOW = _C.OPCODES["WINDOW"]
CHUNK = _C.OPCODES["CHUNK"]
BLOCKS = _C.OPCODES["BLOCKS"]
PADDING = _C.OPCODES["PADDING"]
DOCUMENTS = _C.OPCODES["DOCUMENTS"]
BITS = _C.OPCODES["BITS"]
REINDEX = _C.OPCODES["REINDEX"]
SHIFT = _C.OPCODES["SHIFT"]

# How often positions may change above a rule: a window may add a shift of its own.
_MAX_CHANGES = _C.MAX_STEPS - 1

_REAL = "of a boolean, integer or real floating dtype"
_OF_BITS = Source("bits", "attends")
_OF_PADDING = Source("padding", "mask")
_OF_DOCUMENTS = Source("documents", "ids")
_OF_BLOCKS = Source("blockwise", "ids")
_OF_CHUNKS = Source("chunked", "left_padding")
_OF_POSITIONS = Source("reindex", "positions")

UPSTREAM_PADDING = Source("padding_mask_function", "padding_mask", is_upstream=True)


@dataclass(frozen=True, eq=False, repr=False)
class _Causal(MaskFunction):
    factory = "causal"
    is_positional = True
    right = 0

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    def encode_into(self, program: Program, place: Place) -> None:
        program.code += (CAUSAL,)


@dataclass(frozen=True, eq=False, repr=False)
class Bidirectional(MaskFunction):
    factory = "bidirectional"
    is_positional = True
    is_upstream: bool = False  # sees nothing before position 0

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx >= 0 if self.is_upstream else q_idx == q_idx  # the shape of an index

    def encode_into(self, program: Program, place: Place) -> None:
        program.code += (ALL,)
        if self.is_upstream:
            program.add_limits(place, None)


@dataclass(frozen=True, eq=False, repr=False)
class _Nothing(MaskFunction):
    factory = "nothing"

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx != q_idx  # the shape of an index, and False

    def encode_into(self, program: Program, place: Place) -> None:
        program.code += (NOTHING,)


@dataclass(frozen=True, eq=False, repr=False)
class Bits(MaskFunction):
    factory = "bits"

    attends: torch.Tensor

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        batch, head = map(row_of, self.attends.shape, (batch_idx, head_idx))
        return self.attends[batch, head, q_idx, kv_idx]

    def encode_into(self, program: Program, place: Place) -> None:
        operand = program.add_operand(_OF_BITS, self.attends)
        program.bits.append(operand)
        program.code += (BITS, operand)


def _joins_bits(rule: MaskFunction) -> bool:
    return isinstance(rule, Join) and any(isinstance(part, Bits) for part in rule.walk())


def with_bits_moved(rule: MaskFunction, q_add: int, kv_add: int) -> MaskFunction:
    """The rule for positions from which bits' rows and columns are so far away."""
    if isinstance(rule, Bits):
        return Shift(rule, q_add, kv_add, rule.depth + 1)
    if _joins_bits(rule):
        return rule.with_parts(lambda part: with_bits_moved(part, q_add, kv_add))
    return rule


@dataclass(frozen=True, eq=False, repr=False)
class Window(MaskFunction):
    is_positional = True

    left: int | None
    right: int | None

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        # The side that is subtracted can't overflow, however wide the window.
        if self.right is None:
            return kv_idx >= q_idx - self.left
        if self.left is None:
            return kv_idx - self.right <= q_idx
        return (kv_idx >= q_idx - self.left) & (kv_idx - self.right <= q_idx)

    def encode_into(self, program: Program, place: Place) -> None:
        sides = [_C.ABSENT if side is None else side for side in (self.left, self.right)]
        shifted = [side is not None and side < 0 for side in (self.left, self.right)]
        if any(shifted) and None not in (self.left, self.right):
            program.code += (AND, 2)
            Window(self.left, None).encode_into(program, place)
            Window(None, self.right).encode_into(program, place)
        elif any(shifted):  # such a side would mean an open one
            add = -sides[0] if shifted[0] else sides[1]
            program.code += (SHIFT, add, 0, WINDOW, *(0 if of else _C.ABSENT for of in shifted))
        else:
            program.code += (WINDOW, *sides)

    def _repr(self) -> str:
        if self.left is not None and self.right is None:
            return f"sliding_window({self.left + 1})"
        return f"window({self.left}, {self.right})"


@dataclass(frozen=True, eq=False, repr=False)
class Chunked(MaskFunction):
    factory = "chunked"

    size: int
    left_padding: torch.Tensor | None
    source: Source = _OF_CHUNKS

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if self.left_padding is None:
            return kv_idx // self.size == q_idx // self.size
        row = batch_idx
        if not self.source.is_upstream:
            row = row_of(self.left_padding.shape[0], batch_idx)
        start = wide(self.left_padding[row])
        return (kv_idx - start) // self.size == (q_idx - start) // self.size

    def encode_into(self, program: Program, place: Place) -> None:
        start = self.left_padding
        if self.size < 0 or (start is not None and start.dtype not in ID_DTYPES):
            program.add_call(self, place)
            return
        operand = _C.ABSENT
        if start is not None:
            check_rank(str(self.source), start, (1,), "1-D [batch_size]")
            operand = program.add_operand(self.source, start)
        program.code += (CHUNK, self.size, operand)

    @property
    def is_positional(self) -> bool:  # type: ignore[override]
        return self.left_padding is None


@dataclass(frozen=True, eq=False, repr=False)
class _OfIds(MaskFunction):
    """A rule that compares the ids of query and key."""

    ids: torch.Tensor
    source: Source

    def _ids_at(self, batch_idx: Any, idx: Any) -> Any:
        return at(self.ids, self.source, batch_idx, idx)

    def _encode_as(self, opcode: int, program: Program, place: Place) -> None:
        if self.ids.dtype in ID_DTYPES:
            program.add_table(opcode, self.source, self.ids, place)
        else:
            program.add_call(self, place)


@dataclass(frozen=True, eq=False, repr=False)
class Blockwise(_OfIds):
    factory = "blockwise"
    source: Source = _OF_BLOCKS

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        of_query = self._ids_at(batch_idx, q_idx)
        return (of_query == self._ids_at(batch_idx, kv_idx)) & (of_query >= 0)

    def encode_into(self, program: Program, place: Place) -> None:
        self._encode_as(BLOCKS, program, place)


@dataclass(frozen=True, eq=False, repr=False)
class Padding(MaskFunction):
    factory = "padding"

    mask: torch.Tensor
    source: Source = _OF_PADDING
    name: str | None = field(default=None, compare=False)

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        shown = at(self.mask, self.source, batch_idx, kv_idx)
        return shown if self.source.is_upstream else shown.bool()

    def encode_into(self, program: Program, place: Place) -> None:
        program.add_table(PADDING, self.source, self.mask, place, by_query=False)
        if self.source.is_upstream and self.mask.dtype != torch.bool:
            program.is_boolean = False

    def _repr(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"padding({shown_value(self.mask)}{name})"


@dataclass(frozen=True, eq=False, repr=False)
class Documents(_OfIds):
    factory = "documents"
    source: Source = _OF_DOCUMENTS
    limits: tuple[int, int] | None = None
    """How many there are at most, and how long, where the caller says so."""

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self._ids_at(batch_idx, q_idx) == self._ids_at(batch_idx, kv_idx)

    def encode_into(self, program: Program, place: Place) -> None:
        self._encode_as(DOCUMENTS, program, place)
        program.has_documents, program.limits = True, self.limits


@dataclass(frozen=True, eq=False, repr=False)
class Reindex(MaskFunction):
    factory = "reindex"

    rule: MaskFunction
    positions: torch.Tensor
    depth: int
    source: Source = _OF_POSITIONS

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_position = wide(at(self.positions, self.source, batch_idx, q_idx))
        kv_position = wide(at(self.positions, self.source, batch_idx, kv_idx))
        return self.rule.evaluate(batch_idx, head_idx, q_position, kv_position)

    def encode_into(self, program: Program, place: Place) -> None:
        if self.positions.dtype in ID_DTYPES and len(place.above) < _MAX_CHANGES:
            program.add_table(REINDEX, self.source, self.positions, place)
            self.rule.encode_into(program, Place((*place.above, self), None))
        else:
            program.add_call(self, place)


@dataclass(frozen=True, eq=False, repr=False)
class Shift(MaskFunction):
    factory = "shift"

    rule: MaskFunction
    q_offset: int | torch.Tensor
    kv_offset: int | torch.Tensor
    depth: int

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_idx, kv_idx = q_idx + wide(self.q_offset), kv_idx + wide(self.kv_offset)
        return self.rule.evaluate(batch_idx, head_idx, q_idx, kv_idx)

    def encode_into(self, program: Program, place: Place) -> None:
        q_add, kv_add = self.q_offset, self.kv_offset
        if (
            isinstance(q_add, torch.Tensor)
            or isinstance(kv_add, torch.Tensor)
            or len(place.above) >= _MAX_CHANGES
        ):
            program.add_call(self, place)
            return
        program.code += (SHIFT, q_add, kv_add)
        add = None if place.add is None else (place.add[0] + q_add, place.add[1] + kv_add)
        self.rule.encode_into(program, Place((*place.above, self), add))


def sized_window(name: str, argument: str, size: Any) -> MaskFunction:
    """sliding_window of any size: with ``& causal()`` one below 1 shows nothing."""
    return Window(side_of(name, argument, size, math.ceil) - 1, None)


# For eager code, so that their programs are made once. Not for graphs: dynamo does not guard an
# argument that is the same object as a global, and would run the graph for other arguments, too.
_causal, _nothing, _bidirectional = _Causal(), _Nothing(), Bidirectional()


def causal() -> MaskFunction:
    """A query attends to no key after its own position.

    >>> attn_mask.show(attn_mask.causal(), 4)
    █▄··
    ███▄
    """
    return _Causal() if is_recording() else _causal


def bidirectional() -> MaskFunction:
    """A query attends to every key.

    >>> attn_mask.show(attn_mask.bidirectional(), 2, 4)
    ████
    """
    return Bidirectional() if is_recording() else _bidirectional


def nothing() -> MaskFunction:
    """A query attends to no key.

    >>> attn_mask.show(attn_mask.nothing(), 2, 4)
    ····
    """
    return _Nothing() if is_recording() else _nothing


def bits(attends: torch.Tensor) -> MaskFunction:
    """A query attends to the keys that a boolean tensor marks.

    ``attends``: bool [b or 1, heads or 1, q, kv], for the rows and columns of the mask, wherever
    they stand: shift and reindex leave it alone. Raises TypeError for other dtypes, ValueError for
    another rank.

    >>> attn_mask.show(attn_mask.bits(torch.eye(2, 4, dtype=torch.bool)[None, None]), 2, 4)
    ▀▄··
    """
    return Bits(_OF_BITS.checked(attends, "bool", (4,)))


def sliding_window(size: int) -> MaskFunction:
    """A query attends to its own position, the ``size - 1`` before it, and all after it.

    With ``& causal()``: to ``size`` keys. Raises ValueError for a size below 1, TypeError for what
    is no whole number.

    >>> attn_mask.show(attn_mask.causal() & attn_mask.sliding_window(2), 4)
    █▄··
    ·▀█▄
    """
    rule = sized_window("sliding_window", "size", size)
    if size < 1:
        raise ValueError(f"sliding_window: expected size to be positive, but got {size}")
    return rule


def window(left: int | None, right: int | None) -> MaskFunction:
    """A query at q attends to keys from q - left up to q + right; None is an open side.

    Raises ValueError where no key lies between the two, TypeError for what is no number.

    >>> attn_mask.show(attn_mask.window(1, 0), 4)
    █▄··
    ·▀█▄
    """
    if left is None and right is None:
        return bidirectional()
    rule = any_window("window", left, right)
    for argument, side in (("left", left), ("right", right)):
        if side is not None and side <= -FAR:
            raise ValueError(
                f"window: expected {argument} to be more than -2^59, or None for an open side, "
                f"but got {side}"
            )
    if rule.left is not None and rule.right is not None and rule.left + rule.right < 0:
        raise ValueError(
            "window: expected left and right to leave a key visible (an open side is None, not "
            f"-1), but got {left} and {right}"
        )
    return rule


def any_window(name: str, left: Any, right: Any) -> Window:
    """window, also where no key lies between the two sides."""
    return Window(
        None if left is None else side_of(name, "left", left, math.floor),
        None if right is None else side_of(name, "right", right, math.floor),
    )


def chunked(size: int, left_padding: torch.Tensor | None = None) -> MaskFunction:
    """A query attends to the keys in its chunk of ``size`` positions.

    ``left_padding``: int [b], where the first chunk of each batch row starts, or [1] for all; None
    for 0. Raises ValueError for a size below 1 and for another rank, TypeError for other dtypes.

    >>> attn_mask.show(attn_mask.chunked(2), 4)
    ██··
    ··██
    """
    size = whole("chunked", "size", size)
    if size == 0:
        raise ValueError("chunked: expected size not to be 0")
    if size < 0:
        raise ValueError(f"chunked: expected size to be positive, but got {size}")
    if left_padding is not None:
        _OF_CHUNKS.checked(left_padding, ranks=(1,))
    return Chunked(size, left_padding)


def blockwise(ids: torch.Tensor) -> MaskFunction:
    """A query attends to the keys with its own id, unless that is negative.

    ``ids``: int [b, n], or [n] or [1, n] for all batch rows. Raises TypeError for other dtypes,
    ValueError for another rank.

    >>> attn_mask.show(attn_mask.blockwise(torch.tensor([0, 0, -1, 1])), 4)
    ██··
    ···▄
    """
    return Blockwise(_OF_BLOCKS.checked(ids))


def padding(mask: torch.Tensor, *, name: str | None = None) -> MaskFunction:
    """A query attends to the keys that the mask shows: bool, or not zero.

    ``mask``: [b, n], or [n] or [1, n] for all batch rows. ``name``: what explain and repr call it,
    where it is no padding (a prompt); rules are equal whatever their names. Raises TypeError for
    complex dtypes and other names, ValueError for another rank.

    >>> attn_mask.show(attn_mask.padding(torch.tensor([0, 1, 1, 1])), 2, 4)
    ·███
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"padding: expected name to be a str, but got {type(name).__name__}")
    return Padding(_OF_PADDING.checked(mask, _REAL), _OF_PADDING, name)


def documents(
    ids: torch.Tensor, *, max_documents: int | None = None, max_length: int | None = None
) -> MaskFunction:
    """A query attends to the keys with its own id; int ids, otherwise as for blockwise.

    ``max_documents`` and ``max_length``: a promise that ids are contiguous, and upper bounds on the
    number (over the batch) and the length of documents. With both, attention needs no host sync on
    a GPU, and takes the fastest kernel in graphs, too.

    >>> attn_mask.show(attn_mask.documents(torch.tensor([0, 0, 0, 1])), 4)
    ███·
    ▀▀▀▄
    """
    limits = None
    if max_documents is not None or max_length is not None:
        limits = _limit("max_documents", max_documents), _limit("max_length", max_length)
    return Documents(_OF_DOCUMENTS.checked(ids), _OF_DOCUMENTS, limits)


def _limit(argument: str, value: Any) -> int:
    if value is None:
        raise ValueError(
            "documents: expected max_documents and max_length, or neither of them, "
            f"but got no {argument}"
        )
    limit = whole("documents", argument, value)
    if not is_recording() and limit <= 0:
        raise ValueError(f"documents: expected {argument} to be positive, but got {value}")
    return limit


def reindex(mask_function: Callable[..., Any], positions: torch.Tensor) -> MaskFunction:
    """The function, evaluated at positions[b, q] and positions[b, k].

    ``positions``: int [b, n], or [n] or [1, n] for all batch rows. Raises TypeError for other
    dtypes, ValueError for another rank.
    """
    checked = _OF_POSITIONS.checked(positions)
    return reindexed("reindex", mask_function, checked, _OF_POSITIONS)


def reindexed(
    name: str, mask_function: Callable[..., Any], positions: torch.Tensor, source: Source
) -> MaskFunction:
    """reindex of any positions that the source takes."""
    rule = rule_of(name, "mask_function", mask_function)
    if isinstance(rule, Bits):
        # Where positions are unknown, nothing is visible; where they are below 0, all is.
        return intersection(rule, reindexed(name, intersection(), positions, source))
    if _joins_bits(rule):
        return rule.with_parts(lambda branch: reindexed(name, branch, positions, source))
    return Reindex(rule, positions, depth_over(name, [rule]), source)


def shift(
    mask_function: Callable[..., Any],
    q_offset: int | torch.Tensor,
    kv_offset: int | torch.Tensor,
) -> MaskFunction:
    """The function, evaluated at q + q_offset and k + kv_offset.

    Offsets: ints within 2^59 of 0, else ValueError; or tensors that add to indices.
    """
    rule = rule_of("shift", "mask_function", mask_function)
    if isinstance(rule, Bits):
        return rule
    if _joins_bits(rule):
        return rule.with_parts(lambda branch: shift(branch, q_offset, kv_offset))
    q_add, kv_add = _offset("q_offset", q_offset), _offset("kv_offset", kv_offset)
    return Shift(rule, q_add, kv_add, depth_over("shift", [rule]))


def _offset(argument: str, value: Any) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    offset = whole("shift", argument, value)
    if not is_recording() and not -FAR < offset < FAR:
        raise ValueError(f"shift: expected {argument} to be within 2^59 of 0, but got {value}")
    return offset
