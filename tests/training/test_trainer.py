"""The loop: same update however a step is cut, stops and resumes bit for bit, skips what is not finite."""

import json
import math
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cleangpt.checkpoints.checkpoint import CheckpointEntry
from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.config import Schedule, ScheduleConfig
from cleangpt.corpora import prepare
from cleangpt.data.batch import IGNORED, Batch
from cleangpt.errors import DivergedError, RunFailedError
from cleangpt.experiment import Experiment
from cleangpt.files import read_json, write_json
from cleangpt.models import head
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Loss, NextToken
from cleangpt.tracking.metrics import read_metrics, read_steps
from cleangpt.tracking.report import write_report
from cleangpt.training.launch import train
from cleangpt.training.meter import LossSums, StepResult
from cleangpt.training.trainer import Trainer
from tests.losses import scaled

Build = Callable[..., Experiment]
Open = Callable[[Experiment], Trainer]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# Normalisation ---------------------------------------------------------------------------------------------------


def uneven_mask(trainer: Trainer) -> None:
    """Makes every sample's count of targets differ, between micro-batches and batches alike."""
    original = trainer.source.next

    def next_batch() -> Batch:
        batch = original()
        for row in range(len(batch.targets)):
            batch.targets[row, : int(batch.inputs["tokens"][row].sum()) % batch.targets.shape[1]] = IGNORED
        return batch

    trainer.source.next = next_batch  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "split",
    [
        {"data__batch_size": 8, "training__accumulation": 4, "training__batches_per_macro_batch": 4},
        {"data__batch_size": 16, "training__accumulation": 2, "training__batches_per_macro_batch": 2},
        {"data__batch_size": 32, "training__micro_batch_size": 4, "training__batches_per_macro_batch": 1},
        {"data__batch_size": 8, "training__accumulation": 4, "training__batches_per_macro_batch": 4,
         "training__micro_batch_size": 1},
    ],
)  # fmt: skip
def test_a_step_is_the_same_however_it_is_cut(tiny: Build, trainer: Open, split: dict[str, int]) -> None:
    """Against one batch of 32 in one piece, with masks of uneven length."""
    base = {"model__dropout": 0.0, "data__batch_size": 32, "training__batches_per_macro_batch": 1}
    whole, cut = trainer(tiny(**base)), trainer(tiny(**(base | split)))
    for each in (whole, cut):
        uneven_mask(each)
        for _ in range(3):
            each.step()
        each.source.close()
    assert whole.meter.count == cut.meter.count
    torch.testing.assert_close(whole.meter.loss, cut.meter.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.meter.grad_norm, cut.meter.grad_norm, atol=1e-4, rtol=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(cut)[name], atol=2e-5, rtol=1e-3)


def test_the_gradient_is_that_of_the_mean_over_all_targets(tiny: Build, trainer: Open) -> None:
    """Against autograd of the plain mean cross-entropy over the batches put together."""
    ours = trainer(tiny(model__dropout=0.0, training__accumulation=4, optimizer__clip_norm=None))
    uneven_mask(ours)
    batches = [ours.source.next() for _ in range(4)]
    ours.source.close()
    inputs, targets = (
        torch.cat(parts) for parts in zip(*((b.inputs["tokens"], b.targets) for b in batches), strict=True)
    )
    logits = ours.model(inputs).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED).backward()
    expected = {name: parameter.grad.clone() for name, parameter in ours.model.named_parameters()}
    ours.model.zero_grad()
    for batch in batches:
        ours._backward(batch, sum(each.num_targets for each in batches), LossSums(ours.device, 1))
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


# Resume ----------------------------------------------------------------------------------------------------------


def strip_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {"tokens_per_second", "step_time", "data_wait_share", "time_trained", "peak_memory", "mfu"}
    return [{key: value for key, value in line.items() if key not in times} for line in metrics]


def signal_after(trainer: Trainer, steps: int) -> None:
    original, count = trainer.step, 0

    def step() -> None:
        nonlocal count
        original()
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGTERM)

    trainer.step = step  # type: ignore[method-assign]


