"""Arguments of rules: sizes, offsets and tables."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from attn_mask._core.arguments import check_strided, checked_index
from attn_mask._core.library import _C
from attn_mask._core.program import Source
from attn_mask._core.tracing import is_jit_tracing, is_recording

_T = TypeVar("_T")

# Offsets and shifts are within FAR of 0; sizes ("no window" in configs) are cut to OPEN.
FAR = _C.FAR
OPEN = _C.OPEN

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def whole(name: str, argument: str, value: Any) -> int:
    """An int (of Python, symbolic, or of NumPy), or a float that is one; at most 2^62."""
    if isinstance(value, torch.SymInt) or (isinstance(value, int) and is_recording()):
        return value  # type: ignore[return-value]  # it does all that an int does
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        value = int(min(max(value, -OPEN), OPEN))
    return min(checked_index(name, argument, value), OPEN)


def side_of(name: str, argument: str, value: Any, rounding: Callable[[float], int]) -> int:
    """A side of a window, which may be any number: some int compares with positions as it does."""
    is_between = isinstance(value, float) and math.isfinite(value)
    side = whole(name, argument, rounding(value) if is_between else value)
    return max(side, -FAR // 2)  # below 0 it becomes a shift, which others may add to


def integers(source: Source, table: Any, ranks: tuple[int, ...]) -> torch.Tensor:
    """A table of integers; [n] or [b, n], or [b]."""
    check_strided(source.function, source.argument, table)
    if table.dtype not in ID_DTYPES:
        raise TypeError(f"{source} to be uint8 or a signed integer, but got {table.dtype}")
    return of_rank(source, table, ranks)


def real_numbers(source: Source, table: Any, ranks: tuple[int, ...]) -> torch.Tensor:
    """A table of booleans or numbers; [n] or [b, n]."""
    check_strided(source.function, source.argument, table)
    if table.is_complex():
        raise TypeError(
            f"{source} to be of a boolean, integer or real floating dtype, but got {table.dtype}"
        )
    return of_rank(source, table, ranks)


def booleans(source: Source, table: Any) -> torch.Tensor:
    """Bits [b, h, q, kv]."""
    check_strided(source.function, source.argument, table)
    if table.dtype != torch.bool:
        raise TypeError(f"{source} to be bool, but got {table.dtype}")
    if table.dim() != 4:
        raise ValueError(
            f"{source} to be 4-D [batch_size, heads, q_length, kv_length], "
            f"but got {table.dim()}-D {list(table.shape)}"
        )
    return table  # type: ignore[no-any-return]


def of_rank(source: Source, table: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    if table.dim() not in ranks:
        shape = "1-D [length] or 2-D [batch_size, length]" if 2 in ranks else "1-D [batch_size]"
        raise ValueError(f"{source} to be {shape}, but got {table.dim()}-D {list(table.shape)}")
    return table


def offset_of(argument: str, value: Any) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    offset = whole("shift", argument, value)
    if not is_recording() and not -FAR < offset < FAR:
        raise ValueError(f"shift: expected {argument} to be within 2^59 of 0, but got {value}")
    return offset


def depth_over(name: str, rules: Sequence[Any]) -> int:
    """The depth of a tree with these branches. Raises ValueError for what is too deep."""
    depth: int = 1 + max([0, *(rule.depth for rule in rules)])  # as torch 2.11 compiles it
    if depth > _C.MAX_DEPTH:
        raise ValueError(
            f"{name}: expected rules to be nested at most {_C.MAX_DEPTH} deep, but got {depth}"
        )
    return depth


def limits_of(name: str, documents: Any, length: Any) -> tuple[int, int] | None:
    """How many documents there are at most, and how long; both are given, or neither."""
    if documents is None and length is None:
        return None
    limits = []
    for argument, value in (("max_documents", documents), ("max_length", length)):
        if value is None:
            raise ValueError(
                f"{name}: expected max_documents and max_length, or neither of them, "
                f"but got no {argument}"
            )
        limits.append(whole(name, argument, value))
        if not is_recording() and limits[-1] <= 0:
            raise ValueError(f"{name}: expected {argument} to be positive, but got {value}")
    return limits[0], limits[1]


def wide(positions: _T) -> _T:
    """Positions in int64, which holds sums of them; what is no tensor of integers as it is."""
    is_integer = isinstance(positions, torch.Tensor) and positions.dtype in ID_DTYPES
    return positions.long() if is_integer else positions  # type: ignore[attr-defined]


def at(table: torch.Tensor, source: Source, batch_idx: Any, idx: Any) -> torch.Tensor:
    """The entries of a table at positions; one row of it may serve the whole batch."""
    if source.is_upstream:
        return table[batch_idx, idx]
    if table.dim() == 1:
        return table[idx]
    return table[row_of(table.shape[0], batch_idx), idx]


def row_of(rows: int, batch_idx: Any) -> Any:
    """Which of the rows of a table serves a row of the batch; one may serve all."""
    if is_jit_tracing():  # the graph is for other numbers of rows, too
        return batch_idx % rows
    return 0 if rows == 1 else batch_idx


def beside(result: Any, other: Any) -> Any:
    """A result on the other's device, where they are tensors."""
    both = isinstance(result, torch.Tensor) and isinstance(other, torch.Tensor)
    return result.to(other.device) if both else result
