"""``python -m attn_mask bench``: our masks and transformers', timed on this machine's CPU."""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

import attn_mask
from attn_mask import masking_utils
from attn_mask.profiling import table


class _Case(NamedTuple):
    """A mask as transformers asks for it."""

    name: str
    batch_size: int
    q_length: int
    kv_length: int
    window: int | None = None
    left_padding: int = 0
    is_eager: bool = False

    def sizes(self) -> str:
        return f"{self.batch_size} x {self.q_length} x {self.kv_length}"

    def call(self, of: ModuleType) -> Callable[[], torch.Tensor]:
        """Makes the mask by the functions of a masking_utils."""
        write = of.eager_mask if self.is_eager else of.sdpa_mask
        offset = self.kv_length - self.q_length
        arguments: dict[str, Any] = {
            "batch_size": self.batch_size,
            "kv_length": self.kv_length,
            "mask_function": of.causal_mask_function
            if self.window is None
            else of.sliding_window_causal_mask_function(self.window),
        }
        # Until 5.3 positions instead of a length and an offset.
        if "cache_position" in inspect.signature(write).parameters:
            arguments["cache_position"] = torch.arange(offset, self.kv_length)
        else:
            arguments |= {"q_length": self.q_length, "q_offset": offset}
        if self.is_eager:
            arguments["dtype"] = torch.float32
        else:
            arguments["allow_is_causal_skip"] = False
        if self.left_padding:
            shown = torch.ones(self.batch_size, self.kv_length, dtype=torch.bool)
            shown[0, : self.left_padding] = False
            arguments["attention_mask"] = shown
        return lambda: write(**arguments)


def _cases(quick: bool) -> list[_Case]:
    n, batch_size = (64, 2) if quick else (2048, 4)
    left = n // 8
    return [
        _Case("causal", 1, n, n),
        _Case("causal, padded", batch_size, n, n, left_padding=left),
        _Case("window, padded", batch_size, n, n, n // 4, left_padding=left),
        _Case("window, additive", batch_size, n, n, n // 4, is_eager=True, left_padding=left),
        _Case("a step of decoding", batch_size, 1, n, left_padding=left),
    ]


def _transformers() -> tuple[ModuleType | None, str]:
    """Its masking_utils and its release, or None and why not."""
    try:
        version = importlib.import_module("transformers").__version__
        return importlib.import_module("transformers.masking_utils"), f"transformers {version}"
    except ImportError as error:
        return None, f"without transformers to compare with ({error})"


def _milliseconds(call: Callable[[], torch.Tensor], seconds: float) -> float:
    # In one thread, as Timer does it: where another program is busy, threads wait for each other
    # for longer than a mask takes.
    timer = Timer("call()", globals={"call": call})
    return float(timer.blocked_autorange(min_run_time=seconds).median) * 1e3


def bench(quick: bool) -> int:
    """Prints a table; the progress is on stderr. 1 where results differ, which are not timed."""
    theirs, release = _transformers()
    seconds = 0.002 if quick else 1.0
    cases = _cases(quick)
    rows = [["mask", "batch x q x kv", "attn_mask", "transformers", "ratio"]]
    differ = []
    for number, case in enumerate(cases, 1):
        ours = case.call(masking_utils)
        row = [case.name, case.sizes()]
        if theirs is not None and not torch.equal(ours(), case.call(theirs)()):
            differ.append(case.name)
            row += ["differ", "differ", ""]
        else:
            times = [_milliseconds(ours, seconds)]
            if theirs is not None:
                times.append(_milliseconds(case.call(theirs), seconds))
            row += [f"{time:.3f}" for time in times]
            row += ["-", "-"] if theirs is None else [f"{times[1] / times[0]:.1f}"]
        rows.append(row)
        print(f"bench {number * 100 // len(cases):3}% {case.name}", file=sys.stderr)
    print(f"attn_mask {attn_mask.__version__} and {release}: median ms, one thread")
    print("\n".join(table(rows)))
    if differ:
        print(f"not as in {release}: {', '.join(differ)}")
    return 1 if differ else 0
