"""What nvcc made of the CUDA kernels: no division and no local memory where masks are written."""

import collections
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import attn_mask
import pytest

BUILD = attn_mask.build_info()
LIBRARY = Path(attn_mask.__file__).parent / "lib/libattn_mask_cuda.so"
# How many there are of each: one for each element size, or one.
KERNELS = {
    "write_mask_kernel": 4,
    "write_block_mask_kernel": 1,
    "write_block_states_kernel": 1,
    "prepare_kernel": 1,
    "find_documents_kernel": 1,
    "unmask_kernel": 4,
}

pytestmark = pytest.mark.applies(BUILD["cuda_version"] is not None)


def tool(package, name):
    files = importlib.metadata.files(package)
    return Path(next(file for file in files if file.name == name).locate())


@pytest.fixture(scope="module")
def listing():
    """For each architecture and kernel, how often it has each instruction."""
    cuobjdump = tool("nvidia-cuda-cuobjdump", "cuobjdump")
    # It finds nvdisasm, without which it lists nothing, on PATH.
    nvdisasm = tool("nvidia-cuda-nvdisasm", "nvdisasm")
    env = os.environ | {"PATH": f"{nvdisasm.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [cuobjdump, "-sass", LIBRARY], env=env, capture_output=True, text=True, check=True
    )
    found = collections.defaultdict(collections.Counter)
    architecture = kernel = None
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = match[1]
        elif "Function : " in line:
            kernel = next(name for name in KERNELS if name in line), line
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
            found[architecture, kernel][match[1]] += 1
    return found


def test_every_kernel_is_in_the_listing(listing):
    # PTX is for architectures to come.
    architectures = {arch.removesuffix("+PTX").replace(".", "") for arch in BUILD["cuda_archs"]}
    want = {(arch, name): count for arch in architectures for name, count in KERNELS.items()}
    assert collections.Counter((arch, kernel[0]) for arch, kernel in listing) == want
    assert all(sum(instructions.values()) > 50 for instructions in listing.values())


# A division of integers goes through a reciprocal in floating point. (Not CALL: on sm_80 that is
# also how the lanes of a warp wait for each other.)
DIVISION = {"MUFU", "I2F", "F2I"}
LOCAL_MEMORY = {"LDL", "STL"}


def test_kernels_that_write_masks_neither_divide_nor_spill(listing):
    for (architecture, kernel), instructions in listing.items():
        if kernel[0].startswith("write_"):
            slow = (DIVISION | LOCAL_MEMORY) & instructions.keys()
            assert not slow, (architecture, kernel, slow)
            assert architecture == "80" or "CALL" not in instructions, (architecture, kernel)


def test_divisions_would_be_seen(listing):
    """Rows of any strides are found by division where masks are copied."""
    of_copies = [v for (_, kernel), v in listing.items() if kernel[0] == "unmask_kernel"]
    assert of_copies and all(instructions.keys() & DIVISION for instructions in of_copies)
