"""modeling_attn_mask_utils as each release of transformers had it.

Each is a module in which the file ``legacy`` is executed, with a row of ``behaviours``. That of
transformers 5 is ``attn_mask.modeling_attn_mask_utils``, which adds itself here.
"""

import sys
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from attn_mask._core.forking import fork_safe_lock
from attn_mask._transformers import legacy
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


_DOC = """Drop-in for ``transformers.modeling_attn_mask_utils``, as from {version} on.

Names, signatures, defaults, results and errors are those of that release; docs/upstream.md lists
the few differences. ``attn_mask.modeling_attn_mask_utils`` documents arguments and results.
"""

_FILLING = fork_safe_lock("filling")


class _Module(ModuleType):
    """The file as a release of transformers 4 had it, filled when a name in it is looked up.

    It stands in ``sys.modules``, so that its functions and classes pickle.
    """

    is_filled = False

    def __init__(self, behaviour: Behaviour):
        name = f"{__name__}.transformers_{behaviour.version.replace('.', '_')}"
        super().__init__(name, _DOC.format(version=behaviour.version))
        self.BEHAVIOUR = behaviour

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__all__":
            _fill(self)
        try:
            return vars(self)[name]
        except KeyError:
            text = f"module {self.__name__!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=self) from None


def _fill(module: Any) -> None:
    with _FILLING:
        if not module.is_filled:
            _execute(module, module.BEHAVIOUR)
            _shorten_docstrings(module)
            module.is_filled = True


def _execute(module: ModuleType, behaviour: Behaviour) -> None:
    """Puts the file as a release had it into a module."""
    text = module.__doc__
    loader: Any = legacy.__loader__
    vars(module)["BEHAVIOUR"] = behaviour
    exec(loader.get_code(legacy.__name__), vars(module))
    module.__doc__ = text


def _shorten_docstrings(module: Any) -> None:
    """Leaves what is true of all releases, and says what is true of some."""
    least = "-inf" if module.BEHAVIOUR.combines_by_adding else "the minimum"
    remarks = {
        "to_4d": f"Masked by both holds {least}.",
        "_make_causal_mask": "A window of W lets a query attend to W keys, itself included; since "
        "4.39 one more.",
        "_ignore_causal_mask_sdpa": "Raises ValueError for a 4D mask of another shape than the "
        "embeddings', until 4.40.",
        "_prepare_4d_attention_mask_for_sdpa": "Until 4.40 even while tracing.",
    }
    defined = [getattr(module, name) for name in module.__all__]
    for name, method in vars(module.AttentionMaskConverter).items():
        if name != "_unmask_unattended" and not name.startswith("__"):
            defined.append(getattr(method, "__func__", method))
    for each in defined:
        if isinstance(each, FunctionType | type):
            first, remark = str(each.__doc__).split("\n\n")[0], remarks.get(each.__name__)
            each.__doc__ = f"{first}\n\n{remark}" if remark else first


def _release(behaviour: Behaviour) -> TransformersRelease:
    module = _Module(behaviour)
    # One that is there stays when this file is reloaded.
    return TransformersRelease(behaviour.version, sys.modules.setdefault(module.__name__, module))


_RELEASES = tuple(map(_release, BEHAVIOURS[:-1]))
# Of transformers 5. Reloading this file leaves it.
_present: TransformersRelease


def add_present(module: ModuleType) -> None:
    """Makes a module transformers 5's, which for_transformers gives from then on."""
    global _present
    _execute(module, BEHAVIOURS[-1])
    _present = TransformersRelease(BEHAVIOURS[-1].version, module)


def release_numbers(version: str) -> tuple[int, ...]:
    """(5, 0, 0) of "5", "5.0.0" and "5.0.0rc1"; () of what is no version."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return ()
    return () if parsed.epoch else parsed.release + (0,) * (3 - len(parsed.release))


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
    releases = (*_RELEASES, _present)
    for behaviour, known in zip(reversed(BEHAVIOURS), reversed(releases), strict=True):
        if release >= behaviour.since:
            if known is not _present:
                _fill(known.modeling_attn_mask_utils)
            return known
    first, *others = (known.version for known in releases)
    raise ValueError(
        f"for_transformers: expected version to be {first} or later (behaviour changed in "
        f"{', '.join(others)}), but got {version!r}"
    )
