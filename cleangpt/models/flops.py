"""FLOPs of training, less those saved by frozen layers."""

from torch import nn

from cleangpt.models.base import LanguageModel


def flops_per_token(model: LanguageModel, seq_len: int) -> int:
    """FLOPs to train a model on one token, less what its frozen layers save."""
    return model.flops_per_token(seq_len) - _saved_flops(model)


def _saved_flops(model: nn.Module) -> int:
    """FLOPs per token that frozen linear layers save: 2 per weight for the gradient of the weight, and 2 for that of
    the input if everything before it is frozen too. A frozen head tied to the embedding saves nothing."""
    saved, all_frozen = 0, True
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        all_frozen = all_frozen and not any(parameter.requires_grad for parameter in own)
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            saved += (4 if all_frozen else 2) * module.weight.numel()
    return saved
