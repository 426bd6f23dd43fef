"""What functions require of their arguments before anything else uses them."""

import inspect
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from attn_mask._tracing import is_recording


def check_strided(function: str, argument: str, tensor: Any) -> None:
    """Raises TypeError for what is no tensor, and for nested and sparse tensors.

    Torch's own errors for those come from inside whatever happens to read them first.
    """
    if not isinstance(tensor, torch.Tensor):
        check_no_rule(function, argument, tensor)
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got {type(tensor).__name__}"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{function}: expected {argument} to be a strided tensor, but got {kind}")


def check_no_rule(function: str, argument: str, mask: Any) -> None:
    """Raises TypeError for a rule, or any mask function, where a mask is wanted."""
    if mask is not None and not isinstance(mask, torch.Tensor) and callable(mask):
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got a mask function, {mask!r}: "
            "pass its mask, attn_mask.boolean(rule, batch_size, q_length, kv_length), for eager "
            "attention attn_mask.additive, for flex attention attn_mask.create_block_mask"
        )


def check_integer(function: str, argument: str, value: Any) -> None:
    """Raises TypeError for what is no size or offset, ValueError for what fits into no 64 bits.

    Not while a graph is recorded: dynamo can't inspect what stands for an int there.
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
    """What masked elements hold, as it was given; operators check whether a dtype holds it.

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


# Torch's errors where a tensor is used as a bool: under vmap, and with several elements.
_OF_BRANCHES = re.compile("data-dependent control flow|Boolean value of Tensor")

# And where its value is needed as a number of Python's or an array of NumPy's.
_OF_VALUES = re.compile(
    r"vmap: It looks like you're calling \.item\(\)|cannot be converted to Scalar"
    "|only integer tensors of a single element|Cannot access data pointer of Tensor"
    "|only one element tensors can be converted"
)


def expected_of_function(function: Callable[..., Any], error: Exception) -> str | None:
    """What a mask function must be, so as not to raise this error; None if that is not known."""
    if isinstance(error, TypeError):
        try:
            inspect.signature(function).bind(0, 0, 0, 0)
        except TypeError as mismatch:
            return (
                "to take the four arguments (batch_idx, head_idx, q_idx, kv_idx), "
                f"but it can't: {mismatch}"
            )
        except ValueError:  # no signature to be had
            pass
    if _OF_BRANCHES.search(str(error)):
        return (
            "not to branch on tensors: use `&`, `|`, `~` and torch.where in place of `and`, "
            "`or`, `not` and `if`"
        )
    if _OF_VALUES.search(str(error)):
        return (
            "not to take indices out of their tensors (`.item()`, `int()`, `.numpy()`, an "
            "index of a list): look them up in a tensor"
        )
    return None
