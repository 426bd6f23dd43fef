"""The policy by which attention gets no mask where it can do without one."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch

from attn_mask._core.operators import operators
from attn_mask._core.process import kept
from attn_mask._core.scopes import Blocks, Scope, lock
from attn_mask._core.tracing import is_exporting, is_jit_tracing, is_opaque
from attn_mask._core.write import Geometry, padded

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
        geometry: Geometry,
        local_size: int | None,
    ) -> bool:
        """Whether ``is_causal`` stands for the mask, without reading any tensor's values.

        Not used under "upstream". ``attention_mask`` is [b, n], as it was given.
        """
        _, q_length, q_offset, kv_length, kv_offset = geometry
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

# For a module that is imported again: the process's policy, as eager code has set it.
_process_kept: list[SkipPolicy] = kept("policy of the process", lambda: [UPSTREAM])
_policies = Scope("skip_policy", _process_kept[0])

current = _policies.current
"""The policy of the innermost block around this code, else that of the process."""


class _Call(Blocks[SkipPolicy]):
    """What skip_policy returns: as a context manager, the policy of a block instead."""

    def __init__(self, policy: SkipPolicy, before: SkipPolicy):
        super().__init__(_policies, policy)
        self._policy = policy
        self._before = before

    def __enter__(self) -> "_Call":
        if torch.compiler.is_dynamo_compiling():
            self._withdraw()
        else:
            with lock:
                self._withdraw()
                _process_kept[0] = _policies.default
        return super().__enter__()

    def _withdraw(self) -> None:
        """Takes the call back that made this object, whatever was called since."""
        if self._policy.instead is not None:
            return
        before = self._before
        while before.instead is not None:  # was withdrawn, too
            before = before.instead
        self._policy.instead = before
        if _policies.default is self._policy:
            _policies.default = before

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
    if torch.compiler.is_dynamo_compiling():
        call = _Call(made, _policies.default)
        _policies.default = made
        return call
    with lock:
        call = _Call(made, _policies.default)
        _policies.default = _process_kept[0] = made
    return call


class Decisions(NamedTuple):
    """How a release decides that attention can do without a mask. Reads tensors, if not tracing.

    A SkipPolicy decides by functions of the same names.
    """

    skips_causal: Callable[[torch.Tensor | None, Geometry, int | None], bool]
    """(attention_mask, geometry, local_size)"""
    skips_bidirectional: Callable[[torch.Tensor | None, int, Any, int | None], bool]
    """(attention_mask, kv_length, kv_offset, local_size)"""


def shows_all(mask: torch.Tensor) -> bool:
    """Whether all of a mask is True, or all of its numbers are 1."""
    if mask.dtype != torch.bool:
        return bool(mask.sum() == mask.numel())
    return bool(operators()._is_all_visible(mask))


def hides_nothing(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> bool:
    """Whether each key is visible, as far as skip_policy permits to find out."""
    policy = current()
    if policy.name != "upstream":
        return policy.skips_bidirectional(attention_mask, kv_length, kv_offset, None)
    # In a graph that is kept, sizes may change, and with them what is_causal means.
    if is_exporting() or is_jit_tracing():
        return False
    if attention_mask is None:
        return True
    if is_opaque(attention_mask) or attention_mask.shape[-1] < kv_offset + kv_length:
        return False
    return shows_all(attention_mask[:, kv_offset : kv_offset + kv_length])


def _causal(
    attention_mask: torch.Tensor | None, geometry: Geometry, local_size: int | None
) -> bool:
    _, q_length, q_offset, kv_length, kv_offset = geometry
    if local_size is not None and kv_length >= local_size:
        return False
    mask = attention_mask
    if mask is not None and mask.shape[-1] < kv_length + kv_offset:
        mask = padded(mask, kv_length + kv_offset, 0)
    if torch.compiler.is_exporting() or (mask is not None and is_opaque(mask)):
        return False
    # With an offset for each batch row, keys after one row's queries are not after another's.
    if isinstance(q_offset, torch.Tensor) and (q_offset.numel() != 1 or is_opaque(q_offset)):
        return False
    if mask is not None and mask.shape[-1] > kv_length:
        mask = mask[:, kv_offset : kv_offset + kv_length]
    is_plain = q_length == 1 or kv_length == q_length
    if is_plain and (mask is None or shows_all(mask)):
        return True
    # Before anything is cached, keys after the queries are hidden by causality.
    if not bool(q_offset == 0):
        return False
    if mask is None:
        return True
    if is_plain and mask.shape[-1] <= q_length:
        return False  # all of it was looked at
    return shows_all(mask[:, :q_length]) and shows_all(~mask[:, q_length:])


def _bidirectional(
    attention_mask: torch.Tensor | None, kv_length: int, kv_offset: Any, local_size: int | None
) -> bool:
    mask = attention_mask
    if mask is not None:
        mask = padded(mask, kv_length + kv_offset, 0)
    if torch.compiler.is_exporting() or (mask is not None and is_opaque(mask)):
        return False
    if local_size is not None and kv_length >= local_size:
        return False
    return mask is None or bool(operators()._is_all_visible(mask))


OWN_DECISIONS = Decisions(_causal, _bidirectional)
"""Of the mirrors, and of transformers since 5.20."""
