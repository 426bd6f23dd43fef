"""Block masks of a rule, for flex attention."""

from attn_mask._core.blocks import block_mask_to as block_mask_to
from attn_mask._core.blocks import create_block_mask as create_block_mask

__all__ = ["block_mask_to", "create_block_mask"]
