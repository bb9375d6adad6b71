"""Chat templates render as Hugging Face renders them, tell answers from questions, and can do no harm."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cleangpt.data.chat_template import (
    PLAIN,
    ChatTemplate,
    answer_ends,
    answer_mask,
    check_messages,
    encode_chat,
    find_template,
    load_template,
    plain_template,
    special_tokens,
    stop_tokens,
)
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from cleangpt.errors import UserError

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"),
]

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a clock.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'Be short.' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

BRACKETS = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = message.content -%}{%- continue -%}{%- endif -%}
{%- if message.role == 'user' -%}
{{- bos_token + '[INST] ' + (ns.system + '\\n\\n' if ns.system else '') + message.content + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + eos_token -}}
{%- else -%}
{{- raise_exception('only system, user and assistant may speak') -}}
{%- endif -%}
{%- endfor -%}
"""

LINES = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

MARKED = """\
{% macro say(role) %}<|im_start|>{{ role }}
{% endmacro %}
{%- for message in messages -%}
{{ say(message.role) }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content | tojson }}<|im_end|>{% endgeneration %}
{%- else -%}
{{ message.content }}<|im_end|>
{%- endif %}

{% endfor -%}
{%- if add_generation_prompt %}{{ say('assistant') }}{% endif -%}
"""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "lines": LINES,
    "marked": MARKED,
    "plain": PLAIN,
}

SHORT = [{"role": "user", "content": "What is 12+30?"}, {"role": "assistant", "content": "42"}]
LONG = [
    {"role": "system", "content": 'Speak of cats, <b>only</b> & "always".'},
    *SHORT,
    {"role": "user", "content": "  Why?\nSay it in 漢字 🙂.  "},
    {"role": "assistant", "content": "Because\n\nthe cat sat.\tDéjà vu!"},
]
CONVERSATIONS = {"short": SHORT, "long": LONG}


def bpe() -> BPETokenizer:
    """Byte pairs with the special tokens of all templates."""
    made = library.Tokenizer.from_str(train_bpe(["What is the cat on the mat? Because of that."] * 20, 300).to_json())
    made.add_special_tokens(SPECIAL)
    return BPETokenizer(made.to_str())


BPE = bpe()


@pytest.fixture(scope="module")
def peer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=library.Tokenizer.from_str(BPE.to_json()), bos_token="<s>", eos_token="</s>"
    )


