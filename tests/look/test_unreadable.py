"""Tensors whose values can't be read, in each place where a tool for looking takes one."""

import re
import warnings

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules, testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

MASK = torch.ones(3, 3).tril()
IDS = torch.tensor([[0, 0, 1]])
EMBEDS = torch.zeros(1, 3, 2)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def nested(layout):
    return lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=layout)


VALUES = "to have values, but got a"
STRIDED = "to be a strided tensor, but got"
KINDS = {
    "meta": (lambda tensor: tensor.to("meta"), ValueError, f"{VALUES} meta tensor"),
    "fake": (FakeTensorMode().from_tensor, ValueError, f"{VALUES} FakeTensor"),
    "sparse": (torch.Tensor.to_sparse, TypeError, f"{STRIDED} layout torch.sparse_coo"),
    "csr": (torch.Tensor.to_sparse_csr, TypeError, f"{STRIDED} layout torch.sparse_csr"),
    "nested": (nested(torch.strided), TypeError, f"{STRIDED} a nested one"),
    "jagged": (nested(torch.jagged), TypeError, f"{STRIDED} a nested one"),
    "quantized": (quantized, TypeError, f"{STRIDED} a quantized one, of torch.quint8"),
}


def assert_no_leak(batch, **given):
    testing.assert_no_leak(nn.Identity(), {"inputs_embeds": EMBEDS, **batch}, **given)


# What a text begins with, an example that is readable, and the call.
PLACES = {
    "show: expected mask_or_rule": (MASK, attn_mask.show),
    "plot: expected mask_or_rule": (MASK, lambda mask: plotted(mask)),
    "validate_mask_properties: expected mask": (
        MASK,
        lambda mask: attn_mask.validate_mask_properties(mask, "causal"),
    ),
    "validate_mask_properties: expected attention_mask": (
        IDS,
        lambda shown: attn_mask.validate_mask_properties(MASK, "padding", attention_mask=shown),
    ),
    "validate_mask_properties: expected document_ids": (
        IDS,
        lambda ids: attn_mask.validate_mask_properties(MASK, "documents", document_ids=ids),
    ),
    "validate_mask_properties: expected prefix_length": (
        IDS[0],
        lambda lengths: attn_mask.validate_mask_properties(MASK, "prefix", prefix_length=lengths),
    ),
    "tensor_to_mask_visual: expected original_tensor": (MASK, masking_utils.tensor_to_mask_visual),
    'assert_no_leak: expected batch["inputs_embeds"]': (
        EMBEDS,
        lambda embeds: assert_no_leak({"inputs_embeds": embeds}, document_ids=IDS),
    ),
    'assert_no_leak: expected batch["attention_mask"]': (
        IDS,
        lambda shown: assert_no_leak({"attention_mask": shown}, document_ids=IDS),
    ),
    'assert_no_leak: expected batch["position_ids"]': (
        IDS,
        lambda positions: assert_no_leak({"position_ids": positions}),
    ),
    "assert_no_leak: expected document_ids": (
        IDS,
        lambda ids: assert_no_leak({}, document_ids=ids),
    ),
    "assert_no_leak: expected cu_seqlens": (
        IDS[0],
        lambda lengths: assert_no_leak({}, cu_seqlens=lengths),
    ),
}


def plotted(mask):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    return attn_mask.plot(mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_each_kind_is_named(place, kind):
    example, call = PLACES[place]
    make, error, text = KINDS[kind]
    if kind == "csr" and example.dim() == 1:
        example = example[None]
    with warnings.catch_warnings():  # by torch, of what may change
        warnings.simplefilter("ignore")
        given = make(example)
    with pytest.raises(error, match=f"^{re.escape(place)} {re.escape(text)}"):
        call(given)


META = {
    "bits": rules.bits(torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")),
    "documents": rules.causal() & rules.documents(IDS.to("meta")),
    "blocks": rules.blockwise(IDS.to("meta")),
    "padding": rules.padding(IDS.to("meta")),
    "chunks": rules.chunked(2, torch.zeros(1, dtype=torch.int64, device="meta")),
    "positions": rules.reindex(rules.causal(), IDS.to("meta")),
}


@pytest.mark.parametrize("name", META)
def test_rules_with_tables_on_meta(name):
    rule, text = META[name], f"{VALUES} meta tensor$"
    with pytest.raises(ValueError, match=f"^explain: expected rule {text}"):
        attn_mask.explain(rule, q=1, k=1)
    with pytest.raises(ValueError, match=f"^show: expected mask_or_rule {text}"):
        attn_mask.show(rule, 3)
    assert "ValueError: show: expected mask_or_rule to have values" in rule._repr_html_()


def test_offsets_and_results_on_meta():
    far = torch.tensor(1, device="meta")
    with pytest.raises(ValueError, match=f"^explain: expected rule {VALUES} meta tensor$"):
        attn_mask.explain(rules.shift(rules.causal(), far, 0), q=1, k=1)
    with pytest.raises(ValueError, match=f"^explain: expected rule {VALUES} meta tensor$"):
        attn_mask.explain(lambda b, h, q, k: far > 0, q=1, k=1)


def test_block_masks_on_meta():
    mask = attn_mask.create_block_mask(rules.causal(), 1, 1, 4, 4, "meta")
    with pytest.raises(ValueError, match=f"^show: expected mask_or_rule {VALUES} meta tensor$"):
        attn_mask.show(mask)


def test_rules_without_tables_where_meta_is_the_default_device():
    want = attn_mask.show(rules.causal(), 4)
    with torch.device("meta"):
        assert attn_mask.show(rules.causal(), 4) == want
