"""Mask rules: the operators that read encoded ones, and the Python objects that carry them.

Element by element, both are compared with rule_reference. The objects are also called the way
flex attention and vmap call a mask function, and compared with the closures of transformers.
"""

import copy
import itertools
import pickle
import sys

import pytest
import rule_reference
import torch
from attn_mask import masking_utils, rules
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    COMPLEX_DTYPES,
    FLOAT8_DTYPES,
    INT_DTYPES,
    LAYOUTS,
    OUT_DTYPES,
    assert_same_mask,
    has_distinct_memory,
    lowest,
)
from rule_reference import (
    ALL,
    AND,
    BITS,
    BLOCKS,
    CAUSAL,
    CHUNK,
    DOCUMENTS,
    ID_DTYPES,
    LEAVES,
    NOTHING,
    OPCODES,
    OR,
    PADDING,
    PADDING_DTYPES,
    REINDEX,
    SHIFT,
    WINDOW,
    Call,
    builders,
    calls,
    grid,
    nodes,
    number_of_leaves,
    some_table,
)
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention.flex_attention import create_block_mask

ops = torch.ops.attn_mask
FLOAT = torch.float32

# What an operator raises when the caller is wrong.
CALLERS_ERRORS = (ValueError, TypeError, NotImplementedError)

# Both operators, as functions of the arguments of `boolean`.
OPERATORS = {
    "boolean": lambda *args, **kwargs: ops.boolean(*args, **kwargs),
    "additive": lambda *args, **kwargs: ops.additive(*args, dtype=FLOAT, **kwargs),
}
both = pytest.mark.parametrize("name", OPERATORS)

pytestmark = pytest.mark.usefixtures("one_thread")


def check(rule, operands, *sizes, **positions):
    """`boolean` gives what the reference gives."""
    __tracebackhide__ = True
    got = ops.boolean(rule, operands, *sizes, **positions)
    assert_same_mask(got, rule_reference.boolean(rule, operands, *sizes, **positions))
    return got


# Random trees


@settings(max_examples=400)
@given(calls())
def test_boolean(call):
    got = check(*call.args, **call.positions)
    # The batch may be a stride-0 expand.
    assert has_distinct_memory(got[:1])


# Kernels take this many nodes; of larger trees parts are evaluated first.
MAX_LEAVES = 12


@settings(max_examples=150)
@given(calls(depth=5, max_kv=6).filter(lambda call: number_of_leaves(call.tree) > MAX_LEAVES))
def test_large_trees(call):
    check(*call.args, **call.positions)


