"""Packed documents under unmodified models: each gives what the stock model gives for it alone."""

import asyncio
import contextlib
import copy
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, testing
from attn_mask._core import log_once
from attn_mask._transformers import packing
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAST, MODELS, RELEASE, WINDOW, make, tokens, transformers
from torch.utils.checkpoint import checkpoint

# Before, models take caches and positions in other ways; what is new here is the same for all.
pytestmark = [
    pytest.mark.applies(RELEASE >= (5, 14)),
    pytest.mark.usefixtures("one_thread", "nothing_left"),
]
CACHE = "cache" if RELEASE >= (5, 24) else "past_key_values"
if RELEASE >= (5, 14):
    from transformers import DynamicCache, StaticCache
    from transformers import masking_utils as upstream

LENGTHS = [[5, 3, 6], [2, 7, 5]]  # of the documents in each row
LENGTH = 14
IDS = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
CU_SEQLENS = torch.tensor([0, 5, 8, 14], dtype=torch.int32)  # of the first row
ONES = torch.ones(2, LENGTH, dtype=torch.long)
TOKENS = tokens(2, LENGTH)

DECODERS = ["Llama", "Mistral", "Qwen3", "Gemma 3 text", "Llama 4 text"]
ENCODER = "BERT"
HYBRID = "Qwen3-Next (linear and full attention)"


@pytest.fixture
def nothing_left():
    yield
    is_left = attn_mask.is_installed()
    attn_mask.uninstall()
    assert not is_left
    assert "__call__" not in vars(transformers.PreTrainedModel)
    for name, function in vars(upstream).items():
        if name.startswith("create_"):
            assert getattr(function, "__module__", "").startswith(("transformers", "torch")), name
    patterns = upstream.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    assert patterns["full_attention"] is upstream.create_causal_mask


@pytest.fixture
def installed(request):
    with attn_mask.installed(**getattr(request, "param", {})):
        yield


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_named", set())
    caplog.set_level(logging.WARNING, logger="attn_mask")
    return lambda: [record.getMessage() for record in caplog.records]


def result(model, *args, **kwargs):
    with torch.no_grad():
        given = model(*args, **kwargs)
    return given.logits if hasattr(given, "logits") else given.last_hidden_state


def alone(model, rows=LENGTHS, of=TOKENS):
    """What the stock model gives for each document by itself."""
    assert not attn_mask.is_installed()
    return torch.stack(
        [
            torch.cat([result(model, part[None])[0] for part in row.split(lengths)])
            for row, lengths in zip(of, rows, strict=True)
        ]
    )


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def caches(model):
    yield {"use_cache": False}
    yield {}
    yield {CACHE: DynamicCache(config=model.config)}
    yield {CACHE: StaticCache(config=model.config, max_cache_len=20)}


WAYS = {"document_ids": IDS, "position_ids": POSITIONS, "cu_seqlens": CU_SEQLENS}


def batch_of(kind):
    """(tokens, positions, lengths): all rows of cu_seqlens are as the first."""
    rows = [0, 0] if kind == "cu_seqlens" else [0, 1]
    return TOKENS, POSITIONS[rows], [LENGTHS[row] for row in rows]


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_each_document_is_as_by_itself(name, implementation, kind):
    model = make(name, implementation)
    of, positions, lengths = batch_of(kind)
    want = alone(model, lengths, of)
    given = {"position_ids": positions}
    with attn_mask.installed():
        assert (result(model, of, **given) - want).abs().max() > 1e-3  # it leaks by itself
        with attn_mask.packed(**{kind: WAYS[kind]}):
            for mask in (None, ONES, IDS + 1):
                for cache in caches(model):
                    got = result(model, of, attention_mask=mask, **given, **cache)
                    assert_close(got, want)


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_with_tokens_in_a_cache(name, kind):
    """In one block, whose documents are those of tokens to come, too."""
    for implementation in ("eager", "sdpa"):
        model = make(name, implementation)
        of, positions, lengths = batch_of(kind)
        want = alone(model, lengths, of)
        for cache in list(caches(model))[2:]:
            with attn_mask.installed(), attn_mask.packed(**{kind: WAYS[kind]}):
                got = [
                    result(model, part, position_ids=at, **cache)
                    for part, at in zip(
                        of.split([6, 4, 1, 1, 1, 1], -1),
                        positions.split([6, 4, 1, 1, 1, 1], -1),
                        strict=True,
                    )
                ]
            assert_close(torch.cat(got, 1), want)


