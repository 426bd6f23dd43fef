"""Masks of more than 2^31 elements, which 32-bit offsets would wrap around."""

import attn_mask  # noqa: F401 - registers the operators
import pytest
import torch
from masks import assert_same_mask, lowest

pytestmark = pytest.mark.slow

LENGTH = 46400  # 46400 ** 2 > 2 ** 31
DTYPE = torch.float16
LOW = lowest(DTYPE)


@pytest.fixture(scope="module")
def padding():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (1, LENGTH), generator=generator) > 0


def sampled_rows():
    """The first and last ones, and those around the 2^31st element."""
    turning = 2**31 // LENGTH
    return (0, 1, LENGTH // 2, turning - 1, turning, turning + 1, LENGTH - 2, LENGTH - 1)


def additive(visible):
    return torch.zeros(visible.shape, dtype=DTYPE).masked_fill(~visible, LOW)


def assert_rows(mask, visible_keys):
    assert mask.numel() > 2**31
    for row in sampled_rows():
        assert_same_mask(mask[0, 0, row], additive(visible_keys(row)))


@pytest.mark.parametrize("window", [None, 1000])
def test_to_4d(padding, window):
    keys = torch.arange(LENGTH)
    got = torch.ops.attn_mask.to_4d(
        padding, LENGTH, dtype=DTYPE, key_value_length=LENGTH, sliding_window=window
    )
    first = 0 if window is None else window
    assert_rows(
        got,
        lambda row: padding[0] & (keys <= row) & ((keys >= row - first) if window else True),
    )


def test_to_causal_4d():
    keys = torch.arange(LENGTH)
    assert_rows(
        torch.ops.attn_mask.to_causal_4d(1, LENGTH, LENGTH, dtype=DTYPE), lambda row: keys <= row
    )


def test_expand_mask(padding):
    assert_rows(torch.ops.attn_mask._expand_mask(padding, dtype=DTYPE), lambda row: padding[0])


def test_unmask_unattended():
    """Fully masked rows on both sides of element 2^31 are unmasked, the others stay."""
    mask = torch.full((1, 1, LENGTH, LENGTH), LOW, dtype=DTYPE)
    kept = sampled_rows()[::2]
    mask[0, 0, list(kept), 7] = 0.0
    got = torch.ops.attn_mask._unmask_unattended(mask, LOW)
    for row in sampled_rows():
        unmasked = torch.full((LENGTH,), -0.0, dtype=DTYPE)
        assert_same_mask(got[0, 0, row], mask[0, 0, row] if row in kept else unmasked)
