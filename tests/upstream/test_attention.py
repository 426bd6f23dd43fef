"""attn_implementation="attn_mask": unmodified models attend by the rules of their masks."""

import copy
import functools
import logging
import pickle
import re
import sys
import types

import attn_mask
import pytest
import torch
from attn_mask import causal, rules, sliding_window
from attn_mask._core import log_once
from attn_mask._transformers import install
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from models import (
    FAST,
    MODELS,
    PADDINGS,
    RELEASE,
    WINDOW,
    inputs,
    make,
    padding,
    recorded_masks,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="its models are run")
theirs = pytest.importorskip("transformers.masking_utils")

from transformers.modeling_utils import AttentionInterface  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "under"),
    pytest.mark.applies(RELEASE >= (4, 53)),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
pinned = pytest.mark.applies(RELEASE >= (5, 24))

DECODERS = ("Llama", "Mistral", "Gemma 3 text", "Llama 4 text")
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6]])


INTERFACES = (
    AttentionInterface,
    theirs.AttentionMaskInterface,
    attn_mask.masking_utils.AttentionMaskInterface,
)


def forget():
    """As in a process that has registered nothing."""
    install._state.keeps_attention = False
    attn_mask.uninstall()
    for interface in INTERFACES:
        interface._global_mapping.pop("attn_mask", None)


@pytest.fixture(params=["registered", "installed"])
def under(request):
    forget()
    if request.param == "installed":
        attn_mask.install()
    else:
        attn_mask.register_attention()
    yield request.param
    forget()


@pytest.fixture
def named(monkeypatch, caplog):
    """What is named from here on, as if nothing had been."""
    monkeypatch.setattr(log_once, "_named", set())
    caplog.set_level(logging.WARNING, logger="attn_mask")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "attn_mask"]


def attention_interface():
    from attn_mask._transformers import attention_interface

    return attention_interface


def rule_mask_module():
    from attn_mask._transformers import rule_mask

    return rule_mask


def assert_close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


def both(name):
    """The model with sdpa and with ours; the same weights."""
    return make(name, "sdpa"), make(name, "attn_mask")


def compare(name, **given):
    """Logits equal sdpa's; returns the masks that reached ours."""
    theirs, ours = both(name)
    with torch.no_grad(), recorded_masks(ours) as seen:
        got = ours(**given)[0]
    with torch.no_grad():
        assert_close(got, theirs(**given)[0])
    return [mask for _, mask in seen if mask is not None]


def takes(name):
    """Whether the release looks up the attention of this model, and it can be sdpa."""
    return FAST[name].creates_since <= RELEASE and FAST[name].sdpa_since <= RELEASE


@pytest.mark.parametrize("name", list(filter(takes, FAST)))
def test_logits_are_those_of_sdpa(name):
    for side in PADDINGS:
        masks = compare(name, **inputs(FAST[name], side))
        if side in ("left", "right"):
            assert masks and {type(mask).__name__ for mask in masks} == {"RuleMask"}


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents(name):
    masks = compare(name, input_ids=tokens(), position_ids=PACKED, use_cache=False)
    assert masks and {type(mask).__name__ for mask in masks} == {"RuleMask"}
    for mask in masks:
        visible = mask.to_dense()
        assert not visible[0, 0, 5:, :5].any() and visible[0, 0, 5, 5]
        assert "reindex" not in repr(mask) or "chunked" in repr(mask)


def test_a_document_does_not_see_another():
    model = make("Mistral", "attn_mask")
    ids = tokens()[:1]
    other = ids.clone()
    other[:, :5] = tokens()[1:, :5]
    with torch.no_grad():
        one, two = (
            model(given, position_ids=PACKED[:1], use_cache=False)[0] for given in (ids, other)
        )
    assert torch.equal(one[:, 5:], two[:, 5:])
    assert not torch.equal(one[:, :5], two[:, :5])


