"""Which parameters belong to which block, whatever an architecture calls its blocks."""

from torch import nn

from cleangpt.models.base import LanguageModel


def block_numbers(model: LanguageModel) -> dict[str, int]:
    """The names of all parameters within `layers()`, and the number of the block that each belongs to, from 0."""
    owners = {id(parameter): number for number, block in enumerate(model.layers()) for parameter in block.parameters()}
    return {name: owners[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in owners}


def hidden_matrices(model: LanguageModel) -> set[str]:
    """The names of matrices, and of stacks of them, within the model's blocks, as Muon is designed for.

    Kernels of convolutions and lookup tables are no matrices in this sense.
    """
    others = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding)]
    excluded = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return {
        name
        for name in block_numbers(model)
        if (parameter := model.get_parameter(name)).dim() >= 2 and id(parameter) not in excluded
    }
