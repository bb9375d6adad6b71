"""Models of Hugging Face come in with the same logits, and ours go out so that its own classes give the same."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import LlamaConfig as TheirLlamaConfig

from cleangpt import hub
from cleangpt.checkpoints.checkpoint import Checkpoint, best_checkpoint, config_mismatches, load_matching_weights
from cleangpt.commands import main
from cleangpt.config import ModelConfig
from cleangpt.corpora.text import Text
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.interchange.export import export
from cleangpt.interchange.gpt import config_from_huggingface
from cleangpt.interchange.huggingface import MODEL_TYPES, open_checkpoint
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.trainer import Trainer
from tests.forked import run_together

TEXT = "To be, or not to be: that is the question. 12 + 34 = 46\n"
BPE = train_bpe([TEXT * 20], 300)
CPU = torch.device("cpu")
SIZES = {"max_seq_len": 64, "n_layers": 2, "n_heads": 4, "dim": 32, "vocab_size": 320}
GPT_SMALL = GPTConfig(**SIZES)  # type: ignore[arg-type]
LLAMA_SMALL = LlamaConfig(**SIZES, n_kv_heads=2, hidden_dim=48)  # type: ignore[arg-type]


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Large enough that a mistake anywhere changes the logits."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


def checkpoint_of(config: ModelConfig, tokenizer: Tokenizer = BPE) -> Checkpoint:
    model = random_weights(build_model(config))
    return Checkpoint(Path("somewhere"), config, tokenizer, dict(model.state_dict()), {})


def their_gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=BPE.vocab_size, n_positions=64, n_layer=2, n_head=4, n_embd=32)
    return random_weights(GPT2LMHeadModel(config))


def their_llama() -> PreTrainedModel:
    config = TheirLlamaConfig(
        vocab_size=BPE.vocab_size, max_position_embeddings=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_size=32, intermediate_size=48,
    )  # fmt: skip
    return random_weights(LlamaForCausalLM(config))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Saves a model and the tokenizer as Hugging Face does."""

    def save(model: PreTrainedModel, **options: str) -> Path:
        model.save_pretrained(tmp_path / "theirs", **options)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=BPE._tokenizer, eos_token="<|endoftext|>")
        tokenizer.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return save


