"""What mkdocs does besides (a hook of mkdocs.yml): files outside docs/ that its pages link to join the site.

The pages are written for GitHub, where ``../CHANGELOG.md`` leads out of the folder. On the site the README is the first
page, the changelog a page, and any other file is copied under its own path, so that no link leads elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
FILES_BESIDE = "repository"  # the site's folder for linked files that are not pages
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the README and the changelog as pages, and every file that a page links to."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=translate((ROOT / path).read_text("utf-8"), ROOT)))
    for text in [*(page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]:
        add_linked(text, ROOT / "docs", files, config)
    add_linked((ROOT / "README.md").read_text("utf-8"), ROOT, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Translate the links of a page of docs/."""
    return markdown if page.file.src_uri in PAGES.values() else translate(markdown, ROOT / "docs")


def translate(text: str, folder: Path) -> str:
    """Return a page of ``folder`` with links as they are on the site."""
    return LINK.sub(lambda link: f"]({site_uri(link[1], folder)}{link[2] or ''})", text)


def site_uri(link: str, folder: Path) -> str:
    """Return where on the site a link of a page in ``folder`` leads."""
    target = (folder / link).resolve().relative_to(ROOT).as_posix()
    if target in PAGES:
        return PAGES[target]
    return str(PurePosixPath(target).relative_to("docs")) if target.startswith("docs/") else f"{FILES_BESIDE}/{target}"


def add_linked(text: str, folder: Path, files: Any, config: Any) -> None:
    """Add to the site what a page of ``folder`` links to outside docs/."""
    for link, _ in LINK.findall(text):
        uri, source = site_uri(link, folder), (folder / link).resolve()
        if uri.startswith(f"{FILES_BESIDE}/") and source.is_file() and files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
