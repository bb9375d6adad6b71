"""Tokenizers give back every text, know their own vocabulary, and survive their JSON."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cleangpt.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    from_json,
    load_tokenizer,
    train_bpe,
)
from cleangpt.errors import UserError
from tests.sentence_piece import BLANK, METASPACE, PREPENDING

LETTERS = "abc déñ漢🙂\n"
STORY = "the cat sat on the mat, the other cat sat on that hat. " * 20
BPE = train_bpe([STORY], 300)
valid_text = st.text(st.characters(exclude_categories=["Cs"]))


def test_a_character_is_a_token_by_its_place() -> None:
    tokenizer = CharTokenizer("abc\n", "\n")
    assert tokenizer.encode("cab\n").tolist() == [2, 0, 1, 3]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (4, 3)
    assert tokenizer.encode("").tolist() == []


@given(st.text(LETTERS))
def test_characters_come_back(text: str) -> None:
    tokenizer = CharTokenizer(LETTERS)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [LETTERS.index(character) for character in text]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("unknown", ["z", "\x00", "\U0010ffff", "\ud800"])
def test_an_unknown_character_is_named(unknown: str) -> None:
    with pytest.raises(UserError, match="does not know the character") as caught:
        CharTokenizer("abc").encode("ab" + unknown)
    assert repr(unknown) in str(caught.value)
    assert "'abc'" in str(caught.value)


@pytest.mark.parametrize(("characters", "end"), [("", None), ("aa", None), ("ab", "c"), ("ab", "ab"), ("ab", "")])
def test_impossible_character_sets_are_refused(characters: str, end: str | None) -> None:
    with pytest.raises(UserError):
        CharTokenizer(characters, end)


@given(valid_text)
def test_bytes_are_utf8(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode([*ids, 256]) == text


@given(valid_text)
def test_bpe_gives_back_any_text(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert ids.max(initial=0) < BPE.vocab_size


@given(st.lists(valid_text, max_size=5))
def test_many_texts_encode_as_each_does(texts: list[str]) -> None:
    assert [ids.tolist() for ids in BPE.encode_all(texts)] == [BPE.encode(text).tolist() for text in texts]


def test_bpe_learns_what_is_frequent() -> None:
    assert len(BPE.encode(STORY)) < len(STORY) / 2
    assert BPE.vocab_size <= 300
    assert BPE.eos_id == 0


@pytest.mark.parametrize("letters", ["ACGT", " ", "ab漢字"])
def test_a_word_without_end_is_learned_from_in_parts(letters: str) -> None:
    """The library's time grows with the square of a word's length."""
    text = "".join(random.Random(0).choices(letters, k=20_000))
    parts = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    learned = train_bpe(["the cat " + text], 320)
    assert learned.to_json() == train_bpe(["the cat ", *parts], 320).to_json()
    assert learned.decode(learned.encode(text).tolist()) == text


def test_a_text_that_spells_a_special_token_is_text() -> None:
    ids = BPE.encode("a<|endoftext|>b")
    assert BPE.eos_id not in ids
    assert BPE.decode([*ids, 0]) == "a<|endoftext|>b"


@pytest.mark.slow
def test_bpe_is_the_same_in_another_process() -> None:
    code = f"from cleangpt.data.tokenizers import train_bpe; print(train_bpe([{STORY!r}], 300).to_json())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        assert json.loads(done.stdout) == json.loads(BPE.to_json())


def test_bpe_needs_room_for_the_bytes() -> None:
    with pytest.raises(UserError, match="257"):
        train_bpe([STORY], 256)


@pytest.mark.parametrize("name", ["ilÖveyou", "kuća", "Začnimo", "<think>", "漢字", "Ġ of"])
def test_a_token_that_was_added_is_the_text_it_is_written_as(name: str) -> None:
    """Its letters may be those by which a byte-level BPE spells bytes; `tokenizers` decodes them as bytes."""
    peer = library.Tokenizer.from_str(BPE.to_json())
    peer.add_tokens([name])
    tokenizer = from_json(peer.to_str())
    text = f"the {name}, {name}{name} cat"
    ids = tokenizer.encode(text).tolist()
    decoder = StreamDecoder(tokenizer)
    assert ids.count(peer.token_to_id(name)) == 3
    assert tokenizer.decode(ids) == "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == text


def test_the_library_reads_what_we_learned() -> None:
    peer = library.Tokenizer.from_str(BPE.to_json())
    assert peer.encode(STORY).ids == BPE.encode(STORY).tolist()


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_end_of_text_is_found_in_a_given_tokenizer(name: str) -> None:
    peer = library.Tokenizer.from_str(BPE.to_json().replace("<|endoftext|>", "<|other|>"))
    peer.add_special_tokens([name])
    assert BPETokenizer(peer.to_str()).eos_id == peer.token_to_id(name)


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    peer = library.Tokenizer.from_str(BPE.to_json())
    peer.normalizer = library.normalizers.Lowercase()
    with pytest.raises(UserError, match="loses text"):
        from_json(peer.to_str())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not a character"):
        tokenizer.encode("a\udc80")


@pytest.mark.parametrize("tokenizer", [CharTokenizer(LETTERS, "\n"), CharTokenizer("ab"), ByteTokenizer(), BPE])
def test_json_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert np.array_equal(again.encode("abba"), tokenizer.encode("abba"))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"kind": "char"}', '{"kind": "char", "characters": 5}', '{"model": {}}', "[" * 10**5,
     '{"kind": "bpe"}', '{"kind": "bpe", "stop_ids": 5, "tokenizer": {}}'],
)  # fmt: skip
def test_a_malformed_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.json"):
        load_tokenizer(tmp_path / "binary.json")


@given(st.lists(st.integers(0, 256), max_size=40))
def test_streaming_any_bytes_is_decoding_them(ids: list[int]) -> None:
    decoder, tokenizer = StreamDecoder(ByteTokenizer()), ByteTokenizer()
    assert "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, BPE.vocab_size - 1), max_size=40))
def test_streaming_any_bpe_tokens_is_decoding_them(ids: list[int]) -> None:
    decoder = StreamDecoder(BPE)
    assert "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == BPE.decode(ids)


@given(valid_text.filter(lambda text: "\ufffd" not in text))
def test_streaming_shows_whole_characters_at_once(text: str) -> None:
    decoder = StreamDecoder(ByteTokenizer())
    shown = [decoder.push(int(token)) for token in ByteTokenizer().encode(text)]
    assert [part for part in shown if part] == list(text)
    assert decoder.flush() == ""


# In SentencePiece's manner -------------------------------------------------------------------------------------------

blank_text = valid_text.filter(lambda text: BLANK not in text)
LOADED = {content: BPETokenizer(content) for content in (PREPENDING, METASPACE, BPE.to_json())}


@pytest.mark.parametrize("content", [PREPENDING, METASPACE], ids=["prepending", "metaspace"])
@given(text=st.one_of(blank_text, st.text(" at\n")))
def test_a_tokenizer_that_adds_a_blank_gives_back_any_text(content: str, text: str) -> None:
    """Of any characters but the one that stands for a blank."""
    tokenizer = BPETokenizer(content)
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(token) for token in ids] + [decoder.flush()]) == text


@pytest.mark.slow
@given(text=blank_text)
def test_both_forms_of_such_a_tokenizer_make_the_same_tokens(text: str) -> None:
    one, other = BPETokenizer(PREPENDING), BPETokenizer(METASPACE)
    assert text == "" or one.encode(text).tolist() == other.encode(text).tolist()


@pytest.mark.parametrize("content", [PREPENDING, METASPACE, BPE.to_json()], ids=["prepending", "metaspace", "bytes"])
def test_special_tokens_in_a_conversation_are_read_as_transformers_reads_them(content: str) -> None:
    text = "<s>[ASK] the  cat?\n [/ASK] that 🙂 cat </s><s> déjà<|endoftext|>\n"
    ((ids, places),) = BPETokenizer(content).encode_special([text])
    theirs = PreTrainedTokenizerFast(tokenizer_object=library.Tokenizer.from_str(content))(
        text, add_special_tokens=False, return_offsets_mapping=True
    )
    assert ids.tolist() == theirs["input_ids"]
    assert places.tolist() == [list(place) for place in theirs["offset_mapping"]]


def test_a_text_begins_as_a_post_processor_has_it_and_does_not_end() -> None:
    peer = library.Tokenizer.from_str(PREPENDING)
    assert peer.encode("the cat").ids == [*BPETokenizer(PREPENDING).encode("the cat").tolist(), 2]
    assert (BPETokenizer(PREPENDING).prefix, BPETokenizer(PREPENDING).eos_id) == ((1,), 2)


@pytest.mark.default(1)
@pytest.mark.parametrize("content", [PREPENDING, METASPACE, BPE.to_json()], ids=["prepending", "metaspace", "bytes"])
@given(texts=st.lists(blank_text, max_size=3), places=st.lists(st.integers(0, 2), max_size=3))
def test_streaming_is_decoding_where_special_tokens_stand_within(
    content: str, texts: list[str], places: list[int]
) -> None:
    tokenizer, theirs = LOADED[content], library.Tokenizer.from_str(content)
    special = list(tokenizer.special.values())
    ids = [special[place % len(special)] for place in places]
    for text in texts:
        ids += [*tokenizer.encode(text).tolist(), special[-1]]
    decoder = StreamDecoder(tokenizer)
    streamed = "".join([decoder.push(token) for token in ids] + [decoder.flush()])
    assert streamed == tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("content", [PREPENDING, METASPACE], ids=["prepending", "metaspace"])
@given(data=st.binary(max_size=12))
def test_bytes_that_are_no_character_leave_their_neighbours_whole(content: str, data: bytes) -> None:
    """`tokenizers` decodes a run of bytes to U+FFFD throughout if one of them is wrong."""
    tokenizer = LOADED[content]
    ids = [tokenizer.vocabulary[f"<0x{byte:02X}>"] for byte in data]
    assert tokenizer.decode(tokenizer.encode("the").tolist() + ids) == "the" + data.decode("utf-8", "replace")


CUT = {"bytes": ByteTokenizer(), "byte pairs": BPE, "byte fallback": BPETokenizer(PREPENDING)}


@pytest.mark.parametrize("tokenizer", CUT.values(), ids=CUT)
@given(text=st.text("aé漢🙂", max_size=8), kept=st.integers(0, 40))
def test_a_text_that_is_cut_loses_the_character_it_is_cut_in_and_no_other(
    tokenizer: Tokenizer, text: str, kept: int
) -> None:
    ids = tokenizer.encode(text).tolist()[:kept]
    decoder = StreamDecoder(tokenizer)
    shown = "".join(map(decoder.push, ids)) + decoder.flush(cut=True)
    assert text.startswith(shown)
    assert b"".join(map(tokenizer.token_bytes, ids)).removeprefix(b" ").decode("utf-8", "ignore") == shown


def test_a_character_that_can_never_be_whole_is_shown_as_such() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(token) for token in (0xE6, 0x97, 0x41)] == ["", "", "\ufffdA"]
    assert (decoder.push(0xE6), decoder.flush()) == ("", "\ufffd")


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (library.normalizers.NFKC(), "'ﬁ①Ａ' becomes 'fi1A'"),
        (library.normalizers.Strip(), "becomes"),
        (library.normalizers.Lowercase(), "becomes"),
        (library.normalizers.Replace("\n", " "), "becomes"),
    ],
)
def test_what_a_tokenizer_loses_is_told_in_one_line(normalizer: object, lost: str) -> None:
    peer = library.Tokenizer.from_str(BPE.to_json())
    peer.normalizer = normalizer
    with pytest.raises(UserError, match="this tokenizer loses text when it encodes: ") as refused:
        from_json(peer.to_str())
    assert lost in str(refused.value) and "\n" not in str(refused.value)


def test_characters_that_are_not_in_a_vocabulary_without_bytes_are_told() -> None:
    words = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="loses text"):
        from_json(words.to_str())
