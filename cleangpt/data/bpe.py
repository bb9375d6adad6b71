"""Byte-pair encoding, and whatever else Hugging Face's `tokenizers` has: text to token ids and back."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cleangpt.data.special_tokens import BOS_TOKENS, END_OF_TEXT, EOS_TOKENS, NOTHING_STATED, StatedTokens
from cleangpt.errors import UserError, require

LOSSLESS_PROBES = ("a Bc, 12 déjà 漢字 🙂\n\tx = 1\n", " a  b ", "\n\n", "ﬁ①Ａ")
"""Texts with multi-byte characters, whitespace that some tokenizers drop, and letters that some replace."""


def byte_letters() -> list[str]:
    """The character that represents each byte in a byte-level BPE (Radford et al. 2019, as released).

    Visible characters of Latin-1 represent themselves; the other bytes get the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


LONG_RUN = re.compile(r"\S{1000}|\s{1000}")
"""A part of a text, such as a genome, that would be a single word of any length."""
BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}


class BPETokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, from its JSON text; needs that package.

    The names of special tokens are not parsed (`<|endoftext|>` in a text is text like any other), and special tokens
    are omitted when decoding. What the tokenizer's post-processor puts before a text stands before it here, too; what
    it puts after one does not, since only a whole document ends. A SentencePiece-like tokenizer, which adds a space
    before every text, does so even if the text starts with a space, as SentencePiece does; `tokenizers` may not, and
    would lose that space. An added token that takes the blanks next to it, as some of Phi 3's do, loses them here, too.

    Args:
        text: the content of a `tokenizer.json`.
        stated: what the files next to it say about the tokens around a text. Where they say nothing, well-known names
            are looked for.

    Raises:
        UserError: the library does not understand the JSON, or the tokenizer is lossy, such as one that lowercases.
    """

    def __init__(self, text: str, stated: StatedTokens = NOTHING_STATED) -> None:
        with _library():
            self._tokenizer = _of_library(text)
            self._decoders = _kinds(json.loads(text).get("decoder"))
            learned = self._tokenizer.get_vocab(with_added_tokens=False)
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._added = self.vocabulary.keys() - learned.keys()
        """Names of tokens that were added to the model's own, and are text as it is written."""
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        self.leading_blank = self._loses_blank = False
        self._word: list[int] = []  # the tokens of some word
        with contextlib.suppress(UserError):  # unknown, so that a probe will fail
            self._word = self._raw("a")
        self.prefix = self._put_before()
        self._settle(stated)
        with _library():
            self.leading_blank = self._tokenizer.decode(self._word) == "a" and self._joined(self._word) == " a"
        self._loses_blank = self._decoded(" a") == "a"
        for probe in LOSSLESS_PROBES:
            if (decoded := self._decoded(probe)) != probe:
                raise UserError(
                    f"this tokenizer loses text when it encodes: {probe!r} becomes {decoded!r}; allowed: lossless "
                    "ones, such as byte-level BPE"
                )

    # What stands before and after a text -----------------------------------------------------------------------------
    def _settle(self, stated: StatedTokens) -> None:
        """Finds the tokens around a text, and makes the library's tokenizer agree with them."""
        self.special = self._special()
        named_bos, named_eos = self._by_name(BOS_TOKENS), self._by_name(EOS_TOKENS)
        self.bos_id = self._stated(stated.names.get("bos_token"), stated.bos_ids, named_bos)
        self.eos_id = self._stated(stated.names.get("eos_token"), stated.eos_ids, named_eos)
        known = set(self.vocabulary.values())
        self.stop_ids = frozenset(token for token in (self.eos_id, *stated.eos_ids) if token in known)
        if stated.add_bos and self.bos_id is not None:
            self.prefix = (self.bos_id,)
        self._is_plain = (self.bos_id, self.eos_id) == (named_bos, named_eos) and self.stop_ids <= {named_eos}
        around = {self.bos_id, self.eos_id, *self.prefix} - set(self.special.values())
        names = [name for name, token in self.vocabulary.items() if token in around]
        with _library():
            self._tokenizer.add_special_tokens(names)
            if self._put_before(whole=True) != self.prefix:
                content = json.loads(self._tokenizer.to_str())
                before = [(self._tokenizer.id_to_token(token), token) for token in self.prefix]
                self._tokenizer = _of_library(json.dumps(content | {"post_processor": _putting(before)}))
        self.special = self._special()
        self._bytes: dict[int, bytes] = {}

    def _special(self) -> dict[str, int]:
        """Ids of special tokens by name."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def _by_name(self, names: Iterable[str]) -> int | None:
        return next((self.vocabulary[name] for name in names if name in self.vocabulary), None)

    def _stated(self, name: str | None, ids: Iterable[int], otherwise: int | None) -> int | None:
        """The token that files give by name or by id; not by an id that means text, as a default of another model."""
        if name in self.vocabulary:
            return self.vocabulary[name]
        known = set(self.vocabulary.values())
        return next((token for token in ids if token in known and not self._is_text(token)), otherwise)

    def _is_text(self, token: int) -> bool:
        """Whether a text is encoded as this token."""
        text = self._read_bytes(token).decode("utf-8", "replace")
        return bool(text) and token in self._raw(text)

    def _put_before(self, whole: bool = False) -> tuple[int, ...]:
        """What the post-processor puts before a text; with `whole`, what follows the text, too."""
        size = len(self._word)
        if not size:
            return ()
        with _library():
            ids: list[int] = self._tokenizer.encode("a").ids
        start = next((start for start in range(len(ids)) if ids[start : start + size] == self._word), 0)
        return (*ids[:start], *(ids[start + size :] if whole else []))

    # Text to tokens --------------------------------------------------------------------------------------------------
    def _decoded(self, text: str) -> str:
        """The text after encoding and decoding; empty if it cannot be encoded."""
        try:
            return self.decode(self.encode(text).tolist())
        except UserError:  # such as an unknown character
            return ""

    def _raw(self, text: str) -> list[int]:
        """Token ids without `prefix`."""
        with _library():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids by the learned merges, after `prefix`."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """`encode` for many texts, on all cores by the library's own threads."""
        for text in texts:
            utf8(text)
        if self._loses_blank:
            texts = [f" {text}" if text.startswith(" ") else text for text in texts]
        with _library():
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*self.prefix, *encoding.ids], np.int64) for encoding in encodings]

    def encode_special(self, texts: list[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Token ids `(length,)` of texts, parsing special tokens, and each token's character span `(length, 2)`."""
        for text in texts:
            utf8(text)
        with _library():
            encodings = self._reading_special.encode_batch(texts, add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            for encoding in encodings
        ]

    @cached_property
    def _reading_special(self) -> Any:
        reading = _of_library(self.library_json())
        reading.encode_special_tokens = False
        return reading

    # Tokens to text --------------------------------------------------------------------------------------------------
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; special tokens are omitted."""
        text = self._joined(ids)
        return text.removeprefix(" ") if self.leading_blank else text

    def _joined(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text that has begun; nothing for a special token."""
        if token not in self._bytes:
            self._bytes[int(token)] = self._read_bytes(int(token))
        return self._bytes[token]

    def _read_bytes(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None or self.special.get(name) == token:
            return b""
        if "ByteLevel" in self._decoders:
            spelled = name not in self._added and BYTES.keys() >= set(name)
            return bytes([BYTES[letter] for letter in name]) if spelled else name.encode("utf-8")
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        # After another token, since some decoders treat the first one of a text differently.
        with _library():
            before, both = (self._tokenizer.decode([*self._word, *more]) for more in ([], [token]))
        return str(both)[len(before) :].encode("utf-8")

    # JSON ------------------------------------------------------------------------------------------------------------
    def to_json(self) -> str:
        """The library's own format; within an object that says what ends a text, where well-known names do not."""
        if self._is_plain:
            return self.library_json()
        names = {token: name for name, token in self.vocabulary.items()}
        facts = {
            "kind": "bpe",
            "bos_token": None if self.bos_id is None else names[self.bos_id],
            "eos_token": None if self.eos_id is None else names[self.eos_id],
            "stop_ids": sorted(self.stop_ids),
            "tokenizer": json.loads(self.library_json()),
        }
        return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"

    def library_json(self) -> str:
        """The library's own format, for exchange."""
        return str(self._tokenizer.to_str(pretty=True))


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> BPETokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) with at most `vocab_size` tokens.

    The first token is `<|endoftext|>`, then come other `special` ones and the 256 bytes. If the texts are too short for
    that many merges, there are fewer tokens. The same texts give the same tokenizer.

    A run of characters without a blank, or of blanks, is learned from in parts of 1,000, since the library's time grows
    with the square of a word's length.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}; allowed: 257 or more (256 bytes and {END_OF_TEXT})")
    library = require("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_in_parts(texts), trainer)
    return BPETokenizer(tokenizer.to_str())


def _in_parts(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut after every `LONG_RUN`."""
    for text in texts:
        at = 0
        for run in LONG_RUN.finditer(text):
            yield text[at : run.end()]
            at = run.end()
        yield text[at:]


def _of_library(text: str) -> Any:
    """A tokenizer of the library that reads names of special tokens as text."""
    tokenizer = require("tokenizers").Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _kinds(part: Any) -> set[str]:
    """The kinds of decoders in the library's JSON."""
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_kinds, part.get("decoders", [])))


def _putting(tokens: list[tuple[str, int]]) -> dict[str, Any] | None:
    """The library's post-processor that puts these tokens, by name and id, before every text."""
    if not tokens:
        return None
    before = {kind: [{"SpecialToken": {"id": name, "type_id": kind}} for name, _ in tokens] for kind in (0, 1)}
    one, other = ({"Sequence": {"id": "AB"[kind], "type_id": kind}} for kind in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [*before[0], one],
        "pair": [*before[0], one, *before[1], other],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in tokens},
    }


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Reports errors of `tokenizers` in one line: bare Exceptions, and Rust panics, which are not Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"this is not a tokenizer of Hugging Face's tokenizers: {error}") from None


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text; raises UserError for an unpaired surrogate, which is not a character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} is not a character; give valid Unicode text") from None
