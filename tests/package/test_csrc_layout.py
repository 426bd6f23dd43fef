"""csrc: what includes what, and that a file's path says what it is."""

import graphlib
import re
from collections import defaultdict
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
FILES = {
    str(path.relative_to(CSRC))
    for path in CSRC.rglob("*")
    if path.suffix in (".h", ".cpp", ".cu", ".cuh")
}


def included(name):
    text = (CSRC / name).read_text()
    return {other for other in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)}


def folder(name):
    return str(Path(name).parent)


def test_includes_are_files_of_csrc():
    assert len(FILES) > 80
    generated = {"build_info.h"}
    assert {other for name in FILES for other in included(name)} <= FILES | generated


def test_no_circle_of_files():
    order = list(
        graphlib.TopologicalSorter({name: included(name) for name in FILES}).static_order()
    )
    assert set(order) >= FILES


def test_no_circle_of_folders():
    """The root of csrc is no folder: it holds macros, bits and what registers everything."""
    graph = defaultdict(set)
    for name in FILES:
        for other in included(name) & FILES:
            if folder(name) != folder(other) and "." not in (folder(name), folder(other)):
                graph[folder(name)].add(folder(other))
    assert len(graph) >= 8
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_stem_in_two_folders():
    """But for a format, whose kernels have its name."""
    folders = defaultdict(set)
    for name in FILES:
        folders[Path(name).stem].add(folder(name))
    formats = {Path(name).stem for name in FILES if folder(name) == "format"}
    for stem, found in folders.items():
        allowed = {"cpu", "cuda", "format"} if stem in formats else set()
        assert len(found - allowed) + bool(found & allowed) <= 1, (stem, found)
