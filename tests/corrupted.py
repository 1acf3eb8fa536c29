"""Batches with numbers that are not finite, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger
from torch import Tensor, nn

from mm_sharp.ops.finite import all_finite
from mm_sharp.step.wrapper import TwoPassOptimWrapper
from tests.toys import Batch


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What MMEngine's logger gets."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def spoil(batch: Batch, field: str, value: float, row: int = 3) -> Batch:
    """The batch with one number of one sample replaced."""
    corrupted = {key: tensor.clone() for key, tensor in batch.items()}
    corrupted[field][row].view(-1)[0] = value
    return corrupted


def finite(model: nn.Module, wrapper: TwoPassOptimWrapper) -> bool:
    """Whether weights, buffers, gradients and the optimizer's state are."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [v for state in wrapper.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return bool(all_finite([tensor for tensor in tensors if tensor.is_floating_point()]))
