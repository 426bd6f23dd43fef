"""The Python layer under torch.compile and torch.export: one graph, any length, never a skip."""

import pytest
import torch
from attn_mask import modeling_attn_mask_utils as ours
from masks import assert_same_mask

Converter = ours.AttentionMaskConverter
HALF = torch.float16

# f(mask [b, kv], queries [b, q, d]); what each returns in eager code for masks with padding is what
# it has to return while traced as well.
CALLS = {
    "to_causal_4d": lambda mask, queries: Converter(True).to_causal_4d(
        mask.shape[0], queries.shape[1], mask.shape[1], queries.dtype, queries.device
    ),
    "to_causal_4d window": lambda mask, queries: Converter(True, 3).to_causal_4d(
        mask.shape[0], queries.shape[1], mask.shape[1], HALF
    ),
    "to_4d": lambda mask, queries: Converter(True).to_4d(
        mask, queries.shape[1], queries.dtype, mask.shape[1]
    ),
    "to_4d window": lambda mask, queries: Converter(True, 3).to_4d(
        mask, queries.shape[1], HALF, key_value_length=mask.shape[1]
    ),
    "to_4d bidirectional": lambda mask, queries: Converter(False).to_4d(
        mask, queries.shape[1], queries.dtype
    ),
    "_make_causal_mask": lambda mask, queries: Converter._make_causal_mask(
        queries.shape[:2], HALF, mask.device, mask.shape[1] - queries.shape[1], 3
    ),
    "_expand_mask": lambda mask, queries: Converter._expand_mask(mask, HALF, queries.shape[1]),
    "_expand_mask square": lambda mask, queries: Converter._expand_mask(mask, HALF),
    "_unmask_unattended": lambda mask, queries: Converter._unmask_unattended(
        Converter(True).to_4d(mask, queries.shape[1], queries.dtype, mask.shape[1]),
        torch.finfo(queries.dtype).min,
    ),
    "_prepare_4d_causal_attention_mask": lambda mask, queries: (
        ours._prepare_4d_causal_attention_mask(
            mask, queries.shape[:2], queries, mask.shape[1] - queries.shape[1]
        )
    ),
    "_prepare_4d_causal_attention_mask window": lambda mask, queries: (
        ours._prepare_4d_causal_attention_mask(
            mask, queries.shape[:2], queries, mask.shape[1] - queries.shape[1], 3
        )
    ),
    "_prepare_4d_causal_attention_mask_for_sdpa": lambda mask, queries: (
        ours._prepare_4d_causal_attention_mask_for_sdpa(
            mask, queries.shape[:2], queries, mask.shape[1] - queries.shape[1]
        )
    ),
    "_prepare_4d_causal_attention_mask_for_sdpa window": lambda mask, queries: (
        ours._prepare_4d_causal_attention_mask_for_sdpa(
            mask, queries.shape[:2], queries, mask.shape[1] - queries.shape[1], 3
        )
    ),
    "_prepare_4d_attention_mask": lambda mask, queries: ours._prepare_4d_attention_mask(
        mask, queries.dtype, queries.shape[1]
    ),
    "_prepare_4d_attention_mask_for_sdpa": lambda mask, queries: (
        ours._prepare_4d_attention_mask_for_sdpa(mask, queries.dtype, queries.shape[1])
    ),
    "_create_4d_causal_attention_mask": lambda mask, queries: ours._create_4d_causal_attention_mask(
        queries.shape[:2], HALF, mask.device, mask.shape[1] - queries.shape[1]
    ),
}

every_call = pytest.mark.parametrize("name", CALLS)


def inputs(batch_size, q_length, kv_length):
    """Padding at the left of every row, so that nothing can be skipped."""
    mask = torch.ones(batch_size, kv_length, dtype=torch.int64)
    mask[:, 0] = 0
    return mask, torch.zeros(batch_size, q_length, 64)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_call
def test_one_graph_for_every_length(name):
    """After the first call nothing is compiled again, whatever sizes come."""
    call = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*inputs(2, 4, 7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((2, 5, 8), (3, 6, 11), (4, 9, 10), (2, 3, 30)):
            assert_same_mask(compiled(*inputs(*sizes)), call(*inputs(*sizes)))


@every_call
def test_one_graph_for_every_prompt(name):
    """The same without a cache, where there are as many queries as keys."""
    call = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*inputs(2, 6, 6))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((2, 7, 7), (3, 12, 12)):
            assert_same_mask(compiled(*inputs(*sizes)), call(*inputs(*sizes)))


MARKS = {"dynamic": torch._dynamo.mark_dynamic, "unbacked": torch._dynamo.decorators.mark_unbacked}


@pytest.mark.parametrize("mark", MARKS)
@every_call
def test_marked_sizes(name, mark):
    """One graph, also where sizes are not known before it runs: then a mask is always written."""
    call = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    given = inputs(2, 4, 7)
    for tensor in given:
        MARKS[mark](tensor, 0)
        MARKS[mark](tensor, 1)
    assert_same_mask(compiled(*given), call(*given))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((3, 5, 9), (2, 6, 6)):
            assert_same_mask(compiled(*inputs(*sizes)), call(*inputs(*sizes)))
        if mark == "unbacked":  # a length of 1, too, which is no graph of its own
            got = compiled(*inputs(1, 1, 6))
            want = call(*inputs(1, 1, 6))
            assert got.shape == (1, 1, 6 if name == "_expand_mask square" else 1, 6)
            assert want is None or torch.equal(got, want)


