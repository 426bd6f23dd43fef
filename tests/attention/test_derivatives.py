"""Derivatives of attention by a rule: of the log-sum-exp, of torch.func, of tangents, and twice.

They are compared with those of a softmax in float64 over the dense mask."""

import math

import attn_mask
import pytest
import torch
from attn_mask import (
    bidirectional,
    bits,
    causal,
    documents,
    nothing,
    padding,
    scaled_dot_product_attention,
    sliding_window,
)
from attn_mask._graph import flops
from attn_mask.rules import shift, union
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

N = 40
IDS = torch.tensor([[0] * 13 + [1] * 20 + [2] * 7, [5] * 15 + [6] * 25])
SHOWN = torch.ones(2, N, dtype=torch.bool)
SHOWN[0, :6] = False
HOLES = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) > 0.3


def alternate(batch_idx, head_idx, q_idx, kv_idx):
    return ((q_idx + kv_idx) % 3 != 0) & (kv_idx <= q_idx)


RULES = {
    "causal": causal(),
    "bidirectional": bidirectional(),
    "nothing": nothing(),
    "window": causal() & sliding_window(9),
    "documents": causal() & documents(IDS),
    "padding": causal() & padding(SHOWN),
    "holes": padding(HOLES) & sliding_window(9),
    "bits": bits(torch.rand(2, 4, N, N, generator=torch.Generator().manual_seed(2)) > 0.5),
    "large": union(*[shift(causal(), 0, 9), padding(HOLES)] * 15),
    "function": alternate,
    "function and rule": causal() & documents(IDS) & alternate,
}
every_rule = pytest.mark.parametrize("name", RULES)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def tensors_of(dtype=torch.float64, length=N, heads=4, key_heads=2, width=8, of_value=None):
    torch.manual_seed(0)
    shapes = (heads, width), (key_heads, width), (key_heads, of_value or width)
    return [torch.randn(2, of, length, w).to(dtype).requires_grad_() for of, w in shapes]


