"""What functions require of their arguments before anything else looks at them."""

from typing import Any

import torch

__all__ = ["check_strided"]


def check_strided(function: str, argument: str, tensor: Any) -> None:
    """Raises TypeError for what is no tensor, and for nested and sparse tensors.

    Torch's own errors for those come from inside whatever happens to look at them first.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{function}: expected {argument} to be a tensor, but got {type(tensor).__name__}"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{function}: expected {argument} to be a strided tensor, but got {kind}")
