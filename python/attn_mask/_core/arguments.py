"""What functions require of their arguments before anything else uses them."""

import inspect
import math
import operator
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from attn_mask._core.library import _C
from attn_mask._core.tracing import is_opaque, is_recording

# Offsets and shifts are within FAR of 0; sizes ("no window" in configs) are cut to OPEN.
FAR = _C.FAR
OPEN = _C.OPEN

# Of masks that are added to scores.
ADDITIVE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_strided(function: str, argument: str, tensor: Any) -> None:
    """Raises TypeError for what is no tensor, and for nested, sparse and quantized tensors.

    Torch's own errors for those come from inside whatever happens to read them first.
    """
    if not isinstance(tensor, torch.Tensor):
        check_no_rule(function, argument, tensor)
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got {type(tensor).__name__}"
        )
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        if tensor.is_quantized:
            kind = f"a quantized one, of {tensor.dtype}"
        raise TypeError(f"{function}: expected {argument} to be a strided tensor, but got {kind}")


def check_rank(expected: str, tensor: torch.Tensor, ranks: tuple[int, ...], shape: str) -> None:
    """Raises ValueError for a tensor of another rank; ``expected``: how its text begins."""
    if tensor.dim() not in ranks:
        raise ValueError(f"{expected} to be {shape}, but got {tensor.dim()}-D {list(tensor.shape)}")


def check_readable(function: str, argument: str, tensor: Any) -> None:
    """check_strided, and ValueError for a tensor whose values can't be read."""
    check_strided(function, argument, tensor)
    if tensor.is_meta or is_opaque(tensor):
        kind = "a meta tensor" if tensor.is_meta else f"a {type(tensor).__name__} that has none"
        raise ValueError(f"{function}: expected {argument} to have values, but got {kind}")


def check_no_rule(function: str, argument: str, mask: Any) -> None:
    """Raises TypeError for a rule, or any mask function, where a mask is wanted."""
    if mask is not None and not isinstance(mask, torch.Tensor) and callable(mask):
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got a mask function, {mask!r}: "
            "pass its mask, attn_mask.boolean(rule, batch_size, q_length, kv_length), for eager "
            "attention attn_mask.additive, for flex attention attn_mask.create_block_mask"
        )


def checked_index(function: str, argument: str, value: Any) -> int:
    """An int of Python's or NumPy's, as one of Python's. Raises TypeError for all else.

    For a tensor, too: it would have to be read, and arithmetic in place would change it.
    """
    try:
        if isinstance(value, bool | torch.Tensor):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: expected {argument} to be an int, but got {type(value).__name__}"
        ) from None


def whole(name: str, argument: str, value: Any) -> int:
    """An int (of Python, symbolic, or of NumPy), or a float that is one; at most 2^62."""
    if isinstance(value, torch.SymInt) or (isinstance(value, int) and is_recording()):
        return value  # type: ignore[return-value]  # it does all that an int does
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        value = int(min(max(value, -OPEN), OPEN))
    return min(checked_index(name, argument, value), OPEN)


def side_of(name: str, argument: str, value: Any, rounding: Callable[[float], int]) -> int:
    """A side of a window, which may be any number: some int compares with positions as it does."""
    is_between = isinstance(value, float) and math.isfinite(value)
    side = whole(name, argument, rounding(value) if is_between else value)
    return max(side, -FAR // 2)  # below 0 it becomes a shift, which others may add to


_LEAST, _MOST = -(2**63), 2**63 - 1


def checked_ints(function: str, **values: Any) -> list[Any]:
    """checked_index of each, of 64 bits: ValueError for what fits into no such number.

    Symbolic sizes come back as they are, and so does whatever stands for an int while a graph is
    recorded: dynamo can't inspect that. So does a tensor that is an offset.
    """
    checked = list(values.values())
    if is_recording():
        return checked
    for i, (argument, value) in enumerate(values.items()):
        if type(value) is int and _LEAST <= value <= _MOST:
            continue
        is_offset = isinstance(value, torch.Tensor) and argument in ("q_offset", "kv_offset")
        if not is_offset and not isinstance(value, torch.SymInt):
            checked[i] = checked_index(function, argument, value)
            check_fit(function, **{argument: checked[i]})
    return checked


def checked_int(function: str, argument: str, value: Any) -> int:
    """The same of one."""
    number: int = checked_ints(function, **{argument: value})[0]
    return number


def check_states(function: str, **tensors: Any) -> None:
    """Raises TypeError or ValueError for what is no tensor of queries, keys or values."""
    for argument, tensor in tensors.items():
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.layout != torch.strided
            or tensor.is_nested
            or tensor.is_quantized
        ):
            check_strided(function, argument, tensor)
        if tensor.dim() != 4:
            expected = f"{function}: expected {argument}"
            check_rank(expected, tensor, (4,), "4-D [batch_size, heads, length, head size]")


def check_fit(function: str, **integers: Any) -> None:
    """Raises ValueError for ints that fit into no 64 bits; not while a graph is recorded."""
    if is_recording():
        return
    for argument, value in integers.items():
        if type(value) is int and not _LEAST <= value <= _MOST:
            raise ValueError(
                f"{function}: expected {argument} to be within 2^63 of 0, but got {value}"
            )


def checked_natural(
    function: str, argument: str, value: Any, error: type[Exception] = IndexError
) -> int:
    """checked_index, and ``error`` for what is below 0."""
    number = checked_index(function, argument, value)
    if number < 0:
        raise error(f"{function}: expected {argument} to be 0 or more, but got {number}")
    return number


def checked_device(function: str, device: Any) -> torch.device:
    """The device that an argument names. Raises ValueError or TypeError for what names none."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{function}: expected device to name a device, but got {device!r}"
        ) from error
    except TypeError as error:
        raise TypeError(
            f"{function}: expected device to be a torch.device or a str, "
            f"but got {type(device).__name__}"
        ) from error


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
