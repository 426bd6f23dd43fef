"""Times the CUDA kernels: dense masks beside a copy in device memory, `fill_` and transformers;
decode steps beside `torch.empty` and as graph replays; block masks beside torch's compiled ones.

Every result is compared with the CPU's or the peer's before it is timed.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import attn_mask
import torch
import transformers
from attn_mask import masking_utils, rules
from bench_legacy import commit, time_text
from gpu_attention import attention
from legacy_cases import padding_mask, verdict, wide_console
from rich.console import Console
from rich.table import Table
from torch.nn.attention import flex_attention
from transformers import masking_utils as upstream

ops = torch.ops.attn_mask

# Seconds that FlashAttention-4 publishes for its block lists at 8192 x 8192, 8 heads.
FA4 = {"causal": 57e-6, "window 1024": 129e-6, "64 documents": 47e-6}

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
            2,  # one prepares the padding
        )
        add(
            "to_4d, window 1024",
            lambda mask, out: ops.to_4d.out(
                mask, size, key_value_length=size, sliding_window=1024, out=out
            ),
            [padding],
            dtype,
            batch,
            2,  # one prepares the padding
        )
        add(
            "to_4d, masked rows unmasked",
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
    blocks = torch.where(torch.arange(size) % 500 < 100, torch.arange(size) // 500, -1)
    causal = rules.causal().encode()[0]
    images = [rules.AND, 2, rules.OR, 2, *causal, rules.BLOCKS, 0, rules.PADDING, 1]
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
        2,
    )
    add(
        "boolean, (causal | blocks) & padding",
        lambda table, mask, out: ops.boolean.out(images, [table, mask], batch, size, size, out=out),
        [blocks.expand(batch, -1).contiguous(), padding],
        torch.bool,
        batch,
        2,
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


def host_seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """The median time until the call returns; the device has caught up before each round."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - start) / 20)
    torch.cuda.synchronize()
    return median(times)


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, timer: Callable[..., float] = seconds_of
) -> dict[str, float]:
    times: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(3):
        for side, call in calls.items():
            times[side].append(timer(call, rounds))
    return {side: median(values) for side, values in times.items()}


def without_waiting(call: Callable[[], Any]) -> Any:
    """What the call gives; an error where it waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = (tensor.contiguous().cpu() for tensor in (got, want))
    if got.dtype != want.dtype or not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
        raise SystemExit(f"{name}: the peer's mask is another")


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """GB/s that a large copy in device memory reads and writes."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), rounds) / 1e9


def kernels_of(call: Callable[[], Any], rounds: int = 1) -> list[tuple[str, float]]:
    """The kernels that run, and the seconds that each takes; copies and fills are none."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        acc_events=True,  # else some releases warn
    ) as profile:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memset", "Memcpy"))
    ]


def kernel_seconds(call: Callable[[], Any], kernel: str) -> float:
    """What the kernels with this in their names take of a call."""
    rounds = 5
    return sum(seconds for name, seconds in kernels_of(call, rounds) if kernel in name) / rounds


def dense(device: torch.device, size: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Bandwidth beside that of a copy."""
    bandwidth = copy_bandwidth(device, rounds)
    console.print(f"a copy moves {bandwidth:.0f} GB/s", highlight=False)
    table = Table("case")
    for column in (
        "time",
        "fill_",
        "GB/s",
        f"of copy (≥ {WANTED})",
        "launches",
        "prepare",
        "target",
    ):
        table.add_column(column, justify="right")
    report = []
    for case in cases(device, size):
        got, want = without_waiting(case.call), case.on_cpu()
        assert got is not None and want is not None
        check(case.name, got, want)
        seconds = in_turn({"attn_mask": case.call, "fill_": partial(got.fill_, 0)}, rounds)
        launches = len(kernels_of(case.call))
        prepare = kernel_seconds(case.call, "prepare_kernel")
        gb_per_s = case.bytes / seconds["attn_mask"] / 1e9
        passed = gb_per_s >= WANTED * bandwidth and launches <= case.launches
        table.add_row(
            case.name,
            *(time_text(value) for value in seconds.values()),
            f"{gb_per_s:.0f}",
            f"{gb_per_s / bandwidth:.2f}",
            f"{launches} (≤ {case.launches})",
            time_text(prepare) if prepare else "",
            verdict(passed),
        )
        report.append(
            {
                "name": case.name,
                "bytes": case.bytes,
                "seconds": seconds["attn_mask"],
                "fill_seconds": seconds["fill_"],
                "gb_per_s": gb_per_s,
                "copy_gb_per_s": bandwidth,
                "of_copy_bandwidth": gb_per_s / bandwidth,
                "launches": launches,
                "prepare_kernel_seconds": prepare,
                "passed": passed,
            }
        )
    console.print(table)
    return report


