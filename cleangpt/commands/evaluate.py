"""evaluate RUN: loss, perplexity, bits per byte and task score of a run's best checkpoint"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands.fields import POSITIONAL, find_options
from cleangpt.commands.options import parse, read_arguments
from cleangpt.distributed.device import choose_device
from cleangpt.environments.acting import Acting
from cleangpt.errors import UserError
from cleangpt.evaluation.against import compare
from cleangpt.evaluation.best_of_n import best_of_n
from cleangpt.evaluation.evaluate import evaluate_run, table
from cleangpt.files import strict_json
from cleangpt.tracking.metrics import strict
from cleangpt.validation import Count, CountOrZero, Device, File, Metavar, NonNegative, RunOrModel


@dataclasses.dataclass
class Options:
    """Options of `cleangpt evaluate`."""

    run: Annotated[str, POSITIONAL]
    """Folder of a run, or an experiment's name for its newest run."""
    checkpoint: Annotated[str, Metavar("NAME")] | None = None
    """Name of the checkpoint; None: the best."""
    split: Annotated[str, Metavar("NAME")] | None = None
    """Split of the dataset; None: test if there is one, else val."""
    against: RunOrModel | None = None
    """Compare answers with those of another run, checkpoint or Hugging Face model (hf:NAME) instead."""
    best_of: Count | None = None
    """Instead: what the best of n answers is worth that --judge chooses, for n up to this number."""
    judge: tuple[File, ...] = ()
    """With --against or --best-of: what scores answers: a run with a reward model, or a Python file with a function
    score(prompt, answer); --best-of compares several. Without it, --against uses the corpus's own score."""
    samples: Count = 1000
    """With --against: maximum number of prompts."""
    temperature: NonNegative = 1.0
    """With --against: sampling temperature; at 1 the KL divergence from the other model is measured, too."""
    seed: CountOrZero = 0
    """With --against or --best-of: random seed of the first prompt's answer."""
    episodes: Count | None = None
    """Episodes of each simulation that an agent is scored by; None: as in training."""
    acting: tuple[Annotated[str, Metavar("FIELD=VALUE")], ...] = ()
    """How agents choose actions where it differs from training, such as temperature=0.3 see_actions=false."""
    videos: CountOrZero = 0
    """Episodes of each simulation to film, as MP4 or GIF in RUN/videos, with a contact sheet."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: bool = False
    """Print JSON instead of a table."""


def command(words: Sequence[str]) -> None:
    """Evaluates a checkpoint on a full split."""
    about = (
        "Loss, perplexity, bits per byte and task score on a full split, also written to RUN/evaluation.json; or, with "
        "--against, how often its answers are better than another model's, also written to RUN/against.json; or, with "
        "--best-of, what the answers that a judge chooses are worth, also drawn in RUN/plots/best_of_n.png."
    )
    options = parse(Options, words, program="cleangpt evaluate", about=about)
    run, device = find_run(options.run), choose_device(options.device)
    metrics: dict[str, Any]
    if options.best_of is not None:
        split = options.split or "val"
        curves = best_of_n(run, options.judge, most=options.best_of, split=split, seed=options.seed, device=device)
        metrics = {f"{judge}, best of {row['n']}": row["true score"] for judge, rows in curves.items() for row in rows}
        metrics = dict(curves) if options.json else metrics
    elif options.against is not None:
        metrics = compare(
            run, options.against, judge=next(iter(options.judge), None), split=options.split or "val",
            samples=options.samples, temperature=options.temperature, seed=options.seed, device=device,
        )  # fmt: skip
    else:
        acting = acting_fields(options.acting)
        metrics = evaluate_run(
            run, options.checkpoint, options.split, device, options.videos, options.episodes, acting
        )  # fmt: skip
    if options.json:
        print(strict_json(strict(metrics)))
    else:
        table(metrics)


def acting_fields(words: Sequence[str]) -> dict[str, Any]:
    """The fields of `Acting` that words such as temperature=0.3 set.

    Raises:
        UserError: there is no such field, or it cannot have such a value.
    """
    options = {option.name: option for option in find_options(Acting, {})}
    switches = {"true": "--", "false": "--no-"}
    given = list[str]()
    for word in words:
        field, _, value = word.partition("=")
        given.append(f"{switches[value.lower()]}{field}" if value.lower() in switches else f"--{word}")
    try:
        return {str(options[name].path[0]): value for name, value in read_arguments(options, given).items()}
    except UserError as error:
        raise UserError(f"--acting: {error}") from None
