"""What is not finite stays out of a training: gradients, buffers, and a line in the log (ours).

Along a final gradient that is not finite the optimizer does not step, and buffers that a forward has left not finite
are put back. On an accelerator the host does not know it in time and does not wait for it: the optimizer steps along a
gradient of zero, and buffers are looked at when the next step begins. :mod:`mm_sharp.step_watch` writes the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mm_sharp.finite import all_finite, zero_unless
from mm_sharp.module_state import ModuleStateBackup
from mm_sharp.shards import Shards, agree
from mm_sharp.step_record import StepRecord
from mm_sharp.step_watch import StepWatch


class StepGuard:
    """Keeps a module's state from before a step until the step is known to be sound.

    Args:
        owner: Class that steps, for messages.
        device: Where it steps.

    Attributes:
        host_knows: Whether the host knows at once what is finite. Elsewhere than on the CPU it would have to wait.
    """

    def __init__(self, owner: str, device: torch.device) -> None:
        self.host_knows = device.type == 'cpu'
        self._device = device
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

    def finite(self, gradients: Sequence[Tensor], shards: Shards | None) -> Tensor:
        """Whether the final gradient is finite, scalar; of a sharded model in all processes, which must all ask."""
        finite = all_finite(gradients)
        return finite if shards is None else ~agree(~finite.to(self._device))

    def lets_step(self, finite: Tensor, gradients: Sequence[Tensor]) -> bool:
        """Whether the optimizer is to step; where the host does not know, it is, and ``gradients`` may become zero."""
        if self.host_knows:
            return bool(finite)
        zero_unless(finite, gradients)
        return True

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
