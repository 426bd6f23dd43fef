"""attn_mask.boolean and attn_mask.additive: masks of rules, wherever queries and keys stand."""

import contextlib
import functools
import math

import attn_mask
import numpy as np
import pytest
import torch
from attn_mask import masking_utils, rules
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import assert_same_mask
from torch.nn.attention.flex_attention import create_mask

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LENGTH = 40
IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 26, [0] * 20 + [-1] * 7 + [1] * 13])
PADDING = torch.tensor([[0, 0, 0] + [1] * 37, [1] * 10 + [0, 1] * 15]).bool()
NO_KEYS = torch.zeros(2, LENGTH, dtype=torch.bool)


def every_third(b, h, q, k):
    return (q + k) % 3 == 0


RULES = {
    "causal": rules.causal(),
    "window": rules.causal() & rules.sliding_window(3),
    "far window": rules.window(9, -7),
    "padding": rules.causal() & rules.padding(PADDING),
    "two paddings": rules.padding(PADDING) & rules.padding(PADDING.roll(1)),
    "nothing but padding": rules.padding(NO_KEYS),
    "documents": rules.documents(IDS) & rules.padding(PADDING),
    "blocks": rules.blockwise(IDS),
    "chunks": rules.chunked(4, torch.tensor([1, 3])) & rules.window(-2, 5),
    "or": (rules.blockwise(IDS) & rules.padding(PADDING)) | rules.window(1, -1),
    "reindexed": rules.reindex(rules.window(4, -1), IDS + 3) & rules.padding(PADDING),
    "nothing": rules.nothing(),
    "function": rules.function(every_third) & rules.window(2, -1),
    "a callable": every_third,
    "too large for a kernel": rules.union(
        *(rules.window(i, -i) & rules.padding(PADDING) for i in range(4, 16))
    ),
}


def visible(rule, batch_size, q, k):
    """Bool [b, 1, q, kv], element by element, of positions [q] or [b, q] and [kv] or [b, kv]."""
    rule = rules.function(rule)
    q, k = (line.expand(batch_size, -1) for line in (q, k))
    result = torch.zeros(batch_size, 1, q.shape[1], k.shape[1], dtype=torch.bool)
    for b in range(batch_size):
        for i in range(q.shape[1]):
            for j in range(k.shape[1]):
                indices = (torch.tensor(n) for n in (b, 0, q[b, i].item(), k[b, j].item()))
                result[b, 0, i, j] = rule(*indices).item()
    return result


def unmasked(attends):
    rows = [row if row.any() else torch.ones_like(row) for row in attends.flatten(0, -2)]
    return torch.stack(rows).view(attends.shape) if rows else attends


def number(value, dtype):
    return torch.tensor(value, dtype=dtype)


def spelled(attends, dtype, masked_value=None, bias=None):
    masked = torch.finfo(dtype).min if masked_value is None else masked_value
    shown = torch.zeros((), dtype=dtype) if bias is None else bias
    return torch.where(attends, shown, number(masked, dtype))


@st.composite
def problems(draw):
    q_length, kv_length = draw(st.integers(0, 9)), draw(st.integers(0, 12))
    offsets = {"q_offset": draw(st.integers(0, 20)), "kv_offset": draw(st.integers(0, 20))}
    return draw(st.sampled_from(sorted(RULES))), q_length, kv_length, offsets


@settings(max_examples=200)
@given(problems(), st.booleans(), st.sampled_from(DTYPES), st.sampled_from([None, -1e4, -math.inf]))
def test_masks_are_their_elements(problem, unmask, dtype, masked_value):
    name, q_length, kv_length, offsets = problem
    rule = RULES[name]
    sizes = 2, q_length, kv_length
    want = visible(
        rule,
        2,
        torch.arange(q_length) + offsets["q_offset"],
        torch.arange(kv_length) + offsets["kv_offset"],
    )
    if unmask:
        want = unmasked(want)
    assert_same_mask(attn_mask.boolean(rule, *sizes, unmask_unattended=unmask, **offsets), want)
    out = torch.ones(2, 1, q_length, kv_length + 3, dtype=torch.bool)[..., :kv_length]
    got = attn_mask.boolean(rule, *sizes, unmask_unattended=unmask, out=out, **offsets)
    assert got is out
    assert_same_mask(out, want)
    options = {"dtype": dtype, "masked_value": masked_value, "unmask_unattended": unmask}
    want = spelled(want, dtype, masked_value)
    assert_same_mask(attn_mask.additive(rule, *sizes, **options, **offsets), want)
    out = torch.ones(2, 1, kv_length, q_length, dtype=dtype).mT
    assert attn_mask.additive(rule, *sizes, **options, **offsets, out=out) is out
    assert_same_mask(out, want)


