"""What is learned: an objective takes a model and a batch and gives the loss, summed over target tokens.

An objective is one file; registering it is one line here. It returns the *sum* over the batch's targets (a 0-dim
float32 tensor), so that the trainer can normalise by all target tokens of a step (design rule 3).
"""

from collections.abc import Callable

from torch import Tensor, nn

from cleangpt.objectives.next_token import next_token, next_token_z

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "next_token": next_token,
    "next_token_z": next_token_z,
}
