"""How often masks were made so far in this process, for status()."""

from collections import Counter

import torch

from attn_mask._core import process

counts: Counter[str] = process.kept("counts", Counter)


def count(kind: str) -> None:
    """Nothing while torch.compile traces: a graph would record or guard on the number."""
    if not torch.compiler.is_compiling():
        counts[kind] += 1