@settings(max_examples=100)
@given(
    problems(),
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]),
    st.sampled_from([None, -100.0, 0.0, -0.0]),
)
def test_biases(problem, dtype, shape, masked_value):
    """Where nothing is visible and rows are unmasked, the bias of the whole row."""
    name, q_length, kv_length, offsets = problem
    rule = RULES[name]
    bias = torch.randn(*shape, q_length, kv_length).to(dtype)
    for unmask in (False, True):
        got = attn_mask.additive(
            rule,
            2,
            q_length,
            kv_length,
            dtype=dtype,
            bias=bias,
            unmask_unattended=unmask,
            masked_value=masked_value,
            **offsets,
        )
        attends = attn_mask.boolean(
            rule, 2, q_length, kv_length, unmask_unattended=unmask, **offsets
        )
        attends = attends.expand(2, shape[1], -1, -1)
        assert_same_mask(got, spelled(attends, dtype, masked_value, bias))


@pytest.mark.parametrize("name", RULES)
def test_listed_positions(name):
    rule = RULES[name]
    q = torch.tensor([[3, 0, 17, 4], [9, 9, 1, 30]])
    k = torch.tensor([5, 2, 30, 0, 8])
    for q_positions, kv_positions in ((q, k), (q[0], k.expand(2, -1)), (q[1], None)):
        for unmask in (False, True):
            given = {"q_positions": q_positions, "kv_positions": kv_positions}
            columns = torch.arange(5) + 2 if kv_positions is None else kv_positions + 2
            want = visible(rule, 2, q_positions + 1, columns)
            got = attn_mask.boolean(
                rule, 2, 4, 5, **given, q_offset=1, kv_offset=2, unmask_unattended=unmask
            )
            assert_same_mask(got, unmasked(want) if unmask else want)


