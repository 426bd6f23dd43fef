#!/usr/bin/env python3
"""Prints how large the code is: files, functions, and the files of CONTRIBUTING.md's walks."""

import ast
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


def python_functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines of the body without its docstring, arguments that may be given by place)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1 if has_docstring else 0]
            arguments = [*node.args.posonlyargs, *node.args.args]
            of_class = bool(arguments) and arguments[0].arg in ("self", "cls")
            lines = (node.end_lineno or 0) - first.lineno + 1
            found.append((node.name, lines, len(arguments) - of_class))
    return found


def cpp_functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines of the body, parameters), by the layout that clang-format gives."""
    lines = path.read_text().splitlines()
    found = []
    for start, line in enumerate(lines):
        head = start
        while head and not re.search(r"^$|[;{}:]$|^ *(//|#|template)", lines[head - 1].rstrip()):
            head -= 1
        text = " ".join(lines[head : start + 1]).strip()
        name = re.search(r"([\w:~]+)\(", text)
        if (
            not line.endswith("{")
            or name is None
            or re.match(r"(if|for|while|switch|else)\b|}", text)
        ):
            continue
        if re.search(r"\b(struct|class)\b|\[[&=]?\]", text):
            continue  # types, and what is a part of a function
        closing = re.match(" *", lines[head])[0] + "}"  # type: ignore[index]
        end = next((i for i in range(start, len(lines)) if lines[i].startswith(closing)), start)
        depth, commas = 1, 0
        for character in text[name.end() :]:
            depth += (character in "(<{[") - (character in ")>}]")
            commas += character == "," and depth == 1
            if depth == 0:
                break
        found.append((name[1], end - start - 1, commas + 1))
    return found


def functions() -> list[tuple[Path, str, int, int]]:
    return [
        (path.relative_to(ROOT), *function)
        for path in tracked(*CODE)
        if path.suffix in (".py", ".h", ".cpp", ".cu")
        for function in (python_functions if path.suffix == ".py" else cpp_functions)(path)
    ]


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
    for title, place in (("longest bodies", 2), ("most arguments", 3)):
        print(f"\n{title}")
        for one in sorted(functions(), key=lambda one: one[place])[-5:][::-1]:
            print(f"{one[place]:6} {one[0]} {one[1]}")
    print("\nwalks")
    for title, files in walks().items():
        print(f"{len(files):6} {title}")


if __name__ == "__main__":
    main()
