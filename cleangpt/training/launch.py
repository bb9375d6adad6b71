"""From an experiment to a run: resolve, check, prepare, open, build, train."""

import dataclasses
from pathlib import Path

import torch

from cleangpt.config import FineTuningConfig
from cleangpt.data.loader import Stream
from cleangpt.data.mixing import MixedDataset, split_samples, training_stream
from cleangpt.distributed.device import describe_device
from cleangpt.distributed.layout import Layout, state_bytes
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment, total_samples
from cleangpt.models.base import LanguageModel, flops_per_token
from cleangpt.tracking.metrics import metric_key


def check_row_length(experiment: Experiment) -> None:
    """Refuses a sample that is not a row, for a corpus of rows.

    Raises:
        UserError: `data.seq_len` is another than the corpus's row length - 1.
    """
    row_length = getattr(experiment.corpus, "row_length", None)
    if row_length is not None and experiment.data.seq_len != row_length - 1:
        raise UserError(
            f"data.seq_len is {experiment.data.seq_len}; allowed: {row_length - 1}, the corpus's row length - 1"
        )


def resolve(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with its model's vocabulary filled in from the tokenizer's.

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's.
    """
    model = experiment.model
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size is {model.vocab_size}; allowed: at least the tokenizer's {vocab_size}")
    model = dataclasses.replace(model, vocab_size=model.vocab_size or vocab_size)
    return dataclasses.replace(experiment, model=model)


def open_stream(experiment: Experiment, store: MixedDataset) -> Stream:
    """The training samples of the experiment's run; see `training_stream`."""
    return training_stream(store, experiment.data.seq_len, experiment.training.seed, total_samples(experiment))


def check_store(experiment: Experiment, store: MixedDataset) -> None:
    """Refuses a store that cannot be cut into the samples of the experiment.

    Raises:
        UserError: a split is too short, or its rows have another length; or a source of a mixture ends too soon.
    """
    open_stream(experiment, store)
    split_samples(store, "val", experiment.data.seq_len)


def summary(
    experiment: Experiment, run: Path, store: MixedDataset, model: LanguageModel, device: torch.device, layout: Layout
) -> list[str]:
    """What is about to be trained, on what, how much of it and in how much memory of each device, as lines."""
    data, training = experiment.data, experiment.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = f" ({trained:,} of them train)" if experiment.fine_tuning != FineTuningConfig() else ""
    micro_batch = training.micro_batch_size or data.batch_size // layout.dp_size
    kept = state_bytes(model) / (layout.shards * layout.tensor)
    activations = float(model.activation_bytes(micro_batch, data.seq_len))
    activations /= layout.tensor
    tokens = total_samples(experiment) * data.seq_len
    return [
        f"run      {run}",
        f"model    {parameters:,} parameters{share}, {flops_per_token(model, data.seq_len):,} FLOPs per token",
        f"memory   about {(kept + activations) / 2**30:.2f} GiB: weights, gradients and moments "
        f"{kept / 2**30:.2f}, activations {activations / 2**30:.2f}",
        *_data_lines(experiment, store),
        f"length   {training.macro_batches} macro-batches of {training.batches_per_macro_batch} batches "
        f"of {data.batch_size} x {data.seq_len} tokens: {tokens:,} tokens",
        f"device   {describe_device(device)}",
    ]


def _data_lines(experiment: Experiment, store: MixedDataset) -> list[str]:
    """A line for each source: its share of the run where there are several, its tokens, and how often it is visited."""
    progress = open_stream(experiment, store).progress(total_samples(experiment))
    samples = split_samples(store, "train", experiment.data.seq_len)
    lines = []
    for name, part in ((source.name, source.dataset) for source in store.sources):
        times = progress[metric_key("times_visited", name)]
        share = times * samples[name].num_training / total_samples(experiment)
        words = f"{name}: {100 * share:.2f} % of the samples, " if name else ""
        tokens = part.splits["train"].tokens
        lines.append(
            f"data     {words}{tokens:,} training tokens in {part.folder}, {times:.2f} times visited at the end"
        )
    return lines