@pytest.mark.parametrize("name", ["causal", "padding", "function", "documents"])
def test_offsets_that_are_tensors(name):
    rule = RULES[name]
    for offset in (torch.tensor(3), torch.tensor([[3], [7]])):
        want = visible(rule, 2, torch.arange(4) + offset.view(-1, 1), torch.arange(9))
        assert_same_mask(attn_mask.boolean(rule, 2, 4, 9, q_offset=offset), want)
        assert_same_mask(attn_mask.boolean(rule, 2, 4, 9, q_positions=offset), want)
        rows = torch.arange(4)
        got = attn_mask.boolean(rule, 2, 4, 9, q_offset=offset, q_positions=rows)
        assert_same_mask(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("rule", [rules.causal(), rules.function(lambda b, h, q, k: q >= k)])
def test_positions_beyond_their_dtype(dtype, rule):
    """Sums of positions and offsets don't wrap around."""
    most = torch.iinfo(dtype).max
    rows = torch.tensor([1, 2], dtype=dtype)
    want = torch.arange(300) <= torch.tensor([[most + 1], [most + 2]])
    for offset in (most, torch.tensor(most, dtype=dtype), torch.tensor([[most]], dtype=dtype)):
        got = attn_mask.boolean(rule, 1, 2, 300, q_positions=rows, q_offset=offset)
        assert_same_mask(got, want[None, None])
    # Of which a callable is evaluated some rows at a time.
    first = torch.tensor([[most]], dtype=dtype)
    got = attn_mask.boolean(rule, 1, 1100, 1000, q_offset=first)
    assert_same_mask(got, torch.ones(1, 1, 1100, 1000, dtype=torch.bool).tril(most))


def test_rows_longer_than_a_tile():
    """Whether a row is unmasked does not depend on where it is cut."""
    length = 100_000
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[0, -1] = padding[1, 70_000] = True
    for rule in (rules.padding(padding), rules.window(None, 0) & rules.padding(padding)):
        offset = length - 2
        got = attn_mask.additive(rule, 3, 2, length, q_offset=offset, unmask_unattended=True)
        low = torch.finfo(torch.float32).min
        for batch, row in ((0, 1), (1, 0), (1, 1), (2, 0), (2, 1)):
            shown = (got[batch, 0, row] == 0).nonzero().flatten().tolist()
            want = {0: [length - 1], 1: [70_000], 2: list(range(length))}[batch]
            assert shown == want
            assert ((got[batch, 0, row] == 0) | (got[batch, 0, row] == low)).all()


def test_zeros_of_unmasked_rows_are_positive():
    got = attn_mask.additive(rules.nothing(), 1, 2, 3, unmask_unattended=True)
    assert not torch.signbit(got).any()
    legacy = torch.ops.attn_mask.to_4d(
        NO_KEYS.int(), 2, dtype=torch.float32, key_value_length=LENGTH, unmask_unattended=True
    )
    assert torch.signbit(legacy).all()


# masked_value


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_values(dtype):
    info = torch.finfo(dtype)
    for value in (
        info.min,
        info.min / 2,
        -1e4,
        -100,
        -1,
        -0.5,
        -info.tiny,
        -math.inf,
        0.0,
        -0.0,
        0,
    ):
        for rule in (rules.causal(), every_third):
            got = attn_mask.additive(rule, 1, 3, 4, dtype=dtype, masked_value=value)
            attends = attn_mask.boolean(rule, 1, 3, 4)
            assert_same_mask(got, spelled(attends, dtype, value))
            eager = masking_utils.eager_mask(
                1, 3, 4, mask_function=rule, dtype=dtype, masked_value=value
            )
            assert_same_mask(eager, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, 1.0, 1e-3, math.inf])
def test_values_that_are_none(dtype, value):
    for rule in (rules.causal(), every_third):
        with pytest.raises(
            ValueError, match="additive: expected masked_value to be at most 0, but got"
        ):
            attn_mask.additive(rule, 1, 3, 4, dtype=dtype, masked_value=value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, -65520.0),
        (torch.float16, -1e9),
        (torch.float16, -1e-9),
        (torch.bfloat16, -3.4e38),
        (torch.float32, -1e39),
        (torch.float32, -1e-60),
        (torch.float16, torch.finfo(torch.float32).min),
    ],
)
def test_values_that_the_dtype_does_not_hold(dtype, value):
    with pytest.raises(
        ValueError, match=r"additive: expected masked_value to be a number that .* hol"
    ):
        attn_mask.additive(rules.causal(), 1, 3, 4, dtype=dtype, masked_value=value)


def test_masked_values_of_other_types():
    query = torch.zeros(1, 1, 2, 4)
    calls = {
        "additive": lambda value: attn_mask.additive(rules.causal(), 1, 3, 4, masked_value=value),
        "eager_mask": lambda value: masking_utils.eager_mask(1, 3, 4, masked_value=value),
        "sdpa_arguments": lambda value: attn_mask.sdpa_arguments(
            query, query, dtype=torch.float32, masked_value=value
        ),
        "installed": lambda value: attn_mask.installed(masked_value=value),
    }
    for name, call in calls.items():
        for value in ("-1", None.__class__, torch.tensor(-1.0), -1j, False):
            with pytest.raises(
                TypeError, match=f"^{name}: expected masked_value to be a number or None, but got"
            ):
                call(value)
        with pytest.raises(
            ValueError, match=f"^{name}: expected masked_value to be a number that float64 holds"
        ):
            call(-(10**400))
    got = attn_mask.additive(rules.causal(), 1, 3, 4, masked_value=np.float32(-5))
    assert_same_mask(got, attn_mask.additive(rules.causal(), 1, 3, 4, masked_value=-5.0))


