"""What rollouts are put together from: checks of the configuration, and the engine."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from cleangpt.config import DataConfig, LoRAConfig, ModelConfig, Schedule, TrainingConfig
from cleangpt.distributed.layout import Layout
from cleangpt.environments.config import RolloutConfig
from cleangpt.errors import UserError
from cleangpt.inference.engine import Engine
from cleangpt.models.base import LanguageModel
from cleangpt.rollouts.episodes import Sampler
from cleangpt.rollouts.scoring import check_rewards


def check_rollouts(
    config: RolloutConfig, data: DataConfig, training: TrainingConfig, batch_size: Schedule, model: ModelConfig,
    lora: LoRAConfig, layout: Layout, best: str,
) -> None:  # fmt: skip
    """Checks that rounds, batches, steps and macro-batches divide one another, and what else rollouts cannot do.

    Raises:
        UserError: one line naming the fields, their values and what is allowed.
    """
    check_rewards(config)
    rounds = f"rollouts.prompts x rollouts.completions is {config.answers:,} answers"
    if config.answers % data.batch_size:
        raise UserError(f"data.batch_size is {data.batch_size}; allowed: a divisor of the round, whose {rounds}")
    per_macro_batch = training.batches_per_macro_batch * data.batch_size
    if per_macro_batch % config.samples:
        raise UserError(
            f"training.batches_per_macro_batch is {training.batches_per_macro_batch}; allowed: a multiple of "
            f"{config.samples // data.batch_size}, since a macro-batch is a whole number of rounds: {rounds}, "
            f"rollouts.passes is {config.passes}"
        )
    if config.samples // data.batch_size % training.accumulation:
        raise UserError(
            f"training.accumulation is {training.accumulation}; allowed: a divisor of the "
            f"{config.samples // data.batch_size} batches of a round"
        )
    if batch_size.shape != "constant" or batch_size.warmup or batch_size.initial != 1:
        raise UserError("schedule.batch_size changes; allowed with rollouts: constant, since a round has whole steps")
    dropout = {"model.dropout": getattr(model, "dropout", 0.0), "fine_tuning.lora.dropout": lora.dropout}
    for name, value in dropout.items():
        if value:
            raise UserError(f"{name} is {value}; allowed with rollouts: 0, since dropout would make another policy")
    if best.endswith(" val_loss"):
        raise UserError(
            f"saving.best is {best!r}, which a policy does not have; allowed: a score of its tasks, such as 'highest "
            "exact_match', or 'highest train_reward'"
        )
    if layout.tensor > 1:
        raise UserError(
            "parallel.strategy is tp, or parallel.tensor above 1; allowed with rollouts: ddp, fsdp and hsdp"
        )
    if config.importance_cap is not None and config.old_logprobs != "recomputed":
        raise UserError(
            f"rollouts.importance_cap is {config.importance_cap}; allowed with old_logprobs sampled: None, since there "
            "is no other probability to compare with"
        )


@contextlib.contextmanager
def open_sampler(
    config: RolloutConfig, model: LanguageModel, device: torch.device, vocab_size: int, reshard: bool,
    context: Callable[[], AbstractContextManager[Any]],
) -> Iterator[Sampler]:  # fmt: skip
    """What samples from a model's current weights, within the `context` of an uncompiled model.

    Weights that are sharded are gathered for as long as it lasts.
    """
    with context(), gathered(model, reshard):
        yield Engine(model, device, vocab_size=vocab_size, max_batch=config.micro_batch_size, sampled_logprobs=True)


@contextlib.contextmanager
def gathered(model: LanguageModel, reshard: bool) -> Iterator[None]:
    """Keeps weights that FSDP shards whole on every device, so that generation gathers them once, not per token.

    Until then no process waits for another, so they need not generate equally many tokens. Afterwards blocks are
    sharded again after their forward pass if `reshard`.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(reshard and module is not model, recurse=False)
