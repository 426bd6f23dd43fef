"""Hooks of `make docs`: the pages at the top of the repository are pages of the site, too."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def name_of(path: Path) -> str:
    """The name in the site, which has all pages in one folder."""
    return "index.md" if path == ROOT / "README.md" else path.name


def on_files(files: Files, *, config: Any) -> Files:
    for path in ROOT.glob("*.md"):
        files.append(File.generated(config, name_of(path), abs_src_path=str(path)))
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

    return re.sub(r"\[([^]]+)\]\(((?!https?:)[^)#\s]+)(#[^)]*)?\)", link, markdown)
