"""A mask costs its own memory and next to nothing more while it is built."""

import subprocess
import sys
from pathlib import Path

import attn_mask  # noqa: F401 - without it there is nothing to measure
import pytest

LENGTH = 8192
MASK_BYTES = LENGTH * LENGTH * 4

# What a process needs beside the output: a few rows, and what the allocator rounds up.
ALLOWANCE = 4 << 20

# Prints by how much the peak of the resident memory lies above what was resident before the call.
MEASURE = """
import torch, attn_mask
from attn_mask import masking_utils, rules
from attn_mask import modeling_attn_mask_utils as ours
from pathlib import Path

def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def build(n):
    mask = torch.ones(1, n, dtype=torch.int64)
    mask[0, : n // 4] = 0
    low = torch.finfo(torch.float32).min
    ids = (torch.arange(n) // 1000)[None]
    eager = {{"attention_mask": mask.bool()}}
    packed = masking_utils.packed_sequence_compatibility_function(
        rules.causal() & rules.sliding_window(700), torch.arange(n)[None] % 1000, ids)
    images = rules.causal() | rules.blockwise(torch.where(ids % 2 == 0, ids, -1))
    return {call}

build(64)
try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
except OSError:
    pass
before = resident("VmRSS")
result = build({length})
assert result.numel() == {length} ** 2
print(resident("VmHWM") - before)
"""

FULL = "torch.full((1, 1, n, n), 0.5)"

CALLS = {
    "to_4d": "torch.ops.attn_mask.to_4d(mask, n, dtype=torch.float32, key_value_length=n)",
    "to_4d window": "torch.ops.attn_mask.to_4d("
    "mask, n, dtype=torch.float32, key_value_length=n, sliding_window=1000)",
    "to_4d bidirectional": "torch.ops.attn_mask.to_4d("
    "mask, n, dtype=torch.float32, is_causal=False)",
    "_expand_mask": "torch.ops.attn_mask._expand_mask(mask, dtype=torch.float32)",
    "to_causal_4d": "torch.ops.attn_mask.to_causal_4d(1, n, n, dtype=torch.float32)",
    "converter.to_4d": "ours.AttentionMaskConverter(True).to_4d(mask, n, torch.float32, n)",
    "eager_mask causal": "masking_utils.eager_mask(1, n, n, **eager)",
    "eager_mask packed": "masking_utils.eager_mask(1, n, n, mask_function=packed, **eager)",
    "eager_mask images": "masking_utils.eager_mask(1, n, n, mask_function=images, **eager)",
    "prepare": "ours._prepare_4d_causal_attention_mask(mask, (1, n), torch.zeros(1, n, 1), 0)",
}


def peak_above_start(call, folder):
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc, which is not there")
    code = MEASURE.format(call=call, length=LENGTH)
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.fixture(scope="module")
def peak_of_full(tmp_path_factory):
    """What writing a tensor of that size costs anyway."""
    peak = peak_above_start(FULL, tmp_path_factory.mktemp("full"))
    assert peak > 0.98 * MASK_BYTES, "the measurement misses the tensor itself"
    return peak


@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name, peak_of_full, tmp_path):
    peak = peak_above_start(CALLS[name], tmp_path)
    assert peak > 0.98 * MASK_BYTES
    assert peak < 1.01 * max(MASK_BYTES, peak_of_full) + ALLOWANCE, (
        f"{peak / MASK_BYTES:.3f} times the output, torch.full {peak_of_full / MASK_BYTES:.3f}"
    )
