"""Where C++ builds find this installation (after torch.utils.cmake_prefix_path)."""

from pathlib import Path

__all__ = ["cmake_prefix_path", "include_path", "library_path"]

_package = Path(__file__).parent

cmake_prefix_path: str = str(_package / "share" / "cmake")
"""For CMAKE_PREFIX_PATH, so that ``find_package(attn_mask CONFIG)`` succeeds."""

include_path: str = str(_package / "include")
"""Holds ``attn_mask/attn_mask.h``."""

library_path: str = str(_package / "lib")
"""Holds ``libattn_mask.so`` and, where CUDA was built, ``libattn_mask_cuda.so``."""
