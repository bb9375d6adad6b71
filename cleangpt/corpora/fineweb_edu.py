"""FineWeb-Edu (Penedo et al. 2024, "The FineWeb datasets"): web pages that a classifier found educational."""

from dataclasses import dataclass
from typing import Literal

from cleangpt.corpora.hub_text import HubDataset, HubText

FOLDERS = {"10BT": "sample/10BT", "100BT": "sample/100BT", "350BT": "sample/350BT", "all": "data"}


@dataclass(frozen=True, kw_only=True)
class FineWebEdu(HubText):
    """FineWeb-Edu: 1.3 trillion GPT-2 tokens of educational web pages, or a sample, up to max_tokens."""

    edition: Literal["10BT", "100BT", "350BT", "all"] = "10BT"
    """Subset to download: a sample of this many billion GPT-2 tokens, or all."""

    def hub_dataset(self) -> HubDataset:
        """The dataset's location on the Hub."""
        return HubDataset("HuggingFaceFW/fineweb-edu", FOLDERS[self.edition])
