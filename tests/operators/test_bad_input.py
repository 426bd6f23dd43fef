"""Whatever torch.ops.attn_mask is given: the right mask or the right exception, never a crash."""

import warnings

import attn_mask  # noqa: F401 - registers the operators
import pytest
import reference
import torch
from attn_mask.rules import causal
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    COMPLEX_DTYPES,
    FLOAT8_DTYPES,
    INT_DTYPES,
    MASK_DTYPES,
    OUT_DTYPES,
    assert_same_mask,
)
from sample_calls import LEGACY_OPERATORS, operator

ops = torch.ops.attn_mask
FLOAT = torch.float32
HUGE = (2**31, 2**62, 2**63 - 1)

PADDING = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
QUERIES = torch.zeros(2, 3, 5)

PREPARE = ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa")
EXPAND = ("_expand_mask", "_prepare_4d_attention_mask", "_prepare_4d_attention_mask_for_sdpa")

# Every operator that takes a 2D mask, called with nothing else wrong: 3 queries, 4 keys.
MASK_TAKERS = {
    "to_4d": lambda mask: ops.to_4d(mask, 3, dtype=FLOAT, key_value_length=4),
    "to_4d bidirectional": lambda mask: ops.to_4d(mask, 3, dtype=FLOAT, is_causal=False),
    "to_4d one query": lambda mask: ops.to_4d(mask, 1, dtype=FLOAT),
    **{name: lambda mask, name=name: operator(name)(mask, 3, dtype=FLOAT) for name in EXPAND},
    **{name: lambda mask, name=name: operator(name)(mask, (2, 3), QUERIES, 1) for name in PREPARE},
}
MASK_NAMES = {"to_4d": "attention_mask_2d", **dict.fromkeys(EXPAND, "mask")}

every_mask_taker = pytest.mark.parametrize("taker", MASK_TAKERS)


def expecting(taker, got):
    """`operator: expected argument ..., but got ...`; got is a regular expression."""
    name = taker.split()[0]
    argument = MASK_NAMES.get(name, "attention_mask")
    return rf"(?s)^{name}: expected {argument} .*but got .*{got}"


# Rank


@every_mask_taker
@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 4), (2, 1, 1, 3, 4)])
def test_rank_of_the_mask(taker, shape):
    sizes = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=expecting(taker, rf"{len(shape)}-D \[{sizes}\]")):
        MASK_TAKERS[taker](torch.ones(shape))


@pytest.mark.parametrize("taker", ["to_4d", *EXPAND])
def test_4d_where_2d_is_expected(taker):
    with pytest.raises(ValueError, match=expecting(taker, r"4-D \[2, 1, 3, 4\]")):
        MASK_TAKERS[taker](torch.ones(2, 1, 3, 4))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_rank_of_the_embeds_where_their_length_is_read(shape):
    queries = torch.zeros(shape)
    expected = rf"expected inputs_embeds .*but got {len(shape)}-D"
    with pytest.raises(ValueError, match=expected):
        ops._ignore_causal_mask_sdpa(None, queries, 1)
    with pytest.raises(ValueError, match=expected):
        ops._prepare_4d_causal_attention_mask_for_sdpa(None, (2, 3), queries, 1)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)])
def test_length_of_input_ids_shape(shape):
    with pytest.raises(ValueError, match=r"^_make_causal_mask: expected input_ids_shape .*but got"):
        ops._make_causal_mask(shape, dtype=FLOAT)


def test_empty_input_shape():
    with pytest.raises(
        ValueError, match=r"^_create_4d_causal_attention_mask: expected input_shape "
    ):
        ops._create_4d_causal_attention_mask((), dtype=FLOAT)
    for name in PREPARE:
        with pytest.raises(ValueError, match=rf"^{name}: expected input_shape "):
            operator(name)(None, (), QUERIES, 1)


# Dtype


@every_mask_taker
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_complex_masks(taker, dtype):
    with pytest.raises(TypeError, match=expecting(taker, "Complex")):
        MASK_TAKERS[taker](PADDING.to(dtype))


