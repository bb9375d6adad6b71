"""Every command in the documents works as it is written, in a folder that begins with only what its reader has.

Commands run in the order of the document, in this process, in one temporary folder per document; those that torchrun
starts run in forked processes. `train` gets overrides that make it short; commands that would download a text get a
local one. README_zh.md has the blocks of README.md (`test_pages.py`), so they run once.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from cleangpt import experiment_files
from cleangpt.commands import main
from cleangpt.commands.demo import EXPERIMENTS
from cleangpt.corpora import CORPORA
from cleangpt.environments.experts import EXPERTS
from cleangpt.environments.rewards import REWARDS
from cleangpt.experiment_files import experiments
from cleangpt.models import MODELS
from cleangpt.objectives import OBJECTIVES
from tests.forked import run_together

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
LONG = (
    "README", "cli", "concepts", "control", "distributed", "experiments", "fine_tuning", "generation", "mixtures",
    "own_corpus", "own_data", "own_environment", "own_objective", "own_reward", "planning", "policies",
    "post_training", "reproducibility", "tuning",
)  # fmt: skip
"""Documents of many commands, which CI runs and `make test` does not."""

SHORT = shlex.split(
    "--training.macro-batches 1 --training.batches-per-macro-batch 2 --training.accumulation 1"
    " --training.micro-batch-size None --data.batch-size 4 --data.val-samples 4 --model.n-layers 1"
    " --tracking.sample-tokens 2 --rollouts.prompts 4 --rollouts.completions 2 --rollouts.passes 1"
)
SHORT_RESUMED = ["--training.macro-batches", "2"]
SMALLER = {
    "adder": ["train-samples", "500", "val-samples", "50", "test-samples", "50"],
    "cartpole_ppo": ["reference-episodes", "2"],
    "control_demo": [
        word
        for source in "012"
        for word in (f"sources.{source}.corpus.played", "6", f"sources.{source}.corpus.reference-episodes", "2")
    ],
    "fables_dpo": ["train-pairs", "40", "val-pairs", "8"],
    "fables_grpo": ["train-sentences", "64", "val-sentences", "16"],
    "fables_ppo": ["train-sentences", "64", "val-sentences", "16"],
    "fables_reward": ["train-pairs", "40", "val-pairs", "8"],
    "fables_sft": ["train-sentences", "64", "val-sentences", "16"],
    "mixture_code_shakespeare": ["sources.1.corpus.file", "input.txt"],
    "shakespeare_char": ["file", "input.txt"],
    "shakespeare_char_cpu": ["file", "input.txt"],
    "shakespeare_char_fast": ["file", "input.txt"],
    "shakespeare_char_minute": ["file", "input.txt"],
    "stdlib": ["max-bytes", "200000"],
    "stdlib_code": ["max-bytes", "200000"],
    "stdlib_demo": ["max-bytes", "200000"],
    "stdlib_fast": ["max-bytes", "200000"],
    "tinystories": ["files", "stories.txt"],
}
"""By experiment or corpus: fields that spare a download, the reading of a large text, or an evaluation of minutes."""

NOT_RUN = {
    "cleangpt demo": "takes minutes; it is made of commands that are run, on experiments whose names are checked",
    "python -m venv .venv": "makes an environment; `make` does it too",
    ". .venv/bin/activate": "changes the reader's shell",
    "pip install -e .": "installs what runs here",
    "pip install -e '.[all]'": "installs from the network",
    "pip install -e '.[dev]' -c constraints.txt": "installs from the network",
    "pip install -e '.[control]'": "installs from the network",
    "cleangpt train gato_small --run-dir runs/gato_small": "takes more than an hour",
    "cleangpt evaluate runs/gato_small": "needs the run of an hour before it",
    "cleangpt train gato_finetune --run-dir runs/gato_finetune": "needs the run of an hour before it",
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": "installs from the network",
    "make demo": "installs, and takes minutes",
    "make test": "would run this test",
    "make lint": "installs; .ci/run runs it",
    "make types": "installs; .ci/run runs it",
    "make llama": "compiles for minutes",
    "make slow": "installs; .ci/run runs the same tests",
    "make slowest": "takes minutes; .ci/run runs the same tests",
    "make torture": "takes minutes; tests/faults tries a few of each",
    "make benchmarks": "takes minutes",
    "python -m pytest": "would run this test",
    "python -m tests.faults killed --tries 2": "tests/faults tries the same",
    "ruff check .": ".ci/run runs it",
    "ruff format --check .": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "tensorboard --logdir runs": "serves until it is stopped; tests/tracking reads its files",
}
"""Lines that no test can run, and why; `test_a_line_that_is_not_run_…` checks what can be checked of them."""


@dataclass
class Part:
    """A command line, or a file that the reader is told to write."""

    kind: str
    text: str

    @property
    def file_name(self) -> str:
        """What the first line of a Python example calls it."""
        return self.text.splitlines()[0].removeprefix("# ").strip()


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found or "```" not in document.read_text(encoding="utf-8")
    return found


def parts(document: Path) -> Iterator[Part]:
    """Files and command lines, in order."""
    for language, text in blocks(document):
        assert language in ("bash", "python", "text"), f"{document.name}: a block of {language} that no test looks at"
        if language == "python":
            yield Part("file", text)
        if language == "bash":
            yield from (Part("line", line) for line in text.splitlines() if line.strip())


def lines(document: Path) -> list[str]:
    return [part.text for part in parts(document) if part.kind == "line"]


def shortened(words: list[str]) -> list[str]:
    """A cleangpt command line that takes a second, by overrides at its end, where they win."""
    if words[0] == "evaluate" and "--best-of" in words:
        return [*words, "--best-of", "4"]
    if "--help" in words or words[0] not in ("prepare", "tune", "train", "resume"):
        return words
    if words[0] == "resume":
        return words + SHORT_RESUMED
    extra = list(SMALLER.get(words[1], []))
    extra[::2] = [f"--{'corpus.' * (words[0] != 'prepare')}{field}" for field in extra[::2]]
    if words[0] == "tune":
        return words + extra + SHORT + ["--steps", "8"]
    scored = ["--tracking.score-samples", "4"]
    return words + extra + (SHORT + scored if words[0] == "train" else [])


def run(line: str) -> int:
    """Runs a command line; the registries are then as before, since a reader's next command is another process."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        at = words.index("cleangpt")
        processes = get_args_parser().parse_args(words[1 : at + 1]).nproc_per_node
        done = run_together(int(processes), *shortened(words[at + 1 :]))
        print(done.stdout, done.stderr)
        return done.returncode
    if words[0] == "python":
        return subprocess.run([sys.executable, *words[1:]], timeout=240, check=False).returncode
    assert words[0] == "cleangpt", f"this line is neither run nor listed in NOT_RUN: {line}"
    registries: list[dict[str, Any]] = [MODELS, CORPORA, OBJECTIVES, REWARDS, EXPERTS]
    if importlib.util.find_spec("gymnasium") is not None:
        registries.append(importlib.import_module("gymnasium").registry)
    before = [dict(registry) for registry in registries]
    try:
        return main(shortened(words[1:]))
    finally:
        sys.modules.pop(experiment_files.MODULE, None)
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)


