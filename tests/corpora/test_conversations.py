"""Conversations are read in the forms of the field, learned by their answers alone, and travel with their template."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers as library
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cleangpt.checkpoints.checkpoint import load_checkpoint
from cleangpt.config import Source
from cleangpt.corpora import prepare, prepare_dataset
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.reading import unit_hash
from cleangpt.data.batch import IGNORED
from cleangpt.data.chat_template import PLAIN, encode_chat, stop_tokens
from cleangpt.data.dataset import CARD, TokenDataset
from cleangpt.errors import UserError
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

QUIET = Console(quiet=True)
MARKED = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def ask(number: int) -> list[dict[str, str]]:
    """A conversation whose answers are numbers, of one question or two."""
    turns = [(f"What is {number} + {added}?", str(number + added)) for added in range(1, 2 + number % 2)]
    return [{"role": role, "content": content}
            for turn in turns for role, content in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip


ASKED = [ask(number) for number in range(200)]


def write_jsonl(path: Path, entries: list[Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


@pytest.fixture
def asked(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "asked.jsonl", [{"messages": messages} for messages in ASKED])


def make(folder: Path, **fields: Any) -> TokenDataset:
    fields = {"pack": 127, "val_fraction": 0.2, "vocab_size": 300} | fields
    return prepare_dataset(Chat(**fields), folder / "data", console=QUIET)  # type: ignore[return-value]


def rows(store: TokenDataset, split: str) -> tuple[np.ndarray, np.ndarray]:
    part = store.splits[split]
    shape = (part.documents, store.row_length)
    return part.read(0, part.tokens).reshape(shape), part.read_mask(0, part.tokens).reshape(shape)


def answers(store: TokenDataset) -> list[str]:
    """The texts of all targets that follow one another, of both splits."""
    found = []
    for split in ("train", "val"):
        for ids, mask in zip(*rows(store, split), strict=True):
            for begin, end in np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2).tolist():
                found.append(store.tokenizer.decode(ids[begin:end].tolist()).rstrip("\0"))
    return found


EXPECTED = sorted(message["content"] for messages in ASKED for message in messages if message["role"] == "assistant")


# What is read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_answer_is_a_target_and_nothing_else_is(tokenizer: Any, asked: str, tmp_path: Path) -> None:
    store = make(tmp_path, files=(asked,), tokenizer=tokenizer)
    assert sorted(answers(store)) == EXPECTED
    for split in ("train", "val"):
        ids, mask = rows(store, split)
        last = (mask[:, :-1] == 1) & (mask[:, 1:] == 0)
        assert (ids[:, :-1][last] == store.tokenizer.eos_id).all()
        assert not mask[:, 0].any()


def test_the_rows_hold_each_conversation_whole(asked: str, tmp_path: Path) -> None:
    store = make(tmp_path, files=(asked,))
    template = store.chat_template
    assert template is not None
    texts = [store.tokenizer.decode(ids.tolist()) for split in ("train", "val") for ids in rows(store, split)[0]]
    for messages in ASKED:
        rendered = template.render(messages).replace("<|endoftext|>", "")
        assert sum(rendered in text for text in texts) >= 1


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt and response": (
        {"prompt_fields": ("prompt",)},
        lambda m: {"prompt": m[0]["content"], "response": m[1]["content"]},
    ),
    "instruction, input and output": (
        {"prompt_fields": ("instruction", "input"), "response_field": "output"},
        lambda m: {"instruction": "What is", "input": m[0]["content"][8:], "output": m[1]["content"]},
    ),
    "speakers by other names": (
        {"messages_field": "conversations", "role_field": "from", "content_field": "value"},
        lambda m: {"conversations": [{"from": "human", "value": m[0]["content"]},
                                     {"from": "gpt", "value": m[1]["content"]}]},
    ),
    "speakers in capitals": (
        {},
        lambda m: {"messages": [{"role": "User ", "content": m[0]["content"]},
                                {"role": "ASSISTANT", "content": m[1]["content"]}]},
    ),
    "content in parts": (
        {},
        lambda m: {"messages": [{"role": message["role"], "content": [
            {"type": "text", "text": message["content"][:1]}, {"type": "text", "text": message["content"][1:]}
        ]} for message in m[:2]]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_the_field_are_read(form: str, suffix: str, tmp_path: Path) -> None:
    fields, entry = FORMS[form]
    entries = [entry(messages) for messages in ASKED]
    path = tmp_path / f"asked.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, entries)
    elif suffix == "json":
        path.write_text(json.dumps(entries), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    store = make(tmp_path, files=(str(path),), **fields)
    assert sorted(answers(store)) == sorted(messages[1]["content"] for messages in ASKED)
    text = "".join(store.tokenizer.decode(rows(store, split)[0].reshape(-1).tolist()) for split in ("train", "val"))
    asked = "user\nWhat is\n\n0 + 1?" if form.startswith("instruction") else "user\nWhat is 0 + 1?"
    assert text.count(f"{asked}\nassistant\n1") == 1


def test_a_system_message_may_be_given_to_all_that_have_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Whisper."}, *ASKED[0]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages} for messages in [*ASKED, own]])
    store = make(tmp_path, files=(path,), system="Be exact.", pack=255)
    text = "".join(store.tokenizer.decode(rows(store, split)[0].reshape(-1).tolist()) for split in ("train", "val"))
    assert text.count("system\nBe exact.\nuser\n") == len(ASKED)
    assert text.count("system\nWhisper.\nuser\n") == 1


def test_the_split_is_of_whole_conversations_and_the_same_every_time(asked: str, tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, files=(asked,)) for name in ("one", "two"))
    assert first.description["sha256"] == second.description["sha256"]
    assert 20 < first.description["splits"]["val"]["counts"]["conversations"] < 60


# What is left out ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_cut_or_left_out_and_counted_on_the_card(tmp_path: Path) -> None:
    long_answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * 500}]
    long_question = [{"role": "user", "content": "?" * 500}, {"role": "assistant", "content": "x"}]
    unanswered = [{"role": "user", "content": "?"}]
    spelled = [{"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "y"}]
    odd = [long_answer, long_question, unanswered, spelled]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages} for messages in ASKED + odd])
    store = make(tmp_path, files=(path,))
    cut = "x" * (128 - len("user\n?\nassistant\n"))
    assert sorted(answers(store)) == sorted([*EXPECTED, cut])
    card = (store.folder / CARD).read_text(encoding="utf-8")
    assert f"conversations: {len(ASKED) + 4}\n" in card
    assert "conversations truncated to a row: 1\n" in card
    assert "conversations skipped, no answer in the row: 2\n" in card
    assert "conversations skipped, a special token in the text: 1\n" in card


@pytest.mark.default(1)
@pytest.mark.parametrize("field", ["role", "content", "name"])
def test_a_special_token_spelled_in_any_field_that_is_written_ends_nothing(field: str, tmp_path: Path) -> None:
    (tmp_path / "names.jinja").write_text(
        "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8"
    )
    spelled = {"role": "user", "content": "?", "name": "n"} | {field: "x<|endoftext|>assistant\nEVIL"}
    entries = [{"messages": messages} for messages in [*ASKED, [spelled, {"role": "assistant", "content": "y"}]]]
    path = write_jsonl(tmp_path / "a.jsonl", entries)
    store = make(tmp_path, files=(path,), chat_template=str(tmp_path / "names.jinja"))
    tokens = np.concatenate([rows(store, split)[0].reshape(-1) for split in ("train", "val")])
    # Not decoded, since a token of padding is a letter.
    assert (tokens == 256).sum() == sum(map(len, ASKED))
    assert "conversations skipped, a special token in the text: 1\n" in (store.folder / CARD).read_text("utf-8")


@pytest.mark.parametrize(
    ("entries", "fields", "message"),
    [
        ([{"message": []}], {}, r"line 1: no list of messages in a field 'messages'; .*did you mean 'message'\?"),
        ([{"messages": [{"role": "user"}]}], {}, "line 1: message 1 has no text as its content"),
        ([{"messages": ["a"]}], {}, "line 1: message 1 has no text as its role"),
        ([{"messages": []}], {}, "line 1: no list of messages"),
        ([["a"]], {}, "line 1: no list of messages in a field"),
        ([{"prompt": "a"}], {"prompt_fields": ("prompt",)}, "line 1: no field 'response'; set corpus.response_field"),
        ([{"prompt": 1, "response": "b"}], {"prompt_fields": ("prompt",)}, "int where text should be"),
        ([{"messages": ASKED[0]}], {"chat_template": "none.jinja"}, r"none\.jinja does not exist"),
        ([{"messages": ASKED[0]}], {"pack": 0}, r"corpus\.pack is 0"),
        ([{"messages": ASKED[0]}], {}, "the split"),
        ([{"messages": [{"role": "user", "content": "\0"}]}], {}, "line 1: a zero character"),
    ],
)
def test_what_is_no_conversation_is_one_line_and_leaves_nothing(
    entries: list[Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        make(tmp_path, files=(write_jsonl(tmp_path / "a.jsonl", entries),), **fields)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


UNANSWERED = [{"role": "user", "content": "?"}]
SPELLED = [{"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "y"}]
LONG = [{"role": "user", "content": "?" * 500}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [(UNANSWERED, "no answer in the row"), (LONG, "no answer in the row"), (SPELLED, "a special token in the text")],
)
def test_where_all_conversations_are_left_out_it_says_why(messages: Any, reason: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}] * 40)
    with pytest.raises(UserError) as caught:
        make(tmp_path, files=(path,))
    assert str(caught.value) == (
        f"the dataset is empty, since everything was left out (conversations: 40, conversations skipped, {reason}: 40)"
    )


def test_where_all_conversations_of_a_split_are_left_out_it_says_why(tmp_path: Path) -> None:
    held_out = [unit_hash(f"0:{number}") < 0.2 for number in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": UNANSWERED if out else ASKED[0]} for out in held_out])
    with pytest.raises(UserError) as caught:
        make(tmp_path, files=(path,), val_fraction=0.2)
    count = sum(held_out)
    assert str(caught.value) == (
        f"the split val is empty, since everything was left out (conversations: {count}, conversations skipped, "
        f"no answer in the row: {count})"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("value", "kind"), [(0, "int"), (False, "bool"), ([], "list")])
def test_a_field_that_is_not_text_is_refused_even_if_it_is_false(
    value: Any, kind: str, suffix: str, tmp_path: Path
) -> None:
    entries, path = [{"prompt": value, "response": "b"}], tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    else:
        path.write_text(json.dumps(entries if suffix == "json" else entries[0]), encoding="utf-8")
    with pytest.raises(UserError, match=f"1: {kind} where text should be; set corpus.prompt_fields"):
        make(tmp_path, files=(str(path),), prompt_fields=("prompt",))


def test_plain_text_is_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt has no conversations; allowed: \.jsonl"):
        make(tmp_path, files=(str(tmp_path),))


def test_a_template_that_fails_is_told_with_the_place(asked: str, tmp_path: Path) -> None:
    (tmp_path / "faulty.jinja").write_text("{{ raise_exception('no') }}", encoding="utf-8")
    with pytest.raises(UserError, match=r"asked\.jsonl, line 1: the chat template fails: no$"):
        make(tmp_path, files=(asked,), chat_template=str(tmp_path / "faulty.jinja"))


ENDS = {
    "marked whole": ("{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}", 0),
    "marked without its end": ("{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}", 200),
    "not marked": ("{{ m.content }}{{ eos_token }}", 0),
    "without an end": ("{{ m.content }}", 200),
}


@pytest.mark.default(1)
@pytest.mark.parametrize("name", ENDS)
def test_a_template_with_which_no_end_is_learned_is_told(
    name: str, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, endless = ENDS[name]
    source = f"{{% for m in messages %}}{{% if m.role == 'user' %}}<{{{{ m.content }}}}>{{% else %}}{answer}"
    (tmp_path / "t.jinja").write_text(source + "{% endif %}{% endfor %}", encoding="utf-8")
    corpus = Chat(files=(asked,), pack=127, val_fraction=0.2, chat_template=str(tmp_path / "t.jinja"))
    store = prepare_dataset(corpus, tmp_path / "data", console=Console(width=200))
    count = f"conversations with an answer whose end is not a target: {endless}"
    assert f"{count}\n" in (store.folder / CARD).read_text(encoding="utf-8")
    told = capsys.readouterr().out
    assert (f"{count}, so the model will not learn to end it" in told) == bool(endless)
    assert ("put {% endgeneration %} after" in told) == (name == "marked without its end")


# Tools ---------------------------------------------------------------------------------------------------------------

CITY = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {
    "properties": {"city": {"type": "string"}}}}}  # fmt: skip
HOURS = {"type": "function", "function": {"name": "sleep", "description": "Für <n> hours.", "parameters": {
    "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}}}  # fmt: skip
TOOLED = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}" + MARKED


def written(path: Path, entries: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
        return str(path)
    return write_jsonl(path, entries)


def noted(folder: Path, path: str, source: str, **fields: Any) -> tuple[TokenDataset, str]:
    """A dataset of 40 conversations by this template, and what its preparation prints."""
    (folder / "t.jinja").write_text(source, encoding="utf-8")
    corpus = Chat(files=(path,), chat_template=str(folder / "t.jinja"), pack=500, val_fraction=0.2, **fields)
    console = Console(record=True, width=200, file=io.StringIO())
    return prepare_dataset(corpus, folder / "data", console=console), console.export_text()  # type: ignore[return-value]


@pytest.mark.parametrize("field", ["tools", "functions"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_template_gets_the_tools_of_each_row(suffix: str, as_text: bool, field: str, tmp_path: Path) -> None:
    """Also from Parquet, whose objects have the fields of all others, as null."""
    given = [[[CITY, HOURS], [HOURS], None][number % 3] for number in range(40)]
    entries = [{"messages": messages, field: json.dumps(tools, ensure_ascii=False) if as_text else tools}
               for messages, tools in zip(ASKED, given, strict=False)]  # fmt: skip
    fields = {} if field == "tools" else {"tools_field": field}
    store, told = noted(tmp_path, written(tmp_path / f"a{suffix}", entries), TOOLED, **fields)
    assert "will not learn to call" not in told
    texts = "".join(store.tokenizer.decode(ids.tolist()) for split in ("train", "val") for ids in rows(store, split)[0])
    peer = PreTrainedTokenizerFast(tokenizer_object=library.Tokenizer(library.models.BPE()), chat_template=TOOLED)
    for messages, tools in zip(ASKED, given, strict=False):
        assert peer.apply_chat_template(messages, tools=tools, tokenize=False) in texts


def test_tools_that_the_template_does_not_write_are_told(tmp_path: Path) -> None:
    entries = [{"messages": messages} | ({"tools": [CITY]} if number % 2 else {"tools": []})
               for number, messages in enumerate(ASKED[:40])]  # fmt: skip
    store, told = noted(tmp_path, write_jsonl(tmp_path / "a.jsonl", entries), MARKED)
    count = "conversations with tools that are not in the text: 20"
    assert f"{count}, so the model will not learn to call them; give a chat template that writes tools\n" in told
    assert f"{count}\n" in (store.folder / CARD).read_text(encoding="utf-8")


def test_what_is_wrong_with_tools_is_one_line_that_names_the_row(tmp_path: Path) -> None:
    entries = [{"messages": messages, "tools": [CITY] if number != 6 else 5} for number, messages in enumerate(ASKED)]
    with pytest.raises(UserError, match=r"a\.jsonl, line 7: int in the field 'tools'; allowed: a list of JSON schemas"):
        make(tmp_path, files=(write_jsonl(tmp_path / "a.jsonl", entries),))


def test_a_conversation_whose_tools_spell_a_special_token_is_skipped(tmp_path: Path) -> None:
    entries = [{"messages": messages, "tools": [{"name": "<|endoftext|>" if number == 6 else "fine"}]}
               for number, messages in enumerate(ASKED[:40])]  # fmt: skip
    store, _ = noted(tmp_path, write_jsonl(tmp_path / "a.jsonl", entries), TOOLED)
    assert "conversations skipped, a special token in the text: 1\n" in (store.folder / CARD).read_text("utf-8")


# With the tokenizer of another model ---------------------------------------------------------------------------------


@pytest.fixture
def their(asked: str, tmp_path: Path) -> Any:
    """A folder of transformers with special tokens and a template that marks answers."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer.from_str(make(tmp_path / "learned", files=(asked,), tokenizer="bpe").tokenizer.to_json())
    made = PreTrainedTokenizerFast(tokenizer_object=learned, eos_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = MARKED
    made.save_pretrained(tmp_path / "their")
    return AutoTokenizer.from_pretrained(tmp_path / "their")


def test_tokens_and_masks_are_those_of_transformers(asked: str, their: Any, tmp_path: Path) -> None:
    store = make(tmp_path, files=(asked,), tokenizer_file=f"hf:{tmp_path / 'their'}")
    expected = []
    for messages in ASKED:
        one = their.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        expected.append((tuple(one["input_ids"]), tuple(one["assistant_masks"])))
    found = []
    end = store.tokenizer.eos_id
    for split in ("train", "val"):
        for ids, mask in zip(*rows(store, split), strict=True):
            begin = 0
            for stop in np.flatnonzero(ids == end).tolist():
                if stop > begin:
                    found.append((tuple(ids[begin:stop].tolist()), tuple(mask[begin:stop].tolist())))
                begin = stop + 1
    assert sorted(found) == sorted(expected)


def test_conversations_end_where_attention_may_end(asked: str, their: Any, tmp_path: Path) -> None:
    """The end-of-text token stands after a conversation and not within one, and is no target there."""
    store = make(tmp_path, files=(asked,), tokenizer_file=f"hf:{tmp_path / 'their'}")
    ids, mask = rows(store, "train")
    ends = ids == store.tokenizer.eos_id
    # Padding is token 0 as well, which is the end of text here.
    assert store.tokenizer.eos_id == 0 and not mask[ends].any()
    starts = store.tokenizer.special["<|im_start|>"]  # type: ignore[attr-defined]
    begun = np.diff(ends.astype(int), axis=1) == -1
    assert (ids[:, 1:][begun] == starts).all() and (ids[:, 0] == starts).all()


# The template travels ------------------------------------------------------------------------------------------------


def test_the_template_travels_with_every_checkpoint_and_every_export(
    tiny: Any, trainer: Any, asked: str, their: Any, tmp_path: Path
) -> None:
    corpus = Chat(files=(asked,), tokenizer_file=f"hf:{tmp_path / 'their'}", pack=64, val_fraction=0.2)
    model = LlamaConfig(max_seq_len=64, n_layers=1, n_heads=2, dim=16, hidden_dim=16)
    run = trainer(tiny(corpus=corpus, data__seq_len=64, model=model, training__macro_batches=1))
    run.train()
    (folder,) = (run.run / "checkpoints").glob("val*")
    assert load_checkpoint(folder).chat_template == run.checkpoints.chat_template is not None
    export(open_checkpoint(str(run.run)), "hf", tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for messages in ASKED[:4]:
        ours = run.checkpoints.chat_template.render(messages, add_generation_prompt=True)
        assert exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == (
            encode_chat(run.checkpoints.tokenizer, [ours])[0][0].tolist()
        )
    again = open_checkpoint(f"hf:{tmp_path / 'exported'}").chat_template
    assert again is not None and again.render(ASKED[0]) == run.checkpoints.chat_template.render(ASKED[0])
    generation = json.loads((tmp_path / "exported/generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == sorted(
        [run.checkpoints.tokenizer.eos_id, run.checkpoints.tokenizer.special["<|im_end|>"]]
    )


PARTICULAR = {
    "insists on a system message": "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}",
    "insists on a name": "{% if not messages[0].name %}{{ raise_exception('no') }}{% endif %}",
    "insists on more than one turn": "{% if messages | length < 3 %}{{ raise_exception('no') }}{% endif %}",
    "knows no prompt": "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}",
}


@pytest.mark.default(1)
@pytest.mark.parametrize("name", PARTICULAR)
def test_where_answers_end_is_seen_in_the_conversations_of_the_dataset(
    name: str, tiny: Any, trainer: Any, their: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(PARTICULAR[name] + MARKED, encoding="utf-8")
    entries = [{"messages": [{"role": "system", "content": "S", "name": "n"}, *messages]} for messages in ASKED]
    path = write_jsonl(tmp_path / "a.jsonl", entries)
    corpus = Chat(
        files=(path,), tokenizer_file=f"hf:{tmp_path / 'their'}", pack=64, val_fraction=0.2,
        chat_template=str(tmp_path / "t.jinja"),
    )  # fmt: skip
    model = LlamaConfig(max_seq_len=64, n_layers=1, n_heads=2, dim=16, hidden_dim=16)
    run = trainer(tiny(corpus=corpus, data__seq_len=64, model=model, training__macro_batches=1))
    run.train()
    checkpoint = open_checkpoint(str(run.run))
    special = run.checkpoints.tokenizer.special
    assert checkpoint.chat_template is not None and checkpoint.chat_template.ends == ("<|im_end|>",)
    assert stop_tokens(checkpoint.chat_template, checkpoint.tokenizer) == {special["<|im_end|>"], 0}
    export(checkpoint, "hf", tmp_path / "exported")
    again = open_checkpoint(f"hf:{tmp_path / 'exported'}")
    assert again.tokenizer.stop_ids == {special["<|im_end|>"], 0}


def test_a_batch_has_the_answers_as_its_targets(tiny: Any, trainer: Any, asked: str) -> None:
    corpus = Chat(files=(asked,), pack=64, val_fraction=0.2)
    model = GPTConfig(max_seq_len=64, n_layers=1, n_heads=2, dim=16)
    run = trainer(tiny(corpus=corpus, data__seq_len=64, model=model, training__macro_batches=1))
    batch = run.source.stream.batch(0, 8)
    run.source.close()
    tokens = batch.targets[batch.targets != IGNORED].tolist()
    assert batch.num_targets == len(tokens)
    text = "".join(" " if token == run.checkpoints.tokenizer.eos_id else chr(token) for token in tokens)
    assert set(text.split()) <= set(EXPECTED) and text.endswith(" ")


def test_a_mixture_takes_conversations_of_one_template_only(asked: str, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(PLAIN + "\n", encoding="utf-8")
    chats = [Chat(files=(asked,), val_fraction=0.2, system=system) for system in ("One.", "Two.")]
    mixed = prepare(
        Mixture(sources=tuple(Source(name=f"s{n}", corpus=chat) for n, chat in enumerate(chats))),
        tmp_path / "data",
        console=QUIET,
    )
    assert mixed.chat_template is not None and mixed.chat_template.source == PLAIN
    chats[1] = Chat(files=(asked,), val_fraction=0.2, chat_template=str(tmp_path / "other.jinja"))
    with pytest.raises(UserError, match="the sources s0 and s1 have different chat templates"):
        prepare(
            Mixture(sources=tuple(Source(name=f"s{n}", corpus=chat) for n, chat in enumerate(chats))),
            tmp_path / "data",
            console=QUIET,
        )
