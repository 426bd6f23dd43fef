"""Attention by a rule, compared with a softmax in float64 over the dense mask."""

import math

import attn_mask
import pytest
import rule_reference
import torch
from attn_mask import (
    bidirectional,
    bits,
    blockwise,
    causal,
    chunked,
    documents,
    masking_utils,
    nothing,
    padding,
    scaled_dot_product_attention,
    sliding_window,
    window,
)
from attn_mask._core import log_once
from attn_mask.rules import function, reindex, shift, union
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_reference import calls
from torch.nn import functional as F

ops = torch.ops.attn_mask

TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float64: 1e-9,
}


def softmax_in_float64(query, key, value, visible, scale=None):
    """(out, log-sum-exp) of the definition, one tensor of scores."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    times = query.shape[1] // max(1, key.shape[1])
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.mT * scale).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1).masked_fill(lse[..., None] == -math.inf, 0)
    return weights @ value, lse


def inputs(
    batch_size, heads, key_heads, q_length, kv_length, width=16, dtype=torch.float32, of_value=None
):
    """(query, key, value), which require a gradient."""
    keys = key_heads, kv_length
    shapes = (heads, q_length, width), (*keys, width), (*keys, of_value or width)
    return [torch.randn(batch_size, *shape, dtype=dtype).requires_grad_() for shape in shapes]


def assert_close(got, want, tolerance):
    """Within a tolerance for results, which is four times that, and relative, for gradients."""
    assert (got - want).abs().max() <= tolerance if want.numel() else got.shape == want.shape


def check(rule, tensors, visible, **options):
    """Compares result, log-sum-exp and gradients with the softmax in float64."""
    dtype = tensors[0].dtype
    tolerance = TOLERANCE[dtype]
    out, lse = scaled_dot_product_attention(*tensors, rule, return_lse=True, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want, want_lse = softmax_in_float64(*exact, visible, options.get("scale"))
    assert out.dtype == dtype and out.shape == want.shape
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, want, tolerance)
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    assert_close(lse.nan_to_num(neginf=0), want_lse.nan_to_num(neginf=0), 10 * tolerance)
    without_key = want_lse == -math.inf
    assert not out[without_key].any()
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, grad)
    expected = torch.autograd.grad(want, exact, grad.double())
    for one, other, tensor in zip(got, expected, tensors, strict=True):
        assert one.dtype == tensor.dtype
        assert_close(
            one, other, 4 * tolerance * (1 + float(other.abs().max() if other.numel() else 0))
        )
    assert not got[0][without_key].any()


N = 300
IDS = torch.tensor([[0] * 13 + [1] * 150 + [2] * 7 + [3] * 130, [5] * 150 + [6] * 150])
LEFT, RIGHT = torch.ones(2, N, dtype=torch.bool), torch.ones(2, N, dtype=torch.bool)
LEFT[0, :40] = False
RIGHT[1, 250:] = False
HOLES = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) > 0.3
POSITIONS = torch.cat([torch.arange(100), torch.arange(200)])[None]

RULES = {
    "causal": causal(),
    "bidirectional": bidirectional(),
    "nothing": nothing(),
    "window": causal() & sliding_window(40),
    "window of both sides": window(60, 20),
    "later keys": window(None, 20),
    "chunks": causal() & chunked(77),
    "chunks after padding": chunked(64, torch.tensor([3, 0])),
    "documents": causal() & documents(IDS),
    "whole documents": documents(IDS),
    "equal documents": causal() & documents(torch.arange(N) // 50),
    "short documents": documents(torch.arange(N) // 5),
    "documents that come again": causal() & documents(torch.arange(N) // 30 % 4),
    "blocks": causal() | blockwise(IDS - 1),
    "padded left": causal() & padding(LEFT),
    "padded right": causal() & padding(RIGHT),
    "padded both": padding(LEFT) & padding(RIGHT) & sliding_window(50),
    "holes": causal() & padding(HOLES),
    "holes for some": causal() & (sliding_window(20) | padding(HOLES)),
    "no key for one": padding(HOLES & torch.tensor([[True], [False]])),
    "bits": bits(torch.rand(2, 4, N, N, generator=torch.Generator().manual_seed(2)) > 0.5),
    "reindexed": reindex(causal() & sliding_window(30), POSITIONS),
    "shifted": shift(causal(), 7, 0),
    "more than kernels take": union(*[shift(causal(), 0, 9), padding(HOLES)] * 15),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_softmax_in_float64(name, dtype):
    torch.manual_seed(0)
    rule = RULES[name]
    tensors = inputs(2, 4, 2, N, N, dtype=dtype)
    check(rule, tensors, attn_mask.boolean(rule, 2, N, N), enable_gqa=True)


@pytest.mark.parametrize("name", [name for name in RULES if name != "bits"])
@pytest.mark.parametrize("q_length", [1, 70])
def test_queries_after_a_cache(name, q_length):
    rule = RULES[name]
    tensors = inputs(2, 2, 2, q_length, N)
    visible = attn_mask.boolean(rule, 2, q_length, N, q_offset=N - q_length)
    check(rule, tensors, visible)


@settings(max_examples=150)
@given(call=calls(depth=3), seed=st.integers(0, 99))
def test_random_programs(call, seed):
    """As operators take them, with positions of all kinds; the reference says what is visible."""
    torch.manual_seed(seed)
    visible = rule_reference.boolean(*call.args, **call.positions)
    heads = 2 if visible.shape[1] == 1 else visible.shape[1]
    tensors = [
        torch.randn(call.batch_size, heads, length, 8).requires_grad_()
        for length in (call.q_length, call.kv_length, call.kv_length)
    ]
    out, lse = ops.scaled_dot_product_attention(
        call.rule, call.operands, *tensors, **call.positions
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want, want_lse = softmax_in_float64(*exact, visible)
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    assert_close(out, want, TOLERANCE[torch.float32])
    grads = torch.autograd.grad(out.sum(), tensors)
    for got, expected in zip(grads, torch.autograd.grad(want.sum(), exact), strict=True):
        assert_close(got, expected, 1e-4)


@given(
    batch_size=st.integers(1, 3),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    q_length=st.integers(0, 40),
    kv_length=st.integers(0, 40),
    offset=st.integers(0, 12),
    size=st.integers(1, 30),
    width=st.sampled_from([1, 8, 12]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_shapes(
    batch_size, groups, key_heads, q_length, kv_length, offset, size, width, transposed, data
):
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=60, max_size=60)))
    shown = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=60, max_size=60)), dtype=torch.bool
    )
    rule = data.draw(
        st.sampled_from(
            [
                causal(),
                causal() & sliding_window(size),
                window(size, 3),
                causal() & chunked(size),
                causal() & documents(ids.sort().values),
                documents(ids) & padding(shown),
                causal() & padding(shown),
                sliding_window(size) | blockwise(ids - 1),
                reindex(causal(), ids),
            ]
        )
    )
    tensors = inputs(batch_size, groups * key_heads, key_heads, q_length, kv_length, width)
    if transposed:
        tensors = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in tensors]
    visible = attn_mask.boolean(rule, batch_size, q_length, kv_length, q_offset=offset)
    scale = data.draw(st.sampled_from([None, 0.3]))
    check(rule, tensors, visible, q_offset=offset, enable_gqa=True, scale=scale)


def test_callables_are_called_by_tiles():
    calls = []

    def odd(batch_idx, head_idx, q_idx, kv_idx):
        calls.append(q_idx.shape)
        return (q_idx - kv_idx + head_idx) % 2 == 1

    tensors = inputs(2, 4, 2, 600, 600, 8)
    q_idx, kv_idx = torch.arange(600)[:, None], torch.arange(600)
    visible = (q_idx - kv_idx + torch.arange(4)[:, None, None]) % 2 == 1
    rule = causal() & odd
    check(rule, tensors, visible & (kv_idx <= q_idx), enable_gqa=True)
    assert len(calls) > 2 and max(shape[-2] for shape in calls) < 600


@pytest.mark.parametrize("offset", [torch.tensor(3), torch.tensor([[3], [0]])])
def test_offsets_in_tensors(offset):
    tensors = inputs(2, 2, 2, 20, 30)
    rule = causal() & sliding_window(9)
    visible = attn_mask.boolean(rule, 2, 20, 30, q_offset=offset)
    check(rule, tensors, visible, q_offset=offset)


@pytest.mark.parametrize("name", ["causal", "window", "holes", "nothing", "bits"])
def test_values_of_another_width(name):
    rule = RULES[name]
    check(
        rule, inputs(2, 4, 2, N, N, of_value=5), attn_mask.boolean(rule, 2, N, N), enable_gqa=True
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[400] * 3, [300, 512, 257, 131]])
def test_documents_of_some_hundred_tokens(lengths, dtype):
    torch.manual_seed(0)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rule = causal() & documents(ids)
    tensors = inputs(1, 4, 2, len(ids), len(ids), dtype=dtype)
    check(rule, tensors, attn_mask.boolean(rule, 1, len(ids), len(ids)), enable_gqa=True)


def test_one_call_is_torchs():
    query, key, value = (tensor.detach() for tensor in inputs(1, 2, 2, 50, 50))
    got = scaled_dot_product_attention(query, key, value, causal())
    assert torch.equal(got, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    got = scaled_dot_product_attention(query[:, :, :1], key, value, causal())
    assert torch.equal(got, F.scaled_dot_product_attention(query[:, :, :1], key, value))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", [causal() & documents(IDS[:1]), documents(IDS[:1] % 3)])
def test_documents_do_not_see_each_other(dtype, rule):
    """Not a bit of a document changes with another's tokens."""
    tensors = [tensor.detach() for tensor in inputs(1, 2, 2, N, N, dtype=dtype)]
    other = [tensor.clone() for tensor in tensors]
    changed = IDS[0] == 1
    for tensor in other:
        tensor[:, :, changed] = torch.randn_like(tensor[:, :, changed]) * 50
    kept = IDS[0] % 3 != 1
    got, want = (scaled_dot_product_attention(*of, rule)[:, :, kept] for of in (tensors, other))
    assert torch.equal(got, want)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=12),
    rule=st.sampled_from(
        [
            bidirectional(),
            causal(),
            causal() & sliding_window(1),
            causal() & sliding_window(8),
            window(3, 3),
            causal() & chunked(7),
        ]
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    of_value=st.sampled_from([None, 5]),
    number=st.sampled_from([math.nan, math.inf]),
    data=st.data(),
)
def test_nan_of_other_documents(lengths, rule, dtype, of_value, number, data):
    """Neither results nor gradients of a document change where another holds NaN."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tensors = inputs(1, 2, 2, len(ids), len(ids), 8, dtype, of_value)
    tensors.append(torch.randn_like(tensors[2]))
    other = ids == data.draw(st.integers(0, len(lengths) - 1))
    results = []
    for spoilt in (False, True):
        *of, grad = (tensor.detach().clone() for tensor in tensors)
        if spoilt:
            for tensor in (*of, grad):
                tensor[:, :, other] = number
        of = [tensor.requires_grad_() for tensor in of]
        result = scaled_dot_product_attention(*of, rule & documents(ids), return_lse=True)
        of_lse = grad.amax(-1).to(result[1].dtype)
        results.append([*result, *torch.autograd.grad(result, of, (grad, of_lse))])
    for want, got in zip(*results, strict=True):
        assert torch.equal(want[:, :, ~other], got[:, :, ~other])


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, -0.0, 1e-30, 40.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "whole documents", "holes", "bidirectional"])
def test_scales(name, dtype, scale):
    """Kernels mask before they scale: 0 and negative ones would give NaN."""
    torch.manual_seed(0)
    tensors = inputs(2, 4, 2, N, N, dtype=dtype)
    with torch.no_grad():
        tensors[0] /= max(1, abs(scale))
    check(
        RULES[name], tensors, attn_mask.boolean(RULES[name], 2, N, N), enable_gqa=True, scale=scale
    )


def test_nan_beyond_what_tiles_read():
    tensors = [tensor.detach() for tensor in inputs(1, 2, 2, 2000, 2000)]
    rule = causal() & sliding_window(100)
    want = scaled_dot_product_attention(*tensors, rule)
    for tensor in tensors[1:]:
        tensor[:, :, :500] = math.nan
    got = scaled_dot_product_attention(*tensors, rule)
    assert torch.equal(got[:, :, 1000:], want[:, :, 1000:])


def test_gradient_for_some():
    query, key, value = inputs(1, 2, 2, 70, 70)
    rule = causal() & sliding_window(20)
    whole = torch.autograd.grad(
        scaled_dot_product_attention(query, key, value, rule).sum(), (query, key, value)
    )
    out = scaled_dot_product_attention(query.detach(), key, value.detach(), rule)
    assert torch.equal(torch.autograd.grad(out.sum(), key)[0], whole[1])


def test_expanded_inputs():
    query, key, value = (tensor.detach() for tensor in inputs(1, 1, 1, 40, 40))
    rule = causal() & sliding_window(7)
    got = scaled_dot_product_attention(
        *(tensor.expand(3, 2, 40, 16) for tensor in (query, key, value)), rule
    )
    assert torch.equal(got, scaled_dot_product_attention(query, key, value, rule).expand_as(got))


GOOD = dict(zip(("query", "key", "value"), inputs(2, 4, 2, 6, 8), strict=True))
NAME = "scaled_dot_product_attention: expected "


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"query": 3}, TypeError, "query to be a tensor, but got int"),
        ({"query": GOOD["query"][0]}, ValueError, r"query to be 4-D .* but got 3-D \[4, 6, 16\]"),
        ({"query": GOOD["query"].to_sparse()}, TypeError, "query to be a strided tensor"),
        ({"query": GOOD["query"].int()}, TypeError, "query to be float16, bfloat16, .*Int"),
        ({"key": GOOD["key"].half()}, TypeError, "key to be of the dtype of query"),
        ({"key": GOOD["key"][:1]}, ValueError, "key to have the batch size of query, which is 2"),
        ({"key": GOOD["key"].to("meta")}, ValueError, "key to be on"),
        ({"key": GOOD["key"][..., :8]}, ValueError, "key to have the head size of query"),
        ({"value": GOOD["value"][:, :, :7]}, ValueError, "value to have as many heads and keys"),
        ({"value": GOOD["value"][:, :1]}, ValueError, "value to have as many heads and keys"),
        ({"query": GOOD["query"][:, :3]}, ValueError, "key to have heads whose number divides"),
        ({"enable_gqa": False}, ValueError, "key to have the heads of query, which are 4 "),
        ({"enable_gqa": 1}, TypeError, "enable_gqa to be a bool"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p to be 0"),
        ({"dropout_p": torch.zeros(2)}, TypeError, "dropout_p to be a number, but got Tensor"),
        ({"scale": "1"}, TypeError, "scale to be a number or None, but got str"),
        ({"rule": None}, TypeError, "rule to be callable, but got NoneType"),
        ({"q_offset": 1.5}, TypeError, "q_offset to be an int"),
        ({"q_offset": -1}, ValueError, "q_offset not to be negative"),
        ({"kv_offset": -1}, ValueError, "kv_offset not to be negative"),
        (
            {"key": GOOD["key"][:, :, :5], "value": GOOD["value"][:, :, :5]},
            ValueError,
            "q_offset where there are more queries than keys, but got 6 queries, 5 keys",
        ),
        ({"q_offset": torch.zeros(3)}, ValueError, "q_offset to be an int, or a tensor"),
    ],
)
def test_bad_input(changed, error, text):
    arguments = {**GOOD, "rule": causal(), "enable_gqa": True, **changed}
    with pytest.raises(error, match=NAME + text):
        scaled_dot_product_attention(**arguments)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (documents(torch.zeros(3, dtype=torch.int64)), "documents: expected ids to be of length 8"),
        (padding(torch.ones(3, 8)), "padding: expected mask to have 1 or 2 rows"),
        (bits(torch.ones(1, 3, 6, 8, dtype=torch.bool)), "bits operands to have 1 or 4 heads"),
    ],
)
def test_rules_that_do_not_fit(rule, text):
    with pytest.raises(ValueError, match=text):
        scaled_dot_product_attention(*GOOD.values(), rule, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_attend(sizes):
    batch_size, heads, q_length, kv_length = sizes
    tensors = inputs(batch_size, heads, heads, q_length, kv_length)
    out, lse = scaled_dot_product_attention(*tensors, causal(), return_lse=True)
    assert out.shape == tensors[0].shape and not out.any() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(not grad.any() for grad in grads)


def test_limits_of_documents_change_nothing_on_the_cpu():
    query, key, value = inputs(1, 2, 2, N, N)
    rules = [documents(IDS[:1]), documents(IDS[:1], max_documents=4, max_length=150)]
    first, second = (scaled_dot_product_attention(query, key, value, rule) for rule in rules)
    assert torch.equal(first, second)
    assert repr(rules[0]) == repr(rules[1]) and rules[0] != rules[1]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            {"max_documents": 3},
            "max_documents and max_length, or neither of them, but got no max_l",
        ),
        ({"max_length": 3}, "max_documents and max_length, or neither of them, but got no max_d"),
        ({"max_documents": 0, "max_length": 3}, "max_documents to be positive, but got 0"),
    ],
)
def test_limits_that_are_none(limits, text):
    with pytest.raises(ValueError, match="documents: expected " + text):
        documents(IDS, **limits)
    rule, operands = causal().encode()
    with pytest.raises(ValueError, match=NAME + text.partition(", but")[0]):
        query = GOOD["query"].detach()
        ops.scaled_dot_product_attention(rule, operands, query, query, query, **limits)


def test_autocast():
    """As torch's own: inputs become of its dtype."""
    tensors = [tensor.detach() for tensor in inputs(1, 2, 2, 20, 20)]
    low = [tensor.bfloat16() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        got = scaled_dot_product_attention(tensors[0], *low[1:], causal())
        want = F.scaled_dot_product_attention(*tensors, is_causal=True)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_positions_before_a_table():
    rule = shift(documents(torch.arange(30) // 7), -5, -5)
    with pytest.raises(ValueError, match=f"documents: .* from 0 on, .*{NAME[:-11]} begin at -5"):
        scaled_dot_product_attention(*inputs(1, 2, 2, 20, 20), rule)


def test_mask_functions_of_transformers_count_from_the_end():
    """Of their tables, as in the mask of the same function."""
    rule = shift(masking_utils.padding_mask_function(HOLES), -5, -5)
    check(rule, inputs(2, 2, 2, 20, 20), attn_mask.boolean(rule, 2, 20, 20))


def test_a_mask_function_is_named_once(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_named", set())
    query, key, value = inputs(1, 1, 1, 4, 4)
    for _ in range(2):
        scaled_dot_product_attention(query, key, value, lambda b, h, q, k: q >= k)
    (record,) = (record for record in caplog.records if record.name == "attn_mask")
    assert record.getMessage().startswith(
        "scaled_dot_product_attention: calls a mask function that is no"
    )


@pytest.mark.parametrize("rule", [causal(), lambda b, h, q, k: q >= k], ids=["rule", "function"])
@pytest.mark.parametrize(("q_length", "kv_length"), [(1, 2**62), (2**31, 3), (2**31, 2**31)])
def test_lengths_without_end(rule, q_length, kv_length):
    """They are refused at once, whatever is given beside them."""
    query, key = (
        torch.zeros(1, 1, 1, 1).expand(1, 1, length, 1) for length in (q_length, kv_length)
    )
    text = f"expected fewer than 2\\^31 queries and keys, but got {q_length} and {kv_length}"
    for q_offset in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="^scaled_dot_product_attention: " + text):
            scaled_dot_product_attention(query, key, key, rule, q_offset=q_offset)
        with pytest.raises(ValueError, match="^attention_plan: " + text):
            attn_mask.attention_plan(rule, 1, q_length, kv_length, q_offset=q_offset)
    if rule == causal():
        with pytest.raises(ValueError, match="^scaled_dot_product_attention: " + text):
            ops.scaled_dot_product_attention(
                *causal().encode(),
                query,
                key,
                key,
                q_positions=torch.zeros(1, dtype=torch.int64).expand(q_length),
            )


def test_bits_beside_a_mask_function_in_several_tiles(monkeypatch):
    """Each tile has its own rows of the bits."""
    monkeypatch.setattr(attn_mask._core.write, "_TILE", 7 * 30 * 2)
    attends = torch.rand(1, 2, 30, 30, generator=torch.Generator().manual_seed(3)) < 0.4
    rule = bits(attends) | function(lambda b, h, q, k: (q + k) % 3 == 0)
    queries, keys = torch.arange(30)[:, None], torch.arange(30)
    visible = attends | ((queries + keys) % 3 == 0)
    check(rule, inputs(1, 2, 2, 30, 30), visible)
    picture = attn_mask.show(rule, 30, 30, head=1)
    monkeypatch.setattr(attn_mask._tools.view, "_ROWS", 7)
    density = attn_mask._tools.view.view("show", rule, 30, 30, 0, 1).counts([0, 30], [0, 30])[0]
    assert int(density) == int(visible[0, 1].sum()) and picture == attn_mask.show(visible[0, 1])


def test_a_table_without_values_is_refused():
    query, key, value = (tensor.detach() for tensor in inputs(1, 1, 1, 4, 4))
    code = [attn_mask._C.OPCODES["PADDING"], 0]
    for attend in (ops.scaled_dot_product_attention, attn_mask._C.scaled_dot_product_attention):
        with pytest.raises(ValueError, match="expected the operands to be on cpu, but got meta"):
            attend(code, [torch.ones(1, 4, device="meta")], query, key, value)
