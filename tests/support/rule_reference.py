"""Encoded mask rules, decoded and evaluated one cell at a time; and random ones.

A rule is a program of ints in prefix order, see `parse`; the tensors that it names by index are its
operands. Slow on purpose: nothing here broadcasts, so that a cell's value can be read off the few
lines that decide it.
"""

import dataclasses
import itertools
import random

import attn_mask
import torch
from hypothesis import strategies as st
from masks import FLOAT8_DTYPES, INT_DTYPES, LAYOUTS, OUT_DTYPES

# What follows each of them in a program:
OPCODES = attn_mask._C.OPCODES
ALL = OPCODES["ALL"]  # every key
CAUSAL = OPCODES["CAUSAL"]  # k <= q
WINDOW = OPCODES["WINDOW"]  # left, right: q - left <= k <= q + right, -1 for an open side
CHUNK = OPCODES["CHUNK"]  # size, operand or -1: the same chunk, counted from the operand [b]
BLOCKS = OPCODES["BLOCKS"]  # operand [b or 1, n]: ids of q and k are the same, not negative
PADDING = OPCODES["PADDING"]  # operand [b or 1, n]: not zero at k
DOCUMENTS = OPCODES["DOCUMENTS"]  # operand [b or 1, n]: the ids of q and k are the same
BITS = OPCODES["BITS"]  # operand [b or 1, h or 1, q, kv]: set at the row and column
AND = OPCODES["AND"]  # n, then n rules
OR = OPCODES["OR"]  # n, then n rules
REINDEX = OPCODES["REINDEX"]  # operand [b or 1, n], rule: evaluated at operand[q] and operand[k]
SHIFT = OPCODES["SHIFT"]  # q_add, kv_add, rule: evaluated at q + q_add and k + kv_add
NOTHING = OPCODES["NOTHING"]  # no key

_PARAMETERS = {
    WINDOW: 2,
    CHUNK: 2,
    BLOCKS: 1,
    PADDING: 1,
    DOCUMENTS: 1,
    BITS: 1,
    REINDEX: 1,
    SHIFT: 2,
}
_OPERAND_AT = {CHUNK: 1, BLOCKS: 0, PADDING: 0, DOCUMENTS: 0, BITS: 0, REINDEX: 0}

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
PADDING_DTYPES = (torch.bool, *INT_DTYPES, *OUT_DTYPES, *FLOAT8_DTYPES)


class CorruptRule(Exception):
    """Not the program of a rule."""


def parse(rule, number_of_operands):
    """The tree of a program: (opcode, parameters, children)."""
    tree, end = _parse_at(list(rule), 0, number_of_operands)
    if end != len(rule):
        raise CorruptRule(f"{len(rule) - end} ints too many")
    return tree


def _parse_at(rule, at, number_of_operands):
    def take():
        nonlocal at
        if at >= len(rule):
            raise CorruptRule("ends too early")
        at += 1
        return rule[at - 1]

    opcode = take()
    if opcode not in OPCODES.values():
        raise CorruptRule(f"no rule is called {opcode}")
    number_of_children = 1 if opcode in (REINDEX, SHIFT) else 0
    if opcode in (AND, OR):
        number_of_children = take()
        if number_of_children <= 0:
            raise CorruptRule(f"{number_of_children} children")
    parameters = tuple(take() for _ in range(_PARAMETERS.get(opcode, 0)))
    if opcode == WINDOW and min(parameters) < -1:
        raise CorruptRule(f"a window of {parameters}")
    if opcode == CHUNK and parameters[0] <= 0:
        raise CorruptRule(f"a chunk of {parameters[0]}")
    if opcode in _OPERAND_AT:
        operand = parameters[_OPERAND_AT[opcode]]
        allowed = range(-1 if opcode == CHUNK else 0, number_of_operands)
        if operand not in allowed:
            raise CorruptRule(f"operand {operand} of {number_of_operands}")
    children = []
    for _ in range(number_of_children):
        child, at = _parse_at(rule, at, number_of_operands)
        children.append(child)
    return (opcode, parameters, children), at


def nodes(tree):
    yield tree
    for child in tree[2]:
        yield from nodes(child)


def number_of_leaves(tree):
    return sum(not children for _, _, children in nodes(tree))


