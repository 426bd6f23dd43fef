"""Times transformers' create functions and `generate` with and without attn_mask.install()."""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import attn_mask
import torch
import transformers
from bench_legacy import REUSED, allocate, environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from torch.utils.benchmark import Timer
from transformers import masking_utils
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

SIZE = 1024  # of windows and chunks
STOCK, OURS, NULL, WRITE = "transformers", "attn_mask", "null", "write"
IMPLEMENTATIONS = ("eager", "sdpa")

# An interface that does nothing: what is left is the create function's own time.
masking_utils.AttentionMaskInterface.register("does nothing", lambda **kwargs: None)

FUNCTIONS = {
    "causal": "create_causal_mask",
    "window": "create_sliding_window_causal_mask",
    "chunks": "create_chunked_causal_mask",
}
# What a model with such layers, whose cache keeps what they see, has in its configuration.
LOCAL = {"causal": None, "window": "sliding_window", "chunks": "attention_chunk_size"}


def config(implementation: str, function: str) -> Any:
    made = transformers.MistralConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=None,
    )
    if local := LOCAL[function]:
        setattr(made, local, SIZE)
    made._attn_implementation = implementation
    return made


@dataclass(frozen=True)
class Case:
    name: str
    function: str
    implementation: str
    batch_size: int
    q_length: int
    kv_length: int
    padding: torch.Tensor | None

    def call(self, implementation: str | None = None) -> Callable[[], torch.Tensor | None]:
        """The create function, as a model calls it in one step."""
        of_model = config(implementation or self.implementation, self.function)
        seen = self.kv_length - self.q_length
        cache = transformers.DynamicCache(config=of_model)
        if seen:
            states = torch.zeros(self.batch_size, 1, seen, 1)
            cache.update(states, states, 0)
        embeds = torch.zeros(self.batch_size, self.q_length, 1)
        positions = torch.arange(seen, self.kv_length)[None]
        create = getattr(masking_utils, FUNCTIONS[self.function])
        padding = self.padding
        # By place: the cache's name differs between releases.
        return lambda: create(of_model, embeds, padding, cache, position_ids=positions)


def cases() -> Iterator[Case]:
    for batch_size, kv_length in ((1, 128), (8, 4096)):
        ones = torch.ones(batch_size, kv_length, dtype=torch.long)
        padded = ones.clone()
        padded[0, :5] = 0
        for function in FUNCTIONS:
            for implementation in IMPLEMENTATIONS:
                for name, padding in (("no mask", None), ("ones", ones), ("padded", padded)):
                    title = f"decode {batch_size} x {kv_length}, {name}"
                    yield Case(title, function, implementation, batch_size, 1, kv_length, padding)
    padded = torch.ones(4, 2048, dtype=torch.long)
    padded[:, :100] = 0
    for function in FUNCTIONS:
        for implementation in IMPLEMENTATIONS:
            yield Case("prefill 4 x 2048", function, implementation, 4, 2048, 2048, padded)


def same(got: torch.Tensor | None, want: torch.Tensor | None) -> bool:
    if got is None or want is None:
        return got is want
    bits = {1: torch.uint8, 4: torch.int32}[want.element_size()]
    return got.dtype == want.dtype and torch.equal(got.view(bits), want.view(bits))


@contextlib.contextmanager
def side(name: str) -> Iterator[None]:
    with attn_mask.installed() if name == OURS else contextlib.nullcontext():
        yield


