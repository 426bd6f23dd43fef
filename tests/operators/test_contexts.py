"""Around the operators: vmap, recorded graphs, modes, defaults, other processes, gradients."""

import contextlib
import functools
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from attn_mask import masking_utils, rules
from attn_mask import modeling_attn_mask_utils as ours
from attn_mask.rules import bits, causal, chunked, documents, padding
from masks import assert_same_mask
from sample_calls import DOCUMENTS, PADDING, POSITIONS, operator
from test_compile import CALLS, HALF, every_call, inputs
from torch.fx.experimental.proxy_tensor import make_fx

FLOAT = torch.float32


def padded(batch_size, kv_length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (batch_size, kv_length), generator=generator)
    mask[:, 0] = 0
    return mask


def run_python(code, *arguments):
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# torch.vmap

# f(mask [b, kv]) for each operator and each way that a tensor gets into one.
MAPPED = {
    "to_4d": lambda mask: operator("to_4d")(mask, 4, dtype=HALF, key_value_length=7),
    "_expand_mask": lambda mask: operator("_expand_mask")(mask, 4, dtype=HALF),
    "_prepare_4d_attention_mask": lambda mask: operator("_prepare_4d_attention_mask")(
        mask, dtype=HALF
    ),
    "_prepare_4d_attention_mask_for_sdpa": lambda mask: operator(
        "_prepare_4d_attention_mask_for_sdpa"
    )(mask, 4, dtype=HALF, allow_skip=False),
    "_prepare_4d_causal_attention_mask": lambda mask: operator("_prepare_4d_causal_attention_mask")(
        mask, (mask.shape[0], 4), torch.zeros(mask.shape[0], 4, 2), 3
    ),
    "_prepare_4d_causal_attention_mask 4-D": lambda mask: operator(
        "_prepare_4d_causal_attention_mask"
    )(mask[:, None, None, :].expand(-1, 1, 4, -1).float(), (2, 4), torch.zeros(2, 4, 2), 3),
    "_prepare_4d_causal_attention_mask embeds": lambda mask: operator(
        "_prepare_4d_causal_attention_mask_for_sdpa"
    )(mask, (2, 7), mask[:, :, None].float(), 0, 3, allow_skip=False),
    "_unmask_unattended": lambda mask: operator("_unmask_unattended")(
        mask[:, None, :].float().expand(-1, 3, -1), 0.0
    ),
    "_unmask_unattended of a row": lambda mask: operator("_unmask_unattended")(
        mask[0].float(), 0.0
    ),
    "boolean": lambda mask: operator("boolean")(
        *(causal() & padding(mask)).encode(), 2, 4, 7, q_offset=3
    ),
    "boolean, ids for all": lambda mask: operator("boolean")(
        *(padding(mask) & documents(DOCUMENTS.repeat(1, 2))).encode(), 2, 4, 7
    ),
    "boolean, ids for each row": lambda mask: operator("boolean")(
        *(padding(mask) & documents(torch.arange(14).view(2, 7) // 3)).encode(), 2, 4, 7
    ),
    "boolean, one operand for the batch": lambda mask: operator("boolean")(
        *padding(mask[:1]).encode(), 2, 4, 7
    ),
    "boolean, bits": lambda mask: operator("boolean")(
        *bits((mask > 0)[:, None, None, :].expand(2, 3, 4, 7)).encode(), 2, 4, 7
    ),
    "boolean, starts of chunks": lambda mask: operator("boolean")(
        *chunked(3, mask[:, 1]).encode(), 2, 4, 7
    ),
    "boolean, offset": lambda mask: operator("boolean")(
        *causal().encode(), 2, 4, 7, q_positions=mask.sum() // 2
    ),
    "boolean, offset of each row": lambda mask: operator("boolean")(
        *causal().encode(), 2, 4, 7, q_positions=mask.sum(1, keepdim=True)
    ),
    "boolean, positions": lambda mask: operator("boolean")(
        *causal().encode(), 2, 4, 7, q_positions=mask[0].cumsum(0)[:4], kv_positions=mask.cumsum(1)
    ),
    "boolean, positions for all": lambda mask: operator("boolean")(
        *(causal() & padding(mask)).encode(),
        2,
        4,
        7,
        q_positions=torch.tensor([3, 2, 1, 6]),
        kv_positions=torch.arange(14).view(2, 7) % 5,
    ),
    "additive": lambda mask: operator("additive")(
        *(causal() & padding(mask)).encode(), 2, 7, 7, dtype=torch.bfloat16
    ),
    "additive, bias": lambda mask: operator("additive")(
        *causal().encode(),
        2,
        7,
        7,
        dtype=FLOAT,
        bias=(mask[:, None, :, None] - mask[:, None, None, :]).float(),
    ),
    "additive, bias for all": lambda mask: operator("additive")(
        *padding(mask).encode(), 2, 2, 7, dtype=FLOAT, bias=torch.arange(28.0).view(1, 2, 2, 7)
    ),
}


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name, in_dim):
    masks = torch.stack([padded(2, 7, seed) for seed in range(3)])
    want = torch.stack([MAPPED[name](mask) for mask in masks])
    got = torch.vmap(MAPPED[name], in_dims=in_dim)(masks.movedim(0, in_dim))
    assert_same_mask(got, want)


def test_vmap_of_vmap():
    masks = torch.stack(
        [torch.stack([padded(2, 7, 5 * i + j) for j in range(4)]) for i in range(3)]
    )
    for name in ("to_4d", "boolean, ids for each row", "_unmask_unattended"):
        want = torch.stack([torch.stack([MAPPED[name](mask) for mask in row]) for row in masks])
        assert_same_mask(torch.vmap(torch.vmap(MAPPED[name]))(masks), want)


def test_vmap_of_nothing_and_of_few():
    for shape in ((0, 2, 7), (1, 1, 7), (3, 0, 7), (3, 2, 0)):
        got = torch.vmap(lambda mask: operator("_expand_mask")(mask, 4, dtype=HALF))(
            torch.ones(shape)
        )
        assert got.shape == (*shape[:2], 1, 4, shape[2])


@every_call
def test_vmap_of_the_python_layer(name):
    """A mask is never skipped, as its values stand for many."""
    masks = torch.stack([padded(2, 7, seed) for seed in range(3)])
    queries = torch.zeros(2, 4, 8)
    got = torch.vmap(CALLS[name], in_dims=(0, None))(masks, queries)
    assert_same_mask(got, torch.stack([CALLS[name](mask, queries) for mask in masks]))
    ones = torch.ones_like(masks)
    assert torch.vmap(CALLS[name], in_dims=(0, None))(ones, queries).shape == got.shape


def test_vmap_of_masking_utils():
    def sdpa(mask):
        rule = rules.causal() & rules.sliding_window(3)
        return masking_utils.sdpa_mask(2, 4, 7, 3, 0, rule, mask > 0)

    masks = torch.stack([padded(2, 7, seed) for seed in range(3)])
    assert_same_mask(torch.vmap(sdpa)(masks), torch.stack([sdpa(mask) for mask in masks]))


def test_errors_under_vmap_name_the_operator():
    masks = torch.ones(3, 2, 7)
    with pytest.raises(TypeError, match=r"to_4d: expected dtype .*, but got Int"):
        torch.vmap(lambda mask: operator("to_4d")(mask, 4, dtype=torch.int32, key_value_length=7))(
            masks
        )
    with pytest.raises(ValueError, match=r"to_4d: expected .* with kv_length 9, but got"):
        torch.vmap(lambda mask: operator("to_4d")(mask, 4, dtype=HALF, key_value_length=9))(masks)


def test_warnings_as_errors_free_results_once():
    """A warning that becomes an exception after a result; g++ may destroy the result twice."""
    run_python(
        """
        import gc, importlib.util, pathlib, torch
        package = pathlib.Path(importlib.util.find_spec("attn_mask").origin).parent
        torch.ops.load_library(package / "lib" / "libattn_mask.so")
        (path,) = package.glob("_C.*.so")
        spec = importlib.util.spec_from_file_location("_C", path)
        direct = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(direct)
        # Without the batching rules, which Python registers, torch warns that it has none.
        masks, failed = torch.ones(3, 2, 7), 0
        for _ in range(100):
            try:
                torch.vmap(lambda mask: direct._expand_mask(mask, 4, torch.half))(masks)
            except UserWarning:
                failed += 1
            kept = [bytearray(size) for size in range(0, 3000, 8)]
            gc.collect()
        assert failed == 100, failed
        """
    )


# Recorded graphs


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_call
def test_make_fx(name, mode):
    graph = make_fx(CALLS[name], tracing_mode=mode)(*inputs(2, 4, 7))
    sizes = (3, 6, 9) if mode == "symbolic" else (2, 4, 7)
    assert_same_mask(graph(*inputs(*sizes)), CALLS[name](*inputs(*sizes)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_modules_are_loaded_elsewhere(tmp_path):
    """torch.jit fixes sizes, but not values; where it is loaded, the library is all it needs."""
    for index, (name, call) in enumerate(CALLS.items()):
        mask, queries = inputs(2, 4, 7)
        traced = torch.jit.trace(call, (mask, queries), check_trace=False)
        torch.jit.save(traced, str(tmp_path / f"{index}.pt"))
        mask[1, 3] = 0
        assert_same_mask(traced(mask, queries), call(mask, queries))
        torch.save((mask, queries, call(mask, queries)), tmp_path / f"{index} {name}.tensors")
    code = """
        import pathlib, sys, torch
        import warnings; warnings.simplefilter("ignore", FutureWarning)
        from importlib.util import find_spec
        package = pathlib.Path(find_spec("attn_mask").origin).parent
        torch.ops.load_library(package / "lib" / "libattn_mask.so")
        files = sorted(pathlib.Path(sys.argv[1]).glob("*.tensors"))
        for file in files:
            mask, queries, want = torch.load(file)
            got = torch.jit.load(str(file.parent / (file.name.split()[0] + ".pt")))(mask, queries)
            assert got.dtype == want.dtype and torch.equal(got, want), file
        assert "attn_mask" not in sys.modules
        print(len(files))
        """
    assert run_python(code, tmp_path) == str(len(CALLS))


@every_call
def test_functionalized(name):
    mask, queries = inputs(2, 4, 7)
    got = torch.func.functionalize(CALLS[name])(mask, queries)
    assert_same_mask(got, CALLS[name](mask, queries))


@every_call
def test_meta(name):
    """Shapes and strides; an error where values are needed, as in transformers."""
    mask, queries = inputs(2, 4, 7)
    want = CALLS[name](mask, queries)
    with torch.device("meta"):  # where no argument decides
        if name == "_prepare_4d_attention_mask_for_sdpa":
            with pytest.raises(ValueError, match="expected mask to have values"):
                CALLS[name](mask.to("meta"), queries.to("meta"))
            return
        got = CALLS[name](mask.to("meta"), queries.to("meta"))
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    told = name not in ("to_causal_4d window",)  # its device is an argument, and the CPU
    assert got.is_meta == told


# Modes and defaults


@contextlib.contextmanager
def changed(setter, before, value):
    setter(value)
    try:
        yield
    finally:
        setter(before)


AROUND = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "another device": functools.partial(torch.device, "meta"),
    "default dtype": lambda: changed(torch.set_default_dtype, FLOAT, torch.float64),
    "default device": lambda: changed(torch.set_default_device, None, "meta"),
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, False, True),
}


@pytest.mark.parametrize("around", AROUND)
@every_call
def test_nothing_around_changes_a_mask(name, around):
    """All is decided by tensors and arguments; memory filled for determinism is overwritten."""
    mask, queries = inputs(2, 4, 7)
    want = CALLS[name](mask, queries)
    with AROUND[around]():
        got = CALLS[name](mask, queries)
    assert_same_mask(got, want)
    assert got.is_inference() == (around == "inference mode")


def test_out_under_inference_mode_and_back():
    out = torch.empty(2, 1, 4, 7)
    mask, _ = inputs(2, 4, 7)
    with torch.inference_mode():
        operator("to_4d")(mask, 4, key_value_length=7, out=out)
    assert_same_mask(out, operator("to_4d")(mask, 4, dtype=FLOAT, key_value_length=7))


@every_call
def test_checkpoint(name):
    """Masks that are made again in the backward pass."""
    mask, _ = inputs(2, 4, 7)
    queries = torch.randn(2, 4, 8, requires_grad=True)

    def block(queries):
        added = CALLS[name](mask, queries)
        return (added.clamp(min=-1).float().sum() * queries).sum()

    torch.utils.checkpoint.checkpoint(block, queries, use_reentrant=False).backward()
    (want,) = torch.autograd.grad(block(queries), queries)
    assert torch.equal(queries.grad, want)


# Gradients


@every_call
def test_masks_of_what_requires_grad_do_not(name):
    """But for one whose values pass through. Nothing warns: warnings are errors here."""
    mask, queries = inputs(2, 4, 7)
    got = CALLS[name](mask.float().requires_grad_(), queries.requires_grad_())
    assert not got.requires_grad
    assert_same_mask(got, CALLS[name](mask, queries.detach()))


def unmask(mask):
    return operator("_unmask_unattended")(mask, -3.0)


def unmask_by_name(mask):
    return ours.AttentionMaskConverter._unmask_unattended(mask, -3.0)


def add(bias):
    # The lowest number of a dtype has no numerical derivative beside it: look at what attends.
    mask = operator("additive")(
        *(causal() & padding(PADDING)).encode(), 3, 4, 5, dtype=bias.dtype, bias=bias
    )
    return torch.where(mask > -1e9, mask, 0.0)


DIFFERENTIABLE = {
    "unmask": (unmask, lambda: torch.randn(2, 1, 3, 4, dtype=torch.float64)),
    "additive": (add, lambda: torch.randn(3, 2, 4, 5, dtype=torch.float64)),
    "additive, one bias for all": (add, lambda: torch.randn(1, 1, 4, 5, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name):
    function, make = DIFFERENTIABLE[name]
    value = make().requires_grad_()
    assert torch.autograd.gradcheck(function, value)
    assert torch.autograd.gradgradcheck(function, value)


def test_gradient_of_an_unmasked_row():
    """It holds zeros whatever was in it, so its gradient is 0; at its own values there is a step,
    where gradcheck fails."""
    value = torch.cat([torch.full((1, 4), -3.0), torch.randn(2, 4)]).double()[None, None]
    value.requires_grad_()
    (gradient,) = torch.autograd.grad(unmask_by_name(value).sum(), value)
    want = torch.ones_like(value)
    want[0, 0, 0] = 0
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, FLOAT])
def test_gradient_of_a_bias(dtype):
    """It passes where a key is attended to, in the bias' own dtype."""
    bias = torch.randn(3, 2, 4, 5).to(dtype).requires_grad_()
    attends = operator("boolean")(*(causal() & padding(PADDING)).encode(), 3, 4, 5)
    mask = operator("additive")(
        *(causal() & padding(PADDING)).encode(), 3, 4, 5, dtype=dtype, bias=bias
    )
    weights = torch.randn(3, 2, 4, 5).to(dtype)
    mask.backward(weights)
    assert_same_mask(bias.grad, torch.where(attends, weights, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradient_in_a_graph(backend):
    torch._dynamo.reset()
    bias = torch.randn(3, 2, 4, 5, requires_grad=True)
    weights = torch.randn(3, 2, 4, 5)

    def loss(bias):
        return (add(bias) * weights).sum()

    (want,) = torch.autograd.grad(loss(bias), bias)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(bias), bias)
    assert torch.equal(got, want)


# Other processes


class Samples(torch.utils.data.Dataset):
    """Masks of a collator: what workers do."""

    def __init__(self, rule):
        self.rule = rule

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rule, operands = self.rule.encode()
        mask = operator("to_4d")(padded(1, 7, index), 7, dtype=HALF, key_value_length=7)
        return mask, operator("boolean")(rule, operands, 1, 6, 6, q_offset=index % 2).clone()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader(start):
    rule = rules.causal() & (rules.documents(DOCUMENTS) | rules.sliding_window(2))
    samples = Samples(rule)
    # Threads are in use before the fork.
    operator("to_4d")(padded(4, 512), 512, dtype=FLOAT, key_value_length=512)
    loader = torch.utils.data.DataLoader(samples, num_workers=2, multiprocessing_context=start)
    for index, (mask, boolean) in enumerate(loader):
        want, other = samples[index]
        assert_same_mask(mask[0], want)
        assert_same_mask(boolean[0], other)


def test_pickled_rules_elsewhere(tmp_path):
    rule = rules.causal() & (
        rules.documents(DOCUMENTS) | rules.reindex(rules.sliding_window(2), POSITIONS)
    )
    code, operands = rule.encode()
    want = operator("boolean")(code, operands, 1, 6, 6)
    (tmp_path / "rule").write_bytes(pickle.dumps(rule))
    buffer = io.BytesIO()
    torch.save(want.clone(), buffer)
    (tmp_path / "mask").write_bytes(buffer.getvalue())
    run_python(
        """
        import pathlib, pickle, sys, torch
        folder = pathlib.Path(sys.argv[1])
        rule = pickle.loads((folder / "rule").read_bytes())
        code, operands = rule.encode()
        got = torch.ops.attn_mask.boolean(code, operands, 1, 6, 6)
        assert torch.equal(got, torch.load(folder / "mask"))
        """,
        tmp_path,
    )
