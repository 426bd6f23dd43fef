"""BlockMasks, compared bit for bit with those of torch's create_block_mask."""

import pickle

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules
from attn_mask._core import write
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_reference import TABLE, builders, calls
from sample_calls import BLOCK_SAMPLES, map_tensors, nothing_waits, operator
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

NAMES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)
PARTIAL_ONLY = [name for name in NAMES if "full" not in name]

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_tensor(name, got, want):
    __tracebackhide__ = True
    if want is None:
        assert got is None, name
        return
    assert got.dtype == want.dtype == torch.int32, name
    assert got.shape == want.shape, name
    assert got.device == want.device, name
    differs = (got != want).nonzero()
    assert not len(differs), f"{name} differs at {differs[0].tolist()}:\n{got}\nfor\n{want}"


def assert_same_block_mask(got, want):
    __tracebackhide__ = True
    assert got.shape == want.shape
    assert got.seq_lengths == want.seq_lengths
    assert got.BLOCK_SIZE == want.BLOCK_SIZE
    for name in NAMES:
        assert_same_tensor(name, getattr(got, name), getattr(want, name))
        if getattr(want, name) is not None:
            assert getattr(got, name).stride() == getattr(want, name).stride(), name


def assert_same_blocks(got, want):
    """Of a compact one: what is counted, and the layout of torch's documentation."""
    __tracebackhide__ = True
    assert got.shape == want.shape
    for counts, indices in zip(NAMES[::2], NAMES[1::2], strict=True):
        assert_same_tensor(counts, getattr(got, counts), getattr(want, counts))
        if getattr(want, counts) is None:
            continue
        number, index = getattr(want, counts)[..., None], getattr(want, indices)
        is_listed = torch.arange(index.shape[-1]) < number
        assert getattr(got, indices).shape == index.shape
        assert_same_tensor(indices, getattr(got, indices)[is_listed], index[is_listed])


def from_mask(mask, q_block, kv_block, separate_full_blocks=True):
    """torch's own, of a dense mask."""
    kinds = flex._convert_mask_to_block_mask(mask, q_block, kv_block, separate_full_blocks)
    return flex._create_sparse_block_from_block_mask(
        kinds, None, mask.shape[-2:], q_block, kv_block
    )


block_sizes = st.one_of(
    st.sampled_from([1, 2, 4, 16, 128]),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)


@settings(max_examples=250)
@given(
    call=calls(min_size=1), sizes=st.tuples(st.integers(1, 9), st.integers(1, 20)), data=st.data()
)
def test_operator(call, sizes, data):
    """Any program, any positions: the blocks of the mask that boolean writes."""
    mask = torch.ops.attn_mask.boolean(*call.args, **call.positions)
    if mask.shape[1] == 0:
        return
    heads = data.draw(st.sampled_from([mask.shape[1], 2 if mask.shape[1] == 1 else mask.shape[1]]))
    separate = data.draw(st.booleans())
    want = from_mask(mask.expand(-1, heads, -1, -1), *sizes, separate)
    got = torch.ops.attn_mask.block_mask(
        *call.args[:3],
        heads,
        *call.args[3:],
        *sizes,
        **call.positions,
        separate_full_blocks=separate,
    )
    names = NAMES if separate else PARTIAL_ONLY
    assert len(got) == len(names)
    for name, tensor in zip(names, got, strict=True):
        assert_same_tensor(name, tensor, getattr(want, name))
        assert tensor.is_contiguous()
    states = torch.ops.attn_mask._block_states(
        *call.args[:3], heads, *call.args[3:], *sizes, **call.positions
    )
    partial, full = flex._convert_mask_to_block_mask(mask, *sizes, True)
    assert torch.equal(states.expand(full.shape), partial + 2 * full)


