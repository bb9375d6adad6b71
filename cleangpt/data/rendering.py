"""Renders chat templates in a separate process, so that one that never ends or takes gigabytes does no harm.

Jinja's sandbox keeps a template from calling or changing anything, but not from wasting time and memory: nested loops,
`'a' * 10 ** 10` or `10 ** 10 ** 10`. A process can be killed in the middle of any of these. Each line that it reads is
a request in JSON, each line that it writes the answer.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS = 10
"""Time limit for one conversation, in wall-clock time."""
MEMORY = 2**30
"""Limit on the process's address space in bytes; not on macOS and Windows, which do not support one."""
LONGEST = 2**26
"""Maximum length of a rendered conversation in characters."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Marks around an answer while a template is rendered; noncharacters of Unicode, so no text contains them."""


class TemplateError(Exception):
    """A template failed; the message says why."""


# Here ----------------------------------------------------------------------------------------------------------------


class Renderer:
    """The process in which templates run; started when first needed, and restarted after a template has killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, source: str, values: Mapping[str, Any]) -> str:
        """Renders a template with `values`, which are converted to JSON; those that cannot be become text.

        Raises:
            TemplateError: the template is invalid, refuses the values, or takes too long or too much memory.
        """
        request = json.dumps([source, dict(values)], default=str).encode("ascii") + b"\n"
        with self._lock:
            process = self._started()
            answer = b""
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                self.close()
                raise TemplateError(f"the chat template fails: it takes longer than {SECONDS} s, or too much memory")
        text, wrong = json.loads(answer)
        if wrong:
            raise TemplateError(wrong)
        return str(text)

    def close(self) -> None:
        """Stops the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            # With exactly the paths of this process, so that nothing in the current folder is imported.
            paths = f"import sys; sys.path[:] = {sys.path!r}"
            work = f"from {__name__} import serve; serve({SECONDS}, {MEMORY})"
            command = [sys.executable, "-I", "-c", f"{paths}; {work}"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process


# There ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def sandbox() -> Any:
    """The Jinja environment that Hugging Face's chat templates expect."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}...{% endgeneration %}`` around the assistant's answers."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """A value as JSON; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return sandbox().from_string(source)


def render_here(source: str, values: Mapping[str, Any]) -> str:
    """`Renderer.render` in this process, without its limits, for a trusted template."""
    wrong = "the chat template is not valid Jinja"
    try:
        template = _compiled(source)
        wrong = "the chat template fails"
        text = str(template.render(**values))
        if len(text) > LONGEST:
            raise ValueError(f"a text of {len(text):,} characters; allowed: at most {LONGEST:,}")
        return text
    except MemoryError:
        raise TemplateError(f"{wrong}: it takes too much memory") from None
    except Exception as error:  # someone else's template may fail in any way
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TemplateError(f"{wrong}: {first}") from None


def serve(seconds: float, memory: int) -> None:
    """Answers requests until there are no more; a template that takes too long kills the process."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sandbox()
    with Path(os.devnull).open("w") as nowhere:
        for line in sys.stdin.buffer:
            # Its thread does not need the interpreter, so it also ends a process deep in a single operation.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                answer = [render_here(*json.loads(line)), ""]
            except TemplateError as error:
                answer = ["", str(error)]
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            faulthandler.cancel_dump_traceback_later()
