"""Puts native masks under an unmodified transformers.

Models hold transformers' create functions as objects, and those go on running: what they do is the
installed release's. But they look mask functions up in ``transformers.masking_utils`` when they are
called, and the functions that write masks in ALL_MASK_ATTENTION_FUNCTIONS. Those become ours here,
where they are transformers' own, see ``source``.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType, TracebackType
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch

from attn_mask._core import operators, process
from attn_mask._core.forking import fork_safe_lock
from attn_mask._core.log_once import log_detail_once, warn_once
from attn_mask._core.skipping import OWN_DECISIONS, Decisions
from attn_mask._core.write import Geometry
from attn_mask._transformers import mask_functions, model_calls, writers
from attn_mask._transformers import packing as _packing
from attn_mask._transformers.create import Interface
from attn_mask._transformers.releases import for_transformers, release_numbers
from attn_mask._transformers.source import (
    DECISIONS,
    FACTORIES,
    SKIPPING,
    WRITERS,
    Module,
    hashes,
    known,
)
from attn_mask._transformers.writers import Options, checked_options

_LEGACY = "modeling_attn_mask_utils"
_MASKING = "transformers.masking_utils"
_PREPROCESS = "_preprocess_mask_arguments"
_SEQUENCES = "find_packed_sequence_indices"
_LAYER_TYPES = "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"

_ABSENT: Any = object()

Packing = Literal["upstream", "position_ids", "cu_seq_lens"]


class _Change(NamedTuple):
    """One attribute of a module (or item of a mapping) that is replaced."""

    of: dict[str, Any]
    name: str
    before: Any
    now: Any


def _make(changes: Iterable[_Change]) -> None:
    """All but those of what someone else has replaced since."""
    for of, name, before, now in changes:
        if of.get(name, _ABSENT) is not before:
            continue
        if now is _ABSENT:
            del of[name]
        else:
            of[name] = now


def _undo(changes: Iterable[_Change]) -> None:
    _make([_Change(of, name, now, before) for of, name, before, now in changes])


class _Installation:
    """What is replaced, and what it was before. Made without changing anything.

    make() and undo() can be called again wherever they were interrupted.
    """

    def __init__(self, transformers: ModuleType):
        version = getattr(transformers, "__version__", None)
        if not isinstance(version, str):
            raise ImportError(
                "attn_mask.install: expected transformers (4.35.0 or later) to be installed, but "
                "the one here has no __version__"
            )
        self.version = version
        self.replaced: list[str] = []
        self.stays: list[str] = []  # and why
        self._changes: list[_Change] = []
        # (before, now) of objects that modules hold by name.
        self._objects: dict[str, tuple[Any, Any]] = {}
        self._mapping: dict[str, Any] = {}
        self._release = writers.state.release
        ours = _our_legacy_module(version)
        if release_numbers(version) >= (4, 53):
            self._plan_masking_utils()
        self._plan_legacy(transformers, ours)
        # Files that were imported before hold objects; an import has the same name, a use has not.
        self._changes += [
            _Change(held, name, *self._objects[name])
            for module, held in _namespaces()
            if not module.startswith("attn_mask.")
            for name in held.keys() & self._objects.keys()
            if held.get(name) is self._objects[name][0]
        ]

    def make(self) -> None:
        for text in self.stays:
            warn_once(f"install: {text}", "attn_mask.install: %s", text)
        for name in self.replaced:
            log_detail_once("attn_mask.install replaces %s", name)
        writers.state.release = self._release
        _make(self._changes)

    def undo(self) -> None:
        _undo(reversed(self._changes))
        _undo(
            _Change(self._mapping, key, before, now)
            for before, now in self._objects.values()
            for key in list(self._mapping)
        )
        # Files of transformers' own, and of model repositories, that were imported since hold ours;
        # so does its package, which it makes anew while it loads models.
        _undo(
            _Change(held, name, *self._objects[name])
            for module, held in _namespaces()
            if module.split(".")[0] in ("transformers", "transformers_modules")
            for name in held.keys() & self._objects.keys()
        )

    def _plan_masking_utils(self) -> None:
        plan = _MaskingUtils(self.version)
        self._release = plan.release
        self._objects = plan.objects | plan.creates
        self._mapping = plan.mapping
        self._changes += plan.changes + plan.of_layers
        self.replaced += [f"{_MASKING}.{name}" for name in plan.objects]
        self.replaced += [
            f"ALL_MASK_ATTENTION_FUNCTIONS[{change.name!r}]"
            if change.of is plan.mapping
            else f"{_MASKING}.{change.name}"
            for change in plan.changes
        ]
        self.stays += plan.others(self.version)
        for name, change in plan.attention():
            if change.before is _ABSENT or is_ours(change.before):
                self._changes.append(change)
            else:
                self.stays.append(
                    f"{change.name!r} of {name} keeps what is registered for it, "
                    f"{_shown(change.before)}"
                )

    def _plan_legacy(self, transformers: ModuleType, ours: ModuleType) -> None:
        name = f"transformers.{_LEGACY}"
        before = sys.modules.get(name, _ABSENT)
        # Where it was not imported, nothing of it is held or replaced anywhere.
        held = {} if before is _ABSENT else dict(_namespaces()).get(name, {})
        public = [of_file for of_file in ours.__all__ if of_file in held]
        module = Module(before) if public else None
        others = [of for of in public if module and not _is_legacy(module, of, getattr(ours, of))]
        if others:
            shown = ", ".join(_shown(held[other]) for other in others)
            self.stays.append(f"{name} stays as it is, for it holds {shown}")
            return
        self.replaced.append(name)
        package = vars(transformers)
        self._changes.append(_Change(sys.modules, name, before, ours))
        self._changes.append(_Change(package, _LEGACY, package.get(_LEGACY, _ABSENT), ours))
        self._objects[_LEGACY] = before, ours
        for of_file in public:
            self._objects[of_file] = held[of_file], getattr(ours, of_file)


class _MaskingUtils:
    """What transformers.masking_utils holds, and what it is to hold."""

    def __init__(self, version: str):
        upstream = _masking_utils(version)
        self._names = vars(upstream)
        for name in ("sdpa_mask", "eager_mask", *DECISIONS[:2], "ALL_MASK_ATTENTION_FUNCTIONS"):
            if name not in self._names:
                raise _missing(_MASKING, name)
        self._module = Module(upstream)
        # The first release with what is defined here, by name.
        source = self._module.source
        self._since = {
            name: release_numbers(first)
            for name, digest in (hashes(source) if source else {}).items()
            if (first := known().get(f"{name} {digest}"))
        }
        self._others: set[str] = set()  # names that hold what others put there
        self._unknown: set[str] = set()  # what no known release has
        self._registered: dict[str, Any] = {}  # by others, for "eager" and "sdpa"
        # As the release's own functions call it.
        arguments = self._module.parameters("sdpa_mask", "sdpa_mask_recent_torch")
        interface = self._names.get("AttentionMaskInterface")
        self.mapping = _mapping(interface, "AttentionMaskInterface")
        self.release = writers.Release(
            self._decisions(),
            "use_vmap" not in arguments,  # until 4.57
            self._names.get("find_packed_sequence_indices", writers.no_sequences),
            self._names.get(_PREPROCESS),
            Interface(
                self._names["ALL_MASK_ATTENTION_FUNCTIONS"],
                self.mapping,
                "cache_position" in arguments,
            ),
        )
        self.objects: dict[str, tuple[Any, Any]] = {}
        # The release's create functions go on running, but for packed documents.
        self.creates: dict[str, tuple[Any, Any]] = {}
        self._plan_objects()
        self.changes: list[_Change] = []
        self._plan_registrations()
        self._plan_block_masks()
        self.of_layers = list(self._of_layers(self._names.get(_LAYER_TYPES, {})))

    def _decisions(self) -> Decisions:
        if others := self._module.replaced(DECISIONS):
            self._others |= others
        elif "decisions" not in self._since:
            self._unknown.update(SKIPPING)
        elif self._since["decisions"] >= (5, 20):
            return OWN_DECISIONS  # the same, faster
        return _release_decisions(self._module)

    def _calls_others(self, defined: str, without: Iterable[str] = ()) -> bool:
        """Whether a function of the module calls what others put into the module."""
        others = self._module.replaced([defined], without) - {defined}
        self._others |= others
        return bool(others)

    def _plan_objects(self) -> None:
        for name in (*FACTORIES, *WRITERS, _SEQUENCES, _PREPROCESS, *writers.NAMES):
            if (before := self._names.get(name)) is None:
                continue
            defined = self._module.own(before)
            if defined is None or (defined != name and name not in WRITERS):
                self._others.add(name)
            elif name in writers.NAMES:
                self.creates[name] = before, writers.keeps_documents_apart(name, before)
            elif (ours := self._ours(name, before)) is not None:
                self.objects[name] = before, ours

    def _ours(self, name: str, before: Any) -> Any:
        """What a function of the release's own becomes; None where it stays."""
        if name == _PREPROCESS:
            return writers.preprocess_mask_arguments
        if name in WRITERS:
            return self._writer(before)
        if self._calls_others(name):
            return None
        if name == _SEQUENCES:
            return writers.find_packed_sequence_indices
        if name not in self._since:
            self._unknown.add(name)
            return None
        # Until 4.55, chunks did not start after left padding.
        is_old = name.startswith("chunked_") and self._since[name] < (4, 56)
        return getattr(writers if is_old else mask_functions, name)

    def _writer(self, function: Any) -> Any:
        """Ours, for a function of the module's own that writes masks; None for all others.

        One that no known release has is replaced, too: it is the release's own.
        """
        defined = self._module.own(function)
        if defined is None or not defined.startswith(WRITERS):
            return None
        if self._calls_others(defined, without=SKIPPING):
            return None
        if defined not in self._since:
            self._unknown.add(defined)
        return writers.sdpa_mask if defined.startswith("sdpa_mask") else writers.eager_mask

    def _plan_registrations(self) -> None:
        for key, function in self.mapping.items():
            if (ours := self._writer(function)) is not None:
                self.changes.append(_Change(self.mapping, key, function, ours))
        local = getattr(self._names["ALL_MASK_ATTENTION_FUNCTIONS"], "_local_mapping", {})
        for key in ("eager", "sdpa"):
            function = local.get(key, self.mapping.get(key))
            if function is not None and self._module.own(function) is None:
                self._registered[key] = function

    def _of_layers(self, mapping: dict[str, Any]) -> Iterator[_Change]:
        """The create functions by types of layers, which generate() looks up."""
        for layer_type, create in mapping.items():
            if isinstance(create, dict):
                yield from self._of_layers(create)
            for before, now in self.creates.values():
                if create is before:
                    yield _Change(mapping, layer_type, create, now)
                elif isinstance(create, functools.partial) and create.func is before:
                    made = functools.partial(now, *create.args, **create.keywords)
                    yield _Change(mapping, layer_type, create, made)

    def _plan_block_masks(self) -> None:
        name = "create_block_mask"  # torch's, where it has flex attention
        held = self._names.get(name)
        torchs = sys.modules.get("torch.nn.attention.flex_attention")
        if held is not None and held is getattr(torchs, name, None):
            self.changes.append(_Change(self._names, name, held, writers.create_block_mask))
        elif name in self._names:
            self._others.add(name)

    def attention(self) -> Iterator[tuple[str, _Change]]:
        """What registers attention by rule: by name, in transformers and in the mirror here."""
        from attn_mask._transformers import (
            attention_interface,  # imports flex attention, as transformers does
        )

        for name in FACTORIES:
            if name in self.objects:
                attention_interface.recognise(*self.objects[name])
        modeling = importlib.import_module("transformers.modeling_utils")
        mapping = _mapping(modeling.AttentionInterface, "AttentionInterface")
        for name, of, function in (
            ("AttentionInterface", mapping, attention_interface.attention),
            ("AttentionMaskInterface", self.mapping, attention_interface.rule_mask),
            ("attn_mask's mirror", writers.of_mirror, attention_interface.rule_mask),
        ):
            before = of.get(attention_interface.NAME, _ABSENT)
            yield name, _Change(of, attention_interface.NAME, before, function)

    def others(self, version: str) -> Iterator[str]:
        """What is not the release's own, and what no known release has."""
        for key, function in self._registered.items():
            yield (f"{key!r} keeps the mask function that is registered for it, {_shown(function)}")
        for name in sorted(self._others):
            function = self._names.get(name)
            if not any(function is registered for registered in self._registered.values()):
                yield (
                    f"{_MASKING}.{name} is not transformers' own, but {_shown(function)}: "
                    "it stays, as does what calls it"
                )
        if self._module.source is None:
            yield (
                f"the source of {_MASKING} can't be read, so that its mask functions stay as they "
                "are, and masks take longer"
            )
        elif self._unknown:
            yield (
                f"{', '.join(sorted(self._unknown))} of transformers {version} are not those of a "
                "release that is known here: mask functions among them stay as they are, and masks "
                "may take longer"
            )


