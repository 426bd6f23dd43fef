"""Drop-in for ``transformers.modeling_attn_mask_utils``, on native operators.

Names, signatures, defaults, results and errors are those of transformers 5.23 (the results have
been the same since 4.45); the README lists the few differences. Additive masks hold 0 where a query
attends to a key and ``torch.finfo(dtype).min`` elsewhere, in float16, bfloat16, float32 or float64.

Throughout: b batch_size, q query_length, kv key_value_length; a window of W lets a query attend to
itself and the W keys before it; a 2D mask attends where its value, cast to the result's dtype, is
1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_mask._core.arguments import check_fit, check_no_rule, check_strided, checked_device
from attn_mask._core.library import _C
from attn_mask._core.operators import operators
from attn_mask._core.sdpa_decision import is_causal_enough, is_result, is_unmasked
from attn_mask._core.timing import timed
from attn_mask._core.tracing import default_device, holds, is_jit_tracing, is_opaque, is_tracing

__all__ = [
    "AttentionMaskConverter",
    "_create_4d_causal_attention_mask",
    "_prepare_4d_attention_mask",
    "_prepare_4d_attention_mask_for_sdpa",
    "_prepare_4d_causal_attention_mask",
    "_prepare_4d_causal_attention_mask_for_sdpa",
]


@dataclass
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
        return _causal_mask(
            batch_size, query_length, key_value_length, dtype, device, self.sliding_window
        )

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
        check_fit(
            "_make_causal_mask",
            batch_size=batch_size,
            query_length=query_length,
            past_key_values_length=past_key_values_length,
            sliding_window=sliding_window,
        )
        key_value_length = query_length + past_key_values_length
        narrow = sliding_window if sliding_window is not None and sliding_window <= 0 else None
        mask = _causal_mask(
            batch_size,
            query_length,
            key_value_length,
            dtype,
            device,
            sliding_window if narrow is None else None,
        )
        if narrow is not None:
            plane = mask[:1]
            hidden = torch.ones_like(plane, dtype=torch.bool)
            hidden = hidden.tril(past_key_values_length - narrow - 1)
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
        ops = operators()
        if ops is not None:
            result: torch.Tensor = ops._expand_mask(mask, tgt_len, dtype=dtype)
        else:
            result = _C._expand_mask(mask, tgt_len, dtype)
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
        ops = operators() or torch.ops.attn_mask
        result: torch.Tensor = ops._unmask_unattended(expanded_mask, min_dtype)
        return result

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
        # Tracing first: a graph must not depend on a comparison of shapes that decides nothing.
        if is_tracing(inputs_embeds) and not (attention_mask is None and is_training):
            return False
        check_strided("_ignore_causal_mask_sdpa", "inputs_embeds", inputs_embeds)
        if attention_mask is not None:
            check_strided("_ignore_causal_mask_sdpa", "attention_mask", attention_mask)
        return is_causal_enough(
            attention_mask,
            inputs_embeds,
            past_key_values_length,
            sliding_window,
            lambda mask: not is_opaque(mask) and is_all_ones(mask),
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
    result: torch.Tensor | None
    ops = operators()
    if sliding_window is None and not holds(query_length > 1):
        # One query, for which a mask is required; or a length that only a run decides.
        result = (ops or torch.ops.attn_mask)._make_causal_mask(
            (batch_size, query_length),
            key_value_length - query_length,
            dtype=dtype,
            device=device,
        )
    elif ops is not None:
        result = ops.to_causal_4d(
            batch_size,
            query_length,
            key_value_length,
            dtype=dtype,
            device=device,
            sliding_window=sliding_window,
        )
    else:
        result = _C.to_causal_4d(
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
        # Upstream combines the two by broadcasting, so that one of them may be of length 1.
        if key_value_length is not None and holds(mask_length == 1):
            attention_mask_2d = attention_mask_2d.expand(-1, key_value_length)
        elif (
            key_value_length is not None
            and holds(key_value_length == 1)
            and holds(query_length <= 1)
        ):
            is_causal, sliding_window = False, None
        if (
            key_value_length is not None
            and holds(key_value_length == 0)
            and holds(query_length == 1)
            and holds(mask_length <= 1)
        ):
            return attention_mask_2d.new_empty((batch_size, 1, 1, 0), dtype=dtype)
    ops = operators()
    if ops is not None:
        result: torch.Tensor = ops.to_4d(
            attention_mask_2d,
            query_length,
            dtype=dtype,
            key_value_length=key_value_length,
            is_causal=is_causal,
            sliding_window=sliding_window,
            unmask_unattended=unmask_unattended,
        )
    else:
        result = _C.to_4d(
            attention_mask_2d,
            query_length,
            dtype,
            key_value_length,
            is_causal,
            sliding_window,
            unmask_unattended,
        )
    return result


def is_all_ones(mask: torch.Tensor) -> bool:
    """Whether every element is 1; waits for the mask's device."""
    ops = operators()
    ignores = _C._ignore_causal_mask_sdpa if ops is None else ops._ignore_causal_mask_sdpa
    # As embeddings of as many queries as keys, for which the elements alone decide.
    square = mask if mask.dim() > 1 else mask.reshape(1, -1)
    return bool(ignores(mask, square, 0, None, False))


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
    key_value_length = input_shape[-1] + past_key_values_length
    rank = None if attention_mask is None else attention_mask.dim()
    if attention_mask is not None and rank == 2:
        return converter.to_4d(
            attention_mask,
            input_shape[-1],
            key_value_length=key_value_length,
            dtype=inputs_embeds.dtype,
        )
    if attention_mask is not None and rank == 4:
        ops = operators() or torch.ops.attn_mask
        result: torch.Tensor = ops._prepare_4d_causal_attention_mask(
            attention_mask,
            (input_shape[0], input_shape[1]),
            _beside(attention_mask, inputs_embeds),
            key_value_length - input_shape[1],
        )
        return result
    return converter.to_causal_4d(
        input_shape[0],
        input_shape[-1],
        key_value_length,
        dtype=inputs_embeds.dtype,
        device=inputs_embeds.device,
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
    key_value_length = input_shape[-1] + past_key_values_length
    if AttentionMaskConverter._ignore_causal_mask_sdpa(
        attention_mask, inputs_embeds, past_key_values_length, sliding_window
    ):
        return None
    if attention_mask is None:
        return converter.to_causal_4d(
            input_shape[0],
            input_shape[-1],
            key_value_length,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
        )
    unmasks = is_unmasked(attention_mask) and not is_tracing(inputs_embeds)
    if is_result(attention_mask, unmasks):
        return attention_mask
    if attention_mask.dim() != 4:
        return _padding_mask_4d(
            converter,
            attention_mask,
            input_shape[-1],
            inputs_embeds.dtype,
            key_value_length,
            unmasks,
        )
    return AttentionMaskConverter._unmask_unattended(
        attention_mask, min_dtype=torch.finfo(inputs_embeds.dtype).min
    )


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
    if is_opaque(mask):
        return AttentionMaskConverter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)
    ops = operators()
    if ops is not None:
        result: torch.Tensor | None = ops._prepare_4d_attention_mask_for_sdpa(
            mask, tgt_len, dtype=dtype
        )
    else:
        result = _C._prepare_4d_attention_mask_for_sdpa(mask, tgt_len, dtype, True)
    return result


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
    return converter.to_causal_4d(
        input_shape[0],
        input_shape[-1],
        past_key_values_length + input_shape[-1],
        dtype=dtype,
        device=default_device()
        if device is None
        else checked_device("_create_4d_causal_attention_mask", device),
    )
