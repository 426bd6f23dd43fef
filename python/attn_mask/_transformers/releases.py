"""modeling_attn_mask_utils as each release of transformers had it.

Transformers 5 is ``attn_mask.modeling_attn_mask_utils``; the earlier ones are modules that
``transformers_4`` fills, one for each row of ``behaviours``.
"""

import re
import sys
from dataclasses import dataclass, field
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import LazyLoader, module_from_spec
from types import ModuleType

from attn_mask import modeling_attn_mask_utils
from attn_mask._core.forking import fork_safe_lock
from attn_mask._transformers.behaviours import BEHAVIOURS, Behaviour


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


class _Filler(Loader):
    """Puts the file as a release had it into a module."""

    def __init__(self, behaviour: Behaviour):
        self._behaviour = behaviour

    def exec_module(self, module: ModuleType) -> None:
        from attn_mask._transformers import transformers_4

        transformers_4.fill(module, self._behaviour)


def _module(behaviour: Behaviour) -> ModuleType:
    """The file as a module of its own, so that its functions and classes pickle.

    It is filled at the first access to an attribute.
    """
    if behaviour.is_present:
        return modeling_attn_mask_utils
    name = f"{__name__}.transformers_{behaviour.version.replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    loader = LazyLoader(_Filler(behaviour))
    module = module_from_spec(ModuleSpec(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


_RELEASES = tuple(
    TransformersRelease(behaviour.version, _module(behaviour)) for behaviour in BEHAVIOURS
)

# Python before 3.12 lets a second thread see a module that the first one is still executing.
_LOADING = fork_safe_lock("loading")

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
        version: of transformers, as in its ``__version__``: "4.38.2", "5.0.0rc1",
            "4.39.0.dev0". A pre-release counts as the release that it leads to.

    Returns a TransformersRelease, the same object for all releases that behave alike. A version
    that is newer than any known is taken to behave as the newest known.

    Raises ValueError for versions before 4.35.0, which had no such file, and for what is no
    version; TypeError for what is no string.

    >>> attn_mask.for_transformers("4.38.2").version
    '4.37.0'
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
