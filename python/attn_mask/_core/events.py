"""What the library tells of its calls: how often masks are made, and how long that takes."""

import functools
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from attn_mask._core import process
from attn_mask._core.scopes import Scope
from attn_mask._core.tracing import is_recording

_P = ParamSpec("_P")
_R = TypeVar("_R")


class MaskCall(NamedTuple):
    """A call that made a mask, or found that none is needed."""

    name: str
    seconds: float
    result: Any
    arguments: tuple[Any, ...]


listeners: Scope[Callable[[MaskCall], None]] = Scope("profile", lambda call: None)
"""Those that hear of the calls of timed functions in their blocks."""

_is_inside = Scope("is_inside", False)

counts: Counter[str] = process.kept("counts", Counter)
"""How often masks were made so far in this process, for status()."""


def count(kind: str) -> None:
    """Nothing while torch.compile traces: a graph would record or guard on the number."""
    if not torch.compiler.is_compiling():
        counts[kind] += 1


def timed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose calls are told; not those within another's, nor what is recorded."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if listeners.open:
            return told(function, function.__name__, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def told(function: Callable[_P, _R], name: str, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """A call of a function, which listeners hear of by this name."""
    if is_recording() or _is_inside.current():
        return function(*args, **kwargs)
    with _is_inside.within(True):
        start = perf_counter()
        result = function(*args, **kwargs)
        seconds = perf_counter() - start
    event = MaskCall(name, seconds, result, (*args, *kwargs.values()))
    for listener in listeners.values():
        listener(event)
    return result
