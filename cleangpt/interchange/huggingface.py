"""Reads and writes checkpoints in Hugging Face's layout: `config.json`, safetensors, `tokenizer.json`."""

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cleangpt.checkpoints.checkpoint import CONFIG, WEIGHTS, Checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import find_checkpoint
from cleangpt.checkpoints.tensor_files import PYTORCH, write_tensors
from cleangpt.config import ModelConfig
from cleangpt.data.chat_template import HF_TEMPLATE, find_template, stop_tokens
from cleangpt.data.dataset import TOKENIZER
from cleangpt.data.images import written_image_token
from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json, write_json, write_text
from cleangpt.hub import fetch, is_huggingface
from cleangpt.interchange import gpt, llama, vision
from cleangpt.interchange.towers import with_processor, write_processor
from cleangpt.interchange.vocabularies import name_of, read_tokenizer, special_ids, to_tokenizers, word_split
from cleangpt.interchange.weights import read_weights
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import image_inputs, vision_of
from cleangpt.objectives.reward_model import HEAD

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
CLASSIFIER, SCORE, REWARD_HEAD = "ForSequenceClassification", "score.weight", f"heads.{HEAD}.weight"
"""How Transformers calls such a model, its head, and how we call that of a reward model."""
MAPPINGS: dict[type[ModelConfig], ModuleType] = {GPTConfig: gpt, LlamaConfig: llama}
"""The module that converts each architecture, by configuration class."""
MODEL_TYPES: dict[str, ModuleType] = {
    "gpt2": gpt, **dict.fromkeys(llama.HF_FAMILIES, llama), **dict.fromkeys(vision.HF_FAMILIES, vision),
}  # fmt: skip
"""The same by Hugging Face's `model_type`."""
HEAD = "lm_head.weight"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of weights; other floats come with scales."""


# Reading --------------------------------------------------------------------------------------------------------------


def find(text: str) -> Path:
    """The folder of a checkpoint named ``hf:NAME_OR_FOLDER``, or what `find_checkpoint` finds.

    Raises:
        UserError: there is none.
    """
    return fetch(text) if is_huggingface(text) else find_checkpoint(text)


def open_checkpoint(text: str) -> Checkpoint:
    """Reads the checkpoint ``hf:NAME_OR_FOLDER``, or that of a run or folder; nothing in it is executed.

    Raises:
        UserError: it does not exist, is corrupt, or its architecture is not supported.
    """
    folder = find(text)
    content = read_json(folder / CONFIG)
    is_hf = isinstance(content, dict) and "model_type" in content
    return read_huggingface(folder) if is_hf else load_checkpoint(folder)


def read_huggingface(folder: Path) -> Checkpoint:
    """Reads a folder that `save_pretrained` wrote, or a model's files as they are on Hugging Face.

    Raises:
        UserError: a file or an entry is missing, or an entry has a value that is not supported.
    """
    entries = read_json(folder / CONFIG)
    kind = entries.get("model_type") if isinstance(entries, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(f"{folder / CONFIG}: model_type is {kind!r}; allowed: {', '.join(MODEL_TYPES)}")
    mapping, scores = MODEL_TYPES[kind], str(entries.get("architectures")).endswith(f"{CLASSIFIER}']")
    if scores:  # has no language-model head, so none that differs from the embedding
        entries["tie_word_embeddings"] = True
    try:
        with parsing(CONFIG):
            _check_plain(entries)
            config: ModelConfig = mapping.config_from_huggingface(entries)
            if isinstance(config, LlamaConfig) and image_inputs(config):
                config = replace(config, vision=with_processor(config.vision, folder))
        with parsing(WEIGHTS, RuntimeError):
            found = read_weights(folder)
            weights: dict[str, Tensor] = mapping.from_huggingface(config, found)
            used = mapping.used_weights(config) | ({SCORE} if scores else set())
            _check_weights(found, used, mapping.UNUSED_WEIGHTS, weights["token_embedding.weight"])
            if scores:
                weights |= _reward_head(found)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return Checkpoint(folder, config, read_tokenizer(folder), weights, {"model_type": kind}, find_template(folder))


def _check_plain(entries: dict[str, Any]) -> None:
    """Checks that weights mean themselves: that they are not quantized."""
    for name in ("quantization_config", "compression_config"):
        if entries.get(name):
            raise UserError(f"config.json has a {name}; allowed: none, since quantized weights are not read")


def _check_weights(found: dict[str, Tensor], used: set[str], ignored: str, embedding: Tensor) -> None:
    """Checks that the model uses all weights of a file, as they are.

    Args:
        found: the weights of the file, by Hugging Face's names.
        used: names of weights that the model reads.
        ignored: regular expression of names that are not weights.
        embedding: of tokens, which a tied head has to equal.

    Raises:
        UserError: there is a weight that the configuration knows nothing of, such as a bias, or one is quantized.
    """
    unused = sorted(name for name in found if name not in used and not re.fullmatch(ignored, name))
    if len(unused) == 1 and unused[0].endswith(HEAD) and torch.equal(found[unused[0]], embedding):
        unused = []
    if unused:
        tied = " and tie_word_embeddings true" if unused[0].endswith(HEAD) else ""
        raise UserError(f"the weights have {unused[0]!r}, which a model with this config.json{tied} does not use")
    for name in sorted(used & found.keys()):
        if found[name].dtype not in DTYPES:
            raise UserError(f"{name} is stored as {found[name].dtype}; allowed: floats of 16 bits or more")


def _reward_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalar head of a model for sequence classification.

    Raises:
        UserError: it has several labels.
    """
    if len(head := tensors[SCORE]) != 1:
        raise UserError(f"{SCORE} has {len(head)} rows; allowed: 1, a reward model's")
    return {REWARD_HEAD: head}


