"""Whether graphs are to hold ATen operators alone, since they leave PyTorch."""

from contextvars import ContextVar, Token
from typing import Any

import torch

from attn_mask._core.forking import fork_safe_lock
from attn_mask._core.tracing import is_jit_tracing, is_recording
from attn_mask._graph import aten

_everywhere = False
# Blocks of aten_only that are open in any thread, and in the running thread or task.
_lock = fork_safe_lock("aten_only")
_blocks = 0
_is_open = False
_is_open_here: ContextVar[bool] = ContextVar("attn_mask.aten_only", default=False)


class aten_only:
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
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> "aten_only":
        self._tokens.append(_is_open_here.set(True))
        _count_blocks(1)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._tokens:
            raise RuntimeError(
                "aten_only: expected __enter__ before __exit__, but got __exit__ alone"
            )
        _count_blocks(-1)
        _is_open_here.reset(self._tokens.pop())


def _count_blocks(change: int) -> None:
    global _blocks, _is_open
    with _lock:
        _blocks += change
        _is_open = _blocks > 0


def set_everywhere(is_on: bool) -> None:
    """The same for the whole process, until it is set again."""
    global _everywhere
    _everywhere = is_on


def is_aten_only() -> bool:
    """Whether no operator of ours may be called."""
    return operators() is aten


def operators() -> Any:
    """What makes a mask: the operators, their decompositions, or None in eager code.

    Eager code calls ``_C``, which no graph sees.
    """
    if _everywhere or (_is_open and (torch.compiler.is_dynamo_compiling() or _is_open_here.get())):
        return aten
    if not is_recording():
        return None
    leaves_torch = is_jit_tracing() or torch.onnx.is_in_onnx_export()
    return aten if leaves_torch else torch.ops.attn_mask
