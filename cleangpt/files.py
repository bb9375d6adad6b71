"""Atomic files and folders (design rule 6): written under another name, fsynced, then renamed."""

import contextlib
import hashlib
import json
import math
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
MAX_TEXT_BYTES = 2**28
"""The largest text or JSON file that is read."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: after a crash it has either the old or the new content."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # frees space on a full disk
            partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text, without newline translation on any system."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value; see `strict_json`."""
    write_text(path, strict_json(value) + "\n")


def strict_json(value: Any) -> str:
    """A value as indented JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`, without a byte-order mark.

    Raises:
        UserError: the file is missing, not a regular file, larger than `MAX_TEXT_BYTES`, or not UTF-8.
    """
    check_regular(path)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise UserError(f"{path} has {size:,} bytes; allowed: at most {MAX_TEXT_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8: {error.reason} at byte {error.start:,}") from None


def user_path(text: str | Path) -> Path:
    """A path as a user gives it, on the command line or in an experiment: ``~`` and ``~NAME`` are home folders.

    Raises:
        UserError: nobody of that name has a home folder, or no path can be spelled so.
    """
    if "\0" in str(text):
        raise UserError(f"{str(text)!r} is not a path; allowed: text without the character 0")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise UserError(f"{str(text)!r} is not a path; allowed: text without unpaired surrogates") from None
    except RuntimeError:
        raise UserError(f"{str(text)!r}: there is no such home folder; write it as ./{text} if it is a name") from None


def check_regular(path: Path) -> None:
    """Refuses anything but a regular file, such as a link to /dev/zero, which would be read forever.

    Raises:
        UserError: the file is missing, or a folder, a device or a pipe.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")


def safe_name(name: str, source: Path) -> str:
    """Checks a file name that was read from the file `source`: it must stay in the folder of `source`.

    Raises:
        UserError: the name leads to another folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(letter in name for letter in "/\\:\0"):
        raise UserError(f"{source} names {name!r}; allowed: a file name without a folder")
    return name


def parse_json(text: str) -> Any:
    """The JSON value in a text.

    Raises:
        ValueError: it is not JSON, or has an unpaired surrogate, which UTF-8 cannot encode.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text)
    if re.search(r"\\u[dD]", text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        UserError: as for `read_text`, or the file is not valid JSON.
    """
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def fsync_file(path: Path) -> None:
    """Flushes the content of a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flushes renames in a folder to the disk; does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_files(files: Sequence[Path]) -> dict[str, Any]:
    """Flushes files to the disk; returns their manifest entries, sizes and checksums, by name."""
    with ThreadPoolExecutor(2) as threads:  # checksums are computed while the disk writes
        digests = threads.map(sha256, files)
        for path in files:
            fsync_file(path)
        return {path.name: {"bytes": path.stat().st_size, "sha256": digest}
                for path, digest in zip(files, digests, strict=True)}  # fmt: skip


def commit_folder(partial: Path, folder: Path, flushed: Mapping[str, Any] | None = None) -> None:
    """Commits the finished folder `partial` as `folder`: writes its manifest, fsyncs, renames.

    An existing `folder` is renamed first and removed last, so that an intact one always exists, which `restore` finds
    after a crash; one with the same content is kept. `flushed` has the manifest entries of files fsynced already.
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
    """Undoes or completes a `commit_folder` that a crash interrupted: restores the old folder, or removes it."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.replace(folder)
        fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Cleans up a folder after a crash: restores what was being replaced, and removes partial files and folders."""
    for old in folder.glob("*" + OLD):
        restore(old.with_suffix(""))
    for partial in folder.glob("*" + PARTIAL):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)  # a dying process may still write here; removed the next time
        else:
            partial.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder atomically: after a crash it is intact or gone. Of a symbolic link, removes only the link."""
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


def find_corruption(folder: Path, rank: int = 0, world_size: int = 1, required: Iterable[str] = ()) -> str:
    """Verifies a committed folder against its manifest; returns what is wrong, or an empty string if it is intact.

    Args:
        folder: made by `commit_folder`.
        rank: which share of the files to verify, so that several processes can divide the work.
        world_size: the number of shares.
        required: files that the manifest must list.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if missing := sorted(set(required) - manifest.keys()):
            return f"{missing[0]} is not in {MANIFEST}"
        for name, entry in list(manifest.items())[rank::world_size]:
            path = folder / name
            if Path(name).name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (UserError, OSError) as error:  # a failing disk raises an error when it is read
        return str(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is not a manifest"
    return ""
