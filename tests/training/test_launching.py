"""From an experiment to a run: what its parts demand of each other, how long it is, and training it from Python."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import cleangpt
from cleangpt.checkpoints.run_folder import read_experiment
from cleangpt.commands import main
from cleangpt.config import (
    FineTuningConfig,
    LoRAConfig,
    MuonConfig,
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    TrainingConfig,
)
from cleangpt.corpora import prepare
from cleangpt.data.columns import Column
from cleangpt.distributed.device import choose_precision
from cleangpt.distributed.layout import Layout
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPT
from cleangpt.objectives import NextToken
from cleangpt.tracking.metrics import read_metrics
from cleangpt.training.launch import check, check_here
from cleangpt.training.resolve import curves, num_steps, resolve, resolve_with
from cleangpt.training.summary import next_commands

Build = Callable[..., Experiment]


# What parts demand of each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data__seq_len": 99}, "data.seq_len is 99; allowed: at most model.max_seq_len, which is 9"),
        ({"training__accumulation": 5}, "training.accumulation reaches 5 batches a step; allowed: at most "
         "training.batches_per_macro_batch, which is 4"),
        ({"training__micro_batch_size": 3}, "training.micro_batch_size is 3; allowed: a divisor of the 8 samples of a "
         "batch on one device"),
        ({"optimizer": OptimizerConfig(lr=0.0, muon=MuonConfig(lr=0.1))},
         "optimizer.lr is 0.0; allowed with optimizer.muon.lr: more than 0"),
        ({"schedule": ScheduleConfig(lr=Schedule(shape="wsd", warmup=0.5, decay=0.6))},
         "schedule.lr.decay is 0.6; allowed: at most 1 - warmup, which is 0.5"),
        ({"fine_tuning": FineTuningConfig(lora=LoRAConfig(rank=2))},
         "fine_tuning.lora.rank is 2; allowed without init_from: None, since weights are random"),
        ({"training__loss_chunk": 4, "training__compile": "model"},
         "training.loss_chunk is 4; allowed with training.compile model: None; compile blocks instead"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_in_one_line(tiny: Build, fields: dict[str, Any], line: str) -> None:
    check(tiny())
    with pytest.raises(UserError) as caught:
        check(tiny(**fields))
    assert str(caught.value) == line


def test_a_batch_that_the_devices_do_not_divide_is_refused(tiny: Build) -> None:
    with pytest.raises(UserError, match=r"data.batch_size is 8; allowed: a multiple of the 3 devices"):
        check(tiny(), Layout(replicas=3))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data__seq_len": 8}, "data.seq_len is 8; allowed: 9, the corpus's row length - 1"),
        ({"init_from": "nowhere"}, "nowhere is not a run"),
        ({"training__device": "cuda:99"}, "this machine has"),
        ({"training__precision": "fp8"}, "fp8"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_before_the_corpus_is_read(
    tiny: Build, fields: dict[str, Any], line: str
) -> None:
    check_here(tiny())
    with pytest.raises(UserError, match=line):
        check_here(tiny(**fields))
    assert not Path("data").exists() and not Path("runs").exists()


@dataclass(frozen=True, kw_only=True)
class Preferred(NextToken):
    """Reads what no corpus of text has."""

    reads = frozenset({"reward"})


def test_an_objective_that_reads_what_the_batches_do_not_have_is_refused(tiny: Build) -> None:
    experiment = tiny(objective=Preferred())
    store = prepare(experiment.corpus, Path("data"))
    with pytest.raises(UserError, match="objective Preferred reads 'reward', which the batches of this corpus do not"):
        check(resolve_with(experiment, store), dataset=store)
    check(resolve_with(tiny(), store), dataset=store)


@pytest.mark.parametrize(
    ("read", "brought", "message"),
    [
        ({"stride"}, set(), "model GPT reads 'stride', which the batches of this corpus do not have"),
        (set(), {"stride"}, "the batches of this corpus have the input 'stride'; GPT does not read it"),
        ({"stride"}, {"stride"}, None),
    ],
)
def test_inputs_that_the_model_reads_are_those_of_the_batches(
    read: set[str], brought: set[str], message: str | None, tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny()
    store = prepare(experiment.corpus, Path("data"))
    resolved = resolve_with(experiment, store)
    monkeypatch.setattr(store, "columns", dict.fromkeys(brought, Column(dtype="uint8", role="input")))
    monkeypatch.setattr(GPT, "inputs", frozenset(read))
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check(resolved, dataset=store)


# The length of a run -------------------------------------------------------------------------------------------------


def with_length(experiment: Experiment, **length: Any) -> Experiment:
    training = TrainingConfig(batches_per_macro_batch=4, device="cpu", **length)
    return Experiment(**{**vars(experiment), "training": training})


@pytest.mark.parametrize(
    ("length", "macro_batches"),
    [
        ({"macro_batches": 7}, 7),
        ({"steps": 1}, 1),
        ({"steps": 8}, 2),
        ({"steps": 9}, 3),
        ({"steps": 8, "accumulation": 2}, 4),
        ({"steps": 8, "accumulation": 3}, 4),  # a macro-batch of 4 batches is two steps of 2
        ({"tokens": 1}, 1),
        ({"tokens": 4 * 8 * 9 * 5}, 5),
        ({"tokens": 4 * 8 * 9 * 5 + 1}, 6),
        ({"epochs": 1}, 3),  # 90 samples, 32 in a macro-batch
        ({"epochs": 0.3}, 1),
        ({"epochs": 3.2}, 9),
    ],
)
def test_steps_tokens_and_epochs_are_rounded_up_to_whole_macro_batches(
    tiny: Build, length: dict[str, Any], macro_batches: int
) -> None:
    resolved = resolve(with_length(tiny(), **length), 13, epoch=90)
    assert resolved.training.macro_batches == macro_batches
    assert resolved.training.steps is resolved.training.tokens is resolved.training.epochs is None


@pytest.mark.parametrize("steps", [1, 10, 57, 200])
@pytest.mark.parametrize("schedule", [Schedule(shape="linear", initial=0.25), Schedule(warmup=0.5)])
def test_a_run_of_growing_steps_is_the_shortest_that_has_as_many(tiny: Build, steps: int, schedule: Schedule) -> None:
    experiment = with_length(tiny(schedule=ScheduleConfig(batch_size=schedule)), steps=steps, accumulation=4)
    resolved = resolve(experiment, 13)
    assert num_steps(resolved) == len(curves(resolved)[0]) >= steps
    if (length := resolved.training.num_macro_batches) > 1:
        shorter = with_length(experiment, macro_batches=length - 1, accumulation=4)
        assert num_steps(resolve(shorter, 13)) < steps


def test_epochs_need_a_dataset_of_one_corpus(tiny: Build) -> None:
    with pytest.raises(UserError, match=r"training.epochs is 2; allowed for a mixture, and before the corpus is prep"):
        resolve(with_length(tiny(), epochs=2), 13)


# From Python ---------------------------------------------------------------------------------------------------------


def test_an_experiment_is_trained_and_its_model_asked_from_python(tiny: Build) -> None:
    run = cleangpt.train(with_length(tiny(run_dir="run"), epochs=1))
    assert run == Path("run") and len(read_metrics(run)) == 3
    resolved = read_experiment(run)
    assert (resolved.training.macro_batches, resolved.training.epochs) == (3, None)
    log = (run / "log.txt").read_text()
    assert "precision fp32" in log and "given    training.epochs 1, rounded up to full macro-batches" in log
    loaded = cleangpt.load(run)
    assert loaded.model.config == resolved.model and not loaded.model.training
    texts = [loaded.generate("12+34=", max_new_tokens=5, seed=seed, temperature=3.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(loaded.tokenizer.encode(loaded.generate("12+34=", max_new_tokens=3))) <= 3
    with pytest.raises(UserError, match=r"top_p is 2; allowed: a number above 0"):
        loaded.generate("1", top_p=2)


@pytest.mark.slow
def test_importing_cleangpt_imports_no_pytorch() -> None:
    code = "import cleangpt, sys; sys.exit('torch' in sys.modules or not hasattr(cleangpt, 'train'))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cleangpt.trian  # type: ignore[attr-defined]


def test_a_run_is_made_longer_in_any_unit(tiny: Build, capsys: pytest.CaptureFixture[str]) -> None:
    cleangpt.train(with_length(tiny(run_dir="run"), macro_batches=1))
    assert main(["resume", "run", "--training.epochs", "9", "--training.tokens=1", "--training.steps", "4"]) == 0
    assert len(read_metrics(Path("run"))) == 1, "the last of several lengths counts"
    for words, macro_batches in ((["steps", "8"], 2), (["tokens", str(4 * 8 * 9 * 3)], 3), (["macro-batches", "4"], 4)):
        assert main(["resume", "run", f"--training.{words[0]}", words[1]]) == 0, capsys.readouterr().err
        assert len(read_metrics(Path("run"))) == read_experiment(Path("run")).training.macro_batches == macro_batches


# What a run ends with ------------------------------------------------------------------------------------------------


def test_the_next_commands_name_the_file_of_ones_own_classes_alone(tiny: Build) -> None:
    """Wherever in the experiment they are; the words are those of a shell."""

    @dataclass(frozen=True)
    class Own(NextToken):
        """A loss of one's own."""

    run, file = Path("my runs/1"), Path("my file.py")
    assert next_commands(tiny(), run, file) == [f"  cleangpt {name} 'my runs/1'" for name in CALLS]
    own = tiny(objective=Own())
    assert next_commands(own, run, file)[0] == "  cleangpt evaluate 'my runs/1' --code 'my file.py'"
    assert next_commands(own, run, None)[0].endswith(" --code FILE.py"), "trained from Python"
    run.mkdir(parents=True)
    (run / "experiment.py").touch()
    assert next_commands(own, run, None)[1] == "  cleangpt sample 'my runs/1' --code 'my runs/1/experiment.py'"


CALLS = ("evaluate", "sample", "report")


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_a_device_has_it(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, chosen: str) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    assert choose_precision(torch.device("cuda"), "auto") == chosen
    assert choose_precision(torch.device("cpu"), "auto") == "fp32"
    assert choose_precision(torch.device("cpu"), "bf16") == "bf16"


def test_the_default_precision_is_auto() -> None:
    assert TrainingConfig(macro_batches=1, batches_per_macro_batch=1).precision == "auto"
