"""The requests in an engine's batch: what a step needs of each, in arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.inference.decoding import DecodingState
from cleangpt.inference.ragged import Ragged
from cleangpt.inference.sampling import Sampling, uniform

FinishReason = Literal["stop", "length"]
"""Why a request ended: a stop token, or `max_new_tokens`."""


@dataclass
class Request:
    """A prompt, how to continue it, and what had been generated when it last joined the batch."""

    id: int
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: frozenset[int]
    inputs: Mapping[str, Tensor]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """The most tokens that may follow."""
        return self.max_new_tokens - len(self.ids)


FACTS = np.dtype([("seed", np.uint64), ("tokens", np.int64), ("most", np.int64), ("state", np.int8)])
"""What a step reads and changes of each row: its seed, the tokens generated, the most that may be, and its state."""
RUNNING, STOPPED, FULL, CANCELLED = range(4)
REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", None)
"""Why a row ended, by its state."""


class Rows:
    """The requests in the batch, in arrays, so that no step does anything row by row."""

    def __init__(self, requests: list[Request], state: DecodingState) -> None:
        self.requests, self.state = requests, state
        self.logprobs = Ragged([()] * len(requests), np.float64)
        """Of the tokens generated since each row joined."""
        self.facts = np.array([(one.seed, len(one.ids), one.max_new_tokens, RUNNING) for one in requests], FACTS)
        most = max(len(one.stop_ids) for one in requests)
        self.stops = np.array([[*one.stop_ids, *[-1] * (most - len(one.stop_ids))] for one in requests], np.int64)
        """Tokens that end each row, filled up with -1."""
        self.advanced: list[int] = []
        """Rows that the last step gave a token, ended ones for once."""
        self.ended: list[int] = []
        """Rows that the last step has ended."""
        self.groups: list[tuple[Sampling, NDArray[np.int64], Tensor]] = []
        """Rows with the same settings, sampled together: the settings, and their places on the host and the device."""
        self._group()

    def select(self, places: NDArray[np.int64]) -> None:
        """Keeps these rows."""
        self.requests = [self.requests[place] for place in places]
        self.facts, self.stops = self.facts[places], self.stops[places]
        self.logprobs.select(places)
        self.state.select(places.tolist())
        self._group()

    def join(self, other: "Rows") -> None:
        """Adds rows; both have computed their next logits."""
        self.requests += other.requests
        self.facts = np.concatenate([self.facts, other.facts])
        width = max(self.stops.shape[1], other.stops.shape[1])
        parts = (self.stops, other.stops)
        self.stops = np.concatenate(
            [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
        )
        self.logprobs.join(other.logprobs)
        self.state.join(other.state)
        self._group()

    @property
    def running(self) -> NDArray[np.bool_]:
        """Which rows have not ended."""
        found: NDArray[np.bool_] = self.facts["state"] == RUNNING
        return found

    def cancel(self, place: int) -> None:
        """Ends a row early."""
        self.facts["state"][place] = CANCELLED

    def append(self, tokens: NDArray[np.int64], logprobs: NDArray[Any]) -> None:
        """Adds a token to every row."""
        going = np.flatnonzero(self.running)
        self.state.append(tokens)
        self.logprobs.append(logprobs)
        self.facts["tokens"] += 1
        stopped = (tokens[:, None] == self.stops).any(axis=1)
        full = self.facts["tokens"] == self.facts["most"]
        self.facts["state"][going] = np.where(stopped, STOPPED, np.where(full, FULL, RUNNING))[going]
        self.advanced, self.ended = going.tolist(), going[~self.running[going]].tolist()

    @property
    def going_on(self) -> bool:
        """Whether a row may go on after its next token."""
        return bool((self.facts["most"] - self.facts["tokens"] > 1)[self.running].any())

    def draws(self) -> Callable[[int], Tensor]:
        """The random numbers `(rows,)`, float64 on the host, behind each row's next token, or the one so many later."""
        if all(sampling.greedy for sampling, *_ in self.groups):
            zeros = torch.zeros(len(self.facts), dtype=torch.float64)
            return lambda later: zeros
        seeds, tokens = self.facts["seed"].copy(), self.facts["tokens"].copy()
        return lambda later: uniform(seeds, tokens + later)

    def reason(self, place: int) -> FinishReason | None:
        """Why a row has ended; None if it has not."""
        return REASONS[int(self.facts["state"][place])]

    def take_back(self, place: int) -> Request:
        """The request of a row, with all that has been generated."""
        request, count = self.requests[place], int(self.logprobs.lengths[place])
        request.ids += self.state.tokens.row(place, count)
        request.logprobs += self.logprobs.row(place)
        return request

    def _group(self) -> None:
        groups: dict[Sampling, list[int]] = {}
        for place, request in enumerate(self.requests):
            groups.setdefault(request.sampling, []).append(place)
        arrays = [np.array(places) for places in groups.values()]
        indices = [torch.from_numpy(places).to(self.state.device) for places in arrays]
        self.groups = list(zip(groups, arrays, indices, strict=True))
