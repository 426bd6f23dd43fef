"""The part of bench_gpu.py about attention: by a rule, torch's flash kernel, flex attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import attn_mask
import torch
from attn_mask import causal, documents, scaled_dot_product_attention, sliding_window
from attn_mask.rules import MaskFunction
from bench_legacy import time_text
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

HEADS, WIDTH = 16, 128

InTurn = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]


def pairs_of(name: str, length: int) -> float:
    """How many pairs of a query and a key are visible."""
    if name == "causal":
        return length * (length + 1) / 2
    if name == "window 1024":
        return 1024 * length - 1024 * 1023 / 2
    return 16 * (length // 16) * (length // 16 + 1) / 2


def flash(*tensors: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*tensors, is_causal=True)


def one_case(
    name: str, rule: MaskFunction, length: int, device: torch.device, in_turn: InTurn
) -> dict[str, Any]:
    tensors = [
        torch.randn(1, HEADS, length, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(3)
    ]
    torch._dynamo.reset()
    blocks = attn_mask.create_block_mask(rule, 1, 1, length, length, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "ours": partial(scaled_dot_product_attention, *tensors, rule),
        "is_causal": partial(flash, *tensors),
        "flex": partial(torch.compile(flex_attention), *tensors, block_mask=blocks),
    }
    if length <= 8192:
        mask = attn_mask.boolean(rule, 1, length, length, device=device)
        calls["dense mask"] = partial(F.scaled_dot_product_attention, *tensors, mask)
    got, want = calls["ours"](), list(calls.values())[-1]()
    distance = float((got.float() - want.float()).abs().max())
    assert distance <= 2e-2, f"{name}: results are {distance} apart"
    learned = [tensor.clone().requires_grad_() for tensor in tensors]

    def gradients(call: Callable[..., torch.Tensor], *rule: Any) -> Any:
        return torch.autograd.grad(call(*learned, *rule).sum(), learned)

    of_gradients = {
        "ours": partial(gradients, scaled_dot_product_attention, rule),
        "is_causal": partial(gradients, flash),
    }
    return {
        "name": f"{name}, {length}",
        "seconds": in_turn(calls),
        "with_gradients": in_turn(of_gradients),
        "flops": 4 * pairs_of(name, length) * WIDTH * HEADS,
    }


def attention(
    device: torch.device, rounds: int, console: Console, in_turn: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Forward, and forward with backward, bfloat16."""
    report = []
    peers = "is_causal", "dense mask", "flex"
    table = Table("attention", "rule", "TFLOP/s", *peers, "with gradients", "is_causal's")
    for length in (8192, 32768):
        ids = torch.arange(length, device=device) // (length // 16)
        rules = {
            "causal": causal(),
            "window 1024": causal() & sliding_window(1024),
            "16 documents": causal() & documents(ids),
        }
        for name, rule in rules.items():
            row = one_case(name, rule, length, device, partial(in_turn, rounds=rounds))
            seconds, learned = row["seconds"], row["with_gradients"]
            table.add_row(
                row["name"],
                time_text(seconds["ours"]),
                f"{row['flops'] / seconds['ours'] / 1e12:.0f}",
                *(time_text(seconds[peer]) if peer in seconds else "" for peer in peers),
                *map(time_text, learned.values()),
            )
            report.append(row)
    console.print(table)
    return report
