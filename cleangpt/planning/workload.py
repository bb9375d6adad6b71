"""What one forward and backward pass does, counted on fake tensors: nothing is computed and nothing is allocated.

The model runs with one and with two of its blocks. The difference is a block; what remains is the rest: embedding,
last norm, head and loss. So a model of any depth takes a second or two, and the count follows the code that trains.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
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

from cleangpt.data.batch import Batch
from cleangpt.errors import UserError
from cleangpt.models.base import LanguageModel
from cleangpt.objectives import Objective

aten = torch.ops.aten

READS_LITTLE = {aten.embedding, aten.nll_loss_forward, aten.nll_loss_backward}
"""Operations that look up a few entries of a large tensor."""


@dataclass(frozen=True)
class Work:
    """What is done in one pass."""

    matmul_flops: float = 0.0
    """In products of matrices."""
    attention_flops: float = 0.0
    """In fused attention, of which a causal mask spares half."""
    moved: float = 0.0
    """Bytes to and from memory by the other operations, each for itself."""
    fused: float = 0.0
    """The same where all between two products is one operation, as compiled: what products take in and give out."""
    operands: float = 0.0
    """Numbers that enter products of matrices."""
    exchanged: float = 0.0
    """Bytes between devices that share matrices, if these are cut."""
    exchanges: float = 0.0
    """Over how many exchanges they are spread."""
    operations: float = 0.0
    """Kernels started, those of the products among them."""
    products: float = 0.0
    """Products of matrices, and fused attention."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(Work)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(getattr(self, entry.name) * factor for entry in fields(Work)))

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1


@dataclass(frozen=True)
class Part:
    """A block, or the rest of the model, for one micro-batch."""

    forward: Work
    backward: Work
    kept: float
    """Bytes that wait for the backward pass."""
    again: Work = Work()
    """What is computed again in the backward pass."""


