"""Text from a model: prompts in, text out."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cleangpt.data.store import TokenStore
from cleangpt.data.tokenizers import StreamDecoder, Tokenizer
from cleangpt.errors import UserError
from cleangpt.inference.generate import sample

PROMPT_TOKENS = 16


def sample_text(
    model: nn.Module, store: TokenStore, prompt: str | None, count: int, device: torch.device, seed: int
) -> str:
    """A prompt and up to `count` tokens that the model adds to it at temperature 0.8, to show how far it has come."""
    tokens = torch.from_numpy(store.tokenizer.encode(prompt)) if prompt else validation_prompt(store)
    was_training = model.training
    model.eval()
    drawn = sample(
        model, tokens.to(device), max_new_tokens=count, temperature=0.8, vocab_size=store.vocab_size,
        end_of_text=store.tokenizer.end_of_text, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    text = store.tokenizer.decode([*tokens.tolist(), *drawn])
    model.train(was_training)
    return text


def validation_prompt(store: TokenStore) -> Tensor:
    """Where the validation split begins: the question of the first row, or the first 16 tokens."""
    split = store.splits["val"]
    length = min(PROMPT_TOKENS, split.tokens)
    if split.masked and split.row_length is not None:
        length = int(split.read_mask(0, split.row_length).argmax())
    return torch.from_numpy(split.read(0, length).astype("int64"))


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | None,
    device: torch.device,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """The prompt and then the text that the model adds, as it comes; no character is given out in halves.

    Raises:
        UserError: the prompt has a character that the tokenizer does not know.
    """
    if prompt:
        ids = tokenizer.encode(prompt).tolist()
        yield prompt
    else:
        ids = [_document_start(tokenizer)]
    drawn = sample(
        model, torch.tensor(ids, device=device), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, vocab_size=tokenizer.vocab_size, end_of_text=tokenizer.end_of_text,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    decoder = StreamDecoder(tokenizer)
    for token in drawn:
        yield decoder.push(token)
    yield decoder.flush()


def _document_start(tokenizer: Tokenizer) -> int:
    """The token before a document: end of text, else a line's end, else the first token."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    try:
        return int(tokenizer.encode("\n")[0])
    except UserError:
        return 0
