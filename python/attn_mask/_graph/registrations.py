"""Operators in graphs that torch records: what fake tensors and proxies make of them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from attn_mask._core import process
from attn_mask._core.library import operators_that
from attn_mask._core.operators import is_aten_only
from attn_mask._graph.aten import COMPOSITES, TABLE

_ops = torch.ops.attn_mask


def _fake_factory(
    mode: FakeTensorMode, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Runs an operator without tensors under fake tensors.

    They handle operators that can't have tensor arguments and return a Tensor, but not
    those that return an optional one, or several, or just were given none: shapes (or None) and
    errors come from the Meta kernel.
    """
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    result = func(*args, **{**kwargs, "device": torch.device("meta")})
    device = kwargs.get("device") or torch.device("cpu")
    return tree_map_only(torch.Tensor, lambda meta: FakeTensor(mode, meta, device), result)


def _with_operand(
    mode: ProxyTorchDispatchMode, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Exports a rule without operands with one that it does not name.

    AOTInductor loses a list of tensors that is empty.
    """
    rule, operands, *sizes = args
    if torch.compiler.is_exporting() and not operands:
        result = tree_leaves(func(*args, **kwargs))[0]
        with mode:
            operand = torch.empty(0, dtype=torch.bool, device=result.device)
            return mode.__torch_dispatch__(func, types, (rule, [operand], *sizes), kwargs)
    return mode.__torch_dispatch__(func, types, args, kwargs)


def _is_decomposed(func: Any, recording: ProxyTorchDispatchMode | None) -> bool:
    """Whether the graph that is being recorded holds an operator as its decomposition."""
    if is_aten_only() or torch.onnx.is_in_onnx_export():
        return True
    # Before torch 2.13 the table that graphs are recorded with was global.
    table = getattr(proxy_tensor, "CURRENT_DECOMPOSITION_TABLE", None)
    if table is None:
        table = getattr(recording, "decomposition_table", {})
    return func in table and table[func] is TABLE[func]


def _recorded(mode: Any, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Records an operator, as ATen's where a graph is to hold nothing else.

    What may give None is exported as what it writes: whether there is a mask has been decided by
    then, and AOTInductor can't serialize an optional result. An `.out` form meets it when it is
    functionalized: what torch makes of it takes the operator as an argument, which no table of
    decompositions gets to see.
    """
    is_proxy = isinstance(mode, ProxyTorchDispatchMode)
    is_decomposed = _is_decomposed(func, mode if is_proxy else get_proxy_mode())
    if func in _OPTIONAL and (is_decomposed or torch.compiler.is_exporting()):
        if func(*args, **kwargs) is None:  # it runs first, so that errors name it
            return None
        with mode:
            return COMPOSITES[func](*args, **kwargs, is_needed=True)
    if is_decomposed:
        with mode:
            return TABLE[func](*args, **kwargs)
    if func in _OF_RULES:
        return _with_operand(mode, func, types, args, kwargs)
    return mode.__torch_dispatch__(func, types, args, kwargs)


_OPTIONAL, _OF_RULES = (
    {getattr(_ops, name).default for name in operators_that(**{trait: True})}
    for trait in ("may_give_none", "takes_rule")
)


def _register(func: Any, mode: type, rule: Callable[..., Any]) -> None:
    process.register_once(
        f"{func} {mode.__name__}",
        rule,
        functools.partial(torch.library.register_torch_dispatch, func, mode),
    )


for _name in operators_that(is_factory=True, is_host_decision=False):
    _register(f"attn_mask::{_name}", FakeTensorMode, _fake_factory)
for _func in TABLE:
    _register(_func, ProxyTorchDispatchMode, _recorded)
    if _func._overloadname == "out":
        _register(_func, FunctionalTensorMode, _recorded)
