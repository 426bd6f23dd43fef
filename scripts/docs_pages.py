"""Hooks of `make docs`: pages at the top of the repository are of the site, too; plots."""

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from plot_benchmarks import draw  # noqa: E402


def name_of(path: Path) -> str:
    """The name in the site, which has all pages in one folder."""
    return "index.md" if path == ROOT / "README.md" else path.name


def on_files(files: Files, *, config: Any) -> Files:
    for path in ROOT.glob("*.md"):
        files.append(File.generated(config, name_of(path), abs_src_path=str(path)))
    for path in draw(ROOT / "build" / "plots"):
        files.append(File.generated(config, f"plots/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links between pages; what links to a file of another kind keeps its text alone."""
    folder = Path(page.file.abs_src_path).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (folder / PurePosixPath(target)).resolve()
        if not path.exists() or files.get_file_from_path(name_of(path)) is None:
            return text
        return f"[{text}]({name_of(path)}{anchor or ''})"

    if page.file.src_uri == "BENCHMARKS.md":
        for name in re.findall(r"^## (\w+)$", markdown, re.M):
            if files.get_file_from_path(f"plots/{name}.svg"):
                title = f"## {name}\n"
                markdown = markdown.replace(title, f"{title}\n![](plots/{name}.svg)\n")
    return re.sub(r"(?<!!)\[([^]]+)\]\(((?!https?:)[^)#\s]+)(#[^)]*)?\)", link, markdown)
