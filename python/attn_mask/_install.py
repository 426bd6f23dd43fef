"""Puts native masks under an unmodified transformers.

Models hold transformers' create functions as objects, and those go on running: what they do is the
installed release's. But they look mask functions up in ``transformers.masking_utils`` when they are
called, and the functions that write masks in ALL_MASK_ATTENTION_FUNCTIONS. Those become ours here.
"""

import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from attn_mask import _skipping, block_mask, masking_utils, rules
from attn_mask._releases import for_transformers, release_numbers

__all__ = ["install", "installed", "uninstall"]

_LEGACY = "modeling_attn_mask_utils"

# Mask functions whose results depend on their arguments alone, the same in all releases. Those that
# prepare the arguments stay the release's.
_FACTORIES = (
    "and_masks",
    "or_masks",
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_causal_mask_function",
    "sliding_window_bidirectional_overlay",
    "sliding_window_bidirectional_mask_function",
    "chunked_overlay",
    "chunked_causal_mask_function",
    "blockwise_overlay",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
)

_ABSENT: Any = object()

_logger = logging.getLogger("attn_mask")


class _Decisions(NamedTuple):
    """How a release decides that no mask is needed, under skip_policy."""

    causal: Callable[..., bool]
    """(attention_mask, q_length, kv_length, q_offset, kv_offset, local_size)"""
    bidirectional: Callable[..., bool]
    """(attention_mask, kv_length, kv_offset, local_size)"""


class _Change(NamedTuple):
    """One attribute of a module (or item of a mapping) that was replaced."""

    of: dict[str, Any]
    name: str
    before: Any
    now: Any

    def make(self) -> None:
        self.of[self.name] = self.now

    def undo(self) -> None:
        """Unless someone else has replaced it since."""
        if self.of.get(self.name, _ABSENT) is not self.now:
            return
        if self.before is _ABSENT:
            del self.of[self.name]
        else:
            self.of[self.name] = self.before


class _Installation:
    """What is replaced, and what it was before."""

    def __init__(self, transformers: ModuleType):
        self._changes: list[_Change] = []
        # (before, now) of objects that modules hold by name.
        self._objects: dict[str, tuple[Any, Any]] = {}
        self._mapping: dict[str, Any] = {}
        version: str = transformers.__version__
        release = release_numbers(version)
        ours = _our_legacy_module(version)
        if release >= (4, 53):
            upstream = importlib.import_module("transformers.masking_utils")
            self._plan_masking_utils(upstream, release)
        self._plan_legacy(transformers, ours)
        for change in self._changes:
            change.make()
        # Files that were imported before hold objects; the same name tells an import from a use.
        for namespace in _namespaces(lambda name: not name.startswith("attn_mask.")):
            self._replace_objects(namespace, forth=True)

    def undo(self) -> None:
        for change in reversed(self._changes):
            change.undo()
        # transformers makes its package anew while it loads models, and keeps what it looked up.
        package = vars(sys.modules["transformers"]) if "transformers" in sys.modules else {}
        _Change(
            package, _LEGACY, sys.modules.get(self._legacy.name, _ABSENT), self._legacy.now
        ).undo()
        for key, function in list(self._mapping.items()):
            for before, now in self._objects.values():
                if function is now:
                    self._mapping[key] = before
        # Files of transformers' own that were imported since hold ours.
        for namespace in _namespaces(_is_of_transformers):
            self._replace_objects(namespace, forth=False)

    def _replace_objects(self, namespace: dict[str, Any], forth: bool) -> None:
        for name, (before, now) in self._objects.items():
            held, other = (before, now) if forth else (now, before)
            if namespace.get(name, _ABSENT) is held:
                namespace[name] = other
                if forth:
                    self._changes.append(_Change(namespace, name, before, now))

    def _plan_masking_utils(self, upstream: ModuleType, release: tuple[int, ...]) -> None:
        decisions = _decisions_of(upstream, release)
        names = vars(upstream)
        for name in _FACTORIES:
            if name in names:
                self._objects[name] = names[name], _factory(name, names[name])
        interfaces = _interfaces(upstream, decisions)
        for name, function in interfaces.items():
            self._objects[name] = names[name], function
        if "find_packed_sequence_indices" in names:
            before = names["find_packed_sequence_indices"]
            self._objects["find_packed_sequence_indices"] = before, _find_sequences(before)
        for name, (before, now) in self._objects.items():
            self._changes.append(_Change(names, name, before, now))
        if "create_block_mask" in names:  # torch's, where it has flex attention
            before = names["create_block_mask"]
            now = block_mask.create_block_mask
            self._changes.append(_Change(names, "create_block_mask", before, now))
        self._mapping = upstream.AttentionMaskInterface._global_mapping
        own = {id(names[name]): function for name, function in interfaces.items()}
        for key, function in self._mapping.items():
            if id(function) in own:
                self._changes.append(_Change(self._mapping, key, function, own[id(function)]))
        local = upstream.ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
        for key in ("eager", "sdpa"):
            function = local.get(key, self._mapping.get(key))
            if function is not None and id(function) not in own:
                _name_once(key, function)

    def _plan_legacy(self, transformers: ModuleType, ours: ModuleType) -> None:
        name = f"transformers.{_LEGACY}"
        before = sys.modules.get(name, _ABSENT)
        attribute = vars(transformers).get(_LEGACY, _ABSENT)
        self._legacy = _Change(sys.modules, name, before, ours)
        self._changes.append(self._legacy)
        self._changes.append(_Change(vars(transformers), _LEGACY, attribute, ours))
        if before is _ABSENT:
            return  # nobody holds anything of it
        for public in ours.__all__:
            if public in vars(before):
                pair = vars(before)[public], getattr(ours, public)
                self._objects[public] = pair
                self._changes.append(_Change(vars(before), public, *pair))


