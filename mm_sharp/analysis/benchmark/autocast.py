"""Mixed precision for the base optimizer, where MMEngine's own wrapper refuses, and for bare passes (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.ops.precision import Precision


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):  # type: ignore[misc]
    """What MMEngine's ``AmpOptimWrapper`` does, on any device: for the benchmark alone.

    ``AmpOptimWrapper`` refuses the CPU. A plain step in float32 would be no base to compare methods under autocast
    with, so this is MMEngine's ``OptimWrapper`` with its forward under ``torch.autocast`` and, for float16, its
    backward and step through torch's ``GradScaler``; nothing of the sharpness-aware wrappers but how they read the
    two arguments.

    Args:
        dtype: ``'float16'`` or ``'bfloat16'``.
        loss_scale: As for the sharpness-aware wrappers; without effect for bfloat16.
        kwargs: :class:`mmengine.optim.OptimWrapper`'s.
    """

    def __init__(self, optimizer: Optimizer, dtype: str = 'bfloat16', loss_scale: Any = 'dynamic', **kwargs: Any):
        super().__init__(optimizer, **kwargs)
        device = optimizer.param_groups[0]['params'][0].device
        self._precision = Precision(type(self).__name__, dtype, loss_scale, device)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast around the forward."""
        with super().optim_context(model), self._precision.autocast():
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Back-propagate the scaled loss and count one micro-batch."""
        super().backward(self._precision.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Clip, if asked to, and step."""
        if self.clip_grad_kwargs:
            self._precision.unscale(self.optimizer)
            self._clip_grad()
        self._precision.step(self.optimizer, **kwargs)


def autocast_to(dtype: str | None, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward pass.

    Args:
        dtype: ``'bfloat16'`` or ``'float16'``; None for no autocast.
        device: Where the model is.
    """
    return nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=getattr(torch, dtype))