@pytest.mark.parametrize("name", PREPARE)
def test_complex_4d_masks(name):
    mask = torch.ones(2, 1, 3, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match=rf"^{name}: expected attention_mask .*but got .*Complex"):
        operator(name)(mask, (2, 3), QUERIES, 1)


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES, ids=str)
def test_float8_4d_masks_in_the_eager_function(dtype):
    mask = torch.ones(2, 1, 3, 4).to(dtype)
    with pytest.raises(TypeError, match=r"expected a 4-D attention_mask .*but got Float8"):
        ops._prepare_4d_causal_attention_mask(mask, (2, 3), QUERIES, 1)


@pytest.mark.parametrize(
    "dtype", (torch.bool, *INT_DTYPES, *FLOAT8_DTYPES, *COMPLEX_DTYPES), ids=str
)
def test_output_dtype(dtype):
    queries = torch.zeros(2, 3, 5, dtype=dtype)
    calls = {
        "to_causal_4d": lambda: ops.to_causal_4d(2, 3, 4, dtype=dtype),
        "to_4d": lambda: ops.to_4d(PADDING, 3, dtype=dtype, key_value_length=4),
        "_make_causal_mask": lambda: ops._make_causal_mask((2, 3), dtype=dtype),
        "_create_4d_causal_attention_mask": lambda: ops._create_4d_causal_attention_mask(
            (2, 3), dtype=dtype
        ),
        **{name: lambda name=name: operator(name)(PADDING, 3, dtype=dtype) for name in EXPAND},
        **{name: lambda name=name: operator(name)(None, (2, 3), queries, 1) for name in PREPARE},
    }
    for name, call in calls.items():
        argument = "the dtype of inputs_embeds" if name in PREPARE else "dtype"
        with pytest.raises(TypeError, match=rf"^{name}: expected {argument}\b.*but got "):
            call()


@pytest.mark.parametrize(
    ("mask_dtype", "dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.float16, FLOAT),
        (torch.bfloat16, FLOAT),
        (FLOAT, torch.float64),
        (torch.int64, torch.float64),
    ],
    ids=str,
)
def test_4d_masks_that_cannot_hold_the_lowest_number(mask_dtype, dtype):
    mask = torch.ones(2, 1, 3, 4).to(mask_dtype)
    with pytest.raises(ValueError, match=r"^_prepare_4d_causal_attention_mask: expected "):
        ops._prepare_4d_causal_attention_mask(mask, (2, 3), QUERIES.to(dtype), 1)


def test_unmask_unattended_dtypes():
    with pytest.raises(ValueError, match=r"expects a float `expanded_mask`, got a BoolTensor\."):
        ops._unmask_unattended(torch.ones(2, 2, dtype=torch.bool), 0.0)
    for dtype in (*COMPLEX_DTYPES, *FLOAT8_DTYPES, torch.uint16, torch.uint32, torch.uint64):
        with pytest.raises(
            TypeError, match=r"^_unmask_unattended: expected expanded_mask .*but got"
        ):
            ops._unmask_unattended(torch.ones(2, 2).to(dtype), 0.0)
    with pytest.raises(TypeError, match=r"^_unmask_unattended: expected min_dtype .*but got"):
        ops._unmask_unattended(torch.ones(2, 2), 1j)


# Device


