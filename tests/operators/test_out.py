"""Masks written into a tensor of the caller's (`.out`), or with rows a multiple apart."""

import math
import random
import subprocess
import sys
import textwrap

import attn_mask  # noqa: F401 - registers the operators
import pytest
import reference
import rule_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import INT_DTYPES, LAYOUTS, MASK_DTYPES, OUT_DTYPES, assert_same_mask, bits, lowest
from rule_reference import (
    ALL,
    AND,
    BITS,
    BLOCKS,
    CAUSAL,
    CHUNK,
    DOCUMENTS,
    NOTHING,
    OR,
    REINDEX,
    SHIFT,
    WINDOW,
)
from rule_reference import PADDING as PADDED
from sample_calls import (
    BATCH,
    CALL_IDS,
    CALLS,
    GOOD,
    HOST_DECISIONS,
    OPERATORS,
    QUERIES,
    as_on_cuda,
    closed_rows,
    map_tensors,
    operator,
)
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

# Thousands of tiny calls.
pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.attn_mask
FLOAT = torch.float32
HALF = torch.float16

# A bool is decided on the host, there is nothing to write.
WRITERS = tuple(name for name in OPERATORS if name not in HOST_DECISIONS)
FOR_SDPA = "_prepare_4d_causal_attention_mask_for_sdpa"
BIDIRECTIONAL_FOR_SDPA = "_prepare_4d_attention_mask_for_sdpa"

SAMPLES = [(id_, *call) for id_, call in zip(CALL_IDS, CALLS, strict=True) if call[0] in WRITERS]
every_sample = pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [sample[1:] for sample in SAMPLES],
    ids=[sample[0] for sample in SAMPLES],
)
every_writer = pytest.mark.parametrize("name", WRITERS)


# What is to be written


def without_skip(name, args, kwargs):
    return {**kwargs, "allow_skip": False} if name.endswith("_for_sdpa") else kwargs


def meaning(name, args, kwargs):
    """The functional form's mask; where it gives None, the mask with the same meaning."""
    mask = operator(name)(*args, **kwargs)
    if mask is None:
        mask = operator(name)(*args, **without_skip(name, args, kwargs))
    if mask is not None:
        return mask
    # One query that attends to every key.
    if name == "to_causal_4d":
        sizes, dtype = args, kwargs["dtype"]
    else:
        shape = args[1] if name.startswith("_prepare") else args[0]
        past = args[3] if name.startswith("_prepare") else (*args, 0)[1]
        sizes = (*shape, shape[1] + past)
        dtype = args[2].dtype if name.startswith("_prepare") else kwargs["dtype"]
    batch_size, q_length, kv_length = sizes
    return torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype)


# Where it is written to


class Place:
    """A tensor inside of a larger one, all of whose other elements have to stay as they are."""

    def __init__(self, out, guard):
        self.out, self.guard = out, guard

    @property
    def everything(self):
        flat = torch.empty(0, dtype=self.out.dtype)
        return flat.set_(self.out.untyped_storage())

    def assert_untouched_around(self):
        __tracebackhide__ = True
        everything = self.everything
        outside = torch.ones(everything.shape, dtype=torch.bool)
        outside.as_strided(self.out.shape, self.out.stride(), self.out.storage_offset()).fill_(
            False
        )
        guard = torch.full_like(everything, self.guard)
        assert torch.equal(bits(everything)[outside], bits(guard)[outside]), "wrote beside out"


def place(
    shape, dtype, *, order=None, steps=None, before=None, after=None, offset=0, tail=0, guard=3
):
    """`order` from the outermost dimension in memory; `steps`, and elements `before` and `after`,
    of each dimension; `offset` and `tail` elements around everything."""
    rank = len(shape)
    order = order or range(rank)
    steps, before, after = steps or [1] * rank, before or [0] * rank, after or [0] * rank
    wide = [b + max(n * s, 1) + e for n, s, b, e in zip(shape, steps, before, after, strict=True)]
    flat = torch.full((offset + math.prod(wide) + tail,), guard).to(dtype)
    stored = flat[offset : offset + math.prod(wide)].view([wide[i] for i in order])
    view = stored.permute([list(order).index(i) for i in range(rank)])
    slices = [slice(b, b + n * s, s) for n, s, b in zip(shape, steps, before, strict=True)]
    out = view[tuple(slices)] if rank else view
    assert out.shape == torch.Size(shape)
    return Place(out, guard)


PLACES = {
    "contiguous": lambda shape, dtype: place(shape, dtype),
    "transposed": lambda shape, dtype: place(shape, dtype, order=range(len(shape))[::-1]),
    "keys outermost": lambda shape, dtype: place(
        shape, dtype, order=[*range(len(shape))[-1:], *range(len(shape))[:-1]]
    ),
    "stepped": lambda shape, dtype: place(
        shape, dtype, steps=[1] * (len(shape) - 1) + [2] * min(len(shape), 1)
    ),
    "stepped everywhere": lambda shape, dtype: place(shape, dtype, steps=[2] * len(shape)),
    "offset": lambda shape, dtype: place(shape, dtype, offset=3, tail=2),
    "slice": lambda shape, dtype: place(
        shape, dtype, before=[1] * len(shape), after=[2] * len(shape)
    ),
}


@st.composite
def places(draw, shape, dtype):
    rank = len(shape)

    def for_each_dimension(low, high):
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    # Mostly one kind of irregularity, so that the fast paths of kernels are met, too.
    kinds = draw(st.sets(st.sampled_from(["order", "steps", "slice", "offset"])))
    return place(
        shape,
        dtype,
        order=draw(st.permutations(range(rank))) if "order" in kinds else None,
        steps=for_each_dimension(1, 3) if "steps" in kinds else None,
        before=for_each_dimension(0, 2) if "slice" in kinds else None,
        after=for_each_dimension(0, 2) if "slice" in kinds else None,
        offset=draw(st.integers(1, 70)) if "offset" in kinds else 0,
        tail=draw(st.integers(0, 70)),
        guard=draw(st.sampled_from([0, 1, 3])),
    )


def untold(kwargs):
    """Without the dtype, which out has."""
    return {key: value for key, value in kwargs.items() if key != "dtype"}


def assert_written(name, args, kwargs, want, where):
    __tracebackhide__ = True
    inputs = map_tensors(torch.clone, (args, kwargs))
    returned = operator(name).out(*args, **kwargs, out=where.out)
    assert returned is None
    assert_same_mask(where.out, want)
    where.assert_untouched_around()
    leaves = torch.utils._pytree.tree_leaves
    for one, kept in zip(leaves((args, kwargs)), leaves(inputs), strict=True):
        if isinstance(one, torch.Tensor):
            assert_same_mask(one, kept)


@every_sample
@pytest.mark.parametrize("layout", PLACES)
def test_samples(name, args, kwargs, layout):
    want = meaning(name, args, kwargs)
    for told in (kwargs, untold(kwargs)):
        assert_written(name, args, told, want, PLACES[layout](want.shape, want.dtype))


# Random calls


