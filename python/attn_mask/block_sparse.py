"""Attention over chosen blocks of queries and keys, in the form that flex attention first had.

Mirrors ``torch.nn.attention._flex_attention`` of torch 2.4's development, names, fields and
defaults, on top of today's ``torch.nn.attention.flex_attention``. A mask lists the blocks that are
attended to, each wholly; what is finer than a block is left to a score_mod, a function
``(score, batch, head, token_q, token_kv) -> score`` of 0-d tensors, where -inf masks. So a causal
layer takes both: ``_flex_attention(query, key, value, _causal, _create_block_sparse_mask(mask))``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_mask._core.arguments import check_rank

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "_DEFAULT_SPARSE_BLOCK_SIZE",
    "_BlockSparseMask",
    "_causal",
    "_compose",
    "_convert_block_mask_to_mask",
    "_convert_mask_to_block_mask",
    "_create_block_sparse_mask",
    "_create_empty_block_sparse_mask",
    "_flex_attention",
    "_generate_alibi_bias",
    "_identity",
    "_rel_bias",
    "_rel_causal",
    "_score_mod_signature",
    "broadcast_to_dim",
]

_DEFAULT_SPARSE_BLOCK_SIZE = 128

_score_mod_signature = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False, repr=False)
class _BlockSparseMask:
    """Which blocks of keys each block of queries attends to, and the same seen from the keys.

    Of the Qb x KVb blocks, for batch rows B and heads H (each may be 1, for all):

        kv_num_blocks: how many blocks a block of queries attends to [B, H, Qb], int32.
        kv_indices: which: that many first ones count [B, H, Qb, KVb], int32.
        q_num_blocks: how many blocks of queries attend to a block of keys [B, H, KVb], int32.
        q_indices: which [B, H, KVb, Qb], int32.
        KV_BLOCK_SIZE, Q_BLOCK_SIZE: how many keys and queries are a block.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    KV_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE
    Q_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE


def broadcast_to_dim(x: Tensor, dim: int) -> Tensor:
    """A view of x with dimensions of size 1 in front, ``dim`` in all; x if it has that many."""
    return x[(None,) * (dim - x.dim())] if x.dim() < dim else x


def _convert_mask_to_block_mask(
    mask: Tensor,
    KV_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
    Q_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
) -> Tensor:
    """Which blocks of a mask hold a True.

    Args:
        mask: True where a query attends to a key, boolean [B, H, Q, KV]; leading dimensions may be
            left out. Q and KV are multiples of the block sizes.

    Returns a boolean [B, H, Q / Q_BLOCK_SIZE, KV / KV_BLOCK_SIZE].

    Raises TypeError for other dtypes, ValueError for other sizes and for block sizes below 1.
    """
    return _blocks_of("_convert_mask_to_block_mask", mask, KV_BLOCK_SIZE, Q_BLOCK_SIZE)


def _convert_block_mask_to_mask(
    block_mask: Tensor,
    KV_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
    Q_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
) -> Tensor:
    """Each cell of [B, H, Qb, KVb], of any dtype, spread over its block.

    Returns [B, H, Qb * Q_BLOCK_SIZE, KVb * KV_BLOCK_SIZE]. Raises ValueError for another rank and
    for block sizes below 1.
    """
    name = "_convert_block_mask_to_mask"
    _check_block_sizes(name, KV_BLOCK_SIZE, Q_BLOCK_SIZE)
    shape = "4-D [batch_size, heads, q_blocks, kv_blocks]"
    check_rank(f"{name}: expected block_mask", block_mask, (4,), shape)
    batch_size, heads, q_blocks, kv_blocks = block_mask.shape
    return (
        block_mask[:, :, :, None, :, None]
        .expand(-1, -1, -1, Q_BLOCK_SIZE, -1, KV_BLOCK_SIZE)
        .reshape(batch_size, heads, q_blocks * Q_BLOCK_SIZE, kv_blocks * KV_BLOCK_SIZE)
    )


def _create_block_sparse_mask(
    mask: Tensor,
    KV_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
    Q_BLOCK_SIZE: int = _DEFAULT_SPARSE_BLOCK_SIZE,
) -> _BlockSparseMask:
    """The mask of those blocks that hold a True, on the device of ``mask``.

    In its indices, the blocks attended to come first, then the others, each in ascending order.
    Takes, and raises, what ``_convert_mask_to_block_mask`` does.
    """
    blocks = _blocks_of("_create_block_sparse_mask", mask, KV_BLOCK_SIZE, Q_BLOCK_SIZE)
    kv_num_blocks, kv_indices = _listed(blocks)
    q_num_blocks, q_indices = _listed(blocks.transpose(2, 3).contiguous())
    return _BlockSparseMask(
        kv_num_blocks, kv_indices, q_num_blocks, q_indices, KV_BLOCK_SIZE, Q_BLOCK_SIZE
    )


