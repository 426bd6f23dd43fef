"""Offsets, sizes and devices that can't be: errors name the function and the argument."""

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, modeling_attn_mask_utils, rules

QUERY = torch.zeros(1, 2, 4, 8)
MASK = torch.ones(1, 4)


def function(b, h, q, k):
    return k <= q


RULES = {
    "rule": rules.causal(),
    "table": rules.causal() & rules.documents(torch.zeros(1, 8, dtype=torch.int64)),
    "function": function,
}

BY_OFFSETS = {
    "boolean": lambda rule, **at: attn_mask.boolean(rule, 1, 4, 4, **at),
    "additive": lambda rule, **at: attn_mask.additive(rule, 1, 4, 4, **at),
    "create_block_mask": lambda rule, **at: attn_mask.create_block_mask(
        rule, 1, 1, 4, 4, "cpu", **at
    ),
    "scaled_dot_product_attention": lambda rule, **at: attn_mask.scaled_dot_product_attention(
        QUERY, QUERY, QUERY, rule, **at
    ),
    "attention_plan": lambda rule, **at: attn_mask.attention_plan(rule, 1, 4, 4, **at),
    "sdpa_arguments": lambda rule, **at: attn_mask.sdpa_arguments(QUERY, QUERY, rule, **at),
    "sdpa_mask": lambda rule, **at: masking_utils.sdpa_mask(
        1, 4, 4, mask_function=rule, allow_is_causal_skip=False, **at
    ),
    "eager_mask": lambda rule, **at: masking_utils.eager_mask(1, 4, 4, mask_function=rule, **at),
    "flex_attention_mask": lambda rule, **at: masking_utils.flex_attention_mask(
        1, 4, 4, mask_function=rule, **at
    ),
}
NOT_NEGATIVE = ("scaled_dot_product_attention", "attention_plan", "sdpa_arguments")
ERRORS_OF = {"flex_attention_mask": "create_block_mask"}


def text(name, argument, expected, value):
    return rf"^{ERRORS_OF.get(name, name)}: expected {argument} {expected}, but got {value}$"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BY_OFFSETS)
@pytest.mark.parametrize("argument", ["q_offset", "kv_offset"])
def test_offsets_that_fit_into_no_64_bits(name, argument, rule):
    with pytest.raises(ValueError, match=text(name, argument, r"to be within 2\^\d+ of 0", 2**70)):
        BY_OFFSETS[name](RULES[rule], **{argument: 2**70})
    if name not in NOT_NEGATIVE:
        wanted = text(name, argument, r"to be within 2\^\d+ of 0", -(2**70))
        with pytest.raises(ValueError, match=wanted):
            BY_OFFSETS[name](RULES[rule], **{argument: -(2**70)})


@pytest.mark.parametrize("rule", ["table", "function"])
@pytest.mark.parametrize("name", BY_OFFSETS)
@pytest.mark.parametrize("argument", ["q_offset", "kv_offset"])
def test_offsets_that_are_too_far(name, argument, rule):
    """Where queries stand by default, the offset of the keys is named, from which it follows."""
    with pytest.raises(ValueError, match=text(name, argument, r"to be within 2\^59 of 0", 2**60)):
        BY_OFFSETS[name](RULES[rule], **{argument: 2**60})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NOT_NEGATIVE)
@pytest.mark.parametrize("argument", ["q_offset", "kv_offset"])
def test_offsets_that_are_negative(name, argument, rule):
    with pytest.raises(ValueError, match=text(name, argument, "not to be negative", -1)):
        BY_OFFSETS[name](RULES[rule], **{argument: -1})


@pytest.mark.parametrize("name", BY_OFFSETS)
@pytest.mark.parametrize("argument", ["q_offset", "kv_offset"])
@pytest.mark.parametrize("value", [True, 1.5])
def test_offsets_that_are_no_integers(name, argument, value):
    wanted = text(name, argument, "to be an int( or a tensor)?", type(value).__name__)
    with pytest.raises(TypeError, match=wanted):
        BY_OFFSETS[name](rules.causal(), **{argument: value})


BY_SIZES = {
    "boolean": lambda *sizes: attn_mask.boolean(rules.causal(), *sizes),
    "additive": lambda *sizes: attn_mask.additive(rules.causal(), *sizes),
    "attention_plan": lambda *sizes: attn_mask.attention_plan(rules.causal(), *sizes),
    "sdpa_mask": lambda *sizes: masking_utils.sdpa_mask(*sizes, allow_is_causal_skip=False),
    "eager_mask": lambda *sizes: masking_utils.eager_mask(*sizes),
}


@pytest.mark.parametrize("name", BY_SIZES)
@pytest.mark.parametrize("argument", ["batch_size", "q_length", "kv_length"])
def test_sizes_that_fit_into_no_64_bits(name, argument):
    sizes = [2**70 if of == argument else 4 for of in ("batch_size", "q_length", "kv_length")]
    with pytest.raises(ValueError, match=text(name, argument, r"to be within 2\^63 of 0", 2**70)):
        BY_SIZES[name](*sizes)


