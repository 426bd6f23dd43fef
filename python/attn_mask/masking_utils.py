"""Drop-in for ``transformers.masking_utils``, on native rules.

Names, signatures, defaults, results and errors are those of transformers 5.24; transformers itself
is not needed: configs and caches are asked for the attributes that upstream's have. Mask functions
are objects that carry their rule (``attn_mask.rules``), so that a mask is written at once by
``torch.ops.attn_mask.boolean`` or ``.additive``. Only what a callable of the user's says is asked
of it, over a few rows at a time.

Argument names of all releases since 4.53 are understood: ``input_embeds`` is ``inputs_embeds``,
``past_key_values`` is ``cache``, and ``cache_position`` is taken where it was taken once. Beyond
upstream, the create functions take ``document_ids`` or ``cu_seqlens``, and ``blocks_in_window``;
see create_causal_mask.

Throughout: b batch_size, q q_length, kv kv_length. Query row i stands at position q_offset + i, key
column j at kv_offset + j; an offset is an int or a tensor (0-d, or [b, 1] for one per batch row),
whose value is not read to write a mask. In a boolean mask True attends; an additive one holds 0
there, and ``torch.finfo(dtype).min`` elsewhere.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F

from attn_mask import _skipping, rules
from attn_mask._aten_only import operators
from attn_mask._checks import check_flag, check_strided, checked_masked_value
from attn_mask._library import _C
from attn_mask._named_once import is_named, name_once
from attn_mask._tracing import default_device, is_jit_tracing, is_opaque, is_recording, is_tracing
from attn_mask.rules import MaskFunction, Program

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
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
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Offset = int | torch.Tensor

_ops = torch.ops.attn_mask

_CPU = torch.device("cpu")

# How much of a mask a function of the user's is asked about at once. A function that calculates
# with positions holds a few int64 for each element: some ten MB.
_TILE = 2**20


# Mask functions


# Tables as upstream's closures take them.
_CHUNKS = rules.Source("chunked_overlay", "left_padding", is_upstream=True)
_BLOCKS = rules.Source("blockwise_overlay", "block_sequence_ids", is_upstream=True)
_PADDING = rules.Source("padding_mask_function", "padding_mask", is_upstream=True)
_PACKED = rules.Source("packed_sequence_mask_function", "packed_sequence_mask", is_upstream=True)
_REMAPPED = rules.Source("remap_positions_for_packed_sequence", "position_ids", is_upstream=True)

causal_mask_function = rules.causal()
bidirectional_mask_function = rules.bidirectional()


def and_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where all the mask functions do. Raises RuntimeError for what can't be called."""
    _check_callable(mask_functions)
    return rules.intersection(*mask_functions)


def or_masks(*mask_functions: Callable[..., Any]) -> MaskFunction:
    """Attends where any of the mask functions does. Raises as and_masks does."""
    _check_callable(mask_functions)
    return rules.union(*mask_functions)


def _check_callable(mask_functions: tuple[Any, ...]) -> None:
    if not all(callable(mask_function) for mask_function in mask_functions):
        raise RuntimeError(f"All inputs should be callable mask_functions: {mask_functions}")


def sliding_window_overlay(sliding_window: int) -> MaskFunction:
    """Attends to no key ``sliding_window`` or more before the query."""
    return rules.sized_window("sliding_window_overlay", "sliding_window", sliding_window)


def sliding_window_causal_mask_function(sliding_window: int) -> MaskFunction:
    """Attends to the query's own position and the ``sliding_window - 1`` before it."""
    # Asked first: a graph would come to depend on what is known.
    is_kept = not is_recording() and type(sliding_window) is int
    if is_kept and sliding_window in _sliding_windows:
        return _sliding_windows[sliding_window]
    rule = and_masks(sliding_window_overlay(sliding_window), causal_mask_function)
    if is_kept and len(_sliding_windows) < 64:
        _sliding_windows[sliding_window] = rule
    return rule


# A model asks for the same few in every step; each keeps its program.
_sliding_windows: dict[int, MaskFunction] = {}


def sliding_window_bidirectional_overlay(sliding_window: int) -> MaskFunction:
    """Attends to keys at most ``sliding_window`` before or behind the query."""
    return rules.any_window("sliding_window_bidirectional_overlay", sliding_window, sliding_window)


def sliding_window_bidirectional_mask_function(sliding_window: int) -> MaskFunction:
    """As sliding_window_bidirectional_overlay, by itself."""
    return and_masks(
        sliding_window_bidirectional_overlay(sliding_window), bidirectional_mask_function
    )


def chunked_overlay(chunk_size: int, left_padding: torch.Tensor) -> MaskFunction:
    """Attends to keys in the query's chunk; chunks start after ``left_padding``, ints [b]."""
    size = rules.whole("chunked_overlay", "chunk_size", chunk_size)
    if size == 0:
        raise ValueError("chunked_overlay: expected chunk_size not to be 0")
    check_strided("chunked_overlay", "left_padding", left_padding)
    return rules.Chunked(size, left_padding, _CHUNKS)


def chunked_causal_mask_function(chunk_size: int, left_padding: torch.Tensor) -> MaskFunction:
    """As chunked_overlay, and to no key behind the query."""
    return and_masks(chunked_overlay(chunk_size, left_padding), causal_mask_function)


def blockwise_overlay(block_sequence_ids: torch.Tensor) -> MaskFunction:
    """Attends to keys with the query's id (ints [b, n]), unless that is negative."""
    check_strided(_BLOCKS.function, _BLOCKS.argument, block_sequence_ids)
    return rules.Blockwise(block_sequence_ids, _BLOCKS)


def padding_mask_function(padding_mask: torch.Tensor) -> MaskFunction:
    """Attends to the keys that the mask [b, n] shows."""
    check_strided(_PADDING.function, _PADDING.argument, padding_mask)
    return rules.Padding(padding_mask, _PADDING)


def packed_sequence_mask_function(packed_sequence_mask: torch.Tensor) -> MaskFunction:
    """Attends to keys of the query's own sequence; ids [b, n]."""
    check_strided(_PACKED.function, _PACKED.argument, packed_sequence_mask)
    return rules.Documents(packed_sequence_mask, _PACKED)


def remap_positions_for_packed_sequence(
    mask_function: Callable[..., Any], position_ids: torch.Tensor
) -> MaskFunction:
    """The mask function, asked about the positions that position_ids [b, n] give."""
    check_strided(_REMAPPED.function, _REMAPPED.argument, position_ids)
    return rules.reindexed(_REMAPPED.function, mask_function, position_ids, _REMAPPED)


