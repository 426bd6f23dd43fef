"""Positions, tables and indices of every integer dtype: every view of a rule computes in int64.

The oracle are loops over Python's ints.
"""

import functools
import operator

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules
from rule_reference import ID_DTYPES
from torch.nn.attention import flex_attention

B, Q, KV = 2, 9, 12

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

every_dtype = pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)


def positions_of(dtype):
    """Up to both ends of the dtype, where sums and differences would wrap or overflow."""
    info = torch.iinfo(dtype)
    low, high = max(info.min, -(2**40)), min(info.max, 2**40)
    row = [high, high - 1, high - 2, low, low + 1, low + 2, 0, 1, 2, 3, high - 3, 5]
    return torch.tensor([row, row[::-1]], dtype=dtype)


def starts_of(dtype):
    return torch.tensor([3, min(torch.iinfo(dtype).max, 100)], dtype=dtype)


TABLE = torch.arange(KV) % 3  # looked up at positions


def window(left, right):
    return lambda b, q, k: q - left <= k <= q + right


def chunks(size, starts=None):
    def attends(b, q, k):
        start = 0 if starts is None else int(starts[b])
        return (k - start) // size == (q - start) // size

    return attends


def moved(attends, q_add, kv_add):
    return lambda b, q, k: attends(b, q + q_add, k + kv_add)


def causal(b, q, k):
    return k <= q


def looked_up(attends, table):
    return lambda b, q, k: attends(b, int(table[b, q]), int(table[b, k]))


# Rules over positions, and the same of ints.
INNER = {
    "causal": lambda dtype: (rules.causal(), causal),
    "window": lambda dtype: (rules.window(200, 3), window(200, 3)),
    "sliding_window": lambda dtype: (rules.sliding_window(2**40), window(2**40 - 1, 2**80)),
    "chunked": lambda dtype: (rules.chunked(7), chunks(7)),
    "left_padding": lambda dtype: (
        rules.chunked(5, starts_of(dtype)),
        chunks(5, starts_of(dtype)),
    ),
    "shift": lambda dtype: (
        rules.shift(rules.causal(), 250, -(2**35)),
        moved(causal, 250, -(2**35)),
    ),
    "union": lambda dtype: (
        rules.window(1, 0) | rules.shift(rules.window(2, 2), -300, 0),
        lambda b, q, k: window(1, 0)(b, q, k) or window(2, 2)(b, q - 300, k),
    ),
}


def batches(tensor, n=B):
    return tensor.expand(n, *tensor.shape[1:])


def by_flex(rule):
    """Which keys have a weight, where values are one-hot."""
    mask = flex_attention.create_block_mask(rule, B, 1, Q, KV, "cpu")
    return flex(rule, mask)


def flex(rule, block_mask):
    values = torch.eye(KV).expand(B, 1, KV, KV)
    query, key = torch.zeros(B, 1, Q, KV), torch.zeros(B, 1, KV, KV)
    return flex_attention.flex_attention(query, key, values, block_mask=block_mask)[:, 0] > 0


def called(rule):
    return rule(
        torch.arange(B)[:, None, None],
        torch.tensor(0),
        torch.arange(Q)[:, None],
        torch.arange(KV),
    ).expand(B, Q, KV)


def by_vmap(rule):
    in_dims = ((None, None, None, 0), (None, None, 0, None), (0, None, None, None))
    mapped = functools.reduce(lambda f, dims: torch.vmap(f, in_dims=dims), in_dims, rule)
    return mapped(torch.arange(B), torch.tensor(0), torch.arange(Q), torch.arange(KV))


def compiled(rule):
    torch._dynamo.reset()
    return torch.compile(called, backend="aot_eager", fullgraph=True)(rule)


def in_aten(rule):
    with attn_mask.aten_only():
        return attn_mask.boolean(rule, B, Q, KV)[:, 0]


def beside_a_function(rule):
    """The rule is called as a part of a whole that has to be."""
    return masking_utils.sdpa_mask(
        B,
        Q,
        KV,
        mask_function=masking_utils.and_masks(rule, lambda b, h, q, k: k >= 0),
        allow_is_causal_skip=False,
        use_vmap=True,
    )[:, 0]


