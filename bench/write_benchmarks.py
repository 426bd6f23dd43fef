"""Writes BENCHMARKS.md from the JSON files in bench/results/; no number is typed by hand."""

import argparse
import json
from pathlib import Path
from typing import Any

from bench_legacy import time_text

HERE = Path(__file__).parent
INTRODUCTION = """\
# Benchmarks

Written by `python bench/write_benchmarks.py` from the files in [bench/results](bench/results),
which the commands named below wrote. Medians; all sides of a case are timed in turn in one run,
after their results were compared bit for bit. Machines differ and may be shared: read the ratios.
[bench/README.md](bench/README.md) says what is measured and how to read it.
"""


def about(report: dict[str, Any]) -> str:
    build = report["attn_mask"]
    device = report.get("cpu_model", report["device"])
    return (
        f"{device}, {report['threads']} threads, {build['cpu_capability']}; "
        f"torch {report['torch']}, transformers {report['transformers']}, "
        f"Python {report['python']}, commit {report['commit']}"
    )


def verdict(row: dict[str, Any]) -> str:
    return "yes" if row["passed"] else "**no**"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def legacy(report: dict[str, Any]) -> str:
    parts = []
    groups = dict.fromkeys((row["group"], row["memory"]) for row in report["cases"])
    for group, memory in groups:
        rows = [r for r in report["cases"] if (r["group"], r["memory"]) == (group, memory)]
        columns = ["case", "ours", "transformers", "yardstick", "of yardstick", "allowed"]
        columns += ["times as fast", "wanted", "met"]
        cells = []
        for row in rows:
            dtype = row["dtype"].removeprefix("torch.")
            seconds = row["median_seconds"]
            allowed = f"{row['times_yardstick_at_most']:g}"
            if row["plus_seconds"]:
                allowed += f" + {row['plus_seconds'] * 1e6:g} µs"
            cells.append(
                [
                    f"{row['name']}, {' x '.join(map(str, row['batch_q_kv']))} {dtype}",
                    *(time_text(s) for s in seconds.values()),
                    f"{row['times_yardstick']:.2f}",
                    allowed,
                    f"{row['times_as_fast']:.1f}",
                    f"{row['times_as_fast_at_least']:g}" if row["times_as_fast_at_least"] else "",
                    verdict(row),
                ]
            )
        yardstick = rows[0].get("yardstick", "torch.full")
        title = f"{group}, {memory} memory; the yardstick is {yardstick}"
        parts.append(f"### {title}\n\n{table(columns, cells)}")
    return "\n\n".join(parts)


def rules(report: dict[str, Any]) -> str:
    cells = [
        [
            f"{row['name']}, {row['memory']} memory",
            *(time_text(s) for s in row["seconds"].values()),
            f"{row['seconds']['attn_mask'] / row['seconds']['torch.full']:.2f}",
            f"{row['seconds']['transformers'] / row['seconds']['attn_mask']:.1f}",
            verdict(row),
        ]
        for row in report["cases"]
    ]
    columns = ["case", "ours", "transformers", "torch.full", "of torch.full", "times as fast"]
    return table([*columns, "met"], cells)


def block_mask(report: dict[str, Any]) -> str:
    sides = ("attn_mask", "compiled", "eager", "compiled, first")
    cells = []
    for row in report["cases"]:
        seconds = row["seconds"]
        ours = seconds["attn_mask"]
        cells.append(
            [
                row["name"],
                *(time_text(seconds[side]) if side in seconds else "" for side in sides),
                *(f"{seconds[s] / ours:.0f}" if s in seconds else "" for s in sides[1:3]),
                f"{row['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in row else "",
                row["wanted"],
                verdict(row),
            ]
        )
    columns = ["case", "ours", "torch, compiled", "torch, eager", "torch, compiling", "x compiled"]
    return table([*columns, "x eager", "peak memory, ours", "wanted", "met"], cells)


def tables(report: dict[str, Any]) -> str:
    sides = ("attn_mask", "fill_", "torch.full", "torch")
    cells = [
        [
            row["name"],
            *(time_text(row["seconds"][side]) if side in row["seconds"] else "" for side in sides),
            row["wanted"],
            verdict(row),
        ]
        for row in report["cases"]
    ]
    columns = ["case", "ours", "fill_", "torch.full", "torch's create_block_mask", "wanted", "met"]
    return table(columns, cells)