def packed_sequence_compatibility_function(
    mask_function: Callable[..., Any],
    position_ids: torch.Tensor,
    packed_sequence_mask: torch.Tensor,
) -> MaskFunction:
    """The mask function within each packed sequence, asked about positions in it."""
    return and_masks(
        packed_sequence_mask_function(packed_sequence_mask),
        remap_positions_for_packed_sequence(mask_function, position_ids),
    )


def add_offsets_to_mask_function(
    mask_function: Callable[..., Any], q_offset: _Offset, kv_offset: _Offset
) -> MaskFunction:
    """The mask function, asked about positions from ``q_offset`` and ``kv_offset`` on."""
    return rules.shift(mask_function, q_offset, kv_offset)


# Operands


def prepare_padding_mask(
    attention_mask: torch.Tensor | None,
    kv_length: int,
    kv_offset: int,
    *,
    _slice: bool | None = None,
) -> Any:
    """The padding mask [b, n], with zeros behind it up to key kv_offset + kv_length.

    ``_slice`` of releases before 5.0 is accepted, and has no effect.
    """
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    return F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask


def maybe_pad_block_sequence_ids(
    block_sequence_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kv_length: int,
    kv_offset: int,
) -> torch.Tensor:
    """The ids [b, n], with -1 behind them up to key kv_offset + kv_length.

    ``attention_mask`` is not looked at; upstream's signature has it.
    """
    missing = kv_length + kv_offset - block_sequence_ids.shape[-1]
    if not missing > 0:
        return block_sequence_ids
    if block_sequence_ids.dtype == torch.uint8:
        raise TypeError(
            "maybe_pad_block_sequence_ids: expected block_sequence_ids to be of a signed dtype, "
            f"since -1 stands behind them, but got {block_sequence_ids.dtype}"
        )
    return F.pad(block_sequence_ids, (0, missing), value=-1)


