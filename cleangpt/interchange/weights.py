"""Weights as Hugging Face stores them, in one safetensors file or several."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cleangpt.checkpoints.checkpoint import WEIGHTS
from cleangpt.errors import UserError
from cleangpt.files import read_json

SHARDS = "model.safetensors.index.json"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or of several listed by an index.

    Raises:
        UserError: a file is missing or damaged.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / SHARDS).is_file():
        names = sorted(set(read_json(folder / SHARDS)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"there is no {name}; only safetensors are read, since other formats can execute code; "
                "save_pretrained writes them"
            )
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            raise UserError(f"{name} is not a safetensors file: {error}") from None
    return weights
