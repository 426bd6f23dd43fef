"""Writes the mask of a rule: what ``masks``, ``block_mask`` and the mirrors stand on.

A rule is written by one call of an operator. Callables of the user's within it are evaluated first,
in eager code some rows at a time; while tracing, the whole tree is one broadcast expression.

Shapes: b batch_size, h heads, q q_length, kv kv_length.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_mask._core import mask_rules
from attn_mask._core.arguments import (
    check_rank,
    check_strided,
    checked_device,
    checked_int,
    checked_ints,
)
from attn_mask._core.events import count
from attn_mask._core.library import _C
from attn_mask._core.log_once import log_detail_once, warn_once
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.operators import operators, writing_to
from attn_mask._core.program import Program
from attn_mask._core.tracing import (
    default_device,
    evaluate_mapped,
    indexing_under_vmap,
    is_jit_tracing,
    is_known,
    is_recording,
    is_tracing,
)

Offset = int | torch.Tensor
Sizes = tuple[int, int, int]
"""(batch_size, q_length, kv_length)"""


class Geometry(NamedTuple):
    """How large a mask is, and at which positions its queries and keys begin."""

    batch_size: int
    q_length: int
    q_offset: Any
    """An int, a tensor, or an Axis of listed positions."""
    kv_length: int
    kv_offset: Any


_CPU = torch.device("cpu")

# Elements of a mask that one call of a user's function evaluates. A function that calculates
# with positions holds a few int64 for each element: some ten MB.
_TILE = 2**20


class MaskFormat(NamedTuple):
    """How a mask is written: as booleans, or added to scores."""

    dtype: torch.dtype | None = None  # of an additive mask; None: boolean
    bias: torch.Tensor | None = None
    unmask_unattended: bool = False
    masked_value: float | None = None
    out: torch.Tensor | None = None

    def of_rows(self, rows: "Axis") -> "MaskFormat":
        return self._replace(bias=rows.of_mask(self.bias), out=rows.of_mask(self.out))

    def write(
        self,
        ops: Any,
        code: list[int],
        operands: list[Any],
        sizes: Sizes,
        where: tuple[Any, Any, torch.Tensor | None, torch.Tensor | None],
        device: torch.device,
    ) -> torch.Tensor:
        """The mask of an encoded rule; ``where`` are the offsets and the positions."""
        if self.out is not None:
            ops = writing_to(self.out, ops)
        mask: torch.Tensor
        if self.dtype is None:
            mask = ops.boolean(code, operands, *sizes, *where, device, self.unmask_unattended)
        else:
            of_additive = self.bias, device, self.unmask_unattended, self.masked_value
            mask = ops.additive(code, operands, *sizes, self.dtype, *where, *of_additive)
        return mask

    def convert(
        self, name: str, attends: torch.Tensor, ops: Any, is_recorded: bool
    ) -> torch.Tensor:
        """A mask of booleans in this format."""
        if self.dtype is not None or self.unmask_unattended:
            check_boolean(name, attends)
        device = attends.device
        if not is_recorded and (self.dtype is not None or self.out is not None):
            # The operator checks the value, the bias and `out`.
            code, (b, _, q, kv) = mask_rules.bits(attends).known_program.code, attends.shape
            return self.write(ops, code, [attends], (b, q, kv), _AT_ZERO, device)
        if self.unmask_unattended:
            attends = attends | ~attends.any(-1, keepdim=True)
        mask = attends
        if self.dtype is not None:
            # One element by the operator, which checks the value.
            one = MaskFormat(self.dtype, masked_value=self.masked_value)
            masked = one.write(ops, [mask_rules.NOTHING], [], (1, 1, 1), _AT_ZERO, device)
            zero = torch.zeros((), dtype=self.dtype, device=device)
            mask = torch.where(attends, zero if self.bias is None else self.bias, masked)
        return mask if self.out is None else copied_to(name, self.out, mask)


_AT_ZERO = (0, 0, None, None)
BOOLEAN = MaskFormat()


def tile_height(elements: int) -> int:
    """How many rows of a mask, of so many elements each, are evaluated at once."""
    return max(1, _TILE // max(1, elements))


class Axis(NamedTuple):
    """The positions of the queries (or the keys): ``start`` + i, added to the tensor's."""

    length: int
    start: int = 0
    positions: torch.Tensor | None = None
    """[] or [b, 1] for offsets; [length] or [b, length] for each."""
    first: int = 0
    """Which row (or column) of the mask the first is."""
    of: int | None = None
    """How many the mask has, where these are a part of them."""

    def rows(self, first: int, end: int) -> "Axis":
        """A part of them."""
        of = self.length if self.of is None else self.of
        positions = self.positions
        if positions is not None and positions.dim() > 0 and positions.shape[-1] != 1:
            part = positions[..., first:end]
            return Axis(end - first, self.start, part, self.first + first, of)
        return Axis(end - first, self.start + first, positions, self.first + first, of)

    def tiles(self, elements: int) -> Iterator["Axis"]:
        """Parts of them, for a mask with so many elements for each."""
        height = tile_height(elements)
        for first in range(0, self.length, height):
            yield self.rows(first, min(first + height, self.length))

    def of_mask(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """What a tensor with a row for each of the mask's, [b, h, q, kv], holds for these."""
        if tensor is None or self.of is None:
            return tensor
        return tensor[:, :, self.first : self.first + self.length]

    def indices(self, device: torch.device) -> torch.Tensor:
        """All the positions: [length] or [b, length]."""
        indices = torch.arange(self.length, device=device)
        if self.positions is None:
            return indices + self.start
        # `start` may be too large for the dtype of the tensor.
        positions = self.positions.to(torch.int64) + self.start
        if positions.dim() > 0 and positions.shape[-1] == self.length:
            return positions
        return indices + positions


def axis(
    name: str, argument: str, length: int, offset: "Offset | Axis", device: torch.device
) -> Axis:
    """The axis of an offset, which is ``argument`` of the function ``name``."""
    if isinstance(offset, Axis):
        return offset
    if type(offset) is int and -mask_rules.FAR < offset < mask_rules.FAR:
        return Axis(length, offset)
    if not isinstance(offset, torch.Tensor):
        if not is_recording() and not isinstance(offset, torch.SymInt):
            offset = checked_int(name, argument, offset)
            if not -mask_rules.FAR < offset < mask_rules.FAR:
                raise ValueError(
                    f"{name}: expected {argument} to be within 2^59 of 0, but got {offset}"
                )
        return Axis(length, offset)
    offset = offset.to(device)
    if offset.dim() == 1 and offset.shape[0] == 1:
        offset = offset[0]
    # What the sum of the two means upstream.
    is_listed = offset.dim() == 1 and offset.shape[0] == length
    if not is_listed and offset.dim() != 0 and (offset.dim() != 2 or offset.shape[1] != 1):
        raise ValueError(
            f"{name}: expected {argument} to be an int, or a tensor [] or [batch_size, 1], "
            f"but got {list(offset.shape)}"
        )
    check_position_dtype(name, argument, offset)
    if is_listed:
        offset = torch.arange(length, device=device) + offset
    return Axis(length, 0, offset)


def checked_offsets(
    name: str, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any
) -> tuple[Any, Any]:
    """Offsets that are not negative; by default, the last query stands at the last key."""
    are_ints = type(q_length) is type(kv_length) is type(kv_offset) is int
    if q_offset is None and are_ints and q_length <= kv_length and 0 <= kv_offset < mask_rules.FAR:
        return kv_offset + kv_length - q_length, kv_offset
    kv_offset = _not_negative(name, "kv_offset", kv_offset)
    if q_offset is not None:
        return _not_negative(name, "q_offset", q_offset), kv_offset
    q_offset = mask_rules.wide(kv_offset)
    if not is_known(kv_length == 0):  # without keys any will do
        q_offset = q_offset + (kv_length - q_length)
    if not isinstance(q_offset, torch.Tensor) and is_known(q_offset < 0):
        raise ValueError(
            f"{name}: expected q_offset where there are more queries than keys, "
            f"but got {q_length} queries, {kv_length} keys and no q_offset"
        )
    return q_offset, kv_offset


def _not_negative(name: str, argument: str, offset: Any) -> Any:
    if type(offset) is int and 0 <= offset < mask_rules.FAR:
        return offset
    (value,) = checked_ints(name, **{argument: offset})
    if not isinstance(value, torch.Tensor) and is_known(value < 0):
        raise ValueError(f"{name}: expected {argument} not to be negative, but got {value}")
    return value


def check_position_dtype(name: str, argument: str, positions: torch.Tensor) -> None:
    if positions.dtype not in mask_rules.ID_DTYPES:
        raise TypeError(
            f"{name}: expected {argument} to be uint8 or a signed integer, "
            f"but got {positions.dtype}"
        )


def check_padding(name: str, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is None:
        return
    check_strided(name, "attention_mask", attention_mask)
    expected = f"{name}: expected attention_mask"
    check_rank(expected, attention_mask, (2,), "2-D [batch_size, length]")


def padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """[b, n], with ``value`` after it up to ``length``."""
    missing = length - tensor.shape[-1]
    return F.pad(tensor, (0, missing), value=value) if missing > 0 else tensor


def copied_to(name: str, out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``out``, which holds the mask then."""
    if out.shape != mask.shape or out.dtype != mask.dtype:
        raise ValueError(
            f"{name}: expected out to be {list(mask.shape)} of {mask.dtype}, "
            f"but got {list(out.shape)} of {out.dtype}"
        )
    return out.copy_(mask)


class Calls(NamedTuple):
    """How callables in a rule are called."""

    heads: int = 1  # for how many of them
    by_vmap: bool = False  # for one element at a time
    is_of_one_head: bool = False
    """Whether a result must not depend on the head in eager code: ``heads`` is 1, but more may
    follow."""


class _Problem(NamedTuple):
    """Which elements of which mask are wanted."""

    name: str  # of the function that was called, for errors
    batch_size: int
    queries: Axis
    keys: Axis
    device: torch.device
    calls: Calls
    ops: Any
    is_recorded: bool

    def evaluate(self, mask_function: Callable[..., Any]) -> torch.Tensor:
        """A mask function's result: broadcast over [b, h, q, kv] or, by vmap, of that shape."""
        device = self.device
        batch_idx = torch.arange(self.batch_size, device=device)
        head_idx = torch.arange(self.calls.heads, device=device)
        if not self.is_recorded:
            count("fallback")
            self._name_called(mask_function)
            for line, of in (("q", self.queries), ("kv", self.keys)):
                self._check_positions(line, of)
        q_idx, kv_idx = self.queries.indices(device), self.keys.indices(device)
        if self.calls.by_vmap:
            of_batch = (0, None, *(0 if idx.dim() == 2 else None for idx in (q_idx, kv_idx)))
            of_one = ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), of_batch)
            for in_dims in of_one:
                mask_function = torch.vmap(mask_function, in_dims=in_dims)
            with indexing_under_vmap():
                result = mask_function(batch_idx, head_idx, q_idx, kv_idx)
        else:
            if self.calls.is_of_one_head:
                mask_function = partial(self._of_one_head, mask_function)
            q_idx, kv_idx = (idx[None] if idx.dim() == 1 else idx for idx in (q_idx, kv_idx))
            result = mask_function(
                batch_idx[:, None, None, None],
                head_idx[None, :, None, None],
                q_idx[:, None, :, None],
                kv_idx[:, None, None, :],
            )
        if not isinstance(result, torch.Tensor):
            raise TypeError(
                f"{self.name}: expected mask_function to return a bool tensor, "
                f"but got {type(result).__name__}"
            )
        return result

    def _of_one_head(self, function: Any, batch_idx: Any, head_idx: Any, *positions: Any) -> Any:
        """A mask function's result. Raises ValueError where that depends on the head."""

        def of_head(head: torch.Tensor) -> Any:
            return function(batch_idx, head, *positions)

        try:
            result, depends = evaluate_mapped(of_head, head_idx)
        except Exception:
            try:
                evaluate_mapped(lambda _: of_head(head_idx), head_idx)
            except Exception:  # a function that fails, or that vmap can't run at all
                return of_head(head_idx)
            depends = True  # it fails of a head that is mapped over: it reads the head's number
        if depends:
            raise ValueError(
                f"{self.name}: expected heads to be how many there are, since the result of "
                f"{function!r} depends on the head, but got 1"
            )
        return result

    def _name_called(self, mask_function: Callable[..., Any]) -> None:
        called: Any = mask_function
        while isinstance(called, mask_rules.Reindex | mask_rules.Shift):
            called = called.rule
        if isinstance(called, MaskFunction) and not isinstance(called, mask_rules.Function):
            log_detail_once("%s: evaluates %s element by element", self.name, type(called).__name__)
            return
        called = getattr(called, "function", called)
        called = getattr(called, "__qualname__", type(called).__name__)
        warn_once(
            f"call of {called}",
            "%s: calls a mask function that is no rule, %s, for each element of a mask: it takes "
            "many times as long as a rule of attn_mask.rules (see is_native there)",
            self.name,
            called,
        )

    def _check_positions(self, line: str, of: Axis) -> None:
        """Operators check this themselves."""
        shape = () if of.positions is None else tuple(of.positions.shape)
        if len(shape) > 2 or any(
            size not in (1, most)
            for size, most in zip(reversed(shape), (of.length, self.batch_size), strict=False)
        ):
            raise ValueError(
                f"{self.name}: expected {line}_offset and {line}_positions to be for [batch_size, "
                f"length] = {[self.batch_size, of.length]}, but got {list(shape)}"
            )

    def as_bits(self, result: torch.Tensor, at_least: int) -> torch.Tensor:
        """The result of a mask function, of some rank at least, as [b or 1, h or 1, q, kv]."""
        check_boolean(self.name, result)
        q_length, kv_length = self.queries.length, self.keys.length
        limits = (kv_length, q_length, None, self.batch_size)
        fits = at_least <= result.dim() <= 4 and all(
            limit is None or size in (1, limit)
            for size, limit in zip(reversed(result.shape), limits, strict=False)
        )
        if not fits:
            raise ValueError(
                f"{self.name}: expected mask_function to return a tensor that can be expanded to "
                f"[{self.batch_size}, 1, {q_length}, {kv_length}], but got {list(result.shape)}"
            )
        result = result[(None,) * (4 - result.dim())]
        return result.expand(-1, -1, q_length, kv_length)

    @property
    def sizes(self) -> Sizes:
        return self.batch_size, self.queries.length, self.keys.length

    def write(self, code: list[int], operands: list[Any], mask_format: MaskFormat) -> torch.Tensor:
        """The mask of an encoded rule, by the operators."""
        queries, keys = self.queries, self.keys
        where = queries.start, keys.start, queries.positions, keys.positions
        return mask_format.write(self.ops, code, operands, self.sizes, where, self.device)

    def write_in_tiles(
        self, write: Callable[["_Problem"], torch.Tensor], out: torch.Tensor | None
    ) -> torch.Tensor:
        """A mask, so many rows at a time that what lies beside it stays small."""
        elements = self.batch_size * self.calls.heads * self.keys.length
        parts = [self._replace(queries=rows) for rows in self.queries.tiles(elements)]
        if len(parts) < 2:
            return write(self)
        try:
            tile = write(parts[0])
        except (RuntimeError, ValueError, IndexError):
            tile = None
        if tile is None:
            # A function that holds something of the whole mask's size works for the whole only;
            # any other error will be raised again.
            return write(self)
        mask = out
        if mask is None:
            mask = tile.new_empty((*tile.shape[:2], self.queries.length, self.keys.length))
        for index, part in enumerate(parts):
            tile = write(part) if index > 0 else tile
            if out is None:
                first = part.queries.first - self.queries.first
                mask[:, :, first : first + part.queries.length] = tile
        return mask


def write_mask(
    name: str,
    mask_function: Callable[..., Any],
    geometry: Geometry,
    padding_mask: torch.Tensor | None,
    device: torch.device | str | None,
    mask_format: MaskFormat = BOOLEAN,
    calls: Calls = Calls(),  # noqa: B008 - immutable
) -> torch.Tensor:
    """The mask [b, 1 or heads, q, kv] of a rule or any mask function.

    Args:
        name: of the function that was called, for errors.
        padding_mask: which keys are not padding, bool [b, n]; those after its end are.
    """
    # An operator without tensor arguments does not see `with torch.device(...)`: resolve it here.
    if device == "cpu":
        device = _CPU
    elif not isinstance(device, torch.device):
        device = default_device() if device is None else checked_device(name, device)
    if device.type == "cpu":
        device = _CPU  # "cpu:0" is another device to torch
    rule = mask_function
    if not isinstance(rule, MaskFunction):
        rule = mask_rules.rule_of(name, "mask_function", mask_function)
    ops = operators()
    program = rule.known_program if ops is _C else rule.program
    mask = write_at_once(ops, program, geometry, padding_mask, device, mask_format)
    if mask is not None:
        return mask
    is_recorded = ops is not _C and is_recording()
    batch_size, q_length, q_offset, kv_length, kv_offset = geometry
    if not is_recorded:
        sizes = batch_size, q_length, kv_length
        for argument, size in zip(("batch_size", "q_length", "kv_length"), sizes, strict=True):
            if not isinstance(size, torch.Tensor):  # transformers passes those, too
                checked_int(name, argument, size)
            if size < 0:
                raise ValueError(f"{name}: expected {argument} to be a size (>= 0), but got {size}")
    check_padding(name, padding_mask)
    # Keys first: by default, where queries stand depends on them.
    keys = axis(name, "kv_offset", kv_length, kv_offset, device)
    queries = axis(name, "q_offset", q_length, q_offset, device)
    is_of_one_head = calls.is_of_one_head and len(program.calls) > 0 and not is_recorded
    calls = calls._replace(is_of_one_head=is_of_one_head)
    problem = _Problem(name, batch_size, queries, keys, device, calls, ops, is_recorded)
    if _is_by_call(problem, program, padding_mask, mask_format):
        return _write_called(problem, rule, program, padding_mask, kv_offset, mask_format)
    is_root = padding_mask is None and isinstance(rule, mask_rules.Function)
    return _write_program(problem, program, padding_mask, mask_format, 4 if is_root else 0)


def _write_called(
    problem: _Problem,
    rule: MaskFunction,
    program: Program,
    padding_mask: torch.Tensor | None,
    kv_offset: Any,
    mask_format: MaskFormat,
) -> torch.Tensor:
    """The mask of a whole tree that is called, as one broadcast expression."""
    operands = _operands(problem, program, padding_mask)
    if program.bits:
        _bits_of(problem.queries, program, operands)
        rule = _with_bits_at(problem, rule)
    batch_size, q_length, kv_length = problem.sizes
    if padding_mask is not None:
        whole = padded(padding_mask, kv_length + kv_offset, 0)
        rule = mask_rules.intersection(rule, mask_rules.Padding(whole, mask_rules.UPSTREAM_PADDING))
    mask = problem.evaluate(rule)
    if not problem.calls.by_vmap:
        mask = mask.expand(batch_size, -1, q_length, kv_length)
    return mask_format.convert(problem.name, mask, problem.ops, problem.is_recorded)


def _write_program(
    problem: _Problem,
    program: Program,
    padding_mask: torch.Tensor | None,
    mask_format: MaskFormat,
    least_rank: int,
) -> torch.Tensor:
    """The mask of a program, in which results of callables, of some rank at least, are bits."""
    operands = _operands(problem, program, padding_mask)
    code = program.code if padding_mask is None else program.padded_code

    def write(part: _Problem) -> torch.Tensor:
        filled = _bits_of(part.queries, program, operands)
        for operand, function in program.calls:
            filled[operand] = part.as_bits(part.evaluate(function), least_rank)
        return part.write(code, filled, mask_format.of_rows(part.queries))

    return problem.write_in_tiles(write, mask_format.out) if program.calls else write(problem)


def write_at_once(
    ops: Any,
    program: Program,
    geometry: Geometry,
    padding_mask: torch.Tensor | None,
    device: torch.device,
    mask_format: MaskFormat,
) -> torch.Tensor | None:
    """The mask in the common case, in which one operator is all that is needed; else None."""
    batch_size, q_length, q_offset, kv_length, kv_offset = geometry
    if ops is not _C or type(q_offset) is not int or type(kv_offset) is not int:
        return None
    if not program.is_written(
        batch_size, q_offset, q_offset + q_length, kv_offset, kv_offset + kv_length, device
    ):
        return None
    code, operands = program.code, program.operands
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, torch.Tensor)
            or padding_mask.dtype != torch.bool
            or padding_mask.dim() != 2
            or padding_mask.shape[0] != batch_size
            or padding_mask.device != device
        ):
            return None
        code, operands = program.padded_code, [*operands, padding_mask]
    sizes, where = (batch_size, q_length, kv_length), (q_offset, kv_offset, None, None)
    return mask_format.write(ops, code, operands, sizes, where, device)


