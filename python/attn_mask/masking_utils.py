"""Drop-in for ``transformers.masking_utils``, on native rules.

Names, signatures, defaults, results and errors are those of the release of transformers that
``attn_mask._transformers.UPSTREAM`` names; transformers itself is not needed: configs and caches
need the attributes that upstream's have. Mask functions are objects that carry their rule
(``attn_mask.rules``), so that a mask is written at once by ``torch.ops.attn_mask.boolean`` or
``.additive``. Only callables of the user's are called, for some rows at a time.

Argument names of all releases since 4.53 are understood: ``input_embeds`` is ``inputs_embeds``,
``past_key_values`` is ``cache``, and ``cache_position`` is taken where it was taken once. Beyond
upstream, the create functions take ``document_ids`` or ``cu_seqlens``, and ``blocks_in_window``;
see create_causal_mask.

Throughout: b batch_size, q q_length, kv kv_length. Query row i stands at position q_offset + i, key
column j at kv_offset + j; an offset is an int or a tensor (0-d, or [b, 1] for one per batch row),
whose value is not read to write a mask. In a boolean mask True attends; an additive one holds 0
there, and ``torch.finfo(dtype).min`` elsewhere.
"""

from collections import ChainMap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attn_mask import rules
from attn_mask._core.arguments import check_no_rule
from attn_mask._core.events import timed
from attn_mask._core.tracing import is_opaque
from attn_mask._core.write import check_padding
from attn_mask._transformers import writers
from attn_mask._transformers.arguments import (
    accepts_renamed_arguments,
    understands_cache_position,
    understands_positions,
)
from attn_mask._transformers.create import (
    Call,
    Interface,
    creates,
    find_first_full_attention_index,
    preprocess,
)
from attn_mask._transformers.documents import find_packed_sequence_indices
from attn_mask._transformers.mask_functions import (
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    fast_all,
    maybe_pad_block_sequence_ids,
    or_masks,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sliding_window_bidirectional_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from attn_mask._transformers.visual import AttentionMask, tensor_to_mask_visual
from attn_mask._transformers.writers import mirrors_eager, mirrors_sdpa
from attn_mask.block_mask import create_block_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
    "AttentionMask",
    "AttentionMaskInterface",
    "add_offsets_to_mask_function",
    "and_masks",
    "bidirectional_mask_function",
    "blockwise_overlay",
    "causal_mask_function",
    "chunked_causal_mask_function",
    "chunked_overlay",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
    "create_recurrent_attention_mask",
    "create_sliding_window_causal_mask",
    "eager_mask",
    "fast_all",
    "find_first_full_attention_index",
    "find_packed_sequence_indices",
    "flash_attention_mask",
    "flex_attention_mask",
    "maybe_pad_block_sequence_ids",
    "or_masks",
    "packed_sequence_compatibility_function",
    "packed_sequence_mask_function",
    "padding_mask_function",
    "prepare_padding_mask",
    "remap_positions_for_packed_sequence",
    "sdpa_mask",
    "sliding_window_bidirectional_mask_function",
    "sliding_window_bidirectional_overlay",
    "sliding_window_causal_mask_function",
    "sliding_window_overlay",
    "tensor_to_mask_visual",
]

# Masks of each attention implementation


sdpa_mask = mirrors_sdpa(writers.write_sdpa_mask, __name__)
eager_mask = mirrors_eager(writers.write_eager_mask, __name__)


