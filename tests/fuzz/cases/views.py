"""The views of a rule, each compared with what its formula says: a view is a way to evaluate it."""

import contextlib
import itertools

import attn_mask
import masks
import rule_reference
import torch
from attn_mask import masking_utils, rules

from cases.errors import returns
from cases.rules import any_problem
from cases.values import strided


def view_case(rng):
    problem = any_problem(rng)
    view = rng.choice([view for view, serves in VIEWS if serves(problem)])
    # Graphs that leave torch are made of ATen's operators: they give the same.
    as_aten = view in IN_GRAPHS and rng.random() < 0.25

    def check(problem):
        with attn_mask.aten_only() if as_aten else contextlib.nullcontext():
            view(rng, problem)

    check.__name__ = f"{view.__name__}{' by ATen' if as_aten else ''}"
    return returns(check), (problem,), {}


def assert_same(got, want, what):
    """Of one head where all are alike."""
    assert got.dtype == torch.bool, f"{what}: {got.dtype}"
    assert got.dim() == 4 and got.shape[1] in (1, want.shape[1]), f"{what}: {list(got.shape)}"
    expanded = got.expand(want.shape)
    if not expanded.equal(want):
        place = (expanded != want).nonzero()[0].tolist()
        raise AssertionError(f"{what}: got {expanded[tuple(place)]} at {place}, of\n{want.int()}")


def unmasked(problem, unmasks):
    want = problem.want
    return want | ~want.any(-1, keepdim=True) if unmasks else want


# Dense masks


def boolean(rng, problem):
    unmasks = rng.random() < 0.3
    want = unmasked(problem, unmasks)
    out = None
    if rng.random() < 0.3:
        heads = want.shape[1] if problem.of_heads else _heads_of_bits(problem)
        out = torch.empty(problem.batch_size, heads, *want.shape[2:], dtype=torch.bool)
        out = out.mT.contiguous().mT if rng.random() < 0.5 else out
    got = attn_mask.boolean(
        problem.rule,
        *problem.sizes,
        **problem.where,
        **problem.of_function,
        unmask_unattended=unmasks,
        out=out,
    )
    assert out is None or got is out
    assert_same(got, want, "boolean")


def _heads_of_bits(problem):
    sizes = [problem.rule.program.operands[at].shape[1] for at in problem.rule.program.bits]
    return max([1, *sizes])


def additive(rng, problem):
    dtype, unmasks = rng.choice(masks.OUT_DTYPES), rng.random() < 0.3
    masked_value = rng.choice([None, None, float("-inf"), -1.0])
    want, bias = unmasked(problem, unmasks), None
    if rng.random() < 0.4:
        heads = problem.heads if want.shape[1] == 1 else rng.choice([1, want.shape[1]])
        shape = [rng.choice([1, problem.batch_size]), heads, *want.shape[2:]]
        bias = strided(rng, torch.randn(shape).to(dtype))
    got = attn_mask.additive(
        problem.rule,
        *problem.sizes,
        **problem.where,
        **problem.of_function,
        dtype=dtype,
        unmask_unattended=unmasks,
        bias=bias,
        masked_value=masked_value,
    )
    visible = torch.zeros((), dtype=dtype) if bias is None else bias
    lowest = torch.finfo(dtype).min if masked_value is None else masked_value
    wanted = torch.where(want, visible, torch.tensor(lowest, dtype=dtype))
    assert got.shape[1] in (1, wanted.shape[1]), list(got.shape)
    masks.assert_same_mask(got.expand(wanted.shape), wanted)


# Calls of the mask function


def called(rng, problem):
    """With index tensors that broadcast, or of one dimension, as programs and kernels call it."""
    want = problem.want
    dtype = torch.int64
    is_near = max(-problem.lowest, int(problem.q_at.max()), int(problem.k_at.max())) < 2**20
    if is_near and not problem.is_wide:
        dtype = rng.choice([torch.int64, torch.int64, torch.int32])
    heads = want.shape[1]
    b, h = torch.arange(problem.batch_size), torch.arange(heads)
    indices = (
        b[:, None, None, None],
        h[:, None, None],
        problem.q_at[:, None, :, None],
        problem.k_at[:, None, None, :],
    )
    indices = [index.to(dtype) for index in indices]
    if rng.random() < 0.3:
        indices = [index.expand(want.shape).flatten() for index in indices]
    got = problem.rule(*indices)
    assert got.dtype == torch.bool, got.dtype
    got = got.view(want.shape) if got.dim() == 1 else got.expand(want.shape)
    assert_same(got, want, "called")


