"""Drop-in for ``transformers.modeling_attn_mask_utils`` of transformers 4.

Names, signatures, defaults, results and errors are those of one release: attn_mask._releases
executes this file once for each that differs. ``attn_mask.modeling_attn_mask_utils`` documents
arguments and results; here is said what releases did otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attn_mask import modeling_attn_mask_utils as _present
from attn_mask._releases import BEHAVIOURS
from attn_mask._tracing import default_device, holds, is_jit_tracing, is_recording

BEHAVIOUR = next(behaviour for behaviour in BEHAVIOURS if behaviour.module_name == __name__)

__doc__ = (
    f"Drop-in for ``transformers.modeling_attn_mask_utils``, as from {BEHAVIOUR.version} on.\n\n"
    "Names, signatures, defaults, results and errors are those of that release; the README lists\n"
    "the few differences. ``attn_mask.modeling_attn_mask_utils`` documents arguments and results.\n"
)

__all__ = [
    "AttentionMaskConverter",
    "_create_4d_causal_attention_mask",
    "_prepare_4d_attention_mask",
    "_prepare_4d_causal_attention_mask",
]
if BEHAVIOUR.has_sdpa:
    __all__ += [
        "_prepare_4d_attention_mask_for_sdpa",
        "_prepare_4d_causal_attention_mask_for_sdpa",
    ]

_PresentConverter = _present.AttentionMaskConverter


class AttentionMaskConverter:
    """A causal flag and a sliding window, to be asked for 4D masks."""

    is_causal: bool
    sliding_window: int | None

    def __init__(self, is_causal: bool, sliding_window: int | None = None):
        self.is_causal = is_causal
        self.sliding_window = sliding_window
        if sliding_window is not None and sliding_window <= 0:
            raise ValueError(
                "Make sure that when passing `sliding_window` that its value is a strictly "
                f"positive integer, not `{sliding_window}`"
            )

    def to_causal_4d(
        self,
        batch_size: int,
        query_length: int,
        key_value_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor | None:
        """The mask of causality (and window) alone."""
        if not self.is_causal:
            raise ValueError(
                f"Please use `to_causal_4d` only if {self.__class__} has `is_causal` set to True."
            )
        if query_length <= 1 and self.sliding_window is None:
            return None
        return self._make_causal_mask(
            (batch_size, query_length),
            dtype,
            device,
            key_value_length - query_length,
            self.sliding_window,
        )

    if BEHAVIOUR.is_dataclass:

        def to_4d(
            self,
            attention_mask_2d: torch.Tensor,
            query_length: int,
            dtype: torch.dtype,
            key_value_length: int | None = None,
        ) -> torch.Tensor:
            """The mask of a padding mask [b, kv], and of causality where the converter is causal.

            Closed by both holds the minimum.
            """
            return _to_4d(self, attention_mask_2d, query_length, dtype, key_value_length)

    else:
        to_causal_4d.__defaults__ = (torch.float32, "cpu")

        def to_4d(  # type: ignore[misc]  # another order of arguments
            self,
            attention_mask_2d: torch.Tensor,
            query_length: int,
            key_value_length: int | None = None,
            dtype: torch.dtype = torch.float32,
        ) -> torch.Tensor:
            """The mask of a padding mask [b, kv], and of causality where the converter is causal.

            Closed by both holds -inf.
            """
            return _to_4d(self, attention_mask_2d, query_length, dtype, key_value_length)

    if BEHAVIOUR.wide_window:
        _make_causal_mask = staticmethod(_PresentConverter._make_causal_mask)
    else:

        @staticmethod
        def _make_causal_mask(  # type: ignore[misc]  # the same arguments
            input_ids_shape: Sequence[int],
            dtype: torch.dtype,
            device: torch.device | str | None,
            past_key_values_length: int = 0,
            sliding_window: int | None = None,
        ) -> torch.Tensor:
            """The causal mask of ``input_ids_shape`` (b, q) after ``past_key_values_length`` keys.

            A window of W lets a query attend to W keys, itself included.
            """
            return _PresentConverter._make_causal_mask(
                input_ids_shape,
                dtype,
                device,
                past_key_values_length,
                None if sliding_window is None else sliding_window - 1,
            )

    _expand_mask = staticmethod(_PresentConverter._expand_mask)

    if BEHAVIOUR.unmasks_by_value:
        _unmask_unattended = staticmethod(_PresentConverter._unmask_unattended)
    elif BEHAVIOUR.has_sdpa:

        @staticmethod
        def _unmask_unattended(  # type: ignore[misc]  # other arguments
            expanded_mask: torch.Tensor,
            attention_mask: torch.Tensor,
            unmasked_value: bool | float,
        ) -> torch.Tensor:
            """Opens, in place, the rows before the first attended key of padding [b, kv].

            ``expanded_mask`` is [b, q, ...] or [b, heads, q, kv], and comes back as the same
            object. The index of the key is taken for one of a row, so that with past keys other
            rows are opened, or there is none of that index: an IndexError.
            """
            first = _first_attended(attention_mask)
            if is_recording():
                # A graph must depend neither on values nor on how many rows there are.
                first = first.to(expanded_mask.device)
                query_length = expanded_mask.shape[2 if expanded_mask.dim() == 4 else 1]
                rows = torch.arange(query_length, device=first.device) < first[:, None]
                if expanded_mask.dim() == 4:
                    rows = rows[:, None]
                rows = rows[(..., *(None,) * (expanded_mask.dim() - rows.dim()))]
                return expanded_mask.masked_fill_(rows, unmasked_value)
            if not first.any():
                return expanded_mask
            _check_rows(first.tolist(), expanded_mask)
            rows = torch.arange(int(first.max()), device="cpu") < first[:, None]
            batch, query = rows.nonzero(as_tuple=True)
            if expanded_mask.dim() == 4:
                expanded_mask[batch, :, query] = unmasked_value
            else:
                expanded_mask[batch, query] = unmasked_value
            return expanded_mask

    if BEHAVIOUR.has_is_training:

        @staticmethod
        def _ignore_causal_mask_sdpa(
            attention_mask: torch.Tensor | None,
            inputs_embeds: torch.Tensor,
            past_key_values_length: int,
            sliding_window: int | None = None,
            is_training: bool = False,
        ) -> bool:
            """Whether scaled_dot_product_attention can do without the mask."""
            return _ignore(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window, is_training
            )

    elif BEHAVIOUR.has_ignore:

        @staticmethod
        def _ignore_causal_mask_sdpa(  # type: ignore[misc]  # fewer arguments
            attention_mask: torch.Tensor | None,
            inputs_embeds: torch.Tensor,
            past_key_values_length: int,
            sliding_window: int | None = None,
        ) -> bool:
            """Whether scaled_dot_product_attention can do without the mask.

            Raises ValueError for a 4D mask of another shape than the embeddings'.
            """
            return _ignore(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window, False
            )


if BEHAVIOUR.is_dataclass:
    dataclass(AttentionMaskConverter)


def _to_4d(
    converter: AttentionMaskConverter,
    attention_mask_2d: torch.Tensor,
    query_length: int,
    dtype: torch.dtype,
    key_value_length: int | None,
) -> torch.Tensor:
    is_causal, window = converter.is_causal, converter.sliding_window
    if is_causal and (query_length > 1 or window is not None):
        if BEHAVIOUR.combines_by_adding or (window == 1 and not BEHAVIOUR.wide_window):
            return _combined(attention_mask_2d, query_length, dtype, key_value_length, window)
        if window is not None and not BEHAVIOUR.wide_window:
            window -= 1
    return _PresentConverter(is_causal, window).to_4d(
        attention_mask_2d, query_length, dtype, key_value_length
    )


def _combined(
    attention_mask_2d: torch.Tensor,
    query_length: int,
    dtype: torch.dtype,
    key_value_length: int | None,
    window: int | None,
) -> torch.Tensor:
    """to_4d by a plane of causality on top of the expanded padding, in place.

    For what no operator writes in one pass: a sum, a window of the query's own key alone.
    """
    if key_value_length is None:
        raise ValueError(
            "This attention mask converter is causal. Make sure to pass `key_value_length` to "
            "correctly create a causal mask."
        )
    if attention_mask_2d.dim() == 0:
        raise IndexError("tuple index out of range")
    batch_size, mask_length = attention_mask_2d.shape
    if holds(mask_length == 1):
        attention_mask_2d = attention_mask_2d.expand(-1, key_value_length)
    elif holds(mask_length != key_value_length) and holds(key_value_length != 1):
        raise ValueError(
            "to_4d: expected attention_mask_2d to be 2-D [batch_size, kv_length] with kv_length "
            f"{key_value_length}, but got 2-D {list(attention_mask_2d.shape)}"
        )
    causal = AttentionMaskConverter._make_causal_mask(
        (batch_size, query_length),
        dtype,
        attention_mask_2d.device,
        key_value_length - query_length,
        window,
    )
    mask = AttentionMaskConverter._expand_mask(attention_mask_2d, dtype, query_length)
    return mask.add_(causal) if BEHAVIOUR.combines_by_adding else mask.clamp_(max=causal)


def _is_tracing(tensor: object, causal: bool = True) -> bool:
    """Whether the release takes code as being traced, where it has ``tensor`` as an argument."""
    if is_jit_tracing() or (BEHAVIOUR.compile_is_tracing and torch.compiler.is_compiling()):
        return True
    knows_fx = BEHAVIOUR.fx_is_tracing if causal else BEHAVIOUR.compile_is_tracing
    return knows_fx and isinstance(tensor, torch.fx.Proxy)


def _is_all_ones(mask: torch.Tensor) -> bool:
    if mask.dim() == 4 or is_recording() or isinstance(mask, FakeTensor):
        return bool(torch.all(mask == 1))
    return _present._is_all_ones(mask)


def _first_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """The index of each row's first attended key, [b] on the CPU; 0 where none is attended.

    Raises ValueError, TypeError and IndexError for padding that can't be read so.
    """
    if attention_mask.dim() != 2 or attention_mask.is_meta:
        raise ValueError(
            "_unmask_unattended: expected attention_mask to be 2-D [batch_size, kv_length] and to "
            f"have values, but got {attention_mask.dim()}-D {list(attention_mask.shape)} on "
            f"{attention_mask.device}"
        )
    kv_length = attention_mask.shape[1]
    falling = torch.arange(kv_length, 0, -1, device="cpu")
    try:
        earliness = attention_mask.cpu() * falling
    except RuntimeError as error:
        raise TypeError(
            "_unmask_unattended: expected attention_mask to be of a dtype that torch multiplies, "
            f"but got {attention_mask.dtype}"
        ) from error
    if kv_length == 0:
        raise IndexError("_unmask_unattended: expected attention_mask to have keys, but got none")
    return torch.argmax(earliness, 1)


def _check_rows(first_attended: list[int], expanded_mask: torch.Tensor) -> None:
    """There must be a row for each index that is opened."""
    query_length = expanded_mask.shape[-2 if expanded_mask.dim() == 4 else 1]
    if max(first_attended, default=0) > query_length:
        raise IndexError(
            "_unmask_unattended: expected expanded_mask to have a row for each key before the "
            f"first attended one, but got {list(expanded_mask.shape)} for first keys "
            f"{first_attended}"
        )


def _ignore(
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None,
    is_training: bool,
) -> bool:
    query_length = inputs_embeds.shape[1]
    key_value_length = query_length + past_key_values_length
    is_tracing = _is_tracing(inputs_embeds)
    if sliding_window is not None and key_value_length >= sliding_window:
        return False
    if attention_mask is not None and attention_mask.dim() == 4:
        if not BEHAVIOUR.passes_4d_masks:
            _check_4d(attention_mask, inputs_embeds.shape[:2], key_value_length)
        return False
    training_decides = is_training and (
        attention_mask is None or BEHAVIOUR.training_looks_while_tracing
    )
    if is_tracing and not training_decides:
        return False
    return bool(query_length == 1 or key_value_length == query_length) and (
        attention_mask is None or _is_all_ones(attention_mask)
    )


def _check_4d(
    attention_mask: torch.Tensor, input_shape: Sequence[int], key_value_length: int
) -> None:
    shape, expected = tuple(attention_mask.shape), (input_shape[0], 1, input_shape[1])
    if shape != (*expected, key_value_length):
        raise ValueError(
            f"Incorrect 4D attention_mask shape: {shape}; expected: "
            f"{(*expected, key_value_length)}."
        )


def _invert_4d(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [b, 1, q, kv] of ones and zeros as an additive one of this dtype."""
    batch_size, _, query_length, key_value_length = attention_mask.shape
    # As padding, with a batch row for each query: 1 in the dtype attends.
    rows = attention_mask.reshape(batch_size * query_length, key_value_length)
    mask = AttentionMaskConverter._expand_mask(rows, dtype, 1)
    return mask.view(batch_size, 1, query_length, key_value_length)


