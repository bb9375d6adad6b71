"""The plan of an experiment: which strategies fit on a number of devices, their speed and their cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from cleangpt.config import FineTuningConfig, TrainingConfig
from cleangpt.corpora import dataset_folder
from cleangpt.corpora.mixture import Mixture
from cleangpt.data.dataset import TokenDataset, is_dataset
from cleangpt.data.mixing import MixedDataset, MixtureSource
from cleangpt.distributed.datasheets import Device
from cleangpt.distributed.layout import Layout, layout_for
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment, total_samples
from cleangpt.files import user_path
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.flops import flops_per_token
from cleangpt.models.meta import on_meta
from cleangpt.models.vision import vision_of
from cleangpt.objectives.pairs import REFERENCE
from cleangpt.objectives.policy import PolicyObjective
from cleangpt.planning.memory import Memory, StepConfig, device_memory, kinds_of_blocks
from cleangpt.planning.rollouts import round_seconds
from cleangpt.planning.timing import Machine, StepTime, sent_bytes, step_time
from cleangpt.planning.workload import Workload, measure
from cleangpt.rollouts.reference import reads_reference
from cleangpt.training.finetuning import freeze_and_add_lora
from cleangpt.training.launch import check
from cleangpt.training.resolve import resolve, resolve_with

TENSOR_DEGREES = (2, 4, 8)
"""Degrees of tensor parallelism worth trying."""
RECOMPUTED: tuple[tuple[int, Literal["full", "selective"]], ...] = ((1, "selective"), (1, "full"))
"""`training.recompute_every` and `training.recompute` worth trying where nothing fits."""


class Candidate(NamedTuple):
    """A strategy to spread a model over devices."""

    description: str
    options: str
    """For the command line of `cleangpt train`."""
    layout: Layout


@dataclass(frozen=True)
class Estimate:
    """One strategy on a number of devices."""

    devices: int
    strategy: str
    """As `Candidate.description`."""
    options: str
    """For the command line of `cleangpt train`."""
    chosen: bool
    """Whether it is the experiment's own strategy."""
    layout: Layout
    micro_batch: int
    memory: Memory
    time: StepTime
    sent_bytes: float
    """By a device, per step."""
    tokens_per_second: float
    """Over all devices."""
    mfu: float
    """Model FLOPs utilization, of the 16-bit peak if there is one (Chowdhery et al. 2022, appendix B)."""
    hours: float
    """Until the token budget is reached."""
    cost: float
    """Dollars until the token budget is reached."""
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What is planned, and an estimate for each strategy and number of devices."""

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
    """A line for each number of devices on which nothing fits."""
    notes: list[str]
    """What is left out of the time of a step, or assumed of it."""

    def fitting(self) -> list[Estimate]:
        """The estimates that fit, sorted by cost and then by hours."""
        return sorted((entry for entry in self.estimates if entry.fits), key=lambda entry: (entry.cost, entry.hours))

    def best(self, devices: int) -> Estimate:
        """The fastest strategy that fits on a number of devices, else the one that needs the least memory."""
        here = [entry for entry in self.estimates if entry.devices == devices]
        fitting = [entry for entry in here if entry.fits]
        return min(fitting, key=lambda entry: entry.hours) if fitting else min(here, key=lambda e: e.memory.total)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, in bytes, seconds and dollars."""
        return asdict(self)


def resolve_if_prepared(experiment: Experiment) -> Experiment:
    """The experiment resolved with its dataset where that has been prepared, else from its fields alone.

    Raises:
        UserError: the vocabulary, or the length of an epoch, is not known.
    """
    given, epochs = experiment.model.vocab_size, experiment.training.epochs
    if given is not None and epochs is None:
        return resolve(experiment, given)
    # The sources of a mixture share one tokenizer.
    mixture = isinstance(experiment.corpus, Mixture)
    corpus = experiment.corpus.sources[0].corpus if isinstance(experiment.corpus, Mixture) else experiment.corpus
    folder = dataset_folder(corpus, user_path(experiment.data.folder))
    if is_dataset(folder):
        dataset = TokenDataset(folder)
        alone = MixedDataset([MixtureSource(dataset)])
        return resolve(experiment, dataset.vocab_size) if mixture else resolve_with(experiment, alone)
    if given is None:
        raise UserError("model.vocab_size is None and the corpus is not prepared; give --model.vocab-size")
    return resolve(experiment, given)


