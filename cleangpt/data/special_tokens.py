"""Which tokens begin and end a text, as the files next to a tokenizer state it.

A folder of Hugging Face says it in several places: `tokenizer_config.json` (in older ones `special_tokens_map.json`)
names the tokens, `config.json` and `generation_config.json` have their ids, and generation may end at several of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cleangpt.errors import UserError
from cleangpt.files import read_json

END_OF_TEXT = "<|endoftext|>"
EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")
"""Names to look for in a `tokenizer.json` that comes without files to say which tokens end and begin a text."""

TOKENIZER, HF_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
MODEL_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class StatedTokens:
    """What the files say about the tokens around a text; empty or None where they say nothing."""

    names: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token` and other special tokens by their names in Hugging Face's templates."""
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    """All tokens that end a text."""
    add_bos: bool = False
    """Whether the beginning-of-text token stands before a text. Only `vocab.json` and `merges.txt` need this, since a
    `tokenizer.json` has a post-processor that says so."""


NOTHING_STATED = StatedTokens()


def stated_tokens(folder: Path) -> StatedTokens:
    """What the files in a folder say; those that are missing say nothing.

    Raises:
        UserError: a file is not a JSON object, or has something else where a token should be.
    """
    bos, eos = ([token for name in MODEL_CONFIGS for token in _ids(folder / name, key)]
                for key in ("bos_token_id", "eos_token_id"))  # fmt: skip
    adds = _object(folder / HF_CONFIG).get("add_bos_token") is True and not (folder / TOKENIZER).is_file()
    return StatedTokens(named_tokens(folder), tuple(bos), tuple(eos), adds)


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens of a folder by name, such as `eos_token`; each is given as text or as an object with it."""
    entries = _object(folder / SPECIAL_TOKENS_MAP) | {
        key: value for key, value in _object(folder / HF_CONFIG).items() if value is not None
    }
    names = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in entries.items()
        if key.endswith("_token")
    }
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _ids(path: Path, key: str) -> list[int]:
    """The token ids in an entry, which may have one, a list of them, or none."""
    value = _object(path).get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UserError(f"{path}: {key} is {value!r}; allowed: a token id, or a list of token ids")
    return ids


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
