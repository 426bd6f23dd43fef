"""Masks as plots; needs matplotlib."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attn_mask._core.arguments import checked_index
from attn_mask._tools.view import View, borders, view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["plot"]

_PIXELS = 512
_BLOCKS_OF = 128

# Masked keys in blocks that are empty, and in others.
_EMPTY, _MASKED = (1.0, 1.0, 1.0), (0.89, 0.89, 0.89)


def plot(
    mask_or_rule: "torch.Tensor | BlockMask | Callable[..., Any]",
    q_length: int | None = None,
    kv_length: int | None = None,
    *,
    ax: "Axes | None" = None,
    batch: int = 0,
    head: int = 0,
    block_size: int | None = None,
) -> "Axes":
    """Plots a mask with matplotlib: visible keys, and which blocks are full, partial and empty::

        ax = attn_mask.plot(attn_mask.documents(ids) & attn_mask.causal())
        ax.figure.savefig("mask.png")

    Visible keys are dark in full blocks, lighter in partial ones; masked keys are grey in partial
    blocks, white in empty ones. Each document has a colour.

    Args:
        mask_or_rule, q_length, kv_length, batch, head: as for ``attn_mask.show``.
        ax: where it is drawn; by default in a new figure.
        block_size: of the blocks; by default that of a BlockMask, else up to 128.

    Returns the matplotlib Axes.

    Raises what ``attn_mask.show`` does, ValueError for a mask without elements and a block size
    below 1, TypeError for other axes, and ImportError where matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "plot: expected matplotlib to be installed, but it can't be imported "
            f"({error}): install it, or the extra attn_mask[plot]"
        ) from error
    shown = view("plot", mask_or_rule, q_length, kv_length, batch, head)
    height, width = shown.q_length, shown.kv_length
    if not height or not width:
        raise ValueError(f"plot: expected a mask with elements, but got {height} x {width}")
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(
            f"plot: expected ax to be Axes of matplotlib, or None, but got {type(ax).__name__}"
        )
    if block_size is None:
        sizes = (
            getattr(mask_or_rule, "BLOCK_SIZE", None) or (_default_block(max(height, width)),) * 2
        )
    else:
        block_size = checked_index("plot", "block_size", block_size)
        if block_size < 1:
            raise ValueError(f"plot: expected block_size to be positive, but got {block_size}")
        sizes = (block_size, block_size)
    of_blocks = tuple(
        [*range(0, length, size), length]
        for length, size in zip((height, width), sizes, strict=True)
    )
    if ax is None:
        ax = pyplot.subplots()[1]
    is_square = 1 / 5 < height / width < 5
    ax.imshow(
        _image(shown, of_blocks, pyplot.get_cmap("tab10")),
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        aspect="equal" if is_square else "auto",
        interpolation="nearest",
    )
    if max(map(len, of_blocks)) <= 65:
        for draw, lines in ((ax.axhline, of_blocks[0]), (ax.axvline, of_blocks[1])):
            for line in lines[1:-1]:
                draw(line - 0.5, color="black", linewidth=0.4, alpha=0.4)
    color = pyplot.get_cmap("tab10")(0)[:3]
    patches = [
        Patch(facecolor=face, edgecolor="black", linewidth=0.4, label=label)
        for label, face in (
            ("full block", color),
            ("partial block", _mix(_MASKED, color, 0.6)),
            ("masked in it", _MASKED),
            ("empty block", _EMPTY),
        )
    ]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    block = f"{sizes[0]}" if sizes[0] == sizes[1] else f"{sizes[0]} x {sizes[1]}"
    ax.set_title(f"{height} queries, {width} keys, blocks of {block}", fontsize="medium")
    return ax


def _default_block(length: int) -> int:
    """A power of two: eight blocks, or more of the usual size."""
    return min(_BLOCKS_OF, 1 << ((length - 1) // 8).bit_length())


def _mix(first: Any, second: Any, share: float) -> tuple[float, ...]:
    return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))


def _image(shown: View, of_blocks: tuple[list[int], ...], colormap: Any) -> Any:
    """[rows, columns, 3] for imshow."""
    height, width = shown.q_length, shown.kv_length
    rows, columns = (borders(length, min(length, _PIXELS)) for length in (height, width))
    of_block, block_sizes = shown.counts(*of_blocks)
    counts, sizes = shown.counts(rows, columns)
    with torch.device("cpu"):
        states = torch.where(of_block == 0, 0, torch.where(of_block == block_sizes, 2, 1))
        row, column = (
            torch.bucketize(torch.tensor(line[:-1]), torch.tensor(blocks), right=True) - 1
            for line, blocks in zip((rows, columns), of_blocks, strict=True)
        )
        state = states[row][:, column, None]
        colors = torch.tensor([colormap(i)[:3] for i in range(10)])
        visible = colors[shown.numbers()[columns[:-1]] % len(colors)]
        masked = torch.where(state == 0, torch.tensor(_EMPTY), torch.tensor(_MASKED))
        share = (counts / sizes)[..., None] * torch.where(state == 2, 1.0, 0.6)
        return (masked + (visible - masked) * share).numpy()
