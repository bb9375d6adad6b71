"""Files that are either whole or absent (design rule 6): written aside, flushed to the disk, then renamed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cleangpt.errors import UserError

MANIFEST = "manifest.json"
PARTIAL, OLD = ".partial", ".old"
LONGEST = 2**28
"""Bytes of text or JSON that are read at once, at most."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` in one atomic step: after a crash either the old or the new file is there."""
    aside = path.with_name(path.name + PARTIAL)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk, half a file takes what others need
            aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text; line ends are written as they are, on every system."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value, indented for the reader."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`.

    Raises:
        UserError: the file is missing, no file but a device or a pipe, longer than `LONGEST`, or not UTF-8.
    """
    check_regular(path)
    if (size := path.stat().st_size) > LONGEST:
        raise UserError(f"{path} has {size:,} bytes; allowed: at most {LONGEST:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8: {error.reason} at byte {error.start:,}") from None


def check_regular(path: Path) -> None:
    """Refuses what would be read without end, such as a link to /dev/zero.

    Raises:
        UserError: the file is missing, or a folder, a device or a pipe.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")


def safe_name(name: str, place: Path) -> str:
    """The name of a file, as read from the file `place`, which may name no file but its neighbours.

    Raises:
        UserError: it leads to another folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(letter in name for letter in "/\\:\0"):
        raise UserError(f"{place} names {name!r}; allowed: a file's name without a folder")
    return name


def parse_json(text: str) -> Any:
    """The JSON value in a text.

    Raises:
        ValueError: it is not JSON, or has half a surrogate pair, which is no character and cannot be written again.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text)
    if re.search(r"\\u[dD]", text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        UserError: as `read_text`, or the file is not valid JSON.
    """
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def fsync_file(path: Path) -> None:
    """Waits until the content of `path` is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Waits until renames in `folder` are on the disk, where the system can open folders (not on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fsync_files(files: Sequence[Path]) -> dict[str, Any]:
    """Waits until files are on the disk; returns their entries in a manifest, sizes and checksums, by name."""
    with ThreadPoolExecutor(2) as threads:  # the processor takes checksums while the disk writes
        digests = threads.map(sha256, files)
        for path in files:
            fsync_file(path)
        return {path.name: {"bytes": path.stat().st_size, "sha256": digest}
                for path, digest in zip(files, digests, strict=True)}  # fmt: skip


def commit_folder(partial: Path, folder: Path, flushed: Mapping[str, Any] | None = None) -> None:
    """Makes the finished folder `partial` appear as `folder`: manifest of sizes and checksums, flush, rename.

    An older `folder` is moved aside first and removed last, so a good one exists at every moment, which `restore` finds
    after a crash; one that has the same bits stays. `flushed` has the entries of files that are on the disk already.
    """
    manifest = dict(flushed or {})
    manifest |= fsync_files(sorted(path for path in partial.iterdir() if path.name not in {MANIFEST, *manifest}))
    write_json(partial / MANIFEST, manifest)
    if (folder / MANIFEST).is_file() and not find_corruption(folder) and read_json(folder / MANIFEST) == manifest:
        shutil.rmtree(partial)
        return
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    try:
        partial.replace(folder)
    except OSError:
        restore(folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Brings back a `folder` that `seal` had moved aside when a crash came; removes what it has replaced."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.replace(folder)
        fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Brings back what a crash left aside in `folder`, and removes what it left half-done."""
    for old in folder.glob("*" + OLD):
        restore(old.with_suffix(""))
    for partial in folder.glob("*" + PARTIAL):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)  # what a dying process is still writing goes the next time
        else:
            partial.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Removes a folder: after a crash it is whole, or not there. Of a link to one, the link alone."""
    if folder.is_symlink():
        folder.unlink()
        return
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    folder.replace(partial)
    try:
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial)


def find_corruption(folder: Path, part: int = 0, parts: int = 1, needed: Iterable[str] = ()) -> str:
    """Says in a few words what is wrong with a sealed folder, or returns an empty string when it is whole.

    Several processes may share the work: each looks at one of so many `parts` of the files. The manifest must name
    those that are `needed`.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if missing := sorted(set(needed) - manifest.keys()):
            return f"{missing[0]} is not in {MANIFEST}"
        for name, entry in list(manifest.items())[part::parts]:
            path = folder / name
            if Path(name).name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (UserError, OSError) as error:  # a disk that fails says so when it is read
        return str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is not a manifest"
    return ""
