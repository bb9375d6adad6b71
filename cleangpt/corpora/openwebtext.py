"""OpenWebText (Gokaslan and Cohen 2019): the pages that GPT-2 was trained on, gathered again; some 9 billion tokens."""

from dataclasses import dataclass

from cleangpt.corpora.hub_text import Dataset, HubText


@dataclass(frozen=True, kw_only=True)
class OpenWebText(HubText):
    """8 million web pages; as many are taken as max_tokens says."""

    def place(self) -> Dataset:
        """Where the corpus lies on the hub, in the form into which the hub itself converts datasets."""
        return Dataset("Skylion007/openwebtext", "plain_text", "refs/convert/parquet")
