"""demo: train two small models from scratch and show the results (a few minutes, no network)"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cleangpt.checkpoints.run_folder import find_run
from cleangpt.commands import evaluate, report, sample, train
from cleangpt.commands.options import parse
from cleangpt.files import read_json
from cleangpt.output import discard, say
from cleangpt.tracking.metrics import restored
from cleangpt.tracking.numbers import show_number

EXPERIMENTS = {
    "adder": ["123+456=", "999+999=", "504+077="],
    "stdlib_demo": ["def ", "class "],
}
"""The experiments to show, with prompts for each model."""


@dataclasses.dataclass
class Options:
    """Options of `cleangpt demo`: none."""


def command(words: Sequence[str]) -> None:
    """Trains, evaluates, samples and reports every experiment of `EXPERIMENTS`, one after the other."""
    about = "Trains, evaluates, samples and reports two small models: an adder and a byte-level model of Python code."
    parse(Options, words, program="cleangpt demo", about=about)
    runs = []
    for name, prompts in EXPERIMENTS.items():
        _title(f"{name}: train")
        train.command([name])
        runs.append(find_run(name))
        _title(f"{name}: evaluate")
        _show(evaluate, str(runs[-1]))
        _title(f"{name}: sample")
        for prompt in prompts:
            _show(sample, str(runs[-1]), "--prompt", prompt, "--max-new-tokens", "120")
        _show(report, str(runs[-1]))
    _title("results")
    for run in runs:
        metrics = restored(read_json(run / "evaluation.json"))
        score = f", {100 * metrics['exact_match']:.2f} % of held-out problems right" if "exact_match" in metrics else ""
        print(f"{run}: loss {show_number(metrics['loss'], 4)}{score}; open {Path(run) / 'report.html'}")
    print(
        f"\nTry next:\n"
        f"  cleangpt sample {runs[0]} --prompt 271+828=      ask the adder\n"
        f"  cleangpt report {' '.join(map(str, runs))}      compare the two\n"
        f"  cleangpt train stdlib_code                       a larger model of code\n"
        f"  cleangpt prepare text --files YOUR_FOLDER        your own text; then see docs/own_data.md"
    )


def _title(text: str) -> None:
    say(f"\n== {text} ==")


def _show(command: ModuleType, *words: str) -> None:
    """Runs a command for what it prints; when nobody reads that any more, the demo goes on, for the runs it leaves."""
    try:
        command.command(words)
    except BrokenPipeError:
        discard(sys.stdout)
