#!/usr/bin/env python3
"""Counts the Python calls of this package in calls that are warm, and the files that they cross.

A call of a function of ours is an event of sys.setprofile in a file of ours. `count_frames.py
--list` prints each, in order.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attn_mask
import torch
from attn_mask import additive, boolean, causal, create_block_mask, masking_utils, sliding_window

OURS = str(Path(attn_mask.__file__).parent)


def calls() -> dict[str, Callable[[], Any]]:
    """What is counted. Rules are made before."""
    rule = causal() & sliding_window(16)
    function = masking_utils.sliding_window_causal_mask_function(16)
    query, key = torch.zeros(1, 4, 64, 16), torch.zeros(1, 4, 64, 16)
    return {
        "masking_utils.sdpa_mask": lambda: masking_utils.sdpa_mask(
            1, 64, 64, 0, 0, function, allow_is_causal_skip=False
        ),
        "boolean": lambda: boolean(rule, 1, 64, 64),
        "additive": lambda: additive(rule, 1, 64, 64),
        "create_block_mask": lambda: create_block_mask(rule, 1, None, 1024, 1024, device="cpu"),
        "sdpa_arguments": lambda: attn_mask.sdpa_arguments(query, key, rule),
        "scaled_dot_product_attention": lambda: attn_mask.scaled_dot_product_attention(
            query, key, key, rule
        ),
        "forward of Mistral under install()": forward_of_mistral(),
    }


def forward_of_mistral() -> Callable[[], Any]:
    from transformers import MistralConfig, MistralModel

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, **heads, attn_implementation="sdpa")
    model = MistralModel(config).eval()
    tokens, shown = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
    shown[0, :3] = 0

    def forward() -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=shown)

    return forward


def frames_of(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, function) of each call of a function of ours, in the third call."""
    call()
    call()
    found: list[tuple[str, str]] = []

    def see(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            found.append((code.co_filename.removeprefix(OURS + "/"), code.co_qualname))

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print each frame")
    arguments = parser.parse_args()
    with attn_mask.installed():
        for name, call in calls().items():
            frames = frames_of(call)
            files = {file for file, _ in frames}
            print(f"{name:36} {len(frames):4} frames {len(files):3} files")
            if arguments.list:
                for file, function in frames:
                    print(f"    {file:28} {function}")


if __name__ == "__main__":
    main()