def _of_batch(table, b):
    """The row of [b or 1, ...]; or the plane of [h or 1, ...]."""
    return table[b] if len(table) > 1 else table[0]


def _at(table, b, position):
    """The value of [b or 1, n] at a position; None outside."""
    row = _of_batch(table, b)
    return row[position] if 0 <= position < len(row) else None


def attends(tree, tables, b, head, row, column, q, k):
    """Whether the query `row`, which stands at q, sees the key `column`, which stands at k."""
    opcode, parameters, children = tree

    def child_attends(child, q=q, k=k):
        return attends(child, tables, b, head, row, column, q, k)

    if opcode == ALL:
        return True
    if opcode == NOTHING:
        return False
    if opcode == CAUSAL:
        return k <= q
    if opcode == WINDOW:
        left, right = parameters
        return (left == -1 or k >= q - left) and (right == -1 or k <= q + right)
    if opcode == CHUNK:
        size, operand = parameters
        start = 0 if operand == -1 else _of_batch(tables[operand], b)
        return (k - start) // size == (q - start) // size
    if opcode == BLOCKS:
        of_query, of_key = (_at(tables[parameters[0]], b, position) for position in (q, k))
        return of_query is not None and of_query == of_key and of_query >= 0
    if opcode == PADDING:
        value = _at(tables[parameters[0]], b, k)
        return value is not None and value != 0
    if opcode == DOCUMENTS:
        of_query, of_key = (_at(tables[parameters[0]], b, position) for position in (q, k))
        return of_query is not None and of_query == of_key
    if opcode == BITS:
        plane = _of_batch(_of_batch(tables[parameters[0]], b), head)
        return plane[row][column]
    if opcode == AND:
        return all([child_attends(child) for child in children])
    if opcode == OR:
        return any([child_attends(child) for child in children])
    if opcode == REINDEX:
        new_q, new_k = (_at(tables[parameters[0]], b, position) for position in (q, k))
        return new_q is not None and new_k is not None and child_attends(children[0], new_q, new_k)
    assert opcode == SHIFT
    return child_attends(children[0], q + parameters[0], k + parameters[1])


def positions_of(length, offset, positions, b):
    """Where the rows (or columns) of batch row b stand."""
    if positions is None:
        return [offset + i for i in range(length)]
    if positions.dim() == 0:
        return [positions.item() + offset + i for i in range(length)]
    if positions.dim() == 1:
        return [position + offset for position in positions.tolist()]
    row = _of_batch(positions.tolist(), b)
    if len(row) == 1:
        return [row[0] + offset + i for i in range(length)]
    return [position + offset for position in row]


def heads_of(tree, operands):
    """How many heads the bits of a rule have; 1 without any."""
    heads = {operands[p[0]].shape[1] for opcode, p, _ in nodes(tree) if opcode == BITS} - {1}
    return heads.pop() if heads else 1


def _table(operand):
    narrow = operand.dtype in FLOAT8_DTYPES
    return (operand.to(torch.float32) if narrow else operand).tolist()


def boolean(
    rule,
    operands,
    batch_size,
    q_length,
    kv_length,
    *,
    q_offset=0,
    kv_offset=0,
    q_positions=None,
    kv_positions=None,
):
    """[b, heads, q, kv]; the arguments of torch.ops.attn_mask.boolean."""
    tree = parse(rule, len(operands))
    heads, tables = heads_of(tree, operands), [_table(operand) for operand in operands]
    cells = []
    for b in range(batch_size):
        queries = positions_of(q_length, q_offset, q_positions, b)
        keys = positions_of(kv_length, kv_offset, kv_positions, b)
        cells += [
            attends(tree, tables, b, head, row, column, q, k)
            for head in range(heads)
            for row, q in enumerate(queries)
            for column, k in enumerate(keys)
        ]
    cells = torch.tensor(cells, dtype=torch.bool)
    return cells.reshape(batch_size, heads, q_length, kv_length)