def _masking_utils(version: str) -> ModuleType:
    try:
        return importlib.import_module(_MASKING)
    except ModuleNotFoundError as error:
        if error.name != _MASKING:
            raise
        raise _missing(f"transformers {version}", "masking_utils") from error


def _mapping(interface: Any, name: str) -> dict[str, Any]:
    mapping = getattr(interface, "_global_mapping", None)
    if not isinstance(mapping, dict):
        raise _missing(_MASKING, f"{name}._global_mapping")
    return mapping


def is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", None)).startswith("attn_mask.")


# What releases pass to the functions that decide whether a mask is needed.
_DECIDED_BY = {
    *("padding_mask", "q_length", "query_length", "kv_length"),
    *("q_offset", "kv_offset", "local_attention_size"),
}


def _release_decisions(module: Module) -> Decisions:
    """As the release does it, by calling its functions.

    Raises NotImplementedError where it calls them in a way that is not supported here.
    """
    prepare = module.names["prepare_padding_mask"]
    # Until 4.57 it cuts the mask, too, unless an argument forbids it.
    whole = {"_slice": False} if "_slice" in module.parameters("prepare_padding_mask") else {}

    def decision(name: str) -> Callable[..., bool]:
        function: Any = module.names.get(name)
        parameters = module.parameters(name)
        if function is not None and not {"padding_mask"} <= set(parameters) <= _DECIDED_BY:
            raise _too_old(
                f"transformers' {name} to take the arguments of a release that is known here",
                "it takes others",
            )

        def decides(
            attention_mask: torch.Tensor | None, geometry: Geometry, local_size: int | None
        ) -> bool:
            _, q_length, q_offset, kv_length, kv_offset = geometry
            given = {
                "padding_mask": prepare(attention_mask, kv_length, kv_offset, **whole),
                "q_length": q_length,
                "query_length": q_length,
                "kv_length": kv_length,
                "q_offset": q_offset,
                "kv_offset": kv_offset,
                "local_attention_size": local_size,
            }
            return bool(function(*[given[parameter] for parameter in parameters]))

        return decides

    causal, bidirectional = map(decision, SKIPPING)

    def decides_bidirectional(
        attention_mask: torch.Tensor | None, kv_length: int, kv_offset: Any, local_size: int | None
    ) -> bool:
        return bidirectional(attention_mask, Geometry(0, 0, 0, kv_length, kv_offset), local_size)

    return Decisions(causal, decides_bidirectional)


