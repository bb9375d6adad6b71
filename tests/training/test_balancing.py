"""Experts that too many tokens go to are chosen less, whatever the number of processes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.distributed.parallelize import apply_activation_checkpointing
from cleangpt.models.llama import Llama, LlamaConfig
from cleangpt.models.moe import MixtureOfExperts
from cleangpt.training.balancing import ExpertLoadBalancer
from tests.forked import run_together
from tests.losses import next_token

MIXED = LlamaConfig(
    vocab_size=32, max_seq_len=16, n_layers=2, n_heads=2, dim=16, hidden_dim=16, n_experts=8, bias_update_rate=0.01
)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def skewed(config: LlamaConfig) -> Llama:
    """Most tokens prefer the first experts by far."""
    torch.manual_seed(0)
    model = Llama(config)
    torch.manual_seed(0)
    for block in model.blocks:
        nn.init.normal_(block.mlp.router.weight, std=0.2)
        block.mlp_norm.register_forward_hook(lambda module, inputs, x: x + 1)
        block.mlp.router.weight.data[:2] += 0.2
    return model


def counting(counts: Tensor) -> Callable[[MixtureOfExperts, tuple[Tensor], Tensor], None]:
    """A hook that counts the tokens of each expert by itself."""

    def hook(mixture: MixtureOfExperts, inputs: tuple[Tensor], output: Tensor) -> None:
        counts.add_(mixture.route(inputs[0].flatten(0, 1))[0].flatten().bincount(minlength=len(counts)))

    return hook


def load_after(config: LlamaConfig, steps: int) -> float:
    """Trains on fixed samples; tokens of the busiest expert over the mean, in the worst layer, in the last 50 steps."""
    model, tokens = skewed(config), torch.randint(32, (8, 17), generator=torch.Generator().manual_seed(0))
    balancing = ExpertLoadBalancer(model, alone)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    counts, loads = torch.zeros(len(model.blocks), 8), []
    for block, count in zip(model.blocks, counts, strict=True):
        block.mlp.register_forward_hook(counting(count))
    for _ in range(steps):
        next_token(model, tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        balancing.step()
        optimizer.zero_grad()
        loads.append((counts.amax(dim=1) / counts.mean(dim=1)).max().item())
        counts.zero_()
    return sum(loads[-50:]) / 50


@pytest.mark.slow
def test_a_router_that_prefers_few_experts_comes_to_use_all() -> None:
    """With two of eight experts a token, 4 is the worst load and 1 the best."""
    assert load_after(replace(MIXED, bias_update_rate=None), 200) > 3
    assert load_after(replace(MIXED, bias_update_rate=0.003), 200) < 2


def test_a_step_moves_each_bias_by_the_rate_towards_the_mean() -> None:
    """Wang et al. 2024, algorithm 1: 12 tokens go through 2 of 8 experts each, so the mean is 3."""
    model = Llama(replace(MIXED, n_layers=1))
    balancing = ExpertLoadBalancer(model, lambda counts: counts + torch.tensor([5, 3, 2, 0, 3, 4, 3, 4]))
    balancing.step()
    expected = [-0.01, 0, 0.01, 0.01, 0, -0.01, 0, -0.01]
    torch.testing.assert_close(model.blocks[0].mlp.router_bias.data, torch.tensor(expected))


def test_counts_are_those_of_training_since_the_last_step() -> None:
    model, tokens = Llama(MIXED), torch.randint(32, (3, 16))
    seen: list[Tensor] = []
    balancing = ExpertLoadBalancer(model, lambda counts: seen.append(counts.clone()) or counts)
    for micro_batch in tokens:
        model(micro_batch[None])
    model.eval()(tokens)
    balancing.step()
    model.train()(tokens[:1])
    balancing.step()
    assert [counts.sum(dim=1).tolist() for counts in seen] == [[96, 96], [32, 32]]


def test_recomputed_activations_move_the_biases_alike() -> None:
    tokens, biases = torch.randint(32, (3, 17)), []
    for every, selective in ((None, False), (1, False), (1, True)):
        torch.manual_seed(0)
        model = Llama(MIXED)
        apply_activation_checkpointing(model, every, selective)
        balancing = ExpertLoadBalancer(model, alone)
        next_token(model, tokens[:, :-1], tokens[:, 1:]).backward()
        balancing.step()
        biases.append([block.mlp.router_bias.data for block in model.blocks])
    torch.testing.assert_close(biases[0], biases[1])
    torch.testing.assert_close(biases[0], biases[2])


def test_a_model_without_biases_is_left_alone() -> None:
    model = Llama(replace(MIXED, bias_update_rate=None))
    ExpertLoadBalancer(model, alone).step()
    assert all(module.tokens_per_expert is None for module in model.modules() if isinstance(module, MixtureOfExperts))


EXPERIMENT = """
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.adder import Adder
from cleangpt.models.llama import LlamaConfig
from cleangpt.objectives import NextToken

corpus = Adder(digits=2)

experiment = Experiment(
    name="balanced",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=8, val_samples=16),
    model=LlamaConfig(
        max_seq_len=16, n_layers=2, n_heads=2, dim=16, hidden_dim=16, n_experts=6, n_shared_experts=1,
        bias_update_rate=0.01, value_residual=True, activation="relu2", logit_soft_cap=30.0, separator=0,
    ),
    optimizer=OptimizerConfig(lr=3e-3),
    objective=NextToken(z_loss=1e-4),
    training=TrainingConfig(
        macro_batches=2, batches_per_macro_batch=12, accumulation=2, micro_batch_size=2, device="cpu", threads=1
    ),
    tracking=TrackingConfig(progress=False, sample_tokens=0, score_samples=0),
)
"""


def train(run: str, processes: int, *words: str) -> dict[str, Tensor]:
    """The weights at the end."""
    outcome = run_together(processes, "train", "balanced.py", "--run-dir", run, *words)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    weights: dict[str, Tensor] = load_snapshot(list_snapshots(Path(run) / "snapshots")[0])["model"]
    return weights


@pytest.mark.slow
def test_several_processes_balance_as_one_does(workplace: Path) -> None:
    """With every optional part that has no weights of its own, and a z-loss."""
    (workplace / "balanced.py").write_text(EXPERIMENT)
    single = train("single", 1)
    biases = [weights for name, weights in single.items() if name.endswith("router_bias")]
    assert len(biases) == 2 and all(bias.abs().max() > 0.02 for bias in biases)
    for strategy in ("ddp", "fsdp"):
        for name, weights in train(strategy, 2, "--parallel.strategy", strategy).items():
            torch.testing.assert_close(weights, single[name], atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n} {m}")
