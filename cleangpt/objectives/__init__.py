"""What is learned: an objective takes a model and a batch and gives the loss, summed over target tokens.

An objective is one file; registering it is one line here. It returns the *sum* over the batch's targets (a 0-dim
float32 tensor), so that the trainer can normalise by all target tokens of a step (design rule 3). One that takes a
`chunk` can be asked to have the logits of no more than so many tokens at a time.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from cleangpt.errors import UserError, nearest
from cleangpt.objectives.next_token import next_token, next_token_z

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token,
    "next_token_z": next_token_z,
}


def choose_objective(name: str, chunk: int | None = None) -> Objective:
    """The registered objective, with no more than the logits of `chunk` tokens at a time; none: with all.

    Raises:
        UserError: there is none of that name, or it cannot do without all logits.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective is {name!r}; allowed: {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}")
    if chunk is None:
        return OBJECTIVES[name]
    if "chunk" not in inspect.signature(OBJECTIVES[name]).parameters:
        raise UserError(f"training.loss_chunk is {chunk}; allowed with objective {name}: None, for it takes no chunk")
    return cast(Objective, partial(cast(Any, OBJECTIVES[name]), chunk=chunk))
