"""`cleangpt export`: where it writes, what it replaces, and what it leaves behind when it fails."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.commands import main
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.interchange import huggingface
from cleangpt.interchange.export import export
from cleangpt.models import build_model
from cleangpt.models.gpt import GPTConfig
from cleangpt.training.trainer import Trainer

CONFIG = GPTConfig(vocab_size=257, max_seq_len=8, n_layers=1, n_heads=1, dim=4)


@pytest.fixture
def checkpoint(workplace: Path) -> Checkpoint:
    return Checkpoint(workplace / "mine", CONFIG, ByteTokenizer(), dict(build_model(CONFIG).state_dict()), {})


def test_the_best_checkpoint_of_a_run_is_exported_under_its_name(
    tiny: Callable[..., Experiment],
    trainer: Callable[[Experiment], Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer(tiny(run_dir="runs/small", training__macro_batches=1)).train()
    assert main(["export", "runs/small"]) == 0
    assert capsys.readouterr().out == "export: small-hf\n"
    assert AutoModelForCausalLM.from_pretrained("small-hf").config.n_layer == 2


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_only_an_earlier_export_is_replaced_and_only_with_force(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, "hf", Path("first"))
    assert "--force" in refused(["hf:first", "--out", "first"], capsys)
    assert main(["export", "hf:first", "--out", "first", "--force"]) == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "does not replace" in refused(["hf:first", "--out", "mine", "--force"], capsys)
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in Path().iterdir()) == ["first", "mine"]


def test_an_empty_folder_is_filled(checkpoint: Checkpoint) -> None:
    Path("deep/empty").mkdir(parents=True)
    export(checkpoint, "hf", Path("deep/empty"))
    assert Path("deep/empty/model.safetensors").is_file()


def test_nothing_is_left_of_an_export_that_failed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        export(checkpoint, "hf", Path("out"))
    assert not any(Path().iterdir())


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(kind: str, workplace: Path) -> None:
    pytest.importorskip("gguf")
    config = replace(CONFIG, vocab_size=256)
    checkpoint = Checkpoint(workplace / "mine", config, ByteTokenizer(), dict(build_model(config).state_dict()), {})
    with pytest.raises(UserError, match="the tokenizer has 257 tokens, the model's embedding 256 rows"):
        export(checkpoint, kind, Path("out"))
    assert not any(Path().iterdir())


def test_a_missing_run_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is not a run" in refused(["nothing"], capsys)
    assert "hf" in refused(["nothing", "--format", "onnx"], capsys)