def _create_empty_block_sparse_mask(query: Tensor, key: Tensor, value: Tensor) -> _BlockSparseMask:
    """The mask that masks nothing: all queries and all keys are one block, attended to.

    Args:
        query: [..., q_length, head size]; gives the length and the device.
        key: [..., kv_length, head size]; gives the length.
        value: not used.
    """
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    first = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=query.device)
    return _BlockSparseMask(
        kv_num_blocks=one,
        kv_indices=first,
        q_num_blocks=one.clone(),
        q_indices=first.clone(),
        KV_BLOCK_SIZE=key.shape[-2],
        Q_BLOCK_SIZE=query.shape[-2],
    )


def _identity(
    score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
) -> Tensor:
    """The score_mod that changes nothing."""
    return score


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: _score_mod_signature = _identity,
    block_sparse_mask: _BlockSparseMask | None = None,
) -> Tensor:
    """Attention over the blocks of a mask, its scores changed by a function.

    The softmax, over the keys of those blocks, of score_mod(query @ key / sqrt(E), ...), times
    value. (In 2024, before there was a scale, scores were not divided: for those, multiply query by
    sqrt(E).) A query that attends to nothing, by the blocks or by scores of -inf, gets zeros.

    In eager code torch's unfused implementation holds all scores; code compiled by inductor skips
    blocks. On GPUs its kernels need blocks of a multiple of their tiles; the default, 128, is one.

    Args:
        query: [B, H, q_length, E].
        key: [B, H, kv_length, E].
        value: [B, H, kv_length, Ev].
        score_mod: (score, batch, head, token_q, token_kv) -> score, all 0-d tensors.
        block_sparse_mask: for B and H, or 1 of them; its blocks cover both lengths, of the last
            ones a part may lie beyond them. By default all is attended to.

    Returns [B, H, q_length, Ev].

    Raises TypeError for a mask of another type and ValueError for sizes that do not fit; for what
    torch's ``flex_attention`` does not take (gradients on a CPU among it), its error.
    """
    name = "_flex_attention"
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        shape = "4-D [batch_size, heads, length, head size]"
        check_rank(f"{name}: expected {argument}", tensor, (4,), shape)
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = None
    if block_sparse_mask is not None:
        block_mask = _torch_block_mask(name, query, key, block_sparse_mask)
    if query.shape[2] == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    if torch.compiler.is_dynamo_compiling():
        return flex_attention(query, key, value, score_mod, block_mask)
    with warnings.catch_warnings():
        # The first API ran so, too, without a word.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(query, key, value, score_mod, block_mask)


def _causal(
    score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
) -> Tensor:
    """The score_mod that masks keys after the query."""
    return torch.where(token_kv <= token_q, score, float("-inf"))


def _rel_bias(
    score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
) -> Tensor:
    """The score_mod that adds how far the key is before the query."""
    return score + (token_q - token_kv)


def _rel_causal(
    score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
) -> Tensor:
    """``_rel_bias``, causal."""
    return _causal(_rel_bias(score, batch, head, token_q, token_kv), batch, head, token_q, token_kv)


def _generate_alibi_bias(num_heads: int) -> _score_mod_signature:
    """The score_mod of ALiBi: head h of num_heads adds (kv - q) * 2 ** (-8 * (h + 1) / num_heads).

    Raises ValueError for num_heads below 1.
    """
    if num_heads < 1:
        raise ValueError(
            f"_generate_alibi_bias: expected num_heads to be positive, but got {num_heads}"
        )

    def _alibi_bias(
        score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
    ) -> Tensor:
        slope = torch.exp2(-((head + 1) * 8.0 / num_heads))
        return score + (token_kv - token_q) * slope

    return _alibi_bias


def _compose(*fs: _score_mod_signature) -> _score_mod_signature:
    """The score_mod that applies all of them, the last one first: f(g(score)) for (f, g).

    Raises TypeError when there is none.
    """
    if not fs:
        raise TypeError("_compose: expected at least one score_mod, but got none")

    def composed(
        score: Tensor, batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor
    ) -> Tensor:
        for f in fs[::-1]:
            score = f(score, batch, head, token_q, token_kv)
        return score

    return composed


def _check_block_sizes(name: str, kv_block_size: int, q_block_size: int) -> None:
    for argument, size in (("KV_BLOCK_SIZE", kv_block_size), ("Q_BLOCK_SIZE", q_block_size)):
        if size < 1:
            raise ValueError(f"{name}: expected {argument} to be positive, but got {size}")


