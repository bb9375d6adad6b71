"""Opens a reward model, to score answers in training or evaluation."""

from collections.abc import Iterator

import torch

from cleangpt.checkpoints.run_folder import find_run, read_experiment
from cleangpt.data.dataset import Split
from cleangpt.errors import UserError
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.inference.rewards import RewardScorer
from cleangpt.interchange.huggingface import open_checkpoint


def open_reward_model(source: str, device: torch.device) -> RewardScorer:
    """The reward model of a run, a checkpoint or Hugging Face (hf:NAME_OR_FOLDER).

    That of a run has mean 0 and standard deviation 1 over the answers in its corpus's validation split, which are the
    reference's where it wrote both answers of each pair; other models keep their scale.

    Raises:
        UserError: there is none, or it has no head for rewards.
    """
    checkpoint = open_checkpoint(source)
    scorer = RewardScorer(checkpoint.model(device), device)
    try:
        run = find_run(source)
    except UserError:
        return scorer
    experiment = read_experiment(run)
    dataset = open_dataset(run, experiment)
    return scorer.normalised([row for part in dataset.sources for row in _texts(part.dataset.splits["val"])])


def _texts(split: Split) -> Iterator[list[int]]:
    """The rows of a split, each up to the last token that counts."""
    for row in range(split.documents):
        tokens, mask = split.read_row(row)
        yield tokens[: len(tokens) - mask[::-1].index(1)]