def test_documents_of_the_tokens_so_far():
    """Blocks around each step, with as many ids as there are tokens."""
    model = make("Mistral", "sdpa")
    want = alone(model)
    cache = DynamicCache(config=model.config)
    got = []
    with attn_mask.installed():
        for start, end in itertools.pairwise([0, 6, 10, 11, 12, 14]):
            with attn_mask.packed(document_ids=IDS[:, :end]):
                at = slice(start, end)
                got.append(
                    result(model, TOKENS[:, at], position_ids=POSITIONS[:, at], **{CACHE: cache})
                )
    assert_close(torch.cat(got, 1), want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_beside_documents(name, implementation):
    """Whatever ids padding has; chunks start after it."""
    model = make(name, implementation)
    want = alone(model)
    padded = torch.nn.functional.pad(TOKENS, (3, 0))
    shown = torch.nn.functional.pad(ONES, (3, 0))
    positions = torch.nn.functional.pad(POSITIONS, (3, 0))
    with attn_mask.installed():
        for of_padding in (0, -1):
            ids = torch.nn.functional.pad(IDS, (3, 0), value=of_padding)
            for cache in caches(model):
                with attn_mask.packed(document_ids=ids):
                    got = result(
                        model, padded, attention_mask=shown, position_ids=positions, **cache
                    )
                assert_close(got[:, 3:], want)


def test_flex_attention():
    model = make("Llama", "flex_attention")
    want = alone(make("Llama", "eager"))
    with attn_mask.installed(), attn_mask.packed(document_ids=IDS):
        assert_close(result(model, TOKENS, position_ids=POSITIONS, attention_mask=ONES), want)


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_attention_by_rule(name, kind):
    of, positions, lengths = batch_of(kind)
    want = alone(make(name, "eager"), lengths, of)
    with attn_mask.installed(), attn_mask.packed(**{kind: WAYS[kind]}):
        model = make(name, "attn_mask")
        for mask in (None, ONES):
            for cache in caches(model):
                got = result(model, of, position_ids=positions, attention_mask=mask, **cache)
                assert_close(got, want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_encoder(implementation):
    model = make(ENCODER, implementation)
    rows = [[5, 3, 6], [5, 3, 6]]
    want = alone(model, rows)
    with attn_mask.installed(), attn_mask.packed(document_ids=IDS[:1]):
        for mask in (None, ONES, IDS + 1):
            got = result(model, TOKENS, attention_mask=mask, position_ids=POSITIONS[:1])
            assert_close(got, want)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_decoder_that_attends_in_both_directions(name):
    model = copy.deepcopy(make(name, "sdpa"))
    model.config.is_causal = False
    want = alone(model)
    with attn_mask.installed(), attn_mask.packed(document_ids=IDS):
        assert_close(result(model, TOKENS, position_ids=POSITIONS, use_cache=False), want)


@pytest.mark.applies(hasattr(transformers, MODELS[HYBRID].config))
def test_a_hybrid(installed, warned):
    """Attention keeps documents apart; that its layers with a state do not is said once."""
    model = make(HYBRID, "sdpa")
    batch = {"input_ids": TOKENS, "position_ids": POSITIONS}
    with attn_mask.packed(document_ids=IDS):
        (recorded,) = testing.record_masks(model, batch)
        with pytest.raises(AssertionError, match="assert_no_leak: row 0: other tokens in document"):
            testing.assert_no_leak(model, batch, document_ids=IDS)
    want = attn_mask.boolean(attn_mask.causal() & attn_mask.documents(IDS), 2, LENGTH, LENGTH)
    assert torch.equal(recorded.mask, want)
    assert len([text for text in warned() if "layers with a state" in text]) == 1


def test_generate(installed):
    """Goes on with the last document, as it would by itself."""
    for name, implementation in (("Llama", "sdpa"), ("Mistral", "eager"), ("Llama 4 text", "sdpa")):
        model = make(name, implementation)
        options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        last = TOKENS[:1, 8:]
        want = model.generate(last, attention_mask=torch.ones_like(last), **options)[:, 6:]
        ids = torch.cat([IDS[:1], torch.full((1, 6), 2)], -1)
        positions = POSITIONS[:1]
        for static in ({}, {"cache_implementation": "static"}):
            with attn_mask.packed(document_ids=ids):
                got = model.generate(
                    TOKENS[:1],
                    attention_mask=ONES[:1],
                    position_ids=positions,
                    **options,
                    **static,
                    disable_compile=True,
                )
            assert got[:, LENGTH:].tolist() == want.tolist(), (name, static)


# Training


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "attn_mask"])
def test_a_training_step(implementation):
    """The loss over packed rows, and its gradients, are those over the documents one by one."""
    attn_mask.register_attention()  # for the documents one by one
    model = copy.deepcopy(make("Llama", implementation)).train()
    labels = TOKENS.masked_fill(POSITIONS == 0, -100)
    number = (labels != -100).sum()

    def step(of, labels, **given):
        logits = model(of, **given).logits
        # Each token is predicted by the one before it.
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    parts = [
        step(part[None], label[None])
        for row, row_labels, lengths in zip(TOKENS, labels, LENGTHS, strict=True)
        for part, label in zip(row.split(lengths), row_labels.split(lengths), strict=True)
    ]
    want = sum(parts) / number
    want_gradients = gradients(want)
    with attn_mask.installed(), attn_mask.packed(document_ids=IDS):
        got = step(TOKENS, labels, position_ids=POSITIONS, attention_mask=ONES) / number
    assert_close(got, want)
    for mine, theirs in zip(gradients(got), want_gradients, strict=True):
        assert_close(mine, theirs)


