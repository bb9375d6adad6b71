"""A checkpoint as a GGUF file, for llama.cpp and everything built on it; needs the package gguf.

Weights are written in float32; llama.cpp's own tools quantize them.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.config import ModelConfig
from cleangpt.data.bpe import byte_letters
from cleangpt.data.tokenizers import CharTokenizer, Tokenizer
from cleangpt.errors import UserError, require
from cleangpt.interchange.huggingface import check_vocabulary, mapping_of, stop_ids
from cleangpt.interchange.vocabularies import special_ids, to_tokenizers, word_split

MAGIC = b"GGUF"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types in GGUF."""
MOST = 512
"""Layers and experts that llama.cpp has room for."""
IMPOSSIBLE_MERGE = "<|endoftext|> <|endoftext|>"
"""GGUF has no empty lists, and llama.cpp no vocabulary without merges; this one never applies, since neither part is a
byte letter."""


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the file `path`.

    Raises:
        UserError: llama.cpp does not support the model or its tokenizer.
    """
    library = require("gguf")
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    assert config.vocab_size is not None
    architecture: str = mapping_of(config).gguf_architecture(config)
    check_vocabulary(checkpoint)
    for field in ("n_layers", "n_experts"):
        if (count := vars(config).get(field) or 0) > MOST:
            raise UserError(f"model.{field} is {count}; allowed in GGUF: at most {MOST}")
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    writer = library.GGUFWriter(path, architecture)
    try:
        _add_sizes(writer, config)
        _add_vocabulary(writer, vocabulary, special_ids(tokenizer))
        if others := sorted(stop_ids(checkpoint) - {tokenizer.eos_id}):
            writer.add_eot_token_id(others[0])
        for name, tensor in tensors_of(config, checkpoint.weights, architecture).items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# The model ------------------------------------------------------------------------------------------------------------


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)  # all tensors are float32
    mapping_of(config).add_gguf_sizes(writer, config)


def tensors_of(config: ModelConfig, weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors of a GGUF file by name."""
    library, mapping = require("gguf"), mapping_of(config)
    kind = next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    hf_tensors: dict[str, Tensor] = mapping.gguf_tensors(config, weights)
    names = library.get_tensor_name_map(kind, vars(config)["n_layers"])
    tensors = {names.get_name(name, try_suffixes=(".weight", ".bias")): tensor for name, tensor in hf_tensors.items()}
    extra: dict[str, Tensor] = mapping.extra_gguf_tensors(config)
    return tensors | extra


# The vocabulary -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as GGUF stores it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    """llama.cpp's name of the pattern that splits a text into words."""
    add_bos: bool
    """Whether encoding adds the beginning-of-text token."""


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, padded to the `vocab_size` of the model.

    Raises:
        UserError: the tokenizer has no end-of-text token, is not a byte-level BPE, or splits words in a way that
            llama.cpp does not support.
    """
    content = _characters_as_bpe(tokenizer) if isinstance(tokenizer, CharTokenizer) else to_tokenizers(tokenizer)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token, which llama.cpp needs")
    if (pre_tokenizer := word_split(content)) is None:
        raise UserError(
            "the tokenizer cannot be written as GGUF; allowed: char, byte, and byte-level BPE that splits words as "
            "GPT-2, Llama 3 or Qwen 2 do"
        )
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    names = {token: name for name, token in content["model"]["vocab"].items()}
    names |= {token: entry["content"] for token, entry in added.items()}
    types = dict.fromkeys(names, NORMAL)
    types |= {token: CONTROL if entry["special"] else USER_DEFINED for token, entry in added.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if tokenizer.prefix not in ((), (tokenizer.bos_id,)):
        before = [names[token] for token in tokenizer.prefix]
        raise UserError(f"the tokenizer puts {before} before a text; allowed in GGUF: bos_token, once")
    return Vocabulary(
        tokens=[names.get(token, f"[PAD{token}]") for token in range(vocab_size)],
        types=[types.get(token, UNUSED) for token in range(vocab_size)],
        merges=merges or [IMPOSSIBLE_MERGE],
        pre_tokenizer=pre_tokenizer,
        add_bos=bool(tokenizer.prefix),
    )


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, special: dict[str, int]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_bos_token_id(special["bos_token"])
    writer.add_eos_token_id(special["eos_token"])


def _characters_as_bpe(tokenizer: CharTokenizer) -> dict[str, Any]:
    """A character tokenizer as a byte-level BPE that merges the bytes of each character from the left."""
    letters = byte_letters()
    content = to_tokenizers(tokenizer)
    vocabulary: dict[str, int] = {}
    merges: dict[str, None] = {}
    for token, character in enumerate(tokenizer.characters):
        spelled = "".join([letters[byte] for byte in character.encode("utf-8")])
        vocabulary[spelled] = token
        merges |= {f"{spelled[:end]} {spelled[end]}": None for end in range(1, len(spelled))}
    added = [entry | {"content": "".join(letters[byte] for byte in entry["content"].encode("utf-8"))}
             for entry in content["added_tokens"]]  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": list(merges)}
    return content | {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel"}, "model": model}
