"""The hooks that record every sample's loss while a model computes its batch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.ops.model_call import unwrap
from mm_sharp.per_sample_loss.evaluate import Evaluator, LossCall, shadow
from mm_sharp.per_sample_loss.find import LossModule, PerSampleLossError, Structure, find_losses
from mm_sharp.per_sample_loss.layout import batch_size, fill, first_tensor, tensors_of
from mm_sharp.per_sample_loss.record import Checks, LossRecord, LossTerm
from mm_sharp.per_sample_loss.reduction import Reduction


class PerSampleLoss:
    """Records the loss of every sample of a model's batches.

    One instance serves a model's whole training: it remembers what it found out about each loss module. Losses may be
    replaced or added at any time between two forwards.

    Args:
        model: Any model; its loss modules are looked up now. A DDP wrapper is looked through.
        around: Makes a context for the work on each loss, as for timing it.

    Raises:
        PerSampleLossError: The model has a head for which there are no losses of samples.
    """

    def __init__(self, model: nn.Module, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model = unwrap(model)
        self.around = around
        self._evaluators: dict[int, Evaluator] = {}
        self._checks = Checks()
        self._find()

    def look_again(self) -> bool:
        """Find the losses anew where modules of the model have been replaced, added or taken away.

        Returns:
            Whether the losses are others now.

        Raises:
            PerSampleLossError: See above.
        """
        return not self._structure.is_unchanged() and self._find()

    def settle(self) -> None:
        """Report what an accelerator has found of the forwards before; waits for it, not for what runs now.

        Raises:
            PerSampleLossError: What was recorded is not what the model returned.
        """
        self._checks.settle()

    def _find(self) -> bool:
        self.losses = find_losses(self.model)
        self._structure = Structure(self.model, self.losses)
        evaluators = {}
        for loss in self.losses:
            known = self._evaluators.get(id(loss.module))
            same = known is not None and known.parts == tuple(loss.module.modules())
            evaluators[id(loss.module)] = known if same else Evaluator(loss.module)
        if changed := evaluators != self._evaluators:
            self._checks.passed_once = False  # those under way stay
        self._evaluators = evaluators
        return changed

    @property
    def looped(self) -> dict[str, Exception]:
        """The loss modules that are evaluated in a loop because ``torch.func.vmap`` failed, and its error."""
        errors = {loss.name: self._evaluators[id(loss.module)].vmap_error for loss in self.losses}
        return {name: error for name, error in errors.items() if error is not None}

    @contextmanager
    def record(self, weights: Tensor | None = None, full_size: int | None = None) -> Iterator[LossRecord]:
        """Record the model's forward pass in this context; without arguments, the model's output is untouched.

        Args:
            weights: Weights w_i of the K samples of this forward, (K,). Every loss then becomes sum_i w_i l_i where it
                is a mean over the batch, and ``full_size`` * sum_i w_i l_i where it is a sum, with gradient. See
                :meth:`Reduction.combine`.
            full_size: The number of samples N from which the K in this forward were drawn, N >= K; K if None. Losses
                that are sums are scaled by N/K, also without weights. The record's values are never scaled.

        Both may also be set on the record until the forward begins, where only the batch itself tells them.

        Raises:
            ValueError: ``weights`` or ``full_size`` do not fit the batch (in the forward).
            PerSampleLossError: A loss has no form for single samples (in the forward).
        """
        self.look_again()
        record = LossRecord(type(self.model).__name__, checks=self._checks, weights=weights, full_size=full_size)
        hooks = _Hooks(self.model, record, self.around)
        handles = [
            self.model.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
            # First of the model's hooks: others are to see the losses that it returns.
            self.model.register_forward_hook(hooks.after_model, prepend=True, always_call=True),
        ]
        for loss in self.losses:
            evaluator = self._evaluators[id(loss.module)]
            if evaluator.form is None:
                handles.append(loss.module.register_forward_pre_hook(hooks.before_loss, with_kwargs=True))
            after = partial(hooks.after_loss, loss, evaluator)
            handles.append(loss.module.register_forward_hook(after, with_kwargs=True))
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()


class _Hooks:
    """The hooks of one forward pass."""

    def __init__(
        self, model: nn.Module, record: LossRecord, around: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.record, self.around = model, record, around
        # The loss module that is running, its shadow, and the tensors it was called with, with their versions.
        self.open: tuple[nn.Module, nn.Module, list[tuple[Tensor, int]]] | None = None
        self.long_outputs = False  # whether a loss module gave a tensor with a dimension
        self.depth = 0  # of the calls of a model that calls itself

    def before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.open, self.long_outputs = None, False
        self.record.terms.clear()
        self.record.size = None
        size = batch_size(args, kwargs)
        if size is not None:
            self._set_size(size)

    def before_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The copy is made now, because the module may count the call that is about to happen. A loss that runs inside
        # another one is part of it.
        if self.open is None:
            with self.around():
                tensors = tensors_of((args, kwargs))[1]
                self.open = module, shadow(module), [(tensor, _version(tensor)) for tensor in tensors]

    def after_loss(
        self,
        loss: LossModule,
        evaluator: Evaluator,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        # A loss that has a form leaves itself and its arguments as they are.
        opened, twin, tensors = self.open or (module, module, ())
        if opened is not module:
            return None
        try:
            if any(_version(tensor) != version for tensor, version in tensors):
                raise ValueError('it changes its arguments in place, so that it cannot be evaluated a second time')
            with self.around():
                return self._record_call(loss, evaluator, twin, args, kwargs, output)
        except Exception as error:  # whatever a loss of anyone's raises on a batch of one
            raise PerSampleLossError(f'{loss.name}: {error}.') from error
        finally:
            self.open = None  # only now: what the evaluation calls is part of it

    def after_model(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Take the losses of shape (N,) that a model returns as they are."""
        self.depth -= 1
        losses = {'loss': output} if isinstance(output, Tensor) else output
        if self.depth or self.record.size is None or not isinstance(losses, dict):
            return None
        if self.record.size == 1 and self.long_outputs:
            return None  # what looks like (N,) may be a hooked loss with one dimension more
        replaced = {name: self._returned(name, value) if 'loss' in name else value for name, value in losses.items()}
        if self.record.weights is None:
            return None
        return replaced['loss'] if isinstance(output, Tensor) else replaced

    def _returned(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == (self.record.size,):
            name = f"{self.record.owner}'s {name}"
            return self._add(name, value.clone(), Reduction.MEAN, 1.0, value)  # in memory of its own
        if type(value) in (list, tuple):
            return type(value)(self._returned(name, item) for item in value)
        return value

    def _set_size(self, size: int) -> None:
        weights, full_size = self.record.weights, self.record.full_size
        if weights is not None and weights.shape != (size,):
            raise ValueError(f'weights of shape {tuple(weights.shape)} do not fit the batch: it must be ({size},)')
        if full_size is not None and full_size < size:
            raise ValueError(f'full_size={full_size} is not allowed: it must be at least the batch size, {size}')
        self.record.size = size

    def _record_call(
        self,
        loss: LossModule,
        evaluator: Evaluator,
        twin: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        record = self.record
        template, outputs = tensors_of(output)
        if not any(value.is_floating_point() for value in outputs):
            return None  # such as a loss that is not switched on yet
        self.long_outputs |= any(value.ndim > 0 for value in outputs)
        if record.size is None and (first := first_tensor((args, kwargs))) is not None:
            self._set_size(first.shape[0])  # the loss is called outside of the model's own forward
        size = record.size
        if size is None:
            raise ValueError('none of its arguments is a batch')
        if any(value.ndim > 0 and value.shape[0] == size > 1 for value in outputs):
            return None  # reduction='none': the model goes on with it, and may return it as it is
        if evaluator.is_neither:
            raise ValueError(
                'it divides by a count over the whole batch, or compares samples with each other, so that it is '
                'neither the sum nor the mean of its samples'
            )
        record.half |= _autocast_on(outputs[0].device) or outputs[0].dtype.itemsize == 2
        call = LossCall(twin, size, args, kwargs, record.half)
        with torch.set_grad_enabled(torch.is_grad_enabled() and record.weights is not None):
            samples = evaluator.losses(call)
        if len(samples) != len(outputs) or any(values.shape != (size,) for values in samples):
            raise ValueError(f'for one sample it gives {len(samples)} losses, for the batch {len(outputs)}')
        for index, values in enumerate(samples):
            reduction = evaluator.reduction(call, index, values, outputs[index])
            factor = loss.outside_factor(self.model, index)
            returned = outputs[index].detach().float().reshape(())
            outputs[index] = self._add(loss.name, values, reduction, factor, outputs[index])
            if record.weights is not None:
                record.terms[-1].replaced = returned * factor
        return fill(template, outputs) if record.weights is not None or record.full_size is not None else None

    def _add(self, name: str, values: Tensor, reduction: Reduction, factor: float, output: Tensor) -> Tensor:
        """Record a term; gives what the loss is to return in place of ``output``."""
        weights, full_size = self.record.weights, self.record.full_size
        values = values if weights is not None else values.detach()
        values = values.float() if values.dtype.itemsize == 2 else values  # sums in 16 bits would be rounded
        combined = reduction.combine(values, weights, full_size)
        # Products are new tensors: heads add later stages' losses into the first one's.
        own = [values.detach().float() * factor, combined.detach().float() * factor]
        self.record.terms.append(LossTerm(name, own[0], reduction, own[1]))
        if weights is not None:
            if output.numel() == values.numel() > 1:
                return (values * weights.to(values) * values.numel()).to(output.dtype)  # its mean is sum_i w_i l_i
            return combined.to(output.dtype).reshape(output.shape)
        if full_size is not None and reduction is Reduction.SUM:
            return output * reduction.subset_factor(values.numel(), full_size)
        return output


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _autocast_on(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # torch < 2.4
        return torch.is_autocast_cpu_enabled() if device.type == 'cpu' else torch.is_autocast_enabled()
