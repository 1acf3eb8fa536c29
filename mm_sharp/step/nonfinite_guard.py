"""What is not finite stays out of a training: gradients, buffers, and a line in the log (ours).

Along a final gradient that is not finite the optimizer does not step. Where the first forward has left a buffer not
finite that was finite before (the variance of a huge sample overflows, though the loss does not), the model's state is
put back. On an accelerator the host does not know it in time and does not wait for it: the optimizer steps along a
gradient of zero, and the state is put back when the next step begins. :mod:`mm_sharp.step.nonfinite_log` writes the
log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm_sharp.ops.finite import all_finite, zero_unless
from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.fsdp import any_rank, local_shard
from mm_sharp.ops.host_copy import HostCopy
from mm_sharp.ops.parameters import parameters_of
from mm_sharp.step.nonfinite_log import NonFiniteLog
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.timing import StepRecord

if TYPE_CHECKING:
    from mm_sharp.step.two_pass import TwoPassOptimWrapper


class NonFiniteGuard:
    """Keeps values that are not finite out of the weights and of the model's state.

    Args:
        owner: Class that steps, for messages.
        device: Where it steps.
        parallel: What it steps.
        state: The model's state, which is forgotten when the step is known to be sound.

    Attributes:
        host_knows: Whether the host knows at once what is finite. Elsewhere than on the CPU it would have to wait.
    """

    def __init__(self, owner: str, device: torch.device, parallel: ParallelModel, state: ForwardState) -> None:
        self.host_knows = device.type == 'cpu'
        self._parallel = parallel
        self._watch = NonFiniteLog(owner)
        self._state = state
        self._corrupted: HostCopy | None = None

    def next_step(self) -> None:
        """Deal with what the last step has shown, and have nothing kept."""
        self._settle()
        self._state.drop()  # an earlier forward may have been left without the rest of its step

    def begin(self) -> None:
        """Record whether the first forward's state is finite, before anything else runs.

        Copied now, it is on the host when the next step begins; later, the host would wait for all of this step.
        """
        self._corrupted = HostCopy(self._state.newly_not_finite())

    def forget(self) -> None:
        """Forget a step that failed."""
        self._corrupted = None

    def step_if_finite(self, wrapper: TwoPassOptimWrapper, step_kwargs: Mapping[str, Any]) -> Tensor | None:
        """Step, unless the final gradient is not finite.

        Args:
            wrapper: The optimizer wrapper, whose ``step`` it is.
            step_kwargs: Arguments of ``step``.

        Returns:
            Whether the gradient is finite, scalar (of a sharded model in all processes, which must all ask); None where
            that is for the loss scaler to find out.
        """
        if wrapper.precision.scaler is not None:
            wrapper.step(**step_kwargs)
            return None
        parameters = parameters_of(wrapper.optimizer)
        gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        with wrapper.aside('host'):
            finite = all_finite(gradients)
            if self._parallel.shards is not None:
                finite = ~any_rank(~finite.to(wrapper.device))
        if not self.host_knows:
            zero_unless(finite, gradients)
        if not self.host_knows or finite:
            wrapper.step(**step_kwargs)
        return finite

    def end(
        self, step: int, record: StepRecord, finite: Tensor | None, *, scaled: bool, names: Callable[[], str]
    ) -> None:
        """Record the rest of a step; see :meth:`mm_sharp.step.nonfinite_log.NonFiniteLog.note`."""
        self._watch.note(step, record, finite, scaled=scaled, names=names)
        if self.host_knows:
            self._settle()

    def _settle(self) -> None:
        """Log what is known by now, and put the state back that is not finite."""
        self._watch.settle()
        corrupted, self._corrupted = self._corrupted, None
        if corrupted is not None and corrupted.numpy():
            self._state.take_back()
        else:
            self._state.drop()
