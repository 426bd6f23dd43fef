"""Masks as text."""

import html
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from attn_mask._tools.view import View, borders, view
from attn_mask.rules import Chunked, MaskFunction, Window

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["show"]

# What fits a screen: a larger mask is shown by density.
_LINES, _COLUMNS = 24, 72

_LABEL, _HEADER = 12, 8  # the longest label of a query and of a key

_HALVES = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_SHADES = "·░▒▓█"

# Of the 256 that terminals have: masked, then visible, by document.
_MASKED, _VISIBLE = 236, (75, 215, 114, 204, 180, 140)
_PLAIN = "\033[0m"

_LONGEST_BY_DEFAULT = 8192


class _Picture(str):
    """Text that is shown as it is where a value is echoed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def show(
    mask_or_rule: "torch.Tensor | BlockMask | Callable[..., Any]",
    q_length: int | None = None,
    kv_length: int | None = None,
    *,
    batch: int = 0,
    head: int = 0,
    tokens: Sequence[str] | None = None,
    style: Literal["color"] | None = None,
) -> str:
    """A mask as text, two rows a line; nothing is printed::

        >>> attn_mask.show(attn_mask.causal() & attn_mask.sliding_window(4), 8)
        █▄······
        ███▄····
        ·▀███▄··
        ···▀███▄

    Args:
        mask_or_rule: a mask [q, kv], [b, q, kv] or [b, heads, q, kv] (bool; additive, in which
            what is below -1e4 is masked, or -inf; integers, which are visible where they are not
            0); a BlockMask; a rule of ``attn_mask.rules``, or any mask function.
        q_length, kv_length: the sizes, for a rule. By default those of its tables, and kv_length is
            q_length.
        batch, head: which of them is shown.
        tokens: a label for each key, and for each query where there are as many.
        style: "color" for the colours of a terminal, one for each document.

    Returns a str whose repr is the picture. Where a mask is larger than a screen, 48 x 72, a
    character is as dense as the part of the mask for which it stands, and the last line says how
    large that is; tokens are left out.

    Raises ValueError for a mask of another rank, lengths that are missing or not the mask's, tokens
    of another number, unknown styles and tensors on meta; IndexError for a batch or head that there
    is not; TypeError for what is none of these, and for masks of other dtypes and layouts.
    """
    if style not in (None, "color"):
        raise ValueError(f'show: expected style to be None or "color", but got {style!r}')
    shown = view("show", mask_or_rule, q_length, kv_length, batch, head)
    labels = None if tokens is None else _labels(tokens, shown.kv_length)
    if not shown.q_length or not shown.kv_length:
        return _Picture("")
    colors = None
    if style == "color":
        colors = [_VISIBLE[number % len(_VISIBLE)] for number in shown.numbers().tolist()]
    if shown.q_length > 2 * _LINES or shown.kv_length > _COLUMNS:
        return _Picture(_density(shown, colors))
    return _Picture(_elements(shown, labels, colors))


def _elements(shown: View, labels: list[str] | None, colors: list[int] | None) -> str:
    rows = shown.rows(0, shown.q_length).tolist()
    if len(rows) % 2:
        rows.append([False] * shown.kv_length)
    lines = []
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        if colors is None:
            lines.append("".join(_HALVES[pair] for pair in zip(upper, lower, strict=True)))
        else:
            halves = (
                _colored("▀", color if of_upper else _MASKED, color if of_lower else _MASKED)
                for color, of_upper, of_lower in zip(colors, upper, lower, strict=True)
            )
            lines.append("".join(halves) + _PLAIN)
    if labels is None:
        return "\n".join(lines)
    margins = [""] * len(lines)
    if shown.q_length == shown.kv_length:
        names = [_cut(label, _LABEL) for label in labels] + [""] * (shown.q_length % 2)
        width = max(map(_width, names))
        padded = [" " * (width - _width(name)) + name for name in names]
        pairs = zip(padded[::2], padded[1::2], strict=True)
        margins = [f"{upper} {lower} " for upper, lower in pairs]
    heads = [_cut(label, _HEADER) for label in labels]
    if any(_width(head) != len(head) for head in heads):
        heads = [""]  # wide letters would move the columns
    height = max(map(len, heads))
    margin = " " * _width(margins[0])
    header = [
        "".join(column) for column in zip(*(head.rjust(height) for head in heads), strict=True)
    ]
    return "\n".join(
        [
            *(f"{margin}{line}".rstrip() for line in header),
            *(before + line for before, line in zip(margins, lines, strict=True)),
        ]
    )


def _colored(text: str, color: int, background: int) -> str:
    return f"\033[38;5;{color};48;5;{background}m{text}"


def _density(shown: View, colors: list[int] | None) -> str:
    q_length, kv_length = shown.q_length, shown.kv_length
    columns = min(kv_length, _COLUMNS)
    # A character is twice as high as it is wide.
    lines = max(1, round(q_length * columns / kv_length / 2))
    if lines > _LINES:
        lines = _LINES
        columns = min(columns, max(8, round(2 * lines * kv_length / q_length)))
    lines = min(lines, q_length)
    counts, sizes = shown.counts(borders(q_length, lines), borders(kv_length, columns))
    # Rounded so that only what is empty or full is shown as that.
    shades = ((3 * counts + sizes - 1) // sizes + (counts == sizes)).tolist()
    text = []
    for row in shades:
        line = "".join(_SHADES[shade] for shade in row)
        text.append(line if colors is None else _colored(line, _VISIBLE[0], _MASKED) + _PLAIN)
    cell = f"{-(-q_length // lines)} x {-(-kv_length // columns)}"
    return "\n".join([*text, f"{q_length} queries x {kv_length} keys, a character is {cell}"])


def _labels(tokens: Any, kv_length: int) -> list[str]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(
            f"show: expected tokens to be a list of str, but got {type(tokens).__name__}"
        )
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(f"show: expected tokens to be of str, but got {type(token).__name__}")
    if len(tokens) != kv_length:
        raise ValueError(
            f"show: expected tokens to have one for each of {kv_length} keys, but got {len(tokens)}"
        )
    return ["".join(c if c.isprintable() else "�" for c in token) for token in tokens]


def _cut(label: str, longest: int) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"


def _width(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def html_of(rule: MaskFunction) -> str:
    """A rule in a notebook: what it is, and its picture."""
    name = f"<code>{html.escape(repr(rule))}</code>"
    try:
        try:
            lengths = view("show", rule, None, None, 0, 0)[:2]
        except ValueError:  # there are no tables
            lengths = (max(16, 2 * _reach(rule)),) * 2
        picture = show(rule, *(min(length, _LONGEST_BY_DEFAULT) for length in lengths))
    except Exception as error:  # a notebook shows the repr all the same
        picture = f"{type(error).__name__}: {error}"
    style = "line-height: 1; font-family: monospace"
    return f'{name}<pre style="{style}">{html.escape(picture)}</pre>'


def _reach(rule: MaskFunction) -> int:
    """The size of the largest window or chunk in a tree."""
    found = [1]
    for part in rule.walk():
        if isinstance(part, Window):
            found += [abs(side) + 1 for side in (part.left, part.right) if side is not None]
        elif isinstance(part, Chunked):
            found.append(part.size)
    return max(found)
