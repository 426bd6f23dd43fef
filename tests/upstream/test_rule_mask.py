"""RuleMask: to whatever reads it the mask that it stands for, and a rule as long as none does."""

import copy
import io
import logging
import pickle
import threading

import attn_mask
import numpy as np
import pytest
import torch
from attn_mask import causal, documents, padding, rules, sliding_window
from attn_mask._core import log_once
from attn_mask._transformers.rule_mask import RuleMask, RuleTensor, make_rule_mask
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask

B, Q, K = 2, 4, 6
SHOWN = torch.tensor([[False, True, True, True, True, True], [True] * 6])


def make(rule=None, sizes=(B, Q, K), q_offset=2):
    rule = causal() & padding(SHOWN.long()) if rule is None else rule
    return make_rule_mask(rule, sizes, q_offset, 0, torch.device("cpu"))


def wanted():
    """The mask, one element at a time."""
    mask = torch.zeros(B, 1, Q, K, dtype=torch.bool)
    for b in range(B):
        for q in range(Q):
            for k in range(K):
                mask[b, 0, q, k] = k <= q + 2 and SHOWN[b, k]
    return mask


def added(dtype=torch.float32):
    zeros = torch.zeros(B, 1, Q, K, dtype=dtype)
    return zeros.masked_fill(~wanted(), torch.finfo(dtype).min)


