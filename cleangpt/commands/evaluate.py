"""evaluate RUN: loss, perplexity, bits per byte and task score of a run's best checkpoint"""

import dataclasses
from collections.abc import Sequence

import tyro

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands.options import parse
from cleangpt.config import Device
from cleangpt.distributed.device import choose_device
from cleangpt.evaluation.evaluate import evaluate_run, table
from cleangpt.experiment_files import run_code
from cleangpt.files import strict_json
from cleangpt.tracking.metrics import strict


@dataclasses.dataclass
class Options:
    """Options of `cleangpt evaluate`."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or an experiment's name for its newest run."""
    checkpoint: str | None = None
    """Name of the checkpoint; None: the best."""
    split: str | None = None
    """Split of the dataset; None: test if there is one, else val."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    code: str | None = None
    """Your own Python file to run first, which registers your own model or corpus."""
    json: bool = False
    """Print JSON instead of a table."""


def command(words: Sequence[str]) -> None:
    """Evaluates a checkpoint on a full split."""
    about = "Loss, perplexity, bits per byte and task score on a full split; also written to RUN/evaluation.json."
    options = parse(Options, words, program="cleangpt evaluate", about=about)
    run_code(options.code)
    metrics = evaluate_run(find_run(options.run), options.checkpoint, options.split, choose_device(options.device))
    if options.json:
        print(strict_json(strict(metrics)))
    else:
        table(metrics)
