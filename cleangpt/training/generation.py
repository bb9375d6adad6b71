"""Opens vLLM for a policy that is trained: exports it once, and hands its weights over for every round."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from cleangpt.checkpoints.checkpoint import Checkpoint
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError
from cleangpt.interchange.huggingface import mapping_of, write_huggingface
from cleangpt.models.base import LanguageModel
from cleangpt.models.lora import split_adapters
from cleangpt.rollouts.episodes import Sampler
from cleangpt.rollouts.vllm import VLLMSampler, load_vllm


def vllm_opener(
    model: LanguageModel, dataset: TokenDataset, processes: int, seed: int
) -> Callable[[], AbstractContextManager[Sampler]]:
    """What opens a sampler of the current weights; vLLM itself is loaded at the first call.

    Raises:
        UserError: there are several processes, adapters, which vLLM would have to merge, or a padded vocabulary.
    """
    if processes > 1 or split_adapters(model.state_dict())[1]:
        raise UserError("rollouts.sampler is 'vllm'; allowed with several processes, or adapters: engine")
    if model.config.vocab_size != dataset.vocab_size:
        raise UserError(
            f"model.vocab_size is {model.config.vocab_size}; allowed with rollouts.sampler vllm, which would sample "
            f"tokens that pad it: {dataset.vocab_size}, the tokenizer's"
        )
    loaded: list[tuple[Any, Any]] = []

    def exported() -> dict[str, Tensor]:
        own = {name: weight.detach() for name, weight in model.state_dict().items() if not name.startswith("heads.")}
        weights: dict[str, Tensor] = mapping_of(model.config).to_huggingface(model.config, own)
        return weights

    @contextlib.contextmanager
    def opener() -> Iterator[Sampler]:
        if not loaded:
            with tempfile.TemporaryDirectory() as folder:
                own = {name: weight.cpu() for name, weight in model.state_dict().items()}
                start = {name: weight for name, weight in own.items() if not name.startswith("heads.")}
                checkpoint = Checkpoint(Path(folder), model.config, dataset.tokenizer, start, {})
                write_huggingface(checkpoint, Path(folder))
                loaded.append(load_vllm(folder, model.max_seq_len, seed))
        llm, sampling_params = loaded[0]
        yield VLLMSampler(llm, exported().items(), sampling_params)

    return opener
