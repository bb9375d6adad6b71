"""GGUF files hold what llama.cpp needs, and it computes from them what we compute."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
import torch

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.config import ModelConfig
from cleangpt.data.special_tokens import StatedTokens
from cleangpt.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from cleangpt.errors import UserError
from cleangpt.interchange.export import export
from cleangpt.interchange.gguf import tensors_of, vocabulary_of
from cleangpt.interchange.huggingface import mapping_of
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from tests.generation import greedy

TEXT = "To be, or  not to be:\n\nthat's the question — déjà vu 漢字 🙂 12 + 345 = 357\n"
BPE = train_bpe([TEXT * 20], 400)
CHARACTERS = CharTokenizer("".join(sorted({*TEXT, "\0"})), "\0")
SIZES = {"max_seq_len": 256, "n_layers": 2, "n_heads": 4, "dim": 64, "vocab_size": 448}
GPT_SMALL = GPTConfig(**SIZES)  # type: ignore[arg-type]
LLAMA_SMALL = LlamaConfig(**SIZES, n_kv_heads=2, hidden_dim=96)  # type: ignore[arg-type]
KINDS = {
    "gpt2": GPT_SMALL,
    "gpt2 without biases": replace(GPT_SMALL, bias=False),
    "gpt2, untied": replace(GPT_SMALL, tied=False, hidden_dim=96, norm_eps=1e-3),
    "llama": LLAMA_SMALL,
    "llama 3.1, tied": replace(LLAMA_SMALL, tied=True, rope_factor=8.0, rope_original_seq_len=32),
    "mistral": replace(LLAMA_SMALL, sliding_window=256),
    "mixtral": replace(LLAMA_SMALL, n_experts=4),
    "qwen2": replace(LLAMA_SMALL, qkv_bias=True),
    "qwen3": replace(LLAMA_SMALL, qk_norm=True, head_dim=32),
    "qwen3_moe": replace(LLAMA_SMALL, qk_norm=True, n_experts=4, expert_hidden_dim=32),
}
CASES = [(kind, BPE) for kind in KINDS] + [("gpt2", ByteTokenizer()), ("gpt2", CHARACTERS)]


def checkpoint_of(config: ModelConfig, tokenizer: Tokenizer) -> Checkpoint:
    """Weights that make the most probable token clear, so that rounding does not choose it."""
    torch.manual_seed(0)
    model = build_model(config)
    for name, parameter in model.named_parameters():
        gain = name.endswith("norm.weight")
        torch.nn.init.normal_(parameter, mean=float(gain), std=1.0 if "embedding" in name else 0.2)
    return Checkpoint(Path("somewhere"), config, tokenizer, dict(model.state_dict()), {})


@pytest.mark.torture
@pytest.mark.parametrize(
    ("kind", "tokenizer"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_llama_cpp_encodes_and_continues_as_we_do(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    checkpoint = checkpoint_of(KINDS[kind], tokenizer)
    export(checkpoint, "gguf", tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False)
    ids = tokenizer.encode(TEXT).tolist()
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=False) == ids
    assert theirs.detokenize(ids).decode() == TEXT
    assert theirs.token_eos() == tokenizer.eos_id
    stream = theirs.generate(ids, temp=0.0)
    ours = greedy(checkpoint.model(torch.device("cpu")), torch.tensor([ids]), 50)[0].tolist()
    assert [next(stream) for _ in range(50)] == ours


def test_a_file_names_its_model_and_its_tensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint = checkpoint_of(replace(LLAMA_SMALL, n_experts=4), BPE)
    export(checkpoint, "gguf", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    entries: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    assert entries["general.architecture"] == "llama" and entries["llama.expert_count"] == 4
    assert entries["tokenizer.ggml.tokens"][BPE.vocab_size] == f"[PAD{BPE.vocab_size}]"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(checkpoint.weights)
    stacked = torch.from_numpy(tensors["blk.1.ffn_down_exps.weight"].copy())
    assert torch.equal(stacked, checkpoint.weights["blocks.1.mlp.down"])


def surrounded(before: str) -> BPETokenizer:
    """Byte pairs with several ends of text; `before` is what a post-processor puts before a text."""
    peer = library.Tokenizer.from_str(BPE.to_json())
    peer.add_special_tokens(["<B>", "<E>", "<T>"])
    ids = [(name, peer.token_to_id(name)) for name in ("<B>", "<E>")]
    peer.post_processor = library.processors.TemplateProcessing(single=f"{before} $A <E>".strip(), special_tokens=ids)
    names = {"bos_token": "<B>", "eos_token": "<E>"}
    return BPETokenizer(peer.to_str(), StatedTokens(names, eos_ids=(peer.token_to_id("<T>"),)))


@pytest.mark.parametrize("before", ["", "<B>"])
def test_a_file_says_what_begins_and_ends_a_text(before: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = surrounded(before)
    export(checkpoint_of(LLAMA_SMALL, tokenizer), "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in
             ("add_bos_token", "bos_token_id", "eos_token_id", "eot_token_id")}  # fmt: skip
    special = tokenizer.special
    assert found == {"add_bos_token": bool(before), "bos_token_id": special["<B>"], "eos_token_id": special["<E>"],
                     "eot_token_id": special["<T>"]}  # fmt: skip


def test_what_llama_cpp_would_not_put_before_a_text_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"the tokenizer puts \['<B>', '<B>'\] before a text; allowed in GGUF: bos_token"
    ):
        vocabulary_of(surrounded("<B> <B>"), 448)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_left_over_that_llama_cpp_would_not_read(kind: str) -> None:
    """It refuses a file with more tensors than its architecture has: `src/models/*.cpp` in its repository."""
    pytest.importorskip("gguf")
    config = KINDS[kind]
    architecture = mapping_of(config).gguf_architecture(config)
    layers = {"attn_norm", "attn_output", "ffn_norm", "ffn_up", "ffn_down"}
    known = {"gpt2": layers | {"attn_qkv", "position_embd"}}
    known["llama"] = layers | {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_gate_inp", "rope_freqs"}
    known["llama"] |= {f"ffn_{part}_exps" for part in ("gate", "up", "down")}
    known["qwen2"] = known["llama"] - {"rope_freqs"}
    known["qwen3"] = known["qwen3moe"] = known["qwen2"] | {"attn_q_norm", "attn_k_norm"}
    names = tensors_of(config, checkpoint_of(config, BPE).weights, architecture)
    found = {name.split(".")[-2] for name in names}
    assert found - {"token_embd", "output_norm", "output"} <= known[architecture]


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path, checkpoint = tmp_path / "model.gguf", checkpoint_of(GPT_SMALL, BPE)
    export(checkpoint, "gguf", path)
    with pytest.raises(UserError, match="--force"):
        export(checkpoint, "gguf", path)
    export(checkpoint, "gguf", path, force=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="was not written by an export"):
        export(checkpoint, "gguf", path, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(LLAMA_SMALL, sliding_window=8), r"model\.sliding_window is 8; allowed in GGUF: None, or .* 256"),
        (
            replace(LLAMA_SMALL, qk_norm=True, n_experts=4, normalize_router_weights=False),
            r"model\.normalize_router_weights is False; allowed in GGUF: True",
        ),
        *(
            (
                replace(LLAMA_SMALL, rope_factor=8.0, **fields),
                rf"model\.rope_factor is 8\.0; .* llama\.cpp's {name} has no",
            )
            for name, fields in {
                "qwen2": {"qkv_bias": True},
                "qwen3": {"qk_norm": True},
                "qwen3moe": {"qk_norm": True, "n_experts": 4, "expert_hidden_dim": 32},
            }.items()
        ),
        (
            replace(LLAMA_SMALL, qkv_bias=True, head_dim=32),
            r"model\.head_dim is 32; allowed in GGUF with model\.qkv_bias: model\.dim / model\.n_heads",
        ),
        (replace(GPT_SMALL, activation="gelu"), r"model\.activation is 'gelu'; allowed in GGUF: 'gelu_tanh'"),
        (replace(GPT_SMALL, scale_attention=False), r"model\.scale_attention is False; allowed in GGUF: True"),
        (replace(GPT_SMALL, scale_attention_by_layer=True), r"model\.scale_attention_by_layer is True; .*: False"),
        (replace(GPT_SMALL, n_layers=513), r"model\.n_layers is 513; allowed in GGUF: at most 512"),
        (replace(LLAMA_SMALL, n_experts=513), r"model\.n_experts is 513; allowed in GGUF: at most 512"),
        (ModelConfig(vocab_size=448, max_seq_len=8), "a model of ModelConfig cannot be exported"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config: ModelConfig, message: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=message):
        export(Checkpoint(tmp_path, config, BPE, {}, {}), "gguf", tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_is_padded_to_that_of_the_model() -> None:
    vocabulary = vocabulary_of(ByteTokenizer(), 260)
    assert vocabulary.tokens[65:67] == ["A", "B"] and vocabulary.tokens[256:] == [
        "<|endoftext|>", "[PAD257]", "[PAD258]", "[PAD259]",
    ]  # fmt: skip
    assert vocabulary.types[255:] == [1, 3, 5, 5, 5]
    assert not vocabulary.add_bos


def test_a_character_of_several_bytes_is_merged_from_its_bytes() -> None:
    vocabulary = vocabulary_of(CharTokenizer("aé漢\n", "\n"), 4)
    assert vocabulary.tokens == ["a", "Ã©", "æ¼¢", "Ċ"]
    assert vocabulary.merges == ["Ã ©", "æ ¼", "æ¼ ¢"]


def test_a_tokenizer_that_llama_cpp_does_not_support_is_refused() -> None:
    with pytest.raises(UserError, match="no end-of-text token"):
        vocabulary_of(CharTokenizer("ab"), 2)
    content = json.loads(BPE.to_json())
    content["pre_tokenizer"]["add_prefix_space"] = True
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], {
        "type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
    with pytest.raises(UserError, match="allowed: char, byte, and byte-level BPE that splits words as GPT-2"):
        vocabulary_of(BPETokenizer(json.dumps(content)), 448)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf, which is not installed: pip install gguf"):
        export(checkpoint_of(GPT_SMALL, BPE), "gguf", tmp_path / "model.gguf")
