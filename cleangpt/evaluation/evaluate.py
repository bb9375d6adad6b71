"""`cleangpt evaluate`: the figures of a run's checkpoint over a whole split."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cleangpt.checkpoints.checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.corpora import prepare
from cleangpt.corpora.mixture import tasks
from cleangpt.data.loader import validation_batches
from cleangpt.data.mixing import Store, mean_shares, split_samples, stores
from cleangpt.distributed.device import autocast, compute_dtype
from cleangpt.errors import UserError, nearest
from cleangpt.evaluation.tasks import SCORES
from cleangpt.evaluation.validate import loss_figures, mean_loss, source_figures
from cleangpt.experiment import Experiment
from cleangpt.files import write_json
from cleangpt.tracking.metrics import of_source


def evaluate_run(run: Path, checkpoint: str | None, split: str | None, device: torch.device) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the best) on a split (None: test, else val) and keeps RUN/evaluation.json.

    Raises:
        UserError: there is no such checkpoint or split.
    """
    experiment = read_experiment(run)
    folder = best_checkpoint(run) if checkpoint is None else _named(run, checkpoint)
    loaded = load_checkpoint(folder)
    store = prepare(experiment.corpus, Path(experiment.data.folder))
    _check(experiment, loaded, store)
    name = _split(store, split)
    model, splits = loaded.model(device), {source: part.splits[name] for source, part in stores(store).items()}
    samples = split_samples(store, name, experiment.data.seq_len)
    context = autocast(device, compute_dtype(device, experiment.training.precision))
    data, losses = experiment.data, {}
    size = data.val_batch_size or experiment.training.micro_batch_size or data.batch_size
    for source, part in samples.items():
        batches = validation_batches(part, min(size, part.num_validation))
        losses[source] = mean_loss(model, experiment.objective, batches, device, context)
    loss = sum(share * losses[source] for source, share in mean_shares(store).items())
    figures: dict[str, Any] = {
        "run": str(run),
        "checkpoint": folder.name,
        "split": name,
        "samples": sum(part.num_validation for part in samples.values()),
        "loss": loss,
        **loss_figures(loss, splits.get("")),
        **source_figures("loss", losses, splits),
    }
    for source, task in tasks(experiment.corpus).items():
        figures[of_source(task, source)] = SCORES[task](model, splits[source], None, device)
    write_json(run / "evaluation.json", figures)
    return figures


def table(figures: dict[str, Any]) -> None:
    """Prints figures as a table."""
    rows = Table(show_header=False)
    for name, value in figures.items():
        if value is not None:
            rows.add_row(name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else str(value))
    Console().print(rows)


def _check(experiment: Experiment, checkpoint: Checkpoint, store: Store) -> None:
    """Refuses a run whose parts do not belong together."""
    model = checkpoint.config
    for name, needed, most in (
        ("tokens", store.vocab_size, model.vocab_size or 0),
        ("positions", experiment.data.seq_len, model.max_seq_len or 0),
    ):
        if needed > most:
            raise UserError(f"{checkpoint.folder} knows {most:,} {name}, its run has {needed:,}: it is of another run")


def _split(store: Store, wanted: str | None) -> str:
    """The split to evaluate: every source must have it."""
    first, *others = (part.splits for part in stores(store).values())
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
