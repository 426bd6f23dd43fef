"""What install() puts into transformers.masking_utils.

It stands at the top of a module, so that it can be pickled; what depends on the release is looked
up when it is called.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core import blocks, mask_rules, process, skipping
from attn_mask._core.arguments import check_flag, check_no_rule, checked_masked_value
from attn_mask._core.counts import count
from attn_mask._core.timing import timed
from attn_mask._core.write import BOOLEAN, Axis, MaskFormat, Offset, write_mask
from attn_mask._transformers import documents, packing
from attn_mask._transformers.arguments import cache_and_positions
from attn_mask._transformers.create import Interface
from attn_mask._transformers.skip_rules import OWN_DECISIONS, Decisions, is_skipped

_CAUSAL = mask_rules.causal()


class Options(NamedTuple):
    """See install()."""

    masked_value: float | None = None
    unmask_unattended: bool = False
    aten_only: bool = False
    packing: str = "upstream"


_PACKING = ("upstream", "position_ids", "cu_seq_lens")


def checked_options(
    name: str, masked_value: Any, unmask_unattended: Any, aten_only: Any, packed_by: Any
) -> Options:
    """The options as they were given to a function.

    Raises TypeError or ValueError for what can be none.
    """
    for argument, flag in (("unmask_unattended", unmask_unattended), ("aten_only", aten_only)):
        check_flag(name, argument, flag)
    masked_value = checked_masked_value(name, masked_value)
    if packed_by not in _PACKING:
        raise ValueError(
            f"{name}: expected packing to be one of {', '.join(map(repr, _PACKING))}, "
            f"but got {packed_by!r}"
        )
    return Options(masked_value, unmask_unattended, aten_only, packed_by)


class Release(NamedTuple):
    """What depends on the release."""

    decisions: Decisions = OWN_DECISIONS
    by_vmap: bool = False
    """Whether mask functions are evaluated at one element at a time by default."""
    find_packed_sequence_indices: Callable[..., Any] = documents.find_packed_sequence_indices
    preprocess: Any = None
    """Its _preprocess_mask_arguments; None where that is not replaced."""
    interface: Interface = Interface(None, {})
    """Its mask functions of attention implementations."""


class _State:
    def __init__(self) -> None:
        self.release = Release()
        self.options = Options()


state = process.kept("upstream_masks", _State)


@timed
def sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset | Axis = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The boolean mask [b, 1, q, kv], or None where the release skips it."""
    packing.check_no_documents()
    check_no_rule("sdpa_mask", "attention_mask", attention_mask)
    release = state.release
    if (allow_is_causal_skip or allow_is_bidirectional_skip) and is_skipped(
        release.decisions,
        allow_is_causal_skip,
        allow_is_bidirectional_skip,
        attention_mask,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        local_size,
    ):
        count("masks skipped")
        return None
    count("sdpa_mask")
    return write_mask(
        "sdpa_mask",
        mask_function,
        (batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        MaskFormat(unmask_unattended=True) if state.options.unmask_unattended else BOOLEAN,
        release.by_vmap if use_vmap is None else use_vmap,
    )


@timed
def eager_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset | Axis = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool | None = None,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The additive mask [b, 1, q, kv], or None where the release skips it."""
    packing.check_no_documents()
    check_no_rule("eager_mask", "attention_mask", attention_mask)
    release, options = state.release, state.options
    if allow_is_bidirectional_skip and is_skipped(
        release.decisions,
        False,
        True,
        attention_mask,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        local_size,
    ):
        count("masks skipped")
        return None
    count("eager_mask")
    return write_mask(
        "eager_mask",
        mask_function,
        (batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        MaskFormat(dtype, None, options.unmask_unattended, options.masked_value),
        release.by_vmap if use_vmap is None else use_vmap,
    )


# Until 5.3, q_length was the positions of the queries as a tensor [q], on the device of the mask,
# and there was no q_offset.


@timed
def sdpa_mask_at(
    batch_size: int,
    cache_position: torch.Tensor,
    kv_length: int,
    kv_offset: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor | None:
    """sdpa_mask of queries at the positions."""
    q_length = cache_position.shape[0]
    at = Axis(q_length, 0, cache_position)
    kwargs["device"] = cache_position.device
    return sdpa_mask(batch_size, q_length, kv_length, at, kv_offset, *args, **kwargs)


@timed
def eager_mask_at(
    batch_size: int,
    cache_position: torch.Tensor,
    kv_length: int,
    kv_offset: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor | None:
    """eager_mask of queries at the positions."""
    q_length = cache_position.shape[0]
    at = Axis(q_length, 0, cache_position)
    kwargs["device"] = cache_position.device
    return eager_mask(batch_size, q_length, kv_length, at, kv_offset, *args, **kwargs)


@functools.wraps(blocks.create_block_mask, assigned=("__doc__",))
def create_block_mask(*args: Any, **kwargs: Any) -> Any:
    packing.check_no_documents()
    return blocks.create_block_mask(*args, **kwargs)


def find_packed_sequence_indices(position_ids: torch.Tensor) -> Any:
    """The release's, unless skip_policy forbids reading values."""
    policy = skipping.current()
    if policy.name != "shapes":
        return state.release.find_packed_sequence_indices(position_ids)
    return None if policy.packing == "none" else documents.count_sequences(position_ids)


def preprocess_mask_arguments(*args: Any, **kwargs: Any) -> Any:
    """The release's, which makes booleans of whatever numbers a padding mask holds, and looks at
    position_ids only without a mask and a cache."""
    # (config, inputs_embeds, attention_mask, ...); until 5.1, input_embeds.
    embeds = args[1] if len(args) > 1 else kwargs.get("inputs_embeds")
    mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
    check_no_rule("_preprocess_mask_arguments", "attention_mask", mask)
    if embeds is not None and embeds.shape[1] > 1 and state.options.packing == "upstream":
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            documents.name_numbers(mask, embeds.shape[1])
        cache, positions = cache_and_positions(args, kwargs)
        if positions is not None and (mask is not None or cache is not None):
            documents.name_restarts(positions, mask)
    return state.release.preprocess(*args, **kwargs)


def no_sequences(position_ids: torch.Tensor) -> None:
    """Of 4.53.0, which does not detect them."""


# Until 4.55, chunks did not start after left padding.


def chunked_overlay(chunk_size: int) -> mask_rules.MaskFunction:
    return mask_rules.chunked(chunk_size)


def chunked_causal_mask_function(chunk_size: int) -> mask_rules.MaskFunction:
    return mask_rules.intersection(mask_rules.chunked(chunk_size), mask_rules.causal())
