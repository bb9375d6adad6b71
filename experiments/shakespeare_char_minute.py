"""Shakespeare by character in about a minute on two CPU cores: the best loss for that time.

As shakespeare_char_fast, with three blocks, Muon, twice the context, and a lower rate for the embeddings, which would
memorize the text in a longer run. See docs/speed.md.
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
from cleangpt.corpora.shakespeare_char import ShakespeareChar
from cleangpt.experiment import Experiment
from cleangpt.models.llama import LlamaConfig

experiment = Experiment(
    name="shakespeare_char_minute",
    corpus=ShakespeareChar(),
    data=DataConfig(seq_len=128, batch_size=8),
    model=LlamaConfig(
        max_seq_len=128, n_layers=3, n_heads=4, dim=128, hidden_dim=512, activation="relu2", qk_norm=True,
        ngrams=(2, 3, 4, 5), ngram_rows=16384,
    ),
    optimizer=OptimizerConfig(
        lr=0.005, weight_decay=0.0, betas=(0.9, 0.95), clip_norm=None, muon=MuonConfig(lr=0.005, iterations=2),
        lr_factors=(("*embedding*", 2.0),),
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="wsd", final=0.0, warmup=0.02, decay=0.6)),
    training=TrainingConfig(macro_batches=1, batches_per_macro_batch=600),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(sample_tokens=300),
)  # fmt: skip
