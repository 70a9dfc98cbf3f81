"""For mkdocs: the README is the home page, and links to what is no page lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add the README, whose pages lie beside it on the site."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(
        r"\]\((?!https?:|#)(?=[A-Z])", f"]({config['repo_url']}/blob/main/", text
    )  # CHANGELOG.md and the like
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Lead `../something` to the repository; the README to the home page."""
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\]\(\.\./", f"]({config['repo_url']}/blob/main/", markdown)
