"""`cleangpt evaluate`: the metrics of a run's checkpoint over a split."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cleangpt.checkpoints.checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.corpora.mixture import environments
from cleangpt.data.loader import validation_batches
from cleangpt.data.mixing import MixedDataset, mean_shares, split_samples
from cleangpt.distributed.device import autocast, compute_dtype
from cleangpt.environments.base import Environment
from cleangpt.errors import UserError, nearest
from cleangpt.evaluation.control import act_otherwise, evaluate_environments, simulations
from cleangpt.evaluation.datasets import open_dataset
from cleangpt.evaluation.margins import draw_margins, margins
from cleangpt.evaluation.pictures import draw_scores, film
from cleangpt.evaluation.validate import loss_metrics, source_metrics, validate
from cleangpt.experiment import Experiment
from cleangpt.files import write_json
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.pairs import PairObjective
from cleangpt.screen import Screen
from cleangpt.tracking.metrics import strict
from cleangpt.tracking.numbers import show_number


def evaluate_run(
    run: Path, checkpoint: str | None, split: str | None, device: torch.device, videos: int = 0,
    episodes: int | None = None, acting: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a checkpoint (None: the best) on a split (None: test, else val) and writes RUN/evaluation.json.

    Of pairs, a histogram of their margins is drawn; of simulations, that many `videos` of each are written to
    RUN/videos, with a contact sheet, and `episodes` and fields of `Acting` may be other than in training.

    Raises:
        UserError: there is no such checkpoint or split, the checkpoint does not fit the run, the dataset is not the one
            that the run was trained with, or it has no simulation to act in otherwise.
    """
    experiment = read_experiment(run)
    experiment = replace(experiment, corpus=act_otherwise(experiment.corpus, episodes, acting or {}))
    folder = best_checkpoint(run) if checkpoint is None else _named(run, checkpoint)
    loaded = load_checkpoint(folder)
    dataset = open_dataset(run, experiment)
    _check(experiment, loaded, dataset)
    name = _split(dataset, split)
    metrics: dict[str, Any] = {"run": str(run), "checkpoint": folder.name, "split": name}
    if acting:
        metrics["acting"] = ", ".join(f"{field}={value}" for field, value in acting.items())
    model, found = loaded.model(device), environments(experiment.corpus, dataset)
    if (episodes or acting) and not simulations(found):
        raise UserError(f"{run} has no simulation, which --episodes and --acting are of")
    metrics |= evaluate(model, experiment, dataset, found, name, device)
    if isinstance(experiment.objective, PairObjective):
        samples = split_samples(dataset, name, experiment.data.seq_len).values()
        context = autocast(device, compute_dtype(device, experiment.training.precision))
        draw_margins(margins(model, experiment.objective, samples, device, context), run)
    draw_scores(metrics, list(found), run / "plots" / "tasks.png")
    if videos:
        metrics["videos"] = str(film(model, found, name, videos, device, run / "videos"))
    write_json(run / "evaluation.json", strict(metrics))
    return metrics


def evaluate(
    model: LanguageModel, experiment: Experiment, dataset: MixedDataset, found: Mapping[str, Environment], split: str,
    device: torch.device,
) -> dict[str, float | None]:  # fmt: skip
    """The objective's metrics over a split and the mean rewards over all its tasks.

    Args:
        model: in evaluation mode, on `device`.
        experiment: with which the model was trained.
        dataset: of the experiment's corpus.
        found: the environments of its sources.
        split: of the dataset.
        device: of the model.

    Returns:
        For a mixture, the mean of each metric, weighted by the sources' shares, and the loss of each source.
    """
    if experiment.objective.on_policy:
        return dict(evaluate_environments(model, found, split, device, dataset.vocab_size))
    data, splits = experiment.data, {source.name: source.dataset.splits[split] for source in dataset.sources}
    context = autocast(device, compute_dtype(device, experiment.training.precision))
    size = data.val_batch_size or experiment.training.micro_batch_size or data.batch_size
    samples, results = split_samples(dataset, split, data.seq_len), {}
    if experiment.objective.scores_answers:
        model.scored_vocab = dataset.vocab_size
    for source, part in samples.items():
        batches = validation_batches(part, min(size, part.num_validation))
        results[source] = validate(model, experiment.objective, batches, device, context)
    shares = mean_shares(dataset)
    first, *_ = results.values()
    means = {name: sum(share * results[source][name] for source, share in shares.items()) for name in first}
    losses = {source: result["loss"] for source, result in results.items()}
    metrics: dict[str, float | None] = {
        "samples": sum(part.num_validation for part in samples.values()),
        "loss": means["loss"],
        **(loss_metrics(means["loss"], splits.get("")) if experiment.objective.per_token else {}),
        **means,
        **source_metrics("loss", losses, splits),
    }
    return metrics | evaluate_environments(model, found, split, device, dataset.vocab_size)


def table(metrics: dict[str, Any]) -> None:
    """Prints metrics as a table."""
    rows = Table(show_header=False)
    for name, value in metrics.items():
        if value is not None:
            rows.add_row(name.replace("_", " "), _show(value))
    Screen().print(rows)


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.4f}" if abs(value) >= 1000 else show_number(value, 4)


def _check(experiment: Experiment, checkpoint: Checkpoint, dataset: MixedDataset) -> None:
    """Refuses a run whose experiment and checkpoint do not belong together."""
    model = checkpoint.config
    for name, needed, most in (
        ("tokens", dataset.vocab_size, model.vocab_size or 0),
        ("positions", experiment.data.seq_len, model.max_seq_len or 0),
    ):
        if needed > most:
            raise UserError(f"{checkpoint.folder} has {most:,} {name}, its run {needed:,}: it belongs to another run")


def _split(dataset: MixedDataset, wanted: str | None) -> str:
    """The split to evaluate; every source must have it."""
    first, *others = (source.dataset.splits for source in dataset.sources)
    known = [name for name in first if all(name in splits for splits in others)]
    name = wanted or ("test" if "test" in known else "val")
    if name not in known:
        raise UserError(f"--split is {name!r}; allowed: {', '.join(known)}")
    return name


def _named(run: Path, name: str) -> Path:
    folder = run / "checkpoints" / Path(name).name
    if not folder.is_dir():
        known = sorted(path.name for path in (run / "checkpoints").glob("val*"))
        raise UserError(f"--checkpoint is {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")
    return folder