def paddings(draw, batch_size, kv_length, dtypes=MASK_DTYPES):
    dtype = draw(st.sampled_from(dtypes))
    rng = random.Random(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(batch_size):
        split = rng.randint(0, kv_length)
        some = [rng.choice([0, 1]) for _ in range(kv_length)]
        left, right = [0] * split, [1] * (kv_length - split)
        rows.append(rng.choice([left + right, right + left, some, [0] * kv_length]))
    mask = torch.tensor(rows, dtype=torch.int64).reshape(batch_size, kv_length).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "stepped", "offset"]))
    return LAYOUTS[layout](mask) if mask.numel() else mask


WINDOWS = st.one_of(st.none(), st.integers(1, 9), st.sampled_from([40, 2**62]))


@st.composite
def sizes(draw):
    """[batch, queries, keys], as many keys as queries or more."""
    batch_size, q_length = draw(st.integers(0, 3)), draw(st.integers(0, 7))
    past = draw(st.one_of(st.just(0), st.integers(0, 8), st.integers(0, 150)))
    return batch_size, q_length, q_length + past


@st.composite
def to_4d_calls(draw):
    batch_size, q_length, kv_length = draw(sizes())
    mask = paddings(draw, batch_size, kv_length)
    dtype = draw(st.sampled_from(OUT_DTYPES))
    if draw(st.booleans()):
        options = {"key_value_length": kv_length, "sliding_window": draw(WINDOWS)}
    else:
        q_length = draw(st.integers(0, 7))
        options = {"is_causal": False}
    return (mask, q_length), {**options, "dtype": dtype}


@st.composite
def legacy_calls(draw):
    name = draw(st.sampled_from([name for name in WRITERS if name not in ("boolean", "additive")]))
    batch_size, q_length, kv_length = draw(sizes())
    past = kv_length - q_length
    dtype = draw(st.sampled_from(OUT_DTYPES))
    options = {"dtype": dtype}
    if name == "to_causal_4d":
        return name, (batch_size, q_length, kv_length), {**options, "sliding_window": draw(WINDOWS)}
    if name in ("_make_causal_mask", "_create_4d_causal_attention_mask"):
        return name, ((batch_size, q_length), past, draw(WINDOWS)), options
    if name == "to_4d":
        args, options = draw(to_4d_calls())
        return name, args, {**options, "unmask_unattended": draw(st.booleans())}
    if name == "_unmask_unattended":
        return name, draw(expanded_masks()), {}
    if name.startswith("_prepare_4d_causal"):
        queries = torch.zeros(batch_size, q_length, 2, dtype=dtype)
        kind = draw(st.sampled_from(["none", "ones", "2d", "4d"]))
        mask = None
        if kind == "ones":
            mask = torch.ones(batch_size, kv_length, dtype=torch.int64)
        elif kind == "2d":
            mask = paddings(draw, batch_size, kv_length)
        elif kind == "4d":
            mask = paddings(draw, batch_size * q_length, kv_length, (torch.bool, torch.float64))
            mask = mask.reshape(batch_size, 1, q_length, kv_length)
        skip = {"allow_skip": draw(st.booleans())} if name == FOR_SDPA else {}
        return name, (mask, (batch_size, q_length), queries, past, draw(WINDOWS)), skip
    mask = paddings(draw, batch_size, kv_length)
    if draw(st.booleans()):
        mask = torch.ones(batch_size, kv_length)
    if name == BIDIRECTIONAL_FOR_SDPA:
        options["allow_skip"] = draw(st.booleans())
    return name, (mask, draw(st.one_of(st.none(), st.integers(0, 7)))), options


@st.composite
def expanded_masks(draw, max_rank=7):
    """The arguments of _unmask_unattended: any rank, rows masked fully or all but."""
    leading = draw(st.lists(st.integers(0, 3), max_size=max_rank - 1))
    length = draw(st.one_of(st.integers(0, 4), st.integers(0, 150)))
    shape = (*leading, length) if draw(st.integers(0, 9)) else ()
    dtype = draw(st.sampled_from([*OUT_DTYPES, *INT_DTYPES[:5]]))
    low = lowest(dtype) if dtype.is_floating_point else draw(st.sampled_from([0, 7]))
    low = draw(st.sampled_from([low, low, 1 if not dtype.is_floating_point else -math.inf]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.full(shape, low, dtype=dtype)
    rows = torch.rand(shape[:-1], generator=generator) < 0.5
    cells = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.05, 0.5]))
    mask = mask.masked_fill(cells & rows[..., None] if shape else cells, 3)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return (LAYOUTS[layout](mask) if mask.numel() and shape else mask), low


@settings(max_examples=300)
@given(st.data(), legacy_calls())
def test_any_mask_in_any_place(data, call):
    name, args, kwargs = call
    want = meaning(name, args, kwargs)
    where = data.draw(places(want.shape, want.dtype))
    told = kwargs if data.draw(st.booleans()) else untold(kwargs)
    assert_written(name, args, told, want, where)