def test_arguments_of_other_types():
    """Each is named, where the extension would show all of its signature."""
    for sizes in ((2.0, 4, 5), (2, "4", 5), (2, 4, None)):
        wrong = next(
            name
            for name, size in zip(("batch_size", "q_length", "kv_length"), sizes, strict=True)
            if not isinstance(size, int)
        )
        with pytest.raises(TypeError, match=f"^boolean: expected {wrong} to be an int, but got"):
            attn_mask.boolean(rules.causal(), *sizes)
    query = torch.zeros(1, 1, 2, 4)
    calls = {
        "boolean": lambda **given: attn_mask.boolean(rules.causal(), 1, 2, 2, **given),
        "additive": lambda **given: attn_mask.additive(every_third, 1, 2, 2, **given),
        "sdpa_arguments": lambda **given: attn_mask.sdpa_arguments(query, query, **given),
    }
    for name, call in calls.items():
        for argument in ("q_offset", "kv_offset"):
            for offset in (1.5, "1"):
                with pytest.raises(
                    TypeError, match=f"^{name}: expected {argument} to be an int, but got"
                ):
                    call(**{argument: offset})
            for offset in (torch.tensor(1.0), torch.tensor(True)):
                given = {"q_offset": 0, argument: offset}
                with pytest.raises(
                    TypeError,
                    match=f"^{name}: expected {argument} to be uint8 or a signed integer, but got",
                ):
                    call(**given)
    for name in ("sdpa_mask", "eager_mask"):
        calls[name] = functools.partial(getattr(masking_utils, name), 1, 2, 2)
    for name, call in calls.items():
        for flag in (None, 1, "yes"):
            with pytest.raises(
                TypeError, match=f"^{name}: expected unmask_unattended to be a bool, but got"
            ):
                call(unmask_unattended=flag)
    with pytest.raises(TypeError, match=r"^sdpa_arguments: expected dtype to be a torch\.dtype"):
        calls["sdpa_arguments"](dtype="float32")
    for positions, offset, wrong in (
        (torch.ones(2), torch.tensor(1), "q_positions"),
        (torch.arange(2), torch.tensor(1.0), "q_offset"),
    ):
        with pytest.raises(TypeError, match=f"^boolean: expected {wrong} to be uint8 or a signed"):
            calls["boolean"](q_positions=positions, q_offset=offset)


# Bits


def test_bits():
    attends = torch.rand(2, 3, 4, 5) > 0.5
    for part in (attends, attends[:1], attends[:, :1], attends[:1, :1]):
        want = part.expand(2, -1, -1, -1)
        assert_same_mask(attn_mask.boolean(rules.bits(part), 2, 4, 5), want)
        # Rows and columns keep their places, whatever their positions.
        assert_same_mask(
            attn_mask.boolean(rules.bits(part), 2, 4, 5, q_offset=7, kv_offset=3), want
        )
        moved = rules.shift(rules.bits(part) & rules.causal(), 2, 1) | rules.nothing()
        causal = torch.ones(4, 5).tril(1).bool()
        assert_same_mask(attn_mask.boolean(moved, 2, 4, 5), want & causal)
        assert_same_mask(
            attn_mask.boolean(rules.bits(part) & every_third, 2, 4, 5),
            want & attn_mask.boolean(every_third, 1, 4, 5),
        )
        indices = (
            torch.arange(2)[:, None, None, None],
            torch.arange(part.shape[1])[:, None, None],
            torch.arange(4)[:, None],
            torch.arange(5),
        )
        assert_same_mask(rules.bits(part)(*indices).expand(want.shape), want)


def test_bits_in_large_masks_with_callables():
    """Which are evaluated some rows at a time."""
    attends = torch.rand(1, 1, 1500, 1000) > 0.5
    got = attn_mask.boolean(rules.bits(attends) & every_third, 1, 1500, 1000, q_offset=4)
    q, k = torch.arange(1500)[:, None] + 4, torch.arange(1000)
    assert_same_mask(got, attends & ((q + k) % 3 == 0))
    out = torch.zeros(1, 1, 1500, 1000)
    bias = torch.randn(1, 1, 1500, 1000)
    attn_mask.additive(rules.bits(attends) | every_third, 1, 1500, 1000, bias=bias, out=out)
    wanted = attends | ((q - 4 + k) % 3 == 0)
    assert_same_mask(out, spelled(wanted, torch.float32, None, bias))


