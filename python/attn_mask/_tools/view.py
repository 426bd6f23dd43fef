"""One q x kv slice of whatever says which keys are visible, for pictures of it."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from attn_mask import rules
from attn_mask._core.arguments import ADDITIVE_DTYPES, check_rank, check_readable, checked_natural
from attn_mask._core.tracing import default_device
from attn_mask._core.write import Axis, Calls, Geometry, write_mask

# A float mask masks from here down: by the lowest number of its dtype, -inf, -1e9 or -1e4. What is
# above is a bias.
_MASKS_FROM = -1e4

# How many elements of a mask are held at once, and how many are looked at: some ten seconds' work.
_HELD, _MOST = 2**24, 2**34

# So many rows of booleans add up to what a uint8 holds.
_ROWS = 255


class View(NamedTuple):
    """The mask of one batch row and head."""

    q_length: int
    kv_length: int
    rows: Callable[[int, int], torch.Tensor]
    """Which keys are visible to the queries from the first up to the second: bool [rows, kv]."""
    documents: torch.Tensor | None
    """The document of each key, int [kv], where a rule keeps documents apart."""

    def strips(self, borders: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(number, rows) of the strips between borders; a high one in parts of up to 255 rows."""
        height = max(1, min(_ROWS, _HELD // max(1, self.kv_length)))
        for number, (start, end) in enumerate(pairwise(borders)):
            for first in range(start, end, height):
                yield number, self.rows(first, min(first + height, end))

    def numbers(self) -> torch.Tensor:
        """The documents of keys, counted from 0 in the order of their ids: int64 [kv]."""
        if self.documents is None:
            return torch.zeros(self.kv_length, dtype=torch.int64, device="cpu")
        numbers: torch.Tensor = torch.unique(self.documents, return_inverse=True)[1]
        return numbers

    def counts(self, rows: list[int], columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each cell of a grid with these borders, the number of visible keys and of all."""
        # Not the default device, which may be another.
        heights, widths = (torch.tensor(line, device="cpu").diff() for line in (rows, columns))
        counts = torch.zeros(len(heights), len(widths), dtype=torch.int64, device="cpu")
        column = torch.arange(len(widths), device="cpu").repeat_interleave(widths)
        for number, part in self.strips(rows):
            sums = part.view(torch.uint8).sum(0, dtype=torch.uint8)  # many times as fast as int64
            counts[number].index_add_(0, column, sums.long())
        return counts, heights[:, None] * widths


def borders(length: int, parts: int) -> list[int]:
    """Where the parts of a length begin, and its end."""
    return [-(-part * length // parts) for part in range(parts + 1)]


def view(
    name: str,
    mask_or_rule: Any,
    q_length: int | None,
    kv_length: int | None,
    batch: int,
    head: int,
) -> View:
    """What ``name``'s arguments ask for. Raises what ``attn_mask.show`` does."""
    if q_length is not None:
        q_length = checked_natural(name, "q_length", q_length, ValueError)
    if kv_length is not None:
        kv_length = checked_natural(name, "kv_length", kv_length, ValueError)
    batch = checked_natural(name, "batch", batch)
    head = checked_natural(name, "head", head)
    if isinstance(mask_or_rule, torch.Tensor):
        shown = _of_mask(name, mask_or_rule, batch, head)
    elif hasattr(mask_or_rule, "kv_num_blocks"):
        shown = _of_block_mask(name, mask_or_rule, batch, head)
    elif callable(mask_or_rule):
        rule = rules.rule_of(name, "mask_or_rule", mask_or_rule)
        return _of_rule(name, rule, q_length, kv_length, batch, head)
    else:
        raise TypeError(
            f"{name}: expected mask_or_rule to be a mask (a tensor or a BlockMask) or a rule, "
            f"but got {type(mask_or_rule).__name__}"
        )
    lengths = (("q_length", q_length), ("kv_length", kv_length))
    for (argument, value), of in zip(lengths, shown[:2], strict=True):
        if value not in (None, of):
            raise ValueError(
                f"{name}: expected {argument} to be that of the mask, {of}, but got {value}"
            )
    return shown


def _index(name: str, argument: str, value: int, size: int) -> int:
    """The index into a dimension, which serves all if it is of size 1."""
    if size == 1:
        return 0
    if value >= size:
        raise IndexError(f"{name}: expected {argument} to be below {size}, but got {value}")
    return value


def _of_mask(name: str, mask: torch.Tensor, batch: int, head: int) -> View:
    check_readable(name, "mask_or_rule", mask)
    shape = "a mask [q_length, kv_length], [batch_size, ...] or [batch_size, heads, ...]"
    check_rank(f"{name}: expected mask_or_rule", mask, (2, 3, 4), shape)
    if mask.is_complex() or (mask.is_floating_point() and mask.dtype not in ADDITIVE_DTYPES):
        raise TypeError(
            f"{name}: expected mask_or_rule to be of bool, integers, float16, bfloat16, float32 or "
            f"float64, but got {mask.dtype}"
        )
    plane = mask.detach()
    for argument, index in (("batch", batch), ("head", head))[: mask.dim() - 2]:
        plane = plane[_index(name, argument, index, plane.shape[0])]

    def rows(first: int, end: int) -> torch.Tensor:
        part = plane[first:end].cpu()
        return part > _MASKS_FROM if part.is_floating_point() else part != 0

    return View(plane.shape[0], plane.shape[1], rows, None)


def _of_block_mask(name: str, mask: Any, batch: int, head: int) -> View:
    """Blocks that are full, and within partial ones what the mask function shows."""
    q_length, kv_length = mask.seq_lengths
    q_block, kv_block = mask.BLOCK_SIZE
    indices = mask.kv_indices
    check_readable(name, "mask_or_rule", indices)
    at = tuple(
        _index(name, argument, index, size)
        for argument, index, size in zip(
            ("batch", "head"), (batch, head), indices.shape[:2], strict=True
        )
    )
    shape = indices.shape[-2], -(-kv_length // kv_block)
    states = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    for state, numbers, columns in (
        (1, mask.kv_num_blocks, indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        if numbers is not None:
            for row, (number, of_row) in enumerate(
                zip(numbers[at].tolist(), columns[at].cpu().long(), strict=True)
            ):
                states[row, of_row[:number]] = state
    rule = rules.rule_of(name, "mask_mod", mask.mask_mod)
    within = _of_rule(name, rule, q_length, kv_length, at[0], at[1], indices.device)

    def rows(first: int, end: int) -> torch.Tensor:
        of_rows = states[torch.arange(first, end, device="cpu") // q_block]
        state = of_rows.repeat_interleave(kv_block, 1)[:, :kv_length]
        if not (of_rows == 1).any():
            return state == 2
        return (state == 2) | ((state == 1) & within.rows(first, end))

    return View(q_length, kv_length, rows, within.documents)


def _of_rule(
    name: str,
    rule: rules.MaskFunction,
    q_length: int | None,
    kv_length: int | None,
    batch: int,
    head: int,
    device: torch.device | None = None,
) -> View:
    program = rule.program
    tables = [table for table in program.operands if table is not None]
    for table in tables:
        check_readable(name, "mask_or_rule", table)
    bits = [program.operands[index] for index in program.bits]
    q_table, kv_table = (None if end == rules.FAR else end for end in program.highest)
    if kv_length is None:
        kv_length = bits[0].shape[3] if bits else q_length if q_length is not None else kv_table
    if q_length is None:
        q_length = bits[0].shape[2] if bits else q_table if q_table is not None else kv_length
    if q_length is None:
        raise ValueError(
            f"{name}: expected q_length to be given for a rule without tables, {rule!r}"
        )
    if kv_length is None:
        kv_length = q_length
    if q_length * kv_length > _MOST:
        raise ValueError(
            f"{name}: expected at most 2^34 elements, but got {q_length} x {kv_length}"
        )
    # Functions of the user's may tell apart any number of rows and heads; tables have theirs.
    batch_size = max([1, *(table.shape[0] for table in tables)])
    heads = max([1, *(table.shape[1] for table in bits)])
    if program.calls:
        batch_size = batch + 1 if batch_size == 1 else batch_size
        heads = head + 1 if heads == 1 else heads
    batch, head = _index(name, "batch", batch, batch_size), _index(name, "head", head, heads)
    if device is None:
        device = tables[0].device if tables else default_device()
        if device.type == "meta":
            device = torch.device("cpu")

    def rows(first: int, end: int) -> torch.Tensor:
        queries = Axis(q_length).rows(first, end)
        geometry = Geometry(batch_size, end - first, queries, kv_length, 0)
        mask = write_mask(name, rule, geometry, None, device, calls=Calls(heads))
        return mask[batch, 0 if mask.shape[1] == 1 else head].cpu().bool()

    return View(q_length, kv_length, rows, _documents(rule, batch, kv_length))


def _documents(rule: Any, batch: int, kv_length: int) -> torch.Tensor | None:
    """The ids of the first rule over documents that holds for all keys at their own places."""
    if isinstance(rule, rules.Documents):
        ids = rule.ids if rule.ids.dim() == 1 else rule.ids[batch if rule.ids.shape[0] > 1 else 0]
        return ids[:kv_length].cpu() if ids.shape[0] >= kv_length else None
    if rule.factory == "intersection":
        found = (_documents(branch, batch, kv_length) for branch in rule.parts)
        return next((ids for ids in found if ids is not None), None)
    return None
