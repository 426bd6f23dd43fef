"""The create functions of ``transformers.masking_utils``: the mask of a kind of a model's layers.

They are made twice: for ``attn_mask.masking_utils``, and for what install() puts into the place of
transformers' own where documents are packed. Each has its mapping of mask functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch

from attn_mask._core.arguments import check_no_rule, check_strided
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.timing import timed
from attn_mask._core.tracing import is_recording
from attn_mask._transformers import packing
from attn_mask._transformers.arguments import (
    accepts_renamed_arguments,
    ask_cache,
    is_paged,
    rows_of,
    understands_positions,
)
from attn_mask._transformers.documents import (
    find_packed_sequence_indices,
    name_numbers,
    name_restarts,
    number_of_tokens,
)
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
)
from attn_mask._transformers.packing import Documents

_P = ParamSpec("_P")


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


def preprocess(
    interface: Interface,
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Any,
    position_ids: torch.Tensor | None,
    layer_idx: int | None,
    encoder_hidden_states: torch.Tensor | None = None,
    *,
    name: str = "_preprocess_mask_arguments",
) -> tuple[bool, Any, Any, Any, Any, Any, Any]:
    """What all the create functions, of which ``name`` is one, need.

    Returns (early_exit, attention_mask, packed_sequence_mask, q_length, kv_length, q_offset,
    kv_offset): with early_exit, attention_mask is the result (a 4D mask as it came, or None for an
    attention implementation that is not registered) and the rest None. Else it is boolean and
    beside the embeddings, if 2-D. packed_sequence_mask: see find_packed_sequence_indices; only
    looked for without a mask and a cache.

    Raises ValueError or TypeError for a cache that reports sizes that can't be.
    """
    check_no_rule(name, "attention_mask", attention_mask)
    if len(getattr(attention_mask, "shape", ())) == 4:  # a tensor, or a BlockMask
        return True, attention_mask, None, None, None, None, None
    if is_paged(cache):
        return True, None, None, None, None, None, None
    if config._attn_implementation not in interface.registered:
        return True, None, None, None, None, None, None
    q_length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        if packing.current() is None:
            name_numbers(attention_mask, q_length)
        attention_mask = attention_mask.to(device=inputs_embeds.device, dtype=torch.bool)
    q_offset, kv_offset = 0, 0
    if cache is not None:
        q_offset, kv_length, kv_offset = ask_cache(
            name, cache, q_length, layer_idx, inputs_embeds.device
        )
    elif attention_mask is not None:
        kv_length = attention_mask.shape[-1]  # prefix tuning: longer than the queries
    else:
        keys = inputs_embeds if encoder_hidden_states is None else encoder_hidden_states
        kv_length = keys.shape[1]
    packed_sequence_mask = None
    if position_ids is not None and (attention_mask is not None or cache is not None):
        name_restarts(position_ids, attention_mask)
    elif position_ids is not None:
        if position_ids.dim() <= 2:
            position_ids = rows_of(name, position_ids, inputs_embeds.shape[0])
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


def _create_mask(
    layers: Layers,
    interface: Interface,
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Any,
    *,
    layer_idx: int | None = None,
    allow_skip: bool,
    or_mask_function: Callable[..., Any] | None,
    and_mask_function: Callable[..., Any] | None,
    encoder_hidden_states: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    blocks_in_window: bool = False,
) -> Any:
    """What the create functions share: the pattern of the layers, what is laid over it, and the
    call of the attention implementation's mask function."""
    name = layers.create
    for argument, tensor in (
        ("inputs_embeds", inputs_embeds),
        ("attention_mask", attention_mask),
        ("position_ids", position_ids),
        ("block_sequence_ids", block_sequence_ids),
        ("document_ids", document_ids),
        ("cu_seqlens", cu_seqlens),
    ):
        if isinstance(tensor, torch.Tensor):
            check_strided(name, argument, tensor)
    documents = _documents(name, document_ids, cu_seqlens)
    if documents is not None and encoder_hidden_states is not None:
        is_packed = documents.function == "packed"
        what = "packed documents" if is_packed else "document_ids or cu_seqlens"
        raise ValueError(
            f"{name}: expected no {what} beside encoder_hidden_states, whose documents are others"
        )
    embeds = inputs_embeds if encoder_hidden_states is None else encoder_hidden_states
    early_exit, attention_mask, sequences, q_length, kv_length, q_offset, kv_offset = preprocess(
        interface,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        None if documents is not None else position_ids,
        layers.first(cache) if layer_idx is None else layer_idx,
        encoder_hidden_states,
        name=name,
    )
    if early_exit:
        if attention_mask is None and documents is not None and documents.function == "packed":
            raise ValueError(
                f"{name}: expected attention that takes a mask, to keep packed documents apart, "
                f"but got {config._attn_implementation!r}"
            )
        return attention_mask
    batch_size, device = embeds.shape[0], inputs_embeds.device
    implementation = config._attn_implementation
    is_flash = "flash" in implementation
    if documents is not None and is_flash:
        _check_flash(name, documents, q_length, kv_length)
    kv_end = kv_length + kv_offset
    pattern = layers.pattern(config, attention_mask if documents is None else None, kv_end)
    rule, local = pattern.rule, pattern.local
    has_functions = or_mask_function is not None or and_mask_function is not None
    # A compiled step of decoding must not alternate between a mask and None.
    if layers.is_causal and getattr(cache, "is_compileable", False) and q_length == 1:
        allow_skip = False
    if or_mask_function is not None:
        rule = or_masks(rule, or_mask_function)
    if and_mask_function is not None:
        rule = and_masks(rule, and_mask_function)
    if sequences is not None:
        assert position_ids is not None
        positions = rows_of(name, position_ids, batch_size)
        rule = remap_positions_for_packed_sequence(rule, positions)
        if local is not None:
            local = remap_positions_for_packed_sequence(local, positions)
    ids = None
    if documents is not None:
        tokens = number_of_tokens(q_offset, q_length, kv_length, cache)
        end = None if cache is None else kv_end
        ids = documents.ids(batch_size, q_length, q_offset, tokens, end, device)
        if isinstance(q_offset, torch.Tensor) and tokens is not None:
            q_offset = tokens - q_length  # as an int it needs no tensor in the mask's program
        if pattern.by_position or has_functions:
            rule = documents.at_positions(rule, ids, attention_mask)
            if local is not None and block_sequence_ids is not None:
                local = documents.at_positions(local, ids, attention_mask)
    if block_sequence_ids is not None:
        blocks: MaskFunction = blockwise_overlay(
            maybe_pad_block_sequence_ids(block_sequence_ids, attention_mask, kv_length, kv_offset)
        )
        if blocks_in_window and local is not None:
            blocks = and_masks(blocks, local)
        rule = or_masks(rule, blocks)
    if documents is not None:
        assert ids is not None
        rule = documents.within(ids, rule)
    elif sequences is not None:
        rule = and_masks(packed_sequence_mask_function(sequences), rule)
    has_documents = documents is not None or sequences is not None
    if has_functions or has_documents or block_sequence_ids is not None:
        allow_skip = False
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": rule,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_skip and layers.is_causal,
        "dtype": embeds.dtype,
        "config": config,
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
        mask = write(**arguments)
    else:
        with packing.without():
            mask = write(**arguments)
    if documents is not None and is_flash and mask is not None:
        raise ValueError(
            f"{name}: expected no padding beside documents, which flash attention can't keep apart "
            f"in a padded batch, but got attention_mask {list(mask.shape)} with padding"
        )
    return mask


