"""A reward model goes out as a sequence classifier of Transformers with the same scores, and comes back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.config import ModelConfig
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.errors import UserError
from cleangpt.inference.rewards import RewardScorer
from cleangpt.interchange.export import export
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

CPU = torch.device("cpu")
SIZES = {"max_seq_len": 64, "n_layers": 2, "n_heads": 4, "dim": 32, "vocab_size": 257}
CONFIGS: dict[str, ModelConfig] = {
    "GPT2": GPTConfig(**SIZES),  # type: ignore[arg-type]
    "Llama": LlamaConfig(**SIZES, n_kv_heads=2, hidden_dim=48),  # type: ignore[arg-type]
    "Qwen3": LlamaConfig(**SIZES, n_kv_heads=2, hidden_dim=48, qk_norm=True, tied=True),  # type: ignore[arg-type]
}
TEXTS = [[1, 2, 3, 256], [7], list(range(40, 90)), [5, 5, 256]]


def reward_model(config: ModelConfig) -> Checkpoint:
    torch.manual_seed(0)
    model = build_model(config, {"reward"})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return Checkpoint(Path("somewhere"), config, ByteTokenizer(), dict(model.state_dict()), {})


def scores(checkpoint: Checkpoint) -> torch.Tensor:
    return RewardScorer(checkpoint.model(CPU), CPU).scores(TEXTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    checkpoint = reward_model(CONFIGS[name])
    export(checkpoint, "hf", tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == f"{name}ForSequenceClassification" and theirs.config.num_labels == 1
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([text])).logits[:, 0] for text in TEXTS])
    torch.testing.assert_close(scores(checkpoint), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_it_comes_back_with_the_same_scores(name: str, tmp_path: Path) -> None:
    """Also as Transformers saves it itself."""
    checkpoint = reward_model(CONFIGS[name])
    export(checkpoint, "hf", tmp_path / "out")
    assert torch.equal(scores(open_checkpoint(f"hf:{tmp_path / 'out'}")), scores(checkpoint))
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / file).write_text((tmp_path / "out" / file).read_text())
    assert torch.equal(scores(open_checkpoint(f"hf:{tmp_path / 'theirs'}")), scores(checkpoint))


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    export(reward_model(CONFIGS["GPT2"]), "hf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(3, 1)
    save_file(weights, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"score.weight has 3 rows; allowed: 1"):
        open_checkpoint(f"hf:{tmp_path / 'out'}")


def test_a_model_without_such_a_head_is_exported_as_before(tmp_path: Path) -> None:
    config = CONFIGS["GPT2"]
    plain = Checkpoint(Path("somewhere"), config, ByteTokenizer(), dict(build_model(config).state_dict()), {})
    export(plain, "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    with pytest.raises(UserError, match="no head for rewards"):
        RewardScorer(plain.model(CPU), CPU)
