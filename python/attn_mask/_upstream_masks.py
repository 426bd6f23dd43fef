"""What install() puts into transformers.masking_utils.

It stands at the top of a module, so that it can be pickled; what depends on the release is looked
up when it is called.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from attn_mask import _install_options, _process, _skipping, masking_utils, rules
from attn_mask._engine import Axis, Sizes, Spelling, write_mask
from attn_mask._upstream_source import Module

__all__ = [
    "Decisions",
    "Release",
    "chunked_causal_mask_function",
    "chunked_overlay",
    "eager_mask",
    "eager_mask_at",
    "find_packed_sequence_indices",
    "no_sequences",
    "own_decisions",
    "release_decisions",
    "sdpa_mask",
    "sdpa_mask_at",
    "state",
]


class Decisions(NamedTuple):
    """How it is decided that no mask is needed, under skip_policy."""

    causal: Callable[..., bool]
    """(attention_mask, q_length, kv_length, q_offset, kv_offset, local_size)"""
    bidirectional: Callable[..., bool]
    """(attention_mask, kv_length, kv_offset, local_size)"""


class Release(NamedTuple):
    """What depends on the release."""

    decisions: Decisions
    by_vmap: bool
    """Whether mask functions are evaluated at one element at a time."""
    find_packed_sequence_indices: Callable[..., Any]
    preprocess: Any
    """Its _preprocess_mask_arguments; None where that is not replaced."""


# As masking_utils does it.
own_decisions = Decisions(masking_utils._skips_causal, masking_utils._skips_bidirectional)


class _State:
    def __init__(self) -> None:
        self.release = Release(
            own_decisions, False, masking_utils.find_packed_sequence_indices, None
        )
        self.options = _install_options.DEFAULT


state = _process.kept("upstream_masks", _State)


def release_decisions(upstream: ModuleType, module: Module) -> Decisions:
    """As the release does it, by calling its functions.

    Raises NotImplementedError where it calls them in a way that is not known here.
    """
    causal: Any = getattr(upstream, "_ignore_causal_mask_sdpa", None)
    bidirectional: Any = getattr(upstream, "_ignore_bidirectional_mask_sdpa", None)
    prepare = upstream.prepare_padding_mask
    of_causal = _parameters(module, "_ignore_causal_mask_sdpa", causal)
    of_bidirectional = _parameters(module, "_ignore_bidirectional_mask_sdpa", bidirectional)
    sizes = ["kv_length", "kv_offset", "local_attention_size"]
    takes_offset = of_causal == ["padding_mask", "q_length", *sizes[:1], "q_offset", *sizes[1:]]
    if not takes_offset and of_causal not in (
        ["padding_mask", "q_length", *sizes],
        ["padding_mask", "query_length", *sizes],
    ):
        raise _unknown("_ignore_causal_mask_sdpa")
    takes_size = of_bidirectional == ["padding_mask", "kv_length", "local_attention_size"]
    if bidirectional is not None and not takes_size and of_bidirectional != ["padding_mask"]:
        raise _unknown("_ignore_bidirectional_mask_sdpa")
    # Until 4.57 it cuts the mask, too, unless told not to.
    of_prepare = _parameters(module, "prepare_padding_mask", prepare)
    whole = {"_slice": False} if "_slice" in of_prepare else {}

    def skips_causal(
        attention_mask: torch.Tensor | None,
        q_length: int,
        kv_length: int,
        q_offset: Any,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        policy = _skipping.current()
        if policy.name != "upstream":
            return policy.skips_causal(
                attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
            )
        padding_mask = prepare(attention_mask, kv_length, kv_offset, **whole)
        if takes_offset:
            return bool(causal(padding_mask, q_length, kv_length, q_offset, kv_offset, local_size))
        return bool(causal(padding_mask, q_length, kv_length, kv_offset, local_size))

    def skips_bidirectional(
        attention_mask: torch.Tensor | None,
        kv_length: int,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        policy = _skipping.current()
        if policy.name != "upstream":
            return policy.skips_bidirectional(attention_mask, kv_length, kv_offset, local_size)
        padding_mask = prepare(attention_mask, kv_length, kv_offset, **whole)
        if takes_size:
            return bool(bidirectional(padding_mask, kv_length, local_size))
        return bool(bidirectional(padding_mask))

    return Decisions(skips_causal, skips_bidirectional)


def _parameters(module: Module, name: str, function: Callable[..., Any] | None) -> list[str]:
    """How the release calls it: as its source defines it, whatever stands in its place."""
    if function is None:
        return []
    defined = module.source.parameters(name) if module.source else None
    if defined is not None:
        return defined
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _unknown(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_mask.install: expected transformers' {name} to take the arguments of a release that "
        "is known here, but it takes others: this attn_mask is too old for the transformers here"
    )


def _spelling(dtype: torch.dtype | None) -> Spelling:
    """As the options of install() say."""
    masked_value, unmask_unattended, _ = state.options
    return Spelling(dtype, None, unmask_unattended, None if dtype is None else masked_value)


def sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The boolean mask [b, 1, q, kv], or None where the release skips it."""
    decisions = state.release.decisions
    if allow_is_causal_skip and decisions.causal(
        attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
    ):
        return None
    if allow_is_bidirectional_skip and decisions.bidirectional(
        attention_mask, kv_length, kv_offset, local_size
    ):
        return None
    return write_mask(
        "sdpa_mask",
        mask_function,
        Sizes(batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        _spelling(None),
        use_vmap,
    )


def eager_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The additive mask [b, 1, q, kv], or None where the release skips it."""
    if allow_is_bidirectional_skip and state.release.decisions.bidirectional(
        attention_mask, kv_length, kv_offset, local_size
    ):
        return None
    return write_mask(
        "eager_mask",
        mask_function,
        Sizes(batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        _spelling(dtype),
        use_vmap,
    )


# Until 5.3: the positions of the queries as a tensor, on the device of the mask.


def sdpa_mask_at(
    batch_size: int,
    cache_position: torch.Tensor,
    kv_length: int,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """sdpa_mask of queries at the positions [q]."""
    q_length = cache_position.shape[0]
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        Axis(q_length, 0, cache_position),
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip,
        allow_is_bidirectional_skip,
        state.release.by_vmap if use_vmap is None else use_vmap,
        cache_position.device,
    )


def eager_mask_at(
    batch_size: int,
    cache_position: torch.Tensor,
    kv_length: int,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """eager_mask of queries at the positions [q]."""
    q_length = cache_position.shape[0]
    return eager_mask(
        batch_size,
        q_length,
        kv_length,
        Axis(q_length, 0, cache_position),
        kv_offset,
        mask_function,
        attention_mask,
        dtype,
        allow_is_bidirectional_skip,
        state.release.by_vmap if use_vmap is None else use_vmap,
        cache_position.device,
        local_size,
    )


def find_packed_sequence_indices(position_ids: torch.Tensor) -> Any:
    """The release's, unless skip_policy says that no values are looked at."""
    policy = _skipping.current()
    if policy.name != "shapes":
        return state.release.find_packed_sequence_indices(position_ids)
    return None if policy.packing == "none" else masking_utils._count_sequences(position_ids)


def _preprocess_mask_arguments(*args: Any, **kwargs: Any) -> Any:
    """The release's, which makes booleans of whatever numbers a padding mask holds."""
    # (config, inputs_embeds, attention_mask, ...); until 5.1, input_embeds.
    mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        embeds = args[1] if len(args) > 1 else kwargs.get("inputs_embeds")
        if embeds is not None:
            masking_utils.name_numbers(mask, embeds.shape[1])
    return state.release.preprocess(*args, **kwargs)


def no_sequences(position_ids: torch.Tensor) -> None:
    """Of 4.53.0, which does not look for them."""


# Until 4.55, chunks did not start after left padding.


def chunked_overlay(chunk_size: int) -> rules.MaskFunction:
    return rules.chunked(chunk_size)


def chunked_causal_mask_function(chunk_size: int) -> rules.MaskFunction:
    return rules.intersection(rules.chunked(chunk_size), rules.causal())
