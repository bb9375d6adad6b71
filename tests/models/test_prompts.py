"""A prompt that rows have in common is read once, and every score is that of the row read by itself."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cleangpt.config import ModelConfig
from cleangpt.data.batch import IGNORED
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.prompts import answer_places

VOCABULARY, SEQ = 11, 14
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_seq_len": SEQ, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "dim": 16,
    "hidden_dim": 24,
}  # fmt: skip
KINDS: dict[str, ModelConfig] = {
    "gpt": GPTConfig(vocab_size=VOCABULARY, max_seq_len=SEQ, n_layers=2, n_heads=2, dim=16),
    "llama": LlamaConfig(**LLAMA),
    "windows": LlamaConfig(**LLAMA, sliding_window=3, global_every=2),
    "documents": LlamaConfig(**LLAMA, ngrams=(2, 3), ngram_rows=30, separator=2, sliding_window=5),
    "experts": LlamaConfig(**LLAMA, n_experts=3),
}
ANSWERS = [(2, 5), (2, 9), (6, 7), (6, 14), (0, 3), (13, 14), (4, 4), (2, 14)]
"""Where the targets of each row begin and end; (4, 4): there are none."""


def model(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    built = build_model(KINDS[kind], {"value"}).double()
    torch.nn.init.normal_(built.heads["value"].weight)
    return built


def rows(answers: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random texts, of which every second begins as the one before it; and their targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (len(answers), SEQ), generator=generator)
    tokens[1::2, :5] = tokens[: len(answers) // 2 * 2 : 2, :5]
    targets = torch.randint(VOCABULARY, (len(answers), SEQ), generator=generator)
    for row, (begin, end) in enumerate(answers):
        targets[row, :begin] = targets[row, end:] = IGNORED
    return tokens, targets


def scored(one: LanguageModel, shares: bool, tokens: Tensor, targets: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """Scores, and the gradient of a function of all of them, as one vector."""
    one.shares_prompts = shares
    one.zero_grad()
    found = one(tokens, targets=targets, scores=["value", "entropy", "log_z"], **options)
    values = torch.where(targets != IGNORED, found.heads["value"], 0.0)
    several = (targets != IGNORED).sum() if options.get("summed") else 1
    total = (
        (found.logprobs / several).sin() + (found.entropy / several).cos() + found.log_z
    ).sum() + values.sin().sum()
    total.backward()
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in one.parameters()]
    )
    return found._replace(heads={"value": values}), gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("summed", [False, True])
def test_scores_and_gradients_are_those_of_rows_read_by_themselves(kind: str, summed: bool) -> None:
    one, given_rows = model(kind), rows(ANSWERS)
    (found, gradient), (expected, expected_gradient) = (
        scored(one, shares, *given_rows, summed=summed) for shares in (True, False)
    )
    for name in ("logprobs", "entropy", "log_z"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.heads["value"], expected.heads["value"], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@example([(3, 4), (0, 1), (7, 8)], 0)  # one target each, after prompts of different lengths
@given(st.lists(st.tuples(st.integers(0, SEQ), st.integers(0, SEQ)), min_size=1, max_size=7), st.integers(0, 5))
def test_wherever_answers_begin_and_end(answers: list[tuple[int, int]], seed: int) -> None:
    one, given_rows = model("gpt"), rows([(min(pair), max(pair)) for pair in answers], seed)
    with torch.no_grad():
        one.shares_prompts = True
        found = one(given_rows[0], targets=given_rows[1]).logprobs
        one.shares_prompts = False
        torch.testing.assert_close(found, one(given_rows[0], targets=given_rows[1]).logprobs, rtol=1e-5, atol=1e-5)


def test_each_prompt_is_read_once_and_padding_never() -> None:
    one, read = model("gpt"), list[tuple[int, ...]]()
    one.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    tokens, targets = rows([(5, 9), (5, 8), (5, 7), (5, 9)])
    tokens[:, :5] = tokens[0, :5]
    one.shares_prompts = True
    one(tokens, targets=targets)
    assert read == [(1, 5), (4, 4)]
    read.clear()
    one(tokens, targets=targets[:, :1].expand_as(targets))
    one(tokens)
    assert read == [tuple(tokens.shape)] * 2, "without targets, and where nothing asks for one, rows are read whole"


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, SEQ), st.integers(0, SEQ)), min_size=1, max_size=7))
def test_what_is_read_after_the_prompts_has_every_target(answers: list[tuple[int, int]]) -> None:
    _, targets = rows([(min(pair), max(pair)) for pair in answers])
    first, width = answer_places(targets)
    assert int(first.min()) >= 0 and int(first.max()) + width <= SEQ
    places = torch.arange(SEQ)
    read = (places >= first[:, None]) & (places < first[:, None] + width)
    assert not ((targets != IGNORED) & ~read).any()
