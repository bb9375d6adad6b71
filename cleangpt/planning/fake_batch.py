"""A batch of the kind that a model and its objective read, whose values say nothing, for counting the work on it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cleangpt.data.batch import Batch
from cleangpt.data.images import IMAGES
from cleangpt.data.records import ENDS
from cleangpt.data.timesteps import VECTORS
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.models.vectors import vector_size
from cleangpt.models.vision import vision_of
from cleangpt.objectives import Objective
from cleangpt.objectives.pairs import REFERENCE
from cleangpt.objectives.policy import PolicyObjective


def fake_batch(model: LanguageModel, objective: Objective, tokens: Tensor) -> Batch:
    """A batch of `tokens` `(batch, seq)` in which every token is a target.

    Rows are full of the images that the model reads, and as full of vectors, one at each token.

    Raises:
        UserError: the model reads something else.
    """
    per_row = {name: tokens.new_ones(len(tokens), dtype=torch.float32) for name in (*objective.step_means, "fresh")}
    penalised = isinstance(objective, PolicyObjective) and objective.kl_coef > 0
    names = objective.reads | ({REFERENCE} if penalised else set())
    extras = {name: torch.ones_like(tokens, dtype=torch.float32) for name in names}
    inputs = {"tokens": tokens, **{name: torch.zeros_like(tokens) for name in model.inputs & {"places"}}}
    for name, example, room in _records(model, tokens):
        inputs[name] = example.expand(len(tokens), room, *example.shape)
        inputs[name + ENDS] = tokens.new_zeros(len(tokens), room)
    if unknown := sorted(model.inputs - inputs.keys()):
        raise UserError(f"{type(model).__name__} cannot be planned: it reads {', '.join(unknown)}")
    return Batch(inputs, tokens, extras | per_row, max(len(objective.group), 1))


def _records(model: LanguageModel, tokens: Tensor) -> Iterator[tuple[str, Tensor, int]]:
    """What a model reads besides tokens: the name, one of them, and how many there is room for in a row."""
    vision, size = vision_of(model.config), vector_size(model.config)
    if vision.encoder is not None:
        shape = (vision.height, vision.width, vision.channels)
        yield IMAGES, tokens.new_zeros(shape, dtype=torch.uint8), max(1, tokens.shape[1] // vision.tokens)
    if size:
        yield VECTORS, tokens.new_zeros(size, dtype=torch.float32), tokens.shape[1]


def chosen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives whose shape depends on values, where a mask chooses everything; None: it is another."""
    if func is torch.Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
        return args[0].flatten(0, args[1].dim() - 1).clone()
    if func is torch.Tensor.nonzero:
        places = args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        return places.unbind(1) if kwargs.get("as_tuple") else places
    return None