@st.composite
def biases(draw, call):
    """[b or 1, h or 1, q, kv], in any layout."""
    mask_heads = rule_reference.heads_of(call.tree, call.operands)
    heads = draw(st.sampled_from([0, 1, 2, 3] if mask_heads == 1 else [mask_heads, 1]))
    batch_size = draw(st.sampled_from([call.batch_size, 1]))
    shape = (batch_size, heads, call.q_length, call.kv_length)
    dtype = draw(st.sampled_from(OUT_DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bias = torch.randint(-99, 100, shape, generator=generator).to(dtype) / 7
    special = draw(st.sampled_from([None, 0.0, float("nan"), float("inf"), lowest(dtype)]))
    if special is not None and bias.numel():
        # A sum with the lowest number would overflow or give NaN: masked cells must not be sums.
        where = torch.randint(0, 3, shape, generator=generator) == 0
        bias = bias.masked_fill(where, special)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return LAYOUTS[layout](bias) if bias.numel() else bias


@settings(max_examples=200)
@given(st.data(), calls(depth=2))
def test_additive_with_a_bias(data, call):
    bias = data.draw(biases(call))
    arguments = {**call.positions, "dtype": bias.dtype, "bias": bias}
    before = bias.clone()
    got = ops.additive(*call.args, **arguments)
    assert_same_mask(got, rule_reference.additive(*call.args, **arguments))
    assert_same_mask(bias, before)


@settings(max_examples=100)
@given(calls(depth=2), st.sampled_from(OUT_DTYPES))
def test_additive(call, dtype):
    arguments = {**call.positions, "dtype": dtype}
    got = ops.additive(*call.args, **arguments)
    assert_same_mask(got, rule_reference.additive(*call.args, **arguments))
    assert has_distinct_memory(got[:1])


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_bias_is_broadcast(dtype):
    rule, operands, sizes = [AND, 2, CAUSAL, PADDING, 0], [torch.tensor([[1, 0, 1, 1]])], (3, 2, 4)
    for shape in itertools.product((1, 3), (1, 5)):
        bias = torch.randn(*shape, 2, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = ops.additive(rule, operands, *sizes, dtype=dtype, q_offset=2, bias=bias)
        assert got.shape == (3, shape[1], 2, 4)
        sees = ops.boolean(rule, operands, *sizes, q_offset=2).expand_as(got)
        assert_same_mask(got[sees], bias.expand_as(got)[sees])
        assert (got[~sees] == lowest(dtype)).all()


# Every leaf in every small place


def test_small_windows():
    for left, right in itertools.product(range(-1, 5), repeat=2):
        for q_length, kv_length, q_offset in itertools.product((1, 3, 5), (1, 4, 7), (-2, 0, 3)):
            check([WINDOW, left, right], [], 2, q_length, kv_length, q_offset=q_offset)


def test_small_chunks():
    pads = torch.tensor([0, 1, 2, 3, -1, 9])
    for size in range(1, 6):
        for q_length, q_offset, kv_offset in itertools.product((1, 6), (0, 3), (0, 2)):
            offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
            check([CHUNK, size, -1], [], 1, q_length, 8, **offsets)
            check([CHUNK, size, 0], [pads], 6, q_length, 8, **offsets)
            check([CHUNK, size, 0], [pads[3:4]], 4, q_length, 8, **offsets)


def test_small_offsets_of_causality():
    for q_offset, kv_offset in itertools.product(range(-4, 5), repeat=2):
        check([CAUSAL], [], 1, 4, 5, q_offset=q_offset, kv_offset=kv_offset)


@pytest.mark.parametrize("kv_length", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
def test_row_lengths(kv_length):
    """Around what a store, a word or a cache line holds."""
    generator = torch.Generator().manual_seed(kv_length)
    padding = torch.rand(2, kv_length, generator=generator) < 0.7
    ids = torch.randint(-1, 3, (2, kv_length), generator=generator).sort(-1).values
    bits = torch.rand(1, 2, 3, kv_length, generator=generator) < 0.5
    operands = [padding, ids, bits]
    where = {"q_offset": max(kv_length - 3, 0)}
    for rule in (
        [CAUSAL],
        [AND, 2, WINDOW, kv_length // 2, 0, PADDING, 0],
        [OR, 2, CAUSAL, BLOCKS, 1],
        [AND, 3, CAUSAL, DOCUMENTS, 1, BITS, 2],
        [BITS, 2],
    ):
        check(rule, operands, 2, 3, kv_length, **where)


def test_heads_of_bits():
    bits = torch.tensor([True, False, True]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    got = check([AND, 2, ALL, BITS, 0], [bits], 2, 2, 4)
    assert got.shape == (2, 3, 2, 4)
    more = torch.tensor([[[[True, False, False, True]] * 2]])
    check([OR, 2, BITS, 1, BITS, 0], [bits, more], 2, 2, 4)
    check([OR, 2, BITS, 0, BITS, 1], [bits, more], 2, 2, 4)


def test_bits_are_found_by_row_and_column():
    """Whatever the positions of row and column, also those below `shift` and `reindex`."""
    bits = torch.tensor([[[[1, 0, 0], [0, 1, 1]]]], dtype=torch.bool)
    shifted = [SHIFT, 5, 1, BITS, 0]
    for rule in ([BITS, 0], shifted, [REINDEX, 1, *shifted]):
        operands = [bits, torch.arange(20).flip(0)[None]]
        got = ops.boolean(rule, operands, 1, 2, 3, q_offset=4, kv_offset=7)
        assert_same_mask(got, bits)


# The operands


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_dtypes_of_ids(dtype):
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 0, 0, 0]]).to(dtype)
    if dtype.is_signed:
        ids[0, 2] = ids[1, 4] = -1
    starts, positions = ids[:, 0].clamp(min=0), torch.tensor([[0, 1, 0, 1, 2, 0]]).to(dtype)
    for rule in (
        [BLOCKS, 0],
        [DOCUMENTS, 0],
        [CHUNK, 2, 1],
        [REINDEX, 2, CAUSAL],
        [REINDEX, 2, BLOCKS, 0],
    ):
        check(rule, [ids, starts, positions], 2, 6, 6)


def every_value(dtype):
    """All the bit patterns of a dtype of one or two bytes, some of a longer one."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    size = torch.empty((), dtype=dtype).element_size()
    if size <= 2:
        unsigned = torch.uint8 if size == 1 else torch.uint16
        return torch.arange(256**size, dtype=torch.int32).to(unsigned).view(dtype)
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        some = [0.0, -0.0, 1, -1, 0.5, info.tiny, info.tiny / 8, -info.tiny / 8, info.max, info.min]
        return torch.tensor([*some, float("nan"), float("inf"), -float("inf")], dtype=dtype)
    info = torch.iinfo(dtype)
    some = {0, 1, 2, 255, 256, 2**16, 2**31 - 1, info.max, info.max - 1, info.min, info.min + 1}
    if dtype == torch.uint64:
        return torch.tensor([n - 2**64 if n >= 2**63 else n for n in some]).view(dtype)
    return torch.tensor(sorted(some), dtype=torch.int64).to(dtype)


@pytest.mark.parametrize("dtype", PADDING_DTYPES, ids=str)
def test_values_of_padding(dtype):
    """All but zero is seen: NaN, too, and the smallest number."""
    padding = every_value(dtype)[None]
    got = check([PADDING, 0], [padding], 1, 1, padding.shape[1])
    if dtype != torch.float8_e8m0fnu:  # has no zero
        assert not got.all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8, FLOAT])
def test_layouts_of_operands(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    padding = torch.randint(0, 2, (3, 37), generator=generator).to(dtype)
    ids = torch.randint(-1, 3, (3, 37), generator=generator)
    starts = torch.tensor([0, 3, 5])
    bits = torch.rand(3, 2, 5, 37, generator=generator) < 0.6
    operands = [LAYOUTS[layout](operand) for operand in (padding, ids, starts, bits)]
    for rule in ([PADDING, 0], [BLOCKS, 1], [DOCUMENTS, 1], [CHUNK, 4, 2], [BITS, 3]):
        check(rule, operands, 3, 5, 37, q_offset=20)
    check([REINDEX, 1, WINDOW, 1, 0], operands, 3, 5, 37, q_offset=20)


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("kv_offset", [-2, 0, 2])
def test_positions_beyond_the_operands(kv_offset, length):
    """Nothing is seen there, from there either; nothing is read there."""
    operand = torch.zeros(2, length, dtype=torch.int64)
    positions = {"q_offset": kv_offset, "kv_offset": kv_offset}
    for rule in ([BLOCKS, 0], [DOCUMENTS, 0], [REINDEX, 0, ALL], [REINDEX, 0, OR, 2, CAUSAL, ALL]):
        got = check(rule, [operand], 2, 6, 6, **positions)
        assert got.sum() == 2 * len(set(range(length)) & set(range(kv_offset, kv_offset + 6))) ** 2
        check([OR, 2, CAUSAL, *rule], [operand], 2, 6, 6, **positions)
    check([PADDING, 0], [operand + 1], 2, 6, 6, **positions)


FAR = rules.FAR


@pytest.mark.parametrize("value", [-(2**63), -FAR, -1, FAR, 2**63 - 1])
def test_huge_values_of_operands(value):
    operand, ids = torch.tensor([[0, value, 1]]), torch.tensor([[3, 3, 3]])
    for rule in (
        [BLOCKS, 0],
        [DOCUMENTS, 0],
        [REINDEX, 0, CAUSAL],
        [REINDEX, 0, BLOCKS, 1],
        [REINDEX, 0, PADDING, 1],
    ):
        check(rule, [operand, ids], 1, 3, 3)
    arithmetic = (
        [REINDEX, 0, WINDOW, 2, 2],
        [REINDEX, 0, SHIFT, 1, -1, CAUSAL],
        [REINDEX, 0, SHIFT, -1, 1, WINDOW, 1, -1],
        [REINDEX, 0, CHUNK, 3, -1],
        [CHUNK, 2, 1],
    )
    for rule in arithmetic:
        operands = [operand, operand[0, 1:2]]
        if abs(value) <= FAR:
            check(rule, operands, 1, 3, 3)
        else:  # overflows, and must do no harm
            assert ops.boolean(rule, operands, 1, 3, 3).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("value", [-FAR, FAR])
def test_huge_positions(value):
    positions = torch.tensor([[0, value, 1]])
    for where in ({"q_positions": positions}, {"kv_positions": positions[0]}):
        for rule in ([CAUSAL], [WINDOW, 3, 0], [OR, 2, CHUNK, 2, -1, PADDING, 0]):
            check(rule, [torch.ones(1, 4)], 1, 3, 3, **where)


def test_one_operand_named_twice():
    ids = torch.tensor([[0, 0, 1, 1]])
    check([OR, 2, BLOCKS, 0, AND, 2, PADDING, 0, REINDEX, 0, CAUSAL], [ids], 2, 4, 4)


def test_operands_that_are_not_named():
    check([CAUSAL], [torch.zeros(1, 3, dtype=torch.int64)], 2, 3, 3)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (1, 0, 0)], ids=str)
def test_empty_masks(sizes):
    batch_size, q_length, kv_length = sizes
    ids = torch.zeros(batch_size, kv_length, dtype=torch.int64)
    starts, bits = torch.zeros(batch_size, dtype=torch.int64), torch.ones(1, 1, *sizes[1:]).bool()
    bias = torch.zeros(1, 2, q_length, kv_length)
    for rule in (
        [CAUSAL],
        [CHUNK, 2, 1],
        [BLOCKS, 0],
        [AND, 2, PADDING, 0, DOCUMENTS, 0],
        [REINDEX, 0, CAUSAL],
        [BITS, 2],
    ):
        check(rule, [ids, starts, bits], *sizes)
        got = ops.additive(rule, [ids, starts, bits], *sizes, dtype=FLOAT, bias=bias)
        assert got.shape == (batch_size, 2, q_length, kv_length)


# Large trees


@pytest.mark.parametrize("opcode", [AND, OR])
def test_many_children(opcode):
    generator = torch.Generator().manual_seed(0)
    share = 0.95 if opcode == AND else 0.05
    paddings = [torch.rand(1, 12, generator=generator) < share for _ in range(12)]
    leaves = list(itertools.chain.from_iterable([PADDING, i] for i in range(12)))
    got = check([opcode, 12, *leaves], paddings, 2, 2, 12)
    assert got.any() and not got.all()


def test_long_chains():
    """Every other operator in between, so that nothing can be flattened."""
    rule, operands = [CAUSAL], []
    for i in range(8):
        operands.append(torch.arange(16)[None] != i)
        rule = [AND if i % 2 else OR, 2, *rule, PADDING, i]
    check(rule, operands, 2, 5, 9)
    for _ in range(3):
        operands.append(torch.arange(16).flip(0)[None])
        rule = [SHIFT, 1, 0, REINDEX, len(operands) - 1, CAUSAL]
        rule = [AND, 3, WINDOW, 6, 6, *rule, SHIFT, 0, 1, CAUSAL]
        check(rule, operands, 2, 5, 9)


def check_both(rule, operands, *sizes, **positions):
    want = check(rule, operands, *sizes, **positions)
    got = ops.additive(rule, operands, *sizes, dtype=FLOAT, **positions)
    assert_same_mask(got, torch.zeros(want.shape).masked_fill(~want, lowest(FLOAT)))


def test_trees_of_many_leaves():
    check_both([AND, 500, *[CAUSAL] * 500], [], 1, 3, 4)
    check_both([OR, 30, *[SHIFT, 0, 1, CAUSAL] * 30], [], 1, 3, 4)
    shifts = itertools.chain.from_iterable([SHIFT, i, 0, WINDOW, 0, 0] for i in range(0, 60, 2))
    check_both([OR, 30, *shifts], [], 1, 5, 70)


def test_deep_trees():
    """Leaves and nodes in turn, so that all of them wait for the deepest."""
    rule = [CAUSAL]
    for i in range(200):
        left = i % 3
        rule = [AND if i % 2 else OR, 2, SHIFT, -i % 5, 0, WINDOW, left, left, *rule]
    check_both(rule, [], 1, 5, 9)


def test_many_changes_of_positions():
    check_both([SHIFT, 1, 0] * 40 + [WINDOW, 40, 0], [], 1, 5, 50)
    tables = [
        torch.randperm(12, generator=torch.Generator().manual_seed(i))[None] for i in range(8)
    ]
    nested = list(itertools.chain.from_iterable([REINDEX, i] for i in range(8)))
    check_both([*nested, CAUSAL], tables, 2, 12, 12)
    leaves = itertools.chain.from_iterable([REINDEX, i, CAUSAL] for i in range(8))
    check_both([AND, 9, *leaves, *nested, CAUSAL], tables, 2, 12, 12)


def test_trees_of_chains_that_overlap():
    """Parts of one chain are others, so that the chains of a tree are stored as one at first."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randint(0, 6, (1, 6), generator=generator) for _ in range(8)]
    windows = itertools.chain.from_iterable([WINDOW, i, -1] for i in range(12))
    large = [OR, 13, *windows, CAUSAL]

    def under(first, last, rule):
        chain = itertools.chain.from_iterable([REINDEX, i] for i in range(first, last + 1))
        return [*chain, *rule]

    inner = [AND, 6, *[CAUSAL, WINDOW, 2, 1] * 3]
    rule = [AND, 2, *under(2, 5, [CAUSAL]), *under(3, 6, large)]
    rule = [OR, 2, *under(4, 7, inner), *rule]
    check_both([AND, 2, *under(0, 3, [CAUSAL]), *rule], tables, 1, 6, 6)
    picks = torch.randint(0, 8, (300, 2), generator=generator).sort(-1).values.tolist()
    for i in range(0, 300, 10):
        leaves = [under(first, last, [CAUSAL]) for first, last in picks[i : i + 10]]
        for j, leaf in enumerate(leaves):
            rule = [AND if j % 3 else OR, 2, *leaf, *rule] if j else large
        check_both(rule, tables, 1, 6, 6)


def test_open_sides_reach_far():
    far = FAR - 1
    for sides in ((-1, -1), (2**61, -1), (-1, 2**62), (2**63 - 1, 2**63 - 1)):
        got = check([WINDOW, *sides], [], 1, 4, 4, q_offset=far, kv_offset=-far)
        assert got.all()
    assert check([CHUNK, 2**63 - 1, -1], [], 1, 4, 4, q_offset=far).all()
    assert check([CAUSAL], [], 1, 4, 4, q_offset=far, kv_offset=-far).all()


def test_long_tables_of_small_masks():
    """Only the entries that are needed are read: a billion would take seconds."""
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(1, 10**12)
    assert ops.boolean([DOCUMENTS, 0], [ids], 1, 4, 4).all()
    assert ops.boolean([REINDEX, 0, ALL], [ids], 1, 400, 4).all()
    assert ops.boolean([DOCUMENTS, 0], [ids], 1, 40, 40, q_offset=10**9, kv_offset=10**11).all()


@both
def test_too_many_changes_of_positions(name):
    raises(name, NotImplementedError, [REINDEX, 0] * 9 + [CAUSAL], [IDS], match="at most 8 times")


@both
def test_too_deep_trees(name):
    raises(name, ValueError, [AND, 1] * 300 + [CAUSAL], match="nested at most 256 deep")
    far = [SHIFT, 2**58, 0]
    raises(name, ValueError, far * 2 + [CAUSAL], match="sum of the shifts")


def test_large_trees_over_many_rows():
    """More rows than are evaluated at once, with a padding mask for each and a bias."""
    q_length, kv_length = 3000, 7000
    queries, keys = torch.arange(q_length)[:, None], torch.arange(kv_length)
    bits = (queries * 31 + keys * 7) % 5 != 0
    windows = itertools.chain.from_iterable([SHIFT, 0, 400 * i, WINDOW, 99, 99] for i in range(15))
    rule = [AND, 3, BITS, 0, OR, 15, *windows, CAUSAL]
    want = bits & (keys <= queries) & ((queries - keys + 99) % 400 <= 198)
    got = ops.boolean(rule, [bits[None, None]], 1, q_length, kv_length)
    assert_same_mask(got[0, 0], want)
    bias = torch.arange(q_length * kv_length, dtype=FLOAT).view(1, 1, q_length, kv_length)
    positions = torch.arange(q_length)
    got = ops.additive(
        rule,
        [bits[None, None]],
        1,
        q_length,
        kv_length,
        dtype=FLOAT,
        bias=bias,
        q_positions=positions,
    )
    assert_same_mask(got, bias.masked_fill(~want, lowest(FLOAT)))


# Positions


def test_positions_as_tensors_and_as_ints():
    rule, operands = [AND, 2, CAUSAL, PADDING, 0], [torch.tensor([[0] + [1] * 19])]
    want = check(rule, operands, 2, 3, 9, q_offset=6, kv_offset=2)
    as_tensors = [
        {"q_positions": torch.tensor(6), "kv_positions": torch.tensor(2)},
        {"q_positions": torch.tensor(6, dtype=torch.int32), "kv_offset": 2},
        {"q_positions": torch.tensor([[6], [6]]), "kv_positions": torch.tensor([[2], [2]])},
        {"q_positions": torch.arange(6, 9), "kv_positions": torch.arange(2, 11)},
        {"q_positions": torch.arange(6, 9)[None], "kv_positions": torch.arange(2, 11)[None]},
        {"q_positions": torch.arange(6, 9).expand(2, 3), "kv_offset": 2},
        {"q_positions": torch.tensor(4), "q_offset": 2, "kv_offset": 2},
        {"q_positions": torch.tensor([[4], [4]]), "q_offset": 2, "kv_offset": 2},
    ]
    for positions in as_tensors:
        assert_same_mask(ops.boolean(rule, operands, 2, 3, 9, **positions), want)


def test_offset_of_each_row():
    offsets = torch.tensor([[0], [3], [5]])
    got = ops.boolean([CAUSAL], [], 3, 2, 7, q_positions=offsets)
    for b, offset in enumerate(offsets.flatten().tolist()):
        assert_same_mask(got[b : b + 1], ops.boolean([CAUSAL], [], 1, 2, 7, q_offset=offset))


def test_zigzag_shards():
    """The masks of two context-parallel ranks, put together, are the whole mask."""
    ids = torch.tensor([[0] * 5 + [1] * 11])
    rule = [AND, 2, CAUSAL, DOCUMENTS, 0]
    whole = check(rule, [ids], 1, 16, 16)
    shards = [
        torch.cat([torch.arange(16)[4 * i :][:4], torch.arange(16)[12 - 4 * i :][:4]])
        for i in (0, 1)
    ]
    for positions in shards:
        got = ops.boolean(rule, [ids], 1, 8, 16, q_positions=positions)
        assert_same_mask(got, whole[:, :, positions])
        keys = ops.boolean(rule, [ids], 1, 16, 8, kv_positions=positions[None])
        assert_same_mask(keys, whole[..., positions])


def test_positions_beyond_32_bits():
    far = 2**33
    where = {"q_offset": far, "kv_offset": far - 2}
    check([AND, 2, CAUSAL, WINDOW, 1, -1], [], 1, 3, 5, **where)
    check([CHUNK, 2**31 + 1, -1], [], 1, 3, 5, **where)
    got = ops.boolean([CAUSAL], [], 1, 1, 2, q_positions=torch.tensor(far), kv_offset=far)
    assert got.tolist() == [[[[True, False]]]]


# What torch expects of operators

SAMPLES = {
    "factory": Call([AND, 2, CAUSAL, WINDOW, 3, -1], [], 2, 3, 5, {"q_offset": 2}),
    "padding": Call([AND, 2, CAUSAL, PADDING, 0], [torch.tensor([[0, 1, 1], [1, 1, 1]])], 2, 3, 3),
    "packed": Call(
        [AND, 2, DOCUMENTS, 0, REINDEX, 1, AND, 2, CAUSAL, CHUNK, 2, -1],
        [torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 1, 2]])],
        1,
        5,
        5,
    ),
    "blocks": Call(
        [OR, 2, AND, 2, CHUNK, 2, 0, CAUSAL, BLOCKS, 1],
        [torch.tensor([0, 1]), torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)],
        2,
        4,
        4,
    ),
    "bits": Call(
        [OR, 2, SHIFT, 1, -1, CAUSAL, BITS, 0],
        [torch.eye(3, 4, dtype=torch.bool)[None, None]],
        2,
        3,
        4,
    ),
    "positions": Call(
        [CAUSAL], [], 2, 3, 4, {"q_positions": torch.tensor(2), "kv_positions": torch.arange(4)}
    ),
    "rows": Call([CAUSAL], [], 2, 3, 4, {"q_positions": torch.tensor([[1], [2]])}),
    "empty": Call([NOTHING], [], 0, 3, 4),
}
every_sample = pytest.mark.parametrize("sample", SAMPLES)