@pytest.mark.parametrize("name", [*PREPARE, "_ignore_causal_mask_sdpa"])
@pytest.mark.parametrize(("mask_device", "embeds_device"), [("meta", "cpu"), ("cpu", "meta")])
def test_mixed_devices(name, mask_device, embeds_device):
    mask, queries = PADDING.to(mask_device), QUERIES.to(embeds_device)
    sizes = (queries, 1) if name == "_ignore_causal_mask_sdpa" else ((2, 3), queries, 1)
    expected = (
        rf"^{name}: expected attention_mask to be on the device of inputs_embeds, "
        rf"which is {embeds_device}, but got {mask_device}"
    )
    with pytest.raises(ValueError, match=expected):
        operator(name)(mask, *sizes)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_devices_without_a_kernel(device):
    """Where torch has none either."""
    expected = f"(?i){device}"
    with pytest.raises(NotImplementedError, match=expected):
        ops.to_causal_4d(2, 3, 4, dtype=FLOAT, device=torch.device(device))
    with pytest.raises(NotImplementedError, match=expected):
        ops._make_causal_mask((2, 3), dtype=FLOAT, device=torch.device(device))
    with pytest.raises(NotImplementedError, match=expected):
        ops._create_4d_causal_attention_mask((2, 3), dtype=FLOAT, device=torch.device(device))
    with pytest.raises(NotImplementedError, match=expected):
        ops._block_mask_widths([1], [], 2, 2, 40, 50, 16, 16, device=torch.device(device))


# Sizes


