"""attn_mask.testing: leaks are found, masks are recorded and compared."""

import attn_mask
import pytest
import torch
import torch.nn.functional as F
from attn_mask import testing
from models import RELEASE, make, tokens, transformers
from torch import nn

of_transformers = pytest.mark.applies(RELEASE >= (5, 14))
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 7, 7, 7, -1]])
TOKENS = tokens(2, 9)


class Attends(nn.Module):
    """A layer of attention over embeddings, by whatever mask it has."""

    def __init__(self, mask=None, size=8, words=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, size)
        self.mask = mask
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, inputs_embeds=None, **given):
        self.calls += 1
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], self.mask)
        return self.dropout(y[:, 0])


def keeps_apart(ids):
    return attn_mask.boolean(attn_mask.documents(ids), *ids.shape, ids.shape[1])


BATCH = {"input_ids": TOKENS % 16}


def test_no_leak():
    model = Attends(keeps_apart(IDS)).train()
    testing.assert_no_leak(model, BATCH, document_ids=IDS)
    assert (
        model.calls == 1 + len(set(IDS[1].tolist())) and model.training and model.dropout.training
    )
    embeds = {"inputs_embeds": torch.randn(2, 9, 8)}
    testing.assert_no_leak(model, embeds, document_ids=IDS)


@pytest.mark.parametrize("inputs", ["input_ids", "inputs_embeds"])
def test_a_leak_is_named(inputs):
    """Tokens of document 7 see one of document 3, in the second row only."""
    mask = keeps_apart(IDS)
    mask[1, 0, 6, 2] = True
    model = Attends(mask)
    batch = BATCH if inputs == "input_ids" else {"inputs_embeds": torch.randn(2, 9, 8)}
    with pytest.raises(
        AssertionError,
        match=r"assert_no_leak: row 1: other tokens in document 3 change document 7, first at "
        r"token 6, by up to \d\S*, which is more than atol 0.0001",
    ):
        testing.assert_no_leak(model, batch, document_ids=IDS)
    testing.assert_no_leak(model, batch, document_ids=IDS, atol=100.0)


def test_a_leak_from_a_later_document_and_of_nan():
    mask = keeps_apart(IDS[:1])
    mask[0, 0, 1, 8] = True
    with pytest.raises(
        AssertionError, match="tokens in document 2 change document 0, first at token 1"
    ):
        testing.assert_no_leak(
            Attends(mask), {"input_ids": BATCH["input_ids"][:1]}, document_ids=IDS[:1]
        )

    class Spoils(Attends):
        def forward(self, input_ids):
            y = super().forward(input_ids)
            return y if (input_ids == BATCH["input_ids"]).all() else torch.full_like(y, torch.nan)

    with pytest.raises(AssertionError, match="by up to nan"):
        testing.assert_no_leak(Spoils(keeps_apart(IDS)), BATCH, document_ids=IDS)