# In ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [their_gpt2, their_llama])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20kB"}], ids=["one file", "shards"])
def test_a_saved_model_has_the_same_logits_here(
    saved: Callable[..., Path], make: Callable[[], PreTrainedModel], options: dict[str, str]
) -> None:
    model = make()
    folder = saved(model, **options)
    assert (folder / "model.safetensors.index.json").exists() == bool(options)
    checkpoint = open_checkpoint(f"hf:{folder}")
    tokens = torch.from_numpy(checkpoint.tokenizer.encode(TEXT))[None]
    torch.testing.assert_close(checkpoint.model(CPU)(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert checkpoint.tokenizer.decode(tokens[0].tolist()) == TEXT


def test_weights_without_the_prefix_and_with_buffers_are_read_as_gpt2_was_released(saved: Callable[..., Path]) -> None:
    folder = saved(their_gpt2())
    expected = open_checkpoint(f"hf:{folder}").weights
    weights = load_file(folder / "model.safetensors")
    released = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(released | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, folder / "model.safetensors")
    found = open_checkpoint(f"hf:{folder}").weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; allowed: gpt2, llama, mistral"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; allowed: gelu_new, gelu_pytorch_tanh"),
        ({"add_cross_attention": True}, "add_cross_attention is True; allowed: False"),
        ({"tie_word_embeddings": False}, "the weights have no 'lm_head.weight'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "config.json has a quantization_config; allowed: none"),
        ({"n_layer": 3}, "the weights have no 'transformer.h.2.ln_1.weight'"),
        ({"n_layer": "many"}, "n_layers is 'many'"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_entry_named(
    saved: Callable[..., Path], entries: dict[str, object], message: str
) -> None:
    folder = saved(their_gpt2())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(UserError) as refused:
        open_checkpoint(f"hf:{folder}")
    assert message in str(refused.value) and str(folder) in str(refused.value)


KINDS_READ = ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
SMALL_GPT2: dict[str, Any] = {"n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 48}
SMALL_REST: dict[str, Any] = {
    "max_position_embeddings": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "sliding_window": 8, "max_window_layers": 0,
    "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rms_norm_eps": 1e-3,
    "rope_theta": 100.0, "norm_topk_prob": True, "tie_word_embeddings": True, "use_sliding_window": True,
}  # fmt: skip
"""Entries of a small model; each `model_type` takes those that it knows."""
CHOICES = [("gpt2", name) for name in SMALL_GPT2]
CHOICES += [(kind, name) for kind in KINDS_READ[1:] for name in (*SMALL_REST, "nothing")]


def entries_of(kind: str) -> dict[str, Any]:
    small = SMALL_GPT2 if kind == "gpt2" else SMALL_REST
    return {"model_type": kind, "vocab_size": BPE.vocab_size, **small}


@pytest.mark.parametrize(("kind", "left_out"), CHOICES)
def test_an_entry_that_is_left_out_is_what_transformers_takes_for_it(kind: str, left_out: str) -> None:
    """Every field of the configuration that one entry less changes is that of Transformers' class."""
    entries = entries_of(kind)
    entries.pop(left_out, None)
    if left_out == "num_key_value_heads":
        entries["num_attention_heads"] = 32  # the defaults divide it
    theirs = CONFIG_MAPPING[kind].from_dict(entries)
    ours = MODEL_TYPES[kind].config_from_huggingface(entries)
    if isinstance(ours, GPTConfig):
        assert (ours.n_layers, ours.n_heads, ours.dim, ours.max_seq_len) == (
            theirs.n_layer, theirs.n_head, theirs.n_embd, theirs.n_positions,
        )  # fmt: skip
        return
    assert isinstance(ours, LlamaConfig)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    rope = theirs.rope_parameters
    assert (ours.n_layers, ours.n_heads, ours.num_kv_heads, ours.dim, ours.mlp_size, ours.head_size) == (
        theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads, theirs.hidden_size,
        theirs.intermediate_size, head_dim,
    )  # fmt: skip
    assert (ours.max_seq_len, ours.norm_eps, ours.tied, ours.rope_theta) == (
        theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.tie_word_embeddings, rope["rope_theta"],
    )  # fmt: skip
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = None if kind == "llama" else theirs.sliding_window
    assert ours.windows() == [window if name == "sliding_attention" else None for name in types]
    if ours.n_experts is not None:
        assert (ours.n_experts, ours.experts_per_token) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    if kind == "qwen3_moe":
        assert (ours.expert_size, ours.normalize_router_weights) == (
            theirs.moe_intermediate_size, theirs.norm_topk_prob,
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_READ)
def test_what_transformers_saves_has_the_same_logits_here(saved: Callable[..., Path], kind: str) -> None:
    """`save_pretrained` leaves out most entries that have the default of their class."""
    entries = entries_of(kind)
    model = random_weights(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(entries)))
    tokens = torch.from_numpy(BPE.encode(TEXT))[None]
    ours = open_checkpoint(f"hf:{saved(model)}").model(CPU)
    torch.testing.assert_close(ours(tokens), model(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("their_name", "our_name"),
    [("num_attention_heads", "n_head"), ("hidden_size", "n_embd"), ("max_position_embeddings", "n_positions")],
)
def test_an_entry_of_gpt2_may_have_its_other_name(their_name: str, our_name: str) -> None:
    entries = entries_of("gpt2")
    renamed = {their_name if name == our_name else name: value for name, value in entries.items()}
    assert config_from_huggingface(renamed) == config_from_huggingface(entries)


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True; allowed: False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True; allowed: False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; allowed: 1"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; allowed: 1"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear'; allowed: default, llama3",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "config.json has no 'factor' for rope_type 'llama3'"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu' or 'swish'"),
        ("mistral", {"quantization_config": {"quant_method": "awq"}}, "has a quantization_config; allowed: none"),
        ("mixtral", {"compression_config": {"format": "int"}}, "has a compression_config; allowed: none"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]; allowed: None or []"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; allowed: 1"),
    ],
)
def test_what_changes_the_meaning_of_weights_is_refused(
    kind: str, entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries_of(kind) | entries))
    with pytest.raises(UserError) as refused:
        open_checkpoint(f"hf:{tmp_path}")
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "extra", "message"),
    [
        (their_llama, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "self_attn.q_proj.bias', which"),
        (their_llama, {"model.layers.1.mlp.up_proj.weight_scale": torch.ones(1)}, "up_proj.weight_scale', which a"),
        (their_llama, {"score.weight": torch.ones(2, 32)}, "have 'score.weight', which a model with this config.json"),
        (their_llama, {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}, "'model.layers.2.mlp.up_proj.weight'"),
        (their_gpt2, {"lm_head.weight": torch.ones(320, 32)}, "'lm_head.weight', which a model with this config.json"),
        (their_gpt2, {"v_head.weight": torch.ones(1, 32)}, "have 'v_head.weight'"),
        (
            their_gpt2, {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.float8_e4m3fn)},
            "transformer.ln_f.bias is stored as torch.float8_e4m3fn; allowed: floats of 16 bits or more",
        ),
        (their_gpt2, {"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, "is stored as torch.int8; allowed"),
    ],
)  # fmt: skip
def test_weights_that_nothing_uses_as_they_are_are_refused(
    saved: Callable[..., Path], make: Callable[[], PreTrainedModel], extra: dict[str, torch.Tensor], message: str
) -> None:
    folder = saved(make())
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    with pytest.raises(UserError) as refused:
        open_checkpoint(f"hf:{folder}")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_tied_head_that_is_saved_as_well_is_read(saved: Callable[..., Path]) -> None:
    folder = saved(their_gpt2())
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    assert "head.weight" not in open_checkpoint(f"hf:{folder}").weights


