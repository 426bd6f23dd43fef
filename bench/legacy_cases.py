"""The calls that timings, peak memory and the demo share, and their check against transformers."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

OURS, UPSTREAM, YARDSTICK = SIDES = ("attn_mask", "transformers", "yardstick")

FULL = "torch.full(written, 1.0, dtype=dtype)"
FILL = "out.fill_(1.0)"
CLONE = "additive.clone()"
COPY = "copy.copy_(long_mask)"


@cache
def legacy_module(side: str) -> ModuleType:
    """Ours; or the file of the last transformers that had it, which is fetched the first time."""
    if side == OURS:
        return importlib.import_module("attn_mask.modeling_attn_mask_utils")
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    return importlib.import_module("oracle_loader").load_last_attn()


@dataclass(frozen=True)
class Case:
    """One call, written once and evaluated with the `utils` module of either side.

    Besides `utils` and `masking` a call sees `ops`, `mask` (int64 [batch, kv], left-padded),
    `long_mask` (the same, all ones), `embeds` ([batch, q, 1]), `additive` (a mask to be unmasked),
    `out` (memory for the result), `dtype`, `device`, `batch`, `q` and `kv`; the yardstick sees
    `dtype`, `written`, `out`, `additive`, `long_mask` and `copy` (memory for one).
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
    compiles: str = ""  # the function that upstream's `compiled` is
    at_most: float = 1.15  # times the yardstick
    plus: float = 0.0  # and so many seconds
    at_least: float = 0.0  # times as fast as transformers

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.batch} x {self.q} x {self.kv} {dtype}"

    @property
    def yardstick_name(self) -> str:
        names = {FULL: "torch.full", FILL: "fill_", CLONE: "clone", COPY: "copy_"}
        return names.get(self.yardstick, self.yardstick)

    @property
    def reads_mask(self) -> bool:
        return "mask" in compile(self.call, "<case>", "eval").co_names

    @property
    def written(self) -> torch.Size:
        """What is in memory: without a padding mask both sides expand the batch with stride 0."""
        names = compile(self.call, "<case>", "eval").co_names
        is_whole = self.reads_mask or "out" in names or "additive" in names
        return torch.Size((self.batch if is_whole else 1, 1, self.q, self.kv))

    @property
    def output_bytes(self) -> int:
        return self.written.numel() * self.dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """What a call has to write and read at least."""
        if self.yardstick == COPY:
            return self.batch * self.kv * torch.int64.itemsize
        return self.output_bytes + self.reads_mask * self.batch * self.kv * torch.int64.itemsize

    def expression(self, side: str) -> str:
        if side == YARDSTICK:
            return self.yardstick
        return (side == UPSTREAM and self.upstream_call) or self.call

    def namespace(self, side: str) -> dict[str, Any]:
        """What the expression of that side sees; imports no more than that side's library."""
        names: dict[str, Any] = {"torch": torch, "dtype": self.dtype}
        if side == YARDSTICK:
            names |= {"written": self.written} | self._memory()
            if "copy" in self.yardstick:
                names["copy"] = torch.empty(self.batch, self.kv, dtype=torch.int64)
            return names
        names["utils"] = legacy_module(side)
        names["masking"] = importlib.import_module(f"{side}.masking_utils")
        names["ops"] = torch.ops.attn_mask
        if side == UPSTREAM:  # every function of that file warns that it is deprecated
            warnings.filterwarnings("ignore", category=FutureWarning)
        else:
            names["rules"] = importlib.import_module(f"{side}.rules")
        if side == UPSTREAM and self.compiles:
            names["compiled"] = torch.compile(getattr(names["utils"], self.compiles))
        return (
            names
            | self._memory()
            | {
                "mask": padding_mask(self.batch, self.kv),
                "embeds": torch.zeros(self.batch, self.q, 1, dtype=self.dtype),
                "device": torch.device("cpu"),
                "batch": self.batch,
                "q": self.q,
                "kv": self.kv,
            }
        )

    def _memory(self) -> dict[str, Any]:
        """What the call, or its yardstick, is given to read or to write into."""
        names: dict[str, Any] = {}
        used = f"{self.call} {self.yardstick}"
        if "out" in used:
            names["out"] = torch.zeros(self.written, dtype=self.dtype)
        if "additive" in used:
            closed = padding_mask(self.batch, self.kv)[:, None, None, :] == 0
            low = torch.finfo(self.dtype).min
            additive = torch.zeros(self.written, dtype=self.dtype).masked_fill_(closed, low)
            names["additive"] = additive.masked_fill_(torch.arange(self.q)[:, None] % 7 == 0, low)
        if "long_mask" in used:
            names["long_mask"] = torch.ones(self.batch, self.kv, dtype=torch.int64)
        return names

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
    ours, theirs = case.run(OURS), case.run(UPSTREAM)
    if isinstance(theirs, bool):
        if ours != theirs:
            raise AssertionError(f"{case.title}: {ours}, not {theirs}")
        return
    problem = difference(ours, theirs)
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


