"""The rules: mask functions as objects, which can be called and written as masks."""

from typing import TYPE_CHECKING

from attn_mask._core import mask_function, mask_rules
from attn_mask._core.mask_rules import *  # noqa: F403
from attn_mask._core.mask_rules import FAR as FAR
from attn_mask._core.mask_rules import ID_DTYPES as ID_DTYPES
from attn_mask._core.mask_rules import Bits as Bits
from attn_mask._core.mask_rules import Blockwise as Blockwise
from attn_mask._core.mask_rules import Chunked as Chunked
from attn_mask._core.mask_rules import Coverage as Coverage
from attn_mask._core.mask_rules import Documents as Documents
from attn_mask._core.mask_rules import Function as Function
from attn_mask._core.mask_rules import Padding as Padding
from attn_mask._core.mask_rules import Reindex as Reindex
from attn_mask._core.mask_rules import Shift as Shift
from attn_mask._core.mask_rules import Window as Window
from attn_mask._core.mask_rules import __all__ as __all__
from attn_mask._core.mask_rules import rule_of as rule_of

_DEFINED = mask_rules, mask_function
# A pickled rule names the module of its class: this one, wherever the class is defined.
for _value in [value for module in _DEFINED for value in vars(module).values()]:
    if isinstance(_value, type) and _value.__module__ in {module.__name__ for module in _DEFINED}:
        _value.__module__ = __name__

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Opcodes, and the classes of rules, which pickled rules name."""
        return getattr(next((one for one in _DEFINED if hasattr(one, name)), mask_rules), name)
