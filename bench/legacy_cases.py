"""The calls that timings, peak memory and the demo share, and their check against transformers."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

OURS, UPSTREAM, YARDSTICK = SIDES = ("attn_mask", "transformers", "yardstick")

FULL = "torch.full(written, 1.0, dtype=dtype)"
X_PLUS_1 = "x + 1"


@dataclass(frozen=True)
class Case:
    """One call, written once and evaluated with the `utils` module of either side.

    Besides `utils` a call sees `ops`, `mask` (int64 [batch, kv], left-padded), `embeds`
    ([batch, q, 1]), `dtype`, `device`, `batch`, `q` and `kv`; the yardstick sees `dtype`, `written`
    and `x`.
    """

    name: str
    group: str
    call: str
    dtype: torch.dtype
    batch: int
    q: int
    kv: int
    upstream_call: str = ""  # where it differs from `call`
    yardstick: str = FULL
    at_most: float = 1.15  # times the yardstick
    at_least: float = 0.0  # times as fast as transformers

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.batch} x {self.q} x {self.kv} {dtype}"

    @property
    def yardstick_name(self) -> str:
        return "torch.full" if self.yardstick == FULL else self.yardstick

    @property
    def reads_mask(self) -> bool:
        return "mask" in compile(self.call, "<case>", "eval").co_names

    @property
    def written(self) -> torch.Size:
        """What is in memory: without a padding mask both sides expand the batch with stride 0."""
        return torch.Size((self.batch if self.reads_mask else 1, 1, self.q, self.kv))

    @property
    def output_bytes(self) -> int:
        return self.written.numel() * self.dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """What a call has to write and read at least."""
        return self.output_bytes + self.reads_mask * self.batch * self.kv * torch.int64.itemsize

    def expression(self, side: str) -> str:
        if side == YARDSTICK:
            return self.yardstick
        return (side == UPSTREAM and self.upstream_call) or self.call

    def namespace(self, side: str) -> dict[str, Any]:
        """What the expression of that side sees; imports no more than that side's library."""
        names: dict[str, Any] = {"torch": torch, "dtype": self.dtype}
        if side == YARDSTICK:
            return names | {"written": self.written, "x": torch.ones(8)}
        names["utils"] = importlib.import_module(f"{side}.modeling_attn_mask_utils")
        names["ops"] = torch.ops.attn_mask
        if side == UPSTREAM:  # every function of that file warns that it is deprecated
            warnings.filterwarnings("ignore", category=FutureWarning)
        return names | {
            "mask": padding_mask(self.batch, self.kv),
            "embeds": torch.zeros(self.batch, self.q, 1, dtype=self.dtype),
            "device": torch.device("cpu"),
            "batch": self.batch,
            "q": self.q,
            "kv": self.kv,
        }

    def run(self, side: str) -> torch.Tensor:
        return eval(self.expression(side), self.namespace(side))


def padding_mask(batch: int, length: int) -> torch.Tensor:
    """An int64 mask, left-padded: a quarter of the last row, less in those before."""
    start = torch.arange(1, batch + 1)[:, None] * length // (4 * batch)
    return (torch.arange(length) >= start).long()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """How two masks differ in dtype, shape or any bit (0.0 is not -0.0); None when they do not."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"{ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    if torch.equal(ours.view(bits), theirs.view(bits)):
        return None
    at = (ours.view(bits) != theirs.view(bits)).nonzero()
    first = tuple(at[0].tolist())
    return f"{len(at)} elements differ; at {first} {ours[first]}, not {theirs[first]}"


def check(case: Case) -> None:
    """Raises when the sides differ in a single bit, or when ours occupies more than it must."""
    ours = case.run(OURS)
    problem = difference(ours, case.run(UPSTREAM))
    occupied = ours.untyped_storage().nbytes()
    if problem is None and occupied != case.output_bytes:
        problem = f"the mask occupies {occupied} bytes, not {case.output_bytes}"
    if problem is not None:
        raise AssertionError(f"{case.title}: {problem}")


@contextmanager
def default_dtype_for(case: Case) -> Iterator[None]:
    """Upstream's float64 causal masks raise unless float64 is the default dtype; ours do not."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if case.dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def verdict(passed: bool) -> str:
    return "[green]pass[/]" if passed else "[bold red]MISS[/]"


def wide_console() -> Console:
    """A pipe or a file has no width: rich would assume 80 columns and fold the cells."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def _to_4d(window: int | None) -> str:
    converter = f"utils.AttentionMaskConverter(True, sliding_window={window})"
    return f"{converter}.to_4d(mask, q, key_value_length=kv, dtype=dtype)"


def _to_causal_4d(window: int | None) -> str:
    converter = f"utils.AttentionMaskConverter(True, sliding_window={window})"
    return f"{converter}.to_causal_4d(batch, q, kv, dtype=dtype)"


def _prepare(window: int | None, suffix: str = "") -> str:
    function = f"utils._prepare_4d_causal_attention_mask{suffix}"
    return f"{function}(mask, (batch, q), embeds, kv - q, {window})"


def large_cases(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Outputs of 16 MB and more: as fast as memory is filled, five times as fast as upstream."""
    calls = {
        "to_4d": (_to_4d(None), 4, 2048),
        "to_4d, window 1024": (_to_4d(1024), 4, 2048),
        "to_causal_4d": (_to_causal_4d(None), 4, 4096),
        "to_causal_4d, window 1024": (_to_causal_4d(1024), 4, 4096),
        "_expand_mask": ("utils.AttentionMaskConverter._expand_mask(mask, dtype, q)", 4, 2048),
        "_prepare_4d_causal, window 512": (_prepare(512), 8, 1024),
    }
    return [
        Case(name, "large", call, dtype, batch, length, length, at_least=5.0)
        for name, (call, batch, length) in calls.items()
        for dtype in dtypes
    ]


def decode_cases() -> list[Case]:
    """One query against a long cache: 64 kB, where the fixed cost of a call shows."""
    calls = {
        "_prepare_4d_causal": _prepare(None),
        "_prepare_4d_causal, window 1024": _prepare(1024),
        "_prepare_4d_causal_for_sdpa": _prepare(None, "_for_sdpa"),
    }
    return [
        Case(name, "decode", call, torch.bfloat16, 8, 1, 4096, at_most=4.0)
        for name, call in calls.items()
    ]


def small_cases() -> list[Case]:
    """Nothing but the cost of a call: through the Python layer, and through torch.ops."""
    expand = "utils._prepare_4d_attention_mask(mask, dtype, q)"
    create = "utils._create_4d_causal_attention_mask((batch, q), dtype, device)"
    calls = {
        "_prepare_4d_causal": (_prepare(None),),
        "_prepare_4d_causal_for_sdpa": (_prepare(None, "_for_sdpa"),),
        "_prepare_4d": (expand,),
        "_create_4d_causal": (create,),
        "to_4d": (_to_4d(None),),
        "torch.ops _prepare_4d_causal": (_prepare(None).replace("utils", "ops"), _prepare(None)),
        "torch.ops _prepare_4d": ("ops._prepare_4d_attention_mask(mask, q, dtype=dtype)", expand),
        "torch.ops to_4d": ("ops.to_4d(mask, q, dtype=dtype, key_value_length=kv)", _to_4d(None)),
    }
    return [
        Case(
            name, "small", call, torch.float32, 1, 8, 8, *upstream, yardstick=X_PLUS_1, at_most=3.2
        )
        for name, (call, *upstream) in calls.items()
    ]