def pixels(rule, b):
    lines = attn_mask.show(rule, Q, KV, batch=b).split("\n")
    rows = [[mark in half for mark in line] for line in lines for half in ("▀█", "▄█")]
    return torch.tensor(rows[:Q])


VIEWS = {
    "boolean": lambda rule: attn_mask.boolean(rule, B, Q, KV)[:, 0],
    "called": called,
    "vmap": by_vmap,
    "compiled": compiled,
    "aten_only": in_aten,
    "create_block_mask": lambda rule: (
        attn_mask.create_block_mask(rule, B, 1, Q, KV, "cpu", BLOCK_SIZE=1).to_dense()[:, 0] == 1
    ),
    "torch's create_block_mask": lambda rule: (
        flex_attention.create_block_mask(rule, B, 1, Q, KV, "cpu", BLOCK_SIZE=1).to_dense()[:, 0]
        == 1
    ),
    "flex_attention": by_flex,
    "attention": lambda rule: (
        attn_mask.scaled_dot_product_attention(
            torch.zeros(B, 1, Q, KV),
            torch.zeros(B, 1, KV, KV),
            torch.eye(KV).expand(B, 1, KV, KV),
            rule,
            q_offset=0,
        )[:, 0]
        > 0
    ),
    "mirrors": beside_a_function,
    "show": lambda rule: torch.stack([pixels(rule, b) for b in range(B)]),
    "explain": lambda rule: torch.tensor(
        [
            [
                [attn_mask.explain(rule, b=b, q=q, k=k).startswith("attends") for k in range(KV)]
                for q in range(Q)
            ]
            for b in range(B)
        ]
    ),
}


def elements(attends):
    return torch.tensor(
        [[[bool(attends(b, q, k)) for k in range(KV)] for q in range(Q)] for b in range(B)]
    )


@every_dtype
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "compiled"])
def test_rules_over_narrow_positions(view, inner, dtype):
    rule, attends = INNER[inner](dtype)
    table = positions_of(dtype)
    got = VIEWS[view](rules.reindex(rule, table))
    assert torch.equal(got, elements(looked_up(attends, table)))


@every_dtype
def test_compiled(dtype):
    table = positions_of(dtype)
    rule, attends = zip(*(make(dtype) for make in INNER.values()), strict=True)
    got = compiled(functools.reduce(operator.and_, (rules.reindex(of, table) for of in rule[1:])))
    wanted = elements(lambda b, q, k: all(looked_up(of, table)(b, q, k) for of in attends[1:]))
    assert torch.equal(got, wanted)


@every_dtype
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "compiled"])
def test_tables_at_positions_from_a_table(view, dtype):
    """Documents, blocks and padding of one dtype, looked up at positions of it; reindex twice."""
    table = torch.tensor([[3, 1, 2, 0, 5, 4, 7, 6, 9, 8, 11, 10]], dtype=dtype)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 3, 1]], dtype=dtype)
    inner = rules.documents(ids) & rules.padding(ids) | rules.blockwise(ids) & rules.causal()
    rule = rules.reindex(rules.reindex(rules.shift(inner, 0, 0), table), table)
    twice = [table[0, int(at)] for at in table[0]]

    def attends(b, q, k):
        q, k = int(twice[q]), int(twice[k])
        same = ids[0, q] == ids[0, k]
        return (same and ids[0, k] != 0) or (same and k <= q)

    assert torch.equal(VIEWS[view](rule), elements(attends))


@every_dtype
@pytest.mark.parametrize("view", ["called", "vmap", "compiled", "boolean", "flex_attention"])
def test_shifts_by_narrow_tensors(view, dtype):
    """A tensor [] of the largest number."""
    add = torch.iinfo(dtype).max if dtype != torch.int64 else 2**40
    rule = rules.shift(rules.window(3, 1), torch.tensor(add, dtype=dtype), add - 1)
    assert torch.equal(VIEWS[view](rule), elements(moved(window(3, 1), add, add - 1)))


@every_dtype
def test_shifts_of_single_indices(dtype):
    """Beside a tensor [1], torch promotes no index []."""
    add = torch.iinfo(dtype).max if dtype != torch.int64 else 2**40
    rule = rules.shift(rules.causal(), torch.tensor([add], dtype=dtype), 0)
    zero = torch.tensor(0)
    for k in range(add, add + 8):
        assert rule(zero, zero, torch.tensor(5), torch.tensor(k)).tolist() == [k <= add + 5]


