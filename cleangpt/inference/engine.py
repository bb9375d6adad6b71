"""The generation engine: prompts in, tokens out, in one batch that rows join and leave between steps."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED
from cleangpt.errors import UserError
from cleangpt.inference.decoding import DecodingState, check_finite, check_prompt
from cleangpt.inference.sampling import GREEDY, Sampling, distribution, penalize, sample, seeded
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores

SCORED_TOKENS = 4096
"""Tokens whose logits `Engine.logprobs` holds in memory at a time, including padding."""

FinishReason = Literal["stop", "length"]
"""Why a request ended: a stop token, or `max_new_tokens`."""


class Token(NamedTuple):
    """A generated token."""

    id: int
    logprob: float
    """Log-probability in nats under the model's distribution, before temperature, top-k and the like."""


class Output(NamedTuple):
    """The result of one step for one request."""

    token: Token
    """The generated token, even if it is a stop token."""
    finish_reason: FinishReason | None
    """None if more tokens follow."""


class Completion(NamedTuple):
    """The tokens generated for one prompt."""

    tokens: list[Token]
    """Including the stop token, if one has ended the request."""
    finish_reason: FinishReason


@dataclass
class _Request:
    """A prompt in the batch, and how to continue it."""

    id: int
    remaining: int
    sampling: Sampling
    generator: torch.Generator
    stop_ids: frozenset[int]
    ended: bool = False

    def receive(self, token: Token) -> Output:
        """Records a new token."""
        self.remaining -= 1
        reason: FinishReason | None = "stop" if token.id in self.stop_ids else None if self.remaining else "length"
        self.ended = reason is not None
        return Output(token, reason)


class Engine:
    """Generates tokens for many prompts at once.

    A request gets the same tokens whatever else is in the batch and whenever it joins: rows do not attend to each
    other, and each has its own random generator.

    Args:
        model: in evaluation mode, on `device`.
        device: of the model.
        vocab_size: of the tokenizer; higher token ids pad the embedding and are never sampled.
        eos_ids: tokens that end every request.
        cached: whether to use a KV cache, if the model has one.
        compiled: whether to compile the decoding of new tokens, if there is a cache.
        max_batch: maximum number of rows in the batch; further requests wait.
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
    ) -> None:
        self.model, self.device, self.vocab_size = model, device, vocab_size
        self.eos_ids, self.cached, self.max_batch = frozenset(eos_ids), cached, max_batch
        self._compiled = cast(LanguageModel, torch.compile(model)) if compiled else None
        self._waiting: deque[tuple[_Request, Sequence[int]]] = deque()
        self._running: list[_Request] = []
        self._state: DecodingState | None = None
        self._submitted = 0

    @property
    def unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._waiting) or any(not request.ended for request in self._running)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> int:
        """Adds a request, which joins the batch as soon as there is room, and returns its id.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: maximum number of tokens to generate; 0 ends the request at once.
            sampling: how to sample.
            seed: of this request; None: the seed of `sampling`.
            stop_ids: tokens that end it, besides `eos_ids`.

        Raises:
            UserError: the prompt is empty, or has a token beyond the model's vocabulary.
        """
        check_prompt(self.model, prompt)
        generator = seeded(sampling.seed if seed is None else seed)
        request = _Request(self._submitted, max_new_tokens, sampling, generator, self.eos_ids.union(stop_ids))
        if max_new_tokens > 0:
            self._waiting.append((request, prompt))
        self._submitted += 1
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request early."""
        self._waiting = deque(entry for entry in self._waiting if entry[0].id != request_id)
        for request in self._running:
            request.ended = request.ended or request.id == request_id

    @torch.no_grad()
    def step(self) -> dict[int, Output]:
        """Generates the next token of every request in the batch; returns outputs by request id.

        Raises:
            UserError: the model's logits are not finite.
        """
        self._leave()
        logits = self._next_logits()
        if logits is None:
            return {}
        sampled = self._sample(logits[:, : self.vocab_size])
        logprobs = logits.log_softmax(dim=-1).gather(1, sampled[:, None])[:, 0].tolist()
        check_finite(logprobs)
        tokens = sampled.tolist()
        assert self._state is not None
        self._state.append(tokens)
        return {
            request.id: request.receive(Token(token, logprob))
            for request, token, logprob in zip(self._running, tokens, logprobs, strict=True)
        }

    def steps(self) -> Iterator[dict[int, Output]]:
        """Steps until every request has ended."""
        while self.unfinished:
            yield self.step()

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
            ): Completion([], "length")
            for row, prompt in enumerate(prompts)
        }
        for outputs in self.steps():
            for request_id, (token, reason) in outputs.items():
                completions[request_id].tokens.append(token)
                if reason == "stop":
                    completions[request_id] = completions[request_id]._replace(finish_reason=reason)
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
            scores = cast(TokenScores, self.model(tokens.to(self.device), targets=targets.to(self.device)))
            for row, logprobs in zip(batch, scores.logprobs.cpu(), strict=True):
                found[row] = logprobs[: len(rows[row]) - 1]
        return found

    def _leave(self) -> None:
        """Removes ended requests from the batch. One that has reached the model's context length waits again, to
        continue from its last half."""
        if self._state is None:
            return
        limit = self.model.max_seq_len
        staying = []
        for row, request in enumerate(self._running):
            if not request.ended and len(self._state.rows[row]) > limit:
                self._waiting.appendleft((request, self._state.rows[row]))
            elif not request.ended:
                staying.append(row)
        self._running = [self._running[row] for row in staying]
        if staying:
            self._state.select(staying)
        else:
            self._state = None

    def _next_logits(self) -> Tensor | None:
        """The logits of the next token of every row `(rows, vocab)`, after waiting requests have joined.

        None if there are no rows.
        """
        logits = [] if self._state is None else [self._state.logits()[:, 0]]
        count = min(len(self._waiting), self.max_batch - len(self._running))
        if joining := [self._waiting.popleft() for _ in range(count)]:
            prompts = [tuple(prompt) for _, prompt in joining]
            distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
            state = DecodingState(
                self.model, list(distinct), self.device, cached=self.cached, compiled=self._compiled,
                max_new_tokens=max(request.remaining for request, _ in joining),
            )  # fmt: skip
            # Several samples of one prompt share its prefill.
            copies = [distinct[prompt] for prompt in prompts]
            logits.append(state.logits()[copies, 0])
            state.select(copies)
            if self._state is None:
                self._state = state
            else:
                self._state.join(state)
            self._running += [request for request, _ in joining]
        return torch.cat(logits) if len(logits) > 1 else logits[0] if logits else None

    def _sample(self, logits: Tensor) -> Tensor:
        """Samples the next token of every row `(rows,)` from logits `(rows, vocab)`, grouping rows by settings."""
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(self._running):
            groups.setdefault(request.sampling, []).append(row)
        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for sampling, rows in groups.items():
            assert self._state is not None
            penalised = sampling.repetition_penalty != 1
            seen = self._state.seen_tokens(logits.shape[-1])[rows] if penalised else None
            part = logits if len(groups) == 1 else logits[rows]
            if sampling.greedy:
                tokens = penalize(part, sampling.repetition_penalty, seen).argmax(dim=-1)
            else:
                generators = [self._running[row].generator for row in rows]
                tokens = sample(distribution(part, sampling, seen), generators)
            if len(groups) == 1:
                return tokens
            sampled[rows] = tokens
        return sampled
