"""MMEngine's face of a sharpness-aware step: the base of the optimizer wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import (
    check_arguments,
    check_clip_grad,
    check_optimizer,
    check_positive_int,
)
from mm_sharp.ops.call_inputs import fresh
from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.gradients import GradientStash
from mm_sharp.ops.model_call import CallRecorder, ModelCall
from mm_sharp.ops.parameters import ParameterSelector, devices_of, parameters_of
from mm_sharp.ops.perturbation import BY_TENSOR
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rare_changes import RareChanges
from mm_sharp.samples.keys import without_keys
from mm_sharp.step.ahead import PerturbationAhead
from mm_sharp.step.ascent import Ascent
from mm_sharp.step.checkpoint import pack_state, unpack_state, with_kept, without_kept
from mm_sharp.step.checks import check_loss, check_model, check_shards, check_within, require_call
from mm_sharp.step.combination import check_combination
from mm_sharp.step.method import Method, Passes
from mm_sharp.step.nonfinite_guard import NonFiniteGuard
from mm_sharp.step.nonfinite_log import offending_samples
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.second_pass import SecondPass
from mm_sharp.step.settings import StepSettings
from mm_sharp.step.timing import NO_TIMER, StepRecord, StepTimer
from mm_sharp.step.two_pass import MicroBatch, TwoPassStep, in_order

_NOTHING = nullcontext()


class TwoPassOptimWrapper(Method, OptimWrapper):  # type: ignore[misc]
    """Base of the sharpness-aware optimizer wrappers: two forward-backward passes a step.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation, >= 0. With 0 the step is the base optimizer's, bit for bit, provided that
            ``replay_rng`` is on.
        adaptive: What ``rho`` is measured by: ``False``, nothing (SAM); ``True``, each weight's own size (ASAM);
            ``'tensor'``, each tensor's norm, so that ``rho`` is a share of the weights, such as 0.02, to be used with
            ``perturb='weights'``; for comparisons ``'layer'``, every tensor by ``rho`` of its own norm, and
            ``'global'``, SAM's direction by ``rho`` of the whole norm. :mod:`mm_sharp.ops.perturbation` has the
            equations.
        eta: ASAM's additive constant (``adaptive=True``), >= 0.
        eps: Added to the gradient norm, > 0.
        perturb: Which parameters are perturbed: ``'auto'`` (all; in a model with quantizers neither their scales nor
            biases), ``'all'``, ``'weights'`` or a dict; see :class:`mm_sharp.ops.parameters.ParameterSelector`.
        perturb_quantized: In quantized layers, perturb the quantized weight and not the float weight under the
            quantizer; see :mod:`mm_sharp.ops.quantized_perturbation`.
        sync_perturbation: Under DDP, perturb by the gradient averaged over all ranks, at the price of a second
            all-reduce a step; otherwise every rank perturbs by its own. Under FSDP, where the ranks share one set of
            weights, it is always the averaged gradient.
        replay_rng: Dropout and DropPath draw the same masks in both passes.
        dtype: Autocast dtype, ``None``, ``'float16'`` (with loss scaling) or ``'bfloat16'``.
        loss_scale: ``'dynamic'``, a number > 0, or a dict of ``GradScaler``'s arguments.
        accumulative_counts: Micro-batches per optimizer step; each is perturbed by its own gradient.
        clip_grad: As :class:`mmengine.optim.OptimWrapper` takes it; it acts on the final gradient only.
        kwargs: None of any other name; what was meant is named.

    Attributes:
        last_step: What the last step has found.
        record_timing: Whether the next step is timed.
        record_sizes: Whether the next step records how far each tensor is moved; under FSDP the same in all processes.
        optimizer_steps: Optimizer steps so far, those before a resume included.

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        eps: float = 1e-12,
        perturb: str | Mapping[str, object] = 'auto',
        perturb_quantized: bool = False,
        sync_perturbation: bool = False,
        replay_rng: bool = True,
        dtype: str | torch.dtype | None = None,
        loss_scale: str | float | Mapping[str, Any] = 'dynamic',
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        check_combination(type(self), TwoPassOptimWrapper)
        check_arguments(type(self), kwargs, registered_methods().values())
        check_positive_int(name, 'accumulative_counts', accumulative_counts, example='4')
        check_clip_grad(name, clip_grad)
        check_optimizer(name, optimizer)
        # MMEngine pops 'type' from the dict that it is given; the caller's stays whole.
        super().__init__(optimizer, accumulative_counts, copy.deepcopy(clip_grad))
        settings = self.settings = StepSettings(
            name, rho, adaptive, eta, eps, perturb_quantized, sync_perturbation, replay_rng
        )
        self.selector = ParameterSelector(name, perturb)
        self.device = parameters_of(optimizer)[0].device
        self.precision = Precision(name, dtype, loss_scale, self.device)
        self.record_timing = False
        self.record_sizes = False
        self.last_step: StepRecord | None = None
        self._recorder = CallRecorder()
        self._parallel = ParallelModel()
        self._state = ForwardState(self._weights)
        self._ascent = Ascent(settings, self.precision, self._parallel)
        self._ahead = PerturbationAhead(settings, self._parallel)
        self.second_pass = SecondPass(self._parallel, self.precision, self._state, settings.replay_rng)
        self._guard = NonFiniteGuard(name, self.device, self._parallel, self._state)
        self._two_pass = TwoPassStep(
            self._ascent,
            self._ahead,
            self.precision,
            self._parallel,
            self._state,
            self._recorder,
            settings.replay_rng,
        )
        self.optimizer_steps = 0
        self.kept: dict[nn.Parameter, Tensor] = {}
        self._inner_count: int
        self._metrics: Callable[[], dict[str, float]] | None = None
        self._parameters: list[nn.Parameter] = []
        self._trained: list[nn.Parameter] = []
        self._devices: tuple[torch.device, ...] = ()
        self._passes = Passes.BOTH
        self._loss_checks = RareChanges()
        self._within_update = False
        self._finite: Tensor | None = None

    # ---------------------------------------------------------------- settings
    @property
    def rho(self) -> float:
        """Radius of the perturbation; it may be set between two steps."""
        return self.settings.rho

    @rho.setter
    def rho(self, value: float) -> None:
        self.settings = replace(self.settings, rho=value)

    # ---------------------------------------------------------------- MMEngine's interface
    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a training forward: autocast, gradient synchronisation, and capture of the model call.

        Args:
            model: The module that is called inside, exactly once.

        Raises:
            NotImplementedError: ``model`` is wrapped by DDP with ``static_graph`` while ``sync_perturbation`` is off,
                or sharded by FSDP in a way that an argument does not go with.
            ValueError: The same of an argument that another value can replace.
            RuntimeError: ``model`` is called twice inside.
        """
        self._passes = self.passes()
        synced = self._first_pass_is_synced()
        self._guard.next_step()
        self._parameters = parameters_of(self.optimizer)
        self._trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._attach(model)
        self._ahead.restore()  # an earlier forward may have been left without the rest of its step
        try:
            with (
                self._parallel.no_sync(not synced),
                self.precision.autocast(),
                self._parallel.on_forward(self._snapshot) if self._parallel.is_ddp else _NOTHING,
                self._recorder.record(model, self._devices, self._on_call),
                self.recording(model) if self._passes is Passes.BOTH else _NOTHING,
            ):
                yield
            self._ahead.set_aside()
        except BaseException:
            self._parallel.reshard(interrupted=True)
            self._ahead.restore()
            self._state.undo()
            raise
        finally:
            self._ascent.unfreeze()

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Run the rest of the step: first backward, perturbation, second pass, restoration and, where due, the step.

        Whatever happens, the weights before the optimizer's own step are bit for bit those before the call. If an
        exception passes through, buffers, gradients, loss scaler and random state too are as before the forward. (Of
        an optimizer whose own step is broken off in the middle, what it has changed stays.)

        If the final gradient is not finite, the optimizer does not step, and BatchNorm's statistics that have become
        not finite are put back; the log names the samples. On an accelerator, where the host does not know it in time,
        the optimizer steps with a gradient of zero, and buffers are put back when the next step begins.

        Args:
            loss: The scalar that the model's ``parse_losses`` made of the captured forward's output.
            step_kwargs: Arguments of the optimizer's ``step``.
            zero_kwargs: Arguments of the optimizer's ``zero_grad``.

        Raises:
            RuntimeError: No forward was captured, or :meth:`optim_context` is still open.
            ValueError: ``loss`` is not what the captured forward's output gives.
        """
        call = require_call(type(self).__name__, self._recorder.take(), within=self._recorder.is_open)
        batch = self._micro_batch(call, loss)
        count, last_step, kept = self._inner_count, self.last_step, self.kept
        self._within_update = True
        try:
            with self.exclude_from_timing('host'):
                self._check_loss(call, loss)
                self._guard.begin()
            self.second_pass.synchronise = self.should_sync()
            record = self._run(batch)
            record.metrics = self._metrics
            self.last_step = record
            self._inner_count += 1
            due = self.should_update()
            finite = self._step_if_finite(step_kwargs or {}) if due else None
        except BaseException:
            self._inner_count, self.last_step, self.kept = count, last_step, kept
            in_order(partial(self._two_pass.undo, batch), self._guard.forget)
            raise
        finally:
            self._within_update = False
        if due:
            self.optimizer_steps += 1
            self._two_pass.first_gradients.clear()
            self.zero_grad(**(zero_kwargs or {}))
        else:
            self._two_pass.first_gradients.commit()
        with self.exclude_from_timing('host'):
            scaled = self.precision.scaler is not None
            names = partial(self.offending_samples, call)
            self._guard.end(self._inner_count, self.last_step, finite, scaled=scaled, names=names)
        self._two_pass.timer.mark('step')
        self._two_pass.timer = NO_TIMER

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Only :meth:`update_params` runs the backward passes.

        Raises:
            RuntimeError: It was called by hand.
        """
        check_within(type(self).__name__, 'backward', within=False)

    def step(self, **kwargs: Any) -> None:
        """Clip the final gradient, if asked to, and step the base optimizer, within :meth:`update_params`.

        Raises:
            RuntimeError: It was called by hand.
        """
        check_within(type(self).__name__, 'step', self._within_update)
        if self.changes_gradient or self.clip_grad_kwargs:
            self.precision.unscale(self.optimizer)
        if self.changes_gradient:
            apart = not self.settings.sync_perturbation
            with torch.no_grad():
                self.final_gradient(self._two_pass.final_gradient(self._trained, apart, self._finite))
        if self.clip_grad_kwargs:
            self._clip_grad()
        with torch.no_grad():
            beside = self.beside_step()
        self.precision.step(self.optimizer, **kwargs)
        if beside:
            self._move_beside(beside)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state under MMEngine's keys, the loss scaler's, and ``'mm_sharp'`` for our own.

        It loads under ``torch.load(weights_only=True)``, and into a plain ``OptimWrapper``.
        """
        name = type(self).__name__
        state = with_kept(super().state_dict(), self.optimizer, self.kept)
        return pack_state(
            name, state, self.optimizer, self.precision, {'optimizer_steps': self.optimizer_steps, **self.own_state()}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain ``OptimWrapper``.

        In a process of its own (not distributed) the global random state is put back too.

        Raises:
            ValueError: The state was written by a newer version of mm_sharp.
        """
        rest, own = unpack_state(type(self).__name__, state_dict, self.optimizer, self.precision)
        self.optimizer_steps = own.get('optimizer_steps', 0)
        self.load_own_state(own)
        rest, self.kept = without_kept(rest, self.optimizer)
        super().load_state_dict(rest)

    # ---------------------------------------------------------------- what methods use
    def try_forward(self, call: ModelCall) -> Any:
        """What the model returns for ``call``, without a trace; for ``first_batch``, before the first forward."""
        args, kwargs = fresh(without_keys(call.model, call.args, call.kwargs), copies=True)
        # DDP would count the forward, and send buffers around.
        run = call.model if self._parallel.shards is not None else self._parallel.module.forward
        self._snapshot()
        try:
            with torch.no_grad():
                return run(*args, **kwargs)
        finally:
            self._parallel.reshard()
            self._state.undo()
            call.random_state.restore()

    def exclude_from_timing(self, name: str) -> AbstractContextManager[None]:
        """A context whose time is not the phase's that it lies in; see :class:`mm_sharp.step.timing.StepTimer`."""
        return self._two_pass.timer.exclude(name)

    def offending_samples(self, call: ModelCall) -> str:
        """The samples of ``call`` that may have brought in what is not finite, for the log."""
        return offending_samples(type(self).__name__, call)

    # ---------------------------------------------------------------- parts of a step
    @torch.no_grad()
    def _move_beside(self, beside: Mapping[nn.Parameter, Tensor]) -> None:
        """Move the weights by what a method has beside the optimizer's step, at the learning rate of their group."""
        for group in self.optimizer.param_groups:
            for parameter in group['params']:
                if parameter in beside:
                    local_shard(parameter).sub_(beside[parameter] * group['lr'])

    def _run(self, batch: MicroBatch) -> StepRecord:
        """The passes of this step."""
        if self._passes is Passes.BOTH:
            return self._two_pass.run(self, batch)
        if self._passes is Passes.PERTURBED:
            return self._two_pass.run_perturbed(batch)
        return self._two_pass.run_first_alone(batch)

    def _first_pass_is_synced(self) -> bool:
        """Whether DDP averages the first pass's gradients."""
        if self._passes is not Passes.BOTH:
            return bool(self.should_sync())
        # Where gradients are skipped, DDP would wait for them: the others are then averaged by hand.
        return self.settings.sync_perturbation and not self.skips_gradients

    def _attach(self, model: nn.Module) -> None:
        """Get to know the model, once."""
        if not self._parallel.attach(model):
            return
        self._devices = devices_of(self.optimizer)
        self._check_model(model)

    def _check_model(self, model: nn.Module) -> None:
        """Refuse what the step cannot handle."""
        name, shards = type(self).__name__, self._parallel.shards
        self.precision.share_overflow = None if shards is None else shards.share_overflow
        can_sync = not self.skips_gradients
        try:
            check_model(name, model, self.settings.sync_perturbation and can_sync, can_sync=can_sync)
            if shards is not None:
                check_shards(
                    name,
                    shards,
                    perturb_quantized=self.settings.perturb_quantized,
                    by_name=not self.selector.takes_all or self.skips_gradients or self.settings.adaptive in BY_TENSOR,
                    clip_grad=self.clip_grad_kwargs,
                    accumulative_counts=self._accumulative_counts,
                )
        except Exception:
            self._parallel.detach()  # so that it is refused again
            raise
        if shards is not None:
            # In a pass, the parameters that have the names may be others.
            self.selector.select(self._parallel.module, self._trained)

    def _on_call(self, call: ModelCall) -> ModelCall:
        """Runs just before the model's forward."""
        timer = self._two_pass.timer = StepTimer(self.device) if self.record_timing else NO_TIMER
        timer.mark('start')
        self._two_pass.measures = self.record_sizes
        self._metrics = None
        self._ahead.restore()  # a model may catch the error of a call, and call itself again
        if self._passes is Passes.BOTH:
            with timer.exclude('recording'):
                call = self.first_batch(call)
        with timer.exclude('host'):
            call.args, call.kwargs = without_keys(call.model, call.args, call.kwargs)
            if self._passes is not Passes.FIRST:
                perturbed = self.select_parameters(self.selector.select(self._parallel.module, self._trained))
                self._ahead.choose(perturbed)
            if self._passes is Passes.BOTH:
                # Under FSDP, parameters are gathered and their gradients averaged together: nothing would be saved.
                skip = self._trained if self.skips_gradients and self._parallel.shards is None else ()
                by_hand = self.settings.sync_perturbation and self.skips_gradients
                self._ascent.choose(perturbed, skip, average_by_hand=by_hand)
        if not self._parallel.is_ddp:
            self._snapshot()
        return call

    def _snapshot(self) -> None:
        """Runs once, after :meth:`_on_call`, when the forward of the user's own model begins."""
        with self.exclude_from_timing('host'):
            sharded = self._parallel.shards is not None
            self._state.snapshot(self._parallel.tree, sharded=sharded, broadcast=self._parallel.broadcasts)
        if self._passes is Passes.PERTURBED:
            self._ahead.perturb(self, self.device)

    def _micro_batch(self, call: ModelCall, loss: Tensor) -> MicroBatch:
        with self.exclude_from_timing('host'):
            parameters = self._parallel.parameters(self._parameters)
            stash = GradientStash(parameters, in_buckets=self._parallel.in_buckets)
            micro_batches = round(1.0 / self.scale_loss(1.0))
            return MicroBatch(call, loss, stash, self._trained, micro_batches, self._devices)

    def _weights(self) -> list[Tensor]:
        """What the step moves, as memory of this process."""
        return list(self._trained if self._parallel.shards is None else map(local_shard, self._trained))

    def _check_loss(self, call: ModelCall, loss: Tensor) -> None:
        """Compare the loss with the captured output's, in fewer and fewer steps."""
        if self._loss_checks.next_step() and (loss.device.type == 'cpu' or self.last_step is None):
            check_loss(type(self).__name__, call, loss)

    def _step_if_finite(self, step_kwargs: Mapping[str, Any]) -> Tensor | None:
        """Step, unless the final gradient is not finite; None where that is for the loss scaler to find out."""
        self._finite = None
        if self.precision.scaler is not None:
            self.step(**step_kwargs)
            return None
        with self.exclude_from_timing('host'):
            finite = self._guard.verdict(self._parameters)
        if not self._guard.host_knows:
            self._finite = finite
        if not self._guard.host_knows or finite:
            self.step(**step_kwargs)
        return finite

    def _clip_grad(self) -> None:
        """Clip the gradients; under FSDP by the norm of the whole gradient, and not of this rank's piece."""
        if self._parallel.shards is None:
            super()._clip_grad()
            return
        norm = self._parallel.clip_gradients(self._trained, self.device, self.clip_grad_kwargs)
        if norm is not None:
            self.message_hub.update_scalar('train/grad_norm', float(norm))


def registered_methods() -> dict[str, type[TwoPassOptimWrapper]]:
    """The wrapper of every method, by the name that it is registered under."""
    found = OPTIM_WRAPPERS.module_dict.items()
    return {name: cls for name, cls in found if isinstance(cls, type) and issubclass(cls, TwoPassOptimWrapper)}
