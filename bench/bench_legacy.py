"""Times the legacy helpers: ours, transformers' and a yardstick (torch.full or x + 1), in turn."""

import argparse
import ctypes
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attn_mask
import torch
import transformers
from legacy_cases import (
    OURS,
    SIDES,
    UPSTREAM,
    YARDSTICK,
    Case,
    check,
    compiled_cases,
    decode_cases,
    default_dtype_for,
    ignore_cases,
    large_cases,
    out_cases,
    small_cases,
    unmask_cases,
    verdict,
    wide_console,
)
from rich.progress import track
from rich.table import Table
from torch.utils.benchmark import Measurement, Timer

FRESH, REUSED = "fresh", "reused"


@dataclass(frozen=True)
class Result:
    case: Case
    memory: str
    seconds: dict[str, float]  # the median of each side

    @property
    def times_yardstick(self) -> float:
        return self.seconds[OURS] / self.seconds[YARDSTICK]

    @property
    def times_as_fast(self) -> float:
        return self.seconds[UPSTREAM] / self.seconds[OURS]

    @property
    def yardstick_times_as_fast(self) -> float:
        """What filling the same memory, and nothing else, would gain over transformers."""
        return self.seconds[UPSTREAM] / self.seconds[YARDSTICK]

    @property
    def gb_per_s(self) -> float:
        return self.case.moved_bytes / self.seconds[OURS] / 1e9

    @property
    def passed(self) -> bool:
        case = self.case
        at_most = case.at_most * self.seconds[YARDSTICK] + case.plus
        return self.seconds[OURS] <= at_most and self.times_as_fast >= case.at_least

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "name": case.name,
            "group": case.group,
            "memory": self.memory,
            "batch_q_kv": [case.batch, case.q, case.kv],
            "dtype": str(case.dtype),
            "expressions": {side: case.expression(side) for side in SIDES},
            "median_seconds": self.seconds,
            "moved_bytes": case.moved_bytes,
            "gb_per_s": self.gb_per_s,
            "times_yardstick": self.times_yardstick,
            "times_yardstick_at_most": case.at_most,
            "plus_seconds": case.plus,
            "yardstick": case.yardstick_name,
            "times_as_fast": self.times_as_fast,
            "yardstick_times_as_fast": self.yardstick_times_as_fast,
            "times_as_fast_at_least": case.at_least,
            "passed": self.passed,
        }


def allocate(memory: str) -> None:
    """Makes large results come from fresh pages each time, or from memory that was used before.

    Left alone, the C library changes from one to the other with what was freed before: then a side
    is at random ten times as fast, a page fault costing more than writing the page.
    """
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_threshold, 2**17)
    mallopt(m_mmap_max, 2**16 if memory == FRESH else 0)
    mallopt(m_trim_threshold, 2**17 if memory == FRESH else -1)


def time_case(case: Case, memory: str, rounds: int, min_run_time: float) -> Result:
    """Checks the result bitwise, then times the sides in turn, `rounds` times over."""
    allocate(memory)
    with default_dtype_for(case):
        check(case)
        timers = [
            Timer(
                case.expression(side),
                globals=case.namespace(side),
                num_threads=torch.get_num_threads(),
                description=side,
            )
            for side in SIDES
        ]
        runs = [
            timer.blocked_autorange(min_run_time=min_run_time)
            for _ in range(rounds)
            for timer in timers
        ]
    merged = Measurement.merge(runs)
    return Result(case, memory, {run.task_spec.description: run.median for run in merged})


def environment() -> dict[str, Any]:
    return {
        "device": "cpu",
        "cpu_model": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attn_mask": attn_mask.build_info(),
        "commit": commit(),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = Path(__file__).parent
    try:
        return (
            subprocess.check_output(command, cwd=here, stderr=subprocess.DEVNULL).decode().strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} µs"


def table_of(results: list[Result]) -> Table:
    case = results[0].case
    title = f"{case.group}, {results[0].memory} memory"
    table = Table("case", title=title, title_justify="left")
    for column in (OURS, UPSTREAM, case.yardstick_name, "GB/s"):
        table.add_column(column, justify="right")
    table.add_column(f"of {case.yardstick_name} (≤ {case.at_most})", justify="right")
    faster = "times as fast" + (f" (≥ {case.at_least:g})" if case.at_least else "")
    table.add_column(faster, justify="right")
    table.add_column(f"{case.yardstick_name} is", justify="right")
    table.add_column("target")
    for result in results:
        table.add_row(
            result.case.title,
            *(time_text(result.seconds[side]) for side in SIDES),
            f"{result.gb_per_s:.2f}",
            f"{result.times_yardstick:.2f}",
            f"{result.times_as_fast:.1f}",
            f"{result.yardstick_times_as_fast:.1f}",
            verdict(result.passed),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer dtypes and rounds")
    parser.add_argument("--rounds", type=int, help="how often each side gets its turn")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--only", default="", help="the cases whose group or name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 9)
    min_run_time = 0.05 if options.quick else 0.2
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    large = large_cases(dtypes[: 2 if options.quick else 4])
    chosen_dtypes = dtypes[: 2 if options.quick else 4]
    groups = (
        (large, FRESH),
        (out_cases(chosen_dtypes), FRESH),  # what is made beside `out`, upstream's masks, is new
        (compiled_cases(), FRESH),
        (unmask_cases(chosen_dtypes), FRESH),
        (ignore_cases(), REUSED),
        (decode_cases(), REUSED),
        (small_cases(), REUSED),
    )

    console = wide_console()
    about = environment()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    results = []
    for group, memory in groups:
        chosen = [case for case in group if options.only in f"{case.group} {case.name}"]
        shown = track(
            chosen, f"{group[0].group}, {memory}", console=console, disable=not console.is_terminal
        )
        found = [time_case(case, memory, rounds, min_run_time) for case in shown]
        if found:
            console.print(table_of(found))
        results += found

    missed = [result for result in results if not result.passed]
    console.print(f"{len(results)} cases, all masks bitwise equal; {len(missed)} targets missed")
    for result in missed:
        case = result.case
        console.print(f"MISS {case.group}, {result.memory} memory: {case.title}", style="bold red")
    if options.json:
        report = about | {"cases": [result.as_json() for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
