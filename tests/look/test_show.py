"""attn_mask.show: pictures are read back, element by element or by density."""

import re
import subprocess
import sys

import attn_mask
import numpy
import pytest
import torch
from attn_mask import rules, show
from hypothesis import assume, given, settings
from rule_reference import calls
from torch.nn.attention.flex_attention import create_block_mask

IDS = torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
PACKED = rules.documents(IDS) & rules.causal()


def read(picture, q_length):
    """The mask of a picture, from its half blocks or its colours."""
    rows = []
    for line in picture.splitlines():
        if "\033" in line:
            pairs = re.findall(r"38;5;(\d+);48;5;(\d+)m▀", line)
            halves = [[color != "236" for color in pair] for pair in pairs]
        else:
            halves = [[c in "█▀", c in "█▄"] for c in line]
        rows += zip(*halves, strict=True)
    assert not any(map(any, rows[q_length:]))
    return torch.tensor(rows[:q_length])


@given(call=calls(min_size=1, max_kv=20))
@settings(max_examples=60)
def test_pictures(call):
    assume(call.kv_length <= 72)
    try:
        mask = torch.ops.attn_mask.boolean(*call.args)
    except ValueError:
        assume(False)
    batch, head = mask.shape[0] - 1, mask.shape[1] - 1
    assume(mask.numel() > 0)
    want = mask[batch, head]
    for style in (None, "color"):
        picture = show(mask, batch=batch, head=head, style=style)
        assert torch.equal(read(picture, call.q_length), want)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert show(additive, batch=batch, head=head) == show(want)


@pytest.mark.parametrize("sizes", [(12, 12), (5, 9), (7, 3), (1, 1), (2, 12)])
@pytest.mark.parametrize("rule", [PACKED, rules.padding(IDS), rules.causal()], ids=repr)
def test_rules_are_shown_as_their_masks(rule, sizes):
    for batch in range(2):
        want = attn_mask.boolean(rule, 2, *sizes)[batch, 0]
        picture = rule.show(*sizes, batch=batch)
        assert picture == show(rule, *sizes, batch=batch) == show(want)
        assert torch.equal(read(picture, sizes[0]), want)


def test_a_picture():
    """Written down by hand."""
    rule = rules.causal() & rules.sliding_window(3)
    assert show(rule, 5, 6).splitlines() == ["█▄····", "▀██▄··", "··▀▀▀·"]


def test_it_prints_nothing_and_is_its_own_repr(capsys):
    picture = show(rules.causal(), 3)
    assert capsys.readouterr().out == ""
    assert isinstance(picture, str)
    assert repr(picture) == str(picture) == "█▄·\n▀▀▀"


MASK = attn_mask.boolean(PACKED, 2, 12, 12)


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK[:, 0],
        MASK[1, 0],
        MASK.long(),
        attn_mask.additive(PACKED, 2, 12, 12, dtype=torch.bfloat16),
        attn_mask.additive(PACKED, 2, 12, 12, masked_value=float("-inf")),
        torch.where(MASK, torch.linspace(-100, 50, 12), -10000.0),
        MASK.expand(-1, 3, -1, -1).mT.contiguous().mT.requires_grad_(False),
    ],
)
def test_dense_masks(mask):
    assert show(mask, batch=1) == show(rules.causal(), 12)
    assert show(mask, 12, 12, batch=1) == show(mask, batch=1)


def test_bits_and_functions_of_rows_and_heads():
    bits = torch.rand(2, 3, 6, 9) < 0.5
    assert show(rules.bits(bits), batch=1, head=2) == show(bits[1, 2])

    def of_head(b, h, q, k):
        return (q + k) % (h + b + 1) == 0

    for batch, head in ((0, 0), (2, 1), (1, 4)):
        q, k = torch.arange(7)[:, None], torch.arange(5)
        want = of_head(batch, head, q, k)
        assert torch.equal(read(show(of_head, 7, 5, batch=batch, head=head), 7), want)


@pytest.mark.parametrize("creates", [create_block_mask, attn_mask.create_block_mask])
def test_block_masks(creates):
    ids = torch.tensor([0] * 100 + [1] * 140).expand(2, -1)

    def packed(b, h, q, k):
        return (ids[b, q] == ids[b, k]) & (q >= k) & (h < 2)

    mask = creates(packed, 2, 3, 240, 240, device="cpu", BLOCK_SIZE=(64, 32))
    for head in range(3):
        assert show(mask, batch=1, head=head) == show(packed, 240, batch=1, head=head)
    small = creates(lambda b, h, q, k: q >= k, None, None, 12, 12, device="cpu")
    assert show(small) == show(rules.causal(), 12)
    with pytest.raises(IndexError, match=r"^show: expected head to be below 3, but got 3$"):
        show(mask, head=3)


