"""The losses of all samples at once, for the losses that most models use.

A form takes a loss module and its arguments and gives the samples' losses, (N,), or None where it does not cover the
call. It costs about as much as the loss itself, and does the same operations as ``torch.func.vmap`` would, with less
work around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Form = Callable[..., Tensor | None]


def form_of(module: nn.Module) -> Form | None:
    """The form of a loss; of exactly these classes, since a derived one may compute something else."""
    kind = type(module)
    package = 'mmpose.' if kind.__module__.startswith('mmpose.models.losses.') else kind.__module__ + '.'
    return _FORMS.get(package + kind.__name__)


def _averages(switch: str, module: Any, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Means, or sums, over a function of each number; ``switch`` is the attribute that has the reduction."""
    if switch == 'reduction':
        how, unreduced = module.reduction, 'none'
    else:
        how = getattr(module.criterion, 'keywords', {}).get('reduction', 'mean')
        unreduced = partial(module.criterion, reduction='none')
    twin = nn.Module.__new__(type(module))
    vars(twin).update(vars(module), **{switch: unreduced})
    losses = twin.forward(output, target, *args, **kwargs)
    # Where shapes are broadcast, a row of the result may be made of several samples.
    same = losses.shape == output.shape == target.shape
    return _reduced(losses, how) if same and how in ('mean', 'sum', 'batchmean') else None


def _reduced(losses: Tensor, how: str) -> Tensor:
    losses = losses.float() if losses.dtype.itemsize == 2 else losses
    if losses.ndim == 1:
        return losses
    dims = tuple(range(1, losses.ndim))
    return losses.mean(dims) if how == 'mean' else losses.sum(dims)


def _cross_entropy(module: Any, scores: Tensor, labels: Tensor) -> Tensor | None:
    """Torch's ``CrossEntropyLoss`` of class numbers, without smoothing."""
    if module.label_smoothing or labels.is_floating_point() or labels.ndim != scores.ndim - 1:
        return None
    losses = F.cross_entropy(
        scores, labels, weight=module.weight, ignore_index=module.ignore_index, reduction='none'
    ).float()
    if module.reduction == 'sum':
        return _reduced(losses, 'sum')
    counted = labels != module.ignore_index
    if losses.ndim == 1:
        return losses.where(counted, torch.nan)  # a sample whose labels are all ignored is 0 / 0
    return _reduced(losses, 'sum') / counted.flatten(1).sum(1) if module.reduction == 'mean' else None


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


def _rle(module: Any, pred: Tensor, sigma: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
    """MMPose's ``RLELoss``, summed over the keypoints of each sample; its mean over the batch is left out."""
    sigma = sigma.sigmoid()
    error = (pred - target) / (sigma + 1e-9)
    flow = module.flow_model.log_prob(error.reshape(-1, 2)).reshape(*target.shape[:2], 1)
    losses = sigma.log().reshape(*target.shape[:2], 2) - flow
    if module.residual and module.q_distribution == 'laplace':
        losses = losses + ((sigma * 2).log() + error.abs())
    elif module.residual:
        losses = losses + ((sigma * math.sqrt(2 * math.pi)).log() + 0.5 * error**2)
    if module.use_target_weight:
        losses = losses * target_weight
    return losses.flatten(1).sum(1)


_TORCH = 'torch.nn.modules.loss.'
_BY_REDUCTION = ('L1Loss', 'MSELoss', 'SmoothL1Loss', 'HuberLoss', 'BCELoss', 'BCEWithLogitsLoss', 'KLDivLoss')
_FORMS: dict[str, Form] = {
    **{_TORCH + name: partial(_averages, 'reduction') for name in _BY_REDUCTION},
    _TORCH + 'CrossEntropyLoss': _cross_entropy,
    'mmpose.BCELoss': partial(_averages, 'reduction'),
    **{f'mmpose.{name}': partial(_averages, 'criterion') for name in ('L1Loss', 'MSELoss', 'SmoothL1Loss')},
    'mmpose.KLDiscretLoss': _kl_discret,
    'mmpose.KeypointMSELoss': _keypoint_mse,
    'mmpose.RLELoss': _rle,
}
