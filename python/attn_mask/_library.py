"""Loads the compiled libraries: the operators first, then the module with direct calls to them."""

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attn_mask import utils
from attn_mask._built_for import TORCH_VERSION

__all__ = ["_C", "build_info"]

# Another torch has other symbols: say so before the linker says it in its own words.
if torch.__version__ != TORCH_VERSION:
    raise ImportError(
        f"attn_mask was built for torch {TORCH_VERSION}, but torch {torch.__version__} is running. "
        "Build it again for this torch: pip install --no-build-isolation --force-reinstall "
        "--no-deps attn-mask (from a checkout: '.' in place of the name)."
    )

# A library in this process may have been linked with a copy of its own: operators can't be
# registered twice.
if not hasattr(torch.ops.attn_mask, "to_4d"):
    torch.ops.load_library(str(Path(utils.library_path) / "libattn_mask.so"))
_cuda = Path(utils.library_path) / "libattn_mask_cuda.so"
if _cuda.exists() and not torch._C._dispatch_has_kernel_for_dispatch_key(
    "attn_mask::to_4d", "CUDA"
):
    torch.ops.load_library(str(_cuda))

from attn_mask import _C  # noqa: E402  (it is linked with the library loaded above)


def _fake_factory(
    mode: FakeTensorMode, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Runs an operator without tensors under fake tensors.

    They know how to treat operators that can't have tensor arguments and return a Tensor, but not
    those that return an optional one, or several, or just were given none: shapes (or None) and
    errors come from the Meta kernel.
    """
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
        return mode.__torch_dispatch__(func, types, args, kwargs)
    result = func(*args, **{**kwargs, "device": torch.device("meta")})
    device = kwargs.get("device") or torch.device("cpu")
    with mode:
        return tree_map_only(
            torch.Tensor,
            lambda meta: torch.empty_strided(
                meta.shape, meta.stride(), dtype=meta.dtype, device=device
            ),
            result,
        )


for _name in (
    "to_causal_4d",
    "_create_4d_causal_attention_mask",
    "boolean",
    "additive",
    "block_mask",
    "_block_states",
):
    torch.library.register_torch_dispatch(f"attn_mask::{_name}", FakeTensorMode, _fake_factory)


def build_info() -> dict[str, Any]:
    """What this installation was built from and for.

    Returns a dict: ``version``; ``torch_version``; ``cuda_version`` of the toolkit that compiled
    the CUDA kernels, or None without them; ``cuda_archs``, the GPUs they were compiled for (a list
    such as ``["8.0", "10.0+PTX"]``); ``cpu_capability``, the instruction set that the CPU kernels
    use in this process (``DEFAULT``, ``AVX2`` or ``AVX512``).
    """
    return {**_C.build_info(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