def move(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    return [function(tensor) for tensor in value] if isinstance(value, list) else value


def moved(call, function):
    """The call with `function` applied to its tensors."""
    operands = [function(operand) for operand in call.operands]
    positions = {name: move(value, function) for name, value in call.positions.items()}
    return Call(call.rule, operands, *call.args[2:], positions)


def has_tensors(call):
    tensors = [*call.operands, *call.positions.values()]
    return any(isinstance(tensor, torch.Tensor) for tensor in tensors)


@every_sample
def test_opcheck(sample):
    call = SAMPLES[sample]
    torch.library.opcheck(ops.boolean.default, call.args, call.positions)
    arguments = {**call.positions, "dtype": torch.float16}
    torch.library.opcheck(ops.additive.default, call.args, arguments)
    arguments["bias"] = torch.ones(1, 2, call.q_length, call.kv_length, dtype=torch.float16)
    torch.library.opcheck(ops.additive.default, call.args, arguments)


@both
@every_sample
def test_meta_agrees_with_cpu(sample, name):
    call = SAMPLES[sample]
    want = OPERATORS[name](*call.args, **call.positions)
    there = moved(call, lambda tensor: tensor.to("meta"))
    device = {} if has_tensors(call) else {"device": "meta"}
    got = OPERATORS[name](*there.args, **there.positions, **device)
    assert got.device.type == "meta"
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


@both
@every_sample
def test_fake_agrees_with_cpu(sample, name):
    call = SAMPLES[sample]
    want = OPERATORS[name](*call.args, **call.positions)
    with FakeTensorMode() as mode:
        fake = moved(call, mode.from_tensor)
        got = OPERATORS[name](*fake.args, **fake.positions)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert got.device.type == "cpu"


def symbols(mode, *sizes):
    """A tensor of symbolic sizes. Made outside of the mode, or the sizes would be numbers."""
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(sizes))
    tensor = torch.ones(sizes, dtype=torch.int64)
    return mode.from_tensor(tensor, symbolic_context=dynamic)


