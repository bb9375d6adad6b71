"""Our Llama is Hugging Face's Llama, Mistral, Mixtral, Qwen 2 and Qwen 3: same logits, gradients, tokens and files."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip
from transformers import (
    LlamaConfig as TheirLlamaConfig,
)

from cleangpt.errors import UserError
from cleangpt.interchange.llama import (
    config_from_huggingface,
    config_to_huggingface,
    from_huggingface,
    names_in_huggingface,
    to_huggingface,
)
from cleangpt.models import build_model
from cleangpt.models.flops import flops_per_token
from cleangpt.models.layers import apply_rope, rope_cos_sin
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.vision import VisionConfig
from tests.generation import greedy
from tests.losses import next_token

SMALL = LlamaConfig(vocab_size=97, max_seq_len=64, n_layers=3, n_heads=4, n_kv_heads=2, dim=48, hidden_dim=80)

SIZES = {
    "vocab_size": 97, "max_position_embeddings": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 48, "intermediate_size": 80,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LONGER = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(TheirLlamaConfig(**SIZES, rope_parameters=PLAIN)),
    "llama_longer": lambda: LlamaForCausalLM(TheirLlamaConfig(**SIZES, rope_parameters=LONGER)),
    "llama_tied": lambda: LlamaForCausalLM(
        TheirLlamaConfig(**SIZES, rope_parameters=LONGER, tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "mistral_without_window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2_windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
    ),
    "qwen3_moe_normalized": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
        )
    ),
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


def random_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.eval()


def read_files(model: PreTrainedModel, folder: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Our configuration and weights, from the files that Hugging Face writes."""
    model.save_pretrained(folder)
    config = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    return config, from_huggingface(config, load_file(folder / "model.safetensors"))


def ours_like(model: PreTrainedModel, folder: Path) -> Llama:
    config, weights = read_files(model, folder)
    ours = Llama(config)
    ours.load_state_dict(weights)
    return ours.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))


# Hugging Face --------------------------------------------------------------------------------------------------------


@pytest.mark.default(4)
@each_kind
def test_logits_and_gradients_are_those_of_hugging_face(kind: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs = random_model(kind)
    ours = ours_like(theirs, tmp_path / "weights")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    ours(tokens).logsumexp(-1).mean().backward()
    theirs(tokens).logits.logsumexp(-1).mean().backward()
    gradients = copy.deepcopy(theirs)
    for parameter, trained in zip(gradients.parameters(), theirs.parameters(), strict=True):
        parameter.data = trained.grad
    for name, gradient in read_files(gradients, tmp_path / "gradients")[1].items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.default(2)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_hugging_face(kind: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    theirs = random_model(kind)
    prompts = tokens[:, :10]
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy(ours_like(theirs, tmp_path), prompts, 20), expected[:, 10:])


@pytest.mark.default(4)
@each_kind
def test_hugging_face_reads_what_we_write(kind: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    config = read_files(random_model(kind), tmp_path / "theirs")[0]
    ours = Llama(config).eval()
    folder = tmp_path / "ours"
    folder.mkdir()
    save_file(to_huggingface(config, ours.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config)))
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)


@each_kind
def test_a_configuration_goes_to_hugging_face_and_back(kind: str, tmp_path: Path) -> None:
    config = read_files(random_model(kind), tmp_path)[0]
    assert config_from_huggingface(json.loads(json.dumps(config_to_huggingface(config)))) == config


@st.composite
def configurations(draw: st.DrawFn) -> LlamaConfig:
    """Any that some kind of model of Hugging Face has."""
    groups, n_kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4)) * 2
    optional: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"tied": True},
                {"sliding_window": 5},
                {"qkv_bias": True, "sliding_window": 5, "global_every": 2},
                {"qk_norm": True},
                {"n_experts": 3},
                {"n_experts": 5, "qk_norm": True, "expert_hidden_dim": 6, "normalize_router_weights": False},
            ]
        )
    )
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 20)),
        max_seq_len=draw(st.integers(1, 64)),
        n_layers=draw(st.integers(2, 4)),
        n_heads=groups * n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        dim=draw(st.integers(1, 24)),
        hidden_dim=draw(st.integers(1, 24)),
        rope_factor=draw(st.sampled_from([None, 4.0])),
        **optional,
    )


@given(configurations())
@settings(max_examples=40)
def test_weights_go_to_hugging_face_and_back_whatever_the_shapes(config: LlamaConfig) -> None:
    model = Llama(config)
    converted = to_huggingface(config, model.state_dict())
    back = from_huggingface(config, converted)
    assert back.keys() == names_in_huggingface(config).keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(tensor.numel() for tensor in converted.values()) == sum(p.numel() for p in model.parameters())
    entries = config_to_huggingface(config)
    assert config_to_huggingface(config_from_huggingface(entries)) == entries


