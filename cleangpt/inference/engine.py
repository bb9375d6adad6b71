"""The generation engine: prompts in, tokens out, in one batch that rows join and leave between steps."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from cleangpt.data.batch import IGNORED
from cleangpt.errors import UserError
from cleangpt.inference.decoding import DecodingState, check_finite, check_prompt
from cleangpt.inference.sampling import GREEDY, Sampling, distribution, penalize, row_seed, sample, uniform
from cleangpt.models.base import LanguageModel
from cleangpt.models.head import TokenScores

SCORED_TOKENS = 4096
"""Tokens whose logits `Engine.logprobs` holds in memory at a time, including padding."""
ENDED_SHARE = 4
"""Ended rows stay in the batch until they are 1 / ENDED_SHARE of it, since removing rows copies the whole cache."""

FinishReason = Literal["stop", "length"]
"""Why a request ended: a stop token, or `max_new_tokens`."""


class Token(NamedTuple):
    """A generated token."""

    id: int
    logprob: float
    """Log-probability in nats under the model's distribution, before temperature, top-k and the like; with
    `sampled_logprobs` under the distribution that the token was sampled from."""


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


@dataclass
class _Request:
    """A prompt in the batch, how to continue it, and what has been generated."""

    id: int
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    inputs: Mapping[str, Tensor]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether no more tokens follow."""
        return self.finish_reason is not None or self.cancelled

    @property
    def remaining(self) -> int:
        """The most tokens that may follow."""
        return self.max_new_tokens - len(self.ids)

    def receive(self, token: int, logprob: float) -> None:
        """Records a new token."""
        ids = self.ids
        ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(ids) == self.max_new_tokens:
            self.finish_reason = "length"


class Engine:
    """Generates tokens for many prompts at once.

    A request gets the same tokens whatever else is in the batch and whenever it joins: rows do not attend to each
    other, and the random number behind a token depends on the request's seed and the token's index alone.

    Args:
        model: in evaluation mode, on `device`.
        device: of the model.
        vocab_size: of the tokenizer; higher token ids pad the embedding and are never sampled.
        eos_ids: tokens that end every request.
        cached: whether to use a KV cache, if the model has one.
        compiled: whether to compile the decoding of new tokens, if there is a cache.
        max_batch: maximum number of rows in the batch; further requests wait.
        sampled_logprobs: report log-probabilities of the distribution sampled from, with its temperature and over
            `vocab_size` tokens, as reinforcement learning needs them; top-k and the like are then refused.
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
    ) -> None:
        self.model, self.device, self.vocab_size = model, device, vocab_size
        self.eos_ids, self.cached, self.max_batch = frozenset(eos_ids), cached, max_batch
        self.sampled_logprobs = sampled_logprobs
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
        request = _Request(self._submitted, max_new_tokens, sampling, seed, self.eos_ids.union(stop_ids), inputs or {})
        if max_new_tokens > 0:
            self._waiting.append((request, prompt))
        self._submitted += 1
        return request.id

    def cancel(self, request_id: int) -> None:
        """Ends a request early."""
        self._waiting = deque(entry for entry in self._waiting if entry[0].id != request_id)
        for request in self._running:
            request.cancelled = request.cancelled or request.id == request_id

    def step(self) -> dict[int, Output]:
        """Generates the next token of every request in the batch; returns outputs by request id.

        Raises:
            UserError: the model's logits are not finite.
        """
        return {
            request.id: Output(Token(request.ids[-1], request.logprobs[-1]), request.finish_reason)
            for request in self._advance()
        }

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
            for request in self._advance():
                if request.finish_reason is not None:
                    yield request.id, Completion(request.ids, request.logprobs, request.finish_reason)

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
            scores = cast(TokenScores, self.model(tokens.to(self.device), targets=targets.to(self.device)))
            for row, logprobs in zip(batch, scores.logprobs.cpu(), strict=True):
                found[row] = logprobs[: len(rows[row]) - 1]
        return found

    @torch.no_grad()
    def _advance(self) -> list[_Request]:
        """Generates the next token of every request in the batch; returns the requests, the ended ones for once."""
        self._leave()
        logits = self._next_logits()
        if logits is None:
            return []
        sampled, logprobs = self._sample(logits)
        check_finite(logprobs)
        assert self._state is not None
        self._state.append(sampled)
        advanced = []
        for request, token, logprob in zip(self._running, sampled, logprobs, strict=True):
            if request.finish_reason is None and not request.cancelled:
                request.receive(token, logprob)
                advanced.append(request)
        return advanced

    def _leave(self) -> None:
        """Removes ended requests from the batch, once they are many or others wait for their places.

        A request that has reached the model's context length waits again, to continue from its last half.
        """
        if self._state is None:
            return
        limit, running = self.model.max_seq_len, self._running
        staying = [row for row, one in enumerate(running) if one.finish_reason is None and not one.cancelled]
        ended, longest = len(running) - len(staying), max(map(len, self._state.rows))
        if longest <= limit and not (ended and self._waiting) and ended < max(1, len(running) // ENDED_SHARE):
            return
        for row in staying:
            if len(self._state.rows[row]) > limit:
                running[row].inputs = self._state.inputs[row]
                self._waiting.appendleft((running[row], self._state.rows[row]))
        staying = [row for row in staying if len(self._state.rows[row]) <= limit]
        self._running = [running[row] for row in staying]
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
            prompts = [(tuple(prompt), tuple(map(id, request.inputs.values()))) for request, prompt in joining]
            distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
            inputs = {prompt: request.inputs for prompt, (request, _) in zip(prompts, joining, strict=True)}
            state = DecodingState(
                self.model, [tokens for tokens, _ in distinct], self.device, cached=self.cached,
                compiled=self._compiled, max_new_tokens=max(request.remaining for request, _ in joining),
                inputs=[inputs[prompt] for prompt in distinct],
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

    def _sample(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """The next token of every row and its log-probability, from logits `(rows, vocab)`; rows with the same
        settings are sampled together."""
        first = self._running[0].sampling
        if all(request.sampling is first for request in self._running):
            tokens, scores = self._sample_group(logits, first, list(range(len(logits))))
            return tokens.tolist(), scores.tolist()
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(self._running):
            groups.setdefault(request.sampling, []).append(row)
        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        logprobs = torch.empty(len(logits), device=logits.device)
        for sampling, rows in groups.items():
            sampled[rows], logprobs[rows] = self._sample_group(logits[rows], sampling, rows)
        return sampled.tolist(), logprobs.tolist()

    def _sample_group(self, logits: Tensor, sampling: Sampling, rows: list[int]) -> tuple[Tensor, Tensor]:
        """As `_sample`, for `rows` with the same settings; `logits` are theirs alone."""
        assert self._state is not None
        allowed = logits[:, : self.vocab_size]
        penalised = sampling.repetition_penalty != 1
        seen = self._state.seen_tokens(allowed.shape[-1])[rows] if penalised else None
        if sampling.greedy:
            tokens = penalize(allowed, sampling.repetition_penalty, seen).argmax(dim=-1)
        else:
            running = [self._running[row] for row in rows]
            draws = uniform([request.seed for request in running], [len(request.ids) for request in running])
            probabilities = distribution(allowed, sampling, seen)
            tokens = sample(probabilities, draws)
            if self.sampled_logprobs:
                return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
