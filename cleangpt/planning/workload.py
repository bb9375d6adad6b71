"""The work of one forward and backward pass, counted on fake tensors: nothing is computed or allocated.

The model runs with one and with two of its blocks. The difference is a block; what remains is the rest: embedding,
last norm, head and loss. So a model of any depth takes a second or two, and the count is that of the code that trains.
More than 400 lines, since what is counted and how it is counted are read together.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective
from cleangpt.planning.fake_batch import chosen, fake_batch

aten = torch.ops.aten

LOOKUPS = {aten.embedding, aten.nll_loss_forward, aten.nll_loss_backward}
"""Operations that read only a few entries of a large tensor."""


@dataclass(frozen=True)
class Work:
    """The work of one pass."""

    matmul_flops: float = 0.0
    """In matrix products."""
    attention_flops: float = 0.0
    """In fused attention, of which a causal mask saves half."""
    bytes: float = 0.0
    """Read and written by the other operations, each by itself."""
    fused_bytes: float = 0.0
    """The same if everything between two products is fused, as when compiled: what products write and read."""
    operands: float = 0.0
    """Elements that enter matrix products."""
    results: float = 0.0
    """Bytes that matrix products and fused attention write."""
    communication: float = 0.0
    """Bytes between devices under tensor parallelism."""
    collectives: float = 0.0
    """Collectives that communicate them."""
    kernels: float = 0.0
    """Kernels launched, those of products included."""
    products: float = 0.0
    """Matrix products and fused attention."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(Work)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(getattr(self, entry.name) * factor for entry in fields(Work)))

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1


@dataclass(frozen=True)
class Passes:
    """The passes of a block, or of the rest of the model, for one micro-batch."""

    forward: Work
    backward: Work
    saved_activations: float
    """Bytes saved for the backward pass."""
    recomputed: Work = Work()
    """Recomputed in the backward pass."""


@dataclass(frozen=True)
class Workload:
    """A micro-batch on a device with the whole model. Sizes are in bytes, parameters are counted."""

    block: Passes
    rest: Passes
    blocks: int
    block_parameters: int
    rest_parameters: int
    block_input: float
    """Size of a block's input."""
    transient: float
    """Memory at the peak besides saved activations: gradients of activations and copies of the logits."""
    gathered: float
    """Inputs of a block's layers of kind "column" in the tensor plan; under tensor parallelism each gathers its own."""
    logits: float
    """Size of the logits, of all chunks together."""
    copied: float
    """Size of autocast's copies of a block's weights."""
    head_gradients: float
    """Size of the head's gradient of a chunk and of the sum over chunks, with autocast's copies."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.blocks * self.block_parameters + self.rest_parameters

    def compiled(self, chunks: int) -> "Workload":
        """The same, compiled: of a block, its input, autocast's copies of its weights and the results of products are
        saved, from which the backward pass recomputes the rest."""
        saved = min(self.block.saved_activations, self.block_input + self.copied + self.block.forward.results)
        return replace(self.with_compiled_loss(chunks), block=replace(self.block, saved_activations=saved))

    def with_compiled_loss(self, chunks: int = 1) -> "Workload":
        """The same, with a loss that has one copy of the logits of a chunk, and one of their gradient, from which it
        computes that of the head."""
        rest, part = self.rest, self.logits / chunks
        forward, backward = (
            replace(work, bytes=min(work.bytes, work.fused_bytes)) for work in (rest.forward, rest.backward)
        )
        whole = rest.saved_activations if chunks > 1 else min(rest.saved_activations, part)
        transient = min(self.transient, 2 * part + self.head_gradients if chunks > 1 else part)
        return replace(self, rest=Passes(forward, backward, whole), transient=transient)

    def recomputed_block(self, selective: bool = False) -> Passes:
        """A block under activation checkpointing: it saves its input and runs forward twice; if `selective`, it also
        saves the results of matrix products and attention, and does not compute these again."""
        if not selective:
            return replace(self.block, saved_activations=self.block_input, recomputed=self.block.forward)
        forward = self.block.forward
        again = replace(forward, matmul_flops=0.0, attention_flops=0.0, kernels=forward.kernels - forward.products)
        again = replace(again, products=forward.products / 2)  # the kernels between them, when compiled
        return replace(self.block, saved_activations=self.block_input + forward.results, recomputed=again)


def measure(
    model: LanguageModel, objective: Objective, batch: int, seq_len: int, dtype: torch.dtype, gathered: bool
) -> Workload:
    """Counts the work of a micro-batch `(batch, seq_len)`.

    Args:
        model: on the meta device, with identical `layers()`.
        objective: the loss.
        batch: samples in the micro-batch.
        seq_len: tokens in a sample.
        dtype: of matrix products.
        gathered: whether weights are gathered in `dtype`, as by FSDP; else autocast copies them, as under DDP.

    Raises:
        UserError: the model has no blocks, or reads what is not known here, or shapes depend on values.
    """
    name, blocks = type(model).__name__, model.layers()
    if not len(blocks):
        raise UserError(f"{name} cannot be planned: its `layers` are empty")
    all_blocks = list(blocks)
    in_blocks = sum(parameter.numel() for parameter in blocks.parameters())
    in_rest = sum(parameter.numel() for parameter in model.parameters()) - in_blocks
    traces = []
    try:
        for few in (all_blocks[:1], [all_blocks[0], copy.deepcopy(all_blocks[0])]):
            _replace_blocks(blocks, few)
            traces.append(_trace(model, objective, (batch, seq_len), dtype, gathered))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"{name} cannot be planned: shapes in it depend on values ({error})") from None
    finally:
        _replace_blocks(blocks, all_blocks)
    one, two = traces
    copies = dtype.itemsize if dtype != torch.float32 and not gathered else 0
    head = sum(parameter.numel() for parameter in model.head_parameters())
    saved = two.saved_activations - one.saved_activations
    block = Passes(two.forward - one.forward, two.backward - one.backward, saved)
    rest = Passes(one.forward - block.forward, one.backward - block.backward, one.saved_activations - saved)
    within = Work(communication=one.sizes["gathered"] + one.sizes["scattered"], collectives=one.sizes["layers"])
    # Embeddings, the head's input and the logits.
    outside = Work(communication=2 * one.sizes["block_input"] + one.sizes["logits"], collectives=3)
    return Workload(
        block=_with_communication(block, within),
        rest=_with_communication(rest, outside),
        blocks=len(blocks),
        block_parameters=in_blocks // len(blocks),
        rest_parameters=in_rest,
        transient=one.peak - one.saved_activations,
        block_input=one.sizes["block_input"],
        gathered=one.sizes["gathered"],
        logits=one.sizes["logits"],
        copied=two.copied - one.copied,
        head_gradients=2 * head * ((dtype.itemsize if gathered else torch.float32.itemsize) + copies),
    )


def _replace_blocks(blocks: nn.ModuleList, others: Sequence[nn.Module]) -> None:
    """Replaces the blocks of a model in place."""
    del blocks[:]
    blocks.extend(others)


def _with_communication(passes: Passes, communication: Work) -> Passes:
    """Adds the same communication to each pass: what one gathers, the other reduces and scatters."""
    return replace(passes, forward=passes.forward + communication, backward=passes.backward + communication)


@dataclass(frozen=True)
class _Trace:
    """Counts of the whole model's passes, and the sizes from `_record_sizes`."""

    forward: Work
    backward: Work
    saved_activations: float
    peak: float
    sizes: dict[str, float]
    copied: float


