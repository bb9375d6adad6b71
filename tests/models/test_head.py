"""Scores of targets are those of a log-softmax over all logits; in chunks they and their gradients are the same."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cleangpt.config import LoRAConfig, ModelConfig, TrainingConfig
from cleangpt.data.batch import IGNORED
from cleangpt.distributed.layout import Layout, check_loss_chunk
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.head import OPTIONAL_SCORES, TokenScores, token_scores
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.lora import add_adapter

VOCABULARY, DIM = 97, 16
SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "max_seq_len": 16, "n_layers": 2, "n_heads": 2, "dim": DIM}
CONFIGS: dict[str, ModelConfig] = {
    "gpt": GPTConfig(**SIZE),
    "llama": LlamaConfig(**SIZE, hidden_dim=24),
    "tied": LlamaConfig(**SIZE, hidden_dim=24, tied=True, logit_soft_cap=5.0),
}
EVERY_SCORE = ("logprobs", *OPTIONAL_SCORES)
CHUNKS = [1, 7, 48, 1000]


def batch() -> tuple[Tensor, Tensor]:
    """Three samples `(3, 16)` and their targets, some of which are ignored, among them all of the last sample."""
    tokens = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = IGNORED
    targets[2] = IGNORED
    return tokens[:, :-1], targets


def built(kind: str, chunk: int | None = None) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind])
    model.loss_chunk = chunk
    return model


def reference(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every score from `log_softmax`, 0 where a target is ignored."""
    logprobs, counts = logits.float().log_softmax(-1), targets != IGNORED
    scores = {
        "logprobs": logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
        "log_z": logits.float().exp().sum(-1).log(),
        "entropy": -(logprobs.exp() * logprobs).sum(-1),
        "mean_logprob": logprobs.mean(-1),
    }
    return {name: score * counts for name, score in scores.items()}


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# What scores are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, *CHUNKS])
@pytest.mark.parametrize("summed", [False, True])
@torch.no_grad()
def test_scores_are_those_of_a_log_softmax(chunk: int | None, summed: bool) -> None:
    tokens, targets = batch()
    model = built("gpt", chunk)
    scores = model(tokens, targets=targets, scores=OPTIONAL_SCORES, summed=summed)
    expected = reference(model(tokens), targets)
    for name in EVERY_SCORE:
        found = getattr(scores, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[name].sum() if summed else expected[name], msg=name)


def test_only_log_probabilities_are_computed_unless_others_are_named() -> None:
    tokens, targets = batch()
    scores = built("gpt")(tokens, targets=targets, scores=["entropy"])
    assert (scores.log_z, scores.mean_logprob, scores.heads) == (None, None, {})
    assert scores.entropy.shape == targets.shape


def test_an_unknown_score_is_refused() -> None:
    tokens, targets = batch()
    with pytest.raises(ValueError, match="'valeu' is neither a score nor a head of the model"):
        built("gpt")(tokens, targets=targets, scores=["valeu"])


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(1, 64, VOCABULARY, dtype=torch.bfloat16)
    targets = torch.randint(VOCABULARY, (1, 64))
    scores = token_scores(logits, targets, lambda features: features, [], OPTIONAL_SCORES)
    for name, expected in reference(logits, targets).items():
        torch.testing.assert_close(getattr(scores, name), expected, msg=name)


# In chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_summed_log_probability_in_chunks_has_the_same_gradients(kind: str, chunk: int) -> None:
    tokens, targets = batch()
    found, expected = (
        gradients(model, model(tokens, targets=targets, summed=True).logprobs / 7)
        for model in (built(kind, chunk), built(kind))
    )
    assert_close(found, expected)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    chunk=st.sampled_from(CHUNKS),
    names=st.sets(st.sampled_from(OPTIONAL_SCORES)),
    summed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scores_in_chunks_have_the_same_gradients_whatever_the_weight_of_each(
    kind: str, chunk: int, names: set[str], summed: bool, seed: int
) -> None:
    """Each score of each token gets a weight of its own, as advantages give it to log-probabilities."""
    tokens, targets = batch()
    weights = torch.randn(4, *(() if summed else targets.shape), generator=torch.Generator().manual_seed(seed))

    def loss(model: LanguageModel) -> Tensor:
        scores = model(tokens, targets=targets, scores=sorted(names), summed=summed)
        used = ["logprobs", *sorted(names)]
        return torch.stack([(weights[EVERY_SCORE.index(name)] * getattr(scores, name)).sum() for name in used]).sum()

    chunked, plain = built(kind, chunk), built(kind)
    found, expected = loss(chunked), loss(plain)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert_close(gradients(chunked, found / 7), gradients(plain, expected / 7))


