"""Drop-in for ``transformers.masking_utils``, on native rules.

Names, signatures, defaults, results and errors are those of the release of transformers that
``attn_mask._upstream.UPSTREAM`` names; transformers itself is not needed: configs and caches need
the attributes that upstream's have. Mask functions are objects that carry their rule
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

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, ParamSpec

import torch

from attn_mask import rules
from attn_mask._checks import check_flag, check_strided, checked_masked_value
from attn_mask._engine import BOOLEAN, Spelling, check_padding, write_mask
from attn_mask._timing import timed
from attn_mask._tracing import is_opaque, is_recording
from attn_mask._upstream.arguments import (
    ask_cache,
    is_paged,
    rows_of,
    understands_cache_position,
    understands_names,
    understands_positions,
)
from attn_mask._upstream.documents import (
    find_packed_sequence_indices,
    ids_of_documents,
    name_numbers,
    number_of_tokens,
    positions_in_runs,
)
from attn_mask._upstream.mask_functions import (
    Pattern,
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    bidirectional_sliding_pattern,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    chunked_pattern,
    maybe_pad_block_sequence_ids,
    or_masks,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    remap_positions_for_packed_sequence,
    sliding_pattern,
    sliding_window_bidirectional_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from attn_mask._upstream.overloads import as_eager_mask, as_sdpa_mask
from attn_mask._upstream.skip_rules import OWN_DECISIONS, fast_all, is_skipped
from attn_mask._upstream.visual import AttentionMask, tensor_to_mask_visual
from attn_mask.block_mask import create_block_mask
from attn_mask.rules import MaskFunction

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

_P = ParamSpec("_P")


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


# Masks of each attention implementation


@as_sdpa_mask
@understands_cache_position
@timed
def sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    *,
    unmask_unattended: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The boolean mask [b, 1, q, kv] for scaled_dot_product_attention.

    Args:
        mask_function: which keys a query attends to. The result of a callable of the user's must
            not depend on other elements: large masks are evaluated some rows at a time.
        attention_mask: which keys are not padding, bool [b, n]; those after its end are.
        local_size: the window or chunk of the mask function, if any; matters to skipping.
        allow_is_causal_skip: whether to return None where ``is_causal`` means the same.
        allow_is_bidirectional_skip: whether to return None where nothing is masked.
        use_vmap: whether callables of the user's are evaluated one element at a time, under
            torch.vmap, rather than with index tensors that broadcast.
        unmask_unattended: whether rows in which no key is visible are True throughout; beyond
            upstream.

    Raises ValueError for tensors that are too short or of a wrong rank, and for a callable that
    returns a wrong shape; TypeError for one that does not return booleans.

    Mirrors ``transformers.masking_utils.sdpa_mask``.
    """
    check_flag("sdpa_mask", "unmask_unattended", unmask_unattended)
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        check_padding("sdpa_mask", attention_mask)
        if is_skipped(
            OWN_DECISIONS,
            allow_is_causal_skip,
            allow_is_bidirectional_skip,
            attention_mask,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            local_size,
        ):
            return None
    return write_mask(
        "sdpa_mask",
        mask_function,
        (batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        Spelling(unmask_unattended=unmask_unattended) if unmask_unattended else BOOLEAN,
        use_vmap,
    )


@as_eager_mask
@understands_cache_position
@timed
def eager_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    *,
    unmask_unattended: bool = False,
    masked_value: float | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The additive mask [b, 1, q, kv] for attention that is written out.

    Arguments and errors as for sdpa_mask (rows that are unmasked are 0); TypeError for a dtype
    without additive masks. ``masked_value``, beyond upstream: see ``attn_mask.additive``.

    Mirrors ``transformers.masking_utils.eager_mask``.
    """
    check_flag("eager_mask", "unmask_unattended", unmask_unattended)
    masked_value = checked_masked_value("eager_mask", masked_value)
    if allow_is_bidirectional_skip:
        check_padding("eager_mask", attention_mask)
        if is_skipped(
            OWN_DECISIONS,
            False,
            True,
            attention_mask,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            kwargs.get("local_size"),
        ):
            return None
    return write_mask(
        "eager_mask",
        mask_function,
        (batch_size, q_length, kv_length),
        q_offset,
        kv_offset,
        attention_mask,
        device,
        Spelling(dtype, None, unmask_unattended, masked_value),
        use_vmap,
    )


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


class _GeneralInterface(MutableMapping[str, Callable[..., Any]]):
    """A mapping of a class (``register``) under one of an instance (item assignment).

    Mirrors ``transformers.utils.generic.GeneralInterface``.
    """

    _global_mapping: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init__(self) -> None:
        self._local_mapping: dict[str, Callable[..., Any]] = {}

    def __getitem__(self, key: str) -> Callable[..., Any]:
        if key in self._local_mapping:
            return self._local_mapping[key]
        return self._global_mapping[key]

    def __setitem__(self, key: str, value: Callable[..., Any]) -> None:
        self._local_mapping[key] = value

    def __delitem__(self, key: str) -> None:
        del self._local_mapping[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._global_mapping, **self._local_mapping})

    def __len__(self) -> int:
        return len(self._global_mapping.keys() | self._local_mapping.keys())

    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None:
        cls._global_mapping[key] = value

    def valid_keys(self) -> list[str]:
        return list(self.keys())


class AttentionMaskInterface(_GeneralInterface):
    """The function that makes the mask of each attention implementation."""

    _global_mapping: ClassVar[dict[str, Callable[..., Any]]] = {
        "sdpa": sdpa_mask,
        "eager": eager_mask,
        "flash_attention_2": flash_attention_mask,
        "flash_attention_3": flash_attention_mask,
        "flash_attention_4": flash_attention_mask,
        "flex_attention": flex_attention_mask,
    }


ALL_MASK_ATTENTION_FUNCTIONS: AttentionMaskInterface = AttentionMaskInterface()


# Masks of a model's layers


def _preprocess(
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
    if len(getattr(attention_mask, "shape", ())) == 4:  # a tensor, or a BlockMask
        return True, attention_mask, None, None, None, None, None
    if is_paged(cache):
        return True, None, None, None, None, None, None
    # The global mapping, as dynamo can look it up.
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        return True, None, None, None, None, None, None
    q_length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
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
    if position_ids is not None and attention_mask is None and cache is None:
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


_preprocess_mask_arguments = understands_positions(_preprocess)


class _Layers(NamedTuple):
    """A kind of layers."""

    create: str
    """What their create function is called."""
    pattern: Callable[[Any, torch.Tensor | None, Any], Pattern]
    """(config, attention_mask, where the keys end)"""
    first: Callable[[Any], int]
    """The first such layer of a cache."""
    is_causal: bool = True


def _create_mask(
    layers: _Layers,
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
    has_documents = document_ids is not None or cu_seqlens is not None
    if has_documents and encoder_hidden_states is not None:
        raise ValueError(
            f"{name}: expected no document_ids or cu_seqlens beside encoder_hidden_states, whose "
            "documents are others"
        )
    embeds = inputs_embeds if encoder_hidden_states is None else encoder_hidden_states
    early_exit, attention_mask, sequences, q_length, kv_length, q_offset, kv_offset = _preprocess(
        config,
        inputs_embeds,
        attention_mask,
        cache,
        None if has_documents else position_ids,
        layers.first(cache) if layer_idx is None else layer_idx,
        encoder_hidden_states,
        name=name,
    )
    if early_exit:
        return attention_mask
    batch_size, device = embeds.shape[0], inputs_embeds.device
    is_flash = "flash" in config._attn_implementation
    if document_ids is not None and is_flash:
        raise ValueError(
            f"{name}: expected no document_ids, since flash attention takes no mask that keeps "
            "documents apart: give the model its cu_seqlens, and this function cu_seqlens as well"
        )
    kv_end = kv_length + kv_offset
    pattern = layers.pattern(config, None if has_documents else attention_mask, kv_end)
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
    if has_documents:
        ids = ids_of_documents(
            name,
            document_ids,
            cu_seqlens,
            batch_size,
            number_of_tokens(q_offset, q_length, kv_length, cache),
            None if cache is None else kv_end,
            device,
        )
        if pattern.by_position or has_functions:
            positions = positions_in_runs(ids, attention_mask)
            rule = remap_positions_for_packed_sequence(rule, positions)
            local = None if local is None else remap_positions_for_packed_sequence(local, positions)
    if block_sequence_ids is not None:
        blocks: MaskFunction = blockwise_overlay(
            maybe_pad_block_sequence_ids(block_sequence_ids, attention_mask, kv_length, kv_offset)
        )
        if blocks_in_window and local is not None:
            blocks = and_masks(blocks, local)
        rule = or_masks(rule, blocks)
    if ids is None:
        ids = sequences
    if ids is not None:
        rule = and_masks(packed_sequence_mask_function(ids), rule)
    if has_functions or sequences is not None or has_documents or block_sequence_ids is not None:
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
    mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](**arguments)
    if has_documents and is_flash and mask is not None:
        raise ValueError(
            f"{name}: expected no padding beside documents, which flash attention can't keep apart "
            f"in a padded batch, but got attention_mask {list(mask.shape)} with padding"
        )
    return mask


def _creates_causal(
    layers: _Layers, bidirectional: Callable[..., Any] | None, doc: str
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


def _creates_bidirectional(layers: _Layers, doc: str) -> Callable[..., Any]:
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

    return understands_names(timed(_named(create, layers.create, doc)))


def _named(create: Callable[_P, Any], name: str, doc: str) -> Callable[_P, Any]:
    create.__name__ = create.__qualname__ = name
    create.__doc__ = doc
    return create


create_bidirectional_mask = _creates_bidirectional(
    _Layers(
        "create_bidirectional_mask",
        lambda *_: Pattern(bidirectional_mask_function),
        find_first_full_attention_index,
        is_causal=False,
    ),
    """The mask of full attention in both directions, as the attention implementation takes it.

    Args as for create_causal_mask, and:
        encoder_hidden_states: [b, kv, hidden]: the keys, where they are not the queries'; gives
            the number of keys, the batch size and the dtype.
        allow_is_bidirectional_skip: whether None may stand for a mask that masks nothing.

    Mirrors ``transformers.masking_utils.create_bidirectional_mask``.
    """,
)

create_bidirectional_sliding_window_mask = _creates_bidirectional(
    _Layers(
        "create_bidirectional_sliding_window_mask",
        bidirectional_sliding_pattern,
        _first_sliding_index,
        is_causal=False,
    ),
    """As create_bidirectional_mask, up to the config's ``sliding_window`` to either side.

    Raises ValueError for a config without the window.

    Mirrors ``transformers.masking_utils.create_bidirectional_sliding_window_mask``.
    """,
)

create_causal_mask = _creates_causal(
    _Layers(
        "create_causal_mask",
        lambda *_: Pattern(causal_mask_function),
        find_first_full_attention_index,
    ),
    create_bidirectional_mask,
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
        or_mask_function, and_mask_function: what else, or only, is attended to.
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

create_sliding_window_causal_mask = _creates_causal(
    _Layers("create_sliding_window_causal_mask", sliding_pattern, _first_sliding_index),
    create_bidirectional_sliding_window_mask,
    """As create_causal_mask, within the config's ``sliding_window``.

    ``layer_idx`` is by default the cache's first sliding layer. Raises ValueError for a config
    without the window.

    Mirrors ``transformers.masking_utils.create_sliding_window_causal_mask``.
    """,
)

create_chunked_causal_mask = _creates_causal(
    _Layers("create_chunked_causal_mask", chunked_pattern, _first_sliding_index),
    None,
    """As create_causal_mask, within chunks of the config's ``attention_chunk_size``.

    Chunks start after each row's left padding. ``layer_idx`` is by default the cache's first
    sliding layer. Raises ValueError for a config without the size, and for flash attention over
    more keys than a chunk holds.

    Mirrors ``transformers.masking_utils.create_chunked_causal_mask``.
    """,
)


@understands_names
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
        masks: dict[str, Any] = {}
        for layer_type in layer_types:
            create = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_type]
            if isinstance(create, dict):
                for part, create_part in create.items():
                    if part not in masks:
                        masks[part] = create_part(**arguments)
            else:
                masks[layer_type] = create(**arguments)
        return masks
    if getattr(config, "sliding_window", None) is not None:
        return create_sliding_window_causal_mask(**arguments)
    if getattr(config, "attention_chunk_size", None) is not None:
        return create_chunked_causal_mask(**arguments)
    return create_causal_mask(**arguments)
