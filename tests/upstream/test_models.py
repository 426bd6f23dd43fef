"""Unmodified transformers models with and without install(): the same masks, logits and tokens."""

import functools

import attn_mask
import pytest
import torch
from attn_mask import rules
from masks import assert_same_mask
from models import (
    FAST,
    MODELS,
    PADDINGS,
    RELEASE,
    combinations,
    inputs,
    make,
    padding,
    run,
    tokens,
)

DECODERS = [name for name in MODELS if MODELS[name].inputs == "decoder"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.applies(RELEASE >= (4, 53)),
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


def calls_create_functions(name):
    """Whether the model calls the create functions, and does not write masks itself."""
    return MODELS[name].creates_since <= RELEASE


def compare(name, model, call):
    """Runs a call without and with install(); returns how many masks our operators wrote."""
    __tracebackhide__ = True
    want = run(model, call)
    assert want.operators == 0
    with attn_mask.installed():
        got = run(model, call)
    assert_same_run(got, want)
    if want.has_masks and calls_create_functions(name):
        assert got.operators > 0, "the masks are not ours"
    return got.operators


@pytest.mark.parametrize(("name", "implementation"), combinations(MODELS))
def test_forward(name, implementation):
    model = make(name, implementation)
    written = 0
    for side in PADDINGS:
        given = inputs(MODELS[name], side)
        written += compare(name, model, lambda given=given: model(**given)[0])
    assert written > 0 or not calls_create_functions(name)


@pytest.mark.parametrize(("name", "implementation"), combinations(DECODERS))
def test_packed_sequences(name, implementation):
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


def takes(name, cache):
    """Whether a model generates with a kind of cache."""
    model = MODELS[name]
    if model.inputs == "encoder":
        return False
    if cache in ("static", "sliding") and model.inputs not in ("decoder", "images"):
        return False
    if cache == "sliding" and not model.is_sliding:
        return False
    if "ALiBi" in name and cache == "static":
        return False  # its biases are as long as the padding mask
    if name == "Llama 4 text":
        if cache in ("static", "sliding") and (5, 9) <= RELEASE < (5, 20):
            return False  # these fail with chunks in caches that are made ahead
        if cache == "sliding" and RELEASE < (4, 56):
            return False  # until 4.55 this cache has windows only
    return True


@pytest.mark.parametrize(
    ("name", "implementation", "cache"),
    [
        pytest.param(*pair.values, cache, marks=pair.marks, id=f"{pair.id}-{cache}")
        for pair in combinations(MODELS)
        for cache in CACHES
        if takes(pair.values[0], cache)
    ],
)
def test_generate(name, implementation, cache):
    model_of = MODELS[name]
    model = make(name, implementation)
    for side in ("none", "left"):
        given = {**inputs(model_of, side), **CACHES[cache]}
        given.pop("decoder_attention_mask", None)
        options = {"max_new_tokens": 4, "do_sample": False}
        compare(name, model, lambda given=given, o=options: model.generate(**given, **o))


@pytest.mark.parametrize(("name", "implementation"), combinations(DECODERS))
def test_forward_in_two_parts(name, implementation):
    """More than one token after a cache."""
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
