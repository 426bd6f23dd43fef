"""What functions require of their arguments before anything else looks at them."""

from numbers import Real
from typing import Any

import torch

from attn_mask._tracing import is_recording


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

    Not while a graph is recorded: dynamo can't look at what stands for an int there.
    """
    if is_recording():
        return
    is_one = isinstance(value, torch.Tensor) or hasattr(value, "__index__")
    if isinstance(value, bool) or not is_one:
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


def checked_masked_value(function: str, value: Any) -> float | None:
    """What masked elements hold, as it was given; whether a dtype holds it, the operators see.

    Raises TypeError for what is no number, ValueError for NaN and what is above 0.
    """
    if value is None:
        return None
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"{function}: expected masked_value to be a number or None, "
            f"but got {type(value).__name__}"
        )
    if not value <= 0:
        raise ValueError(f"{function}: expected masked_value to be at most 0, but got {value}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(
            f"{function}: expected masked_value to be a number that float64 holds, or -inf"
        ) from error
