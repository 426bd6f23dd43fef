"""transformers' create functions as install() leaves them: its own, except for packed documents."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from attn_mask import _skipping
from attn_mask._checks import check_no_rule
from attn_mask._named_once import name_once
from attn_mask._tracing import is_opaque
from attn_mask._upstream import masks, packing
from attn_mask._upstream.arguments import cache_and_positions
from attn_mask._upstream.create import LAYERS, Interface, creates_bidirectional, creates_causal
from attn_mask._upstream.documents import count_sequences
from attn_mask._upstream.packing import Documents

RECURRENT = "create_recurrent_attention_mask"


def _interface() -> Interface:
    return masks.state.release.interface


_bidirectional = {
    name: creates_bidirectional(layers, _interface)
    for name, layers in LAYERS.items()
    if not layers.is_causal
}
_OF_CAUSAL = {
    "create_causal_mask": "create_bidirectional_mask",
    "create_sliding_window_causal_mask": "create_bidirectional_sliding_window_mask",
}
_PACKED: dict[str, Callable[..., Any]] = _bidirectional | {
    name: creates_causal(layers, _interface, _bidirectional.get(_OF_CAUSAL.get(name, "")))
    for name, layers in LAYERS.items()
    if layers.is_causal
}

NAMES = (*_PACKED, RECURRENT)
"""Of the functions that are replaced."""


def keeps_documents_apart(name: str, before: Callable[..., Any]) -> Callable[..., Any]:
    """A create function of the release, which ours replaces in calls with packed documents."""
    packed = _recurrent(before) if name == RECURRENT else _PACKED[name]
    is_causal = name in LAYERS and LAYERS[name].is_causal

    @functools.wraps(before)
    def create(*args: Any, **kwargs: Any) -> Any:
        mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
        check_no_rule(name, "attention_mask", mask)
        documents = packing.current()
        if documents is None and is_causal and masks.state.options.packing == "position_ids":
            documents = _by_positions(name, args, kwargs)
        if documents is None:
            return before(*args, **kwargs)
        if documents.is_of_call:
            config = args[0] if args else kwargs.get("config")
            # The model's flash attention goes by the position_ids or cu_seq_lens_q that it has.
            if "flash" in (getattr(config, "_attn_implementation", None) or ""):
                return before(*args, **kwargs)
            with packing.block(documents):
                return packed(*args, **kwargs)
        return packed(*args, **kwargs)

    return create


def _by_positions(name: str, args: Any, kwargs: dict[str, Any]) -> Documents | None:
    """Of a call whose position_ids start again; None for others."""
    cache, positions = cache_and_positions(args, kwargs)
    policy = _skipping.current()
    if positions is None or positions.dim() != 2 or policy.packing == "none":
        return None
    documents = Documents(name, "position_ids", positions, is_of_call=True)
    if policy.name == "shapes" or is_opaque(positions):
        return documents
    if positions.device.type != "cpu" and positions.shape[1] == 1:
        return documents  # a step of decoding is not to wait for its device
    begins = 0 if cache is None else cache.get_seq_length(LAYERS[name].first(cache))
    if positions.shape[1] == 1:  # read at once, since each step does it
        return documents if min(positions[:, 0].tolist()) < int(begins) else None
    if isinstance(begins, torch.Tensor):
        begins = begins.to(positions.device)
    is_packed = count_sequences(positions)[:, -1].any() | (positions[:, 0] < begins).any()
    return documents if bool(is_packed) else None


def _recurrent(before: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        name_once(
            "states of packed documents",
            "attn_mask: the model has layers with a state (linear attention, state spaces, "
            "convolutions), which no mask keeps from one packed document to the next. Give the "
            "model what its layers reset their states by, as cu_seq_lens_q or seq_idx, or run the "
            "documents one by one",
        )
        return before(*args, **kwargs)

    return create
