"""Attention masks as native PyTorch operators.

Importing this package registers the operators ``torch.ops.attn_mask.*``.
"""

from importlib.metadata import version as _version

from attn_mask import _library
from attn_mask import masking_utils as masking_utils
from attn_mask import modeling_attn_mask_utils as modeling_attn_mask_utils
from attn_mask import rules as rules
from attn_mask import utils as utils
from attn_mask._releases import for_transformers as for_transformers

__all__ = [
    "__version__",
    "build_info",
    "for_transformers",
    "masking_utils",
    "modeling_attn_mask_utils",
    "rules",
    "utils",
]

__version__ = _version("attn-mask")
build_info = _library.build_info