def _our_legacy_module(version: str) -> ModuleType:
    try:
        return for_transformers(version).modeling_attn_mask_utils
    except ValueError as error:
        raise ImportError(
            f"attn_mask.install: expected transformers 4.35.0 or later, but {version} is installed"
        ) from error


def _is_of_transformers(name: str) -> bool:
    """Its own modules, and those that it loads from model repositories."""
    return name.startswith(("transformers.", "transformers_modules."))


def _namespaces(wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    found = []
    for name, module in list(sys.modules.items()):
        if wanted(name) and isinstance(module, ModuleType):
            # Asked in this way, a module that is loaded lazily stays as it is.
            found.append(object.__getattribute__(module, "__dict__"))
    return found


def _name_once(key: str, function: Any) -> None:
    if (key, function) in _named:
        return
    _named.append((key, function))
    shown = getattr(function, "__qualname__", None) or repr(function)
    module = getattr(function, "__module__", None)
    _logger.warning(
        "attn_mask.install: %r keeps the mask function that is registered for it, %s",
        key,
        f"{module}.{shown}" if module else shown,
    )


_named: list[tuple[str, Any]] = []


def _factory(name: str, before: Any) -> Any:
    # Until 4.55, chunks did not start behind left padding.
    if name in ("chunked_overlay", "chunked_causal_mask_function") and (
        "left_padding" not in inspect.signature(before).parameters
    ):
        return _chunked_overlay if name == "chunked_overlay" else _chunked_causal_mask_function
    return getattr(masking_utils, name)


def _chunked_overlay(chunk_size: int) -> rules.MaskFunction:
    return rules.chunked(chunk_size)


def _chunked_causal_mask_function(chunk_size: int) -> rules.MaskFunction:
    return rules.intersection(rules.chunked(chunk_size), rules.causal())


def _find_sequences(before: Callable[..., Any]) -> Callable[..., Any]:
    def find_packed_sequence_indices(position_ids: torch.Tensor) -> Any:
        policy = _skipping.current()
        if policy.name != "shapes":
            return before(position_ids)
        return None if policy.packing == "none" else masking_utils._count_sequences(position_ids)

    return find_packed_sequence_indices


def _decisions_of(upstream: ModuleType, release: tuple[int, ...]) -> _Decisions:
    # What these releases do, faster.
    if (5, 20) <= release < (5, 24):
        return _Decisions(masking_utils._skips_causal, masking_utils._skips_bidirectional)
    causal: Any = getattr(upstream, "_ignore_causal_mask_sdpa", None)
    bidirectional: Any = getattr(upstream, "_ignore_bidirectional_mask_sdpa", None)
    prepare = upstream.prepare_padding_mask
    of_causal = _parameters(causal)
    of_bidirectional = _parameters(bidirectional)
    sizes = ["kv_length", "kv_offset", "local_attention_size"]
    asks_offset = of_causal == ["padding_mask", "q_length", *sizes[:1], "q_offset", *sizes[1:]]
    if not asks_offset and of_causal not in (
        ["padding_mask", "q_length", *sizes],
        ["padding_mask", "query_length", *sizes],
    ):
        raise _unknown("_ignore_causal_mask_sdpa")
    asks_size = of_bidirectional == ["padding_mask", "kv_length", "local_attention_size"]
    if bidirectional is not None and not asks_size and of_bidirectional != ["padding_mask"]:
        raise _unknown("_ignore_bidirectional_mask_sdpa")
    # Until 4.57 it cuts the mask, too, unless told not to.
    whole = {"_slice": False} if "_slice" in _parameters(prepare) else {}

    def skips_causal(
        attention_mask: torch.Tensor | None,
        q_length: int,
        kv_length: int,
        q_offset: Any,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        policy = _skipping.current()
        if policy.name != "upstream":
            return policy.skips_causal(
                attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
            )
        padding_mask = prepare(attention_mask, kv_length, kv_offset, **whole)
        if asks_offset:
            return bool(causal(padding_mask, q_length, kv_length, q_offset, kv_offset, local_size))
        return bool(causal(padding_mask, q_length, kv_length, kv_offset, local_size))

    def skips_bidirectional(
        attention_mask: torch.Tensor | None,
        kv_length: int,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        policy = _skipping.current()
        if policy.name != "upstream":
            return policy.skips_bidirectional(attention_mask, kv_length, kv_offset, local_size)
        padding_mask = prepare(attention_mask, kv_length, kv_offset, **whole)
        if asks_size:
            return bool(bidirectional(padding_mask, kv_length, local_size))
        return bool(bidirectional(padding_mask))

    return _Decisions(skips_causal, skips_bidirectional)


def _parameters(function: Callable[..., Any] | None) -> list[str]:
    return [] if function is None else list(inspect.signature(function).parameters)


def _unknown(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_mask.install: expected transformers' {name} to be that of a release from 4.53 to "
        "5.23, but it takes other arguments: this attn_mask is too old for the transformers here"
    )


def _interfaces(upstream: ModuleType, decisions: _Decisions) -> dict[str, Callable[..., Any]]:
    """sdpa_mask and eager_mask, with the release's arguments and decisions."""
    arguments = inspect.signature(upstream.sdpa_mask).parameters
    # Until 4.57 mask functions were always asked about one element at a time.
    by_vmap = "use_vmap" not in arguments
    write = masking_utils._materialize
    skips_causal, skips_bidirectional = decisions

    def sdpa_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: Any = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> torch.Tensor | None:
        if allow_is_causal_skip and skips_causal(
            attention_mask, q_length, kv_length, q_offset, kv_offset, local_size
        ):
            return None
        if allow_is_bidirectional_skip and skips_bidirectional(
            attention_mask, kv_length, kv_offset, local_size
        ):
            return None
        return write(
            mask_function,
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask,
            use_vmap,
            device,
        )

    def eager_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: Any = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        local_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        if allow_is_bidirectional_skip and skips_bidirectional(
            attention_mask, kv_length, kv_offset, local_size
        ):
            return None
        return write(
            mask_function,
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask,
            use_vmap,
            device,
            dtype,
        )

    if "cache_position" not in arguments:
        return {"sdpa_mask": sdpa_mask, "eager_mask": eager_mask}

    # Until 5.3: the positions of the queries as a tensor, on the device of the mask.
    def sdpa_mask_at(
        batch_size: int,
        cache_position: torch.Tensor,
        kv_length: int,
        kv_offset: Any = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = by_vmap,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        q_length = cache_position.shape[0]
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            masking_utils._Axis(q_length, 0, cache_position),
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip,
            allow_is_bidirectional_skip,
            use_vmap,
            cache_position.device,
        )

    def eager_mask_at(
        batch_size: int,
        cache_position: torch.Tensor,
        kv_length: int,
        kv_offset: Any = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = by_vmap,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        q_length = cache_position.shape[0]
        return eager_mask(
            batch_size,
            q_length,
            kv_length,
            masking_utils._Axis(q_length, 0, cache_position),
            kv_offset,
            mask_function,
            attention_mask,
            dtype,
            allow_is_bidirectional_skip,
            use_vmap,
            cache_position.device,
            local_size,
        )

    return {"sdpa_mask": sdpa_mask_at, "eager_mask": eager_mask_at}


# The state of this process; changed under the lock only.
_lock = threading.RLock()
_installation: _Installation | None = None
_is_kept = False  # by install()
_blocks = 0  # of installed()


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "attn_mask.install: expected transformers (4.35.0 or later) to be installed, but there "
            "is none"
        ) from error


def _update() -> None:
    global _installation
    if _is_kept or _blocks > 0:
        if _installation is None:
            _installation = _Installation(_transformers())
    elif _installation is not None:
        _installation.undo()
        _installation = None


def install() -> None:
    """Lets unmodified transformers models make their masks natively, in the whole process.

    For transformers 4.53 to 5.23. The functions of ``transformers.masking_utils`` that make masks
    go on running, so that all behaves as in the installed release, bit for bit; what they call to
    describe and write a mask becomes ours. ``transformers.modeling_attn_mask_utils`` becomes
    ``for_transformers(...)`` of the installed release, also where the release no longer has the
    file; from 4.35 to 4.52 that is all.

    It does not matter whether models were imported before; a second call does nothing. A function
    that was registered for "sdpa" or "eager" in ALL_MASK_ATTENTION_FUNCTIONS is kept (and named in
    a warning of the logger "attn_mask", once); one that is registered later replaces ours.

    Raises ImportError without transformers, or with one before 4.35; NotImplementedError for a
    later one that calls its own functions in a way that is not known here.
    """
    global _is_kept
    with _lock:
        before, _is_kept = _is_kept, True
        try:
            _update()
        except BaseException:
            _is_kept = before
            raise


def uninstall() -> None:
    """Puts back the very objects that install() replaced.

    What was replaced by others since is left to them. Without install() it does nothing; within
    ``with installed():`` it takes effect at the end of the last such block.
    """
    global _is_kept
    with _lock:
        _is_kept = False
        _update()


class installed:
    """``with attn_mask.installed():`` is install() for the length of a block.

    In the whole process: other threads see it, too. Blocks may be nested and overlap, and an
    install() outlasts them.
    """

    def __enter__(self) -> None:
        global _blocks
        with _lock:
            _blocks += 1
            try:
                _update()
            except BaseException:
                _blocks -= 1
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _blocks
        with _lock:
            _blocks -= 1
            _update()