def additive(*args, dtype, bias=None, **kwargs):
    """0, or the bias, where the boolean mask is True; the lowest finite number elsewhere."""
    mask = boolean(*args, **kwargs)
    batch_size, heads, q_length, kv_length = mask.shape
    if bias is None:
        bias = torch.zeros(1, 1, q_length, kv_length, dtype=dtype)
    heads, closed = (bias.shape[1] if heads == 1 else heads), torch.finfo(dtype).min
    result = torch.empty(batch_size, heads, q_length, kv_length, dtype=dtype)
    for b, h, row, column in itertools.product(*map(range, result.shape)):
        value = bias[b if len(bias) > 1 else 0, h if bias.shape[1] > 1 else 0, row, column]
        is_open = mask[b, h if mask.shape[1] > 1 else 0, row, column]
        result[b, h, row, column] = value if is_open else closed
    return result


# Random rules


@dataclasses.dataclass
class Call:
    """The arguments of torch.ops.attn_mask.boolean."""

    rule: list
    operands: list
    batch_size: int
    q_length: int
    kv_length: int
    positions: dict = dataclasses.field(default_factory=dict)

    @property
    def args(self):
        return self.rule, self.operands, self.batch_size, self.q_length, self.kv_length

    @property
    def tree(self):
        return parse(self.rule, len(self.operands))