def time_case(case: Case, rounds: int) -> tuple[dict[str, float], bool]:
    """Medians of each side, timed in turn; whether stock gives a mask."""
    allocate(REUSED)
    call = case.call()
    want = call()
    with side(OURS):
        if not same(call(), want):
            raise SystemExit(f"{FUNCTIONS[case.function]}, {case.name}: the masks differ")
    calls: dict[str, Callable[[], Any]] = {OURS: call, STOCK: call, NULL: case.call("does nothing")}
    if want is not None:
        shape, dtype = tuple(want.shape), want.dtype
        calls[WRITE] = lambda: torch.full(shape, 1, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timed in calls.items():
            timer = Timer("call()", globals={"call": timed}, num_threads=torch.get_num_threads())
            with side(name):
                times[name].append(timer.blocked_autorange(min_run_time=0.05).median)
    return {name: median(values) for name, values in times.items()}, want is not None


def target(case: Case, seconds: dict[str, float], has_mask: bool) -> tuple[bool, str]:
    """Whether it is met, and by what it is measured."""
    if not has_mask:
        more = seconds[OURS] - seconds[STOCK]
        return more <= 1e-6, f"{more * 1e6:+.1f} µs to stock, which skips (≤ 1)"
    if case.q_length > 1:
        faster = seconds[STOCK] / seconds[OURS]
        return faster >= 5, f"{faster:.1f} times as fast (≥ 5)"
    more = seconds[OURS] - seconds[NULL] - seconds[WRITE]
    return more <= 20e-6, f"{more * 1e6:+.1f} µs to null and write (≤ 20)"


SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def models() -> Iterator[tuple[str, ModuleType, Any]]:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**SIZES)
    mistral = transformers.MistralConfig(**SIZES, sliding_window=64)
    for name, module, of_model in (
        ("Llama", modeling_llama, llama),
        ("Mistral", modeling_mistral, mistral),
    ):
        architecture = getattr(module, f"{name}ForCausalLM")
        model = architecture._from_config(of_model, attn_implementation="eager").eval()
        yield name, module, model


@contextlib.contextmanager
def timed_masks(module: ModuleType) -> Iterator[list[float]]:
    """The time that each mask of a model takes."""
    seconds: list[float] = []

    def timed(create: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return create(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    before = {name: value for name, value in vars(module).items() if name.startswith("create_")}
    vars(module).update({name: timed(create) for name, create in before.items()})
    try:
        yield seconds
    finally:
        vars(module).update(before)


def generate(module: ModuleType, model: Any, new_tokens: int, rounds: int) -> dict[str, Any]:
    batch_size, length = 8, 64
    ids = torch.randint(3, 1000, (batch_size, length))
    padding = torch.ones_like(ids)
    padding[0, :20] = 0
    runs: dict[str, list[tuple[float, float]]] = {STOCK: [], OURS: []}
    results = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, times in runs.items():
            with side(name), timed_masks(module) as seconds:
                start = time.perf_counter()
                results[name] = model.generate(
                    ids, attention_mask=padding, max_new_tokens=new_tokens, do_sample=False
                )
                times.append((time.perf_counter() - start, sum(seconds)))
    if not torch.equal(results[STOCK], results[OURS]):
        raise SystemExit("the generated tokens differ")
    found: dict[str, Any] = {}
    for name, times in runs.items():
        whole, masks = (median(values) for values in zip(*times[1:], strict=True))
        found[name] = {
            "tokens_per_second": batch_size * new_tokens / whole,
            "share_in_masks": masks / whole,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side gets its turn")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--tokens", type=int, default=64, help="how many are generated")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = wide_console()
    about = environment()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False)
    table = Table("function", "case", OURS, STOCK, NULL, WRITE, "measured", "target")
    report = []
    for case in cases():
        name = f"{FUNCTIONS[case.function]}, {case.implementation}"
        if options.only not in f"{name}, {case.name}":
            continue
        seconds, has_mask = time_case(case, options.rounds)
        passed, text = target(case, seconds, has_mask)
        times = (
            time_text(seconds[side]) if side in seconds else "-"
            for side in (OURS, STOCK, NULL, WRITE)
        )
        table.add_row(name, case.name, *times, text, verdict(passed))
        report.append(
            {
                "name": f"{name}, {case.name}",
                "seconds": seconds,
                "stock_gives_a_mask": has_mask,
                "measured": text,
                "passed": passed,
            }
        )
    console.print(table)
    missed = sum(not row["passed"] for row in report)
    console.print(f"{len(report)} cases, all masks bitwise equal; {missed} targets missed")
    of_models: dict[str, Any] = {}
    table = Table("generate, eager, left-padded", title_justify="left")
    for column in (f"{STOCK}: tokens/s", "in masks", f"{OURS}: tokens/s", "in masks"):
        table.add_column(column, justify="right")
    for name, module, model in models():
        found = of_models[name] = generate(module, model, options.tokens, options.rounds)
        cells = (
            text
            for of_side in found.values()
            for text in (f"{of_side['tokens_per_second']:.0f}", f"{of_side['share_in_masks']:.1%}")
        )
        table.add_row(name, *cells)
    console.print(table)
    if options.json:
        found = about | {"cases": report, "generate": of_models}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
