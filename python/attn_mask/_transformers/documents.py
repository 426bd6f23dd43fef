"""Documents that are packed into one row: which token is of which, and where it stands in it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from attn_mask._core import mask_rules, skipping
from attn_mask._core.log_once import warn_once, was_warned
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


def name_numbers(attention_mask: torch.Tensor, q_length: int) -> None:
    """Logs once that a padding mask with other numbers than 0 and 1 separates no documents.

    Reads values on the CPU alone, and not in steps of decoding.
    """
    kind = "numbers in a padding mask"
    if (
        attention_mask.dtype == torch.bool
        or attention_mask.device.type != "cpu"
        or was_warned(kind)
        or is_opaque(attention_mask)
        or q_length <= 1
    ):
        return
    if bool((attention_mask.to(torch.bool) != attention_mask).any()):
        warn_once(
            kind,
            "attn_mask: a 2-D attention_mask holds numbers other than 0 and 1. As in transformers, "
            "any but 0 is a token that all others may attend to: documents packed into one row see "
            "each other. To keep them apart, run the model within "
            "attn_mask.packed(document_ids=...) under attn_mask.install(), or give it the mask of "
            "attn_mask.rules.documents(ids)",
        )


def name_restarts(position_ids: torch.Tensor, attention_mask: Any) -> None:
    """Logs once that positions start again where that separates no documents.

    Reads values on the CPU alone, and not in steps of decoding.
    """
    kind = "positions that start again"
    if (
        position_ids.dim() != 2
        or position_ids.shape[1] <= 1
        or position_ids.device.type != "cpu"
        or was_warned(kind)
        or is_opaque(position_ids)
    ):
        return
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return
    if attention_mask is not None:
        if (
            not isinstance(attention_mask, torch.Tensor)
            or attention_mask.dim() != 2
            or attention_mask.device.type != "cpu"
            or attention_mask.shape[1] < position_ids.shape[1]
            or is_opaque(attention_mask)
        ):
            return
        # Positions of padding are anything.
        shown = attention_mask[:, -position_ids.shape[1] :] != 0
        if not bool((starts & shown[:, 1:] & shown[:, :-1]).any()):
            return
    warn_once(
        kind,
        "attn_mask: position_ids start again within a row, beside a cache or an attention_mask. As "
        "in transformers, they are then not looked at: documents packed into one row see each "
        "other. To keep them apart, run the model within attn_mask.packed(...), or call "
        "attn_mask.install(packing='position_ids'); or give it use_cache=False and no "
        "attention_mask",
    )


def name_blocks_at_positions(rule: mask_rules.MaskFunction, position_ids: torch.Tensor) -> None:
    """Logs once that block ids are looked up at positions that start again within a row.

    Reads values on the CPU alone.
    """
    kind = "blocks at positions"
    blocks = [part.ids for part in parts_of(rule) if isinstance(part, mask_rules.Blockwise)]
    if (
        not blocks
        or was_warned(kind)
        or is_opaque(position_ids)
        or skipping.current().name == "shapes"
        or not _may_hold(position_ids, lambda ids: count_sequences(ids) > 0)
        or not any(_may_hold(ids, lambda ids: ids >= 0) for ids in blocks)
    ):
        return
    warn_once(
        kind,
        "attn_mask: position_ids start again within a row, and a layer looks up which tokens are "
        "of one image at these positions. As in transformers, images of a row's first document "
        "stand in each later one. To look them up where they are, run the model within "
        "attn_mask.packed(document_ids=...) under attn_mask.install()",
    )


def parts_of(rule: Any) -> Iterator[mask_rules.MaskFunction]:
    """The rule, and all that it is made of."""
    yield rule
    for part in (*getattr(rule, "rules", ()), getattr(rule, "rule", None)):
        if part is not None:
            yield from parts_of(part)


def _may_hold(tensor: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether it holds for a value; True where reading them would wait for a device."""
    return tensor.device.type != "cpu" or is_opaque(tensor) or bool(of(tensor).any())


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
