"""Token by token: greedy generation of many rows, and sampling of one."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


def max_seq_len(model: nn.Module) -> int:
    """The longest sequence a model can read."""
    return cast(Any, model).config.max_seq_len  # type: ignore[no-any-return]


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, count: int) -> Tensor:
    """The likeliest next tokens, `count` of them `(batch, count)`, after `prompts` `(batch, seq)`."""
    tokens, window = prompts, max_seq_len(model)
    for _ in range(count):
        logits = model(tokens[:, -window:])[:, -1]
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :]


def sample(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Draws tokens after `prompt` `(seq,)`, one at a time, until `end_of_text` (not given out) or `max_new_tokens`.

    Args:
        model: in evaluation mode.
        prompt: at least one token id, int64, on the model's device.
        max_new_tokens: the most tokens to draw.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw only among so many likeliest tokens.
        top_p: draw only among the likeliest tokens that together reach this probability (Holtzman et al. 2020).
        vocab_size: ids from here on are padding of the embedding and are never drawn.
        end_of_text: the token to stop at.
        generator: of the draws, on the host; the global generators are left alone.
    """
    tokens, window = prompt[None], max_seq_len(model)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(tokens[:, -window:])[0, -1].float().cpu()[:vocab_size]
        token = draw(logits, temperature, top_k, top_p, generator)
        if token == end_of_text:
            return
        yield token
        tokens = torch.cat([tokens, torch.tensor([[token]], device=tokens.device)], dim=1)


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> int:
    """One token id from logits `(vocab,)`, float32 on the host."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, ids = probabilities.sort(descending=True)
        # A token stays while those before it have not reached top_p, so the likeliest always stays.
        probabilities[ids[ordered.cumsum(0) - ordered >= top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
