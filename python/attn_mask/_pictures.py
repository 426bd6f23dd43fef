"""What rules say of their own looks; the modules that draw are loaded when something is drawn."""

from importlib import import_module
from typing import Any


class Pictured:
    def show(self, q_length: int | None = None, kv_length: int | None = None, **how: Any) -> str:
        """``attn_mask.show`` of this rule, and of ``batch``, ``head``, ``tokens``, ``style``."""
        text: str = import_module("attn_mask._show").show(self, q_length, kv_length, **how)
        return text

    def _repr_html_(self) -> str:
        text: str = import_module("attn_mask._show").html_of(self)
        return text
