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
is of the first two and the last line, at w or, with the weights moved before the forward, at w + e.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm_sharp.ops.gradients import FirstGradients
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rare_changes import RareChanges
from mm_sharp.ops.rng import RandomState
from mm_sharp.step.checks import check_loss
from mm_sharp.step.final_gradient import FinalGradient
from mm_sharp.step.first_pass import FirstPass, MicroBatch
from mm_sharp.step.method import Method, Passes
from mm_sharp.step.nonfinite_guard import NonFiniteGuard
from mm_sharp.step.second_pass import SecondPass
from mm_sharp.step.settings import StepSettings
from mm_sharp.step.timing import NO_TIMER, StepRecord


class TwoPassStep:
    """Runs the passes of a micro-batch after its first forward: :meth:`run`, then :meth:`end` or :meth:`undo`."""

    def __init__(self, settings: StepSettings, precision: Precision, first: FirstPass) -> None:
        self.settings = settings
        self.precision = precision
        self.first = first
        self.parallel, self.state = first.parallel, first.state
        self.ascent = first.ascent
        self.second_pass = SecondPass(self.parallel, precision, self.state, settings.replay_rng)
        self.guard = NonFiniteGuard(settings.owner, precision.device, self.parallel, self.state)
        self.first_gradients = FirstGradients()
        self._loss_checks = RareChanges()
        self._has_run = False

    def run(self, method: Method, batch: MicroBatch, *, measures: bool = False) -> StepRecord:
        """From w to w + e, its gradient, and back to w, whatever happens on the way.

        ``measures``: whether to record how far each tensor is moved, and what the gradient says of that. A ValueError
        if the loss is not what the captured forward's output gives.
        """
        timer = self.first.timer
        with timer.exclude('host'):
            self._check_loss(batch)
            self.guard.begin()
        if self.first.passes is not Passes.BOTH:
            return self._run_one_pass(batch)
        batch.gradients.stash()
        # Activation checkpointing may run the forward of a part that DDP wraps again.
        with self.parallel.no_sync(not self.first.synced):
            self.ascent.first_backward(batch.loss, batch.micro_batches, mean=method.changes_gradient)  # g
        if self.parallel.finds_unused:
            # DDP takes it for used by the second pass, too, and would miss a gradient there.
            batch.gradients.note_used()
        self.ascent.average_by_hand()
        timer.mark('pass1')
        drawn, sizes, interrupted, device = None, None, True, batch.loss.device
        try:
            with timer.exclude('host'):
                if method.changes_gradient:
                    self.first_gradients.keep(self.first.trained)
                if self.settings.replay_rng:
                    drawn = self.first.recorder.random_state_now(batch.call, self.first.devices)
                self.state.rewind()
            norm = self.ascent.perturb(method, device, measures=measures)  # w + e
            if measures:
                with timer.exclude('host'):
                    sizes = self.ascent.sizes(device)
            batch.gradients.unstash()
            timer.mark('perturb')
            second, perturbed_loss = method.perturbed_loss(batch.call, batch.loss, norm)  # L(w + e)
            self._backward(second, batch.micro_batches)  # g', onto what was accumulated
            timer.mark('pass2')
            interrupted = False
        finally:
            self._restore(drawn, interrupted)  # w
            timer.mark('restore')
        return StepRecord(batch.loss.detach(), perturbed_loss, norm, sizes=sizes)

    def _run_one_pass(self, batch: MicroBatch) -> StepRecord:
        """The only pass of its step, at the weights that its forward has seen: w, or w + e; then back to w."""
        batch.gradients.unstash()
        interrupted, perturbed = True, self.first.passes is Passes.PERTURBED
        try:
            if perturbed:
                self.ascent.take_up()
            self._backward(batch.loss, batch.micro_batches)
            self.first.timer.mark('pass1')
            interrupted = False
        finally:
            if perturbed:
                in_order(lambda: self.parallel.reshard(interrupted), self.ascent.restore)
                self.first.timer.mark('restore')
        return StepRecord(batch.loss.detach())

    def _check_loss(self, batch: MicroBatch) -> None:
        """Compare the loss with the captured output's, in fewer and fewer steps; an accelerator's only once."""
        if self._loss_checks.next_step() and (batch.loss.is_cpu or not self._has_run):
            check_loss(self.settings.owner, batch.call, batch.loss)
        self._has_run = True

    def final_gradient(self) -> FinalGradient:
        """The gradients of an optimizer step, for the method to change; without the loss scale."""
        inverse = self.precision.inverse_scale()
        # Whether they are each process's own so far, and where a model has branches, of parameters of its own.
        own = bool(self.parallel.synchronised) and (self.parallel.finds_unused or not self.settings.sync_perturbation)
        first = self.first_gradients.take(copies=inverse is not None or own)
        if first and inverse is not None:
            torch._foreach_mul_(list(first.values()), inverse)
        dense = [p for p in self.first.trained if p.grad is not None and p.grad.layout is torch.strided]
        if first and own:
            first = {p: first[p] if p in first else torch.zeros_like(p) for p in dense}
            self.parallel.average(list(first.values()))
        return FinalGradient(dense, first, self.parallel.total, self.guard.unknown)

    def verdict(self) -> Tensor | None:
        """Whether the final gradient is finite, scalar; None where that is for the loss scaler to find out."""
        if self.precision.scaler is not None:
            return None
        with self.first.timer.exclude('host'):
            return self.guard.verdict(self.first.parameters)

    def end(
        self, record: StepRecord, finite: Tensor | None, *, due: bool, number: int, names: Callable[[], str]
    ) -> None:
        """The last of a micro-batch, whose optimizer step has been made if it was ``due``.

        The other arguments are those of :meth:`mm_sharp.step.nonfinite_log.NonFiniteLog.note`.
        """
        if due:
            self.first_gradients.clear()
        else:
            self.first_gradients.commit()
        with self.first.timer.exclude('host'):
            self.guard.end(number, record, finite, scaled=self.precision.scaler is not None, names=names)
        if self.first.timer is not NO_TIMER:
            self.first.timer.mark('step')
            record.timer, self.first.timer = self.first.timer, NO_TIMER

    def undo(self, batch: MicroBatch) -> None:
        """Everything as before the forward, after a step that failed; what has been put back already stays as it is."""
        in_order(
            lambda: self.parallel.reshard(interrupted=True),
            self.ascent.restore,
            self.ascent.unfreeze,
            self.first_gradients.forget_pending,
            self.precision.forget_step,
            batch.gradients.undo,
            self.state.undo,
            batch.call.random_state.restore,
            self.guard.forget,
        )

    def _restore(self, drawn: RandomState | None, interrupted: bool) -> None:
        """The weights as they were; buffers, counters and random state as the first pass has left them."""
        in_order(
            lambda: self.parallel.reshard(interrupted),  # before anything is written to the weights
            self.ascent.restore,
            self.state.restore,
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