def _our_legacy_module(version: str) -> ModuleType:
    try:
        return for_transformers(version).modeling_attn_mask_utils
    except ValueError as error:
        raise ImportError(
            f"attn_mask.install: expected transformers 4.35.0 or later, but {version} is installed"
        ) from error


def _is_legacy(module: Module, name: str, ours: Any) -> bool:
    """Whether the legacy module holds under a name what its file defines there."""
    held = module.names[name]
    if not isinstance(ours, type):
        return module.own(held) == name
    if not isinstance(held, type) or (held.__module__, held.__qualname__) != (module.name, name):
        return False
    for method in vars(ours):
        is_written = method == "__init__" or not method.startswith("__")
        of_ours = inspect.getattr_static(ours, method)
        if (
            is_written
            and isinstance(of_ours, FunctionType | staticmethod)
            and hasattr(held, method)
        ):
            function = inspect.getattr_static(held, method)
            function = getattr(function, "__func__", function)
            if module.own(function) != f"{name}.{method}":
                return False
    return True


def _namespaces() -> list[tuple[str, dict[str, Any]]]:
    """The names in each module, where they can be read."""
    found = []
    for name, module in list(sys.modules.items()):
        try:
            # Looked up in this way, a module that is loaded lazily stays as it is.
            is_module = issubclass(type(module), ModuleType)
            held = object.__getattribute__(module, "__dict__") if is_module else None
        except Exception:
            continue
        if isinstance(name, str) and type(held) is dict:
            found.append((name, held))
    return found


