"""Checkpoints: model weights with their configuration and tokenizer, the best of them kept.

checkpoints/index.json                 those kept, best first
checkpoints/val1.4697_mb000012/        validation loss and macro-batch
    model.safetensors  config.json  tokenizer.json  manifest.json
    adapters.safetensors               of a run with adapters, which model.safetensors has already
    chat_template.json                 of conversations
"""

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cleangpt.config import LoRAConfig, ModelConfig, SavingConfig
from cleangpt.data.chat_template import CHAT_TEMPLATE, ChatTemplate, find_template
from cleangpt.data.dataset import TOKENIZER
from cleangpt.data.tokenizers import Tokenizer, load_tokenizer
from cleangpt.distributed.processes import Ranks
from cleangpt.distributed.tensors import full_tensor, load_weights
from cleangpt.errors import UserError, parsing
from cleangpt.files import PARTIAL, commit_folder, find_corruption, read_json, remove, safe_name, write_json, write_text
from cleangpt.models import build_model, model_kinds
from cleangpt.models.base import LanguageModel, on_meta
from cleangpt.models.lora import is_adapter, merge, split_adapters
from cleangpt.validation import from_json, to_json

FORMAT = 1


WEIGHTS, ADAPTERS, CONFIG, INDEX = "model.safetensors", "adapters.safetensors", "config.json", "index.json"


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint in the index."""

    name: str
    macro_batch: int
    val_loss: float
    permanent: bool = False
    """Kept because of `saving.checkpoint_every`, whatever its loss."""


class Checkpoints:
    """The checkpoints of a run; on a tie the older one counts as better, and a NaN is never among the best."""

    def __init__(self, folder: Path, config: SavingConfig, ranks: Ranks | None = None) -> None:
        self.folder, self.config = folder, config
        self.ranks = ranks or Ranks()
        """The main process writes the files; every one keeps the list."""
        self.entries: list[CheckpointEntry] = []

    def wanted(self, macro_batch: int, val_loss: float) -> bool:
        """Whether a checkpoint with this validation loss is to be kept."""
        return self._permanent(macro_batch) or self._among_best(val_loss)

    def save(
        self,
        macro_batch: int,
        val_loss: float,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        tokenizer: Tokenizer,
        lora: LoRAConfig | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> str:
        """Writes a checkpoint of whole `weights`, then removes those that are no longer among the best.

        Returns why it could not be written, and an empty string where it is; those before it are as they were.
        """
        entry = CheckpointEntry(
            f"val{val_loss:.4f}_mb{macro_batch:06d}", macro_batch, val_loss, permanent=self._permanent(macro_batch)
        )
        best = sorted([*self.entries, entry], key=_rank)
        finite = [other for other in best if not math.isnan(other.val_loss)]
        entries = [other for other in best if other.permanent or other in finite[: self.config.keep_best]]

        def write() -> str:
            try:
                folder = self.folder / entry.name
                save_checkpoint(folder, weights, config, tokenizer, asdict(entry), lora, chat_template)
                index = {"format": FORMAT, "checkpoints": [asdict(other) for other in entries]}
                write_json(self.folder / INDEX, index)
            except (OSError, SafetensorError) as error:
                return str(error)
            return ""

        reason: str = self.ranks.from_main(write() if self.ranks.is_main else "")
        if not reason:
            self.entries = entries
            if self.ranks.is_main:
                self.prune()
        return reason

    def prune(self) -> None:
        """Removes every folder that the index does not name; one that cannot be removed stays until the next time."""
        kept = {entry.name for entry in self.entries}
        for path in self.folder.glob("val*"):
            if path.name not in kept and path.is_dir():
                with contextlib.suppress(OSError):
                    remove(path)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"entries": [asdict(entry) for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; an entry whose folder is gone is forgotten.

        A folder that came after the snapshot stays until the next `save`, which writes it again or prunes it.
        """
        entries = [CheckpointEntry(**entry) for entry in state["entries"]]
        self.entries = [entry for entry in entries if (self.folder / entry.name / CONFIG).exists()]

    def _permanent(self, macro_batch: int) -> bool:
        return self.config.checkpoint_every is not None and macro_batch % self.config.checkpoint_every == 0

    def _among_best(self, val_loss: float) -> bool:
        better = [entry for entry in self.entries if entry.val_loss <= val_loss]
        return not math.isnan(val_loss) and len(better) < self.config.keep_best


def _rank(entry: CheckpointEntry) -> tuple[bool, float, int]:
    return (math.isnan(entry.val_loss), entry.val_loss, entry.macro_batch)


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    lora: LoRAConfig | None = None,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Writes a checkpoint to `folder`, whole or not at all; `facts` are kept in its config.json.

    Adapters among the weights are merged into them, so that whoever reads the checkpoint need not know of adapters, and
    are written once more for themselves.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    base, adapters = split_adapters(host)
    try:
        if lora is not None and lora.rank is not None:
            base = merge(base, adapters, lora.alpha / lora.rank)
            described = {"format": "pt", "rank": str(lora.rank), "alpha": str(lora.alpha)}
            save_file(adapters, partial / ADAPTERS, metadata=described)
        save_file(base, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, {"format": FORMAT, "model": to_json(config, model_kinds()), "facts": facts})
        write_text(partial / TOKENIZER, tokenizer.to_json())
        if chat_template is not None:
            write_text(partial / CHAT_TEMPLATE, chat_template.to_json())
        commit_folder(partial, folder)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)  # it takes room that may be what is missing
        raise


