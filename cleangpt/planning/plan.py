"""The plan of an experiment: which strategies fit on so many devices, how fast they are and what they cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cleangpt.config import FineTuningConfig, TrainingConfig
from cleangpt.corpora import dataset_folder
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.dataset import TokenDataset, is_dataset
from cleangpt.distributed.layout import Layout, choose_degrees
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment, check_experiment, total_samples
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel, flops_per_token, on_meta
from cleangpt.planning.devices import Device
from cleangpt.planning.memory import Memory, StepConfig, device_memory, kinds_of_blocks
from cleangpt.planning.timing import Machine, StepTime, exchanged_bytes, step_time
from cleangpt.planning.workload import Workload, measure
from cleangpt.training.finetuning import freeze_and_add_lora

TENSOR_PARTS = (2, 4, 8)
"""Among how many devices of a machine it is worth trying to cut each matrix."""
Candidate = tuple[str, str, Layout]
"""A strategy in words, its options for `cleangpt train`, and its layout."""


@dataclass(frozen=True)
class Estimate:
    """One strategy on a number of devices."""

    devices: int
    strategy: str
    """In words."""
    options: str
    """For the command line of `cleangpt train`."""
    chosen: bool
    """Whether the experiment itself asks for it."""
    place: Layout
    micro_batch: int
    memory: Memory
    time: StepTime
    exchanged: float
    """Bytes that a device sends in a step."""
    tokens_per_second: float
    """Over all devices."""
    mfu: float
    """Model FLOPs utilisation, of the 16-bit peak where there is one (Chowdhery et al. 2022, appendix B)."""
    hours: float
    """To the token budget."""
    cost: float
    """Dollars to the token budget."""
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What is planned, and an estimate of each strategy on each number of devices."""

    experiment: str
    parameters: int
    flops_per_token: int
    tokens: int
    """Token budget."""
    device: Device
    precision: str
    estimates: list[Estimate]
    refused: list[str]
    """Strategies that cannot run, and why."""
    advice: list[str]
    """For numbers of devices on which nothing fits."""

    def fitting(self) -> list[Estimate]:
        """The estimates that fit, the cheapest first and of equal ones the fastest."""
        return sorted((entry for entry in self.estimates if entry.fits), key=lambda entry: (entry.cost, entry.hours))

    def best(self, devices: int) -> Estimate:
        """The fastest that fits on so many devices, else the one that needs the least memory."""
        here = [entry for entry in self.estimates if entry.devices == devices]
        fitting = [entry for entry in here if entry.fits]
        return min(fitting, key=lambda entry: entry.hours) if fitting else min(here, key=lambda e: e.memory.total)

    def to_json(self) -> dict[str, Any]:
        """All of it, in bytes, seconds and dollars."""
        return asdict(self)


def with_vocabulary(experiment: Experiment) -> Experiment:
    """The experiment with its model's vocabulary filled in from the corpus's dataset, if it is prepared.

    Raises:
        UserError: the vocabulary is not known.
    """
    if experiment.model.vocab_size is not None:
        return experiment
    # The sources of a mixture share one tokenizer.
    corpus = experiment.corpus.sources[0].corpus if isinstance(experiment.corpus, Mixture) else experiment.corpus
    folder = dataset_folder(corpus, Path(experiment.data.folder))
    if not is_dataset(folder):
        raise UserError("model.vocab_size is None and the corpus is not prepared; give --model.vocab-size")
    return replace(experiment, model=replace(experiment.model, vocab_size=TokenDataset(folder).vocab_size))


