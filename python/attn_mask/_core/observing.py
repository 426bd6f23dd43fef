"""What reaches attention while a block runs: torch's function, and those of transformers."""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attn_mask._core.scopes import Replacements, Scope
from attn_mask._core.tracing import is_recording

__all__ = ["AttentionCall", "observed"]


class AttentionCall(NamedTuple):
    """One call of attention, before it runs."""

    where: str
    """"scaled_dot_product_attention", or the module's class and the name of its attention."""
    how: Literal["sdpa", "eager", "other"]
    """Torch's function, transformers' eager attention, or a function of transformers that is called
    for a module and may call the first."""
    query: Any
    key: Any
    mask: Any
    module: Any = None
    """That of "eager" and "other"; of "sdpa" too, if it is called by such a function."""


Observer = Callable[[AttentionCall], None]

_SDPA = F.scaled_dot_product_attention

_observers: Scope[Observer] = Scope("observers", lambda call: None)
# Of the blocks whose modes are off because torch runs one of its Python functions, as
# multi_head_attention_forward, for them.
_without_modes: Scope[Observer] = Scope("without_modes", lambda call: None)
# For whose attention this code runs.
_module: Scope[Any] = Scope("module", None)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Calls ``observer`` before each attention that this thread runs in the block.

    Blocks nest: the observers of all see a call. What torch.compile and torch.export record is not
    seen. Functions of transformers are seen from the release on whose models look them up by
    ``AttentionInterface.get_interface``, and if transformers was imported before the block.
    """
    with _observers.within(observer), _replacements, _Mode(observer):
        yield


class _Mode(TorchFunctionMode):
    """Sees calls of torch's function, by whatever name a program imported it."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_recording():
            return func(*args, **kwargs)
        if func is _SDPA:
            self.observer(_sdpa_call(args, kwargs))
        if not isinstance(func, types.FunctionType):
            return func(*args, **kwargs)
        with _without_modes.within(self.observer):
            return func(*args, **kwargs)


def _sdpa_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    """Arguments that are missing are None: it is torch that names them."""
    given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
    query, key, mask = map(given.get, ("query", "key", "attn_mask"))
    return AttentionCall(
        "scaled_dot_product_attention", "sdpa", query, key, mask, _module.current()
    )


@functools.wraps(_SDPA)
def _observed_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor:
    if not is_recording():
        for observer in _without_modes.values():
            observer(_sdpa_call(args, kwargs))
    return _SDPA(*args, **kwargs)


def _observed_get_interface(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_interface)
    def look_up(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        interface = get_interface(self, attn_implementation, default)
        if is_recording() or not _observers.values():
            return interface
        is_eager = interface is default  # the model's own

        @functools.wraps(interface)
        def attend(
            module: Any,
            query: Any,
            key: Any,
            value: Any,
            attention_mask: Any = None,
            *rest: Any,
            **named: Any,
        ) -> Any:
            name = "eager" if is_eager else attn_implementation
            where = f"{name} attention of {type(module).__name__}"
            how: Literal["eager", "other"] = "eager" if is_eager else "other"
            for observer in _observers.values():
                observer(AttentionCall(where, how, query, key, attention_mask, module))
            with _module.within(module):
                return interface(module, query, key, value, attention_mask, *rest, **named)

        return attend

    return look_up


def _attributes() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    found: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (F, "scaled_dot_product_attention", lambda function: _observed_sdpa)
    ]
    modeling = sys.modules.get("transformers.modeling_utils")
    interface = getattr(modeling, "AttentionInterface", None)
    if hasattr(interface, "get_interface"):
        found.append((interface, "get_interface", _observed_get_interface))
    return found


_replacements = Replacements(_attributes)