def _too_old(expected: str, found: str = "there is none") -> NotImplementedError:
    return NotImplementedError(
        f"attn_mask.install: expected {expected}, but {found}: this attn_mask is too old for the "
        "transformers here"
    )


def _missing(of: str, name: str) -> NotImplementedError:
    return _too_old(f"{of} to have {name}, as all releases since 4.53 that are known here")


def _shown(function: Any) -> str:
    if isinstance(function, FunctionType):  # as it was defined: wrappers have another's name
        return f"{function.__globals__.get('__name__')}.{function.__code__.co_qualname}"
    name = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    if not isinstance(name, str):
        return f"an object of {type(function).__name__}"
    return f"{module}.{name}" if isinstance(module, str) else name


class _State:
    """What install(), uninstall() and installed() change, under the lock only."""

    def __init__(self) -> None:
        self.lock = fork_safe_lock("install", 30.0, lambda: _finish())
        self.installation: _Installation | None = None
        self.kept: Options | None = None  # by install()
        self.blocks: tuple[Options, ...] = ()  # one object for each entry of installed()
        self.watches_models = False
        self.keeps_attention = False  # registered by register_attention()


_state = process.kept("install", _State)


def _transformers(name: str = "install") -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"attn_mask.{name}: expected transformers (4.35.0 or later) to be installed, but "
            "there is none"
        ) from error


