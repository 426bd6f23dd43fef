"""Locks that a forked process can go on with, whichever thread of its parent held them.

Only the thread that forks lives on in the child: a lock that another one held would stay locked
there for good. So a fork waits for these locks, and what they guard is whole in the child.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from attn_mask import _process

# Longer than install() takes. Whoever holds a lock may wait for this very thread.
_SECONDS = 5.0


class _State:
    def __init__(self) -> None:
        self.locks: dict[str, Any] = {}
        """By name; one that is taken while another is held was made before that one."""
        self.repairs: dict[str, Callable[[], None]] = {}
        """What to do in a child where the lock was not to be had."""


_state = _process.kept("forking", _State)
# Of a fork that is going on; the thread that forks holds the GIL but while it waits.
_taken: dict[int, tuple[list[Any], dict[str, Any]]] = {}


def fork_safe_lock(name: str, repair: Callable[[], None] | None = None) -> Any:
    """An RLock, so that a fork within the lock waits for nothing.

    ``repair``: called in a child whose parent could not take it in time, as what it guards may be
    half done.
    """
    lock = threading.RLock()
    _state.locks[name] = lock
    if repair is not None:
        _state.repairs[name] = repair
    return lock


def _before() -> None:
    until = time.monotonic() + _SECONDS
    missed = {}
    taken = []
    for name, lock in reversed(_state.locks.items()):
        if lock.acquire(timeout=max(0.0, until - time.monotonic())):
            taken.append(lock)
        else:
            missed[name] = lock
    _taken[threading.get_ident()] = taken, missed


def _in_parent() -> None:
    taken, _ = _taken.pop(threading.get_ident(), ([], {}))
    for lock in reversed(taken):
        lock.release()


def _in_child() -> None:
    _, missed = _taken.get(threading.get_ident(), ([], {}))
    for lock in missed.values():
        lock._at_fork_reinit()
    _in_parent()
    _taken.clear()
    for name in missed:
        if name in _state.repairs:
            _state.repairs[name]()


_process.register_once("fork: before", _before, lambda call: os.register_at_fork(before=call))
_process.register_once(
    "fork: in the parent", _in_parent, lambda call: os.register_at_fork(after_in_parent=call)
)
_process.register_once(
    "fork: in the child", _in_child, lambda call: os.register_at_fork(after_in_child=call)
)
