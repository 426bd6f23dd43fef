"""State of the process. It lives beside the operators, which outlast this package's modules.

A module that is reloaded, or imported again after it was removed from ``sys.modules``, finds here
what the one before it left.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_T = TypeVar("_T")

_kept: dict[str, object] = vars(torch.ops.attn_mask).setdefault("__process__", {})


def kept(name: str, make: Callable[[], _T]) -> _T:
    """What ``make`` gave when this name was first used in this process.

    An object may be of a class of a former module: only its attributes are to be used.
    """
    if name not in _kept:
        _kept.setdefault(name, make())
    return cast(_T, _kept[name])


_latest: dict[str, Callable[..., Any]] = kept("latest", dict)


def register_once(
    name: str, function: Callable[..., Any], register: Callable[[Callable[..., Any]], object]
) -> None:
    """Registers a function with torch, which takes no second one from a module executed again.

    What is registered calls the function that was last given under this name.
    """
    is_first = name not in _latest
    _latest[name] = function
    if is_first:
        register(lambda *args, **kwargs: _latest[name](*args, **kwargs))


def implement(operator: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
    """Registers a kernel of an operator, whose registration goes with the library it is kept in."""
    library = kept("kernels", lambda: torch.library.Library("attn_mask", "IMPL"))
    register_once(
        f"{operator} {key}", kernel, lambda latest: library.impl(operator, latest, key, **options)
    )
