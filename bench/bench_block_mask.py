"""Times create_block_mask: ours, torch's compiled and torch's eager one, and its peak memory."""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import attn_mask
import torch
from attn_mask import rules
from bench_legacy import environment, time_text
from legacy_cases import verdict, wide_console
from peak_memory import peak, resident, restart_peak
from rich.table import Table
from torch.nn.attention import flex_attention
from torch.utils.benchmark import Timer

LENGTH = 32768
TENSORS = [name for name in flex_attention.BlockMask._TENSOR_ATTRS if not name.startswith("dq")]


def documents(length: int, count: int) -> torch.Tensor:
    return (torch.arange(length) * count // length)[None]


def images(length: int) -> torch.Tensor:
    ids = torch.full((1, length), -1)
    for number, first in enumerate(range(100, length - 576, 1500)):
        ids[0, first : first + 576] = number
    return ids


@dataclass(frozen=True)
class Case:
    name: str
    length: int
    rule: Callable[[int], Any]
    mask_mod: Callable[[int], Any] | None = None
    """The same for torch; None where a dense index would be too large."""
    at_most: float | None = None
    """Seconds."""
    is_measured: bool = True
    """Whether to be faster than torch, by how much, and with how little memory are targets."""

    def call(self) -> Callable[[], Any]:
        rule, compact = self.rule(self.length), self.mask_mod is None
        sizes = 1, 1, self.length, self.length
        return lambda: attn_mask.create_block_mask(rule, *sizes, device="cpu", compact=compact)


def causal_documents(length: int) -> Any:
    ids = documents(length, 32)[0]
    return lambda b, h, q, k: (k <= q) & (ids[q] == ids[k])


def causal_images(length: int) -> Any:
    ids = images(length)[0]
    return lambda b, h, q, k: (k <= q) | ((ids[q] == ids[k]) & (ids[q] >= 0))


def window(length: int) -> Any:
    return rules.causal() & rules.sliding_window(4096)


def packed(length: int) -> Any:
    """Documents of 4096 tokens."""
    return rules.causal() & rules.documents(documents(length, length // 4096))


CASES = (
    Case("32k, causal", LENGTH, lambda n: rules.causal(), lambda n: lambda b, h, q, k: k <= q),
    Case(
        "32k, window 4096",
        LENGTH,
        window,
        lambda n: lambda b, h, q, k: (k <= q) & (k > q - 4096),
    ),
    Case(
        "32k, 32 documents",
        LENGTH,
        lambda n: rules.causal() & rules.documents(documents(n, 32)),
        causal_documents,
    ),
    Case(
        "32k, causal with images",
        LENGTH,
        lambda n: rules.causal() | rules.blockwise(images(n)),
        causal_images,
        5e-3,
        is_measured=False,
    ),
    Case("1M, window 4096, compact", 2**20, window, at_most=5e-3),
    Case("262k, 64 documents, compact", 2**18, packed, at_most=5e-3),
)
# Twice the length of a case of the same rule.
DOUBLED = {
    "512k, window 4096, compact": Case("1M, window 4096, compact", 2**20, window),
    "262k, 64 documents, compact": Case("512k, 128 documents, compact", 2**19, packed),
}
HALVES = {
    "512k, window 4096, compact": Case("512k, window 4096, compact", 2**19, window),
    "262k, 64 documents, compact": CASES[-1],
}
BY_NAME = {case.name: case for case in CASES}

# The first forward pass of a model, in a process of its own.
FIRST_FORWARD = """
import sys, time, torch, transformers
if sys.argv[1] == "attn_mask":
    import attn_mask
    attn_mask.install()
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=99, attn_implementation="flex_attention",
)
model = transformers.LlamaForCausalLM(config).eval()
tokens = torch.arange(300)[None] % 99
start = time.perf_counter()
with torch.no_grad():
    model(tokens)
print(time.perf_counter() - start)
"""


def check(got: Any, want: Any, name: str) -> None:
    for tensor in TENSORS:
        if not torch.equal(getattr(got, tensor), getattr(want, tensor)):
            raise SystemExit(f"{name}: {tensor} differs")


def time_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[side].append(timer.blocked_autorange(min_run_time=0.05).median)
    return {side: median(values) for side, values in times.items()}


def time_case(case: Case, rounds: int, eager: bool) -> dict[str, float]:
    """Checks the tensors bitwise, then times the sides in turn; medians in seconds."""
    calls = {"attn_mask": case.call()}
    if case.mask_mod is None:
        return time_in_turn(calls, rounds)
    mask_mod, sizes = case.mask_mod(case.length), (1, 1, case.length, case.length)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention.create_block_mask)
    calls["compiled"] = lambda: compiled(mask_mod, *sizes, device="cpu")
    start = time.perf_counter()
    want = calls["compiled"]()
    first = time.perf_counter() - start
    check(calls["attn_mask"](), want, case.name)
    seconds = time_in_turn(calls, rounds) | {"compiled, first": first}
    if eager:
        start = time.perf_counter()
        want = flex_attention.create_block_mask(mask_mod, *sizes, device="cpu")
        seconds["eager"] = time.perf_counter() - start
        check(calls["attn_mask"](), want, case.name)
    return seconds


def measure(name: str) -> int:
    """Bytes by which this process grows at most while the block mask is made."""
    case = BY_NAME[name]
    attn_mask.create_block_mask(case.rule(1024), 1, 1, 1024, 1024, device="cpu")
    call = case.call()
    gc.collect()
    restart_peak()
    before = resident()
    call()
    return peak() - before


def in_a_process(*arguments: str) -> float:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def row_of(case: Case, rounds: int, eager: bool) -> dict[str, Any]:
    seconds = time_case(case, rounds, eager)
    peak_bytes = int(in_a_process(__file__, "--measure", case.name))
    ours = seconds["attn_mask"]
    wanted = []
    if case.at_most is not None:
        wanted.append((f"{time_text(case.at_most)}", ours <= case.at_most))
    elif case.mask_mod is not None:
        wanted.append(("1000 x compiled", seconds["compiled"] >= 1000 * ours))
        if eager:
            wanted.append(("20000 x eager", seconds["eager"] >= 20000 * ours))
    if case.mask_mod is not None and case.is_measured:
        wanted.append(("16 MB", peak_bytes < 16e6))
    return {
        "name": case.name,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "wanted": ", ".join(text for text, _ in wanted),
        "passed": all(met for _, met in wanted),
    }


def doubled_row(name: str, rounds: int) -> dict[str, Any]:
    half, whole = HALVES[name], DOUBLED[name]
    seconds = time_in_turn({"half": half.call(), "attn_mask": whole.call()}, rounds)
    return {
        "name": f"{whole.name}: {seconds['attn_mask'] / seconds['half']:.2f} x {half.name}",
        "seconds": {"attn_mask": seconds["attn_mask"]},
        "wanted": "2.2 x",
        "passed": seconds["attn_mask"] <= 2.2 * seconds["half"],
    }


def first_forward_row() -> dict[str, Any]:
    seconds = {side: in_a_process("-c", FIRST_FORWARD, side) for side in ("attn_mask", "stock")}
    return {
        "name": "first forward pass of a small Llama (torch's: without install())",
        "seconds": {"attn_mask": seconds["attn_mask"], "compiled, first": seconds["stock"]},
        "wanted": "",
        "passed": seconds["attn_mask"] <= seconds["stock"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each side gets its turn")
    parser.add_argument("--no-eager", action="store_true", help="it takes 11 GB and 15 s a case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure))
        return
    console = wide_console()
    about = environment()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    report = [row_of(case, options.rounds, not options.no_eager) for case in CASES]
    report += [doubled_row(name, options.rounds) for name in HALVES]
    report.append(first_forward_row())
    sides = ("attn_mask", "compiled", "eager", "compiled, first")
    table = Table("case", *sides, "x compiled", "x eager", "peak", "wanted", "target")
    for row in report:
        seconds = row["seconds"]
        ours = seconds["attn_mask"]
        table.add_row(
            row["name"],
            *(time_text(seconds[side]) if side in seconds else "" for side in sides),
            *(f"{seconds[s] / ours:.0f}" if s in seconds else "" for s in ("compiled", "eager")),
            f"{row['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in row else "",
            row["wanted"],
            verdict(row["passed"]),
        )
    console.print(table)
    missed = sum(not row["passed"] for row in report)
    console.print(f"{len(report)} cases, all tensors equal; {missed} targets missed")
    if options.json:
        options.json.write_text(json.dumps(about | {"cases": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
