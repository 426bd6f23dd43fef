"""Calls that make masks, told to those who watch them; see profile."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from attn_mask._core.tracing import is_recording

_P = ParamSpec("_P")
_R = TypeVar("_R")

Watcher = Callable[[str, float, Any, tuple[Any, ...]], None]
"""Called with a function's name, its seconds, its result and its arguments."""

watchers: list[Watcher] = []
_is_inside: ContextVar[bool] = ContextVar("is_inside", default=False)


def timed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose calls are told; not those within another's, nor what is recorded."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not watchers or is_recording() or _is_inside.get():
            return function(*args, **kwargs)
        token = _is_inside.set(True)
        start = perf_counter()
        try:
            result = function(*args, **kwargs)
            seconds = perf_counter() - start
        finally:
            _is_inside.reset(token)
        for watcher in tuple(watchers):
            watcher(function.__name__, seconds, result, (*args, *kwargs.values()))
        return result

    return call
