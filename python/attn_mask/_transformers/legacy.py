"""transformers' modeling_attn_mask_utils, of any release: BEHAVIOUR says of which.

``releases`` executes this file once for each module that it fills, so that functions find what
stands in their own module: the class that users put there, too. Here itself it is the newest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attn_mask._core.arguments import check_fit, check_no_rule, check_strided, checked_device
from attn_mask._core.events import timed
from attn_mask._core.library import _C
from attn_mask._core.operators import operators
from attn_mask._core.sdpa_decision import is_causal_enough, is_unmasked
from attn_mask._core.tracing import (
    default_device,
    holds,
    is_jit_tracing,
    is_opaque,
    is_recording,
    is_tracing,
)
from attn_mask._transformers import transformers_4
from attn_mask._transformers.behaviours import BEHAVIOURS, Behaviour

__all__ = [
    "AttentionMaskConverter",
    "_create_4d_causal_attention_mask",
    "_prepare_4d_attention_mask",
    "_prepare_4d_attention_mask_for_sdpa",
    "_prepare_4d_causal_attention_mask",
    "_prepare_4d_causal_attention_mask_for_sdpa",
]

BEHAVIOUR: Behaviour = globals().get("BEHAVIOUR", BEHAVIOURS[-1])


class AttentionMaskConverter:
    """A causal flag and a sliding window, and the 4D masks for them.

    Args:
        is_causal: whether a query attends to no key after its own position.
        sliding_window: the window W (a positive int), or None for no window. Causal masks only.

    Raises ValueError for a window that is not positive.

    Mirrors ``transformers.modeling_attn_mask_utils.AttentionMaskConverter`` (4.39 and later for the
    width of the window).
    """

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

    @timed
    def to_causal_4d(
        self,
        batch_size: int,
        query_length: int,
        key_value_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor | None:
        """The mask of causality (and window) alone.

        Returns [b, 1, q, kv], the batch a stride-0 expand; None when one query without a window
        needs no mask. Raises ValueError when the converter is not causal, for negative sizes and
        for kv < q; TypeError for a dtype without additive masks.
        """
        if not self.is_causal:
            raise ValueError(
                f"Please use `to_causal_4d` only if {self.__class__} has `is_causal` set to True."
            )
        check_fit(
            "to_causal_4d",
            batch_size=batch_size,
            query_length=query_length,
            key_value_length=key_value_length,
            sliding_window=self.sliding_window,
        )
        has_one_query = query_length <= 1
        # What jit traces is recorded with a mask or without, as the first call has it.
        if self.sliding_window is None and (
            bool(has_one_query) if is_jit_tracing() else holds(has_one_query)
        ):
            return None
        if not BEHAVIOUR.is_present:
            shape, past_length = (batch_size, query_length), key_value_length - query_length
            return self._make_causal_mask(shape, dtype, device, past_length, self.sliding_window)
        return _causal_mask(
            batch_size, query_length, key_value_length, dtype, device, self.sliding_window
        )

    if not BEHAVIOUR.is_dataclass:
        to_causal_4d.__wrapped__.__defaults__ = (torch.float32, "cpu")  # type: ignore[attr-defined]

    @timed
    def to_4d(
        self,
        attention_mask_2d: torch.Tensor,
        query_length: int,
        dtype: torch.dtype,
        key_value_length: int | None = None,
    ) -> torch.Tensor:
        """The mask of a padding mask [b, kv], and of causality where the converter is causal.

        Returns [b, 1, q, kv], dense, on the padding mask's device. For one query without a window,
        and for a converter that is not causal, kv is the padding mask's own length. Raises
        ValueError when a causal converter gets no ``key_value_length``, NotImplementedError for a
        window without causality, TypeError for dtypes without additive masks and complex padding
        masks.
        """
        return _padding_mask_4d(self, attention_mask_2d, query_length, dtype, key_value_length)

    if not TYPE_CHECKING and not BEHAVIOUR.is_dataclass:

        @timed
        def to_4d(
            self,
            attention_mask_2d: torch.Tensor,
            query_length: int,
            key_value_length: int | None = None,
            dtype: torch.dtype = torch.float32,
        ) -> torch.Tensor:
            """The mask of a padding mask [b, kv], and of causality where the converter is
            causal."""
            return _padding_mask_4d(self, attention_mask_2d, query_length, dtype, key_value_length)

    @staticmethod
    def _make_causal_mask(
        input_ids_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        past_key_values_length: int = 0,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """The causal mask of ``input_ids_shape`` (b, q) after ``past_key_values_length`` keys.

        Returns [b, 1, q, q + past], the batch a stride-0 expand. A window of 0 leaves a query its
        own position, a negative one nothing (the class rejects both; upstream's static method does
        not).
        """
        batch_size, query_length = input_ids_shape
        if sliding_window is not None and not BEHAVIOUR.wide_window:
            sliding_window -= 1
        check_fit(
            "_make_causal_mask",
            batch_size=batch_size,
            query_length=query_length,
            past_key_values_length=past_key_values_length,
            sliding_window=sliding_window,
        )
        key_value_length = query_length + past_key_values_length
        # No operator takes such a window.
        is_narrow = sliding_window is not None and sliding_window <= 0
        window = None if is_narrow else sliding_window
        mask = _causal_mask(batch_size, query_length, key_value_length, dtype, device, window)
        if sliding_window is not None and is_narrow:
            plane = mask[:1]
            hidden = torch.ones_like(plane, dtype=torch.bool)
            hidden = hidden.tril(past_key_values_length - sliding_window - 1)
            mask = plane.masked_fill(hidden, torch.finfo(dtype).min).expand_as(mask)
        return mask

    @staticmethod
    def _expand_mask(
        mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
    ) -> torch.Tensor:
        """The mask of a padding mask [b, kv] alone: [b, 1, tgt_len or kv, kv], dense."""
        check_strided("_expand_mask", "mask", mask)
        _, _ = mask.size()  # another rank is upstream's ValueError
        check_fit("_expand_mask", tgt_len=tgt_len)
        result: torch.Tensor = operators()._expand_mask(mask, tgt_len, dtype)
        return result

    @staticmethod
    def _unmask_unattended(expanded_mask: torch.Tensor, min_dtype: float) -> torch.Tensor:
        """A copy of an additive mask [..., q, kv] with rows of ``min_dtype`` throughout unmasked.

        Memory-efficient attention on CUDA gives NaN for a row without a key. Unmasked elements are
        -0.0, as upstream's product leaves them. Raises ValueError for a boolean mask.
        """
        check_no_rule("_unmask_unattended", "expanded_mask", expanded_mask)
        if not isinstance(min_dtype, int | float):  # a number of NumPy's, or in a tensor
            try:
                min_dtype = float(min_dtype)
            except ValueError as error:
                raise TypeError(
                    "_unmask_unattended: expected min_dtype to be a number, but got "
                    f"{type(min_dtype).__name__}"
                ) from error
        # ``_C`` would round an int to a double.
        ops = operators()
        ops = torch.ops.attn_mask if ops is _C else ops
        result: torch.Tensor = ops._unmask_unattended(expanded_mask, min_dtype)
        return result

    if not BEHAVIOUR.has_sdpa:
        del _unmask_unattended
    elif not TYPE_CHECKING and not BEHAVIOUR.unmasks_by_value:

        @staticmethod
        def _unmask_unattended(
            expanded_mask: torch.Tensor, attention_mask: torch.Tensor, unmasked_value: bool | float
        ) -> torch.Tensor:
            """Unmasks, in place, the rows before the first attended key of padding [b, kv].

            ``expanded_mask`` is [b, q, ...] or [b, heads, q, kv], and comes back as the same
            object. The index of the key is taken for one of a row, so that with past keys other
            rows are unmasked, or there is none of that index: an IndexError.
            """
            return transformers_4.unmask_by_index(expanded_mask, attention_mask, unmasked_value)

    @staticmethod
    def _ignore_causal_mask_sdpa(
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        past_key_values_length: int,
        sliding_window: int | None = None,
        is_training: bool = False,
    ) -> bool:
        """Whether scaled_dot_product_attention can do without the mask, by its ``is_causal``.

        So when nothing is padded, the window (if any) is longer than kv, and there is one query or
        no past. Reads the values of a 2D mask (a wait for its device), but not while tracing.
        """
        return _ignores(
            attention_mask, inputs_embeds, past_key_values_length, sliding_window, is_training
        )

    if not BEHAVIOUR.has_ignore:
        del _ignore_causal_mask_sdpa
    elif not TYPE_CHECKING and not BEHAVIOUR.has_is_training:

        @staticmethod
        def _ignore_causal_mask_sdpa(
            attention_mask: torch.Tensor | None,
            inputs_embeds: torch.Tensor,
            past_key_values_length: int,
            sliding_window: int | None = None,
        ) -> bool:
            """Whether scaled_dot_product_attention can do without the mask."""
            return _ignores(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window, False
            )


if BEHAVIOUR.is_dataclass:
    dataclass(AttentionMaskConverter)


def _is_tracing(tensor: object, causal: bool = True) -> bool:
    """Whether the release takes code as being traced, which has ``tensor`` as an argument."""
    if BEHAVIOUR.is_present:
        return is_tracing(tensor)
    if is_jit_tracing() or (BEHAVIOUR.compile_is_tracing and torch.compiler.is_compiling()):
        return True
    knows_fx = BEHAVIOUR.fx_is_tracing if causal else BEHAVIOUR.compile_is_tracing
    return knows_fx and isinstance(tensor, torch.fx.Proxy)


def _ignores(
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None,
    is_training: bool,
) -> bool:
    """_ignore_causal_mask_sdpa, whatever its signature."""
    if not BEHAVIOUR.passes_4d_masks and attention_mask is not None and attention_mask.dim() == 4:
        key_value_length = inputs_embeds.shape[1] + past_key_values_length
        if sliding_window is None or key_value_length < sliding_window:
            transformers_4.check_4d(attention_mask, inputs_embeds.shape, key_value_length)
    # Tracing first: a graph must not depend on a comparison of shapes that decides nothing.
    training_decides = is_training and (
        attention_mask is None or BEHAVIOUR.training_looks_while_tracing
    )
    if _is_tracing(inputs_embeds) and not training_decides:
        return False
    check_strided("_ignore_causal_mask_sdpa", "inputs_embeds", inputs_embeds)
    if attention_mask is not None:
        check_strided("_ignore_causal_mask_sdpa", "attention_mask", attention_mask)
    return is_causal_enough(
        attention_mask, inputs_embeds, past_key_values_length, sliding_window, _is_all_ones
    )


def _causal_mask(
    batch_size: int,
    query_length: int,
    key_value_length: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """[b, 1, q, kv] of causality and window, for one query without a window, too."""
    # An operator without tensor arguments does not see `with torch.device(...)`: resolve it here.
    device = default_device() if device is None else checked_device("to_causal_4d", device)
    if holds(key_value_length == 0) and holds(query_length == 1):
        return torch.empty((batch_size, 1, 1, 0), dtype=dtype, device=device)
    if sliding_window is None and not holds(query_length > 1):
        # One query, for which a mask is required; or a length that only a run decides.
        past_key_values_length = key_value_length - query_length
        result: torch.Tensor | None = operators()._make_causal_mask(
            (batch_size, query_length), past_key_values_length, None, dtype, device
        )
    else:
        result = operators().to_causal_4d(
            batch_size, query_length, key_value_length, dtype, device, sliding_window
        )
    assert result is not None
    return result


def _padding_mask_4d(
    converter: AttentionMaskConverter,
    attention_mask_2d: torch.Tensor,
    query_length: int,
    dtype: torch.dtype,
    key_value_length: int | None,
    unmask_unattended: bool = False,
) -> torch.Tensor:
    """to_4d, and in the same pass what _unmask_unattended does to its result."""
    check_strided("to_4d", "attention_mask_2d", attention_mask_2d)
    check_fit(
        "to_4d",
        query_length=query_length,
        key_value_length=key_value_length,
        sliding_window=converter.sliding_window,
    )
    if attention_mask_2d.dim() == 0:
        raise IndexError("tuple index out of range")
    batch_size, mask_length = attention_mask_2d.shape
    is_causal, sliding_window = bool(converter.is_causal), converter.sliding_window
    if is_causal and (sliding_window is not None or not holds(query_length <= 1)):
        if not BEHAVIOUR.wide_window:
            if BEHAVIOUR.combines_by_adding or sliding_window == 1:
                return _combined(
                    converter, attention_mask_2d, query_length, dtype, key_value_length
                )
            sliding_window = None if sliding_window is None else sliding_window - 1
        # Upstream combines the two by broadcasting, so that one of them may be of length 1.
        if key_value_length is not None:
            if holds(mask_length == 1):
                attention_mask_2d = attention_mask_2d.expand(-1, key_value_length)
            elif holds(key_value_length == 1) and holds(query_length <= 1):
                is_causal, sliding_window = False, None
            if (
                holds(key_value_length == 0)
                and holds(query_length == 1)
                and holds(mask_length <= 1)
            ):
                return attention_mask_2d.new_empty((batch_size, 1, 1, 0), dtype=dtype)
    result: torch.Tensor = operators().to_4d(
        attention_mask_2d,
        query_length,
        dtype,
        key_value_length,
        is_causal,
        sliding_window,
        unmask_unattended,
    )
    return result


def _combined(
    converter: AttentionMaskConverter,
    attention_mask_2d: torch.Tensor,
    query_length: int,
    dtype: torch.dtype,
    key_value_length: int | None,
) -> torch.Tensor:
    """to_4d by a plane of causality on top of the expanded padding, in place.

    For what no operator writes in one pass: a sum, a window of the query's own key alone.
    """
    if key_value_length is None:
        raise ValueError(
            "This attention mask converter is causal. Make sure to pass `key_value_length` to "
            "correctly create a causal mask."
        )
    batch_size, mask_length = attention_mask_2d.shape
    if holds(mask_length == 1):
        attention_mask_2d = attention_mask_2d.expand(-1, key_value_length)
    elif holds(mask_length != key_value_length) and holds(key_value_length != 1):
        raise ValueError(
            "to_4d: expected attention_mask_2d to be 2-D [batch_size, kv_length] with "
            f"kv_length {key_value_length}, but got 2-D {list(attention_mask_2d.shape)}"
        )
    causal = converter._make_causal_mask(
        (batch_size, query_length),
        dtype,
        attention_mask_2d.device,
        key_value_length - query_length,
        converter.sliding_window,
    )
    mask = converter._expand_mask(attention_mask_2d, dtype, query_length)
    return mask.add_(causal) if BEHAVIOUR.combines_by_adding else mask.clamp_(max=causal)


def _is_all_ones(mask: torch.Tensor) -> bool:
    """Whether every element is 1; waits for the mask's device."""
    if BEHAVIOUR.is_present:
        if is_opaque(mask):
            return False
    elif mask.dim() == 4 or is_recording() or isinstance(mask, FakeTensor):
        return bool(torch.all(mask == 1))
    # As embeddings of as many queries as keys, for which the elements alone decide.
    square = mask if mask.dim() > 1 else mask.reshape(1, -1)
    return bool(operators()._ignore_causal_mask_sdpa(mask, square, 0, None, False))


