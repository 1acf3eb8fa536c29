"""Steps in which something is not finite: seen without waiting for the device, and named in the log."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement
from torch import Tensor

from mm_sharp.errors import some
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.per_sample_loss.layout import Layout, batch_size
from mm_sharp.samples.keys import SampleIdError, keys_of
from mm_sharp.step.timing import StepRecord

_MOST_NAMES = 16
# A run in which every step fails is to be noticed, not to fill the disk.
_ALL_UP_TO, _THEN_EVERY = 10, 100


class _Noted(NamedTuple):
    step: int
    due: bool
    scaled: bool
    names: Callable[[], str]


class NonFiniteLog:
    """Notes each step's losses, norm and gradient, and logs those that are not finite with the samples' ids."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._noted: deque[tuple[_Noted, HostCopy]] = deque()  # with the values that are on their way
        self.events = 0

    def note(
        self,
        step: int,
        record: StepRecord,
        finite: Tensor | None,
        *,
        scaled: bool,
        at_once: bool,
        names: Callable[[], str],
    ) -> None:
        """Take up the rest of a step, given its number and record.

        Args:
            finite: Whether the final gradient is, scalar; None if a step is not due, or is the loss scaler's to decide.
            scaled: Whether losses are scaled: gradients that are not finite are then the scaler's, and no event.
            at_once: Whether the host need not wait for the values.
            names: Gives the samples in question, for the message.
        """
        noted, loss = _Noted(step, finite is not None, scaled, names), record.loss
        seen = [record.perturbed_loss, record.grad_norm, finite]
        tensors = [loss, *[loss if value is None else value for value in seen]]
        if at_once:
            self._report_if_not_finite(noted, *map(float, tensors))
            return
        values = torch.stack([value.detach().to(loss.device, torch.float32) for value in tensors])
        self._noted.append((noted, HostCopy(values)))

    def flush(self) -> None:
        """Log what was noted, as far as it has arrived: waiting for it would be waiting for the whole step."""
        while self._noted and self._noted[0][1].ready:
            noted, values = self._noted.popleft()
            self._report_if_not_finite(noted, *values.numpy().tolist())

    def _report_if_not_finite(self, noted: _Noted, first: float, second: float, norm: float, final: float) -> None:
        losses_finite = math.isfinite(first) and math.isfinite(second)
        steps = bool(final) if noted.due else None
        if not losses_finite or (not noted.scaled and not (math.isfinite(norm) and steps is not False)):
            self._report(noted, _what(first, second, norm), _consequence(noted, norm, steps), losses_finite)

    def _report(self, noted: _Noted, what: str, consequence: str, losses_finite: bool) -> None:
        self.events += 1
        if self.events > _ALL_UP_TO and self.events % _THEN_EVERY:
            return
        message = f'{self._owner}, step {noted.step}: {what}; {consequence}. Samples: {noted.names()}'
        if self.events >= _ALL_UP_TO:
            message += f' ({self.events} such steps so far; from now on every {_THEN_EVERY}th is logged)'
        # Other ranks than the first log errors only, and nobody else knows these samples.
        level = logging.ERROR if get_rank() and not losses_finite else logging.WARNING
        print_log(message, logger='current', level=level)


def _what(first: float, second: float, norm: float) -> str:
    if not math.isfinite(first):
        return f'the loss is {first}'
    if not math.isfinite(second):
        return f'the loss at the perturbed weights is {second}'
    if not math.isfinite(norm):
        return "the first pass's gradient is not finite"
    return 'the final gradient is not finite, and the losses of this batch are'


def _consequence(noted: _Noted, norm: float, steps: bool | None) -> str:
    if steps is False:
        return 'the optimizer does not step'
    if steps:
        without = ' without a perturbation' if not math.isfinite(norm) else ''
        return f'the final gradient is finite, and the optimizer steps{without}'
    return 'the loss scaler decides on the step' if noted.scaled else 'its gradient is part of an accumulated one'


def offending_samples(owner: str, call: ModelCall, rows: list[int] | None = None) -> str:
    """The samples of a call that may be the cause, as text, for the class ``owner``.

    ``rows`` are named where no row of the arguments has a number that is not finite; by default the whole batch.
    """
    size = batch_size(call.args, call.kwargs) or 0
    if not size:
        return 'none, the batch is empty'
    rows = _rows_not_finite(call, size) or rows or list(range(size))
    try:
        keys = keys_of(call.args, call.kwargs, size, owner)
    except SampleIdError:
        return f'rows {rows[:_MOST_NAMES]} of a batch of {size}, which have no ids'
    named = [f'{name}:{number}' if name else str(number) for name, number in (keys[row] for row in rows)]
    return some(named, _MOST_NAMES)


def _rows_not_finite(call: ModelCall, size: int) -> list[int]:
    """Rows of the call's arguments, tensors and data samples, in which a number is not finite."""
    layout = Layout(size, lists_of_samples=True).split_call(call.args, call.kwargs)
    return [row for row in range(size) if not all(map(_finite, layout.sample(row)))]


def _finite(value: Any) -> bool:
    """Whether all numbers of a sample are finite."""
    if isinstance(value, np.ndarray) and value.dtype.kind == 'f':
        return bool(np.isfinite(value).all())
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, BaseDataElement):
        value = value.values()
    elif isinstance(value, Mapping):
        value = list(value.values())
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True
