"""A policy that acts: in many simulations of one task at once, with one model and one KV cache.

Each row of the batch is an episode: the task's text, perhaps a prompt, and its steps. When an episode outgrows the
context, the older half of its steps is forgotten and the rest is read again, so that an episode may last for ever in
the same memory. What a row does depends on its own seed and not on the other rows, but for the rounding of sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.modalities import Ids, Values, batch_size
from cleangpt.data.records import PlacedRecords, stack_rows
from cleangpt.data.timesteps import NO_PLACE, Steps, Timesteps, join_records
from cleangpt.environments.acting import Acting
from cleangpt.errors import UserError
from cleangpt.inference.sampling import row_seed, sample, uniform
from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import KVCache


class Context(NamedTuple):
    """What an episode begins with, tokens and places `(length,)`: the task's text, and perhaps a prompt."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    records: dict[str, PlacedRecords]

    @staticmethod
    def of(text: NDArray[np.int64], prompt: Steps | None = None) -> "Context":
        """A text, whose tokens have no place in an observation, and steps of another episode."""
        places = np.full(len(text), NO_PLACE)
        if prompt is None:
            return Context(text, places, {})
        return Context(
            np.concatenate([text, prompt.tokens.reshape(-1)]), np.concatenate([places, prompt.places.reshape(-1)]),
            join_records([({}, len(text)), (prompt.placed(), prompt.tokens.size)]),
        )  # fmt: skip


