"""Our tokenizers in the format of Hugging Face's `tokenizers`, with the same ids and the same text.

A character tokenizer becomes a word-level one with words of one character; a byte tokenizer becomes a byte-level BPE
without merges.
"""

import json
from pathlib import Path
from typing import Any

from cleangpt.data.bpe import byte_letters
from cleangpt.data.dataset import TOKENIZER
from cleangpt.data.special_tokens import END_OF_TEXT
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}
"""llama.cpp's names of the patterns that split a text into words before byte pairs are merged."""


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """The text of a special token."""
    if isinstance(tokenizer, BPETokenizer):
        return next(name for name, known in tokenizer.vocabulary.items() if known == token)
    return tokenizer.characters[token] if isinstance(tokenizer, CharTokenizer) else END_OF_TEXT


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of `bos_token` and `eos_token`, which begin and end a document; without those that there are not.

    Without a token for the beginning, both are the same, as in GPT-2.
    """
    bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    around = {"bos_token": bos, "eos_token": tokenizer.eos_id}
    return {name: token for name, token in around.items() if token is not None}


def to_tokenizers(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` of Hugging Face's `tokenizers`.

    Raises:
        UserError: the tokenizer cannot be expressed there.
    """
    if isinstance(tokenizer, BPETokenizer):
        content: dict[str, Any] = json.loads(tokenizer.library_json())
        return content
    if isinstance(tokenizer, CharTokenizer):
        parts = _characters(tokenizer.characters)
    elif isinstance(tokenizer, ByteTokenizer):
        parts = _bytes()
    else:
        raise UserError(f"a {type(tokenizer).__name__} cannot be exported; allowed: char, byte and bpe tokenizers")
    added = [
        {"id": token, "content": name_of(tokenizer, token), "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for token in sorted(set(special_ids(tokenizer).values()))
    ]  # fmt: skip
    common = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    return common | {"added_tokens": added} | parts


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face's layout; reverses `to_tokenizers`.

    Raises:
        UserError: there is none, or it does not decode to the same text.
    """
    path = folder / TOKENIZER
    content = read_json(path) if path.is_file() else None
    with parsing(path):
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            vocabulary: Any = content["model"].get("vocab")
            if content == to_tokenizers(ByteTokenizer()):
                return ByteTokenizer()
            if content["model"].get("type") == "WordLevel" and all(len(name) == 1 for name in vocabulary):
                end = next((entry["content"] for entry in content["added_tokens"]), None)
                ours = CharTokenizer("".join(sorted(vocabulary, key=vocabulary.__getitem__)), end)
                if content == to_tokenizers(ours):
                    return ours
    return load_tokenizer(folder)


def _characters(characters: str) -> dict[str, Any]:
    """Unknown characters are refused, as here, since the unknown token is not in the vocabulary."""
    vocabulary = {character: token for token, character in enumerate(characters)}
    return {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def _bytes() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())} | {END_OF_TEXT: 256}
    return {
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def word_split(content: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a `tokenizer.json`; None: not supported.

    Without merges, splitting makes no difference.
    """
    model, before = content["model"], content["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    if before.get("type") == "ByteLevel":
        as_gpt2 = before.get("use_regex", True) and not before.get("add_prefix_space")
        return "gpt-2" if as_gpt2 or not model["merges"] else None
    steps = before.get("pretokenizers") or [{}]
    return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
