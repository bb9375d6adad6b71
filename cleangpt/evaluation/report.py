"""`cleangpt evaluate`: the figures of a run's checkpoint over a whole split."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cleangpt.corpora import prepare
from cleangpt.data.batches import Samples, validation_batches
from cleangpt.errors import UserError, nearest
from cleangpt.evaluation import SCORES
from cleangpt.evaluation.validate import loss_figures, mean_loss
from cleangpt.files import write_json
from cleangpt.objectives import OBJECTIVES
from cleangpt.training.checkpoints import best_checkpoint, load_checkpoint
from cleangpt.training.device import autocast
from cleangpt.training.run import read_experiment


def evaluate_run(run: Path, checkpoint: str | None, split: str | None, device: torch.device) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the best) on a split (None: test, else val) and keeps RUN/evaluation.json.

    Raises:
        UserError: there is no such checkpoint or split.
    """
    experiment = read_experiment(run)
    folder = best_checkpoint(run) if checkpoint is None else _named(run, checkpoint)
    loaded = load_checkpoint(folder)
    store = prepare(experiment.corpus, Path(experiment.data.folder))
    name = split or ("test" if "test" in store.splits else "val")
    if name not in store.splits:
        raise UserError(f"--split is {name!r}; allowed: {', '.join(store.splits)}")
    model, part = loaded.model(device), store.splits[name]
    samples = Samples(part, experiment.data.seq_len, name)
    batches = validation_batches(samples, experiment.training.micro_batch_size or experiment.data.batch_size)
    context = autocast(device, experiment.training.precision)
    loss = mean_loss(model, OBJECTIVES[experiment.objective], batches, device, context)
    figures: dict[str, Any] = {
        "run": str(run),
        "checkpoint": folder.name,
        "split": name,
        "samples": samples.num_validation,
        "loss": loss,
        **loss_figures(loss, part),
    }
    if task := experiment.corpus.task:
        figures[task] = SCORES[task](model, part, None, device)
    write_json(run / "evaluation.json", figures)
    return figures


def table(figures: dict[str, Any]) -> None:
    """Prints figures as a table."""
    rows = Table(show_header=False)
    for name, value in figures.items():
        if value is not None:
            rows.add_row(name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else str(value))
    Console().print(rows)


def _named(run: Path, name: str) -> Path:
    folder = run / "checkpoints" / Path(name).name
    if not folder.is_dir():
        known = sorted(path.name for path in (run / "checkpoints").glob("val*"))
        raise UserError(f"--checkpoint is {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")
    return folder
