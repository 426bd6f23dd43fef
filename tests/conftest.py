"""What every test runs under: offline, reproducible in CI, with CUDA only where there is one."""

import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import hypothesis
import oracle_loader
import pytest
import torch

# A first call compiles or warms something up now and then, so a deadline per example only flakes.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


def pytest_configure(config):
    # Torch warns once per process, in the first test that makes a complex32 tensor.
    config.addinivalue_line("filterwarnings", "ignore:ComplexHalf support is experimental")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("ATTN_MASK_REQUIRE_CUDA") == "1":
        pytest.fail("ATTN_MASK_REQUIRE_CUDA=1, but torch sees no CUDA device")
    pytest.skip("hardware: torch sees no CUDA device")


def pytest_collection_modifyitems(config, items):
    """Tests of what another release of torch or transformers does are no tests of this one."""
    marks = {item: list(item.iter_markers("applies")) for item in items}
    other = [item for item in items if not all(mark.args[0] for mark in marks[item])]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]


def _refuse_skip(report):
    """Makes an error of a skip whose reason is not hardware, where nothing may be left out."""
    if os.environ.get("ATTN_MASK_REQUIRE") != "all" or not report.skipped:
        return
    if hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith("hardware: "):
        report.outcome = "failed"
        report.longrepr = f"ATTN_MASK_REQUIRE=all, but this was left out: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session")
def upstream():
    """The file that attn_mask.modeling_attn_mask_utils stands for, of the last release with it."""
    try:
        return oracle_loader.load_last_attn()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the last transformers with this file can't be fetched: {error}")


@pytest.fixture
def keep_num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(keep_num_threads):
    """For thousands of tiny calls: waking threads takes longer, much longer on a busy host."""
    torch.set_num_threads(1)
