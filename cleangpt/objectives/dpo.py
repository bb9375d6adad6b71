"""Direct preference optimization (Rafailov et al. 2023, "Direct preference optimization", eq. 7)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from cleangpt.data.batch import IGNORED, Batch
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.base import Loss
from cleangpt.objectives.pairs import REFERENCE, Pair, PairObjective
from cleangpt.validation import Bounds, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class DPO(PairObjective):
    """-log σ(β h) per pair, where h is the log-ratio to the reference of the chosen minus that of the rejected answer.

    With label smoothing ε, conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3),
    -(1-ε) log σ(β h) - ε log σ(-β h), or with `robust` its unbiased form (Chowdhury et al. 2024, "Provably robust
    DPO", eq. 12): (-(1-ε) log σ(β h) + ε log σ(-β h)) / (1-2ε).
    """

    reads: ClassVar[frozenset[str]] = frozenset({REFERENCE})

    beta: Positive = 0.1
    """β: how strongly the model is held to the reference; larger: more."""
    label_smoothing: Annotated[float, Bounds(0, below=0.5)] = 0.0
    """ε: expected share of pairs whose labels are flipped."""
    robust: bool = False
    """Use the unbiased form for flipped labels rather than the conservative one."""
    length_normalised: bool = False
    """Divide each log-ratio by its answer's length (Lambert et al. 2024, "Tulu 3", section 5.1)."""
    sft_weight: NonNegative = 0.0
    """Weight of the chosen answers' cross-entropy per token, which keeps their probability from falling (Pang et al.
    2024, "Iterative reasoning preference optimization", eq. 2)."""

    @property
    def step_means(self) -> tuple[str, ...]:
        """With an SFT term, which is a mean over tokens: tokens per chosen answer."""
        return ("chosen_length",) if self.sft_weight else ()

    def step_sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """The number of chosen tokens."""
        return {"chosen_length": (batch.targets[::2] != IGNORED).sum()}

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        """The loss, summed over pairs."""
        pair = self.pairs(model, batch)
        margin = self.beta * self.preference(pair)
        sign = -1 if self.robust else 1
        loss = -(1 - self.label_smoothing) * logsigmoid(margin) - sign * self.label_smoothing * logsigmoid(-margin)
        if self.robust:
            loss = loss / (1 - 2 * self.label_smoothing)
        if self.sft_weight:
            loss = loss - self.sft_weight * pair.chosen.logprob / batch.extras["chosen_length"][::2]
        return Loss(pair.sum(loss), pair.metrics(margin))

    def preference(self, pair: Pair) -> Tensor:
        """h `(pairs,)`."""
        chosen, rejected = (
            answer.log_ratio / (answer.length if self.length_normalised else 1)
            for answer in (pair.chosen, pair.rejected)
        )
        return chosen - rejected