@settings(max_examples=150)
@given(
    build=builders(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 50), st.integers(1, 50)),
    block_size=block_sizes,
    separate=st.booleans(),
)
def test_as_of_torch(build, sizes, block_size, separate):
    """Rules, callables of the user's and trees of both."""
    mask_mod = masking_utils.and_masks(build(masking_utils))
    options = {"BLOCK_SIZE": block_size, "separate_full_blocks": separate, "device": "cpu"}
    try:
        want = flex.create_block_mask(mask_mod, *sizes, **options)
    except AssertionError:  # integers
        with pytest.raises(TypeError, match="expected mask_function to return a bool tensor"):
            attn_mask.create_block_mask(mask_mod, *sizes, **options)
        return
    got = attn_mask.create_block_mask(mask_mod, *sizes, **options)
    assert_same_block_mask(got, want)
    assert got.mask_mod is mask_mod
    compact = attn_mask.create_block_mask(mask_mod, *sizes, **options, compact=True)
    assert_same_blocks(compact, want)


def packed(length, document):
    positions = torch.arange(length) % document
    return rules.documents((torch.arange(length) // document).repeat(2, 1)) & rules.reindex(
        rules.causal() & rules.sliding_window(150), positions.repeat(2, 1)
    )


def images(length):
    ids = torch.full((2, length), -1)
    for number, first in enumerate(range(100, length - 300, 700)):
        ids[:, first : first + 300] = number
    return rules.blockwise(ids)


def some_padding(length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, -333:] = False
    mask[1, :200] = False
    return rules.padding(mask)


# At the sizes that are usual, where rows are seen many at a time.
LENGTH = 1500
USUAL = {
    "causal": rules.causal(),
    "window": rules.causal() & rules.sliding_window(400),
    "chunks": rules.causal() & rules.chunked(300),
    "documents": rules.documents((torch.arange(LENGTH) // 210).repeat(2, 1)),
    "packed": packed(LENGTH, 333),
    "images": rules.causal() | images(LENGTH),
    "padded": rules.causal() & some_padding(LENGTH),
    "padding under or": rules.sliding_window(9) & rules.causal() | some_padding(LENGTH),
    "scattered padding": rules.causal()
    & rules.padding(torch.arange(LENGTH).repeat(2, 1) % 200 > 90),
    "documents that come back": rules.documents((torch.arange(LENGTH) // 100 % 3).repeat(2, 1)),
    "user": rules.causal() & (lambda b, h, q, k: (q - k) % (h + 300) < 200),
}


@pytest.mark.parametrize("block_size", [128, (256, 128), (64, 500)], ids=str)
@pytest.mark.parametrize("name", USUAL)
def test_usual_sizes(name, block_size):
    sizes = (2, 2, LENGTH - 100, LENGTH)
    want = flex.create_block_mask(USUAL[name], *sizes, "cpu", block_size)
    assert_same_block_mask(
        attn_mask.create_block_mask(USUAL[name], *sizes, "cpu", block_size), want
    )
    compact = attn_mask.create_block_mask(USUAL[name], *sizes, "cpu", block_size, compact=True)
    assert_same_blocks(compact, want)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(USUAL)),
    q=st.integers(0, 700),
    kv=st.integers(0, 700),
    as_tensor=st.booleans(),
)
def test_offsets(name, q, kv, as_tensor):
    q_length, kv_length = 300, 500
    mask = masking_utils.sdpa_mask(
        2, q_length, kv_length, q, kv, USUAL[name], allow_is_causal_skip=False, use_vmap=True
    )
    offsets = {"q_offset": torch.tensor(q) if as_tensor else q, "kv_offset": kv}
    got = attn_mask.create_block_mask(
        USUAL[name], 2, None, q_length, kv_length, "cpu", 64, **offsets
    )
    want = from_mask(mask[:, :1], 64, 64)
    for tensor in NAMES:
        assert_same_tensor(tensor, getattr(got, tensor), getattr(want, tensor))
    again = flex.create_mask(got.mask_mod, 2, 1, q_length, kv_length, "cpu")
    assert torch.equal(again, mask[:, :1])


def test_a_shift_by_tensors_has_spans(monkeypatch):
    """As releases of transformers say offsets."""
    rule = rules.shift(USUAL["packed"], torch.tensor(100), torch.tensor(40))
    want = flex.create_block_mask(rule, 2, 1, 300, 500, device="cpu")
    monkeypatch.setattr(write._Problem, "evaluate", None)  # about no element
    assert_same_block_mask(attn_mask.create_block_mask(rule, 2, 1, 300, 500, "cpu"), want)


def test_batch_and_heads():
    for sizes in ((None, None, 200, 300), (3, None, 200, 300), (None, 2, 200, 300)):
        got = attn_mask.create_block_mask(rules.causal(), *sizes, device="cpu")
        assert_same_block_mask(got, flex.create_block_mask(rules.causal(), *sizes, device="cpu"))


def test_signature_is_of_torch():
    def by_place(create, **kwargs):
        return create(rules.causal(), 1, 1, 130, 260, "cpu", (16, 32), False, False, **kwargs)

    assert_same_block_mask(by_place(attn_mask.create_block_mask), by_place(flex.create_block_mask))
    got = attn_mask.create_block_mask(
        mask_mod=rules.causal(), B=1, H=1, Q_LEN=130, KV_LEN=260, device="cpu", _compile=True
    )
    want = flex.create_block_mask(rules.causal(), 1, 1, 130, 260, "cpu")
    assert_same_block_mask(got, want)
    with torch.device("meta"):
        assert by_place(attn_mask.create_block_mask).kv_indices.device.type == "cpu"


# Of torch 2.15.
@pytest.mark.applies(hasattr(flex, "_compute_dq_write_order_from_block_mask"))
def test_dq_write_order():
    rule = rules.causal() & rules.sliding_window(300)
    for order in (True, False):
        options = {"compute_dq_write_order": True, "dq_kv_order": order, "device": "cpu"}
        got = attn_mask.create_block_mask(rule, 2, 1, 700, 900, **options)
        want = flex.create_block_mask(rule, 2, 1, 700, 900, **options)
        assert_same_block_mask(got, want)
        assert torch.equal(got.dq_write_order, want.dq_write_order)
        assert torch.equal(got.dq_write_order_full, want.dq_write_order_full)
        assert got.dq_kv_order_spt is order
    with pytest.raises(ValueError, match="dq_kv_order must be a bool"):
        attn_mask.create_block_mask(rule, 1, 1, 9, 9, "cpu", dq_kv_order=torch.arange(3))


def test_dq_write_order_of_an_older_torch(monkeypatch):
    monkeypatch.delattr(flex, "_compute_dq_write_order_from_block_mask", raising=False)
    with pytest.raises(NotImplementedError, match="expected a torch that has compute_dq_write_or"):
        attn_mask.create_block_mask(rules.causal(), 1, 1, 9, 9, "cpu", compute_dq_write_order=True)


# Memory


def test_a_function_of_the_users_is_called_for_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(attn_mask._core.blocks, "_HELD", 128 * 1500)
    monkeypatch.setattr(write, "_TILE", 64 * 1500)
    calls_seen = []

    def by_distance(b, h, q, k):
        return (q - k) % 300 < 200 + h

    def watched(b, h, q, k):
        calls_seen.append(1)
        return by_distance(b, h, q, k)

    got = attn_mask.create_block_mask(watched, 1, 2, 1100, 1500, "cpu")
    assert len(calls_seen) > 10
    assert_same_block_mask(got, flex.create_block_mask(by_distance, 1, 2, 1100, 1500, "cpu"))


def test_a_million_tokens():
    rule, length = rules.causal() & rules.sliding_window(4096), 2**20
    got = attn_mask.create_block_mask(rule, 1, 1, length, length, "cpu", compact=True)
    assert got.kv_indices.untyped_storage().nbytes() < 2**21
    assert got.kv_indices.shape == (1, 1, 8192, 8192)
    assert got.kv_num_blocks[0, 0, -1] == 2
    assert got.full_kv_num_blocks[0, 0, -1] == 31
    assert got.kv_indices[0, 0, 5000, :2].tolist() == [5000 - 32, 5000]
    assert got.full_kv_indices[0, 0, 5000, :31].tolist() == list(range(5000 - 31, 5000))
    assert got.full_q_indices[0, 0, 5000, :31].tolist() == list(range(5001, 5032))


def test_widths_that_are_declared():
    rule = rules.documents((torch.arange(1000) // 210)[None])
    want = flex.create_block_mask(rule, 1, 1, 1000, 1000, "cpu", 64)
    for compact in (8, (8, 9), 100):
        got = attn_mask.create_block_mask(rule, 1, 1, 1000, 1000, "cpu", 64, compact=compact)
        assert_same_blocks(got, want)
    with pytest.raises(
        ValueError, match="expected kv_width to be at least 8, the most blocks of k"
    ):
        attn_mask.create_block_mask(rule, 1, 1, 1000, 1000, "cpu", 64, compact=(3, 9))
    with pytest.raises(ValueError, match="expected q_width to be at least 8, the most blocks of q"):
        attn_mask.create_block_mask(rule, 1, 1, 1000, 1000, "cpu", 64, compact=(9, 3))


def test_compact_is_a_block_mask():
    rule = rules.causal() & rules.sliding_window(200)
    want = flex.create_block_mask(rule, 2, 1, 1000, 1000, "cpu")
    got = attn_mask.create_block_mask(rule, 2, 1, 1000, 1000, "cpu", compact=True)
    assert got.kv_indices.untyped_storage().nbytes() < want.kv_indices.untyped_storage().nbytes()
    assert torch.equal(got.to_dense(), want.to_dense())
    assert str(got) == str(want)
    assert got.sparsity() == want.sparsity()
    assert torch.equal(got[0, :, 2].to_dense(), want[0, :, 2].to_dense())


# What it is for


def inputs(q_length, kv_length):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 16, generator=generator) for n in (q_length, kv_length, kv_length)]


@pytest.mark.parametrize(
    ("q_length", "kv_length", "options"),
    [
        (500, 500, {}),
        (500, 500, {"compact": True}),
        (1, 500, {"q_offset": 430}),  # a row of a decode step
    ],
    ids=["square", "compact", "decode"],
)
def test_compiled_flex_attention(q_length, kv_length, options):
    ids = (torch.arange(600) // 310).repeat(2, 1)
    rule = rules.causal() & rules.sliding_window(200) & rules.documents(ids)
    block_mask = attn_mask.create_block_mask(rule, 2, None, q_length, kv_length, "cpu", **options)
    mask = masking_utils.sdpa_mask(
        2,
        q_length,
        kv_length,
        options.get("q_offset", 0),
        mask_function=rule,
        allow_is_causal_skip=False,
    )
    tensors = inputs(q_length, kv_length)
    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    got = compiled(*tensors, block_mask=block_mask)
    want = scaled_dot_product_attention(*tensors, attn_mask=mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)


@pytest.mark.cuda
def test_gradients():
    """torch's flex attention has no backward on the CPU."""
    ids = (torch.arange(300) // 110).repeat(2, 1).cuda()
    rule = rules.causal() & rules.documents(ids)
    block_mask = attn_mask.create_block_mask(rule, 2, None, 300, 300, "cuda")
    mask = masking_utils.sdpa_mask(
        2, 300, 300, mask_function=rule, allow_is_causal_skip=False, device="cuda"
    )
    got, want = ([t.cuda().requires_grad_() for t in inputs(300, 300)] for _ in range(2))
    weight = torch.randn(2, 2, 300, 16, device="cuda")
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    (compiled(*got, block_mask=block_mask) * weight).sum().backward()
    (scaled_dot_product_attention(*want, attn_mask=mask) * weight).sum().backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-3, rtol=5e-3)


def test_pickle():
    rule = rules.causal() & rules.documents((torch.arange(300) // 110)[None])
    block_mask = attn_mask.create_block_mask(rule, 1, 1, 290, 290, "cpu", q_offset=10, kv_offset=10)
    again = pickle.loads(pickle.dumps(block_mask))
    assert_same_block_mask(again, block_mask)
    args = (1, 1, 290, 290, "cpu")
    want = flex.create_mask(block_mask.mask_mod, *args)
    assert torch.equal(flex.create_mask(again.mask_mod, *args), want)


def test_block_mask_to():
    ids = (torch.arange(3000) // 110)[None]
    for options in ({}, {"compact": True}, {"separate_full_blocks": False}):
        block_mask = attn_mask.create_block_mask(
            rules.documents(ids), 1, 1, 3000, 3000, "cpu", **options
        )
        moved = attn_mask.block_mask_to(block_mask, "meta")
        for name in NAMES:
            before, after = getattr(block_mask, name), getattr(moved, name)
            if before is None:
                assert after is None
                continue
            assert after.device.type == "meta"
            assert (after.shape, after.stride()) == (before.shape, before.stride())
        assert moved.mask_mod.encode()[1][0].device.type == "meta"
        assert block_mask.mask_mod.encode()[1][0].device.type == "cpu"
        same = attn_mask.block_mask_to(block_mask, "cpu")
        assert same.mask_mod is block_mask.mask_mod
        for name in NAMES:
            assert_same_tensor(name, getattr(same, name), getattr(block_mask, name))


def by_distance(b, h, q, k):
    return q - k < 50


def test_block_mask_to_keeps_functions_of_the_users():
    block_mask = attn_mask.create_block_mask(by_distance, 1, 1, 100, 100, "cpu")
    assert attn_mask.block_mask_to(block_mask, "meta").mask_mod is by_distance


# While graphs are recorded


@pytest.mark.parametrize("kind", ["rule", "user", "compact"])
def test_one_graph(kind):
    ids = (torch.arange(500) // 110)[None]

    def make(ids, length):
        rule = rules.causal() & rules.documents(ids)
        if kind == "user":
            rule = rule & (lambda b, h, q, k: q - k < 77)
        compact = (3, 3) if kind == "compact" else False
        return attn_mask.create_block_mask(rule, 1, 1, length, length, "cpu", 64, compact=compact)

    torch._dynamo.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    for length in (300, 450):
        got, want = compiled(ids, length), make(ids, length)
        for name in NAMES:
            assert_same_tensor(name, getattr(got, name), getattr(want, name))


def test_compact_has_to_be_declared_while_a_graph_is_recorded():
    @torch.compile(backend="eager", fullgraph=True)
    def make():
        return attn_mask.create_block_mask(rules.causal(), 1, 1, 300, 300, "cpu", compact=True)

    with pytest.raises(Exception, match="expected compact to be a number of blocks"):
        make()


SAMPLES = [
    pytest.param(name, args, kwargs, id=f"{name}-{i}")
    for name, samples in BLOCK_SAMPLES.items()
    for i, (args, kwargs) in enumerate(samples)
]
every_sample = pytest.mark.parametrize(
    ("name", "args", "kwargs"), [s for s in SAMPLES if s.values[0] != "_block_mask_widths"]
)


def layouts(result):
    return torch.utils._pytree.tree_map(lambda t: (t.dtype, t.shape, t.stride()), result)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else result


@every_sample
def test_opcheck(name, args, kwargs):
    torch.library.opcheck(operator(name).default, args, kwargs)


def test_opcheck_of_a_host_decision():
    for args, kwargs in BLOCK_SAMPLES["_block_mask_widths"]:
        torch.library.opcheck(
            operator("_block_mask_widths").default,
            args,
            kwargs,
            test_utils=("test_schema", "test_autograd_registration"),
        )


@every_sample
def test_meta_and_fake_agree_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    meta = {**map_tensors(lambda t: t.to("meta"), kwargs), "device": torch.device("meta")}
    got = operator(name)(*map_tensors(lambda t: t.to("meta"), args), **meta)
    assert layouts(got) == layouts(want)
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *map_tensors(mode.from_tensor, args), **map_tensors(mode.from_tensor, kwargs)
        )
    assert layouts(fake) == layouts(want)
    assert all(t.device.type == "cpu" for t in tensors(fake))


@pytest.mark.cuda
@every_sample
def test_cuda_agrees_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    args, kwargs = map_tensors(lambda t: t.cuda(), (args, kwargs))
    with nothing_waits():
        got = operator(name)(*args, **{**kwargs, "device": torch.device("cuda")})
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a.cpu(), b)


def test_threads(keep_num_threads):
    rule = rules.causal() & rules.sliding_window(4096) & some_padding(2**18)
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(attn_mask.create_block_mask(rule, 2, 1, 2**18, 2**18, "cpu", compact=True))
    for name in NAMES:
        stored = [
            getattr(m, name).as_strided((getattr(m, name).untyped_storage().nbytes() // 4,), (1,))
            for m in made
        ]
        assert torch.equal(*stored), name


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"BLOCK_SIZE": 0}, ValueError, "expected BLOCK_SIZE to be at least 1, but got 0"),
        ({"BLOCK_SIZE": (128, -1)}, ValueError, "expected BLOCK_SIZE to be at least 1, but got -1"),
        ({"BLOCK_SIZE": 1.5}, TypeError, "expected BLOCK_SIZE to be an int, but got float"),
        ({"BLOCK_SIZE": True}, TypeError, "expected BLOCK_SIZE to be an int, but got bool"),
        (
            {"BLOCK_SIZE": (1, 2, 3)},
            ValueError,
            "expected BLOCK_SIZE to be an int or two, but got 3",
        ),
        ({"BLOCK_SIZE": 2**31}, ValueError, "expected q_block_size to be positive and less than 2"),
        ({"Q_LEN": -1}, ValueError, "expected Q_LEN to be at least 0, but got -1"),
        ({"KV_LEN": -5}, ValueError, "expected KV_LEN to be at least 0, but got -5"),
        ({"B": -1}, ValueError, "expected B to be at least 0, but got -1"),
        ({"H": 1.0}, TypeError, "expected H to be an int, but got float"),
        ({"Q_LEN": "9"}, TypeError, "expected Q_LEN to be an int, but got str"),
        (
            {"Q_LEN": 10**8, "KV_LEN": 10**8},
            ValueError,
            r"\[1, 1, 781250, 781250\] int32 .* create_block_mask\(compact=True\)",
        ),
        ({"Q_LEN": 2**62, "KV_LEN": 2**62}, ValueError, "expected less than 2\\^31 blocks in each"),
        (
            {"Q_LEN": 10**12, "KV_LEN": 10**12},
            ValueError,
            r"or without create_block_mask\(compact=True\), but got an index of \[7812500000, 7",
        ),
        ({"KV_LEN": 2**63 - 1}, ValueError, "expected lengths of at most 2\\^62, but got 922"),
        (
            {"Q_LEN": 2**59, "mask_mod": lambda b, h, q, k: q >= k, "compact": 8},
            ValueError,
            "expected less than 2\\^31 blocks in each",
        ),
        (
            {"Q_LEN": 2**33, "KV_LEN": 2**20, "mask_mod": lambda b, h, q, k: q >= k},
            ValueError,
            "expected indices of at most 2\\^35 bytes",
        ),
        (
            {"kv_offset": torch.tensor([[3], [4]]), "mask_mod": lambda b, h, q, k: q >= k},
            ValueError,
            r"expected kv_offset and kv_positions to be for .* = \[1, 200\], but got \[2, 1\]",
        ),
        ({"KV_LEN": 2**63}, ValueError, "expected KV_LEN to be less than 2\\^63, but got 922"),
        ({"BLOCK_SIZE": 2**70}, ValueError, "expected BLOCK_SIZE to be less than 2\\^63, but got"),
        ({"q_offset": 2**60}, ValueError, "expected q_offset to be within 2\\^59 of 0, but got"),
        ({"kv_offset": -(2**60)}, ValueError, "expected kv_offset to be within 2\\^59 of 0"),
        ({"q_offset": 0.5}, TypeError, "expected q_offset to be an int or a tensor, but got float"),
        (
            {"kv_offset": None},
            TypeError,
            "expected kv_offset to be an int or a tensor, but got Non",
        ),
        (
            {"q_offset": torch.zeros(2, 2)},
            ValueError,
            "expected q_offset to be an int, or a tensor",
        ),
        ({"compact": -1}, ValueError, "expected compact to be at least 0, but got -1"),
        ({"compact": 1.5}, TypeError, "expected compact to be an int, but got float"),
        ({"mask_mod": 3}, TypeError, "expected mask_mod to be callable, but got int"),
        (
            {"mask_mod": lambda b, h, q, k: q - k},
            TypeError,
            "expected mask_function to return a bool tensor, but got torch.int64",
        ),
        (
            {"mask_mod": rules.documents(torch.zeros(1, 99, dtype=torch.int64))},
            ValueError,
            "^documents: expected ids to be of length 200 or longer, for the queries of create_bl",
        ),
        (
            {
                "mask_mod": rules.padding(torch.ones(3, TABLE, dtype=torch.bool)),
                "KV_LEN": 9,
                "B": 2,
            },
            ValueError,
            r"^padding: expected mask to have 1 or 2 rows, for a batch of 2, but got \[3, ",
        ),
        (
            {"mask_mod": rules.documents(torch.zeros(2, 200, dtype=torch.int64)), "B": None},
            ValueError,
            r"^documents: expected ids to have 1 row, for a batch of 1, but got \[2, 200\]",
        ),
        (
            {"mask_mod": rules.causal},
            TypeError,
            r"expected mask_mod to be a mask function, but got causal, which makes one: call cau",
        ),
    ],
    ids=str,
)
def test_bad_input(change, error, message):
    arguments = {
        "mask_mod": rules.causal(),
        "B": 1,
        "H": 1,
        "Q_LEN": 200,
        "KV_LEN": 200,
        "device": "cpu",
        **change,
    }
    with pytest.raises(error, match=message):
        attn_mask.create_block_mask(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": -1}, "block_mask: expected heads to be a size"),
        ({"kv_block_size": 0}, "block_mask: expected kv_block_size to be positive and less than 2"),
        ({"q_width": -1}, "block_mask: expected q_width to be at least 0, but got -1"),
        ({"kv_width": -1}, "block_mask: expected kv_width to be at least 0, but got -1"),
        (
            {"rule": [rules.BITS, 0], "operands": [torch.ones(1, 2, 20, 20).bool()]},
            "block_mask: expected bits operands to have 1 or 3 heads, but got 2",
        ),
    ],
    ids=str,
)
def test_bad_input_of_the_operator(change, message):
    arguments = {
        "rule": [rules.CAUSAL],
        "operands": [],
        "batch_size": 1,
        "heads": 3,
        "q_length": 20,
        "kv_length": 20,
        "q_block_size": 4,
        "kv_block_size": 4,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        torch.ops.attn_mask.block_mask(**arguments)


def test_device_of_a_torch_that_is_built_for_another(monkeypatch):
    """It names its accelerator even where there is none."""
    current = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    block_mask = attn_mask.create_block_mask(rules.causal(), 1, 1, 5, 5)
    assert block_mask.kv_num_blocks.device == torch.device("cpu")


# A mask without rows or columns is read by nothing: its operands may point nowhere.
@pytest.mark.parametrize("name", ["block_mask", "_block_states", "_block_mask_widths"])
@pytest.mark.parametrize(("q_length", "kv_length"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch_size", [0, 1, 2])
def test_no_row_or_no_column(name, q_length, kv_length, batch_size):
    bits = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, q_length, kv_length)
    programs = {
        "bits": ([rules.BITS, 0], [bits]),
        "padding": ([rules.PADDING, 0], [torch.ones(1, 4)]),
        "no padding": ([rules.PADDING, 0], [torch.ones(1, 0)]),
        "documents": ([rules.DOCUMENTS, 0], [torch.zeros(1, 0, dtype=torch.int64)]),
        "or": ([rules.OR, 2, rules.BITS, 0, rules.CAUSAL], [bits]),
        "more than kernels take": ([rules.AND, 30, *[rules.BITS, 0] * 30], [bits]),
    }
    q_blocks, kv_blocks = -(-q_length // 4), -(-kv_length // 4)
    for program, operands in programs.values():
        got = operator(name)(program, operands, batch_size, 1, q_length, kv_length, 4, 4)
        if name == "_block_mask_widths":
            assert got == [0, 0]
        elif name == "_block_states":
            assert got.shape[2:] == (q_blocks, kv_blocks)
        else:
            for index, (lines, total) in enumerate(((q_blocks, kv_blocks), (kv_blocks, q_blocks))):
                for num_blocks, indices in (got[4 * index :][:2], got[4 * index + 2 :][:2]):
                    assert num_blocks.tolist() == [[[0] * lines]] * batch_size
                    assert indices.shape == (batch_size, 1, lines, total)


def test_compact_storage_of_a_mask_without_rows():
    got = torch.ops.attn_mask.block_mask(
        *rules.causal().encode(), 1, 1, 0, 9, 4, 4, kv_width=1, q_width=1
    )
    assert [indices.tolist() for indices in got[1::2]] == [[0, 0], [0, 0], [], []]


@pytest.mark.parametrize("kv_length", [2**34, 2**50])
def test_tables_that_are_short_beside_the_mask(kv_length):
    """What they don't hold is not gone through."""
    ids = torch.tensor([[3, 3, 5, 5]])
    for program, operand, states in (
        ([rules.PADDING, 0], torch.ones(1, 4), [1]),
        ([rules.PADDING, 0], torch.zeros(1, 4), [0]),
        ([rules.REINDEX, 0, rules.CAUSAL], ids, [1]),
        ([rules.REINDEX, 0, rules.ALL], ids[:, ::2], [1]),
        ([rules.DOCUMENTS, 0], ids, [1]),
        ([rules.REINDEX, 0, rules.PADDING, 1], ids, [0]),
    ):
        operands = [operand, torch.ones(1, 3)]
        sizes = 1, 1, 4, kv_length, 4, 2**30
        widths = operator("_block_mask_widths")(program, operands, *sizes)
        assert widths == [states[0], states[0]]
        if kv_length == 2**34:
            got = operator("_block_states")(program, operands, *sizes)
            assert got.flatten().tolist() == states + [0] * 15


def test_widths_of_values_that_are_not_there():
    with pytest.raises(
        NotImplementedError, match="expected tensors with values, but got device me"
    ):
        operator("_block_mask_widths")(
            *rules.causal().encode(), 1, 1, 9, 9, 4, 4, device=torch.device("meta")
        )


@pytest.mark.parametrize("lengths", [(0, 300), (300, 0), (0, 0)], ids=str)
def test_nothing_to_summarize(lengths):
    for rule in (rules.causal(), lambda b, h, q, k: q >= k):
        got = attn_mask.create_block_mask(rule, 2, 1, *lengths, device="cpu")
        q_blocks, kv_blocks = ((n + 127) // 128 for n in lengths)
        assert got.kv_num_blocks.tolist() == [[[0] * q_blocks]] * 2
        assert got.q_num_blocks.tolist() == [[[0] * kv_blocks]] * 2
        assert got.kv_indices.shape == (2, 1, q_blocks, kv_blocks)


def test_keys_far_apart_that_rows_between_the_first_and_the_last_see():
    """Numbers that no key has between those that the first and the last row see."""
    positions = torch.tensor([[2**40, 10, -(2**40), 2**41]])
    rule, operands = rules.window(2, 2).encode()
    where = {"q_offset": 0, "kv_positions": positions}
    mask = torch.ops.attn_mask.boolean(rule, operands, 1, 32, 4, **where)
    states = torch.ops.attn_mask._block_states(rule, operands, 1, 1, 32, 4, 32, 1, **where)
    assert mask.any(2).tolist() == [[[False, True, False, False]]]
    assert (states != 0).tolist() == [[[[False, True, False, False]]]]