@dataclass(frozen=True)
class Workload:
    """A micro-batch on a device that has the whole model. Sizes in bytes, parameters in numbers."""

    block: Part
    rest: Part
    blocks: int
    block_parameters: int
    rest_parameters: int
    block_input: float
    """What a block reads from the one before it."""
    passing: float
    """Memory over what is kept, at the peak: gradients of activations and copies of the logits."""
    gathered: float
    """Inputs of a block's layers of kind "column" in the tensor plan: if matrices are cut, each gathers its own."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.blocks * self.block_parameters + self.rest_parameters

    def recomputed(self) -> Part:
        """A block under activation checkpointing: it keeps its input and runs forward twice."""
        return replace(self.block, kept=self.block_input, again=self.block.forward)


def measure(
    model: LanguageModel, objective: Objective, batch: int, seq_len: int, dtype: torch.dtype, gathered: bool
) -> Workload:
    """Counts a micro-batch `(batch, seq_len)` of a model.

    Args:
        model: on the meta device; its blocks are `model.blocks`, all alike.
        objective: from OBJECTIVES.
        batch: samples in the micro-batch.
        seq_len: tokens in a sample.
        dtype: what matrices are multiplied in.
        gathered: whether the weights are gathered in `dtype`, as under fsdp; else autocast copies them, as under ddp.

    Raises:
        UserError: the model has no blocks, or the shapes in it depend on values.
    """
    blocks = model.layers()
    if not len(blocks):
        raise UserError(f"{type(model).__name__} cannot be planned: its `layers` are none")
    in_block = sum(parameter.numel() for parameter in blocks.parameters()) // len(blocks)
    in_rest = sum(parameter.numel() for parameter in model.parameters()) - in_block * len(blocks)
    try:
        one, two = (_trace(model, blocks, depth, objective, (batch, seq_len), dtype, gathered) for depth in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"{type(model).__name__} cannot be planned: shapes in it depend on values ({error})") from None
    finally:
        model.blocks = blocks
    block = Part(two.forward - one.forward, two.backward - one.backward, two.kept - one.kept)
    rest = Part(one.forward - block.forward, one.backward - block.backward, one.kept - block.kept)
    within = Work(exchanged=one.sizes["gathered"] + one.sizes["scattered"], exchanges=one.sizes["layers"])
    # Embeddings, the head's input and the logits.
    outside = Work(exchanged=2 * one.sizes["block_input"] + one.sizes["logits"], exchanges=3)
    return Workload(
        block=_exchanging(block, within),
        rest=_exchanging(rest, outside),
        blocks=len(blocks),
        block_parameters=in_block,
        rest_parameters=in_rest,
        passing=one.peak - one.kept,
        block_input=one.sizes["block_input"],
        gathered=one.sizes["gathered"],
    )


def _exchanging(part: Part, exchange: Work) -> Part:
    """With an exchange in each pass: what is gathered in one is reduced and scattered in the other."""
    return replace(part, forward=part.forward + exchange, backward=part.backward + exchange)


@dataclass(frozen=True)
class _Trace:
    """Counts of a whole pass, and the sizes that `_sizes_seen` fills in."""

    forward: Work
    backward: Work
    kept: float
    peak: float
    sizes: dict[str, float]


def _trace(
    model: LanguageModel, blocks: nn.ModuleList, depth: int, objective: Objective, shape: tuple[int, int],
    dtype: torch.dtype, gathered: bool,
) -> _Trace:  # fmt: skip
    """One forward and backward pass of the first `depth` blocks (a copy of the first, where there is one)."""
    model.blocks = nn.ModuleList([*blocks, copy.deepcopy(blocks[0])][:depth])
    counter, sizes = _Counter(), dict.fromkeys(("block_input", "gathered", "scattered", "layers", "logits"), 0.0)
    with FakeTensorMode(), _sizes_seen(model, sizes):
        stand_in = _StandIn(model, dtype if gathered else torch.float32)
        counter.know(stand_in.weights.values())
        tokens = torch.zeros(shape, dtype=torch.long)
        with counter, _Pretended(counter), warnings.catch_warnings():
            # RMSNorm of bf16 features with fp32 gains has no fused kernel on a CPU, which is not what is planned for.
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and not gathered):
                loss = objective(cast(LanguageModel, stand_in), Batch({"tokens": tokens}, tokens)).total
            forward, kept = counter.take(), counter.held
            loss.backward()  # type: ignore[no-untyped-call]
            backward = counter.take()
    return _Trace(forward, backward, kept, counter.peak, sizes)


class _StandIn(nn.Module):
    """A model called with fake weights in the place of its own; their gradients are dropped as they come."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.called = [model]  # in a list, so that its parameters are not this module's
        self.weights: dict[str, Tensor] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            of = dtype if tensor.is_floating_point() else tensor.dtype
            self.weights[name] = fake = torch.empty(tensor.shape, dtype=of, requires_grad=tensor.requires_grad)
            if tensor.requires_grad:
                drop = fake.register_post_accumulate_grad_hook
                drop(lambda weight: setattr(weight, "grad", None))  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model does."""
        return functional_call(self.called[0], self.weights, inputs, named)


@contextmanager
def _sizes_seen(model: LanguageModel, sizes: dict[str, float]) -> Iterator[None]:
    """Fills in the bytes that enter the first block, that its layers exchange if cut and how many of these there are,
    and that leave the model."""

    def note(name: str, of_input: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            sizes[name] += _bytes(inputs[0] if of_input else output)

        return hook

    def note_logits(logits: Tensor) -> Tensor:
        sizes["logits"] += _bytes(logits)
        return logits

    first, plan = model.layers()[0], model.tensor_plan
    hooks = [first.register_forward_hook(note("block_input", of_input=True))]
    model.gather_logits = note_logits
    for path, module in first.named_modules():
        kind = plan.get(f"blocks.*.{path}")
        if kind in ("column", "row"):
            name = "gathered" if kind == "column" else "scattered"
            sizes["layers"] += 1
            hooks.append(module.register_forward_hook(note(name, of_input=kind == "column")))
    try:
        yield
    finally:
        model.gather_logits = None
        for hook in hooks:
            hook.remove()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operation while it is on, and the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self.held = self.peak = 0.0
        self.alive: set[int] = set()
        self.weights: set[int] = set()
        self.weight_shapes: set[tuple[int, ...]] = set()
        self.parameters: set[int] = set()

    def know(self, weights: Iterable[Tensor]) -> None:
        """Tells the weights apart from what is computed."""
        for weight in weights:
            self.weights.add(_storage(weight))
            self.parameters.add(_storage(weight))
            self.weight_shapes |= {tuple(weight.shape), tuple(weight.shape[::-1])}

    def take(self) -> Work:
        """What was counted since the last call."""
        taken, self.work = self.work, Work()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        operation = func._overloadpacket
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **(kwargs or {}), out_val=result)
            numbers = sum(entry.numel() for entry in inputs[-2:])
            self.work += Work(matmul_flops=flops, operands=numbers, operations=1, products=1)
            self.between(inputs, outputs)
        elif outputs and not _is_free(func, inputs, outputs):
            touched = outputs if operation in READS_LITTLE else inputs + outputs
            self.work += Work(moved=sum(map(_bytes, touched)), operations=1)
            if inputs and _storage(inputs[0]) in self.weights and operation is aten._to_copy:
                # Autocast's copy of a weight: a weight too, made anew for every micro-batch whether compiled or not.
                self.weights |= {_storage(entry) for entry in outputs}
                self.work += Work(fused=sum(map(_bytes, touched)))
        for entry in outputs:
            self.hold(entry)
        return result

    def between(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Counts the activations that a product takes and gives; weights and their gradients are not among them."""
        taken = [entry for entry in inputs if _storage(entry) not in self.weights]
        if len(taken) == len(inputs):
            outputs = [entry for entry in outputs if tuple(entry.shape) not in self.weight_shapes]
        self.work += Work(fused=sum(map(_bytes, taken + outputs)))

    def hold(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is freed; weights are counted elsewhere."""
        key, storage = _storage(tensor), tensor.untyped_storage()
        if key in self.alive or key in self.parameters:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        """A tensor's memory is free again; the next may have the same address."""
        self.alive.discard(key)
        self.weights.discard(key)
        self.held -= size


class _Pretended(TorchFunctionMode):
    """What a GPU does otherwise than fake tensors would: attention is fused, and a router spreads tokens evenly."""

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
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Attention as FlashAttention-2 does it (Dao 2023): keeps query, key, value, result and one number for each row.

    The backward pass has five products of matrices for the forward pass's two.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, share: float, counter: _Counter) -> Tensor:
        """`(batch, heads, seq, head_dim)`; key and value may have fewer heads. `share`: what a mask leaves to do."""
        result = _sequence_first(query, value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows)
        ctx.counter = counter
        ctx.flops = 2 * share * query.numel() // query.shape[-1] * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        touched = sum(map(_bytes, (query, key, value, result)))
        counter.work += Work(attention_flops=ctx.flops, fused=touched, operations=1, products=1)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of the three tensors."""
        query, key, value, result, _ = ctx.saved_tensors
        ours = [_sequence_first(entry, entry.shape[-1]) for entry in (query, key, value)]
        touched = sum(map(_bytes, [query, key, value, result, *gradients, *ours]))
        ctx.counter.work += Work(attention_flops=2.5 * ctx.flops, fused=touched, operations=1, products=1)
        return *ours, None, None


def _sequence_first(like: Tensor, features: int) -> Tensor:
    """A new `(batch, heads, seq, features)`, in memory as the fused kernels have it: a token's heads together."""
    batch, heads, seq, _ = like.shape
    return like.new_empty((batch, seq, heads, features)).transpose(1, 2)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Tells memory apart, whichever view of it is at hand."""
    address: int = tensor.untyped_storage()._cdata
    return address


def _bytes(tensor: Tensor) -> int:
    """What reading a tensor moves; of one that repeats its numbers, these once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_free(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation moves nothing: a view, or memory without values."""
    is_view = not func._schema.is_mutable and {_storage(entry) for entry in outputs} <= {_storage(e) for e in inputs}
    return is_view or "empty" in func._overloadpacket.__name__
