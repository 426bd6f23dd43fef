"""Operators under torch.vmap: what is mapped over becomes a part of the batch."""

from typing import Any

import torch
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    unwrap_batched,
    wrap_batched,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_leaves, tree_map_only

from attn_mask._core import process
from attn_mask._core.library import operators_that

_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _in_batch(tensor: torch.Tensor, dim: int | None, n: int, batch_size: int) -> torch.Tensor:
    """[n * b, ...] of [b or 1, ...], which is mapped over ``dim`` or the same for all."""
    moved = tensor[None] if dim is None else tensor.movedim(dim, 0)
    return moved.expand(n, batch_size, *moved.shape[2:]).flatten(0, 1)


def _operand(tensor: torch.Tensor, dim: int | None, n: int, batch_size: int) -> torch.Tensor:
    """The same, where one row serves the whole batch."""
    if dim is None and tensor.shape[0] == 1:
        return tensor
    return _in_batch(tensor, dim, n, batch_size)


def _positions(tensor: torch.Tensor, dim: int | None, n: int, batch_size: int) -> torch.Tensor:
    """Positions or an offset, [n * b, length or 1] where they are not the same for all."""
    if dim is None and tensor.dim() < 2:
        return tensor
    if dim is not None:
        tensor, dim = tensor.movedim(dim, 0), 0
        while tensor.dim() < 3:
            tensor = tensor[:, None]
    return _operand(tensor, dim, n, batch_size)


def _embeddings(tensor: torch.Tensor, dim: int | None, n: int, batch_size: int) -> torch.Tensor:
    return tensor if dim is None else _in_batch(tensor, dim, n, batch_size)


_BY_NAME = {
    "operands": _operand,
    "bias": _operand,
    "q_positions": _positions,
    "kv_positions": _positions,
    "inputs_embeds": _embeddings,
}


def _batch_size(given: dict[str, Any], dims: dict[str, Any]) -> int:
    """Of one call among those that are mapped over: an argument, or that of the first tensor."""
    if "batch_size" in given:
        size: int = given["batch_size"]
        return size
    if "input_shape" in given:
        size = given["input_shape"][0]
        return size
    name = next(name for name, value in given.items() if isinstance(value, torch.Tensor))
    rows: int = given[name].shape[1 if dims[name] == 0 else 0]
    return rows


def _mapped(func: Any, given: dict[str, Any], dims: dict[str, Any], n: int) -> Any:
    """``func`` of all that is mapped over at once; the result's first dimension is the mapped."""
    if "expanded_mask" in given:
        given["expanded_mask"] = given["expanded_mask"].movedim(dims["expanded_mask"], 0)
        return func(**given)
    batch_size = _batch_size(given, dims)
    for name, value in given.items():
        in_batch = _BY_NAME.get(name, _in_batch)
        if name == "operands":
            operands = zip(value, dims[name], strict=True)
            given[name] = [in_batch(*operand, n, batch_size) for operand in operands]
        elif isinstance(value, torch.Tensor):
            given[name] = in_batch(value, dims[name], n, batch_size)
        elif name == "batch_size":
            given[name] = n * batch_size
        elif name == "input_shape":
            given[name] = (n * batch_size, *value[1:])
    result = func(**given)
    return tree_map_only(torch.Tensor, lambda of: of.unflatten(0, (n, batch_size)), result)


def _register(name: str) -> None:
    func = getattr(torch.ops.attn_mask, name).default
    arguments = [argument.name for argument in func._schema.arguments]

    # As torch.library.register_vmap does it, which ignores arguments by name.
    def rule(keys: Any, *args: Any, **kwargs: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        given, dims = unwrap_batched(dict(zip(arguments, args, strict=False)) | kwargs, level)
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            if all(dim is None for dim in tree_leaves(dims)):
                return func(*args, **kwargs)
            result = _mapped(func, dict(given), dims, interpreter.batch_size())
        return None if result is None else wrap_batched(result, 0, level)

    process.implement(name, rule, "FuncTorchBatched", with_keyset=True)


for _name in (
    *operators_that(writes_mask=True, takes_tensors=True),
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
):
    _register(_name)
