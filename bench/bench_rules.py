"""Times sdpa_mask and eager_mask of masking_utils: ours, transformers' and torch.full, in turn."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attn_mask import masking_utils as ours
from bench_legacy import FRESH, REUSED, allocate, environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from torch.utils.benchmark import Timer
from transformers import masking_utils as upstream

BATCH, LENGTH = 4, 2048

PADDING = torch.ones(BATCH, LENGTH, dtype=torch.bool)
PADDING[:, :100] = False
DOCUMENTS = (torch.arange(LENGTH) // 300).expand(BATCH, -1).contiguous()
POSITIONS = (torch.arange(LENGTH) % 300).expand(BATCH, -1).contiguous()
IMAGES = torch.full((BATCH, LENGTH), -1)
IMAGES[:, 100:300] = 0
IMAGES[:, 700:800] = 1
LEFT_PADDING = torch.full((BATCH,), 100)

# Each written once and evaluated with either side's module.
RULES: dict[str, Callable[[Any], Any]] = {
    "causal": lambda m: m.causal_mask_function,
    "window 512": lambda m: m.sliding_window_causal_mask_function(512),
    "chunks of 512": lambda m: m.chunked_causal_mask_function(512, LEFT_PADDING),
    "packed": lambda m: m.and_masks(
        m.packed_sequence_mask_function(DOCUMENTS),
        m.remap_positions_for_packed_sequence(m.causal_mask_function, POSITIONS),
    ),
    "images in text": lambda m: m.or_masks(m.causal_mask_function, m.blockwise_overlay(IMAGES)),
}


@dataclass(frozen=True)
class Case:
    name: str
    function: str  # sdpa_mask or eager_mask
    rule: str
    q_length: int
    kv_length: int
    batch_size: int
    padding: torch.Tensor | None

    def call(self, module: Any) -> Callable[[], torch.Tensor]:
        function = getattr(module, self.function)
        arguments = {
            "batch_size": self.batch_size,
            "q_length": self.q_length,
            "kv_length": self.kv_length,
            "q_offset": self.kv_length - self.q_length,
            "mask_function": RULES[self.rule](module),
            "attention_mask": self.padding,
            "allow_is_causal_skip": False,
        }
        return lambda: function(**arguments)


def cases() -> list[tuple[Case, str]]:
    found = [
        (Case(f"{rule}, padded", function, rule, LENGTH, LENGTH, BATCH, PADDING), memory)
        for memory in (FRESH, REUSED)
        for function in ("sdpa_mask", "eager_mask")
        for rule in RULES
    ]
    for batch_size, kv_length in ((1, 128), (8, 4096)):
        ones = torch.ones(batch_size, kv_length, dtype=torch.bool)
        padded = ones.clone()
        padded[:, :5] = False
        for name, padding in (("no mask", None), ("ones", ones), ("padded", padded)):
            for function in ("sdpa_mask", "eager_mask"):
                title = f"decode {batch_size} x {kv_length}, {name}"
                case = Case(title, function, "causal", 1, kv_length, batch_size, padding)
                found.append((case, REUSED))
    return found


def time_case(case: Case, memory: str, rounds: int) -> dict[str, float]:
    """Checks the masks bitwise, then times the sides in turn; medians in seconds."""
    allocate(memory)
    sides = {"attn_mask": case.call(ours), "transformers": case.call(upstream)}
    got, want = (call() for call in sides.values())
    bits = {1: torch.uint8, 4: torch.int32}[want.element_size()]
    if got.dtype != want.dtype or not torch.equal(got.view(bits), want.view(bits)):
        raise SystemExit(f"{case.function}, {case.name}: the masks differ")
    shape, dtype = tuple(want.shape), want.dtype
    sides["torch.full"] = lambda: torch.full(shape, True, dtype=dtype)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[side].append(timer.blocked_autorange(min_run_time=0.05).median)
    return {side: median(values) for side, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side gets its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    console = wide_console()
    about = environment()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    table = Table("case", "memory", "attn_mask", "transformers", "torch.full", "of torch.full")
    for column in ("times as fast", "target"):
        table.add_column(column, justify="right")
    report = []
    for case, memory in cases():
        seconds = time_case(case, memory, options.rounds)
        of_full = seconds["attn_mask"] / seconds["torch.full"]
        faster = seconds["transformers"] / seconds["attn_mask"]
        if case.q_length == 1:  # at most 15 us more than the write
            passed = seconds["attn_mask"] - seconds["torch.full"] <= 15e-6
        else:
            passed = of_full <= 1.15 and faster >= 5
        name = f"{case.function}, {case.name}"
        texts = (time_text(seconds[side]) for side in ("attn_mask", "transformers", "torch.full"))
        table.add_row(name, memory, *texts, f"{of_full:.2f}", f"{faster:.1f}", verdict(passed))
        report.append({"name": name, "memory": memory, "seconds": seconds, "passed": passed})
    console.print(table)
    missed = sum(not row["passed"] for row in report)
    console.print(f"{len(report)} cases, all masks bitwise equal; {missed} targets missed")
    if options.json:
        options.json.write_text(json.dumps(about | {"cases": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