GROWING = {
    "schedule": ScheduleConfig(
        lr=Schedule(shape="cosine", warmup=0.2),
        weight_decay=Schedule(shape="linear", final=2.0),
        batch_size=Schedule(shape="linear", initial=0.5, final=1.0),
    ),
    "training__accumulation": 2,
}


@pytest.mark.default(1)
@pytest.mark.parametrize("steps", [3, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 4, 9))])
@pytest.mark.parametrize("fields", [{}, GROWING], ids=["plain", "growing batch"])
def test_a_run_stopped_by_a_signal_ends_bit_for_bit_like_an_unbroken_one(
    tiny: Build, trainer: Open, steps: int, fields: dict[str, Any]
) -> None:
    unbroken = trainer(tiny(run_dir="unbroken", **fields))
    assert unbroken.train() == "finished"
    broken = trainer(tiny(run_dir="broken", **fields))
    signal_after(broken, steps)
    assert broken.train() == "interrupted"
    resumed = trainer(tiny(run_dir="broken", **fields))
    assert resumed.position.step == steps
    assert resumed.train() == "finished"
    assert_equal(weights(unbroken), weights(resumed))
    assert strip_times(read_metrics(Path("broken"))) == strip_times(read_metrics(Path("unbroken")))
    for one, two in zip(*(list_snapshots(Path(run) / "snapshots") for run in ("unbroken", "broken")), strict=True):
        assert one.name == two.name
        assert_equal(load_snapshot(one)["model"], load_snapshot(two)["model"])