def test_checkpointed_activations(installed):
    """All of the model is run again in backward, which is in the block, too."""
    model = copy.deepcopy(make("Llama", "sdpa")).train()
    calls = []

    def run(of):
        calls.append(None)
        return model(of, position_ids=POSITIONS, use_cache=False, attention_mask=ONES).logits

    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        with attn_mask.packed(document_ids=IDS):
            logits = (
                checkpoint(run, TOKENS, use_reentrant=False) if is_checkpointed else run(TOKENS)
            )
            logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == 3
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_of_autograd(installed, monkeypatch):
    """They run what is checkpointed for another device, and know of no block but by its being the
    only one."""
    monkeypatch.setattr(packing, "_is_of_autograd", lambda: True)
    block = attn_mask.packed(document_ids=TWO)
    assert in_a_thread(ids_within) is None
    with block, block:
        assert in_a_thread(ids_within) == 1
        with (
            attn_mask.packed(document_ids=ONE),
            pytest.raises(RuntimeError, match="packed: expected one block at a time while checkp"),
        ):
            in_a_thread(ids_within)


def test_what_is_a_thread_of_autograd(installed):
    """No thread that Python code started, though it runs backward."""
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append((torch._C._current_graph_task_id() != -1, ids_within()))
            return gradient

    def run():
        Looks.apply(torch.zeros(1, requires_grad=True)).backward()

    with attn_mask.packed(document_ids=TWO):
        run()
        in_a_thread(run)
    assert seen == [(True, 1), (True, None)]


# Create functions by themselves


def config_of(implementation="sdpa", **attributes):
    return SimpleNamespace(
        _attn_implementation=implementation,
        sliding_window=WINDOW,
        attention_chunk_size=WINDOW,
        **attributes,
    )


def create(name, config=None, batch_size=2, q_length=LENGTH, mask=None, cache=None, of=None):
    embeds = torch.zeros(batch_size, q_length, 1)
    return getattr(of or upstream, name)(
        config or config_of(), embeds, mask, **{CACHE if of is None else "cache": cache}
    )


PATTERNS = {
    "create_causal_mask": lambda q, k: k <= q,
    "create_sliding_window_causal_mask": lambda q, k: q - WINDOW < k <= q,
    "create_chunked_causal_mask": lambda q, k: k <= q and q // WINDOW == k // WINDOW,
    "create_bidirectional_mask": lambda q, k: True,
    "create_bidirectional_sliding_window_mask": lambda q, k: abs(q - k) <= WINDOW,
}


@st.composite
def packings(draw):
    rows = draw(st.integers(1, 3))
    length = draw(st.integers(1, 12))
    lengths = []
    for _ in range(rows):
        borders = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
        ends = [0, *sorted(borders), length]
        lengths.append([end - start for start, end in itertools.pairwise(ends)])
    padding = draw(st.none() | st.just("ones") | st.just("left"))
    left = [draw(st.integers(0, length - 1)) if padding == "left" else 0 for _ in range(rows)]
    return lengths, length, padding, left


