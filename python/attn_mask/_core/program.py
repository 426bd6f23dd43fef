"""The form in which operators take a rule: numbers, and tensors that those name by index."""

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from attn_mask._core.library import _C
from attn_mask._core.tracing import is_known, is_recording

_FAR = _C.FAR
_AND, _BITS, _PADDING = (_C.OPCODES[name] for name in ("AND", "BITS", "PADDING"))


class Coverage(enum.Enum):
    """Which of some keys are visible to some queries, as far as positions decide it."""

    ALL = enum.auto()
    CAUSAL = enum.auto()
    """The keys up to the query's own position; not all."""
    OTHER = enum.auto()


class Source(NamedTuple):
    """The function that made a leaf over a table, and that function's name for the table."""

    function: str
    argument: str
    is_upstream: bool = False
    """Whether tables are those of transformers' closures: of any dtype, with a row for each row of
    the batch, or more. Else [length], [1, length] or [batch_size, length], of integers."""

    def __str__(self) -> str:
        return f"{self.function}: expected {self.argument}"


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
        is_plain: True when there is no operand, and nothing to see to but positions below zero.
        is_boolean: False when some padding of a function of transformers is not boolean: the
            function's results then have its dtype.
        has_documents, limits: how many of them there are at most, and how long, where the caller
            said so.
        found_limits: what attention last found in their place, after what it depends on.
        lowest: for queries and keys: the first position that is in all tables. Before it, a call
            counts from the end of a tensor.
        highest: for queries and keys: the first position beyond that, or None. Neither is known
            (nor needed) while a graph is recorded.
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
        self.highest: list[int | None] = [None, None]
        self._limits: list[tuple[int, int, int]] = []  # axis, first position beyond, operand
        # Comparing sizes would make a graph depend on them.
        self._finds_limits = not is_recording()
        rule.encode_into(self, Place())
        self.padded_code = [_AND, 2, *self.code, _PADDING, len(self.operands)]
        self.is_plain = not self.operands and self.lowest == [0, 0]

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
        if table.dim() != 2:
            raise ValueError(
                f"{source} to be 2-D [batch_size, length], "
                f"but got {table.dim()}-D {list(table.shape)}"
            )
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
                    highest = self.highest[axis]
                    self.highest[axis] = limit if highest is None else min(limit, highest)

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
        if batch_size > _FAR or q_end > _FAR or kv_end > _FAR:
            return False
        if self.is_plain:
            return q_start >= 0 and kv_start >= 0
        if self.calls or not self.is_boolean:
            return False
        if q_start < self.lowest[0] or kv_start < self.lowest[1]:
            return False
        q_highest, kv_highest = self.highest
        if (q_highest is not None and q_end > q_highest) or (
            kv_highest is not None and kv_end > kv_highest
        ):
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

    def check_positions(self, name: str, axis: int, start: int, end: int) -> None:
        """Raises ValueError where queries (axis 0) or keys (1) from ``start`` to ``end`` are in no
        table. Upstream's closures count positions below 0 from a table's end."""
        line = ("queries", "keys")[axis]
        for of_axis, limit, operand in self._limits:
            if of_axis != axis:
                continue
            shape, source = list(self.operands[operand].shape), self.sources[operand]
            if is_known(end > limit):
                raise ValueError(
                    f"{source} to be of length {shape[1] + end - limit} or longer, "
                    f"for the {line} of {name}, but got {shape}"
                )
            assert source is not None
            first = start + shape[1] - limit
            if not source.is_upstream and is_known(first < 0):
                raise ValueError(
                    f"{source} for positions from 0 on, but the {line} of {name} begin at {first}"
                )

    def add_call(self, rule: Any, place: Place) -> None:
        """A rule that has to be called."""
        for above in reversed(place.above):
            rule = replace(above, rule=rule)
        operand = self.add_operand(None, None)
        self.calls.append((operand, rule))
        self.code += (_BITS, operand)