def attention(report: dict[str, Any]) -> str:
    sides = ("ours", "dense mask", "is_causal", "flex")
    timed = [
        [
            row["name"],
            *(time_text(row["seconds"][s]) if s in row["seconds"] else "" for s in sides),
            f"{row['compile_seconds']:.1f} s" if "compile_seconds" in row else "",
            ", ".join(f"{ratio:.1f}" for ratio in row["times_as_fast"]),
            row["wanted"],
            verdict(row),
        ]
        for row in report["cases"]
        if "seconds" in row
    ]
    others = [
        [row["name"], row["measured"], row["wanted"], verdict(row)]
        for row in report["cases"]
        if "measured" in row
    ]
    columns = ["case", "ours", "SDPA, dense mask", "SDPA, is_causal", "flex compiled", "compiling"]
    columns += ["times as fast as SDPA (dense mask, is_causal)", "wanted", "met"]
    about = (
        f"One row of {report['length']} tokens, {report['heads']} heads of {report['width']}; "
        "results are compared first. is_causal sees more keys than the rules show."
    )
    return "\n\n".join(
        [about, table(columns, timed), table(["case", "measured", "at most", "met"], others)]
    )


def attention_models(report: dict[str, Any]) -> str:
    cells = [
        [
            f"{row['name']}, {side}",
            time_text(seconds),
            f"{seconds / row['seconds']['sdpa']:.2f}",
            f"{row['peak_bytes'][side] / 2**20:.0f} MiB",
            f"{row['compile_seconds']:.1f} s" if side == "flex_attention" else "",
            verdict(row) if side == "attn_mask" else "",
        ]
        for row in report["cases"]
        for side, seconds in row["seconds"].items()
    ]
    columns = ["case", "time", "of sdpa's", "peak memory", "compiling", "below sdpa's"]
    about = (
        f"A Mistral of 4 layers and width 512, {report['length']} tokens in one row, window 1024; "
        "packed: documents of 512. Logits and gradients are compared first, within 1e-3."
    )
    return f"{about}\n\n{table(columns, cells)}"


def compiling(report: dict[str, Any]) -> str:
    sides = ("attn_mask", "transformers")
    cells = [
        [
            row["what"],
            *(str(row["nodes"][side]) for side in sides),
            *(f"{row['seconds'][side]:.1f} s" for side in sides),
        ]
        for row in report["compiling"]
    ]
    text = table(["compiled", "nodes", "transformers'", "compiling", "transformers'"], cells)
    calls = [
        [
            row["call"],
            *(f"{row[key]:.1f} us" for key in ("eager", "compiled")),
            f"{row['compiled'] - row['eager']:+.1f} us",
        ]
        for row in report["cases"]
    ]
    return text + "\n\n" + table(["call", "by itself", "in a compiled function", "more"], calls)


def packing(report: dict[str, Any]) -> str:
    sides = ("plain", "mask", "document_ids", "cu_seqlens")
    cells = []
    for row in report["cases"]:
        times = [time_text(row["seconds"][side]) for side in sides]
        cells.append([row["name"], *times, row["target"], verdict(row)])
    columns = ["create call", "plain", "with a mask", *sides[2:], "what is added", "met"]
    return table(columns, cells)


def data(report: dict[str, Any]) -> str:
    cells = []
    for row in report["cases"]:
        wanted = time_text(row["wanted"]) if row["wanted"] else ""
        cells.append([row["name"], time_text(row["seconds"]), wanted, verdict(row)])
    text = f"Of rows of 4096 with 100,000 sequences {report['waste']:.3%} are padding."
    return text + "\n\n" + table(["call", "time", "allowed", "met"], cells)


