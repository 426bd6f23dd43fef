"""What torch expects of an operator, of every operator of attn_mask."""

import attn_mask
import pytest
import torch
from attn_mask._core.library import operators_that
from masks import assert_same_mask
from sample_calls import (
    ATTENTION_OPERATORS,
    BLOCK_OPERATORS,
    BLOCK_SAMPLES,
    CALL_IDS,
    CALLS,
    HOST_DECISIONS,
    OPERATORS,
    SAMPLES,
    as_on_cuda,
    map_tensors,
    operator,
)
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

MASK_CALLS = [
    (id_, *call) for id_, call in zip(CALL_IDS, CALLS, strict=True) if call[0] not in HOST_DECISIONS
]

every_call = pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=CALL_IDS)
every_mask = pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [call[1:] for call in MASK_CALLS],
    ids=[call[0] for call in MASK_CALLS],
)


def moved(name, args, kwargs, device):
    """The same call on another device, given to factories by `device`."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    has_tensor = any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (args, kwargs))
    return operator(name)(*args, **(kwargs if has_tensor else {**kwargs, "device": device}))


def layout(result):
    if result is None:
        return None
    return result.dtype, result.shape, result.stride()


def test_every_operator_is_sampled():
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.split("::")[1] for s in schemas if s.name.startswith("attn_mask::")}
    sampled = {*SAMPLES, *BLOCK_SAMPLES, *ATTENTION_OPERATORS}
    assert registered == {*OPERATORS, *BLOCK_OPERATORS, *ATTENTION_OPERATORS} == sampled


@pytest.mark.parametrize("name", OPERATORS + BLOCK_OPERATORS + ATTENTION_OPERATORS)
def test_traits_are_those_of_the_registered_schema(name):
    """attn_mask._C reads them off the text of its table, torch has parsed the schema itself."""
    packet = operator(name)
    schema = packet.default._schema
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    results = [str(result.type) for result in schema.returns]
    traits = {
        "writes_mask": "out" in packet.overloads(),
        "is_factory": "device" in types,
        "takes_tensors": any("Tensor" in type_ for type_ in types.values()),
        "takes_rule": "rule" in types,
        "may_give_none": results == ["Optional[Tensor]"],
        "is_host_decision": "Tensor" not in results[0],
    }
    assert attn_mask._C.operators()[name] == traits


@pytest.mark.parametrize("name", operators_that(writes_mask=True))
def test_out_form_takes_the_same(name):
    """But the dtype may be left to `out`, which stands in the place of stride_multiple."""
    fresh, out = (overload._schema for overload in (operator(name).default, operator(name).out))
    assert str(out.returns) == "[]"
    assert len(fresh.arguments) == len(out.arguments)
    for one, other in zip(fresh.arguments, out.arguments, strict=True):
        assert one.kwarg_only == other.kwarg_only
        if one.name == "stride_multiple":
            assert (one.default_value, other.name) == (1, "out")
            assert str(other.type) == "Tensor" and other.alias_info.is_write
        elif one.name == "dtype":
            assert (other.name, str(other.type)) == ("dtype", "Optional[int]")
            assert other.has_default_value() and other.default_value is None
        else:
            default = one.has_default_value() and one.default_value
            assert (other.name, str(other.type)) == (one.name, str(one.type))
            assert (other.has_default_value() and other.default_value) == default


@every_call
def test_direct_call_takes_the_same(name, args, kwargs):
    """Names and defaults are those of the schema, at any place."""
    want = operator(name)(*args, **kwargs)
    direct = getattr(attn_mask._C, name)
    names = [argument.name for argument in operator(name).default._schema.arguments]
    by_name = dict(zip(names, args, strict=False)) | kwargs
    for got in (
        direct(*args, **kwargs),
        direct(**by_name),
        direct(**dict(reversed(by_name.items()))),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {}, r"_is_all_visible\(\) missing required argument: 'mask'"),
        ((1,), {}, r"_is_all_visible\(\): argument 'mask' must be Tensor, not int"),
        ((1, 2), {}, r"_is_all_visible\(\) takes 1 arguments but 2 were given"),
        ((1,), {"mask": 1}, r"_is_all_visible\(\) got multiple values for argument 'mask'"),
        ((), {"masks": 1}, r"_is_all_visible\(\) got an unexpected keyword argument 'masks'"),
    ],
)
def test_direct_call_refuses_what_python_would(args, kwargs, expected):
    with pytest.raises(TypeError, match=f"^{expected}$"):
        attn_mask._C._is_all_visible(*args, **kwargs)


@every_mask
def test_opcheck(name, args, kwargs):
    torch.library.opcheck(operator(name).default, args, kwargs)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(name, *call) for name in HOST_DECISIONS for call in SAMPLES[name]],
)
def test_opcheck_of_a_host_decision(name, args, kwargs):
    torch.library.opcheck(
        operator(name).default,
        args,
        kwargs,
        test_utils=("test_schema", "test_autograd_registration"),
    )


@every_mask
def test_meta_agrees_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    got = moved(name, args, kwargs, "meta")
    assert layout(got) == layout(want)
    if got is not None:
        assert got.device.type == "meta"


@every_mask
def test_fake_agrees_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        got = operator(name)(
            *map_tensors(mode.from_tensor, args), **map_tensors(mode.from_tensor, kwargs)
        )
    assert layout(got) == layout(want)
    if got is not None:
        assert got.device.type == "cpu"


def test_symbolic_shapes():
    """The batch, the queries and the keys stay symbols, no guard pins them to a number."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    # Made outside of the mode, or the sizes would be numbers.
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    mask = mode.from_tensor(torch.ones(3, 7), symbolic_context=dynamic)
    queries = mode.from_tensor(torch.ones(5, 2), symbolic_context=dynamic)
    batch_size, kv_length = mask.shape
    q_length = queries.shape[0]
    assert all(isinstance(n, torch.SymInt) for n in (batch_size, kv_length, q_length))
    dtype = torch.float16
    with mode, enable_python_dispatcher():
        results = [
            torch.ops.attn_mask.to_4d(mask, q_length, dtype=dtype, key_value_length=kv_length),
            torch.ops.attn_mask._expand_mask(mask, q_length, dtype=dtype),
            torch.ops.attn_mask.to_causal_4d(batch_size, q_length, kv_length, dtype=dtype),
            torch.ops.attn_mask._make_causal_mask(
                (batch_size, q_length), kv_length - q_length, 3, dtype=dtype
            ),
        ]
    for result in results:
        assert [str(n) for n in result.shape] == [
            str(batch_size),
            "1",
            str(q_length),
            str(kv_length),
        ]
    assert not environment.replacements, "a size became a constant"


