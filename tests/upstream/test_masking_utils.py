"""attn_mask.masking_utils gives what the file of the same name in transformers gives.

A comparison makes one call on both modules, `same(lambda m: m.function(...))`. What goes beyond
upstream is near the end, against references of its own.
"""

import copy
import functools
import inspect
import itertools
import json
import linecache
import random
import subprocess
import sys
import traceback
import types
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import oracle_loader
import pytest
import torch
from attn_mask import masking_utils as ours
from attn_mask._transformers import UPSTREAM
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import OUT_DTYPES, assert_same_mask, describe, lowest
from oracle_loader import Config
from rule_reference import builders, grid, rising, some_table
from torch._subclasses import FakeTensorMode

FLOAT = torch.float32

CREATE_CAUSAL = (
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
)
CREATE_BIDIRECTIONAL = ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")
CREATE = CREATE_CAUSAL + CREATE_BIDIRECTIONAL
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "paged|sdpa")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def upstream():
    module = pytest.importorskip(
        "transformers.masking_utils",
        reason="transformers, which the results are compared with, is not installed",
    )
    # Not a skip, which would hide that nothing is compared.
    assert version("transformers") == UPSTREAM, f"results are compared with those of {UPSTREAM}"
    return module


def embeds(batch_size, q_length, dtype=FLOAT):
    return torch.zeros(batch_size, q_length, 4, dtype=dtype)


def outcome(call, module):
    try:
        return call(module), None
    except Exception as error:
        return None, error


BLOCK_MASK_FIELDS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def is_block_mask(value):
    return type(value).__name__ == "BlockMask"


def assert_same(got, want):
    """The same masks, numbers and containers, bit by bit."""
    __tracebackhide__ = True
    if is_block_mask(want):
        assert is_block_mask(got), f"got {describe(got)}"
        assert got.shape == want.shape
        assert got.BLOCK_SIZE == want.BLOCK_SIZE
        for field in BLOCK_MASK_FIELDS:
            assert_same(getattr(got, field), getattr(want, field))
    elif isinstance(want, torch.Tensor) or want is None:
        assert_same_mask(got, want)
    elif isinstance(want, dict):
        assert type(got) is dict and set(got) == set(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, tuple | list):
        assert type(got) is type(want) and len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert (type(got), got) == (type(want), want)


class Parity:
    """Makes one call on upstream's module and on ours, and compares what they give or raise."""

    def __init__(self, upstream):
        self.upstream = upstream

    def __call__(self, call):
        __tracebackhide__ = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want, expected = outcome(call, self.upstream)
        got, error = outcome(call, ours)
        if expected is not None:
            assert error is not None, f"upstream raises {expected!r}, ours gives {describe(got)}"
            self._assert_same_error(error, expected)
        elif error is not None:
            raise AssertionError(f"upstream gives {describe(want)}, ours raises") from error
        else:
            assert_same(got, want)
        return got

    def _assert_same_error(self, error, expected):
        frames = traceback.extract_tb(expected.__traceback__)
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno).lstrip()
        if line.startswith("raise ") and last.filename in (self.upstream.__file__, __file__):
            # On purpose: upstream, or the user's own mask function.
            assert (type(error), str(error)) == (type(expected), str(expected))
        else:
            # torch, or Python, failed inside upstream's code.
            allowed = (ValueError, TypeError, type(expected))
            if type(expected) is RuntimeError:
                allowed = allowed[:2]
            assert isinstance(error, allowed), f"upstream raises {expected!r}, ours {error!r}"
            assert str(error)


@pytest.fixture(scope="session")
def same(upstream):
    return Parity(upstream)


# Names and signatures


def defined_names(module):
    return {
        name
        for name, value in vars(module).items()
        if (inspect.isroutine(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def public_functions(module):
    private = {"_preprocess_mask_arguments"}
    return sorted(
        name
        for name in defined_names(module)
        if (not name.startswith("_") or name in private) and name != "AttentionMaskInterface"
    )


def test_no_name_of_upstream_is_missing(upstream):
    names = public_functions(upstream)
    assert {"create_causal_mask", "sdpa_mask", "blockwise_overlay", "fast_all"} < set(names)
    others = [
        "AttentionMaskInterface",
        "ALL_MASK_ATTENTION_FUNCTIONS",
        "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING",
    ]
    missing = [name for name in names + others if not hasattr(ours, name)]
    assert not missing


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures(upstream):
    """Upstream's parameters in upstream's order; more only as keywords."""
    keyword_kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    functions = {"causal_mask_function": ours.causal_mask_function}
    for name in public_functions(upstream):
        if name == "bidirectional_mask_function" or name in functions:
            continue
        theirs, mine = parameters(getattr(upstream, name)), parameters(getattr(ours, name))
        renamed = [
            # The default is each module's own object.
            (n, kind, getattr(ours, default.__name__) if inspect.isfunction(default) else default)
            for n, kind, default in theirs
        ]
        positional = [p for p in renamed if p[1] not in keyword_kinds]
        assert mine[: len(positional)] == positional, name
        extra = mine[len(positional) :]
        assert all(kind in keyword_kinds for _, kind, _ in extra), name
        for parameter in renamed[len(positional) :]:
            assert parameter in extra or any(kind == keyword_kinds[1] for _, kind, _ in extra), name


def test_layer_patterns(upstream):
    def shape(mapping):
        def name(value):
            if isinstance(value, dict):
                return shape(value)
            if isinstance(value, functools.partial):
                return value.func.__name__, value.args, value.keywords
            return value.__name__

        return {pattern: name(value) for pattern, value in mapping.items()}

    mapping = ours.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    assert shape(mapping) == shape(upstream.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)
    assert mapping["full_attention"] is ours.create_causal_mask


# Small functions

IDS = st.lists(st.integers(-2, 4), min_size=1, max_size=8)


@st.composite
def tables(draw, values, batch_size=None, length=None):
    """An int64 tensor [b, n]."""
    batch_size = draw(st.integers(1, 3)) if batch_size is None else batch_size
    length = draw(st.integers(1, 9)) if length is None else length
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    rows = [[rng.choice(values) for _ in range(length)] for _ in range(batch_size)]
    return torch.tensor(rows, dtype=torch.int64).reshape(batch_size, length)


def packed_row(rng, length):
    row = []
    while len(row) < length:
        row += range(rng.randint(1, length))
    return row[:length]


@st.composite
def position_tables(draw, batch_size, length):
    """Position ids [b or 1, n]: counted through, from anywhere, packed, or anything."""
    kind = draw(st.sampled_from(["arange", "later", "packed", "packed", "packed", "random"]))
    rng = random.Random(draw(st.integers(0, 2**31)))
    rows = draw(st.sampled_from([batch_size, 1]))
    start = {"later": rng.randint(1, 9)}.get(kind, 0)
    if kind == "packed":
        table = [packed_row(rng, length) for _ in range(rows)]
    elif kind == "random":
        table = [[rng.randint(0, length) for _ in range(length)] for _ in range(rows)]
    else:
        table = [list(range(start, start + length))] * rows
    return torch.tensor(table, dtype=torch.int64).reshape(rows, length)


@settings(max_examples=150)
@given(st.data(), st.integers(1, 3), st.integers(1, 9))
def test_find_packed_sequence_indices(same, data, batch_size, length):
    positions = data.draw(position_tables(batch_size, length))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.float32]))
    same(lambda m: m.find_packed_sequence_indices(positions.to(dtype)))


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (2, 1), (0, 0)], ids=str)
def test_find_packed_sequence_indices_of_few(same, shape):
    same(lambda m: m.find_packed_sequence_indices(torch.zeros(shape, dtype=torch.int64)))


def test_find_packed_sequence_indices_while_tracing(upstream):
    """The values may not be read, so there is always a mask."""
    for module in (upstream, ours):
        with FakeTensorMode() as mode:
            got = module.find_packed_sequence_indices(mode.from_tensor(torch.arange(4)[None]))
        assert got.shape == (1, 4) and got.dtype == torch.int64


def test_prepare_padding_mask(same):
    for kv_length, kv_offset, length in itertools.product((0, 3, 5), (0, 2), (0, 3, 6, 9)):
        for dtype in (torch.bool, torch.int64, torch.float16):
            mask = torch.ones(2, length).to(dtype)
            got = same(lambda m, a=(mask, kv_length, kv_offset): m.prepare_padding_mask(*a))
            if length >= kv_length + kv_offset:
                assert got is mask
    assert ours.prepare_padding_mask(None, 4, 1) is None


