"""The hooks that record every sample's loss while a model computes its batch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.ops.host_copy import HostCopy, host_waits
from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.per_sample_loss.evaluate import Evaluator, shadow
from mm_sharp.per_sample_loss.find import LossModule, PerSampleLossError, find_losses
from mm_sharp.per_sample_loss.layout import batch_size, fill, tensors_of
from mm_sharp.per_sample_loss.record import LossRecord, LossTerm, Reduction

# Relative differences allowed in the first comparison; in later ones, since a sum that cancels is no reason to stop a
# training; and under autocast to 16 bits.
STRICT, LOOSE, HALF = 1e-5, 1e-3, 2e-2


class PerSampleLoss:
    """Records the loss of every sample of a model's batches; losses may be replaced or added between two forwards.

    (Not in plain lists and dicts, which are looked through only once.)

    Args:
        model: Any model; a DDP wrapper is looked through.
        around: Makes a context for the work on each loss, as for timing it.

    Raises:
        PerSampleLossError: The model has a head for which there are no losses of samples.
    """

    def __init__(self, model: nn.Module, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model = unwrap(model)
        self.around = around
        self._in_flight: list[tuple[LossRecord, HostCopy, float]] = []
        self._find()

    def look_again(self) -> bool:
        """Find the losses anew if modules of the model were replaced, added or taken away; whether they were."""
        changed = not self._tree.same_modules()
        if changed:
            self._find()
        return changed

    @property
    def looped(self) -> list[str]:
        """The loss modules that are evaluated in a loop because ``torch.func.vmap`` failed."""
        return [loss.name for loss in self.losses if self.evaluators[loss.path].is_looped]

    @contextmanager
    def record(self, weights: Tensor | None = None, full_size: int | None = None) -> Iterator[LossRecord]:
        """Record the model's forward pass in this context; without arguments, the model's output is untouched.

        Both arguments may also be set on the record until the forward begins.

        Args:
            weights: Of the K samples of this forward, (K,): every loss becomes :meth:`Reduction.combine` of its
                samples', with gradient.
            full_size: The number of samples N from which the K were drawn, N >= K; K if None. Losses that are sums are
                scaled by N/K, also without weights. The record's values are never scaled.

        Raises:
            ValueError: ``weights`` or ``full_size`` do not fit the batch (in the forward).
            PerSampleLossError: A loss has no form for single samples (in the forward).
        """
        self.look_again()
        record = LossRecord(type(self.model).__name__, self._check, weights, full_size)
        hooks = _Hooks(self, record)
        handles = [
            self.model.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
            # First of the model's hooks: others are to see the losses that it returns.
            self.model.register_forward_hook(hooks.after_model, prepend=True, always_call=True),
        ]
        for loss in self.losses:
            if self.evaluators[loss.path].form is None:
                handles.append(loss.module.register_forward_pre_hook(hooks.before_loss))
            handles.append(loss.module.register_forward_hook(partial(hooks.after_loss, loss), with_kwargs=True))
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def flush(self) -> None:
        """Raise what an accelerator has found of the forwards before; waits for it, not for what runs now."""
        in_flight, self._in_flight = self._in_flight, []
        for record, copy, tolerance in in_flight:
            record.judge(copy.numpy().tolist(), tolerance)

    def _find(self) -> None:
        self.losses = find_losses(self.model)
        self._tree = ModuleTree(self.model)
        self.evaluators = {loss.path: Evaluator(loss.module) for loss in self.losses}
        self._has_passed = False  # a comparison with the total loss; those in flight stay

    def _check(self, record: LossRecord, total: Tensor) -> None:
        """Compare a record with the total loss; on an accelerator the host waits for the first comparison only."""
        tolerance = HALF if record.half else LOOSE if self._has_passed else STRICT
        pairs = record.pairs(total)
        if self._has_passed and host_waits(total.device):
            together = torch.stack([value.to(total.device, torch.float32) for value in pairs])
            self._in_flight.append((record, HostCopy(together), tolerance))
        else:
            self._has_passed |= record.judge([value.item() for value in pairs], tolerance)


class _Hooks:
    """The hooks of one forward pass."""

    def __init__(self, recorder: PerSampleLoss, record: LossRecord) -> None:
        self.recorder, self.record = recorder, record
        self.open: tuple[nn.Module, nn.Module] | None = None  # the loss module that is running, and its shadow
        self.long_outputs = False  # whether a loss module gave a tensor with a dimension
        self.depth = 0  # of the calls of a model that calls itself

    def before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        record, size = self.record, batch_size(args, kwargs)
        self.open, self.long_outputs, record.size = None, False, size
        record.terms.clear()
        record.unreduced.clear()
        if size and record.weights is not None and record.weights.shape != (size,):
            shape = tuple(record.weights.shape)
            raise ValueError(f'weights of shape {shape} do not fit the batch: it must be ({size},)')
        if size and record.full_size is not None and record.full_size < size:
            raise ValueError(f'full_size={record.full_size} is not allowed: it must be at least the batch size, {size}')

    def before_loss(self, module: nn.Module, _: Any) -> None:
        # The copy is made now, because the module may count the call that is about to happen. A loss that runs inside
        # another one is part of it.
        if self.open is None:
            self.open = module, shadow(module)

    def after_loss(self, loss: LossModule, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        opened, twin = self.open or (module, module)  # a loss that has a form does not change
        if opened is not module:
            return None
        try:
            with self.recorder.around():
                return self._record_call(loss, twin, args, kwargs, output)
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

    def _record_call(self, loss: LossModule, twin: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        record, size = self.record, self.record.size
        template, outputs = tensors_of(output)
        if not any(value.is_floating_point() for value in outputs):
            return None  # such as a loss that is not switched on yet
        if size is None:
            raise ValueError("none of the model's arguments is a batch")
        evaluator = self.recorder.evaluators[loss.path]
        if evaluator.keeps_rows(twin, size, args, kwargs, outputs):
            record.unreduced.append(loss.name)
            return None  # the model goes on with it, and may return it as it is
        self.long_outputs |= any(value.ndim > 0 for value in outputs)
        record.half |= _autocast_on(outputs[0].device) or outputs[0].dtype.itemsize == 2
        with torch.set_grad_enabled(torch.is_grad_enabled() and record.weights is not None):
            samples = evaluator(twin, size, args, kwargs, outputs, HALF if record.half else STRICT)
        for index, (values, reduction) in enumerate(samples):
            factor, returned = loss.outside_factor(self.recorder.model, index), outputs[index].detach()
            outputs[index] = self._add(loss.name, values, reduction, factor, outputs[index])
            if record.weights is not None:
                record.terms[-1].replaced = returned.float().reshape(()) * factor
        return fill(template, outputs) if record.weights is not None or record.full_size is not None else None

    def _add(self, name: str, values: Tensor, reduction: Reduction, factor: float, output: Tensor) -> Tensor:
        """Record a term; gives what the loss is to return in place of ``output``."""
        weights, full_size = self.record.weights, self.record.full_size
        values = values if weights is not None else values.detach()
        values = values.float() if values.dtype.itemsize == 2 else values  # sums in 16 bits would be rounded
        combined = reduction.combine(values, weights, full_size)
        # A copy of what is returned: heads add later stages' losses into the first one's.
        own = combined if weights is None else combined.detach().clone()
        term = LossTerm(name, values.detach().float(), reduction, own.float())
        if factor != 1.0:
            term.values, term.combined = term.values * factor, term.combined * factor
        self.record.terms.append(term)
        if weights is not None:
            if output.numel() == values.numel() > 1:
                return (values * weights.to(values) * values.numel()).to(output.dtype)  # its mean is sum_i w_i l_i
            return combined.to(output.dtype).reshape(output.shape)
        if full_size is not None and reduction is Reduction.SUM:
            return output * reduction.subset_factor(values.numel(), full_size)
        return output


def _autocast_on(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # torch < 2.4
        return torch.is_autocast_cpu_enabled() if device.type == 'cpu' else torch.is_autocast_enabled()
