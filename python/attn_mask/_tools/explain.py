"""Why a query attends to a key, or does not: the leaves of a rule that decide it, in words."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_mask import rules
from attn_mask._core.arguments import check_readable, checked_natural
from attn_mask._core.program import Source
from attn_mask._core.write import check_boolean

__all__ = ["explain"]


def explain(rule: Callable[..., Any], *, q: int, k: int, b: int = 0, h: int = 0) -> str:
    """Whether query ``q`` attends to key ``k`` by a rule, and which of its leaves decide it::

        >>> attn_mask.explain(attn_mask.causal() & attn_mask.sliding_window(4), q=8, k=3)
        'does not attend: key 3 is 5 before query 8, outside the window of 4 keys'

    Args:
        rule: of ``attn_mask.rules``, or any mask function of (batch_idx, head_idx, q_idx, kv_idx),
            which is called with tensors [].
        q, k: positions of the query and of the key; of bits, the row and the column.
        b, h: the batch row and the head.

    Returns one line. It begins "attends" or "does not attend"; then come the leaves that decide it:
    of an intersection that masks, those that mask; of a union that shows, those that show; else
    all. Where reindex or shift moved a position, that is in parentheses. Values of tensors are
    read.

    Raises TypeError for what is no rule and no int, IndexError for a position, batch row or head
    that is below 0 or outside a tensor of the rule, ValueError for a rule with tensors on meta.
    """
    given = {"q": q, "k": k, "b": b, "h": h}
    q, k, b, h = (checked_natural("explain", name, value) for name, value in given.items())
    here = _Element(b, h, q, k, q, k)
    attends, reasons = _decide(rules.rule_of("explain", "rule", rule), here)
    return f"{'attends' if attends else 'does not attend'}: {'; '.join(dict.fromkeys(reasons))}"


def _read(tensor: torch.Tensor, *index: int) -> Any:
    """An element of a tensor of the rule."""
    check_readable("explain", "rule", tensor)
    element = tensor[index]
    if element.numel() != 1:
        raise ValueError(
            "explain: expected offsets of shift to be of one element, "
            f"but got {list(element.shape)}"
        )
    return element.item()


class _Element(NamedTuple):
    """One element of a mask, at the place of a rule in its tree."""

    b: int
    h: int
    q: int
    k: int
    q_at: int
    """The position, after what reindex and shift add."""
    k_at: int
    may_be_outside: bool = False
    """Whether positions come from a tensor: outside tables, they are not visible."""

    @property
    def query(self) -> str:
        return f"query {self.q}" + ("" if self.q_at == self.q else f" (position {self.q_at})")

    @property
    def key(self) -> str:
        return f"key {self.k}" + ("" if self.k_at == self.k else f" (position {self.k_at})")

    @property
    def distance(self) -> str:
        apart = self.q_at - self.k_at
        if apart == 0:
            return f"{self.key} is at the position of {self.query}"
        return f"{self.key} is {abs(apart)} {'before' if apart > 0 else 'after'} {self.query}"


_Decision = tuple[bool, list[str]]
"""Whether the query attends to the key, and the reasons."""


def _decide(rule: Any, at: _Element) -> _Decision:
    if rule.factory in ("intersection", "union"):
        decisions = []
        for branch in rule.parts:  # no comprehension, which would be one more frame for each level
            decisions.append(_decide(branch, at))
        attends = (all if rule.factory == "intersection" else any)(of for of, _ in decisions)
        if not decisions:
            return attends, [f"{rule.factory} of no rules {'shows' if attends else 'masks'} all"]
        return attends, [text for of, texts in decisions if of == attends for text in texts]
    if isinstance(rule, rules.Shift):
        q_add, k_add = (
            int(_read(offset)) if isinstance(offset, torch.Tensor) else offset
            for offset in (rule.q_offset, rule.kv_offset)
        )
        return _decide(rule.rule, at._replace(q_at=at.q_at + q_add, k_at=at.k_at + k_add))
    if isinstance(rule, rules.Reindex):
        (q_at, k_at), outside = _look_up(rule.positions, rule.source, at, "qk")
        if outside:
            return False, outside
        return _decide(rule.rule, at._replace(q_at=q_at, k_at=k_at, may_be_outside=True))
    if isinstance(rule, rules.Bits):
        attends = _bit(rule.attends, at)
        return attends, [f"bits {'show' if attends else 'mask'} key {at.k} for query {at.q}"]
    if isinstance(rule, rules.Padding):
        (shown,), outside = _look_up(rule.mask, rule.source, at, "k")
        reason = f"{at.key} is {'no padding' if shown else 'padding'}"
        if rule.name is not None:
            reason = f"{rule.name} {'shows' if shown else 'masks'} {at.key}"
        return bool(shown), outside or [reason]
    if isinstance(rule, rules.Documents | rules.Blockwise):
        return _decide_ids(rule, at)
    return _decide_positions(rule, at)


def _decide_ids(rule: rules.Documents | rules.Blockwise, at: _Element) -> _Decision:
    (of_query, of_key), outside = _look_up(rule.ids, rule.source, at, "qk")
    if outside:
        return False, outside
    unit = "document" if isinstance(rule, rules.Documents) else "block"
    if unit == "block":
        for who, of in ((at.query, of_query), (at.key, of_key)):
            if of < 0:
                return False, [f"{who} is in no block (its id is {of})"]
    if of_query == of_key:
        return True, [f"{at.key} and {at.query} are both in {unit} {of_key}"]
    return False, [f"{at.key} is in {unit} {of_key} and {at.query} in {unit} {of_query}"]


def _decide_positions(rule: Any, at: _Element) -> _Decision:
    """By what the leaf itself says of its two positions."""
    start = 0
    if isinstance(rule, rules.Chunked) and rule.left_padding is not None:
        start = int(_read(rule.left_padding, _row(rule.left_padding, rule.source, at)))
    if rule.factory == "bidirectional" and at.may_be_outside:
        attends = True  # of positions below 0, too
    else:
        # On the CPU: such indices go with tensors of any device.
        indices = torch.tensor([at.b, at.h, at.q_at, at.k_at], device="cpu")
        result = rule(*indices)
        check_boolean("explain", result)
        if isinstance(result, torch.Tensor):
            check_readable("explain", "rule", result)
        if result.numel() != 1:
            raise ValueError(
                "explain: expected mask_function to return one element for indices [], "
                f"but got {list(result.shape)}"
            )
        attends = bool(result)
    shows = "shows" if attends else "masks"
    if rule.factory == "causal":
        reason = f"{at.distance}, which causal {shows}"
    elif isinstance(rule, rules.Window):
        window = repr(rule)
        if rule.left is not None and rule.right is None:
            window = f"the window of {rule.left + 1} key{'' if rule.left == 0 else 's'}"
        reason = f"{at.distance}, {'inside' if attends else 'outside'} {window}"
    elif isinstance(rule, rules.Chunked):
        of_key, of_query = ((position - start) // rule.size for position in (at.k_at, at.q_at))
        chunks = f"(chunks of {rule.size}{f' from {start} on' if start else ''})"
        if attends:
            reason = f"{at.key} and {at.query} are both in chunk {of_key} {chunks}"
        else:
            reason = f"{at.key} is in chunk {of_key} and {at.query} in chunk {of_query} {chunks}"
    else:
        reason = f"{rule!r} {shows} {at.key} for {at.query}"
    return attends, [reason]


def _bit(bits: torch.Tensor, at: _Element) -> bool:
    index = []
    for argument, value, size in zip("bhqk", (at.b, at.h, at.q, at.k), bits.shape, strict=True):
        if argument in "bh" and size == 1:
            value = 0
        _check_inside(argument, value, size, "attends of bits")
        index.append(value)
    return bool(_read(bits, *index))


def _row(table: torch.Tensor, source: Source, at: _Element) -> int:
    """Which row of a table serves the batch row."""
    rows = table.shape[0]
    if rows == 1 and not source.is_upstream:
        return 0
    _check_inside("b", at.b, rows, f"{source.argument} of {source.function}")
    return at.b


def _look_up(
    table: torch.Tensor, source: Source, at: _Element, arguments: str
) -> tuple[list[Any], list[str]]:
    """What a table holds at the positions of the arguments, and who is outside of it."""
    row = (_row(table, source, at),) if table.dim() == 2 else ()
    length, name = table.shape[-1], f"{source.argument} of {source.function}"
    values: list[Any] = []
    outside: list[str] = []
    for argument in arguments:
        position, who = (at.q_at, at.query) if argument == "q" else (at.k_at, at.key)
        if at.may_be_outside and not 0 <= position < length:
            outside.append(f"{who} is outside the {name}, of length {length}")
            values.append(0)
            continue
        from_end = source.is_upstream and -length <= position < 0
        if not from_end:
            _check_inside(argument, position, length, name)
        values.append(_read(table, *row, position))
    return values, outside


def _check_inside(argument: str, value: int, size: int, name: str) -> None:
    if not 0 <= value < size:
        raise IndexError(
            f"explain: expected {argument} to be inside the {name}, of size {size}, "
            f"but it is at {value}"
        )
