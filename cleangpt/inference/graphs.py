"""Decoding ahead of the host: steps of a batch that stays the same, from one token to the next, as one CUDA graph.

A step of a small model has some hundred kernels, each of which takes Python longer to start than the device to run. The
graph starts them together. It also samples, and reads what it has sampled, so that the next step runs while the host
still looks at the tokens of the last.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cleangpt.models.base import LanguageModel
from cleangpt.models.cache import KVCache

DEVICES = frozenset({"cuda"})
"""Types of devices that have such graphs."""
PATIENCE = 8
"""Steps of an unchanged batch before its next is recorded, which takes about as long as they did."""
WARM_UPS = 2
"""Times a step is computed before it is recorded: a kernel's first call may allocate, choose and compile."""
Sample = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From logits `(rows, vocab)` and random numbers `(rows,)` to tokens and their log-probabilities `(rows,)`."""


class StepsAhead:
    """The next tokens of the rows of a batch, computed one step ahead.

    Args:
        decoder: the model, or the compiled model.
        cache: has read all tokens but the last of each row; nothing else may change it meanwhile.
        tokens: the last of each row `(rows, 1)`, int64.
        sample: samples; does the same each time, and does not wait for the device.
        draws: the random numbers in [0, 1) `(rows,)`, float64 on the host, behind the token after so many.
    """

    def __init__(
        self, decoder: LanguageModel, cache: KVCache, tokens: Tensor, sample: Sample, draws: Callable[[int], Tensor]
    ) -> None:  # fmt: skip
        self.decoder, self.cache, self.sample, self.draws = decoder, cache, sample, draws
        self._tokens, self._drawn = tokens.clone(), torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        # Two of each: while the host reads one, the device may write the other.
        pinned = tokens.is_cuda
        self._inputs = [torch.zeros(len(tokens), dtype=torch.float64, pin_memory=pinned) for _ in range(2)]
        self._results = [torch.zeros(2, len(tokens), dtype=torch.float64, pin_memory=pinned) for _ in range(2)]
        self._waits: list[Callable[[], Any]] = []
        self._started = self._taken = 0
        lengths, before = cache.lengths.clone(), tokens.clone()

        def undo() -> None:
            cache.lengths.copy_(lengths)
            self._tokens.copy_(before)

        self._replay = record(self._step, undo)

    @property
    def recorded(self) -> bool:
        """Whether the step could be recorded; without, there is no `next`."""
        return self._replay is not None

    def next(self, more: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The next token of each row, and its log-probability.

        Args:
            more: whether a row may go on after this token; the next step is then started.

        Raises:
            ValueError: a row would have more tokens than the cache holds.
        """
        self.cache.check_room(1)
        if self._started == self._taken:
            self._start()
        if more and self.cache.end + 2 <= self.cache.max_len:
            self._start()
        self._waits.pop(0)()
        tokens, logprobs = self._results[self._taken % 2].numpy().copy()
        self._taken += 1
        self.cache.end += 1
        return tokens.astype(np.int64), logprobs

    def stop(self) -> None:
        """Takes back a step that has been started and not been asked for, before the cache is used otherwise.

        It is read again: to the same slots, of which none before it needs what they held.
        """
        if self._started > self._taken:
            self.cache.lengths.sub_(1)

    def _start(self) -> None:
        assert self._replay is not None
        place = self._started % 2
        self._inputs[place].copy_(self.draws(self._started))
        self._drawn.copy_(self._inputs[place], non_blocking=True)
        self._results[place].copy_(self._replay(), non_blocking=True)
        self._waits.append(mark(self._tokens.device))
        self._started += 1

    def _step(self) -> Tensor:
        """Reads a token of each row and samples the next; returns it and its log-probability `(2, rows)`, float64."""
        with self.cache.all_slots():
            logits = cast(Tensor, self.decoder(self._tokens, cache=self.cache))
        tokens, logprobs = self.sample(logits[:, 0].float(), self._drawn)
        self._tokens.copy_(tokens[:, None])
        return torch.stack([tokens.double(), logprobs.double()])


def mark(device: torch.device) -> Callable[[], Any]:
    """A function that waits until the device has done all that has been started so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def record(function: Callable[[], Tensor], undo: Callable[[], object]) -> Callable[[], Tensor] | None:
    """Records the kernels of a function in a CUDA graph.

    Args:
        function: must do the same each time, with tensors that stay where they are.
        undo: undoes what one call has changed.

    Returns:
        Calls the function by the graph, with its result in the same tensor each time; None: it cannot be recorded,
        since it waits for the device.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    result = None
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
            undo()
        # What autocast has converted before may be freed after the recording, and what in it belongs to the graph.
        torch.clear_autocast_cache()
        with suppress(RuntimeError):
            result = captured(graph, function)
    torch.clear_autocast_cache()
    torch.cuda.current_stream().wait_stream(stream)
    if (output := result) is None:
        return None

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def captured(graph: torch.cuda.CUDAGraph, function: Callable[[], Tensor]) -> Tensor:
    """Captures what a function starts on the current stream; returns its result, which replays overwrite.

    Raises:
        RuntimeError: it waits for the device.
    """
    # Not by torch.cuda.graph, which first gives all free memory back to the device, where the next step has to ask for
    # it again. Other threads, such as a loader's, may go on meanwhile.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        return function()
    finally:
        graph.capture_end()
