"""Operators as plain functions, for eager code; see csrc/python/module.cpp."""

import torch

FAR: int
UNMASKED_DEVICES: tuple[str, ...]

def check_operators() -> None: ...
def build_info() -> dict[str, object]: ...
def to_causal_4d(
    batch_size: int,
    query_length: int,
    key_value_length: int,
    dtype: torch.dtype,
    device: torch.device,
    sliding_window: int | None,
    /,
) -> torch.Tensor | None: ...
def to_4d(
    attention_mask_2d: torch.Tensor,
    query_length: int,
    dtype: torch.dtype,
    key_value_length: int | None,
    is_causal: bool,
    sliding_window: int | None,
    unmask_unattended: bool,
    /,
) -> torch.Tensor: ...
def expand_mask(mask: torch.Tensor, tgt_len: int | None, dtype: torch.dtype, /) -> torch.Tensor: ...
def ignore_causal_mask_sdpa(
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    past_key_values_length: int,
    sliding_window: int | None,
    /,
) -> bool: ...
def is_all_visible(mask: torch.Tensor, /) -> bool: ...
def prepare_4d_attention_mask_for_sdpa(
    mask: torch.Tensor, tgt_len: int | None, dtype: torch.dtype, /
) -> torch.Tensor | None: ...
def rule_mask(
    rule: list[int],
    operands: list[torch.Tensor],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    q_positions: torch.Tensor | None,
    kv_positions: torch.Tensor | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    bias: torch.Tensor | None,
    unmask_unattended: bool,
    masked_value: float | None,
    /,
) -> torch.Tensor: ...
def block_mask(
    rule: list[int],
    operands: list[torch.Tensor],
    batch_size: int,
    heads: int,
    q_length: int,
    kv_length: int,
    q_block_size: int,
    kv_block_size: int,
    q_offset: int,
    kv_offset: int,
    q_positions: torch.Tensor | None,
    kv_positions: torch.Tensor | None,
    device: torch.device | None,
    separate_full_blocks: bool,
    kv_width: int | None,
    q_width: int | None,
    /,
) -> list[torch.Tensor]: ...
