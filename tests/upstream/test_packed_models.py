"""Packed rows in models with images, in models that pass no position_ids on, and what leaks."""

import functools
import gc
import itertools
import logging

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, testing
from attn_mask._core import log_once
from attn_mask._transformers import writers as upstream_masks
from models import IMAGE, MODELS, RELEASE, SMALL, Model, make, tokens, transformers

pytestmark = [
    pytest.mark.applies(RELEASE >= (5, 24)),
    pytest.mark.usefixtures("one_thread", "nothing_left"),
]
if RELEASE >= (5, 24):
    from transformers import DynamicCache, StaticCache
    from transformers import masking_utils as upstream

LENGTHS = [[5, 3, 6], [2, 7, 5]]
LENGTH = 14
IDS = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
ONES = torch.ones(2, LENGTH, dtype=torch.long)
TOKENS = tokens(2, LENGTH)


@pytest.fixture
def nothing_left():
    yield
    gc.collect()
    is_left = attn_mask.is_installed()
    attn_mask.uninstall()
    assert not is_left
    assert "__call__" not in vars(transformers.PreTrainedModel)


@pytest.fixture
def installed():
    with attn_mask.installed():
        yield


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_named", set())
    caplog.set_level(logging.WARNING, logger="attn_mask")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "attn_mask"]


def result(model, *args, **kwargs):
    with torch.no_grad():
        given = model(*args, **kwargs)
    return given.logits if hasattr(given, "logits") else given.last_hidden_state


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# Images. One of so many tokens is in the first document of the first row, and so on.

IN_IMAGE = 3
STARTS = [[1, 9], [3, 10]]
IS_IMAGE = torch.zeros(2, LENGTH, dtype=torch.long)
for _row, _starts in enumerate(STARTS):
    for _start in _starts:
        IS_IMAGE[_row, _start : _start + IN_IMAGE] = 1
WITH_IMAGES = TOKENS.clamp(min=7).masked_fill(IS_IMAGE == 1, IMAGE)


@functools.cache
def gemma_4(implementation):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4}
    text = {
        **sizes,
        "num_key_value_heads": 2,
        "vocab_size": SMALL["vocab_size"],
        "vocab_size_per_layer_input": SMALL["vocab_size"],
        "hidden_size_per_layer_input": 4,
        "global_head_dim": 8,
        "sliding_window": 4,
        "use_bidirectional_attention": "vision",
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    }
    vision = {"num_key_value_heads": 4, "patch_size": 2, "pooling_kernel_size": 2}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**sizes, **vision, "position_embedding_size": 8},
        audio_config=None,
        image_token_id=IMAGE,
        boi_token_id=1,
        eoi_token_id=2,
        video_token_id=5,
        audio_token_id=6,
    )
    torch.manual_seed(0)
    architecture = transformers.Gemma4ForConditionalGeneration
    return architecture._from_config(config, attn_implementation=implementation).eval()


PIXELS = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(3))
PATCHES = torch.tensor([[x, y] for y in range(2) for x in range(6)]).repeat(4, 1, 1)


def of_gemma_4(of, is_image, images):
    given = {"input_ids": of, "mm_token_type_ids": is_image}
    if len(PIXELS[images]):
        given |= {"pixel_values": PIXELS[images], "image_position_ids": PATCHES[images]}
    return given


def of_gemma_3(of, is_image, images):
    # Embeddings that stand for images: its encoder makes no mask.
    return {"input_ids": of.masked_fill(is_image == 1, 8), "token_type_ids": is_image}


WITH_BLOCKS = {
    "Gemma 3": (lambda how: make("Gemma 3 with images", how), of_gemma_3),
    "Gemma 4": (gemma_4, of_gemma_4),
}


