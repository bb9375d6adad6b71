"""A checkpoint to a GGUF file, for llama.cpp and all that is built on it; needs cleangpt[gguf].

Weights stay as exact as they are, in float32; llama.cpp's own tools make them smaller.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.config import ModelConfig
from cleangpt.data.tokenizers import CharTokenizer, Tokenizer
from cleangpt.errors import UserError, require
from cleangpt.interchange import llama
from cleangpt.interchange.huggingface import mapping_of
from cleangpt.interchange.vocabularies import byte_letters, ends, to_tokenizers, word_split
from cleangpt.models.llama import LlamaConfig

MAGIC = b"GGUF"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of token in GGUF."""
IMPOSSIBLE_MERGE = "<|endoftext|> <|endoftext|>"
"""GGUF has no empty lists, and llama.cpp no vocabulary without merges; this one never happens, for its parts are no
letters."""


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the file `path`.

    Raises:
        UserError: llama.cpp has no such model or tokenizer.
    """
    library = require("gguf", "gguf")
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    assert config.vocab_size is not None
    mapping_of(config)
    architecture = _architecture(config)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    writer = library.GGUFWriter(path, architecture)
    try:
        _add_sizes(writer, config)
        _add_vocabulary(writer, vocabulary, ends(tokenizer))
        for name, tensor in tensors_of(config, checkpoint.weights, architecture).items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


# The model -----------------------------------------------------------------------------------------------------------


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name; refuses what its architecture of that name does not compute."""
    if not isinstance(config, LlamaConfig):
        return "gpt2"
    assert config.max_seq_len is not None
    windows = [config.window(layer) for layer in range(config.n_layers)]
    if any(window is not None and window < config.max_seq_len for window in windows):
        raise UserError(
            f"model.sliding_window is {config.sliding_window}; allowed in GGUF: None, or model.max_seq_len or more, "
            f"which is {config.max_seq_len}"
        )
    if not config.normalize_router_weights:
        raise UserError("model.normalize_router_weights is False; allowed in GGUF: True")
    return llama.GGUF_ARCHITECTURES[llama.model_type(config)]


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)  # all tensors are float32
    mapping_of(config).add_gguf_sizes(writer, config)


def tensors_of(config: ModelConfig, weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors of a GGUF file by their names there."""
    library = require("gguf", "gguf")
    kind = next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    names = library.get_tensor_name_map(kind, getattr(config, "n_layers", 0))
    theirs: dict[str, Tensor] = mapping_of(config).gguf_tensors(config, weights)
    tensors = {names.get_name(name, try_suffixes=(".weight", ".bias")): tensor for name, tensor in theirs.items()}
    if isinstance(config, LlamaConfig) and config.rope_factor is not None:
        tensors["rope_freqs.weight"] = llama.rope_stretching(config)
    return tensors


# The vocabulary ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as GGUF has it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str
    """llama.cpp's name of the pattern that splits a text into words."""
    begins: bool
    """Whether a text gets the token of its beginning when it is encoded."""


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the `vocab_size` of the model.

    Raises:
        UserError: the tokenizer has no end-of-text token, is no byte-level BPE, or splits words in a way that
            llama.cpp does not know.
    """
    content = _spelled(tokenizer) if isinstance(tokenizer, CharTokenizer) else to_tokenizers(tokenizer)
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token; llama.cpp needs one, and would take another for it")
    if (split := word_split(content)) is None:
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
    begin = names[ends(tokenizer)["bos_token"]]
    return Vocabulary(
        tokens=[names.get(token, f"[PAD{token}]") for token in range(vocab_size)],
        types=[types.get(token, UNUSED) for token in range(vocab_size)],
        merges=merges or [IMPOSSIBLE_MERGE],
        split=split,
        begins=repr(begin) in repr(content["post_processor"]),
    )


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, special: dict[str, int]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_bos_token_id(special["bos_token"])
    writer.add_eos_token_id(special["eos_token"])


def _spelled(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Characters as a byte-level BPE: each spelled in the letters of its bytes, which merge from the left."""
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