def test_what_a_block_mask_leaves_out_is_not_shown():
    """Whatever its mask function says."""
    mask = create_block_mask(
        lambda b, h, q, k: q >= 0, None, None, 4, 4, device="cpu", BLOCK_SIZE=2
    )
    mask.full_kv_num_blocks[..., 1] = 1
    assert show(mask).splitlines() == ["████", "██··"]


def test_lengths_are_those_of_tables():
    assert show(PACKED) == show(PACKED, 12, 12)
    assert show(rules.padding(IDS) | rules.nothing()) == show(rules.padding(IDS), 12, 12)
    assert show(rules.reindex(rules.causal(), IDS[0])) == show(
        rules.reindex(rules.causal(), IDS[0]), 12
    )
    assert show(PACKED, 4) == show(PACKED, 4, 4)
    assert show(PACKED, kv_length=4) == show(PACKED, 12, 4)


def test_density():
    """Each cell is counted; only what is empty or full is shown as such."""
    mask = torch.zeros(100, 144, dtype=torch.bool)
    mask[:50, :72] = True
    mask[0, 0] = False
    mask[99, 143] = True
    mask[50:52, 72:108] = True
    *lines, caption = show(mask).splitlines()
    assert caption == "100 queries x 144 keys, a character is 5 x 3"
    assert {len(line) for line in lines} == {69}
    assert len(lines) == 24
    assert (lines[0][0], lines[0][1], lines[0][-1], lines[-1][-1]) == ("▓", "█", "·", "░")
    # Row 12 has the 4 queries from 50 on, half of which are visible in columns 72 to 107.
    assert lines[12][40] == "▒"
    counts = attn_mask._tools.view.view("show", mask, None, None, 0, 0).counts(
        [0, 50, 100], [0, 72, 144]
    )
    assert counts[0].tolist() == [[3599, 0], [0, 73]]
    assert counts[1].tolist() == [[3600] * 2] * 2


def test_density_of_rules_is_that_of_their_masks(monkeypatch):
    monkeypatch.setattr(attn_mask._tools.view, "_HELD", 1000)  # many strips
    bits = torch.rand(1, 2, 300, 150) < 0.1
    for rule in (
        rules.causal() & rules.sliding_window(99),
        rules.bits(bits) | rules.causal(),
        lambda b, h, q, k: (q * k) % 7 < 3,
    ):
        dense = attn_mask.boolean(rule, 1, 300, 150)
        assert show(rule, 300, 150) == show(dense)
        colored = show(rule, 300, 150, style="color")
        assert re.sub("\033[^m]*m", "", colored) == show(dense)


def test_tokens():
    assert show(rules.causal(), 3, tokens=["a", "long", "end\n"]).splitlines() == [
        "           le",
        "           on",
        "           nd",
        "          ag�",
        "   a long █▄·",
        "end�      ▀▀▀",
    ]
    keys_only = show(rules.causal(), 2, 3, tokens=("a", "b", "c")).splitlines()
    assert keys_only == ["abc", "█▄·"]
    wide = show(rules.causal(), 2, tokens=["猫", "a" * 20]).splitlines()
    assert wide == ["          猫 aaaaaaaaaaa… █▄"]


def test_colours_tell_documents_apart():
    picture = show(PACKED, style="color")
    colors = set(re.findall(r"38;5;(\d+)", picture))
    assert len(colors - {"236"}) == 2
    assert len(set(re.findall(r"38;5;(\d+)", show(PACKED, batch=1, style="color"))) - {"236"}) == 1
    assert all(line.endswith("\033[0m") for line in picture.splitlines())


def test_another_default_device():
    """Where rules have tensors, or masks are at hand, it does not matter."""
    blocks = attn_mask.create_block_mask(PACKED, 2, 1, 12, 12, device="cpu", BLOCK_SIZE=4)
    bits = rules.bits(torch.ones(1, 1, 100, 100, dtype=torch.bool).tril())
    for shown in (PACKED, MASK, blocks, bits):
        want = show(shown, style="color")
        with torch.device("meta"):
            assert show(shown, style="color") == want
    want = attn_mask.explain(PACKED, q=2, k=3)
    with torch.device("meta"):
        assert attn_mask.explain(PACKED, q=2, k=3) == want


def test_nothing_to_show():
    assert show(torch.ones(0, 5)) == show(torch.ones(5, 0)) == ""


