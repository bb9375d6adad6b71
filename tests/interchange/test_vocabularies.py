"""Our tokenizers, written for Hugging Face's `tokenizers`, have the same ids and the same text there."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as TheirTokenizer

from cleangpt.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    same_tokens,
    train_bpe,
)
from cleangpt.errors import UserError
from cleangpt.interchange.vocabularies import (
    byte_letters,
    name_of,
    read_tokenizer,
    special_ids,
    to_tokenizers,
    word_split,
)

CHARACTERS = "\0\t\n\r aAéß漢字🙂▁\u0301\u200d"
TRAINED = train_bpe(["the cat sat on the mat, 12 x 12 = 144\n" * 20, "déjà vu 漢字 🙂"], 300)


def theirs(tokenizer: Tokenizer) -> TheirTokenizer:
    return TheirTokenizer.from_str(json.dumps(to_tokenizers(tokenizer)))


@pytest.mark.slow
@given(st.text())
def test_bytes_have_the_same_ids_and_text(text: str) -> None:
    ours, other = ByteTokenizer(), theirs(ByteTokenizer())
    assert other.encode(text).ids == ours.encode(text).tolist()
    assert other.decode(other.encode(text).ids) == text


@given(st.lists(st.integers(0, 256)))
def test_any_bytes_decode_to_the_same_text(ids: list[int]) -> None:
    assert theirs(ByteTokenizer()).decode(ids) == ByteTokenizer().decode(ids)


@given(st.text(CHARACTERS), st.sampled_from([None, *CHARACTERS]))
def test_characters_have_the_same_ids_and_text(text: str, end: str | None) -> None:
    ours = CharTokenizer(CHARACTERS, end)
    other = theirs(ours)
    assert other.encode(text).ids == ours.encode(text).tolist()
    assert other.decode(other.encode(text).ids, skip_special_tokens=False) == text


def test_an_unknown_character_is_refused_there_too() -> None:
    with pytest.raises(Exception, match="UNK"):
        theirs(CharTokenizer("ab")).encode("abc")


@given(st.text().filter(lambda text: "<|endoftext|>" not in text))
def test_byte_pairs_have_the_same_ids_and_text(text: str) -> None:
    other = theirs(TRAINED)
    assert other.encode(text).ids == TRAINED.encode(text).tolist()
    assert other.decode(other.encode(text).ids) == text


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), CharTokenizer(CHARACTERS, "\0"), CharTokenizer("ba"), TRAINED],
    ids=lambda kind: type(kind).__name__,
)
def test_what_was_written_is_read_back_unchanged(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_tokenizers(tokenizer)), encoding="utf-8")
    back = read_tokenizer(tmp_path)
    assert type(back) is type(tokenizer) and same_tokens(back, tokenizer)
    assert back.eos_id == tokenizer.eos_id


def test_a_word_level_vocabulary_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    content = to_tokenizers(CharTokenizer("ab"))
    content["model"]["vocab"]["word"] = 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="loses text"):
        read_tokenizer(tmp_path)


def test_the_letters_of_bytes_are_those_of_the_released_gpt2() -> None:
    letters = byte_letters()
    assert len(set(letters)) == 256
    assert [letters[byte] for byte in b"A \n\x00\xad\xff"] == ["A", "Ġ", "Ċ", "Ā", "Ń", "ÿ"]


def test_vocab_json_and_merges_txt_make_the_same_tokenizer(tmp_path: Path) -> None:
    model = json.loads(TRAINED.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = load_tokenizer(tmp_path)
    assert same_tokens(read, TRAINED) and read.eos_id == TRAINED.eos_id
    text = "the cat sat 144 times, déjà vu\n"
    assert read.encode(text).tolist() == TRAINED.encode(text).tolist()


def test_damaged_merges_are_refused_with_the_folder_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        read_tokenizer(tmp_path)


def test_tokenizers_are_the_same_where_their_ids_mean_the_same() -> None:
    reformatted = BPETokenizer(json.dumps(json.loads(TRAINED.to_json()) | {"post_processor": None}))
    assert same_tokens(reformatted, TRAINED)
    assert not same_tokens(ByteTokenizer(), TRAINED)
    assert not same_tokens(CharTokenizer("ab"), CharTokenizer("ba"))


def test_a_document_begins_with_its_own_token_or_with_the_end_of_another() -> None:
    assert special_ids(CharTokenizer("ab")) == {}
    assert special_ids(ByteTokenizer()) == {"bos_token": 256, "eos_token": 256}
    content = json.loads(TRAINED.to_json())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<|begin_of_text|>"})
    content["model"]["vocab"]["<|begin_of_text|>"] = TRAINED.vocab_size
    content["added_tokens"][-1]["id"] = TRAINED.vocab_size
    begun = BPETokenizer(json.dumps(content))
    assert special_ids(begun) == {"bos_token": TRAINED.vocab_size, "eos_token": TRAINED.eos_id}
    assert name_of(begun, TRAINED.vocab_size) == "<|begin_of_text|>"


def test_word_splitting_is_read_from_the_file() -> None:
    content = to_tokenizers(TRAINED)
    assert word_split(content) == "gpt-2"
    assert word_split(to_tokenizers(ByteTokenizer())) == "gpt-2"
    assert word_split(content | {"pre_tokenizer": None}) is None
    assert word_split(to_tokenizers(CharTokenizer("ab"))) is None
    step = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    assert word_split(content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step]}}) is None


def test_qwens_word_splitting_is_that_of_transformers() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    step = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    content = to_tokenizers(TRAINED) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step]}}
    assert word_split(content) == "qwen2"
