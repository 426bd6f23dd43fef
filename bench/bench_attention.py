"""Times attention by a rule beside torch's: with a dense mask, causal, and flex attention compiled.

All are called in turn in one run, after their results have been compared.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import attn_mask
import torch
from attn_mask import causal, documents, scaled_dot_product_attention, sliding_window
from attn_mask.rules import MaskFunction
from bench_legacy import environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

HEADS, WIDTH, LENGTH = 4, 64, 8192


def rules_of(length: int) -> dict[str, MaskFunction]:
    return {
        "window 1024": causal() & sliding_window(1024),
        "16 documents": causal() & documents(torch.arange(length) // (length // 16)),
    }


# How many times as fast as SDPA with a dense mask, and as with is_causal.
WANTED = {
    ("window 1024", torch.float32): (5.5, 2.1),
    ("16 documents", torch.float32): (14, 5.5),
    ("window 1024", torch.bfloat16): (5, 1.7),
    ("16 documents", torch.bfloat16): (16, 5.5),
}


def inputs(q_length: int, kv_length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    lengths = q_length, kv_length, kv_length
    return [torch.randn(1, HEADS, length, WIDTH, dtype=dtype) for length in lengths]


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
    return {name: median(of) for name, of in seconds.items()}


def compare(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    tolerance = 2e-2 if got.dtype == torch.bfloat16 else 2e-5
    distance = float((got.float() - want.float()).abs().max())
    assert distance <= tolerance, f"{name}: results are {distance} apart"


def sdpa(tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*tensors, **options)


def forward(name: str, dtype: torch.dtype, rounds: int, with_flex: bool) -> dict[str, Any]:
    tensors = inputs(LENGTH, LENGTH, dtype)
    rule = rules_of(LENGTH)[name]
    mask = attn_mask.boolean(rule, 1, LENGTH, LENGTH)
    calls: dict[str, Callable[[], Any]] = {
        "ours": partial(scaled_dot_product_attention, *tensors, rule),
        "dense mask": partial(sdpa, tensors, attn_mask=mask),
        "is_causal": partial(sdpa, tensors, is_causal=True),
    }
    want = calls["dense mask"]()
    compare(calls["ours"](), want, name)
    row: dict[str, Any] = {"case": name, "dtype": str(dtype), "wanted": WANTED[name, dtype]}
    if with_flex:
        torch._dynamo.reset()
        blocks = attn_mask.create_block_mask(rule, 1, 1, LENGTH, LENGTH, device="cpu")
        calls["flex"] = partial(torch.compile(flex_attention), *tensors, block_mask=blocks)
        start = perf_counter()
        compare(calls["flex"](), want, "flex")
        row["flex, first call"] = perf_counter() - start
    return row | in_turn(calls, rounds)


def gradients(name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Forward and backward."""
    tensors = [tensor.requires_grad_() for tensor in inputs(LENGTH, LENGTH, dtype)]
    rule = rules_of(LENGTH)[name]
    low = attn_mask.additive(rule, 1, LENGTH, LENGTH, dtype=dtype)

    def of(call: Callable[[], torch.Tensor]) -> Any:
        return torch.autograd.grad(call().sum(), tensors)

    calls = {
        "ours": partial(of, partial(scaled_dot_product_attention, *tensors, rule)),
        "dense mask": partial(of, partial(sdpa, tensors, attn_mask=low)),
        "is_causal": partial(of, partial(sdpa, tensors, is_causal=True)),
    }
    case = {"case": name + ", with gradients", "dtype": str(dtype)}
    return case | in_turn(calls, rounds)


def short(name: str, q_length: int, kv_length: int, rounds: int) -> dict[str, Any]:
    """What one call costs more than torch's; microseconds count here."""
    tensors = inputs(q_length, kv_length, torch.float32)
    calls = {
        "ours": partial(scaled_dot_product_attention, *tensors, causal()),
        "torch": partial(sdpa, tensors, is_causal=q_length > 1),
    }
    assert torch.equal(calls["ours"](), calls["torch"]())
    return {"case": name, "wanted": 10e-6} | in_turn(calls, 200 * rounds)


def doubling(rounds: int) -> dict[str, Any]:
    """The time of twice the length under a window."""
    rule = rules_of(LENGTH)["window 1024"]
    calls = {}
    for length in (LENGTH, 2 * LENGTH):
        tensors = inputs(length, length, torch.float32)
        calls[str(length)] = partial(scaled_dot_product_attention, *tensors, rule)
    return {"case": "twice the length", "wanted": 2.2} | in_turn(calls, rounds)


def status(field: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory() -> float:
    """Peak memory of forward and backward beyond the inputs, 64k tokens, in sizes of the query."""
    rule = rules_of(LENGTH)["window 1024"]

    def run(length: int) -> float:
        tensors = [tensor.requires_grad_() for tensor in inputs(length, length, torch.bfloat16)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what there is now
        before = status("VmRSS:")
        scaled_dot_product_attention(*tensors, rule).sum().backward()
        return (status("VmHWM:") - before) / tensors[0].nbytes

    run(1500)
    return run(65536)


def show(results: dict[str, Any]) -> None:
    table = Table(title=f"attention, {HEADS} heads of {WIDTH}, {LENGTH} tokens")
    for column in ("case", "dtype", "ours", "dense mask", "is_causal", "flex", "ratios", "goal"):
        table.add_column(column)
    for row in results["forward"] + results["gradients"]:
        ratios = [row[peer] / row["ours"] for peer in ("dense mask", "is_causal")]
        wanted = row.get("wanted")
        table.add_row(
            row["case"],
            row["dtype"].removeprefix("torch."),
            *(time_text(row[key]) if key in row else "" for key in ("ours", "dense mask")),
            *(time_text(row[key]) if key in row else "" for key in ("is_causal", "flex")),
            " ".join(f"{ratio:.1f}" for ratio in ratios),
            verdict(all(map(float.__ge__, ratios, map(float, wanted)))) if wanted else "",
        )
    console = wide_console()
    console.print(table)
    for row in results["short"]:
        console.print(f"{row['case']}: {1e6 * (row['ours'] - row['torch']):.1f} us more than torch")
    first, second = (results["doubling"][str(length)] for length in (LENGTH, 2 * LENGTH))
    console.print(f"twice the length: {second / first:.2f} times as long (goal: 2.2)")
    console.print(f"64k tokens: {results['memory']:.1f} times the query (goal: 12)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-flex", action="store_true", help="flex attention takes a minute")
    parser.add_argument("--memory", action="store_true", help="only that, in this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(memory())
        return
    command = [sys.executable, __file__, "--memory", "--threads", str(options.threads)]
    results = {
        "environment": environment(),
        "forward": [forward(*case, options.rounds, not options.no_flex) for case in WANTED],
        "gradients": [gradients(*case, min(options.rounds, 3)) for case in WANTED],
        "short": [
            short("128 tokens", 128, 128, options.rounds),
            short("decode", 1, 512, options.rounds),
        ],
        "doubling": doubling(options.rounds),
        "memory": float(subprocess.run(command, capture_output=True, check=True).stdout),
    }
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
