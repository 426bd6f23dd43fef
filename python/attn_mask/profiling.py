"""What masks cost in a block of code::

with attn_mask.installed(), attn_mask.profile() as p:
    model.generate(**inputs)
print(p)
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from attn_mask._core.events import MaskCall, listeners
from attn_mask._core.tracing import within_transforms

__all__ = ["Cost", "Profile", "profile"]


@dataclass
class Cost:
    """Of the calls of one function, or of all.

    Attributes:
        calls: how often it was called.
        skipped: how often it found that no mask is needed, and gave None.
        seconds: the time that it took on the host.
        bytes: the memory of the masks that it made.
    """

    calls: int = 0
    skipped: int = 0
    seconds: float = 0.0
    bytes: int = 0


@dataclass
class Profile:
    """What ``attn_mask.profile()`` gives; str() of it is a table.

    Attributes:
        costs: of each function that was called.
        block_seconds: the time from the start of the block to its end, or to now.
    """

    costs: dict[str, Cost] = field(default_factory=dict)
    started: float = field(default_factory=perf_counter)
    ended: float | None = None

    @property
    def block_seconds(self) -> float:
        return (perf_counter() if self.ended is None else self.ended) - self.started

    @property
    def total(self) -> Cost:
        """Of all functions."""
        costs = self.costs.values()
        names = ("calls", "skipped", "seconds", "bytes")
        return Cost(*(sum(getattr(cost, name) for cost in costs) for name in names))

    @property
    def share(self) -> float:
        """Of the block's time, the part that was spent in masks; from 0 to 1."""
        return self.total.seconds / self.block_seconds

    def __str__(self) -> str:
        block = self.block_seconds
        rows = [("", "calls", "skipped", "time in masks", "share", "bytes")]
        for name, cost in (*self.costs.items(), ("all", self.total)):
            took, share = f"{cost.seconds * 1e3:.3f} ms", f"{cost.seconds / block:.1%}"
            rows.append((name, str(cost.calls), str(cost.skipped), took, share, f"{cost.bytes:,}"))
        return "\n".join([*table(rows), f"the block took {block * 1e3:.3f} ms"])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines, in which the first column is flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Counts and times the masks that this library makes in a block.

    ::

        with attn_mask.profile() as p:
            model(**inputs)
        print(p)

    Of transformers' own functions nothing is seen: with install(), what they call of ours is.
    Times are those of this thread on the host, to which a GPU's own time does not add; what
    torch.compile and torch.export record is not seen. Bytes are of the masks' memory, where a mask
    that is expanded counts once; a mask that is an argument, handed on, counts as 0. A call within
    another's belongs to the outer one. Blocks nest.

    >>> with attn_mask.profile() as p:
    ...     mask = attn_mask.boolean(attn_mask.causal(), 1, 8, 8)
    >>> p.total.calls, p.total.bytes
    (1, 64)
    """
    made = Profile()

    def listen(call: MaskCall) -> None:
        cost = made.costs.setdefault(call.name, Cost())
        tensors = _tensors(call.result)
        cost.calls += 1
        cost.seconds += call.seconds
        cost.skipped += not tensors
        cost.bytes += sum(
            within_transforms(tensor).untyped_storage().nbytes()
            for tensor in tensors
            if not any(tensor is argument for argument in call.arguments)
        )

    try:
        with listeners.within(listen):
            yield made
    finally:
        made.ended = perf_counter()


def _tensors(result: Any) -> list[torch.Tensor]:
    """Those of a mask, of arguments of attention, or of a BlockMask; a RuleMask has no elements."""
    if hasattr(result, "as_tuple"):
        result = result.as_tuple()
    parts = result if isinstance(result, tuple) else (result,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    return [tensor for tensor in tensors if not hasattr(tensor, "as_boolean")]
