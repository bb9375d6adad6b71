"""GPT-2 fine-tuned on Shakespeare, from its released weights (0.5 GB, downloaded): made for one GPU.

As nanoGPT's `finetune_shakespeare`: steps of 32 samples of 1,024 tokens at a constant rate, for a little more than two
passes over the text. Lower blocks learn more slowly than upper ones. Larger models: `--init-from hf:gpt2-medium` and
the three fields of its size.
"""

from cleangpt.config import (
    DataConfig,
    FineTuningConfig,
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
    name="gpt2_shakespeare",
    corpus=ShakespeareChar(tokenizer_file="hf:gpt2"),
    data=DataConfig(seq_len=1024, batch_size=8),
    model=GPTConfig(vocab_size=50257, max_seq_len=1024, n_layers=12, n_heads=12, dim=768, dropout=0.1),
    optimizer=OptimizerConfig(lr=3e-5, weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="constant", warmup=0.1)),
    training=TrainingConfig(
        macro_batches=5, batches_per_macro_batch=16, accumulation=4, micro_batch_size=4, precision="auto"
    ),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(sample_tokens=200, sample_prompt="ROMEO:\n"),
    init_from="hf:gpt2",
    fine_tuning=FineTuningConfig(layer_decay=0.9),
)