def each_alone(model, inputs):
    parts, first = [], 0
    for row, lengths in enumerate(LENGTHS):
        pairs = zip(WITH_IMAGES[row].split(lengths), IS_IMAGE[row].split(lengths), strict=True)
        for of, is_image in pairs:
            images = slice(first, first + int(is_image.sum()) // IN_IMAGE)
            first = images.stop
            parts.append(result(model, **inputs(of[None], is_image[None], images))[0])
    return torch.cat(parts).unflatten(0, (2, LENGTH))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "attn_mask"])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_images_in_packed_rows(name, implementation):
    """Each sees itself, and no other; the encoder of images has no part in the documents."""
    made, inputs = WITH_BLOCKS[name]
    want = each_alone(made("eager"), inputs)
    given = inputs(WITH_IMAGES, IS_IMAGE, slice(None))
    attn_mask.register_attention()
    model = made(implementation)
    more = [{}, {"use_cache": False}, {"attention_mask": ONES}]
    with attn_mask.installed():
        leaking = result(model, **given, position_ids=POSITIONS, use_cache=False)
        assert (leaking - want).abs().max() > 1e-2
        for block in ({"document_ids": IDS}, {"position_ids": POSITIONS}):
            with attn_mask.packed(**block):
                for options in more:
                    got = result(model, **given, position_ids=POSITIONS, **options)
                    assert_close(got, want)
    with attn_mask.installed(packing="position_ids"):
        for options in more:
            assert_close(result(model, **given, position_ids=POSITIONS, **options), want)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_images_where_transformers_finds_documents(name, warned):
    """Its own answer, bit for bit, and a warning that names the way out."""
    made, inputs = WITH_BLOCKS[name]
    model = made("sdpa")
    given = inputs(WITH_IMAGES, IS_IMAGE, slice(None))
    packed = {"position_ids": POSITIONS, "use_cache": False}
    stock = result(model, **given, **packed)
    without_images = inputs(TOKENS.clamp(min=7), torch.zeros_like(IS_IMAGE), slice(0))
    with attn_mask.installed():
        result(model, **given, use_cache=False)
        result(model, **without_images, **packed)
        assert warned() == []
        for _ in range(2):
            assert torch.equal(result(model, **given, **packed), stock)
    (text,) = warned()
    assert "tokens are of one image" in text and "attn_mask.packed(document_ids=...)" in text


def config_of(implementation="sdpa", **more):
    return transformers.LlamaConfig(attn_implementation=implementation, **more)


def elements(visible, ids):
    """By loops: a mask [b, 1, n, n] of what is visible within a document."""
    b, n = ids.shape
    mask = torch.zeros(b, 1, n, n, dtype=torch.bool)
    for row, q, k in itertools.product(range(b), range(n), range(n)):
        mask[row, 0, q, k] = bool(ids[row, q] == ids[row, k]) and visible(row, q, k)
    return mask


TABLES = {
    "blocks": lambda table: attn_mask.blockwise(table),
    "documents": lambda table: attn_mask.documents(table),
    "padding": lambda table: attn_mask.padding(table > 0),
    "positions": lambda table: attn_mask.rules.reindex(attn_mask.causal(), table),
    "bits": lambda table: attn_mask.bits(table[:, None, :, None] == table[:, None, None]),
}
AT = {
    "blocks": lambda t, q, k: t[q] == t[k] and t[q] >= 0,
    "documents": lambda t, q, k: t[q] == t[k],
    "padding": lambda t, q, k: t[k] > 0,
    "positions": lambda t, q, k: t[k] <= t[q],
    "bits": lambda t, q, k: t[q] == t[k],
}


