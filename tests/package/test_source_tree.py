"""The source tree: words, hooks, what `make clean` leaves, and the walks of CONTRIBUTING.md."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from attn_mask._transformers import UPSTREAM

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

from count_house import CODE, functions, tracked, walks  # noqa: E402

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")

# Files that hold measurements.
RECORDS = ("BENCHMARKS.md", "bench/results/")


def texts():
    """The tracked text files, but for records of measurements."""
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if path.is_file() and not name.startswith(RECORDS) and b"\0" not in path.read_bytes():
            yield name, path.read_text()


def files_that_mention(pattern, *folders):
    found = {name for name, text in texts() if re.search(pattern, text)}
    return {name for name in found if name.startswith(folders)}


def test_higher_positions_are_after_or_beyond():
    """The word that is looked for can be read as the opposite."""
    word = "be" + "hind"
    assert not files_that_mention(rf"(?i)\b{word}\b", "")


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


# Their arguments are those of transformers' and torch's functions.
SIGNATURES_OF_OTHERS = {
    ("python/attn_mask/_core/blocks.py", "create_block_mask"),
    ("python/attn_mask/_transformers/attention_interface.py", "rule_mask"),
    ("python/attn_mask/_transformers/create.py", "create"),
    ("python/attn_mask/_transformers/writers.py", "__call__"),
    ("python/attn_mask/_transformers/writers.py", "write_eager_mask"),
    ("python/attn_mask/_transformers/writers.py", "write_sdpa_mask"),
}


def test_functions_are_short():
    found = functions()
    assert {str(path).split("/")[0] for path, *_ in found} == set(CODE) and len(found) > 1200
    long = [(str(path), name, lines) for path, name, lines, _ in found if lines > 80]
    assert long == []
    wide = {(str(path), name) for path, name, _, arguments in found if arguments > 8}
    assert wide == SIGNATURES_OF_OTHERS


def test_files_are_short():
    longest = {".py": 900, ".cpp": 450, ".h": 450, ".cu": 450}
    for path in tracked(*CODE):
        lines = len(path.read_text().splitlines())
        assert lines <= longest.get(path.suffix, lines), path


def links(title):
    """Every file that the walk links to, in its steps or beside them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = (part for part in text.split("\n## ") if part.startswith(title))
    return set(re.findall(r"\]\(([^)]+)\)", section))


def walk(title):
    """The files of the walk's steps."""
    ((_, files),) = ((name, files) for name, files in walks().items() if name.startswith(title))
    return set(files)


def test_walks_count_their_files():
    assert len(walks()) == 5
    for title, files in walks().items():
        assert f": {len(files)} files" in title
        assert len(set(files)) == len(files), title
        assert links(title) <= {str(path.relative_to(ROOT)) for path in tracked()}


def test_walk_to_a_leaf():
    """By its opcode, which is read wherever a leaf is added; test_new_leaf.py makes the rest."""
    title = "Adding a leaf"
    opcode = files_that_mention(r"\bkDocuments\b|\bDOCUMENTS\b", "csrc/", "python/")
    assert {name for name in opcode if "/leaf" not in name} == {
        *(name for name in walk(title) if "/leaf" not in name and not name.endswith("rules.h")),
    }
    changed = (ROOT / "tests" / "rules" / "test_new_leaf.py").read_text()
    lists = {f"csrc/{name}" for name in re.findall(r'csrc / "(rule/leaf[^"]*)"', changed)}
    assert lists == {"csrc/rule/leaf.h"}
    assert {name for name in walk(title) if "/leaf" in name} == {
        *lists,
        *files_that_mention(r"\bstruct SameId\b", "csrc/"),
    }
    references = files_that_mention(
        r"\bkDocuments\b|\bDOCUMENTS\b|::kSameId\b|\brules\.documents\b",
        "tests/support/rule_r",
        "tests/cpp/re",
        "tests/fuzz/p",
        "tests/fuzz/cases/rules",
    )
    assert references == {name for name in links(title) if name.startswith("tests/")} - {
        "tests/package/test_source_tree.py",
        "tests/rules/test_new_leaf.py",
    }


def test_walk_to_a_format():
    title = "Adding a format"
    named = r"\bkBoolean\b|\bBoolean::run\b|\bstruct Boolean\b|\b(_C|ops)\.boolean\b"
    mentions = files_that_mention(
        rf'{named}|\bdef boolean\b|"boolean"', "csrc/", "python/", "tests/support/"
    )
    uses_it_for_parts = "csrc/ops/core/rule_problem.cpp"
    assert mentions - {uses_it_for_parts} == walk(title) | {"csrc/attn_mask/rules.cpp"}


def test_walk_to_an_operator():
    title = "Adding an operator"
    mentions = files_that_mention(
        r"\bBlockStates\b|\b_block_states\b", "csrc/", "python/", "tests/support/"
    )
    caller = "python/attn_mask/_core/blocks.py"
    assert mentions - {caller} == walk(title) - {"CMakeLists.txt"}
    sources = [name for name in walk(title) if name.endswith(".cpp")]
    text = (ROOT / "CMakeLists.txt").read_text()
    assert all(name in text for name in sources)


def test_walks_to_a_release_have_all_that_knows_of_one():
    """A file of the package that names a release of transformers is in a walk, or of the legacy."""
    named = files_that_mention(r"(?<![\d.])(4\.(3[5-9]|[45]\d)|5\.\d{1,2})(?![\d])", "python/")
    walked = walk("Taking up a release of transformers:") | walk(
        "Taking up a release of transformers that"
    )
    legacy = {
        f"python/attn_mask/{name}.py"
        for name in (
            "modeling_attn_mask_utils",
            *(f"_transformers/{name}" for name in ("legacy", "releases", "transformers_4")),
        )
    }
    fixed = {"_transformers/visual.py", "_tools/bench.py"}  # a picture of 5.8; what 5.3 was
    assert named - walked <= legacy | {f"python/attn_mask/{name}" for name in fixed}
    tests = {"CHANGELOG.md", "requirements/dev.txt", "tests/support/releases.json"}
    assert walked <= named | tests | {
        *("docs/upstream.md", "python/attn_mask/_transformers/source.py"),
    }


def test_walk_to_a_release():
    minor = UPSTREAM.rpartition(".")[0]
    assert files_that_mention(rf"\b{re.escape(minor)}\b", "") <= walk(
        "Taking up a release of transformers:"
    )
    for name in ("requirements/dev.txt", "tests/support/releases.json"):
        assert UPSTREAM in (ROOT / name).read_text()
    for script in ("find_releases.py", "hash_upstream.py"):
        written = re.findall(r'"(\w+\.json)"', (ROOT / "scripts" / script).read_text())
        assert any(
            name.endswith(tuple(written)) for name in walk("Taking up a release of transformers:")
        )