@st.composite
def large_trees(draw):
    """More leaves than kernels take, so that parts of the rule are evaluated first."""
    batch_size, q_length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kv_length = draw(st.one_of(st.integers(1, 12), st.integers(60, 140)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    reach, operands = max(q_length, kv_length) + 8, []

    def operand(tensor):
        operands.append(tensor)
        return len(operands) - 1

    def table(low, high, rows=batch_size):
        cells = [rng.randint(low, high) for _ in range(rows * reach)]
        return operand(torch.tensor(cells).reshape(rows, reach))

    def bit_planes():
        shape = (rng.choice([1, batch_size]), heads, q_length, kv_length)
        cells = [rng.random() < 0.6 for _ in range(math.prod(shape))]
        return operand(torch.tensor(cells).reshape(shape))

    def leaf():
        return rng.choice(
            [
                lambda: [ALL],
                lambda: [NOTHING],
                lambda: [CAUSAL],
                lambda: [WINDOW, rng.randint(-1, 9), rng.randint(-1, 9)],
                lambda: [CHUNK, rng.randint(1, 9), -1],
                lambda: [BLOCKS, table(-1, 1)],
                lambda: [DOCUMENTS, table(0, 2, rows=1)],
                lambda: [PADDED, table(0, 1)],
                lambda: [BITS, bit_planes()],
                lambda: [SHIFT, rng.randint(-2, 2), rng.randint(-2, 2), CAUSAL],
                lambda: [REINDEX, table(0, reach - 1), CAUSAL],
            ]
        )()

    heads = draw(st.sampled_from([1, 2]))
    rule = leaf()
    for i in range(draw(st.integers(6, 10))):
        # A node in between, so that nothing can be flattened.
        branch = [leaf() for _ in range(4)]
        inner = [OR if i % 2 else AND, 4, *(number for part in branch for number in part)]
        rule = [AND if i % 2 else OR, 2, *inner, *rule]
    return rule_reference.Call(rule, operands, batch_size, q_length, kv_length)


@st.composite
def rule_calls(draw, of_rules):
    call = draw(of_rules)
    if draw(st.booleans()):
        return "boolean", call.args, call.positions
    dtype = draw(st.sampled_from(OUT_DTYPES))
    options = {**call.positions, "dtype": dtype}
    if draw(st.booleans()):
        heads = rule_reference.heads_of(call.tree, call.operands)
        shape = (
            draw(st.sampled_from([call.batch_size, 1])),
            draw(st.sampled_from([heads, 1] if heads != 1 else [1, 2])),
            call.q_length,
            call.kv_length,
        )
        bias = torch.arange(math.prod(shape)).reshape(shape).to(dtype) / 7
        layout = draw(st.sampled_from(sorted(LAYOUTS)))
        options["bias"] = LAYOUTS[layout](bias) if bias.numel() else bias
    return "additive", call.args, options


@settings(max_examples=200)
@given(st.data(), rule_calls(rule_reference.calls(depth=2)))
def test_any_rule_in_any_place(data, call):
    name, args, kwargs = call
    want = operator(name)(*args, **kwargs)
    where = data.draw(places(want.shape, want.dtype))
    told = kwargs if data.draw(st.booleans()) else untold(kwargs)
    assert_written(name, args, told, want, where)


@settings(max_examples=60)
@given(st.data(), rule_calls(large_trees()))
def test_any_large_rule_in_any_place(data, call):
    name, args, kwargs = call
    assert rule_reference.number_of_leaves(rule_reference.parse(args[0], len(args[1]))) > 24
    want = operator(name)(*args, **kwargs)
    where = data.draw(places(want.shape, want.dtype))
    assert_written(name, args, untold(kwargs), want, where)


@pytest.mark.parametrize("layout", ["contiguous", "keys outermost", "stepped", "slice"])
def test_large_rule_in_many_parts(layout):
    """Parts are evaluated some rows at a time: here a few of the rows at once."""
    kv_length = 140_000
    windows = [number for i in range(30) for number in (SHIFT, i, 0, WINDOW, i % 3, i)]
    args = [OR, 30, *windows], [], 1, 17, kv_length
    positions = {"q_offset": kv_length // 2}
    want = ops.boolean(*args, **positions)
    assert want.any(-1).all()
    assert_written("boolean", args, positions, want, PLACES[layout](want.shape, want.dtype))


def test_masks_large_enough_for_threads():
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 519, generator=generator) < 0.7).long()
    mask[1, :450] = 0
    call = "to_4d", (mask, 259), {"key_value_length": 519, "sliding_window": 50}
    for dtype in OUT_DTYPES:
        for unmask in (False, True):
            kwargs = {**call[2], "dtype": dtype, "unmask_unattended": unmask}
            want = ops.to_4d(*call[1], **kwargs)
            for layout in ("keys outermost", "stepped", "offset"):
                where = PLACES[layout](want.shape, dtype)
                assert_written("to_4d", call[1], kwargs, want, where)


@every_writer
def test_every_batch_row_is_written(name):
    """The functional form may give one row, repeated."""
    args, kwargs = GOOD[name]
    want = operator(name)(*args, **kwargs)
    out = torch.full(want.shape, 3).to(want.dtype)
    operator(name).out(*args, **kwargs, out=out)
    for row in range(len(out)):
        assert_same_mask(out[row], want[row])


# Where the functional form gives None


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_one_query_attends_to_all(dtype):
    queries, ones = torch.zeros(2, 1, 4, dtype=dtype), torch.ones(2, 6)
    for name, args in {
        "to_causal_4d": (2, 1, 6),
        "_create_4d_causal_attention_mask": ((2, 1), 5),
        "_prepare_4d_causal_attention_mask": (None, (2, 1), queries, 5),
        FOR_SDPA: (None, (2, 1), queries, 5),
    }.items():
        told = {} if name.startswith("_prepare") else {"dtype": dtype}
        assert operator(name)(*args, **told) is None
        out = torch.full((2, 1, 1, 6), 3, dtype=dtype)
        operator(name).out(*args, out=out)
        assert_same_mask(out, torch.zeros(2, 1, 1, 6, dtype=dtype))
    assert operator(FOR_SDPA)(ones, (2, 1), queries, 5) is None
    out = torch.full((2, 1, 1, 6), 3, dtype=dtype)
    operator(FOR_SDPA).out(ones, (2, 1), queries, 5, out=out)
    assert_same_mask(out, torch.zeros(2, 1, 1, 6, dtype=dtype))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("padding", [None, torch.ones(2, 4)], ids=["none", "ones"])
def test_several_queries_stay_causal(padding, window):
    """There None means: call attention with is_causal."""
    queries = torch.zeros(2, 4, 3)
    assert operator(FOR_SDPA)(padding, (2, 4), queries, 0, window) is None
    out = torch.full((2, 1, 4, 4), 3.0)
    operator(FOR_SDPA).out(padding, (2, 4), queries, 0, window, out=out)
    assert_same_mask(out, reference.to_causal_4d(2, 4, 4, dtype=FLOAT))


@pytest.mark.parametrize("tgt_len", [None, 1, 3])
def test_ones_in_both_directions(tgt_len):
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert operator(BIDIRECTIONAL_FOR_SDPA)(ones, tgt_len, dtype=HALF) is None
    out = torch.full((2, 1, tgt_len or 5, 5), 3, dtype=HALF)
    operator(BIDIRECTIONAL_FOR_SDPA).out(ones, tgt_len, out=out)
    assert_same_mask(out, torch.zeros(2, 1, tgt_len or 5, 5, dtype=HALF))


# In place


@settings(max_examples=150)
@given(st.data(), expanded_masks())
def test_rows_are_unmasked_where_they_lie(data, call):
    mask, min_dtype = call
    want = ops._unmask_unattended(mask, min_dtype)
    where = data.draw(places(mask.shape, mask.dtype))
    where.out.copy_(mask)
    ops._unmask_unattended.out(where.out, min_dtype, out=where.out)
    assert_same_mask(where.out, want)
    where.assert_untouched_around()


@pytest.mark.parametrize(
    "again",
    [lambda x: x[:], lambda x: x.detach(), lambda x: x.view(x.shape), lambda x: x.squeeze(0)[None]],
)
def test_another_view_of_the_same_elements_is_in_place(again):
    """What compiled code hands over."""
    mask = closed_rows()[:1]
    want = ops._unmask_unattended(mask, lowest(FLOAT))
    ops._unmask_unattended.out(mask, lowest(FLOAT), out=again(mask))
    assert_same_mask(mask, want)


# Errors: every operator, called with nothing wrong but out

SHAPE = (2, 1, 3, 5)


ARGUMENTS = {name: {a.name for a in operator(name).out._schema.arguments} for name in WRITERS}


def has_argument(name, argument):
    return argument in ARGUMENTS[name]


# Those with arguments that repeat what `out` has already.
TOLD_A_DTYPE = [name for name in WRITERS if has_argument(name, "dtype")]
TOLD_A_DEVICE = [name for name in WRITERS if has_argument(name, "device")]


def dtype_of(name):
    return torch.bool if name == "boolean" else FLOAT


def tensors_of(name):
    return [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(GOOD[name])
        if isinstance(leaf, torch.Tensor)
    ]


def refused(error, text, name, out, args=None, kwargs=None):
    """The call fails with `name: text`, a regular expression, before it writes anything."""
    __tracebackhide__ = True
    good_args, good_kwargs = GOOD[name]
    args = good_args if args is None else args
    kwargs = untold(good_kwargs) if kwargs is None else kwargs
    readable = out.layout is torch.strided and not out.is_meta and not out.is_quantized
    before = out.untyped_storage().tolist() if readable else None
    version = out._version
    with pytest.raises(error, match=rf"(?s)^{name}: {text}"):
        operator(name).out(*args, **kwargs, out=out)
    assert out._version == version
    if readable:
        assert out.untyped_storage().tolist() == before


def a_place(name):
    return torch.full(SHAPE, 3).to(dtype_of(name))


@every_writer
def test_nothing_wrong(name):
    args, kwargs = GOOD[name]
    want = operator(name)(*args, **kwargs)
    assert (want.shape, want.dtype) == (SHAPE, dtype_of(name))
    assert_written(name, args, kwargs, want, PLACES["slice"](want.shape, want.dtype))


OVERLAPPING = {
    "one row for all": ((1, 1, 3, 5), (0, 15, 5, 1)),
    "one query for all": ((2, 1, 1, 5), (5, 5, 0, 1)),
    "one key for all": ((2, 1, 3, 1), (3, 3, 1, 0)),
    "windows": (SHAPE, (9, 9, 3, 1)),
    "steps that meet": (SHAPE, (60, 60, 4, 2)),
    "transposed windows": (SHAPE, (1, 1, 1, 4)),
}


@every_writer
@pytest.mark.parametrize("kind", OVERLAPPING)
def test_overlap_within_out(name, kind):
    _, strides = OVERLAPPING[kind]
    out = torch.full((120,), 3).to(dtype_of(name)).as_strided(SHAPE, strides)
    text = r"expected out .*overlap.*but got strides \[" + ", ".join(map(str, strides))
    refused(ValueError, text, name, out)


@every_writer
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (5,),
        (3, 5),
        (2, 3, 5),
        (1, 2, 1, 3, 5),
        (2, 1, 3, 4),
        (2, 1, 2, 5),
        (2, 2, 3, 5),
        (1, 1, 3, 5),
        (3, 1, 3, 5),
        (2, 1, 5, 3),
        (0, 1, 3, 5),
        (2, 1, 3, 0),
    ],
    ids=str,
)
def test_shape_of_out(name, shape):
    out = torch.full(shape, 3).to(dtype_of(name))
    got = rf"{len(shape)}-D \[{', '.join(map(str, shape))}\]"
    refused(ValueError, rf"expected out .*\[2, 1, 3, 5\], but got {got}", name, out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name in WRITERS
        for dtype in (torch.bool, torch.float64, HALF, torch.int64, torch.uint8, torch.complex64)
        if dtype != dtype_of(name)
    ],
)
def test_dtype_of_out(name, dtype):
    """Operators without a dtype argument take any floating-point out."""
    out = torch.full(SHAPE, 3).to(dtype)
    args, kwargs = GOOD[name]
    refused(TypeError, r"expected out .*but got ", name, out, args, kwargs)
    takes_any_float = has_argument(name, "dtype") and "bias" not in kwargs
    if not (takes_any_float and dtype.is_floating_point):
        # It is out that is wrong, or the bias beside it: a dtype was not given.
        which = "(out|bias)" if "bias" in kwargs and dtype.is_floating_point else "out"
        refused(TypeError, rf"expected {which}\b.*but got ", name, out)