PUBLISHED = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336,
    "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def test_the_published_configuration_of_llama_3_1_is_read() -> None:
    config = config_from_huggingface(PUBLISHED)
    assert config == LlamaConfig(
        vocab_size=128256, max_seq_len=131072, n_layers=32, n_heads=32, n_kv_heads=8, dim=4096, hidden_dim=14336,
        rope_factor=8.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; allowed: llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; allowed: False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; allowed: default, llama3"),
        ({"hidden_size": "4096"}, "model.dim is '4096'; allowed: a whole number"),
        ({"num_key_value_heads": 5}, "model.n_kv_heads is 5; allowed: a divisor of model.n_heads, which is 32"),
        (
            {
                "model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8,
                "max_window_layers": 2,
            },
            "layers [1, 2] have full attention; allowed: none, or every n-th",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_ours_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        config_from_huggingface(PUBLISHED | changes)
    assert message in str(refusal.value)


def test_a_tensor_that_is_missing_is_named() -> None:
    weights = to_huggingface(SMALL, Llama(SMALL).state_dict())
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'"):
        from_huggingface(SMALL, weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "model.qk_norm and model.qkv_bias"),
        ({"n_experts": 4, "bias_update_rate": 0.001}, "model.bias_update_rate and model.n_experts"),
        ({"activation": "relu2"}, "model.activation"),
        ({"value_residual": True}, "model.value_residual"),
        ({"logit_soft_cap": 30.0}, "model.logit_soft_cap"),
        ({"separator": 0}, "model.separator"),
        ({"ngrams": (2,)}, "model.ngrams"),
    ],
)
def test_what_hugging_face_does_not_have_is_refused_in_one_line(changes: dict[str, Any], named: str) -> None:
    config = replace(SMALL, **changes)
    with pytest.raises(UserError, match=f"no model with {named}; allowed"):
        config_to_huggingface(config)
    with pytest.raises(UserError, match=f"no model with {named}; allowed"):
        to_huggingface(config, Llama(config).state_dict())


# The model by itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ({"n_layers": 32, "n_heads": 32, "dim": 4096, "hidden_dim": 14336}, 8_030_261_248),
        pytest.param(
            {"n_layers": 80, "n_heads": 64, "dim": 8192, "hidden_dim": 28672}, 70_553_706_496, marks=pytest.mark.slow
        ),
        pytest.param(
            {"n_layers": 126, "n_heads": 128, "dim": 16384, "hidden_dim": 53248},
            405_853_388_800,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_llama_3_1_has_its_published_sizes(shape: dict[str, int], parameters: int) -> None:
    config = LlamaConfig(vocab_size=128256, max_seq_len=131072, n_kv_heads=8, rope_factor=8.0, **shape)
    with torch.device("meta"):
        model = build_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.default(1)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "ngrams": (2, 3)},
        {"activation": "relu2", "ngrams": (3,)},
        {"value_residual": True, "logit_soft_cap": 30.0, "separator": 0},
    ],
)
def test_the_flops_are_those_that_pytorch_counts(changes: dict[str, Any]) -> None:
    """The counter takes attention for bidirectional, as PaLM does."""
    with torch.device("meta"):
        model = Llama(replace(SMALL, **changes))
        tokens = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert flops_per_token(model, 64) * tokens.numel() == counter.get_total_flops()


def test_a_window_saves_flops() -> None:
    """Of four layers, the second and the fourth see all 64 tokens, the others 16."""
    config = replace(SMALL, n_layers=4, sliding_window=16, global_every=2)
    saved = Llama(replace(SMALL, n_layers=4)).flops_per_token(64) - Llama(config).flops_per_token(64)
    assert saved == 12 * config.dim * 2 * (64 - 16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "qk_norm": True, "head_dim": 24},
        {"sliding_window": 8, "global_every": 2},
        {"n_experts": 6, "experts_per_token": 3, "expert_hidden_dim": 40, "n_shared_experts": 2},
        {"n_experts": 6, "n_shared_experts": 1, "activation": "relu2", "bias_update_rate": 0.1},
        {"activation": "relu2", "value_residual": True, "logit_soft_cap": 30.0},
        {"separator": 7, "sliding_window": 8, "global_every": 2},
    ],
)
@pytest.mark.parametrize(("batch", "seq_len"), [(2, 16), (3, 64)])
def test_estimated_activations_are_those_that_autograd_keeps(changes: dict[str, Any], batch: int, seq_len: int) -> None:
    """Counts the bytes of every tensor saved for the backward pass, each storage once, weights left out."""
    model = Llama(replace(SMALL, vocab_size=300, n_layers=4, **changes))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(300, (batch, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token(model, tokens, tokens)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert abs(model.activation_bytes(batch, seq_len) / measured - 1) < 0.02
    loss.backward()


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 5}, {"n_experts": 4}, {"separator": 20, "value_residual": True}]
)
def test_no_position_sees_a_later_one(changes: dict[str, Any], tokens: torch.Tensor) -> None:
    model = Llama(replace(SMALL, **changes)).eval()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])


