"""Calls every operator and the public Python API with random arguments, in processes of their own.

    fuzz_calls.py [--seconds S] [--seed N]     random cases, each with a seed counted up from N
    fuzz_calls.py --case SEED                  one case in this process, with its traceback

A case passes if it returns, and what it returns is right where a reference says what that is, or if
it raises an error of ours. A process that dies, hangs or takes too much memory is a failure, too.
"""

import argparse
import contextlib
import faulthandler
import inspect
import itertools
import json
import os
import random
import re
import resource
import select
import subprocess
import sys
import time
import traceback
import types
import warnings
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1] / "support")
)  # the references of the tests

SECONDS_OF_CASE = 60
MEMORY_OF_CASE = 4 << 30

EXPECTED = (ValueError, TypeError, NotImplementedError, IndexError)
# `function: expected ARGUMENT ...`, from Python or C++.
OURS = re.compile(
    r"^(attn_mask::)?[\w.<>]+: (expected|this build of attn_mask has no CUDA kernels)"
)
# The texts of upstream's own errors, which the mirrors raise in the same places.
UPSTREAM = re.compile(
    "|".join(
        [
            r"^Make sure that when passing `sliding_window`",
            r"^Please use `to_causal_4d` only if",
            r"^This attention mask converter is causal\.",
            r"^Incorrect 4D attention_mask shape: ",
            r"^Custom 4D attention mask should be passed in inverted form",
            r"^AttentionMaskConverter\._unmask_unattended expects a float `expanded_mask`",
            r"^Could not find an? `\w+` argument in the config, or it is not set",
            r"^Flash attention cannot handle chunked attention",
            r"^tuple index out of range$",
            r"^(too many|not enough) values to unpack \(expected \d",
            r"^dq_kv_order must be a bool",
            r"^All inputs should be callable mask_functions: ",
            r"^Sliding window is currently only implemented for causal masking",
            r"^~ \(operator\.invert\) is only implemented on",
            # Of mask functions that index tables that end too early.
            r"^index (-?\d+ )?is out of bounds for dimension|^too many indices for tensor",
        ]
    )
)
# What torch says of values that a meta tensor has not, of ints beyond 64 bits, and of GPUs where
# there are none.
TORCH = re.compile(
    r"^Tensor\.item\(\) cannot be called on meta tensors|^Cannot copy out of meta tensor"
    r"|Overflow when unpacking long"
    r"|^Found no NVIDIA driver|^No CUDA GPUs are available"
)
# Of torch's dispatcher and of its jagged tensors, before an operator of ours is reached.
DISPATCHER = re.compile(
    r"^Could not run '(attn_mask::|aten::empty)|^ZeroTensors are immutable"
    r"|^attn_mask\.\w+\.(default|out)$"
)
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|^(Storage size|Stride) calculation overflowed"
    r"|resulted in a negative output size|cannot be represented as a SymInt"
)


# Values


def import_everything():
    """What the cases need; the process that watches them does without."""
    global attn_mask, torch, rule_reference, sample_calls, masks
    import attn_mask
    import masks
    import rule_reference
    import sample_calls
    import torch

    globals().update(attn_mask=attn_mask, torch=torch, masks=masks)
    globals().update(rule_reference=rule_reference, sample_calls=sample_calls)
    torch.set_num_threads(2)


def any_int(rng):
    """Any 64-bit integer, small ones most often."""
    far = [2**31 - 1, 2**31, 2**59 - 1, 2**59, 2**59 + 1, 2**62, 2**63 - 1]
    if rng.random() < 0.2:
        return rng.choice([*far, *(-n for n in far), -(2**63)])
    return rng.choice([-2, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 8, 16])


def any_dtype(rng):
    names = ["float32", "float32", "float16", "bfloat16", "float64"]
    others = ["int64", "bool", "complex64", "float8_e4m3fn", "uint16", "quint8"]
    return getattr(torch, rng.choice(names if rng.random() < 0.7 else others))


def any_device(rng):
    return torch.device(rng.choice(["cpu"] * 6 + ["cpu:0", "meta", "cuda", "cuda:1", "xpu", "mps"]))


