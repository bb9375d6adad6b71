"""Fills in the fields that depend on the data: vocabulary, context length, and the length of the run."""

import math
from bisect import bisect_left
from dataclasses import replace

from cleangpt.config import peak
from cleangpt.data.loader import Stream
from cleangpt.data.mixing import MixedDataset, split_samples, training_stream
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment, samples_per_macro_batch, total_samples
from cleangpt.training.schedules import accumulation, step_plan


def resolve(experiment: Experiment, vocab_size: int, epoch: int | None = None) -> Experiment:
    """The experiment with all fields filled in that depend on the tokenizer and the data.

    Args:
        experiment: as its author wrote it.
        vocab_size: of the tokenizer.
        epoch: samples in the training split; None: unknown, or a mixture.

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's, or the length is in epochs of unknown size.
    """
    model = experiment.model
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size is {model.vocab_size}; allowed: at least the tokenizer's {vocab_size}")
    experiment = replace(experiment, model=model.resolved(vocab_size, experiment.data.seq_len))
    return with_length(experiment, macro_batches(experiment, epoch))


def resolve_with(experiment: Experiment, dataset: MixedDataset) -> Experiment:
    """`resolve` with a prepared dataset."""
    if experiment.objective.on_policy:
        return resolve(experiment, dataset.vocab_size)
    samples = list(split_samples(dataset, "train", experiment.data.seq_len).values())
    return resolve(experiment, dataset.vocab_size, samples[0].num_training if len(samples) == 1 else None)


def with_length(experiment: Experiment, length: int) -> Experiment:
    """The experiment with a run of `length` macro-batches."""
    training = replace(experiment.training, macro_batches=length, steps=None, tokens=None, epochs=None)
    return replace(experiment, training=training)


def macro_batches(experiment: Experiment, epoch: int | None = None) -> int:
    """Length of the run in macro-batches: the fewest that contain the given steps, tokens or epochs.

    Raises:
        UserError: the size of an epoch is unknown.
    """
    training = experiment.training
    if training.macro_batches is not None:
        return training.macro_batches
    if training.steps is not None:
        return _macro_batches_of_steps(experiment, training.steps)
    if training.tokens is not None:
        samples = -(-training.tokens // experiment.data.seq_len)
    elif epoch is None:
        raise UserError(
            f"training.epochs is {training.epochs}; allowed for a mixture, and before the corpus is prepared: None; "
            "give training.steps or training.tokens"
        )
    else:
        samples = math.ceil(epoch * (training.epochs or 0))
    return max(1, -(-samples // samples_per_macro_batch(experiment)))


def _macro_batches_of_steps(experiment: Experiment, steps: int) -> int:
    training, batch_size = experiment.training, experiment.schedule.batch_size
    largest = max(1, round(training.accumulation * peak(batch_size)))
    longest = -(-steps // -(-training.batches_per_macro_batch // largest))
    if batch_size.shape == "constant" and not batch_size.warmup:
        return longest
    # While steps are smaller, a macro-batch has more of them: at most one per batch.
    lengths = range(-(-steps // training.batches_per_macro_batch), longest + 1)
    return lengths[bisect_left(lengths, steps, key=lambda length: num_steps(with_length(experiment, length)))]


def num_steps(experiment: Experiment) -> int:
    """Optimizer steps in the whole run, whose length has been resolved."""
    samples = steps = 0
    while samples < total_samples(experiment):
        samples += accumulation(experiment, samples) * experiment.data.batch_size
        steps += 1
    return steps


def planned_steps(experiment: Experiment) -> int:
    """Estimated number of steps of the run; exact if every step has the same number of batches."""
    return math.ceil(total_samples(experiment) / (experiment.data.batch_size * experiment.training.accumulation))


def open_stream(experiment: Experiment, dataset: MixedDataset) -> Stream:
    """The training samples of the experiment's run; see `training_stream`."""
    return training_stream(dataset, experiment.data.seq_len, experiment.training.seed, total_samples(experiment))


def curves(experiment: Experiment) -> tuple[list[int], dict[str, list[float]]]:
    """Every step of the planned run: the samples before it, its learning rate, weight decay and training batch size."""
    samples, seen = 0, []
    planned: dict[str, list[float]] = {"lr": [], "weight_decay": [], "training_batch_size": []}
    while samples < total_samples(experiment):
        step = step_plan(experiment, samples)
        training_batch_size = step.accumulation * experiment.data.batch_size
        seen.append(samples)
        planned["lr"].append(step.lr)
        planned["weight_decay"].append(step.weight_decay)
        planned["training_batch_size"].append(training_batch_size)
        samples += training_batch_size
    return seen, planned
