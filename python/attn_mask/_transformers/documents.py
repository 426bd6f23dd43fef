"""Documents that are packed into one row: which token is of which, and where it stands in it."""

from typing import Any

import torch
import torch.nn.functional as F

from attn_mask._core import skipping
from attn_mask._core.tracing import is_opaque


def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Which of several packed sequences each query belongs to.

    A sequence ends where the next position is not one higher. Returns ints [b, q] that count
    sequences, or None when each row holds a single one (while tracing, values are not read), and
    for position_ids that are not 2-D [b, q]: multimodal rotary positions have three dimensions, and
    their jumps are no borders.
    """
    if position_ids.dim() != 2:
        return None
    policy = skipping.current()
    if policy.packing == "none":
        return None
    sequences = count_sequences(position_ids)
    if policy.name != "shapes" and not is_opaque(sequences) and bool((sequences[:, -1] == 0).all()):
        return None
    return sequences


def count_sequences(position_ids: torch.Tensor) -> torch.Tensor:
    """[b, q]: how many sequences began before each query's in its row."""
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return starts.cumsum(-1)


def number_of_tokens(q_offset: Any, q_length: Any, kv_length: Any, cache: Any) -> Any:
    """How many tokens there are, those in the cache included; None where that is not known."""
    if cache is None:
        return kv_length
    if isinstance(q_offset, torch.Tensor):
        # It would have to be waited for, on another device; or each row has its own.
        if q_offset.numel() != 1 or q_offset.device.type != "cpu" or is_opaque(q_offset):
            return None
        q_offset = int(q_offset)
    return q_offset + q_length


def left_padding_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """How much padding is before each row's first token, [b]; not what is within or after."""
    # ONNX has no sum of booleans, which torch would take.
    return (attention_mask.long().cumsum(dim=-1) == 0).sum(dim=-1)


def positions_in_runs(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """How far each token [b, n] is from the first of its run of ids (that is no left padding)."""
    index = torch.arange(ids.shape[1], device=ids.device)
    begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    starts = torch.where(begins, index, 0).cummax(-1).values
    if attention_mask is not None:
        first = left_padding_of(attention_mask)[:, None]
        starts = torch.where(index >= first, starts.maximum(first), starts)
    return index - starts
