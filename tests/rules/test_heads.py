"""Mask functions that look at the head, where masks are made for attention of several heads."""

import re

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules

B, H, Q, KV = 2, 6, 5, 7

WIDTHS = torch.tensor([1, 3, 2, 7, 4, 5])
ONE_WIDTH = torch.tensor([3])


def by_table(b, h, q, k):
    """With one element it fails of a head that does not exist."""
    return q - k < WIDTHS[h]


def by_table_of_one(b, h, q, k):
    return (q - k < ONE_WIDTH[h]) & (k <= q)


def by_group(b, h, q, k):
    """Heads 0 and 1 are alike."""
    return k <= q + h // 2


def by_branch(b, h, q, k):
    if (h > 0).any():
        return k <= q
    return k >= q


def by_number(b, h, q, k):
    return k <= q + h.max().item()


def by_list(b, h, q, k):
    return k <= q + torch.tensor(h.tolist()).max()


def by_array(b, h, q, k):
    return k <= q + torch.from_numpy(h.numpy() // 2)


def by_write(b, h, q, k):
    result = torch.zeros(1, 1, Q, KV, dtype=torch.int64) + k
    result -= h[:, :1]
    return result <= q


def by_batch_and_head(b, h, q, k):
    return (b + h) % 2 == (q + k) % 2


LOOK = [
    by_table,
    by_table_of_one,
    by_group,
    by_branch,
    by_number,
    by_list,
    by_array,
    by_write,
    by_batch_and_head,
]

BROADCAST = [by_table, by_group, by_batch_and_head]


class Compared(torch.autograd.Function):
    """torch.vmap can't run it, whatever is mapped over."""

    @staticmethod
    def forward(ctx, first, second):
        return first <= second

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def plain(b, h, q, k):
    return k <= q


def of_branch(b, h, q, k):
    return k <= q if q.max() > 0 else k < q


def of_numbers(b, h, q, k):
    return k <= q + (k.max().item() - k.tolist()[0][0][0][-1])


def of_array(b, h, q, k):
    return torch.from_numpy(k.numpy() <= q.numpy())


def of_write(b, h, q, k):
    result = torch.zeros(1, 1, Q, KV, dtype=torch.bool)
    result[:] = k <= q
    return result


def of_autograd(b, h, q, k):
    return Compared.apply(k, q)


def of_random_numbers(b, h, q, k):
    return (k <= q) & (torch.rand(Q, KV) >= 0)


DO_NOT_LOOK = [
    plain,
    of_branch,
    of_numbers,
    of_array,
    of_write,
    of_autograd,
    of_random_numbers,
]


def named(functions):
    return pytest.mark.parametrize("function", functions, ids=lambda function: function.__name__)


def elements(function, heads):
    """The function at one element at a time, [b, heads, q, kv]."""
    mask = torch.empty(B, heads, Q, KV, dtype=torch.bool)
    for b, h, q, k in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        mask[b, h, q, k] = function(*(torch.tensor([[[[i]]]]) for i in (b, h, q, k))).all()
    return mask


CAUSAL = torch.ones(Q, KV, dtype=torch.bool).tril().expand(B, 1, Q, KV)


def additive(*args, **kwargs):
    return attn_mask.additive(*args, **kwargs) == 0


@named(BROADCAST)
@pytest.mark.parametrize("make", [attn_mask.boolean, additive], ids=["boolean", "additive"])
def test_each_head_has_its_mask(make, function):
    wanted = elements(function, H)
    assert torch.equal(make(function, B, Q, KV, heads=H), wanted)
    within = make(rules.causal() & function, B, Q, KV, heads=H)
    assert torch.equal(within, wanted & CAUSAL)
    turned = make(rules.reindex(function, torch.arange(KV)), B, Q, KV, heads=H)
    assert torch.equal(turned, wanted)


@named(LOOK)
@pytest.mark.parametrize("make", [attn_mask.boolean, additive], ids=["boolean", "additive"])
def test_one_head_does_not_stand_for_several(make, function):
    text = rf"(boolean|additive): expected heads .*function\({function.__name__}\).* depends on the"
    for rule in (function, rules.causal() & function, rules.shift(function, 0, 0)):
        with pytest.raises(ValueError, match=text):
            make(rule, B, Q, KV)


@named(DO_NOT_LOOK)
def test_functions_of_no_head_go_on_to_work(function):
    for rule in (function, rules.function(function) | rules.nothing()):
        assert torch.equal(attn_mask.boolean(rule, B, Q, KV), CAUSAL)
        assert torch.equal(attn_mask.boolean(rule, B, Q, KV, heads=H), CAUSAL.expand(B, H, Q, KV))


def test_errors_of_functions_are_theirs():
    def fails(b, h, q, k):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attn_mask.boolean(fails, B, Q, KV)
    with pytest.raises(TypeError, match="to return a bool tensor, but got int"):
        attn_mask.boolean(lambda b, h, q, k: 3, B, Q, KV)


def test_a_function_is_called_once(monkeypatch):
    """For each part of a mask."""
    calls = []

    def counted(b, h, q, k):
        calls.append(q.shape)
        return k <= q

    attn_mask.boolean(counted, B, Q, KV)
    assert len(calls) == 1


def test_under_vmap():
    """What is mapped over outside is no head."""
    limits = torch.tensor([1, 3, 6])
    got = torch.vmap(lambda limit: attn_mask.boolean(lambda b, h, q, k: k < limit, 1, Q, KV))(
        limits
    )
    wanted = (torch.arange(KV) < limits[:, None])[:, None].expand(3, Q, KV)
    assert torch.equal(got[:, 0, 0], wanted)


@pytest.mark.parametrize(
    "rule",
    [
        rules.causal(),
        rules.padding(torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 1]])),
        rules.bits(torch.ones(1, 1, Q, KV, dtype=torch.bool).tril()),
    ],
    ids=repr,
)
def test_rules_are_the_same_for_all_heads(rule):
    one = attn_mask.boolean(rule, B, Q, KV)
    assert one.shape == (B, 1, Q, KV)
    several = attn_mask.boolean(rule, B, Q, KV, heads=H)
    assert torch.equal(several, one.expand(B, H, Q, KV))
    assert several.stride(1) == 0
    out = torch.empty(B, H, Q, KV, dtype=torch.bool)
    assert attn_mask.boolean(rule, B, Q, KV, heads=H, out=out) is out
    assert torch.equal(out, several)


