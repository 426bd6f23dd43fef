"""What torch's FlopCounterMode counts of attention by a rule: products of visible pairs alone."""

import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attn_mask._core.attend import TELL_COUNTERS

_ops = torch.ops.attn_mask

# Elements of a mask that are made at once.
_TILE = 2**26


def tell_counters() -> None:
    """Registers the formulas once that module is loaded, which takes longer than this package."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None or _ops.scaled_dot_product_attention in module.flop_registry:
        return
    formulas = {
        _ops.scaled_dot_product_attention: _forward,
        _ops.scaled_dot_product_attention_backward: _backward,
    }
    for operator, formula in formulas.items():
        module.register_flop_formula(operator, get_raw=True)(formula)
    # Counters copy the registry when they are made.
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            for operator, formula in formulas.items():
                mode.counter.flop_registry.setdefault(operator, formula)


def _forward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    given = _named(_ops.scaled_dot_product_attention, args, kwargs)
    width: int = given["query"].shape[3]
    value_width: int = given["value"].shape[3]
    return 2 * _pairs(**given) * (width + value_width)


def _backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    given = _named(_ops.scaled_dot_product_attention_backward, args, kwargs)
    width: int = given["query"].shape[3]
    value_width: int = given["value"].shape[3]
    # Scores are calculated again; then gradients of weights, values, queries and keys.
    return 2 * _pairs(**given) * (3 * width + 2 * value_width)


def _named(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = (argument.name for argument in operator.default._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def _pairs(
    *,
    rule: list[int],
    operands: list[torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    q_offset: int = 0,
    kv_offset: int = 0,
    q_positions: torch.Tensor | None = None,
    kv_positions: torch.Tensor | None = None,
    **_others: Any,
) -> int:
    """How many keys all queries of all heads see; of fake tensors, all keys."""
    batch_size, heads, q_length, _ = query.shape
    kv_length = key.shape[2]
    tables = [*operands, *(of for of in (q_positions, kv_positions) if of is not None)]
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in (query, *tables)):
        return batch_size * heads * q_length * kv_length
    height = max(1, _TILE // max(1, batch_size * heads * kv_length))
    if any(operand.dim() == 4 for operand in operands):  # bits have a row for each query
        height = max(1, q_length)
    is_listed = q_positions is not None and q_positions.dim() > 0 and q_positions.shape[-1] != 1
    pairs = 0
    for first in range(0, q_length, height):
        rows = min(height, q_length - first)
        positions, offset = q_positions, q_offset + first
        if is_listed and q_positions is not None:
            positions, offset = q_positions[..., first : first + rows], q_offset
        mask = _ops.boolean(
            rule,
            operands,
            batch_size,
            rows,
            kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            q_positions=positions,
            kv_positions=kv_positions,
            device=query.device,
        )
        pairs += int(mask.count_nonzero()) * (heads // max(1, mask.shape[1]))
    return pairs


TELL_COUNTERS[:] = [tell_counters]
