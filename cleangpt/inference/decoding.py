"""The tokens of a batch and their KV cache: the state that `Engine` and speculative decoding build on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.records import shift_ends, stack_rows
from cleangpt.errors import UserError
from cleangpt.inference.graphs import Sample, StepsAhead
from cleangpt.inference.ragged import Ragged
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import KVCache

COMPILED_STEP = 256
"""Caches of a compiled model are allocated in multiples of this, so that it sees few sizes."""


class DecodingState:
    """The tokens of each row of a batch, and their KV cache.

    A model reads at most `max_seq_len` tokens. A row that grows longer continues from its last half, which is
    prefilled again, so the average cost per token stays the same.

    Args:
        model: in evaluation mode, on `device`.
        rows: token ids, at least one in each row.
        device: of the model.
        cached: whether to use a KV cache, where the model has one.
        compiled: the compiled model, for everything after the prefill.
        rollback_tokens: how many tokens can be rolled back at a time.
        max_new_tokens: the most tokens that will be added to a row, to save memory; None: unknown.
        inputs: of each row, what the model reads besides tokens, as in `Engine.submit`; None: nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Sequence[int]],
        device: torch.device,
        *,
        cached: bool = True,
        compiled: LanguageModel | None = None,
        rollback_tokens: int = 0,
        max_new_tokens: int | None = None,
        inputs: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.tokens = Ragged(rows, np.int64)
        self.inputs: list[Mapping[str, Tensor]] = list(inputs or [{}] * len(self.tokens.lengths))
        self.rollback_tokens, self.max_new_tokens = rollback_tokens, max_new_tokens
        self._cached, self._decoder = cached and model.can_cache, model if compiled is None else compiled
        self._cache: KVCache | None = None

    @property
    def capacity(self) -> int:
        """Tokens that a row may have before it must be prefilled again."""
        return self.model.max_seq_len if self._cache is None else self._cache.max_len

    def steps_ahead(self, sample: Sample, draws: Callable[[int], Tensor]) -> StepsAhead | None:
        """The next tokens by a CUDA graph, as long as nothing but `append` is called; None: there is no cache that has
        room and has read all but the last token."""
        cache = self._cache
        if cache is None or self._unread(cache) != 1 or cache.end >= cache.max_len:
            return None
        return StepsAhead(self._decoder, cache, self._on_device(self.tokens.last(1)), sample, draws)

    def append(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Adds one token to each row."""
        self.tokens.append(tokens)

    def rollback(self, count: int) -> None:
        """Removes the last `count` tokens of each row."""
        if self._cache is not None and (cached := count - self._unread(self._cache)) > 0:
            self._cache.rewind([length - cached for length in self._cache.lengths.tolist()])
        self.tokens.drop(count)

    def logits(self, last: int = 1) -> Tensor:
        """The logits after each of the `last` tokens of each row `(batch, last, vocab)`, float32."""
        if self._cache is None or self.tokens.longest > self.model.max_seq_len:
            return self._prefill(last).float()
        return self._decode(self._cache, last).float()

    def seen_tokens(self, vocab_size: int, skip_last: int = 0) -> Tensor:
        """Which tokens occur in each row `(batch, vocab_size)`, bool, not counting the last `skip_last`."""
        seen = torch.zeros(len(self.tokens.lengths), vocab_size, dtype=torch.bool)
        for place, row in enumerate(seen):
            tokens = self.tokens.row(place)
            row[tokens[: len(tokens) - skip_last]] = True
        return seen.to(self.device)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row named twice is copied."""
        if list(rows) != list(range(len(self.tokens.lengths))):
            self.tokens.select(rows)
            self.inputs = [self.inputs[row] for row in rows]
            if self._cache is not None:
                self._cache.select(rows)

    def join(self, other: "DecodingState") -> None:
        """Appends the rows of another state of the same model; call `logits` of both first."""
        self.tokens.join(other.tokens)
        self.inputs += other.inputs
        if self._cache is not None and other._cache is not None:
            self._cache.join(other._cache)

    def _prefill(self, last: int) -> Tensor:
        """Prefills a new cache with all rows."""
        limit = self.model.max_seq_len
        if self.tokens.longest > limit:
            self._keep_last(max(last, limit // 2), limit)
        lengths, longest = self.tokens.lengths.tolist(), self.tokens.longest
        # Padding comes after a row, so none of its tokens attends to it.
        tokens = self._on_device(self.tokens.padded())
        positions = self._on_device(self.tokens.lengths[:, None] + np.arange(-last, 0))
        rollback_tokens = self.rollback_tokens + longest - min(lengths)
        self._cache = cache = self.model.new_cache(rollback_tokens) if self._cached else None
        if cache is not None and self.max_new_tokens is not None:
            needed = longest + self.max_new_tokens + self.rollback_tokens
            slots = cache_slots(needed, self._decoder is not self.model)
            cache.resize(min(cache.max_len, slots), rollback_tokens)
        others = {name: tensor.to(self.device) for name, tensor in stack_rows(self.inputs).items()}
        logits: Tensor = self.model(tokens, cache=cache, logit_positions=positions, **others)
        if cache is not None:
            cache.rewind(lengths)
        return logits

    def _keep_last(self, count: int, limit: int) -> None:
        """Keeps the last `count` tokens of rows with more than `limit`."""
        rows = [self.tokens.row(place) for place in range(len(self.tokens.lengths))]
        cut = [len(row) - count if len(row) > limit else 0 for row in rows]
        self.tokens = Ragged([row[start:] for row, start in zip(rows, cut, strict=True)], np.int64)
        self.inputs = [shift_ends(given, start) for given, start in zip(self.inputs, cut, strict=True)]

    def _decode(self, cache: KVCache, last: int) -> Tensor:
        """Reads the tokens that are not in the cache yet."""
        unread = self._unread(cache)
        tokens, positions = self._on_device(self.tokens.last(unread)), None
        if last < unread:
            positions = torch.arange(unread - last, unread, device=self.device).expand(len(tokens), -1)
        logits: Tensor = self._decoder(tokens, cache=cache, logit_positions=positions)
        return logits

    def _unread(self, cache: KVCache) -> int:
        """Number of tokens at the end of each row that are not in the cache yet."""
        return self.tokens.longest - cache.end

    def _on_device(self, numbers: NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def cache_slots(needed: int, compiled: bool) -> int:
    """How many tokens a cache is made for: at most a quarter more than needed, so that the rows, which every step
    reads, lie close together, and batches that rows join seldom need other sizes."""
    step = COMPILED_STEP if compiled else max(8, 2 ** (needed.bit_length() - 3))
    return math.ceil(needed / step) * step


def check_prompt(model: LanguageModel, tokens: Sequence[int]) -> None:
    """Raises UserError for a prompt that is empty, or has a token beyond the model's vocabulary."""
    if not tokens:
        raise UserError("the prompt has no tokens")
    vocab_size = model.config.vocab_size or 0
    if (largest := max(tokens)) >= vocab_size:
        raise UserError(f"the prompt has the token {largest}; allowed: 0 to {vocab_size - 1}, the model's vocabulary")
