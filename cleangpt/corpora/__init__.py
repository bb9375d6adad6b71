"""What we learn from, one file per corpus: each gets its text, tokenises it and writes a token store."""

import hashlib
import json
from pathlib import Path

from rich.console import Console

from cleangpt.config import CorpusConfig
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.corpora.base import CORPORA, Corpus, as_json, lock_folder, stale_source, user_errors
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.fables import Fables
from cleangpt.corpora.fineweb_edu import FineWebEdu
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.corpora.openwebtext import OpenWebText
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.data.dataset import CARD, STORE, TokenDataset
from cleangpt.data.mixing import Store
from cleangpt.errors import UserError
from cleangpt.files import restore

__all__ = ["CORPORA", "Corpus", "Mixture", "Text", "prepare", "prepare_store", "store_folder"]

CORPORA |= {
    "adder": Adder,
    "adder_chat": AdderChat,
    "chat": Chat,
    "fables": Fables,
    "fineweb_edu": FineWebEdu,
    "multiplier": Multiplier,
    "openwebtext": OpenWebText,
    "shakespeare_char": ShakespeareChar,
    "stdlib": Stdlib,
    "text": Text,
    "tinystories": TinyStories,
}


def store_folder(corpus: CorpusConfig, data_folder: Path) -> Path:
    """Where the token store of a corpus lies: a folder for each kind with each set of field values."""
    entry = as_json(corpus)
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode("utf-8")).hexdigest()
    return data_folder / f"{entry['kind']}-{digest[:8]}"


def prepare(corpus: CorpusConfig, data_folder: Path, again: bool = False, console: Console | None = None) -> Store:
    """Opens the token store of a corpus, or those of a mixture; prepares what is not there, or all `again` if asked.

    Progress and the card go to `console` (none: standard error). An interrupted preparation is gone on with.

    Raises:
        UserError: a field is out of range, or the text is missing or not text; nothing half-written is left.
    """
    console = console or Console(stderr=True)
    if isinstance(corpus, Mixture):
        corpus.check()
        return corpus.store(data_folder, lambda source: prepare_store(source, data_folder, again, console))
    return prepare_store(corpus, data_folder, again, console)


def prepare_store(corpus: CorpusConfig, data_folder: Path, again: bool, console: Console) -> TokenDataset:
    """`prepare` of a corpus that is no mixture."""
    if not isinstance(corpus, Corpus):
        raise UserError(f"corpus is a {type(corpus).__name__}; allowed: a subclass of cleangpt.corpora.Corpus")
    corpus.check()
    folder = store_folder(corpus, data_folder)
    restore(folder)
    if (folder / STORE).is_file() and not again:
        store = TokenDataset(folder)
        if file := stale_source(store):
            console.print(
                f"{file} has changed since {folder} was prepared; prepare again to use it", markup=False, soft_wrap=True
            )
        return store
    try:
        with lock_folder(folder, console):
            if (folder / STORE).is_file() and not again:  # by another process, which this one has waited for
                return TokenDataset(folder)
            with user_errors(folder):
                store = corpus.prepare(folder, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", markup=False)
        raise
    console.print((folder / CARD).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return store
