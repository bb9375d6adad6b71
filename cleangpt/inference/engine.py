"""Token by token: what follows each of several prompts, with a KV cache where the model has one.

A model reads at most `max_seq_len` tokens. A text that grows longer goes on after its last half, read anew; so the cost
of a token stays the same on the average, with a cache.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.inference.sampling import GREEDY, Sampling, SeededSampler, distribution
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import KVCache

CACHE_STEP = 256


class Token(NamedTuple):
    """A token that was drawn."""

    id: int
    logprob: float
    """Of the model's own distribution, without temperature and restrictions, in nats."""


def max_seq_len(model: LanguageModel) -> int:
    """The longest sequence a model can read."""
    return cast(Any, model).config.max_seq_len  # type: ignore[no-any-return]


class Context:
    """What a model reads before it says what comes next: the tokens of each row of a batch.

    Args:
        model: in evaluation mode.
        rows: token ids, at least one in each row.
        device: where the model is.
        vocab_size: ids from here on are padding of the embedding.
        cached: whether to use a KV cache, where the model has one.
        compiled: whether to compile the reading of single tokens, with a cache.
        spare: by how many tokens rows may be taken back.
        room: tokens that will be added to a row at most, so that a cache takes no memory for more; none: not known.

    Raises:
        UserError: a row has no tokens, or one that the model does not have.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Sequence[int]],
        device: torch.device,
        *,
        vocab_size: int | None = None,
        cached: bool = True,
        compiled: bool = False,
        spare: int = 0,
        room: int | None = None,
    ) -> None:
        self.model, self.rows, self.device, self.vocab_size = model, [list(row) for row in rows], device, vocab_size
        self.cached, self.spare, self.room = cached and model.can_cache and model.new_cache() is not None, spare, room
        if not all(self.rows):
            raise UserError("the prompt has no tokens")
        if (largest := max(map(max, self.rows))) >= (known := cast(Any, model).config.vocab_size):
            raise UserError(f"the prompt has the token {largest}; this model has {known:,} tokens, from 0 on")
        self.limit = max_seq_len(model)
        self._cache: KVCache | None = None
        self._reads_new = cast(LanguageModel, torch.compile(model)) if compiled and self.cached else model

    def add(self, tokens: Sequence[int]) -> None:
        """Puts one more token behind each row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)

    def take_back(self, count: int) -> None:
        """Takes the last tokens of each row away."""
        if self._cache is not None and (read := count - self._unread(self._cache)) > 0:
            self._cache.rewind(self._cache.lengths - read)
        for row in self.rows:
            del row[len(row) - count :]

    def logits(self, last: int = 1) -> Tensor:
        """The logits after each of the `last` tokens of each row `(batch, last, vocab)`, float32."""
        if max(map(len, self.rows)) > self.limit:
            kept = max(last, self.limit // 2)
            self.rows = [row[-kept:] if len(row) > self.limit else row for row in self.rows]
            self._cache = None
        logits = self._read_all(last) if self._cache is None else self._read_new(self._cache, last)
        return logits[..., : self.vocab_size].float()

    def in_context(self, vocab_size: int, without: int = 0) -> Tensor:
        """Which tokens are in each row `(batch, vocab_size)`, bool; `without` the last so many."""
        found = torch.zeros(len(self.rows), vocab_size, dtype=torch.bool)
        for row, tokens in zip(found, self.rows, strict=True):
            row[tokens[: len(tokens) - without]] = True
        return found.to(self.device)

    def _read_all(self, last: int) -> Tensor:
        lengths = [len(row) for row in self.rows]
        longest = max(lengths)
        # Padding stands behind a row, where no token of the row can see it.
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in self.rows], device=self.device)
        wanted = torch.tensor([range(length - last, length) for length in lengths], device=self.device)
        if not self.cached:
            return self.model(tokens, logit_positions=wanted)  # type: ignore[no-any-return]
        self._cache = cache = cast(KVCache, self.model.new_cache(self.spare + longest - min(lengths)))
        if self.room is not None:
            # In steps, so that a compiled model meets few sizes.
            cache.limit(-(-(longest + self.room + self.spare) // CACHE_STEP) * CACHE_STEP)
        logits: Tensor = self.model(tokens, cache=cache, logit_positions=wanted)
        cache.rewind(lengths)
        return logits

    def _read_new(self, cache: KVCache, last: int) -> Tensor:
        unread = self._unread(cache)
        tokens = torch.tensor([row[-unread:] for row in self.rows], device=self.device)
        places = torch.arange(unread - last, unread, device=self.device).expand(len(tokens), -1)
        logits: Tensor = self._reads_new(tokens, cache=cache, logit_positions=places if last < unread else None)
        return logits

    def _unread(self, cache: KVCache) -> int:
        """Tokens at the end of each row that are not in the cache."""
        return max(map(len, self.rows)) - cache.end


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
    ends: Collection[int] = (),
    cached: bool = True,
    compiled: bool = False,
) -> Iterator[list[Token | None]]:
    """The next token of each prompt, again and again; None for a row that has ended, until all have.

    Each row gets what it would get alone, whatever stands beside it.

    Args:
        model: in evaluation mode, on `device`.
        prompts: token ids, at least one in each.
        device: where the model is.
        max_new_tokens: the most tokens to draw for each row.
        sampling: how to draw.
        vocab_size: ids from here on are padding of the embedding, and are never drawn.
        ends: tokens that end a row; they are not given out.
        cached: whether to use a KV cache, where the model has one.
        compiled: whether to compile the reading of single tokens, with a cache.
    """
    context = Context(
        model, prompts, device, vocab_size=vocab_size, cached=cached, compiled=compiled, room=max_new_tokens
    )
    draws = SeededSampler(sampling.seed + row for row in range(len(prompts)))
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        logits = context.logits()[:, -1]
        drawn = draws.tokens(_next(context, logits, sampling))
        logprobs = logits.log_softmax(dim=-1).gather(1, drawn[:, None])[:, 0].tolist()
        tokens = drawn.tolist()
        _check_numbers(logprobs)
        ended = [before or token in ends for before, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if over else Token(*pair) for over, *pair in zip(ended, tokens, logprobs, strict=True)]
        context.add(tokens)


def _check_numbers(logprobs: Iterable[float]) -> None:
    """Raises UserError where the logits were not finite: no token follows from them."""
    if any(map(math.isnan, logprobs)):
        raise UserError("the model's logits are not finite: it has diverged, or its weights are damaged")


def _next(context: Context, logits: Tensor, sampling: Sampling, without: int = 0) -> Tensor:
    """The probabilities `(batch, vocab)` of what follows a context `without` its last tokens, from its logits."""
    penalised = sampling.repetition_penalty != 1
    return distribution(logits, sampling, context.in_context(logits.shape[-1], without) if penalised else None)


def greedy(model: LanguageModel, prompts: Tensor, count: int, cached: bool = True) -> Tensor:
    """The likeliest next tokens, `count` of them `(batch, count)`, after `prompts` `(batch, seq)`."""
    drawn = generate(model, prompts.tolist(), prompts.device, max_new_tokens=count, cached=cached)
    return torch.tensor([[cast(Token, token).id for token in row] for row in drawn], device=prompts.device).T
