"""The operators in ATen's: the same masks, in graphs that hold nothing of ours."""

import asyncio
import threading

import attn_mask
import pytest
import torch
from attn_mask import for_transformers, masking_utils, rules
from attn_mask import modeling_attn_mask_utils as ours
from attn_mask._core import blocks, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import MASK_DTYPES, OUT_DTYPES, assert_same_mask, lowest
from parity import padding_masks
from rule_reference import calls
from sample_calls import (
    BLOCK_OPERATORS,
    BLOCK_SAMPLES,
    CALL_IDS,
    CALLS,
    HOST_DECISIONS,
    OPERATORS,
    SAMPLES,
    operator,
)
from test_compile import CALLS as HELPERS
from test_compile import inputs
from test_contexts import run_python
from test_exported import EVERYTHING, PAST, SIZES, Everything
from test_rules import biases
from torch.fx.experimental.proxy_tensor import make_fx

FLOAT = torch.float32
MASKS = [name for name in OPERATORS if name not in HOST_DECISIONS]
TABLE = attn_mask.decompositions()

every_mask = pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [call for call in CALLS if call[0] in MASKS],
    ids=[id_ for id_, call in zip(CALL_IDS, CALLS, strict=True) if call[0] in MASKS],
)
every_list = pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(name, *call) for name in ("block_mask", "_block_states") for call in BLOCK_SAMPLES[name]],
)
traced = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


def layout(mask):
    """Where the elements lie that there are; how far apart the others would is not compared."""
    dims = zip(mask.shape, mask.stride(), strict=True)
    return [stride for size, stride in dims if size > 1] if mask.numel() else None


def assert_same(got, want):
    """None, a mask or a list of tensors."""
    if want is None or isinstance(want, list):
        assert type(got) is type(want)
        for one, other in zip(got or (), want or (), strict=True):
            assert (one.dtype, one.stride()) == (other.dtype, other.stride())
            assert torch.equal(one, other)
        return
    assert_same_mask(got, want)
    assert layout(got) == layout(want)


# The table


def test_table_has_every_operator_that_can_stand_in_a_graph():
    of_masks = {
        getattr(operator(name), overload) for name in MASKS for overload in ("default", "out")
    }
    of_blocks = {operator(name).default for name in BLOCK_OPERATORS if name != "_block_mask_widths"}
    of_attention = {
        operator(name).default
        for name in ("scaled_dot_product_attention", "scaled_dot_product_attention_backward")
    }
    assert TABLE.keys() == of_masks | of_blocks | of_attention
    attn_mask.decompositions().clear()  # it is the caller's own
    assert attn_mask.decompositions() == TABLE


@every_mask
def test_masks(name, args, kwargs):
    assert_same(TABLE[operator(name).default](*args, **kwargs), operator(name)(*args, **kwargs))


@every_list
def test_lists_of_blocks(name, args, kwargs):
    assert_same(TABLE[operator(name).default](*args, **kwargs), operator(name)(*args, **kwargs))


@every_mask
@pytest.mark.parametrize("stride_multiple", [2, 8])
def test_stride_multiple(name, args, kwargs, stride_multiple):
    kwargs = {**kwargs, "stride_multiple": stride_multiple}
    assert_same(TABLE[operator(name).default](*args, **kwargs), operator(name)(*args, **kwargs))


@every_mask
def test_out(name, args, kwargs):
    """Also where the other form gives None."""
    like = operator(name)(*args, **kwargs)
    dtype = kwargs.pop("dtype", None) if (kwargs := dict(kwargs)) else None
    if like is None:
        batch_size, q_length = args[1] if name.startswith("_prepare") else args[:2]
        if name == "_create_4d_causal_attention_mask":
            batch_size, q_length = args[0]
        kv_length = args[2] if name == "to_causal_4d" else q_length + args[-1]
        like = torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype or FLOAT)
    got, want = (torch.full((2, *like.shape), 3).to(like.dtype)[0] for _ in range(2))
    assert TABLE[operator(name).out](*args, **kwargs, out=got) is None
    operator(name)(*args, **kwargs, out=want)
    assert_same(got, want)


@settings(max_examples=200)
@given(calls(), st.sampled_from([1, 3]), st.booleans())
def test_any_rule(call, stride_multiple, unmask_unattended):
    arguments = {
        **call.positions,
        "stride_multiple": stride_multiple,
        "unmask_unattended": unmask_unattended,
    }
    got = TABLE[operator("boolean").default](*call.args, **arguments)
    assert_same(got, operator("boolean")(*call.args, **arguments))


