"""Models that do more with their masks than hand them on, with attn_implementation="attn_mask"."""

import copy
import re

import attn_mask
import pytest
import torch
from models import RELEASE, SMALL, WINDOW, padding, tokens

transformers = pytest.importorskip("transformers", reason="its models are run")
theirs = pytest.importorskip("transformers.masking_utils")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "under"),
    pytest.mark.applies(RELEASE >= (5, 24)),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(params=["registered", "installed"])
def under(request):
    if request.param == "installed":
        with attn_mask.installed():
            yield
    else:
        attn_mask.register_attention()
        yield


LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
TEXT = {**SMALL, **LOCAL, "query_pre_attn_scalar": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def bloom():
    """Adds its mask to its scores, whatever the attention is called."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = transformers.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0)
    return transformers.BloomForCausalLM, config, {}


def doge():
    """Leaves out BlockMasks, and compares other masks with 0."""
    config = transformers.DogeConfig(**SMALL, keep_window_size=WINDOW)
    return transformers.DogeForCausalLM, config, {}


def t5gemma2():
    """Joins the masks of self-attention and cross-attention by torch.cat."""
    encoder = {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}
    config = transformers.T5Gemma2Config(
        encoder=encoder, decoder=TEXT, image_token_index=60, eos_token_id=None
    )
    given = {"decoder_input_ids": tokens(length=5)}
    return transformers.T5Gemma2ForConditionalGeneration, config, given


def gemma4_audio():
    """Pads its mask with the lowest number of the mask's dtype."""
    from transformers.models.gemma4 import modeling_gemma4

    config = transformers.Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        output_proj_dims=16,
        attention_chunk_size=4,
        attention_context_left=5,
        attention_context_right=2,
    )
    features = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(2))
    shown = torch.ones(2, 40, dtype=torch.bool)
    shown[0, 30:] = False
    given = {"input_features": features, "attention_mask": shown, "input_ids": None}
    return modeling_gemma4.Gemma4AudioModel, config, given


def splinter():
    """Has eager attention alone, and modules that do not say whether they are causal."""
    config = transformers.SplinterConfig(**{**SMALL, "num_key_value_heads": 4}, type_vocab_size=2)
    return transformers.SplinterModel, config, {}


def gpt_oss():
    """Has sinks."""
    config = transformers.GptOssConfig(**SMALL, **LOCAL, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM, config, {}


def llama():
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL), {}


def mistral():
    config = transformers.MistralConfig(**SMALL, sliding_window=WINDOW)
    return transformers.MistralForCausalLM, config, {}


class ComparesMasks(transformers.LlamaPreTrainedModel):
    """As remote code: a boolean mask, compared with 0 and read by elements."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 8)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        mask = theirs.create_causal_mask(
            self.config, x, attention_mask, None, allow_is_causal_skip=False
        )
        visible = (mask != 0)[:, 0]
        scores = torch.where(mask[:, 0] == 0, -torch.inf, x @ x.transpose(1, 2))
        rows = visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~rows, 0.0)
        return (scores.softmax(-1) @ x,)


def remote_code():
    return ComparesMasks, transformers.LlamaConfig(**SMALL), {}


# With the attention that is the oracle.
CASES = {
    bloom: "eager",
    doge: "sdpa",
    t5gemma2: "sdpa",
    gemma4_audio: "eager",
    splinter: "eager",
    gpt_oss: "eager",
    llama: "sdpa",
    mistral: "sdpa",
    remote_code: "sdpa",
}
LANGUAGE = [bloom, doge, t5gemma2, gpt_oss, llama, mistral]
several = pytest.mark.parametrize("of", CASES, ids=lambda of: of.__name__)


def both(of):
    """With the oracle's attention and with ours, the same weights."""
    architecture, config, given = of()
    models = []
    for implementation in (CASES[of], "attn_mask"):
        torch.manual_seed(0)
        model = architecture._from_config(copy.deepcopy(config), attn_implementation=implementation)
        models.append(model.eval())
    given = {"input_ids": tokens(), **given}
    return *models, {name: value for name, value in given.items() if value is not None}


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@several
def test_results_are_those_of_the_oracle(of):
    oracle, ours, given = both(of)
    ours = copy.deepcopy(ours)
    for side in ("left", "right", "none"):
        case = dict(given)
        if "attention_mask" not in given and side != "none":
            case["attention_mask"] = padding(side)
        with torch.no_grad():
            assert_close(ours(**case)[0], oracle(**case)[0])


@several
def test_compiled(of):
    oracle, ours, given = both(of)
    given.setdefault("attention_mask", padding("left"))
    with torch.no_grad():
        ours(**given)  # some keep properties, which they can't begin to do in a graph
    torch._dynamo.reset()
    compiled = torch.compile(lambda **case: ours(**case)[0], backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**given), oracle(**given)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("of", [bloom, mistral, gpt_oss], ids=lambda of: of.__name__)
def test_compiled_without_a_mask(of):
    """What eager attention can't leave out, as is_causal stands in for it elsewhere."""
    oracle, ours, given = both(of)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **case: ours(**case)[0], backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(**given), oracle(**given)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("of", [doge, mistral, bloom], ids=lambda of: of.__name__)
