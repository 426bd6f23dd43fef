"""Attention by a rule on a GPU, compared with a softmax in float64 over the dense mask."""

import math
import subprocess
import sys

import pytest
import torch
from attn_mask import (
    causal,
    documents,
    padding,
    scaled_dot_product_attention,
    sliding_window,
    window,
)
from sample_calls import nothing_waits

pytestmark = pytest.mark.cuda

N = 640
IDS = torch.arange(N) // 100
LEFT = torch.ones(2, N, dtype=torch.bool)
LEFT[0, :70] = False
HOLES = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) > 0.3

RULES = {
    "causal": causal(),
    "window": causal() & sliding_window(100),
    "window of both sides": window(60, 20),
    "documents": causal() & documents(IDS),
    "whole documents": documents(IDS.expand(2, N).contiguous()),
    "documents in a window": causal() & sliding_window(30) & documents(IDS),
    "documents that come again": causal() & documents(IDS % 3),
    "padded": causal() & padding(LEFT),
    "holes": causal() & padding(HOLES),
    "no key for one": padding(HOLES & torch.tensor([[True], [False]])),
    "later keys": window(None, 20),
    "callable": causal() & (lambda b, h, q, k: (q + k + h) % 3 > 0),
}
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-9}


def visible_of(rule, q_length):
    arange = (torch.arange(n, device="cuda") for n in (2, 4))
    b, h = (index.view(-1, *(1,) * (3 - i)) for i, index in enumerate(arange))
    q = torch.arange(N - q_length, N, device="cuda")[:, None]
    return rule.to("cuda")(b, h, q, torch.arange(N, device="cuda")).expand(2, 4, q_length, N)


def softmax_in_float64(query, key, value, visible):
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1).masked_fill(lse[..., None] == -math.inf, 0)
    return weights @ value, lse


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.3])
@pytest.mark.parametrize("name", RULES)
def test_gradient_through_the_log_sum_exp(name, scale, dtype):
    """Of both results, by any scale."""
    torch.manual_seed(0)
    shapes = (2, 4, N, 64), (2, 2, N, 64), (2, 2, N, 64)
    tensors = [
        torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes
    ]
    rule, visible = RULES[name], visible_of(RULES[name], N)
    out, lse = scaled_dot_product_attention(
        *tensors, rule.to("cuda"), scale=scale, enable_gqa=True, return_lse=True
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    scaled = exact[0] if scale is None else exact[0] * (scale * 8)
    want, want_lse = softmax_in_float64(scaled, *exact[1:], visible)
    has_key = visible.any(-1)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), tensors, (grad, grad_lse))
    expected = torch.autograd.grad(
        (want, want_lse[has_key]), exact, (grad.double(), grad_lse.double()[has_key])
    )
    for one, other in zip(got, expected, strict=True):
        other = other.nan_to_num()  # of rows without a key
        assert (one - other).abs().max() <= 8 * TOLERANCE[dtype] * (1 + other.abs().max())