class Agent:
    """Acts in a batch of episodes that have just begun; call `act` with their observations, `keep` when some end.

    Args:
        model: in evaluation mode, on `device`; it reads `places`.
        device: of the model.
        steps: how the task's steps become tokens.
        acting: how actions are chosen.
        contexts: what each episode begins with.
        seeds: of the episodes.
        cached: whether to use a KV cache; without, the whole context is read for every token of an action.

    Raises:
        UserError: the context is too short for what an episode begins with and a step.
    """

    def __init__(
        self, model: LanguageModel, device: torch.device, steps: Timesteps, acting: Acting,
        contexts: Sequence[Context], seeds: Sequence[int], *, cached: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.device, self.steps, self.acting, self.cached = model, device, steps, acting, cached
        self.limit = min(model.max_seq_len, acting.context or model.max_seq_len)
        self.begun = np.array([len(context.tokens) for context in contexts])
        """Tokens that each row keeps for ever."""
        if (needed := int(self.begun.max()) + steps.size) > self.limit:
            raise UserError(
                f"the agent reads {self.limit} tokens; allowed: {needed} or more, a text, a prompt and a step"
            )
        self.lengths, self.read = self.begun.copy(), np.zeros_like(self.begun)
        """Tokens of each row, and how many of them are in the cache."""
        self.tokens = np.zeros((len(contexts), self.limit), np.int64)
        self.places = np.full((len(contexts), self.limit), NO_PLACE)
        for row, context in enumerate(contexts):
            self.tokens[row, : self.begun[row]], self.places[row, : self.begun[row]] = context.tokens, context.places
        self.records = [context.records for context in contexts]
        """The images and vectors at the tokens of each row."""
        self.seeds, self.drawn = [row_seed(seed) for seed in seeds], 0
        self.logprobs = np.zeros((len(contexts), 0))
        """Of the tokens of the last action, among those allowed, `(rows, tokens)`."""
        self._cache: KVCache | None = None

    @torch.no_grad()
    def act(self, observations: Values, returns: NDArray[np.float64] | None = None) -> Values:
        """The action of each row, a batch of values.

        Args:
            observations: of each row.
            returns: to come, of each row, where the task has them.

        Raises:
            UserError: the model's logits are not finite, or an observation is not of the task's space.
        """
        assert batch_size(observations) == len(self.lengths)
        seen = self.steps.observe(observations, returns)
        self._make_room()
        self._append_records(seen)
        self._append(seen.tokens, seen.places)
        chosen, logprobs = list[NDArray[np.int64]](), list[NDArray[np.float64]]()
        for allowed in self.steps.action.ids(self.steps.ranges, action=True):
            tokens, scores = self._choose(self._next_logits(), allowed)
            chosen.append(tokens)
            logprobs.append(scores)
            places = self.steps.action_places((len(tokens), 1), hidden=not self.acting.see_actions)
            self._append(tokens[:, None], places)
        self.logprobs = np.stack(logprobs, axis=1)
        return self.steps.action.decode(np.stack(chosen, axis=1), self.steps.ranges, action=True)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        index = np.array(rows, np.int64)
        for name in ("begun", "lengths", "read", "tokens", "places"):
            setattr(self, name, getattr(self, name)[index])
        self.seeds, self.records = [self.seeds[row] for row in rows], [self.records[row] for row in rows]
        if self._cache is not None and rows:
            self._cache.select(rows)

    def _append(self, tokens: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Adds the same number of tokens `(rows, count)` to every row."""
        at = self.lengths[:, None] + np.arange(tokens.shape[1])
        rows = np.arange(len(tokens))[:, None]
        self.tokens[rows, at], self.places[rows, at] = tokens, places
        self.lengths = self.lengths + tokens.shape[1]

    def _append_records(self, seen: Steps) -> None:
        """Adds the records of an observation to every row, before its tokens are added."""
        for row, length in enumerate(self.lengths.tolist() if seen.records else []):
            own = seen.part(row, row + 1)
            self.records[row] = join_records([(self.records[row], length), (own.placed(), own.tokens.size)])

    def _make_room(self) -> None:
        """Forgets older steps of rows into which the next one would not fit."""
        size = self.steps.size
        full = np.flatnonzero(self.lengths + size > self.limit)
        for row in full.tolist():
            begin, end = int(self.begun[row]), int(self.lengths[row])
            kept = (self.limit - begin) // size // 2 * size
            for column in (self.tokens, self.places):
                column[row, begin : begin + kept] = column[row, end - kept : end]
            self.records[row] = {
                name: _without(records, begin, end - kept) for name, records in self.records[row].items()
            }
            self.lengths[row] = begin + kept
        if len(full):
            self._cache = None

    def _next_logits(self) -> Tensor:
        """The logits of each row's next token `(rows, vocab)`, after reading what has not been read."""
        if self._cache is None or not self.cached:
            self.read = np.zeros_like(self.lengths)
            padding = int(self.lengths.max() - self.lengths.min())
            self._cache = self.model.new_cache(padding) if self.cached else None
        unread = self.lengths - self.read
        # Padding comes after a row, so none of its tokens attends to it.
        at = np.minimum(self.read[:, None] + np.arange(unread.max()), self.limit - 1)
        rows = np.arange(len(at))[:, None]
        inputs = [torch.from_numpy(column[rows, at]).to(self.device) for column in (self.tokens, self.places)]
        last = torch.from_numpy(unread - 1)[:, None].to(self.device)
        records = {name: tensor.to(self.device) for name, tensor in self._unread_records().items()}
        logits = self.model(inputs[0], places=inputs[1], cache=self._cache, logit_positions=last, **records)
        if self._cache is not None and unread.min() < unread.max():
            self._cache.rewind(self.lengths.tolist())
        self.read = self.lengths.copy()
        return logits[:, 0].float()  # type: ignore[no-any-return]

    def _unread_records(self) -> dict[str, Tensor]:
        """The images and vectors at tokens that have not been read, with ends counted from these."""
        rows = []
        for read, placed in zip(self.read.tolist(), self.records, strict=True):
            found: dict[str, Tensor] = {}
            for name, records in placed.items():
                first = int(np.searchsorted(records.ends, read, side="right"))
                found |= PlacedRecords(records.values[first:], records.ends[first:] - read).inputs(name)
            rows.append(found)
        return {name: tensor for name, tensor in stack_rows(rows).items() if tensor.shape[1]}

    def _choose(self, logits: Tensor, allowed: Ids) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """A token of those allowed for each row, and its log-probability among them, both `(rows,)`."""
        probabilities = (logits[:, allowed.first : allowed.end].double() / self.acting.temperature).softmax(-1).cpu()
        how = self.acting.numbers if allowed.numeric else self.acting.choices
        draws = uniform(self.seeds, [self.drawn] * len(self.seeds))
        self.drawn += 1
        if how == "argmax":
            index = probabilities.argmax(-1)
        elif how == "mean":
            mean = probabilities.numpy() @ self.steps.ranges.bin_values()
            index = torch.from_numpy(self.steps.ranges.to_bins(mean))
        else:
            index = sample(probabilities, draws if how == "sample" else torch.full_like(draws, 0.5))
        scores = probabilities.gather(1, index[:, None])[:, 0].log()
        return (index + allowed.first).numpy(), scores.numpy()


def _without(records: PlacedRecords, begin: int, end: int) -> PlacedRecords:
    """Records after the tokens from `begin` to `end` have been taken out, with those at them."""
    before, after = records.ends <= begin, records.ends > end
    kept = before | after
    return PlacedRecords(records.values[kept], np.where(after, records.ends - (end - begin), records.ends)[kept])
