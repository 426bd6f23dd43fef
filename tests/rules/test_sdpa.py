"""attn_mask.sdpa_arguments: with it, attention is what it is with the whole mask."""

import random

import attn_mask
import pytest
import torch
from attn_mask import rules
from masks import lowest
from rule_reference import grid
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def states(q_length, kv_length, batch_size=2):
    generator = torch.Generator().manual_seed(q_length * 100 + kv_length)
    sizes = ((batch_size, 2, length, 4) for length in (q_length, kv_length, kv_length))
    return [torch.randn(size, generator=generator) for size in sizes]


def whole_mask(rule, batch_size, q_length, kv_length, q_offset, kv_offset, padding=None):
    """Boolean [b, 1, q, kv], by calling the rule."""
    answer = rule(*grid(batch_size, q_length, kv_length, q_offset, kv_offset))
    mask = answer.expand(batch_size, 1, q_length, kv_length)
    if padding is not None:
        shown = torch.zeros(batch_size, kv_offset + kv_length, dtype=torch.bool)
        end = min(shown.shape[1], padding.shape[1])
        shown[:, :end] = padding[:, :end] != 0
        mask = mask & shown[:, None, None, kv_offset:]
    return mask


RULES = {
    "causal": rules.causal(),
    "bidirectional": rules.bidirectional(),
    "window": rules.causal() & rules.sliding_window(3),
    "wide window": rules.causal() & rules.sliding_window(100),
    "window to both sides": rules.window(2, 1),
    "wide window to both sides": rules.window(50, 50),
    "window, causal by itself": rules.window(9, 0),
    "chunks": rules.chunked(4) & rules.causal(),
    "one chunk": rules.chunked(50) & rules.causal(),
    "chunks after padding": rules.chunked(50, torch.tensor([1, 0])),
    "documents": rules.causal() & rules.documents(torch.tensor([[0] * 5 + [1] * 20] * 2)),
    "causal or window": rules.causal() | rules.sliding_window(3),
    "causal or all": rules.causal() | rules.bidirectional(),
    "causal, twice": rules.causal() | rules.window(99, 0),
    "nothing": rules.union(),
    "function": rules.function(lambda b, h, q, k: (q + k) % 2 == 0),
}
PADDINGS = {
    "none": None,
    "ones": torch.ones(2, 20),
    "left": torch.tensor([[0, 0] + [1] * 18, [1] * 20]),
    "short": torch.ones(2, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_attention_is_that_of_the_whole_mask(rule, padding):
    rule, padding = RULES[rule], PADDINGS[padding]
    for q_length, kv_length in ((1, 1), (1, 7), (5, 5), (4, 9), (7, 3), (9, 9)):
        query, key, value = states(q_length, kv_length)
        places = [{"q_offset": 0}, {"q_offset": 3, "kv_offset": 3}, {"q_offset": 2}]
        if kv_length >= q_length:
            places.append({})
        for place in places:
            q_offset = place.get("q_offset", kv_length - q_length)
            kv_offset = place.get("kv_offset", 0)
            want = whole_mask(rule, 2, q_length, kv_length, q_offset, kv_offset, padding)
            mask, is_causal = attn_mask.sdpa_arguments(query, key, rule, padding, **place)
            assert mask is None or torch.equal(mask, want)
            assert mask is None or not is_causal
            got = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
            expected = scaled_dot_product_attention(query, key, value, want)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "q_length", "kv_length", "place", "is_causal"),
    [
        ("causal", 5, 5, {}, True),
        ("causal", 1, 5, {}, False),
        ("causal", 5, 9, {"q_offset": 0}, True),
        ("bidirectional", 5, 9, {}, False),
        ("wide window", 5, 5, {}, True),
        ("wide window", 1, 5, {}, False),
        ("window", 1, 3, {}, False),
        ("window", 3, 3, {}, True),
        ("wide window to both sides", 4, 9, {}, False),
        ("one chunk", 5, 5, {}, True),
        ("chunks", 4, 4, {}, True),
        ("window, causal by itself", 5, 5, {}, True),
        ("causal or all", 4, 9, {}, False),
        ("causal, twice", 5, 5, {}, True),
    ],
)
def test_none_where_none_is_needed(rule, q_length, kv_length, place, is_causal):
    query, key, _ = states(q_length, kv_length)
    for padding in (None, torch.ones(2, kv_length)):
        got = attn_mask.sdpa_arguments(query, key, RULES[rule], padding, **place)
        assert got == (None, is_causal)
        with attn_mask.skip_policy("never"):
            got = attn_mask.sdpa_arguments(query, key, RULES[rule], padding, **place)
        assert got.attn_mask.shape == (2, 1, q_length, kv_length)
        with attn_mask.skip_policy("shapes"):
            got = attn_mask.sdpa_arguments(query, key, RULES[rule], padding, **place)
        assert (got.attn_mask is None) == (padding is None)
        with attn_mask.skip_policy("shapes", padding="none"):
            got = attn_mask.sdpa_arguments(query, key, RULES[rule], padding, **place)
        assert got == (None, is_causal)


