"""Who decides whether attention gets a mask at all, where it could do without one."""

from typing import Any

import torch

from attn_mask._tracing import is_jit_tracing

__all__ = ["SkipPolicy", "current", "skip_policy"]

_POLICIES = ("upstream", "shapes", "never")


class SkipPolicy:
    """A policy that skip_policy set; as a context manager it restores the one before."""

    def __init__(self, name: str, padding: str | None, packing: str | None):
        self.name = name
        self.padding = padding
        self.packing = packing
        self._before: SkipPolicy | None = None

    def __enter__(self) -> "SkipPolicy":
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        if self._before is not None:
            _current, self._before = self._before, None

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
        if torch.compiler.is_exporting() or is_jit_tracing():
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
_current = UPSTREAM


def current() -> SkipPolicy:
    """The policy of this process."""
    return _current


def skip_policy(
    policy: str, padding: str | None = None, *, packing: str | None = None
) -> SkipPolicy:
    """Sets who decides, in the whole process, whether a mask is needed.

    Where a mask says nothing beyond causality (or nothing at all), attention can do without:
    scaled_dot_product_attention then takes faster kernels. What is skipped so becomes None. Holds
    for the create functions, ``sdpa_mask`` and ``eager_mask`` of ``attn_mask.masking_utils``, for
    transformers' under ``install()``, and for ``sdpa_arguments``; not for flash and flex attention.

    Args:
        policy: "upstream" (so at first): as the release of transformers decides, which may look at
            the padding mask's values (a wait for its device), but not while torch.compile traces.
            "shapes": from shapes and what is declared here, so that eager and compiled code choose
            the same and nothing waits. "never": there is always a mask.
        padding: "none" declares for "shapes" that no padding mask hides a key that it has a value
            for. A mask that is written respects it all the same.
        packing: "none" declares for "shapes" that rows hold one sequence each. Else position_ids
            that are given without a cache and a mask make a mask, whatever they say.

    It takes effect at once; used as a context manager, until its end, where the policy before
    returns. A graph that is being exported or recorded by jit holds a mask under "shapes", too.

    Raises ValueError for other words, and for declarations beside a policy that heeds none.
    """
    global _current
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
    made._before = _current
    _current = made
    return made