@settings(max_examples=100)
@given(st.data(), calls(depth=2), st.booleans(), st.sampled_from([None, -100, -0.5, float("-inf")]))
def test_any_bias(data, call, unmask_unattended, masked_value):
    bias = data.draw(biases(call))
    arguments = {
        **call.positions,
        "dtype": bias.dtype,
        "bias": bias,
        "unmask_unattended": unmask_unattended,
        "masked_value": masked_value,
    }
    got = TABLE[operator("additive").default](*call.args, **arguments)
    assert_same(got, operator("additive")(*call.args, **arguments))


@settings(max_examples=100)
@given(
    calls(min_size=1),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([None, 999]),
)
def test_any_blocks(call, q_block, kv_block, separate_full_blocks, width):
    heads = operator("boolean")(*call.args, **call.positions).shape[1]
    args = (*call.args[:3], heads, *call.args[3:], q_block, kv_block)
    arguments = {
        **call.positions,
        "separate_full_blocks": separate_full_blocks,
        "kv_width": width,
        "q_width": width,
    }
    got = TABLE[operator("block_mask").default](*args, **arguments)
    assert_same(got, operator("block_mask")(*args, **arguments))


@settings(max_examples=200)
@given(st.data(), st.sampled_from(OUT_DTYPES), st.booleans(), st.sampled_from([None, 1, 4]))
def test_any_padding(data, dtype, unmask_unattended, sliding_window):
    q_length = data.draw(st.integers(0, 6))
    kv_length = q_length + data.draw(st.integers(0, 3))
    mask = data.draw(padding_masks(data.draw(st.integers(0, 3)), kv_length))
    arguments = {
        "dtype": dtype,
        "key_value_length": kv_length,
        "sliding_window": sliding_window,
        "unmask_unattended": unmask_unattended,
    }
    got = TABLE[operator("to_4d").default](mask, q_length, **arguments)
    assert_same(got, operator("to_4d")(mask, q_length, **arguments))


