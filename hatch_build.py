"""What a package index shows of the README: its links lead to files beside it, and there are none there."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


class WholeLinks(MetadataHookInterface):
    """The README with addresses in place of relative links."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        whole = LINK.sub(lambda link: f"]({metadata['urls']['Source']}{link[1]})", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": whole}