@understands_cache_position
@timed
def flash_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What flash attention takes: the padding of the last kv keys [b, kv], or None without any.

    A shorter mask (static caches) is returned as it is. ``mask_function`` is not used.

    Mirrors ``transformers.masking_utils.flash_attention_mask``.
    """
    if attention_mask is None:
        return None
    check_no_rule("flash_attention_mask", "attention_mask", attention_mask)
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.shape[1] == kv_length and attention_mask.all():
        return None
    return attention_mask


@understands_cache_position
@timed
def flex_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> "BlockMask":
    """The BlockMask for flex attention, equal to that of torch's create_block_mask.

    Arguments as for sdpa_mask.

    Mirrors ``transformers.masking_utils.flex_attention_mask``.
    """
    check_padding("flex_attention_mask", attention_mask)
    if attention_mask is not None and not fast_all(attention_mask):
        if attention_mask.dtype != torch.bool and attention_mask.dtype not in rules.ID_DTYPES:
            raise TypeError(
                "flex_attention_mask: expected attention_mask to be bool, "
                f"but got {attention_mask.dtype}"
            )
        padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding_mask))
    return create_block_mask(
        rules.function(mask_function),
        batch_size,
        1,
        q_length,
        kv_length,
        device,
        q_offset=q_offset,
        kv_offset=kv_offset,
    )


class AttentionMaskInterface(ChainMap[str, Callable[..., Any]]):
    """The function that makes the mask of each attention implementation.

    ``register`` is for all instances, item assignment for one, as in transformers.
    """

    _global_mapping = writers.of_mirror

    def __init__(self) -> None:
        self._local_mapping: dict[str, Callable[..., Any]] = {}
        super().__init__(self._local_mapping, self._global_mapping)

    def __getitem__(self, key: str) -> Callable[..., Any]:
        # As dynamo can trace it.
        if key in self._local_mapping:
            return self._local_mapping[key]
        return self._global_mapping[key]

    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None:
        cls._global_mapping[key] = value

    def valid_keys(self) -> list[str]:
        return list(self)


writers.of_mirror.update(
    {
        "sdpa": sdpa_mask,
        "eager": eager_mask,
        "flash_attention_2": flash_attention_mask,
        "flash_attention_3": flash_attention_mask,
        "flash_attention_4": flash_attention_mask,
        "flex_attention": flex_attention_mask,
    }
)


ALL_MASK_ATTENTION_FUNCTIONS: AttentionMaskInterface = AttentionMaskInterface()


# Masks of a model's layers


def _interface() -> Interface:
    mapping = ALL_MASK_ATTENTION_FUNCTIONS
    return Interface(mapping, mapping._global_mapping)


@understands_positions
def _preprocess_mask_arguments(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Any,
    position_ids: torch.Tensor | None,
    layer_idx: int | None,
    encoder_hidden_states: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    call = Call(
        config,
        inputs_embeds,
        attention_mask,
        cache,
        position_ids,
        layer_idx=layer_idx,
        encoder_hidden_states=encoder_hidden_states,
    )
    return preprocess(_interface(), call)


create_bidirectional_mask = creates(
    "create_bidirectional_mask",
    _interface,
    """The mask of full attention in both directions, as the attention implementation takes it.

    Args as for create_causal_mask, and:
        encoder_hidden_states: [b, kv, hidden]: the keys, where they are not the queries'; gives
            the number of keys, the batch size and the dtype.
        allow_is_bidirectional_skip: whether None may stand for a mask that masks nothing.

    Mirrors ``transformers.masking_utils.create_bidirectional_mask``.
    """,
)

create_bidirectional_sliding_window_mask = creates(
    "create_bidirectional_sliding_window_mask",
    _interface,
    """As create_bidirectional_mask, up to the config's ``sliding_window`` to either side.

    Raises ValueError for a config without the window.

    Mirrors ``transformers.masking_utils.create_bidirectional_sliding_window_mask``.
    """,
)

create_causal_mask = creates(
    "create_causal_mask",
    _interface,
    """The mask of full causal attention, as the config's attention implementation takes it.

    Args:
        config: of the model; its ``_attn_implementation`` names a function in
            ALL_MASK_ATTENTION_FUNCTIONS (None is returned for one that is not there), and its
            ``is_causal`` of False selects create_bidirectional_mask.
        inputs_embeds: [b, q, hidden]; gives the sizes, dtype and device.
        attention_mask: which keys are not padding [b, n], not zero; or a 4D mask or a BlockMask,
            which is returned as it is.
        cache: the cache, or None.
        position_ids: [b or 1, q]; without mask and cache, jumps in them are the borders of packed
            sequences. Those of another rank are ignored.
        or_mask_function, and_mask_function: OR-ed and AND-ed with the mask.
        block_sequence_ids: ints [b, n]; tokens with the same id (not negative) attend to each
            other, whatever their order.
        layer_idx: the cache's layer that gives the sizes; by default the first of full attention.
        allow_is_causal_skip: whether None may stand for a plain causal mask.
        document_ids: ints [b or 1, n], for each of the n tokens up to the last query, those in the
            cache included (without a cache, n is q): tokens of different documents do not attend
            to each other, not even within a block. Replaces position_ids.
            Chunks, and the mask functions given, count positions from the start of each run of
            equal ids.
        cu_seqlens: the same as ints [documents + 1] that rise from 0 to n, the same for each row.
            Values are only checked on the CPU.
        blocks_in_window: whether blocks end where the window or chunk does (create functions of
            local attention only).

    Flash attention gets no mask functions: it keeps documents apart by the cu_seqlens that the
    model is given for it, and by nothing where there is padding. So document_ids, and documents
    beside padding, are a ValueError there.

    Raises ValueError or TypeError for ids, positions or cu_seqlens of a wrong length, rank or
    dtype, and for a cache that reports impossible sizes; see also sdpa_mask.

    Mirrors ``transformers.masking_utils.create_causal_mask``.
    """,
)

create_sliding_window_causal_mask = creates(
    "create_sliding_window_causal_mask",
    _interface,
    """As create_causal_mask, within the config's ``sliding_window``.

    ``layer_idx`` is by default the cache's first sliding layer. Raises ValueError for a config
    without the window.

    Mirrors ``transformers.masking_utils.create_sliding_window_causal_mask``.
    """,
)

create_chunked_causal_mask = creates(
    "create_chunked_causal_mask",
    _interface,
    """As create_causal_mask, within chunks of the config's ``attention_chunk_size``.

    Chunks start after each row's left padding. ``layer_idx`` is by default the cache's first
    sliding layer. Raises ValueError for a config without the size, and for flash attention over
    more keys than a chunk holds.

    Mirrors ``transformers.masking_utils.create_chunked_causal_mask``.
    """,
)


@accepts_renamed_arguments
def create_recurrent_attention_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding of this step's tokens [b, q], for layers of linear attention.

    None without a 2D mask, for a single token (it is no padding), and for a mask of ones throughout
    if not tracing.

    Mirrors ``transformers.masking_utils.create_recurrent_attention_mask``.
    """
    check_no_rule("create_recurrent_attention_mask", "attention_mask", attention_mask)
    q_length = inputs_embeds.shape[1]
    if attention_mask is None or attention_mask.ndim != 2 or q_length == 1:
        return None
    if not is_opaque(attention_mask) and bool((attention_mask == 1).all()):
        return None
    # Contiguous: strides that change from step to step make torch.compile compile again.
    return attention_mask[:, -q_length:].contiguous()


LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING: dict[str, Any] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
    "compressed_sparse_attention": create_sliding_window_causal_mask,
    "heavily_compressed_attention": create_sliding_window_causal_mask,
    "minimax_m3_sparse": create_causal_mask,
    # An indexer adds to the mask, and has no use for `is_causal`.
    "indexed_attention": partial(create_causal_mask, allow_is_causal_skip=False),
    "linear_attention": create_recurrent_attention_mask,
    "conv": create_recurrent_attention_mask,
    "hybrid": {
        "full_attention": create_causal_mask,
        "linear_attention": create_recurrent_attention_mask,
    },
    "hybrid_sliding": {
        "sliding_attention": create_causal_mask,
        "linear_attention": create_recurrent_attention_mask,
    },
}


@understands_positions
def create_masks_for_generate(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None = None,
    or_mask_function: Callable[..., Any] | None = None,
    and_mask_function: Callable[..., Any] | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    *,
    document_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    blocks_in_window: bool = False,
    **kwargs: Any,
) -> Any:
    """All the masks that a model's layers need.

    Arguments as for create_causal_mask. Returns a dict from the types of layers to masks for a
    config with ``layer_types`` (the attention mask as it came, if one of them is unknown), else the
    one mask of a config with ``sliding_window``, ``attention_chunk_size``, or neither.

    Mirrors ``transformers.masking_utils.create_masks_for_generate``.
    """
    check_no_rule("create_masks_for_generate", "attention_mask", attention_mask)
    config = config.get_text_config()
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "position_ids": position_ids,
        "or_mask_function": or_mask_function,
        "and_mask_function": and_mask_function,
        "block_sequence_ids": block_sequence_ids,
    }
    # Functions that users put into the mapping take upstream's arguments only.
    if document_ids is not None:
        arguments["document_ids"] = document_ids
    if cu_seqlens is not None:
        arguments["cu_seqlens"] = cu_seqlens
    if blocks_in_window:
        arguments["blocks_in_window"] = blocks_in_window
    if hasattr(config, "layer_types"):
        layer_types = set(config.layer_types)
        if not layer_types <= LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.keys():
            return attention_mask
        writers: dict[str, Any] = {}
        for layer_type in layer_types:
            create = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_type]
            if isinstance(create, dict):
                for part, create_part in create.items():
                    if part not in writers:
                        writers[part] = create_part(**arguments)
            else:
                writers[layer_type] = create(**arguments)
        return writers
    if getattr(config, "sliding_window", None) is not None:
        return create_sliding_window_causal_mask(**arguments)
    if getattr(config, "attention_chunk_size", None) is not None:
        return create_chunked_causal_mask(**arguments)
    return create_causal_mask(**arguments)