# GPT-2's relatives ---------------------------------------------------------------------------------------------------

RELATIVES: dict[str, dict[str, Any]] = {
    "Cerebras-GPT": {"activation_function": "gelu", "n_inner": 128},
    "Stanford's Mistral": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "unscaled but by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "narrow MLP": {"n_inner": 48, "activation_function": "relu"},
    "other epsilon": {"layer_norm_epsilon": 0.1, "activation_function": "swish"},
    **{name: {"activation_function": name} for name in ("gelu_fast", "gelu_pytorch_tanh", "gelu_python", "silu")},
}


@pytest.mark.default(4)
@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_of_gpt2_has_the_same_logits_here_and_back_there(
    saved: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=BPE.vocab_size, n_positions=64, n_layer=2, n_head=4, n_embd=32, **RELATIVES[name])
    theirs = random_weights(GPT2LMHeadModel(config))
    checkpoint = open_checkpoint(f"hf:{saved(theirs)}")
    tokens = torch.from_numpy(BPE.encode(TEXT))[None]
    logits, ours = theirs(tokens).logits, checkpoint.model(CPU)
    torch.testing.assert_close(ours(tokens), logits, atol=1e-3, rtol=1e-3)
    cache = ours.new_cache()
    steps = [ours(part, cache=cache) for part in tokens.split([9, *[1] * (tokens.shape[1] - 9)], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-3, rtol=1e-3)
    export(checkpoint, "hf", tmp_path / "back")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits, logits)
    assert open_checkpoint(str(tmp_path / "back")).config == checkpoint.config


def test_pickled_weights_are_never_read(saved: Callable[..., Path]) -> None:
    folder = saved(their_gpt2())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is no model\.safetensors; only safetensors are read"):
        open_checkpoint(f"hf:{folder}")


def test_an_index_that_points_out_of_the_folder_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved(their_gpt2())
    shutil.move(folder / "model.safetensors", folder.parent / "stolen.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../stolen.safetensors"}}))
    with pytest.raises(UserError, match=r"there is no \.\./stolen"):
        open_checkpoint(f"hf:{folder}")


def test_damaged_weights_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved(their_gpt2())
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        open_checkpoint(f"hf:{folder}")


# Downloads -----------------------------------------------------------------------------------------------------------


