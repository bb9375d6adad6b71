"""The source code of the running Python's own standard library: real text on every machine, without a network."""

import platform
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from cleangpt.corpora.base import Corpus
from cleangpt.corpora.reading import TextFile, read_text, unit_hash
from cleangpt.corpora.text import choose_tokenizer, write_texts
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError

LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages"),
}
"""Folders of test suites, of old tools, of generated text, and of what is not the library's."""


@dataclass(frozen=True, kw_only=True)
class Stdlib(Corpus):
    """Every module is a document. Another version of Python has another text: the card names it."""

    tokenizer: Literal["byte", "bpe"] = "byte"
    """One token per byte, or byte-pair encoding learned here (needs cleangpt[bpe])."""
    vocab_size: int = 4096
    """Tokens of the byte-pair encoding, at most."""
    max_bytes: int | None = None
    """Take only modules of so many bytes together; none: all."""
    val_fraction: float = 0.05
    """Share of the modules to validate with; at least one."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        if self.vocab_size < 257:
            raise UserError(f"corpus.vocab_size is {self.vocab_size}; allowed: 257 or more")
        if self.max_bytes is not None and self.max_bytes < 100_000:
            raise UserError(f"corpus.max_bytes is {self.max_bytes}; allowed: 100,000 or more")
        if not 0 < self.val_fraction <= 0.5:
            raise UserError(f"corpus.val_fraction is {self.val_fraction}; allowed: more than 0, at most 0.5")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        files = self.files(Path(sysconfig.get_path("stdlib")))
        tokenizer = choose_tokenizer(self.tokenizer, self.vocab_size, None, files, console)
        return write_texts(self, folder, files, tokenizer, console, python=platform.python_version())

    def files(self, library: Path) -> list[TextFile]:
        """The modules taken, by path; those whose paths hash lowest validate, so that both splits are a fair mixture.

        Raises:
            UserError: fewer than two modules lie in `library`.
        """
        modules = [path.relative_to(library) for path in library.rglob("*.py")]
        modules = [path for path in modules if not LEFT_OUT & set(path.parts[:-1])]
        modules = sorted(modules, key=lambda path: (unit_hash(path.as_posix()), path.as_posix()))
        chosen, left = [], self.max_bytes
        for path in modules:
            size = (library / path).stat().st_size
            if size and (left is None or size <= left):
                chosen.append((path, size))
                left = None if left is None else left - size
        if len(chosen) < 2:
            raise UserError(
                f"{library} has no source code of the standard library; use the corpus text on files of yours"
            )
        held_out = {path for path, _ in chosen[: max(1, round(self.val_fraction * len(chosen)))]}
        return [_file(library / path, size, "val" if path in held_out else "train") for path, size in sorted(chosen)]


def _file(path: Path, size: int, split: str) -> TextFile:
    return TextFile(path, size, lambda: (replace(piece, split=split) for piece in read_text(path)))