def _blocks_of(name: str, mask: Tensor, kv_block_size: int, q_block_size: int) -> Tensor:
    """What _convert_mask_to_block_mask returns; errors name the function that was called."""
    _check_block_sizes(name, kv_block_size, q_block_size)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected mask to be boolean, but got {mask.dtype}")
    mask = broadcast_to_dim(mask, 4)
    shape = "at most 4-D [batch_size, heads, q_length, kv_length]"
    check_rank(f"{name}: expected mask", mask, (4,), shape)
    batch_size, heads, q_length, kv_length = mask.shape
    for what, length, argument, size in (
        ("queries", q_length, "Q_BLOCK_SIZE", q_block_size),
        ("keys", kv_length, "KV_BLOCK_SIZE", kv_block_size),
    ):
        if length % size != 0:
            raise ValueError(
                f"{name}: expected mask to hold a multiple of {argument} {size} of {what}, "
                f"but got {length}"
            )
    cells = mask.view(
        batch_size,
        heads,
        q_length // q_block_size,
        q_block_size,
        kv_length // kv_block_size,
        kv_block_size,
    )
    # Rows first, as maxima: faster than any(). (Faster still on bytes, but inductor 2.15 gets the
    # maxima of bytes wrong on CPUs.)
    return cells.amax(3).amax(4)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row are True, and where, followed by where the others are; int32."""
    order = torch.argsort(blocks.to(torch.uint8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _torch_block_mask(name: str, query: Tensor, key: Tensor, mask: _BlockSparseMask) -> "BlockMask":
    """The mask as today's flex attention takes it, once it is known to fit query and key."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, _BlockSparseMask):
        raise TypeError(
            f"{name}: expected block_sparse_mask to be a _BlockSparseMask, "
            f"but got {type(mask).__name__}"
        )
    batch_size, heads, q_length = query.shape[:3]
    kv_length = key.shape[2]
    _check_block_sizes(name, mask.KV_BLOCK_SIZE, mask.Q_BLOCK_SIZE)
    q_blocks = _blocks_over(q_length, mask.Q_BLOCK_SIZE)
    kv_blocks = _blocks_over(kv_length, mask.KV_BLOCK_SIZE)
    shape = mask.kv_indices.shape
    if (
        len(shape) != 4
        or shape[0] not in (1, batch_size)
        or shape[1] not in (1, heads)
        or shape[2:] != (q_blocks, kv_blocks)
    ):
        raise ValueError(
            f"{name}: expected kv_indices of block_sparse_mask to be "
            f"[{batch_size} or 1, {heads} or 1, {q_blocks}, {kv_blocks}] for {q_length} queries "
            f"and {kv_length} keys, but got {list(shape)}"
        )
    # To torch all blocks are full ones. Kernels that skip blocks do not call a full one's mask_mod;
    # the unfused implementation has no blocks and calls it for each cell.
    partial_blocks = torch.zeros_like(mask.kv_num_blocks)
    if q_length == 1:
        # The CPU kernel for one query writes no result where it visits no block (torch 2.15). So it
        # visits one, in which the mask_mod masks all.
        partial_blocks = (mask.kv_num_blocks == 0).to(torch.int32)
    return BlockMask(
        seq_lengths=(q_length, kv_length),
        kv_num_blocks=partial_blocks,
        kv_indices=torch.zeros_like(mask.kv_indices),
        full_kv_num_blocks=mask.kv_num_blocks,
        full_kv_indices=mask.kv_indices,
        q_num_blocks=torch.zeros_like(mask.q_num_blocks),
        q_indices=torch.zeros_like(mask.q_indices),
        full_q_num_blocks=mask.q_num_blocks,
        full_q_indices=mask.q_indices,
        BLOCK_SIZE=(
            _size_for_torch(mask.Q_BLOCK_SIZE, q_blocks),
            _size_for_torch(mask.KV_BLOCK_SIZE, kv_blocks),
        ),
        mask_mod=_mask_mod(mask, batch_size, heads),
    )


def _blocks_over(length: int, size: int) -> int:
    return (length + size - 1) // size


def _size_for_torch(size: int, blocks: int) -> int:
    """A lone block may be of any size that reaches the end: one that GPU kernels can divide."""
    default = _DEFAULT_SPARSE_BLOCK_SIZE
    return size if blocks > 1 else _blocks_over(size, default) * default


def _mask_mod(
    mask: _BlockSparseMask, batch_size: int, heads: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether the block of a cell is attended to."""
    indices = mask.kv_indices
    kv_blocks = indices.shape[-1]
    counts = torch.arange(kv_blocks, device=indices.device) < mask.kv_num_blocks[..., None]
    # What does not count goes to one more column. With counts as the values, not True: inductor
    # rewrites the scatter of a constant into something that a mask_mod of one block can't hold.
    columns = torch.where(counts, indices, kv_blocks).to(torch.int64)
    blocks = torch.zeros(
        (*indices.shape[:-1], kv_blocks + 1), dtype=torch.bool, device=indices.device
    ).scatter(-1, columns, counts)
    blocks = blocks.expand(batch_size, heads, -1, -1)
    q_size, kv_size = mask.Q_BLOCK_SIZE, mask.KV_BLOCK_SIZE

    def is_attended(batch: Tensor, head: Tensor, token_q: Tensor, token_kv: Tensor) -> Tensor:
        return blocks[batch, head, token_q // q_size, token_kv // kv_size]

    return is_attended
