"""Values that hold in a block, and attributes that are replaced while any block is open."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Generic, Self, TypeVar

import torch

from attn_mask._core.forking import fork_safe_lock

_T = TypeVar("_T")
_ABSENT: Any = object()

lock = fork_safe_lock("scopes")


class Entry(Generic[_T]):
    """One entry of a block: over also where it is left in another thread or task.

    Generators end where they are closed or collected.
    """

    __slots__ = ("is_over", "value")

    def __init__(self, value: _T):
        self.value = value
        self.is_over = False


class Scope(Generic[_T]):
    """Holds the values of blocks, each for the thread or task that entered it.

    Attributes:
        default: the value outside all blocks, of the whole process.
        open: the entries of blocks in any thread, in the order in which they began.
        traced: the values of blocks that are entered by code that is being compiled.
        here: the entries around this thread's or task's code, the innermost last.
    """

    # Dynamo traces reading plain attributes and guards on them; before torch 2.15 it does not do so
    # for context variables.

    def __init__(self, name: str, default: _T):
        self.default = default
        self.open: tuple[Entry[_T], ...] = ()
        self.traced: tuple[_T, ...] = ()
        self.here: ContextVar[tuple[Entry[_T], ...]] = ContextVar(f"attn_mask.{name}", default=())

    def current(self) -> _T:
        """The innermost value around this code; in compiled code, of blocks in any thread."""
        if torch.compiler.is_dynamo_compiling():
            if self.traced:
                return self.traced[-1]
            return self.open[-1].value if self.open else self.default
        for entry in reversed(self.here.get()):
            if not entry.is_over:
                return entry.value
        return self.default

    def values(self) -> tuple[_T, ...]:
        """Those of all blocks around this code, the innermost last."""
        if torch.compiler.is_dynamo_compiling():
            return self.traced
        return tuple([entry.value for entry in self.here.get() if not entry.is_over])

    def enter(self, value: _T) -> Entry[_T]:
        entry = Entry(value)
        if torch.compiler.is_dynamo_compiling():
            self.traced = (*self.traced, value)
            return entry
        with lock:
            self.open = (*self.open, entry)
        self.here.set((*(other for other in self.here.get() if not other.is_over), entry))
        return entry

    def leave(self, entered: list[Entry[_T]]) -> None:
        """Leaves the last of the entries, of those around this code if there are any.

        Blocks need not end in the order in which they began.
        """
        if torch.compiler.is_dynamo_compiling():
            entered.pop()
            self.traced = self.traced[:-1]
            return
        here = self.here.get()
        with lock:
            entry = ([each for each in entered if each in here] or entered)[-1]
            entered.remove(entry)
            if entry not in self.open:  # compiled code entered it, and ended within the block
                self.traced = self.traced[:-1]
            self.open = tuple(other for other in self.open if other is not entry)
            entry.is_over = True
        self.here.set(tuple(other for other in here if not other.is_over))

    def within(self, value: _T) -> "Blocks[_T]":
        return Blocks(self, value)


class Blocks(Generic[_T]):
    """A context manager that can be entered more than once, by several threads, too."""

    def __init__(self, scope: Scope[_T], value: _T):
        self._scope = scope
        self._value = value
        self._entered: list[Entry[_T]] = []

    def __enter__(self) -> Self:
        self._entered.append(self._scope.enter(self._value))
        return self

    def __exit__(self, *error: object) -> None:
        if not self._entered:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: expected __enter__ before __exit__, but got __exit__ alone"
            )
        self._scope.leave(self._entered)


class Replacements:
    """Attributes that are replaced while any thread is in a block.

    ``find`` gives each owner, its attribute and what makes the new one of the old one; nothing
    while there is nothing to replace yet.
    """

    def __init__(self, find: Callable[[], list[tuple[Any, str, Callable[[Any], Any]]]]):
        self._find = find
        self._blocks = 0
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def __enter__(self) -> None:
        with lock:
            self._blocks += 1
            for owner, name, make in () if self._replaced else self._find():
                before, now = vars(owner).get(name, _ABSENT), make(getattr(owner, name))
                setattr(owner, name, now)
                self._replaced.append((owner, name, before, now))

    def __exit__(self, *error: object) -> None:
        with lock:
            self._blocks -= 1
            while not self._blocks and self._replaced:
                owner, name, before, now = self._replaced.pop()
                if vars(owner).get(name) is not now:
                    continue  # someone else has replaced it since
                if before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
