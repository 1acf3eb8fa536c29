"""Distillation from the float model in quantization-aware training: a hook.

The student is trained on L = (1 - a) * loss(output, labels) + a * loss(output, teacher's output) (Hinton et al. 2015,
arXiv 1503.02531, at temperature 1). For a squared error and for a Kullback-Leibler divergence that is, but for a term
which does not depend on the student, the head's own loss against one mixture of both, (1 - a) * labels + a * teacher's
output. So the head's loss module stays as it is and is given the mixture: gradients are those of L, and whatever asks
for the loss of each sample, in each pass of a step, gets that of L but for a constant of the sample's. (The mixture is
ours.)
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mm_sharp.errors import HOOK, UnsupportedError, UserError, check_number
from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.rng import RandomState

from .build import float_config


@HOOKS.register_module()
class DistillationHook(Hook):  # type: ignore[misc]
    """Train a model on its labels and on what its float model, the teacher, puts out for the same pictures.

    The teacher runs in evaluation mode without gradients, once a batch, whose second pass has the same pictures. It
    runs again on what ESAM chooses of them, and in the few steps (the first ten, and then ever fewer) in which passes
    get copies. It is no part of the model: neither checkpoints nor the optimizer nor exported files have it. The loss
    that is logged is against the mixture.

    It works with heads whose ``loss_module`` is MMPose's ``KeypointMSELoss`` (heatmaps) or ``KLDiscretLoss`` (SimCC).

    Args:
        teacher: The float model's checkpoint, of the run's own model; None: the run's ``load_from``. A run that is
            resumed needs it: there ``load_from`` is the run's own. tools/train.py fills in the config's.
        weight: a, the teacher's share, above 0; at 1 there are no labels.

    Raises:
        ValueError: An argument is not allowed, there is no teacher, its checkpoint does not fit, or the head has
            another loss.
    """

    def __init__(self, teacher: str | None = None, weight: float = 0.5) -> None:
        name = type(self).__name__
        limits: dict[str, Any] = {'low_open': True, 'high': 1.0, 'form': HOOK}
        self.weight = check_number(name, 'weight', weight, example='0.5', **limits)
        if teacher is not None and not isinstance(teacher, str):
            written = HOOK.format(owner=name, name='teacher', example="'float.pth'")
            raise UserError(
                f'{name}: teacher={teacher!r} is not allowed: it must be None or the path of a checkpoint. Write for '
                f'example: {written}'
            )
        self.teacher = teacher
        self._handles: list[RemovableHandle] = []
        self._inputs: tuple[Tensor, int] | None = None  # what the outputs are of, and its version
        self._outputs: Any = None

    def before_train(self, runner: Any) -> None:
        """Load the teacher, and give the head's loss its outputs."""
        self.after_train(runner)
        model: Any = unwrap(runner.model)
        loss = _loss_of(model)
        resumed = bool(runner.cfg.get('resume'))
        path = self.teacher or (None if resumed else runner.cfg.get('load_from'))
        if path is None:
            what = 'that is resumed, whose load_from is its own checkpoint' if resumed else 'without load_from'
            raise UserError(
                f'DistillationHook: teacher=None is not allowed in a run {what}: write '
                "custom_hooks = [dict(type='DistillationHook', teacher='float.pth')]"
            )
        teacher = _load(runner, path).to(next(model.parameters()).device)

        def run(backbone: nn.Module, args: tuple[Any, ...]) -> None:
            (inputs,) = args
            new = self._inputs is None or self._inputs[0] is not inputs or self._inputs[1] != inputs._version
            if backbone.training and new:
                with torch.no_grad():
                    self._outputs = teacher(inputs, None, mode='tensor')
                self._inputs = inputs, inputs._version

        def mix(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not module.training:
                return None
            output, labels, *rest = args
            return output, mixture(module, labels, self._outputs, self.weight), *rest

        # The backbone's input is the batch as a method has cut it down, which the model's own need not be.
        self._handles = [model.backbone.register_forward_pre_hook(run), loss.register_forward_pre_hook(mix)]
        print_log(f'Distillation from {path}: {self.weight:g} of the loss is against its output', 'current')

    def after_train(self, runner: Any) -> None:
        """Leave nothing behind on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._outputs = [], None, None


def mixture(loss: Any, labels: Any, teacher: Any, weight: float) -> Any:
    """What a ``KeypointMSELoss`` or a ``KLDiscretLoss`` is given as labels; ``weight`` is the teacher's share.

    Labels and the teacher's output are heatmaps (N, K, H, W), or the two SimCC vectors, (N, K, W) and (N, K, H).

    Raises ValueError: The shapes differ.
    """
    pair = isinstance(labels, (list, tuple))
    ours, theirs = (labels, teacher) if pair else ([labels], [teacher])
    shapes = [[tuple(part.shape) for part in parts] for parts in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError(f'DistillationHook: the teacher gives {shapes[1]} where the labels are {shapes[0]}')
    mixed = [_mix(loss, own, other.to(own.dtype), weight) for own, other in zip(ours, theirs, strict=True)]
    return tuple(mixed) if pair else mixed[0]


def _mix(loss: Any, labels: Tensor, teacher: Tensor, weight: float) -> Tensor:
    if hasattr(loss, 'label_softmax'):  # a KLDiscretLoss compares distributions, which it makes of the outputs
        teacher = (teacher * loss.beta).softmax(-1)
        if loss.label_softmax:  # and of the labels: it is given what it makes the mixture of
            own = (labels * loss.label_beta).softmax(-1)
            mixed: Tensor = own.lerp(teacher, weight).clamp_min(torch.finfo(own.dtype).tiny).log() / loss.label_beta
            return mixed
    return labels.lerp(teacher, weight)


def _loss_of(model: Any) -> nn.Module:
    loss = getattr(getattr(model, 'head', None), 'loss_module', None)
    kind = type(loss).__name__
    if kind not in ('KeypointMSELoss', 'KLDiscretLoss') or getattr(loss, 'skip_empty_channel', False):
        raise UnsupportedError(
            'DistillationHook works with heads of KeypointMSELoss (without skip_empty_channel) and of KLDiscretLoss, '
            f'and this one has {kind}: take the hook out of custom_hooks'
        )
    assert isinstance(loss, nn.Module)
    return loss


def _load(runner: Any, path: str) -> nn.Module:
    """The run's model in float, in evaluation mode, with a checkpoint's weights."""
    before = RandomState.capture()
    try:
        teacher: nn.Module = MODELS.build(float_config(runner.cfg.model))
        load_checkpoint(teacher, path, map_location='cpu', strict=True, logger='current')
    except RuntimeError as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f"DistillationHook: teacher='{path}' is not of the run's model in float: take its checkpoint ({reason})"
        ) from error
    finally:
        before.restore()
    return teacher.eval()