def test_a_name_is_downloaded_without_any_file_that_could_run_code(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, asked = saved(their_gpt2()), {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("hf:gpt2").config.max_seq_len == 64
    (patterns,) = asked.values()
    assert all(pattern.endswith((".json", ".safetensors", "merges.txt", ".jinja")) for pattern in patterns)
    assert load_tokenizer(Path("hf:owner/name")).vocab_size == BPE.vocab_size and "owner/name" in asked


def test_without_a_network_one_line_says_which_files_to_put_where(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert main(["sample", "hf:gpt2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no route to host" in error and "much more" not in error
    assert "config.json, model.safetensors and tokenizer.json" in error and "hf:FOLDER" in error


@pytest.mark.parametrize("text", ["hf:", "hf:/nowhere/at/all", "hf:./nothing", "hf:a/b/c"])
def test_an_invalid_name_is_refused_without_a_request(text: str, workplace: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        hub.fetch(text)


# Starting a run ------------------------------------------------------------------------------------------------------


def experiment_of(folder: Path, tiny: Callable[..., Experiment], **fields: object) -> Experiment:
    """A run on a text, with the tokenizer of a folder."""
    Path("text.txt").write_text(TEXT * 100, encoding="utf-8")
    corpus = Text(files=("text.txt",), tokenizer_file=f"hf:{folder}", val_fraction=0.2)
    model = GPTConfig(max_seq_len=64, n_layers=2, n_heads=4, dim=32)
    return tiny(corpus=corpus, model=model, data__seq_len=32, init_from=f"hf:{folder}", **fields)


def said(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8")


def test_a_run_starts_from_the_weights_and_with_the_tokenizer(
    saved: Callable[..., Path], tiny: Callable[..., Experiment], trainer: Callable[[Experiment], Trainer]
) -> None:
    theirs = their_gpt2()
    folder = saved(theirs)
    started = trainer(experiment_of(folder, tiny))
    tokens = torch.from_numpy(started.checkpoints.tokenizer.encode(TEXT))[None, :20]
    torch.testing.assert_close(started.model.eval()(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert "starting from the weights" in said(started.run)
    assert "rows" not in said(started.run) and "tokenizer" not in said(started.run)


@pytest.mark.parametrize("length", [48, 96])
def test_additional_tokens_and_positions_are_initialized_and_logged(
    saved: Callable[..., Path], tiny: Callable[..., Experiment], trainer: Callable[[Experiment], Trainer], length: int
) -> None:
    theirs = their_gpt2()
    folder = saved(theirs)
    started = trainer(experiment_of(folder, tiny, model__vocab_size=512, model__max_seq_len=length))
    tokens = torch.from_numpy(started.checkpoints.tokenizer.encode(TEXT))[None, :20]
    logits = started.model.eval()(tokens)[..., : BPE.vocab_size]
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert f"token_embedding.weight takes {BPE.vocab_size} of {BPE.vocab_size} rows" in said(started.run)
    assert f"position_embedding.weight takes {min(length, 64)} of 64 rows" in said(started.run)


PADDED = """
from cleangpt.config import *
from cleangpt.corpora.text import Text
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="padded",
    corpus=Text(files=("text.txt",), tokenizer_file="hf:theirs", val_fraction=0.2),
    data=DataConfig(seq_len=32, batch_size=8),
    model=GPTConfig(vocab_size=512, max_seq_len=96, n_layers=2, n_heads=4, dim=32),
    optimizer=OptimizerConfig(lr=1e-3),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=2, device="cpu", threads=1),
    tracking=TrackingConfig(progress=False, sample_tokens=0),
    init_from="hf:theirs",
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_a_sharded_model_starts_as_an_unsharded_one_does(
    strategy: str, saved: Callable[..., Path], workplace: Path
) -> None:
    saved(their_gpt2())
    Path("padded.py").write_text(PADDED, encoding="utf-8")
    Path("text.txt").write_text(TEXT * 100, encoding="utf-8")
    assert main(["train", "padded.py", "--run-dir", "single"]) == 0
    outcome = run_together(2, "train", "padded.py", "--run-dir", "cut", "--parallel.strategy", strategy)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (single,), (cut,) = read_metrics(Path("single")), read_metrics(Path("cut"))
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert cut[name] == pytest.approx(single[name], rel=1e-4), name
    assert "token_embedding.weight takes" in said(Path("cut"))


SMALL_SHAKESPEARE = [
    "train", "gpt2_shakespeare", "--run-dir", "run", "--init-from", "hf:theirs", "--corpus.tokenizer-file", "hf:theirs",
    "--corpus.file", "text.txt", "--model.vocab-size", "None", "--model.n-layers", "2", "--model.n-heads", "4",
    "--model.dim", "32", "--model.max-seq-len", "64", "--data.seq-len", "32", "--training.macro-batches", "2",
    "--training.micro-batch-size", "None", "--training.device", "cpu", "--tracking.no-progress", "--model.dropout", "0",
]  # fmt: skip


@pytest.fixture
def shakespeare(saved: Callable[..., Path], workplace: Path) -> PreTrainedModel:
    """A small GPT-2 in the folder `theirs`, and a text."""
    theirs = their_gpt2()
    saved(theirs)
    Path("text.txt").write_text(TEXT * 200, encoding="utf-8")
    return theirs


@pytest.mark.slow
def test_the_experiment_of_gpt2_starts_from_a_folders_weights_and_tokenizer(
    shakespeare: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL_SHAKESPEARE, "--fine-tuning.freeze", "token_embedding.*", "blocks.0.*"]) == 0
    log = said(Path("run"))
    assert (
        "starting from the weights of theirs" in log and "initial values" not in log and "tokenizer is not" not in log
    )
    ended, began = open_checkpoint("run").weights, open_checkpoint("hf:theirs").weights
    frozen = {name for name, weight in began.items() if torch.equal(weight, ended[name])}
    assert frozen == {name for name in began if name.startswith(("token_embedding.", "blocks.0."))}
    assert main(["sample", "run", "--prompt", "To be", "--max-new-tokens", "8", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_an_exported_model_is_the_base_of_hugging_face_with_the_adapters_added_there(
    shakespeare: PreTrainedModel,
) -> None:
    """The adapters of the checkpoint are added to Hugging Face's own tensors, by Hugging Face's names."""
    assert main([*SMALL_SHAKESPEARE, "--fine-tuning.lora.rank", "2", "--optimizer.lr", "0.05"]) == 0
    assert main(["export", "run", "--out", "exported"]) == 0
    exported = AutoModelForCausalLM.from_pretrained("exported")
    tokens = torch.arange(20)[None]
    before = shakespeare(tokens).logits
    adapters = load_file(best_checkpoint(Path("run")) / "adapters.safetensors")
    parts = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    with torch.no_grad():
        for layer in range(2):
            for ours, name in parts.items():
                a, b = (adapters[f"blocks.{layer}.{ours}.lora.{part}"] for part in "ab")
                shakespeare.get_parameter(f"transformer.h.{layer}.{name}.weight").add_((16 / 2) * (b @ a).T)
            a, b = (adapters[f"blocks.{layer}.attention.qkv.lora.{part}"] for part in "ab")
            by_head = (8 * b @ a).view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32)
            shakespeare.get_parameter(f"transformer.h.{layer}.attn.c_attn.weight").add_(by_head.T)
    after = shakespeare(tokens).logits
    torch.testing.assert_close(exported(tokens).logits, after, atol=1e-3, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("local", [[], ["--init-from", "hf:theirs"]], ids=["weights", "tokenizer"])
def test_without_a_network_the_experiment_of_gpt2_says_in_one_line_what_is_missing(
    shakespeare: PreTrainedModel, local: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def fail(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert main(["train", "gpt2_shakespeare", "--corpus.file", "text.txt", "--run-dir", "run", *local]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: cannot download 'gpt2' from Hugging Face (no route to host); without a network, put"
    )
    assert not Path("run").exists()


def test_token_rows_are_loaded_only_for_the_same_tokens() -> None:
    small, large = build_model(GPT_SMALL), build_model(replace(GPT_SMALL, vocab_size=330))
    before = large.state_dict()["token_embedding.weight"].clone()
    lines = load_matching_weights(large, small.state_dict(), same_tokens=False)
    assert torch.equal(large.state_dict()["token_embedding.weight"], before)
    assert lines == [
        "token_embedding.weight has shape (320, 32) in the checkpoint; it keeps its initial values, shape (330, 32)"
    ]
    load_matching_weights(large, small.state_dict(), same_tokens=True)
    assert torch.equal(large.state_dict()["token_embedding.weight"][:320], small.state_dict()["token_embedding.weight"])
    assert torch.equal(large.state_dict()["token_embedding.weight"][320:], before[320:])


def test_fields_that_shapes_do_not_show_are_compared() -> None:
    assert config_mismatches(GPT_SMALL, replace(GPT_SMALL, vocab_size=9, max_seq_len=9, dropout=0.1)) == []
    assert config_mismatches(GPT_SMALL, replace(GPT_SMALL, n_heads=2)) == [
        "model.n_heads is 2; in the checkpoint it is 4"
    ]
    assert config_mismatches(LLAMA_SMALL, GPT_SMALL) == ["the checkpoint is of LlamaConfig, the model of GPTConfig"]


def test_a_model_of_hugging_face_is_sampled_from(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = their_gpt2()
    folder = saved(theirs)
    assert main(["sample", f"hf:{folder}", "--prompt", "To be", "--temperature", "0", "--max-new-tokens", "5"]) == 0
    ours = capsys.readouterr().out
    tokens = torch.from_numpy(BPE.encode("To be"))[None]
    for _ in range(5):
        tokens = torch.cat([tokens, theirs(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert ours == BPE.decode(tokens[0].tolist()) + "\n"


# Out -----------------------------------------------------------------------------------------------------------------

KINDS = {
    "gpt2": GPT_SMALL,
    "gpt2 without biases": replace(GPT_SMALL, bias=False),
    "gpt2, untied": replace(GPT_SMALL, tied=False, hidden_dim=48, activation="gelu", scale_attention_by_layer=True),
    "llama": LLAMA_SMALL,
    "llama 3.1, tied": replace(LLAMA_SMALL, tied=True, rope_factor=8.0, rope_original_seq_len=16),
    "mistral": replace(LLAMA_SMALL, sliding_window=8),
    "mixtral": replace(LLAMA_SMALL, n_experts=4),
    "qwen3": replace(LLAMA_SMALL, qk_norm=True),
    "qwen3_moe": replace(LLAMA_SMALL, qk_norm=True, n_experts=4, expert_hidden_dim=16, normalize_router_weights=False),
}


@pytest.mark.default(4)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_has_the_same_logits_and_ids_there(kind: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(KINDS[kind])
    export(checkpoint, "hf", tmp_path / "out")
    model, tokenizer = (cls.from_pretrained(tmp_path / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.encode(TEXT)
    assert ids == BPE.encode(TEXT).tolist() and tokenizer.decode(ids) == TEXT
    tokens = torch.tensor([ids])
    torch.testing.assert_close(model(tokens).logits, checkpoint.model(CPU)(tokens), atol=1e-4, rtol=1e-4)
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer.eos_token_id == BPE.eos_id


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "biases" not in kind])
def test_an_exported_model_is_read_back_unchanged(kind: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(KINDS[kind])
    export(checkpoint, "hf", tmp_path / "out")
    back = open_checkpoint(str(tmp_path / "out"))
    assert back.config == KINDS[kind]
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in checkpoint.weights.items())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("".join(sorted({*TEXT, "\0"})), "\0")])
def test_the_other_tokenizers_have_the_same_ids_and_text_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(checkpoint_of(GPT_SMALL, tokenizer), "hf", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(theirs.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        (replace(LLAMA_SMALL, qkv_bias=True), BPE, "Qwen's own"),
        (replace(LLAMA_SMALL, n_experts=4, n_shared_experts=1), BPE, "Hugging Face has no model with"),
        (ModelConfig(vocab_size=9, max_seq_len=9), BPE, "a model of ModelConfig cannot be exported; allowed: GPT"),
    ],
)
def test_what_transformers_does_not_support_is_refused(
    config: ModelConfig, tokenizer: Tokenizer, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(Checkpoint(tmp_path, config, tokenizer, {"a": torch.ones(1)}, {}), "hf", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_qwen_2_with_bytes_is_exported(tmp_path: Path) -> None:
    export(checkpoint_of(replace(LLAMA_SMALL, qkv_bias=True), ByteTokenizer()), "hf", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(TEXT) == list(TEXT.encode())