def runs(rng, length, ids):
    """Ids that stay the same for a while."""
    row = []
    while len(row) < length:
        row += [rng.choice(ids)] * rng.randint(1, max(length // 2, 1))
    return row[:length]


def _id_row(rng, length, low):
    kind = rng.randrange(4)
    if kind == 0:  # documents, one after the other
        row = []
        while len(row) < length:
            row += [len(row)] * rng.randint(1, max(length // 2, 1))
        return row[:length]
    if kind == 1:
        return runs(rng, length, [low, 0, 1, 2])
    if kind == 2:
        return [rng.randint(low, 2) for _ in range(length)]
    return [rng.choice([low, 0])] * length


def _position_row(rng, length, low):
    kind = rng.randrange(3)
    if kind == 0:  # every document counts from zero
        row = []
        while len(row) < length:
            row += range(rng.randint(1, max(length, 1)))
        return row[:length]
    if kind == 1:
        return [i + rng.randint(low, 2) for i in range(length)]
    return [rng.randint(2 * low, length) for _ in range(length)]


def _padding_row(rng, length):
    kind, split = rng.randrange(4), rng.randint(0, length)
    if kind == 0:
        return [0] * split + [1] * (length - split)
    if kind == 1:
        return [1] * split + [0] * (length - split)
    if kind == 2:
        return [rng.choice([0, 0, 1, 2, -1, 0.5]) for _ in range(length)]
    return [rng.randint(0, 1)] * length


class _Grower:
    """Draws a tree and the operands that it names."""

    def __init__(self, draw, batch_size, q_length, kv_length, *, heads, length, leaves, layouts):
        self.draw, self.batch_size = draw, batch_size
        self.q_length, self.kv_length, self.heads, self.length = q_length, kv_length, heads, length
        self.leaves, self.layouts = leaves, layouts
        self.rng = random.Random(draw(st.integers(0, 2**32)))
        self.operands = []

    def pick(self, choices):
        return self.draw(st.sampled_from(choices))

    def operand(self, tensor):
        # Layouts that repeat a row or a column change the values: they are of use all the same.
        layout = self.pick(self.layouts)
        self.operands.append(LAYOUTS[layout](tensor) if tensor.numel() else tensor)
        return len(self.operands) - 1

    def table(self, make_row, dtypes):
        dtype, rng = self.pick(dtypes), self.rng
        low = -1 if dtype.is_signed else 0
        batch_size = self.pick([self.batch_size, 1])
        rows = [make_row(rng, self.length, low) for _ in range(batch_size)]
        tensor = torch.tensor(rows, dtype=torch.int64).reshape(batch_size, self.length)
        return self.operand(tensor.to(dtype))

    def padding(self):
        dtype = self.pick(PADDING_DTYPES)
        batch_size = self.pick([self.batch_size, 1])
        rows = [_padding_row(self.rng, self.length) for _ in range(batch_size)]
        tensor = torch.tensor(rows, dtype=torch.float64).reshape(batch_size, self.length)
        if not dtype.is_signed:
            tensor = tensor.abs().ceil()
        return self.operand(tensor.to(dtype))

    def starts(self):
        values = [self.rng.randint(-2, self.kv_length + 2) for _ in range(self.batch_size)]
        starts = torch.tensor(values, dtype=torch.int64)[: self.pick([self.batch_size, 1])]
        return self.operand(starts.to(self.pick([torch.int64, torch.int32])))

    def bits(self):
        batch_size, heads = self.pick([self.batch_size, 1]), self.pick([self.heads, 1])
        shape = (batch_size, heads, self.q_length, self.kv_length)
        cells = [self.rng.random() < 0.6 for _ in range(torch.Size(shape).numel())]
        return self.operand(torch.tensor(cells, dtype=torch.bool).reshape(shape))

    def leaf(self):
        opcode = self.pick(self.leaves)
        far = self.kv_length + 2
        if opcode == WINDOW:
            side = st.one_of(st.integers(-1, far), st.sampled_from([2**62, 2**63 - 1]))
            return [WINDOW, self.draw(side), self.draw(side)]
        if opcode == CHUNK:
            size = self.draw(st.one_of(st.integers(1, far), st.sampled_from([2**62, 2**63 - 1])))
            has_starts = self.batch_size > 0 and self.draw(st.booleans())
            return [CHUNK, size, self.starts() if has_starts else -1]
        if opcode == BLOCKS:
            return [BLOCKS, self.table(_id_row, ID_DTYPES)]
        if opcode == DOCUMENTS:
            return [DOCUMENTS, self.table(_id_row, ID_DTYPES)]
        if opcode == PADDING:
            return [PADDING, self.padding()]
        if opcode == BITS:
            return [BITS, self.bits()]
        return [opcode]

    def tree(self, depth, shift):
        """`shift` bounds what SHIFT adds."""
        inner = self.pick(["leaf", "and", "or", "and", "or", "reindex", "shift"])
        if depth == 0 or inner == "leaf":
            return self.leaf()
        if inner in ("and", "or"):
            children = [self.tree(depth - 1, shift) for _ in range(self.draw(st.integers(1, 3)))]
            opcode = AND if inner == "and" else OR
            return [opcode, len(children), *itertools.chain.from_iterable(children)]
        if inner == "reindex":
            operand = self.table(_position_row, ID_DTYPES)
            return [REINDEX, operand, *self.tree(depth - 1, shift)]
        add = st.integers(-shift, shift)
        return [SHIFT, self.draw(add), self.draw(add), *self.tree(depth - 1, shift)]


def _draw_positions(draw, rng, axis, batch_size, length, offsets):
    """The keyword arguments that give the positions of the queries (or the keys)."""
    kind = draw(
        st.sampled_from(["none", "offset", "0-d", "per row", "[n]", "[1, n]", "[b, n]", "both"])
    )
    offset = draw(offsets)
    if kind == "none":
        return {}
    if kind == "offset":
        return {f"{axis}_offset": offset}
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    if kind in ("0-d", "both"):
        given = {f"{axis}_positions": torch.tensor(offset, dtype=dtype)}
        return {**given, f"{axis}_offset": draw(offsets)} if kind == "both" else given
    if kind == "per row":
        values = [[rng.randint(0, max(offset, 0) + 2)] for _ in range(batch_size)]
        tensor = torch.tensor(values, dtype=dtype).reshape(batch_size, 1)
        return {f"{axis}_positions": tensor}
    shape = {"[n]": (length,), "[1, n]": (1, length), "[b, n]": (batch_size, length)}[kind]
    start = max(offset, 0)
    values = [rng.randint(0, length + start) for _ in range(torch.Size(shape).numel())]
    if draw(st.booleans()):  # a shard: in order, with a gap
        values = [
            i % length + (start if i % length > length // 2 else 0) for i in range(len(values))
        ]
    given = {f"{axis}_positions": torch.tensor(values, dtype=dtype).reshape(shape)}
    return {**given, f"{axis}_offset": offset} if draw(st.booleans()) else given


ANY_LEAF = (ALL, CAUSAL, WINDOW, CHUNK, BLOCKS, PADDING, DOCUMENTS, BITS, NOTHING)


@st.composite
def calls(draw, *, depth=3, leaves=ANY_LEAF, min_size=0, max_kv=12, layouts=tuple(LAYOUTS)):
    """Any rule over small sizes, any positions; now and then operands that end too early."""
    batch_size = draw(st.integers(min_size, 3))
    q_length = draw(st.integers(min_size, 7))
    kv_length = draw(st.one_of(st.integers(min_size, max_kv), st.integers(min_size, 150)))
    if kv_length > 40:
        q_length = min(q_length, 3)
    offsets = st.integers(-3, 9)
    rng = random.Random(draw(st.integers(0, 2**32)))
    positions = {
        **_draw_positions(draw, rng, "q", batch_size, q_length, offsets),
        **_draw_positions(draw, rng, "kv", batch_size, kv_length, offsets),
    }
    reach = max(q_length, kv_length) + 24
    length = draw(st.sampled_from([reach, reach, reach, kv_length, kv_length // 2, 0, 1]))
    grower = _Grower(
        draw,
        batch_size,
        q_length,
        kv_length,
        heads=draw(st.sampled_from([1, 1, 2, 3, 0])),
        length=length,
        leaves=leaves,
        layouts=layouts,
    )
    rule = grower.tree(depth, shift=4)
    return Call(rule, grower.operands, batch_size, q_length, kv_length, positions)


# Random mask functions, as a module of the names of masking_utils makes them: a builder is given
# the module.

TABLE = 64  # longer than any position that is looked up


def some_table(seed, low, high, batch_size=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (batch_size, TABLE), generator=generator)


def rising(table):
    return lambda b, h, q, k: table[b, q] >= table[b, k] + h


LEAVES = {
    "causal": lambda m, n, seed: m.causal_mask_function,
    "bidirectional": lambda m, n, seed: m.bidirectional_mask_function,
    "sliding overlay": lambda m, n, seed: m.sliding_window_overlay(n),
    "sliding": lambda m, n, seed: m.sliding_window_causal_mask_function(n),
    "bidirectional overlay": lambda m, n, seed: m.sliding_window_bidirectional_overlay(n),
    "bidirectional sliding": lambda m, n, seed: m.sliding_window_bidirectional_mask_function(n),
    "chunked overlay": lambda m, n, seed: m.chunked_overlay(
        max(n, 1), some_table(seed, 0, 5)[:, 0]
    ),
    "chunked": lambda m, n, seed: m.chunked_causal_mask_function(
        max(n, 1), some_table(seed, 0, 5)[:, 0].int()
    ),
    "blockwise": lambda m, n, seed: m.blockwise_overlay(some_table(seed, -1, 2)),
    "padding": lambda m, n, seed: m.padding_mask_function(some_table(seed, 0, 2).bool()),
    "packed": lambda m, n, seed: m.packed_sequence_mask_function(some_table(seed, 0, 3)),
    "user": lambda m, n, seed: lambda b, h, q, k: (q + k) % (abs(n) + 2) == 0,
    "user of the batch": lambda m, n, seed: rising(some_table(seed, 0, 3)),
}


@st.composite
def builders(draw, depth=2, leaves=tuple(LEAVES)):
    """A function of the module that gives a mask function."""
    inner = draw(st.sampled_from(["leaf", "and", "or", "offsets", "remap", "compatibility"]))
    seed = draw(st.integers(0, 99))
    if depth == 0 or inner == "leaf":
        leaf, n = draw(st.sampled_from(leaves)), draw(st.integers(-2, 7))
        return lambda m: LEAVES[leaf](m, n, seed)
    inside = builders(depth=depth - 1, leaves=leaves)
    if inner in ("and", "or"):
        parts = draw(st.lists(inside, min_size=1, max_size=3))
        return lambda m: getattr(m, f"{inner}_masks")(*(part(m) for part in parts))
    child = draw(inside)
    if inner == "offsets":
        q_offset, kv_offset = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        return lambda m: m.add_offsets_to_mask_function(child(m), q_offset, kv_offset)
    positions = some_table(seed, 0, 12)
    if inner == "remap":
        return lambda m: m.remap_positions_for_packed_sequence(child(m), positions)
    ids = some_table(seed + 1, 0, 3)
    return lambda m: m.and_masks(
        m.packed_sequence_mask_function(ids),
        m.remap_positions_for_packed_sequence(child(m), positions),
    )


def grid(batch_size, q_length, kv_length, q_offset=0, kv_offset=0):
    """The indices of a mask, laid out for broadcasting."""
    return (
        torch.arange(batch_size)[:, None, None, None],
        torch.arange(1)[None, :, None, None],
        torch.arange(q_length)[None, None, :, None] + q_offset,
        torch.arange(kv_length)[None, None, None, :] + kv_offset,
    )
