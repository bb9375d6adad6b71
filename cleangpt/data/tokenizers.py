"""Text to token ids and back: characters, bytes, or byte-pair encoding by Hugging Face's `tokenizers`.

A tokenizer is one JSON text, stored as `tokenizer.json` in every dataset and checkpoint, in the case of `tokenizers` in
that library's own format, for exchange. All three are lossless: `decode` returns exactly what `encode` was given.
"""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.bpe import BPETokenizer as BPETokenizer
from cleangpt.data.bpe import train_bpe as train_bpe
from cleangpt.data.bpe import utf8
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.special_tokens import NOTHING_STATED, TOKENIZER, StatedTokens, stated_tokens
from cleangpt.errors import UserError, require
from cleangpt.files import parse_json, read_text
from cleangpt.hub import local_path
from cleangpt.validation import from_json as read_fields


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    """Number of different tokens; all ids are less."""
    eos_id: int | None
    """The end-of-text token, which ends a document; None if there is none."""
    bos_id: int | None
    """The beginning-of-text token; None if there is none. `prefix` says whether a text begins with it."""
    stop_ids: frozenset[int]
    """All tokens that end a generated text: `eos_id`, and others that a model's files name."""
    prefix: tuple[int, ...]
    """The tokens that stand before every text, in training, sampling and export alike."""
    leading_blank: bool
    """Whether `encode` puts a blank before every text, which `decode` drops, as SentencePiece does."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids `(length,)` of a text, `prefix` included, without an end-of-text token.

        Raises:
            UserError: the text has an unknown character.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8; maybe only a part of a character."""

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
        self.bos_id: int | None = None
        self.stop_ids = frozenset(() if self.eos_id is None else (self.eos_id,))
        self.prefix: tuple[int, ...] = ()
        self.leading_blank = False
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

    def token_bytes(self, token: int) -> bytes:
        """The bytes of the character."""
        return self.characters[token].encode("utf-8")

    def to_json(self) -> str:
        """Our own small format."""
        facts = {"kind": "char", "characters": self.characters, "end_of_text_character": self.end_of_text_character}
        return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


class ByteTokenizer:
    """One token per byte of UTF-8, and token 256 for the end of text; encodes any text without training."""

    vocab_size = 257
    eos_id: int | None = 256
    bos_id: int | None = None
    stop_ids = frozenset({256})
    prefix: tuple[int, ...] = ()
    leading_blank = False

    def encode(self, text: str) -> NDArray[np.int64]:
        """One id per byte."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; end-of-text tokens are omitted."""
        return bytes([token for token in ids if token != self.eos_id]).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The byte itself; nothing for the end of text."""
        return b"" if token == self.eos_id else bytes([token])

    def to_json(self) -> str:
        """Our own small format."""
        return json.dumps({"kind": "byte"}, indent=2) + "\n"


class ModalityTokenizer:
    """Text by another tokenizer, and after its ids those of numbers, discrete values and separators."""

    def __init__(self, text: Tokenizer, modalities: Modalities) -> None:
        self.text, self.modalities = text, modalities
        self.ranges = TokenRanges(text.vocab_size, modalities)
        self.vocab_size = self.ranges.vocab_size
        self.eos_id, self.bos_id, self.stop_ids = text.eos_id, text.bos_id, text.stop_ids
        self.prefix, self.leading_blank = text.prefix, text.leading_blank

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text."""
        return self.text.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text as it is; any other token as in ``⟨7⟩``, its number above those of text."""
        parts, written = list[str](), list[int]()
        for token in [*ids, self.vocab_size]:
            if token < self.text.vocab_size:
                written.append(token)
                continue
            parts.append(self.text.decode(written) if written else "")
            parts.append(self.token_bytes(token).decode("utf-8"))
            written = []
        return "".join(parts[:-1])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token of text; of any other its number."""
        others = f"⟨{token - self.text.vocab_size}⟩"
        return self.text.token_bytes(token) if token < self.text.vocab_size else others.encode("utf-8")

    def to_json(self) -> str:
        """Our own small format, around that of the text's tokenizer."""
        facts = {"kind": "modalities", "modalities": vars(self.modalities), "text": self.text.to_json()}
        return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


class StreamDecoder:
    """Decodes tokens one by one, returning text as soon as its last character is complete.

    The joined results of `push` and `flush` equal `decode` of all tokens, if these begin a text.

    Args:
        tokenizer: of the tokens.
        begins: whether the tokens begin a text, whose leading blank is not a part of it; else they continue one.
    """

    def __init__(self, tokenizer: Tokenizer, begins: bool = True) -> None:
        self._tokenizer = tokenizer
        self._buffer = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_blank = begins and tokenizer.leading_blank

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while bytes of a character are missing."""
        data = self._tokenizer.token_bytes(token)
        if self._drop_blank and data:
            data, self._drop_blank = data.removeprefix(b" "), False
        return self._buffer.decode(data)

    @property
    def whole(self) -> bool:
        """Whether the text so far ends with a whole character."""
        return not self._buffer.getstate()[0]

    def flush(self, cut: bool = False) -> str:
        """The rest of the text: U+FFFD for a character that stays incomplete; nothing if more tokens were `cut` off."""
        return "" if cut else self._buffer.decode(b"", final=True)


def from_json(text: str, stated: StatedTokens = NOTHING_STATED) -> Tokenizer:
    """The tokenizer that `to_json` wrote, or any of Hugging Face's `tokenizers`, with what files next to it state.

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
        return BPETokenizer(text, stated)
    kind, characters, end = facts.get("kind"), facts.get("characters"), facts.get("end_of_text_character")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "modalities" and isinstance(facts.get("text"), str):
        fields = facts.get("modalities")
        return ModalityTokenizer(from_json(facts["text"]), read_fields(Modalities, fields, {}, "modalities."))
    if kind == "bpe":
        names = {key: name for key in ("bos_token", "eos_token") if isinstance(name := facts.get(key), str)}
        stops = facts.get("stop_ids")
        stated = StatedTokens(names, eos_ids=tuple(stops) if isinstance(stops, list) else ())
        return BPETokenizer(json.dumps(facts.get("tokenizer")), stated)
    if kind == "char" and isinstance(characters, str) and isinstance(end, str | None):
        return CharTokenizer(characters, end)
    raise UserError(
        f"the tokenizer is of kind {kind!r}, or lacks a field; allowed: char, byte, bpe, "
        "modalities, or one of tokenizers"
    )


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the ids of two tokenizers stand for the same texts."""
    if isinstance(one, BPETokenizer) and isinstance(other, BPETokenizer):
        return one.vocabulary == other.vocabulary
    return one.to_json() == other.to_json()


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a JSON file, in a folder in Hugging Face's layout, or of ``hf:NAME``.

    Which tokens begin and end a text is read from the files next to it.

    Raises:
        UserError: the file is missing, not UTF-8, or not a tokenizer; names the file.
    """
    path = local_path(str(path))
    if path.is_dir():
        path = path / TOKENIZER
    if not path.is_file() and (path.parent / "merges.txt").is_file():
        return _read_merges(path.parent)
    text = read_text(path)
    stated = stated_tokens(path.parent) if path.name == TOKENIZER else NOTHING_STATED
    try:
        return from_json(text, stated)
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
    return BPETokenizer(tokenizer.to_str(), stated_tokens(folder))


def _codes(text: str) -> NDArray[np.uint32]:
    """The code points of a text as an array."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _abridged(characters: str) -> str:
    return repr(characters if len(characters) <= 100 else characters[:100] + "…")