def test_maybe_pad_block_sequence_ids(same):
    for kv_length, kv_offset, length in itertools.product((0, 3, 5), (0, 2), (0, 3, 6, 9)):
        for dtype in (torch.int64, torch.int32):
            ids = torch.arange(length).expand(2, length).to(dtype)
            arguments = (ids, None, kv_length, kv_offset)
            got = same(lambda m, a=arguments: m.maybe_pad_block_sequence_ids(*a))
            if length >= kv_length + kv_offset:
                assert got is ids


def test_unsigned_block_sequence_ids():
    ids = torch.zeros(2, 3, dtype=torch.uint8)
    assert ours.maybe_pad_block_sequence_ids(ids, None, 3, 0) is ids
    with pytest.raises(TypeError, match=r"^maybe_pad_block_sequence_ids: expected block.*uint8"):
        ours.maybe_pad_block_sequence_ids(ids, None, 3, 1)


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3)], ids=str)
def test_fast_all(same, shape):
    ones = torch.ones(shape, dtype=torch.bool)
    for tensor in (ones, ~ones, ones.int(), ones.float() * 2):
        same(lambda m, tensor=tensor: m.fast_all(tensor))


@pytest.mark.parametrize(
    ("sliding", "linear", "dummy"),
    [
        ([0], [0], [0]),
        ([1, 0], [0, 0], [0, 0]),
        ([1, 1], [0, 0], [0, 0]),
        ([1, 0, 0], [0, 1, 0], [0, 0, 0]),
        ([0, 0, 0], [1, 0, 0], [0, 1, 0]),
        ([0, 1], [1, 0], [0, 0]),
    ],
)
def test_find_first_full_attention_index(same, upstream, sliding, linear, dummy):
    layers = [list(map(bool, flags)) for flags in (sliding, linear, dummy)]
    cache = oracle_loader.FakeCache(2, upstream, None, *layers)
    same(lambda m: m.find_first_full_attention_index(cache))


@pytest.mark.parametrize("cache", [None, 3, ((1, 2),), object()], ids=str)
def test_find_first_full_attention_index_of_something_else(same, cache):
    same(lambda m: m.find_first_full_attention_index(cache))


# The interfaces

PADDING_KINDS = ("none", "none", "ones", "left", "right", "random", "zeros", "future")


@st.composite
def paddings(draw, batch_size, q_length, kv_length, kinds=PADDING_KINDS):
    """None or a bool mask [b, kv], `future` for keys after the queries."""
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    mask = torch.ones(batch_size, kv_length, dtype=torch.bool)
    rng = random.Random(draw(st.integers(0, 2**31)))
    for row in mask:
        split = rng.randint(0, kv_length)
        if kind == "left":
            row[:split] = False
        elif kind == "right":
            row[split:] = False
        elif kind == "random":
            row[:] = torch.tensor([rng.random() < 0.7 for _ in range(kv_length)])
        elif kind == "zeros":
            row[:] = False
        elif kind == "future":
            row[q_length:] = False
    return mask


@st.composite
def interface_calls(draw):
    """(builder, keyword arguments) of sdpa_mask and eager_mask."""
    batch_size, q_length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    kv_length = draw(st.sampled_from([q_length, q_length, 1, 3, 5, 8, 11, 20]))
    q_offset, kv_offset = draw(st.sampled_from([0, 0, 1, 4, 9])), draw(st.sampled_from([0, 0, 3]))
    length = max(kv_length + kv_offset + draw(st.sampled_from([0, 0, 0, 2, -2])), 0)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if draw(st.booleans()) else q_offset,
        "kv_offset": kv_offset,
        "attention_mask": draw(paddings(batch_size, q_length, length)),
        "allow_is_bidirectional_skip": draw(st.booleans()),
        "use_vmap": draw(st.booleans()),
        "allow_is_causal_skip": draw(st.booleans()),
        "local_size": draw(st.sampled_from([None, None, 2, 5, 30])),
    }
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from(list(arguments)[3:]), unique=True)):
            del arguments[name]
    builder = draw(builders()) if draw(st.booleans()) else None
    return builder, arguments


@settings(max_examples=400)
@given(interface_calls())
def test_sdpa_mask(same, call):
    builder, arguments = call

    def build(m):
        function = {} if builder is None else {"mask_function": builder(m)}
        return m.sdpa_mask(**arguments, **function)

    same(build)


@settings(max_examples=150)
@given(interface_calls(), st.sampled_from(OUT_DTYPES))
def test_eager_mask(same, call, dtype):
    builder, arguments = call
    arguments = {name: value for name, value in arguments.items() if name != "local_size"}

    def build(m):
        function = {} if builder is None else {"mask_function": builder(m)}
        return m.eager_mask(**arguments, **function, dtype=dtype)

    same(build)


@settings(max_examples=150)
@given(interface_calls())
def test_flash_attention_mask(same, call):
    _, arguments = call
    same(lambda m: m.flash_attention_mask(**arguments))


def test_small_masks_without_a_function(same):
    for batch_size, q_length, kv_length, q_offset in itertools.product((0, 1, 2), *[range(4)] * 3):
        sizes = (batch_size, q_length, kv_length, q_offset)
        same(lambda m, sizes=sizes: m.sdpa_mask(*sizes))
        same(lambda m, sizes=sizes: m.sdpa_mask(*sizes, allow_is_causal_skip=False))
        same(lambda m, sizes=sizes: m.eager_mask(*sizes))


def test_skip_decisions(same):
    """Whether there is a mask at all: every small padding, size and flag."""
    flags = list(itertools.product((True, False), (True, False), (None, 2, 5)))
    rows = torch.tensor(list(itertools.product((0, 1), repeat=4))).bool()
    for q_length, q_offset in itertools.product((1, 2, 4), (0, 2, torch.tensor(0))):
        for padding in [None, *rows.split(1), rows[-1:, :2], torch.ones(1, 6).bool()]:
            for causal, bidirectional, local_size in flags:
                arguments = {
                    "attention_mask": padding,
                    "allow_is_causal_skip": causal,
                    "allow_is_bidirectional_skip": bidirectional,
                    "local_size": local_size,
                }
                sizes = (1, q_length, 4, q_offset)
                same(lambda m, a=sizes, k=arguments: m.sdpa_mask(*a, **k) is None)


def test_skip_of_a_slice(same):
    """A sliding cache takes the last keys of a longer mask only."""
    for length, kv_offset, zero in itertools.product((4, 5, 7), range(4), range(7)):
        padding = torch.arange(length)[None] != zero
        arguments = (1, 1, 3, 5, kv_offset)
        same(lambda m, a=arguments, p=padding: m.sdpa_mask(*a, attention_mask=p))
        same(lambda m, a=arguments, p=padding: m.flash_attention_mask(*a, attention_mask=p))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("function", ["sdpa_mask", "flash_attention_mask"])
def test_padding_that_is_not_boolean(same, function, dtype):
    """Only the create functions make it so."""
    for row in ([0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 1]):
        padding = torch.tensor([row]).to(dtype)
        for sizes in ((1, 4, 4), (1, 2, 4, 2)):
            same(lambda m, a=sizes, p=padding: getattr(m, function)(*a, attention_mask=p))


def test_padding_of_another_batch(same):
    for rows in (1, 3):
        padding = torch.tensor([[False, True, True]]).expand(rows, 3)
        same(lambda m, p=padding: m.sdpa_mask(2, 3, 3, attention_mask=p))
        same(lambda m, p=padding: m.eager_mask(2, 3, 3, attention_mask=p))


def test_masks_of_the_meta_device(same):
    for name in ("sdpa_mask", "eager_mask"):
        same(lambda m, name=name: getattr(m, name)(2, 3, 5, 2, device="meta"))


