"""A reference's log-probabilities: of the model that training starts from, kept with checksums, refused otherwise."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cleangpt.checkpoints.checkpoint import save_checkpoint
from cleangpt.corpora import prepare
from cleangpt.corpora.fable_openings import tokenizer
from cleangpt.corpora.fable_preferences import FablePreferences
from cleangpt.data.batch import IGNORED
from cleangpt.data.loader import Samples
from cleangpt.data.mixing import MixedDataset
from cleangpt.data.tokenizers import ByteTokenizer, Tokenizer
from cleangpt.errors import UserError
from cleangpt.evaluation.reference import Reference, add_reference
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.objectives import DPO
from cleangpt.objectives.pairs import REFERENCE

CORPUS = FablePreferences(train_pairs=20, val_pairs=6)
CPU = torch.device("cpu")


def opened(folder: Path) -> MixedDataset:
    return prepare(CORPUS, folder, console=Console(quiet=True))


def saved(folder: Path, seed: int = 0, known: Tokenizer | None = None, max_seq_len: int = 32) -> Reference:
    torch.manual_seed(seed)
    known = known or tokenizer()
    config = GPTConfig(n_layers=1, n_heads=2, dim=8, vocab_size=known.vocab_size, max_seq_len=max_seq_len)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    save_checkpoint(folder, model.state_dict(), config, known, {})
    return Reference(str(folder), "fp32", CPU)


def model_of(reference: Reference) -> GPT:
    from cleangpt.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(Path(reference.source)).model(CPU)  # type: ignore[return-value]


def batch(dataset: MixedDataset, split: str = "train") -> Any:
    part = dataset.sources[0].dataset.splits[split]
    return Samples(part, CORPUS.row).batch(np.arange(part.documents), np.zeros(part.documents, np.int64))


def test_they_are_the_log_probabilities_of_every_answer_token(tmp_path: Path) -> None:
    """Row by row, by a softmax of all logits."""
    dataset, reference = opened(tmp_path / "data"), saved(tmp_path / "model")
    add_reference(dataset, reference, None)
    for split in ("train", "val"):
        rows = batch(dataset, split)
        logits = model_of(reference)(rows.inputs["tokens"]).double()
        for row, place in np.argwhere(rows.targets.numpy() != IGNORED).tolist():
            expected = logits[row, place].log_softmax(-1)[rows.targets[row, place]].item()
            assert rows.extras[REFERENCE][row, place].item() == pytest.approx(expected, abs=1e-5)
        assert not rows.extras[REFERENCE][rows.targets == IGNORED].any()


def test_at_the_start_dpo_sees_no_difference_from_its_reference(tmp_path: Path) -> None:
    dataset, reference = opened(tmp_path / "data"), saved(tmp_path / "model")
    add_reference(dataset, reference, None)
    rows = batch(dataset)
    loss = DPO(beta=1.0)(model_of(reference), rows)
    assert loss.total.item() / 20 == pytest.approx(math.log(2), abs=1e-6)
    assert loss.metrics["chosen_log_ratio"].item() == pytest.approx(0, abs=1e-4)


def test_they_are_computed_once_and_read_from_the_disk_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, reference = opened(tmp_path / "data"), saved(tmp_path / "model")
    add_reference(dataset, reference, None)
    expected = batch(dataset).extras[REFERENCE]
    monkeypatch.setattr(GPT, "forward", lambda *args, **kwargs: pytest.fail("computed again"))
    again = opened(tmp_path / "data")
    assert REFERENCE not in again.columns
    add_reference(again, reference, None)
    assert torch.equal(batch(again).extras[REFERENCE], expected)
    assert again.columns[REFERENCE].role == "extra"


def test_other_weights_have_another_column(tmp_path: Path) -> None:
    columns = []
    for seed in (0, 1):
        dataset = opened(tmp_path / "data")
        add_reference(dataset, saved(tmp_path / f"model{seed}", seed), None)
        columns.append(batch(dataset).extras[REFERENCE])
    assert not torch.allclose(*columns)


@pytest.mark.parametrize(("key", "what"), [("weights", "weights"), ("dataset", "dataset")])
def test_a_column_of_something_else_is_refused(tmp_path: Path, key: str, what: str) -> None:
    dataset, reference = opened(tmp_path / "data"), saved(tmp_path / "model")
    add_reference(dataset, reference, None)
    (facts,) = (tmp_path / "data").glob("*.reference-*/reference.json")
    content = json.loads(facts.read_text())
    content[key] = {} if key == "dataset" else "0" * 64
    facts.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"was computed from another {what}; remove it"):
        add_reference(opened(tmp_path / "data"), reference, None)


def test_a_damaged_column_is_found(tmp_path: Path) -> None:
    """A truncated one at once, a changed one by its checksum, like any file of the dataset."""
    dataset, reference = opened(tmp_path / "data"), saved(tmp_path / "model")
    add_reference(dataset, reference, None)
    before = dataset.sources[0].dataset.fingerprint()
    (file,) = (tmp_path / "data").glob("*.reference-*/train_00000.*")
    content = file.read_bytes()
    file.write_bytes(b"\1\2\3\4" + content[4:])
    again = opened(tmp_path / "data")
    add_reference(again, reference, None)
    with pytest.raises(UserError, match="has changed since"):
        again.sources[0].dataset.check_same(before)
    file.write_bytes(content[:-4])
    with pytest.raises(UserError, match="bytes, not"):
        add_reference(opened(tmp_path / "data"), reference, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"known": ByteTokenizer()}, "the tokenizer of .* is not the corpus's"), ({"max_seq_len": 8}, "reads 8 tokens")],
)
def test_a_model_that_cannot_read_the_dataset_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_reference(opened(tmp_path / "data"), saved(tmp_path / "model", **fields), None)
    assert not list((tmp_path / "data").glob("*.reference-*"))


def test_nothing_is_left_of_an_interrupted_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one starts over, and is complete."""
    reference = saved(tmp_path / "model")
    forward: Callable[..., Any] = GPT.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_reference(opened(tmp_path / "data"), reference, None)
    monkeypatch.setattr(GPT, "forward", forward)
    assert not list((tmp_path / "data").glob("*.reference-????????"))
    dataset = opened(tmp_path / "data")
    add_reference(dataset, reference, None)
    assert batch(dataset).extras[REFERENCE].any()


def test_the_precision_is_part_of_what_they_were_computed_with(tmp_path: Path) -> None:
    reference = saved(tmp_path / "model")
    for precision in ("fp32", "bf16"):
        add_reference(opened(tmp_path / "data"), replace(reference, precision=precision), None)
    assert len(list((tmp_path / "data").glob("*.reference-*"))) == 2
