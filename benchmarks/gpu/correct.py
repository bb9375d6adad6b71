"""Whether the device computes what the CPU computes in fp64: models in every precision, their parts, and optimizers.

An error is the norm of a difference over the norm of what is right, so that it does not depend on a model's size.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import experiment
from benchmarks.gpu.setup import LeftOut, Measurement, Setup
from cleangpt.config import ModelConfig, MuonConfig, OptimizerConfig
from cleangpt.data.batch import Batch
from cleangpt.distributed.device import can_compile, check_precision, set_fp32_precision
from cleangpt.distributed.processes import Ranks
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.layers import AttentionMask, attention, block_mask, document_ids, document_mask, window_mask
from cleangpt.models.llama import LlamaConfig
from cleangpt.models.moe import MixtureOfExperts
from cleangpt.objectives import NextToken
from cleangpt.training.build import build_optimizer
from cleangpt.training.muon import orthogonalize
from cleangpt.training.optimizer import Optimizer
from cleangpt.training.placing import place_model

VOCABULARY, STEPS = 512, 10
ALLOWED = {
    "fp32": (2e-5, 2e-4, 1e-3),
    "tf32": (3e-3, 1e-2, 1e-2),
    "bf16": (2e-2, 6e-2, 3e-2),
    "fp16": (4e-3, 2e-2, 1e-2),
    "fp8": (1.5e-1, 4e-1, 1e-1),
}
"""By precision: the largest error of logits and of the gradient, and difference of the mean loss of ten steps in
nats."""
CPU = torch.device("cpu")


def sizes(setup: Setup) -> dict[str, Any]:
    """Of the models compared; heads have 64 features, as the fused kernels like them."""
    return setup.size(
        {"vocab_size": VOCABULARY, "max_seq_len": 256, "n_layers": 4, "n_heads": 4, "dim": 256},
        {"vocab_size": VOCABULARY, "max_seq_len": 32, "n_layers": 1, "n_heads": 2, "dim": 32},
    )


def models(setup: Setup) -> dict[str, ModelConfig]:
    """The architectures compared: GPT, and Llama with grouped queries, also within documents and a window."""
    llama = LlamaConfig(**sizes(setup), n_kv_heads=2 if not setup.toy else 1)
    window = setup.size(64, 8)
    return {
        "GPT": GPTConfig(**sizes(setup)),
        "Llama": llama,
        "Llama, documents and window": replace(llama, separator=0, sliding_window=window, global_every=2),
    }


def precisions(setup: Setup) -> Iterator[Measurement]:
    """Logits, gradients and ten steps in every precision against the CPU in fp64."""
    for name, model in models(setup).items():
        reference = Reference(setup, model)
        for precision in ALLOWED:
            torch.compiler.reset()  # FlexAttention is recompiled for each precision, up to a limit
            yield from reference.compare(f"{name}, {precision}", precision, "off")


def compiled(setup: Setup) -> Iterator[Measurement]:
    """The same for compiled models and blocks, in bf16."""
    if not can_compile(setup.device):
        raise LeftOut("there is no compiler")
    for name, model in list(models(setup).items())[: setup.size(None, 1)]:
        reference = Reference(setup, model)
        for what in setup.size(("model", "blocks"), ("blocks",)):
            yield from reference.compare(f"{name}, bf16, compiled {what}", "bf16", what)


class Reference:
    """A model on the CPU in fp64, and what it computes."""

    def __init__(self, setup: Setup, config: ModelConfig) -> None:
        self.setup, self.config = setup, config
        self.seq_len = config.max_seq_len or 0
        torch.manual_seed(0)
        self.start = build_model(config)
        self.batches = [random_batch(setup.size(4, 2), self.seq_len) for _ in range(STEPS)]
        model = copy.deepcopy(self.start).double()
        self.logits = model.eval()(**self.batches[0].inputs).detach()
        optimizer = Optimizer(model, self.experiment("fp32", "off").optimizer)
        self.losses, self.gradient = train(model.train(), optimizer, self.batches, nullcontext())

    def experiment(self, precision: str, compiled: str) -> Experiment:
        """Trains the model in a precision."""
        return experiment(
            self.setup, "correct", self.config, seq_len=self.seq_len, batch_size=len(self.batches[0]), steps=STEPS,
            optimizer=OptimizerConfig(lr=1e-3), precision=precision, compile=compiled,
        )  # fmt: skip

    def compare(self, what: str, precision: str, compiled: str) -> Iterator[Measurement]:
        """The errors of logits, gradient and losses on the device."""
        try:
            check_precision(precision, self.setup.device)
        except UserError as error:
            yield Measurement(f"{what}: all", note=str(error))
            return
        planned = self.experiment(precision, compiled)
        placed = place_model(planned, Ranks(), lambda text: None)
        placed.model.load_state_dict(self.start.state_dict())
        optimizer = build_optimizer(planned, placed.model)
        with torch.no_grad(), placed.autocast:
            logits = cast(Tensor, placed.forward_model.eval()(**self.batches[0].to(placed.device).inputs))
        losses, gradient = train(placed.forward_model.train(), optimizer, self.batches, placed.autocast)
        allowed = ALLOWED[precision]
        yield Measurement(f"{what}: logits", error_of(logits, self.logits), most=allowed[0])
        yield Measurement(f"{what}: gradient", error_of(gradient, self.gradient), most=allowed[1])
        difference = (losses - self.losses).abs().mean().item()
        yield Measurement(f"{what}: ten steps", difference, "nats", most=allowed[2])


def random_batch(rows: int, seq_len: int) -> Batch:
    """Tokens and the targets that follow them."""
    tokens = torch.randint(VOCABULARY, (rows, seq_len + 1))
    return Batch({"tokens": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous())


def train(model: LanguageModel, optimizer: Optimizer, batches: Sequence[Batch], context: Any) -> tuple[Tensor, Tensor]:
    """A step on each batch; returns the losses, and the gradient of the first as one vector, on the host."""
    losses: list[Tensor] = []
    gradient = torch.empty(0)
    device = optimizer.parameters[0].device
    for batch in batches:
        with context:
            loss = NextToken()(model, batch.to(device)).total / batch.num_targets
        optimizer.backward(loss)
        scale = optimizer.scaler.get_scale() if optimizer.scaler.is_enabled() else 1.0
        if not losses:
            gradient = torch.cat([cast(Tensor, entry.grad).flatten().cpu() / scale for entry in optimizer.parameters])
        optimizer.step(1e-3, 0.1)
        losses.append(loss.detach().cpu().double())
    return torch.stack(losses), gradient


def error_of(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm of what is right."""
    found, right = found.detach().cpu().double(), right.detach().cpu().double()
    return float((found - right).norm() / right.norm())