def _set(kept: Options | None, blocks: tuple[Options, ...]) -> None:
    """Replaces or puts back what that takes. All of it even where it is interrupted, or nothing."""
    before = _state.kept, _state.blocks
    try:
        _state.kept, _state.blocks = kept, blocks
        _update()
    except BaseException:
        if kept is not None or blocks:
            _state.kept, _state.blocks = before
        _update()
        raise


def _update() -> None:
    options = _state.blocks[-1] if _state.blocks else _state.kept
    writers.state.options = options or Options()
    _watch_models(options is not None and options.packing != "upstream")
    operators.set_everywhere(options is not None and options.aten_only)
    if options is None:
        if _state.installation is not None:
            _state.installation.undo()
            if _state.keeps_attention:
                _register(_state.installation.version)
            _state.installation = None
    elif _state.installation is None:
        # Known before it changes anything, so that it can be undone wherever it is interrupted.
        _state.installation = _Installation(_transformers())
        _state.installation.make()


def _finish() -> None:
    """In a forked process whose parent was replacing something: all of it, or nothing."""
    if _state.installation is not None:
        if _state.kept is not None or _state.blocks:
            _state.installation.make()
        else:
            _update()


def _watch_models(is_wanted: bool) -> None:
    if is_wanted and not _state.watches_models:
        _transformers()
        importlib.import_module("transformers.modeling_utils")
        model_calls.watched.__enter__()
    elif _state.watches_models and not is_wanted:
        model_calls.watched.__exit__()
    _state.watches_models = is_wanted