def _beside(attention_mask: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """``inputs_embeds``, or where it is on another device something beside the mask that stands for
    its dtype and shape: operators reject mixed devices, upstream does not read the embeddings."""
    if inputs_embeds.device == attention_mask.device:
        return inputs_embeds
    return attention_mask.new_empty(inputs_embeds.shape[:2], dtype=inputs_embeds.dtype)


@timed
def _prepare_4d_causal_attention_mask(
    attention_mask: torch.Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The additive causal mask for attention that is written out.

    Args:
        attention_mask: padding [b, kv]; or [b, 1, q, kv] of ones and zeros (booleans: True
            attends), which is inverted; None, or any other rank, for causality alone.
        input_shape: (b, q).
        inputs_embeds: gives the dtype, and the device where there is no mask.
        past_key_values_length: keys before the first query; kv = q + past.
        sliding_window: the window W, or None.

    Returns [b, 1, q, kv], or None for one query without mask and window. A 4D mask of a floating
    dtype keeps that dtype, with the minimum of ``inputs_embeds``'. Raises ValueError for a 4D mask
    of another shape.
    """
    check_fit("_prepare_4d_causal_attention_mask", past_key_values_length=past_key_values_length)
    check_no_rule("_prepare_4d_causal_attention_mask", "attention_mask", attention_mask)
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    query_length, dtype = input_shape[-1], inputs_embeds.dtype
    key_value_length = query_length + past_key_values_length
    rank = None if attention_mask is None else attention_mask.dim()
    if attention_mask is not None and (rank == 2 or not BEHAVIOUR.takes_4d_masks):
        return converter.to_4d(
            attention_mask, query_length, dtype=dtype, key_value_length=key_value_length
        )
    if attention_mask is not None and rank == 4:
        past_key_values_length = key_value_length - input_shape[1]
        result: torch.Tensor = operators()._prepare_4d_causal_attention_mask(
            attention_mask,
            (input_shape[0], input_shape[1]),
            _beside(attention_mask, inputs_embeds),
            past_key_values_length,
            None,
        )
        return result
    return converter.to_causal_4d(
        input_shape[0], query_length, key_value_length, dtype=dtype, device=inputs_embeds.device
    )


@timed
def _prepare_4d_causal_attention_mask_for_sdpa(
    attention_mask: torch.Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The ``attn_mask`` argument of scaled_dot_product_attention for causal attention.

    Arguments as for _prepare_4d_causal_attention_mask, but a 4D mask must be additive already and
    comes back as the same object. Returns None where ``is_causal`` is all that is needed (see
    AttentionMaskConverter._ignore_causal_mask_sdpa), else [b, 1, q, kv]. On CUDA, but not while
    tracing, rows without a key are unmasked.
    """
    check_fit(
        "_prepare_4d_causal_attention_mask_for_sdpa", past_key_values_length=past_key_values_length
    )
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    query_length, dtype = input_shape[-1], inputs_embeds.dtype
    key_value_length = query_length + past_key_values_length
    if BEHAVIOUR.has_ignore:
        skips = AttentionMaskConverter._ignore_causal_mask_sdpa(
            attention_mask, inputs_embeds, past_key_values_length, sliding_window
        )
    else:
        skips = _skips(attention_mask, input_shape, inputs_embeds, key_value_length)
    if skips:
        return None
    if attention_mask is None:
        return converter.to_causal_4d(
            input_shape[0], query_length, key_value_length, dtype=dtype, device=inputs_embeds.device
        )
    unmasks = (
        BEHAVIOUR.unmasks_by_value
        and is_unmasked(attention_mask)
        and (BEHAVIOUR.is_present or attention_mask.device.type == "cuda")
        and not _is_tracing(inputs_embeds)
    )
    if attention_mask.dim() != 4 or not BEHAVIOUR.takes_4d_masks:
        if BEHAVIOUR.is_present:
            return _padding_mask_4d(
                converter, attention_mask, query_length, dtype, key_value_length, unmasks
            )
        mask = converter.to_4d(
            attention_mask, query_length, dtype=dtype, key_value_length=key_value_length
        )
    elif not BEHAVIOUR.passes_4d_masks:
        # 4.40 fails here, by mistake; as 4.39.
        transformers_4.check_4d(attention_mask, input_shape, key_value_length)
        return _inverted(attention_mask, dtype)
    else:
        if BEHAVIOUR.checks_maximum:
            transformers_4.check_maximum(attention_mask)
        mask = attention_mask
    unmask: Any = AttentionMaskConverter._unmask_unattended
    if unmasks:
        mask = unmask(mask, min_dtype=torch.finfo(dtype).min)
    elif (
        not BEHAVIOUR.unmasks_by_value
        and query_length > 1
        and (BEHAVIOUR.unmasks_while_tracing or not _is_tracing(inputs_embeds))
    ):
        mask = unmask(mask, attention_mask, unmasked_value=0.0)
    return mask


@timed
def _prepare_4d_attention_mask(
    mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
) -> torch.Tensor:
    """The additive mask of a padding mask [b, kv], not causal: [b, 1, tgt_len or kv, kv]."""
    return AttentionMaskConverter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)


@timed
def _prepare_4d_attention_mask_for_sdpa(
    mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
) -> torch.Tensor | None:
    """As _prepare_4d_attention_mask; None when the mask is all ones, if not tracing."""
    check_strided("_prepare_4d_attention_mask_for_sdpa", "mask", mask)
    _, _ = mask.shape  # another rank is upstream's ValueError
    check_fit("_prepare_4d_attention_mask_for_sdpa", tgt_len=tgt_len)
    if BEHAVIOUR.is_present and not is_opaque(mask):
        result: torch.Tensor | None = operators()._prepare_4d_attention_mask_for_sdpa(
            mask, tgt_len, dtype, True
        )
        return result
    if not BEHAVIOUR.is_present:
        traces = _is_tracing(mask, causal=False)
        looks = BEHAVIOUR.looks_while_tracing or not traces
        any_shape = BEHAVIOUR.all_ones_is_none or traces or tgt_len is None
        if looks and (any_shape or tgt_len in (1, mask.shape[1])) and _is_all_ones(mask):
            return None
    return AttentionMaskConverter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)