@pytest.mark.parametrize("name", TOLD_A_DTYPE)
def test_dtype_that_disagrees(name):
    args, kwargs = GOOD[name]
    kwargs = {key: value for key, value in kwargs.items() if key != "bias"}
    for dtype, wanted in ((torch.float64, "Double"), (HALF, "Half"), (torch.bfloat16, "BFloat16")):
        text = rf"expected out to be {wanted}, but got Float"
        refused(TypeError, text, name, a_place(name), args, {**kwargs, "dtype": dtype})


@pytest.mark.parametrize("device", ["meta", "cuda", "cuda:0", "xpu"])
@pytest.mark.parametrize("name", TOLD_A_DEVICE)
def test_device_that_disagrees(name, device):
    args, kwargs = GOOD[name]
    text = rf"expected (out|device) .*\b{device}\b"
    refused(ValueError, text, name, a_place(name), args, {**kwargs, "device": device})
    operator(name).out(*args, **kwargs, device="cpu", out=a_place(name))


@pytest.mark.parametrize("name", TOLD_A_DEVICE)
def test_out_on_another_device_than_said(name):
    args, kwargs = GOOD[name]
    on_cpu = {**kwargs, "device": "cpu"}
    text = r"expected out to be on cpu, but got meta"
    refused(ValueError, text, name, a_place(name).to("meta"), args, on_cpu)


@pytest.mark.parametrize("name", [name for name in WRITERS if tensors_of(name)])
def test_out_on_another_device_than_the_inputs(name):
    args, kwargs = GOOD[name]
    refused(ValueError, r"expected \w+ .*\bmeta\b", name, a_place(name).to("meta"))
    args, kwargs = map_tensors(lambda tensor: tensor.to("meta"), (args, kwargs))
    refused(
        ValueError, r"expected out to be on meta, but got cpu", name, a_place(name), args, kwargs
    )


@every_writer
@pytest.mark.filterwarnings("ignore")  # such layouts are announced
@pytest.mark.parametrize("layout", ["coo", "csr", "mkldnn", "quantized", "nested"])
def test_layout_of_out(name, layout):
    args, kwargs = GOOD[name]
    out = {
        "coo": lambda: torch.ones(SHAPE).to_sparse(),
        "csr": lambda: torch.ones(SHAPE).to_sparse_csr(dense_dim=0),
        "mkldnn": lambda: torch.ones(SHAPE).to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(SHAPE), 1.0, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(2, 5)]),
    }[layout]()
    with pytest.raises(TypeError, match=rf"(?s)^{name}: expected out .*but got "):
        operator(name).out(*args, **kwargs, out=out)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "boolean"])
def test_out_that_requires_grad(name):
    args, kwargs = GOOD[name]
    leaf = torch.full(SHAPE, 3.0, requires_grad=True)
    for out in (leaf, leaf * 1, leaf[:], torch.nn.Parameter(torch.full(SHAPE, 3.0))):
        refused(ValueError, r"expected out not to require a gradient", name, out)
    with torch.no_grad():
        operator(name).out(*args, **kwargs, out=leaf)
    assert leaf.requires_grad
    assert_same_mask(leaf, operator(name)(*args, **kwargs))


SHARED = [(name, i) for name in WRITERS for i in range(len(tensors_of(name)))]


def with_tensor(name, i, tensor):
    """The arguments with the i-th tensor replaced."""
    at = iter(range(len(tensors_of(name))))
    args, kwargs = GOOD[name]
    return map_tensors(lambda one: tensor if next(at) == i else one, (args, untold(kwargs)))


@pytest.mark.parametrize(("name", "i"), SHARED)
@pytest.mark.parametrize("kind", ["dense", "stepped input", "stepped out", "both stepped"])
def test_out_that_shares_memory_with_an_input(name, i, kind):
    """The first elements of both are the same, or next to it where the dtypes' sizes differ."""
    given, dtype = tensors_of(name)[i], dtype_of(name)
    memory = torch.zeros(1024, dtype=torch.uint8)

    def tensor_of(shape, dtype, step, first):
        sizes, strides = list(shape), []
        for n in reversed(sizes):
            strides.insert(0, step)
            step *= max(n, 1)
        return memory.view(dtype)[first:].as_strided(sizes, strides)

    # After out's first element, or for _unmask_unattended it would be its input altogether.
    first = 5 if given.shape == torch.Size(SHAPE) and given.dtype == dtype else 0
    shared = tensor_of(
        given.shape, given.dtype, 2 if "input" in kind or "both" in kind else 1, first
    )
    shared.copy_(given)
    out = tensor_of(SHAPE, dtype, 2 if "out" in kind or "both" in kind else 1, 1 if first else 0)
    args, kwargs = with_tensor(name, i, shared)
    refused(ValueError, r"expected out to share no memory", name, out, args, kwargs)