@settings(max_examples=30)
@given(packings(), st.sampled_from(sorted(PATTERNS)), st.sampled_from(["eager", "sdpa", "flex"]))
def test_masks_element_by_element(rows_packed, name, implementation):
    lengths, length, padding, left = rows_packed
    rows = len(lengths)
    ids = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    mask = None
    if padding is not None:
        mask = (torch.arange(length) >= torch.tensor(left)[:, None]).long()
    want = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for b, q, k in itertools.product(range(rows), range(length), range(length)):
        if ids[b, q] != ids[b, k] or k < left[b]:
            continue
        # A document that begins in left padding starts after it.
        start = max(int((ids[b] == ids[b, q]).nonzero()[0]), left[b])
        want[b, 0, q, k] = PATTERNS[name](q - start, k - start)
    full = "flex_attention" if implementation == "flex" else implementation
    with attn_mask.installed(), attn_mask.packed(document_ids=ids):
        for of in (None, masking_utils):
            got = create(name, config_of(full), rows, length, mask, of=of)
            if implementation == "flex":
                got = attn_mask.boolean(got.mask_mod, rows, length, length)
            elif implementation == "eager":
                assert got.dtype == torch.float32
                got = got == 0
            # What queries attend to that are padding does not matter.
            is_token = (torch.arange(length) >= torch.tensor(left)[:, None])[:, None, :, None]
            assert torch.equal(got & is_token, want & is_token)


def test_documents_that_come_again():
    """Ids need not be in runs: tokens of a document see it wherever it is."""
    ids = torch.tensor([[0, 1, 0, 1, 1, 0]])
    with attn_mask.installed(), attn_mask.packed(document_ids=ids):
        got = create("create_causal_mask", batch_size=1, q_length=6)
    want = (ids[0][:, None] == ids[0]).tril()
    assert torch.equal(got[0, 0], want)


def test_documents_that_are_changed_in_place(installed):
    ids = IDS.clone()
    cache = StaticCache(config=make("Llama", "sdpa").config, max_cache_len=LENGTH)
    with attn_mask.packed(document_ids=ids):
        create("create_causal_mask", cache=cache)
        ids[:, 3:] += 1
        got = create("create_causal_mask", cache=cache)
    want = attn_mask.boolean(attn_mask.causal() & attn_mask.documents(ids), 2, LENGTH, LENGTH)
    assert torch.equal(got, want)


def test_own_documents_win_in_own_functions(installed):
    embeds = torch.zeros(1, 4, 1)
    ids = torch.tensor([[0, 1, 2, 3]])
    with attn_mask.packed(document_ids=torch.zeros(1, 4, dtype=torch.long)):
        got = masking_utils.create_causal_mask(config_of(), embeds, None, None, document_ids=ids)
    assert torch.equal(got[0, 0], torch.eye(4, dtype=torch.bool))


def test_a_4d_mask_stays(installed):
    given = torch.ones(2, 1, LENGTH, LENGTH)
    with attn_mask.packed(document_ids=IDS):
        assert create("create_causal_mask", mask=given) is given


def test_options_and_registered_functions_hold():
    def mine(batch_size, q_length, kv_length, mask_function, **kwargs):
        return "mine", attn_mask.boolean(mask_function, batch_size, q_length, kv_length)

    upstream.AttentionMaskInterface._global_mapping["mine"] = mine
    try:
        with attn_mask.installed(masked_value=-3.0), attn_mask.packed(document_ids=IDS):
            name, got = create("create_causal_mask", config_of("mine"))
            eager = create("create_causal_mask", config_of("eager"))
    finally:
        del upstream.AttentionMaskInterface._global_mapping["mine"]
    want = attn_mask.boolean(attn_mask.causal() & attn_mask.documents(IDS), 2, LENGTH, LENGTH)
    assert name == "mine" and torch.equal(got, want)
    assert torch.equal(eager, torch.where(want, 0.0, -3.0))


def test_mask_functions_see_positions_in_the_document(installed):
    """Those that are given, and blocks, which stay within documents."""
    second = torch.tensor([[-1, 0, 0, -1, 0, -1]])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    embeds = torch.zeros(1, 6, 1)
    with attn_mask.packed(document_ids=ids):
        even = upstream.create_causal_mask(
            config_of(), embeds, None, None, and_mask_function=lambda b, h, q, k: k % 2 == 0
        )
        blocks = upstream.create_causal_mask(
            config_of(), embeds, None, None, block_sequence_ids=second
        )
    same = ids[0][:, None] == ids[0]
    at = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(even[0, 0], same & (at % 2 == 0) & (at <= at[:, None]))
    together = (second[0][:, None] == second[0]) & (second[0] >= 0)
    assert torch.equal(blocks[0, 0], same & (torch.ones(6, 6).tril().bool() | together))


# Flash attention, by a function that takes what it takes


