"""What type checkers are told of mask functions: when None comes back.

Types alone, so that the functions keep upstream's signatures.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, overload

import torch


class _SdpaMask(Protocol):
    __name__: str

    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        *,
        allow_is_causal_skip: Literal[False],
        allow_is_bidirectional_skip: Literal[False] = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        unmask_unattended: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        *,
        unmask_unattended: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None: ...


class _EagerMask(Protocol):
    __name__: str

    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        allow_is_bidirectional_skip: Literal[False] = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        *,
        unmask_unattended: bool = False,
        masked_value: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = ...,
        attention_mask: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        *,
        unmask_unattended: bool = False,
        masked_value: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None: ...


def as_sdpa_mask(function: Any) -> _SdpaMask:
    """The function itself, which gives None only where a skip is allowed."""
    mask: _SdpaMask = function
    return mask


def as_eager_mask(function: Any) -> _EagerMask:
    """The function itself, which gives None only where a skip is allowed."""
    mask: _EagerMask = function
    return mask
