"""transformers' create functions as install() leaves them: its own, except for packed documents."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from attn_mask._core import process, skipping
from attn_mask._core.arguments import check_no_rule
from attn_mask._core.log_once import warn_once
from attn_mask._core.tracing import is_opaque, is_recording
from attn_mask._transformers import packing, writers
from attn_mask._transformers.arguments import cache_and_positions
from attn_mask._transformers.create import LAYERS, Interface, creates_bidirectional, creates_causal
from attn_mask._transformers.documents import count_sequences
from attn_mask._transformers.packing import Documents

RECURRENT = "create_recurrent_attention_mask"


def _interface() -> Interface:
    return writers.state.release.interface


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


_got: dict[tuple[str, str], str] = process.kept("documents of create functions", dict)
"""By type of model and create function: where its last call's documents came from."""


def documents_so_far() -> tuple[str, ...]:
    """What create functions were given to keep documents apart, for status()."""
    return tuple(f"{model}, {name}: {what}" for (model, name), what in sorted(_got.items()))


def keeps_documents_apart(name: str, before: Callable[..., Any]) -> Callable[..., Any]:
    """A create function of the release, which ours replaces in calls with packed documents."""
    packed = _recurrent(before) if name == RECURRENT else _PACKED[name]

    @functools.wraps(before)
    def create(*args: Any, **kwargs: Any) -> Any:
        mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
        check_no_rule(name, "attention_mask", mask)
        documents = packing.current()
        option = writers.state.options.packing
        if documents is not None:
            what = documents.source
        elif option == "upstream":
            return before(*args, **kwargs)
        elif name in LAYERS and option == "position_ids":
            documents, what = _by_positions(name, args, kwargs)
        else:
            what = "nothing"
        config = args[0] if args else kwargs.get("config")
        if not is_recording():
            _got[getattr(type(config), "model_type", ""), name] = what
        if documents is None:
            return before(*args, **kwargs)
        if documents.is_of_call:
            # The model's flash attention goes by the position_ids or cu_seq_lens_q that it has.
            if "flash" in (getattr(config, "_attn_implementation", None) or ""):
                return before(*args, **kwargs)
            with packing.within(packing.Block(documents)):
                return packed(*args, **kwargs)
        return packed(*args, **kwargs)

    return create


def _by_positions(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Documents | None, str]:
    """Of a call whose position_ids start again, or whose model's do; None for others.

    And where they came from.
    """
    cache, positions = cache_and_positions(args, kwargs)
    what = "position_ids of its calls"
    if positions is None:
        positions, what = _of_model(name, cache, args, kwargs), "position_ids of the model's calls"
    if positions is None:
        return None, "nothing"
    return (_if_packed(name, positions, cache) if positions.dim() == 2 else None), what


def _of_model(name: str, cache: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The position_ids of the outermost model that was given some for as many tokens."""
    embeds = next((kwargs[key] for key in _EMBEDS if key in kwargs), args[1] if args[1:] else None)
    calls = packing.calls()
    if (
        not isinstance(embeds, torch.Tensor)
        or kwargs.get("encoder_hidden_states") is not None
        or (not LAYERS[name].is_causal and isinstance(args[3] if args[3:] else None, torch.Tensor))
        or any(call.is_other for call in calls)
    ):
        return None
    batch_size, length = embeds.shape[:2]
    given = [call.position_ids for call in calls if call.position_ids is not None]
    for positions in given:
        if tuple(positions.shape) in ((1, length), (batch_size, length)):
            return positions
    if not given and cache is None and not is_recording() and length > 1:
        warn_once(
            "no position_ids",
            "attn_mask: under install(packing='position_ids'), %s of %s was called without "
            "position_ids, and so was the model: documents packed into one row see each other. "
            "Call the model with position_ids that start again in each, or within "
            "attn_mask.packed(document_ids=...)",
            name,
            getattr(args[0] if args else kwargs.get("config"), "model_type", "a model"),
        )
    return None


_EMBEDS = ("inputs_embeds", "input_embeds")


def _if_packed(name: str, positions: torch.Tensor, cache: Any) -> Documents | None:
    policy = skipping.current()
    if policy.packing == "none":
        return None
    documents = Documents(name, "position_ids", positions, is_of_call=True)
    if policy.name == "shapes" or is_opaque(positions) or positions.is_meta:
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
        warn_once(
            "states of packed documents",
            "attn_mask: the model has layers with a state (linear attention, state spaces, "
            "convolutions), which no mask keeps from one packed document to the next. Give the "
            "model what its layers reset their states by, as cu_seq_lens_q or seq_idx, or run the "
            "documents one by one",
        )
        return before(*args, **kwargs)

    return create
