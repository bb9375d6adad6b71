"""A mixture of experts that replaces an MLP (Shazeer et al. 2017, "Outrageously large neural networks").

A router sends each token to its top-k experts, as in Mixtral (Jiang et al. 2024, section 2.1). Optionally, shared
experts see every token (Dai et al. 2024, "DeepSeekMoE", section 3.2), and a bias per expert, which affects only the
choice of experts, balances their load (Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for
mixture-of-experts", section 3); `training/balancing.py` updates it. No token is dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cleangpt.models.layers import mlp_activation


class MixtureOfExperts(nn.Module):
    """Experts with stacked matrices, a router, and optionally a shared MLP.

    Args:
        dim: width of the residual stream.
        hidden_dim: hidden width of an expert.
        n_experts: number of experts.
        experts_per_token: experts that each token is routed to.
        normalize_router_weights: normalize the router weights of a token's experts to a sum of 1.
        shared: an MLP that every token goes through as well, with weight 1; None: none.
        gated: SwiGLU experts; else ReLU².
        balanced: give each expert a router bias.
    """

    tokens_per_expert: Tensor | None = None
    """Tokens routed to each expert since the last step `(n_experts,)`, int64; None: not counted."""

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        n_experts: int,
        experts_per_token: int,
        normalize_router_weights: bool,
        shared: nn.Module | None,
        gated: bool = True,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.experts_per_token, self.normalize_router_weights = experts_per_token, normalize_router_weights
        self.router = nn.Linear(dim, n_experts, bias=False)
        # A parameter, so that it is saved with the weights, but the load balancer updates it and not a gradient.
        self.router_bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False) if balanced else None
        self.gate = nn.Parameter(torch.empty(n_experts, hidden_dim, dim)) if gated else None
        self.up = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.shared = shared

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids, int64, and their weights, float32, `(tokens, experts_per_token)` both, of tokens `(tokens, dim)`.

        The bias affects the choice of experts, not their weights (Wang et al. 2024, equation 3, with sigmoid there).
        """
        probabilities = self.router(tokens).float().softmax(dim=-1)
        if self.router_bias is None:
            router_weights, expert_ids = probabilities.topk(self.experts_per_token, dim=-1)
        else:
            expert_ids = (probabilities.detach() + self.router_bias).topk(self.experts_per_token, dim=-1).indices
            router_weights = probabilities.gather(-1, expert_ids)
        if self.normalize_router_weights:
            router_weights = router_weights / router_weights.sum(dim=-1, keepdim=True)
        return expert_ids, router_weights

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, position by position."""
        tokens = x.flatten(0, 1)
        expert_ids, router_weights = self.route(tokens)
        chosen, n_experts = expert_ids.flatten(), len(self.up)
        order = chosen.argsort(stable=True)
        # On CUDA, `bincount` would wait for the device.
        counts = count_sorted(chosen[order], n_experts) if x.is_cuda else chosen.bincount(minlength=n_experts)
        if self.tokens_per_expert is not None and self.training:
            self.tokens_per_expert += counts
        sorted_tokens = tokens[order // self.experts_per_token]
        by_expert = self.grouped(sorted_tokens, counts) if self.can_group(x) else self.one_by_one(sorted_tokens, counts)
        by_token = by_expert[order.argsort()].view(*router_weights.shape, -1)
        mixed = (by_token * router_weights[..., None].to(by_token.dtype)).sum(dim=1).view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x)

    def can_group(self, x: Tensor) -> bool:
        """Whether all experts can be computed in one grouped product: in bf16 on CUDA, by PyTorch 2.10 or newer."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        fits = self.up.shape[1] % 8 == self.up.shape[2] % 8 == 0  # rows are to be multiples of 16 bytes
        return x.is_cuda and dtype == torch.bfloat16 and fits and hasattr(F, "grouped_mm")

    def grouped(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """All experts at once, in bf16: `tokens` `(tokens, dim)`, sorted by expert, of which each has `counts`."""
        ends = counts.cumsum(0, dtype=torch.int32)

        def product(inputs: Tensor, weights: Tensor) -> Tensor:
            return F.grouped_mm(inputs, weights.bfloat16().transpose(1, 2), offs=ends)

        inputs = tokens.bfloat16()
        gate = None if self.gate is None else product(inputs, self.gate)
        return product(mlp_activation(gate, product(inputs, self.up)), self.down)

    def one_by_one(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """The same by one product after another, in any dtype; on a GPU, the host waits for the counts."""
        parts = torch.split(tokens, counts.tolist())
        return torch.cat([self._expert(index, part) for index, part in enumerate(parts)])

    def _expert(self, index: int, tokens: Tensor) -> Tensor:
        """One expert; without tokens it is computed too, so that its weights get a gradient, which is zero."""
        gate = None if self.gate is None else F.linear(tokens, self.gate[index])
        return F.linear(mlp_activation(gate, F.linear(tokens, self.up[index])), self.down[index])


def count_sorted(expert_ids: Tensor, n_experts: int) -> Tensor:
    """How many of the sorted `expert_ids` `(tokens,)` are each of the experts `(n_experts,)`, int64."""
    ends = torch.searchsorted(expert_ids, torch.arange(n_experts, device=expert_ids.device), right=True)
    return ends.diff(prepend=ends.new_zeros(1))
