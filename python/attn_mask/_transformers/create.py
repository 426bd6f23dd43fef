"""The create functions of ``transformers.masking_utils``: the mask of a kind of a model's layers.

They are made twice: for ``attn_mask.masking_utils``, and for what install() puts into the place of
transformers' own where documents are packed. Each has its mapping of mask functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask._core.arguments import check_no_rule, check_strided
from attn_mask._core.events import timed
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.tracing import is_recording
from attn_mask._core.write import Geometry
from attn_mask._transformers import packing
from attn_mask._transformers.arguments import (
    accepts_renamed_arguments,
    ask_cache,
    is_paged,
    rows_of,
    understands_positions,
)
from attn_mask._transformers.documents import find_packed_sequence_indices, number_of_tokens
from attn_mask._transformers.mask_functions import (
    Pattern,
    and_masks,
    bidirectional_mask_function,
    bidirectional_sliding_pattern,
    blockwise_overlay,
    causal_mask_function,
    chunked_pattern,
    maybe_pad_block_sequence_ids,
    or_masks,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_pattern,
    warn_of_lost_documents,
)
from attn_mask._transformers.packing import Documents


class Interface(NamedTuple):
    """Where the create functions find the function that writes an implementation's masks."""

    mapping: Any
    registered: Any
    """The dict of its class, in which dynamo can look names up."""
    takes_positions: bool = False
    """Whether those take the positions of queries, as until 5.3, for their length and offset."""


def find_first_full_attention_index(cache: Any) -> int:
    """The first layer of the cache that is neither sliding, linear nor a dummy; 0 without any.

    Caches of releases before 5.14 have only ``is_sliding``.
    """
    sliding = getattr(cache, "is_sliding", None)
    if sliding is None:
        return 0
    none = (False,) * len(sliding)
    others = (getattr(cache, name, none) for name in ("is_linear", "is_dummy"))
    for index, layer_is in enumerate(zip(sliding, *others, strict=False)):
        if not any(layer_is):
            return index
    return 0


def _first_sliding_index(cache: Any) -> int:
    sliding = getattr(cache, "is_sliding", ())
    return sliding.index(True) if True in sliding else 0


class Call(NamedTuple):
    """What a create function is given, as those of causal layers take it."""

    config: Any
    inputs_embeds: torch.Tensor
    attention_mask: Any
    cache: Any
    position_ids: torch.Tensor | None = None
    or_mask_function: Callable[..., Any] | None = None
    and_mask_function: Callable[..., Any] | None = None
    block_sequence_ids: torch.Tensor | None = None
    layer_idx: int | None = None
    allow_skip: bool = True
    document_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    blocks_in_window: bool = False
    encoder_hidden_states: torch.Tensor | None = None


