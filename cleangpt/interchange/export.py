"""`cleangpt export`: a checkpoint in another program's format, written completely or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.errors import UserError
from cleangpt.files import MANIFEST, PARTIAL, commit_folder, fsync_file, fsync_folder
from cleangpt.interchange.gguf import MAGIC, write_gguf
from cleangpt.interchange.huggingface import TOKENIZER_CONFIG, write_huggingface


def export(checkpoint: Checkpoint, kind: str, out: Path, force: bool = False) -> None:
    """Writes a checkpoint to `out`: a folder for hf, a file for gguf.

    Args:
        checkpoint: what to export.
        kind: a key of EXPORTS.
        out: the folder or file to write; missing parent folders are created.
        force: replace an earlier export.

    Raises:
        UserError: `out` exists, or the checkpoint cannot be expressed in that format.
    """
    _check_free(kind, out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + PARTIAL)
    _remove(partial)
    try:
        EXPORTS[kind](checkpoint, partial, out)
    finally:
        _remove(partial)


def _export_folder(checkpoint: Checkpoint, partial: Path, out: Path) -> None:
    partial.mkdir()
    write_huggingface(checkpoint, partial)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    commit_folder(partial, out)


def _export_file(checkpoint: Checkpoint, partial: Path, out: Path) -> None:
    write_gguf(checkpoint, partial)
    fsync_file(partial)
    partial.replace(out)
    fsync_folder(out.parent)


EXPORTS: dict[str, Callable[[Checkpoint, Path, Path], None]] = {"hf": _export_folder, "gguf": _export_file}


def _check_free(kind: str, out: Path, force: bool) -> None:
    """Refuses to replace anything that no export wrote, so that a typo cannot delete someone's files."""
    if not out.exists() or (kind == "hf" and out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UserError(f"{out} exists; give --out another name, or --force to replace an earlier export")
    if not (_is_exported_folder(out) if kind == "hf" else _is_exported_file(out)):
        raise UserError(f"{out} was not written by an export, so --force does not replace it; give --out another name")


def _is_exported_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / TOKENIZER_CONFIG).is_file()


def _is_exported_file(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
