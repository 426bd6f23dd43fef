"""Times rules over tables of positions of every shape, and trees of padding masks, in turn with
fill_, torch.full and torch's create_block_mask, which is given a plain function."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attn_mask
import torch
from attn_mask import rules
from bench_block_mask import check, time_in_turn
from bench_legacy import REUSED, allocate, environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from torch.nn.attention import flex_attention

DENSE, SHORT, LONG = 4096, 8192, 32768

# What the dense mask may take: times `fill_`, or times `torch.full`.
IN_ORDER: dict[str, Callable[[int], torch.Tensor]] = {
    "i": lambda n: torch.arange(n),
    "n - 1 - i": lambda n: torch.arange(n).flip(0),
    "i // 16": lambda n: torch.arange(n) // 16,
    "2 i": lambda n: 2 * torch.arange(n),
    "2^33 i": lambda n: torch.arange(n) << 33,
    "0": lambda n: torch.zeros(n, dtype=torch.int64),
}
OTHER: dict[str, Callable[[int], torch.Tensor]] = {
    "i % 7": lambda n: torch.arange(n) % 7,
    "i % 128": lambda n: torch.arange(n) % 128,
    "any order": torch.randperm,
}
RULES: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "causal": (rules.causal(), lambda q, k: k <= q),
    "window 512": (
        rules.causal() & rules.sliding_window(512),
        lambda q, k: (k <= q) & (q - k < 512),
    ),
}


def first_keys(n: int) -> torch.Tensor:
    return torch.arange(n)[None] < 4


def sink(n: int) -> tuple[Any, Callable[..., Any]]:
    shown = first_keys(n)
    rule = (rules.causal() & rules.sliding_window(1024)) | (rules.padding(shown) & rules.causal())
    return rule, lambda b, h, q, k: (k <= q) & ((q - k < 1024) | shown[0][k])


def prefix(n: int) -> tuple[Any, Callable[..., Any]]:
    shown = first_keys(n)
    return rules.causal() | rules.padding(shown), lambda b, h, q, k: (k <= q) | shown[0][k]


def user_function(n: int) -> tuple[Any, Callable[..., Any]]:
    def function(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ((q - k) % 3 != 1)

    return rules.causal() & function, function


def dense_row(name: str, rule: Any, limit: tuple[str, float], rounds: int) -> dict[str, Any]:
    n = DENSE
    out = torch.empty(1, 1, n, n, dtype=torch.bool)
    i = torch.arange(n)
    want = rule(i[:1], i[:1], i[:, None], i[None, :])
    if not torch.equal(attn_mask.boolean(rule, 1, n, n)[0, 0], want):
        raise SystemExit(f"{name}: the masks differ")
    calls = {
        "attn_mask": lambda: attn_mask.boolean(rule, 1, n, n, out=out),
        "fill_": lambda: out.fill_(True),
        "torch.full": lambda: torch.full((1, 1, n, n), True),
    }
    seconds = time_in_turn(calls, rounds)
    side, times = limit
    return {
        "name": f"{n} x {n}, {name}",
        "seconds": seconds,
        "wanted": f"{times} x {side}",
        "passed": seconds["attn_mask"] <= times * seconds[side],
    }


def block_row(
    name: str, n: int, rule: Any, mask_mod: Any, at_most: float | None, rounds: int
) -> dict[str, Any]:
    """Beside torch's eager function at the shorter length, where its mask fits into memory."""
    sizes = 1, 1, n, n
    calls = {"attn_mask": lambda: attn_mask.create_block_mask(rule, *sizes, "cpu")}
    if n == SHORT:
        calls["torch"] = lambda: flex_attention.create_block_mask(mask_mod, *sizes, "cpu")
        check(calls["attn_mask"](), calls["torch"](), name)
    seconds = time_in_turn(calls, rounds)
    ours = seconds["attn_mask"]
    wanted = "" if "torch" not in seconds else "torch"
    return {
        "name": f"BlockMask {n // 1024}k, {name}",
        "seconds": seconds,
        "wanted": wanted if at_most is None else time_text(at_most),
        "passed": ours <= (seconds.get("torch", ours) if at_most is None else at_most),
    }


def rows(rounds: int) -> list[dict[str, Any]]:
    report = []
    for tables, limit in ((IN_ORDER, ("fill_", 1.5)), (OTHER, ("torch.full", 3.0))):
        for of_table, make in tables.items():
            for of_rule, (rule, attends) in RULES.items():
                name = f"{of_rule} at {of_table}"
                report.append(dense_row(name, rules.reindex(rule, make(DENSE)), limit, rounds))
                for n in (SHORT, LONG):
                    table = make(n)

                    def mask_mod(
                        b: Any, h: Any, q: Any, k: Any, table: Any = table, attends: Any = attends
                    ) -> Any:
                        return attends(table[q], table[k])

                    at_most = 2e-3 if n == LONG and tables is IN_ORDER else None
                    moved = rules.reindex(rule, table)
                    report.append(block_row(name, n, moved, mask_mod, at_most, rounds))
    for name, make_tree in (("sink | window", sink), ("causal | prefix", prefix)):
        for n in (SHORT, LONG):
            at_most = 1e-3 if n == SHORT else None
            report.append(block_row(name, n, *make_tree(n), at_most, rounds))
    report.append(block_row("causal & function", SHORT, *user_function(SHORT), None, rounds))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side gets its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    allocate(REUSED)
    torch.manual_seed(0)
    console = wide_console()
    about = environment()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    report = rows(options.rounds)
    sides = ("attn_mask", "fill_", "torch.full", "torch")
    table = Table("case", *sides, "wanted", "target")
    for row in report:
        seconds = row["seconds"]
        texts = (time_text(seconds[side]) if side in seconds else "" for side in sides)
        table.add_row(row["name"], *texts, row["wanted"], verdict(row["passed"]))
    console.print(table)
    missed = sum(not row["passed"] for row in report)
    console.print(f"{len(report)} cases, all results equal; {missed} targets missed")
    if options.json:
        options.json.write_text(json.dumps(about | {"cases": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