def make_plan(
    experiment: Experiment, device: Device, counts: Sequence[int], per_node: int = 8, tokens: int | None = None
) -> Plan:
    """Plans an experiment for each number of devices, without data, device or network.

    Args:
        experiment: what to train.
        device: from `find_device`.
        counts: numbers of devices.
        per_node: devices per machine.
        tokens: token budget; None: the experiment's length.

    Raises:
        UserError: a field or argument is out of range, or the model cannot be planned.
    """
    _check(experiment, counts, per_node, tokens)
    experiment = resolve_if_prepared(experiment)
    planner = _Planner(experiment, device, per_node, tokens)
    estimates: list[Estimate] = []
    refused: list[str] = []
    advice: list[str] = []
    for count in counts:
        reasons = [(candidate, planner.refusal(candidate.layout)) for candidate in planner.candidates(count)]
        refused += [f"{count} devices, {candidate.description}: {reason}" for candidate, reason in reasons if reason]
        candidates = [candidate for candidate, reason in reasons if not reason]
        here = [planner.estimate(count, candidate, experiment.training) for candidate in candidates]
        estimates += here
        if here and not any(entry.fits for entry in here):
            advice.append(planner.advise(count, candidates))
    if not estimates:
        raise UserError(f"no strategy can run: {refused[0]}")
    parameters = sum(parameter.numel() for parameter in planner.model.parameters())
    precision = planner.machine.precision
    return Plan(
        experiment.name, parameters, planner.flops, planner.tokens, device, precision, estimates, refused, advice,
        _notes(experiment),
    )  # fmt: skip


def _check(experiment: Experiment, counts: Sequence[int], per_node: int, tokens: int | None) -> None:
    check(replace(experiment, training=replace(experiment.training, micro_batch_size=None)))
    if not counts:
        raise UserError("--devices is empty; allowed: one or more whole numbers")
    for name, value in [*(("devices", count) for count in counts), ("devices-per-node", per_node), ("tokens", tokens)]:
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; allowed: a whole number of 1 or more")


