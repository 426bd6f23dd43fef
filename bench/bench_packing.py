"""Times what `packed()` adds to transformers' create functions under attn_mask.install()."""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attn_mask
import torch
import transformers
from bench_legacy import environment, time_text
from legacy_cases import verdict, wide_console
from rich.table import Table
from transformers import masking_utils

# Without a block, without one but with a mask in any case, and with one.
PLAIN, MASK, IDS, CU_SEQLENS = "plain", "mask", "document_ids", "cu_seqlens"
DOCUMENT = 500  # tokens

FUNCTIONS = {
    "causal": "create_causal_mask",
    "window": "create_sliding_window_causal_mask",
    "chunks": "create_chunked_causal_mask",
}


def config(implementation: str, **attributes: Any) -> Any:
    made = transformers.MistralConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=None,
    )
    made._attn_implementation = implementation
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def packings(length: int) -> dict[str, torch.Tensor]:
    borders = torch.tensor([*range(0, length, DOCUMENT), length], dtype=torch.int32)
    return {IDS: (torch.arange(length) // DOCUMENT)[None], CU_SEQLENS: borders}


@contextlib.contextmanager
def side(name: str, length: int) -> Iterator[None]:
    blocks: dict[str, Any] = {
        PLAIN: contextlib.nullcontext,
        MASK: lambda: attn_mask.skip_policy("never"),
        IDS: lambda: attn_mask.packed(document_ids=packings(length)[IDS]),
        CU_SEQLENS: lambda: attn_mask.packed(cu_seqlens=packings(length)[CU_SEQLENS]),
    }
    with blocks[name]():
        yield


def call(function: str, implementation: str, cache: str, q: int, kv: int) -> Callable[[], Any]:
    """The create function, as a model calls it in one step."""
    local = {"window": {"sliding_window": 4 * kv}, "chunks": {"attention_chunk_size": 4 * kv}}
    of_model = config(implementation)
    if cache == "static":
        states = transformers.StaticCache(config=of_model, max_cache_len=kv)
    else:
        states = transformers.DynamicCache(config=of_model)
    if kv > q:
        seen = torch.zeros(1, 1, kv - q, 64)
        states.update(seen, seen, 0)
    of_model = config(implementation, **local.get(function, {}))
    embeds = torch.zeros(1, q, 64)
    positions = torch.arange(kv - q, kv)[None]
    create = getattr(masking_utils, FUNCTIONS[function])
    return lambda: create(of_model, embeds, None, states, position_ids=positions)


def check(step: Callable[[], Any], q: int, kv: int) -> None:
    ids = packings(kv)[IDS]
    rule = attn_mask.causal() & attn_mask.documents(ids)
    want = attn_mask.boolean(rule, 1, q, kv, q_offset=kv - q)
    for name in (IDS, CU_SEQLENS):
        with side(name, kv):
            got = step()
        if got.dtype != torch.bool:
            got = got == 0
        if not torch.equal(got, want):
            raise SystemExit(f"{name}: the mask is wrong")


def in_turn(step: Callable[[], Any], kv: int, rounds: int, calls: int) -> dict[str, float]:
    """The least time of a call, of this thread alone: what else runs does not count."""
    times: dict[str, list[float]] = {name: [] for name in (PLAIN, MASK, IDS, CU_SEQLENS)}
    for _ in range(rounds):
        for name, measured in times.items():
            with side(name, kv):
                step()
                start = time.thread_time()
                for _ in range(calls):
                    step()
                measured.append((time.thread_time() - start) / calls)
    return {name: min(measured) for name, measured in times.items()}


def decode(rounds: int) -> Iterator[dict[str, Any]]:
    for function in FUNCTIONS:
        for implementation in ("eager", "sdpa"):
            for cache in ("dynamic", "static"):
                step = call(function, implementation, cache, 1, 4096)
                if function != "chunks":
                    check(step, 1, 4096)
                seconds = in_turn(step, 4096, rounds, 500)
                more = max(seconds[IDS], seconds[CU_SEQLENS]) - seconds[PLAIN]
                yield {
                    "name": f"decode 1 x 4096, {function}, {implementation}, {cache}",
                    "seconds": seconds,
                    "passed": more <= 15e-6,
                    "target": f"{more * 1e6:+.1f} µs to the call without (≤ 15)",
                }


def prefill(rounds: int) -> Iterator[dict[str, Any]]:
    """Beside the model, which has to attend by that mask in either case."""
    length = 8192
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 512}
    of_model = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaModel._from_config(of_model, attn_implementation="sdpa").eval()
    tokens = torch.randint(100, (1, length))
    rule = attn_mask.causal() & attn_mask.documents(packings(length)[IDS])
    given = attn_mask.boolean(rule, 1, length, length)
    step = call("causal", "sdpa", "dynamic", length, length)
    check(step, length, length)
    seconds = in_turn(step, length, rounds, 3)
    with torch.no_grad():
        model(tokens, attention_mask=given)
        start = time.thread_time()
        model(tokens, attention_mask=given)
        seconds["model"] = time.thread_time() - start
    more = max(seconds[IDS], seconds[CU_SEQLENS]) - seconds[MASK]
    share = more / seconds["model"]
    yield {
        "name": f"prefill 1 x {length}, causal, sdpa",
        "seconds": seconds,
        "passed": share <= 0.01,
        "target": f"{share:+.2%} of two layers with the mask of a rule (≤ 1 %)",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    console = wide_console()
    console.print(where)
    table = Table("case", PLAIN, MASK, IDS, CU_SEQLENS, "target", "")
    with attn_mask.installed():
        results = [*decode(options.rounds), *prefill(options.rounds)]
    for result in results:
        times = [time_text(result["seconds"][name]) for name in (PLAIN, MASK, IDS, CU_SEQLENS)]
        table.add_row(result["name"], *times, result["target"], verdict(result["passed"]))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({**where, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
