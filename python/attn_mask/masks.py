"""Dense masks of a rule: boolean ones, and additive ones."""

from attn_mask._core.dense import *  # noqa: F403
from attn_mask._core.dense import __all__ as __all__
