"""Who decides whether attention gets a mask at all, where it could do without one."""

import contextvars
import threading
import weakref
from typing import Any

import torch

from attn_mask._process import kept
from attn_mask._tracing import is_exporting, is_jit_tracing

__all__ = ["SkipPolicy", "current", "skip_policy"]

_POLICIES = ("upstream", "shapes", "never")


class SkipPolicy:
    """Decides by shapes and declarations; under "upstream", callers do what the release does."""

    def __init__(self, name: str, padding: str | None, packing: str | None):
        self.name = name
        self.padding = padding
        self.packing = packing

    def __repr__(self) -> str:
        return f"skip_policy({self.name!r}, padding={self.padding!r}, packing={self.packing!r})"

    def skips_causal(
        self,
        attention_mask: torch.Tensor | None,
        q_length: int,
        kv_length: int,
        q_offset: Any,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        """Whether ``is_causal`` stands for the mask, without a look at any tensor's values.

        Not asked under "upstream". ``attention_mask`` is [b, n], as it was given.
        """
        if self.name == "never" or not self._knows(attention_mask):
            return False
        if local_size is not None and kv_length >= local_size:
            return False
        if (q_length == 1 or kv_length == q_length) and _reaches(
            attention_mask, kv_length, kv_offset
        ):
            return True
        # Before anything is cached, keys behind the queries are hidden by causality.
        return (
            not isinstance(q_offset, torch.Tensor)
            and q_offset == 0
            and _reaches(attention_mask, q_length, kv_offset)
        )

    def skips_bidirectional(
        self,
        attention_mask: torch.Tensor | None,
        kv_length: int,
        kv_offset: Any,
        local_size: int | None,
    ) -> bool:
        """Whether nothing is masked, in the same way."""
        if self.name == "never" or not self._knows(attention_mask):
            return False
        if local_size is not None and kv_length >= local_size:
            return False
        return _reaches(attention_mask, kv_length, kv_offset)

    def _knows(self, attention_mask: torch.Tensor | None) -> bool:
        """That nothing is padded, and that there is no graph to fix ``is_causal`` in for good."""
        if is_exporting() or is_jit_tracing():
            return False
        return attention_mask is None or self.padding == "none"


def _reaches(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: Any) -> bool:
    """Whether the mask has a value for each key: those behind its end are padding."""
    if attention_mask is None:
        return True
    if isinstance(kv_offset, torch.Tensor):
        return False
    return bool(attention_mask.shape[-1] >= kv_offset + kv_length)


UPSTREAM = SkipPolicy("upstream", None, None)

# The process's policy, and those of the blocks that are being run in any thread. Dynamo traces
# reading plain globals and guards on them; it does not do so for context variables.
_process: SkipPolicy
_blocks: tuple[SkipPolicy, ...] = ()

# The policies of the blocks around this thread's or task's code, the innermost last.
_of_context: contextvars.ContextVar[tuple[SkipPolicy, ...]] = contextvars.ContextVar(
    "attn_mask.skip_policy", default=()
)

# The calls that set the process's policy, the last one on top, for when one is withdrawn. A call
# can be withdrawn as long as what it returned exists; one that can't be lies at the bottom.
_calls: list[tuple["weakref.ref[_Call] | None", SkipPolicy]] = kept(
    "calls of skip_policy", lambda: [(None, UPSTREAM)]
)
_process = _calls[-1][1]
_lock = threading.Lock()


def current() -> SkipPolicy:
    """The policy of the innermost block around this code, else that of the process."""
    blocks = _blocks if torch.compiler.is_compiling() else _of_context.get()
    return blocks[-1] if blocks else _process


def _without_last(blocks: tuple[SkipPolicy, ...], policy: SkipPolicy) -> tuple[SkipPolicy, ...]:
    """Without the last entry that is ``policy``; blocks need not end in the order they began."""
    for index in range(len(blocks) - 1, -1, -1):
        if blocks[index] is policy:
            return blocks[:index] + blocks[index + 1 :]
    return blocks


class _Call:
    """What skip_policy returns: as a context manager, the policy of a block instead."""

    def __init__(self, policy: SkipPolicy, before: SkipPolicy):
        self._policy = policy
        self._before = before
        self._is_withdrawn = False

    def __enter__(self) -> "_Call":
        global _process, _blocks
        if torch.compiler.is_compiling():
            if not self._is_withdrawn:
                self._is_withdrawn = True
                _process = self._before
            _blocks = (*_blocks, self._policy)
            return self
        with _lock:
            self._withdraw()
            _blocks = (*_blocks, self._policy)
        _of_context.set((*_of_context.get(), self._policy))
        return self

    def __exit__(self, *error: object) -> None:
        global _blocks
        if torch.compiler.is_compiling():
            _blocks = _without_last(_blocks, self._policy)
            return
        with _lock:
            _blocks = _without_last(_blocks, self._policy)
        _of_context.set(_without_last(_of_context.get(), self._policy))

    def _withdraw(self) -> None:
        """Takes the call back that made this object, whatever was called since."""
        global _process
        if self._is_withdrawn:
            return
        self._is_withdrawn = True
        _calls[:] = [call for call in _calls if call[1] is not self._policy]
        if _process is self._policy:
            _process = _calls[-1][1]

    def __repr__(self) -> str:
        return repr(self._policy)


def skip_policy(policy: str, padding: str | None = None, *, packing: str | None = None) -> _Call:
    """Sets who decides, in the whole process or in a block, whether a mask is needed.

    Where a mask says nothing beyond causality (or nothing at all), attention can do without:
    scaled_dot_product_attention then takes faster kernels. What is skipped so becomes None. Holds
    for the create functions, ``sdpa_mask`` and ``eager_mask`` of ``attn_mask.masking_utils``, for
    transformers' under ``install()``, and for ``sdpa_arguments``; not for flash and flex attention.

    Args:
        policy: "upstream" (the default): as the release of transformers decides, which may look at
            the padding mask's values (a wait for its device), but not while torch.compile traces.
            "shapes": from shapes and what is declared here, so that eager and compiled code choose
            the same and nothing waits. "never": there is always a mask.
        padding: "none" declares for "shapes" that no padding mask hides a key that it has a value
            for. A mask that is written respects it all the same.
        packing: "none" declares for "shapes" that rows hold one sequence each. Else position_ids
            that are given without a cache and a mask make a mask, whatever they say.

    A plain call sets the policy of the process. ``with skip_policy(...):`` leaves that as it is and
    sets the policy of the block, in this thread or task alone; within the block it wins over plain
    calls. New threads start with the process's policy: where activations are checkpointed, run
    backward within the block, too. What torch.compile traces takes the policy of the innermost
    block of any thread. A graph that is being exported or recorded by jit holds a mask under
    "shapes", too.

    Raises ValueError for other words, and for declarations beside a policy that heeds none.
    """
    global _process
    if policy not in _POLICIES:
        raise ValueError(
            f"skip_policy: expected policy to be one of {', '.join(map(repr, _POLICIES))}, "
            f"but got {policy!r}"
        )
    for name, declared in (("padding", padding), ("packing", packing)):
        if declared not in (None, "none"):
            raise ValueError(
                f"skip_policy: expected {name} to be 'none' or None, but got {declared!r}"
            )
        if declared is not None and policy != "shapes":
            raise ValueError(
                f"skip_policy: expected no {name} beside {policy!r}, which heeds no declaration"
            )
    made = SkipPolicy(policy, padding, packing)
    if torch.compiler.is_compiling():
        call = _Call(made, _process)
        _process = made
        return call
    with _lock:
        call = _Call(made, _process)
        if _calls[-1][1] is not _process:  # compiled code has called since
            _calls[:] = [(None, _process)]
        # What came before a call that can't be withdrawn is never needed again.
        bottom = max(
            i for i, (object_of, _) in enumerate(_calls) if not (object_of and object_of())
        )
        _calls[:] = [*_calls[bottom:], (weakref.ref(call), made)]
        _process = made
    return call