@pytest.mark.slow
def test_a_resumed_run_does_its_lost_macro_batch_again_and_records_it_once(tiny: Build, trainer: Open) -> None:
    """A crash after a macro-batch was recorded but before its snapshot."""
    unbroken = trainer(tiny(run_dir="unbroken"))
    unbroken.train()
    broken = trainer(tiny(run_dir="broken"))
    saved = broken.save_snapshot
    broken.save_snapshot = lambda: saved() if broken.position.macro_batch < 3 else 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        broken.train()
    assert [line["macro_batch"] for line in read_metrics(Path("broken"))] == [1, 2, 3]
    resumed = trainer(tiny(run_dir="broken"))
    resumed.train()
    assert_equal(weights(unbroken), weights(resumed))
    assert [line["macro_batch"] for line in read_metrics(Path("broken"))] == [1, 2, 3, 4, 5, 6]
    names = [sorted(path.name for path in Path(run, "checkpoints").iterdir()) for run in ("unbroken", "broken")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_damaged_newest_snapshot_costs_one_macro_batch(tiny: Build, trainer: Open) -> None:
    first = trainer(tiny(run_dir="run", training__macro_batches=6))
    signal_after(first, 10)
    first.train()
    newest = list_snapshots(Path("run/snapshots"))[0]
    (newest / "shard_00000.safetensors").write_bytes(b"")
    resumed = trainer(tiny(run_dir="run"))
    assert resumed.position.macro_batch == 2 and resumed.position.step == 8
    assert "is corrupt (shard_00000.safetensors has 0 bytes" in Path("run/log.txt").read_text()
    resumed.train()
    unbroken = trainer(tiny(run_dir="unbroken"))
    unbroken.train()
    assert_equal(weights(unbroken), weights(resumed))


@pytest.mark.slow
def test_a_signal_during_validation_saves_and_validates_again_later(tiny: Build, trainer: Open) -> None:
    unbroken = trainer(tiny(run_dir="unbroken"))
    unbroken.train()
    broken = trainer(tiny(run_dir="broken"))
    validate = broken.validate

    def interrupted() -> float:
        if broken.position.macro_batch == 2:
            signal.raise_signal(signal.SIGINT)
        return validate()

    broken.validate = interrupted  # type: ignore[method-assign]
    assert broken.train() == "interrupted"
    assert list_snapshots(Path("broken/snapshots"))[0].name == "mb000002_b00004"
    resumed = trainer(tiny(run_dir="broken"))
    resumed.train()
    assert_equal(weights(unbroken), weights(resumed))
    assert strip_times(read_metrics(Path("broken"))) == strip_times(read_metrics(Path("unbroken")))


def test_a_second_ctrl_c_stops_at_once(tiny: Build, trainer: Open) -> None:
    broken = trainer(tiny(run_dir="run"))
    step = broken.step

    def twice() -> None:
        step()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    broken.step = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert list_snapshots(Path("run/snapshots")) == []


def test_a_second_sigterm_is_the_same_request(tiny: Build, trainer: Open) -> None:
    """Schedulers send it to all processes of a job, and torchrun sends it on to those that it has started."""
    run = trainer(tiny(run_dir="run"))
    step = run.step

    def twice() -> None:
        step()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    run.step = twice  # type: ignore[method-assign]
    assert run.train() == "interrupted"
    assert [path.name for path in list_snapshots(Path("run/snapshots"))] == ["mb000000_b00001"]


def test_each_sample_is_seen_once_an_epoch_across_a_resume(tiny: Build, trainer: Open) -> None:
    seen: list[list[int]] = []

    def watch(each: Trainer) -> None:
        original = each.source.next

        def next_batch() -> Batch:
            batch = original()
            seen.extend(batch.inputs["tokens"].tolist())
            return batch

        each.source.next = next_batch  # type: ignore[method-assign]

    fields = {"run_dir": "run", "data__batch_size": 9, "training__macro_batches": 5}
    first = trainer(tiny(**fields))
    watch(first)
    signal_after(first, 7)
    first.train()
    second = trainer(tiny(**fields))
    watch(second)
    second.train()
    assert len(seen) == 180
    for epoch in (seen[:90], seen[90:]):
        assert len({tuple(row) for row in epoch}) == 90


# Stopping --------------------------------------------------------------------------------------------------------


def test_early_stopping_ends_the_run_also_when_resumed_in_between(tiny: Build, trainer: Open) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    fields = {"run_dir": "run", "early_stopping__patience": 3}
    first = trainer(tiny(**fields))
    signal_after(first, 13)
    first.validate = lambda: next(losses)  # type: ignore[method-assign]
    assert first.train() == "interrupted"
    second = trainer(tiny(**fields))
    second.validate = lambda: next(losses)  # type: ignore[method-assign]
    assert second.train() == "stopped early"
    assert second.position.macro_batch == 5
    third = trainer(tiny(**fields))
    assert third.train() == "stopped early"
    assert third.position.macro_batch == 5


def test_a_finished_run_started_again_changes_nothing(tiny: Build, trainer: Open) -> None:
    trainer(tiny(run_dir="run")).train()
    before = {path: path.stat().st_mtime_ns for path in Path("run/snapshots").rglob("*")}
    again = trainer(tiny(run_dir="run"))
    assert again.train() == "finished"
    assert {path: path.stat().st_mtime_ns for path in Path("run/snapshots").rglob("*")} == before


# What is not finite ----------------------------------------------------------------------------------------------


def poison(trainer: Trainer, steps: set[int]) -> None:
    trainer.objective = scaled(trainer.objective, lambda: math.nan if trainer.position.step in steps else 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny: Build, trainer: Open) -> None:
    run = trainer(tiny(run_dir="run", training__macro_batches=1))
    poison(run, {1, 2})
    run.step()
    before = weights(run)
    run.step()
    run.step()
    assert_equal(before, weights(run))
    run.step()
    assert not torch.equal(before["final_norm.weight"], weights(run)["final_norm.weight"])
    run.train()
    line = read_metrics(Path("run"))[0]
    assert line["skipped_steps"] == 2
    assert math.isfinite(line["train_loss"]) and math.isfinite(line["grad_norm"])


class WithMetric(NextToken):
    """Its metric is the sum of its targets, which stays finite where the loss does not."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        loss = super().__call__(model, batch)
        total = loss.total * (math.nan if self.bad else 1.0)
        return Loss(total, {"target": batch.targets.clamp(min=0).sum().float()})

    bad: ClassVar[bool] = False


@pytest.mark.default(2)
@pytest.mark.parametrize("bad", [{0}, {3}, {1, 2}, {0, 2, 3}, {0, 1, 2, 3}], ids=str)
def test_every_mean_over_a_macro_batch_is_over_the_steps_that_were_made(
    tiny: Build, trainer: Open, monkeypatch: pytest.MonkeyPatch, bad: set[int]
) -> None:
    """Numerator and denominator: loss, gradient norm and the objective's metrics, with as many targets as come."""
    run = trainer(tiny(run_dir="run", training__macro_batches=2))
    uneven_mask(run)
    run.objective = WithMetric()
    made: list[StepResult] = []
    add, step = run.meter.add, run.step

    def keep(result: StepResult) -> None:
        if run.position.step - 1 not in bad and run.position.step <= 4:
            made.append(result)
        add(result)

    def maybe() -> None:
        monkeypatch.setattr(WithMetric, "bad", run.position.step in bad)
        step()

    run.meter.add, run.step = keep, maybe  # type: ignore[method-assign]
    run.train()
    line, count = read_metrics(Path("run"))[0], sum(result.count for result in made)
    assert line["skipped_steps"] == len(bad) and line["step"] == 4
    expected = {
        "train_loss": [result.loss.item() for result in made],
        "train_target": [result.metrics["target"].item() for result in made],
    }
    for name, sums in expected.items():
        assert line[name] == pytest.approx(math.fsum(sums) / count if count else math.nan, nan_ok=True)
    norms = [result.grad_norm.item() for result in made]
    assert line["grad_norm"] == pytest.approx(math.fsum(norms) / len(norms) if norms else math.nan, nan_ok=True)
    for row in read_steps(Path("run"))[:4]:
        skipped = row["step"] - 1 in bad
        assert row["skipped"] == skipped
        assert math.isfinite(row["loss"]) != skipped and math.isfinite(row["grad_norm"]) != skipped


def strict(path: Path) -> Any:
    """The JSON of a file, or of its lines, as the standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} has {name}")

    text = path.read_text(encoding="utf-8")
    return [json.loads(part, parse_constant=refuse) for part in (text.splitlines() if "jsonl" in path.name else [text])]


@pytest.mark.slow
def test_a_run_that_ends_with_weights_of_no_use_says_so_and_all_its_files_are_json(tiny: Build) -> None:
    """Its weights are finite, its losses are not. So are the figures of an evaluation, and it can be shown."""
    fields = {"optimizer__lr": 1e18, "optimizer__clip_norm": None, "training__max_skipped_steps": 1000}
    experiment = tiny(run_dir="run", saving__checkpoint_every=1, training__macro_batches=2, **fields)
    with pytest.raises(DivergedError, match=r"steps in a row up to step 8 .* the last good snapshot is run.*mb000001"):
        train(experiment)
    lines = read_metrics(Path("run"))
    assert [math.isnan(line["val_loss"]) for line in lines] == [True]
    (entry,) = map(CheckpointEntry.from_json, read_json(Path("run/checkpoints/index.json"))["checkpoints"])
    assert (entry.macro_batch, math.isnan(entry.val_loss)) == (1, True)
    write_json(Path("run/evaluation.json"), {"loss": math.nan, "of": [math.inf, {"x": -math.inf}]})
    write_report([Path("run")])
    files = [path for path in Path("run").rglob("*.json*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        strict(path)
    with pytest.raises(DivergedError):
        train(experiment)


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_last_good_snapshot(
    tiny: Build, trainer: Open
) -> None:
    run = trainer(tiny(run_dir="run", training__max_skipped_steps=3))
    poison(run, {9, 10, 11})
    with pytest.raises(RunFailedError, match=r"3 steps in a row .* the last good snapshot is run.snapshots.mb000002;"):
        run.train()
    assert list_snapshots(Path("run/snapshots"))[0].name == "mb000002"


# Figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_macro_batch_are_right(tiny: Build, trainer: Open) -> None:
    experiment = tiny(run_dir="run", training__macro_batches=3, model__dropout=0.0, optimizer__lr=0.0)
    run = trainer(experiment)
    run.train()
    lines = read_metrics(Path("run"))
    last = lines[-1]
    assert [line["samples"] for line in lines] == [32, 64, 96]
    assert last["tokens"] == 96 * experiment.data.seq_len
    assert last["step"] == 12 and last["training_batch_size"] == 8
    assert last["times_visited"] == pytest.approx(96 / 90) and last["visited_share"] == 1.0
    assert lines[0]["visited_share"] == pytest.approx(32 / 90)
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    split = prepare(experiment.corpus, Path(experiment.data.folder)).sources[0].dataset.splits["val"]
    rows = split.read(0, split.tokens).astype(np.int64).reshape(-1, split.row_length)
    counts = split.read_mask(0, split.tokens).reshape(-1, split.row_length)[:, 1:]
    with torch.no_grad():
        logits = run.model(torch.from_numpy(rows[:, :-1])).log_softmax(-1)
    losses = -logits.gather(-1, torch.from_numpy(rows[:, 1:, None]))[..., 0].numpy()
    assert last["val_loss"] == pytest.approx(losses[counts == 1].mean(), rel=1e-5)
    assert 0 <= last["data_wait_share"] <= 1 and last["tokens_per_second"] > 0
    assert 0 <= last["exact_match"] <= 1


def test_validation_takes_batches_of_a_size_of_its_own(tiny: Build, trainer: Open) -> None:
    plain, larger = (trainer(tiny(run_dir=f"by_{size}", data__val_batch_size=size)) for size in (None, 13))
    rows, objective = [], larger.objective

    class Counted(NextToken):
        def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
            rows.append(len(batch))
            return objective(model, batch)

    larger.validator.objective = Counted()
    assert larger.validate() == pytest.approx(plain.validate())
    assert rows == [13] * 4  # of 40 samples


@pytest.mark.slow
def test_time_trained_goes_on_across_a_resume(tiny: Build, trainer: Open) -> None:
    first = trainer(tiny(run_dir="run"))
    signal_after(first, 9)
    first.train()
    before = first.position.time_trained
    second = trainer(tiny(run_dir="run"))
    second.train()
    assert read_metrics(Path("run"))[-1]["time_trained"] > before > 0


# Fine-tuning -----------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_best_checkpoint_and_says_what_did_not_fit(tiny: Build, trainer: Open) -> None:
    base = trainer(tiny(run_dir="base"))
    base.train()
    tuned = trainer(tiny(run_dir="tuned", init_from="base", model__n_layers=3))
    checkpoint = torch.equal(tuned.model.blocks[0].mlp.up.weight, base.model.blocks[0].mlp.up.weight)
    log = Path("tuned/log.txt").read_text()
    assert checkpoint or "starting from the weights of base" in log
    assert "blocks.2.mlp.up.weight is not in the checkpoint; it keeps its initial values" in log
    assert tuned.position.step == 0
    tuned.source.close()


def test_fine_tuning_loads_exactly_the_checkpoint(tiny: Build, trainer: Open) -> None:
    from safetensors.torch import load_file

    from cleangpt.checkpoints.checkpoint import best_checkpoint

    trainer(tiny(run_dir="base")).train()
    tuned = trainer(tiny(run_dir="tuned", init_from="base"))
    assert_equal(load_file(best_checkpoint(Path("base")) / "model.safetensors"), weights(tuned))
    tuned.source.close()


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_is_saved_under_the_same_names(tiny: Build, trainer: Open) -> None:
    plain = trainer(tiny(run_dir="plain", model__dropout=0.0))
    plain.train()
    compiled = trainer(tiny(run_dir="compiled", model__dropout=0.0, training__compile="model"))
    compiled.train()
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    for one, two in zip(read_metrics(Path("plain")), read_metrics(Path("compiled")), strict=True):
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_fp16_scales_the_loss_and_resumes_with_the_scale(tiny: Build, trainer: Open) -> None:
    fields = {"training__precision": "fp16", "training__macro_batches": 8, "training__max_skipped_steps": 100}
    unbroken = trainer(tiny(run_dir="unbroken", **fields))
    unbroken.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    unbroken.train()
    last = read_metrics(Path("unbroken"))[-1]
    assert last["skipped_steps"] > 3, "a scale of 2**40 overflows fp16 until it has been halved often enough"
    assert unbroken.optimizer.scaler.get_scale() < 2**40
    broken = trainer(tiny(run_dir="broken", **fields))
    broken.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    signal_after(broken, 25)
    broken.train()
    resumed = trainer(tiny(run_dir="broken", **fields))
    assert resumed.optimizer.scaler.get_scale() == broken.optimizer.scaler.get_scale()
    resumed.optimizer.scaler.set_growth_interval(3)
    resumed.train()
    assert_equal(weights(unbroken), weights(resumed))


@pytest.mark.default(1)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_keeps_fp32_weights_and_learns_nearly_the_same(tiny: Build, trainer: Open, precision: str) -> None:
    plain = trainer(tiny(run_dir="plain", model__dropout=0.0))
    plain.train()
    mixed = trainer(tiny(run_dir="mixed", model__dropout=0.0, training__precision=precision))
    mixed.train()
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32}
    one, two = read_metrics(Path("plain"))[-1], read_metrics(Path("mixed"))[-1]
    assert one["val_loss"] != two["val_loss"]
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=0.02)


@pytest.mark.slow
def test_recomputed_activations_change_nothing_but_the_memory(tiny: Build, trainer: Open) -> None:
    """Bit for bit, dropout included; counts the bytes that autograd keeps for the backward pass."""
    kept: dict[str, int] = {}
    ends = {}
    ways: dict[str, dict[str, Any]] = {
        "kept": {}, "one in two": {"training__recompute_every": 2}, "recomputed": {"training__recompute_every": 1},
        "selective": {"training__recompute_every": 1, "training__recompute": "selective"},
    }  # fmt: skip
    for name, fields in ways.items():
        run = trainer(tiny(run_dir=name, model__dropout=0.1, **fields))
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = run.source.next()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.objective(run.forward_model, batch)
        kept[name] = sum(seen.values())
        run.source.close()
        run = trainer(tiny(run_dir=f"{name} trained", model__dropout=0.1, **fields))
        run.train()
        ends[name] = weights(run)
    assert kept["recomputed"] < kept["one in two"] < kept["kept"]
    for name in ways:
        assert_equal(ends["kept"], ends[name])


@pytest.mark.default(1)
@pytest.mark.parametrize("compiled", ["model", "blocks"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"training__recompute_every": 1}, marks=pytest.mark.slow),
        pytest.param({"training__recompute_every": 1, "training__recompute": "selective"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "recomputed", "selective"],
)
def test_no_micro_batch_is_compiled_for_a_shape_of_its_own(
    tiny: Build, trainer: Open, monkeypatch: pytest.MonkeyPatch, compiled: str, fields: dict[str, Any]
) -> None:
    """Neither the last of a validation split of 13 samples in micro-batches of 4, nor those of a growing step, nor the
    lengths that are sampled and scored: the whole run compiles once to train and once to validate, what comes after the
    logits by itself with blocks."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(head, "fused", cache(head.fused.__wrapped__))
    fields = GROWING | {"data__val_samples": 13, "training__micro_batch_size": 4, **fields}
    run = trainer(tiny(training__compile=compiled, **fields))
    run.train()
    assert len(read_metrics(run.run)) == 6
    assert counter.frame_count == {"model": 2, "blocks": 4}[compiled]


def test_without_a_compiler_a_line_says_so_and_training_goes_on(
    tiny: Build, trainer: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    run = trainer(tiny(run_dir="run", training__compile="blocks"))
    assert run.train() == "finished"
    log = Path("run/log.txt").read_text()
    assert log.count("training.compile is blocks, but no compiler was found; training without") == 1