def gpu(report: dict[str, Any]) -> str:
    def text(row: dict[str, Any], side: str) -> str:
        return time_text(row["seconds"][side]) if side in row["seconds"] else ""

    def ratio(row: dict[str, Any], side: str) -> str:
        seconds = row["seconds"]
        return f"{seconds[side] / seconds['attn_mask']:.1f}" if side in seconds else ""

    dense = [
        [
            row["name"],
            f"{row['bytes'] / 2**20:.0f} MiB",
            time_text(row["seconds"]),
            time_text(row["fill_seconds"]),
            f"{row['gb_per_s']:.0f}",
            f"{row['of_copy_bandwidth']:.2f}",
            verdict(row),
        ]
        for row in report["cases"]
    ]
    sides = ("transformers", "compiled")
    peers = [
        [row["name"], text(row, "attn_mask")]
        + [text(row, side) for side in sides]
        + [ratio(row, side) for side in sides]
        for row in report.get("peers", [])
    ]
    blocks = [
        [row["name"], *(text(row, side) for side in ("attn_mask", "torch compiled"))]
        + [ratio(row, "torch compiled")]
        + [
            time_text(row[key]) if row.get(key) else ""
            for key in ("kernel_seconds", "published_seconds")
        ]
        for row in report.get("block_masks", [])
    ]
    steps = [
        [
            row["name"],
            *(
                time_text(row[key]) if row[key] else ""
                for key in ("host_seconds", "replay_seconds")
            ),
        ]
        for row in report.get("decode", [])
    ]
    columns = ["case", "moved", "time", "fill_", "GB/s", "of copy bandwidth (≥ 0.85)", "met"]
    times = ["case", "ours", "transformers", "compiled", "times as fast", "than compiled"]
    parts = [table(columns, dense)]
    if steps:
        parts.append(
            "A decode step's mask: the host's time for a call, and a CUDA graph's for a replay."
        )
        parts.append(table(["call", "host", "replay"], steps))
    if peers:
        parts.append(
            "Fresh masks, beside transformers' functions of these names, eager and compiled:"
        )
        parts.append(table(times, peers))
    if blocks:
        parts.append(
            "Block masks, beside torch's compiled create_block_mask; what our kernels take of that "
            "time, and what FlashAttention-4 publishes for its lists (8 heads):"
        )
        columns = ["ours", "torch compiled", "times as fast", "our kernels", "FlashAttention-4"]
        parts.append(table(["block mask", *columns], blocks))
    attention = [
        [row["name"]]
        + [text(row, side) for side in ("ours", "is_causal", "dense mask", "flex")]
        + [time_text(row["with_gradients"][side]) for side in ("ours", "is_causal")]
        for row in report.get("attention", [])
    ]
    if attention:
        parts.append(
            "Attention by a rule, bfloat16, 16 heads of width 128, beside torch's flash kernel, a "
            "dense mask and compiled flex attention; and with its gradients:"
        )
        columns = ["ours", "is_causal", "dense mask", "flex", "ours, gradients", "is_causal's"]
        parts.append(table(["attention", *columns], attention))
    return "\n\n".join(parts)


# File name without its suffix, how it was made, how it is shown.
SECTIONS = {
    "legacy": ("a run of `bench/bench_legacy.py`", legacy),
    "rules": ("a run of `bench/bench_rules.py`", rules),
    "block_mask": ("a run of `bench/bench_block_mask.py`", block_mask),
    "tables": ("a run of `bench/bench_tables.py`", tables),
    "compile": ("a run of `bench/bench_compile.py`", compiling),
    "attention": ("a run of `bench/bench_attention.py`", attention),
    "packing": ("a run of `bench/bench_packing.py`", packing),
    "data": ("a run of `bench/bench_data.py`", data),
    "attention_models": ("a run of `bench/bench_attention_models.py`", attention_models),
    "gpu": ("`make gpu`", gpu),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=HERE.parent / "BENCHMARKS.md", metavar="FILE")
    options = parser.parse_args()
    parts = [INTRODUCTION]
    for name, (command, show) in SECTIONS.items():
        path = options.results / f"{name}.json"
        if not path.exists():
            parts.append(f"## {name}\n\nNot measured: {command} has not been run.\n")
            continue
        report = json.loads(path.read_text())
        missed = sum(not row["passed"] for row in report["cases"])
        parts.append(
            f"## {name}\n\n{command}: {about(report)}. {len(report['cases'])} cases, "
            f"{missed} of them miss what is wanted.\n\n{show(report)}\n"
        )
    options.to.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
