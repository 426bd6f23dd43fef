"""attn_mask.status: whether install() is on, and what happened so far."""

import sys
from dataclasses import dataclass
from typing import Any

from attn_mask._core.events import counts
from attn_mask._core.log_once import texts
from attn_mask._transformers import writers
from attn_mask._transformers.install import replacement

__all__ = ["Status", "status"]


@dataclass(frozen=True)
class Status:
    """What ``attn_mask.status()`` gives; str() of it is a text to print.

    Attributes:
        transformers: the release under which install() is on, or None.
        replaced: what of transformers is ours by now.
        stays: what is not, and why.
        calls: how often each kind of mask was made or skipped in eager code, in this process.
        fallbacks: how often a mask function that is no rule was called to make a mask.
        warnings: what the logger "attn_mask" has named so far.
        packing: install()'s option of that name that holds now, or None without install().
        documents: what the create functions of each type of model got so far to keep packed
            documents apart, in blocks of packed() and under ``packing``.
        attention: the attn_implementation that register_attention() or install() gave
            transformers' models, or None.
    """

    transformers: str | None
    replaced: tuple[str, ...]
    stays: tuple[str, ...]
    calls: dict[str, int]
    fallbacks: int
    warnings: tuple[str, ...]
    attention: str | None
    packing: str | None = None
    documents: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return self.transformers is not None

    def __str__(self) -> str:
        if self.installed:
            lines = [f"attn_mask.install: installed, transformers {self.transformers}"]
        else:
            lines = ["attn_mask.install: not installed"]
        name = "none" if self.attention is None else repr(self.attention)
        lines.append(f"registered attention: {name}")
        if self.packing is not None:
            lines.append(f"packing: {self.packing!r}")
        calls = [f"{kind} {number}" for kind, number in sorted(self.calls.items())]
        fallbacks = [f"mask functions that are no rules were called {self.fallbacks} times"]
        for title, entries in (
            ("replaced", self.replaced),
            ("stays", self.stays),
            ("calls", calls),
            ("fallbacks", fallbacks if self.fallbacks else []),
            ("documents", self.documents),
            ("warnings", self.warnings),
        ):
            lines.append(f"{title}:" if entries else f"{title}: none")
            lines += [f"  {entry}" for entry in entries]
        return "\n".join(lines)

    __repr__ = __str__


def status() -> Status:
    """Whether transformers makes its masks natively, and what happened so far in this process.

    Calls that torch.compile traces are not counted.

    >>> import attn_mask
    >>> print(str(attn_mask.status()).splitlines()[0])
    attn_mask.install: not installed
    """
    found = replacement()
    calls = dict(counts)
    fallbacks = calls.pop("fallback", 0)
    return Status(
        None if found is None else found.transformers,
        () if found is None else found.replaced,
        () if found is None else found.stays,
        calls,
        fallbacks,
        tuple(texts),
        _registered(),
        None if found is None else writers.state.options.packing,
        writers.documents_so_far(),
    )


def _registered() -> str | None:
    # Imported to be registered, not before.
    attention: Any = sys.modules.get("attn_mask._transformers.attention_interface")
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if attention is None or modeling is None:
        return None
    found = modeling.AttentionInterface().get(attention.NAME)
    return str(attention.NAME) if found is attention.attention else None
