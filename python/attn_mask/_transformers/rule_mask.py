"""RuleMask: a mask that is a tensor to models, and its rule to attention by rule.

What can stay a rule does: slices of queries and keys, moves to another device. Whatever else reads
it gets the dense mask.

In eager code it has no memory. Its readers are seen by both of torch's protocols: functions of
Python by __torch_function__, and by __torch_dispatch__ what comes from C++, as under torch.vmap.
What neither sees gets an error from torch. In a graph of torch.compile only classes without
__torch_dispatch__ can be made, and dynamo misses readers: there it has elements, written by an
operator that the graph drops where nothing reads them.
"""

import copy
import functools
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_mask._core.dense import additive, boolean
from attn_mask._core.log_once import log_detail_once
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.tracing import is_jit_tracing, is_recording, is_tracing

_aten = torch.ops.aten
_META = torch.device("meta")
_logger = logging.getLogger("attn_mask")

_Tensor: Any = torch.Tensor

# What reads and writes no element.
_METADATA = {
    *(_Tensor.dtype.__get__, _Tensor.ndim.__get__, _Tensor.layout.__get__),
    *(_Tensor.requires_grad.__get__, _Tensor.is_leaf.__get__),
    *(_Tensor.grad.__get__, _Tensor.grad_fn.__get__, _Tensor._version.__get__),
    *(_Tensor.shape.__get__, _Tensor.device.__get__, _Tensor.is_nested.__get__),
    *(_Tensor.is_sparse.__get__, _Tensor.is_cpu.__get__, _Tensor.is_cuda.__get__),
    *(_Tensor.is_meta.__get__, _Tensor._base.__get__, _Tensor.requires_grad.__set__),
    *(_Tensor.grad.__set__, _Tensor.requires_grad_),
    *(_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.stride),
    *(_Tensor.storage_offset, _Tensor.is_contiguous, _Tensor.is_floating_point),
    *(_Tensor.is_complex, _Tensor.is_conj, _Tensor.is_neg, _Tensor._is_view),
    *(_Tensor.is_inference, _Tensor.__len__, _Tensor.__hash__),
}

# Where a float tensor meets the mask in one of these, the mask is additive.
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class RuleTensor(torch.Tensor):
    """A RuleMask as a graph of torch.compile makes one, and what those of eager code are made of.

    In our code, isinstance of this stands for both.
    """

    rule: MaskFunction
    q_offset: int
    kv_offset: int
    _dense: torch.Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(batch_size, q_length, kv_length)"""
        batch_size, _, q_length, kv_length = self.shape
        return batch_size, q_length, kv_length

    def as_boolean(self) -> torch.Tensor:
        """The dense mask; made once for all layers."""
        if self._dense is not None and _is_usable(self._dense):
            self.check_unwritten()
            return self._dense
        _name_place()
        dense = boolean(self.rule, *self.sizes, **_at(self))
        if _is_lasting():
            self._dense = dense
        return dense

    def as_additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask, as transformers' eager attention takes it."""
        _name_place()
        return additive(self.rule, *self.sizes, **_at(self), dtype=dtype)

    def check_unwritten(self) -> None:
        """Raises RuntimeError after a write into a view of the dense mask, as ``mask[0]`` is."""
        dense = self._dense
        if dense is None or is_recording() or dense.is_inference():
            return
        if dense._version > 0:
            raise _write("one into a view of it")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func in _METADATA:
            return _of_metadata(func, args, kwargs)
        name = func.__name__
        if name in _STAYS and args and isinstance(args[0], RuleTensor):
            result = _STAYS[name](*args, **kwargs)
            if result is not NotImplemented:
                return result
        written = (*args[:1], kwargs.get("input")) if _is_in_place(name) else ()
        if holds((*written, kwargs.get("out"))):
            raise _write(name)
        return _read(name, func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return make_rule_mask, (self.rule, self.sizes, self.q_offset, self.kv_offset, self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        make, (rule, *others) = self.__reduce_ex__(4)
        return memo.setdefault(id(self), make(copy.deepcopy(rule, memo), *others))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"RuleMask({self.rule!r}, shape={tuple(self.shape)}, q_offset={self.q_offset}, "
            f"kv_offset={self.kv_offset})"
        )

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)


