"""Python code and Shakespeare by byte in one model: a mixture that shifts from code to verse during the run."""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    Source,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="mixture_code_shakespeare",
    corpus=Mixture(
        sources=(
            Source(name="code", corpus=Stdlib(), weight=((0.0, 0.7), (0.5, 0.7), (1.0, 0.3))),
            Source(
                name="shakespeare",
                corpus=ShakespeareChar(tokenizer="byte"),
                weight=((0.0, 0.3), (0.5, 0.3), (1.0, 0.7)),
            ),
        ),
    ),
    data=DataConfig(seq_len=128, batch_size=16, val_samples=200),
    model=GPTConfig(max_seq_len=128, n_layers=4, n_heads=4, dim=128, bias=False, dropout=0.0),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=10, batches_per_macro_batch=200),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(sample_tokens=200),
)