@pytest.mark.parametrize("q_length", [N, 130, 1])
@pytest.mark.parametrize("width", [(64, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_softmax_in_float64(name, dtype, width, q_length):
    torch.manual_seed(0)
    shapes = (2, 4, q_length, width[0]), (2, 2, N, width[0]), (2, 2, N, width[1])
    tensors = [
        torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes
    ]
    rule = RULES[name]
    out, lse = scaled_dot_product_attention(
        *tensors, rule.to("cuda"), enable_gqa=True, return_lse=True
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want, want_lse = softmax_in_float64(*exact, visible_of(rule, q_length))
    tolerance = TOLERANCE[dtype]
    assert (out - want).abs().max() <= tolerance
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    assert (lse.nan_to_num(neginf=0) - want_lse.nan_to_num(neginf=0)).abs().max() <= 10 * tolerance
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, grad)
    expected = torch.autograd.grad(want, exact, grad.double())
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 4 * tolerance * (1 + other.abs().max())


def arguments(rule):
    tensors = [torch.randn(1, 2, N, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    return (*rule.to("cuda").encode(), *tensors)


@pytest.mark.parametrize("name", ["causal", "window", "padded", "documents that come again"])
def test_nothing_waits_for_the_device(name):
    rule = RULES[name]
    if name == "padded":
        rule = causal() & padding(LEFT[:1])
    args = arguments(rule)
    torch.ops.attn_mask.scaled_dot_product_attention(*args)
    with nothing_waits():
        torch.ops.attn_mask.scaled_dot_product_attention(*args)


def test_documents_of_known_limits_wait_for_nothing():
    args = arguments(RULES["documents"])
    limits = {"max_documents": 9, "max_length": 200}
    want, _ = torch.ops.attn_mask.scaled_dot_product_attention(*args)
    with nothing_waits():
        got, _ = torch.ops.attn_mask.scaled_dot_product_attention(*args, **limits)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_limits_of_a_rule():
    """The same in a graph, which can't read them."""
    tensors = arguments(causal())[2:]
    rule = causal() & documents(IDS.to("cuda"), max_documents=9, max_length=200)

    def attend(*tensors):
        return scaled_dot_product_attention(*tensors, rule)

    want = scaled_dot_product_attention(*tensors, RULES["documents"].to("cuda"))
    assert torch.equal(attend(*tensors), want)
    assert torch.equal(torch.compile(attend, fullgraph=True)(*tensors), want)


def test_host_decision():
    rule, operands = RULES["documents"].to("cuda").encode()
    limits = torch.ops.attn_mask._document_limits(rule, operands, 3, N, N)
    assert limits == [21, 100]
    rule, operands = RULES["documents that come again"].to("cuda").encode()
    assert torch.ops.attn_mask._document_limits(rule, operands, 3, N, N) == []


IDS_OF = {
    "runs": IDS,
    "one document": torch.zeros(6000),
    "each token a document": torch.arange(6000),
    "several chunks": torch.arange(3 * 4096 + 5) // 1000,
    "down from below 0": -1 - torch.arange(N) // 70,
    "come again": IDS % 3,
    "two rows": torch.stack([IDS, torch.arange(N) // 33 - 7]),
    "rows that go down": torch.stack([IDS, -IDS]),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", IDS_OF)
def test_host_decision_is_that_on_the_cpu(name, dtype, strided):
    ids = torch.atleast_2d(IDS_OF[name].to(dtype))
    n = ids.shape[1]
    on_gpu = ids.cuda()
    if strided:
        on_gpu = on_gpu.repeat_interleave(2, 1).t().contiguous().t()[:, ::2]
    found = [
        torch.ops.attn_mask._document_limits(*documents(of).encode(), ids.shape[0], n, n)
        for of in (ids, on_gpu)
    ]
    assert found[0] == found[1] and (found[0] == []) == (name == "come again")


@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", [name for name in IDS_OF if name != "come again"])
def test_documents_are_attended_alone(name, dtype, spare):
    """Also where more and longer ones are said to be possible."""
    ids = torch.atleast_2d(IDS_OF[name].to(dtype))
    batch_size, n = ids.shape
    code, operands = documents(ids.cuda()).encode()
    most, longest = torch.ops.attn_mask._document_limits(code, operands, batch_size, n, n)
    torch.manual_seed(0)
    query = torch.randn(batch_size, 1, n, 16, dtype=torch.float16, device="cuda") / 2
    limits = {"max_documents": most + spare, "max_length": longest + spare}
    got, _ = torch.ops.attn_mask.scaled_dot_product_attention(
        code, operands, query, query, query, **limits
    )
    for row in range(batch_size):
        counts = torch.unique_consecutive(ids[row], return_counts=True)[1].tolist()
        parts = list(query[row, 0].split(counts))
        if name == "each token a document":
            want = query[row, 0]
        else:
            softmax = [torch.softmax(of.double() @ of.double().T / 4, -1) for of in parts]
            want = torch.cat(
                [weights @ of.double() for weights, of in zip(softmax, parts, strict=True)]
            )
        assert (got[row, 0] - want).abs().max() <= TOLERANCE[torch.float16]


EXCEEDED = """
import torch
from attn_mask import documents
from attn_mask import scaled_dot_product_attention as attend

ids = torch.arange(640, device="cuda") // 100
query = torch.zeros(1, 1, 640, 16, dtype=torch.float16, device="cuda")
attend(query, query, query, documents(ids, max_documents=7, max_length=100))
torch.cuda.synchronize()
print("fits", flush=True)
attend(query, query, query, documents(ids, max_documents={}, max_length={}))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("limits", [(6, 100), (7, 99)])
def test_limits_that_are_exceeded(limits):
    """A context is of no use after that."""
    program = EXCEEDED.format(*limits)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("fits") and done.returncode != 0
    text = "expected ids to have at most max_documents documents of at most max_length tokens"
    assert text in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["causal", "window"])
def test_captured(name):
    args = arguments(RULES[name])
    want, _ = torch.ops.attn_mask.scaled_dot_product_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = torch.ops.attn_mask.scaled_dot_product_attention(*args)
    graph.replay()
    assert torch.equal(got, want)


def test_compiled():
    def attend(*tensors):
        return scaled_dot_product_attention(*tensors, causal() & sliding_window(100))

    tensors = arguments(causal())[2:]
    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(*tensors), attend(*tensors))


def test_it_takes_the_flash_kernel():
    """And no tiles; what splits keys of few queries puts parts together by a second kernel."""
    from torch.profiler import ProfilerActivity, profile

    args = arguments(RULES["window"])
    torch.ops.attn_mask.scaled_dot_product_attention(*args)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        torch.ops.attn_mask.scaled_dot_product_attention(*args)
    names = [event.name for event in found.events() if "flash_fwd" in event.name]
    assert 1 <= len(names) <= 2
    assert not [event.name for event in found.events() if "fmha" in event.name]
