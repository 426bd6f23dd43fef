"""What every test runs under: offline, reproducible in CI, with CUDA only where there is one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import hypothesis
import pytest
import torch

# A first call compiles or warms something up now and then, so a deadline per example only flakes.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


def pytest_configure(config):
    # Said once per process by whichever test is first to make a complex32 tensor.
    config.addinivalue_line("filterwarnings", "ignore:ComplexHalf support is experimental")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("ATTN_MASK_REQUIRE_CUDA") == "1":
        pytest.fail("ATTN_MASK_REQUIRE_CUDA=1, but torch sees no CUDA device")
    pytest.skip("torch sees no CUDA device")


@pytest.fixture(scope="session")
def upstream():
    """The file of the installed transformers that attn_mask.modeling_attn_mask_utils stands for."""
    return pytest.importorskip(
        "transformers.modeling_attn_mask_utils",
        reason="transformers, which the results are compared with, is not installed",
    )


@pytest.fixture
def keep_num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(keep_num_threads):
    """For thousands of tiny calls: waking threads takes longer, much longer on a busy host."""
    torch.set_num_threads(1)