def preprocess(
    interface: Interface, call: Call, name: str = "_preprocess_mask_arguments"
) -> tuple[bool, Any, Any, Any, Any, Any, Any]:
    """What all the create functions, of which ``name`` is one, need.

    Returns (early_exit, attention_mask, packed_sequence_mask, q_length, kv_length, q_offset,
    kv_offset): with early_exit, attention_mask is the result (a 4D mask as it came, or None for an
    attention implementation that is not registered) and the rest None. Else it is boolean and
    beside the embeddings, if 2-D. packed_sequence_mask: see find_packed_sequence_indices; only
    looked for without a mask and a cache.

    Raises ValueError or TypeError for a cache that reports sizes that can't be.
    """
    embeds, attention_mask, cache = call.inputs_embeds, call.attention_mask, call.cache
    position_ids = call.position_ids
    check_no_rule(name, "attention_mask", attention_mask)
    if len(getattr(attention_mask, "shape", ())) == 4:  # a tensor, or a BlockMask
        return True, attention_mask, None, None, None, None, None
    if is_paged(cache):
        return True, None, None, None, None, None, None
    if call.config._attn_implementation not in interface.registered:
        return True, None, None, None, None, None, None
    q_length = embeds.shape[1]
    if packing.current() is None:
        is_read = attention_mask is None and cache is None
        warn_of_lost_documents(attention_mask, None if is_read else position_ids, q_length)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask.to(device=embeds.device, dtype=torch.bool)
    q_offset, kv_offset = 0, 0
    if cache is not None:
        q_offset, kv_length, kv_offset = ask_cache(
            name, cache, q_length, call.layer_idx, embeds.device
        )
    elif attention_mask is not None:
        kv_length = attention_mask.shape[-1]  # prefix tuning: longer than the queries
    else:
        other = call.encoder_hidden_states
        kv_length = embeds.shape[1] if other is None else other.shape[1]
    packed_sequence_mask = None
    if position_ids is not None and attention_mask is None and cache is None:
        if position_ids.dim() <= 2:
            position_ids = rows_of(name, position_ids, embeds.shape[0])
        packed_sequence_mask = find_packed_sequence_indices(position_ids)
        if (
            packed_sequence_mask is not None
            and not is_recording()
            and packed_sequence_mask.shape[1] < q_length
        ):
            raise ValueError(
                f"{name}: expected position_ids to be of length {q_length}, "
                f"but got {list(position_ids.shape)}"
            )
    return False, attention_mask, packed_sequence_mask, q_length, kv_length, q_offset, kv_offset


class Layers(NamedTuple):
    """A kind of layers."""

    create: str
    """What their create function is called."""
    pattern: Callable[[Any, torch.Tensor | None, Any], Pattern]
    """(config, attention_mask, where the keys end)"""
    first: Callable[[Any], int]
    """The first such layer of a cache."""
    is_causal: bool = True
    otherwise: str | None = None
    """The create function of layers that a config's ``is_causal`` of False makes of them."""


def _create_mask(layers: Layers, interface: Interface, call: Call) -> Any:
    """What the create functions share: the pattern of the layers, what is laid over it, and the
    call of the attention implementation's mask function."""
    name, cache = layers.create, call.cache
    documents = _documents(name, call)
    call = call._replace(
        position_ids=call.position_ids if documents is None else None,
        layer_idx=layers.first(cache) if call.layer_idx is None else call.layer_idx,
    )
    early_exit, attention_mask, sequences, q_length, kv_length, q_offset, kv_offset = preprocess(
        interface, call, name
    )
    implementation = call.config._attn_implementation
    if early_exit:
        if attention_mask is None and documents is not None and documents.function == "packed":
            raise ValueError(
                f"{name}: expected attention that takes a mask, to keep packed documents apart, "
                f"but got {implementation!r}"
            )
        return attention_mask
    is_flash = "flash" in implementation
    if documents is not None and is_flash:
        _check_flash(name, documents, q_length, kv_length)
    keys = call.inputs_embeds if call.encoder_hidden_states is None else call.encoder_hidden_states
    batch_size, device, kv_end = keys.shape[0], call.inputs_embeds.device, kv_length + kv_offset
    pattern = layers.pattern(call.config, attention_mask if documents is None else None, kv_end)
    ids = None
    if documents is not None:
        tokens = number_of_tokens(q_offset, q_length, kv_length, cache)
        end = None if cache is None else kv_end
        ids = documents.ids(batch_size, q_length, q_offset, tokens, end, device)
        if isinstance(q_offset, torch.Tensor) and tokens is not None:
            q_offset = tokens - q_length  # as an int it needs no tensor in the mask's program
    geometry = Geometry(batch_size, q_length, q_offset, kv_length, kv_offset)
    has_functions = call.or_mask_function is not None or call.and_mask_function is not None
    allow_skip = call.allow_skip and not (
        has_functions
        or documents is not None
        or sequences is not None
        or call.block_sequence_ids is not None
        # A compiled step of decoding must not alternate between a mask and None.
        or (layers.is_causal and getattr(cache, "is_compileable", False) and q_length == 1)
    )
    arguments: dict[str, Any] = {
        **geometry._asdict(),
        "mask_function": _rule(call, pattern, geometry, attention_mask, sequences, documents, ids),
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_skip and layers.is_causal,
        "dtype": keys.dtype,
        "config": call.config,
        "use_vmap": has_functions,
        "device": device,
    }
    if not layers.is_causal:
        arguments["allow_is_bidirectional_skip"] = allow_skip
    if pattern.local_size is not None:
        arguments["local_size"] = pattern.local_size
    if interface.takes_positions:
        length, offset = arguments.pop("q_length"), arguments.pop("q_offset")
        arguments["cache_position"] = torch.arange(length, device=device) + offset
    write = interface.mapping[implementation]
    if documents is None:
        return write(**arguments)
    with packing.without():
        mask = write(**arguments)
    if is_flash and mask is not None:
        raise ValueError(
            f"{name}: expected no padding beside documents, which flash attention can't keep apart "
            f"in a padded batch, but got attention_mask {list(mask.shape)} with padding"
        )
    return mask


