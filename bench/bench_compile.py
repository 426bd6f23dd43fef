"""What masks cost in compiled models: nodes of graphs, seconds of compiling, calls in a graph."""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import attn_mask
import torch
import transformers
from attn_mask import rules
from bench_legacy import environment
from legacy_cases import wide_console
from rich.table import Table
from torch.utils.benchmark import Timer
from transformers import masking_utils

STOCK, OURS = "transformers", "attn_mask"
SIDES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    STOCK: nullcontext,
    OURS: attn_mask.installed,
}
CREATE = {"Llama": "create_causal_mask", "Mistral": "create_sliding_window_causal_mask"}


def config(name: str, implementation: str) -> Any:
    kind = getattr(transformers, f"{name}Config")
    made = kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"sliding_window": 8} if name == "Mistral" else {}),
    )
    made._attn_implementation = implementation
    return made


class Graphs:
    """Inductor, after counting what it gets."""

    def __init__(self) -> None:
        self.nodes = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.op.startswith("call_")]
        self.nodes += len(calls)
        return torch._dynamo.lookup_backend("inductor")(graph, examples)


def mask_code(name: str, implementation: str) -> Callable[..., Any]:
    of_model = config(name, implementation)

    def create(embeds: torch.Tensor, padding: torch.Tensor) -> Any:
        return getattr(masking_utils, CREATE[name])(
            config=of_model, inputs_embeds=embeds, attention_mask=padding, cache=None
        )

    return create


def whole_model(name: str, implementation: str) -> Callable[..., Any]:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(name, implementation)).eval()

    def forward(embeds: torch.Tensor, padding: torch.Tensor) -> Any:
        return model(inputs_embeds=embeds, attention_mask=padding, use_cache=False).logits

    return forward


def compile_once(function: Callable[..., Any]) -> tuple[int, float, Any]:
    """(nodes, seconds, result) of a first call, with no cache to help."""
    torch._dynamo.reset()
    gc.collect()
    graphs = Graphs()
    compiled = torch.compile(function, backend=graphs, fullgraph=True, dynamic=True)
    padding = torch.ones(2, 48, dtype=torch.long)
    padding[0, :5] = 0
    embeds = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    result = compiled(embeds, padding)
    return graphs.nodes, time.perf_counter() - start, result


def compiling() -> list[dict[str, Any]]:
    rows = []
    # Compiling a model takes a while; by then imports are warm.
    for what, make, rounds in (("mask code", mask_code, 4), ("model", whole_model, 1)):
        for name in CREATE:
            for implementation in ("sdpa", "eager"):
                seconds: dict[str, list[float]] = {side: [] for side in SIDES}
                nodes: dict[str, int] = {}
                results = {}
                for _ in range(rounds):
                    for side, around in SIDES.items():
                        with around():
                            function = make(name, implementation)
                            nodes[side], took, results[side] = compile_once(function)
                        seconds[side].append(took)
                torch.testing.assert_close(results[OURS], results[STOCK])
                rows.append(
                    {
                        "what": f"{name}, {implementation}: {what}",
                        "nodes": nodes,
                        "seconds": {side: median(took[-3:]) for side, took in seconds.items()},
                    }
                )
    return rows


def micro(call: Callable[[], Any]) -> float:
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median * 1e6


def in_a_graph() -> list[dict[str, Any]]:
    """A mask in a compiled function, against the same operator called by itself."""
    padding = torch.ones(2, 64, dtype=torch.bool)
    padding[0, :5] = False
    code, _ = (rules.causal() & rules.padding(padding)).encode()
    operators = torch.ops.attn_mask
    calls = {
        "boolean": lambda mask: operators.boolean(code, [mask], 2, 64, 64),
        "to_4d": lambda mask: operators.to_4d(mask, 64, dtype=torch.float32, key_value_length=64),
        "sdpa_mask": lambda mask: attn_mask.masking_utils.sdpa_mask(2, 64, 64, attention_mask=mask),
    }
    rows = []
    for name, call in calls.items():
        torch._dynamo.reset()
        compiled = torch.compile(lambda mask, call=call: (call(mask), mask + mask), fullgraph=True)
        without = torch.compile(lambda mask: (mask + mask,), fullgraph=True)
        compiled(padding), without(padding)
        times: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(5):
            times["eager"].append(micro(lambda call=call: call(padding)))
            whole = micro(lambda compiled=compiled: compiled(padding))
            times["compiled"].append(whole - micro(lambda without=without: without(padding)))
        row: dict[str, Any] = {key: median(values) for key, values in times.items()}
        rows.append({"call": name, **row, "passed": row["compiled"] - row["eager"] <= 1})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="dynamo_pgo")
    torch._inductor.config.force_disable_caches = True
    transformers.logging.set_verbosity_error()
    found = {
        **environment(),
        "compiling": compiling(),
        "cases": in_a_graph(),
    }
    table = Table("", "nodes", "transformers'", "seconds", "transformers'")
    for row in found["compiling"]:
        nodes, seconds = row["nodes"], row["seconds"]
        table.add_row(
            row["what"],
            *(str(nodes[side]) for side in (OURS, STOCK)),
            *(f"{seconds[side]:.2f}" for side in (OURS, STOCK)),
        )
    calls = Table("in a compiled function", "adds", "by itself", "more")
    for row in found["cases"]:
        calls.add_row(
            row["call"],
            *(f"{row[key]:.1f} us" for key in ("compiled", "eager")),
            f"{row['compiled'] - row['eager']:+.1f} us",
        )
    console = wide_console()
    console.print(table)
    console.print(calls)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
