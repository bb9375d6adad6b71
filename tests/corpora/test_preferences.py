"""Preferences from files: every form of them, what counts, what is truncated, skipped or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.preferences import Preferences
from cleangpt.corpora.rows import Row, fitted, joined, mismatched
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError

END = 256
USER, BOT = "user", "assistant"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prepared(folder: Path, lines: list[Any], console: Console | None = None, **fields: Any) -> TokenDataset:
    """The dataset of the lines, which are repeated so that each split has some."""
    file = folder / "preferences.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    corpus = Preferences(files=(str(file),), **{"row": 60, "val_fraction": 0.5} | fields)
    return prepare_dataset(corpus, folder / "data", console=console or Console(quiet=True))


def rows(dataset: TokenDataset) -> list[tuple[str, str]]:
    """Prompt and answer of every row of both splits as text, where | is the end token; the answer alone counts."""
    found = []
    for part in dataset.splits.values():
        for start in range(0, part.tokens, dataset.row_length or 0):
            tokens = part.read(start, dataset.row_length or 0).astype(int).tolist()
            mask = part.read_mask(start, dataset.row_length or 0).astype(bool)
            first, last = np.flatnonzero(mask)[[0, -1]].tolist()
            assert not any(tokens[last + 1 :]) and last < len(tokens) - 1
            texts = (
                "".join("|" if token == END else chr(token) for token in part)
                for part in (tokens[:first], tokens[first : last + 1])
            )
            found.append(tuple(texts))
            assert mask[first : last + 1].all() or "user" in found[-1][1]
    return found


def counts(dataset: TokenDataset) -> dict[str, int]:
    total: dict[str, int] = {}
    for split in dataset.description["splits"].values():
        for name, count in split["counts"].items():
            total[name] = total.get(name, 0) + count
    return {name: count for name, count in total.items() if count}


def numbered(number: int) -> dict[str, Any]:
    return {"prompt": f"Say {number}: ", "chosen": f"{number}", "rejected": f"not {number}"}


def test_texts_are_written_as_they_are(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [numbered(number) for number in range(20)])
    assert dataset.group == ("chosen", "rejected") and dataset.chat_template is None
    found = rows(dataset)
    assert sorted(found[::2]) == sorted((f"Say {number}: ", f"{number}|") for number in range(20))
    assert [answer for _, answer in found[1::2]] == [f"not {answer}" for _, answer in found[::2]]
    assert counts(dataset) == {"examples": 20}


@pytest.mark.parametrize("form", ["prompt as text", "prompt as messages", "whole", "whole, and a prompt"])
def test_conversations_are_written_by_a_template(tmp_path: Path, form: str) -> None:
    """However they are divided into fields; what comes before the answers does not count."""

    def line(number: int) -> dict[str, Any]:
        asked = [message(USER, f"Say {number}.")]
        answers = [[message(BOT, text)] for text in (f"{number}", f"not {number}")]
        if form.startswith("whole"):
            given = {} if form == "whole" else {"prompt": f"Say {number}."}
            return given | {"chosen": asked + answers[0], "rejected": asked + answers[1]}
        return {"prompt": asked[0]["content"] if form == "prompt as text" else asked, "chosen": answers[0],
                "rejected": answers[1]}  # fmt: skip

    dataset = prepared(tmp_path, [line(number) for number in range(20)], as_chat=True)
    assert dataset.chat_template is not None
    assert ("user\nSay 7.\nassistant\n", "7|") in rows(dataset)
    assert ("user\nSay 7.\nassistant\n", "not 7|") in rows(dataset)


def test_texts_as_a_question_and_its_answer(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [numbered(number) for number in range(20)], as_chat=True)
    assert ("user\nSay 3: \nassistant\n", "3|") in rows(dataset)


def test_messages_come_in_the_forms_that_conversations_have(tmp_path: Path) -> None:
    """Speakers by other names and in capitals, content in parts, fields that are null, as in Parquet."""
    lines = [
        {
            "prompt": [{"role": "Human ", "content": [{"type": "text", "text": f"Say {n}"}, "."], "name": None}],
            "chosen": [message("gpt", f"{n}")],
            "rejected": [message("ASSISTANT", f"not {n}")],
        }
        for n in range(20)
    ]
    found = rows(prepared(tmp_path, lines, as_chat=True))
    assert ("user\nSay 7.\nassistant\n", "7|") in found and ("user\nSay 7.\nassistant\n", "not 7|") in found


TOOLS = [{"name": "say", "parameters": {"n": {"type": "integer"}}}]
TOOLED = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("field", ["tools", "functions"])
@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_the_template_gets_the_tools_of_each_line(tmp_path: Path, given: Any, field: str) -> None:
    (tmp_path / "t.jinja").write_text(TOOLED, encoding="utf-8")
    call = {"role": BOT, "content": None, "tool_calls": [{"say": 7}]}
    lines = [numbered(n) | {field: given, "chosen": [call]} for n in range(20)]
    template = {"as_chat": True, "chat_template": str(tmp_path / "t.jinja")}
    dataset = prepared(tmp_path, lines, row=150, **template, **({} if field == "tools" else {"tools_field": field}))
    prompt = f"{json.dumps(TOOLS)}\nuser: Say 3: |assistant: "
    assert (prompt, '[{"say": 7}]|') in rows(dataset) and (prompt, "not 3|") in rows(dataset)


@pytest.mark.parametrize(
    ("fields", "remedy"), [({"as_chat": True}, "give a chat template that writes tools"), ({}, "give corpus.as_chat")]
)
def test_tools_that_are_not_in_the_text_are_told(
    tmp_path: Path, fields: dict[str, Any], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [numbered(n) | {"tools": TOOLS if n % 2 else None} for n in range(20)]
    told = Console(width=200)
    dataset = prepared(tmp_path, lines, console=told, **fields)
    assert counts(dataset)["conversations with tools that are not in the text"] == 10
    assert f"not in the text: 10, so the model will not learn to call them; {remedy}\n" in capsys.readouterr().out


def test_only_what_follows_the_shared_messages_counts(tmp_path: Path) -> None:
    shared = [message(USER, "One?"), message(BOT, "Two."), message(USER, "Three?")]
    lines = [
        {"chosen": [*shared, message(BOT, f"Four {n}.")], "rejected": [*shared, message(BOT, f"Five {n}.")]}
        for n in range(20)
    ]
    prompt = "user\nOne?\nassistant\nTwo.|user\nThree?\nassistant\n"
    assert (prompt, "Four 3.|") in rows(prepared(tmp_path, lines, as_chat=True))


def test_labelled_answers_have_a_mismatched_one_below_each(tmp_path: Path) -> None:
    lines = [{"prompt": f"Say {n}: ", "completion": f"{n}", "label": n % 3 == 0} for n in range(20)]
    dataset = prepared(tmp_path, lines, label_field="label")
    assert dataset.group == ("answer", "mismatched")
    found = rows(dataset)
    for (prompt, answer), (below, other) in zip(found[::2], found[1::2], strict=True):
        assert prompt == below and prompt == f"Say {answer[:-1]}: " and other != answer
    for part in dataset.splits.values():
        desirable = part.read_column("desirable", 0, part.tokens).reshape(-1, dataset.row_length)
        tokens = part.read(0, part.tokens).reshape(-1, dataset.row_length)
        for row in range(0, len(tokens), 2):
            number = int("".join(chr(token) for token in tokens[row] if token < 256).split(":")[0].split()[1])
            assert set(desirable[row]) == {number % 3 == 0}


def test_a_margin_is_a_column(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [numbered(n) | {"by": n / 4} for n in range(20)], margin_field="by")
    margins = np.concatenate([
        part.read_column("margin", 0, part.tokens).reshape(-1, dataset.row_length)[:, 0]
        for part in dataset.splits.values()
    ])  # fmt: skip
    assert [float(margin) for margin in margins[::2]] == [int(answer[:-1]) / 4 for _, answer in rows(dataset)[::2]]
    assert (margins[::2] == margins[1::2]).all()


def test_a_row_too_long_loses_the_start_of_its_prompt(tmp_path: Path) -> None:
    """Both of a pair the same tokens; one token stays free, for a reward model to read the end."""
    lines = [numbered(n) | {"prompt": "x" * 30 + f" Say {n}: "} for n in range(10, 30)]
    dataset = prepared(tmp_path, lines, row=20)
    found = rows(dataset)
    assert {len(prompt) for prompt, _ in found} == {20 - len("not 10|")}
    assert all(prompt.endswith(f"Say {answer[:-1]}: ") for prompt, answer in found[::2])
    assert [prompt for prompt, _ in found[::2]] == [prompt for prompt, _ in found[1::2]]
    assert counts(dataset)["truncated at the start of the prompt"] == 20


def test_what_cannot_be_compared_is_skipped_and_counted(tmp_path: Path) -> None:
    good = [numbered(number) for number in range(20)]
    bad = [
        numbered(1) | {"chosen": "y" * 100}, numbered(2) | {"rejected": ""}, numbered(3) | {"prompt": ""},
        numbered(4) | {"rejected": "4"}, numbered(5) | {"chosen": "end <|endoftext|>"},
    ]  # fmt: skip
    dataset = prepared(tmp_path, good + bad)
    assert len(rows(dataset)) == 40
    assert counts(dataset) == {
        "examples": 25, "skipped, an answer longer than a row": 1, "skipped, an empty prompt or answer": 2,
        "skipped, both answers alike": 1, "conversations skipped, a special token in the text": 1,
    }  # fmt: skip


def test_a_special_token_that_only_the_template_completes_is_spelled_too(tmp_path: Path) -> None:
    (tmp_path / "roles.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8"
    )
    bad = {"prompt": [message(USER, "?"), message("|endoftext|", "x")], "chosen": "a", "rejected": "b"}
    good = [numbered(number) for number in range(20)]
    dataset = prepared(tmp_path, [*good, bad], as_chat=True, chat_template=str(tmp_path / "roles.jinja"))
    assert len(rows(dataset)) == 40
    assert counts(dataset)["conversations skipped, a special token in the text"] == 1


@pytest.mark.parametrize(
    ("line", "fields", "message"),
    [
        ([1, 2], {}, "line 1: list where an object should be"),
        ({"prompt": "a", "chosen": "b"}, {}, "line 1: no field 'rejected'"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, {}, "no field 'chosen'.*choosen"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, {}, "line 1: int where text should be"),
        ({"prompt": "a", "chosen": [message(BOT, "b")], "rejected": "c"}, {}, "--corpus.as-chat"),
        ({"prompt": "a", "chosen": [{"role": BOT}], "rejected": "c"}, {"as_chat": True}, "message 1 has no text"),
        ({"chosen": "b", "rejected": "c"}, {"as_chat": True}, "share no prompt"),
        ({"chosen": [message(USER, "b")], "rejected": [message(USER, "b")]}, {"as_chat": True}, "share no prompt"),
        (
            {"prompt": "a", "chosen": [message(BOT, "b"), message(USER, "c")], "rejected": "d"},
            {"as_chat": True}, "the last message is not the assistant's",
        ),
        (numbered(1) | {"tools": 5}, {"as_chat": True}, "line 1: int in the field 'tools'; allowed: a list of JSON"),
        (numbered(1) | {"by": "much"}, {"margin_field": "by"}, "by is 'much'; allowed: a number"),
        ({"prompt": "a", "completion": "b", "label": 2}, {"label_field": "label"}, "is 2; allowed: true or false"),
        ({"prompt": "a", "completion": "b"}, {"label_field": "label"}, "no field 'label'"),
        (numbered(1), {"chat_template": "x"}, "allowed without corpus.as_chat: None"),
        (numbered(1), {"row": 1}, "corpus.row is 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said_in_one(
    tmp_path: Path, line: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        prepared(tmp_path, [line], **fields)
    assert "\n" not in str(refused.value)


def test_parquet_has_the_same_fields(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [numbered(number) for number in range(20)]
    parquet.write_table(arrow.Table.from_pylist(lines), tmp_path / "preferences.parquet")
    corpus = Preferences(files=(str(tmp_path / "preferences.parquet"),), row=60, val_fraction=0.5)
    dataset = prepare_dataset(corpus, tmp_path / "data", console=Console(quiet=True))
    assert sorted(rows(dataset)) == sorted(rows(prepared(tmp_path, lines)))


# Rows -----------------------------------------------------------------------------------------------------------------


def row(prompt: int, answer: int) -> Row:
    return joined(np.arange(prompt), 100 + np.arange(answer))


@pytest.mark.parametrize("length", range(4, 20))
def test_truncation_keeps_answers_whole_and_prompts_alike(length: int) -> None:
    pair = [row(6, 3), row(6, 5)]
    found = fitted(pair, length)
    if length < 1 + 5 + 1:
        assert found is None
        return
    assert found is not None
    assert [list(one.tokens[one.start :]) for one in found] == [list(one.tokens[one.start :]) for one in pair]
    prompts = [list(one.tokens[: one.start]) for one in found]
    assert prompts[0] == prompts[1] == list(range(6))[-(length - 6) :]
    assert max(len(one.tokens) for one in found) == min(length - 1, 11)


def test_a_mismatched_row_has_its_own_prompt_and_the_next_answer() -> None:
    both = mismatched([row(2, 1), row(3, 2), row(4, 3)])
    assert [(one.start, len(one.tokens) - one.start) for pair in both for one in pair] == [
        (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 1),
    ]  # fmt: skip
