"""Attention in graphs: torch.compile, torch.export, opcheck, fake tensors, decompositions."""

import attn_mask
import pytest
import torch
from attn_mask import causal, documents, padding, scaled_dot_product_attention, sliding_window
from attn_mask._graph.aten import TABLE
from sample_calls import ATTENTION_SAMPLES, map_tensors, operator
from torch._subclasses.fake_tensor import FakeTensorMode

CALLS = [
    pytest.param(name, args, kwargs, id=f"{name}-{i}")
    for name in ("scaled_dot_product_attention", "scaled_dot_product_attention_backward")
    for i, (args, kwargs) in enumerate(ATTENTION_SAMPLES[name])
]
every_call = pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True])


# Torch's own check looks at results that may not be leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_call
def test_opcheck(name, args, kwargs):
    if name == "scaled_dot_product_attention":
        args = (*args[:2], *(tensor.clone().requires_grad_() for tensor in args[2:]))
    torch.library.opcheck(operator(name).default, args, kwargs)


@pytest.mark.parametrize("name", ["_attention_plan", "_document_limits"])
def test_opcheck_of_a_host_decision(name):
    for args, kwargs in ATTENTION_SAMPLES[name]:
        utils = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(operator(name).default, args, kwargs, test_utils=utils)


@every_call
def test_fake_and_meta_agree_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *map_tensors(mode.from_tensor, args), **map_tensors(mode.from_tensor, kwargs)
        )
    meta = operator(name)(
        *map_tensors(lambda tensor: tensor.to("meta"), args),
        **map_tensors(lambda tensor: tensor.to("meta"), kwargs),
    )
    for one, *others in zip(want, fake, meta, strict=True):
        for other in others:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert one.numel() == 0 or one.stride() == other.stride()


@every_call
def test_decompositions(name, args, kwargs):
    got = TABLE[operator(name).default](*args, **kwargs)
    for one, other in zip(got, operator(name)(*args, **kwargs), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


IDS = torch.tensor([[0] * 13 + [1] * 27])
SHOWN = torch.ones(2, 40, dtype=torch.bool)
SHOWN[0, :6] = False

RULES = {
    "causal": lambda: causal(),
    "window": lambda: causal() & sliding_window(9),
    "documents": lambda: causal() & documents(IDS),
    "padding": lambda: causal() & padding(SHOWN),
    "callable": lambda: causal() & (lambda b, h, q, k: (q + k) % 2 == 0),
}


def inputs(length=40):
    torch.manual_seed(0)
    return [torch.randn(2, 4, length, 8, requires_grad=True) for _ in range(3)]


@DYNAMIC
@pytest.mark.parametrize("name", RULES)
def test_compiled(name, dynamic):
    def attend(*tensors):
        return scaled_dot_product_attention(*tensors, RULES[name](), return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (40, 23) if dynamic and name in ("causal", "window") else (40,):
        tensors = inputs(length)
        got, want = compiled(*tensors), attend(*tensors)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        grads = [torch.autograd.grad(out[0].sum(), tensors) for out in (got, want)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return scaled_dot_product_attention(query, key, value, causal() & sliding_window(9))


def exported():
    length = torch.export.Dim("length", min=2, max=5000)
    tensors = tuple(tensor.detach() for tensor in inputs())
    return torch.export.export(Attention(), tensors, dynamic_shapes=({2: length},) * 3)


def test_exported():
    program = exported()
    assert "attn_mask.scaled_dot_product_attention" in str(program.graph)
    tensors = [tensor.detach() for tensor in inputs(90)]
    assert torch.equal(program.module()(*tensors), Attention()(*tensors))


def test_exported_as_aten():
    program = exported().run_decompositions(attn_mask.decompositions())
    assert "attn_mask" not in str(program.graph)
    tensors = [tensor.detach() for tensor in inputs(90)]
    torch.testing.assert_close(program.module()(*tensors), Attention()(*tensors))


def test_recompute():
    """torch.utils.checkpoint runs it again."""
    tensors = inputs()
    rule = causal() & sliding_window(9)

    def attend(*tensors):
        return scaled_dot_product_attention(*tensors, rule)

    want = torch.autograd.grad(attend(*tensors).sum(), tensors)
    again = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again.sum(), tensors), want, strict=True):
        assert torch.equal(one, other)