def _flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    assert attention_mask is None
    b, heads, n, size = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    flat = [t.transpose(0, 1).reshape(heads, b * n, size) for t in (query, key, value)]
    sizes = cu_seq_lens_q.diff().tolist()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(sizes)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)
        for part in zip(*(t.split(sizes, 1) for t in flat), strict=True)
    ]
    out = torch.cat(parts, 1).reshape(heads, b, n, size)
    return out.permute(1, 2, 0, 3), None


@pytest.fixture
def flash(monkeypatch, installed):
    functions = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(functions, "flash_attention_2", _flash)
    model = copy.deepcopy(make("Llama", "eager"))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert model.config._attn_implementation == "flash_attention_2"
    return model


def test_flash_attention_gets_cu_seqlens(flash):
    attn_mask.uninstall()
    with attn_mask.installed(), attn_mask.packed(cu_seqlens=CU_SEQLENS):
        got = result(flash, TOKENS, position_ids=POSITIONS[:1], attention_mask=ONES)
        again = result(flash, input_ids=TOKENS, position_ids=POSITIONS[:1])
        whole = CU_SEQLENS[1:] + torch.tensor([[0], [LENGTH]])
        lengths = torch.cat([torch.zeros(1), whole.flatten()]).int()
        given = result(
            flash,
            TOKENS,
            position_ids=POSITIONS[:1],
            cu_seq_lens_q=lengths,
            cu_seq_lens_k=lengths,
            max_length_q=6,
            max_length_k=6,
        )
    with attn_mask.installed(), attn_mask.packed(cu_seqlens=CU_SEQLENS):
        want = result(make("Llama", "eager"), TOKENS, position_ids=POSITIONS[:1])
    for each in (got, again, given):
        assert_close(each, want)


def test_flash_attention_that_cannot_keep_documents_apart(flash):
    given = {"position_ids": POSITIONS, "use_cache": False}
    with (
        attn_mask.packed(document_ids=IDS),
        pytest.raises(
            ValueError, match=r"packed: expected cu_seqlens for flash .* got document_ids"
        ),
    ):
        result(flash, TOKENS, **given)
    with attn_mask.packed(cu_seqlens=CU_SEQLENS):
        with pytest.raises(ValueError, match="expected a model that takes cu_seq_lens_q"):
            flash.model.forward(TOKENS, **given)
        left = ONES.clone()
        left[0, 0] = 0
        with pytest.raises(ValueError, match="expected no padding beside documents"):
            result(flash, TOKENS, attention_mask=left, **given)
        cache = DynamicCache(config=flash.config)
        with torch.no_grad():
            for layer in range(2):
                cache.update(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), layer)
        with pytest.raises(ValueError, match="expected as many keys as queries"):
            result(flash, TOKENS[:, 4:], position_ids=POSITIONS[:, 4:], **{CACHE: cache})


# Blocks


def ids_within():
    """Which documents hold here: the number of the second token's visible keys, or None."""
    mask = create("create_causal_mask", batch_size=1, q_length=2)
    return None if mask is None else int(mask[0, 0, 1].sum())


ONE = torch.tensor([[0, 0]])
TWO = torch.tensor([[0, 1]])


def test_blocks_nest_and_end_with_an_exception(installed):
    block = attn_mask.packed(document_ids=TWO)
    with block:
        assert ids_within() == 1
        with attn_mask.packed(document_ids=ONE), block:
            assert ids_within() == 1
        with pytest.raises(ZeroDivisionError), attn_mask.packed(document_ids=ONE):
            assert ids_within() == 2
            1 / 0  # noqa: B018
        assert ids_within() == 1
    assert ids_within() is None


def test_threads_with_other_documents(installed):
    def run(number):
        ids = ONE if number % 2 else TWO
        for _ in range(50):
            with attn_mask.packed(document_ids=ids):
                assert ids_within() == 1 + number % 2
            assert ids_within() is None
        return True

    with attn_mask.packed(document_ids=ONE), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(16)))
        assert ids_within() == 2


def test_one_block_in_two_threads(installed):
    """Each leaves its own entry, in whatever order."""
    block = attn_mask.packed(document_ids=TWO)
    is_entered, is_left = threading.Event(), threading.Event()
    seen = []

    def other():
        with block:
            is_entered.set()
            is_left.wait(10)
            seen.append(ids_within())

    thread = threading.Thread(target=other)
    with block:
        thread.start()
        is_entered.wait(10)
    assert ids_within() is None
    is_left.set()
    thread.join()
    assert seen == [1]


