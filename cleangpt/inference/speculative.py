"""Speculative decoding: a draft model proposes tokens, and the larger model verifies several in one pass."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from cleangpt.inference.decoding import DecodingState, check_prompt
from cleangpt.inference.engine import Token
from cleangpt.inference.sampling import GREEDY, Sampling, check_finite, distribution, row_seed, sample, uniform
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
    stop_ids: Collection[int] = (),
    compiled: bool = False,
) -> Iterator[Token]:
    """Continues one prompt with the help of a draft model.

    Tokens have the same distribution as from the larger model alone; with temperature 0 they are identical (Leviathan
    et al. 2023, "Fast inference from transformers via speculative decoding", algorithm 1).

    Args:
        model: the larger model, in evaluation mode, on `device`.
        draft: a smaller model with the same tokenizer, likewise.
        prompt: token ids, at least one.
        device: of both models.
        max_new_tokens: maximum number of tokens to generate.
        draft_tokens: number of tokens that the draft model proposes at a time.
        sampling: how to sample.
        vocab_size: of the tokenizer; higher token ids pad the embeddings and are never sampled.
        stop_ids: tokens to stop at; they are not yielded.
        compiled: whether to compile the decoding of new tokens.

    Raises:
        UserError: the prompt is empty, or has a token beyond the vocabulary; or the logits are not finite.
    """
    check_prompt(model, prompt)
    check_prompt(draft, prompt)
    large, small = (
        DecodingState(
            one, [prompt], device, rollback_tokens=draft_tokens + 1, max_new_tokens=max_new_tokens,
            compiled=cast(LanguageModel, torch.compile(one)) if compiled else None,
        )
        for one in (model, draft)
    )  # fmt: skip
    draws, remaining = _draws(sampling.seed), max_new_tokens
    while remaining > 0:
        # Accepted tokens may exceed the context length, but not proposed ones, which may be rolled back.
        count = min(draft_tokens, remaining - 1, model.max_seq_len - large.tokens.longest)
        proposals = [_propose(small, draws, sampling, vocab_size) for _ in range(count)]
        tokens = _verify(large, proposals, draws, sampling, vocab_size)
        small.rollback(max(0, len(proposals) - len(tokens) + 1))
        small.append([tokens[-1].id])
        for token in tokens:
            if token.id in stop_ids:
                return
            yield token
        remaining -= len(tokens)


def _draws(seed: int) -> Iterator[Tensor]:
    """The random numbers of a text `(1,)`, one after the other."""
    return (uniform([row_seed(seed)], [index]) for index in itertools.count())


def _propose(
    state: DecodingState, draws: Iterator[Tensor], sampling: Sampling, vocab_size: int | None
) -> tuple[int, Tensor]:
    """Samples and appends a token; returns it and the probabilities `(vocab,)` that it was sampled from."""
    probabilities = _distribution(state, state.logits()[0, :, :vocab_size], sampling)
    token = int(sample(probabilities, next(draws)))
    state.append([token])
    return token, probabilities[0]


def _verify(
    state: DecodingState,
    proposals: Sequence[tuple[int, Tensor]],
    draws: Iterator[Tensor],
    sampling: Sampling,
    vocab_size: int | None,
) -> list[Token]:
    """Appends the proposals before the first rejected one, and one more token; returns them."""
    for proposal, _ in proposals:
        state.append([proposal])
    logits = state.logits(len(proposals) + 1)[0, :, :vocab_size]
    logprobs = logits.log_softmax(dim=-1)
    for place, (proposal, draft) in enumerate([*proposals, (-1, torch.zeros_like(logits[0]))]):
        left = len(proposals) - place
        target = _distribution(state, logits[place : place + 1], sampling, skip_last=left)[0]
        if left == 0 or float(next(draws)) * float(draft[proposal]) >= float(target[proposal]):
            # Rejected: sample from the positive part of target minus draft probabilities.
            residual = (target - draft).clamp(min=0)
            state.rollback(left)
            state.append([int(sample((residual if residual.any() else target)[None], next(draws)))])
            break
    accepted = state.tokens.row(0, place + 1)
    chosen = logprobs[range(len(accepted)), accepted]
    check_finite(chosen.cpu().numpy())
    return list(map(Token, accepted, chosen.tolist()))


def _distribution(state: DecodingState, logits: Tensor, sampling: Sampling, skip_last: int = 0) -> Tensor:
    """The probabilities `(1, vocab)` of the token that follows all but the last `skip_last`, from its logits."""
    penalised = sampling.repetition_penalty != 1
    return distribution(logits, sampling, state.seen_tokens(logits.shape[-1], skip_last) if penalised else None)
