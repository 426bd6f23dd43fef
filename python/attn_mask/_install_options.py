"""What install() is told about the masks that transformers gets."""

from numbers import Real
from typing import Any, NamedTuple

__all__ = ["DEFAULT", "Options", "checked"]


class Options(NamedTuple):
    """See install()."""

    masked_value: float | None = None
    unmask_unattended: bool = False
    aten_only: bool = False


DEFAULT = Options()


def checked(name: str, masked_value: Any, unmask_unattended: Any, aten_only: Any) -> Options:
    """The options as they were given to a function.

    Raises TypeError or ValueError for what can be none.
    """
    for argument, flag in (("unmask_unattended", unmask_unattended), ("aten_only", aten_only)):
        if not isinstance(flag, bool):
            raise TypeError(
                f"{name}: expected {argument} to be a bool, but got {type(flag).__name__}"
            )
    if masked_value is not None:
        if not isinstance(masked_value, Real) or isinstance(masked_value, bool):
            raise TypeError(
                f"{name}: expected masked_value to be a number, "
                f"but got {type(masked_value).__name__}"
            )
        masked_value = float(masked_value)
        if not masked_value <= 0:
            raise ValueError(
                f"{name}: expected masked_value to be at most 0, but got {masked_value}"
            )
    return Options(masked_value, unmask_unattended, aten_only)
