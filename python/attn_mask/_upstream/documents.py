"""Documents that are packed into one row: which token is of which, and where it stands in it."""

from typing import Any

import torch
import torch.nn.functional as F

from attn_mask import _skipping, rules
from attn_mask._named_once import is_named, name_once
from attn_mask._tracing import is_opaque, is_recording


def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Which of several packed sequences each query belongs to.

    A sequence ends where the next position is not one higher. Returns ints [b, q] that count
    sequences, or None when each row holds a single one (while tracing, values are not read), and
    for position_ids that are not 2-D [b, q]: multimodal rotary positions have three dimensions, and
    their jumps are no borders.
    """
    if position_ids.dim() != 2:
        return None
    policy = _skipping.current()
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
        or is_named(kind)
        or is_opaque(attention_mask)
        or q_length <= 1
    ):
        return
    if bool((attention_mask.to(torch.bool) != attention_mask).any()):
        name_once(
            kind,
            "attn_mask: a 2-D attention_mask holds numbers other than 0 and 1. As in transformers, "
            "any but 0 is a token that all others may attend to: documents packed into one row see "
            "each other. To keep them apart, give the create functions of attn_mask.masking_utils "
            "document_ids, or a rule attn_mask.rules.documents(ids)",
        )


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


def ids_of_documents(
    name: str,
    document_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    batch_size: int,
    tokens: Any,
    kv_end: Any,
    device: torch.device,
) -> torch.Tensor:
    """The document of each token, ints [b, n].

    ``kv_end``: where a cache ends, else None. Slots in it after the last token (static caches) are
    in a document that no token is in.
    """
    if document_ids is not None and cu_seqlens is not None:
        raise ValueError(f"{name}: expected document_ids or cu_seqlens, but got both")
    argument = "document_ids" if cu_seqlens is None else "cu_seqlens"
    given = document_ids if cu_seqlens is None else cu_seqlens
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"{name}: expected {argument} to be a tensor, but got {type(given).__name__}"
        )
    if given.dtype not in rules.ID_DTYPES:
        raise TypeError(
            f"{name}: expected {argument} to hold signed integers or uint8, but got {given.dtype}"
        )
    if cu_seqlens is None:
        if given.dim() != 2 or given.shape[0] not in (1, batch_size):
            raise ValueError(
                f"{name}: expected document_ids to be [{batch_size}, length], "
                f"but got {list(given.shape)}"
            )
        if tokens is not None and not is_recording() and given.shape[1] != tokens:
            raise ValueError(
                f"{name}: expected document_ids to be of length {tokens}, for all tokens up to "
                f"the last query, but got {list(given.shape)}"
            )
        ids = given.to(device)
        if kv_end is not None and kv_end > ids.shape[1]:
            no_document = torch.iinfo(torch.int64).min
            ids = F.pad(ids.long(), (0, kv_end - ids.shape[1]), value=no_document)
        return ids.expand(batch_size, -1)
    if given.dim() != 1 or given.shape[0] == 0:
        raise ValueError(
            f"{name}: expected cu_seqlens to be 1-D [documents + 1], but got {list(given.shape)}"
        )
    # On another device it would have to be waited for; there, wrong ones give wrong documents.
    if given.device.type == "cpu" and tokens is not None and not is_opaque(given):
        borders = given.tolist()
        if borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
            raise ValueError(
                f"{name}: expected cu_seqlens to rise from 0 to the number of tokens {tokens}, "
                f"but got {borders}"
            )
    index = torch.arange(tokens if kv_end is None else kv_end, device=device)
    ids = torch.searchsorted(given.to(device=device, dtype=torch.int64)[1:], index, right=True)
    return ids.expand(batch_size, -1)


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
