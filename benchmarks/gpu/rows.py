"""The rows in order of worth. Adding one: a function that yields measurements, and its line here."""

from typing import NamedTuple


class Row(NamedTuple):
    """One row process."""

    name: str
    function: str
    """The path of its function from `Setup` to measurements; imported in its own process."""
    seconds: int
    """Its time limit, several times what it should take on an H100, compilation included."""
    timed: bool = True
    """Whether it measures time, and has the machine to itself."""


ROWS = (
    Row("precisions", "benchmarks.gpu.correct.precisions", 150, timed=False),
    Row("synchronisation", "benchmarks.gpu.synchronisation.synchronisation", 90, timed=False),
    Row("gpt2", "benchmarks.gpu.speed.gpt2", 240),
    Row("cache", "benchmarks.gpu.correct.cache", 90, timed=False),
    Row("graphs", "benchmarks.gpu.correct.graphs", 60, timed=False),
    Row("optimizers", "benchmarks.gpu.correct.optimizers", 60, timed=False),
    Row("experts", "benchmarks.gpu.correct.experts", 60, timed=False),
    Row("masks", "benchmarks.gpu.correct.masks", 90, timed=False),
    Row("loss chunks", "benchmarks.gpu.correct.loss_chunks", 60, timed=False),
    Row("policy losses", "benchmarks.gpu.policies.losses", 60, timed=False),
    Row("images", "benchmarks.gpu.images.images", 60, timed=False),
    Row("resume", "benchmarks.gpu.resume.resume", 120, timed=False),
    Row("llama 1B, 4096", "benchmarks.gpu.speed.llama_1b_4096", 150),
    Row("generation", "benchmarks.gpu.generation.generation", 180),
    Row("grpo round", "benchmarks.gpu.policies.grpo_round", 120),
    Row("snapshots", "benchmarks.gpu.speed.snapshots", 90),
    Row("shakespeare_char", "benchmarks.gpu.to_loss.shakespeare_char", 300),
    Row("compiled", "benchmarks.gpu.correct.compiled", 180, timed=False),
    Row("llama 8B layers, 4096", "benchmarks.gpu.speed.llama_8b_layers_4096", 120),
    Row("llama 1B, 8192", "benchmarks.gpu.speed.llama_1b_8192", 120),
    Row("llama 8B layers, 8192", "benchmarks.gpu.speed.llama_8b_layers_8192", 120),
    Row("plan", "benchmarks.gpu.plan.plan", 60),
    Row("shakespeare_char, fast", "benchmarks.gpu.to_loss.fast", 120),
)
