"""Pictures of masks as transformers drew them from 4.53 to 5.8; ``attn_mask.show`` is ours."""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attn_mask._core.arguments import ADDITIVE_DTYPES, check_readable, check_strided, checked_index


class _Squares(NamedTuple):
    visible: str
    masked: str
    low: str
    upper: str


_MAJONG = _Squares("🀙", "🀆", "🀛", "🀛")
_BLOCKS = _Squares("█", "░", "▙", "▜")


def tensor_to_mask_visual(
    original_tensor: torch.Tensor,
    grid_size: tuple[int, int] = (20, 40),
    style: str | None = "majong",
) -> str:
    """A mask of ones and zeros as text, a square for each element::

        >>> print(tensor_to_mask_visual(torch.ones(3, 3).tril(), style="blocks"))
        █░░
        ██░
        ███

    Args:
        original_tensor: [q, kv], of any real dtype; 1 is visible, 0 is masked.
        grid_size: (rows, columns): a mask that is not smaller in both is averaged into so many.
        style: "majong" for mahjong tiles, anything else for block elements.

    Returns the string that transformers 5.8 gives. It takes booleans and integers of any size, too,
    which upstream can't average.

    Raises ValueError for another rank or grid_size and for tensors on meta, TypeError for what is
    no strided tensor of a real dtype.
    """
    check_readable("tensor_to_mask_visual", "original_tensor", original_tensor)
    if original_tensor.is_complex():
        raise TypeError(
            "tensor_to_mask_visual: expected original_tensor to be of a real dtype, "
            f"but got {original_tensor.dtype}"
        )
    if original_tensor.dim() != 2:
        raise ValueError(
            "tensor_to_mask_visual: expected original_tensor to be 2-D [q_length, kv_length], "
            f"but got {original_tensor.dim()}-D {list(original_tensor.shape)}"
        )
    is_pair = isinstance(grid_size, tuple | list) and len(grid_size) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in grid_size):
        raise ValueError(
            "tensor_to_mask_visual: expected grid_size to be (rows, columns), positive ints, "
            f"but got {grid_size!r}"
        )
    squares = _MAJONG if style == "majong" else _BLOCKS
    most_rows, most_columns = grid_size
    height, width = original_tensor.shape
    tensor = original_tensor.as_subclass(torch.Tensor)
    if tensor.numel() and not (height < most_rows and width < most_columns):
        ratio = 2 * width / height
        if ratio > 1:
            width = most_columns
            height = min(most_rows, max(1, round(most_columns / ratio)))
        else:
            height = most_rows
            width = max(1, round(most_rows * ratio))
        if tensor.dtype not in ADDITIVE_DTYPES:
            tensor = tensor.to(torch.float32)
        tensor = F.adaptive_avg_pool2d(tensor[None, None], (height, width))[0, 0]
    return "\n".join(_row(row, squares) for row in tensor.tolist())


def _row(row: list[float], squares: _Squares) -> str:
    text = ""
    for at, value in enumerate(row):
        if value == 1:
            text += squares.visible
        elif value == 0:
            text += squares.masked
        elif at == 0:
            text += squares.upper if row[1:2] == [1] else squares.low
        elif row[at - 1] in (0, 1):
            text += squares.low if row[at - 1] == 1 else squares.upper
        else:
            text += squares.masked
    return text


class AttentionMask(torch.Tensor):
    """A tensor that is printed as pictures of its last two dimensions::

    >>> AttentionMask.from_tensor(torch.ones(2, 2).tril())
    █░
    ██
    torch.Tensor(shape=(2, 2), dtype=torch.float32)
    """

    style: str | None = None
    """As ``tensor_to_mask_visual`` takes it; results of operations have the default."""

    def __new__(cls, data: torch.Tensor, style: str | None = None) -> "AttentionMask":
        check_strided("AttentionMask", "data", data)
        mask = torch.Tensor._make_subclass(cls, data.detach())
        mask.style = style
        return mask

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, style: str | None = None) -> "AttentionMask":
        """The tensor [..., q, kv] as such a mask; its memory is shared.

        Raises TypeError for what is no strided tensor.
        """
        check_strided("AttentionMask.from_tensor", "tensor", tensor)
        return cls(tensor, style)

    def to_string(self, grid_size: tuple[int, int] = (20, 40), limit: int = 4) -> str:
        """The picture of each batch and head, at most ``limit``, then shape and dtype.

        Raises ValueError for fewer than two dimensions, and for a mask on meta.
        """
        name = "AttentionMask.to_string"
        check_readable(name, "the mask", self)
        limit = checked_index(name, "limit", limit)
        if self.dim() < 2:
            raise ValueError(
                f"{name}: expected a mask of two dimensions at least, "
                f"[..., q_length, kv_length], but got {self.dim()}-D {list(self.shape)}"
            )
        parts = []
        for number, index in enumerate(itertools.product(*map(range, self.shape[:-2]))):
            if number == limit:
                parts += [
                    "...",
                    "To print out more, set AttentionMask.to_string(limit=N)",
                    "You can also index (AttentionMask[batch, head]) to choose a specific batch or "
                    "head",
                ]
                break
            parts.append(tensor_to_mask_visual(self[index], grid_size, self.style))
        parts.append(f"torch.Tensor(shape={tuple(self.shape)}, dtype={self.dtype})")
        return "\n".join(parts)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.dim() < 2 or self.is_meta or self.is_complex():
            return repr(self.as_subclass(torch.Tensor))
        return self.to_string()

    __str__ = __repr__
