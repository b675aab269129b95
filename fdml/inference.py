"""Looking at a model without touching it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def inference(model: Callable) -> Iterator[None]:
    """Eval mode and frozen parameters inside the block; every module's own mode and every parameter's flag after it.

    What an attack needs: gradients of the input alone, BatchNorm by its running statistics, and nothing left behind. A
    callable that is no ``nn.Module`` passes through.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    flags = [(p, p.requires_grad) for p in model.parameters()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
