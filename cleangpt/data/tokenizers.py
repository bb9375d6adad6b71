"""Text to token ids and back: characters, bytes, or byte-pair encoding by Hugging Face's `tokenizers`.

A tokenizer is one JSON text, stored as `tokenizer.json` in every dataset and checkpoint, in the case of `tokenizers` in
that library's own format, for exchange. All three are lossless: `decode` returns exactly what `encode` was given.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cleangpt.errors import UserError, require
from cleangpt.files import parse_json, read_text
from cleangpt.hub import local_path

END_OF_TEXT = "<|endoftext|>"
EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")
REPLACEMENT = "\ufffd"
LOSSLESS_PROBES = ("a Bc, 12 déjà 漢字 🙂\n\tx = 1\n", " a  b ", "\n\n", "ﬁ①Ａ")
"""Texts with multi-byte characters, whitespace that some tokenizers drop, and letters that some replace."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    """Number of different tokens; all ids are less."""
    eos_id: int | None
    """The end-of-text token, which ends a document; None if there is none."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids `(length,)` of a text, without an end-of-text token; raises UserError at an unknown character."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""

    def to_json(self) -> str:
        """The tokenizer as JSON text, for `from_json`."""


class CharTokenizer:
    """One token per character; the id is its index in `characters`, one of which can be the end-of-text character.

    Raises:
        UserError: no characters, a duplicate, or an end-of-text character that is not among them.
    """

    def __init__(self, characters: str, end_of_text_character: str | None = None) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise UserError("a character tokenizer needs characters, each once")
        if end_of_text_character is not None and (len(end_of_text_character), characters.count(
            end_of_text_character
        )) != (1, 1):  # fmt: skip
            raise UserError(f"end_of_text_character is {end_of_text_character!r}; allowed: one of the characters")
        self.characters, self.end_of_text_character = characters, end_of_text_character
        self.vocab_size = len(characters)
        self.eos_id = None if end_of_text_character is None else characters.index(end_of_text_character)
        codes = _codes(characters)
        self._ids = np.full(int(codes.max()) + 2, -1, np.int64)
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> NDArray[np.int64]:
        """One id per character; raises UserError at the first character that has none."""
        ids: NDArray[np.int64] = self._ids[np.minimum(_codes(text), len(self._ids) - 1)]
        if ids.min(initial=0) < 0:
            character = text[int(np.argmin(ids))]
            raise UserError(
                f"the tokenizer does not know the character {character!r}; "
                f"use only its {self.vocab_size} characters: {_abridged(self.characters)}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The characters, joined; the end-of-text character is one of them."""
        return "".join([self.characters[token] for token in ids])

    def to_json(self) -> str:
        """Our own small format."""
        facts = {"kind": "char", "characters": self.characters, "end_of_text_character": self.end_of_text_character}
        return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


class ByteTokenizer:
    """One token per byte of UTF-8, and token 256 for the end of text; encodes any text without training."""

    vocab_size = 257
    eos_id: int | None = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """One id per byte."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; end-of-text tokens are omitted."""
        return bytes([token for token in ids if token != self.eos_id]).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Our own small format."""
        return json.dumps({"kind": "byte"}, indent=2) + "\n"


class BPETokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, from its JSON text; needs that package.

    The names of special tokens are not parsed (`<|endoftext|>` in a text is text like any other), special tokens are
    omitted when decoding, and none is added to a text, whatever the tokenizer's post-processor would do. A
    SentencePiece-like tokenizer, which adds a space before every text, does so even if the text starts with a space, as
    SentencePiece does; `tokenizers` may not, and would lose that space.

    Raises:
        UserError: the library does not understand the JSON, or the tokenizer is lossy, such as one that lowercases.
    """

    def __init__(self, text: str) -> None:
        library = require("tokenizers")
        with _library():
            self._tokenizer = library.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        self.eos_id = next((self.vocabulary[name] for name in EOS_TOKENS if name in self.vocabulary), None)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: number for number, token in added.items() if token.special}
        """Ids of special tokens by name."""
        self._loses_blank = False
        self._loses_blank = self._decoded(" a") == "a"
        for probe in LOSSLESS_PROBES:
            if (decoded := self._decoded(probe)) != probe:
                raise UserError(
                    f"this tokenizer loses text when it encodes: {probe!r} becomes {decoded!r}; allowed: lossless "
                    "ones, such as byte-level BPE"
                )

    def _decoded(self, text: str) -> str:
        """The text after encoding and decoding; empty if it cannot be encoded."""
        try:
            return self.decode(self.encode(text).tolist())
        except UserError:  # such as an unknown character
            return ""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids by the learned merges."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """`encode` for many texts, on all cores by the library's own threads."""
        for text in texts:
            _utf8(text)
        if self._loses_blank:
            texts = [f" {text}" if text.startswith(" ") else text for text in texts]
        with _library():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encode_special(self, texts: list[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Token ids `(length,)` of texts, parsing special tokens, and each token's character span `(length, 2)`."""
        for text in texts:
            _utf8(text)
        with _library():
            encodings = self._reading_special.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            for encoding in encodings
        ]

    @cached_property
    def _reading_special(self) -> Any:
        reading = require("tokenizers").Tokenizer.from_str(self.to_json())
        reading.encode_special_tokens = False
        return reading

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; special tokens are omitted."""
        with _library():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> str:
        """The library's own format."""
        return str(self._tokenizer.to_str(pretty=True))


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Reports errors of `tokenizers` in one line: bare Exceptions, and Rust panics, which are not Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"this is not a tokenizer of Hugging Face's tokenizers: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) with at most `vocab_size` tokens.

    The first token is `<|endoftext|>`, the next 256 are the bytes. If the texts are too short for that many merges,
    there are fewer tokens. The same texts give the same tokenizer.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}; allowed: 257 or more (256 bytes and {END_OF_TEXT})")
    library = require("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer.to_str())


class StreamDecoder:
    """Decodes tokens one by one, returning text as soon as its last character is complete.

    The joined results of `push` and `flush` equal `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while bytes of a character are missing."""
        self._pending.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text of the remaining tokens; bytes that are not UTF-8 become U+FFFD."""
        text = self._text()
        self._shown, self._pending = [], []
        return text

    def _text(self) -> str:
        # Decoded together with the last tokens shown: some decoders treat the first token of a text differently.
        shown = len(self._tokenizer.decode(self._shown))
        return self._tokenizer.decode(self._shown + self._pending)[shown:]


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote, or any of Hugging Face's `tokenizers`.

    Raises:
        UserError: the text is not JSON, or not a tokenizer.
    """
    try:
        facts: Any = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the tokenizer is not valid JSON: {error}") from None
    if not isinstance(facts, dict):
        raise UserError("the tokenizer is not a JSON object")
    if "model" in facts:
        return BPETokenizer(text)
    kind, characters, end = facts.get("kind"), facts.get("characters"), facts.get("end_of_text_character")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char" and isinstance(characters, str) and isinstance(end, str | None):
        return CharTokenizer(characters, end)
    raise UserError(f"the tokenizer is of kind {kind!r}, or lacks a field; allowed: char, byte, or one of tokenizers")


def eos_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text: one, or none."""
    return set() if tokenizer.eos_id is None else {tokenizer.eos_id}


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the ids of two tokenizers stand for the same texts."""
    if isinstance(one, BPETokenizer) and isinstance(other, BPETokenizer):
        return one.vocabulary == other.vocabulary
    return one.to_json() == other.to_json()


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a JSON file, in a folder in Hugging Face's layout, or of ``hf:NAME``.

    Raises:
        UserError: the file is missing, not UTF-8, or not a tokenizer; names the file.
    """
    path = local_path(str(path))
    if path.is_dir():
        if not (path / "tokenizer.json").is_file() and (path / "merges.txt").is_file():
            return _read_merges(path)
        path = path / "tokenizer.json"
    text = read_text(path)
    try:
        return from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_merges(folder: Path) -> BPETokenizer:
    """The byte-level BPE of GPT-2's released files, `vocab.json` and `merges.txt`."""
    library = require("tokenizers")
    try:
        model = library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: vocab.json and merges.txt are not a byte-pair encoding: {error}") from None
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(tokenizer.to_str())


def _utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text; raises UserError for an unpaired surrogate, which is not a character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} is not a character; give valid Unicode text") from None


def _codes(text: str) -> NDArray[np.uint32]:
    """The code points of a text as an array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _abridged(characters: str) -> str:
    return repr(characters if len(characters) <= 100 else characters[:100] + "…")
