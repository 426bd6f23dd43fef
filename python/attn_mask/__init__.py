"""Attention masks as native PyTorch operators.

Importing this package registers the operators ``torch.ops.attn_mask.*``. Modules that few need are
loaded when they are first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from attn_mask import _graph as _graph
from attn_mask import masking_utils as masking_utils
from attn_mask import modeling_attn_mask_utils as modeling_attn_mask_utils
from attn_mask import rules as rules
from attn_mask import utils as utils
from attn_mask._core import library as _library
from attn_mask._core.operators import aten_only as aten_only
from attn_mask._core.skipping import skip_policy as skip_policy
from attn_mask._graph.aten import decompositions as decompositions
from attn_mask._transformers.install import install as install
from attn_mask._transformers.install import installed as installed
from attn_mask._transformers.install import is_installed as is_installed
from attn_mask._transformers.install import register_attention as register_attention
from attn_mask._transformers.install import uninstall as uninstall
from attn_mask._transformers.packed import packed as packed
from attn_mask._transformers.releases import for_transformers as for_transformers
from attn_mask._transformers.sdpa_arguments import SdpaArguments as SdpaArguments
from attn_mask._transformers.sdpa_arguments import sdpa_arguments as sdpa_arguments
from attn_mask.attention import attention_plan as attention_plan
from attn_mask.attention import scaled_dot_product_attention as scaled_dot_product_attention
from attn_mask.block_mask import block_mask_to as block_mask_to
from attn_mask.block_mask import create_block_mask as create_block_mask
from attn_mask.masks import additive as additive
from attn_mask.masks import boolean as boolean
from attn_mask.rules import bidirectional as bidirectional
from attn_mask.rules import bits as bits
from attn_mask.rules import blockwise as blockwise
from attn_mask.rules import causal as causal
from attn_mask.rules import chunked as chunked
from attn_mask.rules import documents as documents
from attn_mask.rules import nothing as nothing
from attn_mask.rules import padding as padding
from attn_mask.rules import sliding_window as sliding_window
from attn_mask.rules import window as window

# The tiers of docs/api.md: first what most programs need.
__all__ = [  # noqa: RUF022
    "rules",
    "causal",
    "sliding_window",
    "documents",
    "padding",
    "boolean",
    "additive",
    "create_block_mask",
    "scaled_dot_product_attention",
    "sdpa_arguments",
    "install",
    "packed",
    "show",
    "Finding",
    "SdpaArguments",
    "__version__",
    "aten_only",
    "attention_plan",
    "bidirectional",
    "bits",
    "block_mask_to",
    "block_sparse",
    "blockwise",
    "build_info",
    "checked",
    "checking",
    "chunked",
    "data",
    "decompositions",
    "explain",
    "explain_model",
    "for_transformers",
    "installed",
    "is_installed",
    "masking_utils",
    "modeling_attn_mask_utils",
    "nothing",
    "plot",
    "profile",
    "profiling",
    "register_attention",
    "skip_policy",
    "status",
    "testing",
    "uninstall",
    "utils",
    "validate_mask",
    "validate_mask_properties",
    "window",
]

rules.MaskFunction.drawing = staticmethod(lambda: _import_module("attn_mask._tools.show"))

__version__ = _library.VERSION
build_info = _library.build_info

# Modules, and functions with the modules that define them.
_LOADED_WHEN_USED = {
    "Finding": "checking",
    "block_sparse": "block_sparse",
    "checked": "checking",
    "checking": "checking",
    "data": "data",
    "explain": "_tools.explain",
    "explain_model": "_transformers.explain_model",
    "plot": "_tools.plot",
    "profile": "profiling",
    "profiling": "profiling",
    "show": "_tools.show",
    "status": "_transformers.status",
    "testing": "testing",
    "validate_mask": "checking",
    "validate_mask_properties": "checking",
}

if TYPE_CHECKING:
    from attn_mask import block_sparse as block_sparse
    from attn_mask import checking as checking
    from attn_mask import data as data
    from attn_mask import profiling as profiling
    from attn_mask import testing as testing
    from attn_mask._tools.explain import explain as explain
    from attn_mask._tools.plot import plot as plot
    from attn_mask._tools.show import show as show
    from attn_mask._transformers.explain_model import explain_model as explain_model
    from attn_mask._transformers.status import status as status
    from attn_mask.checking import Finding as Finding
    from attn_mask.checking import checked as checked
    from attn_mask.checking import validate_mask as validate_mask
    from attn_mask.checking import validate_mask_properties as validate_mask_properties
    from attn_mask.profiling import profile as profile
else:

    def __getattr__(name: str) -> object:
        if name in _LOADED_WHEN_USED:
            module = _import_module(f"{__name__}.{_LOADED_WHEN_USED[name]}")
            return getattr(module, name, module)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LOADED_WHEN_USED})
