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

_MASKS = ("attention_mask_2d", "attention_mask", "mask")
_OF_ATTENTION = ("query", "key", "value", "grad_out", "out", "lse", "grad_lse")
_POSITIONS = ("q_positions", "kv_positions")

_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _is_none(value: Any) -> bool:
    return value is None


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
    rank = tensor.dim() - (dim is not None)
    if dim is None:
        return tensor if rank < 2 else _operand(tensor, None, n, batch_size)
    tensor = tensor.movedim(dim, 0)
    if rank < 2:
        tensor = tensor[:, None] if rank == 1 else tensor[:, None, None]
    return _in_batch(tensor, 0, n, batch_size)


def _batch_size(given: dict[str, Any], dims: dict[str, Any]) -> int:
    """Of one call among those that are mapped over."""
    if "batch_size" in given:
        size: int = given["batch_size"]
        return size
    if "input_shape" in given:
        size = given["input_shape"][0]
        return size
    name = next(name for name in (*_MASKS, *_OF_ATTENTION) if name in given)
    rows: int = given[name].shape[1 if dims[name] == 0 else 0]
    return rows


def _mapped(func: Any, given: dict[str, Any], dims: dict[str, Any]) -> Any:
    """``func`` of all that is mapped over at once; the result's first dimension is the mapped."""
    if "expanded_mask" in given:
        given["expanded_mask"] = given["expanded_mask"].movedim(dims["expanded_mask"], 0)
        return func(**given)
    leaves = tree_leaves((given, dims), is_leaf=_is_none)
    count = len(leaves) // 2
    n = next(
        tensor.shape[dim]
        for tensor, dim in zip(leaves[:count], leaves[count:], strict=True)
        if isinstance(tensor, torch.Tensor) and dim is not None
    )
    batch_size = _batch_size(given, dims)
    for name, value in given.items():
        dim = dims[name]
        if name == "operands":
            given[name] = [
                _operand(*operand, n, batch_size) for operand in zip(value, dim, strict=True)
            ]
        elif not isinstance(value, torch.Tensor):
            continue
        elif name in _POSITIONS:
            given[name] = _positions(value, dim, n, batch_size)
        elif name == "bias":
            given[name] = _operand(value, dim, n, batch_size)
        elif (
            name in (*_MASKS, *_OF_ATTENTION) or dim is not None
        ):  # all but embeddings that are the same for all
            given[name] = _in_batch(value, dim, n, batch_size)
    if "batch_size" in given:
        given["batch_size"] = n * batch_size
    if "input_shape" in given:
        given["input_shape"] = (n * batch_size, *given["input_shape"][1:])
    result = func(**given)
    return tree_map_only(torch.Tensor, lambda of: of.unflatten(0, (n, batch_size)), result)


def _register(library: torch.library.Library, name: str) -> None:
    func = getattr(torch.ops.attn_mask, name).default
    arguments = [argument.name for argument in func._schema.arguments]

    # As torch.library.register_vmap does it, which ignores arguments by name.
    def rule(keys: Any, *args: Any, **kwargs: Any) -> Any:
        level = retrieve_current_functorch_interpreter().level()
        given, dims = unwrap_batched(dict(zip(arguments, args, strict=False)) | kwargs, level)
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            if all(dim is None for dim in tree_leaves(dims, is_leaf=_is_none)):
                return func(*args, **kwargs)
            result = _mapped(func, dict(given), dims)
        return None if result is None else wrap_batched(result, 0, level)

    process.register_once(
        f"vmap {name}",
        rule,
        lambda latest: library.impl(name, latest, "FuncTorchBatched", with_keyset=True),
    )


# Registrations go with the library.
_library = process.kept("vmap", lambda: torch.library.Library("attn_mask", "IMPL"))
for _name in (
    *operators_that(writes_mask=True, takes_tensors=True),
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
):
    _register(_library, _name)
