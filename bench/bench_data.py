"""Packing: the time of `attn_mask.data`, beside making tensors of the same sizes."""

import argparse
import json
import random
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attn_mask.data import pack, plan_rows
from bench_legacy import environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from torch.utils.benchmark import Timer


def seconds_of(statement: str, names: dict[str, Any], rounds: int) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return median(timer.timeit(1).median for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()

    draw = random.Random(0)
    lengths = [draw.randint(50, 1500) for _ in range(82)]
    while len(plan_rows(lengths, 16384)) > 4:
        lengths.pop()
    lists = [[draw.randrange(32000) for _ in range(length)] for length in lengths]
    tensors = [torch.tensor(tokens) for tokens in lists]
    many = [min(4096, max(1, int(draw.lognormvariate(6, 1)))) for _ in range(100_000)]
    rows = plan_rows(many, 4096)
    waste = 1 - sum(many) / (len(rows) * 4096)
    names = {**globals(), "lists": lists, "tensors": tensors, "many": many}
    cases = [
        ("pack, 4 x 16384, lists", "pack(lists, 16384)", 2e-3),
        ("pack, 4 x 16384, tensors", "pack(tensors, 16384)", 2e-3),
        ("four tensors of that size", "[torch.zeros(4, 16384, dtype=int) for _ in range(4)]", None),
        ("plan_rows, 100,000 lengths, rows of 4096", "plan_rows(many, 4096)", 1.0),
    ]
    assert pack(lists, 16384).input_ids.shape == (4, 16384)
    report: dict[str, Any] = {**environment(), "waste": waste, "cases": []}
    table = Table("case", "time", "wanted", "met")
    for name, statement, wanted in cases:
        seconds = seconds_of(statement, names, options.rounds)
        passed = wanted is None or seconds <= wanted
        table.add_row(
            name, time_text(seconds), "" if wanted is None else time_text(wanted), verdict(passed)
        )
        report["cases"].append(
            {"name": name, "seconds": seconds, "wanted": wanted, "passed": passed}
        )
    console = wide_console()
    console.print(table)
    console.print(f"of the tokens of 100,000 sequences' rows, {waste:.3%} are padding")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
