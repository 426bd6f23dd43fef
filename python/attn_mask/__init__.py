"""Attention masks as native PyTorch operators.

Importing this package registers the operators ``torch.ops.attn_mask.*``.
"""

from importlib.metadata import version as _version

from attn_mask import _graphs as _graphs
from attn_mask import _library
from attn_mask import _vmap as _vmap
from attn_mask import block_sparse as block_sparse
from attn_mask import masking_utils as masking_utils
from attn_mask import modeling_attn_mask_utils as modeling_attn_mask_utils
from attn_mask import rules as rules
from attn_mask import utils as utils
from attn_mask._aten_only import aten_only as aten_only
from attn_mask._decompositions import decompositions as decompositions
from attn_mask._install import install as install
from attn_mask._install import installed as installed
from attn_mask._install import is_installed as is_installed
from attn_mask._install import uninstall as uninstall
from attn_mask._releases import for_transformers as for_transformers
from attn_mask._sdpa import SdpaArguments as SdpaArguments
from attn_mask._sdpa import sdpa_arguments as sdpa_arguments
from attn_mask._skipping import skip_policy as skip_policy
from attn_mask.block_mask import block_mask_to as block_mask_to
from attn_mask.block_mask import create_block_mask as create_block_mask

__all__ = [
    "SdpaArguments",
    "__version__",
    "aten_only",
    "block_mask_to",
    "block_sparse",
    "build_info",
    "create_block_mask",
    "decompositions",
    "for_transformers",
    "install",
    "installed",
    "is_installed",
    "masking_utils",
    "modeling_attn_mask_utils",
    "rules",
    "sdpa_arguments",
    "skip_policy",
    "uninstall",
    "utils",
]

__version__ = _version("attn-mask")
build_info = _library.build_info
