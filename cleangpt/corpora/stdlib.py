"""The source code of Python's standard library: real text on every machine, without a network."""

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cleangpt.corpora.reading import TextFile, read_text, unit_hash
from cleangpt.corpora.text import TextCorpus
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError

LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages"),
}
"""Folders of test suites, old tools, generated text and other packages."""


@dataclass(frozen=True, kw_only=True)
class Stdlib(TextCorpus):
    """Python's standard library, each module a document. The text depends on Python's version, which the card names."""

    vocab_size: int = 4096
    """Maximum vocabulary size of the byte-pair encoding."""
    max_bytes: int | None = None
    """Maximum total size of the modules in bytes; None: all modules."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        super().check()
        if self.max_bytes is not None and self.max_bytes < 100_000:
            raise UserError(f"corpus.max_bytes is {self.max_bytes}; allowed: 100,000 or more")

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        files = self.files(Path(sysconfig.get_path("stdlib")))
        return self.write(folder, files, console, python=platform.python_version())

    def changed_inputs(self, dataset: TokenDataset) -> Iterator[str]:
        """Whether modules have changed since the dataset was made, or Python is another."""
        if (before := dataset.source.get("python")) != platform.python_version():
            yield f"Python was {before}, is {platform.python_version()}, and its source code may have changed"
        yield from super().changed_inputs(dataset)

    def files(self, library: Path) -> list[TextFile]:
        """The modules to use, sorted by path; those with the lowest path hashes, at least one, are for validation.

        Raises:
            UserError: `library` has fewer than two modules.
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
                f"{library} has no source code of the standard library; use the corpus text with your own files"
            )
        held_out = {path for path, _ in chosen[: max(1, round(self.val_fraction * len(chosen)))]}
        return [_file(library / path, size, "val" if path in held_out else "train") for path, size in sorted(chosen)]


def _file(path: Path, size: int, split: str) -> TextFile:
    return TextFile(path, size, lambda: (replace(piece, split=split) for piece in read_text(path)))
