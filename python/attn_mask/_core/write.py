"""Writes the mask of a rule: what ``masks``, ``block_mask`` and the mirrors stand on.

A rule is written by one call of an operator. Callables of the user's within it are evaluated first,
in eager code some rows at a time; while tracing, the whole tree is one broadcast expression.

Shapes: b batch_size, h heads, q q_length, kv kv_length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_strided, checked_device, checked_int
from attn_mask._core.counts import count
from attn_mask._core.library import _C
from attn_mask._core.log_once import log_detail_once, warn_once
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.operators import operators
from attn_mask._core.program import Program
from attn_mask._core.tracing import (
    default_device,
    evaluate_mapped,
    is_jit_tracing,
    is_recording,
    is_tracing,
)

Offset = int | torch.Tensor
Sizes = tuple[int, int, int]
"""(batch_size, q_length, kv_length)"""

_ops = torch.ops.attn_mask

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


BOOLEAN = MaskFormat()


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
    if not isinstance(offset, torch.Tensor):
        if is_recording() or isinstance(offset, torch.SymInt):
            return Axis(length, offset)
        if type(offset) is not int or not -mask_rules.FAR < offset < mask_rules.FAR:
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
    if attention_mask.dim() != 2:
        raise ValueError(
            f"{name}: expected attention_mask to be 2-D [batch_size, length], "
            f"but got {attention_mask.dim()}-D {list(attention_mask.shape)}"
        )


def padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """[b, n], with ``value`` after it up to ``length``."""
    missing = length - tensor.shape[-1]
    return F.pad(tensor, (0, missing), value=value) if missing > 0 else tensor


def _call(
    code: list[int],
    operands: list[Any],
    sizes: tuple[int, int, int],
    where: tuple[Any, Any, torch.Tensor | None, torch.Tensor | None],
    device: torch.device,
    mask_format: MaskFormat,
) -> torch.Tensor:
    """The mask of an encoded rule in eager code; ``where`` are the offsets and the positions."""
    unmasks = mask_format.unmask_unattended
    result: torch.Tensor
    if mask_format.dtype is None:
        result = _C.boolean(code, operands, *sizes, *where, device, unmasks)
    else:
        of_additive = mask_format.bias, device, unmasks, mask_format.masked_value
        result = _C.additive(code, operands, *sizes, mask_format.dtype, *where, *of_additive)
    return result


class _Problem(NamedTuple):
    """Which elements of which mask are wanted."""

    name: str  # of the function that was called, for errors
    batch_size: int
    queries: Axis
    keys: Axis
    device: torch.device
    heads: int
    by_vmap: bool
    is_of_one_head: bool
    """Whether a mask function must not depend on the head: ``heads`` is 1, but more may follow."""

    def evaluate(self, mask_function: Callable[..., Any]) -> torch.Tensor:
        """A mask function's result: broadcast over [b, h, q, kv] or, by vmap, of that shape."""
        device = self.device
        batch_idx = torch.arange(self.batch_size, device=device)
        head_idx = torch.arange(self.heads, device=device)
        if not is_recording():
            count("fallback")
            self._name_called(mask_function)
            for line, of in (("q", self.queries), ("kv", self.keys)):
                self._check_positions(line, of)
        q_idx, kv_idx = self.queries.indices(device), self.keys.indices(device)
        if self.by_vmap:
            of_batch = (0, None, *(0 if idx.dim() == 2 else None for idx in (q_idx, kv_idx)))
            of_one = ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), of_batch)
            for in_dims in of_one:
                mask_function = torch.vmap(mask_function, in_dims=in_dims)
            # vmap can't index by a tensor of one element without this; it takes seconds to import.
            from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

            with TransformGetItemToIndex():
                result = mask_function(batch_idx, head_idx, q_idx, kv_idx)
        else:
            if q_idx.dim() == 1:
                q_idx = q_idx[None]
            if kv_idx.dim() == 1:
                kv_idx = kv_idx[None]
            call = self._of_one_head if self.is_of_one_head else _call_function
            result = call(
                mask_function,
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

    def _of_one_head(
        self,
        mask_function: Callable[..., Any],
        batch_idx: torch.Tensor,
        head_idx: torch.Tensor,
        q_idx: torch.Tensor,
        kv_idx: torch.Tensor,
    ) -> Any:
        """A mask function's result. Raises ValueError where that depends on the head."""

        def of_head(head: torch.Tensor) -> Any:
            return mask_function(batch_idx, head, q_idx, kv_idx)

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
                f"{mask_function!r} depends on the head, but got 1"
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

    def write(self, code: list[int], operands: list[Any], mask_format: MaskFormat) -> torch.Tensor:
        """The mask of an encoded rule, by the operators."""
        queries, keys = self.queries, self.keys
        ops = operators()
        sizes = self.batch_size, queries.length, keys.length
        if ops is None and mask_format.out is None:
            where = queries.start, keys.start, queries.positions, keys.positions
            return _call(code, operands, sizes, where, self.device, mask_format)
        arguments: dict[str, Any] = {
            "q_offset": queries.start,
            "kv_offset": keys.start,
            "q_positions": queries.positions,
            "kv_positions": keys.positions,
            "device": self.device,
            "unmask_unattended": mask_format.unmask_unattended,
        }
        if mask_format.dtype is not None:
            arguments |= {
                "dtype": mask_format.dtype,
                "bias": mask_format.bias,
                "masked_value": mask_format.masked_value,
            }
        name = "boolean" if mask_format.dtype is None else "additive"
        if mask_format.out is not None:
            getattr(ops or _ops, name).out(code, operands, *sizes, **arguments, out=mask_format.out)
            return mask_format.out
        mask: torch.Tensor = getattr(ops, name)(code, operands, *sizes, **arguments)
        return mask

    def convert(self, attends: torch.Tensor, mask_format: MaskFormat) -> torch.Tensor:
        """A mask of booleans in this format."""
        dtype = mask_format.dtype
        if dtype is not None or mask_format.unmask_unattended:
            check_boolean(self.name, attends)
        if not is_recording() and (dtype is not None or mask_format.out is not None):
            # The operator checks the value, the bias and `out`.
            batch_size, _, q_length, kv_length = attends.shape
            plain = self._replace(
                batch_size=batch_size, queries=Axis(q_length), keys=Axis(kv_length)
            )
            return plain.write(mask_rules.bits(attends).program.code, [attends], mask_format)
        if mask_format.unmask_unattended:
            attends = attends | ~attends.any(-1, keepdim=True)
        mask = attends
        if dtype is not None:
            # One element by the operator, which checks the value.
            one = self._replace(batch_size=1, queries=Axis(1), keys=Axis(1))
            masked = one.write(
                [mask_rules.NOTHING], [], MaskFormat(dtype, masked_value=mask_format.masked_value)
            )
            zero = torch.zeros((), dtype=dtype, device=self.device)
            mask = torch.where(
                attends, zero if mask_format.bias is None else mask_format.bias, masked
            )
        if mask_format.out is None:
            return mask
        if mask_format.out.shape != mask.shape or mask_format.out.dtype != mask.dtype:
            raise ValueError(
                f"{self.name}: expected out to be {list(mask.shape)} of {mask.dtype}, "
                f"but got {list(mask_format.out.shape)} of {mask_format.out.dtype}"
            )
        return mask_format.out.copy_(mask)

    def write_in_tiles(
        self, write: Callable[["_Problem"], torch.Tensor], out: torch.Tensor | None
    ) -> torch.Tensor:
        """A mask, so many rows at a time that what lies beside it stays small."""
        queries = self.queries
        q_length = queries.length
        height = max(1, _TILE // max(1, self.batch_size * self.heads * self.keys.length))
        if height >= q_length:
            return write(self)
        try:
            tile = write(self._replace(queries=queries.rows(0, height)))
        except (RuntimeError, ValueError, IndexError):
            tile = None
        if tile is None:
            # A function that holds something of the whole mask's size works for the whole only;
            # any other error will be raised again.
            return write(self)
        mask = out
        if mask is None:
            mask = tile.new_empty((*tile.shape[:2], q_length, self.keys.length))
            mask[:, :, :height] = tile
        for first in range(height, q_length, height):
            end = min(first + height, q_length)
            tile = write(self._replace(queries=queries.rows(first, end)))
            if out is None:
                mask[:, :, first:end] = tile
        return mask


def _call_function(mask_function: Callable[..., Any], *indices: torch.Tensor) -> Any:
    return mask_function(*indices)


def write_mask(
    name: str,
    mask_function: Callable[..., Any],
    sizes: Sizes,
    q_offset: Offset | Axis,
    kv_offset: Offset | Axis,
    padding_mask: torch.Tensor | None,
    device: torch.device | str | None,
    mask_format: MaskFormat = BOOLEAN,
    by_vmap: bool = False,
    heads: int = 1,
    is_of_one_head: bool = False,
) -> torch.Tensor:
    """The mask [b, 1 or heads, q, kv] of a rule or any mask function.

    Args:
        name: of the function that was called, for errors.
        q_offset, kv_offset: the position of the first query and key, or of each.
        padding_mask: which keys are not padding, bool [b, n]; those after its end are.
        by_vmap: whether callables of the user's are called for one element at a time.
        heads: how many of them callables are called for.
        is_of_one_head: whether callables whose result depends on the head are an error, in eager
            code.
    """
    # An operator without tensor arguments does not see `with torch.device(...)`: resolve it here.
    if not isinstance(device, torch.device):
        device = default_device() if device is None else checked_device(name, device)
    if device.type == "cpu":
        device = _CPU  # "cpu:0" is another device to torch
    rule = mask_function
    if not isinstance(rule, MaskFunction):
        rule = mask_rules.rule_of(name, "mask_function", mask_function)
    batch_size, q_length, kv_length = sizes
    # The common case, in which nothing below is needed.
    if (
        type(q_offset) is int
        and type(kv_offset) is int
        and (
            padding_mask is None
            or (
                padding_mask.dtype == torch.bool
                and padding_mask.dim() == 2
                and padding_mask.shape[0] == batch_size
                and padding_mask.device == device
            )
        )
        and operators() is None
        and mask_format.out is None
        and (program := rule.known_program).is_written(
            batch_size, q_offset, q_offset + q_length, kv_offset, kv_offset + kv_length, device
        )
    ):
        code, operands = program.code, program.operands
        if padding_mask is not None:
            code, operands = program.padded_code, [*operands, padding_mask]
        mask: torch.Tensor  # called directly, since it is needed in every decode step
        if mask_format.dtype is None:
            mask = _C.boolean(
                code,
                operands,
                batch_size,
                q_length,
                kv_length,
                q_offset,
                kv_offset,
                None,
                None,
                device,
                mask_format.unmask_unattended,
            )
        else:
            mask = _C.additive(
                code,
                operands,
                batch_size,
                q_length,
                kv_length,
                mask_format.dtype,
                q_offset,
                kv_offset,
                None,
                None,
                mask_format.bias,
                device,
                mask_format.unmask_unattended,
                mask_format.masked_value,
            )
        return mask
    if not is_recording():
        for argument, size in zip(("batch_size", "q_length", "kv_length"), sizes, strict=True):
            if not isinstance(size, torch.Tensor):  # transformers passes those, too
                checked_int(name, argument, size)
            if size < 0:
                raise ValueError(f"{name}: expected {argument} to be a size (>= 0), but got {size}")
    check_padding(name, padding_mask)
    program = rule.program
    # Keys first: by default, where queries stand depends on them.
    keys = axis(name, "kv_offset", kv_length, kv_offset, device)
    queries = axis(name, "q_offset", q_length, q_offset, device)
    is_of_one_head = is_of_one_head and len(program.calls) > 0 and not is_recording()
    problem = _Problem(name, batch_size, queries, keys, device, heads, by_vmap, is_of_one_head)
    code, operands = program.code, program.operands
    if padding_mask is not None:
        code, operands = program.padded_code, [*operands, padding_mask]
    counts = padding_mask is not None and padding_mask.dtype != torch.bool
    # Upstream's conjunction with integers is of integers, which an additive mask can't be made of.
    if counts and (mask_format.dtype is not None or operands[-1].dtype not in mask_rules.ID_DTYPES):
        raise TypeError(f"{name}: expected attention_mask to be bool, but got {operands[-1].dtype}")
    by_call = (
        is_jit_tracing()  # it would fix an operator's sizes
        or not program.is_boolean
        or counts
        or (len(program.calls) > 0 and is_tracing(padding_mask))
    )
    for index, line in enumerate((queries, keys)):
        if line.positions is None and (is_recording() or line.length > 0):
            program.check_positions(name, index, line.start, line.start + line.length)
    # While a graph is recorded, it must not come to depend on comparisons of sizes.
    if not is_recording():
        by_call = by_call or any(
            line.positions is None and line.length > 0 and line.start < program.lowest[index]
            for index, line in enumerate((queries, keys))
        )
        operands = fitting(name, operands, program, batch_size, device)
    of_mask = operands  # bits with a row for each of the mask's, of which queries may be a part
    if program.bits:
        operands = list(operands)
        for index in program.bits:
            _check_rows_of_bits(operands[index], queries)
            operands[index] = queries.of_mask(operands[index])
    if by_call:
        if program.bits:
            rule = _with_bits_at(problem, rule)
        if padding_mask is not None:
            whole = padded(padding_mask, kv_length + cast(int, kv_offset), 0)
            rule = mask_rules.intersection(
                rule, mask_rules.Padding(whole, mask_rules.UPSTREAM_PADDING)
            )
        mask = problem.evaluate(rule)
        if not by_vmap:
            mask = mask.expand(batch_size, -1, q_length, kv_length)
        return problem.convert(mask, mask_format)
    if not program.calls:
        return problem.write(code, operands, mask_format)
    is_root = padding_mask is None and isinstance(rule, mask_rules.Function)

    def write_rows(part: _Problem) -> torch.Tensor:
        filled = list(operands)
        for index in program.bits:
            filled[index] = part.queries.of_mask(of_mask[index])
        for operand, function in program.calls:
            result = part.evaluate(function)
            filled[operand] = part.as_bits(result, at_least=4 if is_root else 0)
        return part.write(code, filled, mask_format.of_rows(part.queries))

    return problem.write_in_tiles(write_rows, mask_format.out)


def _check_rows_of_bits(bits: torch.Tensor, queries: Axis) -> None:
    """Before a part of them is taken; of a whole mask, the operator sees."""
    if queries.of is not None and bits.shape[2] != queries.of:
        raise ValueError(
            f"bits: expected attends to have {queries.of} rows, one for each query, "
            f"but got {list(bits.shape)}"
        )


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


def fitting(
    name: str, operands: list[Any], program: Program, batch_size: int, device: torch.device
) -> list[Any]:
    """The operands (and the padding mask after them) on the device of the mask, with its rows.

    Raises ValueError for operands with other rows.
    """
    fitting = operands
    for index, operand in enumerate(operands):
        if operand is None or (operand.shape[0] == batch_size and operand.device == device):
            continue
        if index < len(program.operands):
            rows = program.rows(index, batch_size)
        elif operand.shape[0] < batch_size:
            raise ValueError(
                f"{name}: expected attention_mask to have {batch_size} rows, "
                f"but got {list(operand.shape)}"
            )
        else:  # a mask function leaves rows beyond the batch alone
            rows = operand[:batch_size]
        if fitting is operands:
            fitting = list(operands)
        fitting[index] = rows.to(device)
    return fitting


def check_boolean(name: str, result: torch.Tensor) -> None:
    if result.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected mask_function to return a bool tensor, but got {result.dtype}"
        )