@pytest.fixture
def reader(workplace: Path) -> Path:
    """A folder with the texts that the documents say the reader has."""
    (workplace / "my_texts").mkdir()
    for number in range(2):
        text = "".join(f"Line {line} of the text number {number}, which says no more.\n" for line in range(400))
        (workplace / "my_texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    notes = (json.dumps({"body": f"Note {number}: {'remember this ' * (number % 7 + 1)}"}) for number in range(500))
    (workplace / "notes.jsonl").write_text("\n".join(notes), encoding="utf-8")
    asked = (
        [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": str(number + 1)}]
        for number in range(300)
    )
    said = (json.dumps({"messages": messages}) for messages in asked)
    (workplace / "conversations.jsonl").write_text("\n".join(said), encoding="utf-8")
    preferred = (
        {"prompt": f"{number} + 1 = ", "chosen": str(number + 1), "rejected": str(number)} for number in range(300)
    )
    (workplace / "preferences.jsonl").write_text("\n".join(map(json.dumps, preferred)), encoding="utf-8")
    (workplace / "input.txt").write_text("To be, or not to be: that is the question.\n" * 200, encoding="utf-8")
    stories = (f"Once upon a time there were {number} mice. They lived well.\n" * 20 for number in range(400))
    (workplace / "stories.txt").write_text("<|endoftext|>\n".join(stories), encoding="utf-8")
    return workplace


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else (), id=path.stem) for path in DOCUMENTS],
)
def test_every_command_of_a_document_runs_in_its_order(
    document: Path, reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in parts(document):
        if part.kind == "file":
            (reader / part.file_name).write_text(part.text, encoding="utf-8")
        elif part.text not in NOT_RUN:
            code = run(part.text)
            captured = capsys.readouterr()
            assert code == 0, f"{document.name}: {part.text}\n{captured.out[-3000:]}{captured.err[-3000:]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_python_example_is_a_file_that_a_command_of_its_document_uses(document: Path) -> None:
    for part in parts(document):
        if part.kind == "file":
            assert re.fullmatch(r"\w+\.py", part.file_name)
            assert any(part.file_name in line.split() for line in lines(document))


def test_the_model_of_ones_own_in_the_readme_takes_at_most_60_lines() -> None:
    (example,) = [part.text for part in parts(PROJECT / "README.md") if part.text.startswith("# my_model.py")]
    assert len(example.splitlines()) <= 60


@pytest.mark.slow
def test_evaluating_a_model_of_ones_own_without_its_code_is_refused_in_one_line(
    reader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [part for part in parts(PROJECT / "README.md") if part.text.startswith("# my_model.py")]
    (reader / example.file_name).write_text(example.text, encoding="utf-8")
    assert run("cleangpt train my_model.py --run-dir runs/my_model") == 0
    capsys.readouterr()
    assert run("cleangpt evaluate runs/my_model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and "conv" in error and error.count("\n") == 1


def test_every_line_that_is_listed_as_not_run_is_in_a_document() -> None:
    assert set(NOT_RUN) == {line for document in DOCUMENTS for line in lines(document)} & set(NOT_RUN)


@pytest.mark.parametrize("line", [line for line in NOT_RUN if line.startswith("make ")])
def test_a_line_that_is_not_run_names_a_target_of_the_makefile(line: str) -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)


def test_a_line_that_is_not_run_names_a_file_that_exists() -> None:
    assert (PROJECT / "constraints.txt").is_file()
    assert set(EXPERIMENTS) <= set(experiments())
    assert main(["demo", "--help"]) == 0