def make_plan(
    experiment: Experiment, device: Device, counts: Sequence[int], per_node: int = 8, tokens: int | None = None
) -> Plan:
    """Plans an experiment on each number of devices; no data, device or network is needed.

    Args:
        experiment: what is to be trained.
        device: from `find_device`.
        counts: numbers of devices.
        per_node: devices in a machine.
        tokens: token budget; None: the experiment's length.

    Raises:
        UserError: a field or argument is out of range, or the model cannot be planned.
    """
    _check(experiment, counts, per_node, tokens)
    experiment = with_vocabulary(experiment)
    planner = _Planner(experiment, device, per_node, tokens)
    estimates: list[Estimate] = []
    refused: list[str] = []
    advice: list[str] = []
    for count in counts:
        reasons = [(way, planner.refusal(way[2])) for way in planner.ways(count)]
        refused += [f"{count} devices, {way[0]}: {reason}" for way, reason in reasons if reason]
        ways = [way for way, reason in reasons if not reason]
        here = [planner.estimate(count, way, experiment.training) for way in ways]
        estimates += here
        if here and not any(entry.fits for entry in here):
            advice.append(planner.advise(count, ways))
    if not estimates:
        raise UserError(f"no strategy can run: {refused[0]}")
    parameters = sum(parameter.numel() for parameter in planner.model.parameters())
    precision = planner.machine.precision
    return Plan(
        experiment.name, parameters, planner.flops, planner.tokens, device, precision, estimates, refused, advice
    )


def _check(experiment: Experiment, counts: Sequence[int], per_node: int, tokens: int | None) -> None:
    check_experiment(replace(experiment, training=replace(experiment.training, micro_batch_size=None)))
    if not counts:
        raise UserError("--devices is empty; allowed: one or more whole numbers")
    for name, value in [*(("devices", count) for count in counts), ("devices-per-node", per_node), ("tokens", tokens)]:
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; allowed: a whole number of 1 or more")