def _rule(
    call: Call,
    pattern: Pattern,
    geometry: Geometry,
    attention_mask: torch.Tensor | None,
    sequences: torch.Tensor | None,
    documents: Documents | None,
    ids: torch.Tensor | None,
) -> MaskFunction:
    """The pattern, and what is laid over it: functions, blocks, and the borders of documents."""
    rule, local = pattern.rule, pattern.local
    if call.or_mask_function is not None:
        rule = or_masks(rule, call.or_mask_function)
    if call.and_mask_function is not None:
        rule = and_masks(rule, call.and_mask_function)
    if sequences is not None:
        assert call.position_ids is not None
        positions = rows_of("", call.position_ids, geometry.batch_size)  # checked before
        rule = remap_positions_for_packed_sequence(rule, positions)
        if local is not None:
            local = remap_positions_for_packed_sequence(local, positions)
    elif documents is not None and (pattern.by_position or rule is not pattern.rule):
        assert ids is not None
        rule = documents.at_positions(rule, ids, attention_mask)
        if local is not None and call.block_sequence_ids is not None:
            local = documents.at_positions(local, ids, attention_mask)
    if call.block_sequence_ids is not None:
        blocks: MaskFunction = blockwise_overlay(
            maybe_pad_block_sequence_ids(
                call.block_sequence_ids, attention_mask, geometry.kv_length, geometry.kv_offset
            )
        )
        if call.blocks_in_window and local is not None:
            blocks = and_masks(blocks, local)
        rule = or_masks(rule, blocks)
    if documents is not None:
        assert ids is not None
        return documents.within(ids, rule)
    return rule if sequences is None else and_masks(packed_sequence_mask_function(sequences), rule)


def _documents(name: str, call: Call) -> Documents | None:
    """Those that were given to the function, else those of the block around this code.

    And checks that tensors are strided ones.
    """
    for argument in _TENSORS:
        tensor = getattr(call, argument)
        if isinstance(tensor, torch.Tensor):
            check_strided(name, argument, tensor)
    documents: Documents | None
    if call.document_ids is not None and call.cu_seqlens is not None:
        raise ValueError(f"{name}: expected document_ids or cu_seqlens, but got both")
    if call.document_ids is not None:
        documents = Documents(name, "document_ids", call.document_ids)
    elif call.cu_seqlens is not None:
        documents = Documents(name, "cu_seqlens", call.cu_seqlens)
    else:
        documents = packing.current()
    if documents is not None and call.encoder_hidden_states is not None:
        is_packed = documents.function == "packed"
        what = "packed documents" if is_packed else "document_ids or cu_seqlens"
        raise ValueError(
            f"{name}: expected no {what} beside encoder_hidden_states, whose documents are others"
        )
    return documents


_TENSORS = (
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "block_sequence_ids",
    "document_ids",
    "cu_seqlens",
)