def test_no_mask_is_dense(monkeypatch):
    """Neither forward, nor backward, nor in the steps of generate()."""

    def fails(*args, **kwargs):
        raise AssertionError("a dense mask is made")

    model = make("Mistral", "attn_mask")
    monkeypatch.setattr(rule_mask_module().RuleTensor, "as_boolean", fails)
    monkeypatch.setattr(attention_interface(), "write_mask", fails)
    gradients(model, input_ids=tokens(), position_ids=PACKED, use_cache=False)
    gradients(model, **inputs(FAST["Mistral"], "left"))
    if RELEASE >= (4, 56):  # before, caches kept keys that are in no window
        model.generate(tokens(), max_new_tokens=2 * WINDOW, do_sample=False)


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "sliding": {"cache_implementation": "sliding_window"},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_sdpa(name, cache):
    if name == "Llama" and cache == "sliding":
        return
    if name == "Llama 4 text" and RELEASE < (5, 20) and cache in ("static", "sliding"):
        return  # these fail in some releases, with sdpa as well
    sdpa, ours = both(name)
    for side in ("ones", "left"):
        options = inputs(FAST[name], side) | CACHES[cache]
        options |= {"max_new_tokens": 2 * WINDOW, "do_sample": False}
        assert torch.equal(ours.generate(**options), sdpa.generate(**options))


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_cache_that_goes_on(name):
    """Prompts in parts, as in a chat: queries after a cache."""
    sdpa, ours = both(name)
    ids = torch.cat([tokens(), tokens()], 1)
    for mask in (None, padding("left", 2, 18)):
        logits = []
        for model in (sdpa, ours):
            options = {"config": model.config} if RELEASE >= (4, 56) else {}
            cache = transformers.DynamicCache(**options)
            with torch.no_grad():
                for start, end in ((0, 7), (7, 12), (12, 13), (13, 18)):
                    given = None if mask is None else mask[:, :end]
                    out = model(ids[:, start:end], attention_mask=given, past_key_values=cache)
            logits.append(out.logits)
        assert_close(logits[1], logits[0])


def gradients(model, seed=3, **given):
    model = copy.deepcopy(model).train()
    torch.manual_seed(seed)
    out = model(**given)[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), found


def assert_same_step(got, want):
    assert_close(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(filter(takes, ["Llama", "Mistral", "Gemma 3 text", "BERT"])))
