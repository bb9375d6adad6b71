"""Opens a reward model, as a reward for a policy or a judge of answers."""

import torch

from cleangpt.checkpoints.run_folder import find_run, read_experiment
from cleangpt.data.dataset import Split
from cleangpt.data.mixing import MixedDataset
from cleangpt.data.tokenizers import Tokenizer, same_tokens
from cleangpt.errors import UserError
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.inference.rewards import RewardScorer
from cleangpt.interchange.huggingface import open_checkpoint

ANSWERS = 4096
"""Answers of each source, at most, over which scores are normalised."""


def open_reward_model(source: str, tokenizer: Tokenizer, device: torch.device) -> RewardScorer:
    """The reward model of a run, a checkpoint or Hugging Face (hf:NAME_OR_FOLDER).

    That of a run has mean 0 and standard deviation 1 over the answers in its corpus's validation split, which are the
    reference's where it wrote both answers of each pair; other models keep their scale.

    Args:
        source: of the model.
        tokenizer: of the answers.
        device: for the model.

    Raises:
        UserError: there is none, it has no head for rewards, or other tokens.
    """
    checkpoint = open_checkpoint(source)
    if not same_tokens(checkpoint.tokenizer, tokenizer):
        raise UserError(f"the tokenizer of {checkpoint.folder} is not that of the answers; allowed: the same tokens")
    scorer = RewardScorer(checkpoint.model(device), device, digest=checkpoint.digest())
    try:
        run = find_run(source)
    except UserError:
        return scorer
    return scorer.normalised(_answers(open_dataset(run, read_experiment(run))))


def _answers(dataset: MixedDataset) -> list[list[int]]:
    """The validation rows of every source, each up to the last token that counts."""
    splits = [part.dataset.splits["val"] for part in dataset.sources]
    return [_answer(split, row) for split in splits for row in range(min(split.documents, ANSWERS))]


def _answer(split: Split, row: int) -> list[int]:
    tokens, mask = split.read_row(row)
    return tokens[: len(tokens) - mask[::-1].index(1)]