@pytest.mark.parametrize("name", OPERATORS + BLOCK_OPERATORS + ATTENTION_OPERATORS)
def test_dispatch_keys(name):
    keys = ["CPU", "Meta"]
    if attn_mask.build_info()["cuda_version"] is not None:
        keys.append("CUDA")
    for key in keys:
        assert has_kernel(name, key), f"no kernel of {name} for {key}"


def has_kernel(name, key):
    """A factory dispatches through BackendSelect, which picks the device's kernel."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"attn_mask::{name}", key
    ) or torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"attn_mask::{name}", key)


@every_call
def test_inputs_stay_as_they_are(name, args, kwargs):
    before = map_tensors(torch.clone, args)
    operator(name)(*args, **kwargs)
    for arg, kept in zip(args, before, strict=True):
        if isinstance(arg, torch.Tensor):
            assert_same_mask(arg, kept)


@every_mask
def test_outputs_never_alias_inputs(name, args, kwargs):
    result = operator(name)(*args, **kwargs)
    if result is None:
        return
    storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    assert result.untyped_storage().data_ptr() not in storages - {0}


def test_4d_masks_are_copied():
    mask = torch.zeros(1, 1, 2, 2)
    queries = torch.zeros(1, 2, 3)
    got = torch.ops.attn_mask._prepare_4d_causal_attention_mask_for_sdpa(mask, (1, 2), queries, 0)
    got.fill_(1.0)
    assert not mask.any()


@pytest.mark.parametrize("name", OPERATORS + BLOCK_OPERATORS + ATTENTION_OPERATORS)
def test_schema_is_functional(name):
    schema = operator(name).default._schema
    assert not schema.is_mutable
    assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


def argument_names(name):
    arguments = operator(name).default._schema.arguments
    return [("*" if a.kwarg_only else "") + a.name for a in arguments]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "to_causal_4d",
            "batch_size query_length key_value_length *dtype *device *sliding_window "
            "*stride_multiple",
        ),
        (
            "to_4d",
            "attention_mask_2d query_length *dtype *key_value_length *is_causal *sliding_window "
            "*unmask_unattended *stride_multiple",
        ),
        (
            "_make_causal_mask",
            "input_ids_shape past_key_values_length sliding_window *dtype *device *stride_multiple",
        ),
        ("_expand_mask", "mask tgt_len *dtype *stride_multiple"),
        ("_unmask_unattended", "expanded_mask min_dtype *stride_multiple"),
        (
            "_ignore_causal_mask_sdpa",
            "attention_mask inputs_embeds past_key_values_length sliding_window is_training",
        ),
        ("_is_all_visible", "mask"),
        (
            "_prepare_4d_causal_attention_mask",
            "attention_mask input_shape inputs_embeds past_key_values_length sliding_window "
            "*stride_multiple",
        ),
        (
            "_prepare_4d_causal_attention_mask_for_sdpa",
            "attention_mask input_shape inputs_embeds past_key_values_length sliding_window "
            "*allow_skip *unmask_unattended *stride_multiple",
        ),
        ("_prepare_4d_attention_mask", "mask tgt_len *dtype *stride_multiple"),
        ("_prepare_4d_attention_mask_for_sdpa", "mask tgt_len *dtype *allow_skip *stride_multiple"),
        (
            "_create_4d_causal_attention_mask",
            "input_shape past_key_values_length sliding_window *dtype *device *stride_multiple",
        ),
    ],
)
def test_argument_names(name, arguments):
    assert argument_names(name) == arguments.split()


def test_opcodes_stay():
    """Graphs that were exported hold them."""
    names = "ALL CAUSAL WINDOW CHUNK BLOCKS PADDING DOCUMENTS BITS AND OR REINDEX SHIFT NOTHING"
    assert {name: number for number, name in enumerate(names.split())} == attn_mask._C.OPCODES


def test_default_device_is_the_cpu():
    assert torch.ops.attn_mask.to_causal_4d(1, 2, 2, dtype=torch.float32).device.type == "cpu"


@pytest.mark.cuda
@every_mask
def test_cuda_agrees_with_cpu(name, args, kwargs):
    want = operator(name)(*args, **as_on_cuda(name, kwargs))
    got = moved(name, args, kwargs, "cuda")
    assert layout(got) == layout(want)
    if got is not None:
        assert_same_mask(got.cpu(), want)