@both
def test_symbolic_shapes(name):
    """The batch, the queries, the keys and the offset stay symbols."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    operand, other = symbols(mode, 3, 17), symbols(mode, 5, 6)
    batch_size, kv_length = operand.shape
    q_length, offset = other.shape
    assert all(isinstance(n, torch.SymInt) for n in (batch_size, kv_length, q_length, offset))
    rule = [AND, 4, CHUNK, 7, 1, WINDOW, 5, -1, PADDING, 0, REINDEX, 0, SHIFT, 1, 2, DOCUMENTS, 0]
    with mode, enable_python_dispatcher():
        starts = operand[:, 0]
        for positions in (None, starts.sum(), operand[:, :1], operand[:1], operand, operand[0]):
            got = OPERATORS[name](
                rule,
                [operand, starts],
                batch_size,
                q_length,
                kv_length,
                q_offset=offset,
                kv_positions=positions,
            )
            shape = [str(n) for n in got.shape]
            assert shape == [str(batch_size), "1", str(q_length), str(kv_length)]
    assert not environment.replacements, "a size became a constant"


@both
def test_symbolic_numbers_in_the_rule(name):
    """As under dynamic compilation: the window of a config, the distance to a cache."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    left, right, size, add = symbols(mode, 5, 6, 8, 9).shape
    rule = [AND, 3, WINDOW, left - 1, right, CHUNK, size, -1, SHIFT, add, -add, CAUSAL]
    with mode, enable_python_dispatcher():
        assert OPERATORS[name](rule, [], 2, 3, 4).shape == (2, 1, 3, 4)
    assert not environment.replacements, "a number of the rule became a constant"


@both
def test_one_graph_for_every_length(name):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def build(padding, embeds, offset):
        batch_size, kv_length = padding.shape
        return OPERATORS[name](
            [AND, 2, CAUSAL, PADDING, 0],
            [padding],
            batch_size,
            embeds.shape[0],
            kv_length,
            q_positions=offset,
        )

    torch._dynamo.reset()
    compiled = torch.compile(build, backend=backend, fullgraph=True, dynamic=True)
    for batch_size, q_length, kv_length in ((2, 3, 5), (4, 2, 9), (3, 7, 8)):
        padding = torch.ones(batch_size, kv_length, dtype=torch.int64).tril()
        embeds, offset = torch.zeros(q_length, 11), torch.tensor(kv_length - q_length)
        assert_same_mask(compiled(padding, embeds, offset), build(padding, embeds, offset))
    assert len(graphs) == 1


