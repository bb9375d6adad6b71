"""Metadata that hatchling computes: README.md for the package index, whose pages have no files to link to."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Fills in `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds README.md, with links to the files of this version."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(text, metadata["urls"]["Repository"], f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(markdown: str, repository: str, tag: str) -> str:
    """Markdown whose relative links and pictures point to files in a repository on GitHub, at a tag."""

    def absolute(match: "re.Match[str]") -> str:
        mark, text, target = match.groups()
        kind = "raw" if mark else "blob"
        return f"{mark}[{text}]({repository}/{kind}/{tag}/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, markdown)