def fast_all(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all of a boolean tensor is True, as a 0-d boolean tensor."""
    return tensor.sum() == tensor.numel()


def _shows_all(mask: torch.Tensor) -> bool:
    """The truth of fast_all."""
    return _is_all_visible(mask) if mask.dtype == torch.bool else bool(fast_all(mask))


def _is_all_visible(mask: torch.Tensor) -> bool:
    ops = operators()
    return _C._is_all_visible(mask) if ops is None else bool(ops._is_all_visible(mask))


def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Which of several packed sequences each query belongs to.

    A sequence ends where the next position is not one higher. Returns ints [b, q] that count
    sequences, or None when each row holds a single one (while tracing, that is not looked at), and
    for position_ids that are not 2-D [b, q]: multimodal rotary positions have three dimensions, and
    their jumps are no borders.
    """
    if position_ids.dim() != 2:
        return None
    policy = _skipping.current()
    if policy.packing == "none":
        return None
    sequences = _count_sequences(position_ids)
    if policy.name != "shapes" and not is_opaque(sequences) and bool((sequences[:, -1] == 0).all()):
        return None
    return sequences


def _count_sequences(position_ids: torch.Tensor) -> torch.Tensor:
    """[b, q]: how many sequences began before each query's in its row."""
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return starts.cumsum(-1)


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


# Names and orders of arguments that releases since 4.53 had


def _understands_names(create: Callable[_P, _R]) -> Callable[_P, _R]:
    """``input_embeds`` was a name until 5.2, ``past_key_values`` that of the cache until 5.23."""

    @functools.wraps(create)
    def understanding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "input_embeds" in kwargs:
            if "inputs_embeds" in kwargs:
                raise TypeError(f"{create.__name__}: expected inputs_embeds once, but got it twice")
            kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            kwargs.setdefault("cache", cache)  # as upstream, where both are given
        return create(*args, **kwargs)

    return understanding


def _understands_positions(create: Callable[_P, _R]) -> Callable[_P, _R]:
    """``cache_position`` stood in the fourth place until 5.8, from 5.4 on without an effect."""

    @functools.wraps(create)
    def understanding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        kwargs.pop("cache_position", None)
        # A tensor can't be the cache, nor can a cache or positions stand where they would then.
        if len(args) > 3 and (
            isinstance(args[3], torch.Tensor)
            or (args[3] is None and len(args) > 4 and hasattr(args[4], "get_mask_sizes"))
            or (args[3] is None and len(args) > 5 and isinstance(args[5], torch.Tensor))
        ):
            args = args[:3] + args[4:]  # type: ignore[assignment]
        return create(*args, **kwargs)

    return _understands_names(understanding)


_ORDER_WITH_POSITIONS = (
    "batch_size",
    "q_length",
    "kv_length",
    "kv_offset",
    "mask_function",
    "attention_mask",
)


def _understands_cache_position(mask: Callable[_P, _R]) -> Callable[_P, _R]:
    """``cache_position`` [q] gave length and offset until 5.3; in q_length's place until 5.8."""

    @functools.wraps(mask)
    def understanding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "cache_position" in kwargs:
            kwargs["q_length"] = kwargs.pop("cache_position")
        positions = args[1] if len(args) > 1 else kwargs.get("q_length")
        if type(positions) is int:
            return mask(*args, **kwargs)
        # While jit is tracing, a length is a tensor as well, but 0-d.
        if isinstance(positions, torch.Tensor) and positions.dim() > 0:
            if positions.dim() != 1 or positions.shape[0] == 0:
                raise ValueError(
                    f"{mask.__name__}: expected cache_position to be 1-D [q_length], not empty, "
                    f"but got {list(positions.shape)}"
                )
            if len(args) > len(_ORDER_WITH_POSITIONS):
                raise TypeError(
                    f"{mask.__name__}: expected arguments behind attention_mask by name, "
                    "as cache_position is in the place of q_length"
                )
            named = dict(zip(_ORDER_WITH_POSITIONS, args, strict=False))
            given: dict[str, Any] = {"device": positions.device, **named, **kwargs}
            given |= {"q_length": positions.shape[0], "q_offset": positions[0]}
            return mask(**given)  # type: ignore[call-arg]
        return mask(*args, **kwargs)

    return understanding


# Whether a mask is needed


def _can_skip_causal_mask(
    padding_mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: _Offset,
    kv_offset: int,
    local_size: int | None,
) -> bool:
    """Whether scaled_dot_product_attention can do without the mask, by its ``is_causal``.

    ``padding_mask`` [b, n] reaches over all keys. Reads it, and a tensor ``q_offset``, if not
    tracing.
    """
    if torch.compiler.is_exporting() or (padding_mask is not None and is_opaque(padding_mask)):
        return False
    # With an offset for each batch row, keys behind one row's queries are not behind another's.
    if isinstance(q_offset, torch.Tensor) and (q_offset.numel() != 1 or is_opaque(q_offset)):
        return False
    if local_size is not None and kv_length >= local_size:
        return False
    if padding_mask is not None and padding_mask.shape[-1] > kv_length:
        padding_mask = padding_mask[:, kv_offset : kv_offset + kv_length]
    if (q_length == 1 or kv_length == q_length) and (
        padding_mask is None or _shows_all(padding_mask)
    ):
        return True
    # Before anything is cached, keys behind the queries are hidden by causality.
    return bool(q_offset == 0) and (
        padding_mask is None
        or (_shows_all(padding_mask[:, :q_length]) and _shows_all(~padding_mask[:, q_length:]))
    )


def _can_skip_bidirectional_mask(
    padding_mask: torch.Tensor | None, kv_length: int, local_size: int | None
) -> bool:
    """Whether attention can do without the mask: all of it shows. Reads the padding, if not
    tracing."""
    if torch.compiler.is_exporting() or (padding_mask is not None and is_opaque(padding_mask)):
        return False
    if local_size is not None and kv_length >= local_size:
        return False
    return padding_mask is None or _is_all_visible(padding_mask)


def _skips_causal(
    attention_mask: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: _Offset,
    kv_offset: int,
    local_size: int | None,
) -> bool:
    """_can_skip_causal_mask of the padding mask as it was given, or what skip_policy says."""
    policy = _skipping.current()
    if policy.name != "upstream":
        return policy.skips_causal(
            attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
        )
    if local_size is not None and kv_length >= local_size:
        return False
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return _can_skip_causal_mask(padding_mask, q_length, kv_length, q_offset, kv_offset, local_size)


def _skips_bidirectional(
    attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int, local_size: int | None
) -> bool:
    """_can_skip_bidirectional_mask in the same way."""
    policy = _skipping.current()
    if policy.name != "upstream":
        return policy.skips_bidirectional(attention_mask, kv_length, kv_offset, local_size)
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return _can_skip_bidirectional_mask(padding_mask, kv_length, local_size)


# Masks of each attention implementation


@_understands_cache_position
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
        mask_function: which keys a query attends to. A callable of the user's must answer about
            each element by itself: in large masks it is asked about some rows at a time.
        attention_mask: which keys are not padding, bool [b, n]; those after its end are.
        local_size: the window or chunk of the mask function, if any; matters to skipping.
        allow_is_causal_skip: whether to return None where ``is_causal`` says the same.
        allow_is_bidirectional_skip: whether to return None where nothing is masked.
        use_vmap: whether callables of the user's are asked about one element at a time, under
            torch.vmap, rather than with index tensors that broadcast.
        unmask_unattended: whether rows in which no key is visible are True throughout; beyond
            upstream.

    Raises ValueError for tensors that are too short or of a wrong rank, and for a callable that
    returns a wrong shape; TypeError for one that does not return booleans.

    Mirrors ``transformers.masking_utils.sdpa_mask``.
    """
    check_flag("sdpa_mask", "unmask_unattended", unmask_unattended)
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        _check_padding("sdpa_mask", attention_mask)
        if allow_is_causal_skip and _skips_causal(
            attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
        ):
            return None
        if allow_is_bidirectional_skip and _skips_bidirectional(
            attention_mask, kv_length, kv_offset, local_size
        ):
            return None
    return _materialize(
        mask_function,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask,
        use_vmap,
        device,
        spelling=Spelling(unmask_unattended=unmask_unattended) if unmask_unattended else None,
    )


@_understands_cache_position
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
        _check_padding("eager_mask", attention_mask)
        if _skips_bidirectional(attention_mask, kv_length, kv_offset, kwargs.get("local_size")):
            return None
    return _materialize(
        mask_function,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask,
        use_vmap,
        device,
        spelling=Spelling(dtype, None, unmask_unattended, masked_value),
    )


@_understands_cache_position
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

    A shorter mask (static caches) is returned as it is. ``mask_function`` is not looked at.

    Mirrors ``transformers.masking_utils.flash_attention_mask``.
    """
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.shape[1] == kv_length and attention_mask.all():
        return None
    return attention_mask


@_understands_cache_position
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
    _check_padding("flex_attention_mask", attention_mask)
    if attention_mask is not None and not fast_all(attention_mask):
        if attention_mask.dtype != torch.bool and attention_mask.dtype not in rules.ID_DTYPES:
            raise TypeError(
                "flex_attention_mask: expected attention_mask to be bool, "
                f"but got {attention_mask.dtype}"
            )
        padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding_mask))
    # That module writes masks with the help of this one.
    from attn_mask.block_mask import create_block_mask

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


# Writing a mask


