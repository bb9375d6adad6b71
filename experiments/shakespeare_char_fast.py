"""Shakespeare by character in a few seconds on a CPU: to the loss of nanoGPT's CPU recipe in a fraction of its time.

One block, 96 wide, with embeddings of the last two to five characters together, which learn ten times as fast as the
rest. What each part contributes is in docs/speed.md. The hyperparameters were chosen with --corpus.held-out 0.05.
"""

from cleangpt.config import (
    DataConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

experiment = Experiment(
    name="shakespeare_char_fast",
    corpus=ShakespeareChar(),
    data=DataConfig(seq_len=64, batch_size=12, val_batch_size=64),
    model=LlamaConfig(
        max_seq_len=64, n_layers=1, n_heads=3, dim=96, hidden_dim=128, activation="relu2", qk_norm=True,
        ngrams=(2, 3, 4, 5), ngram_rows=6144,
    ),
    optimizer=OptimizerConfig(
        lr=0.005, weight_decay=0.0, betas=(0.7, 0.9), clip_norm=None, lr_factors=(("*embedding*", 10.0),)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="wsd", final=0.0, warmup=0.05, decay=0.6)),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=90),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(sample_tokens=100),
)  # fmt: skip