def mapped(rng, problem):
    """By torch.vmap, one index at a time, and as torch's create_mask calls it."""
    from torch.nn.attention.flex_attention import create_mask

    rule = _from_zero(problem)
    heads = problem.want.shape[1]
    got = create_mask(
        rule, problem.batch_size, heads, problem.q_length, problem.kv_length, device="cpu"
    )
    assert_same(got, problem.want, "create_mask of torch")


def _from_zero(problem):
    """The rule for positions that count from 0."""
    q_offset, kv_offset = problem.offsets
    if q_offset == kv_offset == 0:
        return problem.rule
    return rules.shift(problem.rule, q_offset, kv_offset)


# Block masks


def check_blocks(got, want, q_block, kv_block, separate=True):
    """The lists of a BlockMask, against counts over a boolean mask."""
    assert (q_block, kv_block) == got.BLOCK_SIZE
    batch_size, heads, q_length, kv_length = want.shape
    q_blocks, kv_blocks = -(-q_length // q_block), -(-kv_length // kv_block)
    counts = torch.zeros(batch_size, heads, q_blocks, kv_blocks, dtype=torch.int64)
    for row, column in itertools.product(range(q_blocks), range(kv_blocks)):
        rows = slice(row * q_block, (row + 1) * q_block)
        columns = slice(column * kv_block, (column + 1) * kv_block)
        counts[:, :, row, column] = want[:, :, rows, columns].sum((2, 3))
    is_full = (counts == q_block * kv_block) & separate
    is_partial = (counts > 0) & ~is_full
    lists = [(is_partial, got.kv_num_blocks, got.kv_indices, got.q_num_blocks, got.q_indices)]
    full = got.full_kv_num_blocks, got.full_kv_indices, got.full_q_num_blocks, got.full_q_indices
    if separate:
        lists.append((is_full, *full))
    else:
        assert full == (None, None, None, None)
    for of_kind, kv_number, kv_index, q_number, q_index in lists:
        for wanted, number, index in (
            (of_kind, kv_number, kv_index),
            (of_kind.mT, q_number, q_index),
        ):
            number = number.expand(*wanted.shape[:3])
            assert number.equal(wanted.sum(-1, dtype=torch.int32)), "number of blocks"
            ordered = torch.argsort((~wanted).to(torch.int8), dim=-1, stable=True)
            index = index.expand(*wanted.shape[:3], index.shape[-1])
            counted = torch.arange(index.shape[-1]) < number[..., None]
            same = index == ordered[..., : index.shape[-1]]
            assert bool((same | ~counted).all()), "indices of blocks"


def block_mask(rng, problem):
    want = problem.want.expand(-1, problem.heads, -1, -1)
    block_sizes = rng.randint(1, 5), rng.randint(1, 5)
    separate = rng.random() < 0.8
    offsets = {name: problem.where.get(name, 0) for name in ("q_offset", "kv_offset")}
    got = attn_mask.create_block_mask(
        problem.rule,
        problem.batch_size,
        problem.heads,
        problem.q_length,
        problem.kv_length,
        device="cpu",
        BLOCK_SIZE=block_sizes,
        separate_full_blocks=separate,
        compact=rng.random() < 0.3,
        **offsets,
    )
    check_blocks(got, want, *block_sizes, separate)


def block_mask_of_torch(rng, problem):
    from torch.nn.attention.flex_attention import create_block_mask

    rule, heads = _from_zero(problem), problem.want.shape[1]
    block_sizes = rng.randint(1, 5), rng.randint(1, 5)
    got = create_block_mask(
        rule,
        problem.batch_size,
        heads,
        problem.q_length,
        problem.kv_length,
        device="cpu",
        BLOCK_SIZE=block_sizes,
    )
    check_blocks(got, problem.want, *block_sizes)


# Arguments of attention


def sdpa_arguments(rng, problem):
    batch_size, q_length, kv_length = problem.sizes
    want = problem.want
    query = torch.zeros(batch_size, problem.heads, q_length, 4)
    key = torch.zeros(batch_size, 1, kv_length, 4)
    attention_mask, unmasks = None, rng.random() < 0.2
    kv_offset = problem.where.get("kv_offset", 0)
    if rng.random() < 0.3 and isinstance(kv_offset, int) and kv_offset < 300:
        attention_mask, shown = any_padding(rng, batch_size, kv_offset, kv_length)
        want = want & shown
    want = want | ~want.any(-1, keepdim=True) if unmasks else want
    dtype = rng.choice([None, None, *masks.OUT_DTYPES])
    policy = rng.choice(["upstream", "upstream", "never"])
    with attn_mask.skip_policy(policy):
        mask, is_causal = attn_mask.sdpa_arguments(
            query,
            key,
            problem.rule,
            attention_mask,
            **problem.offsets_of_attention,
            dtype=dtype,
            unmask_unattended=unmasks,
        )
    assert mask is None or not is_causal
    if mask is None:
        got = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool)
        got = got.tril() if is_causal else got
    else:
        assert mask.dtype == (torch.bool if dtype is None else dtype)
        got = mask if dtype is None else mask == 0
    assert_same(got, want, f"sdpa_arguments, is_causal {is_causal}")