def any_shape(rng):
    sizes = [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    return [rng.choice(sizes) for _ in range(rng.choice([0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 5, 6]))]


def strided(rng, tensor):
    """The same sizes in another layout; elements may stand in one place of memory."""
    if not tensor.numel():
        return tensor
    kind = rng.randrange(6)
    if kind < 2:
        return tensor
    if kind == 2 and tensor.dim():
        return tensor[:1].expand(tensor.shape)
    if kind == 3:
        strides = [rng.randrange(4) for _ in tensor.shape]
        flat = tensor.flatten()
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, strides, strict=True))
        if reach < flat.numel():
            return flat.as_strided(tensor.shape, strides)
    layouts = [name for name in masks.LAYOUTS if name not in ("one row", "one column")]
    return masks.LAYOUTS[rng.choice(layouts)](tensor) if tensor.dim() else tensor


def any_tensor(rng, shape=None, dtypes=None, strange=range(8)):
    """Any dtype, rank, layout and device; of `shape` and one of `dtypes` where they are given."""
    shape = any_shape(rng) if shape is None else shape
    if dtypes is None:
        dtypes = (*masks.MASK_DTYPES, *masks.COMPLEX_DTYPES)
        if rng.random() < 0.6:
            dtypes = (torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8)
    low, high = rng.choice([(0, 2), (0, 2), (1, 2), (0, 1), (-2, 9)])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.randint(low, high, shape, generator=generator)
    tensor = strided(rng, values.to(rng.choice(dtypes)))
    if rng.random() < 0.88:
        return tensor
    return strange_tensor(rng.choice(strange), rng, tensor)


def strange_tensor(kind, rng, tensor):
    """What masks seldom are."""
    if kind == 0:
        return tensor.to("meta")
    with contextlib.suppress(Exception):  # not every dtype comes in every layout
        if kind == 1:
            return tensor.float().requires_grad_()
        if kind == 2:
            return torch._neg_view(tensor.float())
        if kind == 3:
            return tensor.conj()
        if kind == 4:
            return rng.choice([torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])(tensor)
        if kind == 5:
            layout = rng.choice([torch.strided, torch.jagged])
            return torch.nested.nested_tensor([tensor, tensor], layout=layout)
        if kind == 6:
            return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    return tensor


def of_schema(rng, real_type):
    """A value for an argument of an operator."""
    if real_type.startswith("Optional["):
        return None if rng.random() < 0.5 else of_schema(rng, real_type[len("Optional[") : -1])
    if real_type == "List[Tensor]":
        return [any_tensor(rng) for _ in range(rng.randrange(4))]
    if real_type == "List[int]":
        return [any_int(rng) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 8]))]
    if real_type == "Tensor":
        # None is an undefined tensor.
        return None if rng.random() < 0.02 else any_tensor(rng)
    if real_type == "number":
        floats = [0.0, -0.0, float("nan"), float("inf"), -3.4028234663852886e38, 1e300, 1j, True]
        return rng.choice([any_int(rng), *floats])
    simple = {
        "int": any_int,
        "float": lambda rng: rng.choice([0.0, 1.0, -1.0, 1e300, float("nan"), float("inf")]),
        "bool": lambda rng: rng.random() < 0.5,
        "ScalarType": any_dtype,
        "Device": any_device,
    }
    return simple[real_type](rng)


# Operators


def operators():
    """(overload, schema) of each, as the dispatcher has them."""
    found = []
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == "attn_mask":
            packet = getattr(torch.ops.attn_mask, name)
            found.append((getattr(packet, schema.overload_name or "default"), schema))
    return sorted(found, key=lambda pair: str(pair[0]))


def operator_case(rng):
    """A sample call in which some arguments are changed; or all are of the schema's types only."""
    overload, schema = rng.choice(operators())
    name = schema.name.partition("::")[2]
    samples = {
        **sample_calls.SAMPLES,
        **sample_calls.BLOCK_SAMPLES,
        **sample_calls.ATTENTION_SAMPLES,
    }.get(name)
    given = {}
    if samples and rng.random() < 0.8:
        args, kwargs = rng.choice(samples)
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
        given |= kwargs
    if rng.random() < 0.3:
        program = random_program(rng)
        given.update((key, value) for key, value in program.items() if "positions" not in key)
    changes = rng.choice([0, 1, 1, 1, 2, 3])
    changed = rng.sample(range(len(schema.arguments)), min(changes, len(schema.arguments)))
    arguments = {}
    for i, argument in enumerate(schema.arguments):
        if argument.name in given and i not in changed:
            arguments[argument.name] = given[argument.name]
        elif i in changed or not argument.has_default_value():
            arguments[argument.name] = of_schema(rng, str(argument.real_type))
    names = {argument.name for argument in schema.arguments}
    if "rule" in names and rng.random() < 0.2:
        arguments["rule"] = mutated(rng, arguments["rule"])
    arguments = {key: value for key, value in arguments.items() if key in names}
    host_decisions = attn_mask._library.operators_that(is_host_decision=True)
    if rng.random() < 0.4 and name not in host_decisions and is_plain(arguments):
        return as_on_meta, (overload, arguments), {}
    return overload, (), arguments


