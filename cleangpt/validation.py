"""Dataclasses that are checked, and go to JSON and back."""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cleangpt.errors import UserError, nearest

T = TypeVar("T")


# Checking ------------------------------------------------------------------------------------------------------------
LARGEST = 2**40


AT_LEAST_ONE = f"a whole number of 1 or more, at most {LARGEST:,}"


MOST = {
    **dict.fromkeys(["model.n_layers", "model.n_experts"], 4096),
    **dict.fromkeys(["model.n_heads", "model.n_kv_heads", "model.dim", "data.prefetch", "training.threads"], 2**20),
    **dict.fromkeys(["model.hidden_dim", "model.expert_hidden_dim"], 2**24),
    **dict.fromkeys(["model.vocab_size", "model.max_seq_len", "data.seq_len"], 2**31),
}
"""Where numbers end that have a meaning, so that what is made of several of them still fits into 64 bits."""


def _up_to(most: int, value: int) -> bool:
    return 1 <= value <= most


SHARE = "from 0 to 1"


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        [
            "data.batch_size",
            "data.val_samples",
            "data.val_batch_size",
            "model.sliding_window",
            "model.global_every",
            "model.rope_original_seq_len",
            "model.experts_per_token",
            "model.ngram_rows",
            "training.macro_batches",
            "training.batches_per_macro_batch",
            "training.accumulation",
            "training.micro_batch_size",
            "training.recompute_every",
            "training.loss_chunk",
            "training.max_skipped_steps",
            "optimizer.muon.iterations",
            "optimizer.base_dim",
            "training.spike_window",
            "training.spike_skip",
            "training.max_rollbacks",
            "fine_tuning.lora.rank",
            "parallel.replicas",
            "parallel.tensor",
            "parallel.timeout",
            "early_stopping.patience",
            "saving.snapshot_every",
            "saving.keep_snapshots",
            "saving.keep_best",
            "saving.checkpoint_every",
            "tracking.every",
        ],
        (lambda value: 1 <= value <= LARGEST, AT_LEAST_ONE),
    ),
    **{name: (partial(_up_to, most), f"a whole number of 1 or more, at most {most:,}") for name, most in MOST.items()},
    **dict.fromkeys(
        ["tracking.sample_tokens", "tracking.score_samples", "training.seed", "saving.patience"],
        (lambda value: 0 <= value < 2**63, "a whole number of 0 or more"),
    ),
    **dict.fromkeys(
        [f"schedule.{name}.{part}" for name in ("lr", "weight_decay", "batch_size") for part in ("warmup", "decay")],
        (lambda value: 0 <= value <= 1, SHARE),
    ),
    **dict.fromkeys(
        [
            f"schedule.{name}.{part}"
            for name in ("lr", "weight_decay", "batch_size")
            for part in ("initial", "final", "power")
        ]
        + ["optimizer.lr", "optimizer.muon.lr", "optimizer.weight_decay", "early_stopping.min_delta"],
        (lambda value: value >= 0, "0 or more"),
    ),
    **dict.fromkeys(
        ["optimizer.eps", "optimizer.clip_norm", "fine_tuning.lora.alpha", "training.spike_threshold"],
        (lambda value: value > 0, "more than 0"),
    ),
    "optimizer.betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1"),
    **dict.fromkeys(
        [
            "model.norm_eps",
            "model.rope_theta",
            "model.rope_low_freq_factor",
            "model.rope_high_freq_factor",
            "model.logit_soft_cap",
            "model.bias_update_rate",
        ],
        (lambda value: 0 < value <= 1e30, "more than 0, at most 1e30"),
    ),
    "model.rope_factor": (lambda value: value >= 1, "1 or more"),
    "model.head_dim": (lambda value: 2 <= value <= 2**20 and value % 2 == 0, "an even number of 2 or more"),
    "model.n_shared_experts": (lambda value: 0 <= value <= 4096, "a whole number of 0 or more, at most 4,096"),
    "model.separator": (lambda value: value >= 0, "a whole number of 0 or more"),
    **dict.fromkeys(
        ["model.dropout", "model.ngram_dropout", "fine_tuning.lora.dropout", "optimizer.muon.momentum"],
        (lambda value: 0 <= value < 1, "from 0 to below 1"),
    ),
    "optimizer.lr_factors": (
        lambda value: all(factor >= 0 for _, factor in value), "patterns, each with a number of 0 or more"
    ),
    "fine_tuning.layer_decay": (lambda value: 0 < value <= 1, "more than 0, at most 1"),
    "training.device": (
        lambda value: re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9]\d?))?", value) is not None,
        "auto, cpu, cuda, cuda:N or mps",
    ),
    "name": (
        lambda value: 0 < len(value) <= 100 and all(letter.isalnum() or letter in "-_." for letter in value)
        and value.strip(".") == value,
        "letters, digits, '-', '_' and '.' within",
    ),
}  # fmt: skip


