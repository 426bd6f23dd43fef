"""The operators in ATen's, for graphs that leave PyTorch and for devices without kernels of ours.

Each function here has the name, the arguments and the result of an operator. A program of numbers
(csrc/rule/program.h) is decoded into the rule of ``attn_mask.rules`` that it encodes, whose call
is the definition of each leaf in ATen operators. The other operators are rules from the start.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from attn_mask._core import mask_rules, process
from attn_mask._core.library import _C, operators_that
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.operators import IN_ATEN
from attn_mask._core.program import Source
from attn_mask._core.sdpa_decision import is_causal_enough, is_result, is_unmasked
from attn_mask._core.tracing import is_jit_tracing, is_known
from attn_mask._graph import dense_attention

__all__ = ["TABLE", "decompositions"]

_ops = torch.ops.attn_mask

# Tables have a row for each row of the batch.
_TABLE_OF_ROWS = Source("", "", is_upstream=True)

# Unlike rules.bidirectional, also where positions are negative.
_EVERYTHING = mask_rules.intersection()


def _is(number: int, size: Any) -> bool:
    """Whether a size is known to be this number, without a guard on one that is symbolic."""
    return is_known(size == number)


# Decoding a program


class _Span(NamedTuple):
    """The range of the positions of all queries (or keys)."""

    first: Any
    end: Any

    def plus(self, distance: Any) -> "_Span":
        return _Span(self.first + distance, self.end + distance)


@dataclass(frozen=True, eq=False, repr=False)
class _OfMask(MaskFunction):
    """A rule for the rows and columns of the mask, whatever their positions."""

    rule: MaskFunction
    rows: torch.Tensor
    columns: torch.Tensor

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.rule.evaluate(batch_idx, head_idx, self.rows[:, None], self.columns)


@dataclass(frozen=True, eq=False, repr=False)
class _Within(MaskFunction):
    """A rule over tables of some length, which shows nothing at positions outside of them."""

    rule: MaskFunction
    length: Any
    by_query: bool

    def evaluate(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        inside = (kv_idx >= 0) & (kv_idx < self.length)
        last = self.length - 1
        if self.by_query:
            inside = inside & (q_idx >= 0) & (q_idx < self.length)
            q_idx = q_idx.clamp(0, last)
        return inside & self.rule.evaluate(batch_idx, head_idx, q_idx, kv_idx.clamp(0, last))


class _Decoder:
    """Reads a program; csrc/ops/rule_program.cpp checks it.

    Attributes:
        depends_on_batch: whether rows of the batch may differ.
        heads: 1, or as many as bits have.
    """

    def __init__(self, code: Sequence[Any], operands: Sequence[torch.Tensor], batch_size: Any):
        self._code = code
        self._operands = operands
        self._batch_size = batch_size
        self._next = 0
        self.depends_on_batch = False
        self.heads: Any = 1

    def decode(self, queries: _Span | None, keys: _Span | None) -> MaskFunction:
        """The rule that begins at the next number; where it will be called, if that is known."""
        opcode = self._number()
        if opcode == mask_rules.ALL:
            return _EVERYTHING
        if opcode == mask_rules.NOTHING:
            return mask_rules.nothing()
        if opcode == mask_rules.CAUSAL:
            return mask_rules.causal()
        if opcode == mask_rules.WINDOW:
            left, right = self._side(), self._side()
            return _EVERYTHING if left is None and right is None else mask_rules.Window(left, right)
        if opcode == mask_rules.CHUNK:
            size = self._number()
            if type(size) is int:
                size = min(size, mask_rules.OPEN)
            return mask_rules.Chunked(size, self._positions(optional=True), _TABLE_OF_ROWS)
        if opcode in (mask_rules.BLOCKS, mask_rules.DOCUMENTS):
            of_ids = mask_rules.Blockwise if opcode == mask_rules.BLOCKS else mask_rules.Documents
            ids = self._operand()
            return _within(of_ids(ids, _TABLE_OF_ROWS), ids, queries, keys)
        if opcode == mask_rules.PADDING:
            mask = self._operand().to(torch.bool)
            return _within(mask_rules.Padding(mask, _TABLE_OF_ROWS), mask, keys)
        if opcode == mask_rules.BITS:
            bits = self._operand()
            if not _is(1, bits.shape[1]):
                self.heads = bits.shape[1]
            rows, columns = (torch.arange(n, device=bits.device) for n in bits.shape[2:])
            return _OfMask(mask_rules.Bits(bits), rows, columns)
        if opcode == mask_rules.REINDEX:
            positions = self._positions()
            rule = self.decode(None, None)
            rule = mask_rules.Reindex(rule, positions, rule.depth + 1, _TABLE_OF_ROWS)
            return _within(rule, positions, queries, keys)
        if opcode == mask_rules.SHIFT:
            q_add, kv_add = self._number(), self._number()
            queries = None if queries is None else queries.plus(q_add)
            keys = None if keys is None else keys.plus(kv_add)
            rule = self.decode(queries, keys)
            return mask_rules.Shift(rule, q_add, kv_add, rule.depth + 1)
        join = mask_rules.intersection if opcode == mask_rules.AND else mask_rules.union
        return join(*[self.decode(queries, keys) for _ in range(self._number())])

    def _number(self) -> Any:
        self._next += 1
        return self._code[self._next - 1]

    def _side(self) -> Any:
        side = self._number()
        if type(side) is not int:
            return side  # a size that a graph is recorded for
        return None if side == _C.ABSENT else min(side, mask_rules.OPEN)

    def _operand(self) -> Any:
        """The next operand, one row of it for each of the batch."""
        operand = self._operands[self._number()]
        if not _is(1, operand.shape[0]):
            self.depends_on_batch = True
        elif operand.dim() < 3 and not _is(0, self._batch_size):
            operand = operand.expand(self._batch_size, *operand.shape[1:])
        return operand

    def _positions(self, optional: bool = False) -> Any:
        if optional and self._code[self._next] == _C.ABSENT:
            self._next += 1
            return None
        return _far(self._operand())


def _within(rule: MaskFunction, table: torch.Tensor, *spans: _Span | None) -> MaskFunction:
    """A rule over a table that is looked up at these positions."""
    length = table.shape[1]
    if _is(0, length):
        return mask_rules.nothing()
    if all(
        span is not None and is_known(span.first >= 0) and is_known(span.end <= length)
        for span in spans
    ):
        return rule
    return _Within(rule, length, by_query=len(spans) == 2)


def _far(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as positions."""
    return (
        numbers.clamp(-mask_rules.FAR, mask_rules.FAR)
        if numbers.dtype == torch.int64
        else numbers.long()
    )


