"""How attention is cut into tiles, and that nothing of queries x keys is made."""

import os
import subprocess
import sys
from pathlib import Path

import attn_mask
import pytest
import torch
from attn_mask import attention_plan, causal, documents, padding, sliding_window
from hypothesis import given
from hypothesis import strategies as st

N = 4096


def paths(*args, **options):
    return [segment.path for segment in attention_plan(*args, **options)]


def test_one_call_where_no_mask_is_needed():
    assert paths(causal(), 2, N, N) == ["causal"]
    assert paths(causal(), 2, 1, N) == ["all"]
    assert paths(causal() & sliding_window(N), 2, N, N) == ["causal"]
    assert paths(documents(torch.zeros(1, N, dtype=torch.int64)), 2, N, N) == ["all"]
    assert paths(causal() & padding(torch.ones(2, N)), 2, N, N) == ["causal"]


def test_tiles_of_a_window_share_a_mask():
    window = causal() & sliding_window(1024)
    first, inner = attention_plan(window, 1, N, N)
    assert (first.path, first.rows, first.keys) == ("causal", slice(0, 1024), slice(0, 1024))
    assert inner.path == "mask" and inner.tiles * inner.step == N - 1024
    assert inner.keys.stop - inner.keys.start == 1023 + inner.step


def test_documents_of_equal_length_run_together():
    ids = (torch.arange(N) // 256)[None]
    (segment,) = attention_plan(causal() & documents(ids), 1, N, N)
    assert (segment.path, segment.tiles, segment.step) == ("causal", 16, 256)


def test_triangles_of_some_hundred_rows_are_halved():
    """A CPU's kernel takes 512 keys at once: for the upper half of a triangle they are too many."""
    rule = causal() & documents(torch.arange(N) // 512)
    upper, lower = attention_plan(rule, 1, N, N)
    assert (upper.path, upper.rows, upper.keys) == ("causal", slice(0, 256), slice(0, 256))
    assert (lower.path, lower.rows, lower.keys) == ("mask", slice(256, 512), slice(0, 512))
    assert (upper.tiles, upper.step) == (lower.tiles, lower.step) == (8, 512)
    assert paths(causal(), 1, 512, 512) == ["causal"]
    assert paths(causal() & sliding_window(1024), 1, N, N)[0] == "causal"


@pytest.mark.parametrize("n", [2, 7, 2048])
def test_documents_share_no_tile(n):
    """Zero times a NaN of another document would be NaN."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (800,), generator=generator)
    ids = torch.arange(800).repeat_interleave(lengths)[-n:]
    for rule in (documents(ids), causal() & documents(ids), documents(ids) & sliding_window(1)):
        rows = []
        for segment in attention_plan(rule, 1, n, n, heads=4):
            for tile in range(segment.tiles):
                moved = tile * segment.step
                queries, keys = (
                    ids[of.start + moved : of.stop + moved] for of in (segment.rows, segment.keys)
                )
                assert (queries == queries[0]).all() and (keys == queries[0]).all()
                rows += range(segment.rows.start + moved, segment.rows.stop + moved)
        assert rows == list(range(n))


def test_a_step_of_decoding_sees_its_document_alone():
    ids = torch.arange(N) // 1000
    (segment,) = attention_plan(documents(ids), 1, 1, N, q_offset=N - 1)
    assert (segment.path, segment.keys) == ("all", slice(int(N // 1000 * 1000), N))


def test_padding_at_one_side_needs_no_mask():
    shown = torch.ones(3, N, dtype=torch.bool)
    shown[0, :700] = False
    shown[1, 3000:] = False
    plan = attention_plan(causal() & padding(shown), 3, N, N)
    assert "mask" not in [segment.path for segment in plan]
    assert {segment.batch.start for segment in plan} == {0, 1, 2}


def test_batch_rows_that_look_alike_run_together():
    ids = (torch.arange(N) // 1000).expand(3, N).contiguous()
    plan = attention_plan(causal() & documents(ids), 3, N, N)
    assert {(segment.batch.start, segment.batch.stop) for segment in plan} == {(0, 3)}


def test_a_plan_is_printed_a_line_a_segment():
    plan = attention_plan(causal() & sliding_window(1024), 1, N, N)
    assert len(str(plan).splitlines()) == len(plan) == 2
    assert str(plan).splitlines()[0].startswith("causal   batch 0:1, q 0:1024, kv 0:1024")
    called = attention_plan(lambda b, h, q, k: q >= k, 1, 64, 64)
    assert "called" in str(called)


@given(
    q_length=st.integers(1, 400),
    kv_length=st.integers(1, 400),
    size=st.integers(1, 300),
    ids=st.lists(st.integers(0, 5), min_size=800, max_size=800),
    heads=st.integers(1, 40),
)
def test_each_query_is_in_one_tile(q_length, kv_length, size, ids, heads):
    ids = torch.tensor(ids[:100]).repeat_interleave(8)
    for rule in (causal() & sliding_window(size), documents(ids), sliding_window(size)):
        found = [0] * q_length
        for segment in attention_plan(rule, 1, q_length, kv_length, heads=heads, q_offset=7):
            for tile in range(segment.tiles):
                for row in range(segment.rows.start, segment.rows.stop):
                    found[row + tile * segment.step] += 1
                shift = tile * segment.step
                assert segment.keys.stop + (shift if segment.tiles > 1 else 0) <= kv_length
        assert found == [1] * q_length


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"q_length": "8"}, TypeError, "attention_plan: expected q_length to be an int"),
        ({"heads": -1}, ValueError, "expected heads to be a size"),
        ({"dtype": torch.int8}, TypeError, "expected dtype to be float16, bfloat16"),
        ({"rule": 3}, TypeError, "attention_plan: expected rule to be callable, but got int"),
    ],
)
def test_bad_input(changed, error, text):
    arguments = {"rule": causal(), "batch_size": 1, "q_length": 8, "kv_length": 8, **changed}
    with pytest.raises(error, match=text):
        attention_plan(**arguments)


def test_nothing_of_queries_by_keys_is_saved():
    tensors = [torch.randn(1, 1, N, 8, requires_grad=True) for _ in range(3)]
    for rule in (
        causal(),
        causal() & sliding_window(64),
        causal() & (lambda b, h, q, k: q - k < 9),
    ):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attn_mask.scaled_dot_product_attention(*tensors, rule)
        assert max(saved) == tensors[0].numel()


MEMORY = """
import sys
import torch, attn_mask
from attn_mask import causal, documents, sliding_window
torch.set_num_threads(1)
n = 16384
rule = {
    "window": causal() & sliding_window(512),
    "documents": causal() & documents(torch.arange(n) // 1000),
}[sys.argv[1]]
def status(field):
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
def run(n):
    tensors = [torch.randn(1, 2, n, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak becomes what there is now
    before = status("VmRSS:")
    attn_mask.scaled_dot_product_attention(*tensors, rule).sum().backward()
    return (status("VmHWM:") - before) / tensors[0].nbytes
run(1100)
print(run(n))
"""


@pytest.mark.parametrize("name", ["window", "documents"])
def test_memory(name):
    """Of forward and backward, in sizes of the query; a mask in bfloat16 would take 128 of them."""
    environment = {**os.environ, "PYTHONPATH": str(Path(attn_mask.__file__).parents[1])}
    command = [sys.executable, "-c", MEMORY, name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 24