@both
@every_sample
def test_inputs_stay_as_they_are_and_are_not_handed_out(sample, name):
    call = SAMPLES[sample]
    before = moved(call, torch.clone)
    result = OPERATORS[name](*call.args, **call.positions)
    tensors = [*call.operands, *(p for p in call.positions.values() if not isinstance(p, int))]
    kept = [*before.operands, *(p for p in before.positions.values() if not isinstance(p, int))]
    for tensor, unchanged in zip(tensors, kept, strict=True):
        assert_same_mask(tensor, unchanged)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert result.untyped_storage().data_ptr() not in storages - {0}


@pytest.mark.parametrize("name", OPERATORS)
def test_schema(name):
    schema = getattr(ops, name).default._schema
    assert not schema.is_mutable
    arguments = [("*" if a.kwarg_only else "") + a.name for a in schema.arguments]
    places = ["*q_offset", "*kv_offset", "*q_positions", "*kv_positions", "*device"]
    places += ["*stride_multiple", "*unmask_unattended"]
    extra = ["*bias", "*dtype", "*masked_value"] if name == "additive" else []
    assert arguments[:5] == ["rule", "operands", "batch_size", "q_length", "kv_length"]
    assert sorted(arguments[5:]) == sorted(places + extra)


@pytest.mark.cuda
@both
@every_sample
def test_cuda_agrees_with_cpu(sample, name):
    call = SAMPLES[sample]
    want = OPERATORS[name](*call.args, **call.positions)
    there = moved(call, lambda tensor: tensor.to("cuda"))
    device = {} if has_tensors(call) else {"device": "cuda"}
    got = OPERATORS[name](*there.args, **there.positions, **device)
    assert got.stride() == want.stride()
    assert_same_mask(got.cpu(), want)


# Bad input

IDS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
FLOAT_IDS = IDS.float()
STARTS = torch.tensor([0, 1])
SET = torch.ones(2, 1, 3, 4, dtype=torch.bool)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
NO_IDS = (torch.bool, *UNSIGNED, *OUT_DTYPES, *FLOAT8_DTYPES, *COMPLEX_DTYPES)


def raises(name, error, rule, operands=(), sizes=(2, 3, 4), match="", **positions):
    __tracebackhide__ = True
    with pytest.raises(error, match=rf"^{name}: expected .*{match}"):
        OPERATORS[name](rule, list(operands), *sizes, **positions)


CORRUPT = {
    "empty": [],
    "unknown opcode": [len(OPCODES)],
    "negative opcode": [-1],
    "huge opcode": [2**62],
    "smallest opcode": [-(2**63)],
    "unknown opcode below": [AND, 2, CAUSAL, 99],
    "window without sides": [WINDOW],
    "window with one side": [WINDOW, 3],
    "chunk without an operand": [CHUNK, 3],
    "blocks without an operand": [BLOCKS],
    "and without a number": [AND],
    "and that ends too early": [AND, 2, CAUSAL],
    "or that ends too early": [OR, 3, CAUSAL, AND, 1, CAUSAL],
    "and of none": [AND, 0],
    "or of none": [OR, 0],
    "and of none, followed": [AND, 0, CAUSAL],
    "and of minus one": [AND, -1, CAUSAL],
    "or of the smallest number": [OR, -(2**63), CAUSAL],
    "and of far too many": [AND, 2**62, CAUSAL, CAUSAL],
    "or of too many for memory": [OR, 2**31, CAUSAL],
    "reindex of nothing": [REINDEX, 0],
    "reindex without an operand": [REINDEX],
    "shift of nothing": [SHIFT, 1, 1],
    "shift by one number": [SHIFT, 1],
    "ints too many": [CAUSAL, CAUSAL],
    "ints too many after a node": [AND, 1, CAUSAL, 0],
    "chunks of zero": [CHUNK, 0, -1],
    "chunks of minus one": [CHUNK, -1, -1],
    **{
        f"operand {i} of {opcode}": [opcode, i]
        for opcode in (BLOCKS, PADDING, DOCUMENTS, BITS)
        for i in (1, -1, -2, 2**40, -(2**63))
    },
    **{f"operand {i} of a chunk": [CHUNK, 2, i] for i in (1, -2, 2**40)},
    **{f"operand {i} of reindex": [REINDEX, i, CAUSAL] for i in (1, -1, 2**40)},
}


@both
@pytest.mark.parametrize("corrupt", CORRUPT)
def test_corrupt_rules(corrupt, name):
    with pytest.raises(rule_reference.CorruptRule):
        rule_reference.parse(CORRUPT[corrupt], 1)
    raises(name, ValueError, CORRUPT[corrupt], [IDS])
    if has_negative_or_no_operand(CORRUPT[corrupt]):
        raises(name, ValueError, CORRUPT[corrupt])


def has_negative_or_no_operand(rule):
    return rule[:1] not in ([BLOCKS], [PADDING], [DOCUMENTS], [BITS], [REINDEX], [CHUNK])


@both
@pytest.mark.parametrize("opcode", [BLOCKS, DOCUMENTS, REINDEX])
@pytest.mark.parametrize("dtype", NO_IDS, ids=str)
def test_dtypes_that_are_no_ids(dtype, opcode, name):
    rule = [opcode, 0, CAUSAL] if opcode == REINDEX else [opcode, 0]
    raises(name, TypeError, rule, [IDS.to(dtype)])


@both
@pytest.mark.parametrize("dtype", NO_IDS, ids=str)
def test_dtypes_that_are_no_starts(dtype, name):
    raises(name, TypeError, [CHUNK, 2, 0], [STARTS.to(dtype)])


@both
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_dtypes_that_are_no_padding(dtype, name):
    raises(name, TypeError, [PADDING, 0], [IDS.to(dtype)])


@both
@pytest.mark.parametrize("dtype", [*INT_DTYPES, *OUT_DTYPES, torch.complex64], ids=str)
def test_dtypes_that_are_no_bits(dtype, name):
    raises(name, TypeError, [BITS, 0], [SET.to(dtype)])


@both
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 1, 4), (1, 2, 1, 4), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("opcode", [BLOCKS, DOCUMENTS, REINDEX, PADDING])
def test_shapes_that_are_no_ids(opcode, shape, name):
    """Another rank, or another batch."""
    rule = [opcode, 0, CAUSAL] if opcode == REINDEX else [opcode, 0]
    raises(name, ValueError, rule, [torch.zeros(shape, dtype=torch.int64)])


@both
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 1), (1, 2)], ids=str)
def test_shapes_that_are_no_starts(shape, name):
    raises(name, ValueError, [CHUNK, 2, 0], [torch.zeros(shape, dtype=torch.int64)])


@both
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (3, 4),
        (2, 3, 4),
        (3, 1, 3, 4),
        (2, 1, 3, 5),
        (2, 1, 2, 4),
        (2, 1, 3, 1),
        (2, 1, 1, 4),
    ],
    ids=str,
)
def test_shapes_that_are_no_bits(shape, name):
    raises(name, ValueError, [BITS, 0], [torch.ones(shape, dtype=torch.bool)])


@both
def test_bits_of_different_heads(name):
    bits = [torch.ones(1, heads, 3, 4, dtype=torch.bool) for heads in (2, 3)]
    raises(name, ValueError, [AND, 2, BITS, 0, BITS, 1], bits)


def test_heads_of_a_bias_that_are_not_those_of_the_bits():
    bits = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"(?s)^additive: expected .*but got "):
        ops.additive([BITS, 0], [bits], 2, 3, 4, dtype=FLOAT, bias=torch.zeros(1, 3, 3, 4))