def scores(dtype=torch.float32):
    return torch.randn(B, 3, Q, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_it_is_a_boolean_tensor():
    mask = make()
    assert isinstance(mask, torch.Tensor) and not isinstance(mask, BlockMask)
    assert type(mask) is RuleMask
    assert (mask.dtype, mask.device, mask.layout) == (torch.bool, SHOWN.device, torch.strided)
    assert mask.shape == mask.size() == (B, 1, Q, K) and mask.size(-1) == K
    assert (mask.ndim, mask.dim(), len(mask), mask.numel()) == (4, 4, B, B * Q * K)
    assert (mask.is_cpu, mask.is_cuda, mask.is_meta) == (True, False, False)
    assert mask.is_contiguous() and not mask.requires_grad and not mask.is_floating_point()
    assert (
        str(mask)
        == repr(mask)
        == f"{mask}"
        == (
            "RuleMask(causal() & padding(int64[2, 6]), shape=(2, 1, 4, 6), q_offset=2, kv_offset=0)"
        )
    )
    assert mask._dense is None


def test_it_can_be_told_that_it_needs_no_gradient():
    """As checkpointed layers do."""
    mask = make()
    other = mask.detach()
    other.requires_grad = False
    assert mask.requires_grad_(False) is mask and mask.grad is None
    with pytest.raises(RuntimeError, match="floating point"):
        mask.requires_grad = True


def test_bits_of_heads_give_it_heads():
    bits = torch.rand(1, 3, Q, K, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = make(rules.bits(bits) & causal())
    assert mask.shape == (B, 3, Q, K)
    visible = torch.ones(Q, K, dtype=torch.bool).tril(2)
    assert torch.equal(mask.clone(), (bits & visible).expand(B, -1, -1, -1))


# Functions of (mask, scores), whose result for the tensor is the oracle.
READERS = {
    "cat": lambda m, x: torch.cat([m, m], -1),
    "cat with another": lambda m, x: torch.cat([x > 0, m.expand(-1, 3, -1, -1)], -1),
    "stack": lambda m, x: torch.stack((m, m)),
    "== 0": lambda m, x: m == 0,
    "!= 0": lambda m, x: m != 0,
    "== mask": lambda m, x: m == m,
    "0 ==": lambda m, x: 0 == m,  # noqa: SIM300
    "eq": lambda m, x: torch.eq(m, 0),
    "~": lambda m, x: ~m,
    "-": lambda m, x: 1 - m.float(),
    "logical_not": lambda m, x: torch.logical_not(m),
    "&": lambda m, x: m & (x > 0),
    "reflected |": lambda m, x: (x > 0) | m,
    "^": lambda m, x: m ^ True,
    "where": lambda m, x: torch.where(m, x, 0.0),
    "method where": lambda m, x: x.where(m, torch.zeros(())),
    "masked_fill": lambda m, x: x.masked_fill(m, -1.0),
    "masked_fill_": lambda m, x: x.clone().masked_fill_(~m, -1.0),
    "index put": lambda m, x: x[:, :1].index_put((m,), torch.zeros(())),
    "select by mask": lambda m, x: x[:, :1][m],
    "masked_select": lambda m, x: x[:, :1].masked_select(m),
    "[0]": lambda m, x: m[0],
    "[:, 0]": lambda m, x: m[:, 0],
    "[None]": lambda m, x: m[None],
    "[..., -1]": lambda m, x: m[..., -1],
    "[::2]": lambda m, x: m[:, :, ::2],
    "rows by tensor": lambda m, x: m[:, :, torch.tensor([0, 2])],
    "*": lambda m, x: x * m,
    "bool + mask": lambda m, x: (x > 0) + m,
    "mask + mask": lambda m, x: m + m,
    "int + mask": lambda m, x: (x > 0).int() + m,
    "to dtype": lambda m, x: m.to(x.dtype),
    "to of another": lambda m, x: m.to(x),
    "float": lambda m, x: m.float(),
    "type": lambda m, x: m.type(torch.int64),
    "any": lambda m, x: m.any(-1),
    "sum": lambda m, x: torch.sum(m, -1, keepdim=True),
    "expand": lambda m, x: m.expand(-1, 3, -1, -1),
    "repeat": lambda m, x: m.repeat(1, 3, 1, 1),
    "unsqueeze": lambda m, x: m.unsqueeze(1),
    "reshape": lambda m, x: m.reshape(B, -1),
    "transpose": lambda m, x: m.transpose(-1, -2),
    "T": lambda m, x: m.mT,
    "pad": lambda m, x: torch.nn.functional.pad(m, (0, 2), value=False),
    "zeros_like": lambda m, x: torch.zeros_like(m, dtype=x.dtype),
    "new_zeros": lambda m, x: m.new_zeros(3),
    "sdpa": lambda m, x: torch.nn.functional.scaled_dot_product_attention(
        x, torch.ones(B, 3, K, K), torch.ones(B, 3, K, 2), m
    ),
    "iteration": lambda m, x: torch.stack(list(m)),
    "unbind": lambda m, x: torch.stack(m.unbind(2)),
    "clone": lambda m, x: m.clone(),
    "narrow": lambda m, x: m.narrow(2, 1, 2),
    "split": lambda m, x: m.split(2, -1)[1],
    "einsum": lambda m, x: torch.einsum("bhqk,bzqk->bhq", x, m.float()),
    "to_dense": lambda m, x: m.to_dense(),
    "data": lambda m, x: m.data,
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_it_gets_the_dense_mask(name):
    got = READERS[name](make(), scores())
    want = READERS[name](wanted(), scores())
    assert type(got) is torch.Tensor and got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", READERS)
def test_so_do_readers_that_no_override_of_functions_sees(name):
    with torch._C.DisableTorchFunctionSubclass():
        got = READERS[name](make(), scores())
    assert torch.equal(got.clone(), READERS[name](wanted(), scores()))


def test_readers_outside_of_torch():
    mask = make()
    assert mask.tolist() == wanted().tolist()
    for array in (mask.numpy(), np.asarray(mask), np.array(mask), np.from_dlpack(mask)):
        assert array.dtype == bool and np.array_equal(array, wanted().numpy())
    assert torch.equal(torch.from_dlpack(mask), wanted())
    assert mask[0, 0, 0, 0].item() is False and bool(make(sizes=(B, Q, 1))[1, 0, 0, 0])
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(mask)
    assert mask.data_ptr() == mask.untyped_storage().data_ptr() != 0


ADDITIONS = {
    "x + m": lambda m, x: x + m,
    "m + x": lambda m, x: m + x,
    "torch.add": lambda m, x: torch.add(x, m),
    "by name": lambda m, x: torch.add(input=m, other=x),
    "alpha": lambda m, x: x.add(m, alpha=0.5),
    "add_": lambda m, x: x.clone().add_(m),
    "+=": lambda m, x: operator_iadd(x.clone(), m),
    "sliced": lambda m, x: x[:, :, 1:, :3] + m[:, :, 1:, :3],
    "in a vmap": lambda m, x: torch.vmap(torch.add)(x, m),
    "out": lambda m, x: torch.add(x, m, out=torch.empty_like(x)),
}


def operator_iadd(x, m):
    x += m
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ADDITIONS)
def test_to_floating_point_numbers_it_is_added_as_eager_masks_are(name, dtype):
    got = ADDITIONS[name](make(), scores(dtype))
    want = ADDITIONS[name](added(dtype), scores(dtype))
    assert got.dtype == dtype and torch.equal(got, want)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(ADDITIONS[name](make(), scores(dtype)), want)


def test_a_number_that_is_added():
    assert torch.equal(0.0 + make(), added())
    assert torch.equal(make() + 1.0, added() + 1.0)
    assert torch.equal(make() + 1, wanted() + 1)
    assert torch.equal(torch.zeros((), dtype=torch.float64) + make(), added(torch.float64))


def test_what_stays_a_rule():
    mask = make()
    for same in (
        mask.contiguous(),
        mask.detach(),
        mask.to("cpu"),
        mask.to(mask.device),
        mask.cpu(),
    ):
        assert same is mask
    assert mask.to(torch.bool) is mask and mask[...] is not None
    part = mask[:, :, 1:3, -4:]
    assert type(part) is RuleMask and part._dense is None
    assert (part.q_offset, part.kv_offset, part.shape) == (3, 2, (B, 1, 2, 4))
    assert torch.equal(part.clone(), wanted()[:, :, 1:3, -4:])
    there = mask.to("meta")
    assert type(there) is RuleMask and there.device.type == "meta"
    assert there.rule.rules[1].mask.device.type == "meta"
    assert mask._dense is None
    assert type(mask.to("cpu", copy=True)) is torch.Tensor


# Writing


WRITES = {
    "__setitem__": lambda m: m.__setitem__((0, 0), True),
    "fill_": lambda m: m.fill_(True),
    "masked_fill_": lambda m: m.masked_fill_(m, False),
    "copy_": lambda m: m.copy_(wanted()),
    "logical_or": lambda m: torch.logical_or(wanted(), wanted(), out=m),
    "relu_": lambda m: torch.relu_(m),
    "_foreach_mul_": lambda m: torch._foreach_mul_([m], [wanted()]),
    "__set__": lambda m: setattr(m, "data", wanted()),
    "__iand__": lambda m: m.__iand__(wanted()),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_an_error(name):
    match = (
        "^RuleMask: expected no write into a mask that holds a rule in place of elements, but got "
        rf"{name}: write into its clone\(\)$"
    )
    with pytest.raises(RuntimeError, match=match):
        WRITES[name](make())


def test_augmented_assignment_is_an_error():
    mask = make()
    with pytest.raises(RuntimeError, match="but got __ior__: write"):
        mask |= wanted()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="but got add_"):
        torch._C.TensorBase.add_(mask, True)


def test_a_write_into_a_view_is_an_error_once_the_mask_is_used():
    query = torch.zeros(B, 1, Q, 8)
    for use in (
        lambda mask: ~mask,
        lambda mask: attention_interface()(
            torch.nn.Module(), query, query.new_zeros(B, 1, K, 8), query, mask
        ),
    ):
        mask = make()
        mask[0].fill_(True)
        with pytest.raises(RuntimeError, match="but got one into a view of it"):
            use(mask)


def test_arrays_of_it_are_read_only():
    for array in (make().numpy(), np.asarray(make())):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = True
    mask = make()
    torch.from_dlpack(mask).fill_(True)
    assert torch.equal(mask.clone(), wanted())


def test_a_clone_can_be_written():
    mask = make()
    other = mask.clone()
    other[0] = True
    assert other[0].all() and torch.equal(mask.clone(), wanted())


# Where nothing of a tensor subclass is seen


def test_vmap():
    assert torch.equal(torch.vmap(lambda m: m.sum())(make()), wanted().sum((1, 2, 3)))
    assert torch.equal(torch.vmap(lambda m: ~m, in_dims=2)(make()), (~wanted()).movedim(2, 0))
    captured = make()
    got = torch.vmap(lambda x: torch.where(captured[0, 0], x, 0))(scores()[:, 0])
    assert torch.equal(got, torch.where(wanted()[0, 0], scores()[:, 0], 0))
    assert torch.equal(captured.clone(), wanted())


def test_transforms_leave_no_tensor_of_theirs_in_it():
    mask = make()
    got = torch.func.grad(lambda x: torch.where(mask, x, 0).sum())(scores())
    assert torch.equal(got, wanted().float().expand(-1, 3, -1, -1))
    got = make_fx(lambda x: torch.where(mask, x, 0))(scores())(scores())
    assert torch.equal(got, torch.where(wanted(), scores(), 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert (~mask).shape == mask.shape
    assert torch.equal(~mask, ~wanted())


def test_what_reads_memory_finds_none():
    """Rather than zeros."""
    mask = make()
    with pytest.raises(RuntimeError, match="data pointer"):
        torch._C._to_dlpack(mask)
    with torch._C.DisableTorchFunctionSubclass():
        for read in ("numpy", "tolist", "data_ptr"):
            with pytest.raises(RuntimeError):
                getattr(torch._C.TensorBase, read)(mask)
        with pytest.raises(NotImplementedError):
            list(torch._C.TensorBase.untyped_storage(mask))


def test_inference_mode_leaves_nothing_that_autograd_refuses():
    mask = make()
    with torch.inference_mode():
        assert torch.equal(~mask, ~wanted())
    x = scores().requires_grad_()
    x.masked_fill(mask, 0.0).sum().backward()
    assert torch.equal(x.grad, (~wanted()).float().expand(-1, 3, -1, -1))


def test_copies():
    mask = make()
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (pickle.loads(pickle.dumps(mask)), copy.copy(mask), copy.deepcopy(mask), loaded):
        assert type(other) is RuleMask and other is not mask
        assert torch.equal(other.clone(), wanted())
    twice = copy.deepcopy([mask, mask])
    assert twice[0] is twice[1]
    assert copy.deepcopy(mask).rule.rules[1].mask is not mask.rule.rules[1].mask
    assert hash(mask) == hash(mask) and mask in {mask: 1}


def test_shared_memory():
    mask = make()
    mask.share_memory_()
    assert mask.is_shared() and torch.equal(mask.clone(), wanted())


def test_threads_read_it_at_once():
    mask = make()
    found = []
    threads = [threading.Thread(target=lambda: found.append(~mask)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(got, ~wanted()) for got in found)


def test_where_it_becomes_dense_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(log_once, "_details", set())
    caplog.set_level(logging.DEBUG, logger="attn_mask")
    for _ in range(3):
        make().any()
        make() + scores()
    code = test_where_it_becomes_dense_is_named_once.__code__
    line = code.co_firstlineno + 4
    assert [record.getMessage() for record in caplog.records] == [
        f"attn_mask: a RuleMask becomes dense in {code.co_name} ({__file__}:{at})"
        for at in (line, line + 1)
    ]
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


# Graphs


# Neither what has no size before it runs, nor what dynamo can't trace for tensors with overrides.
NOT_THERE = "select by mask", "masked_select", "data", "iteration", "stack", "index put"
IN_GRAPHS = [name for name in READERS if name not in NOT_THERE]
IDS = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])


def made_in_a_graph(ids, x):
    rule = causal() & documents(ids)
    return make_rule_mask(rule, (x.shape[0], x.shape[2], x.shape[3]), 2, 0, x.device)


def dense_of_graph():
    b, q, k = (torch.arange(size) for size in (B, Q, K))
    q = q[:, None] + 2
    same = IDS[b[:, None, None], q] == IDS[b[:, None, None], k]
    return (same & (k <= q))[:, None]


def all_of(mask, x):
    return [READERS[name](mask, x) for name in IN_GRAPHS] + [
        mask.shape[2],
        mask.dtype == torch.bool,
        mask.device,
        mask.ndim,
        mask.size(1),
        len(mask),
        isinstance(mask, torch.Tensor),
    ]


def additions_of(mask, x):
    return [ADDITIONS[name](mask, x) for name in ADDITIONS if name not in ("in a vmap", "out")]


def assert_all(got, want):
    for one, other in zip(got, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("is_argument", [False, True], ids=["made there", "an argument"])
def test_full_graphs(is_argument):
    x, dense = scores(), dense_of_graph()
    bias = torch.zeros(()).where(dense, torch.finfo(torch.float32).min)

    def run(function, tensor):
        def call(mask, ids, x):
            mask = mask if is_argument else made_in_a_graph(ids, x)
            return function(mask, x)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert_all(compiled(made_in_a_graph(IDS, x), IDS, x), function(tensor, x))

    run(all_of, dense)
    run(additions_of, bias)


@pytest.mark.usefixtures("fresh_graphs")
def test_in_a_graph_others_than_overrides_see_elements():
    """dynamo shows an override no tensors that are in a tuple."""

    def call(ids, x):
        mask = made_in_a_graph(ids, x)
        return torch.cat((mask, x > 0), 1), torch.vmap(lambda m: m.sum())(mask)

    x, dense = scores(), dense_of_graph()
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(IDS, x)
    assert_all(got, (torch.cat((dense, x > 0), 1), dense.sum((1, 2, 3))))


@pytest.mark.usefixtures("fresh_graphs")
def test_a_graph_keeps_no_elements_that_nothing_reads():
    attend, names = attention_interface(), []

    def keep(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def call(ids, query, key):
        mask = make_rule_mask(causal() & documents(ids), (B, Q, K), 2, 0, query.device)
        return attend(torch.nn.Module(), query, key, key, mask)[0]

    query, key = torch.randn(B, 1, Q, 8), torch.randn(B, 1, K, 8)
    backend = aot_autograd(fw_compiler=keep)
    got = torch.compile(call, backend=backend, fullgraph=True)(IDS, query, key)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, key, dense_of_graph())
    torch.testing.assert_close(got, want.transpose(1, 2))
    assert any("scaled_dot_product" in name for name in names)
    assert not any("boolean" in name for name in names)


@pytest.mark.usefixtures("fresh_graphs")
def test_graphs_are_those_of_their_masks():
    """Of other sizes, positions and rules."""
    compiled = torch.compile(lambda mask: ~mask, backend="aot_eager", fullgraph=True)
    for sizes in ((1, 4, 4), (1, 5, 5), (1, 2, 6), (2, 7, 9)):
        for offset in (0, 2):
            for rule in (causal(), sliding_window(2) & causal()):
                mask = make_rule_mask(rule, sizes, offset, 0, torch.device("cpu"))
                distance = torch.arange(sizes[1])[:, None] + offset - torch.arange(sizes[2])
                visible = distance >= 0
                if rule != causal():
                    visible &= distance < 2
                assert torch.equal(compiled(mask), ~visible.expand(sizes[0], 1, -1, -1))


@pytest.mark.usefixtures("fresh_graphs")
def test_a_graph_that_breaks():
    """The mask of a graph goes on in eager code."""

    def call(ids, x):
        mask = made_in_a_graph(ids, x)
        torch._dynamo.graph_break()
        return mask, torch.cat([mask, mask]), x + mask

    x, dense = scores(), dense_of_graph()
    mask, twice, sums = torch.compile(call, backend="aot_eager")(IDS, x)
    bias = torch.zeros(()).where(dense, torch.finfo(torch.float32).min)
    assert torch.equal(twice, torch.cat([dense, dense])) and torch.equal(sums, x + bias)
    assert isinstance(mask, RuleTensor) and mask.device == x.device
    assert torch.equal(mask.clone(), dense)
    assert torch.equal(pickle.loads(pickle.dumps(mask)).clone(), dense)
    assert torch.equal(torch.vmap(lambda m: m.sum())(mask), dense.sum((1, 2, 3)))


class Reads(torch.nn.Module):
    def forward(self, ids, x):
        mask = made_in_a_graph(ids, x)
        part = mask[:, :, :-1, 1:]
        return mask + x, ~part, torch.cat([mask, mask])


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    x, dense = scores(), dense_of_graph()
    rows = torch.export.Dim("rows", min=2, max=32)
    shapes = ({0: rows}, {0: rows})
    program = torch.export.export(Reads(), (IDS, x), strict=strict, dynamic_shapes=shapes)
    bias = torch.zeros(()).where(dense, torch.finfo(torch.float32).min)
    want = bias + x, ~dense[:, :, :-1, 1:], torch.cat([dense, dense])
    assert_all(program.module()(IDS, x), want)
    twice = [torch.cat([part, part]) for part in (IDS, x)]
    assert torch.equal(program.module()(*twice)[1], torch.cat([want[1], want[1]]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_traced():
    """By torch.jit.trace, where it is the dense mask from the beginning."""

    def call(ids, x):
        return torch.where(made_in_a_graph(ids, x), x, 0.0)

    traced = torch.jit.trace(call, (IDS, scores()))
    assert torch.equal(traced(IDS, scores()), torch.where(dense_of_graph(), scores(), 0.0))


def attention_interface():
    name = "transformers.integrations.sdpa_attention"
    pytest.importorskip("transformers.modeling_utils", reason="its attention is taken")
    pytest.importorskip(name, reason="its attention is taken")
    from attn_mask._transformers import attention_interface

    return attention_interface.attention


def test_bits_of_it_are_its_dense_mask():
    assert torch.equal(attn_mask.boolean(attn_mask.bits(make()), B, Q, K), wanted())