@pytest.mark.parametrize("bad", [-1, -2, -(2**63)])
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("batch_size", lambda n: ops.to_causal_4d(n, 3, 4, dtype=FLOAT)),
        ("query_length", lambda n: ops.to_causal_4d(2, n, 4, dtype=FLOAT)),
        ("key_value_length", lambda n: ops.to_causal_4d(2, 3, n, dtype=FLOAT)),
        ("query_length", lambda n: ops.to_4d(PADDING, n, dtype=FLOAT, key_value_length=4)),
        ("query_length", lambda n: ops.to_4d(PADDING, n, dtype=FLOAT, is_causal=False)),
        ("key_value_length", lambda n: ops.to_4d(PADDING, 3, dtype=FLOAT, key_value_length=n)),
        ("input_ids_shape", lambda n: ops._make_causal_mask((n, 3), dtype=FLOAT)),
        ("input_ids_shape", lambda n: ops._make_causal_mask((2, n), dtype=FLOAT)),
        ("past_key_values_length", lambda n: ops._make_causal_mask((2, 3), n, dtype=FLOAT)),
        ("tgt_len", lambda n: ops._expand_mask(PADDING, n, dtype=FLOAT)),
        ("tgt_len", lambda n: ops._prepare_4d_attention_mask(PADDING, n, dtype=FLOAT)),
        ("tgt_len", lambda n: ops._prepare_4d_attention_mask_for_sdpa(PADDING, n, dtype=FLOAT)),
        ("input_shape", lambda n: ops._create_4d_causal_attention_mask((n, 3), dtype=FLOAT)),
        ("input_shape", lambda n: ops._create_4d_causal_attention_mask((2, n), dtype=FLOAT)),
        (
            "past_key_values_length",
            lambda n: ops._create_4d_causal_attention_mask((2, 3), n, dtype=FLOAT),
        ),
        (
            "past_key_values_length",
            lambda n: ops._ignore_causal_mask_sdpa(None, QUERIES, n),
        ),
        *(
            case
            for prepare in (
                ops._prepare_4d_causal_attention_mask,
                ops._prepare_4d_causal_attention_mask_for_sdpa,
            )
            for case in (
                ("input_shape", lambda n, f=prepare: f(None, (n, 3), QUERIES, 1)),
                ("input_shape", lambda n, f=prepare: f(PADDING, (2, n), QUERIES, 1)),
                ("past_key_values_length", lambda n, f=prepare: f(None, (2, 3), QUERIES, n)),
            )
        ),
    ],
)
def test_negative_sizes(argument, call, bad):
    with pytest.raises(ValueError, match=rf": expected {argument}\b.*but got .*-"):
        call(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: ops.to_causal_4d(n, n, n, dtype=FLOAT),
        lambda n: ops.to_causal_4d(1, n, n, dtype=torch.float16),
        lambda n: ops.to_causal_4d(n, 2**33, 2**33, dtype=FLOAT),
        lambda n: ops._make_causal_mask((1, n), n, dtype=FLOAT),
        lambda n: ops._make_causal_mask((2**33, 2), n, dtype=FLOAT),
        lambda n: ops._create_4d_causal_attention_mask((1, n), dtype=FLOAT),
        lambda n: ops._create_4d_causal_attention_mask((1, n), n, dtype=FLOAT),
        lambda n: ops._expand_mask(PADDING, n, dtype=FLOAT),
        lambda n: ops._prepare_4d_attention_mask(PADDING, n, dtype=FLOAT),
        lambda n: ops._prepare_4d_attention_mask_for_sdpa(PADDING, n, dtype=FLOAT),
        lambda n: ops.to_4d(PADDING, n, dtype=FLOAT, key_value_length=n),
        lambda n: ops.to_4d(PADDING, n, dtype=FLOAT, is_causal=False),
        lambda n: ops._prepare_4d_causal_attention_mask(None, (1, n), QUERIES, n),
        lambda n: ops._prepare_4d_causal_attention_mask(PADDING, (2, 3), QUERIES, n),
        lambda n: ops._prepare_4d_causal_attention_mask_for_sdpa(None, (1, n), QUERIES, n),
    ],
)
@pytest.mark.parametrize("huge", [2**62, 2**63 - 1])
def test_overflowing_sizes(call, huge):
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        call(huge)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("to_causal_4d", lambda: ops.to_causal_4d(2, 3, 2, dtype=FLOAT)),
        ("to_causal_4d", lambda: ops.to_causal_4d(2, 1, 0, dtype=FLOAT)),
        ("to_causal_4d", lambda: ops.to_causal_4d(2, 1, 0, dtype=FLOAT, sliding_window=2)),
        ("to_4d", lambda: ops.to_4d(PADDING, 5, dtype=FLOAT, key_value_length=4)),
    ],
)
def test_fewer_keys_than_queries(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected key_value_length .*but got "):
        call()


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_masks_of_another_length_than_the_keys(length):
    mask = torch.ones(2, length)
    for q_length, window in ((3, None), (3, 2), (1, 2)):
        with pytest.raises(ValueError, match=r"^to_4d: expected attention_mask_2d .*but got "):
            ops.to_4d(mask, q_length, dtype=FLOAT, key_value_length=4, sliding_window=window)
    for name in PREPARE:
        with pytest.raises(ValueError, match=rf"^{name}: expected attention_mask .*but got "):
            operator(name)(torch.zeros(2, length), (2, 3), QUERIES, 1)


def test_4d_masks_of_the_wrong_shape():
    expected = r"Incorrect 4D attention_mask shape: \(2, 1, 3, 3\); expected: \(2, 1, 3, 4\)\."
    with pytest.raises(ValueError, match=expected):
        ops._prepare_4d_causal_attention_mask(torch.ones(2, 1, 3, 3), (2, 3), QUERIES, 1)


# Window and causality


@pytest.mark.parametrize("window", [0, -1, -(2**63)])
def test_windows(window):
    expected = rf"its value is a strictly positive integer, not `{window}`"
    for call in (
        lambda: ops.to_causal_4d(2, 3, 4, dtype=FLOAT, sliding_window=window),
        lambda: ops.to_4d(PADDING, 3, dtype=FLOAT, key_value_length=4, sliding_window=window),
        lambda: ops._make_causal_mask((2, 3), 1, window, dtype=FLOAT),
        lambda: ops._create_4d_causal_attention_mask((2, 3), 1, window, dtype=FLOAT),
        lambda: ops._ignore_causal_mask_sdpa(None, QUERIES, 1, window),
        lambda: ops._prepare_4d_causal_attention_mask(None, (2, 3), QUERIES, 1, window),
        lambda: ops._prepare_4d_causal_attention_mask_for_sdpa(None, (2, 3), QUERIES, 1, window),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_window_without_causality():
    expected = r"Sliding window is currently only implemented for causal masking"
    with pytest.raises(NotImplementedError, match=expected):
        ops.to_4d(PADDING, 3, dtype=FLOAT, is_causal=False, sliding_window=2)


def test_causality_without_key_value_length():
    for options in ({}, {"sliding_window": 2}):
        with pytest.raises(ValueError, match="Make sure to pass `key_value_length`"):
            ops.to_4d(PADDING, 3, dtype=FLOAT, **options)


# Layout


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR, nested and quantized tensors are announced
        return make()


def quantized():
    return torch.quantize_per_tensor(torch.ones(2, 4), 1.0, 0, torch.quint8)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(4), torch.ones(4)], layout=layout)