def _check_padding(name: str, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is None:
        return
    check_strided(name, "attention_mask", attention_mask)
    if attention_mask.dim() != 2:
        raise ValueError(
            f"{name}: expected attention_mask to be 2-D [batch_size, length], "
            f"but got {attention_mask.dim()}-D {list(attention_mask.shape)}"
        )


def name_numbers(attention_mask: torch.Tensor, q_length: int) -> None:
    """Says once that a padding mask with other numbers than 0 and 1 tells no documents apart.

    Looks at the values on the CPU alone, and not in steps of decoding.
    """
    kind = "numbers in a padding mask"
    if (
        attention_mask.dtype == torch.bool
        or attention_mask.device.type != "cpu"
        or is_named(kind)
        or is_opaque(attention_mask)
        or q_length <= 1
    ):
        return
    if bool((attention_mask.to(torch.bool) != attention_mask).any()):
        name_once(
            kind,
            "attn_mask: a 2-D attention_mask holds numbers other than 0 and 1. As in transformers, "
            "any but 0 is a token that all others may attend to: documents packed into one row see "
            "each other. To keep them apart, give the create functions of attn_mask.masking_utils "
            "document_ids, or a rule attn_mask.rules.documents(ids)",
        )


class Spelling(NamedTuple):
    """How a mask is written: as booleans, or added to scores."""

    dtype: torch.dtype | None = None  # of an additive mask; None: boolean
    bias: torch.Tensor | None = None
    unmask_unattended: bool = False
    masked_value: float | None = None
    out: torch.Tensor | None = None

    def of_rows(self, rows: "_Axis") -> "Spelling":
        return self._replace(bias=rows.of_mask(self.bias), out=rows.of_mask(self.out))


_BOOLEAN = Spelling()


class _Axis(NamedTuple):
    """Where the queries (or the keys) stand: ``start`` + i, on top of the tensor's positions."""

    length: int
    start: int
    positions: torch.Tensor | None  # [] or [b, 1] for offsets; [length] or [b, length] for each
    first: int = 0  # which row (or column) of the mask the first is
    of: int | None = None  # how many the mask has, where these are a part of them

    def rows(self, first: int, end: int) -> "_Axis":
        """A part of them."""
        of = self.length if self.of is None else self.of
        positions = self.positions
        if positions is not None and positions.dim() > 0 and positions.shape[-1] != 1:
            part = positions[..., first:end]
            return _Axis(end - first, self.start, part, self.first + first, of)
        return _Axis(end - first, self.start + first, positions, self.first + first, of)

    def of_mask(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """What a tensor with a row for each of the mask's, [b, h, q, kv], holds for these."""
        if tensor is None or self.of is None:
            return tensor
        return tensor[:, :, self.first : self.first + self.length]

    def indices(self, device: torch.device) -> torch.Tensor:
        """All the positions: [length] or [b, length]."""
        indices = torch.arange(self.length, device=device)
        if self.positions is None:
            return indices + self.start
        # `start` may be too large for the dtype of the tensor.
        positions = self.positions.to(torch.int64) + self.start
        if positions.dim() > 0 and positions.shape[-1] == self.length:
            return positions
        return indices + positions


def check_position_dtype(name: str, argument: str, positions: torch.Tensor) -> None:
    if positions.dtype not in rules.ID_DTYPES:
        raise TypeError(
            f"{name}: expected {argument} to be uint8 or a signed integer, "
            f"but got {positions.dtype}"
        )


def _axis(
    name: str, argument: str, length: int, offset: "_Offset | _Axis", device: torch.device
) -> _Axis:
    if isinstance(offset, _Axis):
        return offset
    if not isinstance(offset, torch.Tensor):
        return _Axis(length, offset, None)
    offset = offset.to(device)
    if offset.dim() == 1 and offset.shape[0] == 1:
        offset = offset[0]
    # What the sum of the two means upstream.
    is_listed = offset.dim() == 1 and offset.shape[0] == length
    if not is_listed and offset.dim() != 0 and (offset.dim() != 2 or offset.shape[1] != 1):
        raise ValueError(
            f"{name}: expected {argument} to be an int, or a tensor [] or [batch_size, 1], "
            f"but got {list(offset.shape)}"
        )
    check_position_dtype(name, argument, offset)
    if is_listed:
        offset = torch.arange(length, device=device) + offset
    return _Axis(length, 0, offset)


def _check_positions(name: str, axis: str, line: _Axis, batch_size: int) -> None:
    """Operators check this themselves."""
    shape = () if line.positions is None else tuple(line.positions.shape)
    if len(shape) > 2 or any(
        size not in (1, most)
        for size, most in zip(reversed(shape), (line.length, batch_size), strict=False)
    ):
        raise ValueError(
            f"{name}: expected {axis}_offset and {axis}_positions to be for [batch_size, length] = "
            f"{[batch_size, line.length]}, but got {list(shape)}"
        )


def _materialize(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: "_Offset | _Axis",
    kv_offset: "_Offset | _Axis",
    padding_mask: torch.Tensor | None,
    use_vmap: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None = None,
    heads: int = 1,
    name: str | None = None,
    spelling: Spelling | None = None,
) -> torch.Tensor:
    """The mask [b, 1, q, kv], boolean or additive of a dtype; the arguments are sdpa_mask's.

    ``spelling`` says more about how it is written than ``dtype``, in place of that. Offsets may
    also say where each query or key stands. Callables of the user's are asked about
    ``heads``, and what they say may differ: the mask has 1 of them, or all. ``name``: for errors.

    Rules are written by one call of an operator. Callables of the user's within them are asked
    first, in eager code tile by tile; while tracing, the whole tree is one broadcast expression.
    """
    # An operator without tensor arguments does not see `with torch.device(...)`: resolve it here.
    device = default_device() if device is None else torch.device(device)
    if device.type == "cpu":
        device = _CPU  # "cpu:0" is another device to torch
    if spelling is None:
        spelling = _BOOLEAN if dtype is None else Spelling(dtype)
    name = name or ("sdpa_mask" if spelling.dtype is None else "eager_mask")
    rule = rules.rule_of(name, "mask_function", mask_function)
    # What most calls ask for, where all that is seen to below is as it should be.
    if (
        type(q_offset) is int
        and type(kv_offset) is int
        and (padding_mask is None or _is_beside(padding_mask, batch_size, device))
        and operators() is None
        and spelling.out is None
        and (program := rule.known_program).is_written(
            batch_size,
            q_offset,
            q_offset + q_length,
            kv_offset,
            kv_offset + kv_length,
            device,
        )
    ):
        return _C.rule_mask(
            program.code if padding_mask is None else program.padded_code,
            program.operands if padding_mask is None else [*program.operands, padding_mask],
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            None,
            None,
            device,
            spelling.dtype,
            spelling.bias,
            spelling.unmask_unattended,
            spelling.masked_value,
        )
    if not is_recording():
        for argument, size in (
            ("batch_size", batch_size),
            ("q_length", q_length),
            ("kv_length", kv_length),
        ):
            if size < 0:
                raise ValueError(f"{name}: expected {argument} to be a size (>= 0), but got {size}")
    _check_padding(name, padding_mask)
    program = rule.program
    queries = _axis(name, "q_offset", q_length, q_offset, device)
    keys = _axis(name, "kv_offset", kv_length, kv_offset, device)
    code, operands = program.code, program.operands
    if padding_mask is not None:
        code, operands = program.padded_code, [*operands, padding_mask]
    counts = padding_mask is not None and padding_mask.dtype != torch.bool
    # Upstream's conjunction with integers is of integers, which an additive mask can't be made of.
    if counts and (spelling.dtype is not None or operands[-1].dtype not in rules.ID_DTYPES):
        raise TypeError(f"{name}: expected attention_mask to be bool, but got {operands[-1].dtype}")
    by_call = (
        is_jit_tracing()  # it would fix an operator's sizes
        or not program.is_boolean
        or counts
        or (len(program.questions) > 0 and is_tracing(padding_mask))
    )
    for axis, line in enumerate((queries, keys)):
        if line.positions is None and (is_recording() or line.length > 0):
            program.check_positions(name, axis, line.start, line.start + line.length)
    # While a graph is recorded, it must not come to depend on comparisons of sizes.
    if not is_recording():
        by_call = by_call or any(
            line.positions is None and line.length > 0 and line.start < program.lowest[axis]
            for axis, line in enumerate((queries, keys))
        )
        operands = _beside(name, operands, program, batch_size, device)
    if program.bits:
        operands = list(operands)
        for index in program.bits:
            _check_rows_of_bits(operands[index], queries)
            operands[index] = queries.of_mask(operands[index])
    if by_call:
        if program.bits:
            rule = _with_bits_at(name, rule, queries, keys)
        if padding_mask is not None:
            mask = prepare_padding_mask(padding_mask, kv_length, cast(int, kv_offset))
            rule = and_masks(rule, padding_mask_function(mask))
        mask = _ask(name, rule, batch_size, queries, keys, use_vmap, device, heads)
        if not use_vmap:
            mask = mask.expand(batch_size, -1, q_length, kv_length)
        return _spelled(name, mask, spelling, device)
    if not program.questions:
        return _write(code, operands, batch_size, queries, keys, device, spelling)
    is_root = padding_mask is None and isinstance(rule, rules.Function)

    def write_rows(rows: _Axis) -> torch.Tensor:
        answered = list(operands)
        for index in program.bits:
            answered[index] = rows.of_mask(answered[index])
        for operand, question in program.questions:
            answer = _ask(name, question, batch_size, rows, keys, use_vmap, device, heads)
            answered[operand] = _as_bits(
                name, answer, (batch_size, rows.length, kv_length), at_least=4 if is_root else 0
            )
        return _write(code, answered, batch_size, rows, keys, device, spelling.of_rows(rows))

    return _write_in_tiles(write_rows, batch_size * heads, queries, kv_length, spelling.out)


def _check_rows_of_bits(bits: torch.Tensor, queries: _Axis) -> None:
    """Before a part of them is taken; of a whole mask, the operator sees."""
    if queries.of is not None and bits.shape[2] != queries.of:
        raise ValueError(
            f"bits: expected attends to have {queries.of} rows, one for each query, "
            f"but got {list(bits.shape)}"
        )


def _with_bits_at(name: str, rule: MaskFunction, queries: _Axis, keys: _Axis) -> MaskFunction:
    """The rule, called with positions, with bits for the rows and columns that stand there."""
    for argument, line in (("queries", queries), ("keys", keys)):
        if line.positions is not None:
            raise NotImplementedError(
                f"{name}: expected {argument} whose positions are ints, beside bits in a mask "
                "function that must be called, but got a tensor"
            )
    return rules.with_bits_moved(rule, queries.first - queries.start, keys.first - keys.start)


def _spelled(
    name: str, attends: torch.Tensor, spelling: Spelling, device: torch.device
) -> torch.Tensor:
    """A mask of booleans in this spelling."""
    dtype = spelling.dtype
    if dtype is not None or spelling.unmask_unattended:
        _check_boolean(name, attends)
    if not is_recording() and (dtype is not None or spelling.out is not None):
        # The operator checks the value, the bias and `out`.
        batch_size, _, q_length, kv_length = attends.shape
        program = rules.bits(attends).program
        lines = (_Axis(q_length, 0, None), _Axis(kv_length, 0, None))
        return _write(program.code, [attends], batch_size, *lines, device, spelling)
    if spelling.unmask_unattended:
        attends = attends | ~attends.any(-1, keepdim=True)
    mask = attends
    if dtype is not None:
        # One element by the operator, which checks the value.
        one = _Axis(1, 0, None)
        masked = _write(
            [rules.NOTHING],
            [],
            1,
            one,
            one,
            device,
            spelling._replace(bias=None, unmask_unattended=False, out=None),
        )
        zero = torch.zeros((), dtype=dtype, device=device)
        mask = torch.where(attends, zero if spelling.bias is None else spelling.bias, masked)
    if spelling.out is None:
        return mask
    if spelling.out.shape != mask.shape or spelling.out.dtype != mask.dtype:
        raise ValueError(
            f"{name}: expected out to be {list(mask.shape)} of {mask.dtype}, "
            f"but got {list(spelling.out.shape)} of {spelling.out.dtype}"
        )
    return spelling.out.copy_(mask)


def _is_beside(padding_mask: torch.Tensor, batch_size: int, device: torch.device) -> bool:
    return (
        padding_mask.dtype == torch.bool
        and padding_mask.dim() == 2
        and padding_mask.shape[0] == batch_size
        and padding_mask.device == device
    )


def _beside(
    name: str, operands: list[Any], program: Program, batch_size: int, device: torch.device
) -> list[Any]:
    """The operands (and the padding mask after them) on the device of the mask, with its rows.

    Raises ValueError for operands with other rows.
    """
    fitting = operands
    for index, operand in enumerate(operands):
        if operand is None or (operand.shape[0] == batch_size and operand.device == device):
            continue
        if index < len(program.operands):
            rows = program.rows(index, batch_size)
        elif operand.shape[0] < batch_size:
            raise ValueError(
                f"{name}: expected attention_mask to have {batch_size} rows, "
                f"but got {list(operand.shape)}"
            )
        else:  # a mask function leaves rows beyond the batch alone
            rows = operand[:batch_size]
        if fitting is operands:
            fitting = list(operands)
        fitting[index] = rows.to(device)
    return fitting


def _ask(
    name: str,
    mask_function: Callable[..., Any],
    batch_size: int,
    queries: _Axis,
    keys: _Axis,
    use_vmap: bool,
    device: torch.device,
    heads: int = 1,
) -> torch.Tensor:
    """What a mask function says: broadcast over [b, h, q, kv] or, by vmap, of that very shape."""
    batch_idx, head_idx = (
        torch.arange(batch_size, device=device),
        torch.arange(heads, device=device),
    )
    if not is_recording():
        for axis, line in (("q", queries), ("kv", keys)):
            _check_positions(name, axis, line, batch_size)
    q_idx, kv_idx = queries.indices(device), keys.indices(device)
    if use_vmap:
        of_batch = (0, None, *(0 if idx.dim() == 2 else None for idx in (q_idx, kv_idx)))
        of_one = ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), of_batch)
        for in_dims in of_one:
            mask_function = torch.vmap(mask_function, in_dims=in_dims)
        # vmap can't index by a tensor of one element without this; it takes seconds to import.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():
            answer = mask_function(batch_idx, head_idx, q_idx, kv_idx)
    else:
        if q_idx.dim() == 1:
            q_idx = q_idx[None]
        if kv_idx.dim() == 1:
            kv_idx = kv_idx[None]
        answer = mask_function(
            batch_idx[:, None, None, None],
            head_idx[None, :, None, None],
            q_idx[:, None, :, None],
            kv_idx[:, None, None, :],
        )
    if not isinstance(answer, torch.Tensor):
        raise TypeError(
            f"{name}: expected mask_function to return a bool tensor, "
            f"but got {type(answer).__name__}"
        )
    return answer


