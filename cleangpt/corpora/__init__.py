"""Corpora, one file each: how to get a text, tokenize it and write it as a dataset."""

import hashlib
import json
from pathlib import Path

from rich.console import Console

from cleangpt.config import CorpusConfig
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.corpora.base import CORPORA, Corpus, as_json, lock_folder, stale_source, user_errors
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.corpora.fables import Fables
from cleangpt.corpora.fineweb_edu import FineWebEdu
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.corpora.openwebtext import OpenWebText
from cleangpt.corpora.preferences import Preferences
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.data.dataset import CARD, TokenDataset, is_dataset
from cleangpt.data.mixing import MixedDataset, MixtureSource
from cleangpt.errors import UserError
from cleangpt.files import restore

__all__ = ["CORPORA", "Corpus", "Mixture", "Text", "dataset_folder", "prepare", "prepare_dataset"]

CORPORA |= {
    "adder": Adder,
    "adder_chat": AdderChat,
    "chat": Chat,
    "fable_openings": FableOpenings,
    "fable_preferences": FablePreferences,
    "fables": Fables,
    "fineweb_edu": FineWebEdu,
    "multiplier": Multiplier,
    "openwebtext": OpenWebText,
    "preferences": Preferences,
    "shakespeare_char": ShakespeareChar,
    "stdlib": Stdlib,
    "text": Text,
    "tinystories": TinyStories,
}


def dataset_folder(corpus: CorpusConfig, data_folder: Path) -> Path:
    """The folder of a corpus's dataset, named after its kind and a hash of its fields."""
    entry = as_json(corpus)
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode("utf-8")).hexdigest()
    return data_folder / f"{entry['kind']}-{digest[:8]}"


def prepare(
    corpus: CorpusConfig, data_folder: Path, again: bool = False, console: Console | None = None
) -> MixedDataset:
    """Opens the dataset of a corpus, or of each source of a mixture; prepares missing ones, or all with `again`.

    Progress and the card are printed to `console` (None: standard error). An interrupted preparation is resumed.

    Raises:
        UserError: a field is out of range, or a file is missing or not text; no partial dataset is left behind.
    """
    if isinstance(corpus, Mixture):
        corpus.check()
        return corpus.open(lambda source: prepare_dataset(source, data_folder, again, console))
    return MixedDataset([MixtureSource(prepare_dataset(corpus, data_folder, again, console))])


def prepare_dataset(
    corpus: CorpusConfig, data_folder: Path, again: bool = False, console: Console | None = None
) -> TokenDataset:
    """`prepare` for a corpus that is not a mixture."""
    console = console or Console(stderr=True)
    if not isinstance(corpus, Corpus):
        raise UserError(f"corpus is a {type(corpus).__name__}; allowed: a subclass of cleangpt.corpora.Corpus")
    corpus.check()
    folder = dataset_folder(corpus, data_folder)
    restore(folder)
    if is_dataset(folder) and not again:
        dataset = TokenDataset(folder)
        if file := stale_source(dataset):
            console.print(
                f"{file} has changed since {folder} was prepared; prepare again to use it", markup=False, soft_wrap=True
            )
        return dataset
    try:
        with lock_folder(folder, console):
            if is_dataset(folder) and not again:  # prepared by another process in the meantime
                return TokenDataset(folder)
            with user_errors(folder):
                dataset = corpus.prepare(folder, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command resumes from here", markup=False)
        raise
    console.print((folder / CARD).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return dataset
