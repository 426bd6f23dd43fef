"""Whether graphs are to hold ATen operators alone, since they leave PyTorch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from attn_mask._core import process
from attn_mask._core.library import _C
from attn_mask._core.scopes import Blocks, Scope
from attn_mask._core.tracing import constant_in_graphs, is_jit_tracing

# The operators in ATen's, by name: _graph.aten fills it.
IN_ATEN = process.kept("forms in ATen", SimpleNamespace)

_scope = Scope("aten_only", False)


class aten_only(Blocks[bool]):
    """``with attn_mask.aten_only():`` lets ATen operators make the masks, for the block's length.

    Graphs that are recorded in it (torch.export, torch.compile, make_fx) hold no ``attn_mask::``
    operator, whether this package is called or transformers under ``install()``. Masks are the
    same, bit for bit; to make one takes longer. torch.jit.trace and torch.onnx.export need no such
    block. It holds for the thread or asynchronous task that enters it; torch.compile, which can't
    distinguish threads, obeys it in all of them.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> def masked(scores):
    ...     return scores + attn_mask.additive(attn_mask.causal(), 1, 4, 4)
    >>> with attn_mask.aten_only():
    ...     "attn_mask" in make_fx(masked)(torch.zeros(4, 4)).code
    False
    """

    def __init__(self) -> None:
        super().__init__(_scope, True)


def set_everywhere(is_on: bool) -> None:
    """The same for the whole process, until it is set again."""
    _scope.default = is_on


def is_aten_only() -> bool:
    """Whether no operator of ours may be called."""
    return operators() is IN_ATEN


def operators() -> Any:
    """What makes a mask: operators that take all arguments of their schemas by place.

    In eager code those of ``_C``, which no graph sees; else operators that graphs hold, or the
    decompositions of operators.
    """
    if _scope.default or ((_scope.open or _scope.traced) and _scope.current()):
        return IN_ATEN
    # What is_recording asks, since each mask asks this.
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
        return _C
    leaves_torch = is_jit_tracing() or torch.onnx.is_in_onnx_export()
    return IN_ATEN if leaves_torch else _in_graphs


def writing_to(out: torch.Tensor, ops: Any) -> Any:
    """The operators as ``operators`` found them, but writing to ``out``."""
    return _ByPlace(ops if ops is IN_ATEN else torch.ops.attn_mask, out)


class _ByPlace:
    """Operators that take all arguments by place, as those of ``_C`` do."""

    def __init__(self, operators: Any, out: torch.Tensor | None = None):
        self._operators = operators
        self._out = out

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator, out = getattr(self._operators, name), self._out
        by_place, by_name = _arguments(name)

        def call(*arguments: Any) -> Any:
            named = dict(zip(by_name, arguments[by_place:], strict=False))
            if out is None:
                return operator(*arguments[:by_place], **named)
            operator.out(*arguments[:by_place], **named, out=out)
            return out

        return call


@constant_in_graphs
def _arguments(name: str) -> tuple[int, tuple[str, ...]]:
    """How many arguments of an operator have a place in its schema, and the names of the others."""
    arguments = getattr(torch.ops.attn_mask, name).default._schema.arguments
    by_name = tuple(argument.name for argument in arguments if argument.kwarg_only)
    return len(arguments) - len(by_name), by_name


_in_graphs = _ByPlace(torch.ops.attn_mask)
