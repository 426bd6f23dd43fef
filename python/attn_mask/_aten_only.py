"""Whether graphs are to hold ATen operators alone, since they leave PyTorch."""

from contextvars import ContextVar, Token
from typing import Any

import torch

from attn_mask import _decompositions
from attn_mask._tracing import is_jit_tracing, is_recording

__all__ = ["aten_only"]

# Read in eager code and, with a guard, by torch.compile.
_everywhere = False
# Whether there ever was a block: until then nothing else is looked at.
_is_used = False
_here: ContextVar[bool] = ContextVar("attn_mask.aten_only", default=False)


class aten_only:
    """``with attn_mask.aten_only():`` lets masks be made by ATen operators, for the block's length.

    Graphs that are recorded in it (torch.export, torch.compile, make_fx) hold no ``attn_mask::``
    operator, whatever asks for a mask by this package or under ``install()``. Masks are the same,
    bit for bit; in eager code they take longer. Holds for the thread or asynchronous task that
    enters it. torch.jit.trace and torch.onnx.export do so by themselves.
    """

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> "aten_only":
        global _is_used
        _is_used = True
        self._tokens.append(_here.set(True))
        return self

    def __exit__(self, *error: object) -> None:
        _here.reset(self._tokens.pop())


def set_everywhere(is_on: bool) -> None:
    """The same for the whole process, as ``install(aten_only=True)`` does."""
    global _everywhere
    _everywhere = is_on


def is_aten_only() -> bool:
    """Whether no operator of ours may be called."""
    if _everywhere or (_is_used and _here.get()):
        return True
    return is_recording() and (is_jit_tracing() or torch.onnx.is_in_onnx_export())


def operators() -> Any:
    """What a mask is to be made with: the operators, their decompositions, or None in eager code.

    Eager code calls ``_C``, which no graph sees.
    """
    if is_aten_only():
        return _decompositions
    return torch.ops.attn_mask if is_recording() else None
