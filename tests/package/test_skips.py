"""ATTN_MASK_REQUIRE=all: a skip is a failure unless its reason is hardware."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

CASES = """
    import pytest

    @pytest.mark.applies(False)
    def test_of_another_release():
        raise AssertionError

    @pytest.mark.applies(True)
    def test_of_this_release():
        pass

    def test_without_hardware():
        pytest.skip("hardware: there is no such processor")

    def test_without_a_compiler():
        pytest.skip("clang++ is not installed")

    @pytest.mark.skipif(True, reason="another release")
    def test_that_skips_itself():
        pass

    @pytest.mark.xfail(reason="known")
    def test_that_fails():
        raise AssertionError
"""


MODULE = """
    import pytest

    pytest.importorskip("no_such_module")
"""


def outcomes(folder, code, required):
    """How many tests had which outcome, and pytest's output."""
    (folder / "test_cases.py").write_text(textwrap.dedent(code))
    path = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    marks = "markers=applies(condition): see pyproject.toml"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", folder]
    done = subprocess.run(
        [*command, "-o", marks, "-c", os.devnull, folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "ATTN_MASK_REQUIRE": required},
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"(\d+) (\w+)", done.stdout.strip().splitlines()[-1])
    return {word.rstrip("s"): int(n) for n, word in counts if word != "in"}, done.stdout


def test_skips_are_skips(tmp_path):
    counts, text = outcomes(tmp_path, CASES, "")
    assert counts == {"passed": 1, "skipped": 3, "deselected": 1, "xfailed": 1}, text


def test_skips_are_errors_where_all_is_required(tmp_path):
    counts, text = outcomes(tmp_path, CASES, "all")
    assert counts == {
        "passed": 1,
        "skipped": 1,
        "deselected": 1,
        "xfailed": 1,
        "failed": 1,
        "error": 1,
    }, text
    assert "ATTN_MASK_REQUIRE=all, but this was left out: Skipped: clang++ is not inst" in text


def test_so_are_modules_that_skip_themselves(tmp_path):
    counts, text = outcomes(tmp_path, MODULE, "all")
    assert counts == {"error": 1}, text
    assert "no_such_module" in text
