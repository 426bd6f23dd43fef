"""Locks that a forked process can go on with, whichever thread of its parent held them.

Only the thread that forks lives on in the child: a lock that another one held would stay locked
there for good. So a fork waits for these locks, and what they guard is whole in the child.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from attn_mask._core import process


class _Lock(NamedTuple):
    lock: Any
    seconds: float
    repair: Callable[[], None]


# By name; one that is taken while another is held was made before that one.
_locks: dict[str, _Lock] = process.kept("locks", dict)
# By thread that forks: which locks it has, and which were not to be had in time.
_taken: dict[int, tuple[list[_Lock], list[_Lock]]] = {}


def fork_safe_lock(
    name: str, seconds: float = 1.0, repair: Callable[[], None] = lambda: None
) -> Any:
    """An RLock, so that a fork within the lock waits for nothing.

    ``seconds``: how long a fork waits, which must end even where the lock's owner waits for the
    thread that forks. ``repair``: called in the child after it did not get the lock in time, as
    what the lock guards may be half done.
    """
    lock = threading.RLock()
    _locks[name] = _Lock(lock, seconds, repair)
    return lock


def _before() -> None:
    taken: list[_Lock] = []
    missed: list[_Lock] = []
    for each in reversed(_locks.values()):
        is_taken = each.lock.acquire(timeout=each.seconds)
        (taken if is_taken else missed).append(each)
    _taken[threading.get_ident()] = taken, missed


def _in_parent() -> None:
    taken, _ = _taken.pop(threading.get_ident(), ([], []))
    for each in reversed(taken):
        each.lock.release()


def _in_child() -> None:
    _, missed = _taken.get(threading.get_ident(), ([], []))
    for each in missed:
        each.lock._at_fork_reinit()
    _in_parent()
    _taken.clear()
    for each in missed:
        each.repair()


process.register_once("fork: before", _before, lambda call: os.register_at_fork(before=call))
process.register_once(
    "fork: in the parent", _in_parent, lambda call: os.register_at_fork(after_in_parent=call)
)
process.register_once(
    "fork: in the child", _in_child, lambda call: os.register_at_fork(after_in_child=call)
)
