"""Forms: functions of a loss module and its arguments that give the losses of all samples at once, (N,), at the cost
of the loss, for those that most models use; None where the form does not cover the call.
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


def _average(switch: str, module: Any, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Means, or sums, over a function of each number; ``switch`` is the attribute that has the reduction."""
    found = getattr(module, switch)
    how = found if isinstance(found, str) else getattr(found, 'keywords', {}).get('reduction', 'mean')
    unreduced: Any = 'none' if isinstance(found, str) else partial(found, reduction='none')
    twin = nn.Module.__new__(type(module))
    vars(twin).update(vars(module), **{switch: unreduced})
    losses: Tensor = twin.forward(output, target, *args, **kwargs)
    # Where shapes are broadcast, a row of the result may be made of several samples.
    if not losses.shape == output.shape == target.shape or how not in ('mean', 'sum', 'batchmean'):
        return None
    losses = losses.float() if losses.dtype.itemsize == 2 else losses
    rest = tuple(range(1, losses.ndim))
    return losses if not rest else losses.mean(rest) if how == 'mean' else losses.sum(rest)


def _cross_entropy(module: Any, scores: Tensor, labels: Tensor) -> Tensor | None:
    """Torch's ``CrossEntropyLoss`` of one class number a sample, without smoothing."""
    if module.label_smoothing or labels.is_floating_point() or labels.ndim != 1 or module.reduction == 'none':
        return None
    ignored = module.ignore_index
    losses = F.cross_entropy(scores, labels, module.weight, ignore_index=ignored, reduction='none').float()
    # The mean over no label at all is 0 / 0.
    return losses if module.reduction == 'sum' else losses.where(labels != ignored, torch.nan)


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
) -> Tensor | None:
    """MMPose's ``KeypointMSELoss``, averaged over each sample's heatmaps instead of over all."""
    odd_weights = target_weights is not None and target_weights.ndim != 2
    if mask is not None or module.skip_empty_channel or odd_weights or output.ndim < 3:
        return None
    # One number a keypoint before the weights: one pass over the heatmaps.
    losses = F.mse_loss(output, target, reduction='none').flatten(2).mean(2)
    losses = losses if target_weights is None else losses * target_weights
    return losses.mean(1) * module.loss_weight  # type: ignore[no-any-return]


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
    losses = losses * target_weight if module.use_target_weight else losses
    return losses.flatten(1).sum(1)  # type: ignore[no-any-return]


_TORCH = 'torch.nn.modules.loss.'
_BY_REDUCTION = ('L1Loss', 'MSELoss', 'SmoothL1Loss', 'HuberLoss', 'BCELoss', 'BCEWithLogitsLoss', 'KLDivLoss')
_FORMS: dict[str, Form] = {
    **{_TORCH + name: partial(_average, 'reduction') for name in _BY_REDUCTION},
    **{f'mmpose.{name}': partial(_average, 'criterion') for name in ('L1Loss', 'MSELoss', 'SmoothL1Loss')},
    'mmpose.BCELoss': partial(_average, 'reduction'),
    _TORCH + 'CrossEntropyLoss': _cross_entropy,
    'mmpose.KLDiscretLoss': _kl_discret,
    'mmpose.KeypointMSELoss': _keypoint_mse,
    'mmpose.RLELoss': _rle,
}
