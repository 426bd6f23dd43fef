"""Times what the CUDA kernels write, beside a copy in device memory, and counts their launches."""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import attn_mask
import torch
from attn_mask import rules
from bench_legacy import commit
from legacy_cases import padding_mask, verdict, wide_console
from rich.table import Table

ops = torch.ops.attn_mask

# The share of a copy's bandwidth that outputs of 64 MB and more are to reach.
WANTED = 0.85


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], torch.Tensor | None]
    on_cpu: Callable[[], torch.Tensor | None]  # what it must give
    bytes: int  # written, and read from full-size inputs
    launches: int  # kernels at most


def cases(device: torch.device, size: int) -> list[Case]:
    found = []
    batch = 4
    padding = padding_mask(batch, size)
    ids = (torch.arange(size) // max(1, size // 16)).expand(batch, -1).contiguous()

    def add(
        name: str,
        make: Callable[..., Any],
        inputs: list[torch.Tensor],
        dtype: torch.dtype,
        planes: int,
        launches: int,
        reads: int = 0,
    ) -> None:
        moved = [tensor.to(device) for tensor in inputs]
        out = torch.empty(planes, 1, size, size, dtype=dtype, device=device)
        out_cpu = torch.empty(planes, 1, size, size, dtype=dtype)
        found.append(
            Case(
                f"{name}, {planes} x {size} x {size} {str(dtype).removeprefix('torch.')}",
                lambda: make(*moved, out=out) or out,
                lambda: make(*inputs, out=out_cpu) or out_cpu,
                out.nbytes + reads,
                launches,
            )
        )

    for dtype in (torch.bfloat16, torch.float32):
        add(
            "to_causal_4d",
            lambda out: ops.to_causal_4d.out(len(out), size, size, out=out),
            [],
            dtype,
            batch,
            1,
        )
        add(
            "to_4d",
            lambda mask, out: ops.to_4d.out(mask, size, key_value_length=size, out=out),
            [padding],
            dtype,
            batch,
            1,
        )
        add(
            "to_4d, window 1024",
            lambda mask, out: ops.to_4d.out(
                mask, size, key_value_length=size, sliding_window=1024, out=out
            ),
            [padding],
            dtype,
            batch,
            1,
        )
        add(
            "to_4d, rows opened",
            lambda mask, out: ops.to_4d.out(
                mask, size, key_value_length=size, unmask_unattended=True, out=out
            ),
            [padding],
            dtype,
            batch,
            2,
        )
        additive = torch.zeros(batch, 1, size, size, dtype=dtype)
        additive[:, :, ::7] = torch.finfo(dtype).min
        low = torch.finfo(dtype).min
        add(
            "_unmask_unattended",
            partial(unmask, low),
            [additive],
            dtype,
            batch,
            1,
            additive.nbytes,
        )
    causal = rules.causal().encode()[0]
    documents = [rules.AND, 2, *causal, rules.DOCUMENTS, 0]
    add(
        "boolean, causal",
        lambda out: ops.boolean.out(causal, [], len(out), size, size, out=out),
        [],
        torch.bool,
        batch,
        1,
    )
    add(
        "boolean, causal & documents",
        lambda table, out: ops.boolean.out(documents, [table], batch, size, size, out=out),
        [ids],
        torch.bool,
        batch,
        1,
    )
    return found


def unmask(low: float, mask: torch.Tensor, out: torch.Tensor) -> None:
    ops._unmask_unattended.out(mask, low, out=out)


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """The median time on the device, between events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """GB/s that a large copy in device memory reads and writes."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), rounds) / 1e9


def launches_of(call: Callable[[], Any]) -> int:
    """How many kernels run; copies and fills of memory are no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = (event for event in profile.events() if event.device_type.name == "CUDA")
    return sum(not event.name.startswith(("Memset", "Memcpy")) for event in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=8192, help="queries and keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    device = torch.device("cuda")
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": "not used",
        "attn_mask": attn_mask.build_info(),
        "commit": commit(),
    }
    console = wide_console()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    bandwidth = copy_bandwidth(device, options.rounds)
    console.print(f"a copy moves {bandwidth:.0f} GB/s", highlight=False)
    table = Table("case")
    for column in ("time", "GB/s", f"of copy (≥ {WANTED})", "launches", "target"):
        table.add_column(column, justify="right")
    report = []
    for case in cases(device, options.size):
        with torch.cuda.device(device):
            torch.cuda.set_sync_debug_mode("error")  # nothing on the way may wait for the device
            got = case.call()
            torch.cuda.set_sync_debug_mode("default")
        want = case.on_cpu()
        assert got is not None and want is not None
        if not torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8)):
            raise SystemExit(f"{case.name}: the CPU's mask is another")
        seconds = seconds_of(case.call, options.rounds)
        launches = launches_of(case.call)
        gb_per_s = case.bytes / seconds / 1e9
        passed = gb_per_s >= WANTED * bandwidth and launches <= case.launches
        table.add_row(
            case.name,
            f"{seconds * 1e6:.1f} µs",
            f"{gb_per_s:.0f}",
            f"{gb_per_s / bandwidth:.2f}",
            f"{launches} (≤ {case.launches})",
            verdict(passed),
        )
        report.append(
            {
                "name": case.name,
                "bytes": case.bytes,
                "seconds": seconds,
                "gb_per_s": gb_per_s,
                "copy_gb_per_s": bandwidth,
                "of_copy_bandwidth": gb_per_s / bandwidth,
                "launches": launches,
                "passed": passed,
            }
        )
    console.print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about | {"cases": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