def _is_by_call(
    problem: _Problem,
    program: Program,
    padding_mask: torch.Tensor | None,
    mask_format: MaskFormat,
) -> bool:
    """Whether a whole tree is called, and not only callables in it."""
    dtype = torch.bool if padding_mask is None else padding_mask.dtype
    # Upstream's conjunction with integers is of integers, which an additive mask can't be made of.
    if dtype != torch.bool and (mask_format.dtype is not None or dtype not in mask_rules.ID_DTYPES):
        raise TypeError(f"{problem.name}: expected attention_mask to be bool, but got {dtype}")
    is_before_tables = program.check_positions(
        problem.name, problem.queries, problem.keys, problem.is_recorded
    )
    return (
        dtype != torch.bool
        or is_before_tables
        or not program.is_boolean
        or is_jit_tracing()  # it would fix an operator's sizes
        or (len(program.calls) > 0 and is_tracing(padding_mask))
    )


def _operands(problem: _Problem, program: Program, padding_mask: torch.Tensor | None) -> list[Any]:
    """The operands and the padding mask on the device of the mask, with its rows."""
    operands, batch_size = program.operands, problem.batch_size
    if not problem.is_recorded:
        operands = program.fitting(batch_size, problem.device)
    if padding_mask is None:
        return operands
    if not problem.is_recorded:
        if padding_mask.shape[0] < batch_size:
            raise ValueError(
                f"{problem.name}: expected attention_mask to have {batch_size} rows, "
                f"but got {list(padding_mask.shape)}"
            )
        # A mask function leaves rows beyond the batch alone.
        padding_mask = padding_mask[:batch_size].to(problem.device)
    return [*operands, padding_mask]


def _bits_of(queries: Axis, program: Program, operands: list[Any]) -> list[Any]:
    """A copy of the operands for a part of the queries: bits have a row for each of the mask."""
    operands = list(operands)
    for index in program.bits:
        # Of a whole mask, the operator checks this.
        if queries.of is not None and operands[index].shape[2] != queries.of:
            raise ValueError(
                f"bits: expected attends to have {queries.of} rows, one for each query, "
                f"but got {list(operands[index].shape)}"
            )
        operands[index] = queries.of_mask(operands[index])
    return operands


def _with_bits_at(problem: _Problem, rule: MaskFunction) -> MaskFunction:
    """The rule, called with positions, with bits for the rows and columns at these positions."""
    queries, keys = problem.queries, problem.keys
    for argument, line in (("queries", queries), ("keys", keys)):
        if line.positions is not None:
            raise NotImplementedError(
                f"{problem.name}: expected {argument} whose positions are ints, beside bits in a "
                "mask function that must be called, but got a tensor"
            )
    return mask_rules.with_bits_moved(rule, queries.first - queries.start, keys.first - keys.start)


def check_boolean(name: str, result: torch.Tensor) -> None:
    if result.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected mask_function to return a bool tensor, but got {result.dtype}"
        )
