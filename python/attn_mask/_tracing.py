"""Whether Python code runs for its result or to be recorded as a graph."""

from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

_OF_GRAPHS = (torch.fx.Proxy, FakeTensor)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return torch._C._get_tracing_state() is not None


def is_recording() -> bool:
    """Whether a graph of ``torch.ops`` calls is being recorded: torch.compile, torch.export or jit.

    Those see no call that bypasses ``torch.ops``. Dispatch modes (make_fx, fake tensors) do.
    """
    return torch.compiler.is_compiling() or is_jit_tracing()


def is_exporting() -> bool:
    """torch.compiler.is_exporting, which is true of all that torch 2.11 compiles."""
    return torch.compiler._is_exporting_flag


def is_tracing(tensor: Any = None) -> bool:
    """Whether values must not be read, because they would be fixed in a graph.

    True under torch.compile, torch.export and torch.jit.trace, while a CUDA stream is being
    captured, and for a ``tensor`` that is an fx.Proxy or a FakeTensor. Mirrors ``is_tracing`` of
    transformers 5.
    """
    if is_recording():
        return True
    # A stream can only be captured once CUDA is in use; the query itself would initialise it.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    return isinstance(tensor, _OF_GRAPHS)


def is_opaque(tensor: torch.Tensor) -> bool:
    """is_tracing, and of a tensor that stands for many, as torch.vmap maps over it."""
    return is_tracing(tensor) or is_batchedtensor(tensor)


def within_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of memory that torch.vmap, torch.func.grad and the like wrap."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def default_device() -> torch.device:
    """torch.get_default_device, also where torch.compile, which can't trace it, follows."""
    return (
        torch.empty(0).device
        if torch.compiler.is_dynamo_compiling()
        else torch.get_default_device()
    )


def is_known(fact: bool | torch.SymBool | torch.Tensor) -> bool:
    """Whether a comparison of sizes holds for all sizes that a graph is recorded for."""
    if not isinstance(fact, torch.SymBool):
        return fact is True  # not the tensor that jit records
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(fact)


def holds(fact: bool | torch.SymBool | torch.Tensor) -> bool:
    """Whether a comparison of sizes holds; False of sizes that only a later run decides.

    Branches on it leave what is undecided to the general case: "unbacked" sizes, and those
    that torch.jit.trace records.
    """
    if isinstance(fact, torch.Tensor):
        return False
    if not torch.compiler.is_compiling():
        return bool(fact)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(fact)