def _refuse_packed(name: str) -> None:
    if _packing.is_within():
        raise ValueError(
            f"{name}: expected to be called outside `with attn_mask.packed(...):`, whose documents "
            "the functions that it replaces keep apart"
        )


def install(
    *,
    masked_value: float | None = None,
    unmask_unattended: bool = False,
    aten_only: bool = False,
    packing: Packing = "upstream",
) -> None:
    """Lets unmodified transformers models make their masks natively, in the whole process.

    For transformers 4.53 and later. The functions of ``transformers.masking_utils`` that make masks
    go on running, so that all behaves as in the installed release, bit for bit; what they call to
    describe and write a mask becomes ours. ``transformers.modeling_attn_mask_utils`` becomes
    ``for_transformers(...)`` of the installed release, also where the release no longer has the
    file; from 4.35 to 4.52 that is all. Models can name attention by rule, see register_attention.

    Only transformers' own functions are replaced, recognised by their source. What others put in
    their place stays there and goes on being called, functions that are registered for "sdpa" or
    "eager" in ALL_MASK_ATTENTION_FUNCTIONS among it; so do mask functions that no known release
    has, and all of them where there is no source (``.pyc`` files only). Each is named once in a
    warning of the logger "attn_mask". What is put there later is left alone; functions of
    transformers that sdpa_mask calls are checked when this is installed, not after.

    It does not matter whether models were imported before. A second call changes the options only;
    within a block of installed(), whose own hold there, from its end on. Whatever raises or
    interrupts it leaves all as it was.

    Args:
        masked_value: what additive masks hold for a key that is not attended to, a number up to 0
            or -inf; by default the lowest of the mask's dtype, as in transformers. One that the
            dtype can't hold is a ValueError when the mask is made.
        unmask_unattended: whether rows in which no key is visible become visible throughout.
        aten_only: whether ATen operators make all masks of this process; see aten_only().
        packing: what keeps documents apart that are packed into rows, beside blocks of packed().
            "upstream": what the release does. "position_ids": position_ids of a create call that
            start again, else those that the outermost model was called with, whatever cache or 2-D
            attention_mask is there; with tokens in the cache, a document began as many tokens
            before the first query as that one's position. Where they don't start again, all is as
            in the release, which takes reading them; where there are none, for more than one token
            without a cache, a warning says so. "cu_seq_lens":
            the cu_seq_lens_q that a model is called with, over the flattened rows.

    The first two hold for "eager" and "sdpa" in ``transformers.masking_utils``, not for the legacy
    module and BlockMasks.

    Raises TypeError or ValueError for such options, ValueError within packed(); ImportError without
    transformers, or with one before 4.35; NotImplementedError for a later one that lacks functions,
    or calls its own in a way that is not known here.
    """
    options = checked_options("install", masked_value, unmask_unattended, aten_only, packing)
    _refuse_packed("install")
    with _state.lock:
        _set(options, _state.blocks)


def uninstall() -> None:
    """Puts back the very objects that install() replaced.

    What was replaced by others since is left to them. Without install() it does nothing; within
    ``with installed():`` it takes effect at the end of the last such block. ValueError within
    packed().
    """
    _refuse_packed("uninstall")
    with _state.lock:
        _set(None, _state.blocks)


