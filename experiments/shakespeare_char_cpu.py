"""nanoGPT's README recipe for a CPU: Shakespeare by character, 0.8 million parameters, a few minutes on two cores.

Four layers of four heads, 128 wide, 64 characters of context, batches of 12, 2,000 steps, no dropout. nanoGPT trains it
at a learning rate of 1e-3 and names a validation loss of 1.88; at this size twice that rate learns more.
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
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="shakespeare_char_cpu",
    corpus=ShakespeareChar(),
    data=DataConfig(seq_len=64, batch_size=12),
    model=GPTConfig(max_seq_len=64, n_layers=4, n_heads=4, dim=128, bias=False, dropout=0.0),
    optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.99), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.1, warmup=0.05)),
    training=TrainingConfig(macro_batches=20, batches_per_macro_batch=100),
    saving=SavingConfig(keep_best=3),
    tracking=TrackingConfig(sample_tokens=300),
)
