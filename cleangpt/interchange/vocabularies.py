"""Our tokenizers in the form of Hugging Face's `tokenizers`: the same ids and the same text.

Characters become a vocabulary of words of one character; bytes become a byte-level BPE that has learned no merges.
"""

import json
from pathlib import Path
from typing import Any

from cleangpt.data.dataset import TOKENIZER
from cleangpt.data.tokenizers import (
    BOS_TOKENS,
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}
"""By the pattern that splits a text into words before byte pairs are merged: llama.cpp's name of it."""


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE (Radford et al. 2019, as released).

    A byte that is a visible character of Latin-1 stands for itself; the others have the letters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """What a token is called."""
    if isinstance(tokenizer, BPETokenizer):
        return next(name for name, known in tokenizer.vocabulary.items() if known == token)
    return tokenizer.characters[token] if isinstance(tokenizer, CharTokenizer) else END_OF_TEXT


def ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens at which a document begins and ends, by Hugging Face's names of them; empty where there are none.

    Where no token is for the beginning, a document begins after the end of another, as in GPT-2.
    """
    if tokenizer.eos_id is None:
        return {}
    known = tokenizer.vocabulary if isinstance(tokenizer, BPETokenizer) else {}
    begin = next((known[name] for name in BOS_TOKENS if name in known), tokenizer.eos_id)
    return {"bos_token": begin, "eos_token": tokenizer.eos_id}


def to_tokenizers(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` of Hugging Face's `tokenizers`.

    Raises:
        UserError: the tokenizer is of a kind that cannot be expressed there.
    """
    if isinstance(tokenizer, BPETokenizer):
        content: dict[str, Any] = json.loads(tokenizer.to_json())
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
        for token in sorted(set(ends(tokenizer).values()))
    ]  # fmt: skip
    common = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    return common | {"added_tokens": added} | parts


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder in Hugging Face's layout; one of ours that `to_tokenizers` wrote is ours again.

    Raises:
        UserError: there is none, or one that loses text.
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
    """An unknown character is refused there as it is here, since the name of an unknown word is none of these."""
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
    """llama.cpp's name of how a `tokenizer.json` splits words before byte pairs are merged; none: no way it knows.

    Where nothing has been merged, how words are split makes no difference.
    """
    model, before = content["model"], content["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    if before.get("type") == "ByteLevel":
        as_gpt2 = before.get("use_regex", True) and not before.get("add_prefix_space")
        return "gpt-2" if as_gpt2 or not model["merges"] else None
    steps = before.get("pretokenizers") or [{}]
    return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
