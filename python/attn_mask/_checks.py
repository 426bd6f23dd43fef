"""What functions require of their arguments before anything else looks at them."""

from typing import Any

import torch

__all__ = ["check_flag", "check_integer", "check_strided"]


def check_strided(function: str, argument: str, tensor: Any) -> None:
    """Raises TypeError for what is no tensor, and for nested and sparse tensors.

    Torch's own errors for those come from inside whatever happens to look at them first.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got {type(tensor).__name__}"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{function}: expected {argument} to be a strided tensor, but got {kind}")


def check_integer(function: str, argument: str, value: Any) -> None:
    """Raises TypeError for what is no size or offset, ValueError for what fits into no 64 bits.

    A tensor is one: graphs of torch.jit hold sizes so.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{function}: expected {argument} to be an int, but got {type(value).__name__}"
        )
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{function}: expected {argument} to be within 2^63 of 0, but got {value}")


def check_flag(function: str, argument: str, value: Any) -> None:
    """Raises TypeError for what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{function}: expected {argument} to be a bool, but got {type(value).__name__}"
        )
