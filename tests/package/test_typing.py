"""What type checkers see: mypy --strict on a user's script, in which wrong uses are errors.

mypy reports a ``type: ignore`` that ignores nothing, so each wrong use here must be an error.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import attn_mask
import pytest

SCRIPT = """
from typing import Literal, assert_type

import torch
from torch.nn.attention.flex_attention import BlockMask

import attn_mask
from attn_mask import causal, masking_utils, sliding_window
from attn_mask.rules import MaskFunction

rule = causal() & sliding_window(4)
assert_type(rule, MaskFunction)
assert_type(rule | attn_mask.documents(torch.tensor([0, 0, 1])), MaskFunction)
assert_type(attn_mask.boolean(rule, 1, 8, 8), torch.Tensor)
assert_type(attn_mask.additive(lambda b, h, q, k: q >= k, 1, 8, 8, masked_value=-1e4), torch.Tensor)
assert_type(attn_mask.create_block_mask(rule, 1, None, 256, 256, "cpu"), BlockMask)
attn_mask.boolean(rule, 1, 8, 8, offset=1)  # type: ignore[call-arg]
attn_mask.boolean("causal", 1, 8, 8)  # type: ignore[arg-type]
attn_mask.additive(rule, 1, 8, 8, dtype="float16")  # type: ignore[arg-type]
attn_mask.sliding_window("4")  # type: ignore[arg-type]
attn_mask.create_block_mask(rule, 1, None, 256, 256, compact="yes")  # type: ignore[arg-type]

attn_mask.install(masked_value=float("-inf"))
attn_mask.install(True)  # type: ignore[call-arg]
attn_mask.install(masked_value="low")  # type: ignore[arg-type]
assert_type(attn_mask.is_installed(), bool)
with attn_mask.installed(aten_only=True):
    assert_type(attn_mask.status().calls, dict[str, int])
assert_type(str(attn_mask.status()), str)
attn_mask.status().transformers.split(".")  # type: ignore[union-attr]

attn_mask.skip_policy("shapes", "none", packing="none")
with attn_mask.skip_policy("never"):
    pass
attn_mask.skip_policy("sometimes")  # type: ignore[call-overload]
attn_mask.skip_policy("shapes", padding="left")  # type: ignore[call-overload]
attn_mask.skip_policy("never", padding="none")  # type: ignore[call-overload]

assert_type(attn_mask.show(rule, 8, style="color"), str)
attn_mask.show(rule, 8, style="colour")  # type: ignore[arg-type]
attn_mask.explain(rule, q=1.5, k=0)  # type: ignore[arg-type]

mask = attn_mask.boolean(rule, 1, 8, 8)
for finding in attn_mask.validate_mask(mask, q=torch.zeros(1, 2, 8, 16)):
    assert_type(finding, attn_mask.Finding)
    assert_type(finding.kind, Literal["shape", "dtype", "numbers", "rows", "strides"])
    finding.kind == "row"  # type: ignore[comparison-overlap]
attn_mask.validate_mask(None)  # type: ignore[arg-type]
assert_type(attn_mask.validate_mask_properties(mask, "causal"), bool)
attn_mask.validate_mask_properties(mask, "cusal")  # type: ignore[arg-type]

assert_type(masking_utils.sdpa_mask(1, 8, 8), torch.Tensor | None)
assert_type(masking_utils.sdpa_mask(1, 8, 8, allow_is_causal_skip=False), torch.Tensor)
assert_type(
    masking_utils.sdpa_mask(
        1, 8, 8, allow_is_causal_skip=False, allow_is_bidirectional_skip=True
    ),
    torch.Tensor | None,
)
masking_utils.sdpa_mask(1, 8, 8).shape  # type: ignore[union-attr]
assert_type(masking_utils.eager_mask(1, 8, 8), torch.Tensor)
assert_type(
    masking_utils.eager_mask(1, 8, 8, allow_is_bidirectional_skip=True), torch.Tensor | None
)
assert_type(masking_utils.flex_attention_mask(1, 8, 8), BlockMask)
attn_mask.sdpa_arguments(mask, mask).attn_mask.shape  # type: ignore[union-attr]
"""


def mypy(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """mypy --strict as a user runs it, on the package as it is imported here."""
    (folder / "script.py").write_text(script)
    # Of what is installed mypy shows no errors: other releases of torch have other types.
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-attn_mask.*]\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "script.py"]
    paths = {"MYPYPATH": str(Path(attn_mask.__file__).parents[1])}
    if "site-packages" in paths["MYPYPATH"]:
        paths = {}  # mypy finds what is installed, and refuses site-packages among the paths
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True
    )


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_users_script(tmp_path):
    ran = mypy(tmp_path, SCRIPT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("arguments", "is_none"),
    [
        ({}, True),
        ({"allow_is_causal_skip": False}, False),
        ({"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}, True),
    ],
)
def test_none_comes_back_where_the_types_say_so(arguments, is_none):
    everything = attn_mask.masking_utils.bidirectional_mask_function
    rule = everything if "allow_is_bidirectional_skip" in arguments else attn_mask.causal()
    mask = attn_mask.masking_utils.sdpa_mask(1, 8, 8, mask_function=rule, **arguments)
    assert (mask is None) == is_none
