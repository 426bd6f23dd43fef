"""What to call scaled_dot_product_attention with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_flag, check_states, checked_int, checked_masked_value
from attn_mask._core.events import timed
from attn_mask._core.skipping import hides_nothing
from attn_mask._core.tracing import is_recording
from attn_mask._core.write import (
    BOOLEAN,
    Calls,
    Geometry,
    MaskFormat,
    check_padding,
    checked_offsets,
    write_mask,
)
from attn_mask._transformers.mask_functions import warn_of_lost_documents

_NAME = "sdpa_arguments"
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
    check_states(_NAME, query=query, key=key)
    mask_format = _checked_format(dtype, unmask_unattended, masked_value)
    batch_size, q_heads, q_length = query.shape[:3]
    kv_length = key.shape[2]
    if key.shape[0] not in (1, batch_size):
        raise ValueError(
            f"{_NAME}: expected key to have the batch size of query, which is {batch_size}, "
            f"but got {list(key.shape)}"
        )
    first, first_key = checked_offsets(_NAME, q_length, kv_length, q_offset, kv_offset)
    if attention_mask is not None:
        attention_mask = _checked_padding(attention_mask, query)
    if heads is None:
        heads = q_heads
    elif checked_int(_NAME, "heads", heads) not in (1, q_heads):
        raise ValueError(
            f"{_NAME}: expected heads to be 1 or {q_heads}, as query has, but got {heads}"
        )
    rule = mask_function
    if not isinstance(rule, mask_rules.MaskFunction):
        rule = mask_rules.rule_of(_NAME, "mask_function", mask_function)
    if not is_recording():
        program = rule.known_program
        for index, operand in enumerate(program.operands):
            if operand is not None:
                program.rows(index, batch_size)  # also where no mask is made
    are_tensors = isinstance(first, torch.Tensor) or isinstance(first_key, torch.Tensor)
    if not are_tensors and q_length > 0 and kv_length > 0:
        shown = rule.coverage(first, first + q_length, first_key, first_key + kv_length)
        is_causal = shown is mask_rules.Coverage.CAUSAL
        if (shown is mask_rules.Coverage.ALL or (is_causal and first == first_key)) and (
            hides_nothing(attention_mask, kv_length, first_key)
        ):
            return SdpaArguments(None, is_causal)
    geometry = Geometry(batch_size, q_length, first, kv_length, first_key)
    calls = Calls(heads, is_of_one_head=heads != q_heads)
    mask = write_mask(_NAME, rule, geometry, attention_mask, query.device, mask_format, calls)
    return SdpaArguments(mask, False)


def _checked_format(dtype: Any, unmask_unattended: Any, masked_value: Any) -> MaskFormat:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{_NAME}: expected dtype to be a torch.dtype, but got {dtype!r}")
    if dtype is masked_value is None and unmask_unattended is False:
        return BOOLEAN
    check_flag(_NAME, "unmask_unattended", unmask_unattended)
    masked_value = checked_masked_value(_NAME, masked_value)
    if dtype is None and masked_value is not None:
        raise ValueError(
            f"{_NAME}: expected a dtype beside masked_value, which a boolean mask (dtype "
            f"None) does not hold, but got {masked_value!r} alone"
        )
    return MaskFormat(dtype, None, unmask_unattended, masked_value)


def _checked_padding(attention_mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    check_padding(_NAME, attention_mask)
    if attention_mask.shape[0] != query.shape[0]:
        raise ValueError(
            f"{_NAME}: expected attention_mask to have {query.shape[0]} rows, as query has, "
            f"but got {list(attention_mask.shape)}"
        )
    warn_of_lost_documents(attention_mask, None, query.shape[2])
    return attention_mask.to(device=query.device, dtype=torch.bool)
