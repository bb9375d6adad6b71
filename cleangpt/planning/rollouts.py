"""What a policy's rounds take besides its updates: sampling, and passes over the answers without gradient."""

import math

from cleangpt.distributed.layout import Layout
from cleangpt.environments.config import RolloutConfig
from cleangpt.objectives.policy import PolicyObjective
from cleangpt.planning.communication import BANDWIDTH_SHARE, LAUNCH_SECONDS
from cleangpt.planning.memory import Blocks
from cleangpt.planning.timing import Machine
from cleangpt.planning.workload import Workload
from cleangpt.rollouts.reference import reads_reference


def round_seconds(
    config: RolloutConfig, objective: PolicyObjective, micro_batch: int, seq_len: int, work: Workload, blocks: Blocks,
    layout: Layout, machine: Machine,
) -> tuple[float, float]:  # fmt: skip
    """Seconds per round of sampling, and of passes without gradient: the reference's, values, recomputed probabilities.

    Every answer is taken to be as long as a sample, and no prompt to be drawn in vain.

    Args:
        config: of the rollouts.
        objective: of the policy.
        micro_batch: samples in a forward pass on a device.
        seq_len: tokens in a sample.
        work: of a micro-batch.
        blocks: from `memory.kinds_of_blocks`.
        layout: how the processes share the model.
        machine: what computes.
    """
    chunks = math.ceil(config.answers / config.micro_batch_size / layout.dp_size)
    rows = min(config.micro_batch_size, config.answers)
    sampling = chunks * seq_len * token_seconds(rows, micro_batch * seq_len, work, blocks, machine)
    count = reads_reference(config, objective) + ("value" in objective.heads or config.old_logprobs == "recomputed")
    forward = machine.seconds(work.rest.forward, False) + sum(
        number * machine.seconds(passes.forward, True) for number, passes in blocks
    )
    return sampling, count * math.ceil(config.answers / layout.dp_size / micro_batch) * forward


def token_seconds(rows: int, tokens: int, work: Workload, blocks: Blocks, machine: Machine) -> float:
    """Seconds until each of `rows` answers has one token more: the weights and the answers' keys and values are read.

    The answers are half as long as a sample, on average, and have as many heads of keys as of queries.

    Args:
        rows: generated together.
        tokens: in the micro-batch of `work`.
        work: of a micro-batch.
        blocks: from `memory.kinds_of_blocks`.
        machine: what computes; generation is not compiled.
    """
    forward = sum((passes.forward * count for count, passes in blocks), work.rest.forward)
    flops = (forward.matmul_flops + forward.attention_flops) * rows / tokens
    cached = forward.attention_flops * rows / tokens / 2  # 4 FLOPs for a feature of a key and of its value
    arithmetic = flops / (machine.device.flops(machine.base) * machine.device.matmul_share)
    moved = machine.weight_bytes * (work.parameters + cached) / (machine.device.bandwidth * BANDWIDTH_SHARE)
    return max(arithmetic, moved, LAUNCH_SECONDS * forward.kernels)
