"""The policy by which attention gets no mask where it can do without one."""

import contextvars
from typing import Any, Literal, overload

import torch

from attn_mask._core.forking import fork_safe_lock
from attn_mask._core.process import kept
from attn_mask._core.tracing import is_exporting, is_jit_tracing

_POLICIES = ("upstream", "shapes", "never")


class SkipPolicy:
    """Decides by shapes and declarations; under "upstream", callers do what the release does."""

    def __init__(self, name: str, padding: str | None, packing: str | None):
        self.name = name
        self.padding = padding
        self.packing = packing
        self.instead: SkipPolicy | None = None
        """The policy that holds in its place, once the call that made it is withdrawn."""

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
        """Whether ``is_causal`` stands for the mask, without reading any tensor's values.

        Not used under "upstream". ``attention_mask`` is [b, n], as it was given.
        """
        if self.name == "never" or not self._knows(attention_mask):
            return False
        if local_size is not None and kv_length >= local_size:
            return False
        if (q_length == 1 or kv_length == q_length) and _reaches(
            attention_mask, kv_length, kv_offset
        ):
            return True
        # Before anything is cached, keys after the queries are hidden by causality.
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
    """Whether the mask has a value for each key: those after its end are padding."""
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


class _Block:
    """One entry of a block: over also where it is left in another thread or task.

    Generators end where they are closed or collected.
    """

    def __init__(self, policy: SkipPolicy):
        self.policy = policy
        self.is_over = False


# The blocks around this thread's or task's code, the innermost last.
_of_context: contextvars.ContextVar[tuple[_Block, ...]] = contextvars.ContextVar(
    "attn_mask.skip_policy", default=()
)

# For a module that is imported again: the process's policy, as eager code has set it.
_process_kept: list[SkipPolicy] = kept("policy of the process", lambda: [UPSTREAM])
_process = _process_kept[0]
_lock = fork_safe_lock("skip_policy")


def current() -> SkipPolicy:
    """The policy of the innermost block around this code, else that of the process."""
    if torch.compiler.is_compiling():
        return _blocks[-1] if _blocks else _process
    for block in reversed(_of_context.get()):
        if not block.is_over:
            return block.policy
    return _process


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
        self._entered: list[_Block] = []

    def __enter__(self) -> "_Call":
        global _blocks
        if torch.compiler.is_compiling():
            self._withdraw()
            _blocks = (*_blocks, self._policy)
            return self
        with _lock:
            self._withdraw()
            _process_kept[0] = _process
            _blocks = (*_blocks, self._policy)
            block = _Block(self._policy)
            self._entered.append(block)
        _of_context.set((*(other for other in _of_context.get() if not other.is_over), block))
        return self

    def __exit__(self, *error: object) -> None:
        global _blocks
        if torch.compiler.is_compiling():
            _blocks = _without_last(_blocks, self._policy)
            return
        here = _of_context.get()
        with _lock:
            _blocks = _without_last(_blocks, self._policy)
            entered = [block for block in self._entered if block in here] or self._entered
            if entered:
                entered[-1].is_over = True
                self._entered.remove(entered[-1])
        _of_context.set(tuple(block for block in here if not block.is_over))

    def _withdraw(self) -> None:
        """Takes the call back that made this object, whatever was called since."""
        global _process
        if self._policy.instead is not None:
            return
        before = self._before
        while before.instead is not None:  # was withdrawn, too
            before = before.instead
        self._policy.instead = before
        if _process is self._policy:
            _process = before

    def __repr__(self) -> str:
        return repr(self._policy)


@overload
def skip_policy(
    policy: Literal["shapes"],
    padding: Literal["none"] | None = None,
    *,
    packing: Literal["none"] | None = None,
) -> _Call: ...
@overload
def skip_policy(
    policy: Literal["upstream", "never"], padding: None = None, *, packing: None = None
) -> _Call: ...
def skip_policy(
    policy: Literal["upstream", "shapes", "never"],
    padding: Literal["none"] | None = None,
    *,
    packing: Literal["none"] | None = None,
) -> _Call:
    """Sets how it is decided, in the whole process or in a block, whether a mask is needed.

    Where a mask masks nothing beyond causality (or nothing at all), attention can do without:
    scaled_dot_product_attention then takes faster kernels. What is skipped so becomes None. Holds
    for the create functions, ``sdpa_mask`` and ``eager_mask`` of ``attn_mask.masking_utils``, for
    transformers' under ``install()``, and for ``sdpa_arguments``; not for flash and flex attention.

    Args:
        policy: "upstream" (the default): as the release of transformers decides, which may read
            the padding mask's values (a wait for its device), but not while torch.compile traces.
            "shapes": from shapes and what is declared here, so that eager and compiled code choose
            the same and nothing waits. "never": there is always a mask.
        padding: "none" declares for "shapes" that no padding mask hides a key that it has a value
            for. A mask that is written respects it all the same.
        packing: "none" declares for "shapes" that rows hold one sequence each. Else position_ids
            that are given without a cache and a mask make a mask, whatever they hold.

    A plain call sets the policy of the process. ``with skip_policy(...):`` leaves that as it is and
    sets the policy of the block, in this thread or task alone; within the block it wins over plain
    calls. New threads start with the process's policy: where activations are checkpointed, run
    backward within the block, too. What torch.compile traces takes the policy of the innermost
    block of any thread. A graph that is being exported or recorded by jit holds a mask under
    "shapes", too.

    Raises ValueError for other words, and for declarations beside a policy that heeds none.

    >>> with attn_mask.skip_policy("never"):
    ...     attn_mask.masking_utils.sdpa_mask(1, 4, 4).shape
    torch.Size([1, 1, 4, 4])
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
                f"skip_policy: expected no {name} beside {policy!r}, which ignores declarations"
            )
    made = SkipPolicy(policy, padding, packing)
    if torch.compiler.is_compiling():
        call = _Call(made, _process)
        _process = made
        return call
    with _lock:
        call = _Call(made, _process)
        _process = _process_kept[0] = made
    return call