@pytest.mark.parametrize("trained", ["head.*", "blocks.*", "adapters"])
@pytest.mark.parametrize("summed", [True, False])
def test_frozen_parameters_get_no_gradient(trained: str, summed: bool) -> None:
    found = []
    for chunk in (7, None):
        model = built("llama", chunk)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained.removesuffix("*")))
        if trained == "adapters":
            head = model.get_submodule("head")
            assert isinstance(head, nn.Linear)
            add_adapter(head, LoRAConfig(rank=2))
            nn.init.constant_(head.get_parameter("lora.a"), 0.3)
            nn.init.normal_(head.get_parameter("lora.b"), generator=torch.Generator().manual_seed(2))
        tokens, targets = batch()
        found.append(gradients(model, model(tokens, targets=targets, summed=summed).logprobs.sum()))
    assert_close(*found)
    assert any(gradient is None for gradient in found[0].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("summed", [True, False])
def test_under_autocast_gradients_in_chunks_are_near_those_in_fp32(dtype: torch.dtype, summed: bool) -> None:
    tokens, targets = batch()
    plain, chunked = built("gpt"), built("gpt", 7)
    expected = gradients(plain, plain(tokens, targets=targets, summed=summed).logprobs.sum())
    with torch.autocast("cpu", dtype):
        scores = chunked(tokens, targets=targets, summed=summed)
    for name, gradient in gradients(chunked, scores.logprobs.sum()).items():
        other = expected[name]
        assert gradient is not None and other is not None
        assert (gradient - other).norm() <= 0.03 * other.norm() + 1e-6, name


# Memory and work ------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records the largest tensor created while it is active, the matrix products, and logits alive at once."""

    def __init__(self, vocab_size: int = 5000) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.largest = self.alive = self.most_alive = 0
        self.head_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [
            tensor for tensor in (made if isinstance(made, tuple | list) else [made]) if isinstance(tensor, Tensor)
        ]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.head_products += any(self.vocab_size in tensor.shape for tensor in (*args, *tensors))
            for tensor in tensors:
                if tensor.shape[-1] == self.vocab_size and tensor.shape[0] != DIM:
                    self.count(tensor)
        return made

    def count(self, logits: Tensor) -> None:
        """Counts the rows of logits until they are freed."""
        rows = len(logits)
        self.alive += rows
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(logits.untyped_storage(), self.free, rows)

    def free(self, rows: int) -> None:
        self.alive -= rows


def recorded(chunk: int | None, summed: bool) -> Operations:
    """A training step's operations on the scores of 27 targets in 48 tokens, with a vocabulary of 5,000."""
    torch.manual_seed(0)
    model = build_model(replace(CONFIGS["gpt"], vocab_size=5000))
    model.loss_chunk = chunk
    tokens, targets = batch()
    gc.collect()
    with Operations() as operations:
        model(tokens, targets=targets, summed=summed).logprobs.sum().backward()
    return operations


@pytest.mark.default(1)
@pytest.mark.parametrize(("chunk", "largest"), [(None, 27 * 5000), (8, 16 * 5000), (48, 27 * 5000)])
@pytest.mark.parametrize("summed", [True, False])
def test_no_tensor_is_larger_than_the_head_or_a_chunk_of_logits(chunk: int | None, largest: int, summed: bool) -> None:
    assert recorded(chunk, summed).largest == largest


@pytest.mark.slow
@pytest.mark.parametrize("summed", [True, False])
def test_the_logits_of_one_chunk_are_freed_before_those_of_the_next_are_computed(summed: bool) -> None:
    assert recorded(None, summed).most_alive == 27
    assert recorded(8, summed).most_alive == 8


@pytest.mark.slow
def test_a_summed_loss_in_chunks_computes_nothing_twice_and_scores_of_tokens_recompute_logits_once() -> None:
    """With the head go one product in the forward pass and two in the backward pass, for each chunk."""
    assert recorded(None, summed=True).head_products == 3
    assert recorded(8, summed=True).head_products == 3 * 4
    assert recorded(8, summed=False).head_products == 4 * 4


@torch.no_grad()
def test_without_gradients_nothing_is_saved_or_recomputed() -> None:
    model = built("gpt", 8)
    tokens, targets = batch()
    with Operations(VOCABULARY) as operations:
        scores: TokenScores = model(tokens, targets=targets, summed=True)
    assert operations.head_products == 4 and not scores.logprobs.requires_grad


def test_a_chunk_is_refused_where_the_head_is_sharded_or_compiled_with_the_model() -> None:
    training = TrainingConfig(macro_batches=1, batches_per_macro_batch=1, loss_chunk=4)
    check_loss_chunk(training, CONFIGS["gpt"], Layout(2, 2))
    check_loss_chunk(replace(training, loss_chunk=None, compile="model"), CONFIGS["gpt"], Layout(tensor=2))
    for changed, layout, message in (
        (training, Layout(tensor=2), "with tensor parallelism: None"),
        (replace(training, compile="model"), Layout(), "with training.compile model: None"),
    ):
        with pytest.raises(UserError, match=rf"training\.loss_chunk is 4; allowed {message}"):
            check_loss_chunk(changed, CONFIGS["gpt"], layout)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("kind", ["gpt", "tied"])
def test_compiled_scores_and_their_gradients_are_the_same(kind: str, chunk: int | None) -> None:
    plain, compiled = built(kind), built(kind, chunk)
    compiled.compiles_scores = True
    tokens, targets = batch()
    gradients = []
    for model in (plain, compiled):
        found = model(tokens, targets=targets, summed=True)
        (-found.logprobs).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        single = model(tokens, targets=targets, scores=["entropy"])
        gradients[-1] += [found.logprobs.detach(), single.logprobs.detach(), single.entropy.detach()]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("summed", [True, False])
def test_a_batch_without_targets_has_neither_loss_nor_gradient(chunk: int | None, summed: bool) -> None:
    model = built("tied", chunk)
    tokens, targets = batch()
    found = model(tokens[2:], targets=targets[2:], summed=summed).logprobs
    found.sum().backward()
    assert not found.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_logits_at_positions_of_the_flattened_batch_are_those_of_their_tokens() -> None:
    tokens, targets = batch()
    model, counted = built("llama"), targets != IGNORED
    found = model(tokens, logit_positions=counted.flatten().nonzero()[:, 0])
    torch.testing.assert_close(found, model(tokens)[counted])


@pytest.mark.slow
def test_a_compiled_chunk_of_ignored_targets_has_neither_loss_nor_gradient() -> None:
    model = built("gpt", chunk=16)
    model.compiles_scores = True
    tokens, targets = batch()
    found = model(tokens[2:], targets=targets[2:], summed=True).logprobs
    found.backward()
    assert found == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
