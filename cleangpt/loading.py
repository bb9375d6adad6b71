"""`cleangpt.load(run)`: a trained model in Python, for notebooks and scripts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cleangpt.data.tokenizers import Tokenizer
from cleangpt.distributed.device import choose_device
from cleangpt.inference.sampling import Sampling
from cleangpt.inference.text import stream
from cleangpt.interchange.huggingface import open_checkpoint
from cleangpt.models.base import LanguageModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device

    def generate(self, prompt: str | None = None, *, max_new_tokens: int = 200, **sampling: Any) -> str:
        """Generates text that continues a prompt (None: from the start of a document).

        Args:
            prompt: text to continue.
            max_new_tokens: maximum number of tokens to generate.
            sampling: fields of `inference.sampling.Sampling`; temperature is 0.8 unless given.

        Raises:
            UserError: a field is out of range, or the tokenizer does not know a character of the prompt.
        """
        pieces = stream(
            self.model, self.tokenizer, prompt, self.device, max_new_tokens=max_new_tokens,
            sampling=Sampling(**{"temperature": 0.8, **sampling}),
        )  # fmt: skip
        return "".join(piece.text for piece in pieces)


def load(run: str | Path, device: str = "auto") -> LoadedModel:
    """Loads the model of a run (its best checkpoint), of a checkpoint, or from Hugging Face (hf:NAME_OR_FOLDER).

    Raises:
        UserError: there is none, or its architecture is not registered.
    """
    checkpoint, place = open_checkpoint(str(run)), choose_device(device)
    return LoadedModel(checkpoint.model(place), checkpoint.tokenizer, place)