def test_block_masks_of_bits():
    attends = torch.rand(2, 2, 9, 9) > 0.3
    got = attn_mask.create_block_mask(rules.bits(attends), 2, 2, 9, 9, "cpu", BLOCK_SIZE=1)
    assert torch.equal(got.to_dense().bool(), attends)
    moved = attn_mask.create_block_mask(
        rules.bits(attends) & rules.causal(), 2, 2, 9, 9, "cpu", BLOCK_SIZE=1, q_offset=2
    )
    want = attends & torch.ones(9, 9).tril(2).bool()
    assert torch.equal(moved.to_dense().bool(), want)
    called = torch.stack([moved.mask_mod(0, 0, i, torch.arange(9)) for i in range(9)])
    assert torch.equal(called, want[0, 0])


def test_bits_of_another_shape():
    with pytest.raises(TypeError, match=r"^bits: expected attends to be bool, but got torch.int64"):
        rules.bits(IDS[None, None])
    with pytest.raises(
        ValueError, match=r"^bits: expected attends to be 4-D .* but got 2-D \[2, 40"
    ):
        rules.bits(PADDING)
    bits = rules.bits(torch.ones(1, 1, 3, 4).bool())
    with pytest.raises(ValueError, match="boolean: expected a bits operand to be"):
        attn_mask.boolean(bits, 1, 4, 4)
    with pytest.raises(
        ValueError, match="bits: expected attends to have 1 or 2 rows, for a batch of 2"
    ):
        attn_mask.boolean(rules.bits(torch.ones(3, 1, 4, 4).bool()), 2, 4, 4)
    with pytest.raises(
        ValueError, match=r"boolean: expected a bits operand to be \[.* 2000, 1000\]"
    ):
        attn_mask.boolean(rules.bits(torch.ones(1, 1, 3, 1000).bool()) & every_third, 1, 2000, 1000)


def test_nothing():
    for call in (attn_mask.boolean, lambda *a: attn_mask.additive(*a) == 0):
        assert not call(attn_mask.nothing(), 1, 3, 4).any()
    assert attn_mask.boolean(rules.nothing() | rules.causal(), 1, 3, 3).sum() == 6
    assert rules.nothing() is rules.nothing()


# Where they go, and what does not fit


def test_leaves_at_the_top_level():
    leaves = ("causal", "bidirectional", "nothing", "sliding_window", "window", "chunked", "bits")
    for name in (*leaves, "blockwise", "documents", "padding"):
        assert getattr(attn_mask, name) is getattr(rules, name)


def test_bias_and_out_where_rules_are_called():
    """Before the first token, upstream's tables are indexed from their end: by a call."""
    rule = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))
    sizes = 1, 2, 3
    offset = {"q_offset": -1}
    attends = attn_mask.boolean(rule, *sizes, **offset)
    bias = torch.randn(1, 3, 2, 3)
    got = attn_mask.additive(rule, *sizes, bias=bias, masked_value=-2.0, **offset)
    assert_same_mask(got, spelled(attends, torch.float32, -2.0, bias))
    out = torch.ones(1, 1, 3, 2, dtype=torch.bool).mT
    assert attn_mask.boolean(rule, *sizes, out=out, **offset) is out
    assert_same_mask(out, attends)
    with pytest.raises(ValueError, match="additive: expected bias to have q_length 2, but got"):
        attn_mask.additive(rule, *sizes, bias=torch.zeros(1, 1, 1, 3), **offset)
    with pytest.raises(TypeError, match="additive: expected bias to be Float, but got Double"):
        attn_mask.additive(rule, *sizes, bias=bias.double(), **offset)
    out = torch.zeros(9, dtype=torch.bool).as_strided((1, 1, 2, 3), (9, 9, 1, 1))
    with pytest.raises(ValueError, match="boolean: expected out to have elements that don't over"):
        attn_mask.boolean(rule, *sizes, out=out, **offset)


