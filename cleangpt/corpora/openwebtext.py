"""OpenWebText (Gokaslan and Cohen 2019): the pages that GPT-2 was trained on, collected again; 9 billion tokens."""

from dataclasses import dataclass

from cleangpt.corpora.hub_text import HubDataset, HubText


@dataclass(frozen=True, kw_only=True)
class OpenWebText(HubText):
    """8 million web pages, limited by max_tokens."""

    def hub_dataset(self) -> HubDataset:
        """Where the corpus is on the hub, in the form into which the hub itself converts datasets."""
        return HubDataset("Skylion007/openwebtext", "plain_text", "refs/convert/parquet")
