"""The functions that write masks, of the mirror and of install(); and all else that install() puts
into transformers.masking_utils.

What install() puts there stands at the top of this module, so that it can be pickled; what depends
on the release is looked up when it is called.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, cast, overload

import torch

from attn_mask._core import blocks, mask_rules, process, skipping
from attn_mask._core.arguments import check_flag, check_no_rule, checked_masked_value
from attn_mask._core.events import counts, listeners, timed, told
from attn_mask._core.log_once import warn_once
from attn_mask._core.skipping import OWN_DECISIONS, Decisions
from attn_mask._core.tracing import is_opaque, is_recording
from attn_mask._core.write import (
    BOOLEAN,
    Axis,
    Calls,
    Geometry,
    MaskFormat,
    check_padding,
    write_mask,
)
from attn_mask._transformers import documents, packing
from attn_mask._transformers.arguments import understands_cache_position
from attn_mask._transformers.create import LAYERS, Interface, creates
from attn_mask._transformers.mask_functions import warn_of_lost_documents
from attn_mask._transformers.packing import Documents

_P = ParamSpec("_P")

_CAUSAL = mask_rules.causal()
_AT_ONCE, _BY_VMAP = Calls(), Calls(by_vmap=True)


class Options(NamedTuple):
    """See install()."""

    masked_value: float | None = None
    unmask_unattended: bool = False
    aten_only: bool = False
    packing: str = "upstream"


_PACKING = ("upstream", "position_ids", "cu_seq_lens")


def checked_options(
    name: str, masked_value: Any, unmask_unattended: Any, aten_only: Any, packed_by: Any
) -> Options:
    """The options as they were given to a function.

    Raises TypeError or ValueError for what can be none.
    """
    for argument, flag in (("unmask_unattended", unmask_unattended), ("aten_only", aten_only)):
        check_flag(name, argument, flag)
    masked_value = checked_masked_value(name, masked_value)
    if packed_by not in _PACKING:
        raise ValueError(
            f"{name}: expected packing to be one of {', '.join(map(repr, _PACKING))}, "
            f"but got {packed_by!r}"
        )
    return Options(masked_value, unmask_unattended, aten_only, packed_by)


class Release(NamedTuple):
    """What depends on the release."""

    decisions: Decisions = OWN_DECISIONS
    by_vmap: bool = False
    """Whether mask functions are evaluated at one element at a time by default."""
    find_packed_sequence_indices: Callable[..., Any] = documents.find_packed_sequence_indices
    preprocess: Any = None
    """Its _preprocess_mask_arguments; None where that is not replaced."""
    interface: Interface = Interface(None, {})
    """Its mask functions of attention implementations."""


_MIRROR = Release()


class _State:
    def __init__(self) -> None:
        self.release = Release()
        self.options = Options()


state = process.kept("upstream_masks", _State)

of_mirror: dict[str, Callable[..., Any]] = {}
"""The mirror's mask functions of attention implementations, which masking_utils registers."""


# Masks of sdpa and eager attention