@pytest.mark.parametrize(
    ("arguments", "how", "error", "text"),
    [
        ((rules.causal(),), {}, ValueError, "q_length to be given for a rule without tables"),
        ((torch.ones(3),), {}, ValueError, "mask_or_rule to be a mask [q_length, kv_length],"),
        ((torch.ones(1, 1, 1, 1, 1),), {}, ValueError, "mask_or_rule to be a mask [q_length, kv"),
        ((MASK, 11), {}, ValueError, "q_length to be that of the mask, 12, but got 11"),
        ((MASK, None, 13), {}, ValueError, "kv_length to be that of the mask, 12, but got 13"),
        ((MASK,), {"batch": 2}, IndexError, "batch to be below 2, but got 2"),
        ((MASK,), {"batch": -1}, IndexError, "batch to be 0 or more, but got -1"),
        ((PACKED,), {"batch": 2}, IndexError, "batch to be below 2, but got 2"),
        ((rules.bits(MASK.expand(2, 3, 12, 12)),), {"head": 3}, IndexError, "head to be below 3"),
        ((rules.causal(), -1), {}, ValueError, "q_length to be 0 or more, but got -1"),
        ((rules.causal(), 2.0), {}, TypeError, "q_length to be an int, but got float"),
        ((rules.causal(), True), {}, TypeError, "q_length to be an int, but got bool"),
        ((rules.causal(), 3), {"head": "0"}, TypeError, "head to be an int, but got str"),
        ((rules.causal(), 2**20), {}, ValueError, "at most 2^34 elements, but got 1048576 x 1048"),
        ((None, 3), {}, TypeError, "mask_or_rule to be a mask (a tensor or a BlockMask) or a rule"),
        ((rules.causal, 3), {}, TypeError, "mask_or_rule to be a mask function, but got causal"),
        (
            (MASK.to(torch.complex64),),
            {},
            TypeError,
            "mask_or_rule to be of bool, integers, ",
        ),
        (
            (MASK.to(torch.float8_e5m2),),
            {},
            TypeError,
            "mask_or_rule to be of bool, integers, ",
        ),
        ((MASK,), {"batch": numpy.array([1])}, TypeError, "batch to be an int, but got ndarray"),
        ((MASK,), {"batch": torch.tensor(1)}, TypeError, "batch to be an int, but got Tensor"),
        ((MASK[0, 0].float().to_sparse(),), {}, TypeError, "mask_or_rule to be a strided tensor"),
        ((MASK,), {"style": "blue"}, ValueError, "style to be None or \"color\", but got 'blue'"),
        ((MASK,), {"tokens": "abcdefghijkl"}, TypeError, "tokens to be a list of str, but got str"),
        ((MASK,), {"tokens": [1] * 12}, TypeError, "tokens to be of str, but got int"),
        ((MASK,), {"tokens": ["a"]}, ValueError, "tokens to have one for each of 12 keys, but go"),
    ],
)
def test_wrong_arguments(arguments, how, error, text):
    with pytest.raises(error, match=f"^show: expected {re.escape(text)}"):
        show(*arguments, **how)


def test_tables_that_are_too_short():
    with pytest.raises(ValueError, match="documents: expected ids to be of length 13 or longer"):
        show(PACKED, 13)


@pytest.mark.parametrize(
    ("rule", "length"), [(PACKED, 12), (rules.causal(), 16), (rules.window(30, 2), 62)], ids=repr
)
def test_notebooks(rule, length):
    text = rule._repr_html_()
    name, picture = re.fullmatch(r"(?s)<code>(.*)</code><pre [^>]*>(.*)</pre>", text).groups()
    assert name.replace("&amp;", "&") == repr(rule)
    assert picture == rule.show(length)


def test_notebooks_show_what_they_can():
    odd = rules.function(lambda b, h, q, k: q + k)._repr_html_()
    assert "&lt;lambda&gt;" in odd and "<lambda>" not in odd
    assert "TypeError: show: expected mask_function to return a bool tensor" in odd
    long = rules.documents(torch.zeros(9000, dtype=torch.int64))._repr_html_()
    assert "8192 queries x 8192 keys" in long
    assert "8192 queries" in rules.sliding_window(2**40)._repr_html_()


def test_import_loads_none_of_it():
    code = (
        "import sys, attn_mask\n"
        "assert not {'_view', '_show', '_plot', '_explain'} & "
        "{name.removeprefix('attn_mask.') for name in sys.modules}\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert {'show', 'plot', 'explain'} <= set(dir(attn_mask)) & set(attn_mask.__all__)\n"
        "print(attn_mask.causal().show(2))\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "█▄\n"), done.stderr
