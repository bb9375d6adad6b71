"""What a stranger's files and words cannot do: run code, leave their folder, or cost more than a line of error."""

import ast
import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cleangpt
from cleangpt.checkpoints.run_folder import kinds
from cleangpt.commands import COMMANDS, main
from cleangpt.config import Source
from cleangpt.corpora.adder import Adder
from cleangpt.corpora.mixture import Mixture
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.experiment_files import load_experiment
from cleangpt.files import read_json, write_json
from cleangpt.hub import fetch
from cleangpt.training.launch import check
from cleangpt.validation import from_json, to_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and links are POSIX")
if sys.platform != "win32":
    from tests.faults._strangers import VALUES, change_bytes, reseal, runs

AFTER = (
    "sample sums --max-new-tokens 2",
    "evaluate sums",
    "report sums",
    "export sums --out out --force",
    "chat talk --message hi --max-new-tokens 2",
    "sample hf:hf-sums --max-new-tokens 2",
)
"""Commands that read a run or a model; none of them may run code from it."""


@pytest.fixture
def place(workplace: Path) -> Path:
    """Copies of the runs, in the current folder."""
    shutil.copytree(runs(), workplace, dirs_exist_ok=True)
    return workplace


def outcome_of(words: str) -> tuple[int, str]:
    """The exit code of a command line, and the last line that it has put on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words.split())
    lines = said.getvalue().strip().splitlines()
    return code, lines[-1] if lines else ""


def checkpoint(run: str = "sums") -> Path:
    """The folder of the run's only checkpoint."""
    (folder,) = Path(run).glob("checkpoints/val*")
    return folder