@pytest.mark.parametrize("way", ["packed", "document_ids"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_tokens_are_looked_up_by_row(name, way, installed):
    """Whatever a mask function holds of tokens; functions without tables see positions."""
    table = torch.randint(-1, 3, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    embeds = torch.zeros(2, LENGTH, 1)
    at = AT[name]

    def visible(row, q, k):
        p, r = POSITIONS[row, q], POSITIONS[row, k]
        return (k <= q or bool(at(table[row], q, k))) and p - 4 < r and int(r) % 3 != 1

    functions = {
        "or_mask_function": TABLES[name](table),
        "and_mask_function": masking_utils.and_masks(
            masking_utils.sliding_window_overlay(4), lambda b, h, q, k: k % 3 != 1
        ),
    }
    if way == "packed":
        with attn_mask.packed(document_ids=IDS):
            got = upstream.create_causal_mask(config_of(), embeds, None, None, **functions)
    else:
        got = masking_utils.create_causal_mask(
            config_of(), embeds, None, None, **functions, document_ids=IDS
        )
    assert torch.equal(got, elements(visible, IDS))


# Models whose create calls get no position_ids

MODELS["BioGPT"] = Model("BioGptConfig", "BioGptForCausalLM")
PASS_NONE = {
    "GPT-OSS": ["eager", "attn_mask"],
    "OPT": ["eager", "sdpa"],
    "BioGPT": ["eager", "sdpa"],
    "BERT": ["eager", "sdpa"],
}


def alone(model):
    return torch.stack(
        [
            torch.cat([result(model, part[None])[0] for part in row.split(lengths)])
            for row, lengths in zip(TOKENS, LENGTHS, strict=True)
        ]
    )


@pytest.mark.parametrize("name", PASS_NONE)
def test_position_ids_of_the_model_that_is_called(name, warned):
    want = alone(make(name, "eager"))
    attn_mask.register_attention()
    for implementation in PASS_NONE[name]:
        model = make(name, implementation)
        with attn_mask.installed(packing="position_ids"):
            for more in ({}, {"attention_mask": ONES}, {"attention_mask": IDS + 1}):
                assert_close(result(model, TOKENS, position_ids=POSITIONS, **more), want)
            if name == "GPT-OSS":  # (input_ids, attention_mask, position_ids)
                assert_close(result(model, TOKENS, ONES, POSITIONS), want)
                assert_close(result(model.model, TOKENS, ONES, POSITIONS) @ head(model), want)
            explained = attn_mask.explain_model(model)
        for layers in explained.layers:
            assert layers.documents == "by the position_ids that the model is called with"
            assert layers.documents in str(explained)
    assert [text for text in warned() if "without position_ids" in text] == []


def head(model):
    return model.lm_head.weight.T


@pytest.mark.parametrize("name", ["GPT-OSS", "OPT"])
def test_steps_go_on_with_the_last_document(name):
    model = make(name, "eager")
    want = alone(model)
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=20),
    ):
        with attn_mask.installed(packing="position_ids"):
            got = [
                result(model, part, position_ids=at, cache=cache)
                for part, at in zip(
                    TOKENS.split([6, 4, 1, 1, 1, 1], -1),
                    POSITIONS.split([6, 4, 1, 1, 1, 1], -1),
                    strict=True,
                )
            ]
        assert_close(torch.cat(got, 1), want)


def test_compiled_models_that_pass_none():
    torch._dynamo.reset()
    model = make("OPT", "sdpa")
    want = alone(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with attn_mask.installed(packing="position_ids"):
        assert_close(result(compiled, TOKENS, position_ids=POSITIONS, use_cache=False), want)
    torch._dynamo.reset()


class Outer(transformers.PreTrainedModel):
    """Models within a model that is given position_ids."""

    config_class = transformers.LlamaConfig

    def __init__(self, inner, call):
        super().__init__(transformers.LlamaConfig())
        self.inner, self.call = inner, call

    def forward(self, input_ids=None, position_ids=None):
        return self.call(input_ids)


class Images(transformers.PreTrainedModel):
    """An encoder with as many patches as there are tokens."""

    config_class = transformers.LlamaConfig

    def forward(self, pixel_values, **kwargs):
        return upstream.create_bidirectional_mask(config_of("eager"), pixel_values, None)


def test_the_outermost_models_count_and_not_for_images():
    inner = make("OPT", "sdpa")
    images = Images(transformers.LlamaConfig())
    encoded = []

    def call(of):
        encoded.append(images(torch.zeros(2, LENGTH, 4)))
        return inner(of)

    outer = Outer(inner, call)
    given = {"input_ids": TOKENS, "position_ids": POSITIONS}
    causal = attn_mask.causal()
    want = attn_mask.boolean(causal & attn_mask.documents(IDS), 2, LENGTH, LENGTH)
    with attn_mask.installed(packing="position_ids"):
        by_name = [m.mask for m in testing.record_masks(outer, given)]
        assert len(by_name) == 2 and all(torch.equal(mask, want) for mask in by_name)
        assert torch.equal(result(outer, TOKENS, POSITIONS), result(outer, **given))
        assert encoded and all(mask is None for mask in encoded)
    encoded.clear()
    with attn_mask.installed(), attn_mask.packed(document_ids=IDS):
        seen = [m.mask for m in testing.record_masks(outer, given)]
        assert all(torch.equal(mask, want) for mask in seen)
        assert encoded == [None]


def test_no_position_ids_anywhere_are_named_once(warned):
    for name in ("GPT-OSS", "OPT", "BERT"):
        model = make(name, "eager")
        with attn_mask.installed(packing="position_ids"):
            if name != "BERT":
                cache = DynamicCache(config=model.config)
                result(model, TOKENS, cache=cache)
                result(model, TOKENS[:, :1], cache=cache)
            result(model, TOKENS, position_ids=POSITIONS)
            assert [text for text in warned() if "without position_ids" in text] == []
            for _ in range(2):
                result(model, TOKENS, **({} if name == "BERT" else {"use_cache": False}))
        (text,) = [text for text in warned() if "without position_ids" in text]
        assert f"of {model.config.model_type} was called" in text
        assert "attn_mask.packed(document_ids=...)" in text
        log_once._named.clear()
        warned.__closure__[0].cell_contents.clear()


def test_nothing_is_named_of_encoders_of_images(warned):
    given = of_gemma_4(WITH_IMAGES, IS_IMAGE, slice(None))
    with attn_mask.installed(packing="position_ids"):
        result(gemma_4("sdpa"), **given, use_cache=False)
    assert warned() == []


def test_status_says_what_layers_got(monkeypatch):
    monkeypatch.setattr(upstream_masks, "_got", got := {})
    assert attn_mask.status().packing is None
    with attn_mask.installed(packing="position_ids"):
        status = attn_mask.status()
        assert status.packing == "position_ids" and "\npacking: 'position_ids'\n" in str(status)
        result(make("Llama", "sdpa"), TOKENS, position_ids=POSITIONS)
        result(make("OPT", "sdpa"), TOKENS, position_ids=POSITIONS)
        result(make("BERT", "sdpa"), TOKENS)
        with attn_mask.packed(document_ids=IDS):
            result(make("Mistral", "sdpa"), TOKENS)
        status = attn_mask.status()
    assert status.documents == (
        "bert, create_bidirectional_mask: nothing",
        "llama, create_causal_mask: position_ids of its calls",
        "mistral, create_sliding_window_causal_mask: packed(document_ids)",
        "opt, create_causal_mask: position_ids of the model's calls",
    )
    assert "\n  opt, create_causal_mask: position_ids of the model's calls\n" in str(status)
    assert len(got) == 4


EXPLAINED = {
    ("Llama", "position_ids"): "by the position_ids of its create call",
    ("Mistral", "position_ids"): "by the position_ids of its create call",
    ("GPT-OSS", "position_ids"): "by the position_ids that the model is called with",
    ("Gemma 3 with images", "position_ids"): "by the position_ids of its create call",
    ("OPT", "cu_seq_lens"): "by the cu_seq_lens_q that the model is called with",
    ("Llama", "packed"): "by packed(document_ids)",
    ("GPT-OSS", "upstream"): "",
}


@pytest.mark.parametrize(("name", "how"), EXPLAINED)
def test_explain_model_says_what_layers_get(name, how):
    model = make(name, "eager")
    if how == "packed":
        with attn_mask.installed(), attn_mask.packed(document_ids=IDS):
            explained = attn_mask.explain_model(model)
    else:
        with attn_mask.installed(packing=how):
            explained = attn_mask.explain_model(model)
    for layers in explained.layers:
        want = EXPLAINED[name, how]
        if layers.config == "vision_config":
            want = "none, for its tokens are no text"
        assert layers.documents == want
        assert str(layers).endswith(f"; packed documents: {want}") == bool(want)


# Documents that are written where torch does not count it


def by_data(tensor, values):
    tensor.data.copy_(values)


def by_numpy(tensor, values):
    tensor.numpy()[:] = values.numpy()


def in_inference_mode(tensor, values):
    with torch.inference_mode():
        tensor.copy_(values)


# Each time what is given, and the ids that it means.
WRITTEN = {
    "document_ids": [
        ([[0, 0, 0, 1, 1, 1, 1, 1]], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([[0, 0, 0, 0, 0, 0, 1, 1]], [0, 0, 0, 0, 0, 0, 1, 1]),
        ([[0, 1, 1, 0, 0, 1, 1, 1]], [0, 1, 1, 0, 0, 1, 1, 1]),
    ],
    "position_ids": [
        ([[0, 1, 2, 0, 1, 2, 3, 4]], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([[0, 1, 2, 3, 4, 5, 0, 1]], [0, 0, 0, 0, 0, 0, 1, 1]),
    ],
    "cu_seqlens": [([0, 3, 8], [0, 0, 0, 1, 1, 1, 1, 1]), ([0, 6, 8], [0, 0, 0, 0, 0, 0, 1, 1])],
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attn_mask"])
@pytest.mark.parametrize("name", ["create_causal_mask", "create_chunked_causal_mask"])
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("write", [by_data, by_numpy, in_inference_mode])
def test_documents_that_are_written_in_the_block(write, kind, name, implementation, installed):
    config = config_of(implementation, attention_chunk_size=4)
    cache = StaticCache(config=make("Llama", "sdpa").config, max_cache_len=10)
    with torch.inference_mode(write is in_inference_mode):
        tensor = torch.tensor(WRITTEN[kind][0][0])
    assert tensor.is_inference() == (write is in_inference_mode)
    with attn_mask.packed(**{kind: tensor}):
        for values, ids in WRITTEN[kind]:
            write(tensor, torch.tensor(values))
            begins = [0]
            for i in range(1, 8):
                begins.append(begins[-1] if ids[i] == ids[i - 1] else i)

            def visible(row, q, k, begins=begins):
                chunks = [(i - begins[i]) // 4 for i in (q, k)]
                return k <= q and (name == "create_causal_mask" or chunks[0] == chunks[1])

            for _ in range(2):
                got = getattr(upstream, name)(config, torch.zeros(1, 8, 1), None, cache)
                got = got.to_dense() if hasattr(got, "rule") else got
                got = got == 0 if got.dtype != torch.bool else got
                assert torch.equal(got[..., :8], elements(visible, torch.tensor([ids])))
                assert not got[..., 8:].any()


# Create functions that install() does not reach


if RELEASE >= (5, 24):
    held = {"create": upstream.create_causal_mask, "flex": upstream.create_causal_mask}


def wrapper_of_a_user(*args, **kwargs):
    return held["create"](*args, **kwargs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "attn_mask"])
def test_a_create_function_wrapped_before_install(implementation, installed):
    config, embeds = config_of(implementation), torch.zeros(2, LENGTH, 8)
    match = rf"packed: expected masks by the create .* but {__name__}.wrapper_of_a_user makes"
    wrapper_of_a_user(config, embeds, None, None)
    with attn_mask.packed(document_ids=IDS), pytest.raises(ValueError, match=match):
        wrapper_of_a_user(config, embeds, None, None)
    match = rf"packed: .* but {__name__}.Holder.mask makes"
    with attn_mask.packed(document_ids=IDS), pytest.raises(ValueError, match=match):
        Holder().mask(config, embeds)
    # Ours, and the mirror's, keep them apart.
    with attn_mask.packed(document_ids=IDS):
        assert upstream.create_causal_mask(config, embeds, None, None) is not None
        if implementation != "attn_mask":
            assert masking_utils.create_causal_mask(config, embeds, None, None) is not None


class Holder:
    def mask(self, config, embeds):
        return functools.partial(held["create"], config)(embeds, None, None)


def test_a_create_function_that_was_patched(monkeypatch):
    """Models call the user's, which stays in transformers and calls transformers' own."""
    model = make("Llama", "sdpa")
    monkeypatch.setattr(upstream, "create_causal_mask", wrapper_of_a_user)
    modeling = __import__("sys").modules[type(model).__module__]
    monkeypatch.setattr(modeling, "create_causal_mask", wrapper_of_a_user)
    match = rf"packed: .* but {__name__}.wrapper_of_a_user makes one without documents"
    with attn_mask.installed():
        result(model, TOKENS)
        with attn_mask.packed(document_ids=IDS), pytest.raises(ValueError, match=match):
            result(model, TOKENS, attention_mask=ONES)
        result(model, TOKENS)


def test_a_wrapped_create_function_in_compiled_code(installed):
    torch._dynamo.reset()

    config = config_of()

    def step(x):
        return x + wrapper_of_a_user(config, x, ONES, None).sum()

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with attn_mask.packed(document_ids=IDS), pytest.raises(Exception, match="expected masks by"):
        compiled(torch.zeros(2, LENGTH, 1))
    torch._dynamo.reset()


# Bad input


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["document_ids", "position_ids", "cu_seqlens"])
def test_tensors_without_values_and_of_other_layouts(kind):
    tensor = IDS[0] if kind == "cu_seqlens" else IDS
    with pytest.raises(ValueError, match=f"packed: expected {kind} to hold values, but got .*meta"):
        attn_mask.packed(**{kind: tensor.to("meta")})
    with pytest.raises(TypeError, match=rf"packed: expected {kind} to be a strided .*sparse_coo"):
        attn_mask.packed(**{kind: tensor.to_sparse()})
    nested = torch.nested.nested_tensor([IDS[0, :2], IDS[0, :3]])
    with pytest.raises(TypeError, match=f"packed: expected {kind} to be a strided .*nested"):
        attn_mask.packed(**{kind: nested})


def test_a_model_on_meta_takes_documents_of_a_cpu(installed):
    with attn_mask.packed(document_ids=IDS):
        embeds = torch.zeros(2, LENGTH, 1, device="meta")
        got = upstream.create_causal_mask(config_of(), embeds, None, None)
    assert got.is_meta and got.shape == (2, 1, LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("packed", lambda: attn_mask.packed(document_ids=IDS)),
        ("installed", attn_mask.installed),
        ("aten_only", attn_mask.aten_only),
    ],
)
def test_blocks_that_are_left_and_were_not_entered(name, made):
    match = f"{name}: expected __enter__ before __exit__, but got __exit__ alone"
    block = made()
    with pytest.raises(RuntimeError, match=match):
        block.__exit__(None, None, None)
    with attn_mask.installed():
        with block:
            pass
        with pytest.raises(RuntimeError, match=match):
            block.__exit__(None, None, None)
