"""What install() is told about the masks that transformers gets."""

from typing import Any, NamedTuple

from attn_mask._checks import check_flag, checked_masked_value

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
        check_flag(name, argument, flag)
    masked_value = checked_masked_value(name, masked_value)
    return Options(masked_value, unmask_unattended, aten_only)