def test_tasks_with_other_documents(installed):
    async def run(number):
        ids = ONE if number % 2 else TWO
        for _ in range(number):
            await asyncio.sleep(0)
        with attn_mask.packed(document_ids=ids):
            for _ in range(5):
                await asyncio.sleep(0)
                assert ids_within() == 1 + number % 2
        assert ids_within() is None

    async def main():
        await asyncio.gather(*map(run, range(6)))

    asyncio.run(main())


# Compiled


@pytest.fixture
def compiles():
    counts = []

    def backend(graph, inputs):
        counts.append(None)
        return graph

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    yield counts, compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Llama", "Gemma 3 text"])
def test_compiled_models(name, compiles):
    """One graph for all documents; without a block, another."""
    counts, compiled = compiles
    model = make(name, "sdpa")
    want = [alone(model), alone(model, LENGTHS[::-1])]
    run = compiled(model)
    given = {"attention_mask": ONES, "use_cache": False}
    with attn_mask.installed():
        for order in ([0, 1], [1, 0], [0, 1]):
            with attn_mask.packed(document_ids=IDS[order]):
                got = result(run, TOKENS, position_ids=POSITIONS[order], **given)
            assert_close(got, want[order[0]])
        assert len(counts) == 1
        plain = result(model, TOKENS, position_ids=POSITIONS, **given)
        assert_close(result(run, TOKENS, position_ids=POSITIONS, **given), plain)
        assert len(counts) == 2


@pytest.mark.applies(tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15))
def test_compiled_code_in_threads(installed, compiles):
    _, compiled = compiles

    def count(x):
        return x + upstream.create_causal_mask(config_of(), x, None, None).sum()

    step = compiled(count)
    zeros = torch.zeros(1, 2, 1)
    both = threading.Barrier(2)

    def run(ids):
        with attn_mask.packed(document_ids=ids):
            both.wait(60)
            return [float(step(zeros).max()) for _ in range(20)]

    with attn_mask.packed(document_ids=ONE):
        step(zeros)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [ONE, TWO])) == [[3.0] * 20, [2.0] * 20]


@pytest.mark.parametrize("option", ["position_ids", "cu_seq_lens"])
def test_compiled_models_that_are_given_documents(option, compiles):
    _, compiled = compiles
    model = make("Llama", "sdpa")
    rows = [LENGTHS[0], LENGTHS[0]]
    want = alone(model, rows)
    given = {"position_ids": POSITIONS[:1].expand(2, -1), "attention_mask": ONES}
    if option == "cu_seq_lens":
        given |= flattened(rows)
    with attn_mask.installed(packing=option):
        assert_close(result(compiled(model), TOKENS, use_cache=False, **given), want)
    assert packing.scope.traced == ()


# install(packing=...)


