"""The contract of an architecture, with defaults for everything optional.

A model is built from its configuration alone and knows nothing about devices, precision, parallelism or training. A
subclass computes `features`, the hidden states of tokens, and `to_logits` of them; what others read from these is
computed here, once for all architectures.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from cleangpt.config import ModelConfig
from cleangpt.models.cache import KVCache
from cleangpt.models.head import TokenScores, gather_positions, head_outputs, token_scores
from cleangpt.models.prompts import scores_after_prompts


class LanguageModel(nn.Module):
    """Maps token ids to logits, or to scores of given targets. Subclasses define `features` and `to_logits`."""

    inputs: ClassVar[frozenset[str]] = frozenset()
    """Keywords of `features` besides tokens and cache, which a batch has to bring in `Batch.inputs`."""
    tensor_plan: ClassVar[dict[str, str]] = {}
    """How tensor parallelism shards each module, in the words of `distributed/sharding.py`; empty: it cannot."""
    deferred_init: ClassVar[bool] = False
    """Whether `init_parameter` sets every value, so that shards are initialized alone; a subclass declares it again."""
    loss_chunk: int | None = None
    """Tokens whose logits are in memory at a time when targets are given; None: all of them."""
    compiles_scores: bool = False
    """Whether to compile what comes after the logits when targets are given, where the blocks are compiled."""
    temperature: float = 1.0
    """Divides the logits that scores of targets are computed from, as in sampling at this temperature."""
    scored_vocab: int | None = None
    """Token ids that scores are over, those of the tokenizer; None: all, with those that pad the embedding."""
    shares_prompts: bool = False
    """Whether scores of targets read a prompt once for all rows that begin with it; see `prompts.py`."""
    gather_logits: Callable[[Tensor], Tensor] | None = None
    """Gathers logits that are sharded over the vocabulary; set by tensor parallelism."""
    can_cache: bool = True
    """Whether tokens can be read one at a time; not under sequence parallelism."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict()
        """Scalar heads by name, such as a value head; the language-model head is not among them."""

    # What a subclass defines ------------------------------------------------------------------------------------------

    def features(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states `(batch, seq, dim)` after the last layer and its norm.

        Args:
            tokens: ids `(batch, seq)`, int64.
            args: none; here so that a subclass may choose its keywords.
            kwargs: `cache`, where `new_cache` returns one, and the tensors named in `inputs`.
        """
        raise NotImplementedError

    def to_logits(self, features: Tensor) -> Tensor:
        """The language-model head: features `(..., dim)` to logits `(..., vocab)`."""
        raise NotImplementedError

    def head_parameters(self) -> list[Tensor]:
        """The parameters that `to_logits` uses; the chunked loss computes their gradients."""
        raise NotImplementedError

    # What is optional -------------------------------------------------------------------------------------------------

    @property
    def max_seq_len(self) -> int:
        """The longest sequence the model reads, in tokens."""
        assert self.config.max_seq_len is not None
        return self.config.max_seq_len

    def layers(self) -> nn.ModuleList:
        """The blocks, which FSDP gathers, `torch.compile` compiles and activation checkpointing recomputes one by one;
        by default none."""
        return nn.ModuleList()

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Initializes the parameter `name`: normal with standard deviation 0.02, scaled down by sqrt(2 * layers) for
        projections into the residual stream (GPT-2, section 2.3). Biases and scalar heads are 0, norm gains 1."""
        if parameter.dim() < 2 or name.startswith("heads."):
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)
        else:
            into_residual = name.removesuffix(".weight").endswith((".out", ".down"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.layers())) if into_residual else 0.02)

    def new_cache(self, rollback_tokens: int = 0) -> KVCache | None:
        """An empty cache for generation that can forget its last `rollback_tokens` tokens; None: the model has none."""
        return None

    def feature_size(self) -> int:
        """Size of the last dimension of `features`; by default the configuration's field `dim`."""
        size: int = vars(self.config)["dim"]
        return size

    def attention_heads(self) -> dict[str, int]:
        """Numbers of attention heads by configuration field; tensor parallelism keeps each head on one device."""
        return {}

    def stacked_matrices(self, name: str) -> int:
        """How many matrices are stacked in the parameter `name`; Muon orthogonalizes each of them by itself."""
        return 1

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs to train on one token; by default 6 per parameter."""
        return 6 * sum(parameter.numel() for parameter in self.parameters())

    def activation_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes that one fp32 forward pass saves for the backward pass, logits included; 0: unknown."""
        return 0

    # What every model does --------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, *, targets: Tensor | None = None, scores: Collection[str] = (), summed: bool = False,
        cache: KVCache | None = None, logit_positions: Tensor | None = None, **modalities: Tensor,
    ) -> Tensor | TokenScores:  # fmt: skip
        """Logits `(batch, seq, vocab)`, or the scores of `targets` where these are given.

        Args:
            tokens: ids `(batch, seq)`, int64; with a cache, they follow the tokens in it and are added to it.
            targets: ids `(batch, seq)`, int64, IGNORED where there is none.
            scores: what to compute besides log-probabilities: names of `heads`, which can do without targets, and of
                `TokenScores`' optional fields.
            summed: return sums over all targets, which the chunked loss computes without recomputing any logits.
            cache: keys and values of earlier tokens.
            logit_positions: `(batch, count)` or, of the flattened batch, `(count,)`, int64; logits of these only.
            modalities: the model's other inputs, passed on to `features`.

        Raises:
            ValueError: a name in `scores` is unknown.
        """
        inputs: dict[str, Any] = modalities if cache is None else {**modalities, "cache": cache}
        if not inputs and (shared := scores_after_prompts(self, tokens, targets, scores, summed)) is not None:
            return shared
        features = self.features(tokens, **inputs)
        if logit_positions is not None and self.gather_logits is not None:
            # Under tensor parallelism features are sharded along the sequence; only logits are gathered.
            return gather_positions(self._logits(features), logit_positions)
        if logit_positions is not None:
            features = gather_positions(features, logit_positions)
        if targets is not None:
            return self.score(features, targets, scores, summed)
        heads = head_outputs(self.heads, features, scores)
        return TokenScores(features.new_zeros(0), heads=heads) if heads else self._logits(features)

    def score(self, features: Tensor, targets: Tensor, names: Collection[str], summed: bool = False) -> TokenScores:
        """The scores of targets `(...)`, as `forward` returns them, from features `(..., dim)`."""
        heads, parameters = head_outputs(self.heads, features, names), self.head_parameters()
        found = token_scores(
            features, targets, self._scored_logits, parameters, [name for name in names if name not in heads], summed,
            chunk=self.loss_chunk, compiled=self.compiles_scores, skip_ignored=self.gather_logits is None,
        )  # fmt: skip
        return TokenScores(*found[:-1], heads)  # not by _replace, which PyTorch 2.11 cannot compile

    def _logits(self, features: Tensor) -> Tensor:
        logits = self.to_logits(features)
        return logits if self.gather_logits is None else self.gather_logits(logits)

    def _scored_logits(self, features: Tensor) -> Tensor:
        logits = self._logits(features)[..., : self.scored_vocab]
        return logits if self.temperature == 1 else logits.float() / self.temperature

    def add_heads(self, names: Collection[str]) -> None:
        """Adds scalar heads, which output 0 until trained; without bias, as in Transformers' sequence classification.

        They come last among the parameters, so that the others are initialized to the same values as without them.
        """
        del self.heads
        self.heads = nn.ModuleDict({name: nn.Linear(self.feature_size(), 1, bias=False) for name in sorted(names)})
        for name, parameter in self.heads.named_parameters(prefix="heads"):
            self.init_parameter(name, parameter)

    def reset_parameters(self) -> None:
        """Initializes all parameters, in their order."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)