def test_out_that_is_its_input_in_another_order():
    mask = torch.full((2, 1, 4, 4), lowest(FLOAT))
    mask[:, :, 1, 2] = 0.0
    wide = torch.full((2, 1, 4, 8), lowest(FLOAT))
    wide[..., :4] = mask
    for one in (mask, wide[..., :4]):
        before = one.clone()
        with pytest.raises(ValueError, match=r"^_unmask_unattended: expected out to share no mem"):
            ops._unmask_unattended.out(one, lowest(FLOAT), out=one.transpose(2, 3))
        assert_same_mask(one, before)


@pytest.mark.parametrize(("name", "i"), SHARED)
def test_out_that_shares_a_storage_but_no_element(name, i):
    """One buffer may hold everything that a step needs."""
    given, dtype = tensors_of(name)[i], dtype_of(name)
    memory = torch.zeros(1024, dtype=torch.uint8)
    shared = memory[:512].view(given.dtype)[: given.numel()].view(given.shape)
    shared.copy_(given)
    out = memory[512:].view(dtype)[: math.prod(SHAPE)].view(SHAPE)
    args, kwargs = with_tensor(name, i, shared)
    operator(name).out(*args, **kwargs, out=out)
    want_args, want_kwargs = GOOD[name]
    assert_same_mask(out, operator(name)(*want_args, **want_kwargs))
    assert_same_mask(shared, given)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "text"),
    [
        ("to_causal_4d", (2, 3, 2), {}, "expected key_value_length"),
        ("to_causal_4d", (2, -1, 5), {}, "expected query_length"),
        ("to_4d", (BATCH, 3), {"key_value_length": 6}, "expected attention_mask_2d"),
        ("to_4d", (BATCH[0], 3), {"key_value_length": 5}, "expected attention_mask_2d"),
        ("_make_causal_mask", ((2, 3, 4), 2), {}, "expected input_ids_shape"),
        ("_expand_mask", (BATCH.to(torch.complex64), 3), {}, "expected mask"),
        ("_unmask_unattended", (closed_rows(), 1j), {}, "expected min_dtype"),
        (FOR_SDPA, (BATCH, (2, 3), QUERIES, -1), {}, "expected past_key_values_length"),
        (BIDIRECTIONAL_FOR_SDPA, (BATCH, -3), {}, "expected tgt_len"),
        ("_create_4d_causal_attention_mask", ((2, 3), -1), {}, "expected past_key_values_length"),
        ("boolean", ([77], [], 2, 3, 5), {}, "expected an opcode"),
        ("boolean", ([CAUSAL, 0], [], 2, 3, 5), {}, "expected rule"),
        ("boolean", ([PADDED, 0], [torch.ones(3, 5)], 2, 3, 5), {}, "expected a padding"),
        ("additive", ([CAUSAL], [], 2, 3, 5), {"bias": torch.zeros(1, 1, 3, 4)}, "expected bias"),
        ("additive", ([CAUSAL], [], 2, 3, 5), {"q_positions": torch.zeros(3)}, "expected q_pos"),
    ],
)  # fmt: skip
def test_other_arguments_fail_before_anything_is_written(name, args, kwargs, text):
    error = (ValueError, TypeError)
    refused(error, text, name, a_place(name), args, kwargs)


@pytest.mark.parametrize("window", [0, -3])
def test_windows_fail_before_anything_is_written(window):
    out = torch.full(SHAPE, 3.0)
    with pytest.raises(ValueError, match=rf"strictly positive integer, not `{window}`"):
        ops.to_causal_4d.out(2, 3, 5, sliding_window=window, out=out)
    assert out.eq(3).all()


@pytest.mark.parametrize("dtype", [torch.int64, FLOAT, HALF], ids=str)
def test_4d_masks_under_sdpa_keep_their_dtype(dtype):
    mask = torch.tensor([0, 1, 3]).to(dtype).view(1, 1, 1, 3)
    args = mask, (1, 1), torch.zeros(1, 1, 2, dtype=torch.bfloat16), 2
    where = PLACES["stepped"](mask.shape, dtype)
    assert_written(FOR_SDPA, args, {}, mask, where)
    refused(
        TypeError, "expected out .*but got ", FOR_SDPA, torch.ones(1, 1, 1, 3).double(), args, {}
    )


# A crash takes the process along.
ODD_ADDRESSES = {
    "between two elements": """
        memory = torch.frombuffer(bytearray(4 * 2500 + 1), dtype=torch.float32, offset=1)
        out = memory[:2400].view(2, 1, 3, 400)
    """,
    "negated": "out = torch.zeros(2, 1, 3, 400, dtype=torch.complex64).conj().imag",
}


