"""Block masks of a rule, for flex attention."""

from attn_mask._core.blocks import *  # noqa: F403
from attn_mask._core.blocks import __all__ as __all__
