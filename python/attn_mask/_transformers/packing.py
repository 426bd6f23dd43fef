"""Documents that are packed into rows: where they are given, and for which code they hold."""

import copy
import dataclasses
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attn_mask._core import mask_rules
from attn_mask._core.arguments import check_strided
from attn_mask._core.mask_rules import MaskFunction
from attn_mask._core.scopes import Entry, Scope
from attn_mask._core.tracing import is_opaque, is_recording
from attn_mask._transformers.documents import count_sequences, positions_in_runs
from attn_mask._transformers.mask_functions import (
    and_masks,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
)

Kind = Literal["document_ids", "position_ids", "cu_seqlens", "cu_seq_lens_q"]
# Those with an entry for each token; the others hold where documents begin.
_OF_TOKENS = "document_ids", "position_ids"

# No token has this id: slots of a cache that are not filled, and tokens of other documents there.
_NO_DOCUMENT = torch.iinfo(torch.int64).min


class _Kept(NamedTuple):
    """The ids of the tokens, and more that are still to come."""

    length: int
    made_for: tuple[Any, ...]
    given: torch.Tensor | int
    """What they were made of: a copy on a CPU, elsewhere the tensor's version."""
    ids: torch.Tensor


class Documents:
    """Documents, in one of the ways in which they can be given.

    ``function``: which one they were given to, for errors. ``is_of_call``: they are those of the
    tokens of one call of a model, not of the cache's.
    """

    def __init__(self, function: str, kind: Kind, tensor: Any, *, is_of_call: bool = False):
        self.function = function
        self.kind: Kind = kind
        self.tensor = tensor
        self.is_of_call = is_of_call
        self.is_whole = function != "packed"
        """Whether there are no more of them than tokens. In a block, those of tokens that are still
        to come may be among them."""
        self.is_passed_on = False
        """Whether the model that is being called has their cu_seqlens."""
        self.source = f"{function}({kind})"
        self._kept: _Kept | None = None
        self._rules: dict[tuple[int, str], tuple[MaskFunction, torch.Tensor, MaskFunction]] = {}
        self._check()
        self._is_on_cpu = tensor.device.type == "cpu"

    def _check(self) -> None:
        name, kind, tensor = self.function, self.kind, self.tensor
        check_strided(name, kind, tensor)
        has_sign = kind == "position_ids"
        if tensor.dtype not in mask_rules.ID_DTYPES or (has_sign and tensor.dtype == torch.uint8):
            unsigned = "" if has_sign else " or uint8"
            raise TypeError(
                f"{name}: expected {kind} to hold signed integers{unsigned}, but got {tensor.dtype}"
            )
        if kind in _OF_TOKENS:
            fits, shape = tensor.dim() == 2, "2-D [batch_size, length]"
        else:
            fits, shape = tensor.dim() == 1 and tensor.shape[0] > 0, "1-D [documents + 1]"
        if not fits:
            raise ValueError(f"{name}: expected {kind} to be {shape}, but got {list(tensor.shape)}")

    def ids(
        self,
        batch_size: int,
        q_length: Any,
        q_offset: Any,
        tokens: Any,
        kv_end: Any,
        device: torch.device,
    ) -> torch.Tensor:
        """The document of each token, ints [b, n].

        ``tokens``: how many there are, those in the cache included; None where that is not known.
        ``kv_end``: where a cache ends, else None. Slots in it after the last token (static caches)
        are in a document that no token is in.

        Raises ValueError where they do not match.
        """
        if self.is_of_call and self.kind == "position_ids":
            end = q_length if kv_end is None else kv_end
            return self._ids_by_call(batch_size, q_length, q_offset, end, device)
        is_kept = (
            not self.is_whole
            and kv_end is not None
            and not is_recording()
            and (self._is_on_cpu or not self.tensor.is_inference())
            and _get_current_dispatch_mode() is None
        )
        if (
            (kept := self._kept) is not None
            and is_kept
            and type(tokens) is int
            and tokens <= kept.length
            and kept.made_for == (batch_size, device, max(kv_end - kept.length, 0))
            and self._is_still(kept.given)
        ):
            return kept.ids
        self._check_length(batch_size, q_length, q_offset, tokens, kv_end is not None)
        # Steps of decoding take what is the same for all of them.
        is_kept = is_kept and not is_opaque(self.tensor)
        # On a CPU they are compared with a copy: versions count no write through NumPy or
        # ``.data``, and tensors of inference mode have none.
        of = self.tensor.clone() if is_kept and self._is_on_cpu else self.tensor
        given = of if self._is_on_cpu or not is_kept else of._version
        end = kv_end if tokens is None else tokens
        table = self._table(of, batch_size, q_length, end, device)
        length = table.shape[1]
        if kv_end is not None and kv_end > length:
            table = F.pad(table.long(), (0, kv_end - length), value=_NO_DOCUMENT)
        ids = table.expand(batch_size, -1)
        if is_kept:
            key = batch_size, device, max(kv_end - length, 0)
            self._kept = _Kept(length, key, given, ids)
        return ids

    def _is_still(self, given: torch.Tensor | int) -> bool:
        """Whether the tensor was not written since."""
        tensor: torch.Tensor = self.tensor
        if isinstance(given, torch.Tensor):
            return torch.equal(tensor, given)
        return tensor._version == given

    def within(self, ids: torch.Tensor, rule: MaskFunction) -> MaskFunction:
        """The rule within each document."""
        return self._once(
            rule, ids, lambda: and_masks(packed_sequence_mask_function(ids), rule), "within"
        )

    def at_positions(
        self, rule: MaskFunction, ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> MaskFunction:
        """The rule at the positions that tokens have in their documents.

        Tables of tokens, as block ids, are looked up where the tokens are. Distances are the same
        in both.
        """
        if not _counts_positions(rule):
            return rule

        def make() -> MaskFunction:
            return _remapped(rule, positions_in_runs(ids, attention_mask))

        return make() if attention_mask is not None else self._once(rule, ids, make, "at")

    def _once(
        self, rule: MaskFunction, ids: torch.Tensor, make: Callable[[], MaskFunction], how: str
    ) -> MaskFunction:
        """Steps of decoding have the same rules, which keep their programs."""
        if is_recording():
            return make()
        kept = self._rules.get((id(rule), how))
        if kept is None or kept[0] is not rule or kept[1] is not ids:
            if len(self._rules) >= 8:
                self._rules.clear()
            kept = self._rules[id(rule), how] = (rule, ids, make())
        return kept[2]

    def _table(
        self, of: torch.Tensor, batch_size: int, q_length: Any, length: Any, device: Any
    ) -> torch.Tensor:
        given = of.to(device)
        if self.kind in _OF_TOKENS:
            return count_sequences(given) if self.kind == "position_ids" else given
        borders = given.long()[1:]
        if self.kind == "cu_seq_lens_q":
            index = torch.arange(batch_size * q_length, device=device).view(batch_size, q_length)
            return torch.searchsorted(borders, index, right=True)
        if not self.is_whole and of.device.type == "cpu" and not is_opaque(of):
            length = int(of[-1])
        index = torch.arange(length, device=device)
        return torch.searchsorted(borders, index, right=True)[None]

    def _check_length(
        self, batch_size: int, q_length: Any, q_offset: Any, tokens: Any, has_cache: bool
    ) -> None:
        name, kind, given = self.function, self.kind, self.tensor
        may_be_longer = has_cache and not self.is_whole
        least = "at least " if may_be_longer else ""

        def fits(length: Any) -> bool:
            return bool(length == tokens or (may_be_longer and length > tokens))

        if kind in _OF_TOKENS:
            if given.shape[0] not in (1, batch_size):
                raise ValueError(
                    f"{name}: expected {kind} to be [{batch_size}, length], "
                    f"but got {list(given.shape)}"
                )
            if tokens is not None and not is_recording() and not fits(given.shape[1]):
                raise ValueError(
                    f"{name}: expected {kind} to be of length {least}{tokens}, for all tokens up "
                    f"to the last query, but got {list(given.shape)}"
                )
            return
        if self.is_of_call:
            if not isinstance(q_offset, torch.Tensor) and q_offset != 0:
                raise ValueError(
                    f"{name}: expected no tokens in the cache beside {kind}, which do not say "
                    f"where those belong, but got {q_offset}"
                )
            tokens = batch_size * q_length
        # On another device it would have to be waited for; there, wrong ones give wrong documents.
        if given.device.type != "cpu" or tokens is None or is_opaque(given):
            return
        borders = given.tolist()
        if borders[0] != 0 or borders != sorted(borders) or not fits(borders[-1]):
            raise ValueError(
                f"{name}: expected {kind} to rise from 0 to {least}the number of tokens {tokens}, "
                f"but got {borders}"
            )

    def _ids_by_call(
        self, batch_size: int, q_length: Any, q_offset: Any, kv_end: Any, device: torch.device
    ) -> torch.Tensor:
        """By the positions of the queries alone: a document that began in the cache starts as many
        tokens before the first query as that query's position says."""
        positions = self.tensor.to(device)
        sequences = count_sequences(positions)
        after = torch.arange(kv_end, device=device) - q_offset
        if after.dim() == 1:
            after = after[None]
        after = after.expand(batch_size, -1)
        sequences = sequences.expand(batch_size, -1)
        ids = sequences.gather(1, after.clamp(0, q_length - 1))
        is_other = (after >= q_length) | (after < -positions[:, :1])
        return torch.where(is_other, _NO_DOCUMENT, ids)

    def passed_on(self) -> "Documents":
        """The same, in a call of a model that has their cu_seqlens."""
        made = copy.copy(self)
        made.is_passed_on = True
        return made

    def cu_seq_lens(self, rows: int) -> dict[str, Any]:
        """As models take cu_seqlens for flash attention, over the flattened rows."""
        borders = self.tensor.to(torch.int32)
        first = torch.arange(rows, device=borders.device, dtype=torch.int32)[:, None] * borders[-1]
        flat = torch.cat([borders[:1], (borders[1:] + first).flatten()])
        longest = int(borders.diff().max()) if len(borders) > 1 else 0
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (flat, flat, longest, longest), strict=True))


