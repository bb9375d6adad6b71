"""One file from the web: resumed where it broke off, tried again when the network fails, and proven by its SHA-256."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cleangpt.errors import UserError
from cleangpt.files import PARTIAL, fsync_file, fsync_folder, sha256

TRIES = 5
FIRST_WAIT = 1.0
"""Seconds before the second try; each wait is twice the one before."""
TIMEOUT = 30.0
"""Seconds without an answer after which a try has failed."""
PIECE = 2**16


def download(url: str, path: Path, *, size: int, digest: str, otherwise: str, console: Console) -> Path:
    """Brings the file at `url` to `path`, unless it is there already; work in progress lies in `path` + ".partial".

    Args:
        url: http or https.
        path: where the file goes; its folder is made.
        size: of the file, in bytes.
        digest: its SHA-256 in hexadecimal.
        otherwise: what to do where the network fails, for the message.
        console: shows the progress.

    Raises:
        UserError: the network failed every time, the server refuses, or the file is another one.
    """
    if path.is_file() and path.stat().st_size == size and sha256(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    _fetch_patiently(url, partial, size, otherwise, console)
    if partial.stat().st_size != size or sha256(partial) != digest:
        partial.unlink()
        raise UserError(f"{url} is not the file it should be (its SHA-256 differs): {otherwise}")
    fsync_file(partial)
    partial.replace(path)
    fsync_folder(path.parent)
    return path


def _fetch_patiently(url: str, partial: Path, size: int, otherwise: str, console: Console) -> None:
    """Tries until `partial` has `size` bytes, waiting longer each time."""
    for attempt in range(TRIES):
        try:
            _fetch(url, partial, size, console)
            return
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", "") or error)
        if attempt + 1 < TRIES:
            wait = FIRST_WAIT * 2**attempt
            console.print(f"{url}: {reason}; trying again in {wait:g} s", markup=False, soft_wrap=True)
            time.sleep(wait)
    raise UserError(f"cannot download {url} ({reason}): {otherwise}")


def _fetch(url: str, partial: Path, size: int, console: Console) -> None:
    """One try: asks for what is missing and appends it.

    Raises:
        ConnectionError: the connection ended before the file did.
    """
    have = partial.stat().st_size if partial.is_file() else 0
    if have >= size:
        partial.unlink()
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, _progress(console) as bar:
        # A server that knows nothing of ranges sends the whole file.
        have = have if answer.status == 206 else 0
        task = bar.add_task(partial.stem, total=size, completed=have)
        with partial.open("ab" if have else "wb") as file:
            while have <= size and (piece := answer.read(PIECE)):
                have += file.write(piece)
                bar.update(task, completed=have)
    if have < size:
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
