"""The contract of an architecture: what a subclass gets for two methods, and what it may add."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.config import ModelConfig
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.errors import UserError
from cleangpt.models import MODELS, build_model, model_class
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig

SIZE: dict[str, Any] = {"vocab_size": 257, "max_seq_len": 8, "n_layers": 2, "n_heads": 2, "dim": 16}
CONFIGS = [GPTConfig(**SIZE), LlamaConfig(**SIZE, hidden_dim=24)]
each_model = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
TOKENS = torch.arange(12).view(2, 6)


class Minimal(LanguageModel):
    """An embedding and a head: all that an architecture needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(16, 4)
        self.head = nn.Linear(4, 16)
        self.reset_parameters()

    def features(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def to_logits(self, features: Tensor) -> Tensor:
        return self.head(features)

    def head_parameters(self) -> list[Tensor]:
        return list(self.head.parameters())


class Colored(Minimal):
    """Reads a color besides each token."""

    inputs = frozenset({"color"})

    def features(self, tokens: Tensor, *, color: Tensor) -> Tensor:
        return self.embedding(tokens) + color[..., None]


MINIMAL = ModelConfig(vocab_size=16, max_seq_len=8)


# Defaults -------------------------------------------------------------------------------------------------------------


def test_two_methods_give_logits_scores_and_logits_at_some_positions() -> None:
    model = Minimal(MINIMAL)
    logits = model(TOKENS)
    assert logits.shape == (2, 6, 16)
    positions = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(model(TOKENS, logit_positions=positions), logits[torch.arange(2)[:, None], positions])
    scores = model(TOKENS, targets=TOKENS)
    torch.testing.assert_close(scores.logprobs, logits.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0])


def test_what_is_optional_has_defaults() -> None:
    model = Minimal(MINIMAL)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert flops_per_token(model, 8) == model.flops_per_token(8) == 6 * parameters
    assert model.activation_bytes(1, 8) == 0
    assert model.new_cache() is None
    assert len(model.layers()) == 0
    assert model.attention_heads() == model.tensor_plan == {}
    assert model.stacked_matrices("embedding.weight") == 1
    assert model.inputs == frozenset()


def test_initial_values_are_those_of_gpt2() -> None:
    """Section 2.3: standard deviation 0.02, less by sqrt(2 layers) into the residual stream; biases zero, gains one."""
    model = build_model(GPTConfig(vocab_size=256, max_seq_len=64, n_layers=8, n_heads=2, dim=256))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == (1.0 if name.endswith("norm.weight") else 0.0)).all()
        else:
            into_residual = name.endswith(("out.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if into_residual else 0.02, rel=0.03), name


# Other inputs ---------------------------------------------------------------------------------------------------------


def test_an_extra_keyword_of_forward_reaches_features() -> None:
    plain, colored = Minimal(MINIMAL), Colored(MINIMAL)
    colored.load_state_dict(plain.state_dict())
    color = torch.randn(2, 6)
    expected = plain.to_logits(plain.embedding(TOKENS) + color[..., None])
    assert torch.equal(colored(TOKENS, color=color), expected)
    scores = colored(TOKENS, targets=TOKENS, color=color, summed=True)
    torch.testing.assert_close(
        scores.logprobs, expected.log_softmax(-1).gather(-1, TOKENS[..., None]).sum(), rtol=1e-5, atol=1e-5
    )


@each_model
def test_an_input_that_a_model_does_not_read_is_an_error(config: ModelConfig) -> None:
    with pytest.raises(TypeError, match="color"):
        build_model(config)(TOKENS, color=torch.zeros(2, 6))


# Heads ----------------------------------------------------------------------------------------------------------------


@each_model
def test_heads_come_last_output_zero_and_leave_everything_else_as_it_is(config: ModelConfig) -> None:
    torch.manual_seed(0)
    plain = build_model(config)
    torch.manual_seed(0)
    model = build_model(config, {"value", "reward"})
    names = list(model.state_dict())
    heads = ["heads.reward.weight", "heads.value.weight"]
    assert names == [*plain.state_dict(), *heads]
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    scores = model(TOKENS, targets=TOKENS, scores=["value"])
    assert scores.heads.keys() == {"value"}
    assert scores.heads["value"].shape == TOKENS.shape and not scores.heads["value"].any()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_head_is_a_linear_function_of_the_features_and_is_never_summed(summed: bool, chunk: int | None) -> None:
    model = build_model(CONFIGS[0], ["value"])
    model.loss_chunk = chunk
    nn.init.normal_(model.heads["value"].weight)
    scores = model(TOKENS, targets=TOKENS, scores=["value", "entropy"], summed=summed)
    head = model.heads["value"]
    features = model.features(TOKENS)
    expected = (features * head.weight[0]).sum(-1)
    torch.testing.assert_close(scores.heads["value"], expected, atol=1e-5, rtol=1e-4)
    assert scores.entropy.shape == (() if summed else TOKENS.shape)
    scores.heads["value"].sum().backward()
    torch.testing.assert_close(head.weight.grad[0], features.sum((0, 1)).detach(), atol=1e-4, rtol=1e-4)
    alone = model(TOKENS, scores=["value"])
    assert torch.equal(alone.heads["value"], scores.heads["value"]) and alone.logprobs.numel() == 0


@each_model
def test_a_checkpoint_loads_with_the_heads_that_it_has(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config, ["value"]).eval()
    nn.init.normal_(model.heads["value"].weight)
    checkpoint = Checkpoint(Path("run"), config, ByteTokenizer(), model.state_dict(), {})
    loaded = checkpoint.model(torch.device("cpu"))
    assert list(loaded.state_dict()) == list(model.state_dict())
    found, expected = (one(TOKENS, targets=TOKENS, scores=["value"]) for one in (loaded, model))
    assert torch.equal(found.heads["value"], expected.heads["value"])
    assert torch.equal(found.logprobs, expected.logprobs)
    wrong = model.state_dict() | {"heads.value.weight": torch.zeros(2, 16)}
    with pytest.raises(
        UserError, match=r"value.weight is torch.float32 \(2, 16\) in the checkpoint, and torch.float32 \(1, 16\) in"
    ):
        Checkpoint(Path("run"), config, ByteTokenizer(), wrong, {}).model(torch.device("cpu"))


def test_a_model_whose_configuration_has_no_dim_says_how_wide_its_features_are() -> None:
    class Wide(Minimal):
        def feature_size(self) -> int:
            return 4

    model = Wide(MINIMAL)
    model.add_heads(["value"])
    assert model(TOKENS, targets=TOKENS, scores=["value"]).heads["value"].shape == TOKENS.shape


# The registry ---------------------------------------------------------------------------------------------------------


def test_a_registered_architecture_is_built_from_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    class MinimalConfig(ModelConfig):
        pass

    config = MinimalConfig(vocab_size=16, max_seq_len=8)
    with pytest.raises(TypeError, match="MinimalConfig is not registered in MODELS"):
        model_class(config)
    monkeypatch.setitem(MODELS, "minimal", (MinimalConfig, Minimal))
    assert type(build_model(config)) is Minimal
