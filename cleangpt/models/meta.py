"""Models on the meta device, and models without initialization."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class SkipInit(TorchFunctionMode):
    """A context in which `torch.nn.init` does nothing, so that parameters stay uninitialized."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of PyTorch, unless it is one of `torch.nn.init`."""
        if getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which models have shapes but no memory.

    Initialization is skipped: on the meta device it would import PyTorch's compiler, which takes seconds.
    """
    with torch.device("meta"), SkipInit():
        yield
