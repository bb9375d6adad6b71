"""Checkpoints: model weights with config and tokenizer; a run keeps the best of them.

checkpoints/index.json                 the list of checkpoints, best first
checkpoints/val1.4697_mb000012/        validation loss and macro-batch; val_reward0.9810_mb000012 by another metric
    model.safetensors  config.json  tokenizer.json  manifest.json
    adapters.safetensors               for a run with LoRA; model.safetensors has them merged
    chat_template.json                 for a model trained on conversations
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cleangpt.checkpoints.tensor_files import PYTORCH, write_tensors
from cleangpt.config import LoRAConfig, ModelConfig, SavingConfig
from cleangpt.data.chat_template import CHAT_TEMPLATE, ChatTemplate, find_template
from cleangpt.data.dataset import TOKENIZER
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import full_tensor, gather_to_host, load_weights
from cleangpt.errors import UserError, parsing
from cleangpt.files import (
    PARTIAL,
    commit_folder,
    find_corruption,
    read_json,
    remove_folder,
    safe_name,
    write_json,
    write_text,
)
from cleangpt.models import build_model, model_kinds
from cleangpt.models.base import LanguageModel
from cleangpt.models.lora import is_adapter, merge, split_adapters
from cleangpt.models.meta import on_meta
from cleangpt.tracking.numbers import show_number
from cleangpt.validation import from_json, to_json

FORMAT = 1


WEIGHTS, ADAPTERS, CONFIG, INDEX = "model.safetensors", "adapters.safetensors", "config.json", "index.json"


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint in the index."""

    name: str
    macro_batch: int
    val_loss: float
    """The validation loss, or another metric that `saving.best` names."""
    permanent: bool = False
    """Kept regardless of its loss, by `saving.checkpoint_every`."""
    highest: bool = False
    """Whether higher values are better."""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "CheckpointEntry":
        """An entry as a file has it, where a loss that is not finite is null."""
        val_loss = entry["val_loss"]
        return cls(**{**entry, "val_loss": math.nan if val_loss is None else val_loss})


