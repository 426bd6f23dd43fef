"""What scaled_dot_product_attention is given as a mask, decided where graphs are recorded.

The same as csrc/ops/sdpa_decision.h, which operators and the C++ API call: torch.compile and
torch.export see nothing of C++. Tests hold the two together.
"""

from collections.abc import Callable
from typing import Any

import torch

from attn_mask._core.library import UNMASKED_DEVICES

__all__ = ["is_causal_enough", "is_result", "is_unmasked"]


def is_unmasked(mask: torch.Tensor, unmask_unattended: bool | None = None) -> bool:
    """Whether rows of a mask without a key are unmasked: by the argument, else by its device."""
    if unmask_unattended is None:
        return mask.device.type in UNMASKED_DEVICES
    return unmask_unattended


def is_result(mask: torch.Tensor | None, unmask_unattended: bool | None = None) -> bool:
    """A 4D mask is the result as it is, but for rows that are unmasked."""
    return mask is not None and mask.dim() == 4 and not is_unmasked(mask, unmask_unattended)


def is_causal_enough(
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    past_key_values_length: Any,
    sliding_window: Any,
    is_all_ones: Callable[[torch.Tensor], bool],
) -> bool:
    """Whether ``is_causal`` (or there being one query) replaces the mask.

    ``is_all_ones`` reads a 2D mask, where shapes allow it.
    """
    q_length = inputs_embeds.shape[1]
    kv_length = q_length + past_key_values_length
    shapes_allow = (q_length == 1 or kv_length == q_length) and (
        sliding_window is None or kv_length < sliding_window
    )
    if attention_mask is None or not shapes_allow:
        return bool(shapes_allow)
    return attention_mask.dim() != 4 and is_all_ones(attention_mask)
