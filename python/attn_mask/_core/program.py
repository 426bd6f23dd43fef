"""The form in which operators take a rule: numbers, and tensors that those name by index."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from attn_mask._core.arguments import check_rank, check_strided
from attn_mask._core.library import _C
from attn_mask._core.tracing import is_jit_tracing, is_known, is_recording

_T = TypeVar("_T")

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Tables as errors name them.
_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "uint8 or a signed integer": lambda dtype: dtype in ID_DTYPES,
    "of a boolean, integer or real floating dtype": lambda dtype: not dtype.is_complex,
    "bool": lambda dtype: dtype == torch.bool,
}
_SHAPES = {
    (1,): "1-D [batch_size]",
    (1, 2): "1-D [length] or 2-D [batch_size, length]",
    (4,): "4-D [batch_size, heads, q_length, kv_length]",
}

_FAR = _C.FAR
_AND, _BITS, _PADDING = (_C.OPCODES[name] for name in ("AND", "BITS", "PADDING"))


class Coverage(enum.IntEnum):
    """Which of some keys are visible to some queries, as far as positions decide it."""

    OTHER = 0
    CAUSAL = 1
    """The keys up to the query's own position; not all."""
    ALL = 2


class Source(NamedTuple):
    """The function that made a leaf over a table, and that function's name for the table."""

    function: str
    argument: str
    is_upstream: bool = False
    """Whether tables are those of transformers' closures: of any dtype, with a row for each row of
    the batch, or more. Else [length], [1, length] or [batch_size, length], of integers."""

    def __str__(self) -> str:
        return f"{self.function}: expected {self.argument}"

    def checked(
        self, table: Any, kind: str = "uint8 or a signed integer", ranks: tuple[int, ...] = (1, 2)
    ) -> torch.Tensor:
        """The table, of a dtype of this kind and one of these ranks."""
        check_strided(self.function, self.argument, table)
        if not _KINDS[kind](table.dtype):
            raise TypeError(f"{self} to be {kind}, but got {table.dtype}")
        check_rank(str(self), table, ranks, _SHAPES[ranks])
        return table  # type: ignore[no-any-return]


class Place(NamedTuple):
    """The place of a rule in a tree."""

    above: tuple[Any, ...] = ()
    """The nodes between it and the root that change positions: Reindex and Shift."""
    add: tuple[int, int] | None = (0, 0)
    """What those add to the positions of queries and keys; None when a tensor decides."""


