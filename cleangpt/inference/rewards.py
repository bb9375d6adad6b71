"""Scores of texts by a reward model, as a reward for a policy or a judge of two models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.inference.decoding import check_prompt
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores
from cleangpt.objectives.reward_model import HEAD

SCORED_TOKENS = 2**14
"""Tokens in one forward pass, padding included."""


class RewardScorer:
    """Scores texts by the scalar head of a reward model, read at the last token of each.

    Args:
        model: in evaluation mode, on `device`, with a head called reward.
        device: of the model.
        mean: of the scores of the texts that the reference writes; it is subtracted.
        std: their standard deviation, by which scores are divided.
        digest: a checksum of the model, by which a resumed run knows it again.

    Raises:
        UserError: the model has no such head.
    """

    def __init__(
        self, model: LanguageModel, device: torch.device, mean: float = 0.0, std: float = 1.0, digest: str = ""
    ) -> None:
        if HEAD not in model.heads:
            raise UserError("this model has no head for rewards; allowed: one trained with objective RewardModel")
        self.model, self.device, self.mean, self.std, self.digest = model, device, mean, std, digest

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The score of each text, given as token ids with the one that ends it: `(rows,)`, float32, on the host.

        Raises:
            UserError: a text is empty or too long, or has a token beyond the vocabulary.
        """
        for row in rows:
            check_prompt(self.model, row)
            if len(row) > self.model.max_seq_len:
                raise UserError(f"a text has {len(row):,} tokens; allowed: up to {self.model.max_seq_len:,}")
        found = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))  # so that a pass needs little padding
        while order:
            count = max(1, SCORED_TOKENS // len(rows[order[0]]))
            part, order = order[:count], order[count:]
            tokens = torch.zeros(len(part), len(rows[part[0]]), dtype=torch.int64)
            for place, number in enumerate(part):
                tokens[place, : len(rows[number])] = torch.tensor(rows[number])
            scores: TokenScores = self.model(tokens.to(self.device), scores=[HEAD])
            last = torch.tensor([len(rows[number]) - 1 for number in part])
            found[part] = scores.heads[HEAD].cpu().gather(1, last[:, None])[:, 0]
        return (found - self.mean) / self.std

    def normalised(self, rows: Sequence[Sequence[int]]) -> "RewardScorer":
        """The same model with mean 0 and standard deviation 1 over the given texts, written by the reference."""
        scores = RewardScorer(self.model, self.device).scores(rows)
        return RewardScorer(self.model, self.device, scores.mean().item(), scores.std().item() or 1.0, self.digest)
