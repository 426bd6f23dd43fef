"""attn_mask.explain_model: what makes the masks of a model's layers."""

import ast
import contextlib
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attn_mask._transformers import legacy, packing, writers
from attn_mask._transformers.attention_interface import is_eager_only
from attn_mask._transformers.install import Replacement, is_ours, replacement
from attn_mask._transformers.model_calls import takes_text

__all__ = ["LayerMasks", "ModelMasks", "explain_model"]

Maker = Literal["attn_mask", "transformers", "another", "none"]

_MASKING = "transformers.masking_utils"
_LEGACY = "transformers.modeling_attn_mask_utils"
# Layers that attend to nothing by a dense mask.
_RECURRENT = ("conv", "linear_attention", "mamba", "recurrent")


@dataclass(frozen=True)
class LayerMasks:
    """The masks of the layers of one type.

    Attributes:
        config: where the layers are described, "" or as "text_config".
        layer_type: as in ``config.layer_types``.
        layers: how many there are, or None where the config does not say.
        attention: the implementation, as "sdpa".
        maker: whose functions write the mask: "attn_mask", "transformers", "another" (the
            model's own code, or what others registered), or "none".
        why: how, and why it is that one.
        documents: what keeps documents apart that are packed into rows, in blocks of packed() and
            under install(packing=...); "" elsewhere.
    """

    config: str
    layer_type: str
    layers: int | None
    attention: str
    maker: Maker
    why: str
    documents: str = ""

    def __str__(self) -> str:
        of = f"{self.config}: " if self.config else ""
        many = "" if self.layers is None else f" x {self.layers}"
        documents = f"; packed documents: {self.documents}" if self.documents else ""
        return f"{of}{self.layer_type}{many}, {self.attention}: {self.maker}, {self.why}{documents}"


@dataclass(frozen=True)
class ModelMasks:
    """What ``attn_mask.explain_model()`` gives; str() of it is a text to print.

    Attributes:
        model: the name of its class.
        transformers: the release under which install() is on, or None.
        layers: what makes the masks, for each type of layer.
    """

    model: str
    transformers: str | None
    layers: tuple[LayerMasks, ...]

    def __str__(self) -> str:
        on = (
            f"installed, transformers {self.transformers}" if self.transformers else "not installed"
        )
        lines = [f"{self.model}, attn_mask.install: {on}"]
        return "\n".join([*lines, *(f"  {layers}" for layers in self.layers)])

    __repr__ = __str__


def explain_model(model: torch.nn.Module) -> ModelMasks:
    """What makes the masks of a transformers model as things are now, for each type of layer.

    It goes by the config, by the mask functions that are registered for its attention, and by what
    the files that define the model import; nothing is run. Call it again after install(), or after
    the model's attention was changed.

    Args:
        model: a module with a ``config`` of transformers; nested ones (``text_config``) are looked
            at one by one.

    Raises TypeError for anything else.

    >>> import transformers, attn_mask
    >>> config = transformers.LlamaConfig(
    ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=1, vocab_size=4,
    ...     intermediate_size=8,
    ... )
    >>> model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    >>> with attn_mask.installed():
    ...     attn_mask.explain_model(model).layers[0].maker
    'attn_mask'
    """
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(
        getattr(config, "model_type", None), str
    ):
        what = "one without such a config" if isinstance(model, torch.nn.Module) else "no module"
        raise TypeError(
            "explain_model: expected model to be a torch.nn.Module with a config of transformers, "
            f"but got {what}, {type(model).__name__}"
        )
    found = replacement()
    layers = []
    for name, part in _parts(config):
        modules = [m for m in model.modules() if type(getattr(m, "config", None)) is type(part)]
        files = _files(modules)
        is_text = name == "" or _takes_text(modules)
        for layer_type, number in _layer_types(part):
            made = _maker(files, part, layer_type, found)
            documents = _documents(files, layer_type, made[0], is_text)
            layers.append(LayerMasks(name, layer_type, number, *made, documents))
    return ModelMasks(type(model).__name__, found and found.transformers, tuple(layers))


def _parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The configs that describe layers, by name: those that hold no others."""
    nested = {
        name: value
        for name, value in vars(config).items()
        if isinstance(getattr(value, "model_type", None), str)
    }
    if not nested:
        yield path, config
    for name, value in nested.items():
        yield from _parts(value, f"{path}.{name}" if path else name)


def _layer_types(config: Any) -> list[tuple[str, int | None]]:
    """As create_masks_for_generate of transformers reads a config."""
    if types := getattr(config, "layer_types", None):
        return list(Counter(map(str, types)).items())
    number = getattr(config, "num_hidden_layers", None)
    if getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    ):
        return [("sliding_attention", number)]
    if getattr(config, "attention_chunk_size", None) is not None:
        return [("chunked_attention", number)]
    return [("full_attention", number)]


def _files(modules: list[torch.nn.Module]) -> list[dict[str, Any]]:
    """The names in the files that define the modules of a config."""
    names = sorted({type(module).__module__ for module in modules})
    return [vars(sys.modules[name]) for name in names if name in sys.modules]


def _takes_text(modules: list[torch.nn.Module]) -> bool:
    """Whether the model within the model, of these modules, has the row's tokens."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    models = (type(module) for module in modules if isinstance(module, base))
    return next((takes_text(model, {}) for model in models), True)


