"""`cleangpt evaluate RUN --against OTHER`: how often one model's answers are better than another's.

Both answer the same prompts, sampled at the same temperature. A win counts 1, a tie 0.5; the interval is that of the
mean over prompts. What the better answers cost shows in the KL divergence from the other model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cleangpt.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import find_checkpoint, read_experiment
from cleangpt.corpora.mixture import environments
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import Tokenizer, same_tokens
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.errors import UserError
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.evaluation.rewards import open_reward_model
from cleangpt.evaluation.tasks import MAX_BATCH, play_tasks
from cleangpt.experiment_files import run_file
from cleangpt.files import write_json
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.interchange.huggingface import open_checkpoint

Judge = Callable[[Sequence[Episode]], list[float]]
"""The score of each episode's answer."""
EXAMPLES, SHOWN = "examples", 8
"""Name and number of the prompts whose answers by both models are in against.json."""
NORMAL = 1.96
"""Standard errors in half of a 95 % interval."""


@dataclass(frozen=True)
class Prompts(Environment):
    """The prompts of a dataset's rows, for a corpus without an environment; answers are scored by a judge alone."""

    dataset: TokenDataset

    def tasks(self, split: str) -> int:
        """The number of groups of rows, which share a prompt."""
        return self.dataset.splits[split].documents // self.dataset.splits[split].group

    def reset(self, split: str, task: int) -> Prompt:
        """The tokens before the first that counts; an answer may fill the row."""
        rows = self.dataset.splits[split]
        tokens, counted = rows.read_row(task * rows.group)
        start = [*counted, 1].index(1)
        return Prompt(tokens[:start], max(1, len(tokens) - start), tuple(self.dataset.tokenizer.stop_ids))

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """Ends the episode."""
        return Feedback(reward=0.0)