@timed
def _create_4d_causal_attention_mask(
    input_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The mask of causality (and window) for ``input_shape`` (b, q): [b, 1, q, q + past].

    None for one query without a window. The batch is a stride-0 expand.
    """
    check_fit("_create_4d_causal_attention_mask", past_key_values_length=past_key_values_length)
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    if device is None:
        device = default_device()
    else:
        device = checked_device("_create_4d_causal_attention_mask", device)
    return converter.to_causal_4d(
        input_shape[0],
        input_shape[-1],
        past_key_values_length + input_shape[-1],
        dtype=dtype,
        device=device,
    )


def _skips(
    attention_mask: torch.Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: torch.Tensor,
    key_value_length: int,
) -> bool:
    """What _ignore_causal_mask_sdpa decides since 4.40; here whatever the window."""
    _, query_length = input_shape
    traces = _is_tracing(inputs_embeds)
    is_square = key_value_length == query_length
    if attention_mask is not None:
        if traces or (attention_mask.dim() == 4 and BEHAVIOUR.takes_4d_masks):
            return False
        return bool(query_length == 1 or is_square) and _is_all_ones(attention_mask)
    if query_length > 1 and not is_square:
        return False
    if traces:
        raise ValueError(
            "Attention using SDPA can not be traced with torch.jit.trace when no "
            "attention_mask is provided. To solve this issue, please either load your "
            'model with the argument `attn_implementation="eager"` or pass an '
            "attention_mask input when tracing the model."
        )
    return True


def _inverted(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [b, 1, q, kv] of ones and zeros as an additive one of this dtype."""
    batch_size, _, query_length, key_value_length = attention_mask.shape
    # As padding, with a batch row for each query: 1 in the dtype attends.
    rows = attention_mask.reshape(batch_size * query_length, key_value_length)
    mask = AttentionMaskConverter._expand_mask(rows, dtype, 1)
    return mask.view(batch_size, 1, query_length, key_value_length)


if not BEHAVIOUR.has_sdpa:
    del _prepare_4d_causal_attention_mask_for_sdpa, _prepare_4d_attention_mask_for_sdpa
    __all__ = [name for name in __all__ if not name.endswith("_for_sdpa")]