# Parts ---------------------------------------------------------------------------------------------------------------


def masks(setup: Setup) -> Iterator[Measurement]:
    """FlexAttention's document and window masks against the dense mask in fp64."""
    torch.manual_seed(0)
    seq, dim, window = setup.size((1024, 64, 200), (128, 16, 40))
    documents = document_ids((torch.rand(2, seq) > 0.01).long(), separator=0)
    shapes = {"query": (2, 8, seq, dim), "key": (2, 2, seq, dim), "value": (2, 2, seq, dim)}
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes.values()]
    outer = torch.randn(shapes["query"], dtype=torch.float64)
    inside, near = document_mask(documents), window_mask(torch.arange(seq), window)
    cases = {
        "documents": (documents, None, inside),
        "documents and window": (documents, window, inside & near),
        "window": (None, window, near),
    }
    for name, (ids, size, dense) in cases.items():
        right = gradients(partial(_attend, dense), inputs, outer)
        ids = None if ids is None else ids.to(setup.device)
        blocks = block_mask(ids, size, seq=seq, device=setup.device)
        for dtype, most in ((torch.float32, 3e-3), (torch.bfloat16, 2e-2)):
            *moved, gradient = [entry.to(setup.device, dtype) for entry in (*inputs, outer)]
            if setup.device.type == "cuda":
                found = gradients(partial(_attend, blocks), moved, gradient)
            else:  # where FlexAttention has no backward pass
                found = [_attend(blocks, *moved)]
            for part, ours, theirs in zip(("output", *(f"d {key}" for key in shapes)), found, right, strict=False):
                yield Measurement(f"{name}, {str(dtype)[6:]}: {part}", error_of(ours, theirs), most=most)


