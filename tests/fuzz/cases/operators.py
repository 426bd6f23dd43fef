"""Calls of operators: any arguments of their schemas, and programs of rules, compared."""

import itertools
import re

import attn_mask
import masks
import rule_reference
import sample_calls
import torch

from cases.errors import EXPECTED, is_expected
from cases.values import any_int, of_schema, strided

# Calls of any kind


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
    host_decisions = attn_mask._core.library.operators_that(is_host_decision=True)
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


# Rules, compared with the reference


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
    kind = rng.choice(["boolean", "additive", "block_mask", "decomposition"])

    def call():
        if kind == "decomposition":
            with attn_mask.aten_only():
                got = attn_mask._core.operators.operators().boolean(*args, **positions)
            masks.assert_same_mask(got, rule_reference.boolean(*args, **positions))
            return
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