@pytest.mark.parametrize(
    ("rule", "q_length", "kv_length", "place"),
    [
        ("causal", 2, 5, {}),
        ("causal", 5, 5, {"q_offset": 1}),
        ("window", 4, 4, {}),
        ("chunks", 1, 5, {}),
        ("documents", 5, 5, {}),
        ("function", 5, 5, {}),
        ("causal", 1, 5, {"q_offset": torch.tensor(4)}),
    ],
)
def test_a_mask_where_one_is_needed(rule, q_length, kv_length, place):
    query, key, _ = states(q_length, kv_length)
    got = attn_mask.sdpa_arguments(query, key, RULES[rule], **place)
    assert got.attn_mask.dtype == torch.bool
    assert not got.is_causal


def test_what_rules_show_over_positions():
    """Against the whole mask: never more than is so, and all where the rule has nothing to add."""
    generator = random.Random(3)
    for _ in range(2000):
        name = generator.choice(list(RULES))
        rule = RULES[name]
        q_start, kv_start = generator.randrange(6), generator.randrange(6)
        q_length, kv_length = generator.randrange(1, 8), generator.randrange(1, 8)
        shown = rule.coverage(q_start, q_start + q_length, kv_start, kv_start + kv_length)
        mask = whole_mask(rule, 2, q_length, kv_length, q_start, kv_start)
        causal = whole_mask(rules.causal(), 2, q_length, kv_length, q_start, kv_start)
        if shown is rules.Coverage.ALL:
            assert mask.all(), name
        elif shown is rules.Coverage.CAUSAL:
            assert torch.equal(mask, causal), name


def test_additive():
    query, key, value = states(2, 5)
    got = attn_mask.sdpa_arguments(query, key, dtype=torch.float32).attn_mask
    want = whole_mask(rules.causal(), 2, 2, 5, 3, 0)
    assert torch.equal(got, torch.where(want, 0.0, lowest(torch.float32)))
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, got),
        scaled_dot_product_attention(query, key, value, want),
    )


def test_compiled():
    """Without padding as in eager code; values of padding are not read."""

    def attend(query, key, value, padding):
        mask, is_causal = attn_mask.sdpa_arguments(query, key, attention_mask=padding)
        return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for padding in (None, torch.ones(2, 5, dtype=torch.bool)):
        given = (*states(5, 5), padding)
        torch.testing.assert_close(compiled(*given), attend(*given))
    torch._dynamo.reset()


def test_exported_code_holds_a_mask():
    """is_causal would be fixed for all lengths."""

    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            mask, is_causal = attn_mask.sdpa_arguments(query, key)
            assert mask is not None
            return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)

    given = tuple(states(5, 5))
    exported = torch.export.export(Attend(), given)
    torch.testing.assert_close(
        exported.module()(*given), scaled_dot_product_attention(*given, is_causal=True)
    )


def test_empty():
    for q_length, kv_length in ((0, 3), (3, 0), (0, 0)):
        query, key, _ = states(q_length, kv_length)
        got = attn_mask.sdpa_arguments(query, key, q_offset=0)
        assert got.attn_mask.shape == (2, 1, q_length, kv_length)


def test_errors():
    query, key, _ = states(5, 3)
    with pytest.raises(ValueError, match=r"sdpa_arguments: expected query to be 4-D \[batch_size"):
        attn_mask.sdpa_arguments(query[0], key)
    with pytest.raises(ValueError, match=r"expected key to be 4-D .* but got 3-D \[2, 3, 4\]"):
        attn_mask.sdpa_arguments(query, key[0])
    with pytest.raises(ValueError, match=r"expected q_offset where .* 5 queries, 3 keys"):
        attn_mask.sdpa_arguments(query, key)
    with pytest.raises(ValueError, match=r"sdpa_arguments: expected attention_mask to be 2-D"):
        attn_mask.sdpa_arguments(key, key, attention_mask=torch.ones(3))


def test_offsets_that_are_tensors_are_not_read():
    """Of keys, too; each row of the batch has its own."""
    query, key = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)
    offset = torch.tensor([[4], [2]])
    rule = rules.causal() & rules.sliding_window(2)
    want = [attn_mask.boolean(rule, 1, 3, 3, q_offset=3, kv_offset=int(of)) for of in offset]
    mask, is_causal = attn_mask.sdpa_arguments(query, key, rule, q_offset=3, kv_offset=offset)
    assert not is_causal and torch.equal(mask, torch.cat(want))
    mask, is_causal = attn_mask.sdpa_arguments(
        query, key, rule, q_offset=torch.tensor(3), kv_offset=offset[:1]
    )
    assert not is_causal and torch.equal(mask.expand_as(want[0].expand(2, -1, -1, -1))[:1], want[0])


@pytest.mark.parametrize(("dtype", "offset"), [(torch.int8, 100), (torch.uint8, 200)])
def test_a_narrow_offset_of_keys_holds_no_offset_of_queries(dtype, offset):
    """By default the last query and the last key are the same token: beyond what int8 holds."""
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 100, 4)
    rule, narrow = rules.causal() & rules.sliding_window(5), torch.tensor(offset, dtype=dtype)
    want = attn_mask.boolean(rule, 1, 3, 100, q_offset=offset + 97, kv_offset=offset)
    assert torch.equal(attn_mask.sdpa_arguments(query, key, rule, kv_offset=narrow)[0], want)
    assert torch.equal(
        attn_mask.scaled_dot_product_attention(query, key, key, rule, kv_offset=narrow),
        attn_mask.scaled_dot_product_attention(query, key, key, rule, kv_offset=offset),
    )
    plan = attn_mask.attention_plan(rule, 1, 3, 100, kv_offset=narrow)
    assert plan == attn_mask.attention_plan(rule, 1, 3, 100, kv_offset=offset)
