"""torch.ops.attn_mask against the cell-by-cell loops of reference.py, without transformers."""

import itertools

import attn_mask  # noqa: F401 - registers the operators
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    LAYOUTS,
    MASK_DTYPES,
    OUT_DTYPES,
    assert_same_mask,
    has_distinct_memory,
    lowest,
)
from sample_calls import LEGACY_OPERATORS, ONES, PADDING, SAMPLES, operator

FLOAT = torch.float32


def check(name, *args, **kwargs):
    """Runs the operator and the loops; both are a mask, a bool or None."""
    __tracebackhide__ = True
    got = operator(name)(*args, **kwargs)
    want = getattr(reference, name)(*args, **kwargs)
    if isinstance(want, bool):
        assert got is want
    else:
        assert_same_mask(got, want)
    return got


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(name, *call) for name in LEGACY_OPERATORS for call in SAMPLES[name]],
)
def test_sample(name, args, kwargs):
    check(name, *args, **kwargs)


def test_the_reference_itself():
    """Two masks written out by hand: 2 queries after 2 keys, a window of 1, one key padded."""
    low = lowest(FLOAT)
    want = torch.tensor([[[[low, 0.0, 0.0, low], [low, low, 0.0, 0.0]]]])
    assert_same_mask(
        reference.to_causal_4d(1, 2, 4, dtype=FLOAT, sliding_window=1),
        want,
    )
    want[..., 2] = low
    padding = torch.tensor([[1, 1, 0, 1]])
    assert_same_mask(reference.to_4d(padding, 2, dtype=FLOAT, sliding_window=1), want)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 2**31, 2**63 - 1])
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_causal_masks(dtype, window):
    for batch_size, q_length, past in itertools.product(range(4), range(6), range(5)):
        kv_length, shape = q_length + past, (batch_size, q_length)
        options = {"dtype": dtype, "sliding_window": window}
        masks = [
            check("to_causal_4d", batch_size, q_length, kv_length, **options),
            check("_make_causal_mask", shape, past, window, dtype=dtype),
            check("_create_4d_causal_attention_mask", shape, past, window, dtype=dtype),
            check(
                "_prepare_4d_causal_attention_mask",
                None,
                shape,
                torch.zeros(*shape, 2, dtype=dtype),
                past,
                window,
            ),
        ]
        for mask in masks:
            # One copy of the rows serves the whole batch.
            if mask is not None and batch_size > 1:
                assert mask.stride(0) == 0
                assert has_distinct_memory(mask[:1])


@pytest.mark.parametrize("window", [None, 1, 3, 2**63 - 1])
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_padded_masks(dtype, window):
    for kv_length in range(6):
        patterns = list(itertools.product((0, 1), repeat=kv_length))
        padding = torch.tensor(patterns).reshape(len(patterns), kv_length)
        for q_length in range(kv_length + 1):
            mask = check(
                "to_4d",
                padding,
                q_length,
                dtype=dtype,
                key_value_length=kv_length,
                sliding_window=window,
            )
            # Dense, so that a row can be changed without changing another one.
            assert mask.is_contiguous()
            queries = torch.zeros(len(padding), q_length, 2, dtype=dtype)
            for name in (
                "_prepare_4d_causal_attention_mask",
                "_prepare_4d_causal_attention_mask_for_sdpa",
            ):
                for rows in (padding, padding[-1:]):
                    shape, past = (len(rows), q_length), kv_length - q_length
                    check(name, rows, shape, queries[: len(rows)], past, window)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_small_bidirectional_masks(dtype):
    for kv_length, q_length in itertools.product(range(5), range(5)):
        patterns = list(itertools.product((0, 1), repeat=kv_length))
        padding = torch.tensor(patterns).reshape(len(patterns), kv_length)
        assert check("_expand_mask", padding, q_length, dtype=dtype).is_contiguous()
        check("to_4d", padding, q_length, dtype=dtype, is_causal=False)
        check("_prepare_4d_attention_mask", padding, q_length, dtype=dtype)
        for allow_skip, rows in itertools.product((True, False), (padding, padding[-1:])):
            check(
                "_prepare_4d_attention_mask_for_sdpa",
                rows,
                q_length,
                dtype=dtype,
                allow_skip=allow_skip,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_layouts_and_dtypes(mask_dtype, layout):
    padding = LAYOUTS[layout](PADDING.to(mask_dtype))
    for dtype in OUT_DTYPES:
        check("to_4d", padding, 4, dtype=dtype, sliding_window=2, key_value_length=5)
        check("_expand_mask", padding, 2, dtype=dtype)


@settings(max_examples=100)
@given(
    st.sampled_from(OUT_DTYPES),
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(0, 2**31),
)
def test_larger_masks(dtype, batch_size, q_length, past, window, seed):
    kv_length = q_length + past
    check("to_causal_4d", batch_size, q_length, kv_length, dtype=dtype, sliding_window=window)
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, 2, (batch_size, kv_length), generator=generator)
    check(
        "to_4d",
        padding,
        q_length,
        dtype=dtype,
        key_value_length=kv_length,
        sliding_window=window,
    )