def any_padding(rng, batch_size, offset, kv_length):
    """(a padding mask [b, n], what it shows of keys from an offset on [b, 1, 1, kv])."""
    length = offset + kv_length + rng.choice([0, 0, 0, 2, -1])
    dtype = rng.choice([torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32])
    density = rng.choice([0.5, 0.9, 1.0])
    shown = torch.rand(batch_size, max(length, 0)) < density
    # After its end all is padding.
    padded = torch.nn.functional.pad(shown, (0, offset + kv_length))
    return shown.to(dtype), padded[:, None, None, offset : offset + kv_length]


# The mirrors of transformers


def mirror(rng, problem):
    batch_size, _, kv_length = problem.sizes
    want, attention_mask = problem.want, None
    q_offset, kv_offset = problem.where.get("q_offset", 0), problem.where.get("kv_offset", 0)
    if rng.random() < 0.3 and isinstance(kv_offset, int) and kv_offset < 300:
        attention_mask, shown = any_padding(rng, batch_size, kv_offset, kv_length)
        attention_mask = attention_mask.bool()
        want = want & shown
    given = {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": problem.rule}
    given["attention_mask"] = attention_mask
    # A BlockMask of transformers' has one head.
    kind = rng.choice(["sdpa", "eager", "flex"] if want.shape[1] == 1 else ["sdpa", "eager"])
    if kind == "flex":
        if attention_mask is not None and bool(attention_mask.all()):
            want = problem.want  # it has no padding, upstream, however short it is
        got = masking_utils.flex_attention_mask(*problem.sizes, **given)
        check_blocks(got, want, 128, 128)
        return
    given["use_vmap"] = rng.random() < 0.2 and not problem.has_bits
    if kind == "sdpa":
        got = masking_utils.sdpa_mask(*problem.sizes, **given, allow_is_causal_skip=False)
        assert_same(got, want, "sdpa_mask")
        return
    dtype = rng.choice(masks.OUT_DTYPES)
    got = masking_utils.eager_mask(*problem.sizes, **given, dtype=dtype)
    wanted = torch.zeros(want.shape, dtype=dtype).masked_fill(~want, torch.finfo(dtype).min)
    masks.assert_same_mask(got.expand(want.shape), wanted)


# Tools for looking


_HALVES = {"·": (False, False), "▀": (True, False), "▄": (False, True), "█": (True, True)}


def show(rng, problem):
    batch, head = rng.randrange(problem.batch_size), rng.randrange(problem.heads)
    picture = attn_mask.show(
        _from_zero(problem), problem.q_length, problem.kv_length, batch=batch, head=head
    )
    rows = []
    for line in picture.splitlines():
        rows += zip(*(_HALVES[character] for character in line), strict=True)
    got = torch.tensor(rows[: problem.q_length])
    want = problem.want.expand(-1, problem.heads, -1, -1)[batch, head]
    assert got.equal(want), f"show of batch {batch}, head {head}:\n{picture}\nof\n{want.int()}"


def explain(rng, problem):
    want = problem.want.expand(-1, problem.heads, -1, -1)
    b, h, q, k = (rng.randrange(size) for size in want.shape)
    at = {"q": int(problem.q_at[b, q]), "k": int(problem.k_at[b, k])}
    text = attn_mask.explain(problem.rule, **at, b=b, h=h)
    wanted = "attends: " if want[b, h, q, k] else "does not attend: "
    assert text.startswith(wanted), f"explain at {(b, h, q, k)}: {text}"


def validate(rng, problem):
    """A mask is of the kind of its rule; with one element changed it is not."""
    q_offset, _ = problem.offsets
    mask = problem.want
    if rng.random() < 0.5:
        mask = torch.zeros(mask.shape).masked_fill(~mask, rng.choice([-torch.inf, -1e4]))
    check = attn_mask.validate_mask_properties
    assert check(mask, problem.rule, q_offset=q_offset)
    place = tuple(rng.randrange(size) for size in mask.shape)
    other = mask.clone()
    other[place] = ~mask[place] if mask.dtype == torch.bool else -1e4 - mask[place]
    if mask.dtype != torch.bool:
        other[place] = 0.0 if mask[place] < 0 else -1e4
    assert not check(other, problem.rule, q_offset=q_offset), f"validate: {place} was changed"


def plan(rng, problem):
    """Whatever its tiles leave out is masked, and what they call visible is."""
    want = problem.want.expand(-1, problem.heads, -1, -1)
    segments = attn_mask.attention_plan(
        problem.rule,
        *problem.sizes,
        heads=problem.heads,
        device="cpu",
        **problem.offsets_of_attention,
    )
    seen = torch.zeros(want.shape, dtype=torch.int64)
    for segment in segments:
        for tile in range(segment.tiles):
            by = tile * segment.step
            rows = slice(segment.rows.start + by, segment.rows.stop + by)
            first = segment.keys.start + (0 if segment.grows else by)
            of_tile = segment.batch, slice(None), rows, slice(first, segment.keys.stop + by)
            part = want[of_tile]
            seen[of_tile] += 1
            if segment.path == "all":
                assert part.all(), f"plan: {segment}"
            elif segment.path == "causal":
                assert part.equal(torch.ones_like(part).tril()), f"plan: {segment}"
            elif segment.path == "nothing":
                assert not part.any(), f"plan: {segment}"
    assert int(seen.max()) <= 1, f"plan: tiles that overlap\n{segments}"
    assert not (want & (seen == 0)).any(), f"plan: keys that are in no tile\n{segments}"


def is_any(problem):
    return True


def is_callable_anywhere(problem):
    """Bits know rows and columns, which calls give them where those are positions."""
    return not problem.has_bits or (problem.offsets == [0, 0])


def has_offsets(problem):
    return not problem.has_positions and problem.lowest >= 0


def is_plain(problem):
    return problem.offsets is not None and is_callable_anywhere(problem)


def is_plan_of_rule(problem):
    return problem.is_native and has_offsets(problem)


# Which of them takes which problems.
VIEWS = (
    (boolean, is_any),
    (additive, is_any),
    (called, is_callable_anywhere),
    (mapped, is_plain),
    (block_mask, lambda problem: not problem.has_positions),
    (block_mask_of_torch, is_plain),
    (sdpa_arguments, has_offsets),
    (mirror, lambda problem: has_offsets(problem) and not problem.of_heads),
    (show, lambda problem: is_plain(problem)),
    (explain, lambda problem: is_callable_anywhere(problem) and problem.lowest >= 0),
    (validate, lambda problem: problem.offsets is not None and problem.offsets[1] == 0),
    (plan, is_plan_of_rule),
)
IN_GRAPHS = {boolean, additive, block_mask, sdpa_arguments, mirror}

assert set(rule_reference.ID_DTYPES) == set(rules.ID_DTYPES)
