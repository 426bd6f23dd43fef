"""attn_mask.modeling_attn_mask_utils gives what the file of the same name in transformers gives.

Every comparison makes one call on both modules, `same("function", ...)`; ours with warnings as
errors. What wins where the two are meant to differ is near the end.
"""

import dataclasses
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from attn_mask import modeling_attn_mask_utils as ours
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    COMPLEX_DTYPES,
    FLOAT8_DTYPES,
    INT_DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    OUT_DTYPES,
    assert_same_mask,
    has_distinct_memory,
    lowest,
    visibility,
)
from parity import (
    FLOAT,
    FUNCTIONS,
    INT_VALUES,
    METHODS,
    STATIC_METHODS,
    VALUES,
    Parity,
    default_dtype,
    embeds,
    needed_default,
    padding_masks,
    parameters,
)
from torch._subclasses import FakeTensor, FakeTensorMode

CAUSAL_FUNCTIONS = FUNCTIONS[:2]

WINDOWS = (None, 1, 2, 3, 4)


def all_patterns(length):
    """Every padding mask of this length, one per batch row."""
    rows = list(itertools.product((0, 1), repeat=length))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)


@pytest.fixture(scope="session")
def same(upstream):
    return Parity(upstream, ours)


# Names, signatures, the dataclass


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_of_function(upstream, name):
    assert parameters(getattr(ours, name)) == parameters(getattr(upstream, name))


@pytest.mark.parametrize("name", METHODS + STATIC_METHODS)
def test_signature_of_method(upstream, name):
    our_class, their_class = ours.AttentionMaskConverter, upstream.AttentionMaskConverter
    assert parameters(getattr(our_class, name)) == parameters(getattr(their_class, name))
    assert isinstance(vars(our_class)[name], staticmethod) == (name in STATIC_METHODS)


def test_no_function_of_upstream_is_missing(upstream):
    defined = {
        name
        for name, value in vars(upstream).items()
        if getattr(value, "__module__", None) == upstream.__name__
    }
    assert defined == {"AttentionMaskConverter", *FUNCTIONS}
    methods = {
        n
        for n, v in vars(upstream.AttentionMaskConverter).items()
        if not n.startswith("_") and callable(v)
    }
    assert methods <= set(dir(ours.AttentionMaskConverter))


def test_converter_is_a_dataclass(same, upstream):
    same.call(lambda module: repr(module.AttentionMaskConverter(True)))
    same.call(lambda module: repr(module.AttentionMaskConverter(is_causal=False, sliding_window=7)))
    same.call(lambda module: [f.name for f in dataclasses.fields(module.AttentionMaskConverter)])
    same.call(lambda module: dataclasses.asdict(module.AttentionMaskConverter(True, 3)))


def test_converter_equality():
    converter = ours.AttentionMaskConverter
    assert converter(True, 3) == converter(True, 3)
    assert converter(True, 3) != converter(True, 4)
    assert converter(True) != converter(False)
    with pytest.raises(TypeError, match="unhashable"):
        hash(converter(True))


def test_converter_can_be_changed(same):
    def narrowed(module):
        converter = module.AttentionMaskConverter(True)
        converter.sliding_window = 1
        return converter.to_causal_4d(1, 4, 4, FLOAT)

    same(narrowed)


