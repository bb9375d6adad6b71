"""The best n checkpoints by validation loss are kept, whole, with what is needed to use them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from cleangpt.checkpoints import checkpoint as module
from cleangpt.checkpoints.checkpoint import Checkpoints, best_checkpoint, load_checkpoint, load_matching_weights
from cleangpt.config import SavingConfig
from cleangpt.data.tokenizers import CharTokenizer
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError
from cleangpt.files import fsync_files, read_json, write_json
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.tracking.numbers import show_number

CONFIG = GPTConfig(vocab_size=5, max_seq_len=4, n_layers=1, n_heads=1, dim=4)
MODEL = GPT(CONFIG)
TOKENIZER = CharTokenizer("abcd\n", "\n")


def open_checkpoints(
    folder: Path, config: SavingConfig | None = None, log: Callable[[str], None] = lambda text: None
) -> Checkpoints:
    return Checkpoints(folder, config or SavingConfig(), Ranks(), CONFIG, TOKENIZER, log=log)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("val*")}


@pytest.mark.slow
@settings(max_examples=30)
@given(losses=st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, math.nan]), min_size=1, max_size=9), keep=st.integers(1, 3))
def test_those_kept_are_the_best_n_the_older_first_on_a_tie(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], keep: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = open_checkpoints(folder, SavingConfig(keep_best=keep))
    for number, loss in enumerate(losses, start=1):
        checkpoints.offer(number, loss, MODEL)
    numbered = [(loss, number) for number, loss in enumerate(losses, start=1) if not math.isnan(loss)]
    assert kept(folder) == {f"val{show_number(loss, 4)}_mb{number:06d}" for loss, number in sorted(numbered)[:keep]}


def test_one_in_every_k_is_kept_for_good(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, SavingConfig(keep_best=1, checkpoint_every=2))
    for number, loss in enumerate([3.0, 2.0, 1.0, math.nan, 0.5], start=1):
        checkpoints.offer(number, loss, MODEL)
    assert kept(tmp_path) == {"val2.0000_mb000002", "valnan_mb000004", "val0.5000_mb000005"}


def test_a_checkpoint_gives_back_model_and_tokenizer(tmp_path: Path) -> None:
    open_checkpoints(tmp_path / "checkpoints").offer(7, 1.25, MODEL)
    path = best_checkpoint(tmp_path)
    assert path.name == "val1.2500_mb000007"
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert checkpoint.facts["macro_batch"] == 7
    assert checkpoint.tokenizer.decode([0, 3, 4]) == "ad\n"
    tokens = torch.tensor([[0, 1, 2]])
    assert torch.equal(checkpoint.model(torch.device("cpu"))(tokens), MODEL.eval()(tokens))


def test_the_index_survives_a_resume_from_before_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, SavingConfig(keep_best=2))
    checkpoints.offer(1, 2.0, MODEL)
    state = checkpoints.state_dict()
    checkpoints.offer(2, 1.0, MODEL)
    resumed = open_checkpoints(tmp_path, SavingConfig(keep_best=2))
    resumed.load_state_dict(state)
    assert kept(tmp_path) == {"val2.0000_mb000001", "val1.0000_mb000002"}
    resumed.offer(2, 1.0, MODEL)
    assert kept(tmp_path) == {"val2.0000_mb000001", "val1.0000_mb000002"}
    assert [entry["macro_batch"] for entry in read_json(tmp_path / "index.json")["checkpoints"]] == [2, 1]


@pytest.mark.parametrize("broken", ["write_tensors", "write_json"])
def test_a_full_disk_is_told_and_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    lines: list[str] = []
    run = open_checkpoints(tmp_path / "checkpoints", SavingConfig(keep_best=1), lines.append)
    run.offer(1, 2.0, MODEL)

    def full(*given: object, **named: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(module, broken, full)
        assert run.offer(2, 1.0, MODEL), "it was due"
    reason = "I/O error: No space left on device (os error 28)"
    assert lines == [f"the checkpoint of macro-batch 2 could not be saved: {reason}"]
    assert best_checkpoint(tmp_path).name == "val2.0000_mb000001"
    assert load_checkpoint(best_checkpoint(tmp_path)).facts["macro_batch"] == 1
    assert not list(run.folder.glob("*.partial"))  # half of one would take room
    run.offer(3, 1.5, MODEL)
    assert kept(run.folder) == {"val1.5000_mb000003"}


def test_an_entry_whose_folder_is_gone_is_forgotten(tmp_path: Path) -> None:
    resumed = open_checkpoints(tmp_path, SavingConfig(keep_best=1))
    resumed.load_state_dict({"entries": [{"name": "val1", "macro_batch": 1, "val_loss": 1.0, "permanent": False}]})
    assert resumed.offer(2, 5.0, MODEL)


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "is corrupt: model.safetensors has 1 bytes"),
        (lambda folder: (folder / "config.json").unlink(), "is not a checkpoint: it has no config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, harm: object, line: str) -> None:
    open_checkpoints(tmp_path / "checkpoints").offer(7, 1.25, MODEL)
    path = best_checkpoint(tmp_path)
    harm(path)  # type: ignore[operator]
    with pytest.raises(UserError, match=line) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"kind": "gpd"}, "of kind 'gpd', which is not registered here; did you mean 'gpt'"),
        ({"taste": 2}, r"config\.json, which another version of .* written: model\.taste is not a field of GPTConfig"),
        ({"dim": 0.5}, r"config\.json, which another version of .* written: model\.dim is 0\.5; allowed: "),
    ],
)
def test_an_unknown_architecture_is_refused_in_one_line(entry: dict[str, object], line: str, tmp_path: Path) -> None:
    open_checkpoints(tmp_path / "checkpoints").offer(7, 1.25, MODEL)
    path = best_checkpoint(tmp_path)
    content = read_json(path / "config.json")
    content["model"] |= entry
    write_json(path / "config.json", content)
    write_json(path / "manifest.json", fsync_files([path / name for name in read_json(path / "manifest.json")]))
    with pytest.raises(UserError, match=line):
        load_checkpoint(path)


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint yet"):
        best_checkpoint(tmp_path)


def test_filling_takes_what_fits_and_names_what_does_not() -> None:
    longer = GPT(GPTConfig(vocab_size=5, max_seq_len=8, n_layers=2, n_heads=1, dim=4))
    lines = load_matching_weights(longer, MODEL.state_dict() | {"extra": torch.ones(1)})
    assert torch.equal(longer.blocks[0].mlp.up.weight, MODEL.blocks[0].mlp.up.weight)
    assert torch.equal(longer.position_embedding.weight[:4], MODEL.position_embedding.weight)
    assert any(line.startswith("position_embedding.weight takes 4 of 4 rows") for line in lines)
    assert any(line.startswith("blocks.1.mlp.up.weight is not in the checkpoint") for line in lines)
    assert "extra is in the checkpoint but not in the model" in lines
