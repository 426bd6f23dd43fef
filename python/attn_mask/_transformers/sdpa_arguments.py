"""What to call scaled_dot_product_attention with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core import mask_rules, skipping
from attn_mask._core.arguments import (
    check_flag,
    check_strided,
    checked_int,
    checked_ints,
    checked_masked_value,
)
from attn_mask._core.timing import timed
from attn_mask._core.tracing import is_exporting, is_jit_tracing, is_opaque, is_recording
from attn_mask._core.write import MaskFormat, check_padding, write_mask
from attn_mask._transformers.documents import name_numbers
from attn_mask._transformers.skip_rules import shows_all

_CAUSAL = mask_rules.causal()


class SdpaArguments(NamedTuple):
    """Two arguments of ``torch.nn.functional.scaled_dot_product_attention``; one at most is set."""

    attn_mask: torch.Tensor | None
    is_causal: bool


@timed
def sdpa_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    *,
    q_offset: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor = 0,
    heads: int | None = None,
    dtype: torch.dtype | None = None,
    unmask_unattended: bool = False,
    masked_value: float | None = None,
) -> SdpaArguments:
    """The cheapest arguments of scaled_dot_product_attention for a rule::

        attn_mask, is_causal = attn_mask.sdpa_arguments(query, key, causal() & sliding_window(64))
        scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)

    A mask keeps it from its fastest kernels, so none is made where the result is the same without:
    where every key is attended to (one query after a cache, windows and chunks that hold all), and
    where causality is all there is and ``is_causal`` means the same. That counts queries and keys
    from the same position (so not where queries stand after a cache).

    Args:
        query: [batch_size, heads, q_length, head size].
        key: [batch_size, heads, kv_length, head size]; gives sizes and device, as query does.
        mask_function: a rule of ``attn_mask.rules``, or any mask function.
        attention_mask: which keys are not padding [batch_size, n], not zero; those after its end
            are. Whether it masks any is found out by skip_policy: under "upstream" its values
            are read, if not tracing.
        q_offset: the first query's position, an int or a tensor [] or [batch_size, 1], which is
            not read; by default, where the last query and the last key are the same token.
        kv_offset: the first key's position, likewise.
        heads: for how many heads a mask function is called that is no rule: those of query, which
            is the default, or 1 for a function that does not look at the head.
        dtype: of an additive mask; by default the mask is boolean.
        unmask_unattended: whether rows in which no key is visible are visible throughout, for
            attention that gives NaN for them.
        masked_value: of an additive mask; see ``attn_mask.additive``.

    Returns (attn_mask, is_causal): attn_mask is None or [batch_size, 1 or heads, q_length,
    kv_length].

    Raises ValueError for tensors of another rank or batch size, for negative positions, for a
    masked_value without a dtype, and for other heads than those of query; see also
    ``masking_utils.sdpa_mask``.

    >>> query = torch.zeros(1, 2, 8, 16)
    >>> attn_mask.sdpa_arguments(query, query)
    SdpaArguments(attn_mask=None, is_causal=True)
    """
    for name, tensor in (("query", query), ("key", key)):
        check_strided("sdpa_arguments", name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"sdpa_arguments: expected {name} to be 4-D [batch_size, heads, length, head size],"
                f" but got {tensor.dim()}-D {list(tensor.shape)}"
            )
    if q_offset is not None:
        (q_offset,) = checked_ints("sdpa_arguments", q_offset=q_offset)
    (kv_offset,) = checked_ints("sdpa_arguments", kv_offset=kv_offset)
    for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
        if offset is not None and not isinstance(offset, torch.Tensor) and offset < 0:
            raise ValueError(
                f"sdpa_arguments: expected {name} not to be negative, but got {offset}"
            )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"sdpa_arguments: expected dtype to be a torch.dtype, but got {dtype!r}")
    check_flag("sdpa_arguments", "unmask_unattended", unmask_unattended)
    masked_value = checked_masked_value("sdpa_arguments", masked_value)
    if attention_mask is not None:
        check_padding("sdpa_arguments", attention_mask)
    batch_size, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    if key.shape[0] not in (1, batch_size):
        raise ValueError(
            f"sdpa_arguments: expected key to have the batch size of query, which is {batch_size}, "
            f"but got {list(key.shape)}"
        )
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"sdpa_arguments: expected attention_mask to have {batch_size} rows, as query has, "
            f"but got {list(attention_mask.shape)}"
        )
    if dtype is None and masked_value is not None:
        raise ValueError(
            "sdpa_arguments: expected a dtype beside masked_value, which a boolean mask (dtype "
            f"None) does not hold, but got {masked_value!r} alone"
        )
    if q_offset is None:
        is_tensor = isinstance(kv_offset, torch.Tensor)
        q_offset = (mask_rules.wide(kv_offset) if is_tensor else kv_offset) + kv_length - q_length
    if not isinstance(q_offset, torch.Tensor) and q_offset < 0:
        raise ValueError(
            "sdpa_arguments: expected q_offset where there are more queries than keys, "
            f"but got {q_length} queries, {kv_length} keys and no q_offset"
        )
    if attention_mask is not None:
        name_numbers(attention_mask, q_length)
        attention_mask = attention_mask.to(device=query.device, dtype=torch.bool)
    q_heads = query.shape[1]
    if heads is None:
        heads = q_heads
    elif checked_int("sdpa_arguments", "heads", heads) not in (1, q_heads):
        raise ValueError(
            f"sdpa_arguments: expected heads to be 1 or {q_heads}, as query has, but got {heads}"
        )
    rule = mask_function
    if not isinstance(rule, mask_rules.MaskFunction):
        rule = mask_rules.rule_of("sdpa_arguments", "mask_function", mask_function)
    if not is_recording():
        program = rule.known_program
        for index, operand in enumerate(program.operands):
            if operand is not None:
                program.rows(index, batch_size)  # also where no mask is made
    if (
        not isinstance(q_offset, torch.Tensor)
        and not isinstance(kv_offset, torch.Tensor)
        and q_length > 0
        and kv_length > 0
    ):
        shown = rule.coverage(q_offset, q_offset + q_length, kv_offset, kv_offset + kv_length)
        is_needed = shown is mask_rules.Coverage.OTHER or (
            shown is mask_rules.Coverage.CAUSAL and q_offset != kv_offset
        )
        if not is_needed and _hides_nothing(attention_mask, kv_length, kv_offset):
            return SdpaArguments(None, shown is mask_rules.Coverage.CAUSAL)
    mask = write_mask(
        "sdpa_arguments",
        rule,
        (batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        query.device,
        MaskFormat(dtype, None, unmask_unattended, masked_value),
        heads=heads,
        is_of_one_head=heads != q_heads,
    )
    return SdpaArguments(mask, False)


def _hides_nothing(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> bool:
    """Whether each key is visible, as far as skip_policy permits to find out."""
    policy = skipping.current()
    if policy.name != "upstream":
        return policy.skips_bidirectional(attention_mask, kv_length, kv_offset, None)
    # In a graph that is kept, sizes may change, and with them what is_causal means.
    if is_exporting() or is_jit_tracing():
        return False
    if attention_mask is None:
        return True
    if is_opaque(attention_mask) or attention_mask.shape[-1] < kv_offset + kv_length:
        return False
    return shows_all(attention_mask[:, kv_offset : kv_offset + kv_length])