def _unmask(mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """_unmask_unattended of a mask that nobody else has."""
    if is_recording():
        unmask: Any = AttentionMaskConverter._unmask_unattended
        return unmask(mask, attention_mask, unmasked_value=0.0)  # type: ignore[no-any-return]
    first_attended = _first_attended(attention_mask).tolist()
    _check_rows(first_attended, mask)
    for row, end in enumerate(first_attended):
        if end > 0:
            mask[row, :, :end] = 0.0
    return mask


def _prepare_4d_causal_attention_mask(
    attention_mask: torch.Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The additive causal mask for attention that is written out."""
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    key_value_length = input_shape[-1] + past_key_values_length
    rank = None if attention_mask is None else attention_mask.dim()
    if attention_mask is not None and (rank == 2 or not BEHAVIOUR.takes_4d_masks):
        return converter.to_4d(
            attention_mask,
            input_shape[-1],
            key_value_length=key_value_length,
            dtype=inputs_embeds.dtype,
        )
    if rank == 4:
        return _present._prepare_4d_causal_attention_mask(
            attention_mask, input_shape, inputs_embeds, past_key_values_length
        )
    return converter.to_causal_4d(
        input_shape[0],
        input_shape[-1],
        key_value_length,
        dtype=inputs_embeds.dtype,
        device=inputs_embeds.device,
    )


def _prepare_4d_attention_mask(
    mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
) -> torch.Tensor:
    """The additive mask of a padding mask [b, kv], not causal: [b, 1, tgt_len or kv, kv]."""
    return AttentionMaskConverter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)


def _create_4d_causal_attention_mask(
    input_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The mask of causality (and window) for ``input_shape`` (b, q): [b, 1, q, q + past]."""
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    return converter.to_causal_4d(
        input_shape[0],
        input_shape[-1],
        past_key_values_length + input_shape[-1],
        dtype=dtype,
        device=device if device is not None else default_device(),
    )


if BEHAVIOUR.has_sdpa:

    def _prepare_4d_causal_attention_mask_for_sdpa(
        attention_mask: torch.Tensor | None,
        input_shape: Sequence[int],
        inputs_embeds: torch.Tensor,
        past_key_values_length: int,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """The ``attn_mask`` argument of scaled_dot_product_attention for causal attention."""
        converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
        key_value_length = input_shape[-1] + past_key_values_length
        is_tracing = _is_tracing(inputs_embeds)
        if BEHAVIOUR.has_ignore:
            skips = AttentionMaskConverter._ignore_causal_mask_sdpa(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window
            )
        else:
            skips = _skips(attention_mask, input_shape, key_value_length, is_tracing)
        if skips:
            return None
        if attention_mask is None:
            return converter.to_causal_4d(
                input_shape[0],
                input_shape[-1],
                key_value_length,
                dtype=inputs_embeds.dtype,
                device=inputs_embeds.device,
            )
        if attention_mask.dim() == 4 and BEHAVIOUR.takes_4d_masks:
            if not BEHAVIOUR.passes_4d_masks:
                # 4.40 fails here, by mistake; as 4.39.
                _check_4d(attention_mask, input_shape, key_value_length)
                return _invert_4d(attention_mask, inputs_embeds.dtype)
            if BEHAVIOUR.checks_maximum:
                _check_maximum(attention_mask)
            mask = attention_mask
        else:
            mask = converter.to_4d(
                attention_mask,
                input_shape[-1],
                dtype=inputs_embeds.dtype,
                key_value_length=key_value_length,
            )
        if BEHAVIOUR.unmasks_by_value:
            if mask.device.type == "cuda" and not is_tracing:
                mask = AttentionMaskConverter._unmask_unattended(
                    mask, min_dtype=torch.finfo(inputs_embeds.dtype).min
                )
        elif input_shape[-1] > 1 and (BEHAVIOUR.unmasks_while_tracing or not is_tracing):
            mask = _unmask(mask, attention_mask)
        return mask

    def _skips(
        attention_mask: torch.Tensor | None,
        input_shape: Sequence[int],
        key_value_length: int,
        is_tracing: bool,
    ) -> bool:
        """What _ignore_causal_mask_sdpa decides since 4.40; here whatever the window."""
        _, query_length = input_shape
        is_square = key_value_length == query_length
        if attention_mask is None:
            if query_length > 1 and not is_square:
                return False
            if is_tracing:
                raise ValueError(
                    "Attention using SDPA can not be traced with torch.jit.trace when no "
                    "attention_mask is provided. To solve this issue, please either load your "
                    'model with the argument `attn_implementation="eager"` or pass an '
                    "attention_mask input when tracing the model."
                )
            return True
        if is_tracing or (attention_mask.dim() == 4 and BEHAVIOUR.takes_4d_masks):
            return False
        return bool(query_length == 1 or is_square) and _is_all_ones(attention_mask)

    # The dtypes in which torch finds a maximum.
    _ORDERED_DTYPES = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )

    def _check_maximum(attention_mask: torch.Tensor) -> None:
        if attention_mask.dtype not in _ORDERED_DTYPES:
            raise TypeError(
                "_prepare_4d_causal_attention_mask_for_sdpa: expected a 4-D attention_mask to be "
                f"of a dtype with a maximum, but got {attention_mask.dtype}"
            )
        if attention_mask.numel() == 0:
            raise ValueError(
                "_prepare_4d_causal_attention_mask_for_sdpa: expected a 4-D attention_mask to have "
                f"elements, but got {list(attention_mask.shape)}"
            )
        if attention_mask.max() != 0:
            raise ValueError(
                "Custom 4D attention mask should be passed in inverted form with max==0`"
            )

    def _prepare_4d_attention_mask_for_sdpa(
        mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
    ) -> torch.Tensor | None:
        """As _prepare_4d_attention_mask; None when the mask is all ones."""
        _, key_value_length = mask.shape
        is_tracing = _is_tracing(mask, causal=False)
        any_shape = BEHAVIOUR.all_ones_is_none or is_tracing
        looks = BEHAVIOUR.looks_while_tracing or not is_tracing
        one_or_square = any_shape or tgt_len is None or tgt_len in (1, key_value_length)
        if looks and one_or_square and _is_all_ones(mask):
            return None
        return AttentionMaskConverter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)
