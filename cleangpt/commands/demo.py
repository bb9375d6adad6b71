"""`cleangpt demo`: from nothing to two trained, scored, sampled and reported models, without a network."""

from pathlib import Path

from cleangpt import commands as cli
from cleangpt.checkpoints.run_folder import find_run
from cleangpt.files import read_json

EXPERIMENTS = {
    "adder": ["123+456=", "999+999=", "504+077="],
    "stdlib_demo": ["def ", "class "],
}
"""The experiments shown, each with the prompts that its model is asked to go on from."""


def demo() -> None:
    """Trains, evaluates, samples and reports every experiment of `EXPERIMENTS`, one after the other."""
    runs = []
    for name, prompts in EXPERIMENTS.items():
        _title(f"{name}: train")
        cli.train_command([name])
        runs.append(find_run(name))
        _title(f"{name}: evaluate")
        cli.evaluate_command([str(runs[-1])])
        _title(f"{name}: sample")
        for prompt in prompts:
            cli.sample_command([str(runs[-1]), "--prompt", prompt, "--max-new-tokens", "120"])
        cli.report_command([str(runs[-1])])
    _title("what there is now")
    for run in runs:
        figures = read_json(run / "evaluation.json")
        score = f", {figures['exact_match']:.2%} of held-out problems right" if "exact_match" in figures else ""
        print(f"{run}: loss {figures['loss']:.4f}{score}; open {Path(run) / 'report.html'}")
    print(
        f"\nTry next:\n"
        f"  cleangpt sample {runs[0]} --prompt 271+828=      ask the adder\n"
        f"  cleangpt report {' '.join(map(str, runs))}      compare the two\n"
        f"  cleangpt train stdlib_code                       a larger model of code\n"
        f"  cleangpt prepare text --files YOUR_FOLDER        your own text; then see docs/own_data.md"
    )


def _title(text: str) -> None:
    print(f"\n== {text} ==", flush=True)
