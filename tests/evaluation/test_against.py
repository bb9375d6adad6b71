"""Two models compared: who wins, by which judge, at what KL divergence, and how certain that is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.commands import main
from cleangpt.config import DataConfig, OptimizerConfig, TrackingConfig, TrainingConfig
from cleangpt.corpora.fable_openings import FableOpenings
from cleangpt.environments.base import Episode, Feedback, Prompt
from cleangpt.errors import UserError
from cleangpt.evaluation.against import kl_divergence, open_judge, win_rate
from cleangpt.experiment import Experiment
from cleangpt.inference.engine import Engine
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.training.launch import train

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=40))
def test_a_win_counts_1_and_a_tie_half(pairs: list[tuple[int, int]]) -> None:
    outcomes = [1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs]
    found = win_rate(*zip(*pairs, strict=True))
    assert found["win_rate"] == pytest.approx(sum(outcomes) / len(outcomes))
    assert (
        0 <= found["win_rate_low"] <= found["win_rate"] + 1e-12
        and found["win_rate"] - 1e-12 <= found["win_rate_high"] <= 1
    )
    swapped = win_rate(*list(zip(*pairs, strict=True))[::-1])
    assert swapped["win_rate"] == pytest.approx(1 - found["win_rate"])


def test_the_interval_holds_the_true_rate_19_times_of_20() -> None:
    """Over many comparisons of 200 prompts that are won with probability 0.8."""
    torch.manual_seed(0)
    inside = 0
    for _ in range(500):
        found = win_rate((torch.rand(200) < 0.8).double().tolist(), [0.5] * 200)
        inside += found["win_rate_low"] <= 0.8 <= found["win_rate_high"]
    assert 0.92 < inside / 500 < 0.98


def test_the_kl_divergence_is_that_of_the_distributions() -> None:
    """For answers of one token, by enumeration, each answer once for its probability."""
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        model = GPT(GPTConfig(vocab_size=5, max_seq_len=8, n_layers=1, n_heads=1, dim=4))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        models.append(model.eval())
    prompt = [1, 2]
    p, q = (model(torch.tensor([prompt]))[0, -1].detach().softmax(-1).double() for model in models)
    episodes = []
    for token in range(5):
        count = round(2000 * p[token].item())
        episode = Episode("val", 0, Prompt(prompt, 1), [[token]], [Feedback(0.0)])
        episodes += [episode] * count
    expected = (p * (p / q).log()).sum().item()
    assert kl_divergence(Engine(models[0], CPU), Engine(models[1], CPU), episodes) == pytest.approx(expected, rel=0.02)
    assert kl_divergence(Engine(models[0], CPU), Engine(models[0], CPU), episodes) == 0


def test_the_kl_divergence_counts_actions_alone() -> None:
    """Not what the environment has said between them."""
    model = GPT(GPTConfig(vocab_size=5, max_seq_len=8, n_layers=1, n_heads=1, dim=4)).eval()

    class Other:
        def logprobs(self, rows: list[list[int]]) -> list[torch.Tensor]:
            # Different at every token, by its place in the row.
            return [scores - torch.arange(1.0, len(scores) + 1) for scores in Engine(model, CPU).logprobs(rows)]

    episode = Episode("val", 0, Prompt([1, 2], 2), [[3], [4, 0]], [Feedback(0.0, False, [1, 1]), Feedback(0.0)])
    assert len(episode.tokens) == 7
    assert kl_divergence(Engine(model, CPU), Other(), [episode]) == pytest.approx(2 + 5 + 6)  # type: ignore[arg-type]


@pytest.fixture
def runs(workplace: Path) -> list[str]:
    """Two runs that differ in length."""
    openings = FableOpenings(train_sentences=64, val_sentences=30)
    return [
        str(train(Experiment(
            name="opening", corpus=openings, data=DataConfig(seq_len=openings.row, batch_size=16),
            model=GPTConfig(max_seq_len=32, n_layers=1, n_heads=2, dim=32), optimizer=OptimizerConfig(lr=1e-2),
            training=TrainingConfig(macro_batches=1, batches_per_macro_batch=batches, device="cpu"),
            tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0), run_dir=f"run{batches}",
        )))
        for batches in (12, 1)
    ]  # fmt: skip


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_runs_are_compared_by_their_corpus_a_function_or_a_reward_model(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    by_corpus = compared(capsys, runs[0], "--against", runs[1], "--samples", "20")
    assert by_corpus["prompts"] == 20 and by_corpus["judge"] == "FablesGold" and by_corpus["kl"] > 0
    assert 0 <= by_corpus["grammatical"] <= 1
    written = json.loads(Path(runs[0], "against.json").read_text())
    examples = written.pop("examples")
    assert written == by_corpus and len(examples) == 8
    assert {"prompt", "answer", "score", "answer_of_other", "score_of_other"} == examples[0].keys()
    assert examples[0]["prompt"].endswith(" there lived a") and examples[0]["answer"] != examples[0]["answer_of_other"]
    assert compared(capsys, runs[0], "--against", runs[1], "--samples", "20") == by_corpus
    Path("judge.py").write_text(
        "def score(prompt, answer):\n    assert prompt.endswith(' there lived a')\n    return -len(answer)\n"
    )
    shorter = compared(capsys, runs[0], "--against", runs[1], "--judge", "judge.py", "--temperature", "0")
    back = compared(capsys, runs[1], "--against", runs[0], "--judge", "judge.py", "--temperature", "0")
    assert shorter["win_rate"] == pytest.approx(1 - back["win_rate"]) and shorter["kl"] is None
    assert shorter["score"] == back["score_of_other"] < 0
    assert compared(capsys, runs[0], "--against", runs[0], "--temperature", "0")["win_rate"] == 0.5
    assert main(["evaluate", runs[0], "--against", runs[1], "--judge", runs[1]]) == 2
    assert "no head for rewards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "has no function score"), ("def score(prompt, answer): return 'good'", "returned 'good'"),
        ("def score(prompt, answer): return float('nan')", "returned nan; allowed: a number"),
    ],
)  # fmt: skip
def test_a_judge_that_gives_no_number_is_refused(workplace: Path, code: str, message: str) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    Path("judge.py").write_text(code)
    with pytest.raises(UserError, match=message):
        open_judge("judge.py", Letters(), CPU)([Episode("val", 0, Prompt([65], 1), [[66]], [Feedback(0.0)])])  # type: ignore[arg-type]