def write_sdpa_mask(
    release: Release,
    /,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    *,
    unmask_unattended: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The boolean mask [b, 1, q, kv] for scaled_dot_product_attention.

    Args:
        mask_function: which keys a query attends to. The result of a callable of the user's must
            not depend on other elements: large masks are evaluated some rows at a time.
        attention_mask: which keys are not padding, bool [b, n]; those after its end are.
        local_size: the window or chunk of the mask function, if any; matters to skipping.
        allow_is_causal_skip: whether to return None where ``is_causal`` means the same.
        allow_is_bidirectional_skip: whether to return None where nothing is masked.
        use_vmap: whether callables of the user's are evaluated one element at a time, under
            torch.vmap, rather than with index tensors that broadcast.
        unmask_unattended: whether rows in which no key is visible are True throughout; beyond
            upstream.

    Raises ValueError for tensors that are too short or of a wrong rank, and for a callable that
    returns a wrong shape; TypeError for one that does not return booleans.

    Mirrors ``transformers.masking_utils.sdpa_mask``.
    """
    if unmask_unattended is not False:
        check_flag("sdpa_mask", "unmask_unattended", unmask_unattended)
    geometry = Geometry(batch_size, q_length, q_offset, kv_length, kv_offset)
    if (allow_is_causal_skip or allow_is_bidirectional_skip) and is_skipped(
        "sdpa_mask",
        release,
        geometry,
        attention_mask,
        local_size,
        causal=allow_is_causal_skip,
        bidirectional=allow_is_bidirectional_skip,
    ):
        return None
    return write_mask(
        "sdpa_mask",
        mask_function,
        geometry,
        attention_mask,
        device,
        MaskFormat(unmask_unattended=True) if unmask_unattended else BOOLEAN,
        _BY_VMAP if use_vmap else _AT_ONCE,
    )


def write_eager_mask(
    release: Release,
    /,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    *,
    unmask_unattended: bool = False,
    masked_value: float | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The additive mask [b, 1, q, kv] for attention that is written out.

    Arguments and errors as for sdpa_mask (rows that are unmasked are 0); TypeError for a dtype
    without additive masks. ``masked_value``, beyond upstream: see ``attn_mask.additive``.

    Mirrors ``transformers.masking_utils.eager_mask``.
    """
    if unmask_unattended is not False:
        check_flag("eager_mask", "unmask_unattended", unmask_unattended)
    if masked_value is not None:
        masked_value = checked_masked_value("eager_mask", masked_value)
    geometry = Geometry(batch_size, q_length, q_offset, kv_length, kv_offset)
    if allow_is_bidirectional_skip and is_skipped(
        "eager_mask",
        release,
        geometry,
        attention_mask,
        kwargs.get("local_size"),
        causal=False,
        bidirectional=allow_is_bidirectional_skip,
    ):
        return None
    return write_mask(
        "eager_mask",
        mask_function,
        geometry,
        attention_mask,
        device,
        MaskFormat(dtype, None, unmask_unattended, masked_value),
        _BY_VMAP if use_vmap else _AT_ONCE,
    )


def is_skipped(
    name: str,
    release: Release,
    geometry: Geometry,
    attention_mask: torch.Tensor | None,
    local_size: int | None,
    *,
    causal: bool,
    bidirectional: bool,
) -> bool:
    """Whether there is no mask: ``causal``, ``bidirectional``: where there need not be one.

    That is where ``is_causal`` of scaled_dot_product_attention replaces it, and where nothing is
    masked. TypeError for a rule in place of the padding mask.
    """
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        check_no_rule(name, "attention_mask", attention_mask)
    if release is _MIRROR:
        check_padding(name, attention_mask)
    policy = skipping.current()
    by = release.decisions if policy.name == "upstream" else policy
    if causal and by.skips_causal(attention_mask, geometry, local_size):
        return True
    kv_length, kv_offset = geometry.kv_length, geometry.kv_offset
    return bidirectional and by.skips_bidirectional(
        attention_mask, kv_length, kv_offset, local_size
    )


class _SdpaMask(Protocol[_P]):
    """What type checkers are told: None comes back only where a skip is allowed."""

    __name__: str

    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        *,
        allow_is_causal_skip: Literal[False],
        allow_is_bidirectional_skip: Literal[False] = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        unmask_unattended: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor: ...
    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> torch.Tensor | None: ...


class _EagerMask(Protocol[_P]):
    """The same of eager_mask."""

    __name__: str

    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        allow_is_bidirectional_skip: Literal[False] = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        *,
        unmask_unattended: bool = False,
        masked_value: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor: ...
    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> torch.Tensor | None: ...


_Write = Callable[Concatenate[Release, _P], torch.Tensor | None]


def mirrors_sdpa(write: _Write[_P], module: str) -> _SdpaMask[_P]:
    """The mirror's sdpa_mask, a name of ``module``."""
    return cast(_SdpaMask[_P], _of_mirror(write, "sdpa_mask", module))


def mirrors_eager(write: _Write[_P], module: str) -> _EagerMask[_P]:
    """The mirror's eager_mask, a name of ``module``."""
    return cast(_EagerMask[_P], _of_mirror(write, "eager_mask", module))


def _of_mirror(write: Any, name: str, module: str) -> Any:
    mask: Any = functools.partial(write, _MIRROR)
    mask.__name__ = mask.__qualname__ = name
    mask.__module__, mask.__doc__ = module, write.__doc__
    return understands_cache_position(timed(mask))


def _installed(
    write: Callable[..., torch.Tensor | None], name: str
) -> Callable[..., torch.Tensor | None]:
    """What install() puts in the place of the release's: by the release, and by the options."""

    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        is_compiled = torch.compiler.is_compiling()
        if is_compiled or packing.scope.open:
            packing.check_no_documents()
        release, options = state.release, state.options
        if release.interface.takes_positions:
            args, kwargs = _listed(args, kwargs)
        kwargs["unmask_unattended"] = options.unmask_unattended
        kwargs["masked_value"] = options.masked_value
        if release.by_vmap:
            kwargs.setdefault("use_vmap", True)
        if listeners.open:
            result = told(write, name, release, *args, **kwargs)
        else:
            result = write(release, *args, **kwargs)
        if not is_compiled:
            counts[name if result is not None else "masks skipped"] += 1
        return result

    mask.__name__ = mask.__qualname__ = name
    mask.__doc__ = write.__doc__
    return mask


def _listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of releases until 5.3, whose q_length is the positions of the queries, a tensor [q] on the
    device of the mask, and which have no q_offset."""
    names = "batch_size", "cache_position", "kv_length", "kv_offset"
    given = dict(zip(names, args, strict=False)) | kwargs
    positions = given.pop("cache_position", None)
    if not isinstance(positions, torch.Tensor) or positions.dim() == 0:
        return args, kwargs
    length = positions.shape[0]
    where = length, given.pop("kv_length"), Axis(length, 0, positions), given.pop("kv_offset", 0)
    given["device"] = positions.device
    return (given.pop("batch_size"), *where, *args[4:]), given


sdpa_mask = _installed(write_sdpa_mask, "sdpa_mask")
eager_mask = _installed(write_eager_mask, "eager_mask")


# What else the create functions call


@functools.wraps(blocks.create_block_mask, assigned=("__doc__",))
def create_block_mask(*args: Any, **kwargs: Any) -> Any:
    packing.check_no_documents()
    return blocks.create_block_mask(*args, **kwargs)


def find_packed_sequence_indices(position_ids: torch.Tensor) -> Any:
    """The release's, unless skip_policy forbids reading values."""
    policy = skipping.current()
    if policy.name != "shapes":
        return state.release.find_packed_sequence_indices(position_ids)
    return None if policy.packing == "none" else documents.count_sequences(position_ids)


def no_sequences(position_ids: torch.Tensor) -> None:
    """Of 4.53.0, which does not detect them."""


# Until 4.55, chunks did not start after left padding.


def chunked_overlay(chunk_size: int) -> mask_rules.MaskFunction:
    return mask_rules.chunked(chunk_size)


def chunked_causal_mask_function(chunk_size: int) -> mask_rules.MaskFunction:
    return mask_rules.intersection(mask_rules.chunked(chunk_size), mask_rules.causal())


# The create functions, which are the release's own, except for packed documents


def preprocess_mask_arguments(*args: Any, **kwargs: Any) -> Any:
    """The release's, which makes booleans of whatever numbers a padding mask holds, and looks at
    position_ids only without a mask and a cache."""
    embeds, mask, cache, positions = _given(args, kwargs)
    if mask is not None and not isinstance(mask, torch.Tensor):
        check_no_rule("_preprocess_mask_arguments", "attention_mask", mask)
    if embeds is not None and embeds.shape[1] > 1 and state.options.packing == "upstream":
        is_read = mask is None and cache is None
        warn_of_lost_documents(mask, None if is_read else positions, embeds.shape[1])
    return state.release.preprocess(*args, **kwargs)


def _given(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Any, torch.Tensor | None]:
    """(inputs_embeds, attention_mask, cache, position_ids) of a call of a release's function."""
    # (config, inputs_embeds, attention_mask, cache, position_ids): one place later until 5.8.
    embeds, mask = (*args[1:3], None, None)[:2]
    if len(args) < 3:
        mask = kwargs.get("attention_mask")
        if len(args) < 2:  # until 5.1, input_embeds
            embeds = kwargs.get("inputs_embeds", kwargs.get("input_embeds"))
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    for arg in args[3:5]:
        cache = arg if hasattr(arg, "get_mask_sizes") else cache
    positions = kwargs.get("position_ids")
    for arg in args[4:6]:
        positions = arg if isinstance(arg, torch.Tensor) else positions
    return embeds, mask, cache, positions if isinstance(positions, torch.Tensor) else None


RECURRENT = "create_recurrent_attention_mask"


def _interface() -> Interface:
    return state.release.interface


_PACKED = {name: creates(name, _interface) for name in LAYERS}

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
        if mask is not None and not isinstance(mask, torch.Tensor):
            check_no_rule(name, "attention_mask", mask)
        # Asked in this order, so that a graph does not come to depend on other threads' blocks.
        is_within = torch.compiler.is_compiling() or packing.scope.open
        packed_by = packing.current() if is_within else None
        option = state.options.packing
        if packed_by is not None:
            what = packed_by.source
        elif option == "upstream":
            return before(*args, **kwargs)
        elif name in LAYERS and option == "position_ids":
            packed_by, what = _by_positions(name, args, kwargs)
        else:
            what = "nothing"
        config = args[0] if args else kwargs.get("config")
        if not is_recording():
            _got[getattr(type(config), "model_type", ""), name] = what
        if packed_by is None:
            return before(*args, **kwargs)
        if packed_by.is_of_call:
            # The model's flash attention goes by the position_ids or cu_seq_lens_q that it has.
            if "flash" in (getattr(config, "_attn_implementation", None) or ""):
                return before(*args, **kwargs)
            with packing.within(packing.Block(packed_by)):
                return packed(*args, **kwargs)
        return packed(*args, **kwargs)

    return create


def _by_positions(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Documents | None, str]:
    """Of a call whose position_ids start again, or whose model's do; None for others.

    And where they came from.
    """
    embeds, _, cache, positions = _given(args, kwargs)
    what = "position_ids of its calls"
    if positions is None:
        positions = _of_model(name, embeds, cache, args, kwargs)
        what = "position_ids of the model's calls"
    if positions is None:
        return None, "nothing"
    return (_if_packed(name, positions, cache) if positions.dim() == 2 else None), what


def _of_model(
    name: str, embeds: Any, cache: Any, args: Any, kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """The position_ids of the outermost model that was given some for as many tokens."""
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


def _if_packed(name: str, positions: torch.Tensor, cache: Any) -> Documents | None:
    policy = skipping.current()
    if policy.packing == "none":
        return None
    found = Documents(name, "position_ids", positions, is_of_call=True)
    if policy.name == "shapes" or is_opaque(positions) or positions.is_meta:
        return found
    if positions.device.type != "cpu" and positions.shape[1] == 1:
        return found  # a step of decoding is not to wait for its device
    begins = 0 if cache is None else cache.get_seq_length(LAYERS[name].first(cache))
    if positions.shape[1] == 1:  # read at once, since each step does it
        return found if min(positions[:, 0].tolist()) < int(begins) else None
    if isinstance(begins, torch.Tensor):
        begins = begins.to(positions.device)
    is_packed = documents.count_sequences(positions)[:, -1].any() | (positions[:, 0] < begins).any()
    return found if bool(is_packed) else None


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