ODD_LAYOUTS = {
    "sparse coo": lambda: torch.ones(2, 4).to_sparse(),
    "sparse csr": lambda: torch.ones(2, 4).to_sparse_csr(),
    "sparse csc": lambda: torch.ones(2, 4).to_sparse_csc(),
    "sparse bsr": lambda: torch.ones(2, 4).to_sparse_bsr((1, 2)),
    "quantized": quantized,
    "nested strided": lambda: nested(torch.strided),
    "mkldnn": lambda: torch.ones(2, 4).to_mkldnn(),
}


@every_mask_taker
@pytest.mark.parametrize("layout", ODD_LAYOUTS)
def test_layouts_of_the_mask(taker, layout):
    mask = quietly(ODD_LAYOUTS[layout])
    with pytest.raises(TypeError, match=expecting(taker, "")):
        MASK_TAKERS[taker](mask)


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
def test_layouts_elsewhere(layout):
    odd = quietly(ODD_LAYOUTS[layout])
    with pytest.raises(TypeError, match=r"^_unmask_unattended: expected expanded_mask "):
        ops._unmask_unattended(odd, 0.0)
    with pytest.raises(TypeError, match=r"^_ignore_causal_mask_sdpa: expected attention_mask "):
        ops._ignore_causal_mask_sdpa(odd, QUERIES, 0)


def test_jagged_tensors():
    """A Python subclass, whose __torch_dispatch__ runs before any kernel."""
    odd = quietly(lambda: nested(torch.jagged))
    for call in MASK_TAKERS.values():
        with pytest.raises((TypeError, NotImplementedError)):
            call(odd)


# Python types: torch's own parser of arguments refuses these


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.to_causal_4d(2, 3, 4),
        lambda: ops.to_causal_4d("2", 3, 4, dtype=FLOAT),
        lambda: ops.to_causal_4d(2, 3.5, 4, dtype=FLOAT),
        lambda: ops.to_causal_4d(2, 3, None, dtype=FLOAT),
        lambda: ops.to_causal_4d(2, 3, 2**64, dtype=FLOAT),
        lambda: ops.to_causal_4d(2, 3, 4, dtype="float"),
        lambda: ops.to_causal_4d(2, 3, 4, dtype=FLOAT, sliding_window=1.5),
        lambda: ops.to_4d([[1, 1, 1, 1]], 3, dtype=FLOAT, key_value_length=4),
        lambda: ops.to_4d(None, 3, dtype=FLOAT, key_value_length=4),
        lambda: ops.to_4d(PADDING, 3, FLOAT, 4),
        lambda: ops._make_causal_mask("23", dtype=FLOAT),
        lambda: ops._expand_mask(PADDING, "3", dtype=FLOAT),
        lambda: ops._unmask_unattended(torch.ones(2, 2), "low"),
        lambda: ops._unmask_unattended(torch.ones(2, 2), None),
        lambda: ops._ignore_causal_mask_sdpa(None, None, 0),
        lambda: ops._prepare_4d_causal_attention_mask(None, 5.0, QUERIES, 0),
        lambda: ops._prepare_4d_causal_attention_mask(None, (2, 3), None, 0),
    ],
)
def test_python_types(call):
    with pytest.raises((TypeError, RuntimeError)):
        call()