@pytest.mark.parametrize("kind", ODD_ADDRESSES)
def test_odd_outs_never_crash(kind):
    """The right mask or an error that names out."""
    make_out = textwrap.indent(textwrap.dedent(ODD_ADDRESSES[kind]), " " * 8).strip()
    script = f"""
        import warnings
        import attn_mask
        import torch
        warnings.simplefilter("ignore")
        {make_out}
        mask = torch.ones(2, 400)
        mask[:, ::3] = 0
        for name, args in (("to_causal_4d", (2, 3, 400)), ("_expand_mask", (mask, 3))):
            function = getattr(torch.ops.attn_mask, name)
            try:
                function.out(*args, out=out)
            except (TypeError, ValueError) as error:
                assert str(error).startswith(name + ": expected out "), error
            else:
                assert torch.equal(out.clone(), function(*args, dtype=torch.float32))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


# What torch expects of an operator


@every_writer
def test_schema(name):
    assert operator(name).overloads() == ["default", "out"]
    schema, functional = operator(name).out._schema, operator(name).default._schema
    assert not schema.returns
    *arguments, out = schema.arguments
    assert (out.name, out.kwarg_only, str(out.type)) == ("out", True, "Tensor")
    assert out.alias_info.is_write and not out.has_default_value()
    assert all(argument.alias_info is None for argument in arguments)

    def described(arguments):
        # A dtype is optional, since out has one.
        return [
            (a.name, a.kwarg_only, *(() if a.name == "dtype" else (str(a.type), a.default_value)))
            for a in arguments
        ]

    *wanted, stride_multiple = functional.arguments
    assert (stride_multiple.name, stride_multiple.default_value) == ("stride_multiple", 1)
    assert described(arguments) == described(wanted)
    for argument in arguments:
        if argument.name == "dtype":
            assert argument.has_default_value() and argument.default_value is None


@pytest.mark.parametrize("name", HOST_DECISIONS)
def test_nothing_to_write(name):
    assert operator(name).overloads() == ["default"]


@every_sample
def test_opcheck(name, args, kwargs):
    want = meaning(name, args, kwargs)
    out = torch.zeros(want.shape, dtype=want.dtype)
    torch.library.opcheck(operator(name).out, args, {**untold(kwargs), "out": out})


@every_writer
def test_opcheck_of_a_strided_out(name):
    args, kwargs = GOOD[name]
    for layout in ("transposed", "slice"):
        out = PLACES[layout](SHAPE, dtype_of(name)).out
        torch.library.opcheck(operator(name).out, args, {**kwargs, "out": out})


def test_opcheck_in_place():
    call = closed_rows(), lowest(FLOAT)
    torch.library.opcheck(ops._unmask_unattended.out, call, {"out": torch.zeros(SHAPE)})
    six_dimensions = torch.full((2, 1, 2, 1, 3, 5), lowest(FLOAT))
    out = torch.zeros(six_dimensions.shape).transpose(0, 2)
    call = six_dimensions.transpose(0, 2), lowest(FLOAT)
    torch.library.opcheck(ops._unmask_unattended.out, call, {"out": out})


@every_writer
def test_dispatch_keys(name):
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_mask::{name}.out", key)


@pytest.mark.cuda
@every_sample
@pytest.mark.parametrize("layout", PLACES)
def test_cuda(name, args, kwargs, layout):
    want = meaning(name, args, as_on_cuda(name, kwargs))
    where = PLACES[layout](want.shape, want.dtype)
    everything = where.everything.cuda()
    out = everything.as_strided(where.out.shape, where.out.stride(), where.out.storage_offset())
    args, kwargs = map_tensors(lambda tensor: tensor.cuda(), (args, untold(kwargs)))
    operator(name).out(*args, **kwargs, out=out)
    where.everything.copy_(everything)
    assert_same_mask(where.out, want)
    where.assert_untouched_around()


@every_sample
def test_meta(name, args, kwargs):
    want = meaning(name, args, kwargs)
    on_meta = map_tensors(lambda tensor: tensor.to("meta"), (args, untold(kwargs)))
    out = torch.empty(want.shape, dtype=want.dtype, device="meta")
    assert operator(name).out(*on_meta[0], **on_meta[1], out=out) is None
    wrong = torch.empty((*want.shape, 2), dtype=want.dtype, device="meta")
    with pytest.raises(ValueError, match=rf"^{name}: expected out "):
        operator(name).out(*on_meta[0], **on_meta[1], out=wrong)


@every_sample
def test_fake(name, args, kwargs):
    want = meaning(name, args, kwargs)
    with FakeTensorMode() as mode:
        args, kwargs = map_tensors(mode.from_tensor, (args, kwargs))
        out = torch.empty(want.shape, dtype=want.dtype)
        assert operator(name).out(*args, **kwargs, out=out) is None
        assert (out.shape, out.device.type) == (want.shape, "cpu")
        wrong = torch.empty((*want.shape, 2), dtype=want.dtype)
        with pytest.raises(ValueError, match=rf"^{name}: expected out "):
            operator(name).out(*args, **kwargs, out=wrong)


@pytest.mark.parametrize("name", TOLD_A_DEVICE)
def test_fake_with_a_device(name):
    """Fake tensors report another device than their kernels see, which is meta."""
    with FakeTensorMode() as mode:
        args, kwargs = map_tensors(mode.from_tensor, GOOD[name])
        out = torch.empty(SHAPE, dtype=dtype_of(name))
        assert operator(name).out(*args, **kwargs, device="cpu", out=out) is None
        assert operator(name).out(*args, **kwargs, device=out.device, out=out) is None


def test_symbolic_sizes():
    """No size becomes a number by being compared with out's."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    mask = mode.from_tensor(torch.ones(3, 7), symbolic_context=dynamic)
    queries = mode.from_tensor(torch.ones(5, 2), symbolic_context=dynamic)
    (batch_size, kv_length), q_length = mask.shape, queries.shape[0]
    with mode, enable_python_dispatcher():
        out = torch.empty(batch_size, 1, q_length, kv_length)
        ops.to_4d.out(mask, q_length, key_value_length=kv_length, out=out)
        ops.to_causal_4d.out(batch_size, q_length, kv_length, out=out)
        rule = [AND, 2, CAUSAL, PADDED, 0]
        ops.additive.out(rule, [mask], batch_size, q_length, kv_length, out=out)
        ops._unmask_unattended.out(torch.empty_like(out), -1.0, out=out)
    assert not environment.replacements, "a size became a constant"


@every_writer
def test_version_counter(name):
    args, kwargs = GOOD[name]
    base = torch.full((3, *SHAPE), 3).to(dtype_of(name))
    out = base[1]
    for whatever in (base, out):
        before = whatever._version
        operator(name).out(*args, **kwargs, out=out)
        assert whatever._version > before
    with torch.no_grad():
        before = out._version
        operator(name).out(*args, **kwargs, out=out)
        assert out._version > before
    if name != "boolean":
        weights = torch.ones(SHAPE, requires_grad=True)
        loss = (weights * out).sum()
        operator(name).out(*args, **kwargs, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_writer
def test_inference_mode(name):
    args, kwargs = GOOD[name]
    want = operator(name)(*args, **kwargs)
    normal = a_place(name)
    with torch.inference_mode():
        made_there = a_place(name)
        for out in (
            normal,
            made_there,
            normal.fill_(1),
            made_there.transpose(0, 3).transpose(0, 3),
        ):
            operator(name).out(*args, **kwargs, out=out)
            assert_same_mask(out, want)
    assert not normal.is_inference() and made_there.is_inference()


def test_inputs_that_require_grad():
    """There is no gradient to pass on, and nothing to warn about."""
    padding = BATCH.float().requires_grad_()
    out = torch.full(SHAPE, 3.0)
    ops.to_4d.out(padding, 3, key_value_length=5, out=out)
    assert not out.requires_grad
    assert_same_mask(out, ops.to_4d(BATCH, 3, dtype=FLOAT, key_value_length=5))


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sizes_of(mask, queries):
    return mask.shape[0], queries.shape[1], mask.shape[1]


# f(mask [b, kv], queries [b, q, d], options): the options hold `out`.
IN_GRAPHS = {
    "to_causal_4d": lambda f, m, q, o: f(*sizes_of(m, q), **o),
    "to_4d": lambda f, m, q, o: f(m, q.shape[1], key_value_length=m.shape[1], **o),
    "_make_causal_mask": lambda f, m, q, o: f(q.shape[:2], m.shape[1] - q.shape[1], 3, **o),
    "_expand_mask": lambda f, m, q, o: f(m, q.shape[1], **o),
    "_prepare_4d_causal_attention_mask": lambda f, m, q, o: f(
        m, q.shape[:2], q, m.shape[1] - q.shape[1], **o
    ),
    FOR_SDPA: lambda f, m, q, o: f(
        m, q.shape[:2], q, m.shape[1] - q.shape[1], allow_skip=False, **o
    ),
    "_prepare_4d_attention_mask": lambda f, m, q, o: f(m, q.shape[1], **o),
    BIDIRECTIONAL_FOR_SDPA: lambda f, m, q, o: f(m, q.shape[1], allow_skip=False, **o),
    "_create_4d_causal_attention_mask": lambda f, m, q, o: f(
        q.shape[:2], m.shape[1] - q.shape[1], **o
    ),
    "_unmask_unattended": lambda f, m, q, o: f(
        m[:, None, None, :].expand(-1, 1, q.shape[1], -1), 0.0, **o
    ),
    "boolean": lambda f, m, q, o: f([AND, 2, CAUSAL, PADDED, 0], [m], *sizes_of(m, q), **o),
    "additive": lambda f, m, q, o: f([OR, 2, CAUSAL, PADDED, 0], [m], *sizes_of(m, q), **o),
}


def functional(name, mask, queries, **options):
    if has_argument(name, "dtype"):
        options["dtype"] = FLOAT
    return IN_GRAPHS[name](operator(name).default, mask, queries, options)


def inputs(batch_size, q_length, kv_length):
    mask = torch.ones(batch_size, kv_length)
    mask[:, 0] = 0
    mask[0] = 0
    return mask, torch.zeros(batch_size, q_length, 64)


LENGTHS = ((2, 4, 7), (3, 5, 9), (4, 6, 18))


def writes_a_new_tensor(name):
    def function(mask, queries):
        batch_size, q_length, kv_length = sizes_of(mask, queries)
        out = torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype_of(name))
        IN_GRAPHS[name](operator(name).out, mask, queries, {"out": out})
        return out

    return function


