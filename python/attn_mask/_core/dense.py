"""Masks from rules: which keys each query attends to, as scaled_dot_product_attention takes it.

Shapes: b batch_size, q q_length, kv kv_length. Query row i has position q_offset + i, or
that in q_positions; key column j has kv_offset + j, or that in kv_positions.
"""

from collections.abc import Callable
from typing import Any

import torch

from attn_mask._core import mask_rules
from attn_mask._core.arguments import (
    ADDITIVE_DTYPES,
    check_flag,
    check_strided,
    checked_device,
    checked_ints,
    checked_masked_value,
)
from attn_mask._core.events import timed
from attn_mask._core.library import _C
from attn_mask._core.operators import operators
from attn_mask._core.program import Program
from attn_mask._core.tracing import default_device
from attn_mask._core.write import (
    BOOLEAN,
    Axis,
    Calls,
    Geometry,
    MaskFormat,
    Offset,
    Sizes,
    check_position_dtype,
    copied_to,
    write_at_once,
    write_mask,
)

__all__ = ["additive", "boolean"]

_ADDITIVE = {dtype: MaskFormat(dtype) for dtype in ADDITIVE_DTYPES}


@timed
def boolean(
    rule: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    heads: int = 1,
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
        heads: how many there are. With 1, a mask function must not look at the head.
        q_offset, kv_offset: the position of the first query and of the first key: an int, or a
            tensor [] or [b, 1], whose value is not read.
        q_positions, kv_positions: the position of each, ints [q] or [b, q], [kv] or [b, kv]; an
            offset is added to them.
        device: of the mask; by default that of ``out``, of the rule's tensors or of the positions,
            else torch's default device. Tensors of the rule that are elsewhere are copied.
        unmask_unattended: whether rows in which no key is visible are True throughout, for
            attention that gives NaN for them.
        out: where the mask is written, bool [b, heads, q, kv] of any strides.

    Returns ``out``, or a bool tensor [b, heads, q, kv]; where all rows of the batch or all heads
    are alike, it may be a stride-0 expand of one. If heads is 1, bits of several heads give theirs.

    Raises ValueError for sizes, shapes and positions that don't fit, for heads that are not those
    of bits, and in eager code for a mask function that depends on the head where heads is 1;
    TypeError for dtypes and for mask functions that return no booleans.

    >>> attn_mask.boolean(attn_mask.causal() & attn_mask.sliding_window(2), 1, 3, 3)
    tensor([[[[ True, False, False],
              [ True,  True, False],
              [False,  True,  True]]]])
    """
    mask_format = BOOLEAN
    if out is not None or unmask_unattended is not False:
        mask_format = MaskFormat(None, None, unmask_unattended, None, out)
    sizes, offsets = (batch_size, q_length, kv_length), (q_offset, kv_offset)
    positions = q_positions, kv_positions
    return _mask("boolean", rule, sizes, heads, offsets, positions, device, mask_format)


@timed
def additive(
    rule: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    heads: int = 1,
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
            place of 0. Differentiable, but not into ``out``. If heads is 1, it gives them.
        masked_value: what the others hold: a number up to 0 that ``dtype`` holds, or -inf; by
            default ``torch.finfo(dtype).min``.

    Returns ``out``, or a tensor [b, heads, q, kv] of ``dtype``.

    Raises what boolean does, and ValueError for another masked_value.

    >>> attn_mask.additive(attn_mask.causal(), 1, 2, 2, masked_value=float("-inf"))
    tensor([[[[0., -inf],
              [0., 0.]]]])
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"additive: expected dtype to be a torch.dtype, but got {dtype!r}")
    if masked_value is not None:
        masked_value = checked_masked_value("additive", masked_value)
    if bias is not None:
        check_strided("additive", "bias", bias)
    is_plain = bias is None and masked_value is None and out is None and unmask_unattended is False
    mask_format = _ADDITIVE.get(dtype) if is_plain else None
    if mask_format is None:
        mask_format = MaskFormat(dtype, bias, unmask_unattended, masked_value, out)
    sizes, offsets = (batch_size, q_length, kv_length), (q_offset, kv_offset)
    positions = q_positions, kv_positions
    return _mask("additive", rule, sizes, heads, offsets, positions, device, mask_format)


def _mask(
    name: str,
    rule: Callable[..., Any],
    sizes: Sizes,
    heads: int,
    offsets: tuple[Offset, Offset],
    positions: tuple[torch.Tensor | None, torch.Tensor | None],
    device: torch.device | str | None,
    mask_format: MaskFormat,
) -> torch.Tensor:
    batch_size, q_length, kv_length = sizes
    q_offset, kv_offset = offsets
    q_positions, kv_positions = positions
    ops = operators()
    is_plain = (
        ops is _C
        and type(batch_size) is type(q_length) is type(kv_length) is type(heads) is int
        and type(q_offset) is type(kv_offset) is int
        and 0 <= batch_size | q_length | kv_length | heads | q_offset | kv_offset < 2**59
        and q_positions is kv_positions is None
    )
    if not is_plain:
        batch_size, q_length, kv_length, heads, q_offset, kv_offset = checked_ints(
            name,
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            heads=heads,
            q_offset=q_offset,
            kv_offset=kv_offset,
        )
        sizes = batch_size, q_length, kv_length
        if q_positions is not None:
            check_strided(name, "q_positions", q_positions)
        if kv_positions is not None:
            check_strided(name, "kv_positions", kv_positions)
    _, bias, unmasks, _, out = mask_format
    if type(unmasks) is not bool:
        check_flag(name, "unmask_unattended", unmasks)
    if out is not None:
        check_strided(name, "out", out)
    if not isinstance(rule, mask_rules.MaskFunction):
        rule = mask_rules.rule_of(name, "rule", rule)
    program = rule.known_program if ops is _C else rule.program
    if device is not None:
        of_device = checked_device(name, device)
    else:
        of_device = default_device()
        if not is_plain or program.operands or bias is not None or out is not None:
            for tensor in (out, *program.operands, bias, *positions, *offsets):
                if isinstance(tensor, torch.Tensor):
                    of_device = tensor.device
                    break
    if is_plain and heads == 1:
        geometry = Geometry(batch_size, q_length, q_offset, kv_length, kv_offset)
        mask = write_at_once(ops, program, geometry, None, of_device, mask_format)
        if mask is not None:
            return mask
    queries: Offset | Axis = q_offset
    keys: Offset | Axis = kv_offset
    if q_positions is not None:
        queries = _line(name, "q", q_length, q_offset, q_positions, of_device)
    if kv_positions is not None:
        keys = _line(name, "kv", kv_length, kv_offset, kv_positions, of_device)
    of_tensors = _heads_of_tensors(program, bias)
    if heads == 1:
        heads = of_tensors
    elif heads < 0 or of_tensors not in (1, heads):
        expected = "a size (>= 0)" if of_tensors == 1 else f"{of_tensors}, as bits or the bias have"
        raise ValueError(f"{name}: expected heads to be {expected}, but got {heads}")
    geometry = Geometry(batch_size, q_length, queries, kv_length, keys)
    if heads == of_tensors:
        calls = Calls(heads, is_of_one_head=heads == 1)
        return write_mask(name, rule, geometry, None, of_device, mask_format, calls)
    # Operators write the heads that tensors have.
    mask_format = mask_format._replace(out=None)
    mask = write_mask(name, rule, geometry, None, of_device, mask_format, Calls(heads))
    mask = mask.expand(-1, heads, -1, -1)
    return mask if out is None else copied_to(name, out, mask)


def _heads_of_tensors(program: Program, bias: torch.Tensor | None) -> int:
    for index in program.bits:
        if program.operands[index].shape[1] != 1:
            return program.operands[index].shape[1]  # type: ignore[no-any-return]
    return bias.shape[1] if bias is not None and bias.dim() == 4 else 1


def _line(
    name: str,
    axis: str,
    length: int,
    offset: Offset,
    positions: torch.Tensor,
    device: torch.device,
) -> Axis:
    """Where queries or keys stand: an offset is added to the position of each."""
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