def is_plain(arguments):
    """Whether all tensors among them lie in memory as they are, on the CPU."""
    if arguments.get("device") not in (None, torch.device("cpu")):
        return False
    tensors = [
        tensor
        for value in arguments.values()
        for tensor in (value if isinstance(value, list) else [value])
        if isinstance(tensor, torch.Tensor)
    ]
    return arguments.get("out", 0) is not None and all(
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_neg() or tensor.is_conj())
        and not tensor._is_zerotensor()
        for tensor in tensors
    )


# What is found out from values, or from where tensors lie.
OF_VALUES = re.compile("width to be at least|to have values|memory|overlap")


def as_on_meta(overload, arguments):
    """The operator on tensors with and without values: results of the same sizes and dtypes, or the
    same error."""

    def to_meta(tensor):
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        ).requires_grad_(tensor.requires_grad)

    def outcome(arguments):
        try:
            result = overload(**arguments)
        except EXPECTED as error:
            return error
        return [
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in (result if isinstance(result, list | tuple) else [result])
        ]

    got = outcome(arguments)
    if "device" in arguments:
        arguments = {**arguments, "device": torch.device("meta")}
    want = outcome(sample_calls.map_tensors(to_meta, arguments))
    if not isinstance(got, Exception) or not isinstance(want, Exception):
        error = next((one for one in (got, want) if isinstance(one, Exception)), None)
        if error is None or not OF_VALUES.search(str(error)):
            assert got == want, f"{got} on a CPU, {want} without values"
        return
    texts = [str(error).split("\n")[0] for error in (got, want)]
    if texts[0].replace("cpu", "meta") != texts[1].replace("cpu", "meta"):
        assert OF_VALUES.search(" ".join(texts)), texts
    for error in (got, want):
        if not is_expected(error):
            raise error


def mutated(rng, code):
    code = list(code)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(code) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            code.insert(at, any_int(rng))
        elif kind == 1:
            code = code[:at]
        elif kind == 2:
            code[at : at + 1] = []
        else:
            code[at : at + 1] = [any_int(rng)]
    return code


# Operators on rules, compared with the reference


def random_program(rng):
    """The arguments of torch.ops.attn_mask.boolean for a rule that is one."""
    r = rule_reference
    batch_size, q_length, kv_length = rng.randrange(4), rng.randrange(7), rng.randrange(14)
    heads, operands = rng.choice([1, 1, 2, 3]), []
    length = rng.choice([30, 30, kv_length, 1, 0])

    def add(shape, low, high, dtypes):
        values = [rng.randint(low, high) for _ in range(torch.Size(shape).numel())]
        tensor = torch.tensor(values, dtype=torch.int64).reshape(shape).to(rng.choice(dtypes))
        operands.append(strided(rng, tensor))
        return len(operands) - 1

    def rows():
        return rng.choice([1, batch_size])

    def leaf():
        opcode = rng.choice(rule_reference.ANY_LEAF)
        if opcode == r.WINDOW:
            return [opcode, rng.randint(-1, 9), rng.choice([-1, 0, 3, 2**63 - 1])]
        if opcode == r.CHUNK:
            has_starts = rng.random() < 0.5
            starts = add([rows()], -3, 9, [torch.int64, torch.int32]) if has_starts else -1
            return [opcode, rng.choice([1, 2, 3, 7, 2**62]), starts]
        if opcode in (r.BLOCKS, r.DOCUMENTS):
            return [opcode, add([rows(), length], 0, 2, r.ID_DTYPES)]
        if opcode == r.PADDING:
            return [opcode, add([rows(), length], 0, 1, r.PADDING_DTYPES)]
        if opcode == r.BITS:
            shape = [rows(), rng.choice([1, heads]), q_length, kv_length]
            return [opcode, add(shape, 0, 1, [torch.bool])]
        return [opcode]

    def tree(leaves):
        kind = rng.random()
        if kind < 0.15:
            return [r.SHIFT, rng.randint(-3, 3), rng.randint(-3, 3), *tree(leaves)]
        if kind < 0.25:
            return [r.REINDEX, add([rows(), length], 0, 20, r.ID_DTYPES), *tree(leaves)]
        if leaves == 1:
            return leaf()
        left = rng.randrange(1, leaves)
        return [rng.choice([r.AND, r.OR]), 2, *tree(left), *tree(leaves - left)]

    rule = tree(rng.choice([1, 1, 2, 3, 5, 20]))
    given = {"rule": rule, "operands": operands, "batch_size": batch_size}
    given.update(q_length=q_length, kv_length=kv_length)
    for axis, n in (("q", q_length), ("kv", kv_length)):
        if rng.random() < 0.5:
            given[f"{axis}_offset"] = rng.randint(-3, 9)
        if rng.random() < 0.3:
            shape = rng.choice([[], [n], [1, n], [batch_size, n], [rows(), 1]])
            values = [rng.randint(0, 12) for _ in range(torch.Size(shape).numel())]
            given[f"{axis}_positions"] = torch.tensor(values, dtype=torch.int64).reshape(shape)
    return given


