"""Attention in ATen operators, with a tensor of all scores: for graphs that leave PyTorch, and for
devices without kernels of ours.

Heads are grouped by the head of the key that they share: [b, key heads, group, q, ...].
"""

import torch

from attn_mask._core.tracing import holds


def _grouped(tensor: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    grouped: torch.Tensor = tensor.unflatten(1, (key.shape[1], -1))
    return grouped


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _ordered(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    """In memory with the dimensions in this order."""
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


_BY_LENGTH = [0, 2, 1, 3]


def _masked_scores(
    query: torch.Tensor, key: torch.Tensor, attends: torch.Tensor, scale: float | None
) -> torch.Tensor:
    scale = max(query.shape[3], 1) ** -0.5 if scale is None else scale
    scores = _grouped(_exact(query), key) @ _exact(key).unsqueeze(2).mT * scale
    attends = attends.expand(-1, query.shape[1], -1, -1)
    return scores.masked_fill(~_grouped(attends, key), -torch.inf)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attends: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the log-sum-exp of the scores, as torch.ops.attn_mask gives them."""
    scores = _masked_scores(query, key, attends, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = (weights @ _exact(value).unsqueeze(2)).flatten(1, 2).to(query.dtype)
    lse = _ordered(lse.flatten(1, 2), [0, 2, 1])
    if not holds(query.shape[3] == value.shape[3]):
        return _ordered(out, _BY_LENGTH), lse
    return _ordered(out, sorted(range(4), key=query.stride, reverse=True)), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    attends: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; ``saved``: these, out and the log-sum-exp."""
    query, key, value, out, lse = saved
    scores = _masked_scores(query, key, attends, scale)
    grad, of_out = (_grouped(_exact(tensor), key) for tensor in (grad_out, out))
    of_row = (grad * of_out).sum(-1, keepdim=True)
    if grad_lse is not None:
        of_row = of_row - _grouped(grad_lse.masked_fill(lse == -torch.inf, 0), key)[..., None]
    lse = lse.masked_fill(lse == -torch.inf, 0)
    weights = (scores - _grouped(lse, key)[..., None]).exp()
    of_value = (weights.mT @ grad).sum(2)
    of_weights = grad @ _exact(value).unsqueeze(2).mT
    of_scores = weights * (of_weights - of_row)
    of_scores = of_scores * (max(query.shape[3], 1) ** -0.5 if scale is None else scale)
    of_query = (of_scores @ _exact(key).unsqueeze(2)).flatten(1, 2)
    of_key = (of_scores.mT @ _grouped(_exact(query), key)).sum(2)
    of_query, of_key, of_value = (
        _ordered(tensor.to(query.dtype), _BY_LENGTH) for tensor in (of_query, of_key, of_value)
    )
    return of_query, of_key, of_value
