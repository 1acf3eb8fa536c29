"""The order of a sharpness-aware step, written in one place.

::

    forward            the model's own, inside ``optim_context``; captured           L(w)
    first backward     gradients of this micro-batch alone                           g
    rewind             buffers, counters, teachers as before the first forward
    climb              w <- w + e(g), after an exact copy of w was taken
    second forward     the captured call again, same inputs, same random state       L(w + e)
    second backward    accumulates onto earlier micro-batches' gradients
    restore            w; buffers, counters and random state as after the first pass
    step               clipping and the base optimizer, if this micro-batch ends a cycle

Methods (:class:`mm_sharp.step.method.Method`) choose *what* runs in each place and never *when*:
``choose_first_batch`` and
``select_parameters`` just before the forward, ``second_loss`` after the climb; ``recording`` is around the forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_bool, check_clip_grad, check_number, check_positive_int, check_steps_alone
from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.gradients import GradientsAside
from mm_sharp.ops.model_call import CallRecorder, ModelCall, unwrap
from mm_sharp.ops.parameters import ParameterSelector, devices_of, parameters_of, trained_by
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.rng import RandomState
from mm_sharp.samples.keys import without_keys
from mm_sharp.step.ascent import Ascent
from mm_sharp.step.checkpoint import load_state, pack_state
from mm_sharp.step.checks import check_loss, check_model, check_within, require_call
from mm_sharp.step.method import Method
from mm_sharp.step.nonfinite_guard import NonFiniteGuard
from mm_sharp.step.nonfinite_log import offending_samples
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.second_pass import SecondPass
from mm_sharp.step.timing import StepRecord, StepTimer


class TwoPassOptimWrapper(Method, OptimWrapper):  # type: ignore[misc]
    """Base of the sharpness-aware optimizer wrappers: two forward-backward passes a step.

    Args:
        optimizer: The base optimizer.
        rho: Radius of the perturbation, >= 0. With 0 the step is the base optimizer's, bit for bit, provided that
            ``replay_rng`` is on.
        adaptive: ASAM's perturbation instead of SAM's.
        eta: ASAM's additive constant, >= 0.
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

    Raises:
        ValueError: An argument is out of range; the message names it, its value and what is allowed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
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
    ) -> None:
        name = type(self).__name__
        check_positive_int(name, 'accumulative_counts', accumulative_counts, example='4')
        check_clip_grad(name, clip_grad)
        check_steps_alone(name, optimizer)
        # MMEngine pops 'type' from the dict that it is given; the caller's stays whole.
        super().__init__(optimizer, accumulative_counts, copy.deepcopy(clip_grad))
        self.rho = check_number(name, 'rho', rho, example='0.05')
        self.adaptive = check_bool(name, 'adaptive', adaptive)
        self.eta = check_number(name, 'eta', eta, example='0.01')
        self.eps = check_number(name, 'eps', eps, low_open=True, example='1e-12')
        self.perturb_quantized = check_bool(name, 'perturb_quantized', perturb_quantized)
        self.sync_perturbation = check_bool(name, 'sync_perturbation', sync_perturbation)
        self.replay_rng = check_bool(name, 'replay_rng', replay_rng)
        self.selector = ParameterSelector(name, perturb)
        self.device = parameters_of(optimizer)[0].device
        self.precision = Precision(name, dtype, loss_scale, self.device)
        self.record_timing = False
        self.last_step: StepRecord | None = None
        self._recorder = CallRecorder()
        self._parallel = ParallelModel()
        self._ascent = Ascent(self._parallel)
        self._state = ForwardState(self._weights)
        self._second = SecondPass(self._parallel, self._state)
        self._guard = NonFiniteGuard(name, self.device, self._parallel, self._state)
        self._timer: StepTimer | None = None
        self._figures: Callable[[], dict[str, float]] | None = None
        self._trained: list[nn.Parameter] = []
        self._loss_is_checked = False
        self._within_update = False

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
        # Where gradients are skipped, DDP would wait for them: the others are then averaged by hand.
        synced = self.sync_perturbation and not self.skips_gradients
        check_model(type(self).__name__, model, synced, can_sync=not self.skips_gradients)
        self._guard.next_step()
        self._parallel.look_at(self, model)
        try:
            with (
                self._parallel.no_sync(not synced),
                self.precision.autocast(),
                self._parallel.on_forward(model, self._keep_state),
                self._recorder.record(model, devices_of(self.optimizer), self._on_call),
                self.recording(model),
            ):
                yield
        except BaseException as error:
            self._parallel.settle(type(error))
            self._state.undo()
            raise
        finally:
            self._ascent.switch_on()

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
        with self.aside('host'):
            parameters = self._parallel.parameters(call.model, self.optimizer)
            gradients = GradientsAside(parameters, in_buckets=self._parallel.in_buckets)
        count, last_step = self.inner_count, self.last_step
        self._within_update = True
        try:
            with self.aside('host'):
                self._check_loss(call, loss)
                self._guard.begin()
            record = self._run_passes(call, loss, gradients)
            due = self.should_update()
            finite = self._guard.step_if_finite(self, step_kwargs or {}) if due else None
        except BaseException:
            self._inner_count, self.last_step = count, last_step
            self._undo(call, gradients)
            raise
        finally:
            self._within_update = False
        if due:
            self.zero_grad(**(zero_kwargs or {}))
        scaled = self.precision.scaler is not None
        with self.aside('host'):
            self._guard.end(
                self._inner_count, record, finite, scaled=scaled, names=partial(self.offending_samples, call)
            )
        self._mark('step')
        self._timer = None

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Back-propagate the (scaled) loss and count one micro-batch, within :meth:`update_params`.

        Raises:
            RuntimeError: It was called by hand.
        """
        check_within(type(self).__name__, 'backward', self._within_update)
        self.precision.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """Clip the final gradient, if asked to, and step the base optimizer, within :meth:`update_params`.

        Raises:
            RuntimeError: It was called by hand.
        """
        check_within(type(self).__name__, 'step', self._within_update)
        if self.clip_grad_kwargs:
            self.precision.unscale(self.optimizer)
            self._clip_grad()
        self.precision.step(self.optimizer, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state under MMEngine's keys, the loss scaler's, and ``'mm_sharp'`` for our own.

        It loads under ``torch.load(weights_only=True)``, and into a plain ``OptimWrapper``.
        """
        return pack_state(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain ``OptimWrapper``.

        In a process of its own (not distributed) the global random state is put back too.

        Raises:
            ValueError: The state was written by a newer version of mm_sharp.
        """
        super().load_state_dict(load_state(self, state_dict))

    # ---------------------------------------------------------------- the order
    def _run_passes(self, call: ModelCall, loss: Tensor, gradients: GradientsAside) -> StepRecord:
        """Everything from the first backward to the restoration."""
        module = unwrap(call.model)
        with ExitStack() as afterwards:  # all of it, though a part fails; in the order from the last line to the first
            afterwards.callback(self._mark, 'restore')
            gradients.take_off()
            self._ascent.backward(self, loss)
            self._mark('pass1')
            with self.aside('host'):
                if self.replay_rng:
                    afterwards.callback(RandomState.capture(devices_of(self.optimizer)).restore)
                afterwards.callback(torch.clear_autocast_cache)
                afterwards.callback(self._state.finish)
                self._state.rewind()
            afterwards.callback(self._ascent.take_back)
            afterwards.push(self._parallel.settle)  # before anything is written to the weights
            norm = self._ascent.climb(self, module)
            gradients.resume()
            self._mark('climb')
            second, perturbed_loss = self.second_loss(call, loss, norm)
            self.backward(self.scale_loss(second))
            self._mark('pass2')
        self.last_step = StepRecord(loss.detach(), perturbed_loss, norm, self._timer, self._figures)
        return self.last_step

    def _undo(self, call: ModelCall, gradients: GradientsAside) -> None:
        """Everything as before the forward, after a step that failed; what has been put back already stays as it is."""
        with ExitStack() as undo:
            undo.callback(call.random_state.restore)
            undo.callback(self._guard.forget)
            undo.callback(self._state.undo)
            undo.callback(gradients.undo)
            undo.callback(self.precision.forget_step)
            undo.callback(self._ascent.switch_on)
            undo.callback(self._ascent.take_back)
            undo.callback(self._parallel.settle, BaseException)

    def forward_again(self, call: ModelCall) -> Tensor:
        """The loss of ``call`` at the weights as they are now, with the first pass's random draws."""
        return self._second.loss(self, call)

    def loss_without_gradient(self, call: ModelCall) -> Tensor:
        """As :meth:`forward_again`, leaving no trace: not in the buffers, nor by communication."""
        return self._second.loss_without_gradient(self, call)

    # ---------------------------------------------------------------- helpers
    def _on_call(self, call: ModelCall) -> ModelCall:
        """Runs just before the model's forward."""
        self._timer = StepTimer(self.device) if self.record_timing else None
        self._mark('start')
        module = unwrap(call.model)
        self._trained = trained_by(self.optimizer)
        self._figures = None
        with self.aside('recording'):
            call = self.choose_first_batch(call)
        with self.aside('host'):
            args, kwargs = without_keys(call.model, call.args, call.kwargs)
            perturbed, scale = self.select_parameters(self.selector.select(module, self._trained))
            # Under FSDP, parameters are gathered and their gradients averaged together: nothing would be saved.
            skips = self.skips_gradients and self._parallel.shards is None
            self._ascent.choose(perturbed, scale, skip=self._trained if skips else ())
        return replace(call, args=args, kwargs=kwargs)

    def _keep_state(self, module: nn.Module) -> None:
        """Runs once, after :meth:`_on_call`, when the forward of the user's own model begins."""
        with self.aside('host'):
            self._state.keep(module, sharded=self._parallel.shards is not None)

    def _weights(self) -> list[Tensor]:
        """What the step moves, as memory of this process."""
        return [local_shard(weight) for weight in self._trained]

    def offending_samples(self, call: ModelCall) -> str:
        """The samples of ``call`` that may have brought in what is not finite, for the log."""
        return offending_samples(type(self).__name__, call)

    def _check_loss(self, call: ModelCall, loss: Tensor) -> None:
        """Compare the loss with the captured output's: always on the CPU, once where it stalls the host."""
        if loss.device.type == 'cpu' or not self._loss_is_checked:
            check_loss(type(self).__name__, call, loss)
            self._loss_is_checked = True

    def _clip_grad(self) -> None:
        """Clip the gradients; under FSDP by the norm of the whole gradient, and not of this rank's piece."""
        if self._parallel.shards is None:
            super()._clip_grad()
        else:
            self._parallel.clip_gradients(self)

    def _mark(self, phase: str) -> None:
        if self._timer is not None:
            self._timer.mark(phase)

    def aside(self, name: str) -> AbstractContextManager[Any]:
        """A context whose time is not the phase's that it lies in; see :class:`mm_sharp.step.timing.StepTimer`."""
        return nullcontext() if self._timer is None else self._timer.aside(name)