@pytest.mark.parametrize(("global_every", "far"), [(None, 3 * 4), (3, 20)])
def test_a_window_ends_what_a_position_sees(global_every: int | None, far: int, tokens: torch.Tensor) -> None:
    """Three layers of window 5 reach 12 tokens back; with a global layer among them, all the way."""
    model = Llama(replace(SMALL, sliding_window=5, global_every=global_every)).eval()
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    differs = (model(tokens) != model(changed)).any(dim=-1).any(dim=0)
    assert differs[far] and differs[far + 1 :].any() == (global_every is not None)


def test_only_distances_matter() -> None:
    """Rotary positions: a sequence gives the same attention wherever it stands (Su et al. 2021, equation 16)."""
    query, key = torch.randn(2, 1, 8, 1, 12).unbind()
    scores = []
    for start in (0, 31):
        rotation = rope_cos_sin(torch.arange(start, start + 8), SMALL.rope_frequencies(torch.device("cpu")))
        scores.append(apply_rope(query, rotation)[:, :, 0] @ apply_rope(key, rotation)[:, :, 0].mT)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_the_model_reads_is_refused() -> None:
    model = Llama(SMALL)
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 97)
    with pytest.raises(ValueError, match="65 tokens; this model reads at most 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_initial_values_depend_on_name_and_shape_alone() -> None:
    model = Llama(replace(SMALL, n_layers=8, dim=256, hidden_dim=512, qkv_bias=True, qk_norm=True))
    for name, parameter in model.named_parameters():
        assert "norm" not in name or torch.equal(parameter, torch.ones_like(parameter)), name
        assert "bias" not in name or not parameter.any(), name
        torch.manual_seed(1)
        expected = torch.empty_like(parameter)
        model.init_parameter(name, expected)
        torch.manual_seed(1)
        model.init_parameter(name, parameter)
        assert torch.equal(parameter, expected), name
    assert abs(model.blocks[0].mlp.down.weight.std().item() - 0.02 / 4) < 1e-4
    assert abs(model.blocks[0].attention.out.weight.std().item() - 0.02 / 4) < 1e-4
    assert abs(model.blocks[0].mlp.up.weight.std().item() - 0.02) < 2e-4
    assert not list(model.buffers())


def test_the_first_loss_is_that_of_a_uniform_guess(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    loss = next_token(Llama(SMALL), tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert abs(loss.item() - torch.log(torch.tensor(97.0)).item()) < 0.1


def test_the_tensor_plan_names_every_module_with_weights() -> None:
    """An encoder of images is one entry, since it is not cut."""
    vision = VisionConfig(encoder="linear", height=8, width=8, patch_size=4)
    model = Llama(replace(SMALL, qk_norm=True, ngrams=(2,), vision=vision))
    patterns = {
        ".".join("*" if part.isdigit() else part for part in name.rsplit(".", 1)[0].split("."))
        for name, _ in model.named_parameters()
    }
    assert {"vision" if pattern.startswith("vision.") else pattern for pattern in patterns} == set(Llama.tensor_plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "model.n_kv_heads is 3; allowed: a divisor of model.n_heads, which is 4"),
        ({"dim": 44}, "model.dim is 44; allowed without model.head_dim: an even multiple of model.n_heads, which is 4"),
        (
            {"n_experts": 2, "experts_per_token": 3},
            "model.experts_per_token is 3; allowed: at most model.n_experts, which is 2",
        ),
        ({"bias_update_rate": 0.001}, "model.bias_update_rate is 0.001; allowed without model.n_experts: None"),
        ({"ngrams": (2, 2)}, "model.ngrams is (2, 2); allowed: different whole numbers from 2 to 16"),
        ({"ngrams": (1,)}, "model.ngrams is (1,); allowed: different whole numbers from 2 to 16"),
        ({"separator": 97}, "model.separator is 97; allowed: less than model.vocab_size, which is 97"),
        (
            {"rope_low_freq_factor": 4.0},
            "model.rope_low_freq_factor is 4.0; allowed: less than model.rope_high_freq_factor, which is 4.0",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        Llama(replace(SMALL, **changes))
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 7},
        {"sliding_window": 0},
        {"rope_factor": 0.5},
        {"norm_eps": 0.0},
        {"n_shared_experts": -1},
        {"bias_update_rate": 0.0},
        {"activation": "gelu"},
        {"logit_soft_cap": 0.0},
        {"dropout": 1.0},
        {"ngram_dropout": 1.0},
        {"separator": -1},
    ],
)
def test_a_field_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(UserError, match=rf"model\.{name} is .*; allowed: "):
        replace(SMALL, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.torture),
        pytest.param({"sliding_window": 5, "tied": True, "qk_norm": True}, marks=pytest.mark.torture),
        {"separator": 7, "value_residual": True, "activation": "relu2", "logit_soft_cap": 30.0, "ngrams": (2, 3)},
    ],
)
def test_it_compiles_into_one_graph(changes: dict[str, Any], tokens: torch.Tensor) -> None:
    model = Llama(replace(SMALL, **changes))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    next_token(compiled, tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