def test_where_documents_come_from():
    """cu_seqlens, and positions that start again; padding is left out."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    model = Attends(keeps_apart(ids))
    cu_seqlens = torch.tensor([0, 3, 7, 9])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    testing.assert_no_leak(model, BATCH, cu_seqlens=cu_seqlens)
    testing.assert_no_leak(model, {**BATCH, "position_ids": positions})
    model.mask = model.mask.clone()
    model.mask[:, :, 8, 2] = True
    for given, more in (({}, {"position_ids": positions}), ({"cu_seqlens": cu_seqlens}, {})):
        with pytest.raises(AssertionError, match=r"row 0: .* document 0 change document 2"):
            testing.assert_no_leak(model, {**BATCH, **more}, **given)
    padding = torch.ones(2, 9)
    padding[:, 8] = 0
    testing.assert_no_leak(model, {**BATCH, "attention_mask": padding}, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("batch", "given", "error", "match"),
    [
        (BATCH, {}, ValueError, "expected document_ids, cu_seqlens or position_ids in batch"),
        ([1], {}, TypeError, "assert_no_leak: expected batch to be a mapping .* but got list"),
        ({}, {}, ValueError, 'assert_no_leak: expected batch to hold "input_ids"'),
        (BATCH, {"document_ids": IDS, "cu_seqlens": IDS[0]}, ValueError, "but got both"),
        (BATCH, {"document_ids": IDS[:, 1:]}, ValueError, r"document_ids to be \[2, 9\]"),
        (BATCH, {"document_ids": [0]}, TypeError, "document_ids to be a tensor, but got list"),
        (
            BATCH,
            {"document_ids": IDS.float()},
            TypeError,
            "document_ids to be integers, but got",
        ),
        (BATCH, {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens to rise from 0 to"),
        (BATCH, {"cu_seqlens": torch.tensor([], dtype=int)}, ValueError, "cu_seqlens to rise from"),
        (BATCH, {"document_ids": IDS, "atol": "1"}, TypeError, "atol to be a number, but got str"),
        (
            {**BATCH, "attention_mask": torch.ones(2, 8)},
            {"document_ids": IDS},
            ValueError,
            r'expected batch\["attention_mask"\] to be \[2, 9 or more\], but got \[2, 8\]',
        ),
        (
            {"input_ids": TOKENS[:0]},
            {"document_ids": IDS[:0]},
            ValueError,
            r'expected batch\["input_ids"\] to be .* of one token or more, but got \[0, 9\]',
        ),
    ],
)
def test_bad_input(batch, given, error, match):
    with pytest.raises(error, match=match):
        testing.assert_no_leak(Attends(keeps_apart(IDS)), batch, **given)


def test_models_that_can_not_be_checked():
    class Silent(Attends):
        def forward(self, input_ids):
            return torch.zeros(2, 9, 3)

    class Classifies(Attends):
        def forward(self, input_ids):
            return torch.zeros(2, 3)

    with pytest.raises(ValueError, match="expected model to give something else for other tokens"):
        testing.assert_no_leak(Silent(), BATCH, document_ids=IDS)
    with pytest.raises(ValueError, match=r"something for each token, but got \[2, 3\]"):
        testing.assert_no_leak(Classifies(), BATCH, document_ids=IDS)


def test_masks_are_recorded():
    mask = keeps_apart(IDS)
    (recorded,) = testing.record_masks(Attends(mask), BATCH)
    assert recorded == ("", "scaled_dot_product_attention", mask)
    assert recorded.mask is mask
    with pytest.raises(TypeError, match="record_masks: expected batch to be a mapping"):
        testing.record_masks(Attends(), TOKENS)


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.functional.relu])
def test_what_is_no_module(model):
    text = f"expected model to be a torch.nn.Module, but got {type(model).__name__}$"
    for function in (testing.record_masks, testing.assert_same_masks):
        with pytest.raises(TypeError, match=f"^{function.__name__}: {text}"):
            function(model, {})
    with pytest.raises(TypeError, match=f"^assert_no_leak: {text}"):
        testing.assert_no_leak(model, BATCH, document_ids=IDS)


@of_transformers
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_layers(implementation):
    """Each layer's own, in its order; a cache in the batch is left as it was."""
    model = make("Gemma 3 text", implementation)
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if RELEASE >= (5, 24) else "past_key_values"
    recorded = testing.record_masks(model, {"input_ids": TOKENS, name: cache})
    assert cache.get_seq_length() == 0
    assert [entry.layer for entry in recorded] == [f"model.layers.{i}.self_attn" for i in range(2)]
    attention = f"{implementation} attention of Gemma3Attention"
    assert {entry.attention for entry in recorded} == {attention}
    rules = [attn_mask.causal() & attn_mask.sliding_window(4), attn_mask.causal()]
    for (_, _, mask), rule in zip(recorded, rules, strict=True):
        want = attn_mask.boolean(rule, 1, 9, 9)
        if mask is None:  # is_causal says it
            assert implementation == "sdpa" and rule is rules[1]
        else:
            assert torch.equal(mask[:1] if implementation == "sdpa" else mask[:1] == 0, want)


@of_transformers
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
def test_flex_masks_are_recorded_and_compared(monkeypatch):
    """Those are BlockMasks; attention itself is left out, since it would have to be compiled."""
    model = make("Llama", "flex_attention")
    functions = transformers.AttentionInterface._global_mapping

    def attend(module, query, key, value, attention_mask, **kwargs):
        return query.transpose(1, 2), None

    monkeypatch.setitem(functions, "flex_attention", attend)
    testing.assert_same_masks(model, {"input_ids": TOKENS})
    recorded = testing.record_masks(model, {"input_ids": TOKENS})
    assert [type(entry.mask).__name__ for entry in recorded] == ["BlockMask"] * 2


@of_transformers
def test_same_masks():
    for implementation in ("eager", "sdpa"):
        testing.assert_same_masks(make("Mistral", implementation), {"input_ids": TOKENS})
    with (
        attn_mask.installed(),
        pytest.raises(ValueError, match=r"attn_mask.install\(\) to be off"),
    ):
        testing.assert_same_masks(make("Mistral", "sdpa"), {"input_ids": TOKENS})
    with pytest.raises(ValueError, match="expected model to call attention that is seen"):
        testing.assert_same_masks(nn.Identity(), {"input": TOKENS})


@pytest.mark.parametrize(
    ("theirs", "ours", "match"),
    [
        (
            [None],
            [torch.ones(2, 1, 9, 9)],
            r"gets a mask \[2, 1, 9, 9\] of float32 .* no mask without",
        ),
        ([torch.ones(2, 1, 9, 9)], [None], "gets no mask with install"),
        (
            [torch.ones(9, 9)],
            [torch.ones(9, 9).bool()],
            r"\[9, 9\] of bool with install.* of float32",
        ),
        ([torch.eye(9).bool()], [torch.ones(9, 9).bool()], r"gets True at mask\[0, 1\] .* False"),
        ([None, None], [None], r"1 calls of attention with install\(\), but 2 without"),
    ],
)
@of_transformers
def test_other_masks_are_named(theirs, ours, match):
    class Other(nn.Module):
        def forward(self, x):
            for mask in ours if attn_mask.is_installed() else theirs:
                F.scaled_dot_product_attention(x, x, x, mask)

    with pytest.raises(AssertionError, match=match):
        testing.assert_same_masks(Other(), {"x": torch.zeros(2, 1, 9, 4)})


@of_transformers
def test_the_observer_ends_with_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    before = F.scaled_dot_product_attention, transformers.AttentionInterface.get_interface
    with pytest.raises(ZeroDivisionError):
        testing.record_masks(Fails(), {"x": TOKENS})
    assert before == (F.scaled_dot_product_attention, transformers.AttentionInterface.get_interface)
