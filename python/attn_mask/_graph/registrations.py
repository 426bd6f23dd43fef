"""Operators in graphs that torch records: what fake tensors and proxies make of them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from attn_mask._core import process
from attn_mask._core.library import operators_that
from attn_mask._core.operators import is_aten_only
from attn_mask._core.sdpa_decision import is_unmasked
from attn_mask._graph.aten import TABLE

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
    with mode:
        return tree_map_only(
            torch.Tensor,
            lambda meta: torch.empty_strided(
                meta.shape, meta.stride(), dtype=meta.dtype, device=device
            ),
            result,
        )


def _certain(
    mode: ProxyTorchDispatchMode, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Exports an operator that may return None as one that can't.

    Whether there is a mask has been decided by then, and AOTInductor can't serialize an optional
    result. The operator runs first, so that errors name it.
    """
    if not torch.compiler.is_exporting():
        return mode.__torch_dispatch__(func, types, args, kwargs)
    result = func(*args, **kwargs)
    if result is None:
        return None
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dtype, (batch_size, _, q_length, kv_length) = result.dtype, result.shape
    options = {"dtype": dtype, "stride_multiple": given.get("stride_multiple", 1)}
    window = given.get("sliding_window")
    with mode:
        if "mask" in given:
            return _ops._prepare_4d_attention_mask(given["mask"], given.get("tgt_len"), **options)
        mask = given.get("attention_mask")
        if mask is None:
            return _ops._make_causal_mask(
                (batch_size, q_length),
                kv_length - q_length,
                window,
                device=result.device,
                **options,
            )
        unmask = False
        if func is _ops._prepare_4d_causal_attention_mask_for_sdpa.default:
            unmask = is_unmasked(mask, given.get("unmask_unattended"))
        if mask.dim() == 2:
            return _ops.to_4d(
                mask,
                q_length,
                key_value_length=kv_length,
                sliding_window=window,
                unmask_unattended=unmask,
                **options,
            )
        if unmask:
            lowest = torch.finfo(given["inputs_embeds"].dtype).min
            return _ops._unmask_unattended(mask, lowest, stride_multiple=options["stride_multiple"])
        return TABLE[func](**given, is_needed=True)


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


def _in_aten(
    record: Callable[..., Any],
    mode: ProxyTorchDispatchMode,
    func: Any,
    types: Any,
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Records an operator as ATen's where a graph is to hold nothing else."""
    if not _is_decomposed(func, mode):
        return record(mode, func, types, args, kwargs)
    if record is _certain:
        if func(*args, **kwargs) is None:
            return None
        kwargs = {**kwargs, "is_needed": True}
    with mode:
        return TABLE[func](*args, **kwargs)


def _without_effect(
    mode: FunctionalTensorMode, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Functionalizes an `.out` form.

    What torch makes of it takes the operator as an argument, which no table of decompositions gets
    to see: where there is one for it, that is used here.
    """
    if not _is_decomposed(func, get_proxy_mode()):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    with mode:
        return TABLE[func](*args, **kwargs)


_RECORDED = {
    **dict.fromkeys(operators_that(may_give_none=True), _certain),
    **dict.fromkeys(operators_that(takes_rule=True), _with_operand),
}


def _register(func: Any, mode: type, rule: Callable[..., Any]) -> None:
    process.register_once(
        f"{func} {mode.__name__}",
        rule,
        functools.partial(torch.library.register_torch_dispatch, func, mode),
    )


for _name in operators_that(is_factory=True, is_host_decision=False):
    _register(f"attn_mask::{_name}", FakeTensorMode, _fake_factory)
for _func in TABLE:
    _name = _func._schema.name.partition("::")[2]
    _record = _RECORDED.get(_name, ProxyTorchDispatchMode.__torch_dispatch__)
    if _func._overloadname == "out":
        _record = ProxyTorchDispatchMode.__torch_dispatch__
        _register(_func, FunctionalTensorMode, _without_effect)
    _register(_func, ProxyTorchDispatchMode, functools.partial(_in_aten, _record))
