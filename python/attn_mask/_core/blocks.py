"""BlockMasks for flex attention, straight from a mask function's rule.

torch's own ``create_block_mask`` writes the whole mask and adds it up; here a rule's spans decide
what each block holds, so that time and memory grow with the blocks, not with the elements. The
results are the same, tensor for tensor.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_flag, checked_device
from attn_mask._core.events import count, timed
from attn_mask._core.library import _C
from attn_mask._core.operators import operators
from attn_mask._core.tracing import is_jit_tracing, is_recording, is_tracing
from attn_mask._core.write import (
    BOOLEAN,
    Axis,
    Calls,
    Geometry,
    Offset,
    axis,
    check_boolean,
    write_mask,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["block_mask_to", "create_block_mask"]

_NAME = "create_block_mask"

# How much of a mask is held at once where it has to be written: bytes, one for each element.
_HELD = 8 * 2**20

# What the operator gives, as a BlockMask calls it.
_TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)

# The values of torch.ops.attn_mask._block_states.
_EMPTY = _C.BLOCK_STATES["EMPTY"]
_PARTIAL = _C.BLOCK_STATES["PARTIAL"]
_FULL = _C.BLOCK_STATES["FULL"]


class _Blocks(NamedTuple):
    """The sizes of a block mask."""

    batch_size: int
    heads: int
    q_length: int
    kv_length: int
    q_block: int
    kv_block: int

    @property
    def q_blocks(self) -> int:
        return (self.q_length + self.q_block - 1) // self.q_block

    @property
    def kv_blocks(self) -> int:
        return (self.kv_length + self.kv_block - 1) // self.kv_block


@timed
def create_block_mask(
    mask_mod: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | int | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
    *,
    q_offset: Offset = 0,
    kv_offset: Offset = 0,
    compact: bool | int | tuple[int, int] = False,
) -> "BlockMask":
    """The BlockMask of a mask function, equal to torch's in every tensor.

    Args:
        mask_mod: which keys a query attends to: an object of ``attn_mask.rules``, which is not
            evaluated, a callable of the user's, which is evaluated some rows at a time (as torch
            does, by vmap), or a tree of both. It becomes the BlockMask's mask_mod, shifted where
            there are offsets.
        B, H: None for 1.
        device: None for the accelerator that torch finds, else the CPU.
        _compile: whether a mask function that has to be called (is not ``is_native``) is given to
            torch's create_block_mask, compiled; not with compact or without separate_full_blocks.
        separate_full_blocks: whether blocks without a masked element are listed apart.
        compute_dq_write_order, dq_kv_order: as torch's, where that has them.
        q_offset, kv_offset: the positions of the first query and key; an int, or a tensor
            ([] or [B, 1]), whose value is not read.
        compact: store indices with the width of the longest row and of the longest column of
            blocks. The tensors are overlapping views of full width; entries after the blocks that
            are counted are undefined, as in torch's documentation. True finds the widths: from
            windows and chunks, else from values, which waits for a GPU. A number declares both
            widths, a pair that of rows and that of columns. Where one is too small: ValueError, or
            on a GPU an error when the kernel runs.

    Raises ValueError for sizes and offsets out of range and for tensors that are too short,
    TypeError for what is of another type and for functions that do not return booleans.

    Mirrors ``torch.nn.attention.flex_attention.create_block_mask`` of torch 2.15.

    >>> block_mask = attn_mask.create_block_mask(attn_mask.causal(), 1, 1, 256, 256, "cpu")
    >>> block_mask.kv_num_blocks.tolist(), block_mask.full_kv_num_blocks.tolist()
    ([[[1, 1]]], [[[0, 1]]])
    """
    blocks = _blocks(B, H, Q_LEN, KV_LEN, BLOCK_SIZE)
    if type(separate_full_blocks) is not bool:
        check_flag(_NAME, "separate_full_blocks", separate_full_blocks)
    if not isinstance(dq_kv_order, bool):
        raise ValueError("dq_kv_order must be a bool when using create_block_mask")
    if device is None:
        # torch built for an accelerator names one where there is none.
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = checked_device(_NAME, device)
    if device.type == "cpu":
        device = torch.device("cpu")  # "cpu:0" is another device to torch
    rule = mask_mod
    if not isinstance(rule, mask_rules.MaskFunction):
        rule = mask_rules.rule_of(_NAME, "mask_mod", mask_mod)
    lists = _Lists(device, operators(), separate_full_blocks, _widths(compact))
    compiles = bool(_compile) and separate_full_blocks and lists.widths is None
    tensors = _write(rule, blocks, lists, q_offset, kv_offset, compiles)
    count("create_block_mask")
    # It takes seconds to import, as it brings torch's compiler along.
    from torch.nn.attention import flex_attention

    names = _TENSORS if separate_full_blocks else [n for n in _TENSORS if "full" not in n]
    listed: dict[str, Any] = dict.fromkeys(_TENSORS)
    listed.update(zip(names, tensors, strict=True))
    block_mask = flex_attention.BlockMask(
        seq_lengths=(blocks.q_length, blocks.kv_length),
        **listed,
        BLOCK_SIZE=(blocks.q_block, blocks.kv_block),
        mask_mod=_shifted(mask_mod, q_offset, kv_offset),
    )
    if compute_dq_write_order:
        _add_write_order(flex_attention, block_mask, dq_kv_order)
    return block_mask


def block_mask_to(block_mask: "BlockMask", device: torch.device | str) -> "BlockMask":
    """The BlockMask on ``device``, the tensors of its mask_mod's rule included.

    torch's own ``to`` leaves those where they are. A callable of the user's is kept as it is; what
    was stored compactly still is.

    >>> block_mask = attn_mask.create_block_mask(attn_mask.causal(), 1, 1, 256, 256, "cpu")
    >>> attn_mask.block_mask_to(block_mask, "meta").kv_indices.device
    device(type='meta')
    """
    if not hasattr(block_mask, "mask_mod") or not hasattr(block_mask, "kv_num_blocks"):
        raise TypeError(
            "block_mask_to: expected block_mask to be a BlockMask, "
            f"but got {type(block_mask).__name__}"
        )
    device = checked_device("block_mask_to", device)  # tensors take None, and stay where they are
    moved = copy.copy(block_mask)
    for name, value in vars(block_mask).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, _to(value, device))
    if isinstance(block_mask.mask_mod, mask_rules.MaskFunction):
        moved.mask_mod = block_mask.mask_mod.to(device)
    return moved


def _to(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.to(device)
    # A copy of rows that overlap would not.
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    stored = tensor.as_strided((last + 1,), (1,)).to(device)
    return stored.as_strided(tensor.shape, tensor.stride())


def _add_write_order(flex_attention: Any, block_mask: Any, dq_kv_order: bool) -> None:
    compute = getattr(flex_attention, "_compute_dq_write_order_from_block_mask", None)
    if compute is None:
        raise NotImplementedError(
            f"{_NAME}: expected a torch that has compute_dq_write_order, "
            f"but got {torch.__version__}"
        )
    order, order_of_full = compute(block_mask, dq_kv_order=dq_kv_order)
    block_mask.dq_write_order = order
    block_mask.dq_write_order_full = order_of_full
    block_mask.dq_kv_order = None
    block_mask.dq_kv_order_spt = dq_kv_order


def _shifted(
    mask_mod: Callable[..., Any], q_offset: Offset, kv_offset: Offset
) -> Callable[..., Any]:
    """Flex attention counts queries and keys from zero."""
    is_plain = not isinstance(q_offset, torch.Tensor) and not isinstance(kv_offset, torch.Tensor)
    if is_plain and q_offset == 0 and kv_offset == 0:
        return mask_mod
    return mask_rules.shift(mask_mod, q_offset, kv_offset)


def _check_sizes(at_least: int, **values: Any) -> None:
    """Symbolic ones do all that an int does."""
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(
                f"{_NAME}: expected {argument} to be an int, but got {type(value).__name__}"
            )
        if value < at_least:
            raise ValueError(
                f"{_NAME}: expected {argument} to be at least {at_least}, but got {value}"
            )
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{_NAME}: expected {argument} to be less than 2^63, but got {value}")


def _blocks(
    batch_size: int | None, heads: int | None, q_length: int, kv_length: int, block_size: Any
) -> _Blocks:
    if isinstance(block_size, tuple | list):
        if len(block_size) != 2:
            raise ValueError(
                f"{_NAME}: expected BLOCK_SIZE to be an int or two, but got {len(block_size)}"
            )
        q_block, kv_block = block_size
    else:
        q_block = kv_block = block_size
    batch_size = 1 if batch_size is None else batch_size
    heads = 1 if heads is None else heads
    _check_sizes(0, B=batch_size, H=heads, Q_LEN=q_length, KV_LEN=kv_length)
    for size in (q_block,) if q_block is kv_block else (q_block, kv_block):
        _check_sizes(1, BLOCK_SIZE=size)
    return _Blocks(batch_size, heads, q_length, kv_length, q_block, kv_block)


def _widths(compact: Any) -> tuple[int, ...] | None:
    """The widths of compact rows and columns; () for those to be found, None for full width."""
    if compact is False:
        return None
    if compact is True:
        if is_recording():
            raise ValueError(
                f"{_NAME}: expected compact to be a number of blocks, since True may have to read "
                "values, which can't be done while a graph is recorded"
            )
        return ()
    widths = tuple(compact) if isinstance(compact, tuple | list) else (compact, compact)
    if len(widths) != 2:
        raise ValueError(f"{_NAME}: expected compact to be a number or two, but got {len(widths)}")
    for width in widths:
        _check_sizes(0, compact=width)
    return widths


class _Lists(NamedTuple):
    """How the blocks of a mask are listed."""

    device: torch.device
    ops: Any
    separate_full_blocks: bool
    widths: tuple[int, ...] | None

    def of(
        self, code: list[int], operands: list[Any], blocks: _Blocks, *axes: Axis
    ) -> list[torch.Tensor]:
        """The tensors of an encoded rule; ``axes``: of queries and keys, by default from 0 on."""
        queries, keys = axes or (Axis(blocks.q_length), Axis(blocks.kv_length))
        where = queries.start, keys.start, queries.positions, keys.positions
        arguments = code, operands, *blocks, *where, self.device, self.separate_full_blocks
        tensors: list[torch.Tensor]
        if self.widths is None:
            tensors = self.ops.block_mask(*arguments, None, None)
            return tensors
        kv_width, q_width = self.widths or self.ops._block_mask_widths(*arguments)
        tensors = self.ops.block_mask(*arguments, kv_width, q_width)
        half = len(tensors) // 2
        rows = blocks.q_blocks, blocks.kv_blocks, kv_width
        columns = blocks.kv_blocks, blocks.q_blocks, q_width
        return [
            _lines(stored, blocks, *(rows if index < half else columns)) if index % 2 else stored
            for index, stored in enumerate(tensors)
        ]

    def of_states(self, states: torch.Tensor, blocks: _Blocks) -> list[torch.Tensor]:
        """Blocks are the elements of the mask of those that are partial, or full."""
        kinds = [states != _EMPTY]
        if self.separate_full_blocks:
            kinds = [states == _PARTIAL, states == _FULL]
        elements = _Blocks(blocks.batch_size, blocks.heads, blocks.q_blocks, blocks.kv_blocks, 1, 1)
        lists = self._replace(separate_full_blocks=False)
        of_kinds = [lists.of([mask_rules.BITS, 0], [kind], elements) for kind in kinds]
        return [tensor for half in (0, 2) for kind in of_kinds for tensor in kind[half : half + 2]]


def _lines(stored: Any, blocks: _Blocks, lines: int, total: int, width: int) -> torch.Tensor:
    """Lines of full width that begin where the shorter ones are stored."""
    heads, width = blocks.heads, min(width, total)
    view: torch.Tensor = stored.as_strided(
        (blocks.batch_size, heads, lines, total),
        (heads * lines * width, lines * width, width, 1),
    )
    return view


def _write(
    rule: mask_rules.MaskFunction,
    blocks: _Blocks,
    lists: _Lists,
    q_offset: Offset,
    kv_offset: Offset,
    compiles_calls: bool,
) -> list[torch.Tensor]:
    """The tensors of a block mask."""
    device, ops = lists.device, lists.ops
    for argument, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
        if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt | torch.Tensor):
            raise TypeError(
                f"{_NAME}: expected {argument} to be an int or a tensor, "
                f"but got {type(offset).__name__}"
            )
    if isinstance(rule, mask_rules.Shift) and _is_zero(q_offset) and _is_zero(kv_offset):
        # How releases of transformers write offsets that are tensors: as such they have spans.
        of_rule = rule.q_offset, rule.kv_offset
        if all(not isinstance(of, torch.Tensor) or of.dim() == 0 for of in of_rule):
            rule, (q_offset, kv_offset) = rule.rule, of_rule
    queries = axis(_NAME, "q_offset", blocks.q_length, q_offset, device)
    keys = axis(_NAME, "kv_offset", blocks.kv_length, kv_offset, device)
    is_recorded = ops is not _C and is_recording()
    program = rule.known_program if ops is _C else rule.program
    operands = program.operands
    is_called = bool(program.calls) or not program.is_boolean
    if is_recorded:
        is_called = is_called or is_jit_tracing()  # it would fix an operator's sizes
    else:
        is_called = program.check_positions(_NAME, queries, keys, False) or is_called
        operands = program.fitting(blocks.batch_size, device)
    if not is_called:
        return lists.of(program.code, operands, blocks, queries, keys)
    if compiles_calls and program.calls and not is_recorded and all(blocks):
        return _by_torch(_shifted(rule, q_offset, kv_offset), blocks, device)

    def mask_of(rows: Axis) -> torch.Tensor:
        geometry = Geometry(blocks.batch_size, rows.length, rows, blocks.kv_length, kv_offset)
        calls = Calls(blocks.heads, by_vmap=True)
        return write_mask(_NAME, rule, geometry, None, device, BOOLEAN, calls)

    if is_tracing():
        return lists.of([mask_rules.BITS, 0], [mask_of(queries)], blocks)
    # Sizes are checked first: to evaluate a function for too many rows would take for ever.
    zeros, meta = (0, 0, None, None), torch.device("meta")
    if lists.widths is None:
        ops.block_mask([mask_rules.NOTHING], [], *blocks, *zeros, meta, True, None, None)
    else:
        ops._block_states([mask_rules.NOTHING], [], *blocks, *zeros, meta)
    return lists.of_states(_states(mask_of, queries, blocks, lists), blocks)


def _is_zero(offset: Offset) -> bool:
    return isinstance(offset, int) and offset == 0


def _by_torch(
    mask_mod: Callable[..., Any], blocks: _Blocks, device: torch.device
) -> list[torch.Tensor]:
    from torch.nn.attention import flex_attention

    create = torch.compile(flex_attention.create_block_mask)
    made = create(mask_mod, *blocks[:4], device, blocks[4:])
    return [getattr(made, name) for name in _TENSORS]


def _states(
    mask_of: Callable[..., torch.Tensor], queries: Axis, blocks: _Blocks, lists: _Lists
) -> torch.Tensor:
    """What the blocks of a mask hold that is written some rows at a time."""
    batch_size, heads, q_length, kv_length, *block_sizes = blocks
    row = max(1, batch_size * heads * kv_length)
    height = max(1, _HELD // row // blocks.q_block) * blocks.q_block
    parts = []
    for first in range(0, q_length, height):
        mask = mask_of(queries.rows(first, min(first + height, q_length)))
        check_boolean(_NAME, mask)
        sizes = batch_size, heads, mask.shape[2], kv_length, *block_sizes
        where = 0, 0, None, None, None
        parts.append(lists.ops._block_states([mask_rules.BITS, 0], [mask], *sizes, *where))
    if not parts:
        return torch.empty((1, 1, 0, blocks.kv_blocks), dtype=torch.uint8, device=lists.device)
    return torch.cat(parts, dim=2)
