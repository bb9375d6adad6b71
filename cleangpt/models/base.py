"""The contract of an architecture, with defaults for all that is optional.

A model is built from its configuration alone and knows nothing of devices, precision, parallelism or training. It gives
`features` of tokens and makes `to_logits` of them; what is read from these stands here, once for all architectures.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cleangpt.config import ModelConfig
from cleangpt.models.cache import KVCache
from cleangpt.models.head import TokenScores, token_scores


class LanguageModel(nn.Module):
    """Token ids to logits, or to scores of given targets; subclasses have `features` and `to_logits`."""

    tensor_plan: ClassVar[dict[str, str]] = {}
    """How each module is sharded by tensor parallelism, in the words of `distributed/sharding.py`; empty: it cannot."""
    deferred_init: ClassVar[bool] = False
    """Whether `init_parameter` draws every initial value, so that a sharded model never exists whole; a subclass has
    to say so itself."""
    loss_chunk: int | None = None
    """Tokens whose logits are held at a time where targets are given; None: all."""
    gather_logits: Callable[[Tensor], Tensor] | None = None
    """Puts logits together whose vocabulary is sharded."""
    can_cache: bool = True
    """Whether tokens may be read one at a time; not where the sequence is sharded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict()
        """Heads besides that of the vocabulary, each a number per position, such as a value."""

    def layers(self) -> nn.ModuleList:
        """The blocks that FSDP gathers, `torch.compile` compiles and activation checkpointing recomputes one by one."""
        return nn.ModuleList()

    def features(self, tokens: Tensor, *, cache: KVCache | None = None, **modalities: Tensor) -> Tensor:
        """Hidden states after the last layer and its norm: tokens `(batch, seq)` to `(batch, seq, dim)`."""
        raise NotImplementedError

    def to_logits(self, features: Tensor) -> Tensor:
        """Features `(..., dim)` to logits `(..., vocab)`."""
        raise NotImplementedError

    def head_parameters(self) -> list[Tensor]:
        """The parameters that `to_logits` uses, by which the loss in chunks takes its gradients."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        scores: Collection[str] = (),
        summed: bool = False,
        cache: KVCache | None = None,
        logit_positions: Tensor | None = None,
        **modalities: Tensor,
    ) -> Tensor | TokenScores:
        """Logits `(batch, seq, vocab)`, or with `targets` what the model thinks of them.

        Args:
            tokens: ids `(batch, seq)`; with a cache they follow those that it holds, and are added to it.
            targets: ids `(batch, seq)`, IGNORED where there is none.
            scores: what is wanted besides log-probabilities: `log_z`, `entropy`, `mean_logprob` or a name of `heads`.
            summed: sum over all targets, which lets a loss in chunks compute nothing twice.
            cache: keys and values of tokens before these.
            logit_positions: `(batch, count)`; logits `(batch, count, vocab)` are computed at these alone.
            modalities: other inputs of `features`.
        """
        features = self.features(tokens, cache=cache, **modalities)
        if logit_positions is not None:
            features = gather_positions(features, logit_positions)
        if targets is None:
            return self._logits(features)
        heads = {name: self.heads[name](features).squeeze(-1).float() for name in scores if name in self.heads}
        asked = [name for name in scores if name not in heads]
        chunk = self.loss_chunk
        found = token_scores(features, targets, self._logits, self.head_parameters(), asked, summed, chunk)
        return found._replace(heads=heads)

    def _logits(self, features: Tensor) -> Tensor:
        logits = self.to_logits(features)
        return logits if self.gather_logits is None else self.gather_logits(logits)

    def add_heads(self, names: Collection[str]) -> None:
        """Adds heads that give a number per position, which begin at zero."""
        width: int = self.config.dim  # type: ignore[attr-defined]
        del self.heads
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in sorted(names)})  # now the last of all parts
        for name, parameter in self.heads.named_parameters(prefix="heads"):
            self.init_parameter(name, parameter)

    def reset_parameters(self) -> None:
        """Draws initial weights, in the order of the parameters."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Draws the parameter `name`: normal with deviation 0.02, less into the residual stream (GPT-2, sec. 2.3).

        Biases and heads begin at zero, gains at one.
        """
        if parameter.dim() < 2 or name.startswith("heads."):
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
        else:
            into_residual = name.removesuffix(".weight").endswith((".out", ".down"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers())) if into_residual else 0.02)

    def new_cache(self, rollback_tokens: int = 0) -> KVCache | None:
        """An empty cache for generation, from which `rollback_tokens` can be taken back; None: there is none."""
        return None

    def stacked_matrices(self, name: str) -> int:
        """How many matrices the parameter `name` holds, one above the other; Muon takes each for itself."""
        return 1

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token; by default 6 per parameter."""
        return 6 * sum(parameter.numel() for parameter in self.parameters())

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass keeps for the backward pass, logits included; 0: not known."""
        return 0


def gather_positions(features: Tensor, positions: Tensor) -> Tensor:
    """Features `(batch, seq, dim)` at positions `(batch, count)` of the sequence: `(batch, count, dim)`."""
    return features.gather(1, positions[..., None].expand(*positions.shape, features.shape[-1]))


class SkipInit(TorchFunctionMode):
    """A context in which models have no initial values; what stands in their memory is left over from others."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of PyTorch, unless it is one of `torch.nn.init`."""
        if getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which models have shapes alone. To draw nothing, PyTorch would load its compiler first."""
    with torch.device("meta"), SkipInit():
        yield


def flops_per_token(model: LanguageModel, seq_len: int) -> int:
    """FLOPs to train a model on one token: by its own account, else 6 per parameter; less what frozen layers spare."""
    return model.flops_per_token(seq_len) - _spared_flops(model)


def _spared_flops(model: nn.Module) -> int:
    """FLOPs per token that frozen linear layers do not take: 2 per weight for its gradient, and 2 for that of the
    inputs where all that stands before in the model is frozen too. A frozen head that is the embedding counts whole."""
    spared, below = 0, True
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        below = below and not any(parameter.requires_grad for parameter in own)
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            spared += (4 if below else 2) * module.weight.numel()
    return spared
