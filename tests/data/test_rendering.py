"""A chat template that wastes time or memory is ended, and the next one is rendered as if nothing had been."""

import sys
import time
from collections.abc import Iterator

import pytest

from cleangpt.data import rendering
from cleangpt.data.chat_template import PLAIN, ChatTemplate
from cleangpt.data.rendering import Renderer, TemplateError, render_here
from cleangpt.errors import UserError

HELLO = "{% for m in messages %}{{ m.content }}{% endfor %}"
VALUES = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Renderer]:
    """A process that gives a template little time."""
    monkeypatch.setattr(rendering, "SECONDS", 0.4)
    renderer = Renderer()
    yield renderer
    renderer.close()


@pytest.mark.default(3)
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 9) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%100000000000d' % 1 }}",
        "{{ 'a' | center(10 ** 11) }}",
        "{{ messages | tojson(indent=10 ** 11) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 100_000,
        "{% if 1 %}" * 10_000,
    ],
    ids=lambda source: source[:40],
)
def test_a_template_that_wastes_time_or_memory_is_ended(renderer: Renderer, source: str) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template (fails: |is not valid Jinja: )[^\n]*$"):
        renderer.render(source, VALUES)
    assert renderer.render(HELLO, VALUES) == "hello", "the next template has a process again"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such limit")
def test_its_memory_is_limited(renderer: Renderer) -> None:
    with pytest.raises(TemplateError, match="it takes too much memory"):
        renderer.render(f"{{{{ 'a' * {rendering.MEMORY} }}}}", VALUES)
    with pytest.raises(TemplateError, match=r"a text of 67,108,865 characters; allowed: at most 67,108,864"):
        render_here(f"{{{{ 'a' * {rendering.LONGEST + 1} }}}}", VALUES)


def test_time_is_of_a_conversation_and_not_of_a_process(renderer: Renderer) -> None:
    began = time.monotonic()
    while time.monotonic() < began + 0.6:
        assert renderer.render(HELLO, VALUES) == "hello"


@pytest.mark.default(3)
@pytest.mark.parametrize(
    "content", ["", "\ud800", "\0", "\u2028\n\r", "a" * 100_000, 'quote " and \\ backslash', "\ufdd0", "漢字 🙂"]
)
def test_any_text_passes_between_the_processes_as_it_is(renderer: Renderer, content: str) -> None:
    values = {"messages": [{"role": "user", "content": content, "when": None, "n": [1, 2.5, True]}]}
    assert renderer.render(HELLO + "{{ messages[0].n }}", values) == render_here(HELLO + "{{ messages[0].n }}", values)


def test_what_lies_in_the_current_folder_is_not_imported(
    renderer: Renderer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "jinja2.py").write_text("raise SystemExit('owned')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert renderer.render(HELLO, VALUES) == "hello"


def test_only_the_template_of_the_package_is_rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering.Renderer, "render", lambda *_: 1 / 0)
    assert ChatTemplate(PLAIN, {"eos_token": "!"}).render(VALUES["messages"]) == "user\nhello\n"
    with pytest.raises(ZeroDivisionError):
        ChatTemplate(HELLO).render(VALUES["messages"])


def test_a_template_s_failure_is_a_user_s_line() -> None:
    with pytest.raises(UserError, match="the chat template fails: 'nothing' is undefined"):
        ChatTemplate("{{ nothing.at.all }}").render(VALUES["messages"])
