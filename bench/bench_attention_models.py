"""Times a small Mistral with attention by rule, beside "sdpa" and compiled flex attention."""

import argparse
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
import transformers
from bench_legacy import environment, time_text
from legacy_cases import wide_console
from peak_memory import peak, resident, restart_peak
from rich.table import Table

OURS, SDPA, FLEX = "attn_mask", "sdpa", "flex_attention"
LAYERS, WIDTH, HEADS, WINDOW = 4, 512, 8, 1024
DOCUMENT = 512


@dataclass(frozen=True)
class Case:
    """A batch of one row, and what is done with it."""

    name: str
    is_packed: bool = False
    trains: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        # On CPUs, torch's flex attention has no gradients.
        return (OURS, SDPA) if self.trains else (OURS, SDPA, FLEX)

    def call(self, side: str, length: int) -> Callable[[], torch.Tensor]:
        """Gives logits of the last token, or the gradient of the embeddings."""
        model = make(side, self.trains)
        ids = torch.randint(1000, (1, length), generator=torch.Generator().manual_seed(1))
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.is_packed:
            given["position_ids"] = (torch.arange(length) % DOCUMENT)[None]
        if not self.trains:

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    logits: torch.Tensor = model(**given, logits_to_keep=1).logits
                return logits

            return forward

        def step() -> torch.Tensor:
            model.zero_grad()
            model(**given, labels=ids).loss.backward()
            gradient: torch.Tensor = model.model.embed_tokens.weight.grad
            return gradient.clone()

        return step


CASES = [
    Case("prefill"),
    Case("prefill, packed", is_packed=True),
    Case("training step", trains=True),
    Case("training step, packed", is_packed=True, trains=True),
]


def make(side: str, trains: bool) -> Any:
    config = transformers.MistralConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=2**17,
        sliding_window=WINDOW,
    )
    torch.manual_seed(0)
    architecture = transformers.MistralForCausalLM
    return architecture._from_config(config, attn_implementation=side).train(trains)


def time_case(case: Case, length: int, rounds: int) -> dict[str, Any]:
    """Medians of the sides, timed in turn; seconds more of flex attention's first call."""
    calls = {side: case.call(side, length) for side in case.sides}
    start = time.perf_counter()
    results = {FLEX: calls[FLEX]()} if FLEX in calls else {}
    first = time.perf_counter() - start
    results |= {side: call() for side, call in calls.items() if side != FLEX}
    difference = 0.0
    for side, result in results.items():
        away = (result - results[SDPA]).abs().max().item()
        difference = max(difference, away)
        if away > 1e-3 * (1 + results[SDPA].abs().max().item()):
            raise SystemExit(f"{case.name}: {side} differs from sdpa by {away}")
    times: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            start = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - start)
    seconds = {side: median(values) for side, values in times.items()}
    found: dict[str, Any] = {"name": case.name, "seconds": seconds, "difference": difference}
    if FLEX in calls:
        found["compile_seconds"] = first - seconds[FLEX]
    return found


def measure(case: Case, side: str, length: int) -> int:
    """Bytes by which this process grows at most, over the model and its gradients."""
    call = case.call(side, length)
    case.call(side, 2 * WINDOW)()  # code and threads
    restart_peak()
    before = resident()
    call()
    return peak() - before


def peak_of(case: Case, side: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--measure", case.name, side]
    command += ["--length", str(options.length), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}, {side}:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side gets its turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    attn_mask.register_attention()
    if options.measure:
        name, side = options.measure
        print(measure(next(case for case in CASES if case.name == name), side, options.length))
        return
    console = wide_console()
    about = environment() | {"length": options.length}
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    table = Table("case", "side", "time", "of sdpa's", "peak memory", "compiling", "differs by")
    report = []
    for case in CASES:
        if options.only not in case.name:
            continue
        row = time_case(case, options.length, options.rounds)
        row["peak_bytes"] = {side: peak_of(case, side, options) for side in case.sides}
        row["passed"] = all(row[key][OURS] <= row[key][SDPA] for key in ("seconds", "peak_bytes"))
        report.append(row)
        for side, seconds in row["seconds"].items():
            table.add_row(
                case.name,
                side,
                time_text(seconds),
                f"{seconds / row['seconds'][SDPA]:.2f}",
                f"{row['peak_bytes'][side] / 2**20:.0f} MiB",
                f"{row['compile_seconds']:.1f} s" if side == FLEX else "",
                f"{row['difference']:.1g}",
            )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(about | {"cases": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
