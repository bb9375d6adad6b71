"""Several token stores as one: a stream in which their samples are interleaved, each store's in its own order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cleangpt.data.batches import Batch, Ranges, Samples, SplitStream, Stream
from cleangpt.data.interleaving import Interleaving, Weight, interleave, shares_at
from cleangpt.data.order import mix
from cleangpt.data.store import TokenStore
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.errors import UserError

PROGRESS = (np.arange(1000) + 0.5) / 1000
"""Where shares that change are read, to take their mean over the run."""


@dataclass(frozen=True)
class Part:
    """One store of a mixture."""

    store: TokenStore
    weight: Weight
    """In proportion to the other parts'."""
    max_epochs: int | None
    """Passes over its training samples after which it ends; None: it never does."""


class MixedStore:
    """Token stores of one tokenizer, and of one chat template where some are of conversations, by name.

    Raises:
        UserError: two of them have different ones.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Part], refuse_end: bool) -> None:
        self.folder, self.parts, self.refuse_end = folder, parts, refuse_end
        first, *others = parts
        self.tokenizer: Tokenizer = parts[first].store.tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        for name in others:
            if parts[name].store.tokenizer.to_json() != self.tokenizer.to_json():
                raise UserError(
                    f"the sources {first} and {name} have different tokenizers; allowed: one for all, such as byte, or "
                    "the tokenizer.json of one store given to the others as tokenizer_file"
                )
        templates = {name: part.store.chat_template for name, part in parts.items() if part.store.chat_template}
        self.chat_template = next(iter(templates.values()), None)
        for name, template in templates.items():
            if template != self.chat_template:
                raise UserError(
                    f"the sources {next(iter(templates))} and {name} have different chat templates; allowed: one for "
                    "all, given to each as chat_template"
                )


class MixedStream:
    """The samples of several streams; where each stands follows from the position in the mixture."""

    def __init__(self, streams: Mapping[str, SplitStream], interleaving: Interleaving) -> None:
        self.streams, self.interleaving = streams, interleaving

    def batch(self, start: int, count: int) -> Batch:
        """The samples at `count` positions from `start` on."""
        sources, taken = self.interleaving.sources(start, count), self.interleaving.taken(start).tolist()
        rows, batches = [], []
        for source, stream in enumerate(self.streams.values()):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                rows.append(mine)
                batches.append(stream.batch(taken[source], len(mine)))
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        inputs, targets = (torch.cat([getattr(one, name) for one in batches])[back] for name in ("inputs", "targets"))
        return Batch(inputs, targets, sum(one.num_targets for one in batches))

    def visits(self, position: int, left_out: Ranges = ()) -> dict[str, float]:
        """The figures visited_share and times_visited before a position, of all sources together and of each.

        Positions that were left out are, in each source, positions one after the other too.
        """
        taken = self.interleaving.taken(position).tolist()
        bounds = [[self.interleaving.taken(bound).tolist() for bound in pair] for pair in left_out]
        each = {
            name: stream.visits(taken[source], [(start[source], end[source]) for start, end in bounds])
            for source, (name, stream) in enumerate(self.streams.items())
        }
        sizes = {name: stream.samples.num_training for name, stream in self.streams.items()}
        seen = sum(each[name]["visited_share"] * size for name, size in sizes.items())
        total = sum(sizes.values())
        missed = sum(min(end, position) - start for start, end in left_out if start < position)
        figures = {"visited_share": seen / total, "times_visited": (position - missed) / total}
        for figure in list(figures):
            figures |= {f"{figure}/{name}": visits[figure] for name, visits in each.items()}
        return figures


Store = TokenStore | MixedStore


def stores(store: Store) -> dict[str, TokenStore]:
    """The token stores of a mixture by name; of a single one, itself without a name."""
    return {name: part.store for name, part in store.parts.items()} if isinstance(store, MixedStore) else {"": store}


def split_samples(store: Store, split: str, seq_len: int) -> dict[str, Samples]:
    """The samples of a split of each source.

    Raises:
        UserError: a split is missing or too short, or its rows do not fit into `seq_len`.
    """
    if isinstance(store, TokenStore):
        return {"": Samples(store.splits[split], seq_len, split)}
    return {
        name: Samples(part.store.splits[split], seq_len, f"{split} (of {name})", pad_rows=True)
        for name, part in store.parts.items()
    }


def mean_shares(store: Store) -> dict[str, float]:
    """Each source's share of the samples, as its weight has it, in the mean over the run."""
    if isinstance(store, TokenStore):
        return {"": 1.0}
    shares = shares_at([part.weight for part in store.parts.values()], PROGRESS).mean(axis=0)
    return dict(zip(store.parts, (shares / shares.sum()).tolist(), strict=True))


def training_stream(store: Store, seq_len: int, seed: int, total: int) -> Stream:
    """The training samples of a run of `total` samples.

    Raises:
        UserError: a training split does not fit, or a source ends where that is refused, or none is left.
    """
    samples = split_samples(store, "train", seq_len)
    if isinstance(store, TokenStore):
        return SplitStream(samples[""], seed)
    most = {
        name: None if part.max_epochs is None else part.max_epochs * samples[name].num_training
        for name, part in store.parts.items()
    }
    interleaving = interleave(list(most), [part.weight for part in store.parts.values()], list(most.values()), total)
    for source, (name, end) in enumerate(most.items()):
        position = None if end is None else interleaving.end(source, end)
        if store.refuse_end and position is not None and position < total:
            raise UserError(
                f"the source {name} ends after {position:,} of the run's {total:,} samples; allowed: a larger "
                'max_epochs or a shorter run, or corpus.when_source_ends="share"'
            )
    streams = {name: SplitStream(part, mix(seed, source)) for source, (name, part) in enumerate(samples.items())}
    return MixedStream(streams, interleaving)