def test_gradients_are_those_of_sdpa(name):
    sdpa, ours = map(copy.deepcopy, both(name))
    cases = [inputs(FAST[name], "none"), inputs(FAST[name], "left")]
    if name != "BERT":
        cases.append({"input_ids": tokens(), "position_ids": PACKED, "use_cache": False})
    for model in (sdpa, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout_prob", None), float):
                module.dropout_prob = 0.0
    for case in cases:
        assert_same_step(gradients(ours, **case), gradients(sdpa, **case))


def test_autocast():
    sdpa, ours = both("Mistral")
    given = inputs(FAST["Mistral"], "left")
    for dtypes in ([torch.float32] * 3, [torch.float32, torch.bfloat16, torch.bfloat16]):
        tensors = [tensor.to(dtype) for tensor, dtype in zip(states(), dtypes, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            got, want = (
                attention_interface().attention(Layer(), *tensors, mask)[0]
                for mask in (rule_mask(), rule_mask().to_dense())
            )
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(ours(**given)[0], sdpa(**given)[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointed_layers(is_reentrant):
    given = {"input_ids": tokens(), "position_ids": PACKED, "use_cache": False}
    ours = make("Mistral", "attn_mask")
    want = gradients(ours, **given)
    checkpointed = copy.deepcopy(ours)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    assert_same_step(gradients(checkpointed, **given), want)


# What attention by rule has no part in.


def with_dropout(model, probability):
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = probability
    return model


def test_dropout_takes_a_dense_mask(named):
    """The same random numbers as sdpa's, then."""
    sdpa, ours = (with_dropout(model, 0.3) for model in both("Mistral"))
    given = inputs(FAST["Mistral"], "left")
    got = gradients(ours, **given)
    assert_same_step(got, gradients(sdpa, **given))
    assert not torch.equal(got[0], gradients(ours, seed=4, **given)[0])
    assert named() == [
        "attn_mask: for dropout, attention takes a dense mask and is transformers' sdpa, in time "
        "and memory of queries x keys"
    ]


@pytest.mark.applies(takes("T5"))
def test_a_learned_bias_is_added_and_learned(named):
    sdpa, ours = (model.eval() for model in both("T5"))
    given = inputs(FAST["T5"], "left")
    for model in (sdpa, ours):
        assert model.config.dropout_rate > 0
    sdpa, ours = map(copy.deepcopy, (sdpa, ours))
    for model in (sdpa, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout"):
                module.dropout = 0.0 if isinstance(module.dropout, float) else module.dropout
    got, want = gradients(ours, **given), gradients(sdpa, **given)
    assert_same_step(got, want)
    biases = [gradient for name, gradient in got[1].items() if "relative_attention_bias" in name]
    assert biases and all(gradient.abs().sum() > 0 for gradient in biases)
    assert any("for position_bias, attention takes a dense mask" in text for text in named())


@pinned
@pytest.mark.parametrize(("name", "change"), [("Gemma 2", "softcap"), ("GPT-OSS", "s_aux")])
def test_scores_that_sdpa_can_not_have_are_the_eager_model_s(name, change, named):
    eager, ours = make(name, "eager"), make(name, "attn_mask")
    for side in PADDINGS:
        given = inputs(MODELS[name], side)
        with torch.no_grad():
            assert_close(ours(**given)[0], eager(**given)[0])
    assert named() == [
        f"attn_mask: for {change}, attention takes a dense mask and is the model's eager "
        "attention, in time and memory of queries x keys"
    ]


@pinned
def test_output_attentions_are_those_of_eager(named):
    given = {**inputs(FAST["Mistral"], "left"), "output_attentions": True}
    with torch.no_grad():
        want = make("Mistral", "eager")(**given).attentions
        got = make("Mistral", "attn_mask")(**given).attentions
    assert len(got) == len(want) == 2
    for of_ours, of_eager in zip(got, want, strict=True):
        assert_close(of_ours, of_eager)
    assert "for output_attentions, attention takes a dense mask" in named()[0]


class Layer(torch.nn.Module):
    """An attention layer as attention functions see one, of a file without eager attention."""

    is_causal = True
    num_key_value_groups = 2


def states(q_length=6, kv_length=6):
    generator = torch.Generator().manual_seed(5)
    sizes = (2, 4, q_length, 8), (2, 2, kv_length, 8), (2, 2, kv_length, 8)
    return [torch.randn(size, generator=generator) for size in sizes]


def rule_mask(q_length=6, kv_length=6, rule=None, **kwargs):
    """Without a window where no rule is given."""
    rule = causal() if rule is None else rule
    return attention_interface().rule_mask(2, q_length, kv_length, mask_function=rule, **kwargs)


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("layer_is_causal", [True, False])
def test_no_mask_is_as_for_sdpa(is_causal, layer_is_causal):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = Layer()
    layer.is_causal = layer_is_causal
    for lengths in ((6, 6), (1, 6)):
        call = (layer, *states(*lengths), None)
        got, weights = attention_interface().attention(*call, is_causal=is_causal)
        assert torch.equal(got, sdpa_attention_forward(*call, is_causal=is_causal)[0])
        assert weights is None


def test_dense_masks_of_the_user_s_are_as_for_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    visible = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(6)) < 0.7
    for mask in (visible, torch.where(visible, 0.0, -1.0)):
        got, _ = attention_interface().attention(Layer(), *states(), mask)
        assert torch.equal(got, sdpa_attention_forward(Layer(), *states(), mask)[0])


@pytest.mark.parametrize("argument", ["indices", "block_indices"])
def test_selected_keys_are_refused(argument):
    with pytest.raises(
        NotImplementedError,
        match=f"^attn_mask attention: expected no {argument}, which select keys for each query of "
        "Layer without a mask: take attn_implementation='sdpa'$",
    ):
        attention_interface().attention(
            Layer(), *states(), rule_mask(), **{argument: torch.zeros(2, 6, 3)}
        )


def test_scores_are_refused_where_nothing_can_have_them():
    with pytest.raises(
        NotImplementedError,
        match=r"^attn_mask attention: expected no softcap and s_aux, or a model with an "
        "eager_attention_forward, but the file of Layer has none$",
    ):
        attention_interface().attention(
            Layer(), *states(), rule_mask(), softcap=50.0, s_aux=torch.zeros(4)
        )


def test_a_block_mask_of_flex_attention_is_refused():
    block_mask = attn_mask.create_block_mask(causal(), 2, 1, 6, 6, "cpu")
    with pytest.raises(
        TypeError,
        match=r"^attn_mask attention: expected attention_mask to be a tensor, None, or the mask "
        "that transformers makes for this implementation, but got a BlockMask$",
    ):
        attention_interface().attention(Layer(), *states(), block_mask)


@pytest.mark.parametrize("lengths", [(5, 6), (6, 5)])
def test_a_mask_of_another_size_is_refused(lengths):
    with pytest.raises(
        ValueError,
        match=re.escape(
            "attn_mask attention: expected a mask for [2, 6, 6], the batch size, queries and keys, "
            f"but got one of {[2, *lengths]}"
        ),
    ):
        attention_interface().attention(Layer(), *states(), rule_mask(*lengths))


def test_a_mask_may_be_longer_than_the_keys():
    """As before transformers 5, whose masks were cut where they were used."""
    query, key, value = states(6, 6)
    got, _ = attention_interface().attention(Layer(), query, key, value, rule_mask(6, 9))
    assert_close(got, attention_interface().attention(Layer(), query, key, value, None)[0])


def test_what_a_mask_lacks_is_named(named):
    """Windows and documents that layers are told of beside it."""
    call = functools.partial(attention_interface().attention, Layer(), *states())
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    borders = torch.tensor([0, 3, 6], dtype=torch.int32)
    call(rule_mask(rule=causal() & sliding_window(4)), sliding_window=4)
    call(rule_mask(), sliding_window=6)  # holds all
    call(rule_mask(), sliding_window=None, cu_seq_lens_q=borders[::2])
    call(rule_mask(rule=causal() & attn_mask.documents(ids)), cu_seq_lens_q=borders)
    assert named() == []
    want, _ = call(rule_mask())
    for arguments in ({"sliding_window": 4}, {"cu_seq_lens_q": borders}):
        assert torch.equal(call(rule_mask(), **arguments)[0], want)
    assert named() == [
        f"attn_mask: a layer is given {argument}, which the mask that its model makes does not "
        "have: the mask holds, as for 'sdpa'"
        for argument in ("sliding_window=4", "cu_seq_lens_q")
    ]


# Masks


def their_factories():
    """Mask functions as transformers' create functions build them, and the length of tables."""
    n = 12
    table = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    )
    leaves = [theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(3)]
    leaves.append(theirs.sliding_window_overlay(5))
    leaves.append(theirs.padding_mask_function(table > 0))
    leaves.append(theirs.packed_sequence_mask_function(table))
    if hasattr(theirs, "bidirectional_mask_function"):
        leaves.append(theirs.bidirectional_mask_function)
    if hasattr(theirs, "blockwise_overlay"):
        leaves.append(theirs.blockwise_overlay(table - 1))
    if hasattr(theirs, "sliding_window_bidirectional_mask_function"):
        leaves.append(theirs.sliding_window_bidirectional_mask_function(2))
    if RELEASE >= (4, 56):
        leaves.append(theirs.chunked_causal_mask_function(4, torch.tensor([0, 3])))
    else:
        leaves.append(theirs.chunked_causal_mask_function(4))
    joins = [theirs.and_masks, theirs.or_masks]

    def over(inner):
        several = st.lists(inner, min_size=1, max_size=3)
        trees = [st.builds(lambda join, of: join(*of), st.sampled_from(joins), several)]
        if hasattr(theirs, "remap_positions_for_packed_sequence"):
            positions = torch.cat([torch.arange(5), torch.arange(n - 5)]).expand(2, -1)
            trees.append(
                inner.map(lambda f: theirs.remap_positions_for_packed_sequence(f, positions))
            )
        return st.one_of(trees)

    return st.recursive(st.sampled_from(leaves), over, max_leaves=6)


@settings(max_examples=50)
@drawn(data=st.data())
def test_transformers_mask_functions_are_recognised(data):
    """Each closure of theirs becomes a rule, whose mask is bit for bit theirs."""
    function = data.draw(their_factories())
    q_length, offset = data.draw(st.sampled_from([(12, 0), (7, 5), (5, 3)]))
    padding = data.draw(st.sampled_from([None, torch.ones(2, 12, dtype=torch.bool)]))
    if padding is not None and data.draw(st.booleans()):
        padding = padding.clone()
        padding[0, : data.draw(st.integers(1, 4))] = False
    mask = attention_interface().rule_mask(2, q_length, 12, offset, 0, function, padding)
    assert type(mask).__name__ == "RuleMask"
    positions = torch.arange(2), torch.arange(1), torch.arange(offset, offset + q_length)
    b, h, q, k = torch.meshgrid(*positions, torch.arange(12), indexing="ij")
    want = function(b, h, q, k).expand(2, 1, q_length, 12)
    if padding is not None:
        want = want & padding[:, None, None]
    assert torch.equal(mask.to_dense(), want)


@settings(max_examples=50)
@drawn(data=st.data())
def test_packed_positions_are_left_out_where_they_count_on(data):
    """As distances: the mask stays the same, whatever the positions and ids are."""
    n = 12
    numbers = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    jumps = torch.tensor([data.draw(numbers) for _ in range(2)])
    starts = torch.where(jumps == 0, torch.arange(n), 0).cummax(-1).values
    positions = torch.arange(n) - starts
    ids = (jumps == 0).cumsum(-1)
    counts_on = not data.draw(st.booleans())
    if not counts_on:
        ids = torch.tensor([data.draw(numbers) for _ in range(2)])
    inner = data.draw(
        st.sampled_from([causal(), causal() & sliding_window(3), attn_mask.window(2, 1)])
    )
    moved = rules.reindex(inner, positions)
    if data.draw(st.booleans()):
        moved |= attn_mask.blockwise(jumps - 1)
    mask = rule_mask(n, n, moved & attn_mask.documents(ids))
    want = attn_mask.boolean(moved & attn_mask.documents(ids), 2, n, n)
    assert torch.equal(mask.to_dense(), want)
    from attn_mask._transformers.documents import count_sequences

    is_left_out = torch.equal(count_sequences(positions), ids)
    assert ("reindex" not in repr(mask)) == is_left_out


def test_a_function_of_the_user_s_makes_the_mask_dense(named):
    def even(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx % 2 == 0

    function = theirs.or_masks(theirs.causal_mask_function, even)
    mask = rule_mask(rule=function)
    want = torch.ones(6, 6).tril().bool() | (torch.arange(6) % 2 == 0)
    assert mask.dtype == torch.bool and torch.equal(mask, want.expand(2, 1, 6, 6))
    (text,) = named()
    assert text.startswith("rule_mask: calls a mask function that is no rule, ")


def test_one_query_has_what_sdpa_has():
    assert rule_mask(1, 8, q_offset=7) is None
    shown = torch.ones(2, 8, dtype=torch.bool)
    shown[1, :3] = False
    mask = rule_mask(1, 8, q_offset=7, attention_mask=shown)
    assert torch.equal(mask, shown[:, None, None])
    window = causal() & sliding_window(8)
    assert (
        rule_mask(1, 8, window, q_offset=9, kv_offset=2, local_size=8) is None
    )  # a cache that slides
    late = rule_mask(1, 8, window, q_offset=10, kv_offset=2, local_size=8)
    assert not late[..., 0].any() and late[..., 1:].all()
    always = rule_mask(1, 8, window, q_offset=9, kv_offset=2, allow_is_causal_skip=False)
    assert always.all() and always.shape == (2, 1, 1, 8)


def test_slots_of_a_cache_that_are_not_filled_are_not_read():
    """One query before the last key: its rule, so that attention is of the keys up to it."""
    query, key, value = states(1, 64)
    for offset in (5, torch.tensor(5)):
        mask = rule_mask(1, 64, q_offset=offset, allow_is_causal_skip=False)
        assert (type(mask).__name__, mask.q_offset) == ("RuleMask", 5)
        key[:, :, 6:] = value[:, :, 6:] = torch.nan
        got, _ = attention_interface().attention(Layer(), query, key, value, mask)
        want, _ = attention_interface().attention(
            Layer(), query, key[:, :, :6], value[:, :, :6], None
        )
        assert_close(got, want)


def test_padding_that_hides_nothing_is_left_out():
    shown = torch.ones(2, 6, dtype=torch.bool)
    assert rule_mask(attention_mask=shown).rule == causal()
    assert rule_mask(6, 8, attention_mask=shown).rule != causal()  # none after its end
    with attn_mask.skip_policy("shapes"):
        assert rule_mask(attention_mask=shown).rule != causal()
    with attn_mask.skip_policy("shapes", padding="none"):
        assert rule_mask(attention_mask=shown).rule == causal()


def test_offsets_in_tensors():
    """Read, where they may be (static caches have them); else the mask is dense."""
    three = torch.tensor(3)
    mask = rule_mask(4, 9, q_offset=three)
    assert (mask.q_offset, mask.shape) == (3, (2, 1, 4, 9))
    for_rows = rule_mask(4, 9, q_offset=torch.tensor([[3], [2]]))
    with attn_mask.skip_policy("shapes"):
        unread = rule_mask(4, 9, q_offset=three)
    assert torch.equal(unread, mask.to_dense())
    assert torch.equal(for_rows[0], unread[0]) and not torch.equal(for_rows[1], unread[1])


@settings(max_examples=60)
@drawn(data=st.data())
def test_indexing_is_that_of_the_dense_mask(data):
    rule = data.draw(
        st.sampled_from(
            [
                causal() & sliding_window(3),
                causal() & rules.bits(torch.arange(48).view(1, 1, 6, 8) % 3 == 0),
            ]
        )
    )
    mask = rule_mask(6, 8, rule, q_offset=2)
    sizes = st.one_of(st.none(), st.integers(-9, 9))
    part = st.one_of(
        st.builds(slice, sizes, sizes, st.sampled_from([None, 1, 2])), st.integers(0, 0), st.none()
    )
    index = data.draw(st.lists(part, max_size=4).map(tuple) | part)
    if data.draw(st.booleans()):
        index = index if isinstance(index, tuple) else (index,)
        at = data.draw(st.integers(0, len(index)))
        index = (*index[:at], Ellipsis, *index[at:])
    got, want = mask[index], mask.to_dense()[index]
    assert got.shape == want.shape
    assert torch.equal(got, want)


def test_rows_that_a_model_slices_stay_a_rule():
    mask = rule_mask(6, 8, causal() & sliding_window(3), q_offset=2)
    last = mask[:, :, slice(-2, None), :]
    assert str(last) == (
        "RuleMask(causal() & sliding_window(3), shape=(2, 1, 2, 8), q_offset=6, kv_offset=0)"
    )


def test_what_transformers_does_with_masks():
    from torch.nn.attention.flex_attention import BlockMask

    shown = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    mask = rule_mask(attention_mask=shown)
    assert isinstance(mask, torch.Tensor) and not isinstance(mask, BlockMask)
    assert (mask.ndim, mask.shape, mask.dtype) == (4, (2, 1, 6, 6), torch.bool)
    assert mask.contiguous() is mask
    assert mask.to("meta").to_dense().device.type == "meta"
    again = pickle.loads(pickle.dumps(mask))
    assert torch.equal(again.to_dense(), mask.to_dense())
    create = theirs.create_causal_mask
    names = create.__code__.co_varnames if hasattr(create, "__code__") else ()
    given = {"cache_position": torch.arange(6)} if "cache_position" in names else {}
    config, embeds = make("Llama", "attn_mask").config, torch.zeros(2, 6, 4)
    assert create(config, embeds, mask, past_key_values=None, **given) is mask
    ours = attn_mask.masking_utils.create_causal_mask
    assert ours(config, embeds, mask, None) is mask


def test_the_mirror_s_create_functions_make_the_same_masks():
    ids = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    mask = attn_mask.masking_utils.create_causal_mask(
        make("Llama", "attn_mask").config, torch.zeros(2, 6, 4), None, None, document_ids=ids
    )
    rule = causal() & attn_mask.documents(ids)
    assert torch.equal(mask.to_dense(), attn_mask.boolean(rule, 2, 6, 6))


# Registering


def is_registered():
    return ["attn_mask" in interface._global_mapping for interface in INTERFACES]


def test_it_stays_after_uninstall_only_where_it_was_registered(under):
    name = f"registered attention: {attn_mask.status().attention!r}"
    assert name == "registered attention: 'attn_mask'"
    assert name in str(attn_mask.status()).splitlines()
    attn_mask.uninstall()
    stays = under == "registered"
    assert is_registered() == [stays] * 3
    assert attn_mask.status().attention == ("attn_mask" if stays else None)
    if not stays:
        assert "registered attention: none" in str(attn_mask.status()).splitlines()
        with pytest.raises(KeyError, match="attn_mask"):
            make("Mistral", "attn_mask")(tokens())


def test_it_stays_after_uninstall_if_registered_under_install():
    forget()
    with attn_mask.installed():
        attn_mask.register_attention()
    assert is_registered() == [True] * 3
    with attn_mask.installed():
        pass
    assert is_registered() == [True] * 3


def test_what_others_registered_stays_under_install(named):
    def of_another(*args, **kwargs):
        return None

    forget()
    for interface in INTERFACES[:2]:
        interface.register("attn_mask", of_another)
    with attn_mask.installed():
        for interface in INTERFACES[:2]:
            assert interface._global_mapping["attn_mask"] is of_another
        assert attn_mask.status().attention is None
        stays = attn_mask.status().stays
    for interface in INTERFACES[:2]:
        (text,) = (text for text in stays if f"'attn_mask' of {interface.__name__} keeps" in text)
        assert text.endswith("of_another")
        assert f"attn_mask.install: {text}" in named()
    attn_mask.register_attention()
    assert AttentionInterface._global_mapping["attn_mask"] is attention_interface().attention
    assert (
        theirs.AttentionMaskInterface._global_mapping["attn_mask"]
        is attention_interface().rule_mask
    )


def test_releases_without_such_masks(monkeypatch):
    attn_mask.uninstall()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.52.4")
    with pytest.raises(
        NotImplementedError,
        match=r"^attn_mask\.register_attention: expected transformers 4.53 or later, whose masks "
        "can be registered, but 4.52.4 is installed$",
    ):
        attn_mask.register_attention()


def test_without_transformers(monkeypatch):
    def fails(name):
        raise ModuleNotFoundError(name="transformers")

    monkeypatch.setattr(install, "importlib", types.SimpleNamespace(import_module=fails))
    with pytest.raises(
        ImportError,
        match=r"^attn_mask\.register_attention: expected transformers .* there is none$",
    ):
        attn_mask.register_attention()


@pinned
def test_explain_model():
    (layers,) = attn_mask.explain_model(make("Mistral", "attn_mask")).layers
    assert str(layers) == (
        "sliding_attention x 2, attn_mask: attn_mask, a rule, by which the layers attend, instead "
        "of a mask"
    )


@pinned
@pytest.mark.parametrize("name", ["Mistral", pytest.param("BERT", marks=pytest.mark.slow)])
def test_compiled(name):
    """One graph for all lengths."""
    torch._dynamo.reset()
    sdpa, ours = both(name)
    compiled = torch.compile(
        lambda **arguments: ours(**arguments)[0], backend="aot_eager", fullgraph=True, dynamic=True
    )

    def run(length):
        given = {"input_ids": tokens(2, length), "attention_mask": padding("left", 2, length)}
        if name != "BERT":
            given["use_cache"] = False
        with torch.no_grad():
            assert_close(compiled(**given), sdpa(**given)[0])

    run(9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(11)
        run(20)
    torch._dynamo.reset()


@pinned
def test_masks_are_recorded_and_timed(under):
    model = make("Llama", "attn_mask")
    batch = {"input_ids": tokens(), "attention_mask": padding("left")}
    masks = [recorded.mask for recorded in attn_mask.testing.record_masks(model, batch)]
    assert masks and {type(mask).__name__ for mask in masks} == {"RuleMask"}
    if under == "registered":
        attn_mask.testing.assert_same_masks(model, batch)
    with attn_mask.profile() as found:
        model(**batch)
    assert found.costs["rule_mask"].calls == 1
    assert found.total.bytes == 0  # attention is no mask
