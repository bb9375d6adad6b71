"""How a policy is rolled out: prompts, completions, rewards; the section `rollouts` of an experiment."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cleangpt.validation import Bounds, Checked, Count, CountOrZero, Pattern, Positive, RunOrModel

Group = Annotated[int, Bounds(1, 2**16)]
Finite = Annotated[float, Bounds()]


@dataclass(frozen=True, kw_only=True)
class Reward(Checked, section="rollouts.rewards"):
    """One of the rewards of an answer, whose weighted sum is what the policy learns from."""

    name: Annotated[str, Pattern(r"[A-Za-z]\w{0,39}", "letters, digits and '_'")] = "task"
    """task: the environment's own; model: the reward model's; any other: a function registered in `REWARDS`."""
    weight: Finite = 1.0
    """Weight in the sum."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Checked, section="rollouts"):
    """Rounds of rollouts, for objectives that learn from the policy's own answers; see docs/policies.md.

    A sample is an answer: `data.batch_size` answers are a batch, and `data.seq_len` + 1 the most tokens that a prompt
    with its answer may have.
    """

    prompts: Count = 128
    """Prompts in a round, over all devices."""
    completions: Group = 8
    """Answers to each prompt: its group."""
    passes: Group = 1
    """Passes over the answers of a round, each with the prompts in another order."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probabilities are those at this temperature in training too."""
    micro_batch_size: Count = 256
    """Answers generated together, whatever the number of devices, so that results do not depend on it."""
    rewards: tuple[Reward, ...] = (Reward(),)
    """What is added up to an answer's reward."""
    reward_model: RunOrModel | None = None
    """The reward model for the reward `model`: a run (its best checkpoint), with scores shifted and scaled to mean 0
    and standard deviation 1 over its validation answers; or a checkpoint or Hugging Face model (hf:NAME), as it is."""
    reward_timeout: Positive = 1.0
    """Seconds that a reward function may take for one answer."""
    error_reward: Finite = 0.0
    """Reward of an answer whose function raised an exception or took too long."""
    truncated: Literal["keep", "mask", "punish"] = "keep"
    """Answers that ran into the limit of tokens before their stop token. keep: they count as any other; mask: they are
    left out; punish: their reward is `truncated_reward`."""
    truncated_reward: Finite = -1.0
    """Reward of a truncated answer, with truncated punish."""
    overlong_tokens: CountOrZero = 0
    """Soft overlong punishment (Yu et al. 2025, "DAPO", equation 13): within this many tokens before the limit, the
    reward falls linearly by up to 1. 0: off."""
    dynamic_sampling: bool = False
    """Keep only prompts whose answers differ in reward, and draw further prompts until a round is full ("DAPO",
    equation 11)."""
    max_draws: Group = 4
    """Dynamic sampling: the most prompts drawn for a round, in multiples of `prompts`; if they do not fill it, prompts
    without a signal do."""
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    """Log-probabilities of the policy that drew an answer. sampled: those noted when sampling; recomputed: from a
    forward pass of the trainer, where its arithmetic differs from the sampler's, as in bf16."""
    importance_cap: Positive | None = None
    """Truncated importance sampling between sampler and trainer: weight each token by its ratio of probabilities, at
    most this; needs old_logprobs recomputed. None: off."""
    save_answers: bool = False
    """Write every answer of every round to answers.jsonl in the run, with its prompt, rewards and step."""
    measure_kl: bool = True
    """Measure the KL divergence from the initial model even if the objective has no KL term, which costs one more
    forward pass a round."""
    sampler: Literal["engine", "vllm"] = "engine"
    """What generates: engine, CleanGPT's own; vllm, on GPUs, needs the package vllm."""

    @property
    def answers(self) -> int:
        """Answers in a round."""
        return self.prompts * self.completions

    @property
    def samples(self) -> int:
        """Samples that a round gives: each answer, once in each pass."""
        return self.answers * self.passes
