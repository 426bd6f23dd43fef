"""The pages: every code block runs, every link leads somewhere, every figure is a measured one."""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import attn_mask
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the pages are not here")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the text block that shows what it prints, if there is one after it."""

    page: Path
    line: int
    language: str
    code: str
    printed: str | None

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    fences = list(re.finditer(r"^( *)```(\S*)\n(.*?)^\1```$", page.read_text(), re.M | re.S))
    last = None
    for fence in reversed(fences):
        indent, language, code = fence.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        is_followed = last is not None and page.read_text()[fence.end() : last[0]].strip() in (
            "",
            "prints",
        )
        printed = last[1] if is_followed else None
        last = (fence.start(), code) if language == "text" else None
        line = page.read_text().count("\n", 0, fence.start()) + 1
        yield Block(page, line, language, code, printed)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(*languages):
    blocks = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.name)


def test_every_block_has_a_test():
    for block in BLOCKS:
        assert block.language in ("python", "sh", "cpp", "cmake", "text"), block.name
    shown = [block.printed for block in BLOCKS if block.printed is not None]
    texts = [block.code for block in BLOCKS if block.language == "text"]
    assert sorted(shown) == sorted(texts), "a text block is what the block before it prints"


@pytest.fixture
def stock():
    """Whatever a block installs or sets ends with it."""
    yield
    attn_mask.uninstall()
    attn_mask.skip_policy("upstream")


@of_language("python")
def test_python(block, stock):
    if "transformers" in block.code:
        pytest.importorskip("transformers")
    # Lines of a traceback are those of the page.
    code = compile("\n" * block.line + block.code, str(block.page), "exec")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {"__name__": block.name})
    assert output.getvalue().rstrip() == (block.printed or "").rstrip()


@functools.cache
def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@of_language("sh")
def test_shell(block):
    """It parses, `python -m attn_mask` runs, and targets, scripts and folders are there."""
    subprocess.run(["bash", "-n", "-c", block.code], check=True)
    makefile = (ROOT / "Makefile").read_text()
    commands = re.sub(r"\\\n", " ", re.sub(r"#.*", "", block.code))
    for target in re.findall(r"^ *make (?:\w+=\S+ )*([\w-]+)", commands, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for script in re.findall(r"\bpython (\w\S*\.py)\b", commands):
        assert (ROOT / script).exists(), script
    for folder in re.findall(r"cmake .*-S (\S+)", commands):
        assert (ROOT / folder / "CMakeLists.txt").exists(), folder
    for line in re.findall(r"^python -m attn_mask\b.*", commands, re.M):
        ran = run(*line.split()[1:])
        assert ran.returncode == 0, ran.stdout + ran.stderr
        if block.printed:
            assert ran.stdout.rstrip() == block.printed.rstrip()


def compiled(pattern):
    """The stripped lines of each file of that name that other tests and targets compile."""
    for folder in (ROOT / "examples" / "cpp", ROOT / "tests" / "cpp" / "consumer"):
        for path in folder.rglob(pattern):
            yield [line.strip() for line in path.read_text().splitlines()]


def is_part_of(lines, file):
    return any(file[i : i + len(lines)] == lines for i in range(len(file)))


@of_language("cpp")
def test_cpp(block):
    """It is a part of a program that test_cpp_consumer.py or make cpp-demo compiles."""
    lines = [line.strip() for line in block.code.splitlines()]
    assert any(is_part_of(lines, file) for file in compiled("*.cpp"))


@of_language("cmake")
def test_cmake(block):
    """Each of its lines is one of the projects in examples/ and tests/cpp, but for their names."""
    there = {
        re.sub(r"\((\w+)", "(model", line) for file in compiled("CMakeLists.txt") for line in file
    }
    for line in filter(None, re.sub(r" *#.*", "", block.code).splitlines()):
        command = re.sub(r"\((\w+)", "(model", line)
        assert any(known.startswith(command) for known in there), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, link


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 110]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        assert name == "README.md" or f"]({name})" in readme, name


def test_every_page_is_a_page_of_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {page.name for page in PAGES} - {"README.md"} | {"index.md"}
    assert sorted(name for entry in nav for name in entry.values()) == sorted(pages)


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs" / "api.md").read_text()
    for name in attn_mask.__all__:
        assert re.search(rf"^::: attn_mask\.{name}\b|`attn_mask\.{name}`", reference, re.M), name


def test_the_reference_begins_with_the_names_that_come_first():
    """Rules, then what most programs need, in both lists; new leaves are names of `rules` alone."""
    reference = (ROOT / "docs" / "api.md").read_text()
    (first,) = re.findall(r"^## First\n(.*?)^## ", reference, re.M | re.S)
    names = re.findall(r"`attn_mask\.(rules)`|^::: attn_mask\.(\w+)$", first, re.M)
    assert attn_mask.__all__[:13] == [module or name for module, name in names]
    leaves = {name for name in attn_mask.rules.__all__ if name in attn_mask.__all__}
    assert leaves == {
        *("bidirectional", "bits", "blockwise", "causal", "chunked", "documents"),
        *("nothing", "padding", "sliding_window", "window"),
    }


def results(name):
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def test_figures_of_the_readme():
    """They are those of the files that the benchmarks write."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    cases = results("gpu")["cases"]
    of_bool, others = (
        sorted(case["of_copy_bandwidth"] for case in cases if case["name"].endswith("bool") is kind)
        for kind in (True, False)
    )
    assert f"at {others[0]:.2f} to {others[-1]:.2f} of a copy's bandwidth" in readme
    assert f"bool ones at {of_bool[0]:.2f} to {of_bool[-1]:.2f}" in readme
    blocks = [row["seconds"] for row in results("gpu")["block_masks"]]
    times = sorted(row["torch compiled"] / row["attn_mask"] for row in blocks if len(row) > 1)
    assert f"{times[0]:.2g} to {times[-1]:.2g} times as fast as torch's compiled" in readme
    (block_mask,) = (
        case for case in results("block_mask")["cases"] if case["name"] == "32k, causal"
    )
    ours, compiled = (block_mask["seconds"][side] * 1e3 for side in ("attn_mask", "compiled"))
    assert f"takes {ours:.2g} ms, against {compiled:.0f} ms by torch's compiled" in readme
    ratios = sorted(
        case["seconds"]["transformers"] / case["seconds"]["attn_mask"]
        for case in results("rules")["cases"]
        if case["memory"] == "fresh" and case["name"].startswith("sdpa_mask")
    )
    assert f"is {ratios[0]:.2g} to {ratios[-1]:.2g} times as fast as transformers'" in readme