@pytest.mark.usefixtures("fresh_dynamo")
@every_writer
def test_one_graph_for_every_length(name):
    compiled = torch.compile(
        writes_a_new_tensor(name), backend="aot_eager", fullgraph=True, dynamic=True
    )
    compiled(*inputs(*LENGTHS[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            assert_same_mask(compiled(*inputs(*lengths)), functional(name, *inputs(*lengths)))


@pytest.mark.usefixtures("fresh_dynamo")
@every_writer
def test_graphs_that_write_to_what_they_are_given(name):
    def function(mask, queries, out):
        IN_GRAPHS[name](operator(name).out, mask, queries, {"out": out})
        return out.logical_not()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = inputs(*LENGTHS[0])
    want = functional(name, *given)
    out = torch.full(want.shape, 3).to(want.dtype)
    assert torch.equal(compiled(*given, out), want.logical_not())
    assert_same_mask(out, want)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["to_causal_4d", "to_4d", "boolean"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor(name):
    inner = writes_a_new_tensor(name)
    compiled = torch.compile(
        lambda mask, queries: inner(mask, queries).logical_not(), fullgraph=True, dynamic=True
    )
    for lengths in LENGTHS[:2]:
        want = functional(name, *inputs(*lengths)).logical_not()
        assert torch.equal(compiled(*inputs(*lengths)), want)


def unmasks_its_input(mask):
    ops._unmask_unattended.out(mask, lowest(FLOAT), out=mask)
    return mask + 1


def unmasks_a_temporary(mask):
    return unmasks_its_input(mask * 1)


def unmasks_a_part(mask):
    buffer = torch.zeros(4, *mask.shape)
    part = buffer[1]
    part.copy_(mask)
    unmasks_its_input(part)
    return buffer + 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [unmasks_its_input, unmasks_a_temporary, unmasks_a_part])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_place_within_a_graph(function, backend):
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    got, want = closed_rows(), closed_rows()
    assert_same_mask(compiled(got), function(want))
    assert_same_mask(got, want)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", TOLD_A_DEVICE)
def test_a_device_within_a_graph(name):
    def function(mask, queries):
        batch_size, q_length, kv_length = sizes_of(mask, queries)
        out = torch.empty(
            batch_size, 1, q_length, kv_length, dtype=dtype_of(name), device=mask.device
        )
        IN_GRAPHS[name](operator(name).out, mask, queries, {"out": out, "device": mask.device})
        return out

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = inputs(*LENGTHS[0])
    assert_same_mask(compiled(*given), functional(name, *given))


@every_writer
def test_functionalization(name):
    """Into a strided out as well, where torch.compile itself raises."""

    def function(mask, queries, base):
        out = base.transpose(2, 3)[..., ::2]
        IN_GRAPHS[name](operator(name).out, mask, queries, {"out": out})
        return base.clone()

    given = inputs(*LENGTHS[0])
    want = functional(name, *given)
    batch_size, q_length, kv_length = LENGTHS[0]

    def new_base():
        return torch.full((batch_size, 1, 2 * kv_length, q_length), 3).to(want.dtype)

    traced = make_fx(function, tracing_mode="symbolic")(*given, new_base())
    base = new_base()
    got = traced(*given, base)
    assert_same_mask(base.transpose(2, 3)[..., ::2], want)
    assert_same_mask(base.transpose(2, 3)[..., 1::2], torch.full_like(want, 3))
    assert_same_mask(got, base)


class Exported(torch.nn.Module):
    def forward(self, mask, queries):
        return writes_a_new_tensor("to_4d")(mask, queries)


def test_export():
    batch_size = torch.export.Dim("batch_size", min=2, max=64)
    shapes = {"mask": {0: batch_size}, "queries": {0: batch_size}}
    program = torch.export.export(Exported(), inputs(2, 4, 7), dynamic_shapes=shapes)
    for module in (program.module(), program.run_decompositions().module()):
        given = inputs(5, 4, 7)
        assert_same_mask(module(*given), functional("to_4d", *given))


# Rows that begin a multiple apart

MULTIPLES = (1, 2, 8, 16)


def stored_as(plain, multiple):
    """Strides of the mask and elements of its storage, given the mask without a multiple."""
    # Batch rows that are alike are one.
    alike = plain.dim() == 4 and plain.stride(0) == 0
    sizes = [1, *plain.shape[1:]] if alike else list(plain.shape)
    if not sizes:
        return plain.stride(), 1
    length = sizes[-1]
    sizes[-1] = math.ceil(length / multiple) * multiple
    stored = torch.empty(sizes, device="meta")
    return stored.narrow(-1, 0, length).expand(plain.shape).stride(), stored.numel()


def assert_stored(got, plain, multiple):
    __tracebackhide__ = True
    assert_same_mask(got, plain)
    if plain is None:
        return
    strides, elements = stored_as(plain, multiple)
    assert got.stride() == strides
    assert got.storage_offset() == 0
    assert got.untyped_storage().nbytes() == elements * got.element_size()
    if got.dim() > 1 and got.shape[-1] > 0:
        assert got.stride(-2) % multiple == 0
        assert got.stride(-2) - got.shape[-1] < multiple


@every_sample
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_multiples(name, args, kwargs, multiple):
    plain = operator(name)(*args, **kwargs)
    assert_stored(operator(name)(*args, **kwargs, stride_multiple=multiple), plain, multiple)


@every_writer
def test_what_is_aligned_already(name):
    args, kwargs = GOOD[name]
    got = operator(name)(*args, **kwargs, stride_multiple=5)
    assert got.is_contiguous() or got.stride(0) == 0
    assert_same_mask(got, operator(name)(*args, **kwargs))


@settings(max_examples=200)
@given(st.integers(1, 70), st.one_of(legacy_calls(), rule_calls(rule_reference.calls(depth=1))))
def test_any_multiple(multiple, call):
    name, args, kwargs = call
    plain = operator(name)(*args, **kwargs)
    assert_stored(operator(name)(*args, **kwargs, stride_multiple=multiple), plain, multiple)


@every_sample
@pytest.mark.parametrize("multiple", [3, 8])
def test_meta_and_fake_multiples(name, args, kwargs, multiple):
    kwargs = {**kwargs, "stride_multiple": multiple}
    want = operator(name)(*args, **kwargs)

    def layout(result):
        return result if result is None else (result.dtype, result.shape, result.stride())

    on_meta = map_tensors(lambda tensor: tensor.to("meta"), (args, kwargs))
    has_tensors = any(
        isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))
    )
    place = {} if has_tensors else {"device": "meta"}
    assert layout(operator(name)(*on_meta[0], **on_meta[1], **place)) == layout(want)
    with FakeTensorMode() as mode:
        args, kwargs = map_tensors(mode.from_tensor, (args, kwargs))
        assert layout(operator(name)(*args, **kwargs)) == layout(want)


@every_sample
def test_opcheck_of_multiples(name, args, kwargs):
    torch.library.opcheck(operator(name).default, args, {**kwargs, "stride_multiple": 8})


def test_multiples_with_a_gradient():
    """Where a bias is being learned the mask is put together by other means."""
    bias = torch.arange(15.0).view(1, 1, 3, 5)
    call = ([CAUSAL], [], 2, 3, 5)
    want = ops.additive(*call, dtype=FLOAT, bias=bias, stride_multiple=8)
    got = ops.additive(*call, dtype=FLOAT, bias=bias.requires_grad_(), stride_multiple=8)
    assert got.requires_grad
    assert_same_mask(got.detach(), want)
    got.sum().backward()
    assert bias.grad.bool().any()
    assert got.stride() == want.stride() == (24, 24, 8, 1)
    mask = closed_rows()
    want = ops._unmask_unattended(mask, lowest(FLOAT), stride_multiple=8)
    got = ops._unmask_unattended(mask.requires_grad_(), lowest(FLOAT), stride_multiple=8)
    assert got.requires_grad
    assert_same_mask(got.detach(), want)
    assert got.stride() == want.stride() == (24, 24, 8, 1)


@every_writer
@pytest.mark.parametrize("multiple", [0, -1, -(2**63), 2**31, 2**62, 2**63 - 1])
def test_bad_multiples(name, multiple):
    args, kwargs = GOOD[name]
    text = rf"^{name}: expected stride_multiple .*but got {multiple}\b"
    with pytest.raises(ValueError, match=text):
        operator(name)(*args, **kwargs, stride_multiple=multiple)


@pytest.mark.parametrize("multiple", [0, 2**31])
@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("to_causal_4d", (2, 1, 5), {"dtype": FLOAT}),
        ("_create_4d_causal_attention_mask", ((2, 1), 4), {"dtype": FLOAT}),
        ("_prepare_4d_causal_attention_mask", (None, (2, 1), QUERIES[:, :1], 4), {}),
        (FOR_SDPA, (None, (2, 3), QUERIES, 0), {}),
        (BIDIRECTIONAL_FOR_SDPA, (torch.ones(2, 5),), {"dtype": FLOAT}),
    ],
)
def test_bad_multiples_where_no_mask_is_needed(name, args, kwargs, multiple):
    assert operator(name)(*args, **kwargs) is None
    with pytest.raises(
        ValueError, match=rf"^{name}: expected stride_multiple .*but got {multiple}"
    ):
        operator(name)(*args, **kwargs, stride_multiple=multiple)