def _check_flash(name: str, documents: Documents, q_length: Any, kv_length: Any) -> None:
    """That flash attention, which takes no mask, keeps documents apart in another way."""
    if documents.function != "packed":
        if documents.kind == "document_ids":
            raise ValueError(
                f"{name}: expected no document_ids, since flash attention takes no mask that keeps "
                "documents apart: give the model its cu_seqlens, and this function cu_seqlens as "
                "well"
            )
    elif documents.kind != "cu_seqlens":
        raise ValueError(
            "packed: expected cu_seqlens for flash attention, which takes no mask that keeps "
            f"documents apart, but got {documents.kind}"
        )
    elif not documents.is_passed_on:
        raise ValueError(
            f"{name}: expected a model that takes cu_seq_lens_q, by which flash attention keeps "
            "packed documents apart, but it was not passed on to one: its forward takes none, or "
            "was called directly"
        )
    elif kv_length != q_length:
        raise ValueError(
            f"{name}: expected as many keys as queries, since flash attention takes one cu_seqlens "
            f"for both, but got {q_length} queries and {kv_length} keys"
        )


def creates(
    name: str, interface: Callable[[], Interface], doc: str | None = None
) -> Callable[..., Any]:
    """A create function, which finds an implementation's mask function in the interface."""
    layers = LAYERS[name]
    create: Any = (_creates_causal if layers.is_causal else _creates_bidirectional)(
        layers, interface
    )
    create.__name__ = create.__qualname__ = name
    create.__doc__ = doc
    understands = understands_positions if layers.is_causal else accepts_renamed_arguments
    return understands(timed(create))


def _creates_causal(layers: Layers, interface: Callable[[], Interface]) -> Callable[..., Any]:
    def create(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Any,
        position_ids: torch.Tensor | None = None,
        or_mask_function: Callable[..., Any] | None = None,
        and_mask_function: Callable[..., Any] | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        layer_idx: int | None = None,
        allow_is_causal_skip: bool = True,
        *,
        document_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        blocks_in_window: bool = False,
    ) -> Any:
        call = Call(
            config,
            inputs_embeds,
            attention_mask,
            cache,
            position_ids,
            or_mask_function,
            and_mask_function,
            block_sequence_ids,
            layer_idx,
            allow_is_causal_skip,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            blocks_in_window=blocks_in_window,
        )
        if layers.otherwise is None or getattr(config, "is_causal", True):
            return _create_mask(layers, interface(), call)
        nothing: dict[str, Any] = {"position_ids": None, "block_sequence_ids": None}
        call = call._replace(**nothing, layer_idx=None, blocks_in_window=False)
        return _create_mask(LAYERS[layers.otherwise], interface(), call)

    return create


def _creates_bidirectional(
    layers: Layers, interface: Callable[[], Interface]
) -> Callable[..., Any]:
    def create(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None = None,
        cache: Any = None,
        or_mask_function: Callable[..., Any] | None = None,
        and_mask_function: Callable[..., Any] | None = None,
        allow_is_bidirectional_skip: bool = True,
        *,
        document_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        call = Call(
            config,
            inputs_embeds,
            attention_mask,
            cache,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
            allow_skip=allow_is_bidirectional_skip,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            encoder_hidden_states=encoder_hidden_states,
        )
        return _create_mask(layers, interface(), call)

    return create


LAYERS = {
    layers.create: layers
    for layers in (
        Layers(
            "create_bidirectional_mask",
            lambda *_: Pattern(bidirectional_mask_function),
            find_first_full_attention_index,
            is_causal=False,
        ),
        Layers(
            "create_bidirectional_sliding_window_mask",
            bidirectional_sliding_pattern,
            _first_sliding_index,
            is_causal=False,
        ),
        Layers(
            "create_causal_mask",
            lambda *_: Pattern(causal_mask_function),
            find_first_full_attention_index,
            otherwise="create_bidirectional_mask",
        ),
        Layers(
            "create_sliding_window_causal_mask",
            sliding_pattern,
            _first_sliding_index,
            otherwise="create_bidirectional_sliding_window_mask",
        ),
        Layers("create_chunked_causal_mask", chunked_pattern, _first_sliding_index),
    )
}
"""The kinds of layers, by the names of their create functions."""