@dataclass
class Checkpoint:
    """A checkpoint, read."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    facts: dict[str, Any]
    chat_template: ChatTemplate | None = None
    """How it was taught to converse; None: it was not."""

    def model(self, device: torch.device) -> LanguageModel:
        """The model with its weights, for use, on `device`.

        Raises:
            UserError: the weights are not those of such a model; that is found out before it takes any memory.
        """
        with parsing(self.folder / CONFIG, RuntimeError), on_meta():
            wanted = build_model(self.config, self._heads()).state_dict()
        self._check_weights(wanted)
        model = build_model(self.config, self._heads())
        model.load_state_dict(self.weights)
        return model.to(device).eval()

    def _heads(self) -> set[str]:
        return {name.split(".")[1] for name in self.weights if name.startswith("heads.")}

    def _check_weights(self, wanted: Mapping[str, Tensor]) -> None:
        for name in sorted(wanted.keys() | self.weights.keys()):
            theirs, ours = self.weights.get(name), wanted.get(name)
            if theirs is None or ours is None or theirs.shape != ours.shape or not theirs.is_floating_point():
                found, asked = ("none" if one is None else f"{one.dtype} {tuple(one.shape)}" for one in (theirs, ours))
                raise UserError(f"{self.folder}: the weights {name} are {found}; the model's are {asked}")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        UserError: the folder is no checkpoint, is damaged, or is of a newer format or an unknown architecture.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    if wrong := find_corruption(folder, needed=(WEIGHTS, CONFIG, TOKENIZER)):
        raise UserError(f"checkpoint {folder} is damaged: {wrong}")
    content = read_json(folder / CONFIG)
    with parsing(folder / CONFIG):
        if content.get("format") != FORMAT:
            raise UserError(f"{folder} has checkpoint format {content.get('format')}; this version reads {FORMAT}")
        config, facts = from_json(ModelConfig, content["model"], model_kinds(), "model."), dict(content["facts"])
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
    """The folder of a run's checkpoint with the lowest validation loss.

    Raises:
        UserError: the run has none.
    """
    index = run / "checkpoints" / INDEX
    content = read_json(index) if index.exists() else {"checkpoints": []}
    with parsing(index):
        entries = [CheckpointEntry(**entry) for entry in content["checkpoints"]]
        if not entries:
            raise UserError(f"{run} has no checkpoint yet; one is saved after each macro-batch that improves")
        return run / "checkpoints" / safe_name(min(entries, key=_rank).name, index)


POSITION_ROWS = ("position_embedding.weight",)


TOKEN_ROWS = ("token_embedding.weight", "head.weight")
"""Matrices with one row per position or per token, of which there may be more or fewer in a model than in another."""


def load_matching_weights(model: nn.Module, weights: Mapping[str, Tensor], same_tokens: bool = False) -> list[str]:
    """Copies into `model` every weight whose name and shape match; returns a line about each that did not.

    Of the rows that stand for positions, and for tokens where they are the `same_tokens`, those that both have are
    copied. A model that is cut over several processes is filled by all of them together. Adapters begin anew.
    """
    rows = POSITION_ROWS + TOKEN_ROWS * same_tokens
    target = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    fitting: dict[str, Tensor] = {}
    lines = []
    for name in sorted(target):
        ours, theirs = target[name], weights.get(name)
        if theirs is not None and theirs.shape == ours.shape:
            fitting[name] = theirs
        elif theirs is not None and theirs.shape[1:] == ours.shape[1:] and name in rows:
            fitting[name] = torch.cat(
                [theirs[: len(ours)], full_tensor(ours)[len(theirs) :].to(theirs.device, theirs.dtype)]
            )
            rest = (
                "the model's others keep their initial values" if len(ours) > len(theirs) else "the others are left out"
            )
            lines.append(f"{name} takes {min(len(ours), len(theirs)):,} of {len(theirs):,} rows; {rest}")
        else:
            found = "is not in the checkpoint" if theirs is None else f"has shape {tuple(theirs.shape)}"
            lines.append(f"{name} {found}; it keeps its initial values, shape {tuple(ours.shape)}")
    load_weights(model, fitting, strict=False)
    lines += [f"{name} is in the checkpoint but not in the model" for name in sorted(weights.keys() - target.keys())]
    return lines


def config_mismatches(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """A line about each field of a model that the shapes of its weights may not tell, such as the number of heads."""
    if type(theirs) is not type(ours):
        return [f"the checkpoint is of {type(theirs).__name__}, the model of {type(ours).__name__}"]
    names = [entry.name for entry in fields(ours) if entry.name not in ("vocab_size", "max_seq_len", "dropout")]
    return [
        f"model.{name} is {getattr(ours, name)!r}; in the checkpoint it is {getattr(theirs, name)!r}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