def _counts_positions(rule: MaskFunction) -> bool:
    """Whether it depends on more of positions than which tokens they are and how far apart."""
    return any(isinstance(part, (mask_rules.Chunked, mask_rules.Function)) for part in rule.walk())


def _has_table_of_tokens(part: Any) -> bool:
    """Tensors of chunks and shifts are for batch rows; those of all others, for tokens."""
    return not isinstance(part, mask_rules.Chunked | mask_rules.Shift) and any(
        isinstance(getattr(part, field.name), torch.Tensor) for field in dataclasses.fields(part)
    )


def _remapped(rule: MaskFunction, positions: torch.Tensor) -> MaskFunction:
    if not _counts_positions(rule):
        return rule
    if rule.factory in ("intersection", "union"):
        return rule.with_parts(lambda part: _remapped(part, positions))
    if any(map(_has_table_of_tokens, rule.walk())):
        return rule
    return remap_positions_for_packed_sequence(rule, positions)


class Block(NamedTuple):
    """What holds in a block. A call of a model is a block, too.

    ``position_ids``: those that it was given. ``is_other``: it is a model within a model and takes
    no text, as one of images: its tokens are others.
    """

    documents: Documents | None
    is_call: bool = False
    position_ids: torch.Tensor | None = None
    is_other: bool = False


