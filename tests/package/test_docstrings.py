"""Docstrings: each public function has examples, and they print what they say."""

import doctest
import inspect

import attn_mask
import pytest
import torch

# Without examples that run here, and why.
WITHOUT = {
    "install": "changes transformers for the whole process; the pages' code does",
    "installed": "changes transformers; the pages' code does",
    "plot": "needs matplotlib, which is an extra; the pages' code draws",
    "uninstall": "changes transformers for the whole process; the pages' code does",
}

PUBLIC = [
    name
    for name in attn_mask.__all__
    if inspect.isroutine(getattr(attn_mask, name)) or name in ("aten_only", "installed", "packed")
]


def examples(name: str) -> list[doctest.DocTest]:
    """The docstring's own, as text: decorators hide from doctest where it is defined."""
    names = {"attn_mask": attn_mask, "torch": torch}
    finder = doctest.DocTestFinder(recurse=False)
    return finder.find(getattr(attn_mask, name), name, module=False, globs=names)


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - set(WITHOUT)))
def test_examples(name):
    (found,) = examples(name)
    assert found.examples, f"the docstring of {name} has no example"
    printed: list[str] = []
    ran = doctest.DocTestRunner().run(found, out=printed.append, clear_globs=False)
    assert ran.attempted and not ran.failed, "".join(printed)


def test_those_without_examples():
    assert set(WITHOUT) <= set(PUBLIC)
    assert not [name for name in WITHOUT for found in examples(name) if found.examples]


def test_all_callables_are_looked_at():
    left_out = {
        name for name in set(attn_mask.__all__) - set(PUBLIC) if callable(getattr(attn_mask, name))
    }
    assert left_out == {"Finding", "SdpaArguments"}  # what functions return