def flattened(rows):
    ends = torch.tensor([0, *itertools.chain(*rows)]).cumsum(0).int()
    longest = max(itertools.chain(*rows))
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@pytest.mark.parametrize("option", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", DECODERS)
def test_install_with_packing(name, option):
    for implementation in ("eager", "sdpa"):
        model = make(name, implementation)
        want = alone(model)
        given = {"position_ids": POSITIONS}
        if option == "cu_seq_lens":
            given |= flattened(LENGTHS)
        with attn_mask.installed(packing=option):
            for mask in (None, ONES, IDS + 1):
                for cache in caches(model):
                    got = result(model, TOKENS, attention_mask=mask, **given, **cache)
                    assert_close(got, want)


@pytest.mark.parametrize("name", DECODERS)
def test_positions_that_start_again_before_a_cache(name):
    """Steps after packed rows go on with each row's last document."""
    model = make(name, "sdpa")
    want = alone(model)
    for cache in list(caches(model))[2:]:
        with attn_mask.installed(packing="position_ids"):
            got = [
                result(model, part, position_ids=at, **cache)
                for part, at in zip(
                    TOKENS.split([6, 4, 1, 1, 1, 1], -1),
                    POSITIONS.split([6, 4, 1, 1, 1, 1], -1),
                    strict=True,
                )
            ]
        assert_close(torch.cat(got, 1), want)


@pytest.mark.parametrize("options", [{}, {"packing": "position_ids"}, {"packing": "cu_seq_lens"}])
@pytest.mark.parametrize("name", FAST)
def test_where_nothing_is_packed_masks_are_the_releases(name, options):
    """The very masks, and None where there is none."""
    if MODELS[name].inputs == "encoder and decoder":
        return
    for implementation in ("eager", "sdpa"):
        model = make(name, implementation)
        left = ONES.clone()
        left[0, :3] = 0
        for more in ({}, {"attention_mask": ONES}, {"attention_mask": left}):
            batch = {"input_ids": TOKENS, **more}
            want = testing.record_masks(model, batch)
            with attn_mask.installed(**options):
                got = testing.record_masks(model, batch)
            assert len(got) == len(want) > 0
            for ours, theirs in zip(got, want, strict=True):
                if theirs.mask is None:
                    assert ours.mask is None
                else:
                    assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.parametrize("name", DECODERS)
def test_the_default_is_the_releases_answer_for_packed_rows(name):
    model = make(name, "sdpa")
    for more in ({}, {"use_cache": False}, {"attention_mask": ONES}, {"attention_mask": IDS + 1}):
        batch = {"input_ids": TOKENS, "position_ids": POSITIONS, **more}
        testing.assert_same_masks(model, batch)


def test_a_model_within_a_model_has_no_documents():
    """That it is given none says that its tokens are others."""

    class Within(type(make("Llama", "sdpa"))):
        def forward(self, *args, **kwargs):
            kwargs.pop("cu_seq_lens_q")
            seen.append(ids_within())
            inner(ONE)
            return super().forward(*args, **kwargs)

    class Inner(type(make("Llama", "sdpa"))):
        def forward(self, *args, **kwargs):
            seen.append(ids_within())

    seen = []
    model = make("Llama", "sdpa")
    outer, inner = Within(model.config).eval(), Inner(model.config).eval()
    with attn_mask.installed(packing="cu_seq_lens"):
        outer(ONE, cu_seq_lens_q=torch.tensor([0, 1, 2]))
        assert ids_within() is None
    assert seen == [1, None]


# What is said


def restarting(**given):
    return {"position_ids": POSITIONS, **given}


def test_positions_that_are_not_looked_at_are_named_once(installed, warned):
    model = make("Llama", "sdpa")
    result(model, TOKENS, **restarting(use_cache=False))  # looked at
    result(model, TOKENS)
    assert warned() == []
    for more in ({"attention_mask": ONES}, {}, {"attention_mask": ONES}):
        result(model, TOKENS, **restarting(**more))
    (text,) = warned()
    assert "position_ids start again within a row, beside a cache or an attention_mask" in text
    assert "attn_mask.packed" in text


def test_positions_of_padding_are_not_named(installed, warned):
    left = ONES.clone()
    left[0, :3] = 0
    left[1, :1] = 0
    positions = (left.cumsum(-1) - 1).masked_fill(left == 0, 1)
    result(make("Llama", "sdpa"), TOKENS, attention_mask=left, position_ids=positions)
    assert warned() == []


@pytest.mark.parametrize("options", [{"packing": "position_ids"}, None])
def test_nothing_is_named_where_documents_are_kept_apart(options, warned):
    model = make("Llama", "sdpa")
    with attn_mask.installed(**(options or {})):
        if options:
            result(model, TOKENS, **restarting(attention_mask=IDS + 1))
        else:
            with attn_mask.packed(document_ids=IDS):
                result(model, TOKENS, **restarting(attention_mask=IDS + 1))
    assert [text for text in warned() if "start again" in text] == []


def test_nothing_is_named_while_tracing(installed, warned, compiles):
    _, compiled = compiles
    result(compiled(make("Llama", "sdpa")), TOKENS, **restarting(attention_mask=ONES))
    assert warned() == []


# Bad input


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, ValueError, "packed: expected one of position_ids, .* but got none"),
        (
            {"position_ids": POSITIONS, "document_ids": IDS},
            ValueError,
            "packed: expected one of .*, but got position_ids and document_ids",
        ),
        ({"document_ids": IDS.float()}, TypeError, "expected document_ids to hold signed integers"),
        ({"document_ids": IDS.bool()}, TypeError, "document_ids to hold .*, but got torch.bool"),
        ({"position_ids": IDS.byte()}, TypeError, "expected position_ids to hold signed integers,"),
        ({"cu_seqlens": [0, 2]}, TypeError, "expected cu_seqlens to be a tensor, but got list"),
        ({"document_ids": IDS[0]}, ValueError, r"document_ids to be 2-D .*, but got \[14\]"),
        ({"position_ids": IDS[None]}, ValueError, "position_ids to be 2-D"),
        ({"cu_seqlens": IDS}, ValueError, r"expected cu_seqlens to be 1-D \[documents \+ 1\]"),
    ],
)
def test_bad_documents(given, error, match):
    with pytest.raises(error, match=match):
        attn_mask.packed(**given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"document_ids": IDS[:, :9]}, r"packed: expected document_ids to be of length 14, .* 9\]"),
        ({"document_ids": IDS.repeat(1, 2)}, r"document_ids to be of length 14, for all tokens"),
        ({"position_ids": IDS[[0, 0, 0]]}, r"expected position_ids to be \[2, length\]"),
        ({"cu_seqlens": CU_SEQLENS[:-1]}, "rise from 0 to the number of tokens 14, but got"),
        ({"cu_seqlens": CU_SEQLENS * 2}, "cu_seqlens to rise from 0 to the number of tokens 14"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 14])}, "expected cu_seqlens to rise from 0"),
    ],
)
def test_documents_that_do_not_match_the_batch(given, match, installed):
    with attn_mask.packed(**given), pytest.raises(ValueError, match=match):
        create("create_causal_mask")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"document_ids": IDS[:, :9]}, "document_ids to be of length at least 14"),
        ({"cu_seqlens": CU_SEQLENS[:-1]}, "rise from 0 to at least the number of tokens 14"),
    ],
)
def test_documents_that_end_before_the_tokens_of_a_cache(given, match, installed):
    cache = DynamicCache(config=make("Llama", "sdpa").config)
    with attn_mask.packed(**given), pytest.raises(ValueError, match=match):
        create("create_causal_mask", cache=cache)


