"""A run that reads images, in rows of some micro-batches only, gives the same weights however it is interrupted or
shared out."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from cleangpt.checkpoints.snapshots import list_snapshots, load_snapshot
from cleangpt.tracking.metrics import read_metrics
from tests.distributed.test_parallelize import assert_same_run
from tests.faults._runs import differing
from tests.forked import run, run_together

EXPERIMENT = '''
import os
import signal
from dataclasses import dataclass
import numpy as np
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora import CORPORA, Mixture
from cleangpt.corpora.base import Corpus
from cleangpt.data.records import PlacedRecords, Records
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import DatasetWriter
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.vision import VisionConfig
from cleangpt.training.trainer import Trainer

encoder = os.environ["ENCODER"]
vision = VisionConfig(
    encoder=encoder, height=8, width=8, patch_size=4, dim=8, n_layers=1, n_heads=2, bidirectional=True
)

@dataclass(frozen=True, kw_only=True)
class Seen(Corpus):
    """Rows of tokens, of which a third begin with an image, or with two."""

    def prepare(self, folder, console):
        draw = np.random.default_rng(0)
        images = {"images": Records(dtype="uint8", shape=(8, 8, 3), tokens=4)}
        writer = DatasetWriter(folder, {"kind": "seen"}, ByteTokenizer(), row_length=12, masked=True, records=images)
        for split, rows in (("train", 60), ("val", 13)):
            for row in range(rows):
                count = max(0, row % 6 - 3)
                tokens, ends = draw.integers(0, 9, 12), 4 * np.arange(1, count + 1)
                placed = PlacedRecords(draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), ends)
                mask = (np.arange(12) >= 4 * count).astype(np.uint8)
                writer.append(split, tokens, np.array([12]), mask=mask, records={"images": placed})
        return writer.finish(lambda facts: "")

@dataclass(frozen=True, kw_only=True)
class Told(Corpus):
    """Rows of tokens alone."""

    def prepare(self, folder, console):
        draw = np.random.default_rng(1)
        writer = DatasetWriter(folder, {"kind": "told"}, ByteTokenizer(), row_length=12, masked=True)
        for split, rows in (("train", 40), ("val", 7)):
            writer.append(split, draw.integers(0, 9, 12 * rows), np.full(rows, 12), mask=np.ones(12 * rows, np.uint8))
        return writer.finish(lambda facts: "")

CORPORA |= {"seen": Seen, "told": Told}

step, alone = Trainer.step, []
"""The second: of each micro-batch of this process, whether it has no image."""
def counted(self):
    take = self.source.next
    def next_batch():
        batch = take()
        alone.extend(not part.inputs["images_ends"].any() for part in batch.split(2))
        return batch
    self.source.next = next_batch
    step(self)
    self.source.next = take
    if self.position.step == 8:
        assert 0 < sum(alone) < len(alone)
    if str(self.position.step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    if str(self.position.step) == os.environ.get("STOP_AT"):
        signal.raise_signal(signal.SIGTERM)
Trainer.step = counted

size = {"max_seq_len": 11, "n_layers": 2, "n_heads": 2, "dim": 16, "vision": vision}
MODELS = {"gpt": GPTConfig(**size), "llama": LlamaConfig(**size, hidden_dim=24, sliding_window=7)}

experiment = Experiment(
    name="seen",
    corpus=Mixture(sources=(Source(name="seen", corpus=Seen(), weight=2.0), Source(name="told", corpus=Told()))),
    data=DataConfig(seq_len=11, batch_size=8),
    model=MODELS[os.environ.get("MODEL", "gpt")],
    optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
    training=TrainingConfig(
        macro_batches=2, batches_per_macro_batch=8, accumulation=2, micro_batch_size=2, device="cpu", threads=1
    ),
    tracking=TrackingConfig(progress=False, sample_tokens=4),
)
'''


@pytest.fixture(autouse=True)
def place(workplace: Path) -> None:
    Path("seen.py").write_text(EXPERIMENT, encoding="utf-8")


def train(folder: str, processes: int, *words: str, **environment: str) -> None:
    outcome = run_together(processes, "train", "seen.py", "--run-dir", folder, *words, **environment)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


@functools.cache
def alone(model: str, encoder: str) -> str:
    """The run of one process, made once."""
    folder = tempfile.mkdtemp(prefix="alone_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(f"{folder}/run", 1, MODEL=model, ENCODER=encoder)
    return f"{folder}/run"


def final(folder: str) -> dict[str, object]:
    state = load_snapshot(list_snapshots(Path(folder) / "snapshots")[0])
    del state["meter"], state["position"]["time_trained"], state["checkpoints"], state["trackers"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["gato", pytest.param("vit", marks=pytest.mark.torture)])
def test_a_run_with_images_that_is_stopped_or_killed_ends_with_the_same_bits(encoder: str) -> None:
    """In the middle of a macro-batch; Gato's encoder draws positions, which go on as they would have."""
    train("broken", 1, ENCODER=encoder, STOP_AT="2")
    assert run("resume", "broken", ENCODER=encoder, DIE_AT="6").returncode == -9
    assert run("resume", "broken", ENCODER=encoder).returncode == 0
    assert len(read_metrics(Path("broken"))) == 2
    assert differing(final(alone("gpt", encoder)), final("broken")) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "encoder", "processes", "words"),
    [
        ("gpt", "vit", 2, ["ddp"]),
        ("gpt", "vit", 2, ["fsdp"]),
        ("gpt", "vit", 2, ["tp"]),
        pytest.param("llama", "linear", 2, ["tp"], marks=pytest.mark.torture),
        pytest.param("llama", "vit", 2, ["fsdp"], marks=pytest.mark.torture),
        pytest.param("gpt", "vit", 4, ["fsdp", "--parallel.tensor", "2"], marks=pytest.mark.torture),
    ],
)
def test_several_processes_learn_from_images_what_one_does(
    model: str, encoder: str, processes: int, words: list[str]
) -> None:
    train("several", processes, "--parallel.strategy", *words, MODEL=model, ENCODER=encoder)
    assert_same_run(alone(model, encoder), "several")
