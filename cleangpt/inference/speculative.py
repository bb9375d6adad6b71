"""Speculative decoding: a small model drafts tokens that a larger one checks several at a time."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cleangpt.inference.engine import Context, Token, _check_numbers, _next
from cleangpt.inference.sampling import GREEDY, Sampling, SeededSampler
from cleangpt.models.base import LanguageModel


@torch.no_grad()
def speculate(
    model: LanguageModel,
    draft: LanguageModel,
    prompt: Sequence[int],
    device: torch.device,
    *,
    max_new_tokens: int,
    draft_tokens: int = 4,
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
    ends: Collection[int] = (),
    compiled: bool = False,
) -> Iterator[Token]:
    """`generate` for one prompt, where a smaller model drafts tokens that the larger one checks several at a time.

    Tokens are distributed as those of the larger model alone; with temperature 0 they are the same (Leviathan et al.
    2023, "Fast inference from transformers via speculative decoding", algorithm 1).

    Args:
        model: the larger model, in evaluation mode, on `device`.
        draft: the smaller one, of the same tokenizer, likewise.
        prompt: token ids, at least one.
        device: where the models are.
        max_new_tokens: the most tokens to draw.
        draft_tokens: how many are drafted at a time.
        sampling: how to draw.
        vocab_size: ids from here on are padding of the embeddings, and are never drawn.
        ends: tokens to stop at; they are not given out.
        compiled: whether to compile the reading of new tokens.
    """
    given: dict[str, Any] = {
        "vocab_size": vocab_size,
        "spare": draft_tokens + 1,
        "compiled": compiled,
        "room": max_new_tokens,
    }
    large, small = (Context(one, [prompt], device, **given) for one in (model, draft))
    draws, left = SeededSampler([sampling.seed]), max_new_tokens
    while left > 0:
        # Guesses must not be what makes the text outgrow the model.
        count = min(draft_tokens, left - 1, large.limit - len(large.rows[0]))
        guesses = [_draft(small, draws, sampling) for _ in range(count)]
        tokens = _check(large, guesses, draws, sampling)
        small.take_back(max(0, len(guesses) - len(tokens) + 1))
        small.add([tokens[-1].id])
        for token in tokens:
            if token.id in ends:
                return
            yield token
        left -= len(tokens)


def _draft(context: Context, draws: SeededSampler, sampling: Sampling) -> tuple[int, Tensor]:
    """A token, which is put behind the context, and the probabilities `(vocab,)` that it was drawn from."""
    probabilities = _next(context, context.logits()[:, -1], sampling)
    token = int(draws.tokens(probabilities))
    context.add([token])
    return token, probabilities[0]


def _check(
    context: Context, guesses: Sequence[tuple[int, Tensor]], draws: SeededSampler, sampling: Sampling
) -> list[Token]:
    """The guesses up to the first that is rejected, and one more token; all are put behind the context."""
    for guess, _ in guesses:
        context.add([guess])
    logits = context.logits(len(guesses) + 1)[0]
    for place, (guess, guessed) in enumerate([*guesses, (-1, torch.zeros_like(logits[0]))]):
        left = len(guesses) - place
        wanted = _next(context, logits[place : place + 1], sampling, without=left)[0]
        if left == 0 or float(draws.uniform()) * float(guessed[guess]) >= float(wanted[guess]):
            # What the larger model gives each token beyond what the smaller one gave it.
            beyond = (wanted - guessed).clamp(min=0)
            context.take_back(left)
            context.add([int(draws.tokens((beyond if beyond.any() else wanted)[None]))])
            break
    chosen = context.rows[0][len(context.rows[0]) - place - 1 :]
    logprobs = logits.log_softmax(dim=-1)
    tokens = [Token(token, float(logprobs[number, token])) for number, token in enumerate(chosen)]
    _check_numbers(token.logprob for token in tokens)
    return tokens