def test_into_out():
    wanted = elements(by_table, H)
    out = torch.empty(H, B, Q, KV, dtype=torch.bool).transpose(0, 1)
    assert attn_mask.boolean(by_table, B, Q, KV, heads=H, out=out) is out
    assert torch.equal(out, wanted)
    out = torch.empty(B, H, Q, KV, dtype=torch.float16)
    attn_mask.additive(by_table, B, Q, KV, heads=H, out=out, dtype=torch.float16)
    assert torch.equal(out == 0, wanted)
    text = re.escape("expected out to be [2, 6, 5, 7] of torch.bool, but got [2, 1, 5, 7]")
    with pytest.raises(ValueError, match=text):
        attn_mask.boolean(by_table, B, Q, KV, heads=H, out=out.bool()[:, :1])


def test_heads_of_tensors():
    bits = rules.bits(torch.rand(1, H, Q, KV) > 0.5)
    for heads in (1, H):
        mask = attn_mask.boolean(bits & by_table, B, Q, KV, heads=heads)
        assert torch.equal(mask, bits.attends & elements(by_table, H))
    bias = torch.randn(1, H, Q, KV)
    mask = attn_mask.additive(by_table, B, Q, KV, bias=bias)
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(mask, torch.where(elements(by_table, H), bias, lowest))
    text = "boolean: expected heads to be 6, as bits or the bias have, but got 3"
    with pytest.raises(ValueError, match=text):
        attn_mask.boolean(bits, B, Q, KV, heads=3)
    with pytest.raises(ValueError, match="additive: expected heads to be 6, as bits or the bias"):
        attn_mask.additive(rules.causal(), B, Q, KV, heads=3, bias=bias)


def test_heads_is_a_size():
    assert attn_mask.boolean(rules.causal(), B, Q, KV, heads=0).shape == (B, 0, Q, KV)
    with pytest.raises(
        ValueError, match=r"boolean: expected heads to be a size \(>= 0\), but got -1"
    ):
        attn_mask.boolean(rules.causal(), B, Q, KV, heads=-1)
    with pytest.raises(TypeError, match="boolean: expected heads to be an int, but got float"):
        attn_mask.boolean(rules.causal(), B, Q, KV, heads=2.0)
    with pytest.raises(TypeError, match="sdpa_arguments: expected heads to be an int"):
        attn_mask.sdpa_arguments(*states(), rules.causal(), heads=2.0)


def states():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, H, length, 4, generator=generator) for length in (Q, KV))


@named([*BROADCAST, plain])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_sdpa_arguments(function, dtype):
    query, key = states()
    got = attn_mask.sdpa_arguments(query, key, function, q_offset=0, dtype=dtype)
    mask = got.attn_mask if dtype is None else got.attn_mask == 0
    assert torch.equal(mask.expand(B, H, Q, KV), elements(function, H))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = attn_mask.scaled_dot_product_attention(query, key, key, function, q_offset=0)
    visible = elements(function, H).any(-1, keepdim=True)
    wanted = torch.where(visible, sdpa(query, key, key, got.attn_mask), 0)
    torch.testing.assert_close(out, wanted)


def test_heads_of_sdpa_arguments():
    query, key = states()
    with pytest.raises(ValueError, match=r"sdpa_arguments: expected heads .* depends on the head"):
        attn_mask.sdpa_arguments(query, key, by_table, heads=1)
    mask = attn_mask.sdpa_arguments(query, key, plain, q_offset=0, heads=1).attn_mask
    assert torch.equal(mask, CAUSAL)
    assert attn_mask.sdpa_arguments(query, key, rules.window(1, 1)).attn_mask.shape[1] == 1
    with pytest.raises(ValueError, match="expected heads to be 1 or 6, as query has, but got 2"):
        attn_mask.sdpa_arguments(query, key, rules.causal(), heads=2)
    one = attn_mask.sdpa_arguments(query[:, :1], key[:, :1], by_table, q_offset=0)
    assert torch.equal(one.attn_mask, elements(by_table, 1))


def test_mirrors_evaluate_the_first_head():
    """As transformers does."""
    mask = masking_utils.sdpa_mask(B, Q, KV, mask_function=by_table, allow_is_causal_skip=False)
    assert torch.equal(mask, elements(by_table, 1))


def test_in_a_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: attn_mask.boolean(by_table, B, Q, KV, heads=H), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(), elements(by_table, H))


def test_rules_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(attn_mask._core.write, "evaluate_mapped", None)
    attn_mask.boolean(rules.causal() & rules.padding(torch.ones(1, KV)), B, Q, KV)
    before = rules.shift(rules.documents(torch.zeros(1, KV, dtype=torch.int8)), 0, 0)
    attn_mask.boolean(before, B, Q, KV)


def test_pictures_of_a_head():
    for h in range(H):
        rows = elements(by_table, H)[0, h]
        assert attn_mask.show(by_table, Q, KV, head=h) == attn_mask.show(rows)
        told = attn_mask.explain(rules.function(by_table), q=4, k=1, h=h)
        assert told.startswith("attends") == bool(rows[4, 1])