def register_attention() -> None:
    """Gives transformers models ``attn_implementation="attn_mask"``: attention by rule.

    Layers then get the rule of their mask in place of a tensor, and attend by
    ``attn_mask.scaled_dot_product_attention``: time and memory go with the keys that are visible.
    Logits are those of "sdpa" up to rounding. No other model is changed by it. install() registers
    it, too, up to uninstall(), where it is not another's; after this call it is there for good, in
    the place of what others registered under that name.

    Raises ImportError without transformers, NotImplementedError for one before 4.53, and what
    install() raises.

    >>> import transformers, attn_mask
    >>> attn_mask.register_attention()
    >>> config = transformers.LlamaConfig(
    ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=1, vocab_size=4,
    ...     intermediate_size=8,
    ... )
    >>> model = transformers.LlamaForCausalLM._from_config(
    ...     config, attn_implementation="attn_mask"
    ... )
    """
    with _state.lock:
        transformers = _transformers("register_attention")
        version = str(getattr(transformers, "__version__", None))
        if release_numbers(version) < (4, 53):
            raise NotImplementedError(
                "attn_mask.register_attention: expected transformers 4.53 or later, whose masks "
                f"can be registered, but {version} is installed"
            )
        _state.keeps_attention = True
        _register(version)


def _register(version: str) -> None:
    _make(change for _, change in _MaskingUtils(version).attention())


def is_installed() -> bool:
    """Whether transformers makes its masks natively, by install() or within ``installed()``.

    >>> attn_mask.is_installed()
    False
    """
    with _state.lock:
        return _state.installation is not None


class Replacement(NamedTuple):
    """What an install() replaces in a release of transformers, and what stays and why."""

    transformers: str
    replaced: tuple[str, ...]
    stays: tuple[str, ...]


def replacement(*, planned: bool = False) -> Replacement | None:
    """Of what is installed; else None, or with ``planned`` what install() would do.

    Raises what install() raises.
    """
    with _state.lock:
        found = _state.installation
        if found is None and planned:
            found = _Installation(_transformers())
        if found is None:
            return None
        return Replacement(found.version, tuple(found.replaced), tuple(found.stays))


_Call = TypeVar("_Call", bound=Callable[..., Any])


class installed:
    """``with attn_mask.installed():`` is install() for the length of a block.

    In the whole process: other threads see it, too. Blocks may be nested and overlap, and an
    install() outlasts them. The options are install()'s; those of the block that was entered last
    hold. As a decorator, ``@attn_mask.installed()``, it is a block around each call of a function,
    or around what is awaited of an ``async`` one.

    Raises TypeError for other things to decorate, and where it is used as a bool: see
    is_installed.
    """

    def __init__(
        self,
        *,
        masked_value: float | None = None,
        unmask_unattended: bool = False,
        aten_only: bool = False,
        packing: Packing = "upstream",
    ) -> None:
        self._options = checked_options(
            "installed", masked_value, unmask_unattended, aten_only, packing
        )
        self._blocks: list[Options] = []

    def __enter__(self) -> None:
        block = Options(*self._options)
        with _state.lock:
            _set(_state.kept, (*_state.blocks, block))
            self._blocks.append(block)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _state.lock:
            if not self._blocks:
                raise RuntimeError(
                    "installed: expected __enter__ before __exit__, but got __exit__ alone"
                )
            block = self._blocks.pop()
            _set(_state.kept, tuple(other for other in _state.blocks if other is not block))

    def __bool__(self) -> bool:
        raise TypeError(
            "attn_mask.installed: expected `with attn_mask.installed():`, but it was used as a "
            "bool: attn_mask.is_installed() returns whether anything is installed"
        )

    def __call__(self, function: _Call) -> _Call:
        if (
            not callable(function)
            or isinstance(function, type)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                "attn_mask.installed: expected to decorate a function that is no generator, but "
                f"got {function!r}"
            )
        options = self._options._asdict()
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def within(*args: Any, **kwargs: Any) -> Any:
                with installed(**options):
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def within(*args: Any, **kwargs: Any) -> Any:
                with installed(**options):
                    return function(*args, **kwargs)

        return cast(_Call, within)


def _renew() -> None:
    """Puts this module's functions in the place of those that a former module installed.

    After ``sys.modules`` was purged: those obey the former skip_policy, and can't be pickled.
    """
    with _state.lock:
        former = _state.installation
        if former is not None and type(former) is not _Installation:
            former.undo()
            _state.installation = None
            _update()


_renew()