_NONE = Block(None)

scope = Scope("packed", _NONE)
within = scope.within

_READS_CONTEXT = Version(torch.__version__).release >= (2, 15)


def current() -> Documents | None:
    """The documents of the innermost block around this code."""
    if torch.compiler.is_dynamo_compiling():
        if scope.traced or not _READS_CONTEXT:
            return scope.current().documents
    elif not scope.open:
        return None
    elif not scope.here.get() and _is_of_autograd():
        return _of_backward()
    for entry in reversed(scope.here.get()):
        if not entry.is_over:
            return entry.value.documents
    return None


def _is_of_autograd() -> bool:
    """Whether this is one of autograd's threads for devices, which no Python code started."""
    return torch._C._current_graph_task_id() != -1 and isinstance(
        threading.current_thread(), threading._DummyThread
    )


def _of_backward() -> Documents | None:
    """In a thread of autograd, which runs activations again that are checkpointed."""
    documents = scope.open[-1].value.documents
    if any(entry.value.documents is not documents for entry in scope.open):
        raise RuntimeError(
            "packed: expected one block at a time while checkpointed activations are computed "
            "again in a thread of autograd, which does not know whose they are, but other "
            "documents are in a block, too"
        )
    return documents


def check_no_documents() -> None:
    """Of a function that writes masks: ValueError where its caller keeps no documents apart.

    Ours do, and call it without documents.
    """
    if (documents := current()) is None:
        return
    who = "a function" if torch.compiler.is_compiling() else _caller()
    raise ValueError(
        f"{documents.function}: expected masks by the create functions that install() puts into "
        f"transformers, which keep documents apart, but {who} makes one without documents: it "
        "calls a create function that it got before install(), or writes a mask itself. Call "
        "attn_mask.install() before create functions are wrapped or kept"
    )


_BETWEEN = ("attn_mask.", "transformers.masking_utils", "transformers.utils.")


def _caller() -> str:
    """The function that called one of transformers' masking_utils, or of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if not module.startswith(_BETWEEN):
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "a function"


def is_within() -> bool:
    """Whether this code is in a block."""
    return bool(scope.values())


def calls() -> list[Block]:
    """The calls of models around this code, the outermost first."""
    return [block for block in scope.values() if block.is_call]


_WITHOUT = (Entry(_NONE),)


class _Without:
    """No documents, for as little time as may be: a step of decoding has it once for each mask."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = scope.here.set(_WITHOUT)

    def __exit__(self, *error: object) -> None:
        scope.here.reset(self._token)


def without() -> Any:
    """A context manager in which no documents hold, since what is called keeps them apart."""
    return within(_NONE) if torch.compiler.is_dynamo_compiling() else _Without()