# Writing --------------------------------------------------------------------------------------------------------------


def mapping_of(config: ModelConfig) -> ModuleType:
    """The module that converts an architecture.

    Raises:
        UserError: there is none.
    """
    if image_inputs(config):
        if not isinstance(config, LlamaConfig):
            kind = type(config).__name__
            raise UserError(f"model.vision.encoder is set; allowed for a {kind} that is exported: None; a Llama may")
        return vision
    if type(config) not in MAPPINGS:
        known = ", ".join(cls.__name__ for cls in MAPPINGS)
        raise UserError(f"a model of {type(config).__name__} cannot be exported; allowed: {known}")
    return MAPPINGS[type(config)]


def check_vocabulary(checkpoint: Checkpoint) -> None:
    """Checks that the model has an embedding for every token; other programs would fail where they read another.

    Raises:
        UserError: the tokenizer has more tokens.
    """
    known, rows = checkpoint.tokenizer.vocab_size, checkpoint.config.vocab_size
    if rows is not None and known > rows:
        raise UserError(
            f"the tokenizer has {known:,} tokens, the model's embedding {rows:,} rows; allowed: as many rows or more, "
            f"as after training with model.vocab_size={known} and --init-from"
        )


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a checkpoint into an empty `folder`, for `AutoModelForCausalLM` and `AutoTokenizer`.

    A model that reads images is written for `AutoModelForImageTextToText` and `AutoImageProcessor`,
    and for `AutoProcessor` if pictures stand between special tokens. A reward model is
    written for `AutoModelForSequenceClassification`, without its language-model head.

    Raises:
        UserError: Hugging Face does not support the model or its tokenizer.
    """
    mapping = mapping_of(checkpoint.config)
    check_vocabulary(checkpoint)
    special = _special_ids(checkpoint)
    dtype = str(next(iter(checkpoint.weights.values())).dtype).removeprefix("torch.")
    entries = mapping.config_to_huggingface(checkpoint.config) | special | {"torch_dtype": dtype}
    tokenizer = to_tokenizers(checkpoint.tokenizer)
    _check_word_split(entries["model_type"], tokenizer)
    tensors = mapping.to_huggingface(checkpoint.config, checkpoint.weights)
    if image_inputs(checkpoint.config):
        image = written_image_token(checkpoint.tokenizer)
        entries |= {"image_token_id" if entries["model_type"] == vision.IDEFICS else "image_token_index": image}
        write_processor(vision_of(checkpoint.config), folder)
    if (head := checkpoint.weights.get(REWARD_HEAD)) is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"} | {SCORE: head}
        kind = re.sub("LMHeadModel|ForCausalLM", CLASSIFIER, entries["architectures"][0])
        entries |= {"architectures": [kind], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_json(folder / CONFIG, entries)
    write_json(folder / GENERATION_CONFIG, special)
    write_json(folder / TOKENIZER, tokenizer)
    write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(checkpoint))
    if checkpoint.chat_template is not None:
        write_text(folder / HF_TEMPLATE, checkpoint.chat_template.source)
    write_tensors(folder / WEIGHTS, tensors, PYTORCH)


def _check_word_split(kind: str, tokenizer: dict[str, Any]) -> None:
    """Checks that a Qwen 2 has Qwen's word splitting, which transformers applies whatever the files say.

    Raises:
        UserError: it has another.
    """
    unmerged = tokenizer["model"]["type"] == "BPE" and not tokenizer["model"]["merges"]
    if kind == "qwen2" and not unmerged and word_split(tokenizer) != "qwen2":
        raise UserError(
            "transformers would read this tokenizer as Qwen's own, since model.qkv_bias makes the model a Qwen 2; "
            "allowed with it: a byte tokenizer or Qwen's, or --format gguf"
        )


def stop_ids(checkpoint: Checkpoint) -> set[int]:
    """All tokens that end a text of a model, or an answer."""
    template, tokenizer = checkpoint.chat_template, checkpoint.tokenizer
    return set(tokenizer.stop_ids) if template is None else stop_tokens(template, tokenizer)


def _special_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokens before a text as it was trained on, and all tokens that end a text or an answer."""
    tokenizer = checkpoint.tokenizer
    before = [*tokenizer.prefix, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
    ids = {"bos_token_id": before[:1], "eos_token_id": sorted(stop_ids(checkpoint))}
    return {name: tokens[0] if len(tokens) == 1 else tokens for name, tokens in ids.items() if tokens}


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer
    template_tokens = checkpoint.chat_template.special if checkpoint.chat_template is not None else {}
    return (
        {name: name_of(tokenizer, token) for name, token in special_ids(tokenizer).items()}
        | dict(template_tokens)
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": checkpoint.config.max_seq_len,
            "clean_up_tokenization_spaces": False,
        }
    )
