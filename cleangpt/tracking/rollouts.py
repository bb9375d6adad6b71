"""The metrics of rollouts: label, unit and meaning of each; in metrics.jsonl their keys begin with ``train_``.

All are of the policy that sampled a round, and means over the rounds of a macro-batch; those of the loss, such as the
shares of clipped tokens, are the objective's.
"""

ROLLOUTS: dict[str, tuple[str, str, str]] = {
    "reward": ("training reward", "", "mean reward of an answer; of one of several rewards: before its weight"),
    "drawn_reward": ("reward of all draws", "", "the same with the answers that dynamic sampling leaves out"),
    "best_reward": ("best reward of a prompt", "", "of its best answer, mean over prompts drawn; of 0 and 1: pass@n"),
    "reward_std": ("spread of rewards", "", "standard deviation of the rewards of a round"),
    "groups_without_signal": ("groups without signal", "share", "share of prompts drawn whose answers all score alike"),
    "draws": ("draws", "", "prompts drawn for a round, over the prompts in it"),
    "prompts": ("prompts drawn", "", "prompts drawn since the start of the run"),
    "kl": ("KL from the start", "nats", "mean over answers of log π - log π_ref, π_ref the initial model (k1)"),
    "kl_k3": ("KL from the start, k3", "nats", "the same divergence by an estimator of less variance"),
    "kl_coef": ("KL coefficient", "", "coefficient of the KL term in the reward"),
    "entropy": ("entropy", "nats", "mean over sampled tokens of -log π, an estimate of the policy's entropy"),
    "answer_length": ("answer length", "tokens", "the policy's own tokens in an answer, on average"),
    "length_of_better": ("length of better answers", "tokens", "of answers with more than the round's mean reward"),
    "length_of_worse": ("length of worse answers", "tokens", "of all others"),
    "unscored_share": ("unscored answers", "share", "share of answers that no reward scores, which are left out"),
    "truncated_share": ("truncated answers", "share", "share of answers that ran into the limit of tokens"),
    "reward_errors": ("failed rewards", "", "rewards that raised an exception or took too long, per round"),
    "explained_variance": ("explained variance", "", "1 - Var(returns - values) / Var(returns)"),
    "value_loss": ("value loss", "", "half the squared error of the values, clipped, per token"),
    "clip_low": ("clipped low", "share", "tokens with A < 0 whose ratio is below the clipping range"),
    "clip_high": ("clipped high", "share", "tokens with A > 0 whose ratio is above the clipping range"),
    "ratio_max": ("largest ratio", "", "largest ratio of a token's, or an answer's, new and old probability"),
    "logprob_gap_max": (
        "log-probability gap", "nats", "largest difference between sampler and trainer before a round's first update"
    ),
    "sampled_tokens_per_second": ("sampled tokens per second", "tokens/s", "tokens generated per second of rollouts"),
    "learned_tokens_per_second": ("learned tokens per second", "tokens/s", "answers' tokens per second of training"),
}  # fmt: skip
