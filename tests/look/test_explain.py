"""attn_mask.explain against element-wise evaluation: what it says, and of which leaves."""

import itertools
import re

import attn_mask
import numpy
import pytest
import rule_reference
import torch
from attn_mask import explain, masking_utils, rules
from hypothesis import given, settings
from rule_reference import (
    ALL,
    AND,
    ANY_LEAF,
    BITS,
    BLOCKS,
    CAUSAL,
    CHUNK,
    DOCUMENTS,
    NOTHING,
    OR,
    PADDING,
    REINDEX,
    SHIFT,
    WINDOW,
    calls,
)

OUTSIDE = "outside of a table"
SAID_OF = {
    OUTSIDE: r"outside the (ids|mask|positions) of ",
    ALL: r"^bidirectional\(\) (shows|masks)",
    NOTHING: r"^nothing\(\) masks",
    CAUSAL: r" which causal ",
    WINDOW: r"(in|out)side (the )?window",
    CHUNK: r"\(chunks of ",
    BLOCKS: r" (in|both in|in no) block",
    DOCUMENTS: r" (in|both in) document",
    PADDING: r" is (no )?padding$",
}


def made(tree, operands):
    """The rule of a parsed program."""
    opcode, parameters, children = tree
    parts = [made(child, operands) for child in children]
    tables = {BLOCKS: rules.blockwise, PADDING: rules.padding, DOCUMENTS: rules.documents}
    if opcode in tables:
        return tables[opcode](operands[parameters[0]])
    if opcode in (AND, OR):
        return (rules.intersection if opcode == AND else rules.union)(*parts)
    if opcode == WINDOW:
        return rules.window(*(None if side == -1 else side for side in parameters))
    if opcode == CHUNK:
        size, operand = parameters
        return rules.chunked(size, None if operand == -1 else operands[operand])
    if opcode == REINDEX:
        return rules.reindex(parts[0], operands[parameters[0]])
    if opcode == SHIFT:
        return rules.shift(parts[0], *parameters)
    return {ALL: rules.bidirectional, CAUSAL: rules.causal, NOTHING: rules.nothing}[opcode]()


def decided(tree, tables, b, q, k, from_table=False):
    """Whether q attends to k, and the opcodes of the leaves that decide it.

    Raises IndexError where a position that no table gave is outside of one.
    """
    opcode, parameters, children = tree
    if opcode in (AND, OR):
        parts = [decided(child, tables, b, q, k, from_table) for child in children]
        attends = (all if opcode == AND else any)(of for of, _ in parts)
        return attends, set().union(*(names for of, names in parts if of == attends))
    if opcode == SHIFT:
        moved = q + parameters[0], k + parameters[1]
        return decided(children[0], tables, b, *moved, from_table)
    if opcode in (REINDEX, BLOCKS, PADDING, DOCUMENTS):
        table = tables[parameters[0]]
        row = table[b if len(table) > 1 else 0]
        if not all(0 <= at < len(row) for at in ([k] if opcode == PADDING else [q, k])):
            if not from_table:
                raise IndexError
            return False, {OUTSIDE}
        if opcode == REINDEX:
            return decided(children[0], tables, b, row[q], row[k], True)
    if opcode == ALL or (opcode == WINDOW and parameters == (-1, -1)):
        return True, {ALL}
    return rule_reference.attends(tree, tables, b, 0, q, k, q, k), {opcode}


@given(call=calls(leaves=tuple(leaf for leaf in ANY_LEAF if leaf != BITS), min_size=1))
@settings(max_examples=150)
def test_leaves_that_decide(call):
    rule = made(call.tree, call.operands)
    tables = [rule_reference._table(operand) for operand in call.operands]
    elements = itertools.product(
        range(call.batch_size), range(call.q_length), range(min(call.kv_length, 10))
    )
    for b, q, k in itertools.islice(elements, 60):
        try:
            attends, leaves = decided(call.tree, tables, b, q, k)
        except IndexError:
            # In some order: only one of several is reported, and perhaps none that is needed.
            with pytest.raises(IndexError, match=r"^explain: expected [bqk] to be inside the "):
                explain(rule, q=q, k=k, b=b)
            continue
        verdict, reasons = explain(rule, q=q, k=k, b=b).split(": ", 1)
        assert verdict == ("attends" if attends else "does not attend")
        said = set()
        for reason in reasons.split("; "):
            (leaf,) = (leaf for leaf, text in SAID_OF.items() if re.search(text, reason))
            said.add(leaf)
        assert said == leaves, (rule, b, q, k, reasons)


