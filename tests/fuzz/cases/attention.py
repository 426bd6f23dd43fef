"""Attention by a rule, compared with a softmax in float64 over the mask that the formula says."""

import contextlib
import math

import attn_mask
import torch
from attn_mask import rules
from torch.autograd import forward_ad

from cases.errors import returns
from cases.rules import any_problem
from cases.values import strided

attend = attn_mask.scaled_dot_product_attention

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
# What a derivative may end with where there is none.
NO_DERIVATIVE = "scaled_dot_product_attention:"


def attention_case(rng):
    kind = rng.choice([compared, compared, compared, derivatives, unseen_values])
    if kind is unseen_values:
        return returns(kind), (rng,), {}
    # Now and then more rows than one tile has.
    longest = 12 if rng.random() < 0.97 else 600
    problem = any_problem(rng, longest=longest)
    while problem.has_positions or problem.lowest < 0:
        problem = any_problem(rng, longest=longest)
    return returns(kind), (rng, problem), {}


def in_float64(query, key, value, visible, scale):
    """(out, log-sum-exp), by the definition."""
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.where(visible, query @ key.mT * scale, -math.inf)
    has_key = visible.any(-1, keepdim=True)
    # Finite where there is no key, so that derivatives are.
    scores = torch.where(has_key, scores, 0.0)
    out = torch.where(has_key, torch.softmax(scores, -1), 0.0) @ value
    return out, torch.where(has_key[..., 0], scores.logsumexp(-1), -math.inf)


def any_scale(rng, dtype):
    scales = [None, None, None, 1.0, 0.3, -0.7, -1.0, 0.0, -0.0, 1e-30, -1e-30]
    if dtype == torch.float64:
        scales += [1e3, -1e3]
    return rng.choice(scales)


def any_inputs(rng, problem, dtype):
    """(query, key, value), the options of a call beside them, and the heads of keys."""
    heads = problem.heads
    if problem.want.shape[1] == 1:
        heads *= rng.choice([1, 1, 2])
    groups = [size for size in (1, 2, 3) if heads % size == 0]
    key_heads = heads // rng.choice(groups) if rng.random() < 0.3 else heads
    width = rng.choice([1, 4, 8, 16])
    of_value = width if rng.random() < 0.8 else rng.choice([1, 5, 24])
    shapes = [
        (heads, problem.q_length, width),
        (key_heads, problem.kv_length, width),
        (key_heads, problem.kv_length, of_value),
    ]
    tensors = []
    for shape in shapes:
        tensor = torch.randn(problem.batch_size, *shape, dtype=torch.float64).to(dtype)
        tensors.append(strided(rng, tensor) if rng.random() < 0.3 else tensor)
    options = {"scale": any_scale(rng, dtype), "enable_gqa": key_heads != heads}
    options |= problem.offsets_of_attention
    return tensors, options


def assert_close(got, want, tolerance, what):
    """Relative to the largest, with +-inf and NaN in the same places."""
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, not {list(want.shape)}"
    if not want.numel():
        return
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: what is finite"
    assert torch.equal(got[~finite].double(), want[~finite]), f"{what}: what is not finite"
    if not finite.any():
        return
    off = (got[finite].double() - want[finite]).abs().max()
    allowed = tolerance * (1 + want[finite].abs().max())
    assert off <= allowed, f"{what}: off by {off:.3g}, where {allowed:.3g} is allowed"


def compared(rng, problem):
    """Result, log-sum-exp, and the gradients through both."""
    dtypes = [torch.float64] * 4 + [torch.float32] * 4 + [torch.float16, torch.bfloat16]
    dtype = rng.choice(dtypes)
    tensors, options = any_inputs(rng, problem, dtype)
    tolerance = TOLERANCE[dtype]
    visible = problem.want.expand(-1, tensors[0].shape[1], -1, -1)
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want, want_lse = in_float64(*exact, visible, options["scale"])
    by_aten = problem.is_native and rng.random() < 0.2
    with attn_mask.aten_only() if by_aten else contextlib.nullcontext():
        out, lse = attend(*tensors, problem.rule, return_lse=True, **options)
    assert out.dtype == dtype
    assert_close(out, want, tolerance, f"result with {options}")
    assert_close(lse, want_lse, 10 * tolerance, f"log-sum-exp with {options}")
    has_key = want_lse != -math.inf
    of_out, of_lse = torch.randn(want.shape), torch.randn(want_lse.shape) * has_key
    if rng.random() < 0.5:
        of_lse = torch.zeros_like(of_lse)
    finite, want_finite = (torch.where(has_key, one, 0.0) for one in (lse, want_lse))
    loss = (out * of_out.to(dtype)).sum()
    if of_lse.any():
        loss = loss + (finite * of_lse).sum()
    wanted_loss = (want * of_out.to(dtype).double()).sum() + (want_finite * of_lse.double()).sum()
    got = torch.autograd.grad(loss, tensors)
    expected = torch.autograd.grad(wanted_loss, exact)
    for name, one, other in zip(("query", "key", "value"), got, expected, strict=True):
        assert_close(one, other, 4 * tolerance, f"gradient of {name} with {options}")
    assert not got[0][~has_key].any(), "a gradient of queries without a key"


