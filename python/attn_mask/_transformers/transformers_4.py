"""Drop-in for ``transformers.modeling_attn_mask_utils`` of transformers 4, of any release.

Names, signatures, defaults, results and errors are those of one release, by its Behaviour.
``attn_mask.modeling_attn_mask_utils`` documents arguments and results; this module has what
releases did otherwise. What is looked up in ``module`` is what users may have replaced there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from attn_mask import modeling_attn_mask_utils as present
from attn_mask._core.tracing import default_device, holds, is_jit_tracing, is_recording
from attn_mask._transformers.behaviours import Behaviour

_Present = present.AttentionMaskConverter


_DOC = """Drop-in for ``transformers.modeling_attn_mask_utils``, as from {version} on.

Names, signatures, defaults, results and errors are those of that release; the README lists the few
differences. ``attn_mask.modeling_attn_mask_utils`` documents arguments and results.
"""


def fill(module: Any, behaviour: Behaviour) -> None:
    """Puts the file as a release had it into a module."""
    module.__doc__ = _DOC.format(version=behaviour.version)
    release = _RELEASES[behaviour.version] = _Release(module, behaviour)
    defined = [_converter(behaviour), *_functions(release)]
    module.__all__ = [one.__name__ for one in defined]
    for one in defined:
        setattr(module, one.__name__, _at_top_of(module, one))
    if behaviour.is_dataclass:
        dataclass(module.AttentionMaskConverter)


def _at_top_of(module: Any, defined: Any) -> Any:
    """The function or class as one that a module defines, so that it pickles."""
    defined.__module__, defined.__qualname__ = module.__name__, defined.__name__
    if isinstance(defined, type):
        for name, method in vars(defined).items():
            function = method.__func__ if isinstance(method, staticmethod) else method
            if isinstance(function, FunctionType) and function.__globals__ is globals():
                function.__module__ = module.__name__
                function.__qualname__ = f"{defined.__name__}.{name}"
    return defined


class _Release:
    """What the functions of a release do, in its module."""

    def __init__(self, module: Any, behaviour: Behaviour):
        self._module = module
        self.behaviour = behaviour

    @property
    def converter(self) -> type[_Present]:
        """The class that stands in the module now."""
        return self._module.AttentionMaskConverter  # type: ignore[no-any-return]

    def is_tracing(self, tensor: object, causal: bool = True) -> bool:
        """Whether the release takes code as being traced, which has ``tensor`` as an argument."""
        behaviour = self.behaviour
        if is_jit_tracing() or (behaviour.compile_is_tracing and torch.compiler.is_compiling()):
            return True
        knows_fx = behaviour.fx_is_tracing if causal else behaviour.compile_is_tracing
        return knows_fx and isinstance(tensor, torch.fx.Proxy)

    def to_4d(
        self,
        converter: Any,
        attention_mask_2d: torch.Tensor,
        query_length: int,
        dtype: torch.dtype,
        key_value_length: int | None,
    ) -> torch.Tensor:
        behaviour = self.behaviour
        is_causal, window = converter.is_causal, converter.sliding_window
        if is_causal and (query_length > 1 or window is not None):
            if behaviour.combines_by_adding or (window == 1 and not behaviour.wide_window):
                return self._combined(
                    converter, attention_mask_2d, query_length, dtype, key_value_length
                )
            if window is not None and not behaviour.wide_window:
                window -= 1
        return _Present(is_causal, window).to_4d(
            attention_mask_2d, query_length, dtype, key_value_length
        )

    def _combined(
        self,
        converter: Any,
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
        if attention_mask_2d.dim() == 0:
            raise IndexError("tuple index out of range")
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
        mask: torch.Tensor = converter._expand_mask(attention_mask_2d, dtype, query_length)
        return mask.add_(causal) if self.behaviour.combines_by_adding else mask.clamp_(max=causal)

    def ignores(
        self,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        past_key_values_length: int,
        sliding_window: int | None,
        is_training: bool,
    ) -> bool:
        query_length = inputs_embeds.shape[1]
        key_value_length = query_length + past_key_values_length
        is_tracing = self.is_tracing(inputs_embeds)
        if sliding_window is not None and key_value_length >= sliding_window:
            return False
        if attention_mask is not None and attention_mask.dim() == 4:
            if not self.behaviour.passes_4d_masks:
                _check_4d(attention_mask, inputs_embeds.shape[:2], key_value_length)
            return False
        training_decides = is_training and (
            attention_mask is None or self.behaviour.training_looks_while_tracing
        )
        if is_tracing and not training_decides:
            return False
        return bool(query_length == 1 or key_value_length == query_length) and (
            attention_mask is None or _is_all_ones(attention_mask)
        )

    def skips(
        self,
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
        if is_tracing or (attention_mask.dim() == 4 and self.behaviour.takes_4d_masks):
            return False
        return bool(query_length == 1 or is_square) and _is_all_ones(attention_mask)

    def invert_4d(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A mask [b, 1, q, kv] of ones and zeros as an additive one of this dtype."""
        batch_size, _, query_length, key_value_length = attention_mask.shape
        # As padding, with a batch row for each query: 1 in the dtype attends.
        rows = attention_mask.reshape(batch_size * query_length, key_value_length)
        mask = self.converter._expand_mask(rows, dtype, 1)
        return mask.view(batch_size, 1, query_length, key_value_length)

    def unmask(self, mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """_unmask_unattended of a mask that has no other owner."""
        if is_recording():
            unmask: Any = self.converter._unmask_unattended
            return unmask(mask, attention_mask, unmasked_value=0.0)  # type: ignore[no-any-return]
        first_attended = _first_attended(attention_mask).tolist()
        _check_rows(first_attended, mask)
        for row, end in enumerate(first_attended):
            if end > 0:
                mask[row, :, :end] = 0.0
        return mask


# By version. Methods look theirs up here: torch.compile does not follow objects in closures of
# theirs.
_RELEASES: dict[str, _Release] = {}


def _converter(behaviour: Behaviour) -> Any:
    version, wide_window = behaviour.version, behaviour.wide_window

    class AttentionMaskConverter:
        """A causal flag and a sliding window, and the 4D masks for them."""

        is_causal: bool
        sliding_window: int | None

        __init__ = _Present.__init__

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
                    f"Please use `to_causal_4d` only if {self.__class__} has `is_causal` set to "
                    "True."
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

        def to_4d(
            self,
            attention_mask_2d: torch.Tensor,
            query_length: int,
            dtype: torch.dtype,
            key_value_length: int | None = None,
        ) -> torch.Tensor:
            """The mask of a padding mask [b, kv], and of causality where the converter is causal.

            Masked by both holds the minimum.
            """
            return _RELEASES[version].to_4d(
                self, attention_mask_2d, query_length, dtype, key_value_length
            )

        @staticmethod
        def _make_causal_mask(
            input_ids_shape: Sequence[int],
            dtype: torch.dtype,
            device: torch.device | str | None,
            past_key_values_length: int = 0,
            sliding_window: int | None = None,
        ) -> torch.Tensor:
            """The causal mask of ``input_ids_shape`` (b, q) after ``past_key_values_length`` keys.

            A window of W lets a query attend to W keys, itself included; since 4.39 one more.
            """
            if sliding_window is not None and not wide_window:
                sliding_window -= 1
            return _Present._make_causal_mask(
                input_ids_shape, dtype, device, past_key_values_length, sliding_window
            )

        _expand_mask = staticmethod(_Present._expand_mask)

        @staticmethod
        def _ignore_causal_mask_sdpa(
            attention_mask: torch.Tensor | None,
            inputs_embeds: torch.Tensor,
            past_key_values_length: int,
            sliding_window: int | None = None,
            is_training: bool = False,
        ) -> bool:
            """Whether scaled_dot_product_attention can do without the mask.

            Raises ValueError for a 4D mask of another shape than the embeddings', until 4.40.
            """
            return _RELEASES[version].ignores(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window, is_training
            )

    converter: Any = AttentionMaskConverter
    if not behaviour.is_dataclass:
        converter.to_causal_4d.__defaults__ = (torch.float32, "cpu")

        def to_4d(
            self: Any,
            attention_mask_2d: torch.Tensor,
            query_length: int,
            key_value_length: int | None = None,
            dtype: torch.dtype = torch.float32,
        ) -> torch.Tensor:
            """The mask of a padding mask [b, kv], and of causality where the converter is causal.

            Masked by both holds -inf.
            """
            return _RELEASES[version].to_4d(
                self, attention_mask_2d, query_length, dtype, key_value_length
            )

        converter.to_4d = to_4d
    if behaviour.unmasks_by_value:
        converter._unmask_unattended = staticmethod(_Present._unmask_unattended)
    elif behaviour.has_sdpa:

        def _unmask_unattended(
            expanded_mask: torch.Tensor, attention_mask: torch.Tensor, unmasked_value: bool | float
        ) -> torch.Tensor:
            return _unmask_by_index(expanded_mask, attention_mask, unmasked_value)

        _unmask_unattended.__doc__ = _unmask_by_index.__doc__
        converter._unmask_unattended = staticmethod(_unmask_unattended)
    if not behaviour.has_ignore:
        del converter._ignore_causal_mask_sdpa
    elif not behaviour.has_is_training:

        def _ignore_causal_mask_sdpa(
            attention_mask: torch.Tensor | None,
            inputs_embeds: torch.Tensor,
            past_key_values_length: int,
            sliding_window: int | None = None,
        ) -> bool:
            return _RELEASES[version].ignores(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window, False
            )

        _ignore_causal_mask_sdpa.__doc__ = converter._ignore_causal_mask_sdpa.__doc__
        converter._ignore_causal_mask_sdpa = staticmethod(_ignore_causal_mask_sdpa)
    return converter


def _functions(release: _Release) -> list[Any]:
    behaviour = release.behaviour

    def _prepare_4d_causal_attention_mask(
        attention_mask: torch.Tensor | None,
        input_shape: Sequence[int],
        inputs_embeds: torch.Tensor,
        past_key_values_length: int,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """The additive causal mask for attention that is written out."""
        converter = release.converter(is_causal=True, sliding_window=sliding_window)
        key_value_length = input_shape[-1] + past_key_values_length
        rank = None if attention_mask is None else attention_mask.dim()
        if attention_mask is not None and (rank == 2 or not behaviour.takes_4d_masks):
            return converter.to_4d(
                attention_mask,
                input_shape[-1],
                key_value_length=key_value_length,
                dtype=inputs_embeds.dtype,
            )
        if rank == 4:
            return present._prepare_4d_causal_attention_mask(
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
        return release.converter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)

    def _create_4d_causal_attention_mask(
        input_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        past_key_values_length: int = 0,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """The mask of causality (and window) for ``input_shape`` (b, q): [b, 1, q, q + past]."""
        converter = release.converter(is_causal=True, sliding_window=sliding_window)
        return converter.to_causal_4d(
            input_shape[0],
            input_shape[-1],
            past_key_values_length + input_shape[-1],
            dtype=dtype,
            device=device if device is not None else default_device(),
        )

    if not behaviour.has_sdpa:
        return [
            _prepare_4d_causal_attention_mask,
            _prepare_4d_attention_mask,
            _create_4d_causal_attention_mask,
        ]

    def _prepare_4d_causal_attention_mask_for_sdpa(
        attention_mask: torch.Tensor | None,
        input_shape: Sequence[int],
        inputs_embeds: torch.Tensor,
        past_key_values_length: int,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """The ``attn_mask`` argument of scaled_dot_product_attention for causal attention."""
        converter = release.converter(is_causal=True, sliding_window=sliding_window)
        key_value_length = input_shape[-1] + past_key_values_length
        is_tracing = release.is_tracing(inputs_embeds)
        if behaviour.has_ignore:
            skips = release.converter._ignore_causal_mask_sdpa(
                attention_mask, inputs_embeds, past_key_values_length, sliding_window
            )
        else:
            skips = release.skips(attention_mask, input_shape, key_value_length, is_tracing)
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
        if attention_mask.dim() == 4 and behaviour.takes_4d_masks:
            if not behaviour.passes_4d_masks:
                # 4.40 fails here, by mistake; as 4.39.
                _check_4d(attention_mask, input_shape, key_value_length)
                return release.invert_4d(attention_mask, inputs_embeds.dtype)
            if behaviour.checks_maximum:
                _check_maximum(attention_mask)
            mask = attention_mask
        else:
            mask = converter.to_4d(
                attention_mask,
                input_shape[-1],
                dtype=inputs_embeds.dtype,
                key_value_length=key_value_length,
            )
        if behaviour.unmasks_by_value:
            if mask.device.type == "cuda" and not is_tracing:
                mask = release.converter._unmask_unattended(
                    mask, min_dtype=torch.finfo(inputs_embeds.dtype).min
                )
        elif input_shape[-1] > 1 and (behaviour.unmasks_while_tracing or not is_tracing):
            mask = release.unmask(mask, attention_mask)
        return mask

    def _prepare_4d_attention_mask_for_sdpa(
        mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None
    ) -> torch.Tensor | None:
        """As _prepare_4d_attention_mask; None when the mask is all ones."""
        _, key_value_length = mask.shape
        is_tracing = release.is_tracing(mask, causal=False)
        any_shape = behaviour.all_ones_is_none or is_tracing
        looks = behaviour.looks_while_tracing or not is_tracing
        one_or_square = any_shape or tgt_len is None or tgt_len in (1, key_value_length)
        if looks and one_or_square and _is_all_ones(mask):
            return None
        return release.converter._expand_mask(mask=mask, dtype=dtype, tgt_len=tgt_len)

    return [
        _prepare_4d_causal_attention_mask,
        _prepare_4d_attention_mask,
        _create_4d_causal_attention_mask,
        _prepare_4d_causal_attention_mask_for_sdpa,
        _prepare_4d_attention_mask_for_sdpa,
    ]


def _unmask_by_index(
    expanded_mask: torch.Tensor, attention_mask: torch.Tensor, unmasked_value: bool | float
) -> torch.Tensor:
    """Unmasks, in place, the rows before the first attended key of padding [b, kv].

    ``expanded_mask`` is [b, q, ...] or [b, heads, q, kv], and comes back as the same object. The
    index of the key is taken for one of a row, so that with past keys other rows are unmasked, or
    there is none of that index: an IndexError.
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


def _is_all_ones(mask: torch.Tensor) -> bool:
    if mask.dim() == 4 or is_recording() or isinstance(mask, FakeTensor):
        return bool(torch.all(mask == 1))
    return present.is_all_ones(mask)


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
    """There must be a row for each index that is unmasked."""
    query_length = expanded_mask.shape[-2 if expanded_mask.dim() == 4 else 1]
    if max(first_attended, default=0) > query_length:
        raise IndexError(
            "_unmask_unattended: expected expanded_mask to have a row for each key before the "
            f"first attended one, but got {list(expanded_mask.shape)} for first keys "
            f"{first_attended}"
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
        raise ValueError("Custom 4D attention mask should be passed in inverted form with max==0`")