# Outputs of 16 MB and more: name, call, operator with `out`, batch, length.
LARGE = (
    (
        "to_4d",
        _to_4d(None),
        "to_4d.out(mask, q, key_value_length=kv, out=out)",
        *(4, 2048),
    ),
    (
        "to_4d, window 1024",
        _to_4d(1024),
        "to_4d.out(mask, q, key_value_length=kv, sliding_window=1024, out=out)",
        *(4, 2048),
    ),
    ("to_causal_4d", _to_causal_4d(None), "to_causal_4d.out(batch, q, kv, out=out)", *(4, 4096)),
    (
        "to_causal_4d, window 1024",
        _to_causal_4d(1024),
        "to_causal_4d.out(batch, q, kv, sliding_window=1024, out=out)",
        *(4, 4096),
    ),
    (
        "_expand_mask",
        "utils.AttentionMaskConverter._expand_mask(mask, dtype, q)",
        "_expand_mask.out(mask, q, out=out)",
        *(4, 2048),
    ),
    (
        "_prepare_4d_causal, window 512",
        _prepare(512),
        "_prepare_4d_causal_attention_mask.out(mask, (batch, q), embeds, kv - q, 512, out=out)",
        *(8, 1024),
    ),
)


def _faster(dtype: torch.dtype) -> float:
    """How many times as fast as upstream a fresh mask is to be."""
    return 15.0 if dtype.itemsize == 2 else 6.0


def large_cases(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """New tensors: as fast as memory is filled."""
    return [
        Case(name, "large", call, dtype, batch, n, n, at_most=1.05, at_least=_faster(dtype))
        for name, call, _, batch, n in LARGE
        for dtype in dtypes
    ]


def out_cases(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Into memory of the caller's. Upstream, which has no such thing, makes a new tensor."""
    cases = [
        Case(
            f"{name}, out",
            "out",
            f"(ops.{into}, out)[1]",
            dtype,
            batch,
            n,
            n,
            upstream_call=call,
            yardstick=FILL,
            at_least=25.0 if "to_causal" not in name else 0.0,  # upstream writes one batch row
        )
        for name, call, into, batch, n in LARGE
        for dtype in dtypes
    ]
    sdpa = "masking.sdpa_mask(batch, q, kv, attention_mask=mask.bool(), allow_is_causal_skip=False)"
    rule = "*(rules.causal() & rules.padding(mask)).encode()"
    rule = f"ops.boolean.out({rule}, batch, q, kv, out=out)"
    call, sizes = f"({rule}, out)[1]", (4, 2048, 2048)
    boolean = Case("boolean, causal & padding, out", "out", call, torch.bool, *sizes)
    return [*cases, replace(boolean, upstream_call=sdpa, yardstick=FILL, at_least=25.0)]


def unmask_cases(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """One pass, as a clone is."""
    unmask = "utils.AttentionMaskConverter._unmask_unattended(additive, torch.finfo(dtype).min)"
    case = Case("_unmask_unattended", "unmask", unmask, torch.float32, 4, 2048, 2048)
    return [replace(case, dtype=dtype, yardstick=CLONE, at_most=1.2) for dtype in dtypes]


def ignore_cases() -> list[Case]:
    """The look at a mask, which reads it once."""
    ignore = "utils.AttentionMaskConverter._ignore_causal_mask_sdpa({}, embeds, kv - q)"
    return [
        Case(
            "_ignore_causal_mask_sdpa, all ones",
            "look",
            ignore.format("long_mask"),
            torch.float32,
            *(64, 1, 131072),
            yardstick=COPY,
            at_most=1.0,
        ),
        Case(
            "_ignore_causal_mask_sdpa, a zero first",
            "look",
            ignore.format("mask"),
            torch.float32,
            *(64, 1, 131072),
            yardstick="long_mask[0, :1].clone()",
            at_most=10.0,
        ),
    ]


def compiled_cases() -> list[Case]:
    """Upstream under torch.compile."""
    function = "_prepare_4d_causal_attention_mask"
    arguments = "mask, (batch, q), embeds, kv - q"
    fresh = Case(
        "prepare, upstream compiled",
        "compiled",
        f"utils.{function}({arguments})",
        torch.float32,
        *(4, 2048, 2048),
        upstream_call=f"compiled({arguments})",
        compiles=function,
        at_most=1.05,
        at_least=2.0,
    )
    into = f"(ops.{function}.out({arguments}, out=out), out)[1]"
    out = replace(fresh, name="prepare, out, upstream compiled", call=into, yardstick=FILL)
    return [fresh, replace(out, at_most=1.15, at_least=10.0)]


def decode_cases() -> list[Case]:
    """One query against a long cache: 64 kB, where the fixed cost of a call shows."""
    calls = {
        "_prepare_4d_causal": _prepare(None),
        "_prepare_4d_causal, window 1024": _prepare(1024),
        "_prepare_4d_causal_for_sdpa": _prepare(None, "_for_sdpa"),
    }
    return [
        Case(name, "decode", call, torch.bfloat16, 8, 1, 4096, at_most=3.0)
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
            name,
            "small",
            call,
            torch.float32,
            *(1, 8, 8),
            *upstream,
            at_most=1.5,
            plus=0.0 if name.startswith("torch.ops") else 3e-6,
        )
        for name, (call, *upstream) in calls.items()
    ]
