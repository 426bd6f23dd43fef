"""What changed in transformers' modeling_attn_mask_utils, and the file as each release had it.

Nothing about a release is decided anywhere but in the table here. Transformers 5 is
``attn_mask.modeling_attn_mask_utils``; the earlier ones are one file, ``_transformers_4.py``,
executed once for each row of the table.
"""

import re
import sys
import threading
from dataclasses import dataclass, field, replace
from importlib.util import LazyLoader, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from attn_mask import modeling_attn_mask_utils

__all__ = ["UPSTREAM", "Behaviour", "TransformersRelease", "for_transformers"]

UPSTREAM = "5.24.0"
"""The release that the mirrors follow. modeling_attn_mask_utils is gone from it: that is 5.23."""


@dataclass(frozen=True)
class Behaviour:
    """The file from one release on. Where nothing else is said: False is what 4.35 did."""

    since: tuple[int, int, int]

    combines_by_adding: bool = True
    """Causality and padding: a key closed by both holds -inf. Else it holds the minimum."""

    is_dataclass: bool = False
    """The converter. With it ``dtype`` lost its default and came before ``key_value_length``."""

    has_sdpa: bool = False
    """The two functions for scaled_dot_product_attention, and _unmask_unattended."""

    takes_4d_masks: bool = False
    """Of ones and zeros. Before, a mask of any rank was taken for one of rank 2."""

    fx_is_tracing: bool = False
    """An fx.Proxy, in the causal function for sdpa."""

    unmasks_while_tracing: bool = True

    wide_window: bool = False
    """A query attends to itself and W keys before it. Else to W keys, itself included."""

    unmasks_by_value: bool = False
    """Rows that hold the minimum throughout, on CUDA. Else rows before the first attended key."""

    compile_is_tracing: bool = False
    """torch.compile, and an fx.Proxy in the other function for sdpa, too."""

    has_ignore: bool = False
    """_ignore_causal_mask_sdpa, and with it a window that sdpa respects."""

    has_is_training: bool = False
    """An argument of that: training skips a mask of None even while tracing."""

    training_looks_while_tracing: bool = False
    """Training does so for a mask of ones, too."""

    passes_4d_masks: bool = False
    """Those for sdpa are additive already. Else they are ones and zeros."""

    checks_maximum: bool = False
    """Of a 4D mask that is passed."""

    looks_while_tracing: bool = True
    """The function for sdpa that is not causal, and gives None for a mask of ones even then."""

    all_ones_is_none: bool = False
    """In that function. Else only for one query, or as many as keys."""

    is_present: bool = False
    """attn_mask.modeling_attn_mask_utils: fake tensors and the capture of a CUDA stream are
    tracing, XPUs unmask."""

    @property
    def version(self) -> str:
        return ".".join(map(str, self.since))

    @property
    def module_name(self) -> str:
        if self.is_present:
            return modeling_attn_mask_utils.__name__
        return f"{__name__}.transformers_{'_'.join(map(str, self.since))}"


def _history() -> tuple[Behaviour, ...]:
    known = [Behaviour(since=(4, 35, 0))]

    def change(minor: int, major: int = 4, **changes: bool) -> None:
        known.append(replace(known[-1], since=(major, minor, 0), **changes))

    change(36, combines_by_adding=False, is_dataclass=True, has_sdpa=True)
    change(37, takes_4d_masks=True, fx_is_tracing=True, unmasks_while_tracing=False)
    change(39, wide_window=True, unmasks_by_value=True, compile_is_tracing=True)
    change(40, has_ignore=True)
    change(
        41,
        has_is_training=True,
        training_looks_while_tracing=True,
        passes_4d_masks=True,
        checks_maximum=True,
        looks_while_tracing=False,
    )
    change(42, all_ones_is_none=True)
    change(45, checks_maximum=False)
    change(46, training_looks_while_tracing=False)
    change(0, major=5, is_present=True)
    return tuple(known)


BEHAVIOURS = _history()


@dataclass(frozen=True)
class TransformersRelease:
    """What ``for_transformers`` gives.

    Attributes:
        version: the first release that behaved in this way, such as "4.37.0".
        modeling_attn_mask_utils: a module with the names, signatures, results and errors of that
            release's ``transformers.modeling_attn_mask_utils``.
    """

    version: str
    modeling_attn_mask_utils: ModuleType = field(repr=False, compare=False)

    def __repr__(self) -> str:
        return f"attn_mask.for_transformers({self.version!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return for_transformers, (self.version,)


def _module(behaviour: Behaviour) -> ModuleType:
    """The file as a module of its own, so that its functions and classes pickle.

    It is executed when it is first asked for something.
    """
    name = behaviour.module_name
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, Path(__file__).with_name("_transformers_4.py"))
    assert spec is not None and spec.loader is not None
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_RELEASES = tuple(
    TransformersRelease(behaviour.version, _module(behaviour)) for behaviour in BEHAVIOURS
)

# Python before 3.12 lets a second thread see a module that the first one is still executing.
_LOADING = threading.Lock()

# PEP 440, where packaging is not to be had. Only the numbers count.
_VERSION = re.compile(
    r"""
    \s* v? (?: 0+ ! )?
    (?P<release> [0-9]+ (?: \. [0-9]+ )* )
    (?: [-_.]? (?: alpha | beta | preview | pre | rc | a | b | c ) [-_.]? [0-9]* )?
    (?: - [0-9]+ | [-_.]? (?: post | rev | r ) [-_.]? [0-9]* )?
    (?: [-_.]? dev [-_.]? [0-9]* )?
    (?: \+ [a-z0-9]+ (?: [-_.] [a-z0-9]+ )* )?
    \s*
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def release_numbers(version: str) -> tuple[int, ...]:
    """(5, 0, 0) of "5", "5.0.0" and "5.0.0rc1"; () of what is no version."""
    match = _VERSION.fullmatch(version)
    release = tuple(map(int, match["release"].split("."))) if match else ()
    return release + (0,) * (3 - len(release)) if match else ()


def for_transformers(version: str) -> TransformersRelease:
    """transformers' mask helpers as a release of transformers had them.

    Args:
        version: of transformers, as its ``__version__`` says it: "4.38.2", "5.0.0rc1",
            "4.39.0.dev0". A pre-release counts as the release that it leads to.

    Returns a TransformersRelease, the same object for all releases that behave alike. A version
    that is newer than any known is taken to behave as the newest known.

    Raises ValueError for versions before 4.35.0, which had no such file, and for what is no
    version; TypeError for what is no string.
    """
    if not isinstance(version, str):
        raise TypeError(
            f"for_transformers: expected version to be a str, but got {type(version).__name__}"
        )
    release = release_numbers(version)
    for behaviour, known in zip(reversed(BEHAVIOURS), reversed(_RELEASES), strict=True):
        if release >= behaviour.since:
            with _LOADING:
                vars(known.modeling_attn_mask_utils)
            return known
    first, *others = (known.version for known in _RELEASES)
    raise ValueError(
        f"for_transformers: expected version to be {first} or later (behaviour changed in "
        f"{', '.join(others)}), but got {version!r}"
    )
