"""The source tree: hooks, and what `make clean` leaves."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def recipe(target):
    text = (ROOT / "Makefile").read_text()
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    return [line.strip().lstrip("@") for line in lines.splitlines()]


def test_hooks_are_those_of_make_lint():
    """Both run the tools of the environment, whose versions requirements/dev.txt pins."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    commands = [line.replace("$(BIN)/", ".venv/bin/") for line in recipe("lint")]
    assert len(entries) == len(commands)
    for entry, command in zip(entries, commands, strict=True):
        assert entry in command
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements" / "dev.txt").read_text(), re.M)
    assert {Path(entry.split()[0]).name for entry in entries} <= set(pinned)
    assert all(hook["language"] == "system" for hook in local["hooks"])


BUILT = (
    "build/cmake/x.o",
    "dist/a.whl",
    ".ruff_cache/x",
    "python/attn_mask/_C.so",
    "python/attn_mask/lib/libattn_mask.so",
    "python/attn_mask/_built_for.py",
    "tests/rules/__pycache__/x.pyc",
    ".venv/.installed",  # so that the next build installs the package anew
)
ENVIRONMENTS = (".venv/bin/python", ".venv-torch2.11.0/bin/python", ".cache/releases/5.0.0/x")
SOURCES = ("python/attn_mask/rules.py", "tests/rules/test_rules.py")


@pytest.mark.parametrize(
    ("target", "left"), [("clean", (*ENVIRONMENTS, *SOURCES)), ("distclean", SOURCES)]
)
def test_clean(tmp_path, target, left):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*BUILT, *ENVIRONMENTS, *SOURCES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for folder in ("bench", "examples", "scripts", "cmake", "csrc", "tests/cpp"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    subprocess.run(["make", "-s", target], cwd=tmp_path, check=True, capture_output=True)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"Makefile", *left}
