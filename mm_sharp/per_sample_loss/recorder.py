"""The hooks that record every sample's loss while a model computes its batch's (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.ops.model_call import unwrap
from mm_sharp.per_sample_loss.evaluate import same_random_state, shadow
from mm_sharp.per_sample_loss.facts import LossFacts, autocast_on, first_tensor
from mm_sharp.per_sample_loss.find import LossModule, PerSampleLossError, Structure, find_losses
from mm_sharp.per_sample_loss.layout import batch_size, fill, slots_of, tensors_of
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
        self._facts: dict[int, LossFacts] = {}
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
        facts = {}
        for loss in self.losses:
            known = self._facts.get(id(loss.module))
            facts[id(loss.module)] = known if known and known.hold_for(loss.module) else LossFacts(loss.module)
        if changed := facts != self._facts:
            self._checks.passed_once = False  # those under way stay
        self._facts = facts
        return changed

    @property
    def looped(self) -> dict[str, Exception]:
        """The loss modules that are evaluated in a loop because ``torch.func.vmap`` failed, and its error."""
        errors = {loss.name: self._facts[id(loss.module)].evaluator.vmap_error for loss in self.losses}
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
        hooks = _Hooks(self.model, self._facts, record, self.around)
        handles = []
        try:
            handles.append(self.model.register_forward_pre_hook(hooks.before_model, with_kwargs=True))
            # First of the model's hooks: others are to see the losses that it returns.
            handles.append(self.model.register_forward_hook(hooks.after_model, prepend=True, always_call=True))
            for loss in self.losses:
                handles.append(loss.module.register_forward_pre_hook(hooks.before_loss, with_kwargs=True))
                after = hooks.after_loss(loss)
                handles.append(loss.module.register_forward_hook(after, with_kwargs=True))
            yield record
        finally:
            for handle in handles:
                handle.remove()


class _Hooks:
    """The hooks of one forward pass."""

    def __init__(
        self,
        model: nn.Module,
        facts: dict[int, LossFacts],
        record: LossRecord,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.facts, self.record, self.around = model, facts, record, around
        # Loss modules that are running, their shadows, and the versions of the tensors they were called with.
        self.open: list[tuple[nn.Module, nn.Module, list[int]]] = []
        self.long_outputs = False  # whether a loss module gave a tensor with a dimension
        self.depth = 0  # of the calls of a model that calls itself

    @property
    def weights(self) -> Tensor | None:
        return self.record.weights

    @property
    def full_size(self) -> int | None:
        return self.record.full_size

    def before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.open.clear()
        self.long_outputs = False
        self.record.terms.clear()
        self.record.size = None
        size = batch_size(args, kwargs)
        if size is not None:
            self._set_size(size)

    def before_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The copy is made now, because the module may count the call that is about to happen. A loss that runs inside
        # another one is part of it.
        if not self.open:
            with self.around():
                self.open.append((module, shadow(module), _versions(args, kwargs)))

    def after_loss(self, loss: LossModule) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self.open or self.open[-1][0] is not module:
                return None
            _, twin, versions = self.open[-1]
            try:
                if versions != _versions(args, kwargs):
                    raise ValueError('it changes its arguments in place, so that it cannot be evaluated a second time')
                with self.around():
                    return self._record_call(loss, twin, args, kwargs, output)
            except Exception as error:  # whatever a loss of anyone's raises on a batch of one
                raise PerSampleLossError(f'{loss.name}: {error}.') from error
            finally:
                self.open.pop()  # only now: what the evaluation calls is part of it

        return after

    def after_model(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Take the losses of shape (N,) that a model returns as they are."""
        self.depth -= 1
        size = self.record.size
        if self.depth or size is None or (size == 1 and self.long_outputs):
            return None  # one sample: what looks like (N,) may be a hooked loss with one dimension more
        template, tensors = tensors_of({'loss': output} if isinstance(output, Tensor) else output)
        if not isinstance(template, dict):
            return None
        replaced = list(tensors)
        for name, part in template.items():
            for slot in slots_of(part) if 'loss' in name else []:
                value = tensors[slot]
                if value.shape == (size,):
                    replaced[slot] = self._add(f"{self.record.owner}'s {name}", value, Reduction.MEAN, 1.0, value)
        if self.weights is None or all(new is old for new, old in zip(replaced, tensors, strict=True)):
            return None
        return replaced[0] if isinstance(output, Tensor) else fill(template, replaced)

    def _set_size(self, size: int) -> None:
        weights, full_size = self.weights, self.full_size
        if weights is not None and weights.shape != (size,):
            raise ValueError(f'weights of shape {tuple(weights.shape)} do not fit the batch: it must be ({size},)')
        if full_size is not None and full_size < size:
            raise ValueError(f'full_size={full_size} is not allowed: it must be at least the batch size, {size}')
        self.record.size = size

    def _record_call(
        self, loss: LossModule, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        template, outputs = tensors_of(output)
        if not outputs or not any(value.is_floating_point() for value in outputs):
            return None  # such as a loss that is not switched on yet
        self.long_outputs |= any(value.ndim > 0 for value in outputs)
        facts = self.facts[id(loss.module)]
        if self.record.size is None and (first := first_tensor(args, kwargs)) is not None:
            self._set_size(first.shape[0])  # the loss is called outside of the model's own forward
        size = self.record.size
        if size is None:
            raise ValueError('none of its arguments is a batch')
        if any(value.ndim > 0 and value.shape[0] == size > 1 for value in outputs):
            return None  # reduction='none': the model goes on with it, and may return it as it is
        if facts.known is Reduction.NEITHER:
            raise ValueError(
                'it divides by a count over the whole batch, or compares samples with each other, so that it is '
                'neither the sum nor the mean of its samples'
            )
        layout = facts.layout(size, args, kwargs)
        self.record.half |= autocast_on(outputs[0].device) or outputs[0].dtype.itemsize == 2
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights is not None), same_random_state():
            samples = facts.evaluator(twin, layout)
        if len(samples) != len(outputs) or any(values.shape != (size,) for values in samples):
            raise ValueError(f'for one sample it gives {len(samples)} losses, for the batch {len(outputs)}')
        for index, values in enumerate(samples):
            returned = outputs[index].detach().reshape(())
            reduction = facts.reduction(twin, layout, index, values.detach(), returned, self.record.half)
            factor = loss.outside_factor(self.model, index)
            outputs[index] = self._add(loss.name, values, reduction, factor, outputs[index])
            if self.weights is not None:
                self.record.terms[-1].replaced = returned.float() * factor
        return fill(template, outputs) if self.weights is not None or self.full_size is not None else None

    def _add(self, name: str, values: Tensor, reduction: Reduction, factor: float, output: Tensor) -> Tensor:
        """Record a term.

        Returns:
            What the loss is to return in place of ``output``: the same, if nothing is weighted.
        """
        weights, full_size = self.weights, self.full_size
        detached = values.detach().float()
        combined = reduction.combine(detached, weights, full_size)
        # The products are new tensors: heads add later stages' losses into the first one's.
        self.record.terms.append(LossTerm(name, detached * factor, reduction, combined * factor))
        if weights is not None:
            if output.numel() == values.numel() > 1:
                return (values * weights.to(values) * values.numel()).to(output.dtype)  # its mean is sum_i w_i l_i
            return reduction.combine(values, weights, full_size).to(output.dtype).reshape(output.shape)
        if full_size is not None and reduction is Reduction.SUM:
            return output * reduction.subset_factor(values.numel(), full_size)
        return output


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """How often each tensor among the arguments was changed in place."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_of((args, kwargs))[1]]
