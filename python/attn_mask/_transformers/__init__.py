"""What is particular to transformers, and to its releases."""

UPSTREAM = "5.24.0"
"""The release that the mirrors follow. modeling_attn_mask_utils is gone from it: that is 5.23."""
