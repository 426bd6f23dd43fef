"""Attention by a rule, which never holds a tensor of q_length x kv_length.

Shapes: b batch_size, h heads, q q_length, kv kv_length, d head size.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_flag, check_states, checked_device, checked_ints
from attn_mask._core.library import _C
from attn_mask._core.log_once import warn_once
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.operators import IN_ATEN, operators
from attn_mask._core.program import Program
from attn_mask._core.tracing import (
    default_device,
    is_differentiated_by_transforms,
    is_known,
    is_recording,
    is_transformed,
    versions,
)
from attn_mask._core.write import (
    BOOLEAN,
    Axis,
    Calls,
    Geometry,
    axis,
    checked_offsets,
    tile_height,
    write_mask,
)

__all__ = ["AttentionPlan", "Segment", "attention_plan", "scaled_dot_product_attention"]

_NAME = "scaled_dot_product_attention"

# What tells torch's flop counter of attention, once it is loaded: _flops fills it.
TELL_COUNTERS: list[Callable[[], None]] = []


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Callable[..., Any],
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    q_offset: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor = 0,
    return_lse: bool = False,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention`` by a rule in place of a mask::

        out = attn_mask.scaled_dot_product_attention(
            query, key, value, causal() & sliding_window(1024)
        )

    Time and memory are those of the keys that the rule shows: a plan, which ``attention_plan``
    prints, cuts queries into tiles, and ATen's kernels see no other keys than a tile's. A query to
    which no key is visible gives zeros, and no gradient.

    Args:
        query: [b, h, q, d], of float16, bfloat16, float32 or float64.
        key: [b, h, kv, d]; with ``enable_gqa`` a number of heads that divides h.
        value: [b, heads of key, kv, width]; a width other than d is slower.
        rule: a rule of ``attn_mask.rules``, or any mask function, which is called for all pairs of
            query and key: so many queries at a time in eager code, and at once in a graph.
        dropout_p: 0, since there is no dropout by tiles.
        scale: what scores are multiplied by; by default 1 / sqrt(d).
        enable_gqa: whether several heads of the query share one of the key.
        q_offset: the first query's position, an int or a tensor [] or [b, 1]; by default, where
            the last query and the last key are the same token.
        kv_offset: the first key's position.
        return_lse: whether to return the log-sum-exp of the scores, too.

    Returns the result [b, h, q, width] of query's dtype; with ``return_lse`` a pair of it and the
    natural logarithms [b, h, q], float32 (of float64: float64), -inf for a query without a key.
    Both can be differentiated once, for query, key and value. Under torch.func's derivatives and
    with tangents of forward mode, of any order, a tensor of all scores is held.

    Raises NotImplementedError for dropout and for second derivatives by torch.autograd; ValueError
    for shapes and devices that do not fit, tables of the rule that are too short, and negative
    positions; TypeError for dtypes and for what is no tensor or rule.

    >>> query = torch.zeros(1, 1, 3, 4)
    >>> value = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None].expand(1, 1, 3, 4)
    >>> attn_mask.scaled_dot_product_attention(query, query, value, attn_mask.causal())[0, 0, :, 0]
    tensor([1.0000, 1.5000, 2.0000])
    """
    if has_torch_function_variadic(query, key, value):
        return handle_torch_function(
            scaled_dot_product_attention,
            (query, key, value),
            query,
            key,
            value,
            rule,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            q_offset=q_offset,
            kv_offset=kv_offset,
            return_lse=return_lse,
        )
    query, key, value = _checked(query, key, value, dropout_p, scale, enable_gqa)
    if not isinstance(rule, MaskFunction):
        rule = mask_rules.rule_of(_NAME, "rule", rule)
    q_length, kv_length = query.shape[2], key.shape[2]
    q_offset, kv_offset = checked_offsets(_NAME, q_length, kv_length, q_offset, kv_offset)
    ops, whole = _operators(query, key, value)
    if ops is _C and type(q_offset) is type(kv_offset) is int:
        program, ends = rule.known_program, (q_offset + q_length, kv_offset + kv_length)
        if program.is_written(query.shape[0], q_offset, ends[0], kv_offset, ends[1], query.device):
            limits: Sequence[int | None] = (None, None)
            if query.is_cuda:
                limits = _limits(program, query, key, (q_offset, kv_offset))
            of_rule, where = (program.code, program.operands), (q_offset, kv_offset, None, None)
            result = ops.scaled_dot_product_attention(
                *of_rule, query, key, value, *where, scale, enable_gqa, *limits
            )
            return result if return_lse else result[0]
    keys = axis(_NAME, "kv_offset", kv_length, kv_offset, query.device)
    queries = axis(_NAME, "q_offset", q_length, q_offset, query.device)
    result = _Attention(rule, queries, keys, scale, enable_gqa, ops, whole)(query, key, value)
    return result if return_lse else result[0]


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: Any,
    scale: Any,
    enable_gqa: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors as autocast has them; operators check the rest."""
    if not isinstance(dropout_p, int | float):
        raise TypeError(
            f"{_NAME}: expected dropout_p to be a number, but got {type(dropout_p).__name__}"
        )
    if dropout_p != 0:
        raise NotImplementedError(
            f"{_NAME}: expected dropout_p to be 0, since tiles have no dropout, but got {dropout_p}"
        )
    check_states(_NAME, query=query, key=key, value=value)
    if type(enable_gqa) is not bool:
        check_flag(_NAME, "enable_gqa", enable_gqa)
    if scale is not None and not isinstance(scale, float | int | torch.SymFloat):
        raise TypeError(
            f"{_NAME}: expected scale to be a number or None, but got {type(scale).__name__}"
        )
    kind = query.device.type
    # torch has no autocast for "meta", and raises.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in (query, key, value)
    )
    return query, key, value


def _operators(*tensors: torch.Tensor) -> tuple[Any, bool]:
    """The operators, and whether a mask function is called for all queries at once."""
    ops = operators()
    if ops is not _C:
        return ops, is_recording()
    if "torch.utils.flop_counter" in sys.modules:
        for tell in TELL_COUNTERS:
            tell()
    whole = is_transformed()
    if is_differentiated_by_transforms(*tensors):
        warn_once(
            "attention within torch.func",
            "%s: torch.func or a tangent differentiates it: it holds a tensor of all scores",
            _NAME,
        )
        return IN_ATEN, True
    return ops, whole


def _limits(
    program: Program,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: tuple[int, int],
) -> Sequence[int | None]:
    """How many documents there are on a GPU, and how long, for which the host waits for it; not
    again while the rule's tensors are unchanged."""
    if program.limits is not None:
        return program.limits
    code, operands = program.code, program.operands
    if not program.has_documents or query.dtype not in (torch.float16, torch.bfloat16):
        return None, None
    if is_transformed():  # ids may be mapped over
        return None, None
    problem = query.shape[0], query.shape[2], key.shape[2], *offsets, query.device
    written = versions(operands)
    state = None if written is None else (problem, written)
    if state is not None and program.found_limits is not None and program.found_limits[0] == state:
        return program.found_limits[1]
    found: Sequence[int | None] = _C._document_limits(code, operands, *problem) or (None, None)
    program.found_limits = None if state is None else (state, found)
    return found


