"""Where a model keeps its loss modules, and what is known of heads that treat their losses specially."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmengine.logging import MessageHub
from torch import nn
from torch.nn.modules.loss import _Loss

from mm_sharp.errors import RECOMMENDED, UnsupportedError

# MMPose heads that match predictions with people: a row of their losses is an anchor or a person.
_ROWS_ARE_NOT_SAMPLES = {'YOLOXPoseHead', 'RTMOHead', 'CIDHead', 'EDPoseHead'}

NAMING_RULE = (
    'a module is taken for a loss if its attribute has "loss" or "criterion" in its name, if the name of its class '
    'ends in "Loss" or "Criterion", or if it is derived from one of torch.nn\'s losses'
)


class PerSampleLossError(UnsupportedError):
    """A model's loss has no form for single samples that could be found."""

    def __init__(self, what: str) -> None:
        self.what = what  # the reason alone, without advice
        super().__init__(
            f'{what} ESAM and AUSAM need the loss of every sample. What works with every model and head is SAM: '
            f"optim_wrapper = dict(type='SAMOptimWrapper', {RECOMMENDED}), and AUSAM "
            "with draw='uniform'. docs/per_sample_losses.md lists "
            'the heads and losses that work with all three.'
        )


@dataclass(frozen=True)
class LossModule:
    """A loss module, the module that has it, and its name within the model, such as ``head.loss_module``."""

    module: nn.Module
    owner: nn.Module
    path: str

    @cached_property
    def name(self) -> str:
        """For messages: owner, path and class."""
        return f"{type(self.owner).__name__}'s {self.path} ({type(self.module).__name__})"

    def outside_factor(self, model: nn.Module, index: int) -> float:
        """What the model multiplies the ``index``-th output by: 1 but for two models of MMPose.

        ``DSNTHead`` drops its second loss from an epoch on, and ``DWPoseDistiller`` fades its distillation losses out
        over the epochs, or leaves the student's own out.
        """
        if type(self.owner).__name__ == 'DSNTHead' and index > 0:
            switch: Any = self.owner.lambda_t
            return 0.0 if switch > 0 and MessageHub.get_current_instance().get_info('epoch') >= switch else 1.0
        if type(model).__name__ == 'DWPoseDistiller':
            distiller: Any = model
            if self.path.startswith('distill_losses.'):
                return 1.0 if distiller.two_dis else 1.0 - distiller.epoch / distiller.max_epochs
            return 0.0 if distiller.two_dis else 1.0
        return 1.0


def find_losses(model: nn.Module) -> list[LossModule]:
    """The outermost loss modules of ``model``, each once; a PerSampleLossError for heads whose rows are not samples.

    What a loss is made of is not looked at, but in a "criterion" of another class, which may only hold losses.
    """
    for member in model.modules():
        if any(cls.__name__ in _ROWS_ARE_NOT_SAMPLES for cls in type(member).__mro__):
            raise PerSampleLossError(f'{type(member).__name__}: the rows of its losses are anchors or people.')
    found: dict[int, LossModule] = {}
    for loss in _walk(model, ''):
        found.setdefault(id(loss.module), loss)
    return list(found.values())


def has_losses(name: str, module: nn.Module) -> bool:
    """Whether a module that is called ``name`` is a loss, or has one."""
    return _has_a_losses_name(name) or _is_of_a_losses_class(module) or any(True for _ in _walk(module, ''))


def is_neither(loss: nn.Module) -> bool:
    """Whether a loss is known to divide by a count over the batch (equal counts would hide it) or compare samples."""
    for module in loss.modules():
        # MMPose's classes, and those derived from them.
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith('mmpose.')}
        counted = 'SoftWeightSmoothL1Loss' in names and module.use_target_weight and not module.supervise_empty
        if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)):
            counted = module.weight is not None and module.reduction == 'mean'
        if counted or names & {'BoneLoss', 'FocalHeatmapLoss', 'SemiSupervisionLoss', 'InfoNCELoss'}:
            return True
    return False


def _has_a_losses_name(name: str) -> bool:
    return 'loss' in name.lower() or 'criterion' in name.lower()


def _is_of_a_losses_class(module: Any) -> bool:
    has_name = type(module).__name__.endswith(('Loss', 'Criterion'))
    return isinstance(module, _Loss) or (isinstance(module, nn.Module) and has_name)


def _walk(owner: nn.Module, prefix: str) -> Iterator[LossModule]:
    for name, value in [*owner.named_children(), *_plain_containers(owner)]:
        path = prefix + name
        certain = 'loss' in name.lower() or _is_of_a_losses_class(value)
        if certain or _has_a_losses_name(name):
            yield from _losses_in(value, owner, path)
        elif not isinstance(value, nn.Module):
            yield from (loss for loss in _losses_in(value, owner, path) if _is_of_a_losses_class(loss.module))
        if not certain and isinstance(value, nn.Module):
            yield from _walk(value, path + '.')


def _plain_containers(module: nn.Module) -> list[tuple[str, Any]]:
    items = vars(module).items()
    return [(name, value) for name, value in items if type(value) in (list, tuple, dict) and not name.startswith('_')]


def _parts(value: Any) -> dict[str, Any]:
    """What is in a plain container, by name."""
    if isinstance(value, (list, tuple)):
        return {str(i): item for i, item in enumerate(value)}
    return value if isinstance(value, dict) else {}


def _losses_in(value: Any, owner: nn.Module, path: str) -> Iterator[LossModule]:
    """``value`` itself, or what it contains where it is a container that cannot be called."""
    if isinstance(value, nn.Module) and type(value).forward is not nn.Module.forward:
        yield LossModule(value, owner, path)
        return
    parts = dict(value.named_children()) if isinstance(value, nn.Module) else _parts(value)
    for name, item in parts.items():
        yield from _losses_in(item, owner, f'{path}.{name}')