IDS = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 7, 7]])
BLOCK_IDS = torch.tensor([-1, 2, 2, 3, -1, -1])
SHOWN = torch.tensor([[0, 1, 1, 1, 1, 1]])
REVERSED = torch.tensor([5, 4, 3, 2, 1, 90])
BIT = torch.zeros(1, 2, 6, 6, dtype=torch.bool).index_put_(
    tuple(torch.tensor(at) for at in (0, 1, 2, 3)), torch.tensor(True)
)


def even(b, h, q, k):
    return k % 2 == 0


@pytest.mark.parametrize(
    ("rule", "element", "text"),
    [
        (
            rules.causal() & rules.sliding_window(4),
            dict(q=8, k=3),
            "does not attend: key 3 is 5 before query 8, outside the window of 4 keys",
        ),
        (rules.sliding_window(1), dict(q=3, k=2), "outside the window of 1 key"),
        (rules.window(1, 2), dict(q=0, k=3), "key 3 is 3 after query 0, outside window(1, 2)"),
        (rules.causal(), dict(q=2, k=5), "key 5 is 3 after query 2, which causal masks"),
        (rules.causal(), dict(q=2, k=2), "key 2 is at the position of query 2, which causal show"),
        (
            rules.chunked(4),
            dict(q=9, k=3),
            "key 3 is in chunk 0 and query 9 in chunk 2 (chunks of 4)",
        ),
        (
            rules.chunked(4, torch.tensor([3])),
            dict(q=9, k=8, b=5),
            "key 8 and query 9 are both in chunk 1 (chunks of 4 from 3 on)",
        ),
        (
            rules.documents(IDS),
            dict(q=5, k=0, b=1),
            "key 0 is in document 0 and query 5 in document 7",
        ),
        (rules.documents(IDS), dict(q=2, k=0), "key 0 and query 2 are both in document 0"),
        (rules.blockwise(BLOCK_IDS), dict(q=0, k=4), "query 0 is in no block (its id is -1)"),
        (rules.blockwise(BLOCK_IDS), dict(q=1, k=4), "key 4 is in no block (its id is -1)"),
        (rules.padding(SHOWN), dict(q=4, k=0, b=2), "does not attend: key 0 is padding"),
        (rules.padding(SHOWN), dict(q=400, k=1), "attends: key 1 is no padding"),
        (rules.bits(BIT), dict(q=2, k=3), "does not attend: bits mask key 3 for query 2"),
        (rules.bits(BIT), dict(q=2, k=3, h=1, b=4), "attends: bits show key 3 for query 2"),
        (rules.shift(rules.bits(BIT), 2, 2), dict(q=2, k=3, h=1), "attends: bits show key 3"),
        (rules.nothing(), dict(q=0, k=0), "does not attend: nothing() masks key 0 for query 0"),
        (rules.union(), dict(q=0, k=0), "does not attend: union of no rules masks all"),
        (rules.intersection(), dict(q=0, k=0), "attends: intersection of no rules shows all"),
        (rules.function(even), dict(q=0, k=1), "does not attend: function(even) masks key 1"),
        (even, dict(q=0, k=2), "attends: function(even) shows key 2 for query 0"),
        (
            rules.shift(rules.causal(), 0, 3),
            dict(q=4, k=2),
            "key 2 (position 5) is 1 after query 4, which causal masks",
        ),
        (
            rules.reindex(rules.causal(), REVERSED),
            dict(q=0, k=4),
            "attends: key 4 (position 1) is 4 before query 0 (position 5), which causal shows",
        ),
        (
            rules.reindex(rules.documents(IDS[:1]), REVERSED),
            dict(q=5, k=4),
            "does not attend: query 5 (position 90) is outside the ids of documents, of length 6",
        ),
        (
            masking_utils.padding_mask_function(SHOWN.bool()),
            dict(q=0, k=0),
            "does not attend: key 0 is padding",
        ),
        (
            masking_utils.sliding_window_causal_mask_function(2),
            dict(q=4, k=1),
            "does not attend: key 1 is 3 before query 4, outside the window of 2 keys",
        ),
    ],
)
def test_texts(rule, element, text):
    assert text in explain(rule, **element)