def _check_lengths(name: str, q_length: int, kv_length: int) -> None:
    """As the operators do."""
    if any(is_known(length >= 2**31) for length in (q_length, kv_length)):
        raise ValueError(
            f"{name}: expected fewer than 2^31 queries and keys, but got {q_length} and {kv_length}"
        )


class _Attention(NamedTuple):
    """What attention is called with beside tensors."""

    rule: MaskFunction
    queries: Axis
    keys: Axis
    scale: float | None
    enable_gqa: bool
    ops: Any
    """As ``operators`` gives them."""
    whole: bool
    """Whether a mask function is called for all queries at once, as graphs and torch.func need."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        rule, queries, keys = self.rule, self.queries, self.keys
        program = rule.known_program if self.ops is _C else rule.program
        is_recorded = self.ops is not _C and is_recording()
        # Before the first position of a table, mask functions count from its end.
        is_before_tables = program.check_positions(_NAME, queries, keys, is_recorded)
        if not program.calls and program.is_boolean and not is_before_tables:
            operands = program.operands
            if not is_recorded:
                operands = program.fitting(query.shape[0], query.device)
            limits: Sequence[int | None] = program.limits or (None, None)
            at_offsets = queries.positions is keys.positions is None
            if query.is_cuda and at_offsets and self.ops is _C:
                limits = _limits(program, query, key, (queries.start, keys.start))
            of_rule = program.code, operands, queries, keys
            return self._call(*of_rule, query, key, value, limits=limits)
        sizes = query.shape[0], queries.length, keys.length
        _check_lengths(_NAME, *sizes[1:])
        if not program.calls:  # those are named where they are called
            warn_once(
                "attention before tables",
                "%s: %r begins before its tables: it is evaluated for all pairs of query and key",
                _NAME,
                rule,
            )
        heads = query.shape[1]
        if self.whole:
            geometry = Geometry(sizes[0], sizes[1], queries, sizes[2], keys)
            mask = write_mask(_NAME, rule, geometry, None, query.device, BOOLEAN, Calls(heads))
            code = [mask_rules.BITS, 0]
            return self._call(code, [mask], Axis(sizes[1]), Axis(sizes[2]), query, key, value)
        if 0 in sizes or heads == 0:
            return self._call(
                [mask_rules.ALL], [], Axis(sizes[1]), Axis(sizes[2]), query, key, value
            )
        out, lse = _ByTiles.apply(query, key, value, self)
        return out, lse

    def _call(
        self,
        code: Sequence[int],
        operands: Sequence[torch.Tensor],
        queries: Axis,
        keys: Axis,
        *tensors: torch.Tensor,
        limits: Sequence[int | None] = (None, None),
        backward: bool = False,
        grad_lse: torch.Tensor | None = None,
    ) -> Any:
        """The operator."""
        where = queries.start, keys.start, queries.positions, keys.positions
        arguments = code, operands, *tensors, *where, self.scale, self.enable_gqa, *limits
        if backward:
            return self.ops.scaled_dot_product_attention_backward(*arguments, grad_lse)
        return self.ops.scaled_dot_product_attention(*arguments)

    def tiles(self, query: torch.Tensor) -> Any:
        """(the rows of a tile, its mask as a program's operand), for all rows."""
        batch_size, heads = query.shape[:2]
        for rows in self.queries.tiles(batch_size * heads * self.keys.length):
            geometry = Geometry(batch_size, rows.length, rows, self.keys.length, self.keys)
            mask = write_mask(_NAME, self.rule, geometry, None, query.device, BOOLEAN, Calls(heads))
            yield slice(rows.first, rows.first + rows.length), mask

    def of_tile(self, mask: torch.Tensor, *tensors: torch.Tensor, **of_backward: Any) -> Any:
        """The operator, of a tile."""
        queries, keys = (Axis(size) for size in mask.shape[2:])
        return self._call([mask_rules.BITS, 0], [mask], queries, keys, *tensors, **of_backward)


class _ByTiles(torch.autograd.Function):
    """Attention by a mask function, which is called again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: _Attention,
    ) -> Any:
        outs, lses = [], []
        for rows, mask in attention.tiles(query):
            out, lse = attention.of_tile(mask, query[:, :, rows], key, value)
            outs.append(out.transpose(1, 2))
            lses.append(lse.transpose(1, 2))
        out, lse = (torch.cat(parts, dim=1).transpose(1, 2) for parts in (outs, lses))
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: torch.Tensor | None) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None
            grad_out = torch.zeros_like(out)
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(tensor, dtype=sums) for tensor in (key, value))
        for rows, mask in ctx.attention.tiles(query):
            of_rows = [tensor[:, :, rows] for tensor in (grad_out, query, out, lse)]
            of_tile = ctx.attention.of_tile(
                mask,
                *of_rows[:2],
                key,
                value,
                *of_rows[2:],
                backward=True,
                grad_lse=None if grad_lse is None else grad_lse[:, :, rows],
            )
            of_query[:, :, rows] = of_tile[0]
            of_key += of_tile[1]
            of_value += of_tile[2]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


class Segment(NamedTuple):
    """Tiles that look alike."""

    path: str
    """``"causal"`` and ``"all"``: ATen's kernel without a mask; ``"mask"``: with the mask of the
    tile; ``"nothing"``: no kernel."""
    why: str
    batch: slice
    rows: slice
    """The queries of the first tile."""
    keys: slice
    """And its keys."""
    tiles: int
    step: int
    """By how many rows and keys each tile lies after the one before."""
    grows: bool
    """Whether tiles begin at the same key, so that each has more keys than the one before."""

    def __str__(self) -> str:
        tiles = f", {self.tiles} tiles {self.step} apart" if self.tiles > 1 else ""
        widens = ", each with more keys" if self.grows else ""
        return (
            f"{self.path:8} batch {_range(self.batch)}, q {_range(self.rows)}, "
            f"kv {_range(self.keys)}{tiles}{widens}: {self.why}"
        )


def _range(of: slice) -> str:
    return f"{of.start}:{of.stop}"


class AttentionPlan(tuple[Segment, ...]):
    """How attention by a rule is calculated: segments, printed one a line."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


_WHY = (
    ("nothing", "no key is visible"),
    ("all", "all keys are visible"),
    ("causal", "query i sees i + 1 keys"),
    ("mask", "positions mask some keys"),
)
_BY_DATA = "the rule's tensors mask some keys"


def attention_plan(
    rule: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    heads: int = 1,
    q_offset: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor = 0,
) -> AttentionPlan:
    """How ``scaled_dot_product_attention`` would be calculated: one line for each kind of tile.

    Args:
        rule: a rule of ``attn_mask.rules``, or any mask function.
        batch_size, q_length, kv_length: of the query and the key.
        dtype: of the query.
        device: of the query; by default the default device.
        heads: of the query.
        q_offset, kv_offset: as of ``scaled_dot_product_attention``.

    Returns an AttentionPlan: a tuple of ``Segment``, whose str has a line for each.

    Raises what ``attn_mask.boolean`` does, and TypeError for a dtype that attention does not take.

    >>> window = attn_mask.causal() & attn_mask.sliding_window(1024)
    >>> print(attn_mask.attention_plan(window, 1, 4096, 4096, heads=8))
    causal   batch 0:1, q 0:1024, kv 0:1024: query i sees i + 1 keys
    mask     batch 0:1, q 1024:1280, kv 1:1280, 12 tiles 256 apart: positions mask some keys
    """
    name = "attention_plan"
    batch_size, q_length, kv_length, heads = checked_ints(
        name, batch_size=batch_size, q_length=q_length, kv_length=kv_length, heads=heads
    )
    rule = mask_rules.rule_of(name, "rule", rule)
    of_device = default_device() if device is None else checked_device(name, device)
    q_offset, kv_offset = checked_offsets(name, q_length, kv_length, q_offset, kv_offset)
    _check_lengths(name, q_length, kv_length)
    keys = axis(name, "kv_offset", kv_length, kv_offset, of_device)
    queries = axis(name, "q_offset", q_length, q_offset, of_device)
    program = rule.program
    if program.calls or not program.is_boolean:
        height = tile_height(batch_size * heads * kv_length)
        why = "a mask function that is no rule is called for all keys"
        first_tile = slice(0, batch_size), slice(0, min(height, q_length)), slice(0, kv_length)
        tiles = -(-q_length // height)
        return AttentionPlan([Segment("mask", why, *first_tile, tiles, height, False)])
    operands = program.fitting(batch_size, of_device)
    numbers = torch.ops.attn_mask._attention_plan(
        program.code,
        operands,
        batch_size,
        heads,
        q_length,
        kv_length,
        dtype=dtype,
        q_offset=queries.start,
        kv_offset=keys.start,
        q_positions=queries.positions,
        kv_positions=keys.positions,
        device=of_device,
    )
    segments = []
    for first in range(0, len(numbers), 11):
        visible, by_data, b0, b1, q0, q1, k0, k1, tiles, step, grows = numbers[first : first + 11]
        path, why = _WHY[visible]
        if by_data:
            why = _BY_DATA
        batch, rows, columns = slice(b0, b1), slice(q0, q1), slice(k0, k1)
        segments.append(Segment(path, why, batch, rows, columns, tiles, step, bool(grows)))
    return AttentionPlan(segments)
