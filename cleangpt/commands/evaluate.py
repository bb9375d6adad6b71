"""evaluate RUN: loss, perplexity, bits per byte and task score of a run's best checkpoint"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands.fields import POSITIONAL
from cleangpt.commands.options import parse
from cleangpt.distributed.device import choose_device
from cleangpt.evaluation.evaluate import evaluate_run, table
from cleangpt.files import strict_json
from cleangpt.tracking.metrics import strict
from cleangpt.validation import Device, Metavar


@dataclasses.dataclass
class Options:
    """Options of `cleangpt evaluate`."""

    run: Annotated[str, POSITIONAL]
    """Folder of a run, or an experiment's name for its newest run."""
    checkpoint: Annotated[str, Metavar("NAME")] | None = None
    """Name of the checkpoint; None: the best."""
    split: Annotated[str, Metavar("NAME")] | None = None
    """Split of the dataset; None: test if there is one, else val."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: bool = False
    """Print JSON instead of a table."""


def command(words: Sequence[str]) -> None:
    """Evaluates a checkpoint on a full split."""
    about = "Loss, perplexity, bits per byte and task score on a full split; also written to RUN/evaluation.json."
    options = parse(Options, words, program="cleangpt evaluate", about=about)
    metrics = evaluate_run(find_run(options.run), options.checkpoint, options.split, choose_device(options.device))
    if options.json:
        print(strict_json(strict(metrics)))
    else:
        table(metrics)
