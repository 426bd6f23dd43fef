"""Arguments of transformers' functions: names and orders that releases since 4.53 had, caches."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from attn_mask._core.tracing import is_recording

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _rename(function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """``input_embeds`` was a name until 5.2, ``past_key_values`` that of the cache until 5.23."""
    if "input_embeds" in kwargs:
        if "inputs_embeds" in kwargs:
            raise TypeError(f"{function.__name__}: expected inputs_embeds once, but got it twice")
        kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
    if "past_key_values" in kwargs:
        cache = kwargs.pop("past_key_values")
        kwargs.setdefault("cache", cache)  # as upstream, where both are given


def accepts_renamed_arguments(create: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with those names, too."""

    @functools.wraps(create)
    def understanding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        _rename(create, kwargs)
        return create(*args, **kwargs)

    return understanding


def understands_positions(create: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same, and ``cache_position``: in the fourth place until 5.8, without effect from 5.4."""

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
        _rename(create, kwargs)
        return create(*args, **kwargs)

    return understanding


_ORDER_WITH_POSITIONS = (
    "batch_size",
    "q_length",
    "kv_length",
    "kv_offset",
    "mask_function",
    "attention_mask",
)


def understands_cache_position(mask: Callable[_P, _R]) -> Callable[_P, _R]:
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
                    f"{mask.__name__}: expected arguments after attention_mask by name, "
                    "as cache_position is in the place of q_length"
                )
            named = dict(zip(_ORDER_WITH_POSITIONS, args, strict=False))
            given: dict[str, Any] = {"device": positions.device, **named, **kwargs}
            given |= {"q_length": positions.shape[0], "q_offset": positions[0]}
            return mask(**given)  # type: ignore[call-arg]
        return mask(*args, **kwargs)

    return understanding


def is_paged(cache: Any) -> bool:
    """Whether it is transformers' PagedAttentionCache, of continuous batching."""
    return "PagedAttentionCache" in [kind.__name__ for kind in type(cache).__mro__]


def ask_cache(
    name: str, cache: Any, q_length: int, layer_idx: int | None, device: torch.device
) -> tuple[Any, Any, Any]:
    """(q_offset, kv_length, kv_offset).

    Raises ValueError or TypeError for a cache that reports sizes that can't be.
    """
    if hasattr(cache, "get_query_offset"):
        q_offset = cache.get_query_offset(layer_idx)
        kv_length, kv_offset = cache.get_mask_sizes(q_length, layer_idx)
    else:  # before 5.14; before 5.4, the sizes were computed from the positions of the queries
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
    if type(size) is int and size >= 0:
        return size
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


def rows_of(name: str, position_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
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
