"""Whether attention can do without a mask, as transformers decides it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core import skipping
from attn_mask._core.library import _C
from attn_mask._core.operators import operators
from attn_mask._core.tracing import is_opaque
from attn_mask._core.write import Offset, padded


class Decisions(NamedTuple):
    """How a release decides that attention can do without a mask. Reads tensors, if not tracing.

    A SkipPolicy decides by functions of the same names.
    """

    skips_causal: Callable[..., bool]
    """(attention_mask, q_length, kv_length, q_offset, kv_offset, local_size)"""
    skips_bidirectional: Callable[..., bool]
    """(attention_mask, kv_length, kv_offset, local_size)"""


def is_skipped(
    decisions: Decisions,
    causal: bool,
    bidirectional: bool,
    attention_mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    kv_offset: Any,
    local_size: int | None,
) -> bool:
    """Whether there is no mask: ``causal``, ``bidirectional``: where there need not be one.

    That is where ``is_causal`` of scaled_dot_product_attention replaces it, and where nothing is
    masked. ``decisions`` are those of skip_policy "upstream".
    """
    policy = skipping.current()
    by = decisions if policy.name == "upstream" else policy
    return (
        causal
        and by.skips_causal(attention_mask, q_length, kv_length, q_offset, kv_offset, local_size)
    ) or (
        bidirectional and by.skips_bidirectional(attention_mask, kv_length, kv_offset, local_size)
    )


def fast_all(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all of a boolean tensor is True, as a 0-d boolean tensor."""
    return tensor.sum() == tensor.numel()


def shows_all(mask: torch.Tensor) -> bool:
    """The truth of fast_all."""
    return is_all_visible(mask) if mask.dtype == torch.bool else bool(fast_all(mask))


def is_all_visible(mask: torch.Tensor) -> bool:
    ops = operators()
    return _C._is_all_visible(mask) if ops is None else bool(ops._is_all_visible(mask))


def _causal(
    attention_mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: Offset,
    kv_offset: int,
    local_size: int | None,
) -> bool:
    if local_size is not None and kv_length >= local_size:
        return False
    mask = attention_mask
    if mask is not None:
        mask = padded(mask, kv_length + kv_offset, 0)
    if torch.compiler.is_exporting() or (mask is not None and is_opaque(mask)):
        return False
    # With an offset for each batch row, keys after one row's queries are not after another's.
    if isinstance(q_offset, torch.Tensor) and (q_offset.numel() != 1 or is_opaque(q_offset)):
        return False
    if mask is not None and mask.shape[-1] > kv_length:
        mask = mask[:, kv_offset : kv_offset + kv_length]
    if (q_length == 1 or kv_length == q_length) and (mask is None or shows_all(mask)):
        return True
    # Before anything is cached, keys after the queries are hidden by causality.
    return bool(q_offset == 0) and (
        mask is None or (shows_all(mask[:, :q_length]) and shows_all(~mask[:, q_length:]))
    )


def _bidirectional(
    attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int, local_size: int | None
) -> bool:
    mask = attention_mask
    if mask is not None:
        mask = padded(mask, kv_length + kv_offset, 0)
    if torch.compiler.is_exporting() or (mask is not None and is_opaque(mask)):
        return False
    if local_size is not None and kv_length >= local_size:
        return False
    return mask is None or is_all_visible(mask)


OWN_DECISIONS = Decisions(_causal, _bidirectional)
"""Of the mirrors, and of transformers since 5.20."""
