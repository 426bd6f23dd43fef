"""Attention by rule under transformers: attn_implementation="attn_mask".

transformers looks two functions up under that name: one makes the mask of a kind of layers, and
the other is every layer's attention. The mask here is a RuleMask, the rule itself, with where its
queries and keys stand; it becomes dense only for what attention by rule does not do.
"""

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch

from attn_mask._core import mask_rules, skipping
from attn_mask._core.arguments import check_no_rule
from attn_mask._core.attend import scaled_dot_product_attention
from attn_mask._core.dense import additive
from attn_mask._core.events import count, timed
from attn_mask._core.log_once import warn_once
from attn_mask._core.mask_rules import Coverage, MaskFunction
from attn_mask._core.skipping import hides_nothing
from attn_mask._core.tracing import is_opaque, is_recording
from attn_mask._core.write import BOOLEAN, Calls, Geometry, write_mask
from attn_mask._transformers import packing
from attn_mask._transformers.arguments import understands_cache_position
from attn_mask._transformers.documents import count_sequences
from attn_mask._transformers.mask_functions import prepare_padding_mask
from attn_mask._transformers.rule_mask import RuleMask, RuleTensor, make_rule_mask
from attn_mask._transformers.writers import eager_mask, is_skipped, state

NAME = "attn_mask"

_CAUSAL = mask_rules.causal()

# Arguments of attention that change scores or probabilities, as models of transformers name them.
_SCORES = ("position_bias", "softcap", "s_aux", "sinks", "head_mask", "layer_head_mask")
# Which keys are left to a query, where that is no mask: kernels of their own take them.
_SELECTED = ("indices", "block_indices")


# By the code of a mask function that transformers' factories make: our factory.
_factories: dict[CodeType, Any] = {}


def recognise(factory: FunctionType, ours: Any) -> None:
    """Makes _rule_of know the mask functions that a factory of transformers makes."""
    if isinstance(ours, MaskFunction):
        _factories[factory.__code__] = ours
    made = factory.__code__.co_consts
    _factories.update({code: ours for code in made if isinstance(code, CodeType)})


def _rule_of(function: Any) -> MaskFunction:
    """The rule of a mask function, of transformers' own closures as well; else a callable's."""
    if isinstance(function, MaskFunction):
        return function
    if type(function) is FunctionType and not is_recording():
        factory = _factories.get(function.__code__)
        if isinstance(factory, MaskFunction):
            return factory
        if factory is not None:
            closed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            values = {name: cell.cell_contents for name, cell in closed}
            if "mask_functions" in values:
                made = factory(*map(_rule_of, values["mask_functions"]))
            else:
                if "mask_function" in values:
                    values["mask_function"] = _rule_of(values["mask_function"])
                made = factory(**values)
            return made  # type: ignore[no-any-return]
    return mask_rules.rule_of("rule_mask", "mask_function", function)


def _by_distance(rule: MaskFunction) -> MaskFunction:
    """A rule of packed documents without their positions, where it depends on distances alone.

    transformers evaluates the rule of a row at position_ids, and finds documents where these do not
    count on: within a document, two of them are as far apart as their columns.
    """
    ids = [part.ids for part in rule.parts if isinstance(part, mask_rules.Documents)]
    if rule.factory != "intersection" or not ids or skipping.current().name == "shapes":
        return rule

    def changed(part: MaskFunction) -> MaskFunction:
        if part.factory == "union":
            return part.with_parts(changed)
        is_same = (
            isinstance(part, mask_rules.Reindex)
            and _is_distance(part.rule)
            and not is_opaque(part.positions)
            and torch.equal(count_sequences(part.positions), ids[0])
        )
        return part.parts[0] if is_same else part

    return mask_rules.intersection(*map(changed, rule.parts))


def _is_distance(rule: MaskFunction) -> bool:
    if rule.factory in ("intersection", "union"):
        return len(rule.parts) > 0 and all(map(_is_distance, rule.parts))
    return isinstance(rule, mask_rules.Window) or rule == _CAUSAL


def _number(offset: Any, reads: bool) -> int | None:
    """An offset as a number, where its value may be read."""
    if not isinstance(offset, torch.Tensor):
        return offset  # type: ignore[no-any-return]
    forbidden = not reads or is_opaque(offset) or skipping.current().name == "shapes"
    if forbidden or offset.numel() != 1:
        return None
    return int(offset)