# Unusual, but valid


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_zero_sizes(dtype):
    for batch_size, q_length, kv_length in ((0, 3, 4), (2, 0, 4), (2, 0, 0), (0, 0, 0)):
        shape = (batch_size, 1, q_length, kv_length)
        padding = torch.ones(batch_size, kv_length)
        queries = torch.zeros(batch_size, q_length, 2, dtype=dtype)
        past = kv_length - q_length
        for mask in (
            ops.to_causal_4d(batch_size, q_length, kv_length, dtype=dtype, sliding_window=2),
            ops.to_4d(padding, q_length, dtype=dtype, key_value_length=kv_length),
            ops._make_causal_mask((batch_size, q_length), past, dtype=dtype),
            ops._expand_mask(padding, q_length, dtype=dtype),
            ops._prepare_4d_causal_attention_mask(padding, (batch_size, q_length), queries, past),
            ops._unmask_unattended(torch.zeros(shape, dtype=dtype), 0.0),
        ):
            assert (mask.shape, mask.dtype) == (shape, dtype)
    for shape in ((0,), (3, 0), (0, 3)):
        assert ops._unmask_unattended(torch.zeros(shape, dtype=dtype), 0.0).shape == shape


def test_huge_windows():
    for window in HUGE:
        for past in (0, 3):
            got = ops.to_causal_4d(1, 3, 3 + past, dtype=FLOAT, sliding_window=window)
            assert_same_mask(got, reference.to_causal_4d(1, 3, 3 + past, dtype=FLOAT))


def test_huge_batch_of_one_copy():
    """The batch of a causal mask costs nothing, however large."""
    got = ops.to_causal_4d(2**40, 2, 3, dtype=FLOAT)
    assert got.shape == (2**40, 1, 2, 3)
    assert_same_mask(got[-1:], reference.to_causal_4d(1, 2, 3, dtype=FLOAT))


# Anything at all

# Far too large, or small enough to be built: nothing between that would only exhaust the memory.
SIZES = st.one_of(st.integers(0, 5), st.sampled_from((-(2**63), -7, -1, 2**62, 2**63 - 1)))
SMALL = st.integers(0, 5)
WINDOWS = st.one_of(st.none(), st.sampled_from((-(2**63), -1, 0, 1, 2, 3, 2**62, 2**63 - 1)))
ANY_DTYPE = st.sampled_from((*MASK_DTYPES, *COMPLEX_DTYPES))
MOSTLY_OUT_DTYPE = st.one_of(st.sampled_from(OUT_DTYPES), st.sampled_from(OUT_DTYPES), ANY_DTYPE)


@st.composite
def tensors(draw, rank=None):
    """Any rank, dtype, device and layout, mostly a plain one with small sizes."""
    shape = draw(
        st.lists(st.integers(0, 4), max_size=5 if rank is None else rank, min_size=rank or 0)
    )
    dtype = draw(st.one_of(st.sampled_from((torch.int64, FLOAT)), ANY_DTYPE))
    seed = draw(st.integers(0, 2**16))
    values = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).clamp(max=1)
    if draw(st.integers(0, 3)) == 0:
        values.fill_(1)
    tensor = values.to(dtype)
    kind = draw(st.sampled_from(("plain",) * 6 + ("transposed", "meta", "sparse", "odd")))
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse":
        return values.to_sparse()
    if kind == "odd":
        return quietly(ODD_LAYOUTS[draw(st.sampled_from(sorted(ODD_LAYOUTS)))])
    return tensor


@st.composite
def some_embeds(draw, batch_size, q_length):
    if draw(st.integers(0, 5)) == 0:
        return draw(tensors())
    device = draw(st.sampled_from(("cpu", "cpu", "cpu", "meta")))
    return torch.zeros(batch_size, q_length, 2, device=device).to(draw(MOSTLY_OUT_DTYPE))


def mask_2d(draw):
    return draw(st.one_of(tensors(rank=2), tensors(rank=2), tensors()))


