"""Calls of transformers' models, where the create functions do not get what a model is given."""

import functools
import inspect
import sys
from typing import Any, Literal

import torch

from attn_mask._core.scopes import Replacements
from attn_mask._core.tracing import constant_in_graphs
from attn_mask._transformers import packing, writers
from attn_mask._transformers.packing import Block, Documents

_GIVEN: Literal["cu_seq_lens_q"] = "cu_seq_lens_q"


def _watched(call: Any) -> Any:
    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        block, kwargs = _block_of(self, args, kwargs)
        if block is None:
            return call(self, *args, **kwargs)
        with packing.within(block):
            return call(self, *args, **kwargs)

    return __call__


def _attributes() -> list[tuple[Any, str, Any]]:
    modeling = sys.modules.get("transformers.modeling_utils")
    return [] if modeling is None else [(modeling.PreTrainedModel, "__call__", _watched)]


watched = Replacements(_attributes)
"""Replaces PreTrainedModel.__call__ while it is entered."""


def _block_of(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Block | None, dict[str, Any]]:
    """What holds in a call of a model, if that is something else; and the call's arguments."""
    documents, option = packing.current(), writers.state.options.packing
    is_packed = documents is not None and not documents.is_of_call
    if not is_packed and option == "upstream":
        return None, kwargs
    kind: Any = type(model)
    if packing.calls() and not takes_text(kind, kwargs):
        return Block(None, is_call=True, is_other=True), kwargs
    if documents is not None and is_packed:
        return _block_of_packed(documents, model, args, kwargs)
    if option == "cu_seq_lens":
        given = kwargs.get(_GIVEN)
        if given is None:  # a model within the model has none, if it is not given them
            return Block(None, is_call=True), kwargs
        if documents is None or documents.tensor is not given:
            documents = Documents(kind.__name__, _GIVEN, given, is_of_call=True)
        return Block(documents, is_call=True), kwargs
    positions = kwargs.get("position_ids")
    if positions is None and len(args) > 1:
        positions = dict(zip(_parameters(kind), args, strict=False)).get("position_ids")
    return Block(None, is_call=True, position_ids=positions), kwargs


def _block_of_packed(
    documents: Documents, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Block, dict[str, Any]]:
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if (
        "flash" not in attention
        or documents.kind != "cu_seqlens"
        or documents.is_passed_on
        or not _takes_lengths(type(model))
    ):
        return Block(documents, is_call=True), kwargs
    if kwargs.get(_GIVEN) is None:
        first = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        rows = first.shape[0] if isinstance(first, torch.Tensor) else 1
        kwargs = {**kwargs, **documents.cu_seq_lens(rows)}
    return Block(documents.passed_on(), is_call=True), kwargs


# Models that take none of these have tokens of images, sound or queries.
_OF_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states")


_known: dict[Any, tuple[str, ...]] = {}


@constant_in_graphs
def _parameters(kind: Any) -> tuple[str, ...]:
    """The names of a model's forward, without self; "*args" and "**kwargs" with their stars."""
    if kind not in _known:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
        _known[kind] = tuple(_STARS.get(each.kind, "") + each.name for each in parameters)
    return _known[kind]


_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def takes_text(kind: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a class of models takes the tokens of text, by its forward or by these arguments."""
    if any(name in kwargs for name in _OF_TEXT):
        return True
    names = _parameters(kind)
    return any(name in names for name in _OF_TEXT) or any(
        name.startswith("*") and not name.startswith("**") for name in names
    )


def _takes_lengths(kind: Any) -> bool:
    names = _parameters(kind)
    return _GIVEN in names or any(name.startswith("**") for name in names)