@understands_cache_position
@timed
def rule_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RuleMask | torch.Tensor | None:
    """What layers with attn_implementation="attn_mask" get as a mask; arguments as of sdpa_mask.

    A RuleMask. For one query at the end of the keys, and where values that it needs can't be read,
    what sdpa has: a boolean mask, or None where nothing is masked (while tracing, also for
    causality alone).
    """
    packing.check_no_documents()
    check_no_rule("rule_mask", "attention_mask", attention_mask)
    config = kwargs.get("config")
    if config is not None and is_eager_only(type(config)):
        return eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            _rule_of(mask_function),
            attention_mask,
            dtype=kwargs.get("dtype", torch.float32),
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=state.release.by_vmap if use_vmap is None else use_vmap,
            device=device,
            local_size=local_size,
        )
    is_decoding = type(q_length) is int and q_length == 1
    # Of None, a layer can't tell where its queries stand, once a model has sliced them.
    causal = allow_is_causal_skip and (is_decoding or is_recording())
    if (causal or allow_is_bidirectional_skip) and is_skipped(
        "rule_mask",
        state.release,
        Geometry(batch_size, q_length, q_offset, kv_length, kv_offset),
        attention_mask,
        local_size,
        causal=causal,
        bidirectional=allow_is_bidirectional_skip,
    ):
        count("masks skipped")
        return None
    rule = _rule_of(mask_function)
    sizes = batch_size, q_length, kv_length
    of_device = torch.device(device)
    # A step of decoding waits for no device.
    reads = not is_decoding or of_device.type == "cpu"
    first, first_key = (_number(offset, reads) for offset in (q_offset, kv_offset))
    if reads and rule.is_native and first is not None and first_key is not None:
        end = first_key + kv_length
        padded = rule
        if attention_mask is not None:
            padding = prepare_padding_mask(attention_mask, kv_length, first_key)
            if not hides_nothing(padding, kv_length, first_key):
                padded = rule & mask_rules.Padding(padding, mask_rules.UPSTREAM_PADDING)
        if not is_decoding or first + 1 < end:
            count("rules for attention")
            return make_rule_mask(_by_distance(padded), sizes, first, first_key, of_device)
        shown = padded.coverage(first, first + 1, first_key, end)
        if allow_is_causal_skip and shown is Coverage.ALL:
            count("masks skipped")
            return None
    count("sdpa_mask")
    return write_mask(
        "rule_mask",
        rule,
        Geometry(batch_size, q_length, q_offset, kv_length, kv_offset),
        attention_mask,
        device,
        BOOLEAN,
        Calls(by_vmap=state.release.by_vmap if use_vmap is None else use_vmap),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_eager_only(config: type) -> bool:
    """Whether the models of a configuration have eager attention alone.

    transformers gives those, too, any attention that is registered. But what their code makes of
    a mask is made of additive ones, and without a mask they attend to all keys.
    """
    found = _eager_only.get(config)
    if found is None:
        models = [sys.modules["transformers.modeling_utils"].PreTrainedModel]
        for model in models:
            models += model.__subclasses__()
        of_kinds = ([m for m in models if m.config_class is kind] for kind in config.__mro__)
        of_config = next(filter(None, of_kinds), [])
        found = len(of_config) > 0 and not any(
            getattr(model, supports, False) for model in of_config for supports in _OTHERS
        )
        _eager_only[config] = found
    return found


_OTHERS = "_supports_sdpa", "_supports_flex_attn", "_supports_flash_attn", "_supports_flash_attn_2"

_eager_only: dict[type, bool] = {}


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention of a layer with attn_implementation="attn_mask".

    Attention by the rule of a RuleMask, without a dense mask; without one, what transformers does
    for "sdpa". What changes scores, dropout and the weights that output_attentions asks for make
    the mask dense, for sdpa where transformers' takes the argument, else for the eager attention of
    the model's own file.

    Args:
        query: [b, heads, q, d].
        key, value: [b, heads that divide those, kv, d].
        attention_mask: a RuleMask, a tensor as of "sdpa", or None.

    Returns (out [b, q, heads, d], weights or None).

    Raises NotImplementedError for what none of them does, ValueError for a RuleMask of other sizes,
    TypeError for masks of other implementations.
    """
    for name in _SELECTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"attn_mask attention: expected no {name}, which select keys for each query of "
                f"{type(module).__name__} without a mask: take attn_implementation='sdpa'"
            )
    if hasattr(attention_mask, "kv_num_blocks"):
        raise TypeError(
            "attn_mask attention: expected attention_mask to be a tensor, None, or the mask that "
            "transformers makes for this implementation, but got a BlockMask"
        )
    check_no_rule("attn_mask attention", "attention_mask", attention_mask)
    changes = [name for name in _SCORES if kwargs.get(name) is not None]
    changes += ["output_attentions"] if kwargs.get("output_attentions") else []
    sdpa = _sdpa_attention()
    if changes and not set(changes) <= set(inspect.signature(sdpa).parameters):
        eager = _eager_attention(module, changes)
        mask = _additive(attention_mask, module, query, key, is_causal)
        kwargs |= {"dropout": dropout, "scaling": scaling}
        return eager(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    if attention_mask is None and is_eager_only(type(getattr(module, "config", None))):
        is_causal = False
    if isinstance(attention_mask, RuleTensor):
        mask = _fitting(attention_mask, query, key)
        if not changes and dropout == 0.0:
            _name_what_the_mask_lacks(mask, kwargs)
            out = scaled_dot_product_attention(
                query,
                key,
                value,
                mask.rule,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
                q_offset=mask.q_offset,
                kv_offset=mask.kv_offset,
            )
            return out.transpose(1, 2).contiguous(), None
        _name_dense("transformers' sdpa", changes or ["dropout"])
        attention_mask = mask.as_boolean()
    return sdpa(  # type: ignore[no-any-return]
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _sdpa_attention() -> Callable[..., Any]:
    integration = sys.modules["transformers.integrations.sdpa_attention"]
    return integration.sdpa_attention_forward  # type: ignore[no-any-return]


def _name_dense(by: str, changes: list[str]) -> None:
    what = " and ".join(changes)
    warn_once(
        f"dense attention: {what}",
        "attn_mask: for %s, attention takes a dense mask and is %s, in time and memory of "
        "queries x keys",
        what,
        by,
    )


def _name_what_the_mask_lacks(mask: RuleTensor, kwargs: dict[str, Any]) -> None:
    """Flash attention takes windows and documents from arguments; sdpa has those of its mask."""
    size = kwargs.get("sliding_window")
    if size is not None and mask.shape[3] > size:
        _name_lack(mask, f"sliding_window={size}", lambda rule: _is_window(rule, size))
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None and borders.numel() > 2:
        _name_lack(mask, "cu_seq_lens_q", lambda rule: isinstance(rule, mask_rules.Documents))


def _name_lack(mask: RuleTensor, argument: str, matches: Callable[[Any], bool]) -> None:
    if not any(map(matches, mask.rule.walk())):
        warn_once(
            f"lacks {argument}",
            "attn_mask: a layer is given %s, which the mask that its model makes does not have: "
            "the mask holds, as for 'sdpa'",
            argument,
        )


def _is_window(rule: Any, size: int) -> bool:
    return isinstance(rule, mask_rules.Window) and rule.left is not None and rule.left + 1 == size


def _fitting(mask: RuleTensor, query: torch.Tensor, key: torch.Tensor) -> RuleTensor:
    """The mask for the keys there are: until 5.0, a mask may be longer."""
    mask.check_unwritten()
    sizes = query.shape[0], query.shape[2], key.shape[2]
    fits = mask.shape[0] in (1, sizes[0]) and mask.shape[2] == sizes[1]
    if not fits or mask.shape[3] < sizes[2]:
        raise ValueError(
            f"attn_mask attention: expected a mask for {list(sizes)}, the batch size, queries and "
            f"keys, but got one of {[mask.shape[0], *mask.shape[2:]]}"
        )
    if mask.shape[3] > sizes[2]:
        return mask[:, :, :, : sizes[2]]  # type: ignore[return-value]
    return mask


def _eager_attention(module: torch.nn.Module, changes: list[str]) -> Callable[..., Any]:
    """The attention that the model's own file writes out, which defines what the changes mean."""
    files = (vars(sys.modules.get(kind.__module__, torch)) for kind in type(module).__mro__)
    eager = next((names[_EAGER] for names in files if _EAGER in names), None)
    if eager is None:
        raise NotImplementedError(
            f"attn_mask attention: expected no {' and '.join(changes)}, or a model with an "
            f"{_EAGER}, but the file of {type(module).__name__} has none"
        )
    _name_dense("the model's eager attention", changes)
    return eager  # type: ignore[no-any-return]


def _additive(
    mask: Any,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool | None,
) -> Any:
    """The mask as eager attention takes it."""
    lengths = query.shape[2], key.shape[2]
    if isinstance(mask, RuleTensor):
        return _fitting(mask, query, key).as_additive(query.dtype)
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        rule = mask_rules.bits(mask)
    elif mask is None and lengths[0] > 1:
        # As sdpa reads a mask of None.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal:
            return None
        rule = _CAUSAL
    else:
        return mask
    return additive(rule, query.shape[0], *lengths, device=query.device, dtype=query.dtype)


_EAGER = "eager_attention_forward"