def _trace(
    model: LanguageModel, objective: Objective, shape: tuple[int, int], dtype: torch.dtype, gathered: bool
) -> _Trace:
    """Runs one forward and backward pass on fake tensors."""
    counter, sizes = _Counter(), dict.fromkeys(("block_input", "gathered", "scattered", "layers", "logits"), 0.0)
    with FakeTensorMode(), _record_sizes(model, sizes):
        fake_model = _FakeModel(model, dtype if gathered else torch.float32)
        counter.register_weights(fake_model.weights.values())
        batch = fake_batch(model, objective, torch.zeros(shape, dtype=torch.long))
        with counter, _LikeGPU(counter), warnings.catch_warnings():
            # RMSNorm of bf16 features with fp32 gains has no fused kernel on a CPU, which is not what is planned for.
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and not gathered):
                loss = objective(cast(LanguageModel, fake_model), batch).total
            forward, saved_activations = counter.take(), counter.allocated
            loss.backward()  # type: ignore[no-untyped-call]
            backward = counter.take()
    return _Trace(forward, backward, saved_activations, counter.peak, sizes, counter.copied)


class _FakeModel(nn.Module):
    """Calls a model with fake weights instead of its own; their gradients are freed at once."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.wrapped = [model]  # in a list, so that its parameters are not this module's
        self.weights: dict[str, Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            weight_dtype = dtype if tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=weight_dtype, requires_grad=tensor.requires_grad)
            self.weights[name] = fake
            if tensor.requires_grad:
                after_gradient = fake.register_post_accumulate_grad_hook
                after_gradient(lambda weight: setattr(weight, "grad", None))  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return functional_call(self.wrapped[0], self.weights, args, kwargs)


@contextmanager
def _record_sizes(model: LanguageModel, sizes: dict[str, float]) -> Iterator[None]:
    """Records bytes: of the first block's input, of what its layers communicate under tensor parallelism and how many
    of these layers there are, and of the logits."""

    def record(name: str, of_input: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            sizes[name] += _bytes(inputs[0] if of_input else output)

        return hook

    def record_logits(logits: Tensor) -> Tensor:
        sizes["logits"] += _bytes(logits)
        return logits

    first = model.layers()[0]
    prefix = next(name for name, module in model.named_modules() if module is first).removesuffix("0")
    hooks = [first.register_forward_hook(record("block_input", of_input=True))]
    model.gather_logits = record_logits
    for path, module in first.named_modules():
        kind = model.tensor_plan.get(f"{prefix}*.{path}")
        if kind in ("column", "row"):
            name = "gathered" if kind == "column" else "scattered"
            sizes["layers"] += 1
            hooks.append(module.register_forward_hook(record(name, of_input=kind == "column")))
    try:
        yield
    finally:
        model.gather_logits = None
        for hook in hooks:
            hook.remove()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the work of every operation while active, and the bytes of live tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self.allocated = self.peak = self.copied = 0.0
        self.alive: set[int] = set()
        self.weights: set[int] = set()
        self.weight_shapes: set[tuple[int, ...]] = set()
        self.parameters: set[int] = set()

    def register_weights(self, weights: Iterable[Tensor]) -> None:
        """Distinguishes weights from activations."""
        for weight in weights:
            self.weights.add(_storage(weight))
            self.parameters.add(_storage(weight))
            self.weight_shapes |= {tuple(weight.shape), tuple(weight.shape[::-1])}

    def take(self) -> Work:
        """The work since the last call."""
        taken, self.work = self.work, Work()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        operation = func._overloadpacket
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **(kwargs or {}), out_val=result)
            elements, written = sum(entry.numel() for entry in inputs[-2:]), sum(map(_bytes, outputs))
            self.work += Work(matmul_flops=flops, operands=elements, results=written, kernels=1, products=1)
            self.count_activations(inputs, outputs)
        elif outputs and not _is_free(func, inputs, outputs):
            touched = outputs if operation in LOOKUPS else inputs + outputs
            self.work += Work(bytes=sum(map(_bytes, touched)), kernels=1)
            if inputs and _storage(inputs[0]) in self.weights and operation is aten._to_copy:
                # Autocast's copy of a weight: a weight too, copied again for every micro-batch, compiled or not.
                self.weights |= {_storage(entry) for entry in outputs}
                self.work += Work(fused_bytes=sum(map(_bytes, touched)))
                self.copied += sum(map(_bytes, outputs))
        for entry in outputs:
            self.allocate(entry)
        return result

    def count_activations(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Counts the activations that a matrix product reads and writes, without weights and their gradients."""
        read = [entry for entry in inputs if _storage(entry) not in self.weights]
        if len(read) == len(inputs):
            outputs = [entry for entry in outputs if tuple(entry.shape) not in self.weight_shapes]
        self.work += Work(fused_bytes=sum(map(_bytes, read + outputs)))

    def allocate(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is freed; weights are counted elsewhere."""
        key, storage = _storage(tensor), tensor.untyped_storage()
        if key in self.alive or key in self.parameters:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """Subtracts the memory of a freed tensor, whose address may be reused."""
        self.alive.discard(key)
        self.weights.discard(key)
        self.allocated -= size


class _LikeGPU(TorchFunctionMode):
    """Does what a GPU does and fake tensors do not: attention is fused, a router spreads tokens evenly, and masks
    choose everything."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            share = 0.5 if kwargs.get("is_causal", False) else 1.0
            return _Attention.apply(*args[:3], share, self.counter)  # type: ignore[no-untyped-call]
        if func is torch.Tensor.bincount:
            tokens, experts = args[0].numel(), kwargs["minlength"]
            with unset_fake_temporarily():
                return torch.arange(1, experts + 1) * tokens // experts - torch.arange(experts) * tokens // experts
        result = chosen(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


class _Attention(torch.autograd.Function):
    """FlashAttention-2 (Dao 2023): saves query, key, value, output and one number per row.

    The backward pass has five matrix products, the forward pass two.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, share: float, counter: _Counter) -> Tensor:
        """`(batch, heads, seq, head_dim)`, fewer heads of key and value; `share`: what a mask leaves to compute."""
        result = _sequence_first(query, value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows)
        ctx.counter = counter
        ctx.flops = 2 * share * query.numel() // query.shape[-1] * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        touched = sum(map(_bytes, (query, key, value, result)))
        written = _bytes(result) + _bytes(rows)
        counter.work += Work(attention_flops=ctx.flops, fused_bytes=touched, results=written, kernels=1, products=1)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of query, key and value."""
        query, key, value, result, _ = ctx.saved_tensors
        ours = [_sequence_first(entry, entry.shape[-1]) for entry in (query, key, value)]
        touched = sum(map(_bytes, [query, key, value, result, *gradients, *ours]))
        ctx.counter.work += Work(attention_flops=2.5 * ctx.flops, fused_bytes=touched, kernels=1, products=1)
        return *ours, None, None


def _sequence_first(like: Tensor, features: int) -> Tensor:
    """A new `(batch, heads, seq, features)` in the memory layout of fused kernels: a token's heads are adjacent."""
    batch, heads, seq, _ = like.shape
    return like.new_empty((batch, seq, heads, features)).transpose(1, 2)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Identifies the memory of a tensor and all its views."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _bytes(tensor: Tensor) -> int:
    """Bytes that reading a tensor moves; of an expanded one, its memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_free(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation moves no bytes: a view, or uninitialized memory."""
    is_view = not func._schema.is_mutable and {_storage(entry) for entry in outputs} <= {_storage(e) for e in inputs}
    return is_view or "empty" in func._overloadpacket.__name__
