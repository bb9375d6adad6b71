"""Policies: their losses against the CPU in fp64, and how a GRPO round divides into sampling and learning."""

import copy
import dataclasses
from collections.abc import Iterator

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.gpu.correct import ALLOWED, CPU, error_of, sizes
from benchmarks.gpu.setup import Measurement, Setup
from benchmarks.made import close, make_trainer, shipped, train_macro_batch
from cleangpt.corpora import prepare
from cleangpt.data.batch import IGNORED, Batch
from cleangpt.distributed.device import autocast, check_precision, compute_dtype, set_fp32_precision
from cleangpt.errors import UserError
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.objectives import Objective
from cleangpt.objectives.grpo import GRPO
from cleangpt.objectives.policy import PolicyObjective
from cleangpt.objectives.ppo import PPO

OBJECTIVES: dict[str, PolicyObjective] = {
    "GRPO": GRPO(norm="token", clip_high=0.28, kl_coef=0.1, entropy_coef=0.01),
    "GSPO": GRPO(ratio="sequence", clip_low=0.1, clip_high=0.1),
    "PPO": PPO(entropy_coef=0.01),
}
GAP = {"fp32": 1e-4, "bf16": 0.2}
"""By precision: the largest difference of log-probabilities between sampler and trainer, in nats."""


def losses(setup: Setup) -> Iterator[Measurement]:
    """Loss and gradient of each objective on the same answers, in fp32 and bf16."""
    for name, objective in OBJECTIVES.items():
        torch.manual_seed(0)
        model = build_model(GPTConfig(**sizes(setup)), objective.heads)
        batch = answers(model, objective)
        yield from compare(setup, name, model, objective, batch)


def compare(setup: Setup, name: str, model: LanguageModel, objective: Objective, batch: Batch) -> Iterator[Measurement]:
    """The errors of loss and gradient on the device, in fp32 and bf16."""
    loss, gradient = computed(copy.deepcopy(model).double(), objective, batch, "fp32")
    for precision in ("fp32", "bf16"):
        try:
            check_precision(precision, setup.device)
        except UserError as error:
            yield Measurement(f"{name}, {precision}: all", note=str(error))
            continue
        set_fp32_precision(precision)
        found = computed(copy.deepcopy(model).to(setup.device), objective, batch.to(setup.device), precision)
        allowed = ALLOWED[precision][1]
        yield Measurement(f"{name}, {precision}: loss", error_of(found[0], loss), most=allowed)
        yield Measurement(f"{name}, {precision}: gradient", error_of(found[1], gradient), most=allowed)


@torch.no_grad()
def answers(model: LanguageModel, objective: PolicyObjective) -> Batch:
    """Random answers after prompts, which a slightly different policy has sampled; advantages, values and returns."""
    seq = model.max_seq_len
    tokens = torch.randint(model.config.vocab_size or 0, (8, seq + 1))
    places, lengths = torch.arange(seq), torch.arange(8) * (seq // 2) // 8 + 1
    mask = (places >= seq // 3) & (places < seq // 3 + lengths[:, None])
    targets = torch.where(mask, tokens[:, 1:], IGNORED)
    logprobs = model(tokens[:, :-1], targets=targets).logprobs
    extras = {name: torch.randn(8, seq) for name in ("advantages", "returns", "old_values")}
    extras |= {name: logprobs + 0.1 * torch.randn(8, seq) for name in ("old_logprobs", "reference_logprobs")}
    return Batch({"tokens": tokens[:, :-1].contiguous()}, targets, extras | {"fresh": torch.ones(8)})


def computed(model: LanguageModel, objective: Objective, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
    """The mean loss, and its gradient as one vector."""
    device = batch.targets.device
    with autocast(device, compute_dtype(device, precision)):
        loss = objective(model, batch).total / objective.count(batch.to(CPU))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.parameters()]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def grpo_round(setup: Setup) -> Iterator[Measurement]:
    """GRPO on three-digit addition by a model of GPT-2's size: what a round's time goes to."""
    model = setup.size(
        GPTConfig(n_layers=12, n_heads=12, dim=768), GPTConfig(n_layers=1, n_heads=2, dim=16)
    )  # fmt: skip
    for precision in setup.size(("fp32", "bf16"), ("fp32",)):
        experiment = shipped(
            "adder_grpo", tracking={"progress": False, "sample_tokens": 0, "score_samples": 0},
            rollouts={
                "prompts": setup.size(128, 4), "dynamic_sampling": False, "micro_batch_size": setup.size(1024, 16),
            },
            training={
                "batches_per_macro_batch": setup.size(4, 2), "macro_batches": 100, "device": str(setup.device),
                "precision": precision,
            },
            optimizer={"lr": 1e-5}, saving={"best": "highest train_reward"},
        )  # fmt: skip
        data = dataclasses.replace(experiment.data, batch_size=experiment.rollouts.answers // setup.size(4, 2))
        experiment = dataclasses.replace(experiment, data=data, model=model, init_from=None)
        folder = setup.folder / precision
        dataset = prepare(experiment.corpus, setup.folder / "data", console=Console(quiet=True)).sources[0].dataset
        trainer = make_trainer(experiment, dataset, folder)
        train_macro_batch(trainer)
        trainer.meter.reset()
        for _ in range(setup.size(3, 1)):
            train_macro_batch(trainer)
        rounds, seconds = setup.size(3, 1), trainer.meter.seconds
        metrics = trainer.source.metrics() | trainer.meter.mean_metrics()
        close(trainer)
        yield Measurement(f"{precision}: a round of {experiment.rollouts.answers} answers", seconds / rounds, "s")
        yield Measurement(f"{precision}: share of its time in sampling and scoring", trainer.meter.waited / seconds)
        for name in ("sampled", "learned"):
            if (speed := metrics.get(f"train_{name}_tokens_per_second")) is not None:
                yield Measurement(f"{precision}: {name}", speed, "tokens/s")
        gap = metrics["logprob_gap_max"]
        yield Measurement(f"{precision}: log-probability gap", gap, "nats", most=GAP[precision])
