"""FineWeb-Edu (Penedo et al. 2024, "The FineWeb datasets"): web pages that a classifier found educational."""

from dataclasses import dataclass
from typing import Literal

from cleangpt.corpora.hub_text import HubDataset, HubText

FOLDERS = {"10BT": "sample/10BT", "100BT": "sample/100BT", "350BT": "sample/350BT", "all": "data"}


@dataclass(frozen=True, kw_only=True)
class FineWebEdu(HubText):
    """1.3 trillion tokens of GPT-2, or a sample of them; as many are taken as max_tokens says."""

    edition: Literal["10BT", "100BT", "350BT", "all"] = "10BT"
    """Which part to download: a sample of this many billion tokens (of GPT-2's tokenizer), or all."""

    def hub_dataset(self) -> HubDataset:
        """Where the corpus is on the hub."""
        return HubDataset("HuggingFaceFW/fineweb-edu", FOLDERS[self.edition])