@pytest.mark.parametrize("aten_only", [False, True])
def test_gradients_into_out(aten_only):
    out, bias = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, requires_grad=True)
    with attn_mask.aten_only() if aten_only else contextlib.nullcontext():
        with pytest.raises(ValueError, match="additive: expected bias not to require a gradient"):
            attn_mask.additive(rules.causal(), 1, 2, 2, bias=bias, out=out)
        with pytest.raises(ValueError, match="additive: expected out not to require a gradient"):
            attn_mask.additive(rules.causal(), 1, 2, 2, out=bias)


def test_sdpa_and_eager_masks():
    given = {"mask_function": rules.causal(), "attention_mask": PADDING[:, :6]}
    want = unmasked(masking_utils.sdpa_mask(2, 6, 6, **given))
    assert_same_mask(masking_utils.sdpa_mask(2, 6, 6, **given, unmask_unattended=True), want)
    eager = masking_utils.eager_mask(2, 6, 6, **given, unmask_unattended=True)
    assert_same_mask(eager, spelled(want, torch.float32))
    query = torch.zeros(2, 1, 6, 4)
    mask, is_causal = attn_mask.sdpa_arguments(
        query, query, rules.causal(), PADDING[:, :6], unmask_unattended=True
    )
    assert not is_causal
    assert_same_mask(mask, want)
    mask, _ = attn_mask.sdpa_arguments(
        query,
        query,
        rules.causal(),
        PADDING[:, :6],
        unmask_unattended=True,
        dtype=torch.float16,
        masked_value=-1e4,
    )
    assert_same_mask(mask, spelled(want, torch.float16, -1e4))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("rule", ["causal", "a callable"])