def derivatives(rng, problem):
    """Right, or an error of ours."""
    tensors, options = any_inputs(rng, problem, torch.float64)
    # Elements that share memory have no forward derivatives.
    tensors = [tensor.contiguous() for tensor in tensors]
    visible = problem.want.expand(-1, tensors[0].shape[1], -1, -1)
    scale = options["scale"]
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def ours(*tensors):
        return attend(*tensors, problem.rule, **options)

    def exact(*tensors):
        return in_float64(*tensors, visible, scale)[0]

    kind = rng.choice(["jvp", "forward_ad", "vmap", "func.grad", "second"])
    try:
        if kind == "jvp":
            got = torch.func.jvp(ours, tuple(tensors), tangents)
            want = torch.func.jvp(exact, tuple(tensors), tangents)
        elif kind == "forward_ad":
            got, want = (_by_dual(function, tensors, tangents) for function in (ours, exact))
        elif kind == "vmap":
            stacked = [torch.stack(pair) for pair in zip(tensors, tangents, strict=True)]
            got = (torch.vmap(ours)(*stacked),)
            want = (torch.stack([exact(*tensors), exact(*tangents)]),)
        elif kind == "func.grad":
            got, want = (_by_func_grad(function, tensors) for function in (ours, exact))
        else:
            got, want = (_second(function, tensors, tangents) for function in (ours, exact))
    except NotImplementedError as error:
        assert str(error).startswith(NO_DERIVATIVE), f"{kind} with {options}: {error}"
        return
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, 1e-7, f"{kind} with {options}")


def _by_dual(function, tensors, tangents):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(tensor, tangent)
            for tensor, tangent in zip(tensors, tangents, strict=True)
        ]
        primal, tangent = forward_ad.unpack_dual(function(*duals))
        return primal, torch.zeros_like(primal) if tangent is None else tangent


def _by_func_grad(function, tensors):
    def squares(*tensors):
        return function(*tensors).square().sum()

    return torch.func.grad(squares, argnums=(0, 1, 2))(*tensors)


def _second(function, tensors, tangents):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    loss = sum((one * other).sum() for one, other in zip(first, tangents, strict=True))
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def unseen_values(rng):
    """NaN and inf in other documents change no bit of a document."""
    batch_size, heads = rng.choice([1, 2]), rng.choice([1, 2])
    length = rng.choice([5, 12, 40, 150, 400])
    lines, chosen = [], []
    for _ in range(batch_size):
        line, document = [], 0
        most = rng.choice([2, 5, 30, length])
        while len(line) < length:
            line += [document] * rng.randint(1, most)
            document += 1
        lines.append(line[:length])
        chosen.append(rng.choice(lines[-1]))
    ids = torch.tensor(lines)
    inside = ids == torch.tensor(chosen)[:, None]
    parts = [rules.documents(ids.to(rng.choice([torch.int64, torch.int32, torch.int16])))]
    parts += rng.choice([[], [rules.causal()], [rules.causal(), rules.sliding_window(7)]])
    rng.shuffle(parts)
    rule = rules.intersection(*parts)
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    scale = rng.choice([None, None, -0.5, 0.0])
    shape = (batch_size, heads, length, rng.choice([4, 16]))
    clean = [torch.randn(shape).to(dtype) for _ in range(4)]
    poison = rng.choice([math.nan, math.inf, -math.inf])
    where = torch.rand(batch_size, 1, length, 1) < rng.choice([0.1, 1.0])
    where = where & ~inside[:, None, :, None]
    # Of queries and of the gradient of the result, now and then, too.
    poisoned = [
        torch.where(where, poison, tensor) if at in (1, 2) or rng.random() < 0.3 else tensor
        for at, tensor in enumerate(clean)
    ]
    results = []
    for *tensors, of_out in (clean, poisoned):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out, lse = attend(*tensors, rule, scale=scale, return_lse=True)
        grads = torch.autograd.grad(out, tensors, of_out)
        results.append((out, lse[..., None], *grads))
    rows = inside[:, None, :, None]
    names = "result", "log-sum-exp", "gradient of query", "gradient of key", "gradient of value"
    for name, one, other in zip(names, *results, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        assert bool((same | ~rows).all()), (
            f"{poison} of other documents changes the {name} of documents {chosen}, {rule} of "
            f"{length} by {scale=}, {dtype}, ids {lines}"
        )
        finite = torch.where(rows, other, 0.0).isfinite()
        finite = finite | ((name == "log-sum-exp") & (other == -math.inf))
        assert bool(finite.all()), f"{poison} of other documents reaches the {name}"
