"""Every command works, and every mistake is one line, exit code 2, with nothing created."""

import ast
import errno
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cleangpt import __version__
from cleangpt.commands import COMMANDS, main
from cleangpt.files import sha256
from cleangpt.tracking.metrics import read_metrics
from tests import forked

EXPERIMENT = '''"""A small experiment of the user's own."""
from cleangpt.config import *
from cleangpt.corpora.adder import Adder
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="own",
    corpus=Adder(digits=2, train_samples=300, val_samples=50, test_samples=20),
    data=DataConfig(seq_len=9, batch_size=16),
    model=GPTConfig(max_seq_len=9, n_layers=1, n_heads=2, dim=16),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=4, device="cpu"),
    tracking=TrackingConfig(progress=False, sample_tokens=4, score_samples=10),
)
'''


PLACE = "~nobody_of_this_name/place"


@pytest.fixture
def own(workplace: Path) -> Path:
    path = workplace / "own.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def run(own: Path) -> str:
    assert main(["train", "own.py", "--run-dir", "run"]) == 0
    return "run"


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    *before, line = captured.err.splitlines()
    assert line.startswith("error: ") and not any("Traceback" in other for other in before), captured.err
    assert not before or "sha256" in captured.err, "only the card of a corpus may stand before the error"
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is not a command; did you mean 'train'?"),
        (["train"], "cleangpt train needs EXPERIMENT"),
        (["train", "addr"], "did you mean 'adder'?"),
        (["train", "nowhere/file.py"], "no such file"),
        (
            ["train", "own.py", "--optimizer.lrr", "1"],
            "--optimizer.lrr is not an option; did you mean '--optimizer.lr'?",
        ),
        (["train", "own.py", "--optimizer.lr", "fast"], "--optimizer.lr is 'fast'; allowed: a number"),
        (["train", "own.py", "--data.batch-size", "1.5"], "--data.batch-size is '1.5'; allowed: a whole number"),
        (["train", "own.py", "--data.val-samples", "x"], "--data.val-samples is 'x'; allowed: a whole number"),
        (["train", "own.py", "--training.precision", "bf61"], "tf32, bf16, fp16, fp8; did you mean 'bf16'?"),
        (["train", "own.py", "--optimizer.lr"], "--optimizer.lr needs a value; allowed: a number of 0 or more"),
        (["train", "own.py", "surplus"], "unexpected argument 'surplus'"),
        (["train", "own.py", "--model.n-heads", "3"], "model.n_heads is 3; allowed: a divisor of model.dim"),
        (["train", "own.py", "--data.seq-len", "10"], "data.seq_len is 10; allowed: at most model.max_seq_len"),
        (["train", "own.py", "--data.seq-len", "8"], "data.seq_len is 8; allowed: 9"),
        (["train", "own.py", "--training.accumulation", "5"], "training.accumulation reaches 5"),
        (["train", "own.py", "--training.device", "cuda:99"], "this machine has"),
        (["train", "own.py", "--corpus.digits", "7"], "corpus.digits is 7"),
        (["train", "own.py", "--objective.z-los", "1"], "did you mean '--objective.z-loss'?"),
        (["train", "own.py", "--init-from", "nowhere"], "nowhere is not a run"),
        (["train", "own.py", "--model.vocab-size", "5"], "model.vocab_size is 5; allowed: at least the tokenizer's 13"),
        (["tune"], "cleangpt tune needs EXPERIMENT"),
        (["tune", "own.py", "--optimizer.base-dim", "12"], "a width of 12 does not fit a model of dim 16, n_heads 2"),
        (["prepare"], "cleangpt prepare needs CORPUS"),
        (["prepare", "shakespear_char"], "did you mean 'shakespeare_char'?"),
        (["prepare", "text"], "--files is missing"),
        (["resume", "nowhere"], "nowhere is not a run"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["evaluate"], "RUN is missing"),
        (["sample", "nowhere"], "nowhere is not a run"),
        (["report"], "needs either runs or --schedule EXPERIMENT"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["report", "--schedule", "addr"], "did you mean 'adder'?"),
    ],
)
def test_mistakes_are_one_line_and_create_no_run(
    own: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in error_of(capsys, *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiment = Experiment(nam='x')", "Experiment has no field 'nam'; did you mean 'name'?"),
        ("DataConfig(seq_len=1)", "DataConfig needs the field 'batch_size'"),
        ("GPTConfig(n_layer=2)", "GPTConfig has no field 'n_layer'; did you mean 'n_layers'?"),
        ("experiment = (", "line 6: '(' was never closed"),
        ("experiment = 3", "does not build an Experiment"),
        ("OptimizerConfig(lr=-1)", "wrong.py, line 6: optimizer.lr is -1; allowed: a number of 0 or more"),
    ],
)
def test_mistakes_in_an_experiment_file_are_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    lines = EXPERIMENT.splitlines()[:5]
    Path("wrong.py").write_text("\n".join([*lines, line]))
    assert message in error_of(capsys, "train", "wrong.py")
    assert [path.name for path in workplace.iterdir() if path.name != "__pycache__"] == ["wrong.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("len(3)", "wrong.py, line 6: TypeError: object of type 'int' has no len()"),
        ("1 / 0", "wrong.py, line 6: ZeroDivisionError: division by zero"),
        ("lr", "wrong.py, line 6: NameError: name 'lr' is not defined"),
        (
            "import nothing_of_this_name",
            "wrong.py, line 6: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("raise SystemExit('too early')", "wrong.py, line 6: SystemExit: too early"),
        ("import helper; helper.lr()", "wrong.py, line 6: KeyError: 'lr' ("),
        (
            "open('nowhere.txt')",
            "wrong.py, line 6: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.txt'",
        ),
        ("open('~nobody_of_this_name/x.txt')", "wrong.py, line 6: FileNotFoundError"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "tune"])
def test_an_error_in_the_users_own_code_is_one_line_with_its_place(
    workplace: Path, capsys: pytest.CaptureFixture[str], command: str, line: str, message: str
) -> None:
    Path("helper.py").write_text("def lr():\n    return {}['lr']\n")
    Path("wrong.py").write_text("\n".join([*EXPERIMENT.splitlines()[:5], line]))
    said = error_of(capsys, command, "wrong.py")
    assert message in said
    assert "helper.lr" not in line or "helper.py, line 2)" in said


@pytest.mark.parametrize(
    "number",
    [
        *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT, errno.ENOLCK, errno.EOPNOTSUPP),
        *(errno.EBUSY, errno.ENODEV, errno.EXDEV, errno.EMLINK, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EDEADLK),
    ],
)
def test_a_system_that_refuses_is_told_in_one_line(
    own: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(number, os.strerror(number), "run/experiment.json")

    monkeypatch.setattr("cleangpt.checkpoints.run_folder.write_json", refuse)
    assert main(["train", str(own)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"stopped: [Errno {number}] {os.strerror(number)}: 'run/experiment.json'"


def test_no_room_for_temporary_files_is_told_in_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where PyTorch's compiler is loaded while all disks are full."""

    def without_room(*given: object) -> None:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
        tempfile.gettempdir()

    monkeypatch.setattr("cleangpt.checkpoints.run_folder.write_json", without_room)
    assert main(["train", str(own)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: [Errno 2] No usable temporary directory")


def test_too_little_memory_is_told_in_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cleangpt.checkpoints.run_folder.write_json", fail)
    assert main(["train", str(own)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: MemoryError"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "own.py", "--run-dir", PLACE],
        ["train", "own.py", "--data.folder", PLACE],
        ["train", "own.py", "--init-from", PLACE],
        ["train", "own.py", "--init-from", f"hf:{PLACE}"],
        ["train", PLACE],
        ["tune", "own.py", "--out", PLACE],
        ["plan", "own.py", "--model.vocab-size", "13", "--json", PLACE],
        ["prepare", "text", "--files", PLACE],
        ["prepare", "adder", "--folder", PLACE],
        ["resume", PLACE],
        ["evaluate", PLACE],
        ["sample", PLACE],
        ["chat", PLACE],
        ["export", PLACE],
        ["report", PLACE],
        ["report", "--schedule", "own.py", "--out", PLACE],
    ],
)
def test_the_home_of_nobody_is_one_line(own: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    line = error_of(capsys, *words)
    assert "nobody_of_this_name" in line
    assert not Path("~nobody_of_this_name").exists() and not Path("runs").exists()


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_option_that_names_a_place(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no shell has replaced it, as in --run-dir=~/x, in a scheduler's file, or in an experiment."""
    home = own.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "own.py").write_text(own.read_text())
    for words in (
        ["prepare", "adder", "--digits", "1", "--folder", "~/prepared"],
        ["train", "~/own.py", "--run-dir=~/run", "--data.folder=~/data", "--training.macro-batches=1"],
        ["resume", "~/run"],
        ["evaluate", "~/run"],
        ["sample", "~/run", "--max-new-tokens", "1"],
        ["report", "~/run", "--out", "~/page"],
        ["report", "--schedule", "~/own.py", "--out", "~/schedule.png"],
        ["export", "~/run", "--out", "~/exported"],
        ["plan", "~/own.py", "--model.vocab-size", "13", "--json", "~/plan.json"],
        ["tune", "~/own.py", "--steps", "4", "--rates", "0.01", "--out", "~/tuned", "--data.folder", "~/data"],
        ["train", "own.py", "--init-from=~/run", "--run-dir=~/second", "--data.folder=~/data", "--training.steps=1"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert {path.name for path in home.iterdir()} >= {
        "prepared", "run", "data", "page", "schedule.png", "exported", "plan.json", "tuned", "second",
    }  # fmt: skip
    assert not Path("~").exists() and not Path("data").exists() and not Path("runs").exists()


def test_training_leaves_the_run_directory_of_the_design(run: str, own: Path) -> None:
    names = {path.name for path in Path(run).iterdir()}
    assert names >= {
        "experiment.py", "experiment.json", "environment.json", "metrics.jsonl", "log.txt", "snapshots", "checkpoints",
    }  # fmt: skip
    assert Path(run, "experiment.py").read_text() == own.read_text()
    experiment = json.loads(Path(run, "experiment.json").read_text())
    assert experiment["model"].items() >= {
        "kind": "gpt", "vocab_size": 13, "max_seq_len": 9, "n_layers": 1, "n_heads": 2, "dim": 16, "bias": True,
        "dropout": 0.0,
    }.items()  # fmt: skip
    environment = json.loads(Path(run, "environment.json").read_text())
    assert environment["cleangpt"] == __version__ and environment["overrides"] == ["--run-dir", "run"]


def test_a_run_goes_under_its_name_and_is_found_by_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "own.py", "--training.macro-batches", "1"]) == 0
    (run,) = Path("runs/own").iterdir()
    assert main(["evaluate", "own"]) == 0
    assert (run / "evaluation.json").exists()


def test_repeating_a_run_takes_its_overrides_and_gives_the_same_figures(own: Path) -> None:
    assert main(["train", "own.py", "--run-dir", "one", "--optimizer.lr", "0.02"]) == 0
    assert main(["train", "one/experiment.py", "--run-dir", "two"]) == 0
    losses = [[line["val_loss"] for line in read_metrics(Path(run))] for run in ("one", "two")]
    assert losses[0] == losses[1]
    assert main(["train", "own.py", "--run-dir", "three"]) == 0
    assert [line["val_loss"] for line in read_metrics(Path("three"))] != losses[0]


def test_starting_the_same_run_again_goes_on_and_another_experiment_is_refused(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "own.py", "--run-dir", "run"]) == 0
    assert len(read_metrics(Path(run))) == 3
    line = error_of(capsys, "train", "own.py", "--run-dir", "run", "--optimizer.lr", "0.5")
    assert "optimizer.lr is 0.01 there and 0.5 here" in line and "change the field with cleangpt resume run" in line
    for words in (["--model.dim", "32"], ["--data.val-samples", "7"], ["--optimizer.lr", "0.5", "--model.dim", "32"]):
        line = error_of(capsys, "train", "own.py", "--run-dir", "run", *words)
        assert "give another folder" in line and f"{words[-2][2:].replace('-', '_')} is " in line
        assert "resume" not in line, "which would refuse it as well"


def test_a_folder_of_something_else_is_not_taken_for_a_run(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("dear")
    assert "holds something else" in error_of(capsys, "train", "own.py", "--run-dir", "mine")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_resume_trains_longer_when_asked_and_refuses_another_model(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "run", "--training.macro-batches", "5"]) == 0
    assert [line["macro_batch"] for line in read_metrics(Path(run))] == [1, 2, 3, 4, 5]
    assert "model.dim is 16 in this run and cannot become 32" in error_of(capsys, "resume", "run", "--model.dim", "32")
    assert "data.batch_size is 16" in error_of(capsys, "resume", "run", "--data.batch-size", "8")


def content(folder: str) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.default(4)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run-dir", "elsewhere"], "run_dir is 'elsewhere'; a run is resumed in its own folder"),
        (["--init-from", "hf:gpt2"], "init_from is None in this run and cannot become 'hf:gpt2'"),
        (["--data.val-samples", "7"], "the losses of its checkpoints were measured on that many"),
        (["--fine-tuning.optimizer-state", "kept"], "fine_tuning.optimizer_state is 'reset' in this run"),
        (["--objective.z-loss", "0.1"], "objective.z_loss is 0.0 in this run"),
        (["--optimizer.muon.lr", "0.01"], "cannot be loaded: it has no optimizer/moments/"),
        (["--optimizer.lr-factors", "nothing.*", "2"], "'nothing.*' matches no parameter"),
        (["--training.accumulation", "5"], "training.accumulation reaches 5"),
        (["--tracking.sample-prompt", "Ж"], "tracking.sample_prompt is 'Ж'"),
        (["--tracking.wandb", "offline", "--tracking.wandb-project", "a/b"], "W&B refuses"),
        (
            ["--data.folder", "elsewhere", "--corpus.train-samples", "200"],
            "corpus.train_samples is 300 in this run",
        ),
    ],
)
def test_a_refused_resume_changes_nothing(
    run: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """And does not keep the plain one from working."""
    corrupt = Path("run/snapshots/mb000002/state.json")
    corrupt.write_text("{}")  # would be set aside
    before = content(run)
    assert message in error_of(capsys, "resume", "run", "--training.macro-batches", "4", *words)
    assert content(run) == before
    assert main(["resume", "run", "--training.macro-batches", "4"]) == 0


def test_a_resume_that_finds_a_corrupt_line_leaves_all_files_as_they_were(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines after the snapshot, too, which it would have removed."""
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"macro_batch": 4, "step": 16}\n')
    lines = Path("run/samples.jsonl").read_text().splitlines()
    Path("run/samples.jsonl").write_text("\n".join(["not JSON", *lines[1:]]) + "\n")
    before = content(run)
    assert "samples.jsonl, line 1, is not a JSON object" in error_of(capsys, "resume", "run")
    assert content(run) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tracking.sample-prompt", "Ж"], "tracking.sample_prompt is 'Ж': "),
        (["--tracking.every", "0"], "--tracking.every is 0; allowed: a whole number of 1 or more"),
        (["--tracking.every=-3"], "--tracking.every is -3; allowed: a whole number of 1 or more"),
        (["--tracking.wandb", "offline", "--tracking.wandb-project", "a/b"], "W&B refuses: "),
        (["--tracking.wandb", "online"], "Weights & Biases has no API key here"),
    ],
)
@pytest.mark.parametrize("where", [[], ["--run-dir", "mine"]])
def test_what_is_used_after_a_macro_batch_is_checked_before_the_first(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: list[str], words: list[str],
    message: str,
) -> None:  # fmt: skip
    """In one line, and leaving nothing but the dataset."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(own.parent / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(own.parent / "config"))
    main(["prepare", "adder", "--digits", "2", "--train-samples", "300", "--val-samples", "50", "--test-samples", "20"])
    capsys.readouterr()
    assert message in error_of(capsys, "train", "own.py", *words, *where)
    assert not Path("runs").exists() and not Path("mine").exists()


def test_a_start_that_is_refused_leaves_the_folder_free_for_the_corrected_command(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("run", "broken")
    for weights in Path("broken/checkpoints").rglob("model.safetensors"):
        weights.write_bytes(b"")
    Path("mine").mkdir()
    for where in ([], ["--run-dir", "new/mine"], ["--run-dir", "mine"]):
        assert "is corrupt" in error_of(capsys, "train", "own.py", "--init-from", "broken", *where)
        assert not Path("runs").exists() and not Path("new").exists() and not any(Path("mine").iterdir())
    assert main(["train", "own.py", "--init-from", "run", "--run-dir", "mine"]) == 0


def test_evaluate_prints_json_and_a_table(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["split"] == "test" and figures["samples"] == 20
    assert 0 <= figures["exact_match"] <= 1
    assert figures == json.loads(Path("run/evaluation.json").read_text())
    assert main(["evaluate", "run", "--split", "val"]) == 0
    printed = capsys.readouterr().out
    assert "exact match" in printed and "val" in printed
    best = min(read_metrics(Path(run)), key=lambda line: line["val_loss"])
    assert json.loads(Path("run/evaluation.json").read_text())["loss"] == pytest.approx(best["val_loss"])


@pytest.mark.default(2)
@pytest.mark.parametrize("change", ["tokens", "tokenizer", "split", "silently"])
def test_evaluate_refuses_other_data_and_keeps_the_figures_that_there_are(
    run: str, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Whether prepared again from something else, or damaged; it used to measure, and to replace the figures."""
    assert main(["evaluate", "run"]) == 0
    before = Path("run/evaluation.json").read_bytes()
    (description,) = Path("data").glob("*/dataset.json")
    name = {"tokenizer": "tokenizer.json", "split": "val_00000.bin"}.get(change, "test_00000.bin")
    changed = description.with_name(name)
    kept, facts = changed.read_bytes(), json.loads(description.read_text())
    changed.write_bytes(kept + b"\n" if change == "tokenizer" else kept[::-1])
    if change in ("tokens", "split"):
        facts["sha256"][name] = sha256(changed)
        description.write_text(json.dumps(facts))
    assert f"{changed} " in error_of(capsys, "evaluate", "run")
    assert Path("run/evaluation.json").read_bytes() == before


def test_evaluate_refuses_to_act_where_nothing_acts(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--episodes", "3"], ["--acting", "temperature=0.5"]):
        assert "has no simulation" in error_of(capsys, "evaluate", "run", *words)
    assert not Path("run/evaluation.json").exists()


def test_evaluate_in_another_folder_refuses_the_data_that_is_there(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative path of a text is another text there."""
    for folder, text in (("one", "the cat sat on the mat\n"), ("two", "tac eht tas no eht tam\n")):
        Path(folder).mkdir()
        Path(folder, "text.txt").write_text(200 * text)
    experiment = EXPERIMENT.replace("adder import Adder", "text import Text").replace(
        "Adder(digits=2, train_samples=300, val_samples=50, test_samples=20)",
        "Text(files=('text.txt',), tokenizer='char')",
    )
    Path("one/own.py").write_text(experiment)
    monkeypatch.chdir("one")
    assert main(["train", "own.py", "--run-dir", "run"]) == 0
    assert main(["evaluate", "run"]) == 0
    before = Path("run/evaluation.json").read_bytes()
    monkeypatch.chdir("../two")
    assert "is not the one that this run started with" in error_of(capsys, "evaluate", "../one/run").replace("\n", " ")
    assert Path("../one/run/evaluation.json").read_bytes() == before


@pytest.mark.slow
def test_evaluate_prints_strict_json_where_nothing_is_finite(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "own.py", "--run-dir", "run"]) == 0
    monkeypatch.setattr("cleangpt.evaluation.evaluate.evaluate", lambda *_: {"loss": math.nan, "perplexity": math.inf})
    capsys.readouterr()
    assert main(["evaluate", "run", "--json"]) == 0
    printed = capsys.readouterr().out
    for text in (printed, Path("run/evaluation.json").read_text()):
        figures = json.loads(text, parse_constant=pytest.fail)
        assert figures["loss"] is figures["perplexity"] is None
        assert figures["not_finite"] == {"loss": "nan", "perplexity": "inf"}
    assert main(["evaluate", "run"]) == 0 and "nan" in capsys.readouterr().out
    assert main(["report", "run"]) == 0
    assert "inf" in Path("run/report.html").read_text() and "not_finite" not in Path("run/report.html").read_text()


def test_evaluate_refuses_what_is_not_there(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--split is 'tset'; allowed: train, val, test" in error_of(capsys, "evaluate", "run", "--split", "tset")
    assert "--checkpoint is 'best'; allowed: val" in error_of(capsys, "evaluate", "run", "--checkpoint", "best")


def test_sample_goes_on_from_a_prompt_the_same_way_for_a_seed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        words = ["sample", "run", "--prompt", "12+34=", "--seed", seed, "--num-samples", "3", "--max-new-tokens", "6"]
        assert main([*words, "--temperature", "2"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("---") == 2 and texts[0].count("12+34=") == 3


def test_a_draft_and_an_empty_cache_change_no_greedy_text(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in ([], ["--draft", "run", "--draft-tokens", "3"], ["--no-cache"]):
        capsys.readouterr()
        assert main(["sample", "run", "--prompt", "12+34=", "--temperature", "0", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_tokens_are_shown_with_their_log_probabilities(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of all but the prompt; together they are the text."""
    words = ["sample", "run", "--prompt", "12+34=", "--temperature", "0"]
    capsys.readouterr()
    assert main(words) == main([*words, "--logprobs"]) == 0
    text, *lines = capsys.readouterr().out.splitlines()
    shown = [line.split(maxsplit=1) for line in lines]
    assert all(float(logprob) <= 0 for logprob, _ in shown)
    assert "12+34=" + "".join(ast.literal_eval(token) for _, token in shown) == text


CHAT = """
from cleangpt.config import *
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

corpus = AdderChat(digits=1)
experiment = Experiment(
    name="talk",
    corpus=corpus,
    data=DataConfig(seq_len=corpus.row_length - 1, batch_size=4, val_samples=4),
    model=GPTConfig(max_seq_len=corpus.row_length - 1, n_layers=1, n_heads=2, dim=16),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=2, device="cpu"),
    tracking=TrackingConfig(progress=False, sample_tokens=2, score_samples=2),
)
"""


def _interrupt_chat(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C during an answer ends the answer, at the prompt the conversation; neither is an error."""
    asked: list[int] = []

    def answers(*given: object, **named: object) -> Iterator[str]:
        asked.append(len(given[3]))  # type: ignore[arg-type]
        yield "half an ans"
        raise KeyboardInterrupt

    lines = iter(["one", "two"])

    def read_line(prompt: str) -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("cleangpt.commands.chat.answer", answers)
    monkeypatch.setattr("builtins.input", read_line)
    capsys.readouterr()
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.count("half an ans\n") == 2 and printed.err == ""
    assert asked == [2, 4], "the answer that was cut off stays in the conversation"
    assert main([*words, "--message", "one"]) == 130


def test_a_conversation_goes_on_line_by_line(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("talk.py").write_text(CHAT)
    assert main(["train", "talk.py", "--run-dir", "talk"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 2?\nAnd 3 + 4?\n\nnever said\n"))
    words = ["chat", "talk", "--max-new-tokens", "5", "--temperature", "0", "--system", "Be brief."]
    assert main(words) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    assert main([*words, "--message", "What is 1 + 2?"]) == 0
    assert "--top-p is 2.0; allowed: a number above 0, at most 1" in error_of(capsys, *words, "--top-p", "2")
    _interrupt_chat(words, monkeypatch, capsys)
    assert "run/checkpoints" in error_of(capsys, "chat", "run") and "has no chat template" in error_of(
        capsys, "chat", "run"
    )


@pytest.mark.default(4)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-p", "2"], "--min-p is 2.0; allowed: a number above 0, at most 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0; allowed: a number above 0"),
        (["--stop", ""], "--stop is ('',); allowed: a tuple of text of one character or more"),
        (["--prompt", "12*3", "--logprobs"], "does not know the character '*'"),
        (["--prompt", "12*3", "--num-samples", "2"], "does not know the character '*'"),
        (["--prompt", "12*3", "--draft", "run"], "does not know the character '*'"),
        (["--draft", "nowhere"], "nowhere is not a run"),
        (["--draft-tokens", "0"], "--draft-tokens is 0; allowed: a whole number of 1 or more"),
        (["--prompt", "12*3"], "does not know the character '*'"),
        (["--temperature", "-1"], "--temperature is -1.0; allowed: a number of 0 or more"),
        (["--top-k", "0"], "--top-k is 0; allowed: a whole number of 1 or more"),
        (["--top-p", "1.5"], "--top-p is 1.5; allowed: a number above 0, at most 1"),
        (["--num-samples", "0"], "--num-samples is 0; allowed: a whole number of 1 or more"),
    ],
)
def test_sample_refuses_what_cannot_be(
    run: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main(["sample", "run", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "", "nothing is printed before the prompt is known to be one that can be continued"
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err


@pytest.mark.parametrize("tokens", ["0", "1", "5"])
def test_the_prompt_is_printed_once_before_what_follows_it(
    run: str, tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "12+34=", "--num-samples", "2", "--draft", "run", "--max-new-tokens", tokens]
    capsys.readouterr()
    assert main(["sample", "run", *words]) == 0
    for text in capsys.readouterr().out.split("---"):
        assert text.lstrip("\n").startswith("12+34=") and text.count("12+34=") == 1


class Terminal(io.TextIOWrapper):
    """Standard output in an encoding without most characters."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["cp1252", *(pytest.param(name, marks=pytest.mark.torture) for name in ("ascii", "shift_jis"))]
)
def test_what_the_output_cannot_encode_is_replaced_in_every_command(
    workplace: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Привет, мир · 你好 · ünïcode\n"
    Path("мир.txt").write_text(text * 400, encoding="utf-8")
    Path("мир.py").write_text(
        EXPERIMENT.replace('"""A small', '"""Мир: a small')
        .replace("from cleangpt.corpora.adder import Adder", "from cleangpt.corpora.text import Text")
        .replace("Adder(digits=2, train_samples=300, val_samples=50, test_samples=20)", 'Text(files=("мир.txt",))')
        .replace("progress=False", "progress=True"),
        encoding="utf-8",
    )
    calls = [
        ["prepare", "text", "--files", "мир.txt"], ["train", "мир.py", "--run-dir", "мир"], ["list"],
        ["resume", "мир", "--training.macro-batches", "4"], ["evaluate", "мир"], ["evaluate", "мир", "--json"],
        ["sample", "мир", "--prompt", "мир 你", "--max-new-tokens", "5"], ["report", "мир"], ["plan", "мир.py"],
        ["sample", "мир", "--prompt", "мир", "--logprobs", "--max-new-tokens", "5"], ["train", "мир.py", "--help"],
        ["export", "мир", "--out", "из"], ["report", "--schedule", "мир.py"],
    ]  # fmt: skip
    for words in calls:
        output = Terminal(encoding)
        monkeypatch.setattr("sys.stdout", output)
        assert main(words) == 0, words
        if "мир 你" in words and encoding != "shift_jis":
            assert output.text.startswith("??? ?")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["sample", "run"], "interrupted\n"), (["evaluate", "run"], "interrupted\n"),
     (["train", "own.py"], "interrupted; the last snapshot is intact\n")],
)  # fmt: skip
def test_only_training_is_interrupted_with_a_word_about_its_snapshot(
    run: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    for place in ("sample.open_checkpoint", "evaluate.evaluate_run", "train.train"):
        monkeypatch.setattr(f"cleangpt.commands.{place}", interrupt)
    capsys.readouterr()
    assert main(words) == 130
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_report_writes_a_page_and_compares_runs(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "run"]) == 0
    assert Path("run/report.html").exists() and list(Path("run/plots").glob("*.png"))
    assert main(["train", "own.py", "--run-dir", "other", "--optimizer.lr", "0.001"]) == 0
    assert main(["report", "run", "other", "--out", "both"]) == 0
    assert "other" in next(Path().rglob("both*/*.html")).read_text(encoding="utf-8")


@pytest.mark.slow
def test_schedules_are_plotted_before_training(own: Path) -> None:
    assert main(["report", "--schedule", "own.py"]) == 0
    assert Path("own_schedule.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path("runs").exists() and not Path("data").exists()


def test_the_picture_of_a_schedule_has_no_comb(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight batches in steps of three are steps of 3, 3 and 2: their mean is drawn, as a run records it."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("cleangpt.commands.report.schedule_preview", lambda curves, path: drawn.update(curves) or path)
    own.write_text(EXPERIMENT.replace("batches_per_macro_batch=4", "batches_per_macro_batch=8, accumulation=3"))
    assert main(["report", "--schedule", "own.py"]) == 0
    samples, sizes = drawn["training_batch_size"]
    assert len(samples) == 9 and sizes == [pytest.approx(8 * 16 / 3)] * 9


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("shakespeare_char_cpu", "adder", "multiplier", "stdlib_code", "tinystories", "text", "gpt"):
        assert name in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_help_of_an_experiment_shows_its_values(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "own.py", "--help"]) == 0
    assert "optimizer" in capsys.readouterr().out
    assert main(["train", "own.py", "--help", "all"]) == 0
    printed = capsys.readouterr().out
    assert "--optimizer.lr" in printed and "0.01" in printed


def test_prepare_makes_a_store_once(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("one two three\n" * 400)
    assert main(["prepare", "text", "--files", "book.txt"]) == 0
    first = capsys.readouterr()
    assert "sha256" in first.err and "dataset: data" in first.out
    assert main(["prepare", "text", "--files", "book.txt"]) == 0
    assert "sha256" not in capsys.readouterr().err
    assert main(["prepare", "text", "--files", "book.txt", "--again"]) == 0
    assert "sha256" in capsys.readouterr().err


@pytest.mark.slow
def test_an_own_model_is_resumed_and_evaluated_with_its_code(workplace: Path) -> None:
    Path("bigram.py").write_text(
        EXPERIMENT.replace("experiment = ", "OWN").split("OWN")[0]
        + '''
from dataclasses import dataclass
import torch
from cleangpt.models import MODELS
from cleangpt.models.base import LanguageModel

@dataclass(frozen=True, kw_only=True)
class BigramConfig(ModelConfig):
    """The next token from this one alone."""

class Bigram(LanguageModel):
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def features(self, tokens, *, cache=None):
        return self.table(tokens)

    def to_logits(self, features):
        return features

    def head_parameters(self):
        return []

MODELS["bigram"] = (BigramConfig, Bigram)
'''
        + "experiment = "
        + EXPERIMENT.split("experiment = ")[1].replace(
            "GPTConfig(max_seq_len=9, n_layers=1, n_heads=2, dim=16)", "BigramConfig(max_seq_len=9)"
        )
    )
    assert main(["train", "bigram.py", "--run-dir", "run"]) == 0
    said = [line[len("2026-01-01 00:00:00  ") :] for line in Path("run/log.txt").read_text("utf-8").splitlines()]
    head, *commands = said[-4:]
    assert head == "finished; next:"
    assert commands == [
        "  cleangpt evaluate run --code bigram.py", "  cleangpt sample run --code bigram.py", "  cleangpt report run",
    ]  # fmt: skip
    for line in ["cleangpt resume run --training.macro-batches 4", *commands]:
        outcome = forked.run(*shlex.split(line)[1:])
        assert outcome.returncode == 0, outcome.stderr
    for words in (["evaluate", "run"], ["sample", "run"], ["export", "run"], ["chat", "run"]):
        outcome = forked.run(*words)
        assert outcome.returncode == 2 and "kind 'bigram', which is not registered here" in outcome.stderr
        assert outcome.stderr.endswith("run the file that defines it first: --code FILE, or an import in Python\n")
    for words, answer in {
        ("export", "run"): "a model of BigramConfig cannot be exported; allowed: GPTConfig, LlamaConfig",
        ("chat", "run"): "has no chat template",
        ("resume", "run"): "",
        ("list",): "bigram",
    }.items():
        outcome = forked.run(*words, "--code", "bigram.py")
        assert answer in outcome.stdout + outcome.stderr and "not registered" not in outcome.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--code"], "--code needs a value; allowed: a Python file"),
        (["--code", "nowhere.py"], "experiment 'nowhere.py': no such file"),
        (["--code=wrong.py"], "wrong.py, line 1: '(' was never closed"),
    ],
)
def test_code_that_cannot_be_run_is_refused_by_every_command(
    workplace: Path, command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.py").write_text("(")
    assert message in error_of(capsys, command, *words)


def test_evaluate_and_sample_never_run_the_file_inside_a_run(run: str) -> None:
    Path("run/experiment.py").write_text("raise SystemExit('executed')")
    assert main(["evaluate", "run"]) == 0
    assert main(["sample", "run", "--max-new-tokens", "1"]) == 0


def test_the_version_and_an_empty_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cleangpt {__version__}\n"
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_help_does_not_load_torch() -> None:
    code = "import sys; from cleangpt.commands import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_nothing_in_the_package_unpickles() -> None:
    import cleangpt

    for path in Path(cleangpt.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("import pickle", "torch.load", "torch.save", "allow_pickle=True")), (
            path
        )


@pytest.mark.slow
def test_pytorchs_compiler_is_loaded_only_where_it_is_used() -> None:
    """It takes longer to load than the rest of the package."""
    found = "import cleangpt.training.trainer, sys; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout == "False\n"