def compare(
    run: Path, other: str, *, judge: str | None, split: str, samples: int, temperature: float, seed: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Compares the best checkpoint of a run with another model, and writes RUN/against.json.

    Args:
        run: whose corpus has the prompts.
        other: a run, a checkpoint or a Hugging Face model.
        judge: see `open_judge`.
        split: of the corpus.
        samples: maximum number of prompts.
        temperature: of both models.
        seed: of the first prompt's answer; each further one's is one higher.
        device: of the models.

    Raises:
        UserError: the models have different tokens, or there is nothing to judge by.
    """
    experiment = read_experiment(run)
    dataset = open_dataset(run, experiment)
    first = dataset.sources[0].dataset
    if split not in first.splits:
        raise UserError(f"--split is {split!r}; allowed: {', '.join(first.splits)}")
    own = next(iter(environments(experiment.corpus, dataset).values()), None)
    if own is None and (judge is None or first.row_length is None):
        raise UserError("this corpus scores no answers; give --judge, and a corpus of prompts and answers in rows")
    score, environment = open_judge(judge, first.tokenizer, device), own or Prompts(first)
    checkpoints = [load_checkpoint(find_checkpoint(str(run))), open_checkpoint(other)]
    engines = [open_engine(checkpoint, first.tokenizer, device) for checkpoint in checkpoints]
    seeds = (seed, seed + environment.tasks(split))  # so that the two models' draws are independent
    played = [
        play_tasks(engine, environment, split, samples, Sampling(temperature=temperature, seed=first_seed))
        for engine, first_seed in zip(engines, seeds, strict=True)
    ]
    scores = [score(episodes) for episodes in played]
    metrics: dict[str, Any] = {
        "run": str(run), "checkpoint": checkpoints[0].folder.name, "against": str(checkpoints[1].folder),
        "judge": judge or type(environment).__name__, "split": split, "prompts": len(played[0]),
        **win_rate(*scores), "score": _mean(scores[0]), "score_of_other": _mean(scores[1]),
        "kl": kl_divergence(engines[0], engines[1], played[0]) if temperature == 1 else None,
        "length": _mean([sum(map(len, episode.actions)) for episode in played[0]]),
    }  # fmt: skip
    measured = [environment.measures(episode) for episode in played[0]]
    metrics |= {name: _mean([entry[name] for entry in measured]) for name in measured[0]}
    write_json(run / "against.json", metrics | {EXAMPLES: side_by_side(first.tokenizer, played, scores)})
    return metrics


def side_by_side(
    tokenizer: Tokenizer, played: Sequence[Sequence[Episode]], scores: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """What both models answer to the first prompts, as text with its score, for the report."""
    found = []
    for own, other, score, other_score in list(zip(*played, *scores, strict=True))[:SHOWN]:
        prompt, answer, other_answer = map(tokenizer.decode, (own.prompt.tokens, _answer(own), _answer(other)))
        found.append(
            {
                "prompt": prompt, "answer": answer, "score": score, "answer_of_other": other_answer,
                "score_of_other": other_score,
            }
        )  # fmt: skip
    return found


def open_judge(judge: str | None, tokenizer: Tokenizer, device: torch.device) -> Judge:
    """What scores answers: None, their rewards; a Python file with a function `score(prompt, answer)` of two texts that
    returns a number; or a run with a reward model, see `open_reward_model`.

    Raises:
        UserError: there is no such function, it returns something else, or the reward model has other tokens.
    """
    if judge is None:
        return lambda episodes: [episode.total_reward for episode in episodes]
    if judge.endswith(".py"):
        function = getattr(run_file(Path(judge)), "score", None)
        if not callable(function):
            raise UserError(f"{judge} has no function score(prompt, answer)")

        def by_function(episodes: Sequence[Episode]) -> list[float]:
            texts = [
                [tokenizer.decode(part) for part in (episode.prompt.tokens, _answer(episode))] for episode in episodes
            ]
            numbers = [function(*pair) for pair in texts]
            if wrong := [number for number in numbers if not isinstance(number, int | float) or math.isnan(number)]:
                raise UserError(f"{judge}: score returned {wrong[0]!r}; allowed: a number")
            return [float(number) for number in numbers]

        return by_function
    scorer = open_reward_model(judge, tokenizer, device)
    return lambda episodes: scorer.scores([episode.tokens for episode in episodes]).tolist()


def win_rate(scores: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """How often a score is higher than the other one on the same prompt, with a 95 % interval."""
    won = torch.tensor(scores, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    wins = (won.sign() + 1) / 2
    half = NORMAL * wins.std(correction=min(1, len(wins) - 1)).item() / math.sqrt(len(wins))
    rate = wins.mean().item()
    return {"win_rate": rate, "win_rate_low": max(0.0, rate - half), "win_rate_high": min(1.0, rate + half)}


def kl_divergence(engine: Engine, other: Engine, episodes: Sequence[Episode]) -> float:
    """KL(engine‖other) in nats per answer, estimated from answers that the first has sampled at temperature 1."""
    rows = [episode.tokens for episode in episodes]
    total = 0.0
    for episode, mine, its in zip(episodes, engine.logprobs(rows), other.logprobs(rows), strict=True):
        place = len(episode.prompt.tokens) - 1
        for action, feedback in zip(episode.actions, episode.feedback, strict=True):
            total += float((mine - its)[place : place + len(action)].sum())
            place += len(action) + len(feedback.tokens)
    return total / len(episodes)


def open_engine(checkpoint: Checkpoint, tokenizer: Tokenizer, device: torch.device) -> Engine:
    """An engine that samples from a checkpoint's model.

    Raises:
        UserError: its tokens are not those of `tokenizer`.
    """
    _check_tokens(checkpoint, tokenizer)
    return Engine(checkpoint.model(device), device, vocab_size=tokenizer.vocab_size, max_batch=MAX_BATCH)


def _check_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    if not same_tokens(checkpoint.tokenizer, tokenizer):
        raise UserError(
            f"the tokenizer of {checkpoint.folder} is not that of the run's corpus; allowed: the same tokens"
        )


def _answer(episode: Episode) -> list[int]:
    return episode.tokens[len(episode.prompt.tokens) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
