"""A loss module evaluated on every sample as a batch of one (ours)."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from mm_sharp.per_sample_loss.layout import Layout, fill, tensors_of

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


class Evaluator:
    """Evaluates one loss module on batches of one, in the fastest way that works for it.

    Attributes:
        vmap_error: What ``torch.func.vmap`` failed with, once it did; from then on there is a loop over the samples.
    """

    def __init__(self) -> None:
        self.vmap_error: Exception | None = None
        self._upcast = False

    def __call__(self, module: nn.Module, layout: Layout) -> list[Tensor]:
        """The losses of each sample.

        Args:
            module: What :func:`shadow` gave.
            layout: Its arguments, ``layout.template`` being ``(args, kwargs)``.

        Returns:
            One tensor (N,) for every tensor in the module's output, in the order of :func:`tensors_of`.

        Raises:
            ValueError: The module draws random numbers, or gives no single number for one sample.
            Exception: Whatever the module raises on a batch of one.
        """
        analytic = _analytic(module)
        if analytic is not None:
            return [analytic(module, *fill(layout.template[0], layout.rows), **fill(layout.template[1], layout.rows))]
        if layout.all_tensors and self.vmap_error is None:
            try:
                with warnings.catch_warnings():
                    # Single operations without a batched form (kl_div) run one by one: slower, and right.
                    warnings.filterwarnings('ignore', message='There is a performance drop')
                    return self._vectorised(module, layout)
            except Exception as error:
                if 'randomness' in str(error):
                    raise ValueError('it draws random numbers, which a sample alone does not repeat') from error
                # Without the frames it came through, which hold on to a whole batch.
                error.__cause__ = error.__context__ = None
                self.vmap_error = error.with_traceback(None)
        return self._loop(module, layout)

    def _vectorised(self, module: nn.Module, layout: Layout) -> list[Tensor]:
        rows = [_at_least_float32(row) for row in layout.rows] if self._upcast else layout.rows
        # A buffer that one sample's call changed belongs to vmap from then on, hence a copy.
        values = list(torch.func.vmap(_batch_of_one(shadow(module), layout), randomness='error')(*rows))
        if not self._upcast and any(value.dtype.itemsize == 2 for value in values):
            # Under vmap autocast misses operations that are made of others, such as cross entropy, which it would
            # compute in float32.
            self._upcast = True
            return self._vectorised(module, layout)
        return values

    def _loop(self, module: nn.Module, layout: Layout) -> list[Tensor]:
        samples = [run(shadow(module), layout, layout.sample(i), 1) for i in range(layout.size)]
        return [torch.stack(values) for values in zip(*samples, strict=True)]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave the CPU's random numbers as they were: vmap refuses losses that draw some, the loop runs them."""
    with torch.random.fork_rng(devices=[]):
        yield


def run(module: nn.Module, layout: Layout, rows: list[Any], count: int) -> list[Tensor]:
    """Call ``module`` on the ``count`` samples in ``rows``.

    Returns:
        A tensor () for every tensor in the output.

    Raises:
        ValueError: The output has several numbers.
    """
    args, kwargs = fill(layout.template, rows)
    if kwargs.get('avg_factor') is not None:
        kwargs = {**kwargs, 'avg_factor': count}  # of the batch, it is the batch size; facts.py makes sure
    outputs = tensors_of(module(*args, **kwargs))[1]
    if any(output.numel() != 1 for output in outputs):
        raise ValueError(f'for one sample it gives {[tuple(o.shape) for o in outputs]} instead of one number')
    return [output.reshape(()) for output in outputs]


def _at_least_float32(row: Any) -> Any:
    half = isinstance(row, Tensor) and row.is_floating_point() and row.dtype.itemsize == 2
    return row.float() if half else row


def _batch_of_one(module: nn.Module, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    def one(*rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(module, layout, [row.unsqueeze(0) for row in rows], 1))

    return one


def _analytic(module: nn.Module) -> Callable[..., Tensor] | None:
    # Exactly these classes: a subclass may compute something else.
    if type(module).__module__.startswith('mmpose.models.losses.'):
        return _ANALYTIC.get(type(module).__name__)
    return None


def _kl_discret(module: Any, pred_simcc: Any, gt_simcc: Any, target_weight: Tensor | None) -> Tensor:
    """MMPose's ``KLDiscretLoss``, summed over the keypoints of each sample instead of over all."""
    count, keypoints, _ = pred_simcc[0].shape
    losses: Any = 0
    for prediction, target in zip(pred_simcc, gt_simcc):  # noqa: B905 (as the loss itself: a third axis is left out)
        loss = module.criterion(prediction.flatten(0, 1), target.flatten(0, 1)).reshape(count, keypoints)
        if module.use_target_weight:
            assert target_weight is not None
            loss = loss * target_weight.reshape(count, keypoints)
        if module.mask is not None:
            scale = loss.new_ones(keypoints)
            scale[module.mask] = module.mask_weight
            loss = loss * scale
        losses = losses + loss.sum(1)
    return losses / keypoints  # type: ignore[no-any-return]


def _keypoint_mse(
    module: Any, output: Tensor, target: Tensor, target_weights: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """MMPose's ``KeypointMSELoss``, averaged over each sample's heatmaps instead of over all."""
    squares = F.mse_loss(output, target, reduction='none')
    if mask is None and not module.skip_empty_channel and (target_weights is None or target_weights.ndim == 2):
        losses = squares.flatten(2).mean(2)  # one number a keypoint before the weights: one pass over the heatmaps
        weighted = losses if target_weights is None else losses * target_weights
        return weighted.mean(1) * module.loss_weight  # type: ignore[no-any-return]
    weight = module._get_mask(target, target_weights, mask)
    return (squares * weight).flatten(1).mean(1) * module.loss_weight  # type: ignore[no-any-return]


_ANALYTIC: dict[str, Callable[..., Tensor]] = {'KLDiscretLoss': _kl_discret, 'KeypointMSELoss': _keypoint_mse}
