"""FineWeb-Edu (Penedo et al. 2024, "The FineWeb datasets"): web pages that a classifier found educational."""

from dataclasses import dataclass
from typing import Literal

from cleangpt.corpora.hub_text import Dataset, HubText

FOLDERS = {"10BT": "sample/10BT", "100BT": "sample/100BT", "350BT": "sample/350BT", "all": "data"}


@dataclass(frozen=True, kw_only=True)
class FineWebEdu(HubText):
    """1.3 trillion tokens of GPT-2, or a sample of them; as many are taken as max_tokens says."""

    edition: Literal["10BT", "100BT", "350BT", "all"] = "10BT"
    """Which part to download: a sample of so many billion tokens of GPT-2, or all."""

    def place(self) -> Dataset:
        """Where the corpus lies on the hub."""
        return Dataset("HuggingFaceFW/fineweb-edu", FOLDERS[self.edition])
