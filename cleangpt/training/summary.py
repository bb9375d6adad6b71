"""What a run prints before it starts, and when it has ended."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch

from cleangpt.checkpoints.run_folder import EXPERIMENT_FILE
from cleangpt.config import LENGTHS, FineTuningConfig
from cleangpt.data.images import IMAGES
from cleangpt.data.mixing import MixedDataset, split_samples
from cleangpt.distributed.device import choose_precision, describe_device
from cleangpt.distributed.layout import Layout, state_bytes
from cleangpt.experiment import Experiment, total_samples
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.models.vision import vision_of
from cleangpt.tracking.metrics import metric_key
from cleangpt.tracking.numbers import show_bytes, show_number
from cleangpt.training.resolve import open_stream


def summary(
    experiment: Experiment, run: Path, dataset: MixedDataset, model: LanguageModel, device: torch.device, layout: Layout
) -> list[str]:
    """The summary printed before a run starts: model, memory per device, data, length, device and precision."""
    data, training = experiment.data, experiment.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f" ({trained:,} of them train)" if experiment.fine_tuning != FineTuningConfig() else ""
    micro_batch = training.micro_batch_size or data.batch_size // layout.dp_size
    state = state_bytes(model) / (layout.shards * layout.tensor)
    activations = float(model.activation_bytes(micro_batch, data.seq_len)) / layout.tensor
    tokens = total_samples(experiment) * data.seq_len
    return [
        f"run      {run}",
        f"model    {parameters:,} parameters{share}, {flops_per_token(model, data.seq_len):,} FLOPs per token",
        f"memory   about {show_bytes(state + activations)}: weights, gradients and moments {show_bytes(state)}, "
        f"activations {show_bytes(activations)}",
        *(_rollout_lines(experiment) if experiment.objective.on_policy else _data_lines(experiment, dataset)),
        *_picture_lines(experiment, dataset),
        f"length   {training.num_macro_batches} macro-batches of {training.batches_per_macro_batch} batches "
        f"of {data.batch_size} x {data.seq_len} tokens: {tokens:,} tokens",
        f"device   {describe_device(device)}, precision {choose_precision(device, training.precision)}",
    ]


def _rollout_lines(experiment: Experiment) -> list[str]:
    """A line about the rounds of rollouts."""
    config, rounds = experiment.rollouts, total_samples(experiment) // experiment.rollouts.samples
    return [
        f"rollouts {rounds:,} rounds of {config.prompts:,} prompts x {config.completions} answers, {config.passes} "
        f"pass{'es' * (config.passes > 1)} over each; rewards: {', '.join(reward.name for reward in config.rewards)}"
    ]


def _data_lines(experiment: Experiment, dataset: MixedDataset) -> list[str]:
    """A line for each source: its share of a mixture's samples, its tokens, and how often they are visited."""
    progress = open_stream(experiment, dataset).progress(total_samples(experiment))
    samples = split_samples(dataset, "train", experiment.data.seq_len)
    lines = []
    for name, part in ((source.name, source.dataset) for source in dataset.sources):
        times = progress[metric_key("times_visited", name)]
        share = times * samples[name].num_training / total_samples(experiment)
        words = f"{name}: {show_number(100 * share, 2)} % of the samples, " if name else ""
        tokens = part.splits["train"].tokens
        lines.append(
            f"data     {words}{tokens:,} training tokens in {part.folder}, "
            f"{show_number(times, 2)} times visited at the end"
        )
    return lines


def _picture_lines(experiment: Experiment, dataset: MixedDataset) -> list[str]:
    """A line about pictures that prompts will have in tiles and the dataset has not."""
    edge = vision_of(experiment.model).longest_edge
    if not edge or IMAGES not in dataset.records:
        return []
    return [
        "pictures those of the dataset stay whole; sample and chat cut theirs into tiles or put them between special "
        f"tokens, since model.vision.longest_edge is {edge}; 0, and tiles False: as in training"
    ]


def length_asked(experiment: Experiment) -> list[str]:
    """A line about the length of the run, if it is not given in macro-batches."""
    given = {name: value for name in LENGTHS[1:] if (value := getattr(experiment.training, name)) is not None}
    return [f"given    training.{name} {value:,}, rounded up to full macro-batches" for name, value in given.items()]


def next_commands(experiment: Experiment, run: Path, source: Path | None) -> list[str]:
    """The command lines that show what a run has learned; those for classes of one's own name the file of these."""
    copy = run / EXPERIMENT_FILE
    file = source or (copy if copy.is_file() else Path("FILE.py"))
    code = ["--code", str(file)] if _has_own_classes(experiment) else []
    calls = [["evaluate", str(run), *code], ["sample", str(run), *code], ["report", str(run)]]
    return [f"  {shlex.join(['cleangpt', *words])}" for words in calls]


def _has_own_classes(config: Any) -> bool:
    """Whether a dataclass, or one that it holds, is defined outside CleanGPT."""
    values = [getattr(config, entry.name) for entry in dataclasses.fields(config)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    own = type(config).__module__.partition(".")[0] != "cleangpt"
    return own or any(_has_own_classes(part) for part in parts if dataclasses.is_dataclass(part))