def _check_boolean(name: str, answer: torch.Tensor) -> None:
    if answer.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected mask_function to return a bool tensor, but got {answer.dtype}"
        )


def _as_bits(
    name: str, answer: torch.Tensor, shape: tuple[int, int, int], at_least: int
) -> torch.Tensor:
    """The answer of a mask function as [b or 1, h or 1, q, kv], shape being (b, q, kv)."""
    _check_boolean(name, answer)
    batch_size, q_length, kv_length = shape
    limits = (kv_length, q_length, None, batch_size)
    fits = at_least <= answer.dim() <= 4 and all(
        limit is None or size in (1, limit)
        for size, limit in zip(reversed(answer.shape), limits, strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected mask_function to return a tensor that can be expanded to "
            f"[{batch_size}, 1, {q_length}, {kv_length}], but got {list(answer.shape)}"
        )
    answer = answer[(None,) * (4 - answer.dim())]
    return answer.expand(-1, -1, q_length, kv_length)


def _write(
    code: list[int],
    operands: list[Any],
    batch_size: int,
    queries: _Axis,
    keys: _Axis,
    device: torch.device,
    spelling: Spelling,
) -> torch.Tensor:
    """The mask of an encoded rule, by the operators."""
    ops = operators()
    if ops is None and spelling.out is None:
        return _C.rule_mask(
            code,
            operands,
            batch_size,
            queries.length,
            keys.length,
            queries.start,
            keys.start,
            queries.positions,
            keys.positions,
            device,
            spelling.dtype,
            spelling.bias,
            spelling.unmask_unattended,
            spelling.masked_value,
        )
    arguments: dict[str, Any] = {
        "q_offset": queries.start,
        "kv_offset": keys.start,
        "q_positions": queries.positions,
        "kv_positions": keys.positions,
        "device": device,
        "unmask_unattended": spelling.unmask_unattended,
    }
    if spelling.dtype is not None:
        arguments |= {
            "dtype": spelling.dtype,
            "bias": spelling.bias,
            "masked_value": spelling.masked_value,
        }
    name = "boolean" if spelling.dtype is None else "additive"
    sizes = batch_size, queries.length, keys.length
    if spelling.out is not None:
        getattr(ops or _ops, name).out(code, operands, *sizes, **arguments, out=spelling.out)
        return spelling.out
    mask: torch.Tensor = getattr(ops, name)(code, operands, *sizes, **arguments)
    return mask


def _write_in_tiles(
    write_rows: Callable[[_Axis], torch.Tensor],
    batch_size: int,
    queries: _Axis,
    kv_length: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """A mask, so many rows at a time that what lies beside it stays small."""
    q_length = queries.length
    height = max(1, _TILE // max(1, batch_size * kv_length))
    if height >= q_length:
        return write_rows(queries)
    try:
        tile = write_rows(queries.rows(0, height))
    except (RuntimeError, ValueError, IndexError):
        tile = None
    if tile is None:
        # A function that holds something of the whole mask's size answers about the whole only;
        # what is wrong with any other, it will say again.
        return write_rows(queries)
    mask = out
    if mask is None:
        mask = tile.new_empty((*tile.shape[:2], q_length, kv_length))
        mask[:, :, :height] = tile
    for first in range(height, q_length, height):
        end = min(first + height, q_length)
        tile = write_rows(queries.rows(first, end))
        if out is None:
            mask[:, :, first:end] = tile
    return mask


# Masks of a model's layers


@_understands_positions
def _preprocess_mask_arguments(
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
    """What all the create functions, of which ``name`` is one, need to know.

    Returns (early_exit, attention_mask, packed_sequence_mask, q_length, kv_length, q_offset,
    kv_offset): with early_exit, attention_mask is the result (a 4D mask as it came, or None for an
    attention implementation that is not registered) and the rest None. Else it is boolean and
    beside the embeddings, if 2-D. packed_sequence_mask: see find_packed_sequence_indices; only
    looked for without a mask and a cache.

    Raises ValueError or TypeError for a cache that reports sizes that can't be.
    """
    if len(getattr(attention_mask, "shape", ())) == 4:  # a tensor, or a BlockMask
        return True, attention_mask, None, None, None, None, None
    if _is_paged(cache):
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
        q_offset, kv_length, kv_offset = _ask_cache(
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
            position_ids = _rows_of(name, position_ids, inputs_embeds.shape[0])
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


def _is_paged(cache: Any) -> bool:
    """Whether it is transformers' PagedAttentionCache, of continuous batching."""
    return any(kind.__name__ == "PagedAttentionCache" for kind in type(cache).__mro__)


def _rows_of(name: str, position_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[b, q] of [q], [1, q] or [b, q]."""
    if position_ids.dim() == 0 or (
        position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch_size)
    ):
        raise ValueError(
            f"{name}: expected position_ids to have {batch_size} rows, or one, "
            f"but got {list(position_ids.shape)}"
        )
    if position_ids.dim() == 2 and position_ids.shape[0] == batch_size:
        return position_ids
    return position_ids.expand(batch_size, -1)


def _ask_cache(
    name: str, cache: Any, q_length: int, layer_idx: int | None, device: torch.device
) -> tuple[Any, Any, Any]:
    """(q_offset, kv_length, kv_offset)."""
    if hasattr(cache, "get_query_offset"):
        q_offset = cache.get_query_offset(layer_idx)
        kv_length, kv_offset = cache.get_mask_sizes(q_length, layer_idx)
    else:  # before 5.14; before 5.4, the sizes were asked for with the positions of the queries
        q_offset = cache.get_seq_length(layer_idx)
        query: Any = q_length
        if "cache_position" in inspect.signature(cache.get_mask_sizes).parameters:
            query = torch.arange(q_length) + q_offset
        kv_length, kv_offset = cache.get_mask_sizes(query, layer_idx)
    if not is_recording():
        q_offset = _size_of_cache(name, "a query offset", q_offset)
        kv_length = _size_of_cache(name, "a kv length", kv_length)
        kv_offset = _size_of_cache(name, "a kv offset", kv_offset)
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.to(device)
    return q_offset, kv_length, kv_offset


def _size_of_cache(name: str, what: str, size: Any) -> Any:
    if isinstance(size, torch.Tensor | torch.SymInt):
        return size
    if not hasattr(size, "__index__"):
        raise TypeError(
            f"{name}: expected cache to report {what} that is an int, but got {type(size).__name__}"
        )
    if size < 0:
        raise ValueError(
            f"{name}: expected cache to report {what} that is not negative, but got {size}"
        )
    return int(size)


class _Pattern(NamedTuple):
    """What a kind of layer attends to."""

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


def _causal_pattern(config: Any, attention_mask: torch.Tensor | None, kv_end: Any) -> _Pattern:
    return _Pattern(causal_mask_function)


def _bidirectional_pattern(
    config: Any, attention_mask: torch.Tensor | None, kv_end: Any
) -> _Pattern:
    return _Pattern(bidirectional_mask_function)


def _sliding_pattern(config: Any, attention_mask: torch.Tensor | None, kv_end: Any) -> _Pattern:
    size = _attribute_of(config, "sliding_window", "a")
    return _Pattern(sliding_window_causal_mask_function(size), sliding_window_overlay(size), size)


def _bidirectional_sliding_pattern(
    config: Any, attention_mask: torch.Tensor | None, kv_end: Any
) -> _Pattern:
    size = _attribute_of(config, "sliding_window", "a")
    return _Pattern(sliding_window_bidirectional_mask_function(size), None, size)


def _chunked_pattern(config: Any, attention_mask: torch.Tensor | None, kv_end: Any) -> _Pattern:
    size = _attribute_of(config, "attention_chunk_size", "an")
    if "flash" in (config._attn_implementation or "") and kv_end > size:
        raise ValueError(
            "Flash attention cannot handle chunked attention, and the key-value length is larger "
            "than the chunk size so the chunked pattern cannot be respected. You should use "
            "another `attn_implementation` when instantiating the model"
        )
    left_padding = None if attention_mask is None else _left_padding(attention_mask)
    overlay = rules.chunked(size) if left_padding is None else chunked_overlay(size, left_padding)
    return _Pattern(and_masks(overlay, causal_mask_function), overlay, size, by_position=True)


def _create_mask(
    name: str,
    make_pattern: Callable[[Any, torch.Tensor | None, Any], _Pattern],
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Any,
    layer_idx: int,
    allow_skip: bool,
    or_mask_function: Callable[..., Any] | None,
    and_mask_function: Callable[..., Any] | None,
    *,
    bidirectional: bool = False,
    encoder_hidden_states: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    block_sequence_ids: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    blocks_in_window: bool = False,
) -> Any:
    """What the create functions share: the pattern of the layers, what is laid over it, and the
    call of the attention implementation's mask function."""
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
            "documents they don't tell"
        )
    early_exit, attention_mask, sequences, q_length, kv_length, q_offset, kv_offset = (
        _preprocess_mask_arguments(
            config,
            inputs_embeds,
            attention_mask,
            cache,
            None if has_documents else position_ids,
            layer_idx,
            encoder_hidden_states,
            name=name,
        )
    )
    if early_exit:
        return attention_mask
    embeds = inputs_embeds if encoder_hidden_states is None else encoder_hidden_states
    batch_size, device = embeds.shape[0], inputs_embeds.device
    is_flash = "flash" in config._attn_implementation
    if document_ids is not None and is_flash:
        raise ValueError(
            f"{name}: expected no document_ids, since flash attention takes no mask that keeps "
            "documents apart: give the model its cu_seqlens, and this function cu_seqlens as well"
        )
    pattern = make_pattern(config, None if has_documents else attention_mask, kv_length + kv_offset)
    rule, local = pattern.rule, pattern.local
    has_functions = or_mask_function is not None or and_mask_function is not None
    # A compiled step of decoding must not alternate between a mask and None.
    if not bidirectional and getattr(cache, "is_compileable", False) and q_length == 1:
        allow_skip = False
    if or_mask_function is not None:
        rule = or_masks(rule, or_mask_function)
    if and_mask_function is not None:
        rule = and_masks(rule, and_mask_function)
    if sequences is not None:
        assert position_ids is not None
        positions = _rows_of(name, position_ids, batch_size)
        rule = remap_positions_for_packed_sequence(rule, positions)
        if local is not None:
            local = remap_positions_for_packed_sequence(local, positions)
    ids = None
    if has_documents:
        tokens = _number_of_tokens(q_offset, q_length, kv_length, cache)
        kv_end = None if cache is None else kv_length + kv_offset
        ids = _ids_of_documents(name, document_ids, cu_seqlens, batch_size, tokens, kv_end, device)
        if pattern.by_position or has_functions:
            positions = _positions_in_runs(ids, attention_mask)
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
        "allow_is_causal_skip": allow_skip and not bidirectional,
        "dtype": embeds.dtype,
        "config": config,
        "use_vmap": has_functions,
        "device": device,
    }
    if bidirectional:
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


def _number_of_tokens(q_offset: Any, q_length: Any, kv_length: Any, cache: Any) -> Any:
    """How many tokens there are, those in the cache included; None where that is not known."""
    if cache is None:
        return kv_length
    if isinstance(q_offset, torch.Tensor):
        # It would have to be waited for, on another device; or each row has its own.
        if q_offset.numel() != 1 or q_offset.device.type != "cpu" or is_opaque(q_offset):
            return None
        q_offset = int(q_offset)
    return q_offset + q_length


def _ids_of_documents(
    name: str,
    document_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    batch_size: int,
    tokens: Any,
    kv_end: Any,
    device: torch.device,
) -> torch.Tensor:
    """The document of each token, ints [b, n].

    ``kv_end``: where a cache ends, else None. Slots in it behind the last token (static caches) are
    in a document that no token is in.
    """
    if document_ids is not None and cu_seqlens is not None:
        raise ValueError(f"{name}: expected document_ids or cu_seqlens, but got both")
    argument = "document_ids" if cu_seqlens is None else "cu_seqlens"
    given = document_ids if cu_seqlens is None else cu_seqlens
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"{name}: expected {argument} to be a tensor, but got {type(given).__name__}"
        )
    if given.dtype not in rules.ID_DTYPES:
        raise TypeError(
            f"{name}: expected {argument} to hold signed integers or uint8, but got {given.dtype}"
        )
    if cu_seqlens is None:
        if given.dim() != 2 or given.shape[0] not in (1, batch_size):
            raise ValueError(
                f"{name}: expected document_ids to be [{batch_size}, length], "
                f"but got {list(given.shape)}"
            )
        if tokens is not None and not is_recording() and given.shape[1] != tokens:
            raise ValueError(
                f"{name}: expected document_ids to be of length {tokens}, for all tokens up to "
                f"the last query, but got {list(given.shape)}"
            )
        ids = given.to(device)
        if kv_end is not None and kv_end > ids.shape[1]:
            nobodys = torch.iinfo(torch.int64).min
            ids = F.pad(ids.long(), (0, kv_end - ids.shape[1]), value=nobodys)
        return ids.expand(batch_size, -1)
    if given.dim() != 1 or given.shape[0] == 0:
        raise ValueError(
            f"{name}: expected cu_seqlens to be 1-D [documents + 1], but got {list(given.shape)}"
        )
    # On another device it would have to be waited for; there, wrong ones give wrong documents.
    if given.device.type == "cpu" and tokens is not None and not is_opaque(given):
        borders = given.tolist()
        if borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
            raise ValueError(
                f"{name}: expected cu_seqlens to rise from 0 to the number of tokens {tokens}, "
                f"but got {borders}"
            )
    index = torch.arange(tokens if kv_end is None else kv_end, device=device)
    ids = torch.searchsorted(given.to(device=device, dtype=torch.int64)[1:], index, right=True)
    return ids.expand(batch_size, -1)


def _left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """How much padding is before each row's first token, [b]; not what is within or behind."""
    # ONNX has no sum of booleans, which torch would take.
    return (attention_mask.long().cumsum(dim=-1) == 0).sum(dim=-1)


def _positions_in_runs(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """How far each token [b, n] is behind the first of its run of ids (that is no left padding)."""
    index = torch.arange(ids.shape[1], device=ids.device)
    begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    starts = torch.where(begins, index, 0).cummax(-1).values
    if attention_mask is not None:
        first = _left_padding(attention_mask)[:, None]
        starts = torch.where(index >= first, starts.maximum(first), starts)
    return index - starts


@_understands_positions
def create_causal_mask(
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
    """The mask of full causal attention, as the config's attention implementation takes it.

    Args:
        config: of the model; its ``_attn_implementation`` names a function in
            ALL_MASK_ATTENTION_FUNCTIONS (None is returned for one that is not there), and its
            ``is_causal`` of False asks for create_bidirectional_mask.
        inputs_embeds: [b, q, hidden]; gives the sizes, dtype and device.
        attention_mask: which keys are not padding [b, n], not zero; or a 4D mask or a BlockMask,
            which is returned as it is.
        cache: the cache, or None.
        position_ids: [b or 1, q]; without mask and cache, jumps in them are the borders of packed
            sequences. Those of another rank are not looked at.
        or_mask_function, and_mask_function: what else, or only, is attended to.
        block_sequence_ids: ints [b, n]; tokens with the same id (not negative) attend to each
            other, whatever their order.
        layer_idx: which of the cache's layers to ask; by default the first of full attention.
        allow_is_causal_skip: whether None may stand for a plain causal mask.
        document_ids: ints [b or 1, n], for each of the n tokens up to the last query, those in the
            cache included (without a cache, n is q): tokens of different documents do not attend
            to each other, not even within a block. Stands in for what position_ids would say.
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
    """
    if not getattr(config, "is_causal", True):
        return create_bidirectional_mask(
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
        "create_causal_mask",
        _causal_pattern,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        find_first_full_attention_index(cache) if layer_idx is None else layer_idx,
        allow_is_causal_skip,
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        document_ids=document_ids,
        cu_seqlens=cu_seqlens,
        blocks_in_window=blocks_in_window,
    )


@_understands_positions
def create_sliding_window_causal_mask(
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
    """As create_causal_mask, within the config's ``sliding_window``.

    ``layer_idx`` is by default the cache's first sliding layer. Raises ValueError for a config
    without the window.

    Mirrors ``transformers.masking_utils.create_sliding_window_causal_mask``.
    """
    if not getattr(config, "is_causal", True):
        return create_bidirectional_sliding_window_mask(
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
        "create_sliding_window_causal_mask",
        _sliding_pattern,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        _first_sliding_index(cache) if layer_idx is None else layer_idx,
        allow_is_causal_skip,
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        document_ids=document_ids,
        cu_seqlens=cu_seqlens,
        blocks_in_window=blocks_in_window,
    )


@_understands_positions
def create_chunked_causal_mask(
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
    """As create_causal_mask, within chunks of the config's ``attention_chunk_size``.

    Chunks start behind each row's left padding. ``layer_idx`` is by default the cache's first
    sliding layer. Raises ValueError for a config without the size, and for flash attention over
    more keys than a chunk holds.

    Mirrors ``transformers.masking_utils.create_chunked_causal_mask``.
    """
    return _create_mask(
        "create_chunked_causal_mask",
        _chunked_pattern,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        _first_sliding_index(cache) if layer_idx is None else layer_idx,
        allow_is_causal_skip,
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        document_ids=document_ids,
        cu_seqlens=cu_seqlens,
        blocks_in_window=blocks_in_window,
    )


@_understands_names
def create_bidirectional_mask(
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
    """The mask of full attention in both directions, as the attention implementation takes it.

    Args as for create_causal_mask, and:
        encoder_hidden_states: [b, kv, hidden]: the keys, where they are not the queries'; gives
            the number of keys, the batch size and the dtype.
        allow_is_bidirectional_skip: whether None may stand for a mask that masks nothing.

    Mirrors ``transformers.masking_utils.create_bidirectional_mask``.
    """
    return _create_mask(
        "create_bidirectional_mask",
        _bidirectional_pattern,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        find_first_full_attention_index(cache),
        allow_is_bidirectional_skip,
        or_mask_function,
        and_mask_function,
        bidirectional=True,
        encoder_hidden_states=encoder_hidden_states,
        document_ids=document_ids,
        cu_seqlens=cu_seqlens,
    )


@_understands_names
def create_bidirectional_sliding_window_mask(
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
    """As create_bidirectional_mask, up to the config's ``sliding_window`` to either side.

    Raises ValueError for a config without the window.

    Mirrors ``transformers.masking_utils.create_bidirectional_sliding_window_mask``.
    """
    return _create_mask(
        "create_bidirectional_sliding_window_mask",
        _bidirectional_sliding_pattern,
        config,
        inputs_embeds,
        attention_mask,
        cache,
        _first_sliding_index(cache),
        allow_is_bidirectional_skip,
        or_mask_function,
        and_mask_function,
        bidirectional=True,
        encoder_hidden_states=encoder_hidden_states,
        document_ids=document_ids,
        cu_seqlens=cu_seqlens,
    )


@_understands_names
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


@_understands_positions
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
    # Functions that users put into the mapping know upstream's arguments only.
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
