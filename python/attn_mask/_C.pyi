"""Operators as plain functions, for eager code; see csrc/python/module.cpp."""

from collections.abc import Callable
from typing import Any

import torch

OPCODES: dict[str, int]
BLOCK_STATES: dict[str, int]
ABSENT: int
FAR: int
OPEN: int
MAX_DEPTH: int
MAX_STEPS: int
UNMASKED_DEVICES: tuple[str, ...]

def check_operators() -> None: ...
def operators() -> dict[str, dict[str, bool]]: ...
def build_info() -> dict[str, object]: ...
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

# The operators, with all arguments of their schemas (csrc/ops/table.h) by place, but for
# stride_multiple.
def __getattr__(name: str) -> Callable[..., Any]: ...