@both
@pytest.mark.parametrize("axis", ["q", "kv"])
def test_positions_that_are_none(axis, name):
    length = {"q": 3, "kv": 4}[axis]
    for shape in [
        (length + 1,),
        (0,),
        (3, length),
        (2, length + 1),
        (1, length - 1),
        (2, 1, length),
    ]:
        positions = torch.zeros(shape, dtype=torch.int64)
        raises(name, ValueError, [CAUSAL], **{f"{axis}_positions": positions})
    for dtype in NO_IDS:
        positions = torch.zeros(length, dtype=dtype)
        raises(name, TypeError, [CAUSAL], **{f"{axis}_positions": positions})


@both
@pytest.mark.parametrize(
    "sizes",
    [(-1, 3, 4), (2, -1, 4), (2, 3, -1), (2, 3, -(2**63)), (2**62, 2**62, 4), (2, 2**62, 2**62)],
    ids=str,
)
def test_impossible_sizes(sizes, name):
    raises(name, ValueError, [CAUSAL], sizes=sizes)


@both
def test_mixed_devices(name):
    elsewhere = IDS.to("meta")
    raises(name, ValueError, [AND, 2, BLOCKS, 0, DOCUMENTS, 1], [IDS, elsewhere])
    raises(name, ValueError, [AND, 2, BLOCKS, 0, DOCUMENTS, 1], [elsewhere, IDS])
    raises(name, ValueError, [BLOCKS, 0], [elsewhere], q_positions=torch.tensor(0))
    raises(name, ValueError, [BLOCKS, 0], [IDS], q_positions=torch.tensor(0, device="meta"))
    raises(name, ValueError, [BLOCKS, 0], [IDS], device="meta")


@both
def test_layouts_that_are_not_strided(name):
    for strange in (IDS.to_sparse(), FLOAT_IDS.to_mkldnn()):
        with pytest.raises(CALLERS_ERRORS, match=rf"^{name}: expected "):
            OPERATORS[name]([PADDING, 0], [strange], 2, 3, 4)


@pytest.mark.parametrize(
    "dtype", (torch.bool, *INT_DTYPES, *FLOAT8_DTYPES, *COMPLEX_DTYPES), ids=str
)
def test_dtypes_of_additive_masks(dtype):
    with pytest.raises(TypeError, match=r"^additive: expected dtype\b.*but got "):
        ops.additive([CAUSAL], [], 2, 3, 4, dtype=dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (4,),
        (3, 4),
        (1, 3, 4),
        (3, 1, 3, 4),
        (2, 1, 3, 5),
        (2, 1, 1, 4),
        (2, 1, 3, 1),
        (0, 1, 3, 4),
    ],
    ids=str,
)
def test_shapes_that_are_no_bias(shape):
    with pytest.raises(ValueError, match=r"(?s)^additive: expected bias\b.*but got "):
        ops.additive([CAUSAL], [], 2, 3, 4, dtype=FLOAT, bias=torch.zeros(shape))


@pytest.mark.parametrize(
    "dtype", (torch.bool, *INT_DTYPES, *FLOAT8_DTYPES, *COMPLEX_DTYPES), ids=str
)
def test_dtypes_that_are_no_bias(dtype):
    bias = torch.ones(2, 1, 3, 4).to(dtype)
    with pytest.raises(TypeError, match=r"(?s)^additive: expected .*bias.*but got "):
        ops.additive([CAUSAL], [], 2, 3, 4, dtype=FLOAT, bias=bias)


def test_bias_on_another_device():
    bias = torch.zeros(2, 1, 3, 4, device="meta")
    with pytest.raises(ValueError, match=r"(?s)^additive: expected .*but got "):
        ops.additive([BLOCKS, 0], [IDS], 2, 3, 4, dtype=FLOAT, bias=bias)


@both
@pytest.mark.parametrize("opening", [[AND, 1], [OR, 1], [SHIFT, 0, 0], [REINDEX, 0]], ids=str)
def test_deep_nesting(opening, name):
    """A mask or an error; recursion would end the process."""
    operands = [torch.arange(4)[None]]
    want = OPERATORS[name]([CAUSAL], operands, 2, 3, 4)
    for depth in (10_000, 200_000):
        try:
            got = OPERATORS[name](opening * depth + [CAUSAL], operands, 2, 3, 4)
        except (ValueError, NotImplementedError) as error:
            assert str(error).startswith(f"{name}: expected rule ")
        else:
            assert_same_mask(got, want)
        raises(name, ValueError, opening * depth, operands)


STRAY = (-(2**63), -99, -1, *OPCODES.values(), len(OPCODES), 64, 2**31, 2**40, 2**63 - 1)


@st.composite
def damaged_calls(draw):
    call = draw(calls(depth=2, max_kv=6))
    rule = list(call.rule)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(rule)))
        damage = draw(st.sampled_from(["replace", "insert", "remove", "cut"]))
        stray = draw(st.sampled_from(STRAY))
        if damage == "cut":
            rule = rule[:at]
        elif damage == "insert":
            rule.insert(at, stray)
        elif at < len(rule):
            rule[at : at + 1] = [stray] if damage == "replace" else []
    return Call(rule, call.operands, *call.args[2:], call.positions)


@settings(max_examples=400)
@given(damaged_calls())
def test_damaged_rules(call):
    """An exception where the program is none; else the mask that the program now stands for."""
    try:
        call.tree  # noqa: B018
    except rule_reference.CorruptRule:
        with pytest.raises(CALLERS_ERRORS, match=r"^boolean: expected "):
            ops.boolean(*call.args, **call.positions)
        return
    try:
        got = ops.boolean(*call.args, **call.positions)
    except CALLERS_ERRORS as error:
        assert str(error).startswith("boolean: expected ")
    else:
        assert_same_mask(got, rule_reference.boolean(*call.args, **call.positions))


@settings(max_examples=300)
@given(st.lists(st.sampled_from(STRAY), max_size=12), st.sampled_from(["ids", "starts", "bits"]))
def test_random_ints(rule, operand):
    operands = [{"ids": IDS, "starts": STARTS, "bits": SET}[operand]] * 3
    for name, build in OPERATORS.items():
        try:
            tree = rule_reference.parse(rule, len(operands))
        except rule_reference.CorruptRule:
            with pytest.raises(CALLERS_ERRORS, match=rf"^{name}: expected "):
                build(rule, operands, 2, 3, 4)
            continue
        try:
            got = build(rule, operands, 2, 3, 4)
        except CALLERS_ERRORS as error:
            assert str(error).startswith(f"{name}: expected ")
            assert any(node[0] not in (ALL, CAUSAL, WINDOW, NOTHING) for node in nodes(tree))
        else:
            want = rule_reference.boolean(rule, operands, 2, 3, 4)
            assert_same_mask(got if name == "boolean" else got == 0, want)


# The objects, under the names of transformers, whose closures they stand for.

NAMES = masking_utils
RULE_LEAVES = tuple(leaf for leaf in LEAVES if not leaf.startswith("user"))
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))


@pytest.fixture(scope="session")
def closures():
    return pytest.importorskip(
        "transformers.masking_utils",
        reason="transformers, whose mask functions these stand for, is not installed",
    )


def vmapped(function):
    """As transformers does it: one dimension after the other, the keys innermost."""
    for axis in (3, 2, 1, 0):
        dimensions = tuple(0 if i == axis else None for i in range(4))
        function = torch.vmap(function, in_dims=dimensions)
    return function


@settings(max_examples=150)
@given(builders(), SIZES, st.integers(0, 3), st.integers(0, 3))
def test_calls_broadcast_as_closures_do(closures, builder, sizes, q_offset, kv_offset):
    indices = grid(*sizes, q_offset, kv_offset)
    assert_same_mask(builder(NAMES)(*indices), builder(closures)(*indices))


