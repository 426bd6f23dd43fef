"""The operators of attn_mask, one cell at a time, with the signatures of torch.ops.attn_mask.

Slow on purpose: nothing here broadcasts, fills or reuses anything, so that a cell's value can be
read off the few lines that decide it.
"""

import itertools
import math

import torch


def attends(row, key, past, window=None):
    """Whether query `row`, with `past` keys before the first query, attends to `key`."""
    position = row + past
    return key <= position and (window is None or key >= position - window)


def visible_keys(mask, dtype):
    """Which cells of a padding mask are exactly 1 once they are of the output's dtype."""
    return [[cell.to(dtype).item() == 1 for cell in row] for row in mask]


def _additive(batch_size, q_length, kv_length, dtype, is_open):
    cells = [
        0.0 if is_open(b, row, key) else torch.finfo(dtype).min
        for b, row, key in itertools.product(range(batch_size), range(q_length), range(kv_length))
    ]
    return torch.tensor(cells, dtype=dtype).reshape(batch_size, 1, q_length, kv_length)


def _make_causal_mask(
    input_ids_shape, past_key_values_length=0, sliding_window=None, *, dtype, device=None
):
    batch_size, q_length = input_ids_shape
    past = past_key_values_length
    return _additive(
        batch_size,
        q_length,
        q_length + past,
        dtype,
        lambda b, row, key: attends(row, key, past, sliding_window),
    )


def to_causal_4d(
    batch_size, query_length, key_value_length, *, dtype, device=None, sliding_window=None
):
    if query_length <= 1 and sliding_window is None:
        return None
    past = key_value_length - query_length
    return _make_causal_mask((batch_size, query_length), past, sliding_window, dtype=dtype)


def to_4d(
    attention_mask_2d,
    query_length,
    *,
    dtype,
    key_value_length=None,
    is_causal=True,
    sliding_window=None,
    unmask_unattended=False,
):
    batch_size, kv_length = attention_mask_2d.shape
    visible = visible_keys(attention_mask_2d, dtype)
    limited = is_causal and (query_length > 1 or sliding_window is not None)
    past = kv_length - query_length
    mask = _additive(
        batch_size,
        query_length,
        kv_length,
        dtype,
        lambda b, row, key: (
            visible[b][key] and (not limited or attends(row, key, past, sliding_window))
        ),
    )
    return _unmask_unattended(mask, torch.finfo(dtype).min) if unmask_unattended else mask


def _expand_mask(mask, tgt_len=None, *, dtype):
    batch_size, kv_length = mask.shape
    visible = visible_keys(mask, dtype)
    q_length = kv_length if tgt_len is None else tgt_len
    return _additive(batch_size, q_length, kv_length, dtype, lambda b, row, key: visible[b][key])


def _same_number(cell, min_dtype):
    # torch compares an integer with a float as float32, everything else in the tensor's dtype.
    number = torch.tensor(min_dtype, dtype=torch.float64 if isinstance(min_dtype, float) else None)
    if number.dtype.is_floating_point and not cell.dtype.is_floating_point:
        cell = cell.to(torch.float32)
    return cell.item() == number.to(cell.dtype).item()


def _unmasked(value):
    return math.copysign(0.0, value) if isinstance(value, float) else 0


def _unmask_unattended(expanded_mask, min_dtype):
    length = expanded_mask.shape[-1] if expanded_mask.dim() else 1
    cells = []
    for row in expanded_mask.reshape(-1, length) if expanded_mask.numel() else []:
        closed = all(_same_number(cell, min_dtype) for cell in row)
        cells += [_unmasked(cell.item()) if closed else cell.item() for cell in row]
    return torch.tensor(cells, dtype=expanded_mask.dtype).reshape(expanded_mask.shape)


def _is_all_ones(mask):
    return all(cell.item() == 1 for cell in mask.flatten())


def _ignore_causal_mask_sdpa(
    attention_mask, inputs_embeds, past_key_values_length, sliding_window=None, is_training=False
):
    """What untraced code decides; `is_training` only matters to traced code."""
    q_length = inputs_embeds.shape[1]
    kv_length = q_length + past_key_values_length
    if sliding_window is not None and kv_length >= sliding_window:
        return False
    mask = attention_mask
    if mask is not None and (mask.dim() == 4 or not _is_all_ones(mask)):
        return False
    return q_length == 1 or kv_length == q_length


def _is_all_visible(mask):
    return all(cell.item() != 0 for cell in mask.flatten())


def _inverted(mask, closed):
    dtype = mask.dtype if mask.dtype.is_floating_point else torch.float32
    cells = [0.0 if cell.to(dtype).item() == 1 else closed for cell in mask.flatten()]
    return torch.tensor(cells, dtype=dtype).reshape(mask.shape)


def _prepare_4d_causal_attention_mask(
    attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window=None
):
    dtype, q_length = inputs_embeds.dtype, input_shape[-1]
    kv_length = q_length + past_key_values_length
    if attention_mask is None:
        return to_causal_4d(
            input_shape[0], q_length, kv_length, dtype=dtype, sliding_window=sliding_window
        )
    if attention_mask.dim() == 4:
        return _inverted(attention_mask, torch.finfo(dtype).min)
    return to_4d(attention_mask, q_length, dtype=dtype, sliding_window=sliding_window)


def _prepare_4d_causal_attention_mask_for_sdpa(
    attention_mask,
    input_shape,
    inputs_embeds,
    past_key_values_length,
    sliding_window=None,
    *,
    allow_skip=True,
    unmask_unattended=False,  # absent: on devices that there are none of here
):
    if allow_skip and _ignore_causal_mask_sdpa(
        attention_mask, inputs_embeds, past_key_values_length, sliding_window
    ):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask
    else:
        mask = _prepare_4d_causal_attention_mask(
            attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window
        )
    if unmask_unattended and attention_mask is not None:
        return _unmask_unattended(mask, torch.finfo(inputs_embeds.dtype).min)
    return mask


def _prepare_4d_attention_mask(mask, tgt_len=None, *, dtype):
    return _expand_mask(mask, tgt_len, dtype=dtype)


def _prepare_4d_attention_mask_for_sdpa(mask, tgt_len=None, *, dtype, allow_skip=True):
    if allow_skip and _is_all_ones(mask):
        return None
    return _expand_mask(mask, tgt_len, dtype=dtype)


def _create_4d_causal_attention_mask(
    input_shape, past_key_values_length=0, sliding_window=None, *, dtype, device=None
):
    q_length = input_shape[-1]
    return to_causal_4d(
        input_shape[0],
        q_length,
        q_length + past_key_values_length,
        dtype=dtype,
        sliding_window=sliding_window,
    )
