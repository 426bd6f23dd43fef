"""What transformers 4 did and 5 does not in modeling_attn_mask_utils; ``legacy`` calls it."""

from collections.abc import Sequence

import torch

from attn_mask._core.tracing import is_recording


def unmask_by_index(
    expanded_mask: torch.Tensor, attention_mask: torch.Tensor, unmasked_value: bool | float
) -> torch.Tensor:
    """_unmask_unattended until 4.38."""
    first = _first_attended(attention_mask)
    heads = (slice(None),) if expanded_mask.dim() == 4 else ()
    if is_recording():
        # A graph must depend neither on values nor on how many rows there are.
        first = first.to(expanded_mask.device)
        by_query = expanded_mask.transpose(1, 2) if heads else expanded_mask
        rows = torch.arange(by_query.shape[1], device=first.device) < first[:, None]
        by_query.masked_fill_(rows[(..., *(None,) * (by_query.dim() - 2))], unmasked_value)
        return expanded_mask
    ends = first.tolist()
    _check_rows(ends, expanded_mask)
    if expanded_mask.is_contiguous():
        for row, end in enumerate(ends):
            if end > 0:
                expanded_mask[(row, *heads, slice(end))] = unmasked_value
    elif any(ends):  # torch fails here where elements share memory
        rows = torch.arange(max(ends), device="cpu") < first[:, None]
        batch, query = rows.nonzero(as_tuple=True)
        expanded_mask[(batch, *heads, query)] = unmasked_value
    return expanded_mask


def _first_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """The index of each row's first attended key, [b] on the CPU; 0 where none is attended.

    Raises ValueError, TypeError and IndexError for padding that can't be read so.
    """
    if attention_mask.dim() != 2 or attention_mask.is_meta:
        raise ValueError(
            "_unmask_unattended: expected attention_mask to be 2-D [batch_size, kv_length] and to "
            f"have values, but got {attention_mask.dim()}-D {list(attention_mask.shape)} on "
            f"{attention_mask.device}"
        )
    kv_length = attention_mask.shape[1]
    falling = torch.arange(kv_length, 0, -1, device="cpu")
    try:
        earliness = attention_mask.cpu() * falling
    except RuntimeError as error:
        raise TypeError(
            "_unmask_unattended: expected attention_mask to be of a dtype that torch multiplies, "
            f"but got {attention_mask.dtype}"
        ) from error
    if kv_length == 0:
        raise IndexError("_unmask_unattended: expected attention_mask to have keys, but got none")
    return torch.argmax(earliness, 1)


def _check_rows(first_attended: list[int], expanded_mask: torch.Tensor) -> None:
    """There must be a row for each index that is unmasked."""
    query_length = expanded_mask.shape[-2 if expanded_mask.dim() == 4 else 1]
    if max(first_attended, default=0) > query_length:
        raise IndexError(
            "_unmask_unattended: expected expanded_mask to have a row for each key before the "
            f"first attended one, but got {list(expanded_mask.shape)} for first keys "
            f"{first_attended}"
        )


def check_4d(
    attention_mask: torch.Tensor, input_shape: Sequence[int], key_value_length: int
) -> None:
    shape, expected = tuple(attention_mask.shape), (input_shape[0], 1, input_shape[1])
    if shape != (*expected, key_value_length):
        raise ValueError(
            f"Incorrect 4D attention_mask shape: {shape}; expected: "
            f"{(*expected, key_value_length)}."
        )


def check_maximum(attention_mask: torch.Tensor) -> None:
    if attention_mask.numel() == 0:
        raise ValueError(
            "_prepare_4d_causal_attention_mask_for_sdpa: expected a 4-D attention_mask to have "
            f"elements, but got {list(attention_mask.shape)}"
        )
    try:
        maximum = attention_mask.max()
    except NotImplementedError as error:
        raise TypeError(
            "_prepare_4d_causal_attention_mask_for_sdpa: expected a 4-D attention_mask to be "
            f"of a dtype with a maximum, but got {attention_mask.dtype}"
        ) from error
    if maximum != 0:
        raise ValueError("Custom 4D attention mask should be passed in inverted form with max==0`")
