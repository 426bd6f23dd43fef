"""Calls of transformers' models, where the create functions do not get what a model is given."""

import functools
import inspect
import sys
import threading
from typing import Any, Literal

import torch

from attn_mask._upstream import masks, packing
from attn_mask._upstream.packing import Documents

_GIVEN: Literal["cu_seq_lens_q"] = "cu_seq_lens_q"

_lock = threading.Lock()
_watches = 0
_replaced: tuple[Any, Any, Any] | None = None
_ABSENT: Any = object()


def watch() -> None:
    """Replaces PreTrainedModel.__call__, until unwatch() was called as often."""
    global _watches, _replaced
    with _lock:
        _watches += 1
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is None or _replaced is not None:
            return
        owner = modeling.PreTrainedModel
        before = vars(owner).get("__call__", _ABSENT)
        now = _watched(owner.__call__)
        owner.__call__ = now
        _replaced = owner, before, now


def unwatch() -> None:
    global _watches, _replaced
    with _lock:
        _watches -= 1
        if _watches or _replaced is None:
            return
        owner, before, now = _replaced
        _replaced = None
        if vars(owner).get("__call__") is not now:
            return  # someone else has replaced it since
        if before is _ABSENT:
            del owner.__call__
        else:
            owner.__call__ = before


def _watched(call: Any) -> Any:
    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        documents = packing.current()
        given = kwargs.get(_GIVEN)
        if documents is not None and not documents.is_of_call:
            return _call_packed(call, documents, self, args, kwargs)
        if masks.state.options.packing != "cu_seq_lens" or (given is None and documents is None):
            return call(self, *args, **kwargs)
        # A model within the model is given its own, or has none.
        if given is not None and (documents is None or documents.tensor is not given):
            documents = Documents(type(self).__name__, _GIVEN, given, is_of_call=True)
        with packing.block(documents if given is not None else None):
            return call(self, *args, **kwargs)

    return __call__


def _call_packed(
    call: Any, documents: Documents, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    kind: Any = type(model)
    if (
        "flash" not in attention
        or documents.kind != "cu_seqlens"
        or documents.is_passed_on
        or not _takes_lengths(kind)
    ):
        return call(model, *args, **kwargs)
    if kwargs.get(_GIVEN) is None:
        first = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        rows = first.shape[0] if isinstance(first, torch.Tensor) else 1
        kwargs = {**kwargs, **documents.cu_seq_lens(rows)}
    with packing.block(documents.passed_on()):
        return call(model, *args, **kwargs)


@functools.cache
def _takes_lengths(kind: Any) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    return _GIVEN in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
