#!/usr/bin/env python3
"""Prints how large the code is, and how many files CONTRIBUTING.md's walks touch."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("csrc", "python")


def tracked(*folders: str) -> list[Path]:
    names = subprocess.check_output(["git", "ls-files", "-z", *folders], cwd=ROOT, text=True)
    return [ROOT / name for name in names.split("\0") if name]


def walks() -> dict[str, list[str]]:
    """The files that each walk names: the link that begins a numbered step.

    A walk is a heading such as "## Adding a leaf: 5 files" and the steps up to the next heading.
    """
    sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return {
        section.splitlines()[0]: re.findall(r"^\d+\. \[[^]]+\]\(([^)]+)\)", section, re.MULTILINE)
        for section in sections
        if re.match(r".*: \d+ files\n", section)
    }


def main() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in tracked(*CODE)}
    for folder in CODE:
        print(
            f"{folder}: {sum(n for path, n in lines.items() if path.is_relative_to(ROOT / folder))}"
        )
    print(f"{' + '.join(CODE)}: {sum(lines.values())} lines in {len(lines)} files")
    for title, suffixes in (("Python", {".py", ".pyi"}), ("C++", {".h", ".cpp", ".cu"})):
        print(f"\nlargest {title} files")
        largest = sorted((n, path) for path, n in lines.items() if path.suffix in suffixes)[-5:]
        for n, path in reversed(largest):
            print(f"{n:6} {path.relative_to(ROOT)}")
    print("\nwalks")
    for title, files in walks().items():
        print(f"{len(files):6} {title}")


if __name__ == "__main__":
    main()
