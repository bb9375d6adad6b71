"""OpenWebText (Gokaslan and Cohen 2019): an open reproduction of GPT-2's training data; 9 billion tokens."""

from dataclasses import dataclass

from cleangpt.corpora.hub_text import HubDataset, HubText


@dataclass(frozen=True, kw_only=True)
class OpenWebText(HubText):
    """OpenWebText: 8 million web pages, up to max_tokens."""

    def hub_dataset(self) -> HubDataset:
        """The dataset's location on the Hub, in the Hub's own conversion to Parquet."""
        return HubDataset("Skylion007/openwebtext", "plain_text", "refs/convert/parquet")
