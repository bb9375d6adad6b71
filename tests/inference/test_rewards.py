"""Scores of a reward model: at the last token of each text, whatever it is batched with."""

import pytest
import torch

from cleangpt.errors import UserError
from cleangpt.inference import rewards
from cleangpt.inference.rewards import RewardScorer
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPT, GPTConfig

CPU = torch.device("cpu")
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1], [2, 2], [1, 2, 3]]


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, max_seq_len=8, n_layers=1, n_heads=2, dim=8))
    model.add_heads({"reward"})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_a_score_is_the_heads_output_at_the_last_token(model: LanguageModel) -> None:
    with torch.no_grad():
        expected = [model.heads["reward"](model.features(torch.tensor([text])))[0, -1, 0] for text in TEXTS]
    torch.testing.assert_close(RewardScorer(model, CPU).scores(TEXTS), torch.stack(expected))


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_a_score_does_not_depend_on_the_batch(
    model: LanguageModel, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = RewardScorer(model, CPU).scores(TEXTS)
    monkeypatch.setattr(rewards, "SCORED_TOKENS", tokens)
    torch.testing.assert_close(RewardScorer(model, CPU).scores(TEXTS), expected)
    torch.testing.assert_close(RewardScorer(model, CPU).scores(TEXTS[::-1]), expected.flip(0))


def test_normalised_scores_have_mean_0_and_standard_deviation_1_over_the_texts_given(model: LanguageModel) -> None:
    plain, normalised = RewardScorer(model, CPU), RewardScorer(model, CPU).normalised(TEXTS)
    found = normalised.scores(TEXTS)
    assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.std().item() == pytest.approx(1, abs=1e-6)
    other = [[9, 9], [3, 1]]
    scale = plain.scores(TEXTS).std()
    torch.testing.assert_close(normalised.scores(other).diff(), plain.scores(other).diff() / scale)
    torch.testing.assert_close(normalised.normalised(TEXTS[:2]).scores(TEXTS[:2]).mean(), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("rows", "message"), [([[1], []], "no tokens"), ([[1] * 9], "has 9 tokens; allowed: up to 8"), ([[10]], "10")]
)
def test_a_text_that_it_cannot_read_is_refused(model: LanguageModel, rows: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardScorer(model, CPU).scores(rows)


def test_no_texts_have_no_scores(model: LanguageModel) -> None:
    assert RewardScorer(model, CPU).scores([]).tolist() == []
