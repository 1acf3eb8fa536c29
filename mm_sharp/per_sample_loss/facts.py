"""What earlier calls have shown of a loss module (ours)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mm_sharp.per_sample_loss.evaluate import Evaluator, run, same_random_state, shadow
from mm_sharp.per_sample_loss.find import same_modules
from mm_sharp.per_sample_loss.layout import Layout, tensors_of
from mm_sharp.per_sample_loss.reduction import Reduction, compared, known_reduction

STRICT, HALF = 1e-5, 2e-2  # relative differences allowed between float32 losses, and under autocast to 16 bits


class LossFacts:
    """What is remembered of one loss module from call to call.

    Nothing here waits for an accelerator once every output of the loss was compared on a batch of several samples.

    Args:
        module: The loss.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = tuple(module.modules())
        self.known = known_reduction(module)
        self.evaluator = Evaluator()
        self._by_sample = type(module).__name__ == 'AssociativeEmbeddingLoss'
        self._shared: set[str] = set()
        self._reductions: dict[int, Reduction] = {}  # of each output
        self._confirmed: set[int] = set()  # outputs that were compared on more than one sample
        names = list(inspect.signature(module.forward).parameters)
        self._names = names if 'avg_factor' in names else None

    def hold_for(self, module: nn.Module) -> bool:
        """Whether ``module`` is the loss that this is about, made of the same modules."""
        return same_modules(self._parts, module.modules())

    def layout(self, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """Take the arguments of a call apart.

        Raises:
            ValueError: The first tensor does not have ``size`` rows, or ``avg_factor`` is another number.
        """
        first = first_tensor(args, kwargs)
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

    def reduction(
        self, twin: nn.Module, layout: Layout, index: int, values: Tensor, returned: Tensor, half: bool
    ) -> Reduction:
        """Whether an output is sum or mean of its samples' losses.

        Args:
            twin: The loss, to be called without a trace.
            layout: Its arguments.
            index: The number of the output.
            values: l_i, (N,).
            returned: The output, ().
            half: Whether there is autocast to 16 bits.

        Raises:
            ValueError: It is neither.
        """
        if index in self._confirmed or (layout.size == 1 and index in self._reductions):
            return self._reductions[index]
        if layout.size == 1:
            # Nothing to tell from one sample: so the sample twice.
            twice = [torch.cat([row, row]) if isinstance(row, Tensor) else [*row, *row] for row in layout.rows]
            with torch.no_grad(), same_random_state():
                returned = run(shadow(twin), layout, twice, 2)[index]
            values = torch.cat([values, values])
        found = compared(values, returned, HALF if half else STRICT)
        if found is Reduction.NEITHER:
            raise ValueError(
                f'on a batch of {values.numel()} it is {returned.item():.6g}, but its samples alone give a sum of '
                f'{values.sum().item():.6g} and a mean of {values.mean().item():.6g}: it is neither'
            )
        if found is None:  # all zero, or overflown
            return self._reductions.get(index, self.known or Reduction.MEAN)
        self._reductions[index] = found
        if layout.size > 1:
            self._confirmed.add(index)
        return found


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor with rows among the arguments of a call."""
    return next((tensor for tensor in tensors_of((args, kwargs))[1] if tensor.ndim > 0), None)


def autocast_on(device: torch.device) -> bool:
    """Whether operations on ``device`` are cast to 16 bits."""
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # torch < 2.4
        return torch.is_autocast_cpu_enabled() if device.type == 'cpu' else torch.is_autocast_enabled()