def test_positions_of_other_sizes(rule, shape):
    positions = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^boolean: expected .*kv_positions .*but got .*\["):
        attn_mask.boolean(RULES[rule], 2, 4, 5, kv_positions=positions)
    with pytest.raises(ValueError, match=r"^boolean: expected kv_offset to be an .*beside kv_pos"):
        offset, positions = (
            torch.zeros(3, 1, dtype=torch.int64),
            torch.zeros(2, 5, dtype=torch.int64),
        )
        attn_mask.boolean(RULES[rule], 2, 4, 5, kv_offset=offset, kv_positions=positions)


def test_gradients_of_the_bias():
    bias = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    rule = rules.padding(torch.tensor([[1, 0, 1, 1, 0, 1]])) & rules.window(None, -2)
    for unmask in (False, True):
        options = {"dtype": torch.float64, "unmask_unattended": unmask}
        weights = torch.randn(1, 2, 4, 6, dtype=torch.float64)
        mask = attn_mask.additive(rule, 1, 4, 6, bias=bias, **options)
        (grad,) = torch.autograd.grad((mask * weights).sum(), bias)
        attends = attn_mask.boolean(rule, 1, 4, 6, unmask_unattended=unmask)
        assert torch.equal(grad, torch.where(attends, weights, 0.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: attn_mask.boolean(3, 1, 2, 2), TypeError, "boolean: expected rule to be callable"),
        (
            lambda: attn_mask.boolean(rules.causal, 1, 2, 2),
            TypeError,
            r"boolean: .*: call causal\(\)",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), -1, 2, 2),
            ValueError,
            "expected batch_size to be",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), 1, 2, 2, out=torch.ones(1, 1, 2, 3).bool()),
            ValueError,
            "boolean: expected out to be",
        ),
        (
            lambda: attn_mask.boolean(every_third, 1, 2, 2, out=torch.ones(1, 1, 2, 3).bool()),
            ValueError,
            "boolean: expected out to be",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), 1, 2, 2, out=torch.ones(1, 1, 2, 2)),
            TypeError,
            "boolean: expected out to be Bool",
        ),
        (
            lambda: attn_mask.additive(rules.causal(), 1, 2, 2, dtype=torch.int32),
            TypeError,
            "additive: expected dtype to be float16",
        ),
        (
            lambda: attn_mask.additive(rules.causal(), 1, 2, 2, dtype="float32"),
            TypeError,
            "additive: expected dtype to be a torch.dtype, but got 'float32'",
        ),
        (
            lambda: attn_mask.additive(rules.causal(), 1, 2, 2, bias=torch.ones(2, 2)),
            ValueError,
            "additive: expected bias to be 4-D",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), 1, 2, 2, q_positions=torch.arange(3)),
            ValueError,
            "boolean: expected q_positions to list 2 positions",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), 1, 2, 2, kv_positions=torch.ones(2)),
            TypeError,
            "boolean: expected kv_positions to be uint8 or a signed integer",
        ),
        (
            lambda: attn_mask.boolean(rules.causal(), 1, 2, 2, q_positions=[0, 1]),
            TypeError,
            "boolean: expected q_positions to be a tensor, but got list",
        ),
        (
            lambda: attn_mask.boolean(rules.documents(IDS[:, :1]), 2, 2, 2),
            ValueError,
            "documents: expected ids to be of length 2 or longer, for the queries of boolean",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


# Compiled and exported


def two_masks(padding, bias):
    rule = rules.causal() & rules.padding(padding) & rules.sliding_window(3)
    q_length, kv_length = bias.shape[-2:]
    sizes = padding.shape[0], q_length, kv_length
    return (
        attn_mask.boolean(rule, *sizes, q_offset=1, unmask_unattended=True),
        attn_mask.additive(rule & every_third, *sizes, bias=bias, masked_value=-100.0),
        attn_mask.additive(rule, *sizes, dtype=torch.float16, unmask_unattended=True),
    )


def inputs(q_length=4, kv_length=6):
    return PADDING[:, :kv_length], torch.randn(1, 2, q_length, kv_length)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(two_masks, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sizes in ((4, 6), (3, 9)):
        given = inputs(*sizes)
        for got, want in zip(compiled(*given), two_masks(*given), strict=True):
            assert_same_mask(got, want)
    torch._dynamo.reset()


def test_compiled_without_a_tensor():
    """Graphs use the default device, too."""

    def masks(q_length, kv_length):
        return (
            attn_mask.boolean(rules.causal(), 1, q_length, kv_length),
            attn_mask.additive(every_third, 1, q_length, kv_length),
        )

    torch._dynamo.reset()
    compiled = torch.compile(masks, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((4, 6), (3, 9)):
        for got, want in zip(compiled(*sizes), masks(*sizes), strict=True):
            assert_same_mask(got, want)
    with torch.device("meta"):
        assert all(mask.device.type == "meta" for mask in compiled(4, 6))
    assert all(mask.device.type == "cpu" for mask in compiled(4, 6))
    torch._dynamo.reset()


# From inside torch 2.11.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
def test_exported():
    class Masks(torch.nn.Module):
        def forward(self, padding, bias):
            return two_masks(padding, bias)

    q, kv = torch.export.Dim("q", min=2, max=16), torch.export.Dim("kv", min=2, max=16)
    exported = torch.export.export(Masks(), inputs(), dynamic_shapes=({1: kv}, {2: q, 3: kv}))
    in_aten = exported.run_decompositions(attn_mask.decompositions())
    assert "attn_mask" not in in_aten.graph_module.code
    for sizes in ((4, 6), (3, 9)):
        given = inputs(*sizes)
        want = two_masks(*given)
        for module in (exported.module(), in_aten.module()):
            for one, other in zip(module(*given), want, strict=True):
                assert_same_mask(one, other)


def test_compiled_into_out():
    def write(out):
        return attn_mask.boolean(rules.causal(), 1, *out.shape[-2:], out=out)

    torch._dynamo.reset()
    out = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    torch.compile(write, backend="aot_eager", fullgraph=True)(out)
    assert_same_mask(out, torch.ones(1, 1, 3, 4).tril().bool())
    torch._dynamo.reset()


def test_reindexed_bits_are_shown_at_positions_below_0_however_they_are_evaluated():
    attends = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    rule = rules.reindex(rules.bits(attends), torch.tensor([-1, 0, 1]))
    assert torch.equal(create_mask(rule, 1, 2, 3, 3, device="cpu"), attends)
    assert torch.equal(attn_mask.boolean(rule, 1, 3, 3), attends)
