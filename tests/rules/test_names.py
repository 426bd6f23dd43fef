"""Names of padding: what it is called, and no part of what it is."""

import copy
import pickle

import attn_mask
import pytest
import torch
from attn_mask import rules

MASK = torch.tensor([[0, 1, 1, 0]])
PROMPT = rules.padding(MASK, name="prompt")


def test_explain():
    assert attn_mask.explain(PROMPT, q=2, k=1) == "attends: prompt shows key 1"
    assert attn_mask.explain(PROMPT, q=2, k=3) == "does not attend: prompt masks key 3"
    rule = rules.causal() | PROMPT
    assert attn_mask.explain(rule, q=0, k=3).endswith("; prompt masks key 3")
    moved = rules.shift(PROMPT, 0, 1)
    assert attn_mask.explain(moved, q=0, k=1) == "attends: prompt shows key 1 (position 2)"
    plain = rules.padding(MASK)
    assert attn_mask.explain(plain, q=2, k=3) == "does not attend: key 3 is padding"


def test_repr():
    assert repr(PROMPT) == "padding(int64[1, 4], name='prompt')"
    assert repr(rules.padding(MASK)) == "padding(int64[1, 4])"
    assert repr(rules.causal() & PROMPT) == "causal() & padding(int64[1, 4], name='prompt')"


def test_pictures():
    """A notebook shows the repr above the picture, which is the same."""
    assert "name=&#x27;prompt&#x27;" in PROMPT._repr_html_()
    assert attn_mask.show(PROMPT, 2) == attn_mask.show(rules.padding(MASK), 2)


def test_equality():
    others = (
        rules.padding(MASK),
        rules.padding(MASK, name="image"),
        rules.padding(MASK, name="prompt"),
    )
    for other in others:
        assert other == PROMPT
        assert hash(other) == hash(PROMPT)
        assert rules.causal() & other == rules.causal() & PROMPT
    assert rules.padding(MASK.clone(), name="prompt") != PROMPT


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda rule: pickle.loads(pickle.dumps(rule)),
        lambda rule: rule.to("meta"),
    ],
    ids=["copy", "deepcopy", "pickle", "to"],
)
def test_copies(copied):
    assert copied(PROMPT).name == "prompt"
    assert copied(rules.causal() & PROMPT).rules[1].name == "prompt"


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda rule: attn_mask.boolean(rule & rules.causal(), 1, 4, 4),
        backend="eager",
        fullgraph=True,
    )
    wanted = (MASK != 0).expand(4, 4) & torch.ones(4, 4, dtype=torch.bool).tril()
    for rule in (PROMPT, rules.padding(MASK, name="image"), rules.padding(MASK)):
        assert torch.equal(compiled(rule)[0, 0], wanted)


def test_what_is_no_name():
    with pytest.raises(TypeError, match="padding: expected name to be a str, but got int"):
        rules.padding(MASK, name=3)