def test_compiled_layers(of):
    """Layer by layer, whose masks are arguments of a graph."""
    oracle, ours, given = both(of)
    given["attention_mask"] = padding("left")
    torch._dynamo.reset()
    stack = next(m for m in ours.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in stack:
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(ours(**given)[0], oracle(**given)[0])
    torch._dynamo.reset()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("of", [doge, mistral, bloom, remote_code], ids=lambda of: of.__name__)
def test_exported(of, strict):
    oracle, ours, given = both(of)
    args = given["input_ids"], padding("left")
    with torch.no_grad():
        program = torch.export.export(Logits(ours), args, strict=strict)
        assert_close(program.module()(*args), Logits(oracle)(*args))


@pytest.mark.parametrize("of", LANGUAGE, ids=lambda of: of.__name__)
def test_generate(of):
    oracle, ours, given = both(of)
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "attention_mask": padding("left")}
    options["eos_token_id"] = None
    caches = [{}] if of is t5gemma2 else [{}, {"cache_implementation": "static"}]
    for cache in caches:
        got, want = (model.generate(**given, **options, **cache) for model in (ours, oracle))
        assert torch.equal(got, want)


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("of", [doge, mistral, bloom, t5gemma2], ids=lambda of: of.__name__)
def test_checkpointed(of, is_reentrant):
    oracle, ours, given = both(of)
    given |= {"attention_mask": padding("left"), "use_cache": False}
    gradients = []
    for model in (oracle, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if model is ours:
            model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        torch.manual_seed(3)
        out = model(**given)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((out.detach(), found))
    (want, of_oracle), (got, of_ours) = gradients
    assert_close(got, want)
    assert of_ours.keys() == of_oracle.keys()
    for name, gradient in of_oracle.items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-3, atol=1e-4)


# Rules that are handed in where a mask is wanted

RULE = attn_mask.causal() & attn_mask.sliding_window(3)
MESSAGE = re.escape(
    ": expected attention_mask to be a tensor, but got a mask function, causal() & "
    "sliding_window(3): pass its mask, attn_mask.boolean(rule, batch_size, q_length, kv_length), "
    "for eager attention attn_mask.additive, for flex attention attn_mask.create_block_mask"
)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "attn_mask"])
@pytest.mark.parametrize("of", [llama, mistral], ids=lambda of: of.__name__)
def test_a_rule_as_a_model_s_mask(of, implementation):
    architecture, config, _ = of()
    model = architecture._from_config(config, attn_implementation=implementation)
    with attn_mask.installed(), pytest.raises(TypeError, match=f"^create_[a-z_]+{MESSAGE}$"):
        model(tokens(), attention_mask=RULE)


CREATES = [name for name in dir(attn_mask.masking_utils) if name.startswith("create_")]
CREATES.remove("create_block_mask")


@pytest.mark.parametrize("name", CREATES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_a_rule_as_the_mask_of_a_create_function(name, implementation):
    config = transformers.MistralConfig(**SMALL, sliding_window=WINDOW)
    config._attn_implementation, config.attention_chunk_size = implementation, WINDOW
    call = config, torch.zeros(2, 9, 32), RULE, None
    with pytest.raises(TypeError, match=f"^create_[a-z_]+{MESSAGE}$"):
        getattr(attn_mask.masking_utils, name)(*call)
    with attn_mask.installed(), pytest.raises(TypeError, match=f"^create_[a-z_]+{MESSAGE}$"):
        getattr(theirs, name)(*call)


MASKS = ("sdpa_mask", "eager_mask", "flash_attention_mask", "flex_attention_mask")


@pytest.mark.parametrize("name", MASKS)
def test_a_rule_as_the_padding_of_a_mask(name):
    with pytest.raises(TypeError, match=f"^{name}{MESSAGE}$"):
        getattr(attn_mask.masking_utils, name)(2, 9, 9, attention_mask=RULE)
    if name in MASKS[:2]:
        with attn_mask.installed(), pytest.raises(TypeError, match=f"^{name}{MESSAGE}$"):
            getattr(theirs, name)(2, 9, 9, attention_mask=RULE)


def test_a_rule_as_a_mask_of_the_legacy_functions():
    legacy = attn_mask.modeling_attn_mask_utils
    embeds = torch.zeros(2, 9, 32)
    message = "to be a tensor, but got a mask function, causal"
    for name in ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa"):
        with pytest.raises(TypeError, match=message):
            getattr(legacy, name)(RULE, (2, 9), embeds, 0)
    for name in ("_prepare_4d_attention_mask", "_prepare_4d_attention_mask_for_sdpa"):
        with pytest.raises(TypeError, match=message):
            getattr(legacy, name)(RULE, torch.float32)
    with pytest.raises(TypeError, match=message):
        legacy.AttentionMaskConverter._unmask_unattended(RULE, 0.0)


def test_a_rule_as_the_mask_of_attention():
    from attn_mask._transformers.attention_interface import attention

    states = torch.zeros(2, 4, 9, 8)
    with pytest.raises(TypeError, match=f"^attn_mask attention{MESSAGE}$"):
        attention(torch.nn.Module(), states, states, states, RULE)


def test_explain_model_says_which_get_additive_masks():
    architecture, config, _ = bloom()
    model = architecture._from_config(config, attn_implementation="attn_mask")
    (layers,) = attn_mask.explain_model(model).layers
    assert layers.why == "an additive mask: these models have eager attention alone"
