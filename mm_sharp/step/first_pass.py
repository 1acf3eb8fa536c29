"""The first forward of a step, which MMEngine's ``train_step`` runs inside ``optim_context``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.gradients import GradientStash
from mm_sharp.ops.model_call import CallRecorder, ModelCall
from mm_sharp.ops.parameters import ParameterSelector, devices_of, parameters_of
from mm_sharp.ops.perturbation import BY_TENSOR
from mm_sharp.ops.precision import Precision
from mm_sharp.samples.keys import without_keys
from mm_sharp.step.ascent import Ascent
from mm_sharp.step.checks import check_model, require_call
from mm_sharp.step.method import Method, Passes
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.settings import StepSettings
from mm_sharp.step.timing import NO_TIMER, StepTimer

_NOTHING = nullcontext()


@dataclass
class MicroBatch:
    """One micro-batch on its way through a step."""

    call: ModelCall  # its forward, captured
    loss: Tensor  # L(w), scalar
    gradients: GradientStash  # what was accumulated before it
    micro_batches: int  # how many of its like add up to an optimizer step


class FirstPass:
    """Captures the first forward, :meth:`forward`, and gives what the rest of the step needs of it, :meth:`take`.

    Its attributes are the parts of a step, and what is known of this one: the optimizer's ``parameters``, those of them
    that are ``trained``, their ``devices``, the ``passes``, the ``timer``, and ``synced``: whether DDP averages the
    gradients of this pass.
    """

    def __init__(
        self, settings: StepSettings, selector: ParameterSelector, precision: Precision, optimizer: Optimizer
    ) -> None:
        self._settings = settings
        self._selector = selector
        self._precision = precision
        self._optimizer = optimizer
        self.parallel = ParallelModel()
        self.state = ForwardState(self._weights)
        self.recorder = CallRecorder()
        self.ascent = Ascent(settings, precision, self.parallel)
        self.parameters: list[nn.Parameter] = []
        self.trained: list[nn.Parameter] = []
        self.devices: tuple[torch.device, ...] = ()
        self.passes = Passes.BOTH
        self.synced = False
        self.timer: StepTimer = NO_TIMER

    @contextmanager
    def forward(self, method: Method, model: nn.Module, *, synchronise: bool, timed: bool) -> Iterator[None]:
        """The context of the first forward; see :meth:`mm_sharp.step.wrapper.TwoPassOptimWrapper.optim_context`.

        ``synchronise``: whether DDP averages the gradients that the optimizer gets of this micro-batch.
        """
        was_perturbed, self.passes = self.passes is Passes.PERTURBED, method.passes()
        self.parameters = parameters_of(self._optimizer)
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._attach(method, model)
        if was_perturbed:
            self.ascent.restore()  # an earlier forward may have been left without the rest of its step
        self.timer = StepTimer(self._precision.device) if timed else NO_TIMER
        both, parallel = self.passes is Passes.BOTH, self.parallel
        own = self._settings.sync_perturbation and not self._averages_by_hand(method)
        self.synced = own if both else synchronise
        try:
            with (
                parallel.no_sync(not self.synced),
                self._precision.autocast(),
                parallel.on_forward(lambda: self._snapshot(method)) if parallel.is_ddp else _NOTHING,
                self.recorder.record(model, self.devices, lambda call: self._on_call(method, call)),
                method.recording(model) if both else _NOTHING,
            ):
                yield
                self.ascent.unfreeze()
            if self.passes is Passes.PERTURBED:
                self.ascent.set_aside()
        except BaseException:
            self.ascent.unfreeze()
            parallel.reshard(interrupted=True)
            self.ascent.restore()
            self.state.undo()
            raise

    def _attach(self, method: Method, model: nn.Module) -> None:
        """Get to know the model, once, and refuse what the step cannot handle."""
        if not self.parallel.attach(model):
            return
        # Random numbers of the CPU are kept in any case.
        self.devices = tuple(device for device in devices_of(self._optimizer) if device.type != 'cpu')
        shards = self.parallel.shards
        self._precision.share_overflow = None if shards is None else shards.share_overflow
        skips = method.skips_gradients
        by_name = not self._selector.takes_all or skips or self._settings.adaptive in BY_TENSOR
        try:
            check_model(self._settings, model, shards, can_sync=not skips, by_name=by_name)
        except Exception:
            self.parallel.model = None  # so that it is refused again
            raise
        if shards is not None:
            # In a pass, the parameters that have the names may be others.
            self._selector.select(self.parallel.module, self.trained)

    def _on_call(self, method: Method, call: ModelCall) -> ModelCall:
        """Runs just before the model's forward."""
        self.timer.mark('start')
        if self.passes is Passes.PERTURBED:
            self.ascent.restore()  # a model may catch the error of a call, and call itself again
        if self.passes is Passes.BOTH:
            with self.timer.exclude('recording'):
                call = method.first_batch(call)
        with self.timer.exclude('host'):
            call.args, call.kwargs = without_keys(call.model, call.args, call.kwargs)
            if self.passes is not Passes.FIRST:
                perturbed = method.select_parameters(self._selector.select(self.parallel.module, self.trained))
                by_hand = self.passes is Passes.BOTH and self._averages_by_hand(method)
                self.ascent.choose(perturbed, self._to_skip(method), average_by_hand=by_hand)
        if not self.parallel.is_ddp:
            self._snapshot(method)
        return call

    def _averages_by_hand(self, method: Method) -> bool:
        """Whether the first gradients are averaged without DDP.

        It would wait for those that are skipped; and where it looks for what is used, it would forget, before the
        gradients of earlier micro-batches are averaged, what these have used.
        """
        return self._settings.sync_perturbation and (method.skips_gradients or self.parallel.finds_unused)

    def _to_skip(self, method: Method) -> Sequence[nn.Parameter]:
        """What needs no gradient in the first pass unless it is perturbed."""
        # Under FSDP, parameters are gathered and their gradients averaged together: nothing would be saved.
        if self.passes is not Passes.BOTH or self.parallel.shards is not None:
            return ()
        if method.skips_gradients:
            return self.trained
        # More than half of a quantizer's backward pass is for its scale. DDP would wait for it where it synchronises.
        needed = method.changes_gradient or (self._settings.sync_perturbation and self.parallel.is_ddp)
        return () if needed else self._selector.scales

    def _snapshot(self, method: Method) -> None:
        """Runs once, after :meth:`_on_call`, when the forward of the user's own model begins."""
        with self.timer.exclude('host'):
            sharded = self.parallel.shards is not None
            self.state.snapshot(self.parallel.tree, sharded=sharded, broadcast=self.parallel.broadcasts)
        if self.passes is Passes.PERTURBED:
            self.ascent.perturb_ahead(method, self._precision.device)

    def _weights(self) -> list[Tensor]:
        """What the step moves, as memory of this process."""
        return self.parallel.pieces(self.trained)

    def take(self, loss: Tensor, micro_batches: int) -> MicroBatch:
        """The micro-batch whose forward was captured, with its loss; a RuntimeError if there is none, or it is open."""
        call = require_call(self._settings.owner, self.recorder.take(), within=self.recorder.is_open)
        with self.timer.exclude('host'):
            parameters = self.parallel.parameters(self.parameters)
            stash = GradientStash(parameters, in_buckets=self.parallel.in_buckets)
        return MicroBatch(call, loss, stash, micro_batches)
