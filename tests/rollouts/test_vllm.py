"""vLLM behind the sampler's protocol, with a stand-in that answers as the engine does."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cleangpt.environments.base import Environment, Episode, Feedback, Prompt
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.episodes import Sampler, play
from cleangpt.rollouts.vllm import VLLMSampler, load_vllm
from cleangpt.training.trainer import Trainer
from tests.scripted import Bigrams


class StandIn:
    """What is used of `vllm.LLM`, answered by the engine."""

    def __init__(self) -> None:
        self.model: LanguageModel = Bigrams(1)
        self.loaded: list[Any] = []
        self.cleared = 0

    def apply_model(self, function: Any) -> None:
        function(SimpleNamespace(load_weights=lambda weights: self.loaded.append(copy.deepcopy(weights))))

    def reset_prefix_cache(self) -> None:
        self.cleared += 1

    def generate(self, prompts: list[dict[str, Any]], params: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        engine, found = Engine(self.model, torch.device("cpu"), sampled_logprobs=True), []
        for prompt, asked in zip(prompts, params, strict=True):
            request = engine.submit(
                prompt["prompt_token_ids"], max_new_tokens=asked["max_tokens"], seed=asked["seed"],
                sampling=Sampling(temperature=asked["temperature"]), stop_ids=asked["stop_token_ids"],
            )  # fmt: skip
            done = dict(engine.completions())[request]
            logprobs = [
                {token: SimpleNamespace(logprob=value)} for token, value in zip(done.ids, done.logprobs, strict=True)
            ]
            answer = SimpleNamespace(token_ids=tuple(done.ids), logprobs=logprobs, finish_reason=done.finish_reason)
            found.append(SimpleNamespace(outputs=[answer]))
        return found


class Signed(Engine):
    """The engine with seeds of 63 bits, as vLLM takes them."""

    def submit(self, *prompt: Any, seed: int | None = None, **options: Any) -> int:
        return super().submit(*prompt, seed=None if seed is None else seed % 2**63, **options)


class Twice(Environment):
    """Two turns."""

    def reset(self, split: str, task: int) -> Prompt:
        return Prompt([task % 3], 3, stop_ids={3})

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        return Feedback(float(len(action)), done=bool(episode.actions), tokens=[0])


def played(sampler: Sampler) -> list[Episode]:
    episodes = [Episode("train", task, Twice().reset("train", task)) for task in range(8)]
    play(sampler, Twice(), episodes, sampling=Sampling(temperature=1.5), seeds=[7 * task for task in range(8)])
    return episodes


def test_episodes_are_those_of_the_engine_turn_by_turn() -> None:
    weights = [("wte", torch.ones(1))]
    stand_in = StandIn()
    ours = played(Signed(Bigrams(1), torch.device("cpu"), sampled_logprobs=True))
    theirs = played(VLLMSampler(stand_in, weights, dict))
    assert [episode.actions for episode in theirs] == [episode.actions for episode in ours]
    assert [episode.truncated for episode in theirs] == [episode.truncated for episode in ours]
    for one, two in zip(theirs, ours, strict=True):
        for first, second in zip(one.logprobs, two.logprobs, strict=True):
            assert first == pytest.approx(second, abs=1e-5)
    assert stand_in.loaded == [weights] and stand_in.cleared == 1, "the current weights, and none of the old cache"


def test_a_policy_hands_its_weights_over_for_every_round(
    policy: Callable[..., Experiment], trainer: Callable[[Experiment], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the names of Hugging Face, loaded from an exported folder once; the stand-in runs the model itself."""
    folders, stand_in = [], StandIn()

    def load(folder: str, max_model_len: int, seed: int) -> tuple[StandIn, type]:
        folders.append(json.loads((Path(folder) / "config.json").read_text())["model_type"])
        return stand_in, dict

    monkeypatch.setattr("cleangpt.training.generation.load_vllm", load)
    fields = {"rollouts__sampler": "vllm", "rollouts__old_logprobs": "recomputed", "rollouts__importance_cap": 2.0}
    opened = trainer(policy(training__macro_batches=2, model__vocab_size=None, **fields))
    stand_in.model = opened.model
    opened.train()
    assert folders == ["gpt2"] and len(stand_in.loaded) == 2
    first, second = (dict(weights) for weights in stand_in.loaded)
    assert "transformer.wte.weight" in first
    assert not torch.equal(first["transformer.wte.weight"], second["transformer.wte.weight"])


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    sampler = VLLMSampler(StandIn(), [], dict)
    with pytest.raises(UserError, match="a temperature alone"):
        sampler.submit([1], max_new_tokens=1, sampling=Sampling(top_k=2), seed=1, stop_ids=())
    with pytest.raises(UserError, match="not installed: pip install vllm"):
        load_vllm("folder", 8, 1)