def depth_of(tree):
    return 1 + max(map(depth_of, tree[2]), default=0)


def compared_case(rng):
    """An operator on a rule, compared with the reference."""
    given = random_program(rng)
    names = ("rule", "operands", "batch_size", "q_length", "kv_length")
    args = [given[name] for name in names]
    positions = {name: value for name, value in given.items() if name not in names}
    # So many changes of one leaf's positions are not taken; neither has the reference a limit.
    if given["rule"].count(rule_reference.REINDEX) > 6:
        return compared_case(rng)
    ops = torch.ops.attn_mask
    kind = rng.choice(["boolean", "additive", "block_mask"])

    def call():
        if kind == "boolean":
            got = ops.boolean(*args, **positions, stride_multiple=rng.choice([1, 8]))
            masks.assert_same_mask(got, rule_reference.boolean(*args, **positions))
            return
        if kind == "additive":
            dtype = rng.choice(masks.OUT_DTYPES)
            got = ops.additive(*args, **positions, dtype=dtype)
            want = rule_reference.additive(*args, **positions, dtype=dtype)
            masks.assert_same_mask(got, want)
            return
        check_block_mask(rng, args, positions)

    return call, (), {}


def check_block_mask(rng, args, positions):
    """block_mask and _block_states, against counts over the reference's boolean mask."""
    rule, operands, batch_size, q_length, kv_length = args
    mask = rule_reference.boolean(*args, **positions)
    heads = mask.shape[1]
    q_block, kv_block = rng.randint(1, 6), rng.randint(1, 6)
    blocks = [rule, operands, batch_size, heads, q_length, kv_length, q_block, kv_block]
    q_blocks, kv_blocks = -(-q_length // q_block), -(-kv_length // kv_block)
    counts = torch.zeros(batch_size, heads, q_blocks, kv_blocks, dtype=torch.int64)
    for row, column in itertools.product(range(q_blocks), range(kv_blocks)):
        rows = slice(row * q_block, (row + 1) * q_block)
        columns = slice(column * kv_block, (column + 1) * kv_block)
        counts[:, :, row, column] = mask[:, :, rows, columns].sum((2, 3))
    is_full = counts == q_block * kv_block
    is_partial = (counts > 0) & ~is_full
    states = torch.ops.attn_mask._block_states(*blocks, **positions)
    assert states.expand_as(counts).equal((is_full * 2 + is_partial).to(torch.uint8)), "states"
    lists = torch.ops.attn_mask.block_mask(*blocks, **positions)
    for is_of_kind, (of_keys, of_queries) in zip(
        (is_partial, is_full), ((lists[0:2], lists[4:6]), (lists[2:4], lists[6:8])), strict=True
    ):
        for kinds, (number, index) in ((is_of_kind, of_keys), (is_of_kind.mT, of_queries)):
            assert number.equal(kinds.sum(-1, dtype=torch.int32)), "counts"
            # Those of the kind first, each part ascending.
            order = torch.argsort((~kinds).to(torch.int8), dim=-1, stable=True)
            assert index.equal(order.to(torch.int32)), "indices"


# The Python API


def mirror_tensor(rng, shape=None, dtypes=None):
    """What torch's own functions take, too: mirrors hand it to them as upstream does."""
    dtypes = dtypes or (
        torch.int64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.float32,
    )
    return any_tensor(rng, shape, dtypes, strange=(0, 1, 2))


def some_block_mask(rng):
    if rng.random() < 0.1:
        return rng.choice([None, 5, mirror_tensor(rng)])
    length = rng.choice([0, 1, 5, 9])
    rule = attn_mask.rules.causal()
    return attn_mask.create_block_mask(rule, 2, 1, length, length, device="cpu", BLOCK_SIZE=4)


def tables(rng):
    """2-D, one row for each batch row, and longer than positions go, most often."""
    if rng.random() < 0.2:
        return mirror_tensor(rng)
    dtypes = (torch.int64, torch.int64, torch.int32, torch.bool, torch.float32)
    return mirror_tensor(rng, [rng.choice([1, 2, 2, 2]), rng.choice([5, 32, 32, 32])], dtypes)


def any_mask_function(rng, depth=2):
    r = attn_mask.rules
    leaves = [
        lambda: r.causal(),
        lambda: r.bidirectional(),
        lambda: r.sliding_window(rng.randint(1, 9)),
        lambda: r.window(rng.choice([None, 0, 3]), rng.choice([None, 0, 3])),
        lambda: r.chunked(rng.randint(1, 9), rng.choice([None, mirror_tensor(rng, [2])])),
        lambda: r.blockwise(tables(rng)),
        lambda: r.documents(tables(rng)),
        lambda: r.padding(tables(rng)),
        lambda: attn_mask.masking_utils.causal_mask_function,
        lambda: lambda b, h, q, k: (q + k) % 3 == 0,
        lambda: lambda b, h, q, k: q >= k,
    ]
    if rng.random() < 0.03:
        # What is no mask function, or none that can be called with tensors.
        return rng.choice([lambda b, h, q, k: True, lambda b, h, q: q > 0, lambda *_: [], None, 5])
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(leaves)()
    parts = [any_mask_function(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    joins = [
        lambda: r.intersection(*parts),
        lambda: r.union(*parts),
        lambda: r.reindex(parts[0], tables(rng)),
        lambda: r.shift(parts[0], rng.randint(-3, 3), rng.randint(-3, 3)),
    ]
    return rng.choice(joins)()


class Cache:
    """What create_causal_mask and the like read of a cache."""

    def __init__(self, rng):
        self.length = rng.choice([0, 0, 3, 7])
        self.is_compileable = rng.random() < 0.2
        self.is_sliding = [rng.random() < 0.5, rng.random() < 0.5]
        self.offset = rng.choice([0, 0, 2])

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_mask_sizes(self, q_length, layer_idx=0):
        if isinstance(q_length, torch.Tensor):
            q_length = q_length.shape[0]
        return self.length + q_length, self.offset

    def get_query_offset(self, layer_idx=0):
        return self.length


def any_config(rng):
    return types.SimpleNamespace(
        _attn_implementation=rng.choice(["sdpa", "sdpa", "eager", "flex_attention", "xxx"]),
        sliding_window=rng.choice([None, 1, 4, 4]),
        attention_chunk_size=rng.choice([None, 1, 4, 4]),
        layer_types=rng.choice([["full_attention", "sliding_attention"], ["chunked_attention"]]),
        num_hidden_layers=2,
        is_causal=rng.random() < 0.8,
        get_text_config=lambda **_: any_config(rng),
    )


def any_padding(rng):
    kind = rng.random()
    if kind < 0.3:
        return None
    if kind < 0.9:
        shape = [2, rng.choice([3, 4, 8, 10])]
        if rng.random() < 0.2:
            shape = [2, 1, 3, rng.choice([3, 8])]
        return mirror_tensor(rng, shape, (torch.int64, torch.bool, torch.float32))
    return mirror_tensor(rng)


def embeds(rng):
    if rng.random() < 0.1:
        return mirror_tensor(rng)
    return torch.zeros(
        2, 3, 4, dtype=rng.choice(masks.MASK_DTYPES if rng.random() < 0.1 else masks.OUT_DTYPES)
    )


def query(rng):
    if rng.random() < 0.1:
        return mirror_tensor(rng)
    return torch.zeros(2, 2, rng.choice([0, 1, 3, 3, 8]), 4)


def small_or_any_int(rng):
    return rng.choice([1, 2, 3, 4, 8]) if rng.random() < 0.8 else any_int(rng)


def offset(rng):
    return rng.choice([0, 0, 1, 5]) if rng.random() < 0.8 else any_int(rng)


# By name, since that is what says what an argument may be.
ARGUMENTS = {
    "B": lambda rng: rng.choice([None, 1, 2, 2, any_int(rng)]),
    "H": lambda rng: rng.choice([None, 1, 2, any_int(rng)]),
    "BLOCK_SIZE": lambda rng: rng.choice([1, 4, 128, (2, 3), any_int(rng), (any_int(rng), 4)]),
    "attention_mask": any_padding,
    "attention_mask_2d": any_padding,
    "block_mask": some_block_mask,
    "block_sequence_ids": lambda rng: rng.choice([None, tables(rng)]),
    "cache": Cache,
    "compact": lambda rng: rng.choice([False, True, small_or_any_int(rng), (2, any_int(rng))]),
    "config": any_config,
    "cu_seqlens": lambda rng: rng.choice(
        [None, torch.tensor([0, 2, 3]), torch.tensor([0, 3, 6]), mirror_tensor(rng)]
    ),
    "device": lambda rng: rng.choice(["cpu", "cpu", "cpu", "meta"]),
    "dim": lambda rng: rng.randint(-3, 9),
    "document_ids": lambda rng: rng.choice(
        [None, mirror_tensor(rng, [2, rng.choice([3, 6])], (torch.int64,)), mirror_tensor(rng)]
    ),
    "dtype": any_dtype,
    "encoder_hidden_states": lambda rng: rng.choice([None, None, embeds(rng)]),
    "input_ids_shape": lambda rng: (small_or_any_int(rng), small_or_any_int(rng)),
    "input_shape": lambda rng: (small_or_any_int(rng), small_or_any_int(rng)),
    "inputs_embeds": embeds,
    "key": query,
    "key_value_length": lambda rng: rng.choice([None, 3, 4, any_int(rng)]),
    "kv_offset": offset,
    "left": lambda rng: rng.choice([None, small_or_any_int(rng)]),
    "left_padding": lambda rng: mirror_tensor(rng, [2], (torch.int64, torch.int32)),
    "mask_function": any_mask_function,
    "mask_mod": any_mask_function,
    "masked_value": lambda rng: rng.choice([None, -1.0, -1e30, float("-inf"), any_int(rng)]),
    "min_dtype": lambda rng: rng.choice([0.0, torch.finfo(torch.float32).min, any_int(rng)]),
    "num_heads": small_or_any_int,
    "past_key_values": lambda rng: rng.choice([None, Cache(rng)]),
    "position_ids": lambda rng: rng.choice(
        [
            None,
            mirror_tensor(rng, [2, 3], (torch.int64, torch.int32)),
            mirror_tensor(rng, dtypes=(torch.int64, torch.int32)),
        ]
    ),
    "policy": lambda rng: rng.choice(["upstream", "never", "none", "xx", "always"]),
    "padding": lambda rng: rng.choice([None, "none", "xx"]),
    "packing": lambda rng: rng.choice([None, "none", "xx"]),
    "q_offset": offset,
    "query": query,
    "right": lambda rng: rng.choice([None, small_or_any_int(rng)]),
    "value": query,
    "version": lambda rng: rng.choice(["4.35.0", "4.57.1", "5.0.0", "1", "", "4.x", "99"]),
}
BY_ANNOTATION = (
    ("Callable", any_mask_function),
    ("torch.Tensor", tables),
    ("torch.dtype", any_dtype),
    ("bool", lambda rng: rng.random() < 0.5),
    ("int", small_or_any_int),
)


def api():
    """The public functions of the package, by module; the mirrors of transformers 4 included."""
    modules = [
        attn_mask,
        attn_mask.rules,
        attn_mask.masking_utils,
        attn_mask.modeling_attn_mask_utils,
        attn_mask.block_sparse,
        *(
            attn_mask.for_transformers(version).modeling_attn_mask_utils
            for version in ("4.35.0", "4.36.0", "4.40.0", "4.57.0")
        ),
    ]
    # These change the process, or need another package.
    left_out = {"plot", "install", "installed", "uninstall", "is_installed", "_flex_attention"}
    # These are expressions over whatever they are given.
    left_out |= {"_identity", "_causal", "_rel_bias", "_rel_causal"}
    found = []
    for module in modules:
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function) and name not in left_out:
                found.append((f"{module.__name__}.{name}", function))
        converter = getattr(module, "AttentionMaskConverter", None)
        if converter is not None:
            found.append((f"{module.__name__}.AttentionMaskConverter", converter))
    return found


def value_for(rng, parameter):
    annotation = str(parameter.annotation)
    if "int | torch.Tensor" in annotation and rng.random() < 0.2:
        return mirror_tensor(rng, rng.choice([[], [2, 1], [1], [2]]))
    is_dense = parameter.name == "block_mask" and "Tensor" in annotation
    if parameter.name in ARGUMENTS and not is_dense:
        value = ARGUMENTS[parameter.name](rng)
        while value is None and "None" not in annotation and "Any" not in annotation:
            value = ARGUMENTS[parameter.name](rng)
        return value
    if "None" in annotation and rng.random() < 0.3:
        return None
    for text, make in BY_ANNOTATION:
        if text in annotation or text in getattr(parameter.annotation, "__name__", ""):
            return make(rng)
    return rng.choice([None, any_int(rng), mirror_tensor(rng)])


def arguments_for(rng, function):
    args, kwargs = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += [any_mask_function(rng) for _ in range(rng.randrange(4))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif parameter.default is parameter.empty or rng.random() < 0.35:
            value = value_for(rng, parameter)
            if parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value
    return args, kwargs


def api_case(rng):
    name, function = rng.choice(api())
    if not name.endswith("AttentionMaskConverter"):
        args, kwargs = arguments_for(rng, function)
        return function, args, kwargs

    def call():
        converter = function(**arguments_for(rng, function)[1])
        methods = [
            name for name in vars(type(converter)) if re.match(r"to_|_make|_expand|_unm", name)
        ]
        method = getattr(converter, rng.choice(methods))
        args, kwargs = arguments_for(rng, method)
        return method(*args, **kwargs)

    return call, (), {}


def compared_rule_case(rng):
    """A rule as masks of every kind, against the mask function itself, called for each element."""
    r = attn_mask.rules
    batch_size, q_length, kv_length = rng.randint(1, 3), rng.randint(1, 7), rng.randint(1, 12)
    q_offset, kv_offset = rng.randint(0, 5), rng.randint(0, 3)
    size = 40

    def table(low, high):
        return [[rng.randint(low, high) for _ in range(size)] for _ in range(batch_size)]

    def leaf():
        kind = rng.randrange(7)
        n = rng.randint(1, 6)
        if kind == 0:
            return r.causal(), lambda b, q, k: k <= q
        if kind == 1:
            return r.sliding_window(n), lambda b, q, k: k > q - n
        if kind == 2:
            m = rng.randint(0, 4)
            return r.window(n, m), lambda b, q, k: q - n <= k <= q + m
        if kind == 3:
            return r.chunked(n), lambda b, q, k: q // n == k // n
        values = table(-1, 2)
        tensor = torch.tensor(values)
        if kind == 4:
            return r.documents(tensor), lambda b, q, k: values[b][q] == values[b][k]
        if kind == 5:
            return r.blockwise(tensor), lambda b, q, k: values[b][q] == values[b][k] >= 0
        dtype = rng.choice([torch.bool, torch.int64, torch.int8, torch.float32])
        return r.padding(tensor.to(dtype)), lambda b, q, k: values[b][k] != 0

    def tree(depth):
        kind = rng.randrange(6) if depth else 0
        if kind < 2:
            return leaf()
        rule, attends = tree(depth - 1)
        if kind == 2:
            values = table(0, 15)
            moved = lambda b, q, k: attends(b, values[b][q], values[b][k])  # noqa: E731
            return r.reindex(rule, torch.tensor(values)), moved
        if kind == 3:
            x, y = rng.randint(0, 3), rng.randint(0, 3)
            return r.shift(rule, x, y), lambda b, q, k: attends(b, q + x, k + y)
        other, attends_too = tree(depth - 1)
        if kind == 4:
            return rule & other, lambda *i: attends(*i) and attends_too(*i)
        return rule | other, lambda *i: attends(*i) or attends_too(*i)

    rule, attends = tree(3)
    cells = [
        attends(b, q + q_offset, k + kv_offset)
        for b, q, k in itertools.product(range(batch_size), range(q_length), range(kv_length))
    ]
    want = torch.tensor(cells, dtype=torch.bool).view(batch_size, 1, q_length, kv_length)

    def call():
        at = {"q_offset": q_offset, "kv_offset": kv_offset}
        kind = rng.choice(["sdpa_mask", "eager_mask", "create_block_mask", "sdpa_arguments"])
        if kind == "sdpa_mask":
            got = attn_mask.masking_utils.sdpa_mask(
                batch_size,
                q_length,
                kv_length,
                mask_function=rule,
                allow_is_causal_skip=False,
                **at,
            )
            assert got.expand_as(want).equal(want), kind
        elif kind == "eager_mask":
            got = attn_mask.masking_utils.eager_mask(
                batch_size, q_length, kv_length, mask_function=rule, dtype=torch.float16, **at
            )
            low = torch.finfo(torch.float16).min
            masks.assert_same_mask(
                got.expand_as(want), torch.zeros(want.shape).half().masked_fill(~want, low)
            )
        elif kind == "create_block_mask":
            n, m = rng.randint(1, 5), rng.randint(1, 5)
            got = attn_mask.create_block_mask(
                rule, batch_size, 1, q_length, kv_length, device="cpu", BLOCK_SIZE=(n, m), **at
            ).to_dense()
            for row, column in itertools.product(*map(range, got.shape[2:])):
                seen = want[:, :, row * n : (row + 1) * n, column * m : (column + 1) * m]
                assert got[:, :, row, column].bool().equal(seen.flatten(2).any(-1)), kind
        else:
            q, k = torch.zeros(batch_size, 1, q_length, 4), torch.zeros(batch_size, 1, kv_length, 4)
            mask, is_causal = attn_mask.sdpa_arguments(q, k, rule, **at)
            if mask is None:
                mask = torch.ones(q_length, kv_length, dtype=torch.bool)
                mask = mask.tril() if is_causal else mask
            assert mask.expand_as(want).equal(want), kind

    return call, (), {}


# Cases

KINDS = ((operator_case, 4), (compared_case, 2), (api_case, 4), (compared_rule_case, 1))


def make_case(seed):
    rng = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    return rng.choices(kinds, weights)[0](rng)


def describe(value):
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        with contextlib.suppress(Exception):
            strides = f" strides {list(value.stride())}" if value.layout == torch.strided else ""
            return f"{value.dtype}{list(value.shape)}{strides} {value.layout} on {value.device}"
        return f"a tensor of {value.layout}"
    try:
        return repr(value)
    except Exception:  # torch's BlockMask, where it is empty
        return f"a {type(value).__name__}"


def is_expected(error):
    text = str(error)
    if any(pattern.search(text) for pattern in (UPSTREAM, TORCH, DISPATCHER, NO_MEMORY)):
        return True
    return isinstance(error, EXPECTED) and OURS.search(text) is not None


def failure_of(seed):
    """None where the case passes, else what happened, and in which call."""
    called = "while it was made"
    try:
        function, args, kwargs = make_case(seed)
        called = f"{getattr(function, '__name__', function)} {describe(args)} {describe(kwargs)}"
        function(*args, **kwargs)
    except Exception as error:
        if is_expected(error):
            return None
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        text = str(error).split("\nException raised from")[0]
        at = " ".join(frames[-6:])
        return f"{type(error).__name__}: {text[:600]}\n  at {at}\n  in {called[:2000]}"
    return None


def work(first):
    """Cases from one seed on, each announced before it begins."""
    import_everything()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + MEMORY_OF_CASE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in itertools.count(first):
        print(json.dumps([seed, "begins"]), flush=True)
        failure = failure_of(seed)
        if failure is not None:
            print(json.dumps([seed, failure]), flush=True)


class Worker:
    """A process that works through cases, and the last line that it printed."""

    def __init__(self, first):
        command = [sys.executable, __file__, "--worker", str(first)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.seed = first
        self.buffer = b""

    def lines(self, seconds):
        """The next line that it prints; None if it prints nothing for so long."""
        fd = self.process.stdout.fileno()
        if not select.select([fd], [], [], seconds)[0]:
            return None
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return []
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines] or self.lines(seconds)

    def end(self):
        """Its exit status, and the end of what it wrote to stderr."""
        self.process.kill()
        stderr = self.process.stderr.read().decode(errors="replace")
        return self.process.wait(), stderr[-3000:]


def watch(first, seconds):
    """The number of cases, and of those that failed."""
    end = time.monotonic() + seconds
    worker, failed, cases = Worker(first), 0, 0

    def report(seed, text):
        nonlocal failed
        failed += 1
        print(f"\nfuzz_calls: failed with --case {seed}\n{text}", flush=True)

    while time.monotonic() < end:
        lines = worker.lines(SECONDS_OF_CASE)
        if lines:
            for seed, text in lines:
                worker.seed = seed
                if text == "begins":
                    cases += 1
                else:
                    report(seed, text)
            continue
        # It has died or hangs.
        if lines == []:
            worker.process.wait()
        status, stderr = worker.end()
        what = f"no end within {SECONDS_OF_CASE} s" if lines is None else f"exit status {status}"
        report(worker.seed, f"{what}\n{stderr}")
        worker = Worker(worker.seed + 1)
    worker.end()
    return cases, failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
    if options.case is not None:
        import_everything()
        function, args, kwargs = make_case(options.case)
        print(function, describe(args), describe(kwargs), flush=True)
        print(function(*args, **kwargs))
        return
    print(f"fuzz_calls: from --seed {options.seed}, for {options.seconds:g} s", flush=True)
    cases, failed = watch(options.seed, options.seconds)
    print(f"fuzz_calls: {cases} cases, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