@pytest.mark.parametrize("name", ["to_4d window", "_prepare_4d_causal_attention_mask_for_sdpa"])
def test_inductor(name):
    call = CALLS[name]
    compiled = torch.compile(
        lambda mask, queries: call(mask, queries) * 0.5, fullgraph=True, dynamic=True
    )
    for sizes in ((2, 4, 7), (3, 6, 11)):
        assert_same_mask(compiled(*inputs(*sizes)), call(*inputs(*sizes)) * 0.5)


@pytest.mark.parametrize("attention_mask", ["ones", "none"])
@pytest.mark.parametrize("q_length", [1, 4])
def test_compiled_code_keeps_a_mask_that_eager_code_skips(attention_mask, q_length):
    def prepare(mask, queries):
        return ours._prepare_4d_causal_attention_mask_for_sdpa(
            mask, queries.shape[:2], queries, past, 9
        )

    past = 0 if q_length > 1 else 3
    queries = torch.zeros(2, q_length, 4)
    mask = torch.ones(2, q_length + past) if attention_mask == "ones" else None
    assert prepare(mask, queries) is None
    compiled = torch.compile(prepare, backend="aot_eager", fullgraph=True)
    want = Converter(True, 9).to_causal_4d(2, q_length, q_length + past, queries.dtype)
    assert_same_mask(compiled(mask, queries), want)


def test_compiled_bidirectional_code_keeps_a_mask_of_ones():
    compiled = torch.compile(
        CALLS["_prepare_4d_attention_mask_for_sdpa"], backend="aot_eager", fullgraph=True
    )
    mask, queries = torch.ones(2, 5), torch.zeros(2, 3, 4)
    assert CALLS["_prepare_4d_attention_mask_for_sdpa"](mask, queries) is None
    assert_same_mask(compiled(mask, queries), torch.zeros(2, 1, 3, 5))


def test_skip_decisions_are_constants_of_the_graph():
    def decide(mask, queries):
        ignore = Converter._ignore_causal_mask_sdpa
        return queries + 1, ignore(mask, queries, 0), ignore(None, queries, 0)

    compiled = torch.compile(decide, backend="aot_eager", fullgraph=True, dynamic=True)
    _, *decisions = compiled(torch.ones(2, 5), torch.zeros(2, 5, 4))
    assert decisions == [False, False]


def test_4d_masks_in_a_graph():
    """Eager attention inverts them, under sdpa they pass."""

    def prepare(mask, queries):
        sizes = queries.shape[:2], queries, mask.shape[3] - queries.shape[1]
        return (
            ours._prepare_4d_causal_attention_mask(mask, *sizes),
            ours._prepare_4d_causal_attention_mask_for_sdpa(mask, *sizes) + 1,
        )

    compiled = torch.compile(prepare, backend="aot_eager", fullgraph=True, dynamic=True)
    for q_length, kv_length in ((3, 5), (4, 9)):
        queries = torch.zeros(2, q_length, 4)
        mask = torch.zeros(2, 1, q_length, kv_length)
        mask[..., ::2] = 1
        got, want = compiled(mask, queries), prepare(mask, queries)
        for one, other in zip(got, want, strict=True):
            assert_same_mask(one, other)


def test_the_mask_of_a_compiled_attention():
    """What a model does with it: the result equals eager attention with the same mask."""

    def attend(mask, queries):
        additive = CALLS["_prepare_4d_causal_attention_mask_for_sdpa"](mask, queries)
        keys = torch.nn.functional.pad(queries, (0, 0, mask.shape[1] - queries.shape[1], 0))
        return torch.nn.functional.scaled_dot_product_attention(
            queries[:, None], keys[:, None], keys[:, None], attn_mask=additive
        )

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 4, 7), (3, 6, 11)):
        mask, queries = inputs(*sizes)
        queries = torch.randn(queries.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(compiled(mask, queries), attend(mask, queries))


def test_errors_keep_their_text():
    compiled = torch.compile(CALLS["to_4d"], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="key_value_length"):
        compiled(torch.ones(2, 3), torch.zeros(2, 5, 4))


class Exported(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.call = CALLS[name]

    def forward(self, mask, queries):
        return self.call(mask, queries)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("past", [0, 3])
@every_call
def test_export(name, past, strict):
    batch_size = torch.export.Dim("batch_size", min=2, max=64)
    q_length = torch.export.Dim("q_length", min=2, max=4096)
    kv_length = q_length + past if past else q_length
    shapes = {"mask": {0: batch_size, 1: kv_length}, "queries": {0: batch_size, 1: q_length}}
    program = torch.export.export(
        Exported(name), inputs(2, 5, 5 + past), dynamic_shapes=shapes, strict=strict
    )
    for sizes in ((2, 5, 5 + past), (3, 9, 9 + past)):
        assert_same_mask(program.module()(*inputs(*sizes)), CALLS[name](*inputs(*sizes)))
