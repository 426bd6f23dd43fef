"""Masks from rules: which keys each query attends to, as scaled_dot_product_attention takes it.

Shapes: b batch_size, q q_length, kv kv_length. Query row i has position q_offset + i, or
that in q_positions; key column j has kv_offset + j, or that in kv_positions.
"""

from collections.abc import Callable
from typing import Any

import torch

from attn_mask import rules
from attn_mask._checks import (
    check_flag,
    check_strided,
    checked_int,
    checked_masked_value,
    checked_offset,
)
from attn_mask._engine import Axis, Offset, Sizes, Spelling, check_position_dtype, write_mask
from attn_mask._timing import timed
from attn_mask._tracing import default_device

__all__ = ["additive", "boolean"]


@timed
def boolean(
    rule: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: Offset = 0,
    kv_offset: Offset = 0,
    q_positions: torch.Tensor | None = None,
    kv_positions: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    unmask_unattended: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask of a rule, True where a query attends to a key.

    Args:
        rule: of ``attn_mask.rules``, or any mask function of (batch_idx, head_idx, q_idx, kv_idx),
            which is called with index tensors that broadcast, about some rows at a time.
        q_offset, kv_offset: the position of the first query and of the first key: an int, or a
            tensor [] or [b, 1], whose value is not read.
        q_positions, kv_positions: the position of each, ints [q] or [b, q], [kv] or [b, kv]; an
            offset is added to them.
        device: of the mask; by default that of ``out``, of the rule's tensors or of the positions,
            else torch's default device. Tensors of the rule that are elsewhere are copied.
        unmask_unattended: whether rows in which no key is visible are True throughout, for
            attention that gives NaN for them.
        out: where the mask is written, bool [b, 1 or heads, q, kv] of any strides.

    Returns ``out``, or a bool tensor [b, 1 or heads, q, kv]; where all rows of the batch are alike,
    it may be a stride-0 expand of one.

    Raises ValueError for sizes, shapes and positions that don't fit, TypeError for dtypes and for
    mask functions that return no booleans.

    >>> attn_mask.boolean(attn_mask.causal() & attn_mask.sliding_window(2), 1, 3, 3)
    tensor([[[[ True, False, False],
              [ True,  True, False],
              [False,  True,  True]]]])
    """
    spelling = Spelling(None, None, unmask_unattended, None, out)
    return _mask(
        "boolean",
        rule,
        (batch_size, q_length, kv_length),
        (q_offset, kv_offset),
        (q_positions, kv_positions),
        device,
        spelling,
    )


@timed
def additive(
    rule: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: Offset = 0,
    kv_offset: Offset = 0,
    q_positions: torch.Tensor | None = None,
    kv_positions: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    unmask_unattended: bool = False,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bias: torch.Tensor | None = None,
    masked_value: float | None = None,
) -> torch.Tensor:
    """The mask of a rule, to be added to attention scores: 0 where a query attends to a key.

    Args as for boolean, and:
        unmask_unattended: whether rows in which no key is visible are +0.0 (or the bias)
            throughout.
        dtype: float16, bfloat16, float32 or float64; ``out`` must be of it.
        bias: [b or 1, heads or 1, q, kv] of ``dtype``: what elements that are attended to hold in
            place of 0. Differentiable, but not into ``out``.
        masked_value: what the others hold: a number up to 0 that ``dtype`` holds, or -inf; by
            default ``torch.finfo(dtype).min``.

    Returns ``out``, or a tensor [b, 1 or heads, q, kv] of ``dtype``.

    Raises what boolean does, and ValueError for another masked_value.

    >>> attn_mask.additive(attn_mask.causal(), 1, 2, 2, masked_value=float("-inf"))
    tensor([[[[0., -inf],
              [0., 0.]]]])
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"additive: expected dtype to be a torch.dtype, but got {dtype!r}")
    masked_value = checked_masked_value("additive", masked_value)
    if bias is not None:
        check_strided("additive", "bias", bias)
    spelling = Spelling(dtype, bias, unmask_unattended, masked_value, out)
    return _mask(
        "additive",
        rule,
        (batch_size, q_length, kv_length),
        (q_offset, kv_offset),
        (q_positions, kv_positions),
        device,
        spelling,
    )


def _mask(
    name: str,
    rule: Callable[..., Any],
    sizes: Sizes,
    offsets: tuple[Offset, Offset],
    positions: tuple[torch.Tensor | None, torch.Tensor | None],
    device: torch.device | str | None,
    spelling: Spelling,
) -> torch.Tensor:
    batch_size, q_length, kv_length = sizes
    sizes = (
        checked_int(name, "batch_size", batch_size),
        checked_int(name, "q_length", q_length),
        checked_int(name, "kv_length", kv_length),
    )
    q_offset, kv_offset = offsets
    offsets = (
        checked_offset(name, "q_offset", q_offset),
        checked_offset(name, "kv_offset", kv_offset),
    )
    check_flag(name, "unmask_unattended", spelling.unmask_unattended)
    names = ("q_positions", "kv_positions")
    for argument, tensor in (*zip(names, positions, strict=True), ("out", spelling.out)):
        if tensor is not None:
            check_strided(name, argument, tensor)
    rule = rules.rule_of(name, "rule", rule)
    program = rule.program
    if device is None:
        for tensor in (spelling.out, *program.operands, spelling.bias, *positions, *offsets):
            if isinstance(tensor, torch.Tensor):
                device = tensor.device
                break
    of_device = default_device() if device is None else torch.device(device)
    queries, keys = (
        _line(name, axis, length, offset, given, of_device)
        for axis, length, offset, given in zip(
            ("q", "kv"), sizes[1:], offsets, positions, strict=True
        )
    )
    heads = [bits.shape[1] for bits in (program.operands[index] for index in program.bits)]
    if spelling.bias is not None and spelling.bias.dim() == 4:
        heads.append(spelling.bias.shape[1])
    of_heads = next((size for size in heads if size != 1), 1)
    return write_mask(name, rule, sizes, queries, keys, None, of_device, spelling, heads=of_heads)


def _line(
    name: str,
    axis: str,
    length: int,
    offset: Offset,
    positions: torch.Tensor | None,
    device: torch.device,
) -> Offset | Axis:
    """Where queries or keys stand."""
    if positions is None:
        return offset
    positions = positions.to(device)
    if isinstance(offset, torch.Tensor):
        check_position_dtype(name, f"{axis}_positions", positions)
        check_position_dtype(name, f"{axis}_offset", offset)
        try:
            # Their sum may be too large for a narrow dtype.
            positions = positions.to(torch.int64) + offset.to(device)
            return Axis(length, 0, positions)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: expected {axis}_offset to be an int, or a tensor [] or [batch_size, 1], "
                f"but got {list(offset.shape)} beside {axis}_positions {list(positions.shape)}"
            ) from error
    return Axis(length, offset, positions)