@pytest.mark.parametrize(("number", "argument"), [*enumerate(["B", "H", "Q_LEN", "KV_LEN"])])
def test_sizes_of_block_masks(number, argument):
    sizes = [4] * 4
    sizes[number] = 2**70
    wanted = text("create_block_mask", argument, r"to be less than 2\^63", 2**70)
    with pytest.raises(ValueError, match=wanted):
        attn_mask.create_block_mask(rules.causal(), *sizes, "cpu")


LEGACY = modeling_attn_mask_utils
Converter = LEGACY.AttentionMaskConverter
F32 = torch.float32


@pytest.mark.parametrize(
    ("name", "argument", "call"),
    [
        ("to_causal_4d", "batch_size", lambda n: Converter(True).to_causal_4d(n, 4, 4, F32)),
        ("to_causal_4d", "query_length", lambda n: Converter(True).to_causal_4d(1, n, 4, F32)),
        ("to_causal_4d", "key_value_length", lambda n: Converter(True).to_causal_4d(1, 4, n, F32)),
        ("to_causal_4d", "sliding_window", lambda n: Converter(True, n).to_causal_4d(1, 4, 4, F32)),
        ("to_4d", "query_length", lambda n: Converter(True).to_4d(MASK, n, F32, 4)),
        ("to_4d", "key_value_length", lambda n: Converter(True).to_4d(MASK, 4, F32, n)),
        ("to_4d", "sliding_window", lambda n: Converter(True, n).to_4d(MASK, 4, F32, 4)),
        (
            "_make_causal_mask",
            "past_key_values_length",
            lambda n: Converter._make_causal_mask((1, 4), F32, "cpu", n),
        ),
        (
            "_make_causal_mask",
            "query_length",
            lambda n: Converter._make_causal_mask((1, n), F32, "cpu"),
        ),
        ("_expand_mask", "tgt_len", lambda n: Converter._expand_mask(MASK, F32, n)),
        ("_expand_mask", "tgt_len", lambda n: LEGACY._prepare_4d_attention_mask(MASK, F32, n)),
        (
            "_prepare_4d_attention_mask_for_sdpa",
            "tgt_len",
            lambda n: LEGACY._prepare_4d_attention_mask_for_sdpa(MASK, F32, n),
        ),
        *(
            (
                name,
                "past_key_values_length",
                lambda n, name=name, mask=mask: getattr(LEGACY, name)(mask, (1, 4), QUERY[:, 0], n),
            )
            for name in (
                "_prepare_4d_causal_attention_mask",
                "_prepare_4d_causal_attention_mask_for_sdpa",
            )
            for mask in (MASK, None)
        ),
        (
            "_create_4d_causal_attention_mask",
            "past_key_values_length",
            lambda n: LEGACY._create_4d_causal_attention_mask((1, 4), F32, "cpu", n),
        ),
    ],
)
def test_integers_of_the_legacy_module(name, argument, call):
    with pytest.raises(ValueError, match=text(name, argument, r"to be within 2\^63 of 0", 2**70)):
        call(2**70)


def block_mask():
    return attn_mask.create_block_mask(rules.causal(), 1, 1, 4, 4, "cpu")


BY_DEVICE = {
    "boolean": lambda device: attn_mask.boolean(rules.causal(), 1, 4, 4, device=device),
    "additive": lambda device: attn_mask.additive(rules.causal(), 1, 4, 4, device=device),
    "create_block_mask": lambda device: attn_mask.create_block_mask(
        rules.causal(), 1, 1, 4, 4, device
    ),
    "block_mask_to": lambda device: attn_mask.block_mask_to(block_mask(), device),
    "attention_plan": lambda device: attn_mask.attention_plan(
        rules.causal(), 1, 4, 4, device=device
    ),
    "sdpa_mask": lambda device: masking_utils.sdpa_mask(
        1, 4, 4, device=device, allow_is_causal_skip=False
    ),
    "eager_mask": lambda device: masking_utils.eager_mask(1, 4, 4, device=device),
    "flex_attention_mask": lambda device: masking_utils.flex_attention_mask(1, 4, 4, device=device),
    "to_causal_4d": lambda device: Converter(True).to_causal_4d(1, 4, 4, F32, device),
    "_create_4d_causal_attention_mask": lambda device: LEGACY._create_4d_causal_attention_mask(
        (1, 4), F32, device
    ),
}


@pytest.mark.parametrize("name", BY_DEVICE)
def test_devices(name):
    with pytest.raises(ValueError, match=text(name, "device", "to name a device", "'x'")):
        BY_DEVICE[name]("x")
    wanted = text(name, "device", r"to be a torch\.device or a str", "list")
    with pytest.raises(TypeError, match=wanted):
        BY_DEVICE[name]([])
    BY_DEVICE[name]("cpu")
    BY_DEVICE[name](torch.device("cpu"))
