"""The generation engine: prompts in, tokens out, in one batch that rows join and leave between steps."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.data.batch import IGNORED
from cleangpt.errors import UserError
from cleangpt.inference.decoding import DecodingState, check_prompt
from cleangpt.inference.graphs import DEVICES, PATIENCE, StepsAhead
from cleangpt.inference.requests import FinishReason, Request, Rows
from cleangpt.inference.sampling import (
    GREEDY,
    Sampling,
    check_finite,
    distribution,
    penalize,
    row_seed,
    sample,
)
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores

SCORED_TOKENS = 4096
"""Tokens whose logits `Engine.logprobs` holds in memory at a time, including padding."""
ENDED_SHARE = 4
"""Ended rows stay in the batch until they are 1 / ENDED_SHARE of it, since removing rows copies the whole cache."""


class Token(NamedTuple):
    """A generated token."""

    id: int
    logprob: float
    """Log-probability in nats under the model's distribution over the tokenizer's tokens, before temperature, top-k and
    the like; with `sampled_logprobs` under the distribution that the token was sampled from."""


class Output(NamedTuple):
    """The result of one step for one request."""

    token: Token
    """The generated token, even if it is a stop token."""
    finish_reason: FinishReason | None
    """None if more tokens follow."""


class Completion(NamedTuple):
    """The tokens generated for one prompt, including the stop token, if one has ended the request."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason

    @property
    def tokens(self) -> list[Token]:
        """Ids and log-probabilities, token by token."""
        return list(map(Token, self.ids, self.logprobs))


