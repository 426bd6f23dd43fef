"""attn_mask.packed: documents that the create functions keep apart in a block."""

from typing import Any, Self

import torch

from attn_mask._core.scopes import Blocks
from attn_mask._transformers import model_calls, packing
from attn_mask._transformers.install import is_installed

__all__ = ["packed"]


class packed(Blocks[packing.Block]):
    """``with attn_mask.packed(document_ids=ids):`` keeps documents apart that are packed into rows.

    ::

        attn_mask.install()
        with attn_mask.packed(document_ids=ids):
            loss = model(input_ids, position_ids=positions, labels=labels).loss
            loss.backward()

    Every create function of transformers (``create_causal_mask`` ...) that is called in the block
    under install(), by a model or by ``generate``, makes masks in which a token attends to its own
    document only, with a cache and without, whatever 2-D attention_mask comes along: its zeros stay
    padding, other numbers mean nothing. So do those of ``attn_mask.masking_utils``, unless they are
    given documents of their own. Windows and chunks count within each document, mask functions see
    positions in it; tables of tokens, as block ids of images, are looked up by row. A 4-D mask that
    a model is given stays as it is. An encoder of images or sound within a model has no documents.

    Args, of which exactly one is given:
        position_ids: ints [b or 1, n]: a document starts where they do not rise by one.
        document_ids: ints [b or 1, n]: tokens with the same id are of one document.
        cu_seqlens: ints [documents + 1] that rise from 0 to n: where documents start and where the
            last one ends, the same for each row.

    n is the number of all tokens up to the last query, those in the cache included. With a cache
    there may be more, so that a block can stand around prefill and decoding. The model's own
    position_ids are not changed: give it those that start again in each document.

    The tensor may be written within the block; on a CPU it is compared with a copy at each step of
    decoding, elsewhere writes through ``.data`` are not seen.

    The documents hold in this thread or task alone; what torch.compile traces takes them as inputs
    (before torch 2.15, those of the innermost block of any thread). Blocks nest, the innermost
    holds. Where activations are checkpointed, run backward within the block. Enter it outside
    compiled code.

    Attention that takes no mask: flash attention needs ``cu_seqlens``, which are passed on to
    models that take ``cu_seq_lens_q``; else it is a ValueError, as is attention for which no mask
    function is registered, padding beside documents in flash attention, and cross-attention. Layers
    with a state (linear attention, state spaces) are not kept from mixing documents by any mask: a
    warning names them.

    Raises TypeError and ValueError for other arguments; ValueError on entry without install(), in a
    create function where documents do not match the batch, and in one that was wrapped or kept
    before install(); RuntimeError where it is left and was not entered.

    >>> import transformers
    >>> ids = torch.tensor([[0, 0, 1, 1]])
    >>> config = transformers.LlamaConfig(attn_implementation="sdpa")
    >>> with attn_mask.installed(), attn_mask.packed(document_ids=ids):
    ...     mask = transformers.masking_utils.create_causal_mask(
    ...         config, torch.zeros(1, 4, 8), None, None
    ...     )
    >>> mask.int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    def __init__(
        self,
        *,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        given: dict[Any, Any] = {
            "position_ids": position_ids,
            "document_ids": document_ids,
            "cu_seqlens": cu_seqlens,
        }
        given = {kind: tensor for kind, tensor in given.items() if tensor is not None}
        if len(given) != 1:
            raise ValueError(
                "packed: expected one of position_ids, document_ids and cu_seqlens, but got "
                f"{' and '.join(given) or 'none'}"
            )
        ((kind, tensor),) = given.items()
        documents = packing.Documents("packed", kind, tensor)
        if tensor.is_meta:
            raise ValueError(
                f"packed: expected {kind} to hold values, but got a tensor on the meta device: a "
                "model there takes them from a CPU"
            )
        super().__init__(packing.scope, packing.Block(documents))

    def __enter__(self) -> Self:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "packed: expected to be entered outside compiled code, which takes the documents "
                "of the block around it"
            )
        if not is_installed():
            raise ValueError(
                "packed: expected attn_mask.install() before the block, since the create functions "
                "of transformers keep no documents apart without it"
            )
        model_calls.watched.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        model_calls.watched.__exit__()
