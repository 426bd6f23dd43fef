"""Operators as plain functions, for eager code; see csrc/python/module.cpp."""

from collections.abc import Callable
from typing import Any

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

# The operators, with the arguments of their schemas (csrc/ops/core/operators.h), by place or by
# name.
def __getattr__(name: str) -> Callable[..., Any]: ...
