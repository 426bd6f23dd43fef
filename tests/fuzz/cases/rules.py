"""Random rules, and what each shows: a formula over int64, which no code of the library takes part
in.

A formula is a function of Elements with a boolean result. Tables are as long as the positions at
which they are looked up, so that all views of a rule give the same: where one ends too early, some
raise an error and others mask, which other tests compare.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import rule_reference
import torch
from attn_mask import rules

from cases.values import strided

FAR = 2**59
LONGEST_TABLE = 300


class Elements(NamedTuple):
    """Of a mask: int64 tensors that broadcast over [b, h, q, kv]."""

    b: Any
    h: Any
    row: Any
    column: Any
    q: Any
    """Positions, at the place of a rule in its tree."""
    k: Any


@dataclasses.dataclass
class Problem:
    """A rule, and the mask that is wanted of it."""

    batch_size: int
    heads: int
    q_length: int
    kv_length: int
    rule: Any = None
    shows: Callable[[Elements], torch.Tensor] | None = None
    q_at: torch.Tensor | None = None
    """The position of each query, int64 [b, q]; of each key."""
    k_at: torch.Tensor | None = None
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    """They, as arguments: offsets or positions, ints or tensors."""
    is_last_at_last: bool = False
    """Whether the last query and the last key are the same token."""
    has_bits: bool = False
    has_bits_of_heads: bool = False
    is_native: bool = True
    is_wide: bool = False
    """Whether it has a size beyond int32."""
    of_heads: bool = False
    """Whether a function in it tells heads apart."""

    @property
    def sizes(self):
        return self.batch_size, self.q_length, self.kv_length

    @property
    def offsets(self):
        """(q, kv) where both are ints, else None."""
        given = [self.where.get(f"{axis}_offset", 0) for axis in ("q", "kv")]
        is_plain = all(isinstance(offset, int) for offset in given)
        return given if is_plain and not self.has_positions else None

    @property
    def has_positions(self):
        return any("positions" in name for name in self.where)

    @property
    def offsets_of_attention(self):
        """As attention takes them: by default the last query stands at the last key."""
        q_offset = None if self.is_last_at_last else self.where.get("q_offset", 0)
        return {"q_offset": q_offset, "kv_offset": self.where.get("kv_offset", 0)}

    @property
    def lowest(self):
        """The least position of a query or key."""
        return min(int(at.min()) if at.numel() else 0 for at in (self.q_at, self.k_at))

    @property
    def of_function(self):
        """What a call must say of a rule that tells heads apart by a function."""
        return {"heads": self.heads} if self.of_heads else {}

    @property
    def want(self):
        """bool [b, 1 or heads, q, kv]."""
        heads = self.heads if self.of_heads or self.has_bits_of_heads else 1
        shown = self.shows(
            Elements(
                torch.arange(self.batch_size)[:, None, None, None],
                torch.arange(heads)[:, None, None],
                torch.arange(self.q_length)[:, None],
                torch.arange(self.kv_length),
                self.q_at[:, None, :, None],
                self.k_at[:, None, None, :],
            )
        )
        return shown.expand(self.batch_size, heads, self.q_length, self.kv_length)

    def __repr__(self):
        text = f"{self.sizes} heads {self.heads} of {self.rule!r} at {self.where}"
        return text if len(text) < 1500 else text[:1500] + "..."


def any_problem(rng, *, functions=True, longest=12):
    """A rule over small sizes, or over longer ones; anywhere, unless it has tables."""
    batch_size, heads = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
    lengths = [rng.randint(1, longest) for _ in range(2)]
    if rng.random() < 0.4:
        lengths[1] = lengths[0]
    problem = Problem(batch_size, heads, *lengths)
    is_far = rng.random() < 0.12
    base = rng.choice([3000, 2**31 - 5, 2**40, FAR - 400, -3, -3]) if is_far else 0
    for axis, length in zip("qk", lengths, strict=True):
        at, given = _where(rng, "kv" if axis == "k" else "q", batch_size, length, base)
        setattr(problem, f"{axis}_at", at)
        problem.where |= given
    if lengths[0] == lengths[1] and rng.random() < 0.5:
        problem.k_at = problem.q_at
        problem.where = {
            axis + name.lstrip("qkv"): value
            for name, value in problem.where.items()
            if name.startswith("q")
            for axis in ("q", "kv")
        }
    if "kv_positions" not in problem.where and lengths[0] <= lengths[1] and rng.random() < 0.15:
        later = lengths[1] - lengths[0]
        problem.q_at = problem.k_at[:, :1] + later + torch.arange(lengths[0])
        kv_offset = problem.where.get("kv_offset", 0)
        is_number = isinstance(kv_offset, int)
        q_offset = (kv_offset if is_number else kv_offset.to(torch.int64)) + later
        problem.where = {"q_offset": q_offset, "kv_offset": kv_offset}
        problem.is_last_at_last = True
    both = torch.cat([problem.q_at, problem.k_at], 1)
    grower = _Grower(rng, problem, functions)
    reach = int(both.min()), int(both.max())
    problem.rule, problem.shows = grower.tree(rng.choice([0, 1, 2, 2, 3, 4]), *reach, is_top=True)
    if rng.random() < 0.25:
        problem.rule = _same(rng, problem)
    return problem


def _where(rng, axis, batch_size, length, base):
    """(positions [b, length], the arguments that give them)."""
    kind = rng.choice(["none", "int", "int", "int", "[]", "[b, 1]", "[n]", "[b, n]"])
    ordinals = torch.arange(length).expand(batch_size, -1)
    if kind == "none" and base == 0:
        return ordinals, {}
    if kind in ("none", "int") or base != 0:
        offset = base + rng.randint(0, 5)
        return ordinals + offset, {f"{axis}_offset": offset}
    dtype = rng.choice(rule_reference.ID_DTYPES)
    if kind in ("[]", "[b, 1]"):
        values = torch.randint(0, 100, [] if kind == "[]" else [batch_size, 1])
        # A sum may be more than the dtype holds.
        values = values if rng.random() < 0.5 else values // 10 + 118
        return ordinals + values, {f"{axis}_offset": values.to(dtype)}
    shape = [length] if kind == "[n]" else [batch_size, length]
    values = torch.randint(0, 20, shape)
    offset = rng.choice([0, 0, 3, 120])
    positions = (values + offset).expand(batch_size, -1)
    return positions, {
        f"{axis}_positions": values.to(dtype),
        f"{axis}_offset": offset,
    }


def _same(rng, problem):
    """The rule by another object, or in another form."""
    rule = problem.rule
    ways = [copy.copy, lambda rule: rule.to("cpu"), rules.function, rules.union, rules.intersection]
    if problem.is_native:
        ways += [copy.deepcopy]
    if not problem.has_bits:  # those know rows and columns by themselves
        ways += [lambda rule: rules.shift(rule, 0, 0)]
    return rng.choice(ways)(rule)


class _Grower:
    """Draws a tree over positions from `low` to `high`, and its formula."""

    def __init__(self, rng, problem, functions):
        self.rng, self.problem, self.functions = rng, problem, functions

    def tree(self, depth, low, high, is_top=False):
        rng = self.rng
        kind = rng.randrange(7) if depth else 0
        if kind < 2:
            return self.leaf(low, high)
        if kind == 2 and low >= 0 and high < LONGEST_TABLE:
            return self.reindexed(depth, high)
        if kind == 3:
            q_add, k_add = rng.randint(-3, 4), rng.randint(-3, 4)
            if low + min(q_add, k_add) < 0 <= low:
                q_add, k_add = abs(q_add), abs(k_add)
            if max(abs(low), abs(high)) + 8 >= FAR:
                q_add = k_add = 0
            inner, shows = self.tree(depth - 1, low + min(q_add, k_add), high + max(q_add, k_add))
            rule = rules.shift(inner, q_add, k_add)
            return rule, lambda at: shows(at._replace(q=at.q + q_add, k=at.k + k_add))
        parts = [self.tree(depth - 1, low, high) for _ in range(rng.choice([2, 2, 2, 3]))]
        of_rules, formulas = zip(*parts, strict=True)
        if kind % 2:
            return rules.intersection(*of_rules), lambda at: _fold(torch.logical_and, formulas, at)
        return rules.union(*of_rules), lambda at: _fold(torch.logical_or, formulas, at)

    def reindexed(self, depth, high):
        rng = self.rng
        dtype = rng.choice(rule_reference.ID_DTYPES)
        most = torch.iinfo(dtype).max
        # Low ones, those at the end of the dtype, or any that it holds: then without tables.
        least, greatest = rng.choice(
            [
                (0, 15),
                (0, 15),
                (max(0, min(most, LONGEST_TABLE - 40) - 20), min(most, LONGEST_TABLE - 40)),
                (max(torch.iinfo(dtype).min, -(2**40)), min(most, 2**40)),
            ]
        )
        given, table = self.table(high + 1, least, greatest, [dtype])
        inner, shows = self.tree(depth - 1, least, greatest)

        def moved(at):
            return shows(at._replace(q=table[at.b, at.q], k=table[at.b, at.k]))

        return rules.reindex(inner, given), moved

    def table(self, length, least, greatest, dtypes, of_number=int):
        """(as it is given, int64 [b, length])."""
        rng, batch_size = self.rng, self.problem.batch_size
        rows = rng.choice([1, batch_size])
        length += rng.choice([0, 0, 1, 7])
        runs = rng.random() < 0.4
        lines = []
        for _ in range(rows):
            line = []
            while len(line) < length:
                value = rng.randint(least, greatest)
                line += [value] * (rng.randint(1, 5) if runs else 1)
            lines.append(sorted(line[:length]) if rng.random() < 0.3 else line[:length])
        table = torch.tensor(lines, dtype=torch.int64)
        # Layouts that repeat a row or column change the values.
        given = strided(rng, table.to(rng.choice(dtypes)))
        table = given.to(torch.int64)
        if rows == 1 and rng.random() < 0.4:
            given = given[0]
        return given, table.expand(batch_size, -1)

    def ids(self, high):
        rng = self.rng
        dtype = rng.choice(rule_reference.ID_DTYPES)
        limits = torch.iinfo(dtype)
        least = max(limits.min, -1)
        least, greatest = rng.choice(
            [(least, 2), (least, 2), (0, 1), (limits.min, limits.max), (limits.max - 1, limits.max)]
        )
        return self.table(high + 1, least, greatest, [dtype])

    def padding(self, high):
        rng, problem = self.rng, self.problem
        dtype = rng.choice(rule_reference.PADDING_DTYPES)
        values = [0, 0, 1, 1, 1, 2]
        if dtype.is_signed:
            values += [-1]
        if dtype.is_floating_point:
            values += [0.5, -0.0]
            values += [float("nan")] if dtype.itemsize > 1 else []
        rows = rng.choice([1, problem.batch_size])
        shape = [rows, high + 1 + rng.choice([0, 0, 3])]
        numbers = [rng.choice(values) for _ in range(torch.Size(shape).numel())]
        tensor = torch.tensor(numbers, dtype=torch.float64).reshape(shape).to(dtype)
        given = strided(rng, tensor)
        # NaN is not 0, and e8m0 has none.
        shown = given.to(torch.float64) != 0
        if rows == 1 and rng.random() < 0.4:
            given = given[0]
        return given, shown.expand(problem.batch_size, -1)

    def leaf(self, low, high):
        rng, problem = self.rng, self.problem
        kinds = ["causal", "causal", "window", "window", "sliding", "chunked", "nothing"]
        has_tables = low >= 0 and high < LONGEST_TABLE
        if has_tables:
            kinds += ["documents", "documents", "blocks", "padding", "padding"]
        if low >= 0:  # before 0, calls of bidirectional mask what its program shows
            kinds += ["all"]
        kinds += ["bits"]
        if self.functions:
            kinds += ["function"]
        kind = rng.choice(kinds)
        size = rng.choice([1, 2, 3, 5, 9, 9, 12, 2**40, 2**62])
        right = rng.choice([None, 1, 3, 6, 7, 2**40])
        problem.is_wide |= max(size, right or 0) > 2**31
        if kind == "causal":
            return rules.causal(), lambda at: at.k <= at.q
        if kind == "all":
            return rules.bidirectional(), lambda at: at.k == at.k
        if kind == "nothing":
            return rules.nothing(), lambda at: at.k != at.k
        if kind == "sliding":
            return rules.sliding_window(size), lambda at: at.k > at.q - size
        if kind == "window":
            left = rng.choice([0, 2, 7, -1] if right is None else [None, 0, 2, 7, -1])

            def within(at):
                after = at.k == at.k if left is None else at.k >= at.q - left
                return after if right is None else after & (at.k <= at.q + right)

            return rules.window(left, right), within
        if kind == "chunked":
            start, starts = None, torch.zeros(problem.batch_size, dtype=torch.int64)
            if rng.random() < 0.5:
                dtype = rng.choice(rule_reference.ID_DTYPES)
                least = -5 if dtype.is_signed else 0
                rows = rng.choice([1, problem.batch_size])
                starts = torch.tensor([rng.randint(least, 12) for _ in range(rows)])
                start = starts.to(dtype)
                starts = starts.expand(problem.batch_size)
            return rules.chunked(
                size, start
            ), lambda at: (at.k - starts[at.b]) // size == (at.q - starts[at.b]) // size
        if kind == "documents":
            given, ids = self.ids(high)
            return rules.documents(given), lambda at: ids[at.b, at.q] == ids[at.b, at.k]
        if kind == "blocks":
            given, ids = self.ids(high)
            return rules.blockwise(
                given
            ), lambda at: (ids[at.b, at.q] == ids[at.b, at.k]) & (ids[at.b, at.q] >= 0)
        if kind == "padding":
            given, shown = self.padding(high)
            return rules.padding(given), lambda at: shown[at.b, at.k]
        if kind == "bits":
            problem.has_bits = True
            shape = [rng.choice([1, problem.batch_size]), rng.choice([1, problem.heads])]
            problem.has_bits_of_heads |= shape[1] > 1
            bits = torch.rand(*shape, problem.q_length, problem.kv_length) < rng.choice([0.2, 0.7])
            of_all = bits.expand(problem.batch_size, problem.heads, -1, -1)
            return rules.bits(bits), lambda at: of_all[at.b, at.h, at.row, at.column]
        return self.function()

    def function(self):
        """A mask function that is no rule."""
        rng, problem = self.rng, self.problem
        problem.is_native = False
        number = rng.randint(2, 4)
        if problem.heads == 1 or rng.random() < 0.5:  # one that looks at a single head is an error
            return (
                rules.function(lambda b, h, q, k: (q + 2 * k) % number == 0),
                lambda at: (at.q + 2 * at.k) % number == 0,
            )
        problem.of_heads = True
        steps = torch.tensor([rng.randint(1, 5) for _ in range(problem.heads)])
        return (
            rules.function(lambda b, h, q, k: q - k < steps[h]),
            lambda at: at.q - at.k < steps[at.h],
        )


def _fold(join, formulas, at):
    first, *others = (formula(at) for formula in formulas)
    for other in others:
        first = join(first, other)
    return first