def test_attention_without_a_mask(installed):
    with attn_mask.packed(document_ids=IDS):
        with pytest.raises(ValueError, match=r"expected attention that takes a mask, .* 'nobodys'"):
            create("create_causal_mask", config_of("nobodys"))
        with pytest.raises(ValueError, match="no packed documents beside encoder_hidden_states"):
            upstream.create_bidirectional_mask(
                config_of(), torch.zeros(2, 3, 1), None, torch.zeros(2, LENGTH, 1)
            )


def test_cu_seq_lens_that_do_not_match():
    model = make("Llama", "sdpa")
    cache = DynamicCache(config=model.config)
    with attn_mask.installed(packing="cu_seq_lens"):
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM: expected cu_seq_lens_q to rise .* 28"
        ):
            result(model, TOKENS, cu_seq_lens_q=CU_SEQLENS)
        result(model, TOKENS, **{CACHE: cache})
        with pytest.raises(
            ValueError, match="expected no tokens in the cache beside cu_seq_lens_q"
        ):
            result(model, TOKENS, cu_seq_lens_q=CU_SEQLENS, **{CACHE: cache})


def test_install_within_a_block(installed):
    with attn_mask.packed(document_ids=IDS):
        for function in (attn_mask.install, attn_mask.uninstall):
            with pytest.raises(
                ValueError, match=f"{function.__name__}: expected to be called outside .*packed"
            ):
                function()
        assert attn_mask.is_installed()


def test_a_block_without_install():
    with pytest.raises(ValueError, match=r"packed: expected attn_mask.install\(\) before"):
        attn_mask.packed(document_ids=IDS).__enter__()


def test_a_block_in_compiled_code(installed, compiles):
    _, compiled = compiles

    def step(x):
        with attn_mask.packed(document_ids=ONE):
            return x + 1

    with pytest.raises(Exception, match="packed: expected to be entered outside compiled code"):
        compiled(step)(torch.zeros(1))


@pytest.mark.parametrize("function", [attn_mask.install, attn_mask.installed])
def test_other_packing(function):
    with pytest.raises(
        ValueError, match=r"expected packing to be one of 'upstream', .* got 'other'"
    ):
        function(packing="other")


@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens", "block"])
def test_rows_that_were_packed_here(way):
    """Padding at the end of rows is nobody's."""
    sequences = [tokens(1, n)[0] for n in (5, 3, 6, 4)]
    collate = attn_mask.data.PackingCollator(
        10, return_document_ids=True, return_flash_attn_kwargs=way == "cu_seq_lens"
    )
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    ids = batch.pop("document_ids")
    assert ids.shape == (2, 10) and (ids < 0).any()
    model = make("Llama 4 text", "sdpa")
    alone_by_length = {len(sequence): result(model, sequence[None])[0] for sequence in sequences}
    options = {} if way == "block" else {"packing": way}
    block = attn_mask.packed(document_ids=ids) if way == "block" else contextlib.nullcontext()
    with attn_mask.installed(**options), block:
        got = result(model, **batch)
        testing.assert_no_leak(model, batch, document_ids=ids)
    for row in range(2):
        for document in ids[row].unique().tolist():
            if document >= 0:
                part = got[row][ids[row] == document]
                assert_close(part, alone_by_length[len(part)])
