"""Stories, by low-rank adapters on a model that has read Python code: `cleangpt train stdlib_demo` comes first.

It starts from the newest run of that name; the model is the same. To train all weights instead, or a model from
scratch, see docs/fine_tuning.md; without adapters a lower learning rate does better.
"""

from cleangpt.config import (
    DataConfig,
    FineTuningConfig,
    LoRAConfig,
    OptimizerConfig,
    SavingConfig,
    Schedule,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from cleangpt.corpora.fables import Fables
from cleangpt.experiment import Experiment
from cleangpt.models.gpt import GPTConfig

experiment = Experiment(
    name="stories_from_pretrained",
    corpus=Fables(train_stories=4000, val_stories=400),
    data=DataConfig(seq_len=128, batch_size=16, val_samples=256),
    model=GPTConfig(max_seq_len=128, n_layers=4, n_heads=4, dim=128, bias=False),
    optimizer=OptimizerConfig(lr=2e-2, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.0, warmup=0.05)),
    training=TrainingConfig(macro_batches=4, batches_per_macro_batch=50),
    saving=SavingConfig(keep_best=2),
    tracking=TrackingConfig(sample_tokens=110, sample_prompt="Once upon a time"),
    init_from="stdlib_demo",
    fine_tuning=FineTuningConfig(lora=LoRAConfig(rank=8, alpha=16.0, dropout=0.0)),
)
