"""Checks of masks for the tests of models::

from attn_mask import testing

with attn_mask.packed(document_ids=ids):
    testing.assert_no_leak(model, batch, document_ids=ids)
testing.assert_same_masks(model, batch)
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from attn_mask._core.arguments import check_readable
from attn_mask._core.observing import AttentionCall, observed
from attn_mask._transformers.documents import count_sequences
from attn_mask._transformers.install import installed, is_installed
from attn_mask.rules import ID_DTYPES

__all__ = ["RecordedMask", "assert_no_leak", "assert_same_masks", "record_masks"]


class RecordedMask(NamedTuple):
    """What one call of attention got."""

    layer: str
    """The name of the module in the model, or "" where it is not known."""
    attention: str
    """"scaled_dot_product_attention", or the attention and the class of its module."""
    mask: Any
    """The mask as it was given: a tensor, a BlockMask, or None."""


def record_masks(model: torch.nn.Module, batch: Mapping[str, Any]) -> list[RecordedMask]:
    """Runs ``model(**batch)`` without gradients, and returns the masks that reach attention.

    One entry for each call of attention, in their order. Seen are models of transformers 5, and all
    calls of ``torch.nn.functional.scaled_dot_product_attention``; not what torch.compile runs.

    Raises TypeError for what is no module, and for a batch that is no mapping.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     num_hidden_layers=2, hidden_size=8, num_attention_heads=1, vocab_size=4,
    ...     intermediate_size=8,
    ... )
    >>> model = transformers.LlamaModel(config)
    >>> batch = {"input_ids": torch.tensor([[0, 1]]), "attention_mask": torch.tensor([[0, 1]])}
    >>> for layer, attention, mask in attn_mask.testing.record_masks(model, batch):
    ...     print(layer, list(mask.shape))
    layers.0.self_attn [1, 1, 2, 2]
    layers.1.self_attn [1, 1, 2, 2]
    """
    return _recorded("record_masks", model, batch)


def _recorded(name: str, model: Any, batch: Any) -> list[RecordedMask]:
    _check_arguments(name, model, batch)
    names = {module: name for name, module in model.named_modules()}
    found: list[RecordedMask] = []

    def record(call: AttentionCall) -> None:
        # Torch's function is seen again within the module's.
        if call.how != "sdpa" or call.module is None:
            found.append(RecordedMask(names.get(call.module, ""), call.where, call.mask))

    with observed(record), torch.no_grad():
        model(**_copy(batch))
    return found


def assert_same_masks(model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    """Asserts that ``model(**batch)`` gets the same masks with install() as without, bit for bit.

    Raises AssertionError with the first layer whose mask differs; ValueError under install(), and
    where no attention is seen (see record_masks).
    """
    if is_installed():
        raise ValueError(
            "assert_same_masks: expected attn_mask.install() to be off, since the model is run "
            "with it and without, but it is on"
        )
    without = _recorded("assert_same_masks", model, batch)
    with installed():
        within = _recorded("assert_same_masks", model, batch)
    if not without:
        raise ValueError(
            "assert_same_masks: expected model to call attention that is seen, but it called none"
        )
    if len(without) != len(within):
        raise AssertionError(
            f"assert_same_masks: {len(within)} calls of attention with install(), but "
            f"{len(without)} without"
        )
    for theirs, ours in zip(without, within, strict=True):
        of = f"assert_same_masks: {theirs.layer or theirs.attention}"
        mask, other = _dense(theirs.mask), _dense(ours.mask)
        if mask is None or other is None:
            if mask is not other:
                raise AssertionError(
                    f"{of} gets {_shown(other)} with install(), but {_shown(mask)} without"
                )
        elif mask.shape != other.shape or mask.dtype != other.dtype:
            raise AssertionError(
                f"{of} gets {_shown(other)} with install(), but {_shown(mask)} without"
            )
        elif not torch.equal(mask, other):
            place = (mask != other).nonzero()[0].tolist()
            raise AssertionError(
                f"{of} gets {other[tuple(place)].item()} at mask{place} with install(), but "
                f"{mask[tuple(place)].item()} without"
            )


def assert_no_leak(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    document_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    atol: float = 1e-4,
) -> None:
    """Asserts that no document of a packed batch changes what the model gives for another.

    ``model(**batch)`` is run once as it is, and again with other tokens in the first documents of
    all rows, in the second ones, and so on: without gradients and dropout, under whatever install()
    and packed() are there. ``logits`` are compared, else the model's first result.

    Args:
        batch: with "input_ids" [b, n] or "inputs_embeds" [b, n, hidden]. Tokens that its 2-D
            "attention_mask" hides are not looked at.
        document_ids: ints [b or 1, n]; tokens with a negative id are padding.
        cu_seqlens: ints [documents + 1], the same for each row. Without both, documents start where
            ``batch["position_ids"]`` do not rise by one.
        atol: by how much a number may differ.

    Raises AssertionError that names the row, both documents and the difference; ValueError without
    documents, for those that do not match the batch, and where the model gives the same for other
    tokens; TypeError for what is no module, and for ids that are no integers.
    """
    name = "assert_no_leak"
    _check_arguments(name, model, batch)
    if not isinstance(atol, int | float) or isinstance(atol, bool):
        raise TypeError(f"{name}: expected atol to be a number, but got {type(atol).__name__}")
    inputs = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    tokens = batch.get(inputs)
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(
            f'{name}: expected batch to hold "input_ids" [b, n] or "inputs_embeds" [b, n, hidden]'
        )
    check_readable(name, f'batch["{inputs}"]', tokens)
    if tokens.dim() < 2 or tokens.shape[:2].numel() == 0:
        raise ValueError(
            f'{name}: expected batch["{inputs}"] to be [b, n] or [b, n, hidden] of one token or '
            f"more, but got {list(tokens.shape)}"
        )
    ids = _ids_of(name, batch, document_ids, cu_seqlens, tokens)
    is_token = ids >= 0
    padding = batch.get("attention_mask")
    if padding is not None:
        check_readable(name, 'batch["attention_mask"]', padding)
        if padding.dim() == 2:
            is_token &= _last_of_rows(name, padding, *tokens.shape[:2]).to(ids.device) != 0
    # Of each row by itself.
    number = torch.stack([row.unique(return_inverse=True)[1] for row in ids])
    with _evaluating(model), torch.no_grad():
        before = _output(model, batch)
        if before.dim() < 3 or before.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"{name}: expected model to give [{tokens.shape[0]}, {tokens.shape[1]}, size], "
                f"something for each token, but got {list(before.shape)}"
            )
        has_changed = False
        for document in range(int(number.max()) + 1):
            is_changed = (number == document) & is_token
            if not bool(is_changed.any()):
                continue
            changed = _other_tokens(model, tokens, is_changed)
            difference = (_output(model, {**batch, inputs: changed}) - before).abs()
            difference = difference.flatten(2).amax(-1).to(ids.device)
            has_changed |= bool((difference[is_changed] > 0).any())
            others = is_token & ~is_changed & is_changed.any(-1, keepdim=True)
            # Not "> atol", so that NaN counts.
            leaks = others & ~(difference <= atol)
            if bool(leaks.any()):
                row, token = leaks.nonzero()[0].tolist()
                worst = float(difference[row][leaks[row]].max())
                changing = int(ids[row][is_changed[row]][0])
                raise AssertionError(
                    f"{name}: row {row}: other tokens in document {changing} change document "
                    f"{int(ids[row, token])}, first at token {token}, by up to {worst:.3g}, which "
                    f"is more than atol {atol:g}"
                )
    if not has_changed:
        raise ValueError(
            f"{name}: expected model to give something else for other tokens, but it did not"
        )


def _last_of_rows(name: str, padding: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """What a padding mask holds for the tokens of a batch: it may begin before them, in a cache."""
    if padding.shape[0] not in (1, rows) or padding.shape[1] < length:
        raise ValueError(
            f'{name}: expected batch["attention_mask"] to be [{rows}, {length} or more], '
            f"but got {list(padding.shape)}"
        )
    return padding[:, -length:]


def _ids_of(
    name: str, batch: Mapping[str, Any], document_ids: Any, cu_seqlens: Any, tokens: torch.Tensor
) -> torch.Tensor:
    rows, length = tokens.shape[:2]
    if document_ids is not None and cu_seqlens is not None:
        raise ValueError(f"{name}: expected document_ids or cu_seqlens, but got both")
    argument = "document_ids" if cu_seqlens is None else "cu_seqlens"
    ids = document_ids if cu_seqlens is None else cu_seqlens
    if ids is None:
        argument = 'batch["position_ids"]'
        ids = batch.get("position_ids")
        if ids is None:
            raise ValueError(
                f"{name}: expected document_ids, cu_seqlens or position_ids in batch, by which "
                "documents are told apart, but got none"
            )
    check_readable(name, argument, ids)
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{name}: expected {argument} to be integers, but got {ids.dtype}")
    if cu_seqlens is not None:
        borders = ids.tolist() if ids.dim() == 1 and ids.numel() else [None]
        if borders[0] != 0 or borders[-1] != length or borders != sorted(borders):
            raise ValueError(
                f"{name}: expected cu_seqlens to rise from 0 to the number of tokens {length}, "
                f"but got {ids.tolist()}"
            )
        index = torch.arange(length, device=ids.device)
        ids = torch.searchsorted(ids[1:].contiguous(), index, right=True)[None]
    if ids.dim() != 2 or ids.shape[0] not in (1, rows) or ids.shape[1] != length:
        raise ValueError(
            f"{name}: expected {argument} to be [{rows}, {length}], but got {list(ids.shape)}"
        )
    if document_ids is None and cu_seqlens is None:
        ids = count_sequences(ids)
    of_rows: torch.Tensor = ids.expand(rows, -1)
    return of_rows


def _other_tokens(model: Any, tokens: torch.Tensor, is_changed: torch.Tensor) -> torch.Tensor:
    is_changed = is_changed.to(tokens.device)
    if tokens.is_floating_point():
        return torch.where(is_changed[..., None], tokens + 1, tokens)
    try:
        words = model.get_input_embeddings().num_embeddings
    except AttributeError:
        words = int(tokens.max()) + 1
    return torch.where(is_changed, (tokens + 1) % max(words, 2), tokens)


def _output(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    result = model(**_copy(batch))
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = result if isinstance(result, torch.Tensor) else result[0]
    return logits.double()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _copy(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A cache changes in each run; tensors do not."""
    return {
        name: value if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in batch.items()
    }


def _check_arguments(name: str, model: Any, batch: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{name}: expected model to be a torch.nn.Module, but got {type(model).__name__}"
        )
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{name}: expected batch to be a mapping of the model's arguments, "
            f"but got {type(batch).__name__}"
        )


def _dense(mask: Any) -> Any:
    """A BlockMask by its elements: which of them are in a block that is full is not compared."""
    if hasattr(mask, "as_boolean"):  # attention by rule gets a RuleMask
        return mask.as_boolean()
    if not hasattr(mask, "mask_mod"):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, q_length, kv_length = mask.shape
    device = mask.kv_num_blocks.device
    return create_mask(mask.mask_mod, batch, heads, q_length, kv_length, device)


def _shown(mask: Any) -> str:
    if mask is None:
        return "no mask"
    if isinstance(mask, torch.Tensor):
        return f"a mask {list(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}"
    return f"a {type(mask).__name__}"
