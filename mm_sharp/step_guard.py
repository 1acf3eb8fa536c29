"""What is not finite stays out of a training: gradients, buffers, and a line in the log (ours).

Along a final gradient that is not finite the optimizer does not step, and buffers that a forward has left not finite
are put back. On an accelerator the host does not know it in time and does not wait for it: the optimizer steps along a
gradient of zero, and buffers are looked at when the next step begins. :mod:`mm_sharp.step_watch` writes the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm_sharp.finite import all_finite, zero_unless
from mm_sharp.module_state import ModuleStateBackup
from mm_sharp.parallel_model import ParallelModel
from mm_sharp.parameters import parameters_of
from mm_sharp.shards import agree, local
from mm_sharp.step_record import StepRecord
from mm_sharp.step_watch import StepWatch

if TYPE_CHECKING:
    from mm_sharp.two_pass import TwoPassOptimWrapper


class StepGuard:
    """Keeps a module's state from before a step until the step is known to be sound.

    Args:
        owner: Class that steps, for messages.
        device: Where it steps.
        parallel: What it steps.

    Attributes:
        host_knows: Whether the host knows at once what is finite. Elsewhere than on the CPU it would have to wait.
    """

    def __init__(self, owner: str, device: torch.device, parallel: ParallelModel) -> None:
        self.host_knows = device.type == 'cpu'
        self._parallel = parallel
        self._watch = StepWatch(owner)
        self._before = ModuleStateBackup()

    def next_step(self) -> None:
        """Deal with what the last step has shown, and have nothing kept."""
        self._settle()
        self._before.drop()  # an earlier forward may have been left without the rest of its step

    def keep(self, model: nn.Module) -> None:
        """Keep the state of ``model``, just before the step's first forward."""
        self._before.save(model)

    def put_back(self) -> None:
        """Have the model's state be as it was kept, after a step that failed."""
        self._before.restore()

    def begin(self, loss: Tensor) -> None:
        """Take up the first loss, before anything else runs."""
        self._watch.begin(loss)

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
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        with wrapper.aside('host'):
            finite = all_finite(gradients)
            if self._parallel.shards is not None:
                finite = ~agree(~finite.to(wrapper.device))
        if not self.host_knows:
            zero_unless(finite, gradients)
        if not self.host_knows or finite:
            wrapper.step(**step_kwargs)
        return finite

    def end(
        self, step: int, record: StepRecord, finite: Tensor | None, *, scaled: bool, names: Callable[[], str]
    ) -> None:
        """Take up the rest of a step; the arguments are those of :meth:`mm_sharp.step_watch.StepWatch.note`."""
        self._watch.note(step, record, finite, scaled=scaled, names=names)
        if self.host_knows:
            self._settle()

    def _settle(self) -> None:
        """Log what is known by now, and put buffers back that are not finite."""
        if self._watch.settle():
            self._before.drop()
        else:
            self._before.drop_if_finite()