def dense(query, key, value, visible, scale=None):
    """(out, log-sum-exp) by their definition in float64; rows without a key are 0 and -inf."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.mT * scale).masked_fill(~visible, -math.inf)
    has_key = visible.any(-1, keepdim=True)
    top = scores.amax(-1, keepdim=True).masked_fill(~has_key, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(~has_key, 1)
    lse = (total.log() + top).masked_fill(~has_key, -math.inf).squeeze(-1)
    return weights / total @ value, lse


def visible_of(rule, length=N):
    idx = torch.arange(length)
    if callable(rule) and not isinstance(rule, attn_mask.rules.MaskFunction):
        return rule(0, 0, idx[:, None], idx).expand(2, 1, length, length)
    return attn_mask.boolean(rule, 2, length, length)


def attend(*tensors, rule, **options):
    return scaled_dot_product_attention(*tensors, rule, enable_gqa=True, return_lse=True, **options)


def assert_gradients(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= tolerance * (1 + other.abs().max())


@DTYPES
@every_rule
@pytest.mark.parametrize("of_value", [None, 5])
def test_gradient_of_both_results(name, dtype, of_value):
    rule, tensors = RULES[name], tensors_of(dtype, of_value=of_value)
    out, lse = attend(*tensors, rule=rule)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want, want_lse = dense(*exact, visible_of(rule))
    has_key = want_lse > -math.inf
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), tensors, (grad, grad_lse))
    expected = torch.autograd.grad(
        (want, want_lse[has_key]), exact, (grad.double(), grad_lse.double()[has_key])
    )
    assert_gradients(got, expected, 4 * TOLERANCE[dtype])
    assert not got[0][~has_key].any()


@every_rule
def test_gradcheck(name):
    rule = RULES[name]
    without_key = ~visible_of(rule).any(-1)

    def of_both(*tensors):
        out, lse = attend(*tensors, rule=rule)
        return out, lse.masked_fill(without_key.expand_as(lse), 0)

    small = [tensor.detach()[:, :, :N].requires_grad_() for tensor in tensors_of(width=2)]
    assert torch.autograd.gradcheck(of_both, small, fast_mode=True)


@pytest.mark.parametrize("scale", [2.0**-24, 1e-3, 1.0, 1e3, 7e4])
@DTYPES
def test_gradient_of_the_log_sum_exp_alone(dtype, scale):
    """However large or small it is, within what ATen's kernels hold of scores' gradients."""
    if dtype == torch.float16 and not 1e-4 < scale < 1e4:
        scale = 2.0**-8 if scale < 1 else 1e4
    tensors = tensors_of(dtype)
    _, lse = attend(*tensors, rule=RULES["window"])
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    _, want = dense(*exact, visible_of(RULES["window"]))
    grad = torch.randn_like(lse) * scale
    got = torch.autograd.grad(lse, tensors, grad)
    expected = torch.autograd.grad(want, exact[:2], grad.double())
    for one, other in zip(got[:2], expected, strict=True):
        assert (one.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()
    assert not got[2].any()


@pytest.mark.parametrize("name", ["causal", "documents", "function"])
def test_a_learned_sink(name):
    """A logit of each head beside the scores, as GPT-OSS has it."""
    tensors, sink = tensors_of(), torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    out, lse = attend(*tensors, rule=RULES[name])
    got = out * torch.sigmoid(lse - sink)[..., None]
    query, key, value = tensors
    keys, values = (of.repeat_interleave(2, 1) for of in (key, value))
    scores = (query @ keys.mT / 8**0.5).masked_fill(~visible_of(RULES[name]), -math.inf)
    with_sink = torch.cat([scores, sink[:, None].expand(2, 4, N, 1)], -1).softmax(-1)
    want = with_sink[..., :-1] @ values
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    assert_gradients(
        torch.autograd.grad(got, (*tensors, sink), grad),
        torch.autograd.grad(want, (*tensors, sink), grad),
        1e-10,
    )


def test_keys_in_two_parts():
    """Two calls over parts of the keys, merged by their log-sum-exps, are one over all."""
    query, key, value = tensors_of()
    parts = [
        attend(query, key[:, :, of], value[:, :, of], rule=causal(), q_offset=0, kv_offset=of.start)
        for of in (slice(0, 15), slice(15, N))
    ]
    weight = torch.sigmoid(parts[1][1] - parts[0][1])[..., None]
    got = parts[0][0] * (1 - weight) + parts[1][0] * weight
    want = dense(query, key, value, visible_of(causal()))[0]
    torch.testing.assert_close(got, want)
    tensors = query, key, value
    grad = torch.randn_like(want)
    assert_gradients(
        torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad), 1e-10
    )


@pytest.mark.parametrize("name", ["causal", "documents", "function"])
def test_what_requires_a_gradient(name):
    """The log-sum-exp depends on queries and keys alone."""
    for index in range(3):
        tensors = [tensor.detach() for tensor in tensors_of()]
        tensors[index].requires_grad_()
        out, lse = attend(*tensors, rule=RULES[name])
        assert out.requires_grad and lse.requires_grad == (index < 2)
    assert not any(
        of.requires_grad for of in attend(*(of.detach() for of in tensors), rule=causal())
    )


@pytest.mark.parametrize("name", ["window", "documents", "function", "large"])
def test_compiled_gradient_of_both(name):
    tensors = tensors_of()

    def both(*tensors):
        out, lse = attend(*tensors, rule=RULES[name])
        return out.sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(of(*tensors), tensors) for of in (compiled, both))
    assert_gradients(got, want, 1e-12)


def test_gradient_where_no_key_is_visible_is_none():
    """NaN that a log-sum-exp of -inf gives is not handed on."""
    tensors = tensors_of()
    _, lse = attend(*tensors, rule=RULES["padding"])
    grads = torch.autograd.grad(torch.logaddexp(lse, lse).sum(), tensors[:2])
    assert all(grad.isfinite().all() for grad in grads)


def test_grad_lse_is_checked():
    rule, operands = causal().encode()
    query, key, value = (of.detach() for of in tensors_of(key_heads=4))
    ops = torch.ops.attn_mask
    out, lse = ops.scaled_dot_product_attention(rule, operands, query, key, value)
    for bad, error, text in (
        (lse[:, :2], ValueError, r"grad_lse to be \[2, 4, 40\], but got .*\[2, 2, 40\]"),
        (lse.float(), TypeError, "grad_lse to be Double, but got Float"),
        (lse[0], ValueError, "grad_lse to be 3-D"),
        (lse.to("meta"), ValueError, "grad_lse to be on"),
        (lse.to_sparse(), TypeError, "grad_lse to be a strided tensor"),
    ):
        with pytest.raises(error, match=f"scaled_dot_product_attention_backward: expected {text}"):
            ops.scaled_dot_product_attention_backward(
                rule, operands, out, query, key, value, out, lse, grad_lse=bad
            )


# torch.func and tangents


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own

FUNC = pytest.mark.parametrize("name", ["causal", "window", "documents", "holes", "function"])


def both_of(name):
    """(ours, dense), functions of query, key and value, with a bounded log-sum-exp."""
    visible = visible_of(RULES[name])

    def finite(out, lse):
        return out, lse.masked_fill(~visible.any(-1), 0)

    return (
        lambda *tensors: finite(*attend(*tensors, rule=RULES[name])),
        lambda *tensors: finite(*dense(*tensors, visible)),
    )


def assert_equal_trees(got, want):
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@FUNC
def test_jvp(name):
    tensors = tuple(of.detach() for of in tensors_of())
    tangents = tuple(map(torch.randn_like, tensors))
    assert_equal_trees(*(torch.func.jvp(of, tensors, tangents) for of in both_of(name)))


@FUNC
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_tangents(name, requires_grad, index):
    """One of the three has a tangent."""
    results = []
    for function in both_of(name):
        tensors = [of.detach().requires_grad_(requires_grad) for of in tensors_of()]
        with forward_ad.dual_level():
            tensors[index] = forward_ad.make_dual(tensors[index], torch.ones_like(tensors[index]))
            results.append(
                [
                    torch.zeros_like(of) if tangent is None else tangent
                    for of, tangent in map(forward_ad.unpack_dual, function(*tensors))
                ]
            )
    assert_equal_trees(*results)


@FUNC
def test_func_grad_and_hessian(name):
    tensors = tuple(of.detach() for of in tensors_of(width=2))

    def scalar(function):
        return lambda *tensors: sum(of.sin().sum() for of in function(*tensors))

    ours, want = map(scalar, both_of(name))
    every = (0, 1, 2)
    assert_equal_trees(*(torch.func.grad(of, every)(*tensors) for of in (ours, want)))
    assert_equal_trees(
        *(
            torch.func.vjp(of, *tensors)[1](torch.ones((), dtype=torch.float64))
            for of in (ours, want)
        )
    )
    # Twice: the gradient of a gradient along a direction.
    direction = tuple(map(torch.randn_like, tensors))

    def twice(function):
        return torch.func.jvp(torch.func.grad(function, every), tensors, direction)

    assert_equal_trees(twice(ours), twice(want))

    def thrice(function):
        first = torch.func.grad(function)
        return torch.func.grad(lambda *tensors: first(*tensors).sin().sum(), every)(*tensors)

    assert_equal_trees(thrice(ours), thrice(want))


@FUNC
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 2, 1), (-1, 0, None)])
def test_vmap(name, in_dims):
    tensors = [of.detach() for of in tensors_of()]
    mapped = [
        of if dim is None else torch.stack([of * (i + 1) for i in range(3)], dim)
        for of, dim in zip(tensors, in_dims, strict=True)
    ]
    got, want = (torch.vmap(of, in_dims)(*mapped) for of in both_of(name))
    assert_equal_trees(got, want)


def test_vmap_runs_kernels():
    """What is mapped over becomes a part of the batch: no tensor of all scores."""
    tensors = [of.detach()[None].expand(3, -1, -1, -1, -1) for of in tensors_of()]
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        torch.vmap(lambda *of: attend(*of, rule=causal())[0])(*tensors)
    assert torch.ops.attn_mask.scaled_dot_product_attention.default in seen
    assert not any("matmul" in str(func) or "bmm" in str(func) for func in seen)


def test_vmap_over_a_table():
    tensors = [of.detach() for of in tensors_of()]
    ids = torch.stack([IDS, IDS.flip(1), IDS % 2])

    def of_ids(ids):
        return attend(*tensors, rule=causal() & documents(ids))

    want = [torch.stack(parts) for parts in zip(*map(of_ids, ids), strict=True)]
    assert_equal_trees(torch.vmap(of_ids)(ids), want)


@FUNC
def test_gradients_of_samples(name):
    """vmap over grad."""
    tensors = [torch.stack([of.detach(), of.detach() * 2]) for of in tensors_of()]
    ours, want = (
        torch.vmap(torch.func.grad(lambda *of, f=f: f(*of)[0].sin().sum(), (0, 1, 2)))(*tensors)
        for f in both_of(name)
    )
    assert_equal_trees(ours, want)


@FUNC
def test_second_derivatives_by_autograd_are_refused(name):
    query, key, value = tensors_of()
    for result in attend(query, key, value, rule=RULES[name]):
        with pytest.raises(
            NotImplementedError,
            match=r"^scaled_dot_product_attention: .* to be differentiated once",
        ):
            torch.autograd.grad(result.sum(), query, create_graph=True)


def test_the_operator_itself_refuses_what_it_cannot_do():
    rule, operands = causal().encode()
    query, key, value = (of.detach() for of in tensors_of(key_heads=4))

    def operator(query):
        return torch.ops.attn_mask.scaled_dot_product_attention(rule, operands, query, key, value)[
            0
        ]

    match = "^scaled_dot_product_attention: expected to be differentiated "
    with pytest.raises(NotImplementedError, match=match + "backward, but got a tensor with"):
        torch.func.jvp(operator, (query,), (query,))
    with pytest.raises(NotImplementedError, match=match + "by torch.autograd, but its operator"):
        torch.func.grad(lambda query: operator(query).sum())(query)
    mapped = torch.vmap(operator)(query[None])
    assert torch.equal(mapped, operator(query)[None])
    # Nothing is differentiated here.
    found = torch.func.grad(lambda scale: (operator(query) * scale).sum())(
        torch.tensor(2.0).double()
    )
    assert torch.equal(found, operator(query).sum())


# Tensor subclasses, counters, meta, inference


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("index", range(3))
def test_subclasses_come_back(index):
    tensors = [of.detach() for of in tensors_of(key_heads=4)]
    plain = scaled_dot_product_attention(*tensors, causal(), return_lse=True)
    tensors[index] = tensors[index].as_subclass(Sub)
    torchs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    for rule in (causal(), alternate):
        out, lse = scaled_dot_product_attention(*tensors, rule, return_lse=True)
        assert type(out) is type(lse) is type(torchs) is Sub
    out = scaled_dot_product_attention(*tensors, causal())
    assert torch.equal(out.as_subclass(torch.Tensor), plain[0])
    parameter = torch.nn.Parameter(tensors[index].as_subclass(torch.Tensor))
    tensors[index] = parameter
    assert type(scaled_dot_product_attention(*tensors, causal())) is torch.Tensor


def test_modes_of_torch_function_see_it():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        scaled_dot_product_attention(*tensors_of(key_heads=4), causal())
    assert scaled_dot_product_attention in seen


@every_rule
@pytest.mark.parametrize("of_value", [None, 5])
def test_products_are_counted(name, of_value):
    """4 x heads x head size for each visible pair forward, 2.5 times that backward."""
    tensors = tensors_of(of_value=of_value)
    pairs = int(visible_of(RULES[name]).expand(2, 4, N, N).sum())
    with FlopCounterMode(display=False) as counter:
        out, _ = attend(*tensors, rule=RULES[name])
    width = of_value or 8
    assert counter.get_total_flops() == 2 * pairs * (8 + width)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * width)


@pytest.mark.parametrize("positions", [torch.tensor(3), torch.tensor([[3], [0]])])
def test_counted_in_parts(positions, monkeypatch):
    monkeypatch.setattr(flops, "_TILE", 2 * 4 * N * 7)
    tensors = tensors_of(length=N)
    with FlopCounterMode(display=False) as counter:
        attend(*tensors, rule=RULES["window"], q_offset=positions)
    visible = attn_mask.boolean(RULES["window"], 2, N, N, q_offset=positions)
    assert counter.get_total_flops() == 4 * 8 * 4 * int(visible.sum())


def test_listed_positions_are_counted():
    rule, operands = causal().encode()
    tensors = [of.detach() for of in tensors_of(key_heads=4)]
    positions = torch.stack([torch.arange(N).flip(0), torch.arange(N) // 2])
    flops.tell_counters()
    with FlopCounterMode(display=False) as counter:
        torch.ops.attn_mask.scaled_dot_product_attention(
            rule, operands, *tensors, q_positions=positions
        )
    assert counter.get_total_flops() == 4 * 8 * 4 * int((positions + 1).sum())


def test_fake_tensors_are_counted_at_most():
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fake = [torch.empty(2, 4, N, 8) for _ in range(3)]
        scaled_dot_product_attention(*fake, causal())
    assert counter.get_total_flops() == 4 * 8 * 2 * 4 * N * N


@pytest.mark.parametrize("name", ["causal", "window", "function"])
def test_meta(name):
    tensors = [of.detach().to("meta").requires_grad_() for of in tensors_of(torch.float32)]
    rule = RULES[name]
    out, lse = attend(*tensors, rule=rule)
    assert out.device.type == lse.device.type == "meta"
    assert out.shape == tensors[0].shape and lse.shape == out.shape[:3]
    grads = torch.autograd.grad((out.sum(), lse.sum()), tensors)
    assert [of.shape for of in grads] == [of.shape for of in tensors]


def test_a_table_on_another_device_than_meta():
    tensors = [of.detach().to("meta") for of in tensors_of(torch.float32)]
    out = scaled_dot_product_attention(*tensors, causal() & documents(IDS), enable_gqa=True)
    assert out.device.type == "meta" and out.shape == tensors[0].shape


def test_tables_of_inference_mode_are_trained_with():
    with torch.inference_mode():
        rule = causal() & documents(IDS.clone()) & padding(SHOWN.clone())
    want = causal() & documents(IDS) & padding(SHOWN)
    grads = []
    for of in (rule, want):
        tensors = tensors_of()
        attend(*tensors, rule=of)[0].sin().sum().backward()
        grads.append([tensor.grad for tensor in tensors])
    assert all(map(torch.equal, *grads))
