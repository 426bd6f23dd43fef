"""Whether Python code runs for its result or to be recorded as a graph."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

_OF_GRAPHS = (torch.fx.Proxy, FakeTensor)
_CPU = torch.device("cpu")
_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return torch._C._get_tracing_state() is not None


def is_recording() -> bool:
    """Whether a graph of ``torch.ops`` calls is being recorded: torch.compile, torch.export or jit.

    Those see no call that bypasses ``torch.ops``. Dispatch modes (make_fx, fake tensors) do.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


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


def constant_in_graphs(function: _F) -> _F:
    """The function, which dynamo calls and does not trace: torch.compiler.assume_constant_result
    without importing dynamo. Its result is one for good and a constant, or a tuple of some."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_opaque(*tensors: torch.Tensor | None) -> bool:
    """is_tracing of any of them, or whether one stands for many, as torch.vmap maps over it."""
    # What is_tracing asks, since each mask of a model asks this.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if isinstance(tensor, _OF_GRAPHS) or is_batchedtensor(tensor):
            return True
    return False


def evaluate_mapped(function: Callable[[Any], Any], index: torch.Tensor) -> tuple[Any, bool]:
    """A function's result, and whether it depends on the index, as torch.vmap sees it."""
    seen: list[tuple[Any, bool]] = []

    def look(mapped: torch.Tensor) -> torch.Tensor:
        result = function(mapped)
        is_tensor = isinstance(result, torch.Tensor)
        seen.append((result, is_tensor and maybe_get_level(result) == maybe_get_level(mapped)))
        return mapped

    torch.vmap(look, randomness="same")(index[None])
    return seen[0]


def indexing_under_vmap() -> Any:
    """A block in which torch.vmap can index by a tensor of one element; seconds to import."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def is_transformed() -> bool:
    """Whether torch.vmap, torch.func.grad or the like are at work."""
    return peek_interpreter_stack() is not None


def within_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of memory that torch.vmap, torch.func.grad and the like wrap."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def default_device() -> torch.device:
    """torch.get_default_device, also where torch.compile, which can't trace it, follows."""
    if torch.compiler.is_dynamo_compiling():
        return torch.empty(0).device
    # A default device is a mode of torch functions; most often there is none.
    return torch.get_default_device() if torch._C._len_torch_function_stack() > 0 else _CPU


def versions(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """How often tensors were written to; None of those that do not count."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]


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


def is_differentiated_by_transforms(*tensors: torch.Tensor) -> bool:
    """Whether torch.func differentiates what is being called, or a tensor has a tangent.

    Operators with a kernel for the backward pass alone know neither.
    """
    if peek_interpreter_stack() is not None:
        interpreters = torch._C._functorch.get_interpreter_stack()
        if any(of.key() in _DERIVATIVES for of in interpreters or ()):
            return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
