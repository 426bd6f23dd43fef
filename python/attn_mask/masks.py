"""Dense masks of a rule: boolean ones, and additive ones."""

from attn_mask._core.dense import additive as additive
from attn_mask._core.dense import boolean as boolean

__all__ = ["additive", "boolean"]
