"""How many documents ids have, and how long: the host decision, and how long it is kept."""

import itertools
from types import SimpleNamespace

import attn_mask
import pytest
import torch
from attn_mask import causal, documents
from attn_mask._core import attend as attention
from hypothesis import given
from hypothesis import strategies as st


def limits_of(ids):
    """Of a batch of as many rows, run by run; nothing where an id comes again later."""
    runs = [
        (row, number, len(list(run)))
        for row, numbers in enumerate(ids.tolist())
        for number, run in itertools.groupby(numbers)
    ]
    if len({run[:2] for run in runs}) < len(runs):
        return []
    return [len(runs), max(length for _, _, length in runs)]


@st.composite
def tables(draw):
    """Of runs, mostly of ids that go up; any strides."""
    batch_size, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.int32, torch.int64, torch.int8]))
    steps = draw(st.sampled_from([[0, 1], [0, 0, 0, 1, 3], [0, -1], [-1, 0, 1], [0], [1]]))
    step = st.lists(st.sampled_from(steps), min_size=length, max_size=length)
    ids = torch.tensor([draw(step) for _ in range(batch_size)]).cumsum(1).to(dtype)
    if draw(st.booleans()):
        ids = ids.t().contiguous().t()
    return ids.repeat_interleave(2, 1)[:, ::2] if draw(st.booleans()) else ids


@given(tables())
def test_limits_are_those_of_runs(ids):
    n = ids.shape[1]
    program = (causal() & documents(ids)).encode()
    assert torch.ops.attn_mask._document_limits(*program, ids.shape[0], n, n) == limits_of(ids)
    if ids.shape[0] == 1:
        found = torch.ops.attn_mask._document_limits(*program, 3, n, n)
        assert found == limits_of(ids.expand(3, n))


@pytest.fixture
def reads(monkeypatch):
    """What has been asked of the device."""
    found = []
    read = attn_mask._C._document_limits

    def counted(*args):
        found.append(args)
        return read(*args)

    monkeypatch.setattr(attention, "_C", SimpleNamespace(_document_limits=counted))
    return found


def limits(rule, batch_size=1, length=6, offset=0, dtype=torch.float16):
    query = torch.zeros(batch_size, 1, length, 8, dtype=dtype)
    return tuple(attention._limits(rule.program, query, query, (offset, offset)))


def test_limits_are_read_once_for_a_rule(reads):
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]])
    rule = causal() & documents(ids)
    for _ in range(3):
        assert limits(rule) == (3, 3) and len(reads) == 1
    ids[0, 0] = -1
    for _ in range(2):
        assert limits(rule) == (4, 2) and len(reads) == 2
    ids[0, 5] = -1  # which comes again
    for _ in range(2):
        assert limits(rule) == (None, None) and len(reads) == 3


def test_limits_are_read_again_for_another_problem(reads):
    rule = documents(torch.tensor([[0, 0, 0, 1, 1, 2]]))
    assert limits(rule) == (3, 3)
    assert limits(rule, batch_size=2) == (6, 3)
    assert limits(rule, length=4) == (2, 3)
    assert limits(rule, length=4, offset=2) == (3, 2)
    assert limits(rule) == (3, 3)
    assert len(reads) == 5
    assert limits(documents(torch.tensor([[0, 0, 0, 1, 1, 1]]))) == (2, 3)


def test_limits_of_tensors_without_versions_are_read_each_time(reads):
    with torch.inference_mode():
        ids = torch.tensor([[0, 0, 1]])
        rule = documents(ids)
        assert limits(rule, length=3) == (2, 2)
        ids[0, 1] = 1
        assert limits(rule, length=3) == (2, 2)
        ids[0, 0] = 1
        assert limits(rule, length=3) == (1, 3)
    assert len(reads) == 3


def test_limits_that_are_known_or_not_needed_are_not_read(reads):
    ids = torch.tensor([[0, 0, 1]])
    assert limits(documents(ids, max_documents=7, max_length=9), length=3) == (7, 9)
    assert limits(documents(ids), length=3, dtype=torch.float32) == (None, None)
    assert limits(causal(), length=3) == (None, None)
    assert not reads
