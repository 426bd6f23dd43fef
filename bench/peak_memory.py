"""Peak memory while one mask is built, each measurement in a process of its own."""

import argparse
import gc
import json
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from legacy_cases import OURS, SIDES, Case, default_dtype_for, large_cases, verdict, wide_console
from rich.table import Table

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
CASES = {case.title: case for case in large_cases(DTYPES)}


def allowed(case: Case) -> float:
    """The output, 1 % and eight rows of it."""
    return 1.01 * case.output_bytes + 8 * case.kv * case.dtype.itemsize


def peak_of(case: Case, side: str) -> int:
    """Bytes by which a fresh process grows at most while that side builds the mask."""
    command = [sys.executable, __file__, "--measure", case.title, side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.title}, {side}:\n{done.stderr}")
    return int(done.stdout)


def measure(case: Case, side: str) -> int:
    with default_dtype_for(case):
        replace(case, q=256, kv=256).run(side)  # pages the code in and starts the threads
        expression = compile(case.expression(side), "<case>", "eval")
        namespace = case.namespace(side)
        gc.collect()
        restart_peak()
        before = resident()
        mask = eval(expression, namespace)
        grown = peak() - before
    if mask.untyped_storage().nbytes() < case.output_bytes:
        raise AssertionError(f"{case.title}: {side} made a smaller mask than expected")
    return grown


def restart_peak() -> None:
    """Where this is not permitted the imports count too: the result is then an upper bound."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The high-water mark of this process; getrusage's also remembers the parent's before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bfloat16 only")
    parser.add_argument("--only", default="", help="the cases whose title contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        title, side = options.measure
        print(measure(CASES[title], side))
        return

    dtypes = DTYPES[:1] if options.quick else DTYPES
    chosen = [c for c in CASES.values() if c.dtype in dtypes and options.only in c.title]
    table = Table("case", title="peak memory, of the output's bytes", title_justify="left")
    for column in ("output", *SIDES[:2], "torch.full", "allowed"):
        table.add_column(column, justify="right")
    table.add_column("target")
    results = []
    for case in chosen:
        peaks = {side: peak_of(case, side) for side in SIDES}
        passed = peaks[OURS] <= allowed(case)
        table.add_row(
            case.title,
            f"{case.output_bytes / 2**20:.0f} MiB",
            *(f"{peaks[side] / case.output_bytes:.3f}" for side in SIDES),
            f"{allowed(case) / case.output_bytes:.3f}",
            verdict(passed),
        )
        results.append(
            {
                "case": case.title,
                "output_bytes": case.output_bytes,
                "peak_bytes": peaks,
                "allowed_bytes": allowed(case),
                "passed": passed,
            }
        )
    wide_console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
