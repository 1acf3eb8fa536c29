"""A loss module evaluated on every sample as a batch of one."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.per_sample_loss.find import is_neither
from mm_sharp.per_sample_loss.forms import form_of
from mm_sharp.per_sample_loss.layout import Layout, fill, first_tensor, tensors_of
from mm_sharp.per_sample_loss.record import ROUNDING, Reduction

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def shadow(module: nn.Module) -> nn.Module:
    """A copy of a loss to be called without a trace, since some count their calls, or keep averages.

    It has the same parameters, copies of buffers and no hooks. What a loss changes inside a list of its own is seen.
    """
    twin = type(module).__new__(type(module))
    state = dict(vars(module))
    state['_parameters'] = dict(module._parameters)
    state['_buffers'] = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    state['_modules'] = {name: None if m is None else shadow(m) for name, m in module._modules.items()}
    state.update((hooks, OrderedDict()) for hooks in _HOOKS)
    vars(twin).update(state)
    return twin


class Evaluator:
    """Evaluates one loss module on batches of one, in the fastest way that works, and remembers what calls have shown.

    Once it is known what each output is of its samples' losses, nothing here waits for an accelerator.
    """

    def __init__(self, module: nn.Module) -> None:
        self.form = form_of(module)  # None from the moment that it was found to be wrong
        self.is_looped = False  # whether torch.func.vmap failed: from then on there is a loop over the samples
        self._form_is_right = self._upcast = False
        self._is_neither = is_neither(module)
        self._by_sample = type(module).__name__ == 'AssociativeEmbeddingLoss'
        self._shared: set[str] = set()
        self._reductions: dict[int, Reduction] = {}  # of each output
        self._signature = inspect.signature(module.forward)
        names = list(self._signature.parameters)
        self._names = names if 'avg_factor' in names else None
        self._keeps_rows: bool | None = None  # what keeps_rows has seen

    def __call__(
        self, module: nn.Module, size: int, args: Any, kwargs: Any, outputs: Sequence[Tensor], tolerance: float
    ) -> list[tuple[Tensor, Reduction]]:
        """The losses of the N samples, (N,), for each of the ``outputs`` of a call, and what the output is of them.

        ``module`` is a :func:`shadow` made before the call, or the loss itself where it has a form. Raises a ValueError
        where there are no such losses, and whatever the module raises on a batch of one.
        """
        if self._is_neither:
            cause = 'it divides by a count over the whole batch, or compares samples with each other'
            raise ValueError(f'{cause}, so that it is neither the sum nor the mean of its samples')
        samples = self._losses(module, size, args, kwargs)
        if len(samples) != len(outputs) or any(values.shape != (size,) for values in samples):
            raise ValueError(f'for one sample it gives {len(samples)} losses, for the batch {len(outputs)}')
        if len(self._reductions) < len(outputs):
            seen, returned = samples, outputs
            if size == 1:  # nothing to tell from one sample
                returned = self._twice(module, args, kwargs)
                seen = [torch.cat([values, values]) for values in samples]
            for index, (values, output) in enumerate(zip(seen, returned, strict=True)):
                if index not in self._reductions:
                    found = _reduction_of(values.detach(), output.detach().reshape(()), tolerance)
                    self._reductions.update({index: found} if found else {})
        # A loss that was zero in all samples so far is taken for what the others are.
        other = next(iter(self._reductions.values()), Reduction.MEAN)
        return [(values, self._reductions.get(index, other)) for index, values in enumerate(samples)]

    def keeps_rows(self, module: nn.Module, size: int, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> bool:
        """Whether the outputs of a call have a row for every sample, as with ``reduction='none'``."""
        have_rows = _have_rows(outputs, size)
        if size > 1:
            self._keeps_rows = have_rows
        elif have_rows and self._keeps_rows is None:  # a loss of shape (1,) looks the same
            self._keeps_rows = _have_rows(self._twice(module, args, kwargs), 2)
        return have_rows and bool(self._keeps_rows)

    def _twice(self, module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
        """What a batch of one gives with its sample twice."""
        layout = self._layout(1, args, kwargs)
        rows = [torch.cat([row, row]) if isinstance(row, Tensor) else [*row, *row] for row in layout.rows]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _call(shadow(module), layout, rows, 2)

    def _losses(self, module: nn.Module, size: int, args: Any, kwargs: Any) -> list[Tensor]:
        if self.form is not None and kwargs:  # forms have names of their own for arguments
            bound = self._signature.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        values = None if self.form is None else self.form(module, *args, **kwargs)
        if values is not None and values.shape == (size,) and self._form_is_right:
            return [values]
        layout = self._layout(size, args, kwargs)
        if values is not None and self._confirm_form(values, module, layout):
            return [values]
        if not self.is_looped and all(isinstance(row, Tensor) for row in layout.rows):
            try:
                with warnings.catch_warnings():
                    # Single operations without a batched form run one by one: slower, and right.
                    warnings.filterwarnings('ignore', message='There is a performance drop')
                    return self._vectorised(module, layout)
            except Exception as error:  # of any kind: the loop says what is wrong
                if 'randomness' in str(error):
                    raise ValueError('it draws random numbers, which a sample alone does not repeat') from error
                self.is_looped = True
        return _loop(module, layout, size)

    def _layout(self, size: int, args: Any, kwargs: Any) -> Layout:
        first = first_tensor((args, kwargs))
        if first is None or first.shape[0] != size:
            shape = None if first is None else tuple(first.shape)
            raise ValueError(f'its input of shape {shape} does not have one row for each of {size} samples')
        if self._names is not None:
            # By name: the average over a batch of one divides by 1, whatever place the number was given in.
            args, kwargs = (), {**dict(zip(self._names, args, strict=False)), **kwargs}
            average = kwargs.get('avg_factor')
            if average is not None and float(average) != size:
                raise ValueError(f'avg_factor={float(average):g} is not the number of samples, {size}')
        return Layout(size, self._shared, self._by_sample).split_call(args, kwargs)

    def _confirm_form(self, values: Tensor, module: nn.Module, layout: Layout) -> bool:
        # On the first samples: in another version the module may compute something else.
        with torch.no_grad():
            alone = _loop(module, layout, min(layout.size, 4))[0]
        first = values.detach()[: len(alone)].to(alone)
        self._form_is_right = torch.allclose(first, alone, rtol=1e-3, atol=ROUNDING, equal_nan=True)
        self.form = self.form if self._form_is_right else None
        return self._form_is_right

    def _vectorised(self, module: nn.Module, layout: Layout) -> list[Tensor]:
        # A buffer that one sample's call changed belongs to vmap from then on, hence a copy.
        twin = shadow(module)

        def one(*rows: Tensor) -> tuple[Tensor, ...]:
            return tuple(_run(twin, layout, [row.unsqueeze(0) for row in rows]))

        rows: list[Any] = layout.rows
        if self._upcast:
            rows = [row.float() if row.is_floating_point() and row.dtype.itemsize == 2 else row for row in rows]
        values = list(torch.func.vmap(one, randomness='error')(*rows))
        if not self._upcast and any(value.dtype.itemsize == 2 for value in values):
            # Under vmap autocast misses operations that are made of others, such as cross entropy, which it would
            # compute in float32.
            self._upcast = True
            return self._vectorised(module, layout)
        return values


def _loop(module: nn.Module, layout: Layout, count: int) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):  # vmap refuses losses that draw random numbers, the loop runs them
        samples = [_run(shadow(module), layout, layout.sample(i)) for i in range(count)]
    return [torch.stack(values) for values in zip(*samples, strict=True)]


def _call(module: nn.Module, layout: Layout, rows: Sequence[Any], count: int) -> list[Tensor]:
    """Call ``module`` on the ``count`` samples in ``rows``; gives every tensor in the output."""
    args, kwargs = fill(layout.template, rows)
    if kwargs.get('avg_factor') is not None:
        kwargs = {**kwargs, 'avg_factor': count}  # of the batch, it is the batch size: _layout makes sure
    return tensors_of(module(*args, **kwargs))[1]


def _run(module: nn.Module, layout: Layout, rows: Sequence[Any]) -> list[Tensor]:
    """The same on a batch of one; every tensor is ()."""
    outputs = _call(module, layout, rows, 1)
    if any(output.numel() != 1 for output in outputs):
        raise ValueError(f'for one sample it gives {[tuple(o.shape) for o in outputs]} instead of one number')
    return [output.reshape(()) for output in outputs]


def _have_rows(outputs: Sequence[Tensor], size: int) -> bool:
    return any(output.ndim > 0 and output.shape[0] == size for output in outputs)


def _reduction_of(values: Tensor, returned: Tensor, tolerance: float) -> Reduction | None:
    """Which of sum and mean a batch's loss is closer to; None where values are zero, cancel or are not finite."""
    values = values.double()
    total, size, loss = torch.stack([values.sum(), values.abs().sum(), returned.double()]).tolist()
    if not math.isfinite(size + loss) or abs(total) <= tolerance * size:
        return None
    return Reduction.SUM if abs(loss - total) < abs(loss - total / len(values)) else Reduction.MEAN