@settings(max_examples=150)
@given(
    st.sampled_from((*OUT_DTYPES, torch.int8, torch.int64)),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(0, 2**31),
)
def test_unmask_unattended(dtype, shape, layout, seed):
    values = [lowest(dtype), 0.0, -0.0, 5.0] if dtype.is_floating_point else [-7, 0, 0, 5]
    picks = torch.randint(5, shape, generator=torch.Generator().manual_seed(seed)).sub(2).clamp(0)
    mask = torch.tensor(values, dtype=dtype)[picks]
    if mask.dim() and mask.numel():
        mask = LAYOUTS[layout](mask)
    got = check("_unmask_unattended", mask, values[0])
    assert has_distinct_memory(got)


def test_unmask_unattended_writes_minus_zero():
    low = lowest(FLOAT)
    mask = torch.tensor([[low, low], [0.0, low]])
    got = torch.ops.attn_mask._unmask_unattended(mask, low)
    assert_same_mask(got, torch.tensor([[-0.0, -0.0], [0.0, low]]))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 6])
def test_skip_decisions(window):
    for q_length, past in itertools.product(range(4), range(4)):
        kv_length, queries = q_length + past, torch.zeros(2, q_length, 3)
        for mask in (
            None,
            torch.ones(2, kv_length),
            torch.ones(2, kv_length, dtype=torch.bool),
            torch.zeros(2, kv_length),
            torch.ones(2, 1, q_length, kv_length),
        ):
            check("_ignore_causal_mask_sdpa", mask, queries, past, window)
            if mask is None or mask.dim() == 2:
                for allow_skip in (True, False):
                    check(
                        "_prepare_4d_causal_attention_mask_for_sdpa",
                        mask,
                        (2, q_length),
                        queries,
                        past,
                        window,
                        allow_skip=allow_skip,
                    )


def test_one_value_apart_from_one_is_enough_not_to_skip():
    queries = torch.zeros(2, 5, 3)
    assert torch.ops.attn_mask._ignore_causal_mask_sdpa(ONES, queries, 0)
    for place in itertools.product(range(2), range(5)):
        mask = ONES.clone()
        mask[place] = 2
        assert not torch.ops.attn_mask._ignore_causal_mask_sdpa(mask, queries, 0)


@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [
        pytest.param(dtype, mask_dtype, id=f"{dtype}-{mask_dtype}")
        for dtype in (torch.float16, torch.bfloat16)
        for mask_dtype in (torch.int64, torch.uint8, *OUT_DTYPES)
        # The lowest bfloat16 is no float16: test_bad_input.py.
        if (dtype, mask_dtype) != (torch.bfloat16, torch.float16)
    ],
)
def test_4d_masks(dtype, mask_dtype):
    values = torch.tensor([[[[0, 1, 1], [1, 2, 0]]]]).to(mask_dtype)
    queries = torch.zeros(1, 2, 3, dtype=dtype)
    check("_prepare_4d_causal_attention_mask", values, (1, 2), queries, 1)
    got = check("_prepare_4d_causal_attention_mask_for_sdpa", values, (1, 2), queries, 1)
    assert got is not values
    assert got.data_ptr() != values.data_ptr()
