"""What is not finite stays out of a training: gradients, buffers, and a line in the log.

Along a final gradient that is not finite the optimizer does not step. Where the first forward has left a buffer not
finite that was finite before (the variance of a huge sample overflows, though the loss does not), the model's state is
put back. On an accelerator the host does not know it in time and does not wait for it: the optimizer steps along a
gradient of zero, and the state is put back when the next step begins. :mod:`mm_sharp.step.nonfinite_log` logs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mm_sharp.ops.finite import TRUE, all_finite, quickly_finite, zero_unless
from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.fsdp import any_rank
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.step.nonfinite_log import NonFiniteLog
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.timing import StepRecord


class NonFiniteGuard:
    """Keeps values that are not finite out of the weights and of the model's ``state``; ``owner`` is for messages."""

    def __init__(self, owner: str, device: torch.device, parallel: ParallelModel, state: ForwardState) -> None:
        self.host_knows = device.type == 'cpu'  # at once what is finite; elsewhere it would have to wait
        self.unknown: Tensor | None = None  # what verdict() has found last, where the host does not know it
        self._device = device
        self._parallel = parallel
        self._log = NonFiniteLog(owner)
        self._state = state
        self._corrupted: HostCopy | bool = False
        self._has_begun = False  # where the host knows: the state is still to be looked at

    def next_step(self) -> None:
        """Deal with what the last step has shown, and have nothing kept."""
        self._flush()
        self._state.discard()  # an earlier forward may have been left without the rest of its step

    def begin(self) -> None:
        """Record whether the first forward's state is finite, before anything else runs.

        Copied now, it is on the host when the next step begins; later, the host would wait for all of this step.
        """
        if self.host_knows:
            self._has_begun = True
            return
        found = self._state.newly_not_finite()
        self._corrupted = HostCopy(found) if isinstance(found, Tensor) else found

    def forget(self) -> None:
        """Forget a step that failed."""
        self._corrupted, self._has_begun = False, False

    def verdict(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Whether the final gradient is finite, scalar of bool; of a sharded model the same in all processes.

        On an accelerator the gradients of the optimizer's ``parameters`` are zero afterwards unless it is.
        """
        gradients = self._parallel.pieces([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.host_knows and quickly_finite([*gradients, *self._state.statistics]):
            self._has_begun = False
            finite = TRUE
        else:
            finite = all_finite(gradients)
        if self._parallel.shards is not None:
            finite = ~any_rank(~finite.to(self._device))
        if not self.host_knows:
            zero_unless(finite, gradients)
            self.unknown = finite
        return finite

    def end(
        self, step: int, record: StepRecord, finite: Tensor | None, *, scaled: bool, names: Callable[[], str]
    ) -> None:
        """Record the rest of a step; see :meth:`mm_sharp.step.nonfinite_log.NonFiniteLog.note`."""
        self._log.note(step, record, finite, scaled=scaled, at_once=self.host_knows, names=names)
        if self.host_knows:
            self._flush()

    def _flush(self) -> None:
        """Log what is known by now, and put the state back that is not finite."""
        self._log.flush()
        corrupted, self._corrupted = self._corrupted, False
        if self._has_begun:
            corrupted, self._has_begun = bool(self._state.newly_not_finite()), False
        if corrupted.numpy() if isinstance(corrupted, HostCopy) else corrupted:
            self._state.undo(apart_from_weights=True)
        else:
            self._state.discard()