class Engine:
    """Generates tokens for many prompts at once.

    A request gets the same tokens whatever else is in the batch and whenever it joins: rows do not attend to each
    other, and the random number behind a token depends on the request's seed and the token's index alone.

    Args:
        model: in evaluation mode, on `device`.
        device: of the model.
        vocab_size: of the tokenizer; higher token ids pad the embedding and have no probability. None: there are none.
        eos_ids: tokens that end every request.
        cached: whether to use a KV cache, if the model has one.
        compiled: whether to compile the decoding of new tokens, if there is a cache.
        max_batch: maximum number of rows in the batch; further requests wait.
        sampled_logprobs: report log-probabilities of the distribution sampled from, with its temperature and over
            `vocab_size` tokens, as reinforcement learning needs them; top-k and the like are then refused.
        patience: steps of an unchanged batch before the next are computed ahead by a CUDA graph, which takes
            about as long as they do to record; none if `compiled`. None: never.
    """

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        *,
        vocab_size: int | None = None,
        eos_ids: Collection[int] = (),
        cached: bool = True,
        compiled: bool = False,
        max_batch: int = 256,
        sampled_logprobs: bool = False,
        patience: int | None = PATIENCE,
    ) -> None:
        self.model, self.device, self.vocab_size = model, device, vocab_size
        self.eos_ids, self.cached, self.max_batch = frozenset(eos_ids), cached, max_batch
        self.sampled_logprobs = sampled_logprobs
        self._compiled = cast(LanguageModel, torch.compile(model)) if compiled else None
        self.steps_ahead = 0
        """Steps that a CUDA graph has computed, of all so far."""
        self._ahead: StepsAhead | None = None
        self._steady = 0
        """Steps since the batch has changed."""
        can_record = device.type in DEVICES and cached and model.can_cache
        self._patience = (0 if compiled and patience else patience) if can_record else None
        self._waiting: deque[Request] = deque()
        self._rows: Rows | None = None
        self._submitted = 0

    @property
    def unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._waiting) or (self._rows is not None and bool(self._rows.running.any()))

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
        inputs: Mapping[str, Tensor] | None = None,
    ) -> int:
        """Adds a request, which joins the batch as soon as there is room, and returns its id.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: maximum number of tokens to generate; 0 ends the request at once.
            sampling: how to sample.
            seed: of this request; None: the seed of `sampling`.
            stop_ids: tokens that end it, besides `eos_ids`.
            inputs: what the model reads besides tokens, such as images and where they end, without the dimension of
                rows; see `data/records.py`.

        Raises:
            UserError: the prompt is empty, or has a token beyond the model's vocabulary; or `sampling` leaves tokens
                out whose log-probabilities are asked for.
        """
        check_prompt(self.model, prompt)
        if self.sampled_logprobs and not sampling.plain:
            raise UserError(
                "top_k, top_p, min_p or repetition_penalty is set; log-probabilities of the distribution sampled from "
                "are given for a temperature alone"
            )
        seed = row_seed(sampling.seed if seed is None else seed)
        stops = self.eos_ids.union(stop_ids) if stop_ids else self.eos_ids
        if max_new_tokens > 0:
            self._waiting.append(Request(self._submitted, prompt, max_new_tokens, sampling, seed, stops, inputs or {}))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, request_id: int) -> None:
        """Ends a request early."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        if (rows := self._rows) is not None:
            for place in (place for place, request in enumerate(rows.requests) if request.id == request_id):
                rows.cancel(place)

    def step(self) -> dict[int, Output]:
        """Generates the next token of every request in the batch; returns outputs by request id.

        Raises:
            UserError: the model's logits are not finite.
        """
        rows = self._advance()
        return {} if rows is None else {
            rows.requests[place].id: Output(
                Token(rows.state.tokens.row(place, 1)[0], rows.logprobs.row(place, 1)[0]), rows.reason(place)
            )
            for place in rows.advanced
        }  # fmt: skip

    def steps(self) -> Iterator[dict[int, Output]]:
        """Steps until every request has ended."""
        while self.unfinished:
            yield self.step()

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """The id and the tokens of each request as it ends, until all have; more may be submitted meanwhile.

        Raises:
            UserError: the model's logits are not finite.
        """
        while self.unfinished:
            if (rows := self._advance()) is None:
                continue
            for place in rows.ended:
                if (reason := rows.reason(place)) is not None:  # None: cancelled meanwhile
                    request = rows.take_back(place)
                    yield request.id, Completion(request.ids, request.logprobs, reason)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> list[Completion]:
        """Continues prompts; returns completions in the same order. The seed of each prompt is one higher.

        Raises:
            UserError: a prompt is empty, or has a token beyond the vocabulary; or the logits are not finite.
            ValueError: other requests are unfinished.
        """
        if self.unfinished:
            raise ValueError("other requests of this engine are unfinished")
        for prompt in prompts:  # check all before submitting the first
            check_prompt(self.model, prompt)
        completions = {
            self.submit(
                prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=sampling.seed + row, stop_ids=stop_ids
            ): Completion([], [], "length")
            for row, prompt in enumerate(prompts)
        }
        completions.update(self.completions())
        return list(completions.values())

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The log-probability of each token of a text given those before it, in nats.

        Args:
            rows: token ids, of any lengths up to `max_seq_len` + 1.

        Returns:
            For each row a float32 tensor on the host, one shorter than the row, since the first token has no context.

        Raises:
            UserError: a row is empty or too long, or has a token beyond the model's vocabulary.
        """
        limit = self.model.max_seq_len
        for text in rows:
            check_prompt(self.model, text)
            if len(text) > limit + 1:
                raise UserError(f"a text has {len(text):,} tokens; allowed: up to {limit + 1:,}, which the model reads")
        found = [torch.zeros(0)] * len(rows)
        # Longest first, so that the rows of one pass need little padding.
        order = sorted((row for row in range(len(rows)) if len(rows[row]) > 1), key=lambda row: -len(rows[row]))
        while order:
            longest = len(rows[order[0]]) - 1
            count = max(1, SCORED_TOKENS // longest)
            batch, order = order[:count], order[count:]
            tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
            targets = torch.full((len(batch), longest), IGNORED)
            for place, row in enumerate(batch):
                length = len(rows[row]) - 1
                tokens[place, :length], targets[place, :length] = torch.tensor([rows[row][:-1], rows[row][1:]])
            with scored_over(self.model, self.vocab_size):
                scores = cast(TokenScores, self.model(tokens.to(self.device), targets=targets.to(self.device)))
            for row, logprobs in zip(batch, scores.logprobs.cpu(), strict=True):
                found[row] = logprobs[: len(rows[row]) - 1]
        return found

    @torch.no_grad()
    def _advance(self) -> Rows | None:
        """Generates the next token of every request in the batch; returns the batch, or None if it is empty."""
        self._leave()
        if (rows := self._rows) is not None and (ahead := self._get_ahead(rows)) is not None:
            tokens, logprobs = ahead.next(more=rows.going_on)
            self.steps_ahead += 1
        else:
            logits, rows = self._next_logits(), self._rows
            if logits is None or rows is None:
                return None
            sampled = self._sample(rows, logits, rows.draws()(0), checked=True)
            tokens, logprobs = (entry.cpu().numpy() for entry in sampled)
        check_finite(logprobs)
        rows.append(tokens, logprobs)
        return rows

    def _get_ahead(self, rows: Rows) -> StepsAhead | None:
        """What computes the next tokens of a batch that has stayed the same; None: nothing does."""
        if self._patience is None:
            return None
        penalised = any(sampling.repetition_penalty != 1 for sampling, *_ in rows.groups)  # needs tokens on the host
        joining = self._waiting and len(rows.requests) < self.max_batch
        if joining or penalised:
            self._changed()
            return None
        if self._ahead is None and self._steady >= self._patience:
            sample = partial(self._sample, rows, checked=False)
            self._ahead = rows.state.steps_ahead(sample, rows.draws())
            if self._ahead is not None and not self._ahead.recorded:
                self._ahead = self._patience = None
        self._steady += 1
        return self._ahead

    def _changed(self) -> None:
        """Stops computing ahead, before the batch changes."""
        if self._ahead is not None:
            self._ahead.stop()
        self._ahead, self._steady = None, 0

    def _leave(self) -> None:
        """Removes ended requests from the batch, once they are many, too long, or others wait for their places.

        A request that has reached the model's context length waits again, to continue from its last half.
        """
        if (rows := self._rows) is None:
            return
        running, tokens = rows.running, rows.state.tokens
        ended = len(running) - np.count_nonzero(running)
        many = ended >= max(1, len(running) // ENDED_SHARE) or (ended and self._waiting)
        if not many and tokens.longest <= rows.state.capacity:
            return
        self._changed()
        too_long = running & (tokens.lengths > self.model.max_seq_len)
        for place in np.flatnonzero(too_long).tolist():
            request = rows.take_back(place)
            request.prompt, request.inputs = tokens.row(place), rows.state.inputs[place]
            self._waiting.appendleft(request)
        staying = np.flatnonzero(running & ~too_long)
        if len(staying):
            rows.select(staying)
        else:
            self._rows = None

    def _next_logits(self) -> Tensor | None:
        """The logits of the next token of every row `(rows, vocab)`, after waiting requests have joined.

        None if there are no rows.
        """
        logits = [] if self._rows is None else [self._rows.state.logits()[:, 0]]
        free = self.max_batch - (0 if self._rows is None else len(self._rows.requests))
        if joining := [self._waiting.popleft() for _ in range(min(len(self._waiting), free))]:
            prompts = [(tuple(request.prompt), tuple(map(id, request.inputs.values()))) for request in joining]
            distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
            inputs = {prompt: request.inputs for prompt, request in zip(prompts, joining, strict=True)}
            state = DecodingState(
                self.model, [tokens for tokens, _ in distinct], self.device, cached=self.cached,
                compiled=self._compiled, max_new_tokens=max(request.remaining for request in joining),
                inputs=[inputs[prompt] for prompt in distinct],
            )  # fmt: skip
            # Several samples of one prompt share its prefill.
            copies = [distinct[prompt] for prompt in prompts]
            logits.append(state.logits()[copies, 0])
            state.select(copies)
            rows = Rows(joining, state)
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)
        return torch.cat(logits) if len(logits) > 1 else logits[0] if logits else None

    def _sample(self, rows: Rows, logits: Tensor, draws: Tensor, *, checked: bool) -> tuple[Tensor, Tensor]:
        """The next token of every row and its log-probability, `(rows,)` each, from logits `(rows, vocab)`.

        Args:
            rows: the batch.
            logits: of all its rows.
            draws: a random number for each row `(rows,)`.
            checked: whether the tokens so far may be read, and the device waited for.
        """
        if len(rows.groups) == 1:
            return self._sample_group(rows, logits, draws, rows.groups[0][0], slice(None), checked)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        logprobs = torch.empty(len(logits), device=logits.device)
        for sampling, places, index in rows.groups:
            own = logits[index], draws[places if draws.is_cpu else index]
            tokens[index], logprobs[index] = self._sample_group(rows, *own, sampling, places, checked)
        return tokens, logprobs

    def _sample_group(
        self, rows: Rows, logits: Tensor, draws: Tensor, sampling: Sampling, places: NDArray[np.int64] | slice,
        checked: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `_sample`, for the rows at `places`, which have the same settings; `logits` and `draws` are theirs."""
        allowed = logits[:, : self.vocab_size]
        penalised = sampling.repetition_penalty != 1
        seen = rows.state.seen_tokens(allowed.shape[-1])[places] if penalised else None
        if sampling.greedy:
            tokens = penalize(allowed, sampling.repetition_penalty, seen).argmax(dim=-1)
        else:
            probabilities = distribution(allowed, sampling, seen)
            tokens = sample(probabilities, draws, checked=checked)
            if self.sampled_logprobs:
                return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()
        return tokens, allowed.gather(1, tokens[:, None])[:, 0] - allowed.logsumexp(dim=-1)


@contextmanager
def scored_over(model: LanguageModel, vocab_size: int | None) -> Iterator[None]:
    """Scores of targets are over this many token ids, None: over all, for as long as it lasts."""
    before, model.scored_vocab = model.scored_vocab, vocab_size
    try:
        yield
    finally:
        model.scored_vocab = before
