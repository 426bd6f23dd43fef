"""The mask functions of ``transformers.masking_utils`` as rules, and patterns of layers.

Tables are taken as upstream's closures take them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_mask._core import mask_rules, skipping
from attn_mask._core.arguments import check_no_rule, check_strided
from attn_mask._core.log_once import warn_once, was_warned
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.program import Source
from attn_mask._core.tracing import is_opaque, is_recording
from attn_mask._core.write import Offset, padded
from attn_mask._transformers.documents import count_sequences, left_padding_of

_P = ParamSpec("_P")
_R = TypeVar("_R")

_CHUNKS = Source("chunked_overlay", "left_padding", is_upstream=True)
_BLOCKS = Source("blockwise_overlay", "block_sequence_ids", is_upstream=True)
_PADDING = mask_rules.UPSTREAM_PADDING
_PACKED = Source("packed_sequence_mask_function", "packed_sequence_mask", is_upstream=True)
_REMAPPED = Source("remap_positions_for_packed_sequence", "position_ids", is_upstream=True)

causal_mask_function = mask_rules.causal()
bidirectional_mask_function = mask_rules.Bidirectional(is_upstream=True)


def _kept_by_size(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose results are kept: a model asks for the same few sizes in every step, and
    each rule keeps its program."""
    kept = functools.lru_cache(64)(make)

    @functools.wraps(make)
    def of_size(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Checked first: else a graph would depend on sizes that are known.
        if len(args) == 1 and type(args[0]) is int and not kwargs and not is_recording():
            return kept(args[0])
        return make(*args, **kwargs)

    return of_size


def and_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where all the mask functions do. Raises RuntimeError for what can't be called."""
    _check_callable(mask_functions)
    return mask_rules.intersection(*mask_functions)


def or_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where any of the mask functions does. Raises as and_masks does."""
    _check_callable(mask_functions)
    return mask_rules.union(*mask_functions)


def _check_callable(mask_functions: tuple[Any, ...]) -> None:
    if not all(map(callable, mask_functions)):
        raise RuntimeError(f"All inputs should be callable mask_functions: {mask_functions}")


@_kept_by_size
def sliding_window_overlay(sliding_window: int) -> MaskFunction:
    """Attends to no key ``sliding_window`` or more before the query."""
    return mask_rules.sized_window("sliding_window_overlay", "sliding_window", sliding_window)


@_kept_by_size
def sliding_window_causal_mask_function(sliding_window: int) -> MaskFunction:
    """Attends to the query's own position and the ``sliding_window - 1`` before it."""
    return and_masks(sliding_window_overlay(sliding_window), mask_rules.causal())


def sliding_window_bidirectional_overlay(sliding_window: int) -> MaskFunction:
    """Attends to keys at most ``sliding_window`` before or after the query."""
    return mask_rules.any_window(
        "sliding_window_bidirectional_overlay", sliding_window, sliding_window
    )


def sliding_window_bidirectional_mask_function(sliding_window: int) -> MaskFunction:
    """As sliding_window_bidirectional_overlay, by itself."""
    return and_masks(
        sliding_window_bidirectional_overlay(sliding_window), bidirectional_mask_function
    )


def chunked_overlay(chunk_size: int, left_padding: torch.Tensor) -> MaskFunction:
    """Attends to keys in the query's chunk; chunks start after ``left_padding``, ints [b]."""
    size = mask_rules.whole("chunked_overlay", "chunk_size", chunk_size)
    if size == 0:
        raise ValueError("chunked_overlay: expected chunk_size not to be 0")
    check_strided("chunked_overlay", "left_padding", left_padding)
    return mask_rules.Chunked(size, left_padding, _CHUNKS)


def chunked_causal_mask_function(chunk_size: int, left_padding: torch.Tensor) -> MaskFunction:
    """As chunked_overlay, and to no key after the query."""
    return and_masks(chunked_overlay(chunk_size, left_padding), mask_rules.causal())


def blockwise_overlay(block_sequence_ids: torch.Tensor) -> MaskFunction:
    """Attends to keys with the query's id (ints [b, n]), unless that is negative."""
    check_strided(_BLOCKS.function, _BLOCKS.argument, block_sequence_ids)
    return mask_rules.Blockwise(block_sequence_ids, _BLOCKS)


def padding_mask_function(padding_mask: torch.Tensor) -> MaskFunction:
    """Attends to the keys that the mask [b, n] shows."""
    check_strided(_PADDING.function, _PADDING.argument, padding_mask)
    return mask_rules.Padding(padding_mask, _PADDING)


def packed_sequence_mask_function(packed_sequence_mask: torch.Tensor) -> MaskFunction:
    """Attends to keys of the query's own sequence; ids [b, n]."""
    check_strided(_PACKED.function, _PACKED.argument, packed_sequence_mask)
    return mask_rules.Documents(packed_sequence_mask, _PACKED)


def remap_positions_for_packed_sequence(
    mask_function: Callable[..., Any], position_ids: torch.Tensor
) -> MaskFunction:
    """The mask function, evaluated at the positions in position_ids [b, n]."""
    check_strided(_REMAPPED.function, _REMAPPED.argument, position_ids)
    if isinstance(mask_function, MaskFunction):
        _warn_of_blocks_at_positions(mask_function, position_ids)
    return mask_rules.reindexed(_REMAPPED.function, mask_function, position_ids, _REMAPPED)


def packed_sequence_compatibility_function(
    mask_function: Callable[..., Any],
    position_ids: torch.Tensor,
    packed_sequence_mask: torch.Tensor,
) -> MaskFunction:
    """The mask function within each packed sequence, evaluated at positions in it."""
    return and_masks(
        packed_sequence_mask_function(packed_sequence_mask),
        remap_positions_for_packed_sequence(mask_function, position_ids),
    )


def add_offsets_to_mask_function(
    mask_function: Callable[..., Any], q_offset: Offset, kv_offset: Offset
) -> MaskFunction:
    """The mask function, evaluated at positions from ``q_offset`` and ``kv_offset`` on."""
    return mask_rules.shift(mask_function, q_offset, kv_offset)


def prepare_padding_mask(
    attention_mask: torch.Tensor | None,
    kv_length: int,
    kv_offset: int,
    *,
    _slice: bool | None = None,
) -> Any:
    """The padding mask [b, n], with zeros after it up to key kv_offset + kv_length.

    ``_slice`` of releases before 5.0 is accepted, and has no effect.
    """
    if attention_mask is None:
        return None
    check_no_rule("prepare_padding_mask", "attention_mask", attention_mask)
    return padded(attention_mask, kv_length + kv_offset, 0)


def maybe_pad_block_sequence_ids(
    block_sequence_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kv_length: int,
    kv_offset: int,
) -> torch.Tensor:
    """The ids [b, n], with -1 after them up to key kv_offset + kv_length.

    ``attention_mask`` is not used; upstream's signature has it.
    """
    length = kv_length + kv_offset
    if block_sequence_ids.dtype == torch.uint8 and length > block_sequence_ids.shape[-1]:
        raise TypeError(
            "maybe_pad_block_sequence_ids: expected block_sequence_ids to be of a signed dtype, "
            f"since -1 stands after them, but got {block_sequence_ids.dtype}"
        )
    return padded(block_sequence_ids, length, -1)


def fast_all(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all of a boolean tensor is True, as a 0-d boolean tensor."""
    return tensor.sum() == tensor.numel()


# Documents that are packed, where the mask that is made does not keep them apart


def warn_of_lost_documents(
    attention_mask: Any, position_ids: torch.Tensor | None, q_length: int
) -> None:
    """Logs once that a padding mask with other numbers than 0 and 1 separates no documents, and
    once that positions which start again do not: ``position_ids`` that are not looked at.

    Reads values on the CPU alone, and not in steps of decoding.
    """
    mask: torch.Tensor | None = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        mask = attention_mask if attention_mask.device.type == "cpu" else None
    numbers = mask if mask is not None and mask.dtype != torch.bool and q_length > 1 else None
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] <= 1 or position_ids.device.type != "cpu"
    ):
        position_ids = None
    if numbers is None and position_ids is None:
        return
    # A mode (make_fx, fake tensors) may be recording, too.
    if is_opaque(mask, position_ids) or _get_current_dispatch_mode() is not None:
        return
    if numbers is not None and bool((numbers.to(torch.bool) != numbers).any()):
        warn_once(
            "numbers in a padding mask",
            "attn_mask: a 2-D attention_mask holds numbers other than 0 and 1. As in transformers, "
            "any but 0 is a token that all others may attend to: documents packed into one row see "
            "each other. To keep them apart, run the model within "
            "attn_mask.packed(document_ids=...) under attn_mask.install(), or give it the mask of "
            "attn_mask.rules.documents(ids)",
        )
    if position_ids is None:
        return
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return
    if attention_mask is not None:
        if mask is None or mask.shape[1] < position_ids.shape[1]:
            return
        # Positions of padding are anything.
        shown = mask[:, -position_ids.shape[1] :] != 0
        if not bool((starts & shown[:, 1:] & shown[:, :-1]).any()):
            return
    warn_once(
        "positions that start again",
        "attn_mask: position_ids start again within a row, beside a cache or an attention_mask. As "
        "in transformers, they are then not looked at: documents packed into one row see each "
        "other. To keep them apart, run the model within attn_mask.packed(...), or call "
        "attn_mask.install(packing='position_ids'); or give it use_cache=False and no "
        "attention_mask",
    )


def _warn_of_blocks_at_positions(rule: mask_rules.MaskFunction, position_ids: torch.Tensor) -> None:
    """Logs once that block ids are looked up at positions that start again within a row.

    Reads values on the CPU alone.
    """
    kind = "blocks at positions"
    blocks = [part.ids for part in rule.walk() if isinstance(part, mask_rules.Blockwise)]
    if (
        not blocks
        or was_warned(kind)
        or is_opaque(position_ids)
        or skipping.current().name == "shapes"
        or not _may_hold(position_ids, lambda ids: count_sequences(ids) > 0)
        or not any(_may_hold(ids, lambda ids: ids >= 0) for ids in blocks)
    ):
        return
    warn_once(
        kind,
        "attn_mask: position_ids start again within a row, and a layer looks up which tokens are "
        "of one image at these positions. As in transformers, images of a row's first document "
        "stand in each later one. To look them up where they are, run the model within "
        "attn_mask.packed(document_ids=...) under attn_mask.install()",
    )


def _may_hold(tensor: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether it holds for a value; True where reading them would wait for a device."""
    return tensor.device.type != "cpu" or is_opaque(tensor) or bool(of(tensor).any())


class Pattern(NamedTuple):
    """What a kind of layers attends to."""

    rule: MaskFunction
    local: MaskFunction | None = None
    """The part of the rule that bounds it to some neighbourhood."""
    local_size: int | None = None
    by_position: bool = False
    """Whether the rule depends on positions, and not on the distance of two of them only."""


def _attribute_of(config: Any, name: str, article: str) -> Any:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(
            f"Could not find {article} `{name}` argument in the config, or it is not set"
        )
    return value


def sliding_pattern(config: Any, attention_mask: torch.Tensor | None, kv_end: Any) -> Pattern:
    size = _attribute_of(config, "sliding_window", "a")
    return Pattern(sliding_window_causal_mask_function(size), sliding_window_overlay(size), size)


def bidirectional_sliding_pattern(
    config: Any, attention_mask: torch.Tensor | None, kv_end: Any
) -> Pattern:
    size = _attribute_of(config, "sliding_window", "a")
    return Pattern(sliding_window_bidirectional_mask_function(size), None, size)


def chunked_pattern(config: Any, attention_mask: torch.Tensor | None, kv_end: Any) -> Pattern:
    size = _attribute_of(config, "attention_chunk_size", "an")
    if "flash" in (config._attn_implementation or "") and kv_end > size:
        raise ValueError(
            "Flash attention cannot handle chunked attention, and the key-value length is larger "
            "than the chunk size so the chunked pattern cannot be respected. You should use "
            "another `attn_implementation` when instantiating the model"
        )
    if attention_mask is not None:
        overlay = chunked_overlay(size, left_padding_of(attention_mask))
        return Pattern(and_masks(overlay, mask_rules.causal()), overlay, size, by_position=True)
    return _chunked_pattern(size)


@_kept_by_size
def _chunked_pattern(size: int) -> Pattern:
    overlay = mask_rules.chunked(size)
    return Pattern(and_masks(overlay, mask_rules.causal()), overlay, size, by_position=True)
