"""Best of n: the answer that a judge likes best of n sampled ones, and what it is really worth.

The cheapest way to optimize against a reward model, and so a test of it: the judge's own score only rises with n, while
the true one falls again once the judge's mistakes are what is selected (Gao et al. 2022, "Scaling laws for reward model
over-optimization"). The best of n is log n - (n - 1) / n nats from the model itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cleangpt.checkpoints.checkpoint import load_checkpoint
from cleangpt.checkpoints.run_folder import find_checkpoint, read_experiment
from cleangpt.corpora.mixture import environments
from cleangpt.errors import UserError
from cleangpt.evaluation.against import open_engine, open_judge
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.evaluation.tasks import play_tasks
from cleangpt.files import write_json
from cleangpt.inference.sampling import Sampling
from cleangpt.tracking.plots import best_of_n_plot

TIMES = 8
"""Answers sampled for each of the n: the curve is an average over all choices of n among them."""


def best_of_n(
    run: Path, judges: Sequence[str], *, most: int, split: str, seed: int, device: torch.device
) -> dict[str, list[dict[str, float]]]:
    """The curve of each judge for n = 1, 4, 16 … `most`, also drawn over √KL and written to RUN/best_of_n.json.

    Args:
        run: whose best checkpoint answers the prompts of its corpus, which also has the true score.
        judges: runs with reward models, or Python files; see `open_judge`.
        most: the largest n.
        split: of the corpus.
        seed: of the first answer.
        device: of the models.

    Raises:
        UserError: the corpus does not score answers.
    """
    experiment = read_experiment(run)
    dataset = open_dataset(run, experiment)
    environment = next(iter(environments(experiment.corpus, dataset).values()), None)
    if environment is None or not judges:
        raise UserError("--best-of needs a --judge, and a corpus that scores answers, which this one does not"
                        if judges else "--best-of needs a --judge, such as a run with a reward model")  # fmt: skip
    tokenizer = dataset.tokenizer
    engine = open_engine(load_checkpoint(find_checkpoint(str(run))), tokenizer, device)
    tasks = environment.tasks(split)
    episodes = []
    for first in range(0, TIMES * most, tasks):
        episodes += play_tasks(engine, environment, split, None, Sampling(temperature=1.0, seed=seed + first))
    true = torch.tensor([episode.total_reward for episode in episodes], dtype=torch.float64)
    curves = {}
    for judge in judges:
        scores = torch.tensor(open_judge(judge, tokenizer, device)(episodes), dtype=torch.float64)
        scores = (scores - scores.mean()) / scores.std().clamp(min=1e-9)
        sizes = [4**power for power in range(round(math.log(most, 4)) + 1)]
        curves[Path(judge).name] = [
            {"n": n, "√KL": math.sqrt(math.log(n) - (n - 1) / n), "true score": chosen(scores, true, n),
             "judge's score": chosen(scores, scores, n)}
            for n in sizes
        ]  # fmt: skip
    write_json(run / "best_of_n.json", curves)
    best_of_n_plot(curves, run / "plots" / "best_of_n.png")
    return curves


def chosen(scores: Tensor, values: Tensor, n: int) -> float:
    """The mean of `values` `(answers,)` of the one with the highest of `scores`, over all choices of n answers.

    An answer that is better than k others is the best of n in C(k, n - 1) of C(answers, n) choices; those with equal
    scores share theirs.
    """
    total = len(scores)
    ranks = torch.arange(total, dtype=torch.float64)
    # C(k, n - 1) / C(total, n), as a product in logarithms.
    chances = torch.where(
        ranks >= n - 1,
        torch.exp(
            torch.lgamma(ranks + 1) - torch.lgamma((ranks - n + 2).clamp(min=1)) - math.lgamma(n)
            - (math.lgamma(total + 1) - math.lgamma(n + 1) - math.lgamma(total - n + 1))
        ),
        0.0,
    )  # fmt: skip
    groups = torch.from_numpy(np.unique(scores.numpy(), return_inverse=True)[1])
    sums = torch.zeros(2, int(groups.max()) + 1, dtype=torch.float64)
    sums[0].index_add_(0, groups.sort().values, chances)
    sums[1].index_add_(0, groups, torch.ones_like(chances))
    return float((sums[0] / sums[1])[groups] @ values)
