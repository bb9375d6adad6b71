"""Corpora, one file each: how to get a text, tokenize it and write it as a dataset."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from cleangpt.config import CorpusConfig
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.corpora.base import (
    CORPORA,
    Corpus,
    changed_rows,
    dataset_fields,
    has_relative_paths,
    lock_folder,
    user_errors,
)
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.digits import Digits
from cleangpt.corpora.episodes import Episodes
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.corpora.fables import Fables
from cleangpt.corpora.fineweb_edu import FineWebEdu
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.multiplier import Multiplier
from cleangpt.corpora.openwebtext import OpenWebText
from cleangpt.corpora.pictures import Pictures
from cleangpt.corpora.preferences import Preferences
from cleangpt.corpora.rendered_words import RenderedWords
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.shapes import ShapesCaptions, ShapesVQA
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.corpora.text import Text
from cleangpt.corpora.tinystories import TinyStories
from cleangpt.data.dataset import CARD, TokenDataset, is_dataset
from cleangpt.data.mixing import MixedDataset, MixtureSource
from cleangpt.errors import UserError
from cleangpt.files import restore
from cleangpt.screen import Screen

__all__ = ["CORPORA", "Corpus", "Mixture", "Text", "dataset_folder", "prepare", "prepare_dataset"]

CORPORA |= {
    "adder": Adder,
    "adder_chat": AdderChat,
    "chat": Chat,
    "digits": Digits,
    "demonstrations": Demonstrations,
    "episodes": Episodes,
    "fable_openings": FableOpenings,
    "fable_preferences": FablePreferences,
    "fables": Fables,
    "fineweb_edu": FineWebEdu,
    "multiplier": Multiplier,
    "openwebtext": OpenWebText,
    "pictures": Pictures,
    "preferences": Preferences,
    "rendered_words": RenderedWords,
    "shakespeare_char": ShakespeareChar,
    "shapes_captions": ShapesCaptions,
    "shapes_vqa": ShapesVQA,
    "stdlib": Stdlib,
    "text": Text,
    "tinystories": TinyStories,
}


def dataset_folder(corpus: CorpusConfig, data_folder: Path) -> Path:
    """The folder of a corpus's dataset, named after its kind and a hash of its fields.

    Where they name files relative to the current folder, and datasets are not kept in a folder of that one, the hash is
    also of the way from one to the other: another project's files of the same names are others.
    """
    entry = dataset_fields(corpus)
    key: Any = entry
    if has_relative_paths(corpus) and (way := _way(data_folder.resolve(), Path.cwd())) != "..":
        key = [entry, way]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()
    return data_folder / f"{entry['kind']}-{digest[:8]}"


def _way(start: Path, end: Path) -> str:
    try:
        return Path(os.path.relpath(end, start)).as_posix()
    except ValueError:  # on another drive of Windows
        return end.as_posix()


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
    console = console or Screen(stderr=True)
    if not isinstance(corpus, Corpus):
        raise UserError(f"corpus is a {type(corpus).__name__}; allowed: a subclass of cleangpt.corpora.Corpus")
    corpus.check()
    folder = dataset_folder(corpus, data_folder)
    restore(folder)
    if is_dataset(folder) and not again:
        dataset = TokenDataset(folder)
        if changes := [*changed_rows(corpus, dataset), *corpus.changed_inputs(dataset)]:
            more = f" (one of {len(changes)} changes)" if len(changes) > 1 else ""
            line = f"the older dataset {folder} is used, though {changes[0]}{more}; to use what is there now, "
            console.print(f"{line}run cleangpt prepare with --again", markup=False, soft_wrap=True)
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
