"""The rules: mask functions as objects, each of which can be called and written as a mask."""

from typing import TYPE_CHECKING

from attn_mask._core import mask_rules
from attn_mask._core.mask_rules import ALL as ALL
from attn_mask._core.mask_rules import AND as AND
from attn_mask._core.mask_rules import BITS as BITS
from attn_mask._core.mask_rules import BLOCKS as BLOCKS
from attn_mask._core.mask_rules import CAUSAL as CAUSAL
from attn_mask._core.mask_rules import CHUNK as CHUNK
from attn_mask._core.mask_rules import DOCUMENTS as DOCUMENTS
from attn_mask._core.mask_rules import FAR as FAR
from attn_mask._core.mask_rules import ID_DTYPES as ID_DTYPES
from attn_mask._core.mask_rules import NOTHING as NOTHING
from attn_mask._core.mask_rules import OR as OR
from attn_mask._core.mask_rules import PADDING as PADDING
from attn_mask._core.mask_rules import REINDEX as REINDEX
from attn_mask._core.mask_rules import SHIFT as SHIFT
from attn_mask._core.mask_rules import WINDOW as WINDOW
from attn_mask._core.mask_rules import Bidirectional as Bidirectional
from attn_mask._core.mask_rules import Bits as Bits
from attn_mask._core.mask_rules import Blockwise as Blockwise
from attn_mask._core.mask_rules import Chunked as Chunked
from attn_mask._core.mask_rules import Coverage as Coverage
from attn_mask._core.mask_rules import Documents as Documents
from attn_mask._core.mask_rules import Function as Function
from attn_mask._core.mask_rules import MaskFunction as MaskFunction
from attn_mask._core.mask_rules import Padding as Padding
from attn_mask._core.mask_rules import Reindex as Reindex
from attn_mask._core.mask_rules import Shift as Shift
from attn_mask._core.mask_rules import Window as Window
from attn_mask._core.mask_rules import bidirectional as bidirectional
from attn_mask._core.mask_rules import bits as bits
from attn_mask._core.mask_rules import blockwise as blockwise
from attn_mask._core.mask_rules import causal as causal
from attn_mask._core.mask_rules import chunked as chunked
from attn_mask._core.mask_rules import documents as documents
from attn_mask._core.mask_rules import function as function
from attn_mask._core.mask_rules import intersection as intersection
from attn_mask._core.mask_rules import nothing as nothing
from attn_mask._core.mask_rules import padding as padding
from attn_mask._core.mask_rules import reindex as reindex
from attn_mask._core.mask_rules import rule_of as rule_of
from attn_mask._core.mask_rules import shift as shift
from attn_mask._core.mask_rules import sliding_window as sliding_window
from attn_mask._core.mask_rules import union as union
from attn_mask._core.mask_rules import window as window

__all__ = [
    "MaskFunction",
    "bidirectional",
    "bits",
    "blockwise",
    "causal",
    "chunked",
    "documents",
    "function",
    "intersection",
    "nothing",
    "padding",
    "reindex",
    "shift",
    "sliding_window",
    "union",
    "window",
]

# A pickled rule names the module of its class, which must not depend on where it is defined.
for _value in list(vars(mask_rules).values()):
    if isinstance(_value, type) and _value.__module__ == mask_rules.__name__:
        _value.__module__ = __name__

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Classes without a public name, which pickled rules hold."""
        return getattr(mask_rules, name)
