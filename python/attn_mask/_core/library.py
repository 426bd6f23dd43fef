"""Loads the compiled libraries: the operators first, then the module with direct calls to them."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from attn_mask._built_for import TORCH_VERSION, VERSION
from attn_mask._core.log_once import warn_once

_LIBRARIES = Path(__file__).parents[1] / "lib"

__all__ = ["UNMASKED_DEVICES", "VERSION", "_C", "build_info", "operators_that"]

# Another torch has other symbols: an error here is clearer than the linker's.
if torch.__version__ != TORCH_VERSION:
    raise ImportError(
        f"attn_mask was built for torch {TORCH_VERSION}, but torch {torch.__version__} is running. "
        "Build it again for this torch, in a checkout of attn_mask: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )

# A library in this process may have been linked with a copy of its own: operators can't be
# registered twice.
_came_with_another = hasattr(torch.ops.attn_mask, "to_4d")
if not _came_with_another:
    torch.ops.load_library(str(_LIBRARIES / "libattn_mask.so"))
from attn_mask import _C  # noqa: E402  (it calls the operators that are there by now)

if _came_with_another:
    try:
        _C.check_operators()
    except RuntimeError as error:
        raise ImportError(
            "attn_mask: expected the operators that another library has registered in this process "
            f"to be those of attn_mask {_C.build_info()['version']}, but they have other "
            "signatures: have both use the same attn_mask"
        ) from error


def _is_loaded(name: str) -> bool:
    """Whether the process has a library of this name, with which others can be linked."""
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


_cuda = _LIBRARIES / "libattn_mask_cuda.so"
if _cuda.exists() and not torch._C._dispatch_has_kernel_for_dispatch_key(
    "attn_mask::to_4d", "CUDA"
):
    if _is_loaded("libattn_mask.so"):
        torch.ops.load_library(str(_cuda))
    elif torch.cuda.is_available():
        # Linked with the name of ours, it would bring a second copy of the operators.
        warn_once(
            "no CUDA kernels",
            "attn_mask: the operators in this process come from a renamed copy of libattn_mask.so "
            "without CUDA kernels, and those of this package can't be added to it",
        )

# Where rows without a key are unmasked for scaled_dot_product_attention: else it gives NaN.
UNMASKED_DEVICES: tuple[str, ...] = _C.UNMASKED_DEVICES

_TRAITS = _C.operators()


def operators_that(**traits: bool) -> list[str]:
    """The names of the operators with these traits, which csrc/ops/core/schema.h describes::

    operators_that(writes_mask=True, takes_tensors=False)
    """
    return [name for name, of_one in _TRAITS.items() if traits.items() <= of_one.items()]


def build_info() -> dict[str, Any]:
    """What this installation was built from and for.

    Returns a dict: ``version``; ``torch_version``; ``cuda_version`` of the toolkit that compiled
    the CUDA kernels, or None without them; ``cuda_archs``, the GPUs they were compiled for (a list
    such as ``["8.0", "10.0+PTX"]``); ``cpu_capability``, the instruction set that the CPU kernels
    use in this process (``DEFAULT``, ``AVX2`` or ``AVX512``).

    >>> sorted(attn_mask.build_info())
    ['cpu_capability', 'cuda_archs', 'cuda_version', 'torch_version', 'version']
    """
    return {**_C.build_info(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