def test_eager_mask_is_dense_where_it_differs():
    mask = ours.eager_mask(2, 3, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
    mask[0, 0, 2, 2] = 7
    assert mask[1, 0, 2, 2] == 0


# flex_attention. Compiling a block mask takes many seconds, so all but one test go without.


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def without_compiling(test):
    # A warning about upstream's argument for a compiled one.
    ignore = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
    return pytest.mark.usefixtures("uncompiled")(ignore(test))


FLEX_CALLS = {
    "causal": (lambda m: m.causal_mask_function, {}),
    "sliding": (lambda m: m.sliding_window_causal_mask_function(130), {"q_offset": 100}),
    "offsets": (lambda m: m.causal_mask_function, {"q_offset": torch.tensor(30), "kv_offset": 20}),
    "padded": (
        lambda m: m.causal_mask_function,
        {"attention_mask": torch.arange(300)[None].expand(2, 300) > 140},
    ),
    "short padding": (
        lambda m: m.bidirectional_mask_function,
        {"attention_mask": torch.arange(200)[None].expand(2, 200) > 140},
    ),
    "all ones": (lambda m: m.causal_mask_function, {"attention_mask": torch.ones(2, 9).bool()}),
    "packed": (
        lambda m: m.and_masks(
            m.packed_sequence_mask_function((torch.arange(300) // 150).expand(2, 300)),
            m.remap_positions_for_packed_sequence(
                m.causal_mask_function, (torch.arange(300) % 150).expand(2, 300)
            ),
        ),
        {},
    ),
    "blockwise": (
        lambda m: m.or_masks(
            m.causal_mask_function,
            m.blockwise_overlay((torch.arange(300) // 70 - 1).expand(2, 300)),
        ),
        {},
    ),
    "chunked": (lambda m: m.chunked_causal_mask_function(90, torch.tensor([0, 30])), {}),
    "user": (lambda m: m.and_masks(m.causal_mask_function, lambda b, h, q, k: k % 7 != 0), {}),
}


@without_compiling
@pytest.mark.parametrize("name", FLEX_CALLS)
def test_flex_attention_mask(same, name):
    builder, arguments = FLEX_CALLS[name]
    got = same(lambda m: m.flex_attention_mask(2, 200, 300, mask_function=builder(m), **arguments))
    assert is_block_mask(got)


@without_compiling
@pytest.mark.parametrize("name", CREATE)
def test_flex_attention_in_create_functions(same, name):
    config = Config("flex_attention", sliding_window=100, attention_chunk_size=130)
    mask = torch.arange(200).expand(2, 200) > 20
    for attention_mask in (None, mask):
        same(
            lambda m, mask=attention_mask: getattr(m, name)(
                config, embeds(2, 200), mask, cache=None
            )
        )


@pytest.mark.slow
def test_flex_attention_mask_compiled(same):
    builder, arguments = FLEX_CALLS["padded"]
    same(lambda m: m.flex_attention_mask(2, 200, 300, mask_function=builder(m), **arguments))


# The create functions


def stack_any(b, h, q, k):
    """Right for one cell at a time only: `any` would read all of them."""
    return torch.stack([q == k + 1, (k + q) % 3 == 0]).any()


def by_rows(table):
    """For one cell at a time, too: the second index would be of the wrong dimension."""
    return lambda b, h, q, k: table[b][q] == table[b][k]


def constant(value):
    return lambda b, h, q, k: value


USER_FUNCTIONS = {
    "index": lambda m: lambda b, h, q, k: (q + 2 * k + b) % 3 == 0,
    "head": lambda m: lambda b, h, q, k: (h == 0) & (k > q),
    "table": lambda m: rising(some_table(3, 0, 2)),
    "one tensor": lambda m: constant(torch.tensor(True)),
    "query only": lambda m: lambda b, h, q, k: q > 2,
    "vmap: any": lambda m: stack_any,
    "vmap: rows": lambda m: by_rows(some_table(4, 0, 2)),
    "rule": lambda m: m.sliding_window_overlay(2),
    "blocks": lambda m: m.blockwise_overlay(some_table(5, -1, 2)),
    "rule and user": lambda m: m.and_masks(m.causal_mask_function, lambda b, h, q, k: k != 1),
    "nested": lambda m: m.or_masks(stack_any, m.and_masks(m.sliding_window_overlay(2), stack_any)),
}

user_functions = st.sampled_from([None, None, None, *USER_FUNCTIONS])


def fake_caches(upstream):
    """Builders of caches, given how many tokens were seen and the window."""
    cache = functools.partial(oracle_loader.FakeCache, mod=upstream)
    hybrid, sliding = (False, True, False), (True, True)
    return {
        "dynamic": lambda seen, window: cache(seen),
        "hybrid": lambda seen, window: cache(seen, window=window, is_sliding=hybrid),
        "sliding": lambda seen, window: cache(seen, window=window, is_sliding=sliding),
        "static": lambda seen, window: cache(
            seen, static_len=20, compileable=True, tensor_offset=True
        ),
        "static, hybrid": lambda seen, window: cache(
            seen,
            window=window,
            is_sliding=(True, False),
            static_len=20,
            compileable=True,
            tensor_offset=True,
        ),
        "linear": lambda seen, window: cache(
            seen, is_sliding=(False, False), is_linear=(True, False)
        ),
        "encoder": lambda seen, window: types.SimpleNamespace(
            get_query_offset=lambda layer_idx=0: seen,
            get_mask_sizes=lambda q_length, layer_idx: (seen + q_length, 0),
        ),
    }


CACHES = ("dynamic", "hybrid", "sliding", "static", "static, hybrid", "linear", "encoder")
MASK_DTYPES = (torch.int64, torch.bool, torch.float32, torch.int32)


@st.composite
def scenes(draw):
    """The arguments of a create function, but for what depends on the module."""
    batch_size = draw(st.integers(1, 3))
    q_length = draw(st.sampled_from([1, 1, 2, 3, 5, 8]))
    cache = draw(st.sampled_from([None, None, None, *CACHES]))
    seen = draw(st.sampled_from([0, 0, 1, 4, 9])) if cache is not None else 0
    config = Config(
        draw(st.sampled_from(IMPLEMENTATIONS)),
        sliding_window=draw(st.sampled_from([1, 2, 3, 5, 30, 0, -1])),
        attention_chunk_size=draw(st.sampled_from([1, 2, 3, 5, 30])),
    )
    if draw(st.integers(0, 9)) == 0:
        config.is_causal = draw(st.booleans())
    total = seen + q_length
    length = total + draw(st.sampled_from([0, 0, 0, 0, 3, -1]))
    kinds = [*PADDING_KINDS, "4d", "4d float"]
    kind = draw(st.sampled_from(kinds))
    if kind.startswith("4d"):
        mask = torch.ones(batch_size, 1, q_length, total).to(FLOAT if "float" in kind else bool)
    else:
        # Under vmap, upstream can't do without any key.
        mask = draw(paddings(batch_size, q_length, max(length, 1), [kind]))
        if mask is not None:
            mask = mask.to(draw(st.sampled_from(MASK_DTYPES)))
            if mask.dtype != torch.bool and draw(st.booleans()):
                mask = mask * -2  # only zero is padding
    position_ids = draw(position_tables(batch_size, q_length)) if draw(st.booleans()) else None
    blocks = None
    if draw(st.integers(0, 3)) == 0:
        length = draw(st.sampled_from([total, q_length, total + 4]))
        blocks = draw(tables([-1, -1, 0, 1], batch_size, length)).sort(-1).values
    return types.SimpleNamespace(
        config=config,
        inputs_embeds=embeds(batch_size, q_length, draw(st.sampled_from(OUT_DTYPES))),
        attention_mask=mask,
        cache=cache,
        seen=seen,
        position_ids=position_ids,
        block_sequence_ids=blocks,
        or_function=draw(user_functions),
        and_function=draw(user_functions),
        allow_skip=draw(st.sampled_from([None, None, True, False])),
        layer_idx=draw(st.sampled_from([None, None, None, 0, 1])),
    )


def user_function(m, name):
    return None if name is None else USER_FUNCTIONS[name](m)


def make(upstream, scene, name, **more):
    """The call of a create function on a module."""
    cache = None
    if scene.cache is not None:
        window = max(scene.config.sliding_window, 1)
        cache = fake_caches(upstream)[scene.cache](scene.seen, window)

    def build(m):
        arguments = {
            "config": scene.config,
            "inputs_embeds": scene.inputs_embeds,
            "attention_mask": scene.attention_mask,
            "cache": cache,
            "or_mask_function": user_function(m, scene.or_function),
            "and_mask_function": user_function(m, scene.and_function),
            **more,
        }
        if name in CREATE_CAUSAL:
            arguments["position_ids"] = scene.position_ids
            arguments["block_sequence_ids"] = scene.block_sequence_ids
            if scene.layer_idx is not None and scene.cache not in (None, "dynamic", "static"):
                arguments["layer_idx"] = scene.layer_idx
        if scene.allow_skip is not None:
            kind = "causal" if name in CREATE_CAUSAL else "bidirectional"
            arguments[f"allow_is_{kind}_skip"] = scene.allow_skip
        return getattr(m, name)(**arguments)

    return build


@pytest.mark.parametrize("name", CREATE)
@settings(max_examples=250)
@given(scenes())
def test_create(same, upstream, name, scene):
    same(make(upstream, scene, name))


@settings(max_examples=80)
@given(scenes(), st.integers(1, 9), st.sampled_from(CREATE_BIDIRECTIONAL))
def test_cross_attention(same, upstream, scene, kv_length, name):
    scene.cache, scene.seen = None, 0
    encoder = embeds(len(scene.inputs_embeds), kv_length, torch.float16)
    if scene.attention_mask is not None and scene.attention_mask.dim() == 2:
        scene.attention_mask = torch.ones(len(encoder), kv_length, dtype=torch.int64).triu(1)
    same(make(upstream, scene, name, encoder_hidden_states=encoder))


@settings(max_examples=150)
@given(scenes(), st.booleans())
def test_preprocess_mask_arguments(same, upstream, scene, with_encoder):
    cache = None
    if scene.cache is not None:
        cache = fake_caches(upstream)[scene.cache](scene.seen, 3)
    encoder = embeds(2, 6) if with_encoder else None
    arguments = (
        scene.config,
        scene.inputs_embeds,
        scene.attention_mask,
        cache,
        scene.position_ids,
        0,
        encoder,
    )
    same(lambda m: m._preprocess_mask_arguments(*arguments))


@pytest.mark.parametrize("name", CREATE)
def test_4d_masks_pass_through(name):
    mask = torch.ones(2, 1, 3, 3)
    config = Config("sdpa")
    assert getattr(ours, name)(config, embeds(2, 3), mask, cache=None) is mask


@without_compiling
def test_block_masks_pass_through():
    mask = ours.flex_attention_mask(1, 128, 128)
    for name in CREATE:
        config = Config("flex_attention")
        assert getattr(ours, name)(config, embeds(1, 128), mask, cache=None) is mask


@pytest.mark.parametrize("name", CREATE)
def test_positional_arguments(same, name):
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    mask, positions = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    user, rest = (lambda b, h, q, k: k == 0), (None, None, False)
    if name in CREATE_CAUSAL:
        same(lambda m: getattr(m, name)(config, embeds(1, 4), None, None, positions, user))
        same(lambda m: getattr(m, name)(config, embeds(1, 4), mask, None, None, None, user, *rest))
    else:
        same(lambda m: getattr(m, name)(config, embeds(1, 4), mask, embeds(1, 4), None, user, user))


ALL_CREATE = (*CREATE, "create_recurrent_attention_mask", "create_masks_for_generate")


@pytest.mark.parametrize("name", ALL_CREATE)
def test_the_former_name_of_the_cache(upstream, recwarn, name):
    """It is taken without a warning; of both, cache counts, as upstream has it."""
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    create, mask = getattr(ours, name), torch.tensor([[0, 1, 1, 1, 1]])
    caches = [oracle_loader.FakeCache(seen, upstream) for seen in (3, 9)]
    arguments = {"config": config, "inputs_embeds": embeds(1, 2), "attention_mask": mask}
    want = create(**arguments, cache=caches[0])
    assert_same(create(**arguments, past_key_values=caches[0]), want)
    assert_same(create(**arguments, past_key_values=caches[1], cache=caches[0]), want)
    assert recwarn.list == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(upstream, name)
        assert_same(theirs(**arguments, past_key_values=caches[1], cache=caches[0]), want)


@pytest.mark.parametrize("name", CREATE)
def test_paged_caches_take_no_mask(same, name):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    config = Config("sdpa", sliding_window=2, attention_chunk_size=2)
    for implementation in ("sdpa", "eager", "paged|sdpa"):
        config._attn_implementation = implementation
        for mask in (None, torch.tensor([[0, 1]]), torch.zeros(1, 1, 2, 2)):
            got = same(lambda m, x=mask: getattr(m, name)(config, embeds(1, 2), x, cache=cache))
            assert (got is None) == (mask is None or mask.dim() == 2)


@pytest.mark.parametrize("name", CREATE_CAUSAL)
def test_blocks_do_not_cross_packed_sequences(same, name):
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    positions, blocks = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[-1, 0, 0, 0, 0, -1]])
    got = same(
        lambda m: getattr(m, name)(
            config, embeds(1, 6), None, None, positions, block_sequence_ids=blocks
        )
    )
    assert (got[0, 0, :3, 3:] < 0).all()
    assert (got[0, 0, 3:, :3] < 0).all()
    assert (got[0, 0, 1:3, 1:3] == 0).all()


def test_packed_sequence_compatibility_function():
    """Of 5.23, no longer upstream's."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    rule = ours.packed_sequence_compatibility_function(ours.causal_mask_function, positions, ids)
    mask = ours.sdpa_mask(1, 5, 5, mask_function=rule, allow_is_causal_skip=False)
    assert torch.equal(mask[0, 0], torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).tril() > 0)


def test_the_release_is_the_same_in_all_places():
    root = Path(__file__).parents[2]
    assert f"transformers=={UPSTREAM}\n" in (root / "requirements" / "dev.txt").read_text()
    minor = UPSTREAM.rpartition(".")[0]
    assert "``attn_mask._transformers.UPSTREAM``" in ours.__doc__
    releases = json.loads((root / "tests" / "support" / "releases.json").read_text())
    assert any(UPSTREAM in group["versions"] for group in releases)
    page = (root / "docs" / "upstream.md").read_text()
    assert f"(the behaviour of {minor}; argument" in page
    assert f"Results are bitwise those of transformers {minor}, " in page


# Caches of transformers


@pytest.fixture(scope="session")
def real_caches(upstream):
    transformers = pytest.importorskip("transformers")
    small = {
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 11,
    }
    llama = transformers.LlamaConfig(**small)
    mistral = transformers.MistralConfig(**small, sliding_window=4)
    gemma = transformers.Gemma3TextConfig(
        **small,
        head_dim=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    builders = {
        "dynamic": lambda: transformers.DynamicCache(),
        "dynamic llama": lambda: transformers.DynamicCache(config=llama),
        "dynamic mistral": lambda: transformers.DynamicCache(config=mistral),
        "dynamic gemma": lambda: transformers.DynamicCache(config=gemma),
        "static llama": lambda: transformers.StaticCache(config=llama, max_cache_len=12),
        "static mistral": lambda: transformers.StaticCache(config=mistral, max_cache_len=12),
        "static gemma": lambda: transformers.StaticCache(config=gemma, max_cache_len=12),
        "encoder-decoder": lambda: transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=llama), transformers.DynamicCache(config=llama)
        ),
    }

    def build(kind, seen):
        cache = builders[kind]()
        filled = getattr(cache, "self_attention_cache", cache)
        for layer in range(4):
            if seen:
                states = torch.zeros(2, 2, seen, 4)
                filled.update(states, states, layer)
        return cache

    return build


REAL_CACHES = (
    "dynamic",
    "dynamic llama",
    "dynamic mistral",
    "dynamic gemma",
    "static llama",
    "static mistral",
    "static gemma",
    "encoder-decoder",
)


def call_create(name, *args_and_module, **kwargs):
    """The module comes last, as functools.partial has it."""
    *args, module = args_and_module
    return getattr(module, name)(*args, **kwargs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("kind", REAL_CACHES)
def test_real_caches(same, real_caches, kind, implementation):
    config = Config(implementation, sliding_window=4, attention_chunk_size=5)
    for seen, q_length in itertools.product((0, 2, 6), (1, 3)):
        cache = real_caches(kind, seen)
        padded = torch.ones(2, seen + q_length, dtype=torch.int64)
        padded[0, 0] = 0
        for name, mask in itertools.product(CREATE, (None, torch.ones_like(padded), padded)):
            call = functools.partial(
                call_create, name, config, embeds(2, q_length), mask, cache=cache
            )
            same(call)


# create_masks_for_generate and the recurrent mask

LAYER_TYPES = (
    ["full_attention"],
    ["sliding_attention", "full_attention"],
    ["chunked_attention", "full_attention"],
    ["linear_attention", "full_attention"],
    ["conv", "sliding_attention"],
    ["hybrid"],
    ["hybrid_sliding", "linear_attention"],
    ["hybrid", "sliding_attention"],
    ["indexed_attention"],
    ["compressed_sparse_attention", "heavily_compressed_attention"],
    ["minimax_m3_sparse", "full_attention"],
    ["full_attention", "unheard_of"],
)


@settings(max_examples=150)
@given(scenes(), st.sampled_from([None, *LAYER_TYPES]), st.sampled_from(["both", "one", "none"]))
def test_create_masks_for_generate(same, upstream, scene, layer_types, attributes):
    config = copy.copy(scene.config)
    if layer_types is not None:
        config.layer_types = layer_types
    if attributes != "both":
        config.sliding_window = None
    if attributes == "none":
        del config.attention_chunk_size
    cache = None
    if scene.cache is not None:
        cache = fake_caches(upstream)[scene.cache](scene.seen, max(scene.config.sliding_window, 1))
    same(
        lambda m: m.create_masks_for_generate(
            config,
            scene.inputs_embeds,
            scene.attention_mask,
            cache,
            scene.position_ids,
            user_function(m, scene.or_function),
            user_function(m, scene.and_function),
            scene.block_sequence_ids,
            anything_else=3,
        )
    )


def test_masks_for_generate_of_a_composite_config(same):
    text = Config("eager", layer_types=["full_attention"])
    config = types.SimpleNamespace(get_text_config=lambda: text)
    same(lambda m: m.create_masks_for_generate(config, embeds(1, 3), None, None))


def test_recurrent_mask(same):
    rows = torch.tensor(list(itertools.product((0, 1, 2), repeat=3)))
    masks = [None, torch.ones(2, 1, 3, 3), *rows.split(1), rows, rows.bool(), torch.ones(2, 7)]
    for mask, q_length in itertools.product(masks, (1, 2, 3, 5)):
        name, config = "create_recurrent_attention_mask", Config("sdpa")
        same(functools.partial(call_create, name, config, embeds(2, q_length), mask, anything=3))
    got = ours.create_recurrent_attention_mask(Config("sdpa"), embeds(27, 2), rows)
    assert got.is_contiguous()


# Interfaces of the user's own


@pytest.fixture
def registered():
    """Registers a function under a name with both modules, and takes it back."""
    taken = []

    def register(module, name, function):
        mapping = module.AttentionMaskInterface._global_mapping
        taken.append((mapping, name, mapping.get(name)))
        module.AttentionMaskInterface.register(name, function)

    yield register
    for mapping, name, before in reversed(taken):
        del mapping[name]
        if before is not None:
            mapping[name] = before


@pytest.mark.parametrize("name", CREATE)
def test_arguments_of_a_registered_interface(same, upstream, registered, name):
    config = Config("my own", sliding_window=3, attention_chunk_size=2)
    user = lambda b, h, q, k: k == 2  # noqa: E731
    mask = torch.tensor([[0, 1, 1, 1]])

    def interface(**kwargs):
        function, given_config = kwargs.pop("mask_function"), kwargs.pop("config")
        assert given_config is config
        kwargs["device"], kwargs["dtype"] = str(kwargs["device"]), str(kwargs["dtype"])
        return {**kwargs, "cells": function(*grid(1, 4, 4)).expand(1, 1, 4, 4)}

    for module in (upstream, ours):
        registered(module, "my own", interface)
    for function in (None, user):
        same(
            lambda m, f=function: getattr(m, name)(
                config, embeds(1, 4), mask, cache=None, or_mask_function=f
            )
        )


def test_replaced_interface(same, upstream, registered):
    for module in (upstream, ours):
        registered(module, "sdpa", lambda *args, **kwargs: "mine")
    same(lambda m: m.create_causal_mask(Config("sdpa"), embeds(1, 4), None, None))
    same(lambda m: m.create_causal_mask(Config("eager"), embeds(1, 4), None, None))


def test_interface_is_a_mapping(same):
    def facts(m):
        interface = m.AttentionMaskInterface()
        interface["sdpa"] = local = lambda: None
        return [
            sorted(interface),
            sorted(interface.valid_keys()),
            len(interface),
            interface["sdpa"] is local,
            m.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is m.sdpa_mask,
            m.ALL_MASK_ATTENTION_FUNCTIONS["eager"] is m.eager_mask,
            m.ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_4"] is m.flash_attention_mask,
            m.ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"] is m.flex_attention_mask,
            isinstance(m.ALL_MASK_ATTENTION_FUNCTIONS, m.AttentionMaskInterface),
            "nothing" in interface,
            interface.get("nothing"),
        ]

    same(facts)
    same(lambda m: m.AttentionMaskInterface()["nothing"])
    same(lambda m: m.AttentionMaskInterface().__delitem__("sdpa"))


# Errors


@pytest.mark.parametrize("name", ["and_masks", "or_masks"])
def test_masks_that_cannot_be_called(same, name):
    same(lambda m: getattr(m, name)(3))
    same(lambda m: getattr(m, name)(len, "causal", None))
    with pytest.raises(RuntimeError, match="All inputs should be callable mask_functions"):
        getattr(ours, name)(ours.causal_mask_function, None)


@pytest.mark.parametrize("name", CREATE)
def test_configs_without_the_attribute(same, name):
    for config in (
        Config("sdpa"),
        Config("eager", sliding_window=None, attention_chunk_size=None),
        Config("unregistered"),
    ):
        same(lambda m, c=config: getattr(m, name)(c, embeds(1, 4), None, cache=None))
    same(lambda m: getattr(m, name)(object(), embeds(1, 4), None, cache=None))
    if "sliding" in name:
        with pytest.raises(ValueError, match=r"^Could not find a `sliding_window` argument in the"):
            getattr(ours, name)(Config("sdpa"), embeds(1, 4), None, cache=None)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_4"])
def test_chunks_with_flash_attention(same, implementation):
    config = Config(implementation, attention_chunk_size=4)
    for q_length in (4, 5):
        same(lambda m, n=q_length: m.create_chunked_causal_mask(config, embeds(1, n), None, None))
    with pytest.raises(ValueError, match="Flash attention cannot handle chunked attention"):
        ours.create_chunked_causal_mask(config, embeds(1, 5), None, None)


def test_chunks_of_nothing(same):
    config = Config("eager", attention_chunk_size=0)
    same(lambda m: m.create_chunked_causal_mask(config, embeds(1, 5), None, None))


class Refusal(Exception):
    """Of a user's own mask function."""


def refusing(b, h, q, k):
    raise Refusal("not today")


BAD_FUNCTIONS = {
    "raises": refusing,
    "float": lambda b, h, q, k: (q - k).to(FLOAT),
    "wrong shape": lambda b, h, q, k: torch.ones(3, 5, dtype=torch.bool),
    "None": lambda b, h, q, k: None,
    "string": lambda b, h, q, k: "yes",
    "too few arguments": lambda q, k: q >= k,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("bad", BAD_FUNCTIONS)
def test_bad_user_functions(bad, side, implementation):
    expected = Refusal if bad == "raises" else (ValueError, TypeError)
    arguments = {"cache": None, side: BAD_FUNCTIONS[bad]}
    with pytest.raises(expected) as caught:
        ours.create_causal_mask(Config(implementation), embeds(2, 4), None, **arguments)
    assert str(caught.value)


def test_errors_of_user_functions(same):
    for name in CREATE:
        config = Config("sdpa", sliding_window=2, attention_chunk_size=2)
        same(
            lambda m, name=name, config=config: getattr(m, name)(
                config, embeds(2, 4), None, cache=None, or_mask_function=refusing
            )
        )
    same(lambda m: m.sdpa_mask(2, 3, 4, 1, mask_function=refusing))


@pytest.mark.parametrize("bad", BAD_FUNCTIONS)
def test_bad_user_functions_without_vmap(bad):
    expected = Refusal if bad == "raises" else (ValueError, TypeError)
    with pytest.raises(expected):
        ours.sdpa_mask(2, 4, 4, mask_function=BAD_FUNCTIONS[bad], allow_is_causal_skip=False)


WRONG_SIZES = {
    "blocks of another batch": {"block_sequence_ids": torch.zeros(1, 4, dtype=torch.int64)},
    "blocks of fewer rows": {"block_sequence_ids": torch.zeros(0, 4, dtype=torch.int64)},
    "flat blocks": {"block_sequence_ids": torch.zeros(4, dtype=torch.int64)},
    "short positions": {"position_ids": torch.tensor([[0, 0, 1]])},
    "no positions": {"position_ids": torch.zeros(1, 0, dtype=torch.int64)},
    "positions of another batch": {"position_ids": torch.tensor([[0, 1, 0, 1]] * 2)},
    "mask of another batch": {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
    "mask of two rows": {"attention_mask": torch.tensor([[0, 1, 1, 1]] * 2)},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("wrong", WRONG_SIZES)
def test_wrong_sizes(upstream, wrong, implementation):
    arguments = {"attention_mask": None, "cache": None, **WRONG_SIZES[wrong]}
    config = Config(implementation, sliding_window=2, attention_chunk_size=2)
    for name in CREATE_CAUSAL:
        with pytest.raises((IndexError, RuntimeError)):
            getattr(upstream, name)(config, embeds(3, 4), **arguments)
        with pytest.raises((ValueError, TypeError, IndexError)):
            getattr(ours, name)(config, embeds(3, 4), **arguments)


@pytest.mark.parametrize("sizes", [(-3, 0), (4, -9), (2.5, 0), None, (4,), ("4", 0)], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_impossible_sizes_of_a_cache(same, implementation, sizes):
    cache = types.SimpleNamespace(
        get_query_offset=lambda layer_idx=0: 3, get_mask_sizes=lambda q_length, layer_idx: sizes
    )
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    config = Config(implementation, sliding_window=2, attention_chunk_size=2)
    for name in CREATE_CAUSAL:
        same(functools.partial(call_create, name, config, embeds(1, 2), mask, cache))


# While tracing


@pytest.mark.parametrize("name", CREATE)
def test_fake_tensors(upstream, name):
    """The values may not be read: the same decisions, and the same shapes."""
    config = Config("sdpa", sliding_window=3, attention_chunk_size=3)
    positions = torch.tensor([[0, 1, 2, 0]])
    for mask, position_ids in itertools.product((None, torch.ones(2, 4).bool()), (None, positions)):
        results = []
        for module in (upstream, ours):
            arguments = {"cache": None}
            if name in CREATE_CAUSAL:
                arguments["position_ids"] = position_ids
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = {
                    k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                    for k, v in {**arguments, "attention_mask": mask}.items()
                }
                got = getattr(module, name)(config, mode.from_tensor(embeds(2, 4)), **fake)
            results.append(got if got is None else (got.shape, got.dtype, got.device))
        assert results[0] == results[1]


COMPILED = {
    "causal": ("create_causal_mask", {}),
    "padded": ("create_causal_mask", {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}),
    "packed": ("create_causal_mask", {"position_ids": torch.tensor([[0, 1, 0]])}),
    "sliding": ("create_sliding_window_causal_mask", {}),
    "chunked": (
        "create_chunked_causal_mask",
        {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
    ),
    "blocks": ("create_causal_mask", {"block_sequence_ids": torch.tensor([[0, 0, -1]] * 2)}),
    "bidirectional": ("create_bidirectional_mask", {"attention_mask": torch.ones(2, 3).int()}),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(upstream, name, implementation):
    """In one graph, and with the decisions that upstream makes there."""
    function, arguments = COMPILED[name]
    config = Config(implementation, sliding_window=2, attention_chunk_size=2)
    arguments = {"attention_mask": None, "cache": None, **arguments}
    results = []
    for module in (upstream, ours):
        torch._dynamo.reset()

        def build(queries, arguments, module=module):
            return getattr(module, function)(config, queries, **arguments)

        compiled = torch.compile(build, backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(compiled(embeds(2, 3), arguments))
    assert_same(results[1], results[0])


# Dynamo of torch 2.11 loses, under vmap, the attributes of objects made in the graph.
@pytest.mark.applies(not torch.__version__.startswith("2.11."))
@pytest.mark.parametrize("user", ["index", "table", "query only", "rule and user"])
def test_compiled_user_functions(user):
    """In one graph, whether as `or` or as `and`; upstream's vmap does not always get through."""
    config = Config("sdpa")
    function = USER_FUNCTIONS[user](ours)
    for side in ("or_mask_function", "and_mask_function"):

        def build(queries, mask, side=side):
            return ours.create_causal_mask(config, queries, mask, None, **{side: function})

        torch._dynamo.reset()
        compiled = torch.compile(build, backend="eager", fullgraph=True)
        arguments = (embeds(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
        assert_same(compiled(*arguments), build(*arguments))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CREATE)
def test_one_graph_for_every_length(name, implementation):
    config = Config(implementation, sliding_window=3, attention_chunk_size=3)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def build(queries, mask):
        return getattr(ours, name)(config, queries, mask, cache=None)

    torch._dynamo.reset()
    compiled = torch.compile(build, backend=backend, fullgraph=True, dynamic=True)
    for batch_size, length in ((2, 5), (3, 7), (4, 9)):
        queries, mask = torch.zeros(batch_size, length, 11), torch.ones(batch_size, length).tril()
        assert_same(compiled(queries, mask), build(queries, mask))
    assert len(graphs) == 1


# Argument names of older releases. Results are those of today's.

OLD_NAMES = {
    "input_embeds": lambda a: {"input_embeds": a.pop("inputs_embeds"), **a},
    "cache_position": lambda a: {"cache_position": torch.arange(4), **a},
    "both": lambda a: {
        "input_embeds": a.pop("inputs_embeds"),
        "cache_position": torch.arange(4),
        **a,
    },
}


@pytest.mark.parametrize("old", OLD_NAMES)
@pytest.mark.parametrize(
    "name", [*CREATE_CAUSAL, "create_masks_for_generate", *CREATE_BIDIRECTIONAL]
)
def test_old_names_of_the_create_functions(name, old):
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    arguments = {
        "config": config,
        "inputs_embeds": embeds(2, 4),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "cache": None,
    }
    want = getattr(ours, name)(**arguments)
    got = getattr(ours, name)(**OLD_NAMES[old](dict(arguments)))
    assert want is not None
    assert_same(got, want)


@pytest.mark.parametrize("name", CREATE)
def test_inputs_embeds_under_both_names(name):
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    arguments = {"inputs_embeds": embeds(1, 4), "input_embeds": embeds(1, 4)}
    with pytest.raises(TypeError, match="inputs_embeds"):
        getattr(ours, name)(config, attention_mask=None, cache=None, **arguments)


@pytest.mark.parametrize("name", ["sdpa_mask", "eager_mask", "flash_attention_mask"])
def test_old_names_of_the_interfaces(name):
    """Up to 5.3 queries came as cache_position, which is q_length and q_offset in one."""
    function = getattr(ours, name)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    arguments = {"batch_size": 1, "kv_length": 6, "attention_mask": mask}
    want = function(**arguments, q_length=2, q_offset=4)
    got = function(**arguments, cache_position=torch.arange(4, 6))
    assert want is not None
    assert_same(got, want)
    got = function(**arguments, cache_position=torch.arange(4, 6), allow_torch_fix=True)
    assert_same(got, want)


def test_old_orders_of_the_interfaces():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    rule = ours.sliding_window_causal_mask_function(3)
    for name in ("sdpa_mask", "eager_mask", "flash_attention_mask"):
        function = getattr(ours, name)
        got = function(1, torch.arange(4, 6), 5, 1, rule, mask)
        want = function(1, 2, 5, 4, 1, rule, mask)
        assert want is not None
        assert_same(got, want)
        for positions in (torch.arange(4)[None], torch.arange(0)):
            with pytest.raises(ValueError, match=rf"^{name}: expected cache_position to be 1-D"):
                function(1, positions, 5)
        with pytest.raises(TypeError, match=rf"^{name}: expected arguments after attention_mask"):
            function(1, torch.arange(4, 6), 5, 1, rule, mask, None)


@pytest.mark.parametrize("name", CREATE_CAUSAL)
def test_old_order_of_the_create_functions(name):
    """cache_position, which may be None, was before the cache, which may be None, too."""
    config = Config("sdpa", sliding_window=2, attention_chunk_size=2)
    create, packed = getattr(ours, name), torch.tensor([[0, 1, 0, 1]])
    want = create(config, embeds(1, 4), None, None, position_ids=packed)
    assert not want[0, 0, 2, 1]
    assert_same(create(config, embeds(1, 4), None, torch.arange(4), None, packed), want)
    assert_same(create(config, embeds(1, 4), None, None, None, packed), want)


def test_old_names_of_the_rest():
    arguments = {"config": Config("sdpa"), "attention_mask": None, "cache": None}
    arguments |= {"position_ids": torch.tensor([[0, 1, 0]]), "layer_idx": 0}
    new = ours._preprocess_mask_arguments(inputs_embeds=embeds(1, 3), **arguments)
    old = ours._preprocess_mask_arguments(
        input_embeds=embeds(1, 3), cache_position=torch.arange(3), **arguments
    )
    for one, other in zip(old, new, strict=True):
        assert_same(one, other) if isinstance(one, torch.Tensor) else None
        assert isinstance(one, torch.Tensor) or one == other
    mask = torch.ones(1, 3)
    assert_same(
        ours.prepare_padding_mask(mask, 4, 1, _slice=False), ours.prepare_padding_mask(mask, 4, 1)
    )


def test_unknown_arguments():
    with pytest.raises(TypeError, match="no_such_thing"):
        ours.create_causal_mask(Config("sdpa"), embeds(1, 4), None, None, no_such_thing=1)


# Beyond upstream: documents, windows over blocks, positions of three dimensions

DOCUMENTS = ([0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 7, 7], [0, 0, 0, 0, 0, 0], [3, 2, 2, 1, 0, 0])


def element(name, config, ids, q, k):
    """Whether q sees k in a packed row; positions count from the start of each document."""
    if ids[q] != ids[k]:
        return False
    q, k = q - ids.index(ids[q]), k - ids.index(ids[k])
    window, chunk = config.sliding_window, config.attention_chunk_size
    return {
        "create_causal_mask": k <= q,
        "create_sliding_window_causal_mask": q - window < k <= q,
        "create_chunked_causal_mask": k <= q and k // chunk == q // chunk,
        "create_bidirectional_mask": True,
        "create_bidirectional_sliding_window_mask": abs(q - k) <= window,
    }[name]


def packed_mask(name, config, rows, padding=None):
    cells = [
        [
            [
                element(name, config, ids, q, k) and (padding is None or bool(padding[b][k]))
                for k in range(len(ids))
            ]
            for q in range(len(ids))
        ]
        for b, ids in enumerate(rows)
    ]
    return torch.tensor(cells)[:, None]


def as_additive(mask, dtype=FLOAT):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", CREATE)
def test_document_ids(name, dtype):
    ids = torch.tensor(DOCUMENTS).to(dtype)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1] * 6, [1] * 6])
    for window, mask in itertools.product((1, 2), (None, torch.ones_like(padding), padding)):
        config = Config("sdpa", sliding_window=window, attention_chunk_size=2)
        arguments = {"attention_mask": mask, "cache": None, "document_ids": ids}
        want = packed_mask(name, config, DOCUMENTS, mask)
        if name == "create_chunked_causal_mask" and mask is padding:
            continue  # it is not defined where the chunks of a padded document start
        assert_same_mask(getattr(ours, name)(config, embeds(4, 6), **arguments), want)
        config._attn_implementation = "eager"
        got = getattr(ours, name)(config, embeds(4, 6, torch.float16), **arguments)
        assert_same_mask(got, as_additive(want, torch.float16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", CREATE)
def test_cu_seqlens(name, dtype):
    config = Config("sdpa", sliding_window=1, attention_chunk_size=2)
    for lengths in ([2, 3, 1], [6], [1] * 6, [0, 4, 0, 2]):
        ids = list(itertools.chain.from_iterable([i] * n for i, n in enumerate(lengths)))
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
        arguments = {"attention_mask": None, "cache": None, "cu_seqlens": ends}
        got = getattr(ours, name)(config, embeds(1, 6), **arguments)
        want = packed_mask(name, config, [ids])
        if got is None:  # one document is no reason for a mask
            assert len(lengths) == 1
        else:
            assert_same_mask(got, want)


def test_documents_of_masks_for_generate():
    config = Config(
        "sdpa",
        sliding_window=2,
        attention_chunk_size=2,
        layer_types=["full_attention", "sliding_attention"],
    )
    ids = torch.tensor(DOCUMENTS)
    got = ours.create_masks_for_generate(config, embeds(4, 6), None, None, document_ids=ids)
    for pattern, name in zip(("full_attention", "sliding_attention"), CREATE_CAUSAL, strict=False):
        assert_same_mask(got[pattern], packed_mask(name, config, DOCUMENTS))


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.sampled_from(CREATE_CAUSAL))
def test_documents_are_what_packed_positions_are(data, batch_size, length, name):
    rng = random.Random(data.draw(st.integers(0, 2**31)))
    positions = torch.tensor([packed_row(rng, length) for _ in range(batch_size)])
    ids = (positions == 0).cumsum(-1) - 1
    config = Config("sdpa", sliding_window=2, attention_chunk_size=3)
    arguments = {"cache": None, "allow_is_causal_skip": False}
    build = functools.partial(getattr(ours, name), config, embeds(batch_size, length), None)
    assert_same_mask(
        build(document_ids=ids, **arguments), build(position_ids=positions, **arguments)
    )


def test_scattered_documents():
    """A document's tokens need not be neighbours."""
    rows = [[0, 1, 0, 1, 1, 0]]
    got = ours.create_causal_mask(
        Config("sdpa"), embeds(1, 6), None, None, document_ids=torch.tensor(rows)
    )
    cells = [[k <= q and rows[0][q] == rows[0][k] for k in range(6)] for q in range(6)]
    assert_same_mask(got, torch.tensor(cells)[None, None])


def test_bad_documents():
    bad = [
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 7])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([1, 2, 6])}, "cu_seqlens"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens"),
        ({"document_ids": torch.zeros(1, 5, dtype=torch.int64)}, "document_ids"),
        ({"document_ids": torch.zeros(1, 7, dtype=torch.int64)}, "document_ids"),
        ({"document_ids": torch.zeros(3, 6, dtype=torch.int64)}, "document_ids"),
        ({"document_ids": torch.zeros(6, dtype=torch.int64)}, "document_ids"),
        ({"document_ids": torch.zeros(1, 6)}, "document_ids"),
        (
            {
                "document_ids": torch.zeros(1, 6, dtype=torch.int64),
                "cu_seqlens": torch.tensor([0, 6]),
            },
            "document_ids or cu_seqlens",
        ),
    ]
    for arguments, name in bad:
        for function in CREATE_CAUSAL:
            config = Config("eager", sliding_window=2, attention_chunk_size=2)
            with pytest.raises((ValueError, TypeError), match=name):
                getattr(ours, function)(config, embeds(1, 6), None, None, **arguments)


class SeenCache:
    """A cache that has seen tokens, in a number of slots."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, seen, slots=None, number=int):
        self.seen, self.slots, self.number = seen, slots, number

    def get_query_offset(self, layer_idx):
        return self.number(self.seen)

    def get_mask_sizes(self, q_length, layer_idx):
        return self.number(self.slots or self.seen + q_length), self.number(0)


@pytest.mark.parametrize("number", [int, np.int64])
@pytest.mark.parametrize("slots", [None, 9])
@pytest.mark.parametrize("ids", DOCUMENTS, ids=str)
def test_documents_in_a_cache(ids, slots, number):
    """Ids are those of all tokens; empty slots belong to none, whatever numbers are there."""
    ids = [i - 1 for i in ids]
    seen, config = 4, Config("sdpa")
    cache = SeenCache(seen, slots, number)
    want = [
        [k < 6 and k <= q and ids[q] == ids[k] for k in range(slots or 6)] for q in range(seen, 6)
    ]
    ids = torch.tensor([ids])
    got = ours.create_causal_mask(config, embeds(1, 2), None, cache, document_ids=ids)
    assert_same_mask(got, torch.tensor(want)[None, None])
    if ids.tolist()[0] == sorted(ids.tolist()[0]):
        borders = (
            torch.diff(ids[0], prepend=ids[0, :1] - 1, append=ids[0, -1:] + 1) != 0
        ).nonzero()
        borders = borders.flatten()
        got = ours.create_causal_mask(config, embeds(1, 2), None, cache, cu_seqlens=borders)
        assert_same_mask(got, torch.tensor(want)[None, None])
    both = ours.create_bidirectional_mask(
        config, embeds(1, 6), None, cache=SeenCache(0, slots, number), document_ids=ids
    )
    ids = ids[0].tolist()
    want = [[k < 6 and ids[q] == ids[k] for k in range(slots or 6)] for q in range(6)]
    assert_same_mask(both, torch.tensor(want)[None, None])


@pytest.mark.parametrize("offset", [int, torch.tensor])
@pytest.mark.parametrize("name", CREATE_CAUSAL)
def test_documents_of_too_few_tokens(name, offset):
    config = Config("sdpa", sliding_window=2, attention_chunk_size=2)
    cache = SeenCache(5)
    cache.get_query_offset = lambda layer_idx: offset(5)
    for arguments in (
        {"document_ids": torch.tensor([[1]])},
        {"document_ids": torch.zeros(1, 7, dtype=torch.int64)},
        {"cu_seqlens": torch.tensor([0, 1])},
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected {next(iter(arguments))} to .* 6"):
            getattr(ours, name)(config, embeds(1, 1), None, cache, **arguments)


@pytest.mark.parametrize("name", CREATE_BIDIRECTIONAL)
def test_documents_of_other_keys(name):
    config = Config("sdpa", sliding_window=2)
    ids = torch.tensor([[0, 0]])
    with pytest.raises(ValueError, match=rf"^{name}: expected no document_ids or cu_seqlens"):
        getattr(ours, name)(
            config, embeds(1, 2), None, encoder_hidden_states=embeds(1, 4), document_ids=ids
        )


@pytest.mark.parametrize("name", CREATE)
def test_documents_under_flash_attention(name):
    """It takes no mask that could keep them apart, so None must not be read as if it did."""
    build = functools.partial(
        getattr(ours, name),
        Config("flash_attention_2", sliding_window=2, attention_chunk_size=8),
        embeds(1, 4),
        cache=None,
    )
    borders = torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=rf"^{name}: expected no document_ids"):
        build(attention_mask=None, document_ids=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=rf"^{name}: expected no padding beside documents"):
        build(attention_mask=torch.tensor([[0, 1, 1, 1]]), cu_seqlens=borders)
    assert build(attention_mask=torch.ones(1, 4), cu_seqlens=borders) is None
    assert build(attention_mask=None, cu_seqlens=borders) is None


@pytest.mark.parametrize("size", ["batch_size", "q_length", "kv_length"])
@pytest.mark.parametrize("mask", ["sdpa_mask", "eager_mask"])
def test_negative_sizes(mask, size):
    """Also of functions that are called, for which torch would have to make the indices."""
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 4, size: -1}
    for function in (ours.causal_mask_function, lambda b, h, q, k: q >= k):
        with pytest.raises(ValueError, match=rf"^\w+: expected {size} .*but got -1"):
            getattr(ours, mask)(**sizes, mask_function=function, allow_is_causal_skip=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floats_as_padding_of_flex_attention(dtype):
    mask = torch.tensor([[0, 1, 1, 1]]).to(dtype)
    with pytest.raises(TypeError, match=f"^flex_attention_mask: expected attention_.*{dtype}"):
        ours.flex_attention_mask(1, 4, 4, attention_mask=mask)
    assert ours.flex_attention_mask(1, 4, 4, attention_mask=mask.bool()).shape == (1, 1, 4, 4)


def test_sizes_of_a_cache_name_the_function():
    for sizes, error, text in (
        ((-1, 0), ValueError, "a kv length that is not negative, but got -1"),
        ((4, "0"), TypeError, "a kv offset that is an int, but got str"),
    ):
        cache = types.SimpleNamespace(
            is_compileable=False,
            get_query_offset=lambda layer_idx: 0,
            get_mask_sizes=lambda q_length, layer_idx, sizes=sizes: sizes,
        )
        with pytest.raises(error, match=f"^create_causal_mask: expected cache .*{text}"):
            ours.create_causal_mask(Config("sdpa"), embeds(1, 4), None, cache)


def test_bad_position_ids():
    for positions, text in (
        (torch.tensor(3), r"rows, or one, but got \[\]"),
        (torch.tensor([[0, 1, 0]]), r"of length 4, but got \[1, 3\]"),
        (torch.zeros(3, 4, dtype=torch.int64), r"rows, or one, but got \[3, 4\]"),
    ):
        with pytest.raises(
            ValueError, match=f"^create_causal_mask: expected position_ids .*{text}"
        ):
            ours.create_causal_mask(Config("sdpa"), embeds(1, 4), None, None, positions)


BLOCKS = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1], [2, 2, 2, -1, -1, 3, 3, 3]])


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_blocks_in_window(window):
    config = Config("sdpa", sliding_window=window)
    build = functools.partial(
        ours.create_sliding_window_causal_mask,
        config,
        embeds(2, 8),
        None,
        None,
        block_sequence_ids=BLOCKS,
    )
    rows = BLOCKS.tolist()

    def mask(sees):
        cells = [[[sees(ids, q, k) for k in range(8)] for q in range(8)] for ids in rows]
        return torch.tensor(cells)[:, None]

    def in_block(ids, q, k):
        return ids[q] == ids[k] and ids[q] >= 0

    want = mask(lambda ids, q, k: (k <= q or in_block(ids, q, k)) and k > q - window)
    assert_same_mask(build(blocks_in_window=True), want)
    crossing = mask(lambda ids, q, k: q - window < k <= q or in_block(ids, q, k))
    assert_same_mask(build(blocks_in_window=False), crossing)
    assert_same_mask(build(), crossing)


@pytest.mark.parametrize("name", CREATE_CAUSAL)
def test_positions_of_three_dimensions(name):
    """Those of time, height and width, which start again within one sequence."""
    config = Config("eager", sliding_window=2, attention_chunk_size=2)
    positions = torch.tensor([[0, 1, 1, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 1, 3]])
    for batch_size in (1, 2, 3):
        build = functools.partial(getattr(ours, name), config, embeds(batch_size, 5), None, None)
        mrope = positions[:, None].expand(3, batch_size, 5)
        assert_same_mask(build(position_ids=mrope), build())


# Without transformers


def run_python(code, folder):
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


HIDDEN = """
import json, sys, types
hide = {hide}
if hide: sys.modules["transformers"] = None
import torch
from attn_mask import masking_utils as m

class Config:
    _attn_implementation = "sdpa"
    sliding_window = attention_chunk_size = 3
    layer_types = ["full_attention", "sliding_attention", "chunked_attention"]
    def get_text_config(self):
        return self

class Cache:
    is_sliding, is_linear, is_dummy, is_compileable = [True, False], [False] * 2, [False] * 2, False
    def get_query_offset(self, layer_idx=0):
        return 4
    def get_mask_sizes(self, q_length, layer_idx):
        return (2 + q_length, 2) if self.is_sliding[layer_idx] else (4 + q_length, 0)

queries = torch.zeros(1, 2, 4)
padding = torch.tensor([[0, 1, 1, 1, 1, 1]])
masks = m.create_masks_for_generate(Config(), queries, padding, Cache())
loaded = [n for n, v in sys.modules.items() if n.split(".")[0] == "transformers" and v is not None]
print(json.dumps([{{name: mask.int().tolist() for name, mask in masks.items()}}, loaded]))
"""


@pytest.mark.parametrize("hide", [True, False])
def test_transformers_is_not_needed(tmp_path, hide):
    """Nor a class of its: configs and caches are known by their attributes."""
    masks, loaded = json.loads(run_python(HIDDEN.format(hide=hide), tmp_path))
    assert masks == {
        "full_attention": [[[[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]]],
        "sliding_attention": [[[[1, 1, 1, 0], [0, 1, 1, 1]]]],
        "chunked_attention": [[[[0, 0, 1, 0], [0, 0, 1, 1]]]],
    }
    assert loaded == []


# A user's function on a large mask, which is evaluated piece by piece


@pytest.mark.parametrize("sizes", [(2, 1500, 2100), (1, 3, 1_000_003), (1, 70_001, 41)], ids=str)
@pytest.mark.parametrize("use_vmap", [False, True])
def test_pieces_fit_together(use_vmap, sizes):
    batch_size, q_length, kv_length = sizes
    table = torch.randint(0, 3, (batch_size, 1_000_100), generator=torch.Generator().manual_seed(0))

    def user(b, h, q, k):
        return (table[b, q] == table[b, k]) & ((q + k) % 7 != 0)

    got = ours.sdpa_mask(
        *sizes,
        q_offset=5,
        kv_offset=2,
        mask_function=ours.or_masks(user, ours.sliding_window_causal_mask_function(9)),
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
    )
    b, h, q, k = grid(batch_size, q_length, kv_length, 5, 2)
    assert_same_mask(got, user(b, h, q, k) | ((k <= q) & (k > q - 9)))


def test_pieces_for_one_cell_at_a_time():
    config = Config("sdpa")
    got = ours.create_causal_mask(config, embeds(2, 1100), None, None, or_mask_function=stack_any)
    _, _, q, k = grid(1, 1100, 1100)
    want = (k <= q) | (q == k + 1) | ((k + q) % 3 == 0)
    assert_same_mask(got, want.expand(2, 1, 1100, 1100))


TILES = """
import torch
from pathlib import Path
from attn_mask import masking_utils as m

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def build(n):
    table = torch.arange(n) % 3
    function = m.and_masks(m.causal_mask_function, lambda b, h, q, k: table[q] == table[k])
    return m.sdpa_mask(1, n, n, mask_function=function, allow_is_causal_skip=False)

build(64)
try:
    Path("/proc/self/clear_refs").write_text("5")
except OSError:
    pass
before = resident("VmRSS")
result = build({n})
print(resident("VmHWM") - before - result.numel())
"""


def memory_beside_the_mask(tmp_path, n):
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak is read from /proc, which is not there")
    return int(run_python(TILES.format(n=n), tmp_path))


def test_memory_of_a_user_function(tmp_path):
    assert memory_beside_the_mask(tmp_path, 8192) < 64 << 20


@pytest.mark.slow
def test_memory_of_a_user_function_at_32k(tmp_path):
    assert memory_beside_the_mask(tmp_path, 32768) < 64 << 20
