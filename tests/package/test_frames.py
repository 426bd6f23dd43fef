"""How many Python calls of ours a warm call of the public API takes, before its operator."""

import importlib.util
from pathlib import Path

import attn_mask
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "count_frames.py"
MOST = {
    "boolean": 16,
    "additive": 16,
    "create_block_mask": 20,
    "sdpa_arguments": 20,
    "scaled_dot_product_attention": 16,
}
# Of the mask of a model's forward: how many calls, and in how many files of ours.
MOST_OF_FORWARD = 20, 8


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("count_frames", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MOST)
def test_calls_cross_few_functions(script, name):
    frames = script.frames_of(script.calls()[name])
    assert 3 <= len(frames) <= MOST[name], frames


def test_the_mask_of_a_forward_crosses_few_functions_and_files(script):
    with attn_mask.installed():
        frames = script.frames_of(script.calls()["forward of Mistral under install()"])
    files = {file for file, _ in frames}
    assert 3 <= len(frames) <= MOST_OF_FORWARD[0], frames
    assert len(files) <= MOST_OF_FORWARD[1], files