# Evaluating a rule


def _line(
    length: Any, offset: Any, given: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, _Span | None]:
    """The positions [1 or b, length] of the queries (or the keys) of a mask, and their range."""
    index = torch.arange(length, device=device)
    if given is None:
        positions = index if _is(0, offset) else index + offset
        return positions[None], _Span(offset, offset + length)
    positions = _far(given) + offset
    if given.dim() == 0 or (given.dim() == 2 and _is(1, given.shape[1])):
        positions = positions + index
    return positions if positions.dim() == 2 else positions[None], None


def _attends(
    *,
    rule: Sequence[Any],
    operands: Sequence[torch.Tensor],
    batch_size: Any,
    q_length: Any,
    kv_length: Any,
    q_offset: Any,
    kv_offset: Any,
    q_positions: torch.Tensor | None,
    kv_positions: torch.Tensor | None,
    device: torch.device | None,
) -> torch.Tensor:
    """A program's mask [b, h, q, kv], b being 1 where all rows of the batch are alike."""
    for tensor in (*operands, q_positions, kv_positions):
        if tensor is not None:
            device = tensor.device
            break
    device = torch.device("cpu") if device is None else device
    q_idx, queries = _line(q_length, q_offset, q_positions, device)
    kv_idx, keys = _line(kv_length, kv_offset, kv_positions, device)
    decoder = _Decoder(rule, operands, batch_size)
    decoded = decoder.decode(queries, keys)
    depends = decoder.depends_on_batch or not all(_is(1, idx.shape[0]) for idx in (q_idx, kv_idx))
    rows, heads = batch_size if depends else 1, decoder.heads
    if any(_is(0, size) for size in (rows, heads, q_length, kv_length)):
        # Nothing can be looked up in tables of no rows, not even for no element.
        return torch.zeros((rows, heads, q_length, kv_length), dtype=torch.bool, device=device)
    attends: torch.Tensor = decoded(
        torch.arange(rows, device=device)[:, None, None, None],
        torch.arange(heads, device=device)[None, :, None, None],
        q_idx[:, None, :, None],
        kv_idx[:, None, None, :],
    )
    return attends.expand(rows, heads, q_idx.shape[1], kv_idx.shape[1])