@st.composite
def any_calls(draw):
    name = draw(st.sampled_from(LEGACY_OPERATORS))
    if name == "to_causal_4d":
        args = (draw(SIZES), draw(SIZES), draw(SIZES))
        options = {"sliding_window": draw(WINDOWS)}
    elif name == "to_4d":
        args = (mask_2d(draw), draw(SIZES))
        options = {
            "key_value_length": draw(st.one_of(st.none(), SIZES)),
            "is_causal": draw(st.booleans()),
            "sliding_window": draw(WINDOWS),
        }
    elif name in ("_make_causal_mask", "_create_4d_causal_attention_mask"):
        args = (draw(st.lists(SIZES, min_size=1, max_size=3)), draw(SIZES), draw(WINDOWS))
        options = {}
    elif name in EXPAND:
        args = (mask_2d(draw), draw(st.one_of(st.none(), SIZES)))
        options = {}
    elif name == "_unmask_unattended":
        return name, (draw(tensors()), draw(st.sampled_from((0, 1, 1.0, -65504.0, True)))), {}
    elif name == "_is_all_visible":
        return name, (draw(tensors()),), {}
    elif name == "_ignore_causal_mask_sdpa":
        mask = draw(st.one_of(st.none(), tensors()))
        queries, past = draw(some_embeds(draw(SMALL), draw(SMALL))), draw(SIZES)
        return name, (mask, queries, past, draw(WINDOWS), draw(st.booleans())), {}
    else:
        plain_shape = (draw(SMALL), draw(SMALL))
        queries = draw(some_embeds(*plain_shape))
        shape = draw(st.one_of(st.just(plain_shape), st.lists(SIZES, max_size=3)))
        past = draw(SIZES)
        kv_length = shape[-1] + past if shape else past
        fitting = [n for n in (shape[0] if shape else 0, kv_length) if 0 <= n <= 10]
        mask = None
        if draw(st.booleans()):
            plain = torch.ones(fitting if len(fitting) == 2 else (2, 2))
            mask = draw(st.one_of(st.just(plain), tensors()))
        return name, (mask, shape, queries, past, draw(WINDOWS)), {}
    return name, args, {**options, "dtype": draw(MOSTLY_OUT_DTYPE)}


def is_small(tensor):
    return tensor.numel() <= 2000 and max(tensor.shape, default=0) <= 50


@settings(max_examples=1500)
@given(any_calls())
def test_any_call_gives_the_mask_or_an_exception(call):
    name, args, kwargs = call
    try:
        got = operator(name)(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert str(error)
        return
    if any(isinstance(arg, torch.Tensor) and arg.is_meta for arg in args):
        return
    if not isinstance(got, torch.Tensor):
        assert got is getattr(reference, name)(*args, **kwargs)
    elif is_small(got):
        assert_same_mask(got, getattr(reference, name)(*args, **kwargs))


def test_no_tensor_to_write_to():
    for call, name in (
        (lambda: ops.to_4d(PADDING, 3, dtype=FLOAT, key_value_length=4, out=None), "to_4d"),
        (lambda: ops.to_causal_4d(2, 3, 4, out=None), "to_causal_4d"),
        (lambda: ops._unmask_unattended(QUERIES, 0.0, out=None), "_unmask_unattended"),
        (lambda: ops.boolean(*causal().encode(), 1, 3, 3, out=None), "boolean"),
        (lambda: ops.additive(*causal().encode(), 1, 3, 3, out=None), "additive"),
    ):
        with pytest.raises(
            TypeError, match=f"^{name}: expected out to be a tensor, but got an undefined one"
        ):
            call()


@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
def test_a_minimum_that_fits_into_no_int64(dtype):
    if dtype in (torch.uint16, torch.uint32, torch.uint64):
        error, text = TypeError, "expected expanded_mask to be of a real floating or integer dtype"
    else:
        error, text = (
            ValueError,
            "expected min_dtype to fit into 64 bits with a sign, but got 92233",
        )
    with pytest.raises(error, match=f"^_unmask_unattended: {text}"):
        ops._unmask_unattended(torch.zeros(2, 2, dtype=dtype), 2**63)


def test_a_masked_value_that_fits_into_no_int64():
    with pytest.raises(
        ValueError, match=r"^additive: expected masked_value to be at most 0, but got 9"
    ):
        ops.additive(*causal().encode(), 1, 3, 3, dtype=FLOAT, masked_value=2**63)
