"""attn_mask.profile: which masks were made in a block, and what they cost."""

import threading

import attn_mask
import pytest
import torch
from attn_mask import rules
from models import MODELS, RELEASE, inputs, make

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calls_and_bytes_and_the_table():
    query = torch.zeros(2, 2, 8, 4)
    with attn_mask.profile() as p:
        attn_mask.boolean(rules.causal(), 3, 8, 16)  # one row, expanded
        attn_mask.additive(rules.causal(), 1, 8, 16, dtype=torch.float64)
        attn_mask.additive(rules.causal() & rules.sliding_window(2), 1, 4, 4)
        attn_mask.sdpa_arguments(query, query)  # is_causal does
        attn_mask.sdpa_arguments(query, query, rules.causal() & rules.sliding_window(3))
        shown = torch.ones(2, 8, dtype=torch.bool)
        given = attn_mask.masking_utils.flash_attention_mask(2, 8, 8, attention_mask=shown)
        mask = attn_mask.create_block_mask(rules.causal(), None, None, 256, 256)
    attn_mask.boolean(rules.causal(), 1, 4, 4)  # after the block
    of_blocks = sum(part.nbytes for part in mask.as_tuple() if isinstance(part, torch.Tensor))
    got = {name: (cost.calls, cost.skipped, cost.bytes) for name, cost in p.costs.items()}
    assert got == {
        "boolean": (1, 0, 8 * 16),
        "additive": (2, 0, 8 * 16 * 8 + 4 * 4 * 4),
        "sdpa_arguments": (2, 1, 8 * 8),
        "flash_attention_mask": (1, int(given is None), 0),
        "create_block_mask": (1, 0, of_blocks),
    }
    assert p.total.calls == 7 and 0 < p.total.seconds < p.block_seconds
    assert p.share == p.total.seconds / p.block_seconds
    lines = str(p).splitlines()
    assert lines[0].split() == ["calls", "skipped", "time", "in", "masks", "share", "bytes"]
    assert lines[2].split()[:3] == ["additive", "2", "0"] and lines[2].split()[-1] == "1,088"
    assert [line.split()[0] for line in lines[1:]] == [*p.costs, "all", "the"]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_blocks_nest_and_end_with_exceptions_and_see_their_thread():
    with pytest.raises(KeyError), attn_mask.profile() as outer:
        with attn_mask.profile() as inner:
            attn_mask.boolean(rules.causal(), 1, 4, 4)
            with pytest.raises(ValueError, match="boolean"):
                attn_mask.boolean(rules.causal(), -1, 4, 4)
        other = threading.Thread(target=attn_mask.additive, args=(rules.causal(), 1, 4, 4))
        other.start()
        other.join()
        attn_mask.additive(rules.causal(), 1, 4, 4)
        raise KeyError
    attn_mask.additive(rules.causal(), 1, 4, 4)
    assert {name: cost.calls for name, cost in inner.costs.items()} == {"boolean": 1}
    assert {name: cost.calls for name, cost in outer.costs.items()} == {"boolean": 1, "additive": 1}
    assert inner.block_seconds < outer.block_seconds == outer.block_seconds


def test_what_is_compiled_is_not_seen():
    def make_mask(n: int):
        return attn_mask.additive(rules.causal(), 1, n, n)

    with attn_mask.profile() as p:
        mask = torch.compile(make_mask, backend="eager", fullgraph=True)(4)
    assert p.costs == {} and mask.shape == (1, 1, 4, 4)


@pytest.mark.applies(RELEASE >= (4, 53))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model():
    model = make("Llama", "sdpa")
    with torch.no_grad():
        with attn_mask.profile() as upstream:
            model(**inputs(MODELS["Llama"], "left"))
        with attn_mask.installed(), attn_mask.profile() as ours:
            model(**inputs(MODELS["Llama"], "left"))
            model(**inputs(MODELS["Llama"], "none"))
    assert upstream.costs == {}
    assert (ours.total.calls, ours.total.skipped) == (2, 1)
    assert ours.total.bytes == 2 * 9 * 9 and 0 < ours.share < 1


def test_masks_under_transforms_count():
    """Their memory is that of what torch.vmap and torch.func.grad wrap."""
    ids = torch.zeros(5, 1, 3, dtype=torch.int64)
    with attn_mask.profile() as p:
        mask = torch.vmap(lambda of: attn_mask.boolean(attn_mask.documents(of), 1, 3, 3))(ids)
    assert mask.shape == (5, 1, 1, 3, 3) and mask.all()
    assert (p.total.calls, p.total.bytes) == (1, 45)
    with attn_mask.profile() as p:
        torch.func.grad(
            lambda bias: attn_mask.additive(attn_mask.causal(), 1, 2, 2, bias=bias).sum()
        )(torch.zeros(1, 1, 2, 2))
    assert (p.total.calls, p.total.bytes) == (1, 16)