def _attend(mask: AttentionMask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, mask)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], outer: Tensor) -> list[Tensor]:
    """What a function of tensors computes, and its gradients with respect to them."""
    leaves = [entry.clone().requires_grad_() for entry in inputs]
    result = function(*leaves)
    result.backward(outer)  # type: ignore[no-untyped-call]
    return [result.detach(), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def loss_chunks(setup: Setup) -> Iterator[Measurement]:
    """The loss in chunks against the loss at once, on the device."""
    set_fp32_precision("fp32")
    for name, config in list(models(setup).items())[:2]:
        torch.manual_seed(0)
        model = build_model(config).to(setup.device)
        batch = random_batch(4, config.max_seq_len or 0).to(setup.device)
        found = []
        for chunk in (None, 100):
            model.loss_chunk = chunk
            model.zero_grad()
            loss = NextToken()(model, batch).total
            loss.backward()  # type: ignore[no-untyped-call]
            gradient = torch.cat([cast(Tensor, entry.grad).flatten() for entry in model.parameters()])
            found.append((loss.detach(), gradient))
        (loss, gradient), (chunked, chunked_gradient) = found
        yield Measurement(f"{name}: loss", error_of(chunked, loss), most=1e-5)
        yield Measurement(f"{name}: gradient", error_of(chunked_gradient, gradient), most=1e-4)


def cache(setup: Setup) -> Iterator[Measurement]:
    """Greedy tokens with a KV cache, without one, and on the CPU, for prompts of different lengths."""
    set_fp32_precision("fp32")
    count = setup.size(100, 10)
    for name, config in models(setup).items():
        torch.manual_seed(0)
        model = build_model(config).eval()
        prompts = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in (1, 7, 20)]
        right = _greedy(model, CPU, prompts, count)
        model.to(setup.device)
        for what, cached in (("with a cache", True), ("without", False)):
            most = count if cached else count // 5  # without, FlexAttention is compiled for new lengths
            found = _greedy(model, setup.device, prompts, most, cached=cached)
            pairs = [
                pair for ours, theirs in zip(found, right, strict=True) for pair in zip(ours, theirs, strict=False)
            ]
            same = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
            yield Measurement(f"{name}, {what}: tokens equal to the CPU's", 100 * same, "%", least=100)


def _greedy(
    model: LanguageModel, device: torch.device, prompts: list[list[int]], count: int, cached: bool = True
) -> list[list[int]]:
    engine = Engine(model, device, cached=cached)
    return [one.ids for one in engine.generate(prompts, max_new_tokens=count)]


def graphs(setup: Setup) -> Iterator[Measurement]:
    """Steps ahead by a CUDA graph against plain ones: tokens in fp32, log-probabilities in bf16; a model that waits."""
    if setup.device.type != "cuda":
        raise LeftOut("needs CUDA")
    set_fp32_precision("fp32")
    for name, config in models(setup).items():
        torch.manual_seed(0)
        model = build_model(config).eval().to(setup.device)
        for what, sampling in (("greedy", GREEDY), ("sampled", Sampling(temperature=0.9, top_k=50))):
            plain, ahead = (_generated(model, setup.device, patience, sampling) for patience in (None, 4))
            yield Measurement(f"{name}, {what}: the same tokens", float(plain[0] == ahead[0]), least=1)
        with torch.autocast("cuda", torch.bfloat16):
            plain, ahead = (_generated(model, setup.device, patience, GREEDY) for patience in (None, 4))
        gaps = [
            abs(one - other)
            for ids, ahead_ids, logprobs, ahead_logprobs in zip(plain[0], ahead[0], plain[1], ahead[1], strict=True)
            for one, other in zip(logprobs[: in_common(ids, ahead_ids)], ahead_logprobs, strict=False)
        ]
        yield Measurement(f"{name}, bf16: the largest difference of log-probabilities", max(gaps), most=5e-2)
    waiting = build_model(models(setup)["GPT"]).eval().to(setup.device)
    cast(nn.Module, waiting.final_norm).register_forward_hook(lambda module, inputs, output: output * _one(output))
    plain, ahead = (_generated(waiting, setup.device, patience, GREEDY) for patience in (None, 4))
    engine = Engine(model, setup.device)
    engine.generate([[1, 2]], max_new_tokens=80)
    yield Measurement("steps of 79 that a graph has computed", float(engine.steps_ahead), least=70)
    yield Measurement("a model that waits for the device: the same tokens", float(plain[0] == ahead[0]), least=1)