class _Planner:
    """An experiment on a kind of device."""

    def __init__(self, experiment: Experiment, device: Device, per_node: int, tokens: int | None) -> None:
        training = experiment.training
        self.experiment = experiment
        precision = device.precision(training.precision)
        device.flops(precision)
        self.machine = Machine(device, precision, training.compile != "off", per_node)
        self.tokens = tokens or total_samples(experiment) * experiment.data.seq_len
        try:
            with on_meta():
                self.model = build_model(experiment.model)
                whole = experiment.fine_tuning == FineTuningConfig()
                self.trained = 1.0 if whole else trained_share(build_model(experiment.model), experiment.fine_tuning)
        except RuntimeError as error:
            raise UserError(f"the model cannot be built: {str(error).splitlines()[0]}") from None
        self.flops = flops_per_token(self.model, experiment.data.seq_len)
        self.measured: dict[tuple[int, bool], Workload] = {}

    def ways(self, count: int) -> list[Candidate]:
        """The strategies that are worth a look on so many devices."""
        if count == 1:
            return [("one device", "", Layout())]
        per_node, nodes = self.machine.per_node, count // self.machine.per_node
        found = [("ddp", Layout(count)), ("fsdp", Layout(1, count))]
        if nodes > 1 and count % per_node == 0 and per_node > 1:
            found.append(("hsdp", Layout(nodes, per_node)))
        parts = [size for size in TENSOR_PARTS if size <= per_node and count % size == 0 and can_cut(self.model, size)]
        found += [("fsdp", Layout(1, count // size, size)) for size in parts if size < count]
        if count in parts:
            found.append(("tp", Layout(1, 1, count)))
        config = self.experiment.parallel
        own = choose_degrees(config, count)
        if config.strategy != "auto" and own not in [place for _, place in found]:
            found.insert(0, (config.strategy, own))
        return [(_in_words(name, place), _as_options(name, place), place) for name, place in found]

    def refusal(self, place: Layout) -> str:
        """Why a layout cannot run, or an empty string."""
        if place.tensor > 1 and (rank := self.experiment.fine_tuning.lora.rank) is not None:
            return f"matrices cannot be cut with fine_tuning.lora.rank {rank}"
        batch = self.experiment.data.batch_size
        return f"data.batch_size {batch} is not a multiple of its {place.parts} parts" if batch % place.parts else ""

    def micro_batch(self, place: Layout, training: TrainingConfig) -> int:
        """The largest divisor of a device's part of a batch that `training.micro_batch_size` allows."""
        part = self.experiment.data.batch_size // place.parts
        most = min(training.micro_batch_size or part, part)
        small = [size for size in range(1, min(most, math.isqrt(part)) + 1) if part % size == 0]
        return max([*small, *(part // size for size in small if part // size <= most)])

    def workload(self, micro_batch: int, place: Layout) -> Workload:
        """Of a micro-batch; under fsdp, weights are gathered in the precision of products, else autocast copies."""
        gathered = place.shards > 1
        if (micro_batch, gathered) not in self.measured:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.machine.base, torch.float32)
            objective = self.experiment.objective
            self.measured[micro_batch, gathered] = measure(
                self.model, objective, micro_batch, self.experiment.data.seq_len, dtype, gathered
            )
        return self.measured[micro_batch, gathered]

    def estimate(self, count: int, way: Candidate, training: TrainingConfig) -> Estimate:
        """Memory, time and cost of one way to spread the model, with these fields of `training`."""
        strategy, options, place = way
        device, data, parallel = self.machine.device, self.experiment.data, self.experiment.parallel
        micro_batch = self.micro_batch(place, training)
        in_step = training.accumulation * data.batch_size
        work = self.workload(micro_batch, place)
        blocks = kinds_of_blocks(work, training.recompute_every)
        pace = StepConfig(in_step // place.parts // micro_batch, parallel.reshard_after_forward)
        memory = device_memory(work, blocks, place, pace, self.machine.weight_bytes, self.trained)
        time = step_time(work, blocks, place, pace, self.machine)
        speed = in_step * data.seq_len / time.total
        hours = self.tokens / speed / 3600
        return Estimate(
            devices=count,
            strategy=strategy,
            options=f"{options} --training.micro-batch-size {micro_batch}".strip(),
            chosen=parallel.strategy != "auto" and choose_degrees(parallel, count) == place,
            place=place,
            micro_batch=micro_batch,
            memory=memory,
            time=time,
            exchanged=exchanged_bytes(work, blocks, place, pace, self.machine),
            tokens_per_second=speed,
            mfu=speed * self.flops / count / (device.bf16 or device.fp16 or device.fp32),
            hours=hours,
            cost=hours * count * device.price,
            fits=memory.total <= device.memory,
        )

    def advise(self, count: int, ways: Sequence[Candidate]) -> str:
        """The fastest way to make it fit by smaller micro-batches and recomputation, in words."""
        training = self.experiment.training
        largest = max(self.micro_batch(place, training) for _, _, place in ways)
        found = []
        for every in dict.fromkeys([training.recompute_every, 1]):
            words = f" --training.recompute-every {every}" if every else ""
            for size in (2**power for power in range(largest.bit_length())):
                changed = replace(training, recompute_every=every, micro_batch_size=size)
                found += [(self.estimate(count, way, changed), words) for way in ways]
        fitting = [entry for entry in found if entry[0].fits]
        if not fitting:
            return f"{count} devices: nothing fits, not even micro-batches of 1 with recomputation of every block"
        best, words = min(fitting, key=lambda entry: entry[0].hours)
        return f"{count} devices: {best.strategy} fits with {best.options}{words}"


def trained_share(model: LanguageModel, tuning: FineTuningConfig) -> float:
    """The share of a model's parameters that train, adapters among them."""
    freeze_and_add_lora(model, tuning)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)


def _in_words(name: str, place: Layout) -> str:
    words = [name]
    if name == "hsdp":
        words.append(f"{place.replicas} replicas")
    if name != "tp" and place.tensor > 1:
        words.append(f"tensor {place.tensor}")
    return ", ".join(words)


def _as_options(name: str, place: Layout) -> str:
    options = f"--parallel.strategy {name}"
    if name == "hsdp":
        options += f" --parallel.replicas {place.replicas}"
    if name != "tp" and place.tensor > 1:
        options += f" --parallel.tensor {place.tensor}"
    return options


def can_cut(model: LanguageModel, parts: int) -> bool:
    """Whether each matrix of the model can be cut in so many parts: it has a plan, and heads come out even."""
    plan, config = model.tensor_plan, model.config
    for name, _ in model.named_parameters():
        module = ".".join("*" if word.isdigit() else word for word in name.split(".")[:-1])
        if module not in plan:
            return False
    heads = [getattr(config, field, None) for field in ("n_heads", "n_kv_heads")]
    return all(count is None or count % parts == 0 for count in heads)
