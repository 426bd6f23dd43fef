"""The mask functions of ``transformers.masking_utils`` as rules, and patterns of layers.

Tables are taken as upstream's closures take them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_no_rule, check_strided
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.program import Source
from attn_mask._core.tracing import is_recording
from attn_mask._core.write import Offset, padded
from attn_mask._transformers.documents import left_padding_of, name_blocks_at_positions

_CHUNKS = Source("chunked_overlay", "left_padding", is_upstream=True)
_BLOCKS = Source("blockwise_overlay", "block_sequence_ids", is_upstream=True)
_PADDING = mask_rules.UPSTREAM_PADDING
_PACKED = Source("packed_sequence_mask_function", "packed_sequence_mask", is_upstream=True)
_REMAPPED = Source("remap_positions_for_packed_sequence", "position_ids", is_upstream=True)

causal_mask_function = mask_rules.causal()
bidirectional_mask_function = mask_rules.Bidirectional(is_upstream=True)


def and_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where all the mask functions do. Raises RuntimeError for what can't be called."""
    _check_callable(mask_functions)
    return mask_rules.intersection(*mask_functions)


def or_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where any of the mask functions does. Raises as and_masks does."""
    _check_callable(mask_functions)
    return mask_rules.union(*mask_functions)


def _check_callable(mask_functions: tuple[Any, ...]) -> None:
    if not all(callable(mask_function) for mask_function in mask_functions):
        raise RuntimeError(f"All inputs should be callable mask_functions: {mask_functions}")


def sliding_window_overlay(sliding_window: int) -> MaskFunction:
    """Attends to no key ``sliding_window`` or more before the query."""
    return mask_rules.sized_window("sliding_window_overlay", "sliding_window", sliding_window)


def sliding_window_causal_mask_function(sliding_window: int) -> MaskFunction:
    """Attends to the query's own position and the ``sliding_window - 1`` before it."""
    # Checked first: else a graph would depend on sizes that are known.
    is_kept = not is_recording() and type(sliding_window) is int
    if is_kept and sliding_window in _sliding_windows:
        return _sliding_windows[sliding_window]
    rule = and_masks(sliding_window_overlay(sliding_window), mask_rules.causal())
    if is_kept and len(_sliding_windows) < 64:
        _sliding_windows[sliding_window] = rule
    return rule


# A model makes the same few in every step; each keeps its program.
_sliding_windows: dict[int, MaskFunction] = {}


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
        name_blocks_at_positions(mask_function, position_ids)
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
    is_kept = not is_recording() and type(size) is int
    if is_kept and size in _chunks:
        return _chunks[size]
    overlay = mask_rules.chunked(size)
    pattern = Pattern(and_masks(overlay, mask_rules.causal()), overlay, size, by_position=True)
    if is_kept and len(_chunks) < 64:
        _chunks[size] = pattern
    return pattern


_chunks: dict[int, Pattern] = {}