def test_largest_multiple():
    mask = torch.ones(2, 5, device="meta")
    largest = 2**31 - 1
    got = ops._expand_mask(mask, 3, dtype=FLOAT, stride_multiple=largest)
    assert got.shape == SHAPE
    assert got.stride() == (3 * largest, 3 * largest, largest, 1)
    with pytest.raises(
        ValueError, match=r"^_expand_mask: expected a mask of less than 2\^63 bytes"
    ):
        ops._expand_mask(mask, 2**32, dtype=FLOAT, stride_multiple=largest)


@pytest.mark.usefixtures("fresh_dynamo")
@every_writer
def test_multiples_in_one_graph_for_every_length(name):
    def function(mask, queries):
        return functional(name, mask, queries, stride_multiple=8)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*inputs(*LENGTHS[0]))

    def check(*lengths):
        got, want = compiled(*inputs(*lengths)), function(*inputs(*lengths))
        assert_same_mask(got, want)
        assert got.stride() == want.stride()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in LENGTHS:
            check(*lengths)
    # Rows without a gap are contiguous, for which torch compiles once more.
    check(3, 5, 16)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_multiples_under_inductor():
    def function(mask, queries):
        return functional("to_4d", mask, queries, stride_multiple=8) * 0.5

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for lengths in LENGTHS[:2]:
        assert_same_mask(compiled(*inputs(*lengths)), function(*inputs(*lengths)))


# Rows unmasked in the same pass


@settings(max_examples=250)
@given(st.data(), to_4d_calls())
def test_unmask_unattended_in_one_pass(data, call):
    args, kwargs = call
    dtype = kwargs["dtype"]
    closed = ops.to_4d(*args, **kwargs)
    want = ops._unmask_unattended(closed, lowest(dtype))
    assert_same_mask(ops.to_4d(*args, **kwargs, unmask_unattended=True), want)
    where = data.draw(places(want.shape, dtype))
    ops.to_4d.out(*args, **untold(kwargs), unmask_unattended=True, out=where.out)
    assert_same_mask(where.out, want)
    where.assert_untouched_around()


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 2])
def test_unmask_unattended_cell_by_cell(window, dtype):
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0] * 7, [1] * 7, [1, 0, 0, 0, 0, 0, 0]])
    options = {"dtype": dtype, "key_value_length": 7, "sliding_window": window}
    for q_length in (1, 4, 7):
        got = ops.to_4d(mask, q_length, **options, unmask_unattended=True)
        closed = reference.to_4d(mask, q_length, **options)
        want = reference._unmask_unattended(closed, lowest(dtype))
        assert_same_mask(got, want)
        # Unmasked, as -0.0.
        assert got[1].signbit().all() and got[1].eq(0).all()


def test_unmask_unattended_is_off_unless_asked_for():
    mask = torch.zeros(1, 4)
    assert ops.to_4d(mask, 4, dtype=FLOAT, key_value_length=4).eq(lowest(FLOAT)).all()
    out = torch.zeros(1, 1, 4, 4)
    ops.to_4d.out(mask, 4, key_value_length=4, out=out)
    assert out.eq(lowest(FLOAT)).all()


def test_opcheck_of_unmask_unattended():
    kwargs = {"key_value_length": 5, "unmask_unattended": True}
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    torch.library.opcheck(ops.to_4d.default, (mask, 5), {**kwargs, "dtype": HALF})
    out = torch.zeros(1, 1, 5, 5)
    torch.library.opcheck(ops.to_4d.out, (mask, 5), {**kwargs, "out": out})


@pytest.mark.slow
@settings(max_examples=5000)
@given(st.data(), st.one_of(legacy_calls(), rule_calls(rule_reference.calls(depth=3))))
def test_very_many_masks_in_any_place(data, call):
    name, args, kwargs = call
    want = meaning(name, args, kwargs)
    assert_written(name, args, kwargs, want, data.draw(places(want.shape, want.dtype)))