def _maker(
    files: list[dict[str, Any]], config: Any, layer_type: str, found: Replacement | None
) -> tuple[str, Maker, str]:
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if layer_type in _RECURRENT:
        return attention, "none", "layers of this type take the padding mask at most"
    if _call_creates(files):
        return (attention, *_of_interface(attention, config, layer_type, found))
    of_legacy = [names[name] for names in files for name in legacy.__all__ if name in names]
    if any(map(is_ours, of_legacy)):
        return attention, "attn_mask", f"by {_LEGACY}, which is ours"
    if any(getattr(value, "__module__", None) == _LEGACY for value in of_legacy):
        return attention, "transformers", f"by {_LEGACY}, {_why_not(_LEGACY, found)}"
    return attention, "another", "the model's own code makes masks, if it takes any"


def _documents(files: list[dict[str, Any]], layer_type: str, attention: str, is_text: bool) -> str:
    """What keeps packed documents apart, by what is in force and by how the model's file calls."""
    block, option = packing.current(), writers.state.options.packing
    if block is None and option == "upstream":
        return ""
    if not is_text:
        return "none, for its tokens are no text"
    if layer_type in _RECURRENT:
        return "mixed by the state, which no mask resets"
    registered = importlib.import_module(_MASKING).ALL_MASK_ATTENTION_FUNCTIONS
    if attention not in registered or not _call_creates(files):
        return "nothing keeps them apart"
    if "flash" in attention:
        return "by flash attention, where it is given position_ids or cu_seq_lens_q"
    if block is not None:
        return f"by {block.source}"
    if option == "cu_seq_lens":
        return "by the cu_seq_lens_q that the model is called with"
    if _passes_position_ids(files):
        return "by the position_ids of its create call"
    return "by the position_ids that the model is called with"


def _passes_position_ids(files: list[dict[str, Any]]) -> bool:
    """Whether create calls are given some: by name, or in a dict that has the config as well."""
    for names in files:
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            text = inspect.getsource(sys.modules[names["__name__"]])
            for node in ast.walk(ast.parse(text)):
                given: set[Any] = set()
                if isinstance(node, ast.Call) and "mask" in ast.unparse(node.func):
                    given = {"config", *(keyword.arg for keyword in node.keywords)}
                elif isinstance(node, ast.Dict):
                    given = {getattr(key, "value", None) for key in node.keys}
                if {"config", "position_ids"} <= given:
                    return True
    return False


def _call_creates(files: list[dict[str, Any]]) -> bool:
    """Whether they hold create functions of transformers."""
    return any(
        name.startswith("create_") and getattr(value, "__module__", None) == _MASKING
        for names in files
        for value in names.values()
        if isinstance(name := getattr(value, "__name__", None), str)
    )


def _of_interface(
    attention: str, config: Any, layer_type: str, found: Replacement | None
) -> tuple[Maker, str]:
    """What is registered for the attention, as the create functions look it up."""
    upstream = importlib.import_module(_MASKING)
    registered = upstream.ALL_MASK_ATTENTION_FUNCTIONS
    if attention not in registered:
        return "none", f"no mask function is registered for {attention!r}: masks go on as given"
    function = registered[attention]
    name = getattr(function, "__name__", type(function).__name__)
    if not is_ours(function) and getattr(function, "__module__", None) != _MASKING:
        return "another", f"{name} is registered for {attention!r}"
    if name == "flash_attention_mask":
        return "none", "flash attention takes the padding, it needs no mask"
    if name == "flex_attention_mask":
        if is_ours(getattr(upstream, "create_block_mask", None)):
            return "attn_mask", "a BlockMask by create_block_mask"
        return "transformers", f"a BlockMask by torch, {_why_not('create_block_mask', found)}"
    if not is_ours(function):
        return "transformers", f"a dense mask by {name}, {_why_not(name, found)}"
    if name == "rule_mask" and is_eager_only(type(config)):
        return "attn_mask", "an additive mask: these models have eager attention alone"
    if name == "rule_mask":
        return "attn_mask", "a rule, by which the layers attend, instead of a mask"
    why = f"a dense mask by {name}, or none where attention needs none"
    # create_causal_mask calls causal_mask_function.
    create = getattr(upstream, "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING", {}).get(layer_type)
    factory = f"{getattr(create, '__name__', '').removeprefix('create_')}_function"
    describes = getattr(upstream, factory, None)
    if describes is not None and not is_ours(describes):
        why += f"; it calls {factory}, {_why_not(factory, found)}"
    return "attn_mask", why


def _why_not(name: str, found: Replacement | None) -> str:
    if found is None:
        return "for attn_mask.install() is off"
    reasons = [text for text in found.stays if name in text]
    return "; ".join(reasons) or "which install() leaves as it is"
