"""A mixture of experts in the place of an MLP (Shazeer et al. 2017, "Outrageously large neural networks").

Each token goes through the few experts that a router chooses for it, as in Mixtral (Jiang et al. 2024, section 2.1),
and, where asked, through shared experts that see every token (Dai et al. 2024, "DeepSeekMoE", section 3.2).
No token is dropped. Where asked, a bias for each expert, by which alone experts are chosen, keeps their load even (Wang
et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", section 3); `training/balancing.py`
moves it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hidden_features(gate: Tensor | None, up: Tensor) -> Tensor:
    """What is within an MLP or an expert, in the shape of `up`: SwiGLU, or without a gate ReLU²."""
    return up.relu().square() if gate is None else F.silu(gate) * up


class MixtureOfExperts(nn.Module):
    """Experts whose matrices are stacked, a router that chooses among them, and perhaps a shared MLP.

    Args:
        dim: features of the residual stream.
        hidden_dim: features within an expert.
        n_experts: experts to choose from.
        experts_per_token: experts that a token goes through.
        normalize_router_weights: whether the shares of a token's chosen experts are made to add up to 1.
        shared: what every token goes through besides, with a share of 1; none: nothing.
        gated: whether the experts are SwiGLU; else ReLU².
        balanced: whether experts have biases by which they are chosen.
    """

    tokens_per_expert: Tensor | None = None
    """What each expert got in training is added here `(n_experts,)`, int64; none: nobody counts."""

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
        # In the state dict as all that is trained, but without a gradient.
        self.router_bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False) if balanced else None
        self.gate = nn.Parameter(torch.empty(n_experts, hidden_dim, dim)) if gated else None
        self.up = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.shared = shared

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts `(tokens, experts_per_token)`, int64, of tokens `(tokens, dim)`, and their shares, float32.

        The bias decides who is chosen, and no more (Wang et al. 2024, equation 3; there of scores by sigmoid).
        """
        probabilities = self.router(tokens).float().softmax(dim=-1)
        if self.router_bias is None:
            shares, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        else:
            chosen = (probabilities.detach() + self.router_bias).topk(self.experts_per_token, dim=-1).indices
            shares = probabilities.gather(-1, chosen)
        if self.normalize_router_weights:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return chosen, shares

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` to the same shape, each position for itself."""
        tokens = x.flatten(0, 1)
        chosen, shares = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.up))
        if self.tokens_per_expert is not None and self.training:
            self.tokens_per_expert += counts
        parts = torch.split(tokens[order // self.experts_per_token], counts.tolist())
        by_expert = torch.cat([self._expert(index, part) for index, part in enumerate(parts)])
        by_token = by_expert[order.argsort()].view(*shares.shape, -1)
        mixed = (by_token * shares[..., None].to(by_token.dtype)).sum(dim=1).view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x)

    def _expert(self, index: int, tokens: Tensor) -> Tensor:
        """An expert without tokens is computed too, so that its weights have a gradient, which is zero."""
        gate = None if self.gate is None else F.linear(tokens, self.gate[index])
        return F.linear(hidden_features(gate, F.linear(tokens, self.up[index])), self.down[index])
