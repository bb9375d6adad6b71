"""CartPole, Acrobot and MountainCar by one network, which imitates experts."""

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
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.mixture import Mixture
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig

WEIGHTS = {"cart_pole": 2.0, "acrobot": 1.0, "mountain_car": 1.0}


def task(env: str, played: int) -> Demonstrations:
    """A corpus of an expert's episodes."""
    return Demonstrations(
        env=env, played=played, row=96, hide_actions=0.5, acting=Acting(choices="argmax", see_actions=False)
    )


tasks = {
    "cart_pole": task("CartPole-v1", 150),
    "acrobot": task("Acrobot-v1", 300),
    "mountain_car": task("MountainCar-v0", 300),
}
ranges = tasks["cart_pole"].tokenizer().ranges

experiment = Experiment(
    name="control_demo",
    corpus=Mixture(
        sources=tuple(Source(name=name, corpus=corpus, weight=WEIGHTS[name]) for name, corpus in tasks.items())
    ),
    data=DataConfig(seq_len=96, batch_size=64, val_samples=200),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=2,
        n_heads=4,
        dim=64,
        tied=True,
        n_places=64,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
    ),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=3, batches_per_macro_batch=150),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=10, sample_tokens=0),
)