def _documents(name: str, document_ids: Any, cu_seqlens: Any) -> Documents | None:
    """Those that were given to the function, else those of the block around this code."""
    if document_ids is None and cu_seqlens is None:
        return packing.current()
    if document_ids is None:
        return Documents(name, "cu_seqlens", cu_seqlens)
    if cu_seqlens is None:
        return Documents(name, "document_ids", document_ids)
    raise ValueError(f"{name}: expected document_ids or cu_seqlens, but got both")


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


def creates_causal(
    layers: Layers,
    interface: Callable[[], Interface],
    bidirectional: Callable[..., Any] | None,
    doc: str | None = None,
) -> Callable[..., Any]:
    """The create function of causal layers; ``bidirectional``: that of a config which is not."""

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
        if bidirectional is not None and not getattr(config, "is_causal", True):
            return bidirectional(
                config,
                inputs_embeds,
                attention_mask,
                cache=cache,
                or_mask_function=or_mask_function,
                and_mask_function=and_mask_function,
                allow_is_bidirectional_skip=allow_is_causal_skip,
                document_ids=document_ids,
                cu_seqlens=cu_seqlens,
            )
        return _create_mask(
            layers,
            interface(),
            config,
            inputs_embeds,
            attention_mask,
            cache,
            layer_idx=layer_idx,
            allow_skip=allow_is_causal_skip,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
            position_ids=position_ids,
            block_sequence_ids=block_sequence_ids,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            blocks_in_window=blocks_in_window,
        )

    return understands_positions(timed(_named(create, layers.create, doc)))


def creates_bidirectional(
    layers: Layers, interface: Callable[[], Interface], doc: str | None = None
) -> Callable[..., Any]:
    """The create function of layers that attend in both directions."""

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
        return _create_mask(
            layers,
            interface(),
            config,
            inputs_embeds,
            attention_mask,
            cache,
            allow_skip=allow_is_bidirectional_skip,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
            encoder_hidden_states=encoder_hidden_states,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
        )

    return accepts_renamed_arguments(timed(_named(create, layers.create, doc)))


def _named(create: Callable[_P, Any], name: str, doc: str | None) -> Callable[_P, Any]:
    create.__name__ = create.__qualname__ = name
    create.__doc__ = doc
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
        ),
        Layers("create_sliding_window_causal_mask", sliding_pattern, _first_sliding_index),
        Layers("create_chunked_causal_mask", chunked_pattern, _first_sliding_index),
    )
}
"""The kinds of layers, by the names of their create functions."""
