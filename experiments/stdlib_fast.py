"""Python's standard library in 4,096 byte pairs, fast: the parts of shakespeare_char_fast on a second kind of text.

Nothing was tuned here, to see whether n-gram embeddings and Muon help on this text as on characters. See
docs/speed.md.
"""

from cleangpt.config import (
    DataConfig,
    MuonConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.stdlib import Stdlib
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

experiment = Experiment(
    name="stdlib_fast",
    corpus=Stdlib(tokenizer="bpe", vocab_size=4096),
    data=DataConfig(seq_len=128, batch_size=8, val_samples=1000),
    model=LlamaConfig(
        max_seq_len=128, n_layers=3, n_heads=6, dim=192, hidden_dim=768, activation="relu2", qk_norm=True,
        ngrams=(2, 3), ngram_rows=32768,
    ),
    optimizer=OptimizerConfig(
        lr=0.005, weight_decay=0.0, betas=(0.9, 0.95), clip_norm=None, muon=MuonConfig(lr=0.005, iterations=3),
        lr_factors=(("*embedding*", 2.0),),
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="wsd", final=0.0, warmup=0.02, decay=0.6)),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(sample_tokens=100, sample_prompt="def "),
)  # fmt: skip