def _number(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _minus_zero(is_other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-0.0, which upstream's product leaves in unmasked rows, but for rows that are others.

    Of data, since graphs take the constant -0.0 for the same as 0.0.
    """
    return -is_other.to(dtype)


def _added(
    attends: torch.Tensor,
    dtype: torch.dtype,
    masked_value: Any = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """An additive mask: 0 or the bias where a query attends, else ``masked_value``."""
    device = attends.device
    lowest = torch.finfo(dtype).min if masked_value is None else masked_value
    shown = _number(0.0, dtype, device) if bias is None else bias
    return torch.where(attends, shown, _number(lowest, dtype, device))


def _padded(mask: torch.Tensor, stride_multiple: Any) -> torch.Tensor:
    """The mask, dense or part of one whose rows are a multiple of so many elements long."""
    if not is_jit_tracing():  # which would record a copy that is none
        mask = mask.contiguous()
    if _is(1, stride_multiple) or mask.dim() == 0:
        return mask
    length = mask.shape[-1]
    missing = (length + stride_multiple - 1) // stride_multiple * stride_multiple - length
    return F.pad(mask, (0, missing))[..., :length]


# The table

TABLE: dict[Any, Callable[..., Any]] = {}
# The same by name, without the `.out` forms.
_FORMS = SimpleNamespace()
# Operators as others of ours write them, which always give a mask (see _composite).
COMPOSITES: dict[Any, Callable[..., Any]] = {}


def _operator(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Enters the decomposition of the operator of this name, and of its `.out` form.

    It is called with all arguments of the schema, by name; what may give None also with
    ``is_needed``, where there has to be a mask.
    """
    name = decomposition.__name__
    packet = getattr(_ops, name)
    called = _enter(packet.default, decomposition)
    setattr(_FORMS, name, TABLE[packet.default])
    if name in operators_that(writes_mask=True):
        may_give_none = name in operators_that(may_give_none=True)

        def write(*, out: torch.Tensor, **given: Any) -> None:
            if "dtype" in given and given["dtype"] is None:
                given["dtype"] = out.dtype
            if "device" in given:
                given["device"] = out.device
            if may_give_none:
                given["is_needed"] = True
            out.copy_(decomposition(**given, stride_multiple=1))

        called.out = _enter(packet.out, write)  # type: ignore[attr-defined]
    return called


def _composite(written: Callable[..., Any]) -> Callable[..., Any]:
    """The same for an operator that is written by others, its first argument.

    They are those in ATen's, or, to be exported, ours that always give a mask. What may give None
    is exported with ``is_needed``.
    """
    func = getattr(_ops, written.__name__).default
    COMPOSITES[func] = _by_name(func, functools.partial(written, _ops))

    def form(**given: Any) -> Any:
        return written(_FORMS, **given)

    form.__name__ = written.__name__
    return _operator(form)


def _enter(func: Any, decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """Its arguments are checked first where it is called here and no graph is recorded."""
    TABLE[func] = by_name = _by_name(func, decomposition)

    def checked(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _check(func, args, kwargs)
        return by_name(*args, **kwargs)

    return checked


def _by_name(func: Any, decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """It takes arguments, and leaves them out, as the operator does."""
    arguments = func._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {of.name: of.default_value for of in arguments if of.has_default_value()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return decomposition(**{**defaults, **dict(zip(names, args, strict=False)), **kwargs})

    return call


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets the operator check its arguments, as meta tensors."""
    if _get_current_dispatch_mode() is not None or torch._C._functorch.peek_interpreter_stack():
        return  # it has been called before, or will be with what is mapped over
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # sizes are numbers then
    try:
        arguments = func._schema.arguments
        named = dict(zip((argument.name for argument in arguments), args, strict=False))
        given = {**named, **kwargs}
        for argument in arguments:
            if argument.name == "device":
                given["device"] = torch.device("meta")
            elif argument.name == "allow_skip":
                given["allow_skip"] = False  # it would read values
            elif argument.name in given:
                convert = _meta if "Tensor" in str(argument.type) else int
                converted = tree_map_only(torch.Tensor, convert, given[argument.name])
                given[argument.name] = converted
        func(**given)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    """One of the same strides, also where elements overlap, that needs a gradient or not."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return tensor.detach().to("meta")
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device="meta",
        requires_grad=tensor.requires_grad,
    )


# The operators


@_operator
def boolean(
    *, batch_size: Any, unmask_unattended: bool, stride_multiple: Any, **where: Any
) -> torch.Tensor:
    attends = _attends(batch_size=batch_size, **where)
    if unmask_unattended:
        attends = attends | ~attends.any(-1, keepdim=True)
    return _padded(attends, stride_multiple).expand(batch_size, -1, -1, -1)


@_operator
def additive(
    *,
    batch_size: Any,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    device: torch.device | None,
    unmask_unattended: bool,
    masked_value: Any,
    stride_multiple: Any,
    minus_zero: bool = False,
    **where: Any,
) -> torch.Tensor:
    """With ``minus_zero``, which only forms of other operators give, unmasked rows hold -0.0."""
    if device is None and bias is not None:
        device = bias.device
    attends = _attends(batch_size=batch_size, device=device, **where)
    has_key = attends.any(-1, keepdim=True) if unmask_unattended else None
    if has_key is not None and not minus_zero:
        attends = attends | ~has_key
    attends = attends.expand(batch_size, -1, -1, -1)
    mask = _added(attends, dtype, masked_value, bias)
    if has_key is not None and minus_zero:
        mask = torch.where(has_key, mask, _minus_zero(has_key, dtype))
    return _padded(mask, stride_multiple)


# Those of upstream's functions


def _causal_code(sliding_window: Any) -> list[Any]:
    if sliding_window is None:
        return [mask_rules.CAUSAL]
    return [mask_rules.AND, 2, mask_rules.CAUSAL, mask_rules.WINDOW, sliding_window, _C.ABSENT]


@_operator
def _make_causal_mask(
    *,
    input_ids_shape: Sequence[Any],
    past_key_values_length: Any,
    sliding_window: Any,
    **given: Any,
) -> torch.Tensor:
    batch_size, q_length = input_ids_shape
    past = past_key_values_length
    sizes = 1, q_length, q_length + past
    code = _causal_code(sliding_window)
    mask: torch.Tensor = _FORMS.additive(code, [], *sizes, q_offset=past, **given)
    return mask.expand(batch_size, -1, -1, -1)


def _is_one_in(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where a mask of ones and zeros is 1, as a number of the dtype."""
    return mask if mask.dtype == torch.bool else mask.to(dtype) == 1


@_operator
def to_4d(
    *,
    attention_mask_2d: torch.Tensor,
    query_length: Any,
    key_value_length: Any,
    is_causal: bool,
    sliding_window: Any,
    dtype: torch.dtype,
    **given: Any,
) -> torch.Tensor:
    batch_size, kv_length = attention_mask_2d.shape
    if is_causal and key_value_length is not None and torch.compiler.is_compiling():
        torch._check(kv_length == key_value_length)
    # One query attends to all keys that the mask has, as causality gives for the last one.
    causal = _causal_code(sliding_window) if is_causal else [mask_rules.ALL]
    mask: torch.Tensor = _FORMS.additive(
        [mask_rules.AND, 2, *causal, mask_rules.PADDING, 0],
        [_is_one_in(attention_mask_2d, dtype)],
        batch_size,
        query_length,
        kv_length,
        dtype=dtype,
        q_offset=kv_length - query_length,
        minus_zero=True,
        **given,
    )
    return mask


@_composite
def _expand_mask(ops: Any, *, mask: torch.Tensor, tgt_len: Any, **given: Any) -> Any:
    q_length = mask.shape[1] if tgt_len is None else tgt_len
    return ops.to_4d(mask, q_length, is_causal=False, **given)


@_composite
def _prepare_4d_attention_mask(ops: Any, **given: Any) -> Any:
    return ops._expand_mask(**given)


@_composite
def _prepare_4d_attention_mask_for_sdpa(
    ops: Any, *, mask: torch.Tensor, allow_skip: bool, is_needed: bool = False, **given: Any
) -> Any:
    if allow_skip and not is_needed and _is_all_ones(mask):
        return None
    return ops._prepare_4d_attention_mask(mask, **given)


def _is_all_ones(mask: torch.Tensor) -> bool:
    # A decision is no part of a graph.
    with _disable_current_modes():
        return bool((mask if mask.dtype == torch.bool else mask == 1).all())


def _causal(
    ops: Any, shape: Sequence[Any], past: Any, *, is_needed: bool = False, **given: Any
) -> Any:
    if not is_needed and given["sliding_window"] is None and shape[1] <= 1:
        return None
    return ops._make_causal_mask(shape, past, **given)


@_composite
def _create_4d_causal_attention_mask(
    ops: Any, *, input_shape: Sequence[Any], past_key_values_length: Any, **given: Any
) -> Any:
    return _causal(ops, input_shape, past_key_values_length, **given)


@_composite
def to_causal_4d(
    ops: Any, *, batch_size: Any, query_length: Any, key_value_length: Any, **given: Any
) -> Any:
    past = key_value_length - query_length
    return _causal(ops, (batch_size, query_length), past, **given)


@_operator
def _unmask_unattended(
    *, expanded_mask: torch.Tensor, min_dtype: Any, stride_multiple: Any
) -> torch.Tensor:
    mask = expanded_mask
    if min_dtype == 0:
        return _copied(mask, stride_multiple)  # zeros that are unmasked keep their sign
    is_masked = (mask == min_dtype).all(-1, keepdim=True)
    if min_dtype < 0 and mask.is_floating_point():
        zero = _minus_zero(~is_masked, mask.dtype)
    else:
        zero = _number(0, mask.dtype, mask.device)
    return _padded(torch.where(is_masked, zero, mask), stride_multiple)


def _copied(mask: torch.Tensor, stride_multiple: Any) -> torch.Tensor:
    return _padded(mask.clone(memory_format=torch.contiguous_format), stride_multiple)


def _prepared(
    ops: Any,
    attention_mask: torch.Tensor | None,
    *,
    input_shape: Sequence[Any],
    inputs_embeds: torch.Tensor,
    past_key_values_length: Any,
    unmask_unattended: bool = False,
    is_needed: bool = False,
    **given: Any,
) -> Any:
    """A causal mask, with the padding of a 2D mask."""
    given["dtype"] = inputs_embeds.dtype
    if attention_mask is None:
        given |= {"device": inputs_embeds.device, "is_needed": is_needed}
        return _causal(ops, input_shape, past_key_values_length, **given)
    return ops.to_4d(
        attention_mask,
        input_shape[1],
        key_value_length=attention_mask.shape[1],
        unmask_unattended=unmask_unattended,
        **given,
    )


@_composite
def _prepare_4d_causal_attention_mask(
    ops: Any, *, attention_mask: torch.Tensor | None, **given: Any
) -> Any:
    if attention_mask is None or attention_mask.dim() != 4:
        return _prepared(ops, attention_mask, **given)
    # A 4D mask of ones and zeros becomes an additive one.
    dtype = attention_mask.dtype if attention_mask.is_floating_point() else torch.float32
    of_embeds = given["inputs_embeds"].dtype
    if attention_mask.dtype == torch.bool:
        dtype = of_embeds
    attends = _is_one_in(attention_mask, dtype)
    mask = _added(attends, dtype, torch.finfo(of_embeds).min)
    return _padded(mask, given["stride_multiple"])


@_composite
def _prepare_4d_causal_attention_mask_for_sdpa(
    ops: Any,
    *,
    attention_mask: torch.Tensor | None,
    allow_skip: bool,
    unmask_unattended: bool | None,
    is_needed: bool = False,
    **given: Any,
) -> Any:
    mask, embeds = attention_mask, given["inputs_embeds"]
    past, window = given["past_key_values_length"], given["sliding_window"]
    if allow_skip and not is_needed and _ignore_causal_mask_sdpa(mask, embeds, past, window):
        return None
    if mask is not None and is_result(mask, unmask_unattended):
        return _copied(mask, given["stride_multiple"])
    if mask is not None and mask.dim() == 4:
        lowest = torch.finfo(embeds.dtype).min
        return ops._unmask_unattended(mask, lowest, stride_multiple=given["stride_multiple"])
    unmask = mask is not None and is_unmasked(mask, unmask_unattended)
    return _prepared(ops, mask, unmask_unattended=unmask, is_needed=is_needed, **given)


def _ignore_causal_mask_sdpa(
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    past_key_values_length: Any,
    sliding_window: Any = None,
    is_training: bool = False,
) -> bool:
    return is_causal_enough(
        attention_mask, inputs_embeds, past_key_values_length, sliding_window, _is_all_ones
    )


def _is_all_visible(mask: torch.Tensor) -> bool:
    with _disable_current_modes():
        return bool(mask.to(torch.bool).all())


# Lists of blocks

_EMPTY = _C.BLOCK_STATES["EMPTY"]
_PARTIAL = _C.BLOCK_STATES["PARTIAL"]
_FULL = _C.BLOCK_STATES["FULL"]


@_operator
def _block_states(
    *,
    heads: Any,
    q_length: Any,
    kv_length: Any,
    q_block_size: Any,
    kv_block_size: Any,
    **where: Any,
) -> torch.Tensor:
    attends = _attends(q_length=q_length, kv_length=kv_length, **where)
    q_blocks = (q_length + q_block_size - 1) // q_block_size
    kv_blocks = (kv_length + kv_block_size - 1) // kv_block_size
    missing = (0, kv_blocks * kv_block_size - kv_length, 0, q_blocks * q_block_size - q_length)
    blocks = F.pad(attends, missing).view(
        attends.shape[0], attends.shape[1], q_blocks, q_block_size, kv_blocks, kv_block_size
    )
    attended = blocks.sum((3, 5))
    states = torch.full_like(attended, _PARTIAL, dtype=torch.uint8)
    states = states.masked_fill(attended == 0, _EMPTY)
    return states.masked_fill(attended == q_block_size * kv_block_size, _FULL)


@_operator
def block_mask(
    *,
    batch_size: Any,
    heads: Any,
    separate_full_blocks: bool,
    kv_width: Any,
    q_width: Any,
    **where: Any,
) -> list[torch.Tensor]:
    states = _FORMS._block_states(batch_size=batch_size, heads=heads, **where)
    states = states.expand(batch_size, heads, -1, -1)
    kinds = [states == _PARTIAL, states == _FULL] if separate_full_blocks else [states != _EMPTY]
    lists: list[torch.Tensor] = []
    for width, of_lines in ((kv_width, kinds), (q_width, [kind.mT.contiguous() for kind in kinds])):
        for blocks in of_lines:
            lists += _lists_of_blocks(blocks, width)
    return lists


def _lists_of_blocks(blocks: torch.Tensor, width: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each line has, and which: first those, then the others."""
    numbers = blocks.to(torch.int32)
    counts = numbers.sum(-1, dtype=torch.int32)
    order = torch.argsort(numbers, dim=-1, descending=True, stable=True)
    indices = order.to(torch.int32, memory_format=torch.contiguous_format)
    if width is not None:
        total = blocks.shape[-1]
        width = torch.sym_min(width, total)
        indices = F.pad(indices[..., :width].flatten(), (0, total - width))
    return counts, indices


def _block_mask_widths(*args: Any, **kwargs: Any) -> list[int]:
    lists = _FORMS.block_mask(*args, **kwargs)
    half = len(lists) // 2
    counts = lists[:half:2], lists[half::2]
    with _disable_current_modes():
        return [
            max((int(count.max()) for count in of_kind if count.numel() > 0), default=0)
            for of_kind in counts
        ]


# Attention


def _visible(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    enable_gqa: bool,
    max_documents: Any,
    max_length: Any,
    **where: Any,
) -> torch.Tensor:
    sizes: dict[str, Any] = {"q_length": query.shape[2], "kv_length": key.shape[2]}
    return _attends(device=query.device, batch_size=query.shape[0], **sizes, **where)


@_operator
def scaled_dot_product_attention(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    **where: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_attention.forward(query, key, value, _visible(query, key, **where), scale)


@_operator
def scaled_dot_product_attention_backward(
    *,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    grad_lse: torch.Tensor | None,
    **where: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attends = _visible(query, key, **where)
    saved = query, key, value, out, lse
    return dense_attention.backward(grad_out, grad_lse, saved, attends, scale)


def _document_limits(*args: Any, **kwargs: Any) -> list[int]:
    return []


def _attention_plan(*args: Any, **kwargs: Any) -> list[int]:
    raise NotImplementedError("attention_plan: expected device to be cpu or cuda")


vars(IN_ATEN).update({_name: globals()[_name] for _name in operators_that()})


# Other devices


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What each operator that writes a mask is in ATen's, by overload.

    For ``ExportedProgram.run_decompositions``, alone or beside torch's own::

        program.run_decompositions(attn_mask.decompositions())
        program.run_decompositions(
            {**torch.export.default_decompositions(), **attn_mask.decompositions()}
        )

    >>> torch.ops.attn_mask.boolean.default in attn_mask.decompositions()
    True
    """
    return dict(TABLE)


_OTHER_DEVICES = ("MPS", "XPU", "HPU", "PrivateUse1")


def _kernel(name: str, decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition, which names a device that torch was not built for."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        try:
            return decomposition(*args, **kwargs)
        except (AssertionError, ImportError) as error:  # by torch.xpu, or its absence
            raise NotImplementedError(
                f"{name}: expected device to be one that torch was built for, "
                f"but got {kwargs.get('device')}"
            ) from error

    return kernel


for _name in operators_that():
    _form = getattr(IN_ATEN, _name)
    for _device in _OTHER_DEVICES:
        process.implement(_name, _kernel(_name, _form), _device)
        if hasattr(_form, "out"):
            process.implement(f"{_name}.out", _kernel(_name, _form.out), _device)
