"""Attention by a rule, without a mask of queries x keys."""

from attn_mask._core.attend import *  # noqa: F403
from attn_mask._core.attend import __all__ as __all__
