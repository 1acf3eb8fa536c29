"""The order of a sharpness-aware step: :meth:`TwoPassStep.run`, from top to bottom.

::

    forward            the model's own, inside ``optim_context``; captured           L(w)
    first backward     gradients of this micro-batch alone                           g
    rewind             buffers, counters, teachers as before the first forward
    perturb            w <- w + e(g), after an exact copy of w was taken
    second forward     the captured call again, same inputs, same random state       L(w + e)
    second backward    accumulates onto earlier micro-batches' gradients             g'
    restore            w; buffers, counters and random state as after the first pass
    step               clipping and the base optimizer, if this micro-batch ends a cycle

A method (:class:`mm_sharp.step.method.Method`) decides *what* runs in each place and never *when*. A step of one pass
is :meth:`TwoPassStep.run_first_alone`, at w, or :meth:`TwoPassStep.run_perturbed`, at w + e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.gradients import FirstGradients, GradientStash
from mm_sharp.ops.model_call import CallRecorder, ModelCall
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rng import RandomState
from mm_sharp.step.ahead import PerturbationAhead
from mm_sharp.step.ascent import Ascent
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.method import Method
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.timing import NO_TIMER, StepRecord, StepTimer


@dataclass
class MicroBatch:
    """One micro-batch on its way through a step.

    Args:
        call: Its forward, captured.
        loss: L(w), scalar.
        gradients: What was accumulated before it.
        trained: The parameters that get a gradient.
        micro_batches: How many of its like add up to an optimizer step.
        devices: Those of the parameters.
    """

    call: ModelCall
    loss: Tensor
    gradients: GradientStash
    trained: list[nn.Parameter]
    micro_batches: int
    devices: tuple[torch.device, ...]


class TwoPassStep:
    """Runs the passes of one micro-batch, from the first backward pass on.

    Args:
        ascent: The way to w + e and back.
        ahead: The same, before the only pass.
        precision: Loss scale.
        parallel: The model.
        state: What its forward passes change in it.
        recorder: What has captured the call.
        replay_rng: Whether the random state is put back after the second pass.

    Attributes:
        timer: Of this step.
        measures: Whether this step records how far each tensor is moved.
        first_gradients: Sums of the first passes' gradients, where the method keeps them.
    """

    def __init__(
        self,
        ascent: Ascent,
        ahead: PerturbationAhead,
        precision: Precision,
        parallel: ParallelModel,
        state: ForwardState,
        recorder: CallRecorder,
        replay_rng: bool,
    ) -> None:
        self.ascent = ascent
        self.ahead = ahead
        self.precision = precision
        self.parallel = parallel
        self.state = state
        self.recorder = recorder
        self.replay_rng = replay_rng
        self.timer: StepTimer = NO_TIMER
        self.measures = False
        self.first_gradients = FirstGradients()

    def run(self, method: Method, batch: MicroBatch) -> StepRecord:
        """Both passes: from w to w + e, its gradient, and back to w, whatever happens on the way.

        Args:
            method: Decides what runs.
            batch: The micro-batch, after its first forward.
        """
        batch.gradients.stash()
        self.ascent.first_backward(batch.loss, batch.micro_batches, mean=method.changes_gradient)  # g
        self.timer.mark('pass1')
        with self.timer.exclude('host'):
            if method.changes_gradient:
                self.first_gradients.keep(batch.trained)
            drawn = self.recorder.random_state_now(batch.call, batch.devices) if self.replay_rng else None
        interrupted = True
        try:
            with self.timer.exclude('host'):
                self.state.rewind()
            norm = self.ascent.perturb(
                self.parallel.module, method.perturbation_gradient, method.direction, batch.loss.device
            )  # w + e
            with self.timer.exclude('host'):
                sizes = self.ascent.sizes(batch.loss.device) if self.measures else None
            batch.gradients.unstash()
            self.timer.mark('perturb')
            second, perturbed_loss = method.perturbed_loss(batch.call, batch.loss, norm)  # L(w + e)
            self._backward(second, batch.micro_batches)  # g', onto what was accumulated
            self.timer.mark('pass2')
            interrupted = False
        finally:
            self._restore(drawn, interrupted)  # w
            self.timer.mark('restore')
        return StepRecord(batch.loss.detach(), perturbed_loss, norm, self.timer.if_running(), sizes=sizes)

    def run_first_alone(self, batch: MicroBatch) -> StepRecord:
        """The base optimizer's pass: its gradient is the one that counts."""
        batch.gradients.unstash()
        self._backward(batch.loss, batch.micro_batches)
        self.timer.mark('pass1')
        return StepRecord(batch.loss.detach(), timer=self.timer.if_running())

    def run_perturbed(self, batch: MicroBatch) -> StepRecord:
        """The only pass of its step, at the perturbed weights that its forward has seen; then back to w."""
        batch.gradients.unstash()
        interrupted = True
        try:
            self.ahead.take_up()
            self._backward(batch.loss, batch.micro_batches)
            self.timer.mark('pass1')
            interrupted = False
        finally:
            in_order(lambda: self.parallel.reshard(interrupted), self.ahead.restore)
            self.timer.mark('restore')
        return StepRecord(batch.loss.detach(), timer=self.timer.if_running())

    def final_gradient(self, trained: list[nn.Parameter], average: bool, finite: Tensor | None = None) -> FinalGradient:
        """The gradients of an optimizer step, for the method to change; without the loss scale.

        Args:
            trained: The parameters.
            average: Whether the first passes' gradients are each process's own so far.
            finite: Whether the gradients were finite; see :class:`FinalGradient`.
        """
        first = self.first_gradients.take()
        inverse = self.precision.inverse_scale()
        if first and inverse is not None:
            torch._foreach_mul_(list(first.values()), inverse)
        if average:
            self.parallel.average(list(first.values()))
        with_gradient = [parameter for parameter in trained if parameter.grad is not None]
        return FinalGradient(with_gradient, first, self.parallel.total, finite)

    def undo(self, batch: MicroBatch) -> None:
        """Everything as before the forward, after a step that failed; what has been put back already stays as it is."""
        in_order(
            lambda: self.parallel.reshard(interrupted=True),
            self.ahead.restore,
            self.ascent.restore,
            self.ascent.unfreeze,
            self.first_gradients.forget_pending,
            self.precision.forget_step,
            batch.gradients.undo,
            self.state.undo,
            batch.call.random_state.restore,
        )

    def _restore(self, drawn: RandomState | None, interrupted: bool) -> None:
        """The weights as they were; buffers, counters and random state as the first pass has left them."""
        in_order(
            lambda: self.parallel.reshard(interrupted),  # before anything is written to the weights
            self.ascent.restore,
            self.state.restore,
            torch.clear_autocast_cache,
            *(() if drawn is None else (drawn.restore,)),
        )

    def _backward(self, loss: Tensor, micro_batches: int) -> None:
        self.precision.scale(loss / micro_batches if micro_batches > 1 else loss).backward()


def in_order(*actions: Callable[[], object]) -> None:
    """Call all of them, though one fails; the first error comes afterwards."""
    errors: list[BaseException] = []
    for action in actions:
        try:
            action()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