def ours(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def masked(template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation."""
    text, spans = template.render_answers(messages, special_tokens(tokenizer))
    ((ids, places),) = encode_chat(tokenizer, [text])
    return ids.tolist(), answer_mask(places, spans).tolist()


def learned(template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each run of targets."""
    ids, mask = masked(template, tokenizer, messages)
    places = np.flatnonzero(np.diff([0, *mask, 0]))
    return [ids[begin:end] for begin, end in places.reshape(-1, 2).tolist()]


# As Hugging Face has them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_is_the_text_and_the_tokens_of_transformers(
    source: str, messages: list[dict[str, Any]], prompted: bool, peer: Any
) -> None:
    messages = messages[:-1] if prompted else messages
    options = {"chat_template": source, "add_generation_prompt": prompted}
    text = ours(source).render(messages, add_generation_prompt=prompted)
    assert text == peer.apply_chat_template(messages, tokenize=False, **options)
    ((ids, _),) = encode_chat(BPE, [text])
    assert ids.tolist() == peer.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("source", [MARKED, PLAIN], ids=["marked", "plain"])
def test_the_mask_of_a_template_that_marks_answers_is_that_of_transformers(
    source: str, messages: list[dict[str, Any]], peer: Any
) -> None:
    theirs = peer.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    assert masked(ours(source), BPE, messages) == (theirs["input_ids"], theirs["assistant_masks"])


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "weather", "description": "The weather in <a city> & around, in °C",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string"}, "days": {"type": "integer", "default": None, "enum": [1, 2]}}}}},
    {"name": "now", "parameters": {"properties": {}}},
]  # fmt: skip
CALLING = [
    {"role": "user", "content": "Is it warm in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {"a": "é"}}}]},
    {"role": "tool", "name": "weather", "content": "12 °C"},
    {"role": "assistant", "content": "No."},
]
CALLS = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
WITH_TOOLS = {
    "a line each": "{% if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>{% endif %}",
    "indented, where there is a list": "{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}",
    "by name": "{% for tool in tools or [] %}{{ tool.name or tool.function.name }}({% for name, of in "
    "(tool.function or tool).parameters.properties.items() %}{{ name }}: {{ of.type }}, {% endfor %}){% endfor %}",
}


@pytest.mark.parametrize("tools", [TOOLS, TOOLS[:1], [], None], ids=["two", "one", "an empty list", "none"])
@pytest.mark.parametrize("source", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_tools_are_written_as_transformers_writes_them(
    source: str, tools: list[dict[str, Any]] | None, peer: Any
) -> None:
    source += CALLS
    for prompted in (False, True):
        messages = CALLING[: 3 if prompted else 4]
        text = ours(source).render(messages, prompted, tools)
        assert text == peer.apply_chat_template(
            messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompted
        )
    text, spans = ours(source).render_answers(CALLING, BPE.special, tools)
    assert text == ours(source).render(CALLING, tools=tools) and text[slice(*spans[1])] == "No.</s>"


def test_a_special_token_spelled_by_a_tool_is_found() -> None:
    source = WITH_TOOLS["a line each"] + CALLS
    for spelled in ({"name": "</s>"}, {"parameters": {"</s>": {}}}, {"parameters": {"enum": ["a", "b</s>"]}}):
        assert ours(source).render_guarded(CALLING, BPE.special, tools=[spelled]) is not None
    assert ours(source).render_guarded(CALLING, BPE.special, tools=TOOLS) is None
    assert ours(CALLS).render_guarded(CALLING, BPE.special, tools=[{"name": "</s>"}]) is None, "it is not written"


text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30)


@given(turns=st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_any_conversation_is_rendered_as_transformers_does(turns: list[tuple[str, str]]) -> None:
    library_tokenizer = library.Tokenizer.from_str(BPE.to_json())
    their = PreTrainedTokenizerFast(tokenizer_object=library_tokenizer, bos_token="<s>", eos_token="</s>")
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    for source in (CHATML, MARKED):
        assert ours(source).render(messages) == their.apply_chat_template(
            messages, chat_template=source, tokenize=False
        )


def test_a_folder_of_transformers_brings_its_template(peer: Any, tmp_path: Path) -> None:
    peer.chat_template = HEADERS
    peer.save_pretrained(tmp_path)
    template, tokenizer = load_template(f"hf:{tmp_path}", BPE), load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert template.render(LONG) == theirs.apply_chat_template(LONG, tokenize=False)
    ((ids, _),) = encode_chat(tokenizer, [template.render(LONG)])
    assert ids.tolist() == theirs.apply_chat_template(LONG, return_dict=False)


@pytest.mark.parametrize(
    "entry", [CHATML, [{"name": "tool", "template": "no"}, {"name": "default", "template": CHATML}]]
)
def test_an_older_folder_has_its_template_among_the_settings(entry: Any, tmp_path: Path) -> None:
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": entry, "bos_token": None, "eos_token": eos}), encoding="utf-8"
    )
    assert find_template(tmp_path) == ChatTemplate(CHATML, {"eos_token": "</s>"})


def test_a_processor_has_the_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As LLaVA was released."""
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}), encoding="utf-8")
    assert find_template(tmp_path) == ChatTemplate(CHATML, {"eos_token": "</s>"})


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("chatml", "", "<|im_end|>"), ("headers", "", "<|eot_id|>"), ("brackets", " ", "</s>"), ("lines", "", "</s>")],
)
def test_an_answer_is_what_the_assistant_says_and_the_token_that_ends_it(name: str, begin: str, end: str) -> None:
    template = replace(ours(TEMPLATES[name]), ends=(end,))
    answers = learned(template, BPE, LONG)
    said = [message["content"] for message in LONG if message["role"] == "assistant"]
    assert [BPE.decode(ids) for ids in answers] == [begin + content for content in said]
    assert {ids[-1] for ids in answers} == {BPE.special[end]}
    assert stop_tokens(template, BPE) == {BPE.special[end], BPE.eos_id}
    assert answer_ends(*template.render_answers(LONG, BPE.special), BPE.special) == {end}


CHAR = CharTokenizer(
    "".join(sorted(set("user\nassistant\nsystem\n" + "".join(m["content"] for m in LONG)))) + "\0", "\0"
)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CHAR, BPE], ids=["byte", "char", "bpe"])
def test_the_plain_template_serves_every_tokenizer(tokenizer: Tokenizer) -> None:
    template = plain_template(tokenizer)
    answers = learned(template, tokenizer, LONG)
    said = [message["content"] for message in LONG if message["role"] == "assistant"]
    assert [tokenizer.decode(ids[:-1]) for ids in answers] == said
    assert {ids[-1] for ids in answers} == stop_tokens(template, tokenizer) == {tokenizer.eos_id}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CHAR, BPE], ids=["byte", "char", "bpe"])
@pytest.mark.parametrize("source", [PLAIN, "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"])
def test_the_tokens_before_an_answer_are_those_of_a_prompt(tokenizer: Tokenizer, source: str) -> None:
    """So that a model is asked in the form in which it was taught."""
    if source != PLAIN and tokenizer is CHAR:
        tokenizer = CharTokenizer(CHAR.characters + ":", "\0")
    template = ChatTemplate(source, plain_template(tokenizer).special)
    ids, mask = masked(template, tokenizer, SHORT)
    ((prompt, _),) = encode_chat(tokenizer, [template.render(SHORT[:1], add_generation_prompt=True)])
    assert ids[: mask.index(1)] == prompt.tolist()


def test_a_template_that_rewrites_what_was_said_before_is_refused_unless_it_marks_answers() -> None:
    source = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}|{% endfor %}"
    template = ChatTemplate(source)
    assert learned(template, ByteTokenizer(), SHORT) == [list(b"42|")]
    with pytest.raises(UserError, match=r"message 3 differently once others follow.*put {% generation %}"):
        template.render_answers(LONG, [])
    marks = source.replace("{{", "{% generation %}{{").replace("}}", "}}{% endgeneration %}")
    assert len(ChatTemplate(marks).render_answers(LONG, [])[1]) == len(LONG)


def test_a_tokenizer_without_an_end_of_text_cannot_end_an_answer() -> None:
    with pytest.raises(UserError, match="no end-of-text token"):
        plain_template(CharTokenizer("abc"))


# Special tokens ------------------------------------------------------------------------------------------------------


@given(text)
def test_the_places_of_bytes_are_those_of_their_characters(content: str) -> None:
    ((ids, places),) = encode_chat(ByteTokenizer(), [f"{content}<|endoftext|>{content}"])
    expected = [index for index, character in enumerate(content) for _ in character.encode()]
    after = len(content) + len("<|endoftext|>")
    assert places[:, 0].tolist() == [*expected, len(content), *(after + index for index in expected)]
    assert ids.tolist() == [*content.encode(), 256, *content.encode()]


def test_special_tokens_are_read_from_a_conversation_and_from_no_other_text() -> None:
    ((ids, _),) = encode_chat(BPE, ["<|im_start|>a<|im_end|>"])
    assert (ids[0], ids[-1]) == (BPE.special["<|im_start|>"], BPE.special["<|im_end|>"])
    assert not set(BPE.special.values()) & set(BPE.encode("<|im_start|>a<|im_end|>").tolist())


# In a sandbox --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('touch owned') }}",
        "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('%s' | attr('format'))('{0.__class__}') ~ (messages | attr('__class__')).__name__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ self._TemplateReference__context.environment.from_string('{{ 1 }}').module.__loader__ }}",
    ],
)
def test_a_malicious_template_is_refused_in_one_line(source: str, workplace: Path) -> None:
    messages = [dict(message) for message in SHORT]
    with pytest.raises(UserError, match=r"^the chat template fails: ") as refused:
        ChatTemplate(source).render(messages)
    assert "\n" not in str(refused.value)
    assert messages == SHORT and not list(workplace.iterdir())


def test_a_template_sees_nothing_of_python() -> None:
    for name in ("open", "eval", "exec", "__import__", "getattr", "os", "globals", "self.__dict__"):
        assert ChatTemplate(f"{{% if {name} is defined %}}seen{{% endif %}}").render(SHORT) == ""


def test_a_template_s_own_refusal_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="the chat template fails: only system, user and assistant may speak"):
        ours(BRACKETS).render([*SHORT, {"role": "tool", "content": "1"}])
    with pytest.raises(UserError, match="the chat template is not valid Jinja: "):
        ChatTemplate("{% for %}").render(SHORT)


def test_a_template_may_know_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(SHORT).startswith("20")


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_template_survives_its_file(tmp_path: Path) -> None:
    template = ours(CHATML)
    (tmp_path / "chat_template.json").write_text(template.to_json(), encoding="utf-8")
    assert find_template(tmp_path) == template
    ending = replace(template, ends=("<|im_end|>", "</s>"))
    (tmp_path / "chat_template.json").write_text(ending.to_json(), encoding="utf-8")
    found = find_template(tmp_path)
    assert found == template and found is not None and found.ends == ending.ends
    assert load_template(str(tmp_path), BPE) == template


def test_a_template_may_be_a_file_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(PLAIN, encoding="utf-8")
    template = load_template(str(tmp_path / "mine.jinja"), ByteTokenizer())
    assert template.render(SHORT) == "user\nWhat is 12+30?\nassistant\n42<|endoftext|>"


@pytest.mark.parametrize(
    "content", ['{"template": 1}', '{"eos_token": "a"}', '{"template": "a", "eos_token": 2}', "[]", "{"]
)
def test_a_damaged_template_is_told_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"chat_template\.json is not"):
        find_template(tmp_path)


def test_a_missing_template_is_told(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    with pytest.raises(UserError, match=r"has no chat template; allowed: a folder with chat_template\.jinja"):
        load_template(str(tmp_path), BPE)
    with pytest.raises(UserError, match=r"none\.jinja does not exist"):
        load_template(str(tmp_path / "none.jinja"), BPE)
    (tmp_path / "binary.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"binary\.jinja is not valid UTF-8"):
        load_template(str(tmp_path / "binary.jinja"), BPE)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "no list of messages"),
        ([], "no list of messages"),
        ([{"role": "user"}], "message 1 has no text as its content"),
        ([*SHORT, {"content": "a"}], "message 3 has no text as its role"),
        (["hello"], "message 1 has no text as its role"),
        ([{"role": "user", "content": []}], "message 1 has no text as its content"),
        ([{"role": "user", "content": 5}], "message 1 has no text as its content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}],
            "message 1 has a part of type 'image_url' in its content; allowed: text",
        ),
        ([{"role": "user", "content": "a", "name": "\ufdd1"}], r"message 1 has U\+FDD0 or U\+FDD1, not characters"),
        ([{"role": "user", "content": "a", "tool_calls": [{"\ud800": 1}]}], "message 1 has an unpaired surrogate"),
        ([{"role": "user", "content": None}], "message 1 has no text as its content"),
        ([{"role": "user", "content": "\ufdd0"}], r"message 1 has U\+FDD0 or U\+FDD1, not characters"),
    ],
)
def test_messages_that_are_none_are_told_with_their_place(messages: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^line 7: {message}"):
        check_messages(messages, "line 7")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            {"content": "a b"},
        ),
        ({"role": "user", "content": ["a", {"text": "b", "type": None}]}, {"content": "ab"}),
        ({"role": "user", "content": "a", "name": None, "tool_calls": None}, {"content": "a"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
            {"content": None, "tool_calls": [{"type": "function"}]},
        ),
    ],
)
def test_messages_of_the_field_are_brought_into_the_form_of_templates(
    message: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert check_messages([message], "line 7") == [{"role": message["role"], **expected}]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 2 has tool calls"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "message 2 has tool calls"),
        ({"role": "assistant", "content": None}, "message 2 has no text"),
    ],
)
def test_the_plain_template_loses_nothing_in_silence(message: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}, for which the plain chat template has no form"):
        plain_template(BPE).render([SHORT[0], message])