@settings(max_examples=80)
@given(builders(), SIZES)
def test_calls_under_vmap(closures, builder, sizes):
    indices = [index.flatten() for index in grid(*sizes)]
    with TransformGetItemToIndex():
        got = vmapped(builder(NAMES))(*indices)
        assert_same_mask(got, vmapped(builder(closures))(*indices))


@settings(max_examples=80)
@given(builders(), st.integers(0, 2**31))
def test_calls_with_indices_of_any_shape(closures, builder, seed):
    generator = torch.Generator().manual_seed(seed)
    limits = (3, 1, 9, 9)
    for shape in ((), (5,), (2, 3)):
        indices = [torch.randint(0, n, shape, generator=generator) for n in limits]
        assert_same_mask(builder(NAMES)(*indices), builder(closures)(*indices))


@st.composite
def rule_builders(draw):
    """(builder, whether its tree is small enough for the operators at any rate)"""
    depth = draw(st.sampled_from([1, 2]))
    return draw(builders(depth=depth, leaves=RULE_LEAVES)), depth == 1


@settings(max_examples=200)
@given(rule_builders(), SIZES, st.integers(0, 3), st.integers(0, 3))
def test_encode_says_what_the_call_answers(builder_and_size, sizes, q_offset, kv_offset):
    builder, is_small = builder_and_size
    sizes = (3, *sizes[1:])  # the batch of the tables
    function = builder(NAMES)
    try:
        rule, operands = function.encode()
    except TypeError:
        assert not is_small
        return
    assert all(type(n) is int for n in rule)
    answer = function(*grid(*sizes, q_offset, kv_offset)).expand(3, 1, *sizes[1:])
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    assert_same_mask(answer, rule_reference.boolean(rule, operands, *sizes, **offsets))
    assert_same_mask(ops.boolean(rule, operands, *sizes, **offsets), answer)


@settings(max_examples=60)
@given(builders(depth=1, leaves=RULE_LEAVES))
def test_encode_names_the_tensors_themselves(builder):
    function = builder(NAMES)
    rule, operands = function.encode()
    again, same_operands = function.encode()
    assert again == rule
    assert all(a is b for a, b in zip(operands, same_operands, strict=True))
    rule.append(99)
    operands.append(None)
    assert function.encode()[0] == again


def test_windows_of_every_width():
    """0 and less have no opcode of their own, so the encoding has to find another way."""
    indices = grid(1, 6, 8, 2)
    for left, right in itertools.product((None, *range(-4, 5)), repeat=2):
        if left is None and right is None:
            continue
        function = rules.any_window("window", left, right)
        rule, operands = function.encode()
        q, k = indices[2], indices[3]
        want = torch.ones(1, 1, 6, 8, dtype=torch.bool)
        want &= (k >= q - left) if left is not None else True
        want &= (k <= q + right) if right is not None else True
        assert_same_mask(function(*indices), want)
        assert_same_mask(rule_reference.boolean(rule, operands, 1, 6, 8, q_offset=2), want)
        check(rule, operands, 1, 6, 8, q_offset=2)


def test_empty_unions_and_intersections():
    indices = grid(2, 3, 4)
    for function, answer in ((rules.intersection(), True), (rules.union(), False)):
        got = ops.boolean(*function.encode(), 2, 3, 4)
        assert_same_mask(got, torch.full((2, 1, 3, 4), answer))
        assert function(*indices).item() is answer


@pytest.mark.parametrize("dtype", [*ID_DTYPES, torch.uint8], ids=str)
def test_encoded_ids_of_every_dtype_are_taken(dtype):
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).to(dtype)
    for function in (
        rules.blockwise(ids),
        rules.documents(ids),
        rules.reindex(rules.causal(), ids),
        rules.chunked(2, ids[:, 2]),
    ):
        rule, operands = function.encode()
        answer = function(*grid(2, 4, 4)).expand(2, 1, 4, 4)
        assert_same_mask(ops.boolean(rule, operands, 2, 4, 4), answer)


@pytest.mark.parametrize(
    "function",
    [
        rules.function(lambda b, h, q, k: q > k),
        rules.causal() & (lambda b, h, q, k: q > k),
        rules.shift(rules.causal(), torch.tensor(1), 0),
        masking_utils.blockwise_overlay(torch.zeros(1, 3)),
    ],
    ids=repr,
)
def test_trees_without_an_encoding(function):
    with pytest.raises(TypeError, match=r"^encode: expected a tree of rules, but got "):
        function.encode()


# Trees grow


def test_operators_compose():
    causal, window = rules.causal(), rules.sliding_window(3)
    user = lambda b, h, q, k: (q + k) % 2 == 0  # noqa: E731
    indices = grid(2, 5, 6)
    for both_, either, other in (
        (causal & window, causal | window, window),
        (causal & user, causal | user, user),
        (user & causal, user | causal, user),
    ):
        one, two = causal(*indices), other(*indices)
        assert_same_mask(both_(*indices), one & two)
        assert_same_mask(either(*indices), one | two)
        assert isinstance(both_, rules.MaskFunction) and isinstance(either, rules.MaskFunction)
    for other in (3, None, "causal"):
        with pytest.raises(TypeError):
            causal & other
        with pytest.raises(TypeError):
            other | causal
    # & binds before |, as in Python.
    mixed = causal | window & user
    assert_same_mask(mixed(*indices), causal(*indices) | (window(*indices) & user(*indices)))


def test_trees_are_immutable():
    with pytest.raises(AttributeError):
        rules.sliding_window(3).left = 4
    tree = rules.causal() & rules.sliding_window(3)
    before = tree.encode()
    tree & rules.bidirectional()
    assert tree.encode() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda: rules.sliding_window(float("nan")),
        lambda: rules.chunked(2.5),
        lambda: rules.sliding_window(torch.tensor(3)),
        lambda: rules.window("a", 1),
        lambda: rules.chunked(None),
        lambda: rules.chunked(2, 3),
        lambda: rules.blockwise([0, 1]),
        lambda: rules.padding(None),
        lambda: rules.documents(3),
        lambda: rules.reindex(rules.causal(), [0]),
        lambda: rules.reindex(3, torch.zeros(1, 2)),
        lambda: rules.shift(rules.causal(), "a", 0),
        lambda: rules.shift(None, 0, 0),
        lambda: rules.intersection(rules.causal(), 3),
        lambda: rules.union("causal"),
        lambda: rules.function(3),
    ],
)
def test_arguments_of_another_type(call):
    with pytest.raises(TypeError, match=r": expected .*but got "):
        call()


def test_chunks_of_size_zero():
    with pytest.raises(ValueError, match=r"^chunked: expected size "):
        rules.chunked(0)


# Objects as values


@settings(max_examples=60)
@given(builders(depth=1, leaves=RULE_LEAVES), SIZES)
def test_copies(builder, sizes):
    function, indices = builder(NAMES), grid(*sizes)
    answer = function(*indices)
    for duplicate in (
        copy.copy(function),
        copy.deepcopy(function),
        pickle.loads(pickle.dumps(function)),
    ):
        assert type(duplicate) is type(function)
        assert repr(duplicate) == repr(function)
        assert duplicate.encode()[0] == function.encode()[0]
        assert_same_mask(duplicate(*indices), answer)
    assert copy.copy(function) == function


def module_level(b, h, q, k):
    return q == k