@pytest.mark.parametrize("dtype", [*OUT_DTYPES, torch.int64, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("low", [-1e4, float("-inf"), -0.0, 0, 3, float("nan"), None])
def test_unmasked_rows(dtype, low):
    if low is None:
        low = lowest(dtype) if dtype.is_floating_point else torch.iinfo(dtype).min
    elif not dtype.is_floating_point and low not in (0, 3):
        low = 5  # what the dtype holds
    values = torch.tensor([0.0, -0.0, 3.0, 1.0] if dtype.is_floating_point else [0, 0, 3, 1])
    mask = values.to(dtype)[torch.arange(48).view(2, 1, 6, 4) % 4].clone()
    mask[:, :, 1::2] = low
    mask[0, 0, 0, :] = torch.tensor(0.0).to(dtype)
    for given_mask in (mask, mask.transpose(-1, -2), mask[0, 0, 1]):
        got = TABLE[operator("_unmask_unattended").default](given_mask, low)
        assert_same(got, operator("_unmask_unattended")(given_mask, low))


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_dtypes_of_4d_masks(dtype):
    mask = (torch.arange(16) % 3).view(2, 1, 2, 4).to(FLOAT).to(dtype)
    args = (mask, (2, 2), torch.zeros(2, 2, 4, dtype=torch.float16), 2)
    for name in ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa"):
        if "float8" in str(dtype) and not name.endswith("sdpa"):
            continue
        assert_same(TABLE[operator(name).default](*args), operator(name)(*args))


# Graphs


def names_of(graph):
    """The operators of ours in a graph, as targets or as arguments of others."""
    nodes = graph.graph.nodes if hasattr(graph, "graph") else graph
    return [str(node) for node in nodes if "attn_mask" in f"{node.target} {node.args}"]


def dynamic_shapes():
    batch_size = torch.export.Dim("batch_size", min=2, max=64)
    q_length = torch.export.Dim("q_length", min=2, max=4096)
    return {"mask": {0: batch_size, 1: q_length + PAST}, "queries": {0: batch_size, 1: q_length}}


def check_everything(module):
    for sizes in SIZES:
        mask, queries = inputs(*sizes)
        mask[-1, 2] = 0
        want = Everything()(mask, queries)
        for name, one, other in zip(EVERYTHING, module(mask, queries), want, strict=True):
            assert_same_mask(one, other), name


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # from inside torch 2.11
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_run_decompositions(strict):
    """Of every operator, `.out` included, for any sizes; alone and beside torch's table."""
    torch._dynamo.reset()
    program = torch.export.export(
        Everything(), inputs(*SIZES[0]), dynamic_shapes=dynamic_shapes(), strict=strict
    )
    assert names_of(program)
    for table in (
        attn_mask.decompositions(),
        {**torch.export.default_decompositions(), **attn_mask.decompositions()},
    ):
        decomposed = program.run_decompositions(table)
        assert not names_of(decomposed)
        check_everything(decomposed.module())


def create(implementation, name="create_causal_mask"):
    class Config:
        _attn_implementation = implementation
        is_causal = True
        sliding_window = 3
        attention_chunk_size = 4

    return lambda mask, queries: getattr(masking_utils, name)(Config(), queries, mask, None)


def block_tensors(mask, queries):
    made = attn_mask.create_block_mask(
        rules.causal() & rules.padding(mask > 0),
        mask.shape[0],
        None,
        queries.shape[1],
        mask.shape[1],
        device="cpu",
        BLOCK_SIZE=4,
        q_offset=mask.shape[1] - queries.shape[1],
    )
    return torch.cat([getattr(made, name).flatten() for name in blocks._TENSORS])


# f(mask [b, kv], queries [b, q, d]), each of which makes a mask in some way.
OF_RULES = {
    "sdpa_mask": lambda mask, queries: masking_utils.sdpa_mask(
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        mask.shape[1] - queries.shape[1],
        0,
        rules.causal() & (rules.sliding_window(4) | rules.blockwise(mask.cumsum(1) // 2)),
        mask > 0,
    ),
    "eager_mask": lambda mask, queries: masking_utils.eager_mask(
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        mask.shape[1] - queries.shape[1],
        0,
        rules.causal() & rules.chunked(3, mask[:, 0]),
        mask > 0,
    ),
    "sdpa_arguments": lambda mask, queries: (
        attn_mask.sdpa_arguments(
            queries[:, None], mask[:, None, :, None].float(), rules.causal(), mask
        ).attn_mask
    ),
    "boolean": lambda mask, queries: attn_mask.boolean(
        rules.causal() & rules.padding(mask) | rules.nothing(),
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        q_positions=mask.cumsum(1)[:, : queries.shape[1]],
        unmask_unattended=True,
    ),
    "additive": lambda mask, queries: attn_mask.additive(
        rules.causal() & rules.padding(mask),
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        q_offset=mask[0, 1],
        bias=(queries[:, :, :1] - mask[:, None].float())[:, None] + 2,
        masked_value=-100,
        unmask_unattended=True,
    ),
    "additive, out": lambda mask, queries: attn_mask.additive(
        rules.causal() & rules.padding(mask),
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        dtype=torch.float16,
        masked_value=float("-inf"),
        out=torch.empty((mask.shape[0], 1, queries.shape[1], mask.shape[1]), dtype=torch.float16),
    ),
    "create_causal_mask": create("sdpa"),
    "create_sliding_window_causal_mask": create("eager", "create_sliding_window_causal_mask"),
    "create_chunked_causal_mask": create("eager", "create_chunked_causal_mask"),
    "create_bidirectional_mask": create("sdpa", "create_bidirectional_mask"),
    "create_block_mask": block_tensors,
}
PYTHON_LAYER = {**HELPERS, **OF_RULES}


class Layer(torch.nn.Module):
    """Several functions as one module."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, mask, queries):
        return [function(mask, queries) for function in self.functions]


# Whether a block is the only one of its row is fixed in a graph of ours as well, and torch's
# BlockMask takes no sizes that jit records.
DYNAMIC = [name for name in PYTHON_LAYER if name != "create_block_mask"]


def check_layer(module):
    for sizes in ((2, 5, 8), (3, 9, 12), (4, 2, 5)):
        mask, queries = inputs(*sizes)
        mask[-1, 2] = 0
        for name, got in zip(DYNAMIC, module(mask, queries), strict=True):
            assert_same_mask(got, PYTHON_LAYER[name](mask, queries)), name


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_of_aten_only(strict):
    torch._dynamo.reset()
    layer = Layer([PYTHON_LAYER[name] for name in DYNAMIC])
    with attn_mask.aten_only():
        program = torch.export.export(
            layer, inputs(2, 5, 8), dynamic_shapes=dynamic_shapes(), strict=strict
        )
    assert not names_of(program)
    check_layer(program.module())


@pytest.mark.parametrize("name", PYTHON_LAYER)
def test_compiled_aten_only(name):
    """A graph is not taken for one of the other kind."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, examples):
        graphs.append(graph)
        return graph

    compiled = torch.compile(PYTHON_LAYER[name], backend=keep, fullgraph=True, dynamic=True)
    want = PYTHON_LAYER[name](*inputs(2, 5, 8))
    assert_same_mask(compiled(*inputs(2, 5, 8)), want)
    with attn_mask.aten_only():
        assert_same_mask(compiled(*inputs(2, 5, 8)), want)
    assert [bool(names_of(graph)) for graph in graphs] == [True, False]
    assert_same_mask(compiled(*inputs(2, 5, 8)), want)
    assert len(graphs) == 2
    torch._dynamo.reset()


# These look at values where tensors have any.
LOOKING = ("sdpa_arguments", *(name for name in OF_RULES if name.startswith("create_")))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name in PYTHON_LAYER
        for mode in ("real", "fake", "symbolic")
        if mode != "real" or name not in LOOKING
    ],
)
def test_make_fx_of_aten_only(name, mode):
    with attn_mask.aten_only():
        graph = make_fx(PYTHON_LAYER[name], tracing_mode=mode)(*inputs(2, 5, 8))
    assert not names_of(graph)
    assert_same_mask(graph(*inputs(2, 5, 8)), PYTHON_LAYER[name](*inputs(2, 5, 8)))


def ran(call):
    """Which operators of ours a call runs."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        call()
    return [name for name in seen if name.startswith("attn_mask")]


@pytest.mark.parametrize("name", PYTHON_LAYER)
def test_eager_aten_only(name):
    call = PYTHON_LAYER[name]
    want = call(*inputs(2, 5, 8))
    got = []
    with attn_mask.aten_only():
        assert not ran(lambda: got.append(call(*inputs(2, 5, 8))))
    assert_same_mask(got[0], want)


def make_one():
    return ours._prepare_4d_attention_mask(torch.ones(2, 3), FLOAT)


def test_blocks_of_aten_only():
    """They may be nested, end by an error, and be entered again."""
    assert ran(make_one)
    block = attn_mask.aten_only()
    with block:
        with block, attn_mask.aten_only():
            assert not ran(make_one)
        assert not ran(make_one)
    assert ran(make_one)
    with pytest.raises(KeyError), attn_mask.aten_only():
        raise KeyError
    assert ran(make_one)


def test_aten_only_of_a_process():
    operators.set_everywhere(True)
    try:
        assert not ran(make_one)
    finally:
        operators.set_everywhere(False)
    assert ran(make_one)


def test_aten_only_is_of_one_thread_and_task():
    seen = []
    with attn_mask.aten_only():
        thread = threading.Thread(target=lambda: seen.append(bool(ran(make_one))))
        thread.start()
        thread.join()
    assert seen == [True]

    async def inside():
        with attn_mask.aten_only():
            await asyncio.sleep(0.01)
            return ran(make_one)

    async def outside():
        await asyncio.sleep(0.005)
        return ran(make_one)

    async def both():
        return await asyncio.gather(inside(), outside())

    within, beside = asyncio.run(both())
    assert not within
    assert beside


def test_errors_of_aten_only_name_the_operator():
    mask = torch.ones(2, 5)
    converter = ours.AttentionMaskConverter(True)
    with attn_mask.aten_only():
        with pytest.raises(ValueError, match=r"to_4d: expected attention_mask_2d .* kv_length 7"):
            converter.to_4d(mask, 5, FLOAT, key_value_length=7)
        with pytest.raises(TypeError, match=r"to_4d: expected dtype to be .*, but got Int"):
            converter.to_4d(mask, 5, torch.int32, key_value_length=5)
        with pytest.raises(TypeError, match=r"_expand_mask: expected mask .*but got ComplexFloat"):
            ours._prepare_4d_attention_mask(mask.to(torch.complex64), FLOAT)


# torch.jit.trace


def helpers_of(release):
    """The helpers as test_compile.CALLS, of a release of transformers."""
    module = for_transformers(release).modeling_attn_mask_utils
    converter = module.AttentionMaskConverter

    def past(mask, queries):
        return mask.shape[1] - queries.shape[1]

    def to_4d(mask, queries, window=None):
        return converter(True, window).to_4d(
            mask, queries.shape[1], key_value_length=mask.shape[1], dtype=FLOAT
        )

    made = {
        "to_causal_4d": lambda mask, queries: converter(True, 3).to_causal_4d(
            mask.shape[0], queries.shape[1], mask.shape[1], dtype=FLOAT, device=mask.device
        ),
        "to_4d": to_4d,
        "to_4d window": lambda mask, queries: to_4d(mask, queries, 2),
        "to_4d narrow": lambda mask, queries: to_4d(mask, queries, 1),
        "to_4d bidirectional": lambda mask, queries: converter(False).to_4d(
            mask, queries.shape[1], dtype=FLOAT
        ),
        "_make_causal_mask": lambda mask, queries: converter._make_causal_mask(
            queries.shape[:2], FLOAT, mask.device, past(mask, queries), 3
        ),
        "_make_causal_mask narrow": lambda mask, queries: converter._make_causal_mask(
            queries.shape[:2], FLOAT, mask.device, past(mask, queries), 0
        ),
        "_expand_mask": lambda mask, queries: converter._expand_mask(mask, FLOAT, queries.shape[1]),
        "prepare": lambda mask, queries: module._prepare_4d_causal_attention_mask(
            mask, queries.shape[:2], queries, past(mask, queries)
        ),
        "prepare window": lambda mask, queries: module._prepare_4d_causal_attention_mask(
            mask, queries.shape[:2], queries, past(mask, queries), 3
        ),
        "prepare both ways": lambda mask, queries: module._prepare_4d_attention_mask(
            mask, FLOAT, queries.shape[1]
        ),
        "create": lambda mask, queries: module._create_4d_causal_attention_mask(
            queries.shape[:2], FLOAT, mask.device, past(mask, queries)
        ),
    }
    version = tuple(map(int, release.split(".")))
    if version >= (4, 37):
        made["prepare 4-D"] = lambda mask, queries: module._prepare_4d_causal_attention_mask(
            mask[:, None, None, :].expand(-1, 1, queries.shape[1], -1).float(),
            queries.shape[:2],
            queries,
            past(mask, queries),
        )
    if version >= (4, 36):
        made["sdpa both ways"] = lambda mask, queries: module._prepare_4d_attention_mask_for_sdpa(
            mask, FLOAT, queries.shape[1]
        )
        if version >= (4, 39):
            last = (lowest(FLOAT),)
        made["_unmask_unattended"] = lambda mask, queries: converter._unmask_unattended(
            to_4d(mask, queries), *(last if version >= (4, 39) else (mask, 0.0))
        )
    if (4, 36) <= version < (4, 37) or version >= (4, 39):  # 4.37 unmasks, but not while tracing
        made["sdpa"] = lambda mask, queries: module._prepare_4d_causal_attention_mask_for_sdpa(
            mask, queries.shape[:2], queries, past(mask, queries), 3
        )
    return made


RELEASES = (
    "4.35.0", "4.36.0", "4.37.0", "4.39.0", "4.40.0", "4.41.0", "4.42.0", "4.45.0", "4.46.0",
    "5.0.0",
)  # fmt: skip


def check_traced(call, batch_size=2):
    function = torch.jit.trace(call, inputs(batch_size, 6, 6), check_trace=False)
    assert "attn_mask::" not in str(function.graph)
    for sizes in ((2, 6, 6), (3, 9, 9), (4, 3, 9)):
        mask, queries = inputs(*sizes)
        mask[0, :2] = 0
        assert_same_mask(function(mask, queries), call(mask, queries))


@traced
@pytest.mark.parametrize("name", DYNAMIC)
def test_traced_for_any_sizes(name):
    check_traced(PYTHON_LAYER[name])


@traced
@pytest.mark.parametrize("name", [name for name in DYNAMIC if "create" not in name])
def test_traced_with_one_row(name):
    """Nothing takes it for the same of every batch."""
    check_traced(PYTHON_LAYER[name], batch_size=1)


@traced
@pytest.mark.parametrize("release", RELEASES)
def test_helpers_of_releases_traced_for_any_sizes(release):
    for call in helpers_of(release).values():
        check_traced(call)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_nothing_is_fixed_silently():
    """Torch warns where a size becomes a constant; no mask here depends on one."""
    for name in ("to_4d", "to_4d window", "_expand_mask", "_make_causal_mask"):
        torch.jit.trace(HELPERS[name], inputs(2, 6, 6), check_trace=False)


def test_errors_of_traced_code_name_the_operator():
    def call(mask):
        return ours.AttentionMaskConverter(True).to_4d(
            mask, mask.shape[1], FLOAT, key_value_length=mask.shape[1] + 1
        )

    with (
        pytest.warns((FutureWarning, DeprecationWarning)),
        pytest.raises(ValueError, match=r"to_4d: expected attention_mask_2d .* with kv_length 6"),
    ):
        torch.jit.trace(call, torch.ones(2, 5))


# Devices without kernels of ours

ELSEWHERE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


@every_mask
def test_kernels_of_other_devices(name, args, kwargs):
    got = operator(name).default.redispatch(ELSEWHERE, *args, **kwargs)
    assert_same(got, operator(name)(*args, **kwargs))


@every_list
def test_lists_of_blocks_on_other_devices(name, args, kwargs):
    got = operator(name).default.redispatch(ELSEWHERE, *args, **kwargs)
    assert_same(got, operator(name)(*args, **kwargs))


@pytest.mark.parametrize("name", HOST_DECISIONS)
def test_host_decisions_on_other_devices(name):
    for args, kwargs in SAMPLES[name]:
        got = operator(name).default.redispatch(ELSEWHERE, *args, **kwargs)
        assert got == operator(name)(*args, **kwargs)


def test_errors_on_other_devices_name_the_operator():
    with pytest.raises(ValueError, match=r"to_4d: expected attention_mask_2d .* with kv_length 7"):
        operator("to_4d").default.redispatch(
            ELSEWHERE, torch.ones(2, 5), 5, dtype=FLOAT, key_value_length=7
        )


def test_another_device():
    """A backend in Python, which runs everything on the CPU."""
    run_python(
        """
        import torch

        torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere")
        import attn_mask
        from attn_mask import masking_utils
        from attn_mask import modeling_attn_mask_utils as helpers
        from torch.utils._pytree import tree_map

        aten = torch.ops.aten

        class There(torch.Tensor):
            @staticmethod
            def __new__(cls, held):
                made = torch._C._acc.create_empty_tensor(held.shape, held.dtype)
                made.__class__ = cls
                made.held = held
                return made

            def __init__(self, held):
                pass

        def there(value):
            return There(value) if isinstance(value, torch.Tensor) else value

        def here(value):
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return value.held if isinstance(value, There) else value

        def run(op, *args, **kwargs):
            if op is aten._copy_from.default:
                return there(here(args[1]).copy_(here(args[0])))
            return tree_map(there, op(*tree_map(here, args), **tree_map(here, kwargs)))

        backend = torch.library.Library("_", "IMPL")
        backend.fallback(run, "PrivateUse1")
        factories = torch.library.Library("aten", "IMPL")
        for name in ("arange", "arange.start_step"):
            factories.impl(
                name,
                lambda *args, device=None, pin_memory=None, **kwargs: there(
                    torch.arange(*args, **kwargs)
                ),
                "PrivateUse1",
            )

        padding = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        want = helpers._prepare_4d_causal_attention_mask(padding, (2, 4), torch.zeros(2, 4, 1), 0)
        got = helpers._prepare_4d_causal_attention_mask(
            there(padding), (2, 4), there(torch.zeros(2, 4, 1)), 0
        )
        assert got.device.type == "elsewhere"
        assert torch.equal(got.held, want)
        got = masking_utils.sdpa_mask(2, 4, 4, device="elsewhere", allow_is_causal_skip=False)
        assert torch.equal(got.held, masking_utils.sdpa_mask(2, 4, 4, allow_is_causal_skip=False))
        got = helpers._create_4d_causal_attention_mask((2, 4), torch.float32, "elsewhere")
        assert torch.equal(
            got.held, helpers._create_4d_causal_attention_mask((2, 4), torch.float32, "cpu")
        )
        """
    )


def test_other_layouts_are_refused_first():
    mask = torch.ones(2, 5).to_sparse()
    for key in ("MPS", "XPU", "PrivateUse1"):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Sparse{key}"))
        with pytest.raises(TypeError, match="to_4d: expected attention_mask_2d to be a strided"):
            operator("to_4d").default.redispatch(keys, mask, 5, dtype=FLOAT, key_value_length=5)
