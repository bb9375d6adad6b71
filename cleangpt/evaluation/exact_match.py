"""Exact match: the share of problems whose whole answer a model generates right, token for token."""

import numpy as np
import torch
from numpy.typing import NDArray

from cleangpt.data.dataset import Split
from cleangpt.data.shuffle import mix, permute
from cleangpt.inference.engine import greedy
from cleangpt.models.base import LanguageModel

ROWS = 1024


def exact_match(model: LanguageModel, split: Split, limit: int | None, device: torch.device) -> float:
    """Generates the answer to every problem of a split greedily and compares it with the row's.

    The loss mask tells question from answer: the tokens of a row up to the first that counts are the question, those
    that count one after another from there on are the answer. Each token is generated from the model's own earlier
    ones. Rows whose questions have the same length are asked together.

    Args:
        model: in evaluation mode, on `device`.
        split: of a store with a row length and a loss mask.
        limit: problems to ask, always the same ones, spread over the split; None: all.
        device: where the model is.

    Returns:
        Right answers by problems asked, 0 to 1.
    """
    assert split.row_length is not None
    rows = np.arange(split.documents)
    if limit is not None and limit < len(rows):
        rows = np.sort(permute(rows[:limit], len(rows), mix(1)))
    right = sum(_right(model, split, rows[start : start + ROWS], device) for start in range(0, len(rows), ROWS))
    return right / len(rows)


def _right(model: LanguageModel, split: Split, rows: NDArray[np.int64], device: torch.device) -> int:
    assert split.row_length is not None
    length = split.row_length
    tokens = np.stack([split.read(row * length, length) for row in rows.tolist()]).astype(np.int64)
    counts = np.stack([split.read_mask(row * length, length) for row in rows.tolist()]).astype(bool)
    questions = np.argmax(counts, axis=1)
    right = 0
    for question in np.unique(questions).tolist():
        mine = questions == question
        answer = np.logical_and.accumulate(counts[mine, question:], axis=1)
        answer = answer[:, : int(answer.sum(axis=1).max())]
        prompts = torch.from_numpy(tokens[mine, :question]).to(device)
        given = greedy(model, prompts, answer.shape[1]).cpu().numpy()
        wanted = tokens[mine, question : question + answer.shape[1]]
        right += int(((given == wanted) | ~answer).all(axis=1).sum())
    return right
