"""A loss module evaluated on every sample as a batch of one."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.per_sample_loss.forms import form_of
from mm_sharp.per_sample_loss.layout import Layout, fill, first_tensor, tensors_of
from mm_sharp.per_sample_loss.reduction import HALF, ROUNDING, STRICT, Reduction, compare, is_neither

_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def shadow(module: nn.Module) -> nn.Module:
    """A copy of ``module`` to be called without a trace: the same parameters, copies of buffers, no hooks.

    Losses may count their calls (``SemiSupervisionLoss``) or keep averages. Attributes other than parameters, buffers
    and submodules are shared: what a loss changes inside a list of its own is seen.
    """
    twin = type(module).__new__(type(module))
    state = dict(vars(module))
    state['_parameters'] = dict(module._parameters)
    state['_buffers'] = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    state['_modules'] = {name: None if m is None else shadow(m) for name, m in module._modules.items()}
    state.update((hooks, OrderedDict()) for hooks in _HOOKS)
    vars(twin).update(state)
    return twin


@dataclass
class LossCall:
    """A call of a loss module.

    Args:
        module: The loss as it was before the call: a :func:`shadow`, or the module itself where it has a form.
        size: Samples in the batch, N.
        args: What it was called with.
        kwargs: The same.
        half: Whether there is autocast to 16 bits.
    """

    module: nn.Module
    size: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    half: bool


class Evaluator:
    """Evaluates one loss module on batches of one, in the fastest way that works for it.

    Nothing here waits for an accelerator once every output of the loss was compared on a batch of several samples.

    Attributes:
        parts: The modules that the loss is made of.
        form: Gives the losses of all samples at once, for well-known losses; None once it was found to be wrong.
        vmap_error: What ``torch.func.vmap`` failed with, once it did; from then on there is a loop over the samples.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = tuple(module.modules())
        self.form = form_of(module)
        self.vmap_error: Exception | None = None
        self.is_neither = is_neither(module)
        self._form_is_right = False
        self._upcast = False
        self._by_sample = type(module).__name__ == 'AssociativeEmbeddingLoss'
        self._shared: set[str] = set()
        self._reductions: dict[int, Reduction] = {}  # of each output
        self._confirmed: set[int] = set()  # outputs that were compared on more than one sample
        names = list(inspect.signature(module.forward).parameters)
        self._names = names if 'avg_factor' in names else None

    def losses(self, call: LossCall) -> list[Tensor]:
        """The losses of each sample.

        Returns:
            One tensor (N,) for every tensor in the module's output, in the order of :func:`tensors_of`.

        Raises:
            ValueError: The arguments are no batch, or the module draws random numbers, or gives no single number for
                one sample.
            Exception: Whatever the module raises on a batch of one.
        """
        values = None if self.form is None else self.form(call.module, *call.args, **call.kwargs)
        if values is not None and values.shape == (call.size,) and self._form_is_right:
            return [values]
        layout = self._layout(call)
        if values is not None and self._is_right(values, call.module, layout):
            return [values]
        if self.vmap_error is None and all(isinstance(row, Tensor) for row in layout.rows):
            try:
                with warnings.catch_warnings():
                    # Single operations without a batched form run one by one: slower, and right.
                    warnings.filterwarnings('ignore', message='There is a performance drop')
                    return self._vectorised(call.module, layout)
            except Exception as error:
                if 'randomness' in str(error):
                    raise ValueError('it draws random numbers, which a sample alone does not repeat') from error
                # Without the frames it came through, which hold on to a whole batch.
                error.__cause__ = error.__context__ = None
                self.vmap_error = error.with_traceback(None)
        return _loop(call.module, layout)

    def reduction(self, call: LossCall, index: int, values: Tensor, output: Tensor) -> Reduction:
        """Whether the ``index``-th output of a call is sum or mean of its samples' losses ``values``, (N,).

        Raises:
            ValueError: It is neither.
        """
        if index in self._confirmed or (call.size == 1 and index in self._reductions):
            return self._reductions[index]
        values, returned = values.detach(), output.detach().reshape(())
        if call.size == 1:
            # Nothing to tell from one sample: so the sample twice.
            layout = self._layout(call)
            twice = [torch.cat([row, row]) if isinstance(row, Tensor) else [*row, *row] for row in layout.rows]
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                returned = _run(shadow(call.module), layout, twice, 2)[index]
            values = torch.cat([values, values])
        found = compare(values, returned, HALF if call.half else STRICT)
        if found is Reduction.NEITHER:
            raise ValueError(
                f'on a batch of {values.numel()} it is {returned.item():.6g}, but its samples alone give a sum of '
                f'{values.sum().item():.6g} and a mean of {values.mean().item():.6g}: it is neither'
            )
        if found is None:  # all zero, or overflown
            return self._reductions.get(index, Reduction.MEAN)
        self._reductions[index] = found
        if call.size > 1:
            self._confirmed.add(index)
        return found

    def _layout(self, call: LossCall) -> Layout:
        """Take the arguments of a call apart."""
        size, args, kwargs = call.size, call.args, call.kwargs
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
        layout = Layout(size, self._shared, self._by_sample)
        # Each argument by itself: as many arguments as samples are no list of samples.
        layout.template = (
            tuple(layout.split(value, f'args.{number}') for number, value in enumerate(args)),
            {name: layout.split(value, f'kwargs.{name}') for name, value in kwargs.items()},
        )
        return layout

    def _is_right(self, values: Tensor, module: nn.Module, layout: Layout) -> bool:
        """Compare the first samples with the module itself: other versions of it may compute something else."""
        with torch.no_grad():
            alone = _loop(module, layout, most=4)[0]
        first = values.detach()[: len(alone)].to(alone)
        self._form_is_right = torch.allclose(first, alone, rtol=1e-3, atol=ROUNDING, equal_nan=True)
        self.form = self.form if self._form_is_right else None
        return self._form_is_right

    def _vectorised(self, module: nn.Module, layout: Layout) -> list[Tensor]:
        # A buffer that one sample's call changed belongs to vmap from then on, hence a copy.
        twin = shadow(module)

        def one(*rows: Tensor) -> tuple[Tensor, ...]:
            return tuple(_run(twin, layout, [row.unsqueeze(0) for row in rows], 1))

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


def _loop(module: nn.Module, layout: Layout, most: int = sys.maxsize) -> list[Tensor]:
    """The losses of the samples, one by one; the CPU's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        samples = [_run(shadow(module), layout, layout.sample(i), 1) for i in range(min(layout.size, most))]
    return [torch.stack(values) for values in zip(*samples, strict=True)]


def _run(module: nn.Module, layout: Layout, rows: Sequence[Any], count: int) -> list[Tensor]:
    """Call ``module`` on the ``count`` samples in ``rows``; gives a tensor () for every tensor in the output."""
    args, kwargs = fill(layout.template, rows)
    if kwargs.get('avg_factor') is not None:
        kwargs = {**kwargs, 'avg_factor': count}  # of the batch, it is the batch size: _layout makes sure
    outputs = tensors_of(module(*args, **kwargs))[1]
    if any(output.numel() != 1 for output in outputs):
        raise ValueError(f'for one sample it gives {[tuple(o.shape) for o in outputs]} instead of one number')
    return [output.reshape(()) for output in outputs]
