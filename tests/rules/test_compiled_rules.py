"""Rules as arguments of compiled functions: each gets the graph of its own structure."""

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules

N = 8
IDS = torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2]])
OTHERS = torch.tensor([[0, 1, 1, 1, 2, 2, 0, -1]])
POSITIONS = torch.tensor([3, 2, 1, 0, 7, 6, 5, 4])
BITS = torch.eye(N, dtype=torch.bool)[None, None]
START = torch.tensor([1])


def ids_at(table):
    return lambda q, k: table[0, q] == table[0, k]


def blocks_at(table):
    return lambda q, k: table[0, q] == table[0, k] >= 0


def both(*parts):
    return lambda q, k: all(part(q, k) for part in parts)


def either(*parts):
    return lambda q, k: any(part(q, k) for part in parts)


def causal(q, k):
    return k <= q


# A rule, and whether query q attends to key k. Of each kind several, with other numbers: dynamo
# compiles the second with symbolic ones.
CASES = [
    (lambda: rules.causal(), causal),
    (lambda: rules.bidirectional(), lambda q, k: True),
    (lambda: rules.nothing(), lambda q, k: False),
    (lambda: rules.sliding_window(3), lambda q, k: k >= q - 2),
    (lambda: rules.sliding_window(5), lambda q, k: k >= q - 4),
    (lambda: rules.window(1, 2), lambda q, k: q - 1 <= k <= q + 2),
    (lambda: rules.window(2, 3), lambda q, k: q - 2 <= k <= q + 3),
    (lambda: rules.window(-1, 3), lambda q, k: q + 1 <= k <= q + 3),
    (lambda: rules.window(4, -2), lambda q, k: q - 4 <= k <= q - 2),
    (lambda: rules.chunked(3), lambda q, k: k // 3 == q // 3),
    (lambda: rules.chunked(2), lambda q, k: k // 2 == q // 2),
    (lambda: rules.chunked(3, START), lambda q, k: (k - 1) // 3 == (q - 1) // 3),
    (lambda: rules.documents(IDS), ids_at(IDS)),
    (lambda: rules.documents(OTHERS), ids_at(OTHERS)),
    (lambda: rules.documents(IDS, max_documents=4, max_length=3), ids_at(IDS)),
    (lambda: rules.documents(IDS, max_documents=5, max_length=4), ids_at(IDS)),
    (lambda: rules.blockwise(IDS), blocks_at(IDS)),
    (lambda: rules.blockwise(OTHERS), blocks_at(OTHERS)),
    (lambda: rules.padding(IDS), lambda q, k: IDS[0, k] != 0),
    (lambda: rules.bits(BITS), lambda q, k: q == k),
    (
        lambda: rules.reindex(rules.causal(), POSITIONS),
        lambda q, k: POSITIONS[k] <= POSITIONS[q],
    ),
    (lambda: rules.shift(rules.causal(), 1, 3), lambda q, k: k + 3 <= q + 1),
    (lambda: rules.shift(rules.causal(), 2, 0), lambda q, k: k <= q + 2),
    (lambda: rules.shift(rules.causal(), torch.tensor(2), 0), lambda q, k: k <= q + 2),
    (lambda: rules.intersection(), lambda q, k: True),
    (lambda: rules.union(), lambda q, k: False),
    (lambda: rules.causal() & rules.sliding_window(3), both(causal, lambda q, k: k >= q - 2)),
    (lambda: rules.causal() & rules.sliding_window(2), both(causal, lambda q, k: k >= q - 1)),
    (lambda: rules.causal() | rules.sliding_window(3), either(causal, lambda q, k: k >= q - 2)),
    (lambda: rules.causal() & rules.documents(IDS), both(causal, ids_at(IDS))),
    (lambda: rules.documents(IDS) & rules.causal(), both(causal, ids_at(IDS))),
    (lambda: rules.causal() | rules.blockwise(OTHERS), either(causal, blocks_at(OTHERS))),
    (
        lambda: rules.blockwise(OTHERS) | rules.documents(IDS),
        either(blocks_at(OTHERS), ids_at(IDS)),
    ),
    (
        lambda: rules.causal() & rules.sliding_window(4) | rules.blockwise(IDS),
        either(both(causal, lambda q, k: k >= q - 3), blocks_at(IDS)),
    ),
    (
        lambda: rules.shift(rules.window(1, 0) | rules.causal() & rules.chunked(2), 1, 0),
        either(lambda q, k: q <= k <= q + 1, lambda q, k: k <= q + 1 and k // 2 == (q + 1) // 2),
    ),
]

FEW = CASES[:3] + CASES[12:14] + CASES[16:17] + CASES[-8:]

VIEWS = {
    "boolean": lambda rule: attn_mask.boolean(rule, 1, N, N),
    "additive": lambda rule: attn_mask.additive(rule, 1, N, N) == 0,
    "called": lambda rule: rule(
        torch.tensor(0), torch.tensor(0), torch.arange(N)[:, None], torch.arange(N)
    ),
    "sdpa_mask": lambda rule: masking_utils.sdpa_mask(
        1, N, N, mask_function=rule, allow_is_causal_skip=False
    ),
    "block mask": lambda rule: (
        attn_mask.create_block_mask(rule, 1, 1, N, N, "cpu", BLOCK_SIZE=1).to_dense() == 1
    ),
    # Attention to values that are one-hot: which keys have a weight.
    "attention": lambda rule: (
        attn_mask.scaled_dot_product_attention(
            torch.zeros(1, 1, N, N), torch.zeros(1, 1, N, N), torch.eye(N)[None, None], rule
        )
        > 0
    ),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=100):
        yield
    torch._dynamo.reset()


def elements(attends):
    return torch.tensor([[bool(attends(q, k)) for k in range(N)] for q in range(N)])


def check(of_rule, expected, *, dynamic, cases=CASES):
    """One compiled function for all rules, each more than once."""
    __tracebackhide__ = True
    compiled = torch.compile(of_rule, backend="eager", fullgraph=True, dynamic=dynamic)
    for make, attends in [*cases, *reversed(cases)]:
        mask = compiled(make())
        wanted = elements(expected(attends))
        assert torch.equal(mask.expand(1, 1, N, N)[0, 0], wanted), make()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("view", ["boolean", "called"])
def test_every_rule_as_an_argument(view, dynamic):
    check(VIEWS[view], lambda attends: attends, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("view", ["additive", "sdpa_mask", "block mask", "attention"])
def test_joined_rules_as_arguments(view, dynamic):
    check(VIEWS[view], lambda attends: attends, dynamic=dynamic, cases=FEW)


@pytest.mark.parametrize("dynamic", [None, True])
def test_rules_that_are_joined_in_the_graph(dynamic):
    check(
        lambda rule: attn_mask.boolean(rule & rules.window(4, 2) | rules.nothing(), 1, N, N),
        lambda attends: both(attends, lambda q, k: q - 4 <= k <= q + 2),
        dynamic=dynamic,
        cases=FEW,
    )


# dynamo guards no argument that is the same object as a global which was read before it.
@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda rule: rules.causal() | rule, lambda attends: either(causal, attends)),
        (lambda rule: rules.bidirectional() & rule, lambda attends: attends),
        (lambda rule: rules.nothing() | rule, lambda attends: attends),
        (
            lambda rule: rules.union(masking_utils.sliding_window_causal_mask_function(2), rule),
            lambda attends: either(lambda q, k: q - 1 <= k <= q, attends),
        ),
    ],
    ids=["causal", "bidirectional", "nothing", "sliding"],
)
def test_an_argument_that_the_graph_uses_itself(combine, expected):
    check(lambda rule: attn_mask.boolean(combine(rule), 1, N, N), expected, dynamic=None, cases=FEW)


def test_inductor():
    """With symbolic numbers in the rule."""
    compiled = torch.compile(VIEWS["boolean"], fullgraph=True, dynamic=True)
    for size in (2, 5, 3):
        mask = compiled(rules.causal() & rules.sliding_window(size))[0, 0]
        distance = torch.arange(N)[:, None] - torch.arange(N)
        assert torch.equal(mask, (distance >= 0) & (distance < size)), size
