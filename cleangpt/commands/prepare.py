"""prepare CORPUS: tokenize a corpus into a memory-mapped dataset"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from cleangpt.commands import subject
from cleangpt.commands.fields import FLAT
from cleangpt.commands.options import parse
from cleangpt.corpora import CORPORA, prepare
from cleangpt.errors import UserError, nearest
from cleangpt.files import user_path
from cleangpt.validation import Folder


@dataclasses.dataclass
class Preparation:
    """Options of `cleangpt prepare`, besides the fields of the corpus."""

    folder: Folder = "data"
    """Folder of the prepared datasets."""
    again: bool = False
    """Prepare the dataset again, even if it exists."""


def command(words: Sequence[str]) -> None:
    """Prepares a corpus; its fields are the options."""
    name = subject(words, "prepare", "CORPUS", lambda: list(CORPORA))
    if name not in CORPORA:
        raise UserError(f"corpus {name!r} is not known{nearest(name, CORPORA)}; allowed: {', '.join(CORPORA)}")
    fields = [("corpus", Annotated[CORPORA[name], FLAT])]
    about = (CORPORA[name].__doc__ or "").splitlines()[0]
    options: Any = dataclasses.make_dataclass("Options", fields, bases=(Preparation,), kw_only=True)
    chosen = parse(options, words[1:], program=f"cleangpt prepare {name}", about=about)
    dataset = prepare(chosen.corpus, user_path(chosen.folder), again=chosen.again)
    for source in dataset.sources:
        print(f"dataset: {source.dataset.folder}")
