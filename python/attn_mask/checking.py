"""Whether a mask is what its maker meant, and what attention takes.

::

    assert attn_mask.validate_mask_properties(mask, "sliding_window", sliding_window=4096)

    for finding in attn_mask.validate_mask(mask, q=query):
        print(finding)

    with attn_mask.checked():
        model.generate(**inputs)
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from attn_mask import rules
from attn_mask._core.arguments import (
    ADDITIVE_DTYPES,
    check_rank,
    check_readable,
    check_strided,
    checked_device,
    checked_int,
)
from attn_mask._core.observing import AttentionCall, observed
from attn_mask._core.program import Source
from attn_mask._core.tracing import is_opaque
from attn_mask._core.write import Calls, Geometry, write_mask

__all__ = ["Finding", "checked", "validate_mask", "validate_mask_properties"]

Kind = Literal[
    "causal", "bidirectional", "sliding_window", "chunked", "padding", "documents", "prefix"
]

# The argument that a kind needs.
_NEEDS = {
    "causal": None,
    "bidirectional": None,
    "sliding_window": "sliding_window",
    "chunked": "chunk_size",
    "padding": "attention_mask",
    "documents": "document_ids",
    "prefix": "prefix_length",
}
_OF_ONE_KIND = ("sliding_window", "chunk_size", "prefix_length")

_OF_DOCUMENTS = Source("validate_mask_properties", "document_ids")

# The lowest finite number of float16: keys in masks of any dtype are masked by this or less.
_MASKED = torch.finfo(torch.float16).min

# Memory-efficient attention on CUDA copies a mask whose rows do not start at multiples of this.
_ALIGNMENT = 8

_logger = logging.getLogger("attn_mask")


def validate_mask_properties(
    mask: torch.Tensor,
    kind: Kind | Callable[..., Any],
    *,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    prefix_length: int | torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    q_offset: int = 0,
) -> bool:
    """Whether the visible keys of a mask are exactly those of its kind.

    Args:
        mask: [q_length, kv_length] or [batch_size, heads, q_length, kv_length], bool (True is
            visible), or float16, bfloat16, float32 or float64 (0 is visible; positive numbers and
            NaN mask nothing, so they are in no kind). Its values are read.
        kind: "causal", "bidirectional", "sliding_window", "chunked", "padding", "documents" or
            "prefix"; all but "bidirectional" are causal, as the masks of ``masking_utils`` are, and
            "prefix" shows the prefix to all queries. Or a rule, or any mask function.
        sliding_window: of "sliding_window": to how many keys a query attends, its own among them.
        chunk_size: of "chunked": positions in a chunk.
        prefix_length: of "prefix": keys in the prefix, an int or an int tensor [batch_size].
        attention_mask: [batch_size, n], which keys are not padding, not zero; those after its end
            are. Of "padding", and together with any other kind.
        document_ids: int [batch_size, kv_length]; a query attends to keys with its own id; of
            "documents", and together with any other kind.
        q_offset: the position of the first query; keys start at 0.

    Raises TypeError for a mask of another dtype, and for an argument that the kind needs and did
    not get, or got and does not know; ValueError for an unknown kind, for shapes that don't fit and
    for tensors on meta.

    >>> import attn_mask, torch
    >>> mask = attn_mask.boolean(attn_mask.causal(), 1, 4, 4)
    >>> attn_mask.validate_mask_properties(mask, "causal")
    True
    >>> attn_mask.validate_mask_properties(mask, "sliding_window", sliding_window=2)
    False
    """
    name = "validate_mask_properties"
    check_readable(name, "mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in ADDITIVE_DTYPES:
        raise TypeError(
            f"{name}: expected mask to be bool, float16, bfloat16, float32 or float64, "
            f"but got {mask.dtype}"
        )
    shape = "2-D [q_length, kv_length] or 4-D [batch_size, heads, q_length, kv_length]"
    check_rank(f"{name}: expected mask", mask, (2, 4), shape)
    if isinstance(q_offset, torch.Tensor):
        check_readable(name, "q_offset", q_offset)
    else:
        q_offset = checked_int(name, "q_offset", q_offset)
    given = {
        "sliding_window": sliding_window,
        "chunk_size": chunk_size,
        "prefix_length": prefix_length,
        "attention_mask": attention_mask,
        "document_ids": document_ids,
    }
    needed = _needed(name, kind)
    if needed is not None and given[needed] is None:
        raise TypeError(f'{name}: expected {needed} for kind "{kind}", but got None')
    for argument in _OF_ONE_KIND:
        if given[argument] is not None and argument != needed:
            raise TypeError(f"{name}: expected no {argument} for kind {kind!r}, but got one")

    mask = mask.detach()
    if mask.dim() == 2:
        mask = mask[None, None]
    batch_size, heads, q_length, kv_length = mask.shape
    rule = _rule(name, kind, sliding_window, chunk_size, prefix_length, batch_size, kv_length)
    for argument, table in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if table is None:
            continue
        check_readable(name, argument, table)
        if table.dim() != 2 or table.shape[0] not in (1, batch_size):
            raise ValueError(
                f"{name}: expected {argument} to be 2-D [{batch_size}, kv_length], as mask has "
                f"{batch_size} batch rows, but got {list(table.shape)}"
            )
    if document_ids is not None:
        if document_ids.dtype not in rules.ID_DTYPES:
            raise TypeError(
                f"{name}: expected document_ids to be integers, but got {document_ids.dtype}"
            )
        rule = rule & rules.Documents(document_ids, _OF_DOCUMENTS)
    shown = None
    if attention_mask is not None:
        shown = attention_mask.to(mask.device, torch.bool).expand(batch_size, -1)
    geometry = Geometry(batch_size, q_length, q_offset, kv_length, 0)
    expected = write_mask(name, rule, geometry, shown, mask.device, calls=Calls(heads))
    if 1 != expected.shape[1] != heads:
        raise ValueError(
            f"{name}: expected mask to have {expected.shape[1]} heads, as kind has, "
            f"but got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return bool((mask == expected).all())
    # A number above 0, or NaN, hides no key.
    return bool(torch.where(expected, mask == 0, mask < 0).all())


def _needed(name: str, kind: Any) -> str | None:
    if not isinstance(kind, str):
        return None
    if kind not in _NEEDS:
        raise ValueError(
            f"{name}: expected kind to be one of {', '.join(_NEEDS)}, or a rule, but got {kind!r}"
        )
    return _NEEDS[kind]


def _rule(
    name: str,
    kind: Any,
    sliding_window: Any,
    chunk_size: Any,
    prefix_length: Any,
    batch_size: int,
    kv_length: int,
) -> rules.MaskFunction:
    if kind == "bidirectional":
        return rules.bidirectional()
    if kind == "sliding_window":
        size = checked_int(name, "sliding_window", sliding_window)
        return rules.causal() & rules.sliding_window(size)
    if kind == "chunked":
        return rules.causal() & rules.chunked(checked_int(name, "chunk_size", chunk_size))
    if kind == "prefix":
        if not isinstance(prefix_length, torch.Tensor):
            prefix_length = checked_int(name, "prefix_length", prefix_length)
        lengths = torch.as_tensor(prefix_length)
        check_readable(name, "prefix_length", lengths)
        if lengths.dtype not in rules.ID_DTYPES:
            raise TypeError(
                f"{name}: expected prefix_length to be an int or integers, but got {lengths.dtype}"
            )
        if lengths.dim() > 1 or lengths.numel() not in (1, batch_size):
            raise ValueError(
                f"{name}: expected prefix_length to be an int or a tensor [{batch_size}], as mask "
                f"has {batch_size} batch rows, but got {list(lengths.shape)}"
            )
        keys = torch.arange(kv_length, device=lengths.device)
        return rules.causal() | rules.padding(keys < lengths.reshape(-1, 1))
    if isinstance(kind, str):
        return rules.causal()
    return rules.rule_of(name, "kind", kind)


class Finding(NamedTuple):
    """Something about a mask that attention refuses, or takes for something else."""

    kind: Literal["shape", "dtype", "numbers", "rows", "strides"]
    what: str
    """What is off."""
    mend: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}"


def validate_mask(
    mask: torch.Tensor, *, q: torch.Tensor | None = None, device: torch.device | str | None = None
) -> list[Finding]:
    """What scaled_dot_product_attention refuses about a mask, or takes for something else.

    =========  ===================================================================================
    "shape"    it does not broadcast to the scores of ``q``
    "dtype"    attention refuses it: not bool, and neither float32 nor the dtype of ``q``; on CUDA,
               where memory-efficient attention refuses float32 for other queries, that as well
    "numbers"  floats 0 and 1, which are added to scores and hide nothing; NaN or infinity
    "rows"     a query to which no key is visible, whatever the mask holds there
    "strides"  on CUDA: memory-efficient attention copies the mask, as its rows don't start at
               multiples of 8 elements, or its keys are not neighbours in memory; of floating masks,
               since boolean ones are converted in any case
    =========  ===================================================================================

    Args:
        mask: a dense mask, [q_length, kv_length] up to [batch_size, heads, q_length, kv_length].
            Its values are read, which waits for its device; those of meta tensors are not known,
            and while a graph is recorded none are.
        q: the queries [..., q_length, head size]; without them only what holds for all is found.
        device: whose kernels are to take it; by default the mask's.

    Returns findings, of which ``what``, ``mend`` and ``str`` are for people; none for a mask that
    attention takes as it is.

    Raises TypeError for what is no strided tensor, ValueError for queries of another rank and for a
    device that torch does not know.

    >>> import attn_mask, torch
    >>> print(*attn_mask.validate_mask(torch.ones(1, 1, 2, 2).tril()))
    mask is float32 of 0 and 1, which are added to scores and hide no key: pass mask.bool()
    """
    check_strided("validate_mask", "mask", mask)
    if q is not None:
        check_strided("validate_mask", "q", q)
        if q.dim() < 2:
            raise ValueError(
                "validate_mask: expected q to be [..., q_length, head size], but got "
                f"{q.dim()}-D {list(q.shape)}"
            )
    of_device = mask.device if device is None else checked_device("validate_mask", device)
    scores = None if q is None else (*q.shape[:-1], None)
    return list(_findings(mask, scores, None if q is None else q.dtype, of_device, False))


def _findings(
    mask: torch.Tensor,
    scores: tuple[int | None, ...] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    is_eager: bool,
) -> Iterator[Finding]:
    shape = _of_shape(mask, scores)
    if shape is not None:
        yield shape
    of_mask = str(mask.dtype).removeprefix("torch.")
    to_bool = "pass mask.bool(), if what is not 0 is visible"
    if mask.dtype not in ADDITIVE_DTYPES and (is_eager or mask.dtype != torch.bool):
        if is_eager:
            what = (
                f"mask is {of_mask}, which eager attention adds to scores, so that it hides no key"
            )
            mend = "pass torch.where(mask, 0.0, torch.finfo(q.dtype).min), or use sdpa"
        else:
            what = f"mask is {of_mask}, which attention refuses"
            mend = to_bool
        yield Finding("dtype", what, mend)
    elif (
        not is_eager
        and dtype is not None
        and mask.dtype not in (torch.bool, dtype)
        and (mask.dtype != torch.float32 or device.type == "cuda")
    ):
        of_queries = str(dtype).removeprefix("torch.")
        which = "memory-efficient " if mask.dtype == torch.float32 else ""
        yield Finding(
            "dtype",
            f"mask is {of_mask} and q is {of_queries}, which {which}attention refuses",
            "pass mask.to(q.dtype), or a boolean mask",
        )
    if not (mask.is_meta or is_opaque(mask) or mask.numel() == 0):
        yield from _of_values(mask, of_mask, is_eager)
    if device.type == "cuda" and not is_eager and mask.is_floating_point() and mask.dim() > 0:
        *others, last = mask.stride()
        if last != 1 or any(stride % _ALIGNMENT for stride in others):
            yield Finding(
                "strides",
                f"mask has strides {list(mask.stride())}, where memory-efficient attention takes "
                f"multiples of {_ALIGNMENT} and 1 for the last: it copies the mask",
                "write it into the first columns of a tensor whose rows are multiples of "
                f"{_ALIGNMENT}: out=torch.empty(b, h, q, wider)[..., :kv] of attn_mask.additive",
            )


def _of_shape(mask: torch.Tensor, scores: tuple[int | None, ...] | None) -> Finding | None:
    shape = list(mask.shape)
    if mask.dim() < 2 and (scores is None or len(scores) > 3):
        return Finding(
            "shape",
            f"mask is {mask.dim()}-D {shape}, and attention needs [q_length, kv_length] at least",
            "pass mask[None, :], if it is the same for all queries",
        )
    if scores is None:
        return None
    if len(scores) == 3:  # attention adds a batch
        scores = (1, *scores)
    padded = [1] * (len(scores) - len(shape)) + shape
    fits = len(padded) == len(scores) and all(
        size == 1 or of_scores is None or size == of_scores
        for size, of_scores in zip(padded, scores, strict=True)
    )
    if fits:
        return None
    wanted = ", ".join("kv_length" if size is None else str(size) for size in scores)
    mend = "make it of the sizes of q; dimensions may be 1 where it is the same for all"
    if mask.dim() == 2 and mask.shape[0] == scores[0]:
        mend = "pass mask[:, None, None, :].bool(), if it marks the padding [batch_size, kv_length]"
    elif mask.dim() == 3 and mask.shape[0] == scores[0]:
        mend = "pass mask[:, None], if its first dimension is the batch"
    return Finding("shape", f"mask {shape} does not broadcast to the scores [{wanted}]", mend)


def _of_values(mask: torch.Tensor, of_mask: str, is_eager: bool) -> Iterator[Finding]:
    mask = mask.detach()
    # One of the rows that share their memory.
    for dimension, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dimension, 0, 1)
    if mask.dtype == torch.bool:
        visible = mask
    elif mask.dtype in ADDITIVE_DTYPES:
        if bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 1).any()):
            additive = "torch.where(mask == 1, 0.0, torch.finfo(q.dtype).min)"
            yield Finding(
                "numbers",
                f"mask is {of_mask} of 0 and 1, which are added to scores and hide no key",
                f"pass {additive if is_eager else 'mask.bool()'}",
            )
            return
        if bool((mask.isnan() | (mask == torch.inf)).any()):
            yield Finding(
                "numbers",
                "mask holds NaN or +inf, so that attention gives NaN",
                "put 0 where a key is visible and torch.finfo(dtype).min where it is masked; "
                "0 times -inf is NaN: use torch.where in place of products",
            )
            return
        visible = mask > _MASKED
    else:
        return
    if visible.dim() == 0 or (is_eager and mask.dtype == torch.bool):
        return
    masked = ~visible.any(dim=-1)
    if not bool(masked.any()):
        return
    place = masked.nonzero()[0].tolist()
    if mask.dtype != torch.bool and bool((mask[tuple(place)] > -torch.inf).any()):
        then = "all keys count alike, the masked ones, too"
    elif is_eager:
        then = "softmax gives NaN"
    else:
        then = "attention gives 0 (NaN before torch 2.5, and where softmax is written out)"
    yield Finding(
        "rows",
        f"no key is visible in the row mask{place}, so that {then}",
        "if it is padding, leave out what attention gives for it, or make the mask with "
        "unmask_unattended=True; else show it a key, its own at least",
    )


@contextlib.contextmanager
def checked() -> Iterator[list[Finding]]:
    """Checks the masks that reach attention while the block runs, as validate_mask does.

    ::

        with attn_mask.checked() as findings:
            model(**inputs)
        assert not findings

    Findings are appended to the list that the block gets, and logged as warnings of the logger
    "attn_mask" before attention runs, so also if it raises: once a block for each kind of finding
    and place. Nothing is raised or changed.

    Seen are calls of ``torch.nn.functional.scaled_dot_product_attention`` by this thread, and the
    eager attention of models of transformers 5, which adds masks to scores, so that boolean ones
    are findings. Not what torch.compile records, attention of other libraries, or BlockMasks.
    Values of masks are read for each call, which makes a model on a GPU wait: a tool for tests.
    Blocks nest, and may be entered by several threads.

    >>> x = torch.zeros(1, 1, 2, 8)
    >>> with attn_mask.checked() as findings:
    ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x, torch.ones(2, 2).tril())
    >>> [finding.kind for finding in findings]
    ['numbers']
    """
    findings: list[Finding] = []
    seen: set[tuple[str, str]] = set()

    def check(call: AttentionCall) -> None:
        # No BlockMasks, and no subclasses as CausalBias is, whose values torch refuses to read.
        if (
            call.how == "other"  # seen again where it calls torch's function
            or type(call.mask) not in (torch.Tensor, torch.nn.Parameter)
            or call.mask.layout != torch.strided
            or not (isinstance(call.query, torch.Tensor) and isinstance(call.key, torch.Tensor))
        ):
            return
        scores, device = _scores(call.query, call.key), call.query.device
        # Autocast makes them alike.
        casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
            device.type
        )
        dtype = None if casts else call.query.dtype
        for finding in _findings(call.mask, scores, dtype, device, call.how == "eager"):
            if (call.where, finding.kind) not in seen:
                seen.add((call.where, finding.kind))
                findings.append(finding)
                _logger.warning("attn_mask.checked: %s: %s", call.where, finding)

    with observed(check):
        yield findings


def _scores(query: torch.Tensor, key: torch.Tensor) -> tuple[int | None, ...] | None:
    """The shape of what masks are added to; None where that is torch's to refuse."""
    if query.is_nested or key.is_nested or query.dim() != key.dim() or query.dim() < 2:
        return None
    batch = tuple(query.shape[:-2])
    if batch and key.shape[0] != 1:
        batch = (key.shape[0] if batch[0] == 1 else batch[0], *batch[1:])
    return (*batch, query.shape[-2], key.shape[-2])
