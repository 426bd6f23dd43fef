"""Tiny models with random weights, what they are run on, and the masks that reach attention."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip(
    "transformers", reason="transformers, whose models are run, is not installed"
)

RELEASE = Version(transformers.__version__).release
VOCABULARY = 64
LENGTH = 9
WINDOW = 4
IMAGE = 60  # the token that stands for a part of an image

# Names of the same things in configurations; each takes those that it has.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NEVER = (1000, 0)
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@dataclass(frozen=True)
class Model:
    """How to make one: names in transformers, and what its configuration takes beyond SMALL."""

    config: str
    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    inputs: str = "decoder"
    is_sliding: bool = False
    # The first release whose model calls the create functions in each implementation; before, it
    # writes masks itself.
    creates_since: tuple[int, int] = (4, 53)
    only_changes: bool = False
    # The first release whose model has scaled_dot_product_attention.
    sdpa_since: tuple[int, int] = (4, 53)


FAST = {
    "Llama": Model("LlamaConfig", "LlamaForCausalLM"),
    "Mistral": Model(
        "MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}, is_sliding=True
    ),
    "Gemma 3 text": Model(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        is_sliding=True,
    ),
    "Llama 4 text": Model(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **EXPERTS,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        is_sliding=True,
    ),
    "BERT": Model("BertConfig", "BertModel", inputs="encoder", creates_since=(5, 0)),
    "T5": Model(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        inputs="encoder and decoder",
        creates_since=(5, 1),
        only_changes=True,
        sdpa_since=(5, 15),
    ),
}

OF_GPT_2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
OF_GPT_2 |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
OF_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
OF_FALCON |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
OF_BART = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "d_model": 32}
OF_BART |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
OF_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
OF_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OF_BART |= {"forced_eos_token_id": None}
OF_DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
OF_DEEPSEEK |= {"v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1}
OF_DEEPSEEK |= {"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OF_DEEPSEEK |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
OF_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
OF_DELTA |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 2, "num_experts": 2}
OF_DELTA |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
OF_DELTA |= {"num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]}
OF_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
OF_VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

SLOW = {
    "Mixtral": Model(
        "MixtralConfig",
        "MixtralForCausalLM",
        {**EXPERTS, "sliding_window": WINDOW},
        is_sliding=True,
    ),
    "Qwen2": Model(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**LOCAL, "use_sliding_window": True, "max_window_layers": 1},
        is_sliding=True,
    ),
    "Qwen3": Model("Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma 2": Model(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**LOCAL, "query_pre_attn_scalar": 8},
        is_sliding=True,
        sdpa_since=NEVER,
    ),
    "Phi-3": Model("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW}, is_sliding=True),
    "Cohere 2": Model("Cohere2Config", "Cohere2ForCausalLM", LOCAL, is_sliding=True),
    "GPT-2": Model("GPT2Config", "GPT2LMHeadModel", OF_GPT_2, only_changes=True),
    "GPT-NeoX": Model("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "Falcon": Model("FalconConfig", "FalconForCausalLM", OF_FALCON, only_changes=True),
    "Falcon with ALiBi": Model(
        "FalconConfig", "FalconForCausalLM", {**OF_FALCON, "alibi": True}, only_changes=True
    ),
    "OPT": Model("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "RoBERTa": Model("RobertaConfig", "RobertaModel", inputs="encoder", creates_since=(5, 0)),
    "ModernBERT": Model(
        "ModernBertConfig",
        "ModernBertModel",
        {"local_attention": 2 * WINDOW, "cls_token_id": 1, "sep_token_id": 2},
        inputs="encoder",
        creates_since=(5, 1),
    ),
    "BART": Model(
        "BartConfig",
        "BartForConditionalGeneration",
        OF_BART,
        inputs="encoder and decoder",
        only_changes=True,
    ),
    "Whisper": Model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **OF_BART,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
        },
        inputs="sound",
        only_changes=True,
    ),
    "GPT-OSS": Model(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**EXPERTS, **LOCAL},
        is_sliding=True,
        sdpa_since=NEVER,
    ),
    "DeepSeek-V3": Model("DeepseekV3Config", "DeepseekV3ForCausalLM", OF_DEEPSEEK),
    "Gemma 3 with images": Model(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SMALL, **LOCAL, "query_pre_attn_scalar": 8},
            "vision_config": OF_VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
            "boi_token_index": 1,
            "eoi_token_index": 2,
        },
        inputs="images",
        is_sliding=True,
        only_changes=True,
    ),
    "PaliGemma": Model(
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**SMALL, "model_type": "gemma"},
            "vision_config": {**OF_VISION, "model_type": "siglip_vision_model"},
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        inputs="images",
        only_changes=True,
    ),
    "Qwen3-Next (linear and full attention)": Model(
        "Qwen3NextConfig", "Qwen3NextForCausalLM", OF_DELTA
    ),
}

MODELS = FAST | SLOW


def combinations(names: Iterable[str]) -> list[Any]:
    """Of the models and the implementations that they have."""
    return [
        pytest.param(
            *(name, implementation),
            marks=[
                *(() if name in FAST else [pytest.mark.slow]),
                pytest.mark.applies(is_here(name)),
            ],
            id=f"{name.replace(' ', '')}-{implementation}",
        )
        for name in names
        for implementation in ("eager", "sdpa")
        if implementation == "eager" or MODELS[name].sdpa_since <= RELEASE
    ]


def is_here(name: str) -> bool:
    """Whether the installed release has a model."""
    names = MODELS[name].config, MODELS[name].architecture
    return all(hasattr(transformers, of_model) for of_model in names)


@functools.cache
def make(name: str, implementation: str) -> Any:
    """The model; the same weights for every implementation."""
    model = MODELS[name]
    config_class = getattr(transformers, model.config)
    architecture = getattr(transformers, model.architecture)
    config = config_class(**({} if model.only_changes else SMALL) | model.changes)
    torch.manual_seed(0)
    made = architecture._from_config(config, attn_implementation=implementation)
    return made.eval()


def tokens(batch_size: int = 2, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)


def padding(side: str, batch_size: int = 2, length: int = LENGTH) -> torch.Tensor | None:
    """Of the first row, three tokens; "ones" is a mask without padding."""
    if side == "none":
        return None
    mask = torch.ones(batch_size, length, dtype=torch.long)
    if side == "left":
        mask[0, :3] = 0
    elif side == "right":
        mask[0, -3:] = 0
    return mask


PADDINGS = ("none", "ones", "left", "right")


def inputs(model: Model, side: str) -> dict[str, Any]:
    mask = padding(side)
    given: dict[str, Any] = {"attention_mask": mask}
    if model.inputs == "sound":
        generator = torch.Generator().manual_seed(2)
        given = {"input_features": torch.randn(2, 8, 32, generator=generator)}
        given["decoder_input_ids"] = tokens()
        if mask is not None:
            given["decoder_attention_mask"] = mask
        return given
    if model.inputs == "images":
        ids = tokens()
        ids[:, 3:7] = IMAGE
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(2, 3, 8, 8, generator=generator)
        return {
            **given,
            "input_ids": ids,
            "pixel_values": images,
            "token_type_ids": (ids == IMAGE).long(),
        }
    given["input_ids"] = tokens()
    if model.inputs == "encoder and decoder":
        given["decoder_input_ids"] = tokens(length=5)
        if mask is not None:
            given["decoder_attention_mask"] = padding(side, length=5)
    return given


@contextlib.contextmanager
def recorded_masks(model: torch.nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Every argument that is called a mask, of every attention module, call by call."""
    seen: list[tuple[str, Any]] = []

    def record(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        bound = signature.bind_partial(*args, **kwargs).arguments
        for argument, value in {**bound, **bound.get("kwargs", {})}.items():
            if "mask" in argument:
                kept = value.clone() if type(value) is torch.Tensor else value
                seen.append((f"{name}.{argument}", kept))

    hooks = []
    for name, module in model.named_modules():
        if "Attention" in type(module).__name__:
            signature = inspect.signature(module.forward)
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name, signature=signature: record(
                        name, signature, args, kwargs
                    ),
                    with_kwargs=True,
                )
            )
    assert hooks
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class CountOperators(TorchDispatchMode):
    """Counts the masks that our operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("attn_mask.") and "visible" not in name and "ignore" not in name:
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Run:
    masks: list[tuple[str, Any]]
    result: Any
    operators: int

    @property
    def has_masks(self) -> bool:
        """Whether any reached attention that is more than padding [b, n]."""
        return any(isinstance(mask, torch.Tensor) and mask.dim() == 4 for _, mask in self.masks)


def run(model: torch.nn.Module, call: Callable[[], Any], counts: bool = True) -> Run:
    """``counts``: not while torch.compile is at work, which has no part in a dispatch mode."""
    counted = CountOperators()
    counting = counted if counts else contextlib.nullcontext()
    with recorded_masks(model) as masks, counting, torch.no_grad():
        result = call()
    return Run(masks, result, counted.count)
