"""MMEngine's face of a sharpness-aware step: the base of the optimizer wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_sharp.errors import check_arguments, check_optimizer
from mm_sharp.ops.model_call import ModelCall
from mm_sharp.ops.parameters import ParameterSelector, parameters_of
from mm_sharp.ops.precision import Precision
from mm_sharp.step.checkpoint import pack_state, unpack_state, with_kept, without_kept
from mm_sharp.step.checks import check_within
from mm_sharp.step.combination import check_combination
from mm_sharp.step.final_gradient import move_beside
from mm_sharp.step.first_pass import FirstPass
from mm_sharp.step.method import Method
from mm_sharp.step.nonfinite_log import offending_samples
from mm_sharp.step.settings import StepSettings
from mm_sharp.step.timing import StepRecord
from mm_sharp.step.two_pass import TwoPassStep


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
        check_optimizer(name, optimizer)
        self.settings = StepSettings(
            *(name, rho, adaptive, eta, eps, perturb_quantized, sync_perturbation, replay_rng),
            *(accumulative_counts, clip_grad),
        )
        # MMEngine pops 'type' from the dict that it is given; the caller's stays whole.
        super().__init__(optimizer, accumulative_counts, copy.deepcopy(clip_grad))
        self.device = parameters_of(optimizer)[0].device
        self.selector = ParameterSelector(name, perturb)
        self.precision = Precision(name, dtype, loss_scale, self.device)
        self._first_pass = FirstPass(self.settings, self.selector, self.precision, optimizer)
        self._two_pass = TwoPassStep(self.settings, self.precision, self._first_pass)
        self.second_pass = self._two_pass.second_pass
        self.record_timing = False
        self.record_sizes = False
        self.last_step: StepRecord | None = None
        self.optimizer_steps = 0
        self.kept: dict[nn.Parameter, Tensor] = {}
        self._inner_count: int
        self._metrics: Callable[[], dict[str, float]] | None = None
        self._within_update = False

    @property
    def rho(self) -> float:
        """Radius of the perturbation; it may be set between two steps."""
        return self.settings.rho

    @rho.setter
    def rho(self, value: float) -> None:
        self.settings = replace(self.settings, rho=value)

    def optim_context(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context of a training forward: autocast, gradient synchronisation, and capture of the model call.

        Args:
            model: The module that is called inside, exactly once.

        Raises:
            NotImplementedError: ``model`` is wrapped by DDP with ``static_graph`` while ``sync_perturbation`` is off,
                or sharded by FSDP in a way that an argument does not go with.
            ValueError: The same of an argument that another value can replace.
            RuntimeError: ``model`` is called twice inside.
        """
        self._metrics = None
        self._two_pass.guard.next_step()
        self.second_pass.synchronise = self.should_sync()
        return self._first_pass.forward(self, model, synchronise=self.second_pass.synchronise, timed=self.record_timing)

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
        two_pass, number = self._two_pass, self._inner_count + 1
        batch = self._first_pass.take(loss, round(1.0 / self.scale_loss(1.0)))
        last_step, kept = self.last_step, self.kept
        self._within_update = True
        try:
            record = self.last_step = two_pass.run(self, batch, measures=self.record_sizes)
            record.metrics = self._metrics
            self._inner_count = number
            due = self.should_update()
            finite = two_pass.verdict() if due else None
            if due and (finite is None or not two_pass.guard.host_knows or finite):
                self.step(**(step_kwargs or {}))
        except BaseException:
            self._inner_count, self.last_step, self.kept = number - 1, last_step, kept
            two_pass.undo(batch)
            raise
        finally:
            self._within_update = False
        if due:
            self.optimizer_steps += 1
            self.zero_grad(**(zero_kwargs or {}))
        two_pass.end(record, finite, due=due, number=number, names=partial(self.offending_samples, batch.call))

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
        with torch.no_grad():
            if self.changes_gradient:
                self.final_gradient(self._two_pass.final_gradient())
            if self.clip_grad_kwargs:
                self._clip_grad()
            beside = self.beside_step()
        self.precision.step(self.optimizer, **kwargs)
        if beside:
            move_beside(self.optimizer, beside)

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

    def exclude_from_timing(self, name: str) -> AbstractContextManager[None]:
        """A context whose time is not the phase's that it lies in; see :class:`mm_sharp.step.timing.StepTimer`."""
        return self._first_pass.timer.exclude(name)

    def offending_samples(self, call: ModelCall) -> str:
        """The samples of ``call`` that may have brought in what is not finite, for the log."""
        return offending_samples(type(self).__name__, call)

    def _clip_grad(self) -> None:
        """Clip the gradients; under FSDP by the norm of the whole gradient, and not of this rank's piece."""
        shards = self._first_pass.parallel.shards
        if shards is None:
            super()._clip_grad()
            return
        norm = shards.clip_(self._first_pass.trained, self.device, **self.clip_grad_kwargs)
        if norm is not None:
            self.message_hub.update_scalar('train/grad_norm', float(norm))


def registered_methods() -> dict[str, type[TwoPassOptimWrapper]]:
    """The wrapper of every method, by the name that it is registered under."""
    found = OPTIM_WRAPPERS.module_dict.items()
    return {name: cls for name, cls in found if isinstance(cls, type) and issubclass(cls, TwoPassOptimWrapper)}