def test_pickles_with_a_function_of_the_user():
    # Found by its name, which this file has only once it can be imported.
    sys.modules.setdefault(module_level.__module__, sys.modules[__name__])
    function = rules.causal() & module_level
    again = pickle.loads(pickle.dumps(function))
    assert_same_mask(again(*grid(1, 3, 3)), function(*grid(1, 3, 3)))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(rules.causal() & (lambda b, h, q, k: q == k))


def test_pickles_after_a_use():
    """What was prepared for the operators is left out."""
    function = rules.documents(some_table(1, 0, 3)) & rules.causal()
    fresh = len(pickle.dumps(function))
    function.encode()
    assert len(pickle.dumps(function)) == fresh


@settings(max_examples=60)
@given(builders())
def test_repr(builder):
    shown = repr(rules.function(builder(NAMES)))
    assert " at 0x" not in shown
    assert "tensor(" not in shown
    assert 0 < len(shown) < 3000


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (rules.causal(), ["causal"]),
        (rules.sliding_window(7), ["window", "7"]),
        (rules.window(2, 3), ["window", "2", "3"]),
        (rules.chunked(5, torch.tensor([1, 2])), ["chunk", "5", "[2]", "int64"]),
        (rules.padding(torch.ones(2, 9).bool()), ["padding", "bool", "[2, 9]"]),
        (rules.causal() & rules.sliding_window(3), ["causal", " & ", "3"]),
        (rules.causal() | module_level, ["causal", " | ", "module_level"]),
        (rules.causal() & (rules.window(1, 1) | rules.causal()), ["& (", "| "]),
        (rules.reindex(rules.causal(), torch.zeros(1, 4).int()), ["reindex", "causal", "int32"]),
        (rules.shift(rules.causal(), 2, -3), ["shift", "causal", "2", "-3"]),
    ],
    ids=repr,
)
def test_repr_is_readable(function, parts):
    assert all(part in repr(function) for part in parts)


@settings(max_examples=60)
@given(builders(depth=1, leaves=RULE_LEAVES))
def test_to_another_device(builder):
    function = builder(NAMES)
    there = function.to("meta")
    rule, operands = there.encode()
    assert rule == function.encode()[0]
    assert all(operand.device.type == "meta" for operand in operands)
    for moved_, own in zip(operands, function.encode()[1], strict=True):
        assert own.device.type == "cpu" and moved_.shape == own.shape
    assert function.to("cpu") == function
    assert function.to(torch.device("cpu")) == function


@pytest.mark.cuda
@settings(max_examples=30)
@given(builders(leaves=RULE_LEAVES), SIZES)
def test_to_cuda(builder, sizes):
    function, indices = builder(NAMES), grid(*sizes)
    got = function.to("cuda")(*(index.cuda() for index in indices))
    assert_same_mask(got.cpu(), function(*indices))


def some_rules(a, b):
    """Rules that are all different, as long as the tensors a and b are."""
    leaves = [
        rules.causal(),
        rules.bidirectional(),
        rules.sliding_window(3),
        rules.sliding_window(4),
        rules.window(3, 3),
        rules.window(None, 3),
        rules.chunked(3),
        rules.chunked(4),
        rules.chunked(3, STARTS),
        *(make(t) for make in (rules.blockwise, rules.documents, rules.padding) for t in (a, b)),
        rules.function(module_level),
        rules.function(len),
    ]
    trees = [
        rules.causal() & rules.sliding_window(3),
        rules.sliding_window(3) & rules.causal(),
        rules.causal() | rules.sliding_window(3),
        rules.causal() & rules.sliding_window(3) & rules.padding(a),
        rules.intersection(),
        rules.union(),
        rules.reindex(rules.causal(), a),
        rules.reindex(rules.causal(), b),
        rules.reindex(rules.bidirectional(), a),
        rules.shift(rules.causal(), 1, 0),
        rules.shift(rules.causal(), 0, 1),
        rules.shift(rules.causal(), a, 0),
    ]
    return leaves + trees


def test_equality_and_hash():
    """By structure and by which tensors, whatever these hold."""
    a, b = some_table(1, 0, 2), some_table(1, 0, 2)
    first, second = some_rules(a, b), some_rules(a, b)
    for i, j in itertools.product(range(len(first)), repeat=2):
        assert (first[i] == second[j]) is (i == j), (first[i], second[j])
        assert (first[i] != second[j]) is (i != j)
    assert [hash(rule) for rule in first] == [hash(rule) for rule in second]
    assert len({*first, *second}) == len(first)
    assert rules.causal() != "causal()"
    assert rules.padding(a) != rules.padding(a.clone())


def test_one_compiled_graph_serves_every_object():
    """As a flex mask_mod; other tensors and other numbers of the same structure reuse it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def evaluate(function, indices):
        return function(*indices)

    torch._dynamo.reset()
    compiled = torch.compile(evaluate, backend=backend, fullgraph=True)
    for seed in range(3):
        function = (
            rules.causal()
            & rules.documents(some_table(seed, 0, 3))
            & rules.padding(some_table(seed + 9, 0, 2).bool())
        )
        indices = grid(3, 4, 6)
        assert_same_mask(compiled(function, indices), function(*indices))
    assert len(graphs) == 1


def test_mask_mod_of_flex_attention():
    ids = (torch.arange(300) // 90).expand(2, 300)
    function = rules.causal() & rules.documents(ids)
    got = create_block_mask(function, 2, None, 300, 300, device="cpu")
    want = create_block_mask(
        lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]), 2, None, 300, 300, device="cpu"
    )
    assert_same_mask(got.to_dense(), want.to_dense())
    assert got.mask_mod is function


@pytest.mark.parametrize(
    "size", [2.5, 0.5, 3.0, -1.5, -3, 2**62, float("inf"), -float("inf")], ids=str
)
def test_sizes_of_any_number(size, closures):
    indices = grid(1, 6, 6)
    for name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        got = getattr(masking_utils, name)(size)
        assert_same_mask(
            masking_utils.sdpa_mask(1, 6, 6, mask_function=got, allow_is_causal_skip=False),
            getattr(closures, name)(size)(*indices).expand(1, 1, 6, 6),
        )


def test_callables_are_compared_as_objects():
    class Table:
        __hash__ = None

        def __init__(self, values):
            self.values = values

        def __eq__(self, other):
            raise AssertionError("compared by value")

        def __call__(self, b, h, q, k):
            return self.values[q] >= self.values[k]

    one, other = Table(torch.arange(3)), Table(torch.arange(3))
    assert rules.function(one) == rules.function(one)
    assert hash(rules.function(one)) == hash(rules.function(one))
    assert rules.function(one) != rules.function(other)
    assert rules.causal() & one == rules.causal() & one


def test_sizes_that_fit_into_no_64_bits():
    for size in (10**19, 2**63, 2**200):
        for rule in (rules.sliding_window(size), rules.window(size, size), rules.chunked(size)):
            assert ops.boolean(*rule.encode(), 1, 4, 4, q_offset=10**12).all()
        none = masking_utils.sliding_window_overlay(-size)
        assert not ops.boolean(*none.encode(), 1, 4, 4).any()


def test_names_of_devices():
    rule, mask = (
        rules.causal() & rules.documents(torch.zeros(1, 3, dtype=torch.int64)),
        torch.ones(1, 3),
    )
    for device in ("cpu", "cpu:0", torch.device("cpu:0")):
        got = masking_utils.sdpa_mask(
            1,
            3,
            3,
            mask_function=rule,
            attention_mask=mask.bool(),
            device=device,
            allow_is_causal_skip=False,
        )
        assert_same_mask(got, torch.ones(1, 1, 3, 3).tril().bool())
        assert ops.boolean(*rule.encode(), 1, 3, 3, device=device).shape == (1, 1, 3, 3)
