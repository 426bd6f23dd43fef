"""What rules say of their own looks."""

from collections.abc import Callable
from typing import Any


class Pictured:
    # The module that draws stands upon rules, so the package tells how it is loaded.
    drawing: Callable[[], Any]

    def show(self, q_length: int | None = None, kv_length: int | None = None, **how: Any) -> str:
        """``attn_mask.show`` of this rule, and of ``batch``, ``head``, ``tokens``, ``style``."""
        text: str = Pictured.drawing().show(self, q_length, kv_length, **how)
        return text

    def _repr_html_(self) -> str:
        text: str = Pictured.drawing().html_of(self)
        return text