CALLED = {
    "causal": (rules.causal(), causal),
    "window": (rules.window(3, 200), window(3, 200)),
    "chunked": (rules.chunked(7), chunks(7)),
    "left_padding": (
        rules.chunked(7, torch.tensor([90], dtype=torch.uint8)),
        chunks(7, [90, 90]),
    ),
    "shift": (rules.shift(rules.window(2, 0), 100, 100), window(2, 0)),
    "shift by a tensor": (
        rules.shift(rules.causal(), torch.tensor(100, dtype=torch.int8), 100),
        causal,
    ),
    "documents": (rules.documents(TABLE), lambda b, q, k: q % 3 == k % 3),
    "padding": (rules.padding(TABLE), lambda b, q, k: k % 3 != 0),
    "bits": (rules.bits(torch.eye(KV, dtype=torch.bool)[None, None]), lambda b, q, k: q == k),
    "reindex": (
        rules.reindex(rules.window(1, 1), torch.arange(KV, dtype=torch.int8)),
        window(1, 1),
    ),
}


@every_dtype
@pytest.mark.parametrize("name", CALLED)
def test_calls_with_narrow_indices(name, dtype):
    """Also where one is a tensor [], with which torch promotes otherwise, or an int."""
    rule, attends = CALLED[name]
    zero = torch.zeros(1, 1, dtype=dtype)
    queries, keys = torch.arange(Q, dtype=dtype), torch.arange(KV, dtype=dtype)
    wanted = elements(attends)[0]
    got = rule(zero, zero, queries[:, None], keys[None])
    assert torch.equal(got.expand(Q, KV), wanted)
    for q in range(Q):
        got = rule(zero[0, 0], zero[0, 0], torch.tensor(q), keys)
        assert torch.equal(got.expand(KV), wanted[q])
        for k in range(KV):
            assert bool(rule(0, 0, q, k)) == wanted[q, k]
            assert bool(rule(0, 0, q, keys[k])) == wanted[q, k]


def test_indices_that_are_no_integers_stay():
    assert rules.causal()(0, 0, torch.tensor(0.5), torch.tensor([0.25, 0.75])).tolist() == [
        True,
        False,
    ]


@every_dtype
def test_offsets_as_narrow_tensors(dtype):
    """Where the last query stands at the last key: past what the dtype holds."""
    offset = min(torch.iinfo(dtype).max, 2**40)
    kv_offset = torch.tensor(offset, dtype=dtype)
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 130, 4)
    distance = (127 + torch.arange(3))[:, None] - torch.arange(130)
    mask = (distance >= 0) & (distance < 5)
    rule = rules.causal() & rules.sliding_window(5)
    got = attn_mask.sdpa_arguments(query, key, rule, kv_offset=kv_offset)
    assert torch.equal(got.attn_mask[0, 0], mask)
    out = attn_mask.scaled_dot_product_attention(query, key, key, rule, kv_offset=kv_offset)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask)
    torch.testing.assert_close(out, wanted)


@every_dtype
def test_listed_positions_of_narrow_dtypes(dtype):
    """Which queries and keys have, for a rule and for a function."""
    table = positions_of(dtype)
    wanted = elements(looked_up(window(200, 3), table))
    for rule in (rules.window(200, 3), lambda b, h, q, k: (k >= q - 200) & (k <= q + 3)):
        got = attn_mask.boolean(rule, B, Q, KV, q_positions=table[:, :Q], kv_positions=table)
        assert torch.equal(got[:, 0], wanted)


def test_positions_below_0_see_every_key():
    """In each view; transformers' function sees nothing there."""
    rule = attn_mask.rules.reindex(attn_mask.bidirectional(), torch.tensor([-1, 0, 1]))
    index = torch.arange(3)
    assert rule(0, 0, index[:, None], index).expand(3, 3).all()
    assert attn_mask.boolean(rule, 1, 3, 3).all()
    assert attn_mask.boolean(attn_mask.bidirectional(), 1, 2, 3, q_offset=-1).all()
    upstream = attn_mask.masking_utils.bidirectional_mask_function
    assert repr(upstream) == repr(attn_mask.bidirectional()) != ""
    assert attn_mask.boolean(upstream, 1, 2, 1, q_offset=-1).flatten().tolist() == [False, True]
