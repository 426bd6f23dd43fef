"""Attention by a rule, without a mask of queries x keys."""

from attn_mask._core.attend import AttentionPlan as AttentionPlan
from attn_mask._core.attend import Segment as Segment
from attn_mask._core.attend import attention_plan as attention_plan
from attn_mask._core.attend import scaled_dot_product_attention as scaled_dot_product_attention

__all__ = ["AttentionPlan", "Segment", "attention_plan", "scaled_dot_product_attention"]
