"""A mixture of several corpora, whose samples are interleaved by weight; see `data/mixing.py`."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cleangpt.config import CorpusConfig, Source
from cleangpt.corpora.base import Corpus
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.mixing import MixedDataset, MixtureSource, Weight
from cleangpt.environments.base import Environment
from cleangpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mixture(CorpusConfig):
    """Several corpora with the same tokenizer, interleaved by weight throughout the run."""

    sources: tuple[Source, ...]
    """The corpora, each with a name and a weight."""
    temperature: float | None = None
    """Multiply every weight by the source's training tokens to the power of 1 / temperature: 1 samples in proportion to
    size, larger values more evenly; None: use the weights alone."""
    when_source_ends: Literal["share", "refuse"] = "share"
    """share: when a source reaches its max_epochs, the others take over its share; refuse: do not start a run in which
    a source would end."""

    @property
    def changes(self) -> bool:
        """Whether a weight changes over the run's progress."""
        return any(isinstance(source.weight, tuple) for source in self.sources)

    def check(self) -> None:
        """Raises UserError for a field out of range, here or in a source's corpus."""
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise UserError(f"corpus.sources are {', '.join(names) or 'none'}; allowed: one or more, each name once")
        if self.temperature is not None and not self.temperature > 0:
            raise UserError(f"corpus.temperature is {self.temperature}; allowed: more than 0")
        for number, source in enumerate(self.sources):
            _check_source(source, f"corpus.sources.{number}.")

    def open(self, prepare: Callable[[CorpusConfig], TokenDataset]) -> MixedDataset:
        """The datasets of the sources, each opened or written by `prepare`.

        Raises:
            UserError: a source cannot be prepared, or two are incompatible.
        """
        sources = []
        for source in self.sources:
            dataset = prepare(source.corpus)
            tokens = dataset.splits["train"].tokens
            factor = 1.0 if self.temperature is None else float(tokens) ** (1 / self.temperature)
            sources.append(MixtureSource(dataset, source.name, _scaled(source.weight, factor), source.max_epochs))
        return MixedDataset(sources, error_on_exhaustion=self.when_source_ends == "refuse")


def environments(corpus: CorpusConfig, dataset: MixedDataset) -> dict[str, Environment]:
    """The environments of a mixture's sources, by source name; that of a single corpus has the name "".

    Args:
        corpus: what `dataset` was prepared from.
        dataset: its tokens.
    """
    sources = {source.name: source.corpus for source in corpus.sources} if isinstance(corpus, Mixture) else {"": corpus}
    datasets = {source.name: source.dataset for source in dataset.sources}
    found = {name: source.environment(datasets[name]) for name, source in sources.items() if isinstance(source, Corpus)}
    return {name: environment for name, environment in found.items() if environment is not None}


def _check_source(source: Source, path: str) -> None:
    if not re.fullmatch(r"[\w.-]{1,40}", source.name):
        raise UserError(f"{path}name is {source.name!r}; allowed: up to 40 letters, digits, '_', '-' and '.'")
    if source.max_epochs is not None and source.max_epochs < 1:
        raise UserError(f"{path}max_epochs is {source.max_epochs}; allowed: a whole number of 1 or more")
    points = source.weight if isinstance(source.weight, tuple) else ((0.0, source.weight), (1.0, source.weight))
    progress, weights = [point[0] for point in points], [point[1] for point in points]
    ordered = bool(points) and progress == sorted(set(progress)) and 0 <= progress[0] <= progress[-1] <= 1
    if not ordered or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(
            f"{path}weight is {source.weight!r}; allowed: a number above 0, or points (progress, weight) with progress "
            "rising from 0 to 1, no weight below 0 and one above"
        )
    if isinstance(source.corpus, Mixture):
        raise UserError(f"{path}corpus is a Mixture; allowed: any other corpus")
    check = getattr(source.corpus, "check", None)
    if check is None:
        raise UserError(f"{path}corpus is a {type(source.corpus).__name__}; allowed: a subclass of Corpus")
    try:
        check()
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from None


def _scaled(weight: Weight, factor: float) -> Weight:
    if isinstance(weight, tuple):
        return tuple((progress, value * factor) for progress, value in weight)
    return weight * factor
