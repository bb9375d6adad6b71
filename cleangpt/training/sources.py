"""The batches of a run: read from a dataset, or made by the policy that learns from them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from cleangpt.corpora.mixture import environments
from cleangpt.data.loader import DatasetSource
from cleangpt.data.mixing import MixedDataset
from cleangpt.data.source import BatchSource
from cleangpt.distributed.device import (
    uncompiled,
)
from cleangpt.distributed.parallelize import parallelize
from cleangpt.distributed.processes import Ranks
from cleangpt.environments.base import Environment
from cleangpt.environments.gymnasium import Gymnasium
from cleangpt.errors import UserError
from cleangpt.evaluation.rewards import open_reward_model
from cleangpt.experiment import Experiment, samples_per_macro_batch
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.objectives.policy import PolicyObjective
from cleangpt.rollouts.build import open_sampler
from cleangpt.rollouts.collecting import Collector
from cleangpt.rollouts.control_source import ControlSource
from cleangpt.rollouts.episodes import Sampler
from cleangpt.rollouts.reference import ReferenceModel, reads_reference
from cleangpt.rollouts.rounds import Sizes
from cleangpt.rollouts.scoring import Scorer
from cleangpt.rollouts.source import RolloutSource, Save
from cleangpt.training.generation import vllm_opener
from cleangpt.training.placing import PlacedModel, set_scoring
from cleangpt.training.resolve import open_stream


def open_source(
    experiment: Experiment, dataset: MixedDataset, placed: PlacedModel, ranks: Ranks, log: Callable[[str], None],
    save: Save,
) -> BatchSource:  # fmt: skip
    """The training batches of this process: of the corpus, or the policy's own, whose answers `save` writes."""
    # Answers are scored over the tokens that may be sampled, without those that pad the embedding.
    if experiment.objective.scores_answers:
        placed.model.scored_vocab = dataset.vocab_size
    if isinstance(experiment.objective, PolicyObjective):
        return open_rollouts(experiment, experiment.objective, dataset, placed, ranks, log, save)
    layout = placed.layout
    return DatasetSource(
        open_stream(experiment, dataset), experiment.data.batch_size, prefetch=experiment.data.prefetch,
        pin_memory=placed.device.type == "cuda", rank=layout.dp_rank(ranks.rank), world_size=layout.dp_size,
    )  # fmt: skip


def open_rollouts(
    experiment: Experiment, objective: PolicyObjective, dataset: MixedDataset, placed: PlacedModel, ranks: Ranks,
    log: Callable[[str], None], save: Save,
) -> RolloutSource | ControlSource:  # fmt: skip
    """Rollouts of the model in the environment of its corpus.

    Raises:
        UserError: there is no such environment, a prompt is too long, or the reward model cannot be loaded.
    """
    config, model, device, seed = experiment.rollouts, placed.model, placed.device, experiment.training.seed
    environment, limit = only_environment(experiment, dataset), experiment.data.seq_len + 1
    sizes = Sizes(
        experiment.data.batch_size,
        experiment.training.accumulation,
        samples_per_macro_batch(experiment) // config.samples,
    )
    if isinstance(environment, Gymnasium):
        return ControlSource(
            config, objective, environment, model, sizes, seq_len=experiment.data.seq_len, seed=seed, ranks=ranks,
            device=device, autocast=placed.autocast,
        )  # fmt: skip
    judge = None if config.reward_model is None else open_reward_model(config.reward_model, dataset.tokenizer, device)
    scorer = Scorer(config, environment, dataset.tokenizer, log if ranks.is_main else lambda text: None, judge)
    plain = partial(uncompiled, experiment.training.compile)
    opener: Callable[[], AbstractContextManager[Sampler]] = partial(
        open_sampler, config, model, device, dataset.vocab_size, experiment.parallel.reshard_after_forward, plain
    )
    if config.sampler == "vllm":
        opener = vllm_opener(model, dataset.sources[0].dataset, ranks.world_size, seed)
    collector = Collector(config, environment, scorer, opener, dataset.tokenizer, limit=limit, seed=seed, ranks=ranks)

    def build_reference() -> LanguageModel:
        with torch.random.fork_rng():
            copy = parallelize(
                lambda: build_model(experiment.model, objective.heads), placed.layout, device,
                reshard_after_forward=experiment.parallel.reshard_after_forward, timeout=ranks.timeout,
            )  # fmt: skip
        set_scoring(copy, experiment, placed.layout, "off")
        copy.scored_vocab = dataset.vocab_size
        return copy.eval().requires_grad_(False)

    reference = ReferenceModel(model, build_reference) if reads_reference(config, objective) else None
    return RolloutSource(
        config, objective, collector, model, reference, sizes, seed=seed, ranks=ranks, device=device,
        autocast=placed.autocast, save=save if config.save_answers and ranks.is_main else None,
    )  # fmt: skip


def only_environment(experiment: Experiment, dataset: MixedDataset) -> Environment:
    """The environment that a policy acts in.

    Raises:
        UserError: the corpus has none, or several.
    """
    found = environments(experiment.corpus, dataset)
    if list(found) != [""]:
        kind = type(experiment.objective).__name__
        has = f"{len(found)} environments" if found else "none"
        raise UserError(
            f"objective {kind} needs a corpus with an environment; {type(experiment.corpus).__name__} has {has}"
        )
    return found[""]
