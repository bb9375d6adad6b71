"""Load balancing for mixtures of experts without an auxiliary loss, applied from outside the model.

Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", section 3 and algorithm 1: after
each step, the router bias of every expert that received fewer tokens than the mean rises by a fixed rate, and that of
every expert that received more falls. The biases are weights of the model, so snapshots and checkpoints have them.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from cleangpt.distributed.tensors import distribute_like
from cleangpt.models.moe import MixtureOfExperts


class ExpertLoadBalancer:
    """Counts the tokens of every expert with a router bias, and updates the biases; does nothing without any.

    Args:
        model: on its device, already sharded.
        reduce: sums a tensor over the processes.
        frozen: names of parameters that do not change.
    """

    def __init__(
        self, model: nn.Module, reduce: Callable[[Tensor], Tensor], frozen: Collection[str] = frozenset()
    ) -> None:
        self.rate: float = getattr(getattr(model, "config", None), "bias_update_rate", None) or 0.0
        self._mixtures = [
            module
            for name, module in model.named_modules()
            if isinstance(module, MixtureOfExperts)
            and module.router_bias is not None
            and f"{name}.router_bias" not in frozen
        ]
        self._reduce = reduce
        if self._mixtures:
            sizes = (len(self._mixtures), len(self._mixtures[0].up))
            self._counts = torch.zeros(sizes, dtype=torch.int64, device=self._mixtures[0].up.device)
            for mixture, counts in zip(self._mixtures, self._counts, strict=True):
                mixture.tokens_per_expert = counts

    @torch.no_grad()
    def step(self) -> None:
        """Updates the biases by the tokens of this step, over all micro-batches and processes.

        Activation checkpointing counts every token of a layer twice, which changes no sign.
        """
        if not self._mixtures:
            return
        counts = self._reduce(self._counts)
        above = counts * counts.shape[1] - counts.sum(dim=1, keepdim=True)
        for mixture, excess in zip(self._mixtures, above, strict=True):
            assert mixture.router_bias is not None
            mixture.router_bias.sub_(distribute_like(self.rate * excess.sign(), mixture.router_bias))
        self._counts.zero_()
