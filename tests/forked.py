"""The command line in processes forked from one that has imported PyTorch: a start takes a tenth of a second, not four.

For all tests in which neither a fresh interpreter nor torchrun is what is tested. A forked process has its own folder,
environment, output, exit code and signals, like any other. Where a system cannot fork, each is a fresh interpreter.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# What follows is imported once, by the process that the others are forked from.
import cleangpt.corpora
import cleangpt.training.launch
import cleangpt.training.trainer  # noqa: F401
from cleangpt.commands import main

# The processes to come inherit this: models this small are faster on one thread.
os.environ["OMP_NUM_THREADS"] = "1"
PROJECT = Path(__file__).parents[1]
Hook = Callable[[], Any]
"""Called in the child before the command; a function of a module, or a `functools.partial` of one."""


class Command:
    """A running `cleangpt` command, or function; its methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        work: Callable[[], Any],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | str = ".",
        append_to: str = "",
    ) -> None:
        """Starts a process.

        Args:
            work: what the process does and exits with: a function of a module, or a `functools.partial` of one.
            environment: variables besides those of this process.
            folder: where the process works.
            append_to: a file in `folder` to which all that is printed is appended, instead of files of its own.
        """
        place = Path(folder).absolute()
        if append_to:
            self._paths = (place / append_to, place / append_to)
        else:
            printed = Path(tempfile.mkdtemp(prefix="printed_"))
            self._paths = (printed / "stdout", printed / "stderr")
            weakref.finalize(self, shutil.rmtree, printed, ignore_errors=True)
        arguments = (work, {**os.environ, **(environment or {})}, place, self._paths)
        self._process = _context().Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        code: int | None = self._process.exitcode
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 120) -> int:
        """The exit code. A process that does not end within `timeout` seconds is killed, and that is an error."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            self.kill()
            self._process.join()
            raise AssertionError(f"a process still ran after {timeout:.0f} s: {self.stderr[-3000:]}")
        return code

    @property
    def stdout(self) -> str:
        """What has been printed so far."""
        return self._paths[0].read_text(encoding="utf-8") if self._paths[0].exists() else ""

    @property
    def stderr(self) -> str:
        """What has been printed to standard error so far."""
        return self._paths[1].read_text(encoding="utf-8") if self._paths[1].exists() else ""


def start(*words: str, hook: Hook | None = None, **options: Any) -> Command:
    """Starts `cleangpt WORDS`, after a hook in its process; the options are those of `Command`."""
    return Command(functools.partial(_command, list(words), hook), **options)


def run(*words: str, timeout: float = 120, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs `cleangpt WORDS` to its end; a keyword in capitals is a variable of its environment."""
    command = start(*words, environment=environment)
    return subprocess.CompletedProcess(list(words), command.wait(timeout), command.stdout, command.stderr)


def together(count: int) -> list[dict[str, str]]:
    """The environments that torchrun would give `count` processes that train together on this machine."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_together(
    count: int, *words: str, timeout: float = 120, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Runs `count` processes that train together to their ends, and joins what they have printed.

    Once one has failed, the others have fifteen seconds to notice. The exit code is 0, or 1 if any has failed.
    """
    commands = [start(*words, environment={**ours, **environment}) for ours in together(count)]
    deadline, noticed = time.monotonic() + timeout, False
    while (codes := [command.poll() for command in commands]).count(None):
        if any(codes) and not noticed:
            deadline, noticed = time.monotonic() + 15, True
        if time.monotonic() > deadline:
            for command in commands:
                command.kill()  # one that SIGSTOP has stopped ends too
        time.sleep(0.01)
    printed = ("".join(command.stdout for command in commands), "".join(command.stderr for command in commands))
    return subprocess.CompletedProcess(list(words), int(any(codes)), *printed)


PORTS = itertools.cycle(random.Random(os.getpid()).sample(range(20000, 32000), 12000))
"""Below those that Linux gives to connections, one of which could take a port between its choice and its use."""


def free_port() -> int:
    """A port on which nobody listens."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports cycle")


@functools.cache
def _context() -> Any:
    """What starts processes: a server that has imported this module and forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{PROJECT}{os.pathsep}{path or ''}"  # a server that cannot import it says nothing
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def _command(words: list[str], hook: Hook | None) -> int:
    if hook is not None:
        hook()
    return main(words)


def _run(work: Callable[[], Any], environment: dict[str, str], folder: Path, paths: tuple[Path, Path]) -> None:
    """The child: takes its place and does its work."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), paths, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the suite runs in the background, it is ignored
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this one under nohup
    sys.exit(work())
