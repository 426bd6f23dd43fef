"""The worked examples of three public documents about this file, as patterns of visibility.

document 000  the docstrings of the file in today's releases
document 001  an annotated copy of the file as it was in 4.36 to 4.38
document 002  an annotated copy from 4.40 on, with examples worked out (window: W + 1 keys)

0 is a key that is seen, - one that is not. Of document 001 only the example that all the releases
share is here.
"""

import pytest
import torch
from attn_mask.modeling_attn_mask_utils import (
    AttentionMaskConverter,
    _create_4d_causal_attention_mask,
    _prepare_4d_causal_attention_mask,
)
from masks import assert_same_mask, lowest, visibility

FLOAT = torch.float32

# Two sentences of three and four characters, padded at the left.
LEFT_PADDED = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

CAUSAL = ["0---", "00--", "000-", "0000"]
CAUSAL_SHORT = ["000-", "0000"]
CAUSAL_PREFIX = ["000---", "0000--", "00000-", "000000"]
CAUSAL_WINDOW = ["-00---", "--00--", "---00-", "----00"]
LEFT_PADDED_CAUSAL = [["----", "-0--", "-00-", "-000"], CAUSAL]


@pytest.mark.parametrize("document", ["000", "001", "002"])
def test_docstring_example_of_documents_000_001_002(document):
    converter = AttentionMaskConverter(True)
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    got = converter.to_4d(mask, 5, key_value_length=5, dtype=FLOAT)
    assert visibility(got) == [["-----", "-----", "-----", "---0-", "---00"]]
    assert f"{got[0, 0, 0, 0]:.4e}" == "-3.4028e+38"


def test_repr_of_document_002():
    expected = "AttentionMaskConverter(is_causal=True, sliding_window=None)"
    assert repr(AttentionMaskConverter(True)) == expected


def test_unmask_drawing_of_document_000():
    """The drawing shows 1 for visible cells of a mask whose masked ones hold the lowest number."""
    drawn = [
        [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
    ]
    modified = [
        [[1, 1, 1], [1, 1, 1], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 1, 1], [0, 1, 0], [0, 1, 1]],
    ]
    low = lowest(FLOAT)
    mask = torch.tensor(drawn)[:, None]
    additive = torch.zeros(mask.shape).masked_fill(mask == 0, low)
    got = AttentionMaskConverter._unmask_unattended(additive, low)
    assert (got == 0).int()[:, 0].tolist() == modified


def test_4d_shape_of_document_000():
    """[bsz, head_dim=1, query_length, key_value_length]"""
    got = AttentionMaskConverter(True).to_causal_4d(3, 2, 5, FLOAT)
    assert got.shape == (3, 1, 2, 5)


# Every pattern of to_causal_4d in document 002 is there again for _create_4d_causal_attention_mask.
CAUSAL_EXAMPLES = pytest.mark.parametrize(
    ("q_length", "kv_length", "window", "rows"),
    [
        (4, 4, None, CAUSAL),
        (2, 4, None, CAUSAL_SHORT),
        (4, 6, None, CAUSAL_PREFIX),
        (4, 6, 1, CAUSAL_WINDOW),
    ],
    ids=["plain", "two queries left", "prefix", "prefix and window"],
)


@CAUSAL_EXAMPLES
def test_to_causal_4d_of_document_002(q_length, kv_length, window, rows):
    converter = AttentionMaskConverter(True, window)
    assert visibility(converter.to_causal_4d(2, q_length, kv_length, FLOAT)) == [rows, rows]


@CAUSAL_EXAMPLES
def test_create_4d_causal_attention_mask_of_document_002(q_length, kv_length, window, rows):
    got = _create_4d_causal_attention_mask(
        (2, q_length), FLOAT, "cpu", kv_length - q_length, window
    )
    assert visibility(got) == [rows, rows]


def test_one_query_left_of_document_002():
    assert AttentionMaskConverter(True).to_causal_4d(2, 1, 4, FLOAT) is None
    assert _create_4d_causal_attention_mask((2, 1), FLOAT, "cpu", 3) is None


def test_make_causal_mask_of_document_002():
    got = AttentionMaskConverter(True)._make_causal_mask((1, 4), FLOAT, "cpu")
    assert visibility(got) == [CAUSAL]


def test_expand_mask_of_document_002():
    got = AttentionMaskConverter(True)._expand_mask(torch.tensor([[0, 0, 0, 1, 1]]), FLOAT)
    assert visibility(got) == [["---00"] * 5]


def test_to_4d_of_document_002():
    got = AttentionMaskConverter(True).to_4d(LEFT_PADDED, 4, FLOAT, 4)
    assert visibility(got) == LEFT_PADDED_CAUSAL


def test_to_4d_with_one_query_of_document_002():
    got = AttentionMaskConverter(True).to_4d(LEFT_PADDED, 1, FLOAT, 4)
    assert visibility(got) == [["-000"], ["0000"]]


def test_to_4d_with_a_prefix_of_document_002():
    prefixed = torch.cat([torch.ones(2, 2, dtype=torch.int64), LEFT_PADDED], dim=1)
    got = AttentionMaskConverter(True).to_4d(prefixed, 4, FLOAT, 6)
    assert visibility(got) == [["00----", "00-0--", "00-00-", "00-000"], CAUSAL_PREFIX]


@pytest.mark.parametrize("kv_length", [None, 4])
def test_bidirectional_to_4d_of_document_002(kv_length):
    got = AttentionMaskConverter(False).to_4d(LEFT_PADDED, 4, FLOAT, kv_length)
    assert visibility(got) == [["-000"] * 4, ["0000"] * 4]


# The document passes embeds of two dimensions: only their dtype and device are read.
def test_prepare_with_padding_of_document_002():
    got = _prepare_4d_causal_attention_mask(LEFT_PADDED, [2, 4], torch.randn([1, 4]), 0, None)
    assert visibility(got) == LEFT_PADDED_CAUSAL


def test_prepare_without_mask_of_document_002():
    got = _prepare_4d_causal_attention_mask(None, [2, 4], torch.randn([2, 4]), 0, None)
    assert visibility(got) == [CAUSAL, CAUSAL]


MASK_4D = torch.tensor(
    [
        [[[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    ]
)


def test_prepare_with_a_4d_mask_of_document_002():
    got = _prepare_4d_causal_attention_mask(MASK_4D, [2, 4], torch.randn([2, 4]), 0, None)
    assert visibility(got) == LEFT_PADDED_CAUSAL


def test_unmask_unattended_of_document_002():
    """The first row was all padding; it is unmasked, with zeros that are negative."""
    mask = _prepare_4d_causal_attention_mask(MASK_4D, [2, 4], torch.randn([2, 4]), 0, None)
    got = AttentionMaskConverter(True)._unmask_unattended(mask, lowest(FLOAT))
    want = mask.clone()
    want[0, 0, 0] = -0.0
    assert_same_mask(got, want)
    assert visibility(got) == [["0000", *LEFT_PADDED_CAUSAL[0][1:]], CAUSAL]