def peers(device: torch.device, size: int, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Fresh masks beside transformers' functions of the same names, eager and compiled."""
    batch = 4
    padding = padding_mask(batch, size).to(device, torch.bool)
    ids = (torch.arange(size, device=device) // 300).expand(batch, -1).contiguous()
    modules = {"attn_mask": masking_utils, "transformers": upstream}

    def documents(module: Any) -> Any:
        return module.and_masks(
            module.causal_mask_function, module.packed_sequence_mask_function(ids)
        )

    patterns: dict[str, tuple[Callable[[Any], Any], torch.Tensor | None]] = {
        "causal": (lambda module: module.causal_mask_function, None),
        "causal + padding": (lambda module: module.causal_mask_function, padding),
        "window 1024 + padding": (
            lambda module: module.sliding_window_causal_mask_function(1024),
            padding,
        ),
        "documents": (documents, None),
    }
    report = []
    table = Table("case", "attn_mask", "transformers", "compiled", "x transformers", "x compiled")
    for name, (rule_in, mask) in patterns.items():
        for function, options in (
            ("sdpa_mask", {"allow_is_causal_skip": False}),
            ("eager_mask", {"dtype": torch.bfloat16}),
        ):
            title = f"{function}, {name}, {batch} x {size} x {size}"

            def make(
                module: Any,
                function: str = function,
                options: dict[str, Any] = options,
                rule_in: Callable[[Any], Any] = rule_in,
                mask: torch.Tensor | None = mask,
            ) -> torch.Tensor:
                return getattr(module, function)(
                    batch_size=batch,
                    q_length=size,
                    kv_length=size,
                    mask_function=rule_in(module),
                    attention_mask=mask,
                    device=device,
                    **options,
                )

            calls = {side: partial(make, module) for side, module in modules.items()}
            check(title, without_waiting(calls["attn_mask"]), calls["transformers"]())
            torch._dynamo.reset()
            calls["compiled"] = torch.compile(partial(make, upstream))
            try:
                check(title, calls["attn_mask"](), calls["compiled"]())
            except Exception as error:  # whatever a compiler raises
                console.print(f"{title}: compiled: {type(error).__name__}: {error}"[:300])
                del calls["compiled"]
            seconds = in_turn(calls, max(3, rounds // 3))
            ours = seconds["attn_mask"]
            times = {side: seconds[side] / ours for side in seconds if side != "attn_mask"}
            table.add_row(
                title,
                *(time_text(value) for value in seconds.values()),
                *(f"{value:.1f}" for value in times.values()),
            )
            report.append({"name": title, "seconds": seconds, "times_as_fast": times})
    console.print(table)
    return report


def decode(device: torch.device, rounds: int, console: Console) -> list[dict[str, Any]]:
    """Host time of a step's mask, and the time of a graph's replay."""
    padding = padding_mask(4, 4096).to(device)
    one = padding[:1]
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    embeds = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    states = torch.zeros(1, 1, 4095, 64, dtype=torch.bfloat16, device=device)
    cache = transformers.DynamicCache(config=config)
    cache.update(states, states, 0)
    positions = torch.tensor([[4095]], device=device)
    rule = rules.causal() & rules.padding(one)

    def create(module: Any, implementation: str) -> torch.Tensor | None:
        config._attn_implementation = implementation
        result: torch.Tensor | None = module.create_causal_mask(
            config, embeds, one, cache, position_ids=positions
        )
        return result

    calls: dict[str, Callable[[], Any]] = {
        "torch.empty": lambda: torch.empty(1, 1, 1, 4096, dtype=torch.bfloat16, device=device),
        "torch.ops.attn_mask.to_causal_4d": lambda: ops.to_causal_4d(
            1, 1, 4096, dtype=torch.bfloat16, device=device
        ),
        "torch.ops.attn_mask.to_4d": lambda: ops.to_4d(
            one, 1, dtype=torch.bfloat16, key_value_length=4096
        ),
        "attn_mask.additive": lambda: attn_mask.additive(
            rule, 1, 1, 4096, q_offset=4095, dtype=torch.bfloat16, device=device
        ),
    }
    for implementation in ("eager", "sdpa"):
        for module, name in ((masking_utils, "attn_mask"), (upstream, "transformers")):
            calls[f"{name}, create_causal_mask, {implementation}"] = partial(
                create, module, implementation
            )
    report = []
    table = Table("decode step, 1 x 4096", "host time", "x torch.empty", "graph replay")
    seconds = in_turn(calls, rounds, host_seconds_of)
    for name, call in calls.items():
        replay = None
        if "transformers" not in name and "sdpa" not in name:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            replay = seconds_of(graph.replay, rounds)
        times = seconds[name] / seconds["torch.empty"]
        table.add_row(
            name,
            time_text(seconds[name]),
            f"{times:.1f}",
            "" if replay is None else time_text(replay),
        )
        report.append({"name": name, "host_seconds": seconds[name], "replay_seconds": replay})
    console.print(table)
    return report


def block_masks(device: torch.device, rounds: int, console: Console) -> list[dict[str, Any]]:
    """BlockMasks beside those of torch's compiled create_block_mask."""
    report = []
    table = Table("block mask", "attn_mask", "kernels", "host", "torch compiled", "x", "FA4 says")
    slow = set()  # where the length before took long, this one may take minutes
    for length in (2**13, 2**15, 2**17, 2**20):
        ids = torch.arange(length, device=device) * 64 // length
        patterns: dict[str, tuple[Any, Callable[..., Any]]] = {
            "causal": (rules.causal(), lambda b, h, q, k: k <= q),
            "window 1024": (
                rules.causal() & rules.sliding_window(1024),
                lambda b, h, q, k: (k <= q) & (k > q - 1024),
            ),
            "64 documents": (
                rules.causal() & rules.documents(ids[None]),
                lambda b, h, q, k, ids=ids: (k <= q) & (ids[q] == ids[k]),
            ),
        }
        compact = length > 2**17
        for name, (rule, mask_mod) in patterns.items():
            title = f"{name}, {length // 1024}k" + (", compact" if compact else "")
            if name in slow:
                table.add_row(title, "left out")
                continue
            make = partial(
                attn_mask.create_block_mask,
                *(rule, 1, 1, length, length),
                device=device,
                compact=compact,
            )
            start = time.perf_counter()
            made = make()
            torch.cuda.synchronize()
            few = time.perf_counter() - start > 0.1
            if few:
                slow.add(name)
            if compact and name != "causal":  # its lists take a gigabyte
                is_moved = name == "64 documents"
                moved = rules.causal() & rules.documents(ids[None].cpu()) if is_moved else rule
                on_cpu = attn_mask.create_block_mask(
                    moved, 1, 1, length, length, device="cpu", compact=True
                )
                for tensor in flex_attention.BlockMask._TENSOR_ATTRS:
                    got, want = (getattr(mask, tensor, None) for mask in (made, on_cpu))
                    if want is not None:
                        check(f"{title}, {tensor}", got, want)
            calls: dict[str, Callable[[], Any]] = {"attn_mask": make}
            if not compact and length <= 2**16:
                torch._dynamo.reset()
                compiled = torch.compile(flex_attention.create_block_mask)
                calls["torch compiled"] = partial(
                    compiled, mask_mod, 1, 1, length, length, device=device
                )
                for tensor in flex_attention.BlockMask._TENSOR_ATTRS:
                    got, want = (getattr(call(), tensor, None) for call in calls.values())
                    if want is not None:
                        check(f"{title}, {tensor}", got, want)
            seconds = in_turn(calls, 1 if few else max(3, rounds // 3))
            host = 0.0 if few else host_seconds_of(make, 3)
            kernels = kernel_seconds(make, "attn_mask")
            compiled_seconds = seconds.get("torch compiled")
            published = FA4[name] if length == 2**13 else None
            table.add_row(
                title,
                time_text(seconds["attn_mask"]),
                time_text(kernels),
                time_text(host),
                time_text(compiled_seconds) if compiled_seconds else "",
                f"{compiled_seconds / seconds['attn_mask']:.1f}" if compiled_seconds else "",
                time_text(published) if published else "",
            )
            report.append(
                {
                    "name": title,
                    "seconds": seconds,
                    "host_seconds": host,
                    "kernel_seconds": kernels,
                    "published_seconds": published,
                }
            )
    console.print(table)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=8192, help="queries and keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--parts", nargs="*", help="by default all")
    options = parser.parse_args()
    device = torch.device("cuda")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attn_mask": attn_mask.build_info(),
        "commit": commit(),
    }
    console = wide_console()
    for key, value in report.items():
        console.print(f"{key}: {value}", highlight=False)

    failed = []
    for part, measure in {
        "cases": partial(dense, size=options.size),
        "decode": decode,
        "peers": partial(peers, size=options.size),
        "block_masks": block_masks,
        "attention": partial(attention, in_turn=in_turn),
    }.items():
        if options.parts and part not in options.parts:
            continue
        try:
            report[part] = measure(device=device, rounds=options.rounds, console=console)
        except Exception:  # the other parts are of use all the same
            console.print_exception()
            failed.append(part)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