class RuleMask(RuleTensor):
    """A boolean mask [b, 1 or heads, q, kv] that holds its rule in place of elements.

    Attention by rule takes the rule. Slices of queries and keys, and ``to`` another device, are
    RuleMasks. In an addition with floating-point numbers it is the additive mask: 0 where a query
    attends to a key, else the lowest number of their dtype. Anything else that reads it gets the
    boolean mask, which is made once. Writing into it is a RuntimeError.

    Attributes:
        rule: which keys a query attends to.
        q_offset, kv_offset: the positions of the first query and the first key.
        device: of the rule's tensors, and of what the mask becomes.
    """

    _shape: tuple[int, ...]
    _on: torch.device

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size(self._shape)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._on

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.ops.prim.device.default:
            return args[0]._on
        if func in (_aten.detach.default, _aten.alias.default):
            return copy.copy(args[0])
        schema = func._schema
        given = dict(zip((of.name for of in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            alias = argument.alias_info
            if alias is not None and alias.is_write and holds(given.get(argument.name)):
                raise _write(func.__name__)
        return _read(schema.name.removeprefix("aten::"), func, args, kwargs)


def make_rule_mask(
    rule: MaskFunction,
    sizes: tuple[int, int, int],
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> torch.Tensor:
    """A RuleMask of (batch_size, q_length, kv_length).

    The dense mask under torch.jit.trace, which would fix its sizes.
    """
    mask: Any
    dense = None
    if is_jit_tracing() or torch.compiler.is_dynamo_compiling():
        dense = boolean(rule, *sizes, q_offset=q_offset, kv_offset=kv_offset, device=device)
        if is_jit_tracing():
            return dense
        mask = dense.as_subclass(RuleTensor)
    else:
        program = rule.program
        heads = [program.operands[index].shape[1] for index in program.bits]
        shape = sizes[0], max(heads, default=1), *sizes[1:]
        # On "meta", so that a kernel for another device refuses what has no memory.
        mask = torch.Tensor._make_wrapper_subclass(
            RuleMask, shape, dtype=torch.bool, device=_META, dispatch_device=True
        )
        torch._C._set_throw_on_mutable_data_ptr(mask)
        mask._shape = shape
        mask._on = device
    mask._dense = dense
    mask.rule = rule
    mask.q_offset = q_offset
    mask.kv_offset = kv_offset
    return mask  # type: ignore[no-any-return]


def _at(mask: RuleTensor) -> dict[str, Any]:
    return {"q_offset": mask.q_offset, "kv_offset": mask.kv_offset, "device": mask.device}


# What stays a rule. Each takes the arguments of torch.Tensor's method, and returns NotImplemented
# for those that need the dense mask.


def _itself(mask: RuleTensor, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else mask


def _slice(mask: RuleTensor, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    shape = mask.shape
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    if len(dots) == 1:
        missing = (slice(None),) * (5 - len(parts))
        parts = (*parts[: dots[0]], *missing, *parts[dots[0] + 1 :])
    parts = (*parts, *(slice(None),) * (4 - len(parts)))
    if len(parts) != 4 or mask.rule.program.bits:  # bits count rows of the whole mask
        return NotImplemented
    ranges = []
    for part, size in zip(parts, shape, strict=True):
        bounds = _bounds(part, size)
        if bounds is None:
            return NotImplemented
        ranges.append(bounds)
    batch, heads, queries, keys = ranges
    if batch != (0, shape[0]) or heads != (0, shape[1]):
        return NotImplemented
    return make_rule_mask(
        mask.rule,
        (shape[0], queries[1] - queries[0], keys[1] - keys[0]),
        mask.q_offset + queries[0],
        mask.kv_offset + keys[0],
        mask.device,
    )


def _bounds(part: Any, size: int) -> tuple[int, int] | None:
    """Where a slice that is not empty begins and ends."""
    if not isinstance(part, slice) or part.step not in (None, 1):
        return None
    ends = []
    for end, default in ((part.start, 0), (part.stop, size)):
        if end is None:
            end = default
        elif isinstance(end, torch.Tensor) or not hasattr(end, "__index__"):
            return None
        elif end < 0:
            end = max(end + size, 0)
        else:
            end = min(end, size)
        ends.append(end)
    start, stop = ends
    return (start, stop) if start < stop else None


def _to(mask: RuleTensor, *args: Any, **kwargs: Any) -> Any:
    """Of Tensor.to: another device, and no other dtype."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for given in (*args, kwargs.get("other")):
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, bool):
            pass  # non_blocking, copy
        elif isinstance(given, torch.device | str | int):
            device = given
    copies = kwargs.get("copy", False) or any(given is True for given in args[-1:])
    if dtype not in (None, torch.bool) or copies:
        return NotImplemented
    return _moved(mask, mask.device if device is None else torch.device(device))


def _moved(mask: RuleTensor, device: torch.device) -> Any:
    if device.index is None and device.type not in ("cpu", "meta"):
        device = torch.empty(0, device=device).device  # with its index
    if device == mask.device:
        return mask
    return make_rule_mask(mask.rule.to(device), mask.sizes, mask.q_offset, mask.kv_offset, device)


def _cpu(mask: RuleTensor, *args: Any, **kwargs: Any) -> Any:
    return _moved(mask, torch.device("cpu"))


def _cuda(mask: RuleTensor, device: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _moved(mask, torch.device("cuda" if device is None else device))


# Readers that torch's dispatcher does not see, and whose result could be written.


def _numpy(mask: RuleTensor, *args: Any, **kwargs: Any) -> Any:
    array = mask.as_boolean().numpy(*args, **kwargs)
    array.flags.writeable = False
    return array


def _array(mask: RuleTensor, dtype: Any = None, copy: bool | None = None) -> Any:
    array = _numpy(mask)
    others = copy or (dtype is not None and dtype != array.dtype)
    return array.astype(array.dtype if dtype is None else dtype) if others else array


def _dlpack(mask: RuleTensor, *args: Any, **kwargs: Any) -> Any:
    return mask.as_boolean().clone().__dlpack__(*args, **kwargs)


_STAYS: dict[str, Callable[..., Any]] = {
    "__getitem__": _slice,
    "to": _to,
    "cpu": _cpu,
    "cuda": _cuda,
    "contiguous": _itself,
    "detach": _itself,
    "numpy": _numpy,
    "__array__": _array,
    "__dlpack__": _dlpack,
}


# Anything else


def _of_metadata(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_dynamo_compiling() and isinstance(args[0], RuleMask):
        # One of eager code is no tensor to dynamo.
        alike = torch.empty(args[0].shape, dtype=torch.bool, device="meta")
        return func(alike, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _read(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function of what masks are to others."""
    if name in _ADDITIONS:
        terms = (*args[:2], *(kwargs.get(term) for term in ("input", "self", "other")))
        dtype = next((found for found in map(_floating, terms) if found is not None), None)
        if dtype is not None:
            args = tuple(_added(arg, dtype) for arg in args)
            kwargs = {key: _added(value, dtype) for key, value in kwargs.items()}
    return func(*_dense(args), **_dense(kwargs))


def _floating(term: Any) -> torch.dtype | None:
    """The dtype of an addition with such a term, where that is floating-point."""
    if isinstance(term, torch.Tensor):
        return term.dtype if term.dtype.is_floating_point else None
    return torch.get_default_dtype() if isinstance(term, float) else None


def _added(term: Any, dtype: torch.dtype) -> Any:
    return term.as_additive(dtype) if isinstance(term, RuleTensor) else term


def _dense(value: Any) -> Any:
    """An argument with the dense mask in the place of each RuleMask."""
    if isinstance(value, RuleTensor):
        return value.as_boolean()
    if isinstance(value, dict):
        return {key: _dense(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)([_dense(part) for part in value])
    return value


def holds(value: Any) -> bool:
    """Whether it is a RuleMask, or a list of some."""
    if isinstance(value, tuple | list):
        return any([holds(part) for part in value])
    return isinstance(value, RuleTensor)


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in _IN_PLACE
    return name.endswith("_") and name != "share_memory_"  # which writes no element


_IN_PLACE = {
    *("__setitem__", "__set__", "__delete__", "__iadd__", "__iand__", "__idiv__", "__ifloordiv__"),
    *("__ilshift__", "__imod__", "__imul__", "__ior__", "__ipow__", "__irshift__", "__isub__"),
    *("__itruediv__", "__ixor__"),
}


def _write(name: str) -> RuntimeError:
    return RuntimeError(
        "RuleMask: expected no write into a mask that holds a rule in place of elements, "
        f"but got {name}: write into its clone()"
    )


def _is_lasting() -> bool:
    """Whether a tensor that is made now can be used later."""
    return (
        not is_tracing()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_usable(dense: torch.Tensor) -> bool:
    """Autograd takes no tensor that was made in inference mode."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.is_inference_mode_enabled() or not dense.is_inference()


def _name_place() -> None:
    """Logs where a mask becomes dense, once for each line of code."""
    if is_recording() or not _logger.isEnabledFor(logging.DEBUG):
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS_AND_TORCHS):
        frame = frame.f_back
    code = frame.f_code
    log_detail_once(
        "attn_mask: a RuleMask becomes dense in %s (%s:%d)",
        code.co_qualname,
        code.co_filename,
        frame.f_lineno,
    )


_OURS_AND_TORCHS = tuple(
    os.path.dirname(file) + os.sep for file in (os.path.dirname(__file__), torch.__file__)
)


# In compiled code, a RuleMask that comes from eager code is an object of Python, of which dynamo
# sees those methods only that Python functions are.


def _method(function: Any) -> Any:
    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return RuleTensor.__torch_function__(function, (), args, kwargs)

    return method


_KINDS = types.MethodDescriptorType, types.WrapperDescriptorType, types.FunctionType
_LEFT = {"__dir__", "__hash__", "__setstate__", *vars(RuleTensor)}

for _name, _function in (vars(torch._C.TensorBase) | vars(torch.Tensor)).items():
    is_public = _name.endswith("__") or not _name.startswith("_")
    if isinstance(_function, _KINDS) and is_public and _name not in _LEFT:
        setattr(RuleMask, _name, _method(_function))
