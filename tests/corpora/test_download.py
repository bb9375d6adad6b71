"""Downloads survive a bad network and never leave a wrong file; a real server on this machine plays the web."""

import hashlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from cleangpt.corpora import download as module
from cleangpt.corpora.download import download
from cleangpt.errors import UserError

CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
QUIET = Console(quiet=True)


@dataclass
class Server:
    """What the server does with each request in turn: a status, or how many bytes it sends before it hangs up."""

    url: str = ""
    plan: list[str] = field(default_factory=list)
    ranges: bool = True
    content: bytes = CONTENT
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.headers.get("Range"))
            action = state.plan.pop(0) if state.plan else "whole"
            if action.startswith("status"):
                self.send_error(int(action.split()[1]))
                return
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state.ranges else 0
            body = state.content[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if action == "whole" else body[: int(action.split()[1])])

        def log_message(self, format: str, *args: object) -> None:
            """Keeps quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}/input.txt"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def fetch(server: Server, path: Path, console: Console = QUIET) -> Path:
    return download(server.url, path, size=len(CONTENT), digest=DIGEST, otherwise="give --file", console=console)


def test_a_file_arrives_whole_and_only_once(server: Server, tmp_path: Path) -> None:
    path = fetch(server, tmp_path / "deep" / "input.txt")
    assert path.read_bytes() == CONTENT
    assert [other.name for other in path.parent.iterdir()] == ["input.txt"]
    fetch(server, path)
    assert server.asked == [None]


def test_a_cut_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut 1000", "cut 200000", "whole"]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=201000-"]


def test_an_interrupted_download_is_resumed_by_the_next_command(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.partial").write_bytes(CONTENT[:5000])
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == ["bytes=5000-"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.plan = False, ["cut 1000"]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.plan = ["status 503", "status 429", "whole"]
    said = io.StringIO()
    assert fetch(server, tmp_path / "f", Console(file=said)).read_bytes() == CONTENT
    assert said.getvalue().count("trying again") == 2


def test_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.plan = ["status 404"]
    with pytest.raises(UserError, match=r"HTTP 404 .*: give --file"):
        fetch(server, tmp_path / "f")
    assert len(server.asked) == 1


def test_it_gives_up_in_the_end(server: Server, tmp_path: Path) -> None:
    server.plan = ["cut 10"] * 99
    with pytest.raises(UserError, match=r"the connection ended after 50 of 512,000 bytes.*give --file"):
        fetch(server, tmp_path / "f")
    assert len(server.asked) == module.TRIES
    assert not (tmp_path / "f").exists()


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    closed = Server(url="http://127.0.0.1:9/input.txt")
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/input\.txt.*give --file") as caught:
        fetch(closed, tmp_path / "f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"x" * len(CONTENT), CONTENT + b"more"])
def test_another_file_is_refused_and_removed(content: bytes, server: Server, tmp_path: Path) -> None:
    server.content = content
    with pytest.raises(UserError, match="SHA-256"):
        fetch(server, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_damaged_copy_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"damaged")
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