def in_common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def _generated(
    model: LanguageModel, device: torch.device, patience: int | None, sampling: Sampling
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of three prompts, computed ahead after some steps, or not."""
    engine = Engine(model, device, patience=patience)
    found = engine.generate([[1], [2] * 7, [3, 4] * 10], max_new_tokens=80, sampling=sampling)
    return [one.ids for one in found], [one.logprobs for one in found]


def _one(tensor: Tensor) -> float:
    """1, after waiting for the device."""
    return float(tensor.amax() > -torch.inf)


def optimizers(setup: Setup) -> Iterator[Measurement]:
    """AdamW and Muon as training uses them, and PyTorch's capturable AdamW, against the CPU in fp64."""
    torch.manual_seed(0)
    start = build_model(GPTConfig(**sizes(setup)))
    steps = [[torch.randn_like(entry) for entry in start.parameters()] for _ in range(STEPS)]
    for name, muon, most in (("AdamW, fused", MuonConfig(), 1e-5), ("Muon", MuonConfig(lr=1e-3), 1e-1)):
        config = OptimizerConfig(lr=1e-3, muon=muon)
        change = [_change(start, config, steps, *where) for where in ((CPU, torch.float64), (setup.device, None))]
        yield Measurement(f"{name}: change of the weights in ten steps", error_of(change[1], change[0]), most=most)
    matrices = torch.randn(3, *setup.size((256, 1024), (16, 32)))
    values = torch.linalg.svdvals(orthogonalize(matrices.to(setup.device), 5).float().cpu())
    yield Measurement("Muon: singular values of an update, the least", values.min().item(), least=0.5)
    yield Measurement("Muon: singular values of an update, the largest", values.max().item(), most=1.3)
    if setup.device.type != "cuda":
        yield Measurement("AdamW, capturable, in a CUDA graph: change of the weights", note="needs CUDA")
        return
    found, right = (_captured(start, steps[0], setup.device, graph) for graph in (True, False))
    yield Measurement("AdamW, capturable, in a CUDA graph: change of the weights", error_of(found, right), most=1e-5)


def _change(
    start: LanguageModel, config: OptimizerConfig, steps: list[list[Tensor]], device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """How the project's optimizer changes the weights by given gradients."""
    model = copy.deepcopy(start).to(device, dtype)
    optimizer = Optimizer(model, config)
    for gradient in steps:
        for parameter, value in zip(model.parameters(), gradient, strict=True):
            parameter.grad = value.to(device, dtype or parameter.dtype)
        optimizer.step(1e-3, 0.1)
    return _flat(model) - _flat(start)


def _captured(start: LanguageModel, gradient: list[Tensor], device: torch.device, graph: bool) -> Tensor:
    """How ten capturable AdamW steps by the same gradient change the weights, replayed from a graph or not."""
    model = copy.deepcopy(start).to(device)
    for parameter, value in zip(model.parameters(), gradient, strict=True):
        parameter.grad = value.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True, fused=True)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the state is made outside of the graph
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(captured):
            optimizer.step()
    for _ in range(STEPS - 1):
        captured.replay() if graph else optimizer.step()
    return _flat(model) - _flat(start)


def _flat(model: LanguageModel) -> Tensor:
    return torch.cat([entry.detach().cpu().double().flatten() for entry in model.parameters()])


def experts(setup: Setup) -> Iterator[Measurement]:
    """A mixture of experts on the device, which uses a grouped product, against the CPU in fp64."""
    torch.manual_seed(0)
    dim, hidden, count = setup.size((256, 512, 8), (32, 48, 4))
    mixture = MixtureOfExperts(
        dim=dim, hidden_dim=hidden, n_experts=count, experts_per_token=2, normalize_router_weights=True, shared=None
    )
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=dim**-0.5)
    x, outer = torch.randn(2, 4, setup.size(256, 16), dim, dtype=torch.float64)
    # The router reads the first features, in which experts are far apart: rounding must not change a choice.
    torch.nn.init.eye_(mixture.router.weight)
    x[..., :count] = 6 * torch.rand_like(x[..., :count]).argsort(dim=-1) / count - 3
    x[..., count - 1] = -9  # the last expert gets no tokens, and its gradient is to be zero
    right = _with_gradients(copy.deepcopy(mixture).double(), x, outer, torch.float64)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        set_fp32_precision("fp32")
        found = _with_gradients(copy.deepcopy(mixture).to(setup.device), x, outer, dtype)
        names = ("output", "d input", *(f"d {name}" for name, _ in mixture.named_parameters()))
        for name, ours, theirs in zip(names, found, right, strict=True):
            yield Measurement(f"{str(dtype)[6:]}: {name}", error_of(ours, theirs), most=most)


def _with_gradients(mixture: MixtureOfExperts, x: Tensor, outer: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients with products in `dtype`, for the tokens' experts that fp64 would choose."""
    weight = mixture.up
    context: Any = torch.autocast(weight.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    inputs = x.detach().to(weight.device, weight.dtype, copy=True).requires_grad_()
    with context:
        output = mixture(inputs)
    output.backward(outer.to(output.device, output.dtype))
    return [output, cast(Tensor, inputs.grad), *(cast(Tensor, entry.grad) for entry in mixture.parameters())]
