"""Unmodified transformers models with and without install(): the same masks, logits and tokens."""

import functools

import attn_mask
import pytest
import torch
from attn_mask import rules
from masks import assert_same_mask
from models import FAST, MODELS, PADDINGS, RELEASE, inputs, make, named, padding, run, tokens

IMPLEMENTATIONS = ("eager", "sdpa")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(RELEASE < (4, 53), reason="transformers before 4.53 has no masking_utils"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def assert_same_run(got, want):
    __tracebackhide__ = True
    assert [name for name, _ in got.masks] == [name for name, _ in want.masks]
    for (name, mask), (_, expected) in zip(got.masks, want.masks, strict=True):
        if isinstance(expected, torch.Tensor) or expected is None:
            assert (mask is None) == (expected is None), f"{name}: {mask} for {expected}"
            assert_same_mask(mask, expected)
        else:
            assert mask == expected, name
    torch.testing.assert_close(got.result, want.result, rtol=0, atol=0)


def asks(name):
    """Whether the model asks the create functions, and doesn't write masks itself."""
    return MODELS[name].asks_since <= RELEASE


def compare(name, model, call):
    """Runs a call without and with install(); returns how many masks our operators wrote."""
    __tracebackhide__ = True
    want = run(model, call)
    assert want.operators == 0
    with attn_mask.installed():
        got = run(model, call)
    assert_same_run(got, want)
    if want.has_masks and asks(name):
        assert got.operators > 0, "the masks are not ours"
    return got.operators


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", named(MODELS))
def test_forward(name, implementation):
    model = make(name, implementation)
    written = 0
    for side in PADDINGS:
        given = inputs(MODELS[name], side)
        written += compare(name, model, lambda given=given: model(**given)[0])
    assert written > 0 or not asks(name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", named(MODELS))
def test_packed_sequences(name, implementation):
    if MODELS[name].inputs != "decoder":
        pytest.skip("packed sequences are for decoders")
    model = make(name, implementation)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    given = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    written = compare(name, model, lambda: model(**given)[0])
    assert written > 0 or name not in FAST  # some don't hand positions on


@pytest.mark.slow
# Upstream calls create_block_mask in a way that torch has come to discourage.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Llama 4 text"])
def test_flex_attention(name):
    """Its BlockMasks are made of rules, and are the same."""
    model = make(name, "flex_attention")
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    for given in (
        {"attention_mask": padding("left")},
        {"position_ids": positions, "use_cache": False},
    ):
        call = functools.partial(model, tokens(), **given)
        want = run(model, lambda call=call: call()[0], counts=False)
        with attn_mask.installed():
            got = run(model, lambda call=call: call()[0], counts=False)
        assert torch.equal(got.result, want.result)
        assert [argument for argument, _ in got.masks] == [argument for argument, _ in want.masks]
        for (_, mask), (_, expected) in zip(got.masks, want.masks, strict=True):
            assert isinstance(mask.mask_mod, rules.MaskFunction)
            assert not isinstance(expected.mask_mod, rules.MaskFunction)
            assert mask.shape == expected.shape
            assert torch.equal(mask.to_dense(), expected.to_dense())


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "sliding": {"cache_implementation": "sliding_window"},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", named(MODELS))
def test_generate(name, implementation, cache):
    model_of = MODELS[name]
    if model_of.inputs == "encoder":
        pytest.skip("an encoder generates nothing")
    if cache == "sliding" and not model_of.is_sliding:
        pytest.skip("no layer is sliding")
    if cache in ("static", "sliding") and model_of.inputs not in ("decoder", "images"):
        pytest.skip("only decoders are run with this cache")
    if "ALiBi" in name and cache == "static":
        pytest.skip("its biases are as long as the padding mask")
    if name == "Llama 4 text" and cache in ("static", "sliding"):
        if (5, 9) <= RELEASE < (5, 20):
            pytest.skip("5.9 to 5.19 fail with chunks in caches that are made ahead")
        if cache == "sliding" and RELEASE < (4, 56):
            pytest.skip("until 4.55 this cache has windows only")
    model = make(name, implementation)
    for side in ("none", "left"):
        given = {**inputs(model_of, side), **CACHES[cache]}
        given.pop("decoder_attention_mask", None)
        options = {"max_new_tokens": 4, "do_sample": False}
        compare(name, model, lambda given=given, o=options: model.generate(**given, **o))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", named(MODELS))
def test_forward_in_two_parts(name, implementation):
    """More than one token behind a cache."""
    if MODELS[name].inputs != "decoder":
        pytest.skip("this is for decoders")
    model = make(name, implementation)
    ids = tokens()

    def call(mask):
        first = model(
            ids[:, :6], attention_mask=None if mask is None else mask[:, :6], use_cache=True
        )
        return model(
            ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True
        )[0]

    for side in ("none", "left"):
        assert compare(name, model, functools.partial(call, padding(side))) > 0
