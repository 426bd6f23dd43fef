"""Packing: sequences put one after another into rows of one length, and what models and masks need
to keep them apart. All of it O(tokens); no mask is made."""

import logging
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch

from attn_mask._core.arguments import (
    check_flag,
    check_rank,
    check_readable,
    check_strided,
    checked_device,
    checked_int,
)

__all__ = ["PackedRows", "PackingCollator", "pack", "plan_rows"]

Strategy = Literal["best_fit", "sequential"]

# What losses of transformers and torch leave out.
_NO_LABEL = -100

_logger = logging.getLogger("attn_mask")


class PackedRows(NamedTuple):
    """What ``pack`` gives. All tensors but cu_seqlens are int64 [rows, row_length]."""

    input_ids: torch.Tensor
    """The tokens, and ``pad_token_id`` after the last document of a row."""
    position_ids: torch.Tensor
    """From 0 on in each document, and in the padding of a row."""
    document_ids: torch.Tensor
    """From 0 on in each row; -1 on padding, as ``documents`` and ``create_causal_mask`` take it."""
    labels: torch.Tensor
    """As models of transformers take them, which shift them by one: the tokens, but -100 on padding
    and on the first token of each document, which the one before says nothing about."""
    cu_seqlens: torch.Tensor
    """int32 [segments + 1]: where segments begin in the flattened rows, and their end. A segment is
    a document, or the padding of a row."""
    max_seqlen: int
    """Tokens of the longest segment."""


def plan_rows(
    lengths: Sequence[int], row_length: int, *, strategy: Strategy = "best_fit"
) -> list[list[int]]:
    """Which sequences go into which row, as indices into ``lengths``.

    Args:
        lengths: tokens of each sequence, at most ``row_length``: ints, or a 1-D tensor. Those of 0
            go into no row.
        row_length: tokens of a row.
        strategy: "best_fit" takes the longest first, each into the fullest row that has room.
            "sequential" keeps their order, and begins a row where one does not fit.

    Raises ValueError for a sequence that is longer than a row, for negative lengths and for
    tensors of another rank; TypeError for what is no int.

    >>> attn_mask.data.plan_rows([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    >>> attn_mask.data.plan_rows([3, 5, 2, 4], 7, strategy="sequential")
    [[0], [1, 2], [3]]
    """
    name = "plan_rows"
    row_length, strategy = _of_rows(name, row_length, strategy)
    return _planned(name, _lengths(name, lengths), row_length, strategy)


def _of_rows(name: str, row_length: Any, strategy: Any) -> tuple[int, Strategy]:
    """What rows are made by, checked."""
    row_length = checked_int(name, "row_length", row_length)
    if row_length < 1:
        raise ValueError(f"{name}: expected row_length to be at least 1, but got {row_length}")
    if strategy not in ("best_fit", "sequential"):
        raise ValueError(
            f"{name}: expected strategy to be 'best_fit' or 'sequential', but got {strategy!r}"
        )
    return row_length, strategy


def _lengths(name: str, lengths: Any) -> list[int]:
    lengths = _one_dimensional(name, "lengths", lengths, "a list of ints or a 1-D tensor")
    if isinstance(lengths, torch.Tensor):
        check_readable(name, "lengths", lengths)
        return lengths.tolist()
    return [checked_int(name, f"lengths[{index}]", of) for index, of in enumerate(lengths)]