# Nothing read from a file runs ---------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[str]:
    """What a module imports, calls and passes by name, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


def test_nothing_in_the_package_can_unpickle_or_run_what_it_reads() -> None:
    unpickling = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
    running = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load",
               "torch.jit.load", "np.load", "numpy.load", "np.fromfile", "runpy.run_path"}  # fmt: skip
    trusting = {"allow_pickle", "trust_remote_code", "shell", "weights_only"}
    forbidden = {f"import {name}" for name in unpickling} | running | trusting
    found = {}
    for path in Path(cleangpt.__file__).parent.rglob("*.py"):
        names = set(calls(ast.parse(path.read_text(encoding="utf-8"))))
        used = (names & forbidden) | {name for name in names if name.endswith("exec_module")}
        found |= {path.name: used} if used else {}
    assert found == {"experiment_files.py": {"spec.loader.exec_module"}}, (
        "the one that runs a Python file, when told to"
    )


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "patterns",
    [
        ("hf-sums/*", "sums/checkpoints/val*/*.safetensors", "data/*/*.json"),
        pytest.param(("sums/**/*",), marks=pytest.mark.torture),
        ("talk/**/*",),
        ("hf-*/*",),
        pytest.param(("data/**/*",), marks=pytest.mark.torture),
    ],
    ids=["a few", "a run", "a run of a chat", "exports", "datasets"],
)
def test_a_pickle_in_the_place_of_any_file_is_never_unpickled(place: Path, patterns: tuple[str, ...]) -> None:
    pickled = pickle.dumps(Payload())
    pickle.loads(pickled)
    assert Path("owned").is_dir(), "the payload works"
    Path("owned").rmdir()
    torch.save(Payload(), "weights.pt")
    np.save("array.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    contents = [pickled, Path("weights.pt").read_bytes(), Path("array.npy").read_bytes()]
    for folder in [path for name in ("sums", "hf-sums") for path in Path(name).rglob("*") if path.is_dir()]:
        for extra in ("pytorch_model.bin", "model.pt", "model.npy", ".metadata", "optimizer.pt"):
            (folder / extra).write_bytes(pickled)
        reseal(folder)
    assert all(outcome_of(words) == (0, "") for words in AFTER)
    paths = sorted(path for pattern in patterns for path in Path().glob(pattern) if path.is_file())
    for number, path in enumerate(paths):
        before = path.read_bytes()
        path.write_bytes(contents[number % 3])
        reseal(path.parent)
        for words in AFTER:
            if path.parts[0] in words or path.parts[0] == "data":
                outcome_of(words)
        path.write_bytes(before)
        reseal(path.parent)
    assert outcome_of("resume sums --training.macro-batches 3")[0] == 0
    assert not Path("owned").exists()


@pytest.mark.slow
def test_the_experiment_file_within_a_run_runs_when_it_is_trained_and_never_otherwise(place: Path) -> None:
    for run in ("sums", "talk"):
        path = Path(run) / "experiment.py"
        path.write_text("import os\nos.mkdir('owned')\n" + path.read_text())
    for words in AFTER:
        assert outcome_of(words) == (0, ""), words
        assert not Path("owned").exists(), words
    assert outcome_of("resume sums --training.macro-batches 3")[0] == 0
    assert Path("owned").is_dir(), "train and resume run it, as docs/reliability.md says"


# Nothing leads out of a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", "a\\b", "a\0b", "", "x" * 101])
def test_a_run_s_name_is_no_path(place: Path, name: str) -> None:
    code, line = (
        outcome_of("train sums.py --name NAME".replace("NAME", name)) if name.isprintable() and name else (2, "name is")
    )
    assert code == 2 and "name is" in line
    with pytest.raises(UserError, match=r"^name is "):
        check(dataclasses.replace(load_experiment(Path("sums.py")), name=name))
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["../out", "/etc", "a/b", "", "a\0b"])
def test_a_source_s_name_is_no_path(name: str) -> None:
    source = Source(name=name, corpus=Adder(digits=1))
    with pytest.raises(UserError, match="allowed: up to 40 letters"):
        Mixture(sources=(source,)).check()


@pytest.mark.parametrize(
    "name", ["hf:../../etc", "hf:/etc/none", "hf:~/none", "hf:a/b/c", "hf:", "hf:a/..", "hf:a\\..\\b"]
)
def test_a_name_on_the_hub_is_no_path(name: str, workplace: Path) -> None:
    with pytest.raises(UserError):
        fetch(f"hf:{name}")
    assert not list(workplace.iterdir())


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "..", "a/b", "a\\b", "\0", "", 3, None])
def test_a_file_named_in_a_file_is_its_neighbour(place: Path, name: Any) -> None:
    def put(path: Path, change: Any) -> None:
        content = read_json(path)
        change(content)
        write_json(path, content)
        reseal(path.parent)

    (store,) = Path("data").glob("text*")
    put(store / "dataset.json", lambda facts: facts["splits"]["train"]["shards"][0].update(file=name))
    code, line = outcome_of("evaluate tale")
    assert code == 2 and "dataset.json" in line, line
    put(Path("sums/checkpoints/index.json"), lambda index: index["checkpoints"][0].update(name=name))
    code, line = outcome_of("sample sums")
    assert code == 2 and "index.json" in line, line
    Path("hf-tale/model.safetensors").rename("hf-tale/secret.safetensors")
    write_json(Path("hf-tale/model.safetensors.index.json"), {"weight_map": {"a": name}})
    assert outcome_of("sample hf:hf-tale")[0] == 2
    newest = Path("sums/snapshots/mb000002")
    put(newest / "index.json", lambda index: index["optimizer/skipped"]["parts"][0].update(file=name))
    code, line = outcome_of("resume sums --training.macro-batches 3")
    assert code == 2 and "index.json" in line, line


def test_a_link_among_snapshots_and_checkpoints_costs_the_link_alone(place: Path) -> None:
    Path("precious").mkdir()
    Path("precious/photo").write_text("mine")
    for link in ("sums/snapshots/mb000000", "sums/checkpoints/val9.0000_mb000009"):
        Path(link).symlink_to(Path("precious").resolve(), target_is_directory=True)
    assert outcome_of("resume sums --training.macro-batches 5")[0] == 0
    assert Path("precious/photo").read_text() == "mine"
    assert not Path("sums/snapshots/mb000000").exists()


# Never more than an error line ---------------------------------------------------------------------------------------


def test_a_checkpoint_s_model_is_refused_before_it_takes_memory(place: Path) -> None:
    config = read_json(checkpoint() / "config.json")
    config["model"] |= {"dim": 2**20, "n_layers": 64, "max_seq_len": 2**31}  # terabytes
    write_json(checkpoint() / "config.json", config)
    reseal(checkpoint())
    code, line = outcome_of("sample sums")
    assert code == 2 and "blocks.0.attention.out.bias is torch.float32 (16,) in the checkpoint, and" in line


def test_a_cache_takes_memory_for_what_is_asked_and_not_for_what_the_model_could_read(place: Path) -> None:
    config = read_json(Path("hf-tale/config.json"))
    write_json(Path("hf-tale/config.json"), config | {"max_position_embeddings": 2**31})  # no weights depend on it
    assert outcome_of("sample hf:hf-tale --max-new-tokens 2") == (0, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_told_and_draw_no_token(place: Path, value: float) -> None:
    for model in ("hf-sums", "hf-tale"):
        weights = load_file(f"{model}/model.safetensors")
        save_file(
            {name: torch.full_like(tensor, value) for name, tensor in weights.items()}, f"{model}/model.safetensors"
        )
        assert outcome_of(f"sample hf:{model}")[1] == (
            "error: the model's logits are not finite: it has diverged, or its weights are corrupt"
        )


def test_a_tokenizer_of_another_model_is_told(place: Path) -> None:
    shutil.copy("hf-tale/tokenizer.json", "hf-sums/tokenizer.json")
    code, line = outcome_of("sample hf:hf-sums --prompt once")
    assert code == 2 and "allowed: 0 to 12, the model's vocabulary" in line


@pytest.mark.parametrize("kind", ["device", "pipe", "loop"])
def test_what_would_be_read_without_end_is_not_read(place: Path, kind: str) -> None:
    for path, words in (
        ("hf-tale/config.json", "sample hf:hf-tale"),
        ("hf-tale/tokenizer.json", "sample hf:hf-tale"),
        ("hf-tale/model.safetensors", "sample hf:hf-tale"),
        ("sums/metrics.jsonl", "report sums"),
    ):
        Path(path).unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            Path(path).symlink_to("/dev/zero" if kind == "device" else Path(path).name)
        assert outcome_of(words)[0] == 2


@pytest.mark.default(1)
@pytest.mark.parametrize("layers", [10**6, 10**30])
def test_a_plan_of_more_than_any_model_is_refused_at_once(place: Path, layers: int) -> None:
    code, line = outcome_of(f"plan sums.py --model.vocab-size 16 --model.n-layers {layers}")
    assert code == 2 and "--model.n-layers is" in line
    assert outcome_of(f"plan sums.py --model.vocab-size 16 --data.batch-size {10**9 + 7}")[0] == 0


def test_a_line_of_error_is_fit_for_a_terminal(place: Path) -> None:
    code, line = outcome_of("sample \x1b[2Jnone")
    assert (code, line) == (
        2,
        "error: \\x1b[2Jnone is not a run; allowed: a folder with an experiment.json, or a name in runs/",
    )
    write_json(Path("hf-tale/config.json"), {"model_type": "\x1b[2J\n" + "x" * 10**6})
    code, line = outcome_of("sample hf:hf-tale")
    assert code == 2 and len(line) < 1100 and line.isprintable()


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_what_another_program_s_format_cannot_hold_is_refused_when_it_is_read(place: Path, format: str) -> None:
    path = checkpoint("tale") / "config.json"
    config = read_json(path)
    write_json(path, config | {"model": config["model"] | {"rope_theta": 1e308}})
    reseal(path.parent)
    line = outcome_of(f"export tale --format {format} --out out")[1]
    assert line.startswith(f"error: {path}") and ": model.rope_theta is 1e+308; allowed: " in line
    (checkpoint("talk") / "chat_template.json").write_text(json.dumps({"template": "", "eos_token": "\ud800"}))
    reseal(checkpoint("talk"))
    code, line = outcome_of(f"export talk --format {format} --out out")
    assert code == 2 and "chat_template.json is not valid JSON" in line


@pytest.mark.parametrize(
    ("name", "value"), [("text_bytes", {"a": 1}), ("documents", None), ("tokens", -1), ("tokens", True)]
)
def test_counts_of_a_store_are_counts(place: Path, name: str, value: Any) -> None:
    for run, pattern in (("tale", "text*"), ("sums", "adder*")):
        (store,) = Path("data").glob(pattern)
        facts = read_json(store / "dataset.json")
        facts["splits"]["val"][name] = value
        write_json(store / "dataset.json", facts)
        code, line = outcome_of(f"evaluate {run}")
        assert code == 2 and str(store) in line, line


@pytest.mark.slow
def test_a_report_does_without_a_figure_that_is_missing(place: Path) -> None:
    lines = Path("sums/metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if name != "tokens"} for line in lines]
    Path("sums/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome_of("report sums") == (0, "")


def test_a_tokenizer_that_makes_its_library_panic_is_told(place: Path) -> None:
    content = read_json(Path("hf-tale/tokenizer.json"))
    content["model"]["continuing_subword_prefix"] = "/etc/passwd"
    write_json(Path("hf-tale/tokenizer.json"), content)
    code, line = outcome_of("sample hf:hf-tale")
    assert code == 2 and "this is not a tokenizer of Hugging Face's tokenizers" in line


# Words and fields ----------------------------------------------------------------------------------------------------

OPTIONS = (
    *("--model.dim", "--data.batch-size", "--training.macro-batches", "--optimizer.lr", "--optimizer.betas", "--name"),
    *("--corpus.files", "--schedule.lr.shape", "--max-new-tokens", "--temperature", "--top-k", "--seed", "--stop"),
    *("--format", "--out", "--device", "--split", "--checkpoint", "--devices", "--tokens", "--price", "--json"),
    *("--help", "--run-dir", "--code", "--draft", "--message", "--folder", "--files"),
)
WORDS = (
    *(
        "sums",
        "hf:hf-sums",
        "hf:",
        "nowhere",
        "sums.py",
        ".",
        "..",
        "/",
        "/dev/null",
        "none.json",
        "chat",
        "text",
        "adder",
    ),
    *("cpu", "cuda:99", "gguf", "-1", "0", "1", "3", "1e999", "nan", "1e308", "9" * 30, "-", "--", "=", "--model.dim="),
    *("{}", "None", "\0", "\ud800", "x" * 5000, ""),
)
SAFE = [name for name in COMMANDS if name != "demo"]


LINES = st.tuples(
    st.sampled_from([*SAFE, "", "trian", "--version", "-h"]),
    st.lists(st.sampled_from(OPTIONS) | st.sampled_from(WORDS) | st.text(max_size=8), max_size=5),
)
"""A command and what stands behind it."""


@settings(max_examples=20)
@given(line=LINES)
def test_any_command_line_is_obeyed_or_told_in_one_line(
    line: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("words")
    for name in ("sums", "hf-sums"):
        shutil.copytree(runs() / name, folder / name)
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setattr("sys.stdin", io.StringIO())
        with contextlib.redirect_stderr(errors):
            code = main([line[0], *line[1]])
    said = errors.getvalue().splitlines()
    assert code == 0 or not line[0] or (code in (1, 2) and said[-1].startswith(("error: ", "stopped: "))), said
    assert "Traceback" not in errors.getvalue()


@pytest.mark.slow
@settings(max_examples=400)
@given(line=LINES)
def test_any_of_many_command_lines_is_obeyed_or_told_in_one_line(
    line: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    test_any_command_line_is_obeyed_or_told_in_one_line.hypothesis.inner_test(line, tmp_path_factory)  # type: ignore[attr-defined]


def fields(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every field in the JSON of an experiment."""
    for name, value in config.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields(value, (*path, name))


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(data: st.DataObject) -> None:
    content = to_json(load_experiment(runs() / "sums.py"), kinds())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(fields(content))))
        part = content
        for name in path[:-1]:
            part = part[name] if isinstance(part, dict) and name in part else {}
        part[path[-1]] = data.draw(st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=5))
    try:
        experiment = from_json(Experiment, json.loads(json.dumps(content)), kinds())
        check(experiment)
        experiment.corpus.check()  # type: ignore[attr-defined]
    except UserError as error:
        assert "\n" not in str(error) or any("\n" in str(value) for value in VALUES)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_an_experiment_file_is_told_in_one_line_where_it_is_not_python(seed: int, tmp_path_factory: Any) -> None:
    """What Python can run is the user's own code: its error keeps the traceback, which ends in that file."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_bytes(change_bytes((runs() / "sums.py").read_bytes(), random.Random(seed))[1])
    try:
        load_experiment(path)
    except UserError as error:
        assert str(path) in str(error)
    except Exception as error:
        assert traceback.extract_tb(error.__traceback__)[-1].filename == str(path)


@pytest.mark.parametrize(
    "content", [b"x = " + b"(" * 10_000, b"x = " + b"-" * 100_000 + b"1", b"x = 1\0", b"\xff", b"x = '"]
)
def test_what_python_s_parser_cannot_read_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_bytes(content)
    with pytest.raises(UserError, match=r"own\.py"):
        load_experiment(tmp_path / "own.py")