def test_the_same_reason_is_given_once():
    once = explain(rules.causal(), q=1, k=2)
    assert explain(rules.causal() | rules.causal(), q=1, k=2) == once


def test_positions_from_the_end_of_upstreams_tables():
    """As upstream's closures count them."""
    mask = masking_utils.padding_mask_function(SHOWN.bool())
    for offset in (-1, -6):
        shifted = masking_utils.add_offsets_to_mask_function(mask, 0, offset)
        want = bool(attn_mask.boolean(shifted, 1, 1, 1)[0, 0, 0, 0])
        assert explain(shifted, q=0, k=0).startswith("attends" if want else "does not attend")


def test_integers_of_numpy_are_those_of_python():
    """int8 would overflow where offsets are added."""
    rule = rules.shift(rules.causal() & rules.sliding_window(2), 100, 99)
    got = explain(rule, q=numpy.int8(100), k=numpy.int8(100), b=numpy.int64(0))
    assert got == explain(rule, q=100, k=100)


def test_deep_trees():
    rule = rules.causal()
    for size in range(84):  # 253 deep
        rule = rules.shift(rule | rules.nothing(), 0, 0) & rules.sliding_window(size + 1)
    assert explain(rule, q=3, k=3).startswith("attends")


@pytest.mark.parametrize(
    ("element", "error", "text"),
    [
        (
            dict(q=6, k=0),
            IndexError,
            "q to be inside the ids of documents, of size 6, but it is at 6",
        ),
        (
            dict(q=0, k=9),
            IndexError,
            "k to be inside the ids of documents, of size 6, but it is at 9",
        ),
        (dict(q=0, k=0, b=2), IndexError, "b to be inside the ids of documents, of size 2"),
        (dict(q=-1, k=0), IndexError, "q to be 0 or more, but got -1"),
        (dict(q=0, k=0, h=-3), IndexError, "h to be 0 or more, but got -3"),
        (dict(q=0.5, k=0), TypeError, "q to be an int, but got float"),
        (dict(q=True, k=0), TypeError, "q to be an int, but got bool"),
        (dict(q=0, k=torch.tensor(1)), TypeError, "k to be an int, but got Tensor"),
        (dict(q=0, k=numpy.array([1])), TypeError, "k to be an int, but got ndarray"),
    ],
)
def test_wrong_elements(element, error, text):
    with pytest.raises(error, match=f"^explain: expected {re.escape(text)}"):
        explain(rules.documents(IDS), **element)


@pytest.mark.parametrize(
    ("rule", "error", "text"),
    [
        (None, TypeError, "rule to be callable, but got NoneType"),
        (rules.causal, TypeError, "rule to be a mask function, but got causal, which makes one"),
        (lambda b, h, q, k: q + k, TypeError, "mask_function to return a bool tensor"),
        (
            lambda b, h, q, k: torch.ones(2, dtype=torch.bool),
            ValueError,
            "mask_function to return one element for indices [], but got [2]",
        ),
        (
            rules.shift(rules.causal(), torch.tensor([[1], [2]]), 0),
            ValueError,
            "offsets of shift to be of one element, but got [2, 1]",
        ),
        (
            rules.bits(BIT),
            IndexError,
            "h to be inside the attends of bits, of size 2, but it is at 2",
        ),
    ],
)
def test_wrong_rules(rule, error, text):
    with pytest.raises(error, match=f"^explain: expected {re.escape(text)}"):
        explain(rule, q=0, k=0, h=2)