def _planned(name: str, lengths: list[int], row_length: int, strategy: Strategy) -> list[list[int]]:
    kept = [index for index, length in enumerate(lengths) if length]
    longest = max(kept, key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > row_length:
        raise ValueError(
            f"{name}: expected sequences to have at most row_length ({row_length}) tokens, but "
            f"sequence {longest} has {lengths[longest]}"
        )
    negative = next((index for index in kept if lengths[index] < 0), None)
    if negative is not None:
        raise ValueError(
            f"{name}: expected lengths to be at least 0, but got {lengths[negative]} at {negative}"
        )
    if strategy == "sequential":
        return _in_order(lengths, kept, row_length)
    kept.sort(key=lengths.__getitem__, reverse=True)
    return _best_fit(lengths, kept, row_length)


def _in_order(lengths: Sequence[int], order: list[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for index in order:
        if lengths[index] > room:
            rows.append([])
            room = row_length
        rows[-1].append(index)
        room -= lengths[index]
    return rows


def _best_fit(lengths: Sequence[int], order: list[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows that have so much room left
    rooms: list[int] = []  # those of by_room, ascending
    for index in order:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), row_length
            rows.append([index])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            rows[row].append(index)
            if not by_room[room]:
                del by_room[room], rooms[at]
        room -= length
        if room:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(row)
    return rows


def pack(
    sequences: Iterable[Any],
    row_length: int,
    *,
    pad_token_id: int = 0,
    strategy: Strategy = "best_fit",
    labels: Iterable[Any] | None = None,
    device: torch.device | str | None = None,
) -> PackedRows:
    """Rows of ``row_length`` tokens that hold whole sequences, and padding after the last.

    The rows leak unless the mask keeps documents apart: give a create function ``document_ids``,
    or build a rule with ``documents(packed.document_ids)``.

    Args:
        sequences: lists or tensors of token ids, each of at most ``row_length``. Empty ones are
            left out, and counted in the log.
        row_length: tokens of a row.
        pad_token_id: the token on padding.
        strategy: "best_fit" wastes least and takes the longest first; "sequential" keeps the order.
            ``plan_rows`` says which sequence goes where.
        labels: of each sequence, as long as it; by default its tokens.
        device: of the result; by default that of the sequences.

    Raises ValueError for a sequence that is longer than a row, and for labels that don't fit;
    TypeError for what holds no integers.

    >>> packed = attn_mask.data.pack([[5, 6, 7], [8, 9]], 6)
    >>> packed.input_ids
    tensor([[5, 6, 7, 8, 9, 0]])
    >>> packed.document_ids
    tensor([[ 0,  0,  0,  1,  1, -1]])
    >>> packed.labels
    tensor([[-100,    6,    7, -100,    9, -100]])
    >>> packed.cu_seqlens, packed.max_seqlen
    (tensor([0, 3, 5, 6], dtype=torch.int32), 3)
    """
    return _pack("pack", sequences, row_length, pad_token_id, strategy, labels, device)


def _pack(
    name: str,
    sequences: Iterable[Any],
    row_length: int,
    pad_token_id: int,
    strategy: Strategy,
    labels: Iterable[Any] | None,
    device: torch.device | str | None,
) -> PackedRows:
    pad_token_id = checked_int(name, "pad_token_id", pad_token_id)
    row_length, strategy = _of_rows(name, row_length, strategy)
    if device is not None:
        device = checked_device(name, device)
    items = _items(name, "sequences", sequences)
    lengths = [len(item) for item in items]
    rows = _planned(name, lengths, row_length, strategy)
    empty = lengths.count(0)
    if empty:
        _logger.warning("%s: left out %d empty sequences", name, empty)
    if len(rows) * row_length >= 2**31:
        raise ValueError(
            f"{name}: expected fewer than 2^31 tokens, which cu_seqlens can count, but got "
            f"{len(rows)} rows of {row_length}"
        )
    flat = _flat(name, "sequences", items, lengths, rows, row_length, pad_token_id, device)

    # By segments: the documents of each row, and its padding if there is any.
    of_segments = array("q")
    documents = array("q")
    for row in rows:
        of_row = [lengths[index] for index in row]
        of_segments.extend(of_row)
        documents.extend(range(len(row)))
        padding = row_length - sum(of_row)
        if padding:
            of_segments.append(padding)
            documents.append(-1)
    segments, ids = _tensor(of_segments), _tensor(documents)
    cu_seqlens = torch.zeros(len(segments) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(segments, 0, out=cu_seqlens[1:])
    max_seqlen = int(segments.max()) if len(segments) else 0
    starts = cu_seqlens[:-1].to(flat.device)
    before = torch.nn.functional.pad(segments, (1, 0), value=1)[:-1]
    position_ids = _running_sums(flat, 1, starts, 1 - before)
    document_ids = _running_sums(flat, 0, starts, ids.diff(prepend=ids.new_zeros(1)))
    if labels is None:
        of_tokens = flat.clone()
    else:
        own = _items(name, "labels", labels)
        if [len(item) for item in own] != lengths:
            raise ValueError(
                f"{name}: expected labels to be as long as the sequences ({_shown(lengths)}), but "
                f"got {_shown([len(item) for item in own])}"
            )
        of_tokens = _flat(name, "labels", own, lengths, rows, row_length, _NO_LABEL, flat.device)
    of_tokens.masked_fill_(document_ids < 0, _NO_LABEL)
    of_tokens[starts] = _NO_LABEL
    shape = (len(rows), row_length)
    return PackedRows(
        flat.view(shape),
        position_ids.view(shape),
        document_ids.view(shape),
        of_tokens.view(shape),
        cu_seqlens.to(flat.device, torch.int32),
        max_seqlen,
    )


def _running_sums(
    like: torch.Tensor, step: int, starts: torch.Tensor, at_starts: torch.Tensor
) -> torch.Tensor:
    """Sums of ``step`` for each token, and of another number where a segment begins."""
    steps = torch.full_like(like, step)
    steps[starts] = at_starts.to(like.device)
    return steps.cumsum_(0)


def _shown(lengths: list[int]) -> str:
    return ", ".join(map(str, lengths[:5])) + (", ..." if len(lengths) > 5 else "")


def _items(name: str, argument: str, items: Iterable[Any]) -> list[Any]:
    _check_items(name, argument, items)
    expected = "a list or a tensor of token ids"
    return [
        _one_dimensional(name, f"{argument}[{index}]", item, expected)
        for index, item in enumerate(items)
    ]


def _check_items(name: str, argument: str, items: Any) -> None:
    is_scalar = isinstance(items, torch.Tensor) and items.dim() == 0
    if is_scalar or isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise TypeError(
            f"{name}: expected {argument} to be lists or tensors of token ids, "
            f"but got {'a tensor []' if is_scalar else type(items).__name__}"
        )


def _one_dimensional(name: str, argument: str, values: Any, expected: str) -> Any:
    """A tensor [n] of an integer dtype, which arrays become, or something with a length."""
    if isinstance(values, list):
        return values
    if hasattr(values, "__array__") and not isinstance(values, torch.Tensor):
        values = torch.as_tensor(values, device="cpu")
    if isinstance(values, torch.Tensor):
        check_strided(name, argument, values)
        check_rank(f"{name}: expected {argument}", values, (1,), "1-D")
        dtype = values.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(
                f"{name}: expected {argument} to be of an integer dtype, but got {dtype}"
            )
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: expected {argument} to be {expected}, but got {type(values).__name__}"
        )
    return values


def _flat(
    name: str,
    argument: str,
    items: list[Any],
    lengths: list[int],
    rows: list[list[int]],
    row_length: int,
    filling: int,
    device: torch.device | str | None,
) -> torch.Tensor:
    """What the rows hold, one after another, and ``filling`` at the end of each; int64."""
    padding = [row_length - sum(lengths[index] for index in row) for row in rows]
    if not any(isinstance(item, torch.Tensor) for item in items):
        numbers = array("q")
        try:
            for row, missing in zip(rows, padding, strict=True):
                for index in row:
                    item = items[index]
                    numbers.fromlist(item if isinstance(item, list) else list(item))
                numbers.fromlist([filling] * missing)
        except (TypeError, OverflowError) as error:
            raise TypeError(
                f"{name}: expected {argument} to hold integers of 64 bits, but {error}"
            ) from error
        return _tensor(numbers).to(device)
    tensors = [
        item
        if isinstance(item, torch.Tensor)
        else torch.tensor(item, dtype=torch.int64, device="cpu")
        for item in items
    ]
    if device is None:
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(
                f"{name}: expected {argument} to be on one device, "
                f"but got {', '.join(sorted(map(str, devices)))}"
            )
        (device,) = devices
    fill = torch.full((row_length,), filling, dtype=torch.int64, device=device)
    pieces = chain.from_iterable(
        [*(tensors[index].to(device, torch.int64) for index in row), fill[:missing]]
        for row, missing in zip(rows, padding, strict=True)
    )
    return torch.cat([fill[:0], *pieces])


def _tensor(numbers: "array[int]") -> torch.Tensor:
    """int64, over the memory of the array."""
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.int64)


class PackingCollator:
    """A ``collate_fn`` for DataLoader and ``data_collator`` for Trainer: packs what a batch has.

    Called with features: mappings with "input_ids" and perhaps "labels", or lists or tensors of
    token ids. Gives a dict of what models take: "input_ids", "position_ids", "labels". Positions
    restart in each document, by which ``install(packing="position_ids")`` keeps documents apart.

    Args:
        row_length, pad_token_id, strategy: as for ``pack``.
        return_document_ids: adds "document_ids", for ``packed`` or a create function.
        return_flash_attn_kwargs: adds "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q" and
            "max_length_k", which flash attention of transformers reads.

    >>> collate = attn_mask.data.PackingCollator(6)
    >>> collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])["position_ids"]
    tensor([[0, 1, 2, 0, 1, 0]])
    """

    def __init__(
        self,
        row_length: int,
        *,
        pad_token_id: int = 0,
        strategy: Strategy = "best_fit",
        return_document_ids: bool = False,
        return_flash_attn_kwargs: bool = False,
    ) -> None:
        name = "PackingCollator"
        self.pad_token_id = checked_int(name, "pad_token_id", pad_token_id)
        self.row_length, self.strategy = _of_rows(name, row_length, strategy)
        check_flag(name, "return_document_ids", return_document_ids)
        check_flag(name, "return_flash_attn_kwargs", return_flash_attn_kwargs)
        self.return_document_ids = return_document_ids
        self.return_flash_attn_kwargs = return_flash_attn_kwargs

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        name = "PackingCollator"
        sequences: list[Any] = []
        labels: list[Any] = []
        _check_items(name, "features", features)
        for index, feature in enumerate(features):
            if isinstance(feature, Mapping):
                if "input_ids" not in feature:
                    raise ValueError(
                        f"{name}: expected features[{index}] to have 'input_ids', "
                        f"but got {sorted(map(str, feature))}"
                    )
                sequences.append(feature["input_ids"])
                if feature.get("labels") is not None:
                    labels.append(feature["labels"])
            else:
                sequences.append(feature)
        if labels and len(labels) != len(sequences):
            raise ValueError(
                f"{name}: expected all features to have 'labels' or none, "
                f"but {len(labels)} of {len(sequences)} have them"
            )
        packed = _pack(
            name,
            sequences,
            self.row_length,
            self.pad_token_id,
            self.strategy,
            labels or None,
            None,
        )
        batch: dict[str, Any] = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "labels": packed.labels,
        }
        if self.return_document_ids:
            batch["document_ids"] = packed.document_ids
        if self.return_flash_attn_kwargs:
            for side in ("q", "k"):
                batch[f"cu_seq_lens_{side}"] = packed.cu_seqlens
                batch[f"max_length_{side}"] = packed.max_seqlen
        return batch
