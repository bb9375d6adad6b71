"""Prompts with images: the tokens that images stand at, and the images as the model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cleangpt.data.images import IMAGES, image_token
from cleangpt.data.pictures import read_picture
from cleangpt.data.records import ENDS
from cleangpt.data.tokenizers import Tokenizer
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.vision import vision_of


@dataclass(frozen=True)
class ImagePrompt:
    """Images at the start of a prompt."""

    tokens: list[int]
    """The tokens that they stand at."""
    inputs: dict[str, Tensor]
    """Images and their ends, as in `Engine.submit`."""

    def before(self, text: list[int], prefix: Sequence[int]) -> tuple[list[int], dict[str, Tensor]]:
        """Tokens and inputs of the images and a text, whose `prefix` stays first."""
        start = len(prefix)
        ends = f"{IMAGES}{ENDS}"
        return [*text[:start], *self.tokens, *text[start:]], self.inputs | {ends: self.inputs[ends] + start}


def read_images(model: LanguageModel, tokenizer: Tokenizer, files: Sequence[Path | str]) -> ImagePrompt:
    """Picture files as the start of a prompt.

    Raises:
        UserError: the model reads no images, or a file cannot be decoded.
    """
    vision = vision_of(model.config)
    if vision.encoder is None:
        raise UserError(f"{files[0]} is given, but the model reads no images; allowed: one with model.vision.encoder")
    images = np.stack([read_picture(file, vision.form) for file in files])
    ends = torch.arange(1, len(files) + 1) * vision.tokens
    tokens = [image_token(tokenizer)] * (len(files) * vision.tokens)
    return ImagePrompt(tokens, {IMAGES: torch.from_numpy(images), f"{IMAGES}{ENDS}": ends})