class Checkpoints:
    """The checkpoints of a run. The older one wins a tie, and a NaN is never among the best."""

    def __init__(
        self, folder: Path, config: SavingConfig, ranks: Ranks, model_config: ModelConfig, tokenizer: Tokenizer,
        lora: LoRAConfig | None = None, chat_template: ChatTemplate | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.log = folder, config, log
        self.ranks = ranks
        """The main process writes the files; every process keeps the list."""
        self.model_config, self.tokenizer, self.lora, self.chat_template = model_config, tokenizer, lora, chat_template
        self.entries: list[CheckpointEntry] = []

    def offer(self, macro_batch: int, val_loss: float, model: LanguageModel) -> bool:
        """Saves a checkpoint if its validation loss is among the best, or `saving.checkpoint_every` asks for it.

        In place of the loss, any metric that `saving.best` names. Then removes those that are no longer among the best.
        If it cannot be written, logs why and leaves earlier ones as they are. A collective; returns whether one was
        due.
        """
        permanent = self._permanent(macro_batch)
        direction, metric = self.config.best.split()
        kind = "val" if metric == "val_loss" else f"val_{metric.replace('/', '_')}"
        name = f"{kind}{show_number(val_loss, 4)}_mb{macro_batch:06d}"
        entry = CheckpointEntry(name, macro_batch, val_loss, permanent, direction == "highest")
        if not permanent and not self._among_best(entry):
            return False
        weights = gather_to_host(model.state_dict(), keep=self.ranks.is_main)
        best = sorted([*self.entries, entry], key=_sort_key)
        finite = [other for other in best if not math.isnan(other.val_loss)]
        entries = [other for other in best if other.permanent or other in finite[: self.config.keep_best]]
        reason: str = self.ranks.broadcast(self._write(entry, entries, weights) if self.ranks.is_main else "")
        if reason:
            self.log(f"the checkpoint of macro-batch {macro_batch} could not be saved: {reason}")
            return True
        self.entries = entries
        if self.ranks.is_main:
            self.prune()
        return True

    def _write(self, entry: CheckpointEntry, entries: list[CheckpointEntry], weights: Mapping[str, Tensor]) -> str:
        """Writes a checkpoint and the new index; returns why that failed, or an empty string."""
        try:
            save_checkpoint(
                self.folder / entry.name, weights, self.model_config, self.tokenizer, asdict(entry), self.lora,
                self.chat_template,
            )  # fmt: skip
            index = {"format": FORMAT, "checkpoints": [asdict(other) for other in entries]}
            write_json(self.folder / INDEX, index)
        except (OSError, SafetensorError) as error:
            return str(error)
        return ""

    def prune(self) -> None:
        """Removes every folder that is not in the index; if that fails, the next call tries again."""
        kept = {entry.name for entry in self.entries}
        for path in self.folder.glob("val*"):
            if path.name not in kept and path.is_dir():
                with contextlib.suppress(OSError):
                    remove_folder(path)

    def state_dict(self) -> dict[str, Any]:
        """The list of checkpoints, for snapshots."""
        return {"entries": [asdict(entry) for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the list, without entries whose folder is gone.

        A folder that is newer than the snapshot stays until the next `offer`, which replaces or prunes it.
        """
        entries = [CheckpointEntry.from_json(entry) for entry in state["entries"]]
        self.entries = [entry for entry in entries if (self.folder / entry.name / CONFIG).exists()]

    def _permanent(self, macro_batch: int) -> bool:
        return self.config.checkpoint_every is not None and macro_batch % self.config.checkpoint_every == 0

    def _among_best(self, entry: CheckpointEntry) -> bool:
        better = [other for other in self.entries if _sort_key(other)[:2] <= _sort_key(entry)[:2]]
        return not math.isnan(entry.val_loss) and len(better) < self.config.keep_best


def _sort_key(entry: CheckpointEntry) -> tuple[bool, float, int]:
    value = -entry.val_loss if entry.highest else entry.val_loss
    return (math.isnan(value), value, entry.macro_batch)


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    lora: LoRAConfig | None = None,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Writes a checkpoint to `folder`, atomically; `facts` go into its config.json.

    Adapters among the weights are merged, so that readers of the checkpoint need not know about them, and also saved
    separately.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    base, adapters = split_adapters(host)
    try:
        if lora is not None and lora.rank is not None:
            base = merge(base, adapters, lora.alpha / lora.rank)
            facts_of_lora = json.dumps({"rank": lora.rank, "alpha": lora.alpha})
            write_tensors(partial / ADAPTERS, adapters, ("lora", facts_of_lora))
        write_tensors(partial / WEIGHTS, base, PYTORCH)
        write_json(partial / CONFIG, {"format": FORMAT, "model": to_json(config, model_kinds()), "facts": facts})
        write_text(partial / TOKENIZER, tokenizer.to_json())
        if chat_template is not None:
            write_text(partial / CHAT_TEMPLATE, chat_template.to_json())
        commit_folder(partial, folder)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
        raise


@dataclass
class Checkpoint:
    """A loaded checkpoint."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    facts: dict[str, Any]
    chat_template: ChatTemplate | None = None
    """The template of its training conversations; None: it was trained on plain text."""

    def model(self, device: torch.device) -> LanguageModel:
        """The model in eval mode on `device`, with its weights.

        Raises:
            UserError: the weights do not fit the config; checked on the meta device, before any memory is allocated.
        """
        with parsing(self.folder / CONFIG, RuntimeError), on_meta():
            expected = build_model(self.config, self._heads()).state_dict()
        self._check_weights(expected)
        model = build_model(self.config, self._heads())
        model.load_state_dict(self.weights)
        return model.to(device).eval()

    def digest(self) -> str:
        """A checksum of configuration and weights."""
        digest = hashlib.sha256(str(self.config).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _heads(self) -> set[str]:
        return {name.split(".")[1] for name in self.weights if name.startswith("heads.")}

    def _check_weights(self, expected: Mapping[str, Tensor]) -> None:
        for name in sorted(expected.keys() | self.weights.keys()):
            saved, own = self.weights.get(name), expected.get(name)
            if saved is None or own is None or saved.shape != own.shape or not saved.is_floating_point():
                there, here = ("missing" if one is None else f"{one.dtype} {tuple(one.shape)}" for one in (saved, own))
                raise UserError(f"{self.folder}: {name} is {there} in the checkpoint, and {here} in the model")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads a checkpoint; nothing in it is executed.

    Raises:
        UserError: the folder is not a checkpoint, is corrupt, or has another format or an unknown architecture.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    if reason := find_corruption(folder, required=(WEIGHTS, CONFIG, TOKENIZER)):
        raise UserError(f"checkpoint {folder} is corrupt: {reason}")
    content = read_json(folder / CONFIG)
    with parsing(folder / CONFIG):
        if content.get("format") != FORMAT:
            raise UserError(f"{folder} has checkpoint format {content.get('format')}; this version reads {FORMAT}")
        try:
            config = from_json(ModelConfig, content["model"], model_kinds(), "model.")
        except UserError as error:
            raise UserError(f"{folder / CONFIG}, which another version of CleanGPT may have written: {error}") from None
        facts = dict(content["facts"])
        for name in ("vocab_size", "max_seq_len"):
            if getattr(config, name) is None:
                raise UserError(f"{folder / CONFIG}: model.{name} is None; allowed: a whole number of 1 or more")
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from None
    tokenizer = load_tokenizer(folder / TOKENIZER)
    return Checkpoint(folder, config, tokenizer, weights, facts, find_template(folder))


def best_checkpoint(run: Path) -> Path:
    """The folder of a run's best checkpoint: that with the lowest validation loss, or as `saving.best` says.

    Raises:
        UserError: the run has none.
    """
    index = run / "checkpoints" / INDEX
    content = read_json(index) if index.exists() else {"checkpoints": []}
    with parsing(index):
        entries = [CheckpointEntry.from_json(entry) for entry in content["checkpoints"]]
        if not entries:
            raise UserError(f"{run} has no checkpoint yet; one is saved whenever the validation loss improves")
        return run / "checkpoints" / safe_name(min(entries, key=_sort_key).name, index)


# Matrices with one row per position or per token, whose sizes may differ between two models.
POSITION_ROWS = ("position_embedding.weight",)
TOKEN_ROWS = ("token_embedding.weight", "head.weight")


def load_matching_weights(model: LanguageModel, weights: Mapping[str, Tensor], same_tokens: bool = False) -> list[str]:
    """Copies into `model` every weight whose name and shape match; returns a line about each that does not.

    Of position embeddings, and of token embeddings if both models have the `same_tokens`, common rows are copied.
    Adapters keep their initial values. A collective if the model is sharded.
    """
    rows = POSITION_ROWS + TOKEN_ROWS * same_tokens
    target = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    matching: dict[str, Tensor] = {}
    lines = []
    for name in sorted(target):
        own, saved = target[name], weights.get(name)
        if saved is not None and saved.shape == own.shape:
            matching[name] = saved
        elif saved is not None and saved.shape[1:] == own.shape[1:] and name in rows:
            rest = full_tensor(own)[len(saved) :].to(saved.device, saved.dtype)
            matching[name] = torch.cat([saved[: len(own)], rest])
            longer = len(own) > len(saved)
            others = "the model's other rows keep their initial values" if longer else "the others are dropped"
            lines.append(f"{name} takes {min(len(own), len(saved)):,} of {len(saved):,} rows; {others}")
        else:
            found = "is not in the checkpoint" if saved is None else f"has shape {tuple(saved.shape)} in the checkpoint"
            lines.append(f"{name} {found}; it keeps its initial values, shape {tuple(own.shape)}")
    load_weights(model, matching, strict=False)
    lines += [f"{name} is in the checkpoint but not in the model" for name in sorted(weights.keys() - target.keys())]
    return lines


def config_mismatches(saved: ModelConfig, own: ModelConfig) -> list[str]:
    """A line about each differing field that weight shapes may not reveal, such as the number of heads."""
    if type(saved) is not type(own):
        return [f"the checkpoint is of {type(saved).__name__}, the model of {type(own).__name__}"]
    names = [entry.name for entry in fields(own) if entry.name not in ("vocab_size", "max_seq_len", "dropout")]
    return [
        f"model.{name} is {getattr(own, name)!r}; in the checkpoint it is {getattr(saved, name)!r}"
        for name in names
        if getattr(own, name) != getattr(saved, name)
    ]