class Program:
    """A tree of ``attn_mask.rules`` as the operators take it, and what to see to before they are
    called.

    Attributes:
        code: the rules, in prefix order.
        padded_code: the same, and a padding mask that is the operand after the others.
        operands: the tensors that ``code`` names by index; None for results of ``calls``.
        sources: who made the leaf of each operand; None for results of ``calls``.
        bits: the indices of operands that are bits, with a row for each query.
        calls: (index of the operand, function): what has to be called. The results at
            the mask's own positions, bool [b or 1, h or 1, q, kv], are the operand.
        is_boolean: False when some padding of a function of transformers is not boolean: the
            function's results then have its dtype.
        has_documents, limits: how many of them there are at most, and how long, where the caller
            said so.
        found_limits: what attention last found in their place, after what it depends on.
        lowest: for queries and keys: the first position that is in all tables. Before it, a call
            counts from the end of a tensor.
        highest: for queries and keys: the first position beyond that; 2^59 without a table.
            Neither is known (nor needed) while a graph is recorded.
    """

    def __init__(self, rule: Any):
        self.code: list[int] = []
        self.operands: list[Any] = []
        self.sources: list[Source | None] = []
        self.bits: list[int] = []
        self.calls: list[tuple[int, Any]] = []
        self.is_boolean = True
        self.has_documents = False
        self.limits: tuple[int, int] | None = None
        self.found_limits: tuple[Any, Sequence[int | None]] | None = None
        self.lowest = [0, 0]
        self.highest = [_FAR, _FAR]
        self._limits: list[tuple[int, int, int]] = []  # axis, first position beyond, operand
        # Comparing sizes would make a graph depend on them.
        self._finds_limits = not is_recording()
        rule.encode_into(self, Place())
        self.padded_code = [_AND, 2, *self.code, _PADDING, len(self.operands)]

    def add_operand(self, source: Source | None, operand: torch.Tensor | None) -> int:
        self.operands.append(operand)
        self.sources.append(source)
        return len(self.operands) - 1

    def add_table(
        self,
        opcode: int,
        source: Source,
        table: torch.Tensor,
        place: Place,
        by_query: bool = True,
    ) -> None:
        """A rule that looks up positions in a table [b, n] or [n]."""
        if table.dim() == 1 and not source.is_upstream:
            table = table[None]
        check_rank(str(source), table, (2,), "2-D [batch_size, length]")
        operand = self.add_operand(source, table)
        self.code += (opcode, operand)
        self.add_limits(place, operand, by_query)

    def add_limits(self, place: Place, operand: int | None, by_query: bool = True) -> None:
        """Positions are not negative and, with an operand, in that table."""
        if place.add is None:
            return
        for axis in range(0 if by_query else 1, 2):
            if operand is not None:
                limit = self.operands[operand].shape[1] - place.add[axis]
                self._limits.append((axis, limit, operand))
            if self._finds_limits:
                self.lowest[axis] = max(self.lowest[axis], -place.add[axis])
                if operand is not None:
                    self.highest[axis] = min(self.highest[axis], limit)

    def is_written(
        self,
        batch_size: int,
        q_start: int,
        q_end: int,
        kv_start: int,
        kv_end: int,
        device: torch.device,
    ) -> bool:
        """Whether the operators need nothing else, for queries and keys at these positions."""
        (q_lowest, kv_lowest), (q_highest, kv_highest) = self.lowest, self.highest
        if q_start < q_lowest or q_end > q_highest or kv_start < kv_lowest or kv_end > kv_highest:
            return False
        if self.calls or not self.is_boolean or batch_size > _FAR:
            return False
        for operand in self.operands:
            if operand.shape[0] != batch_size or operand.device != device:
                return False
        return True

    def rows(self, index: int, batch_size: int) -> torch.Tensor:
        """An operand that is not None, with as many rows as a batch of ``batch_size`` needs.

        Raises ValueError where it has others.
        """
        operand: torch.Tensor = self.operands[index]
        rows, source = operand.shape[0], self.sources[index]
        assert source is not None
        if rows == batch_size or (rows == 1 and not source.is_upstream):
            return operand
        if not source.is_upstream:
            fitting = "1 row" if batch_size == 1 else f"1 or {batch_size} rows"
            raise ValueError(
                f"{source} to have {fitting}, for a batch of {batch_size}, "
                f"but got {list(operand.shape)}"
            )
        if rows < batch_size:
            raise ValueError(f"{source} to have {batch_size} rows, but got {list(operand.shape)}")
        # A mask function leaves rows beyond the batch alone.
        return operand[:batch_size]

    def fitting(self, batch_size: int, device: torch.device) -> list[Any]:
        """The operands on a device, with the rows of a batch."""
        fitting = self.operands
        for index, operand in enumerate(self.operands):
            if operand is None or (operand.shape[0] == batch_size and operand.device == device):
                continue
            if fitting is self.operands:
                fitting = list(self.operands)
            fitting[index] = self.rows(index, batch_size).to(device)
        return fitting

    def check_positions(self, name: str, queries: Any, keys: Any, is_recorded: bool) -> bool:
        """Whether queries or keys (each an Axis) begin before the first position of all tables.

        Mask functions that are called count from the end of a tensor there. Not known while a graph
        is recorded, which must not come to depend on comparisons of sizes. Raises ValueError where
        they go beyond a table, and before one that is no table of upstream's closures.
        """
        is_before = False
        for index, axis in enumerate((queries, keys)):
            if axis.positions is not None or not (is_recorded or axis.length > 0):
                continue
            line = ("queries", "keys")[index]
            for of_axis, limit, operand in self._limits:
                if of_axis != index:
                    continue
                shape, source = list(self.operands[operand].shape), self.sources[operand]
                excess = axis.start + axis.length - limit
                if is_known(excess > 0):
                    raise ValueError(
                        f"{source} to be of length {shape[1] + excess} or longer, "
                        f"for the {line} of {name}, but got {shape}"
                    )
                assert source is not None
                first = axis.start + shape[1] - limit
                if not source.is_upstream and is_known(first < 0):
                    raise ValueError(
                        f"{source} for positions from 0 on, "
                        f"but the {line} of {name} begin at {first}"
                    )
            is_before = is_before or (not is_recorded and axis.start < self.lowest[index])
        return is_before

    def add_call(self, rule: Any, place: Place) -> None:
        """A rule that has to be called."""
        for above in reversed(place.above):
            rule = replace(above, rule=rule)
        operand = self.add_operand(None, None)
        self.calls.append((operand, rule))
        self.code += (_BITS, operand)


def wide(positions: _T) -> _T:
    """Positions in int64, which holds sums of them; what is no tensor of integers as it is."""
    is_integer = isinstance(positions, torch.Tensor) and positions.dtype in ID_DTYPES
    return positions.long() if is_integer else positions  # type: ignore[attr-defined]


def at(table: torch.Tensor, source: Source, batch_idx: Any, idx: Any) -> torch.Tensor:
    """The entries of a table at positions; one row of it may serve the whole batch."""
    if source.is_upstream:
        return table[batch_idx, idx]
    if table.dim() == 1:
        return table[idx]
    return table[row_of(table.shape[0], batch_idx), idx]


def row_of(rows: int, batch_idx: Any) -> Any:
    """Which of the rows of a table serves a row of the batch; one may serve all."""
    if is_jit_tracing():  # the graph is for other numbers of rows, too
        return batch_idx % rows
    return 0 if rows == 1 else batch_idx


def beside(result: Any, other: Any) -> Any:
    """A result on the other's device, where they are tensors."""
    both = isinstance(result, torch.Tensor) and isinstance(other, torch.Tensor)
    return result.to(other.device) if both else result
