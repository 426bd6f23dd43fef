"""Rules at positions from tables of every shape: in order, in order for a while, in none."""

import pytest
import torch
from attn_mask import boolean, create_block_mask, rules
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import assert_same_mask
from torch.nn.attention import flex_attention

pytestmark = pytest.mark.usefixtures("one_thread")

TENSORS = [name for name in flex_attention.BlockMask._TENSOR_ATTRS if not name.startswith("dq")]
INT32 = torch.iinfo(torch.int32)

# A row of `n` positions.
ROWS = {
    "falls": lambda n: torch.arange(n).flip(0),
    "rises by 2": lambda n: 2 * torch.arange(n),
    "falls by 3 from 0": lambda n: -3 * torch.arange(n),
    "repeats": lambda n: torch.arange(n) // 16,
    "begins anew": lambda n: torch.arange(n) % 13,
    "constant": lambda n: torch.full((n,), 5),
    "any": torch.randperm,
    "any steps upwards": lambda n: torch.randint(0, 9, (n,)).cumsum(0),
    "any steps downwards": lambda n: -torch.randint(0, 9, (n,)).cumsum(0),
    "around the least int32": lambda n: INT32.min + torch.arange(n),
    "around the greatest int32": lambda n: INT32.max - torch.arange(n),
    "far": lambda n: torch.arange(n) << 33,
    "far, any": lambda n: torch.randperm(n) * -(1 << 40),
    "near and far": lambda n: torch.tensor([0, 7, 1 << 45, -(1 << 62)])[torch.randint(4, (n,))],
}

# Rules by position, and such beside them as read the mask's own.
INNER = {
    "causal": lambda n: rules.causal(),
    "window": lambda n: rules.causal() & rules.sliding_window(9),
    "window of one": lambda n: rules.window(0, 0),
    "chunks": lambda n: rules.causal() & rules.chunked(6),
}
BESIDE = {
    "nothing": None,
    "sink": lambda n: rules.padding((torch.arange(n) < 3)[None]),
    "padding": lambda n: rules.padding(torch.rand(1, n) > 0.4),
    "documents": lambda n: rules.documents((torch.arange(n) // 11)[None]),
    "ids without runs": lambda n: rules.documents((torch.arange(n) % 5)[None]),
    "images": lambda n: rules.blockwise((torch.arange(n) // 7 % 3 - 1)[None]),
    "causal": lambda n: rules.causal(),
    "rare bits": lambda n: rules.bits(torch.rand(1, 1, n, n) > 0.99),
}


@st.composite
def trees(draw):
    """A tree for some queries and keys, of a batch."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch_size, n = draw(st.integers(1, 3)), draw(st.integers(1, 90))
    dtypes = [torch.int64, torch.int32]
    rows = [ROWS[draw(st.sampled_from(list(ROWS)))](n) for _ in range(batch_size)]
    table = torch.stack(rows[: draw(st.sampled_from([1, batch_size]))])
    if draw(st.booleans()) and table.abs().max() <= INT32.max:
        table = table.to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        table = torch.stack([table, table + 1], dim=-1)[..., 0]
    inner = INNER[draw(st.sampled_from(list(INNER)))](n)
    rule = rules.reindex(inner, table)
    if draw(st.booleans()) and draw(st.booleans()):  # seen at other positions in turn
        rule = rules.reindex(rule, torch.randint(0, n, (1, n)))
    beside = BESIDE[draw(st.sampled_from(list(BESIDE)))]
    if beside is not None:
        other = beside(n)
        rule = draw(
            st.sampled_from(
                [rule & other, rule | other, (rules.causal() & other) | rule, (rule | other) & rule]
            )
        )
    return rule, batch_size, n


def by_element(rule, batch_size, n):
    i = torch.arange(n)
    batch_idx = torch.arange(batch_size)[:, None, None, None]
    result = rule(batch_idx, torch.zeros(1, 1, 1, 1, dtype=int), i[:, None], i[None, :])
    return result.expand(batch_size, 1, n, n)


@settings(max_examples=300)
@given(trees())
def test_dense(tree):
    rule, batch_size, n = tree
    assert_same_mask(boolean(rule, batch_size, n, n), by_element(rule, batch_size, n))


@settings(max_examples=300)
@given(trees(), st.integers(1, 40), st.integers(1, 40))
def test_blocks(tree, q_block, kv_block):
    rule, batch_size, n = tree
    sizes = batch_size, 1, n, n
    got = create_block_mask(rule, *sizes, "cpu", (q_block, kv_block))
    mask = by_element(rule, batch_size, n)
    q_blocks, kv_blocks = -(-n // q_block), -(-n // kv_block)
    padded = torch.zeros(batch_size, 1, q_blocks * q_block, kv_blocks * kv_block, dtype=torch.bool)
    padded[:, :, :n, :n] = mask
    count = padded.view(batch_size, 1, q_blocks, q_block, kv_blocks, kv_block).sum((3, 5))
    full = count == q_block * kv_block
    for kind, want in (("", (count > 0) & ~full), ("full_", full)):
        for line, blocks in (("kv", want), ("q", want.mT)):
            numbers = getattr(got, f"{kind}{line}_num_blocks")
            assert torch.equal(numbers, blocks.sum(-1, dtype=torch.int32))
            order = blocks.int().argsort(dim=-1, descending=True, stable=True)
            assert torch.equal(getattr(got, f"{kind}{line}_indices"), order.int())


@pytest.mark.parametrize("kind", ROWS)
def test_listed_keys(kind):
    """Positions of the mask's own keys, without a rule that moves them."""
    n = 50
    torch.manual_seed(1)
    keys, queries = ROWS[kind](n), ROWS[kind](n).roll(3)
    code, operands = (rules.causal() & rules.sliding_window(9)).encode()
    got = torch.ops.attn_mask.boolean(
        code, operands, 1, n, n, q_positions=queries, kv_positions=keys
    )
    distance = queries[:, None] - keys[None, :]
    assert_same_mask(got, ((distance >= 0) & (distance < 9))[None, None])


@pytest.mark.parametrize("threads", [1, 3])
def test_several_threads(threads):
    """What is worked out when it is first used is so for all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            n = 700
            tables = torch.stack([torch.randperm(n), torch.arange(n).flip(0)])
            rule = rules.reindex(rules.causal(), tables) | rules.padding(torch.rand(2, n) > 0.5)
            assert_same_mask(boolean(rule, 2, n, n), by_element(rule, 2, n))
            want = flex_attention.create_block_mask(rule, 2, 1, n, n, "cpu")
            got = create_block_mask(rule, 2, 1, n, n, "cpu")
            for name in TENSORS:
                assert torch.equal(getattr(got, name), getattr(want, name)), name
    finally:
        torch.set_num_threads(before)