# Every small shape


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_causal_masks(same, dtype, window):
    default = needed_default(dtype)
    for batch_size, q_length, past in itertools.product(range(4), range(6), range(5)):
        kv_length, shape = q_length + past, (batch_size, q_length)
        queries = embeds(batch_size, q_length, dtype)
        mask = same(
            "to_causal_4d",
            batch_size,
            q_length,
            kv_length,
            dtype,
            converter=(True, window),
            default=default,
        )
        if mask is not None and batch_size > 1 and q_length > 0:
            assert mask.stride(0) == 0
        same("_make_causal_mask", shape, dtype, "cpu", past, window, default=default)
        same("_create_4d_causal_attention_mask", shape, dtype, "cpu", past, window, default=default)
        for name in CAUSAL_FUNCTIONS:
            same(name, None, shape, queries, past, window, default=default)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_padded_causal_masks(same, dtype, window):
    default = needed_default(dtype)
    for q_length, past in itertools.product(range(6), range(5)):
        kv_length = q_length + past
        if kv_length > 7:
            continue
        padding = all_patterns(kv_length)
        mask = same(
            "to_4d", padding, q_length, dtype, kv_length, converter=(True, window), default=default
        )
        assert has_distinct_memory(mask)
        # Also one pattern at a time: whether there is a mask at all depends on the values.
        for rows in [padding, *padding[[0, len(padding) // 2, -1]].split(1), padding[:0]]:
            shape, queries = (len(rows), q_length), embeds(len(rows), q_length, dtype)
            for name in CAUSAL_FUNCTIONS:
                same(name, rows, shape, queries, past, window, default=default)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_padding_masks(same, dtype):
    for kv_length, q_length in itertools.product(range(6), (None, *range(6))):
        padding = all_patterns(kv_length)
        for rows in [padding, padding[-1:], padding[:0]]:
            mask = same("_expand_mask", rows, dtype, q_length)
            assert has_distinct_memory(mask)
            same("_prepare_4d_attention_mask", rows, dtype, q_length)
            same("_prepare_4d_attention_mask_for_sdpa", rows, dtype, q_length)
            if q_length is not None:
                same("to_4d", rows, q_length, dtype, converter=(False,))
                same("to_4d", rows, q_length, dtype, 99, converter=(False,))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("window", (None, *range(1, 8)))
def test_small_skip_decisions(same, window, training):
    for q_length, past in itertools.product(range(5), range(4)):
        kv_length, queries = q_length + past, embeds(2, q_length)
        masks = [
            None,
            torch.ones(2, kv_length),
            torch.zeros(2, kv_length),
            torch.ones(2, kv_length + 2),
            torch.ones(2, 1, q_length, kv_length),
            torch.full((2, kv_length), 0.9999),
            torch.ones(3),
            torch.ones(1, 2, 3),
            torch.tensor(1),
        ]
        for mask in masks:
            same("_ignore_causal_mask_sdpa", mask, queries, past, window, training)


# Larger shapes, other dtypes, values and layouts


@st.composite
def padded_calls(draw):
    batch_size = draw(st.integers(0, 4))
    q_length = draw(st.integers(0, 70))
    past = draw(st.one_of(st.just(0), st.integers(0, 70)))
    window = draw(st.one_of(st.none(), st.integers(1, 150), st.just(2**62)))
    dtype = draw(st.sampled_from(OUT_DTYPES))
    mask = draw(padding_masks(batch_size, q_length + past))
    return mask, q_length, past, window, dtype


@settings(max_examples=250)
@given(padded_calls())
def test_padded_causal_masks(same, call):
    mask, q_length, past, window, dtype = call
    default, shape = needed_default(dtype), (len(mask), q_length)
    queries = embeds(*shape, dtype)
    same("to_4d", mask, q_length, dtype, q_length + past, converter=(True, window), default=default)
    same("to_causal_4d", *shape, q_length + past, dtype, converter=(True, window), default=default)
    for name in CAUSAL_FUNCTIONS:
        same(name, mask, shape, queries, past, window, default=default)


@settings(max_examples=150)
@given(padded_calls())
def test_padding_masks(same, call):
    mask, q_length, _, _, dtype = call
    same("to_4d", mask, q_length, dtype, converter=(False,))
    same("_prepare_4d_attention_mask", mask, dtype, q_length)
    same("_prepare_4d_attention_mask_for_sdpa", mask, dtype, q_length)
    same("_prepare_4d_attention_mask_for_sdpa", mask, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_layouts_of_padding(same, mask_dtype, layout):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 2, (3, 37), generator=generator).to(mask_dtype)
    mask = LAYOUTS[layout](mask)
    for dtype in OUT_DTYPES:
        default = needed_default(dtype)
        same("to_4d", mask, 20, dtype, 37, converter=(True, 9), default=default)
        got = same("_expand_mask", mask, dtype, 2, default=default)
        assert has_distinct_memory(got)


def every_value(dtype):
    """All the bit patterns of a dtype of one or two bytes."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    size = torch.empty((), dtype=dtype).element_size()
    pattern = torch.uint8 if size == 1 else torch.uint16
    return torch.arange(256**size, dtype=torch.int32).to(pattern).view(dtype)


def values_around_one(dtype):
    """Where the cast to an output dtype starts and stops giving 1, and the neighbours of that.

    The cast to a narrower dtype rounds to even and may round twice (by way of float32), so around
    the halves between 1 and its neighbours there are steps of the size of float32's own.
    """
    halves = [1 - torch.finfo(out).eps / 4 for out in OUT_DTYPES]
    halves += [1 + torch.finfo(out).eps / 2 for out in OUT_DTYPES]
    nudges = [0.0, *(sign * 2.0**-n for sign in (-1, 1) for n in (23, 24, 25, 26, 40))]
    centres = torch.tensor([h + nudge for h in halves for nudge in nudges], dtype=torch.float64)
    integer = {4: torch.int32, 8: torch.int64}[torch.finfo(dtype).bits // 8]
    steps = centres.to(dtype).view(integer)[:, None] + torch.arange(-3, 4, dtype=integer)
    special = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, float("nan"), float("inf"), -float("inf")]
    special += [torch.finfo(dtype).min, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.9999]
    return torch.cat([steps.flatten().view(dtype), torch.tensor(special, dtype=dtype)])


def wide_integers(dtype):
    limits = torch.iinfo(dtype)
    powers = [2**n + step for n in (8, 11, 16, 24, 31, 32, 53, 62) for step in (-1, 0, 1)]
    values = [0, 1, 2, limits.min, limits.max, limits.max - 1, limits.min + 1, *powers]
    if limits.min < 0:
        values.append(-1)
    return torch.tensor([v for v in values if limits.min <= v <= limits.max], dtype=dtype)


def interesting_values(dtype):
    if torch.empty((), dtype=dtype).element_size() <= 2:
        return every_value(dtype)
    return values_around_one(dtype) if dtype.is_floating_point else wide_integers(dtype)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_values_of_padding(same, mask_dtype, dtype):
    mask = interesting_values(mask_dtype)[None]
    got = same("_expand_mask", mask, dtype, 1)
    if mask_dtype != torch.float8_e8m0fnu or dtype != torch.float16:
        assert got.unique().numel() == 2, "the values should tell open from closed"
    same("to_4d", mask, 1, dtype)
    length = mask.shape[1]
    same("to_4d", mask, 1, dtype, length, converter=(True, 100), default=needed_default(dtype))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_values_that_let_sdpa_skip(same, mask_dtype):
    """All of a mask has to equal 1 in its own dtype, not after a cast."""
    for value in interesting_values(mask_dtype)[:: 1 if mask_dtype.itemsize != 2 else 97]:
        mask = torch.ones(2, 3).to(mask_dtype)
        mask[1, 2] = value
        same("_prepare_4d_attention_mask_for_sdpa", mask, torch.float16)
        same(
            "_prepare_4d_causal_attention_mask_for_sdpa",
            mask,
            (2, 3),
            embeds(2, 3, torch.float16),
            0,
        )


def test_masks_that_require_grad(same):
    mask = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    same.call(lambda m: m.AttentionMaskConverter(True).to_4d(mask, 3, FLOAT, 3).detach())
    same.call(lambda m: m._prepare_4d_attention_mask(mask, FLOAT).detach())


# _unmask_unattended


@st.composite
def additive_masks(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=5))
    dtype = draw(st.sampled_from((*OUT_DTYPES, torch.int8, torch.int32, torch.int64, torch.uint8)))
    floats = [
        lowest(dtype) if dtype.is_floating_point else 7,
        0.0,
        -0.0,
        5.0,
        float("nan"),
        float("inf"),
    ]
    values = floats if dtype.is_floating_point else [7, 0, 5, 44]
    closed = draw(st.sampled_from(values[:1] * 3 + values[1:4]))
    some = [closed, closed, closed, draw(st.sampled_from(values))]
    seed = draw(st.integers(0, 2**31))
    picks = torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor(some, dtype=dtype)[picks]
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    if mask.dim() and mask.numel():
        mask = LAYOUTS[layout](mask)
    return mask, closed


@settings(max_examples=300)
@given(additive_masks())
def test_unmask_unattended(same, call):
    mask, closed = call
    before = mask.clone()
    got = same("_unmask_unattended", mask, closed)
    assert has_distinct_memory(got)
    assert_same_mask(mask, before)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_unmask_unattended_rows_of_every_kind(same, dtype):
    low = lowest(dtype)
    rows = torch.tensor(list(itertools.product([low, 0.0, -0.0, 3.0], repeat=4)), dtype=dtype)
    for min_dtype in (low, 0.0, -0.0, 3.0, 3):
        same("_unmask_unattended", rows, min_dtype)
        same("_unmask_unattended", rows[:, None, None], min_dtype)
    unmasked = ours.AttentionMaskConverter._unmask_unattended(rows[:1], low)
    assert (unmasked == 0).all() and unmasked.signbit().all()


@pytest.mark.parametrize(
    ("dtype", "min_dtype"),
    [
        (torch.float16, -65504.3),
        (torch.float16, -65519.0),
        (torch.float16, -3.4e38),
        (torch.float16, 0.1),
        (torch.bfloat16, 0.1),
        (torch.bfloat16, torch.finfo(FLOAT).min),
        (FLOAT, 0.1),
        (FLOAT, torch.finfo(torch.float64).min),
        (torch.float64, torch.finfo(FLOAT).min),
        (torch.float64, 0.1),
        (FLOAT, float("nan")),
    ],
)
def test_unmask_unattended_rounds_the_number(same, dtype, min_dtype):
    for value in (0.1, -65504.0, lowest(dtype), torch.finfo(FLOAT).min):
        mask = torch.tensor([[value, value]], dtype=torch.float64).to(dtype)
        if not mask.isinf().any():
            same("_unmask_unattended", mask, min_dtype)


@pytest.mark.parametrize(
    "dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), ids=str
)
def test_unmask_unattended_integers(same, dtype):
    rows = torch.tensor([[1, 1], [2, 2], [44, 44], [1, 2], [0, 0]], dtype=dtype)
    for min_dtype in (0, 1, 2, 1.0, 1.5, 2.0, 0.5, -0.5, True):
        same("_unmask_unattended", rows, min_dtype)


def test_unmask_unattended_integers_beyond_float32(same):
    rows = torch.tensor([[2**24 + 1] * 2, [2**24] * 2, [2**53 + 1] * 2])
    for min_dtype in (2**24, 2**24 + 1, 2**53 + 1, float(2**24)):
        same("_unmask_unattended", rows, min_dtype)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_unmask_unattended_with_the_number_in_a_tensor(same, dtype):
    low = torch.tensor(lowest(dtype), dtype=dtype)
    same("_unmask_unattended", torch.stack([low, low, low * 0]).expand(2, 3), low)
    same("_unmask_unattended", low.expand(2, 3), low)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_unmask_unattended_accepts_and_refuses_dtypes(same, dtype):
    mask = torch.tensor([[1, 1], [0, 1]]).to(dtype)
    same("_unmask_unattended", mask, 1)


# 4D masks


@st.composite
def masks_4d(draw):
    shape = [draw(st.integers(0, 3)), 1, draw(st.integers(0, 6)), draw(st.integers(0, 9))]
    dtype = draw(st.sampled_from((*OUT_DTYPES, *INT_DTYPES)))
    values = VALUES if dtype.is_floating_point else INT_VALUES
    some = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    picks = torch.randint(len(some), shape, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor(some, dtype=torch.float64)[picks].to(dtype)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](mask) if mask.numel() else mask


@settings(max_examples=200)
@given(masks_4d(), st.sampled_from(OUT_DTYPES))
def test_4d_masks(same, mask, dtype):
    batch_size, _, q_length, kv_length = mask.shape
    call = (mask, (batch_size, q_length), embeds(batch_size, q_length, dtype), kv_length - q_length)
    before = mask.clone()
    got = same("_prepare_4d_causal_attention_mask", *call)
    assert got is None or has_distinct_memory(got)
    assert same("_prepare_4d_causal_attention_mask_for_sdpa", *call) is mask
    assert_same_mask(mask, before)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", (*INT_DTYPES, *OUT_DTYPES, *FLOAT8_DTYPES), ids=str)
def test_values_of_4d_masks(same, mask_dtype, dtype):
    mask = interesting_values(mask_dtype)[None, None, None]
    past = mask.shape[-1] - 1
    same("_prepare_4d_causal_attention_mask", mask, (1, 1), embeds(1, 1, dtype), past)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.int64, FLOAT, *COMPLEX_DTYPES), ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 4, 3, 3), (1, 1, 1, 1), (5, 6, 7, 8)])
def test_sdpa_passes_4d_masks_through(same, shape, mask_dtype, window):
    mask = torch.ones(shape).to(mask_dtype)
    for q_length in (1, 3):
        got = ours._prepare_4d_causal_attention_mask_for_sdpa(
            mask, (2, q_length), embeds(2, q_length), 0, window
        )
        assert got is mask
        if mask_dtype not in COMPLEX_DTYPES:
            same(
                "_prepare_4d_causal_attention_mask_for_sdpa",
                mask,
                (2, q_length),
                embeds(2, q_length),
                0,
                window,
            )


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 3), (2, 3, 3, 4), (1, 1, 3, 4), (2, 1, 4, 3), (0, 1, 3, 4)]
)
def test_4d_masks_of_the_wrong_shape(same, shape):
    same("_prepare_4d_causal_attention_mask", torch.ones(shape), (2, 3), embeds(2, 3), 1)
    with pytest.raises(ValueError) as raised:
        ours._prepare_4d_causal_attention_mask(torch.ones(shape), (2, 3), embeds(2, 3), 1)
    assert str(raised.value) == (
        f"Incorrect 4D attention_mask shape: {shape}; expected: (2, 1, 3, 4)."
    )


# Corners: what upstream gives for arguments that were not thought of


@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size([2, 3]), (2, 7, 3), (3,), (2,), ()])
@pytest.mark.parametrize("mask_shape", [None, (2, 3), (2, 1, 3, 3), (2, 1, 7, 3)])
@pytest.mark.parametrize("name", CAUSAL_FUNCTIONS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_input_shapes(same, name, mask_shape, shape, value):
    mask = None if mask_shape is None else torch.full(mask_shape, value)
    same(name, mask, shape, embeds(2, 3), 0)


@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size([2, 3]), (2, 7, 3), (3,), (1,), ()])
def test_input_shapes_without_mask(same, shape):
    same("_create_4d_causal_attention_mask", shape, FLOAT, "cpu", 1)
    same("_make_causal_mask", shape, FLOAT, "cpu", 1)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_masks_of_other_ranks(same, rank, value):
    mask = torch.full([2] * rank, value)
    for q_length, past in ((3, 0), (1, 2), (2, 1)):
        for name in CAUSAL_FUNCTIONS:
            same(name, mask, (2, q_length), embeds(2, q_length), past)
    same("_prepare_4d_attention_mask", mask, FLOAT)
    same("_prepare_4d_attention_mask_for_sdpa", mask, FLOAT)
    same("to_4d", mask, 2, FLOAT, 2)
    same("to_4d", mask, 2, FLOAT, converter=(False,))


@pytest.mark.parametrize("window", [None, 1, 2, 9])
@pytest.mark.parametrize("q_length", range(5))
def test_masks_of_another_length_than_the_keys(same, q_length, window):
    for mask_length, kv_length in itertools.product(range(6), range(6)):
        mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])[:, :mask_length]
        same("to_4d", mask, q_length, FLOAT, kv_length, converter=(True, window))


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_comes_from_the_mask(same, rows):
    mask = torch.tensor([[0, 1, 1]]).expand(rows, 3)
    for name in CAUSAL_FUNCTIONS:
        same(name, mask, (2, 3), embeds(2, 3), 0)
        same(name, mask, (2, 1), embeds(2, 1), 2)


def test_queries_come_from_the_shape_but_skipping_looks_at_the_embeds(same):
    for q_length, embedded in itertools.product((1, 2, 3), repeat=2):
        for mask in (None, torch.ones(2, 3)):
            same(
                "_prepare_4d_causal_attention_mask_for_sdpa",
                mask,
                (2, q_length),
                embeds(2, embedded),
                3 - q_length,
            )


@pytest.mark.parametrize("window", [0, -1, -3, 1, 100, 2**62])
@pytest.mark.parametrize("past", [-2, -1, 0, 1, 4])
def test_windows_of_the_bare_causal_mask(same, past, window):
    """The static method does not check its window, the converter does."""
    same("_make_causal_mask", (2, 3), FLOAT, "cpu", past, window)
    same("_ignore_causal_mask_sdpa", None, embeds(2, 3), past, window)


def test_fewer_keys_than_queries(same):
    for q_length, kv_length, window in itertools.product(range(5), range(5), (None, 2)):
        if kv_length < q_length:
            same("to_causal_4d", 2, q_length, kv_length, FLOAT, converter=(True, window))


@pytest.mark.parametrize("embeds_shape", [(), (3,), (2, 3), (2, 3, 4, 5), (0, 3, 4)])
def test_embeds_of_other_ranks(same, embeds_shape):
    queries = torch.zeros(embeds_shape)
    for mask in (None, torch.ones(2, 3), torch.zeros(2, 3)):
        for name in CAUSAL_FUNCTIONS:
            same(name, mask, (2, 3), queries, 0)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None, "meta", torch.device("meta")])
def test_devices(same, device):
    same("_make_causal_mask", (2, 3), FLOAT, device)
    same("_create_4d_causal_attention_mask", (2, 3), FLOAT, device, 1, 2)
    same("to_causal_4d", 2, 3, 4, FLOAT, device)
    same("to_causal_4d", 2, 3, 4, dtype=FLOAT, device=device)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3, 3)])
@pytest.mark.parametrize("name", CAUSAL_FUNCTIONS)
def test_embeds_on_another_device(same, name, shape, value):
    """Of the embeds only the dtype is needed where there is a mask."""
    same(name, torch.full(shape, value), (2, 3), embeds(2, 3).to("meta"), 0)


def test_meta_masks(same):
    mask, queries = torch.ones(2, 4, device="meta"), embeds(2, 3).to("meta")
    same("to_4d", mask, 3, FLOAT, 4, converter=(True, 2))
    same("_prepare_4d_attention_mask", mask, torch.float16, 3)
    same("_prepare_4d_causal_attention_mask", mask, (2, 3), queries, 1)
    same("_prepare_4d_causal_attention_mask", None, (2, 3), queries, 1)
    same("_prepare_4d_causal_attention_mask_for_sdpa", None, (2, 3), queries, 0)
    same("_prepare_4d_causal_attention_mask_for_sdpa", None, (2, 3), queries, 1)


@pytest.mark.parametrize("window", [None, 2])
def test_sizes_as_tensors(same, window):
    """A static cache gives its length as a tensor without dimensions."""
    two, three, past = torch.tensor(2), torch.tensor(3), torch.tensor(1)
    same("to_causal_4d", two, three, three + past, FLOAT, converter=(True, window))
    same("to_4d", torch.ones(2, 4), three, FLOAT, three + past, converter=(True, window))
    same("_expand_mask", torch.ones(2, 4), FLOAT, three)
    same("_create_4d_causal_attention_mask", (2, 3), FLOAT, "cpu", past, window)
    for mask in (None, torch.ones(2, 4), torch.zeros(2, 4), torch.ones(2, 1, 3, 4)):
        for name in CAUSAL_FUNCTIONS:
            same(name, mask, (2, 3), embeds(2, 3), past, window)


def test_a_result_is_never_shared(same):
    """A second call must not see what was written into the first result."""
    mask = torch.tensor([[0, 1, 1]])
    for call in (
        lambda m: m.AttentionMaskConverter(True).to_causal_4d(1, 3, 3, FLOAT),
        lambda m: m.AttentionMaskConverter(True).to_4d(mask, 3, FLOAT, 3),
        lambda m: m._prepare_4d_attention_mask(mask, FLOAT),
    ):
        call(ours).fill_(5.0)
        same.call(call)


# Errors with a text of upstream's own


def test_error_converter_with_a_bad_window(same):
    for window in (0, -1, -100):
        same.call(lambda m, window=window: m.AttentionMaskConverter(True, window))
        same("_create_4d_causal_attention_mask", (1, 2), FLOAT, "cpu", 0, window)
        for name in CAUSAL_FUNCTIONS:
            same(name, None, (1, 2), embeds(1, 2), 0, window)
    with pytest.raises(ValueError) as raised:
        ours.AttentionMaskConverter(True, -1)
    assert str(raised.value) == (
        "Make sure that when passing `sliding_window` that its value is a strictly positive "
        "integer, not `-1`"
    )


def test_error_to_causal_4d_without_causality(same):
    same("to_causal_4d", 1, 2, 2, FLOAT, converter=(False,))
    with pytest.raises(ValueError) as raised:
        ours.AttentionMaskConverter(False).to_causal_4d(1, 2, 2, FLOAT)
    assert str(raised.value) == (
        "Please use `to_causal_4d` only if "
        "<class 'attn_mask.modeling_attn_mask_utils.AttentionMaskConverter'> "
        "has `is_causal` set to True."
    )


def test_error_to_4d_without_key_value_length(same):
    mask = torch.ones(1, 3)
    same("to_4d", mask, 3, FLOAT)
    same("to_4d", mask, 1, FLOAT, converter=(True, 2))
    same("to_4d", mask, 1, FLOAT)
    with pytest.raises(ValueError) as raised:
        ours.AttentionMaskConverter(True).to_4d(mask, 3, FLOAT)
    assert str(raised.value) == (
        "This attention mask converter is causal. Make sure to pass `key_value_length` to "
        "correctly create a causal mask."
    )


def test_error_window_without_causality(same):
    same("to_4d", torch.ones(1, 3), 3, FLOAT, 3, converter=(False, 2))
    with pytest.raises(NotImplementedError) as raised:
        ours.AttentionMaskConverter(False, 2).to_4d(torch.ones(1, 3), 3, FLOAT, 3)
    assert str(raised.value) == "Sliding window is currently only implemented for causal masking"


def test_error_unmask_unattended_of_booleans(same):
    mask = torch.ones(2, 3, dtype=torch.bool)
    same("_unmask_unattended", mask, 0.0)
    with pytest.raises(ValueError) as raised:
        ours.AttentionMaskConverter._unmask_unattended(mask, 0.0)
    assert str(raised.value) == (
        "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, "
        "got a BoolTensor."
    )


def test_error_of_every_raise_in_upstream_is_tested(upstream):
    """A raise that a later release adds shows up here."""
    source = inspect.getsource(upstream)
    assert source.count("raise ") == 6


NOT_OUT_DTYPES = (torch.bool, *INT_DTYPES, *FLOAT8_DTYPES, *COMPLEX_DTYPES)


@pytest.mark.parametrize("dtype", NOT_OUT_DTYPES, ids=str)
def test_error_output_dtype(dtype):
    mask = torch.ones(1, 3)
    queries = torch.zeros(1, 3, 2, dtype=dtype)
    for call in (
        lambda: ours.AttentionMaskConverter(True).to_causal_4d(1, 3, 3, dtype),
        lambda: ours.AttentionMaskConverter(True).to_4d(mask, 3, dtype, 3),
        lambda: ours._prepare_4d_attention_mask(mask, dtype),
        lambda: ours._create_4d_causal_attention_mask((1, 3), dtype, "cpu"),
        lambda: ours.AttentionMaskConverter._make_causal_mask((1, 3), dtype, "cpu"),
        lambda: ours._prepare_4d_causal_attention_mask(mask, (1, 3), queries, 0),
        lambda: ours._prepare_4d_causal_attention_mask_for_sdpa(None, (1, 3), queries, 1),
    ):
        with pytest.raises(TypeError, match="dtype"):
            call()


@pytest.mark.parametrize("dtype", NOT_OUT_DTYPES, ids=str)
def test_error_output_dtype_with_windows_of_the_bare_causal_mask(dtype):
    for window in (0, -1):
        with pytest.raises(TypeError):
            ours.AttentionMaskConverter._make_causal_mask((1, 3), dtype, "cpu", 0, window)


INSIDE_TORCH = {
    "lengths differ": lambda m: m.AttentionMaskConverter(True).to_4d(torch.ones(2, 3), 2, FLOAT, 4),
    "lengths differ in prepare": lambda m: m._prepare_4d_causal_attention_mask(
        torch.ones(2, 3), (2, 4), embeds(2, 4), 0
    ),
    "negative tgt_len": lambda m: m._prepare_4d_attention_mask(torch.ones(2, 3), FLOAT, -2),
    "negative query length": lambda m: m.AttentionMaskConverter._make_causal_mask(
        (2, -1), FLOAT, "cpu"
    ),
    "overflow": lambda m: m.AttentionMaskConverter._make_causal_mask((2, 2**62), FLOAT, "cpu"),
    "overflow in to_causal_4d": lambda m: m.AttentionMaskConverter(True).to_causal_4d(
        1, 2**62, 2**62, FLOAT
    ),
    "narrow 4D mask": lambda m: m._prepare_4d_causal_attention_mask(
        torch.ones(1, 1, 1, 2, dtype=torch.float16), (1, 1), embeds(1, 1), 1
    ),
    "sparse mask": lambda m: m._prepare_4d_attention_mask(torch.ones(2, 3).to_sparse(), FLOAT),
    "no number": lambda m: m.AttentionMaskConverter._unmask_unattended(torch.ones(2, 3), "low"),
}


@pytest.mark.parametrize("case", INSIDE_TORCH)
def test_error_from_inside_torch(same, case):
    same.call(INSIDE_TORCH[case])


MINUS_ONE = {
    "tgt_len": lambda c: c._expand_mask(torch.ones(2, 3), FLOAT, -1),
    "query_length": lambda c: c(True).to_4d(torch.ones(2, 3), -1, FLOAT, 3),
    "batch of _make_causal_mask": lambda c: c._make_causal_mask((-1, 2), FLOAT, "cpu"),
    "batch, window 0": lambda c: c._make_causal_mask((-1, 2), FLOAT, "cpu", 0, 0),
    "batch_size": lambda c: c(True).to_causal_4d(-1, 2, 2, FLOAT),
    "key_value_length": lambda c: c(True).to_causal_4d(2, 3, -1, FLOAT),
}


@pytest.mark.parametrize("case", MINUS_ONE)
def test_error_sizes_of_minus_one(case):
    """Upstream hands them to expand, which takes -1 for 'as it is'."""
    with pytest.raises(ValueError, match="-1"):
        MINUS_ONE[case](ours.AttentionMaskConverter)


# Differences from upstream, each of them meant


def test_difference_float64_causal_masks_work(upstream):
    with pytest.raises(RuntimeError), pytest.warns(FutureWarning):
        upstream.AttentionMaskConverter(True).to_causal_4d(1, 2, 2, torch.float64)
    got = ours.AttentionMaskConverter(True).to_causal_4d(1, 2, 2, torch.float64)
    low = lowest(torch.float64)
    assert_same_mask(got, torch.tensor([[[[0.0, low], [0.0, 0.0]]]], dtype=torch.float64))


def every_function(dtype):
    """One call of everything that returns a mask."""
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask_4d = padding[:, None, None].expand(2, 1, 3, 3)
    queries = torch.zeros(2, 3, 4, dtype=dtype)
    converter = ours.AttentionMaskConverter
    yield converter(True, 1).to_causal_4d(2, 3, 4, dtype)
    yield converter(True, 1).to_4d(padding, 3, dtype, 3)
    yield converter._make_causal_mask((2, 3), dtype, "cpu")
    yield converter._expand_mask(padding, dtype, 2)
    yield converter._unmask_unattended(converter(True).to_4d(padding, 3, dtype, 3), lowest(dtype))
    yield ours._prepare_4d_causal_attention_mask(padding, (2, 3), queries, 0)
    yield ours._prepare_4d_causal_attention_mask_for_sdpa(padding, (2, 3), queries, 0)
    yield ours._prepare_4d_attention_mask(padding, dtype)
    yield ours._prepare_4d_attention_mask_for_sdpa(padding, dtype)
    yield ours._create_4d_causal_attention_mask((2, 3), dtype, "cpu", 1)
    if dtype != torch.float64:
        yield ours._prepare_4d_causal_attention_mask(mask_4d, (2, 3), queries, 0)


@pytest.mark.parametrize("default", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_difference_the_default_dtype_does_not_matter(dtype, default):
    want = list(every_function(dtype))
    with default_dtype(default):
        got = list(every_function(dtype))
    for ours_now, ours_before in zip(got, want, strict=True):
        assert_same_mask(ours_now, ours_before)


def test_difference_a_default_device_does_not_matter():
    """Tensors stay where they are, and 'cpu' means the CPU."""
    mask, queries = torch.tensor([[0, 1, 1]]), embeds(1, 3)
    calls = [
        lambda: ours.AttentionMaskConverter(True, 1).to_4d(mask, 3, FLOAT, 3),
        lambda: ours.AttentionMaskConverter(True).to_causal_4d(1, 3, 3, FLOAT),
        lambda: ours._prepare_4d_attention_mask(mask, FLOAT),
        lambda: ours._prepare_4d_attention_mask_for_sdpa(mask, FLOAT),
        lambda: ours._prepare_4d_causal_attention_mask(mask, (1, 3), queries, 0),
        lambda: ours._prepare_4d_causal_attention_mask(mask[:, None, None], (1, 1), queries, 2),
        lambda: ours._prepare_4d_causal_attention_mask_for_sdpa(mask, (1, 3), queries, 0),
        lambda: ours._create_4d_causal_attention_mask((1, 3), FLOAT, "cpu"),
    ]
    for call in calls:
        want = call()
        with torch.device("meta"):
            got = call()
        assert_same_mask(got, want)


def test_no_device_means_the_default_device(same):
    def under_meta(call):
        def run(module):
            with torch.device("meta"):
                return call(module)

        return run

    same.call(under_meta(lambda m: m.AttentionMaskConverter._make_causal_mask((2, 3), FLOAT, None)))
    same.call(under_meta(lambda m: m._create_4d_causal_attention_mask((2, 3), FLOAT, None)))
    same.call(
        under_meta(lambda m: m.AttentionMaskConverter(True).to_causal_4d(2, 3, 3, FLOAT, None))
    )


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_difference_boolean_4d_masks_say_which_keys_are_seen(dtype):
    """Upstream subtracts them, where torch raises; the result has the dtype of the embeds."""
    seen = torch.tensor([[True, False, True], [False, False, True]])[None, None]
    got = ours._prepare_4d_causal_attention_mask(seen, (1, 2), embeds(1, 2, dtype), 1)
    assert got.dtype == dtype
    assert visibility(got) == [["0-0", "--0"]]


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_difference_unmasking_minus_infinity_gives_no_nan(dtype):
    low = -float("inf")
    mask = torch.tensor([[low, low], [low, 0.0], [0.0, 0.0]], dtype=dtype)
    got = ours.AttentionMaskConverter._unmask_unattended(mask, low)
    assert_same_mask(got, torch.tensor([[-0.0, -0.0], [low, 0.0], [0.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_difference_complex_masks_are_a_type_error(dtype):
    mask = torch.ones(1, 2, dtype=FLOAT).to(dtype)
    zeros = mask - mask
    converter = ours.AttentionMaskConverter
    for call in (
        lambda: converter(True).to_4d(mask, 2, FLOAT, 2),
        lambda: converter._expand_mask(mask, FLOAT),
        lambda: converter._unmask_unattended(mask, 1.0),
        lambda: ours._prepare_4d_attention_mask(mask, FLOAT),
        lambda: ours._prepare_4d_attention_mask_for_sdpa(zeros, FLOAT),
        lambda: ours._prepare_4d_causal_attention_mask(mask, (1, 2), embeds(1, 2), 0),
        lambda: ours._prepare_4d_causal_attention_mask_for_sdpa(zeros, (1, 2), embeds(1, 2), 0),
        lambda: ours._prepare_4d_causal_attention_mask(
            mask[:, None, None], (1, 1), embeds(1, 1), 1
        ),
    ):
        with pytest.raises(TypeError, match=r"(?i)complex"):
            call()


def test_difference_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(every_function(FLOAT))) == 11
        ours.AttentionMaskConverter._ignore_causal_mask_sdpa(None, embeds(1, 2), 0)


# Traced code never skips

ALL_ONES = torch.ones(2, 3)


def sdpa_calls(module):
    """Where eager code returns None, because nothing is masked."""
    return [
        lambda mask, queries: module._prepare_4d_attention_mask_for_sdpa(mask, FLOAT),
        lambda mask, queries: module._prepare_4d_causal_attention_mask_for_sdpa(
            mask, (2, 3), queries, 0
        ),
        lambda mask, queries: module._prepare_4d_causal_attention_mask_for_sdpa(
            None, (2, 3), queries, 0
        ),
    ]


WITHOUT_SKIP = [
    ["000", "000", "000"],
    ["0--", "00-", "000"],
    ["0--", "00-", "000"],
]


def test_eager_code_skips():
    for call in sdpa_calls(ours):
        assert call(ALL_ONES, embeds(2, 3)) is None


@pytest.mark.parametrize("case", range(3))
def test_jit_traced_code_never_skips(case):
    call = sdpa_calls(ours)[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(call, (ALL_ONES, embeds(2, 3)))
    assert visibility(traced(ALL_ONES, embeds(2, 3))) == [WITHOUT_SKIP[case]] * 2


@pytest.mark.parametrize("case", range(3))
def test_compiled_code_never_skips(case):
    torch._dynamo.reset()
    compiled = torch.compile(sdpa_calls(ours)[case], backend="eager", fullgraph=True)
    assert visibility(compiled(ALL_ONES, embeds(2, 3))) == [WITHOUT_SKIP[case]] * 2


@pytest.mark.parametrize("case", range(3))
def test_fake_tensors_never_skip(upstream, case):
    with FakeTensorMode() as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask, queries = mode.from_tensor(ALL_ONES), mode.from_tensor(embeds(2, 3))
        want = sdpa_calls(upstream)[case](mask, queries)
        got = sdpa_calls(ours)[case](mask, queries)
    assert isinstance(got, FakeTensor) and isinstance(want, FakeTensor)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("window", [None, 2, 9])
def test_skip_decisions_of_fake_tensors(same, window, training):
    with FakeTensorMode() as mode:
        mask, queries = mode.from_tensor(ALL_ONES), mode.from_tensor(embeds(2, 3))
        for some, past in itertools.product((None, mask, mask[:, None, None]), (0, 2)):
            same("_ignore_causal_mask_sdpa", some, queries, past, window, training)


def test_skip_decisions_while_symbolically_tracing(upstream):
    decisions = []

    def deciding(module):
        def model(queries):
            decide = module.AttentionMaskConverter._ignore_causal_mask_sdpa
            decisions.append([decide(None, queries, 0), decide(ALL_ONES, queries, 0)])
            return queries

        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (ours, upstream):
            torch.fx.symbolic_trace(deciding(module))
    assert decisions == [[False, False]] * 2


def test_training_still_skips_while_compiling():
    """Only for a mask of None: there the result does not depend on the model's input."""
    torch._dynamo.reset()

    def decide(queries):
        ignore = ours.AttentionMaskConverter._ignore_causal_mask_sdpa
        return ignore(None, queries, 0, None, True), ignore(ALL_ONES, queries, 0, None, True)

    assert torch.compile(decide, backend="eager", fullgraph=True)(embeds(2, 3)) == (True, False)


def test_gradient_passes_through_the_rows_that_stay():
    bias = torch.tensor([[1.0, 2.0], [-5.0, -5.0]], dtype=torch.float64, requires_grad=True)
    unmask = ours.AttentionMaskConverter._unmask_unattended
    unmask(bias, -5.0).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    free = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unmask(x, -5.0), free)


@pytest.mark.parametrize("number", [np.float32(-5.0), np.float64(-5.0), np.int64(-5)])
def test_unmask_unattended_with_a_number_of_numpy(same, number):
    same("_unmask_unattended", torch.tensor([[-5.0, -5.0], [0.0, -5.0]]), number)
