"""Prompts read once: where answers alone are scored, rows with the same prompt share its keys and values.

What a model computes at the tokens of a prompt is read by later tokens only, through attention. So the distinct prompts
of a batch are read first, one row each, and then the answers after them; padding is left out, and logits are computed
for targets alone. Results are those of reading every row by itself, up to rounding; on a CPU the time is that of the
tokens that are left.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED
from cleangpt.models.cache import KVCache
from cleangpt.models.head import TokenScores


class Reader(Protocol):
    """What is asked of a `LanguageModel`."""

    shares_prompts: bool

    def new_cache(self, rollback_tokens: int = 0) -> KVCache | None: ...

    def features(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor: ...

    def score(self, features: Tensor, targets: Tensor, names: Collection[str], summed: bool = False) -> TokenScores: ...


def scores_after_prompts(
    model: Reader, tokens: Tensor, targets: Tensor | None, names: Collection[str], summed: bool
) -> TokenScores | None:
    """The scores of targets, as the model's `forward` returns them; outputs of heads are 0 where there is no target.

    None: the model shares no prompts, there are no targets, or no row has a prompt.
    """
    if targets is None or not model.shares_prompts:
        return None
    first, width = answer_places(targets)
    longest = int(first.max())
    if longest == 0:
        return None
    beyond = torch.arange(longest, device=tokens.device) >= first[:, None]
    known = tokens[:, :longest].masked_fill(beyond, -1)
    prompts, rows = known.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    lengths = (prompts >= 0).sum(dim=1).tolist()
    cache = model.new_cache(longest - min(lengths))
    assert cache is not None
    cache.resize(longest, longest - min(lengths))
    model.features(prompts.clamp(min=0), cache=cache)
    cache.rewind(lengths)
    cache.select(rows.tolist())
    cache.finish(width)
    places = first[:, None] + torch.arange(width, device=tokens.device)
    read, expected = tokens.gather(1, places), targets.gather(1, places)
    counted = (expected != IGNORED).flatten().nonzero()[:, 0]
    features = model.features(read, cache=cache).flatten(0, 1).index_select(0, counted)
    found = model.score(features, expected.flatten()[counted], names, summed)

    def back(score: Tensor) -> Tensor:
        return score.new_zeros(tokens.shape).masked_scatter(targets != IGNORED, score)

    heads = {name: back(score) for name, score in found.heads.items()}
    if summed:
        return found._replace(heads=heads)
    fields = {name: back(score) for name, score in found._asdict().items() if isinstance(score, Tensor)}
    return found._replace(**fields, heads=heads)


def answer_places(targets: Tensor) -> tuple[Tensor, int]:
    """Where the answer of each row begins `(rows,)`, and how many tokens from there on have all targets of every row.

    A row that begins so late that it would go beyond the last token begins earlier.
    """
    counts, seq = targets != IGNORED, targets.shape[1]
    places = torch.arange(seq, device=targets.device)
    first = torch.where(counts, places, seq).amin(dim=1)
    last = torch.where(counts, places, -1).amax(dim=1)
    width = max(1, int((last - first).max()) + 1)
    return torch.where(first < seq, first, 0).clamp(max=seq - width), width