class _Planner:
    """Plans an experiment on one kind of device."""

    def __init__(self, experiment: Experiment, device: Device, per_node: int, tokens: int | None) -> None:
        training = experiment.training
        self.experiment = experiment
        policy = experiment.objective if isinstance(experiment.objective, PolicyObjective) else None
        self.policy = policy
        self.referenced = (
            policy is not None
            and reads_reference(experiment.rollouts, policy)
            and experiment.fine_tuning.lora.rank is None
        )
        precision = device.precision(training.precision)
        device.flops(precision)
        self.machine = Machine(device, precision, training.compile != "off", per_node)
        self.tokens = tokens or total_samples(experiment) * experiment.data.seq_len
        try:
            with on_meta():
                self.model, self.trained = build_model(experiment.model, experiment.objective.heads), 1.0
                if experiment.fine_tuning != FineTuningConfig():  # which changes a model in place
                    plain = build_model(experiment.model, experiment.objective.heads)
                    self.trained = trained_share(plain, experiment.fine_tuning)
        except RuntimeError as error:
            raise UserError(f"the model cannot be built: {str(error).splitlines()[0]}") from None
        self.model.loss_chunk = training.loss_chunk
        self.flops = flops_per_token(self.model, experiment.data.seq_len)
        self.measured: dict[tuple[int, bool], Workload] = {}

    def candidates(self, count: int) -> list[Candidate]:
        """The strategies worth considering on a number of devices."""
        if count == 1:
            return [Candidate("one device", "", Layout())]
        per_node, nodes = self.machine.per_node, count // self.machine.per_node
        found = [("ddp", Layout(count)), ("fsdp", Layout(1, count))]
        if nodes > 1 and count % per_node == 0 and per_node > 1:
            found.append(("hsdp", Layout(nodes, per_node)))
        degrees = [
            degree
            for degree in TENSOR_DEGREES
            if degree <= per_node and count % degree == 0 and supports_tensor_parallel(self.model, degree)
        ]
        found += [("fsdp", Layout(1, count // degree, degree)) for degree in degrees if degree < count]
        if count in degrees:
            found.append(("tp", Layout(1, 1, count)))
        config = self.experiment.parallel
        own = layout_for(config, count)
        if config.strategy != "auto" and own not in [layout for _, layout in found]:
            found.insert(0, (config.strategy, own))
        return [Candidate(_describe(name, layout), _as_options(name, layout), layout) for name, layout in found]

    def refusal(self, layout: Layout) -> str:
        """Why a layout cannot run, or an empty string."""
        if layout.tensor > 1 and (rank := self.experiment.fine_tuning.lora.rank) is not None:
            return f"matrices cannot be sharded with fine_tuning.lora.rank {rank}"
        batch, group = self.experiment.data.batch_size, self.group
        rows = f", each with groups of {group}" if group > 1 else ""
        return (
            f"data.batch_size {batch} is not a multiple of its {layout.dp_size} data-parallel ranks{rows}"
            if batch % (layout.dp_size * group)
            else ""
        )

    @property
    def group(self) -> int:
        """Rows that stay together in a micro-batch."""
        return max(len(self.experiment.objective.group), 1)

    def micro_batch(self, layout: Layout, training: TrainingConfig) -> int:
        """The largest divisor of a device's share of a batch that is at most `training.micro_batch_size`."""
        share = self.experiment.data.batch_size // layout.dp_size // self.group
        most = max(1, min((training.micro_batch_size or share * self.group) // self.group, share))
        small = [size for size in range(1, min(most, math.isqrt(share)) + 1) if share % size == 0]
        return self.group * max([*small, *(share // size for size in small if share // size <= most)])

    def workload(self, micro_batch: int, layout: Layout) -> Workload:
        """The workload of a micro-batch; FSDP gathers weights in the compute dtype, otherwise autocast copies them."""
        gathered = layout.shards > 1
        if (micro_batch, gathered) not in self.measured:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.machine.base, torch.float32)
            objective = self.experiment.objective
            seq_len, chunk = self.experiment.data.seq_len, self.model.loss_chunk
            work = measure(self.model, objective, micro_batch, seq_len, dtype, gathered)
            chunks = 1 if chunk is None else math.ceil(micro_batch * seq_len / chunk)
            self.measured[micro_batch, gathered] = work.compiled(chunks) if self.machine.compiled else work
        return self.measured[micro_batch, gathered]

    def estimate(self, count: int, candidate: Candidate, training: TrainingConfig) -> Estimate:
        """Memory, time and cost of a candidate with these fields of `training`."""
        strategy, options, layout = candidate
        device, data, parallel = self.machine.device, self.experiment.data, self.experiment.parallel
        micro_batch = self.micro_batch(layout, training)
        in_step = training.accumulation * data.batch_size
        work = self.workload(micro_batch, layout)
        blocks = kinds_of_blocks(work, training.recompute_every, training.recompute == "selective")
        step = StepConfig(in_step // layout.dp_size // micro_batch, parallel.reshard_after_forward)
        memory = device_memory(work, blocks, layout, step, self.machine.weight_bytes, self.trained, self.referenced)
        time = step_time(work, blocks, layout, step, self.machine)
        if self.policy is not None:
            rollouts = self.experiment.rollouts
            sampling, looking_back = (
                seconds * in_step / rollouts.samples
                for seconds in round_seconds(
                    rollouts, self.policy, micro_batch, data.seq_len, work, blocks, layout, self.machine
                )
            )
            time = replace(time, sampling=sampling, looking_back=looking_back)
        speed = in_step * data.seq_len / time.total
        hours = self.tokens / speed / 3600
        return Estimate(
            devices=count,
            strategy=strategy,
            options=f"{options} --training.micro-batch-size {micro_batch}".strip(),
            chosen=parallel.strategy != "auto" and layout_for(parallel, count) == layout,
            layout=layout,
            micro_batch=micro_batch,
            memory=memory,
            time=time,
            sent_bytes=sent_bytes(work, blocks, layout, step, self.machine),
            tokens_per_second=speed,
            mfu=speed * self.flops / count / device.peak_flops,
            hours=hours,
            cost=hours * count * device.price,
            fits=memory.total <= device.memory,
        )

    def advise(self, count: int, candidates: Sequence[Candidate]) -> str:
        """The fastest estimate that fits with smaller micro-batches and recomputation, as a line of advice."""
        training = self.experiment.training
        largest = max(self.micro_batch(layout, training) for _, _, layout in candidates)
        found = []
        for every, recompute in dict.fromkeys([(training.recompute_every, training.recompute), *RECOMPUTED]):
            option = f" --training.recompute-every {every} --training.recompute {recompute}" if every else ""
            for size in (2**power for power in range(largest.bit_length())):
                changed = replace(training, recompute_every=every, recompute=recompute, micro_batch_size=size)
                found += [(self.estimate(count, candidate, changed), option) for candidate in candidates]
        fitting = [entry for entry in found if entry[0].fits]
        if not fitting:
            return f"{count} devices: nothing fits, not even micro-batches of 1 with recomputation of every block"
        best, option = min(fitting, key=lambda entry: entry[0].hours)
        return f"{count} devices: {best.strategy} fits with {best.options}{option}"


def _notes(experiment: Experiment) -> list[str]:
    notes = []
    if vision_of(experiment.model).encoder is not None:
        notes.append("images: every row is taken to be full of them")
    if REFERENCE in experiment.objective.reads and not experiment.objective.on_policy:
        notes.append("before the first step: a forward pass of the reference over the dataset, once for all runs")
    if experiment.objective.on_policy:
        notes.append(
            f"rollouts: every answer is taken to have {experiment.data.seq_len} tokens, data.seq_len; rewards are free"
        )
    return notes


def trained_share(model: LanguageModel, tuning: FineTuningConfig) -> float:
    """The fraction of a model's parameters that train, adapters included."""
    freeze_and_add_lora(model, tuning)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)


def _describe(name: str, layout: Layout) -> str:
    words = [name]
    if name == "hsdp":
        words.append(f"{layout.replicas} replicas")
    if name != "tp" and layout.tensor > 1:
        words.append(f"tensor {layout.tensor}")
    return ", ".join(words)


def _as_options(name: str, layout: Layout) -> str:
    options = f"--parallel.strategy {name}"
    if name == "hsdp":
        options += f" --parallel.replicas {layout.replicas}"
    if name != "tp" and layout.tensor > 1:
        options += f" --parallel.tensor {layout.tensor}"
    return options


def supports_tensor_parallel(model: LanguageModel, degree: int) -> bool:
    """Whether every matrix of the model is in its tensor plan and its attention heads can be split evenly."""
    for name, _ in model.named_parameters():
        module = ".".join("*" if word.isdigit() else word for word in name.split(".")[:-1])
        if module not in model.tensor_plan:
            return False
    return all(count % degree == 0 for count in model.attention_heads().values())