def check(config: Any, path: str = "") -> None:
    """Checks type and range of every field of a dataclass, and of the dataclasses in it.

    Raises:
        UserError: one line naming the field, its value and what is allowed.
    """
    hints = get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        name, value = f"{path}{entry.name}", getattr(config, entry.name)
        if not fits(value, hints[entry.name]):
            raise UserError(f"{name} is {value!r}; allowed: {describe(hints[entry.name])}")
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
        for index, part in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(part):
                check(part, f"{name}.{index}.")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name} is {value!r}; allowed: a finite number")
        allowed, words = RULES.get(name, (lambda _: True, ""))
        if value is not None and not allowed(value):
            raise UserError(f"{name} is {value!r}; allowed: {words}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that an annotation names; a whole number serves as a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value is argument or (value == argument and type(value) is type(argument)) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(part, arguments[0]) for part in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotation in words for a message: ``a whole number or None``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        return "a tuple of " + ", ".join("…" if argument is Ellipsis else describe(argument) for argument in arguments)
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


# To and from JSON ----------------------------------------------------------------------------------------------------
def to_json(config: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A dataclass as a JSON object, with a `kind` for those whose class stands in the registry `kinds`."""
    names = {cls: name for name, cls in kinds.items()}
    entries: dict[str, Any] = {"kind": names[type(config)]} if type(config) in names else {}
    return entries | {entry.name: _as_json(getattr(config, entry.name), kinds) for entry in dataclasses.fields(config)}


def _as_json(value: Any, kinds: Mapping[str, type]) -> Any:
    if isinstance(value, tuple):
        return [_as_json(part, kinds) for part in value]
    return to_json(value, kinds) if dataclasses.is_dataclass(value) else value


def from_json(cls: type[T], value: Any, kinds: Mapping[str, type], path: str = "") -> T:
    """The dataclass that `to_json` wrote; nothing in the file is executed.

    Raises:
        UserError: a field, kind or type that this version does not know.
    """
    if isinstance(value, str) and value in kinds:
        value = {"kind": value}
    if not isinstance(value, dict):
        raise UserError(f"{path.strip('.') or cls.__name__} is {value!r}; allowed: an object")
    entries = dict(value)
    kind = entries.pop("kind", None)
    if kind is not None:
        if not isinstance(kind, str) or kind not in kinds or not issubclass(kinds[kind], cls):
            hint = nearest(str(kind), kinds)
            raise UserError(
                f"{path.strip('.') or cls.__name__} is of kind {kind!r}, which is not registered here{hint}; "
                "where the kind is your own, give the file that defines it with --code"
            )
        cls = kinds[kind]
    hints, known = get_type_hints(cls), {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in entries:
        if name not in known:
            raise UserError(f"{path}{name} is not a field of {cls.__name__}{nearest(name, known)}")
    missing = {entry.name for entry in dataclasses.fields(cls)  # type: ignore[arg-type]
               if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING}  # fmt: skip
    if lacking := sorted(missing - set(entries)):
        raise UserError(f"{path}{lacking[0]} is missing; allowed: {describe(hints[lacking[0]])}")
    for name, entry in entries.items():
        entries[name] = _from_json(hints[name], entry, kinds, f"{path}{name}.")
    config = cls(**entries)
    check(config, path)
    return config


def _from_json(hint: Any, value: Any, kinds: Mapping[str, type], path: str) -> Any:
    """A field's value: lists become tuples, objects the dataclass that the annotation names."""
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value, kinds, path)
    if isinstance(value, list):
        inner = next(filter(dataclasses.is_dataclass, get_args(hint)), None)
        return tuple(_from_json(inner, part, kinds, f"{path}{index}.") for index, part in enumerate(value))
    return value


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A nested JSON object as a flat one: ``{"optimizer.lr": 0.001}``; objects in a list are numbered."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = {str(index): part for index, part in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}{key}.")
        else:
            flat[path + key] = value
    return flat
