"""Cross-entropy with Gaussians around bins."""

import math

import pytest
import torch

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.errors import UserError
from cleangpt.objectives.next_token import NextToken
from cleangpt.objectives.soft_bins import SoftBins
from tests.scripted import Scripted


class Table(Scripted):
    """Logits by a table of the last token."""

    def __init__(self) -> None:
        super().__init__(12)
        self.table = torch.nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


TOKENS = torch.tensor([[1, 2, 3, 4], [11, 0, 7, 5]])
TARGETS = torch.tensor([[2, 5, IGNORED, 9], [IGNORED, 3, 8, 4]])
BATCH = Batch({"tokens": TOKENS}, TARGETS)


@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_a_bin_is_learned_with_its_neighbours_and_other_tokens_alone(sigma: float) -> None:
    model = Table()
    expected = 0.0
    for tokens, targets in zip(TOKENS.tolist(), TARGETS.tolist(), strict=True):
        for token, target in zip(tokens, targets, strict=True):
            logprobs = model.table[token].log_softmax(-1).tolist()
            if 4 <= target < 10:
                weights = [math.exp(-((bin_ - target) ** 2) / (2 * sigma**2)) for bin_ in range(4, 10)]
                pairs = zip(weights, logprobs[4:10], strict=True)
                expected -= sum(weight * logprob for weight, logprob in pairs) / sum(weights)
            elif target != IGNORED:
                expected -= logprobs[target]
    loss = SoftBins(bins=(4, 10), sigma=sigma)(model, BATCH)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["cross_entropy"].item() == pytest.approx(NextToken()(model, BATCH).total.item(), rel=1e-5)


def test_a_narrow_gaussian_and_validation_are_plain_cross_entropy() -> None:
    model, plain = Table(), NextToken()(Table(), BATCH).total
    assert torch.allclose(SoftBins(bins=(4, 10), sigma=0.05)(model, BATCH).total, plain)
    with torch.no_grad():
        assert torch.equal(SoftBins(bins=(4, 10))(model, BATCH).total, plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"bins": (10, 4)}, r"objective\.bins is \(10, 4\)"), ({"bins": (4, 10), "z_loss": 0.1}, "allowed with SoftBins")],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoftBins(**fields)  # type: ignore[arg-type]
