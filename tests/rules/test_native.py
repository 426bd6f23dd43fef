"""What has to be called for each element can be told, and is named once in the log."""

import logging

import attn_mask
import pytest
import torch
from attn_mask import boolean, create_block_mask, rules
from attn_mask._core import log_once
from torch.nn.attention import flex_attention

TENSORS = [name for name in flex_attention.BlockMask._TENSOR_ATTRS if not name.startswith("dq")]
IDS = torch.tensor([[0, 0, 1, 1]])


def of_user(b, h, q, kv):
    return (q - kv) % 3 != 1


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_named", set())
    caplog.set_level(logging.WARNING, logger="attn_mask")
    return caplog


@pytest.mark.parametrize(
    "rule",
    [
        rules.causal() & rules.sliding_window(3) | rules.documents(IDS),
        rules.reindex(rules.causal(), IDS),
        rules.shift(rules.padding(IDS), -1, 0) & rules.window(2, 1),
        rules.function(rules.causal()),
        rules.bits(torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        attn_mask.masking_utils.sliding_window_causal_mask_function(3),
    ],
    ids=repr,
)
def test_native(rule, warned):
    assert rule.is_native
    boolean(rule, 1, 4, 4)
    create_block_mask(rule, 1, 1, 4, 4, "cpu")
    assert warned.messages == []


@pytest.mark.parametrize(
    "rule",
    [
        rules.function(of_user),
        rules.causal() & of_user,
        rules.reindex(of_user, IDS),
        rules.documents(IDS) | rules.shift(rules.causal() & of_user, 1, 1),
    ],
    ids=repr,
)
def test_called(rule, warned):
    assert not rule.is_native
    for _ in range(2):
        boolean(rule, 1, 4, 4)
        create_block_mask(rule, 1, 1, 4, 4, "cpu")
    (message,) = warned.messages
    assert message.startswith("boolean: calls a mask function that is no rule, of_user, for each")
    assert message in attn_mask.status().warnings


def test_ids_that_no_rule_is_made_of():
    of_ids = attn_mask.masking_utils.packed_sequence_mask_function
    assert of_ids(IDS).is_native
    assert not of_ids(IDS.double()).is_native


def test_shift_by_a_tensor():
    assert not rules.shift(rules.causal(), torch.tensor(1), 0).is_native


def test_callables_of_create_functions_are_named(warned):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, attn_implementation="eager"
    )
    for _ in range(2):
        attn_mask.masking_utils.create_causal_mask(
            config, torch.zeros(1, 4, 8), None, None, or_mask_function=of_user
        )
    (message,) = warned.messages
    assert "no rule, of_user, for each element" in message


@pytest.mark.parametrize(
    ("mask_mod", "offset"), [(of_user, 0), (rules.causal() & of_user, 5)], ids=["alone", "tree"]
)
def test_compiled_by_torch(mask_mod, offset, warned, monkeypatch):
    torch_compile, compiled = torch.compile, []

    def compile_and_note(function):
        compiled.append(function)
        # What it is compiled with does not matter here, and takes long.
        return torch_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_and_note)
    arguments = mask_mod, 1, 2, 70, 90, "cpu", (16, 32)
    got = create_block_mask(*arguments, _compile=True, q_offset=offset)
    assert compiled == [flex_attention.create_block_mask]
    assert warned.messages == []
    want = create_block_mask(*arguments, q_offset=offset)
    for name in TENSORS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.mask_mod == want.mask_mod
    assert got.shape == want.shape
    # What torch's function has not, and what has nothing to be called.
    create_block_mask(*arguments, _compile=True, compact=True)
    create_block_mask(*arguments, _compile=True, separate_full_blocks=False)
    create_block_mask(mask_mod, 1, 2, 0, 90, "cpu", _compile=True)
    create_block_mask(rules.causal(), 1, 2, 70, 90, "cpu", _compile=True)
    assert len(compiled) == 1
