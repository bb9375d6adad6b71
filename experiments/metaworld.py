"""Ten tasks of Meta-World by one network, one embedded vector per observation; the task's name is read first.

Needs the extras control and metaworld.
"""

from cleangpt.config import (
    DataConfig,
    MuonConfig,
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
from cleangpt.data.modalities import Modalities, TokenRanges
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.environments.acting import Acting
from cleangpt.experiment import Experiment
from cleangpt.models.gato import GatoConfig
from cleangpt.objectives.soft_bins import SoftBins

VECTOR = 40  # as many numbers as Meta-World's observations have, and one to spare
TASKS = (
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close",
)  # fmt: skip
"""Those that Yu et al. 2020 call MT10."""
modalities = Modalities(choices=2, vector=VECTOR, scale="none")  # metres, all of them below 1
ranges = TokenRanges(ByteTokenizer().vocab_size, modalities)


def task(name: str) -> Demonstrations:
    """A corpus of episodes of the task's scripted policy."""
    return Demonstrations(
        env=f"Meta-World/{name}-v3",
        instruction=name,
        played=500,
        row=128,
        hide_actions=0.5,
        acting=Acting(see_actions=False),
        modalities=modalities,
        least_score=80.0,
        reference_episodes=20,
    )


experiment = Experiment(
    name="metaworld",
    corpus=Mixture(sources=tuple(Source(name=name.replace("-", "_"), corpus=task(name)) for name in TASKS)),
    data=DataConfig(seq_len=128, batch_size=64, val_samples=320),
    model=GatoConfig(
        vocab_size=ranges.vocab_size,
        n_layers=4,
        n_heads=4,
        dim=128,
        tied=True,
        n_places=8,
        vector=VECTOR,
        smooth_bins=(ranges.first_bin, ranges.first_choice),
    ),
    objective=SoftBins(bins=(ranges.first_bin, ranges.first_choice), sigma=6.0),
    optimizer=OptimizerConfig(
        lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98), clip_norm=1.0, muon=MuonConfig(lr=1e-2, iterations=3)
    ),
    schedule=ScheduleConfig(lr=Schedule(shape="cosine", final=0.02, warmup=0.05)),
    training=TrainingConfig(macro_batches=5, batches_per_macro_batch=500),
    saving=SavingConfig(keep_best=1, best="highest score"),
    tracking=TrackingConfig(score_samples=10, sample_tokens=0),
)
